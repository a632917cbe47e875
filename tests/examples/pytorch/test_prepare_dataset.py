"""`prepare_dataset.py` as users run it."""

import json

import datasets
from launching import run_here
from video_files import numbered_frames, write_video


def test_kinetics_from_the_command_line(tmp_path):
    (tmp_path / "k400" / "annotations").mkdir(parents=True)
    (tmp_path / "k400" / "val").mkdir()
    names = [f"video{number}" for number in range(4)]
    lines = [f"{name},{10 * number},{10 * number + 10},zumba,val" for number, name in enumerate(names)]
    csv_file = tmp_path / "k400" / "annotations" / "val.csv"
    csv_file.write_text("\n".join(["youtube_id,time_start,time_end,label,split", *lines]) + "\n")
    for number in (0, 2):
        path = tmp_path / "k400" / "val" / f"video{number}_0000{number}0_0000{number + 1}0.mp4"
        write_video(path, numbered_frames(5, seed=number))
    (tmp_path / "k400" / "val" / "video3_000030_000040.mp4").write_bytes(b"<html>404</html>")
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"dataset: kinetics400\nroot: {tmp_path / 'k400'}\nsplit: val\nnum_proc: 2\n")

    process = run_here("prepare_dataset.py", settings, "--output", tmp_path / "table", "--check", "decode")
    assert process.returncode == 0, process.stderr
    report = json.loads((tmp_path / "table" / "report.json").read_text())
    assert (report["listed"], report["missing"], report["unreadable"], report["in_table"]) == (4, 1, 1, 2)
    assert report["list_sha256"] in process.stdout and "Checking files" in process.stderr
    assert process.stdout.splitlines()[0] == "Kinetics-400 val"
    table = datasets.load_from_disk(str(tmp_path / "table"))
    assert table["name"][:] == ["video0_000000_000010", "video2_000020_000030"]
    assert table.features["label"].int2str(table["label"][:]) == ["zumba", "zumba"]

    csv_file.write_text(csv_file.read_text().replace("20,30,zumba", "20,30,zumbaa"))
    process = run_here("prepare_dataset.py", settings, "--output", tmp_path / "other")
    assert process.returncode == 1
    (line,) = process.stderr.splitlines()
    assert line.startswith(f"error: {csv_file}, line 4: unknown class 'zumbaa'")
    assert not (tmp_path / "other").exists()
