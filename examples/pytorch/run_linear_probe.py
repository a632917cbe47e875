"""
Linear probe of a frozen encoder: `vicmae probe`.

    python examples/pytorch/run_linear_probe.py --model_name_or_path outputs/demo \
        --train_data data/demo/appearance/train --eval_data data/demo/appearance/eval --output_dir outputs/demo/probe
"""

from vicmae_command import run


if __name__ == "__main__":
    run("probe")
