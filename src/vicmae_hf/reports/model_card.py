"""Writes the README.md beside a trained model: what it is, how it was trained, its figures, its limits."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HTTPError

from ..files import partial_file


# The Hub reads what stands between the two lines of hyphens.
CARD = """---
{metadata}
---

# {name}

{description}

## Use

```python
{program}
```

The model comes with its own code, which `trust_remote_code=True` runs. If the package is installed, `import vicmae_hf`
replaces it. Without the package: `pip install torch torchvision transformers av` (av reads videos).

## Training

Data: {train_data}.

{settings}

## Results

{figures}

## Limits

{limits}
"""

ENCODER_PROGRAM = """from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{source}", trust_remote_code=True)
model = AutoModel.from_pretrained("{source}", trust_remote_code=True)
features = model(**processor(image, return_tensors="pt")).pooler_output"""

CLASSIFIER_PROGRAM = """from transformers import pipeline

classifier = pipeline("{task}-classification", model="{source}", trust_remote_code=True)
print(classifier("{example}"))"""

# Settings that a reader needs to judge or repeat a run; `arguments.json` has them all.
COMMON_SETTINGS = [
    "model_name_or_path",
    "config_overrides",
    "image_size",
    "total_batch_size",
    "num_train_epochs",
    "max_train_steps",
    "base_learning_rate",
    "warmup_epochs",
    "weight_decay",
    "mixed_precision",
    "seed",
]
PRETRAINING_SETTINGS = [
    "mask_ratio",
    "reconstruct",
    "norm_pix_loss",
    "contrastive_loss",
    "contrastive_weight",
    "contrastive_start_epoch",
    "frame_sampling",
    *COMMON_SETTINGS,
]
CLASSIFICATION_SETTINGS = [
    "method",
    "label_fraction",
    "pooling",
    "num_frames",
    "frames_per_second",
    "drop_path_rate",
    "layer_decay",
    "crop_scale",
    "horizontal_flip",
    "rand_augment_magnitude",
    "random_erasing",
    "label_smoothing",
    "mixup",
    "cutmix",
    *COMMON_SETTINGS,
]
# Of a pretraining; a run over single images has no film.
PICTURES = ["losses.png", "reconstructions.png", "neighbours.png", "features.webp", "attention.png"]
CLIP_SETTINGS = ["num_frames", "frames_per_second"]


def write_pretraining_card(output_dir: str | Path, arguments: dict[str, Any], results: dict[str, Any]) -> None:
    """
    Writes `README.md` for a pretrained model. Its figures, in the text and as the Hub's `model-index`, are losses of
    the last update, on training data, because pretraining makes no evaluation.

    Args:
        arguments: the content of `arguments.json`; results: that of `all_results.json`.
    """
    train_data = ", ".join(arguments["train_data"])
    figures = [
        EvalResult(
            task_type="image-feature-extraction",
            task_name="Pretraining",
            dataset_type=train_data,
            dataset_name=train_data,
            dataset_split="train",
            metric_type=name,
            metric_name=f"{name} of the last update, on training data",
            metric_value=results[name],
        )
        for name in ("loss", "reconstruction_loss", "contrastive_loss")
        if name in results
    ]
    plots = Path(output_dir) / "plots"
    pictures = [f"![{path.stem}](plots/{path.name})" for path in map(plots.joinpath, PICTURES) if path.exists()]
    _write_card(
        output_dir,
        arguments,
        results,
        figures,
        shown_settings=PRETRAINING_SETTINGS,
        pipeline_tag="image-feature-extraction",
        tags=["masked-autoencoding", "contrastive-learning", "video"],
        description=(
            "A ViC-MAE: masked autoencoding and contrastive learning over two frames of a video or two crops of an\n"
            "image, pretrained with `vicmae_hf`. An encoder, for features or for finetuning, without a classifier."
        ),
        program=ENCODER_PROGRAM.format(source=_source(output_dir, arguments)),
        below_figures="".join(f"\n\n{picture}" for picture in pictures),
        limits=(
            "The model has the gaps and biases of its training data. The run that wrote this card did not evaluate it "
            "on any\ndownstream task: the losses above are of training batches."
        ),
    )


def write_classification_card(
    output_dir: str | Path,
    arguments: dict[str, Any],
    results: dict[str, Any],
    *,
    task: Literal["image", "video"],
    dataset_name: str,
    shown_figures: dict[str, str],
) -> None:
    """
    Writes `README.md` for a finetuned classifier, with its figures as the Hub's `model-index` (shares between 0 and
    1 there, percent in `results`).

    Args:
        arguments: the content of `arguments.json`; results: that of `all_results.json`, with
            `num_eval_samples`.
        task: "image" or "video", what is classified.
        dataset_name: name of the data that it was evaluated on.
        shown_figures: keys of `results` and their names, `{"eval_top1": "top-1 accuracy"}`.
    """
    figures = [
        EvalResult(
            task_type=f"{task}-classification",
            dataset_type=dataset_name,
            dataset_name=dataset_name,
            metric_type=name.split(maxsplit=1)[-1].replace(" ", "_"),  # "accuracy"
            metric_name=name.capitalize(),
            metric_value=results[key] / 100,  # the Hub expects shares
        )
        for key, name in shown_figures.items()
    ]
    _write_card(
        output_dir,
        arguments,
        results,
        figures,
        shown_settings=[name for name in CLASSIFICATION_SETTINGS if task == "video" or name not in CLIP_SETTINGS],
        pipeline_tag=f"{task}-classification",
        tags=[f"{task}-classification"],
        description=f"A classifier of {task}s: a ViC-MAE encoder with a linear classifier, trained with `vicmae_hf`.",
        program=CLASSIFIER_PROGRAM.format(
            task=task,
            source=_source(output_dir, arguments),
            example={"image": "picture.jpg", "video": "video.mp4"}[task],
        ),
        below_figures=(
            f"\n\nEvaluated on {results['num_eval_samples']} samples of {dataset_name}, in percent. If "
            "there were several\nevaluations, the model is that of the best, so its figure is a little high; files "
            "that chose nothing give a fairer one."
        ),
        limits=(
            "It knows only the classes it was trained on, whatever the input shows. It has the gaps and biases of its "
            "training\ndata, and its accuracy on data other than the above is not known."
        ),
    )


def _write_card(
    output_dir: str | Path,
    arguments: dict[str, Any],
    results: dict[str, Any],
    figures: list[EvalResult],
    *,
    shown_settings: list[str],
    pipeline_tag: str,
    tags: Sequence[str],
    description: str,
    program: str,
    below_figures: str,
    limits: str,
) -> None:
    # The name that it has on the Hub; a model without one gets that of its folder there.
    name = arguments["hub_model_id"] or Path(output_dir).resolve().name
    base_model = arguments["model_name_or_path"]
    metadata = ModelCardData(
        library_name="transformers",
        license=inherited_license(base_model),
        # Paths of this machine mean nothing on the Hub, which knows models and datasets by their names there.
        base_model=None if base_model is None or Path(base_model).exists() else base_model,
        datasets=[
            entry for entry in arguments["train_data"] if "://" not in entry and not Path(entry).expanduser().exists()
        ]
        or None,
        pipeline_tag=pipeline_tag,
        tags=["vicmae", *tags],
        model_name=name,
        eval_results=figures,
    )
    # After an evaluation, `num_failed` counts files of the evaluation.
    num_train_failed = results.get("num_train_failed", results["num_failed"])
    # Settings of the run win over the config's, which may have the same name.
    settings = arguments["model"] | {entry: value for entry, value in arguments.items() if value is not None}
    card = CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        description=description,
        program=program,
        train_data=", ".join(f"`{entry}`" for entry in arguments["train_data"])
        + f" ({results['num_train_files']} files, {num_train_failed} unreadable)",
        settings=markdown_table(
            ("setting", "value"), [(entry, settings[entry]) for entry in shown_settings if entry in settings]
        ),
        figures=markdown_table(("result", "value"), [(entry, _readable(value)) for entry, value in results.items()])
        + below_figures,
        limits=limits,
    )
    with partial_file(Path(output_dir) / "README.md") as partial:
        ModelCard(card).save(partial)


def _source(output_dir: str | Path, arguments: dict[str, Any]) -> str:
    """Returns the name or path by which `from_pretrained` opens the model."""
    return arguments["hub_model_id"] or str(output_dir)


def inherited_license(base_model: str | None) -> str:
    """
    Returns the licence under which a model trained from `base_model` (a folder or a name on the Hub) is published: the
    licence of its card, "unknown" if there is none; if trained from random weights, the licence of this package.
    """
    if base_model is None:
        return "apache-2.0"
    card = Path(base_model) / "README.md" if Path(base_model).exists() else base_model
    try:
        metadata = ModelCard.load(card, ignore_metadata_errors=True).data
    except (OSError, HTTPError, ValueError):  # no card or no network must not spoil a run that is done
        return "unknown"
    return metadata.get("license") or "unknown"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _readable(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value
