import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vicmae_hf.data.media.images import ImageDecodingError, decode_jpegs, read_image


@pytest.fixture
def picture():
    """RGB (5, 7, 3), every pixel another colour."""
    return np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def to_array(image):
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy()


def test_pixels_of_a_file_and_of_its_bytes(picture, tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture).save(path)
    assert (to_array(read_image(str(path))) == picture).all()
    assert (to_array(read_image(path.read_bytes())) == picture).all()


# Exif 2.3, tag 0x0112: which side of the scene row 0 and column 0 of the stored picture show.
@pytest.mark.parametrize(
    ("orientation", "turn_upright"),
    [
        (1, lambda stored: stored),
        (2, lambda stored: stored[:, ::-1]),
        (3, lambda stored: stored[::-1, ::-1]),
        (4, lambda stored: stored[::-1]),
        (5, lambda stored: stored.transpose(1, 0, 2)),
        (6, lambda stored: stored.transpose(1, 0, 2)[:, ::-1]),
        (7, lambda stored: stored.transpose(1, 0, 2)[::-1, ::-1]),
        (8, lambda stored: stored.transpose(1, 0, 2)[::-1]),
    ],
)
def test_exif_orientation(picture, tmp_path, orientation, turn_upright):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
    assert (to_array(read_image(str(tmp_path / "a.png"))) == turn_upright(picture)).all()


def test_grayscale_and_transparent_images(picture, tmp_path):
    gray = picture[:, :, 0]
    alpha = picture[:, :, 1:2]
    for name, image, expected in [
        ("gray.png", gray, gray[:, :, None].repeat(3, axis=2)),
        ("gray_alpha.png", np.concatenate([gray[:, :, None], alpha], axis=2), gray[:, :, None].repeat(3, axis=2)),
        ("colour_alpha.png", np.concatenate([picture, alpha], axis=2), picture),
        ("bilevel.png", gray > 127, 255 * (gray > 127)[:, :, None].repeat(3, axis=2)),
    ]:
        Image.fromarray(image).save(tmp_path / name)
        assert (to_array(read_image(str(tmp_path / name))) == expected).all(), name


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bit_gray_is_scaled_to_8_bit(tmp_path, name):
    gray = np.array([[0, 255, 256, 1000], [32768, 40000, 65279, 65535]], dtype=np.uint16)
    Image.fromarray(gray).save(tmp_path / name)
    assert (to_array(read_image(str(tmp_path / name)))[:, :, 0] == gray // 256).all()


def test_palette_image(tmp_path):
    image = Image.new("P", (3, 2))
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    image.putdata([0, 1, 2, 2, 1, 0])
    for options in [{}, {"transparency": 1}]:
        image.save(tmp_path / "a.png", **options)
        colours = to_array(read_image(str(tmp_path / "a.png"))).tolist()
        assert colours == [[[10, 20, 30], [200, 100, 0], [7, 8, 9]], [[7, 8, 9], [200, 100, 0], [10, 20, 30]]]


def test_cmyk_jpeg(tmp_path):
    # Inks in 0..255: no ink is white, full cyan is red's complement, full black is black.
    inks = np.array([(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 255, 0)], dtype=np.uint8)
    expected = [(255, 255, 255), (0, 255, 255), (0, 0, 0), (255, 0, 0)]
    picture = inks[None].repeat(16, axis=0).repeat(16, axis=1)
    Image.fromarray(picture, mode="CMYK").save(tmp_path / "a.jpg", quality=100)
    colours = to_array(read_image(str(tmp_path / "a.jpg")))
    assert colours.shape == (16, 64, 3)
    assert np.abs(colours[8, 8::16].astype(int) - expected).max() <= 3


def test_first_picture_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ["red", "blue"]]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(str(tmp_path / "a.gif"))[:, 0, 0].tolist() == [255, 0, 0]


def broken_files(picture):
    jpeg = io.BytesIO()
    Image.fromarray(picture.repeat(20, axis=0).repeat(20, axis=1)).save(jpeg, "JPEG")
    # TIFF header, then two tags: the orientation, and a resolution that is a text where a fraction belongs.
    tags = struct.pack("<HHHIIHHII", 2, 0x0112, 3, 1, 6, 0x011A, 2, 4, int.from_bytes(b"abc\0", "little"))
    tags = b"II*\0" + struct.pack("<I", 8) + tags + struct.pack("<I", 0)
    webp = io.BytesIO()
    Image.fromarray(picture).save(webp, "WEBP", exif=b"Exif\0\0" + tags)
    return {
        "truncated.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "text.jpg": b"not an image",
        "empty.jpg": b"",
        "damaged_exif.webp": webp.getvalue(),
    }


@pytest.mark.parametrize("name", ["truncated.jpg", "text.jpg", "empty.jpg", "damaged_exif.webp"])
def test_unreadable_files(picture, tmp_path, name):
    content = broken_files(picture)[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageDecodingError, match=name):
        read_image(str(tmp_path / name))
    with pytest.raises(ImageDecodingError, match=f"^{len(content)} bytes"):
        read_image(content)


def test_missing_file(tmp_path):
    with pytest.raises(ImageDecodingError, match=r"gone\.jpg"):
        read_image(str(tmp_path / "gone.jpg"))


def encode_jpeg(image, **options):
    output = io.BytesIO()
    image.save(output, "JPEG", **options)
    return output.getvalue()


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return {"exif": exif}


@pytest.mark.parametrize("size", [(1, 1), (64, 48), (33, 77)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"quality": 90}),
        ("RGB", {"subsampling": "4:4:4"}),
        ("RGB", {"subsampling": "4:2:2"}),
        ("RGB", {"progressive": True}),
        ("RGB", {"keep_rgb": True, "subsampling": "4:4:4"}),
        ("RGB", {"comment": b"\xff\xe1 in a comment", "icc_profile": b"profile" * 20000}),
        ("L", {}),
        ("CMYK", {}),
        *[(mode, orientation(value)) for mode in ("RGB", "L", "CMYK") for value in (1, 3, 6)],
    ],
)
def test_jpeg_is_decoded_as_pillow_decodes_it(size, mode, options):
    noise = np.random.default_rng(0).integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), dtype=np.uint8)
    data = encode_jpeg(Image.fromarray(noise).resize(size).convert(mode), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    image = read_image(data)
    assert (to_array(image) == expected).all()
    assert image.permute(1, 2, 0).is_contiguous()


def test_orientation_is_found_wherever_it_stands(picture):
    image = Image.fromarray(picture.repeat(8, axis=0).repeat(8, axis=1))
    data = encode_jpeg(image, **orientation(6))
    upright = np.asarray(Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270))
    start = data.index(b"\xff\xe1")
    end = start + 2 + int.from_bytes(data[start + 2 : start + 4])
    metadata, rest = data[start:end], data[:start] + data[end:]
    tables = rest.index(b"\xff\xc4")  # in front of the Huffman tables, behind the frame header
    xmp = b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><d tiff:Orientation="6"/></x:xmpmeta>'
    xmp = b"\xff\xe1" + (len(xmp) + 2).to_bytes(2) + xmp
    for name, changed in [
        ("as written", data),
        ("fill bytes", data[:start] + b"\xff\xff" + data[start:]),
        ("behind the frame header", rest[:tables] + metadata + rest[tables:]),
        ("XMP", rest[:start] + xmp + rest[start:]),
    ]:
        assert (to_array(read_image(changed)) == upright).all(), name
    assert (to_array(read_image(rest)) == np.asarray(Image.open(io.BytesIO(rest)))).all()


def test_sound_pixels_behind_a_warning_are_read(picture):
    """libjpeg warns of the bytes between two segments, and Pillow ignores it."""
    data = encode_jpeg(Image.fromarray(picture))
    tables = data.index(b"\xff\xdb")
    padded = data[:tables] + b"\0\0\0" + data[tables:]
    assert (to_array(read_image(padded)) == np.asarray(Image.open(io.BytesIO(data)))).all()


def test_any_damage_is_told_or_read_as_pillow_reads_it(picture):
    data = encode_jpeg(Image.fromarray(picture.repeat(16, axis=0).repeat(16, axis=1)))
    generator = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        damaged = bytearray(data)
        for place in generator.integers(2, len(data), size=3):
            damaged[place] = generator.integers(256)
        damaged = bytes(damaged[: generator.integers(len(data) // 2, 2 * len(data))])
        try:
            expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(damaged))).convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            with pytest.raises(ImageDecodingError):
                read_image(damaged)
            outcomes["refused"] += 1
        else:
            assert (to_array(read_image(damaged)) == expected).all()
            outcomes["read"] += 1
    assert min(outcomes.values()) > 30


def test_pictures_too_large_to_be_meant_are_refused(monkeypatch):
    data = bytearray(encode_jpeg(Image.new("RGB", (16, 16))))
    header = data.index(b"\xff\xc0")
    data[header + 5 : header + 9] = (60000).to_bytes(2) * 2
    with pytest.raises(ImageDecodingError, match="decompression bomb"):
        read_image(bytes(data))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # by whoever knows their pictures
    assert read_image(encode_jpeg(Image.new("RGB", (16, 16)))).shape == (3, 16, 16)


def test_jpegs_of_one_size_in_one_go():
    pictures = np.random.default_rng(0).integers(0, 256, (4, 24, 40, 3), dtype=np.uint8)
    encoded = [encode_jpeg(Image.fromarray(picture)) for picture in pictures]
    images = decode_jpegs(encoded)
    assert images.shape == (4, 3, 24, 40)
    assert images.permute(0, 2, 3, 1).is_contiguous()
    for image, data in zip(images, encoded, strict=True):
        assert (to_array(image) == np.asarray(Image.open(io.BytesIO(data)))).all()
    png = io.BytesIO()
    Image.fromarray(pictures[0]).save(png, "PNG")
    for name, other in [
        ("another size", encode_jpeg(Image.fromarray(pictures[0, :, :24]))),
        ("the same number of pixels", encode_jpeg(Image.fromarray(pictures[0].transpose(1, 0, 2)))),
        ("another format", png.getvalue()),
        ("damaged", encoded[0][:-100]),
        ("to be turned", encode_jpeg(Image.fromarray(pictures[0]), **orientation(3))),
        ("no image", b""),
    ]:
        assert decode_jpegs([encoded[1], other]) is None, name
