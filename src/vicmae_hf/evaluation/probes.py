"""Trains probes on frozen features: linear ones (Table 3), and attentive ones (V-JEPA)."""

import statistics
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import nn
from torch.nn import functional as F

from ..configuration_vicmae import ViCMAEConfig
from ..data.samples.label_fraction import take_share
from ..data.samples.views import ViewDataset
from ..errors import InputError
from ..modeling_vicmae import ViCMAEModel
from ..reports.baselines import with_random_weights
from ..training.optimization import learning_rate_factor, scaled_learning_rate, set_learning_rate
from ..training.reporting import Progress
from .feature_table import LabelledFeatures, nearest_neighbour_scores, predict_blocks
from .features import embed_views, pooled
from .metrics.accuracy import accuracy, likeliest_classes, top_k_accuracies
from .prediction import check_embeddings


logger = get_logger(__name__)

# The recipe of Table 3, here and in linear evaluation with random views (`classification`).
LINEAR_EPOCHS = 90
LINEAR_WARMUP_EPOCHS = 10.0
LINEAR_BASE_LEARNING_RATE = 0.1
LINEAR_MOMENTUM = 0.9
PROBE_BATCH = 256  # views of an update; the paper's batch is larger

# The attentive probe of V-JEPA (Bardes et al., "Revisiting Feature Prediction for Learning Visual Representations from
# Video", 2024): 20 epochs of AdamW with cosine decay.
ATTENTIVE_EPOCHS = 20
ATTENTIVE_LEARNING_RATE = 1e-3
ATTENTIVE_WEIGHT_DECAY = 0.01
ATTENTIVE_BATCH = 32  # items, all of whose tokens are in memory

FRAMES_AT_A_TIME = 256  # in a forward pass of an encoder

# Called when an epoch of a probe is done.
Advance = Callable[[], object]


def say_nothing() -> None:
    """Shows no progress."""


def start_linear_head(linear: nn.Linear, generator: torch.Generator | None = None) -> nn.BatchNorm1d:
    """
    Gives a linear classifier of frozen features its first weights, and returns the batch norm that comes before it.
    The batch norm has no parameters. Scales of features differ from encoder to encoder, and it only brings them to one
    scale, so that one learning rate suits all (supplement, section A).
    """
    nn.init.normal_(linear.weight, std=0.01, generator=generator)
    nn.init.zeros_(linear.bias)
    return nn.BatchNorm1d(linear.in_features, affine=False)


def build_linear_optimizer(parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> torch.optim.SGD:
    """Builds SGD with momentum (Table 3) for parameters or groups of them. Its learning rate is still 0."""
    # Whoever trains sets the learning rate before every update. The training loop needs a fused optimizer.
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=LINEAR_MOMENTUM, fused=True)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            # torch would make it at the first update, and leave it unset if a gradient scaler passes over that one.
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def train_linear_probe(
    samples: LabelledFeatures,
    *,
    seed: int,
    num_epochs: int = LINEAR_EPOCHS,
    warmup_epochs: float = LINEAR_WARMUP_EPOCHS,
    advance: Advance = say_nothing,
) -> nn.Module:
    """
    Trains a linear classifier on the views of labelled items, by SGD with momentum, cosine decay and no weight decay
    (Table 3, at a smaller batch). Every view is a sample of its own. Linear evaluation with random views is in
    `classification`. Raises an InputError if there is a single sample.
    """
    if len(samples) < 2:
        raise InputError("A linear probe needs at least 2 frames to learn from, because of its batch norm; got 1.")
    # All random numbers of a probe come from its seed, so that encoders are compared with equal luck.
    generator = torch.Generator().manual_seed(seed)
    width = samples.features.embeddings.shape[1]
    linear = nn.utils.skip_init(nn.Linear, width, len(samples.class_names))  # which would draw others first
    probe = nn.Sequential(start_linear_head(linear, generator), linear)
    batch_size = min(PROBE_BATCH, len(samples))  # full batches only, because batch norm needs them
    peak = scaled_learning_rate(LINEAR_BASE_LEARNING_RATE, batch_size)
    optimizer = build_linear_optimizer(probe.parameters())
    steps_per_epoch = len(samples) // batch_size
    num_steps = num_epochs * steps_per_epoch
    probe.train()
    for step in range(num_steps):
        if step % steps_per_epoch == 0:  # a new epoch, another order
            order = torch.randperm(len(samples), generator=generator)
        start = step % steps_per_epoch * batch_size
        features, labels = samples.take(order[start : start + batch_size])
        set_learning_rate(optimizer, peak, learning_rate_factor(step, warmup_epochs * steps_per_epoch, num_steps))
        optimizer.zero_grad()
        F.cross_entropy(probe(features), labels).backward()
        optimizer.step()
        if (step + 1) % steps_per_epoch == 0:
            advance()
    return probe.eval()


class AttentiveClassifier(nn.Module):
    """
    One block of cross-attention with a learned query over all tokens of an item, and a linear classifier: it learns
    which tokens matter, where a mean would mix them.
    """

    def __init__(self, width: int, num_heads: int, num_classes: int):
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.layernorm_tokens = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.layernorm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `(B, N, D)` -> logits `(B, num_classes)`."""
        tokens = self.layernorm_tokens(tokens)
        query = self.query.expand(len(tokens), -1, -1)  # (B, 1, D)
        hidden_states = query + self.attention(query, tokens, tokens, need_weights=False)[0]
        hidden_states = hidden_states + self.mlp(self.layernorm(hidden_states))
        return self.classifier(hidden_states[:, 0])


def pooled_width(config: ViCMAEConfig) -> int:
    """Numbers of an encoder's `pooler_output`."""
    length = config.num_frames // config.tubelet_size if config.pooling == "tubelets" else 1
    return length * config.hidden_size


def pooled_and_tokens(
    accelerator: Accelerator, models: Sequence[ViCMAEModel]
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Returns a function: images `(V, ...)` -> for each of several encoders `pooler_output`, then L patch tokens."""

    def embed(views: torch.Tensor) -> torch.Tensor:
        columns = []
        with accelerator.autocast():
            for model in models:
                outputs = model(views.to(model.dtype))
                columns += [outputs.pooler_output.float(), outputs.last_hidden_state[:, 1:].flatten(1).float()]
        return torch.cat(columns, dim=1)

    return embed


def take_tokens(samples: LabelledFeatures, items: torch.Tensor, width: int) -> torch.Tensor:
    """Returns the tokens of all views of some items, `(B, V * L, D)`; an embedding holds those of a view."""
    return samples.features.embeddings[samples.features.rows[items]].reshape(len(items), -1, width)


def train_attentive_probe(
    samples: LabelledFeatures,
    *,
    width: int,
    num_heads: int,
    seed: int,
    advance: Advance,
) -> AttentiveClassifier:
    """Trains an attentive classifier on tokens of labelled items (see `take_tokens`), D being `width`."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not `torch.manual_seed`, which would seed the GPUs, too
        probe = AttentiveClassifier(width, num_heads, len(samples.class_names))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=0.0, weight_decay=ATTENTIVE_WEIGHT_DECAY)
    batches = [
        batch
        for _ in range(ATTENTIVE_EPOCHS)
        for batch in torch.randperm(len(samples.labels), generator=generator).split(ATTENTIVE_BATCH)
    ]
    for step, items in enumerate(batches):
        set_learning_rate(optimizer, ATTENTIVE_LEARNING_RATE, learning_rate_factor(step, 0, len(batches)))
        optimizer.zero_grad()
        F.cross_entropy(probe(take_tokens(samples, items, width)), samples.labels[items]).backward()
        optimizer.step()
        if (step + 1) % (len(batches) // ATTENTIVE_EPOCHS) == 0:
            advance()
    return probe.eval()


def attentive_accuracy(
    train: LabelledFeatures,
    evaluation: LabelledFeatures,
    *,
    width: int,
    num_heads: int,
    seed: int,
    advance: Advance = say_nothing,
) -> float:
    """Trains an attentive probe and returns its top-1 accuracy in percent on held-out files."""
    probe = train_attentive_probe(train, width=width, num_heads=num_heads, seed=seed, advance=advance)
    with torch.no_grad():
        items = torch.arange(len(evaluation.labels)).split(ATTENTIVE_BATCH)
        scores = torch.cat([probe(take_tokens(evaluation, batch, width)) for batch in items])
    return accuracy(scores, evaluation.labels)["top1"]


def balanced_subset(labels: torch.Tensor, fraction: float, seed: int) -> torch.Tensor:
    """
    Draws a random `fraction` of every class, at least one of each: indices. With the same seed, a smaller fraction is
    a part of a larger one.
    """
    generator = torch.Generator().manual_seed(seed)

    def shuffle(label: int, members: np.ndarray) -> np.ndarray:
        return members[torch.randperm(len(members), generator=generator).numpy()]

    return torch.from_numpy(take_share(labels.numpy(), fraction, shuffle))


def probe_accuracy(
    train: LabelledFeatures, evaluation: LabelledFeatures, seed: int, advance: Advance = say_nothing
) -> dict[str, float]:
    """
    Trains a probe and returns `top1` and `top5` in percent on held-out files. The classifier learns from single views;
    the probabilities of a file's views are averaged.
    """
    probe = train_linear_probe(train, seed=seed, advance=advance)
    with torch.no_grad():
        blocks = predict_blocks(lambda views: probe(views).softmax(-1), evaluation.features)
        classes = [likeliest_classes(block) for block in blocks]  # (n, 5) each
    return top_k_accuracies(torch.cat(classes), evaluation.labels)


def linear_probe(
    train: LabelledFeatures,
    evaluation: LabelledFeatures,
    seeds: Sequence[int],
    config: ViCMAEConfig | None = None,
    advance: Advance = say_nothing,
) -> list[dict[str, float]]:
    """
    Returns for each seed the accuracies of `probe_accuracy`, and as `knn_top1` the accuracy of nearest neighbours, for
    which a file's views are averaged. Each seed learns from its own random 80 % of every class's training files. So
    the spread shows how much depends on which files were labelled.

    Args:
        config: of the encoder, whose tokens follow its pooled output in each embedding; adds `attentive_top1`.
        advance: called after every epoch of every probe.
    """
    results = []
    width = None if config is None else pooled_width(config)
    pooled_train, pooled_evaluation = (samples.columns(0, width) for samples in (train, evaluation))
    for seed in seeds:
        subset = balanced_subset(train.labels, 0.8, seed)
        known = pooled_train.select(subset)
        votes = nearest_neighbour_scores(known, pooled_evaluation.features)
        top1 = accuracy(votes, evaluation.labels)["top1"]
        results.append(probe_accuracy(known, pooled_evaluation, seed, advance) | {"knn_top1": top1})
        if config is not None:
            tokens = (samples.columns(width, None) for samples in (train.select(subset), evaluation))
            options = {"width": config.hidden_size, "num_heads": config.num_attention_heads, "seed": seed}
            results[-1]["attentive_top1"] = attentive_accuracy(*tokens, **options, advance=advance)
    return results


def embed_labelled(
    accelerator: Accelerator,
    encoders: Sequence[ViCMAEModel],
    views: ViewDataset,
    *,
    batch_size: int,
    num_workers: int,
    with_tokens: bool = False,
) -> list[LabelledFeatures]:
    """
    Computes features of every view by itself, with the labels of their files, by each of several encoders in eval
    mode; `with_tokens` the patch tokens, too (see `pooled_and_tokens`). Every file is read once for all of them.
    Raises an InputError if a feature is infinite or NaN: a probe would be right by chance.
    """
    loading = {"batch_size": batch_size, "num_workers": num_workers}
    embed = (pooled_and_tokens if with_tokens else pooled)(accelerator, encoders)

    def embed_checked(batch: torch.Tensor) -> torch.Tensor:
        embeddings = embed(batch)
        check_embeddings(embeddings, views.source.name)
        return embeddings

    with torch.no_grad():
        features = embed_views(accelerator, embed_checked, views, average=False, **loading)
    return LabelledFeatures.of(features, views.source).chunk(len(encoders))


def fit_probes(
    accelerator: Accelerator,
    train: Sequence[LabelledFeatures],
    evaluation: Sequence[LabelledFeatures],
    config: ViCMAEConfig | None,
) -> dict[str, list[dict[str, float]]]:
    """
    Runs `linear_probe` on features of the same files by several encoders: by the first, "pretrained", with the seeds
    0, 1, ... of the others, and by each of the others, "untrained", with its own. The processes share the probes.
    Shows its progress.
    """
    num_seeds = len(train) - 1
    num_epochs = LINEAR_EPOCHS + (0 if config is None else ATTENTIVE_EPOCHS)
    logger.info("Fitting %d probes, %d epochs each.", 2 * num_seeds, num_epochs)
    probes = [(encoder, seed) for seed in range(num_seeds) for encoder in (0, seed + 1)]
    share = probes[accelerator.process_index :: accelerator.num_processes]
    with Progress("fitting probes", len(share) * num_epochs, "epochs", accelerator.is_main_process) as progress:
        fit = partial(linear_probe, config=config, advance=progress.advance)
        fitted = [(probe, fit(train[probe[0]], evaluation[probe[0]], [probe[1]])[0]) for probe in share]
    found = dict(gather_object(fitted))
    return {
        "pretrained": [found[0, seed] for seed in range(num_seeds)],
        "untrained": [found[seed + 1, seed] for seed in range(num_seeds)],
    }


def probe_beside_untrained(
    accelerator: Accelerator,
    model: ViCMAEModel,
    train_views: ViewDataset,
    eval_views: ViewDataset,
    num_seeds: int,
    *,
    num_workers: int = 0,
    attentive: bool = False,
) -> dict[str, Any]:
    """
    Runs `linear_probe` on an encoder with the seeds 0, 1, ..., and on as many encoders of its kind with random
    weights. Random weights already separate classes to some degree, so only the difference shows what was learned.

    Args:
        train_views, eval_views: single frames of labelled files.
        num_workers: processes that read files.
        attentive: whether attentive probes are trained, too, on the tokens of the same views.

    Returns:
        `eval_top1`, `eval_top5`, `eval_knn_top1`, with `attentive` also `eval_attentive_top1`, means in percent, and
        `eval_top1_spread`, the standard deviation of the first; the same for random weights, with `untrained_` before
        the names; numbers of classes and files; each probe under `runs`; `failures`, the files that could not be read.
    """
    model = model.to(accelerator.device).eval()
    encoders = [model, *(with_random_weights(model, seed) for seed in range(num_seeds))]
    loading = {"batch_size": FRAMES_AT_A_TIME, "num_workers": num_workers, "with_tokens": attentive}
    config = model.config if attentive else None
    counts = (len(train_views), len(eval_views), num_seeds)
    logger.info("Extracting features of %d and %d files, by the encoder and by %d with random weights.", *counts)
    of_train, of_evaluation = (
        embed_labelled(accelerator, encoders, views, **loading) for views in (train_views, eval_views)
    )
    runs = fit_probes(accelerator, of_train, of_evaluation, config)
    train, evaluation = of_train[0], of_evaluation[0]
    results = {}
    for prefix, probes in zip(("", "untrained_"), runs.values(), strict=True):
        for name in ("top1", "top5", "knn_top1", *(["attentive_top1"] if attentive else [])):
            results[f"{prefix}eval_{name}"] = statistics.fmean(probe[name] for probe in probes)
        top1 = [probe["top1"] for probe in probes]
        results[f"{prefix}eval_top1_spread"] = statistics.stdev(top1) if num_seeds > 1 else 0.0  # undefined for one
    failures = train.features.failures + evaluation.features.failures
    return results | {
        "num_classes": len(train.class_names),
        "num_train_samples": len(train.labels),
        "num_eval_samples": len(evaluation.labels),
        "num_failed": len(failures),
        "runs": runs,
        "failures": failures,
    }
