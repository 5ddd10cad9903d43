"""Checkpoints on their way to storage while training goes on: at most one, tried again when the storage stumbles."""

import threading
import time
from typing import Any

import pyarrow as pa
import ray.train

from dpo_ray.errors import RunFailed

TRIES, FIRST_PAUSE_S = 4, 1.0
"""Of one upload; each pause is twice the one before."""


class Uploads:
    """Ray's `checkpoint_upload_fn` of one rank. Ray calls it in a thread; the training thread calls `begin`."""

    def __init__(self) -> None:
        self._is_free = threading.Event()
        self._is_free.set()
        self.seconds = 0.0
        """What the last one took."""

    def begin(self) -> None:
        """Wait for the upload before, if it is still under way; the next may then be handed to Ray."""
        self._is_free.wait()
        self._is_free.clear()

    def __call__(self, checkpoint: Any, name: str) -> Any:
        """Copy a local checkpoint into the run folder; the checkpoint there.

        Raises:
            RunFailed: The storage did not take it, again and again. Supervised runs do not retry that.
        """
        began = time.monotonic()
        try:
            return self._persist(checkpoint, name)
        finally:
            self.seconds = time.monotonic() - began
            self._is_free.set()

    def _persist(self, checkpoint: Any, name: str) -> Any:
        storage = ray.train.get_context().get_storage()
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            try:
                return storage.persist_current_checkpoint(checkpoint, name)
            except (OSError, pa.ArrowException) as error:
                reason = " ".join(str(error).split())
        raise RunFailed(f"the checkpoint {name} cannot be written: {reason}")
