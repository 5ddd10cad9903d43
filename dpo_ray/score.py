"""`dpo-ray score`: a pool under policy and reference, every score that its features allow, and the ranking.

The log-probs live in the store, so a pass that was broken off goes on, and a second one computes nothing. The table has
the features too: strategies can be compared afterwards without any model (`read_features`).
"""

import dataclasses
import io
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.acquire import check, read_pool
from dpo_ray.acquisition import scores
from dpo_ray.acquisition.answers import plain_text
from dpo_ray.acquisition.choose import choose
from dpo_ray.acquisition.features import Encoded, Models, columns_for, gather
from dpo_ray.acquisition.rounds import batch_rule, limits_of
from dpo_ray.acquisition.samples import written
from dpo_ray.acquisition.scores import STRATEGIES, Ask, Features
from dpo_ray.config import AcquireConfig, RunConfig
from dpo_ray.errors import InputError
from dpo_ray.launch import Display, Silent, check_cluster
from dpo_ray.models import policy_source
from dpo_ray.prepare import model_of, reference_source, resolve
from dpo_ray.storage import Folder

SCORES_FILE, SCORE_SUMMARY_FILE = "scores.parquet", "scores.json"
ALWAYS = ("policy_logps", "reference_logps", "num_tokens", "hidden", "prompt_hidden")


def score_pool(
    run: RunConfig,
    *,
    model: str | None = None,
    entropy: bool = False,
    display: Display | None = None,
    connect: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Score the pool of a recipe and write `scores.parquet` and `scores.json` into its run folder.

    Args:
        model: The policy; a run folder stands for its model. None: the recipe's.
        entropy: Sample responses to each prompt, for the strategies that need its entropy.

    Returns:
        What was done, as in `scores.json`.

    Raises:
        InputError: The recipe, the pool or the cluster does not allow it.
    """
    display = display or Silent()
    began = time.monotonic()
    run = resolve(run)
    acquire = run.acquire or AcquireConfig()
    run = run.model_copy(update={"acquire": acquire})
    check(run, [acquire.strategy])
    folder = Folder(run.folder)
    folder.check_writable()
    connect()
    gpus = check_cluster(run)
    display.phase("reading the pool")
    pool, encoder = read_pool(run)
    base = policy_source(run.model)
    policy = base if model is None else model_of(model, run.model.trust_remote_code)
    models = Models(policy, reference_source(run) or base)
    candidates = pool.candidates
    if pool.prompts:
        candidates = written(pool.prompts, policy, run, encoder, acquire.seed, gpus, display.progress)
    columns = {*ALWAYS, *(columns_for(acquire) - {"head_margins"})}
    columns |= {"sample_logps", "sample_tokens"} if entropy else set()
    if all(candidate.gold_gap is not None for candidate in candidates):
        columns.add("gold_gap")
    display.phase(f"scoring {len(candidates)} candidates")
    gathered = gather(
        Encoded.of(candidates, encoder),
        models,
        run,
        columns,
        labels={},
        seed=acquire.seed,
        gpus_per_actor=gpus,
        on_progress=display.progress,
    )
    texts = {c.candidate_id: [plain_text(text) for text in (c.prompt, c.first, c.second)] for c in candidates}
    table = scored_table(gathered.features, acquire, texts, gathered.errors)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    folder.write(SCORES_FILE, sink.getvalue())
    summary = {
        "scores": f"{folder.path}/{SCORES_FILE}",
        "candidates": len(candidates),
        "scored": len(gathered.features),
        "errors": len(gathered.errors),
        "computed": gathered.computed,
        "strategies": [name.removeprefix("score/") for name in table.column_names if name.startswith("score/")],
        "seconds": round(time.monotonic() - began, 1),
    }
    folder.write_json(SCORE_SUMMARY_FILE, summary)
    return summary


def scored_table(
    features: Features, acquire: AcquireConfig, texts: dict[str, list[str]], errors: dict[str, str]
) -> pa.Table:
    """A row per candidate: texts, every score that the features allow, what the recipe's strategy would choose first,
    in its order (`rank`), the features, and why there are none (`error`)."""
    ask = Ask(acquire.labels_per_round, acquire.seed)
    chosen = choose(
        features,
        acquire.strategy,
        ask,
        options=acquire.options,
        batch=batch_rule(acquire.batch),
        limits=limits_of(acquire.batch),
    )
    ranks = {choice.pair_id: choice.rank for choice in chosen.choices}
    ids = [*features.pair_id.tolist(), *errors]
    blank = [None] * len(errors)
    columns: dict[str, Any] = {
        "candidate_id": ids,
        "prompt": [texts[name][0] for name in ids],
        "first": [texts[name][1] for name in ids],
        "second": [texts[name][2] for name in ids],
        "rank": pa.array([ranks.get(name) for name in ids], pa.int32()),
    }
    for name, strategy in STRATEGIES.items():
        has = all(getattr(features, column) is not None for column in strategy.needs)
        if has and strategy.batch != "density":
            options = acquire.options if name == acquire.strategy else {}
            values = scores.score(name, features, ask, options).values
            columns[f"score/{name}"] = [*values.tolist(), *blank]
    for field in dataclasses.fields(features):
        column = getattr(features, field.name)
        if column is not None and field.name not in ("pair_id", "text"):
            columns[field.name] = [*_listed(column), *blank]
    columns["error"] = [*([None] * len(features)), *errors.values()]
    return pa.table(columns)


def _listed(column: Any) -> list[Any]:
    """Values of a column for Arrow; hidden states in single precision."""
    return list(column.astype(np.float32).tolist()) if column.ndim == 3 else list(column.tolist())


def read_features(path: str) -> Features:
    """The features of a scored table, without the rows that have an error.

    Raises:
        InputError: There is no such table.
    """
    place, _, name = path.rpartition("/")
    if not Folder(place or ".").exists(name):
        raise InputError(f"no scores at {path}")
    table = pq.read_table(pa.BufferReader(Folder(place or ".").read(name)))
    table = table.filter(pa.compute.is_null(table.column("error")))
    names = {field.name for field in dataclasses.fields(Features)} & set(table.column_names)
    return Features(pair_id=table.column("candidate_id").to_pylist(), **{n: table.column(n).to_pylist() for n in names})
