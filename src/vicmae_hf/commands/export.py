"""
Exports an encoder or a classifier for serving, with any batch size, and compares its outputs with the model's.

Examples:

    vicmae export --model_name_or_path outputs/classifier -o classifier.onnx
    vicmae export --model_name_or_path outputs/mine --format torch_export --task video -o encoder.pt2

docs/serving.md shows how to run the files.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageClassification, AutoModelForVideoClassification

from ..convert_checkpoint import own_checkpoint
from ..errors import InputError
from ..evaluation.features import load_encoder
from ..files import check_writable, writing
from ..settings import REQUIRED, ArgumentsError, Settings, setting
from ..training.session.calling import start
from ..training.session.models import MODEL_ERRORS, NO_FOREIGN_CODE, explain


SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2"}
TOLERANCE = 1e-3  # of the largest output; float32 differs by about 1e-6
BATCH_SIZES = (1, 3)  # that are compared; the model is traced with another


@dataclass(kw_only=True)
class ExportModelArguments(Settings):
    model_name_or_path: str = setting(
        REQUIRED, "classifier, or any other ViC-MAE checkpoint, of which the encoder is exported"
    )
    output: str = setting(REQUIRED, "FILE.onnx, or FILE.pt2 for torch_export")
    format: Literal["onnx", "torch_export"] = setting("onnx", "format of the file")
    task: Literal["image", "video"] | None = setting(
        None,
        "input: images (batch, channels, height, width) or clips (batch, frames, ...); default: the classifier's, or "
        "image",
    )
    num_frames: int | None = setting(None, "frames per clip, not for images; default: the model's", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        suffix = SUFFIXES[self.format]
        if Path(self.output).suffix != suffix:
            raise ArgumentsError(f"--output {self.output}: expected a name that ends in {suffix} for {self.format}.")
        if Path(self.output).is_dir():
            raise ArgumentsError(f"--output {self.output}: is a folder; expected the name of a file.")


class Outputs(nn.Module):
    """A model with tensors for outputs, in the order of their names."""

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.model = model
        self.names = names

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self.model(pixel_values)
        return tuple(outputs[name] for name in self.names)


def run(arguments: ExportModelArguments) -> dict[str, Any]:
    """Returns the largest difference and the largest value of each output: `{name: {"difference", "largest"}}`."""
    if arguments.format == "onnx":
        missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
        if missing:
            raise InputError(f"--format onnx needs {', '.join(missing)}: pip install 'vicmae-hf[onnx]'.")
    check_writable(arguments.output)
    model, task = load_model(arguments.model_name_or_path)
    task = arguments.task or task
    if task == "image" and arguments.num_frames is not None:
        raise ArgumentsError(
            f"--num_frames {arguments.num_frames}: images have no frames; leave it out, or give --task video."
        )
    is_classifier = hasattr(model, "classifier")
    outputs = Outputs(model, ["logits"] if is_classifier else ["last_hidden_state", "pooler_output"]).eval()
    config = model.config
    num_frames = arguments.num_frames or config.num_frames
    shape = [config.num_channels, *config.image_height_and_width]
    shape = [num_frames, *shape] if task == "video" else shape
    views = torch.randn(2, *shape)
    check_outputs(outputs, views, arguments.model_name_or_path)
    path = Path(arguments.output)
    export = {"onnx": export_onnx, "torch_export": export_program}[arguments.format]
    with finished_files(path) as unfinished:
        exported = export(outputs, views, unfinished)
        results = compare(outputs, exported, shape)
        for name, figures in results.items():
            print(
                f"{name}: differs from the model's by {figures['difference']:.1e} at most, of values up to "
                f"{figures['largest']:.1e}"
            )
        if not all(figures["difference"] <= TOLERANCE * figures["largest"] for figures in results.values()):
            raise InputError(f"{path}: not written, its outputs are not the model's. Please report it.")
        others = [file.name for file in unfinished.parent.iterdir() if file != unfinished]
    print(
        f"{path}: {task}s (batch, {', '.join(map(str, shape))}), any batch size; float32, normalised by the processor."
    )
    for name in others:
        print(f"{path.with_name(name)}: its weights; keep both files in one folder, under these names.")
    return results


@torch.no_grad()
def check_outputs(model: Outputs, views: torch.Tensor, name: str) -> None:
    """Raises an InputError if a model takes no views of this shape, or its outputs are infinite or NaN."""
    try:
        outputs = model(views)
    except ValueError as error:  # the model's own; an exporter would bury it
        raise InputError(f"{name}: {error}") from error
    if not all(values.isfinite().all() for values in outputs):
        raise InputError(f"{name}: its outputs are not finite, so its weights are damaged, or its training diverged.")


@contextmanager
def finished_files(path: Path) -> Iterator[Path]:
    """
    Gives a path of the same name in a folder of its own. What lies in the folder at the end moves beside `path`; after
    an error nothing does, and a file that was there before stays. A folder, because ONNX keeps large weights in a
    second file, whose name stands in the first. If the new model has no such file, that of the old one is removed.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
            unfinished = Path(folder) / path.name
            yield unfinished
            weights = path.with_name(f"{path.name}.data")
            is_stale = (
                path.suffix == ".onnx"
                and path.exists()
                and not unfinished.with_name(weights.name).exists()
                and weights.is_file()
            )
            # The weights first: nobody finds a file without them.
            for file in sorted(unfinished.parent.iterdir(), key=lambda file: file == unfinished):
                with file.open("r+b") as opened:
                    os.fsync(opened.fileno())  # else, after a power failure, the name may stand for an empty file
                os.replace(file, path.with_name(file.name))
            if is_stale:
                weights.unlink()
                print(f"{weights}: removed; it had the weights of the file that was replaced.")


def load_model(name: str) -> tuple[nn.Module, Literal["image", "video"]]:
    """Loads a classifier of this package and its task, or the encoder of any other ViC-MAE checkpoint, in float32."""
    classes = {"Image": AutoModelForImageClassification, "Video": AutoModelForVideoClassification}
    try:
        with own_checkpoint(name) as folder:
            config = AutoConfig.from_pretrained(folder, **NO_FOREIGN_CODE)
            architecture = (config.architectures or [""])[0]
            for kind, model_class in classes.items():
                if architecture == f"ViCMAEFor{kind}Classification":
                    # By itself Transformers keeps the precision of the checkpoint.
                    return model_class.from_pretrained(folder, **NO_FOREIGN_CODE).float(), kind.lower()
    except MODEL_ERRORS as error:
        raise InputError(f"{name}: the model cannot be loaded: {explain(error)}") from error
    return load_encoder(name, "frame")[0].float(), "image"


def export_program(model: nn.Module, pixel_values: torch.Tensor, path: Path) -> Callable:
    """Writes an `ExportedProgram`, reads it again, and returns a function: numbers in, outputs out."""
    program = torch.export.export(model, (pixel_values,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    with path.open("wb") as file:
        torch.export.save(program, file)
    return torch.export.load(path).module()


def export_onnx(model: nn.Module, pixel_values: torch.Tensor, path: Path) -> Callable:
    """
    Writes an ONNX file, opens it in ONNX Runtime, and returns a function: numbers in, outputs out. Above 1.5 GiB,
    torch writes the weights to a second file, of the same name and `.data`.
    """
    import onnxruntime  # imported here, because it is an extra

    program = torch.onnx.export(
        model,
        (pixel_values,),
        dynamo=True,
        input_names=["pixel_values"],
        output_names=list(model.names),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    program.save(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda views: [torch.from_numpy(values) for values in session.run(None, {"pixel_values": views.numpy()})]


@torch.no_grad()
def compare(model: Outputs, exported: Callable, shape: Sequence[int]) -> dict[str, dict[str, float]]:
    """Compares the outputs of random batches of several sizes (see `run`)."""
    results = {name: {"difference": 0.0, "largest": 0.0} for name in model.names}
    for batch_size in BATCH_SIZES:
        views = torch.randn(batch_size, *shape, generator=torch.Generator().manual_seed(batch_size))
        for figures, expected, found in zip(results.values(), model(views), exported(views), strict=True):
            # `np.maximum` keeps NaN; Python's `max` may lose it.
            figures["difference"] = float(np.maximum(figures["difference"], (expected - found).abs().max().item()))
            figures["largest"] = max(figures["largest"], expected.abs().max().item())
    return results


def main(argv: Sequence[str] | None = None) -> None:
    start(ExportModelArguments, run, argv)
