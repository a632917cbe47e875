"""The clips of benchmarks/loading.py: 16 frames at 7.5 a second, 224 x 224, the same ones for all.

They are read from our frame store and from the videos themselves, and by decord and torchcodec as most loaders call
them: open, fetch the frames, in one thread. All then make the same random view of them.
"""

from collections.abc import Callable
from pathlib import Path

import decord
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from vicmae_hf.data.media.other_decoders import check_backend
from vicmae_hf.data.media.reading import EncodedItem, MediaLoader
from vicmae_hf.data.media.video import open_video
from vicmae_hf.data.preparing.packing import PackingInput, PackingSettings, pack_frames
from vicmae_hf.data.samples.clip_augmentation import RandomClip
from vicmae_hf.data.samples.frame_choice import ClipSampling
from vicmae_hf.data.sources.sources import open_source
from vicmae_hf.errors import InputError


STORE, VIDEO, DECORD, TORCHCODEC = "clips of the frame store", "clips of videos", "naive decord", "torchcodec"
OURS = (STORE, VIDEO)
CLIPS_PER_VIDEO = 4
SAMPLING = ClipSampling(num_frames=16, frames_per_second=7.5)
VIEW = RandomClip((224, 224), (0.5, 1.0))


class Clips:
    """Clips drawn from the rows of a new store of the videos: which, and which frames of the row and of the video."""

    def __init__(self, videos: Path, store: Path, short_side: int, quality: int, seed: int):
        rate = SAMPLING.frames_per_second
        pack_frames(
            PackingInput.open(str(videos)),
            store,
            PackingSettings(frames_per_second=rate, short_side=short_side, quality=quality),
        )
        self.store, self.rows, self.paths, self.frames = open_source(store), [], [], []
        generator = np.random.default_rng(seed)
        for row, name in enumerate(self.store.list_names()):
            with self.store[row].open("pyav") as reader, open_video(str(videos / name)) as video:
                for _ in range(CLIPS_PER_VIDEO):
                    stored = SAMPLING.sample(reader.timestamps, reader.duration, generator)
                    times = reader.timestamps[stored]
                    original = np.abs(video.timestamps[:, None] - times).argmin(axis=0)
                    self.rows.append(row)
                    self.paths.append(str(videos / name))
                    self.frames.append((stored.tolist(), original.tolist()))

    def read_stored(self, index: int) -> torch.Tensor:
        return MediaLoader().read_frames(self.store[self.rows[index]], lambda reader: self.frames[index][0])

    def read_video(self, index: int) -> torch.Tensor:
        path = self.paths[index]
        return MediaLoader().read_frames(EncodedItem(path, path, True), lambda reader: self.frames[index][1])

    def read_by_decord(self, index: int) -> torch.Tensor:
        frames = decord.VideoReader(self.paths[index], num_threads=1).get_batch(self.frames[index][1]).asnumpy()
        return torch.from_numpy(frames).permute(0, 3, 1, 2)

    def read_by_torchcodec(self, index: int) -> torch.Tensor:
        from torchcodec.decoders import VideoDecoder  # not everywhere

        decoder = VideoDecoder(self.paths[index], num_ffmpeg_threads=1, seek_mode="approximate")
        return decoder.get_frames_at(self.frames[index][1]).data


class ReadClips(Dataset):
    """What one way of reading makes of all clips."""

    def __init__(self, read: Callable[[int], torch.Tensor], length: int):
        self.read = read
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return VIEW(self.read(index), seed=index)


def clip_readers(clips: Clips) -> dict[str, ReadClips]:
    """The contestants that run here; says which do not."""
    ways = {STORE: clips.read_stored, VIDEO: clips.read_video, DECORD: clips.read_by_decord}
    try:
        check_backend("torchcodec")
    except InputError as error:
        print(f"torchcodec is left out: {error}")
    else:
        ways[TORCHCODEC] = clips.read_by_torchcodec
    return {name: ReadClips(read, len(clips.rows)) for name, read in ways.items()}


def fetch_clips(dataset: ReadClips, num_workers: int) -> Callable[[], int]:
    """A function that reads all clips once and returns their number."""
    # One at a time: as few as they are, larger batches would leave a worker without work at the end.
    loader = DataLoader(dataset, num_workers=num_workers, persistent_workers=num_workers > 0)
    next(iter(loader))  # starts the workers
    return lambda: sum(len(clip) for clip in loader)
