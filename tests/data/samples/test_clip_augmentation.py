"""Random views of clips, and mixtures of batches."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from vicmae_hf.data.samples.clip_augmentation import MEAN_COLOR, BatchMixing, RandAugmentOperation, RandomClip
from vicmae_hf.errors import InputError


def picture(height=48, width=64, seed=0) -> torch.Tensor:
    """A smooth uint8 picture (3, H, W) without symmetries."""
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")[0].clamp(0, 1) * 255).byte()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"horizontal_flip": False},
        {"rand_augment_magnitude": 9.0},
        {"random_erasing": 1.0},
        {"rand_augment_magnitude": 9.0, "random_erasing": 0.5, "crop_scale": (0.5, 1.0)},
    ],
)
def test_all_frames_of_a_clip_get_the_same_view(settings):
    view = RandomClip((32, 40), **settings)
    frames = picture().expand(5, -1, -1, -1)
    distinct = set()
    for seed in range(30):
        clip = view(frames, seed)
        assert clip.shape == (5, 3, 32, 40)
        assert clip.dtype == torch.uint8
        assert (clip == clip[:1]).all()
        distinct.add(clip[0].numpy().tobytes())
    assert len(distinct) == 30


def test_a_view_of_a_clip_is_that_of_each_frame_alone():
    view = RandomClip((32, 40), rand_augment_magnitude=9.0, random_erasing=0.5)
    frames = torch.stack([picture(seed=seed) for seed in range(3)])
    for seed in range(20):
        alone = torch.cat([view(frame[None], seed) for frame in frames])
        assert (view(frames, seed).int() - alone.int()).abs().max() <= 1


def test_a_seed_decides_the_view_and_the_global_state_stays():
    view = RandomClip((32, 32), rand_augment_magnitude=9.0, random_erasing=0.5)
    frames = picture().expand(2, -1, -1, -1)
    before = torch.random.get_rng_state()
    first = view(frames, 1)
    assert torch.equal(first, view(frames, 1))
    assert not torch.equal(first, view(frames, 2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_no_flip_keeps_left_and_right():
    ramp = torch.arange(64, dtype=torch.uint8).mul(4).expand(1, 3, 48, 64)
    rising = {
        flip: [
            bool(clip[..., -1].float().mean() > clip[..., 0].float().mean())
            for clip in (RandomClip((16, 16), horizontal_flip=flip)(ramp, seed) for seed in range(40))
        ]
        for flip in (True, False)
    }
    assert all(rising[False])
    assert 8 < sum(rising[True]) < 32


def test_the_crop_covers_the_share_that_is_asked_for():
    # Every pixel holds its own place, so that a crop's corners tell its area.
    height, width = 64, 64
    rows = torch.arange(height, dtype=torch.uint8).mul(3)[:, None].expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8).mul(3)[None].expand(height, width)
    frames = torch.stack([rows, columns, rows])[None]
    view = RandomClip((32, 32), crop_scale=(0.25, 0.36), horizontal_flip=False)
    shares = []
    for seed in range(100):
        clip = view(frames, seed).float()[0]
        # From the first to the last of 32 centres of pixels are 31 / 32 of the crop's side.
        sides = [
            (clip[0, -1].mean() - clip[0, 0].mean()) / 3 * 32 / 31,
            (clip[1, :, -1] - clip[1, :, 0]).mean() / 3 * 32 / 31,
        ]
        shares.append((sides[0] * sides[1] / (height * width)).item())
    assert 0.22 < min(shares) < 0.28
    assert 0.33 < max(shares) < 0.4


def test_erased_pixels_are_zero_after_normalisation():
    frames = torch.full((2, 3, 40, 40), 10, dtype=torch.uint8)
    clip = RandomClip((40, 40), random_erasing=1.0)(frames, seed=0)
    erased = (clip[0] != 10).any(0)
    assert 0.01 < erased.float().mean() < 0.4
    assert clip[0][:, erased].unique(dim=1).flatten().tolist() == MEAN_COLOR == [124, 116, 104]


def test_magnitudes_are_drawn_around_nine_of_ten():
    operation = RandAugmentOperation(9.0, std=0.5)
    magnitudes = []
    for _ in range(400):
        operation(picture(8, 8))
        magnitudes.append(operation.magnitude / 100)
    # Of a normal distribution around 9 with deviation 0.5, cut off at 10.
    expected = np.minimum(np.random.default_rng(0).normal(9, 0.5, 100_000), 10)
    assert np.mean(magnitudes) == pytest.approx(expected.mean(), abs=0.08)
    assert np.std(magnitudes) == pytest.approx(expected.std(), abs=0.06)
    assert max(magnitudes) == 10


def test_the_scale_ends_where_torchvisions_operations_end():
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16).expand(3, -1, -1)
    operation = RandAugmentOperation(10.0, std=0.0)
    strongest = v2.RandAugment(
        num_ops=1, magnitude=30, num_magnitude_bins=31, interpolation="bilinear", fill=MEAN_COLOR
    )
    for seed in range(30):
        torch.manual_seed(seed)
        torch.randn(())
        expected = strongest(ramp)
        torch.manual_seed(seed)
        assert torch.equal(operation(ramp), expected)


def numpy_targets(labels, num_classes, smoothing):
    return np.eye(num_classes)[labels] * (1 - smoothing) + smoothing / num_classes


def test_label_smoothing_alone():
    pixels, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 2, 1, 2])
    mixed, targets = BatchMixing(3, label_smoothing=0.1)(pixels, labels)
    assert mixed is pixels
    np.testing.assert_allclose(targets, numpy_targets(labels, 3, 0.1), rtol=1e-6)


@pytest.mark.parametrize("shape", [(3, 8, 8), (5, 3, 8, 8)], ids=["images", "clips"])
def test_mixup_mixes_samples_and_targets_in_one_proportion(shape):
    pixels, labels = torch.randn(4, *shape), torch.tensor([0, 2, 1, 2])
    smooth = numpy_targets(labels, 3, 0.1)
    mixing = BatchMixing(3, label_smoothing=0.1, mixup=0.8)
    proportions = []
    for _ in range(50):
        mixed, targets = mixing(pixels, labels)
        assert type(mixed) is torch.Tensor
        # Solved from one pixel of the first sample, whose partner is the last of the batch.
        first, last = pixels[0].flatten()[0], pixels[-1].flatten()[0]
        share = float((mixed[0].flatten()[0] - last) / (first - last))
        torch.testing.assert_close(mixed, share * pixels + (1 - share) * pixels.roll(1, 0), atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(targets, share * smooth + (1 - share) * np.roll(smooth, 1, 0), atol=1e-4)
        proportions.append(share)
    # Beta(0.8, 0.8): mean 1/2, variance 1 / (4 * (2 * 0.8 + 1)).
    assert np.mean(proportions) == pytest.approx(0.5, abs=0.13)
    assert np.var(proportions) == pytest.approx(1 / 10.4, abs=0.035)


@pytest.mark.parametrize("shape", [(3, 16, 16), (5, 3, 16, 16)], ids=["images", "clips"])
def test_cutmix_pastes_one_box_into_all_frames(shape):
    labels = torch.tensor([0, 1])
    pixels = torch.stack([torch.zeros(shape), torch.ones(shape)])
    mixing = BatchMixing(2, cutmix=1.0)
    shares = []
    for _ in range(30):
        mixed, targets = mixing(pixels, labels)
        pasted = mixed[0].mean().item()
        np.testing.assert_allclose(targets[0], [1 - pasted, pasted], atol=1e-6)
        frames = mixed[0].reshape(-1, 16, 16)
        assert (frames == frames[0]).all()
        rows, columns = frames[0].any(1).sum(), frames[0].any(0).sum()
        assert frames[0].sum() == rows * columns
        shares.append(pasted)
    assert max(shares) > 0.3


def test_mixup_and_cutmix_take_turns():
    pixels, labels = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)]), torch.tensor([0, 1])
    mixing = BatchMixing(2, mixup=0.8, cutmix=1.0)
    is_cut = [bool(((mixed == 0) | (mixed == 1)).all()) for mixed, _ in (mixing(pixels, labels) for _ in range(60))]
    assert 15 < sum(is_cut) < 45


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomClip((8, 8), crop_scale=(0.5,)), r"two ascending shares.*\[0.5\]"),
        (lambda: RandomClip((8, 8), crop_scale=(0.6, 0.5)), "two ascending shares"),
        (lambda: RandomClip((8, 8), rand_augment_magnitude=11), "between 0 and 10, got 11"),
        (lambda: RandomClip((8, 8), rand_augment_std=-1), "must not be negative, got -1"),
        (lambda: RandomClip((8, 8), random_erasing=2), "a probability, got 2"),
        (lambda: BatchMixing(3, label_smoothing=1.0), "less than 1, got 1.0"),
        (lambda: BatchMixing(3, mixup=-0.1), "mixup must not be negative, got -0.1"),
        (lambda: BatchMixing(3, cutmix=-0.1), "cutmix must not be negative, got -0.1"),
    ],
)
def test_settings_out_of_range(make, message):
    with pytest.raises(InputError, match=message):
        make()
