"""Settings of the study of real pictures and people, and what each of its steps leaves behind."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from study_plan import METHODS
from study_runs import claim_settings

from vicmae_hf.files import read_json, write_json
from vicmae_hf.settings import REQUIRED, ArgumentsError, Settings, setting


@dataclass(kw_only=True)
class RealArguments(Settings):
    """Settings of `run_real.py`."""

    output_dir: str = setting(REQUIRED, "folder to write everything to; what is done there is not done again")
    report: str | None = setting(None, "Markdown file of the report; default: output_dir/report.md")
    num_seeds: int = setting(3, "runs of each method on images, with the seeds 0, 1, ...", minimum=1)

    images: str = setting("uoft-cs/cifar10", "dataset on the Hub, or folder of train.parquet and test.parquet")
    image_recipe: str = setting(REQUIRED, "settings of run_pretraining.py that all runs on images share")
    vicreg_invariance_weight: float = setting(1.0, "lambda of MAE + VICReg, see docs/study.md", minimum=0)
    contrastive_weight: float = setting(0.1, "contrastive weight of all methods but MAE", minimum=0)
    num_probe_images: int = setting(10_000, "training images that probes and neighbours learn from", minimum=1)
    num_test_images: int = setting(2_000, "test images that everything is measured on", minimum=1)
    finetuning_recipe: str = setting(REQUIRED, "settings of run_classification.py for finetuning on images")
    label_fractions: list[float] = setting(
        [0.01, 0.1, 1.0], "shares of the labels that encoders are finetuned on (Table 5)", above=0, maximum=1
    )
    num_finetuning_seeds: int = setting(3, "how many of these runs are finetuned; at most num_seeds", minimum=1)
    simclr_updates: list[int] = setting([], "updates of lightly's SimCLR, one row per number", minimum=1)
    lightly_mae_updates: list[int] = setting([], "updates of lightly's MAE, one row per number", minimum=1)
    long_methods: list[str] = setting([], "also trained longer, with seed 0; their checkpoints are probed")
    long_updates: int = setting(320, "updates of the long_methods", minimum=1)
    long_checkpointing_steps: int = setting(80, "updates between their checkpoints", minimum=1)

    videos: str | None = setting(None, "folder CLASS/PERSON.mp4; without it, images alone")
    video_recipe: str | None = setting(None, "settings of run_pretraining.py for videos")
    video_finetuning_recipe: str | None = setting(None, "settings of run_classification.py for videos")
    num_video_seeds: int = setting(1, "runs of each fold, with the seeds 0, 1, ...", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if self.videos and not (self.video_recipe and self.video_finetuning_recipe):
            raise ArgumentsError("--videos needs --video_recipe and --video_finetuning_recipe.")
        self.num_finetuning_seeds = min(self.num_finetuning_seeds, self.num_seeds)
        unknown = [method for method in self.long_methods if method not in METHODS]
        if unknown:
            raise ArgumentsError(f"--long_methods: expected some of {', '.join(METHODS)}, got {unknown[0]}.")
        if 1.0 not in self.label_fractions:
            raise ArgumentsError(f"--label_fractions: expected 1 among them, got {self.label_fractions}.")

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)


def read_recipe(path: str) -> dict[str, Any]:
    """Settings of a script by name, for the function of the package that does the same."""
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def claim_recipes(real: RealArguments, part: str, names: Sequence[str], recipes: Sequence[str]) -> None:
    """
    Notes the settings `names` of a part of the study, and what is written in its `recipes`. Raises an ArgumentsError
    if `output_dir` was begun with others: `once` would take what they made for what these make.
    """
    settings = {name: getattr(real, name) for name in names}
    settings |= {name: read_recipe(getattr(real, name)) for name in recipes}
    message = f"{real.folder} was begun with {{}}. Choose another --output_dir."
    claim_settings(settings, real.folder / "settings" / f"{part}.json", message)


def once(path: Path, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """
    What `compute` returned, and as `cpu_seconds` what it took of this process, now or in the earlier call that wrote
    `path`. CPU seconds, because a busy machine makes the clock's meaningless.
    """
    if not path.exists():
        started = time.process_time()
        result = compute()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result | {"cpu_seconds": time.process_time() - started})
    return read_json(path)


def say(text: str) -> None:
    """What is done next, on stderr."""
    print(text, file=sys.stderr, flush=True)
