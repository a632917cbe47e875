"""ViC-MAE's encoder as a backbone of Transformers, for dense prediction: feature maps of images and of clips."""

from collections.abc import Callable

import torch
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_outputs import BackboneOutput
from transformers.utils.generic import can_return_tuple

from .configuration_vicmae import ViCMAEConfig
from .modeling_vicmae import ViCMAEModel, ViCMAEPreTrainedModel


class ViCMAEBackbone(BackboneMixin, ViCMAEPreTrainedModel):
    """
    The encoder, which returns feature maps at `config.out_features` or `config.out_indices`: 0 (`"stem"`) is before
    the first layer, K (`"stageK"`) after K layers. Each is normalised by the encoder's final norm.
    """

    _keys_to_ignore_on_load_unexpected = ViCMAEModel._keys_to_ignore_on_load_unexpected
    _keys_to_ignore_on_load_missing = [r"embeddings\.temporal_position_embeddings$"]

    __call__: Callable[..., BackboneOutput]  # for type checkers, to which calls of modules return anything

    def __init__(self, config: ViCMAEConfig):
        config.set_output_features_output_indices(config.out_features, config.out_indices)  # None becomes the last
        super().__init__(config)
        self.num_features = [config.hidden_size] * len(config.stage_names)
        self.vicmae = ViCMAEModel(config)
        self.post_init()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.vicmae.get_input_embeddings()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BackboneOutput:
        """
        Args:
            pixel_values: images `(B, C, H, W)` or clips `(B, T, C, H, W)`, normalised, of any size in whole patches.

        Returns:
            `feature_maps`: `(B, D, h, w)` each of images, `(B, D, t, h, w)` of clips, with t = T / tubelet_size.

        Raises:
            ValueError: if the shape does not fit the model.
        """
        outputs = self.vicmae(pixel_values, **kwargs)
        height, width = (size // self.config.patch_size for size in pixel_values.shape[-2:])
        feature_maps = []
        for index in self.out_indices:
            tokens = self.vicmae.layernorm(outputs.hidden_states[index])[:, 1:]  # (B, t * h * w, D)
            feature_map = tokens.transpose(1, 2).unflatten(2, (-1, height, width))  # (B, D, t, h, w)
            feature_maps.append((feature_map if pixel_values.ndim == 5 else feature_map.squeeze(2)).contiguous())
        return BackboneOutput(
            feature_maps=tuple(feature_maps), hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# With this, saved backbones carry this file and those that it imports.
ViCMAEBackbone.register_for_auto_class("AutoBackbone")

__all__ = ["ViCMAEBackbone"]
