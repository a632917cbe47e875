"""One rule from any image to RGB of 8 bits: scripts, processors and a pipeline read the same pixels."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import shake, tiny_config
from transformers import AutoImageProcessor, pipeline

from vicmae_hf import (
    ViCMAEForImageClassification,
    ViCMAEImageProcessor,
    ViCMAEImageProcessorPil,
    ViCMAEVideoProcessor,
    media_reading_vicmae,
)
from vicmae_hf.data.media.images import ImageDecodingError, ImageOptions, read_image
from vicmae_hf.media_reading_vicmae import read_range, scale_numbers, to_rgb
from vicmae_hf.processors import build_processors


UNCHANGED = {"do_resize": False, "do_center_crop": False, "do_normalize": False, "do_rescale": False}
RAMP = np.arange(48 * 64).reshape(48, 64)  # 0 to 3071


def linear(numbers, low, high):
    """NumPy's own straight line from `low`..`high` to 0..255."""
    return np.interp(numbers, [low, high], [0, 255])


def write(path, numbers):
    Image.fromarray(numbers).save(path)
    return str(path)


def as_16_bits(numbers, maximum):
    """A PGM file of two bytes a number."""
    return b"P5\n%d %d\n%d\n" % (*numbers.shape[::-1], maximum) + numbers.astype(">u2").tobytes()


def everywhere(path, image_range="type"):
    """Gray (H, W) of a file, as each way of reading it gives it."""
    options = {**UNCHANGED, "image_range": image_range}
    scripts = read_image(path, ImageOptions(image_range=image_range))
    return {
        "scripts": scripts[0].numpy(),
        **{
            f"{processor.__name__} of {name}": np.asarray(
                processor(**options)(image, return_tensors="pt").pixel_values
            )[0, 0]
            for processor in (ViCMAEImageProcessor, ViCMAEImageProcessorPil)
            for name, image in [("path", path), ("PIL", Image.open(path))]
        },
        "video processor": np.asarray(ViCMAEVideoProcessor(**options)([[Image.open(path)]]).pixel_values[0])[0, 0],
        "for pipelines": ViCMAEImageProcessor(**options).read_image(path)[..., 0],
    }


@pytest.mark.parametrize(
    ("name", "numbers", "image_range", "expected"),
    [
        ("full.png", (RAMP * 21).astype(np.uint16), "type", RAMP * 21 // 256),
        ("full.tif", (RAMP * 21).astype(np.uint16), "type", RAMP * 21 // 256),
        ("12_bit.tif", RAMP.astype(np.uint16), "0,4095", linear(RAMP, 0, 4095)),
        ("12_bit.png", RAMP.astype(np.uint16), "file", linear(RAMP, 0, 3071)),
        ("clipped.png", RAMP.astype(np.uint16), "1000,2000", linear(RAMP, 1000, 2000)),
        ("float.tif", (RAMP / 3071).astype(np.float32), "type", linear(RAMP, 0, 3071)),
        ("float_of_counts.tif", RAMP.astype(np.float32) - 500, "file", linear(RAMP, 0, 3071)),
        ("float_in_kelvin.tif", RAMP.astype(np.float32) / 10, "273.15,300", linear(RAMP / 10, 273.15, 300)),
        ("int.tif", RAMP.astype(np.int32) * 1000 - 7, "file", linear(RAMP, 0, 3071)),
        ("int.tif", RAMP.astype(np.int32) * 600_000, "type", RAMP * 600_000 // 2**23),
        ("8_bit.png", (RAMP % 256).astype(np.uint8), "0,4095", RAMP % 256),
    ],
)
def test_numbers_of_all_types(name, numbers, image_range, expected, tmp_path):
    path = write(tmp_path / name, numbers)
    for reader, gray in everywhere(path, image_range).items():
        assert np.abs(gray.astype(float) - expected).max() <= 0.5 + 1e-3, reader


def test_types_that_pillow_hides(tmp_path):
    """Pillow opens these as int32, or as 16 bits."""
    signed = (RAMP - 1500).astype(np.int16)
    unsigned = (RAMP * 1_000_000 + 2**20).astype(np.uint32)
    for name, numbers, image_range, expected in [
        ("int16", signed, "file", linear(RAMP, 0, 3071)),
        ("int16", np.abs(signed) * 20, "type", np.abs(signed.astype(int)) * 20 // 128),
        ("int16", (RAMP * 10 - 300).astype(np.int16), "type", np.maximum(RAMP * 10 - 300, 0) // 128),  # noise below 0
        ("uint32", unsigned, "type", unsigned // 2**24),
        ("uint32", unsigned, "file", linear(unsigned.astype(float), unsigned.min(), unsigned.max())),
    ]:
        path = tmp_path / f"{name}.tif"
        path.write_bytes(tiff_of(numbers))
        for reader, gray in everywhere(str(path), image_range).items():
            assert np.abs(gray.astype(float) - expected).max() <= 0.5 + 1e-3, (name, reader)
    path = tmp_path / "a.pgm"
    path.write_bytes(as_16_bits(RAMP * 20, 65535))
    for reader, gray in everywhere(str(path)).items():
        assert (gray == RAMP * 20 // 256).all(), reader


@pytest.mark.parametrize("maximum", [1000, 3071, 4095, 65535])
def test_ranges_count_the_numbers_that_a_pgm_file_has(tmp_path, maximum, caplog):
    """Pillow scales them to 65535 when it loads the file."""
    numbers = RAMP * maximum // 3071
    plain = "\n".join([f"P2 64 48 {maximum}", *(" ".join(map(str, row)) for row in numbers)]).encode()
    for content in (as_16_bits(numbers, maximum), plain):
        (tmp_path / "a.pgm").write_bytes(content)
        for image_range, low, high in [("0,4095", 0, 4095), ("100,900", 100, 900), ("file", 0, maximum)]:
            for reader, gray in everywhere(str(tmp_path / "a.pgm"), image_range).items():
                assert np.abs(gray - linear(numbers, low, high)).max() <= 0.51, (reader, image_range)
    assert not caplog.messages
    media_reading_vicmae.logger.warning_once.cache_clear()
    image = Image.open(tmp_path / "a.pgm")
    image.load()
    to_rgb(image, "0,4095")
    assert "Give its path, or an image that was opened and not yet loaded." in caplog.text


def test_an_image_in_memory_that_may_have_16_or_32_bits():
    numbers = RAMP * 21
    image = Image.open(io.BytesIO(as_16_bits(numbers, 65535)))
    for part in (image.copy(), image.crop((0, 0, 64, 48))):
        with pytest.raises(ValueError, match=r"LOW,HIGH'\. If they are of 16 bits, give an image of mode I;16\."):
            to_rgb(part)
        assert (to_rgb(part.convert("I;16"))[..., 0] == numbers // 256).all()
        assert np.abs(to_rgb(part, "0,65535")[..., 0] - linear(numbers, 0, 65535)).max() <= 0.5
    assert (to_rgb(image)[..., 0] == numbers // 256).all()


def tiff_of(numbers, width=None, bits=None):
    """A TIFF file of one strip of gray integers, by hand: Pillow writes no such types."""
    height, width = numbers.shape[0], width or numbers.shape[1]
    data = numbers.astype(numbers.dtype.newbyteorder("<")).tobytes()
    bits, sample_format = bits or 8 * numbers.dtype.itemsize, 2 if numbers.dtype.kind == "i" else 1
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(data)}
    values[339] = sample_format
    tags = [
        tag.to_bytes(2, "little") + b"\4\0" + (1).to_bytes(4, "little") + value.to_bytes(4, "little")
        for tag, value in values.items()
    ]
    directory = len(tags).to_bytes(2, "little") + b"".join(tags) + bytes(4)
    return b"II*\0" + (8 + len(data)).to_bytes(4, "little") + data + directory


def test_12_bits_that_are_packed_into_bytes(tmp_path):
    pairs = RAMP.reshape(-1, 2)  # three bytes for two numbers
    packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
    strip = packed.astype(np.uint8).reshape(48, 96)
    (tmp_path / "a.tif").write_bytes(tiff_of(strip, width=64, bits=12))
    for reader, gray in everywhere(str(tmp_path / "a.tif")).items():
        assert (gray == RAMP // 16).all(), reader


def test_float_numbers_that_are_infinite_or_none(tmp_path):
    numbers = np.array([-np.inf, 0.0, 0.5, 1.0, np.inf], dtype=np.float32)
    assert scale_numbers(numbers, "type").tolist() == [0, 0, 128, 255, 255]
    assert scale_numbers(2 * numbers, "file").tolist() == [0, 0, 128, 255, 255]
    assert scale_numbers(np.full((2, 2), 7, np.uint16), "file").tolist() == [[0, 0], [0, 0]]
    numbers = np.full((4, 5), 0.5, np.float32)
    numbers[1, 2] = np.nan
    path = write(tmp_path / "nan.tif", numbers)
    for image_range in ("type", "file", "0,1"):
        with pytest.raises(ImageDecodingError, match=r"nan\.tif: 5\.00% of its pixels are no numbers \(NaN\)"):
            read_image(path, ImageOptions(image_range=image_range))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (RAMP.astype(np.float32), r"a\.tif: its numbers go from 0 to 3071, the type's from 0 to 1\. Take image_range"),
        (RAMP.astype(np.int32), "from 0 to 3071, the type's from 0 to 2.14748e.09"),
        (RAMP.astype(np.int32) - 1000, "from -1000 to 2071"),
    ],
)
def test_a_range_that_leaves_nothing_is_an_error(numbers, message, tmp_path):
    path = write(tmp_path / "a.tif", numbers)
    with pytest.raises(ImageDecodingError, match=message):
        read_image(path)
    with pytest.raises(ValueError, match=message.removeprefix(r"a\.tif: ")):
        ViCMAEImageProcessor()(Image.open(path))


@pytest.mark.parametrize("image_range", ["types", "4095", "9,3", "0,inf", "0,1,2", "", None])
def test_ranges_that_are_none(image_range):
    with pytest.raises(ValueError, match="image_range must be type, file or LOW,HIGH"):
        read_range(image_range)


def test_transparency_is_left_out_everywhere(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (48, 64, 4), dtype=np.uint8)
    for name, pixels in [("rgba.png", colours), ("la.png", colours[..., :2]), ("rgba.webp", colours)]:
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        Image.fromarray(pixels).save(tmp_path / name, **options)
        for reader, gray in everywhere(str(tmp_path / name)).items():
            assert (gray == pixels[..., 0]).all(), (name, reader)
    palette = Image.fromarray(colours[..., 0] % 2, "P")
    palette.putpalette([10, 20, 30, 200, 100, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    for reader, gray in everywhere(str(tmp_path / "palette.png")).items():
        assert (gray == np.where(colours[..., 0] % 2, 200, 10)).all(), reader


def test_upright_everywhere(tmp_path):
    gray = (RAMP * 21).astype(np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(gray).save(tmp_path / "a.png", exif=exif)
    for reader, upright in everywhere(str(tmp_path / "a.png")).items():
        assert (upright == (gray // 256).T[:, ::-1]).all(), reader


def test_files_of_several_pictures(tmp_path, caplog):
    """Each is read as the picture of colour 3, which is never the first of the file."""
    large = [Image.fromarray(np.full((48, 64, 3), level, np.uint8)) for level in (3, 3, 9)]
    small = Image.fromarray(np.full((24, 32, 3), 7, np.uint8))
    large[0].encoderinfo = {"tiffinfo": {254: 0}}  # else Pillow would repeat the tag of the first
    files = {
        "marked.tif": (small, large[:1], {"tiffinfo": {254: 1}}),
        "not_marked.tif": (small, large[1:], {}),
        "animated.png": (large[2], large[1::-1], {"default_image": True}),
    }
    media_reading_vicmae.logger.warning_once.cache_clear()
    for name, (first, others, options) in files.items():
        path = str(tmp_path / name)
        first.save(path, save_all=True, append_images=others, **options)
        for reader, gray in everywhere(path).items():
            if "PIL" not in reader and reader != "video processor":  # they get an image of Pillow
                assert gray.shape == (48, 64) and (gray == 3).all(), (name, reader)
    assert caplog.text.count("only the largest page is read.") == 1
    # An image of Pillow is the picture that its caller chose.
    image = Image.open(path)
    image.seek(0)
    assert (to_rgb(image) == 9).all()


@pytest.mark.parametrize("processor_class", [ViCMAEImageProcessor, ViCMAEImageProcessorPil])
def test_arrays_of_16_bits(processor_class):
    numbers = (RAMP * 21).astype(np.uint16)[..., None].repeat(3, axis=-1)
    processor = processor_class(**UNCHANGED)
    for array in (numbers, numbers.transpose(2, 0, 1), torch.from_numpy(numbers)):
        assert (np.asarray(processor(array).pixel_values[0])[0] == RAMP * 21 // 256).all()
    scaled = np.asarray(processor(numbers, image_range="0,65535").pixel_values[0])[0]
    assert np.abs(scaled - linear(RAMP * 21, 0, 65535)).max() <= 0.5
    # Whether 1 or 255 is white in other types, their user says by `do_rescale`.
    assert np.asarray(processor(numbers.astype(np.float32)).pixel_values[0]).max() == numbers.max()
    video = ViCMAEVideoProcessor(**UNCHANGED)(numbers[None]).pixel_values
    assert (np.asarray(video[0])[0, 0] == RAMP * 21 // 256).all()


def test_a_pipeline_of_what_the_processor_reads(tmp_path):
    model = shake(ViCMAEForImageClassification(tiny_config())).eval()
    model.save_pretrained(tmp_path / "model")
    processor, video_processor = build_processors(model.config, "0,4095")
    assert video_processor.image_range == "0,4095"
    processor.save_pretrained(tmp_path / "model")
    path = write(tmp_path / "12_bit.png", RAMP.astype(np.uint16))
    classifier = pipeline("image-classification", model=str(tmp_path / "model"))
    scores = {result["label"]: result["score"] for result in classifier(classifier.image_processor.read_image(path))}
    gray = linear(RAMP, 0, 4095).round().astype(np.uint8)
    expected = classifier(Image.fromarray(gray))
    assert scores == {result["label"]: pytest.approx(result["score"]) for result in expected}
    loaded = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert loaded.image_range == "0,4095"


def test_few_grey_levels_are_told_once(caplog):
    media_reading_vicmae.logger.warning_once.cache_clear()
    output = io.BytesIO()
    Image.fromarray(RAMP.astype(np.uint16)).save(output, "PNG")
    for _ in range(3):
        assert len(np.unique(to_rgb(Image.open(output)))) == 12
    assert len(caplog.messages) == 1
    assert "16 grey levels or less" in caplog.text
    assert "LOW,HIGH" in caplog.text


@pytest.mark.parametrize("processor_class", [ViCMAEImageProcessor, ViCMAEImageProcessorPil])
def test_files_that_unpack_to_too_many_pixels_are_refused(tmp_path, monkeypatch, processor_class):
    path = write(tmp_path / "large.png", np.zeros((48, 64), dtype=np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 // 2)  # Pillow refuses twice as many, and more
    assert processor_class()(path, return_tensors="np").pixel_values.shape == (1, 3, 224, 224)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 48 * 64 // 2 - 1)
    with pytest.raises(ValueError, match=r"large\.png: cannot be read: Image size \(3072 pixels\) exceeds limit"):
        processor_class()(path)
