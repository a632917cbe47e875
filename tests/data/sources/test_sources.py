import io
import os

import datasets
import numpy as np
import pytest
from launching import run_here
from local_hub import unreachable_hub
from PIL import Image
from video_files import numbered_frames, write_video

from vicmae_hf.data.sources.selection import refuse_dataset_in_data
from vicmae_hf.data.sources.sources import DataSourceError, SourceSettings, open_source
from vicmae_hf.errors import InputError


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(source):
    return [(source[index].media, source[index].is_video) for index in range(len(source))]


def encode(level):
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def image_table(*values):
    return datasets.Dataset.from_dict(
        {"label": list(range(len(values))), "picture": list(values)},
        features=datasets.Features({"label": datasets.Value("int64"), "picture": datasets.Image()}),
    )


def test_videos_and_images_of_any_nesting(tmp_path):
    make_files(
        tmp_path, "b.mp4", "train/deep/er/c.MKV", "train/a.JPeG", "test.webm", "sub/test/d.png", "e.avi", "f.mov"
    )
    make_files(tmp_path, "notes.txt", "mp4", ".hidden.mp4", "._b.mp4", ".cache/x.mp4", "labels.csv", "a.mp4.part")
    source = open_source(tmp_path)
    expected = {"b.mp4", "train/deep/er/c.MKV", "test.webm", "e.avi", "f.mov"}
    assert {media for media, is_video in listed(source) if is_video} == {str(tmp_path / name) for name in expected}
    images = {str(tmp_path / name) for name in ["train/a.JPeG", "sub/test/d.png"]}
    assert {media for media, is_video in listed(source) if not is_video} == images
    assert len(source) == 7
    assert all(source[index].name == source[index].media for index in range(7))


def test_the_order_of_files_is_the_same_wherever_they_were_copied(tmp_path):
    names = [f"{folder}/{index}.mp4" for folder in ["b", "a", "b/c"] for index in [10, 9, 1]]
    make_files(tmp_path / "first", *names)
    make_files(tmp_path / "second", *reversed(names))
    first, second = (
        [media.removeprefix(f"{tmp_path}/{copy}/") for media, _ in listed(open_source(tmp_path / copy))]
        for copy in ["first", "second"]
    )
    assert first == second
    assert {*first} == {*names}


def test_folders_behind_links(tmp_path):
    make_files(tmp_path, "disk/a.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "disk")
    assert listed(open_source(tmp_path / "data")) == [(str(tmp_path / "data" / "linked" / "a.mp4"), True)]


def test_home_folder(tmp_path, monkeypatch):
    make_files(tmp_path, "clips/a.mp4")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert listed(open_source("~/clips")) == [(str(tmp_path / "clips" / "a.mp4"), True)]


def test_parquet_with_images(tmp_path):
    first, second, third = encode(10), encode(20), encode(30)
    make_files(tmp_path, "data/readme.md")
    image_table({"bytes": first, "path": "one.png"}, {"bytes": second, "path": None}).to_parquet(
        tmp_path / "data" / "train-0.parquet"
    )
    image_table({"bytes": third, "path": None}).to_parquet(tmp_path / "data" / "train-1.parquet")
    folder = tmp_path / "data"
    assert listed(open_source(folder)) == [(first, False), (second, False), (third, False)]
    assert [open_source(folder)[index].name for index in range(2)] == [f"{folder}[0] (one.png)", f"{folder}[1]"]
    assert listed(open_source(folder / "train-1.parquet")) == [(third, False)]


def test_saved_dataset_of_paths_and_bytes(tmp_path):
    image, video = tmp_path / "a.png", tmp_path / "a.mp4"
    image.write_bytes(encode(10))
    write_video(video, numbered_frames(3))
    table = image_table({"path": str(image), "bytes": None}, {"path": None, "bytes": encode(20)})
    table.save_to_disk(tmp_path / "images")
    saved = open_source(tmp_path / "images")
    assert listed(saved) == [(image.read_bytes(), False), (encode(20), False)]
    features = datasets.Features({"clip": datasets.Video(), "title": datasets.Value("string")})
    rows = {"clip": [{"path": None, "bytes": video.read_bytes()}], "title": ["a"]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "videos")
    assert listed(open_source(tmp_path / "videos")) == [(video.read_bytes(), True)]


def test_row_without_media_is_an_unreadable_file(tmp_path):
    image_table(None, {"path": None, "bytes": encode(20)}).save_to_disk(tmp_path / "images")
    source = open_source(tmp_path / "images")
    assert source[0].media == b""
    assert source[0].name == f"{tmp_path}/images[0]"
    assert source[1].media == encode(20)


def error_of(name):
    with pytest.raises(DataSourceError) as raised:
        open_source(name)
    message = str(raised.value)
    assert message.startswith(str(name))
    assert "\n" not in message
    return message


def test_nothing_to_read(tmp_path):
    assert "no such file or folder" in error_of(tmp_path / "gone")
    assert "no such file or folder" in error_of("./gone")
    assert "no such file or folder" in error_of("a/relative/path")
    (tmp_path / "empty").mkdir()
    assert "among its 0 files" in error_of(tmp_path / "empty")
    make_files(tmp_path, "texts/a.txt", "texts/deep/b.csv")
    message = error_of(tmp_path / "texts")
    assert "among its 2 files" in message
    assert ".mp4" in message and ".jpg" in message
    with pytest.raises(InputError, match=r"a\.txt: is empty; expected a list of videos or images"):
        open_source(tmp_path / "texts" / "a.txt")


def test_tables_without_media(tmp_path):
    datasets.Dataset.from_dict({"text": ["a"], "label": [1]}).to_parquet(tmp_path / "text.parquet")
    message = error_of(tmp_path / "text.parquet")
    assert "expected a column of type Video or Image" in message
    assert "text, label" in message
    (tmp_path / "broken.parquet").write_text("PAR1 not")
    assert "broken.parquet: cannot be read as Parquet" in error_of(tmp_path / "broken.parquet")
    image_table().to_parquet(tmp_path / "no_rows.parquet")
    assert "no_rows.parquet: expected Parquet with rows, got none." in error_of(tmp_path / "no_rows.parquet")
    datasets.Dataset.from_dict({"text": ["a"]}).save_to_disk(tmp_path / "damaged")
    (tmp_path / "damaged" / "state.json").write_text("{}")
    assert "could not be read" in error_of(tmp_path / "damaged")


def test_file_name_that_is_no_text(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).touch()
    assert r"caf\udce9.mp4" in error_of(tmp_path)


@pytest.mark.parametrize("name", ["some-user/no-such-dataset", "no-such-dataset"])
def test_dataset_that_cannot_be_had_from_the_hub(name):
    with unreachable_hub():
        message = error_of(name)
        assert "no such folder, and no dataset of that name could be loaded" in message
        assert "refused" in message


def test_numbers_of_a_long_table(tmp_path):
    values = [{"path": None, "bytes": encode(level)} for level in range(50)]
    image_table(*values).to_parquet(tmp_path / "levels.parquet", batch_size=7)
    source = open_source(tmp_path / "levels.parquet")
    assert len(source) == 50
    levels = [np.array(Image.open(io.BytesIO(source[index].media)))[0, 0] for index in range(50)]
    assert levels == list(range(50))


def test_links_that_lead_back_are_followed_once(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "one.mp4").write_bytes(b"")
    (tmp_path / "clips" / "again").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "two.mp4").write_bytes(b"")
    (tmp_path / "clips" / "linked").symlink_to(tmp_path / "elsewhere")
    source = open_source(tmp_path / "clips")
    assert sorted(os.path.basename(source[index].name) for index in range(len(source))) == ["one.mp4", "two.mp4"]


def test_media_beside_parquet_files_is_an_error(tmp_path):
    (tmp_path / "one.mp4").write_bytes(b"")
    (tmp_path / "rows.parquet").write_bytes(b"")
    with pytest.raises(DataSourceError, match=r"both media files .*one.mp4.* and a dataset .*rows.parquet"):
        open_source(tmp_path)


def test_files_of_other_programs_beside_media(tmp_path):
    make_files(tmp_path, "a.mp4", "state.json", "deep/b.mp4", "deep/state.json", "lost+found/c.mp4")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    assert [media for media, _ in listed(open_source(tmp_path))] == [
        f"{tmp_path}/{n}" for n in ("a.mp4", "deep/b.mp4")
    ]


def test_one_file_is_a_source_of_one_item(tmp_path):
    make_files(tmp_path, "a clip [1].MP4", "b.png")
    assert listed(open_source(tmp_path / "a clip [1].MP4")) == [(f"{tmp_path}/a clip [1].MP4", True)]
    assert listed(open_source(tmp_path / "b.png")) == [(f"{tmp_path}/b.png", False)]


def test_output_folders_are_no_data(tmp_path, caplog):
    make_files(tmp_path, "a.mp4", "run/arguments.json", "run/metrics.jsonl", "run/plots/losses.png")
    make_files(tmp_path, "deep/evaluation/arguments.json", "deep/evaluation/all_results.json", "deep/evaluation/a.png")
    make_files(tmp_path, "settings/arguments.json", "settings/b.mp4")  # of something else
    files = [media for media, _ in listed(open_source(tmp_path))]
    assert files == [f"{tmp_path}/a.mp4", f"{tmp_path}/settings/b.mp4"]
    assert f"{tmp_path}/run: left out, because it is the output folder of a run" in caplog.text
    assert "is the output folder of a run" in error_of(tmp_path / "run")


@pytest.mark.parametrize("script", ["export_features.py", "pack_frames.py"])
def test_a_dataset_is_not_written_into_the_data(tmp_path, script):
    make_files(tmp_path, "data/a.mp4", "data/run/arguments.json", "data/run/metrics.jsonl")
    model = ["--model_name_or_path", "no_model"] if script == "export_features.py" else []
    place = tmp_path / "data" / "deep" / "x.parquet"
    process = run_here(script, tmp_path / "data", "--output", place, *model)
    assert process.returncode == 1
    assert process.stderr.startswith(f"error: --output {place} lies in the data, {tmp_path}/data, which would then ")
    for name in ("x.parquet", "data/run/x.parquet", "data/.kept/x.parquet", "data2/x.parquet"):
        refuse_dataset_in_data(tmp_path / name, str(tmp_path / "data"))
    refuse_dataset_in_data(place, "name/of_the_hub")


def test_a_saved_dataset_dict_asks_for_a_split(tmp_path):
    split = datasets.Dataset.from_dict({"image": []})
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataSourceError, match="name one of test, train"):
        open_source(tmp_path / "saved")


def test_what_is_not_read_is_counted_once(tmp_path, caplog):
    for name in [
        "a.mp4",
        "b.MTS",
        *(f"{number}.txt" for number in range(1200)),
        "1.xyz",
        "2.XYZ",
        "README",
        ".hidden",
    ]:
        (tmp_path / name).touch()
    for _ in range(2):
        assert len(open_source(tmp_path)) == 2
    [message] = caplog.messages
    assert message == f"{tmp_path}: 1,203 files were not read: .txt 1,200, .xyz 2, without extension 1"


def test_extensions_of_what_the_decoders_read(tmp_path):
    names = ["a.mts", "a.M2TS", "a.3gp", "a.vob", "a.asf", "a.ogv", "a.mxf", "a.mpe"]
    images = ["a.jfif", "a.jpe", "a.jp2", "a.avif", "a.pgm", "a.apng"]
    for name in names + images:
        (tmp_path / name).touch()
    source = open_source(tmp_path)
    assert {os.path.basename(item.media): item.is_video for item in map(source.__getitem__, range(len(source)))} == {
        **dict.fromkeys(names, True),
        **dict.fromkeys(images, False),
    }


def test_how_much_is_found_is_said_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="vicmae_hf")
    for name in ("a/1.mp4", "a/2.MOV", "b/3.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "list.txt").write_text("a/1.mp4\na/1.mp4\nb/3.png\n")
    for _ in range(2):
        open_source(tmp_path)
        open_source(tmp_path / "list.txt")
        open_source(tmp_path / "b", SourceSettings(frame_folders=True, source_frames_per_second=5))
    assert [record.getMessage() for record in caplog.records if record.levelname == "INFO"] == [
        f"{tmp_path}: 2 videos, 1 images.",
        f"{tmp_path}/list.txt: 2 videos, 1 images.",
        f"{tmp_path}/b: 1 videos, 0 images.",
    ]
