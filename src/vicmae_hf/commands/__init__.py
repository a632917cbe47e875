"""The commands: each is started as `vicmae COMMAND`, by its script in examples/pytorch/, and some as functions.

A command is a module with a docstring (its help), settings, `run(arguments)` and `main(argv)`; its name and a line on
it are in `vicmae_command.py`. Two are not here: `demo/command.py`, and `convert_checkpoint/conversion.py`.
"""
