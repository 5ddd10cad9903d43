"""What a folder must hold to be a whole checkpoint, so that damage is noticed, and named, before anything is loaded.

Every rank lists its files with size and checksum in a manifest of its own; a manifest carries its own checksum. The
checksums tell accidents (a cut upload, a flipped bit), they are no signature.
"""

import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from dpo_ray.storage import Folder

FORMAT = 1


class Stamp(NamedTuple):
    """How a file must be."""

    size: int  # bytes
    checksum: str  # XXH3, 128 bits, hexadecimal


class Manifest(NamedTuple):
    """A whole checkpoint, by the manifests of all its ranks."""

    step: int
    world_size: int
    """Ranks that wrote it."""
    is_best: bool
    """By held-out evaluation, when it was written."""
    files: dict[str, Stamp]


class Damaged(Exception):
    """A checkpoint's file is missing, cut or changed. The message names it."""


def file_name(rank: int) -> str:
    return f"manifest-{rank:05d}.json"


def seal(folder: Path, rank: int, world_size: int, *, step: int, is_best: bool) -> None:
    """Write a rank's manifest over all files of its folder: the last thing that it writes."""
    here = Folder(str(folder))
    fields = {
        "format": FORMAT,
        "rank": rank,
        "world_size": world_size,
        "step": step,
        "is_best": is_best,
        "versions": {name: version(name) for name in ("dpo-ray", "torch", "deepspeed")},
        "files": {name: Stamp(size, _checksum(here, name)) for name, size in sorted(here.sizes().items())},
    }
    (folder / file_name(rank)).write_text(_render(fields))


def read(folder: Folder) -> Manifest:
    """The manifest of a checkpoint; every file that it lists is there and has its size.

    Raises:
        Damaged: A manifest or a file is missing, cut or changed.
    """
    sizes = folder.sizes()
    first = _read_one(folder, 0, sizes)
    files: dict[str, Stamp] = {}
    for rank in range(first["world_size"]):
        one = _read_one(folder, rank, sizes)
        if any(one[name] != first[name] for name in ("world_size", "step", "is_best")):
            raise Damaged(f"{file_name(rank)} belongs to another checkpoint")
        files |= {name: Stamp(*stamp) for name, stamp in one["files"].items()}
    for name, stamp in files.items():
        if name not in sizes:
            raise Damaged(f"{name} is missing")
        if sizes[name] != stamp.size:
            raise Damaged(f"{name} has {sizes[name]} bytes instead of {stamp.size}")
    return Manifest(first["step"], first["world_size"], first["is_best"], files)


def changed(folder: Folder, files: Iterable[tuple[str, Stamp]]) -> list[str]:
    """What is wrong with the content of files, each named; empty when all are as they were written."""
    return [f"{name} has changed" for name, stamp in files if _checksum(folder, name) != stamp.checksum]


def _read_one(folder: Folder, rank: int, sizes: dict[str, int]) -> dict[str, Any]:
    name = file_name(rank)
    if name not in sizes:
        raise Damaged(f"{name} is missing")
    try:
        text = folder.read(name).decode()
        fields: dict[str, Any] = json.loads(text)
        intact = _render({key: value for key, value in fields.items() if key != "checksum"}) == text
    except (ValueError, AttributeError):
        intact = False
    if not intact:
        raise Damaged(f"{name} has changed")
    if fields["format"] != FORMAT:
        raise Damaged(f"{name} has format {fields['format']}; this version reads {FORMAT}")
    return fields


def _render(fields: dict[str, Any]) -> str:
    checksum = xxhash.xxh3_128_hexdigest(json.dumps(fields).encode())
    return json.dumps(fields | {"checksum": checksum}, indent=1) + "\n"


def _checksum(folder: Folder, name: str) -> str:
    digest = xxhash.xxh3_128()
    for chunk in folder.chunks(name):
        digest.update(chunk)
    return digest.hexdigest()
