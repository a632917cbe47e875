"""Trains classifiers: finetuning (Table 2) and linear evaluation (Table 3)."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..configuration_vicmae import ViCMAEConfig
from ..data.loading.loader import SteadyBatches, build_dataloader
from ..data.media.bad_files import BadFiles
from ..data.media.reading import MediaLoader
from ..data.samples.augmentation import PixelNormalizer
from ..data.samples.clip_augmentation import BatchMixing, RandomClip
from ..data.samples.clips import ClipDataset
from ..data.samples.frame_choice import ClipSampling
from ..data.samples.views import build_test_views
from ..data.sources.labelled import LabelledSource
from ..evaluation.feature_table import LabelledFeatures
from ..evaluation.features import extract_embeddings, warn_if_blind_to_order
from ..evaluation.metrics.accuracy import FIGURES, shown_figures
from ..evaluation.prediction import Predictions, predict
from ..evaluation.probes import build_linear_optimizer
from ..files import write_json, write_whole
from ..modeling_vicmae import ViCMAEForImageClassification
from ..reports.baselines import Baselines, classification_baselines
from ..reports.model_card import write_classification_card
from ..reports.plots import plot_accuracies, plot_losses
from ..settings import ArgumentsError
from ..training.checkpointing import save_finite, unwrap
from ..training.devices.peaks import peak_memory_mib
from ..training.loop import Updates, train
from ..training.optimization import Schedule, order_batches, parameter_groups, plan_run
from ..training.reporting import RESULTS_FILE, read_metrics, read_results
from ..training.run_folder import RunFolder
from .arguments import ClassificationArguments
from .best_model import BestModel
from .linear import LinearClassifier, predict_features
from .setup import build_classifier_processors


def train_classifier(
    accelerator: Accelerator,
    model: ViCMAEForImageClassification,
    train_source: LabelledSource,
    eval_source: LabelledSource,
    arguments: ClassificationArguments,
) -> dict[str, Any]:
    """
    Trains `model`. Leaves in `arguments.output_dir` the model that evaluated best, its processors and card, metrics,
    settings, results, pictures and checkpoints.

    Returns:
        The content of `all_results.json`.

    Raises:
        ArgumentsError: if the batch is too small for batch norm.
        BadFilesError, CheckpointError, NonFiniteError, RunStopped: as in pretraining (see `run_pretraining`).
    """
    resolve_settings(arguments, model.config, accelerator.num_processes)
    output_dir = Path(arguments.output_dir)
    bad_files = BadFiles(output_dir / "bad_files.jsonl", len(train_source) + len(eval_source), arguments.max_bad_files)
    # All that may be refused comes before `run.begin`, which deletes the run that this one replaces.
    schedule = plan_run(arguments, accelerator.num_processes, len(train_source))
    view = build_view(model.config, arguments)
    module = LinearClassifier(model) if arguments.method == "linear" else model
    if arguments.method == "linear":
        warn_if_blind_to_order(model.vicmae, arguments.num_frames)
    module, optimizer = accelerator.prepare(module, build_optimizer(module, model.config, arguments))
    objective = Objective(module, model.config, arguments)
    unwrapped = unwrap(accelerator, module)
    best_model = BestModel(accelerator, output_dir, partial(save_finite, unwrapped))
    run = RunFolder(accelerator, arguments, "samples", parts=[best_model])
    # Before the samples are opened: features are computed only after a checkpoint was found to fit.
    start_step = run.begin(schedule, model, list_data(train_source, eval_source)).start_step
    samples = open_samples(accelerator, module, train_source, eval_source, view, bad_files, arguments)
    if len(samples.train) < len(train_source):  # unreadable files have no features
        schedule = plan_run(arguments, accelerator.num_processes, len(samples.train))
        run.settings |= {"num_steps": schedule.num_steps, "steps_per_epoch": schedule.steps_per_epoch}
    schedule = replace(schedule, start_step=start_step)
    if run.is_finished(schedule):
        return read_results(output_dir)
    batches = load_batches(accelerator, samples, bad_files, arguments, schedule)
    run.write_settings(build_classifier_processors(model.config, arguments))
    if accelerator.is_main_process and arguments.label_fraction is not None:
        write_names(train_source, output_dir / "train_files.txt")
    evaluate = HeldOutEvaluation(accelerator, samples, bad_files, best_model, schedule, arguments.eval_epochs)
    updates = Updates(accelerator, module, optimizer, batches, objective, schedule, arguments)
    with bad_files.errors_of_workers(), run.logging(schedule):
        results = train(updates, run, evaluate)
    results = best_model.figures | lengths_of_run(schedule, train_source) | results
    return finish(accelerator, bad_files, train_source, eval_source, run.settings, results, arguments)


def list_data(train_source: LabelledSource, eval_source: LabelledSource) -> dict[str, list[str]]:
    """Lists what makes a run this run and no other: the names and labels of all files."""
    return {
        "train_files": list_labelled_names(train_source),
        "eval_files": list_labelled_names(eval_source),
        # Other names or another order would give the outputs of the classifier another meaning.
        "class_names": train_source.class_names,
    }


def list_labelled_names(source: LabelledSource) -> list[str]:
    labels = source.labels if not source.is_multi_label else map(np.flatnonzero, source.labels)
    return [f"{name}\t{label}" for name, label in zip(source.list_names(), labels, strict=True)]


def load_batches(
    accelerator: Accelerator,
    samples: "Samples",
    bad_files: BadFiles,
    arguments: ClassificationArguments,
    schedule: Schedule,
) -> Iterable[dict[str, torch.Tensor]]:
    """Loads the batches still to come, `{"pixel_values" or "features", "labels"}`, to this process's device."""
    num_samples, pin_memory = len(samples.train), accelerator.device.type == "cuda"

    def open_loader(num_batches: int) -> Iterable[dict[str, torch.Tensor]]:
        sampler = order_batches(arguments, schedule, [num_samples], num_samples, num_batches=num_batches)
        return accelerator.prepare_data_loader(
            build_dataloader(samples.train, sampler, samples.num_workers, pin_memory)
        )

    return SteadyBatches(open_loader, bad_files, samples.num_workers)


class HeldOutEvaluation:
    """
    Evaluates the held-out samples at the end of every `eval_epochs` epochs and after the last update, keeps the best
    model, and records files that cannot be read. `loop.train` calls an instance after every update.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        samples: "Samples",
        bad_files: BadFiles,
        best_model: BestModel,
        schedule: Schedule,
        eval_epochs: int,
    ):
        self.accelerator = accelerator
        self.samples = samples
        self.bad_files = bad_files
        self.best_model = best_model
        self.schedule = schedule
        self.eval_epochs = eval_epochs

    def __call__(self, step: int) -> dict[str, float]:
        """`eval_top1` and `eval_top5`, or `eval_map`, in percent; nothing if it is not time for an evaluation."""
        steps_per_epoch = self.schedule.steps_per_epoch
        if step % (self.eval_epochs * steps_per_epoch) and step != self.schedule.num_steps:
            return {}
        predictions = self.samples.predict_held_out()
        record_failures(self.accelerator, self.bad_files, predictions.failures)
        figures = predictions.accuracy()
        # Before the checkpoint of this step is written, which then holds the new best model.
        self.best_model.update({**figures, "best_step": step, "best_epoch": step / steps_per_epoch})
        return {name: figures[name] for name in FIGURES if name in figures}


def lengths_of_run(schedule: Schedule, train_source: LabelledSource) -> dict[str, float]:
    return {
        "num_steps": schedule.num_steps,
        "epochs": schedule.num_steps / schedule.steps_per_epoch,
        "num_train_files": len(train_source),
    }


def finish(
    accelerator: Accelerator,
    bad_files: BadFiles,
    train_source: LabelledSource,
    eval_source: LabelledSource,
    settings: dict[str, Any],
    results: dict[str, Any],
    arguments: ClassificationArguments,
) -> dict[str, Any]:
    """Writes pictures, model card and `all_results.json`, and returns the results with the memory that they took."""
    results = results | peak_memory_mib(accelerator.device)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        output_dir = Path(arguments.output_dir)
        bad_files.finish()
        results["num_train_failed"] = count_failures(bad_files, train_source)
        shown = {name: FIGURES[name] for name in shown_figures(results, len(train_source.class_names))}
        write_pictures(output_dir, shown, classification_baselines(eval_source.labels))
        card = {"task": arguments.task, "dataset_name": arguments.eval_data, "shown_figures": shown}
        write_classification_card(output_dir, settings, results, **card)
        # Last, because this file says that the run is finished.
        write_json(output_dir / RESULTS_FILE, results)
    accelerator.wait_for_everyone()
    return results


def resolve_settings(arguments: ClassificationArguments, config: ViCMAEConfig, num_processes: int) -> None:
    """Fills in the settings whose defaults depend on others."""
    arguments.num_frames = config.num_frames
    if arguments.per_device_eval_batch_size is None:
        arguments.per_device_eval_batch_size = arguments.per_device_train_batch_size
    if arguments.method == "linear" and arguments.per_device_train_batch_size * num_processes < 2:
        raise ArgumentsError("--method linear: batch norm needs at least 2 samples in a step, got 1.")


def build_optimizer(
    module: nn.Module, config: ViCMAEConfig, arguments: ClassificationArguments
) -> torch.optim.Optimizer:
    """Builds AdamW with layer-wise decay of the learning rate (Table 2), or SGD with momentum (Table 3)."""
    if arguments.method == "linear":
        return build_linear_optimizer(parameter_groups(module, arguments.weight_decay))
    groups = parameter_groups(
        module,
        arguments.weight_decay,
        lambda name: layer_decay_scale(name, config.num_hidden_layers, arguments.layer_decay),
    )
    # lr=0.0, because the schedule sets the learning rate before every update.
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), fused=True)


def layer_decay_scale(name: str, num_layers: int, layer_decay: float) -> float:
    """
    Returns an encoder parameter's share of the learning rate, by depth as in BEiT (layer-wise decay; Table 2 cites
    it): 1 for what follows the layers (final norm, classifier), `layer_decay` for the last layer, one factor more for
    each layer below, and `layer_decay ** (num_layers + 1)` for the embeddings.
    """
    # Early layers hold general features and should change little; late ones have to fit the new task.
    layer = re.search(r"\blayers\.(\d+)\.", name)
    if layer:
        return layer_decay ** (num_layers - int(layer.group(1)))
    return layer_decay ** (num_layers + 1) if "embeddings." in name else 1.0


class Objective:
    """
    Loss of a batch: cross entropy against smoothed and mixed targets; where an item may have several classes, binary
    cross entropy of each class.

    Args:
        prepared: the model or linear classifier as Accelerate prepared it.
        config: the model's.
        arguments: how targets are smoothed and samples mixed.
    """

    def __init__(self, prepared: nn.Module, config: ViCMAEConfig, arguments: ClassificationArguments):
        self.prepared = prepared
        # By the mean and deviation that are saved with the processor, so that users normalise as training did.
        processor, _ = build_classifier_processors(config, arguments)
        device = next(prepared.parameters()).device
        self.normalize = PixelNormalizer(processor.image_mean, processor.image_std).to(device)
        self.mixing = BatchMixing(config.num_labels, arguments.label_smoothing, arguments.mixup, arguments.cutmix)

    def __call__(self, batch: dict[str, torch.Tensor], epoch: float) -> dict[str, torch.Tensor]:
        if "features" in batch:
            inputs, targets = self.mixing(batch["features"], batch["labels"])
            return {"loss": self.prepared(features=inputs, labels=targets).loss}
        # Pixels travel as bytes and become floats here on the device; mixing needs floats.
        pixel_values = self.normalize(batch["pixel_values"])
        inputs, targets = self.mixing(pixel_values, batch["labels"])
        return {"loss": self.prepared(pixel_values=inputs, labels=targets).loss}


def build_view(config: ViCMAEConfig, arguments: ClassificationArguments) -> RandomClip:
    """Builds the random views by which frames become training samples."""
    return RandomClip(
        config.image_height_and_width,
        arguments.crop_scale,
        arguments.horizontal_flip,
        arguments.rand_augment_magnitude,
        arguments.rand_augment_std,
        arguments.random_erasing,
    )


@dataclass(frozen=True)
class Samples:
    """
    The samples that a classifier is trained and evaluated on.

    Args:
        train: a dataset of samples, addressed by `SampleKey`s.
        num_workers: processes that load them.
        predict_held_out: predicts the held-out samples with the model as it is.
    """

    train: torch.utils.data.Dataset
    num_workers: int
    predict_held_out: Callable[[], Predictions]


def open_samples(
    accelerator: Accelerator,
    module: nn.Module,
    train_source: LabelledSource,
    eval_source: LabelledSource,
    view: RandomClip,
    bad_files: BadFiles,
    arguments: ClassificationArguments,
) -> Samples:
    """Opens random clips or images. Without augmentation, computes the frozen encoder's features of test views."""
    model = unwrap(accelerator, module)
    config = model.config
    loader = MediaLoader(arguments.video_backend, arguments.seconds_per_file)
    processors = dict(zip(["image", "video"], build_classifier_processors(config, arguments), strict=True))
    train_views, eval_views = (
        build_test_views(
            source,
            processors[arguments.task],
            loader,
            task=arguments.task,
            num_frames=config.num_frames,
            frames_per_second=arguments.frames_per_second or None,
        )
        for source in (train_source, eval_source)
    )
    # Test views of the training files, too: they are the samples if there is no augmentation.
    loading = {"batch_size": arguments.per_device_eval_batch_size, "num_workers": arguments.dataloader_num_workers}
    if not arguments.train_augmentation:
        encoder = model.model.vicmae
        features = extract_embeddings(accelerator, encoder, train_views, **loading)
        record_failures(accelerator, bad_files, features.failures)
        samples = LabelledFeatures.of(features, train_source)
        held_out = LabelledFeatures.of(extract_embeddings(accelerator, encoder, eval_views, **loading), eval_source)
        return Samples(samples, 0, lambda: predict_features(model, held_out))  # 0 workers: nothing is read but rows
    clips = ClipDataset(
        train_source,
        ClipSampling(config.num_frames, arguments.frames_per_second) if arguments.task == "video" else None,
        view,
        bad_files,
        loader,
        arguments.seed,
    )
    # One sample is read, so that a folder of unreadable files is reported here in one line, and not by a worker.
    clips[0, 0, 0]
    return Samples(
        clips, arguments.dataloader_num_workers, lambda: predict(accelerator, module, eval_views, **loading)
    )


def record_failures(accelerator: Accelerator, bad_files: BadFiles, failures: Sequence[dict[str, str]]) -> None:
    """Records files that could not be read. Raises a BadFilesError if there are too many."""
    # All processes have the same list, so one of them writes it.
    if accelerator.is_main_process:
        for failure in failures:
            bad_files.add(failure["path"], failure["error"], failure.get("transient", False))


def count_failures(bad_files: BadFiles, source: LabelledSource) -> int:
    """Counts the items of a source that could not be read."""
    if len(bad_files) == 0:  # else the name of every item would be looked up for nothing
        return 0
    return sum(source[index].name in bad_files.errors for index in range(len(source)))


def write_names(source: LabelledSource, path: Path) -> None:
    """Writes the names of all items of a source, one a line."""
    write_whole(path, "".join(f"{source[index].name}\n" for index in range(len(source))))


def write_pictures(output_dir: Path, shown: dict[str, str], baselines: Baselines) -> None:
    """Writes `plots/losses.png` and `plots/accuracies.png`."""
    plots = output_dir / "plots"
    plots.mkdir(exist_ok=True)
    metrics = read_metrics(output_dir)
    plot_losses(metrics, plots / "losses.png")
    plot_accuracies(metrics, plots / "accuracies.png", shown, baselines)
