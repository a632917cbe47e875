import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tvF
from transformers import AutoImageProcessor

import vicmae_hf  # noqa: F401 (registers the processors)
from vicmae_hf.image_processing_vicmae import ViCMAEImageProcessor, ViCMAEImageProcessorPil


BACKENDS = {"torchvision": ViCMAEImageProcessor, "pil": ViCMAEImageProcessorPil}
MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])


def make_pixels(height: int, width: int, num_channels: int = 3) -> np.ndarray:
    """Stripes of several widths and noise (H, W, C): something for the resampling to blur and to ring on."""
    rows, columns = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(rows / (3 + 2 * channel)) * np.cos(columns / 7) for channel in range(num_channels)]
    noise = np.random.default_rng(0).normal(0, 12, (height, width, num_channels))
    return np.clip(np.stack(waves, axis=-1) + noise, 0, 255).astype(np.uint8)


def expected_pixel_values(pixels: np.ndarray, backend: str) -> np.ndarray:
    """(H, W, 3) to (3, 224, 224), written out: the resampling itself is PIL's and torchvision's own."""
    height, width = pixels.shape[:2]
    new_height, new_width = (256, int(256 * width / height)) if height < width else (int(256 * height / width), 256)
    if backend == "pil":
        resized = np.array(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BICUBIC))
    else:
        channels_first = torch.from_numpy(pixels).permute(2, 0, 1)
        resized = tvF.resize(channels_first, [new_height, new_width], tvF.InterpolationMode.BICUBIC, antialias=True)
        resized = resized.permute(1, 2, 0).numpy()
    top, left = (new_height - 224) // 2, (new_width - 224) // 2
    cropped = resized[top : top + 224, left : left + 224].astype(np.float64)
    return ((cropped / 255 - MEAN) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("height", "width"), [(300, 401), (511, 190), (256, 256)])
def test_values_are_resize_crop_and_normalise(backend, height, width):
    pixels = make_pixels(height, width)
    output = BACKENDS[backend]()(Image.fromarray(pixels), return_tensors="pt")
    assert list(output) == ["pixel_values"]
    assert output.pixel_values.shape == (1, 3, 224, 224)
    assert output.pixel_values.dtype == torch.float32
    np.testing.assert_allclose(output.pixel_values[0].numpy(), expected_pixel_values(pixels, backend), atol=2e-5)


def test_backends_agree():
    image = Image.fromarray(make_pixels(333, 500))
    torchvision_values, pil_values = (
        processor_class()(image, return_tensors="pt").pixel_values for processor_class in BACKENDS.values()
    )
    difference = (torchvision_values - pil_values).abs()
    # One gray level of 255 is 0.0175 after normalisation.
    assert difference.max() < 0.04
    assert difference.mean() < 0.002


@pytest.mark.parametrize("backend", BACKENDS)
def test_batches_of_every_form(backend, tmp_path):
    processor = BACKENDS[backend]()
    landscape, portrait = make_pixels(120, 200), make_pixels(230, 150)
    expected = torch.cat(
        [processor(Image.fromarray(pixels), return_tensors="pt").pixel_values for pixels in (landscape, portrait)]
    )
    assert expected.shape == (2, 3, 224, 224)

    paths = [str(tmp_path / name) for name in ("landscape.png", "portrait.png")]
    for path, pixels in zip(paths, (landscape, portrait), strict=True):
        Image.fromarray(pixels).save(path)
    batches = {
        "pil": [Image.fromarray(landscape), Image.fromarray(portrait)],
        "channels last": [landscape, portrait],
        "channels first": [landscape.transpose(2, 0, 1), portrait.transpose(2, 0, 1)],
        "tensors": [torch.from_numpy(landscape).permute(2, 0, 1), torch.from_numpy(portrait).permute(2, 0, 1)],
        "paths": paths,
    }
    for name, batch in batches.items():
        output = processor(batch, return_tensors="pt").pixel_values
        torch.testing.assert_close(output, expected, atol=0, rtol=0, msg=name)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_an_image_of_pillow_makes_pytorch_warn_of_nothing(mode):
    image = Image.fromarray(make_pixels(120, 200)).convert(mode)
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # else only the first warning of the process would show
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ViCMAEImageProcessor()(image, return_tensors="pt")
    finally:
        torch.set_warn_always(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gray_becomes_rgb_and_transparency_is_left_out(backend):
    processor = BACKENDS[backend]()
    gray = make_pixels(256, 300, num_channels=1)
    expected = processor(np.repeat(gray, 3, axis=-1), return_tensors="pt").pixel_values
    for image in (Image.fromarray(gray[..., 0]), gray, gray.transpose(2, 0, 1), torch.from_numpy(gray)):
        torch.testing.assert_close(processor(image, return_tensors="pt").pixel_values, expected, atol=0, rtol=0)

    transparent = np.zeros((256, 256, 4), np.uint8)
    transparent[..., 0] = 200
    transparent[:, :128, 3] = 255
    for image in (Image.fromarray(transparent), transparent, transparent.transpose(2, 0, 1)):
        values = processor(image, return_tensors="pt").pixel_values[0]
        denormalised = values.numpy().transpose(1, 2, 0) * STD + MEAN
        np.testing.assert_allclose(denormalised * 255, np.tile([200, 0, 0], (224, 224, 1)), atol=1)


@pytest.mark.parametrize("saved_backend", BACKENDS)
@pytest.mark.parametrize("loaded_backend", BACKENDS)
def test_settings_survive_saving(saved_backend, loaded_backend, tmp_path):
    processor = BACKENDS[saved_backend](
        size={"shortest_edge": 40}, crop_size={"height": 32, "width": 24}, image_mean=[0.1, 0.2, 0.3], do_resize=False
    )
    processor.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "preprocessor_config.json",
        "image_processing_vicmae.py",
        "media_reading_vicmae.py",
    }

    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=loaded_backend)
    assert type(loaded) is BACKENDS[loaded_backend]
    ignored = {"data_format"}  # torchvision's backend alone has this
    assert {k: v for k, v in loaded.to_dict().items() if k not in ignored} == {
        k: v for k, v in processor.to_dict().items() if k not in ignored
    }
    assert loaded(make_pixels(50, 60), return_tensors="pt").pixel_values.shape == (1, 3, 32, 24)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "empty list"),
        ([[]], "empty list"),
        (np.zeros((30, 40, 2), np.uint8), r"1, 3 or 4 channels.*\(30, 40, 2\)"),
        ([np.zeros((5, 30, 40), np.uint8)], r"1, 3 or 4 channels.*\(5, 30, 40\)"),
        (np.zeros((30, 40), np.uint8), r"1, 3 or 4 channels.*\(30, 40\)"),
        (torch.zeros(3, 0, 40), r"pixels.*\(3, 0, 40\)"),
    ],
)
def test_bad_images_are_named(backend, images, message):
    with pytest.raises(ValueError, match=message):
        BACKENDS[backend]()(images, return_tensors="pt")


@pytest.mark.slow  # tests/test_hub.py opens a whole folder so
@pytest.mark.parametrize("hidden_modules", [["vicmae_hf"], ["vicmae_hf", "torchvision"]])
def test_code_travels_with_the_settings(hidden_modules, tmp_path):
    processor = ViCMAEImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "export")

    script = f"""
import sys
sys.modules.update(dict.fromkeys({hidden_modules}))
import numpy as np
from transformers import AutoImageProcessor
processor = AutoImageProcessor.from_pretrained({str(tmp_path / "export")!r}, trust_remote_code=True)
output = processor(np.full((50, 60, 3), 255, np.uint8), return_tensors="np").pixel_values
print(type(processor).__name__, output.shape, *output[0, :, 0, 0].round(3))
"""
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    class_name = "ViCMAEImageProcessorPil" if "torchvision" in hidden_modules else "ViCMAEImageProcessor"
    assert process.stdout.split() == [class_name, "(1,", "3,", "32,", "32)", "2.249", "2.429", "2.64"]
