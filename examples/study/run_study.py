"""
The study of the paper's baselines: pretrains MAE, MAE + SimSiam, MAE + VICReg and ViC-MAE under one budget, several
times each, and ViC-MAE on other frame gaps; probes them with all labels and with parts of them; writes a report.

    python examples/study/run_study.py --recipe examples/study/study.yaml \
        --train_data data/study/appearance/train data/study/motion/train data/study/images/train \
        --probe_train_data data/study/appearance/train --probe_eval_data data/study/appearance/eval \
        --output_dir outputs/study --report docs/study.md

If interrupted, run it again: it continues. `accelerate launch` runs it in several processes. docs/study.md explains.
"""

from pathlib import Path

from accelerate import PartialState
from study_plan import StudyArguments
from study_report import check_report, write_report
from study_runs import run_study

from vicmae_hf.command_line import parse_arguments
from vicmae_hf.training.engines import check_engine
from vicmae_hf.training.session.scripts import run_script


def main() -> None:
    arguments = parse_arguments(StudyArguments)
    check_engine()
    report = Path(arguments.report or Path(arguments.output_dir) / "report.md")
    check_report(report)
    results = run_study(arguments)
    if PartialState().is_main_process:
        write_report(results, report)
        print(f"Report: {report}. Figures: {arguments.output_dir}/all_results.json")
    PartialState().destroy_process_group()


if __name__ == "__main__":
    run_script(main)
