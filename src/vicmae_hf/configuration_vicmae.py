"""ViC-MAE model configuration: all settings of the architecture and of the pretraining objective, validated."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig


@strict
class ViCMAEConfig(BackboneConfigMixin, PreTrainedConfig):
    r"""
    Settings of a ViC-MAE model. The defaults are ViT-B/16 with the paper's objective.

    Encoder (supplement, section A):

    - hidden_size, num_hidden_layers, num_attention_heads, intermediate_size: the ViT's sizes.
    - hidden_act, hidden_dropout_prob, attention_probs_dropout_prob, initializer_range, layer_norm_eps, qkv_bias: as
      in Transformers' ViT. Linear layers start from Xavier-uniform; `initializer_range` is for the tokens.
    - image_size (`int` or `(height, width)`): pixels; patch_size: pixels; num_channels.
    - num_frames, tubelet_size: frames of a clip, and frames that one patch embedding spans. They matter for clips
      (`ViCMAEModel`, `ViCMAEForVideoClassification`); pretraining and image models embed single frames.
    - pooling (`"cls"`, `"mean"` or `"tubelets"`): `pooler_output` and the classifiers read the class token, the mean
      of the patch tokens, or their means over each tubelet of `num_frames` frames, in the order of time.
    - norm_after_pooling: whether the encoder's final norm is applied to the mean instead of to each token, as
      finetuned ViTs of the MAE family do (their `fc_norm`). For classifiers with `pooling="mean"`.
    - drop_path_rate: stochastic depth of the last layer; it grows linearly from 0 at the first (Table 2).

    Decoder: decoder_hidden_size, decoder_num_hidden_layers, decoder_num_attention_heads, decoder_intermediate_size.

    Masked-autoencoder objective (Algorithm 1):

    - mask_ratio: share of a frame's patches that is hidden from the encoder.
    - norm_pix_loss: whether each target patch is normalised by its own mean and variance.
    - reconstruct (`"first"` or `"both"`): which of the two views is reconstructed. Algorithm 1: the first.

    Contrastive objective:

    - contrastive_loss: `"info_nce"` (Algorithm 1), `"nt_xent"` (the authors' released code), `"simsiam"` and
      `"vicreg"` (supplement, section B), or `"none"` (plain MAE, no projector).
    - contrastive_weight: lambda of `loss = reconstruction_loss + lambda * contrastive_loss` (Table 1).
    - temperature: similarities are divided by it; exp(tau) of Algorithm 1 is `1 / temperature`.
    - learnable_temperature: whether tau is trained.
    - projector_hidden_size, projector_output_size: widths of the projector; `None` is twice `hidden_size`
      (`"simsiam"` compares projections with the encoder's output, so there the output is `hidden_size`).
    - vicreg_invariance_weight, vicreg_variance_weight, vicreg_covariance_weight: lambda, mu, nu of equation (4).

    Backbone: out_features (`"stem"`, `"stage1"`, ... for the layers) or out_indices (0, 1, ...), `None` is the last.

    Raises:
        ValueError: if settings are out of range or contradict each other.
    """

    model_type = "vicmae"

    # `float | int`, because `@strict` refuses the 0 or 1 of a JSON file for a float.
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    qkv_bias: bool = True
    num_frames: int = 16
    tubelet_size: int = 2
    pooling: Literal["cls", "mean", "tubelets"] = "cls"
    norm_after_pooling: bool = False
    drop_path_rate: float | int = 0.0

    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048

    mask_ratio: float | int = 0.75
    norm_pix_loss: bool = True
    reconstruct: Literal["first", "both"] = "first"

    contrastive_loss: Literal["info_nce", "nt_xent", "simsiam", "vicreg", "none"] = "info_nce"
    contrastive_weight: float | int = 0.025
    temperature: float | int = 0.1
    learnable_temperature: bool = False
    projector_hidden_size: int | None = None
    projector_output_size: int | None = None
    vicreg_invariance_weight: float | int = 25.0
    vicreg_variance_weight: float | int = 25.0
    vicreg_covariance_weight: float | int = 1.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        if self.projector_hidden_size is None:
            self.projector_hidden_size = 2 * self.hidden_size
        if self.projector_output_size is None:
            self.projector_output_size = self.hidden_size * (1 if self.contrastive_loss == "simsiam" else 2)
        out_features, out_indices = kwargs.pop("out_features", None), kwargs.pop("out_indices", None)
        if out_features is not None or out_indices is not None:
            self.set_output_features_output_indices(out_features, out_indices)
        super().__post_init__(**kwargs)
        # Called here, because `@strict` turns the errors of its own validators into some that are no ValueError.
        self.validate_vicmae()

    @property
    def image_height_and_width(self) -> tuple[int, int]:
        """`image_size` as `(height, width)` in pixels."""
        if isinstance(self.image_size, int):
            return self.image_size, self.image_size
        height, width = self.image_size
        return height, width

    @property
    def stage_names(self) -> list[str]:  # of a backbone's feature maps: before the first layer, and after each
        return ["stem", *(f"stage{layer + 1}" for layer in range(self.num_hidden_layers))]

    @property
    def patch_grid(self) -> tuple[int, int]:
        """Rows and columns of patches in an image of `image_size`."""
        height, width = self.image_height_and_width
        return height // self.patch_size, width // self.patch_size

    def count_visible(self, num_patches: int) -> int:
        """Counts the patches of a frame that are not masked. Raises a ValueError if that is none of them, or all."""
        num_visible = round(num_patches * (1 - self.mask_ratio))
        if not 0 < num_visible < num_patches:
            raise ValueError(
                f"mask_ratio={self.mask_ratio} leaves {num_visible} of {num_patches} patches visible; at least one "
                "must be visible and one masked."
            )
        return num_visible

    def validate_vicmae(self):
        """Raises a ValueError that names the setting, its value, and what was expected."""
        positive_fields = (
            "hidden_size num_hidden_layers num_attention_heads intermediate_size patch_size num_channels num_frames "
            "tubelet_size decoder_hidden_size decoder_num_hidden_layers decoder_num_attention_heads "
            "decoder_intermediate_size projector_hidden_size projector_output_size temperature"
        )
        for name in positive_fields.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}.")
        for name in ["hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"]:
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and less than 1, got {getattr(self, name)}.")
        for part in ["contrastive", "vicreg_invariance", "vicreg_variance", "vicreg_covariance"]:
            if getattr(self, f"{part}_weight") < 0:
                raise ValueError(f"{part}_weight must not be negative, got {getattr(self, f'{part}_weight')}.")
        # Not 0 either: the pixel loss is a mean over masked patches, of which there would be none.
        if not 0 < self.mask_ratio < 1:
            raise ValueError(
                f"mask_ratio must lie between 0 and 1, both excluded, got {self.mask_ratio}. "
                "To encode without masking use ViCMAEModel."
            )

        if not isinstance(self.image_size, int) and len(self.image_size) != 2:
            raise ValueError(f"image_size must be one number or (height, width), got {self.image_size}.")
        height, width = self.image_height_and_width
        if min(height, width) < self.patch_size or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size={self.patch_size} in height and width, "
                f"got {height} x {width}."
            )
        if self.num_frames % self.tubelet_size:
            raise ValueError(
                f"num_frames must be a multiple of tubelet_size={self.tubelet_size}, got {self.num_frames}."
            )
        if self.norm_after_pooling and self.pooling != "mean":
            raise ValueError(f"norm_after_pooling=True needs pooling='mean', got {self.pooling!r}.")
        if self.contrastive_loss == "simsiam" and self.projector_output_size != self.hidden_size:
            raise ValueError(
                "contrastive_loss='simsiam' compares projections with encoder outputs: projector_output_size must be "
                f"hidden_size={self.hidden_size}, got {self.projector_output_size}."
            )


# With this, saved configs carry this file.
ViCMAEConfig.register_for_auto_class()

__all__ = ["ViCMAEConfig"]
