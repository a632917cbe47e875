"""The study on images: pretrains, probes, and finetunes on parts of the labels."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from study_plan import TUNED, Plan, Run, StudyArguments
from study_probes import StudyProbes
from study_runs import build_probes, open_study, probe_references, read_budget, train_and_probe, train_run, untrained

import vicmae_hf
from vicmae_hf.data.sources.tables import load_hub_dataset
from vicmae_hf.errors import InputError
from vicmae_hf.files import partial_file
from vicmae_hf.modeling_vicmae import ViCMAEModel
from vicmae_hf.processors import build_processors

from . import peers
from .plan import RealArguments, claim_recipes, once, read_recipe, say


# On which steps depend that are done once, beside the recipe of the runs, which `open_study` claims.
IMAGE_SETTINGS = ["images", "num_probe_images", "num_test_images", "long_updates", "long_checkpointing_steps"]


def study_images(real: RealArguments) -> dict[str, Any]:
    """Runs what is not done yet; returns everything that the report says about images."""
    claim_recipes(real, "images", IMAGE_SETTINGS, ["finetuning_recipe"])
    data = prepare_data(real)
    study = study_settings(real, data)
    plan, config = open_study(study)
    probes = build_probes(study, plan, config)
    references = probe_references(plan, probes)
    runs = plan.reported(plan_values(plan))
    cpu = {run.name: train_once(run, plan.folder) for run in runs}
    results = train_and_probe(runs, probes, plan.folder)
    rows = [entry | {"row": entry["method"], "cpu_seconds": cpu[entry["name"]]} for entry in results]
    encoders = {(row["row"], row["seed"]): str(plan.folder / "runs" / row["name"]) for row in rows}
    encoders |= save_untrained(plan)
    rows += train_peers(real, plan, config, probes)
    return {
        "data": probes.cached(plan.folder / "probe_data.json", probes.describe),
        "budget": read_budget(plan.folder / "runs" / "vicmae-seed0"),
        "references": references,
        "runs": rows,
        "has_lightly": peers.is_installed(),
        "long": probe_long_runs(real, plan, probes),
        "finetuned": finetune_all(real, data, encoders),
    }


def prepare_data(real: RealArguments) -> dict[str, str]:
    """
    Writes the splits as Parquet files with the columns `image` and `label`: all training images; and those that probes
    learn from, and the test images, both drawn once by a seed.
    """
    folder = real.folder / "data"
    paths = {name: str(folder / f"{name}.parquet") for name in ("train", "probe", "test")}
    if all(Path(path).exists() for path in paths.values()):
        return paths
    folder.mkdir(parents=True, exist_ok=True)
    train, test = (read_split(real.images, split) for split in ("train", "test"))
    for name, split, count in (("probe", train, real.num_probe_images), ("test", test, real.num_test_images)):
        write_split(split.shuffle(seed=0).select(range(min(count, len(split)))), paths[name])
    write_split(train, paths["train"])
    return paths


def write_split(split: datasets.Dataset, path: str) -> None:
    with partial_file(Path(path)) as partial:  # a file that a kill cut would be taken for whole
        split.to_parquet(partial)


def read_split(images: str, split: str) -> datasets.Dataset:
    path = Path(images) / f"{split}.parquet"
    if Path(images).exists() and not path.exists():
        raise InputError(f"{path}: no such file; expected a folder with train.parquet and test.parquet.")
    table = datasets.Dataset.from_parquet(str(path)) if path.exists() else load_hub_dataset(images, split)
    # The Hub's CIFAR-10 calls it `img`.
    table = table.rename_column("img", "image") if "img" in table.column_names else table
    return table.select_columns(["image", "label"]).cast_column("image", datasets.Image(decode=False))


def study_settings(real: RealArguments, data: dict[str, str]) -> StudyArguments:
    """Settings of `run_study.py` for one value of everything: nothing is tuned, and there are no frame gaps."""
    return StudyArguments(
        recipe=real.image_recipe,
        train_data=[data["train"]],
        probe_train_data=data["probe"],
        probe_eval_data=data["test"],
        output_dir=str(real.folder / "images"),
        num_seeds=real.num_seeds,
        learning_rate_factors=[1.0],
        contrastive_weights=[real.contrastive_weight],
        vicreg_invariance_weights=[real.vicreg_invariance_weight],
        frame_gaps=[],
        label_fractions=real.label_fractions,
        num_subsets=1,
        num_frames=1,
    )


def train_once(run: Run, folder: Path) -> float:
    """Trains a run unless it is done, and returns its CPU seconds."""

    def train() -> dict[str, Any]:
        say(f"images: {run.name}")
        train_run(run.settings)
        return {}

    return once(folder / "cpu" / f"{run.name}.json", train)["cpu_seconds"]


def train_peers(real: RealArguments, plan: Plan, config: Any, probes: StudyProbes) -> list[dict[str, Any]]:
    if not peers.is_installed():
        say("images: no peers, lightly is not installed (pip install lightly timm)")
        return []
    results = []
    lengths = [("simclr", count) for count in real.simclr_updates]
    lengths += [("lightly_mae", count) for count in real.lightly_mae_updates]
    for seed in range(real.num_seeds):
        for method, count in lengths:
            name = f"{method}-{count}-seed{seed}"
            settings = replace(plan.recipe, output_dir=str(plan.folder / "runs" / name), seed=seed)
            trained = once(
                plan.folder / "cpu" / f"{name}.json", partial(train_peer, name, method, config, settings, count)
            )
            probed = probe_folder(probes, Path(settings.output_dir))
            results.append({"name": name, "row": f"{method}-{count}", "seed": seed, "probe": probed} | trained)
    return results


def train_peer(name: str, *arguments: Any) -> dict[str, Any]:
    say(f"images: {name}")
    return peers.train_peer(*arguments)


def probe_folder(probes: StudyProbes, folder: Path) -> dict[str, Any]:
    return probes.cached(
        folder / "study_probe.json", lambda: probes.probe(ViCMAEModel.from_pretrained(folder, video=False))
    )


def save_untrained(plan: Plan) -> dict[tuple[str, int], str]:
    """Saves the encoders that the runs start from, for finetuning: folder by ("untrained", seed)."""
    folders = {}
    for seed in range(plan.study.num_seeds):
        folder = plan.folder / "runs" / f"untrained-seed{seed}"
        if not (folder / "model.safetensors").exists():
            model = untrained(plan, seed)
            for processor in build_processors(model.config):
                processor.save_pretrained(folder)
            model.save_pretrained(folder)
        folders["untrained", seed] = str(folder)
    return folders


def probe_long_runs(real: RealArguments, plan: Plan, probes: StudyProbes) -> dict[str, Any]:
    """Trains methods longer, seed 0 of each, and probes the checkpoints: `points` of updates and probes by method."""
    runs = {run.method: run for run in plan.reported(plan_values(plan)) if run.settings.seed == 0}
    found = {}
    for method in real.long_methods:
        folder = plan.folder / "runs" / f"{method}-long"
        settings = replace(
            runs[method].settings,
            output_dir=str(folder),
            max_train_steps=real.long_updates,
            checkpointing_steps=real.long_checkpointing_steps,
            save_total_limit=None,
        )
        cpu_seconds = train_once(replace(runs[method], name=folder.name, settings=settings), plan.folder)
        # The last update has a checkpoint, too.
        steps = [step for step in range(1, real.long_updates + 1) if (folder / f"checkpoint-{step}").exists()]
        points = [{"step": step, "probe": probe_folder(probes, folder / f"checkpoint-{step}")} for step in steps]
        found[method] = {"points": points, "cpu_seconds": cpu_seconds}
    return found


def plan_values(plan: Plan) -> dict[str, dict[str, float]]:
    """The only values of the settings that `run_study.py` would tune."""
    return {method: {name: plan.candidates[name][0] for name in names} for method, names in TUNED.items()}


def finetune_all(
    real: RealArguments, data: dict[str, str], encoders: dict[tuple[str, int], str]
) -> list[dict[str, Any]]:
    """Table 5's protocol: the whole encoder, on shares of the labels. Seed by seed, so that rows fill up together."""
    recipe = read_recipe(real.finetuning_recipe)
    results = []
    for seed in range(real.num_finetuning_seeds):
        for fraction in real.label_fractions:
            for row in dict.fromkeys(row for row, _ in encoders):
                results.append(finetune(real, data, encoders[row, seed], recipe, row, fraction, seed))
    return results


def finetune(
    real: RealArguments,
    data: dict[str, str],
    encoder: str,
    recipe: dict[str, Any],
    row: str,
    fraction: float,
    seed: int,
) -> dict[str, Any]:
    name = f"{row}-{100 * fraction:g}-seed{seed}"
    folder = real.folder / "images" / "finetuned" / name

    def run() -> dict[str, Any]:
        say(f"images: finetuning {name}")
        results = vicmae_hf.finetune(
            data["train"],
            eval_data=data["test"],
            task="image",
            output_dir=folder,
            model_name_or_path=encoder,
            label_fraction=fraction,
            seed=seed,
            overwrite_output_dir=True,  # of what an interrupted run left
            **recipe,
        )
        return {"top1": results["eval_top1"], "num_train_files": results["num_train_files"]}

    result = once(folder / "result.json", run)
    return {"row": row, "fraction": fraction, "seed": seed} | result
