"""Settings that training scripts share; some are also shared by scripts that run trained models."""

from dataclasses import dataclass
from typing import Literal

from ..data.media.bad_files import BadFilesArguments
from ..data.media.reading import ReadingArguments
from ..settings import MAX_SEED, REQUIRED, ArgumentsError, setting


@dataclass(kw_only=True)
class ProcessArguments(ReadingArguments):
    """Settings of loading and computing in the processes of a script."""

    dataloader_num_workers: int = setting(
        4, "loader workers of each process; 0 loads in the process itself", minimum=0, per_core=32
    )
    num_threads: int | None = setting(None, "CPU threads per process; default: what fits", minimum=1, per_core=32)
    mixed_precision: Literal["no", "bf16", "fp16"] | None = setting(None, "default: no, or accelerate's configuration")


@dataclass(kw_only=True)
class TrainingArguments(ProcessArguments, BadFilesArguments):
    """Settings that every training script takes. The scripts' own settings are in subclasses."""

    train_data: list[str] = setting(REQUIRED, "folders, lists of files, frame stores, Parquet files or dataset names")
    output_dir: str = setting(REQUIRED, "folder to write everything to")
    model_name_or_path: str | None = setting(None, "checkpoint to start from; without it, random weights")
    config_overrides: str | None = setting(None, 'fields of ViCMAEConfig: "name=value,name=value"', may_be_empty=True)
    image_size: list[int] | None = setting(
        None, "pixels: one number, or height and width; default: the config's", minimum=1
    )
    per_device_train_batch_size: int = setting(64, "samples per process and step", minimum=1)
    gradient_accumulation_steps: int = setting(1, "steps per update", minimum=1)
    num_train_epochs: int = setting(800, "passes over the data (Table 1: 800)", minimum=1, maximum=10**6)
    max_train_steps: int | None = setting(None, "updates; overrides the number of epochs", minimum=1, maximum=10**9)
    base_learning_rate: float = setting(1.5e-4, "peak rate = this x total batch / 256 (Table 1: 1.5e-4)", minimum=0)
    warmup_epochs: float = setting(40.0, "epochs of linear warmup (Table 1: 40)", minimum=0)
    weight_decay: float = setting(0.05, "applied to matrices only (Table 1: 0.05)", minimum=0)
    gradient_checkpointing: bool = setting(False, "recompute activations in the backward pass to save memory")
    torch_compile: bool = setting(False, "compile the Transformer layers: a slower start, then faster on GPUs")
    max_skipped_updates: int = setting(20, "fp16: most consecutive updates to skip for infinite gradients", minimum=0)
    seed: int = setting(0, "random seed of weights, data order, views and masks", minimum=0, maximum=MAX_SEED)
    logging_steps: int = setting(10, "updates between lines of metrics.jsonl", minimum=1)
    checkpointing_steps: int = setting(1000, "updates between checkpoints; 0 writes none", minimum=0)
    save_total_limit: int | None = setting(3, "how many of the newest checkpoints to keep", minimum=1)
    resume_from_checkpoint: str | None = setting(None, "checkpoint folder, or 'latest': the newest in output_dir")
    overwrite_output_dir: bool = setting(False, "allow an output_dir that holds a run; its checkpoints are deleted")
    report_to: list[str] = setting([], "trackers of Accelerate: tensorboard, wandb, trackio, ...")
    project: str = setting("vicmae", "project name for trackers")
    run_name: str | None = setting(None, "run name for trackers; default: the name of output_dir")
    push_to_hub: bool = setting(False, "upload output_dir, without checkpoints, to the Hub at the end")
    hub_model_id: str | None = setting(None, "repository on the Hub; default: the name of output_dir")
    private: bool = setting(False, "create the repository as private; an existing public one is refused")

    def __post_init__(self):
        super().__post_init__()
        if self.image_size is not None and len(self.image_size) not in (1, 2):
            raise ArgumentsError(f"--image_size must be one or two positive numbers, got {self.image_size}.")
