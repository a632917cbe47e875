"""What the pages tell a reader to type, typed in the order of the page into one folder, at tiny sizes."""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from unittest import mock

import datasets
import torch
import yaml
from dataset_trees import picture, write
from launching import ON_CPU, run_here, undone
from PIL import Image
from transformers import (
    VideoMAEConfig,
    VideoMAEForVideoClassification,
    VideoMAEImageProcessor,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)
from video_files import numbered_frames, write_video

import vicmae_hf
from vicmae_command import COMMANDS
from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining
from vicmae_hf.convert_checkpoint import revert_state_dict
from vicmae_hf.planning import survey, trial
from vicmae_hf.processors import build_processors


ROOT = Path(__file__).parents[1]
# Twelve layers, as ViT-B has, so that what names its layers works.
TINY_MODEL = {
    "hidden_size": 16,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 16,
}
SMALL_WIDTH = 128  # of a model that stays as the page has it
# Settings that win over those of the page.
FEW_UPDATES = {
    "max_train_steps": 2,
    "per_device_train_batch_size": 4,
    "dataloader_num_workers": 0,
    "logging_steps": 1,
}
TINY = {
    "pretrain": FEW_UPDATES,
    "plan": FEW_UPDATES,
    "finetune": FEW_UPDATES,
    "evaluate": {"dataloader_num_workers": 0},
    "features": {"dataloader_num_workers": 0},
    "probe": {"dataloader_num_workers": 0, "num_seeds": 1},
    "pack": {"num_proc": 1},
    "prepare": {"num_proc": 1},
}
# What a page leaves to its reader, and updates in Python.
REPLACED = {
    "SMALL_CHECKPOINT": "facebook/vit-mae-base",
    "YOU/NAME": "someone/model",
    "for update in range(200)": "for update in range(2)",
    "max_steps=40": "max_steps=2",
    "max_steps=20": "max_steps=2",
    "torch.randn(4, 16, 3, 224, 224)": "torch.randn(4, 16, 3, 32, 32)",
}
TINY_DEMO = "--appearance_videos 3 2 --motion_videos 3 2 --images 2 1"
# Programs of the shell, which run as they are.
SHELL = ("awk", "cat", "cd", "cp", "cut", "find", "head", "ls", "mkdir", "rm", "sed", "sort", "tail", "wc")
OUTPUT_FLAGS = ("-o", "--output", "--output_dir", ">")


@dataclass(frozen=True)
class Typed:
    """A line of a shell, or a block of Python."""

    language: str
    text: str


def typed_on(page: Path) -> list[Typed]:
    """What a page tells its reader to type: lines of `bash` blocks, joined where they go on, and `python` blocks."""
    found = []
    text = page.read_text(encoding="utf-8")
    for language, block in re.findall(r"^```(bash|python)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if language == "python":
            found.append(Typed(language, block))
            continue
        lines = [without_comment(line) for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
        found += [Typed(language, line) for line in lines if line]
    return found


def without_comment(line: str) -> str:
    """A line of a shell without what follows a # that stands by itself."""
    return re.sub(r"(^|\s)#(\s|SBATCH).*$", "", line).strip()


def words_of(line: str) -> list[str]:
    return shlex.split(line)


def outputs_of(line: str) -> list[str]:
    """The files and folders that a line says it writes to."""
    words = words_of(line)
    return [word for flag, word in pairwise(words) if flag in OUTPUT_FLAGS]


class Desk:
    """
    Types into a folder. Variables of the shell, and names of Python, last from one command to the next.

    Args:
        folder: where commands run; `lay_out` says what is there.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.variables = {}
        self.names = {"image": Image.fromarray(numbered_frames(1, 40, 40)[0])}  # "your image"

    def type(self, typed: Typed) -> str:
        """
        Runs it, and returns what it printed.

        Raises:
            AssertionError: if it fails; the message has its last words.
            LookupError: if nothing here knows how to run it.
        """
        text = typed.text
        for before, after in REPLACED.items():
            text = text.replace(before, after)
        with contextlib.chdir(self.folder), tiny_functions():
            return self.run_python(text) if typed.language == "python" else self.run_line(text)

    def run_python(self, code: str) -> str:
        printed = []
        names = {"__name__": "__main__", "print": lambda *values, **_: printed.append(" ".join(map(str, values)))}
        self.names = names | self.names
        with undone(), mock.patch.dict(os.environ, ON_CPU):
            exec(compile(code, "<page>", "exec"), self.names)
        return "\n".join(printed)

    def run_line(self, line: str) -> str:
        assigned = re.fullmatch(r"(\w+)=(\S*)", line)
        if assigned:
            self.variables[assigned[1]] = self.expand(assigned[2])
            return ""
        words = words_of(self.expand(line))
        if words[0] in SHELL:  # of which the shell expands the variables
            process = subprocess.run(
                ["bash", "-c", line], env=os.environ | self.variables, capture_output=True, text=True, timeout=60
            )
        elif words[0] == "vicmae":
            process = run_here(str(ROOT / "src" / "vicmae_command.py"), *shrink(words[1:]))
        else:
            process = run_here(*shrink_script(words))
        assert process.returncode == 0, f"{line}\n{process.stdout[-1000:]}\n{process.stderr[-2000:]}"
        return process.stdout

    def expand(self, text: str) -> str:
        """Puts the values of variables; and paths of a machine's root into this folder."""
        text = re.sub(r"\$([A-Za-z_]\w*)", lambda found: self.variables.get(found[1], found[0]), text)
        return re.sub(r"(?<=\s)/data/", "data/", text)


def shrink(argv: list[str]) -> list[str]:
    """Arguments of `vicmae`, with those that make it tiny."""
    command = argv[0]
    if command not in TINY or "--help" in argv:
        return argv
    settings = dict(TINY[command])
    if command in ("pretrain", "plan", "finetune"):
        settings |= tiny_model(argv)
    if command == "finetune" and "--max_train_steps" not in argv:
        settings["eval_epochs"] = 1000
    return [*argv, *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def tiny_model(argv: list[str]) -> dict[str, str]:
    """Settings of a tiny model, where the model is neither a checkpoint's nor small already."""
    recipe = yaml.safe_load(Path(argv[1]).read_text(encoding="utf-8")) if argv[1].endswith(".yaml") else {}
    given = dict(recipe.get("config_overrides") or {})
    if "--config_overrides" in argv:
        pairs = argv[argv.index("--config_overrides") + 1].split(",")
        given = dict(pair.split("=") for pair in pairs)
    is_small = int(given.get("hidden_size", 768)) <= SMALL_WIDTH
    if is_small or "--model_name_or_path" in argv or "model_name_or_path" in recipe:
        return {}
    overrides = given | TINY_MODEL
    return {
        "config_overrides": ",".join(f"{name}={value}" for name, value in overrides.items()),
        "image_size": "32",
    }


def shrink_script(words: list[str]) -> list[str]:
    """`python SCRIPT ...` or `accelerate launch SCRIPT ...`: the script, and its arguments with those of tiny runs."""
    place = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
    if words[0] not in ("python", "accelerate") or place is None:
        raise LookupError(f"nothing here runs: {' '.join(words)}")
    script, argv = words[place], words[place + 1 :]
    source = Path(script).read_text(encoding="utf-8")
    command = re.search(r'^    run\("(\w+)"\)$', source, re.MULTILINE)
    if command and command[1] in COMMANDS:
        argv = shrink([command[1], *argv])[1:]
    elif script.endswith("demo_data.py"):
        argv = [*argv, *TINY_DEMO.split()]
    return [str(Path(script).absolute()), *argv]


@contextlib.contextmanager
def tiny_functions() -> Iterator[None]:
    """Functions of the package with the settings of `TINY`; trials of a plan that take no time."""

    def tiny(function, settings):
        return lambda *values, **given: function(*values, **(given | settings))

    sizes = {"config_overrides": TINY_MODEL, "image_size": 32}
    again = {"overwrite_output_dir": True}  # a page may have a run as a command and as a function
    with (
        mock.patch.object(vicmae_hf, "pretrain", tiny(vicmae_hf.pretrain, FEW_UPDATES | sizes | again), create=True),
        mock.patch.object(vicmae_hf, "finetune", tiny(vicmae_hf.finetune, FEW_UPDATES), create=True),
        mock.patch.object(trial, "MAX_SECONDS", 0.1),
        mock.patch.object(survey, "MAX_SECONDS", 0.5),
        mock.patch.object(survey, "PACKED_SECONDS", 0.5),
    ):
        yield


# What lies there


def write_media(folder: Path) -> None:
    """Videos and images of users, by the names that the pages use."""
    for place in ("my_videos", "my_recordings", "weizmann", "labelled/train/a", "labelled/train/b", "labelled/eval/a"):
        (folder / place).mkdir(parents=True)
        for number in range(3):
            frames = numbered_frames(80, height=48, width=64, seed=number)
            write_video(folder / place / f"{number}.mp4", frames, fps=20)
    shutil.copytree(folder / "labelled" / "eval" / "a", folder / "labelled" / "eval" / "b")
    for name in ("video.mp4", "clip.mp4"):
        shutil.copy(folder / "my_videos" / "0.mp4", folder / name)
    (folder / "my_images").mkdir()
    for number in range(4):
        Image.fromarray(numbered_frames(number + 1, 40, 40, seed=number)[-1]).save(folder / f"my_images/{number}.png")
    pictures = [Image.open(path).convert("RGB") for path in sorted((folder / "my_images").iterdir())]
    table = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    (folder / "cifar10").mkdir()
    table.to_parquet(folder / "cifar10" / "train.parquet")


def write_checkpoints(folder: Path) -> None:
    """Checkpoints of others, tiny, where a name on the Hub would find them."""
    sizes = TINY_MODEL | {"image_size": 32, "patch_size": 16}
    masked = folder / "facebook" / "vit-mae-base"
    ViTMAEForPreTraining(ViTMAEConfig(**sizes)).save_pretrained(masked)
    ViTImageProcessor(size=32).save_pretrained(masked)
    model = ViCMAEForPreTraining(ViCMAEConfig(**sizes, num_frames=4))
    model.save_pretrained(folder / "someone" / "model")
    for processor in build_processors(model.config):
        processor.save_pretrained(folder / "someone" / "model")
    # Of one head, as widths of 64 and, in the decoder, of 32 tell.
    released = sizes | {"hidden_size": 64, "decoder_hidden_size": 32}
    released |= {"num_attention_heads": 1, "decoder_num_attention_heads": 1}
    weights = {"model": revert_state_dict(ViCMAEForPreTraining(ViCMAEConfig(**released)).state_dict())}
    for name in ("vicmae.pth", "vicmae_pretrain_vit_base_in1k_k400.pth"):
        torch.save(weights, folder / name)
    names = (ROOT / "src/vicmae_hf/data/preparing/class_names/kinetics400.txt").read_text(encoding="utf-8").split("\n")
    sizes = {name: size for name, size in sizes.items() if not name.startswith("decoder")}
    labels = dict(enumerate(filter(None, names)))
    config = VideoMAEConfig(**sizes, num_frames=16, id2label=labels, label2id={name: n for n, name in labels.items()})
    folder = folder / "MCG-NJU" / "videomae-base-finetuned-kinetics"
    VideoMAEForVideoClassification(config).save_pretrained(folder)
    VideoMAEImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def write_trees(data: Path) -> None:
    """The datasets of docs/datasets.md in their layouts, with a file or two."""
    video = (data.parent / "video.mp4").read_bytes()
    for split in ("train", "val"):
        write(
            data / "k400" / "annotations" / f"{split}.csv",
            f"label,youtube_id,time_start,time_end,split\nabseiling,{'a' * 11},0,10,{split}\n",
        )
        write(data / "k400" / split / f"{'a' * 11}_000000_000010.mp4", video)
    entry = {"id": "1", "template": "Putting [something] onto [something]"}
    write(data / "ssv2" / "something-something-v2-validation.json", [entry])
    write(data / "ssv2" / "20bn-something-something-v2" / "1.webm", video)
    write(data / "moments" / "trainingSet.csv", "ant/1.mp4,ant,3,0\n")
    write(data / "moments" / "moments_categories.txt", "ant,0\n")
    write(data / "moments" / "training" / "ant" / "1.mp4", video)
    write(data / "imagenet" / "val" / "n01440764" / "ILSVRC2012_val_00000293.JPEG", picture(1))
    write(data / "places365" / "places365_val.txt", "Places365_val_00000001.jpg 0\n")
    write(data / "places365" / "categories_places365.txt", "/a/airfield 0\n")
    write(data / "places365" / "val_256" / "Places365_val_00000001.jpg", picture(2))
    write(data / "mine" / "train" / "ant" / "1.mp4", video)
    write(data / "mine" / "val" / "ant" / "1.mp4", video)
    write(data / "mine" / "train.csv", "train/ant/1.mp4 ant\n")


# What the README and other pages make, for pages that begin with it.
BEGUN = (
    "python examples/demo_data/demo_data.py --output data/demo",
    "cp -r data/demo data/demo_large",
    "vicmae pretrain examples/pytorch/configs/demo.yaml",
    "vicmae pretrain my_videos my_images -o outputs/mine",
    "vicmae finetune labelled/train --eval_data labelled/eval --task video --model_name_or_path outputs/mine "
    "-o outputs/classifier --num_frames 16",
)


def lay_out(folder: Path) -> None:
    """Puts there what a reader has."""
    folder.mkdir()
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    write_media(folder)
    write_checkpoints(folder)
    write_trees(folder / "data")
