"""Writes the help pages anew, after a setting was changed: `python -m vicmae_hf.commands.help`"""

import importlib
import inspect
from pathlib import Path

from vicmae_command import COMMANDS, IN_SEVERAL_PROCESSES

from ...command_line import build_parser


NUM_PROCESSES = """
processes:
  --num_processes N             processes on this machine [one per GPU; one on a CPU]; the scripts have no such
                                flag, their launcher has
"""


def help_page(name: str) -> str:
    """The page of a command, from its docstring and the type of its settings."""
    module = importlib.import_module(COMMANDS[name][0])
    arguments_class = inspect.get_annotations(module.run)["arguments"]
    parser = build_parser(arguments_class, inspect.cleandoc(module.__doc__))
    parser.prog = f"vicmae {name}"
    page = parser.format_help()
    return page.replace("\nprocesses:\n", NUM_PROCESSES) if name in IN_SEVERAL_PROCESSES else page


if __name__ == "__main__":
    for command in COMMANDS:
        Path(__file__).with_name(f"{command}.txt").write_text(help_page(command), encoding="utf-8")
