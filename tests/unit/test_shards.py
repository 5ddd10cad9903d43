"""What any number of ranks wrote, any other number reads: every bit of every element, or a refusal."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from dpo_ray import shards
from dpo_ray.errors import RunFailed
from dpo_ray.shards import Piece

KINDS = ("weight", "exp_avg", "exp_avg_sq")


def some_state(sizes: list[int]) -> dict[str, dict[str, Tensor]]:
    """By parameter and kind; every bit pattern occurs, also those of infinities and of nothing."""
    torch.manual_seed(0)
    return {
        f"layer.{i}.odd|name": {kind: torch.randint(-(2**31), 2**31, (n,)).int().view(torch.float32) for kind in KINDS}
        for i, n in enumerate(sizes)
    }


def pieces_of(state: dict[str, dict[str, Tensor]], cuts: list[float], rank: int) -> list[Piece]:
    """One rank's pieces: of every parameter the elements between two cuts, which are fractions of its length."""
    edges = [0.0, *sorted(cuts), 1.0]
    pieces = []
    for name, tensors in state.items():
        begin, end = (round(edge * len(tensors["weight"])) for edge in edges[rank : rank + 2])
        if begin < end:
            pieces.append(Piece(name, begin, {kind: tensor[begin:end] for kind, tensor in tensors.items()}))
    return pieces


fractions = st.lists(st.floats(0, 1), max_size=4)


@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4), before=fractions, after=fractions)
def test_any_cut_into_pieces_is_read_as_any_other(sizes: list[int], before: list[float], after: list[float]):
    state, found = some_state(sizes), some_state(sizes)
    with tempfile.TemporaryDirectory() as folder:
        for rank in range(len(before) + 1):
            shards.write(Path(folder), rank, pieces_of(state, before, rank))
        for tensor in (tensor for tensors in found.values() for tensor in tensors.values()):
            tensor.zero_()
        for rank in range(len(after) + 1):
            shards.read(Path(folder).iterdir(), pieces_of(found, after, rank))
    for name, kind in itertools.product(state, KINDS):
        assert torch.equal(found[name][kind].view(torch.int32), state[name][kind].view(torch.int32))


def test_a_missing_element_is_an_error_that_names_the_parameter(tmp_path: Path):
    state = some_state([10])
    shards.write(tmp_path, 0, pieces_of(state, [0.9], 0))
    with pytest.raises(RunFailed, match=r"lacks 1 elements of layer\.0\.odd\|name \(weight\)"):
        shards.read(tmp_path.iterdir(), pieces_of(state, [], 0))


def test_another_model_is_an_error(tmp_path: Path):
    shards.write(tmp_path, 0, pieces_of(some_state([10]), [], 0))
    with pytest.raises(RunFailed, match=r"lacks 3 elements of layer\.1"):
        shards.read(tmp_path.iterdir(), pieces_of(some_state([10, 3]), [], 0))


def test_a_rank_writes_several_files_rather_than_one_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shards, "FILE_BYTES", 200)
    state = some_state([10, 10, 10])  # 120 bytes each
    shards.write(tmp_path, 7, pieces_of(state, [], 0))
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["00007-0000.safetensors", "00007-0001.safetensors"]
    assert [len(load_file(file)) for file in files] == [6, 3]
    shards.read(files, pieces_of(some_state([10, 10, 10]), [0.3], 1))


def test_types_are_kept(tmp_path: Path):
    shards.write(tmp_path, 0, [Piece("p", 0, {"weight": torch.ones(2, dtype=torch.bfloat16)})])
    (file,) = tmp_path.iterdir()
    assert load_file(file)["weight|0|p"].dtype == torch.bfloat16


def test_a_rank_without_pieces_writes_nothing(tmp_path: Path):
    shards.write(tmp_path / "new", 0, [])
    assert list((tmp_path / "new").iterdir()) == []
