"""Settings of scripts: dataclasses whose fields know their help, choices and limits."""

import math
import operator
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin

from .errors import InputError


Part = TypeVar("Part")

REQUIRED = MISSING
# NumPy takes no larger seed.
MAX_SEED = 2**32 - 1
CORES = os.cpu_count() or 1


class ArgumentsError(InputError):
    """A setting is wrong; the message names it, its value and what was expected."""


# The limits that a setting may have: in words, and as a comparison of the value with the limit.
BOUNDS = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
    "per_core": (f"at most, for each of {CORES} cores,", lambda number, limit: number <= limit * CORES),
}


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
    per_core: float | None = None,
    may_be_empty: bool = False,
) -> Any:
    """
    Makes a field of a dataclass of `Settings`.

    Args:
        default: its value, or `REQUIRED`.
        help: its line in `--help`.
        minimum, above, maximum, below: limits of its value, or of every entry of a list. None, an unset value, passes.
        per_core: the largest number of processes or threads for each core of the machine.
        may_be_empty: whether a list may be given without entries.
    """
    limits = {"minimum": minimum, "above": above, "maximum": maximum, "below": below, "per_core": per_core}
    metadata = {
        "help": help,
        "limits": {name: limit for name, limit in limits.items() if limit is not None},
        "may_be_empty": may_be_empty,
    }
    if isinstance(default, list):  # each instance gets a list of its own
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Settings:
    """
    Base of dataclasses whose fields are a `setting` each. Raises an ArgumentsError if a value is none of the choices,
    out of its limits, or a number that is not finite.
    """

    def __post_init__(self):
        for entry in fields(self):
            value = getattr(self, entry.name)
            if value is None:
                continue
            if "" in (value if isinstance(value, list) else [value]) and not entry.metadata["may_be_empty"]:
                # An unset variable of a shell; as a path it would mean the folder one happens to be in.
                raise ArgumentsError(f"--{entry.name} must not be empty.")
            value = expand_home(value)
            setattr(self, entry.name, value)
            value_type = without_none(entry.type)
            if get_origin(value_type) is Literal and value not in get_args(value_type):
                choices = ", ".join(get_args(value_type))
                raise ArgumentsError(f"--{entry.name} must be one of {choices}, got {value!r}.")
            if entry.metadata["limits"] or value_type in (float, list[float]):
                for number in value if isinstance(value, (list, tuple)) else [value]:
                    check_limits(entry.name, number, entry.metadata["limits"])


def expand_home(value: Any) -> Any:
    """Puts the home folder for ~ in texts and lists of texts. The shell does it on a command line, not in a file."""
    if isinstance(value, list):
        return [expand_home(entry) for entry in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def part_of(settings: Settings, part: type[Part]) -> Part:
    """Builds `part`, a smaller class, from the fields that `settings` shares with it."""
    return part(**{entry.name: getattr(settings, entry.name) for entry in fields(part)})


def check_limits(name: str, number: float, limits: dict[str, float]) -> None:
    """Raises an ArgumentsError if a number is not finite or out of its limits, `{"minimum": 1}` for example."""
    is_finite = abs(number) < math.inf  # `math.isfinite` takes no whole number beyond the floats
    if is_finite and all(BOUNDS[bound][1](number, limit) for bound, limit in limits.items()):
        return
    if limits.keys() == {"minimum", "maximum"}:
        expected = f"between {limits['minimum']} and {limits['maximum']}"
    else:
        expected = " and ".join(f"{BOUNDS[bound][0]} {limit}" for bound, limit in limits.items())
    words = [expected] if is_finite else ["finite", *filter(None, [expected])]
    raise ArgumentsError(f"--{name} must be {' and '.join(words)}, got {number}.")


def without_none(annotation: Any) -> Any:
    """Returns `int` for `int | None`; other types stay as they are."""
    options = [option for option in get_args(annotation) if option is not type(None)]
    return options[0] if type(None) in get_args(annotation) else annotation
