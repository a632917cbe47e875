"""Access tokens and passwords: in no file that a run leaves, and in nothing that it prints."""

import json

import pytest
from hostile_files import assert_one_line
from launching import run_here
from local_hub import READ_TOKEN, hub_of_this_process, run_local_hub, unreachable_hub
from runs import FROM_NOTHING, QUICK, pretrain, write_images

from vicmae_hf.command_line import hide_secrets, one_line
from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.arguments import TrainingArguments
from vicmae_hf.training.session.hub import UploadError, create_repository, upload


TOKEN = "hf_" + "aBcDeFgHiJkLmNoPqRsTuVwXyZaBcDeFgH"
PASSWORD = "correct-horse-battery"
ADDRESS = f"https://someone:{TOKEN}@huggingface.co/someone/data"


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / "data")


def assert_keeps_secrets(process, folder):
    texts = [process.stdout.encode(), process.stderr.encode()]
    texts += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert not any(secret.encode() in text for secret in (TOKEN, PASSWORD) for text in texts)


def test_what_is_hidden(monkeypatch):
    assert hide_secrets(f"a {TOKEN} b") == "a *** b"
    assert hide_secrets(f"GET {ADDRESS}?x=1") == "GET https://***@huggingface.co/someone/data?x=1"
    assert hide_secrets(f"http://user:{PASSWORD}@host:80/a@b") == "http://***@host:80/a@b"
    assert hide_secrets("api_org_" + 34 * "x") == "***"
    # Names that are none.
    for text in ("data/hf_my_own_dataset_of_cats_and_dogs", "https://hf.co/a/b@main", "s3://bucket/key@2", "a@b.org"):
        assert hide_secrets(text) == text
    # A token of another kind, which is known only because it is set.
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef0123")
    monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
    assert one_line("1\n  key 0123456789abcdef0123\n") == "1 key ***"


@pytest.mark.parametrize(
    "flag", ["train_data", "model_name_or_path", "hub_model_id", "config_overrides", "probe_data", "output_dir"]
)
@pytest.mark.parametrize("in_a_file", [False, True])
def test_a_setting_that_holds_a_token_is_refused_before_anything_is_written(flag, in_a_file, data, tmp_path):
    settings = {"train_data": str(data), "output_dir": str(tmp_path / "out"), "report_to": ["tensorboard"]}
    settings[flag] = ADDRESS
    if in_a_file:
        path = tmp_path / "settings.json"
        path.write_text(json.dumps(settings))
        process = run_here("run_pretraining.py", path)
        path.unlink()
    else:
        flags = [f"--{name}={value}" for name, value in settings.items() if name != "report_to"]
        process = run_here("run_pretraining.py", *flags, "--report_to", "tensorboard")
    assert_one_line(process, f"--{flag} holds an access token or a password", "hf auth login")
    assert_keeps_secrets(process, tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("script", "flag", "others"),
    [
        ("pack_frames.py", "input", ["--output=x"]),
        ("prepare_dataset.py", "root", ["--output=x", "--dataset=folder"]),
        ("run_evaluation.py", "data", ["--model_name_or_path=x", "--output_dir=x"]),
        ("export_features.py", "data", ["--model_name_or_path=x", "--output=x.parquet"]),
        ("run_linear_probe.py", "train_data", ["--model_name_or_path=x", "--eval_data=x", "--output_dir=x"]),
        (
            "run_classification.py",
            "eval_data",
            ["--train_data=x", "--output_dir=x", "--task=image", "--method=finetune"],
        ),
    ],
)
def test_every_script_refuses_it(script, flag, others, tmp_path):
    process = run_here(script, *others, f"--{flag}", ADDRESS)
    assert_one_line(process, f"--{flag} holds an access token or a password")
    assert_keeps_secrets(process, tmp_path)


def test_a_misspelt_flag_does_not_repeat_it(data, tmp_path):
    process = run_here("run_pretraining.py", "--train_data", data, "--output_dir", "x", "--hub_modl_id", ADDRESS)
    assert process.returncode == 2
    assert "unknown flag --hub_modl_id. Did you mean --hub_model_id?" in process.stderr
    assert_keeps_secrets(process, tmp_path)
    process = run_here("run_pretraining.py", ADDRESS, "--train_data", data, "--output_dir", "x")
    assert process.returncode == 2
    assert "the data is given twice, as https://***@huggingface.co" in process.stderr
    assert_keeps_secrets(process, tmp_path)


def test_a_run_with_a_tracker_and_an_upload_leaves_no_token(data, tmp_path, monkeypatch):
    monkeypatch.setattr("local_hub.TOKEN", TOKEN)
    flags = [*FROM_NOTHING, *QUICK, "--checkpointing_steps", 1, "--logging_steps", 1, "--report_to", "tensorboard"]
    with run_local_hub() as hub, hub_of_this_process(hub.url, TOKEN):
        process = pretrain(data, tmp_path / "out", *flags, "--push_to_hub", "--hub_model_id", "someone/run")
        assert process.returncode == 0, process.stderr
    assert_keeps_secrets(process, tmp_path)
    uploaded = hub.repositories["someone/run"]
    assert {"README.md", "arguments.json", "metrics.jsonl", "all_results.json"} <= uploaded.keys()
    assert not any(TOKEN.encode() in content for content in uploaded.values())
    assert any((tmp_path / "out").rglob("events.out.tfevents*"))


def test_an_upload_that_fails_repeats_no_token(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = TrainingArguments(train_data=["data"], output_dir=str(tmp_path), hub_model_id="someone/run")
    with run_local_hub() as hub:
        # The token is refused; it may be in an address, too, as that of a mirror.
        for url in (hub.url, hub.url.replace("://", f"://someone:{PASSWORD}@")):
            for token in (TOKEN, READ_TOKEN):
                for function, error in ((upload, UploadError), (create_repository, ArgumentsError)):
                    with hub_of_this_process(url, token), pytest.raises(error) as caught:
                        function(settings)
                    text = one_line(caught.value)  # as it is printed
                    assert "Unauthorized" in text or "Forbidden" in text
                    assert TOKEN not in text
                    assert PASSWORD not in text


def test_a_hub_that_cannot_be_reached_with_a_password_in_its_address(data, tmp_path):
    with unreachable_hub() as url, hub_of_this_process(url.replace("://", f"://someone:{PASSWORD}@"), TOKEN):
        flags = [*FROM_NOTHING, "--push_to_hub", "--hub_model_id", "someone/run"]
        process = pretrain(data, tmp_path / "out", *flags)
        assert_one_line(process, "--push_to_hub", "http://***@127.0.0.1")
        assert_keeps_secrets(process, tmp_path)
        process = pretrain("someone/data", tmp_path / "out", *FROM_NOTHING)
        assert_one_line(process, "someone/data: no such folder, and no dataset")
        assert_keeps_secrets(process, tmp_path)


def test_a_token_that_no_request_can_carry(data, tmp_path):
    # Libraries of HTTP repeat a header that they refuse.
    for ending in ("\x01", "é"):
        with run_local_hub() as hub, hub_of_this_process(hub.url, TOKEN + ending):
            process = pretrain(data, tmp_path / "out", *FROM_NOTHING, "--push_to_hub", "--hub_model_id", "someone/run")
        assert_one_line(process, "--push_to_hub")
        assert_keeps_secrets(process, tmp_path)
