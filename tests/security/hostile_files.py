"""Files that would run code if they were trusted: what they run makes a marker, a folder."""

import os
import pickle

import torch


class WantsToRunCode:
    """An object whose pickle makes the folder `marker` when it is loaded."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def write_pickle(path, marker):
    path.write_bytes(pickle.dumps(WantsToRunCode(marker), protocol=2))


def write_torch_file(path, marker):
    torch.save({"weight": torch.zeros(2), "extra": WantsToRunCode(marker)}, path)


def hostile_code(marker):
    """Python code that makes the marker when it is imported, with a class that could be a config or a processor."""
    return f"import os\nos.mkdir({str(marker)!r})\n\n\nclass Hostile:\n    model_type = 'hostile'\n"


def assert_was_not_run(marker, would_run):
    """The marker is not there; and it is there once `would_run` trusts the file, so that this proves something."""
    assert not marker.exists(), "the file was run"
    would_run()
    assert marker.exists(), "the file is harmless, so this proves nothing"
    marker.rmdir()


def load_pickle(path):
    return pickle.loads(path.read_bytes())


def load_torch_file(path):
    return torch.load(path, weights_only=False)


def assert_one_line(process, *words):
    """The script ended with one line that says `words`, and no traceback."""
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert process.returncode == 1, process.stderr
    assert len(errors) == 1, process.stderr
    assert process.stderr.endswith(f"{errors[0]}\n"), process.stderr
    assert "Traceback" not in process.stderr
    for word in words:
        assert str(word) in errors[0]
