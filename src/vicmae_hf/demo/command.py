"""
Opens a page that shows what a checkpoint makes of your own images and videos, beside random weights: reconstructions,
features of patches, nearest neighbours in a folder, and classes.

Examples:

    vicmae demo outputs/mine --folder my_videos
    vicmae demo outputs/classifier --port 8000

docs/demo_page.md shows the page.
"""

import ipaddress
import logging
import os
import signal
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from accelerate import Accelerator

from ..data.media.bad_files import BadFilesArguments
from ..data.media.reading import MediaLoader, ReadingArguments
from ..errors import InputError
from ..settings import REQUIRED, Settings, setting
from ..training.session.calling import start
from .checkpoint import open_checkpoint
from .neighbours import encode_folder


logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class PageArguments(Settings):
    checkpoint: str = setting(REQUIRED, "any ViC-MAE checkpoint: a folder, a file, or a name on the Hub")
    label_names: str | None = setting(
        None, "file of class names in the order of the classifier's outputs, one per line; default: the checkpoint's"
    )
    folder: str | None = setting(None, "folder of videos and images to search for nearest neighbours")
    host: str = setting(
        "127.0.0.1", "address to listen on; 0.0.0.0 opens the page to everyone who can reach this machine"
    )
    port: int = setting(7860, "port to listen on", minimum=1, maximum=65535)
    max_upload_mib: float = setting(200.0, "largest file that can be uploaded, in MiB", above=0)
    max_video_seconds: float = setting(60.0, "read at most this much of a video, from its beginning", above=0)
    dataloader_num_workers: int = setting(4, "processes that read the files of --folder", minimum=0, per_core=32)


@dataclass(kw_only=True)
class DemoArguments(ReadingArguments, BadFilesArguments, PageArguments):
    """Settings of the page. (Bases count from the last: its own settings come first in the help.)"""


def run(arguments: DemoArguments) -> dict[str, Any]:
    if find_spec("gradio") is None:
        raise InputError('vicmae demo needs Gradio: pip install "vicmae-hf[demo]".')
    check_address(arguments.host, arguments.port)
    accelerator = Accelerator()
    checkpoint = open_checkpoint(arguments.checkpoint, arguments.label_names, accelerator.device)
    loader = MediaLoader(arguments.video_backend, arguments.seconds_per_file)
    folder = None
    if arguments.folder is not None:
        folder = encode_folder(
            accelerator,
            checkpoint,
            arguments.folder,
            loader,
            max_bad_files=arguments.max_bad_files,
            num_workers=arguments.dataloader_num_workers,
        )
    if not is_loopback(arguments.host):
        logger.warning("--host %s: everyone who can reach this address can use the page.", arguments.host)
    # Closing by `kill` goes the way of Ctrl-C, so that no uploads stay behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="vicmae-demo-") as uploads:
        # Gradio reads the first two when it is imported. It opens its own page once, which a proxy could not.
        os.environ |= {"GRADIO_TEMP_DIR": uploads, "GRADIO_ANALYTICS_ENABLED": "False"}
        os.environ |= {"NO_PROXY": "*", "no_proxy": "*"}
        from .page import Page, serve

        page = Page(accelerator, checkpoint, folder, loader, arguments.max_video_seconds)
        serve(page, arguments.host, arguments.port, arguments.max_upload_mib)
    return {}


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def check_address(host: str, port: int) -> None:
    """Raises an InputError if the page could not listen there, before a checkpoint is opened and a folder encoded."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just closed is free
            trial.bind((host, port))
    except OSError as error:
        raise InputError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); choose another port or address."
        ) from error


def main(argv: Sequence[str] | None = None) -> None:
    start(DemoArguments, run, argv)
