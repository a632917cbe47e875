"""The study of the supplement's section B: which runs it has, training and probing them, and their results."""

import gc
import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, PartialState
from transformers import set_seed

from ..data.media import MediaLoader
from ..data.packing import write_whole
from ..modeling_vicmae import ViCMAEForPreTraining, ViCMAEModel
from ..processors import build_processors
from ..settings import REQUIRED, ArgumentsError, parse_arguments, setting
from .arguments import PretrainingArguments
from .pretraining import build_frame_pairs, pretrain
from .reporting import read_metrics
from .session import build_model, start_session
from .study_probes import StudyProbes


# Names of the methods, and their objectives (section B).
METHODS = {
    "mae": "none",
    "mae_simsiam": "simsiam",
    "mae_vicreg": "vicreg",
    "vicmae": "info_nce",
}
# Beside distant frames, which all methods get. The paper's videos have 30 frames a second.
FRAME_GAPS = {
    "same": {"frame_sampling": "same"},
    "4_frames": {"frame_sampling": "fixed_gap", "gap_seconds": 4 / 30},
}
# What the log says of collapse.
COLLAPSE = ("std", "rank", "alignment", "uniformity")


@dataclass(kw_only=True)
class StudyArguments:
    """Settings of `run_study.py`."""

    recipe: str = setting(REQUIRED, "settings of run_pretraining.py that all runs share, a YAML or JSON file")
    train_data: list[str] = setting(REQUIRED, "folders, Parquet files, stores or dataset names to pretrain on")
    probe_train_data: str = setting(REQUIRED, "labelled folder or dataset that the probes are trained on")
    probe_eval_data: str = setting(REQUIRED, "labelled folder or dataset of held-out samples")
    output_dir: str = setting(REQUIRED, "where everything is written; what is done there is not done again")
    report: str | None = setting(None, "the report, Markdown; default: output_dir/report.md")
    num_seeds: int = setting(3, "runs of each method, with the seeds 0, 1, ...")
    contrastive_weights: list[float] = setting(
        [0.025, 0.1, 0.4], "tried for each method; the reported runs take the best of them"
    )
    sweep_seed: int = setting(1000, "seed of the runs that try them, none of which is reported as a result")
    frame_gaps: list[str] = setting(["same", "4_frames"], "of ViC-MAE's pairs, beside distant: the frame-gap ablation")
    mask_ratios: list[float] = setting([], "of ViC-MAE, beside the recipe's")
    label_fractions: list[float] = setting([0.05, 0.1, 0.25, 0.5, 0.75, 1.0], "shares of the probe's labels (Table 5)")
    num_subsets: int = setting(3, "draws of each share of the labels that is not 1, averaged")
    num_frames: int = setting(4, "frames of a video that a probe reads")

    def __post_init__(self):
        for name in ["num_seeds", "num_subsets", "num_frames"]:
            if getattr(self, name) < 1:
                raise ArgumentsError(f"--{name} must be at least 1, got {getattr(self, name)}.")
        if not self.sweep_seed >= self.num_seeds:
            raise ArgumentsError(
                f"--sweep_seed must not be one of the reported seeds 0 to {self.num_seeds - 1}, got {self.sweep_seed}."
            )
        if not self.contrastive_weights or min(self.contrastive_weights) < 0:
            raise ArgumentsError(
                f"--contrastive_weights: expected some, none below 0, got {self.contrastive_weights}."
            )
        unknown = [gap for gap in self.frame_gaps if gap not in FRAME_GAPS]
        if unknown:
            raise ArgumentsError(f"--frame_gaps: expected some of {', '.join(FRAME_GAPS)}, got {unknown[0]}.")
        if 1.0 not in self.label_fractions or not all(0 < fraction <= 1 for fraction in self.label_fractions):
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
        weight: its contrastive weight.
        variant: the frame gap or mask ratio that sets it apart; None for the parts that have none.
        settings: as `run_pretraining.py` takes them.
    """

    name: str
    part: Literal["sweep", "methods", "frame_gap", "mask_ratio"]
    method: str
    weight: float
    variant: str | float | None
    settings: PretrainingArguments


class Plan:
    """
    Which runs a study has.

    Raises:
        ArgumentsError: if the recipe cannot be read, or is not of distant frames.
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

    def sweep(self) -> list[Run]:
        """One run of each contrastive method with each weight; none if there is no choice."""
        if len(self.study.contrastive_weights) == 1:
            return []
        return [
            self._run("sweep", method, self.study.sweep_seed, weight, name=f"sweep-{method}-{weight:g}")
            for method, objective in METHODS.items()
            if objective != "none"
            for weight in self.study.contrastive_weights
        ]

    def reported(self, weights: dict[str, float]) -> list[Run]:
        """All other runs, seed by seed, with the weights of the methods."""
        runs = []
        for seed in range(self.study.num_seeds):
            for method in METHODS:
                runs.append(self._run("methods", method, seed, weights[method], name=f"{method}-seed{seed}"))
            for gap in self.study.frame_gaps:
                name = f"vicmae-{gap}-seed{seed}"
                runs.append(
                    self._run(
                        "frame_gap", "vicmae", seed, weights["vicmae"], name=name, variant=gap, **FRAME_GAPS[gap]
                    )
                )
            for ratio in self.study.mask_ratios:
                name = f"vicmae-mask{ratio:g}-seed{seed}"
                runs.append(self._run("mask_ratio", "vicmae", seed, weights["vicmae"], name=name, variant=ratio))
        return runs

    def _run(
        self,
        part: str,
        method: str,
        seed: int,
        weight: float,
        *,
        name: str,
        variant: str | float | None = None,
        **changes,
    ) -> Run:
        overrides = [
            self.recipe.config_overrides,
            f"contrastive_loss={METHODS[method]}",
            f"contrastive_weight={weight}",
        ]
        if part == "mask_ratio":
            overrides.append(f"mask_ratio={variant}")
        settings = replace(
            self.recipe,
            output_dir=str(self.folder / "runs" / name),
            config_overrides=",".join(filter(None, overrides)),
            seed=seed,
            resume_from_checkpoint="latest",
            **changes,
        )
        return Run(name, part, method, weight, variant, settings)


def run_study(study: StudyArguments) -> dict[str, Any]:
    """
    Trains and probes what is not done yet, and writes `output_dir/all_results.json`.

    Several processes train together; the first one probes.

    Returns:
        What was written: settings, references (raw pixels, untrained encoders), sweep, chosen weights, runs.

    Raises:
        ArgumentsError: if settings are wrong, or `output_dir` holds runs with other ones.
        InputError: if data cannot be read.
        NonFiniteLossError: if the loss of a run becomes infinite or NaN.
    """
    plan = Plan(study)
    # What PartialState reads from here on; by itself it does not see several processes on a CPU.
    Accelerator(mixed_precision=plan.recipe.mixed_precision)
    plan.folder.mkdir(parents=True, exist_ok=True)
    config = build_model(ViCMAEForPreTraining, plan.recipe).config
    probes = StudyProbes(
        study.probe_train_data,
        study.probe_eval_data,
        build_processors(config)[0],
        MediaLoader(plan.recipe.video_backend, plan.recipe.seconds_per_file),
        num_frames=study.num_frames,
        label_fractions=study.label_fractions,
        num_subsets=study.num_subsets,
    )
    references = {
        "raw_pixels": [probes.cached(plan.folder / "raw_pixels.json", probes.probe_pixels)],
        "untrained": [
            probes.cached(
                plan.folder / f"untrained-seed{seed}.json", lambda seed=seed: probes.probe(untrained(plan, seed))
            )
            for seed in range(study.num_seeds)
        ],
    }
    sweep = train_and_probe(plan.sweep(), probes, plan.folder)
    weights = choose_weights(sweep, study.contrastive_weights, config.pooling)
    runs = train_and_probe(plan.reported(weights), probes, plan.folder)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device_name(),
        "settings": asdict(study),
        "budget": read_budget(plan.folder / "runs" / "vicmae-seed0"),
        "pooling": config.pooling,
        "probe_data": probes.cached(plan.folder / "probe_data.json", probes.describe),
        "references": references,
        "sweep": sweep,
        "weights": weights,
        "runs": runs,
    }
    if PartialState().is_main_process:
        write_whole(plan.folder / "all_results.json", json.dumps(results, indent=2) + "\n")
    return results


def train_and_probe(runs: Sequence[Run], probes: StudyProbes, folder: Path) -> list[dict[str, Any]]:
    """What came out of each run, of those done before and of those done now."""
    results = []
    for number, run in enumerate(runs, start=1):
        claim_settings(run, folder / "settings" / f"{run.name}.json")
        output_dir = Path(run.settings.output_dir)
        if not (output_dir / "all_results.json").exists():
            if PartialState().is_main_process:
                print(f"{number} of {len(runs)}: {run.name}", file=sys.stderr, flush=True)
            train_run(run.settings)
        measure = probes.cross_validate if run.part == "sweep" else probes.probe
        probed = probes.cached(
            output_dir / "study_probe.json",
            lambda measure=measure, output_dir=output_dir: measure(
                ViCMAEModel.from_pretrained(output_dir, video=False)
            ),
        )
        results.append(summarize(run, probed))
    return results


def train_run(settings: PretrainingArguments) -> None:
    """What `run_pretraining.py` does with these settings, in this process."""
    accelerator = start_session(settings)
    model = build_model(ViCMAEForPreTraining, settings)
    pretrain(accelerator, model, build_frame_pairs(accelerator, model, settings), settings)
    accelerator.free_memory()
    gc.collect()


def claim_settings(run: Run, path: Path) -> None:
    """
    Writes the settings of a run, from which `run_pretraining.py` would repeat it, or compares them with those that it
    was begun with.

    Raises:
        ArgumentsError: if they differ.
    """
    settings = {name: value for name, value in asdict(run.settings).items() if value is not None}
    if PartialState().is_main_process and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2) + "\n")
    PartialState().wait_for_everyone()
    found = json.loads(path.read_text())
    differences = [
        f"{name} {found.get(name)}, now {settings.get(name)}"
        for name in sorted(found.keys() | settings.keys())
        if found.get(name) != settings.get(name)
    ]
    if differences:
        raise ArgumentsError(
            f"{run.settings.output_dir} was begun with {'; '.join(differences)}. Choose another --output_dir, or "
            f"delete that folder and {path}."
        )


def choose_weights(
    sweep: Sequence[dict[str, Any]], contrastive_weights: Sequence[float], pooling: str
) -> dict[str, float]:
    """The weight of each method whose probe did best on held-out parts of the training labels; the first of equals."""
    weights = dict.fromkeys(METHODS, contrastive_weights[0])
    weights["mae"] = 0.0
    for method in {result["method"] for result in sweep}:
        tried = [result for result in sweep if result["method"] == method]
        weights[method] = max(tried, key=lambda result: result["probe"][pooling]["top1"])["weight"]
    return weights


def summarize(run: Run, probed: dict[str, Any]) -> dict[str, Any]:
    """What the results of a study hold of a run."""
    folder = Path(run.settings.output_dir)
    trained = json.loads((folder / "all_results.json").read_text())
    metrics = read_metrics(folder)
    names = [f"{kind}_{figure}" for kind in ("feature", "projection") for figure in COLLAPSE]
    return {
        "name": run.name,
        "part": run.part,
        "method": run.method,
        "seed": run.settings.seed,
        "weight": run.weight,
        "variant": run.variant,
        "probe": probed,
        "reconstruction_loss": metrics[-1]["reconstruction_loss"],
        "contrastive_loss": metrics[-1].get("contrastive_loss"),
        "projection_size": json.loads((folder / "config.json").read_text())["projector_output_size"],
        "collapse": {name: metrics[-1][name] for name in names if name in metrics[-1]},
        "history": {name: [line[name] for line in metrics] for name in ("step", "feature_std", "feature_rank")},
        "train_seconds": trained["train_seconds"],
    }


def untrained(plan: Plan, seed: int) -> ViCMAEModel:
    """The encoder that the runs with this seed start from."""
    set_seed(seed)
    settings = replace(plan.recipe, seed=seed)
    return build_model(ViCMAEForPreTraining, settings).vicmae


def read_budget(folder: Path) -> dict[str, Any]:
    """What every run of the study had to spend."""
    arguments = json.loads((folder / "arguments.json").read_text())
    results = json.loads((folder / "all_results.json").read_text())
    model = arguments["model"]
    return {
        "num_steps": arguments["num_steps"],
        "total_batch_size": arguments["total_batch_size"],
        "epochs": results["epochs"],
        "num_train_files": results["num_train_files"],
        **{
            name: arguments[name]
            for name in ("learning_rate", "warmup_epochs", "weight_decay", "contrastive_start_epoch", "num_processes")
        },
        **{
            name: model[name]
            for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "mask_ratio", "temperature")
        },
    }


def device_name() -> str:
    """What the study ran on."""
    device = PartialState().device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()}"
