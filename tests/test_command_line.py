"""Settings from the command line and from files."""

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import psutil
import pytest
from launching import ACCELERATE, run

from vicmae_hf import ViCMAEConfig
from vicmae_hf.command_line import (
    build_parser,
    command_to_resume,
    parse_arguments,
    parse_config_overrides,
    parse_keywords,
)
from vicmae_hf.commands.evaluate import EvaluationArguments
from vicmae_hf.commands.plan import PlanArguments
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.settings import ArgumentsError


REQUIRED = ["--train_data", "clips", "--output_dir", "out"]


def parse(*argv):
    return parse_arguments(PretrainingArguments, [*argv])


def test_flags_are_typed():
    arguments = parse(
        *["--train_data", "a", "b", "--output_dir", "out", "--image_size", "160", "96", "--push_to_hub"],
        *[
            "--max_train_steps",
            "7",
            "--report_to",
            "tensorboard",
            "--no-gradient_checkpointing",
            "--warmup_epochs",
            "0.5",
        ],
    )
    assert arguments.train_data == ["a", "b"]
    assert arguments.image_size == [160, 96]
    assert arguments.push_to_hub is True
    assert arguments.gradient_checkpointing is False
    assert arguments.max_train_steps == 7
    assert arguments.report_to == ["tensorboard"]
    assert arguments.warmup_epochs == 0.5


@pytest.mark.parametrize("extension", ["yaml", "json"])
def test_a_file_gives_settings_and_flags_win(tmp_path, extension):
    settings = {
        "train_data": ["a", "b"],
        "output_dir": "from_file",
        "image_size": 96,
        "overwrite_output_dir": True,
        "resume_from_checkpoint": None,
        "seed": 3,
    }
    path = tmp_path / f"settings.{extension}"
    if extension == "json":
        path.write_text(json.dumps(settings | {"base_learning_rate": 0.003, "config_overrides": {"hidden_size": 64}}))
    else:
        # YAML 1.1 reads 3e-3 as a string.
        lines = [f"{name}: {json.dumps(value)}" for name, value in settings.items()]
        path.write_text("\n".join([*lines, "base_learning_rate: 3e-3", "config_overrides:", "  hidden_size: 64"]))
    arguments = parse(str(path), "--output_dir", "from_flag", "--train_data", "c", "--no-overwrite_output_dir")
    assert arguments.train_data == ["c"]
    assert arguments.output_dir == "from_flag"
    assert arguments.overwrite_output_dir is False
    assert arguments.image_size == [96]
    assert arguments.seed == 3
    assert arguments.base_learning_rate == 0.003
    assert arguments.config_overrides == "hidden_size=64"
    assert arguments.resume_from_checkpoint is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("num_train_epoch: 3", "unknown setting 'num_train_epoch'. Did you mean num_train_epochs"),
        ("push_to_hub: 1", "push_to_hub must be true or false, got 1"),
        ("- a", "expected settings as `name: value`, got list"),
        ("a: [", "cannot be read as settings"),
    ],
)
def test_a_wrong_file_is_named_with_its_fault(tmp_path, content, message):
    path = tmp_path / "settings.yaml"
    path.write_text(content)
    with pytest.raises(ArgumentsError) as error:
        parse(str(path), *REQUIRED)
    assert message in str(error.value)
    assert str(path) in str(error.value)


def test_a_missing_file_is_named():
    with pytest.raises(ArgumentsError, match=r"missing\.yaml: cannot be read"):
        parse("missing.yaml", *REQUIRED)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeed", "1"], "unknown flag --seeed. Did you mean --seed?"),
        (["--seeed=1"], "unknown flag --seeed. Did you mean --seed?"),
        (["--no_horizontal_flip"], "unknown flag --no_horizontal_flip. Did you mean --no-horizontal_flip?"),
        (["--see", "1"], "unknown flag --see. Did you mean --seed?"),
        (["--xyzzy"], "unknown flag --xyzzy."),
        (["--seed", "one"], "argument --seed: invalid int value: 'one'"),
        (["--frame_sampling", "distent"], "invalid choice: 'distent'"),
        (["stray"], "the data is given twice, as stray and by --train_data."),
    ],
)
def test_wrong_flags_are_usage_errors_of_two_lines(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*REQUIRED, *flags)
    usage, error = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2
    assert usage.startswith("usage: ")
    assert error.startswith("error: ") and message in error


def test_required_settings_that_are_missing_are_named_together(capsys):
    with pytest.raises(SystemExit):
        parse("--seed", "1")
    assert capsys.readouterr().err.splitlines()[-1] == "error: missing: --train_data, --output_dir."


def test_data_and_output_have_short_forms(tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("train_data: from_file\nseed: 3\n")
    assert parse("a", "b", "-o", "out") == parse("--train_data", "a", "b", "--output_dir", "out")
    # Wherever it stands, and in place of that of a file.
    expected = parse("--train_data", "a", "--output_dir", "out", "--seed", "4")
    assert parse(str(settings), "--seed", "4", "-o", "out", "a") == expected
    assert parse(str(settings), "-o", "out").train_data == ["from_file"]
    evaluation = ["--model_name_or_path", "model", "-o", "out"]
    assert parse_arguments(EvaluationArguments, ["clips", *evaluation]).data == "clips"
    with pytest.raises(SystemExit):
        parse_arguments(EvaluationArguments, ["clips", "more", *evaluation])


def test_a_protocol_without_views_is_refused_before_the_model_is_loaded():
    flags = ["clips", "--model_name_or_path", "model", "-o", "out", "--num_clips", "5", "1", "--num_crops", "3", "0"]
    with pytest.raises(ArgumentsError, match=r"--num_crops must be at least 1, got 0\."):
        parse_arguments(EvaluationArguments, flags)


def test_help_shows_the_short_forms_and_what_is_optional():
    page = build_parser(PretrainingArguments).format_help()
    assert "DATA -o OUTPUT [--flag value ...]\n" in page
    assert "\n  DATA, --train_data DATA [DATA ...]\n" in page
    # `vicmae plan` needs no output folder, and its --output is another file.
    assert "DATA [-o OUTPUT_DIR] [--flag value ...]\n" in build_parser(PlanArguments).format_usage()


def test_keywords_are_checked_as_flags_are():
    arguments = parse_keywords(
        PretrainingArguments,
        {
            "train_data": Path("clips"),
            "output_dir": Path("out"),
            "image_size": (160, 96),
            "config_overrides": {"hidden_size": 64},
            "max_train_steps": None,
            "push_to_hub": True,
            "horizontal_flip": False,
        },
    )
    flags = ["--image_size", "160", "96", "--config_overrides", "hidden_size=64", "--push_to_hub"]
    assert arguments == parse(*REQUIRED, *flags, "--no-horizontal_flip")
    for settings, message in [
        ({"num_train_epoch": 3}, "unknown setting 'num_train_epoch'. Did you mean num_train_epochs?"),
        ({"seed": -1}, "--seed must be between 0 and"),
        ({"seed": 1.5}, "invalid int value: '1.5'"),
        ({"horizontal_flip": "no"}, "horizontal_flip must be true or false, got 'no'"),
        ({"output_dir": None}, "missing: --output_dir"),
        ({"hub_model_id": "hf_" + 32 * "a"}, "--hub_model_id holds an access token"),
    ]:
        with pytest.raises(ArgumentsError) as error:
            parse_keywords(PretrainingArguments, {"train_data": "clips", "output_dir": "out"} | settings)
        assert message in str(error.value)


def test_settings_survive_being_written_and_read(tmp_path):
    arguments = parse(*REQUIRED, "--train_data_weights", "1", "2.5", "--seed", "4")
    path = tmp_path / "arguments.json"
    path.write_text(json.dumps(asdict(arguments)))
    assert parse(str(path)) == arguments


def test_config_overrides():
    changes = parse_config_overrides(
        ViCMAEConfig, "hidden_size=64, norm_pix_loss=false,contrastive_loss=none,temperature=0.2"
    )
    assert changes == {"hidden_size": 64, "norm_pix_loss": False, "contrastive_loss": "none", "temperature": 0.2}
    assert parse_config_overrides(ViCMAEConfig, None) == {}
    with pytest.raises(ArgumentsError, match=r"no field 'hiden_size'. Did you mean hidden_size"):
        parse_config_overrides(ViCMAEConfig, "hiden_size=3")
    with pytest.raises(ArgumentsError, match="expected name=value, got 'hidden_size'"):
        parse_config_overrides(ViCMAEConfig, "hidden_size")


def test_small_numbers_of_the_config_are_numbers():
    """YAML reads 1e-05, as Python prints it, as a string."""
    assert parse_config_overrides(ViCMAEConfig, f"contrastive_weight={1e-05}")["contrastive_weight"] == 1e-05
    assert parse_config_overrides(ViCMAEConfig, "pooling=mean,hidden_size=32") == {
        "pooling": "mean",
        "hidden_size": 32,
    }


def test_config_overrides_may_be_lists():
    changes = parse_config_overrides(ViCMAEConfig, "image_size=[64,96],mask_ratio=0.5")
    assert changes == {"image_size": [64, 96], "mask_ratio": 0.5}
    assert parse_config_overrides(ViCMAEConfig, "image_size=(64, 96)") == {"image_size": "(64, 96)"}
    with pytest.raises(ArgumentsError, match=r"cannot read the value of 'image_size=\[64'"):
        parse_config_overrides(ViCMAEConfig, "image_size=[64")


def test_no_is_no_in_a_yaml_file(tmp_path):
    (tmp_path / "settings.yaml").write_text("mixed_precision: no\n")
    assert parse(str(tmp_path / "settings.yaml"), *REQUIRED).mixed_precision == "no"


def test_a_byte_order_mark_is_passed_over(tmp_path):
    (tmp_path / "settings.json").write_bytes(b"\xef\xbb\xbf" + b'{"seed": 3}')
    assert parse(str(tmp_path / "settings.json"), *REQUIRED).seed == 3


@pytest.mark.slow  # a launcher and its process
def test_the_command_to_resume_has_the_flags_of_the_launcher(tmp_path):
    script = tmp_path / "a script.py"
    script.write_text("from vicmae_hf.command_line import command_to_resume\nprint(command_to_resume())\n")
    process = run(str(script), "settings.yaml", "--resume_from_checkpoint", "checkpoint-3", "--output_dir", "my runs")
    assert process.returncode == 0, process.stderr
    expected = [str(script), "settings.yaml", "--output_dir", "my runs", "--resume_from_checkpoint", "latest"]
    assert shlex.split(process.stdout.splitlines()[-1]) == [sys.executable, *ACCELERATE, *expected]


class Parent:
    def __init__(self, command):
        self.command = command

    def parent(self):
        return self

    def cmdline(self):
        return self.command


@pytest.mark.parametrize(
    ("parent", "started", "expected"),
    [
        (
            ["/bin/python3", "/bin/torchrun", "--nproc_per_node", "2", "train.py"],
            [],
            "/bin/torchrun --nproc_per_node 2",
        ),
        (["/bin/python3", "PATH/accelerate", "launch", "train.py"], [], "accelerate launch"),
        (["bash", "-c", "python train.py"], ["python3", "train.py"], "python3"),
        (["timeout", "60", "python3", "train.py"], ["python3", "-u", "train.py"], "python3 -u"),
        (["python3", "other.py"], ["python3", "-c", "import runpy"], "python"),
    ],
)
def test_the_launcher_is_what_stood_before_the_script(monkeypatch, tmp_path, parent, started, expected):
    (tmp_path / "accelerate").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(psutil, "Process", lambda: Parent([part.replace("PATH", str(tmp_path)) for part in parent]))
    monkeypatch.setattr(sys, "orig_argv", [*started, "--seed", "1"])
    monkeypatch.setattr(sys, "argv", ["train.py", "--seed", "1"])
    assert command_to_resume() == f"{expected} train.py --seed 1 --resume_from_checkpoint latest"


@pytest.mark.parametrize(
    ("parent", "started", "script", "expected"),
    [
        (["bash"], ["/bin/python3", "PATH/vicmae"], "PATH/vicmae", "vicmae"),
        (["bash"], ["/bin/python3", "/elsewhere/vicmae"], "/elsewhere/vicmae", "/elsewhere/vicmae"),
        (["bash"], ["python3", "-m", "vicmae_command"], "/site/vicmae_command.py", "python3 -m vicmae_command"),
        (
            ["/bin/python3", "PATH/vicmae", "pretrain", "clips", "--num_processes", "2"],
            ["/bin/python3", "-u", "/site/vicmae_command.py"],
            "/site/vicmae_command.py",
            "vicmae",
        ),
        (
            ["/bin/python3", "PATH/accelerate", "launch", "-m", "vicmae_command", "pretrain", "clips"],
            ["/bin/python3", "-m", "vicmae_command"],
            "/site/vicmae_command.py",
            "accelerate launch -m vicmae_command",
        ),
    ],
)
def test_the_command_to_resume_is_that_of_vicmae(monkeypatch, tmp_path, parent, started, script, expected):
    for name in ("accelerate", "vicmae"):
        (tmp_path / name).touch(mode=0o755)
    parent, started = ([part.replace("PATH", str(tmp_path)) for part in command] for command in (parent, started))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(psutil, "Process", lambda: Parent(parent))
    monkeypatch.setattr(sys, "orig_argv", [*started, "pretrain", "clips"])
    monkeypatch.setattr(sys, "argv", [script.replace("PATH", str(tmp_path)), "pretrain", "clips"])
    number = " --num_processes 2" if "--num_processes" in parent else ""
    assert command_to_resume() == f"{expected} pretrain clips{number} --resume_from_checkpoint latest"
