"""
Estimates what a pretraining run takes, and trains nothing: files and hours, updates and checkpoints, FLOPs, memory,
time here and on named GPUs, and whether a frame store is worth it.

Examples:

    vicmae plan my_videos --preset small-data
    vicmae plan my_settings.yaml my_videos --num_processes 8 --output plan.json

It takes the settings of `vicmae pretrain` (Table 1 is the paper's). docs/planning.md says how each figure is found.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import Accelerator

from ..classification.arguments import ClassificationArguments
from ..files import check_writable, write_json
from ..planning.costs import DEFAULT_MFU
from ..planning.plan import plan_training
from ..planning.report import report
from ..planning.trainings import open_classification, open_pretraining, scratch_folder
from ..pretraining.presets import PresetArguments
from ..settings import ArgumentsError, setting
from ..training.engines import check_engine
from ..training.session.calling import start


@dataclass(kw_only=True)
class PlanArguments(PresetArguments):
    output_dir: str | None = setting(None, "output folder of the run; nothing is written there")
    output: str | None = setting(None, "file for all figures, NAME.json")
    num_processes: int = setting(1, "processes of the run, one for each GPU", minimum=1)
    mfu: float = setting(
        DEFAULT_MFU, "share of a GPU's peak FLOP/s that the run is assumed to reach", above=0, maximum=1
    )


def run(arguments: PlanArguments) -> dict[str, Any]:
    return plan_of(arguments, arguments.num_processes, arguments.mfu, arguments.output)


def plan_of(
    arguments: PresetArguments | ClassificationArguments,
    num_processes: int,
    mfu: float = DEFAULT_MFU,
    output: str | None = None,
) -> dict[str, Any]:
    """Plans a training by its settings, prints the plan, and writes it if there is an `output`."""
    if output is not None:
        if not output.endswith(".json") or os.path.isdir(output):  # not a video, by a mistake
            raise ArgumentsError(
                f"--output {output}: expected the name of a file that ends in .json, such as plan.json."
            )
        check_writable(output)
    check_engine(arguments.mixed_precision)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    with scratch_folder(arguments):
        if isinstance(arguments, PresetArguments):
            training = open_pretraining(accelerator, arguments, num_processes)
        else:
            training = open_classification(arguments, num_processes)
        plan = plan_training(accelerator, training, mfu)
    plan["settings"]["output_dir"] = arguments.output_dir
    print(report(plan))
    if output is not None:
        write_json(output, plan)
        print(f"All figures: {output}")
    return plan


def plan_launched(arguments: PresetArguments | ClassificationArguments) -> dict[str, Any]:
    """`--plan` of a training: the first of its processes plans for all of them."""
    if int(os.environ.get("RANK", 0)) > 0:
        return {}
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)  # else Accelerate would wait for the others, which have ended
    return plan_of(arguments, num_processes)


def main(argv: Sequence[str] | None = None) -> None:
    start(PlanArguments, run, argv)
