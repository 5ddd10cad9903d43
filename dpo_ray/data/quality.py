"""The data of a recipe in depth, as one plain tree: what repeats, contradicts, leaks, misleads; languages and lengths.

Reads the sources and needs no model; tokens are counted where an encoder is given. `data_report` writes and shows it.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dpo_ray.acquisition.answers import plain_text
from dpo_ray.config import DataConfig, SourceConfig
from dpo_ray.data.columns import prompt_of
from dpo_ray.data.contamination import Match, matches
from dpo_ray.data.duplicates import Link, TextPair, links
from dpo_ray.data.encode import PairEncoder
from dpo_ray.data.formats import RowError, to_pairs
from dpo_ray.data.language import language_of
from dpo_ray.data.mislabelled import LEAST_ACCURACY, Judged, cross_fitted_margins, judge
from dpo_ray.data.mixture import Pool, load_pool
from dpo_ray.data.sources import Row, read_rows
from dpo_ray.data.turns import to_turns
from dpo_ray.errors import InputError
from dpo_ray.metrics import wilson_interval
from dpo_ray.pairs import PreferencePair, Text

Tree = dict[str, Any]
Progress = Callable[[str, int, int], None]
"""What is done, how much of it, of how much."""

EXAMPLES, TEXT_SHOWN = 10, 400
"""So many of the worst cases are shown, and so many characters of a text."""

PLACES = 20
"""Training pairs named beside an evaluated prompt, at most."""

BINS = 40
_PAIRS_AT_ONCE = 512


class Prompt(NamedTuple):
    """A prompt to be evaluated on, and where it stands."""

    text: str
    place: str


class Quality(NamedTuple):
    """What was found: the whole as a tree, and the rows that it counts."""

    tree: Tree
    duplicates: list[Tree]
    """Each pair that repeats or contradicts another: `kind`, `contradicts`, `similarity`, `first`, `second`."""
    contamination: list[Tree]
    """Each evaluated prompt that a training text gives away."""
    suspicious: list[Tree]
    """Pairs whose label looks wrong, the likeliest first."""


def inspect(
    data: DataConfig,
    *,
    encoder: PairEncoder | None = None,
    against: Sequence[SourceConfig] = (),
    on_progress: Progress = lambda text, done, total: None,
) -> Quality:
    """Read the sources of a recipe and measure them.

    Args:
        encoder: Counts tokens, and has the same pairs held out as training would; None: words and characters only.
        against: Further prompts, or pairs, that will be evaluated on.

    Raises:
        InputError: As `load_pool`; or a row of `against` has no prompt.
    """
    others = {source.path: _prompts(source) for source in against}
    is_usable = (lambda pair: True) if encoder is None else (lambda pair: bool(encoder.encode([pair]).pairs))
    pool = load_pool(data, is_usable)
    kept = [*pool.train, *pool.held_out]
    texts = list(map(text_of, kept))
    everything = read_all(data)
    path_of = {pair.pair_id: path for path, pair in reversed(everything)}
    paths = [path_of[pair.pair_id] for pair in kept]
    repeated = _duplicates([pair for _, pair in everything], {pair.pair_id for pair in pool.held_out}, on_progress)
    train = texts[: len(pool.train)]
    held_out = [Prompt(text.prompt, pair.place) for pair, text in zip(kept, texts, strict=True)][len(train) :]
    leaks = [
        _leaks(name, prompts, pool.train, train, on_progress)
        for name, prompts in ({"held out": held_out} | others).items()
    ]
    told = _mislabelled(kept, texts, paths, len(train), on_progress)
    tree = {
        "pairs": {name: pool.report[name] for name in ("rows", "pairs", "train", "held_out", "dropped")},
        "sources": _mix(pool),
        "languages": _languages(texts),
        **repeated.tree,
        "contamination": [leak.tree for leak in leaks],
        "length_bias": _length_bias(texts, paths),
        "mislabelled": told.tree,
        "lengths": _lengths(texts),
        "tokens": None if encoder is None else _tokens(encoder, kept, on_progress),
        "histograms": _histograms(texts),
    }
    return Quality(tree, repeated.rows, [row for leak in leaks for row in leak.rows], told.rows)


class _Part(NamedTuple):
    tree: Any
    rows: list[Tree]


def text_of(pair: PreferencePair) -> TextPair:
    """The texts of a pair; a prompt of a single user turn counts as the plain text that it is elsewhere."""
    return TextPair(_prompt_text(pair.prompt), plain_text(pair.chosen), plain_text(pair.rejected))


def _prompt_text(prompt: Text) -> str:
    if not isinstance(prompt, str) and len(prompt) == 1 and prompt[0]["role"] == "user":
        return str(prompt[0]["content"])
    return plain_text(prompt)


def read_all(data: DataConfig) -> list[tuple[str, PreferencePair]]:
    """Every pair of the sources as it was read, repeated ones too, with the path of its source; bad rows are
    `load_pool`'s business."""
    found = []
    for source in (*data.sources, *data.eval.sources):
        for row in read_rows(source):
            try:
                found += [(source.path, pair) for pair in to_pairs(row, source).pairs]
            except RowError:
                continue
    return found


def _prompts(source: SourceConfig) -> list[Prompt]:
    """The distinct prompts of a source of pairs, or of prompts alone."""
    first: dict[str, Prompt] = {}
    for row in read_rows(source):
        for text in _prompts_of(row, source):
            first.setdefault(text, Prompt(text, f"{row.source}:{row.number}"))
    return list(first.values())


def _prompts_of(row: Row, source: SourceConfig) -> list[str]:
    try:
        if pairs := to_pairs(row, source).pairs:
            return [_prompt_text(pair.prompt) for pair in pairs]
    except RowError as error:
        if row.value is None:
            raise InputError(f"{row.source}:{row.number}: {error}") from None
    assert row.value is not None
    try:
        found = prompt_of(row.value)
        if found is not None:
            return [_prompt_text(found if isinstance(found, str) else to_turns(found, "user", "prompt"))]
    except RowError as error:
        raise InputError(f"{row.source}:{row.number}: {error}") from None
    raise InputError(f"{row.source}:{row.number}: no prompt in it; its columns are {', '.join(map(str, row.value))}")


def _duplicates(pairs: Sequence[PreferencePair], held_out: set[str], on_progress: Progress) -> _Part:
    texts = list(map(text_of, pairs))
    found = links(texts, on_progress=lambda done, total: on_progress("duplicates", done, total))
    rows = [
        {
            "kind": link.kind,
            "contradicts": link.is_opposite,
            "similarity": round(link.similarity, 4),
            "crosses_split": (pairs[link.first].pair_id in held_out) != (pairs[link.second].pair_id in held_out),
            "first": pairs[link.first].place,
            "second": pairs[link.second].place,
        }
        for link in found
    ]
    by_kind: dict[bool, list[tuple[Link, Tree]]] = {True: [], False: []}
    for link, row in zip(found, rows, strict=True):
        by_kind[link.is_opposite].append((link, row))
    alike = sum(1 for text in texts if text.normalised.chosen == text.normalised.rejected)
    tree = {
        "duplicates": _repeats(by_kind[False], texts),
        "contradictions": _repeats(by_kind[True], texts),
        "equal_responses": alike,
    }
    return _Part(tree, rows)


def _repeats(found: Sequence[tuple[Link, Tree]], texts: Sequence[TextPair]) -> Tree:
    """Counts of links of one kind, and the nearest of those that are not plainly equal."""
    worst = sorted(found, key=lambda item: (item[0].kind == "same" and not item[0].is_opposite, -item[0].similarity))
    return {
        "same": sum(link.kind == "same" for link, _ in found),
        "near": sum(link.kind == "near" for link, _ in found),
        "cross_split": sum(row["crosses_split"] for _, row in found),
        "examples": [
            {**row, "prompt": cut(texts[link.first].prompt)}
            | {f"{side}_{name}": cut(getattr(texts[place], name)) for side, place in _sides(link) for name in RESPONSES}
            for link, row in worst[:EXAMPLES]
        ],
    }


RESPONSES = ("chosen", "rejected")


def _sides(link: Link) -> tuple[tuple[str, int], tuple[str, int]]:
    return ("first", link.first), ("second", link.second)


def _leaks(
    name: str,
    prompts: Sequence[Prompt],
    train: Sequence[PreferencePair],
    texts: Sequence[TextPair],
    on_progress: Progress,
) -> _Part:
    """Which evaluated prompts stand in training pairs."""
    distinct = list({prompt.text: prompt for prompt in reversed(prompts)}.values())[::-1]
    found = matches(
        [prompt.text for prompt in distinct],
        texts,
        on_progress=lambda done, total: on_progress(f"contamination: {name}", done, total),
    )
    best: dict[int, Match] = {}
    for match in found:
        known = best.get(match.evaluated)
        if known is None or _strength(match) > _strength(known):
            best[match.evaluated] = match
    rows = [
        {
            "evaluated": name,
            "place": distinct[number].place,
            "kind": match.kind,
            "similarity": round(match.similarity, 4),
            "where": match.where,
            "num_trained": len(match.trained),
            "trained": [train[place].place for place in match.trained[:PLACES]],
            "prompt": cut(distinct[number].text),
            "found": cut(_found_text(match, texts[match.trained[0]], distinct[number].text)),
        }
        for number, match in sorted(best.items(), key=lambda item: (*(-x for x in _strength(item[1])), item[0]))
    ]
    kinds = Counter(row["kind"] for row in rows)
    counts = {kind: kinds[kind] for kind in ("same", "near", "contained")}
    tree = {"evaluated": name, "prompts": len(distinct), "found": len(rows), **counts, "examples": rows[:EXAMPLES]}
    return _Part(tree, rows)


def _strength(match: Match) -> tuple[int, float]:
    return {"contained": 0, "near": 1, "same": 2}[match.kind], match.similarity


def _found_text(match: Match, trained: TextPair, evaluated: str) -> str:
    """The training text of a match; of two responses the one that shares more words."""
    if match.where == "prompt":
        return trained.prompt
    words = set(evaluated.split())
    return max(trained[1:], key=lambda response: len(words & set(response.split())))


def _mislabelled(
    kept: Sequence[PreferencePair],
    texts: Sequence[TextPair],
    paths: Sequence[str],
    num_train: int,
    on_progress: Progress,
) -> _Part:
    """One model for all, judged source by source: what it can tell of one says nothing about another."""
    groups = [pair.group_id for pair in kept]
    if len(set(groups)) < 2:
        return _Part(None, [])
    margins = cross_fitted_margins(texts, groups, lambda done, total: on_progress("mislabelled pairs", done, total))
    by_source, rows = [], []
    for path, places in _places(paths).items():
        judged = judge(margins[places])
        by_source.append({"source": path, "pairs": len(places), **_judgement(judged)})
        rows += [
            {
                "place": kept[place].place,
                "pair_id": kept[place].pair_id,
                "probability": round(float(judged.probability[i]), 4),
                "margin": round(float(margins[place]), 4),
                "held_out": bool(place >= num_train),
                **texts[place]._asdict(),
            }
            for i, place in enumerate(places)
            if judged.is_suspicious[i]
        ]
    rows.sort(key=lambda row: (-row["probability"], row["pair_id"]))
    shown = [row | {name: cut(row[name]) for name in TextPair._fields} for row in rows[:EXAMPLES]]
    return _Part(
        {**_judgement(judge(margins)), "suspicious": len(rows), "by_source": by_source, "examples": shown}, rows
    )


def _judgement(judged: Judged) -> Tree:
    shares = {name: round(getattr(judged, name), 4) for name in ("accuracy", "low", "high", "threshold")}
    return shares | {"suspicious": int(judged.is_suspicious.sum())}


def _places(paths: Sequence[str]) -> dict[str, list[int]]:
    """Where the pairs of each source stand."""
    found: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        found.setdefault(path, []).append(i)
    return dict(sorted(found.items()))


def _mix(pool: Pool) -> list[Tree]:
    """What each source gives: to training, and of all pairs that are kept."""
    sources = [*pool.report["sources"], *pool.report["eval_sources"]]
    total = sum(source["pairs"] for source in sources)
    return [
        {name: source[name] for name in ("path", "rows", "pairs", "held_out")} | {"share": source["pairs"] / total}
        for source in sources
    ]


def _languages(texts: Sequence[TextPair]) -> list[Tree]:
    """Of the prompts, and how often the chosen response is in another one."""
    counts: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    for text in texts:
        asked, answered = language_of(text.prompt or text.chosen), language_of(text.chosen)
        counts[asked] += 1
        differing[asked] += _is_other(asked, answered)
    return [
        {"language": name, "pairs": count, "share": count / len(texts), "answered_in_another": differing[name]}
        for name, count in counts.most_common()
    ]


def _is_other(asked: str, answered: str) -> bool:
    """Where both are known: a text without letters, or too short for its language, is no other one."""
    if "none" in (asked, answered):
        return False
    return not (asked.startswith(answered) or answered.startswith(asked))


def _length_bias(texts: Sequence[TextPair], paths: Sequence[str]) -> Tree:
    """How often the longer response is the chosen one, over all and by source; equal lengths count half."""
    wins = np.array([(np.sign(len(text.chosen) - len(text.rejected)) + 1) / 2 for text in texts])
    by_source = [{"source": path, **_share(wins[places])} for path, places in _places(paths).items()]
    return {**_share(wins), "by_source": by_source}


def _share(wins: Any) -> Tree:
    accuracy = float(wins.mean())
    low, high = wilson_interval(accuracy, len(wins))
    return {"pairs": len(wins), "longer_is_better": accuracy, "low": low, "high": high}


def _lengths(texts: Sequence[TextPair]) -> list[Tree]:
    """Of prompt and responses, in characters and words."""
    measures: dict[str, Callable[[str], int]] = {"characters": len, "words": lambda text: len(text.split())}
    return [
        {"of": part, "unit": unit, **_spread([measure(getattr(text, part)) for text in texts])}
        for part in TextPair._fields
        for unit, measure in measures.items()
    ]


def _spread(counts: Sequence[int]) -> dict[str, float]:
    low, median, high = np.percentile(counts, [5, 50, 95]).tolist() if counts else (0.0, 0.0, 0.0)
    return {"p5": low, "median": median, "p95": high, "max": max(counts, default=0)}


def _tokens(encoder: PairEncoder, pairs: Sequence[PreferencePair], on_progress: Progress) -> Tree:
    """Token counts of the pairs that survive encoding, and what happens to the others."""
    found: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": []}
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = encoder.encode(pairs[start : start + _PAIRS_AT_ONCE])
        dropped.update(part.dropped)
        truncated.update(part.truncated)
        for pair in part.pairs:
            for name, ids in zip(found, (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids), strict=True):
                found[name].append(len(ids))
        on_progress("tokens", min(len(pairs), start + _PAIRS_AT_ONCE), len(pairs))
    return {
        "pairs": len(found["prompt"]),
        "tokens": sum(map(sum, found.values())),
        "dropped": dict(dropped),
        "truncated": dict(truncated),
        "lengths": [{"of": name, "unit": "tokens", **_spread(counts)} for name, counts in found.items()],
    }


def _histograms(texts: Sequence[TextPair]) -> Tree:
    """Pairs by the lengths of their responses (logarithmic bins) and by the difference of these, in characters."""
    lengths = {name: np.array([len(getattr(text, name)) for text in texts]) for name in RESPONSES}
    most = max(int(counts.max(initial=2)) for counts in lengths.values())
    edges = np.geomspace(1, most + 1, BINS + 1)
    difference = lengths["chosen"] - lengths["rejected"]
    reach = float(np.percentile(np.abs(difference), 99)) or 1.0
    middle = np.linspace(-reach, reach, BINS + 1)
    return {
        "length_edges": edges.tolist(),
        **{name: np.histogram(counts, edges)[0].tolist() for name, counts in lengths.items()},
        "difference_edges": middle.tolist(),
        "difference": np.histogram(np.clip(difference, -reach, reach), middle)[0].tolist(),
    }


def cut(text: str) -> str:
    """A text as it is shown: its beginning."""
    return text if len(text) <= TEXT_SHOWN else f"{text[:TEXT_SHOWN]}..."


LENGTH_TOLD = 0.6
"""A length rule that agrees with more labels than this is worth a look."""


def findings(tree: Mapping[str, Any]) -> list[dict[str, str]]:
    """What was found and what to do about it, in a line each: `what`, `found`, `advice`."""
    return [*_repeat_findings(tree), *map(_leak_finding, tree["contamination"]), *_label_findings(tree)]


def _finding(what: str, found: str, advice: str) -> dict[str, str]:
    return {"what": what, "found": found, "advice": advice}


def _repeat_findings(tree: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    twice, opposite = tree["duplicates"], tree["contradictions"]
    yield _finding(
        "duplicates",
        f"{twice['same']} the same, {twice['near']} near; {twice['cross_split']} across the held-out split",
        "nothing"
        if not twice["same"] + twice["near"]
        else "equal ones are dropped at training; thin out the near ones",
    )
    yield _finding(
        "contradictions",
        f"{opposite['same']} of the same pair, {opposite['near']} near",
        "nothing" if not opposite["same"] + opposite["near"] else "decide which label holds; drop the other, or both",
    )
    if tree["equal_responses"]:
        yield _finding("equal responses", f"{tree['equal_responses']} pairs", "drop them: they only teach white space")


def _leak_finding(leak: Mapping[str, Any]) -> dict[str, str]:
    kinds = ", ".join(f"{leak[kind]} {kind}" for kind in ("same", "near", "contained") if leak[kind])
    return _finding(
        f"contamination: {leak['evaluated']}",
        f"{leak['found']} of {leak['prompts']} prompts" + (f" ({kinds})" if kinds else ""),
        "drop the training pairs named in contamination.jsonl" if leak["found"] else "nothing",
    )


def _label_findings(tree: Mapping[str, Any]) -> Iterable[dict[str, str]]:
    bias = tree["length_bias"]
    is_biased = max(bias["longer_is_better"], 1 - bias["longer_is_better"]) > LENGTH_TOLD
    yield _finding(
        "length bias",
        f"the longer response is chosen in {_percent(bias, 'longer_is_better')}",
        "compare with a length-normalised loss (sigmoid_norm, simpo), or ld_alpha" if is_biased else "nothing",
    )
    told = tree["mislabelled"]
    if told is None:
        yield _finding("mislabelled", "not measured: all pairs share one prompt or group", "nothing")
        return
    untold = [part["source"] for part in told["by_source"] if part["low"] <= LEAST_ACCURACY]
    advice = "look at suspicious.jsonl from the top" if told["suspicious"] else "nothing"
    if untold:
        advice += f"; {len(untold)} of {len(told['by_source'])} sources cannot be told by the surface of their texts"
    yield _finding(
        "mislabelled",
        f"{told['suspicious']} suspicious; margins agree with {_percent(told, 'accuracy')} of labels",
        advice,
    )


def _percent(values: Mapping[str, Any], name: str) -> str:
    return f"{100 * values[name]:.1f} % ({100 * values['low']:.1f} to {100 * values['high']:.1f})"
