"""What is known of candidates before anyone labels them: from models, through the log-prob store, to `Features`.

One pass scores the policy and the reference together; what the store has is not computed again, by any round, strategy
or restart. Which columns are filled follows from the strategy: `random` costs nothing.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from dpo_ray.acquisition.answers import plain_text
from dpo_ray.acquisition.heads import ensemble_margins
from dpo_ray.acquisition.oracles import make_oracle
from dpo_ray.acquisition.samples import sampled
from dpo_ray.acquisition.scores import STRATEGIES, Features
from dpo_ray.config import AcquireConfig, RunConfig
from dpo_ray.data.encode import PairEncoder
from dpo_ray.errors import InputError
from dpo_ray.models import ModelSource
from dpo_ray.pairs import Candidate, Ids, TokenizedPair
from dpo_ray.reference import ResponseValue, View, response_key, score_responses, store_of

Progress = Callable[[str, int, int], None]


class Gathered(NamedTuple):
    """Features of the candidates that have them, in the order of their ids, and why others have none."""

    features: Features
    errors: dict[str, str]
    """candidate_id -> reason."""

    computed: int
    """Log-probs that were not in the store."""


class Encoded(NamedTuple):
    """Candidates as token ids; `chosen_ids` are the first response's."""

    candidates: dict[str, Candidate]
    pairs: dict[str, TokenizedPair]

    @classmethod
    def of(cls, candidates: Iterable[Candidate], encoder: PairEncoder) -> "Encoded":
        """Those that can be encoded."""
        by_pair = {candidate.labelled(is_first=True).pair_id: candidate for candidate in candidates}
        pairs = encoder.encode([candidate.labelled(is_first=True) for candidate in by_pair.values()]).pairs
        found = {by_pair[pair.pair_id].candidate_id: pair for pair in pairs}
        return cls({c.candidate_id: c for c in by_pair.values() if c.candidate_id in found}, found)


class Models(NamedTuple):
    """Whose opinion counts."""

    policy: ModelSource
    reference: ModelSource


def columns_for(acquire: AcquireConfig) -> set[str]:
    """The columns of `Features` that a recipe's strategy, batch rule and limits read.

    Raises:
        InputError: There is no such strategy.
    """
    if acquire.strategy not in STRATEGIES:
        raise InputError(f"`acquire.strategy`: no strategy `{acquire.strategy}`; there are {', '.join(STRATEGIES)}")
    needed = set(STRATEGIES[acquire.strategy].needs)
    if acquire.options.get("per_token"):
        needed |= {"num_tokens", "sample_tokens"} if "sample_logps" in needed else {"num_tokens"}
    batch = acquire.batch
    if batch.kind in ("k_center", "log_det") or batch.per_cluster is not None or batch.max_cosine is not None:
        needed.add("hidden")
    if batch.max_jaccard is not None:
        needed.add("text")
    return needed


def gather(
    encoded: Encoded,
    models: Models,
    run: RunConfig,
    columns: Collection[str],
    *,
    labels: Mapping[str, bool],
    seed: int,
    gpus_per_actor: float,
    on_progress: Progress = lambda text, done, total: None,
) -> Gathered:
    """Fill the columns that are asked for.

    Args:
        run: A resolved recipe with an `acquire` section.
        labels: Known labels, candidate_id -> whether the first response is the better one: what heads learn from.
        seed: Of heads and samples.

    Raises:
        InputError: A column cannot be had from this pool.
    """
    acquire = run.acquire
    assert acquire is not None
    ids = sorted(encoded.candidates)
    errors: dict[str, str] = {}
    filled: dict[str, Any] = {}
    computed = 0
    if set(columns) & {"sample_logps", "sample_tokens"}:
        prompts = [encoded.pairs[name].prompt_ids for name in ids]
        samples = sampled(prompts, models.policy, run, seed, gpus_per_actor, on_progress)
        has_any = ~np.isnan(samples["sample_logps"]).all(axis=1)
        errors |= {name: "no response could be sampled" for name, has in zip(ids, has_any, strict=True) if not has}
        ids = [name for name in ids if name not in errors]
        filled |= {name: column[has_any] for name, column in samples.items()}
    if set(columns) & {"policy_logps", "reference_logps", "num_tokens", "hidden", "prompt_hidden", "head_margins"}:
        read = _read(encoded, ids, models, run, columns, gpus_per_actor, on_progress)
        is_read = np.isin(ids, read.ids)
        filled = {name: column[is_read] for name, column in filled.items()} | read.columns
        ids, errors, computed = read.ids, errors | read.errors, read.computed
        if "head_margins" in columns:
            filled["head_margins"] = _head_margins(ids, filled["hidden"], labels, acquire, seed)
    candidates = [encoded.candidates[name] for name in ids]
    if "gold_gap" in columns:
        filled["gold_gap"] = gold_gaps(candidates, run)
    if "text" in columns:
        filled["text"] = ["\n".join(map(plain_text, (c.prompt, c.first, c.second))) for c in candidates]
    if not ids:
        raise InputError(f"no candidate could be scored; the first: {next(iter(errors.values()))}")
    features = Features(
        pair_id=np.array(ids),
        prompt_id=np.array([candidate.prompt_id for candidate in candidates]),
        source=np.array([candidate.source for candidate in candidates]),
        **filled,
    )
    return Gathered(features, errors, computed)


class _Read(NamedTuple):
    ids: list[str]
    columns: dict[str, Any]
    errors: dict[str, str]
    computed: int


def _read(
    encoded: Encoded,
    ids: Sequence[str],
    models: Models,
    run: RunConfig,
    columns: Collection[str],
    gpus_per_actor: float,
    on_progress: Progress,
) -> _Read:
    """What models say of the responses, from the store and, where it lacks them, from one pass over actors."""
    hidden = bool(set(columns) & {"hidden", "prompt_hidden", "head_margins"})
    policy = View(models.policy, store_of(run, models.policy), hidden=hidden)
    views = [policy]
    if "reference_logps" in columns:
        reference = View(models.reference, store_of(run, models.reference))
        if reference.store != policy.store:
            views.append(reference)
    keys = {name: _keys(encoded.pairs[name]) for name in ids}
    responses: list[tuple[Ids, Ids]] = []
    for name in ids:
        pair = encoded.pairs[name]
        responses += [(pair.prompt_ids, pair.chosen_ids), (pair.prompt_ids, pair.rejected_ids)]
    passes, wrong = score_responses(
        responses, views, run, gpus_per_actor, lambda done, total: on_progress("scoring", done, total)
    )
    errors = {name: wrong[key] for name, both in keys.items() for key in both if key in wrong}
    good = [name for name in ids if name not in errors]
    wanted = {key for name in good for key in keys[name]}
    values = [view.store.read(wanted, hidden=view.hidden) for view in views]

    def logps(of: Mapping[bytes, ResponseValue]) -> Any:
        return np.array([[of[key].logps for key in keys[name]] for name in good]).reshape(-1, 2)

    found: dict[str, Any] = {
        "policy_logps": logps(values[0]),
        "reference_logps": logps(values[-1]),
        "num_tokens": np.array([[values[0][key].num_tokens for key in keys[name]] for name in good]).reshape(-1, 2),
    }
    if hidden:
        states: Any = np.array([[values[0][key].hidden for key in keys[name]] for name in good])
        width = states.shape[-1] // 2
        found |= {"hidden": states[..., :width], "prompt_hidden": states[:, 0, width:]}
    return _Read(good, found, errors, sum(done.computed for done in passes))


def _keys(pair: TokenizedPair) -> tuple[bytes, bytes]:
    return response_key(pair.prompt_ids, pair.chosen_ids), response_key(pair.prompt_ids, pair.rejected_ids)


def _head_margins(
    ids: Sequence[str], hidden: Any, labels: Mapping[str, bool], acquire: AcquireConfig, seed: int
) -> Any:
    """[N, E], of heads that were trained on the labels so far."""
    rows = [row for row, name in enumerate(ids) if name in labels]
    order = [[0, 1] if labels[ids[row]] else [1, 0] for row in rows]
    labelled = np.stack([hidden[row][sides] for row, sides in zip(rows, order, strict=True)]) if rows else hidden[:0]
    return ensemble_margins(torch.as_tensor(labelled), torch.as_tensor(hidden), acquire.ensemble, seed)


def gold_gaps(candidates: Sequence[Candidate], run: RunConfig) -> list[float]:
    """True gaps, as the data hides them, or as the oracle of a simulation would score them.

    Raises:
        InputError: Nobody knows them.
    """
    assert run.acquire is not None
    if all(candidate.gold_gap is not None for candidate in candidates):
        return [float(candidate.gold_gap or 0.0) for candidate in candidates]
    oracle = run.acquire.oracle
    if oracle.kind not in ("function", "reward_model"):
        raise InputError("`oracle_gap` is for simulations: true gaps are neither in the data nor in `acquire.oracle`")
    gaps: dict[str, float] = {}
    signs = {"first": 1.0, "second": -1.0}
    honest = oracle.model_copy(update={"flip": 0.0})
    make_oracle(honest, seed=0, storage=run.storage.path).ask(
        candidates,
        lambda answer: gaps.update({answer.candidate_id: signs.get(answer.preferred, 0.0) * (answer.margin or 0.0)}),
    )
    return [gaps[candidate.candidate_id] for candidate in candidates]
