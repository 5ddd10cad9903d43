"""Responses that a model writes for acquisition: candidates for prompts that have none, and samples for their entropy.

Each response has a seed of its own, by prompt and number, so a rerun writes the same ones. What was written is kept by
content beside the log-prob store, and not written again by another strategy or a restart.
"""

import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_ray.acquisition.pool import OpenPrompt
from dpo_ray.config import RunConfig
from dpo_ray.data.encode import PairEncoder
from dpo_ray.generate import Engine, Generated, Responses, Sampling, generate
from dpo_ray.models import ModelSource, weights_fingerprint
from dpo_ray.pairs import Candidate, Ids, content_hash
from dpo_ray.storage import Folder

Progress = Callable[[str, int, int], None]


def sampled(
    prompts: Sequence[Ids],
    policy: ModelSource,
    run: RunConfig,
    seed: int,
    gpus_per_actor: float,
    on_progress: Progress = lambda text, done, total: None,
) -> dict[str, Any]:
    """`sample_logps` and `sample_tokens` of `Features`, [N, S]: responses at temperature 1; equal prompts are asked
    once. NaN where none could be written.
    """
    assert run.acquire is not None
    settings = run.acquire.generate
    distinct = {prompt.tobytes(): prompt for prompt in prompts}
    found = stored_responses(
        list(distinct.values()),
        policy,
        run,
        (Sampling(settings.max_tokens), settings.entropy_samples, seed),
        settings.engine,
        gpus_per_actor,
        lambda done, total: on_progress("sampling", done, total),
    )
    by_prompt = dict(zip(distinct, found, strict=True))
    shape = (len(prompts), settings.entropy_samples)
    logps, tokens = np.full(shape, np.nan), np.full(shape, np.nan)
    for row, prompt in enumerate(prompts):
        for column, response in enumerate(by_prompt[prompt.tobytes()].responses):
            logps[row, column], tokens[row, column] = response.logps, len(response.ids)
    return {"sample_logps": logps, "sample_tokens": tokens}


def written(
    prompts: Sequence[OpenPrompt],
    policy: ModelSource,
    run: RunConfig,
    encoder: PairEncoder,
    seed: int,
    gpus_per_actor: float,
    on_progress: Progress = lambda text, done, total: None,
) -> list[Candidate]:
    """Candidates of responses that the policy writes to prompts; prompts to which it writes the same twice give fewer.

    Returns:
        By id, each once; pairs by `acquire.pool.pairing`.
    """
    assert run.acquire is not None
    settings = run.acquire.generate
    ids = [encoder.prompt_ids(prompt.candidate("a", "b").labelled(is_first=True)) for prompt in prompts]
    sampling = Sampling(settings.max_tokens, settings.temperature, settings.top_p)
    found = stored_responses(
        ids,
        policy,
        run,
        (sampling, settings.num_responses, seed),
        settings.engine,
        gpus_per_actor,
        lambda done, total: on_progress("writing responses", done, total),
    )
    candidates: dict[str, Candidate] = {}
    for prompt, prompt_ids, responses in zip(prompts, ids, found, strict=True):
        is_plain = isinstance(prompt.prompt, str)
        texts = [encoder.response_text(prompt_ids, response.ids, is_plain=is_plain) for response in responses.responses]
        distinct = list(dict.fromkeys(text for text in texts if text.strip()))
        pairs = [prompt.candidate(one, other) for one, other in combinations(distinct, 2)]
        pairs = [pair for pair in pairs if content_hash(pair.first) != content_hash(pair.second)]
        if run.acquire.pool.pairing == "random" and pairs:
            pairs = [min(pairs, key=lambda pair: content_hash("pairing", seed, pair.candidate_id))]
        candidates |= {pair.candidate_id: pair for pair in pairs}
    return [candidates[name] for name in sorted(candidates)]


class SampleStore:
    """Responses by prompt, under one model and one way to sample; a folder of Parquet parts."""

    def __init__(self, run: RunConfig, policy: ModelSource, how: tuple[Sampling, int, int]) -> None:
        name = content_hash(weights_fingerprint(policy), run.engine.precision, *map(str, how))
        self._folder = Folder(f"{run.reference.store}/samples-{name}")

    def read(self) -> dict[bytes, Responses]:
        """All that is there."""
        found: dict[bytes, Responses] = {}
        for name in self._folder.names():
            rows = pq.read_table(pa.BufferReader(self._folder.read(name))).to_pylist()
            for row in rows:
                columns = zip(row["ids"], row["logps"], row["is_finished"], strict=True)
                found[row["prompt"]] = Responses([Generated(np.array(ids, np.int32), *more) for ids, *more in columns])
        return found

    def write(self, values: Mapping[bytes, Responses]) -> None:
        """Add a part; what could not be written is tried again the next time."""
        good = {key: value.responses for key, value in sorted(values.items()) if value.error is None}
        if not good:
            return
        table = pa.table(
            {
                "prompt": pa.array(list(good), pa.binary()),
                "ids": pa.array([[r.ids for r in behind] for behind in good.values()], pa.list_(pa.list_(pa.int32()))),
                "logps": pa.array([[r.logps for r in behind] for behind in good.values()], pa.list_(pa.float64())),
                "is_finished": [[r.is_finished for r in behind] for behind in good.values()],
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        self._folder.write(
            f"part-{hashlib.blake2b(b''.join(good), digest_size=16).hexdigest()}.parquet", sink.getvalue()
        )


def stored_responses(
    prompts: Sequence[Ids],
    policy: ModelSource,
    run: RunConfig,
    how: tuple[Sampling, int, int],
    engine: Engine,
    gpus_per_actor: float,
    on_progress: Callable[[int, int], None],
) -> list[Responses]:
    """Responses to prompts, from the store and, where it lacks them, from the model.

    Args:
        run: A resolved recipe; store, precision and cluster are read.
        how: The sampling, responses to each prompt, and the seed.
    """
    store = SampleStore(run, policy, how)
    sampling, num_responses, seed = how
    there = store.read()
    missing = list({prompt.tobytes(): prompt for prompt in prompts if prompt.tobytes() not in there}.values())
    new = generate(
        missing,
        policy,
        sampling,
        num_responses=num_responses,
        seed=seed,
        precision=run.engine.precision,
        num_actors=run.cluster.num_workers,
        cpus_per_actor=run.cluster.cpus_per_worker,
        gpus_per_actor=gpus_per_actor,
        engine=engine,
        on_progress=on_progress,
    )
    written_now = {prompt.tobytes(): value for prompt, value in zip(missing, new, strict=True)}
    store.write(written_now)
    there |= written_now
    return [there[prompt.tobytes()] for prompt in prompts]
