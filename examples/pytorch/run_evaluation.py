"""
Evaluates a classifier over test views: `vicmae evaluate`, for `accelerate launch`.

    accelerate launch examples/pytorch/run_evaluation.py --model_name_or_path outputs/finetuned \
        --data data/demo/motion/eval --num_clips 3 --num_crops 3 --temporal_ablation --output_dir outputs/evaluation

docs/evaluation.md explains.
"""

from vicmae_command import run


if __name__ == "__main__":
    run("evaluate")
