"""What becomes of a list and its files: table, report, hash, checks; of a tree in which everything is wrong once."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import av
import datasets
import numpy as np
import pytest
from dataset_trees import hash_of, picture, problems, read_csv, rows, write
from video_files import read_numbers

from vicmae_hf.data.media.reading import EncodedItem, MediaLoader
from vicmae_hf.data.preparing import preparation
from vicmae_hf.data.preparing.listing import read_official_class_names
from vicmae_hf.data.preparing.preparation import prepare_dataset, read_bytes, summarize
from vicmae_hf.data.sources.labelled import open_labelled
from vicmae_hf.data.sources.sources import SourceSettings, open_source
from vicmae_hf.errors import InputError


KINETICS_VAL = """youtube_id,label,time_end,time_start,split,is_cc
-bQ3_mPqA0c,zumba,15,5,val,0
aaaaaaaaaaa,"sharpening knives",1234,1224,val,1
bbbbbbbbbbb,abseiling,10,0,validate,0
ccccccccccc,zumba,20,10,val,0
ddddddddddd,zumba,20,10,val,0
eeeeeeeeeee,archery,20,10,val,0
fffffffffff,archery,20,10,val,0
aaaaaaaaaaa,"sharpening knives",1234,1224,val,1
ggggggggggg,archery,20,10,val,0
ggggggggggg,zumba,20,10,val,0
hhhhhhhhhhh,abseiling,20,10,val,0
hhhhhhhhhhh,abseiling,30,20,val,0
"""


def write_kinetics(root: Path, clips) -> None:
    """Flat files and files in folders of classes; four good clips, three broken, one missing, one of two classes."""
    write(root / "annotations" / "val.csv", KINETICS_VAL)
    folder = root / "val"
    write(folder / "-bQ3_mPqA0c_000005_000015.mp4", clips[0, "mp4"])
    write(folder / "sharpening_knives" / "aaaaaaaaaaa_001224_001234.mp4", clips[1, "mp4"])
    write(folder / "abseiling" / "bbbbbbbbbbb_000000_000010.mp4", clips[2, "mp4"])
    write(folder / "ccccccccccc_000010_000020.mp4", clips[3, "mp4"][: len(clips[3, "mp4"]) * 6 // 10])
    write(folder / "ddddddddddd_000010_000020.mp4", b"")
    write(folder / "eeeeeeeeeee_000010_000020.mp4", np.random.default_rng(0).bytes(5000))
    write(folder / "ggggggggggg_000010_000020.mp4", clips[4, "mp4"])
    write(folder / "hhhhhhhhhhh_000010_000020.mp4", clips[2, "mp4"])
    write(folder / "hhhhhhhhhhh_000020_000030.mp4", clips[5, "mp4"])
    write(folder / "zumba" / "-bQ3_mPqA0c_000005_000015.mp4", clips[6, "mp4"])
    write(folder / "stranger_000000_000010.mp4", clips[7, "mp4"])
    write(folder / "notes.txt", "no video")


# Labels of PyTorchVideo's kinetics_classnames.json.
KINETICS_ROWS = [
    ("-bQ3_mPqA0c_000005_000015", 399),
    ("aaaaaaaaaaa_001224_001234", 290),
    ("bbbbbbbbbbb_000000_000010", 0),
    ("hhhhhhhhhhh_000010_000020", 0),
    ("hhhhhhhhhhh_000020_000030", 0),
]


def test_kinetics_with_everything_that_goes_wrong(tmp_path, clips, monkeypatch):
    write_kinetics(tmp_path / "k400", clips)
    monkeypatch.chdir(tmp_path)
    report = prepare_dataset("kinetics400", "k400", "out", "val", num_proc=2)
    output = tmp_path / "out"
    assert rows(output) == KINETICS_ROWS
    assert problems(output) == {
        ("unreadable", "ccccccccccc_000010_000020"),
        ("unreadable", "ddddddddddd_000010_000020"),
        ("unreadable", "eeeeeeeeeee_000010_000020"),
        ("missing", "fffffffffff_000010_000020"),
        ("listed twice", "aaaaaaaaaaa_001224_001234"),
        ("several classes", "ggggggggggg_000010_000020"),
        ("same content", "hhhhhhhhhhh_000010_000020"),
        ("present twice", "-bQ3_mPqA0c_000005_000015"),
        ("not listed", "stranger_000000_000010"),
    }
    expected = {"listed": 10, "found": 8, "missing": 1, "unreadable": 3, "in_table": 5, "listed_twice": 1}
    expected |= {"several_classes": 1, "present_twice": 1, "same_content": 1, "not_listed": 1}
    expected |= {"num_classes": 400, "classes_without_files": 397}
    assert {key: report[key] for key in expected} == expected
    assert json.loads((output / "report.json").read_text()) == report
    assert report["list"] == f"{tmp_path}/k400/annotations/val.csv"
    assert report["list_sha256"] == hash_of(
        ("-bQ3_mPqA0c_000005_000015", "zumba"),
        ("aaaaaaaaaaa_001224_001234", "sharpening knives"),
        ("bbbbbbbbbbb_000000_000010", "abseiling"),
        ("hhhhhhhhhhh_000010_000020", "abseiling"),
        ("hhhhhhhhhhh_000020_000030", "abseiling"),
    )
    assert hashlib.sha256((output / "list.tsv").read_bytes()).hexdigest() == report["list_sha256"]

    reasons = {line["name"]: line for line in read_csv(output / "problems.csv") if line["problem"] == "unreadable"}
    for name, line in reasons.items():
        assert line["path"] == f"{tmp_path}/k400/val/{name}.mp4" and len(line["detail"]) > 20
    (same,) = [line for line in read_csv(output / "problems.csv") if line["problem"] == "same content"]
    assert same["detail"] == "as bbbbbbbbbbb_000000_000010 (abseiling)"

    classes = read_csv(output / "classes.csv")
    assert [line["class_name"] for line in classes] == read_official_class_names("kinetics400")
    counts = {
        line["label"]: tuple(int(line[key]) for key in ["listed", "in_table", "missing", "unreadable"])
        for line in classes
    }
    assert {label: numbers for label, numbers in counts.items() if any(numbers)} == {
        "0": (3, 3, 0, 0),
        "5": (2, 0, 1, 1),
        "290": (1, 1, 0, 0),
        "399": (3, 1, 0, 2),
    }
    table = summarize(report)
    assert table.startswith("Kinetics-400 val\n") and f"list sha256  {report['list_sha256']}" in table
    assert "unreadable                      3" in table


def test_the_table_is_read_by_the_package(tmp_path, clips, monkeypatch):
    write_kinetics(tmp_path / "k400", clips)
    monkeypatch.chdir(tmp_path)
    prepare_dataset("kinetics400", "k400", "out", "val")
    monkeypatch.chdir("/")  # the paths are absolute
    source = open_labelled(tmp_path / "out")
    assert source.class_names == read_official_class_names("kinetics400")
    assert source.labels.tolist() == [label for _, label in KINETICS_ROWS]
    column = datasets.load_from_disk(str(tmp_path / "out")).features["video"]
    assert column == datasets.Video(decode=False)
    assert source[0].media == f"{tmp_path}/k400/val/-bQ3_mPqA0c_000005_000015.mp4"
    frames = [MediaLoader().read_frames(source[index], lambda reader: [0]) for index in range(len(source))]
    # Of the two files named alike, the first in the order of the folders' listing.
    assert [read_numbers(each) for each in frames] == [[0], [10], [20], [20], [50]]
    assert len(open_source(tmp_path / "out")) == 5


@pytest.mark.parametrize("check", ["header", "decode"])
def test_segments_of_a_table_are_made_without_opening_a_file(tmp_path, clips, monkeypatch, check):
    write_kinetics(tmp_path / "k400", clips)
    prepare_dataset("kinetics400", tmp_path / "k400", tmp_path / "table", "val", check=check)
    prepare_dataset("kinetics400", tmp_path / "k400", tmp_path / "unchecked", "val", check="none")
    durations = []
    for path in datasets.load_from_disk(str(tmp_path / "table"))["video"]:
        with av.open(path["path"]) as container:
            durations.append(float(container.streams.video[0].duration * container.streams.video[0].time_base))
    assert open_source(tmp_path / "table").durations == pytest.approx(durations)
    settings = SourceSettings(segment_seconds=durations[0] / 2)
    expected = open_source(tmp_path / "unchecked", settings)
    assert len(expected) == 2 * 5 + 3  # three cannot be opened
    monkeypatch.setattr(EncodedItem, "open", None)
    names = open_source(tmp_path / "table", settings).list_names()
    assert len(names) == 2 * 5 and set(names) < set(expected.list_names())


def test_missing_files_never_shift_labels(tmp_path, clips):
    write_kinetics(tmp_path / "k400", clips)
    prepare_dataset("kinetics400", tmp_path / "k400", tmp_path / "before", "val")
    shutil.rmtree(tmp_path / "k400" / "val" / "abseiling")
    (tmp_path / "k400" / "val" / "zumba" / "-bQ3_mPqA0c_000005_000015.mp4").unlink()
    (tmp_path / "k400" / "val" / "-bQ3_mPqA0c_000005_000015.mp4").unlink()
    report = prepare_dataset("kinetics400", tmp_path / "k400", tmp_path / "after", "val")
    assert report["missing"] == 3
    before, after = (datasets.load_from_disk(str(tmp_path / name)) for name in ["before", "after"])
    assert after.features == before.features
    assert rows(tmp_path / "after") == [KINETICS_ROWS[1], *KINETICS_ROWS[3:]]


def test_the_hash_tells_what_was_evaluated_on_and_nothing_else(tmp_path, clips):
    write_kinetics(tmp_path / "one", clips)
    lines = KINETICS_VAL.splitlines(keepends=True)
    write(tmp_path / "two" / "kinetics" / "validate.csv", lines[0] + "".join(reversed(lines[1:])))
    for path in (tmp_path / "one" / "val").rglob("*.mp4"):
        write(tmp_path / "two" / "clips" / path.name[0] / path.name, path.read_bytes())
    one = prepare_dataset("kinetics400", tmp_path / "one", tmp_path / "out1", "val", num_proc=2, check="decode")
    arguments = {"annotations": tmp_path / "two" / "kinetics" / "validate.csv", "media": tmp_path / "two" / "clips"}
    two = prepare_dataset("kinetics400", tmp_path / "two", tmp_path / "out2", "val", **arguments)
    assert rows(tmp_path / "out1") != rows(tmp_path / "out2")
    assert one["list_sha256"] == two["list_sha256"]
    assert (tmp_path / "out1" / "list.tsv").read_bytes() == (tmp_path / "out2" / "list.tsv").read_bytes()

    write(arguments["annotations"], KINETICS_VAL.replace("bbbbbbbbbbb,abseiling", "bbbbbbbbbbb,archery"))
    other_class = prepare_dataset("kinetics400", tmp_path / "two", tmp_path / "out3", "val", **arguments)
    write(arguments["annotations"], KINETICS_VAL)
    (tmp_path / "two" / "clips" / "b" / "bbbbbbbbbbb_000000_000010.mp4").unlink()
    one_less = prepare_dataset("kinetics400", tmp_path / "two", tmp_path / "out4", "val", **arguments)
    assert len({report["list_sha256"] for report in (one, other_class, one_less)}) == 3


def test_without_a_check_nothing_is_opened(tmp_path, clips):
    write_kinetics(tmp_path / "k400", clips)
    report = prepare_dataset("kinetics400", tmp_path / "k400", tmp_path / "out", "val", check="none")
    assert (report["in_table"], report["unreadable"], report["same_content"]) == (8, None, None)
    assert "not checked" in summarize(report)


def test_damage_that_only_decoding_finds(tmp_path, clips):
    write(tmp_path / "val.csv", "youtube_id,time_start,time_end,label\n" + "".join(f"{x},0,1,zumba\n" for x in "abc"))
    for number, name in enumerate("abc"):
        write(tmp_path / "val" / f"{name}_000000_000001.mp4", clips[number, "mp4"])
    # The last frame of b: its packet starts with an impossible length.
    broken = tmp_path / "val" / "b_000000_000001.mp4"
    with av.open(str(broken)) as container:
        last = max((packet for packet in container.demux(video=0) if packet.size), key=lambda packet: packet.pts)
        position = last.pos
    data = bytearray(broken.read_bytes())
    data[position : position + 4] = b"\xff" * 4
    broken.write_bytes(data)
    opened = prepare_dataset("kinetics400", tmp_path, tmp_path / "header", "val")
    decoded = prepare_dataset("kinetics400", tmp_path, tmp_path / "decode", "val", check="decode")
    assert (opened["in_table"], opened["unreadable"]) == (3, 0)
    assert (decoded["in_table"], decoded["unreadable"]) == (2, 1)
    assert ("unreadable", "b_000000_000001") in problems(tmp_path / "decode")


def test_files_that_vanish_meanwhile(tmp_path, monkeypatch, caplog):
    def read(item, limit=-1):
        if item.media.endswith("2.jpg") or (item.media.endswith("3.jpg") and limit < 0):
            raise FileNotFoundError(2, "No such file or directory", item.media)
        return read_bytes(item, limit)

    monkeypatch.setattr(preparation, "read_bytes", read)
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        write(tmp_path / "data" / "a" / name, picture(0))
    report = prepare_dataset("folder", tmp_path / "data", tmp_path / "out")
    assert (report["in_table"], report["unreadable"], report["same_content"]) == (2, 1, 0)
    (line,) = read_csv(tmp_path / "out" / "problems.csv")
    assert line["name"] == "a/2.jpg" and "No such file or directory" in line["detail"]
    assert "3.jpg: cannot be read any more, and is not compared" in caplog.text


def test_the_same_content_is_told_from_the_same_beginning(tmp_path):
    long_picture = picture(0) + bytes(2**17)  # readers stop at the picture's end
    for name, content in [
        ("a/1.jpg", long_picture),
        ("a/2.jpg", long_picture[:-1] + b"x"),
        ("b/3.jpg", long_picture),
        ("b/4.jpg", long_picture + b"x"),
    ]:
        write(tmp_path / "data" / name, content)
    report = prepare_dataset("folder", tmp_path / "data", tmp_path / "out")
    assert (report["in_table"], report["same_content"]) == (4, 1)
    (line,) = read_csv(tmp_path / "out" / "problems.csv")
    assert (line["problem"], line["name"], line["detail"]) == ("same content", "b/3.jpg", "as a/1.jpg (a)")


def test_an_output_is_never_replaced(tmp_path, clips):
    write_kinetics(tmp_path / "k400", clips)
    write(tmp_path / "out" / "mine.txt", "mine")
    with pytest.raises(InputError, match="out: exists already"):
        prepare_dataset("kinetics400", tmp_path / "k400", tmp_path / "out", "val")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    prepare_dataset("kinetics400", tmp_path / "k400", tmp_path / "empty", "val")
    assert rows(tmp_path / "empty") == KINETICS_ROWS
    assert sorted(os.listdir(tmp_path)) == ["empty", "k400", "out"]
