"""
Every command of the pages is run, at tiny sizes and in the order of its page, or is listed in `NOT_RUN` with the
reason. What is checked here is that commands run, not what they print.
"""

import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from test_docs import relative
from typed_commands import BEGUN, ROOT, Desk, Typed, lay_out, outputs_of, typed_on


PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("examples/**/*.md"))]
PAGES = [page for page in PAGES if typed_on(page)]

# Beginnings of what is not run -> why.
NOT_RUN = {
    r"(pip|\.venv/bin/pip) install": "changes the environment; test_packaging.py installs the wheel",
    r"python3 -m venv|source |git clone": "makes the environment that the tests run in",
    r"make ": "makes the environment, and runs for minutes; its commands are those of the guides",
    r"vicmae demo": "serves a page until it is stopped; tests/demo drives it",
    r"jupyter ": "opens a browser; test_notebooks.py runs the notebook",
    r"hf upload|table\.to_iterable_dataset": "needs 64 videos, or publishes; test_hub.py has a stand-in of the Hub",
    r"python .*--root ILSVRC/imagenet-1k": "downloads from the Hub; test_layouts.py reads such a table",
    r"aws ": "needs an account; tests/test_hub.py and s3_server.py stand in for object storage",
    r"python examples/pytorch/run_pretraining.py --streaming --train_data s3://": "needs an account, as above",
    r"rm -f OUTPUT|srun|status=|if \[|sbatch|squeue|scontrol": "needs Slurm",
    r"accelerate launch --config_file .*(eight_gpus|four_nodes)": "needs GPUs; test_accelerate_configs.py reads it",
    r"python .*demo_images.yaml --label_fraction 0.05": "needs 20 images of each class; tests/examples/study runs it",
    r"OMP_NUM_THREADS=1 vicmae features two_hours": "two hours of video; the page has the same command for a folder",
    r"python examples/study/": "runs for hours; tests/examples/study runs it small",
}


def reason_not_to_run(typed: Typed) -> str | None:
    if "onnx" in typed.text and find_spec("onnxruntime") is None:
        return "the extra `onnx` is not installed"
    return next((reason for beginning, reason in NOT_RUN.items() if re.match(beginning, typed.text)), None)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A folder with what readers have, and what the README's commands make of it."""
    folder = tmp_path_factory.mktemp("pages") / "reader"
    lay_out(folder)
    desk = Desk(folder)
    for line in BEGUN:
        desk.type(Typed("bash", line))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_the_commands_of_a_page_run_in_their_order(page, begun, tmp_path):
    folder = tmp_path / "reader"
    shutil.copytree(begun, folder, symlinks=True)
    if page.parent.name == "guides":  # they begin with nothing made
        shutil.rmtree(folder / "outputs")
        shutil.rmtree(folder / "data" / "demo")
    desk, made = Desk(folder), set()
    for typed in typed_on(page):
        if reason_not_to_run(typed) is None:
            outputs = set(outputs_of(typed.text)) if typed.language == "bash" else set()
            for path in outputs - made:  # it was made for pages that begin with it
                shutil.rmtree(folder / path, ignore_errors=True)
            made |= outputs
            desk.type(typed)


def borrowed(page: Path) -> set[str]:
    """What the commands of a page read below outputs/ and data/demo, and no command before them on this page wrote."""
    written, read = set(), set()
    for typed in typed_on(page):
        if reason_not_to_run(typed) is None:
            named = re.findall(r"(?<![\w/.-])(outputs/\w+|data/demo\w*)", typed.text)
            outputs = outputs_of(typed.text) if typed.language == "bash" else []
            outputs += re.findall(r'(?:save_pretrained|savefig|output_dir=|output=)\(?f?"([^"]+)"', typed.text)
            written |= {re.match(r"outputs/\w+|data/demo\w*|", output)[0] for output in outputs}
            read |= set(named) - written
    return read


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_a_page_says_where_what_it_begins_with_comes_from(page):
    """In its prose, or in a comment beside a command."""
    text = page.read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL) + "".join(re.findall(r" # .*", text))
    assert {path for path in borrowed(page) if not re.search(rf"`?{path}`?", prose)} == set()


def test_what_is_not_run_is_still_there():
    everything = [typed for page in PAGES for typed in typed_on(page)]
    unused = [beginning for beginning in NOT_RUN if not any(re.match(beginning, typed.text) for typed in everything)]
    assert unused == []
