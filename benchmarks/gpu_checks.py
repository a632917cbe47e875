"""Whether a GPU computes what the CPU does: precisions, compiled layers, attention kernels, overflows, resuming."""

import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device, set_seed
from peers import CONFIGS, small_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from vicmae_hf import ViCMAEConfig, ViCMAEForPreTraining, ViCMAEForVideoClassification
from vicmae_hf.errors import NonFiniteError
from vicmae_hf.pretraining.objective import Objective
from vicmae_hf.training.devices.hardware import compile_layers
from vicmae_hf.training.loop import Updates
from vicmae_hf.training.optimization import Schedule, parameter_groups


# Of the loss of a B/16 with random weights, and of its gradients as one vector, relative. bf16 has 8 bits.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-2, 1e-1
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")  # the CPU: to try the script itself
HALVES = ("fp16", "bf16") if DEVICE.type == "cuda" else ("bf16",)
PIXELS = SimpleNamespace(image_mean=(0.485, 0.456, 0.406), image_std=(0.229, 0.224, 0.225))


def synthetic_batches(config: ViCMAEConfig, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """Sends batches as the loader would: two of them in turn, bytes, from pinned memory."""
    height, width = config.image_height_and_width
    num_patches = math.prod(config.patch_grid)
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(2):
        pixels = torch.randint(0, 256, (batch_size, 2, 3, height, width), dtype=torch.uint8, generator=generator)
        noise = torch.rand(batch_size, 2, num_patches, generator=generator)
        batch = {"pixel_values": pixels, "noise": noise}
        batches.append({name: t.pin_memory() for name, t in batch.items()} if DEVICE.type == "cuda" else batch)
    number = 0
    while True:
        yield send_to_device(batches[number % 2], DEVICE, non_blocking=True)
        number += 1


def build_updates(
    config: ViCMAEConfig,
    batch_size: int,
    precision: str = "bf16",
    compiled: bool = False,
    wrap_batches: Callable[[Iterator], Iterator] = lambda batches: batches,
    accumulation: int = 1,
) -> Updates:
    """Builds the updates of a pretraining as the script makes them, on synthetic batches."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(
        mixed_precision=precision, gradient_accumulation_steps=accumulation, cpu=DEVICE.type == "cpu"
    )
    set_seed(0)
    with DEVICE:  # random weights of a ViT-L take a CPU seconds
        model = ViCMAEForPreTraining(config).train()
    if compiled:
        compile_layers(model)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=1e-4, betas=(0.9, 0.95), fused=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    batches = wrap_batches(synthetic_batches(config, batch_size))
    schedule = Schedule(
        num_steps=10**6,
        steps_per_epoch=100,
        num_warmup_steps=0,
        peak_learning_rate=1e-4,
        gradient_accumulation_steps=accumulation,
        total_batch_size=batch_size * accumulation,
        num_processes=1,
    )
    objective = Objective(prepared, model, PIXELS, 0.0)
    arguments = SimpleNamespace(seed=0, max_skipped_updates=25)
    return Updates(accelerator, prepared, optimizer, batches, objective, schedule, arguments)


def loss_and_gradient(model, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> tuple[float, torch.Tensor]:
    """Computes the loss and all gradients in one vector, under autocast to `dtype`."""
    model.zero_grad()
    with torch.autocast(DEVICE.type, dtype=dtype, enabled=dtype != torch.float32):
        loss = model(**inputs).loss
    scale = 2.0**13 if dtype == torch.float16 else 1.0  # as a scaler would: small gradients of fp16 become 0
    (loss * scale).backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.item(), torch.cat(gradients).double() / scale


def compare(name: str, values: tuple[float, torch.Tensor], expected: tuple[float, torch.Tensor]) -> tuple:
    loss = abs(values[0] - expected[0]) / abs(expected[0])
    gradient = ((values[1] - expected[1]).norm() / expected[1].norm()).item()
    is_right = loss <= LOSS_TOLERANCE and gradient <= GRADIENT_TOLERANCE
    return name, is_right, f"loss {loss:.1e}, gradient {gradient:.1e} from float32"


def check_first_update() -> Iterator[tuple]:
    """Computes gradients twice: the first attention of a process has the kernels of later ones."""
    set_seed(0)
    model = ViCMAEForPreTraining(small_config()).to(DEVICE).train()
    inputs = {"pixel_values": torch.randn(32, 2, 3, 64, 64), "noise": torch.rand(32, 2, 64)}
    inputs = {name: t.to(DEVICE) for name, t in inputs.items()}
    first, second = (loss_and_gradient(model, inputs, torch.bfloat16) for _ in range(2))
    difference = (first[1] - second[1]).abs().max().item()
    yield "first gradients, bf16", difference == 0.0, f"largest difference to the second {difference:.1e}"


def check_precisions() -> Iterator[tuple]:
    """Compares float32 on the CPU and the GPU, bf16 and fp16, compiled or not, and attention kernels."""
    set_seed(0)
    config = CONFIGS["base" if DEVICE.type == "cuda" else "small"]()
    model = ViCMAEForPreTraining(config).train()
    size, length = config.image_size, math.prod(config.patch_grid)
    inputs = {"pixel_values": torch.randn(16, 2, 3, size, size), "noise": torch.rand(16, 2, length)}
    cpu_loss = model(**inputs).loss.item()
    model, inputs = model.to(DEVICE), {name: t.to(DEVICE) for name, t in inputs.items()}
    expected = loss_and_gradient(model, inputs, torch.float32)
    difference = abs(expected[0] - cpu_loss) / cpu_loss
    yield "float32, GPU against CPU", difference < 1e-4, f"loss {difference:.1e} of {cpu_loss:.6f}"
    for dtype in (torch.bfloat16, torch.float16):
        yield compare(f"{dtype}".removeprefix("torch."), loss_and_gradient(model, inputs, dtype), expected)
    backends = [SDPBackend.MATH]
    if DEVICE.type == "cuda":
        backends += [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    for backend in backends:
        with sdpa_kernel(backend):
            values = loss_and_gradient(model, inputs, torch.bfloat16)
        yield compare(f"bf16, {backend.name.lower()}", values, expected)
    model.set_attn_implementation("eager")
    yield compare("bf16, eager attention", loss_and_gradient(model, inputs, torch.bfloat16), expected)
    model.set_attn_implementation("sdpa")
    compiled = copy.deepcopy(model)
    compile_layers(compiled)
    yield compare("float32, compiled", loss_and_gradient(compiled, inputs, torch.float32), expected)
    yield compare("bf16, compiled", loss_and_gradient(compiled, inputs, torch.bfloat16), expected)
    breaks = dict(torch._dynamo.utils.counters["graph_break"])
    yield "compiled, without graph breaks", not breaks, str(breaks or "none")


def check_objectives() -> Iterator[tuple]:
    """Trains every objective, and a video classifier, for a few updates in bf16: losses stay finite."""
    for objective in ("info_nce", "nt_xent", "simsiam", "vicreg", "none"):
        updates = build_updates(small_config(contrastive_loss=objective, reconstruct="both"), 32)
        for step in range(4):
            updates.make(step)
        losses = updates.read_losses()
        yield f"{objective}, 4 updates in bf16", True, f"loss {losses['loss']:.3f}"
    set_seed(0)
    config = small_config(num_labels=10, drop_path_rate=0.1)
    model = ViCMAEForVideoClassification(config).to(DEVICE).train()
    model.gradient_checkpointing_enable()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss = model(torch.randn(2, 16, 3, 64, 64, device=DEVICE), torch.tensor([1, 7], device=DEVICE)).loss
    loss.backward()
    finite = all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    yield "video classifier, bf16, checkpointed", finite, f"loss {loss.item():.3f}, ln 10 = 2.303"


def spoil_update(number: int) -> Callable[[Iterator], Iterator]:
    """Makes the pixels of one batch such that its loss is not finite."""

    def wrap(batches: Iterator) -> Iterator:
        for index, batch in enumerate(batches):
            if index == number:
                batch = batch | {"pixel_values": batch["pixel_values"].float() * float("inf")}
            yield batch

    return wrap


def check_overflows() -> Iterator[tuple]:
    """Injects a batch that is not finite: fp16's scaler passes over it; a run in bf16 stops there."""
    for precision in HALVES:
        updates = build_updates(small_config(), 16, precision, wrap_batches=spoil_update(2))
        scaler = updates.accelerator.scaler
        for step in range(2):
            updates.make(step)
        before = [p.detach().clone() for p in updates.model.parameters()]
        scale = scaler.get_scale() if scaler else None
        updates.make(2)
        held = all(torch.equal(a, b) for a, b in zip(before, updates.model.parameters(), strict=True))
        if precision == "fp16":
            is_halved = scaler.get_scale() == scale / 2
            updates.make(3)
            updates.read_losses()
            moved = any(not torch.equal(a, b) for a, b in zip(before, updates.model.parameters(), strict=True))
            text = f"held {held}, scale {scale:.0f} -> {scaler.get_scale():.0f}, goes on {moved}"
            yield "fp16, overflow passed over", held and is_halved and moved, text
            continue
        try:
            updates.read_losses()
            stopped = 0
        except NonFiniteError as error:
            stopped = error.step
        yield "bf16, run stops", held and stopped == 3, f"held {held}, at update {stopped}"


def check_synchronisation() -> Iterator[tuple]:
    """Makes updates in a mode in which waiting for the device raises."""
    for compiled in (False, True):
        updates = build_updates(small_config(), 32, compiled=compiled)
        for step in range(3):  # caches are filled, kernels compiled
            updates.make(step)
        if DEVICE.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            updates.make(3)
            found = ""
        except RuntimeError as error:
            found = str(error)
        finally:
            if DEVICE.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
        mode = "compiled" if compiled else "eager"
        yield f"no waiting for the device, {mode}", not found, found or "none in an update"


def run_updates(precision: str, stop_at: int | None) -> tuple[torch.Tensor, float]:
    """Makes 8 updates; if told, goes on from a checkpoint at `stop_at` with a new model. Returns weights and loss."""
    with tempfile.TemporaryDirectory() as folder:
        updates = build_updates(small_config(), 32, precision)
        for step in range(8):
            if step == stop_at:
                updates.accelerator.save_state(folder)
                updates = build_updates(small_config(), 32, precision)
                updates.accelerator.load_state(folder)
                for _ in range(step):
                    next(updates.batches)
            updates.make(step)
        loss = updates.read_losses()["loss"]
    return torch.cat([p.detach().flatten() for p in updates.model.parameters()]), loss


def check_resuming() -> Iterator[tuple]:
    """Resumes on the device: bit-equal where the kernels are (`use_deterministic_algorithms`)."""
    torch.use_deterministic_algorithms(True)
    for precision in ("no", *HALVES):
        whole, resumed = run_updates(precision, None)[0], run_updates(precision, 5)[0]
        difference = (whole - resumed).abs().max().item()
        yield f"resume, {precision}", difference == 0.0, f"largest difference of a weight {difference:.1e}"
    torch.use_deterministic_algorithms(False)
    first, second = run_updates("bf16", None)[0], run_updates("bf16", None)[0]
    difference = (first - second).abs().max().item()
    yield "twice the same run, bf16", difference < 1e-3, f"largest difference {difference:.1e} (kernels as they come)"


CHECKS = (
    check_first_update,  # before any other attention
    check_precisions,
    check_objectives,
    check_overflows,
    check_synchronisation,
    check_resuming,
)
