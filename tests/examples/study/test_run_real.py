"""`run_real.py`: on a few images and clips from end to end, its folds, and that lightly's encoders become ours."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
import yaml
from launching import run_here, undone
from pictures import drawn
from PIL import Image
from real.images import IMAGE_SETTINGS, prepare_data, study_images
from real.plan import RealArguments, claim_recipes, once
from real.report import differences_section, write_report
from real.videos import pack_folds, study_videos
from tiny_models import shake, tiny_config, tiny_overrides
from video_files import numbered_frames, write_video

from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.errors import InputError
from vicmae_hf.modeling_vicmae import ViCMAEModel
from vicmae_hf.settings import ArgumentsError


CLASSES = ["bend", "jumping jack"]
PEOPLE = ["person1", "person2"]
TRAINING = {"dataloader_num_workers": 0, "warmup_epochs": 0, "max_train_steps": 4, "base_learning_rate": 0.01}
FINETUNING = {"rand_augment_magnitude": 0, "mixup": 0, "checkpointing_steps": 0}


def write_images(folder, num_train: int, num_test: int) -> None:
    """CIFAR-10 as the Hub has it, but of three classes, which are a colour each."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", num_train), ("test", num_test)):
        labels = [index % 3 for index in range(count)]
        pixels = generator.integers(0, 100, (count, 32, 32, 3), dtype=np.uint8)
        pixels[np.arange(count), :, :, labels] += 150
        images = [Image.fromarray(each) for each in pixels]
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(folder / f"{split}.parquet")


def write_videos(folder) -> None:
    for label, class_name in enumerate(CLASSES):
        (folder / class_name).mkdir(parents=True)
        for seed, person in enumerate(PEOPLE):
            frames = numbered_frames(12 + seed, 32, 32, seed=2 * label + seed)
            write_video(folder / class_name / f"{person}.mp4", frames, fps=10)


def write_plan(folder) -> dict:
    """Writes recipes that take seconds; returns the settings of `run_real.py` with them."""
    shape = {"image_size": 32, "config_overrides": tiny_overrides(num_frames=4, tubelet_size=2)}
    batch = {"per_device_train_batch_size": 8}
    recipes = {
        "image_recipe": TRAINING | shape | batch | {"contrastive_start_epoch": 0, "logging_steps": 2},
        "finetuning_recipe": TRAINING | batch | FINETUNING,
        "video_recipe": TRAINING | shape | batch | {"contrastive_start_epoch": 0, "checkpointing_steps": 0},
        "video_finetuning_recipe": TRAINING | FINETUNING | {"num_frames": 4, "per_device_train_batch_size": 2},
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    return {name: str(folder / f"{name}.yaml") for name in recipes} | {
        "num_seeds": 2,
        "num_probe_images": 24,
        "num_test_images": 9,
        "label_fractions": [0.5, 1.0],
        "long_methods": ["vicmae"],
        "long_updates": 5,
        "long_checkpointing_steps": 2,
    }


@pytest.mark.slow
def test_a_study_of_a_few_images_and_clips(tmp_path):
    write_images(tmp_path / "images", 48, 12)
    write_videos(tmp_path / "videos")
    plan = write_plan(tmp_path) | {"simclr_updates": [3], "lightly_mae_updates": [4]}
    (tmp_path / "real.yaml").write_text(yaml.safe_dump(plan))
    flags = [tmp_path / "real.yaml", "--images", tmp_path / "images", "--videos", tmp_path / "videos"]
    flags += ["--output_dir", tmp_path / "out", "--report", tmp_path / "docs" / "report.md"]
    with drawn():
        process = run_here("run_real.py", *flags)
    assert process.returncode == 0, process.stderr
    report = (tmp_path / "docs" / "report.md").read_text()
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    images, videos = results["images"], results["videos"]

    data = images["data"]
    assert [data[f"num_{kind}"] for kind in ("classes", "train_samples", "eval_samples")] == [3, 24, 9]
    ours = {"mae", "mae_simsiam", "mae_vicreg", "vicmae"}
    rows = set(ours)
    if images["has_lightly"]:
        rows |= {"simclr-3", "lightly_mae-4"}
        assert "lightly's SimCLR, 3 updates" in report
    else:
        assert "no peers, lightly is not installed" in process.stderr
        assert "its rows were not run" in report
    assert {(run["row"], run["seed"]) for run in images["runs"]} == {(row, seed) for row in rows for seed in (0, 1)}
    points = {(run["row"], run["fraction"], run["seed"]) for run in images["finetuned"]}
    assert points == {(row, share, seed) for row in ours | {"untrained"} for share in (0.5, 1.0) for seed in (0, 1)}
    assert {run["num_train_files"] for run in images["finetuned"]} == {24, 48}
    assert [point["step"] for point in images["long"]["vicmae"]["points"]] == [2, 4, 5]

    found = {(run["person"], run["start"]): run["num_clips"] for run in videos["runs"]}
    assert found == {(person, start): 2 for person in PEOPLE for start in ("pretrained", "scratch")}
    pictures = ["methods", "finetuned", "curve", "reconstructions"]
    for name in pictures:
        assert f"images/report_{name}.png" in report
        with Image.open(tmp_path / "docs" / "images" / f"report_{name}.png") as picture:
            assert min(picture.size) > 200

    # Again: nothing is run, and the report is the same.
    again = run_here("run_real.py", *flags)
    assert again.returncode == 0, again.stderr
    assert "images:" not in again.stderr.replace("images: no peers", "")
    assert "videos:" not in again.stderr
    assert (tmp_path / "docs" / "report.md").read_text() == report


def test_the_person_held_out_is_in_no_training_clip(tmp_path):
    write_videos(tmp_path / "videos")
    folds = pack_folds(tmp_path / "videos", tmp_path / "stores")
    assert [fold.person for fold in folds] == PEOPLE
    for fold in folds:
        train, test = (open_labelled(store) for store in (fold.train, fold.test))
        assert train.class_names == test.class_names == CLASSES
        assert sorted(train.labels) == sorted(test.labels) == [0, 1]
        assert all(fold.person in name for name in test.list_names())
        assert not any(fold.person in name for name in train.list_names())
    with pytest.raises(InputError, match="at least 2 people, got 0"):
        pack_folds(tmp_path / "stores", tmp_path / "others")


def test_a_step_is_done_once(tmp_path):
    calls = []

    def compute() -> dict:
        calls.append(1)
        return {"value": 3}

    first, second = (once(tmp_path / "new" / "step.json", compute) for _ in range(2))
    assert first == second
    assert first["value"] == 3
    assert first["cpu_seconds"] >= 0
    assert len(calls) == 1


def test_steps_of_other_settings_are_refused(tmp_path):
    plan = write_plan(tmp_path) | {"output_dir": str(tmp_path / "out")}
    plan |= {"images": str(tmp_path / "images"), "videos": str(tmp_path / "videos")}
    write_images(tmp_path / "images", 12, 6)
    with undone():
        for _ in range(2):
            claim_recipes(RealArguments(**plan), "images", IMAGE_SETTINGS, ["finetuning_recipe"])
        prepare_data(RealArguments(**plan))
        for change in ({"num_test_images": 5}, {"long_updates": 7}):
            with pytest.raises(ArgumentsError, match=rf"was begun with {next(iter(change))} "):
                study_images(RealArguments(**plan | change))
        (tmp_path / "video_recipe.yaml").write_text(yaml.safe_dump({"max_train_steps": 3}))
        claim_recipes(RealArguments(**plan), "videos", ["videos"], ["video_recipe", "video_finetuning_recipe"])
        (tmp_path / "video_recipe.yaml").write_text(yaml.safe_dump({"max_train_steps": 4}))
        with pytest.raises(ArgumentsError, match=r"was begun with video_recipe \{'max_train_steps': 3\}, now"):
            study_videos(RealArguments(**plan))


def test_data_that_a_kill_cut_are_written_again(tmp_path, monkeypatch):
    write_images(tmp_path / "images", 12, 6)
    plan = write_plan(tmp_path) | {"output_dir": str(tmp_path / "out"), "images": str(tmp_path / "images")}
    to_parquet = datasets.Dataset.to_parquet

    def cut(table, path):
        to_parquet(table, path)
        if "train" in str(path):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(datasets.Dataset, "to_parquet", cut)
        prepare_data(RealArguments(**plan))
    assert not (tmp_path / "out" / "data" / "train.parquet").exists()
    paths = prepare_data(RealArguments(**plan))
    assert len(datasets.Dataset.from_parquet(paths["train"])) == 12


def test_pictures_lie_beside_the_report_whatever_its_folder_is_called(tmp_path, monkeypatch):
    drawn = []
    for function in ("plot_methods", "plot_fractions", "shutil.copy"):
        monkeypatch.setattr(f"real.report.{function}", lambda *arguments: drawn.append(arguments[-1]))
    monkeypatch.setattr("real.report.run_section", lambda *arguments: "")
    references = {"untrained": [], "raw_pixels": [{"top1": 30.0, "knn_top1": 20.0}]}
    finetuned = [{"row": "mae", "fraction": 1.0, "seed": 0, "top1": 50.0, "num_train_files": 8}]
    images = {"runs": [], "finetuned": finetuned, "long": {}, "references": references, "has_lightly": True}
    results = {"images": images | {"data": {"num_classes": 10}}, "videos": None}
    write_report(SimpleNamespace(folder=tmp_path), results, tmp_path / "NAME" / "report.md")
    names = ["report_methods.png", "report_finetuned.png", "report_reconstructions.png"]
    assert drawn == [tmp_path / "NAME" / "images" / name for name in names]


def test_differences_are_taken_seed_by_seed():
    def probes(*values: float) -> list[dict]:
        return [{"cls": {"top1": value}, "mean": {"top1": value - 10}} for value in values]

    runs = [{"row": "vicmae", "seed": seed, "probe": probe} for seed, probe in enumerate(probes(50, 44))]
    text = differences_section({"runs": runs, "references": {"untrained": probes(40, 45)}})
    # +10 and -1: mean 4.5, deviation 11 / sqrt(2).
    assert "| ViC-MAE | +4.5 ± 7.8 | 1 of 2 | +4.5 ± 7.8 | 1 of 2 |" in text


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ArgumentsError, match="--videos needs --video_recipe"):
        RealArguments(output_dir="o", image_recipe="a", finetuning_recipe="b", videos="folder")
    with pytest.raises(ArgumentsError, match=r"--long_methods: expected some of mae, .* got dino"):
        RealArguments(output_dir="o", image_recipe="a", finetuning_recipe="b", long_methods=["dino"])
    with pytest.raises(ArgumentsError, match="expected 1 among them"):
        RealArguments(output_dir="o", image_recipe="a", finetuning_recipe="b", label_fractions=[0.5])


def test_an_encoder_of_lightly_becomes_one_of_ours_with_the_same_features(tmp_path):
    pytest.importorskip("lightly")
    from real.peers import build_encoder, save_encoder

    encoder = shake(build_encoder(tiny_config())).eval()
    save_encoder(encoder, tiny_config(), tmp_path)
    model = ViCMAEModel.from_pretrained(tmp_path, video=False).eval()
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images).last_hidden_state, encoder.encode(images), rtol=1e-4, atol=1e-5)
