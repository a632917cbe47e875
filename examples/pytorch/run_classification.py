"""
Trains a classifier, whole or linear: `vicmae finetune`, for `accelerate launch`.

    accelerate launch examples/pytorch/run_classification.py --task video --method finetune \
        --model_name_or_path outputs/demo --train_data data/demo/motion/train --eval_data data/demo/motion/eval \
        --output_dir outputs/motion --no-horizontal_flip
    accelerate launch examples/pytorch/run_classification.py examples/pytorch/configs/finetune_in1k_vit_base.yaml \
        --model_name_or_path PRETRAINED --train_data IMAGENET/train --eval_data IMAGENET/val --output_dir OUTPUT

Settings come from the file and from flags (flags win); `--help` lists them. docs/finetuning.md explains.
"""

from vicmae_command import run


if __name__ == "__main__":
    run("finetune")
