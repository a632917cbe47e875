"""Figures that show whether a representation collapses: how far embeddings spread, and in how many directions."""

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from ..modeling_vicmae import ViCMAEForPreTrainingOutput


class CollapseFigures:
    """
    Computes the figures of `collapse_metrics` at logged steps, on the batch of all processes: `feature_...` for the
    encoder's features and, if the objective has projections, `projection_...` for them. All processes give their
    embeddings; the main one, which writes the log, computes, and the others return nothing.
    """

    def __init__(self, accelerator: Accelerator, logging_steps: int):
        self.accelerator = accelerator
        self.logging_steps = logging_steps

    def __call__(self, step: int, is_last: bool, output: ViCMAEForPreTrainingOutput) -> dict[str, float]:
        if step % self.logging_steps and not is_last:
            return {}
        # Both, because projections may collapse while features do not: the projector is thrown away after training.
        embeddings = {"feature": output.features, "projection": output.projections}
        gathered = {
            kind: self.accelerator.gather(tensor.detach()) for kind, tensor in embeddings.items() if tensor is not None
        }
        if not self.accelerator.is_main_process:
            return {}
        return {
            f"{kind}_{name}": value
            for kind, tensor in gathered.items()
            for name, value in collapse_metrics(tensor).items()
        }


def collapse_metrics(embeddings: torch.Tensor) -> dict[str, float]:
    """
    Measures embeddings `(N, 2, D)` of the two views of N samples. Returns nothing if N is 1: there is no spread.

    Returns:
        std: standard deviation of the l2-normalised embeddings, averaged over dimensions. 1 / sqrt(D) where they fill
            the sphere evenly, 0 where they are all the same (Chen and He 2021, SimSiam, figure 2).
        rank: effective rank of all 2 N embeddings, not normalised (RankMe: Garrido et al. 2023, equation 1); between 1
            and the smaller of 2 N and D.
        alignment: mean squared distance of the two views' normalised embeddings; 0 where they agree.
        uniformity: logarithm of the mean Gaussian potential of the normalised embeddings of different samples, mean of
            both views; 0 where they are all the same, below -3 where they are spread well (alignment and
            uniformity: Wang and Isola 2020, alpha = 2, t = 2).
    """
    if len(embeddings) < 2:
        return {}
    embeddings = embeddings.float()  # singular values need it
    normalised = F.normalize(embeddings, dim=-1)  # (N, 2, D)
    values = {
        "std": normalised.flatten(0, 1).std(0, correction=0).mean(),
        "rank": effective_rank(embeddings.flatten(0, 1)),
        "alignment": (normalised[:, 0] - normalised[:, 1]).square().sum(-1).mean(),
        "uniformity": (uniformity(normalised[:, 0]) + uniformity(normalised[:, 1])) / 2,
    }
    # Stacked, because every transfer from a GPU makes the program wait for it.
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))


def effective_rank(matrix: torch.Tensor) -> torch.Tensor:
    """RankMe: exponential of the entropy of the singular values of `(N, D)`, as shares of their sum plus 1e-7."""
    # Roots of the eigenvalues of the smaller Gram matrix, in float64 because squares lose half of the digits: half
    # the time of a singular value decomposition.
    matrix = (matrix.cpu() if matrix.device.type == "mps" else matrix).double()  # Macs' GPUs have no float64
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    singular_values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    total = singular_values.sum()
    shares = singular_values / torch.where(total > 0, total, 1) + 1e-7  # all zero: no division by zero
    return (-shares * shares.log()).sum().exp()


def uniformity(points: torch.Tensor) -> torch.Tensor:
    """log mean exp(-2 |x - y|^2) over the pairs of different rows of `(N, D)`."""
    return F.pdist(points).square().mul(-2).exp().mean().log()
