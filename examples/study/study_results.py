"""What a study found, by method, frame gap and mask ratio, and what the paper has."""

from typing import Any


TITLES = {
    "raw_pixels": "raw pixels",
    "untrained": "untrained encoder",
    "mae": "MAE",
    "mae_simsiam": "MAE + SimSiam",
    "mae_vicreg": "MAE + VICReg",
    "vicmae": "ViC-MAE",
}
POOLINGS = {"cls": "class token", "mean": "mean of patch tokens", "std": "deviation of patch tokens"}
TUNED_TITLES = {
    "vicreg_invariance_weight": "VICReg's lambda",
    "base_learning_rate": "base learning rate",
    "contrastive_weight": "contrastive weight",
}
GAPS = {"same": "same frame", "4_frames": "4 frames", "distant": "distant"}
# Linear evaluation on ImageNet-1K, top-1 and top-5 in percent: supplement, Table 4.
PAPER_METHODS = {"mae_simsiam": (58.58, 82.88), "mae_vicreg": (63.86, 84.07), "vicmae": (67.66, 86.22)}
# Finetuning on shares of ImageNet-1K, top-1 in percent: supplement, Table 5.
PAPER_FRACTIONS = {
    "mae_simsiam": {0.05: 7.15, 0.1: 23.41, 0.25: 39.73, 0.5: 54.94, 0.75: 62.88, 1.0: 67.44},
    "mae_vicreg": {0.05: 47.48, 0.1: 56.63, 0.25: 66.62, 0.5: 73.00, 0.75: 75.29, 1.0: 77.41},
    "vicmae": {0.05: 50.25, 0.1: 58.22, 0.25: 67.65, 0.5: 73.97, 0.75: 75.80, 1.0: 77.89},
}
# Linear evaluation on ImageNet-1K by the gap between the two frames, top-1 in percent: main text.
PAPER_GAPS = {"same": 63.25, "4_frames": 65.25, "distant": 67.66}


def accuracies(results: dict[str, Any], row: str, pooling: str, name: str = "top1") -> list[Any]:
    """A figure of a method, or of a reference, once a seed."""
    if row in results["references"]:
        probes = results["references"][row]
        # Pixels have no class token.
        return [probe[name] if name in probe else probe[pooling][name] for probe in probes]
    runs = [run for run in results["runs"] if run["part"] == "methods" and run["method"] == row]
    return [run["probe"][pooling][name] for run in runs]


def by_variant(results: dict[str, Any], part: str, pooling: str) -> dict[Any, list[float]]:
    """Top-1 by frame gap or mask ratio, once a seed."""
    found: dict[Any, list[float]] = {}
    for run in results["runs"]:
        if run["part"] == part:
            found.setdefault(run["variant"], []).append(run["probe"][pooling]["top1"])
    return found


def gap_accuracies(results: dict[str, Any], pooling: str) -> dict[str, list[float]]:
    """Top-1 of ViC-MAE by frame gap, the smallest first; the methods' own runs are of distant frames."""
    return {**by_variant(results, "frame_gap", pooling), "distant": accuracies(results, "vicmae", pooling)}
