"""Settings of classification."""

from dataclasses import dataclass
from typing import Any, Literal

from ..data.sources.labelled import HeldOutSettings
from ..evaluation.probes import LINEAR_BASE_LEARNING_RATE, LINEAR_EPOCHS, LINEAR_WARMUP_EPOCHS
from ..settings import REQUIRED, ArgumentsError, setting
from ..training.arguments import TrainingArguments


# Defaults of the two methods: Table 2 for ViT-B (the base learning rate is SSv2's), and Table 3.
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "finetune": {
        "num_train_epochs": 100,
        "base_learning_rate": 1e-3,
        "warmup_epochs": 5.0,
        "weight_decay": 0.05,
        "layer_decay": 0.65,
        "drop_path_rate": 0.1,
        "horizontal_flip": True,
        "rand_augment_magnitude": 9.0,
        "label_smoothing": 0.1,
        "mixup": 0.8,
    },
    "linear": {
        "num_train_epochs": LINEAR_EPOCHS,
        "base_learning_rate": LINEAR_BASE_LEARNING_RATE,
        "warmup_epochs": LINEAR_WARMUP_EPOCHS,
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "drop_path_rate": 0.0,
        "horizontal_flip": False,
        "rand_augment_magnitude": 0.0,
        "label_smoothing": 0.0,
        "mixup": 0.0,
    },
}
# Table 5 trains on a part of the labels without RandAugment and mixup.
LABEL_FRACTION_DEFAULTS = {"rand_augment_magnitude": 0.0, "mixup": 0.0}


@dataclass(kw_only=True)
class ClassificationArguments(TrainingArguments, HeldOutSettings):
    """Settings of `run_classification.py`. Creating it fills in the settings that depend on the method."""

    task: Literal["image", "video"] = setting(REQUIRED, "what is classified")
    method: Literal["finetune", "linear"] = setting(
        "finetune", "train the whole model (Table 2), or a linear classifier on the frozen encoder (Table 3)"
    )
    train_data: list[str] = setting(
        REQUIRED, "labelled folder ROOT/CLASS_NAME/FILE, list of `path label`, or dataset with labels"
    )
    eval_data: str = setting(
        REQUIRED, "held-out samples, given like train_data; the model that is best on them is kept"
    )
    label_names: str | None = setting(
        None, "file of class names in index order, one per line; default: the model's, or the data's"
    )
    label_fraction: float | None = setting(
        None,
        "share of each class's training samples to use (Table 5); turns RandAugment and mixup off unless set",
        above=0,
        maximum=1,
    )
    new_classifier: bool = setting(False, "replace the classifier of a finetuned checkpoint, for other classes")
    num_train_epochs: int | None = setting(
        None, "passes over the data; default: finetune 100, linear 90", minimum=1, maximum=10**6
    )
    base_learning_rate: float | None = setting(
        None, "peak learning rate = this x total batch / 256; default: finetune 1e-3, linear 0.1", minimum=0
    )
    warmup_epochs: float | None = setting(None, "epochs of linear warmup; default: finetune 5, linear 10", minimum=0)
    weight_decay: float | None = setting(None, "applied to matrices only; default: finetune 0.05, linear 0", minimum=0)
    layer_decay: float | None = setting(
        None, "learning-rate decay from layer to layer; default: finetune 0.65", above=0, maximum=1
    )
    drop_path_rate: float | None = setting(
        None, "stochastic depth rate of the last layer; default: finetune 0.1", minimum=0, below=1
    )
    per_device_eval_batch_size: int | None = setting(
        None, "views per process and step; default: as in training", minimum=1
    )
    eval_epochs: int = setting(1, "epochs between evaluations; the last update is always evaluated", minimum=1)
    num_frames: int | None = setting(None, "frames per clip; default: the config's", minimum=1)
    frames_per_second: float = setting(
        7.5,
        "frame rate of a clip, which starts at a random time (7.5: every 4th frame of 30/s); 0 spreads it over the "
        "whole video",
        minimum=0,
    )
    train_augmentation: bool = setting(
        True, "train on random views; without them (linear only) features are computed once and kept"
    )
    crop_scale: list[float] = setting(
        [0.08, 1.0], "smallest and largest share of a frame's area in a random crop", above=0, maximum=1
    )
    horizontal_flip: bool | None = setting(None, "flip half of the samples; default: finetune yes, linear no")
    rand_augment_magnitude: float | None = setting(
        None, "magnitude of RandAugment, 0 to 10; 0 turns it off; default: finetune 9, linear 0", minimum=0, maximum=10
    )
    rand_augment_std: float = setting(0.5, "standard deviation of RandAugment's magnitude", minimum=0)
    random_erasing: float = setting(0.0, "probability of erasing a rectangle", minimum=0, maximum=1)
    label_smoothing: float | None = setting(
        None, "label smoothing; default: finetune 0.1, linear 0", minimum=0, below=1
    )
    mixup: float | None = setting(None, "alpha of mixup; 0 turns it off; default: finetune 0.8, linear 0", minimum=0)
    cutmix: float = setting(0.0, "alpha of cutmix; with both, each batch draws cutmix or mixup", minimum=0)

    plan: bool = setting(False, "estimate what the run takes, like `vicmae plan`, and train nothing")

    def __post_init__(self):
        # None means that the user set nothing; so even a value that equals the other method's default is kept.
        chosen = {name for name in METHOD_DEFAULTS[self.method] if getattr(self, name) is not None}
        defaults = METHOD_DEFAULTS[self.method] | (LABEL_FRACTION_DEFAULTS if self.label_fraction is not None else {})
        for name in defaults.keys() - chosen:
            setattr(self, name, defaults[name])
        super().__post_init__()  # checks the limits, now that all values are there
        if len(self.train_data) != 1:  # a list, because pretraining takes several
            raise ArgumentsError(f"--train_data: expected one labelled source, got {len(self.train_data)}.")
        # The flag always sets it, so an override would be lost without a word.
        if "drop_path_rate" in (self.config_overrides or ""):
            raise ArgumentsError("--config_overrides: drop_path_rate is set by --drop_path_rate.")
        if self.method == "linear":
            self._check_linear()
        elif not self.train_augmentation:
            raise ArgumentsError(
                "--no-train_augmentation keeps features, which needs a frozen encoder: give --method linear."
            )

    def _check_linear(self) -> None:
        if (self.layer_decay, self.drop_path_rate) != (1.0, 0.0):
            raise ArgumentsError(
                "--method linear leaves the encoder as it is; leave out --layer_decay and --drop_path_rate."
            )
        augmentations = ["horizontal_flip", "rand_augment_magnitude", "random_erasing", "mixup", "cutmix"]
        wanted = [name for name in augmentations if getattr(self, name)]
        if wanted and not self.train_augmentation:
            raise ArgumentsError(f"--no-train_augmentation contradicts --{wanted[0]} {getattr(self, wanted[0])}.")
