"""
The study of real pictures and real people: methods, baselines and peers on CIFAR-10, video models on people that they
have not seen; writes a report.

    python examples/study/run_real.py examples/study/real/real.yaml --images CIFAR --videos WEIZMANN

If interrupted, run it again: it continues. docs/study_real.md explains.
"""

from pathlib import Path

from real.images import study_images
from real.plan import RealArguments
from real.report import write_report
from real.videos import study_videos
from study_report import check_report

from vicmae_hf.command_line import parse_arguments
from vicmae_hf.training.session.scripts import run_script


def main() -> None:
    real = parse_arguments(RealArguments)
    report = Path(real.report or real.folder / "report.md")
    check_report(report)
    results = {"images": study_images(real), "videos": study_videos(real)}
    write_report(real, results, report)
    print(f"Report: {report}. Figures: {real.folder}/all_results.json")


if __name__ == "__main__":
    run_script(main)
