"""A study that takes seconds: tiny encoders on a handful of demo clips."""

from pathlib import Path

from demo_data import write_demo_data


RECIPE = """
config_overrides:
  hidden_size: 16
  num_hidden_layers: 1
  num_attention_heads: 2
  intermediate_size: 32
  patch_size: 8
  decoder_hidden_size: 16
  decoder_num_hidden_layers: 1
  decoder_num_attention_heads: 2
  decoder_intermediate_size: 32
  pooling: mean
image_size: 32
per_device_train_batch_size: 8
max_train_steps: 6
base_learning_rate: 0.05
warmup_epochs: 1
contrastive_start_epoch: 0
dataloader_num_workers: 0
logging_steps: 2
checkpointing_steps: 3
save_total_limit: 1
"""


def write_study_data(folder: Path) -> dict[str, str | list[str]]:
    """Writes clips and recipe into `folder`, and returns the settings of a study that uses them."""
    data = folder / "demo"
    write_demo_data(data, appearance_videos=(3, 1), motion_videos=(1, 1), images=(1, 1), num_workers=1)
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)
    return {
        "recipe": str(recipe),
        "train_data": [str(data / "appearance" / "train"), str(data / "images" / "train")],
        "probe_train_data": str(data / "appearance" / "train"),
        "probe_eval_data": str(data / "appearance" / "eval"),
    }
