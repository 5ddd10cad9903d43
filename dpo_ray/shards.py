"""Trained weights and their Adam moments in files that any number of workers can read.

A rank writes the pieces of the parameters that it holds, under their names and places; a rank that loads copies from
all files what falls into its own pieces. Nothing depends on the ZeRO stage, and nothing is a pickle.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpo_ray.errors import RunFailed

FILE_BYTES = 2**30
"""A new file is begun after so many: saving needs no more memory than one file."""


class Piece(NamedTuple):
    """Consecutive elements of a parameter."""

    parameter: str
    start: int
    """Of the flattened parameter, the first element."""
    tensors: dict[str, Tensor]
    """By kind (`weight`, `exp_avg`, `exp_avg_sq`), [n] fp32 each: views of what the optimizer holds."""


def write(folder: Path, rank: int, pieces: Iterable[Piece]) -> None:
    """Write a rank's pieces to `folder/RANK-NUMBER.safetensors`; the type of every tensor is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    file: dict[str, Tensor] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        if file:
            save_file(file, folder / f"{rank:05d}-{number:04d}.safetensors")
            file.clear()
            number += 1

    for piece in pieces:
        for kind, tensor in piece.tensors.items():
            file[f"{kind}|{piece.start}|{piece.parameter}"] = tensor.cpu()
        if sum(tensor.nbytes for tensor in file.values()) >= FILE_BYTES:
            flush()
    flush()


def read(files: Iterable[Path], pieces: Iterable[Piece]) -> None:
    """Fill the tensors of pieces, at most one piece of a parameter, from the files of any number of ranks.

    Raises:
        RunFailed: Some elements are in no file; names the parameter.
    """
    wanted = {piece.parameter: piece for piece in pieces}
    missing = {(name, kind): tensor.numel() for name, piece in wanted.items() for kind, tensor in piece.tensors.items()}
    for file in files:
        with safe_open(file, framework="pt") as stored:
            keys: list[str] = stored.keys()
            for key in keys:
                kind, first, parameter = key.split("|", 2)
                if (parameter, kind) not in missing:
                    continue
                target, start = wanted[parameter].tensors[kind], wanted[parameter].start
                source, offset = stored.get_slice(key), int(first)
                begin = max(start, offset)
                end = min(start + target.numel(), offset + source.get_shape()[0])
                if begin < end:
                    target[begin - start : end - start].copy_(source[begin - offset : end - offset])
                    missing[parameter, kind] -= end - begin
    for (parameter, kind), number in missing.items():
        if number != 0:
            raise RunFailed(f"the checkpoint is not of this model: it lacks {number} elements of {parameter} ({kind})")
