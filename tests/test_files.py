"""Files that are whole or absent."""

import csv
import json
import subprocess
import sys

import pytest
import torch
from full_disks import largest_file
from safetensors.torch import save_file

from vicmae_hf.errors import InputError
from vicmae_hf.files import (
    check_writable,
    partial_file,
    write_csv,
    write_json,
    write_json_lines,
    write_whole,
)
from vicmae_hf.training.reporting import read_json_lines


def test_a_file_that_fails_half_way_leaves_the_one_before(tmp_path):
    path = tmp_path / "notes.txt"
    write_whole(path, "before\n")
    with pytest.raises(KeyError), partial_file(path) as partial:
        partial.write_text("half")
        raise KeyError("interrupted")
    assert path.read_text() == "before\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_is_missing_is_named(tmp_path):
    with pytest.raises(InputError, match=r"absent/notes\.txt: cannot be written"):
        write_whole(tmp_path / "absent" / "notes.txt", "text")


def test_a_full_disk_leaves_the_file_before(tmp_path):
    path = tmp_path / "notes.txt"
    write_whole(path, "before\n")
    with largest_file(100):
        with pytest.raises(InputError, match=r"notes\.txt: cannot be written \(File too large\); expected"):
            write_whole(path, "after\n" * 100)
        # The number of this library's error is in its text only.
        with (
            pytest.raises(InputError, match=r"notes\.txt: cannot be written \(.*File too large"),
            partial_file(path) as partial,
        ):
            save_file({"zeros": torch.zeros(100)}, partial)
    assert path.read_text() == "before\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_what_can_be_written_is_left_as_it_is(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("before")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("file", "folder", "new", "folder/new", "absent/too/new", tmp_path / "absent" / "new", "a" * 200):
        check_writable(name)
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "before"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("file/new", "Not a directory"),
        ("file/too/new", "Not a directory"),
        ("link/new", "No such file or directory"),
        ("a" * 300, "File name too long"),
        (f"absent/{'é' * 130}/new", "File name too long"),
    ],
)
def test_a_place_that_cannot_be_is_told_with_the_reason(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match=rf": cannot be written \({reason}\); expected") as caught:
        check_writable(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "link"]


def test_a_full_disk_is_told_although_it_takes_empty_files(tmp_path):
    with largest_file(0):
        (tmp_path / "empty").touch()
        with pytest.raises(InputError, match=r"new: cannot be written \(File too large\)"):
            check_writable(tmp_path / "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


# In a namespace of its own, in which any user may mount a memory disk where the system lets him.
IN_NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
PROGRAM = """
import subprocess, sys
from vicmae_hf.errors import InputError
from vicmae_hf.files import check_writable, write_whole
for options in ("ro", "size=64k"):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", sys.argv[1]], check=True)
    for write in (check_writable, lambda path: write_whole(path, 70_000 * "a"), check_writable):
        try:
            write(sys.argv[1] + "/new")
            print("written")
        except InputError as error:
            print(error)
        if options != "ro":
            subprocess.run("cat /dev/zero > " + sys.argv[1] + "/filler", shell=True, stderr=subprocess.DEVNULL)
    subprocess.run(["umount", sys.argv[1]], check=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    subprocess.run([*IN_NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this user may not mount anything",
)
def test_disks_that_are_read_only_or_full(tmp_path):
    command = [*IN_NAMESPACE, sys.executable, "-c", PROGRAM, tmp_path]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    told = [
        line.removeprefix(f"{tmp_path}/new: cannot be written ").split(";")[0] for line in process.stdout.splitlines()
    ]
    assert told == ["(Read-only file system)"] * 3 + ["written"] + ["(No space left on device)"] * 2


def test_json_and_lines_come_back(tmp_path):
    entries = [{"path": "é\u2028.mp4", "error": 'a "quote"\nand a line'}, {"path": "b", "error": ""}]
    write_json_lines(tmp_path / "lines.jsonl", entries)
    assert read_json_lines(tmp_path / "lines.jsonl") == entries
    assert len((tmp_path / "lines.jsonl").read_bytes().splitlines()) == 2
    assert read_json_lines(tmp_path / "absent.jsonl") == []
    write_json(tmp_path / "one.json", entries[0])
    assert json.loads((tmp_path / "one.json").read_text()) == entries[0]


def test_a_table_is_quoted_where_it_must(tmp_path):
    write_csv(tmp_path / "table.csv", ["name", "count"], [["a, b", 1], ['say "c"', 2], ["é", 3]])
    assert (tmp_path / "table.csv").read_bytes().startswith(b'name,count\r\n"a, b",1\r\n')
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [["name", "count"], ["a, b", "1"], ['say "c"', "2"], ["é", "3"]]
