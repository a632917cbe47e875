import datasets
import numpy as np
import pytest
from PIL import Image

from vicmae_hf.data.sources.labelled import open_labelled, read_class_names
from vicmae_hf.data.sources.sources import open_source
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


def test_parquet_files_in_folders_are_a_table(tmp_path):
    clips = [{"path": f"{index}.mp4", "bytes": b"not opened here"} for index in range(2)]
    features = datasets.Features(
        {"clip": datasets.Video(decode=False), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"clip": clips, "label": [1, 0]}, features).to_parquet(tmp_path / "data" / "0.parquet")
    assert open_labelled(tmp_path).labels.tolist() == [1, 0]


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
    assert "5 folders are no classes, without videos or images in them: @eaDir, __MACOSX, annotations" in caplog.text


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
    assert f"left out 1 files that no metadata file has, the first: {tmp_path}/deep/unlisted.png" in caplog.text
    # Without labels, all are data.
    assert len(open_source(tmp_path)) == 3
    (tmp_path / "x.mp4").rename(tmp_path / "z.mp4")
    with pytest.raises(InputError, match=rf"metadata\.{kind}: 1 of 2 files are missing, the first: x\.mp4"):
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
