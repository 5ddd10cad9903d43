"""API keys: who may ask, and how much. Keys are kept as hashes, compared in constant time, and never logged.

A key is 32 random bytes, so a plain SHA-256 of it is as hard to invert as the key is to guess; passwords would need
more.
No HTTP here: `app` turns what this says into responses.
"""

import hashlib
import hmac
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dpo_ray.errors import InputError

KEY_VARIABLE = "DPO_RAY_API_KEY"
PREFIX = "dpo-"


class ApiKey(BaseModel):
    """A key by its hash, and its limits; null is no limit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1, pattern=r"^[A-Za-z0-9._-]+$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    requests_per_minute: float | None = Field(default=None, gt=0)
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Prompt tokens and `max_tokens` of what is asked for."""

    concurrent: int | None = Field(default=None, ge=1)
    """Requests at work at the same time."""


def new_key(name: str) -> tuple[str, ApiKey]:
    """A key that nobody has, to be shown once, and what the server keeps of it."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, ApiKey(name=name, sha256=digest(secret))


def digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


class KeyRing:
    """The keys that open the service.

    Raises:
        InputError: Two keys have one name, or one hash.
    """

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._keys = tuple(dict.fromkeys(keys))
        for field in ("name", "sha256"):
            values = [getattr(key, field) for key in self._keys]
            for key in self._keys:
                if values.count(getattr(key, field)) > 1:
                    raise InputError(f"two API keys have the {field} of `{key.name}`")

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[ApiKey]:
        return iter(self._keys)

    def find(self, secret: str) -> ApiKey | None:
        """The key of a secret. Takes as long for a wrong one as for any right one."""
        presented = digest(secret)
        found = None
        for key in self._keys:
            if hmac.compare_digest(presented, key.sha256):
                found = key
        return found


def bearer(header: str | None) -> str | None:
    """The secret in an `Authorization` header; None if there is none."""
    match = re.fullmatch(r"[Bb]earer +(\S+) *", header or "")
    return match[1] if match else None


def read_keys(path: Path | None, environment: dict[str, str] | None = None) -> KeyRing:
    """Keys of a YAML file (`keys: [{name, sha256, ...}]`), and the one in `DPO_RAY_API_KEY`.

    Raises:
        InputError: The file cannot be read, or an entry of it is wrong; names the entry.
    """
    keys = [] if path is None else _from_file(path)
    secret = (os.environ if environment is None else environment).get(KEY_VARIABLE, "").strip()
    if secret:
        if len(secret) < 16:
            raise InputError(f"`{KEY_VARIABLE}` is shorter than 16 characters; 32 random ones are good")
        keys.append(ApiKey(name="environment", sha256=digest(secret)))
    return KeyRing(keys)


def _from_file(path: Path) -> list[ApiKey]:
    try:
        tree = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the API keys of {path}: {' '.join(str(error).split())}") from None
    entries = tree.get("keys") if isinstance(tree, dict) else None
    if not isinstance(entries, list):
        raise InputError(f"{path} has no list `keys`")
    keys = []
    for number, entry in enumerate(entries, start=1):
        try:
            keys.append(ApiKey.model_validate(entry))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"]))
            raise InputError(f"{path}: key {number}: `{where}`: {problem['msg']}") from None
    return keys


class Refusal(NamedTuple):
    """Why a request must wait."""

    limit: str
    """Name of the limit, as in `ApiKey`."""

    retry_after_s: float


class Meter:
    """Counts what each key has used in this process; threads may share it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._buckets: dict[tuple[str, str], Bucket] = {}
        self._at_work: dict[str, int] = {}

    def enter(self, key: ApiKey, tokens: int) -> Refusal | None:
        """Count a request in, or say why not; then nothing is counted."""
        with self._lock:
            now = self._clock()
            if key.concurrent is not None and self._at_work.get(key.name, 0) >= key.concurrent:
                return Refusal("concurrent", 1.0)
            wanted = {"requests_per_minute": 1.0, "tokens_per_minute": float(tokens)}
            limited = [(limit, amount) for limit, amount in wanted.items() if getattr(key, limit) is not None]
            for limit, amount in limited:
                wait = self._bucket(key, limit, now).wait(amount, now)
                if wait > 0:
                    return Refusal(limit, wait)
            for limit, amount in limited:
                self._bucket(key, limit, now).take(amount, now)
            self._at_work[key.name] = self._at_work.get(key.name, 0) + 1
            return None

    def charge(self, key: ApiKey, tokens: int) -> None:
        """Count more tokens, or fewer where there are less than was thought, of a request that was let in."""
        with self._lock:
            if key.tokens_per_minute is not None:
                now = self._clock()
                self._bucket(key, "tokens_per_minute", now).take(tokens, now)

    def leave(self, key: ApiKey) -> None:
        """A request that was let in has ended."""
        with self._lock:
            self._at_work[key.name] -= 1

    def _bucket(self, key: ApiKey, limit: str, now: float) -> "Bucket":
        per_minute: float = getattr(key, limit)
        return self._buckets.setdefault((key.name, limit), Bucket(per_minute, now))


class Bucket:
    """A token bucket: a minute's worth may be used at once, and flows back evenly.

    A request for more than a minute's worth is let in when the bucket is full, and leaves it in debt: otherwise it
    could never be served.
    """

    def __init__(self, per_minute: float, now: float) -> None:
        self._size, self._level, self._at = per_minute, per_minute, now

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much may be taken; 0: now."""
        missing = min(amount, self._size) - self._filled(now)
        return max(0.0, missing * 60 / self._size)

    def take(self, amount: float, now: float) -> None:
        self._level, self._at = self._filled(now) - amount, now

    def _filled(self, now: float) -> float:
        return min(self._size, self._level + (now - self._at) * self._size / 60)
