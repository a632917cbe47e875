"""Settings of a classification, from flags as a user gives them."""

from vicmae_hf.classification.arguments import ClassificationArguments
from vicmae_hf.command_line import parse_arguments


def parse(folders, *flags, task="video", method="finetune"):
    return parse_arguments(
        ClassificationArguments, [*map(str, folders), "--task", task, "--method", method, *map(str, flags)]
    )


def make_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root
