"""Pretraining: Algorithm 1 with the recipe of Table 1."""

import json
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import send_to_device

from ..data.loading.loader import build_dataloader
from ..data.media.reading import MediaLoader
from ..data.samples.augmentation import normalize_pixels
from ..data.samples.pairs import FramePairDataset, load_frame_pairs
from ..data.samples.streaming import FramePairStream, build_stream_dataloader
from ..data.sources.labelled import open_labelled
from ..files import write_json
from ..modeling_vicmae import ViCMAEForPreTraining
from ..processors import build_processors
from ..reports.model_card import write_pretraining_card
from ..reports.plots import plot_losses, plot_reconstructions, reconstruct_views
from ..training.checkpointing import Checkpoints
from ..training.loop import train
from ..training.optimization import parameter_groups
from ..training.planning import plan_run, total_batch_size
from ..training.reporting import MetricsLog, peak_memory_mib, read_metrics
from .arguments import PretrainingArguments
from .collapse import collapse_metrics
from .online_probe import OnlineProbe


logger = get_logger(__name__)

NUM_PICTURED_SAMPLES = 8


def build_frame_pairs(
    accelerator: Accelerator, model: ViCMAEForPreTraining, arguments: PretrainingArguments
) -> FramePairDataset | FramePairStream:
    """
    The pairs to train `model` on.

    Raises:
        BadFilesError: if no pair can be read.
        InputError: if the data cannot be opened, or an option is out of range.
    """
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
            streaming=arguments.streaming,
        )
        # A folder of unreadable files is reported here, in one line, and not from inside a worker.
        next(iter(dataset)) if arguments.streaming else dataset[0]
    return dataset


def pretrain(
    accelerator: Accelerator,
    model: ViCMAEForPreTraining,
    dataset: FramePairDataset | FramePairStream,
    arguments: PretrainingArguments,
) -> dict[str, Any]:
    """
    Trains `model` on `dataset` and leaves in `arguments.output_dir` the model, its processors and card, metrics,
    settings, results, pictures and checkpoints.

    Returns:
        The content of `all_results.json`.

    Raises:
        BadFilesError: if too many files cannot be read.
        CheckpointError: if the checkpoint to resume from does not fit.
        InputError: if the data of the online probe cannot be opened, or is too small.
        NonFiniteLossError: if the loss becomes infinite or NaN.
    """
    output_dir = Path(arguments.output_dir)
    # A wrong name is reported before anything is replaced.
    probe_source = None if arguments.probe_data is None else open_labelled(arguments.probe_data)
    checkpoints = Checkpoints(
        accelerator,
        output_dir,
        arguments.save_total_limit,
        run_settings={
            "seed": arguments.seed,
            "num_files": dataset.num_files,
            "samples_per_file": dataset.samples_per_file,
            "per_device_train_batch_size": arguments.per_device_train_batch_size,
            "gradient_accumulation_steps": arguments.gradient_accumulation_steps,
            "num_processes": accelerator.num_processes,
            # Each has its own shards.
            "stream_workers": arguments.dataloader_num_workers if arguments.streaming else None,
        },
    )
    optimizer = torch.optim.AdamW(
        parameter_groups(model, arguments.weight_decay), lr=0.0, betas=(0.9, 0.95), fused=True
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    unwrapped_model = accelerator.unwrap_model(model, keep_torch_compile=False)
    start_step = checkpoints.start(arguments.resume_from_checkpoint)
    schedule, batch_sampler = plan_run(
        arguments,
        accelerator.num_processes,
        dataset.lengths,
        dataset.num_samples,
        arguments.train_data_weights,
        start_step,
    )
    num_steps = schedule.num_steps
    results_file = output_dir / "all_results.json"
    if start_step >= num_steps and results_file.exists():
        logger.warning("Nothing to do: %s is at step %d of %d.", output_dir, start_step, num_steps)
        return json.loads(results_file.read_text())
    loading = {"num_workers": arguments.dataloader_num_workers, "pin_memory": accelerator.device.type == "cuda"}
    if arguments.streaming:
        loader = build_stream_dataloader(
            dataset,
            arguments.per_device_train_batch_size,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            start_batch=start_step * arguments.gradient_accumulation_steps,
            **loading,
        )
        batches = (send_to_device(batch, accelerator.device, non_blocking=True) for batch in loader)
    else:
        batches = accelerator.prepare_data_loader(build_dataloader(dataset, batch_sampler, **loading))
    settings = {
        **asdict(arguments),
        "model": unwrapped_model.config.to_dict(),
        "num_processes": accelerator.num_processes,
        "total_batch_size": total_batch_size(arguments, accelerator.num_processes),
        "learning_rate": schedule.peak_learning_rate,
        "num_steps": num_steps,
        "steps_per_epoch": schedule.steps_per_epoch,
    }
    processors = build_processors(unwrapped_model.config)
    if accelerator.is_main_process:
        write_json(output_dir / "arguments.json", settings)
        for processor in processors:
            processor.save_pretrained(output_dir)

    mean, std = processors[0].image_mean, processors[0].image_std
    embeddings: dict[str, torch.Tensor] = {}

    def compute_losses(batch: dict[str, torch.Tensor], epoch: float) -> dict[str, torch.Tensor]:
        is_contrastive = epoch >= arguments.contrastive_start_epoch
        unwrapped_model.contrastive_weight = unwrapped_model.config.contrastive_weight if is_contrastive else 0.0
        output = model(normalize_pixels(batch["pixel_values"], mean, std))
        embeddings["feature"] = output.features.detach()
        if output.projections is not None:
            embeddings["projection"] = output.projections.detach()
        losses = {
            "loss": output.loss,
            "reconstruction_loss": output.reconstruction_loss,
            "contrastive_loss": output.contrastive_loss,
        }
        return {name: value for name, value in losses.items() if value is not None}

    probe = None
    if probe_source is not None:
        probe = OnlineProbe(
            accelerator,
            unwrapped_model.vicmae,
            probe_source,
            processors[0],
            MediaLoader(arguments.video_backend, arguments.seconds_per_file),
            probe_steps=arguments.probe_steps,
            num_steps=num_steps,
            seed=arguments.seed,
            batch_size=arguments.per_device_train_batch_size,
            num_workers=arguments.dataloader_num_workers,
        )

    def measure_collapse(step: int) -> dict[str, float]:
        """Of the features, and of the projections if there are any, of the batch of all processes, at logged steps."""
        if step % arguments.logging_steps and step != num_steps:
            return {}
        return {
            f"{kind}_{name}": value
            for kind, tensor in embeddings.items()
            for name, value in collapse_metrics(accelerator.gather(tensor)).items()
        }

    def measure(step: int) -> dict[str, float]:
        return measure_collapse(step) | (probe(step) if probe is not None else {})

    metrics_log = MetricsLog(accelerator, output_dir, "pairs", num_steps, start_step)
    try:
        with dataset.bad_files.errors_of_workers():
            results = train(
                accelerator,
                model,
                optimizer,
                batches,
                compute_losses,
                schedule,
                metrics_log,
                checkpoints,
                seed=arguments.seed,
                logging_steps=arguments.logging_steps,
                checkpointing_steps=arguments.checkpointing_steps,
                evaluate=measure,
            )
    finally:
        metrics_log.close()
    results["pairs_per_second"] = results.pop("samples_per_second")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        dataset.bad_files.rewrite()
        results = {
            "num_steps": num_steps,
            "epochs": num_steps / schedule.steps_per_epoch,
            "num_train_files": dataset.num_files,
            "num_failed": len(dataset.bad_files),
            **results,
            **peak_memory_mib(accelerator.device),
        }
        unwrapped_model.contrastive_weight = unwrapped_model.config.contrastive_weight
        unwrapped_model.save_pretrained(output_dir)
        write_pictures(unwrapped_model, dataset, mean, std, output_dir)
        write_pretraining_card(output_dir, settings, results)
        # Last, as it says that the run is finished.
        write_json(results_file, results)
    accelerator.wait_for_everyone()
    return results


def write_pictures(
    model: ViCMAEForPreTraining,
    dataset: FramePairDataset | FramePairStream,
    mean: list[float],
    std: list[float],
    output_dir: Path,
) -> None:
    """`plots/losses.png` and `plots/reconstructions.png`, of files spread over the dataset, or first in a stream."""
    plots = output_dir / "plots"
    plots.mkdir(exist_ok=True)
    metrics = read_metrics(output_dir)
    if metrics:
        plot_losses(metrics, plots / "losses.png")
    count = min(NUM_PICTURED_SAMPLES, dataset.num_samples)
    step = max(dataset.num_files // count, 1)
    is_stream = isinstance(dataset, FramePairStream)
    samples = islice(dataset, count) if is_stream else (dataset[index * step] for index in range(count))
    views = torch.stack([sample["pixel_values"] for sample in samples])
    plot_reconstructions(reconstruct_views(model, views, mean, std), plots / "reconstructions.png")
