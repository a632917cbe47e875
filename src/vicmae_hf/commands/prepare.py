"""
Prepares a dataset that is on disk: matches its official list with the files, opens them, and writes a table with the
official labels, and a report of what is missing, broken or repeated.

Examples:

    vicmae prepare /data/k400 --dataset kinetics400 --split val -o tables/k400_val
    vicmae pack tables/k400_val -o stores/k400_val

docs/datasets.md explains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..data.media.reading import MediaLoader, ReadingArguments
from ..data.preparing.preparation import prepare_dataset, summarize
from ..data.sources.labelled import read_class_names
from ..settings import REQUIRED, setting
from ..training.session.calling import start


@dataclass(kw_only=True)
class PreparationArguments(ReadingArguments):
    dataset: Literal[
        "kinetics400", "kinetics600", "kinetics700", "ssv2", "moments", "imagenet", "places365", "folder", "list"
    ] = setting(REQUIRED, "dataset whose layout and class order to expect")
    root: str = setting(
        REQUIRED,
        "folder of the dataset; ImageNet: also Parquet or a name on the Hub; list: what its paths are relative to",
    )
    output: str = setting(REQUIRED, "folder to write: table, report.json, classes.csv, problems.csv, list.tsv")
    split: Literal["train", "val", "test"] | None = setting(
        None, "split to prepare; not needed for a plain folder or list"
    )
    annotations: str | None = setting(None, "annotation list; default: where the layout has it")
    media: str | None = setting(None, "folder of the split's files; default: where the layout has it")
    class_names: str | None = setting(
        None, "file of class names, one per line, for an order other than the official one"
    )
    check: Literal["none", "header", "decode"] = setting(
        "header", "none: files exist; header: they also open; decode: their first and last frame can also be decoded"
    )
    num_proc: int = setting(4, "processes that check files", minimum=1, per_core=32)


def run(arguments: PreparationArguments) -> dict[str, Any]:
    report = prepare_dataset(
        arguments.dataset,
        arguments.root,
        arguments.output,
        split=arguments.split,
        annotations=arguments.annotations,
        media=arguments.media,
        class_names=None if arguments.class_names is None else read_class_names(arguments.class_names),
        check=arguments.check,
        num_proc=arguments.num_proc,
        loader=MediaLoader(arguments.video_backend, arguments.seconds_per_file),
    )
    print(f"{summarize(report)}\nTable and report: {arguments.output}")
    return report


def main(argv: Sequence[str] | None = None) -> None:
    start(PreparationArguments, run, argv)
