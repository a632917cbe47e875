"""
Embeds every video or image of a source: `vicmae features`, for `accelerate launch`.

    accelerate launch examples/pytorch/export_features.py --model_name_or_path outputs/demo \
        --data data/demo/appearance/eval --output features.parquet --pooling frame

docs/evaluation.md says what the files hold.
"""

from vicmae_command import run


if __name__ == "__main__":
    run("features")
