"""One attempt holds a run: who is refused, who may take over, who must stop."""

import dataclasses
import json
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_ray import lease
from dpo_ray.errors import InputError
from dpo_ray.lease import LEASE_FILE, Holder, acquire, holds, myself, read_holder
from dpo_ray.storage import Folder


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    monkeypatch.setattr(lease, "RENEW_S", 0.02)
    monkeypatch.setattr(lease, "EXPIRES_S", 0.5)
    monkeypatch.setattr(lease, "SETTLE_S", 0.0)
    return Folder(str(tmp_path))


def put(folder: Folder, holder: Holder) -> None:
    folder.write_json(LEASE_FILE, dataclasses.asdict(holder))


def elsewhere(**changes: object) -> Holder:
    return dataclasses.replace(myself(), host="node-7", machine="another boot", **changes)  # type: ignore[arg-type]


def eventually(is_so: Callable[[], bool]) -> bool:
    end = time.monotonic() + 5
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    return is_so()


def test_a_lease_is_renewed_while_held_and_gone_afterwards(folder: Folder):
    with acquire(folder) as held:
        assert holds(folder, held.token)
        assert eventually(lambda: (read_holder(folder) or myself()).renewed > 2)
        assert held.taken_by is None
    assert read_holder(folder) is None
    assert not holds(folder, held.token)


def test_a_living_process_of_this_machine_refuses_at_once_and_by_name(folder: Folder):
    with (
        acquire(folder) as held,
        pytest.raises(InputError, match=r"is held by process \d+ on .*wait for it or stop it"),
    ):
        acquire(folder)
    assert not holds(folder, held.token)


def test_a_dead_process_of_this_machine_is_succeeded_at_once(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "EXPIRES_S", 1000.0)
    ended = subprocess.Popen(["true"])
    ended.wait()
    put(folder, dataclasses.replace(myself(), pid=ended.pid))
    with acquire(folder) as held:
        assert holds(folder, held.token)


def test_a_later_process_with_the_same_id_is_not_the_holder(folder: Folder):
    put(folder, dataclasses.replace(myself(), process_start="1"))
    with acquire(folder) as held:
        assert holds(folder, held.token)


def test_another_machine_that_gives_no_sign_of_life_is_succeeded_in_time(folder: Folder):
    told: list[str] = []
    put(folder, elsewhere())
    began = time.monotonic()
    with acquire(folder, told.append) as held:
        assert time.monotonic() - began >= 0.5
        assert holds(folder, held.token)
    assert told == [f"the run is held by process {myself().pid} on node-7: waiting up to 0 s for a sign of life"]


def test_another_machine_that_renews_is_left_alone(folder: Folder):
    holder = elsewhere()
    put(folder, holder)
    threading.Timer(0.1, lambda: put(folder, dataclasses.replace(holder, renewed=1))).start()
    with pytest.raises(InputError, match=r"is held by process .* on node-7"):
        acquire(folder)


def test_a_holder_taken_for_dead_notices_and_leaves_its_successor_alone(folder: Folder):
    successor = elsewhere()
    with acquire(folder) as held:
        put(folder, successor)
        assert eventually(lambda: held.taken_by is not None)
        assert held.taken_by == successor
        time.sleep(0.1)
    assert read_holder(folder) == successor  # neither renewed over nor removed


def test_of_two_claims_in_one_moment_the_later_stands(folder: Folder, monkeypatch: pytest.MonkeyPatch):
    other = elsewhere()
    monkeypatch.setattr(lease.time, "sleep", lambda seconds: put(folder, other))
    with pytest.raises(InputError, match=r"taken in the same moment by process .* on node-7"):
        acquire(folder)
    assert read_holder(folder) == other


def test_a_file_that_is_no_lease_holds_nothing(folder: Folder):
    folder.write(LEASE_FILE, b'{"token": ')
    assert read_holder(folder) is None
    folder.write(LEASE_FILE, json.dumps({"token": "a"}).encode())
    assert read_holder(folder) is None
