"""Other machines than Linux on x86-64: what they lack is hidden from this project's code, and from nobody else's."""

import ast
import configparser
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from tiny_models import tiny_overrides

from vicmae_hf.data.media.other_decoders import OTHER_DECODERS


ROOT = Path(__file__).parents[1]
CODE = sorted(path for folder in ("src", "examples") for path in (ROOT / folder).rglob("*.py"))

# What Windows lacks; and decord, which ARM and macOS lack.
MODULES = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline", "decord"}
NAMES = {
    "os": {
        *("uname", "fork", "killpg", "setsid", "getuid", "geteuid", "getgid", "getpgid", "setpgid", "wait3", "wait4"),
        *("mkfifo", "statvfs", "fchmod", "fchown", "chown", "lchown", "getloadavg", "nice", "sysconf", "sync"),
        *("sched_getaffinity", "sched_setaffinity", "posix_fallocate", "fdatasync", "pread", "pwrite", "sendfile"),
        *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "O_SYNC", "WNOHANG", "register_at_fork"),
    },
    "signal": {
        *("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGKILL", "SIGHUP", "SIGALRM", "SIGPIPE", "SIGQUIT", "SIGTSTP", "SIGSTOP"),
        *("SIGCONT", "alarm", "setitimer", "pause", "sigwait", "pthread_sigmask", "pthread_kill", "siginterrupt"),
    },
}

# Imports every module, asks every script for its help, and pretrains for two updates. In a process of its own, because
# each module must be imported anew. Lines of "what: how it ended" are its result.
PROGRAM = """
import builtins, importlib, os, pathlib, pkgutil, runpy, signal, stat, sys, types

modules, names, root, arguments = eval(sys.argv[1])
own = (os.path.join(root, "src"), os.path.join(root, "examples"))

def without(module, hidden, **replaced):
    copy = types.ModuleType(module.__name__)
    copy.__dict__.update({name: value for name, value in vars(module).items() if name not in hidden} | replaced)
    return copy

def open_no_folder(path, flags, *rest):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return os.open(path, flags, *rest)

def sync_what_is_open_for_writing(descriptor):
    os.write(descriptor, b"")  # EBADF, as on Windows
    os.fsync(descriptor)

def kill(process, number):
    raise RuntimeError("os.kill ends a process on Windows, whatever the signal")

proxies = {
    "os": without(os, names["os"], open=open_no_folder, fsync=sync_what_is_open_for_writing, kill=kill),
    "signal": without(signal, names["signal"]),
}
import_of_python = builtins.__import__

def import_here(name, globals=None, locals=None, fromlist=(), level=0):
    if (globals or {}).get("__file__", "").startswith(own) and level == 0:
        if name.partition(".")[0] in modules:
            raise ModuleNotFoundError(f"No module named {name!r}")
        if name in proxies:
            return proxies[name]
    return import_of_python(name, globals, locals, fromlist, level)

builtins.__import__ = import_here

def try_to(what, function, *arguments, **settings):
    try:
        function(*arguments, **settings)
        outcome = "done"
    except SystemExit as error:
        outcome = f"exit {error.code}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}"
    print(f"{what}: {outcome}", file=results)

results, sys.stdout = sys.stdout, open(os.devnull, "w")
import vicmae_hf
for module in pkgutil.walk_packages(vicmae_hf.__path__, "vicmae_hf."):
    try_to(module.name, importlib.import_module, module.name)
sys.path[:0] = [os.path.join(root, "examples", name) for name in ("study", "demo_data")]
for path in sorted(pathlib.Path(root, "examples").glob("*/*.py")):
    if "__main__" in path.read_text(encoding="utf-8"):
        sys.argv = [str(path), "--help"]
        try_to(path.stem, runpy.run_path, str(path), run_name="__main__")

from vicmae_hf.data.media.other_decoders import check_backend
try_to("decord", check_backend, "decord")
sys.argv = [str(pathlib.Path(root, "examples", "pytorch", "run_pretraining.py")), *arguments]
try_to("training", runpy.run_path, sys.argv[0], run_name="__main__")
"""


# What is not installed is skipped by tests, and by `make test` nobody would know.
by_make_test = pytest.mark.skipif(
    not os.environ.get("LD_LIBRARY_PATH", "").endswith(".venv/ffmpeg"), reason="not by `make test`"
)


def read_requirements(section: str, option: str) -> list[Requirement]:
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg", encoding="utf-8")
    return list(map(Requirement, settings[section][option].strip().splitlines()))


def find_what_is_not_installed(requirements: list[Requirement]) -> list[str]:
    installed = {canonicalize_name(distribution.name) for distribution in distributions()}
    here = [requirement for requirement in requirements if not requirement.marker or requirement.marker.evaluate()]
    return [requirement.name for requirement in here if canonicalize_name(requirement.name) not in installed]


@by_make_test
def test_make_test_runs_torchcodec_too():
    assert OTHER_DECODERS["torchcodec"].import_library().ffmpeg_major_version >= 8


@by_make_test
def test_make_test_has_all_that_tests_look_for():
    assert find_what_is_not_installed(read_requirements("options.extras_require", "test")) == []


def test_what_is_not_installed_is_found():
    here, elsewhere = (f"nowhere-{place}; python_version {sign} '3'" for place, sign in (("here", ">"), ("else", "<")))
    assert find_what_is_not_installed([Requirement(name) for name in (here, elsewhere, "pytest")]) == ["nowhere-here"]
    names = {requirement.name for requirement in read_requirements("options.extras_require", "test")}
    assert {"mypy", "onnx", "onnxscript", "onnxruntime", "torchcodec"} <= names


def test_modules_scripts_and_a_training_without_what_other_machines_lack(tmp_path):
    for index in range(4):
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.effect_noise((32, 32), 20 * index).save(tmp_path / "images" / f"{index}.png")
    arguments = ["--train_data", tmp_path / "images", "--output_dir", tmp_path / "out", "--image_size", 32]
    arguments += ["--config_overrides", tiny_overrides(), "--per_device_train_batch_size", 2, "--max_train_steps", 2]
    arguments += ["--checkpointing_steps", 1, "--dataloader_num_workers", 1]
    given = repr((MODULES, NAMES, str(ROOT), list(map(str, arguments))))
    process = subprocess.run([sys.executable, "-c", PROGRAM, given], capture_output=True, text=True, timeout=300)
    outcomes = dict(line.split(": ", 1) for line in process.stdout.splitlines())
    assert outcomes.pop("decord", process.stderr).startswith(
        "InputError: The video backend 'decord' cannot be used: No"
    )
    assert outcomes.pop("training") == "done", process.stderr
    assert (tmp_path / "out" / "model.safetensors").exists() and (tmp_path / "out" / "checkpoint-2").exists()
    modules = {name: outcome for name, outcome in outcomes.items() if name.startswith("vicmae_hf.")}
    # The page alone needs its extra.
    assert modules["vicmae_hf.demo.page"] in ("done", "ModuleNotFoundError: No module named 'gradio'")
    modules["vicmae_hf.demo.page"] = "done"
    scripts = {name: outcome for name, outcome in outcomes.items() if name not in modules}
    assert len(modules) > 50 and set(modules.values()) == {"done"}, modules
    assert len(scripts) > 8 and set(scripts.values()) == {"exit 0"}, scripts


def find_names_that_windows_lacks(tree: ast.Module) -> list[str]:
    """Uses of what Windows lacks, unless the function looks with `hasattr`, or the import is tried."""
    found = []

    def visit(node: ast.AST, allowed: set[str], is_tried: bool) -> None:
        if isinstance(node, ast.FunctionDef):
            calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
            asked = [call.args[1] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "hasattr"]
            allowed = allowed | {name.value for name in asked if isinstance(name, ast.Constant)}
        if isinstance(node, ast.Try):
            is_tried = True
        if isinstance(node, ast.Import) and not is_tried:
            found.extend(alias.name for alias in node.names if alias.name in MODULES - {"decord"})
        if isinstance(node, ast.ImportFrom) and not is_tried and node.module in MODULES - {"decord"}:
            found.append(node.module)
        module = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
        if module in NAMES and node.attr in NAMES[module] - allowed:
            found.append(f"{module}.{node.attr}")
        for child in ast.iter_child_nodes(node):
            visit(child, allowed, is_tried)

    visit(tree, set(), False)
    return found


def find_texts_without_encoding(tree: ast.Module) -> list[int]:
    """Lines that open a text file in whatever encoding the machine has: UTF-8 on Linux, not on Windows."""
    lines = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        # Other things have a method `open`, too: those whose first argument is no mode.
        first, *_ = [*(call.args if isinstance(call.func, ast.Attribute) else call.args[1:]), ast.Constant("r")]
        mode = str(first.value) if isinstance(first, ast.Constant) else ""
        opens_text = name == "open" and set(mode) <= set("rwaxt+") and mode != ""
        if (opens_text or name in ("read_text", "write_text")) and not any(
            word.arg == "encoding" for word in call.keywords
        ):
            lines.append(call.lineno)
    return lines


@pytest.mark.parametrize("find", [find_names_that_windows_lacks, find_texts_without_encoding])
def test_nothing_is_left(find):
    found = {path.relative_to(ROOT).as_posix(): find(ast.parse(path.read_text(encoding="utf-8"))) for path in CODE}
    assert {path: places for path, places in found.items() if places} == {}


def test_what_is_looked_for_is_found():
    tree = ast.parse(
        "import resource, os, signal\nos.uname()\nhasattr(signal, 'SIGCHLD') and signal.SIGCHLD\n"
        "def f():\n  if hasattr(signal, 'SIGUSR1'): signal.SIGUSR1\n"
        "try:\n  import fcntl\nexcept ImportError:\n  fcntl = None\n"
    )
    assert find_names_that_windows_lacks(tree) == ["resource", "os.uname", "signal.SIGCHLD"]
    tree = ast.parse(
        "open(p)\nopen(p, 'rb')\nopen(p, 'w', encoding='utf-8')\np.open()\np.open('a')\np.open('wb')\n"
        "p.read_text()\np.read_text(encoding='utf-8')\np.write_text(text)\nitem.open(backend)\nImage.open(p)\n"
    )
    assert find_texts_without_encoding(tree) == [1, 4, 5, 7, 9]


@pytest.mark.parametrize(
    ("machine", "system", "is_required"),
    [
        *[("x86_64", "linux", True), ("AMD64", "win32", True), ("ARM64", "win32", False)],
        *[("aarch64", "linux", False), ("arm64", "darwin", False), ("x86_64", "darwin", False)],
    ],
)
def test_decord_is_required_where_it_has_a_wheel(machine, system, is_required):
    requirements = read_requirements("options", "install_requires")
    (decord,) = [requirement for requirement in requirements if requirement.name == "decord"]
    assert decord.marker.evaluate({"platform_machine": machine, "sys_platform": system}) is is_required
