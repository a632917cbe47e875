"""Which runs the study of the supplement's section B has."""

import copy
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from vicmae_hf.command_line import parse_arguments
from vicmae_hf.configuration_vicmae import ViCMAEConfig
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.settings import REQUIRED, ArgumentsError, Settings, setting


# Names of the methods, and their objectives (section B).
METHODS = {
    "mae": "none",
    "mae_simsiam": "simsiam",
    "mae_vicreg": "vicreg",
    "vicmae": "info_nce",
}
# What is tuned of each method, one setting after the other.
TUNED = {
    "mae": ["base_learning_rate"],
    "mae_simsiam": ["base_learning_rate", "contrastive_weight"],
    "mae_vicreg": ["vicreg_invariance_weight", "base_learning_rate", "contrastive_weight"],
    "vicmae": ["base_learning_rate", "contrastive_weight"],
}
# In names of folders.
SHORT_NAMES = {"base_learning_rate": "lr", "contrastive_weight": "weight", "vicreg_invariance_weight": "invariance"}
# Settings of the study that list what is tried.
CANDIDATES = ["learning_rate_factors", "contrastive_weights", "vicreg_invariance_weights"]
# Beside distant frames, which all methods get. The paper's videos have 30 frames a second.
FRAME_GAPS = {
    "same": {"frame_sampling": "same"},
    "4_frames": {"frame_sampling": "fixed_gap", "gap_seconds": 4 / 30},
}


@dataclass(kw_only=True)
class StudyArguments(Settings):
    """Settings of `run_study.py`."""

    recipe: str = setting(REQUIRED, "settings of run_pretraining.py that all runs share, a YAML or JSON file")
    train_data: list[str] = setting(REQUIRED, "folders, Parquet files, stores or dataset names to pretrain on")
    probe_train_data: str = setting(REQUIRED, "labelled folder or dataset that the probes are trained on")
    probe_eval_data: str = setting(REQUIRED, "labelled folder or dataset of held-out samples")
    output_dir: str = setting(REQUIRED, "folder to write everything to; what is done there is not done again")
    report: str | None = setting(None, "Markdown file of the report; default: output_dir/report.md")
    num_seeds: int = setting(3, "runs of each method, with the seeds 0, 1, ...", minimum=1)
    learning_rate_factors: list[float] = setting(
        [1.0, 0.25, 0.0625],
        "multiples of the recipe's learning rate, tried for each method; tuning starts with the first",
        minimum=0,
    )
    contrastive_weights: list[float] = setting([0.1, 0.025, 0.4], "weights tried for each method but MAE", minimum=0)
    vicreg_invariance_weights: list[float] = setting(
        [25.0, 1.0, 0.1], "tried for MAE + VICReg (Bardes et al.: 25)", minimum=0
    )
    sweep_seed: int = setting(1000, "seed of the tuning runs, none of which is reported as a result")
    frame_gaps: list[str] = setting(
        ["same", "4_frames"], "frame gaps of ViC-MAE's pairs to compare with distant (ablation)", may_be_empty=True
    )
    mask_ratios: list[float] = setting([], "mask ratios of ViC-MAE, besides the recipe's", above=0, below=1)
    label_fractions: list[float] = setting(
        [0.05, 0.1, 0.25, 0.5, 0.75, 1.0], "shares of the probe's labels (Table 5)", above=0, maximum=1
    )
    num_subsets: int = setting(3, "random draws of each share of labels below 1, averaged", minimum=1)
    num_frames: int = setting(4, "frames of a video that a probe reads", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if not self.sweep_seed >= self.num_seeds:
            raise ArgumentsError(
                f"--sweep_seed must not be one of the reported seeds 0 to {self.num_seeds - 1}, got {self.sweep_seed}."
            )
        for name in CANDIDATES:
            if not getattr(self, name):
                raise ArgumentsError(f"--{name}: expected at least one value, got none.")
        for name in [*CANDIDATES, "frame_gaps", "mask_ratios", "label_fractions"]:
            values = getattr(self, name)
            if len(set(values)) < len(values):
                raise ArgumentsError(f"--{name}: expected each value once, got {values}.")
        unknown = [gap for gap in self.frame_gaps if gap not in FRAME_GAPS]
        if unknown:
            raise ArgumentsError(f"--frame_gaps: expected some of {', '.join(FRAME_GAPS)}, got {unknown[0]}.")
        if 1.0 not in self.label_fractions:
            raise ArgumentsError(
                f"--label_fractions: expected shares above 0, and 1 among them, got {self.label_fractions}."
            )


@dataclass(frozen=True)
class Run:
    """
    A pretraining of the study.

    Args:
        name: of its folder under `output_dir/runs`.
        part: what it is for.
        method: one of `METHODS`.
        tuned: values of the settings in `TUNED`.
        variant: the frame gap or mask ratio that sets it apart; None for the parts that have none.
        settings: as `run_pretraining.py` takes them.
    """

    name: str
    part: Literal["sweep", "methods", "frame_gap", "mask_ratio"]
    method: str
    tuned: dict[str, float]
    variant: str | float | None
    settings: PretrainingArguments


class Plan:
    """
    Which runs a study has.

    Raises:
        ArgumentsError: if the recipe cannot be read, is not of distant frames, or has what a study cannot use.
    """

    def __init__(self, study: StudyArguments):
        self.study = study
        self.folder = Path(study.output_dir)
        self.recipe = parse_arguments(
            PretrainingArguments,
            [study.recipe, "--train_data", *study.train_data, "--output_dir", str(self.folder / "runs")],
        )
        if self.recipe.frame_sampling != "distant":
            raise ArgumentsError(
                f"{study.recipe}: frame_sampling must be distant, which --frame_gaps are compared with, got "
                f"{self.recipe.frame_sampling}."
            )
        for name in ["model_name_or_path", "push_to_hub", "report_to"]:
            if getattr(self.recipe, name):
                raise ArgumentsError(
                    f"{study.recipe}: leave out {name}. A study starts from random weights, and keeps its runs in "
                    "--output_dir."
                )
        self.candidates = {
            "base_learning_rate": [factor * self.recipe.base_learning_rate for factor in study.learning_rate_factors],
            "contrastive_weight": study.contrastive_weights,
            "vicreg_invariance_weight": study.vicreg_invariance_weights,
        }

    def check_mask_ratios(self, config: ViCMAEConfig) -> None:
        """Raises an ArgumentsError if a mask ratio is the recipe's, whose `config` this is, or hides all patches."""
        num_patches = math.prod(config.patch_grid)
        for ratio in self.study.mask_ratios:
            if ratio == config.mask_ratio:
                raise ArgumentsError(f"--mask_ratios: {ratio:g} is the recipe's, which is run anyway.")
            masked = copy.deepcopy(config)
            masked.mask_ratio = ratio
            try:
                masked.count_visible(num_patches)
            except ValueError as error:
                raise ArgumentsError(f"--mask_ratios: {error}") from error

    def trial(self, method: str, tuned: dict[str, float]) -> Run:
        """A run that tries these values."""
        values = "-".join(f"{SHORT_NAMES[name]}{value:g}" for name, value in tuned.items())
        return self._run("sweep", method, self.study.sweep_seed, tuned, name=f"sweep-{method}-{values}")

    def reported(self, tuned: dict[str, dict[str, float]]) -> list[Run]:
        """The runs whose results are reported, seed by seed, with the values of each method."""
        runs = []
        for seed in range(self.study.num_seeds):
            for method in METHODS:
                runs.append(self._run("methods", method, seed, tuned[method], name=f"{method}-seed{seed}"))
            for gap in self.study.frame_gaps:
                name = f"vicmae-{gap}-seed{seed}"
                changes = FRAME_GAPS[gap]
                runs.append(self._run("frame_gap", "vicmae", seed, tuned["vicmae"], name=name, variant=gap, **changes))
            for ratio in self.study.mask_ratios:
                name = f"vicmae-mask{ratio:g}-seed{seed}"
                runs.append(self._run("mask_ratio", "vicmae", seed, tuned["vicmae"], name=name, variant=ratio))
        return runs

    def _run(
        self,
        part: str,
        method: str,
        seed: int,
        tuned: dict[str, float],
        *,
        name: str,
        variant: str | float | None = None,
        **changes,
    ) -> Run:
        config = {"contrastive_loss": METHODS[method], "contrastive_weight": 0.0} | tuned
        learning_rate = config.pop("base_learning_rate")
        if part == "mask_ratio":
            config["mask_ratio"] = variant
        overrides = [self.recipe.config_overrides, *(f"{field}={value}" for field, value in config.items())]
        settings = replace(
            self.recipe,
            output_dir=str(self.folder / "runs" / name),
            config_overrides=",".join(filter(None, overrides)),
            base_learning_rate=learning_rate,
            seed=seed,
            resume_from_checkpoint="latest",
            **changes,
        )
        return Run(name, part, method, tuned, variant, settings)
