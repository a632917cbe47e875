"""The command lines of documents, recipes, scripts and the Makefile: commands, targets and options that exist."""

import re
from functools import cache
from pathlib import Path

import pytest
from test_docs import WITH_PATHS, relative

from vicmae_command import COMMANDS


ROOT = Path(__file__).parents[1]
HELP = ROOT / "src" / "vicmae_hf" / "commands" / "help"
# Of other programs that the pages name.
FOREIGN = {
    "accelerate": [
        "--config_file",
        "--cpu",
        "--dynamo_backend",
        "--multi_gpu",
        "--num_machines",
        "--quiet",
        "--num_cpu_threads_per_process",
    ],
    "docker": ["--shm-size"],
    "hf": ["--exclude"],
    "mkdocs": ["--strict"],
    "pip": [
        "--break-system-packages",
        "--constraint",
        "--editable",
        "--index-url",
        "--no-build-isolation",
        "--no-deps",
    ],
    "pytest": ["--show-capture"],
    "ruff": ["--check"],
    "slurm": ["--requeue", "--signal"],
    "tensorboard": ["--logdir"],
    "text that stands for options": ["--flag", "--no-flag"],
    "torchrun": ["--nproc_per_node", "--signals_to_handle"],
}
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
SCRIPT = re.compile(r"(?<![\w./-])(?:(?:examples|benchmarks)/(?:\w+/)*)?(\w+\.py)\b|-m (vicmae_hf[\w.]*)")
# Of every command, and of `vicmae` alone.
OF_ALL = frozenset({"--help", "--version"})
COMMAND = re.compile(r"(?<![\w./=-])vicmae ([a-z]+)\b")


@cache
def options_of_command(name: str) -> frozenset[str]:
    """As the help page of `vicmae NAME` lists them; those that are switched off, too."""
    text = (HELP / f"{name}.txt").read_text(encoding="utf-8").split("options:\n", 1)[1]
    found = re.findall(r"^  (?:(?:-\w(?: TEXT)?|DATA), )?--(\[no-\])?([\w-]+)", text, re.MULTILINE)
    return frozenset(f"--{off}{option}" for no, option in found for off in (["", "no-"] if no else [""]))


@cache
def options_of_script(name: str) -> frozenset[str] | None:
    """
    Of a script in examples/ or benchmarks/, read off its source and the modules beside it that it imports. None if
    there is no such script.
    """
    paths = [path for folder in ("examples", "benchmarks") for path in ROOT.glob(f"{folder}/**/{name}")]
    if not paths:
        return None
    source = paths[0].read_text(encoding="utf-8")
    command = re.search(r'^    run\("(\w+)"\)$', source, re.MULTILINE)
    if command:
        return options_of_command(command[1])
    modules = re.findall(r"^from ([\w.]+) import", source, re.MULTILINE)
    beside = [paths[0].parent / f"{module.replace('.', '/')}.py" for module in modules]
    source += "".join(path.read_text(encoding="utf-8") for path in beside if path.exists())
    declared = re.findall(r'add_argument\(\s*"--([\w-]+)"([^)]*)', source)
    options = {f"--{option}" for option, _ in declared} | {
        f"--no-{option}" for option, rest in declared if "BooleanOptionalAction" in rest
    }
    fields = re.findall(r"^    (\w+): .* = setting\(", source, re.MULTILINE)
    return frozenset(options | {f"--{field}" for field in fields})


@cache
def all_options() -> frozenset[str]:
    scripts = [path.name for folder in ("examples", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")]
    foreign = [option for options in FOREIGN.values() for option in options]
    return OF_ALL.union(foreign, *map(options_of_command, COMMANDS), *map(options_of_script, scripts))


def command_lines(path: Path) -> list[str]:
    """Code of a document (fenced, or between backticks), else every line; lines that go on are joined."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        blocks = [block for language, block in fenced if language != "python"]
        rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        lines = [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", rest)]
    else:
        blocks, lines = [re.sub(r"^#", "", text, flags=re.MULTILINE)], []
    for block in blocks:
        lines += [" ".join(line.split()) for line in re.sub(r"\\\n", " ", block).splitlines()]
    return [part for line in lines for part in re.split(r"\s(?:\|\||&&|;|\|)\s|\s#\s", line)]


def unknown_options(line: str) -> list[str]:
    """The commands, targets and options of a line that do not exist."""
    wrong = []
    command, script = COMMAND.search(line), SCRIPT.search(line)
    known, start = all_options(), 0
    if command:
        if command[1] not in COMMANDS:
            return [f"vicmae {command[1]}"]
        known, start = options_of_command(command[1]) | OF_ALL, command.end()
    elif script:
        of_script = options_of_command("convert") if script[2] else options_of_script(script[1])
        if of_script is not None:  # a script of others, else
            known, start = of_script | OF_ALL, script.end()
    target = re.match(r"(?:\w+=\S+ )*make ([a-z][\w-]*)", line)
    if target and not re.search(rf"^{target[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE):
        wrong.append(f"make {target[1]}")
    return wrong + [option for option in OPTION.findall(line[start:]) if option not in known]


@pytest.mark.parametrize("path", WITH_PATHS, ids=relative)
def test_command_lines_name_what_exists(path):
    wrong = [(line, unknown) for line in command_lines(path) if (unknown := unknown_options(line))]
    assert wrong == []


def test_every_command_has_its_help_on_the_site():
    page = (ROOT / "docs" / "api" / "commands.md").read_text(encoding="utf-8")
    parts = [f'## vicmae {name}\n\n```text\n--8<-- "{relative(HELP)}/{name}.txt"\n```\n' for name in COMMANDS]
    assert [part for part in parts if part not in page] == []


@pytest.mark.parametrize(
    ("line", "unknown"),
    [
        ("vicmae pretrain videos -o out --seed 1 --no-horizontal_flip", []),
        ("vicmae pretrain videos --num_clips 3", ["--num_clips"]),
        ("vicmae pretrian videos", ["vicmae pretrian"]),
        ("vicmae features videos --labelled --no-labelled -o f.parquet --help", []),
        ("accelerate launch --quiet examples/pytorch/run_evaluation.py --num_clips 7 --sead 1", ["--sead"]),
        ("python -m vicmae_hf.convert_checkpoint --checkpoint FILE.pth --output DIR", ["--output"]),
        ("python benchmarks/decoding.py --videos V --hours 3", ["--hours"]),
        ("--mixed_precision bf16 --crop_scales 1 1", ["--crop_scales"]),
        ("pip install torch --index-url URL", []),
        ("VIDEOS=x make bench", []),
        ("make pretrained", ["make pretrained"]),
    ],
)
def test_what_does_not_exist_is_found(line, unknown):
    assert unknown_options(line) == unknown


def test_lines_are_read_as_they_are_typed(tmp_path):
    document = tmp_path / "page.md"
    document.write_text(
        "Say `vicmae\npack A`.\n```bash\nvicmae pretrain A \\\n    --seed 1  # why --not\n```\n```python\n--x\n```\n"
    )
    assert command_lines(document)[:2] == ["vicmae pack A", "vicmae pretrain A --seed 1"]
    assert not any("--x" in line for line in command_lines(document))
