"""The pool of a run: which pairs are trained on, in which nested order, and which are held out.

Everything goes by the content of the pairs: neither the order of files and rows nor the machine changes the result,
but for which one of two equal pairs is kept. What is left out is counted by reason.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from dpo_ray.config import DataConfig, SourceConfig
from dpo_ray.data.formats import RowError, to_pairs
from dpo_ray.data.sources import read_rows
from dpo_ray.errors import InputError
from dpo_ray.pairs import PreferencePair, Text, content_hash

PLACES_SHOWN = 5
LARGEST_HELD_OUT = 5
"""At most one pair in so many is held out."""


@dataclasses.dataclass(frozen=True)
class Pool:
    """The pairs of a run, and how they came about.

    `report` has `sources` and `eval_sources`, each with `path`, `rows` (read), `pairs` (kept, for training or held
    out), `held_out`, `dropped` (reason -> count), `bad_rows` (the first places) and `contradictions` (kept pairs that
    say the opposite of another one); the same counts over `sources`; `train`; `left_out` (by `weights`, by `fraction`);
    and `notes`.
    """

    train: list[PreferencePair]
    """In mixture order: every beginning of it is a smaller set with the mixture's proportions."""

    held_out: list[PreferencePair]
    report: dict[str, Any]


@dataclasses.dataclass
class _Source:
    config: SourceConfig
    pairs: list[PreferencePair] = dataclasses.field(default_factory=list)
    held_out: list[PreferencePair] = dataclasses.field(default_factory=list)
    rows: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    bad_rows: list[str] = dataclasses.field(default_factory=list)
    contradictions: int = 0

    def report(self) -> dict[str, Any]:
        return {
            "path": self.config.path,
            "rows": self.rows,
            "pairs": len(self.pairs) + len(self.held_out),
            "held_out": len(self.held_out),
            "dropped": _nonzero(self.dropped),
            "bad_rows": self.bad_rows,
            "contradictions": self.contradictions,
        }


def load_pool(data: DataConfig, is_usable: Callable[[PreferencePair], bool] = lambda pair: True) -> Pool:
    """Read, clean, split and mix all sources.

    Args:
        is_usable: Whether a pair will survive encoding; only such count towards `eval.num_pairs`.

    Raises:
        InputError: A source is missing, unreadable or without any pair; or a row is bad and `on_bad_row` is `stop`.
    """
    notes = []
    sources = _load(data.sources, data.on_bad_row)
    eval_sources = _load(data.eval.sources if data.eval.num_pairs else (), data.on_bad_row)
    if eval_sources:
        held_out = _mixed(eval_sources, seed=0)
    else:
        held_out = _hold_out(sources, data.eval.num_pairs, is_usable)
        if data.eval.num_pairs and not held_out:
            notes.append("nothing is held out: no prompt or group has few enough pairs, at most a fifth of all")
    _drop_held_out(sources, held_out)
    order = _mixed(sources, data.subset_seed)
    train = order[: max(1, round(data.fraction * len(order)))]
    reports = [source.report() for source in sources]
    report = {
        "sources": reports,
        "eval_sources": [source.report() for source in eval_sources],
        **{count: sum(report[count] for report in reports) for count in ("rows", "pairs", "contradictions")},
        "dropped": _nonzero(sum((source.dropped for source in sources), Counter())),
        "train": len(train),
        "held_out": len(held_out),
        "left_out": {
            "weights": sum(len(source.pairs) for source in sources) - len(order),
            "fraction": len(order) - len(train),
        },
        "notes": notes,
    }
    return Pool(train, held_out, report)


def _load(configs: Sequence[SourceConfig], on_bad_row: str) -> list[_Source]:
    """The clean pairs of each source, each content once."""
    sources = []
    seen: set[str] = set()
    for config in configs:
        source = _Source(config)
        by_content = sorted(_clean(source, on_bad_row, seen), key=lambda item: item[0].pair_id)
        taken = by_content[: config.num_pairs]
        source.dropped["over_num_pairs"] = len(by_content) - len(taken)
        for pair, opposite_id in taken:
            source.pairs.append(pair)
            source.contradictions += opposite_id in seen
            seen.add(pair.pair_id)
        _check_not_empty(source)
        sources.append(source)
    return sources


def _clean(source: _Source, on_bad_row: str, seen: set[str]) -> Iterator[tuple[PreferencePair, str]]:
    """Its good pairs, each with the id of the pair that says the opposite."""
    own: set[str] = set()
    for row in read_rows(source.config):
        source.rows += 1
        try:
            parsed = to_pairs(row, source.config)
        except RowError as error:
            place = f"{row.source}:{row.number}: {error}"
            if on_bad_row == "stop":
                raise InputError(place) from None
            source.dropped["bad_row"] += 1
            if len(source.bad_rows) < PLACES_SHOWN:
                source.bad_rows.append(place)
            continue
        source.dropped["tie"] += parsed.ties
        for pair in parsed.pairs:
            opposite_id = dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen).pair_id
            if _is_empty(pair.chosen) or _is_empty(pair.rejected):
                source.dropped["empty_response"] += 1
            elif opposite_id == pair.pair_id:
                source.dropped["identical"] += 1
            elif pair.pair_id in own or pair.pair_id in seen:
                source.dropped["duplicate"] += 1
            else:
                own.add(pair.pair_id)
                yield pair, opposite_id


def _is_empty(response: Text) -> bool:
    if isinstance(response, str):
        return not response.strip()
    own = (message for message in response if message["role"] == "assistant")
    return not any(message["content"].strip() or message.get("tool_calls") for message in own)


def _hold_out(
    sources: list[_Source], num_pairs: int, is_usable: Callable[[PreferencePair], bool]
) -> list[PreferencePair]:
    """Move whole groups out, in the order of their content, until there are `num_pairs` usable pairs.

    A group that would make it more than a fifth of all pairs stays. Neither `fraction` nor `subset_seed` has a say, so
    that runs over them are compared on the same pairs.
    """
    members: dict[str, list[PreferencePair]] = {}
    for source in sources:
        for pair in source.pairs:
            members.setdefault(pair.group_id, []).append(pair)
    most = sum(map(len, members.values())) // LARGEST_HELD_OUT
    groups: set[str] = set()
    total = usable = 0
    for group in sorted(members, key=lambda group: content_hash("held out", group)):
        if usable >= num_pairs:
            break
        if total + len(members[group]) <= most:
            groups.add(group)
            total += len(members[group])
            usable += sum(map(is_usable, members[group]))
    for source in sources:
        source.held_out = [pair for pair in source.pairs if pair.group_id in groups]
        source.pairs = [pair for pair in source.pairs if pair.group_id not in groups]
    return sorted((pair for source in sources for pair in source.held_out), key=lambda pair: pair.pair_id)


def _drop_held_out(sources: list[_Source], held_out: list[PreferencePair]) -> None:
    """Drop training pairs that share a group, or the opening of their prompt, with a held-out pair.

    Where the sources themselves were split, only a `group_by` can have left such pairs.
    """
    keys = {key for pair in held_out for key in _keys(pair)}
    for source in sources:
        kept = [pair for pair in source.pairs if keys.isdisjoint(_keys(pair))]
        source.dropped["in_held_out"] = len(source.pairs) - len(kept)
        source.pairs = kept
        _check_not_empty(source)


def _keys(pair: PreferencePair) -> tuple[str, ...]:
    if pair.group is None:
        return (pair.group_id,)
    return (pair.group_id, dataclasses.replace(pair, group=None).group_id)


def _check_not_empty(source: _Source) -> None:
    if source.pairs:
        return
    counts = [f"{count} {reason}" for reason, count in _nonzero(source.dropped).items()]
    dropped = f"; dropped: {', '.join(counts)}" if counts else ""
    first = f"; first: {source.bad_rows[0]}" if source.bad_rows else ""
    raise InputError(f"no pairs in {source.config.path}: {source.rows} rows{dropped}{first}")


def _mixed(sources: list[_Source], seed: int) -> list[PreferencePair]:
    """All training pairs in one order, of which every beginning has the sources' shares.

    This is Sainte-Lague's method: the pair of rank r in a source of share s comes at (r + 1/2) / s. It never takes back
    a seat, so smaller sets are nested in larger ones. With weights the order ends where the first source runs out.
    """
    weights = [len(source.pairs) if source.config.weight is None else source.config.weight for source in sources]
    entries = []
    end = math.inf
    for source, weight in zip(sources, weights, strict=True):
        if weight == 0:
            continue
        share = weight / sum(weights)
        ranked = sorted((content_hash(seed, pair.pair_id), pair.pair_id, pair) for pair in source.pairs)
        entries += [((rank + 0.5) / share, *entry) for rank, entry in enumerate(ranked)]
        if source.config.weight is not None:
            end = min(end, (len(ranked) + 0.5) / share)
    entries.sort(key=lambda entry: entry[:3])
    return [pair for at, *_, pair in entries if at < end]


def _nonzero(counts: Counter[str]) -> dict[str, int]:
    return {reason: count for reason, count in sorted(counts.items()) if count}
