"""Files of features: parts while they are computed, so that a stopped run can continue, and the whole at the end."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..data.samples.views import ViewDataset
from ..data.sources.label_lists import name_labels
from ..data.sources.labelled import number_classes
from ..data.sources.segments import SegmentedSource
from ..data.sources.sources import MediaSource
from ..errors import InputError
from ..files import partial_file, partial_path, read_json, write_json, writing
from ..modeling_vicmae import ViCMAEModel
from ..training.resuming import fingerprint, flatten
from ..training.session.output_folder import lock_output_dir, release_output_dir
from .collecting import collect_rounds, split_items
from .feature_table import EmbeddingFile, Features
from .prediction import check_embeddings, evaluating, write_failures


class FeatureParts:
    """
    Embeddings of the items that a run has computed so far, in a folder beside its output.

    Args:
        folder: of the parts; it is made with the first. What an interrupted run left there is taken up.
        identity: what the embeddings depend on, as JSON.

    Raises:
        InputError: if the folder holds what a run of another identity left, or a damaged part, or if another run is
            writing there.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder = folder
        self.identity = identity
        self.places: dict[int, tuple[Path, int, int]] = {}  # item -> its part, its first row there, how many rows
        if folder.exists():
            self.read_parts()

    def read_parts(self) -> None:
        """Makes the folder, lets no other run write there, and takes up the parts that are there."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        lock_output_dir(self.folder, "--output:")
        if not self.folder.exists():
            raise InputError(f"{self.folder}: another run has finished and removed it meanwhile. Start again.")
        # Not `.partial-...`: a killed run leaves its unfinished one.
        parts = sorted(self.folder.glob("[0-9]*.safetensors"))
        if parts:
            found = read_json(self.folder / "identity.json")
            other = [name for name in {**self.identity, **found} if found.get(name) != self.identity.get(name)]
            if other:
                raise InputError(
                    f"{self.folder}: holds what an interrupted run computed with other settings ({', '.join(other)}). "
                    "Run it again with the same settings to finish it, or delete the folder."
                )
        for part in parts:
            try:
                with safe_open(part, "pt") as file:
                    self.note(part, file.get_tensor("items").tolist(), file.get_tensor("counts").tolist())
            except SafetensorError as error:
                raise InputError(f"{part}: is damaged ({error}). Delete the folder, and start again.") from error

    def note(self, part: Path, items: list[int], counts: list[int]) -> None:
        firsts = np.cumsum([0, *counts])
        for item, first, count in zip(items, firsts, counts, strict=False):
            self.places[item] = (part, int(first), count)

    def add(self, items: list[int], embeddings: list[torch.Tensor]) -> None:
        """Keeps embeddings `(S, ...)` of each of some items, as a part that is whole or absent."""
        if not self.places:
            self.read_parts()  # not before, so that a run that can read nothing leaves no folder
            if self.places:  # which items are left was found out before
                raise InputError(f"{self.folder}: another run has begun there meanwhile. Start again.")
            write_json(self.folder / "identity.json", self.identity)
        part = self.folder / f"{len(self.places):012d}.safetensors"
        counts = [len(rows) for rows in embeddings]
        tensors = {"embeddings": torch.cat(embeddings), "items": torch.tensor(items), "counts": torch.tensor(counts)}
        with partial_file(part) as partial:
            save_file(tensors, partial)
        self.note(part, items, counts)

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Joins the parts in the order of the items: embeddings `(R, ...)`, and the item `(R,)` of each row."""
        rows, items, opened = EmbeddingFile(), [], (None, None)
        for item in sorted(self.places):
            part, first, count = self.places[item]
            if opened[0] != part:
                with safe_open(part, "pt") as file:
                    opened = part, file.get_tensor("embeddings")
            embeddings = opened[1][first : first + count]
            rows.append(embeddings.flatten(1))
            items += [item] * count
        return rows.read().unflatten(1, embeddings.shape[1:]), torch.tensor(items)


def remove_parts(folder: Path) -> None:
    """Removes the folder of parts, at once for another run that waits for it."""
    release_output_dir()
    removed = partial_path(folder)
    folder.rename(removed)
    shutil.rmtree(removed)


# In configs of models and processors: where they were found, and what wrote them.
ORIGIN = {"_name_or_path", "auto_map", "architectures", "dtype", "transformers_version"}


def identify(
    model: ViCMAEModel, processor: Any, source: MediaSource | SegmentedSource, settings: dict[str, Any]
) -> dict[str, Any]:
    """
    What embeddings depend on, as JSON: settings, the names of the items, and the encoder, whatever folder it lies in:
    its weights, its config and its processor.
    """
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    configs = {"model": model.config.to_json_string(use_diff=False), "processor": processor.to_json_string()}
    for kind, text in configs.items():
        values = {name: value for name, value in json.loads(text).items() if name not in ORIGIN}
        settings = settings | flatten(values, f"{kind}.")
    return settings | {"items": fingerprint(source.list_names()), "weights": digest.hexdigest()}


def embed_in_parts(
    accelerator: Accelerator,
    model: ViCMAEModel,
    embed: Callable[[torch.Tensor], torch.Tensor],
    dataset: ViewDataset,
    folder: Path,
    identity: dict[str, Any],
    *,
    batch_size: int,
    num_workers: int,
) -> Features:
    """
    Embeds every item once, and each row of its `weights`: the average of its views, or that of each of its steps. What
    is computed is kept in `folder` by the first process, from where an interrupted run goes on. Files that could not
    be read are tried again.

    Args:
        embed: views `(V, ...)` -> embeddings `(V, ...)`.
        identity: see `FeatureParts`.
        batch_size: views that are embedded together.

    Returns:
        In the first process, features of one view; an item of S steps is there S times. In the others no embeddings.

    Raises:
        InputError: if no item can be read, an embedding is not finite, the parts are another run's, or there is no
            room for them.
    """

    def compute(batch: dict[str, Any]) -> dict[str, list[torch.Tensor]]:
        values = torch.cat([embed(part) for part in batch["pixel_values"].split(batch_size)])  # (V1 + V2 + ..., ...)
        check_embeddings(values, dataset.source.name)
        averages = []
        for part, rows in zip(split_items(values, batch["weights"]), batch["weights"], strict=True):
            averages.append((rows.to(part) @ part.flatten(1)).unflatten(1, part.shape[1:]).cpu())  # (S, ...)
        return {"embeddings": averages}

    parts = open_parts(accelerator, folder, identity)
    (done,) = broadcast_object_list([None if parts is None else list(parts.places)])
    left = np.setdiff1d(np.arange(len(dataset)), done)
    dataset, failures = select_items(dataset, left), []
    if len(left):
        loading = {"batch_size": batch_size, "num_workers": num_workers, "num_read": len(done)}
        loading["what"] = "extracting features"
        with evaluating(model):
            for found in collect_rounds(accelerator, dataset, compute, **loading):
                failures += found.failures
                if parts is not None and len(found.indices):
                    parts.add(left[found.indices.numpy()].tolist(), list(found.outputs["embeddings"]))
    if parts is None:
        return Features(torch.zeros(0, 0), torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0), failures)
    embeddings, items = parts.read()
    return Features(embeddings, torch.arange(len(items))[:, None], items, failures)


def open_parts(accelerator: Accelerator, folder: Path, identity: dict[str, Any]) -> FeatureParts | None:
    """Opens the parts in the first process; None in the others. Raises its InputError in all of them."""
    parts = error = None
    if accelerator.is_main_process:
        try:
            parts = FeatureParts(folder, identity)
        except InputError as caught:
            error = str(caught)
    (error,) = broadcast_object_list([error])
    if error is not None:
        raise InputError(error)
    return parts


def select_items(dataset: ViewDataset, indices: np.ndarray) -> ViewDataset:
    """Keeps some of the items."""
    if len(indices) == len(dataset):
        return dataset
    source, dataset = dataset.source, copy.copy(dataset)
    if not isinstance(source, SegmentedSource):
        source = SegmentedSource(source, np.arange(len(source)), [None] * len(source))
    dataset.source = source.select(indices)
    return dataset


def matrix_column(matrix: torch.Tensor) -> pa.FixedSizeListArray:
    """Makes a column of N lists of a matrix `(N, D)`."""
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.flatten().numpy()), matrix.shape[1])


def write_features(
    path: str | os.PathLike,
    source: MediaSource,
    features: Features,
    settings: dict[str, Any],
    times: torch.Tensor | None = None,
) -> None:
    """
    Writes embeddings with the names of their files, and their class names if the source has labels.

    A Parquet file has the columns `file`, with `times` also `start` and `end`, `embedding` (list of D float32; of
    patches h * w * D, row by row) and `class` (a list of names where items may have several), and the settings and the
    shape of an embedding as JSON in the metadata of its schema, keys `settings` and `shape`. A CSV file has the same
    columns, but `embedding_0`, `embedding_1`, ... A safetensors file has the tensors `embeddings` `(N, D)` or
    `(N, h, w, D)`, `starts` and `ends` `(N,)`, and `labels`, `(N,)` or targets `(N, C)`, and in its metadata, as JSON,
    `files`, `class_names` and `settings`. Unreadable items go to `PATH.bad_files.jsonl`.

    Args:
        times: `(N, 2)`, float64, seconds at which each row begins and ends in its recording; NaN for an image.

    Raises:
        InputError: if `path` ends otherwise, cannot be written, or cannot hold this. A file of that name is whole, or
            as it was.
    """
    path = check_feature_file(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    indices = features.indices.tolist()
    files = [source[index].name for index in indices]
    labels = None if source.labels is None else torch.as_tensor(source.labels)[features.indices]
    class_names = source.class_names
    if class_names is None and labels is not None:
        class_names = number_classes(source.labels)
    columns = {"file": files}
    if times is not None:
        columns |= {"start": time_column(times[:, 0]), "end": time_column(times[:, 1])}
    if path.suffix == ".safetensors":
        tensors = {"embeddings": features.embeddings.contiguous()}
        if times is not None:
            tensors |= {"starts": times[:, 0].contiguous(), "ends": times[:, 1].contiguous()}
        metadata = {"files": files, "settings": settings}  # safetensors holds tensors and texts, hence JSON below
        if labels is not None:
            tensors["labels"], metadata["class_names"] = labels.contiguous(), class_names
        with partial_file(path) as partial:
            save_file(tensors, partial, metadata={name: json.dumps(value) for name, value in metadata.items()})
    else:
        # Names and not indices: such a file is read without this package.
        classes = {} if labels is None else {"class": name_labels(labels.numpy(), class_names)}
        write_table(path, columns, features.embeddings, classes, settings)
    write_failures(bad_files_of(path), features.failures)


def bad_files_of(path: Path) -> Path:
    """Where the items that are missing in a feature file are listed."""
    return path.with_name(f"{path.name}.bad_files.jsonl")


def time_column(times: torch.Tensor) -> pa.Array:
    """Makes a column of times; NaN becomes null."""
    return pa.array(times.numpy(), from_pandas=True)


def write_table(
    path: Path, columns: dict[str, Any], embeddings: torch.Tensor, classes: dict[str, Any], settings: dict[str, Any]
) -> None:
    """Writes columns, embeddings `(N, ...)`, and classes behind them, as Parquet or CSV (see `write_features`)."""
    matrix = embeddings.flatten(1)
    if path.suffix == ".csv":
        features = {f"embedding_{place}": column.numpy() for place, column in enumerate(matrix.T)}
        with partial_file(path) as partial:
            pyarrow.csv.write_csv(pa.table(columns | classes | features), partial)
        return
    table = pa.table(columns | {"embedding": matrix_column(matrix)} | classes)
    shape = list(embeddings.shape[1:])
    table = table.replace_schema_metadata({"settings": json.dumps(settings), "shape": json.dumps(shape)})
    with partial_file(path) as partial:
        pyarrow.parquet.write_table(table, partial)


def check_table(path: str | os.PathLike, pooling: str, labels: np.ndarray | None) -> None:
    """Raises an InputError if a CSV file could not hold what is to be written."""
    if Path(path).suffix == ".csv" and (pooling == "patch" or (labels is not None and labels.ndim == 2)):
        raise InputError(f"{path}: expected a .parquet or .safetensors file for patches and for several labels.")


def check_feature_file(path: str | os.PathLike) -> Path:
    """Raises an InputError if a file of features would be of no known format, or a folder has its name."""
    # A function of its own: scripts call it before they compute for hours.
    path = Path(path)
    if path.suffix not in (".parquet", ".csv", ".safetensors"):
        raise InputError(f"{path}: expected a name that ends in .parquet, .csv or .safetensors.")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected the name of a file.")
    return path
