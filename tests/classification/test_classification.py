"""Training of classifiers: what is refused, and what stays then. Whole runs are in tests/examples."""

import pytest
from launching import run_here
from video_files import numbered_frames, write_video


MODEL = (
    "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,patch_size=8,decoder_hidden_size=8,"
    "decoder_num_hidden_layers=1,decoder_num_attention_heads=2,decoder_intermediate_size=16,num_frames=2"
)


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
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all_results.json", "checkpoint-5"]
