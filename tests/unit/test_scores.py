"""Acquisition scores against closed forms and enumeration: what each one measures, and what it does not depend on."""

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit

from dpo_ray.acquisition import scores
from dpo_ray.acquisition.scores import STRATEGIES, Ask, Features, score
from dpo_ray.errors import InputError

ASK = Ask(budget=4, seed=3)
EULER = 0.5772156649015329


def pool(num: int = 12, seed: int = 0, **columns: Any) -> Features:
    """Candidates with every feature there is; three to a prompt."""
    rng = np.random.default_rng(seed)
    prompts = [i // 3 for i in range(num)]
    samples, states = -rng.gamma(4, 5, size=(num, 5)), rng.normal(size=(num, 6))
    given = {
        "pair_id": [f"p{i:03}" for i in range(num)],
        "prompt_id": [f"q{i}" for i in prompts],
        "source": [f"s{i % 2}" for i in range(num)],
        "policy_logps": -rng.gamma(5, 6, size=(num, 2)) - 1,
        "reference_logps": -rng.gamma(5, 6, size=(num, 2)) - 1,
        "num_tokens": rng.integers(1, 30, size=(num, 2)),
        "sample_logps": samples[prompts],
        "sample_tokens": rng.integers(1, 30, size=(num, 5))[prompts],
        "hidden": rng.normal(size=(num, 2, 7)),
        "prompt_hidden": states[prompts],
        "head_margins": rng.normal(size=(num, 4)) * 2,
        "gold_gap": rng.normal(size=num),
        "text": [f"prompt {i} one two {rng.integers(9)} four five" for i in range(num)],
    }
    return Features(**(given | columns))


def with_gaps(*gaps: float, **columns: Any) -> Features:
    """Candidates whose policy and reference differ so much more on the first response than on the second."""
    reference = np.full((len(gaps), 2), -3e4)
    return pool(len(gaps), policy_logps=reference + np.array([(gap, 0.0) for gap in gaps]), reference_logps=reference)


def swapped(features: Features) -> Features:
    """The same pairs with the second response called the first."""
    columns = {name: getattr(features, name) for name in vars(features)}
    for name in ("policy_logps", "reference_logps", "num_tokens", "hidden"):
        columns[name] = columns[name][:, ::-1]
    return Features(**columns | {"head_margins": -features.head_margins, "gold_gap": -features.gold_gap})


# What each score measures


def test_certainty_worked_by_hand():
    # First: (-10 + 12) - (-20 + 21) = 1 nat; second: (-5 + 5) - (-9 + 4) = 5 nats; in rewards half of it.
    features = pool(2, policy_logps=[[-10, -20], [-5, -9]], reference_logps=[[-12, -21], [-5, -4]])
    found = score("certainty", features, ASK, {"beta": 0.5})
    np.testing.assert_allclose(found.values, [0.5, 2.5], rtol=1e-15)
    np.testing.assert_array_equal(found.keys, found.values)


def test_certainty_per_token_divides_each_log_ratio_by_its_length():
    # 2 nats over 4 tokens less 1 nat over 5; 0 less 5 nats lost over 2.
    features = pool(
        2, policy_logps=[[-10, -20], [-5, -9]], reference_logps=[[-12, -21], [-5, -4]], num_tokens=[[4, 5], [3, 2]]
    )
    np.testing.assert_allclose(score("certainty", features, ASK, {"per_token": True}).values, [0.3, 2.5], rtol=1e-14)


def test_uncertainty_ranks_as_the_papers_code_and_opposite_to_certainty():
    features = pool(40)
    found = score("uncertainty", features, ASK, {"beta": 0.1})
    papers = 1 - 2 * np.abs(expit(0.1 * scores.implicit_gaps(features)) - 0.5)
    np.testing.assert_array_equal(np.argsort(-found.keys), np.argsort(-papers))
    np.testing.assert_array_equal(found.keys, -score("certainty", features, ASK, {"beta": 0.1}).keys)


@settings(max_examples=25, deadline=None)
@given(beta=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
@pytest.mark.parametrize("name", ["certainty", "uncertainty"])
def test_beta_changes_no_ranking_by_margin(name: str, beta: float, seed: int):
    features = pool(30, seed)
    ranks = [np.argsort(score(name, features, ASK, {"beta": value}).keys) for value in (1.0, beta)]
    np.testing.assert_array_equal(*ranks)


@pytest.mark.parametrize("name", sorted(set(STRATEGIES)))
def test_no_score_depends_on_which_response_is_the_first(name: str):
    one, other = score(name, pool(), ASK), score(name, swapped(pool()), ASK)
    np.testing.assert_allclose(one.values, other.values, rtol=1e-12)
    np.testing.assert_array_equal(one.eligible, other.eligible)


@settings(max_examples=20, deadline=None)
@given(order=st.permutations(range(12)))
@pytest.mark.parametrize("name", sorted(set(STRATEGIES)))
def test_no_score_depends_on_the_order_of_the_pool(name: str, order: list[int]):
    whole, mixed = score(name, pool(), ASK), score(name, pool().take(np.array(order)), ASK)
    np.testing.assert_allclose(mixed.keys, whole.keys[order], rtol=1e-12)
    np.testing.assert_array_equal(mixed.eligible, whole.eligible[order])


def test_the_sampled_entropy_converges_to_that_of_a_markov_model_enumerated_in_full():
    """Three tokens, one of which ends the response, at most five: 63 responses and their exact probabilities."""
    rng = np.random.default_rng(1)
    first, step, longest = rng.dirichlet(np.ones(3)), rng.dirichlet(np.ones(3), size=3), 5

    def logp(response: tuple[int, ...]) -> float:
        chances = [first[response[0]], *(step[a, b] for a, b in itertools.pairwise(response))]
        return float(np.log(chances).sum())

    responses = [
        (*body, *end)
        for length in range(longest + 1)
        for body in itertools.product((0, 1), repeat=length)
        for end in ([(2,)] if length < longest else [()])
    ]
    logps = np.array([logp(response) for response in responses])
    assert np.exp(logps).sum() == pytest.approx(1, rel=1e-12)
    exact = -(np.exp(logps) * logps).sum()

    spread = math.sqrt((np.exp(logps) * (logps + exact) ** 2).sum())
    for num in (100, 10_000, 200_000):
        drawn = rng.choice(logps, size=(1, num), p=np.exp(logps))
        found = score("entropy", pool(1, sample_logps=drawn), ASK).values[0]
        assert found == pytest.approx(exact, abs=4 * spread / math.sqrt(num))


def test_the_highest_entropy_comes_first():
    """An open prompt has unlikely samples: very negative log-probs, high entropy."""
    features = pool(2, prompt_id=["shut", "open"], sample_logps=[[-1.0, -2.0], [-30.0, -50.0]])
    found = score("entropy", features, ASK)
    np.testing.assert_allclose(found.values, [1.5, 40.0])
    assert found.keys[1] > found.keys[0]


def test_entropy_takes_the_samples_there_are():
    features = pool(1, sample_logps=[[-4.0, math.nan, -8.0]], sample_tokens=[[2, math.nan, 8]])
    assert score("entropy", features, ASK).values[0] == 6
    assert score("entropy", features, ASK, {"per_token": True}).values[0] == 1.5


def test_bald_is_the_mutual_information_of_label_and_member_by_enumeration():
    margins = np.random.default_rng(2).normal(size=(20, 5)) * 3
    p = expit(margins)
    joint = np.stack([p, 1 - p], axis=-1) / 5  # [N, member, label]
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=2, keepdims=True)
    expected = (joint * np.log(joint / independent)).sum(axis=(1, 2))
    found = score("bald", pool(20, head_margins=margins), ASK).values
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-14)


def test_bald_of_members_that_agree_is_zero_and_of_opposed_ones_log_two():
    found = score("bald", pool(3, head_margins=[[2.0, 2.0], [50.0, -50.0], [1.0, 0.5]]), ASK).values
    assert found[0] == pytest.approx(0, abs=1e-15)
    assert found[1] == pytest.approx(math.log(2), rel=1e-12)
    assert 0 < found[2] < math.log(2)


def test_bal_pm_worked_by_hand():
    """Prompts at 0, 1 and 5 on a line: their second-nearest others are 5, 4 and 5 away. digamma(1) is -0.577."""
    features = pool(
        4,
        prompt_id=["a", "a", "b", "c"],
        prompt_hidden=[[0.0], [0.0], [1.0], [5.0]],
        head_margins=[[9.0, -9.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]],
    )
    found = score("bal_pm", features, ASK, {"weight": 0.5, "neighbours": 2}).values
    bald = score("bald", features, ASK).values
    np.testing.assert_allclose(found - bald, 0.5 * (np.log([10, 10, 8, 10]) + EULER), rtol=1e-12)
    assert bald[0] > 0.69


def test_distances_to_neighbours_are_those_of_brute_force():
    points = np.random.default_rng(3).normal(size=(70, 5)) + 100
    points[7] = points[8]
    features = pool(70, prompt_id=[f"q{i:02}" for i in range(70)], prompt_hidden=points)
    for k in (1, 4, 200):
        brute = np.sort(np.linalg.norm(points[:, None] - points, axis=2), axis=1)[:, min(k, 69)]
        np.testing.assert_allclose(scores.prompt_terms(features, neighbours=k).radius, brute, rtol=1e-12)
        np.testing.assert_allclose(scores._kth_distances(points, min(k, 69), rows=16), brute, rtol=1e-12)
    assert scores.prompt_terms(features, neighbours=1).radius[7] == 0
    assert np.isfinite(score("bal_pm", features, ASK, {"neighbours": 1}).values).all()


def test_d_optimal_is_the_gain_in_the_log_determinant():
    features = pool(15)
    found = score("d_optimal", features, ASK, {"beta": 0.3, "ridge": 0.7}).values
    p = expit(0.3 * scores.implicit_gaps(features))
    between = features.hidden[:, 0] - features.hidden[:, 1]
    between /= math.sqrt((between**2).sum(axis=1).mean())
    for i in range(15):
        information = 0.7 * np.eye(7) + 4 * p[i] * (1 - p[i]) * np.outer(between[i], between[i])
        gain = np.linalg.slogdet(information)[1] - np.linalg.slogdet(0.7 * np.eye(7))[1]
        assert found[i] == pytest.approx(gain, rel=1e-9)


def test_d_optimal_does_not_depend_on_the_scale_of_hidden_states():
    one, other = pool(), pool(hidden=pool().hidden * 1e3)
    np.testing.assert_allclose(score("d_optimal", one, ASK).values, score("d_optimal", other, ASK).values, rtol=1e-9)


def test_a_projection_keeps_lengths_on_average():
    hidden = np.zeros((40, 2, 2000))
    hidden[:, :, 1000:] = np.random.default_rng(5).normal(size=(40, 2, 1000))
    wide = pool(40, hidden=hidden)
    whole = scores.differences(wide, seed=0, width=2000, wanted_by="x")
    narrow = scores.differences(wide, seed=0, width=400, wanted_by="x")
    assert narrow.shape == (40, 400)
    gram, kept = whole @ whole.T, narrow @ narrow.T
    assert np.abs(gram - kept).max() < 5 / math.sqrt(400)
    assert np.abs(gram - kept).std() < 1.5 / math.sqrt(400)


def test_adpo_asks_about_margins_up_to_the_threshold_and_labels_the_rest():
    features = with_gaps(10.0, -13.0, 14.0, -20.0)
    found = score("adpo", features, ASK, {"beta": 0.1, "threshold": 1.3})
    assert found.eligible.tolist() == [True, True, False, False]
    np.testing.assert_allclose(found.values, [1.0, 1.3, 1.4, 2.0], rtol=1e-9)
    assert scores.pseudo_labels(features, beta=0.1, threshold=1.3).tolist() == [0, 0, 1, -1]
    assert (-scores.pseudo_labels(swapped(features))).tolist() == scores.pseudo_labels(features).tolist()


@pytest.mark.parametrize("of", ["absolute", "signed"])
def test_adjacent_bands_share_the_pool_out(of: str):
    features = pool(31)
    ends = [0.0, 0.2, 0.55, 0.9, 1.0]
    bands = [score("margin_band", features, ASK, {"low": a, "high": b, "of": of}) for a, b in itertools.pairwise(ends)]
    assert sum(band.eligible.astype(int) for band in bands).tolist() == [1] * 31
    for lower, upper in itertools.pairwise(bands):
        assert lower.values[lower.eligible].max() <= upper.values[upper.eligible].min()
    assert [int(band.eligible.sum()) for band in bands] == [6, 11, 11, 3]


def test_a_signed_band_tells_the_pairs_that_the_model_gets_wrong():
    found = score("margin_band", with_gaps(3.0, -8.0, 1.0, -1.0), ASK, {"high": 0.5, "of": "signed"})
    assert found.eligible.tolist() == [False, True, False, True]
    assert score("margin_band", with_gaps(3.0, -8.0, 1.0, -1.0), ASK, {"low": 0.75}).eligible.tolist() == [
        False,
        True,
        False,
        False,
    ]


def test_the_two_stages_take_certainty_among_the_prompts_of_high_entropy():
    features = pool(30)
    found = score("entropy_then_certainty", features, Ask(budget=2), {"over": 1.5, "beta": 0.2})
    entropies = score("entropy", features, ASK).values
    best = np.sort(np.unique(entropies))[-3:]  # 2 labels, 1.5 prompts each
    np.testing.assert_array_equal(found.eligible, np.isin(entropies, best))
    np.testing.assert_array_equal(found.values, score("certainty", features, ASK, {"beta": 0.2}).values)


def test_prompts_of_equal_entropy_go_by_their_id():
    features = pool(4, prompt_id=["d", "b", "c", "a"], sample_logps=[[-1.0]] * 4)
    found = score("entropy_then_certainty", features, Ask(budget=2), {"over": 1})
    assert found.eligible.tolist() == [False, True, False, True]


def test_oracle_gap_is_the_true_gap_whatever_its_sign():
    found = score("oracle_gap", pool(3, gold_gap=[0.5, -2.0, 1.0]), ASK)
    assert found.keys.tolist() == [0.5, 2.0, 1.0]


def test_random_goes_by_id_and_seed_and_is_uniform():
    many = pool(20_000, text=None)
    one, other = (score("random", many, Ask(1, seed)).keys for seed in (0, 1))
    np.testing.assert_array_equal(one, score("offline_random", many, Ask(1, 0)).keys)
    assert one[:2].tolist() == scores.uniform(np.array(["p000", "p001"]), 0, "random").tolist()
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.03
    assert np.histogram(one, bins=10, range=(0, 1))[0] == pytest.approx([2000] * 10, abs=200)
    assert 0 < one.min() < one.max() < 1
    assert len(set(one)) == 20_000


def test_a_hash_is_the_same_on_every_machine():
    """Written down once: a change of it would change every run's choices."""
    found = scores.uniform(np.array(["a", "b"]), 0, "random")
    assert found == pytest.approx([0.02622167316799795, 0.8968559645863136], abs=1e-15)


# Where scores say nothing, or are extreme


@pytest.mark.parametrize("name", ["certainty", "uncertainty", "entropy_then_certainty", "adpo", "margin_band"])
@pytest.mark.parametrize("rounding", [0.0, 3e-5])
def test_in_the_first_round_a_strategy_of_margins_is_declared_random(name: str, rounding: float):
    features = with_gaps(*(np.random.default_rng(0).uniform(-1, 1, size=10) * rounding))
    found = score(name, features, ASK)
    assert found.undecided is not None
    assert found.undecided.startswith("all 10 scores are equal (")
    assert found.undecided.endswith("): the order is random")
    np.testing.assert_array_equal(found.keys, score("random", features, ASK).keys)


def test_one_pair_that_differs_is_enough_to_decide():
    found = score("certainty", with_gaps(0.0, 0.0, 0.01), ASK)
    assert found.undecided is None
    assert found.keys.argmax() == 2


def test_in_the_first_round_a_band_of_margins_is_the_whole_pool():
    assert score("margin_band", with_gaps(0.0, 0.0, 0.0), ASK, {"low": 0.9}).eligible.all()


def test_members_that_agree_on_everything_decide_nothing():
    assert score("bald", pool(head_margins=np.zeros((12, 3))), ASK).undecided


def test_equal_gains_of_a_greedy_rule_are_not_undecided():
    hidden = np.zeros((3, 2, 3))
    hidden[:, 0] = np.eye(3)
    features = with_gaps(0.0, 0.0, 0.0)
    assert score("d_optimal", Features(**vars(features) | {"hidden": hidden}), ASK).undecided is None
    assert score("d_optimal", Features(**vars(features) | {"hidden": hidden * 0}), ASK).undecided


def test_extreme_margins_stay_finite_and_in_order():
    features = with_gaps(1e4, -2e4, 0.0, 1.5e4)
    for name in ("certainty", "uncertainty", "adpo", "margin_band", "d_optimal"):
        found = score(name, features, ASK)
        assert np.isfinite(found.values).all()
        assert np.isfinite(found.keys).all()
    assert np.argsort(score("certainty", features, ASK).keys).tolist() == [2, 0, 3, 1]
    assert np.argsort(score("uncertainty", features, ASK).keys).tolist() == [1, 3, 0, 2]
    assert score("d_optimal", features, ASK).keys.argmax() == 2
    sure = score("bald", pool(3, head_margins=[[1e4, 1e4], [1e4, -1e4], [-1e4, -2e4]]), ASK).values
    np.testing.assert_allclose(sure, [0, math.log(2), 0], atol=1e-15)


# What is refused


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"pair_id": ["a", "b", "a"]}, "`pair_id`: `a` stands 2 times in the pool"),
        ({"prompt_id": ["a", "b"]}, r"`prompt_id`: shape \[2\] where \[3\] is expected"),
        ({"policy_logps": [[-1.0]] * 3}, r"`policy_logps`: shape \[3, 1\] where \[3, 2\] is expected"),
        ({"policy_logps": [[-1.0, 2.0]] * 3}, "`policy_logps`: pair `p000` has a log-prob above 0"),
        ({"reference_logps": [[-1.0, -2.0], [-1.0, math.nan], [-1.0, -1.0]]}, "pair `p001` has a value that is not fi"),
        ({"reference_logps": [[-1.0, -math.inf]] * 3}, "`reference_logps`: pair `p000` has a value that is not finite"),
        ({"num_tokens": [[0, 1]] * 3}, "`num_tokens`: pair `p000` has a response without tokens"),
        ({"sample_logps": [[-1.0], [math.nan], [-1.0]]}, "`sample_logps`: pair `p001` has no value"),
        ({"sample_logps": [[-1.0], [-1.0, -2.0], [-1.0]]}, "`sample_logps`: not a table of numbers"),
        ({"hidden": [[["x"], ["y"]]] * 3}, "`hidden`: <U1 where numbers are expected"),
        ({"hidden": np.zeros((3, 7))}, r"`hidden`: shape \[3, 7\] where \[3, 2, any\] is expected"),
        ({"gold_gap": [1.0, math.inf, 0.0]}, "`gold_gap`: pair `p001` has a value that is not finite"),
    ],
)
def test_a_wrong_table_is_refused_with_its_column(columns: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as error:
        pool(3, **columns)
    assert "\n" not in str(error.value)


def test_an_empty_pool_is_refused():
    with pytest.raises(InputError, match="the pool has no candidate"):
        Features(pair_id=np.array([]), prompt_id=np.array([]), source=np.array([]))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("margins", {}, "no strategy `margins`; there are random, offline_random, entropy"),
        ("certainty", {"over": 2}, "strategy `certainty` has no option `over`; it has beta, per_token, tolerance"),
        ("random", {"beta": 2}, "strategy `random` has no option `beta`; it has none"),
        ("certainty", {"beta": 0.0}, "`beta`: 0.0 is not a number above 0"),
        ("certainty", {"beta": math.nan}, "`beta`: nan is not a number above 0"),
        ("adpo", {"threshold": -1}, "`threshold`: -1 is not a number above 0"),
        ("d_optimal", {"ridge": 0}, "`ridge`: 0 is not a number above 0"),
        ("d_optimal", {"width": 0}, "`width`: 0; at least 1 is needed"),
        ("bal_pm", {"weight": 0}, "`weight`: 0 is not a number above 0"),
        ("bal_pm", {"neighbours": 0}, "`neighbours`: 0; at least 1 is needed"),
        ("margin_band", {"low": 0.5, "high": 0.5}, "`low`, `high`: 0.5 and 0.5 are no band within 0 and 1"),
        ("margin_band", {"of": "both"}, "`of`: `both` is neither `absolute` nor `signed`"),
        ("entropy_then_certainty", {"over": 0.5}, "`over`: 0.5 prompts per label; at least 1 is needed"),
    ],
)
def test_a_wrong_option_is_refused_by_name(name: str, options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as error:
        score(name, pool(), ASK, options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "column"), [(name, c) for name, s in STRATEGIES.items() for c in s.needs])
def test_a_feature_that_is_not_there_is_named(name: str, column: str):
    with pytest.raises(InputError, match=f"`{name}` needs the feature `{column}`, which this pool lacks"):
        score(name, pool(**{column: None}), ASK)


def test_every_strategy_needs_no_more_than_it_says():
    for name, strategy in STRATEGIES.items():
        others = {c: None for c in scores._SHAPES if c not in (*strategy.needs, "prompt_id", "source")}
        assert len(score(name, pool(**others), ASK).keys) == 12


def test_the_direction_in_the_table_is_that_of_the_keys():
    for name, strategy in STRATEGIES.items():
        found = score(name, pool(), ASK)
        expected = {"max": found.values, "min": -found.values, "random": score("random", pool(), ASK).keys}
        np.testing.assert_array_equal(found.keys, expected[strategy.direction])


def test_lengths_and_members_that_are_missing_are_named():
    for name, column in (("certainty", "num_tokens"), ("entropy", "sample_tokens")):
        with pytest.raises(InputError, match=f"`per_token` needs the feature `{column}`"):
            score(name, pool(**{column: None}), ASK, {"per_token": True})
    with pytest.raises(InputError, match="`head_margins`: 1 member; disagreement needs at least 2"):
        score("bald", pool(head_margins=np.zeros((12, 1))), ASK)
    with pytest.raises(InputError, match="`bal_pm` needs at least 2 prompts in the pool"):
        score("bal_pm", pool(prompt_id=["q"] * 12), ASK)
    with pytest.raises(InputError, match="`budget`: 0 labels"):
        score("random", pool(), Ask(0))


def test_scores_and_choices_need_no_torch(repository: Path):
    code = "import dpo_ray.acquisition.choose, sys; print([m for m in ('torch', 'ray', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
