"""
Pretrains ViC-MAE on folders of videos and images, Parquet files or datasets.

    accelerate launch examples/pytorch/run_pretraining.py examples/pytorch/configs/demo.yaml
    accelerate launch examples/pytorch/run_pretraining.py \
        examples/pytorch/configs/pretrain_vit_base.yaml --train_data PATH [PATH ...] --output_dir outputs/vit_base

Settings come from the file and from flags, flags win; `--help` lists them. docs/pretraining.md explains.
"""

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.command_line import parse_arguments
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.pretraining.run import run_pretraining
from vicmae_hf.training.session import build_model, end_session, run_script, start_session


def main() -> None:
    arguments = parse_arguments(PretrainingArguments)
    accelerator = start_session(arguments)
    model = build_model(ViCMAEForPreTraining, arguments)
    results = run_pretraining(accelerator, model, arguments)
    if accelerator.is_main_process:
        print(
            f"{results['num_steps']} updates, {results['pairs_per_second']:.0f} pairs/s, "
            f"{results['num_failed']} unreadable files. Model, curves and pictures: {arguments.output_dir}"
        )
    end_session(accelerator, arguments)


if __name__ == "__main__":
    run_script(main)
