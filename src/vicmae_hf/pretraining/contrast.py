"""
The contrastive loss over all batches of an update, while the activations of one batch are in memory.

The loss depends on a batch only through its pooled features (B, 2, D). A first pass collects those of all batches and
drops everything else. Projector and objective run once on all of them, and leave the gradient of each feature. In the
second pass each batch is encoded again with the same random numbers, and its features take the gradients that are
known. This is GradCache (Gao et al. 2021), cut before the projector and not behind it, so that its batch norm sees all
batches.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice

import torch
from accelerate import Accelerator

from ..training.loop import ComputeLosses, seed_batch
from ..training.optimization import Schedule
from .objective import Objective


Batch = dict[str, torch.Tensor]
# As the method `contrast` of the model: pooled features of a batch -> projections, loss.
Contrast = Callable[[torch.Tensor], tuple[torch.Tensor | None, torch.Tensor]]


def look_ahead(
    accelerator: Accelerator, objective: Objective, batches: Iterable[Batch], schedule: Schedule, seed: int
) -> tuple[ComputeLosses, Iterable[Batch]]:
    """Returns what `Updates` takes in place of `objective` and `batches` to compare all pairs of an update."""
    if schedule.gradient_accumulation_steps == 1:
        return objective, batches
    contrast = ContrastAcrossAccumulation(accelerator, objective, schedule, seed)
    return contrast, contrast.take_updates(batches)


class GivenGradients(torch.autograd.Function):
    """`apply(loss, gradients, *tensors)` is `loss`, with these gradients of the tensors."""

    @staticmethod
    def forward(ctx, loss: torch.Tensor, gradients: list[torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(factor * gradient for gradient in ctx.gradients)


class ContrastAcrossAccumulation:
    """
    Losses of a batch whose contrastive part is that of all batches of its update. The mean of the batches' losses has
    the value and the gradients of one large batch.

    Args:
        accelerator, objective, schedule: of the run.
        seed: of the run, by which the training loop seeds every batch.
    """

    def __init__(self, accelerator: Accelerator, objective: Objective, schedule: Schedule, seed: int):
        self.accelerator = accelerator
        self.objective = objective
        self.model = objective.model
        self.seed = seed
        self.num_batches = schedule.gradient_accumulation_steps  # of an update, in this process
        self.micro_step = schedule.start_step * self.num_batches
        self.update: list[Batch] = []
        self.contrasts: list[Contrast] = []  # of its batches
        # Accelerate makes an update at the end of the data, which here comes before the last update has begun.
        accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False

    def take_updates(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yields the batches, after it has taken all of an update. Pixels are bytes: 64 pairs of 224 pixels 19 MB."""
        batches = iter(batches)
        while update := list(islice(batches, self.num_batches)):
            self.update = update
            yield from update

    def __call__(self, batch: Batch, epoch: float) -> dict[str, torch.Tensor]:
        index = self.micro_step % self.num_batches
        if index == 0:
            self.contrasts = self.begin_update(epoch)
            self.seed_batch(0)
        losses = self.objective(batch | {"contrast": self.contrasts[index]}, epoch)
        self.micro_step += 1
        return losses

    def seed_batch(self, index: int) -> None:
        """Seeds a batch of the update as the training loop does."""
        seed_batch(self.seed, self.micro_step + index, self.accelerator.process_index)

    def begin_update(self, epoch: float) -> list[Contrast]:
        """Returns each batch's contrast."""
        is_contrastive = epoch >= self.objective.contrastive_start_epoch
        self.objective.set_contrastive(is_contrastive)
        if not is_contrastive or self.model.config.contrastive_weight == 0:
            return [partial(self.collect, [])] * self.num_batches  # one list, for all of them
        pooled = [self.encode(index, batch) for index, batch in enumerate(self.update)]
        projections, loss, gradients = self.differentiate(torch.cat(pooled))
        sizes = [len(features) for features in pooled]
        parts = zip(projections.split(sizes), gradients[0].split(sizes), strict=True)
        # A batch's loss counts 1 / num_batches, so what the batch alone contributes must count num_batches times. The
        # other gradients, the projector's, come with every batch.
        return [
            partial(self.contribute, own_projections, loss, [self.num_batches * of_features, *gradients[1:]])
            for own_projections, of_features in parts
        ]

    def encode(self, index: int, batch: Batch) -> torch.Tensor:
        """Returns pooled features `(B, 2, D)` of a batch, as they will be in the second pass."""
        self.seed_batch(index)
        pixel_values = self.objective.normalize(batch["pixel_values"])
        # By the model itself: DistributedDataParallel expects a backward pass after its forward pass. With a graph,
        # which is gone with this call: without one, compiled layers would be other programs and draw other numbers.
        with self.accelerator.autocast():
            hidden_states, _, _ = self.model.encode_views(pixel_values, batch["noise"])
            return self.model.pool_views(hidden_states).detach()

    def differentiate(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """
        Features `(N, 2, D)` of each process -> projections `(N, 2, P)`, the loss over all processes, and its gradients
        (first that of the features, then those of the model's `contrastive_parameters`).
        """
        features.requires_grad_()
        with self.accelerator.autocast():
            projections, loss = self.model.contrast(features)
        # As large as they are in a whole backward pass. In fp16 small gradients would become 0 on their way.
        scale = torch.ones_like(loss) * self.model.contrastive_weight
        if self.accelerator.scaler is not None:
            scale = self.accelerator.scaler.scale(scale)
        tensors = [features, *self.model.contrastive_parameters()]
        # A learnable temperature has no gradient where the objective has no temperature.
        gradients = torch.autograd.grad(scale * loss, tensors, materialize_grads=True)
        return projections.detach(), loss.detach(), [gradient / scale for gradient in gradients]

    def contribute(
        self, projections: torch.Tensor, loss: torch.Tensor, gradients: list[torch.Tensor], pooled: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Contrast of one batch: the loss of all, with the known gradients of `pooled` `(B, 2, D)`."""
        return projections, GivenGradients.apply(loss, gradients, pooled, *self.model.contrastive_parameters())

    def collect(self, collected: list[torch.Tensor], pooled: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Contrast of one batch while its weight is 0: no gradient is needed. The last batch has the loss of all."""
        collected.append(pooled.detach())
        if len(collected) < self.num_batches:
            return None, pooled.new_zeros(())
        projections, loss = self.model.contrast(torch.cat(collected))
        return projections[-len(pooled) :], self.num_batches * loss  # an update's loss is the mean of its batches'
