"""The parts of the page, each by itself, without Gradio, which is an extra, and without a browser."""

import importlib
import sys
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator
from demo_checkpoints import save
from PIL import Image

from vicmae_hf import ViCMAEForPreTraining
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.demo.checkpoint import open_checkpoint


@pytest.fixture
def page_module(monkeypatch):
    """The module of the page; something that takes all calls stands in for Gradio."""
    monkeypatch.setitem(sys.modules, "gradio", MagicMock())
    monkeypatch.delitem(sys.modules, "vicmae_hf.demo.page", raising=False)
    yield importlib.import_module("vicmae_hf.demo.page")
    sys.modules.pop("vicmae_hf.demo.page")


@pytest.mark.parametrize(
    ("mask_ratio", "begins_at"),
    [(0.75, 0.75), (0.98, 0.95), (0.02, 0.05)],  # of the slider, 0.05 to 0.95
)
def test_the_slider_begins_at_the_model_s_mask_ratio_and_every_part_answers(
    mask_ratio, begins_at, page_module, tmp_path
):
    save(tmp_path / "model", ViCMAEForPreTraining, image_size=32, mask_ratio=mask_ratio)
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "image.png")
    checkpoint = open_checkpoint(str(tmp_path / "model"), None, torch.device("cpu"))
    page_module.mask_slider(checkpoint)
    slider = page_module.gradio.Slider.call_args
    assert slider.args == (0.05, 0.95) and slider.kwargs["value"] == begins_at

    page = page_module.Page(Accelerator(cpu=True), checkpoint, None, MediaLoader(), 60.0)
    computed = [page.reconstruction, page.colours]
    line, *parts = page.answer(str(tmp_path / "image.png"), begins_at, computed)
    assert "image.png" in line and all(part.startswith("<div class='pictures") for part in parts)
    # What one part cannot do, it says in its own place; the others answer.
    line, reconstruction, colours = page.answer(str(tmp_path / "image.png"), 0.99, computed)
    assert "image.png" in line and colours == parts[1]
    assert reconstruction.startswith("<p class='error' role='alert'>Expected a mask ratio between 0.05 and 0.95, got")
    line, *parts = page.answer(str(tmp_path / "missing.txt"), 0.5, computed)
    assert line.startswith("<p class='error'") and parts == [None, None]


def test_a_model_of_a_single_patch_has_a_page_without_reconstruction(page_module, tmp_path):
    save(tmp_path / "model", ViCMAEForPreTraining, image_size=8, patch_size=8)
    Image.effect_noise((32, 32), 50).convert("RGB").save(tmp_path / "image.png")
    checkpoint = open_checkpoint(str(tmp_path / "model"), None, torch.device("cpu"))
    page_module.mask_slider(checkpoint)
    assert page_module.gradio.Slider.call_args.kwargs["visible"] is False
    page = page_module.Page(Accelerator(cpu=True), checkpoint, None, MediaLoader(), 60.0)
    colours, *others = page.sections()
    assert colours.name == "colours" and [section.compute for section in others] == [None] * 3
    assert others[0].text.startswith("This model sees an image as a single patch")
    _, answer = page.answer(str(tmp_path / "image.png"), 0.75, [colours.compute])
    assert answer.startswith("<div class='pictures")
