"""The log-prob store, and the Ray Data pass that fills it: for the reference, and for a policy that scores a pool.

Content-addressed: under the fingerprint of the model's weights and the type of the computation, each response has its
summed log-prob under the hash of its prompt's and its own token ids. What is there is never computed again, by any
run, trial or node; parts are written whole or not at all, so a pass that was broken off goes on where it stopped.
"""

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from dpo_ray.actor_pool import on_actors
from dpo_ray.config import BatchConfig, RunConfig
from dpo_ray.data.batching import Lengths, make_batch, plan_step
from dpo_ray.errors import RunFailed
from dpo_ray.logps import tail_sums
from dpo_ray.losses import PairLogps
from dpo_ray.models import (
    Loaded,
    ModelSource,
    ResponseLogps,
    load_to_score,
    usable_layout,
    weights_fingerprint,
)
from dpo_ray.pairs import Ids, PairBatch, PromptBranches, TokenizedPair
from dpo_ray.storage import Folder

PROMPTS_PER_PART = 512
"""Most prompts of one call of a scorer, and so of one file; a pass that is broken off loses at most this much per
actor."""

PARTS_PER_ACTOR = 4
"""Of a small pass: the last actor then waits for a quarter of its work at most."""

HIDDEN_WIDTH = 512
"""Wider hidden states are projected to this before they are kept."""

STORE_VERSION = 3
"""Part of the path; raise it when the columns change."""


class ResponseValue(NamedTuple):
    """What the store keeps of a response, under one model."""

    logps: float  # summed log p(response | prompt), nats
    num_tokens: int
    entropy: float  # summed entropy of the next-token distributions, nats
    alignment: float  # mean of log p(token) - log sum of p^2 over the vocabulary, nats
    token_logps: Sequence[float] | None = None  # of each token, where a loss has asked for it
    hidden: NDArray[np.float32] | None = None  # [2 W] of the response and of the prompt's end, where a pool is scored


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

    def read(
        self, wanted: Iterable[bytes], *, per_token: bool = False, hidden: bool = False
    ) -> dict[bytes, ResponseValue]:
        """Those of the wanted values that are there.

        Args:
            per_token: Only those that have `token_logps`, and with them.
            hidden: Only those that have hidden states, and with them.
        """
        keys = pa.array(list(wanted), pa.binary(16))
        found: dict[bytes, ResponseValue] = {}
        asked = {"token_logps": per_token, "hidden": hidden}
        columns = [name for name in ResponseValue._fields if asked.get(name, True)]
        for name in self._folder.names():
            if not name.endswith(".parquet"):
                continue
            table = pq.read_table(pa.BufferReader(self._folder.read(name)), columns=["key", *columns])
            table = table.filter(pc.is_in(table.column("key"), value_set=keys))
            for column in asked.keys() & columns:
                table = table.filter(pc.is_valid(table.column(column)))
            # Hidden states stay arrays: lists of Python numbers would take ten times the memory.
            listed = (
                table.column(column).to_numpy() if column == "hidden" else table.column(column).to_pylist()
                for column in columns
            )
            rows = zip(*listed, strict=True)
            found |= {
                key: ResponseValue(**dict(zip(columns, row, strict=True)))
                for key, row in zip(table.column("key").to_pylist(), rows, strict=True)
            }
        return found

    def keys(self, wanted: Iterable[bytes], *, per_token: bool = False, hidden: bool = False) -> set[bytes]:
        """Those of the wanted keys that `read` would find."""
        wanted, found = set(wanted), set()
        for name in self._folder.names():
            if not name.endswith(".parquet"):
                continue
            file = pq.ParquetFile(pa.BufferReader(self._folder.read(name)))
            more = [column for column, asked in (("token_logps", per_token), ("hidden", hidden)) if asked]
            table = file.read(columns=["key", *more])
            for column in more:
                table = table.filter(pc.is_valid(table.column(column)))
            found.update(wanted.intersection(table.column("key").to_pylist()))
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
                "hidden": pa.array([values[key].hidden for key in keys], pa.list_(pa.float32())),
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        more = bytes(2 * (v.hidden is not None) + (v.token_logps is not None) for v in (values[key] for key in keys))
        name = hashlib.blake2b(b"".join(keys) + more, digest_size=16).hexdigest()
        self._folder.write(f"part-{name}.parquet", bytes(sink.getvalue()))


class View(NamedTuple):
    """What is asked of one model, and where it is kept."""

    model: ModelSource
    store: ReferenceStore
    per_token: bool = False
    hidden: bool = False


class ResponseScorer:
    """Computes the log-probs of responses under one model."""

    def __init__(
        self,
        model: ModelSource,
        precision: str,
        batch: BatchConfig,
        *,
        per_token: bool = False,
        hidden: bool = False,
        loaded: Loaded | None = None,
    ) -> None:
        """
        Args:
            loaded: The model, where it is in memory already.
        """
        self._per_token, self._hidden = per_token, hidden
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        loaded = loaded or load_to_score([model], precision)[0]
        self._model, self._as_itself = loaded.model.to(self._device), loaded.as_itself
        layout = usable_layout(lambda b: self._model(b.to(self._device)), self._model, batch.layout, precision)
        self._batch = batch.model_copy(update={"layout": layout})

    @torch.inference_mode()
    def score(self, items: Sequence[PromptBranches]) -> dict[bytes, ResponseValue]:
        """Values of all responses behind some prompts, whatever the packing.

        Raises:
            ValueError: One prompt with its responses is larger than `tokens_per_device`.
        """
        lengths = [Lengths(len(item.prompt_ids), tuple(map(len, item.responses))) for item in items]
        plan = plan_step(
            lengths,
            num_workers=1,
            tokens_per_device=self._batch.tokens_per_device,
            row_tokens=self._batch.row_tokens,
            layout=self._batch.layout,
        )
        values: dict[bytes, ResponseValue] = {}
        with self._as_itself():
            for (micro_batch,) in plan:
                batch = make_batch(items, micro_batch.rows, self._batch.layout).to(self._device)
                keys = (response_key(items[i].prompt_ids, r) for i in micro_batch.items for r in items[i].responses)
                values |= dict(zip(keys, self._values(batch), strict=True))
        return values

    def _values(self, batch: PairBatch) -> Iterator[ResponseValue]:
        """Of each response of a batch."""
        count = batch.num_responses
        hidden: Any = [None] * count
        if self._hidden:
            result, states = self._model.with_hidden(batch)
            hidden = narrowed(states).flatten(1).float().cpu().numpy()
        else:
            result = self._model(batch)
        sums = zip(*(v.tolist() for v in result[:4]), self._by_response(result), hidden, strict=True)
        return (ResponseValue(a, int(b), *rest) for a, b, *rest in sums)

    def _by_response(self, result: ResponseLogps) -> list[Any]:
        """The log-probs of each response's tokens, where they are asked for."""
        if not self._per_token:
            return [None] * len(result.num_tokens)
        values, ends = result.token_logps.tolist(), result.num_tokens.cumsum(0).int().tolist()
        return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def narrowed(states: torch.Tensor) -> torch.Tensor:
    """Hidden states [..., D] of at most `HIDDEN_WIDTH` numbers: wider ones times a fixed random matrix of signs, which
    keeps inner products up to 1 / sqrt(width) (Achlioptas 2003, "Database-friendly random projections")."""
    if states.shape[-1] <= HIDDEN_WIDTH:
        return states
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, (states.shape[-1], HIDDEN_WIDTH), generator=generator) * 2.0 - 1
    return torch.matmul(states, signs.to(states) / HIDDEN_WIDTH**0.5)


class ScoringActor:
    """Scores blocks of prompts under one or several models, and puts the values into their stores.

    A plain class: tests call it directly, and Ray Data runs it as a pool of actors, each loading the models once.
    """

    def __init__(self, views: Sequence[View], precision: str, batch: BatchConfig) -> None:
        loaded = load_to_score([view.model for view in views], precision)
        self._views = views
        self._scorers = [
            ResponseScorer(view.model, precision, batch, per_token=view.per_token, hidden=view.hidden, loaded=model)
            for view, model in zip(views, loaded, strict=True)
        ]

    def __call__(self, block: pa.Table) -> pa.Table:
        """Score a block, store the values, and return only how many there were, and what could not be scored."""
        items = [
            PromptBranches(np.asarray(prompt, np.int32), tuple(np.asarray(r, np.int32) for r in behind))
            for prompt, behind in zip(
                block.column("prompt_ids").to_pylist(), block.column("responses").to_pylist(), strict=True
            )
        ]
        computed = 0
        errors: dict[bytes, str] = {}
        for number, (view, scorer) in enumerate(zip(self._views, self._scorers, strict=True)):
            wanted = [i for i, needed in enumerate(block.column("views").to_pylist()) if number in needed]
            values, wrong = _scored_with_errors(scorer, [items[i] for i in wanted])
            if values:
                view.store.write(values)
            computed += len(values)
            errors |= wrong
        return pa.table(
            {
                "computed": [computed],
                "keys": pa.array([list(errors)], pa.list_(pa.binary(16))),
                "errors": pa.array([list(errors.values())], pa.list_(pa.string())),
            }
        )


def _scored_with_errors(
    scorer: ResponseScorer, items: Sequence[PromptBranches]
) -> tuple[dict[bytes, ResponseValue], dict[bytes, str]]:
    """Values, and why others have none. When a block fails as a whole, each prompt is tried alone."""
    if not items:
        return {}, {}
    errors: dict[bytes, str] = {}
    try:
        values = scorer.score(items)
    except (ValueError, RuntimeError) as error:  # over the token budget; out of memory
        if len(items) == 1:
            (item,) = items
            return {}, {response_key(item.prompt_ids, r): " ".join(str(error).split())[:200] for r in item.responses}
        torch.cuda.empty_cache()
        values = {}
        for item in items:
            good, bad = _scored_with_errors(scorer, [item])
            values, errors = values | good, errors | bad
    for key in [key for key, value in values.items() if not math.isfinite(value.logps)]:
        errors[key] = f"log-prob {values.pop(key).logps}"
    return values, errors


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

    Raises:
        RunFailed: A response has no finite log-prob.
    """
    view = View(model, store_of(run, model), per_token)
    (found,), errors = score_responses(responses_of(pairs), [view], run, gpus_per_actor, on_progress)
    if errors:
        raise RunFailed(f"{len(errors)} responses have no reference log-prob; the first: {next(iter(errors.values()))}")
    return found


def store_of(run: RunConfig, model: ModelSource) -> ReferenceStore:
    """Where a resolved recipe keeps what a model says."""
    return ReferenceStore(str(run.reference.store), weights_fingerprint(model), run.engine.precision)


def score_responses(
    responses: Iterable[tuple[Ids, Ids]],
    views: Sequence[View],
    run: RunConfig,
    gpus_per_actor: float,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[list[Pass], dict[bytes, str]]:
    """Score responses (prompt, response) under several models in one pass over a pool of Ray Data actors.

    Returns:
        Of each view, how many values there were and came; and why a response has none, by its key.
    """
    wanted = {response_key(*item): item for item in responses}
    missing, there = _missing(wanted, views)
    done, total = 0, sum(map(len, missing.values()))
    errors: dict[bytes, str] = {}
    if missing:
        blocks = _blocks([(wanted[key], numbers) for key, numbers in missing.items()], run)
        scored = on_actors(
            blocks,
            ScoringActor,
            constructor=(views, run.engine.precision, run.batch),
            num_actors=run.cluster.num_workers,
            cpus_per_actor=run.cluster.cpus_per_worker,
            gpus_per_actor=gpus_per_actor,
        )
        for row in scored.iter_rows():
            done += row["computed"]
            errors |= dict(zip(row["keys"], row["errors"], strict=True))
            on_progress(done, total)
    counts = [sum(number in numbers for numbers in missing.values()) for number in range(len(views))]
    return [Pass(view.store, *found) for view, *found in zip(views, counts, there, strict=True)], errors


def _missing(
    wanted: Mapping[bytes, tuple[Ids, Ids]], views: Sequence[View]
) -> tuple[dict[bytes, tuple[int, ...]], list[int]]:
    """The numbers of the views that lack a response, by its key; and how many each view has."""
    known = [view.store.keys(wanted, per_token=view.per_token, hidden=view.hidden) for view in views]
    lacking = {key: tuple(number for number, keys in enumerate(known) if key not in keys) for key in wanted}
    return {key: numbers for key, numbers in lacking.items() if numbers}, [len(keys) for keys in known]


def blocks_of(pairs: Iterable[TokenizedPair], views: Sequence[View], run: RunConfig) -> list[pa.Table]:
    """What `ScoringActor` is called with, for the responses of some pairs that views lack."""
    wanted = {response_key(*item): item for item in responses_of(pairs)}
    return _blocks([(wanted[key], numbers) for key, numbers in _missing(wanted, views)[0].items()], run)


def responses_of(pairs: Iterable[TokenizedPair]) -> Iterator[tuple[Ids, Ids]]:
    """Both responses of each pair, behind its prompt."""
    for pair in pairs:
        yield pair.prompt_ids, pair.chosen_ids
        yield pair.prompt_ids, pair.rejected_ids


def missing_responses(
    pairs: Iterable[TokenizedPair], store: ReferenceStore, *, per_token: bool = False
) -> list[tuple[Ids, Ids]]:
    """Prompt and response of each that the store has not; each response once."""
    wanted = {response_key(*item): item for item in responses_of(pairs)}
    there = store.keys(wanted, per_token=per_token)
    return [item for key, item in wanted.items() if key not in there]


def by_prompt(responses: Iterable[tuple[Ids, Ids]]) -> list[PromptBranches]:
    """Prompts with all their responses, from prompts each with one."""
    found: dict[bytes, tuple[Ids, list[Ids]]] = {}
    for prompt_ids, response_ids in responses:
        found.setdefault(prompt_ids.tobytes(), (prompt_ids, []))[1].append(response_ids)
    return [PromptBranches(prompt_ids, tuple(behind)) for prompt_ids, behind in found.values()]


Wanted = tuple[tuple[Ids, Ids], tuple[int, ...]]
"""A prompt with a response, and the numbers of the views that lack it."""


def _blocks(missing: Sequence[Wanted], run: RunConfig) -> list[pa.Table]:
    """Prompts with the responses that the same views lack, in blocks of about equal work. A prompt is computed once for
    all of its responses that fit a device together."""
    by_views: dict[tuple[int, ...], list[tuple[Ids, Ids]]] = {}
    for item, numbers in missing:
        by_views.setdefault(numbers, []).append(item)
    items = [
        (part, numbers)
        for numbers, responses in by_views.items()
        for whole in by_prompt(responses)
        for part in fitting(whole, run.batch.tokens_per_device)
    ]
    items.sort(key=lambda item: len(item[0].prompt_ids) + sum(map(len, item[0].responses)))
    num_actors = run.cluster.num_workers
    num_blocks = min(len(items), max(PARTS_PER_ACTOR * num_actors, -(-len(items) // PROMPTS_PER_PART)))
    return [
        pa.table(
            {
                "prompt_ids": pa.array([item.prompt_ids for item, _ in block], pa.list_(pa.int32())),
                "responses": pa.array([item.responses for item, _ in block], pa.list_(pa.list_(pa.int32()))),
                "views": pa.array([numbers for _, numbers in block], pa.list_(pa.int32())),
            }
        )
        for block in (items[i::num_blocks] for i in range(num_blocks))
    ]


def fitting(item: PromptBranches, tokens_per_device: int) -> Iterator[PromptBranches]:
    """The item in as few parts as fit a device; a single response that does not is a part too."""
    part: list[Ids] = []
    for response in item.responses:
        lengths = Lengths(len(item.prompt_ids), tuple(map(len, [*part, response])))
        if part and max(lengths.branched, lengths.padded * len(lengths.responses)) > tokens_per_device:
            yield PromptBranches(item.prompt_ids, tuple(part))
            part = []
        part.append(response)
    yield PromptBranches(item.prompt_ids, tuple(part))


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
