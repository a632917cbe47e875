import json
import multiprocessing
import time
from collections import Counter
from fractions import Fraction

import av
import demo_data as demo
import numpy as np
import pytest
from demo_scenes import APPEARANCES, CLIP_SECONDS, MOTIONS, Scene
from PIL import Image


SMALL = {"appearance_videos": (0, 0), "motion_videos": (1, 1), "images": (3, 1), "num_workers": 1}


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "nested" / "demo"
    assert demo.write_demo_data(output, seed=3, **SMALL)
    return output


def read_video(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
        return frames, stream.codec_context.name, stream.average_rate


def all_files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def mean_error(first, second):
    return np.abs(first.astype(float) - second.astype(float)).mean()


def measure(scene, seconds):
    """The object's centre x in pixels (averaged on the circle, as the world wraps around), its orientation (of the
    longest axis, from x towards y, modulo pi) and its area, from the pixels that change with the object's colour."""
    scene.palettes = [np.zeros((2, 3)), np.zeros((2, 3))]
    black = scene.draw(seconds).astype(float)
    scene.palettes = [np.ones((2, 3)), np.ones((2, 3))]
    mask = (scene.draw(seconds) - black).sum(axis=-1)
    mask /= mask.max()
    y, x = np.mgrid[: scene.height, : scene.width]
    turns = np.angle((mask * np.exp(2j * np.pi * x / scene.width)).sum()) / (2 * np.pi)
    centre_x = turns % 1 * scene.width
    x = (x - centre_x + scene.width / 2) % scene.width - scene.width / 2
    y = y - (mask * y).sum() / mask.sum()
    orientation = 0.5 * np.arctan2(2 * (mask * x * y).sum(), (mask * (x**2 - y**2)).sum())
    return centre_x, orientation, mask.sum()


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_objects_move_as_named(motion, seed):
    scene = Scene(np.random.default_rng(seed), "netted_bar", motion, width=128, height=128)
    centres, orientations, areas = np.array([measure(scene, index / 15) for index in range(33)]).T
    # Medians over the steps, because a size that has reached its end jumps back to the other one.
    steps = {
        "position": np.median((np.diff(centres) + 64) % 128 - 64) * 15,  # pixels/s to the right
        "angle": np.median((np.diff(orientations) + np.pi / 2) % np.pi - np.pi / 2) * 15,  # radians/s clockwise
        "size": np.median(np.diff(np.log(areas))) * 15,  # growth rate per second
    }
    expected = {
        "moving_left": ("position", -1),
        "moving_right": ("position", 1),
        "turning_anticlockwise": ("angle", -1),
        "turning_clockwise": ("angle", 1),
        "shrinking": ("size", -1),
        "growing": ("size", 1),
    }
    lowest = {"position": 30, "angle": 0.8, "size": 0.4}
    running, direction = expected[motion]
    assert direction * steps.pop(running) > lowest[running]
    for name, step in steps.items():
        assert abs(step) < lowest[name] / 2


def test_one_frame_does_not_tell_the_motion():
    scenes = [Scene(np.random.default_rng(5), "plain_moon", motion, 96, 96) for motion in MOTIONS]
    first_frames = [scene.draw(0.0) for scene in scenes]
    later_frames = [scene.draw(1.0) for scene in scenes]
    for i in range(1, len(scenes)):
        np.testing.assert_array_equal(first_frames[i], first_frames[0])
        assert mean_error(later_frames[i], later_frames[0]) > 1


def test_the_object_persists_while_the_backdrop_changes():
    scene = Scene(np.random.default_rng(0), "checked_disc", "turning_clockwise", 128, 96)
    assert mean_error(scene.backdrop(0.2), scene.backdrop(1.3)) > 0.03
    first, second = measure(scene, 0.2), measure(scene, 1.3)
    assert abs(first[0] - second[0]) < 8
    assert 0.7 < first[2] / second[2] < 1.4


def test_files_are_balanced_and_show_what_their_folder_says(small_demo):
    paths = [path.relative_to(small_demo).as_posix() for path in all_files(small_demo)]
    counts = Counter(tuple(path.split("/")[:3]) for path in paths if path != "demo.json")
    expected = {}
    for name in MOTIONS:
        expected |= {("motion", "train", name): 1, ("motion", "eval", name): 1}
    for name in APPEARANCES:
        expected |= {("images", "train", name): 3, ("images", "eval", name): 1}
    assert counts == expected

    files = {file.path: file for file in demo.list_files(3, (0, 0), (1, 1), (3, 1))}
    assert sorted([*files, "demo.json"]) == paths
    for path, file in files.items():
        label = file.motion if path.startswith("motion") else file.appearance
        assert path.split("/")[2] == label
        scene, rate = file.scene()
        if path.endswith(".mp4"):
            frames, codec, average_rate = read_video(small_demo / path)
            assert (codec, average_rate, len(frames)) == ("h264", rate, round(CLIP_SECONDS * rate))
            for index in (0, len(frames) // 2, len(frames) - 1):
                assert mean_error(frames[index], scene.draw(index / rate)) < 8
        else:
            assert mean_error(np.asarray(Image.open(small_demo / path)), scene.draw(0.0)) < 8


def test_appearance_videos_show_the_appearance_of_their_folder(tmp_path):
    demo.write_demo_data(tmp_path / "demo", appearance_videos=(0, 1), motion_videos=(0, 0), images=(0, 0))
    paths = all_files(tmp_path / "demo" / "appearance")
    assert [path.parent.name for path in paths] == sorted(APPEARANCES)
    files = sorted(demo.list_files(0, (0, 1), (0, 0), (0, 0)), key=lambda file: file.path)
    for path, file in zip(paths, files, strict=True):
        assert file.appearance == path.parent.name
        scene, rate = file.scene()
        assert mean_error(read_video(path)[0][-1], scene.draw((round(CLIP_SECONDS * rate) - 1) / rate)) < 8


def test_labels_that_do_not_name_the_folder_are_balanced_too():
    files = demo.list_files(0, (48, 0), (48, 0), (0, 0))
    pairs = Counter((file.path.split("/")[0], file.appearance, file.motion) for file in files)
    assert {count for (kind, _, _), count in pairs.items() if kind == "appearance"} == {8}
    assert {count for (kind, _, _), count in pairs.items() if kind == "motion"} == {6}
    assert len(pairs) == 2 * 6 * 8


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".webm"])
def test_every_container_keeps_frames_in_order(tmp_path, suffix):
    scene = Scene(np.random.default_rng(1), "striped_triangle", "moving_right", 96, 64)
    demo.write_video(tmp_path / f"clip{suffix}", scene, frames_per_second=12)
    frames, codec, rate = read_video(tmp_path / f"clip{suffix}")
    assert codec == ("vp9" if suffix == ".webm" else "h264")
    assert rate == Fraction(12) and frames.shape == (26, 64, 96, 3)
    for index in (0, 7, 8, 9, 25):
        errors = [mean_error(frame, scene.draw(index / 12)) for frame in frames]
        assert np.argmin(errors) == index


def test_same_seed_same_bytes_and_other_seed_other_bytes(small_demo, tmp_path):
    demo.write_demo_data(tmp_path / "same", seed=3, **SMALL | {"num_workers": 2})
    demo.write_demo_data(tmp_path / "other", seed=4, **SMALL | {"motion_videos": (0, 0)})
    for path in all_files(small_demo):
        name = path.relative_to(small_demo)
        assert (tmp_path / "same" / name).read_bytes() == path.read_bytes()
        if name.parts[0] == "images":
            assert (tmp_path / "other" / name).read_bytes() != path.read_bytes()


def test_train_and_eval_are_independent_draws(small_demo):
    for name in MOTIONS:
        train, evaluation = (small_demo / "motion" / split / name / "000.mp4" for split in ("train", "eval"))
        assert train.read_bytes() != evaluation.read_bytes()


def test_second_call_writes_nothing(small_demo):
    before = {path: path.stat().st_mtime_ns for path in all_files(small_demo)}
    assert demo.write_demo_data(small_demo, seed=3, **SMALL) is False
    assert {path: path.stat().st_mtime_ns for path in all_files(small_demo)} == before


def test_other_settings_are_refused(small_demo):
    with pytest.raises(ValueError, match=r"'seed': 4.*'seed': 3.*Delete it, or choose another"):
        demo.write_demo_data(small_demo, seed=4, **SMALL)
    assert json.loads((small_demo / "demo.json").read_text())["seed"] == 3


def test_foreign_folder_is_refused_and_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "holiday.txt").write_text("mine")
    monkeypatch.setattr("sys.argv", ["demo", "--output", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_:
        demo.main()
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path) in message and "no demo.json" in message
    assert [path.name for path in all_files(tmp_path)] == ["holiday.txt"]


def test_interruption_leaves_nothing_under_the_final_name(tmp_path):
    output = tmp_path / "demo"
    arguments = {"seed": 0, "appearance_videos": (40, 0), "num_workers": 1}
    process = multiprocessing.Process(target=demo.write_demo_data, args=(output,), kwargs=arguments)
    process.start()
    while process.is_alive() and not list(tmp_path.rglob("*.mp4")):
        time.sleep(0.01)
    process.kill()
    process.join()
    assert list(tmp_path.rglob("*.mp4")) and not output.exists()
    # What the killed process left elsewhere doesn't disturb the next one.
    small = {"appearance_videos": (0, 0), "motion_videos": (0, 0), "images": (1, 0), "num_workers": 1}
    assert demo.write_demo_data(output, **small)
    assert len(all_files(output)) == 1 + len(APPEARANCES)


def test_failure_cleans_up(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "CLIP_SECONDS", "no number")
    with pytest.raises(TypeError):
        demo.write_demo_data(tmp_path / "demo", **SMALL)
    assert list(tmp_path.iterdir()) == []
