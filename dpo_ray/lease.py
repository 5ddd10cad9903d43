"""The lease of a run folder: one attempt holds it and may write; a second one is told who does.

The holder renews a counter in `lease.json`. Whether a holder lives is seen by watching that counter, never by comparing
clocks of two machines; on one machine a dead process is seen at once. A holder that finds another token in the file has
been taken for dead, and must stop. Not every filesystem has a conditional write, so this narrows the window for two
writers to seconds; it does not close it (`docs/decisions.md`).
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from dpo_ray.errors import InputError
from dpo_ray.storage import Folder

LEASE_FILE = "lease.json"
RENEW_S, EXPIRES_S = 5.0, 45.0
SETTLE_S, SETTLE_REMOTE_S = 0.1, 2.0
"""Between writing a claim and reading it back: of two claims of the same moment, the later one stands."""


@dataclass(frozen=True)
class Holder:
    """What `lease.json` says."""

    token: str
    host: str
    machine: str
    """This boot of this machine, and the process namespace in it."""
    pid: int
    process_start: str
    """Tells a process from a later one with the same id."""
    renewed: int = 0

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def myself() -> Holder:
    return Holder(uuid.uuid4().hex, socket.gethostname(), _machine(), os.getpid(), _process_start(os.getpid()) or "")


def read_holder(folder: Folder) -> Holder | None:
    """None where no one holds the run, and where the file is not whole."""
    if not folder.exists(LEASE_FILE):
        return None
    try:
        return Holder(**json.loads(folder.read(LEASE_FILE)))
    except (ValueError, TypeError, FileNotFoundError):
        return None


def holds(folder: Folder, token: str) -> bool:
    """Whether the attempt with this token still holds the run."""
    holder = read_holder(folder)
    return holder is not None and holder.token == token


class Lease:
    """A held lease, renewed by a thread until it is left. Made by `acquire`."""

    def __init__(self, folder: Folder, holder: Holder) -> None:
        self._folder, self._holder = folder, holder
        self.taken_by: Holder | None = None
        """Who holds the run instead, once that was noticed."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._thread.start()

    @property
    def token(self) -> str:
        return self._holder.token

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if holds(self._folder, self.token):
            self._folder.delete(LEASE_FILE)

    def _renew(self) -> None:
        renewed = 0
        while not self._ended.wait(RENEW_S):
            try:
                holder = read_holder(self._folder)
                if holder is not None and holder.token != self.token:
                    self.taken_by = holder
                    return
                renewed += 1
                _write(self._folder, Holder(**(asdict(self._holder) | {"renewed": renewed})))
            except (OSError, InputError):
                continue  # the storage is away for a moment; if for long, another may take the run, and we see that


def acquire(folder: Folder, tell: Callable[[str], None] = lambda text: None) -> Lease:
    """Hold a run, at once or when its last holder is known to be dead.

    Args:
        tell: Is told when there is something to wait for.

    Raises:
        InputError: Another attempt holds it, and lives.
    """
    holder = read_holder(folder)
    if holder is not None:
        _wait_for_death(folder, holder, tell)
    me = myself()
    _write(folder, me)
    time.sleep(SETTLE_S if folder.is_local else SETTLE_REMOTE_S)
    now = read_holder(folder)
    if now is None or now.token != me.token:
        raise InputError(f"the run {folder.path} was taken in the same moment by {now}; leave it to that one")
    return Lease(folder, me)


def _wait_for_death(folder: Folder, holder: Holder, tell: Callable[[str], None]) -> None:
    held = InputError(f"the run {folder.path} is held by {holder}, which is at work on it; wait for it or stop it")
    if holder.machine == _machine():
        if _process_start(holder.pid) == holder.process_start:
            raise held
        return
    tell(f"the run is held by {holder}: waiting up to {EXPIRES_S:.0f} s for a sign of life")
    end = time.monotonic() + EXPIRES_S
    while time.monotonic() < end:
        time.sleep(min(1.0, EXPIRES_S / 10))
        now = read_holder(folder)
        if now is None:
            return
        if now != holder:
            raise held


def _write(folder: Folder, holder: Holder) -> None:
    folder.write_json(LEASE_FILE, asdict(holder))


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _process_start(pid: int) -> str | None:
    """When a process of this machine started; None if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
