"""The page: an upload, a slider and a button on one side, what the checkpoint makes of the file on the other."""

import base64
import io
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, NoReturn

import gradio
import torch
from accelerate import Accelerator
from gradio import processing_utils
from PIL import Image

from ..command_line import one_line
from ..data.media.reading import MediaLoader
from ..errors import InputError, MediaDecodingError
from ..reports.encoder_pictures import FILM_FRAMES_PER_SECOND
from .answers import (
    MASK_STEP,
    Upload,
    can_reconstruct,
    classify,
    colour_features,
    list_mask_ratios,
    read_upload,
    reconstruct,
)
from .checkpoint import Checkpoint
from .neighbours import EncodedFolder, Neighbour, find_neighbours


MIB = 2**20
NUM_CLASSES = 5  # that are shown
SECONDS_KEPT = 3600  # that an upload stays on the disk
SMALL = 128  # pixels, below which they are shown as squares, as those of patches are
MAX_WAITING = 20  # visitors who wait for an answer
STYLE = Path(__file__).with_name("page.css")

RECONSTRUCTION = (
    "Some patches are hidden, and the decoder predicts them from the visible ones. For a video: its middle frame."
)
COLOURS = (
    "The first three principal components of the patch features as red, green and blue, one square per patch. They "
    "are computed for each encoder separately, so colours of one say nothing about the other. Look for an object that "
    "has one colour, and in a video keeps it while it moves."
)
NEIGHBOURS = (
    "The number is the cosine similarity of the pooled features. Random weights also find files of similar colours: "
    "look for the same objects in other colours or places."
)
NO_RECONSTRUCTION = (
    "This checkpoint has no decoder, so it cannot reconstruct. Checkpoints of <code>vicmae pretrain</code> have one."
)
ONE_PATCH = "This model sees an image as a single patch: if it is hidden, there is nothing to reconstruct it from."
NO_NEIGHBOURS = "No folder was given: start the page with <code>--folder DIR</code> to search it for neighbours."
CLASSES = "The most probable classes, as <code>vicmae evaluate</code> predicts them from a single view of the file."
NO_CLASSES = "This checkpoint is not a classifier, so it predicts no classes. <code>vicmae finetune</code> makes one."


@dataclass(frozen=True)
class Section:
    """
    A part of the page: what it says, and the function that makes HTML of an upload and the mask ratio; None where
    there is nothing to compute.
    """

    name: str
    title: str
    text: str
    compute: Callable[[Upload, float], str] | None = None


@dataclass(frozen=True)
class Page:
    """What the page shows of an uploaded file. `folder` is None if none is searched."""

    accelerator: Accelerator
    checkpoint: Checkpoint
    folder: EncodedFolder | None
    loader: MediaLoader
    max_video_seconds: float

    def sections(self) -> list[Section]:
        """Lists the parts of the page. The reconstruction comes first (see `build`), and last what cannot be."""
        checkpoint = self.checkpoint
        reconstruction = Section("reconstruction", "Reconstruction", NO_RECONSTRUCTION)
        neighbours = Section("neighbours", "Nearest neighbours", NO_NEIGHBOURS)
        classes = Section("classes", "Classes", NO_CLASSES)
        if checkpoint.reconstructor is not None:
            reconstruction = replace(reconstruction, text=ONE_PATCH)
        if can_reconstruct(checkpoint):
            reconstruction = replace(reconstruction, text=RECONSTRUCTION, compute=self.reconstruction)
        if self.folder is not None:
            neighbours = replace(neighbours, text=self.describe_folder(), compute=self.neighbours)
        if checkpoint.classifier is not None:
            classes = replace(classes, text=CLASSES, compute=self.classes)
        colours = Section("colours", "Features", COLOURS, self.colours)
        return sorted([reconstruction, classes, colours, neighbours], key=lambda section: section.compute is None)

    def describe_folder(self) -> str:
        folder = self.folder
        text = f"The nearest of {len(folder.indices)} files of {escape(folder.source.name)}. {NEIGHBOURS}"
        if folder.failures:
            first = escape(one_line(folder.failures[0]["error"]))
            text += f" {len(folder.failures)} of {len(folder.names)} files could not be read, the first: {first}."
        return text

    def answer(
        self, path: str | None, mask_ratio: float, computed: Sequence[Callable[[Upload, float], str]]
    ) -> list[str | None]:
        """
        Returns a line about the file, and after it what each of `computed` makes of the upload and the mask ratio, or
        why it makes nothing. If the file cannot be read, the line says why, and None stands for all others.
        """
        try:
            if path is None:
                raise InputError("Choose an image or a video first.")
            upload = read_upload(path, self.checkpoint, self.loader, self.max_video_seconds)
        except (InputError, MediaDecodingError) as error:
            return [describe_error(error), *[None] * len(computed)]
        answers = [f"<p class='text'><b>{escape(upload.file.name)}</b> {escape(upload.note)}</p>"]
        for compute in computed:
            try:
                answers.append(compute(upload, mask_ratio))
            except (InputError, MediaDecodingError) as error:
                answers.append(describe_error(error))
        return answers

    def reconstruction(self, upload: Upload, mask_ratio: float) -> str:
        columns, text = reconstruct(self.checkpoint, upload, mask_ratio)
        titles = {
            "first view": "image" if len(upload.frames) == 1 else "middle frame",
            "visible": f"visible: {1 - mask_ratio:.0%}",
        }
        figures = [figure(to_bytes(image), titles.get(title, title)) for title, image in columns.items()]
        return pictures(figures) + f"<p class='text'>{escape(text)}</p>"

    def colours(self, upload: Upload, mask_ratio: float) -> str:
        trained, untrained = colour_features(self.checkpoint, upload)
        frames = upload.frames.permute(0, 2, 3, 1)
        shown = {"image" if len(frames) == 1 else "video": frames}
        shown |= {"trained": (255 * trained).round().byte(), "random weights": (255 * untrained).round().byte()}
        return pictures([figure(images, title) for title, images in shown.items()])

    def neighbours(self, upload: Upload, mask_ratio: float) -> str:
        found = find_neighbours(self.accelerator, self.checkpoint, self.folder, upload, self.loader)
        rows = zip(("nearest, trained", "nearest, random weights"), found, strict=True)
        return "".join(f"<h4>{title}</h4>" + pictures(map(neighbour_figure, row)) for title, row in rows)

    def classes(self, upload: Upload, mask_ratio: float) -> str:
        probabilities = classify(self.accelerator, self.checkpoint, upload, self.loader)
        likeliest = sorted(probabilities.items(), key=lambda item: -item[1])[:NUM_CLASSES]
        rows = (
            f"<dt>{escape(name)}</dt><dd><div style='width: {probability:.1%}'></div>{probability:.1%}</dd>"
            for name, probability in likeliest
        )
        return f"<dl class='classes'>{''.join(rows)}</dl>"


def describe_error(error: Exception) -> str:
    return f"<p class='error' role='alert'>{escape(one_line(error))}</p>"


def to_bytes(image: torch.Tensor) -> torch.Tensor:
    """An image `(3, H, W)` in [0, 1], up to overshoot -> `(1, H, W, 3)`, uint8."""
    return (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0)[None]


def neighbour_figure(neighbour: Neighbour) -> str:
    caption = f"{neighbour.similarity:.3f} {neighbour.name}"
    if neighbour.frame is None:
        return f"<figure><figcaption>{escape(caption)} (can no longer be read)</figcaption></figure>"
    return figure(neighbour.frame.permute(1, 2, 0)[None], caption)


def figure(frames: torch.Tensor, caption: str) -> str:
    """Makes a picture, or a film, of frames `(T, h, w, 3)`, uint8, under a caption. It is part of the page itself."""
    first, *others = [Image.fromarray(frame.numpy()) for frame in frames]
    is_small = first.width < SMALL
    # A large film without any loss would be megabytes.
    options = {"lossless": is_small or not others, "quality": 85, "duration": round(1000 / FILM_FRAMES_PER_SECOND)}
    file = io.BytesIO()
    first.save(file, "WEBP", save_all=True, append_images=others, loop=0, **options)
    data = base64.b64encode(file.getvalue()).decode()
    caption = escape(caption)
    return (
        f"<figure><figcaption>{caption}</figcaption><img alt='{caption}' class='{'small' if is_small else 'large'}' "
        f"src='data:image/webp;base64,{data}'></figure>"
    )


def pictures(figures: Iterable[str]) -> str:
    figures = list(figures)
    return f"<div class='pictures of-{len(figures)}'>{''.join(figures)}</div>"


def describe(checkpoint: Checkpoint) -> str:
    config = checkpoint.encoder.config
    height, width = config.image_height_and_width
    count = sum(parameter.numel() for parameter in checkpoint.encoder.parameters())
    return (
        f"{escape(checkpoint.name)}: an encoder with {count:,} parameters, which sees {width} x {height} pixels in "
        f"patches of {config.patch_size} x {config.patch_size}."
    )


def build(page: Page) -> gradio.Blocks:
    """Lays the page out."""
    title = f"ViC-MAE: {page.checkpoint.name}"
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(SECONDS_KEPT, SECONDS_KEPT)) as blocks:
        gradio.HTML(f"<h1>ViC-MAE</h1><p class='text'>{describe(page.checkpoint)}</p>")
        with gradio.Row():
            with gradio.Column(scale=1, min_width=280):
                upload = gradio.File(label="Image or video", height=140, elem_id="upload")
                ratio = mask_slider(page.checkpoint)
                button = gradio.Button("Show", variant="primary", elem_id="show")
                message = gradio.HTML(elem_id="message")
            with gradio.Column(scale=3, min_width=320):
                computed, outputs = [], []
                for section in page.sections():
                    gradio.HTML(f"<h2>{section.title}</h2><p class='text'>{section.text}</p>")
                    if section.compute is not None:
                        computed.append(section.compute)
                        outputs.append(gradio.HTML(elem_id=section.name))

        def show(path: str | None, mask_ratio: float) -> list[Any]:
            return page.answer(path, mask_ratio, computed)

        def reconstruct_again(path: str | None, mask_ratio: float) -> list[Any]:
            return [gradio.skip()] * 2 if path is None else page.answer(path, mask_ratio, computed[:1])

        # One after the other, so that memory holds one upload, whoever else is on the page.
        options = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
        button.click(show, [upload, ratio], [message, *outputs], **options)
        ratio.release(reconstruct_again, [upload, ratio], [message, *outputs[:1]], **options)
    return blocks.queue(max_size=MAX_WAITING)


def mask_slider(checkpoint: Checkpoint) -> gradio.Slider:
    """
    Makes the slider, which begins at the model's own mask ratio, or at the end nearest to it; where nothing can be
    reconstructed, one that is not shown.
    """
    config = checkpoint.encoder.config
    ratios = list_mask_ratios(config) or [MASK_STEP, 1 - MASK_STEP]
    return gradio.Slider(
        ratios[0],
        ratios[-1],
        value=min(max(config.mask_ratio, ratios[0]), ratios[-1]),
        step=MASK_STEP,
        label="Share of hidden patches",
        visible=can_reconstruct(checkpoint),
        elem_id="ratio",
    )


def serve(page: Page, host: str, port: int, max_upload_mib: float) -> None:
    """Opens the page until Ctrl-C."""
    # Gradio fetches a file that a request gives by its address.
    processing_utils.async_ssrf_protected_download = refuse_address
    blocks = build(page)
    # What is not given here Gradio takes from environment variables.
    _, address, _ = blocks.launch(
        server_name=f"[{host}]" if ":" in host else host,  # IPv6, as in addresses of pages
        server_port=port,
        share=False,
        max_file_size=round(max_upload_mib * MIB),
        theme=gradio.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        css_paths=[STYLE],
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        pwa=False,
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"The page is open at {address} until Ctrl-C.", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("The page is closed.")
    finally:
        blocks.close(verbose=False)


async def refuse_address(address: str, cache_dir: str) -> NoReturn:
    raise gradio.Error("This page reads uploaded files only, no addresses.")
