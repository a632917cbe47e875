"""What pretraining costs on a GPU, and whether its results are right there. One command, about 8 minutes:

    python benchmarks/gpu.py

Needs torch and Transformers, and this repository's `src` on PYTHONPATH or installed. First the checks of
`gpu_checks.py`; then whole updates (bytes to the device, normalisation, forward, backward, AdamW) in bf16 on synthetic
batches, made by the training loop itself. Model FLOPs utilisation (MFU) is `update_flops` over time, over the dense
bf16 peak of the device. Peers take turns in the same run. Exit status 1 if a check fails. A row that cannot be
measured says why, and those after it are measured all the same. Rows are printed, and kept in `--output`, one by one.

    python benchmarks/gpu.py --store FRAME_STORE

adds a table of updates end to end, loader included: it needs datasets and simplejpeg, too, and is all that is measured
where there is no GPU. `examples/pytorch/pack_frames.py` makes a store.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bare import stand_in_for_readers
from torch import nn


MISSING = stand_in_for_readers()

from gpu_checks import CHECKS, DEVICE, PIXELS, build_updates, synthetic_batches  # noqa: E402
from peers import CONFIGS, AuthorsPeer, TimmPeer, ViTMAEPeer  # noqa: E402

from vicmae_hf import ViCMAEConfig  # noqa: E402
from vicmae_hf.data.samples.augmentation import PixelNormalizer  # noqa: E402
from vicmae_hf.pretraining.flops import update_flops  # noqa: E402
from vicmae_hf.training.devices.peaks import peak_flops  # noqa: E402
from vicmae_hf.training.loop import gradient_norm  # noqa: E402


DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = ("model", "mode", "pairs", "ms", "spread", "pairs/s", "MFU", "GiB", "attention")
STORE_COLUMNS = ("from the store", "mode", "pairs", "workers", "pairs/s", "MFU", "waiting")
MODES = ("eager", "compiled")
NEEDED_BY_STORES = {"datasets", "simplejpeg"}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=["base", "large"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128, 256, 512])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=int, default=12, help="timed updates of a row; the table shows medians")
    parser.add_argument("--seconds", type=float, default=480, help="no row begins later")
    parser.add_argument("--checks", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--peers", action=argparse.BooleanOptionalAction, default=True, help="with the first batch size"
    )
    parser.add_argument(
        "--authors", type=Path, help="a checkout of the authors' code: their model, also with --no-peers"
    )
    parser.add_argument("--store", help="a frame store: updates end to end, too")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="that load from --store")
    parser.add_argument("--output", type=Path, help="folder for the rows as JSON, and for the kernels of each row")
    return parser.parse_args()


def run_checks() -> bool:
    is_right = True
    for check in CHECKS:
        try:
            for name, passed, text in check():
                is_right &= passed
                print(f"{'ok  ' if passed else 'FAIL'} {name}: {text}", flush=True)
        except Exception as error:  # a check that cannot run has failed; the others, and the table, still tell much
            is_right = False
            print(f"FAIL {check.__name__}: {type(error).__name__}: {str(error)[:600]}", flush=True)
    return is_right


def time_steps(step: Callable[[], None], num_steps: int) -> list[float]:
    """Times updates by events on the device: milliseconds. The host may run ahead, as it does in training."""
    for _ in range(3):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(num_steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in itertools.pairwise(events)]


def list_kernels(step: Callable[[], None]) -> list[tuple[str, float]]:
    """Lists the kernels of one update with their milliseconds, longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    kernels = [(event.key, event.self_device_time_total / 1000) for event in profile.key_averages()]
    return sorted(kernels, key=lambda kernel: -kernel[1])


def attention_share(kernels: list[tuple[str, float]]) -> float:
    words = ("flash", "fmha", "attention", "softmax", "sdpa")
    attention = sum(time for name, time in kernels if any(word in name.lower() for word in words))
    total = sum(time for _, time in kernels)
    return attention / total if total else float("nan")  # a machine may forbid the profiler


def our_step(config: ViCMAEConfig, batch_size: int, compiled: bool, precision: str = "bf16") -> Callable[[], None]:
    """Makes whole updates by the training loop."""
    updates = build_updates(config, batch_size, precision, compiled)
    numbers = iter(range(10**6))
    return lambda: updates.make(next(numbers))


def peer_step(
    config: ViCMAEConfig,
    batch_size: int,
    peer: Callable[[ViCMAEConfig], nn.Module],
    compiled: bool = False,
    precision: str = "bf16",
    waits: bool = False,
) -> Callable[[], None]:
    """
    Makes whole updates of a peer: the same bytes, autocast, fused AdamW.

    Args:
        waits: as in the authors' loop, AdamW is not fused, gradients are unscaled for their norm, and the program
            waits for the loss and for the end of an update.
    """
    with DEVICE:  # as ours
        model = peer(config).train()
    if compiled:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=not waits)
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=precision == "fp16")
    batches = synthetic_batches(config, batch_size)
    normalize = PixelNormalizer(PIXELS.image_mean, PIXELS.image_std).to(DEVICE)

    def step() -> None:
        views = normalize(next(batches)["pixel_values"])
        with torch.autocast(DEVICE.type, dtype=DTYPES[precision], enabled=precision != "no"):
            loss = model(views)
        if waits:
            loss.item()
        scaler.scale(loss).backward()
        if waits:
            scaler.unscale_(optimizer)
            gradient_norm(model)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if waits and DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return step


def start_anew() -> None:
    """Leaves the memory of the row before; every row compiles for its own shapes."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()  # (nothing, without a GPU)


def measure(build: Callable[[], Callable[[], None]], num_steps: int) -> tuple[dict[str, float], list]:
    """Measures one row: milliseconds, spread, GiB, share of attention; and the kernels of an update."""
    torch.cuda.reset_peak_memory_stats()
    step = build()
    times = time_steps(step, num_steps)
    kernels = list_kernels(step)
    figures = {
        "ms": statistics.median(times),
        "spread": (max(times) - min(times)) / 2 / statistics.median(times),
        "GiB": torch.cuda.max_memory_allocated() / 2**30,
        "attention": attention_share(kernels),
    }
    return figures, kernels


def in_both_modes(name: str, config: ViCMAEConfig) -> list[tuple[str, ViCMAEConfig, Callable]]:
    return [(name, config, partial(our_step, compiled=compiled)) for compiled in (False, True)]


def list_rows(arguments: argparse.Namespace) -> Iterator[tuple[str, str, int, Callable, float]]:
    """Lists what is measured: model, mode, pairs, what builds its step, and the FLOPs of an update."""
    for batch_size in arguments.batches:
        for size in arguments.sizes:
            config, both = CONFIGS[size](), CONFIGS[size](reconstruct="both")
            # As masked autoencoders, the peers do what ours does without its objective on pairs.
            plain = CONFIGS[size](reconstruct="both", contrastive_loss="none")
            rows = in_both_modes("ours", config)
            if batch_size == arguments.batches[0] and (arguments.peers or arguments.authors):
                rows += in_both_modes("ours, both", both)
            if batch_size == arguments.batches[0] and arguments.authors:
                authors = partial(AuthorsPeer, checkout=arguments.authors)
                rows += [("authors, fp16", both, partial(peer_step, peer=authors, precision="fp16"))]
                waiting = partial(peer_step, peer=authors, precision="fp16", waits=True)
                rows += [("authors, fp16, their loop", both, waiting)]
            if batch_size == arguments.batches[0] and arguments.peers:
                rows += in_both_modes("ours, MAE", plain)
                rows += [
                    ("ViTMAE", plain, partial(peer_step, peer=ViTMAEPeer)),
                    ("timm, fp16", plain, partial(peer_step, peer=TimmPeer, precision="fp16")),
                    ("ViTMAE", plain, partial(peer_step, peer=ViTMAEPeer, compiled=True)),  # compiles the longest
                ]
            for name, row_config, build in rows:
                mode = "compiled" if build.keywords.get("compiled") else "eager"
                flops = update_flops(row_config, batch_size)
                if mode in arguments.modes or name.startswith("authors"):
                    yield f"{size}, {name}", mode, batch_size, partial(build, row_config, batch_size), flops


def print_header(columns: Sequence[str]) -> None:
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns), flush=True)


def try_row(cells: str, measure_row: Callable[[], Any], is_late: bool) -> Any:
    """Returns what a row measured. If it cannot be measured, says why in the table and returns None."""
    if is_late:
        print(f"| {cells} | no time left |", flush=True)
        return None
    start_anew()
    try:
        return measure_row()
    except torch.OutOfMemoryError:
        reason = "out of memory"
    except Exception as error:  # of any kind: the rows after it still tell much
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    print(f"| {cells} | {reason} |", flush=True)
    return None


def measure_steps(arguments: argparse.Namespace, started: float, peak: float | None) -> Iterator[dict[str, Any]]:
    """Prints the table of updates on synthetic batches; yields its rows."""
    print_header(COLUMNS)
    for model, mode, batch_size, build, flops in list_rows(arguments):
        cells, begun = f"{model} | {mode} | {batch_size}", time.monotonic()
        measured = try_row(cells, partial(measure, build, arguments.steps), begun - started > arguments.seconds)
        if measured is None:
            continue
        figures, kernels = measured
        mfu = flops / (figures["ms"] / 1000) / peak if peak else float("nan")
        rate = batch_size / figures["ms"] * 1000
        print(
            f"| {cells} | {figures['ms']:.1f} | ± {figures['spread']:.1%} | {rate:.0f} | "
            f"{mfu:.1%} | {figures['GiB']:.1f} | {figures['attention']:.1%} |",
            flush=True,
        )
        if arguments.output:
            with (arguments.output / "kernels.txt").open("a") as file:
                total = sum(time for _, time in kernels)  # below the update's: the device waited for the program
                lines = [f"{model}, {mode}, {batch_size}: {total:.1f} ms of kernels, {figures['ms']:.1f} ms an update"]
                lines += [f"{time:9.3f} ms  {kernel[:160]}" for kernel, time in kernels[:60]]
                file.write("\n" + "\n".join(lines) + "\n")
        seconds = time.monotonic() - begun  # of the row, compiling included
        yield {"model": model, "mode": mode, "pairs": batch_size, **figures, "MFU": mfu, "seconds": seconds}


def measure_store(arguments: argparse.Namespace, started: float, peak: float | None) -> Iterator[dict[str, Any]]:
    """Prints the table of updates from the store; yields its rows."""
    from store_steps import measure_from_store  # here: it reads data, which needs more than a GPU

    print()
    print_header(STORE_COLUMNS)
    modes = arguments.modes if DEVICE.type == "cuda" else ["eager"]
    for batch_size, size, mode in itertools.product(arguments.batches, arguments.sizes, modes):
        config, cells = CONFIGS[size](), f"{size} | {mode} | {batch_size} | {arguments.num_workers}"
        settings = (config, batch_size, mode == "compiled", arguments.steps, arguments.num_workers)
        measure_row = partial(measure_from_store, arguments.store, *settings)
        figures = try_row(cells, measure_row, time.monotonic() - started > arguments.seconds)
        if figures is None:
            continue
        flops_per_pair = update_flops(config, batch_size) / batch_size
        mfu = flops_per_pair * figures["pairs/s"] / peak if peak else float("nan")
        print(f"| {cells} | {figures['pairs/s']:.1f} | {mfu:.1%} | {figures['waiting']:.1%} |", flush=True)
        row = {"store": arguments.store, "model": size, "mode": mode, "pairs": batch_size}
        yield {**row, "workers": arguments.num_workers, **figures, "MFU": mfu}


def main() -> None:
    arguments = parse_arguments()
    started = time.monotonic()
    has_gpu = torch.cuda.is_available()
    if arguments.authors and not (arguments.authors / "models_vicmae.py").is_file():
        sys.exit(f"error: --authors {arguments.authors} has no models_vicmae.py: it is no checkout of their code")
    if arguments.authors and importlib.util.find_spec("timm") is None:
        sys.exit("error: --authors needs timm: pip install timm")
    if not has_gpu and not arguments.store:
        sys.exit("error: no CUDA device is available; this benchmark measures one (without one, only --store)")
    if arguments.store and not Path(arguments.store).exists():  # else every row would say so, one by one
        sys.exit(f"error: --store {arguments.store}: there is no such folder or file")
    if arguments.store and (missing := NEEDED_BY_STORES.intersection(MISSING)):
        sys.exit(f"error: --store needs {' and '.join(sorted(missing))}: pip install {' '.join(sorted(missing))}")
    name = torch.cuda.get_device_name() if has_gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; placeholders for: {', '.join(MISSING) or 'nothing'}")
    is_right = run_checks() if has_gpu and arguments.checks else True
    print(f"checks: {time.monotonic() - started:.0f} s\n")
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
    rows, tables = [], [measure_steps] * has_gpu + [measure_store] * bool(arguments.store)
    for row in itertools.chain.from_iterable(table(arguments, started, peak_flops(DEVICE)) for table in tables):
        rows.append(row)
        if arguments.output:  # after every row, in case it is the last
            (arguments.output / "rows.json").write_text(json.dumps({"device": name, "rows": rows}, indent=1))
    print(f"\n{time.monotonic() - started:.0f} s")
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
