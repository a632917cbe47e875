"""
Trains a classifier of images or videos from a pretrained ViC-MAE: the whole model, or a linear classifier on the
frozen encoder.

    accelerate launch examples/pytorch/run_classification.py --task video --method finetune \
        --model_name_or_path outputs/demo --train_data data/demo/motion/train --eval_data data/demo/motion/eval \
        --output_dir outputs/motion --no-horizontal_flip
    accelerate launch examples/pytorch/run_classification.py examples/pytorch/configs/finetune_in1k_vit_base.yaml \
        --model_name_or_path PRETRAINED --train_data IMAGENET/train --eval_data IMAGENET/val --output_dir OUTPUT

Settings come from the file and from flags, flags win; `--help` lists them. docs/finetuning.md explains.
"""

from vicmae_hf.classification.arguments import ClassificationArguments
from vicmae_hf.classification.classification import train_classifier
from vicmae_hf.classification.setup import build_classifier, open_sources
from vicmae_hf.command_line import parse_arguments
from vicmae_hf.evaluation.prediction import describe_figures
from vicmae_hf.training.session import end_session, run_script, start_session


def main() -> None:
    arguments = parse_arguments(ClassificationArguments)
    accelerator = start_session(arguments)
    with accelerator.main_process_first():
        train_source, eval_source = open_sources(arguments)
    model = build_classifier(arguments, train_source.class_names, train_source.is_multi_label)
    results = train_classifier(accelerator, model, train_source, eval_source, arguments)
    if accelerator.is_main_process:
        print(
            f"{describe_figures(results, model.config.num_labels)} of {results['num_eval_samples']} held-out samples "
            f"after {results['best_epoch']:g} of {results['epochs']:g} epochs, the best evaluation. "
            f"Model, curves and card: {arguments.output_dir}"
        )
    end_session(accelerator, arguments)


if __name__ == "__main__":
    run_script(main)
