"""
Damaged and odd files (`mutants.py`) through pretraining, packing and evaluation, each in a process of its own. Each
file is also read alone (`reading_alone.py`): what cannot be read there has to be listed, and nothing else.
"""

import csv
import json
import math
import os
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import pytest
from launching import Forked, script_path
from mutants import CLASS_NAMES, KINDS, Mutant, write_mutants
from reading_alone import CLIP_FRAMES, Reading, read_alone
from tiny_models import shake, tiny_config

from vicmae_hf import ViCMAEForVideoClassification
from vicmae_hf.data.sources.sources import open_source
from vicmae_hf.processors import build_processors


PLAIN_USER = str(Path(__file__).with_name("plain_user.py"))
NUM_MUTANTS = 1000
MAX_JPEG_SIDE = 65_500  # pixels; libjpeg's limit
ALLOW = ["--max_bad_files", "0.99"]
MODEL = (
    "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,patch_size=8,decoder_hidden_size=16,"
    "decoder_num_hidden_layers=1,decoder_num_attention_heads=2,decoder_intermediate_size=32"
)


@dataclass
class Run:
    """A finished run of a script: how it ended, and the files that it listed, with the error of each."""

    returncode: int
    stderr: str
    hung: bool
    seconds: float
    listed: dict[str, str]


@dataclass
class Proof:
    folder: Path
    mutants: list[Mutant]
    readings: dict[str, Reading]
    runs: dict[str, Run]

    @property
    def files(self) -> set[str]:
        return set(self.readings)

    def unreadable(self, part: str) -> set[str]:
        """Those of which a part ("whole" or "clip") cannot be read."""
        return {path for path, reading in self.readings.items() if not getattr(reading, part)}


def run_script(script: str, *flags, record: Path, limit: float) -> Run:
    start = time.monotonic()
    forked = Forked(PLAIN_USER, script_path(script), *flags)
    forked.process.join(limit)
    hung = forked.is_running()
    if hung:
        forked.kill()
    finished = forked.finish()
    lines = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    listed = {line["path"]: line["error"] for line in lines}
    assert len(listed) == len(lines)
    return Run(finished.returncode, finished.stderr, hung, time.monotonic() - start, listed)


def pretraining(folder: Path, num_files: int, limit: float) -> Run:
    # Batches that divide the files: a pass over them leaves none out.
    batch_size = next(size for size in (10, 9, 8, 7, 6, 5, 4, 3, 2) if num_files % size == 0)
    return run_script(
        "run_pretraining.py",
        *["--train_data", folder / "data", "--output_dir", folder / "pretrained", *ALLOW],
        *["--image_size", "32", "--config_overrides", MODEL, "--dataloader_num_workers", "2"],
        *["--per_device_train_batch_size", batch_size, "--max_train_steps", num_files // batch_size],
        *["--warmup_epochs", "0", "--contrastive_start_epoch", "0", "--checkpointing_steps", "0"],
        record=folder / "pretrained" / "bad_files.jsonl",
        limit=limit,
    )


def packing(folder: Path, limit: float) -> Run:
    return run_script(
        "pack_frames.py",
        *["--input", folder / "data", "--output", folder / "store", "--labelled", "--frames_per_second", "0", *ALLOW],
        record=folder / "store" / "bad_files.jsonl",
        limit=limit,
    )


def evaluation(folder: Path, data: Path, output: str, limit: float) -> Run:
    return run_script(
        "run_evaluation.py",
        *["--model_name_or_path", folder / "classifier", "--data", data, "--output_dir", folder / output],
        *["--num_frames", CLIP_FRAMES, "--frames_per_second", "0", "--dataloader_num_workers", "1"],
        record=folder / output / "bad_files.jsonl",
        limit=limit,
    )


def save_classifier(folder: Path) -> None:
    names = {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: i for i, name in enumerate(CLASS_NAMES)}}
    model = shake(ViCMAEForVideoClassification(tiny_config(num_frames=CLIP_FRAMES, **names)))
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)


def link_readable(proof: Proof) -> Path:
    """A folder that has the files alone of which a clip can be read."""
    folder = proof.folder / "readable"
    for path in sorted(proof.files - proof.unreadable("clip")):
        link = folder / Path(path).relative_to(proof.folder / "data")
        link.parent.mkdir(parents=True, exist_ok=True)
        os.link(path, link)
    return folder


def prove(folder: Path, count: int, limit: float) -> Proof:
    mutants = write_mutants(folder / "data", count)
    readings = {str(mutant.path): read_alone(mutant.path) for mutant in mutants if not mutant.path.is_dir()}
    proof = Proof(folder, mutants, readings, {})
    save_classifier(folder / "classifier")
    proof.runs["pretraining"] = pretraining(folder, len(readings), limit)
    proof.runs["packing"] = packing(folder, limit)
    proof.runs["evaluation"] = evaluation(folder, folder / "data", "evaluation", limit)
    proof.runs["evaluation of the readable"] = evaluation(folder, link_readable(proof), "evaluation_readable", limit)
    return proof


def read_predictions(folder: Path) -> dict[str, list[float]]:
    """Class and name of each file that was evaluated -> its probabilities."""
    table = pyarrow.parquet.read_table(folder / "predictions.parquet").to_pydict()
    names = ["/".join(Path(path).parts[-2:]) for path in table["file"]]
    assert len(set(names)) == len(names)
    assert [row["file"] for row in csv.DictReader((folder / "predictions.csv").open())] == table["file"]
    return dict(zip(names, table["probabilities_1x1"], strict=True))


def count_replaced(proof: Proof) -> int:
    """Predictions that are not the same without the unreadable files, or are of files that cannot be read."""
    found, alone = (read_predictions(proof.folder / name) for name in ("evaluation", "evaluation_readable"))
    return sum(
        name not in alone or any(not math.isclose(*pair, abs_tol=1e-5) for pair in zip(row, alone[name], strict=True))
        for name, row in found.items()
    )


def check_ends(proof: Proof) -> None:
    assert {path: reading.end for path, reading in proof.readings.items() if reading.end} == {}
    for name, run in proof.runs.items():
        assert not run.hung, f"{name}: {run.stderr}"
        assert run.returncode == 0, f"{name}: {run.stderr}"
        assert "Traceback" not in run.stderr, f"{name}: {run.stderr}"
        assert run.listed.keys() <= proof.files, name
        for path, error in run.listed.items():
            assert path in error, name
            assert len(error) > len(path) + 5, name


def not_packed(proof: Proof) -> set[str]:
    """What packing cannot read, or not encode as JPEG."""
    too_long = {path for path, reading in proof.readings.items() if reading.longest_side > MAX_JPEG_SIDE}
    return proof.unreadable("whole") | too_long


def check_lists(proof: Proof) -> None:
    # Pretraining draws two frames. Of a file that is damaged in parts they may be whole ones or not.
    unreadable = {path for path, reading in proof.readings.items() if not any(reading.frames)}
    damaged = {path for path, reading in proof.readings.items() if not all(reading.frames)} | unreadable
    listed = proof.runs["pretraining"].listed.keys()
    assert unreadable - listed == set()
    assert listed - damaged == set()
    assert proof.runs["packing"].listed.keys() == not_packed(proof)
    assert proof.runs["evaluation"].listed.keys() == proof.unreadable("clip")
    assert proof.runs["evaluation of the readable"].listed == {}


def check_results(proof: Proof) -> None:
    root = str(proof.folder / "data") + os.sep
    stored = open_source(proof.folder / "store").list_names()
    assert sorted(root + name for name in stored) == sorted(proof.files - not_packed(proof))
    predicted = read_predictions(proof.folder / "evaluation").keys()
    assert {root + name for name in predicted} == proof.files - proof.unreadable("clip")
    assert count_replaced(proof) == 0
    results = json.loads((proof.folder / "evaluation" / "all_results.json").read_text())
    assert (results["num_eval_samples"], results["num_failed"]) == (len(predicted), len(proof.unreadable("clip")))
    results = json.loads((proof.folder / "pretrained" / "all_results.json").read_text())
    assert results["num_train_files"] == len(proof.files)
    assert results["num_failed"] == len(proof.runs["pretraining"].listed)


def describe(proof: Proof, seconds: float) -> str:
    """A line of a table for each kind, and one for all."""
    kinds = Counter(mutant.kind for mutant in proof.mutants)
    lines = ["| kind | mutants | listed by pretraining, packing, evaluation |", "|---|---|---|"]
    for kind in KINDS:
        paths = {str(mutant.path) for mutant in proof.mutants if mutant.kind == kind} & proof.files
        listed = [len(paths & run.listed.keys()) for run in list(proof.runs.values())[:3]]
        lines.append(f"| {kind} | {kinds[kind]} | {', '.join(map(str, listed))} |")
    crashes = sum(run.returncode != 0 and not run.hung for run in proof.runs.values())
    hangs = sum(run.hung for run in proof.runs.values())
    listed = ", ".join(f"{len(run.listed)} by {name}" for name, run in list(proof.runs.items())[:3])
    lines += [
        "",
        "| mutants | crashes | hangs | failures listed | replaced in evaluation | seconds |",
        "|---|---|---|---|---|---|",
        f"| {len(proof.mutants)} | {crashes} | {hangs} | {listed} | {count_replaced(proof)} | {seconds:.0f} |",
    ]
    return "\n".join(lines)


@pytest.mark.slow
def test_one_mutant_of_each_kind(tmp_path):
    proof = prove(tmp_path, len(KINDS), limit=120)
    check_ends(proof)
    check_lists(proof)
    check_results(proof)


def test_the_same_seed_makes_the_same_mutants(tmp_path):
    contents = []
    for name, seed in [("one", 0), ("two", 0), ("three", 1)]:
        mutants = write_mutants(tmp_path / name, len(KINDS), seed)
        contents.append({mutant.path.name: mutant.path.read_bytes() for mutant in mutants if mutant.path.is_file()})
    assert contents[0] == contents[1]
    assert contents[0].keys() != contents[2].keys()


@pytest.mark.faults
def test_a_thousand_mutants(tmp_path):
    start = time.monotonic()
    proof = prove(tmp_path, NUM_MUTANTS, limit=900)
    print(describe(proof, time.monotonic() - start))
    check_ends(proof)
    check_lists(proof)
    check_results(proof)
    shutil.rmtree(tmp_path)
