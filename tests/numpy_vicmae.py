"""
ViC-MAE written out in NumPy, float64, from the supplement: the independent computation that the tests compare with.

Weights are a dict of arrays named as in the model's state dict.
"""

import math

import numpy as np


def to_numpy(state_dict: dict) -> dict[str, np.ndarray]:
    return {name: tensor.detach().double().numpy() for name, tensor in state_dict.items()}


def positions(height: int, width: int, size: int) -> np.ndarray:
    """Loops over the definition: (height * width, size), column encoded first, sines before cosines."""
    table = np.zeros((height * width, size))
    quarter = size // 4
    for row in range(height):
        for column in range(width):
            for index in range(quarter):
                frequency = 1 / 10000 ** (index / quarter)
                token = table[row * width + column]
                token[index] = math.sin(column * frequency)
                token[quarter + index] = math.cos(column * frequency)
                token[2 * quarter + index] = math.sin(row * frequency)
                token[3 * quarter + index] = math.cos(row * frequency)
    return table


def patches(frame: np.ndarray, patch_size: int) -> np.ndarray:
    """(C, H, W) -> (L, p, p, C)."""
    _, height, width = frame.shape
    cut = [
        frame[:, top : top + patch_size, left : left + patch_size].transpose(1, 2, 0)
        for top in range(0, height, patch_size)
        for left in range(0, width, patch_size)
    ]
    return np.stack(cut)


def linear(values: np.ndarray, weights: dict, name: str) -> np.ndarray:
    return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(values: np.ndarray, weights: dict, name: str, epsilon: float = 1e-6) -> np.ndarray:
    centred = values - values.mean(-1, keepdims=True)
    normalised = centred / np.sqrt(values.var(-1, keepdims=True) + epsilon)
    return normalised * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def gelu(values: np.ndarray) -> np.ndarray:
    return values * (1 + np.vectorize(math.erf)(values / math.sqrt(2))) / 2


def softmax(values: np.ndarray) -> np.ndarray:
    exponentials = np.exp(values - values.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def attention(tokens: np.ndarray, weights: dict, name: str, num_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, D) -> output (N, D), weights (heads, N, N)."""
    query, key, value = (linear(tokens, weights, f"{name}.{part}_proj") for part in "qkv")
    size = tokens.shape[1] // num_heads
    outputs, maps = [], []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        maps.append(softmax(query[:, part] @ key[:, part].T / math.sqrt(size)))
        outputs.append(maps[-1] @ value[:, part])
    return linear(np.concatenate(outputs, axis=1), weights, f"{name}.o_proj"), np.stack(maps)


def layer(tokens: np.ndarray, weights: dict, name: str, num_heads: int) -> np.ndarray:
    tokens = (
        tokens
        + attention(layer_norm(tokens, weights, f"{name}.layernorm_before"), weights, f"{name}.attention", num_heads)[
            0
        ]
    )
    hidden = gelu(linear(layer_norm(tokens, weights, f"{name}.layernorm_after"), weights, f"{name}.mlp.fc1"))
    return tokens + linear(hidden, weights, f"{name}.mlp.fc2")


def embed(frame: np.ndarray, weights: dict, config, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """A frame (C, H, W) -> class token (D,), patch tokens with positions (L, D)."""
    kernel = weights[f"{prefix}embeddings.patch_embeddings.projection.weight"].transpose(2, 3, 1, 0)
    bias = weights[f"{prefix}embeddings.patch_embeddings.projection.bias"]
    tokens = np.einsum("lijc,ijcd->ld", patches(frame, config.patch_size), kernel) + bias
    grid = (frame.shape[1] // config.patch_size, frame.shape[2] // config.patch_size)
    return weights[f"{prefix}embeddings.cls_token"][0, 0], tokens + positions(*grid, config.hidden_size)


def encode(tokens: np.ndarray, weights: dict, config, prefix: str) -> np.ndarray:
    for index in range(config.num_hidden_layers):
        tokens = layer(tokens, weights, f"{prefix}layers.{index}", config.num_attention_heads)
    return layer_norm(tokens, weights, f"{prefix}layernorm")


def decode(encoded: np.ndarray, kept: np.ndarray, grid: tuple[int, int], weights: dict, config) -> np.ndarray:
    """Encoded tokens (1 + K, D) of the patches `kept` -> predicted patches (L, p * p * C)."""
    embedded = linear(encoded, weights, "decoder.embed")
    tokens = np.repeat(weights["decoder.mask_token"][0], math.prod(grid), axis=0)
    tokens[kept] = embedded[1:]
    tokens = np.concatenate([embedded[:1], tokens + positions(*grid, config.decoder_hidden_size)])
    for index in range(config.decoder_num_hidden_layers):
        tokens = layer(tokens, weights, f"decoder.decoder_layers.{index}", config.decoder_num_attention_heads)
    return linear(layer_norm(tokens, weights, "decoder.layernorm")[1:], weights, "decoder.prediction")


def pixel_target(frame: np.ndarray, config) -> np.ndarray:
    target = patches(frame, config.patch_size).reshape(-1, config.patch_size**2 * config.num_channels)
    if config.norm_pix_loss:
        target = (target - target.mean(1, keepdims=True)) / np.sqrt(target.var(1, ddof=1, keepdims=True) + 1e-6)
    return target


def project(pooled: np.ndarray, weights: dict) -> np.ndarray:
    """(B, D) -> (B, P), with the statistics of this batch."""
    for linear_name, norm_name in (("projector.0", "projector.1"), ("projector.3", "projector.4")):
        pooled = linear(pooled, weights, linear_name)
        pooled = (pooled - pooled.mean(0)) / np.sqrt(pooled.var(0) + 1e-5)
        pooled = np.maximum(pooled * weights[f"{norm_name}.weight"] + weights[f"{norm_name}.bias"], 0)
    return linear(pooled, weights, "projector.6")


def unit(values: np.ndarray) -> np.ndarray:
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def info_nce(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """Algorithm 1: `ctr(p_i, z_j) + ctr(z_j, p_i)`, with exp(tau) = 1 / temperature."""

    def contrast(anchors: np.ndarray, others: np.ndarray) -> float:
        similarities = np.einsum("nl,ml->nm", anchors, others) / temperature
        losses = [math.log(sum(math.exp(s) for s in row)) - row[index] for index, row in enumerate(similarities)]
        return 2 * sum(losses) / len(losses)

    first, second = unit(first), unit(second)
    return contrast(first, second) + contrast(second, first)


def nt_xent(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """SimCLR, equation (1): the mean over both directions of all pairs, of 2 N projections."""
    projections = unit(np.concatenate([first, second]))
    count = len(projections)
    total = 0.0
    for anchor in range(count):
        positive = (anchor + count // 2) % count
        scores = [math.exp(projections[anchor] @ projections[other] / temperature) for other in range(count)]
        total -= math.log(scores[positive] / sum(scores[other] for other in range(count) if other != anchor))
    return total / count


def simsiam(projection: np.ndarray, target: np.ndarray) -> float:
    """Supplement, equation (1), averaged over the batch."""
    return float(np.mean(np.sum((unit(projection) - unit(target)) ** 2, axis=1)))


def vicreg(first: np.ndarray, second: np.ndarray, config) -> float:
    """Supplement, equations (2) to (4)."""
    first, second = unit(first), unit(second)
    count, size = first.shape
    loss = config.vicreg_invariance_weight / count * np.sum((first - second) ** 2)
    for values in (first, second):
        deviations = np.sqrt(values.var(0, ddof=1) + 1e-4)
        covariance = np.cov(values, rowvar=False)
        off_diagonal = sum(covariance[i, j] ** 2 for i in range(size) for j in range(size) if i != j)
        loss += config.vicreg_variance_weight * np.mean(np.maximum(0, 1 - deviations))
        loss += config.vicreg_covariance_weight * off_diagonal / size
    return float(loss)


def collapse(embeddings: np.ndarray) -> dict[str, float]:
    """Spread, RankMe, alignment and uniformity of (N, 2, D), pair by pair."""
    count = len(embeddings)
    joined = np.concatenate([embeddings[:, 0], embeddings[:, 1]])
    # Eigenvalues of the Gram matrix are the squares of the singular values.
    eigenvalues = np.linalg.eigvalsh(joined.T @ joined if joined.shape[0] > joined.shape[1] else joined @ joined.T)
    singular_values = np.sqrt(np.maximum(eigenvalues, 0))
    shares = singular_values / singular_values.sum() + 1e-7
    first, second = unit(embeddings[:, 0]), unit(embeddings[:, 1])
    potentials = [
        np.mean([math.exp(-2 * np.sum((view[i] - view[j]) ** 2)) for i in range(count) for j in range(i)])
        for view in (first, second)
    ]
    return {
        "std": float(np.mean(np.std(np.concatenate([first, second]), axis=0))),
        "rank": math.exp(-sum(share * math.log(share) for share in shares)),
        "alignment": sum(np.sum((a - b) ** 2) for a, b in zip(first, second, strict=True)) / count,
        "uniformity": sum(math.log(potential) for potential in potentials) / 2,
    }


def pretraining(pixel_values: np.ndarray, noise: np.ndarray, weights: dict, config) -> dict[str, np.ndarray | float]:
    """The training forward of Algorithm 1, sample by sample and view by view: (B, 2, C, H, W), noise (B, 2, L)."""
    batch_size, _, _, height, width = pixel_values.shape
    grid = (height // config.patch_size, width // config.patch_size)
    num_visible = round(math.prod(grid) * (1 - config.mask_ratio))
    num_views = 2 if config.reconstruct == "both" else 1
    encoded, logits, errors, masks = {}, {}, [], np.ones(noise.shape)
    for sample in range(batch_size):
        for view in range(2):
            kept = np.argsort(noise[sample, view], kind="stable")[:num_visible]
            masks[sample, view, kept] = 0
            frame = pixel_values[sample, view]
            cls_token, tokens = embed(frame, weights, config, "vicmae.")
            encoded[sample, view] = encode(np.stack([cls_token, *tokens[kept]]), weights, config, "vicmae.")
            if view < num_views:
                logits[sample, view] = decode(encoded[sample, view], kept, grid, weights, config)
                error = ((logits[sample, view] - pixel_target(frame, config)) ** 2).mean(1)
                errors.extend(error[masks[sample, view] == 1])
    result = {
        "mask": masks,
        "logits": np.stack([[logits[s, v] for v in range(num_views)] for s in range(batch_size)]),
        "reconstruction_loss": float(np.mean(errors)),
        "cls_tokens": [np.stack([encoded[s, v][0] for s in range(batch_size)]) for v in range(2)],
        "pooled": [np.stack([encoded[s, v][1:].mean(0) for s in range(batch_size)]) for v in range(2)],
    }
    result["loss"] = result["reconstruction_loss"]
    if config.contrastive_loss != "none":
        result["contrastive_loss"] = contrastive_loss(result, weights, config)
        result["loss"] += config.contrastive_weight * result["contrastive_loss"]
    return result


def contrastive_loss(result: dict, weights: dict, config) -> float:
    if config.contrastive_loss in ("simsiam", "vicreg"):
        first, second = (project(view, weights) for view in result["cls_tokens"])
        if config.contrastive_loss == "vicreg":
            return vicreg(first, second, config)
        first_target, second_target = result["cls_tokens"]
        return simsiam(first, second_target) + simsiam(second, first_target)
    first, second = (project(view, weights) for view in result["pooled"])
    return {"info_nce": info_nce, "nt_xent": nt_xent}[config.contrastive_loss](first, second, config.temperature)
