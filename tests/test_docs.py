"""What documents, recipes and scripts name is there: files, headings, modules. Navigation and API pages are whole."""

import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import yaml


ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
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


class SiteLoader(yaml.SafeLoader):
    """Reads mkdocs.yml, and passes over the names of functions in it."""


SiteLoader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: suffix)


def pages_of(navigation: list | dict | str) -> list[str]:
    """The pages below a part of the navigation, in their order."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in pages_of(part)]


def documented_names(folder: Path) -> list[str]:
    """What the pages of a folder take from docstrings (`::: NAME`)."""
    pages = sorted(folder.glob("**/*.md"))
    return [
        name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    ]


def test_the_navigation_names_every_page_once():
    site = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=SiteLoader)
    pages = [path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")]
    assert Counter(pages_of(site["nav"])) == Counter(pages), "nav of mkdocs.yml"
    assert pages_of([{"A": "a.md"}, {"B": [{"C": "c.md"}, "d.md"]}]) == ["a.md", "c.md", "d.md"]


def test_the_api_pages_have_every_public_name():
    names = documented_names(ROOT / "docs" / "api")
    public = [
        f"{package}.{name}"
        for package in ("vicmae_hf", "vicmae_hf.data")
        for name in pkgutil.resolve_name(package).__all__
    ]
    assert set(public) <= set(names), "docs/api"
    assert max(Counter(names).values()) == 1
    for name in names:
        assert pkgutil.resolve_name(name).__doc__, f"{name} has no docstring"


@pytest.mark.slow
def test_the_site_builds_without_warnings(tmp_path):
    pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "api" / "models.html").read_text(encoding="utf-8")
    assert "pixel_values: images" in page or "two views of every sample" in page
    everything = "".join(path.read_text(encoding="utf-8") for path in tmp_path.glob("**/*.html"))
    # Reading needs no network, either.
    assert re.findall(r'(?:src|href)="https?://[^"]+\.(?:js|css|woff2?)[^"]*"', everything) == []
    assert (tmp_path / "search" / "search_index.json").exists()
