"""Nearest files of the demo page: which, how near, and what is said of files that cannot be read."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from demo_checkpoints import save
from PIL import Image
from video_files import numbered_frames, write_video

from vicmae_hf import ViCMAEForPreTraining, ViCMAEImageProcessor
from vicmae_hf.data.media.bad_files import BadFilesError
from vicmae_hf.data.media.reading import MediaLoader
from vicmae_hf.demo.answers import read_upload
from vicmae_hf.demo.checkpoint import open_checkpoint
from vicmae_hf.demo.neighbours import encode_folder, find_neighbours
from vicmae_hf.errors import InputError


NAMES = ["a/0.png", "a/1.png", "b/2.png", "b/3.png", "b/4.png"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save(folder, ViCMAEForPreTraining)
    return open_checkpoint(str(folder), None, torch.device("cpu"))


@pytest.fixture
def folder(tmp_path):
    """Five images, a video of four frames, of which each is seen twice, and a file that is damaged."""
    root = tmp_path / "folder"
    for seed, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(numbered_frames(1, 16, 16, seed=seed)[0]).save(root / name)
    write_video(root / "video.mp4", numbered_frames(4, 32, 32, seed=9))
    (root / "damaged.png").write_bytes(b"no image")
    return root


def encode(checkpoint, folder, max_bad_files=0.5):
    return encode_folder(
        Accelerator(cpu=True), checkpoint, str(folder), MediaLoader(), max_bad_files=max_bad_files, num_workers=0
    )


def embed_by_hand(encoder, frames):
    """Frames `(T, 3, H, W)`, uint8 -> the mean over their embeddings, of unit length `(D,)`."""
    processor = ViCMAEImageProcessor(size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16})
    pixels = processor(list(frames), return_tensors="pt").pixel_values
    with torch.no_grad():
        embedding = encoder(pixels).pooler_output.mean(0)
    return (embedding / embedding.norm()).numpy()


def test_neighbours_are_the_nearest_by_each_encoder(checkpoint, folder, tmp_path):
    write_video(tmp_path / "asked.mp4", numbered_frames(2, 32, 32, seed=4))
    upload = read_upload(str(tmp_path / "asked.mp4"), checkpoint, MediaLoader(), 60.0)
    encoded = encode(checkpoint, folder)
    found = find_neighbours(Accelerator(cpu=True), checkpoint, encoded, upload, MediaLoader())
    files = {}
    for item in [upload.file[0], *(encoded.source[index] for index in encoded.indices.tolist())]:
        with item.open("pyav") as reader:
            files[item.name] = reader.get_frames(range(reader.num_frames))
    for neighbours, encoder in zip(found, checkpoint.encoders, strict=True):
        query, *known = (embed_by_hand(encoder, frames) for frames in files.values())
        similarities = np.array(known) @ query
        order = np.argsort(-similarities)[:4]
        names = [str(name).removeprefix(f"{folder}/") for name in list(files)[1:]]
        assert [neighbour.name for neighbour in neighbours] == [names[place] for place in order]
        assert [neighbour.similarity for neighbour in neighbours] == pytest.approx(similarities[order], abs=1e-4)
        for neighbour in neighbours:
            if neighbour.name in NAMES:
                expected = numbered_frames(1, 16, 16, seed=NAMES.index(neighbour.name))[0]
                assert np.array_equal(neighbour.frame.permute(1, 2, 0).numpy(), expected)
    assert [failure["path"] for failure in encoded.failures] == [str(folder / "damaged.png")]


def test_a_file_that_is_gone_has_no_picture(checkpoint, folder, tmp_path):
    encoded = encode(checkpoint, folder)
    (folder / "a" / "0.png").rename(tmp_path / "asked.png")
    upload = read_upload(str(tmp_path / "asked.png"), checkpoint, MediaLoader(), 60.0)
    nearest, *others = find_neighbours(Accelerator(cpu=True), checkpoint, encoded, upload, MediaLoader())[0]
    assert (nearest.name, nearest.similarity, nearest.frame) == ("a/0.png", pytest.approx(1.0), None)
    assert all(other.frame.shape == (3, 16, 16) for other in others)


def test_folders_that_cannot_be_used(checkpoint, folder, tmp_path):
    with pytest.raises(InputError, match=r"--folder .*nowhere: there is no such folder"):
        encode(checkpoint, tmp_path / "nowhere")
    (folder / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(BadFilesError, match=r"2 of 7 files could not be read, and --max_bad_files 0.05 allows 1"):
        encode(checkpoint, folder, max_bad_files=0.05)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no videos"):
        encode(checkpoint, tmp_path / "empty")
