"""Runs scripts: what they say, and how they end."""

import ctypes
import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from ...command_line import command_to_resume, launching_command, one_line
from ...data.loading.loader import end_workers
from ...errors import InputError, NonFiniteError
from ..resuming import CheckpointError
from ..stopping import STOPPED_EXIT_STATUS, RunStopped
from .output_folder import release_output_dir


PR_SET_PDEATHSIG = 1  # of prctl(2) on Linux: the signal that a process gets when its parent ends
LAUNCHER_SECONDS = 5.0  # until a launcher has noticed that a process ended, and ends the others

# Errors of the system about a place, not about the program: full, read-only, somebody else's, or no place at all.
MENDABLE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EROFS, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ENOTDIR),
}

# Modules that say the same in every process of a machine: what data is there, and how many threads. What others say is
# of their own process, such as a file that it cannot read.
SAID_IN_ALL = (
    *("vicmae_hf.data.sources", "vicmae_hf.data.media.frame_folders"),
    *("vicmae_hf.training.devices", "vicmae_hf.classification.setup"),
)


def run_script(main: Callable[[], None]) -> None:
    """
    Runs a script. An error that the user can mend ends it with one line on stderr and exit status 1; any other error
    ends it with its traceback. A training that was asked to stop ends with `STOPPED_EXIT_STATUS`.
    """
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.addFilter(said_once)
    logging.getLogger("vicmae_hf").setLevel(logging.INFO)  # what this package says, and not all that others do
    for name in ("datasets", "huggingface_hub"):  # they have handlers of their own, and would say everything twice
        logging.getLogger(name).propagate = False
    # Transformers would show a bar for every file that it writes or reads.
    disable_progress_bar()
    # Of the default number of loading processes, where that is more than the cores: it is no fault of the user's.
    warnings.filterwarnings("ignore", "This DataLoader will create")
    # PyTorch calls it so since 2.13; Accelerate knows no other name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    # Transformers calls it `activation_checkpointing_...` since 5.23, and knows both names until 6.
    warnings.filterwarnings("ignore", "`gradient_checkpointing_(en|dis)able` is deprecated")
    try:
        main()
    except (CheckpointError, NonFiniteError) as error:
        # All processes find these, or the main one alone.
        end_script(f"error: {error}" if is_main_process() else "", 1)
    except InputError as error:
        end_script(f"error: {without_traceback(error)}", 1)
    except (OSError, SafetensorError) as error:
        if find_errno(error) not in MENDABLE:
            raise
        end_script(f"error: a file cannot be opened or written: {without_traceback(error)}", 1)
    except RunStopped as stopped:
        # All processes stop together.
        end_script(f"{stopped}. Resume with: {command_to_resume()}" if is_main_process() else "", STOPPED_EXIT_STATUS)
    except RuntimeError:
        if "VICMAE_LAUNCHER" in os.environ and not is_main_process():
            # Perhaps only that another process ended, which says why. The launcher ends this one meanwhile.
            time.sleep(LAUNCHER_SECONDS)
        raise
    except KeyboardInterrupt:  # outside of the training: there is nothing to keep
        end_script("Interrupted.", 128 + signal.SIGINT)


def said_once(record: logging.LogRecord) -> bool:
    """Lets through what is said in a run, once on each machine."""
    # Accelerate's loggers speak in the first process alone, and put its rank before what they say.
    record.msg = str(record.msg).removeprefix("[RANK 0] ")
    return os.environ.get("LOCAL_RANK", "0") == "0" or not record.name.startswith(SAID_IN_ALL)


def without_traceback(error: Exception) -> str:
    """Returns the message of an error. Of one in a loader's worker, PyTorch puts the worker's traceback before it."""
    message = str(error).strip()
    return message.splitlines()[-1].partition(": ")[2] if message.startswith("Caught ") else message


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def end_script(message: str, status: int) -> None:
    """
    Ends a script with a message of one line on stderr. An error is also left for the launcher of several processes,
    because others may fail after this one, and say more than this one did. `vicmae` says it when all have ended.
    """
    if message and status == 1 and "TORCHELASTIC_ERROR_FILE" in os.environ:
        left = {"message": one_line(message), "timestamp": int(time.time())}
        Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps(left), encoding="utf-8")
    if message and (status != 1 or "VICMAE_LAUNCHER" not in os.environ):
        print(one_line(message), file=sys.stderr, flush=True)
    release_output_dir()
    # Workers: one whose decoder hangs would keep the script alive. torch would report their deaths as errors.
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end_workers()
    if dist.is_initialized():
        # Other processes may wait for this one. sys.exit would wait for them; so it ends at once, and the launcher
        # sees it gone and stops the others.
        os._exit(status)
    sys.exit(status)


def find_errno(error: Exception) -> int | None:
    """Finds the system's number of an error, which some libraries have in their text only: "(os error 28)"."""
    found = re.search(r"\b(?:errno|os error) (\d+)", str(error), re.IGNORECASE)
    return int(found[1]) if found else None


def stop_with_launcher() -> None:
    """
    Lets this process be asked to stop when its launcher ends. `accelerate launch` hands no SIGTERM on: the training
    would go on alone, in a folder that nobody watches.
    """
    if sys.platform == "linux" and launching_command(sys.argv[0]):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
