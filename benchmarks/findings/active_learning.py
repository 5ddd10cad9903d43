"""Which pairs are worth a label? Acquisition strategies against random choice, in miniature.

The pico task with a global reward (c0) and a contextual one (c1). Each round the policy writes two responses behind
each of 16 prompts per label, a strategy chooses the pairs, an oracle that errs in 5 % of the pairs labels them, and a
policy is trained from the base on all labels so far: the loop of Muldrew et al. 2024 (arXiv:2402.08114). Scores and
choice are the package's. Arms of a seed share reward, prompts, sampling, oracle and test, and every round up to the
one in which their choices part.

Four studies, kept side by side in the results: the replication, with tests that were stated beforehand, and with what
the exploration named, which is confirmed on these seeds (`--confirm`: that alone); `--explore`, many strategies on a
few other seeds, to name some; `--again`, what led on the seeds of the replication, on fresh ones; `--long`, some
strategies with more labels.

    python benchmarks/findings/active_learning.py [--explore | --confirm | --again | --long | --report]
        [--seeds 24] [--first-seed 100] [--to 64] [--arms NAME ...] [--resume]
"""

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import expit

from benchmarks.common import difference, over_seeds, table, verdict, write
from benchmarks.findings.pico import (
    NUM_TOPICS,
    PROMPT_LENGTH,
    RESPONSE_LENGTH,
    FloatArray,
    IntArray,
    Labelled,
    Task,
    make_base,
    pico_run,
    quiet,
    sample,
    text,
    token_distribution,
    train,
)
from dpo_ray.acquisition.choose import Batch, KCenter, Limits, LogDet, Noise, Top, choose
from dpo_ray.acquisition.heads import ensemble_margins
from dpo_ray.acquisition.scores import STRATEGIES, Ask, Features, mutual_information, uniform
from dpo_ray.config import EnsembleConfig

PER_ROUND = 32
OVER = 16
"""Prompts behind which candidates are written, per label."""
PER_PROMPT = 8
"""Responses behind a prompt where every two of them are a candidate."""
NUM_SAMPLES = 8
"""Responses by which a prompt's entropy is estimated."""
TEMPERATURE = 0.7
"""Of the candidates, and of the win rate."""
FLIPS = 0.05
BETA, EPOCHS = 0.2, 15.0
NUM_TEST = 512
ENSEMBLE = EnsembleConfig()
TASKS = {"c0": False, "c1": True}
"""Task -> whether its reward depends on the topic."""
BOTH = "both"
FAR = -1e4
"""A log-prob that leaves room for any gap, where a gap stands in for the policy's."""

RESULTS = Path(__file__).parents[1] / "results" / "active_learning.json"

METRICS = {
    "true_reward": "true reward, SD",
    "win_rate": "win rate, points",
    "reward_area": "area of true reward, SD",
    "win_area": "area of win rate, points",
    "sequence_kl": "KL, nats",
    "agreement": "agreement",
    "gap": "true gap of the chosen, SD",
}
AREAS = {"reward_area": ("true_reward", 0.0), "win_area": ("win_rate", 50.0)}
"""Area -> the curve it is under, and where that begins: the reference's own value."""


class Pool(NamedTuple):
    """Pairs of responses that may be chosen."""

    ids: npt.NDArray[np.str_]  # [N], names of their contents
    prompts: IntArray  # [N, 4]
    first: IntArray  # [N, 12]
    second: IntArray  # [N, 12]


def pool_of(prompts: IntArray, first: IntArray, second: IntArray) -> Pool:
    """Without pairs of equal responses, which no label tells apart, and each content once."""
    ids = content_ids(prompts, first, second)
    _, rows = np.unique(ids, return_index=True)
    rows = rows[(first[rows] != second[rows]).any(axis=1)]
    return Pool(ids[rows], prompts[rows], first[rows], second[rows])


def content_ids(prompts: IntArray, first: IntArray, second: IntArray) -> npt.NDArray[np.str_]:
    """[N], the same whichever response comes first."""

    def name(prompt: IntArray, *responses: IntArray) -> str:
        sides = sorted(text(response) for response in responses)
        return hashlib.blake2b("\n".join([text(prompt), *sides]).encode(), digest_size=8).hexdigest()

    return np.array([name(*row) for row in zip(prompts, first, second, strict=True)])


def oracle_prefers_first(task: Task, pool: Pool) -> npt.NDArray[np.bool_]:
    """[N]; the errors go by seed and content, so that all who ask about a pair are told the same."""
    gap = task.reward(pool.prompts, pool.first) - task.reward(pool.prompts, pool.second)
    errs = uniform(pool.ids, task.seed, "oracle") < FLIPS
    return np.asarray((gap > 0) ^ errs)


class State:
    """What a policy trained on these labels is; the reference where there are none."""

    def __init__(self, labelled: Labelled, ids: frozenset[str], model: Any, metrics: dict[str, float]) -> None:
        self.labelled, self.ids, self.model, self.metrics = labelled, ids, model, metrics


class Candidates:
    """Columns of `Features` for a pool, each computed when it is first asked for."""

    def __init__(self, task: Task, state: State, pool: Pool, seed: int) -> None:
        self._task, self._state, self.pool, self._seed = task, state, pool, seed
        self.labelled_ids = state.ids

    def column(self, name: str) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = getattr(self, name)
        return found

    @cached_property
    def policy_logps(self) -> FloatArray:
        return self._both(lambda *texts: response_logps(self._state.model, *texts))

    @cached_property
    def reference_logps(self) -> FloatArray:
        return self._both(lambda *texts: response_logps(self._task.reference, *texts))

    @cached_property
    def gaps(self) -> FloatArray:
        """[N], implicit margin over beta."""
        ratios = self.policy_logps - self.reference_logps
        return np.asarray(ratios[:, 0] - ratios[:, 1])

    @cached_property
    def sample_logps(self) -> FloatArray:
        prompts, of_pair = np.unique(self.pool.prompts, axis=0, return_inverse=True)
        sampled = sample(self._state.model, np.repeat(prompts, NUM_SAMPLES, axis=0), seed=self._seed)
        drawn = sampled.log_probs.gather(2, torch.from_numpy(sampled.responses)[..., None]).sum((1, 2))
        return drawn.double().numpy().reshape(-1, NUM_SAMPLES)[of_pair.ravel()]

    @cached_property
    def hidden(self) -> FloatArray:
        return self._both(lambda *texts: response_states(self._state.model, *texts))

    @cached_property
    def prompt_hidden(self) -> FloatArray:
        with torch.no_grad():
            states = self._state.model.model(input_ids=torch.from_numpy(self.pool.prompts)).last_hidden_state
        return np.asarray(states[:, -1].double().numpy())

    @cached_property
    def labelled_hidden(self) -> FloatArray:
        """[L, 2, D], of the labelled pairs, chosen first, under the same policy."""
        labelled = self._state.labelled
        sides = (labelled.chosen, labelled.rejected)
        return np.stack([response_states(self._state.model, labelled.prompts, side) for side in sides], axis=1)

    @cached_property
    def head_margins(self) -> FloatArray:
        return ensemble_margins(self.labelled_hidden, self.hidden, ENSEMBLE, self._seed)

    @cached_property
    def gold_gap(self) -> FloatArray:
        return self._task.reward(self.pool.prompts, self.pool.first) - self._task.reward(
            self.pool.prompts, self.pool.second
        )

    def _both(self, of: Callable[[IntArray, IntArray], FloatArray]) -> FloatArray:
        return np.stack([of(self.pool.prompts, side) for side in (self.pool.first, self.pool.second)], axis=1)


@torch.no_grad()
def response_logps(model: Any, prompts: IntArray, responses: IntArray) -> FloatArray:
    """[N], summed, nats."""
    log_probs = token_distribution(model, np.concatenate([prompts, responses], axis=1))
    drawn = log_probs.gather(2, torch.from_numpy(responses)[..., None])
    return np.asarray(drawn.double().sum((1, 2)).numpy())


@torch.no_grad()
def response_states(model: Any, prompts: IntArray, responses: IntArray) -> FloatArray:
    """[N, D], mean of the last hidden states of a response's tokens."""
    if not len(prompts):
        return np.zeros((0, model.config.hidden_size))
    ids = torch.from_numpy(np.concatenate([prompts, responses], axis=1))
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, PROMPT_LENGTH:]
    return np.asarray(states.double().mean(1).numpy())


Columns = dict[str, npt.NDArray[Any]]
View = Callable[[Candidates], Columns]


class Arm(NamedTuple):
    """A way to choose."""

    strategy: str
    batch: Batch = Top()
    options: Mapping[str, Any] = {}
    view: View = lambda candidates: {}
    """Columns in place of the ones computed."""
    pool: Literal["policy", "reference", "all_pairs"] = "policy"
    """Who writes two responses behind each prompt; `all_pairs`: the policy, as many in all, but 8 behind each of fewer
    prompts, of which every two are a candidate."""
    limits: Limits = Limits()
    start: Literal["afresh", "labelled"] = "afresh"
    """Whether a greedy rule sees the labels of earlier rounds as chosen already."""


def gaps_as(gaps: FloatArray) -> Columns:
    """Columns by which these gaps [N] are the implicit margins, so that `certainty` ranks by them."""
    flat = np.full((len(gaps), 2), FAR)
    return {"policy_logps": flat + np.stack([gaps / 2, -gaps / 2], axis=1), "reference_logps": flat}


def frozen(candidates: Candidates) -> Columns:
    """As if the policy were the reference still."""
    return {"policy_logps": candidates.reference_logps}


def shuffled(candidates: Candidates) -> Columns:
    """Every pair with the log-probs of another."""
    order = np.argsort(uniform(candidates.pool.ids, 0, "shuffle"))
    return {"policy_logps": candidates.policy_logps[order], "reference_logps": candidates.reference_logps[order]}


def head_gaps(spreads: float) -> View:
    """The ensemble's mean margin, widened (or narrowed) by so many of its deviations: a bound of the predicted gap."""

    def view(candidates: Candidates) -> Columns:
        margins = candidates.head_margins
        return gaps_as(np.maximum(np.abs(margins.mean(1)) + spreads * margins.std(1, ddof=1), 0))

    return view


def gap_times_information(candidates: Candidates) -> Columns:
    """Predicted gap times what the ensemble disagrees about it."""
    return gaps_as(candidates.head_margins.mean(1) * np.sqrt(mutual_information(candidates.head_margins)))


def linear_gaps(spreads: float, precision: float = 0.1) -> View:
    """Bound of the gap by Bayesian logistic regression on hidden state differences; before any label it is by their
    length alone."""

    def view(candidates: Candidates) -> Columns:
        states, known = candidates.hidden, candidates.labelled_hidden
        size = np.concatenate([states, known]).reshape(-1, states.shape[2]).std(0) * np.sqrt(2 * states.shape[2])
        vectors, labelled = (states[:, 0] - states[:, 1]) / size, (known[:, 0] - known[:, 1]) / size
        mean, covariance = logistic_posterior(labelled, precision)
        deviation = np.sqrt(np.einsum("nd,de,ne->n", vectors, covariance, vectors))
        return gaps_as(np.maximum(np.abs(vectors @ mean) + spreads * deviation, 0))

    return view


def logistic_posterior(vectors: FloatArray, precision: float) -> tuple[FloatArray, FloatArray]:
    """Mode [D] and Laplace covariance [D, D] of w, where every w @ vectors[i] was preferred to its negative.

    The prior is normal of this precision.
    """
    width = vectors.shape[1]
    mode, ridge = np.zeros(width), precision * np.eye(width)
    for _ in range(50):
        p = expit(vectors @ mode)
        information = (vectors * (p * (1 - p))[:, None]).T @ vectors + ridge
        move = np.linalg.solve(information, vectors.T @ (1 - p) - precision * mode)
        mode = mode + move / max(1.0, float(np.abs(vectors @ move).max(initial=0.0)))
        if np.abs(move).max() < 1e-9:
            break
    return mode, np.linalg.inv(information)


REPLICATED = {
    "random": Arm("random"),
    "offline_random": Arm("offline_random", pool="reference"),
    "certainty": Arm("certainty"),
    "uncertainty": Arm("uncertainty"),
    "entropy": Arm("entropy"),
    "entropy_then_certainty": Arm("entropy_then_certainty"),
    "bald": Arm("bald"),
    "d_optimal": Arm("d_optimal"),
    "oracle_gap": Arm("oracle_gap"),
    "certainty, frozen policy": Arm("certainty", view=frozen),
    "certainty, shuffled": Arm("certainty", view=shuffled),
}
ONE = Limits(per_prompt=1)
IDEAS = {
    "certainty, softrank": Arm("certainty", Noise("softrank")),
    "certainty, k_center": Arm("certainty", KCenter()),
    "certainty, log_det": Arm("certainty", LogDet()),
    "certainty, log_det of 8": Arm("certainty", LogDet(over=8)),
    "certainty, log_det after labelled": Arm("certainty", LogDet(), start="labelled"),
    "random, k_center": Arm("random", KCenter()),
    "random, log_det": Arm("random", LogDet()),
    "random, log_det of all": Arm("random", LogDet(over=OVER)),
    "bald, power": Arm("bald", Noise("power")),
    "bald, log_det": Arm("bald", LogDet()),
    "bald, log_det after labelled": Arm("bald", LogDet(), start="labelled"),
    "d_optimal after labelled": Arm("d_optimal", start="labelled"),
    "bal_pm": Arm("bal_pm"),
    "d_optimal, ridge 1": Arm("d_optimal", options={"ridge": 1.0}),
    "heads' gap": Arm("certainty", view=head_gaps(0.0)),
    "heads' gap, log_det": Arm("certainty", LogDet(), view=head_gaps(0.0)),
    "heads' upper bound, log_det": Arm("certainty", LogDet(), view=head_gaps(1.0)),
    "heads' gap x bald, log_det": Arm("certainty", LogDet(), view=gap_times_information),
    "linear gap": Arm("certainty", view=linear_gaps(0.0)),
    "linear upper bound": Arm("certainty", view=linear_gaps(1.0)),
    "all pairs: certainty, log_det": Arm("certainty", LogDet(), pool="all_pairs", limits=ONE),
}
"""Noise and diversity on what the policy, an ensemble or a Bayesian regression on hidden states says of a pair."""

ARMS = REPLICATED | IDEAS
CONFIRMED = ("certainty, log_det", "bald, log_det")
"""Named by the exploration."""
LEADING = ("d_optimal", "bald, log_det")
"""Ahead on the seeds of the replication, where they were two of many; to be tested alone on fresh ones."""

STUDIES = {
    "explore": ("random", "oracle_gap", "certainty", "bald", "d_optimal", *IDEAS),
    "replicate": (*REPLICATED, *CONFIRMED),
    "again": ("random", "oracle_gap", *LEADING),
    "long": ("random", "oracle_gap", "certainty", "uncertainty", "d_optimal", *CONFIRMED),
}
DEFAULTS = {"explore": (0, 5, 64), "replicate": (100, 24, 64), "again": (200, 24, 64), "long": (100, 12, 128)}
"""First seed, seeds, labels."""


class Learner:
    """Trains a policy from the base on some labels, and measures it."""

    def __init__(self, task: Task, storage: Path) -> None:
        self._task, self._storage, self._count = task, storage, 0
        self._rivals = task.reward(task.test_prompts, self._samples(task.reference, 10**6 + task.seed))

    def __call__(self, labelled: Labelled) -> tuple[Any, dict[str, float]]:
        """The model, and `Task.measure` with the win rate at the candidates' temperature."""
        task = self._task
        self._count += 1
        path = labelled.write(self._storage / f"labels-{self._count}.jsonl")
        settings = {"loss__beta": BETA, "train__epochs": EPOCHS}
        model = train(pico_run(task, self._storage, [path], None, len(labelled.prompts), **settings)).model
        rewards = task.reward(task.test_prompts, self._samples(model, task.seed))
        wins = float((np.sign(rewards - self._rivals) + 1).mean() / 2)
        return model, task.measure(model) | {"win_rate": wins}

    def _samples(self, model: Any, seed: int) -> IntArray:
        return sample(model, self._task.test_prompts, seed=seed, temperature=TEMPERATURE).responses


class Study:
    """All arms of a seed on a task. Trainings and pools that arms have in common are made once.

    Args:
        learn: Labels -> a policy trained on them, and its metrics.
        to: Labels in all.
    """

    def __init__(self, task: Task, learn: Callable[[Labelled], tuple[Any, dict[str, float]]], to: int) -> None:
        self._task, self._learn, self._to = task, learn, to
        nothing = Labelled(*(np.zeros((0, n), np.int64) for n in (PROMPT_LENGTH, RESPONSE_LENGTH, RESPONSE_LENGTH)))
        self._states = {frozenset[str](): State(nothing, frozenset(), task.reference, {})}
        self._pools: dict[tuple[Any, ...], Candidates] = {}

    def run(self, arm: Arm) -> list[dict[str, float]]:
        """Metrics after each round; `agreement` is of the policy that chose, so the first round has none."""
        state, rows = self._states[frozenset()], []
        for number in range(1, self._to // PER_ROUND + 1):
            candidates = self._candidates(state, number, arm)
            ask = Ask(PER_ROUND, seed=1000 * self._task.seed + number)
            rows_chosen = chosen_rows(arm, candidates, ask)
            row = {"m": number * PER_ROUND, "gap": float(np.abs(candidates.gold_gap[rows_chosen]).mean())}
            prefers_first = oracle_prefers_first(self._task, candidates.pool)[rows_chosen]
            if number > 1:
                row["agreement"] = agreement(candidates.gaps[rows_chosen], prefers_first)
            state = self._next(state, candidates.pool, rows_chosen, prefers_first)
            rows.append(row | state.metrics)
        return rows

    def _candidates(self, state: State, number: int, arm: Arm) -> Candidates:
        key = (state.ids, number, arm.pool, arm.start)
        if key not in self._pools:
            writer = self._task.reference if arm.pool == "reference" else state.model
            pool = written(self._task, writer, number, of_all_pairs=arm.pool == "all_pairs")
            fresh = np.flatnonzero(~np.isin(pool.ids, sorted(state.ids)))
            pool = Pool(*(column[fresh] for column in pool))
            if arm.start == "labelled":
                known = Pool(content_ids(*state.labelled), *state.labelled)
                pool = Pool(*(np.concatenate(columns) for columns in zip(pool, known, strict=True)))
            self._pools[key] = Candidates(self._task, state, pool, 1000 * self._task.seed + number)
        return self._pools[key]

    def _next(self, state: State, pool: Pool, rows: IntArray, prefers_first: npt.NDArray[np.bool_]) -> State:
        """Trained from the base on all labels so far, in the order of their contents."""
        ids = state.ids | set(pool.ids[rows].tolist())
        if ids not in self._states:
            is_first = prefers_first[:, None]
            new = Labelled(
                pool.prompts[rows],
                np.where(is_first, pool.first[rows], pool.second[rows]),
                np.where(is_first, pool.second[rows], pool.first[rows]),
            )
            labelled = Labelled(*(np.concatenate(parts) for parts in zip(state.labelled, new, strict=True)))
            order = np.argsort(content_ids(*labelled))
            labelled = Labelled(*(part[order] for part in labelled))
            self._states[ids] = State(labelled, ids, *self._learn(labelled))
        return self._states[ids]


def written(task: Task, writer: Any, number: int, *, of_all_pairs: bool) -> Pool:
    """Two responses behind each of the round's prompts; or as many in all behind the first of these prompts, and every
    pair of a prompt's responses."""
    rng = np.random.default_rng([2, task.seed, number])
    count, each = OVER * PER_ROUND, PER_PROMPT if of_all_pairs else 2
    prompts = task.grammar.prompts(range(NUM_TOPICS), count, rng)[: 2 * count // each]
    behind = np.repeat(prompts, each, axis=0)
    responses = sample(writer, behind, seed=int(rng.integers(2**31)), temperature=TEMPERATURE).responses
    first, second = np.triu_indices(each, k=1)
    by_prompt = responses.reshape(len(prompts), each, -1)
    return pool_of(
        np.repeat(prompts, len(first), axis=0),
        by_prompt[:, first].reshape(-1, RESPONSE_LENGTH),
        by_prompt[:, second].reshape(-1, RESPONSE_LENGTH),
    )


def chosen_rows(arm: Arm, candidates: Candidates, ask: Ask) -> IntArray:
    """[k], in the order of choosing."""
    pool = candidates.pool
    needs = {*STRATEGIES[arm.strategy].needs, *(["hidden"] if isinstance(arm.batch, KCenter | LogDet) else [])}
    given = arm.view(candidates)
    columns = given | {name: candidates.column(name) for name in needs - given.keys()}
    features = Features(
        pool.ids, [text(prompt) for prompt in pool.prompts], np.full(len(pool.ids), "policy"), **columns
    )
    selection = choose(
        features,
        arm.strategy,
        ask,
        options=arm.options,
        batch=arm.batch,
        limits=arm.limits,
        labelled=candidates.labelled_ids,
    )
    row_of = {pair_id: row for row, pair_id in enumerate(pool.ids.tolist())}
    return np.array([row_of[choice.pair_id] for choice in selection.choices])


def agreement(gaps: FloatArray, prefers_first: npt.NDArray[np.bool_]) -> float:
    """Share of pairs whose implicit margin has the sign of the oracle's answer; a margin of 0 counts half."""
    return float(((np.sign(gaps) * np.where(prefers_first, 1, -1) + 1) / 2).mean())


def area(sizes: Sequence[int], values: Sequence[float], at_zero: float) -> float:
    """Area under the curve from no label on, by trapezia, over its width: the mean height."""
    return float(np.trapezoid([at_zero, *values], [0, *sizes]) / sizes[-1])


Row = dict[str, Any]
"""Task, seed, arm, m, and the metrics there."""


def kept() -> list[Row]:
    """What the results hold."""
    found: list[Row] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    return found


def measure(base: Path, options: argparse.Namespace) -> None:
    """Arms of a study on its seeds. What is done is kept after each seed and task; the other studies stay as they are.

    With `resume`, so does what the study has, and arms that are done for a seed are not run again.
    """
    arms = options.arms or STUDIES[options.study]
    before = [row for row in kept() if row["study"] != options.study or options.resume]
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for task, contextual in TASKS.items():
            told = {"study": options.study, "task": task, "seed": seed}
            done = {row["arm"] for row in before if told.items() <= row.items() and row["m"] == options.to}
            with tempfile.TemporaryDirectory() as folder:
                drawn = Task(base, seed, contextual=contextual, num_test=options.test_prompts)
                study = Study(drawn, Learner(drawn, Path(folder)), options.to)
                found = [(name, study.run(ARMS[name])) for name in arms if name not in done]
            before += [told | {"arm": name} | rounded(row) for name, rows in found for row in rows]
            RESULTS.write_text(json.dumps({"runs": before}, indent=1) + "\n")
        print(f"{options.study}: seed {seed}, {seed - options.first_seed + 1}/{options.seeds}", file=sys.stderr)


def rounded(row: Mapping[str, float]) -> Row:
    return {name: value if isinstance(value, int) else round(value, 6) for name, value in row.items()}


class Results:
    """The rows of a study, by what they are; of the seeds for which every arm is done in both tasks."""

    def __init__(self, rows: Sequence[Row], study: str, arms: Sequence[str]) -> None:
        mine = [row for row in rows if row["study"] == study and row["arm"] in arms]
        done: dict[int, set[tuple[str, str]]] = {}
        for row in mine:
            done.setdefault(row["seed"], set()).add((row["task"], row["arm"]))
        self.arms = [arm for arm in arms if any(row["arm"] == arm for row in mine)]
        self.seeds = sorted(seed for seed, found in done.items() if len(found) == len(TASKS) * len(self.arms))
        self.sizes = sorted({row["m"] for row in mine})
        self._rows = {(row["task"], row["arm"], row["m"], row["seed"]): row for row in mine}

    def of(self, metric: str, task: str, arm: str, m: int | None = None) -> list[float]:
        """One value a seed, after the last round if not after another. Win rates are in points; the task `both` is the
        mean of the two."""
        if task == BOTH:
            return [float(np.mean(pair)) for pair in zip(*(self.of(metric, t, arm, m) for t in TASKS), strict=True)]
        if metric in AREAS:
            curve, start = AREAS[metric]
            by_size = zip(*(self.of(curve, task, arm, size) for size in self.sizes), strict=True)
            return [area(self.sizes, values, start) for values in by_size]
        if metric in ("agreement", "gap"):  # of the pairs of all rounds that have one
            rounds = [m for m in self.sizes if metric in self._rows[task, arm, m, self.seeds[0]]]
            return [float(np.mean([self._rows[task, arm, m, seed][metric] for m in rounds])) for seed in self.seeds]
        scale = 100 if metric == "win_rate" else 1
        rows = (self._rows[task, arm, m or self.sizes[-1], seed] for seed in self.seeds)
        return [scale * row[metric] for row in rows]

    def head_room(self, metric: str, task: str, arm: str) -> float:
        """Share of what the oracle's gap gains over random that this arm gains, of means over seeds."""
        arm_mean, random, best = (float(np.mean(self.of(metric, task, name))) for name in (arm, "random", "oracle_gap"))
        return (arm_mean - random) / (best - random)

    def others(self) -> list[str]:
        return [arm for arm in self.arms if arm != "random"]


def values_table(results: Results, task: str) -> str:
    rows = []
    for arm in results.arms:
        early = [over_seeds(results.of("true_reward", task, arm, size)) for size in results.sizes[:-1]]
        rows.append([arm, *early, *(over_seeds(results.of(name, task, arm), DIGITS.get(name, 2)) for name in METRICS)])
    early = [f"true reward at {size}, SD" for size in results.sizes[:-1]]
    return table(["", *early, *METRICS.values()], rows)


DIGITS = {"win_rate": 1, "win_area": 1, "agreement": 3}


def contrast_table(results: Results, arms: Sequence[str], metrics: Sequence[str]) -> str:
    """Each arm against random, paired by seed; Holm over all rows of a metric, both tasks together."""
    from dpo_ray.comparisons import holm, paired_t_test

    rows = [[task, arm] for task in TASKS for arm in arms]
    for metric in metrics:
        tests = [paired_t_test(results.of(metric, *row[:2]), results.of(metric, row[0], "random")) for row in rows]
        for row, test, adjusted in zip(rows, tests, holm([test.p_value for test in tests]), strict=True):
            told = difference(results.of(metric, *row[:2]), results.of(metric, row[0], "random"), DIGITS.get(metric, 2))
            row += [
                told,
                f"{test.p_value:.2g}",
                f"{adjusted:.2g}",
                f"{test.wins}/{test.losses}, {test.sign_p_value:.2g}",
            ]
    head = [name for metric in metrics for name in (METRICS[metric], "p", "Holm", "up/down, sign test p")]
    return table(["", "", *head], rows)


def verdict_table(results: Results) -> str:
    """What was stated beforehand (science notes, D.5), and whether it holds."""
    from dpo_ray.comparisons import p_greater

    rows = []

    def claim(text: str, task: str, metric: str, arms: tuple[str, str], alpha: float, margin: float = 0.0) -> None:
        first, second = (results.of(metric, task, arm) for arm in arms)
        p = p_greater(first, second, margin)
        told = difference(first, second, DIGITS.get(metric, 2))
        rows.append([f"{task}: {text}", told, f"{p:.2g}", verdict(p < alpha)])

    for task in TASKS:
        for metric, name in (("true_reward", "true reward"), ("win_rate", "win rate")):
            text = f"oracle_gap less random, {name}: above 0, p < 0.001"
            claim(text, task, metric, ("oracle_gap", "random"), 0.001)
    text = "random less entropy, win rate: above -2 points (entropy gains less than 2), p < 0.05"
    claim(text, "c0", "win_rate", ("random", "entropy"), 0.05, -2)
    for task in TASKS:
        for arms in (("certainty", "random"), ("random", "uncertainty")):
            text = f"{arms[0]} less {arms[1]}, agreement on the newly chosen: above 0, p < 0.001"
            claim(text, task, "agreement", arms, 0.001)
    text = "certainty less random, win rate: above -5 points (not inferior), p < 0.05"
    claim(text, "c0", "win_rate", ("certainty", "random"), 0.05, -5)

    online, offline = (results.of("true_reward", "c0", arm) for arm in ("random", "offline_random"))
    rows.append(
        [
            "c0: random less offline_random, true reward: at least 0 in the mean (p is of above 0)",
            difference(online, offline),
            f"{p_greater(online, offline):.2g}",
            verdict(float(np.mean(online)) >= float(np.mean(offline))),
        ]
    )
    frozen_arm = "certainty, frozen policy"
    same = all(results.of(m, task, frozen_arm) == results.of(m, task, "random") for task in TASKS for m in METRICS)
    rows.append(
        ["control: certainty of a policy that is the reference chooses what random does", "", "", verdict(same)]
    )
    return table(["stated beforehand", "found", "one-sided p", ""], rows)


def head_room_table(results: Results, metrics: Sequence[str]) -> str:
    """All arms by the share of the head-room they take in true reward, mean of the tasks; no test."""
    shares = {arm: np.mean([results.head_room("true_reward", task, arm) for task in TASKS]) for arm in results.others()}
    rows = []
    for arm in sorted(shares, key=lambda name: -shares[name]):
        told = [
            difference(results.of(metric, task, arm), results.of(metric, task, "random"), DIGITS.get(metric, 2))
            for task in TASKS
            for metric in metrics
        ]
        rows.append([arm, f"{shares[arm]:+.0%}", *told])
    head = [f"{task}: {METRICS[metric]}" for task in TASKS for metric in metrics]
    return table(["", "share of head-room", *head], rows)


def confirmation_table(results: Results, arms: Sequence[str], tasks: Sequence[str] = tuple(TASKS)) -> str:
    """Each named arm against random on fresh seeds; intervals that hold for all rows of a metric at once."""
    from dpo_ray.comparisons import holm, paired_t_test

    cases = [(task, arm) for task in tasks for arm in arms]
    level = 1 - 0.05 / len(cases)
    rows = [[task, arm] for task, arm in cases]
    for metric in ("true_reward", "win_rate"):
        tests = [
            paired_t_test(results.of(metric, task, arm), results.of(metric, task, "random"), level=level)
            for task, arm in cases
        ]
        adjusted = holm([test.p_value for test in tests])
        digits = DIGITS.get(metric, 2)
        for row, test, p in zip(rows, tests, adjusted, strict=True):
            mean, low, high = (f"{value:+.{digits}f}" for value in test.difference)
            found = "not told from random" if p >= 0.05 else "above random" if test.difference.estimate > 0 else "below"
            share = results.head_room(metric, row[0], row[1])
            row += [f"{mean} ({low} to {high})", f"{p:.2g}", f"{test.wins}/{test.losses}", f"{share:.0%}", found]
    names = ("", "Holm p", "up/down", "of head-room", "verdict")
    head = [name or METRICS[metric] for metric in ("true_reward", "win_rate") for name in names]
    return table(["", "", *head], rows)


def report(rows: Sequence[Row]) -> str:
    """The tables of the studies that the results hold."""
    parts = []
    replication = Results(rows, "replicate", list(REPLICATED))
    if len(replication.seeds) > 1:
        last = replication.sizes[-1]
        main = ["true_reward", "win_rate", "reward_area", "win_area"]
        compared = [arm for arm in replication.others() if arm != "certainty, frozen policy"]
        parts += [
            f"**Replication**, {len(replication.seeds)} seeds, {PER_ROUND} labels a round to {last}, {OVER} prompts "
            f"with two candidates per label, {FLIPS:.0%} of labels wrong. Means over seeds with 95 % intervals; "
            "differences are paired by seed. Agreement is of the implicit reward with the oracle's answer on newly "
            "chosen pairs, under the policy that chose them, from the second round on.",
            verdict_table(replication),
            f"**Against random**, after {last} labels; the first round is random for what is undecided there.",
            contrast_table(replication, compared, main[:2]),
            contrast_table(replication, compared, main[2:]),
            *(f"**{task}**\n\n{values_table(replication, task)}" for task in TASKS),
        ]
    exploration = Results(rows, "explore", STUDIES["explore"])
    if len(exploration.seeds) > 1:
        parts += [
            f"**Exploration**, {len(exploration.seeds)} other seeds: less random, by the share of what `oracle_gap` "
            "gains over random in true reward, mean of the tasks. The best of many is flattered by having been the "
            "best: no test, no verdict.",
            head_room_table(exploration, ("true_reward", "win_rate", "sequence_kl")),
        ]
    confirmation = Results(rows, "replicate", ("random", "oracle_gap", *CONFIRMED))
    if CONFIRMED and set(CONFIRMED) <= set(confirmation.arms) and len(confirmation.seeds) > 1:
        parts += [
            f"**Confirmation** of what the exploration named, on the {len(confirmation.seeds)} seeds of the "
            "replication, which it has not seen: less random; p by Holm over the rows of a metric, intervals by "
            "Bonferroni over them.",
            confirmation_table(confirmation, CONFIRMED),
        ]
    again = Results(rows, "again", STUDIES["again"])
    if len(again.seeds) > 1:
        parts += [
            f"**What led there, again**, on {len(again.seeds)} fresh seeds: less random. The test is of the mean of "
            "both tasks, Holm and Bonferroni over its rows; each task alone is below it.",
            confirmation_table(again, LEADING, (BOTH,)),
            confirmation_table(again, LEADING),
            *(f"**{task}, again**\n\n{values_table(again, task)}" for task in TASKS),
        ]
    long = Results(rows, "long", STUDIES["long"])
    if len(long.seeds) > 1:
        parts += [
            f"**More labels**, {len(long.seeds)} of the seeds of the replication, to {long.sizes[-1]} labels: less "
            "random. A description.",
            head_room_table(long, ("true_reward", "win_rate", "sequence_kl", "agreement")),
            *(f"**{task}, to {long.sizes[-1]} labels**\n\n{values_table(long, task)}" for task in TASKS),
        ]
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    study = parser.add_mutually_exclusive_group()
    for name in ("explore", "confirm", "again", "long", "report"):
        study.add_argument(f"--{name}", dest="study", action="store_const", const=name, default="replicate")
    parser.add_argument("--seeds", type=int, help="24; --explore 5, --long 12")
    parser.add_argument("--first-seed", type=int, help="100; --explore 0, --again 200")
    parser.add_argument("--to", type=int, help="labels, a multiple of 32: 64; --long 128")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS))
    parser.add_argument("--resume", action="store_true", help="keep what the results hold of this study, and go on")
    parser.add_argument("--test-prompts", type=int, default=NUM_TEST)
    parser.add_argument("--base", type=Path, help="folder of the base model, made there if it is not; null: not kept")
    options = parser.parse_args()
    if options.study != "report":
        if options.study == "confirm":
            options.study, options.arms = "replicate", options.arms or ["random", "oracle_gap", *CONFIRMED]
        asked = (options.first_seed, options.seeds, options.to)
        options.first_seed, options.seeds, options.to = (
            default if given is None else given for given, default in zip(asked, DEFAULTS[options.study], strict=True)
        )
        quiet()
        with tempfile.TemporaryDirectory() as folder:
            measure(make_base(options.base or Path(folder) / "base"), options)
    rows = kept()
    write("active_learning", {}, rows, report(rows))


if __name__ == "__main__":
    main()
