"""Configurations of accelerate: its own parser reads them, and the command in each has the effective batch it says."""

import re
import shlex
import subprocess

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from launching import EXAMPLES

from vicmae_hf.command_line import parse_arguments
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.training.engines import check_engine, check_sharding


CONFIGS = EXAMPLES / "pytorch" / "accelerate_configs"
NAMES = {"one_gpu": ("NO", 1), "eight_gpus": ("MULTI_GPU", 8), "four_nodes": ("MULTI_GPU", 32), "fsdp2": ("FSDP", 8)}


def command_words(text):
    """The command in the comment of a file, or in a script, without what launches it."""
    plain = re.sub(r"^#", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    (line,) = [line for line in plain.splitlines() if "run_pretraining.py" in line]
    return shlex.split(line)


def split_command(text):
    words = command_words(text)
    place = words.index("examples/pytorch/run_pretraining.py")
    return words[:place], words[place + 1 :]


def batch_of(text, num_processes, flags):
    """The effective batch in the comment, which must be that of the settings."""
    arguments = parse_arguments(PretrainingArguments, [str(EXAMPLES.parent / flags[0]), *flags[1:]])
    division = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    (found,) = re.findall(r"Effective batch (\d+) = (\d+) GPUs? x (\d+) x (\d+) steps?", text)
    assert tuple(map(int, found[1:])) == (num_processes, *division)
    assert int(found[0]) == num_processes * division[0] * division[1] == 4096
    return arguments


def test_there_is_a_test_for_each():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == NAMES.keys()


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_it_and_the_command_has_the_batch(name, monkeypatch):
    kind, num_processes = NAMES[name]
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes, config.mixed_precision) == (kind, num_processes, "bf16")
    launch, flags = split_command(path.read_text())
    assert launch[:2] == ["accelerate", "launch"] and f"{path.relative_to(EXAMPLES.parent)}" in launch
    arguments = batch_of(path.read_text(), num_processes, flags)
    # What the launcher would set for the script, for which the script then checks its settings.
    words = [str(path) if word.endswith(path.name) else word.replace("RANK", "1") for word in launch[2:]]
    parsed, *_ = _validate_launch_command(launch_command_parser().parse_args([*words, "script.py"]))
    assert (parsed.num_processes, parsed.num_machines) == (num_processes, 4 if name == "four_nodes" else 1)
    environment = prepare_simple_launcher_cmd_env(parsed)[1] if kind == "NO" else prepare_multi_gpu_env(parsed)
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    check_engine(arguments.mixed_precision, can_shard=True)
    check_sharding(arguments)
    assert (environment.get("ACCELERATE_USE_FSDP"), environment.get("FSDP_VERSION")) == (
        ("true", "2") if name == "fsdp2" else (None, None)
    )


def test_the_slurm_script_has_the_batch_and_is_sound():
    path = CONFIGS / "four_nodes.slurm"
    text = path.read_text()
    subprocess.run(["bash", "-n", path], check=True)
    launch, flags = split_command(text)
    assert launch[launch.index("--nnodes") + 1] == "4" and launch[launch.index("--nproc_per_node") + 1] == "8"
    assert "#SBATCH --nodes=4\n" in text and "#SBATCH --gpus-per-node=8\n" in text
    assert launch[:3] == ["srun", "--cpus-per-task", "$SLURM_CPUS_PER_TASK"]  # which it does not take over by itself
    arguments = batch_of(text, 4 * 8, flags)
    assert arguments.resume_from_checkpoint == "latest"


@pytest.mark.parametrize(
    ("status", "leaves_mark", "is_requeued"),
    [(0, False, False), (1, False, False), (1, True, True), (75, False, True), (143, False, True)],
)
def test_the_slurm_script_requeues_what_was_stopped(tmp_path, status, leaves_mark, is_requeued):
    """With programs in the place of Slurm's."""
    programs = tmp_path / "bin"
    programs.mkdir()
    mark = "touch outputs/vit_large/stopped.json" if leaves_mark else "true"
    for name, text in {"srun": f"{mark}; exit {status}", "scontrol": "echo $1; echo $@ >> calls"}.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    output = tmp_path / "outputs" / "vit_large"
    output.mkdir(parents=True)
    (output / "stopped.json").touch()  # of a stop before
    environment = {"PATH": f"{programs}:/usr/bin:/bin", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-3]"}
    subprocess.run(["bash", CONFIGS / "four_nodes.slurm"], cwd=tmp_path, env=environment, check=False)
    assert ("requeue 7" in (tmp_path / "calls").read_text()) == is_requeued
