"""An engine in a process of its own. What carries its pieces away then takes no time from the thread that computes: in
one process both wait for the interpreter's lock.

Messages are pickles on a socket between parent and child: numbered requests one way, lists of numbered items the other.
The child ends when its parent does.
"""

import asyncio
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

from dpo_ray.errors import InputError
from serve.config import ServedModel
from serve.schema import ApiError, Ask, Begun, Load, Piece, Reward

GROUP_S = 0.002
"""Items of the same step go together."""

STATE_S, SILENT_S = 0.5, 60.0
"""The child tells its state so often; one that says nothing for so long is stuck."""

END = None
"""Behind the last item of a request."""


def schedule(policy: str) -> None:
    """Tell Linux how to treat this process and those that it starts; elsewhere nothing happens.

    Carrying 32 streams wakes threads of Ray hundreds of times a second, and each would interrupt the engine: on two
    cores it then waits for a seventh of its time, and finds its caches emptied. Threads of `SCHED_BATCH` wait for a
    core instead.
    """
    if sys.platform == "linux":
        for thread in os.listdir("/proc/self/task"):
            with suppress(OSError):  # it has ended meanwhile, or a sandbox forbids it
                os.sched_setscheduler(int(thread), getattr(os, policy), os.sched_param(0))


class EngineProcess:
    """The interface of `Engine`; see there.

    Raises:
        InputError: The engine does not start, and why.
    """

    def __init__(self, served: ServedModel, max_tokens: int = 4096) -> None:
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
        )
        theirs.close()
        self._socket, self._connection = ours, Connection(os.dup(ours.fileno()))
        self._connection.send((served.model_dump(mode="json"), max_tokens))
        try:
            problem = self._connection.recv()
        except EOFError:
            problem = f"the engine of {served.path} ended at its start with exit code {self._process.wait()}"
        if problem is not None:
            raise InputError(problem)
        self._numbers = itertools.count(1)
        self._inboxes: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Queue[Any]]] = {}
        self._state: tuple[Load, str | None] = (Load(0, 0, 0.0, 0, 0, 0), None)
        self._told, self._is_over = time.monotonic(), False
        self._sending = threading.Lock()
        threading.Thread(target=self._listen, name="engine", daemon=True).start()

    def close(self) -> None:
        """End the child."""
        self._is_over = True
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the listeners on both sides
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    async def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        """See `Engine.write`."""
        number, inbox = self._open()
        item: Any = ()
        try:
            if self._is_over:
                yield _gone()
                return
            self._send(number, "write", ask)
            while (item := await inbox.get()) is not END:
                yield item
        finally:
            del self._inboxes[number]
            if item is not END and not self._is_over:
                self._send(number, "cancel")

    async def rewards(self, model: str, items: Sequence[Any]) -> list[list[Reward]] | ApiError:
        """See `Engine.rewards`."""
        number, inbox = self._open()
        try:
            if self._is_over:
                return _gone()
            self._send(number, "rewards", model, items)
            found: list[list[Reward]] | ApiError = await inbox.get()
            return found
        finally:
            del self._inboxes[number]

    def load(self) -> Load:
        """See `Engine.load`; at most half a second old."""
        return self._state[0]

    def problem(self) -> str | None:
        """See `Engine.problem`."""
        if self._process.poll() is not None:
            return f"the engine's process ended with exit code {self._process.returncode}"
        silent = time.monotonic() - self._told
        return f"the engine's process is silent for {silent:.0f} s" if silent > SILENT_S else self._state[1]

    def _open(self) -> tuple[int, "asyncio.Queue[Any]"]:
        number, inbox = next(self._numbers), asyncio.Queue[Any]()
        self._inboxes[number] = asyncio.get_running_loop(), inbox
        return number, inbox

    def _send(self, *message: Any) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            self._lose()

    def _listen(self) -> None:
        """Hand items to whoever waits for them, until the child is gone; in a thread."""
        while True:
            try:
                batch = self._connection.recv()
            except (EOFError, OSError):
                break
            by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], Any]]] = {}
            for number, item in batch:
                if not number:
                    self._state, self._told = item, time.monotonic()
                elif number in self._inboxes:
                    loop, inbox = self._inboxes[number]
                    by_loop.setdefault(loop, []).append((inbox, item))
            for loop, items in by_loop.items():
                with suppress(RuntimeError):  # its loop has ended meanwhile
                    loop.call_soon_threadsafe(_hand_out, items)
        self._lose()

    def _lose(self) -> None:
        """The child is gone: tell those who wait."""
        if self._is_over:
            return
        self._is_over = True
        for loop, inbox in list(self._inboxes.values()):
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_hand_out, [(inbox, _gone()), (inbox, END)])


def _gone() -> ApiError:
    return ApiError(503, "the engine's process has ended", code="engine_failed")


def _hand_out(items: Sequence[tuple["asyncio.Queue[Any]", Any]]) -> None:
    for inbox, item in items:
        inbox.put_nowait(item)


class Child:
    """The other side: an engine, and the requests it is at."""

    def __init__(self, connection: Connection, engine: Any) -> None:
        self._connection, self._engine = connection, engine
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._outbox: list[tuple[int, Any]] = []
        self._ended = asyncio.Event()

    async def run(self) -> None:
        """Work until the parent is gone."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, args=(loop,), daemon=True).start()
        while not self._ended.is_set():
            self._tell(0, (self._engine.load(), self._engine.problem()))
            with suppress(TimeoutError):
                async with asyncio.timeout(STATE_S):
                    await self._ended.wait()

    def _listen(self, loop: asyncio.AbstractEventLoop) -> None:
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                loop.call_soon_threadsafe(self._ended.set)
                return
            loop.call_soon_threadsafe(self._take, *message)

    def _take(self, number: int, kind: str, *arguments: Any) -> None:
        if kind == "cancel":
            if number in self._tasks:
                self._tasks[number].cancel()
            return
        work: Callable[..., Any] = self._write if kind == "write" else self._rewards
        task = asyncio.get_running_loop().create_task(work(number, *arguments))
        self._tasks[number] = task
        task.add_done_callback(lambda _: self._tasks.pop(number))

    async def _write(self, number: int, ask: Ask) -> None:
        source = self._engine.write(ask)
        try:
            async for item in source:
                self._tell(number, item)
        except Exception as error:  # is told to whoever asked; this process lives on
            self._tell(number, _failure(error))
        finally:
            await source.aclose()
        self._tell(number, END)

    async def _rewards(self, number: int, model: str, items: Sequence[Any]) -> None:
        try:
            self._tell(number, await self._engine.rewards(model, items))
        except Exception as error:  # is told to whoever asked; this process lives on
            self._tell(number, _failure(error))

    def _tell(self, number: int, item: Any) -> None:
        if not self._outbox:
            asyncio.get_running_loop().call_later(GROUP_S, self._flush)
        self._outbox.append((number, item))

    def _flush(self) -> None:
        batch, self._outbox = self._outbox, []
        with suppress(OSError):  # the parent is gone; `_listen` knows
            self._connection.send(batch)


def _failure(error: Exception) -> ApiError:
    told = " ".join(str(error).split())[:200]
    return ApiError(503, f"the engine failed: {type(error).__name__}: {told}", code="engine_failed")


def main(descriptor: int) -> None:
    """The child: an engine on a socket that its parent gave it."""
    schedule("SCHED_OTHER")
    connection = Connection(descriptor)
    tree, max_tokens = connection.recv()
    import torch

    from serve.engine import Engine

    served = ServedModel.model_validate(tree)
    torch.set_num_threads(max(1, int(served.num_cpus)))
    try:
        engine = Engine(served, max_tokens)
    except (InputError, RuntimeError) as error:
        connection.send(" ".join(str(error).split())[:500])
        return
    connection.send(None)
    asyncio.run(Child(connection, engine).run())
    os._exit(0)  # threads that compute for nobody are not waited for


if __name__ == "__main__":
    main(int(sys.argv[1]))
