"""ImageNet-1K, as folders of synsets or as a table."""

import os
import re
from pathlib import Path

import datasets
import pyarrow.compute as pc

from ...errors import InputError
from ..sources.sources import IMAGE_EXTENSIONS, DataSourceError
from ..sources.tables import as_source_error, load_hub_dataset
from .listing import SPLIT_NAMES, Listing, Request, find_media, list_class_folders, read_official_class_names, stem


def list_imagenet(request: Request) -> Listing:
    """
    Lists ImageNet-1K as folders `{train,val}/n01440764/*.JPEG`, named by synset. The sorted ids are the class order.
    The list of ids ships with this package, so a missing folder shifts nothing. An image's name is its file name
    without extension (`n01440764_10026`, `ILSVRC2012_val_00000293`).
    """
    media = find_media(
        request, [f"{folder}{name}" for folder in ["", "ILSVRC/Data/CLS-LOC/"] for name in SPLIT_NAMES[request.split]]
    )
    class_names = list(request.class_names or read_official_class_names("imagenet"))
    return list_class_folders(media, class_names, IMAGE_EXTENSIONS, stem)


def is_imagenet_table(request: Request) -> bool:
    """Whether ImageNet is a Parquet file, a folder of them or a name on the Hub, rather than folders of classes."""
    root = Path(request.root)
    return not root.is_dir() or any(root.glob("*.parquet")) or any(root.glob("*/*.parquet"))


def open_imagenet_table(request: Request) -> datasets.Dataset:
    """
    Opens ImageNet-1K as a Parquet file, a folder of them with splits in their names, or a dataset on the Hub.

    Returns:
        Columns `image` (not decoded), `label` (ClassLabel, as it is there), `name` (the file name without extension,
        and without the synset at the end of the Hub's names; the row's number if names repeat).

    Raises:
        InputError: if it cannot be opened, or lacks an image column or a ClassLabel column of 1,000 classes.
    """
    split = {"train": "train", "val": "validation", "test": "test"}[request.split]
    if request.class_names is not None:
        raise InputError(f"{request.root}: a dataset has its own class order; leave out --class_names.")
    if not os.path.exists(request.root):
        table = load_hub_dataset(request.root, split)
    else:
        with as_source_error(request.root, f"the split {split!r} could not be opened as a dataset"):
            if os.path.isfile(request.root):
                table = datasets.Dataset.from_parquet(request.root)
            else:
                table = datasets.load_dataset(request.root, split=split)
    columns = {
        kind: next((name for name, feature in table.features.items() if isinstance(feature, kind)), None)
        for kind in [datasets.Image, datasets.ClassLabel]
    }
    if None in columns.values():
        raise DataSourceError(
            f"{request.root}: expected a column of type Image and one of type ClassLabel, got {table.features}."
        )
    table = table.select_columns(list(columns.values())).rename_columns(
        {columns[datasets.Image]: "image", columns[datasets.ClassLabel]: "label"}
    )
    num_classes = table.features["label"].num_classes
    official = read_official_class_names("imagenet")
    names = table.features["label"].names
    # The Hub's names are words ("tench, Tinca tinca"), whose order cannot be checked; synsets can.
    if num_classes != len(official) or (set(names) == set(official) and names != official):
        raise InputError(
            f"{request.root}: expected the 1,000 classes of ImageNet-1K in their order, got {num_classes}."
        )
    table = table.cast_column("image", datasets.Image(decode=False))
    # Only the paths are read; the images stay on disk.
    batches = table.with_format("arrow").select_columns("image").iter(1000)
    paths = [path for batch in batches for path in pc.struct_field(batch["image"], "path").to_pylist()]
    # Without the Hub's synset a name is that of the folders, and two laboratories can compare lists.
    names = [re.sub(r"_n\d{8}$", "", stem(path or "")) for path in paths]
    if len(set(names)) < len(names):
        names = [f"{row:09d}" for row in range(len(names))]
    return table.add_column("name", names)
