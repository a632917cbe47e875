"""
Pretrains ViC-MAE on folders of videos and images, lists, Parquet files or datasets.

Examples:

    vicmae pretrain my_videos -o outputs/mine --preset small-data
    vicmae pretrain my_settings.yaml my_videos -o outputs/mine --seed 1

Settings come from the file and from flags; flags win. Table 1 is the paper's. docs/pretraining.md explains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger

from ..configuration_vicmae import ViCMAEConfig
from ..modeling_vicmae import ViCMAEForPreTraining
from ..pretraining.arguments import PretrainingArguments
from ..pretraining.presets import PresetArguments, check_mask, freeze_layers
from ..pretraining.run import run_pretraining
from ..training.reporting import say_unreadable
from ..training.session.calling import Data, call, start
from ..training.session.models import build_model
from ..training.session.session import end_session, start_session


logger = get_logger(__name__)


def run(arguments: PresetArguments) -> dict[str, Any]:
    if arguments.plan:
        from .plan import plan_launched  # imported here, because a training needs none of it

        return plan_launched(arguments)
    accelerator = start_session(arguments, can_shard=True)
    model = build_model(ViCMAEForPreTraining, arguments)
    check_mask(model.config)
    freeze_layers(model, arguments.freeze_layers)
    warn_of_plain_mae(model.config, arguments)
    results = run_pretraining(accelerator, model, arguments)
    end_session(accelerator, arguments)  # the upload first: a closed pipe would end the program below
    if accelerator.is_main_process:
        unreadable = say_unreadable(results["num_failed"], Path(arguments.output_dir) / "bad_files.jsonl")
        print(
            f"{results['num_steps']} updates, {results['pairs_per_second']:.0f} pairs/s, "
            f"{unreadable}. Model, curves and pictures: {arguments.output_dir}"
        )
    return results


def warn_of_plain_mae(config: ViCMAEConfig, arguments: PretrainingArguments) -> None:
    """Says so if the objective is plain MAE because a checkpoint says so, and nobody else."""
    if config.contrastive_loss == "none" and "contrastive_loss" not in (arguments.config_overrides or ""):
        logger.warning(
            'The config of %s has contrastive_loss "none": this trains plain MAE. For ViC-MAE, give '
            '--config_overrides "contrastive_loss=info_nce,reconstruct=first".',
            arguments.model_name_or_path,
        )


def main(argv: Sequence[str] | None = None) -> None:
    start(PresetArguments, run, argv)


def pretrain(train_data: Data | Sequence[Data], *, output_dir: Data, **settings: Any) -> dict[str, Any]:
    """
    Pretrains ViC-MAE in this process, on one GPU or the CPU. (`vicmae pretrain` starts one process for each GPU.)

        vicmae_hf.pretrain("my_videos", output_dir="outputs/mine", mixed_precision="bf16")

    Args:
        train_data: folders, lists, frame stores, Parquet files or dataset names, one or several.
        output_dir: folder to write everything to.
        settings: named like the flags of `vicmae pretrain`, without "--".

    Returns:
        The content of `all_results.json`.

    Raises:
        ArgumentsError: if a setting is unknown or wrong.
        InputError: if data, checkpoint or folder cannot be used; more kinds in `run_pretraining`.
        RunStopped: if the run was asked to stop (a notebook's stop button does); it left a checkpoint.
    """
    return call(PresetArguments, run, {"train_data": train_data, "output_dir": output_dir, **settings})
