"""Duplicates and contradictions against brute force, and planted in real data.

Sixty pairs without a relative in their data set are copied, prompt and responses edited (the sentence stands behind the
responses only), every other copy with its responses exchanged. Of these are found, with the right order of responses:

                 white space  case  changed word  appended sentence
    UKPConvArg            60    60            60                 50
    GSM8K                 60    60            59                 60
    QA-feedback           60    60            60                 60
    TL;DR                 60    60            60                 60
    TruthfulQA            60    60             6                  3

TruthfulQA's answers have ten words: at a Jaccard index of 0.7 another word makes another answer. All links but two lead
to the originals; those two lead to another answer to the same question that is as near.
"""

import itertools
import random
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.data.duplicates import (
    NUM_HASHES,
    THRESHOLD,
    Link,
    TextPair,
    jaccard,
    links,
    near_texts,
    piece_hashes,
    signatures,
)
from dpo_ray.shingles import normalised, word_shingles
from tests.unit.planted import EDITS, WORDS, real


@lru_cache
def pieces(text: str) -> set[str]:
    text = normalised(text)
    return {text[i : i + 5] for i in range(max(1, len(text) - 4))}


def index(one: str, other: str) -> float:
    a, b = pieces(one), pieces(other)
    return len(a & b) / len(a | b)


# Pieces and signatures


def test_an_index_worked_by_hand():
    assert jaccard("abcdef", "abcdeg") == pytest.approx(1 / 3)  # abcde of abcde, bcdef, bcdeg
    assert jaccard("abc", "abc") == 1
    assert jaccard("abc", "abd") == 0
    assert jaccard("A  b\nc d", "a b c d ") == 1
    assert jaccard("", "") == 1
    assert jaccard("", "abcdef") == 0


@settings(max_examples=60)
@given(one=st.text("abA \n", max_size=30), other=st.text("abA \n", max_size=30))
def test_the_index_is_that_of_the_sets_of_pieces(one: str, other: str):
    assert jaccard(one, other) == pytest.approx(index(one, other))


def test_pieces_do_not_run_from_one_text_into_the_next():
    texts = ["the first text", "", "abc", "another one, longer than the others", "\U0001f600 x"]
    together = signatures(texts)
    for text, row in zip(texts, together, strict=True):
        np.testing.assert_array_equal(signatures([text])[0], row)
    assert len(piece_hashes("abcdefabcdef")) == 6


def test_two_signatures_agree_as_often_as_the_index_says():
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=40)) for _ in range(40)]
    texts += [" ".join([*text.split()[:n], *rng.choices(WORDS, k=40 - n)]) for n, text in enumerate(texts)]
    found = signatures(texts)
    errors = [np.mean(found[i] == found[i + 40]) - index(texts[i], texts[i + 40]) for i in range(40)]
    # A mean of 40 errors, each with a standard deviation of at most 1/2 / sqrt(64).
    assert abs(np.mean(errors)) < 4 * 0.5 / np.sqrt(NUM_HASHES * 40)
    assert np.abs(errors).max() < 4 * 0.5 / np.sqrt(NUM_HASHES)


def test_word_shingles_of_a_short_text_are_the_text():
    assert word_shingles("One  two", 3) == {"one two"}
    assert word_shingles("a b c d", 3) == {"a b c", "b c d"}


# Equal pairs


def test_white_space_case_and_form_hide_no_duplicate_and_no_contradiction():
    pairs = [
        TextPair("Is it so?", "Yes, it is.", "No."),
        TextPair("Is  it\nso? ", "yes, it IS.", "no."),
        TextPair("IS IT SO?", "No. ", "Yes,  it is."),
        TextPair("Is it so?", "Yes, it \N{LATIN SMALL LIGATURE FI}s.", "No."),
        TextPair("is it so?", " NO.", "YES, IT IS."),
    ]
    assert [link for link in links(pairs) if link.kind == "same"] == [
        Link(0, 1, "same", False, 1.0),
        Link(0, 2, "same", True, 1.0),
        Link(0, 4, "same", True, 1.0),
    ]
    assert normalised("\N{LATIN SMALL LIGATURE FI}ne") == "fine"


def test_equal_responses_contradict_nothing():
    pairs = [TextPair("Q?", "Yes.", "YES. "), TextPair("Q?", "yes.", "Yes.")]
    assert links(pairs) == [Link(0, 1, "same", False, 1.0)]


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.sampled_from(["p", "q"]), st.sampled_from(["a", "b", "B "]), st.sampled_from(["a", "b", " A"])),
        max_size=12,
    )
)
def test_no_contradiction_of_equal_texts_is_missed(rows: list[tuple[str, str, str]]):
    pairs = [TextPair(*row) for row in rows]
    found = [link for link in links(pairs) if link.kind == "same"]
    plain = [pair.normalised for pair in pairs]
    for i, pair in enumerate(plain):
        alike = [j for j in range(i) if plain[j].prompt == pair.prompt and set(plain[j][1:]) == set(pair[1:])]
        expected = [Link(alike[0], i, "same", plain[alike[0]] != pair, 1.0)] if alike else []
        assert [link for link in found if link.second == i] == expected


# Near pairs


def edited(rng: random.Random, words: list[str], num: int) -> str:
    words = list(words)
    for place in rng.sample(range(len(words)), num):
        words[place] = rng.choice(WORDS)
    return " ".join(words)


def test_near_pairs_are_those_of_the_exact_index():
    rng = random.Random(2)
    bases = [[rng.choices(WORDS, k=k) for k in (20, 25, 30)] for _ in range(24)]
    bases += [[prompt, rejected, chosen] for prompt, chosen, rejected in bases[::3]]
    pairs = [TextPair(*(edited(rng, words, rng.randrange(4)) for words in base)) for base in bases for _ in range(4)]
    expected = {}
    for j, other in enumerate(pairs):
        for i, one in enumerate(pairs[:j]):
            straight = min(index(a, b) for a, b in zip(one, other, strict=True))
            crossed = min(index(one[0], other[0]), index(one[1], other[2]), index(one[2], other[1]))
            if max(straight, crossed) >= THRESHOLD:
                expected[i, j] = (crossed > straight, max(straight, crossed))
    found = links(pairs)
    assert any(link.is_opposite for link in found)
    for link in found:
        is_opposite, similarity = expected[link[:2]]
        assert link.is_opposite == is_opposite
        assert link.similarity == pytest.approx(similarity)
    whole, told = components(len(pairs), list(expected)), components(len(pairs), [link[:2] for link in found])
    assert len(found) == len(pairs) - len(set(told)), "no link says what others say"
    assert len(set(whole)) < len(pairs) - 30
    assert len(set(told)) - len(set(whole)) <= 1
    assert all(whole[link.first] == whole[link.second] for link in found)


def components(num: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """[num], the group of each: those that a path of edges connects."""
    group = list(range(num))
    for one, other in edges:
        old, new = group[other], group[one]
        group = [new if label == old else label for label in group]
    return group


def test_one_prompt_with_other_answers_and_one_answer_to_other_prompts_are_no_duplicates():
    rng = random.Random(3)
    prompt = " ".join(rng.choices(WORDS, k=200))
    answers = [" ".join(rng.choices(WORDS, k=15)) for _ in range(80)]
    assert links([TextPair(prompt, one, other) for one, other in zip(answers[:40], answers[40:], strict=True)]) == []
    prompts = [" ".join(rng.choices(WORDS, k=15)) for _ in range(80)]
    assert links([TextPair(prompt, "Yes.", "No.") for prompt in prompts]) == []


def test_a_crowd_of_near_texts_hangs_together():
    rng = random.Random(4)
    base = rng.choices(WORDS, k=60)
    pairs = [TextPair("Q?", edited(rng, base, 1), "No.") for _ in range(200)]
    found = links(pairs)
    assert len(set(components(len(pairs), [link[:2] for link in found]))) == 1
    assert len(found) == len(pairs) - 1


def test_the_order_of_the_pairs_does_not_change_what_is_near():
    rng = random.Random(5)
    base = [rng.choices(WORDS, k=30) for _ in range(20)]
    pairs = [TextPair("Q?", edited(rng, words, 1), "No.") for words in base for _ in range(3)]
    pairs = list(dict.fromkeys(pairs))
    order = rng.sample(range(len(pairs)), len(pairs))
    straight = components(len(pairs), [link[:2] for link in links(pairs)])
    mixed = components(len(pairs), [(order[a], order[b]) for a, b, *_ in links([pairs[i] for i in order])])
    assert len(set(straight)) < len(pairs)
    for i, j in itertools.combinations(range(len(pairs)), 2):
        assert (straight[i] == straight[j]) == (mixed[i] == mixed[j])


def test_texts_of_two_lists_are_compared_across_and_not_within():
    first = ["the quick brown fox jumps over the lazy dog", "something else entirely, and longer"]
    second = [*first[:1] * 60, "The quick brown fox jumps over the lazy dogs"]
    found = near_texts(first, second)
    assert [(near.first, near.second) for near in found] == [(0, j) for j in range(61)]
    assert [near.similarity for near in found[:60]] == [1.0] * 60
    assert found[60].similarity == pytest.approx(39 / 40)


# Planted in real data

SENTENCE = "That is what I think about it."
# Data set -> how many of 60 planted pairs are found at least, edit by edit.
FOUND = {
    "ukp_convarg/pairs": (60, 60, 57, 46),
    "gsm8k/pairs": (60, 60, 57, 58),
    "qa_feedback/pairs": (60, 60, 58, 58),
    "tldr_judged/pairs": (60, 60, 58, 58),
    "truthfulqa/pairs": (60, 60, 0, 0),
}


@pytest.mark.parametrize("name", FOUND)
def test_planted_duplicates_are_found_and_lead_to_their_originals(shared: Path, name: str):
    pairs = real(shared, name)
    related = {place for link in links(pairs) for place in link[:2]}
    rng = random.Random(0)
    originals = rng.sample([i for i in range(len(pairs)) if i not in related], 60)
    base = [pair for i, pair in enumerate(pairs) if i % 4 == 0 or i in set(originals)]
    places = [base.index(pairs[i]) for i in originals]
    for (edit, change), least in zip(EDITS.items(), FOUND[name], strict=True):
        planted = [copied(rng, pairs[i], edit, change, is_swapped=n % 2 == 1) for n, i in enumerate(originals)]
        found = [link for link in links([*base, *planted]) if link.second >= len(base)]
        expected = {(place, len(base) + n): n % 2 == 1 for n, place in enumerate(places)}
        right = [link for link in found if expected.get(link[:2]) == link.is_opposite]
        assert len({link.second for link in right}) >= least, edit
        assert len(found) - len(right) <= 1, edit


def copied(
    rng: random.Random, pair: TextPair, edit: str, change: Callable[[random.Random, str], str], *, is_swapped: bool
) -> TextPair:
    prompt = pair.prompt if edit == "sentence" else change(rng, pair.prompt)
    chosen, rejected = change(rng, pair.chosen), change(rng, pair.rejected)
    return TextPair(prompt, rejected, chosen) if is_swapped else TextPair(prompt, chosen, rejected)
