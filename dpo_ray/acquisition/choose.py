"""Which of the scored candidates are labelled: one central step, greedy, exact and explained. Pure.

The pool is put in the order of `pair_id` first and every tie goes to the smaller id, so what is chosen is the same for
any order of the pool, hence for any number of actors and any block size. All rules are one loop: take the candidate
with the largest key that nothing bars, let the keys and the limits see it, go on. N candidates, k of them chosen.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from dpo_ray.acquisition import scores
from dpo_ray.acquisition.scores import STRATEGIES, Ask, Features, Floats, Mask, Scores, distances
from dpo_ray.errors import InputError
from dpo_ray.shingles import word_shingles


class Choice(NamedTuple):
    """One chosen candidate, and why."""

    pair_id: str
    rank: int
    """From 1, in the order of choosing."""

    score: float
    """The strategy's value, in its unit; of greedy strategies, before anything was chosen."""

    key: float
    """What it was picked for: the score or its negative, the score with noise, the gain or distance at that moment."""

    strategy: str
    """`random` where the strategy was undecided."""

    stage: str
    """`top`, `random`, `softmax`, `power`, `softrank`, `k_center`, `log_det`, `density`; `fill` where a diverse stage
    ran dry before the budget did."""


class Selection(NamedTuple):
    """What one round asks labels for."""

    choices: tuple[Choice, ...]
    """At most the budget; fewer where eligible candidates run out."""

    stages: dict[str, int]
    """Candidates left after each stage, in order: `pool`, `unlabelled`, `eligible`, perhaps `diverse`, `chosen`."""

    barred: dict[str, int]
    """Candidates that a limit kept out when it was their turn, by limit."""

    undecided: str | None
    """Why the choice is random although another strategy was asked for."""


@dataclasses.dataclass(frozen=True)
class Top:
    """The candidates with the best scores."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """The best scores after Gumbel noise: sampling without replacement, for batches that are less alike.

    Kirsch et al. 2023 (arXiv:2106.12059). The chance of being picked next is proportional to exp(sharpness score), to
    score^sharpness (PowerBALD, with BALD), or to rank^-sharpness. The noise goes by id and seed.
    """

    kind: Literal["softmax", "power", "softrank"]
    sharpness: float = 1.0


@dataclasses.dataclass(frozen=True)
class KCenter:
    """Of the best `over` candidates per label, each next the farthest from all chosen ones (and labelled ones).

    Sener & Savarese 2018 (arXiv:1708.00489), the greedy 2-approximation; the first is the one with the best score.
    """

    stage: ClassVar[str] = "k_center"

    over: float = 4.0
    by: Literal["responses", "prompt"] = "responses"
    """`responses`: mean of both responses' hidden states, the same whichever comes first."""


@dataclasses.dataclass(frozen=True)
class LogDet:
    """Of the best `over` candidates per label, each next the one that adds most to the log-determinant of the hidden
    state differences; as `d_optimal`, without its curvature."""

    stage: ClassVar[str] = "log_det"

    over: float = 4.0
    ridge: float = 0.01
    width: int = 256


Batch = Top | Noise | KCenter | LogDet


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a batch may hold at most. Limits count what this batch chooses; near-duplicates also what is labelled."""

    per_prompt: int | None = None
    """Pairs of one prompt."""

    per_source: Mapping[str, int] | None = None
    """Pairs of a source; one that is not named has no limit."""

    per_cluster: int | None = None
    """Pairs of a cluster of hidden states, of `num_clusters`."""

    num_clusters: int = 64
    max_cosine: float | None = None
    """Of the hidden states of both responses, paired either way, to any chosen or labelled pair; in (0, 1]."""

    max_jaccard: float | None = None
    """Share of common word triples of the `text` with any chosen or labelled pair; in (0, 1]."""


def choose(
    features: Features,
    strategy: str,
    ask: Ask,
    *,
    options: Mapping[str, Any] | None = None,
    batch: Batch = Top(),
    limits: Limits = Limits(),
    labelled: Collection[str] = (),
) -> Selection:
    """Choose the pairs of a round.

    Args:
        options: Of the strategy; see `scores.options_of`.
        labelled: Ids that have a label already. Those in the pool are not chosen again, and are what greedy rules and
            near-duplicates start from.

    Raises:
        InputError: Names the strategy, option, limit or feature that is not there or makes no sense.
    """
    _check(strategy, batch, limits)
    pool = features.in_order()
    is_labelled = np.isin(pool.pair_id, np.array(sorted(labelled), dtype=np.str_))
    stages = {"pool": len(pool), "unlabelled": int((~is_labelled).sum())}
    if is_labelled.all():
        return Selection((), stages | {"eligible": 0, "chosen": 0}, {}, None)

    ranked = _rank(pool, strategy, ask, options, is_labelled)
    stages["eligible"] = int(ranked.eligible.sum())
    run = _Run(ask.budget, ranked.eligible.copy(), _barriers(pool, limits), np.flatnonzero(is_labelled))
    if isinstance(batch, KCenter | LogDet):
        best = _best(ranked, math.ceil(batch.over * ask.budget))
        stages["diverse"] = int(best.sum())
        run.pick(_diverse(pool, batch, ask, ranked.keys, best | is_labelled), batch.stage, among=best)
        run.pick(_Fixed(ranked.keys), "fill")
    elif STRATEGIES[strategy].batch and not ranked.undecided:
        greedy = STRATEGIES[strategy].batch
        run.pick(_own_rule(pool, strategy, ask, scores.options_of(strategy) | dict(options or {})), str(greedy))
    elif isinstance(batch, Noise) and not ranked.undecided:
        run.pick(_Fixed(_noisy(pool, ranked, batch, ask)), batch.kind)
    else:
        is_random = ranked.undecided or STRATEGIES[strategy].direction == "random"
        run.pick(_Fixed(ranked.keys), "random" if is_random else "top")

    name = "random" if ranked.undecided else strategy
    choices = tuple(
        Choice(str(pool.pair_id[row]), rank, float(ranked.values[row]), key, name, stage)
        for rank, (row, key, stage) in enumerate(run.picked, start=1)
    )
    return Selection(choices, stages | {"chosen": len(choices)}, dict(run.barred), ranked.undecided)


class Keys(Protocol):
    """What the loop maximises."""

    def values(self) -> Floats:
        """[N], now."""

    def take(self, row: int) -> None:
        """A candidate is chosen."""


class _Fixed:
    """Keys that do not depend on what is chosen."""

    def __init__(self, keys: Floats) -> None:
        self._keys = keys

    def values(self) -> Floats:
        return self._keys

    def take(self, row: int) -> None:
        pass


class FarthestFirst:
    """Distance to the nearest chosen point: O(N D) a choice."""

    def __init__(self, points: Floats, first: Floats) -> None:
        """Points [N, D]; `first` [N] are the keys while nothing is chosen."""
        self._points, self._keys = points, first
        self._nearest = np.full(len(points), np.inf)

    def values(self) -> Floats:
        return self._keys

    def take(self, row: int) -> None:
        self._nearest = np.minimum(self._nearest, distances(self._points, self._points[row]))
        self._keys = self._nearest


class LogDetGain:
    """log det(V + v v^T) - log det V = log(1 + v^T V^-1 v), with V = ridge I plus v v^T of what is chosen.

    V^-1 and all v^T V^-1 v are updated by Sherman and Morrison's formula: O(N d + d^2) a choice, no determinant.
    """

    def __init__(self, vectors: Floats, ridge: float) -> None:
        self._vectors = vectors  # [N, d]
        self._inverse = np.eye(vectors.shape[1]) / ridge
        self._forms = np.square(vectors).sum(axis=1) / ridge  # [N], v^T V^-1 v

    def values(self) -> Floats:
        return np.asarray(np.log1p(self._forms))

    def take(self, row: int) -> None:
        vector = self._vectors[row]
        solved = self._inverse @ vector
        norm = 1 + vector @ solved
        self._inverse -= np.outer(solved, solved) / norm
        # Rounding may leave a spent direction a little below zero.
        self._forms = np.maximum(self._forms - np.square(self._vectors @ solved) / norm, 0)


class _Density:
    """BAL-PM: the prompt term counts the chosen pairs within each candidate's radius."""

    def __init__(self, pool: Features, weight: float, neighbours: int) -> None:
        self._weight = weight
        self._terms = scores.prompt_terms(pool, neighbours=neighbours)
        self._counts = np.zeros(len(self._terms.points))

    def values(self) -> Floats:
        return self._terms.values(self._counts, self._weight)

    def take(self, row: int) -> None:
        points = self._terms.points
        self._counts += distances(points, points[self._terms.prompt[row]]) < self._terms.radius


class _Within:
    """Keys over some rows of the pool, as keys over all of it."""

    def __init__(self, keys: Keys, rows: Mask) -> None:
        self._keys, self._rows = keys, rows
        self._place = np.cumsum(rows) - 1

    def values(self) -> Floats:
        return _spread(self._keys.values(), self._rows, -np.inf)

    def take(self, row: int) -> None:
        self._keys.take(int(self._place[row]))


class Barrier(Protocol):
    """A limit: whether a candidate may still be chosen. It is asked about those whose turn it is, not about all N."""

    name: str
    counts_labelled: bool

    def admits(self, row: int) -> bool:
        """Whether this candidate may be chosen beside those that are."""

    def take(self, row: int) -> None:
        """A candidate is chosen."""


class _Cap:
    """At most so many of each label."""

    counts_labelled = False

    def __init__(self, name: str, labels: NDArray[Any], limits: Mapping[str, int] | int) -> None:
        self.name = name
        names, self._label = np.unique(labels, return_inverse=True)
        self._left = [limits if isinstance(limits, int) else limits.get(str(label), len(labels)) for label in names]

    def admits(self, row: int) -> bool:
        return bool(self._left[self._label[row]] > 0)

    def take(self, row: int) -> None:
        self._left[self._label[row]] -= 1


class _Cosine:
    """Both responses of a pair point where both of a chosen pair do, whichever comes first."""

    name = "max_cosine"
    counts_labelled = True

    def __init__(self, hidden: NDArray[Any], most: float) -> None:
        self._hidden = hidden
        self._taken: list[Floats] = []  # of [2, D]
        # The cosine of two equal vectors may round to less than 1.
        self._most = most - 1e-12

    def admits(self, row: int) -> bool:
        mine = self._units(row)
        for theirs in self._taken:
            (a, b), (c, d) = mine @ theirs.T
            if max(min(a, d), min(b, c)) >= self._most:
                return False
        return True

    def take(self, row: int) -> None:
        self._taken.append(self._units(row))

    def _units(self, row: int) -> Floats:
        pair = self._hidden[row].astype(np.float64)
        lengths = np.linalg.norm(pair, axis=1, keepdims=True)
        return np.asarray(np.divide(pair, lengths, out=np.zeros_like(pair), where=lengths > 0))


class _Jaccard:
    """Share of common word triples, exactly, from the lists of chosen texts that hold each triple."""

    name = "max_jaccard"
    counts_labelled = True

    def __init__(self, texts: NDArray[Any], most: float) -> None:
        self._texts, self._most = texts, most
        self._sizes: list[int] = []  # of the chosen ones
        self._held_by: dict[str, list[int]] = {}

    def admits(self, row: int) -> bool:
        mine = word_shingles(self._texts[row], 3)
        common = Counter(other for triple in mine for other in self._held_by.get(triple, ()))
        return all(n < self._most * (len(mine) + self._sizes[other] - n) for other, n in common.items())

    def take(self, row: int) -> None:
        mine = word_shingles(self._texts[row], 3)
        for triple in mine:
            self._held_by.setdefault(triple, []).append(len(self._sizes))
        self._sizes.append(len(mine))


class _Run:
    """The loop, and what it has done so far."""

    def __init__(self, budget: int, open_rows: Mask, barriers: Sequence[Barrier], labelled: NDArray[np.int64]) -> None:
        self._budget, self._open, self._barriers, self._labelled = budget, open_rows, barriers, labelled
        self.picked: list[tuple[int, float, str]] = []
        self.barred: Counter[str] = Counter()
        for barrier in barriers:
            for row in labelled if barrier.counts_labelled else ():
                barrier.take(int(row))

    def pick(self, keys: Keys, stage: str, among: Mask | None = None) -> None:
        """Go on until the budget is spent or nothing is left (among these)."""
        for row in self._labelled:
            keys.take(int(row))
        while len(self.picked) < self._budget:
            now = np.where(self._open if among is None else self._open & among, keys.values(), -np.inf)
            row = self._first_admitted(now)
            if row is None:
                return
            self.picked.append((row, float(now[row]), stage))
            self._open[row] = False
            keys.take(row)
            for barrier in self._barriers:
                barrier.take(row)

    def _first_admitted(self, now: Floats) -> int | None:
        """The row with the largest key that no limit bars, the smallest id of equals. Those it bars are out for good:
        limits only tighten."""
        while now[row := int(now.argmax())] > -np.inf:
            barrier = next((barrier.name for barrier in self._barriers if not barrier.admits(row)), None)
            if barrier is None:
                return row
            self.barred[barrier] += 1
            self._open[row] = False
            now[row] = -np.inf
        return None


def clusters(points: Floats, num_clusters: int) -> NDArray[np.int64]:
    """[N], cluster of each point: the nearest of `num_clusters` centres chosen farthest first, from the one nearest to
    the mean. Gonzalez 1985: no other choice has less than half the largest radius, so a cap per cluster is one per
    region of space, however crowded. Ties go to the earlier centre.
    """
    centres = FarthestFirst(points, -distances(points, points.mean(axis=0)))
    nearest, label = np.full(len(points), np.inf), np.zeros(len(points), dtype=np.int64)
    for cluster in range(min(num_clusters, len(points))):
        row = int(centres.values().argmax())
        away = distances(points, points[row])
        label[away < nearest] = cluster
        nearest = np.minimum(nearest, away)
        centres.take(row)
    return label


def _check(strategy: str, batch: Batch, limits: Limits) -> None:
    """Refuse what cannot be chosen by."""
    scores.options_of(strategy)
    entry = STRATEGIES[strategy]
    if entry.batch and not isinstance(batch, Top):
        raise InputError(f"`batch`: strategy `{strategy}` has a batch rule of its own, `{entry.batch}`")
    if isinstance(batch, Noise):
        if batch.kind not in ("softmax", "power", "softrank"):
            raise InputError(f"`batch`: no noise `{batch.kind}`; there are softmax, power, softrank")
        if entry.direction == "random":
            raise InputError(f"`batch`: strategy `{strategy}` chooses at random already; noise changes nothing")
        if not (batch.sharpness > 0 and math.isfinite(batch.sharpness)):
            raise InputError(f"`sharpness`: {batch.sharpness:g} is not a number above 0")
        if batch.kind == "power" and entry.direction == "min":
            raise InputError(f"`batch`: `power` wants the largest scores, `{strategy}` the smallest; take softrank")
    if isinstance(batch, KCenter | LogDet) and not batch.over >= 1:
        raise InputError(f"`over`: {batch.over:g} candidates per label; at least 1 is needed")
    if isinstance(batch, KCenter) and batch.by not in ("responses", "prompt"):
        raise InputError(f"`by`: `{batch.by}` is neither `responses` nor `prompt`")
    if isinstance(batch, LogDet) and not (batch.ridge > 0 and math.isfinite(batch.ridge)):
        raise InputError(f"`ridge`: {batch.ridge:g} is not a number above 0")
    for name in ("per_prompt", "per_cluster", "num_clusters"):
        count = getattr(limits, name)
        if count is not None and count < 1:
            raise InputError(f"`{name}`: {count}; at least 1 is needed")
    for name in ("max_cosine", "max_jaccard"):
        share = getattr(limits, name)
        if share is not None and not 0 < share <= 1:
            raise InputError(f"`{name}`: {share:g} is not above 0 and at most 1")


def _rank(pool: Features, strategy: str, ask: Ask, options: Mapping[str, Any] | None, is_labelled: Mask) -> Scores:
    """The scores of the whole pool. Labelled rows keep their place, as starting points of greedy rules, but are not
    eligible and take no part in quantiles and ranks."""
    found = scores.score(strategy, pool.take(~is_labelled), ask, options)
    return Scores(
        _spread(found.values, ~is_labelled, np.nan),
        _spread(found.keys, ~is_labelled, -np.inf),
        _spread(found.eligible, ~is_labelled, False),
        found.undecided,
    )


def _barriers(pool: Features, limits: Limits) -> list[Barrier]:
    barriers: list[Barrier] = []
    if limits.per_prompt is not None:
        barriers.append(_Cap("per_prompt", pool.prompt_id, limits.per_prompt))
    if limits.per_source is not None:
        for source, quota in limits.per_source.items():
            if source not in pool.source:
                raise InputError(f"`per_source`: no candidate is from `{source}`")
            if quota < 0:
                raise InputError(f"`per_source`: {quota} pairs of `{source}`; at least 0 is needed")
        barriers.append(_Cap("per_source", pool.source, limits.per_source))
    if limits.per_cluster is not None:
        labels = clusters(_points(pool, "responses", "per_cluster"), limits.num_clusters)
        barriers.append(_Cap("per_cluster", labels, limits.per_cluster))
    if limits.max_cosine is not None:
        barriers.append(_Cosine(pool.column("hidden", "max_cosine"), limits.max_cosine))
    if limits.max_jaccard is not None:
        barriers.append(_Jaccard(pool.column("text", "max_jaccard"), limits.max_jaccard))
    return barriers


def _points(pool: Features, by: str, wanted_by: str) -> Floats:
    """[N, D], a place in space for each pair that does not depend on which response comes first."""
    if by == "prompt":
        return pool.column("prompt_hidden", wanted_by).astype(np.float64)
    return np.asarray(pool.column("hidden", wanted_by).astype(np.float64).mean(axis=1))


def _diverse(pool: Features, batch: KCenter | LogDet, ask: Ask, keys: Floats, rows: Mask) -> Keys:
    """The rule of a diverse batch over these rows: all others would only cost time."""
    if isinstance(batch, KCenter):
        points = _points(pool, batch.by, "k_center")
        return _Within(FarthestFirst(points[rows], keys[rows]), rows)
    vectors = scores.differences(pool, seed=ask.seed, width=batch.width, wanted_by="log_det")
    return _Within(LogDetGain(vectors[rows], batch.ridge), rows)


def _own_rule(pool: Features, strategy: str, ask: Ask, options: Mapping[str, Any]) -> Keys:
    """The greedy rule of a strategy that has one; its options are checked by its score."""
    if STRATEGIES[strategy].batch == "density":
        return _Density(pool, options["weight"], options["neighbours"])
    ridge = options["ridge"]
    return LogDetGain(
        scores.design_vectors(pool, ask, **{name: value for name, value in options.items() if name != "ridge"}), ridge
    )


def _noisy(pool: Features, ranked: Scores, noise: Noise, ask: Ask) -> Floats:
    """Logarithms of the weights plus standard Gumbel noise; the order of these samples without replacement."""
    gumbel = -np.log(-np.log(scores.uniform(pool.pair_id, ask.seed, "gumbel")))
    keys = np.where(ranked.eligible, ranked.keys, -np.inf)
    if noise.kind == "softmax":
        return np.asarray(noise.sharpness * keys + gumbel)
    if noise.kind == "softrank":
        # Equal scores have the same rank, the best of theirs.
        return np.asarray(gumbel - noise.sharpness * np.log(rankdata(-keys, method="min")))
    if (keys[ranked.eligible] < 0).any():
        raise InputError("`batch`: `power` needs scores that are not negative; take softmax or softrank")
    # A score of 0 has no chance, and is taken by id once nothing else is left.
    weights = np.log(keys, out=np.zeros(len(keys)), where=keys > 0)
    return np.where(keys > 0, noise.sharpness * weights + gumbel, np.finfo(np.float64).min)


def _best(ranked: Scores, count: int) -> Mask:
    """[N], the `count` eligible ones with the largest keys."""
    keys = np.where(ranked.eligible, ranked.keys, -np.inf)
    best = np.zeros(len(keys), dtype=bool)
    best[np.argsort(-keys, kind="stable")[:count]] = True
    return best & ranked.eligible


def _spread(column: NDArray[Any], rows: Mask, elsewhere: Any) -> NDArray[Any]:
    """A column of the chosen rows at their places in the whole table."""
    whole = np.full(len(rows), elsewhere, dtype=column.dtype)
    whole[rows] = column
    return whole
