"""Which pairs a row holds. Every quirk of a published data set stands here, and nowhere else.

A row is recognised by its columns (`recognise`) and gives its pairs, and the number of its comparisons that state no
preference (`to_pairs`). A row that holds no pair is a `RowError` with a short reason.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

from dpo_ray.config import Format, SourceConfig
from dpo_ray.data.columns import (
    CONVERSATIONS,
    LISTS,
    PROMPTS,
    SCORES,
    first_of,
    list_of,
    need,
    number_of,
    object_of,
    optional_number,
    prompt_of,
    response_of,
    tools_of,
)
from dpo_ray.data.sources import Row
from dpo_ray.data.turns import (
    TURN,
    Judged,
    RowError,
    Turns,
    from_transcript,
    judge_responses,
    judge_texts,
    judge_turns,
    to_turn,
    to_turns,
    transcript,
)
from dpo_ray.pairs import PreferencePair, Text

__all__ = ["Parsed", "RowError", "recognise", "to_pairs", "to_row", "transcript"]

Value = dict[str, Any]

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
    group = None if source.group_by is None else str(need(row.value, source.group_by))
    tools = tools_of(row.value.get("tools"))
    found = list(parse(row.value, source))
    weight, margin = (optional_number(row.value.get(name)) for name in ("weight", "margin"))
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
        for j in found
        if j
    ]
    try:
        _ = [(pair.pair_id, pair.group_id) for pair in pairs]
    except (UnicodeEncodeError, TypeError) as error:  # half a surrogate pair; bytes in a tool call
        raise RowError(f"cannot be written as UTF-8 JSON: {error}") from None
    return Parsed(pairs, len(found) - len(pairs))


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
    yield _scored(judged(prompt_of(value), need(value, "chosen"), need(value, "rejected"), value), value, source)


def _implicit(value: Value, source: SourceConfig) -> Comparisons:
    chosen, rejected = need(value, "chosen"), need(value, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str):
        yield _scored(judge_texts(chosen, rejected), value, source)
    else:
        yield _scored(judge_turns(*_sides(chosen, rejected)), value, source)


def _hh_rlhf(value: Value, source: SourceConfig) -> Comparisons:
    """Two transcripts. A few differ before the last `Assistant:`; what follows the shared turns is the response."""
    chosen, rejected = str(need(value, "chosen")), str(need(value, "rejected"))
    yield _scored(_judged_transcripts(chosen, rejected), value, source)


def _ranked(value: Value, source: SourceConfig) -> Comparisons:
    """A list of texts, best first or with a list `scores`; or of objects, each with a score (high is good) or rank.

    Objects without the score that others have take no part.
    """
    items = list_of(first_of(value, LISTS, "responses"), "responses")
    objects = [item for item in items if isinstance(item, dict)]
    key = next((k for k in (*SCORES, "rank") if any(item.get(k) is not None for item in objects)), None)
    scores = value.get("scores")
    if isinstance(scores, list):
        if len(scores) != len(items):
            raise RowError(f"{len(items)} responses, but {len(scores)} scores")
        ranked = [
            Ranked(response_of(item), score=score) for item, score in zip(items, map(number_of, scores), strict=True)
        ]
    elif key == "rank":
        ranked = [Ranked(response_of(item), -number_of(item[key])) for item in objects if item.get(key) is not None]
    elif key:
        ranked = [
            Ranked(response_of(item), score=number_of(item[key])) for item in objects if item.get(key) is not None
        ]
    else:
        ranked = [Ranked(response_of(item), -place) for place, item in enumerate(items)]
    yield from _ranking(prompt_of(value), ranked, value, source)


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
        pair = judged(prompt, high.response, low.response, value)
        if high.score is not None and low.score is not None:
            yield _by_margin(pair, high.score, low.score, source)
        else:
            yield pair if high.order > low.order else None


def _labelled(value: Value, source: SourceConfig) -> Comparisons:
    """Two responses and a label, or the labels of several annotators, of which the commonest holds.

    A response that a table program took for a number or a truth value (PandaLM has some) is text again.
    """
    names = next(((a, b) for a, b in TWO if value.get(a) is not None and value.get(b) is not None), None)
    if names is None:
        raise RowError("no two responses")
    votes = [item for key, item in value.items() if re.fullmatch(r"annotator_?\d+", key) and item is not None]
    if not votes:
        votes = [first_of(value, LABELS, "label")]
    (winner, most), *others = Counter(_winner(vote, names) for vote in votes).most_common()
    if winner is None or any(count == most for _, count in others):
        yield None
    else:
        first, second = (str(r) if isinstance(r, bool | int | float) else r for r in (value[name] for name in names))
        chosen, rejected = (first, second) if winner == 0 else (second, first)
        yield judged(prompt_of(value), chosen, rejected, value)


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
    pairs = list(combinations(list_of(need(value, "predictions"), "predictions"), 2))
    labels = list_of(need(value, "preference"), "preference")
    if len(labels) != len(pairs):
        raise RowError(f"{len(pairs)} comparisons, but {len(labels)} labels")
    prompt = prompt_of(value)
    if isinstance(value.get("passages"), list):  # some questions have none
        passages = [list(map(str, list_of(item, "a passage"))) for item in value["passages"]]
        texts = [title + ": " + " ".join(sentences).removeprefix(title + "\n\n") for title, *sentences in passages]
        prompt = "\n\n".join([*texts, f"Question: {prompt}\nAnswer:"])
    for pair, label in zip(pairs, labels, strict=True):
        winner = _winner(label, ("1", "2"))
        yield None if winner is None else judged(prompt, pair[winner], pair[1 - winner], value)


def _stack_exchange(value: Value, source: SourceConfig) -> Comparisons:
    yield judged(prompt_of(value), need(value, "response_j"), need(value, "response_k"), value)


def _message_tree(value: Value, source: SourceConfig) -> Comparisons:
    """Open-Assistant: wherever replies of the assistant are ranked, they rank under the conversation so far."""
    waiting: list[tuple[Turns, Value]] = [((), object_of(need(value, "prompt")))]
    has_ranks = False
    while waiting:
        before, node = waiting.pop()
        path = [*before, to_turn(node)]
        replies = [object_of(reply) for reply in list_of(node["replies"], "replies")] if node.get("replies") else []
        replies = [reply for reply in replies if not reply.get("deleted")]
        waiting += [(tuple(path), reply) for reply in replies]
        turns = [(to_turn(reply), reply["rank"]) for reply in replies if reply.get("rank") is not None]
        ranked = [Ranked(turn, -number_of(rank)) for turn, rank in turns if turn["role"] == "assistant"]
        if len(ranked) > 1:
            has_ranks = True
            yield from _ranking(path, ranked, value, source)
    if not has_ranks:
        yield None


def _question_answers(value: Value, source: SourceConfig) -> Comparisons:
    """TruthfulQA: the best answer against each incorrect one."""
    for incorrect in list_of(need(value, "incorrect_answers"), "incorrect_answers"):
        yield judged(prompt_of(value), need(value, "best_answer"), incorrect, value)


def _graded(value: Value, source: SourceConfig) -> Comparisons:
    """GSM8K's model solutions: each right one against each wrong one; where none is right, the human solution against
    the last model's."""
    solutions = [item for item in value.values() if isinstance(item, dict) and "is_correct" in item]
    if not solutions:
        raise RowError("no solution with `is_correct`")
    right = [need(item, "solution") for item in solutions if item["is_correct"]]
    wrong = [need(item, "solution") for item in solutions if not item["is_correct"]]
    if not right and value.get("ground_truth") is not None:
        right, wrong = [value["ground_truth"]], wrong[-1:]
    if not (right and wrong):
        yield None
    for chosen in right:
        for rejected in wrong:
            yield judged(prompt_of(value), chosen, rejected, value)


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


def judged(prompt: Any, chosen: Any, rejected: Any, value: Value) -> Judged:
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
            scores = number_of(value[high]), number_of(value[low])
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


def to_row(pair: PreferencePair) -> Value:
    """A row of which `to_pairs` makes this pair again, whatever it was read from."""
    row: Value
    if isinstance(pair.prompt, str):
        row = {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    elif pair.is_transcript:
        opening = transcript(pair.prompt) + "\n\nAssistant:"
        ends = [transcript((*pair.prompt, *_turns(side))) for side in (pair.chosen, pair.rejected)]
        row = {"prompt": opening, "chosen": ends[0][len(opening) + 1 :], "rejected": ends[1][len(opening) + 1 :]}
    else:
        row = {"prompt": list(pair.prompt), "chosen": list(pair.chosen), "rejected": list(pair.rejected)}
    rest = {"tools": pair.tools and list(pair.tools), "weight": pair.weight, "margin": pair.margin}
    return row | {name: value for name, value in rest.items() if value is not None}


def _turns(side: Text) -> Turns:
    assert not isinstance(side, str)
    return side
