"""What documents, recipes and scripts name is there: files, headings, modules."""

import pkgutil
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/**/*.md")),
]
WITH_PATHS = [
    ROOT / "Makefile",
    *DOCUMENTS,
    *sorted(ROOT.glob("examples/**/*.yaml")),
    *sorted(ROOT.glob("examples/**/*.py")),
    *sorted(ROOT.glob("benchmarks/*.py")),
]
FILE_NAME = re.compile(r"(?<![\w./-])(?:examples|benchmarks|tests|docs|src|vicmae_hf)/[\w/.-]+\.(?:py|yaml|md|png)\b")
DOTTED_NAME = re.compile(r"(?<![\w./-])vicmae_hf(?:\.[A-Za-z_]\w*)+")
# A target that is an address has a colon.
LINK = re.compile(r"""(?:\]\(|src=")([^)"#:\s]*)(?:#([^)"\s]+))?[)"]""")


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(document: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_names(path: Path) -> list[str]:
    """The files and modules that a text names and that are not there."""
    text = path.read_text(encoding="utf-8")
    missing = [
        name
        for name in FILE_NAME.findall(text)
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "src", path.parent))
    ]
    for name in DOTTED_NAME.findall(text):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    return missing


def broken_links(document: Path) -> list[str]:
    """The links to files that are not there, or to headings that these don't have."""
    broken = []
    for target, anchor in LINK.findall(document.read_text(encoding="utf-8")):
        path = document.parent / target if target else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            broken.append(f"{target}#{anchor}" if anchor else target)
    return broken


@pytest.mark.parametrize("path", WITH_PATHS, ids=relative)
def test_what_is_named_is_there(path):
    assert missing_names(path) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document):
    assert broken_links(document) == []


def test_what_is_missing_is_found(tmp_path):
    document = tmp_path / "document.md"
    document.write_text(
        "# One heading: (of 2)\n`tests/test_docs.py` `docs/lost.md` vicmae_hf.data.load_frame_pairs, vicmae_hf.lost. "
        "`vicmae_hf/modeling_vicmae.py` [a](document.md#one-heading-of-2) [b](lost.md) [c](#lost) "
        '[d](https://example.org/lost.md) <img src="lost.png">\n'
    )
    assert missing_names(document) == ["docs/lost.md", "vicmae_hf.lost"]
    assert broken_links(document) == ["lost.md", "#lost", "lost.png"]
