"""
Pretrains ViC-MAE on folders of videos and images, Parquet files or datasets.

    accelerate launch examples/pytorch/run_pretraining.py examples/pytorch/configs/demo.yaml
    accelerate launch examples/pytorch/run_pretraining.py \
        examples/pytorch/configs/pretrain_vit_base.yaml --train_data PATH [PATH ...] --output_dir outputs/vit_base

Settings come from the file and from flags, flags win; `--help` lists them. docs/pretraining.md explains.
"""

from pathlib import Path

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.data import load_frame_pairs
from vicmae_hf.training.arguments import PretrainingArguments, parse_arguments
from vicmae_hf.training.pretraining import pretrain
from vicmae_hf.training.session import build_model, end_session, run_script, start_session


def main() -> None:
    arguments = parse_arguments(PretrainingArguments)
    accelerator = start_session(arguments)
    model = build_model(ViCMAEForPreTraining, arguments)
    with accelerator.main_process_first():
        dataset = load_frame_pairs(
            arguments.train_data,
            model.config.image_height_and_width,
            frame_sampling=arguments.frame_sampling,
            window_seconds=arguments.window_seconds,
            num_segments=arguments.num_segments,
            gap_seconds=arguments.gap_seconds,
            color_augmentation=arguments.color_augmentation,
            samples_per_file=arguments.samples_per_file,
            video_backend=arguments.video_backend,
            seconds_per_file=arguments.seconds_per_file,
            seed=arguments.seed,
            max_bad_files=arguments.max_bad_files,
            bad_files_path=Path(arguments.output_dir) / "bad_files.jsonl",
        )
        # A folder of unreadable files is reported here, in one line, and not from inside a worker.
        dataset[0]
    results = pretrain(accelerator, model, dataset, arguments)
    if accelerator.is_main_process:
        print(
            f"{results['num_steps']} updates, {results['pairs_per_second']:.0f} pairs/s, "
            f"{results['num_failed']} unreadable files. Model, curves and pictures: {arguments.output_dir}"
        )
    end_session(accelerator, arguments)


if __name__ == "__main__":
    run_script(main)
