"""Uploads beside training: one at a time, tried again, and a clear end when the storage does not take them."""

import threading
from typing import Any

import pytest

from dpo_ray import uploads
from dpo_ray.errors import RunFailed
from dpo_ray.uploads import TRIES, Uploads


class Storage:
    """Fails the first `failures` times."""

    def __init__(self, failures: int) -> None:
        self.failures, self.calls = failures, 0
        self.go = threading.Event()
        self.go.set()

    def persist_current_checkpoint(self, checkpoint: Any, name: str) -> str:
        self.go.wait()
        self.calls += 1
        if self.calls <= self.failures:
            raise OSError("503\nslow down")
        return f"stored {name}"


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> Storage:
    storage = Storage(failures=0)

    class Context:
        @staticmethod
        def get_storage() -> Storage:
            return storage

    monkeypatch.setattr(uploads.ray.train, "get_context", Context)
    monkeypatch.setattr(uploads.time, "sleep", lambda seconds: None)
    return storage


def test_a_storage_that_stumbles_is_tried_again(stored: Storage):
    stored.failures = TRIES - 1
    assert Uploads()("checkpoint", "step-000010") == "stored step-000010"
    assert stored.calls == TRIES


def test_a_storage_that_stays_away_ends_the_run_by_name(stored: Storage):
    stored.failures = TRIES
    with pytest.raises(RunFailed, match="the checkpoint step-000010 cannot be written: 503 slow down"):
        Uploads()("checkpoint", "step-000010")


def test_the_next_upload_waits_for_the_one_before(stored: Storage):
    ours = Uploads()
    stored.go.clear()
    ours.begin()
    threading.Thread(target=ours, args=("checkpoint", "a"), daemon=True).start()
    second = threading.Thread(target=ours.begin, daemon=True)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    stored.go.set()
    second.join(5)
    assert not second.is_alive()


def test_a_failed_upload_does_not_hold_up_the_next(stored: Storage):
    ours, stored.failures = Uploads(), TRIES
    ours.begin()
    with pytest.raises(RunFailed):
        ours("checkpoint", "a")
    ours.begin()
