"""Whether what is evaluated on was trained on: prompts that stand in the training pairs, exactly, nearly or within.

Three tests, each for what the others miss: equality of the letters and digits; a Jaccard index of pieces of characters
(`duplicates`), for edits; and a share of common word 8-grams, for prompts quoted inside something longer. Brown et al.
2020 (arXiv:2005.14165, appendix C) take 13 words and any overlap. Pure.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from dpo_ray.data.duplicates import TextPair, near_texts
from dpo_ray.shingles import normalised, word_shingles

NUM_WORDS = 8
"""Words of an n-gram; a prompt of fewer is looked for as a whole, from `LEAST_WORDS` on."""

LEAST_WORDS = 5
"""A shorter prompt, as `What is gravity?`, stands in other texts by chance."""

SHARE = 0.5
"""A prompt is contained in a text that has so many of its n-grams."""

BOILERPLATE = 10
"""An n-gram of more training prompts than this is a template's and says nothing; the number is GPT-3's."""

WORD = re.compile(r"\w+")


class Match(NamedTuple):
    """An evaluated prompt and a training text that gives it away."""

    evaluated: int
    """Place of the prompt."""
    trained: tuple[int, ...]
    """Places of the training pairs that have the text."""
    where: Literal["prompt", "response"]
    kind: Literal["same", "near", "contained"]
    similarity: float
    """Of `near` the Jaccard index, of `contained` the share of the prompt's n-grams."""


class _Text(NamedTuple):
    """A training text, and where it stands."""

    content: str
    where: Literal["prompt", "response"]
    trained: list[int]
    prompt: int
    """Number of the (first) prompt that it belongs to."""


def matches(
    evaluated: Sequence[str],
    trained: Sequence[TextPair],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Match]:
    """Every training text that gives an evaluated prompt away, by place; one match for a prompt and a text.

    Prompts without a letter or digit match nothing. Word n-grams need blanks between words: a prompt of a script that
    has none is found when it is the same or near, not inside a longer text.
    """
    texts = _texts(trained)
    prompts = [text for text in texts if text.where == "prompt"]
    found: dict[tuple[int, int], Match] = {}
    for find in (_contained(evaluated, texts, on_progress), _near(evaluated, prompts), _same(evaluated, prompts)):
        for i, number, kind, similarity in find:  # a later, stricter kind takes the place of an earlier one
            text = texts[number]
            found[i, number] = Match(i, tuple(text.trained), text.where, kind, similarity)
    return [found[key] for key in sorted(found)]


_Finds = Iterator[tuple[int, int, Literal["same", "near", "contained"], float]]
"""Place of a prompt, number of a text, kind, similarity."""


def _texts(trained: Sequence[TextPair]) -> list[_Text]:
    """Distinct prompts first, then distinct responses."""
    prompts: dict[str, _Text] = {}
    responses: dict[str, _Text] = {}
    for place, pair in enumerate(trained):
        own = prompts.setdefault(pair.prompt, _Text(pair.prompt, "prompt", [], len(prompts)))
        own.trained.append(place)
        for response in {pair.chosen: None, pair.rejected: None}:
            responses.setdefault(response, _Text(response, "response", [], own.prompt)).trained.append(place)
    return [*prompts.values(), *responses.values()]


def _words(text: str) -> str:
    """The words alone: neither punctuation nor case."""
    return " ".join(WORD.findall(normalised(text)))


def _same(evaluated: Sequence[str], prompts: Sequence[_Text]) -> _Finds:
    numbers: dict[str, list[int]] = {}
    for number, text in enumerate(prompts):
        numbers.setdefault(_words(text.content), []).append(number)
    for i, prompt in enumerate(evaluated):
        words = _words(prompt)
        for number in numbers.get(words, ()) if words else ():
            yield i, number, "same", 1.0


def _near(evaluated: Sequence[str], prompts: Sequence[_Text]) -> _Finds:
    places = [i for i, prompt in enumerate(evaluated) if _words(prompt)]
    for i, number, similarity in near_texts([evaluated[i] for i in places], [text.content for text in prompts]):
        yield places[i], number, "near", similarity


def _contained(evaluated: Sequence[str], texts: Sequence[_Text], on_progress: Callable[[int, int], None]) -> _Finds:
    words = [_words(prompt) for prompt in evaluated]
    grams = [word_shingles(text, _size(text)) if _size(text) else set() for text in words]
    sizes = sorted({_size(text) for text in words} - {0})
    holders: dict[str, list[int]] = {gram: [] for own in grams for gram in own}
    for number, text in enumerate(texts):
        content = _words(text.content)
        for size in sizes:
            for gram in word_shingles(content, size) & holders.keys():
                holders[gram].append(number)
        on_progress(number + 1, len(texts))
    telling = {gram for gram, held_by in holders.items() if _num_prompts(held_by, texts) <= BOILERPLATE}
    for i, own in enumerate(grams):
        kept = own & telling
        common = Counter(number for gram in kept for number in holders[gram])
        for number, count in sorted(common.items()):
            if count >= SHARE * len(kept):
                yield i, number, "contained", count / len(kept)


def _size(words: str) -> int:
    """Words of the n-grams of a prompt; 0 for one that is too short to be looked for."""
    num_words = len(words.split())
    return 0 if num_words < LEAST_WORDS else min(NUM_WORDS, num_words)


def _num_prompts(held_by: Sequence[int], texts: Sequence[_Text]) -> int:
    """Training prompts among the holders of an n-gram; texts of one prompt may well repeat each other."""
    return len(held_by) if len(held_by) <= BOILERPLATE else len({texts[number].prompt for number in held_by})
