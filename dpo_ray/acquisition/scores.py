"""Acquisition scores: what a label of each candidate pair may be worth. Pure functions of a table of features.

They see no model, no file and no Ray, so their numerics are tested alone, and strategies can be compared afterwards on
one scored pool. N is the number of candidates, S of sampled responses to a prompt, E of ensemble members, D the width
of hidden states; log-probabilities are in nats. "Cost" is in forward passes over one response, for one pair.

No score depends on which response of a pair is called the first (`margin_band` of signed margins apart), nor on the
order of the table. A new strategy is a function here and a line in `STRATEGIES`; `choose` picks by what it returns.
"""

import dataclasses
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import digamma, log_expit, logsumexp

from dpo_ray.errors import InputError

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_SHAPES: dict[str, tuple[int | None, ...]] = {
    "prompt_id": (),
    "source": (),
    "policy_logps": (2,),
    "reference_logps": (2,),
    "num_tokens": (2,),
    "sample_logps": (None,),
    "sample_tokens": (None,),
    "hidden": (2, None),
    "prompt_hidden": (None,),
    "head_margins": (None,),
    "gold_gap": (),
    "text": (),
}
"""Trailing axes of each column; None is any length."""

_TEXT = {"prompt_id": np.str_, "source": np.str_, "text": np.object_}
_RAGGED = {"sample_logps", "sample_tokens"}
_MATRICES = {"hidden", "prompt_hidden"}
_LOGPS = {"policy_logps", "reference_logps", "sample_logps"}
_ROUNDING = 0.01
"""A log-prob may stand above 0 by so much, nats: half-precision sums of a certain response do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Features:
    """What is known of N candidate pairs before anyone labels them, a row each; columns that nobody needs are None.

    A candidate has a first and a second response, in any order. Lists are taken as well as arrays.

    Raises:
        InputError: A column has another length or shape than it should, a value that is not finite, a log-prob above
            0, or a `pair_id` stands twice. Names the column and the pair.
    """

    pair_id: NDArray[np.str_]
    """[N], unique."""

    prompt_id: NDArray[np.str_]
    """[N]."""

    source: NDArray[np.str_]
    """[N], where the candidate came from."""

    policy_logps: Floats | None = None
    """[N, 2], summed log p(response | prompt) of both responses under the policy."""

    reference_logps: Floats | None = None
    """[N, 2], the same under the reference."""

    num_tokens: Floats | None = None
    """[N, 2], response tokens behind the sums, at least 1."""

    sample_logps: Floats | None = None
    """[N, S], summed log-probs of responses that the policy itself sampled to the prompt at temperature 1; NaN where a
    prompt has fewer than S."""

    sample_tokens: Floats | None = None
    """[N, S], their lengths; NaN where there is no sample."""

    hidden: NDArray[np.floating[Any]] | None = None
    """[N, 2, D], pooled last hidden state of each response behind its prompt."""

    prompt_hidden: NDArray[np.floating[Any]] | None = None
    """[N, D], of the prompt alone; the same in all rows of a prompt."""

    head_margins: Floats | None = None
    """[N, E], reward of the first response less that of the second, by each member of an ensemble, in logits."""

    gold_gap: Floats | None = None
    """[N], true reward of the first response less that of the second; in simulations only."""

    text: NDArray[np.object_] | None = None
    """[N], what near-duplicates are told by: the prompt and both responses."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pair_id", np.asarray(self.pair_id, dtype=np.str_))
        ids, counts = np.unique(self.pair_id, return_counts=True)
        if self.pair_id.ndim != 1 or not len(ids):
            raise InputError("`pair_id`: the pool has no candidate")
        if counts.max() > 1:
            raise InputError(f"`pair_id`: `{ids[counts.argmax()]}` stands {counts.max()} times in the pool")
        for name, axes in _SHAPES.items():
            column = getattr(self, name)
            if column is not None:
                object.__setattr__(self, name, self._checked(name, column, axes))

    def _checked(self, name: str, column: ArrayLike, axes: tuple[int | None, ...]) -> NDArray[Any]:
        dtype = None if name in _MATRICES else _TEXT.get(name, np.float64)
        try:
            array = np.asarray(column, dtype=dtype)
        except (TypeError, ValueError):
            raise InputError(f"`{name}`: not a table of numbers with one length in all rows") from None
        expected = (len(self.pair_id), *axes)
        if array.ndim != len(expected) or any(
            want is not None and have != want for have, want in zip(array.shape, expected, strict=True)
        ):
            shape = ", ".join("any" if want is None else str(want) for want in expected)
            raise InputError(f"`{name}`: shape [{', '.join(map(str, array.shape))}] where [{shape}] is expected")
        if name in _TEXT:
            return array
        if array.dtype.kind not in "fiu":
            raise InputError(f"`{name}`: {array.dtype} where numbers are expected")
        flat = array.reshape(len(array), -1)
        given = ~np.isnan(flat) if name in _RAGGED else np.ones(flat.shape, dtype=bool)
        self._refuse(name, np.asarray(~given.any(axis=1, keepdims=True)), "no value")
        self._refuse(name, given & ~np.isfinite(flat), "a value that is not finite")
        if name in _LOGPS:
            self._refuse(name, given & (flat > _ROUNDING), "a log-prob above 0")
        if name in ("num_tokens", "sample_tokens"):
            self._refuse(name, given & (flat < 1), "a response without tokens")
        return array

    def _refuse(self, name: str, wrong: Mask, what: str) -> None:
        if wrong.any():
            raise InputError(f"`{name}`: pair `{min(self.pair_id[wrong.any(axis=1)])}` has {what}")

    def __len__(self) -> int:
        return len(self.pair_id)

    def take(self, rows: NDArray[Any]) -> Self:
        """The rows of an index or a mask, in its order."""
        columns = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{name: c[rows] for name, c in columns.items() if c is not None})

    def in_order(self) -> Self:
        """The same rows by `pair_id`, which makes everything after it the same for any order of the pool."""
        return self.take(np.argsort(self.pair_id))

    def column(self, name: str, wanted_by: str) -> NDArray[Any]:
        """A column that must be there.

        Raises:
            InputError: Names the column and what wants it.
        """
        column = getattr(self, name)
        if column is None:
            raise InputError(f"`{wanted_by}` needs the feature `{name}`, which this pool lacks")
        return np.asarray(column)


class Ask(NamedTuple):
    """What one round of acquisition wants."""

    budget: int
    """Labels, at least 1."""

    seed: int = 0
    """Of the random order, of noise and of projections."""


class Scores(NamedTuple):
    """The scores of a pool under one strategy."""

    values: Floats
    """[N], in the strategy's own unit: what a report shows."""

    keys: Floats
    """[N], what candidates are chosen by, the largest first: the values, their negatives, or random numbers."""

    eligible: Mask
    """[N], whether a candidate may be chosen at all."""

    undecided: str | None = None
    """Why the scores say nothing, so that `keys` are random: as in the first round, where policy is reference."""


def uniform(ids: NDArray[np.str_], seed: int, purpose: str) -> Floats:
    """[N] in (0, 1): a hash of purpose, seed and id, so that it depends neither on the order nor on the machine."""
    digests = (hashlib.blake2b(f"{purpose}\n{seed}\n{name}".encode(), digest_size=8).digest() for name in ids)
    bits = np.array([int.from_bytes(digest, "big") >> 12 for digest in digests], dtype=np.float64)
    return np.asarray((bits + 0.5) / 2**52)  # 52 bits and a half: neither end is reached in float64


def implicit_gaps(features: Features, *, per_token: bool = False, wanted_by: str = "certainty") -> Floats:
    """[N], log pi / pi_ref of the first response less that of the second, nats: the implicit margin over beta.

    Rafailov et al. 2023 (arXiv:2305.18290), eq. 5; the term that depends on the prompt alone cancels.

    Args:
        per_token: Divide each log-ratio by the response's length, as length-normalised DPO and SimPO count rewards.
    """
    policy = features.column("policy_logps", wanted_by)
    ratios = policy - features.column("reference_logps", wanted_by)
    if per_token:
        ratios = ratios / features.column("num_tokens", "per_token")
    return np.asarray(ratios[:, 0] - ratios[:, 1])


def random(features: Features, ask: Ask) -> Scores:
    """A number from the id and the seed: the baseline that everything else must beat.

    Cost: none. `random` and `offline_random` are this same function; they differ in who wrote the candidates, the
    policy of the round or the reference. Muldrew et al. 2024 (arXiv:2402.08114).
    """
    values = uniform(features.pair_id, ask.seed, "random")
    return Scores(values, values, np.ones(len(features), dtype=bool))


def entropy(features: Features, ask: Ask, *, per_token: bool = False) -> Scores:
    """Monte-Carlo predictive entropy of the policy's responses to the prompt, nats: the highest first.

        H(x) ~ -1/S sum_n log pi(y_n | x),    y_n sampled from pi at temperature 1

    Muldrew et al. 2024 (arXiv:2402.08114), section 4: sums over tokens, no length normalisation. All pairs of a prompt
    have the same score, so cap the pairs of a prompt.

    Cost: S generations per prompt; their log-probs come with them. Fails where entropy is mostly length, and where
    prompts are open because they are odd: below random in the paper's IMDB runs.

    Args:
        per_token: Divide each sample's log-prob by its length.
    """
    samples = features.column("sample_logps", "entropy")
    if per_token:
        samples = samples / features.column("sample_tokens", "per_token")
    return _scores(features, ask, -np.nanmean(samples, axis=1), "max")


def certainty(
    features: Features, ask: Ask, *, beta: float = 1.0, per_token: bool = False, tolerance: float = 1e-4
) -> Scores:
    """Absolute difference of the implicit rewards, nats: the largest first.

        beta |(log pi - log pi_ref)(y1) - (log pi - log pi_ref)(y2)|

    Muldrew et al. 2024 (arXiv:2402.08114), section 4. Beta cancels in the ranking. It finds pairs about which the model
    is sure, often wrongly; a policy that has learnt little yet is sure of noise, and long responses differ more.

    Cost: 2 forward passes of the policy and 2 of the reference.

    Args:
        tolerance: Gaps, over beta, that differ by no more than this are rounding: the scores are declared undecided.
    """
    gaps = np.abs(implicit_gaps(features, per_token=per_token, wanted_by="certainty"))
    return _scores(features, ask, _positive("beta", beta) * gaps, "max", rounding=(gaps, tolerance))


def uncertainty(
    features: Features, ask: Ask, *, beta: float = 1.0, per_token: bool = False, tolerance: float = 1e-4
) -> Scores:
    """The same difference, nats, the smallest first.

    The released code of Muldrew et al. 2024 keeps 1 - 2 |sigmoid(margin) - 1/2|, which has the same ranking until it
    underflows. Cost: as `certainty`. Fails on ties that no label resolves: worse than random in that code's IMDB runs.
    """
    gaps = np.abs(implicit_gaps(features, per_token=per_token, wanted_by="uncertainty"))
    return _scores(features, ask, _positive("beta", beta) * gaps, "min", rounding=(gaps, tolerance))


def entropy_then_certainty(
    features: Features,
    ask: Ask,
    *,
    over: float = 4.0,
    beta: float = 1.0,
    per_token: bool = False,
    tolerance: float = 1e-4,
) -> Scores:
    """Certainty among the pairs of the prompts with the highest entropy: the two stages of Muldrew et al. 2024.

    Cost: both; where candidates are generated after the first stage, the forward passes of `certainty` for `over` pairs
    per label only. Fails as its stages do; a small gain over certainty in one of the paper's two tasks.

    Args:
        over: Prompts kept by the first stage, per label of the budget.
    """
    if not over >= 1:
        raise InputError(f"`over`: {over:g} prompts per label; at least 1 is needed")
    by_prompt = dict(zip(features.prompt_id, entropy(features, ask, per_token=per_token).values, strict=True))
    ranked = sorted(by_prompt, key=lambda prompt: (-by_prompt[prompt], prompt))
    kept = ranked[: math.ceil(over * ask.budget)]
    scores = certainty(features, ask, beta=beta, per_token=per_token, tolerance=tolerance)
    # A first round has no certainty, but it has an entropy: what is undecided is the second stage.
    return scores._replace(eligible=np.isin(features.prompt_id, kept))


def bald(features: Features, ask: Ask) -> Scores:
    """Mutual information of the label and the ensemble's member, nats: the largest first.

        H[mean_e p_e] - mean_e H[p_e],    p_e = sigmoid(margin_e)

    Houlsby et al. 2011 (arXiv:1112.5745), eq. 2. Between 0 and ln 2.

    Cost: E passes of a small head over hidden states that are computed once, or 2 E forward passes for E adapters.
    Fails in batches, which fill with near copies of one candidate: see `bal_pm` and noise in `choose`.
    """
    return _scores(features, ask, mutual_information(features.column("head_margins", "bald")), "max")


def mutual_information(margins: Floats) -> Floats:
    """[N], in [0, ln 2]; in logarithms throughout, so that no margin is too large.

    Args:
        margins: [N, E], E at least 2.
    """
    members = margins.shape[1]
    if members < 2:
        raise InputError(f"`head_margins`: {members} member; disagreement needs at least 2")
    log_p, log_q = log_expit(margins), log_expit(-margins)
    mean_p, mean_q = (logsumexp(logs, axis=1) - math.log(members) for logs in (log_p, log_q))
    return np.asarray(np.maximum(_bernoulli_entropy(mean_p, mean_q) - _bernoulli_entropy(log_p, log_q).mean(axis=1), 0))


def _bernoulli_entropy(log_p: Floats, log_q: Floats) -> Floats:
    return np.asarray(-np.exp(log_p) * log_p - np.exp(log_q) * log_q)


def bal_pm(features: Features, ask: Ask, *, weight: float = 0.01, neighbours: int = 13) -> Scores:
    """BALD plus how empty the chosen set is around the prompt, nats: the largest first.

        bald + weight * (log 2 D_k(x) - digamma(n(x) + 1) / d)

    with D_k the distance to the k-th nearest other prompt of the pool, n the number of chosen pairs nearer than that,
    and d the features' width: Melo et al. 2024 (BAL-PM, arXiv:2406.10023), the marginal entropy of Kraskov et al. 2004.
    Here n is 0; `choose` counts on as it chooses.

    Cost: as `bald`, and distances between all prompts: of order (prompts)^2 D. Fails where hidden states measure length
    or format, which the second term then spreads out.

    Args:
        weight: Of the prompt term; the paper's default.
        neighbours: k; the paper's default.
    """
    terms = prompt_terms(features, neighbours=neighbours)
    values = terms.values(np.zeros(len(terms.points)), _positive("weight", weight))
    # Equal values are no tie here: they part as soon as something is chosen.
    return Scores(values, values, np.ones(len(features), dtype=bool))


class PromptTerms(NamedTuple):
    """What BAL-PM's score is made of. P is the number of prompts."""

    information: Floats
    """[N], mutual information."""

    points: Floats
    """[P, d], features of the prompts."""

    radius: Floats
    """[P], distance to the k-th nearest other prompt."""

    prompt: NDArray[np.int64]
    """[N], row of each pair's prompt."""

    def values(self, counts: Floats, weight: float) -> Floats:
        """[N], the score with so many [P] chosen pairs within each prompt's radius.

        A radius of 0 (more than k prompts with the same features) is the smallest number: the term stays finite.
        """
        spread = np.log(2 * np.maximum(self.radius, np.finfo(np.float64).tiny))
        around = spread - digamma(counts + 1) / self.points.shape[1]
        return np.asarray(self.information + weight * around[self.prompt])


def prompt_terms(features: Features, *, neighbours: int) -> PromptTerms:
    """See `bal_pm`."""
    information = mutual_information(features.column("head_margins", "bal_pm"))
    points = features.column("prompt_hidden", "bal_pm").astype(np.float64)
    prompts, first, of_pair = np.unique(features.prompt_id, return_index=True, return_inverse=True)
    if len(prompts) < 2:
        raise InputError("`bal_pm` needs at least 2 prompts in the pool")
    if neighbours < 1:
        raise InputError(f"`neighbours`: {neighbours}; at least 1 is needed")
    points = points[first]
    return PromptTerms(information, points, _kth_distances(points, min(neighbours, len(prompts) - 1)), of_pair)


def distances(points: Floats, to: Floats, rows: int = 256) -> Floats:
    """[n], Euclidean distances of [n, D] to [D], by differences: two equal rows are exactly 0 apart.

    So many rows at a time that the differences stay in the processor's cache: four times as fast.
    """
    blocks = (points[start : start + rows] - to for start in range(0, len(points), rows))
    return np.asarray(np.sqrt(np.concatenate([np.square(block).sum(axis=1) for block in blocks])))


def _kth_distances(points: Floats, k: int, rows: int = 512) -> Floats:
    """[n], from each point to its k-th nearest other one.

    Products find the neighbours, `rows` points at a time; their distances are then taken by differences.
    """
    centred = points - points.mean(axis=0)
    norms = np.square(centred).sum(axis=1)
    found = np.empty(len(points))
    for start in range(0, len(points), rows):
        block = slice(start, min(start + rows, len(points)))
        squares = norms[block, None] + norms - 2 * centred[block] @ centred.T
        squares[np.arange(block.stop - start), np.arange(start, block.stop)] = np.inf
        nearest = np.argpartition(squares, k - 1, axis=1)[:, :k]
        found[block] = [
            distances(points[near], point).max() for near, point in zip(nearest, points[block], strict=True)
        ]
    return found


def d_optimal(
    features: Features, ask: Ask, *, beta: float = 1.0, ridge: float = 0.01, width: int = 256, per_token: bool = False
) -> Scores:
    """Gain in the log-determinant of the information about the last layer, nats: the largest first.

        log(1 + v^T V^-1 v),    v = 2 sqrt(p (1 - p)) (h(y1) - h(y2)),    p = sigmoid(implicit margin)

    with V = ridge I plus v v^T of all that is chosen. It linearises DPO at its last layer: Kveton et al. 2025
    (arXiv:2503.01076); without the factor p (1 - p) it is the rule of Das et al. 2024 (APO, arXiv:2402.10500). Here
    nothing is chosen yet; `choose` goes on greedily.

    Cost: that of `certainty`, with the hidden states kept, and of order N width per choice. Fails where hidden
    states differ in what no label is about, and where their differences are noise of the projection (width too small).

    Args:
        ridge: Relative to differences of mean square 1, so that it does not depend on the scale of hidden states.
            beta^2 of the paper's information matrix is in it: only the ratio counts.
        width: Features wider than this are projected to it; see `differences`.
    """
    vectors = design_vectors(features, ask, beta=beta, width=width, per_token=per_token)
    values = np.log1p(np.square(vectors).sum(axis=1) / _positive("ridge", ridge))
    if not values.any():
        return _scores(features, ask, values, "max")
    # Equal gains are no tie here: they part as soon as something is chosen.
    return Scores(values, values, np.ones(len(features), dtype=bool))


def design_vectors(features: Features, ask: Ask, *, beta: float, width: int, per_token: bool) -> Floats:
    """[N, at most width], the v of `d_optimal`."""
    margins = _positive("beta", beta) * implicit_gaps(features, per_token=per_token, wanted_by="d_optimal")
    curvature = 2 * np.exp((log_expit(margins) + log_expit(-margins)) / 2)  # 2 sqrt(p (1 - p)): 1 at p = 1/2
    return np.asarray(curvature[:, None] * differences(features, seed=ask.seed, width=width, wanted_by="d_optimal"))


def differences(features: Features, *, seed: int, width: int, wanted_by: str) -> Floats:
    """[N, at most width], hidden state of the first response less the second's, of mean square length 1 in the pool.

    Wider ones are multiplied by a random matrix of signs, which keeps inner products up to 1 / sqrt(width): Achlioptas
    2003, "Database-friendly random projections".
    """
    if width < 1:
        raise InputError(f"`width`: {width}; at least 1 is needed")
    hidden = features.column("hidden", wanted_by).astype(np.float64)
    vectors = hidden[:, 0] - hidden[:, 1]
    if vectors.shape[1] > width:
        signs = np.random.default_rng(seed).integers(0, 2, size=(vectors.shape[1], width)) * 2.0 - 1
        vectors = vectors @ signs
    size = math.sqrt(np.square(vectors).sum(axis=1).mean())
    return np.asarray(vectors / size if size > 0 else vectors)


def adpo(
    features: Features,
    ask: Ask,
    *,
    threshold: float = 1.3,
    beta: float = 0.1,
    per_token: bool = False,
    tolerance: float = 1e-4,
) -> Scores:
    """Absolute implicit margin, nats: pairs up to the threshold are asked about, in random order.

    Ji et al. 2024 (ADPO, arXiv:2402.09401): a stream in which the model labels the confident pairs itself; those are
    `pseudo_labels`. Cost: as `certainty`. Fails where the model is confidently wrong: no label corrects it.

    Args:
        threshold, beta: Those of the released code; the threshold is in the unit of rewards, so it goes with beta.
    """
    gaps = implicit_gaps(features, per_token=per_token, wanted_by="adpo")
    values = np.abs(_positive("beta", beta) * gaps)
    eligible = values <= _positive("threshold", threshold)
    return _scores(features, ask, values, "random", eligible=eligible, rounding=(np.abs(gaps), tolerance))


def pseudo_labels(
    features: Features, *, threshold: float = 1.3, beta: float = 0.1, per_token: bool = False
) -> NDArray[np.int8]:
    """[N]: 1 where the first response is taken for the better one, -1 for the second, 0 where a label must be asked."""
    margins = _positive("beta", beta) * implicit_gaps(features, per_token=per_token, wanted_by="adpo")
    return np.where(np.abs(margins) > _positive("threshold", threshold), np.sign(margins), 0).astype(np.int8)


def margin_band(
    features: Features,
    ask: Ask,
    *,
    low: float = 0.0,
    high: float = 1.0,
    of: Literal["absolute", "signed"] = "absolute",
    beta: float = 1.0,
    per_token: bool = False,
    tolerance: float = 1e-4,
) -> Scores:
    """Implicit margin, nats: pairs between two quantiles of the pool are chosen, in random order.

    Largest (Deng et al. 2025, arXiv:2502.14560) and smallest margins (arXiv:2508.04149) are both reported to be the
    better tenth of labelled pairs, so the band is a parameter. Adjacent bands share no pair.

    Cost: as `certainty`. Fails as the band's end does: noise in labels below, nothing new to learn above.

    Args:
        low, high: Shares of the pool, by margin and then by id, 0 <= low < high <= 1.
        of: `signed` for labelled pairs whose first response is the chosen one: the lowest are those it gets most wrong.
    """
    if not 0 <= low < high <= 1:
        raise InputError(f"`low`, `high`: {low:g} and {high:g} are no band within 0 and 1")
    if of not in ("absolute", "signed"):
        raise InputError(f"`of`: `{of}` is neither `absolute` nor `signed`")
    gaps = implicit_gaps(features, per_token=per_token, wanted_by="margin_band")
    gaps = np.abs(gaps) if of == "absolute" else gaps
    place = np.empty(len(features))
    place[np.lexsort((features.pair_id, gaps))] = (np.arange(len(features)) + 0.5) / len(features)
    scores = _scores(
        features,
        ask,
        _positive("beta", beta) * gaps,
        "random",
        eligible=(low <= place) & (place < high),
        rounding=(gaps, tolerance),
    )
    # Where no margin differs, a band is one of ids.
    return scores._replace(eligible=np.ones(len(features), dtype=bool)) if scores.undecided else scores


def oracle_gap(features: Features, ask: Ask) -> Scores:
    """Absolute gap of the true rewards: the largest first. Simulations only: the upper bound of a cheat.

    Cost: none. It asks for what no real pool can know, so it is a control and never a strategy. Where the data has
    labels without scores all gaps are equal, and the choice is random.
    """
    return _scores(features, ask, np.abs(features.column("gold_gap", "oracle_gap")), "max")


class Strategy(NamedTuple):
    """A score, and what a person should know before using it. The score's docstring says how it fails."""

    score: Callable[..., Scores]
    """(features, ask, options) -> scores."""

    needs: tuple[str, ...]
    """Columns of `Features`; `per_token` needs the lengths as well."""

    direction: Literal["max", "min", "random"]
    """Which values are chosen first; `random`: any of the eligible."""

    cost: str
    reference: str
    candidates: Literal["policy", "reference"] = "policy"
    """Who writes the candidates where the pool has prompts only."""

    batch: Literal["log_det", "density"] | None = None
    """The greedy rule that scores on while choosing, of strategies that have one of their own."""


_MULDREW = "Muldrew et al. 2024, arXiv:2402.08114"
_MARGIN = ("policy_logps", "reference_logps")
_FOUR = "2 forward passes of the policy, 2 of the reference"

STRATEGIES: Mapping[str, Strategy] = {
    "random": Strategy(random, (), "random", "none", _MULDREW),
    "offline_random": Strategy(random, (), "random", "none", _MULDREW, candidates="reference"),
    "entropy": Strategy(entropy, ("sample_logps",), "max", "S generations per prompt", _MULDREW),
    "certainty": Strategy(certainty, _MARGIN, "max", _FOUR, _MULDREW),
    "entropy_then_certainty": Strategy(
        entropy_then_certainty, ("sample_logps", *_MARGIN), "max", f"S generations per prompt; {_FOUR}", _MULDREW
    ),
    "uncertainty": Strategy(uncertainty, _MARGIN, "min", _FOUR, f"released code of {_MULDREW}"),
    "bald": Strategy(bald, ("head_margins",), "max", "E heads on one forward pass", "Houlsby et al., arXiv:1112.5745"),
    "bal_pm": Strategy(
        bal_pm,
        ("head_margins", "prompt_hidden"),
        "max",
        "E heads on one forward pass; distances of all prompts",
        "Melo et al. 2024, arXiv:2406.10023",
        batch="density",
    ),
    "d_optimal": Strategy(
        d_optimal, (*_MARGIN, "hidden"), "max", _FOUR, "Kveton et al. 2025, arXiv:2503.01076", batch="log_det"
    ),
    "adpo": Strategy(adpo, _MARGIN, "random", _FOUR, "Ji et al. 2024, arXiv:2402.09401"),
    "margin_band": Strategy(margin_band, _MARGIN, "random", _FOUR, "arXiv:2502.14560, arXiv:2508.04149"),
    "oracle_gap": Strategy(oracle_gap, ("gold_gap",), "max", "none", "control in simulations"),
}


def options_of(name: str) -> dict[str, Any]:
    """The options of a strategy and their defaults.

    Raises:
        InputError: There is no such strategy.
    """
    if name not in STRATEGIES:
        raise InputError(f"no strategy `{name}`; there are {', '.join(STRATEGIES)}")
    parameters = inspect.signature(STRATEGIES[name].score).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def score(name: str, features: Features, ask: Ask, options: Mapping[str, Any] | None = None) -> Scores:
    """The scores of a pool under a strategy of `STRATEGIES`.

    Raises:
        InputError: Names the strategy, the option or the feature that is not there, or the option that makes no sense.
    """
    known, options = options_of(name), options or {}
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise InputError(f"strategy `{name}` has no option `{option}`; {has}")
    if ask.budget < 1:
        raise InputError(f"`budget`: {ask.budget} labels; at least 1 is needed")
    for column in STRATEGIES[name].needs:
        features.column(column, name)
    return STRATEGIES[name].score(features, ask, **options)


def _scores(
    features: Features,
    ask: Ask,
    values: Floats,
    direction: Literal["max", "min", "random"],
    *,
    eligible: Mask | None = None,
    rounding: tuple[Floats, float] | None = None,
) -> Scores:
    """Keys of the values by their direction; random ones where no value differs from another beyond rounding."""
    eligible = np.ones(len(features), dtype=bool) if eligible is None else eligible
    raw, tolerance = rounding or (values, 0.0)
    if len(features) > 1 and np.ptp(raw) <= tolerance:
        undecided = f"all {len(features)} scores are equal ({np.median(values):.3g}): the order is random"
        return Scores(values, random(features, ask).keys, eligible, undecided)
    if direction == "random":
        return Scores(values, random(features, ask).keys, eligible)
    return Scores(values, values if direction == "max" else -values, eligible)


def _positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"`{name}`: {value!r} is not a number above 0")
    return value
