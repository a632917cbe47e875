"""Reads settings from the command line and from a YAML or JSON file, and says how to start a script again."""

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import psutil
import yaml
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedConfig

from .settings import ArgumentsError, without_none


Arguments = TypeVar("Arguments")

# Tokens of the Hub, and the name and password in an address.
SECRETS = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{30,}|(?<=://)[^/\s@]+(?=@)")
SECRET_VARIABLES = ("_TOKEN", "_API_KEY")
MIN_SECRET_LENGTH = 16  # shorter values are switches, such as HF_HUB_DISABLE_IMPLICIT_TOKEN=1

# Fields of data and of output: `vicmae COMMAND DATA -o OUTPUT`.
DATA_FIELDS = ("train_data", "data", "input", "root", "checkpoint")
OUTPUT_FIELDS = ("output_dir", "output")

# Titles in `--help`, in their order. Fields are declared by topic: a title begins with one of these fields, and goes
# on to the next of them.
GROUPS = {
    "model_name_or_path": "model",
    "image_size": "model",
    "new_classifier": "model",
    "method": "training",
    "label_fraction": "training",
    "layer_decay": "training",
    "eval_epochs": "training",
    "per_device_train_batch_size": "training",
    "num_train_epochs": "training",
    "contrastive_start_epoch": "training",
    "label_smoothing": "training",
    "preset": "training",
    "plan": "run",
    "freeze_layers": "model",
    "seed": "run",
    "logging_steps": "run",
    "output_dir": "run",
    "output": "run",
    "data_root": "data",
    "label_names": "data",
    "labelled": "data",
    "train_data_weights": "data",
    "eval_split": "data",
    "split": "data",
    "frames_per_second": "frames",
    "num_frames": "frames",
    "frame_sampling": "frames",
    "pooling": "frames",
    "num_clips": "frames",
    "temporal_ablation": "frames",
    "crop_scale": "frames",
    "train_augmentation": "frames",
    "rand_augment_magnitude": "frames",
    "folder": "page",
    "num_seeds": "probe",
    "probe_data": "probe during training",
    "video_backend": "reading files",
    "max_bad_files": "reading files",
    "seconds_per_file": "reading files",
    "per_device_eval_batch_size": "processes",
    "num_proc": "processes",
    "num_processes": "processes",
    "dataloader_num_workers": "processes",
    "report_to": "trackers and Hub",
}


def hide_secrets(text: str) -> str:
    """Puts *** for access tokens and passwords: those that look like one, and those in environment variables."""
    text = SECRETS.sub("***", text)
    for name, value in os.environ.items():
        if name.upper().endswith(SECRET_VARIABLES) and len(value) >= MIN_SECRET_LENGTH:
            text = text.replace(value, "***")
    return text


def one_line(error: object) -> str:
    """Says an error, or any text, in one line and without secrets."""
    return re.sub(r"\s*\n\s*", " ", hide_secrets(str(error)).strip())


def hint_at_nearest(name: str, known: Iterable[str]) -> str:
    """Asks for the known name that a misspelt one is nearest to; empty if none is near."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {near[0]}?" if near else ""


class UsageError(ArgumentsError):
    """The command line is wrong: a flag is unknown or missing, or its value of the wrong kind."""


class Parser(argparse.ArgumentParser):
    """Raises its errors, without secrets."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(hide_secrets(message))


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """The same width everywhere, because the pages of `vicmae COMMAND --help` are written once (commands/help)."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        """Writes a boolean as one flag, and that the data need none."""
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.dest}"
        return "DATA, " * (action.metavar == "DATA") + super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        """Adds the default, where the help does not say what it is."""
        if action.default is argparse.SUPPRESS or "default:" in action.help:
            return action.help
        default = action.default
        if isinstance(default, bool):
            default = "yes" if default else "no"
        elif isinstance(default, list):
            default = " ".join(map(str, default))
        elif isinstance(default, float):
            default = f"{default:.4g}"
        return f"{action.help} [{'none' if default in (None, '') else default}]"


def parse_arguments(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """
    Reads `arguments_class` from the command line. A first argument that ends in .yaml, .yml or .json is a file of the
    same settings; flags after it win.

    Raises:
        ArgumentsError: if the file cannot be read or has an unknown setting, or a value is out of range or holds an
            access token. (A wrong flag ends the program with a usage message and status 2.)
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(arguments_class)
    if is_vicmae(sys.argv[0]) and len(sys.argv) > 1:
        parser.prog = f"vicmae {sys.argv[1]}"
    try:
        in_file = []
        if argv and argv[0].endswith((".yaml", ".yml", ".json")):
            in_file = _settings_as_flags(_read_settings(argv[0]), arguments_class, argv.pop(0))
        return _read_flags(parser, arguments_class, in_file, argv)
    except UsageError as error:
        parser.print_usage(sys.stderr)
        parser.exit(2, f"error: {one_line(error)}\n")


def parse_keywords(arguments_class: type[Arguments], settings: dict[str, Any]) -> Arguments:
    """
    Reads `arguments_class` from keyword arguments, which pass through the same checks as flags. None leaves the
    default.

    Raises:
        ArgumentsError: as `parse_arguments`, also for a name that is unknown or missing.
    """
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    flags = _settings_as_flags(settings, arguments_class, "Keyword arguments")
    return _read_flags(build_parser(arguments_class), arguments_class, flags, [])


def _read_flags(
    parser: argparse.ArgumentParser, arguments_class: type[Arguments], in_file: list[str], argv: list[str]
) -> Arguments:
    """Reads the flags of a file and those of the command line, which win."""
    values, unknown = parser.parse_known_intermixed_args([*in_file, *argv])
    values = vars(values)
    if unknown:
        name = unknown[0].partition("=")[0]
        raise UsageError(f"unknown flag {name}.{hint_at_nearest(name, parser._option_string_actions)}")
    if data := values.pop("DATA", None):
        name = _first_field(arguments_class, DATA_FIELDS)
        takes_list = get_origin(_types(arguments_class)[name]) is list
        if any(word.partition("=")[0] == f"--{name}" for word in argv):
            raise UsageError(f"the data is given twice, as {' '.join(data)} and by --{name}.")
        if len(data) > 1 and not takes_list:
            raise UsageError(f"expected one --{name}, got {' '.join(data)}.")
        values[name] = data if takes_list else data[0]
    missing = [entry.name for entry in fields(arguments_class) if entry.name not in values]
    if missing:
        raise UsageError(f"missing: {', '.join(f'--{name}' for name in missing)}.")
    for name, value in values.items():
        # Settings are written down, given to trackers and published with a model.
        if hide_secrets(str(value)) != str(value):
            raise ArgumentsError(
                f"--{name} holds an access token or a password. Leave it out; log in with `hf auth login` or the "
                "variable HF_TOKEN."
            )
    return arguments_class(**values)


def build_parser(arguments_class: type, description: str | None = None) -> argparse.ArgumentParser:
    """
    Builds a parser with one flag for each field, in groups, required ones first; booleans are `--name` and
    `--no-name`. The data may also be given without a flag, and -o is where the output goes.
    """
    data, output = _first_field(arguments_class, DATA_FIELDS), _first_field(arguments_class, OUTPUT_FIELDS)
    # The usage is written by hand, because the generated one lists every flag. allow_abbrev=False: a misspelt flag
    # must be an error, not the beginning of another one.
    optional = {entry.name for entry in fields(arguments_class) if _has_default(entry)}
    words = " DATA" * (data is not None)
    if output:
        # `vicmae plan` also has an --output, which is another file.
        words += f" [-o {output.upper()}]" if output in optional else " -o OUTPUT"
    parser = Parser(
        usage=f"%(prog)s [settings.yaml|settings.json]{words} [--flag value ...]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    if data:
        parser.add_argument("DATA", nargs="*", help=argparse.SUPPRESS)
    groups: dict[str, list[Field]] = {title: [] for title in ("required", *GROUPS.values(), "more")}
    title = "more"
    for entry in fields(arguments_class):
        title = GROUPS.get(entry.name, title)
        groups[title if _has_default(entry) else "required"].append(entry)
    for title, entries in groups.items():
        group = parser.add_argument_group(title)
        for entry in entries:
            options = _options(entry) | ({"metavar": "DATA"} if entry.name == data else {})
            names = ["-o"] if entry.name == output else []
            group.add_argument(*names, f"--{entry.name}", dest=entry.name, **options)
    return parser


def _options(entry: Field) -> dict[str, Any]:
    """Options of `add_argument` for a field."""
    default = entry.default if entry.default_factory is MISSING else entry.default_factory()
    options = {"help": entry.metadata["help"].replace("%", "%%")}  # argparse would fill % in
    options["default"] = default if _has_default(entry) else argparse.SUPPRESS
    value_type = without_none(entry.type)
    if value_type is bool:
        return options | {"action": argparse.BooleanOptionalAction}
    if get_origin(value_type) is Literal:
        return options | {"choices": get_args(value_type)}
    if get_origin(value_type) is list:
        options["nargs"] = "*" if default == [] or entry.metadata["may_be_empty"] else "+"
        (value_type,) = get_args(value_type)
    return options | {"type": value_type, "metavar": {int: "N", float: "X"}.get(value_type, "TEXT")}


def _first_field(arguments_class: type, names: Sequence[str]) -> str | None:
    return next((entry.name for entry in fields(arguments_class) if entry.name in names), None)


def _types(arguments_class: type) -> dict[str, Any]:
    """The type of each field, without None."""
    return {entry.name: without_none(entry.type) for entry in fields(arguments_class)}


def _has_default(entry: Field) -> bool:
    return entry.default is not MISSING or entry.default_factory is not MISSING


def _read_settings(path: str) -> dict[str, Any]:
    """Reads a file of settings."""
    try:
        # Some editors begin a file with a byte order mark.
        text = Path(path).read_text(encoding="utf-8-sig")
        settings = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise ArgumentsError(f"{path}: cannot be read as settings ({error}).") from error
    if not isinstance(settings, dict):
        raise ArgumentsError(f"{path}: expected settings as `name: value`, got {type(settings).__name__}.")
    return settings


def _settings_as_flags(settings: dict[str, Any], arguments_class: type, path: str) -> list[str]:
    """Turns settings into flags, so that they pass through the same checks. `path` is where they are from."""
    known = _types(arguments_class)
    flags = []
    for name, value in settings.items():
        if name not in known:
            raise ArgumentsError(f"{path}: unknown setting {name!r}.{hint_at_nearest(str(name), known)}")
        if value is None:  # `name:` without a value leaves the default
            continue
        if value is False and "no" in get_args(known[name]):
            value = "no"  # which is false in YAML
        if known[name] is bool:
            if not isinstance(value, bool):
                raise ArgumentsError(f"{path}: {name} must be true or false, got {value!r}.")
            flags.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict):
            # Only --config_overrides takes a mapping.
            flags.append(f"--{name}=" + ",".join(f"{key}={entry}" for key, entry in value.items()))
        elif isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={value}")  # one word, so that a value may begin with a hyphen
    return flags


def parse_config_overrides(config_class: type[PreTrainedConfig], overrides: str | None) -> dict[str, Any]:
    """
    Reads "name=value,name=value" as config fields; values are read as YAML.

    Raises:
        ArgumentsError: if a name is no field of the config or a pair is malformed.
    """
    known = [entry.name for entry in fields(config_class)]
    changes = {}
    # Commas inside brackets, as in image_size=[64,96], belong to a value.
    for pair in filter(None, re.split(r",(?![^\[(]*[\])])", overrides or "")):
        name, separator, value = (part.strip() for part in pair.partition("="))
        if not separator:
            raise ArgumentsError(f"--config_overrides: expected name=value, got {pair!r}.")
        if name not in known:
            raise ArgumentsError(
                f"--config_overrides: the config has no field {name!r}.{hint_at_nearest(name, known)}"
            )
        try:
            changes[name] = read_value(value)
        except yaml.YAMLError as error:
            raise ArgumentsError(f"--config_overrides: cannot read the value of {pair!r}.") from error
    return changes


def read_value(text: str) -> Any:
    """Reads a value as YAML does; also numbers like 1e-5, which YAML takes for a string."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def command_to_resume() -> str:
    """The command of this script, with the flag to resume from its newest checkpoint in place of those to begin."""
    kept, arguments = [], iter(this_command())
    for argument in arguments:
        if argument == "--resume_from_checkpoint":
            next(arguments, None)
        elif not argument.startswith(("--resume_from_checkpoint=", "--overwrite_output_dir")):
            kept.append(argument)
    return shlex.join([*kept, "--resume_from_checkpoint", "latest"])


def this_command() -> list[str]:
    """The command that started this script, with its launcher."""
    # A launched process does not know the launcher's flags, but the launcher does.
    command = launching_command(sys.argv[0]) or sys.orig_argv
    place = find_script(command, sys.argv[0])
    launcher, script, arguments = ["python"], sys.argv[0], sys.argv[1:]
    if place is not None:
        launcher, script = command[:place], command[place]
    if place is not None and is_vicmae(script):  # its launcher was given another number of processes
        arguments = command[place + 1 :]
    if len(launcher) == 1 and Path(script).name == "vicmae":  # python /PLACE/bin/vicmae
        launcher, script = [], shorten(script)
    elif len(launcher) > 1 and not launcher[1].startswith("-"):  # python /PLACE/bin/torchrun
        launcher = launcher[1:]
    # Needed to start several processes on CPUs. With `env`, the command may stand behind others.
    on_cpu = ["env", "ACCELERATE_USE_CPU=true"] if parse_flag_from_env("ACCELERATE_USE_CPU") else []
    return [*on_cpu, *[shorten(word) for word in launcher[:1]], *launcher[1:], script, *arguments]


def shorten(program: str) -> str:
    """The name of a program that a shell finds by its name."""
    name = Path(program).name
    return name if shutil.which(name) == program else program


def is_vicmae(script: str) -> bool:
    """Whether a script is the command `vicmae`, however it was started."""
    return Path(script).name in ("vicmae", "vicmae.exe", "vicmae_command", "vicmae_command.py")


def find_script(command: Sequence[str], script: str) -> int | None:
    """Where a script stands in a command."""
    for place, word in enumerate(command):
        if word == script or (is_vicmae(script) and is_vicmae(word)):
            return place
    return None


def launching_command(script: str) -> list[str] | None:
    """Returns the command of the launcher that started this script; None if there is none."""
    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it is gone, or somebody else's
        return None
    return command if find_script(command, script) is not None and "python" in Path(command[0]).name else None
