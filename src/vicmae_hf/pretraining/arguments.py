"""Settings of pretraining."""

from dataclasses import dataclass
from typing import Literal

from ..settings import setting
from ..training.arguments import TrainingArguments


@dataclass(kw_only=True)
class PretrainingArguments(TrainingArguments):
    """Settings of `run_pretraining.py`."""

    train_data_weights: list[float] | None = setting(None, "relative share of each data source; default: its size")
    samples_per_file: int = setting(1, "pairs drawn from each file in an epoch")
    streaming: bool = setting(
        False,
        "read one frame store shard by shard, from the Hub without a copy on disk; there is nothing to decode, and no "
        "limit of --seconds_per_file",
    )
    frame_sampling: Literal["distant", "fixed_gap", "max_gap", "adjacent", "same"] = setting(
        "distant", "which two frames of a video make a pair"
    )
    window_seconds: float = setting(64 / 30, "window of distant sampling; 0 takes the whole video")
    num_segments: int = setting(2, "segments of that window")
    gap_seconds: float = setting(1.0, "gap for fixed_gap and max_gap")
    color_augmentation: bool = setting(False, "colour jitter, grayscale, blur, solarisation, as in the released code")
    contrastive_start_epoch: float = setting(200.0, "the contrastive weight is 0 before (Table 1: 200)")
    probe_data: str | None = setting(None, "labelled folder or dataset on which features are probed during training")
    probe_steps: int = setting(1000, "updates between probes; the last update is always probed", minimum=1)
