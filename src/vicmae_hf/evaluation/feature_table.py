"""Features of frozen encoders, kept in a file, and what is computed from them: classes, nearest neighbours."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional as F

from ..data.loading.loader import SampleKey
from ..data.sources.labelled import LabelledSource
from ..files import writing


BLOCK_ITEMS = 4096  # whose features are in memory at a time
QUERIES_AT_A_TIME = 1024  # that are compared with a block


class EmbeddingFile:
    """
    Rows of a float32 matrix that are written one after the other, and then read as a tensor in any order. They lie in
    a file without a name among the temporary ones (TMPDIR), which ends with the process: so memory does not limit how
    many there are. Raises an InputError if there is no room.
    """

    def __init__(self):
        self.place = tempfile.gettempdir()
        with writing(self.place):
            self.file = tempfile.TemporaryFile()  # noqa: SIM115, closed in `read`
        self.shape = (0, 0)

    def append(self, rows: torch.Tensor) -> None:
        """Writes rows `(M, D)`, float32."""
        with writing(self.place):
            self.file.write(rows.contiguous().numpy())
        self.shape = (self.shape[0] + rows.shape[0], rows.shape[1])

    def read(self) -> torch.Tensor:
        """Maps all rows into memory. The kernel reads those that are touched, and may drop them again."""
        with writing(self.place), self.file:
            self.file.flush()
            return torch.from_numpy(np.memmap(self.file, np.float32, "r+", shape=self.shape))


@dataclass(frozen=True)
class Features:
    """
    Embeddings of the items that could be read, in the order of the source. A view that stands for several, as the one
    of an image stands for every frame, is there once.

    Args:
        embeddings: `(M, D)`, float32, of all views of the items, one item after the other.
        rows: `(N, V)`, which embedding is that of each view.
        indices: `(N,)`, which items of the source they are.
        failures: `{"path", "error"}` of each item that could not be read.
    """

    embeddings: torch.Tensor
    rows: torch.Tensor
    indices: torch.Tensor
    failures: list[dict[str, str]]

    def __len__(self) -> int:
        return len(self.rows)

    def blocks(self) -> Iterator[torch.Tensor]:
        """Yields embeddings of the next items, `(n, V, D)`."""
        for rows in self.rows.split(BLOCK_ITEMS):
            yield self.embeddings[rows]

    def select(self, items: torch.Tensor) -> "Features":
        """Keeps some items, named by their places or by a mask."""
        return replace(self, rows=self.rows[items], indices=self.indices[items])

    def columns(self, first: int, end: int | None) -> "Features":
        """Keeps a part of every embedding."""
        return replace(self, embeddings=self.embeddings[:, first:end])

    def chunk(self, parts: int) -> list["Features"]:
        """Divides every embedding into equal parts."""
        return [replace(self, embeddings=part) for part in self.embeddings.chunk(parts, dim=1)]


@dataclass(frozen=True)
class LabelledFeatures(torch.utils.data.Dataset):
    """
    Features with labels. As a dataset it has every view of every item as `{"features": (D,), "labels": class index}`,
    addressed by `SampleKey`s.

    Args:
        features: of the items that could be read.
        labels: theirs, `(N,)`, or targets `(N, C)`.
        class_names: of the labels.
    """

    features: Features
    labels: torch.Tensor
    class_names: list[str]

    @classmethod
    def of(cls, features: Features, source: LabelledSource) -> "LabelledFeatures":
        return cls(features, torch.as_tensor(source.labels)[features.indices], source.class_names)

    def __len__(self) -> int:
        return self.features.rows.numel()

    def __getitem__(self, key: SampleKey) -> dict[str, torch.Tensor]:
        _, _, place = key
        features, labels = self.take(torch.tensor(place))
        return {"features": features, "labels": labels}

    def take(self, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns embeddings `(B, D)` and labels `(B,)` of views, counted through all items."""
        rows = self.features.rows
        return self.features.embeddings[rows.flatten()[places]], self.labels[places // rows.shape[1]]

    def select(self, items: torch.Tensor) -> "LabelledFeatures":
        """Keeps some items, named by their places or by a mask."""
        return replace(self, features=self.features.select(items), labels=self.labels[items])

    def columns(self, first: int, end: int | None) -> "LabelledFeatures":
        """Keeps a part of every embedding."""
        return replace(self, features=self.features.columns(first, end))

    def chunk(self, parts: int) -> list["LabelledFeatures"]:
        """Divides every embedding into equal parts."""
        return [replace(self, features=part) for part in self.features.chunk(parts)]


def predict_blocks(classify: Callable[[torch.Tensor], torch.Tensor], features: Features) -> Iterator[torch.Tensor]:
    """
    Yields class probabilities of the next items `(n, C)`, averaged over their views.

    Args:
        classify: embeddings `(B, D)` -> class probabilities `(B, C)`, both on the CPU. Not logits: every view has the
            same say, however large its logits are.
    """
    for views in features.blocks():
        yield classify(views.flatten(0, 1)).unflatten(0, views.shape[:2]).mean(1)


def nearest_neighbour_scores(
    known: LabelledFeatures, queries: Features, num_neighbours: int = 20, temperature: float = 0.07
) -> torch.Tensor:
    """
    Counts votes of the nearest labelled features, weighted by exp(cosine similarity / temperature):
    `(Q, num_classes)`. The embedding of an item is the mean over its views.

    This is the classifier of Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination"
    (2018), section 3.4, with their temperature, and the 20 neighbours of DINO (Caron et al., 2021).

    Args:
        num_neighbours: all features vote where there are fewer.
    """
    asked = torch.cat([F.normalize(views.mean(1), dim=-1) for views in queries.blocks()])  # (Q, D)
    chunks = asked.split(QUERIES_AT_A_TIME)
    found = [(chunk.new_empty(len(chunk), 0), known.labels.new_empty(len(chunk), 0)) for chunk in chunks]
    # Block by block, because the similarities of all may not fit into memory at once.
    for views, labels in zip(known.features.blocks(), known.labels.split(BLOCK_ITEMS), strict=True):
        block = F.normalize(views.mean(1), dim=-1)
        found = [
            keep_nearest(*nearest, chunk @ block.T, labels, num_neighbours)
            for nearest, chunk in zip(found, chunks, strict=True)
        ]
    votes = torch.zeros(len(asked), len(known.class_names))
    similarities, neighbours = (torch.cat(parts) for parts in zip(*found, strict=True))  # (Q, num_neighbours) each
    return votes.scatter_add(1, neighbours, (similarities / temperature).exp())


def keep_nearest(
    similarities: torch.Tensor, neighbours: torch.Tensor, others: torch.Tensor, labels: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Joins the nearest features so far, their similarities and labels `(Q, K)`, with `others`, the similarities `(Q, n)`
    of more features, which have `labels` `(n,)`. Returns similarities and labels of the `count` nearest.
    """
    others, places = others.topk(min(count, others.shape[1]))
    similarities, labels = torch.cat([similarities, others], 1), torch.cat([neighbours, labels[places]], 1)
    similarities, places = similarities.topk(min(count, similarities.shape[1]))
    return similarities, labels.gather(1, places)
