"""Which pairs a row holds. Every quirk of a published data set stands here, and nowhere else.

A row is recognised by its columns (`recognise`) and gives its pairs, and the number of its comparisons that state no
preference (`to_pairs`). A row that holds no pair is a `RowError` with a short reason.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from dpo_ray.config import Format, SourceConfig
from dpo_ray.data.sources import Row
from dpo_ray.data.turns import (
    TURN,
    Judged,
    RowError,
    Turns,
    from_json,
    from_transcript,
    judge_responses,
    judge_texts,
    judge_turns,
    to_turn,
    to_turns,
    transcript,
)
from dpo_ray.pairs import PreferencePair

__all__ = ["Parsed", "RowError", "recognise", "to_pairs", "transcript"]

Value = dict[str, Any]

CONVERSATIONS = ("conversations", "messages")
PROMPTS = ("prompt", *CONVERSATIONS, "instruction", "question", "query", "input", "context", "document", "post")
LISTS = ("responses", "candidates", "completions", "answers", "outputs", "generations")
RESPONSES = ("response", "text", "content", "summary", "answer", "completion", "output")
SCORES = ("score", "overall_score", "judge_score", "rating", "reward", "human_recall")
PAIR_SCORES = (
    ("score_chosen", "score_rejected"),
    ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"),
)
LABELS = ("label", "winner", "preference", "preferred", "choice", "better_response_id")
NO_PREFERENCE = ("0", "tie", "tie (bothbad)", "both_bad", "equal", "neither")
TWO = [
    (f"{stem}{underscore}{first}", f"{stem}{underscore}{second}")
    for stem in ("output", "response", "answer", "completion", "summary", "conversation")
    for underscore in ("_", "")
    for first, second in (("1", "2"), ("a", "b"), ("A", "B"), ("0", "1"))
]
"""Columns of two responses; the label is the end of the better one's name, or the whole of it."""


class Parsed(NamedTuple):
    pairs: list[PreferencePair]
    ties: int
    """Comparisons without a preference: equal scores or votes, or a gap below `min_margin`."""


def to_pairs(row: Row, source: SourceConfig) -> Parsed:
    """The pairs of a row.

    Raises:
        RowError: The row could not be read, or holds no pair.
    """
    if row.value is None:
        raise RowError(row.error or "an empty row")
    parse = PARSERS[recognise(row.value) if source.format == "auto" else source.format]
    group = None if source.group_by is None else str(_need(row.value, source.group_by))
    tools = _tools(row.value.get("tools"))
    judged = list(parse(row.value, source))
    weight, margin = (_optional_number(row.value.get(name)) for name in ("weight", "margin"))
    pairs = [
        PreferencePair(
            **j._asdict(),
            weight=weight,
            margin=_score_gap(j) if margin is None else margin,
            tools=tools,
            group=group,
            source=row.source,
            row=row.number,
        )
        for j in judged
        if j
    ]
    try:
        _ = [(pair.pair_id, pair.group_id) for pair in pairs]
    except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair; bytes in a tool call
        raise RowError(f"cannot be written as UTF-8 JSON: {error}") from None
    return Parsed(pairs, len(judged) - len(pairs))


def recognise(value: Value) -> Format:
    """The format of a row, by its columns.

    Raises:
        RowError: It is none of them; says what is missing.
    """
    has = {key for key, item in value.items() if item is not None}
    if {"chosen", "rejected"} <= has:
        if all(isinstance(value[side], str) and TURN.match(value[side]) for side in ("chosen", "rejected")):
            return "hh_rlhf"
        if "prompt" not in has and has & {*CONVERSATIONS}:
            return "sharegpt"
        return "explicit" if has & {*PROMPTS} else "implicit"
    if {"response_j", "response_k"} <= has:
        return "stack_exchange"
    if isinstance(value.get("prompt"), dict) and "replies" in value["prompt"]:
        return "message_tree"
    if {"best_answer", "incorrect_answers"} <= has:
        return "question_answers"
    if {"predictions", "preference"} <= has:
        return "comparisons"
    if any(isinstance(item, dict) and "is_correct" in item for item in value.values()):
        return "graded"
    if any(first in has and second in has for first, second in TWO):
        return "labelled"
    if any(isinstance(value.get(key), list) for key in LISTS):
        return "ranked"
    if "chosen" in has:
        raise RowError("no `rejected` beside `chosen`")
    if "label" in has and has & {"messages", "completion"}:
        raise RowError("unpaired data (a `label` for one response); needs a chosen and a rejected response")
    raise RowError(f"no pair in it that is known; its columns are {', '.join(map(str, value)) or 'none'}")


# Each format gives its comparisons; None is one without a preference.
Comparisons = Iterator[Judged | None]


def _explicit(value: Value, source: SourceConfig) -> Comparisons:
    yield _scored(_judged(_prompt(value), _need(value, "chosen"), _need(value, "rejected"), value), value, source)


def _implicit(value: Value, source: SourceConfig) -> Comparisons:
    chosen, rejected = _need(value, "chosen"), _need(value, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        yield _scored(judge_texts(chosen, rejected), value, source)
    else:
        yield _scored(judge_turns(*_sides(chosen, rejected)), value, source)


def _hh_rlhf(value: Value, source: SourceConfig) -> Comparisons:
    """Two transcripts. A few differ before the last `Assistant:`; what follows the shared turns is the response."""
    chosen, rejected = str(_need(value, "chosen")), str(_need(value, "rejected"))
    yield _scored(_judged_transcripts(chosen, rejected), value, source)


def _ranked(value: Value, source: SourceConfig) -> Comparisons:
    """A list of texts, best first or with a list `scores`; or of objects, each with a score (high is good) or rank.

    Objects without the score that others have take no part.
    """
    items = _list(_first(value, LISTS, "responses"), "responses")
    objects = [item for item in items if isinstance(item, dict)]
    key = next((k for k in (*SCORES, "rank") if any(item.get(k) is not None for item in objects)), None)
    scores = value.get("scores")
    if isinstance(scores, list):
        if len(scores) != len(items):
            raise RowError(f"{len(items)} responses, but {len(scores)} scores")
        ranked = [Ranked(_response(item), score=score) for item, score in zip(items, map(_number, scores), strict=True)]
    elif key == "rank":
        ranked = [Ranked(_response(item), -_number(item[key])) for item in objects if item.get(key) is not None]
    elif key:
        ranked = [Ranked(_response(item), score=_number(item[key])) for item in objects if item.get(key) is not None]
    else:
        ranked = [Ranked(_response(item), -place) for place, item in enumerate(items)]
    yield from _ranking(_prompt(value), ranked, value, source)


class Ranked(NamedTuple):
    response: Any
    order: float = 0.0
    """Higher is better; what counts where there is no score."""
    score: float | None = None


def _ranking(prompt: Any, ranked: list[Ranked], value: Value, source: SourceConfig) -> Comparisons:
    if len(ranked) < 2:
        raise RowError("fewer than two responses with a score or rank")
    best_first = sorted(ranked, key=lambda r: r.order if r.score is None else r.score, reverse=True)
    pairs = list(combinations(best_first, 2))
    picked = {"best_vs_rest": pairs[: len(ranked) - 1], "best_vs_worst": pairs[len(ranked) - 2 : len(ranked) - 1]}
    for high, low in picked.get(source.pairing, pairs):
        judged = _judged(prompt, high.response, low.response, value)
        if high.score is not None and low.score is not None:
            yield _by_margin(judged, high.score, low.score, source)
        else:
            yield judged if high.order > low.order else None


def _labelled(value: Value, source: SourceConfig) -> Comparisons:
    """Two responses and a label, or the labels of several annotators, of which the commonest holds.

    A response that a table program took for a number or a truth value (PandaLM has some) is text again.
    """
    names = next(((a, b) for a, b in TWO if value.get(a) is not None and value.get(b) is not None), None)
    if names is None:
        raise RowError("no two responses")
    votes = [item for key, item in value.items() if re.fullmatch(r"annotator_?\d+", key) and item is not None]
    if not votes:
        votes = [_first(value, LABELS, "label")]
    (winner, most), *others = Counter(_winner(vote, names) for vote in votes).most_common()
    if winner is None or any(count == most for _, count in others):
        yield None
    else:
        first, second = (str(r) if isinstance(r, bool | int | float) else r for r in (value[name] for name in names))
        chosen, rejected = (first, second) if winner == 0 else (second, first)
        yield _judged(_prompt(value), chosen, rejected, value)


def _winner(label: Any, names: tuple[str, str]) -> int | None:
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    text = str(label).strip().lower()
    for i, name in enumerate(names):
        if text in (name.lower(), name[-1].lower(), f"model_{name[-1].lower()}"):
            return i
    if text in NO_PREFERENCE:
        return None
    raise RowError(f"the label {label!r} names neither `{names[0]}` nor `{names[1]}`")


def _comparisons(value: Value, source: SourceConfig) -> Comparisons:
    """QA-Feedback: labels 1, 2 or 0 over all pairs of predictions; the prompt is the passages, then the question."""
    pairs = list(combinations(_list(_need(value, "predictions"), "predictions"), 2))
    labels = _list(_need(value, "preference"), "preference")
    if len(labels) != len(pairs):
        raise RowError(f"{len(pairs)} comparisons, but {len(labels)} labels")
    prompt = _prompt(value)
    if isinstance(value.get("passages"), list):  # some questions have none
        passages = [list(map(str, _list(item, "a passage"))) for item in value["passages"]]
        texts = [title + ": " + " ".join(sentences).removeprefix(title + "\n\n") for title, *sentences in passages]
        prompt = "\n\n".join([*texts, f"Question: {prompt}\nAnswer:"])
    for pair, label in zip(pairs, labels, strict=True):
        winner = _winner(label, ("1", "2"))
        yield None if winner is None else _judged(prompt, pair[winner], pair[1 - winner], value)


def _stack_exchange(value: Value, source: SourceConfig) -> Comparisons:
    yield _judged(_prompt(value), _need(value, "response_j"), _need(value, "response_k"), value)


def _message_tree(value: Value, source: SourceConfig) -> Comparisons:
    """Open-Assistant: wherever replies of the assistant are ranked, they rank under the conversation so far."""
    waiting: list[tuple[Turns, Value]] = [((), _object(_need(value, "prompt")))]
    has_ranks = False
    while waiting:
        before, node = waiting.pop()
        path = [*before, to_turn(node)]
        replies = [_object(reply) for reply in _list(node["replies"], "replies")] if node.get("replies") else []
        replies = [reply for reply in replies if not reply.get("deleted")]
        waiting += [(tuple(path), reply) for reply in replies]
        turns = [(to_turn(reply), reply["rank"]) for reply in replies if reply.get("rank") is not None]
        ranked = [Ranked(turn, -_number(rank)) for turn, rank in turns if turn["role"] == "assistant"]
        if len(ranked) > 1:
            has_ranks = True
            yield from _ranking(path, ranked, value, source)
    if not has_ranks:
        yield None


def _question_answers(value: Value, source: SourceConfig) -> Comparisons:
    """TruthfulQA: the best answer against each incorrect one."""
    for incorrect in _list(_need(value, "incorrect_answers"), "incorrect_answers"):
        yield _judged(_prompt(value), _need(value, "best_answer"), incorrect, value)


def _graded(value: Value, source: SourceConfig) -> Comparisons:
    """GSM8K's model solutions: each right one against each wrong one; where none is right, the human solution against
    the last model's."""
    solutions = [item for item in value.values() if isinstance(item, dict) and "is_correct" in item]
    if not solutions:
        raise RowError("no solution with `is_correct`")
    right = [_need(item, "solution") for item in solutions if item["is_correct"]]
    wrong = [_need(item, "solution") for item in solutions if not item["is_correct"]]
    if not right and value.get("ground_truth") is not None:
        right, wrong = [value["ground_truth"]], wrong[-1:]
    if not (right and wrong):
        yield None
    for chosen in right:
        for rejected in wrong:
            yield _judged(_prompt(value), chosen, rejected, value)


PARSERS: dict[str, Callable[[Value, SourceConfig], Comparisons]] = {
    "explicit": _explicit,
    "implicit": _implicit,
    "hh_rlhf": _hh_rlhf,
    "sharegpt": _explicit,
    "ranked": _ranked,
    "labelled": _labelled,
    "comparisons": _comparisons,
    "stack_exchange": _stack_exchange,
    "message_tree": _message_tree,
    "question_answers": _question_answers,
    "graded": _graded,
}


def _judged(prompt: Any, chosen: Any, rejected: Any, value: Value) -> Judged:
    """All strings stay plain text; a transcript, a conversation or a `system` column makes turns.

    Responses that do not begin with an assistant turn are whole conversations: the prompt is what they share, whatever
    stands in the column of the prompt, save for a system turn.
    """
    system = value.get("system", value.get("system_prompt"))
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        if TURN.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
            return _judged_transcripts(f"{prompt} {chosen}", f"{prompt} {rejected}")
        if system is None:
            return Judged(prompt, chosen, rejected)
    before = () if prompt in (None, []) else to_turns(prompt, "user", "prompt")
    if system and not (before and before[0]["role"] == "system"):
        before = (*to_turns(system, "system", "system"), *before)
    sides = _sides(chosen, rejected)
    if all(side[0]["role"] == "assistant" for side in sides):
        if prompt is None:
            raise RowError("no `prompt`")
        return judge_responses(before, *sides)
    whole = judge_turns(*sides)
    if before and before[0]["role"] == "system" and sides[0][0]["role"] != "system":
        return whole._replace(prompt=(before[0], *whole.prompt))
    return whole


def _sides(chosen: Any, rejected: Any) -> tuple[Turns, Turns]:
    return to_turns(chosen, "assistant", "chosen"), to_turns(rejected, "assistant", "rejected")


def _judged_transcripts(chosen: str, rejected: str) -> Judged:
    return judge_turns(from_transcript(chosen), from_transcript(rejected))._replace(is_transcript=True)


def _scored(judged: Judged, value: Value, source: SourceConfig) -> Judged | None:
    for high, low in PAIR_SCORES:
        if value.get(high) is not None and value.get(low) is not None:
            scores = _number(value[high]), _number(value[low])
            if scores[0] < scores[1]:
                raise RowError(f"`{high}` {scores[0]:g} is below `{low}` {scores[1]:g}")
            return _by_margin(judged, *scores, source)
    return judged


def _by_margin(judged: Judged, high: float, low: float, source: SourceConfig) -> Judged | None:
    if high == low or high - low < source.min_margin:
        return None
    return judged._replace(chosen_score=high, rejected_score=low)


def _score_gap(judged: Judged) -> float | None:
    if judged.chosen_score is None or judged.rejected_score is None:
        return None
    return judged.chosen_score - judged.rejected_score


def _optional_number(value: Any) -> float | None:
    """The number, if it is a finite one that is not negative; other columns of the name are not ours."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value >= 0 else None


def _prompt(value: Value) -> Any:
    """The prompt by its usual names, or None; an `instruction` and its `input` stand one below the other."""
    key = next((key for key in PROMPTS if value.get(key) is not None), None)
    if key == "instruction" and value.get("input"):
        return f"{value['instruction']}\n{value['input']}"
    return None if key is None else value[key]


def _response(item: Any) -> Any:
    return _first(item, RESPONSES, "response") if isinstance(item, dict) and "role" not in item else item


def _tools(value: Any) -> tuple[Value, ...] | None:
    tools = from_json(value, "tools") if isinstance(value, str) and value.strip() else value
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("`tools` is not a list of objects")
    return tuple(tools)


def _first(value: Value, keys: Sequence[str], name: str) -> Any:
    for key in keys:
        if value.get(key) is not None:
            return value[key]
    raise RowError(f"no `{name}`")


def _need(value: Value, key: str) -> Any:
    return _first(value, (key,), key)


def _list(value: Any, name: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise RowError(f"`{name}` is no list, or an empty one")
    return value


def _object(value: Any) -> Value:
    if not isinstance(value, dict):
        raise RowError(f"a message is {type(value).__name__}, not an object")
    return value


def _number(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{value!r} is not a score or rank")
    return number
