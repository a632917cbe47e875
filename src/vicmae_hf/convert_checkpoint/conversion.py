"""
Converts checkpoints of other code bases: ViC-MAE's authors (pretraining and finetuned), MAE, Transformers' ViTMAE.

Examples:

    vicmae convert mae_pretrain_vit_base.pth -o models/mae
    vicmae convert vicmae_pretrain_vit_base.pth --image_size 256 -o models/vicmae

Every tensor must be known, or the conversion stops: nothing is left at random values. docs/checkpoints.md explains.
"""

import dataclasses
import logging
import os
from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError
from transformers.utils.logging import disable_progress_bar

from ..command_line import one_line, parse_arguments, parse_config_overrides
from ..configuration_vicmae import ViCMAEConfig
from ..modeling_vicmae import ViCMAEPreTrainedModel
from ..settings import REQUIRED, ArgumentsError, Settings, setting
from .checkpoints import convert_checkpoint


@dataclasses.dataclass(kw_only=True)
class ConversionArguments(Settings):
    checkpoint: str = setting(REQUIRED, ".pth or .safetensors file, or folder of a ViTMAE model")
    output_dir: str = setting(REQUIRED, "folder to write, which from_pretrained opens")
    image_size: list[int] | None = setting(
        None, "pixels: one number, or height and width; default: the checkpoint's", minimum=1
    )
    config_overrides: str | None = setting(
        None, 'fields of ViCMAEConfig, as "name=value,name=value"', may_be_empty=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.image_size is not None and len(self.image_size) > 2:
            raise ArgumentsError(f"--image_size: expected one number, or height and width, got {self.image_size}.")


def run(arguments: ConversionArguments) -> None:
    overrides = parse_config_overrides(ViCMAEConfig, arguments.config_overrides)
    if size := arguments.image_size:
        overrides["image_size"] = size[0] if len(size) == 1 else size
    model = convert_checkpoint(arguments.checkpoint, arguments.output_dir, **overrides)
    print(describe(model))
    print(f"Written to {arguments.output_dir}: {', '.join(sorted(os.listdir(arguments.output_dir)))}")


def main(argv: Sequence[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # of Transformers, one for every file that it writes
    try:
        run(parse_arguments(ConversionArguments, argv))
    except (ValueError, OSError, StrictDataclassError) as error:
        raise SystemExit(f"error: {one_line(error)}") from error


def describe(model: ViCMAEPreTrainedModel) -> str:
    """Says in words what was recognised, and shows the configuration."""
    config = model.config
    kinds = {
        "ViCMAEForPreTraining": "MAE pretraining" if config.contrastive_loss == "none" else "ViC-MAE pretraining",
        "ViCMAEForImageClassification": f"finetuned ViT, pooling {config.pooling!r}",
        "ViCMAEModel": "encoder alone",
    }
    tensors = model.state_dict().values()
    name = type(model).__name__
    return (
        f"{config}\nRecognised: {kinds[name]}. Converted: {len(tensors)} tensors, "
        f"{sum(tensor.numel() for tensor in tensors):,} values, all that {name} has."
    )
