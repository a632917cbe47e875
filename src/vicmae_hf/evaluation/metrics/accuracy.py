"""Accuracies of classifiers, and how evaluations name their figures."""

from typing import TYPE_CHECKING, Any

import datasets
import torch


if TYPE_CHECKING:
    import evaluate

TOP_K = 5
# The figures that sum up an evaluation: the first two if an item has one label, the last if it may have several.
FIGURES = {
    "eval_top1": "top-1 accuracy",
    "eval_top5": "top-5 accuracy",
    "eval_map": "mean average precision",
}


def top_k_metric() -> "evaluate.Metric":
    """Top-1 and top-5 accuracy in percent, of lists of classes, the likeliest first. Needs no network."""
    import evaluate  # with it comes scipy.stats; a pretraining does without

    class TopKAccuracy(evaluate.Metric):
        def _info(self) -> evaluate.MetricInfo:
            return evaluate.MetricInfo(
                description=top_k_metric.__doc__,
                citation="",
                features=datasets.Features(
                    {"predictions": datasets.List(datasets.Value("int64")), "references": datasets.Value("int64")}
                ),
            )

        def _compute(self, predictions: list[list[int]], references: list[int]) -> dict[str, float]:
            return top_k_accuracies(torch.tensor(predictions), torch.tensor(references))

    return TopKAccuracy(keep_in_memory=True)


def top_k_accuracies(top_classes: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Computes `{"top1", "top5"}` in percent of classes `(N, K)`, the likeliest first, against labels `(N,)`."""
    hits = top_classes == labels[:, None]  # (N, K)
    # In float64: the float32 nearest to 87 of 160 is below 54.375 %, and would be shown as 54.37.
    return {f"top{k}": 100 * hits[:, :k].any(1).double().mean().item() for k in (1, TOP_K)}


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Computes `{"top1", "top5"}` in percent of scores or probabilities `(N, C)` against labels `(N,)`."""
    return top_k_accuracies(likeliest_classes(scores), labels)


def likeliest_classes(probabilities: torch.Tensor) -> torch.Tensor:
    """Probabilities `(..., C)` -> the five likeliest classes, or all if there are fewer, `(..., 5)`."""
    return probabilities.topk(min(TOP_K, probabilities.shape[-1])).indices


def shown_figures(figures: dict[str, Any], num_classes: int) -> dict[str, float]:
    """The figures of `FIGURES` that an evaluation has; without top-5 where there are five classes: it is 100 then."""
    return {
        name: figures[name] for name in FIGURES if name in figures and (name != "eval_top5" or num_classes > TOP_K)
    }


def describe_figures(figures: dict[str, Any], num_classes: int) -> str:
    """Formats the figures of an evaluation: "top-1 accuracy 50.00 %"."""
    return ", ".join(f"{FIGURES[name]} {value:.2f} %" for name, value in shown_figures(figures, num_classes).items())
