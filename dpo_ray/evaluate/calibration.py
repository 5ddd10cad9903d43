"""Does a policy know what it prefers? Calibration of implicit rewards, and their accuracy apart from length. Pure.

The margin of a pair, beta times the difference of the log-ratios of chosen and rejected response in nats, says that the
chosen one is better with probability sigmoid(margin) (Rafailov et al. 2023, arXiv:2305.18290, eq. 6). N is the number
of pairs; intervals are 95 % and take pairs to be independent.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import expit, log_expit

from dpo_ray.comparisons import Interval, mean_interval
from dpo_ray.errors import InputError
from dpo_ray.evaluate.win_rates import length_controlled_win_rate
from dpo_ray.metrics import wilson_interval

Floats = NDArray[np.float64]

TEMPERATURES = (0.01, 100.0)
"""Where the calibrating temperature is looked for; an end means that none calibrates."""

_Z = 1.959963984540054
_PAIRS_PER_BIN = 20
"""Fewer tell nothing of a bin's accuracy: then there are fewer bins."""


class Bin(NamedTuple):
    """Pairs of about the same confidence."""

    confidence: float
    """Mean of max(p, 1 - p), in [0.5, 1]."""
    accuracy: Interval
    """Share whose margin has the right sign, a margin of 0 counting half; Wilson's interval."""
    num_pairs: int


class Calibration(NamedTuple):
    """How far confidence and accuracy lie apart."""

    bins: list[Bin]
    """Of equal counts, the least confident first."""
    error: Interval
    """Root mean square over pairs of confidence less accuracy, a share, with the noise of the bins subtracted."""
    ece: float
    """Expected calibration error as it is usually given: the mean absolute difference, not corrected."""
    ece_if_calibrated: float
    """What `ece` would be on average if every confidence were right: the noise of that many pairs in so many bins."""
    brier: Interval
    """Mean of (1 - sigmoid(margin))^2: 0 is perfect, 0.25 is what a coin has."""
    temperature: float
    """Division of all margins by it makes the likelihood largest: above 1 the policy is overconfident (Guo et al. 2017,
    arXiv:1706.04599)."""


def calibration(margins: ArrayLike, *, num_bins: int = 15) -> Calibration:
    """Reliability of sigmoid(margin) as a probability.

    Bins hold equal counts, so that each accuracy is known as well as the others; bins of equal width leave few pairs at
    the confident end, or at the other one early in training.

    The difference d of mean confidence and accuracy in a bin has noise, so that the mean of |d| or d^2 is above zero
    even for a calibrated policy. For squares the excess is the variance of d, which is estimated and subtracted, as
    Kumar et al. 2019 (arXiv:1909.10155) do. The interval is a score interval on the mean square u, whose
    estimate has variance 4 u S + 2 Q: with weights w and standard errors s of the bins, Q is the sum of w^2 s^4 and S a
    mean of w s^2, either plain or by each bin's part in u, whichever is larger. It ends at 0 where there may be no
    error. In simulation (300 to 4000 pairs, margins scaled by 0.5 to 2.5) it covers 93 to 97 %. Errors that cancel
    within a bin are not seen.

    Args:
        margins: [N], nats, of pairs that the policy has not seen in training.
        num_bins: At most so many; fewer where a bin would have under 20 pairs.

    Raises:
        InputError: Fewer than 20 pairs, a margin that is not finite, or no bin.
    """
    seen = np.asarray(margins, dtype=np.float64)
    if seen.ndim != 1 or len(seen) < _PAIRS_PER_BIN:
        raise InputError(f"calibration needs the margins of at least {_PAIRS_PER_BIN} pairs, got {list(seen.shape)}")
    if not np.isfinite(seen).all():
        raise InputError(f"margin of row {int(np.isfinite(seen).argmin()) + 1} is not a finite number")
    if num_bins < 1:
        raise InputError(f"calibration needs at least 1 bin, got {num_bins}")
    confidence, correct = expit(np.abs(seen)), _correct(seen)
    order = np.argsort(confidence, kind="stable")
    rows = np.array_split(order, min(num_bins, len(seen) // _PAIRS_PER_BIN))
    gaps = [confidence[bin_] - correct[bin_] for bin_ in rows]
    noise = [float((confidence[bin_] * (1 - confidence[bin_])).mean()) / len(bin_) for bin_ in rows]
    weights = np.array([len(bin_) for bin_ in rows]) / len(seen)
    return Calibration(
        bins=[_bin(confidence[bin_], correct[bin_]) for bin_ in rows],
        error=_root_mean_square(gaps, weights),
        ece=float(weights @ [abs(gap.mean()) for gap in gaps]),
        ece_if_calibrated=float(weights @ np.sqrt(2 / math.pi * np.array(noise))),
        brier=mean_interval(expit(-seen) ** 2),
        temperature=calibrating_temperature(seen),
    )


def calibrating_temperature(margins: ArrayLike) -> float:
    """The T in `TEMPERATURES` for which sigmoid(margin / T) is the most likely; 1 where all margins are 0.

    Margins that are all right have the lowest one, margins that are right no more often than wrong the highest.
    """
    seen = np.asarray(margins, dtype=np.float64)
    if not seen.any():
        return 1.0
    low, high = (math.log(end) for end in TEMPERATURES)
    found = minimize_scalar(
        lambda log_t: -log_expit(seen * math.exp(-log_t)).mean(),
        bounds=(low, high),
        method="bounded",
        options={"xatol": 1e-7},
    )
    return math.exp(found.x)


def length_controlled_accuracy(
    margins: ArrayLike, length_difference: ArrayLike, prompts: Sequence[str] | NDArray[np.str_] | None = None
) -> Interval:
    """Accuracy that the margins would have if both responses of a pair were equally long.

    Chosen responses are mostly the longer ones, so a reward that knows nothing but length is right more often than not.
    The chance of a right sign is fitted as sigmoid(theta + phi tanh(d / std d)), d the length of the chosen less that
    of the rejected response: where the reward goes by length, it is right where d is large and wrong where it is
    negative, and phi takes that up. At d = 0 length says nothing; sigmoid(theta) is what the reward knows besides, 0.5
    for one that knows nothing. Fit and interval are those of `win_rates.length_controlled_win_rate`.

    Args:
        margins: [N], nats; a margin of 0 counts half.
        length_difference: [N], in any unit.
        prompts: [N], where several pairs share a prompt.

    Raises:
        InputError: As there, or a margin that is not a number.
    """
    seen = np.asarray(margins, dtype=np.float64)
    if np.isnan(seen).any():
        raise InputError(f"margin of row {int(np.isnan(seen).argmax()) + 1} is not a number")
    own = np.arange(len(seen)).astype(np.str_) if prompts is None else prompts
    return length_controlled_win_rate(_correct(seen), own, length_difference)


def _correct(margins: Floats) -> Floats:
    return np.asarray((np.sign(margins) + 1) / 2)


def _bin(confidence: Floats, correct: Floats) -> Bin:
    accuracy = float(correct.mean())
    return Bin(float(confidence.mean()), Interval(accuracy, *wilson_interval(accuracy, len(correct))), len(correct))


def _root_mean_square(gaps: Sequence[Floats], weights: Floats) -> Interval:
    """Root of the weighted mean of squared means of `gaps`, each freed from its noise; 0 where the noise is larger.

    The bounds u of the mean square solve (estimate - u)^2 = z^2 (4 u S + 2 Q).
    """
    variances = np.array([gap.var(ddof=1) / len(gap) for gap in gaps])
    squares = np.array([gap.mean() ** 2 for gap in gaps])
    estimate = max(0.0, float(weights @ (squares - variances)))
    total = float(weights @ squares)
    shares = weights * squares / total if total else weights  # of the mean square, with its noise
    linear = _Z**2 * max(float(weights**2 @ variances), float(shares * weights @ variances))
    constant = _Z**2 * float(weights**2 @ variances**2)
    centre = estimate + 2 * linear
    half = math.sqrt(4 * linear * estimate + 4 * linear**2 + 2 * constant)
    return Interval(*(math.sqrt(square) for square in (estimate, max(0.0, centre - half), centre + half)))
