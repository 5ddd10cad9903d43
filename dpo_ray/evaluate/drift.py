"""How the texts that a model writes have changed: length, repetition, refusals, diversity. Pure; no model judges here.

Responses of two models to the same prompts are compared prompt by prompt. K is the number of prompts; intervals are
95 % and take the prompts to be a sample. Refusals are told by English phrases, words by blanks between them.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from dpo_ray.errors import InputError
from dpo_ray.evaluate.win_rates import bootstrap

Floats = NDArray[np.float64]


class Response(NamedTuple):
    """What a model wrote to a prompt."""

    prompt: str
    """Id or text of the prompt; a prompt may have several responses."""
    text: str
    num_tokens: int
    is_finished: bool = True
    """It ended by itself, not by its length."""


class Change(NamedTuple):
    """One statistic before and after, as the mean over prompts of the prompt's mean, and the interval of its change."""

    name: str
    unit: str
    before: float
    after: float
    change: float
    """After less before."""
    low: float
    high: float


REFUSALS = (
    r"\bI(?: am|'m) (?:very |so |really |truly )?(?:sorry|afraid),? (?:but )?(?:I|that|this|as an)\b",
    r"\bI (?:can ?not|can't|could not|couldn't|will not|won't|must not|mustn't) "
    r"(?:\w+ )?(?:help|assist|answer|provide|comply|fulfill?|create|write|give|offer|share|discuss|engage|support|do that)\b",
    r"\bI(?: am|'m) (?:not able|unable|not allowed|not permitted|not comfortable) ",
    r"\bI (?:have to|must|need to) (?:respectfully )?(?:decline|refuse)\b",
    r"\bI (?:respectfully )?(?:decline|refuse) to\b",
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b",
    r"\b(?:is|are|be|goes) (?:against|not in line with) my (?:guidelines|principles|programming|policy|policies)\b",
)
"""What counts as a refusal, in any case of letters, within the first `REFUSAL_SPAN` characters: an apology that goes on
with what cannot be done, saying that one cannot, may not or will not help, declining, calling oneself an AI, and
naming one's guidelines. A refusal in other words is missed; a story in which someone refuses at once is counted."""

REFUSAL_SPAN = 200
"""Characters: refusals come at once, and further on such phrases are mostly advice or narration."""

_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)
_NGRAM = 4


def num_words(text: str) -> int:
    return len(text.split())


def repetition(text: str) -> float:
    """Share of 4-grams of words that stand earlier in the text already; 0 of a text without any.

    seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319), section 6.1, on words in place of tokens.
    """
    words = text.split()
    grams = list(zip(*(words[start:] for start in range(_NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_refusal(text: str) -> bool:
    """Whether it begins with one of `REFUSALS`, or has one in its first `REFUSAL_SPAN` characters."""
    return _REFUSAL.search(text.replace("\u2019", "'")[:REFUSAL_SPAN]) is not None


def compression_ratio(text: str) -> float:
    """Bytes of the text over bytes that DEFLATE makes of it: about 2 for prose, more for what repeats itself.

    Below 1 for texts of a few words, and 1 for none. Shaib et al. 2024 (arXiv:2403.00553).
    """
    raw = text.encode("utf-8", errors="replace")
    if not raw:
        return 1.0
    packer = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)  # without header and checksum, which short texts would feel
    return len(raw) / len(packer.compress(raw) + packer.flush())


def distinct(texts: Sequence[str]) -> float:
    """Different 2-grams of words over all of them, in a set of texts; 1 where there are none.

    distinct-2 of Li et al. 2016 (arXiv:1510.03055). It falls with the number and length of texts, so only sets of about
    the same size compare.
    """
    counts = _bigrams(texts)
    return len(counts) / counts.total() if counts else 1.0


STATISTICS: tuple[tuple[str, str, Callable[[Response], float]], ...] = (
    ("length", "tokens", lambda response: float(response.num_tokens)),
    ("words", "words", lambda response: float(num_words(response.text))),
    ("unfinished", "share", lambda response: float(not response.is_finished)),
    ("repetition", "share", lambda response: repetition(response.text)),
    ("refusals", "share", lambda response: float(is_refusal(response.text))),
    ("compression", "ratio", lambda response: compression_ratio(response.text)),
)
"""Name, unit and value of each statistic of one response."""


def drift(
    before: Sequence[Response], after: Sequence[Response], *, seed: int = 0, num_draws: int = 2000
) -> list[Change]:
    """Each of `STATISTICS`, and `distinct-2` over all responses, with the change and its interval.

    A change is paired by prompt: the mean over prompts of the difference of the prompt's means, with the bootstrap over
    prompts (`win_rates.bootstrap`). Distinct-2 belongs to the whole set, and a prompt that is drawn twice would make it
    smaller by itself, so its interval is from the jackknife: leave one prompt out in turn, on both sides (Efron & Stein
    1981, "The jackknife estimate of variance": too wide rather than too narrow).

    Where no prompt has changed, the interval is the one value 0: a statistic that never occurred, such as refusals in
    20 prompts, may still have become likelier; 3 / K is the most that is compatible with it.

    Args:
        before: Responses of one model, one or more to each prompt, in any order.
        after: Of the other, to the same prompts; their number may be another.

    Raises:
        InputError: Fewer than two prompts, or one that only one side has; names it.
    """
    prompts = _shared_prompts(before, after)
    changes = []
    for name, unit, value in STATISTICS:
        old, new = (_means(side, prompts, value) for side in (before, after))
        found = bootstrap(new - old, lambda rows: float(rows.mean()), seed=seed, num_draws=num_draws)
        changes.append(Change(name, unit, float(old.mean()), float(new.mean()), *found))
    return [*changes, _change_of_distinct(before, after, prompts)]


def _shared_prompts(before: Sequence[Response], after: Sequence[Response]) -> dict[str, int]:
    """The number of each prompt, in order of the first responses."""
    prompts = {prompt: number for number, prompt in enumerate(dict.fromkeys(r.prompt for r in before))}
    missing = sorted(prompts.keys() ^ {r.prompt for r in after})
    if missing:
        side = "before" if missing[0] in prompts else "after"
        raise InputError(f"prompt `{missing[0][:80]}` has responses {side} only; changes are paired by prompt")
    if len(prompts) < 2:
        raise InputError(f"a change needs responses to at least 2 prompts, got {len(prompts)}")
    return prompts


def _means(side: Sequence[Response], prompts: dict[str, int], value: Callable[[Response], float]) -> Floats:
    """Mean of each prompt's responses, [K]."""
    numbers = [prompts[response.prompt] for response in side]
    values = np.array([value(response) for response in side], dtype=np.float64)
    return np.asarray(np.bincount(numbers, values) / np.bincount(numbers))


def _change_of_distinct(before: Sequence[Response], after: Sequence[Response], prompts: dict[str, int]) -> Change:
    old, new = (distinct([response.text for response in side]) for side in (before, after))
    left_out = _distinct_without(after, prompts) - _distinct_without(before, prompts)
    num_prompts = len(prompts)
    error = math.sqrt((num_prompts - 1) / num_prompts * float(((left_out - left_out.mean()) ** 2).sum()))
    half = -float(stdtrit(num_prompts - 1, 0.025)) * error
    return Change("distinct-2", "share", old, new, new - old, new - old - half, new - old + half)


def _distinct_without(side: Sequence[Response], prompts: dict[str, int]) -> Floats:
    """Distinct-2 of the set without each prompt in turn, [K]; from counts, so that the set is read once."""
    texts: list[list[str]] = [[] for _ in prompts]
    for response in side:
        texts[prompts[response.prompt]].append(response.text)
    by_prompt = [_bigrams(own) for own in texts]
    counts = _bigrams([response.text for response in side])
    total = counts.total()
    kept = [(len(counts) - sum(counts[gram] == n for gram, n in own.items()), total - own.total()) for own in by_prompt]
    return np.array([different / rest if rest else 1.0 for different, rest in kept])


def _bigrams(texts: Sequence[str]) -> Counter[tuple[str, str]]:
    return Counter(gram for text in texts for gram in pairwise(text.split()))
