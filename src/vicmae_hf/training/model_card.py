"""The README.md that a run leaves beside its model."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData


PRETRAINING_CARD = """---
{metadata}
---

# {name}

A ViC-MAE: masked autoencoding and contrastive learning over two frames of a video or two crops of an image, pretrained
with `vicmae_hf`.

## Use

```python
import vicmae_hf  # registers the model with the Auto classes
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{name}")
model = AutoModel.from_pretrained("{name}")
features = model(**processor(image, return_tensors="pt")).pooler_output
```

It is an encoder for finetuning or for features, without a classifier.

## Training

Data: {train_data} ({num_files} files, {num_failed} unreadable).

{settings}

## Figures of the run

{results}

![losses](plots/losses.png)

![reconstructions](plots/reconstructions.png)

## Limits

The model reflects the data it was trained on, with its gaps and biases. It was not evaluated on any downstream task by
the run that wrote this card.
"""


def write_pretraining_card(output_dir: str | Path, arguments: dict[str, Any], results: dict[str, Any]) -> None:
    """Writes `README.md` with metadata that the Hub reads, the settings and the final figures."""
    metadata = ModelCardData(
        library_name="transformers",
        license="apache-2.0",
        pipeline_tag="image-feature-extraction",
        tags=["vicmae", "masked-autoencoding", "contrastive-learning", "video"],
    )
    shown = [
        "config_overrides",
        "image_size",
        "frame_sampling",
        "total_batch_size",
        "num_train_epochs",
        "max_train_steps",
        "base_learning_rate",
        "warmup_epochs",
        "weight_decay",
        "contrastive_start_epoch",
        "mixed_precision",
        "seed",
    ]
    card = PRETRAINING_CARD.format(
        metadata=metadata.to_yaml(),
        name=arguments["hub_model_id"] or Path(output_dir).name,
        train_data=", ".join(f"`{name}`" for name in arguments["train_data"]),
        num_files=results["num_train_files"],
        num_failed=results["num_failed"],
        settings=_table(("setting", "value"), [(name, arguments[name]) for name in shown]),
        results=_table(("figure", "value"), [(name, _readable(value)) for name, value in results.items()]),
    )
    ModelCard(card).save(Path(output_dir) / "README.md")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _readable(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
