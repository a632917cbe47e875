import pytest
from PIL import Image
from video_files import numbered_frames, write_video


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """Videos of known frames, and images."""
    root = tmp_path_factory.mktemp("media") / "input"
    (root / "deep" / "er").mkdir(parents=True)
    write_video(root / "thirty.mp4", numbered_frames(90, 48, 64, seed=1))
    write_video(root / "deep" / "ntsc.mkv", numbered_frames(61, 64, 48, seed=2), fps=30000 / 1001)
    times = [0, 0.1, 0.15, 0.7, 0.75, 0.8, 1.5]
    write_video(root / "deep" / "er" / "variable.mkv", numbered_frames(7, 48, 64, seed=3), timestamps=times)
    write_video(root / "slow.mp4", numbered_frames(5, 48, 64, seed=4), fps=2)
    write_video(root / "turned.mov", numbered_frames(20, 48, 64, seed=5), rotation=90)
    write_video(root / "one_frame.mp4", numbered_frames(1, 48, 64, seed=6))
    Image.fromarray(numbered_frames(6, 40, 64)[5]).save(root / "five.png")
    Image.fromarray(numbered_frames(10, 40, 64)[9]).save(root / "deep" / "nine.webp", lossless=True)
    return root


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Bytes of eight different clips in each container; the first frame of clip N carries the number 10 N."""
    folder = tmp_path_factory.mktemp("clips")
    encoded = {}
    for suffix, codec in [("mp4", "libx264"), ("webm", "libvpx-vp9")]:
        for number in range(8):
            path = folder / f"{number}.{suffix}"
            write_video(path, numbered_frames(10 * number + 3, seed=number)[10 * number :], codec=codec)
            encoded[number, suffix] = path.read_bytes()
    return encoded
