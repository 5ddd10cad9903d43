"""Requests to an OpenAI-compatible chat endpoint that outlast what a server does: retries, pacing, counted tokens.

Trouble that may pass ends in a reply without text, never in an error; what no patience mends, as a wrong key or model
name, is an error at once. The key is sent as a bearer token and appears nowhere else. What is asked is in `judge`.
"""

import json
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import requests

from dpo_ray.config import LlmOracleConfig
from dpo_ray.errors import InputError

logger = logging.getLogger(__name__)

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LONGEST_HOLD_S = 3600.0
"""A server that asks for a longer pause than this is not waited for."""

RETRIED = {408, 409, 429}
ABOUT_THE_TEXT = re.compile(
    r"context.(length|size|window)|prompt is too long|content.?(filter|policy|management)", re.IGNORECASE
)
"""In a refusal: this text is too long or not wanted, others may be taken."""

_SECONDS = re.compile(r"\d+(\.\d+)?")


def backoff(repetition: int, jitter: float) -> float:
    """Seconds to wait before a repetition, counted from 1; `jitter` is a random number in [0, 1)."""
    return min(LONGEST_WAIT_S, FIRST_WAIT_S * 2.0 ** (repetition - 1) * (1 + jitter))


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait, from `Retry-After`: a number, or a date, which is compared with the
    server's own clock where it tells it."""
    text = headers.get("Retry-After", "").strip()
    if _SECONDS.fullmatch(text):
        return float(text)
    until, now = _date(text), _date(headers.get("Date", "")) or datetime.now(UTC)
    return None if until is None else max(0.0, (until - now).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        found = parsedate_to_datetime(text)
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


class Pace:
    """When the next request may be sent, over all threads."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float]) -> None:
        self._interval = 60 / per_minute if per_minute else 0.0
        self._clock, self._lock = clock, threading.Lock()
        self._next = clock()

    def reserve(self) -> float:
        """Seconds to wait for a turn, which nobody else gets."""
        with self._lock:
            now = self._clock()
            turn = max(now, self._next)
            self._next = turn + self._interval
            return turn - now

    def hold(self, seconds: float) -> None:
        """No turn that is still free begins before so many seconds have passed."""
        with self._lock:
            self._next = max(self._next, self._clock() + seconds)


class Reply(NamedTuple):
    """What one request, or all requests of one question, brought."""

    text: str | None = None
    """None where nothing usable came."""

    problem: str = ""
    """Why not."""

    prompt_tokens: int = 0
    answer_tokens: int = 0
    requests: int = 1
    hold_s: float | None = None
    """The pause that the server asks for."""

    is_final: bool = False
    """Asking again is of no use."""


class Chat:
    """A model behind an endpoint; threads may share it.

    Args:
        is_usable: Whether a text is what was asked for; others are asked for again.
        clock: Seconds, for the pace.
        sleep: Waits so many seconds; None: until then, or until `has_ended` is set.
        jitter: Random numbers in [0, 1).

    Raises:
        InputError: The URL is none, or the key is missing.
    """

    def __init__(
        self,
        config: LlmOracleConfig,
        is_usable: Callable[[str], bool],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] | None = None,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        address = urlsplit(config.url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(f"`acquire.oracle.url`: `{config.url}` is no URL of a server")
        self.has_ended = threading.Event()
        """Set it, and no further request is sent; those under way are finished."""

        self._config, self._is_usable, self._jitter = config, is_usable, jitter
        self._url = f"{config.url.rstrip('/')}/chat/completions"
        self._key = None if config.api_key_env is None else _key(config.api_key_env)
        self._limit = "max_tokens"
        self._pace = Pace(config.requests_per_minute, clock)
        self._sleep = sleep or self.has_ended.wait
        self._session = requests.Session()
        self._session.mount(f"{address.scheme}://", requests.adapters.HTTPAdapter(pool_maxsize=config.concurrency))

    def complete(self, question: str) -> Reply:
        """The reply to one message of a user, after as many requests as it takes.

        Raises:
            InputError: The server refuses what would be the same for any question.
        """
        total = reply = Reply(requests=0)
        for repetition in range(self._config.max_retries + 1):
            if repetition:
                self._pause(repetition, reply.hold_s)
            self._sleep(self._pace.reserve())
            if self.has_ended.is_set():
                break
            reply = self._request(question)
            total = reply._replace(
                requests=total.requests + 1,
                prompt_tokens=total.prompt_tokens + reply.prompt_tokens,
                answer_tokens=total.answer_tokens + reply.answer_tokens,
            )
            if reply.text is not None:
                return total
            logger.info("%s", reply.problem)
            if reply.is_final:
                break
        several = f" (the last of {total.requests} requests)" if total.requests > 1 else ""
        return total._replace(problem=total.problem + several)

    def _pause(self, repetition: int, hold_s: float | None) -> None:
        """Between two requests: as the server asks, which then holds for all threads, else ever longer."""
        if hold_s is None:
            self._sleep(backoff(repetition, self._jitter()))
        else:
            self._pace.hold(max(hold_s, FIRST_WAIT_S))

    def _request(self, question: str) -> Reply:
        limit = self._limit
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": question}],
            limit: self._config.max_tokens,
        }
        if self._config.temperature is not None:
            body["temperature"] = self._config.temperature
        try:
            response = self._session.post(
                self._url, json=body, auth=self._sign, timeout=self._config.timeout_seconds, allow_redirects=False
            )
        except requests.Timeout:
            return Reply(problem=f"no answer of {self._url} within {self._config.timeout_seconds:g} s")
        except requests.RequestException as error:
            return Reply(problem=f"no connection to {self._url} ({type(error).__name__})")
        status = response.status_code
        if 200 <= status < 300:
            return self._read(response.content)
        message = self._message(response.content) or response.reason
        problem = f"{self._url} answered {status}: {message}"
        if status in RETRIED or status >= 500:
            hold_s = retry_after(response.headers)
            return Reply(problem=problem, hold_s=hold_s, is_final=hold_s is not None and hold_s > LONGEST_HOLD_S)
        if status == 400 and limit == "max_tokens" and "max_completion_tokens" in message:
            self._limit = "max_completion_tokens"  # as newer servers call it
            return self._request(question)
        if status == 413 or (status in (400, 422) and ABOUT_THE_TEXT.search(message)):
            return Reply(problem=problem, is_final=True)
        hint = f"; is the key in `{self._config.api_key_env}` right?" if status in (401, 403) else ""
        raise InputError(f"`acquire.oracle`: {problem}{hint}")

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """As the request's `auth`, without which requests would look for another key in `~/.netrc`."""
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _read(self, content: bytes) -> Reply:
        """A reply with status 200, which may still hold anything."""
        try:
            payload: Any = json.loads(content)
        except ValueError:
            return Reply(problem=f"{self._url} answered with no JSON")
        text, ending, prompt_tokens, answer_tokens = "", "", 0, 0
        match payload:
            case {"choices": [{"message": {"content": str(said)}}, *_]}:
                text = self._without_key(said)
        match payload:
            case {"usage": {"prompt_tokens": int(prompt_tokens), "completion_tokens": int(answer_tokens)}}:
                pass
        match payload:
            case {"choices": [{"finish_reason": "length"}, *_]}:
                ending = f", cut off after `max_tokens`: {self._config.max_tokens}"
            case {"error": _}:  # as gateways do
                ending = f": {self._message(content)}"
        if self._is_usable(text):
            return Reply(text, "", prompt_tokens, answer_tokens)
        problem = f"no usable answer, which ends in `{_one_line(text[-80:])}`{ending}"
        return Reply(None, problem, prompt_tokens, answer_tokens)

    def _message(self, content: bytes) -> str:
        """What the server says of an error, in one line."""
        text = content.decode(errors="replace")
        try:
            payload: Any = json.loads(text)
        except ValueError:
            payload = None
        match payload:
            case {"error": {"message": str(said)}} | {"error": str(said)} | {"message": str(said)}:
                text = said
        return _one_line(self._without_key(text))[:300]

    def _without_key(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _key(variable: str) -> str:
    key = os.environ.get(variable, "").strip()
    if not key:
        raise InputError(f"`acquire.oracle.api_key_env`: the environment variable `{variable}` holds no key")
    if not re.fullmatch(r"[!-~]+", key):
        raise InputError(f"`acquire.oracle.api_key_env`: what `{variable}` holds cannot be a key")
    return key
