"""The layout of the package: short functions, small folders, imports that run one way. Read off the syntax trees."""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


PACKAGE = Path(__file__).parents[1] / "src" / "vicmae_hf"

MAX_FUNCTION_LINES = 60
MAX_FILES = 10

# The Hub's exporter of custom code follows only `from .module import name` from one to the next.
MODEL_FILES = [
    "configuration_vicmae",
    "modeling_vicmae",
    "backbone_vicmae",
    "image_processing_vicmae",
    "media_reading_vicmae",
    "video_processing_vicmae",
]

# From bottom to top. A room is a folder, or a file that lies flat in the package; it imports rooms of its own floor
# and of those below.
FLOORS = [
    ["errors", "files", "settings", "command_line"],
    [*MODEL_FILES, "processors", "convert_checkpoint"],
    ["data/media", "data/loading", "training/devices"],
    ["data/sources"],
    ["data/samples", "data"],
    ["data/preparing"],
    ["training", "reports"],
    ["training/session"],
    ["evaluation/metrics", "evaluation"],
    ["pretraining", "classification"],
    ["planning", "demo"],
    ["commands"],
    ["commands/help", "__init__"],
]


def list_trees(package: Path) -> dict[str, ast.Module]:
    """Path of each Python file within the package, "data/media/video.py" -> its syntax tree."""
    return {
        path.relative_to(package).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    }


def find_long_functions(package: Path) -> dict[str, int]:
    """File and name of each function that is too long -> its lines, from `def` to the end; decorators don't count."""
    return {
        f"{path} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in list_trees(package).items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION_LINES
    }


def find_full_folders(package: Path) -> dict[str, int]:
    """Each folder that holds too many Python files -> how many."""
    counts = {}
    for path in map(Path, list_trees(package)):
        if path.name != "__init__.py":
            counts[path.parent.as_posix()] = counts.get(path.parent.as_posix(), 0) + 1
    return {folder: count for folder, count in counts.items() if count > MAX_FILES}


def list_imports(tree: ast.Module, path: str, package_name: str) -> Iterator[tuple[str, str | None]]:
    """
    What a file imports of its own package, wherever in the file: (dotted module, imported name or None); modules are
    relative to the package, "" is the package itself.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == package_name:
                    yield ".".join(rest), None
        elif isinstance(node, ast.ImportFrom):
            module = node.module.split(".") if node.module else []
            if node.level:
                folders = path.split("/")[:-1]
                module = folders[: len(folders) - node.level + 1] + module
            elif module[0] == package_name:
                module = module[1:]
            else:
                continue
            for alias in node.names:
                yield ".".join(module), alias.name


def module_graph(package: Path) -> dict[str, set[str]]:
    """Each file of the package -> the files that it imports."""
    trees = list_trees(package)

    def file_of(dotted: str) -> str | None:
        path = dotted.replace(".", "/")
        for candidate in (f"{path}.py", f"{path}/__init__.py".lstrip("/")):
            if candidate in trees:
                return candidate
        return None

    graph = {}
    for path, tree in trees.items():
        graph[path] = set()
        for module, name in list_imports(tree, path, package.name):
            # `from ..media import bad_files` imports a module, `from ..media.bad_files import BadFiles` a name.
            target = (name and file_of(f"{module}.{name}".lstrip("."))) or file_of(module)
            assert target, f"{path}: there is no module {module or name}"
            graph[path].add(target)
    return graph


def room_of(path: str) -> str:
    folder = Path(path).parent.as_posix()
    return Path(path).stem if folder == "." else folder


def room_graph(package: Path) -> dict[str, set[str]]:
    """Each room -> the other rooms that its files import."""
    graph = {}
    for path, targets in module_graph(package).items():
        rooms = graph.setdefault(room_of(path), set())
        rooms |= {room_of(target) for target in targets} - {room_of(path)}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """A chain of imports that ends where it begins; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def find_upward_imports(package: Path) -> list[str]:
    """`file imports file` for each import of a room on a higher floor."""
    floor_of = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    homeless = {room_of(path) for path in list_trees(package)} - floor_of.keys()
    assert not homeless, f"give {sorted(homeless)} a floor in FLOORS"
    return [
        f"{path} imports {target}"
        for path, targets in module_graph(package).items()
        for target in sorted(targets)
        if floor_of[room_of(target)] > floor_of[room_of(path)]
    ]


def find_imports_against(folders: list[str], package: Path) -> list[str]:
    """`file imports file` for each import of a folder that stands before the importing one in the list."""

    def place(path: str) -> int | None:
        names = [name for name in folders if path.startswith(f"{name}/")]
        return folders.index(max(names, key=len)) if names else None

    return [
        f"{path} imports {target}"
        for path, targets in module_graph(package).items()
        for target in sorted(targets)
        if None not in (place(path), place(target)) and place(target) < place(path)
    ]


def find_imports_that_do_not_travel(package: Path) -> list[str]:
    """`file: import` for each import of a model file that the Hub's exporter would not resolve."""
    wrong = []
    for name in MODEL_FILES:
        for node in ast.walk(list_trees(package)[f"{name}.py"]):
            if isinstance(node, ast.ImportFrom) and node.level:
                travels = node.level == 1 and node.module in MODEL_FILES
            elif isinstance(node, ast.ImportFrom):
                travels = node.module.split(".")[0] != package.name
            elif isinstance(node, ast.Import):
                travels = all(alias.name.split(".")[0] != package.name for alias in node.names)
            else:
                continue
            if not travels:
                wrong.append(f"{name}: {ast.unparse(node)}")
    return wrong


def test_functions_are_short():
    assert find_long_functions(PACKAGE) == {}


@pytest.mark.parametrize("folder", ["examples", "benchmarks"])
def test_functions_outside_the_package_are_short_too(folder):
    assert find_long_functions(Path(__file__).parents[1] / folder) == {}


def test_folders_are_small():
    assert find_full_folders(PACKAGE) == {}


def test_imports_run_one_way():
    assert find_upward_imports(PACKAGE) == []
    assert find_cycle(room_graph(PACKAGE)) == []


def test_the_readme_lists_folders_from_top_to_bottom():
    readme = (PACKAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("\nsrc/vicmae_hf/\n")[2].partition("\ntests/")[0]
    folders = [name for line in tree.splitlines() for name in re.findall(r"([\w/]+)/", line[:22])]
    assert {"commands", "data/media", "convert_checkpoint"} <= set(folders)
    assert find_imports_against(folders, PACKAGE) == []


def test_model_files_import_each_other_as_the_hub_can_follow():
    assert find_imports_that_do_not_travel(PACKAGE) == []


@pytest.fixture
def crooked(tmp_path):
    """A package in which everything is wrong that the tests above look for."""
    line = "    pass\n"
    files = {
        "errors.py": "",
        "files.py": "def late():\n    from .data.media.video import decode\n",
        "settings.py": "from . import errors\n",
        "configuration_vicmae.py": "import torch\nfrom transformers import PreTrainedConfig\n",
        "modeling_vicmae.py": "from .configuration_vicmae import ViCMAEConfig\nfrom .errors import InputError\n",
        "backbone_vicmae.py": "",
        "image_processing_vicmae.py": "from . import configuration_vicmae\n",
        "media_reading_vicmae.py": "",
        "video_processing_vicmae.py": "import vicmae_hf.settings\nfrom vicmae_hf.files import late\n",
        "data/media/video.py": "from ...settings import setting\n",
        "reports/plots.py": "from ..training import loop\n",
        "training/loop.py": "from ..reports.plots import plot\n",
        "training/session.py": f"def short():\n{59 * line}@decorator\ndef long():\n{60 * line}",
        **{f"evaluation/part_{number}.py": "" for number in range(11)},
        **{f"classification/part_{number}.py": "" for number in range(10)},
        "classification/__init__.py": "",
    }
    package = tmp_path / "vicmae_hf"
    for path, text in files.items():
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        (package / path).write_text(text)
    return package


def test_a_crooked_package_is_found_out(crooked):
    assert find_long_functions(crooked) == {"training/session.py long": 61}
    assert find_full_folders(crooked) == {"evaluation": 11}
    assert find_upward_imports(crooked) == ["files.py imports data/media/video.py"]
    assert find_imports_against(["reports", "data/media", "training"], crooked) == [
        "training/loop.py imports reports/plots.py"
    ]
    assert module_graph(crooked)["settings.py"] == {"errors.py"}
    assert module_graph(crooked)["video_processing_vicmae.py"] == {"settings.py", "files.py"}
    assert sorted(find_cycle(room_graph(crooked))[1:]) == ["reports", "training"]
    assert find_imports_that_do_not_travel(crooked) == [
        "modeling_vicmae: from .errors import InputError",
        "image_processing_vicmae: from . import configuration_vicmae",
        "video_processing_vicmae: import vicmae_hf.settings",
        "video_processing_vicmae: from vicmae_hf.files import late",
    ]


def test_a_new_room_needs_a_floor(crooked):
    (crooked / "attic").mkdir()
    (crooked / "attic" / "box.py").write_text("")
    with pytest.raises(AssertionError, match=r"give \['attic'\] a floor"):
        find_upward_imports(crooked)
