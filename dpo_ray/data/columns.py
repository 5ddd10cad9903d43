"""What stands in which column of a row, whatever its format: prompt, responses, tools, numbers."""

import math
from collections.abc import Sequence
from typing import Any

from dpo_ray.data.turns import RowError, from_json

Value = dict[str, Any]

CONVERSATIONS = ("conversations", "messages")
PROMPTS = ("prompt", *CONVERSATIONS, "instruction", "question", "query", "input", "context", "document", "post")
LISTS = ("responses", "candidates", "completions", "answers", "outputs", "generations")
RESPONSES = ("response", "text", "content", "summary", "answer", "completion", "output")
SCORES = ("score", "overall_score", "judge_score", "rating", "reward", "human_recall")


def optional_number(value: Any) -> float | None:
    """The number, if it is a finite one that is not negative; other columns of the name are not ours."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value >= 0 else None


def prompt_of(value: Value) -> Any:
    """The prompt by its usual names, or None; an `instruction` and its `input` stand one below the other."""
    key = next((key for key in PROMPTS if value.get(key) is not None), None)
    if key == "instruction" and value.get("input"):
        return f"{value['instruction']}\n{value['input']}"
    return None if key is None else value[key]


def response_of(item: Any) -> Any:
    return first_of(item, RESPONSES, "response") if isinstance(item, dict) and "role" not in item else item


def tools_of(value: Any) -> tuple[Value, ...] | None:
    tools = from_json(value, "tools") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of objects")
    return tuple(tools)


def first_of(value: Value, keys: Sequence[str], name: str) -> Any:
    for key in keys:
        if value.get(key) is not None:
            return value[key]
    raise RowError(f"no `{name}`")


def need(value: Value, key: str) -> Any:
    return first_of(value, (key,), key)


def list_of(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"`{name}` is no list, or an empty one")
    return value


def object_of(value: Any) -> Value:
    if not isinstance(value, dict):
        raise RowError(f"a message is {type(value).__name__}, not an object")
    return value


def number_of(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{value!r} is not a score or rank")
    return number
