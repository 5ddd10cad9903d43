"""Statistics of texts by hand, and changes paired by prompt: intervals cover, and nothing changes by itself."""

import numpy as np
import pytest

from dpo_ray.errors import InputError
from dpo_ray.evaluate.drift import (
    Change,
    Response,
    compression_ratio,
    distinct,
    drift,
    is_refusal,
    num_words,
    repetition,
)

# Single texts


def test_words_stand_between_blanks():
    assert num_words("  one two\n\nthree, four ") == 4
    assert num_words("") == 0


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("a b c", 0.0),
        ("a b c d", 0.0),
        ("a b c d e f g h", 0.0),
        ("a b c d a b c d", 1 / 5),  # abcd bcda cdab dabc abcd
        ("a " * 10, 6 / 7),
    ],
)
def test_repetition_is_the_share_of_4_grams_that_stand_earlier(text: str, share: float):
    assert repetition(text) == pytest.approx(share)


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I\u2019m sorry, I can\u2019t do that.",
        "I am really sorry, but that is not something for me.",
        "I cannot assist with this request.",
        "Thank you for asking. I CANNOT PROVIDE medical advice.",
        "I could not possibly write such a letter.",
        "I'm unable to create pictures.",
        "I am not comfortable with this.",
        "I do not have access to the internet.",
        "I must respectfully decline.",
        "As an AI language model, I do not have opinions.",
        "As a large language model I am unable to see it.",
        "That is against my guidelines.",
    ],
)
def test_a_refusal_is_seen(text: str):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Sure, here is the letter.",
        "As an AI, I can imagine the house well.",
        "I can't help but admire the garden.",
        "She was sorry that she could not help him.",
        "If you cannot provide a receipt, ask the seller.",
        "The model does not have access to the data.",
        "First beat the eggs. " * 20 + "I cannot help with the rest.",
    ],
)
def test_what_is_no_refusal_is_let_be(text: str):
    assert not is_refusal(text)


def test_what_repeats_itself_compresses():
    letters = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(26, size=2000))
    # Letters drawn evenly carry log2(26) of 8 bits, and no code can do better.
    assert 1.5 < compression_ratio(letters) < 8 / np.log2(26)
    assert compression_ratio("again and again " * 100) > 50
    assert compression_ratio("") == 1
    assert compression_ratio("\ud800 half a letter") > 0


def test_distinct_counts_pairs_of_words_over_the_whole_set():
    assert distinct(["a b c", "a b", "x"]) == pytest.approx(2 / 3)  # ab bc ab
    assert distinct(["a b", "a b", "a b", "a b"]) == pytest.approx(1 / 4)
    assert distinct(["a", ""]) == 1


# Changes


def responses(texts: list[str], *, tokens: int = 1, is_finished: bool = True) -> list[Response]:
    return [Response(f"p{i}", text, tokens * len(text.split()), is_finished) for i, text in enumerate(texts)]


def changes(before: list[Response], after: list[Response]) -> dict[str, Change]:
    return {change.name: change for change in drift(before, after)}


TEXTS = ["a b c d e f", "b c d e", "I cannot help with that .", "one two three four five six seven", "a b a b a b a b"]


def test_the_same_texts_have_not_changed():
    for change in drift(responses(TEXTS), responses(TEXTS)):
        assert change.change == 0
        assert change.before == change.after
        assert change.low <= 0 <= change.high
        assert change.low == pytest.approx(-change.high, abs=1e-12)


def test_statistics_are_means_over_prompts():
    before = [Response("p", "a b", 4), Response("p", "a b c d", 8, False), Response("q", "a b c", 10)]
    after = [Response("q", "a b c d e", 20), Response("p", "a b", 2)]
    found = changes(before, after)
    assert found["length"][1:5] == ("tokens", 8, 11, 3)  # (6 + 10) / 2, (2 + 20) / 2
    assert found["words"][1:5] == ("words", 3, 3.5, 0.5)
    assert found["unfinished"][1:5] == ("share", 0.25, 0, -0.25)
    assert found["distinct-2"].before == pytest.approx(3 / 6)
    assert found["distinct-2"].after == pytest.approx(4 / 5)
    assert [change.name for change in drift(before, after)] == [
        *("length", "words", "unfinished", "repetition", "refusals", "compression", "distinct-2"),
    ]


def test_the_order_of_responses_does_not_matter():
    before, after = responses(TEXTS), responses([text + " x y" for text in TEXTS], tokens=3)
    for one, other in zip(drift(before, after), drift(before, after[::-1]), strict=True):
        assert one[:2] == other[:2]
        assert one[2:] == pytest.approx(other[2:])


def test_pairing_takes_the_spread_of_prompts_away():
    generator = np.random.default_rng(0)
    lengths = generator.integers(10, 500, size=60)
    before = [Response(f"p{i}", "x", int(n)) for i, n in enumerate(lengths)]
    after = [Response(f"p{i}", "x", int(n) + 5 + int(generator.integers(3))) for i, n in enumerate(lengths)]
    found = changes(before, after)["length"]
    assert found.low <= 6 <= found.high
    assert found.high - found.low < 0.6


def test_refusals_that_never_came_are_not_ruled_out():
    found = changes(responses(["fine thanks"] * 50), responses(["fine thanks"] * 50))["refusals"]
    # Two changed prompts among 52: Student's t with 51 degrees of freedom, sqrt(2 / 51 / 52).
    assert found.high == pytest.approx(2.007584 * np.sqrt(2 / 51 / 52), rel=1e-5)
    assert found.low == -found.high


def test_the_interval_of_a_rare_event_covers():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        before, after = (
            [Response(str(i), "", 0, bool(finished)) for i, finished in enumerate(generator.random(60) > share)]
            for share in (0.02, 0.10)
        )
        found = _unfinished(before, after)
        covered += found.low <= 0.08 <= found.high
    assert 0.93 <= covered / 400 <= 0.985


def _unfinished(before: list[Response], after: list[Response]) -> Change:
    return next(change for change in drift(before, after, num_draws=100) if change.name == "unfinished")


def test_the_jackknife_of_distinct_is_the_plain_one_and_covers():
    generator = np.random.default_rng(1)
    weights = [1 / np.arange(1, 201) ** power for power in (0.7, 1.0)]

    def side(power: int) -> list[Response]:
        p = weights[power] / weights[power].sum()
        words = generator.choice(200, size=(30, 25), p=p)
        return [Response(f"p{i}", " ".join(map(str, row)), 25) for i, row in enumerate(words)]

    before, after = side(0), side(1)
    found = _distinct(before, after)
    left_out = [
        distinct([r.text for r in after if r.prompt != own.prompt])
        - distinct([r.text for r in before if r.prompt != own.prompt])
        for own in before
    ]
    error = np.sqrt(29 / 30 * ((np.array(left_out) - np.mean(left_out)) ** 2).sum())
    assert found.high - found.change == pytest.approx(2.045229642132703 * error)

    runs = [_distinct(side(0), side(1)) for _ in range(300)]
    truth = np.mean([change.change for change in runs])
    assert truth < -0.1
    assert np.mean([change.low <= truth <= change.high for change in runs]) >= 0.93


def _distinct(before: list[Response], after: list[Response]) -> Change:
    return drift(before, after, num_draws=100)[-1]


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (["p", "q"], ["p"], "prompt `q` has responses before only"),
        (["p"], ["p", "q"], "prompt `q` has responses after only"),
        (["p"], ["p"], "at least 2 prompts, got 1"),
        ([], [], "at least 2 prompts, got 0"),
    ],
)
def test_what_does_not_pair_is_refused(before: list[str], after: list[str], message: str):
    one, other = ([Response(prompt, "text", 1) for prompt in side] for side in (before, after))
    with pytest.raises(InputError, match=message):
        drift(one, other)
