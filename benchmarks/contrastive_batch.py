"""What it costs to contrast many pairs: in one batch, by plain accumulation, and across accumulation.

    python benchmarks/contrastive_batch.py

On a GPU, if there is one, ViT-B/16 in bf16; else a tiny model on the CPU. Whole updates of the training loop on
synthetic batches. Plain accumulation compares the pairs of one step only; across accumulation
(`--contrast_across_accumulation`) all pairs of an update are compared, as in one batch.

Memory is the peak above what there was before the first update: of what is allocated on a GPU; on the CPU of the
process, of which each row has its own. There, time is that of one thread on a processor, so that what else the machine
does counts little; and a batch is not run that would need more than half of the free memory.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator

import torch
from bare import stand_in_for_readers


stand_in_for_readers()

import psutil  # noqa: E402
from gpu_checks import build_updates  # noqa: E402
from peers import CONFIGS as PEER_CONFIGS  # noqa: E402

from vicmae_hf import ViCMAEConfig  # noqa: E402
from vicmae_hf.pretraining.contrast import look_ahead  # noqa: E402
from vicmae_hf.training.devices.peaks import peak_memory_mib  # noqa: E402
from vicmae_hf.training.loop import Updates  # noqa: E402


ON_GPU = torch.cuda.is_available()
clock = time.perf_counter if ON_GPU else time.process_time


def tiny_config(**settings) -> ViCMAEConfig:
    """A size for the CPU: 32 pixels, 4 of 16 patches visible."""
    sizes = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    decoder = {"hidden_size": 96, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 384}
    decoder = {f"decoder_{name}": value for name, value in decoder.items()}
    return ViCMAEConfig(**sizes, **decoder, image_size=32, patch_size=8, **settings)


CONFIGS = {"tiny": tiny_config} | PEER_CONFIGS
WAYS = ("one batch", "accumulation", "across accumulation")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--size", choices=CONFIGS, default="base" if ON_GPU else "tiny")
    parser.add_argument("--pairs", type=int, nargs="+", default=[64, 512, 4096], help="of an update")
    parser.add_argument("--micro_batch", type=int, default=64 if ON_GPU else 16, help="pairs of a step")
    parser.add_argument("--objective", choices=["info_nce", "nt_xent", "simsiam", "vicreg"], default="info_nce")
    parser.add_argument("--mixed_precision", choices=["no", "bf16", "fp16"], default="bf16" if ON_GPU else "no")
    parser.add_argument("--updates", type=int, default=1, help="timed, after one that is not; the table has medians")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # a way and pairs, in a process of its own
    return parser.parse_args()


def copy_batches(batches: Iterator[dict]) -> Iterator[dict]:
    """Each batch has memory of its own, as those of a loader have: an update may hold many."""
    for batch in batches:
        yield {name: tensor.clone() for name, tensor in batch.items()}


def build_way(arguments: argparse.Namespace, way: str, num_pairs: int) -> Updates:
    batch_size = num_pairs if way == "one batch" else min(arguments.micro_batch, num_pairs)
    config = CONFIGS[arguments.size](contrastive_loss=arguments.objective)
    precision, accumulation = arguments.mixed_precision, num_pairs // batch_size
    updates = build_updates(config, batch_size, precision, wrap_batches=copy_batches, accumulation=accumulation)
    if way == "across accumulation":
        updates.compute_losses, batches = look_ahead(
            updates.accelerator, updates.compute_losses, updates.batches, updates.schedule, seed=0
        )
        updates.batches = iter(batches)
    return updates


def peak_mib() -> float:
    peak = peak_memory_mib(torch.device("cuda" if ON_GPU else "cpu"))
    return peak["peak_gpu_memory_mib"] if ON_GPU else peak["peak_memory_mib"]


def measure(arguments: argparse.Namespace, way: str, num_pairs: int) -> dict[str, float]:
    """Returns seconds of an update, and MiB."""
    torch.set_num_threads(1)
    updates = build_way(arguments, way, num_pairs)
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    before, seconds = peak_mib(), []
    for step in range(1 + arguments.updates):
        start = clock()
        updates.make(step)
        updates.read_losses()  # waits for the device
        seconds.append(clock() - start)
    return {"seconds": statistics.median(seconds[1:]), "mib": peak_mib() - before}


def measure_apart(arguments: argparse.Namespace, way: str, num_pairs: int) -> dict[str, float]:
    """As `measure`; on the CPU in a process of its own, whose peak is this row's."""
    if ON_GPU:
        torch.cuda.empty_cache()
        return measure(arguments, way, num_pairs)
    command = [sys.executable, *sys.argv, "--measure", way, str(num_pairs)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def describe(arguments: argparse.Namespace, way: str, num_pairs: int, needed_mib: float) -> tuple[str, float]:
    """Measures a row, unless it needs more memory than there is. Returns its last cells, and MiB."""
    if not ON_GPU and needed_mib > psutil.virtual_memory().available / 2**20 / 2:
        return f"not run | | about {needed_mib:,.0f} MiB", needed_mib
    try:
        figures = measure_apart(arguments, way, num_pairs)
    except torch.OutOfMemoryError:
        return "out of memory | | ", needed_mib
    rate = num_pairs / figures["seconds"]
    return f"{figures['seconds']:.2f} | {rate:,.0f} | {figures['mib']:,.0f} MiB", figures["mib"]


def main() -> None:
    arguments = parse_arguments()
    if arguments.measure:
        way, num_pairs = arguments.measure
        print(json.dumps(measure(arguments, way, int(num_pairs))))
        return
    device = torch.cuda.get_device_name() if ON_GPU else "CPU, one thread"
    print(
        f"{arguments.size}, {arguments.objective}, {arguments.mixed_precision}; {device}; torch {torch.__version__}\n"
    )
    print("| pairs of an update | way | compared with each other | s per update | pairs/s | memory |")
    print("|---|---|---|---|---|---|")
    per_pair = dict.fromkeys(WAYS, 0.0)  # MiB, of the row before
    for num_pairs in arguments.pairs:
        step = min(arguments.micro_batch, num_pairs)
        for way in WAYS:
            # Only the memory of one batch grows with its pairs.
            expected = per_pair[way] * num_pairs if way == "one batch" else 0.0
            cells, mib = describe(arguments, way, num_pairs, expected)
            per_pair[way] = mib / num_pairs
            division = "" if way == "one batch" else f", {num_pairs // step} x {step}"
            compared = step if way == "accumulation" else num_pairs
            print(f"| {num_pairs:,} | {way}{division} | {compared:,} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
