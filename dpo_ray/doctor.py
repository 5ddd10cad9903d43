"""`dpo-ray doctor`: what this machine and cluster can do, and what is missing."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

PACKAGES = ("torch", "transformers", "deepspeed", "ray", "datasets", "peft", "mlflow", "pyarrow")


class Check(NamedTuple):
    name: str
    is_ok: bool
    found: str
    advice: str
    """What to do when it is not ok."""


def checks(storage: str = "runs") -> list[Check]:
    """Everything that a run on this machine needs, without starting Ray."""
    found = [
        Check(
            "python",
            (3, 11) <= sys.version_info[:2] <= (3, 13),
            platform.python_version(),
            "use Python 3.11, 3.12 or 3.13",
        )
    ]
    for name in PACKAGES:
        try:
            found.append(Check(name, True, version(name), ""))
        except PackageNotFoundError:
            found.append(Check(name, False, "not installed", f"pip install {name}"))
    return [*found, *_devices(), *_compilers(), *_space(storage)]


def _devices() -> list[Check]:
    import torch

    cores = Check("cpu cores", True, str(os.cpu_count()), "")
    if not torch.cuda.is_available():
        return [cores, Check("gpu", True, "none: training runs on the CPU, use engine.precision=fp32", "")]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = [torch.cuda.get_device_properties(i).total_memory / 2**30 for i in range(len(names))]
    return [cores, Check("gpu", True, ", ".join(f"{n} {m:.0f} GiB" for n, m in zip(names, memory, strict=True)), "")]


def _compilers() -> list[Check]:
    """DeepSpeed compiles one small communication op at its first use on a CPU."""
    result = []
    for name, package in (("g++", "g++"), ("ninja", "ninja")):
        path = shutil.which(name) or shutil.which(os.path.join(os.path.dirname(sys.executable), name))
        told = subprocess.run([path, "--version"], capture_output=True, text=True).stdout if path else ""
        first = told.splitlines()[0] if told else "not found"
        result.append(Check(name, path is not None, first, f"install {package}: DeepSpeed compiles with it"))
    return result


def _space(storage: str) -> list[Check]:
    result = []
    place = os.path.abspath(storage)
    while not os.path.exists(place):
        place = os.path.dirname(place)
    free = shutil.disk_usage(place).free / 2**30
    result.append(Check("disk", free > 5, f"{free:.0f} GiB free at {place}", "free some space, or set storage.path"))
    if os.path.exists("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").total / 2**30
        advice = "mount a larger /dev/shm (--shm-size): Ray's object store falls back to disk"
        result.append(Check("shared memory", shared > 1, f"{shared:.1f} GiB at /dev/shm", advice))
    return result


def cluster_checks() -> list[Check]:
    """What the cluster that this process is connected to offers."""
    import ray

    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]
    there = ray.cluster_resources()
    found = f"{len(nodes)} nodes, {there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs"
    return [Check("ray cluster", there.get("CPU", 0) > 0, found, "the cluster has no CPUs: start workers")]
