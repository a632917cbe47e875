"""
Evaluates a classifier of videos or images, of this project or of Transformers, on a labelled folder or dataset.

Examples:

    vicmae evaluate labelled/eval --model_name_or_path outputs/classifier -o outputs/evaluation
    vicmae evaluate labelled/eval --model_name_or_path outputs/classifier --num_clips 5 7 --num_crops 1 3 \\
        --temporal_ablation -o outputs/evaluation

Several numbers evaluate several protocols in one pass, here 1x5 and 3x7 views (spatial x temporal).
docs/evaluation.md explains.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..data.media.reading import MediaLoader
from ..data.samples.views import ViewDataset, ViewProtocol, choose_preprocessing
from ..data.sources.labelled import match_labels, open_labelled, refuse_several_labels
from ..evaluation.arguments import InferenceArguments
from ..evaluation.classifier_loading import check_fit, load_classifier
from ..evaluation.prediction import is_multi_label, predict_views
from ..evaluation.results import check_output_dir, describe, write_evaluation
from ..evaluation.temporal_ablation import FrameOrders
from ..settings import REQUIRED, ArgumentsError, setting
from ..training.devices.hardware import set_threads
from ..training.engines import check_engine
from ..training.session.calling import Data, call, start
from ..training.session.output_folder import refuse_data_folder


@dataclass(kw_only=True)
class EvaluationArguments(InferenceArguments):
    model_name_or_path: str = setting(REQUIRED, "classifier: a folder, or a name on the Hub")
    data: str = setting(REQUIRED, "labelled folder ROOT/CLASS_NAME/FILE, list of `path label`, or dataset with labels")
    output_dir: str = setting(REQUIRED, "folder to write results, tables and pictures to")
    num_clips: list[int] = setting([1], "temporal views per video; each number is a protocol of its own", minimum=1)
    num_crops: list[int] = setting([1], "spatial views per clip; as many numbers as --num_clips", minimum=1)
    label_names: str | None = setting(None, "file of class names in the order of the model's outputs, one per line")
    temporal_ablation: bool = setting(
        False, "evaluate also with shuffled and with repeated frames, on views of the first protocol"
    )
    seed: int = setting(0, "random seed of the shuffles", minimum=0)

    def __post_init__(self):
        super().__post_init__()
        if len(self.num_clips) != len(self.num_crops):
            raise ArgumentsError(
                f"--num_clips and --num_crops: expected equally many numbers, got {self.num_clips} and "
                f"{self.num_crops}."
            )


def run(arguments: EvaluationArguments) -> dict[str, Any]:
    check_engine(arguments.mixed_precision)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    if accelerator.is_main_process:
        check_output_dir(arguments.output_dir)
        refuse_data_folder(arguments.output_dir, [arguments.data])
    classifier = load_classifier(arguments.model_name_or_path, arguments.label_names)
    if accelerator.device.type == "cpu":
        set_threads(arguments.num_threads, arguments.dataloader_num_workers, classifier.model)
    if arguments.num_frames is None:
        arguments.num_frames = classifier.num_frames
    if arguments.frames_per_second is None:
        arguments.frames_per_second = classifier.frames_per_second
    if arguments.image_range is None:
        arguments.image_range = getattr(classifier.processor, "image_range", "type")
    source = open_labelled(arguments.data, classifier.class_names, settings=arguments)
    source = match_labels(source, is_multi_label(classifier.model.config), f"the model {arguments.model_name_or_path}")
    if arguments.temporal_ablation:
        refuse_several_labels(source, "--temporal_ablation")
    dataset = ViewDataset(
        source,
        choose_preprocessing(classifier.processor),
        MediaLoader(arguments.video_backend, arguments.seconds_per_file),
        task=classifier.task,
        num_frames=arguments.num_frames,
        frames_per_second=arguments.frames_per_second or None,
        protocols=[ViewProtocol(*counts) for counts in zip(arguments.num_clips, arguments.num_crops, strict=True)],
    )
    frame_orders = FrameOrders(dataset.num_frames, arguments.seed) if arguments.temporal_ablation else None
    check_fit(classifier.model, dataset)
    predictions = predict_views(
        accelerator,
        classifier.model.to(accelerator.device),
        dataset,
        batch_size=arguments.per_device_eval_batch_size,
        num_workers=arguments.dataloader_num_workers,
        frame_orders=frame_orders,
    )
    results: dict[str, Any] = {}
    if accelerator.is_main_process:
        settings = asdict(arguments) | {"task": classifier.task, "num_processes": accelerator.num_processes}
        results = write_evaluation(arguments.output_dir, dataset, predictions, frame_orders, settings)
        print(f"{describe(results, Path(arguments.output_dir))}\nTables and pictures: {arguments.output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def main(argv: Sequence[str] | None = None) -> None:
    start(EvaluationArguments, run, argv)


def evaluate(data: Data, *, model_name_or_path: Data, output_dir: Data, **settings: Any) -> dict[str, Any]:
    """
    Evaluates a classifier of videos or images in this process, on one GPU or the CPU.

    Args:
        data: labelled folder ROOT/CLASS_NAME/FILE, list, or dataset with labels.
        model_name_or_path: classifier of this project or of Transformers.
        output_dir: folder to write results, tables and pictures to.
        settings: named like the flags of `vicmae evaluate`, without "--".

    Returns:
        The content of `all_results.json`.

    Raises:
        ArgumentsError: if a setting is unknown or wrong.
        InputError: if data, classifier or folder cannot be used.
    """
    required = {"data": data, "model_name_or_path": model_name_or_path, "output_dir": output_dir}
    return call(EvaluationArguments, run, required | settings)
