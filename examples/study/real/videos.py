"""The study on videos: each person in turn is held out; the others are pretrained and finetuned on."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import vicmae_hf
from vicmae_hf.commands import pack
from vicmae_hf.errors import InputError
from vicmae_hf.files import write_csv

from .plan import RealArguments, claim_recipes, once, read_recipe, say


STARTS = {"pretrained": "pretrained", "scratch": "from scratch"}
SUFFIX = ".mp4"


@dataclass(frozen=True)
class Fold:
    """Frame stores of the clips of all people but one, and of the one."""

    person: str
    train: Path
    test: Path


def study_videos(real: RealArguments) -> dict[str, Any] | None:
    """Runs what is not done yet; returns everything that the report says about videos. None if there are none."""
    if real.videos is None:
        return None
    claim_recipes(real, "videos", ["videos"], ["video_recipe", "video_finetuning_recipe"])
    folder = real.folder / "videos"
    folds = pack_folds(Path(real.videos), folder / "stores")
    results = []
    for seed in range(real.num_video_seeds):
        for fold in folds:
            place = folder / "runs" / f"{fold.person}-seed{seed}"
            pretrained = once(place / "pretraining.json", partial(pretrain, real, fold, place, seed))
            for start in STARTS:
                result = once(place / f"{start}.json", partial(finetune, real, fold, place, seed, start))
                results.append({"person": fold.person, "seed": seed, "start": start} | result)
                if start == "pretrained":
                    results[-1]["pretraining"] = pretrained
    return {"runs": results, "num_people": len(folds), "num_seeds": real.num_video_seeds}


def pack_folds(videos: Path, folder: Path) -> list[Fold]:
    """
    Packs all frames of the clips, at their size, once for each fold: decoding videos would take longer than training
    on them. Raises an InputError if there are fewer than two people.
    """
    clips = sorted(videos.glob(f"*/*{SUFFIX}"))
    people = sorted({clip.stem for clip in clips})
    if len(people) < 2:
        raise InputError(f"{videos}: expected CLASS/PERSON{SUFFIX} of at least 2 people, got {len(people)}.")
    folds = []
    for person in people:
        fold = Fold(person, folder / person / "train", folder / person / "test")
        for store, is_test in ((fold.train, False), (fold.test, True)):
            if not (store / "state.json").exists():  # which a store gets last
                rows = [(clip.resolve(), clip.parent.name) for clip in clips if (clip.stem == person) == is_test]
                store.parent.mkdir(parents=True, exist_ok=True)
                write_csv(store.with_suffix(".csv"), ["path", "label"], rows)
                source = {"input": str(store.with_suffix(".csv")), "labelled": True}
                pack.run(pack.PackingArguments(**source, output=str(store), frames_per_second=0, short_side=0))
        folds.append(fold)
    return folds


def pretrain(real: RealArguments, fold: Fold, place: Path, seed: int) -> dict[str, Any]:
    say(f"videos: pretraining without {fold.person}, seed {seed}")
    results = vicmae_hf.pretrain(
        fold.train,
        output_dir=place / "pretrained",
        seed=seed,
        overwrite_output_dir=True,  # of what an interrupted run left
        **read_recipe(real.video_recipe),
    )
    return {name: results[name] for name in ("num_steps", "epochs", "reconstruction_loss")}


def finetune(real: RealArguments, fold: Fold, place: Path, seed: int, start: str) -> dict[str, Any]:
    """Finetunes the video model, and shows it the held-out clips: as they are, shuffled, and with frames repeated."""
    say(f"videos: finetuning without {fold.person}, {STARTS[start]}, seed {seed}")
    output_dir = place / f"{start}-finetuned"
    settings = read_recipe(real.video_finetuning_recipe)
    if start == "pretrained":
        settings["model_name_or_path"] = place / "pretrained"
    else:  # of the same shape
        shape = read_recipe(real.video_recipe)
        settings |= {name: shape[name] for name in ("config_overrides", "image_size")}
    vicmae_hf.finetune(
        fold.train,
        eval_data=fold.test,
        task="video",
        output_dir=output_dir,
        seed=seed,
        overwrite_output_dir=True,
        **settings,
    )
    evaluation = vicmae_hf.evaluate(
        fold.test,
        model_name_or_path=output_dir,
        output_dir=place / f"{start}-evaluated",
        temporal_ablation=True,
        seed=seed,
        dataloader_num_workers=0,
    )
    ablation = evaluation["temporal_ablation"]
    return {"num_clips": evaluation["num_eval_samples"]} | {kind: ablation[kind]["eval_top1"] for kind in ablation}
