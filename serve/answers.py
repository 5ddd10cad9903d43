"""From a request to the engines' pieces, and from pieces to an answer: which model, again on another replica, usage.

A request is begun again only while its client has nothing of it. Its seed is drawn before the first attempt, so a
second one writes the same.
"""

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from serve.metrics import Metrics
from serve.schema import ApiError, Ask, Begun, Choice, Load, Piece, Reward, TokenLogp, Usage

ATTEMPTS, WAIT_S = 5, 0.1
"""And seconds before the second, doubled each time: Ray Serve takes a moment to see that a replica is gone."""


class ReplicaLost(Exception):
    """The engine that was at work is gone."""


class Backend(Protocol):
    """The engines, wherever they are."""

    def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        """See `Engine.write`.

        Raises:
            ReplicaLost: Its replica died.
            ApiError: 429, as all are busy and enough requests wait.
        """

    async def rewards(
        self, model: str, items: Sequence[tuple[str | tuple[dict[str, object], ...], Sequence[str]]]
    ) -> list[list[Reward]] | ApiError:
        """See `Engine.rewards`. Raises as `write` does."""

    async def loads(self) -> Mapping[str, Sequence[Load]]:
        """Of every engine that answers, by the names of the models.

        Raises:
            ApiError: 503, as a model has no engine.
        """


def pick(shares: Mapping[str, float], by: str) -> str:
    """A model by its share of the traffic: the same for equal `by`, so a user keeps theirs."""
    digest = hashlib.blake2b(by.encode(), digest_size=8).digest()
    place = int.from_bytes(digest, "big") / 2**64 * sum(shares.values())
    last = ""
    for name, share in sorted(shares.items()):
        if share > 0:
            last = name
            place -= share
            if place < 0:
                break
    return last


def new_seed() -> int:
    return secrets.randbits(63)


async def pieces(backend: Backend, ask: Ask, metrics: Metrics, deadline: float) -> AsyncGenerator[Begun | list[Piece]]:
    """What an engine writes, from one that lives.

    Raises:
        ApiError: The engine refuses, or all attempts failed, or the time is over.
    """
    begun = False
    for attempt in range(ATTEMPTS):
        if attempt:
            metrics.retries.labels(ask.model).inc()
            await asyncio.sleep(WAIT_S * 2.0 ** (attempt - 1))
        is_last, is_sent, held = attempt == ATTEMPTS - 1, False, list[list[Piece]]()
        source = backend.write(ask)
        try:
            while (item := await _next(source, deadline)) is not None:
                if isinstance(item, ApiError):
                    if item.status < 500 or is_sent or is_last:
                        raise item
                    break
                if isinstance(item, Begun):
                    if not begun:
                        begun = True
                        yield item
                elif ask.is_stream:
                    is_sent = True
                    yield item
                else:
                    held.append(item)
            else:
                for item in held:
                    yield item
                return
        except ReplicaLost:
            if is_sent or is_last:
                message = "the replica that wrote this answer was lost; ask again"
                raise ApiError(503, message, code="replica_lost", retry_after_s=1) from None
        finally:
            await source.aclose()


async def _next(
    source: AsyncGenerator[ApiError | Begun | list[Piece]], deadline: float
) -> ApiError | Begun | list[Piece] | None:
    """The next item, None at the end."""
    try:
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await anext(source, None)
    except TimeoutError:
        raise ApiError(504, "the request took too long", code="timeout") from None


class Whole(NamedTuple):
    """All answers of a request."""

    choices: list[Choice]
    usage: Usage


async def gathered(found: AsyncIterator[Begun | list[Piece]], num_answers: int) -> Whole:
    """Answers from their pieces."""
    texts, logps, ends = [""] * num_answers, [list[TokenLogp]() for _ in range(num_answers)], [""] * num_answers
    prompt_tokens = completion_tokens = 0
    wants_logps = False
    async for item in found:
        if isinstance(item, Begun):
            prompt_tokens = item.prompt_tokens
            continue
        for piece in item:
            texts[piece.number] += piece.text
            completion_tokens += piece.num_tokens
            if piece.logps is not None:
                wants_logps = True
                logps[piece.number].extend(piece.logps)
            ends[piece.number] = piece.finish_reason or ends[piece.number]
    choices = [
        Choice(i, texts[i], "stop" if ends[i] == "stop" else "length", logps[i] if wants_logps else None)
        for i in range(num_answers)
    ]
    return Whole(choices, Usage(prompt_tokens, completion_tokens))
