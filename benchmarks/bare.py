"""Lets the training loop be imported where nothing of the data is installed: on a bare machine with a GPU."""

import importlib.machinery
import importlib.util
import sys
import types


READERS = ("av", "datasets", "simplejpeg")  # of videos, tables and JPEG: benchmarks on synthetic batches read none


class Placeholder(types.ModuleType):
    """A module whose every name is an empty class."""

    __path__ = ()

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class Finder:
    """Finds placeholders for the readers that are not installed, and for their modules."""

    def __init__(self, missing: list[str]):
        self.missing = missing

    def find_spec(self, name: str, path=None, target=None) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.missing:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return Placeholder(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_for_readers() -> list[str]:
    """Puts placeholders where readers are not installed. Returns the names of those."""
    missing = [name for name in READERS if importlib.util.find_spec(name) is None]
    sys.meta_path.append(Finder(missing))
    return missing
