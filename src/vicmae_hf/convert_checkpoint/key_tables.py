"""
Names of tensors there and here, in tables of (name there, name here), of modules or tensors. They are data and not
code, so that they are read in both directions: to convert, to revert, and to name a tensor in an error as the user
knows it. `{}` is the number of a layer; what follows a module's name (".weight") stays. A tensor with several names
here is split: three are queries, keys and values, two the positions of the class token and of the patches.
"""

import re


KeyTable = list[tuple[str, str]]


TIMM_LAYER = [
    ("norm1", "layernorm_before"),
    ("attn.qkv", "attention.q_proj attention.k_proj attention.v_proj"),
    ("attn.proj", "attention.o_proj"),
    ("norm2", "layernorm_after"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]


# Names of Transformers before version 5. Version 5 still writes them to files.
VIT_MAE_LAYER = [
    ("layernorm_before", "layernorm_before"),
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
    ("layernorm_after", "layernorm_after"),
    ("intermediate.dense", "mlp.fc1"),
    ("output.dense", "mlp.fc2"),
]


VICMAE_LAYER = [
    ("layernorm_before", "layernorm_before"),
    ("attention.q_proj", "attention.q_proj"),
    ("attention.k_proj", "attention.k_proj"),
    ("attention.v_proj", "attention.v_proj"),
    ("attention.o_proj", "attention.o_proj"),
    ("layernorm_after", "layernorm_after"),
    ("mlp.fc1", "mlp.fc1"),
    ("mlp.fc2", "mlp.fc2"),
]


def layers(source: str, target: str, table: KeyTable) -> KeyTable:
    """Puts every name of `table` inside a layer: names there into `source`, names here into `target`."""
    return [
        (f"{source}.{name}", " ".join(f"{target}.{target_name}" for target_name in target_names.split()))
        for name, target_names in table
    ]


TIMM_KEYS = [
    ("cls_token", "vicmae.embeddings.cls_token"),
    ("pos_embed", "vicmae.embeddings.cls_position_embedding vicmae.embeddings.position_embeddings"),
    ("patch_embed.proj", "vicmae.embeddings.patch_embeddings.projection"),
    *layers("blocks.{}", "vicmae.layers.{}", TIMM_LAYER),
]


RELEASED_KEYS = [
    *TIMM_KEYS,
    ("norm", "vicmae.layernorm"),
    ("decoder_embed", "decoder.embed"),
    ("mask_token", "decoder.mask_token"),
    ("decoder_pos_embed", "decoder.cls_position_embedding decoder.position_embeddings"),
    *layers("decoder_blocks.{}", "decoder.decoder_layers.{}", TIMM_LAYER),
    ("decoder_norm", "decoder.layernorm"),
    ("decoder_pred", "decoder.prediction"),
    ("projector", "projector"),
    ("head", "classifier"),
]


POOLED_KEYS = [*TIMM_KEYS, ("fc_norm", "vicmae.layernorm"), ("head", "classifier")]


VIT_MAE_KEYS = [
    ("vit.embeddings.cls_token", "vicmae.embeddings.cls_token"),
    (
        "vit.embeddings.position_embeddings",
        "vicmae.embeddings.cls_position_embedding vicmae.embeddings.position_embeddings",
    ),
    ("vit.embeddings.patch_embeddings.projection", "vicmae.embeddings.patch_embeddings.projection"),
    ("vit.layernorm", "vicmae.layernorm"),
    ("decoder.decoder_embed", "decoder.embed"),
    ("decoder.mask_token", "decoder.mask_token"),
    ("decoder.decoder_pos_embed", "decoder.cls_position_embedding decoder.position_embeddings"),
    ("decoder.decoder_norm", "decoder.layernorm"),
    ("decoder.decoder_pred", "decoder.prediction"),
]


KEY_TABLES: dict[str, KeyTable] = {
    # ViC-MAE and MAE, and ViTs finetuned on the class token: one table, because each file has a part of these names.
    "released": RELEASED_KEYS,
    # ViTs finetuned on the mean of the patch tokens. It is normalised after pooling, so `fc_norm` is the final norm.
    "pooled": POOLED_KEYS,
    # `facebook/vit-mae-base` on the Hub.
    "vit_mae": [
        *VIT_MAE_KEYS,
        *layers("vit.encoder.layer.{}", "vicmae.layers.{}", VIT_MAE_LAYER),
        *layers("decoder.decoder_layers.{}", "decoder.decoder_layers.{}", VIT_MAE_LAYER),
    ],
    # `save_pretrained` of Transformers 5.23.
    "vit_mae_saved": [
        *VIT_MAE_KEYS,
        *layers("vit.encoder.layer.{}", "vicmae.layers.{}", VIT_MAE_LAYER),
        *layers("decoder.decoder_encoder.layer.{}", "decoder.decoder_layers.{}", VIT_MAE_LAYER),
    ],
    # `state_dict()` of Transformers 5.23.
    "vit_mae_in_memory": [
        *VIT_MAE_KEYS,
        *layers("vit.layers.{}", "vicmae.layers.{}", VICMAE_LAYER),
        *layers("decoder.decoder_layers.{}", "decoder.decoder_layers.{}", VICMAE_LAYER),
    ],
}


def match_name(name: str, pattern: str) -> re.Match | None:
    """Matches a module's tensor, or the tensor itself. Groups: the layer (for a pattern with `{}`) and the rest."""
    layer_pattern = re.escape(pattern).replace(r"\{\}", r"(?P<layer>\d+)")
    return re.fullmatch(layer_pattern + r"(?P<rest>(\..+)?)", name)


def fill(pattern: str, match: re.Match) -> str:
    """Puts the layer and the rest of a name that `match_name` found into the pattern of its other name."""
    groups = match.groupdict()
    return pattern.replace("{}", groups.get("layer", "")) + groups["rest"]


def translate(name: str, table: KeyTable) -> list[str] | None:
    """Returns all names of a tensor on the other side of a table, or None."""
    for source, targets in table:
        match = match_name(name, source)
        if match:
            return [fill(target, match) for target in targets.split()]
    return None


def source_name(name: str, table: KeyTable) -> str:
    """Returns the name there of a tensor of ours. A name that the table lacks stays."""
    back = [(target, source) for source, targets in table for target in targets.split()]
    return (translate(name, back) or [name])[0]
