"""An engine in another process gives what it gives in this one, and its end is noticed."""

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dpo_ray.errors import InputError
from serve.config import ServedModel
from serve.engine import Engine
from serve.process import STATE_S, EngineProcess, schedule
from serve.schema import ApiError, Ask, Begun

ASK = Ask("tiny", ("Once upon", "The dog"), n=2, max_tokens=20, seed=3)


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> ServedModel:
    return ServedModel(name="tiny", path=str(tiny_model), reference=str(tiny_model), beta=0.5)


@pytest.fixture(scope="module")
def process(served: ServedModel) -> Iterator[EngineProcess]:
    schedule("SCHED_BATCH")  # as those who carry pieces
    try:
        made = EngineProcess(served, 200)
    finally:
        schedule("SCHED_OTHER")
    yield made
    made.close()
    assert made._process.returncode is not None


async def texts(engine: Any, ask: Ask) -> list[str]:
    found = [""] * ask.n * len(ask.prompts)
    async for item in engine.write(ask):
        assert not isinstance(item, ApiError), item
        for piece in () if isinstance(item, Begun) else item:
            found[piece.number] += piece.text
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform != "linux", reason="Linux schedules by policy")
def test_who_carries_pieces_does_not_interrupt_it(process: EngineProcess):
    engine = psutil.Process(process._process.pid)
    assert {os.sched_getscheduler(thread.id) for thread in engine.threads()} == {os.SCHED_OTHER}
    own = threading.Event()
    other = threading.Thread(target=own.wait, args=(30,))
    other.start()
    schedule("SCHED_BATCH")
    try:
        policies = {os.sched_getscheduler(thread.id) for thread in psutil.Process().threads()}
    finally:
        schedule("SCHED_OTHER")
        own.set()
        other.join()
    assert policies == {os.SCHED_BATCH}


def test_it_gives_what_an_engine_gives(process: EngineProcess, served: ServedModel):
    engine = Engine(served, 200)
    items = [("Once", (" upon", " a"))]
    try:
        for is_stream in (False, True):
            ask = ASK._replace(is_stream=is_stream)
            assert asyncio.run(texts(process, ask)) == asyncio.run(texts(engine, ask))
        assert asyncio.run(process.rewards("tiny", items)) == asyncio.run(engine.rewards("tiny", items))

        async def refusal(one: Any) -> list[Any]:
            return [item async for item in one.write(ASK._replace(max_tokens=201))]

        (ours,), (theirs,) = asyncio.run(refusal(process)), asyncio.run(refusal(engine))
        assert ours.body == theirs.body
    finally:
        engine.close()


def test_many_at_once_keep_their_own(process: EngineProcess):
    async def together() -> list[list[str]]:
        return await asyncio.gather(*(texts(process, ASK._replace(seed=i, is_stream=i % 2 == 0)) for i in range(24)))

    assert asyncio.run(together()) == [asyncio.run(texts(process, ASK._replace(seed=i))) for i in range(24)]


def test_whoever_leaves_is_left_at_once(process: EngineProcess):
    async def leave() -> None:
        source = process.write(ASK._replace(max_tokens=200, n=8, is_stream=True))
        await anext(source)
        await anext(source)
        await source.aclose()

    time.sleep(2 * STATE_S)  # what it tells of itself is so old
    before = process.load()
    asyncio.run(leave())
    wait_for(lambda: process.load().requests > before.requests)
    wait_for(lambda: (process.load().running, process.load().waiting, process.load().cache_used) == (0, 0, 0.0))
    assert process.load().steps - before.steps < 100, "the answers were written to their end"
    assert process._inboxes == {}


def test_a_model_that_cannot_be_served_says_why(tmp_path: Path):
    with pytest.raises(InputError, match="no model at"):
        EngineProcess(ServedModel(name="none", path=str(tmp_path / "none")))


def test_the_end_of_the_process_is_told(served: ServedModel):
    made = EngineProcess(served, 200)
    try:
        assert made.problem() is None

        async def killed() -> list[Any]:
            found = []
            async for item in made.write(ASK._replace(max_tokens=200, is_stream=True)):
                found.append(item)
                if len(found) == 2:
                    os.kill(made._process.pid, signal.SIGKILL)
            return found

        *_, error = asyncio.run(asyncio.wait_for(killed(), 30))
        assert isinstance(error, ApiError)
        assert (error.status, error.code) == (503, "engine_failed")
        wait_for(lambda: made.problem() is not None)
        assert "exit code -9" in str(made.problem())
        (again,) = asyncio.run(asyncio.wait_for(_all(made.write(ASK)), 30))
        assert isinstance(again, ApiError)
        assert isinstance(asyncio.run(made.rewards("tiny", [("a", ("b",))])), ApiError)
    finally:
        made.close()


async def _all(source: Any) -> list[Any]:
    return [item async for item in source]


def test_a_process_that_says_nothing_is_stuck(process: EngineProcess, monkeypatch: pytest.MonkeyPatch):
    assert process.problem() is None
    now = time.monotonic()
    monkeypatch.setattr("serve.process.time.monotonic", lambda: now + 100)
    os.kill(process._process.pid, signal.SIGSTOP)
    try:
        time.sleep(0.1)
        process._told = now
        assert "silent for 100 s" in str(process.problem())
    finally:
        os.kill(process._process.pid, signal.SIGCONT)
