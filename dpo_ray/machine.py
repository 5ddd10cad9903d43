"""What one machine tells about itself, as plain values.

Ray sends these functions to nodes by value, so that they run also where another dpo-ray is installed, or none: nothing
of ours is imported at the top, and nothing is judged here (`doctor` does that).
"""

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "datasets", "peft", "mlflow", "pyarrow")


def describe(places: dict[str, str]) -> dict[str, Any]:
    """Everything that needs no other machine; the fields of `doctor.Machine`.

    Args:
        places: Folders whose disks count, by what they are for.
    """
    return {
        "versions": _versions(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        **_gpus(),
        "tools": {name: _first_line(name, "--version") for name in ("g++", "ninja")},
        "shared_memory": shutil.disk_usage("/dev/shm").total if os.path.exists("/dev/shm") else None,
        "disks": {use: _disk(path) for use, path in places.items()},
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "memory": _memory(),
        "token_mode": _token_mode(),
    }


def token_file() -> Path:
    """Where Ray looks for its token, unless RAY_AUTH_TOKEN holds it."""
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token").expanduser()


def clock() -> float:
    return time.time()


def free_port(address: str) -> int:
    """A port that nothing uses just now."""
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])


def connects(host: str, port: int) -> None:
    """Raises OSError where nothing answers."""
    socket.create_connection((host, port), timeout=5).close()


def server_of(uri: str) -> tuple[str, int] | None:
    """Host and port of a URI with a server in it; None for a file, or where the port cannot be known."""
    parts = urlsplit(uri)
    scheme = parts.scheme.partition("+")[0]
    port = parts.port or {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306}.get(scheme)
    return (parts.hostname, port) if parts.hostname and port else None


@contextmanager
def left_as_it_was(path: str) -> Iterator[None]:
    """Folders that come into being meanwhile, down to a local path, go again."""
    place = Path(path)
    new = [folder for folder in (place, *place.parents) if not folder.exists()] if "://" not in path else []
    try:
        yield
    finally:
        with suppress(OSError):  # somebody else has put something there
            for folder in new:
                folder.rmdir()


def answer_in_storage(path: str, question: str, answer: str, content: bytes, patience_s: float = 5.0) -> str | None:
    """Find the file `question` in a folder and write `answer` beside it; what is wrong, None if nothing.

    Nothing is written where the file is not found: that is another folder.
    """
    from dpo_ray.storage import Folder

    folder = Folder(path)
    until = time.monotonic() + patience_s  # a network file system may need a moment
    while not folder.exists(question):
        if time.monotonic() > until:
            there = "a folder of its own, not the driver's" if folder.exists() else "no such folder"
            return f"{path} is {there}"
        time.sleep(0.5)
    if folder.read(question) != content:
        return f"{path}: a file of the driver reads differently"
    folder.write(answer, content)
    return None


def opens_gloo() -> None:
    """Raises where gloo finds no network interface to work on."""
    all_reduce(None, 0, 1, "127.0.0.1", free_port("127.0.0.1"), 10.0)


def all_reduce(gpu: int | None, rank: int, size: int, address: str, port: int, seconds: float) -> None:
    """Sum ones over all ranks by NCCL, or by gloo where `gpu` is None. Raises where that does not work.

    Args:
        gpu: Which of the GPUs here this rank takes.
        rank: Of this process; rank 0 listens on `address` and `port`.
        seconds: How long the others are waited for.
    """
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    device = torch.device("cpu") if gpu is None else torch.device("cuda", gpu)
    if gpu is not None:
        torch.cuda.set_device(device)
    backend = "gloo" if gpu is None else "nccl"
    host = f"[{address}]" if ":" in address else address
    dist.init_process_group(
        backend, init_method=f"tcp://{host}:{port}", rank=rank, world_size=size, timeout=timedelta(seconds=seconds)
    )
    try:
        ones = torch.ones(1024, device=device)
        dist.all_reduce(ones)
        if ones.sum().item() != 1024 * size:
            raise RuntimeError(f"the sum of {size} ones came out as {ones.mean().item()}")
    finally:
        dist.destroy_process_group()


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    try:  # of what is imported: code that was shipped with a job has no metadata
        import dpo_ray

        found["dpo-ray"] = dpo_ray.__version__
    except ImportError:
        found["dpo-ray"] = None
    return found


def _gpus() -> dict[str, Any]:
    """What the driver shows, and what torch can use of it."""
    listed = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    names: list[str] = []
    cuda = None
    try:
        import torch

        cuda = torch.version.cuda
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            names.append(f"{properties.name} {properties.total_memory / 2**30:.0f} GiB")
    except (ImportError, OSError, RuntimeError):  # `versions` tells that torch is missing; a broken one has no GPUs
        names = []
    return {"gpus": names, "driver_gpus": len(listed), "driver": listed[0] if listed else None, "cuda": cuda}


def _first_line(name: str, *arguments: str) -> str | None:
    lines = _run(name, *arguments)
    return lines[0] if lines else None


def _run(name: str, *arguments: str) -> list[str]:
    """What a program says, by lines; none where it is missing or fails. Also found beside this Python."""
    path = shutil.which(name) or shutil.which(os.path.join(os.path.dirname(sys.executable), name))
    if path is None:
        return []
    try:
        told = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return told.stdout.splitlines() if told.returncode == 0 else []


def _disk(path: str) -> dict[str, Any]:
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    usage = shutil.disk_usage(place)
    return {"path": str(place), "total": usage.total, "free": usage.free}


def _memory() -> dict[str, int] | None:
    """Of the machine, or of the container where that is less; None where it cannot be told (not Linux)."""
    try:
        told = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return None
    total, free = (int(told[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max" and int(limit) < total:
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            total, free = int(limit), min(free, int(limit) - used)
    except OSError:  # no cgroup of version 2
        pass
    return {"total": total, "free": free}


def _token_mode() -> int | None:
    """Permissions of the file with Ray's token; None where there is none."""
    try:
        return token_file().stat().st_mode & 0o777
    except OSError:
        return None
