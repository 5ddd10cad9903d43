"""Pairs whose label is probably wrong, by the margins of a preference model that was fitted on other prompts.

The model is Bradley and Terry's on hashed words and characters and on lengths: it knows what good answers look like on
the surface, and no more. Where it cannot tell chosen from rejected, neither can it tell a wrong label; its accuracy
says which. Margins of any better model go through `judge` as well. Pure: numpy and scipy.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray
from scipy.optimize import minimize, minimize_scalar
from scipy.sparse import csr_matrix, hstack
from scipy.special import expit, log_expit

from dpo_ray.data.duplicates import TextPair
from dpo_ray.metrics import wilson_interval
from dpo_ray.shingles import normalised

FOLDS = 5
MOST_FITTED = 20_000
"""Pairs that the models are fitted on; margins are computed for all."""

MOST_CHARACTERS = 4000
"""Of a response, from its beginning, that are looked at."""

LEAST_ACCURACY = 0.6
"""Margins must surely agree with more labels than this; below it, a third of all labels would look suspicious."""

RIDGE = 1.0
"""Half the squared weights count so much beside the summed log-likelihood."""

_BUCKETS = 2**18
_CHARACTERS = 4
"""In a row, as one feature; beside words and two words in a row."""

_LENGTH_SCALE = 0.3
"""Of lengths in units of their spread: they are few, and should not hide behind a thousand words."""

_PAIRS_AT_ONCE = 2048
_WORD = re.compile(r"\w+|[^\w\s]")
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)

Floats = NDArray[np.float64]


class Judged(NamedTuple):
    """What margins say of labels. N pairs, in their order."""

    margins: Floats
    """[N], logits of the chosen response being better, by a model that has not seen the pair's prompt."""
    probability: Floats
    """[N], that another label of such a pair would say the opposite, by the calibrated margin."""
    is_suspicious: NDArray[np.bool_]
    """[N], the opposite label is as credible as labels on average are."""
    threshold: float
    """Least such probability."""
    accuracy: float
    """Share of labels that the margins agree with; a margin of 0 counts half."""
    low: float
    high: float


def judge(margins: Floats) -> Judged:
    """Confident learning (Northcutt et al. 2021, arXiv:1911.00068) for pairs.

    A label is suspicious when the model gives the opposite one at least the mean probability that it gives to labels
    that were given. Which response comes first is arbitrary, so the two classes of a comparison have one threshold. The
    margins are calibrated by one factor, of largest likelihood: temperature scaling (Guo et al. 2017). Margins of too
    low an accuracy make no label suspicious.

    Args:
        margins: [N], out of sample; in any unit, such as implicit rewards.
    """
    given = expit(_temper(margins) * margins)
    threshold = float(given.mean())
    accuracy = float((np.sign(margins) + 1).mean() / 2)
    low, high = wilson_interval(accuracy, len(margins))
    is_suspicious = (1 - given >= threshold) & (margins < 0) & (low > LEAST_ACCURACY)
    return Judged(margins, 1 - given, is_suspicious, threshold, accuracy, low, high)


def _temper(margins: Floats) -> float:
    spread = float(np.abs(margins).max(initial=0.0))
    if spread == 0:
        return 0.0
    found = minimize_scalar(
        lambda factor: -log_expit(factor * margins).mean(), bounds=(0, 100 / spread), method="bounded"
    )
    return float(found.x)


def cross_fitted_margins(
    pairs: Sequence[TextPair], groups: Sequence[str], on_progress: Callable[[int, int], None] = lambda done, total: None
) -> Floats:
    """[N], the margin of each pair under a model fitted without its group.

    Args:
        groups: [N], what must not stand on both sides: the prompt, the conversation, the debate; at least two.
    """
    fold = folds_of(groups)
    num_folds = int(fold.max()) + 1
    assert num_folds > 1, "one group has no other to learn from"
    total = num_folds + max(0, len(pairs) - MOST_FITTED)
    sample = np.linspace(0, len(pairs) - 1, min(len(pairs), MOST_FITTED)).astype(np.int64)
    scale = _length_scale(pairs)
    features = _differences([pairs[i] for i in sample], scale)
    used = np.unique(features.indices)  # of half a million columns, most are empty
    features = features[:, used]
    weights = np.zeros((2 * _BUCKETS + len(scale), num_folds))
    for number in range(num_folds):
        weights[used, number] = fit(features[fold[sample] != number])
        on_progress(number + 1, total)
    margins = np.empty(len(pairs))
    margins[sample] = _of_fold(features @ weights[used], fold[sample])
    rest = np.setdiff1d(np.arange(len(pairs)), sample)
    for start in range(0, len(rest), _PAIRS_AT_ONCE):
        places = rest[start : start + _PAIRS_AT_ONCE]
        block = _differences([pairs[i] for i in places], scale)
        margins[places] = _of_fold(block @ weights, fold[places])
        on_progress(num_folds + start, total)
    on_progress(total, total)
    return margins


def _of_fold(margins: Floats, fold: NDArray[np.int64]) -> Floats:
    """[M], of margins [M, folds] those by the model that has not seen the fold."""
    return np.asarray(np.take_along_axis(margins, fold[:, None], axis=1)[:, 0])


def folds_of(groups: Sequence[str], num_folds: int = FOLDS) -> NDArray[np.int64]:
    """[N], a fold for each group, the largest first into the emptiest: by content, whatever the order of the pairs."""
    names, place, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    filled = np.zeros(min(num_folds, len(names)), dtype=np.int64)
    fold = np.empty(len(names), dtype=np.int64)
    for name in sorted(range(len(names)), key=lambda n: (-counts[n], xxhash.xxh64_intdigest(str(names[n]).encode()))):
        fold[name] = filled.argmin()
        filled[fold[name]] += counts[name]
    return np.asarray(fold[place])


def fit(features: Any) -> Floats:
    """Weights [D] of largest penalised likelihood of sigmoid(x w) over rows x [M, D] of chosen less rejected.

    There is no intercept: a pair read the other way round has the opposite margin.
    """
    transposed = features.T.tocsr()

    def cost(weights: Floats) -> tuple[float, Floats]:
        margins = features @ weights
        gradient = RIDGE * weights - transposed @ expit(-margins)
        return float(RIDGE / 2 * weights @ weights - log_expit(margins).sum()), gradient

    start = np.zeros(features.shape[1])
    found = minimize(cost, start, jac=True, method="L-BFGS-B", options={"maxiter": 100, "ftol": 1e-6})
    return np.asarray(found.x)


def _differences(pairs: Sequence[TextPair], scale: Floats) -> Any:
    """Sparse [N, D], features of the chosen response less those of the rejected one."""
    row_of: dict[str, int] = {}
    rows = [[row_of.setdefault(text[:MOST_CHARACTERS], len(row_of)) for text in pair[1:]] for pair in pairs]
    hashed = _hashed_rows(list(row_of))
    chosen, rejected = np.array(rows).T
    lengths = csr_matrix(_length_differences(pairs) * scale)
    return hstack([hashed[chosen] - hashed[rejected], lengths], format="csr")


def _hashed_rows(texts: Sequence[str]) -> Any:
    """Sparse [N, 2 * 2^18], words and characters by their hashes: 1 + log count, each kind of length one."""
    buckets, values, ends = [], [], [0]
    known: dict[str, int] = {}
    for text in texts:
        for kind, hashes in enumerate((_word_hashes(text, known), _character_hashes(text))):
            found, counts = np.unique(_bucket(hashes), return_counts=True)
            weights = 1 + np.log(counts)
            buckets.append(found + kind * _BUCKETS)
            values.append(weights / max(1.0, float(np.linalg.norm(weights))))
        ends.append(ends[-1] + len(buckets[-1]) + len(buckets[-2]))
    return csr_matrix((np.concatenate(values), np.concatenate(buckets), ends), shape=(len(texts), 2 * _BUCKETS))


def _word_hashes(text: str, known: dict[str, int]) -> NDArray[np.uint64]:
    """Of words and marks, and of each two in a row."""
    words = _WORD.findall(text.casefold())
    for word in words:
        if word not in known:
            known[word] = xxhash.xxh64_intdigest(word.encode())
    single = np.array([known[word] for word in words], dtype=np.uint64)
    return np.concatenate([single, single[:-1] * _GOLDEN + single[1:]])


def _character_hashes(text: str) -> NDArray[np.uint64]:
    codes = np.frombuffer(f" {normalised(text)} ".encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    num = max(0, len(codes) - _CHARACTERS + 1)
    rolled = np.zeros(num, dtype=np.uint64)
    for offset in range(_CHARACTERS):
        rolled = rolled * _GOLDEN + codes[offset : offset + num]
    return rolled


def _bucket(hashes: NDArray[np.uint64]) -> NDArray[np.int64]:
    mixed = (hashes ^ (hashes >> np.uint64(29))) * _GOLDEN
    return (mixed >> np.uint64(46)).astype(np.int64)


def _length_differences(pairs: Sequence[TextPair]) -> Floats:
    return np.array([np.subtract(_lengths(pair.chosen), _lengths(pair.rejected)) for pair in pairs])


def _lengths(text: str) -> list[float]:
    """Logarithms of characters, words and lines, and of the mean length of a word."""
    words = text.split()
    mean_word = sum(map(len, words)) / max(1, len(words))
    return [float(np.log1p(count)) for count in (len(text), len(words), text.count("\n"), mean_word)]


def _length_scale(pairs: Sequence[TextPair]) -> Floats:
    spread = np.sqrt(np.square(_length_differences(pairs)).mean(axis=0))
    return np.asarray(np.divide(_LENGTH_SCALE, spread, out=np.zeros_like(spread), where=spread > 0))
