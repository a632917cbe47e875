"""
Embeds every video or image of a folder, list, Parquet file, dataset or frame store with a ViC-MAE encoder, or every
second of long recordings. If it was interrupted, run it again: it continues.

Examples:

    vicmae features my_videos --model_name_or_path outputs/mine -o features.parquet
    vicmae features my_recordings --model_name_or_path outputs/mine -o features.csv --every_seconds 1

docs/evaluation.md says what the files hold.
"""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator

from ..data.media.reading import MediaLoader
from ..data.samples.views import ViewDataset
from ..data.sources.labelled import open_with_labels, read_class_names
from ..data.sources.segments import SteppedSource
from ..data.sources.selection import refuse_dataset_in_data
from ..evaluation.arguments import InferenceArguments
from ..evaluation.feature_files import (
    bad_files_of,
    check_feature_file,
    check_table,
    embed_in_parts,
    identify,
    remove_parts,
    write_features,
)
from ..evaluation.features import (
    build_embed,
    build_feature_views,
    build_step_views,
    load_encoder,
    warn_if_blind_to_order,
)
from ..files import check_writable
from ..modeling_vicmae import ViCMAEModel
from ..settings import REQUIRED, ArgumentsError, setting
from ..training.devices.hardware import set_threads
from ..training.engines import check_engine
from ..training.reporting import say_unreadable
from ..training.session.calling import Data, call, start


@dataclass(kw_only=True)
class FeaturesArguments(InferenceArguments):
    model_name_or_path: str = setting(REQUIRED, "any ViC-MAE checkpoint; its encoder is used")
    data: str = setting(REQUIRED, "folder, list, Parquet file, dataset or frame store, with or without labels")
    labelled: bool = setting(False, "require a label for every item; folders ROOT/CLASS_NAME/FILE are classes")
    label_names: str | None = setting(None, "file of class names in index order, one per line; default: the data's")
    output: str = setting(REQUIRED, "FILE.parquet, FILE.csv or FILE.safetensors")
    every_seconds: float | None = setting(
        None,
        "one row for every X seconds of a video, with start and end; default: one row per file",
        minimum=0.001,
    )
    pooling: Literal["frame", "clip", "patch"] = setting(
        "frame",
        "frame: mean of the embeddings of single frames; clip: embedding of one clip; patch: embedding of each patch, "
        "mean over single frames",
    )
    layer: int | None = setting(
        None, "take tokens after this many layers, without the final norm; default: the encoder's output", minimum=0
    )
    num_frames: int | None = setting(
        None,
        "frames that make a row; default: 8, or 1 with --every_seconds; with --pooling clip the model's number",
        minimum=1,
    )
    per_device_eval_batch_size: int = setting(32, "frames or clips in a forward pass", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        check_feature_file(self.output)
        for name in ("data", "label_names"):
            path = getattr(self, name)
            if path is not None and os.path.realpath(path) == os.path.realpath(self.output):
                raise ArgumentsError(
                    f"--output {self.output} is --{name}, which it would replace. Choose another name."
                )
        if self.every_seconds is not None:
            for name in ("segment_seconds", "nominal_frames_per_second", "frames_per_second"):
                if getattr(self, name) is not None:
                    raise ArgumentsError(
                        f"--every_seconds {self.every_seconds:g}: cannot be combined with --{name}; leave one out."
                    )


# Settings on which embeddings depend; `identify` adds the items and the encoder.
IDENTITY = (
    *("every_seconds", "pooling", "layer", "num_frames", "image_range", "mixed_precision", "video_backend"),
    *("frames_per_second", "source_frames_per_second", "nominal_frames_per_second"),
)


def run(arguments: FeaturesArguments) -> dict[str, Any]:
    check_engine(arguments.mixed_precision)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    arguments.mixed_precision = accelerator.mixed_precision  # the launcher may have set it
    output = Path(arguments.output)
    if output.suffix == ".parquet":
        refuse_dataset_in_data(output, arguments.data)
    if accelerator.is_main_process:
        check_writable(output)
    model, processor = load_encoder(arguments.model_name_or_path, arguments.pooling)
    if accelerator.device.type == "cpu":
        set_threads(arguments.num_threads, arguments.dataloader_num_workers, model)
    model = model.to(accelerator.device)
    embed = build_embed(accelerator, model, arguments.pooling, arguments.layer)
    fill_in(arguments, model, processor)
    dataset = open_views(arguments, processor)
    folder = output.with_name(f"{output.name}.parts")
    identity = identify(model, processor, dataset.source, {name: getattr(arguments, name) for name in IDENTITY})
    features = embed_in_parts(
        accelerator,
        model,
        embed,
        dataset,
        folder,
        identity,
        batch_size=arguments.per_device_eval_batch_size,
        num_workers=arguments.dataloader_num_workers,
    )
    results = {"failures": features.failures}
    if accelerator.is_main_process:
        source, times = dataset.source, None
        if isinstance(source, SteppedSource):
            times = source.step_times(features.indices.numpy())
            features, source = (
                replace(features, indices=torch.from_numpy(source.places)[features.indices]),
                source.source,
            )
            results |= {"starts": times[:, 0], "ends": times[:, 1]}
        write_features(output, source, features, asdict(arguments), times)
        remove_parts(folder)
        files = [source[index].name for index in features.indices.tolist()]
        results |= {"files": files, "embeddings": features.embeddings}
        print(
            f"{len(files)} embeddings of {' x '.join(map(str, features.embeddings.shape[1:]))} numbers in {output}, "
            f"{say_unreadable(len(features.failures), bad_files_of(output))}."
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def fill_in(arguments: FeaturesArguments, model: ViCMAEModel, processor: Any) -> None:
    """
    Fills in the settings whose defaults are the model's, so that the output names what they were. Raises an
    ArgumentsError if the model takes no clips of so many frames.
    """
    is_clip = arguments.pooling == "clip"
    if arguments.num_frames is None:
        of_frames = 8 if arguments.every_seconds is None else 1
        arguments.num_frames = model.config.num_frames if is_clip else of_frames
    if is_clip:
        tubelet_size = model.config.tubelet_size
        if arguments.num_frames % tubelet_size:
            raise ArgumentsError(
                f"--num_frames {arguments.num_frames}: expected a multiple of {tubelet_size} for --pooling clip, "
                "because the encoder embeds that many frames together."
            )
        warn_if_blind_to_order(model, arguments.num_frames)
    if arguments.frames_per_second is None and is_clip and arguments.every_seconds is None:
        arguments.frames_per_second = processor.fps
    if arguments.image_range is None:
        arguments.image_range = processor.image_range


def open_views(arguments: FeaturesArguments, processor: Any) -> ViewDataset:
    """Opens the data, and makes the views of each file or of each step."""
    names = None if arguments.label_names is None else read_class_names(arguments.label_names)
    owner = f"--label_names {arguments.label_names}"
    source = open_with_labels(arguments.data, arguments.labelled, names, owner, arguments)
    check_table(arguments.output, arguments.pooling, source.labels)
    loader = MediaLoader(arguments.video_backend, arguments.seconds_per_file)
    views = {"pooling": arguments.pooling, "num_frames": arguments.num_frames}
    if arguments.every_seconds is not None:
        return build_step_views(source, processor, loader, seconds=arguments.every_seconds, **views)
    rate = arguments.frames_per_second or None
    return build_feature_views(source, processor, loader, frames_per_second=rate, **views)


def main(argv: Sequence[str] | None = None) -> None:
    start(FeaturesArguments, run, argv)


def extract_features(data: Data, *, model_name_or_path: Data, output: Data, **settings: Any) -> dict[str, Any]:
    """
    Embeds every video or image of a source, or each step of time, in this process, on one GPU or the CPU.

    Args:
        data: folder, list, Parquet file, dataset or frame store, with or without labels.
        model_name_or_path: any ViC-MAE, MAE or ViTMAE checkpoint; its encoder is used.
        output: FILE.parquet, FILE.csv or FILE.safetensors.
        settings: named like the flags of `vicmae features`, without "--".

    Returns:
        What the file holds: `files`, the names of the N files that could be read, or of N steps (`every_seconds`);
        `embeddings`, float32 `(N, D)`, of patches `(N, h, w, D)`; with `every_seconds` `starts` and `ends` `(N,)`,
        seconds; and `failures`, `{"path", "error"}` of each file that could not be read.

    Raises:
        ArgumentsError: if a setting is unknown or wrong.
        InputError: if data, checkpoint or file cannot be used.
    """
    required = {"data": data, "model_name_or_path": model_name_or_path, "output": output}
    return call(FeaturesArguments, run, required | settings)
