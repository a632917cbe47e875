"""Exported files give the model's outputs, for any batch size."""

from importlib.util import find_spec

import pytest
import torch
from tiny_models import random_tensor, shake, tiny_config

from vicmae_hf import ViCMAEForImageClassification, ViCMAEForPreTraining, ViCMAEForVideoClassification
from vicmae_hf.commands import export
from vicmae_hf.errors import InputError
from vicmae_hf.processors import build_processors
from vicmae_hf.settings import ArgumentsError


NO_ONNX = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(NO_ONNX), reason=f"not installed: {NO_ONNX}")
IMAGES, CLIPS = (ViCMAEForImageClassification, (3, 16, 16)), (ViCMAEForVideoClassification, (4, 3, 16, 16))


def save(folder, model_class, **settings):
    model = shake(model_class(tiny_config(**settings))).eval()
    model.save_pretrained(folder)
    for processor in build_processors(model.config):
        processor.save_pretrained(folder)
    return model


def run_file(path, views):
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(views)
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(values) for values in session.run(None, {"pixel_values": views.numpy()})]


@pytest.mark.parametrize(
    ("file_format", "model_class", "shape"),
    [
        ("torch_export", *IMAGES),
        ("torch_export", *CLIPS),
        pytest.param("onnx", *IMAGES, marks=needs_onnx),
        pytest.param("onnx", *CLIPS, marks=[needs_onnx, pytest.mark.slow]),
    ],
)
def test_classifiers(file_format, model_class, shape, tmp_path, capsys):
    model = save(tmp_path / "model", model_class, pooling="mean")
    path = tmp_path / f"model{export.SUFFIXES[file_format]}"
    export.main(["--model_name_or_path", str(tmp_path / "model"), "--format", file_format, "-o", str(path)])
    assert "logits: differs from the model's by" in capsys.readouterr().out
    views = random_tensor(5, *shape)
    with torch.no_grad():
        expected = model(views).logits
    torch.testing.assert_close(run_file(path, views)[0], expected, atol=1e-4, rtol=1e-4)


@needs_onnx
def test_large_weights_lie_beside_their_file_under_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1)  # bytes
    model = save(tmp_path / "model", ViCMAEForImageClassification)
    path = tmp_path / "new" / "model.onnx"
    export.main(["--model_name_or_path", str(tmp_path / "model"), "-o", str(path)])
    assert f"{path}.data: its weights; keep both files in one folder" in capsys.readouterr().out
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    images = random_tensor(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(images).logits
    torch.testing.assert_close(run_file(path, images)[0], expected, atol=1e-4, rtol=1e-4)


def test_weights_of_a_replaced_file_do_not_stay(tmp_path, capsys):
    path, weights = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    weights.write_text("of something else")
    with export.finished_files(path) as unfinished:
        unfinished.write_text("first")
    assert weights.read_text() == "of something else"  # no file was replaced
    with export.finished_files(path) as unfinished:
        unfinished.write_text("large")
        unfinished.with_name("model.onnx.data").write_text("new")
    assert (path.read_text(), weights.read_text(), capsys.readouterr().out) == ("large", "new", "")
    with pytest.raises(RuntimeError), export.finished_files(path):
        raise RuntimeError
    assert weights.exists()
    with export.finished_files(path) as unfinished:
        unfinished.write_text("small")
    assert (path.read_text(), weights.exists()) == ("small", False)
    assert capsys.readouterr().out == f"{weights}: removed; it had the weights of the file that was replaced.\n"


def test_an_encoder_of_clips(tmp_path):
    model = save(tmp_path / "model", ViCMAEForPreTraining).vicmae
    path = tmp_path / "encoder.pt2"
    flags = ["--model_name_or_path", str(tmp_path / "model"), "--task", "video", "--format", "torch_export"]
    export.main([*flags, "-o", str(path)])
    clips = random_tensor(2, 4, 3, 16, 16)
    with torch.no_grad():
        expected = model(clips)
    tokens, pooled = run_file(path, clips)
    torch.testing.assert_close(tokens, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("model_class", [ViCMAEForImageClassification, ViCMAEForPreTraining])
def test_checkpoints_in_half_precision_are_exported_in_float32(model_class, tmp_path):
    model = save(tmp_path / "model", model_class)
    model.bfloat16().save_pretrained(tmp_path / "model")
    path = tmp_path / "model.pt2"
    export.main(["--model_name_or_path", str(tmp_path / "model"), "--format", "torch_export", "-o", str(path)])
    images = random_tensor(2, 3, 16, 16)
    exact = model.float()  # weights that bf16 has rounded, and sums in float32
    with torch.no_grad():
        expected = exact(images).logits if hasattr(model, "classifier") else exact.vicmae(images).last_hidden_state
    found = run_file(path, images)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_other_outputs_are_told(tmp_path, monkeypatch, capsys):
    save(tmp_path / "model", ViCMAEForImageClassification)
    wrong = lambda model, views, path: lambda views: [model(views)[0] + 1]  # noqa: E731
    monkeypatch.setattr(export, "export_program", wrong)
    arguments = export.ExportModelArguments(
        model_name_or_path=str(tmp_path / "model"), output=str(tmp_path / "model.pt2"), format="torch_export"
    )
    (tmp_path / "model.pt2").write_text("a good one")
    with pytest.raises(InputError, match=r"model.pt2: not written, its outputs are not the model's"):
        export.run(arguments)
    assert (tmp_path / "model.pt2").read_text() == "a good one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.pt2"]
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs onnx, onnxscript, onnxruntime: pip install"):
        export.run(export.ExportModelArguments(model_name_or_path="x", output="x.onnx"))
    with pytest.raises(ValueError, match=r"expected a name that ends in \.onnx for onnx"):
        export.ExportModelArguments(model_name_or_path="x", output="x.pt2")


def test_frames_of_images_are_refused(tmp_path):
    save(tmp_path / "model", ViCMAEForImageClassification)
    flags = {"model_name_or_path": str(tmp_path / "model"), "output": str(tmp_path / "model.pt2"), "num_frames": 4}
    with pytest.raises(
        ArgumentsError, match=r"--num_frames 4: images have no frames; leave it out, or .*--task video"
    ):
        export.run(export.ExportModelArguments(format="torch_export", **flags))
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.parametrize("file_format", ["torch_export", pytest.param("onnx", marks=needs_onnx)])
def test_what_a_model_refuses_or_cannot_compute_is_said_before_the_export(file_format, tmp_path):
    model = save(tmp_path / "model", ViCMAEForVideoClassification)
    path = tmp_path / f"model{export.SUFFIXES[file_format]}"
    flags = {"model_name_or_path": str(tmp_path / "model"), "output": str(path), "format": file_format}
    with pytest.raises(InputError, match=r"model: Frames must be a multiple of tubelet_size=2, got 3"):
        export.run(export.ExportModelArguments(**flags, num_frames=3))
    model.classifier.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="model: its outputs are not finite"):
        export.run(export.ExportModelArguments(**flags))
    path.mkdir()
    with pytest.raises(ArgumentsError, match="is a folder; expected the name of a file"):
        export.ExportModelArguments(**flags)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model", path.name]
