"""Win rates of a model and ratings of several, from comparisons that a judge has decided. Pure: numpy and scipy.

N is the number of comparisons, K of prompts, M of models. A comparison has a score: 1 the model under test won, 0.5 a
tie, 0 it lost. Several comparisons of one prompt agree more than those of two, so the prompt is what is counted and
resampled. Intervals are 95 %.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit, stdtrit

from dpo_ray.comparisons import Interval, bootstrap_bounds
from dpo_ray.errors import InputError
from dpo_ray.evaluate.alpaca_eval import FOLDS, alpaca_eval_win_rate
from dpo_ray.metrics import wilson_interval

Floats = NDArray[np.float64]

_TAIL = 0.025
_Z = 1.959963984540054
_MAX_STEP = 5.0
"""Of a coefficient in one Newton step, logits: from a poor start a full step may overshoot."""


class _Comparisons(NamedTuple):
    """Scores with the number of each one's prompt."""

    scores: Floats  # [N], in [0, 1]
    prompt: NDArray[np.intp]  # [N], in [0, K)
    weights: Floats  # [N], 1 over the comparisons of the prompt: they add up to K

    @property
    def num_prompts(self) -> int:
        return int(self.prompt.max()) + 1

    def per_prompt(self, values: Floats) -> Floats:
        """Weighted sums of values [N, ...] over the comparisons of each prompt, [K, ...]."""
        sums = np.zeros((self.num_prompts, *values.shape[1:]))
        np.add.at(sums, self.prompt, (values.T * self.weights).T)
        return sums


def win_rate(scores: ArrayLike, prompts: Sequence[str] | NDArray[np.str_]) -> Interval:
    """Mean over prompts of the prompt's mean score, with Wilson's interval at the effective number of prompts.

    With p the mean and v the variance of the prompts' means, p (1 - p) / v prompts with one decided comparison each
    would tell as much as all K; that number and Student's quantile go into Wilson's formula (Franco et al. 2019,
    "Comparative study of confidence intervals for proportions in complex sample surveys"). One prompt with a plain win
    or loss is added to v, so that prompts that agree by chance do not make the interval vanish.

    In simulation (20 to 500 prompts, 1 to 8 comparisons each, rates of 0.05 to 0.95, with ties and without) it covers
    93 to 99 %, and more where nearly all of 20 prompts are ties. The percentile bootstrap over 20 prompts covers 66 to
    97 %: near 0 or 1 it sees too few of the rarer outcome.

    Args:
        scores: [N], in [0, 1].
        prompts: [N], id of each comparison's prompt.

    Raises:
        InputError: No comparison, other lengths, or a score outside [0, 1]; names the row.
    """
    seen = _compared(scores, prompts)
    means, num_prompts = seen.per_prompt(seen.scores), seen.num_prompts
    rate = float(means.mean())
    one_more = rate * (1 - rate)
    # All won, or all lost: nothing is known of the spread, and each prompt counts as one comparison.
    effective = num_prompts**2 * one_more / (((means - rate) ** 2).sum() + one_more) if one_more else num_prompts
    return Interval(rate, *wilson_interval(rate, effective, -float(stdtrit(num_prompts, _TAIL))))


def length_controlled_win_rate(
    scores: ArrayLike,
    prompts: Sequence[str] | NDArray[np.str_],
    length_difference: ArrayLike,
    difficulty: ArrayLike | None = None,
) -> Interval:
    """Win rate that the model would have if its responses were as long as the baseline's: AlpacaEval 2's question.

    Dubois et al. 2024 (arXiv:2404.04475), for one model against one baseline:

        P(win) = sigmoid(theta + phi tanh(d / std d) + psi gamma)

    with d the difference of lengths and gamma the difficulty of the prompt. The length-controlled rate is the mean of
    sigmoid(theta + psi gamma) over prompts. Without `difficulty` the last term is absent and the rate sigmoid(theta):
    length then answers for what difficulty does, if the model is longer on just those prompts that it finds hard.

    AlpacaEval takes gamma from a fit over all models of its board, phi partly from a baseline told to be brief or
    verbose, and shrinks by an L1 penalty that cross-validation chooses. Here the slopes have Jeffreys' prior (Firth
    1993, "Bias reduction of maximum likelihood estimates"), so that they are finite where length decides everything,
    and the intercept makes the mean prediction the win rate (Puhr et al. 2017, arXiv:2101.07620). For 15 models over
    217 to 739 prompts, the rate is within 0.2 points of what alpaca_eval 0.6.6 gives without its penalty, and within
    0.3 of its own figures where the penalty is weak; a strong one moves them by up to 3 points.

    The interval is Student's on the logit of the rate: the variance of the fit, times the dispersion of the prompts'
    residuals (ties, several comparisons of a prompt), plus that of the predictions between prompts. AlpacaEval's
    standard error is the last part alone, and 0 without difficulty. In simulation it covers 94 to 99 %.

    Args:
        scores: [N], in [0, 1].
        prompts: [N].
        length_difference: [N], length of the model's response less that of the baseline's, in any unit.
        difficulty: [N], of each comparison's prompt, in any unit.

    Raises:
        InputError: As `win_rate`; a value that is not finite; no more prompts than terms; or lengths and difficulties
            that do not vary apart.
    """
    seen = _compared(scores, prompts)
    lengths = _column("length difference", length_difference, len(seen.scores))
    terms = [np.ones(len(lengths))]
    if difficulty is not None:
        terms.append(_column("difficulty", difficulty, len(lengths)))
    spread = float(lengths.std(ddof=1)) if len(lengths) > 1 else 0.0
    if spread > 0:  # otherwise there is nothing to control for
        terms.append(np.tanh(lengths / spread))
    design = np.stack(terms, axis=1)
    if seen.num_prompts <= len(terms):
        raise InputError(f"{len(terms)} terms need more prompts than that, got {seen.num_prompts}")
    if np.linalg.matrix_rank(design) < len(terms):
        raise InputError("difficulty does not vary apart from length: leave it out")
    if seen.scores.min() == seen.scores.max():  # the likelihood has no maximum, or nothing to explain
        return win_rate(scores, prompts)
    at_zero = design.copy()
    if spread > 0:
        at_zero[:, -1] = 0.0
    return _predicted_rate(seen, design, at_zero)


def _predicted_rate(seen: _Comparisons, design: Floats, at_zero: Floats) -> Interval:
    """Mean over prompts of the fitted probability at the rows `at_zero` [N, P] in place of `design` [N, P]."""
    coefficients = _fit_logistic(design, seen.scores, seen.weights, jeffreys=True).coefficients
    coefficients[0] += _intercept_shift(design @ coefficients, seen)
    fitted, predicted = expit(design @ coefficients), expit(at_zero @ coefficients)
    num_prompts, freedom = seen.num_prompts, seen.num_prompts - design.shape[1] + 1
    rate = float((seen.weights * predicted).sum() / num_prompts)
    gradient = (seen.weights * predicted * (1 - predicted)) @ at_zero / num_prompts
    of_fit = float(gradient @ np.linalg.solve(_information(design, coefficients, seen.weights), gradient))
    of_prompts = float((seen.per_prompt(predicted - rate) ** 2).sum()) / num_prompts**2
    error = math.sqrt(_dispersion(seen, fitted, freedom) * of_fit + of_prompts)
    centre, half = float(logit(rate)), -float(stdtrit(freedom, _TAIL)) * error / (rate * (1 - rate))
    return Interval(rate, float(expit(centre - half)), float(expit(centre + half)))


def _dispersion(seen: _Comparisons, fitted: Floats, freedom: int) -> float:
    """Variance of the prompts' mean residuals over that of decided comparisons, one a prompt; about 1 for those.

    Ties and several comparisons of a prompt make it smaller. As in `win_rate`, one plain win or loss is added.
    """
    residuals = seen.per_prompt(seen.scores - fitted)
    expected = float((seen.weights * fitted * (1 - fitted)).sum()) / seen.num_prompts
    return (float((residuals**2).sum()) + expected) / (expected * freedom)


def _intercept_shift(logits: Floats, seen: _Comparisons) -> float:
    """What to add to all logits [N] so that the mean prediction is the observed rate, which is neither 0 nor 1."""
    wins = float((seen.weights * seen.scores).sum())
    far = 50 + float(np.abs(logits).max())
    return float(brentq(lambda shift: (seen.weights * expit(logits + shift)).sum() - wins, -far, far))


MIN_PROMPTS = 10
"""Fewer tell nothing of length apart from worth."""


def outcome(scores: Sequence[float], prompts: Sequence[str], longer: Sequence[int] | None) -> dict[str, Any]:
    """Win rate, plain and length-controlled, and the counts behind it, as an entry of `evaluation.json`.

    Args:
        longer: [N], length of the model's response less that of the other; None: not known.
    """
    value, low, high = win_rate(scores, prompts)
    num_prompts = len(set(prompts))
    controlled = alpaca_eval = None
    if longer is not None and num_prompts >= MIN_PROMPTS:
        controlled = length_controlled_win_rate(scores, prompts, longer)
        if min(sum(scores), len(scores) - sum(scores)) >= FOLDS and len(set(longer)) > 1:
            alpaca_eval = alpaca_eval_win_rate(scores, longer)
    return {
        "num_prompts": num_prompts,
        "wins": sum(score > 0.5 for score in scores),
        "ties": sum(score == 0.5 for score in scores),
        "losses": sum(score < 0.5 for score in scores),
        "value": value,
        "low": low,
        "high": high,
        "length_controlled": controlled and dict(zip(("value", "low", "high"), controlled, strict=True)),
        "length_controlled_alpaca_eval": alpaca_eval,
    }


def bradley_terry(wins: ArrayLike) -> list[Interval]:
    """Ratings of M models in nats, centred to mean 0: P(i beats j) = sigmoid(rating_i - rating_j).

    Bradley & Terry 1952, by maximum likelihood; 400 / ln 10 times a rating is in Elo points. Each model has one tied
    game besides, spread evenly over its opponents: a model without a defeat, or one that met no other, has a finite
    rating with a wide interval. Intervals are from the Fisher information and take every comparison to be
    independent; ties make them too wide, several comparisons of one prompt too narrow.

    Args:
        wins: [M, M], how often the model of the row beat that of the column; a tie is half a win for both. The diagonal
            is not read.

    Raises:
        InputError: Not a square of at least two models, or a count that is negative or not finite.
    """
    table = np.array(wins, dtype=np.float64)
    if table.ndim != 2 or table.shape[0] != table.shape[1] or len(table) < 2:
        raise InputError(f"wins are a square table of at least two models, got shape {list(table.shape)}")
    if not (np.isfinite(table).all() and (table >= 0).all()):
        raise InputError("wins are counts of at least 0")
    num_models = len(table)
    table += 0.5 / (num_models - 1)
    first, second = np.triu_indices(num_models, k=1)
    games = table[first, second] + table[second, first]
    centred = np.vstack([np.eye(num_models - 1), -np.ones(num_models - 1)])  # the last rating is minus the others' sum
    fit = _fit_logistic(centred[first] - centred[second], table[first, second] / games, games, jeffreys=False)
    ratings = centred @ fit.coefficients
    errors = np.sqrt(np.einsum("mp,pm->m", centred, np.linalg.solve(fit.information, centred.T)))
    return [Interval(float(r), float(r - _Z * e), float(r + _Z * e)) for r, e in zip(ratings, errors, strict=True)]


def bootstrap(
    values: ArrayLike, statistic: Callable[[Floats], float], *, seed: int = 0, num_draws: int = 2000
) -> Interval:
    """Bootstrap interval of any statistic of prompts, which are drawn with replacement; the same for the same seed.

    The percentile interval, widened for few prompts as in `comparisons.bootstrap_bounds`. It covers too seldom where a
    share is near 0 or 1: for win rates there is `win_rate`.

    Args:
        values: [K, ...], what the statistic needs of each prompt.
        statistic: From [K, ...] to a number.

    Raises:
        InputError: Fewer than two prompts, a value that is not finite, or fewer than 100 draws.
    """
    rows = np.asarray(values, dtype=np.float64)
    if not rows.ndim or len(rows) < 2 or not np.isfinite(rows).all():
        raise InputError("a bootstrap over prompts needs finite values of at least 2 prompts")
    if num_draws < 100:
        raise InputError(f"a bootstrap needs at least 100 draws, got {num_draws}")
    generator = np.random.default_rng(seed)
    drawn = (statistic(rows[generator.integers(len(rows), size=len(rows))]) for _ in range(num_draws))
    estimate, replicates = float(statistic(rows)), np.fromiter(drawn, dtype=np.float64, count=num_draws)
    low, high = bootstrap_bounds(estimate, replicates, len(rows), 0.95)
    return Interval(estimate, float(low), float(high))


class _LogisticFit(NamedTuple):
    coefficients: Floats  # [P], logits
    information: Floats  # [P, P], Fisher's, at the coefficients


def _fit_logistic(design: Floats, shares: Floats, weights: Floats, *, jeffreys: bool) -> _LogisticFit:
    """Logistic regression by Newton's method.

    Args:
        design: [N, P].
        shares: [N], observed probabilities.
        weights: [N], how often each was observed.
        jeffreys: Add log det(information) / 2 to the likelihood (Firth 1993, section 3.3), which keeps it finite where
            the data are separable.
    """
    coefficients = np.zeros(design.shape[1])
    for _ in range(100):
        p = expit(design @ coefficients)
        information = _information(design, coefficients, weights)
        pull = weights * (shares - p)
        if jeffreys:
            leverages = weights * p * (1 - p) * np.einsum("np,pn->n", design, np.linalg.solve(information, design.T))
            pull = pull + leverages * (0.5 - p)
        step = np.linalg.solve(information, design.T @ pull)
        largest = float(np.abs(step).max())
        coefficients = coefficients + step * min(1.0, _MAX_STEP / largest if largest > 0 else 1.0)
        if largest < 1e-9:
            break
    return _LogisticFit(coefficients, information)


def _information(design: Floats, coefficients: Floats, weights: Floats) -> Floats:
    p = expit(design @ coefficients)
    return np.asarray((design.T * (weights * p * (1 - p))) @ design)


def _compared(scores: ArrayLike, prompts: Sequence[str] | NDArray[np.str_]) -> _Comparisons:
    """Scores by prompt.

    Raises:
        InputError: See `win_rate`.
    """
    seen, ids = np.asarray(scores, dtype=np.float64), np.asarray(prompts)
    if seen.ndim != 1 or seen.shape != ids.shape or not len(seen):
        raise InputError(f"a win rate needs one prompt for each score, got {list(seen.shape)} and {list(ids.shape)}")
    wrong = ~((seen >= 0) & (seen <= 1))
    if wrong.any():
        row = int(wrong.argmax())
        raise InputError(f"score {seen[row]:g} of row {row + 1} is not between 0 and 1")
    _, prompt, counts = np.unique(ids, return_inverse=True, return_counts=True)
    return _Comparisons(seen, prompt, 1 / counts[prompt])


def _column(name: str, values: ArrayLike, length: int) -> Floats:
    column = np.asarray(values, dtype=np.float64)
    if column.shape != (length,):
        raise InputError(f"{name}: {list(column.shape)} values for {length} comparisons")
    if not np.isfinite(column).all():
        raise InputError(f"{name} of row {int(np.isfinite(column).argmin()) + 1} is not a finite number")
    return column
