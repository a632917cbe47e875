"""Data and settings of unknown origin: nothing in them is run."""

import json
import os
import pickle
import re
import shutil

import av
import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hostile_files import (
    WantsToRunCode,
    assert_one_line,
    assert_was_not_run,
    hostile_code,
    load_pickle,
    load_torch_file,
    write_pickle,
    write_torch_file,
)
from launching import run_here
from local_hub import hub_of_this_process, run_local_hub
from runs import FROM_NOTHING, classify, pretrain, write_images
from video_files import numbered_frames, write_video

from vicmae_hf.data.media.images import ImageDecodingError, read_image
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.sources.sources import DataSourceError, open_source
from vicmae_hf.data.sources.tables import load_hub_dataset
from vicmae_hf.errors import MediaDecodingError
from vicmae_hf.media_reading_vicmae import read_video


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "marker"


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data")


def train_on(data, tmp_path, *flags):
    return pretrain(data, tmp_path / "out", *FROM_NOTHING, *flags)


# Tables


def pickled_type(marker):
    """A column as old Arrow described types of Python: by a pickle, which old Arrow loaded when it read the file."""
    extension = {
        "ARROW:extension:name": "arrow.py_extension_type",
        "ARROW:extension:metadata": pickle.dumps(WantsToRunCode(marker), protocol=2),
    }
    return pa.field("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())]), metadata=extension)


def hostile_table(data, marker):
    rows = [{"bytes": path.read_bytes(), "path": None} for path in sorted(data.rglob("*.png"))]
    features = json.dumps({"info": {"features": {"image": {"_type": "Image"}}}})
    field = pickled_type(marker)
    schema = pa.schema([field], metadata={"huggingface": features})
    return pa.Table.from_arrays([pa.array(rows, field.type)], schema=schema)


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_a_column_whose_type_is_a_pickle(kind, data, marker, tmp_path):
    table = hostile_table(data, marker)
    if kind == "parquet":
        path = tmp_path / "images.parquet"
        pyarrow.parquet.write_table(table, path)
    else:
        path = tmp_path / "saved"
        datasets.load_dataset("imagefolder", data_dir=str(data), split="train").save_to_disk(path)
        with pa.OSFile(str(next(path.glob("*.arrow"))), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
            stream.write_table(table)
        (path / "dataset_info.json").write_text(json.dumps({"features": {"image": {"_type": "Image"}}}))
    process = train_on(path, tmp_path)
    assert process.returncode == 0, process.stderr  # as the plain structure that it is
    metadata = table.schema.field("image").metadata[b"ARROW:extension:metadata"]
    assert_was_not_run(marker, lambda: pickle.loads(metadata))


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow", "store.json"])
def test_files_of_a_saved_dataset_that_are_pickles(name, data, marker, tmp_path):
    path = tmp_path / "saved"
    if name == "store.json":  # of a store that is not finished
        path.mkdir()
    else:
        datasets.load_dataset("imagefolder", data_dir=str(data), split="train").save_to_disk(path)
    write_pickle(path / name, marker)
    assert_one_line(train_on(path, tmp_path), path)
    assert_was_not_run(marker, lambda: load_pickle(path / name))


def test_parquet_that_is_a_pickle(marker, tmp_path):
    path = tmp_path / "images.parquet"
    write_pickle(path, marker)
    assert_one_line(train_on(path, tmp_path), path)
    assert_one_line(train_on(path, tmp_path, "--streaming"), path)
    assert_was_not_run(marker, lambda: load_pickle(path))


@pytest.mark.parametrize("name", ["store.json", "data-00000-of-00006.json"])
def test_a_store_to_go_on_with_that_holds_pickles(name, data, marker, tmp_path):
    flags = ["--input", data, "--output", tmp_path / "store", "--videos_per_shard", 1]
    assert run_here("pack_frames.py", *flags).returncode == 0
    path = tmp_path / "store" / name
    assert path.exists()
    write_pickle(path, marker)
    assert_one_line(run_here("pack_frames.py", *flags), path)
    assert_was_not_run(marker, lambda: load_pickle(path))


# Datasets that come with code


def run_code(path):
    exec(compile(path.read_text(), path, "exec"), {})


def test_a_folder_with_a_loading_script(data, marker, tmp_path):
    script = data / "data.py"
    script.write_text(hostile_code(marker))
    process = train_on(data, tmp_path)
    assert process.returncode == 0, process.stderr
    # This one is opened with `load_dataset`.
    (data / "train-0.parquet").write_bytes(b"no parquet")
    flags = ["--dataset", "imagenet", "--root", data, "--split", "train", "--output", tmp_path / "table"]
    assert_one_line(run_here("prepare_dataset.py", *flags), data)
    assert_was_not_run(marker, lambda: run_code(script))


@pytest.mark.parametrize(
    ("repository", "name", "reason"),
    [
        ("someone/scripted", "scripted.py", "Dataset scripts are no longer supported, but found scripted.py"),
        ("someone/pkl", "train.pkl", "No (supported) data files found in someone/pkl"),
        ("someone/pickled", "train.pickle", "No (supported) data files found in someone/pickled"),
    ],
)
def test_a_dataset_on_the_hub_that_would_run_code(repository, name, reason, marker, tmp_path):
    path = tmp_path / name
    is_script = path.suffix == ".py"
    path.write_text(hostile_code(marker)) if is_script else write_pickle(path, marker)
    with run_local_hub() as hub, hub_of_this_process(hub.url):
        hub.repositories[f"datasets/{repository}"] = {name: path.read_bytes()}
        for options in ({}, {"streaming": True}):
            expected = rf"{repository}: .*no dataset of that name could be loaded .*{re.escape(reason)}"
            with pytest.raises(DataSourceError, match=expected) as error:
                load_hub_dataset(repository, "train", **options)
            assert "\n" not in str(error.value)
    assert_was_not_run(marker, lambda: run_code(path) if is_script else load_pickle(path))


# Media


@pytest.mark.parametrize("name", ["0.jpg", "0.png", "0.webp", "0.mp4", "0.mkv"])
@pytest.mark.parametrize("kind", ["pickle", "torch file", "array"])
def test_media_that_are_pickles(kind, name, data, marker, tmp_path):
    path = data / "a" / name.replace("0", "media")
    if kind == "array":
        np.save(tmp_path / "array.npy", np.array([WantsToRunCode(marker)], dtype=object))
        shutil.move(tmp_path / "array.npy", path)
    else:
        (write_pickle if kind == "pickle" else write_torch_file)(path, marker)
    source, errors = open_source(str(data)), []
    for item in map(source.__getitem__, range(len(source))):
        try:
            item.open("pyav").close()
        except MediaDecodingError as error:
            errors.append(str(error))
    assert len(errors) == 1
    assert str(path) in errors[0]
    trust = {
        "pickle": load_pickle,
        "torch file": load_torch_file,
        "array": lambda path: np.load(path, allow_pickle=True),
    }[kind]
    assert_was_not_run(marker, lambda: trust(path))


def test_a_program_in_postscript_with_the_name_of_an_image(data, marker, tmp_path, monkeypatch):
    # In place of Ghostscript, which Pillow would start.
    interpreter = tmp_path / "programs" / "gs"
    interpreter.parent.mkdir()
    interpreter.write_text(f"#!/bin/sh\nmkdir -p {marker}\nexit 1\n")
    interpreter.chmod(0o755)
    monkeypatch.setenv("PATH", str(interpreter.parent), prepend=os.pathsep)
    program = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(ImageDecodingError, match="in no image format of JPEG, PNG"):
        read_image(program)
    (data / "a" / "program.jpg").write_bytes(program)
    process = train_on(data, tmp_path, "--max_bad_files", 0.5)
    assert process.returncode == 0, process.stderr

    def trust():
        from PIL import Image

        with pytest.raises(Exception, match="gs"), Image.open(data / "a" / "program.jpg") as image:
            image.load()

    assert_was_not_run(marker, trust)


def test_a_video_that_names_another_place(tmp_path):
    # Playlists, which FFmpeg would follow. The file that they name is there, outside the folder.
    write_video(tmp_path / "secret.ts", numbered_frames(4, 32, 32))
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / "a.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path}/secret.ts\n")
    (folder / "b.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{tmp_path}/secret.ts\n")
    (folder / "c.mp4").write_text("ffconcat version 1.0\nfile ../secret.ts\n")
    for item in open_source(str(folder)):
        with pytest.raises(ValueError, match=r"cannot decode .*\.mp4"):
            item.open("pyav")
    # These FFmpeg would follow: any file from one of this name, and a neighbour from one of any name.
    (folder / "d.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{tmp_path}/secret.ts\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "e.mp4").write_text("ffconcat version 1.0\nfile secret.ts\n")
    for path in (folder / "d.m3u8", tmp_path / "e.mp4"):
        with av.open(str(path)) as container:
            assert len(list(container.decode(video=0))) == 4
        with pytest.raises(ValueError, match=f"cannot decode {path}"):
            open_video(path)
        with pytest.raises(ValueError, match=f"{path}: expected a video that can be decoded"):
            read_video(str(path))


# Lists and settings


@pytest.mark.parametrize("dataset", ["kinetics400", "ssv2", "moments", "places365"])
def test_lists_that_are_pickles(dataset, data, marker, tmp_path):
    path = tmp_path / "list.csv"
    write_pickle(path, marker)
    flags = ["--dataset", dataset, "--root", data, "--split", "train", "--output", tmp_path / "table", "--media", data]
    process = run_here("prepare_dataset.py", *flags, "--annotations", path)
    assert_one_line(process)
    assert not (tmp_path / "table").exists()
    process = run_here("prepare_dataset.py", *flags, "--class_names", path)
    assert_one_line(process, path)
    assert_was_not_run(marker, lambda: load_pickle(path))


def test_class_names_that_are_a_pickle(data, marker, tmp_path):
    path = tmp_path / "names.txt"
    write_pickle(path, marker)
    assert_one_line(classify(data, tmp_path / "out", *FROM_NOTHING, "--label_names", path), path)
    packing = ["--input", data, "--output", tmp_path / "store", "--labelled", "--label_names", path]
    assert_one_line(run_here("pack_frames.py", *packing), path)
    assert_was_not_run(marker, lambda: load_pickle(path))


@pytest.mark.parametrize(
    "script", ["run_pretraining.py", "run_classification.py", "pack_frames.py", "run_evaluation.py"]
)
def test_settings_with_python_in_them(script, marker, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(f"output_dir: !!python/object/apply:os.mkdir ['{marker}']\n")
    assert_one_line(run_here(script, path), path, "python/object/apply:os.mkdir")
    assert_was_not_run(marker, lambda: yaml.unsafe_load(path.read_text()))


def test_a_config_override_with_python_in_it(data, marker, tmp_path):
    value = f"!!python/object/apply:os.mkdir ['{marker}']"
    process = pretrain(data, tmp_path / "out", "--config_overrides", f"hidden_size={value}")
    assert_one_line(process, "--config_overrides", value)
    assert_was_not_run(marker, lambda: yaml.unsafe_load(value))


@pytest.mark.parametrize("name", ["settings.json", "settings.yaml"])
def test_settings_that_are_a_pickle(name, marker, tmp_path):
    write_pickle(tmp_path / name, marker)
    assert_one_line(run_here("run_pretraining.py", tmp_path / name), tmp_path / name)
    assert_was_not_run(marker, lambda: load_pickle(tmp_path / name))


def test_the_recipe_of_a_study_with_python_in_it(data, marker, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"seed: !!python/object/apply:os.mkdir ['{marker}']\n")
    probing = ["--probe_train_data", data, "--probe_eval_data", data, "--output_dir", tmp_path / "study"]
    assert_one_line(run_here("run_study.py", "--recipe", path, "--train_data", data, *probing), path)
    assert_was_not_run(marker, lambda: yaml.unsafe_load(path.read_text()))
