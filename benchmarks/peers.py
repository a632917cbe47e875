"""What a step of pretraining is measured against: the same ViT as masked autoencoder by other libraries."""

import sys
from pathlib import Path

import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining

from vicmae_hf import ViCMAEConfig


def base_config(**settings) -> ViCMAEConfig:
    """ViT-B/16."""
    return ViCMAEConfig(**settings)


def large_config(**settings) -> ViCMAEConfig:
    """ViT-L/16."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    return ViCMAEConfig(**sizes, **settings)


def small_config(**settings) -> ViCMAEConfig:
    """A size for laptops: 64 pixels, patches of 8."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768}
    decoder = {f"decoder_{name}": value for name, value in sizes.items()} | {"decoder_num_hidden_layers": 2}
    return ViCMAEConfig(**sizes, **decoder, image_size=64, patch_size=8, **settings)


CONFIGS = {"small": small_config, "base": base_config, "large": large_config}


class ViTMAEPeer(nn.Module):
    """Transformers' ViTMAE: both views masked, encoded and reconstructed as one batch of frames."""

    def __init__(self, config: ViCMAEConfig):
        super().__init__()
        names = [name for name in ViTMAEConfig().to_dict() if name in config.to_dict()]
        names = [name for name in names if name not in ("architectures", "model_type", "transformers_version")]
        self.model = ViTMAEForPreTraining(ViTMAEConfig(**{name: getattr(config, name) for name in names}))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Views `(B, 2, C, H, W)`, normalised -> the loss."""
        return self.model(pixel_values.flatten(0, 1)).loss


class TimmPeer(nn.Module):
    """A masked autoencoder composed of timm's blocks, after the paper (He et al. 2022); both views as one batch."""

    def __init__(self, config: ViCMAEConfig):
        super().__init__()
        from timm.layers import PatchEmbed  # here: the benchmarks run without timm, too
        from timm.models.vision_transformer import Block

        self.config = config
        width, decoder_width = config.hidden_size, config.decoder_hidden_size
        self.embed = PatchEmbed(config.image_size, config.patch_size, config.num_channels, width)
        num_patches = self.embed.num_patches
        self.positions = nn.Parameter(torch.randn(1, num_patches, width) * 0.02)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.Sequential(
            *(Block(width, config.num_attention_heads, qkv_bias=True) for _ in range(config.num_hidden_layers))
        )
        self.norm = nn.LayerNorm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_width))
        self.decoder_positions = nn.Parameter(torch.randn(1, num_patches, decoder_width) * 0.02)
        self.decoder_blocks = nn.Sequential(
            *(
                Block(decoder_width, config.decoder_num_attention_heads, qkv_bias=True)
                for _ in range(config.decoder_num_hidden_layers)
            )
        )
        self.decoder_norm = nn.LayerNorm(decoder_width)
        self.prediction = nn.Linear(decoder_width, config.patch_size**2 * config.num_channels)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Views `(B, 2, C, H, W)`, normalised -> the loss."""
        frames, size = pixel_values.flatten(0, 1), self.config.patch_size
        tokens = self.embed(frames) + self.positions  # (N, L, D)
        num_frames, num_patches, width = tokens.shape
        num_visible = self.config.count_visible(num_patches)
        shuffle = torch.rand(num_frames, num_patches, device=tokens.device).argsort(1)
        restore = shuffle.argsort(1)
        keep = shuffle[:, :num_visible, None].expand(-1, -1, width)
        tokens = torch.cat([self.cls_token.expand(num_frames, -1, -1), tokens.gather(1, keep)], 1)
        tokens = self.decoder_embed(self.norm(self.blocks(tokens)))
        hidden = self.mask_token.to(tokens.dtype).expand(num_frames, num_patches - num_visible, -1)
        order = restore.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        all_tokens = torch.cat([tokens[:, 1:], hidden], 1).gather(1, order) + self.decoder_positions
        all_tokens = self.decoder_blocks(torch.cat([tokens[:, :1], all_tokens], 1))
        predicted = self.prediction(self.decoder_norm(all_tokens))[:, 1:]
        target = frames.unfold(2, size, size).unfold(3, size, size).flatten(2, 3)  # (N, C, L, p, p)
        target = target.permute(0, 2, 3, 4, 1).flatten(2)
        variance, mean = torch.var_mean(target, -1, keepdim=True)
        errors = (predicted.float() - (target - mean) / (variance + 1e-6).sqrt()).square().mean(-1)
        mask = (restore >= num_visible).float()  # not by index, for which the program would wait for the device
        return (errors * mask).sum() / mask.sum()


class AuthorsPeer(nn.Module):
    """
    The authors' own model, from a checkout of their release (github.com/jeffhernandez1995/ViC-MAE, which needs timm):
    both views reconstructed and contrasted. Nothing of it is part of this repository.
    """

    def __init__(self, config: ViCMAEConfig, checkout: Path):
        super().__init__()
        sys.path.append(str(checkout))
        from models_vicmae import ViCMAE

        self.model = ViCMAE(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.hidden_size,
            depth=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            decoder_embed_dim=config.decoder_hidden_size,
            decoder_depth=config.decoder_num_hidden_layers,
            decoder_num_heads=config.decoder_num_attention_heads,
            mask_ratio=config.mask_ratio,
            projector_hidden_dim=config.projector_hidden_size,
            projector_out_dim=config.projector_output_size,
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Views `(B, 2, C, H, W)`, normalised -> the loss."""
        return self.model(pixel_values.unbind(1))[0]
