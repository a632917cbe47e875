"""Counts the floating-point operations of an update of pretraining, from the config alone."""

import math

from ..configuration_vicmae import ViCMAEConfig


def layer_flops(num_tokens: int, hidden_size: int, intermediate_size: int) -> int:
    """Counts the forward pass of one Transformer layer for one sequence; a multiplication and an addition are two."""
    projections = 2 * num_tokens * hidden_size * (4 * hidden_size + 2 * intermediate_size)
    attention = 4 * num_tokens**2 * hidden_size  # similarities, and the sums of values
    return projections + attention


def update_flops(config: ViCMAEConfig, num_pairs: int, num_frozen: int = 0) -> int:
    """
    Counts the operations that forward and backward pass of `num_pairs` pairs need: those of their matrix products. The
    backward pass counts twice the forward pass (gradients of inputs and of weights); what gradient checkpointing and
    attention kernels compute again is not counted, as usual for model FLOPs utilisation (Chowdhery et al. 2022, PaLM,
    appendix B).

    Args:
        num_frozen: first layers of the encoder that are not trained; they and the embeddings have no backward pass.
    """
    num_patches = math.prod(config.patch_grid)
    num_visible = config.count_visible(num_patches)
    num_pixels = config.num_channels * config.patch_size**2  # of a patch
    embeddings = 2 * num_visible * num_pixels * config.hidden_size
    layer = layer_flops(num_visible + 1, config.hidden_size, config.intermediate_size)
    encoder = config.num_hidden_layers * layer  # of one view
    decoder_width = config.decoder_hidden_size
    decoder_layer = layer_flops(num_patches + 1, decoder_width, config.decoder_intermediate_size)
    decoder = config.decoder_num_hidden_layers * decoder_layer
    decoder += 2 * (num_visible + 1) * config.hidden_size * decoder_width
    decoder += 2 * num_patches * decoder_width * num_pixels
    num_decoded = 2 if config.reconstruct == "both" else 1
    projector = comparison = 0
    if config.contrastive_loss != "none":
        hidden, width = config.projector_hidden_size, config.projector_output_size
        projector = 2 * hidden * (config.hidden_size + hidden + width)
        # Of one pair: with all others in both directions, with both views of all, or of features with each other.
        others = {"info_nce": num_pairs, "nt_xent": 2 * num_pairs, "vicreg": width, "simsiam": 0}
        comparison = 4 * width * others[config.contrastive_loss]
    pair = 2 * (encoder + projector) + num_decoded * decoder + comparison
    frozen = 2 * num_frozen * layer
    # Pixels get no gradient. Where layers are frozen, the patch embedding is too.
    return num_pairs * (3 * pair - 2 * frozen + (1 if num_frozen else 2) * 2 * embeddings)
