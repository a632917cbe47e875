"""Linear evaluation (Table 3): a frozen encoder, batch norm without affine parameters, a linear classifier."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import ImageClassifierOutput

from ..configuration_vicmae import ViCMAEConfig
from ..evaluation.feature_table import LabelledFeatures, predict_blocks
from ..evaluation.prediction import Predictions, evaluating, to_probabilities
from ..evaluation.probes import start_linear_head
from ..modeling_vicmae import ViCMAEForImageClassification, gather_batch, world_size
from ..training.checkpointing import TrainedModule


CLASSIFIER_FILE = "linear_classifier.safetensors"


class LinearClassifier(TrainedModule):
    """
    A classification model with a frozen encoder, a new classifier, and batch norm between its features and the
    classifier.

    `save_pretrained` folds the batch norm into the classifier. So users open an ordinary classification model, which
    gives the same logits.

    Args:
        model: the classification model; its encoder is frozen and its classifier starts anew.
    """

    main_input_name = "pixel_values"

    def __init__(self, model: ViCMAEForImageClassification):
        super().__init__()
        self.model = model
        self.model.vicmae.requires_grad_(False)  # before the optimizer looks for what it trains
        self.norm = start_linear_head(model.classifier)

    @property
    def config(self) -> ViCMAEConfig:
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def train(self, mode: bool = True) -> "LinearClassifier":
        """Sets the mode of all but the encoder, which stays in eval mode: no dropout, no stochastic depth."""
        super().train(mode)
        self.model.vicmae.eval()
        return self

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Images or clips -> features `(B, D)`, float32."""
        return self.model.vicmae(pixel_values).pooler_output.float()

    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        features: torch.Tensor | None = None,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: images or clips.
            features: in their place, what `encode` made of them, `(B, D)`.
            labels: see the model.
        """
        features = self.encode(pixel_values) if features is None else features
        logits = self.model.classifier(self.normalize(features))
        loss = None if labels is None else self.model.classification_loss(logits, labels)
        return ImageClassifierOutput(loss=loss, logits=logits)

    def normalize(self, features: torch.Tensor) -> torch.Tensor:
        """Normalises features `(B, D)`: in training by the batches of all processes, else by running statistics."""
        # The result must not depend on how many processes share a batch.
        if not self.training or world_size() == 1:
            return self.norm(features)
        return self.norm(gather_batch(features)).chunk(world_size())[dist.get_rank()]  # (B, D), the rows from here

    def folded_classifier(self) -> dict[str, torch.Tensor]:
        """
        Computes `weight` and `bias` of a linear layer that turns features into the same logits as batch norm and
        classifier in eval mode: W (f - mean) / s + b = (W / s) f + (b - (W / s) mean) with s = sqrt(variance + eps).
        """
        # In float64, so that rounding happens once.
        classifier = self.model.classifier
        scale = torch.rsqrt(self.norm.running_var.double() + self.norm.eps)
        weight = classifier.weight.detach().double() * scale
        bias = classifier.bias.detach().double() - weight @ self.norm.running_mean.double()
        return {"weight": weight.to(classifier.weight.dtype), "bias": bias.to(classifier.bias.dtype)}

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        folded = {f"classifier.{name}": tensor for name, tensor in self.folded_classifier().items()}
        self.model.save_pretrained(folder, state_dict=self.model.state_dict() | folded)

    def save_checkpoint(self, folder: Path) -> None:
        """Writes the model that users open, and batch norm and classifier as they are: folding cannot be undone."""
        self.save_pretrained(folder)
        state = {f"norm.{name}": tensor for name, tensor in self.norm.state_dict().items()}
        state |= {f"classifier.{name}": tensor for name, tensor in self.model.classifier.state_dict().items()}
        save_file(state, folder / CLASSIFIER_FILE)

    def load_checkpoint(self, folder: Path) -> None:
        # This also loads the folded classifier, which the second file replaces.
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        state = load_file(folder / CLASSIFIER_FILE)
        for prefix, module in [("norm.", self.norm), ("classifier.", self.model.classifier)]:
            module.load_state_dict(
                {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
            )


def predict_features(module: LinearClassifier, samples: LabelledFeatures) -> Predictions:
    """Predicts from features, by the running statistics."""
    device = module.model.classifier.weight.device

    def classify(embeddings: torch.Tensor) -> torch.Tensor:
        return to_probabilities(module(features=embeddings.to(device)).logits.cpu(), module.config)

    with evaluating(module):
        # In blocks, because the embeddings of a large dataset do not fit onto the device.
        blocks = list(predict_blocks(classify, samples.features))
    return Predictions(torch.cat(blocks), samples.labels, samples.features.indices, samples.features.failures)
