"""Puts a plan into words."""

from typing import Any

from .costs import CUDA_GIB, LAYER_SECONDS
from .plan import GIB, THIS_MACHINE


def readable_size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def readable_time(seconds: float) -> str:
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length or (unit == "h" and seconds >= length):
            return f"{seconds / length:.2g} {unit}" if seconds < 10 * length else f"{seconds / length:.0f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def report(plan: dict[str, Any]) -> str:
    """Puts a plan into words, in lines that fit a terminal."""
    return "\n".join(
        [
            *report_data(plan["data"], plan["settings"]),
            *report_run(plan["run"], plan["settings"], plan["data"]["num_samples"]),
            *report_checkpoints(plan["checkpoints"]),
            *report_costs(plan["compute"], plan["memory"]),
            *report_time(plan["time"], plan["memory"]),
            *report_store(plan["frame_store"], plan["time"], plan["settings"]),
        ]
    )


def report_data(data: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    size = "" if data["bytes"] is None else f", {readable_size(data['bytes'])}"
    divided = "" if data["num_items"] == data["num_files"] else f" ({data['num_items']:,} segments)"
    about, sampled = "", "read: all"
    if data["num_sampled"] < data["num_items"]:
        about, sampled = "about ", f"from {data['num_sampled']} read at random"
    lines = [
        f"data          {', '.join(data['names'])}: {data['num_files']:,} files{divided}{size}",
        f"              {about}{data['videos']:,} videos{' or segments' * bool(divided)} of {data['hours']:.3g} h, "
        f"{data['images']:,} images ({sampled})",
    ]
    bound = data["unreadable_share_at_most"]
    at_most = "" if bound == data["unreadable_share"] else f"; of all, with 95 % confidence, at most {bound:.1%}"
    lines.append(f"              unreadable: {len(data['failures'])} of {data['num_sampled']}{at_most}")
    if data["is_too_unreadable"]:
        lines.append(f"              more than --max_bad_files {settings['max_bad_files']:g} allows: a run would stop")
    return lines + [f"              - {failure['error']}" for failure in data["failures"][:3]]


def report_run(run: dict[str, Any], settings: dict[str, Any], num_samples: int) -> list[str]:
    names = ("per_device_train_batch_size", "gradient_accumulation_steps")
    division = " x ".join(str(number) for number in (*map(settings.get, names), run["num_processes"]))
    plural = "s" * (run["steps_per_epoch"] != 1)
    lines = [
        f"run           {run['num_steps']:,} updates of {run['total_batch_size']:,} samples each ({division}: batch x "
        "accumulation x processes)",
        f"              an epoch is one pass over {num_samples:,} samples, in {run['steps_per_epoch']:,} "
        f"update{plural}; the run has {run['epochs']:.4g} epochs",
    ]
    if settings["max_train_steps"]:
        lines.append("              its length comes from --max_train_steps, not from num_train_epochs")
    lines.append(
        f"              warmup until update {run['warmup_steps']:.0f}, peak learning rate {run['learning_rate']:.3g}"
    )
    start = run["contrastive_start_step"]
    if start == 0:
        lines.append("              the contrastive loss counts from the first update on")
    elif start is not None:
        lines.append(
            f"              the contrastive loss starts after update {start:,} (epoch "
            f"{run['contrastive_start_epoch']:.4g}, {start / run['num_steps']:.0%} of the run)"
        )
    if run["repeats_samples"]:
        consequence = "" if start is None else ", and repeats are false negatives"
        lines.append(f"              fewer samples than a batch: a batch repeats them{consequence}")
    return lines


def report_checkpoints(checkpoints: dict[str, Any]) -> list[str]:
    steps = checkpoints["steps"]
    if not steps:
        return ["checkpoints   none (--checkpointing_steps 0)"]
    shown = [f"{step:,}" for step in (steps if len(steps) <= 4 else [*steps[:2], steps[-1]])]
    if len(steps) > 4:
        shown.insert(2, "...")
    return [
        f"checkpoints   {len(steps)}, of {readable_size(checkpoints['bytes_each'])} each, after updates "
        f"{', '.join(shown)}; {readable_size(checkpoints['bytes_at_most'])} on disk at most"
    ]


def report_costs(compute: dict[str, Any], memory: dict[str, Any]) -> list[str]:
    trained = compute["num_trained"]
    part = "" if trained == compute["num_parameters"] else f", {trained / 1e6:.3g} of them trained"
    totals = {name: f"{total / GIB:.3g} GiB" for name, total in memory["total"].items()}
    lines = [
        f"computation   {compute['flops']:.2e} FLOPs ({compute['flops_per_update']:.2e} an update), "
        f"{compute['num_parameters'] / 1e6:.3g} million parameters{part}",
        f"memory        about {totals['float32']} in float32, {totals['bf16']} in bf16, per process: "
        f"{memory['states'] / GIB:.2g} GiB for weights, gradients and AdamW;",
        "              activations are counted in forward passes of 2 and of 4 samples; CUDA itself takes "
        f"{CUDA_GIB} GiB more",
    ]
    if memory["out_of_memory"]:
        lines.append("              measured on this GPU: out of memory")
    elif memory["measured_on_gpu"] is not None:
        lines.append(f"              measured on this GPU: {memory['measured_on_gpu'] / GIB:.3g} GiB")
    return lines


def report_time(times: dict[str, Any], memory: dict[str, Any]) -> list[str]:
    lines, here = [], times["here"]
    if here is not None:
        lines.append(
            f"time          here {readable_time(here['seconds'])}: {here['samples_per_second']:.3g} samples/s, "
            f"measured on updates of {here['batch_of_measurement']} ({here['device']})"
        )
    mfu, floor = times["gpus"][0]["mfu"], f"{1000 * LAYER_SECONDS:.2g} ms"
    lines += [
        f"{'' if lines else 'time':<14}computed for one GPU per process, in bf16, at {mfu:.0%} of its FLOP/s "
        "(MFU; docs/performance.md: ViT-B",
        f"              17 to 30 %, ViT-L 27 to 38 % on an H100), and at least {floor} per layer and step:",
        "                GPU                  samples/s         time   with this machine's loading   memory",
    ]
    for gpu in times["gpus"]:
        fit = "fits" if memory["total"]["bf16"] / GIB + CUDA_GIB < gpu["gib"] else "too small"
        alone, loaded = (readable_time(gpu[name]) for name in ("seconds", "seconds_with_loading_here"))
        waits = f"{loaded}, waits {gpu['wait_share_with_loading_here']:.0%}"
        rate = f"{gpu['samples_per_second']:,.0f}"
        lines.append(f"                {gpu['name']:<20} {rate:>9} {alone:>12}   {waits:>27}   {fit}")
    return lines


def report_store(store: dict[str, Any], times: dict[str, Any], settings: dict[str, Any]) -> list[str]:
    if store["is_stored"]:
        return ["frame store   the data already is one"]
    divided = f" --segment_seconds {settings['segment_seconds']:g}" if settings["segment_seconds"] else ""
    lines = [
        f"frame store   {readable_size(store['bytes'])}, packed in {readable_time(store['pack_seconds'])} by "
        f"{store['pack_processes']} processes (vicmae pack --num_proc {store['pack_processes']}{divided})",
        f"              a sample takes {1000 * store['read_seconds']:.3g} ms from it, "
        f"{1000 * store['file_read_seconds']:.3g} ms from these files; loader workers per process of the run: "
        f"{times['loading_processes']}",
    ]
    machines = {}  # what `judge_store` says of them -> their names
    for name in store["seconds_saved"]:
        machines.setdefault(judge_store(store, name, times), []).append(name)
    for (verdict, waits, saves), names in machines.items():
        lines += [f"              {', '.join(names)}: {verdict}", " " * 16 + waits, " " * 16 + saves]
    return lines


def judge_store(store: dict[str, Any], name: str, times: dict[str, Any]) -> tuple[str, str, str]:
    """Says whether a store is worth it on a machine, how long a run waits without one, and what it would save."""
    wait, saved = store["wait_share"][name], store["seconds_saved"][name]
    if name != THIS_MACHINE:
        waits = f"waits for data {wait:.1%} of the time with this machine's loading"
    elif times["here"]["loads_on_the_same_cores"]:
        waits = f"loading takes {wait:.1%} of the time, on the cores that train"
    else:
        waits = f"waits for data {wait:.1%} of the time"
    if wait < store["min_wait_share"]:
        return "not worth it", waits, f"below {store['min_wait_share']:.0%} a store saves next to nothing"
    verdict = "worth it" if name in store["worth_it"] else "not worth it for one run"
    packing = readable_time(store["pack_seconds"])
    return verdict, waits, f"a store makes a run {readable_time(saved)} shorter, and packing takes {packing}"
