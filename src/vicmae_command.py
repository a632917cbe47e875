"""
The command `vicmae`. It lies beside the package and not in it, because importing the package takes seconds (PyTorch,
Transformers), and whoever asks for help should not wait for that.

Help pages are texts in `vicmae_hf/commands/help/`, written from the settings by `python -m vicmae_hf.commands.help`.
"""

import contextlib
import difflib
import importlib
import importlib.util
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TextIO


# Name -> its module, and what it does.
COMMANDS = {
    "pretrain": ("vicmae_hf.commands.pretrain", "pretrain ViC-MAE on videos and images"),
    "finetune": ("vicmae_hf.commands.finetune", "train a classifier, whole or linear, from a pretrained model"),
    "evaluate": ("vicmae_hf.commands.evaluate", "evaluate a classifier of videos or images"),
    "probe": ("vicmae_hf.commands.probe", "train a linear probe of an encoder, beside one with random weights"),
    "features": ("vicmae_hf.commands.features", "write the features of videos and images to a file"),
    "pictures": ("vicmae_hf.commands.pictures", "show what an encoder has learned, beside random weights"),
    "demo": ("vicmae_hf.demo.command", "open a page that shows what a checkpoint makes of your files"),
    "export": ("vicmae_hf.commands.export", "export a model to ONNX or torch.export, for serving"),
    "pack": ("vicmae_hf.commands.pack", "decode videos once and store their frames, to train faster"),
    "prepare": ("vicmae_hf.commands.prepare", "check a dataset against its official list"),
    "plan": ("vicmae_hf.commands.plan", "estimate what a pretraining run takes: updates, time, memory, checkpoints"),
    "convert": ("vicmae_hf.convert_checkpoint.conversion", "convert checkpoints of ViC-MAE's authors, MAE and ViTMAE"),
}
# They run in one process for each GPU.
IN_SEVERAL_PROCESSES = ("pretrain", "finetune", "evaluate", "probe", "features")
# Set by accelerate launch and torchrun in the processes that they start.
LAUNCHED = ("RANK", "WORLD_SIZE", "ACCELERATE_MIXED_PRECISION")


def main() -> None:
    """Runs `vicmae COMMAND ...`."""
    name, argv = (sys.argv[1:] or ["--help"])[0], sys.argv[2:]
    if name in ("-h", "--help", "help"):
        show(overview())
    elif name == "--version":
        show(version("vicmae-hf"))
    elif name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        fail(f"error: there is no `vicmae {name}`." + (f" Did you mean `vicmae {near[0]}`?" if near else ""))
    else:
        num_processes = None
        if name in IN_SEVERAL_PROCESSES and not is_help(argv):
            num_processes = take_num_processes(argv)
            if num_processes is None and not any(variable in os.environ for variable in LAUNCHED):
                num_processes = count_gpus()
        if num_processes is not None and num_processes > 1:
            launch([name, *argv], num_processes)
        run(name, argv)


def run(name: str, argv: Sequence[str] | None = None) -> None:
    """Runs a command in this process, or shows its help. The scripts in examples/pytorch/ call it."""
    if is_help(sys.argv[1:] if argv is None else argv):
        show((help_folder() / f"{name}.txt").read_text(encoding="utf-8").removesuffix("\n"))
        sys.exit(0)
    with unread_at_will():
        try:
            with interruptible():
                command = importlib.import_module(COMMANDS[name][0])
        except (ImportError, RuntimeError) as error:
            # Transformers hides the cause behind "Could not import module", below some forty lines.
            if "torchvision::nms" not in f"{error} {error.__cause__}":
                raise
            fail(
                "error: torch and torchvision are different builds (operator torchvision::nms does not exist). "
                "Install both from one index: docs/installation.md."
            )
        command.main(argv)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Lets Ctrl-C end the program with one word while modules are loaded, which takes seconds: nothing has begun."""
    try:
        yield
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def show(text: str) -> None:
    with unread_at_will():
        print(text)


@contextlib.contextmanager
def unread_at_will() -> Iterator[None]:
    """Lets whoever reads what is printed stop before its end, as `vicmae --help | head` does: the work goes on."""
    with contextlib.redirect_stdout(Printed(sys.stdout)), contextlib.redirect_stderr(Printed(sys.stderr)):
        try:
            yield
        finally:
            sys.stdout.flush()  # what is not written yet


class Printed:
    """A stream of text, of which nothing more is written when nobody reads it any more."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.call(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        self.call(self.stream.flush)

    def call(self, function: Callable[..., object], *arguments: str) -> None:
        try:
            function(*arguments)
        except BrokenPipeError:
            # Python would try to write the rest at its end, and complain once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def is_help(argv: Sequence[str]) -> bool:
    return "-h" in argv or "--help" in argv


def help_folder() -> Path:
    # Found, but not imported.
    package = importlib.util.find_spec("vicmae_hf").submodule_search_locations[0]
    return Path(package, "commands", "help")


def overview() -> str:
    lines = [f"  {name:<10}{what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vicmae COMMAND [settings.yaml] [DATA ...] [-o OUTPUT] [--flag value ...]\n",
            "Pretrains a vision backbone on your own videos and images, and uses it.\n",
            "commands:",
            *lines,
            "\nexamples:",
            "  vicmae pretrain my_videos -o outputs/mine",
            "  vicmae features my_videos --model_name_or_path outputs/mine -o features.parquet\n",
            "`vicmae COMMAND --help` lists its settings.",
        ]
    )


def fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


def count_gpus() -> int:
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes", "on"):
        return 1
    with interruptible():
        import torch  # imported here, because help needs none of it

    return torch.cuda.device_count()


def take_num_processes(argv: list[str]) -> int | None:
    """Takes `--num_processes N` out of the arguments; None if it is not there."""
    for place, word in enumerate(argv):
        name, separator, value = word.partition("=")
        if name == "--num_processes":
            words = argv[place : place + (1 if separator else 2)]
            value = value if separator else "".join(words[1:])
            if not value.isdecimal() or int(value) < 1:
                fail(f"error: --num_processes must be at least 1, got {value!r}.")
            del argv[place : place + len(words)]
            return int(value)
    return None


def launch(argv: list[str], num_processes: int) -> NoReturn:
    """
    Runs `vicmae` with these arguments in several processes on this machine, by Accelerate's launcher, and ends as they
    end. Signals go on to them, so that they write a checkpoint before they end. Their error is the last thing on the
    screen: the launcher would add its traceback.
    """
    import logging  # imported here, because help needs none of it

    import torch
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ["VICMAE_LAUNCHER"] = str(os.getpid())  # see `end_script` of the package
    if not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    flags = ["--multi_gpu", "--num_processes", str(num_processes), "--num_machines", "1", "--main_process_port", "0"]
    flags += ["--mixed_precision", "no", "--dynamo_backend", "no"]  # else it says that it took these
    arguments = launch_command_parser().parse_args([*flags, __file__, *argv])
    for name in ("torch.distributed.elastic", "torch.distributed.run"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    statuses, messages = [], []

    def work() -> None:
        try:
            launch_command(arguments)
            statuses.append(0)
        except ChildFailedError as error:
            statuses.append(error.get_first_failure()[1].exitcode)
            left = [failure.message for failure in error.failures.values() if failure.error_file != "<N/A>"]
            messages.extend(left)

    # In a thread, because the launcher would put its own handlers of signals in place of these.
    launcher = threading.Thread(target=work, daemon=True)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):  # Windows has no SIGUSR1
            signal.signal(getattr(signal, name), hand_on)
    launcher.start()
    launcher.join()
    for message in messages[:1]:
        print(message, file=sys.stderr)
    status = statuses[0] if statuses else 1
    sys.exit(status if status >= 0 else 128 - status)


def hand_on(number: int, frame: FrameType | None) -> None:
    """Hands a signal on to the processes that this one started."""
    import psutil

    workers = psutil.Process().children()
    if not workers:  # there is nothing to keep yet
        os._exit(128 + number)
    for worker in workers:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            worker.send_signal(number)


if __name__ == "__main__":
    main()
