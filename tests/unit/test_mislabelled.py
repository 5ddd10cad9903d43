"""Likely mislabelled pairs: fit and cross-fitting by their properties, the rule by hand, planted flips against chance.

One label in ten is flipped, at random. Of the k pairs with the lowest margins, k the number of flips, so many are flips
(chance: 0.10); and of the pairs called suspicious (precision), and of the flips (recall):

                                accuracy  precision at k  at k / 2  suspicious: precision, recall
    TruthfulQA                      0.76            0.65      0.88  0.69, 0.62
    sentiment (rt-polarity)         0.74            0.54      0.69  0.49, 0.62
    UKPConvArg                      0.74            0.53      0.67  0.45, 0.62

It does not work where the surface of a response does not show its worth. GSM8K, HH-RLHF and TL;DR stay at accuracies
of 0.59 to 0.62 with such flips, where the k lowest margins hold 0.19 to 0.26 of flips; no label of these is called
suspicious.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_matrix
from scipy.special import expit

from dpo_ray.data import mislabelled
from dpo_ray.data.duplicates import TextPair
from dpo_ray.data.mislabelled import LEAST_ACCURACY, RIDGE, cross_fitted_margins, fit, folds_of, judge
from tests.unit.planted import WORDS, real


def swapped(pair: TextPair) -> TextPair:
    return TextPair(pair.prompt, pair.rejected, pair.chosen)


def made(num: int, seed: int = 0, per_prompt: int = 2) -> list[TextPair]:
    """Pairs whose chosen response has a word that the rejected one has not."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, 6)) for _ in range(2 * num)]
    return [
        TextPair(f"p{i // per_prompt}", f"{one} good", f"{other} bad")
        for i, (one, other) in enumerate(zip(texts[:num], texts[num:], strict=True))
    ]


# Folds and fit


@settings(max_examples=50)
@given(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=60), st.randoms())
def test_a_group_is_in_one_fold_whatever_the_order(groups: list[str], rng: object):
    fold = folds_of(groups)
    fold_of = dict(zip(groups, fold.tolist(), strict=True))
    assert [fold_of[group] for group in groups] == fold.tolist()
    assert set(fold.tolist()) == set(range(min(5, len(set(groups)))))
    order = np.random.default_rng(0).permutation(len(groups))
    np.testing.assert_array_equal(folds_of([groups[i] for i in order]), fold[order])


def test_folds_are_even_where_groups_allow():
    sizes = np.bincount(folds_of([f"g{i % 50}" for i in range(200)]))
    assert sizes.tolist() == [40] * 5
    assert np.bincount(folds_of(["big"] * 90 + ["a", "b", "c", "d"])).max() == 90


def test_one_column_has_the_weight_that_solves_its_equation():
    # d/dw: ridge w = n x sigmoid(-x w), n = 40 rows of x = 2.
    weight = float(fit(csr_matrix(np.full((40, 1), 2.0)))[0])
    assert RIDGE * weight == pytest.approx(80 * expit(-2 * weight), rel=1e-3)


def test_the_gradient_of_the_penalised_likelihood_is_zero_at_the_fit():
    rng = np.random.default_rng(1)
    features = rng.normal(size=(300, 8))
    weights = fit(csr_matrix(features))
    gradient = RIDGE * weights - features.T @ expit(-features @ weights)
    assert np.abs(gradient).max() < 0.05
    assert np.abs(features.T @ expit(np.zeros(300))).max() > 1, "where it began it was not"


# Cross-fitting


def test_a_label_has_no_say_in_the_margins_of_its_own_group():
    pairs = made(60)
    groups = [pair.prompt for pair in pairs]
    margins = cross_fitted_margins(pairs, groups)
    other = [swapped(pair) if pair.prompt == "p7" else pair for pair in pairs]
    turned = cross_fitted_margins(other, groups)
    own = np.array([group == "p7" for group in groups])
    np.testing.assert_allclose(turned[own], -margins[own], rtol=1e-6)
    same_fold = folds_of(groups) == folds_of(groups)[own][0]
    assert np.abs(turned[~same_fold] - margins[~same_fold]).max() > 1e-3, "the others learn from it"


def test_pairs_read_the_other_way_round_have_the_opposite_margins():
    pairs = made(60)
    groups = [pair.prompt for pair in pairs]
    straight = cross_fitted_margins(pairs, groups)
    np.testing.assert_allclose(cross_fitted_margins([swapped(pair) for pair in pairs], groups), straight, rtol=1e-6)
    assert (straight > 0).mean() > 0.95


def test_pairs_beyond_the_fitted_sample_have_margins_of_models_without_their_group(monkeypatch: pytest.MonkeyPatch):
    pairs = made(200)
    groups = [pair.prompt for pair in pairs]
    monkeypatch.setattr(mislabelled, "MOST_FITTED", 60)
    monkeypatch.setattr(mislabelled, "_PAIRS_AT_ONCE", 16)
    margins = cross_fitted_margins(pairs, groups)
    assert (margins > 0).mean() > 0.95
    other = [swapped(pair) if pair.prompt == "p7" else pair for pair in pairs]
    own = np.array([group == "p7" for group in groups])
    np.testing.assert_allclose(cross_fitted_margins(other, groups)[own], -margins[own], rtol=1e-6)


def test_long_and_empty_responses_and_any_script_have_margins():
    pairs = [TextPair(f"p{i}", "\u65e5\u672c " * 3000, "") for i in range(10)]
    assert np.isfinite(cross_fitted_margins(pairs, [pair.prompt for pair in pairs])).all()


# The rule


def test_suspicious_labels_worked_by_hand():
    # A margin m is calibrated to s m with mean(m sigmoid(-s m)) = 0: with 80 of 1 and 20 of -1, sigmoid(s) = 0.8.
    margins = np.array([1.0] * 80 + [-1.0] * 20)
    judged = judge(margins)
    np.testing.assert_allclose(judged.probability, [0.2] * 80 + [0.8] * 20, atol=1e-4)
    assert judged.threshold == pytest.approx(0.8 * 0.8 + 0.2 * 0.2, abs=1e-4)
    assert judged.is_suspicious.tolist() == [False] * 80 + [True] * 20
    assert judged.accuracy == 0.8
    assert judged.low < 0.8 < judged.high


def test_a_doubtful_label_is_not_suspicious():
    # Calibrated, -0.1 gives the opposite label little more than one half, and the threshold is well above.
    judged = judge(np.array([1.0] * 80 + [-1.0] * 10 + [-0.1] * 10))
    assert judged.is_suspicious.tolist() == [False] * 80 + [True] * 10 + [False] * 10


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_the_unit_of_the_margins_does_not_matter(scale: float):
    margins = np.random.default_rng(0).normal(1, 1, size=400)
    straight, scaled = judge(margins), judge(scale * margins)
    np.testing.assert_array_equal(scaled.is_suspicious, straight.is_suspicious)
    np.testing.assert_allclose(scaled.probability, straight.probability, atol=1e-3)
    assert straight.is_suspicious.any()


def test_probabilities_are_those_of_the_truth_where_the_margins_are_in_logits():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, size=20_000)
    margins = np.where(rng.random(20_000) < expit(logits), logits, -logits)
    judged = judge(3 * margins)  # in another unit
    for low, high in ((0.0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.0)):
        inside = (judged.probability >= low) & (judged.probability < high)
        # Another label of the pair says the opposite with sigmoid(-margin).
        assert judged.probability[inside].mean() == pytest.approx(expit(-margins[inside]).mean(), abs=0.02)


def test_margins_of_no_accuracy_make_no_label_suspicious():
    rng = np.random.default_rng(0)
    assert not judge(rng.normal(size=2000)).is_suspicious.any()
    assert not judge(rng.normal(-1, 1, size=2000)).is_suspicious.any()
    assert not judge(np.zeros(50)).is_suspicious.any()
    few = judge(np.array([1.0] * 4 + [-1.0]))
    assert few.accuracy > LEAST_ACCURACY
    assert not few.is_suspicious.any(), "too few to be sure"


# Planted in real data


def sentiment(shared: Path) -> list[TextPair]:
    """Positive over negative sentences, none of them twice."""
    with gzip.open(shared / "data/rt_polarity/sentences.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sides = [[row["text"] for row in rows if row["label"] == label] for label in (1, 0)]
    return [TextPair(f"p{i}", *texts) for i, texts in enumerate(zip(*sides, strict=False))]


def flipped(pairs: list[TextPair]) -> tuple[list[TextPair], NDArray[np.bool_]]:
    flips = np.random.default_rng(0).random(len(pairs)) < 0.1
    return [swapped(pair) if flip else pair for pair, flip in zip(pairs, flips, strict=True)], flips


# Data set -> least precision at k, at k / 2; precision and recall of the suspicious ones.
TOLD = {
    "truthfulqa/pairs": (0.60, 0.80, 0.62, 0.56),
    "sentiment": (0.49, 0.62, 0.44, 0.56),
    "ukp_convarg/pairs": (0.48, 0.60, 0.40, 0.56),
}


@pytest.mark.parametrize("name", TOLD)
def test_flipped_labels_are_found_far_more_often_than_by_chance(shared: Path, name: str):
    pairs, flips = flipped(sentiment(shared) if name == "sentiment" else real(shared, name))
    margins = cross_fitted_margins(pairs, [pair.prompt for pair in pairs])
    by_margin, count = flips[np.argsort(margins)], int(flips.sum())
    suspicious = judge(margins).is_suspicious
    at_k, at_half, precision, recall = TOLD[name]
    assert by_margin[:count].mean() >= at_k
    assert by_margin[: count // 2].mean() >= at_half
    assert flips[suspicious].mean() >= precision
    assert flips[suspicious].sum() / count >= recall


@pytest.mark.parametrize("name", ["gsm8k/pairs", "hh_rlhf/helpful-base.test", "tldr_judged/pairs"])
def test_where_the_surface_does_not_tell_no_label_is_called_suspicious(shared: Path, name: str):
    pairs, _ = flipped(real(shared, name)[:1000])
    judged = judge(cross_fitted_margins(pairs, [pair.prompt for pair in pairs]))
    assert judged.accuracy < 0.65
    assert not judged.is_suspicious.any()
