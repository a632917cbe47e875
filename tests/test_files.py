"""Files that are whole or absent."""

import csv
import json

import pytest

from vicmae_hf.errors import InputError
from vicmae_hf.files import partial_file, read_json_lines, write_csv, write_json, write_json_lines, write_whole


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
