"""What rank 0 sees come in from outside, and when."""

import time
from pathlib import Path

import pytest

from dpo_ray import lease, notices
from dpo_ray.notices import STOP_FILE, Notice, Watch, is_close
from dpo_ray.storage import Folder


class Clock:
    def __init__(self) -> None:
        self.now = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(notices.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path))


def watch(folder: Folder, rank: int = 0, save_every_s: float | None = None, token: str = "mine") -> Watch:
    folder.write_json(lease.LEASE_FILE, {**lease.myself().__dict__, "token": "mine"})
    return Watch(folder, rank, token, save_every_s)


def test_a_stop_is_seen_at_once_on_a_local_disk_and_by_rank_0_only(folder: Folder, clock: Clock):
    first, second = watch(folder), watch(folder, rank=1)
    assert first.notices() == Notice(0)
    folder.write(STOP_FILE, b"")
    assert first.notices() == Notice.STOP
    assert second.notices() == Notice(0)


def test_ray_is_asked_every_second(folder: Folder, clock: Clock):
    found = watch(folder)
    clock.now += 0.5
    assert found.notices() == Notice(0)
    clock.now += 0.6
    assert found.notices() == Notice.LOOK
    assert found.notices() == Notice(0)


def test_an_attempt_whose_lease_is_another_s_is_fenced(folder: Folder, clock: Clock):
    mine, other, gone = watch(folder), watch(folder, token="other"), watch(folder)
    clock.now += 6
    assert Notice.FENCED not in mine.notices()
    assert Notice.FENCED in other.notices()
    folder.delete(lease.LEASE_FILE)
    assert Notice.FENCED in gone.notices()


def test_checkpoints_by_the_clock_count_from_the_last_one(folder: Folder, clock: Clock):
    found = watch(folder, save_every_s=60)
    clock.now += 59
    assert Notice.SAVE not in found.notices()
    found.saved()
    clock.now += 59
    assert Notice.SAVE not in found.notices()
    clock.now += 2
    assert Notice.SAVE in found.notices()
    assert Notice.SAVE not in watch(folder).notices()


def test_storage_that_is_away_for_a_moment_is_no_notice(folder: Folder, clock: Clock, monkeypatch: pytest.MonkeyPatch):
    found = watch(folder)
    clock.now += 10

    def away(self: Folder, name: str = "") -> bool:
        raise OSError("503 slow down")

    monkeypatch.setattr(Folder, "exists", away)
    assert found.notices() == Notice.LOOK


def test_flags_add_up_over_ranks_as_they_are():
    assert Notice(int(float(Notice.STOP | Notice.SAVE) + float(Notice(0)))) == Notice.STOP | Notice.SAVE


def test_an_unknown_deadline_may_be_now():
    assert is_close(None, 10)
    assert is_close(int((time.time() + 5) * 1000), 10)
    assert not is_close(int((time.time() + 60) * 1000), 10)
