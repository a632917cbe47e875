"""The notebooks, as people run them: a kernel, and all cells in their order."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image
from video_files import numbered_frames, write_video


NOTEBOOKS = sorted((Path(__file__).parents[3] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_without_outputs(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code[0]["metadata"] == {"tags": ["parameters"]}
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def pictures_of(cells: list) -> list[Image.Image]:
    """Those that the cells show."""
    shown = [output["data"] for cell in cells for output in cell.get("outputs", []) if "data" in output]
    encoded = [values for data in shown for kind, values in data.items() if kind.startswith("image/")]
    return [Image.open(io.BytesIO(base64.b64decode(values))) for values in encoded]


@pytest.mark.slow
def test_the_notebook_of_recordings_runs_and_shows_its_pictures(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="the extra `test` is not installed")
    from nbclient import NotebookClient

    for place in ("train/ant", "train/bee", "eval/ant", "eval/bee"):
        folder = tmp_path / "videos" / place
        folder.mkdir(parents=True)
        for number in range(2):
            write_video(folder / f"{number}.mp4", numbered_frames(60, 48, 64, seed=number), fps=20)
    settings = {"max_train_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 0}
    parameters = [
        "NUM_CLUSTERS = 3",
        f"VIDEOS = {str(tmp_path / 'videos' / 'train')!r}",
        f"LABELLED = {str(tmp_path / 'videos')!r}",
        f"OUTPUT = {str(tmp_path / 'output')!r}",
        f"SETTINGS = {settings}",
    ]
    (path,) = [path for path in NOTEBOOKS if path.stem == "recordings"]
    notebook = nbformat.read(path, as_version=4)
    cells = notebook.cells
    place = next(place for place, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", []))
    cells.insert(place + 1, nbformat.v4.new_code_cell("\n".join(parameters)))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    reconstructions, film, clusters = pictures_of(cells)
    assert reconstructions.size[0] > 200
    assert (film.format, film.is_animated) == ("WEBP", True)
    # As many rows as clusters: it is shown in the size in which it is kept, but for the margin that is cut off.
    assert clusters.size[1] > 100
    assert Image.open(tmp_path / "output" / "clusters.png").size[0] == 1100
    printed = "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
    # Of each video of 3 s, each second.
    assert "12 seconds of 4 recordings, 128 numbers each" in printed
    assert "Linear probe on 4 held-out files of 2 classes" in printed
