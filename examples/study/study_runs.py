"""The study of the supplement's section B: its runs are tuned, trained and probed, and their results collected."""

import gc
import os
import platform
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs, PartialState
from study_plan import CANDIDATES, TUNED, Plan, Run, StudyArguments
from study_probes import StudyProbes
from transformers import set_seed

from vicmae_hf.configuration_vicmae import ViCMAEConfig
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.errors import NonFiniteError
from vicmae_hf.files import read_json, write_json
from vicmae_hf.modeling_vicmae import ViCMAEForPreTraining, ViCMAEModel
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.pretraining.run import run_pretraining
from vicmae_hf.processors import build_processors
from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.reporting import RESULTS_FILE, read_metrics, read_results
from vicmae_hf.training.session.models import build_model
from vicmae_hf.training.session.session import start_session


# What the log says of collapse.
COLLAPSE = ("std", "rank", "alignment", "uniformity")


def run_study(study: StudyArguments) -> dict[str, Any]:
    """
    Trains and probes what is not done yet, and writes `output_dir/all_results.json`.

    Several processes train together and make features together; each trains the probes.

    Returns:
        What was written: settings, references (raw pixels, untrained encoders), sweep, tuned settings, runs.

    Raises:
        ArgumentsError: if settings are wrong, or `output_dir` holds runs with other ones.
        InputError: if data cannot be read.
        NonFiniteError: if the loss of a run becomes infinite or NaN that is more than a try.
    """
    plan, config = open_study(study)
    probes = build_probes(study, plan, config)
    references = probe_references(plan, probes)
    sweep, tuned = tune(plan, config.pooling, partial(train_and_probe, probes=probes, folder=plan.folder))
    runs = train_and_probe(plan.reported(tuned), probes, plan.folder)
    check_budgets(sweep + runs)
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "device": device_name(),
        "settings": asdict(study),
        "budget": read_budget(plan.folder / "runs" / "vicmae-seed0"),
        "pooling": config.pooling,
        "probe_data": probes.cached(plan.folder / "probe_data.json", probes.describe),
        "references": references,
        "sweep": sweep,
        "tuned": tuned,
        "runs": runs,
    }
    if PartialState().is_main_process:
        write_json(plan.folder / RESULTS_FILE, results)
    return results


def open_study(study: StudyArguments) -> tuple[Plan, ViCMAEConfig]:
    """
    The plan, checked against what `output_dir` was begun with, and the config of the recipe's model.

    Raises:
        ArgumentsError: if settings are wrong, or `output_dir` was begun with other ones.
    """
    plan = Plan(study)
    # What PartialState reads from here on; by itself it does not see several processes on a CPU. They may be
    # hours apart where one of them is slow to read.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=24))
    accelerator = Accelerator(mixed_precision=plan.recipe.mixed_precision, kwargs_handlers=[patience])
    plan.recipe = replace(plan.recipe, mixed_precision=accelerator.mixed_precision)
    config = build_model(ViCMAEForPreTraining, plan.recipe).config
    plan.check_mask_ratios(config)
    claim_settings(
        asdict(plan.recipe)
        | {name: getattr(study, name) for name in [*CANDIDATES, "sweep_seed"]}
        | {"num_processes": accelerator.num_processes},
        plan.folder / "settings" / "study.json",
        f"{plan.folder} was begun with {{}}. Choose another --output_dir.",
    )
    return plan, config


def probe_references(plan: Plan, probes: StudyProbes) -> dict[str, list[dict[str, Any]]]:
    """Probes of what has learnt nothing: the pixels, and for every seed the encoder that its runs start from."""
    return {
        "raw_pixels": [probes.cached(plan.folder / "raw_pixels.json", probes.probe_pixels)],
        "untrained": [
            probes.cached(
                plan.folder / f"untrained-seed{seed}.json", lambda seed=seed: probes.probe(untrained(plan, seed))
            )
            for seed in range(plan.study.num_seeds)
        ],
    }


def tune(
    plan: Plan, pooling: str, train: Callable[[list[Run]], list[dict[str, Any]]]
) -> tuple[list[dict[str, Any]], dict[str, dict[str, float]]]:
    """
    Chooses the settings in `TUNED`, one after the other from the first candidates on: the value whose probe of
    `pooling` does best on held-out parts of the training labels, the first of equals. A setting with one candidate
    costs no run.

    Args:
        train: runs -> their results (see `train_and_probe`).

    Returns:
        Results of all runs that tried something, and the chosen values of each method.
    """
    results: dict[str, dict[str, Any]] = {}
    tuned = {}
    for method, names in TUNED.items():
        best = {name: plan.candidates[name][0] for name in names}
        for name in names:
            if len(plan.candidates[name]) == 1:
                continue
            tried = train([plan.trial(method, best | {name: value}) for value in plan.candidates[name]])
            results |= {result["name"]: result for result in tried}
            # What diverged is worse than anything.
            best = max(tried, key=lambda it: -1 if "diverged" in it else it["probe"][pooling]["top1"])["tuned"]
        tuned[method] = best
    return list(results.values()), tuned


def build_probes(study: StudyArguments, plan: Plan, config: ViCMAEConfig) -> StudyProbes:
    return StudyProbes(
        study.probe_train_data,
        study.probe_eval_data,
        build_processors(config)[0],
        MediaLoader(plan.recipe.video_backend, plan.recipe.seconds_per_file),
        num_frames=study.num_frames,
        label_fractions=study.label_fractions,
        num_subsets=study.num_subsets,
    )


def train_and_probe(runs: Sequence[Run], probes: StudyProbes, folder: Path) -> list[dict[str, Any]]:
    """What came out of each run, of those done before and of those done now."""
    results = []
    for number, run in enumerate(runs, start=1):
        output_dir = Path(run.settings.output_dir)
        # From this file `run_pretraining.py` would repeat the run.
        claimed = folder / "settings" / f"{run.name}.json"
        advice = f"{output_dir} was begun with {{}}. Choose another --output_dir, or delete that folder and {claimed}."
        claim_settings(asdict(run.settings), claimed, advice)
        if not (output_dir / RESULTS_FILE).exists():
            if PartialState().is_main_process:
                print(f"{number} of {len(runs)}: {run.name}", file=sys.stderr, flush=True)
            try:
                train_run(run.settings)
            except NonFiniteError as error:
                if run.part != "sweep":
                    raise
                results.append(describe_run(run) | {"diverged": str(error)})
                continue
        measure = probes.cross_validate if run.part == "sweep" else probes.probe
        probed = probes.cached(
            output_dir / "study_probe.json",
            lambda measure=measure, output_dir=output_dir: measure(
                ViCMAEModel.from_pretrained(output_dir, video=False)
            ),
        )
        results.append(summarize(run, probed))
    return results


def train_run(settings: PretrainingArguments) -> None:
    """What `run_pretraining.py` does with these settings, in this process."""
    accelerator = start_session(settings)
    model = build_model(ViCMAEForPreTraining, settings)
    run_pretraining(accelerator, model, settings)
    accelerator.free_memory()
    gc.collect()


def claim_settings(settings: dict[str, Any], path: Path, message: str) -> None:
    """
    Writes the settings that are not None, or compares them with those that are there.

    Raises:
        ArgumentsError: if they differ: the message, with the differences in place of `{}`.
    """
    settings = {name: value for name, value in settings.items() if value is not None}
    if PartialState().is_main_process and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
    PartialState().wait_for_everyone()
    found = read_json(path)
    differences = [
        f"{name} {found.get(name)}, now {settings.get(name)}"
        for name in sorted(found.keys() | settings.keys())
        if found.get(name) != settings.get(name)
    ]
    if differences:
        raise ArgumentsError(message.format("; ".join(differences)))


def check_budgets(results: Sequence[dict[str, Any]]) -> None:
    """Raises an ArgumentsError if runs were trained differently long, or on different numbers of files."""
    first, *others = (result for result in results if "diverged" not in result)
    for result in others:
        for name, value in result["budget"].items():
            if value != first["budget"][name]:
                raise ArgumentsError(
                    f"{result['name']} had {name} {value}, {first['name']} {first['budget'][name]}: they cannot be "
                    "compared. Was data added in between? Choose another --output_dir."
                )


def describe_run(run: Run) -> dict[str, Any]:
    return {
        "name": run.name,
        "part": run.part,
        "method": run.method,
        "seed": run.settings.seed,
        "tuned": run.tuned,
        "variant": run.variant,
    }


def summarize(run: Run, probed: dict[str, Any]) -> dict[str, Any]:
    """What the results of a study hold of a run."""
    folder = Path(run.settings.output_dir)
    budget = read_budget(folder)
    log = read_metrics(folder)
    # Lines of probes and of checkpoints between log lines have none of the figures.
    metrics = [line for line in log if "feature_std" in line]
    names = [f"{kind}_{figure}" for kind in ("feature", "projection") for figure in COLLAPSE]
    return describe_run(run) | {
        "probe": probed,
        "reconstruction_loss": metrics[-1]["reconstruction_loss"],
        "contrastive_loss": metrics[-1].get("contrastive_loss"),
        "projection_size": read_json(folder / "config.json")["projector_output_size"],
        "collapse": {name: metrics[-1][name] for name in names if name in metrics[-1]},
        "history": {name: [line[name] for line in metrics] for name in ("step", "feature_std", "feature_rank")},
        "budget": {name: budget[name] for name in ("num_steps", "total_batch_size", "num_train_files")},
        "train_seconds": seconds_of(metrics, budget["total_batch_size"]),
    }


def seconds_of(metrics: Sequence[dict[str, float]], batch_size: int) -> float:
    """How long the logged updates took, in however many sessions."""
    steps = [0, *(line["step"] for line in metrics)]
    return sum(
        (step - before) * batch_size / line["pairs_per_second"]
        for before, step, line in zip(steps, steps[1:], metrics, strict=False)
    )


def untrained(plan: Plan, seed: int) -> ViCMAEModel:
    """The encoder that the runs with this seed start from."""
    set_seed(seed)
    settings = replace(plan.recipe, seed=seed)
    return build_model(ViCMAEForPreTraining, settings).vicmae


def read_budget(folder: Path) -> dict[str, Any]:
    """What a run of the study had to spend, and on what."""
    arguments = read_json(folder / "arguments.json")
    results = read_results(folder)
    model = arguments["model"]
    return {
        "num_steps": arguments["num_steps"],
        "total_batch_size": arguments["total_batch_size"],
        "epochs": results["epochs"],
        "num_train_files": results["num_train_files"],
        **{
            name: arguments[name]
            for name in ("warmup_epochs", "weight_decay", "contrastive_start_epoch", "num_processes")
        },
        **{
            name: model[name]
            for name in ("image_size", "patch_size", "hidden_size", "num_hidden_layers", "mask_ratio", "temperature")
        },
    }


def device_name() -> str:
    """What the study ran on."""
    device = PartialState().device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} cores, {platform.machine()}"
