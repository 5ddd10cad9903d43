"""What reaches a running step from outside, seen by rank 0 alone and told to all ranks with the step's sums.

So all ranks act at the same step without a message of their own: the sum over ranks of rank 0's flags is the flags.
"""

import enum
import time
from contextlib import suppress

from dpo_ray.lease import holds
from dpo_ray.storage import Folder

STOP_FILE = ".stop"
"""The driver writes it to ask for a checkpoint and an end."""

LOOK_S, LEASE_S, REMOTE_S = 1.0, 5.0, 2.0
"""Seconds between looks: for a preemption notice; at the lease; at an object store for anything (a local disk is
looked at in every step)."""


class Notice(enum.IntFlag):
    """Flags; they add up over the ranks, of which only one ever sets any."""

    STOP = 1
    """The driver asks for a checkpoint and an end."""
    LOOK = 2
    """Time to ask Ray, all ranks together, whether a node will be taken away."""
    SAVE = 4
    """A checkpoint is due by the clock."""
    FENCED = 8
    """Another attempt holds the run."""


class Watch:
    """Looks out for notices; ranks other than 0 see none.

    Args:
        token: The lease that this attempt works under; None where nothing is held (benchmarks, tests).
        save_every_s: Seconds between checkpoints; None: only by steps.
    """

    def __init__(self, folder: Folder, rank: int, token: str | None, save_every_s: float | None) -> None:
        self._folder, self._is_first, self._token, self._save_every_s = folder, rank == 0, token, save_every_s
        self._looked = self._polled = self._saved = time.monotonic()
        self._checked = float("-inf")

    def notices(self) -> Notice:
        """Those of this moment."""
        found = Notice(0)
        if not self._is_first:
            return found
        now = time.monotonic()
        if self._folder.is_local or now - self._polled > REMOTE_S:
            self._polled = now
            with suppress(OSError):  # an object store that is away for a moment is asked again
                if self._folder.exists(STOP_FILE):
                    found |= Notice.STOP
        if now - self._looked > LOOK_S:
            self._looked = now
            found |= Notice.LOOK
        if self._token is not None and now - self._checked > LEASE_S:
            self._checked = now
            with suppress(OSError):
                if not holds(self._folder, self._token):
                    found |= Notice.FENCED
        if self._save_every_s is not None and now - self._saved > self._save_every_s:
            found |= Notice.SAVE
        return found

    def saved(self) -> None:
        """The clock of the checkpoints starts anew."""
        self._saved = time.monotonic()


def is_close(deadline_ms: int | None, margin_s: float) -> bool:
    """Whether a node that goes at `deadline_ms` (of the epoch; unknown: at any moment) leaves less than a margin."""
    return deadline_ms is None or deadline_ms / 1000 - time.time() < margin_s
