"""Progress survives the disk exactly, random states go on where they were, and another world size is refused."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.checkpoint import STATE_FILE, TrainState, load_rng, load_state, save_rng
from dpo_ray.errors import InputError
from dpo_ray.stopping import Evaluation

numbers = st.floats(allow_nan=False, allow_infinity=False)


def some_state() -> TrainState:
    return TrainState(
        step=37,
        world_size=2,
        train_seconds=1 / 3,
        checkpoint_seconds=0.5,
        tokens=12_345_678_901,
        slots=7,
        filled=5,
        since_log={"loss": math.pi, "num_pairs": 64.0},
        evaluations=[Evaluation(10, {"loss": 0.1 + 0.2, "num_pairs": 5}), Evaluation(20, {"loss": 5e-324})],
        train_lines=[Evaluation(1, {"loss": math.log(2)})],
        alarms=["over-training: é"],
        stop_reason="kl 0.6 above the budget",
    )


def test_every_field_survives_the_round_trip():
    state = some_state()
    defaults = TrainState()
    assert all(getattr(state, f.name) != getattr(defaults, f.name) for f in dataclasses.fields(state)), "none left out"
    again = TrainState.from_json(state.to_json())
    assert again == state
    assert {type(evaluation) for evaluation in (*again.evaluations, *again.train_lines)} == {Evaluation}
    assert TrainState.from_json(defaults.to_json()) == defaults


@given(seconds=numbers, loss=numbers, total=numbers)
def test_numbers_survive_to_the_last_bit(seconds: float, loss: float, total: float):
    state = TrainState(train_seconds=seconds, since_log={"loss": total}, evaluations=[Evaluation(1, {"loss": loss})])
    again = TrainState.from_json(state.to_json())
    found = (again.train_seconds, again.since_log["loss"], again.evaluations[0].metrics["loss"])
    assert [value.hex() for value in found] == [float(value).hex() for value in (seconds, total, loss)]


def test_states_do_not_share_their_lists():
    one, other = TrainState(), TrainState()
    one.evaluations.append(Evaluation(1, {}))
    one.since_log["loss"] = 1.0
    assert (other.evaluations, other.since_log) == ([], {})


def test_a_checkpoint_of_the_same_world_size_is_loaded(tmp_path: Path):
    (tmp_path / STATE_FILE).write_text(some_state().to_json())
    assert load_state(tmp_path, world_size=2) == some_state()
    assert json.loads((tmp_path / STATE_FILE).read_text())["step"] == 37


def test_a_checkpoint_of_another_world_size_is_refused_with_both_named(tmp_path: Path):
    (tmp_path / STATE_FILE).write_text(some_state().to_json())
    with pytest.raises(InputError, match=r"step 37 was written by 2 workers and `cluster\.num_workers` is 3"):
        load_state(tmp_path, world_size=3)


def test_every_rank_draws_on_where_it_stopped(tmp_path: Path):
    expected = {}
    for rank in (0, 1):
        torch.manual_seed(rank)
        torch.rand(5)
        save_rng(tmp_path, rank)
        expected[rank] = torch.rand(3)
    for rank in (1, 0):
        load_rng(tmp_path, rank)
        assert torch.equal(torch.rand(3), expected[rank])
    assert not torch.equal(expected[0], expected[1])
