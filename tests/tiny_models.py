"""Models of a few thousand parameters, and inputs for them."""

import torch
from torch import nn

from vicmae_hf import ViCMAEConfig


def tiny_config(**overrides) -> ViCMAEConfig:
    """Two layers, 16 patches of 4 x 4 pixels a frame of which 4 are visible, clips of 4 frames."""
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "image_size": 16,
        "patch_size": 4,
        "num_frames": 4,
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 12,
        "projector_hidden_size": 20,
        "num_labels": 3,
    }
    return ViCMAEConfig(**{**settings, **overrides})


def tiny_overrides(**changes) -> str:
    """A model for whole runs of the scripts, as `--config_overrides` takes it: one layer, patches of 8 x 8 pixels."""
    settings = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "patch_size": 8,
        "decoder_hidden_size": 8,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 16,
    }
    return ",".join(f"{name}={value}" for name, value in (settings | changes).items())


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Moves every parameter away from its start, so that no bias, norm or temporal position stays at 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise.to(parameter.dtype))
    return model


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Standard normal numbers of a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
