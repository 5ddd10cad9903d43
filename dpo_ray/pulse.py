"""How far this worker's training thread has come, so that someone outside can tell a slow worker from a stuck one.

The training thread says when it enters a phase and after every forward pass; `read` is called from another thread of
the same process, also while the first is stuck.
"""

import sys
import threading
import time
from typing import NamedTuple

LEAVING, FLUSHING = "waiting for a node to go", "last upload"
NO_HURRY = {LEAVING, FLUSHING}
"""Phases that may last: their end is in other hands."""


class Reading(NamedTuple):
    """One look at a worker."""

    signs: int
    """Grows with every sign of life; all ranks give the same signs, so the rank with the smallest is behind."""
    phase: str
    idle_s: float
    """Since the last sign."""
    where: str
    """The line of ours that the training thread is in, and the innermost one."""


class _Pulse:
    def __init__(self) -> None:
        self.signs, self.phase, self.at, self.thread = 0, "starting", time.monotonic(), 0


_pulse = _Pulse()


def enter(phase: str) -> None:
    """The training thread begins something."""
    _pulse.phase, _pulse.thread = phase, threading.get_ident()
    beat()


def beat() -> None:
    """The training thread has come on."""
    _pulse.signs, _pulse.at = _pulse.signs + 1, time.monotonic()


def read() -> Reading:
    """Called from any thread."""
    return Reading(_pulse.signs, _pulse.phase, time.monotonic() - _pulse.at, _where(_pulse.thread))


def _where(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    lines = []
    while frame is not None:
        lines.append((frame.f_code.co_filename, f"{frame.f_code.co_filename}:{frame.f_lineno}"))
        frame = frame.f_back
    ours = next((line for name, line in lines if "dpo_ray" in name), None)
    told = dict.fromkeys(line for line in (ours, lines[0][1] if lines else None) if line)
    return ", ".join(told) or "an unknown place"
