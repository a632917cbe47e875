"""
SimCLR and MAE as lightly has them (https://github.com/lightly-ai/lightly): its encoder around timm's ViT, its heads,
losses and masks. Data, views, their order, optimizer and schedule are those of our runs with the same seed.
"""

import gc
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from transformers import set_seed

from vicmae_hf.configuration_vicmae import ViCMAEConfig
from vicmae_hf.convert_checkpoint import convert_state_dict
from vicmae_hf.data.samples.augmentation import PixelNormalizer
from vicmae_hf.modeling_vicmae import ViCMAEModel
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.pretraining.pretraining import build_frame_pairs, build_loader
from vicmae_hf.processors import build_processors
from vicmae_hf.training.optimization import parameter_groups, plan_run


def is_installed() -> bool:
    try:
        import lightly.models.modules.masked_vision_transformer_timm  # noqa: F401
    except ImportError:
        return False
    return True


def build_encoder(config: ViCMAEConfig) -> nn.Module:
    """lightly's ViT of the sizes of `config`, with fixed positions as ours has them."""
    # Imported here and below, because lightly is installed for this experiment only.
    from lightly.models.modules import MaskedVisionTransformerTIMM
    from timm.models.vision_transformer import VisionTransformer

    vit = VisionTransformer(
        img_size=config.image_height_and_width,
        patch_size=config.patch_size,
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        num_classes=0,
        global_pool="token",
    )
    encoder = MaskedVisionTransformerTIMM(vit)
    encoder.mask_token.requires_grad_(False)  # masked patches are left out, as in MAE, and no token stands for them
    return encoder


class SimCLR(nn.Module):
    """Contrasts the class tokens of two whole views."""

    def __init__(self, config: ViCMAEConfig):
        super().__init__()
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        self.encoder = build_encoder(config)
        self.head = SimCLRProjectionHead(
            config.hidden_size, config.projector_hidden_size, config.projector_output_size
        )
        self.criterion = NTXentLoss(temperature=config.temperature)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Views `(B, 2, 3, H, W)` -> loss."""
        projections = self.head(self.encoder(views.transpose(0, 1).flatten(0, 1)))  # (2 B, P)
        return self.criterion(*projections.chunk(2))


class MAE(nn.Module):
    """Reconstructs the first view, pixels normalised by patch: lightly's example for MAE."""

    def __init__(self, config: ViCMAEConfig):
        super().__init__()
        from lightly.models.modules import MaskedVisionTransformerDecoderTIMM

        self.config = config
        self.encoder = build_encoder(config)
        width = config.decoder_hidden_size
        self.embed = nn.Linear(config.hidden_size, width)
        self.decoder = MaskedVisionTransformerDecoderTIMM(
            num_patches=self.encoder.sequence_length - 1,
            embed_dim=width,
            depth=config.decoder_num_hidden_layers,
            num_heads=config.decoder_num_attention_heads,
            mlp_ratio=config.decoder_intermediate_size / width,
        )
        self.predict = nn.Linear(width, config.num_channels * config.patch_size**2)

    def forward(self, views: torch.Tensor) -> torch.Tensor:
        """Views `(B, 2, 3, H, W)` -> loss."""
        from lightly.models import utils

        images = views[:, 0]
        size = (len(images), self.encoder.sequence_length)
        kept, masked = utils.random_token_mask(size, mask_ratio=self.config.mask_ratio)  # indices, class token first
        tokens = self.embed(self.encoder.encode(images, idx_keep=kept))  # (B, 1 + K, D)
        whole = utils.repeat_token(self.decoder.mask_token, size)
        decoded = self.decoder(utils.set_at_index(whole, kept, tokens.type_as(whole)))
        predicted = self.predict(utils.get_at_index(decoded, masked))
        patches = utils.get_at_index(utils.patchify(images, self.config.patch_size), masked - 1)
        return F.mse_loss(predicted, utils.normalize_mean_var(patches))


PEERS = {"simclr": SimCLR, "lightly_mae": MAE}


def train_peer(name: str, config: ViCMAEConfig, settings: PretrainingArguments, num_updates: int) -> dict[str, float]:
    """
    Trains one of `PEERS` as `settings` say, for `num_updates`, and saves its encoder to `settings.output_dir` as one
    of ours.
    """
    settings = replace(settings, max_train_steps=num_updates)
    accelerator = Accelerator()
    dataset = build_frame_pairs(accelerator, config, settings)
    schedule = plan_run(settings, accelerator.num_processes, dataset.num_samples)
    loader = accelerator.prepare_data_loader(build_loader(accelerator, dataset, settings, schedule))
    processors = build_processors(config)
    normalize = PixelNormalizer(processors[0].image_mean, processors[0].image_std).to(accelerator.device)
    set_seed(settings.seed)
    model = PEERS[name](config).to(accelerator.device).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=0.0, betas=(0.9, 0.95))
    for step, batch in zip(range(schedule.num_steps), loader, strict=False):
        schedule.set_learning_rate(optimizer, step)
        loss = model(normalize(batch["pixel_values"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    save_encoder(model.encoder, config, Path(settings.output_dir))
    del loader, optimizer
    gc.collect()
    return {"loss": loss.item(), "num_updates": schedule.num_steps}


def save_encoder(encoder: nn.Module, config: ViCMAEConfig, folder: Path) -> None:
    """Saves lightly's encoder as a `ViCMAEModel`, whose features are the same, with processors."""
    heads = config.num_attention_heads
    converted, tensors = convert_state_dict(
        encoder.vit.state_dict(), image_size=config.image_size, num_attention_heads=heads
    )
    model = ViCMAEModel(converted, video=False)
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    for processor in build_processors(config):
        processor.save_pretrained(folder)
