"""Runs a whole pretraining: data, training, figures during training, and the files that the run leaves."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

from ..data.media.bad_files import BadFilesError
from ..data.media.reading import MediaLoader
from ..data.samples.pairs import FramePairDataset
from ..data.sources.labelled import open_labelled, refuse_several_labels
from ..files import write_json
from ..image_processing_vicmae import ViCMAEImageProcessor
from ..modeling_vicmae import ViCMAEForPreTraining
from ..processors import build_processors
from ..reports.baselines import pretraining_baselines
from ..reports.encoder_pictures import write_encoder_pictures
from ..reports.model_card import write_pretraining_card
from ..reports.plots import plot_losses, plot_reconstructions
from ..reports.reconstructions import reconstruct_views
from ..training.devices.peaks import peak_memory_mib
from ..training.devices.sharding import prepare_sharding
from ..training.reporting import RESULTS_FILE, read_metrics, read_results
from ..training.run_folder import RunFolder
from .arguments import PretrainingArguments
from .collapse import CollapseFigures
from .flops import update_flops
from .online_probe import OnlineProbe
from .presets import fit_to_data
from .pretraining import Measure, build_frame_pairs, pretrain


if TYPE_CHECKING:  # only for an annotation: most people never load it
    from ..data.samples.streaming import FramePairStream

logger = get_logger(__name__)

NUM_PICTURED_SAMPLES = 8  # rows of the picture of reconstructions


def run_pretraining(
    accelerator: Accelerator, model: ViCMAEForPreTraining, arguments: PretrainingArguments
) -> dict[str, Any]:
    """
    Trains `model` on `arguments.train_data`, and leaves in `arguments.output_dir` the model, its processors and card,
    metrics, settings, results, pictures and checkpoints.

    Returns:
        The content of `all_results.json`.

    Raises:
        BadFilesError: if too many files cannot be read.
        CheckpointError: if the checkpoint to resume from does not fit.
        InputError: if data cannot be opened, or the online probe has too few files.
        NonFiniteError: if a loss, a gradient or a weight becomes infinite or NaN.
        RunStopped: if the run was asked to stop.
    """
    # First, so that a wrong name is reported before files of an older run are replaced.
    probe_data = arguments.probe_data
    probe_source = None if probe_data is None else open_labelled(probe_data, settings=arguments)
    if probe_source is not None:
        refuse_several_labels(probe_source, "--probe_data")
    dataset = build_frame_pairs(accelerator, model.config, arguments)
    fit_to_data(arguments, model.config, dataset.num_samples, accelerator.num_processes)
    processors = build_processors(model.config, arguments.image_range)
    measures: list[Measure] = [CollapseFigures(accelerator, arguments.logging_steps)]
    if probe_source is not None:
        measures.append(
            OnlineProbe(
                accelerator,
                model.vicmae,
                probe_source,
                processors[0],
                MediaLoader(arguments.video_backend, arguments.seconds_per_file),
                probe_steps=arguments.probe_steps,
                seed=arguments.seed,
                batch_size=arguments.per_device_train_batch_size,
                num_workers=arguments.dataloader_num_workers,
            )
        )
    prepare_sharding(accelerator, model)
    num_pairs = arguments.per_device_train_batch_size
    num_frozen = sum(not any(p.requires_grad for p in layer.parameters()) for layer in model.vicmae.layers)
    flops_per_pair = update_flops(model.config, num_pairs, num_frozen) / num_pairs
    run = RunFolder(accelerator, arguments, "pairs", flops_per_sample=flops_per_pair)
    results = pretrain(accelerator, model, dataset, arguments, run, processors, measures)
    if results is None:  # a resumed run that was finished: its report is there, too
        return read_results(arguments.output_dir)
    results |= peak_memory_mib(accelerator.device)
    if accelerator.is_main_process:
        if accelerator.is_fsdp2:  # which would have all processes take part in a forward pass
            model = ViCMAEForPreTraining.from_pretrained(arguments.output_dir)
        write_report(model, dataset, processors[0], arguments, results)
    accelerator.wait_for_everyone()  # for the report, before the upload or the end
    return results


def write_report(
    model: ViCMAEForPreTraining,
    dataset: "FramePairDataset | FramePairStream",
    processor: ViCMAEImageProcessor,
    arguments: PretrainingArguments,
    results: dict[str, Any],
) -> None:
    """Writes pictures, model card and `all_results.json`."""
    output_dir = Path(arguments.output_dir)
    plots = output_dir / "plots"
    plots.mkdir(exist_ok=True)
    settings = json.loads((output_dir / "arguments.json").read_text(encoding="utf-8"))
    if metrics := read_metrics(output_dir):
        num_compared = settings["total_batch_size"]
        if not arguments.contrast_across_accumulation:
            num_compared //= arguments.gradient_accumulation_steps
        plot_losses(metrics, plots / "losses.png", pretraining_baselines(model.config, num_compared))
    views = torch.stack([sample["pixel_values"] for sample in dataset.examples(NUM_PICTURED_SAMPLES)])
    columns, text = reconstruct_views(model, views, processor.image_mean, processor.image_std)
    plot_reconstructions(columns, plots / "reconstructions.png", text)
    try:
        write_encoder_pictures(model.vicmae, dataset, processor, plots)
    except BadFilesError as error:  # of files that no update reached: the run itself is done
        logger.warning("No more pictures: %s", error)
    dataset.bad_files.finish()  # pictures may be of files that no update reached
    results["num_failed"] = len(dataset.bad_files)
    write_pretraining_card(output_dir, settings, results)
    # Results come last, because they say that the run is finished: a run killed before this line writes its report
    # when it is resumed.
    write_json(output_dir / RESULTS_FILE, results)
