"""
Embeds every video or image of a folder, list, Parquet file, dataset or frame store with a ViC-MAE encoder.

Examples:

    vicmae features my_videos --model_name_or_path outputs/mine -o features.parquet
    vicmae features my_videos --model_name_or_path outputs/mine -o features.safetensors --pooling clip

docs/evaluation.md says what the files hold.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from accelerate import Accelerator

from ..data.media.reading import MediaLoader
from ..data.sources.labelled import open_with_labels, read_class_names
from ..evaluation.arguments import InferenceArguments
from ..evaluation.features import (
    build_feature_views,
    check_feature_file,
    extract_embeddings,
    load_encoder,
    warn_if_blind_to_order,
    write_features,
)
from ..files import check_writable
from ..settings import REQUIRED, setting
from ..training.engines import check_engine
from .calling import Data, call, start


@dataclass(kw_only=True)
class ExportArguments(InferenceArguments):
    model_name_or_path: str = setting(REQUIRED, "any ViC-MAE checkpoint; its encoder is used")
    data: str = setting(REQUIRED, "folder, list, Parquet file, dataset or frame store, with or without labels")
    labelled: bool = setting(False, "all items need labels, and folders ROOT/CLASS_NAME/FILE are classes")
    label_names: str | None = setting(None, "file of the class names in index order, one a line; default: the data's")
    output: str = setting(REQUIRED, "FILE.parquet or FILE.safetensors")
    pooling: Literal["frame", "clip"] = setting(
        "frame", "mean of the embeddings of single frames, or the embedding of one clip"
    )
    num_frames: int | None = setting(None, "frames of a video; default: 8 for frame, the model's for clip", minimum=1)
    per_device_eval_batch_size: int = setting(32, "frames or clips in a forward pass", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        check_feature_file(self.output)


def run(arguments: ExportArguments) -> dict[str, Any]:
    check_engine(arguments.mixed_precision)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    if accelerator.is_main_process:
        check_writable(arguments.output)
    is_clip = arguments.pooling == "clip"
    model, processor = load_encoder(arguments.model_name_or_path, arguments.pooling)
    if arguments.num_frames is None:
        arguments.num_frames = model.config.num_frames if is_clip else 8
    if is_clip:
        warn_if_blind_to_order(model, arguments.num_frames)
    if arguments.frames_per_second is None and is_clip:
        arguments.frames_per_second = processor.fps
    if arguments.image_range is None:
        arguments.image_range = processor.image_range
    names = None if arguments.label_names is None else read_class_names(arguments.label_names)
    owner = f"--label_names {arguments.label_names}"
    source = open_with_labels(arguments.data, arguments.labelled, names, owner, arguments)
    dataset = build_feature_views(
        source,
        processor,
        MediaLoader(arguments.video_backend, arguments.seconds_per_file),
        pooling=arguments.pooling,
        num_frames=arguments.num_frames,
        frames_per_second=arguments.frames_per_second or None,
    )
    features = extract_embeddings(
        accelerator,
        model.to(accelerator.device),
        dataset,
        batch_size=arguments.per_device_eval_batch_size,
        num_workers=arguments.dataloader_num_workers,
    )
    if accelerator.is_main_process:
        write_features(arguments.output, source, features, asdict(arguments))
        print(
            f"{len(features.indices)} embeddings of {features.embeddings.shape[1]} numbers in {arguments.output}, "
            f"{len(features.failures)} unreadable files."
        )
    accelerator.wait_for_everyone()
    accelerator.end_training()
    files = [source[index].name for index in features.indices.tolist()]
    return {"files": files, "embeddings": features.embeddings, "failures": features.failures}


def main(argv: Sequence[str] | None = None) -> None:
    start(ExportArguments, run, argv)


def extract_features(data: Data, *, model_name_or_path: Data, output: Data, **settings: Any) -> dict[str, Any]:
    """
    Embeds every video or image of a source in this process, on one GPU or the CPU.

    Args:
        data: folder, list, Parquet file, dataset or frame store, with or without labels.
        model_name_or_path: any ViC-MAE, MAE or ViTMAE checkpoint; its encoder is used.
        output: FILE.parquet or FILE.safetensors.
        settings: as the flags of `vicmae features`, without "--".

    Returns:
        What the file holds: `files`, names of the N files that could be read; `embeddings`, float32 `(N, D)`; and
        `failures`, `{"path", "error"}` of each of the others.

    Raises:
        ArgumentsError: if a setting is unknown or wrong.
        InputError: if data, checkpoint or file cannot be used.
    """
    required = {"data": data, "model_name_or_path": model_name_or_path, "output": output}
    return call(ExportArguments, run, required | settings)
