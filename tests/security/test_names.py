"""Names that would lead out of the output folder: nothing outside it is written, changed or removed."""

import json
import shutil

import datasets
import pytest
from hostile_files import assert_one_line
from launching import run_here
from runs import FROM_NOTHING, QUICK, classify, evaluate, export, pretrain, write_images

from vicmae_hf.convert_checkpoint import main as convert


NAMES = ["../../up.png", "/absolute.png", "new\nline.png", "..", ".partial-x", "a\\..\\b.png"]
CLASSES = ["../../up", "/absolute", "new\nline"]


def contents(folder):
    """Every file and folder below, with what files hold and links lead to."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[path] = path.readlink()
        else:
            found[path] = path.read_bytes() if path.is_file() else None
    return found


@pytest.fixture
def place(tmp_path):
    """A folder deep enough that names can lead out of it, and files around it."""
    images = write_images(tmp_path / "images")
    rows = {
        "image": [str(path) for path in sorted(images.rglob("*.png"))],
        "name": NAMES,
        "label": [0, 1, 2, 0, 1, 2],
    }
    features = {
        "image": datasets.Image(),
        "name": datasets.Value("string"),
        "label": datasets.ClassLabel(names=CLASSES),
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "table")
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    return tmp_path


def assert_stays(place, run, output):
    """`run` succeeds, and changes nothing but `output`, below which everything is a file of its own."""
    ignored = place / "datasets_cache"
    before = contents(place)
    process = run()
    assert process.returncode == 0, process.stderr
    inside = {output, *output.rglob("*")}
    after = {path: content for path, content in contents(place).items() if path not in inside}
    kept = {path: content for path, content in after.items() if not path.is_relative_to(ignored)}
    assert kept == {path: content for path, content in before.items() if not path.is_relative_to(ignored)}
    assert not [path for path in inside if path.is_symlink()]


def test_a_store_of_hostile_names(place):
    output = place / "deep" / "deeper" / "store"
    flags = ["--input", place / "table", "--output", output, "--labelled", "--videos_per_shard", 2]
    assert_stays(place, lambda: run_here("pack_frames.py", *flags), output)
    store = datasets.load_from_disk(str(output))
    assert sorted(store["name"]) == sorted(NAMES)
    assert {path.suffix for path in output.iterdir()} == {".arrow", ".json"}


def test_training_evaluation_and_features_of_hostile_names(place):
    output = place / "deep" / "deeper" / "out"
    flags = [*FROM_NOTHING, "--checkpointing_steps", 1]
    assert_stays(place, lambda: classify(place / "table", output, *flags), output)
    evaluation, features = output.with_name("evaluation"), output.with_name("features.parquet")
    assert_stays(place, lambda: evaluate(output, place / "table", evaluation), evaluation)
    assert_stays(place, lambda: export(output, place / "table", features), features)
    config = json.loads((output / "config.json").read_text())
    assert list(config["id2label"].values()) == CLASSES


@pytest.mark.parametrize("name", ["../../up", "/absolute", "new\nline"])
def test_a_list_of_hostile_names(name, place):
    media = place / "media"
    shutil.copytree(place / "images" / "a", media)
    (place / "names.json").write_text(json.dumps({"Holding [something]": "0"}))
    entries = [{"id": key, "template": "Holding [something]", "label": "x"} for key in ("0", name)]
    (place / "list.json").write_text(json.dumps(entries))
    output = place / "deep" / "deeper" / "table"
    flags = ["--dataset", "ssv2", "--root", place, "--split", "train", "--annotations", place / "list.json"]
    flags += ["--media", media, "--output", output]
    before = contents(place)
    process = run_here("prepare_dataset.py", *flags)
    assert_one_line(process)  # no video of these names is there
    assert contents(place) == before


def test_folders_that_lead_elsewhere_are_read_and_not_written(place):
    data = place / "linked"
    (data / "a").mkdir(parents=True)
    (data / "b").symlink_to(place / "images" / "b")
    (data / "a" / "0.png").symlink_to(place / "images" / "a" / "0.png")
    (data / "loop").symlink_to(data)
    output = place / "deep" / "store"
    assert_stays(place, lambda: run_here("pack_frames.py", "--input", data, "--output", output, "--labelled"), output)
    assert len(datasets.load_from_disk(str(output))) == 3


@pytest.mark.parametrize("name", ["config.json", "bad_files.jsonl", "README.md", "plots/losses.png", "plots"])
def test_a_run_that_would_write_through_a_link(name, place):
    output = place / "deep" / "run"
    flags = [*FROM_NOTHING, *QUICK, "--checkpointing_steps", 1]
    assert pretrain(place / "images", output, *flags).returncode == 0
    path = output / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    target = place / "precious"
    target.mkdir() if name == "plots" else target.write_text("precious")
    path.symlink_to(target)
    before = contents(place)
    for going_on in (["--resume_from_checkpoint", "latest"], ["--overwrite_output_dir"]):
        assert_one_line(pretrain(place / "images", output, *flags, *going_on, steps=2), path, "is a link")
    assert contents(place) == before


def test_the_shards_of_a_checkpoint_to_convert(place, monkeypatch):
    from transformers import ViTMAEConfig

    folder = place / "deep" / "mae"
    ViTMAEConfig().save_pretrained(folder)
    for shard in ("../../images/a/0.png", "/etc/passwd"):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": shard}}))
        before = contents(place)
        monkeypatch.setattr("sys.argv", ["convert", "--checkpoint", str(folder), "--output_dir", str(place / "out")])
        with pytest.raises(
            SystemExit, match=r"index\.json: expected weight_map, from names of tensors to names of files beside it"
        ):
            convert()
        assert contents(place) == before
