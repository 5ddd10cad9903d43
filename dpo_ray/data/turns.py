"""Turns of a conversation: role names, content, plain-text transcripts, and what two conversations share."""

import json
import re
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from dpo_ray.pairs import Message, Text

Turns = tuple[Message, ...]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "chatbot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "function_response", "ipython"), "tool"),
}
KEPT = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""Keys of a turn that chat templates read, besides role and content."""

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
SPEAKERS = {"user": "Human", "assistant": "Assistant"}


class RowError(ValueError):
    """The row holds no pair; the message says why."""


class Judged(NamedTuple):
    """A comparison in a row: all strings, or all turns."""

    prompt: Text
    chosen: Text
    rejected: Text
    is_transcript: bool = False
    chosen_score: float | None = None
    rejected_score: float | None = None


def transcript(messages: Sequence[Message]) -> str:
    """Turns of a transcript as text again: `\\n\\nHuman: ...\\n\\nAssistant: ...`.

    Content is kept stripped, so the original comes back exactly where one blank follows each colon and none ends a
    turn: 99.9 % of the turns of HH-RLHF.
    """
    return "".join(f"\n\n{SPEAKERS[message['role']]}: {message['content']}" for message in messages)


def from_transcript(text: str) -> Turns:
    """Turns of a transcript; an empty turn, or a speaker twice running, stays as it is."""
    before, *parts = TURN.split(text)
    if before.strip() or not parts:
        raise RowError("a transcript begins with `Human:` or `Assistant:`")
    return tuple(
        {"role": "user" if speaker == "Human" else "assistant", "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    )


def judge_turns(chosen: Turns, rejected: Turns) -> Judged:
    """Split two whole conversations: the prompt is the turns both begin with, up to where both go on as assistant.

    So conversations that part before the last assistant turn give responses of several turns. Those that share no
    turn are no comparison.
    """
    end = min(len(chosen), len(rejected)) - 1  # each side keeps a response
    end = next((i for i in range(end) if chosen[i] != rejected[i]), end)
    while end > 0 and not chosen[end]["role"] == rejected[end]["role"] == "assistant":
        end -= 1
    if end <= 0:
        raise RowError("chosen and rejected share no prompt")
    return judge_responses(chosen[:end], chosen[end:], rejected[end:])


def judge_responses(prompt: Turns, chosen: Turns, rejected: Turns) -> Judged:
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[-1]["role"] != "assistant":
            raise RowError(f"`{name}` does not end in an assistant turn")
    return Judged(prompt, chosen, rejected)


def judge_texts(chosen: str, rejected: str) -> Judged:
    """Split two texts that begin alike between words; a blank goes with the responses, and neither is left empty."""
    end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    while end and (not _is_between_words(chosen, end) or not _is_between_words(rejected, end)):
        end -= 1
    end = len(chosen[:end].rstrip(" "))
    return Judged(chosen[:end], chosen[end:], rejected[end:])


def _is_between_words(text: str, end: int) -> bool:
    return bool(text[end:].strip()) and not (text[end - 1].isalnum() and text[end].isalnum())


def to_turns(value: Any, role: str, name: str) -> Turns:
    """Turns of a string (which gets the given role), of a turn, or of a list of turns; `name` is for messages."""
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    if isinstance(value, dict):
        return (to_turn(value),)
    if isinstance(value, list) and value:
        return tuple(to_turn(item) for item in value)
    raise RowError(f"`{name}` is {_kind(value)}, not text or turns")


def to_turn(raw: Any) -> Message:
    """A turn with our names for its role; content in text parts is joined."""
    if not isinstance(raw, dict):
        raise RowError(f"a turn is {_kind(raw)}, not an object with role and content")
    given = raw.get("role") or raw.get("from")
    role = ROLES.get(str(given).lower())
    if role is None:
        raise RowError(f"unknown role `{given}`")
    content = next((raw[key] for key in ("content", "value", "text") if raw.get(key) is not None), None)
    if given == "function_call":
        return {"role": role, "content": "", "tool_calls": _calls(content)}
    if content is None and raw.get("tool_calls"):
        content = ""
    return {"role": role, "content": _text(content)} | {key: raw[key] for key in KEPT if raw.get(key)}


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"the content of a turn is {_kind(content)}, not text")
    parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise RowError("the content of a turn has a part that is not text")
    return "".join(parts)


def _calls(content: Any) -> list[dict[str, Any]]:
    """ShareGPT's `function_call`: a call, or a list of them, as JSON."""
    calls = from_json(content, "function_call")
    return [{"type": "function", "function": call} for call in (calls if isinstance(calls, list) else [calls])]


def from_json(text: Any, name: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError):
        raise RowError(f"`{name}` is not JSON") from None


def _kind(value: Any) -> str:
    return "missing" if value is None else "an empty list" if value == [] else type(value).__name__
