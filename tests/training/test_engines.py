"""Engines chosen by `accelerate config` that are not supported: refused in one line, before anything is read."""

import pytest
from accelerate.utils import is_torch_xla_available
from launching import ACCELERATE, Forked, run

from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.engines import check_engine


# Neither data nor model is there: reading them would be another error.
TRAINING = ["--train_data", "no_data", "--output_dir", "out"]
INFERENCE = ["--model_name_or_path", "no_model"]
SCRIPTS = {
    "run_pretraining.py": TRAINING,
    "run_classification.py": [*TRAINING, "--task", "video", "--method", "finetune", "--eval_data", "no_data"],
    "run_evaluation.py": [*INFERENCE, "--data", "no_data", "--output_dir", "out"],
    "export_features.py": [*INFERENCE, "--data", "no_data", "--output", "out.parquet"],
    "run_linear_probe.py": [*INFERENCE, *TRAINING, "--eval_data", "no_data"],
}
SUPPORTED = "Supported: one process, and several processes with the whole model in each, on CPUs or GPUs"


def assert_refused(process, engine):
    lines = [line for line in process.stderr.splitlines() if "error" in line.lower()]
    assert process.returncode == 1, process.stderr
    assert lines[0].startswith(f"error: accelerate's configuration chooses {engine} ("), process.stderr
    assert SUPPORTED in lines[0]


@pytest.mark.parametrize(
    ("environment", "engine"),
    [
        # Accelerate would say that DeepSpeed is not installed.
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "DeepSpeed"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        (
            {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"},
            "tensor, context or sequence parallelism",
        ),
        ({"ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "MODEL_PARALLEL"}, "SageMaker's own parallelism"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "8-bit precision"),
    ],
)
def test_an_engine_that_is_not_supported_is_refused(environment, engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = Forked("run_pretraining.py", *SCRIPTS["run_pretraining.py"], **environment).finish()
    assert_refused(process, engine)
    assert len(process.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


# FSDP2 is for pretraining.
@pytest.mark.parametrize(
    ("script", "engine"), [*((script, "DeepSpeed") for script in SCRIPTS), *((s, "FSDP") for s in [*SCRIPTS][1:])]
)
def test_every_script_that_computes_refuses_it(script, engine, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    environment = {f"ACCELERATE_USE_{engine.upper()}": "true", "FSDP_VERSION": "2"}
    process = Forked(script, *SCRIPTS[script], **environment).finish()
    assert_refused(process, engine)
    assert len(process.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "environment",
    [
        # What the launcher sets for one process, and for a precision that the script's own flag replaces.
        {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_SAGEMAKER_DISTRIBUTED_TYPE": "NO"},
        {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_DYNAMO_BACKEND": "NO"},
    ],
)
def test_what_is_supported_goes_on_to_the_data(environment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = Forked("run_pretraining.py", *SCRIPTS["run_pretraining.py"], **environment).finish()
    assert process.stderr.startswith("error: no_data: no such folder, and no dataset of that name")


def test_tpus_are_refused(monkeypatch, request):
    check_engine()
    # As accelerate finds it where torch_xla is installed. Its answer is kept for the process.
    monkeypatch.setattr("accelerate.utils.imports._torch_xla_available", True)
    is_torch_xla_available.cache_clear()
    request.addfinalizer(is_torch_xla_available.cache_clear)
    with pytest.raises(ArgumentsError, match=r"chooses PyTorch/XLA, TPUs .*USE_TORCH_XLA=0.*Supported: "):
        check_engine()


@pytest.mark.slow  # a launcher and its process
def test_the_launcher_s_flag_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    launcher = [*ACCELERATE, "--use_fsdp"]
    process = run("run_classification.py", *SCRIPTS["run_classification.py"], launcher=launcher)
    assert_refused(process, "FSDP")
    assert not (tmp_path / "out").exists()
