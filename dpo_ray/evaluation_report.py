"""What `evaluation.json` says, for people: tables and panels, as a part of a run's report and as a page of its own.

Every part of an evaluation may be missing; then it is not shown. In it, "before" is the model compared with, "after"
the model that was evaluated.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from matplotlib.axes import Axes

from dpo_ray.errors import InputError
from dpo_ray.metrics import METRICS, wilson_interval
from dpo_ray.page import (
    BLUE,
    GREY,
    Panel,
    document,
    duration,
    estimate,
    numbers,
    panels_side_by_side,
    paragraph,
    percent,
    percent_with_interval,
    said,
    section,
    sheet,
    subsection,
    table,
    text,
    with_interval,
)
from dpo_ray.run_panels import reward_panels_of
from dpo_ray.storage import Folder, redacted

Tree = Mapping[str, Any]

_INTERVALS = ("_low", "_high")


def write_evaluation_report(folder: str) -> list[str]:
    """Write `evaluation.html` and, where there is anything to draw, `evaluation.png` beside `evaluation.json`.

    Returns:
        Their paths.

    Raises:
        InputError: There is no readable `evaluation.json`, or the folder cannot be written.
    """
    place = Folder(folder)
    if not place.exists("evaluation.json"):
        raise InputError(f"no evaluation.json in {place.path}: `dpo-ray evaluate` writes it")
    try:
        tree = place.read_json("evaluation.json")
    except ValueError as error:
        raise InputError(f"{place.path}/evaluation.json is not JSON: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{place.path}/evaluation.json holds no object")
    model = redacted(str(tree.get("model") or "a model"))
    place.write("evaluation.html", document(f"Evaluation of {model.rpartition('/')[2]}", _page(tree), model))
    written = [f"{place.path}/evaluation.html"]
    if panels := evaluation_panels(tree):
        place.write("evaluation.png", sheet(panels))
        written.append(f"{place.path}/evaluation.png")
    return written


def _page(tree: Tree) -> str:
    rewards = panels_side_by_side(reward_panels_of(tree))
    parts = [section("Summary", *map(paragraph, evaluation_sentences(tree)), numbers(evaluation_numbers(tree)))]
    parts += [section(title, content) for title, content in _parts(tree)]
    parts += [section("Reward distributions", rewards)] if rewards else []
    parts += [section("Examples", content)] if (content := examples(tree)) else []
    return "\n".join([*parts, section("Versions and fingerprints", _origin(tree))])


def evaluation_sections(tree: Tree) -> str:
    """All parts as subsections (HTML), without reward distributions and examples: those have sections of their own."""
    return "\n".join(subsection(title, content) for title, content in _parts(tree))


def evaluation_panels(tree: Tree) -> list[Panel]:
    """Every picture of an evaluation."""
    held_out = tree.get("held_out") or {}
    return [*_win_rate_panels(tree), *_calibration_panels(held_out), *reward_panels_of(tree)]


def evaluation_sentences(tree: Tree) -> list[str]:
    """What was found, one plain sentence for each win rate, perplexity and task."""
    told = []
    for found in tree.get("win_rate") or []:
        if found.get("value") is not None:
            value = percent_with_interval(found["value"], found.get("low"), found.get("high"))
            told.append(
                f"Against {found['against']}, judged by {found['judge']}, it wins {value} of {found['num_prompts']} "
                f"prompts: {_verdict(found)}."
            )
    retention = tree.get("retention") or {}
    for found in retention.get("perplexity") or []:
        told.append(
            f"Perplexity on {_short(found['source'])}: {text(found['before'])} before, {text(found['after'])} after "
            f"(change {_signed(found)} nats per token): {_change(found, worse='higher')}."
        )
    for found in retention.get("tasks") or []:
        told.append(
            f"{found['task']}, {found['metric']}: {text(found['before'])} before, {text(found['after'])} after (change "
            f"{_signed(found)}): {_change(found, worse='lower')}."
        )
    return told


def evaluation_numbers(tree: Tree) -> list[tuple[str, str, str]]:
    """Key numbers: name, value, note."""
    found = []
    for rate in tree.get("win_rate") or []:
        if rate.get("value") is not None:
            found.append((f"win rate against {rate['against']}", percent(rate["value"]), _range(rate)))
    for row in (tree.get("retention") or {}).get("perplexity") or []:
        found.append((f"perplexity, {_short(row['source'])}", text(row["after"]), f"{text(row['before'])} before"))
    if kl := tree.get("kl"):
        found.append(("KL, own samples", text(kl["value"]), "nats per response"))
    return found


def _parts(tree: Tree) -> list[tuple[str, str]]:
    """Title and HTML of each part that is there."""
    held_out, retention = tree.get("held_out") or {}, tree.get("retention") or {}
    parts = [
        ("Win rates", _win_rates(tree)),
        ("Ranking", _ranking(tree.get("ranking") or [])),
        ("Held-out pairs", _held_out(held_out)),
        ("By source", _groups(held_out.get("by_source") or [], "source")),
        ("By length", _groups(held_out.get("by_length") or [], "tokens")),
        ("Calibration", _calibration(held_out)),
        ("Retention", _retention(retention)),
        ("KL to the reference", _kl(tree.get("kl"))),
        ("Drift of its texts", _drift(tree.get("drift") or [])),
    ]
    return [(title, content) for title, content in parts if content]


def _win_rates(tree: Tree) -> str:
    found = tree.get("win_rate") or []
    if not found:
        return ""
    rows = [
        [
            rate["against"],
            text(rate.get("num_prompts")),
            ", ".join(text(rate.get(name)) for name in ("wins", "ties", "losses")),
            percent_with_interval(*_triple(rate)),
            percent_with_interval(*_triple(rate.get("length_controlled"))),
            percent(rate.get("length_controlled_alpaca_eval")),
            _verdict(rate),
        ]
        for rate in found
    ]
    heads = [
        "against",
        "prompts",
        "wins, ties, losses",
        "win rate (95 %)",
        "at equal lengths (95 %)",
        "AlpacaEval 2",
        "",
    ]
    judges = [
        [
            rate["against"],
            rate["judge"],
            percent_with_interval(*_triple(rate.get("first_position"))),
            text(rate.get("missing")),
            ", ".join(f"{name} {text(value)}" for name, value in (rate.get("cost") or {}).items()) or "-",
        ]
        for rate in found
    ]
    note = (
        "A tie counts half. At equal lengths: what is left of the win rate when neither response is the longer; "
        "AlpacaEval 2: the same by its own fit, to stand beside its board. First place won: how often the judge "
        "prefers what it is shown first; 50 % is a judge without such a preference."
    )
    return "\n".join(
        [
            panels_side_by_side(_win_rate_panels(tree)),
            table(heads, rows),
            table(["against", "judge", "first place won (95 %)", "without a verdict", "cost"], judges),
            paragraph(note),
        ]
    )


def _win_rate_panels(tree: Tree) -> list[Panel]:
    found = [rate for rate in tree.get("win_rate") or [] if rate.get("value") is not None]
    if not found:
        return []

    def draw(axes: Axes) -> None:
        axes.axvline(0.5, color=GREY, linestyle="--", linewidth=1)
        for row, rate in enumerate(found):
            value, low, high = _triple(rate)
            if low is not None and high is not None:
                axes.plot([low, high], [row, row], color=BLUE, linewidth=2)
            axes.plot(value, row, "o", color=BLUE)
        names = [f"{_cut(rate['against'])}\n{_cut(rate['judge'])}" for rate in found]
        axes.set_yticks(range(len(found)), names, fontsize=8)
        axes.set(xlabel="win rate", xlim=(0, 1), ylim=(len(found) - 0.5, -0.5))

    return [
        Panel(
            "Win rates",
            "Share of prompts won, with 95 % intervals. Dashed: neither is better.",
            draw,
            1.2 + 0.5 * len(found),
        )
    ]


def _ranking(found: Sequence[Tree]) -> str:
    if not found:
        return ""
    rows = [[row["model"], estimate(dict(row), "rating")] for row in found]
    return table(["model", "rating (95 %)"], rows) + paragraph("Bradley-Terry ratings in nats, relative to their mean.")


def _held_out(held_out: Tree) -> str:
    metrics = held_out.get("metrics") or {}
    names = [name for name in metrics if not name.endswith(_INTERVALS) and name != "num_pairs"]
    rows = [
        [
            name,
            with_interval(metrics[name], *(metrics.get(name + end) for end in _INTERVALS)),
            METRICS[name].unit if name in METRICS else "",
            METRICS[name].meaning if name in METRICS else "",
        ]
        for name in names
    ]
    if not rows:
        return ""
    told = f"{text(held_out.get('num_pairs', metrics.get('num_pairs')))} pairs that no step trained on."
    if found := held_out.get("length_controlled_accuracy"):
        told += f" With responses of equal length the accuracy would be {percent_with_interval(*_triple(found))}."
    if found := held_out.get("longer_is_better"):
        told += f" The rule that the longer response wins scores {percent_with_interval(*_triple(found))} on them."
    return paragraph(told) + table(["metric", "value (95 %)", "unit", "meaning"], rows)


def _groups(rows: Sequence[Tree], name: Literal["source", "tokens"]) -> str:
    """Accuracy, margin and calibration of each group of held-out pairs."""
    if not rows:
        return ""
    shown = [
        [
            _short(row[name]) if name == "source" else str(row[name]),
            text(row.get("num_pairs")),
            percent_with_interval(row.get("rewards/accuracies"), row.get("low"), row.get("high")),
            text(row.get("rewards/margins")),
            text(row.get("expected_calibration_error")),
        ]
        for row in rows
    ]
    return table([name, "pairs", "accuracy (95 %)", "margin (nats)", "expected calibration error"], shown)


def _calibration(held_out: Tree) -> str:
    found = held_out.get("calibration")
    if not found:
        return ""
    told = (
        f"Calibration error {estimate(found.get('calibration_error'))} (root mean square over bins, their noise "
        f"subtracted); expected calibration error {text(found.get('expected_calibration_error'))}, of which "
        f"a calibrated model would have {text(found.get('if_calibrated'))} by chance; "
        f"Brier score {text(found.get('brier'))}; "
        f"calibrating temperature {text(found.get('temperature'))}. A margin m says that the chosen response is "
        "preferred with probability 1 / (1 + exp(-m)); a calibrated model is right as often as it says."
    )
    return panels_side_by_side(_calibration_panels(held_out)) + paragraph(told)


def _calibration_panels(held_out: Tree) -> list[Panel]:
    bins = [one for one in (held_out.get("calibration") or {}).get("bins") or [] if one.get("num_pairs")]
    if not bins:
        return []

    def draw(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=GREY, linestyle="--", linewidth=1)
        for one in bins:
            low, high = wilson_interval(one["accuracy"], one["num_pairs"])
            axes.plot([one["confidence"]] * 2, [low, high], color=BLUE, alpha=0.4, linewidth=1.5)
        xs, ys = [one["confidence"] for one in bins], [one["accuracy"] for one in bins]
        axes.plot(xs, ys, "o-", color=BLUE, linewidth=1)
        axes.set(xlabel="confidence", ylabel="share right", xlim=(0.48, 1.02), ylim=(-0.02, 1.02))

    caption = (
        "How often the higher implicit reward is right, by how sure it is, with 95 % intervals. Below the dashed line "
        "it is too sure."
    )
    return [Panel("Calibration", caption, draw)]


def _retention(retention: Tree) -> str:
    parts = []
    if found := retention.get("perplexity"):
        rows = [
            [
                _short(row["source"]),
                text(row.get("num_texts")),
                text(row.get("num_tokens")),
                text(row["before"]),
                text(row["after"]),
                _signed(row),
                _change(row, worse="higher"),
            ]
            for row in found
        ]
        heads = ["texts", "number", "tokens", "before", "after", "change (95 %), nats per token", ""]
        parts.append(paragraph("Perplexity of texts that are not of the training data: lower is better."))
        parts.append(table(heads, rows))
    if found := retention.get("tasks"):
        rows = [
            [
                row["task"],
                row["metric"],
                text(row["before"]),
                text(row["after"]),
                _signed(row),
                _change(row, worse="lower"),
            ]
            for row in found
        ]
        parts.append(table(["task", "metric", "before", "after", "change (95 %)", ""], rows))
    return "\n".join(parts)


def _kl(found: Tree | None) -> str:
    if not found:
        return ""
    return paragraph(
        f"KL(policy || reference) is {estimate(dict(found))} nats per response ({text(found.get('per_token'))} per "
        f"token), from {text(found.get('num_responses'))} responses of the policy's own."
    )


def _drift(found: Sequence[Tree]) -> str:
    if not found:
        return ""
    rows = [
        [row["name"], row.get("unit") or "", text(row["before"]), text(row["after"]), _signed(row), _change(row)]
        for row in found
    ]
    return table(["of its responses", "unit", "before", "after", "change (95 %)", ""], rows)


def examples(tree: Tree) -> str:
    """Prompts with the responses before and after side by side (HTML); nothing where there are none."""
    return "\n".join(_example(number, found) for number, found in enumerate(tree.get("examples") or [], 1))


def _example(number: int, found: Tree) -> str:
    preferred = found.get("preferred")
    told = "; ".join(filter(None, ("judged a tie" if preferred == "tie" else "", found.get("note"))))
    sides = "".join(
        f"<div><h4>{name}{', preferred' if preferred == side else ''}</h4>"
        f"{said(str(found.get(side) or ''), is_preferred=preferred == side)}</div>"
        for side, name in (("before", "Before"), ("after", "After"))
    )
    note = f'<p class="note">{html.escape(told[:1].upper() + told[1:])}.</p>' if told else ""
    return (
        f'<article class="example"><h3>Example {number}</h3>{said(str(found["prompt"]))}'
        f'<div class="sides">{sides}</div>{note}</article>'
    )


def _origin(tree: Tree) -> str:
    """What was evaluated, against what, with which versions."""
    rows = [
        [name.replace("_", " "), redacted(text(tree[name]))] for name in ("model", "model_fingerprint") if name in tree
    ]
    rows += [
        [f"against: {other['name']}", redacted(f"{other.get('path') or ''} {other.get('fingerprint') or ''}").strip()]
        for other in tree.get("against") or []
    ]
    rest = ("reference", "data_fingerprint", "beta")
    rows += [[name.replace("_", " "), redacted(text(tree[name]))] for name in rest if name in tree]
    rows += [["made", text(tree["created"])]] if tree.get("created") else []
    rows += [["time", duration(tree["seconds"])]] if tree.get("seconds") is not None else []
    return table([], [*rows, *([name, text(value)] for name, value in (tree.get("versions") or {}).items())])


def _triple(found: Tree | None) -> tuple[Any, Any, Any]:
    values = found or {}
    return values.get("value"), values.get("low"), values.get("high")


def _range(found: Tree) -> str:
    _, low, high = _triple(found)
    return "" if low is None or high is None else f"{percent(low)} to {percent(high)}"


def _verdict(rate: Tree) -> str:
    """What the interval of a win rate allows to say."""
    _, low, high = _triple(rate)
    if low is None or high is None:
        return "no interval is known"
    if low > 0.5:
        return "it is better"
    return "it is worse" if high < 0.5 else "neither is shown to be better"


def _change(found: Tree, worse: Literal["higher", "lower"] | None = None) -> str:
    """What the interval of a change allows to say."""
    low, high = found.get("low"), found.get("high")
    if low is None or high is None:
        return "no interval is known"
    if low <= 0 <= high:
        return "no change is shown"
    rises = "higher" if low > 0 else "lower"
    return rises if worse is None else "worse" if rises == worse else "better"


def _signed(found: Tree) -> str:
    """The change with its sign, and its interval."""
    values = [found.get(name) for name in ("change", "low", "high")]
    value, low, high = ("-" if value is None else f"{value:+.3g}" for value in values)
    return value if "-" in (low, high) else f"{value} ({low} to {high})"


def _short(path: str) -> str:
    """The last part of a path; the table has room for no more."""
    return redacted(str(path)).rstrip("/").rpartition("/")[2]


def _cut(name: str, most: int = 28) -> str:
    """For an axis: not too long, and a dollar is a dollar (matplotlib would read mathematics between two)."""
    return (name if len(name) <= most else name[: most - 1] + "…").replace("$", r"\$")
