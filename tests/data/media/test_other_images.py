"""Animations and stacks are videos; a file of one picture stays an image."""

import io
import logging
import zlib

import numpy as np
import pytest
from PIL import Image

from vicmae_hf.data.media import other_images, video
from vicmae_hf.data.media.images import ImageDecodingError, ImageOptions, ImageReader, open_image, read_image
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader


SECONDS = [0.1, 0.2, 0.05, 0.4, 0.07]
STARTS = [0, 0.1, 0.3, 0.35, 0.75]


@pytest.fixture(scope="module")
def pictures():
    """RGB (5, 24, 32, 3), of few colours, so that GIF holds them exactly."""
    return np.random.default_rng(0).integers(0, 4, (5, 24, 32, 3), dtype=np.uint8) * 80


def write(path, pictures, **options):
    first, *others = map(Image.fromarray, pictures)
    first.save(path, save_all=True, append_images=others, **options)
    return str(path)


def frames_of(reader, indices):
    frames = reader.get_frames(indices)
    assert frames.permute(0, 2, 3, 1).is_contiguous()
    return frames.permute(0, 2, 3, 1).numpy()


MILLISECONDS = {"duration": [round(1000 * seconds) for seconds in SECONDS]}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.gif", MILLISECONDS),
        ("a.png", MILLISECONDS),
        ("a.apng", {**MILLISECONDS, "format": "PNG"}),
        ("a.webp", {**MILLISECONDS, "lossless": True}),
    ],
)
def test_animations_have_frames_and_their_own_times(name, options, pictures, tmp_path):
    path = write(tmp_path / name, pictures, **options)
    for source in (path, (tmp_path / name).read_bytes()):
        with open_image(source) as reader:
            assert reader.num_frames == 5
            np.testing.assert_allclose(reader.timestamps, STARTS)
            assert reader.duration == pytest.approx(sum(SECONDS))
            for indices in ([0, 1, 2, 3, 4], [3, 0, 3], [4], [1]):
                assert (frames_of(reader, indices) == pictures[indices]).all(), (name, indices)
            with pytest.raises(ValueError, match="has frames 0 to 4, asked for"):
                reader.get_frames([5])
    with open_image(path, ImageOptions(frames_per_second=4)) as reader:
        np.testing.assert_allclose(reader.timestamps, np.arange(5) / 4)
        assert reader.duration == 1.25
    assert (read_image(path).permute(1, 2, 0).numpy() == pictures[0]).all()


def test_animated_avif(tmp_path):
    gray = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(24, 1).repeat(32, 2).repeat(3, 3) * 50
    with open_image(write(tmp_path / "a.avif", gray, quality=100, **MILLISECONDS)) as reader:
        np.testing.assert_allclose(reader.timestamps, STARTS)
        assert np.abs(frames_of(reader, [4, 1]).astype(int) - gray[[4, 1]]).max() <= 3


def test_a_stack_of_16_bits(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(video, "said", set())
    numbers = np.random.default_rng(0).integers(0, 4096, (6, 24, 32), dtype=np.uint16)
    path = write(tmp_path / "a.tif", numbers)
    with open_image(path, ImageOptions(image_range="0,4095", frames_per_second=2.5)) as reader:
        np.testing.assert_allclose(reader.timestamps, np.arange(6) / 2.5)
        expected = np.interp(numbers[[5, 2]], [0, 4095], [0, 255])
        assert np.abs(frames_of(reader, [5, 2])[..., 1] - expected).max() <= 0.5
    assert caplog.messages == []
    for _ in range(2):  # without times, and without a rate
        with open_image(path, ImageOptions(image_range="0,4095")) as reader:
            assert reader.duration == pytest.approx(0.6)
    [message] = caplog.messages
    assert "so 10 frames per second are assumed; --source_frames_per_second sets" in message


def test_pages_that_are_no_frames(pictures, tmp_path, monkeypatch, caplog):
    small = Image.fromarray(pictures[0][::2, ::2])
    Image.fromarray(pictures[0]).save(tmp_path / "sizes.tif", save_all=True, append_images=[small])
    monkeypatch.setattr(video, "said", set())
    for source in (str(tmp_path / "sizes.tif"), (tmp_path / "sizes.tif").read_bytes()):
        with open_image(source) as reader:
            assert isinstance(reader, ImageReader)
            assert (frames_of(reader, [0]) == pictures[0]).all()
    message = f"{tmp_path}/sizes.tif: its 2 pages have several sizes; only the largest is read."
    assert caplog.messages == [f"{message} Not said again for further files."]
    # A thumbnail between pages: a smaller copy of another picture by its own word.
    pages = [Image.fromarray(picture) for picture in (pictures[0], pictures[0][::2, ::2], pictures[1])]
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}
    pages[0].save(tmp_path / "thumbnail.tif", save_all=True, append_images=pages[1:])
    with open_image(str(tmp_path / "thumbnail.tif"), ImageOptions(frames_per_second=1)) as reader:
        assert (frames_of(reader, [1, 0]) == pictures[[1, 0]]).all()
    # Shown by programs that know no animations, and by no other.
    write(tmp_path / "default.png", pictures, default_image=True)
    with open_image(str(tmp_path / "default.png")) as reader:
        assert (frames_of(reader, range(4)) == pictures[1:]).all()
    # The only frame is the second picture of the file.
    write(tmp_path / "default.png", pictures[:2], default_image=True)
    assert (read_image(tmp_path / "default.png").permute(1, 2, 0).numpy() == pictures[1]).all()
    pages[0].encoderinfo = {"tiffinfo": {254: 0}}
    pages[1].save(tmp_path / "first.tif", save_all=True, append_images=pages[:1], tiffinfo={254: 1})
    assert (read_image(tmp_path / "first.tif").permute(1, 2, 0).numpy() == pictures[0]).all()


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif", "a.jpg"])
def test_one_picture_is_an_image(name, pictures, tmp_path):
    Image.fromarray(pictures[0]).save(tmp_path / name)
    with open_image(str(tmp_path / name)) as reader:
        assert isinstance(reader, ImageReader)
        assert (reader.num_frames, reader.duration) == (1, 0)


def test_the_second_eye_of_a_jpeg_is_no_frame(pictures, tmp_path):
    """MPO: two JPEGs in one file, as phones and stereo cameras write them."""
    exif = Image.Exif()
    exif[0x0112] = 3  # so that Pillow reads it
    write(tmp_path / "a.jpg", pictures[:2], format="MPO", exif=exif)
    with open_image(str(tmp_path / "a.jpg")) as reader:
        assert isinstance(reader, ImageReader)


def test_frames_without_a_time_are_shown_as_browsers_do(pictures, tmp_path):
    write(tmp_path / "a.gif", pictures, duration=0)
    with open_image(str(tmp_path / "a.gif")) as reader:
        np.testing.assert_allclose(reader.timestamps, np.arange(5) / 10)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_a_cut_animation_is_an_unreadable_file(name, pictures, tmp_path):
    path = tmp_path / name
    write(path, np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    item = EncodedItem(str(path), name, is_video=False)
    with pytest.raises(ImageDecodingError, match=name.replace(".", r"\.")):
        MediaLoader().read_frames(item, lambda reader: [0, 4])


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.tif", "a.avif"])
def test_damaged_bytes_are_an_unreadable_file_and_no_other_error(name, pictures):
    file = io.BytesIO()
    first, *others = (Image.fromarray(picture[:6, :8]) for picture in pictures)
    first.save(file, Image.registered_extensions()[f".{name[2:]}"], save_all=True, append_images=others)
    whole = file.getvalue()
    generator = np.random.default_rng(0)
    damaged = [whole[:length] for length in range(1, len(whole), 11)]
    for _ in range(150):
        changed = np.frombuffer(whole, np.uint8).copy()
        changed[generator.integers(len(whole), size=2)] = generator.integers(256, size=2)
        damaged.append(changed.tobytes())
    num_unreadable = 0
    for data in damaged:
        try:
            with open_image(data) as reader:
                assert len(reader.get_frames([0, reader.num_frames - 1])) == 2
        except ImageDecodingError:
            num_unreadable += 1
    assert 0 < num_unreadable < len(damaged)


def test_an_animation_that_claims_too_many_pictures_is_refused(pictures):
    file = io.BytesIO()
    first, *others = map(Image.fromarray, pictures)
    first.save(file, "PNG", save_all=True, append_images=others)
    data = bytearray(file.getvalue())
    start = data.index(b"acTL")  # then two numbers of 4 bytes, the first that of pictures, and a sum over all of it
    data[start + 4 : start + 8] = (2_000_000_000).to_bytes(4, "big")
    data[start + 12 : start + 16] = zlib.crc32(data[start : start + 12]).to_bytes(4, "big")
    with pytest.raises(ImageDecodingError, match="it claims 2,000,000,000 pictures, and at most 1,000,000 are read"):
        open_image(bytes(data))


def test_only_the_wanted_pages_of_a_stack_are_decoded(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", np.zeros((20, 24, 32), np.uint8))
    decoded = []
    to_tensor = other_images.to_tensor
    monkeypatch.setattr(
        other_images, "to_tensor", lambda image, *rest: decoded.append(image.tell()) or to_tensor(image, *rest)
    )
    with open_image(path, ImageOptions(frames_per_second=1)) as reader:
        reader.get_frames([17, 4])
    assert decoded == [4, 17]


def test_nothing_is_logged_for_animations(pictures, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        open_image(write(tmp_path / "a.gif", pictures, **MILLISECONDS)).close()
    assert caplog.messages == []
