"""Preferences of people: which of two answers is better, in a file that training reads, and comparisons that are blind.

No HTTP here. A blind comparison needs no state of the server: a keyed hash of its id says which model stands on which
side, so every replica that has the secret knows it and the browser does not.
"""

import fcntl
import hmac
import json
import os
import secrets
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from dpo_ray.config import SourceConfig
from dpo_ray.data.formats import to_pairs
from dpo_ray.data.sources import Row
from dpo_ray.data.turns import RowError
from dpo_ray.errors import InputError
from dpo_ray.storage import Folder, read_lines
from serve.schema import Message, Strict

FILE, SECRET = "preferences.jsonl", ".secret"
SECRET_BYTES = 32
MAX_CHARACTERS, MAX_MESSAGES = 200_000, 500
"""Of a text, or of all messages together; what a model can read is shorter."""


def _bounded(messages: list[Message]) -> list[Message]:
    if sum(len(message.text) for message in messages) > MAX_CHARACTERS:
        raise ValueError(f"the messages have more than {MAX_CHARACTERS} characters")
    return messages


Characters = Annotated[str, Field(max_length=MAX_CHARACTERS)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES), AfterValidator(_bounded)]
Comparison = Annotated[str, Field(pattern=r"^[A-Za-z0-9-]{8,64}$")]
"""A random id that the client makes; one comparison is both answers and the vote."""


class ModelAnswer(Strict):
    """An answer and the model that gave it."""

    text: Characters
    model: str = Field(min_length=1, max_length=200)


class PreferenceRequest(Strict):
    """`POST /v1/preferences`."""

    prompt: Characters | Messages
    first: ModelAnswer
    second: ModelAnswer
    preferred: Literal["first", "second", "tie"]
    comment: str | None = Field(default=None, max_length=2000)


class CompareRequest(Strict):
    """`POST /compare/stream`: the answer of one side."""

    comparison: Comparison
    side: Literal["left", "right"]
    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)


class VoteRequest(Strict):
    """`POST /compare/vote`: both answers, and which is better."""

    comparison: Comparison
    messages: Messages
    left: Characters
    right: Characters
    preferred: Literal["left", "right", "tie"]

    def named(self, models: tuple[str, str]) -> PreferenceRequest:
        """The preference, now that the models on the left and on the right are told."""
        texts = (self.left, self.right)
        left, right = (ModelAnswer(text=text, model=model) for text, model in zip(texts, models, strict=True))
        sayings: dict[str, Literal["first", "second", "tie"]] = {"left": "first", "right": "second", "tie": "tie"}
        return PreferenceRequest(prompt=self.messages, first=left, second=right, preferred=sayings[self.preferred])


class PreferenceStore:
    """Preferences as JSON lines, which `data.sources: [{path: FOLDER}]` reads as they are.

    A row is written and synced under an exclusive lock before anyone is told of it, so several processes may share the
    folder. A row that training could not read is refused.

    Args:
        folder: On local disk; made where it is not there.
        clock: Seconds since 1970.

    Raises:
        InputError: The folder is not local, or cannot be written.
    """

    def __init__(self, folder: str, clock: Callable[[], float] = time.time) -> None:
        self._folder, self._clock = _opened(folder), clock
        self._path = Path(self._folder.path) / FILE
        try:
            self._path.touch()
            _sync(self._path.parent)
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from None

    def add(self, preference: PreferenceRequest, *, by: str | None, comparison: str | None = None) -> str:
        """Keep a preference.

        Args:
            preference: What is preferred to what.
            by: Name of the API key; None without keys.
            comparison: Id of the blind comparison that it ends. A comparison has one vote: voting again, as a double
                click does, is voting once.

        Returns:
            Id of the row.

        Raises:
            InputError: The comparison has another vote, or training could not read the row.
        """
        row = self._row(preference, by, comparison)
        try:
            to_pairs(Row(FILE, 1, row), SourceConfig(path=FILE))
        except RowError as error:
            raise InputError(f"this is no preference that can be learnt from: {error}") from None
        with self._path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            before = None if comparison is None else self._vote(comparison)
            if before is None:
                self._folder.append(FILE, json.dumps(row, ensure_ascii=False))
                os.fsync(file.fileno())
                return str(row["id"])
        if any(before[name] != row[name] for name in ("label", "prompt", "response_1", "response_2")):
            raise InputError(f"the comparison {comparison} has another vote already")
        return str(before["id"])

    def _row(self, preference: PreferenceRequest, by: str | None, comparison: str | None) -> dict[str, Any]:
        """The format `labelled` of `dpo_ray.data.formats`."""
        prompt = preference.prompt
        labels = {"first": 1, "second": 2, "tie": "tie"}
        row = {
            "id": uuid.uuid4().hex,
            "time": self._clock(),
            "prompt": prompt if isinstance(prompt, str) else [_turn(message) for message in prompt],
            "response_1": preference.first.text,
            "response_2": preference.second.text,
            "label": labels[preference.preferred],
            "model_1": preference.first.model,
            "model_2": preference.second.model,
            "by": by,
            "is_blind": comparison is not None,
        }
        rest = {"comparison": comparison, "comment": preference.comment}
        return row | {name: value for name, value in rest.items() if value is not None}

    def _vote(self, comparison: str) -> dict[str, Any] | None:
        """The row of a comparison, whichever process wrote it."""
        content = self._path.read_bytes()
        if comparison.encode() not in content:
            return None
        return next((row for row in read_lines(content) if row.get("comparison") == comparison), None)


def _turn(message: Message) -> dict[str, str]:
    return message.turn if message.name is None else message.turn | {"name": message.name}


def sides(secret: bytes, comparison: str, models: tuple[str, str]) -> tuple[str, str]:
    """The models on the left and on the right. `models` stands in the same order at every call."""
    is_swapped = hmac.digest(secret, comparison.encode(), "sha256")[0] % 2 == 1
    return models[::-1] if is_swapped else models


def load_secret(folder: str) -> bytes:
    """What keeps comparisons blind, made at the first call: two processes at once get the same.

    Raises:
        InputError: The folder is not local, or the file in it is not what this function wrote.
    """
    path = Path(_opened(folder).path) / SECRET
    if not path.exists():
        _make_secret(path)
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise InputError(f"{path} is damaged: delete it, and comparisons that are open will be void")
    return secret


def _make_secret(path: Path) -> None:
    """Whole or not at all, and never over another process's: a link fails where a file is."""
    unfinished = path.with_name(f".tmp-{uuid.uuid4().hex}")
    try:
        with os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(SECRET_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(unfinished, path)
        _sync(path.parent)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None
    finally:
        unfinished.unlink(missing_ok=True)


def _opened(path: str) -> Folder:
    """A folder on local disk, which is made where it is not there."""
    folder = Folder(path)
    if not folder.is_local:
        raise InputError(f"preferences are kept in a folder on local disk, not in {folder.path}")
    try:
        Path(folder.path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {folder.path}: {error.strerror}") from None
    return folder


def _sync(folder: Path) -> None:
    """A file is safe once its name is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
