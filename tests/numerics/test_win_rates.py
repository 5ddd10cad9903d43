"""Win rates against closed forms and known truth: intervals cover as often as they say, and AlpacaEval agrees."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import expit, logit, stdtrit

from benchmarks.alpaca_eval_figures import Comparisons, arena, summaries
from dpo_ray.errors import InputError
from dpo_ray.evaluate.alpaca_eval import alpaca_eval_win_rate
from dpo_ray.evaluate.win_rates import bootstrap, bradley_terry, length_controlled_win_rate, win_rate
from dpo_ray.metrics import wilson_interval

Floats = NDArray[np.float64]


def simulated(
    generator: np.random.Generator, chances: Floats, num_responses: int, ties: float
) -> tuple[Floats, NDArray[np.intp]]:
    """Scores with the chances [K] as their means, and their prompts; `ties` is the share at even chances."""
    chance = np.repeat(chances, num_responses)
    tied = ties * 2 * np.minimum(chance, 1 - chance)
    drawn = generator.random(len(chance))
    scores = np.where(drawn < chance - tied / 2, 1.0, np.where(drawn < chance + tied / 2, 0.5, 0.0))
    return scores, np.repeat(np.arange(len(chances)), num_responses)


# The win rate


def test_a_prompt_counts_once_however_many_comparisons_it_has():
    assert win_rate([1, 0, 0, 0.5], ["a", "b", "b", "b"]).estimate == pytest.approx((1 + 0.5 / 3) / 2)


def test_one_decided_comparison_a_prompt_is_nearly_wilson():
    # Squares add up to K p (1 - p); with one more prompt there are K^2 / (K + 1) effective ones.
    found = win_rate([1] * 30 + [0] * 10, [f"p{i}" for i in range(40)])
    assert found.estimate == 0.75
    assert found[1:] == pytest.approx(wilson_interval(0.75, 1600 / 41, -stdtrit(40, 0.025)), rel=1e-12)


def test_worked_by_hand_with_ties():
    # Means 1, 0.5, 0.75, 0.75: rate 0.75, squares 0.125, p (1 - p) = 0.1875, effective 16 * 0.1875 / 0.3125 = 9.6.
    found = win_rate([1, 0.5, 1, 0.5, 0.5, 1], ["a", "b", "c", "c", "d", "d"])
    assert found.estimate == pytest.approx(0.75)
    assert found[1:] == pytest.approx(wilson_interval(0.75, 9.6, 2.7764451051977987), rel=1e-12)


def test_copies_of_comparisons_tell_nothing_new():
    scores, prompts = [1, 0, 0.5, 1, 0], ["a", "b", "c", "d", "e"]
    assert win_rate(scores * 7, prompts * 7) == pytest.approx(win_rate(scores, prompts))


def test_what_one_model_wins_the_other_loses():
    scores, prompts = simulated(np.random.default_rng(0), np.full(25, 0.2), 2, 0.3)
    won, lost = win_rate(scores, prompts), win_rate(1 - scores, prompts)
    assert lost == pytest.approx((1 - won.estimate, 1 - won.high, 1 - won.low))


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_model_that_never_lost_has_an_interval_all_the_same(score: float):
    found = win_rate([score] * 20, range(20))
    assert found.estimate == score
    assert found[1:] == wilson_interval(score, 20, -float(stdtrit(20, 0.025)))
    assert found.high - found.low == pytest.approx(0.179, abs=1e-3)


def test_nothing_but_ties_is_no_certainty():
    found = win_rate([0.5] * 20, range(20))
    assert (found.low + found.high) / 2 == pytest.approx(0.5)
    # Twenty ties leave room for one prompt in seven that is decided, all one way.
    assert 0.03 < found.high - 0.5 < 0.1


def test_of_one_prompt_nearly_nothing_is_known():
    found = win_rate([0.5], ["a"])
    assert found.low < 0.01
    assert found.high > 0.99


COVERAGE = 1500
"""Simulations of each case: a true 95 % shows as 93.9 to 96.1 %, twice its standard error."""


@pytest.mark.parametrize("num_prompts", [20, 100, 500])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
@pytest.mark.parametrize(
    ("num_responses", "ties", "alike"), [(1, 0.0, 0.0), (1, 0.3, 0.0), (4, 0.3, 0.1), (4, 0.0, 0.4)]
)
def test_the_interval_of_a_win_rate_covers(
    num_prompts: int, rate: float, num_responses: int, ties: float, alike: float
):
    """`alike` is the correlation of two responses to a prompt: chances of prompts have a beta distribution."""
    generator = np.random.default_rng(round(1000 * rate) + num_prompts + num_responses)
    covered = 0
    for _ in range(COVERAGE):
        spread = (1 / alike - 1) if alike else 0.0
        chances = (
            generator.beta(rate * spread, (1 - rate) * spread, size=num_prompts)
            if alike
            else np.full(num_prompts, rate)
        )
        found = win_rate(*simulated(generator, chances, num_responses, ties))
        covered += found.low <= rate <= found.high
    # A share of few prompts comes in steps, so that at 20 the exact coverage is either below or well above.
    assert 0.93 <= covered / COVERAGE <= (0.99 if num_prompts == 20 else 0.975)


@pytest.mark.parametrize(
    ("scores", "prompts", "message"),
    [
        ([], [], "one prompt for each score"),
        ([1, 0], ["a"], r"one prompt for each score, got \[2\] and \[1\]"),
        ([1, 2], ["a", "b"], "score 2 of row 2 is not between 0 and 1"),
        ([1, 0, math.nan], ["a", "b", "c"], "score nan of row 3"),
    ],
)
def test_wrong_scores_are_refused(scores: list[float], prompts: list[str], message: str):
    with pytest.raises(InputError, match=message):
        win_rate(scores, prompts)


# The length-controlled win rate

# Name: what alpaca_eval 0.6.6 with scikit-learn 1.5.2 gave on 22 November 2026 (`benchmarks/alpaca_eval_figures.py`),
# in percent: its own figure, the inverse penalty that it chose, and its figure without a penalty.
ALPACA_EVAL: dict[str, dict[str, tuple[float, float, float]]] = {
    "Llama-2-70b-chat": {"minimal": (29.555, 0.35938, 26.704), "difficulty": (27.134, 2.78256, 26.778)},
    "Starling-LM-7B-alpha": {"minimal": (34.677, 21.54435, 34.634), "difficulty": (34.652, 21.54435, 34.608)},
    "claude-1": {"minimal": (49.061, 0.35938, 48.844), "difficulty": (46.887, 0.35938, 48.746)},
    "claude-2.1": {"minimal": (57.575, 10000.0, 57.575), "difficulty": (57.326, 10000.0, 57.326)},
    "claude-instant-1": {"minimal": (47.047, 2.78256, 47.046), "difficulty": (46.973, 2.78256, 47.012)},
    "gpt-3.5-turbo-1106": {"minimal": (49.415, 2.78256, 49.368), "difficulty": (48.901, 10000.0, 48.901)},
    "gpt-4-0314": {"minimal": (69.501, 0.35938, 70.515), "difficulty": (70.375, 2.78256, 70.483)},
    "gpt-4-1106-preview": {"minimal": (75.143, 166.81005, 75.143), "difficulty": (75.12, 166.81005, 75.12)},
    "llama-13b": {"minimal": (6.871, 2.78256, 6.844), "difficulty": (6.508, 21.54435, 6.575)},
    "mistralai/Mistral-7B-Instruct-v0.1": {
        "minimal": (14.975, 21.54435, 14.959),
        "difficulty": (17.033, 0.04642, 14.767),
    },
    "mistralai/Mixtral-8x7B-Instruct-v0.1": {
        "minimal": (47.518, 2.78256, 47.338),
        "difficulty": (47.324, 10000.0, 47.324),
    },
    "openchat_3.5": {"minimal": (31.769, 10000.0, 31.769), "difficulty": (31.892, 2.78256, 31.8)},
    "palm-2-chat-bison-001": {"minimal": (17.078, 0.35938, 16.936), "difficulty": (15.09, 0.04642, 15.65)},
    "vicuna-33b-v1.3": {"minimal": (31.531, 0.35938, 30.276), "difficulty": (30.275, 1291.54967, 30.275)},
    "tldr_judged": {"minimal": (51.771, 2.78256, 51.777), "difficulty": (51.745, 10000.0, 51.745)},
}


@pytest.fixture(scope="module")
def compared(shared: Path) -> dict[str, Comparisons]:
    if not (shared / "data/arena_bench").is_dir():
        pytest.skip(f"no arena_bench in {shared / 'data'}")
    return arena(shared / "data") | {"tldr_judged": summaries(shared / "data")}


@pytest.mark.parametrize("name", ALPACA_EVAL)
@pytest.mark.parametrize("formula", ["minimal", "difficulty"])
def test_alpaca_eval_gives_the_same(compared: dict[str, Comparisons], name: str, formula: str):
    """Where its cross-validation chose a strong penalty, in 8 of these 30 fits, it shrinks the length term or the rate
    itself, by up to 3 points of 240 prompts; the model is the same, as its figure without a penalty shows."""
    seen, (published, inverse_penalty, unpenalised) = compared[name], ALPACA_EVAL[name][formula]
    difficulty = seen.difficulty if formula == "difficulty" else None
    rate = 100 * length_controlled_win_rate(seen.scores, seen.prompts, seen.length_difference, difficulty).estimate
    assert rate == pytest.approx(unpenalised, abs=0.2)
    if inverse_penalty > 1:
        assert rate == pytest.approx(published, abs=0.3)


@pytest.mark.parametrize("name", ALPACA_EVAL)
@pytest.mark.parametrize("formula", ["minimal", "difficulty"])
def test_its_own_fit_gives_its_own_figures(compared: dict[str, Comparisons], name: str, formula: str):
    """All 30 published figures, its cross-validated penalty included, to a hundredth of a point."""
    seen, (published, _, _) = compared[name], ALPACA_EVAL[name][formula]
    difficulty = seen.difficulty if formula == "difficulty" else None
    assert 100 * alpaca_eval_win_rate(seen.scores, seen.length_difference, difficulty) == pytest.approx(
        published, abs=0.01
    )


def test_its_fit_needs_wins_losses_and_lengths():
    lengths = np.arange(30.0)
    for scores, longer in ((np.ones(30), lengths), (np.zeros(30), lengths), (np.tile([0, 1], 15), np.ones(30))):
        with pytest.raises(InputError, match="at least 5 wins and 5 losses"):
            alpaca_eval_win_rate(scores, longer)


def judged(
    generator: np.random.Generator, theta: float, num_prompts: int, num_responses: int = 1, psi: float = 0.0
) -> tuple[Floats, NDArray[np.intp], Floats, Floats]:
    """Scores, prompts, length differences and difficulties where length is worth up to 1.5 logits."""
    hard = generator.normal(size=num_prompts)
    longer = generator.normal(150, 300, size=num_prompts * num_responses)
    chances = expit(theta + 1.5 * np.tanh(longer / 300) + psi * np.repeat(hard, num_responses))
    scores = (generator.random(len(chances)) < chances).astype(np.float64)
    return scores, np.repeat(np.arange(num_prompts), num_responses), longer, np.repeat(hard, num_responses)


def test_what_length_adds_is_taken_away():
    scores, prompts, longer, _ = judged(np.random.default_rng(0), -0.5, 20_000)
    assert win_rate(scores, prompts).estimate > 0.47
    assert length_controlled_win_rate(scores, prompts, longer).estimate == pytest.approx(expit(-0.5), abs=0.01)


def test_without_an_effect_of_length_it_is_the_win_rate():
    scores, prompts = simulated(np.random.default_rng(0), np.full(200, 0.3), 2, 0.3)
    plain, same = win_rate(scores, prompts), length_controlled_win_rate(scores, prompts, np.zeros(400))
    assert same.estimate == pytest.approx(plain.estimate, rel=1e-9)
    assert same[1:] == pytest.approx(plain[1:], abs=2e-3)
    balanced = np.tile([100.0, -100.0], 200)  # each prompt has both, and the scores do not know
    paired = np.repeat(scores[::2], 2)
    controlled = length_controlled_win_rate(paired, prompts, balanced)
    assert controlled.estimate == pytest.approx(win_rate(paired, prompts).estimate, abs=1e-3)


def test_units_copies_and_sides_do_not_matter():
    scores, prompts, longer, hard = judged(np.random.default_rng(1), 0.3, 150, 2, psi=0.7)
    found = length_controlled_win_rate(scores, prompts, longer, hard)
    assert length_controlled_win_rate(scores, prompts, longer / 4, 3 * hard + 5) == pytest.approx(found, rel=1e-6)
    other = length_controlled_win_rate(1 - scores, prompts, -longer, hard)
    assert other == pytest.approx((1 - found.estimate, 1 - found.high, 1 - found.low), rel=1e-6)


def test_difficulty_that_goes_with_length_is_told_apart():
    generator = np.random.default_rng(2)
    hard = generator.normal(size=20_000)
    longer = 200 * hard + generator.normal(0, 200, size=20_000)
    scores = (generator.random(20_000) < expit(0.4 - hard)).astype(np.float64)
    truth = float(expit(0.4 - np.random.default_rng(3).normal(size=400_000)).mean())
    told = length_controlled_win_rate(scores, np.arange(20_000), longer, hard)
    assert told.estimate == pytest.approx(truth, abs=0.01)
    assert told.low <= truth <= told.high


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_model_that_never_lost_has_its_win_rate(score: float):
    longer = np.random.default_rng(0).normal(size=30)
    assert length_controlled_win_rate([score] * 30, range(30), longer) == win_rate([score] * 30, range(30))


def test_length_that_decides_everything_leaves_the_rate_open():
    longer = np.arange(-10.0, 10.0) + 0.5
    found = length_controlled_win_rate((longer > 0).astype(float), range(20), longer)
    assert found.estimate == pytest.approx(0.5)
    assert 0.0 < found.low < 0.25
    assert 0.75 < found.high < 1.0


@pytest.mark.parametrize("num_prompts", [20, 100, 500])
@pytest.mark.parametrize(("theta", "num_responses", "psi"), [(-2.9, 1, 0.0), (0.0, 1, 0.8), (1.5, 3, 0.8)])
def test_the_interval_of_a_length_controlled_win_rate_covers(
    num_prompts: int, theta: float, num_responses: int, psi: float
):
    truth = float(expit(theta + psi * np.random.default_rng(7).normal(size=400_000)).mean())
    generator = np.random.default_rng(num_prompts)
    covered = 0
    for _ in range(400):
        scores, prompts, longer, hard = judged(generator, theta, num_prompts, num_responses, psi)
        found = length_controlled_win_rate(scores, prompts, longer, hard if psi else None)
        covered += found.low <= truth <= found.high
    assert 0.93 <= covered / 400 <= (0.995 if num_prompts == 20 else 0.98)


@pytest.mark.parametrize(
    ("longer", "hard", "message"),
    [
        ([1.0, 2.0], None, r"length difference: \[2\] values for 3 comparisons"),
        ([1.0, math.inf, 2.0], None, "length difference of row 2 is not a finite number"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, math.nan], "difficulty of row 3 is not a finite number"),
        ([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], "3 terms need more prompts than that, got 3"),
        ([0.0, 0.0, 0.0], [2.0, 2.0, 2.0], "difficulty does not vary apart from length"),
    ],
)
def test_wrong_lengths_are_refused(longer: list[float], hard: list[float] | None, message: str):
    with pytest.raises(InputError, match=message):
        length_controlled_win_rate([1, 0, 1], ["a", "b", "c"], longer, hard)


# Ratings


@pytest.mark.parametrize(("won", "lost"), [(7, 3), (0, 0), (20, 0), (1e6, 1)])
def test_two_models_have_the_logit_of_their_share(won: float, lost: float):
    # The tied game makes the share (w + 1/2) / (n + 1); the difference of ratings has variance 1 / (n' p q).
    first, second = bradley_terry([[0, won], [lost, 0]])
    games, share = won + lost + 1, (won + 0.5) / (won + lost + 1)
    assert first.estimate - second.estimate == pytest.approx(logit(share), rel=1e-7, abs=1e-12)
    assert first.estimate + second.estimate == pytest.approx(0, abs=1e-12)
    half = 1.959963984540054 / math.sqrt(games * share * (1 - share)) / 2
    assert first.high - first.estimate == pytest.approx(half, rel=1e-6)
    assert first.estimate - first.low == pytest.approx(half, rel=1e-6)


RATINGS = np.array([1.2, 0.4, -0.1, -0.5, -1.0])
CHANCES = expit(RATINGS[:, None] - RATINGS)


def tournament(generator: np.random.Generator, num_games: int) -> Floats:
    wins = np.triu(generator.binomial(num_games, CHANCES), 1).astype(np.float64)
    return wins + np.triu(num_games - wins, 1).T


def test_expected_wins_give_the_true_ratings():
    found = bradley_terry(1e7 * CHANCES)
    np.testing.assert_allclose([rating.estimate for rating in found], RATINGS, atol=1e-5)


def test_the_score_equations_hold():
    """At the maximum each model has won what its ratings foretell: Bradley & Terry 1952."""
    wins = tournament(np.random.default_rng(0), 30)
    ratings = np.array([rating.estimate for rating in bradley_terry(wins)])
    with_tie = wins + 0.5 / 4 * (1 - np.eye(5))
    expected = (with_tie + with_tie.T) * expit(ratings[:, None] - ratings)
    np.testing.assert_allclose(with_tie.sum(axis=1), expected.sum(axis=1), rtol=1e-8)
    assert ratings.sum() == pytest.approx(0, abs=1e-9)


def test_order_of_models_and_the_diagonal_do_not_matter():
    wins, order = tournament(np.random.default_rng(1), 20), [3, 0, 4, 1, 2]
    found, shuffled = bradley_terry(wins), bradley_terry(wins[np.ix_(order, order)] + 99 * np.eye(5))
    np.testing.assert_allclose([found[i] for i in order], shuffled, rtol=1e-7)


def test_a_tie_is_half_a_win_for_both():
    assert bradley_terry([[0, 3.5], [1.5, 0]]) == bradley_terry(
        np.array([[0, 3], [1, 0]]) + np.array([[0, 0.5], [0.5, 0]])
    )


def test_models_that_never_met_have_finite_ratings_with_wide_intervals():
    wins = np.zeros((5, 5))
    wins[0, 1], wins[2, 3] = 50, 50  # two undefeated, two that never won, one that never played
    found = bradley_terry(wins)
    assert np.isfinite(found).all()
    assert found[4].estimate == pytest.approx(0, abs=1e-9)
    assert found[4].high - found[4].low > 4
    assert found[0].estimate == pytest.approx(found[2].estimate)
    assert found[0].estimate > 1 > -1 > found[1].estimate


def test_the_intervals_of_ratings_cover():
    generator = np.random.default_rng(0)
    covered = np.zeros(5)
    for _ in range(600):
        found = np.array(bradley_terry(tournament(generator, 25)))
        covered += (found[:, 1] <= RATINGS) & (found[:, 2] >= RATINGS)
    assert (covered / 600 >= 0.93).all()
    assert (covered / 600 <= 0.975).all()


@pytest.mark.parametrize(
    ("wins", "message"),
    [
        ([[0.0]], "square table of at least two models"),
        ([[0, 1, 2], [1, 0, 2]], r"square table of at least two models, got shape \[2, 3\]"),
        ([[0, -1], [1, 0]], "counts of at least 0"),
        ([[0, math.nan], [1, 0]], "counts of at least 0"),
    ],
)
def test_wrong_tables_are_refused(wins: list[list[float]], message: str):
    with pytest.raises(InputError, match=message):
        bradley_terry(wins)


# The bootstrap


def mean(rows: Floats) -> float:
    return float(rows.mean())


def test_the_bootstrap_of_a_mean_is_as_wide_as_students():
    values = np.random.default_rng(0).normal(3, 2, size=40)
    found = bootstrap(values, mean, num_draws=4000)
    half = -stdtrit(39, 0.025) * values.std(ddof=1) / math.sqrt(40)
    assert found.estimate == pytest.approx(values.mean())
    assert found[1:] == pytest.approx((values.mean() - half, values.mean() + half), abs=0.06)


def test_a_seed_makes_it_the_same_again():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values, mean, seed=3) == bootstrap(values, mean, seed=3)
    assert bootstrap(values, mean, seed=3) != bootstrap(values, mean, seed=4)


def test_what_belongs_to_a_prompt_is_drawn_together():
    rows = np.random.default_rng(0).normal(size=30)
    found = bootstrap(np.stack([rows, 2 * rows], axis=1), lambda drawn: float((drawn[:, 1] - 2 * drawn[:, 0]).sum()))
    assert found == pytest.approx((0, 0, 0), abs=1e-12)


def test_the_bootstrap_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match="at least 2 prompts"):
        bootstrap([1.0], mean)
    with pytest.raises(InputError, match="finite values"):
        bootstrap([1.0, math.nan], mean)
    with pytest.raises(InputError, match="at least 100 draws, got 10"):
        bootstrap([1.0, 2.0], mean, num_draws=10)
