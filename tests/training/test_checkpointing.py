"""Finding checkpoints. Writing, rotation and resuming are proved in tests/examples."""

import pytest

from vicmae_hf.training.checkpointing import CheckpointError, Checkpoints, list_checkpoints


def test_checkpoints_are_listed_by_step(tmp_path):
    for name in ["checkpoint-9", "checkpoint-10", "checkpoint-100", "checkpoint-best", ".partial-checkpoint-200"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_no_checkpoint_is_a_start_only_for_latest(tmp_path):
    from accelerate import Accelerator

    checkpoints = Checkpoints(Accelerator(cpu=True), tmp_path, None, run_settings={})
    assert checkpoints.find("latest") is None
    assert checkpoints.start("latest") == 0
    with pytest.raises(CheckpointError, match=r"missing: no checkpoint there \(training_state.json is missing\)"):
        checkpoints.find(str(tmp_path / "missing"))
