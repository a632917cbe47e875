"""Limits of settings, and what is done to every value."""

import math
from dataclasses import dataclass, fields

import pytest

from vicmae_hf.classification.arguments import ClassificationArguments
from vicmae_hf.command_line import parse_arguments
from vicmae_hf.evaluation.arguments import InferenceArguments
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.settings import CORES, ArgumentsError, Settings, setting


REQUIRED = ["--train_data", "clips", "--output_dir", "out"]


def parse(*argv):
    return parse_arguments(PretrainingArguments, [*argv])


@pytest.mark.parametrize(
    "flags",
    [
        ["--num_train_epochs", "0"],
        ["--per_device_train_batch_size", "0"],
        ["--base_learning_rate", "-1"],
        ["--base_learning_rate", "nan"],
        ["--max_bad_files", "1.5"],
        ["--image_size", "1", "2", "3"],
        ["--checkpointing_steps", "-1"],
        ["--seconds_per_file", "inf"],
        ["--segment_seconds", "1e-9"],
        ["--dataloader_num_workers", "-1"],
        ["--dataloader_num_workers", "100000"],
    ],
)
def test_values_out_of_range_name_the_flag(flags):
    with pytest.raises(ArgumentsError, match=flags[0]):
        parse(*REQUIRED, *flags)


@dataclass(kw_only=True)
class Limits(Settings):
    least: int | None = setting(None, "at least", minimum=2)
    share: float = setting(0.5, "inclusive", minimum=0, maximum=1)
    inside: list[float] = setting([0.5], "exclusive", above=0, below=1)
    decay: float = setting(1.0, "half open", above=0, maximum=1)
    workers: int = setting(1, "processes", minimum=0, per_core=4)
    free: float = setting(0.0, "without limits")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"least": 1}, "--least must be at least 2, got 1."),
        ({"least": -(10**400)}, f"--least must be at least 2, got {-(10**400)}."),
        ({"share": -0.1}, "--share must be between 0 and 1, got -0.1."),
        ({"share": 1.1}, "--share must be between 0 and 1, got 1.1."),
        ({"inside": [0.5, 1.0]}, "--inside must be above 0 and below 1, got 1.0."),
        ({"inside": [0.0]}, "--inside must be above 0 and below 1, got 0.0."),
        ({"decay": 0.0}, "--decay must be above 0 and at most 1, got 0.0."),
        ({"share": math.nan}, "--share must be finite and between 0 and 1, got nan."),
        ({"least": math.inf}, "--least must be finite and at least 2, got inf."),
        ({"workers": -1}, f"--workers must be at least 0 and at most, for each of {CORES} cores, 4, got -1."),
        (
            {"workers": 100_000},
            f"--workers must be at least 0 and at most, for each of {CORES} cores, 4, got 100000.",
        ),
    ],
)
def test_limits_of_a_setting(changes, message):
    with pytest.raises(ArgumentsError) as error:
        Limits(**changes)
    assert str(error.value) == message


def test_values_at_their_limits_and_unset_ones_pass():
    Limits(least=2, share=0, decay=1.0, inside=[], workers=4 * CORES, free=-1e30)
    Limits(least=None, share=1)


@pytest.mark.parametrize("arguments_class", [PretrainingArguments, ClassificationArguments, InferenceArguments])
def test_a_setting_declared_again_keeps_its_limits(arguments_class):
    limits = {entry.name: entry.metadata["limits"] for entry in fields(arguments_class)}
    for base in arguments_class.__mro__[1:-1]:
        for entry in fields(base):
            assert limits[entry.name] == entry.metadata["limits"], entry.name


def test_the_home_folder_is_expanded_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "settings.yaml").write_text("train_data: [~/a, b/~c]\noutput_dir: ~/runs/x\nprobe_data: ~/p\n")
    arguments = parse(str(tmp_path / "settings.yaml"))
    assert arguments.train_data == [f"{tmp_path}/a", "b/~c"]
    assert (arguments.output_dir, arguments.probe_data) == (f"{tmp_path}/runs/x", f"{tmp_path}/p")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("name", ["contrastive_start_epoch", "base_learning_rate", "window_seconds"])
def test_numbers_are_finite(name, value):
    with pytest.raises(ArgumentsError, match=f"--{name} must be finite"):
        parse(*REQUIRED, f"--{name}={value}")


def test_a_seed_that_numpy_cannot_take():
    assert parse(*REQUIRED, "--seed", "4294967295").seed == 2**32 - 1
    with pytest.raises(ArgumentsError, match="--seed must be between 0 and 4294967295, got 4294967296"):
        parse(*REQUIRED, "--seed", "4294967296")
