"""PyTorch ViC-MAE: masked autoencoding and contrastive learning over two views, with one ViT encoder.

Shapes use B batch, T frames, C channels, H x W pixels, L patches of a frame, K visible patches, D hidden size,
p patch size, V reconstructed views.

Transformers finds the files that saved weights carry by their lines of imports. This line is for it alone:
    from .backbone_vicmae import ViCMAEBackbone
"""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import ModelOutput, logging
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_vicmae import ViCMAEConfig


logger = logging.get_logger(__name__)


@dataclass
class ViCMAEForPreTrainingOutput(ModelOutput):
    r"""
    Attributes:
        loss (torch.Tensor of shape ()):
            `reconstruction_loss + contrastive_weight * contrastive_loss`.
        reconstruction_loss (torch.Tensor of shape ()):
            Mean squared error over the masked patches of the reconstructed views.
        contrastive_loss (torch.Tensor of shape (), optional):
            The contrastive part before weighting; `None` for plain MAE, and for one sample (see `can_contrast`).
        logits (torch.Tensor of shape (B, V, L, p * p * C)):
            Reconstructed patches; pixels are ordered row, column, channel.
        mask (torch.Tensor of shape (B, 2, L)):
            1 where a patch was hidden from the encoder, 0 where it was kept.
        ids_restore (torch.LongTensor of shape (B, 2, L)):
            Rank of every patch in its view's noise: patch l was kept if `ids_restore[..., l] < K`.
        features (torch.Tensor of shape (B, 2, D)):
            The visible patches of each view, pooled by `config.pooling`: features for a probe.
        projections (torch.Tensor of shape (B, 2, P), optional):
            The projector's output, which the contrastive part normalises and compares. `None` as `contrastive_loss`.
        hidden_states, attentions (tuple of torch.Tensor, optional):
            The encoder's, a sample's views one after the other: `(2 * B, 1 + K, D)`, `(2 * B, heads, 1 + K, 1 + K)`.
    """

    loss: torch.Tensor | None = None
    reconstruction_loss: torch.Tensor | None = None
    contrastive_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.LongTensor | None = None
    features: torch.Tensor | None = None
    projections: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Patches and positions
# ---------------------------------------------------------------------------------------------------------------------


def sincos_positions(height: int, width: int, hidden_size: int) -> torch.Tensor:
    """
    Fixed sine-cosine positions of a `height` x `width` grid: `(1, height, width, hidden_size)`, default dtype.

    The first half of the channels encodes the column (x), the second half the row (y), each as sines then cosines of
    frequencies 10000 ** (-4 k / hidden_size): the layout of MAE's checkpoints.

    Raises:
        ValueError: if `hidden_size` is not a multiple of 4.
    """
    if hidden_size % 4:
        raise ValueError(f"The width must be a multiple of 4 (sine and cosine of x and of y), got {hidden_size}.")
    frequencies = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))

    def encode(length: int) -> torch.Tensor:
        angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    columns = encode(width)[None, :, :].expand(height, width, -1)  # (h, w, D / 2)
    rows = encode(height)[:, None, :].expand(height, width, -1)  # (h, w, D / 2)
    return torch.cat([columns, rows], dim=-1).unsqueeze(0).to(torch.get_default_dtype())  # (1, h, w, D)


def resample_positions(positions: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Resamples positions `(1, h, w, D)` in two dimensions (bicubic) to `(1, height, width, D)`."""
    if positions.shape[1:3] == (height, width):
        return positions
    resampled = F.interpolate(at_least_float32(positions.permute(0, 3, 1, 2)), size=(height, width), mode="bicubic")
    return resampled.permute(0, 2, 3, 1).to(positions.dtype)


def resample_temporal_positions(positions: torch.Tensor, length: int) -> torch.Tensor:
    """Resamples temporal positions `(B, t, D)` linearly to `(B, length, D)`."""
    if positions.shape[1] == length:
        return positions
    resampled = F.interpolate(at_least_float32(positions.transpose(1, 2)), size=length, mode="linear")
    return resampled.transpose(1, 2).to(positions.dtype)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Turns half precision into float32, for statistics and losses; float64 stays."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Cuts frames `(..., C, H, W)` into patches `(..., L, C, p, p)`, row by row."""
    *batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(*batch, channels, rows, patch_size, columns, patch_size)  # (..., C, h, p, w, p)
    order = [patches.ndim + axis for axis in (-4, -2, -5, -3, -1)]
    patches = patches.permute(*range(len(batch)), *order)  # (..., h, w, C, p, p)
    return patches.reshape(*batch, rows * columns, channels, patch_size, patch_size)


class ViCMAEFrameProjection(nn.Conv2d):
    """
    A convolution over patches, applied to patches that are already cut: pretraining cuts first, to embed visible
    patches only. It is a convolution so that its weights have the layout of ViT checkpoints.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Patches `(..., C * p * p)` -> `(..., D)`."""
        return F.linear(patches, self.weight.flatten(1), self.bias)


class ViCMAETubeletProjection(nn.Conv3d):
    """The same over tubelets; a patch of a single frame counts as a still tubelet."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Tubelets `(..., C * tubelet_size * p * p)` or patches `(..., C * p * p)` -> `(..., D)`."""
        is_still = patches.shape[-1] != self.weight[0].numel()
        # Equal frames: summing the weights over time gives the same result as repeating the frame.
        weight = self.weight.sum(2) if is_still else self.weight
        return F.linear(patches, weight.flatten(1), self.bias)


class ViCMAEPatchEmbeddings(nn.Module):
    """
    Linear embedding of patches: of single frames (`video=False`), or of tubelets of `tubelet_size` frames.

    Either kind takes images and clips. For a tubelet embedding an image is a still clip of one tubelet. A frame
    embedding sees the mean of a tubelet: its weights, replicated along time and divided by `tubelet_size`, would give
    the same.
    """

    def __init__(self, config: ViCMAEConfig, video: bool):
        super().__init__()
        self.patch_size = config.patch_size
        self.tubelet_size = config.tubelet_size
        self.num_channels = config.num_channels
        kernel_size = (config.patch_size, config.patch_size)
        if video:
            kernel_size = (config.tubelet_size, *kernel_size)
        projection = ViCMAETubeletProjection if video else ViCMAEFrameProjection
        self.projection = projection(config.num_channels, config.hidden_size, kernel_size, stride=kernel_size)

    def forward(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
        """
        `pixel_values` `(B, C, H, W)` or `(B, T, C, H, W)` -> `(B, t, L, D)` with t = 1 for images, T / tubelet_size
        for clips. With `ids_keep` `(B, K)` only those patches are embedded: `(B, t, K, D)`.

        Raises:
            ValueError: if the shape does not fit the channels, the patches or the tubelets.
        """
        self.check_pixel_values(pixel_values)
        patches = patchify(pixel_values.to(self.projection.weight.dtype), self.patch_size)  # (B, [T,] L, C, p, p)
        if pixel_values.ndim == 4:
            patches = patches.unsqueeze(1)  # (B, 1, L, C, p, p)
        else:
            patches = patches.unflatten(1, (-1, self.tubelet_size))  # (B, t, tubelet_size, L, C, p, p)
            is_video = isinstance(self.projection, nn.Conv3d)
            # Time next to channels, where the weights have it: (B, t, L, C, tubelet_size, p, p) or (B, t, L, C, p, p).
            patches = patches.movedim(2, 4) if is_video else patches.mean(2)
        patches = patches.flatten(3)  # (B, t, L, pixels of a patch or tubelet)
        if ids_keep is not None:
            index = ids_keep[:, None, :, None].expand(-1, patches.shape[1], -1, patches.shape[3])
            patches = patches.gather(2, index)  # (B, t, K, pixels): hidden patches cost nothing from here on
        return self.projection(patches)  # (B, t, L or K, D)

    def check_pixel_values(self, pixel_values: torch.Tensor) -> None:
        shape = tuple(pixel_values.shape)
        if pixel_values.ndim not in (4, 5):
            raise ValueError(
                "pixel_values must be images (batch, channels, height, width) or clips (batch, frames, channels, "
                f"height, width), got shape {shape}."
            )
        if shape[-3] != self.num_channels:
            raise ValueError(
                f"Expected {self.num_channels} channels, got {shape[-3]} in pixel_values of shape {shape}."
            )
        if min(shape[-2:]) == 0 or shape[-2] % self.patch_size or shape[-1] % self.patch_size:
            raise ValueError(
                f"Height and width must be multiples of patch_size={self.patch_size}, got {shape[-2]} x {shape[-1]}."
            )
        if pixel_values.ndim == 5 and (shape[1] == 0 or shape[1] % self.tubelet_size):
            raise ValueError(f"Frames must be a multiple of tubelet_size={self.tubelet_size}, got {shape[1]}.")
        # One NaN pixel makes every feature of its sample, and every loss of its batch, NaN. On an accelerator this
        # check would wait for the device at every step; there the training loop checks the loss.
        if pixel_values.device.type == "cpu" and not torch.compiler.is_compiling():
            num_bad = pixel_values.numel() - int(pixel_values.isfinite().sum())
            if num_bad:
                raise ValueError(
                    f"Expected finite pixel_values, got {num_bad} NaN or infinite of {pixel_values.numel()} values."
                )


class ViCMAEEmbeddings(nn.Module):
    """Class token, patch embeddings, fixed spatial positions and, for video, temporal ones, learned from zero."""

    def __init__(self, config: ViCMAEConfig, video: bool):
        super().__init__()
        self.patch_embeddings = ViCMAEPatchEmbeddings(config, video)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size))
        self.patch_grid = config.patch_grid
        # Buffers, because they are not trained; saved, because converted checkpoints may bring positions of their own.
        self.register_buffer("position_embeddings", sincos_positions(*self.patch_grid, config.hidden_size))
        self.register_buffer("cls_position_embedding", torch.zeros(1, 1, config.hidden_size))
        self.temporal_position_embeddings = None
        if video:
            length = config.num_frames // config.tubelet_size
            self.temporal_position_embeddings = nn.Parameter(torch.empty(1, length, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, pixel_values: torch.Tensor, ids_keep: torch.Tensor | None = None) -> torch.Tensor:
        """Images or clips -> `(B, 1 + t * L, D)`; with `ids_keep` `(B, K)` -> `(B, 1 + t * K, D)`."""
        embeddings = self.patch_embeddings(pixel_values, ids_keep)  # (B, t, L or K, D)
        batch_size, length, _, hidden_size = embeddings.shape
        patch_size = self.patch_embeddings.patch_size
        height, width = (size // patch_size for size in pixel_values.shape[-2:])
        positions = resample_positions(self.position_embeddings, height, width).flatten(1, 2)  # (1, L, D)
        if ids_keep is not None:
            index = ids_keep.unsqueeze(-1).expand(-1, -1, hidden_size)
            positions = positions.expand(batch_size, -1, -1).gather(1, index)  # (B, K, D)
        embeddings = embeddings + positions.unsqueeze(1)  # the same position at all times t
        if self.temporal_position_embeddings is not None:
            positions = resample_temporal_positions(self.temporal_position_embeddings, length)  # (1, t, D)
            embeddings = embeddings + positions.unsqueeze(2)
        cls_token = (self.cls_token + self.cls_position_embedding).expand(batch_size, -1, -1)  # (B, 1, D)
        return self.dropout(torch.cat([cls_token, embeddings.flatten(1, 2)], dim=1))


# ---------------------------------------------------------------------------------------------------------------------
# Transformer layers
# ---------------------------------------------------------------------------------------------------------------------


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    attention_weights = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, heads, N, N)
    if attention_mask is not None:
        attention_weights = attention_weights + attention_mask
    # In float32, because exponentials lose much in half precision.
    attention_weights = F.softmax(attention_weights, dim=-1, dtype=torch.float32).to(query.dtype)
    attention_weights = F.dropout(attention_weights, p=dropout, training=module.training)
    attention_output = torch.matmul(attention_weights, value).transpose(1, 2).contiguous()  # (B, N, heads, D / heads)
    return attention_output, attention_weights


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer is no more than its weights: not adapted, quantised, offloaded or watched by hooks."""
    changed = linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or "forward" in vars(linear)
    return type(linear) is nn.Linear and type(linear.weight) in (nn.Parameter, torch.Tensor) and not changed


@torch.compiler.assume_constant_result  # asked while compiling, when a program gets its kernel
def are_kernels_left_to_us() -> bool:
    """Whether the caller disabled none of PyTorch's attention kernels, such as by `sdpa_kernel`."""
    names = ("flash", "mem_efficient", "math", "cudnn")
    return all(getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in names)


def prefer_kernels(query: torch.Tensor) -> AbstractContextManager:
    """
    Prefers the attention kernel of PyTorch that is fastest for a length. For the 50 tokens of a masked frame, cuDNN's,
    the first choice on an H100, takes 1.4 times as long as the memory-efficient one (docs/performance.md).
    """
    is_short = query.device.type == "cuda" and query.shape[2] <= 64 and are_kernels_left_to_us()
    # The others are disabled, not put last (`set_priority`): PyTorch's own order, with cuDNN first on an H100, is made
    # at the first attention of a process, and would be lost, and that first one computed by another kernel.
    return sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]) if is_short else nullcontext()


class ViCMAEAttention(nn.Module):
    def __init__(self, config: ViCMAEConfig, hidden_size: int, num_attention_heads: int):
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(f"{num_attention_heads} attention heads must divide the width, got {hidden_size}.")
        self.config = config
        self.head_dim = hidden_size // num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_probs_dropout_prob
        self.is_causal = False  # read by the attention functions of Transformers: every token sees every other
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, length, hidden_size = hidden_states.shape
        query_states, key_states, value_states = (
            states.view(batch_size, length, -1, self.head_dim).transpose(1, 2)  # (B, heads, N, D / heads)
            for states in self.project(hidden_states)
        )
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        with prefer_kernels(query_states):
            attention_output, attention_weights = attention_interface(
                self,
                query_states,
                key_states,
                value_states,
                attention_mask=None,
                dropout=self.attention_dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
        attention_output = self.o_proj(attention_output.reshape(batch_size, length, hidden_size))
        return attention_output, attention_weights

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `(B, N, D)` of tokens `(B, N, D)`."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        is_fused = self.training and hidden_states.device.type == "cuda"
        if not is_fused or not all(is_plain(projection) for projection in projections):
            return tuple(projection(hidden_states) for projection in projections)
        # On a GPU one product in place of three saves 9 % of a step: it reads the tokens once, and keeps one copy of
        # them in half precision. The parameters stay three, as checkpoints, LoRA and quantisation name them.
        weight = torch.cat([projection.weight for projection in projections])
        bias = None if self.q_proj.bias is None else torch.cat([projection.bias for projection in projections])
        return F.linear(hidden_states, weight, bias).chunk(3, dim=-1)


class ViCMAEMLP(nn.Module):
    def __init__(self, config: ViCMAEConfig, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class ViCMAEDropPath(nn.Module):
    """Stochastic depth: drops the whole residual branch of a sample with probability `drop_path_rate`."""

    def __init__(self, drop_path_rate: float):
        super().__init__()
        self.drop_path_rate = drop_path_rate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if self.drop_path_rate == 0.0 or not self.training:
            return hidden_states
        keep_rate = 1 - self.drop_path_rate
        keep = hidden_states.new_empty(hidden_states.shape[0], 1, 1).bernoulli_(keep_rate)
        return hidden_states * (keep / keep_rate)  # divided, so that the expected value stays the same


class ViCMAELayer(GradientCheckpointingLayer):
    """Pre-norm Transformer block of the encoder and, with its own sizes, of the decoder."""

    def __init__(
        self,
        config: ViCMAEConfig,
        hidden_size: int,
        num_attention_heads: int,
        intermediate_size: int,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        self.layernorm_before = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.attention = ViCMAEAttention(config, hidden_size, num_attention_heads)
        self.layernorm_after = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.mlp = ViCMAEMLP(config, hidden_size, intermediate_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path = ViCMAEDropPath(drop_path_rate)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attention_output, _ = self.attention(self.layernorm_before(hidden_states), **kwargs)
        hidden_states = hidden_states + self.drop_path(self.dropout(attention_output))
        mlp_output = self.mlp(self.layernorm_after(hidden_states))
        return hidden_states + self.drop_path(self.dropout(mlp_output))


class ViCMAEDecoder(nn.Module):
    """Reconstructs the pixels of every patch of a frame from its visible tokens."""

    def __init__(self, config: ViCMAEConfig):
        super().__init__()
        hidden_size = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, hidden_size)
        self.mask_token = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.patch_grid = config.patch_grid
        self.register_buffer("position_embeddings", sincos_positions(*self.patch_grid, hidden_size))
        self.register_buffer("cls_position_embedding", torch.zeros(1, 1, hidden_size))
        self.decoder_layers = nn.ModuleList(
            ViCMAELayer(config, hidden_size, config.decoder_num_attention_heads, config.decoder_intermediate_size)
            for _ in range(config.decoder_num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(hidden_size, eps=config.layer_norm_eps)
        self.prediction = nn.Linear(hidden_size, config.patch_size**2 * config.num_channels)

    def forward(
        self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, grid: tuple[int, int], **kwargs
    ) -> torch.Tensor:
        """Encoded frames `(N, 1 + K, D)`, `ids_restore` `(N, L)` -> predicted patches `(N, L, p * p * C)`."""
        hidden_states = self.embed(hidden_states)  # (N, 1 + K, decoder width)
        cls_token, visible_tokens = hidden_states[:, :1], hidden_states[:, 1:]
        batch_size, num_visible, hidden_size = visible_tokens.shape
        mask_tokens = self.mask_token.to(visible_tokens.dtype)
        mask_tokens = mask_tokens.expand(batch_size, ids_restore.shape[1] - num_visible, -1)
        # By rank: the K visible ones first. A patch's rank says where its token is, so gathering puts all in place.
        tokens = torch.cat([visible_tokens, mask_tokens], dim=1)  # (N, L, decoder width), by rank
        tokens = tokens.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, hidden_size))  # in the order of the frame
        # Without positions all mask tokens would be the same, and so would all predictions.
        positions = resample_positions(self.position_embeddings, *grid).flatten(1, 2)  # (1, L, decoder width)
        hidden_states = torch.cat([cls_token + self.cls_position_embedding, tokens + positions], dim=1)
        for layer in self.decoder_layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.prediction(self.layernorm(hidden_states)[:, 1:])  # without the class token: (N, L, p * p * C)


# ---------------------------------------------------------------------------------------------------------------------
# Communication between processes
#
# DistributedDataParallel averages gradients over W processes. A loss that compares samples of all processes gives
# gradients to samples of other processes, which a plain all_gather would drop. The backward pass of this
# function sums them over the processes. Then the mean of the processes' losses has exactly the gradients of one
# process on the joined batch.
# ---------------------------------------------------------------------------------------------------------------------


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class AllGather(torch.autograd.Function):
    """`(B, ...)` of each process -> `(W * B, ...)` of all processes, in order of rank."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        gathered = tensor.new_empty(world_size() * tensor.shape[0], *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, tensor.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()  # a copy: all_reduce writes into it, and autograd may still need it
        dist.all_reduce(gradient)
        return gradient.chunk(world_size())[dist.get_rank()]  # (B, ...), the rows that came from here


def gather_batch(tensor: torch.Tensor) -> torch.Tensor:
    """`(B, ...)` -> `(W * B, ...)`, with gradients to the process that each row came from."""
    return tensor if world_size() == 1 else AllGather.apply(tensor)


def gather_views(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for two views `(B, P)`, in one exchange."""
    return (first, second) if world_size() == 1 else gather_batch(torch.stack([first, second], dim=1)).unbind(1)


class ViCMAEBatchNorm(nn.BatchNorm1d):
    """
    Batch norm of views `(B, V, P)`, each view by itself, over the batches of all processes, in float32: the result
    must not depend on how many processes share a batch. `nn.SyncBatchNorm` would do the same, but refuses the CPU.

    Every process must bring the same number of samples, as the training loops here do.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        # In the parameters' type, which under autocast is float32: sums in half precision make poor statistics.
        values = hidden_states.to(self.weight.dtype)
        if not self.training or world_size() == 1:
            views = [super(ViCMAEBatchNorm, self).forward(view) for view in values.unbind(1)]
            return torch.stack(views, dim=1).to(hidden_states.dtype)
        values, count = at_least_float32(values), values.shape[0] * world_size()
        own_mean = values.mean(0)  # (V, P)
        own = torch.stack([own_mean, (values - own_mean).square().sum(0)])
        means, squares = gather_batch(own.unsqueeze(0)).unbind(1)  # (W, V, P) each, in one exchange
        mean = means.mean(0)
        # Squares around the mean of all: those around each process's own, and those of the means.
        variance = (squares.sum(0) + (means - mean).square().sum(0) * values.shape[0]) / count
        with torch.no_grad():
            for view_mean, view_variance in zip(mean, variance, strict=True):
                self.num_batches_tracked += 1
                self.running_mean.lerp_(view_mean.to(self.running_mean.dtype), self.momentum)
                unbiased = view_variance * count / (count - 1)  # as nn.BatchNorm1d keeps it
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
        values = (values - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return values.to(hidden_states.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Objectives
# ---------------------------------------------------------------------------------------------------------------------


class ViCMAEProjector(nn.Sequential):
    """Projection and target network, which share weights, so are one; after Bardes et al. (supplement, section A)."""

    def __init__(self, config: ViCMAEConfig):
        width = config.projector_hidden_size
        super().__init__(
            nn.Linear(config.hidden_size, width),
            ViCMAEBatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, width),
            ViCMAEBatchNorm(width),
            nn.ReLU(),
            nn.Linear(width, config.projector_output_size),
        )


def info_nce_loss(first: torch.Tensor, second: torch.Tensor, logit_scale: torch.Tensor | float) -> torch.Tensor:
    """
    Computes `ctr(p_i, z_j) + ctr(z_j, p_i)` of Algorithm 1 for projections `(B, P)` of the two views. Negatives come
    from all processes. `logit_scale` is exp(tau).
    """
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    labels = torch.arange(first.shape[0], device=first.device)
    # Row i is compared with the W * B rows of all processes, where those of rank r begin at r * B. Without this offset
    # all ranks but the first would take a stranger for the positive.
    if world_size() > 1:
        labels = labels + dist.get_rank() * first.shape[0]
    all_first, all_second = gather_views(first, second)  # (W * B, P) each
    first_to_second = F.cross_entropy(first @ all_second.T * logit_scale, labels)  # of (B, W * B)
    second_to_first = F.cross_entropy(second @ all_first.T * logit_scale, labels)
    return 2 * first_to_second + 2 * second_to_first


def nt_xent_loss(first: torch.Tensor, second: torch.Tensor, logit_scale: torch.Tensor | float) -> torch.Tensor:
    """
    Computes NT-Xent over the 2 W B projections of all processes. Each is compared with all others; the positive is the
    other view of its sample. On one process this is the objective of the authors' released code.
    """
    first, second = F.normalize(first, dim=-1), F.normalize(second, dim=-1)
    batch_size = first.shape[0]
    anchors = torch.cat([first, second])  # (2 * B, P)
    others = torch.cat(gather_views(first, second))  # (2 * W * B, P)
    total = others.shape[0] // 2
    own = torch.arange(batch_size, device=first.device)
    if world_size() > 1:
        own = own + dist.get_rank() * batch_size  # where the rows of this rank begin, as above
    own, positives = torch.cat([own, own + total]), torch.cat([own + total, own])
    similarities = (anchors @ others.T) * logit_scale  # (2 * B, 2 * W * B)
    similarities = similarities.scatter(1, own.unsqueeze(1), float("-inf"))  # nothing is its own negative
    return F.cross_entropy(similarities, positives)


def simsiam_loss(projection: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """
    Computes equation (1) of the supplement in one direction: projections `(B, D)` of one view against class tokens
    `(B, D)` of the other. These are not projected and get no gradient, else all views could collapse to one point.
    """
    projection, target = F.normalize(projection, dim=-1), F.normalize(target.detach(), dim=-1)
    return 2 * (1 - (projection * target).sum(-1)).mean()


# gamma of the supplement's equation (2), and the epsilon of its S, which Bardes et al. set to 1e-4.
VICREG_TARGET_DEVIATION = 1.0
VICREG_EPSILON = 1e-4


def vicreg_loss(first: torch.Tensor, second: torch.Tensor, config: ViCMAEConfig) -> torch.Tensor:
    """
    Computes equations (2) to (4) of the supplement for projections `(B, P)`, over the batch of all processes, whose
    size is the equations' n and N. Projections are l2-normalised, as in the supplement and unlike in Bardes et al.
    Standard deviations are then 1 / sqrt(P) at best, so the hinge never becomes 0. Projection and target network are
    one, so the loss is the same in both directions and is counted once.
    """
    first, second = gather_views(F.normalize(first, dim=-1), F.normalize(second, dim=-1))  # (W * B, P) each
    invariance = (first - second).square().sum(-1).mean()
    variance = covariance = 0.0
    for projections in (first, second):
        deviation = torch.sqrt(projections.var(dim=0) + VICREG_EPSILON)
        variance = variance + F.relu(VICREG_TARGET_DEVIATION - deviation).mean()
        centred = projections - projections.mean(dim=0)
        matrix = centred.T @ centred / (projections.shape[0] - 1)  # (P, P)
        off_diagonal = matrix.square().sum() - matrix.diagonal().square().sum()
        covariance = covariance + off_diagonal / projections.shape[1]
    return (
        config.vicreg_invariance_weight * invariance
        + config.vicreg_variance_weight * variance
        + config.vicreg_covariance_weight * covariance
    )


# ---------------------------------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------------------------------


class FitToModel(ConversionOps):
    """
    Fits an embedding from a checkpoint to the model that `from_pretrained` builds, where the two differ in size. So a
    pretrained frame encoder opens as a video classifier, at any image size.

    A patch embedding of single frames is replicated along time and divided by the tubelet size, so that a still video
    gives the tokens of its frame. The reverse sums over time. Positions are resampled, in two dimensions or in time.
    Anything else stays as it is, and Transformers reports the mismatch.
    """

    def convert(
        self, input_dict: dict, source_patterns: list[str], target_patterns: list[str], **kwargs
    ) -> dict[str, torch.Tensor]:
        tensors = next(iter(input_dict.values()))
        tensor = tensors[0] if isinstance(tensors, list) else tensors
        shape = kwargs["model"].get_parameter_or_buffer(kwargs["full_layer_name"]).shape
        # Contiguous, or weights offloaded to the disk could not be written.
        return {target_patterns[0]: fit_embedding(tensor, shape).contiguous()}

    @property
    def reverse_op(self) -> ConversionOps:
        return FitToModel()


def fit_embedding(tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Makes the conversion of `FitToModel` that the shapes call for; returns `tensor` itself if none fits."""
    if tensor.ndim == 4 and len(shape) == 5:
        return tensor.unsqueeze(2).expand(-1, -1, shape[2], -1, -1) / shape[2]  # (D, C, tubelet_size, p, p)
    if tensor.ndim == 5 and len(shape) == 4:
        return tensor.sum(2)  # (D, C, p, p)
    if tensor.ndim == len(shape) == 4 and tensor.shape[0] == 1:
        return resample_positions(tensor, *shape[1:3])
    if tensor.ndim == len(shape) == 3:
        return resample_temporal_positions(tensor, shape[1])
    return tensor


EMBEDDINGS_FITTED_ON_LOADING = (
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.position_embeddings",
    "embeddings.temporal_position_embeddings",
    "decoder.position_embeddings",
)

# Written into `config.json`, so that any saved weights open as each of these classes without this package.
AUTO_MAP = {
    "AutoConfig": "configuration_vicmae.ViCMAEConfig",
    "AutoModel": "modeling_vicmae.ViCMAEModel",
    "AutoModelForPreTraining": "modeling_vicmae.ViCMAEForPreTraining",
    "AutoModelForImageClassification": "modeling_vicmae.ViCMAEForImageClassification",
    "AutoModelForVideoClassification": "modeling_vicmae.ViCMAEForVideoClassification",
    "AutoBackbone": "backbone_vicmae.ViCMAEBackbone",
}


class ViCMAEPreTrainedModel(PreTrainedModel):
    config: ViCMAEConfig
    config_class = ViCMAEConfig
    base_model_prefix = "vicmae"
    main_input_name = "pixel_values"
    input_modalities = ("image", "video")
    supports_gradient_checkpointing = True
    _no_split_modules = ["ViCMAEEmbeddings", "ViCMAELayer", "ViCMAEDecoder"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The losses are means over the batch, so Trainer has to divide them by its accumulation steps.
    accepts_loss_kwargs = False
    # Only of the encoder, ".layers.": the decoder's blocks are of the same class.
    _can_record_outputs = {
        "hidden_states": OutputRecorder(ViCMAELayer, layer_name="layers"),
        "attentions": OutputRecorder(ViCMAEAttention, index=1, layer_name="layers"),
    }

    def __init__(self, config: ViCMAEConfig, *args, **kwargs):
        # Again here, because `from_pretrained(..., mask_ratio=2)` sets attributes of a config after its validation.
        config.validate_vicmae()
        super().__init__(config, *args, **kwargs)

    # Fits shapes while the weights are read. Not by `register_checkpoint_conversion_mapping`: its mappings are for
    # renamed weights, and apply to saving too.
    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        converters = [WeightConverter(n, n, operations=[FitToModel()]) for n in EMBEDDINGS_FITTED_ON_LOADING]
        load_config = replace(load_config, weight_mapping=[*(load_config.weight_mapping or []), *converters])
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> None:
        """Saves as Transformers does, which by itself would write only the saved class into `auto_map`."""
        self.config.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, *args, **kwargs)

    # `from_pretrained` builds a model without memory for its tensors. What the checkpoint lacks, buffers such as
    # positions too, then holds garbage until this function fills it. `init` leaves tensors alone that were loaded.
    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises linear layers Xavier-uniformly (supplement, section A); the patch embedding counts as one."""
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv2d, nn.Conv3d)):
            weight = module.weight
            bound = math.sqrt(6 / (weight.shape[0] + weight[0].numel()))  # Xavier's, of the flattened weight
            init.uniform_(weight, -bound, bound)
            init.zeros_(module.bias)
        elif isinstance(module, ViCMAEEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.copy_(
                module.position_embeddings, sincos_positions(*module.patch_grid, module.position_embeddings.shape[-1])
            )
            init.zeros_(module.cls_position_embedding)
            if module.temporal_position_embeddings is not None:
                init.zeros_(module.temporal_position_embeddings)  # a video model starts as the frame model
        elif isinstance(module, ViCMAEDecoder):
            init.normal_(module.mask_token, std=self.config.initializer_range)
            init.copy_(
                module.position_embeddings, sincos_positions(*module.patch_grid, module.position_embeddings.shape[-1])
            )
            init.zeros_(module.cls_position_embedding)
        elif isinstance(module, ViCMAEForPreTraining):
            if module.logit_scale is not None:
                init.constant_(module.logit_scale, -math.log(self.config.temperature))  # tau of Algorithm 1
        else:
            super()._init_weights(module)


class ViCMAEModel(ViCMAEPreTrainedModel):
    """
    The encoder. It never masks, and is deterministic in eval mode.

    Args:
        config: the model's configuration.
        video: whether patches span `config.tubelet_size` frames and have temporal positions. The heads that embed
            single frames (pretraining, image classification) set it to False.
    """

    # No warning for these: a pretraining checkpoint holds more than the encoder, and a frame encoder has no temporal
    # positions. They start at zero, which leaves its features as they are.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^projector\.", r"^logit_scale$", r"^classifier\."]
    _keys_to_ignore_on_load_missing = [r"^embeddings\.temporal_position_embeddings$"]
    __call__: Callable[..., BaseModelOutputWithPooling]  # for type checkers, to which calls of modules return anything

    def __init__(self, config: ViCMAEConfig, video: bool = True):
        super().__init__(config)
        self.embeddings = ViCMAEEmbeddings(config, video)
        last_layer = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            ViCMAELayer(
                config,
                config.hidden_size,
                config.num_attention_heads,
                config.intermediate_size,
                drop_path_rate=config.drop_path_rate * index / last_layer,
            )
            for index in range(config.num_hidden_layers)
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.patch_embeddings

    def encode(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        """Applies all layers and, unless it comes after pooling, the final norm: `(B, N, D)` -> `(B, N, D)`."""
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return hidden_states if self.config.norm_after_pooling else self.layernorm(hidden_states)

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values: torch.Tensor | None = None, **kwargs) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values: images `(B, C, H, W)` or clips `(B, T, C, H, W)`, normalised. Height and width are multiples
                of the patch size, T of `tubelet_size`; positions are resampled where they differ from the config's.

        Returns:
            `last_hidden_state` `(B, 1 + t * L, D)`: class token, then tubelet by tubelet; `pooler_output` `(B, D)`.

        Raises:
            ValueError: if the shape does not fit the model.
        """
        if pixel_values is None:
            raise ValueError("pixel_values is required.")
        last_hidden_state = self.encode(self.embeddings(pixel_values), **kwargs)
        length = pixel_values.shape[1] // self.config.tubelet_size if pixel_values.ndim == 5 else 1
        pooler_output = self.pool(last_hidden_state, length)
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=pooler_output)

    def pool(self, last_hidden_state: torch.Tensor, length: int = 1) -> torch.Tensor:
        """Tokens of `length` tubelets `(B, 1 + N, D)` -> `(B, D)` by `config.pooling`; `(B, t * D)` by "tubelets"."""
        if self.config.pooling == "tubelets":  # t is the config's, as for temporal positions
            means = last_hidden_state[:, 1:].unflatten(1, (length, -1)).mean(2)  # (B, length, D)
            return resample_temporal_positions(means, self.config.num_frames // self.config.tubelet_size).flatten(1)
        pooled = last_hidden_state[:, 0] if self.config.pooling == "cls" else last_hidden_state[:, 1:].mean(1)
        return self.layernorm(pooled) if self.config.norm_after_pooling else pooled


class ViCMAEForPreTraining(ViCMAEPreTrainedModel):
    """
    ViC-MAE's pretraining (Algorithm 1): `encode_views`, `reconstruct`, `project`, and the two losses.

    The attribute `contrastive_weight` starts as the config's. A training loop may change it during training (Table 1:
    0 until epoch 200).
    """

    __call__: Callable[..., ViCMAEForPreTrainingOutput]

    def __init__(self, config: ViCMAEConfig):
        super().__init__(config)
        if config.norm_after_pooling:
            raise ValueError("Pretraining reads normalised tokens: expected norm_after_pooling=False, got True.")
        self.vicmae = ViCMAEModel(config, video=False)  # each view is encoded by itself, as one frame
        self.decoder = ViCMAEDecoder(config)
        self.projector = None if config.contrastive_loss == "none" else ViCMAEProjector(config)
        self.logit_scale = nn.Parameter(torch.empty(())) if config.learnable_temperature else None
        self.contrastive_weight = config.contrastive_weight
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vicmae.get_input_embeddings()

    def contrastive_parameters(self) -> list[nn.Parameter]:
        """Lists what only the contrastive loss trains: projector and learnable temperature."""
        projector = [] if self.projector is None else list(self.projector.parameters())
        return projector if self.logit_scale is None else [*projector, self.logit_scale]

    @can_return_tuple
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        contrast: Callable | None = None,
        **kwargs,
    ) -> ViCMAEForPreTrainingOutput:
        """
        Args:
            pixel_values: two views of every sample, `(B, 2, C, H, W)`, normalised.
            noise: `(B, 2, L)`: of each view, the patches with the smallest values are kept. Random by default.
            contrast: takes the place of the method, for a loss that compares more than this batch.

        Raises:
            ValueError: if a shape does not fit.
        """
        hidden_states, mask, ids_restore = self.encode_views(pixel_values, noise, **kwargs)  # (B, 2, 1 + K, D)
        logits = self.reconstruct(hidden_states, ids_restore, pixel_values.shape[-2:], **kwargs)  # (B, V, L, pixels)
        loss = reconstruction_loss = self.reconstruction_loss(pixel_values, logits, mask)
        features = self.vicmae.pool(hidden_states.flatten(0, 1)).unflatten(0, (-1, 2))  # (B, 2, D)
        projections = contrastive_loss = None
        if self.projector is not None and (contrast or self.can_contrast(len(pixel_values))):
            # Also while its weight is 0: DistributedDataParallel expects a gradient for every parameter.
            projections, contrastive_loss = (contrast or self.contrast)(self.pool_views(hidden_states))
            loss = reconstruction_loss + self.contrastive_weight * contrastive_loss
        return ViCMAEForPreTrainingOutput(
            loss=loss,
            reconstruction_loss=reconstruction_loss,
            contrastive_loss=contrastive_loss,
            logits=logits,
            mask=mask,
            ids_restore=ids_restore,
            features=features,
            projections=projections,
        )

    def encode_views(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Masks and encodes both views in one batch. Returns hidden states of the visible tokens `(B, 2, 1 + K, D)`, mask
        `(B, 2, L)` and ids_restore `(B, 2, L)`.
        """
        if pixel_values is None or pixel_values.ndim != 5 or pixel_values.shape[1] != 2:
            shape = None if pixel_values is None else tuple(pixel_values.shape)
            raise ValueError(f"pixel_values must be two views (batch, 2, channels, height, width), got {shape}.")
        frames = pixel_values.flatten(0, 1)  # (2 * B, C, H, W)
        self.get_input_embeddings().check_pixel_values(frames)
        patch_size = self.config.patch_size
        num_patches = (frames.shape[-2] // patch_size) * (frames.shape[-1] // patch_size)
        num_visible = self.config.count_visible(num_patches)
        noise_shape = (*pixel_values.shape[:2], num_patches)
        if noise is None:
            noise = torch.rand(noise_shape, device=pixel_values.device)
        elif tuple(noise.shape) != noise_shape:
            raise ValueError(f"noise must have shape {noise_shape}, one value a patch, got {tuple(noise.shape)}.")
        # Ranks of noise hide the same number of patches in every view, so that views stack into one batch; a coin for
        # each patch would not. ids_shuffle: rank -> patch. ids_restore, its inverse: patch -> rank.
        ids_shuffle = torch.argsort(noise, dim=-1)  # (B, 2, L)
        ids_restore = torch.argsort(ids_shuffle, dim=-1)
        mask = (ids_restore >= num_visible).to(torch.float32)  # (B, 2, L)
        ids_keep = ids_shuffle[..., :num_visible].flatten(0, 1)  # (2 * B, K)
        hidden_states = self.vicmae.encode(self.vicmae.embeddings(frames, ids_keep), **kwargs)
        return hidden_states.unflatten(0, (-1, 2)), mask, ids_restore

    def reconstruct(
        self, hidden_states: torch.Tensor, ids_restore: torch.Tensor, image_size: tuple[int, int], **kwargs
    ) -> torch.Tensor:
        """Decodes visible tokens `(B, 2, 1 + K, D)` of frames of `image_size` pixels to `(B, V, L, p * p * C)`."""
        num_views = 2 if self.config.reconstruct == "both" else 1
        grid = tuple(size // self.config.patch_size for size in image_size)
        logits = self.decoder(
            hidden_states[:, :num_views].flatten(0, 1), ids_restore[:, :num_views].flatten(0, 1), grid, **kwargs
        )
        return logits.unflatten(0, (-1, num_views))

    def reconstruction_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Cuts views `(B, V, C, H, W)` into patches `(B, V, L, p * p * C)`, each normalised if `norm_pix_loss`."""
        target = patchify(at_least_float32(pixel_values), self.config.patch_size)  # (B, V, L, C, p, p)
        target = target.movedim(-3, -1).flatten(-3)  # row, column, channel: the order of MAE's checkpoints
        if self.config.norm_pix_loss:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / torch.sqrt(variance + 1e-6)
        return target

    def reconstruction_loss(
        self, pixel_values: torch.Tensor, logits: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Mean squared error over the masked patches of the reconstructed views (Algorithm 1)."""
        num_views = logits.shape[1]
        target = self.reconstruction_target(pixel_values[:, :num_views])
        patch_loss = (at_least_float32(logits) - target).square().mean(-1)  # (B, V, L)
        mask = mask[:, :num_views]
        return (patch_loss * mask).sum() / mask.sum()  # visible patches could simply be copied

    def can_contrast(self, batch_size: int) -> bool:
        """
        Whether a batch has a contrastive part. One sample has no negatives, and no statistics for the batch norm and
        for VICReg: under Transformers' Trainer, the last batch of an epoch may be one sample.
        """
        needs_several = self.training or self.config.contrastive_loss == "vicreg"
        if not needs_several or batch_size * world_size() > 1:
            return True
        logger.warning_once("A batch of one sample has nothing to contrast with: its loss is the reconstruction's.")
        return False

    def pool_views(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Visible tokens `(B, 2, 1 + K, D)` -> `(B, 2, D)`: ViC-MAE's mean of patches, section B's class token."""
        if self.config.contrastive_loss in ("simsiam", "vicreg"):
            return hidden_states[:, :, 0]
        # Patch tokens must also serve the reconstruction, which keeps them from collapsing to one point (Table 4).
        return hidden_states[:, :, 1:].mean(2)

    def contrast(self, pooled: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Pooled views `(B, 2, D)` of each process -> projections `(B, 2, P)`, objective over all processes."""
        projections = self.projector(pooled)
        # Without autocast, which would multiply in half precision; similarities divided by 0.1 need more.
        with torch.autocast(projections.device.type, enabled=False):
            first, second = at_least_float32(projections).unbind(1)  # (B, P) each
            if self.config.contrastive_loss == "simsiam":
                first_target, second_target = at_least_float32(pooled).unbind(1)
                return projections, simsiam_loss(first, second_target) + simsiam_loss(second, first_target)
            if self.config.contrastive_loss == "vicreg":
                return projections, vicreg_loss(first, second, self.config)
            loss_function = {"info_nce": info_nce_loss, "nt_xent": nt_xent_loss}[self.config.contrastive_loss]
            is_fixed = self.logit_scale is None
            logit_scale = 1 / self.config.temperature if is_fixed else at_least_float32(self.logit_scale).exp()
            return projections, loss_function(first, second, logit_scale)


class ViCMAEForImageClassification(ViCMAEPreTrainedModel):
    """The encoder with a linear classifier on its pooled output. Patches are embedded frame by frame."""

    _embeds_video = False
    __call__: Callable[..., ImageClassifierOutput]

    def __init__(self, config: ViCMAEConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vicmae = ViCMAEModel(config, video=self._embeds_video)
        length = config.num_frames // config.tubelet_size if config.pooling == "tubelets" else 1
        self.classifier = nn.Linear(length * config.hidden_size, config.num_labels)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vicmae.get_input_embeddings()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor | None = None, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: images `(B, C, H, W)` or clips `(B, T, C, H, W)`, normalised.
            labels: class indices `(B,)`, or targets `(B, num_labels)`: probabilities (mixup), 0 / 1 for
                `problem_type="multi_label_classification"`, numbers for `"regression"`.

        Raises:
            ValueError: if a shape does not fit the model or the problem.
        """
        outputs = self.vicmae(pixel_values, **kwargs)
        logits = self.classifier(outputs.pooler_output)  # (B, num_labels)
        loss = None if labels is None else self.classification_loss(logits, labels)
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )

    def classification_loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        problem_type = self.config.problem_type
        if problem_type is None:
            problem_type = "regression" if self.num_labels == 1 else "single_label_classification"
        logits, labels = at_least_float32(logits), labels.to(logits.device)
        is_index = problem_type == "single_label_classification" and not labels.is_floating_point()
        expected = (logits.shape[0],) if is_index else tuple(logits.shape)
        if labels.numel() != math.prod(expected):
            raise ValueError(f"labels for {problem_type} must have shape {expected}, got {tuple(labels.shape)}.")
        labels = labels.reshape(expected)
        if problem_type == "regression":
            return F.mse_loss(logits, labels.to(logits.dtype))
        if problem_type == "multi_label_classification":
            return F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)


class ViCMAEForVideoClassification(ViCMAEForImageClassification):
    """The same for clips, with joint space-time attention over tubelets of `config.tubelet_size` frames."""

    _embeds_video = True


# With this, saved models carry this file and those that it imports.
ViCMAEModel.register_for_auto_class("AutoModel")
ViCMAEForPreTraining.register_for_auto_class("AutoModelForPreTraining")
ViCMAEForImageClassification.register_for_auto_class("AutoModelForImageClassification")
ViCMAEForVideoClassification.register_for_auto_class("AutoModelForVideoClassification")

__all__ = [
    "ViCMAEForImageClassification",
    "ViCMAEForPreTraining",
    "ViCMAEForVideoClassification",
    "ViCMAEModel",
    "ViCMAEPreTrainedModel",
]
