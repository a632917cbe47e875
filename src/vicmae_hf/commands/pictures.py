"""
Shows what an encoder has learned, beside the same for random weights: nearest neighbours of eight frames, attention of
the class token, and a film of the features of a video. Pretraining ends with the same pictures.

Examples:

    vicmae pictures my_videos --model_name_or_path outputs/mine -o pictures
    vicmae pictures recording.mp4 --model_name_or_path outputs/mine -o pictures

docs/evaluation.md says how to read them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from ..data.media.bad_files import BadFiles, BadFilesArguments
from ..data.media.reading import MediaLoader, ReadingArguments
from ..data.samples.frame_sampling import FrameSampling
from ..data.samples.pairs import FramePairDataset
from ..data.sources.labelled import CheckpointSourceSettings
from ..data.sources.sources import open_source
from ..evaluation.features import load_encoder
from ..evaluation.results import check_output_dir
from ..files import write_json, writing
from ..reports.encoder_pictures import PICTURES, WholeView, write_encoder_pictures
from ..settings import REQUIRED, setting
from ..training.reporting import RESULTS_FILE, say_unreadable
from ..training.session.calling import start
from ..training.session.output_folder import refuse_data_folder


@dataclass(kw_only=True)
class PicturesArguments(ReadingArguments, BadFilesArguments, CheckpointSourceSettings):
    model_name_or_path: str = setting(REQUIRED, "any ViC-MAE checkpoint; its encoder is used")
    data: str = setting(REQUIRED, "folder, list, Parquet file, dataset or frame store to take the frames from")
    output_dir: str = setting(REQUIRED, f"folder for {', '.join(PICTURES)}")


def run(arguments: PicturesArguments) -> dict[str, Any]:
    folder = Path(arguments.output_dir)
    check_output_dir(folder)
    refuse_data_folder(folder, [arguments.data])  # else a training would take the pictures for data
    model, processor = load_encoder(arguments.model_name_or_path, "frame")
    if arguments.image_range is None:
        arguments.image_range = processor.image_range
    source = open_source(arguments.data, arguments)
    dataset = FramePairDataset(
        [source],
        WholeView(model.config.image_height_and_width),
        FrameSampling(),
        BadFiles(folder / "bad_files.jsonl", len(source), arguments.max_bad_files),
        MediaLoader(arguments.video_backend, arguments.seconds_per_file),
        num_patches=1,  # for the names of samples
    )
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS_FILE).unlink(missing_ok=True)  # of an older run, whose pictures are removed
    # Before the pictures: if the run is killed, they are known as such, and are no data of later runs.
    write_json(folder / "arguments.json", asdict(arguments))
    write_encoder_pictures(model.to(Accelerator().device), dataset, processor, folder)
    dataset.bad_files.finish()
    pictures = [str(folder / name) for name in PICTURES if (folder / name).exists()]
    results = {"pictures": pictures, "num_failed": len(dataset.bad_files)}
    write_json(folder / RESULTS_FILE, results)
    print(f"{', '.join(pictures)}; {say_unreadable(len(dataset.bad_files), folder / 'bad_files.jsonl')}.")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    start(PicturesArguments, run, argv)
