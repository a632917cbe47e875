"""Settings of pretraining, of classification, and of what runs trained models."""

from dataclasses import dataclass
from typing import Any, Literal

from ..settings import REQUIRED, ArgumentsError, setting


@dataclass(kw_only=True)
class TrainingArguments:
    """What every training script takes; the scripts' own settings are in subclasses."""

    train_data: list[str] = setting(REQUIRED, "folders, frame stores, Parquet files or dataset names")
    output_dir: str = setting(REQUIRED, "where everything is written")
    model_name_or_path: str | None = setting(None, "checkpoint to start from; without it, random weights")
    config_overrides: str | None = setting(None, 'config fields as "name=value,name=value"')
    image_size: list[int] | None = setting(None, "pixels: one number, or height and width; default: the config's")
    per_device_train_batch_size: int = setting(64, "samples per process and step")
    gradient_accumulation_steps: int = setting(1, "steps per update")
    num_train_epochs: int = setting(800, "passes over the data (Table 1: 800)")
    max_train_steps: int | None = setting(None, "updates; overrides the number of epochs")
    base_learning_rate: float = setting(1.5e-4, "learning rate = this x total batch / 256 (Table 1: 1.5e-4)")
    warmup_epochs: float = setting(40.0, "epochs of linear warmup (Table 1: 40)")
    weight_decay: float = setting(0.05, "on matrices only (Table 1: 0.05)")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(None, "default: as accelerate launch says")
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    seed: int = setting(0, "of weights, data order, views and masks")
    dataloader_num_workers: int = setting(4, "loading processes per training process; 0 loads in the training process")
    video_backend: Literal["decord", "torchcodec", "pyav"] = setting("pyav", "video decoder tried first")
    seconds_per_file: float = setting(60.0, "a file that takes longer to read counts as unreadable; 0: no limit")
    max_bad_files: float = setting(0.05, "share of unreadable files that stops the run; one is allowed unless 0")
    logging_steps: int = setting(10, "updates between two lines of metrics.jsonl")
    checkpointing_steps: int = setting(1000, "updates between checkpoints; 0 writes none")
    save_total_limit: int | None = setting(3, "newest checkpoints kept")
    resume_from_checkpoint: str | None = setting(None, "checkpoint folder, or 'latest' of output_dir")
    overwrite_output_dir: bool = setting(False, "allow an output_dir that holds a run; its checkpoints are deleted")
    report_to: list[str] = setting([], "trackers of Accelerate, for example tensorboard")
    push_to_hub: bool = setting(False, "upload output_dir, without checkpoints, to the Hub at the end")
    hub_model_id: str | None = setting(None, "repository on the Hub; default: the name of output_dir")

    def __post_init__(self):
        for name in [
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "logging_steps",
            "max_train_steps",
            "save_total_limit",
        ]:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentsError(f"--{name} must be at least 1, got {value}.")
        for name in [
            "base_learning_rate",
            "warmup_epochs",
            "weight_decay",
            "dataloader_num_workers",
            "seed",
            "seconds_per_file",
        ]:
            if not getattr(self, name) >= 0:
                raise ArgumentsError(f"--{name} must not be negative, got {getattr(self, name)}.")
        if self.checkpointing_steps < 0:
            raise ArgumentsError(f"--checkpointing_steps must not be negative, got {self.checkpointing_steps}.")
        if self.image_size is not None and (len(self.image_size) not in (1, 2) or min(self.image_size) < 1):
            raise ArgumentsError(f"--image_size must be one or two positive numbers, got {self.image_size}.")
        if not 0 <= self.max_bad_files <= 1:
            raise ArgumentsError(f"--max_bad_files is a share between 0 and 1, got {self.max_bad_files}.")


@dataclass(kw_only=True)
class PretrainingArguments(TrainingArguments):
    """Settings of `run_pretraining.py`."""

    train_data_weights: list[float] | None = setting(None, "relative share of each data source; default: its size")
    samples_per_file: int = setting(1, "pairs drawn from each file in an epoch")
    streaming: bool = setting(
        False,
        "read one frame store shard by shard, from the Hub without a copy on disk; there is nothing to decode, and no "
        "limit of --seconds_per_file",
    )
    frame_sampling: Literal["distant", "fixed_gap", "max_gap", "adjacent", "same"] = setting(
        "distant", "which two frames of a video make a pair"
    )
    window_seconds: float = setting(64 / 30, "window of distant sampling; 0 takes the whole video")
    num_segments: int = setting(2, "segments of that window")
    gap_seconds: float = setting(1.0, "gap for fixed_gap and max_gap")
    color_augmentation: bool = setting(False, "colour jitter, grayscale, blur, solarisation, as in the released code")
    contrastive_start_epoch: float = setting(200.0, "the contrastive weight is 0 before (Table 1: 200)")
    probe_data: str | None = setting(None, "labelled folder or dataset on which features are probed during training")
    probe_steps: int = setting(1000, "updates between probes; the last update is always probed")

    def __post_init__(self):
        super().__post_init__()
        if self.probe_steps < 1:
            raise ArgumentsError(f"--probe_steps must be at least 1, got {self.probe_steps}.")


# What the two methods of classification start from: Table 2 for ViT-B (the base learning rate is SSv2's), Table 3.
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
        "num_train_epochs": 90,
        "base_learning_rate": 0.1,
        "warmup_epochs": 10.0,
        "weight_decay": 0.0,
        "layer_decay": 1.0,
        "drop_path_rate": 0.0,
        "horizontal_flip": False,
        "rand_augment_magnitude": 0.0,
        "label_smoothing": 0.0,
        "mixup": 0.0,
    },
}
# Table 5 trains on a part of the labels without them.
LABEL_FRACTION_DEFAULTS = {"rand_augment_magnitude": 0.0, "mixup": 0.0}


@dataclass(kw_only=True)
class ClassificationArguments(TrainingArguments):
    """Settings of `run_classification.py`. Those that depend on the method are filled in when it is created."""

    task: Literal["image", "video"] = setting(REQUIRED, "what is classified")
    method: Literal["finetune", "linear"] = setting(
        REQUIRED, "train the whole model (Table 2), or a linear classifier on the frozen encoder (Table 3)"
    )
    train_data: list[str] = setting(REQUIRED, "labelled folder ROOT/CLASS_NAME/FILE, or dataset with a ClassLabel")
    eval_data: str = setting(REQUIRED, "the same of held-out samples; the best model on them is kept")
    label_names: str | None = setting(
        None, "file of class names in the order of their indices, one a line; default: the model's, or the data's"
    )
    label_fraction: float | None = setting(
        None, "share of each class's training samples (Table 5); RandAugment and mixup are then off unless set"
    )
    new_classifier: bool = setting(False, "replace the classifier of a finetuned checkpoint, for other classes")
    num_train_epochs: int | None = setting(None, "passes over the data; default: finetune 100, linear 90")
    base_learning_rate: float | None = setting(
        None, "learning rate = this x total batch / 256; default: finetune 1e-3, linear 0.1"
    )
    warmup_epochs: float | None = setting(None, "epochs of linear warmup; default: finetune 5, linear 10")
    weight_decay: float | None = setting(None, "on matrices only; default: finetune 0.05, linear 0")
    layer_decay: float | None = setting(None, "learning-rate decay from layer to layer; default: finetune 0.65")
    drop_path_rate: float | None = setting(None, "stochastic depth of the last layer; default: finetune 0.1")
    per_device_eval_batch_size: int | None = setting(None, "views per process and step; default: as in training")
    eval_epochs: int = setting(1, "epochs between evaluations; the last update is always evaluated")
    num_frames: int | None = setting(None, "frames of a clip; default: the config's")
    frames_per_second: float = setting(
        7.5, "of a clip, which starts at a random time (16 of every 4th at 30/s); 0 spreads it over the whole video"
    )
    train_augmentation: bool = setting(
        True, "random views; without them (linear only) the encoder's features are computed once and kept"
    )
    crop_scale: list[float] = setting([0.08, 1.0], "smallest and largest share of a frame's area in a random crop")
    horizontal_flip: bool | None = setting(None, "flip every second sample; default: finetune yes, linear no")
    rand_augment_magnitude: float | None = setting(None, "0 to 10, 0 is none; default: finetune 9, linear none")
    rand_augment_std: float = setting(0.5, "standard deviation of that magnitude")
    random_erasing: float = setting(0.0, "probability of erasing a rectangle")
    label_smoothing: float | None = setting(None, "default: finetune 0.1, linear 0")
    mixup: float | None = setting(None, "alpha of mixup, 0 is none; default: finetune 0.8, linear none")
    cutmix: float = setting(0.0, "alpha of cutmix; with mixup, each batch draws one of both")

    def __post_init__(self):
        chosen = {name for name in METHOD_DEFAULTS[self.method] if getattr(self, name) is not None}
        defaults = METHOD_DEFAULTS[self.method] | (LABEL_FRACTION_DEFAULTS if self.label_fraction is not None else {})
        for name in defaults.keys() - chosen:
            setattr(self, name, defaults[name])
        super().__post_init__()
        if len(self.train_data) != 1:
            raise ArgumentsError(f"--train_data: expected one labelled source, got {len(self.train_data)}.")
        for name in ["eval_epochs", "per_device_eval_batch_size", "num_frames"]:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentsError(f"--{name} must be at least 1, got {value}.")
        if not 0 < self.layer_decay <= 1:
            raise ArgumentsError(f"--layer_decay must be above 0 and at most 1, got {self.layer_decay}.")
        if "drop_path_rate" in (self.config_overrides or ""):
            raise ArgumentsError("--config_overrides: drop_path_rate is set by --drop_path_rate.")
        if self.method == "linear":
            self._check_linear()
        elif not self.train_augmentation:
            raise ArgumentsError(
                "--no-train_augmentation keeps the features of a frozen encoder: --method linear only."
            )

    def _check_linear(self) -> None:
        if (self.layer_decay, self.drop_path_rate) != (1.0, 0.0):
            raise ArgumentsError("--method linear leaves the encoder as it is: no --layer_decay, no --drop_path_rate.")
        augmentations = ["horizontal_flip", "rand_augment_magnitude", "random_erasing", "mixup", "cutmix"]
        wanted = [name for name in augmentations if getattr(self, name)]
        if wanted and not self.train_augmentation:
            raise ArgumentsError(f"--no-train_augmentation contradicts --{wanted[0]} {getattr(self, wanted[0])}.")


@dataclass(kw_only=True)
class InferenceArguments:
    """What the scripts take that run a trained model over files; their own settings are in subclasses."""

    model_name_or_path: str = setting(REQUIRED, "checkpoint: a folder, or a name on the Hub")
    num_frames: int | None = setting(None, "frames of a video; default: the model's")
    frames_per_second: float | None = setting(
        None, "of a clip; 0 spreads it over the whole video; default: as the model's processor says"
    )
    per_device_eval_batch_size: int = setting(8, "views in a forward pass")
    dataloader_num_workers: int = setting(4, "loading processes per process; 0 loads in the process itself")
    video_backend: Literal["decord", "torchcodec", "pyav"] = setting("pyav", "video decoder tried first")
    seconds_per_file: float = setting(60.0, "a file that takes longer to read counts as unreadable; 0: no limit")
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(None, "default: as accelerate launch says")

    def __post_init__(self):
        for name in ["num_frames", "per_device_eval_batch_size"]:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentsError(f"--{name} must be at least 1, got {value}.")
        for name in ["frames_per_second", "dataloader_num_workers", "seconds_per_file"]:
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ArgumentsError(f"--{name} must not be negative, got {value}.")
