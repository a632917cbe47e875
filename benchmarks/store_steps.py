"""Updates end to end: pairs of a frame store by the loader of a training, and the steps that they are for."""

import math

import torch
from gpu_checks import DEVICE, build_updates

from vicmae_hf import ViCMAEConfig
from vicmae_hf.data.samples.pairs import load_frame_pairs
from vicmae_hf.pretraining.arguments import PretrainingArguments
from vicmae_hf.pretraining.pretraining import load_batches
from vicmae_hf.training.loop import Stopwatch


WARM_UP = 3
PREFETCHED = 4  # batches that wait for each worker (see `loader_settings`): the first ones show no slow loader


def measure_from_store(
    store: str, config: ViCMAEConfig, batch_size: int, compiled: bool, num_steps: int, num_workers: int
) -> dict[str, float]:
    """
    Makes updates of pairs of a store, in bf16 on a GPU, else in float32. Returns pairs a second, and `waiting`, the
    share of the time in which the device stood idle for want of a batch.

    Args:
        num_steps: timed updates, at least; they are some for each worker, because workers finish together.
        num_workers: of the loader.
    """
    updates = build_updates(config, batch_size, "bf16" if DEVICE.type == "cuda" else "no", compiled)
    dataset = load_frame_pairs(store, config.image_height_and_width, num_patches=math.prod(config.patch_grid))
    # Nothing is written there: the updates are not those of a run.
    arguments = PretrainingArguments(
        train_data=[store],
        output_dir="unused",
        per_device_train_batch_size=batch_size,
        dataloader_num_workers=num_workers,
    )
    updates.batches = iter(load_batches(updates.accelerator, dataset, arguments, updates.schedule))
    first = WARM_UP + PREFETCHED * num_workers
    for step in range(first):
        updates.make(step)
    updates.read_losses()  # waits for the device
    updates.watch = watch = Stopwatch(torch.device(DEVICE))
    for step in range(first, first + max(num_steps, PREFETCHED * num_workers)):
        updates.make(step)
    updates.read_losses()
    seconds = watch.training
    return {"pairs/s": watch.num_samples / seconds, "waiting": watch.waiting / seconds}
