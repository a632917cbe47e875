"""
Pretrains ViC-MAE: `vicmae pretrain`, for `accelerate launch`.

    accelerate launch examples/pytorch/run_pretraining.py examples/pytorch/configs/demo.yaml
    accelerate launch examples/pytorch/run_pretraining.py \
        examples/pytorch/configs/pretrain_vit_base.yaml --train_data PATH [PATH ...] --output_dir outputs/vit_base

Settings come from the file and from flags (flags win); `--help` lists them. docs/pretraining.md explains.
"""

from vicmae_command import run


if __name__ == "__main__":
    run("pretrain")
