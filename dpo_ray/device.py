"""What the device at hand has: memory, and the rate of its largest products."""

import os
import time

import torch

GIB = 2**30


def device_memory(num_workers: int) -> tuple[float, str]:
    """GiB that a worker on this machine can have, and of what: a GPU's, else this machine's memory by its workers."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        return device.total_memory / GIB, device.name
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return whole / num_workers, f"memory of this machine, by {num_workers}"


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second in a large matrix product of random numbers: the best of ten. What `mfu` is a
    share of; data sheets promise more than any product reaches."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def seconds() -> float:
        began = _now(device)
        a @ b
        return _now(device) - began

    seconds()
    return float(max(2 * size**3 / seconds() for _ in range(10)))


def _now(device: torch.device) -> float:
    """Of the wall clock, all work awaited; on a CPU the time of this process."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()
