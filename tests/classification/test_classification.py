"""Training of classifiers: its loss; what is refused, and what stays then. Whole runs are in tests/examples."""

import numpy as np
import pytest
import torch
from accelerate import PartialState
from classifier_flags import parse
from launching import run_here
from tiny_models import random_tensor, shake, tiny_config, tiny_overrides
from torch import nn
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEConfig, ViCMAEForImageClassification, ViCMAEForVideoClassification, ViCMAEModel
from vicmae_hf.classification.classification import Objective
from vicmae_hf.command_line import parse_config_overrides
from vicmae_hf.evaluation.features import warn_if_blind_to_order


MODEL = tiny_overrides(num_frames=2)


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for label, name in enumerate("ab"):
        (root / name).mkdir()
        write_video(root / name / "0.mp4", numbered_frames(8, 32, 32, seed=label))
    return root


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop_scale", "0.9", "0.1"], "crop_scale must be two ascending shares"),
        (["--label_smoothing", "2"], "--label_smoothing must be at least 0 and below 1"),
        (["--num_train_epochs", "3"], "--warmup_epochs 5 is no shorter than the run of 3 epochs"),
        (["--mixup", "-1"], "--mixup must be at least 0, got -1"),
    ],
)
def test_what_is_refused_leaves_the_run_that_it_would_have_replaced(videos, tmp_path, flags, message):
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "all_results.json").write_text("{}")
    process = run_here(
        "run_classification.py",
        *("--task", "video", "--method", "finetune", "--train_data", videos, "--eval_data", videos),
        *("--output_dir", tmp_path, "--overwrite_output_dir", "--image_size", 32, "--config_overrides", MODEL),
        *("--per_device_train_batch_size", 2, "--dataloader_num_workers", 0, *flags),
    )
    assert process.returncode == 1 and message in process.stderr, process.stderr
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["all_results.json", "checkpoint-5"]


@pytest.mark.parametrize("pooling", ["cls", "mean", "tubelets"])
def test_a_linear_classifier_is_blind_to_the_order_of_frames_and_says_so_or_sees_it(pooling, videos, tmp_path):
    """On an encoder of frames, as pretraining leaves it; its weights are the same for all frames of a tubelet."""
    config = ViCMAEConfig(**parse_config_overrides(ViCMAEConfig, tiny_overrides()), image_size=32)
    shake(ViCMAEModel(config, video=False)).save_pretrained(tmp_path / "frames")
    process = run_here(
        *("run_classification.py", "--task", "video", "--method", "linear", "--no-train_augmentation"),
        *("--train_data", videos, "--eval_data", videos, "--output_dir", tmp_path / "run"),
        *("--model_name_or_path", tmp_path / "frames", "--num_frames", 8, "--config_overrides", f"pooling={pooling}"),
        *("--per_device_train_batch_size", 2, "--dataloader_num_workers", 0),
        *("--num_train_epochs", 3, "--warmup_epochs", 0),
    )
    assert process.returncode == 0, process.stderr
    model = ViCMAEForVideoClassification.from_pretrained(tmp_path / "run").eval()
    clips = random_tensor(3, 8, 3, 32, 32)
    with torch.no_grad():
        change = (model(clips).logits - model(clips.flip(1)).logits).abs().max()
    is_blind = pooling != "tubelets"
    assert (change < 1e-5) if is_blind else (change > 1e-3)
    assert ("not see in which order the 4 tubelets of a clip come" in process.stderr) == is_blind


def test_positions_that_were_trained_and_single_tubelets_bring_no_warning(caplog):
    PartialState()  # of accelerate, whose logger it is
    video = ViCMAEModel(tiny_config(num_frames=8))
    for encoder, num_frames in [(ViCMAEModel(tiny_config(), video=False), 4), (video, 2), (shake(video), 8)]:
        warn_if_blind_to_order(encoder, num_frames)
    assert not caplog.messages
    warn_if_blind_to_order(ViCMAEModel(tiny_config(num_frames=8)), 8)
    assert len(caplog.messages) == 1


def test_the_loss_is_cross_entropy_against_smoothed_targets(folders):
    model = shake(ViCMAEForImageClassification(tiny_config())).eval()
    arguments = parse(folders, "--mixup", "0", task="image")
    objective = Objective(model, model.config, arguments)
    pixels = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 1, 1])
    loss = objective({"pixel_values": pixels, "labels": labels}, 0.0)["loss"]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    normalized = (pixels.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    logits = model(torch.tensor(normalized, dtype=torch.float32)).logits
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
