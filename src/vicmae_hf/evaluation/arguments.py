"""Settings of scripts that run trained models."""

from dataclasses import dataclass

from ..data.sources.labelled import CheckpointSourceSettings
from ..settings import setting
from ..training.arguments import ProcessArguments


@dataclass(kw_only=True)
class InferenceArguments(ProcessArguments, CheckpointSourceSettings):
    """Settings of every script that runs a trained model over files. The scripts' own settings are in subclasses."""

    num_frames: int | None = setting(None, "frames per video; default: the model's", minimum=1)
    frames_per_second: float | None = setting(
        None, "frame rate of a clip; 0 spreads it over the whole video; default: the processor's", minimum=0
    )
    per_device_eval_batch_size: int = setting(8, "views in a forward pass", minimum=1)
