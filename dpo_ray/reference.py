"""The reference log-prob store, and the Ray Data pass that fills it.

Content-addressed: under the fingerprint of the model's weights and the type of the computation, each response has its
summed log-prob under the hash of its prompt's and its own token ids. What is there is never computed again, by any
run, trial or node; parts are written whole or not at all, so a pass that was broken off goes on where it stopped.
"""

import dataclasses
import hashlib
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from dpo_ray.config import BatchConfig, RunConfig
from dpo_ray.data.batching import Lengths, make_batch, plan_step
from dpo_ray.logps import tail_sums
from dpo_ray.losses import PairLogps
from dpo_ray.models import (
    ModelSource,
    PairModel,
    ResponseLogps,
    load_language_model,
    usable_layout,
    weights_fingerprint,
)
from dpo_ray.pairs import Ids, PromptBranches, TokenizedPair
from dpo_ray.storage import Folder

logger = logging.getLogger(__name__)

PROMPTS_PER_PART = 512
"""Prompts of one call of a scorer, and so of one file; a pass that is broken off loses at most this much per actor."""


STORE_VERSION = 2
"""Part of the path; raise it when the columns change."""


class ResponseValue(NamedTuple):
    """What the store keeps of a response, under one model."""

    logps: float  # summed log p(response | prompt), nats
    num_tokens: int
    entropy: float  # summed entropy of the next-token distributions, nats
    alignment: float  # mean of log p(token) - log sum of p^2 over the vocabulary, nats
    token_logps: Sequence[float] | None = None  # of each token, where a loss has asked for it


def response_key(prompt_ids: Ids, response_ids: Ids) -> bytes:
    """Address of a response: 16 bytes over the prompt's length and all ids."""
    digest = hashlib.blake2b(len(prompt_ids).to_bytes(4, "little"), digest_size=16)
    digest.update(np.ascontiguousarray(prompt_ids, np.int32).tobytes())
    digest.update(np.ascontiguousarray(response_ids, np.int32).tobytes())
    return digest.digest()


@dataclasses.dataclass(frozen=True)
class ReferenceStore:
    """Values of responses under one model in one numeric mode; a folder of Parquet parts."""

    root: str
    fingerprint: str
    """Of the model's weights."""
    precision: str

    @property
    def _folder(self) -> Folder:
        return Folder(self.root) / f"{self.fingerprint}-{self.precision}-{STORE_VERSION}"

    @property
    def path(self) -> str:
        return self._folder.path

    def read(self, wanted: Iterable[bytes], *, per_token: bool = False) -> dict[bytes, ResponseValue]:
        """Those of the wanted values that are there.

        Args:
            per_token: Only those that have `token_logps`, and with them.
        """
        keys = pa.array(list(wanted), pa.binary(16))
        found: dict[bytes, ResponseValue] = {}
        columns = ResponseValue._fields if per_token else ResponseValue._fields[:-1]
        for name in self._folder.names():
            if not name.endswith(".parquet"):
                continue
            table = pq.read_table(pa.BufferReader(self._folder.read(name)), columns=["key", *columns])
            table = table.filter(pc.is_in(table.column("key"), value_set=keys))
            if per_token:
                table = table.filter(pc.is_valid(table.column("token_logps")))
            rows = zip(*(table.column(column).to_pylist() for column in columns), strict=True)
            found |= {key: ResponseValue(*row) for key, row in zip(table.column("key").to_pylist(), rows, strict=True)}
        return found

    def write(self, values: dict[bytes, ResponseValue]) -> None:
        """Add a part, named by its addresses: two actors that computed the same write the same file."""
        keys = sorted(values)
        table = pa.table(
            {
                "key": pa.array(keys, pa.binary(16)),
                "logps": pa.array([values[key].logps for key in keys], pa.float64()),
                "num_tokens": pa.array([values[key].num_tokens for key in keys], pa.int32()),
                "entropy": pa.array([values[key].entropy for key in keys], pa.float64()),
                "alignment": pa.array([values[key].alignment for key in keys], pa.float64()),
                "token_logps": pa.array([values[key].token_logps for key in keys], pa.list_(pa.float32())),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        with_tokens = [values[key].token_logps is not None for key in keys]
        name = hashlib.blake2b(b"".join(keys) + bytes(with_tokens), digest_size=16).hexdigest()
        self._folder.write(f"part-{name}.parquet", bytes(sink.getvalue()))


class ResponseScorer:
    """Computes the log-probs of responses and puts them into the store.

    A plain class: tests call it directly, and Ray Data runs it as a pool of actors, each loading the model once.
    """

    def __init__(
        self, model: ModelSource, precision: str, batch: BatchConfig, store: ReferenceStore, per_token: bool = False
    ) -> None:
        self._per_token = per_token
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = PairModel(load_language_model(model, precision)).to(self._device).eval()
        layout = usable_layout(lambda b: self._model(b.to(self._device)), self._model, batch.layout, precision)
        self._batch, self._store = batch.model_copy(update={"layout": layout}), store

    @torch.inference_mode()
    def score(self, items: Sequence[PromptBranches]) -> dict[bytes, ResponseValue]:
        """Values of all responses behind some prompts, whatever the packing."""
        lengths = [Lengths(len(item.prompt_ids), tuple(map(len, item.responses))) for item in items]
        plan = plan_step(
            lengths,
            num_workers=1,
            tokens_per_device=self._batch.tokens_per_device,
            row_tokens=self._batch.row_tokens,
            layout=self._batch.layout,
        )
        values: dict[bytes, ResponseValue] = {}
        for (micro_batch,) in plan:
            result = self._model(make_batch(items, micro_batch.rows, self._batch.layout).to(self._device))
            keys = (response_key(items[i].prompt_ids, r) for i in micro_batch.items for r in items[i].responses)
            sums = zip(*(v.tolist() for v in result[:4]), self._by_response(result), strict=True)
            values |= {key: ResponseValue(a, int(b), *rest) for key, (a, b, *rest) in zip(keys, sums, strict=True)}
        return values

    def _by_response(self, result: ResponseLogps) -> list[Any]:
        """The log-probs of each response's tokens, where they are asked for."""
        if not self._per_token:
            return [None] * len(result.num_tokens)
        values, ends = result.token_logps.tolist(), result.num_tokens.cumsum(0).int().tolist()
        return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score a block of prompts, store the values, and return only how many there were."""
        prompts, responses = block.column("prompt_ids").to_pylist(), block.column("responses").to_pylist()
        items = [
            PromptBranches(np.asarray(prompt, np.int32), tuple(np.asarray(r, np.int32) for r in behind))
            for prompt, behind in zip(prompts, responses, strict=True)
        ]
        values = self.score(items)
        self._store.write(values)
        return pa.table({"computed": [len(values)]})


class Pass(NamedTuple):
    """A store that has every response of some pairs, and how many there were."""

    store: ReferenceStore
    computed: int
    from_store: int


def fill(
    pairs: Iterable[TokenizedPair],
    model: ModelSource,
    run: RunConfig,
    *,
    gpus_per_actor: float,
    per_token: bool = False,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pass:
    """Score all responses of `pairs` under `model`: what the store has not is computed on a pool of Ray Data actors.

    Args:
        run: A resolved recipe; store, precision, batch and cluster are read.
        per_token: The log-probs of single tokens are needed too.
    """
    store = ReferenceStore(str(run.reference.store), weights_fingerprint(model), run.engine.precision)
    missing, num_there = missing_responses(pairs, store, per_token=per_token)
    if not missing:
        return Pass(store, 0, num_there)

    blocks = _blocks(missing, run.cluster.num_workers)
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # the caller shows its own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    done = 0
    scored = ray.data.from_arrow(blocks).map_batches(
        ResponseScorer,
        fn_constructor_args=(model, run.engine.precision, run.batch, store, per_token),
        batch_format="pyarrow",
        batch_size=None,  # a block is a call: one part of the store
        compute=ray.data.ActorPoolStrategy(size=min(run.cluster.num_workers, len(blocks))),
        num_cpus=run.cluster.cpus_per_worker / 2,  # Ray Data needs a part of the cluster for itself
        num_gpus=gpus_per_actor,
    )
    for row in scored.iter_rows():
        done += row["computed"]
        on_progress(done, len(missing))
    return Pass(store, done, num_there)


def missing_responses(
    pairs: Iterable[TokenizedPair], store: ReferenceStore, *, per_token: bool = False
) -> tuple[list[tuple[Ids, Ids]], int]:
    """Prompt and response of each that the store has not, and how many it has; each response once."""
    wanted: dict[bytes, tuple[Ids, Ids]] = {}
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            wanted[response_key(pair.prompt_ids, response)] = (pair.prompt_ids, response)
    there = store.read(wanted, per_token=per_token)
    return [value for key, value in wanted.items() if key not in there], len(there)


def by_prompt(responses: Iterable[tuple[Ids, Ids]]) -> list[PromptBranches]:
    """Prompts with all their responses, from prompts each with one."""
    found: dict[bytes, tuple[Ids, list[Ids]]] = {}
    for prompt_ids, response_ids in responses:
        found.setdefault(prompt_ids.tobytes(), (prompt_ids, []))[1].append(response_ids)
    return [PromptBranches(prompt_ids, tuple(behind)) for prompt_ids, behind in found.values()]


def _blocks(missing: Sequence[tuple[Ids, Ids]], num_actors: int) -> list[pa.Table]:
    """Prompts with their missing responses, in blocks of about equal work; a prompt is computed once for all of its."""
    items = sorted(by_prompt(missing), key=lambda item: len(item.prompt_ids) + sum(map(len, item.responses)))
    num_blocks = min(len(items), max(num_actors, -(-len(items) // PROMPTS_PER_PART)))
    return [
        pa.table(
            {
                "prompt_ids": pa.array([prompt for prompt, _ in items[i::num_blocks]], pa.list_(pa.int32())),
                "responses": pa.array(
                    [responses for _, responses in items[i::num_blocks]], pa.list_(pa.list_(pa.int32()))
                ),
            }
        )
        for i in range(num_blocks)
    ]


class ReferenceTable:
    """The stored values of some pairs, ready for training: looked up once, read by number."""

    def __init__(self, store: ReferenceStore, pairs: Sequence[TokenizedPair], *, tails: bool = False) -> None:
        keys = [
            response_key(pair.prompt_ids, response)
            for pair in pairs
            for response in (pair.chosen_ids, pair.rejected_ids)
        ]
        values = store.read(set(keys), per_token=tails)
        table = torch.tensor([values[key][:4] for key in keys], dtype=torch.float64).reshape(-1, 4)
        logps, num_tokens, entropy, alignment = table.unbind(1)
        columns = [logps, num_tokens]
        if tails:
            token_logps = torch.tensor([logp for key in keys for logp in values[key].token_logps or ()])
            owners = torch.arange(len(keys)).repeat_interleave(num_tokens.long())
            columns.append(tail_sums(token_logps, owners, num_tokens))
        self._sides = torch.stack(columns).view(len(columns), -1, 2)
        self.entropy = float(entropy.sum())
        """Summed over all response tokens, nats."""
        self.alignment = alignment.view(-1, 2).sum(1).exp()
        """[B], WPO's weight of each pair under this model."""

    def logps(self, numbers: Sequence[int], device: torch.device | str = "cpu") -> PairLogps:
        """`ref_chosen_logps`, `ref_rejected_logps` of pairs, [B] each."""
        logps, num_tokens, *tails = self._sides[:, list(numbers)].to(device).unbind()
        return PairLogps(*logps.unbind(1), *num_tokens.unbind(1), *(side for tail in tails for side in tail.unbind(1)))
