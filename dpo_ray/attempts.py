"""What happened to a run so far: every start of its workers and every end that was not planned, in `attempts.jsonl`.

Whoever sees an event appends it: rank 0 when the workers start, Ray Train's controller when they are lost, the driver
when a person continues the run. So the record survives the death of each of them.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.storage import Folder, read_lines

ATTEMPTS_FILE = "attempts.jsonl"

START, LOSS, RESUME = "start", "loss", "resume"
"""Workers began at `step`; they ended because of `cause`; a person continued the run."""


def record(folder: Folder, kind: str, **fields: Any) -> None:
    """Add an event of now."""
    folder.append(ATTEMPTS_FILE, json.dumps({"kind": kind, "time": round(time.time(), 3), **fields}))


def history(folder: Folder) -> list[dict[str, Any]]:
    return list(read_lines(folder.read(ATTEMPTS_FILE))) if folder.exists(ATTEMPTS_FILE) else []


def restarts(events: Sequence[Mapping[str, Any]]) -> int:
    """Times that workers started again, by Ray or by a person."""
    return max(0, len([event for event in events if event["kind"] == START]) - 1)


def lost_steps(events: Sequence[Mapping[str, Any]]) -> int:
    """Logged steps that were done more than once: each start's distance behind what had been reached."""
    return sum(max(0, event["reached"] - event["step"]) for event in events if event["kind"] == START)


def why_again(events: Sequence[Mapping[str, Any]]) -> str | None:
    """What led to the start that comes after `events`, in words; None if it is the first."""
    starts = [i for i, event in enumerate(events) if event["kind"] == START]
    if not starts:
        return None
    # A driver that dies takes the workers along, which the controller may or may not see before its own end.
    since = events[starts[-1] + 1 :]
    causes = ["continued with --resume" if event["kind"] == RESUME else event["cause"] for event in since]
    return "; ".join(dict.fromkeys(causes)) or "for an unknown reason"
