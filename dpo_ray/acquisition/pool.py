"""What may be asked about: the sources of a recipe as candidates, and the pairs that are held out from them.

A pool is labelled (its labels are hidden until they are asked for), or holds two or more responses behind each prompt,
or prompts alone, to which the model writes responses later. Everything goes by content, not by the order of rows.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import combinations
from typing import Any, Literal, NamedTuple

from dpo_ray.config import RunConfig, SourceConfig
from dpo_ray.data.columns import LISTS, SCORES, Value, first_of, list_of, number_of, prompt_of, response_of, tools_of
from dpo_ray.data.formats import LABELS, TWO, RowError, judged, recognise, to_pairs
from dpo_ray.data.mixture import load_pool
from dpo_ray.data.sources import Row, read_rows
from dpo_ray.data.turns import Judged
from dpo_ray.errors import InputError
from dpo_ray.pairs import Candidate, PreferencePair, Text, content_hash

Kind = Literal["labelled", "candidates", "prompts"]


class OpenPrompt(NamedTuple):
    """A prompt that waits for responses."""

    prompt: Text
    tools: tuple[dict[str, Any], ...] | None
    is_transcript: bool
    source: str
    row: int

    def candidate(self, one: str, other: str) -> Candidate:
        """Two responses to it, in the order of their content."""
        ordered = self.ordered(one, other)
        swaps = content_hash(ordered.first) > content_hash(ordered.second)
        return self.ordered(other, one) if swaps else ordered

    def ordered(self, first: str, second: str) -> Candidate:
        """Two responses to it, which are assistant turns where the prompt is a conversation."""
        one, other = (
            text if isinstance(self.prompt, str) else ({"role": "assistant", "content": text},)
            for text in (first, second)
        )
        rest = {name: getattr(self, name) for name in ("tools", "is_transcript", "source", "row")}
        return Candidate(self.prompt, one, other, **rest)

    @classmethod
    def of(cls, pair: PreferencePair) -> "OpenPrompt":
        """The prompt of a pair."""
        return cls(pair.prompt, pair.tools, pair.is_transcript, pair.source, pair.row)

    @property
    def prompt_id(self) -> str:
        return content_hash(self.prompt, self.tools)


class Pool(NamedTuple):
    """What the sources hold. Of candidates and prompts one is empty."""

    kind: Kind
    candidates: list[Candidate]
    """By their id; no two are equal."""

    prompts: list[OpenPrompt]
    """By their id; no two are equal."""

    held_out: list[PreferencePair]
    report: dict[str, Any]
    """As `data_report.json`: `rows`, `dropped` (reason -> count), and what is in the pool."""

    @property
    def fingerprint(self) -> str:
        """Hash of all contents, hidden labels included."""
        return content_hash(
            [(c.candidate_id, c.gold_gap) for c in self.candidates],
            [prompt.prompt_id for prompt in self.prompts],
            [pair.pair_id for pair in self.held_out],
        )


def load_candidates(run: RunConfig, is_usable: Callable[[PreferencePair], bool] = lambda pair: True) -> Pool:
    """Read the pool of a recipe with an `acquire` section.

    Args:
        is_usable: Whether a pair will survive encoding; others are counted and left out.

    Raises:
        InputError: Bad rows, a pool without anything, or no way to hold labelled pairs out of it.
    """
    assert run.acquire is not None
    kind = run.acquire.pool.kind if run.acquire.pool.kind != "auto" else _kind_of(run.data.sources[0])
    if kind == "labelled":
        return _labelled(run, is_usable)
    if run.data.eval.num_pairs and not run.data.eval.sources:
        raise InputError(
            f"`data.eval`: a pool of {kind} has no labels to hold out; name labelled pairs in `data.eval.sources`, "
            "or set `data.eval.num_pairs` to 0"
        )
    return _unlabelled(run, kind, is_usable)


def _unlabelled(run: RunConfig, kind: Kind, is_usable: Callable[[PreferencePair], bool]) -> Pool:
    """Candidates, or prompts that wait for them; subsets nest by content, as those of pairs do."""
    held_out = _held_out(run)
    keys = {pair.group_id for pair in held_out}
    dropped: Counter[str] = Counter()
    pool: dict[str, Item] = {}
    for number, source in enumerate(run.data.sources):
        if source.weight is not None:
            raise InputError(f"`data.sources.{number}.weight`: a pool of {kind} is taken as it is")
        own: dict[str, Item] = {}
        for item in _items(run, source, kind, dropped):
            reason = _why_not(item, pool.keys() | own.keys(), keys, is_usable)
            if reason is None:
                own[_id_of(item)] = item
            else:
                dropped[reason] += 1
        pool |= _first(own, source.num_pairs, run.data.subset_seed)
        dropped["over_num_pairs"] += max(0, len(own) - (source.num_pairs or len(own)))
    most = max(1, round(run.data.fraction * len(pool)))
    pool = _first(pool, min(most, run.data.num_pairs or most), run.data.subset_seed)
    candidates = [item for item in pool.values() if isinstance(item, Candidate)]
    prompts = [item for item in pool.values() if isinstance(item, OpenPrompt)]
    report = {"rows": dropped.pop("rows", 0), "dropped": {reason: count for reason, count in dropped.items() if count}}
    return _pool(kind, candidates, prompts, held_out, report)


def open_prompts(source: SourceConfig, on_bad_row: str) -> Iterator[OpenPrompt]:
    """The prompts of a source, whatever else its rows hold: pairs, responses, or nothing more.

    Raises:
        InputError: A row has none, and `on_bad_row` is `stop`.
    """
    for row in read_rows(source):
        try:
            if row.value is not None and prompt_of(row.value) is None:
                yield from map(OpenPrompt.of, to_pairs(row, source).pairs[:1])
            else:
                yield _offer(row, "prompts").open
        except RowError as error:
            if on_bad_row == "stop":
                raise InputError(f"{row.source}:{row.number}: {error}") from None


Item = Candidate | OpenPrompt


def _id_of(item: Item) -> str:
    return item.candidate_id if isinstance(item, Candidate) else item.prompt_id


def _first(items: dict[str, Item], count: int | None, seed: int) -> dict[str, Item]:
    """So many of them, by content."""
    names = sorted(items, key=lambda name: content_hash(seed, name))[:count]
    return {name: items[name] for name in names}


def _items(run: RunConfig, source: SourceConfig, kind: Kind, dropped: Counter[str]) -> Iterator[Item]:
    """What the rows of a source hold; bad rows are counted, or end the reading."""
    assert run.acquire is not None
    for row in read_rows(source):
        dropped["rows"] += 1
        try:
            offer = _offer(row, kind)
            how = (run.acquire.pool.pairing, run.acquire.seed)
            yield from [offer.open] if kind == "prompts" else _candidates(offer, *how)
        except RowError as error:
            place = f"{row.source}:{row.number}: {error}"
            if run.data.on_bad_row == "stop":
                raise InputError(place) from None
            dropped["bad_row"] += 1


def _labelled(run: RunConfig, is_usable: Callable[[PreferencePair], bool]) -> Pool:
    """Pairs whose labels are hidden; split and cut as for training."""
    loaded = load_pool(run.data, is_usable)
    dropped = Counter(loaded.report["dropped"])
    candidates: dict[str, Candidate] = {}
    for pair in loaded.train[: run.data.num_pairs]:
        candidate = _hidden(pair)
        reason = _why_not(candidate, candidates, (), is_usable)
        if reason is None:
            candidates[candidate.candidate_id] = candidate
        else:
            dropped[reason] += 1
    held_out = [pair for pair in loaded.held_out if is_usable(pair)]
    return _pool("labelled", candidates.values(), [], held_out, {**loaded.report, "dropped": dict(dropped)})


def _hidden(pair: PreferencePair) -> Candidate:
    gap = 1.0
    if pair.chosen_score is not None and pair.rejected_score is not None:
        gap = pair.chosen_score - pair.rejected_score
    return Candidate.of(
        pair.prompt,
        pair.chosen,
        pair.rejected,
        gap,
        tools=pair.tools,
        is_transcript=pair.is_transcript,
        weight=pair.weight,
        group=pair.group,
        source=pair.source,
        row=pair.row,
    )


def _pool(
    kind: Kind,
    candidates: Iterable[Candidate],
    prompts: Iterable[OpenPrompt],
    held_out: list[PreferencePair],
    report: dict[str, Any],
) -> Pool:
    pool = Pool(
        kind,
        sorted(candidates, key=lambda candidate: candidate.candidate_id),
        sorted(prompts, key=lambda prompt: prompt.prompt_id),
        held_out,
        report,
    )
    if not pool.candidates and not pool.prompts:
        counts = ", ".join(f"{count} {reason}" for reason, count in report["dropped"].items())
        raise InputError(f"nothing to ask about in {report['rows']} rows" + (f"; dropped: {counts}" if counts else ""))
    held = {"kind": kind, "candidates": len(pool.candidates), "prompts": len(pool.prompts), "held_out": len(held_out)}
    return pool._replace(report=report | held | {"fingerprint": pool.fingerprint})


def _why_not(
    item: Item, taken: Collection[str], held_out: Collection[str], is_usable: Callable[[PreferencePair], bool]
) -> str | None:
    """The reason why something is left out."""
    candidate = item if isinstance(item, Candidate) else item.candidate("a", "b")
    pair = candidate.labelled(is_first=True)
    if content_hash(candidate.first) == content_hash(candidate.second):
        return "identical"
    if _id_of(item) in taken:
        return "duplicate"
    if pair.group_id in held_out:
        return "in_held_out"
    return None if is_usable(pair) else "not_encodable"


def _held_out(run: RunConfig) -> list[PreferencePair]:
    """The pairs of `data.eval.sources`, all of them."""
    if not run.data.eval.sources or not run.data.eval.num_pairs:
        return []
    labelled = run.data.model_copy(
        update={
            "sources": run.data.eval.sources,
            "eval": run.data.eval.model_copy(update={"num_pairs": 0}),
            "fraction": 1.0,
        }
    )
    return sorted(load_pool(labelled).train, key=lambda pair: pair.pair_id)


class _Offer(NamedTuple):
    """What a row offers: a prompt, and perhaps responses with scores."""

    open: OpenPrompt
    value: Value
    responses: list[Any]
    scores: list[float | None]


def _kind_of(source: SourceConfig) -> Kind:
    """By the first row that can be read."""
    row = next((row for row in read_rows(source) if row.value is not None), None)
    if row is None or row.value is None:
        raise InputError(f"no rows in {source.path}")
    value = row.value
    if "chosen" not in value and (any(isinstance(value.get(key), list) for key in LISTS) or _two(value)):
        return "candidates"
    try:
        recognise(value)
    except RowError as error:
        if prompt_of(value) is None:
            raise InputError(f"{row.source}:{row.number}: {error}") from None
        return "prompts"
    return "labelled"


def _two(value: Value) -> tuple[str, str] | None:
    """The columns of two responses that have no label."""
    if any(value.get(label) is not None for label in LABELS):
        return None
    return next((names for names in TWO if all(value.get(name) is not None for name in names)), None)


def _offer(row: Row, kind: Kind) -> _Offer:
    if row.value is None:
        raise RowError(row.error or "an empty row")
    value = row.value
    prompt = prompt_of(value)
    if prompt is None:
        raise RowError("no `prompt`")
    # As beside two responses: a transcript, turns or a `system` column make turns.
    shaped = judged(prompt, "a", "b", value)
    opened = OpenPrompt(shaped.prompt, tools_of(value.get("tools")), shaped.is_transcript, row.source, row.number)
    if kind == "prompts":
        return _Offer(opened, value, [], [])
    names = _two(value)
    items = [value[name] for name in names] if names else list_of(first_of(value, LISTS, "responses"), "responses")
    key = next((k for k in SCORES if any(isinstance(i, dict) and i.get(k) is not None for i in items)), None)
    listed = value.get("scores")
    if isinstance(listed, list):
        if len(listed) != len(items):
            raise RowError(f"{len(items)} responses, but {len(listed)} scores")
        scores = [number_of(score) for score in listed]
        return _Offer(opened, value, [response_of(item) for item in items], list(scores))
    found = [
        number_of(item[key]) if key is not None and isinstance(item, dict) and item.get(key) is not None else None
        for item in items
    ]
    return _Offer(opened, value, [response_of(item) for item in items], found)


def _candidates(offer: _Offer, pairing: str, seed: int) -> list[Candidate]:
    """The pairs of a row's responses, by rule."""
    prompt = prompt_of(offer.value)
    if len(offer.responses) < 2:
        raise RowError("fewer than two responses")
    shaped: list[tuple[Judged, float | None]] = []
    for one, other in combinations(range(len(offer.responses)), 2):
        first, second = offer.scores[one], offer.scores[other]
        gap = None if first is None or second is None else first - second
        shaped.append((judged(prompt, offer.responses[one], offer.responses[other], offer.value), gap))
    found = [
        Candidate.of(
            pair.prompt,
            pair.chosen,
            pair.rejected,
            gap,
            tools=offer.open.tools,
            is_transcript=pair.is_transcript,
            source=offer.open.source,
            row=offer.open.row,
        )
        for pair, gap in shaped
    ]
    if pairing == "all":
        return found
    if pairing == "best_vs_worst":
        if any(score is None for score in offer.scores):
            raise RowError("`acquire.pool.pairing` is best_vs_worst, and a response has no score")
        return [max(found, key=lambda candidate: (abs(candidate.gold_gap or 0.0), candidate.candidate_id))]
    return [min(found, key=lambda candidate: content_hash("pairing", seed, candidate.candidate_id))]
