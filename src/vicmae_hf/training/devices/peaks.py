"""What a device can do at most, and the most memory that this process has taken."""

import sys

import psutil
import torch


def peak_memory_mib(device: torch.device) -> dict[str, float]:
    """Reads this process's peak memory in MiB: resident, and allocated on the GPU."""
    try:
        import resource
    except ImportError:  # Windows
        memory = psutil.Process().memory_info()
        num_bytes = getattr(memory, "peak_wset", memory.rss)
    else:  # Linux counts in KiB, macOS in bytes
        num_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = {"peak_memory_mib": num_bytes / 2**20}
    if device.type == "cuda":
        peak["peak_gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return peak


# Dense bf16 and fp16 products with float32 sums, FLOP/s, by the beginning of a device's name (NVIDIA's data sheets).
PEAK_FLOPS = {
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10G": 70e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 3090": 71e12,
    "NVIDIA GeForce RTX 3060": 25.5e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Looks up the peak of a device; None if it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    if name.endswith((" Laptop GPU", " Ti", " D")):  # their names begin like those of others
        return None
    return next((peak for beginning, peak in PEAK_FLOPS.items() if name.startswith(beginning)), None)
