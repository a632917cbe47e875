"""Settings of pretraining."""

from dataclasses import dataclass

from ..data.samples.pairs import PairSettings
from ..settings import setting
from ..training.arguments import TrainingArguments


@dataclass(kw_only=True)
class PretrainingArguments(TrainingArguments, PairSettings):
    """Settings of `run_pretraining.py`."""

    train_data_weights: list[float] | None = setting(None, "relative share of each data source; default: its size")
    contrastive_start_epoch: float = setting(200.0, "the contrastive weight is 0 before (Table 1: 200)")
    probe_data: str | None = setting(None, "labelled folder or dataset on which features are probed during training")
    probe_steps: int = setting(1000, "updates between probes; the last update is always probed", minimum=1)
