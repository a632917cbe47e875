import json
import unicodedata
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
from video_files import numbered_frames, read_numbers, write_video

from vicmae_hf.data.media.bad_files import BadFilesArguments
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.data.preparing.packing import PackingInput
from vicmae_hf.data.samples.pairs import load_frame_pairs
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import SourceSettings, open_source
from vicmae_hf.errors import InputError, MediaDecodingError


PATHS = ["b.mp4", "my clips/a, 1.mp4", "my clips/c.mp4 old.webm", "d.png"]


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.fixture
def folder(tmp_path):
    make_files(tmp_path, *PATHS)
    return tmp_path


def rows(source, root):
    return [(source[index].media.removeprefix(f"{root}/"), int(source.labels[index])) for index in range(len(source))]


def write(path, text, encoding="utf-8"):
    path.write_bytes(text.encode(encoding))
    return path


LABELS = [3, 0, 1, 3]
QUOTED = [f'"{path}"' for path in PATHS]
LISTS = {
    "spaces": "".join(f"{path} {label}\n" for path, label in zip(PATHS, LABELS, strict=True)),
    "two spaces": "".join(f"{path}  {label} \n" for path, label in zip(PATHS, LABELS, strict=True)),
    "quoted": "".join(f"{path} {label}\n" for path, label in zip(QUOTED, LABELS, strict=True)),
    "commas": "".join(f"{path},{label}\n" for path, label in zip(PATHS, LABELS, strict=True)),
    "commas and spaces": "".join(f"{path}, {label}\n" for path, label in zip(PATHS, LABELS, strict=True)),
    "tabs": "".join(f"{path}\t{label}\n" for path, label in zip(PATHS, LABELS, strict=True)),
    "no line end": "\n".join(f"{path} {label}" for path, label in zip(PATHS, LABELS, strict=True)),
    "empty lines": "\n\n" + "".join(f"{path} {label}\n\n" for path, label in zip(PATHS, LABELS, strict=True)),
    "header and spaces": "path label\n" + "".join(f"{p} {label}\n" for p, label in zip(PATHS, LABELS, strict=True)),
    "CSV": "path,label\n" + "".join(f"{path},{label}\n" for path, label in zip(QUOTED, LABELS, strict=True)),
    "other columns": "id;Label;Path\n" + "".join(f"9;{n};{p}\n" for p, n in zip(QUOTED, LABELS, strict=True)),
    "label first": "label path\n" + "".join(f"{label} {path}\n" for path, label in zip(PATHS, LABELS, strict=True)),
    "TSV": "path\tlabel\n" + "".join(f"{path}\t{label}\n" for path, label in zip(PATHS, LABELS, strict=True)),
    "pandas": "path,label\n" + "".join(f"{path},{label}.0\n" for path, label in zip(QUOTED, LABELS, strict=True)),
    "JSON lines": "".join(
        json.dumps({"path": p, "label": label}) + "\n" for p, label in zip(PATHS, LABELS, strict=True)
    ),
}


@pytest.mark.parametrize("line_ends", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", LISTS)
def test_lists_of_every_form(folder, kind, line_ends):
    path = write(folder / "train.txt", LISTS[kind].replace("\n", line_ends))
    source = open_labelled(path)
    assert rows(source, folder) == list(zip(PATHS, LABELS, strict=True))
    assert source.class_names == ["0", "1", "2", "3"]
    assert source.list_names() == PATHS
    assert [source[index].is_video for index in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_byte_order_marks(folder, encoding):
    for text in (LISTS["spaces"], LISTS["CSV"], LISTS["JSON lines"]):
        source = open_labelled(write(folder / "train.csv", text, encoding))
        assert rows(source, folder) == list(zip(PATHS, LABELS, strict=True))


def test_labels_that_are_names(folder):
    names = ["wash, then dry", "jump", "wash, then dry", "été"]
    text = "".join(f"{path} {name}\n" for path, name in zip(PATHS, names, strict=True))
    source = open_labelled(write(folder / "train.txt", text))
    assert source.class_names == ["jump", "wash, then dry", "été"]
    assert source.labels.tolist() == [1, 0, 1, 2]
    for name, text in {
        "train.tsv": "path\tlabel\n" + "".join(f"{p}\t{n}\n" for p, n in zip(PATHS, names, strict=True)),
        "train.csv": "".join(f"{p},{n}\n" for p, n in zip(PATHS, names, strict=True)),
    }.items():
        assert open_labelled(write(folder / name, text)).labels.tolist() == [1, 0, 1, 2]
    known = open_labelled(folder / "train.tsv", ["été", "x", "jump", "wash, then dry"])
    assert known.labels.tolist() == [3, 2, 3, 0]
    with pytest.raises(InputError, match="1 classes are unknown to the model: été"):
        open_labelled(folder / "train.tsv", ["jump", "wash, then dry"])


def test_numbers_are_indices_into_the_known_classes(folder):
    path = write(folder / "train.txt", LISTS["spaces"])
    source = open_labelled(path, ["jump", "run", "sing", "wash", "zip"])
    assert (source.labels.tolist(), source.class_names) == (LABELS, ["jump", "run", "sing", "wash", "zip"])
    # Classes that are called by numbers are meant by name, in whatever order they are.
    assert open_labelled(path, ["3", "1", "10", "0"]).labels.tolist() == [0, 3, 1, 0]
    with pytest.raises(InputError, match=r"train\.txt: has the class index 3, but the names has 3 classes, 0 to 2"):
        open_labelled(path, ["jump", "run", "sing"], "the names")


def test_an_index_without_files_is_told(folder, caplog):
    open_labelled(write(folder / "train.txt", "b.mp4 1\nd.png 4\n"))
    assert "5 classes by its largest index, but class 0 has no file" in caplog.text
    with pytest.raises(InputError, match=r"class indices below 1,000,000, got 20190401"):
        open_labelled(write(folder / "dates.txt", "b.mp4 20190401\n"))


def test_both_forms_of_unicode_match(tmp_path):
    forms = ["NFC", "NFD"]
    for form, other in zip(forms, reversed(forms), strict=True):
        on_disk = unicodedata.normalize(form, "été/à la ñ.mp4")
        listed = unicodedata.normalize(other, "été/à la ñ.mp4")
        root = tmp_path / form
        make_files(root, on_disk)
        label = unicodedata.normalize(other, "été")
        path = write(root / "list.txt", f"{listed} {label}\n")
        source = open_labelled(path, [unicodedata.normalize(form, "été"), "a"])
        assert rows(source, root) == [(on_disk, 0)]
        # The same for folders of classes, and for names within a list.
        assert open_labelled(root, [unicodedata.normalize(other, "été"), "a"]).labels.tolist() == [0]
    make_files(tmp_path, "b.mp4")
    mixed = write(tmp_path / "mixed.txt", "".join(f"b.mp4 {unicodedata.normalize(form, 'é')}\n" for form in forms))
    assert open_labelled(mixed).labels.tolist() == [0, 0]


def test_paths_begin_beside_the_list_or_in_the_data_root(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("lists")
    path = write(elsewhere / "train.txt", f"b.mp4 0\n{folder}/d.png 1\nmy clips/a, 1.mp4 1\n")
    source = open_labelled(path, settings=SourceSettings(data_root=str(folder)))
    assert rows(source, folder) == [("b.mp4", 0), ("d.png", 1), ("my clips/a, 1.mp4", 1)]
    with pytest.raises(InputError) as raised:
        open_labelled(path)
    assert str(raised.value) == (
        f"{path}: 2 of 3 files are missing, the first: b.mp4 (line 1). --max_bad_files 0.05 allows fewer. Paths are "
        f"relative to {elsewhere}; name another folder with --data_root."
    )


def test_all_missing_files_are_counted(folder):
    text = "path,label\n" + "b.mp4,0\n" + "".join(f"gone/{index}.mp4,0\n" for index in range(1200))
    with pytest.raises(InputError, match=r"1,200 of 1,201 files are missing, the first: gone/0\.mp4 \(line 3\)"):
        open_source(write(folder / "train.csv", text))


def test_a_few_missing_files_count_as_unreadable(folder, caplog):
    write_video(folder / "real.mp4", numbered_frames(8), fps=10)
    path = write(folder / "train.csv", "real.mp4 1\n" * 39 + "gone.mp4 0\ngone/too.mp4 0\n")
    source = open_labelled(path)
    assert len(source) == 41 and source.labels.tolist() == [1] * 39 + [0, 0]
    assert "2 of 41 files are missing, the first: gone.mp4 (line 40). They count as unreadable." in caplog.text
    with pytest.raises(MediaDecodingError, match=r"gone\.mp4"):
        MediaLoader().read_frames(source[39], lambda reader: [0])
    for share, allowed in [(0.0, False), (0.02, False), (0.06, True)]:
        settings = PackingArguments(max_bad_files=share)
        with nullcontext() if allowed else pytest.raises(InputError, match=f"--max_bad_files {share} allows fewer"):
            assert len(open_source(path, settings)) == 41


@dataclass(kw_only=True)
class PackingArguments(BadFilesArguments, SourceSettings):
    """Settings of a script that has `--max_bad_files`."""


def test_lines_that_are_comments(folder, caplog):
    make_files(folder, "#1.mp4", "# 2.mp4")
    text = "# K400, our split\n#path label\n\nb.mp4 1\n# d.png 1\n#1.mp4 0\n   #\n"
    source = open_labelled(write(folder / "train.txt", text))
    assert rows(source, folder) == [("b.mp4", 1), ("#1.mp4", 0)]
    assert "4 lines that begin with # were skipped" in caplog.text
    source = open_labelled(
        write(folder / "train.txt", "# a table\npath,label\nb.mp4,#2\n# done\n'#1.mp4',run\n".replace("'", '"'))
    )
    assert rows(source, folder) == [("b.mp4", 0), ("#1.mp4", 1)]
    assert source.class_names == ["#2", "run"]
    with pytest.raises(InputError, match="line 4: expected `path label`"):
        open_source(write(folder / "train.txt", "# first\nb.mp4 1\nb.mp4 1\nd.png\n"))


FOLDERS = SourceSettings(frame_folders=True, source_frames_per_second=10)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a 163 1\nb 2 90 0\nb/c 4 1\n", [1, 0, 1]),  # folder, frames, label
        ("a 163 1 0\nb 2 90 2\nb/c 4 2 1\n", [[1, 1, 0], [0, 0, 1], [0, 1, 1]]),
        ("a,163,1\nb 2,90,0\nb/c,4,1\n", [1, 0, 1]),
        ("a\t163\t1\nb 2\t90\t0\nb/c\t4\t1\n", [1, 0, 1]),
        ("a 1\nb 2 0\nb/c 1\n", [1, 0, 1]),  # folder, label
        ("a 1\nb 2 0 1\nb/c 0\n", [[0, 1], [1, 1], [1, 0]]),
        ("a run fast\nb 2 2 steps\nb/c run fast\n", ["run fast", "2 steps", "run fast"]),
        ("a 0 -1\nb 2 0 -1\nb/c 0 -1\n", [-1, -1, -1]),  # of VideoMAE
        ("a\nb 2\nb/c\n", None),
    ],
)
def test_lists_of_frame_folders(tmp_path, text, labels):
    make_files(tmp_path, "a/1.jpg", "b 2/1.jpg", "b/c/1.jpg")
    source = open_source(write(tmp_path / "train.txt", text), FOLDERS)
    assert source.list_names() == ["a", "b 2", "b/c"]
    assert all(source[index].is_video for index in range(3))
    found = source.labels if source.class_names is None else np.array(source.class_names)[source.labels]
    assert (None if found is None else found.tolist()) == labels


def test_frame_folders_with_a_first_frame_or_missing(tmp_path, caplog):
    make_files(tmp_path, "a/1.jpg", "b/1.jpg")
    with pytest.raises(InputError, match="line 2: expected `folder frames label`, got 0 frames in '0 300'"):
        open_source(write(tmp_path / "train.txt", "a 1 300\nb 0 300\n"), FOLDERS)
    source = open_source(write(tmp_path / "train.txt", "a 9 1\nthe gone one 9 1\nb 9 0\n"), FOLDERS)
    assert source.list_names() == ["a", "the gone one", "b"] and source.labels.tolist() == [1, 1, 0]
    assert "the first: the gone one (line 2)" in caplog.text
    with pytest.raises(MediaDecodingError, match="the gone one"):
        MediaLoader().read_frames(source[1], lambda reader: [0])
    # A video among them has no number of frames.
    (tmp_path / "c.mp4").touch()
    source = open_source(write(tmp_path / "train.txt", "a 9 1\nc.mp4 2\nb 9 0\n"), FOLDERS)
    assert source.list_names() == ["a", "c.mp4", "b"] and source.labels.tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("path,label\n", "has a header and no rows"),
        ("path,label\nb.mp4,1,2\n", "line 2: expected 2 values \\(path, label\\), got 3"),
        ('{"path": "b.mp4"}\n{"path": 3}\n', "line 2: expected a path, got 3"),
        ('{"path": "b.mp4"}\n["b.mp4"]\n', "line 2: expected a JSON object"),
        ('{"path": "b.mp4", "Path": "d.png"}\n', "line 1: expected each column once, got path, Path"),
        ('{"path": "b.mp4", "label": [0, 2, 0]}\n', "expected each class once in a list of labels, got \\[0, 2, 0\\]"),
        ('{"path": "b.mp4", "label": [[0], [2]]}\n', "line 1: expected a label or a list of labels, got \\[\\[0\\], "),
        ('{"path": "b.mp4", "label": [0, -2]}\n', "got lists with empty or negative ones"),
        ('{"name": "b.mp4"}\n', "expected a column `path` of videos or images, got the columns name"),
        ("b.mp4 1\nd.png 0\nd.png\n", "line 3: expected `path label`, got 'd.png'"),
        ("b.mp4 163 1\n", "line 1: expected one label after the path, got '163 1'"),
        ("b.mp4 0 3\nd.png run\n", "in all lines if one has several, as line 1 with '0 3'; got 'run' in line 2"),
        ("path,label,label\nb.mp4,1,2\n", "its header has the column label twice"),
        ('[{"path": "b.mp4"}, {"path": "d.png"}]', "expected JSON lines, an object in each, got a JSON array"),
        ('[\n {"path": "b.mp4"}\n]', "expected JSON lines, an object in each, got a JSON array"),
        (f"{'x/' * 2500}b.mp4 1\n", "1 of 1 files are missing, the first: x/x/"),
        ("my clips 1\n", "first: my clips .* If folders hold the frames of videos, give --frame_folders"),
        ("train.csv 1\n", "1 of 1 files are not videos or images, first: train.csv"),
        ("path,start,end\nb.mp4,2,1.5\n", "line 2: ends at 1.5 s, which is not after its start, 2.0 s"),
        ("path,start\nb.mp4,soon\n", "line 2: expected seconds from 0 on as `start`, got 'soon'"),
        ("path,end\nb.mp4,inf\n", "line 2: expected seconds from 0 on as `end`, got 'inf'"),
        ("\0\1\2", "is not a video, image or Parquet file, nor a list of them: it holds binary data"),
        (b"\xe9\xff.mp4 1", r"nor a list of them in UTF-8 .* Save a list as UTF-8 \(in Excel: CSV UTF-8\)"),
    ],
)
def test_lists_that_are_malformed(folder, text, reason):
    path = folder / "train.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=reason) as raised:
        open_source(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)


def test_lists_without_labels(folder):
    for text in ("".join(f"{path}\n" for path in PATHS), "path\n" + "".join(f"{path}\n" for path in PATHS)):
        path = write(folder / "all.txt", text)
        source = open_source(path)
        assert [source[index].media.removeprefix(f"{folder}/") for index in range(4)] == PATHS
        assert source.labels is None
        with pytest.raises(InputError, match="has no labels"):
            open_labelled(path)
    path = write(folder / "table.csv", "file,behaviour\nb.mp4,run\n")
    with pytest.raises(InputError, match="or a column called `label`; name another with --label_column"):
        open_labelled(path)
    # VideoMAE's lists for pretraining.
    path = write(folder / "all.txt", "b.mp4 0 -1\nmy clips/a, 1.mp4 0 -1\n")
    assert len(open_source(path)) == 2
    with pytest.raises(InputError, match="2 of 2 items have no label"):
        open_labelled(path)


def test_a_label_column_that_is_named(folder):
    path = write(folder / "train.csv", "path,label,mood\nb.mp4,1,glad\nd.png,0,sad\n")
    assert open_labelled(path).labels.tolist() == [1, 0]
    source = open_labelled(path, settings=SourceSettings(label_column="mood"))
    assert source.class_names == ["glad", "sad"]
    with pytest.raises(InputError, match=r"has no column 'colour' \(--label_column\), but path, label, mood"):
        open_labelled(path, settings=SourceSettings(label_column="colour"))


def test_many_clips_of_one_recording(tmp_path):
    write_video(tmp_path / "day 1.mp4", numbered_frames(40), fps=10)
    text = "path,label,start,end\nday 1.mp4,walk,0.5,1.5\nday 1.mp4,run,3,\nday 1.mp4,walk,,\n"
    source = open_labelled(write(tmp_path / "clips.csv", text))
    assert source.list_names() == ["day 1.mp4 [0.5-1.5 s]", "day 1.mp4 [3.0-end s]", "day 1.mp4"]
    assert [source[index].name for index in range(3)] == [f"{tmp_path}/{name}" for name in source.list_names()]
    frames = [
        read_numbers(MediaLoader().read_frames(source[index], lambda reader: range(reader.num_frames)))
        for index in range(3)
    ]
    assert frames == [[*range(5, 15)], [*range(30, 40)], [*range(40)]]
    # The same as JSON lines, with numbers.
    lines = [{"path": "day 1.mp4", "label": "walk", "start": 0.5, "end": 1.5}, {"path": "day 1.mp4", "start": 3}]
    other = open_source(write(tmp_path / "clips.jsonl", "\n".join(map(json.dumps, lines))))
    assert other.list_names() == source.list_names()[:2]
    assert (other[1].start, other[1].end) == (3.0, None)
    assert other.labels.tolist() == [0, -1]


SEVERAL = {
    "spaces": "b.mp4 3\nmy clips/a, 1.mp4 0 1\nd.png 2 3 0\n",
    "commas": "b.mp4 3\nmy clips/a, 1.mp4 0,1\nd.png 2,3,0\n",
    "commas alone": 'b.mp4,3\n"my clips/a, 1.mp4",0,1\nd.png,2,3,0\n',
    "tabs": "b.mp4\t3\nmy clips/a, 1.mp4\t0\t1\nd.png\t2\t3\t0\n",
    "quoted": 'path,label\nb.mp4,3\n"my clips/a, 1.mp4","0,1"\nd.png,"2; 3; 0"\n',
    "bars beside commas": 'path,label\nb.mp4,3\n"my clips/a, 1.mp4","0,1"\nd.png,2|3|0\n',
    "as pandas writes": 'path,label\nb.mp4,[3]\n"my clips/a, 1.mp4","[0, 1]"\nd.png,"[2, 3, 0]"\n',
    "JSON lines": '{"path": "b.mp4", "label": [3]}\n{"path": "my clips/a, 1.mp4", "label": [0, 1]}\n'
    '{"path": "d.png", "label": [2, 3, 0]}\n',
    "JSON lines, mixed": '{"path": "b.mp4", "label": 3}\n{"path": "my clips/a, 1.mp4", "label": [0, 1]}\n'
    '{"path": "d.png", "label": [2, 3, 0]}\n',
}


@pytest.mark.parametrize("kind", SEVERAL)
def test_several_labels_of_an_item(folder, kind, caplog):
    source = open_labelled(write(folder / "train.txt", SEVERAL[kind]))
    assert source.labels.tolist() == [[0, 0, 0, 1], [1, 1, 0, 0], [1, 0, 1, 1]]
    assert source.list_names() == ["b.mp4", "my clips/a, 1.mp4", "d.png"]
    assert source.is_multi_label and source.class_names == ["0", "1", "2", "3"]
    assert "an item may have several labels, of 4 classes" in caplog.text
    # Indices into more classes than occur.
    known = open_labelled(folder / "train.txt", ["a", "b", "c", "d", "e"])
    assert known.labels.tolist() == [[0, 0, 0, 1, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]
    with pytest.raises(InputError, match="has the class index 3, but the model has 3 classes"):
        open_labelled(folder / "train.txt", ["a", "b", "c"])


def test_several_names_none_and_no_label(folder):
    lines = [{"path": "b.mp4", "label": ["wash", "dry, then fold"]}, {"path": "d.png", "label": []}]
    path = write(folder / "train.jsonl", "\n".join(map(json.dumps, lines)))
    assert open_labelled(path).class_names == ["dry, then fold", "wash"]
    # In the model's order, which has more.
    source = open_labelled(path, ["wash", "iron", "dry, then fold"])
    assert source.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    path = write(folder / "train.csv", "path,label\nb.mp4,\"['wash', 'iron']\"\nd.png,\"['dry']\"\n")
    assert open_labelled(path).labels.tolist() == [[0, 1, 1], [1, 0, 0]]
    with pytest.raises(InputError, match="2 classes are unknown to the model: dry, iron"):
        open_labelled(path, ["wash", "run"])
    write(folder / "train.jsonl", '{"path": "b.mp4", "label": ["a"]}\n{"path": "d.png"}\n')
    assert open_source(folder / "train.jsonl").labels.tolist() == [[1], [-1]]
    with pytest.raises(InputError, match=r"1 of 2 items have no label, the first: .*/d\.png"):
        open_labelled(folder / "train.jsonl")


@pytest.mark.parametrize(
    ("labels", "reason"),
    [
        (["1", "1000000000"], "expected labels to be class indices below 1,000,000, got 1000000000"),
        (["0", "9" * 5000], "below 1,000,000, got 9999999999"),
        (["0,1000000000", "1"], "below 1,000,000, got 1000000000"),
        (["0,-1", "1"], "got lists with empty or negative ones"),
        (["0.5", "3"], r"expected class names, or class indices, as labels; got the number 0\.5"),
        (["1", "1e3"], "got the number 1e3"),
        (["1", "-inf"], "got the number -inf"),
        (["[[0], [1]]", "[2]"], r"line 2: expected a label or a list of labels, got \[\[0\], \[1\]\]"),
    ],
)
def test_labels_that_are_numbers_of_something_else(folder, labels, reason):
    path = folder / "train.csv"
    rows = [f'{name},"{label}"\n' for name, label in zip(["b.mp4", "d.png"], labels, strict=True)]
    path.write_text("path,label\n" + "".join(rows))
    with pytest.raises(InputError, match=reason) as raised:
        open_labelled(path)
    assert str(raised.value).startswith(str(path)) and "\n" not in str(raised.value)
    # Pretraining needs no labels.
    assert len(load_frame_pairs(path, 32)) == 2


def test_one_name_makes_names_of_numbers(folder, caplog):
    source = open_labelled(write(folder / "train.txt", "b.mp4 7\nmy clips/a, 1.mp4 O\nd.png 10\n"))
    assert source.class_names == ["10", "7", "O"]
    assert "labels like 10 count as names, not as indices, because there are others like O" in caplog.text


def test_delimiters_at_the_end_of_lines(folder):
    path = write(folder / "train.csv", '"b.mp4",7,\nd.png,0,\n')
    assert open_labelled(path).labels.tolist() == [7, 0]


def test_names_that_look_like_several_labels(folder):
    """With a header, and quotes, whatever is no number is the name of one class."""
    path = write(folder / "train.csv", 'path,label\nb.mp4,"1, 2"\nd.png,[a] and [b]\n')
    assert open_labelled(path).class_names == ["1, 2", "[a] and [b]"]
    path = write(folder / "train.csv", "path,label\nb.mp4,[something]\nd.png,[a] and [b]\n")
    assert open_labelled(path).class_names == ["[a] and [b]", "[something]"]


def test_a_packed_list_keeps_its_labels(folder):
    path = write(folder / "train.txt", LISTS["spaces"])
    plain, labelled = PackingInput.open(path), PackingInput.open(path, labelled=True)
    for packed in (plain, labelled):
        assert (packed.labels.tolist(), packed.class_names) == (LABELS, ["0", "1", "2", "3"])
    assert plain.digest() == labelled.digest()
    assert np.array_equal(PackingInput.open(path, True, ["a", "b", "c", "d"]).labels, LABELS)


def test_repeated_rows_are_items_of_their_own(folder):
    assert len(open_source(write(folder / "twice.txt", "b.mp4 0\nb.mp4 0\n"))) == 2
