"""What an update of pretraining takes beside the same ViT in other libraries.

    python benchmarks/step.py

Whole updates (bytes, normalisation, forward, backward, AdamW) on synthetic pairs. Ours and the peers take turns in one
process. A ratio is a way's time over ours in the same round, compiled or not as that way is; the table has the median
over the rounds, and the smallest and largest. The peers are masked autoencoders over both views; ours does the same
("as MAE"), or the recipe of Table 1 (the first view reconstructed, the two contrasted).

    python benchmarks/step.py --authors CHECKOUT

adds the authors' model, from a checkout of github.com/jeffhernandez1995/ViC-MAE, and ours with its work ("both": both
views reconstructed and contrasted), over which its ratio is. `--precisions no bf16` makes each way in both precisions;
all ratios are over ours in the first.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bare import stand_in_for_readers


stand_in_for_readers()

from gpu import DTYPES, our_step, peer_step  # noqa: E402
from gpu_checks import DEVICE  # noqa: E402
from peers import CONFIGS, AuthorsPeer, TimmPeer, ViTMAEPeer  # noqa: E402


ON_GPU = DEVICE.type == "cuda"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=["small", "base"])
    parser.add_argument("--pairs", type=int, default=128 if ON_GPU else 8)
    parser.add_argument("--mask_ratio", type=float, default=0.75)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of a CPU; default: PyTorch's")
    usual = ["bf16" if ON_GPU else "no"]
    parser.add_argument(
        "--precisions", nargs="+", choices=DTYPES, default=usual, help="default: bf16 on a GPU, else no"
    )
    parser.add_argument("--authors", type=Path, help="a checkout of the authors' code; it needs timm")
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="compiled ones, too")
    return parser.parse_args()


def build_steps(size: str, arguments: argparse.Namespace) -> dict[str, tuple[Callable[[], None], str]]:
    """Builds the step of each way, with the name of ours that it is measured over. Leaves out peers not installed."""
    masked = {"mask_ratio": arguments.mask_ratio}
    plain = CONFIGS[size](reconstruct="both", contrastive_loss="none", **masked)
    both = CONFIGS[size](reconstruct="both", **masked)
    ways = {
        "ours as MAE": (our_step, plain, "ours as MAE"),
        "ours, recipe": (our_step, CONFIGS[size](**masked), "ours as MAE"),
        "ViTMAE": (partial(peer_step, peer=ViTMAEPeer), plain, "ours as MAE"),
        "timm": (partial(peer_step, peer=TimmPeer), plain, "ours as MAE"),
    }
    if arguments.authors:
        authors = partial(AuthorsPeer, checkout=arguments.authors)
        ways["ours, both"] = (our_step, both, "ours, both")
        ways["authors"] = (partial(peer_step, peer=authors), both, "ours, both")
    steps = {}
    first = arguments.precisions[0]
    modes = itertools.product((False, True) if arguments.compiled else (False,), arguments.precisions)
    for (compiled, precision), (name, (build, config, ours)) in itertools.product(modes, ways.items()):
        if compiled and name == "authors":  # torch.compile refuses their loss: a view is written in place
            continue
        mode = ", compiled" * compiled
        suffix = mode + f", {precision}" * (precision != first)
        try:
            step = build(config, arguments.pairs, precision=precision, compiled=compiled)
        except ImportError as error:
            print(f"({name} is left out: {error})", file=sys.stderr)
            continue
        steps[name + suffix] = (step, ours + mode)
    return steps


def time_step(step: Callable[[], None]) -> float:
    if ON_GPU:
        torch.cuda.synchronize()
    before = time.perf_counter()
    step()
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter() - before


def main() -> None:
    arguments = parse_arguments()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.cuda.get_device_name() if ON_GPU else f"CPU, {torch.get_num_threads()} threads"
    print(f"{arguments.pairs} pairs, mask ratio {arguments.mask_ratio}; {device}; torch {torch.__version__}\n")
    print("| size | way | s per update | over ours | smallest | largest |\n|---|---|---|---|---|---|")
    for size in arguments.sizes:
        steps = build_steps(size, arguments)
        for step, _ in steps.values():  # warm up, compile
            step()
        rounds = [{name: time_step(step) for name, (step, _) in steps.items()} for _ in range(arguments.rounds)]
        for name, (_, ours) in steps.items():
            ratios = [times[name] / times[ours] for times in rounds]
            seconds = statistics.median(times[name] for times in rounds)
            spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}"
            print(f"| {size} | {name} | {seconds:.3f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
