"""Reads settings from the command line and from a YAML or JSON file, and says how to start a script once more."""

import argparse
import difflib
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
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


class Parser(argparse.ArgumentParser):
    """Repeats no secrets in its messages."""

    def error(self, message: str) -> NoReturn:
        super().error(hide_secrets(message))


def parse_arguments(arguments_class: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """
    Reads `arguments_class` from the command line. A first argument that ends in .yaml, .yml or .json is a file of the
    same settings; flags after it win.

    Raises:
        ArgumentsError: if the file cannot be read or has an unknown setting, or a value is out of range or holds an
            access token. (A wrong flag ends the program with argparse's usage message.)
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser(arguments_class)
    if argv and argv[0].endswith((".yaml", ".yml", ".json")):
        argv = [*_settings_as_flags(argv[0], arguments_class), *argv[1:]]
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        # Settings are written down, given to trackers and published with a model.
        if hide_secrets(str(value)) != str(value):
            raise ArgumentsError(
                f"--{name} holds an access token or a password. Leave it out; log in with `hf auth login` or the "
                "variable HF_TOKEN."
            )
    return arguments_class(**values)


def build_parser(arguments_class: type) -> argparse.ArgumentParser:
    """Builds a parser with one flag for each field, required ones first; booleans are `--name` and `--no-name`."""
    # The usage is written by hand, because the generated one lists every flag. allow_abbrev=False: a misspelt flag
    # must be an error, not the beginning of another one.
    parser = Parser(usage="%(prog)s [settings.yaml|settings.json] [--flag value ...]", allow_abbrev=False)
    for entry in sorted(fields(arguments_class), key=_has_default):
        default = entry.default if entry.default_factory is MISSING else entry.default_factory()
        options = {"help": entry.metadata["help"].replace("%", "%%")}  # argparse would fill % in
        options |= {"default": default} if _has_default(entry) else {"required": True}
        value_type = without_none(entry.type)
        if value_type is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(value_type) is list:
            may_be_empty = default == [] or entry.metadata["may_be_empty"]
            options |= {"type": get_args(value_type)[0], "nargs": "*" if may_be_empty else "+"}
        elif get_origin(value_type) is Literal:
            options["choices"] = get_args(value_type)
        else:
            options["type"] = value_type
        parser.add_argument(f"--{entry.name}", **options)
    return parser


def _has_default(entry: Field) -> bool:
    return entry.default is not MISSING or entry.default_factory is not MISSING


def _settings_as_flags(path: str, arguments_class: type) -> list[str]:
    """Turns the settings of a file into flags, so that they pass through the same checks."""
    try:
        # Some editors begin a file with a byte order mark.
        text = Path(path).read_text(encoding="utf-8-sig")
        settings = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, json.JSONDecodeError) as error:
        raise ArgumentsError(f"{path}: cannot be read as settings ({error}).") from error
    if not isinstance(settings, dict):
        raise ArgumentsError(f"{path}: expected settings as `name: value`, got {type(settings).__name__}.")
    known = {entry.name: without_none(entry.type) for entry in fields(arguments_class)}
    flags = []
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            raise ArgumentsError(
                f"{path}: unknown setting {name!r}." + (f" Did you mean {near[0]!r}?" if near else "")
            )
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
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ArgumentsError(f"--config_overrides: the config has no field {name!r}.{hint}")
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


def command_to_go_on() -> str:
    """The command of this script, with the flag to go on with its newest checkpoint in place of those to begin."""
    script, kept, arguments = sys.argv[0], [], iter(sys.argv[1:])
    for argument in arguments:
        if argument == "--resume_from_checkpoint":
            next(arguments, None)
        elif not argument.startswith(("--resume_from_checkpoint=", "--overwrite_output_dir")):
            kept.append(argument)
    return shlex.join([*find_launcher(script), script, *kept, "--resume_from_checkpoint", "latest"])


def find_launcher(script: str) -> list[str]:
    """Finds what stood before the name of this script when it was started: a launcher with its flags, or Python."""
    # A launched process does not know the launcher's flags, but the launcher does.
    command = launching_command(script) or sys.orig_argv
    launcher = command[: command.index(script)] if script in command else ["python"]
    if len(launcher) > 1 and not launcher[1].startswith("-"):  # python /PLACE/bin/torchrun
        launcher = launcher[1:]
    if shutil.which(Path(launcher[0]).name) == launcher[0]:
        launcher[0] = Path(launcher[0]).name
    # Needed to start several processes on CPUs. With `env`, the command may stand behind others.
    return (["env", "ACCELERATE_USE_CPU=true"] if parse_flag_from_env("ACCELERATE_USE_CPU") else []) + launcher


def launching_command(script: str) -> list[str] | None:
    """Returns the command of the launcher that started this script; None if there is none."""
    try:
        command = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it is gone, or somebody else's
        return None
    return command if script in command and "python" in Path(command[0]).name else None
