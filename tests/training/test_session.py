"""What is refused before any data is read, uploads that fail, and errors that end a script in one line."""

import logging

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from accelerate import PartialState
from full_disks import largest_file
from huggingface_hub import constants
from launching import run_here, run_together, undone
from local_hub import READ_TOKEN, hub_of_this_process, run_local_hub, unreachable_hub
from safetensors.torch import save_file
from tiny_models import tiny_overrides
from transformers import BertConfig, ViTMAEConfig, ViTMAEForPreTraining

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.command_line import parse_config_overrides
from vicmae_hf.commands.pretrain import warn_of_plain_mae
from vicmae_hf.convert_checkpoint.inference import MAE_OBJECTIVE
from vicmae_hf.errors import InputError
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.arguments import TrainingArguments
from vicmae_hf.training.session.hub import UploadError, create_repository, upload
from vicmae_hf.training.session.models import build_model
from vicmae_hf.training.session.output_folder import check_output_dir
from vicmae_hf.training.session.scripts import run_script, said_once
from vicmae_hf.training.session.session import adopt_accumulation, check_trackers, start_session


def arguments(**changes):
    return TrainingArguments(**{"train_data": ["data"], "output_dir": "out"} | changes)


def test_a_tracker_that_is_not_installed_is_named_with_its_package():
    check_trackers(["tensorboard"])
    with pytest.raises(ArgumentsError, match=r"--report_to wandb: it is not installed.*pip install wandb"):
        check_trackers(["tensorboard", "wandb"])
    with pytest.raises(ArgumentsError, match=r"--report_to foo: expected one of .*tensorboard"):
        check_trackers(["foo"])


def test_private_without_an_upload_is_refused(tmp_path):
    with pytest.raises(ArgumentsError, match="--private is about the repository of --push_to_hub"):
        start_session(arguments(output_dir=str(tmp_path / "out"), private=True))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config_overrides", f"{tiny_overrides()},mask_ratio=0.99"],
            "error: mask_ratio=0.99 leaves 0 of 16 patches visible",
        ),
        (["--config_overrides", tiny_overrides()], "error: no_data: no such folder, and no dataset"),
    ],
)
def test_a_refused_run_leaves_no_folder_that_it_made(tmp_path, flags, message):
    (tmp_path / "there").mkdir()
    for name in ("new/deep/out", "there", "there/out"):
        flags = [*flags, "--image_size", 32, "--warmup_epochs", 0, "--output_dir", tmp_path / name]
        process = run_here("run_pretraining.py", "no_data", *flags)
        assert process.returncode == 1 and process.stderr.splitlines()[-1].startswith(message)
        assert [path.name for path in tmp_path.iterdir()] == ["there"]
        assert not (tmp_path / "there" / "out").exists()


@pytest.mark.parametrize(("given", "launched", "taken"), [(1, 4, 4), (4, 4, 4), (1, 1, 1)])
def test_accumulation_may_be_set_by_the_launcher(given, launched, taken):
    settings = arguments(gradient_accumulation_steps=given)
    adopt_accumulation(settings, launched)
    assert settings.gradient_accumulation_steps == taken


def test_accumulation_set_twice_is_refused_if_it_differs():
    with pytest.raises(ArgumentsError, match=r"is 2, but accelerate's configuration .* has 4"):
        adopt_accumulation(arguments(gradient_accumulation_steps=2), 4)


VIT_MAE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
VIT_MAE |= {"image_size": 16, "patch_size": 8, "mask_ratio": 0.5}
VIT_MAE |= {f"decoder_{name}": value for name, value in VIT_MAE.items() if name.startswith(("hid", "num", "int"))}


def test_weights_of_mae_are_trained_on_with_the_objective_of_vicmae(tmp_path, caplog):
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**VIT_MAE))
    theirs.save_pretrained(tmp_path / "vit_mae")
    model = build_model(ViCMAEForPreTraining, arguments(model_name_or_path=str(tmp_path / "vit_mae")))
    assert torch.equal(model.vicmae.layers[0].mlp.fc1.weight, theirs.vit.layers[0].mlp.fc1.weight)
    assert torch.equal(model.decoder.prediction.weight, theirs.decoder.decoder_pred.weight)
    assert (model.config.contrastive_loss, model.config.reconstruct, model.config.mask_ratio) == (
        "info_nce",
        "first",
        0.5,
    )
    assert model(torch.rand(2, 2, 3, 16, 16)).contrastive_loss > 0
    assert "weights of MAE, now trained with the objective of ViC-MAE" in caplog.text
    caplog.clear()
    settings = arguments(model_name_or_path=str(tmp_path / "vit_mae"), config_overrides="contrastive_loss=none")
    assert build_model(ViCMAEForPreTraining, settings).config.contrastive_loss == "none"
    assert caplog.text == ""


def test_a_converted_folder_of_mae_is_named_with_what_makes_it_vicmae(caplog):
    PartialState(cpu=True)  # the logger asks which process it is in
    warn_of_plain_mae(ViCMAEConfig(**MAE_OBJECTIVE), arguments(model_name_or_path="mae"))
    assert "The config of mae" in caplog.text
    overrides = caplog.text.partition('--config_overrides "')[2].partition('"')[0]
    changes = parse_config_overrides(ViCMAEConfig, overrides)
    assert changes == {name: getattr(ViCMAEConfig(), name) for name in MAE_OBJECTIVE}


def test_other_models_are_refused_with_what_is_expected(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ArgumentsError, match="expected a checkpoint of vicmae, MAE or ViTMAE, got one of bert"):
        build_model(ViCMAEForPreTraining, arguments(model_name_or_path=str(tmp_path)))


def test_the_folder_of_a_run_that_wrote_no_model_is_named_so(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(ArgumentsError, match=r"has no config\.json that names a model\. A run that ended"):
        build_model(ViCMAEForPreTraining, arguments(model_name_or_path=str(tmp_path)))


@pytest.mark.parametrize(
    "overrides", ["image_size=[64,96,3]", "hidden_size=abc", "mask_ratio=[1]", "hidden_size=0", "patch_size=-1"]
)
def test_a_config_that_cannot_be_is_one_line(overrides):
    with pytest.raises(ArgumentsError, match="The model cannot be built from --image_size and --config_overrides"):
        build_model(ViCMAEForPreTraining, arguments(config_overrides=overrides))


def test_a_field_that_is_given_twice_is_refused_if_it_differs():
    twice = arguments(config_overrides=f"{tiny_overrides(num_frames=4)},image_size=16", image_size=[16])
    assert build_model(ViCMAEForPreTraining, twice, num_frames=4).config.num_frames == 4
    twice = arguments(config_overrides="image_size=96,num_frames=4", image_size=[64])
    with pytest.raises(ArgumentsError, match=r"image_size=96, num_frames=4: other settings .* decide that"):
        build_model(ViCMAEForPreTraining, twice, num_frames=8)


def test_an_output_folder_of_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "data")
    data, linked = str(tmp_path / "data"), str(tmp_path / "linked")
    for names in ({"train_data": ["x", data]}, {"train_data": [linked]}, {"train_data": ["x"], "probe_data": data}):
        with pytest.raises(ArgumentsError, match="data is a folder of data; choose another, or one below it"):
            check_output_dir(PretrainingArguments(**names, output_dir=data))
    check_output_dir(arguments(train_data=[str(tmp_path / "data")], output_dir=str(tmp_path / "data" / "run")))


def test_a_finished_run_without_checkpoints_is_not_trained_again_by_latest(tmp_path):
    settings = arguments(output_dir=str(tmp_path), resume_from_checkpoint="latest")
    check_output_dir(settings)
    # The best model of a classification that was killed before its first checkpoint.
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "arguments.json").touch()
    check_output_dir(settings)
    # A model that no run has left.
    (tmp_path / "arguments.json").unlink()
    with pytest.raises(ArgumentsError, match="but no checkpoint to resume from"):
        check_output_dir(settings)
    (tmp_path / "all_results.json").touch()
    with pytest.raises(ArgumentsError, match="holds a finished run, but no checkpoint to resume from"):
        check_output_dir(settings)
    check_output_dir(arguments(**vars(settings) | {"overwrite_output_dir": True}))
    (tmp_path / "checkpoint-3").mkdir()
    check_output_dir(settings)


@pytest.fixture
def hub():
    with run_local_hub() as hub:
        yield hub


@pytest.mark.parametrize(
    ("token", "message"), [("hf_wrong", "401 Unauthorized.*Invalid username or password"), (READ_TOKEN, "403 Forb")]
)
def test_a_refused_token_is_one_line_before_training(token, message, hub):
    settings = arguments(output_dir="outputs/run", push_to_hub=True)
    hub.repositories["someone/run"] = {}
    with hub_of_this_process(hub.url, token):
        with pytest.raises(ArgumentsError, match=f"--push_to_hub: the repository run on .*{message}") as caught:
            create_repository(settings)
        # With a full name the repository of a read-only token is found, and only then refused.
        settings.hub_model_id = "someone/run"
        with pytest.raises(ArgumentsError, match=message):
            create_repository(settings)
    assert "\n" not in str(caught.value)


def test_an_unreachable_hub_is_one_line_before_training(monkeypatch, tmp_path):
    settings = arguments(output_dir=str(tmp_path / "run"), push_to_hub=True)
    with unreachable_hub() as address:
        with pytest.raises(ArgumentsError, match=rf"run on {address} cannot be written to \(.+\)\. If the") as caught:
            create_repository(settings)
        assert "\n" not in str(caught.value)
        # Undone before the Hub is: else the value that it found would be put back last.
        with monkeypatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            with pytest.raises(ArgumentsError, match="offline mode is enabled"):
                create_repository(settings)


def test_a_wrong_repository_name_is_one_line_before_training(hub):
    settings = arguments(push_to_hub=True, hub_model_id="no such/name!")
    with hub_of_this_process(hub.url), pytest.raises(ArgumentsError, match="repository no such/name! on"):
        create_repository(settings)


def test_a_private_repository_is_private_or_refused(hub):
    with hub_of_this_process(hub.url):
        create_repository(arguments(push_to_hub=True, hub_model_id="mine", private=True))
        create_repository(arguments(push_to_hub=True, hub_model_id="shown"))
        assert hub.private == {"someone/mine"}
        create_repository(arguments(push_to_hub=True, hub_model_id="mine", private=True))
        with pytest.raises(
            ArgumentsError, match="--private: the repository someone/shown is there already, and public"
        ):
            create_repository(arguments(push_to_hub=True, hub_model_id="shown", private=True))


def test_a_failed_upload_says_that_the_training_is_safe(hub, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    settings = arguments(output_dir=str(tmp_path), push_to_hub=True, hub_model_id="someone/run")
    with (
        hub_of_this_process(hub.url, READ_TOKEN),
        pytest.raises(UploadError, match=f"saved in {tmp_path}, .*403.* hf upload someone/run {tmp_path}"),
    ):
        upload(settings)


def end_of(main, capsys):
    """What a script says that fails; the error that it ends with otherwise."""
    with undone(), pytest.raises(SystemExit) as caught:
        run_script(main)
    assert caught.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return line


ROWS = torch.arange(10_000.0)
WRITERS = {
    "python": lambda folder: (folder / "file").write_text("a" * 10_000),
    "pyarrow": lambda folder: pyarrow.parquet.write_table(pa.table({"rows": ROWS.numpy()}), folder / "file"),
    "datasets": lambda folder: datasets.Dataset.from_dict({"rows": ROWS.numpy()}).save_to_disk(folder / "file"),
    "safetensors": lambda folder: save_file({"rows": ROWS}, folder / "file"),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_ends_a_script_in_one_line_whoever_writes(writer, tmp_path, capsys):
    datasets.disable_progress_bars()
    with largest_file(4096):
        line = end_of(lambda: WRITERS[writer](tmp_path), capsys)
    assert line.startswith("error: a file cannot be opened or written: ") and "File too large" in line


def test_a_place_that_cannot_be_ends_a_script_in_one_line_that_names_it(tmp_path, capsys):
    (tmp_path / "file").touch()
    line = end_of(lambda: WRITERS["python"](tmp_path / "file"), capsys)
    assert line == f"error: a file cannot be opened or written: [Errno 20] Not a directory: '{tmp_path}/file/file'"
    assert f"{tmp_path}/file/file" in end_of(lambda: WRITERS["pyarrow"](tmp_path / "file"), capsys)
    long = tmp_path / ("a" * 300)
    assert f"File name too long: '{long}/file'" in end_of(lambda: WRITERS["python"](long), capsys)


class Unreadable(torch.utils.data.Dataset):
    def __init__(self, path):
        self.path = path

    def __len__(self):
        return 1

    def __getitem__(self, index):
        if not self.path.parent.exists():
            raise InputError(f"{self.path.parent}: no such folder; expected: one.")
        return self.path.read_text()


def test_an_error_of_a_worker_is_one_line_too(tmp_path, capsys):
    (tmp_path / "file").touch()
    loader = torch.utils.data.DataLoader(Unreadable(tmp_path / "file" / "sample"), num_workers=1)
    line = end_of(lambda: list(loader), capsys)
    assert line == f"error: a file cannot be opened or written: [Errno 20] Not a directory: '{tmp_path}/file/sample'"
    loader = torch.utils.data.DataLoader(Unreadable(tmp_path / "folder" / "sample"), num_workers=1)
    line = end_of(lambda: list(loader), capsys)
    assert line == f"error: {tmp_path}/folder: no such folder; expected: one."


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file or directory", "name"), ConnectionError("refused"), KeyError("28")]
)
def test_other_errors_keep_their_traceback(error):
    def main():
        raise error

    with undone(), pytest.raises(type(error)):
        run_script(main)


@pytest.mark.parametrize("library", ["datasets", "huggingface_hub"])
def test_what_a_library_prints_itself_is_not_said_again(library, capsys):
    logger = logging.getLogger(library)
    assert logger.handlers  # with which it prints
    with undone():
        run_script(lambda: (logger.warning("by itself"), logging.getLogger("another").warning("by the script")))
    assert capsys.readouterr().err == "WARNING: by the script\n"


def test_a_run_says_a_thing_once(monkeypatch):
    def said(name, message):
        record = logging.LogRecord(name, logging.INFO, "", 0, message, ("data",), None)
        return record.getMessage() if said_once(record) else None

    assert said("vicmae_hf.pretraining.presets", "[RANK 0] fits %s") == "fits data"
    assert said("vicmae_hf.data.sources.selection", "%s: 3 videos") == "data: 3 videos"
    # The second process of a machine. The first of a second machine may find other data there.
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert said("vicmae_hf.data.sources.selection", "%s: 3 videos") is None
    # Another process finds other files that it cannot read.
    assert said("vicmae_hf.data.media.bad_files", "Unreadable: %s") == "Unreadable: data"


def test_the_processes_part_at_the_end(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import torch.distributed as dist\n"
        "from accelerate import Accelerator\n"
        "from vicmae_hf.training.arguments import TrainingArguments\n"
        "from vicmae_hf.training.session.session import end_session\n"
        "accelerator = Accelerator(cpu=True)\n"
        "assert dist.is_initialized()\n"
        "end_session(accelerator, TrainingArguments(train_data=['none'], output_dir='none'))\n"
        "assert not dist.is_initialized()\n"
    )
    process = run_together(str(script))
    assert process.returncode == 0, process.stderr
