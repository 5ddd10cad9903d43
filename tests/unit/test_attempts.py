"""The record of a run's attempts, and what it says about restarts and lost steps."""

from pathlib import Path
from typing import Any

import pytest

from dpo_ray import attempts
from dpo_ray.attempts import LOSS, RESUME, START
from dpo_ray.storage import Folder


def event(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": kind, "time": 0.0, **fields}


FIRST = event(START, step=0, reached=0, world_size=2)


def test_events_come_back_in_their_order(tmp_path: Path):
    folder = Folder(str(tmp_path))
    assert attempts.history(folder) == []
    attempts.record(folder, START, step=0, reached=0, world_size=2)
    attempts.record(folder, LOSS, cause="worker 1 died")
    assert [e["kind"] for e in attempts.history(folder)] == [START, LOSS]
    assert attempts.history(folder)[1]["cause"] == "worker 1 died"


def test_a_line_that_a_dying_writer_cut_short_is_left_out(tmp_path: Path):
    folder = Folder(str(tmp_path))
    attempts.record(folder, START, step=0, reached=0, world_size=2)
    with (tmp_path / attempts.ATTEMPTS_FILE).open("a") as file:
        file.write('{"kind": "lo')
    assert [e["kind"] for e in attempts.history(folder)] == [START]
    attempts.record(folder, START, step=3, reached=3, world_size=2)
    assert attempts.restarts(attempts.history(folder)) == 1


def test_restarts_are_starts_beyond_the_first():
    assert attempts.restarts([]) == 0
    assert attempts.restarts([event(RESUME), FIRST]) == 0
    assert attempts.restarts([FIRST, event(LOSS, cause="x"), event(START, step=5, reached=8)]) == 1


def test_lost_steps_are_those_done_again():
    events = [
        FIRST,
        event(START, step=5, reached=8),
        event(START, step=10, reached=10),
        event(START, step=0, reached=4),
    ]
    assert attempts.lost_steps(events) == 3 + 0 + 4


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([], None),
        ([event(RESUME)], None),  # it was never started
        ([FIRST, event(LOSS, cause="worker 1 died")], "worker 1 died"),
        ([FIRST, event(LOSS, cause="a"), event(LOSS, cause="a"), event(LOSS, cause="b")], "a; b"),
        ([FIRST, event(LOSS, cause="old"), event(START, step=1, reached=1), event(RESUME)], "continued with --resume"),
        ([FIRST, event(LOSS, cause="workers died"), event(RESUME)], "workers died; continued with --resume"),
        ([FIRST], "for an unknown reason"),
    ],
)
def test_the_cause_is_what_happened_since_the_last_start(events: list[dict[str, Any]], why: str | None):
    assert attempts.why_again(events) == why
