"""
Linear probe of a frozen encoder on labelled folders (ROOT/CLASS_NAME/FILE), beside the same probe of an encoder with
random weights; with --attentive also a probe with attention over all patch tokens.

Examples:

    vicmae probe labelled/train --eval_data labelled/eval --model_name_or_path outputs/mine -o outputs/mine/probe
    vicmae probe labels.csv --eval_data held_out.csv --model_name_or_path outputs/mine -o outputs/probe --attentive

docs/evaluation.md says what each probe measures.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from accelerate import Accelerator, InitProcessGroupKwargs

from ..data.media.reading import MediaLoader
from ..data.sources.labelled import HeldOutSettings, open_labelled, read_class_names, refuse_several_labels
from ..evaluation.features import build_feature_views, load_encoder
from ..evaluation.prediction import write_failures
from ..evaluation.probes import probe_beside_untrained
from ..evaluation.results import check_output_dir
from ..files import write_json
from ..settings import REQUIRED, setting
from ..training.arguments import ProcessArguments
from ..training.devices.hardware import set_threads
from ..training.engines import check_engine
from ..training.reporting import RESULTS_FILE, say_unreadable
from ..training.session.calling import Data, call, start
from ..training.session.output_folder import refuse_data_folder


@dataclass(kw_only=True)
class ProbeArguments(ProcessArguments, HeldOutSettings):
    model_name_or_path: str = setting(REQUIRED, "checkpoint whose encoder is probed")
    train_data: str = setting(REQUIRED, "labelled folder or list to train the classifier on")
    eval_data: str = setting(REQUIRED, "labelled folder or list of held-out files")
    output_dir: str = setting(REQUIRED, "folder to write all_results.json and arguments.json to")
    label_names: str | None = setting(None, "file of class names in index order, one per line; default: the data's")
    num_frames: int = setting(8, "frames per video", minimum=1)
    attentive: bool = setting(
        False,
        "also train attentive probes: cross-attention over all patch tokens, which are kept on disk (in TMPDIR)",
    )
    num_seeds: int = setting(
        5, "number of probes, each on its own random 80 % of the training files; as many untrained encoders", minimum=1
    )


def run(arguments: ProbeArguments) -> dict[str, Any]:
    check_output_dir(arguments.output_dir)
    refuse_data_folder(arguments.output_dir, [arguments.train_data, arguments.eval_data])
    check_engine(arguments.mixed_precision)
    # Processes that have fitted their probes wait for the others.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision, kwargs_handlers=[patience])
    model, processor = load_encoder(arguments.model_name_or_path, "frame")
    if accelerator.device.type == "cpu":
        set_threads(arguments.num_threads, arguments.dataloader_num_workers, model)
    loader = MediaLoader(arguments.video_backend, arguments.seconds_per_file)
    if arguments.image_range is None:
        arguments.image_range = processor.image_range
    names = None if arguments.label_names is None else read_class_names(arguments.label_names)
    train_source = open_labelled(arguments.train_data, names, f"--label_names {arguments.label_names}", arguments)
    names = train_source.class_names
    eval_source = open_labelled(arguments.eval_data, names, "the training data", arguments.of_evaluation)
    for source in (train_source, eval_source):
        refuse_several_labels(source, "the probe")
    train, evaluation = (
        build_feature_views(source, processor, loader, pooling="frame", num_frames=arguments.num_frames)
        for source in (train_source, eval_source)
    )
    results = probe_beside_untrained(
        accelerator,
        model,
        train,
        evaluation,
        arguments.num_seeds,
        num_workers=arguments.dataloader_num_workers,
        attentive=arguments.attentive,
    )
    failures = results.pop("failures")
    if accelerator.is_main_process:
        output_dir = Path(arguments.output_dir)
        output_dir.mkdir(parents=True, exist_ok=True)
        write_failures(output_dir / "bad_files.jsonl", failures)
        write_json(output_dir / "arguments.json", asdict(arguments))
        write_json(output_dir / RESULTS_FILE, results)  # last: who finds it finds the others
        print(f"{describe(results, arguments.num_seeds, output_dir)} Results: {output_dir / RESULTS_FILE}")
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return results


def describe(results: dict[str, Any], num_seeds: int, output_dir: Path) -> str:
    attentive = ""
    if "eval_attentive_top1" in results:
        attentive = (
            f"Attentive probe: pretrained {results['eval_attentive_top1']:.1f} %, "
            f"untrained {results['untrained_eval_attentive_top1']:.1f} %\n"
        )
    return (
        f"Linear probe on {results['num_eval_samples']} held-out files of {results['num_classes']} classes "
        f"(chance {100 / results['num_classes']:.1f} %), mean and standard deviation of {num_seeds} runs:\n"
        f"  pretrained {results['eval_top1']:.1f} ± {results['eval_top1_spread']:.1f} % top-1\n"
        f"  untrained  {results['untrained_eval_top1']:.1f} ± {results['untrained_eval_top1_spread']:.1f} % top-1\n"
        f"Nearest neighbours: pretrained {results['eval_knn_top1']:.1f} %, "
        f"untrained {results['untrained_eval_knn_top1']:.1f} %\n"
        f"{attentive}"
        f"{say_unreadable(results['num_failed'], output_dir / 'bad_files.jsonl')}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    start(ProbeArguments, run, argv)


def probe(
    train_data: Data, *, eval_data: Data, model_name_or_path: Data, output_dir: Data, **settings: Any
) -> dict[str, Any]:
    """
    Trains linear probes of a frozen encoder, and of encoders with random weights, in this process, on one GPU or the
    CPU.

    Args:
        train_data: labelled folder ROOT/CLASS_NAME/FILE, list, or dataset with labels that the classifiers learn from.
        eval_data: the same, of held-out files.
        model_name_or_path: any ViC-MAE, MAE or ViTMAE checkpoint; its encoder is probed.
        output_dir: folder to write results and settings to.
        settings: named like the flags of `vicmae probe`, without "--".

    Returns:
        The content of `all_results.json`; accuracies in percent.

    Raises:
        ArgumentsError: if a setting is unknown or wrong.
        InputError: if data, checkpoint or folder cannot be used.
    """
    required = {"train_data": train_data, "eval_data": eval_data}
    required |= {"model_name_or_path": model_name_or_path, "output_dir": output_dir}
    return call(ProbeArguments, run, required | settings)
