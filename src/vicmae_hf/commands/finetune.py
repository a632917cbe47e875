"""
Trains a classifier of images or videos from a pretrained ViC-MAE: the whole model, or (--method linear) a linear
classifier on the frozen encoder.

Examples:

    vicmae finetune labelled/train --eval_data labelled/eval --task video --model_name_or_path outputs/mine \\
        -o outputs/classifier
    vicmae finetune my_settings.yaml labelled/train --eval_data labelled/eval --model_name_or_path outputs/mine \\
        -o outputs/classifier

Settings come from the file and from flags; flags win. Tables 2, 3 and 5 are the paper's. docs/finetuning.md explains.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..classification.arguments import ClassificationArguments
from ..classification.classification import train_classifier
from ..classification.setup import build_classifier, open_sources
from ..evaluation.metrics.accuracy import describe_figures
from ..training.reporting import say_unreadable
from ..training.session.calling import Data, call, start
from ..training.session.session import end_session, start_session


def run(arguments: ClassificationArguments) -> dict[str, Any]:
    if arguments.plan:
        from .plan import plan_launched  # imported here, because a training needs none of it

        return plan_launched(arguments)
    accelerator = start_session(arguments)
    with accelerator.main_process_first():
        train_source, eval_source = open_sources(arguments)
    model = build_classifier(arguments, train_source.class_names, train_source.is_multi_label)
    results = train_classifier(accelerator, model, train_source, eval_source, arguments)
    end_session(accelerator, arguments)  # the upload first: a closed pipe would end the program below
    if accelerator.is_main_process:
        num_failed = results["num_train_failed"] + results["num_failed"]
        unreadable = say_unreadable(num_failed, Path(arguments.output_dir) / "bad_files.jsonl")
        print(
            f"{describe_figures(results, model.config.num_labels)} of {results['num_eval_samples']} held-out samples "
            f"after {results['best_epoch']:g} of {results['epochs']:g} epochs, the best evaluation; "
            f"{unreadable}. Model, curves and card: {arguments.output_dir}"
        )
    return results


def main(argv: Sequence[str] | None = None) -> None:
    start(ClassificationArguments, run, argv)


def finetune(train_data: Data, *, eval_data: Data, task: str, output_dir: Data, **settings: Any) -> dict[str, Any]:
    """
    Trains a classifier in this process, on one GPU or the CPU.

        vicmae_hf.finetune("labelled/train", eval_data="labelled/eval", task="video", output_dir="outputs/classifier",
                           model_name_or_path="outputs/mine")

    Args:
        train_data: labelled folder ROOT/CLASS_NAME/FILE, list, or dataset with labels.
        eval_data: the same, held out.
        task: "image" or "video".
        output_dir: folder to write everything to.
        settings: named like the flags of `vicmae finetune`, without "--"; `method="linear"` freezes the encoder.

    Returns:
        The content of `all_results.json`.

    Raises:
        ArgumentsError, InputError, RunStopped: as `vicmae_hf.pretrain`.
    """
    required = {"train_data": train_data, "eval_data": eval_data, "task": task, "output_dir": output_dir}
    return call(ClassificationArguments, run, required | settings)
