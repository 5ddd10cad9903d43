"""A request whose replica is lost is begun again while its client has nothing of it, and never mixed with the lost."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from serve import answers
from serve.answers import ATTEMPTS, ReplicaLost, gathered, pieces
from serve.metrics import Metrics
from serve.schema import ApiError, Ask, Begun, Piece

ASK = Ask("m", ("p",), seed=5)
FIRST, LAST = Piece(0, "a", 1), Piece(0, "b", 1, "stop")


class Flaky:
    """A backend whose attempts go by a script: items are given, errors raised, numbers waited."""

    def __init__(self, *attempts: list[Any]) -> None:
        self._attempts = list(attempts)
        self.asked: list[Ask] = []
        self.closed = 0

    async def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        self.asked.append(ask)
        try:
            for item in self._attempts[len(self.asked) - 1]:
                if isinstance(item, float):
                    await asyncio.sleep(item)
                elif isinstance(item, ReplicaLost):
                    raise item
                else:
                    yield item
        finally:
            self.closed += 1

    async def rewards(self, model: str, items: Any) -> Any:
        raise NotImplementedError

    async def loads(self) -> Any:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers, "WAIT_S", 0.0)


def run(backend: Flaky, *, is_stream: bool, timeout_s: float = 5.0) -> list[Any]:
    """All that a client would be given; an error is the last item."""

    async def collect() -> list[Any]:
        found: list[Any] = []
        source = pieces(backend, ASK._replace(is_stream=is_stream), Metrics(), time.monotonic() + timeout_s)
        try:
            async for item in source:
                found.append(item)
        except ApiError as error:
            found.append(error)
        return found

    found = asyncio.run(collect())
    assert backend.closed == len(backend.asked)
    return found


LOST = ReplicaLost("gone")
WHOLE: list[Any] = [Begun(3), [FIRST], [LAST]]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize(
    "lost", [[LOST], [Begun(3), LOST], [ApiError(503, "no luck")]], ids=["at once", "begun", "503"]
)
def test_what_is_lost_before_its_first_text_is_begun_again(lost: list[Any], is_stream: bool):
    backend = Flaky(lost, WHOLE)
    assert run(backend, is_stream=is_stream) == WHOLE
    assert [ask.seed for ask in backend.asked] == [5, 5]


def test_a_whole_answer_has_nothing_of_the_attempt_that_was_lost():
    backend = Flaky([Begun(3), [FIRST], LOST], WHOLE)

    async def collect() -> Any:
        return await gathered(pieces(backend, ASK, Metrics(), time.monotonic() + 5), 1)

    whole = asyncio.run(collect())
    assert (whole.choices[0].text, whole.usage.completion_tokens, whole.usage.prompt_tokens) == ("ab", 2, 3)


def test_a_stream_that_has_shown_text_ends_with_an_error():
    backend = Flaky([Begun(3), [FIRST], LOST], WHOLE)
    *shown, error = run(backend, is_stream=True)
    assert shown == [Begun(3), [FIRST]]
    assert (error.status, error.code) == (503, "replica_lost")
    assert len(backend.asked) == 1


@pytest.mark.parametrize("make", [lambda: LOST, lambda: ApiError(503, "no luck", code="engine_failed")])
def test_it_is_not_tried_for_ever(make: Callable[[], Any]):
    backend = Flaky(*[[make()] for _ in range(ATTEMPTS)])
    (error,) = run(backend, is_stream=False)
    assert error.status == 503
    assert len(backend.asked) == ATTEMPTS


@pytest.mark.parametrize("status", [400, 404, 429])
def test_a_refusal_is_final(status: int):
    backend = Flaky([ApiError(status, "no")])
    (error,) = run(backend, is_stream=False)
    assert error.status == status
    assert len(backend.asked) == 1


def test_a_request_that_takes_too_long_is_ended():
    backend = Flaky([Begun(3), [FIRST], 30.0, [LAST]])
    *_, error = run(backend, is_stream=True, timeout_s=0.2)
    assert (error.status, error.code) == (504, "timeout")
