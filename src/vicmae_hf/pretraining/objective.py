"""The losses of a batch of pretraining. It needs nothing of the data but bytes on the device."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from ..data.samples.augmentation import PixelNormalizer
from ..modeling_vicmae import ViCMAEForPreTraining, ViCMAEForPreTrainingOutput


if TYPE_CHECKING:  # only for an annotation
    from ..image_processing_vicmae import ViCMAEImageProcessor


class Objective:
    """
    Losses of a batch: reconstruction from the start, contrastive from `contrastive_start_epoch` on (Table 1).

    Args:
        prepared: the model as Accelerate prepared it.
        model: the same without Accelerate's wrapper.
        processor: has the mean and standard deviation by which pixels are normalised.
        contrastive_start_epoch: may be a fraction.

    Attributes:
        output: the model's, for the last batch.
    """

    def __init__(
        self,
        prepared: nn.Module,
        model: ViCMAEForPreTraining,
        processor: "ViCMAEImageProcessor",
        contrastive_start_epoch: float,
    ):
        self.prepared = prepared
        self.model = model
        self.normalize = PixelNormalizer(processor.image_mean, processor.image_std).to(model.device)
        self.contrastive_start_epoch = contrastive_start_epoch
        self.output: ViCMAEForPreTrainingOutput | None = None

    def set_contrastive(self, is_contrastive: bool) -> None:
        self.model.contrastive_weight = self.model.config.contrastive_weight if is_contrastive else 0.0

    def hold_projector(self, optimizer: torch.optim.Optimizer, *arguments) -> None:
        """
        Leaves the projector as it is while its weight is 0. Its gradients are zero then, but AdamW would still decay
        its weights, to nothing over the 200 epochs of Table 1. It passes over what has no gradient.
        """
        if self.model.contrastive_weight == 0:
            for parameter in self.model.contrastive_parameters():
                parameter.grad = None

    def __call__(self, batch: dict[str, torch.Tensor], epoch: float) -> dict[str, torch.Tensor]:
        # Set anew for every batch and not once, so that a resumed run needs no state of it.
        self.set_contrastive(epoch >= self.contrastive_start_epoch)
        # Pixels travel as bytes, a quarter of what floats would be, and become floats here on the device.
        pixel_values = self.normalize(batch["pixel_values"])
        self.output = self.prepared(pixel_values, batch["noise"], batch.get("contrast"))
        losses = {name: self.output.get(name) for name in ("loss", "reconstruction_loss", "contrastive_loss")}
        return {name: value for name, value in losses.items() if value is not None}
