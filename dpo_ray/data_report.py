"""`dpo-ray data`: the data of a recipe measured in depth, written as files and as one HTML page. Trains nothing.

The texts on the page are the user's data, escaped and cut; nothing is fetched from elsewhere.
"""

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from dpo_ray.config import RunConfig, SourceConfig
from dpo_ray.data.encode import PairEncoder
from dpo_ray.data.mislabelled import LEAST_ACCURACY
from dpo_ray.data.quality import Progress, Quality, findings, inspect
from dpo_ray.models import end_token_ids, load_tokenizer, policy_source
from dpo_ray.page import BLUE, GREEN, GREY, RED, document, image, paragraph, picture, table, text, with_interval
from dpo_ray.prepare import resolve
from dpo_ray.storage import Folder

QUALITY_FILE, PAGE_FILE = "quality.json", "quality.html"
DUPLICATES_FILE, CONTAMINATION_FILE, SUSPICIOUS_FILE = "duplicates.jsonl", "contamination.jsonl", "suspicious.jsonl"


def report_data(
    run: RunConfig,
    *,
    against: Sequence[str] = (),
    output: str | None = None,
    with_tokens: bool = True,
    on_progress: Progress = lambda text, done, total: None,
) -> dict[str, Any]:
    """Measure the data of a recipe and write `quality.json`, `quality.html` and the rows behind them.

    Args:
        against: Files or sources of prompts, or pairs, that will be evaluated on.
        output: Folder; None: `name` with `-data` behind it, in the storage of the recipe. What is there is overwritten.
        with_tokens: Count tokens with the recipe's tokenizer; without, no model is needed.

    Returns:
        The tree of `quality.json`, with `name`, `folder` and `findings`.

    Raises:
        InputError: Bad input, named by key, or file and row; no tokenizer; or the folder cannot be written.
    """
    run = resolve(run)
    folder = Folder(output or f"{run.storage.path}/{run.name}-data")
    folder.check_writable()
    found = inspect(
        run.data,
        encoder=_encoder(run) if with_tokens else None,
        against=[SourceConfig(path=path) for path in against],
        on_progress=on_progress,
    )
    tree = {"name": run.name, "folder": folder.path, "findings": findings(found.tree), **found.tree}
    _write(folder, found, tree)
    return tree


def _encoder(run: RunConfig) -> PairEncoder:
    policy = policy_source(run.model)
    return PairEncoder(load_tokenizer(policy), run.data, end_token_ids(policy))


def _write(folder: Folder, found: Quality, tree: Mapping[str, Any]) -> None:
    folder.write_lines(DUPLICATES_FILE, found.duplicates)
    folder.write_lines(CONTAMINATION_FILE, found.contamination)
    folder.write_lines(SUSPICIOUS_FILE, found.suspicious)
    folder.write_json(QUALITY_FILE, tree)
    folder.write(PAGE_FILE, page(tree))


def page(tree: Mapping[str, Any]) -> bytes:
    """The HTML page of a `quality.json`."""
    sections: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("Findings", _findings),
        ("Pairs and sources", _sources),
        ("Languages", _languages),
        ("Contradictions", lambda tree: _repeats(tree["contradictions"])),
        ("Duplicates", lambda tree: _repeats(tree["duplicates"])),
        ("Contamination", _contamination),
        ("Length bias", _length_bias),
        ("Likely mislabelled", _mislabelled),
        ("Lengths", _lengths),
    )
    body = "\n".join(f"<h2>{html.escape(title)}</h2>\n{show(tree)}" for title, show in sections)
    return document(f"Data of {tree['name']}", body)


def _findings(tree: Mapping[str, Any]) -> str:
    rows = [[finding["what"], finding["found"], finding["advice"]] for finding in tree["findings"]]
    return table(["what", "found", "what to do"], rows)


def _rows(rows: Sequence[Mapping[str, Any]], heads: Sequence[str]) -> str:
    return table([head.replace("_", " ") for head in heads], [[text(row[head]) for head in heads] for row in rows])


def _sources(tree: Mapping[str, Any]) -> str:
    pairs = tree["pairs"]
    counts = [[name.replace("_", " "), text(pairs[name])] for name in ("rows", "pairs", "train", "held_out")]
    dropped = [[f"dropped: {reason}", text(count)] for reason, count in pairs["dropped"].items()]
    return table([], counts + dropped) + _rows(tree["sources"], ("path", "rows", "pairs", "held_out", "share"))


def _languages(tree: Mapping[str, Any]) -> str:
    note = paragraph("Told by letters and by a few stop words: good enough to see a mix, not to judge a single text.")
    return note + _rows(tree["languages"], ("language", "pairs", "share", "answered_in_another"))


def _repeats(part: Mapping[str, Any]) -> str:
    told = paragraph(
        f"{part['same']} the same but for case and white space, {part['near']} nearly the same, "
        f"{part['cross_split']} across the held-out split; all are in {DUPLICATES_FILE}."
    )
    rows = []
    for example in part["examples"]:
        rows.append(
            [_place(example["first"]), text(example["similarity"]), example["prompt"], *_responses(example, "first")]
        )
        rows.append([_place(example["second"]), "", "", *_responses(example, "second")])
    return told + table(["pair", "similarity", "prompt", "chosen", "rejected"], rows)


def _place(place: str) -> str:
    """File and row without the folders above, which would push the texts off the page."""
    return "/".join(place.split("/")[-2:])


def _responses(example: Mapping[str, Any], which: str) -> list[str]:
    return [example[f"{which}_{side}"] for side in ("chosen", "rejected")]


def _contamination(tree: Mapping[str, Any]) -> str:
    parts = [
        paragraph(
            "Evaluated prompts that stand in a training pair: the same but for punctuation, near, or contained in "
            f"something longer; all are in {CONTAMINATION_FILE}."
        ),
        _rows(tree["contamination"], ("evaluated", "prompts", "found", "same", "near", "contained")),
    ]
    heads = ("place", "kind", "similarity", "trained", "where", "prompt", "found")
    for leak in tree["contamination"]:
        if leak["examples"]:
            shown = [
                example | {"place": _place(example["place"]), "trained": _trained(example)}
                for example in leak["examples"]
            ]
            parts.append(f"<h3>{html.escape(leak['evaluated'])}</h3>{_rows(shown, heads)}")
    return "\n".join(parts)


def _trained(example: Mapping[str, Any]) -> str:
    more = example["num_trained"] - 1
    return _place(example["trained"][0]) + (f" and {more} more" if more else "")


def _length_bias(tree: Mapping[str, Any]) -> str:
    bias = tree["length_bias"]
    rows = [
        [name, text(part["pairs"]), with_interval(part["longer_is_better"], part["low"], part["high"])]
        for name, part in (("all", bias), *((part["source"], part) for part in bias["by_source"]))
    ]
    told = paragraph(
        "Share of pairs whose chosen response is the longer one, with its 95 % interval; equal counts half."
    )
    return (
        told
        + table(["pairs of", "pairs", "longer is better"], rows)
        + image(picture(_figure(tree["histograms"])), "Lengths of the responses, and their differences")
    )


def _figure(histograms: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 4), layout="constrained")
    lengths, differences = figure.subplots(1, 2)
    for name, colour in (("chosen", GREEN), ("rejected", RED)):
        lengths.stairs(histograms[name], histograms["length_edges"], color=colour, label=name)
    lengths.set_xscale("log")
    lengths.set_xlabel("characters of a response")
    lengths.set_ylabel("pairs")
    lengths.legend(fontsize="small")
    differences.stairs(histograms["difference"], histograms["difference_edges"], fill=True, color=BLUE, alpha=0.6)
    differences.axvline(0, color=GREY, linewidth=1)
    differences.set_xlabel("characters, chosen less rejected (the outermost percent at the edges)")
    return figure


def _mislabelled(tree: Mapping[str, Any]) -> str:
    told = tree["mislabelled"]
    if told is None:
        return paragraph("Not measured: all pairs share one prompt or group.")
    note = paragraph(
        "A model of words, characters and lengths, fitted on other prompts, agrees with so many labels of a source. A "
        "label is suspicious where another one would say the opposite with a probability of at least the threshold. "
        f"All are in {SUSPICIOUS_FILE}. A source whose accuracy is not surely above {LEAST_ACCURACY} has none: what "
        "makes its responses good is not on the surface."
    )
    shown = [example | {"place": _place(example["place"])} for example in told["examples"]]
    rows = [
        [part["source"], *(text(part[name]) for name in ("pairs", "suspicious", "threshold")), _interval(part)]
        for part in told["by_source"]
    ]
    return (
        note
        + table(["source", "pairs", "suspicious", "threshold", "accuracy"], rows)
        + _rows(shown, ("place", "probability", "margin", "prompt", "chosen", "rejected"))
    )


def _interval(part: Mapping[str, Any]) -> str:
    return with_interval(part["accuracy"], part["low"], part["high"])


def _lengths(tree: Mapping[str, Any]) -> str:
    heads = ("of", "unit", "p5", "median", "p95", "max")
    tokens = tree["tokens"]
    if tokens is None:
        return _rows(tree["lengths"], heads)
    lost = {**tokens["dropped"], **{f"truncated: {part}": count for part, count in tokens["truncated"].items()}}
    counts = [["tokens", text(tokens["tokens"])], ["pairs encoded", text(tokens["pairs"])]]
    counts += [[reason, text(count)] for reason, count in lost.items()]
    return table([], counts) + _rows([*tree["lengths"], *tokens["lengths"]], heads)
