"""Settings of pretraining."""

from dataclasses import dataclass

from ..configuration_vicmae import ViCMAEConfig
from ..data.samples.pairs import PairSettings
from ..settings import ArgumentsError, setting
from ..training.arguments import TrainingArguments
from ..training.optimization import Schedule, report_unused


@dataclass(kw_only=True)
class PretrainingArguments(TrainingArguments, PairSettings):
    """Settings of `run_pretraining.py`."""

    train_data_weights: list[float] | None = setting(None, "relative share of each data source; default: its size")
    contrastive_start_epoch: float = setting(200.0, "epoch at which the contrastive loss starts (Table 1: 200)")
    contrast_across_accumulation: bool = setting(
        False, "contrast the pairs of all steps of an update, encoding them twice; else accumulation adds no negatives"
    )
    probe_data: str | None = setting(None, "labelled folder or dataset to probe features on during training")
    probe_steps: int = setting(1000, "updates between probes; the last update is always probed", minimum=1)


def check_contrast(arguments: PretrainingArguments, config: ViCMAEConfig, schedule: Schedule) -> None:
    """
    Raises an ArgumentsError if the contrastive loss would never start in a run, or a batch had nothing to compare. A
    run that `--max_train_steps` cuts short on purpose gets a warning.
    """
    if config.contrastive_loss == "none":
        return
    samples = arguments.per_device_train_batch_size * schedule.num_processes
    if samples < 2 and not (arguments.contrast_across_accumulation and schedule.total_batch_size > 1):
        raise ArgumentsError(
            "--per_device_train_batch_size 1 leaves the contrastive loss nothing to compare. Take at least 2, or "
            '--config_overrides "contrastive_loss=none" for plain MAE.'
        )
    num_epochs = schedule.num_steps / schedule.steps_per_epoch
    if arguments.contrastive_start_epoch >= num_epochs:
        report_unused(
            arguments,
            f"--contrastive_start_epoch {arguments.contrastive_start_epoch:g} is not reached in {num_epochs:g} "
            "epochs: this would be plain MAE. Start the contrastive loss earlier, train longer, or give "
            '--config_overrides "contrastive_loss=none".',
        )
