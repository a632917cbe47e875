import json
import logging
import multiprocessing
import os
import time

import pytest

from vicmae_hf.data.media.bad_files import BadFiles, BadFilesError
from vicmae_hf.data.media.reading import TimeLimitError
from vicmae_hf.errors import InputError, MediaDecodingError


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="vicmae_hf.data.media.bad_files")


def read_record(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("num_files", "max_share", "allowed"), [(100, 0.05, 5), (119, 0.05, 5), (19, 0.05, 1), (2, 0.01, 1), (100, 0.0, 0)]
)
def test_the_share_that_may_be_bad(tmp_path, num_files, max_share, allowed):
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", num_files, max_share)
    for index in range(allowed):
        bad_files.add(f"/data/{index}.mp4", "no header")
    with pytest.raises(BadFilesError) as raised:
        bad_files.add("/data/last.mp4", "no header")
    message = str(raised.value)
    assert f"{allowed + 1} of {num_files} files" in message
    assert f"--max_bad_files {max_share} allows {allowed}" in message
    assert ("/data/0.mp4" if allowed else "/data/last.mp4") in message
    assert "\n" not in message
    # The one that was too many is in the record as well.
    assert len(read_record(tmp_path / "bad_files.jsonl")) == allowed + 1


def test_without_a_good_file_left_any_share_is_too_much():
    bad_files = BadFiles(None, 2, 1.0)
    bad_files.add("/data/0.mp4", "no header")
    with pytest.raises(BadFilesError, match=r"2 of 2 files could not be read, and none is left.*/data/0\.mp4"):
        bad_files.add("/data/1.mp4", "no header")


def test_a_file_counts_once(tmp_path):
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 100, 0.01)
    bad_files.add("/data/0.mp4", "/data/0.mp4: no header")
    bad_files.add("/data/0.mp4", "/data/0.mp4: another reason")
    assert len(bad_files) == 1
    assert read_record(bad_files.path) == [{"path": "/data/0.mp4", "error": "/data/0.mp4: no header"}]


def test_reasons_name_the_file(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="vicmae_hf.data.media.bad_files")
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 100, 0.05)
    bad_files.add("cats.parquet[7]", "312 bytes: truncated")
    bad_files.add("/data/ünï code.mp4", "cannot decode /data/ünï code.mp4: no header")
    assert read_record(bad_files.path) == [
        {"path": "cats.parquet[7]", "error": "cats.parquet[7]: 312 bytes: truncated"},
        {"path": "/data/ünï code.mp4", "error": "cannot decode /data/ünï code.mp4: no header"},
    ]
    assert "cats.parquet[7]: 312 bytes: truncated" in caplog.text


def test_a_record_is_continued(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    BadFiles(path, 40, 0.05).add("/data/0.mp4", "/data/0.mp4: no header")
    going_on = BadFiles(path, 40, 0.05)
    assert len(going_on) == 1
    going_on.add("/data/0.mp4", "/data/0.mp4: no header")
    going_on.add("/data/1.mp4", "/data/1.mp4: no frames")
    assert [entry["path"] for entry in read_record(path)] == ["/data/0.mp4", "/data/1.mp4"]
    with pytest.raises(BadFilesError, match="3 of 40"):
        BadFiles(path, 40, 0.05).add("/data/2.mp4", "no header")


def test_a_repaired_file_leaves_a_record_that_is_continued(tmp_path):
    broken, repaired = tmp_path / "broken.mp4", tmp_path / "repaired.mp4"
    for file in (broken, repaired):
        file.write_bytes(b"no video")
    path, names = tmp_path / "bad_files.jsonl", [str(broken), str(repaired), "cats.parquet[7]"]
    bad_files = BadFiles(path, 40, 1.0)
    for name in names:
        bad_files.add(name, "no header")
    assert list(BadFiles(path, 40, 1.0).errors) == names
    time.sleep(0.02)  # more than the clock of a file system
    (tmp_path / "copy.mp4").write_bytes(b"a video")
    os.utime(tmp_path / "copy.mp4", (0, 0))  # `cp --archive` keeps the time of the original
    (tmp_path / "copy.mp4").replace(repaired)
    going_on = BadFiles(path, 40, 1.0)
    assert list(going_on.errors) == [names[0], names[2]]
    going_on.merge()
    assert [entry["path"] for entry in read_record(path)] == [names[0], names[2]]


def test_what_others_find_is_seen(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    ours, theirs = BadFiles(path, 40, 0.05), BadFiles(path, 40, 0.05)
    theirs.add("/data/0.mp4", "no header")
    ours.add("/data/0.mp4", "no header")
    assert len(read_record(path)) == 1
    theirs.add("/data/1.mp4", "no header")
    ours.update()
    assert len(ours) == 2
    ours.check()
    with pytest.raises(BadFilesError, match="3 of 40"):
        ours.add("/data/2.mp4", "no header")
    with pytest.raises(BadFilesError, match="3 of 40"):
        theirs.update()
        theirs.check()


def test_a_line_that_is_still_being_written_is_read_later(tmp_path):
    path = tmp_path / "bad_files" / "other-machine-7.jsonl"
    lines = "".join(json.dumps({"path": f"/data/é{index}.mp4", "error": "no header"}) + "\n" for index in range(2))
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 40, 1.0)
    path.parent.mkdir()
    path.write_text(lines[:-5])
    bad_files.update()
    assert list(bad_files.errors) == ["/data/é0.mp4"]
    path.write_text(lines)
    bad_files.update()
    assert list(bad_files.errors) == ["/data/é0.mp4", "/data/é1.mp4"]


def test_what_is_found_after_the_end_is_recorded(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="vicmae_hf.data.media.bad_files")
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 10, 1.0)
    bad_files.add("a short name", "broken")
    bad_files.finish()
    for name in ("a much longer name than that one", "another"):
        bad_files.add(name, "broken")
    bad_files.finish()
    assert "no record" not in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == ["bad_files.jsonl"]
    assert len(BadFiles(tmp_path / "bad_files.jsonl", 10, 1.0)) == 3


def test_a_line_that_is_no_record_is_passed_over_and_told(tmp_path, caplog):
    """Half a line of a killed process with a whole one behind it, a list, an object without a path."""
    caplog.set_level(logging.WARNING, logger="vicmae_hf.data.media.bad_files")
    path = tmp_path / "bad_files.jsonl"
    whole = json.dumps({"path": "/data/1.mp4", "error": "no header"}) + "\n"
    path.write_text('{"path": "/data/0.mp4", "err' + whole + '["path"]\n{"error": "x"}\n' + whole)
    bad_files = BadFiles(path, 40, 1.0)
    assert list(bad_files.errors) == ["/data/1.mp4"]
    assert caplog.text.count("skipped a line that is no record") == 3
    assert not bad_files.must_wait("/data/1.mp4")


def test_a_record_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="vicmae_hf.data.media.bad_files")
    (tmp_path / "file").touch()
    bad_files = BadFiles(tmp_path / "file" / "bad_files.jsonl", 40, 1.0)
    bad_files.add("/data/0.mp4", "no header")
    assert "cannot be written" in caplog.text
    assert list(bad_files.errors) == ["/data/0.mp4"]
    # A folder that is missing, as on a second machine, is made.
    elsewhere = BadFiles(tmp_path / "missing" / "out" / "bad_files.jsonl", 40, 1.0)
    elsewhere.add("/data/0.mp4", "no header")
    assert list(BadFiles(elsewhere.path, 40, 1.0).errors) == ["/data/0.mp4"]


def add_many(path, start):
    bad_files = BadFiles(path, 1000, 1.0)
    start.wait()
    for index in range(150):
        bad_files.add(f"/data/{index}.mp4", "long reason " * 100)


def test_several_processes_share_a_record(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=add_many, args=(path, start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    # Each wrote a record of its own, of those that no other had recorded before it looked.
    parts = [read_record(part) for part in (tmp_path / "bad_files").iterdir()]
    assert len(parts) <= 3 and sum(map(len, parts)) >= 150
    bad_files = BadFiles(path, 1000, 1.0)
    bad_files.merge()
    names = [entry["path"] for entry in read_record(path)]
    assert len(names) == 150 and {*names} == {f"/data/{index}.mp4" for index in range(150)}
    bad_files.add("/data/more.mp4", "no header")
    bad_files.finish()
    assert len(bad_files) == len(read_record(path)) == 151
    assert not (tmp_path / "bad_files").exists()


def test_the_record_of_workers_is_written_while_the_run_lasts(tmp_path, monkeypatch):
    path = tmp_path / "bad_files.jsonl"
    ours = BadFiles(path, 40, 1.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    ours.merge_sometimes()
    (tmp_path / "bad_files").mkdir()
    (tmp_path / "bad_files" / "worker-7.jsonl").write_text('{"path": "a.mp4", "error": "a.mp4: no header"}\n')
    ours.merge_sometimes()
    assert not path.exists()
    now += 31
    ours.merge_sometimes()
    assert read_record(path) == [{"path": "a.mp4", "error": "a.mp4: no header"}]
    written = path.stat().st_mtime_ns
    now += 31
    ours.merge_sometimes()
    assert path.stat().st_mtime_ns == written  # there is nothing new


def test_no_record_where_all_files_are_good(tmp_path):
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 10, 0.05)
    bad_files.merge()
    assert not bad_files.path.exists()


@pytest.mark.parametrize("max_share", [-0.1, 1.1, float("nan")])
def test_bad_share(max_share):
    with pytest.raises(InputError, match="max_bad_files is a share between 0 and 1"):
        BadFiles(None, 10, max_share)


def test_the_first_that_can_be_read_is_taken(tmp_path):
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 100, 0.05)
    opened = []

    def reading(name, error=None):
        def read():
            opened.append(name)
            if error is not None:
                raise error
            return f"sample of {name}"

        return name, read

    candidates = [
        reading("a.mp4", MediaDecodingError("no header")),
        reading("b.mp4", TimeLimitError("late")),
        reading("c.mp4"),
    ]
    for _ in range(2):
        assert bad_files.read_first("folder", [*candidates, reading("d.mp4")]) == "sample of c.mp4"
    # Only what was late is not opened again.
    assert opened == ["a.mp4", "b.mp4", "c.mp4", "a.mp4", "c.mp4"]
    assert read_record(bad_files.path) == [
        {"path": "a.mp4", "error": "a.mp4: no header"},
        {"path": "b.mp4", "error": "b.mp4: late", "transient": True},
    ]
    with pytest.raises(BadFilesError, match=r"folder: none of 2 files could be read, among them a\.mp4"):
        bad_files.read_first("folder", [*candidates[:2], candidates[0], candidates[1]])


def test_a_file_that_took_too_long_is_tried_again_later_and_forgotten_if_it_can_be_read(tmp_path, monkeypatch):
    path = tmp_path / "bad_files.jsonl"
    bad_files, other = BadFiles(path, 100, 1.0), BadFiles(path, 100, 1.0)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    bad_files.add("a.mp4", "late", is_transient=True)
    assert bad_files.must_wait("a.mp4") and not other.must_wait("a.mp4")  # the other has not looked yet
    now += 6
    assert other.must_wait("a.mp4")
    now += 1800
    assert not bad_files.must_wait("a.mp4") and not other.must_wait("a.mp4")
    assert bad_files.read_first("folder", [("a.mp4", lambda: "sample")]) == "sample"
    other.update()
    assert len(bad_files) == len(other) == 0
    bad_files.finish()
    assert read_record(path) == []


def test_a_run_that_goes_on_tries_again_what_took_too_long(tmp_path):
    path = tmp_path / "bad_files.jsonl"
    first = BadFiles(path, 100, 1.0)
    first.add("late.mp4", "late", is_transient=True)
    first.add("broken.mp4", "no header")
    second = BadFiles(path, 100, 1.0)
    assert list(second.errors) == ["broken.mp4"]
    assert not second.must_wait("late.mp4")


def test_the_newest_of_several_records_counts(tmp_path):
    parts = tmp_path / "bad_files"
    parts.mkdir()
    entry = {"path": "a.mp4", "error": "late", "transient": True}
    # The file was read after all, as the record says that comes first by its name.
    (parts / "a-1.jsonl").write_text(json.dumps({"path": "a.mp4", "error": None, "time": 2.0}) + "\n")
    (parts / "b-1.jsonl").write_text(json.dumps(entry | {"time": 1.0}) + "\n")
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 100, 1.0)
    assert len(bad_files) == 0
    (parts / "c-1.jsonl").write_text(json.dumps(entry | {"time": 3.0}) + "\n")
    bad_files.update()
    assert list(bad_files.errors) == ["a.mp4"]


def test_a_run_that_ends_for_its_bad_files_leaves_the_whole_record(tmp_path):
    (tmp_path / "bad_files").mkdir()
    lines = [json.dumps({"path": f"/data/{index}.mp4", "error": "no header", "time": 1.0}) + "\n" for index in (0, 1)]
    bad_files = BadFiles(tmp_path / "bad_files.jsonl", 10, 0.1)
    with pytest.raises(BadFilesError, match="2 of 10 files could not be read"), bad_files.errors_of_workers():
        (tmp_path / "bad_files" / "worker-1.jsonl").write_text("".join(lines))
        raise BadFilesError("with the traceback of a worker")
    assert [entry["path"] for entry in read_record(bad_files.path)] == ["/data/0.mp4", "/data/1.mp4"]
