"""What an update of pretraining takes beside the same ViT in other libraries.

    python benchmarks/step.py

Whole updates (bytes, normalisation, forward, backward, AdamW) on synthetic pairs. Ours and the peers take turns in one
process. A ratio is a peer's time over ours in the same round; the table has the median over the rounds, and the
smallest and largest. The peers are masked autoencoders over both views; ours does the same ("as MAE"), or the recipe
of Table 1 (the first view reconstructed, the two contrasted). On a CPU in float32, on a GPU in bf16.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from bare import stand_in_for_readers


stand_in_for_readers()

from gpu import our_step, peer_step  # noqa: E402
from gpu_checks import DEVICE  # noqa: E402
from peers import CONFIGS, TimmPeer, ViTMAEPeer  # noqa: E402


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
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True, help="compiled ones, too")
    return parser.parse_args()


def build_steps(size: str, arguments: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """Builds the step of each way. Peers that are not installed are left out."""
    masked = {"mask_ratio": arguments.mask_ratio}
    plain = CONFIGS[size](reconstruct="both", contrastive_loss="none", **masked)
    precision = "bf16" if ON_GPU else "no"
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    steps = {}
    for compiled in (False, True) if arguments.compiled else (False,):
        mode = ", compiled" if compiled else ""
        steps[f"ours as MAE{mode}"] = our_step(plain, arguments.pairs, compiled, precision)
        steps[f"ours, recipe{mode}"] = our_step(CONFIGS[size](**masked), arguments.pairs, compiled, precision)
        for name, peer in {"ViTMAE": ViTMAEPeer, "timm": TimmPeer}.items():
            try:
                steps[name + mode] = peer_step(plain, arguments.pairs, peer, dtype, compiled)
            except ImportError as error:
                print(f"({name} is left out: {error})", file=sys.stderr)
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
    print("| size | way | s per update | over ours as MAE | smallest | largest |\n|---|---|---|---|---|---|")
    for size in arguments.sizes:
        steps = build_steps(size, arguments)
        for step in steps.values():  # warm up, compile
            step()
        rounds = [{name: time_step(step) for name, step in steps.items()} for _ in range(arguments.rounds)]
        for name in steps:
            ours = "ours as MAE, compiled" if name.endswith("compiled") else "ours as MAE"
            ratios = [times[name] / times[ours] for times in rounds]
            seconds = statistics.median(times[name] for times in rounds)
            spread = f"{statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f}"
            print(f"| {size} | {name} | {seconds:.3f} | {spread} |", flush=True)


if __name__ == "__main__":
    main()
