"""What oracles say about candidate pairs: answers, votes that become one answer, how well people agree. Pure functions.

It knows no oracle: where answers come from is in `oracles`, `judge` and `label_queue`.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

from dpo_ray.pairs import Candidate, Message, Text

Side = Literal["first", "second"]
"""A response of a candidate."""

Preferred = Literal["first", "second", "tie", "none"]
"""`none`: the oracle gave no usable answer."""


class Answer(NamedTuple):
    """What an oracle says about one candidate. `_asdict` is JSON."""

    candidate_id: str
    preferred: Preferred
    by: str
    """Which oracle, or the people."""

    margin: float | None = None
    """By how much the preferred response is better, at least 0, where the oracle has scores."""

    note: str | None = None
    """Why none, or a tie that nobody called one; what was done to the answer."""

    cost: Mapping[str, float] = {}
    """`requests` (failed ones too), `prompt_tokens`, `answer_tokens` and, with `prices`, their `price`; empty where an
    answer costs nothing by its nature, all 0 where it came from a cache."""


class Oracle(Protocol):
    """Who can be asked which response is better."""

    def ask(self, candidates: Sequence[Candidate], on_answer: Callable[[Answer], None]) -> None:
        """Ask about some candidates. Each has exactly one answer, given to `on_answer` as soon as it is known, in any
        order and always in the caller's thread, so that the caller can write each to disk at once."""


def other(side: Side) -> Side:
    return "second" if side == "first" else "first"


def by_gap(candidate_id: str, gap: float, by: str) -> Answer:
    """The answer of scores: `gap` is the first response's less the second's; equal ones are a tie."""
    preferred: Preferred = "first" if gap > 0 else "second" if gap < 0 else "tie"
    return Answer(candidate_id, preferred, by, abs(gap), "equal scores" if gap == 0 else None)


def plain_text(text: Text) -> str:
    """A conversation to read: `role: content` blocks with a blank line between; of a single assistant turn the content
    alone. Plain text stays as it is."""
    if isinstance(text, str):
        return text
    if len(text) == 1 and text[0]["role"] == "assistant":
        return _content(text[0])
    return "\n\n".join(f"{message['role']}: {_content(message)}" for message in text)


def _content(message: Message) -> str:
    """With the tools that a turn calls: they may be all that it says."""
    calls = message.get("tool_calls")
    said: list[str] = [message["content"]] if message["content"] else []
    return "\n".join(said + ([f"calls: {json.dumps(calls, ensure_ascii=False)}"] if calls else []))


def most_votes(votes: Sequence[Preferred]) -> tuple[Preferred, str | None]:
    """What most people said, with a note; where two sayings have the most votes it is a tie."""
    (best, count), *rest = Counter(votes).most_common()
    if rest and rest[0][1] == count:
        return "tie", "even vote"
    return best, None


class Agreement(NamedTuple):
    """How well people agree, over the pairs that at least two of them labelled."""

    num_pairs: int
    share: float | None
    """Of a pair's two labels drawn at random, how often they are the same; None without pairs."""

    kappa: float | None
    """The share beyond chance: 1 is full agreement, 0 what chance gives; None where chance alone gives 1."""

    measure: Literal["cohen", "fleiss"]


def agreement(votes: Sequence[Mapping[str, Preferred]]) -> Agreement:
    """Agreement of people, given each pair's labels by person.

    Cohen 1960 where two people labelled all the pairs: chance knows how often each of them says what. Otherwise Fleiss
    1971: chance knows how often it is said by all. There a pair with more labels counts no more than another.
    """
    shared = [pair for pair in votes if len(pair) >= 2]
    people = sorted({person for pair in shared for person in pair})
    measure: Literal["cohen", "fleiss"] = "cohen" if len(people) == 2 else "fleiss"
    if not shared:
        return Agreement(0, None, None, measure)
    share = sum(_equal_draws(Counter(pair.values())) for pair in shared) / len(shared)
    by_person = [Counter(pair[person] for pair in shared if person in pair) for person in people]
    if measure == "cohen":
        one, another = by_person
        chance = sum(one[saying] * another[saying] for saying in one) / len(shared) ** 2
    else:
        said = sum(by_person, Counter[Preferred]())
        chance = sum(count**2 for count in said.values()) / said.total() ** 2
    return Agreement(len(shared), share, None if chance == 1 else (share - chance) / (1 - chance), measure)


def _equal_draws(counts: Counter[Preferred]) -> float:
    """Chance that two labels drawn without replacement are the same."""
    total = counts.total()
    return sum(count * (count - 1) for count in counts.values()) / (total * (total - 1))
