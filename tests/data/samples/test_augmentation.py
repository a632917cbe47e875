import io
import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from vicmae_hf.data.media.images import read_image
from vicmae_hf.data.samples.augmentation import PixelNormalizer, RandomView, draw_box
from vicmae_hf.errors import InputError


HEIGHT, WIDTH = 200, 250


@pytest.fixture(scope="module")
def position_frame():
    """A frame whose red says the column and whose green says the row: a view tells where it was cut."""
    rows, columns = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    return torch.stack([columns, rows, torch.zeros_like(rows)]).to(torch.uint8)


def boxes(views):
    """(left, top, width, height) in pixels of the frame, and whether flipped, from the slopes of the colours."""
    found = []
    for view in views.float():
        middle_row, middle_column = view[0].median(dim=0).values, view[1].median(dim=1).values
        # The middle half of the view, away from the edges, where the interpolation has less to go by.
        count = len(middle_row)
        step_x = (middle_row[3 * count // 4] - middle_row[count // 4]) / (3 * count // 4 - count // 4)
        step_y = (middle_column[3 * count // 4] - middle_column[count // 4]) / (3 * count // 4 - count // 4)
        width, height = abs(step_x) * count, step_y * count
        found.append(
            [middle_row.mean() + 0.5 - width / 2, middle_column.mean() + 0.5 - height / 2, width, height, step_x < 0]
        )
    return torch.tensor(found).T


def test_where_views_are_cut(position_frame):
    view = RandomView(64)
    left, top, width, height, flipped = torch.cat(
        [boxes(view([position_frame] * 2, seed=seed)) for seed in range(300)], dim=1
    )
    share = width * height / (HEIGHT * WIDTH)
    assert 0.47 < share.min() < 0.52
    assert 0.9 < share.max() < 1.03
    # torchvision draws the share uniformly; boxes that don't fit are drawn again, so large ones are rarer.
    assert 0.65 < share.mean() < 0.75
    assert 0.72 < (width / height).min() < 0.8
    assert 1.25 < (width / height).max() < 1.38
    assert min(left.min(), top.min()) > -2
    assert (left + width).max() < WIDTH + 2
    assert (top + height).max() < HEIGHT + 2
    assert abs(flipped.mean() - 0.5) < 4.5 * 0.5 / 600**0.5


def test_both_views_of_a_call_are_cut_independently(position_frame):
    view = RandomView(64)
    first, second = torch.stack([boxes(view([position_frame] * 2, seed=seed)) for seed in range(300)]).unbind(dim=2)
    for name, ours, theirs in zip(["left", "top", "width", "height", "flip"], first.T, second.T, strict=True):
        assert abs(torch.corrcoef(torch.stack([ours, theirs]))[0, 1]) < 4.5 / 300**0.5, name


def test_crop_scale_and_flip_are_settings(position_frame):
    small = RandomView(64, crop_scale=(0.1, 0.2), horizontal_flip=False)
    _, _, width, height, flipped = torch.cat([boxes(small([position_frame], seed=seed)) for seed in range(60)], dim=1)
    share = width * height / (HEIGHT * WIDTH)
    assert share.min() > 0.09
    assert share.max() < 0.21
    assert not flipped.any()


def test_the_whole_frame_at_its_own_size_stays_as_it_is(position_frame):
    view = RandomView((HEIGHT, WIDTH), crop_scale=(1.0, 1.0), horizontal_flip=False)
    assert any(torch.equal(view([position_frame], seed=seed)[0], position_frame) for seed in range(3))


@pytest.mark.parametrize("image_size", [32, (48, 80)])
@pytest.mark.parametrize("frame_size", [(1, 1), (1, 90), (301, 17), (64, 48)])
def test_any_frame_gives_the_view_size(image_size, frame_size):
    frame = torch.full((3, *frame_size), 77, dtype=torch.uint8)
    # Decoded video frames have their channels last in memory.
    channels_last = frame.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    views = RandomView(image_size)([frame, channels_last], seed=1)
    assert views.shape == (2, 3, *([32, 32] if image_size == 32 else image_size))
    assert views.dtype == torch.uint8
    assert views.permute(0, 2, 3, 1).is_contiguous()
    assert (views == 77).all()


def natural_picture(height, width, seed):
    """RGB (H, W, 3), uint8, with the spectrum of photographs (amplitude falls with frequency), and hard edges."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    spectrum = np.fft.fft2(generator.normal(size=(3, height, width))) / np.maximum(frequency, 1 / width)
    picture = np.fft.ifft2(spectrum).real.transpose(1, 2, 0)
    picture = 127 + 60 * picture / picture.std()
    picture[height // 4 : height // 2, width // 3 : width // 2] += 90
    return np.clip(picture, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width"), [(256, 340), (480, 270), (160, 120)])
def test_the_way_from_jpeg_to_view_costs_no_quality(height, width):
    """Against Pillow's decoder and its antialiased bicubic resizing of the same box, in levels of 0..255."""
    view = RandomView(224, crop_scale=(0.3, 1.0))
    for seed in range(4):
        encoded = io.BytesIO()
        Image.fromarray(natural_picture(height, width, seed)).save(encoded, "JPEG", quality=90)
        [ours] = view([read_image(encoded.getvalue())], seed=seed)

        generator = random.Random(seed)
        top, left, box_height, box_width = draw_box(height, width, (0.3, 1.0), generator)
        cut = Image.open(encoded).crop((left, top, left + box_width, top + box_height))
        reference = np.asarray(cut.resize((224, 224), Image.Resampling.BICUBIC))
        if generator.random() < 0.5:
            reference = reference[:, ::-1]
        difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - reference)
        # Rows first or columns first: between the two, both round to integers.
        assert difference.mean() < 0.35
        assert difference.max() <= 8
        # What the bounds are worth.
        other = np.asarray(cut.resize((224, 224), Image.Resampling.BILINEAR))
        assert np.abs(other.astype(int) - np.asarray(cut.resize((224, 224), Image.Resampling.BICUBIC))).mean() > 1


@pytest.mark.parametrize(("height", "width"), [(200, 250), (256, 256), (100, 170), (90, 400), (3, 50)])
@pytest.mark.parametrize("scale", [(0.5, 1.0), (0.08, 0.3)])
def test_boxes_are_distributed_as_those_of_torchvision(height, width, scale):
    count = 3000
    generator = random.Random(0)
    ours = np.array([draw_box(height, width, scale, generator) for _ in range(count)])
    torch.manual_seed(0)
    crop, frame = v2.RandomResizedCrop(8, scale=scale), torch.empty(3, height, width, dtype=torch.uint8)
    theirs = np.array([list(crop.make_params([frame]).values()) for _ in range(count)])
    for name, own, other in zip(["top", "left", "height", "width"], ours.T, theirs.T, strict=True):
        values = np.arange(max(height, width) + 1)
        shares = [np.searchsorted(np.sort(drawn), values, side="right") / count for drawn in (own, other)]
        # Kolmogorov and Smirnov: equal distributions differ by more once in 100,000 times.
        assert np.abs(shares[0] - shares[1]).max() < 2.47 * (2 / count) ** 0.5, name


def test_the_seed_alone_decides(position_frame):
    view = RandomView(64)
    torch.manual_seed(1)
    first = view([position_frame] * 2, seed=2**63 - 1)
    torch.manual_seed(2)
    assert torch.equal(first, view([position_frame] * 2, seed=2**63 - 1))
    assert not torch.equal(first, view([position_frame] * 2, seed=0))


def test_global_random_states_are_left_alone(position_frame, monkeypatch):
    def fail(seed):
        raise AssertionError("seeds the devices, whose random numbers decide the masks")

    for device in [torch.cuda, torch.mps, torch.xpu]:
        monkeypatch.setattr(device, "manual_seed_all" if device is not torch.mps else "manual_seed", fail)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    RandomView(64)([position_frame] * 2, seed=5)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


def test_normalisation():
    pixels = torch.randint(0, 256, (2, 2, 3, 4, 5), dtype=torch.uint8)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    expected = (pixels.numpy() / 255.0 - np.reshape(mean, (3, 1, 1))) / np.reshape(std, (3, 1, 1))
    normalized = PixelNormalizer(mean, std)(pixels)
    assert normalized.dtype == torch.float32
    np.testing.assert_allclose(normalized.numpy(), expected, atol=2e-6)


@pytest.mark.parametrize("image_size", [0, -1, (32, 0), (32,), (1, 2, 3)])
def test_bad_image_size(image_size):
    with pytest.raises(InputError, match="image_size must be"):
        RandomView(image_size)


@pytest.mark.parametrize("crop_scale", [(0.0, 1.0), (0.8, 0.5), (0.5, 1.1)])
def test_bad_crop_scale(crop_scale):
    with pytest.raises(InputError, match="crop_scale must be"):
        RandomView(32, crop_scale)


def test_colours_change_only_where_asked_for():
    gray = torch.full((3, 40, 40), 200, dtype=torch.uint8)
    noise = torch.randint(60, 200, (3, 40, 40), dtype=torch.uint8)
    plain, coloured = RandomView(16), RandomView(16, color_augmentation=True)
    assert (plain([gray] * 2, seed=0) == 200).all()
    levels = torch.stack([coloured([gray] * 2, seed=seed)[:, 0, 8, 8] for seed in range(300)])
    # Brightness changes by a factor from 0.6 on in four of five views; only the other view may be solarized (one in
    # five, from a level of 128 on: v -> 255 - v).
    assert 0.7 < (levels[:, 0] != 200).float().mean() < 0.9
    assert levels[:, 0].min() >= 118
    assert 0.1 < (levels[:, 1] < 118).float().mean() < 0.3
    # The first view is blurred.
    contrasts = torch.stack([coloured([noise] * 2, seed=seed).float().std(dim=(1, 2, 3)) for seed in range(100)])
    assert contrasts[:, 0].median() < 0.7 * contrasts[:, 1].median()
