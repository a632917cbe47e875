"""What is built and released: the version stands once, the wheel holds the package, the files of tools agree."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns

import pytest
import yaml

import vicmae_hf


ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as `python -m build` makes it, without the environment that build would download."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        copy2(ROOT / name, tree)
    copytree(ROOT / "src", tree / "src", ignore=ignore_patterns("__pycache__", "*.egg-info"))
    code = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    built = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    with zipfile.ZipFile(tree / built.stdout.splitlines()[-1]) as archive:
        yield archive


def test_the_version_stands_once(wheel):
    metadata = wheel.read(f"vicmae_hf-{vicmae_hf.__version__}.dist-info/METADATA").decode()
    assert f"\nVersion: {vicmae_hf.__version__}\n" in metadata
    assert version("vicmae-hf") == vicmae_hf.__version__
    assert "version = attr: vicmae_hf.__version__" in read("setup.cfg")
    assert re.search(r"^## (\S+) \(", read("CHANGELOG.md"), re.MULTILINE)[1] == vicmae_hf.__version__


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in path.as_posix()
    }
    assert files == expected
    entry_points = wheel.read(f"vicmae_hf-{vicmae_hf.__version__}.dist-info/entry_points.txt").decode()
    assert "vicmae = vicmae_command:main" in entry_points


def test_the_citation_names_the_paper():
    citation = yaml.safe_load(read("CITATION.cff"))
    paper = citation["preferred-citation"]
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == "Apache-2.0"
    assert [author["family-names"] for author in paper["authors"]] == ["Hernandez", "Villegas", "Ordonez"]
    assert paper["year"] == 2024
    assert paper["title"].partition(": ")[2] in " ".join(read("README.md").replace("*", "").split())


def test_ruff_has_one_version():
    repository = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]
    assert repository["rev"] == "v" + re.search(r"^ruff==(.+)$", read("constraints.txt"), re.MULTILINE)[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/workflows/*.yml")), ids=lambda path: path.name)
def test_workflows_call_targets_that_exist(path):
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    assert all({"runs-on", "timeout-minutes"} <= job.keys() for job in jobs.values() if "environment" not in job)
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.MULTILINE))
    called = [target for command in commands for target in re.findall(r"^make ([\w-]+)$", command, re.MULTILINE)]
    assert set(called) <= targets


@pytest.mark.parametrize("path", sorted(ROOT.glob(".github/ISSUE_TEMPLATE/[!c]*.yml")), ids=lambda path: path.name)
def test_issue_forms_have_what_they_need(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= form.keys()
    identifiers = [part["id"] for part in form["body"]]
    assert len(set(identifiers)) == len(identifiers)
    assert all(part["attributes"]["label"] for part in form["body"])
