"""Settings that follow from the data, and layers that training leaves as they are."""

import json
import logging

import pytest
import torch
import yaml
from accelerate import PartialState
from launching import run_here, undone
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_overrides
from video_files import write_images

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.command_line import parse_arguments, parse_config_overrides
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.pretraining.presets import PresetArguments, fit_to_data, freeze_layers
from vicmae_hf.settings import ArgumentsError


@pytest.fixture(autouse=True)
def process():
    """The state of the only process, which lines of the log ask for."""
    with undone():
        yield PartialState(cpu=True)


def parse(*flags):
    return parse_arguments(PresetArguments, ["clips", "-o", "out", *map(str, flags)])


def fitted(num_samples, *flags, num_processes=1):
    arguments = parse("--preset", "small-data", *flags)
    fit_to_data(arguments, ViCMAEConfig(), num_samples, num_processes)
    return arguments


def test_without_a_preset_all_is_as_it_was():
    arguments = parse()
    plain = parse_arguments(PretrainingArguments, ["clips", "-o", "out"])
    assert {name: getattr(arguments, name) for name in vars(plain)} == vars(plain)


def test_forty_recordings_of_five_minutes():
    """1,200 segments of 10 s, 18 batches of 64 an epoch, 556 epochs to 10,000 updates."""
    arguments = fitted(1200)
    assert (arguments.segment_seconds, arguments.per_device_train_batch_size) == (10, 64)
    assert (arguments.num_train_epochs, arguments.checkpointing_steps) == (556, 1000)
    assert (arguments.warmup_epochs, arguments.contrastive_start_epoch) == pytest.approx((27.8, 139))
    # 1.5e-4 * 4096 / 256 = 2.4e-3 is Table 1's peak; the root of 64 / 4096 is 1 / 8.
    assert arguments.base_learning_rate * 64 / 256 == pytest.approx(2.4e-3 / 8)
    assert "hidden_size=384" in arguments.config_overrides


def test_forty_clips():
    """Batches of 16, two an epoch; 800 epochs at most."""
    arguments = fitted(40)
    assert (arguments.per_device_train_batch_size, arguments.num_train_epochs) == (16, 800)
    assert (arguments.contrastive_start_epoch, arguments.checkpointing_steps) == (200, 160)
    arguments = fitted(40, "--gradient_accumulation_steps", 2, num_processes=2)
    assert arguments.per_device_train_batch_size == 4


def test_what_is_given_stays_also_where_it_is_the_default():
    given = ["--num_train_epochs", 800, "--warmup_epochs", 40, "--per_device_train_batch_size", 32]
    arguments = fitted(1200, *given, "--segment_seconds", 5, "--config_overrides", "num_hidden_layers=3")
    assert (arguments.num_train_epochs, arguments.warmup_epochs, arguments.segment_seconds) == (800, 40, 5)
    assert (arguments.per_device_train_batch_size, arguments.contrastive_start_epoch) == (32, 200)
    assert arguments.config_overrides.startswith("num_hidden_layers=3,decoder_hidden_size=256,")


def test_sizes_of_one_part_leave_the_choice_of_the_other():
    model = ViCMAEConfig(**parse_config_overrides(ViCMAEConfig, fitted(40).config_overrides))
    given = fitted(40, "--config_overrides", "decoder_num_hidden_layers=2").config_overrides
    assert given == "decoder_num_hidden_layers=2,hidden_size=384,num_attention_heads=6,intermediate_size=1536"
    given = fitted(40, "--config_overrides", "hidden_size=192").config_overrides
    decoder = ViCMAEConfig(**parse_config_overrides(ViCMAEConfig, given))
    assert (decoder.hidden_size, decoder.intermediate_size) == (192, ViCMAEConfig().intermediate_size)
    assert (decoder.decoder_hidden_size, decoder.decoder_num_hidden_layers) == (
        model.decoder_hidden_size,
        model.decoder_num_hidden_layers,
    )
    both = "hidden_size=192,decoder_num_attention_heads=4"
    assert fitted(40, "--config_overrides", both).config_overrides == both


def test_a_stream_has_nothing_to_be_weighed_against():
    with pytest.raises(ArgumentsError, match="--train_data_weights: a stream is one source"):
        parse("--streaming", "--train_data_weights", 2)


@pytest.mark.parametrize("overrides", ["contrastive_weight=0.1", "projector_hidden_size=256"])
def test_settings_that_are_no_sizes_of_the_model_leave_the_choice_of_sizes(overrides):
    """The name `projector_hidden_size` holds that of a size of the encoder."""
    assert fitted(1200, "--config_overrides", overrides).config_overrides.startswith(f"{overrides},hidden_size=384,")


def test_a_run_of_so_many_updates_and_one_from_weights():
    arguments = fitted(1280, "--max_train_steps", 400, "--model_name_or_path", "mae")
    assert arguments.checkpointing_steps == 40
    assert arguments.warmup_epochs * 20 == arguments.contrastive_start_epoch * 20 == pytest.approx(20)
    assert arguments.config_overrides is None


def test_too_large_a_schedule_and_batch_get_a_warning(caplog):
    with caplog.at_level(logging.WARNING):
        fit_to_data(parse(), ViCMAEConfig(), 40, 1)
    schedule, repeats = (record.getMessage() for record in caplog.records)
    assert "starts after 200 of 800. --preset small-data" in schedule
    assert "only 40 samples" in repeats and "false negatives" in repeats
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        fit_to_data(parse("--num_train_epochs", 100), ViCMAEConfig(contrastive_loss="none"), 40, 1)
        fit_to_data(parse(), ViCMAEConfig(), 1_000_000, 1)
    assert caplog.records == []


def test_a_run_that_goes_on_from_a_named_checkpoint_keeps_its_values(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    goes_on = ["--resume_from_checkpoint", checkpoint, "--num_train_epochs", 900]
    fresh = fitted(40, "--num_train_epochs", 900)
    assert fitted(40, *goes_on).warmup_epochs == fresh.warmup_epochs == 45  # no checkpoint is there
    before = {"warmup_epochs": 3.0, "contrastive_start_epoch": 9.0, "total_batch_size": 8, "num_train_epochs": 60}
    checkpoint.mkdir()
    (checkpoint / "training_state.json").write_text(json.dumps({"step": 7, "run_settings": before}))
    arguments = fitted(40, *goes_on, num_processes=2)
    assert (arguments.warmup_epochs, arguments.contrastive_start_epoch) == (3, 9)
    assert (arguments.per_device_train_batch_size, arguments.num_train_epochs) == (4, 900)
    # What is given stays, and is compared with the checkpoint's later.
    assert fitted(40, *goes_on, "--warmup_epochs", 5).warmup_epochs == 5


def test_a_run_that_goes_on_keeps_the_sizes_that_were_chosen_when_it_began(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    checkpoint.mkdir()
    model = {"hidden_size": 192, "decoder_hidden_size": 512, "decoder_num_hidden_layers": 8}
    settings = {"run_settings": {"total_batch_size": 8, "model": model}}
    (checkpoint / "training_state.json").write_text(json.dumps(settings))
    flags = ["--config_overrides", "hidden_size=192", "--resume_from_checkpoint", checkpoint]
    sizes = parse_config_overrides(ViCMAEConfig, fitted(40, *flags).config_overrides)
    assert (sizes["decoder_hidden_size"], sizes["decoder_num_hidden_layers"]) == (512, 8)
    assert sizes["decoder_num_attention_heads"] == 8  # the checkpoint does not say


def test_the_first_process_speaks_for_all(process, caplog):
    with caplog.at_level(logging.INFO):
        fitted(40, num_processes=2)
        assert "--preset small-data, for 40 samples an epoch: per_device_train_batch_size 8, " in caplog.text
        assert "num_train_epochs 800" in caplog.text
        caplog.clear()
        fitted(40, "--max_train_steps", 50)
        assert "per_device_train_batch_size 16, " in caplog.text
        assert "num_train_epochs" not in caplog.text  # the steps end the run
        caplog.clear()
        process.process_index = 1
        fitted(40, num_processes=2)
        fit_to_data(parse(), ViCMAEConfig(), 40, 2)
    assert caplog.text == ""


def test_frozen_layers_get_no_gradient():
    model = ViCMAEForPreTraining(tiny_config())
    freeze_layers(model, 1)
    model(torch.randn(2, 2, 3, 16, 16)).loss.backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    frozen = {
        name for name, _ in model.named_parameters() if name.startswith(("vicmae.embeddings.", "vicmae.layers.0."))
    }
    assert frozen and without == frozen
    with pytest.raises(ArgumentsError, match="--freeze_layers 3: the encoder has 2 layers"):
        freeze_layers(model, 3)
    with pytest.raises(ArgumentsError, match="give --model_name_or_path"):
        parse("--freeze_layers", 1)


@pytest.mark.parametrize(("image_size", "mask_ratio", "num_visible"), [(4, 0.75, 0), (16, 0.98, 0), (16, 0.01, 16)])
def test_a_mask_of_all_patches_or_none_is_refused_before_the_data(image_size, mask_ratio, num_visible, tmp_path):
    overrides = tiny_overrides(patch_size=4, mask_ratio=mask_ratio)
    flags = ["--image_size", image_size, "--config_overrides", overrides, "-o", tmp_path / "out", "nowhere"]
    for plan in ([], ["--plan"]):
        process = run_here("run_pretraining.py", *flags, *plan)
        assert process.returncode == 1
        assert f"leaves {num_visible} of {(image_size // 4) ** 2} patches visible" in process.stderr


@pytest.mark.slow
def test_a_run_on_frozen_layers_of_a_run_with_the_preset(tmp_path):
    write_images(tmp_path / "images", 12, cells=32, side=32)
    common = ["--train_data", tmp_path / "images", "--dataloader_num_workers", 0, "--preset", "small-data"]
    common += ["--image_size", 32, "--num_train_epochs", 8]
    model = ["--config_overrides", tiny_overrides(num_hidden_layers=2)]
    tracked = ["--output_dir", tmp_path / "first", "--report_to", "tensorboard"]
    process = run_here("run_pretraining.py", *common, *model, *tracked)
    assert process.returncode == 0, process.stderr
    # 12 images in batches of 4: 24 updates, and a checkpoint after every second one, of which 3 are kept.
    assert {path.name for path in (tmp_path / "first").glob("checkpoint-*")} == {
        *("checkpoint-20", "checkpoint-22", "checkpoint-24")
    }
    # Trackers know what the run has fitted, and a longer run goes on with it.
    run = json.loads((tmp_path / "first" / "arguments.json").read_text())
    (board,) = (tmp_path / "first" / "vicmae").rglob("hparams.yml")
    recorded = yaml.safe_load(board.read_text())
    for name in ("warmup_epochs", "contrastive_start_epoch", "base_learning_rate", "num_steps", "learning_rate"):
        assert recorded[name] == run[name] is not None
    longer = [*common, *model, "--num_train_epochs", 12, "--gradient_accumulation_steps", 2]
    process = run_here(
        "run_pretraining.py", *longer, "--output_dir", tmp_path / "first", "--resume_from_checkpoint", "latest"
    )
    assert process.returncode == 0, process.stderr
    assert "--preset small-data, as the resumed run has them: per_device_train_batch_size 2, " in process.stderr
    resumed = json.loads((tmp_path / "first" / "arguments.json").read_text())
    assert (resumed["num_steps"], resumed["warmup_epochs"]) == (36, run["warmup_epochs"])
    weights = ["--model_name_or_path", tmp_path / "first", "--freeze_layers", 1]
    process = run_here("run_pretraining.py", *common, *weights, "--output_dir", tmp_path / "second")
    assert process.returncode == 0, process.stderr
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    same = {name for name in before if torch.equal(before[name], after[name])}
    weights = {name for name, _ in ViCMAEForPreTraining.from_pretrained(tmp_path / "second").named_parameters()}
    assert same & weights == {name for name in weights if name.startswith(("vicmae.embeddings.", "vicmae.layers.0."))}
