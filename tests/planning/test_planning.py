"""Plans: what they count, compute and measure, beside what a run then does."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from launching import run_here, run_together, undone
from PIL import Image
from safetensors.torch import load_file
from tiny_models import tiny_config, tiny_overrides
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from video_files import numbered_frames, write_images, write_video

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining, ViCMAEForVideoClassification
from vicmae_hf.command_line import parse_arguments, parse_config_overrides
from vicmae_hf.commands.plan import PlanArguments, run
from vicmae_hf.data.media.reading import DamagedPlaceError
from vicmae_hf.data.sources.sources import open_source
from vicmae_hf.planning.costs import checkpoint_steps, classification_flops, pretraining_flops
from vicmae_hf.planning.plan import Rates, Training, describe_store
from vicmae_hf.planning.report import judge_store, readable_time, report
from vicmae_hf.planning.survey import Items, StoreTrial, Survey, survey_items, upper_bound
from vicmae_hf.planning.trainings import scratch_folder
from vicmae_hf.planning.trial import Trial, activation_bytes
from vicmae_hf.pretraining.presets import freeze_layers
from vicmae_hf.settings import ArgumentsError
from vicmae_hf.training.arguments import TrainingArguments
from vicmae_hf.training.loop import is_due
from vicmae_hf.training.optimization import Schedule


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """Two videos of 4 and 8 s, five images, and one broken video."""
    folder = tmp_path_factory.mktemp("media")
    for seconds in (4, 8):
        write_video(folder / f"{seconds}.mp4", numbered_frames(10 * seconds), fps=10)
    write_images(folder, 5, cells=40, side=40)
    (folder / "broken.mp4").write_bytes(b"no video")
    return folder


FLAGS = ["--image_size", 32, "--config_overrides", tiny_overrides(), "--dataloader_num_workers", 0]
FLAGS += ["--per_device_train_batch_size", 4, "--num_train_epochs", 5, "--warmup_epochs", 1]
FLAGS += ["--contrastive_start_epoch", 2, "--checkpointing_steps", 3, "--max_bad_files", 0.2]


def plan(media, *flags):
    with undone():
        return run(parse_arguments(PlanArguments, list(map(str, [media, *FLAGS, *flags]))))


def test_after_an_error_the_output_folder_is_named_as_before():
    arguments = SimpleNamespace(output_dir="mine")
    with pytest.raises(ArgumentsError), scratch_folder(arguments):
        raise ArgumentsError("wrong")
    assert arguments.output_dir == "mine"


def test_the_share_that_is_compatible_with_a_sample():
    assert upper_bound(0, 64) == pytest.approx(1 - 0.05 ** (1 / 64))
    bound = upper_bound(2, 30)
    at_most = sum(math.comb(30, count) * bound**count * (1 - bound) ** (30 - count) for count in range(3))
    assert at_most == pytest.approx(0.05)
    assert upper_bound(5, 5) == 1


def test_a_video_that_is_damaged_in_places_is_readable(media):
    calls = []

    def read(item, generator):
        calls.append(item.name)
        if len(calls) == 1:
            raise DamagedPlaceError(f"cannot decode {item.name}")
        return {}

    survey = survey_items(Items([open_source(media / "4.mp4")], read, 1), "pyav", 60.0, seed=0)
    assert (survey.failures, survey.num_videos, len(calls)) == ([], 1, 2)


def test_a_plan_and_the_run_that_it_plans(media, tmp_path, capsys):
    planned = plan(media, "--output", tmp_path / "plan.json")
    assert capsys.readouterr().out.startswith(report(planned))
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(planned))
    data = planned["data"]
    assert (data["num_files"], data["num_sampled"], data["videos"], data["images"]) == (8, 8, 2, 5)
    assert data["hours"] * 3600 == pytest.approx(12, abs=0.1)
    assert data["bytes"] == sum(path.stat().st_size for path in media.iterdir())
    assert [failure["path"] for failure in data["failures"]] == [str(media / "broken.mp4")]
    assert data["unreadable_share"] == data["unreadable_share_at_most"] == 1 / 8
    assert not data["is_too_unreadable"] and "--max_bad_files" not in report(planned)
    # What was found by reading a part of the files is said to be so.
    assert " 2 videos of 0.00333 h, 5 images (read: all)\n" in report(planned)
    of_a_part = report(planned | {"data": data | {"num_sampled": 4}})
    assert " about 2 videos of 0.00333 h, 5 images (from 4 read at random)\n" in of_a_part
    run_figures = planned["run"]
    assert (run_figures["num_steps"], run_figures["contrastive_start_step"]) == (10, 4)
    assert " the contrastive loss starts after update 4 (" in report(planned)
    at_once = report(planned | {"run": run_figures | {"contrastive_start_step": 0}})
    assert " the contrastive loss counts from the first update on\n" in at_once
    assert planned["checkpoints"]["kept"] == [6, 9, 10]
    assert planned["time"]["here"]["seconds"] > 0 and planned["memory"]["total"]["float32"] > 0

    out = tmp_path / "out"
    flags = ["--train_data", media, "--output_dir", out, *FLAGS, "--logging_steps", 1]
    assert run_here("run_pretraining.py", *flags, "--plan").returncode == 0
    assert not out.exists()
    process = run_here("run_pretraining.py", *flags)
    assert process.returncode == 0, process.stderr
    kept = {path.name for path in out.glob("checkpoint-*")}
    assert kept == {f"checkpoint-{step}" for step in planned["checkpoints"]["kept"]}
    sizes = [
        path.stat().st_size for path in (out / "checkpoint-10").iterdir() if path.suffix in (".safetensors", ".bin")
    ]
    # Beside the numbers there are names, and buffers such as positions.
    assert planned["checkpoints"]["bytes_each"] <= sum(sizes) < planned["checkpoints"]["bytes_each"] + 60_000
    num_weights = sum(value.numel() for name, value in load_file(out / "model.safetensors").items())
    assert planned["compute"]["num_parameters"] <= num_weights


@pytest.mark.slow
def test_a_plan_says_that_too_many_files_are_unreadable(media):
    planned = plan(media, "--max_bad_files", 0)
    assert " more than --max_bad_files 0 allows: a run would stop\n" in report(planned)


def test_the_first_of_two_processes_plans_for_both(media, tmp_path):
    flags = ["--train_data", media, "--output_dir", tmp_path / "out", *FLAGS, "--plan"]
    flags[flags.index("--per_device_train_batch_size") + 1] = 2
    process = run_together("run_pretraining.py", *flags)
    assert process.returncode == 0, process.stderr
    # As many updates as with batches of 4 in one process.
    assert process.stdout.count("10 updates") == 1
    assert not (tmp_path / "out").exists()


def test_a_store_is_as_large_as_packing_makes_it(media, tmp_path):
    planned = plan(media)["frame_store"]
    process = run_here("pack_frames.py", "--input", media, "--output", tmp_path / "store", "--max_bad_files", 0.2)
    assert process.returncode == 0, process.stderr
    packed = sum(path.stat().st_size for path in (tmp_path / "store").glob("*.arrow"))
    assert 0.5 < planned["bytes"] / packed < 1.1  # the rest is Arrow's, of rows as small as these
    assert plan(tmp_path / "store")["frame_store"]["is_stored"]


def rates_of(read_ms, num_workers):
    """Of 100 updates of 10 samples, which a CPU computes in 0.1 s each; a store is ten times as fast to read."""
    schedule = Schedule(
        num_steps=100,
        steps_per_epoch=100,
        num_warmup_steps=0.0,
        peak_learning_rate=0.1,
        gradient_accumulation_steps=1,
        total_batch_size=10,
        num_processes=1,
    )
    arguments = TrainingArguments(train_data=["data"], output_dir="out", dataloader_num_workers=num_workers)
    training = Training(arguments, None, None, None, schedule, 10**9, 1)
    survey = Survey(read_seconds=read_ms / 1000)
    store = StoreTrial(0.0, 0.0, 1000.0, 0.01, read_ms / 10_000)
    return Rates(training, survey, store, Trial("CPU, threads: 1", 10, 0.01), 0.25)


@pytest.mark.parametrize(
    ("read_ms", "num_workers", "num_cores", "wait", "seconds", "verdict"),
    [
        # Beside the updates of 0.1 s another core loads 10 samples in 0.09 or 0.102 s: it waits not at all, or 2 %.
        (9.0, 1, 2, 0.0, 10.0, "not worth it | waits for data 0.0% of the time | below 5% a store"),
        (10.2, 1, 2, 1 - 0.1 / 0.102, 10.2, "not worth it | waits for data 2.0% of the time | below 5% a store"),
        (20.0, 1, 2, 0.5, 20.0, "worth it | waits for data 50.0% of the time | a store makes a run 10 s shorter"),
        # Where loading needs the same core, or the same process, the one is added to the other.
        (10.0, 1, 1, 0.5, 20.0, "worth it | loading takes 50.0% of the time, on the cores that train | a store"),
        (10.0, 0, 2, 0.5, 20.0, "worth it | loading takes 50.0% of the time, on the cores that train | a store"),
    ],
)
def test_a_store_is_worth_it_where_training_waits(
    monkeypatch, read_ms, num_workers, num_cores, wait, seconds, verdict
):
    monkeypatch.setattr("vicmae_hf.planning.plan.usable_cores", lambda: num_cores)
    monkeypatch.setattr("torch.get_num_threads", lambda: 1)
    rates = rates_of(read_ms, num_workers)
    times = rates.describe()
    assert times["here"]["wait_share"] == pytest.approx(wait)
    assert times["here"]["seconds"] == pytest.approx(seconds)
    data = {"hours": 0.0, "images": 200, "read_seconds": read_ms / 1000}
    store = describe_store(data, rates.store, rates)
    assert store["wait_share"]["this machine"] == pytest.approx(wait)
    assert ("this machine" in store["worth_it"]) == verdict.startswith("worth it")
    assert " | ".join(judge_store(store, "this machine", times)).startswith(verdict)
    # Packing takes 0.01 s an image and core; of so many images it takes longer than the run.
    many = describe_store(data | {"images": 10_000}, rates.store, rates)
    assert many["worth_it"] == [] and not judge_store(many, "this machine", times)[0].startswith("worth")


def test_what_a_training_would_refuse_is_refused(media):
    with pytest.raises(ArgumentsError, match="--contrastive_start_epoch 9 is not reached"):
        plan(media, "--contrastive_start_epoch", 9)
    with pytest.raises(ArgumentsError, match="--streaming: a plan reads"):
        plan(media, "--streaming")
    with pytest.raises(ArgumentsError, match=r"--output .*: expected the name of a file that ends in \.json"):
        plan(media, "--output", media)
    with pytest.raises(ArgumentsError, match=r"--output video\.mp4: expected the name of a file that ends in \.json"):
        plan(media, "--output", "video.mp4")


def test_a_plan_of_a_finetuning(tmp_path):
    for index in range(8):
        folder = tmp_path / "data" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 20 * index).convert("RGB").save(folder / f"{index}.png")
    flags = [
        "--task",
        "image",
        "--train_data",
        tmp_path / "data",
        "--eval_data",
        tmp_path / "data",
        "--image_size",
        32,
    ]
    flags += ["--output_dir", tmp_path / "out", "--config_overrides", tiny_overrides(), "--dataloader_num_workers", 0]
    flags += ["--num_train_epochs", 3, "--warmup_epochs", 1, "--per_device_train_batch_size", 4, "--plan"]
    process = run_here("run_classification.py", *flags)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    place = lines.index("run           6 updates of 4 samples each (4 x 1 x 1: batch x accumulation x processes)")
    assert lines[place + 1].strip() == "an epoch is one pass over 8 samples, in 2 updates; the run has 3 epochs"
    assert "--max_train_steps" not in process.stdout
    assert "contrastive" not in process.stdout and not (tmp_path / "out").exists()
    linear = run_here("run_classification.py", *flags, "--method", "linear")
    assert linear.returncode == 0 and " 6 updates of 4 samples each (" in linear.stdout, linear.stderr


@pytest.mark.parametrize(("num_steps", "interval"), [(10, 3), (9, 3), (2, 5), (7, 0)])
def test_checkpoints_are_those_of_the_loop(num_steps, interval):
    due = [step for step in range(1, num_steps + 1) if is_due(interval, step, step == num_steps)]
    assert checkpoint_steps(num_steps, interval) == due


def counted_flops(compute_loss):
    with FlopCounterMode(display=False) as counter:
        compute_loss().backward()
    return counter.get_total_flops()


def test_flops_of_frozen_layers_and_of_classifiers():
    config = tiny_config(num_hidden_layers=4, attn_implementation="eager")
    model = ViCMAEForPreTraining(config)
    freeze_layers(model, 3)
    views = torch.randn(4, 2, 3, 16, 16)
    assert pretraining_flops(config, 4, 3) == counted_flops(lambda: model(views).loss)
    classifier = ViCMAEForVideoClassification(config)
    clips, labels = torch.randn(3, 4, 3, 16, 16), torch.zeros(3, dtype=torch.long)
    counted = counted_flops(lambda: classifier(clips, labels=labels).loss)
    assert classification_flops(config, 3, 4, is_frozen=False) == pytest.approx(counted, rel=0.05)


def test_activations_are_counted_by_the_sample():
    """What two layers keep of a sample: 8 inputs, and 16 outputs of the activation; weights are not counted."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1))

    def samples(size):
        while True:
            yield {"x": torch.randn(size, 8)}

    counted = activation_bytes(model, lambda batch: {"loss": model(batch["x"]).sum()}, samples)
    assert counted["float32"] == (4 * (8 + 16), 0)
    assert 2 * (8 + 16) <= counted["bf16"][0] <= 4 * (8 + 16)


def test_activations_are_those_of_the_run(media, tmp_path):
    """Whatever mode a model was loaded in, and whatever autocast Accelerate puts around it."""
    settings = parse_config_overrides(ViCMAEConfig, tiny_overrides()) | {"image_size": 32}
    ViCMAEForPreTraining(ViCMAEConfig(**settings)).save_pretrained(tmp_path)

    def kept(*flags):
        memory = plan(media, *flags)["memory"]
        assert memory["total"]["float32"] > memory["total"]["bf16"]
        return memory["activations_per_sample"]

    without, checkpointed = kept(), kept("--gradient_checkpointing")
    assert without["float32"] > checkpointed["float32"] and without["bf16"] > checkpointed["bf16"]
    loaded = ["--model_name_or_path", tmp_path, "--gradient_checkpointing"]
    assert kept(*loaded) == checkpointed
    assert kept(*loaded, "--mixed_precision", "bf16") == checkpointed


def test_a_layer_is_computed_again_at_a_time(media):
    """What a plan with checkpointing saves is what all layers but one would keep."""
    one = tiny_overrides(num_hidden_layers=1, decoder_num_hidden_layers=1)
    plans = [plan(media, "--config_overrides", one, *flags) for flags in ([], ["--gradient_checkpointing"])]
    model = ViCMAEForPreTraining(ViCMAEConfig(**parse_config_overrides(ViCMAEConfig, one), image_size=32)).train()

    def samples(size):
        while True:
            yield {"pixel_values": torch.randn(size, 2, 3, 32, 32)}

    def losses(batch):
        return {"loss": model(**batch).loss}

    model.gradient_checkpointing_enable()
    forward_alone, _ = activation_bytes(model, losses, samples)["float32"]
    model.decoder.decoder_layers[0].gradient_checkpointing = False
    with_a_layer, _ = activation_bytes(model, losses, samples)["float32"]
    whole, counted = (planned["memory"]["activations_per_sample"]["float32"] for planned in plans)
    model.gradient_checkpointing_disable()
    everything, _ = activation_bytes(model, losses, samples)["float32"]
    assert with_a_layer > forward_alone
    assert whole - counted == everything - with_a_layer > 0


def test_times_in_words():
    assert [readable_time(seconds) for seconds in (0.5, 90, 600, 5400, 40 * 3600, 12 * 86400)] == [
        *("0.5 s", "90 s", "10 min", "1.5 h", "40 h", "12 days")
    ]
