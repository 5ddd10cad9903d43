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

from dpo_ray.comparisons import Interval, mean_interval
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
    r"\bI (?:can ?not|can't|could not|couldn't|will not|won't) (?:\w+ )?(?:help(?! but)|"
    r"assist|answer|provide|comply|fulfil|create|write|give|offer|share|discuss|engage|support|do that)",
    r"\bI(?: am|'m) (?:not able|unable|not allowed|not permitted|not comfortable) ",
    r"\bI (?:do not|don't) (?:actually )?have (?:the |any )?(?:access|abilit|capabilit)",
    r"\bI (?:(?:have to|must|need to) )?(?:respectfully )?(?:decline|refuse)\b",
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model)\b[^.!?]{0,80}?\b"
    r"(?:can ?not|can't|do not have|don't have|(?:un|not )able|will not|won't)\b",
    r"\b(?:is|are|be|goes) (?:against|not in line with) my (?:guidelines|principles|programming|polic)",
)
"""What counts as a refusal, in any case of letters, within the first `REFUSAL_SPAN` characters: an apology that goes on
with what cannot be done; that one cannot, may not or will not help, or lacks access or ability; declining; being an AI
that cannot; naming one's guidelines. A refusal in other words is missed; a story in which someone refuses at once is
counted."""

REFUSAL_SPAN = 200
"""Characters: refusals come at once, and further on such phrases are mostly advice or narration."""

_REFUSAL = re.compile("|".join(REFUSALS), re.IGNORECASE)
_NGRAM = 4


def num_words(text: str) -> int:
    return len(text.split())


def repetition(text: str) -> float:
    """Share of 4-grams of words that stand earlier in the text already; 0 of a text without any.

    seq-rep-4 of Welleck et al. 2020 (arXiv:1908.04319) on words in place of tokens.
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


class Statistic(NamedTuple):
    """One number of each response."""

    name: str
    unit: str
    value: Callable[[Response], float]
    is_event: bool = False
    """It is 0 or 1, and mostly one of them."""


STATISTICS = (
    Statistic("length", "tokens", lambda response: response.num_tokens),
    Statistic("words", "words", lambda response: num_words(response.text)),
    Statistic("unfinished", "share", lambda response: not response.is_finished, is_event=True),
    Statistic("repetition", "share", lambda response: repetition(response.text)),
    Statistic("refusals", "share", lambda response: is_refusal(response.text), is_event=True),
    Statistic("compression", "ratio", lambda response: compression_ratio(response.text)),
)


def drift(
    before: Sequence[Response], after: Sequence[Response], *, seed: int = 0, num_draws: int = 2000
) -> list[Change]:
    """Each of `STATISTICS`, and `distinct-2` over all responses, with the change and its interval.

    A change is paired by prompt: the mean over prompts of the difference of the prompt's means. Its interval:

    - Of events, unfinished texts and refusals, Student's with two more prompts, one changed either way, as Bonett &
      Price 2012 ("Adjusted Wald confidence interval for a difference of binomial proportions based on paired data") do:
      it has a width even where no prompt has changed.
    - Of distinct-2, which belongs to the whole set, the jackknife's, leaving one prompt out on both sides; a prompt
      drawn twice would make it smaller by itself. It is too wide rather than too narrow (Efron & Stein 1981).
    - Of all others, `win_rates.bootstrap` over prompts.

    Args:
        before: Responses of one model, one or more to each prompt, in any order.
        after: Of the other, to the same prompts; their number may be another.

    Raises:
        InputError: Fewer than two prompts, or one that only one side has; names it.
    """
    prompts = _shared_prompts(before, after)
    changes = []
    for name, unit, value, is_event in STATISTICS:
        old, new = (_means(side, prompts, value) for side in (before, after))
        change = new - old
        found = _of_event(change) if is_event else bootstrap(change, np.mean, seed=seed, num_draws=num_draws)
        changes.append(Change(name, unit, float(old.mean()), float(new.mean()), *found))
    return [*changes, _change_of_distinct(before, after, prompts)]


def _of_event(change: Floats) -> Interval:
    """Mean of differences in [-1, 1] with Bonett & Price's interval."""
    widened = mean_interval(np.append(change, [-1.0, 1.0]))
    return Interval(float(change.mean()), max(-1.0, widened.low), min(1.0, widened.high))


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
