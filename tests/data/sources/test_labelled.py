import logging

import datasets
import numpy as np
import pytest
from local_hub import hub_of_this_process, run_local_hub
from packed_stores import pack
from PIL import Image

from vicmae_hf.data.preparing.packing import PackingInput
from vicmae_hf.data.sources.labelled import HeldOutSettings, open_labelled, open_with_labels, read_class_names
from vicmae_hf.data.sources.sources import SourceSettings, open_source
from vicmae_hf.errors import InputError


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listed(source, root):
    names = [source[index].name.removeprefix(f"{root}/") for index in range(len(source))]
    return list(zip(names, source.labels.tolist(), strict=True))


def test_classes_follow_sorted_names(tmp_path):
    make_files(tmp_path, "wash/b.mp4", "wash/a.JPG", "jump/c.webm", "Zoo/d.png")
    # No class folders, no media, or hidden (macOS leaves files like ._b.mp4).
    make_files(tmp_path, "readme.txt", "loose.mp4", "sing/notes.txt", ".cache/x.mp4", "wash/._b.mp4")
    source = open_labelled(tmp_path)
    assert listed(source, tmp_path) == [("Zoo/d.png", 0), ("jump/c.webm", 1), ("wash/a.JPG", 2), ("wash/b.mp4", 2)]
    assert source.class_names == ["Zoo", "jump", "wash"]


def test_a_label_column_that_folders_do_not_have_is_told_of(tmp_path, caplog):
    make_files(tmp_path, "jump/c.webm", "wash/b.mp4")
    (tmp_path / "metadata.csv").write_text("file_name,label\njump/c.webm,dance\nwash/b.mp4,clean\n")
    assert open_labelled(tmp_path).class_names == ["clean", "dance"]
    assert not caplog.records
    assert open_labelled(tmp_path, settings=SourceSettings(label_column="action")).class_names == ["jump", "wash"]
    assert "has no column 'action' (--label_column) beside its files; its folders are the classes" in caplog.text


def test_classes_in_a_given_order(tmp_path):
    make_files(tmp_path, "wash/b.mp4", "jump/c.webm")
    source = open_labelled(tmp_path, class_names=["wash", "sing", "jump"])
    assert listed(source, tmp_path) == [("jump/c.webm", 2), ("wash/b.mp4", 0)]
    assert source.class_names == ["wash", "sing", "jump"]


def test_a_part_of_a_part(tmp_path):
    make_files(tmp_path, "a/0.mp4", "a/1.mp4", "b/2.mp4", "b/3.mp4", "c/4.mp4")
    part = open_labelled(tmp_path).select([4, 2, 1]).select(np.array([1, 0]))
    assert listed(part, tmp_path) == [("b/2.mp4", 1), ("c/4.mp4", 2)]
    assert len(part) == 2 and part.class_names == ["a", "b", "c"]


def test_unknown_classes(tmp_path):
    make_files(tmp_path, "wash/b.mp4", "jump/c.webm", "dance/d.mp4")
    with pytest.raises(InputError, match=r"2 classes are unknown .*: dance, jump\. Expected some of its 1: wash"):
        open_labelled(tmp_path, class_names=["wash"])


def test_folders_without_labelled_files(tmp_path):
    with pytest.raises(InputError, match="gone: no such file or folder"):
        open_labelled(tmp_path / "gone")
    make_files(tmp_path, "empty/notes.txt")
    with pytest.raises(InputError, match=r"no videos .* found among its 1 files"):
        open_labelled(tmp_path)
    make_files(tmp_path, "loose.mp4")
    with pytest.raises(InputError, match="has no labels; expected ROOT/CLASS_NAME/FILE, or a list"):
        open_labelled(tmp_path)


def test_files_without_a_class_are_reported(tmp_path, caplog):
    make_files(tmp_path, "wash/a.mp4", "wash/deeper/b.mp4", "loose.mp4")
    assert listed(open_labelled(tmp_path), tmp_path) == [("wash/a.mp4", 0)]
    assert f"left out 2 files that are not FOLDER/CLASS_NAME/FILE, the first: {tmp_path}/loose.mp4" in caplog.text


def test_classes_of_deeper_folders_are_told_of_as_files_that_are_left_out(tmp_path, caplog):
    make_files(tmp_path, "wash/a.mp4", "jump/monday/b.mp4", "jump/monday/c.mp4")
    source = open_labelled(tmp_path)
    assert (source.class_names, listed(source, tmp_path)) == (["wash"], [("wash/a.mp4", 0)])
    (said,) = (
        record.message for record in caplog.records if record.levelname == "WARNING"
    )  # not: "no videos in jump"
    assert said == (
        f"{tmp_path}: left out 2 files that are not FOLDER/CLASS_NAME/FILE, the first: {tmp_path}/jump/monday/b.mp4. "
        "To use them, name each in a list of `path label`."
    )


def test_parquet_files_in_folders_are_a_table(tmp_path):
    clips = [{"path": f"{index}.mp4", "bytes": b"not opened here"} for index in range(2)]
    features = datasets.Features(
        {"clip": datasets.Video(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"clip": clips, "label": [1, 0]}, features).to_parquet(tmp_path / "data" / "0.parquet")
    assert open_labelled(tmp_path).labels.tolist() == [1, 0]


def write_rows(path, labels, dtype):
    clips = [{"path": f"{index}.mp4", "bytes": b"not opened here"} for index in range(len(labels))]
    features = datasets.Features({"clip": datasets.Video(decode=False), "label": datasets.Value(dtype)})
    datasets.Dataset.from_dict({"clip": clips, "label": labels}, features).to_parquet(path)
    return path


def test_labels_that_are_floats_or_truth_values(tmp_path, caplog):
    source = open_labelled(write_rows(tmp_path / "a.parquet", [1.0, 0.0, 2.0], "float64"))
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 2], ["0", "1", "2"])
    assert open_source(write_rows(tmp_path / "b.parquet", [1.0, None], "float32")).labels.tolist() == [1, -1]
    source = open_labelled(write_rows(tmp_path / "c.parquet", [True, False, True], "bool"))
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ["False", "True"])
    # Measurements: whoever needs no labels reads the table.
    path = write_rows(tmp_path / "d.parquet", [0.25, 3.0], "float64")
    assert open_source(path).labels is None
    assert "column 'label': expected class names, or class indices, as labels; got the number 0.25" in caplog.text
    with pytest.raises(InputError, match="has no labels"):
        open_labelled(path)
    with pytest.raises(InputError, match=r"column 'label': .* got the number 0\.25"):
        open_labelled(path, settings=SourceSettings(label_column="label"))


def test_parquet_files_that_are_empty_or_cut(tmp_path):
    (tmp_path / "data").mkdir()
    write_rows(tmp_path / "data" / "0.parquet", [], "int64")
    with pytest.raises(InputError, match=r"data: expected Parquet with rows, got none"):
        open_source(tmp_path / "data")
    write_rows(tmp_path / "data" / "1.parquet", [1, 0], "int64")
    assert open_labelled(tmp_path / "data").labels.tolist() == [1, 0]
    whole = (tmp_path / "data" / "1.parquet").read_bytes()
    (tmp_path / "data" / "2.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"2\.parquet: cannot be read as Parquet; it may be only partly written"):
        open_source(tmp_path / "data")


def write_table(folder, labels, names):
    features = {"clip": datasets.Video(decode=False), "label": datasets.ClassLabel(names=names)}
    clips = [{"path": f"{index}.mp4", "bytes": b"not opened here"} for index in range(len(labels))]
    datasets.Dataset.from_dict({"clip": clips, "label": labels}, datasets.Features(features)).save_to_disk(folder)


def test_labels_of_a_table_are_its_class_labels(tmp_path):
    write_table(tmp_path / "table", [2, 0, 2], ["wash", "sing", "jump"])
    source = open_labelled(tmp_path / "table")
    assert listed(source, tmp_path) == [("table[0] (0.mp4)", 2), ("table[1] (1.mp4)", 0), ("table[2] (2.mp4)", 2)]
    assert source.class_names == ["wash", "sing", "jump"]
    # "sing" is in the table's list, but no row has it.
    other = open_labelled(tmp_path / "table", class_names=["jump", "run", "wash"])
    assert other.labels.tolist() == [0, 2, 0]


def test_a_table_with_a_row_without_label_or_without_labels(tmp_path):
    write_table(tmp_path / "table", [1, None, 0], ["wash", "sing"])
    with pytest.raises(InputError, match=r"1 of 3 items have no label, the first: .*table\[1\] \(1\.mp4\)"):
        open_labelled(tmp_path / "table")
    table = datasets.Dataset.from_dict({"clip": [{"path": "a.mp4", "bytes": b"not opened here"}]})
    table.cast_column("clip", datasets.Video(decode=False)).save_to_disk(tmp_path / "plain")
    with pytest.raises(InputError, match="has no labels; expected a column of type ClassLabel or one called `label`"):
        open_labelled(tmp_path / "plain")
    assert open_source(tmp_path / "plain").labels is None


def test_folders_without_media_are_no_classes(tmp_path, caplog):
    make_files(tmp_path, "b/0.mp4", "a/0.mp4", "annotations/list.txt", "__MACOSX/a/._0.mp4", "__MACOSX/a/0.mp4")
    make_files(tmp_path, "@eaDir/0.mp4/thumb.jpg", "@eaDir/thumb.jpg", "lost+found/0.mp4")
    (tmp_path / "empty").mkdir()
    source = open_labelled(tmp_path)
    assert (source.class_names, listed(source, tmp_path)) == (["a", "b"], [("a/0.mp4", 0), ("b/0.mp4", 1)])
    assert "5 folders without videos or images are no classes: @eaDir, __MACOSX, annotations" in caplog.text


METADATA = {
    "csv": "file_name,label\nx.mp4,wash\ndeep/y.png,jump\n",
    "jsonl": '{"file_name": "x.mp4", "label": "wash"}\n{"file_name": "deep/y.png", "label": "jump"}\n',
}


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_beside_media(tmp_path, kind, caplog):
    make_files(tmp_path, "x.mp4", "deep/y.png", "deep/unlisted.png")
    if kind == "parquet":
        columns = {"file_name": ["x.mp4", "deep/y.png"], "label": ["wash", "jump"]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "metadata.parquet")
    else:
        (tmp_path / f"metadata.{kind}").write_text(METADATA[kind])
    source = open_labelled(tmp_path)
    assert source.class_names == ["jump", "wash"]
    assert listed(source, tmp_path) == [("x.mp4", 1), ("deep/y.png", 0)]
    assert source.list_names() == ["x.mp4", "deep/y.png"]
    assert f"left out 1 files that no metadata file lists, the first: {tmp_path}/deep/unlisted.png" in caplog.text
    # Without labels, all are data.
    assert len(open_source(tmp_path)) == 3
    (tmp_path / "x.mp4").rename(tmp_path / "z.mp4")
    assert listed(open_labelled(tmp_path), tmp_path) == [("deep/y.png", 0)]
    assert f"metadata.{kind}: 1 of 2 files are missing, the first: x.mp4" in caplog.text
    assert "They are left out." in caplog.text
    (tmp_path / "deep" / "y.png").rename(tmp_path / "deep" / "z.png")
    with pytest.raises(InputError, match=rf"metadata\.{kind}: 2 of 2 files are missing, the first: x\.mp4"):
        open_labelled(tmp_path)


def test_metadata_in_several_folders_and_as_datasets_reads_them(tmp_path):
    pictures = {"train/0.png": 2, "train/1.png": 0, "test/0.png": 1}
    for name in pictures:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label,title\n0.png,2,a\n1.png,0,b\n")
    (tmp_path / "test" / "metadata.jsonl").write_text('{"file_name": "0.png", "label": 1}\n')
    assert listed(open_labelled(tmp_path), tmp_path) == sorted(pictures.items())
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path / "train"), split="train")
    assert open_labelled(tmp_path / "train").labels.tolist() == theirs["label"]


def test_metadata_with_whole_paths_or_files_of_other_folders(tmp_path, monkeypatch):
    make_files(tmp_path, "data/x.mp4", "data/y.mp4", "elsewhere/z.mp4")
    metadata = tmp_path / "data" / "metadata.csv"
    monkeypatch.chdir(tmp_path)
    metadata.write_text(f"file_name,label\n{tmp_path}/data/x.mp4,2\n./y.mp4,0\n")
    assert open_labelled("data").labels.tolist() == [2, 0]
    metadata.write_text("file_name,label\nx.mp4,2\n./x.mp4,0\n")
    with pytest.raises(InputError, match="a file twice"):
        open_labelled("data")
    metadata.write_text("file_name,label\n../elsewhere/z.mp4,2\n")
    with pytest.raises(InputError, match=r"metadata\.csv: names none of the videos and images in data, such as"):
        open_labelled("data")
    assert open_with_labels("data", False).labels is None


def test_metadata_of_something_else(tmp_path):
    make_files(tmp_path, "a/0.mp4", "b/0.mp4")
    for text in ("id,size\n1,2\n", "file_name,size\na/0.mp4,3\n", "made in 2024\n"):
        (tmp_path / "metadata.csv").write_text(text)
        assert open_labelled(tmp_path).class_names == ["a", "b"]
        assert len(open_source(tmp_path)) == 2


def test_a_list_of_class_names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("wash hands\n\nsing\n")
    assert read_class_names(path) == ["wash hands", "sing"]
    path.write_text("sing\nwash\nsing\n")
    with pytest.raises(InputError, match=r"names\.txt: expected class names, each once, got 'sing' twice"):
        read_class_names(path)
    with pytest.raises(InputError, match=r"gone\.txt: cannot be read as a list of class names"):
        read_class_names(tmp_path / "gone.txt")


def write_columns(path, count, **columns):
    clips = [{"path": f"{index}.mp4", "bytes": b"not opened here"} for index in range(count)]
    table = datasets.Dataset.from_dict({"clip": clips, **columns})
    table.cast_column("clip", datasets.Video(decode=False)).save_to_disk(path)
    return path


def test_labels_of_a_table_that_are_names_or_numbers(tmp_path):
    source = open_labelled(write_columns(tmp_path / "names", 3, label=["wash", "jump", "wash"]))
    assert (source.labels.tolist(), source.class_names) == ([1, 0, 1], ["jump", "wash"])
    source = open_labelled(write_columns(tmp_path / "numbers", 3, label=[2, 0, 1], name=["x", "y", "z"]))
    assert (source.labels.tolist(), source.class_names) == ([2, 0, 1], ["0", "1", "2"])
    assert open_labelled(tmp_path / "numbers", ["jump", "run", "wash"]).class_names == ["jump", "run", "wash"]
    with pytest.raises(InputError, match="1 of 2 items have no label"):
        open_labelled(write_columns(tmp_path / "gap", 2, label=["wash", None]))


def test_a_table_with_several_columns_of_labels_asks_for_one(tmp_path):
    coarse, fine = datasets.ClassLabel(names=["x", "y"]), datasets.ClassLabel(names=["a", "b", "c"])
    table = datasets.Dataset.from_dict({"coarse": [0, 1], "fine": [2, 0], "mood": ["sad", "glad"], "length": [1.5, 2]})
    clips = write_columns(tmp_path / "clips", 2)
    table = datasets.concatenate_datasets([datasets.load_from_disk(clips), table], axis=1)
    table.cast_column("coarse", coarse).cast_column("fine", fine).save_to_disk(tmp_path / "several")
    assert open_source(tmp_path / "several").labels is None  # who needs no labels need not choose

    def labels(column):
        source = open_labelled(tmp_path / "several", settings=SourceSettings(label_column=column))
        return source.labels.tolist(), source.class_names

    with pytest.raises(InputError, match=r"has no labels; expected a column .* name another with --label_column"):
        labels(None)
    assert labels("coarse") == ([0, 1], ["x", "y"])
    assert labels("fine") == ([2, 0], ["a", "b", "c"])
    assert labels("mood") == ([1, 0], ["glad", "sad"])
    with pytest.raises(InputError, match=r"has no column 'age' \(--label_column\), but clip, coarse, fine"):
        labels("age")
    with pytest.raises(InputError, match=r"column 'length': expected class names, .* got the number 1.5"):
        labels("length")


def test_a_store_without_labels_names_the_flag(tmp_path):
    make_files(tmp_path, "clips/a/0.png", "clips/b/0.png")
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / "clips" / name / "0.png")
    pack(tmp_path / "clips", tmp_path / "store")
    with pytest.raises(InputError, match="has no labels; expected a store that was packed with --labelled"):
        open_labelled(tmp_path / "store")


def test_splits_and_configurations_on_the_hub(tmp_path):
    files, readme = {}, "---\nconfigs:\n"
    for config, names in {"small": ["a"], "large": ["b", "c"]}.items():
        readme += f"- config_name: {config}\n  data_files:\n"
        for split in ("train", "validation", "test"):
            label = [f"{name} of {split}" for name in names]
            table = datasets.load_from_disk(write_columns(tmp_path / f"{config} {split}", len(label), label=label))
            table.to_parquet(tmp_path / "table.parquet")
            files[f"{config}/{split}.parquet"] = (tmp_path / "table.parquet").read_bytes()
            readme += f"  - split: {split}\n    path: {config}/{split}.parquet\n"
    files["README.md"] = f"{readme}---\n".encode()

    with run_local_hub() as hub, hub_of_this_process(hub.url):
        hub.repositories["datasets/someone/clips"] = files

        def names(**settings):
            return open_labelled("someone/clips", settings=SourceSettings(**settings)).class_names

        assert names(config_name="small") == ["a of train"]
        assert names(config_name="large", split="test") == ["b of test", "c of test"]
        held_out = HeldOutSettings(config_name="large").of_evaluation
        assert open_labelled("someone/clips", settings=held_out).class_names == ["b of validation", "c of validation"]
        for settings, reason in [
            ({}, "Config name is missing"),
            ({"config_name": "small", "split": "dev"}, "dev"),
        ]:
            with pytest.raises(InputError, match=rf"^someone/clips: no such folder, and no dataset .*{reason}"):
                names(**settings)


def test_a_revision_on_the_hub(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        raise ValueError("not here")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    settings = SourceSettings(split="test", config_name="large", revision="v2")
    with pytest.raises(InputError, match="not here"):
        open_source("someone/clips", settings)
    assert asked == [(("someone/clips", "large"), {"split": "test", "revision": "v2"})]


def test_a_table_whose_items_have_several_labels(tmp_path):
    images = [{"bytes": b"", "path": None}] * 3
    names = datasets.ClassLabel(names=["wash", "iron", "dry"])
    columns = {
        "label": (datasets.List(names), [[2, 0], [1], None], [[1, 0, 1], [0, 1, 0], [-1, -1, -1]]),
        "labels": (datasets.List(datasets.Value("string")), [["a", "b"], [], ["b"]], [[1, 1], [0, 0], [0, 1]]),
        "tags": (datasets.LargeList(names), [[0], [0, 1, 2], []], [[1, 0, 0], [1, 1, 1], [0, 0, 0]]),
    }
    for column, (feature, values, expected) in columns.items():
        features = datasets.Features({"image": datasets.Image(), column: feature})
        table = datasets.Dataset.from_dict({"image": images, column: values}, features=features)
        table.save_to_disk(tmp_path / column)
        assert open_source(tmp_path / column).labels.tolist() == expected
    # A list of 0 and 1, one for each class, is not what is asked for.
    features = datasets.Features({"image": datasets.Image(), "label": datasets.List(datasets.Value("int64"))})
    table = datasets.Dataset.from_dict({"image": images, "label": [[0, 1, 1]] * 3}, features=features)
    table.save_to_disk(tmp_path / "flags")
    with pytest.raises(InputError, match=r"column 'label': expected each class once .*, got \[0, 1, 1\]"):
        open_source(tmp_path / "flags")


def test_labels_that_are_kept_where_none_are_needed(tmp_path, caplog):
    make_files(tmp_path, "x.mp4", "deep/y.png", "deep/unlisted.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nx.mp4,2\ndeep/y.png,0\n")
    names = ["deep/unlisted.png", "deep/y.png", "x.mp4"]

    def labels(*arguments):
        source = open_with_labels(tmp_path, *arguments)
        return dict(zip(source.list_names(), source.labels.tolist(), strict=True)), source.class_names

    assert labels(False) == (dict(zip(names, [-1, 0, 2], strict=True)), None)
    known = ["a", "b", "c", "d"]
    assert labels(False, known) == (dict(zip(names, [-1, 0, 2], strict=True)), known)
    assert labels(True) == ({"deep/y.png": 0, "x.mp4": 2}, ["0", "1", "2"])
    with pytest.raises(InputError, match="has the class index 2, but the class names has 2 classes"):
        labels(False, ["a", "b"])
    # What cannot be understood is left out, and told.
    (tmp_path / "metadata.csv").write_text("file_name,label\nx.mp4,2\nx.mp4,0\n")
    assert open_with_labels(tmp_path, False).labels is None
    assert "labels of metadata files are left out" in caplog.text and "a file twice" in caplog.text


def test_folders_that_may_be_classes_are_told(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="vicmae_hf")
    make_files(tmp_path, "wash/1.mp4", "iron/2.mp4")
    assert open_with_labels(tmp_path, False).labels is None
    assert "is read without labels; --labelled takes its folders as classes" in caplog.text
    assert open_with_labels(tmp_path, True).labels.tolist() == [0, 1]
    with pytest.raises(InputError, match=r"has no labels for names\.txt to name; expected ROOT/CLASS_NAME/FILE"):
        open_with_labels(tmp_path, False, ["a", "b"], "names.txt")


def test_a_store_without_names_gets_them(tmp_path):
    (tmp_path / "train.txt").write_text("a.png 1\nb.png 0\n")
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    packed = PackingInput.open(tmp_path / "train.txt", class_names=["wash", "iron", "dry"])
    assert (packed.labels.tolist(), packed.class_names) == ([1, 0], ["wash", "iron", "dry"])


@pytest.mark.parametrize("labels", ["1 0", "0,2 1"])
def test_stored_indices_get_the_names_that_are_known(tmp_path, labels):
    """A store of a list with class indices is taken as the list itself is."""
    for name in ("a.png", "b.png"):
        Image.new("RGB", (16, 16)).save(tmp_path / name)
    first, second = labels.split()
    (tmp_path / "train.txt").write_text(f"a.png {first}\nb.png {second}\n")
    pack(tmp_path / "train.txt", tmp_path / "store")
    opened = []
    for name in ("train.txt", "store"):
        source = open_labelled(tmp_path / name)
        known = open_labelled(tmp_path / name, ["wash", "iron", "dry"])
        kept = open_with_labels(tmp_path / name, False, ["wash", "iron", "dry"])
        assert kept.class_names == known.class_names == ["wash", "iron", "dry"]
        assert not source.has_names and kept.labels.tolist() == known.labels.tolist()
        opened.append(dict(zip(source.items.list_names(), known.labels.tolist(), strict=True)))
        with pytest.raises(InputError, match=r"has the class index \d, but the model has 1 classes"):
            open_labelled(tmp_path / name, ["wash"], "the model")
    assert opened[0] == opened[1]


def test_folders_called_by_numbers_are_names(tmp_path):
    make_files(tmp_path, "0/a.png", "1/b.png")
    assert open_labelled(tmp_path).has_names
    with pytest.raises(InputError, match="2 classes are unknown to the model: 0, 1"):
        open_labelled(tmp_path, ["wash", "iron"])
