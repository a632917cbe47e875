"""Settings of `vicmae pretrain` that follow from the data: Table 1's schedule, or one that fits little data."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from accelerate.logging import get_logger
from torch import nn

from ..command_line import parse_config_overrides
from ..configuration_vicmae import ViCMAEConfig
from ..data.sources.sources import is_saved_dataset
from ..files import read_json
from ..settings import ArgumentsError, setting
from ..training.checkpointing import STATE_FILE, list_checkpoints
from .arguments import PretrainingArguments


logger = get_logger(__name__)

# Shares of a run, as in Table 1: 40 and 200 of 800 epochs.
WARMUP_SHARE, CONTRASTIVE_START_SHARE = 0.05, 0.25
TABLE_1_BATCH, TABLE_1_EPOCHS = 4096, 800
SMALL_BATCH, SMALL_UPDATES, SMALL_MIN_EPOCHS = 64, 10_000, 50
SMALL_CHECKPOINTS = 10
SMALL_SEGMENT_SECONDS = 10.0
# Samples below which Table 1's schedule, made for more than a million, gets a word.
FEW_SAMPLES = 10_000
# ViT-S/16: half of ViT-B's widths and heads. The decoder also has half of its layers, where the released code has all.
SMALL_ENCODER = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536}
SMALL_DECODER = {
    "decoder_hidden_size": 256,
    "decoder_num_hidden_layers": 4,
    "decoder_num_attention_heads": 8,
    "decoder_intermediate_size": 1024,
}
# These follow from the data with a preset, and are Table 1's, or this project's defaults, without.
FITTED = (
    *("per_device_train_batch_size", "num_train_epochs", "base_learning_rate", "warmup_epochs"),
    *("contrastive_start_epoch", "checkpointing_steps"),
)
DEFAULTS = {entry.name: entry.default for entry in fields(PretrainingArguments) if entry.name in FITTED}


@dataclass(kw_only=True)
class PresetArguments(PretrainingArguments):
    """Settings of `vicmae pretrain`. None is a setting that the user did not give; what is given stays."""

    per_device_train_batch_size: int | None = setting(None, "samples per process and step; default: 64", minimum=1)
    num_train_epochs: int | None = setting(
        None, "passes over the data; default: 800 (Table 1)", minimum=1, maximum=10**6
    )
    base_learning_rate: float | None = setting(
        None, "peak learning rate = this x total batch / 256; default: 1.5e-4 (Table 1)", minimum=0
    )
    warmup_epochs: float | None = setting(None, "epochs of linear warmup; default: 40 (Table 1)", minimum=0)
    checkpointing_steps: int | None = setting(
        None, "updates between checkpoints; 0 writes none; default: 1000", minimum=0
    )
    contrastive_start_epoch: float | None = setting(
        None, "epoch at which the contrastive loss starts; default: 200 (Table 1)"
    )
    preset: Literal["small-data"] | None = setting(
        None, "small-data: choose schedule, batch, segments and model for little data; your own settings win"
    )
    freeze_layers: int | None = setting(
        None, "keep embeddings and this many first layers of the encoder as --model_name_or_path has them", minimum=1
    )
    plan: bool = setting(False, "estimate what the run takes, like `vicmae plan`, and train nothing")

    def __post_init__(self):
        self.has_default_schedule = self.num_train_epochs is None and self.max_train_steps is None
        if self.preset is None:
            for name, default in DEFAULTS.items():
                if getattr(self, name) is None:
                    setattr(self, name, default)
        elif self.preset == "small-data":
            self._choose_items_and_model()
        super().__post_init__()
        if self.streaming and self.train_data_weights is not None:
            raise ArgumentsError("--train_data_weights: a stream is one source, with nothing to weigh it against.")
        if self.freeze_layers is not None and self.model_name_or_path is None:
            raise ArgumentsError("--freeze_layers freezes weights of a checkpoint: give --model_name_or_path.")

    def _choose_items_and_model(self) -> None:
        # Frame stores can't be divided, and their recordings were when they were packed.
        if self.segment_seconds is None and not any(map(is_saved_dataset_name, self.train_data)):
            self.segment_seconds = SMALL_SEGMENT_SECONDS
        if self.model_name_or_path is not None:
            return
        given = parse_config_overrides(ViCMAEConfig, self.config_overrides).keys()
        chosen = {
            **(SMALL_ENCODER if given.isdisjoint({*SMALL_ENCODER, "num_hidden_layers"}) else {}),
            **(SMALL_DECODER if given.isdisjoint(SMALL_DECODER) else {}),
        }
        begun_with = settings_of_resumed(self).get("model", {})  # maybe when other sizes were chosen
        chosen = {name: begun_with.get(name, value) for name, value in chosen.items()}
        sizes = [f"{name}={value}" for name, value in chosen.items()]
        self.config_overrides = ",".join([self.config_overrides, *sizes] if self.config_overrides else sizes)


def is_saved_dataset_name(name: str) -> bool:
    """Whether a source may be a frame store."""
    path = Path(name).expanduser()
    return "://" in name or path.suffix == ".parquet" or (path.is_dir() and is_saved_dataset(path))


def fit_to_data(arguments: PretrainingArguments, config: ViCMAEConfig, num_samples: int, num_processes: int) -> None:
    """
    Fills in the settings that follow from the number of samples of an epoch, and says what they are. Warns of a
    schedule, and of a batch, that are too large for the samples.

    Args:
        num_processes: of the run.
    """
    is_preset = isinstance(arguments, PresetArguments)
    if is_preset and arguments.preset == "small-data":
        fill_in_preset(arguments, num_samples, num_processes)
    batch_size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * num_processes
    if is_preset and arguments.preset is None and arguments.has_default_schedule and num_samples < FEW_SAMPLES:
        steps_per_epoch = max(num_samples // batch_size, 1)
        logger.warning(
            "The schedule is Table 1's, for more than a million samples. Here are %d; an epoch has %d updates, and "
            "the contrastive loss starts after %d of %d. --preset small-data fits the settings to the data, "
            "and `vicmae plan` says what a run takes.",
            num_samples,
            steps_per_epoch,
            math.ceil(arguments.contrastive_start_epoch * steps_per_epoch),
            arguments.num_train_epochs * steps_per_epoch,
        )
    if num_samples < batch_size and config.contrastive_loss != "none":
        logger.warning(
            "A batch of %d holds samples of the same file more than once, as there are only %d samples, and the "
            "contrastive loss takes them for different ones (false negatives). Take a smaller "
            "--per_device_train_batch_size, or more samples: --segment_seconds 10, --samples_per_file.",
            batch_size,
            num_samples,
        )


def fill_in_preset(arguments: PresetArguments, num_samples: int, num_processes: int) -> None:
    """Fills in what the user did not give: values for `num_samples`, or those of the run that goes on."""
    chosen = small_data_settings(arguments, num_samples, num_processes)
    source = f"for {num_samples:,} samples an epoch"
    if before := settings_of_resumed(arguments):
        # A longer run would have a longer warmup and a later contrast, and be another run.
        chosen |= {name: before[name] for name in chosen.keys() & before.keys()}
        batches = arguments.gradient_accumulation_steps * num_processes
        if "per_device_train_batch_size" in chosen and before["total_batch_size"] % batches == 0:
            chosen["per_device_train_batch_size"] = before["total_batch_size"] // batches
        source = "as the resumed run has them"
    for name, value in chosen.items():
        setattr(arguments, name, value)
    chosen["segment_seconds"] = arguments.segment_seconds
    if arguments.max_train_steps is not None:  # which ends the run, and not the epochs
        chosen["num_train_epochs"] = None
    shown = ", ".join(f"{name} {value:.5g}" for name, value in chosen.items() if value is not None)
    logger.info("--preset small-data, %s: %s.", source, shown)


def settings_of_resumed(arguments: PretrainingArguments) -> dict[str, Any]:
    """All settings of the run that is to go on from a checkpoint; none if there is no checkpoint."""
    resumed = arguments.resume_from_checkpoint
    if resumed is None:
        return {}
    path = Path(resumed) / STATE_FILE
    if resumed == "latest":
        if arguments.output_dir is None or not list_checkpoints(Path(arguments.output_dir)):  # a plan may have none
            return {}
        path = Path(arguments.output_dir) / "arguments.json"
    settings = read_json(path) if path.is_file() else {}
    return settings.get("run_settings", settings)


def small_data_settings(arguments: PresetArguments, num_samples: int, num_processes: int) -> dict[str, float]:
    """Returns those of `FITTED` that the user did not give, for `num_samples` samples of an epoch."""
    batches = arguments.gradient_accumulation_steps * num_processes
    # At least two different batches an epoch; powers of two, which GPUs like.
    batch_size = arguments.per_device_train_batch_size or min(
        2 ** int(math.log2(max(num_samples // (2 * batches), 2))), SMALL_BATCH
    )
    total = batch_size * batches
    steps_per_epoch = max(num_samples // total, 1)
    num_epochs = arguments.num_train_epochs or min(
        max(math.ceil(SMALL_UPDATES / steps_per_epoch), SMALL_MIN_EPOCHS), TABLE_1_EPOCHS
    )
    num_steps = arguments.max_train_steps or num_epochs * steps_per_epoch
    length = num_steps / steps_per_epoch  # in epochs
    # Weights that reconstruct already have a warmup only.
    start_share = CONTRASTIVE_START_SHARE if arguments.model_name_or_path is None else WARMUP_SHARE
    values = {
        "per_device_train_batch_size": batch_size,
        "num_train_epochs": num_epochs,
        # The peak falls with the root of the batch, as Adam's noise does (Malladi et al. 2022), not with the batch.
        "base_learning_rate": DEFAULTS["base_learning_rate"] * math.sqrt(TABLE_1_BATCH / total),
        "warmup_epochs": WARMUP_SHARE * length,
        "contrastive_start_epoch": start_share * length,
        "checkpointing_steps": min(max(num_steps // SMALL_CHECKPOINTS, 1), DEFAULTS["checkpointing_steps"]),
    }
    return {name: value for name, value in values.items() if getattr(arguments, name) is None}


def check_mask(config: ViCMAEConfig) -> None:
    """Raises an ArgumentsError if the mask would hide all patches of a view, or none, before any data is read."""
    try:
        config.count_visible(math.prod(config.patch_grid))
    except ValueError as error:
        raise ArgumentsError(
            f"{error} Take a larger --image_size, a smaller patch_size or another mask_ratio (--config_overrides)."
        ) from error


def freeze_layers(model: nn.Module, num_layers: int | None) -> None:
    """
    Lets training leave the encoder's embeddings and first layers as they are. Nothing before the first trained layer
    is kept for the backward pass, which saves memory and time.

    Raises:
        ArgumentsError: if the encoder has fewer layers.
    """
    if num_layers is None:
        return
    layers = model.vicmae.layers
    if num_layers > len(layers):
        raise ArgumentsError(f"--freeze_layers {num_layers}: the encoder has {len(layers)} layers.")
    for module in (model.vicmae.embeddings, *layers[:num_layers]):
        module.requires_grad_(False)
