"""The help pages, which are written once."""

import pytest

from vicmae_command import COMMANDS, help_folder
from vicmae_hf.commands.help.__main__ import help_page


@pytest.mark.parametrize("name", COMMANDS)
def test_pages_are_as_the_settings_are(name):
    page = (help_folder() / f"{name}.txt").read_text(encoding="utf-8")
    assert page == help_page(name), "write the pages anew: python -m vicmae_hf.commands.help"
    assert page.count("\n    vicmae ") == 2
    assert max(map(len, page.splitlines())) <= 119
    required = page.partition("\nrequired:\n")[2].partition("\n\n")[0]
    writes = name not in ("plan", "demo")
    assert ("\n  -o TEXT, --output" in required) == writes
    assert (" -o OUTPUT " in page.partition("\n")[0]) == writes


def test_a_page_has_groups_and_every_option_its_default():
    page = (help_folder() / "pretrain.txt").read_text(encoding="utf-8")
    titles = [line for line in page.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert titles[titles.index("required:") :] == [
        *("required:", "model:", "training:", "run:", "data:", "frames:", "probe during training:"),
        *("reading files:", "processes:", "trackers and Hub:"),
    ]
    options = page.partition("\nmodel:\n")[2].split("\n  --")
    without = [option for option in options if "[" not in option.partition(" ")[2] and "default:" not in option]
    assert without == []
    for line in (
        "  --seed N                      random seed of weights, data order, views and masks [0]",
        "  --[no-]horizontal_flip        flip half of the views [yes]",
        "  --model_name_or_path TEXT     checkpoint to start from; without it, random weights [none]",
    ):
        assert line in page.splitlines()
