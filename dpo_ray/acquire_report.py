"""The report of an acquisition: learning curves against random, what was chosen and why. Reads files only."""

import html
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpo_ray.acquisition.standings import BASELINE, Contrast, contrasts, curves_of, labels_to, mean_curve
from dpo_ray.errors import InputError
from dpo_ray.page import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    document,
    image,
    paragraph,
    picture,
    table,
    text,
    with_interval,
)
from dpo_ray.storage import Folder

_COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, BROWN)
_STYLES = ("-", "--", ":")
CHOICES_SHOWN = 10


def write_acquire_report(folder: str) -> list[str]:
    """Write `report.html` and `report.png` into the folder of an acquisition, and return their paths.

    Raises:
        InputError: The folder has no finished round.
    """
    place = Folder(folder)
    tree = place.read_json("acquire.json")
    if not any(arm["rounds"] for arm in tree["arms"]):
        raise InputError(f"{folder}: no round has ended yet")
    png = picture(_figure(tree))
    place.write("report.png", png)
    place.write("report.html", document(tree["name"], _body(place, tree, png)))
    return [f"{place.path}/report.html", f"{place.path}/report.png"]


def _figure(tree: Mapping[str, Any]) -> Figure:
    figure = Figure(figsize=(11, 8), layout="constrained")
    curve, gain, opinion, length = figure.subplots(2, 2).ravel()
    _curves(curve, tree)
    _gains(gain, tree)
    _by_round(opinion, tree, "agreement", "the model's implicit reward agrees with the label", "share of new labels")
    _by_round(length, tree, "characters", "length of what was chosen", "characters of a response")
    curve.legend(fontsize="small")
    return figure


def _look(tree: Mapping[str, Any], strategy: str) -> dict[str, Any]:
    """Random is grey, so that it is seen as what others are measured by."""
    if strategy == BASELINE:
        return {"color": GREY, "linestyle": "-", "linewidth": 2}
    place = [name for name in tree["strategies"] if name != BASELINE].index(strategy)
    return {"color": _COLOURS[place % len(_COLOURS)], "linestyle": _STYLES[place // len(_COLOURS) % len(_STYLES)]}


def _curves(axes: Axes, tree: Mapping[str, Any]) -> None:
    for strategy, by_labels in curves_of(tree).items():
        curve = mean_curve(by_labels)
        look = _look(tree, strategy)
        axes.plot(list(curve), [found.estimate for found in curve.values()], marker="o", label=strategy, **look)
        if all(math.isfinite(found.low) for found in curve.values()):
            low, high = [found.low for found in curve.values()], [found.high for found in curve.values()]
            axes.fill_between(list(curve), low, high, color=look["color"], alpha=0.12)
    axes.set(title=f"held-out {tree['metric']}, mean and 95 %", xlabel="labels asked for", ylabel=tree["metric"])


def _gains(axes: Axes, tree: Mapping[str, Any]) -> None:
    found = [contrast for contrast in _contrasts(tree) if contrast.labels is not None]
    axes.set(title="difference to random, 95 %", xlabel="labels asked for", ylabel=f"{tree['metric']}, better is up")
    axes.axhline(0, color=GREY, linewidth=1)
    if not found:
        axes.text(0.5, 0.5, "needs `random` and two seeds", ha="center", va="center", transform=axes.transAxes)
        return
    names = list(dict.fromkeys(contrast.strategy for contrast in found))
    budgets = sorted({contrast.labels for contrast in found if contrast.labels is not None})
    step = min((b - a for a, b in pairwise(budgets)), default=budgets[0])
    for contrast in found:
        assert contrast.labels is not None
        shift = (names.index(contrast.strategy) - (len(names) - 1) / 2) / max(1, len(names)) * step * 0.6
        value, low, high = contrast.difference
        axes.errorbar(
            contrast.labels + shift,
            value,
            yerr=[[value - low], [high - value]],
            marker="o",
            capsize=2,
            **_look(tree, contrast.strategy),
        )


def _by_round(axes: Axes, tree: Mapping[str, Any], name: str, title: str, unit: str) -> None:
    """The mean over seeds of what a round tells of its choices."""
    for strategy in tree["strategies"]:
        values: dict[int, list[float]] = {}
        for arm in tree["arms"]:
            for result in arm["rounds"] if arm["strategy"] == strategy else ():
                if result[name] is not None:
                    values.setdefault(result["asked"], []).append(result[name])
        if values:
            points = sorted(values.items())
            axes.plot(
                [labels for labels, _ in points],
                [sum(seen) / len(seen) for _, seen in points],
                marker="o",
                **_look(tree, strategy),
            )
    axes.set(title=title, xlabel="labels asked for", ylabel=unit)


def _sign(tree: Mapping[str, Any]) -> int:
    return 1 if tree["mode"] == "max" else -1


def _contrasts(tree: Mapping[str, Any]) -> list[Contrast]:
    return contrasts(curves_of(tree), _sign(tree))


def _body(place: Folder, tree: Mapping[str, Any], png: bytes) -> str:
    parts = [
        paragraph(_summary(tree)),
        image(png, "Learning curves of each strategy, their difference to random, agreement, lengths"),
        "<h2>At each budget</h2>",
        _values(tree),
        "<h2>Against random</h2>",
        _against_random(tree),
        "<h2>Labels to get there</h2>",
        _label_cost(tree),
        "<h2>What was asked</h2>",
        _asked(tree),
        "<h2>Why: the first choices of the last round</h2>",
        _why(place, tree),
    ]
    return "\n".join(parts)


def _summary(tree: Mapping[str, Any]) -> str:
    pool = tree["pool"]
    size = f"{pool['candidates']} candidates" if pool["candidates"] else f"{pool['prompts']} prompts"
    return (
        f"{tree['status']}: {len(tree['strategies'])} strategies, {len(tree['seeds'])} seeds, a pool of {size}, "
        f"{pool['held_out']} held-out pairs, labels from `{tree['oracle']}`; {tree['seconds']:.0f} s."
    )


def _values(tree: Mapping[str, Any]) -> str:
    curves = {strategy: mean_curve(found) for strategy, found in curves_of(tree).items()}
    budgets = sorted({labels for curve in curves.values() for labels in curve})
    rows = [
        [
            strategy,
            *(
                with_interval(curve[labels].estimate, *_finite(curve[labels].low, curve[labels].high))
                if labels in curve
                else "-"
                for labels in budgets
            ),
        ]
        for strategy, curve in curves.items()
    ]
    return table([f"{tree['metric']} after", *(f"{labels} labels" for labels in budgets)], rows)


def _finite(low: float, high: float) -> tuple[float | None, float | None]:
    return (low, high) if math.isfinite(low) else (None, None)


def _against_random(tree: Mapping[str, Any]) -> str:
    rows = [
        [
            contrast.strategy,
            "over all budgets" if contrast.labels is None else str(contrast.labels),
            with_interval(*contrast.difference),
            f"{contrast.p_value:.3g}",
            f"{contrast.wins} of {contrast.wins + contrast.losses}",
            contrast.verdict,
        ]
        for contrast in _contrasts(tree)
    ]
    if not rows:
        return paragraph("Needs the strategy `random` beside another one, and at least two seeds.")
    return table(["strategy", "labels", "difference (95 %)", "p, corrected", "seeds won", ""], rows) + paragraph(
        "Differences are paired by seed. p is of a t-test, corrected for all strategies at a budget (Holm)."
    )


def _label_cost(tree: Mapping[str, Any]) -> str:
    curves = {strategy: mean_curve(found) for strategy, found in curves_of(tree).items() if found}
    if BASELINE not in curves:
        return paragraph("Needs the strategy `random`.")
    last = max(curves[BASELINE])
    target = curves[BASELINE][last].estimate
    rows = []
    for strategy, curve in curves.items():
        needed = labels_to(curve, target, _sign(tree))
        told = "not reached" if needed is None else f"{needed:.0f} ({needed / last:.0%})"
        rows.append([strategy, told])
    head = ["strategy", f"labels to reach {text(target)}, where random is with {last}"]
    return table(head, rows) + paragraph("Mean curves, straight lines between budgets; no interval.")


def _asked(tree: Mapping[str, Any]) -> str:
    rows = []
    for strategy in tree["strategies"]:
        answers: Counter[str] = Counter()
        sources: Counter[str] = Counter()
        cost: Counter[str] = Counter()
        undecided = set()
        for arm in tree["arms"]:
            for result in arm["rounds"] if arm["strategy"] == strategy else ():
                answers.update(result["answers"])
                sources.update(result["sources"])
                cost.update(result["cost"])
                if result["undecided"]:
                    undecided.add(result["round"])
        rows.append(
            [
                strategy,
                _counts(answers),
                _counts({name.rpartition("/")[2]: count for name, count in sources.items()}),
                _counts({name: round(value, 4) for name, value in cost.items()}) or "none counted",
                ", ".join(map(str, sorted(undecided))) or "none",
            ]
        )
    return table(["strategy", "answers", "sources", "cost", "rounds chosen at random, for want of a score"], rows)


def _counts(counts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _why(place: Folder, tree: Mapping[str, Any]) -> str:
    seed = tree["seeds"][-1]
    parts = []
    for strategy in tree["strategies"]:
        rounds = next(a["rounds"] for a in tree["arms"] if (a["strategy"], a["seed"]) == (strategy, seed))
        if not rounds:
            continue
        inner = f"seed-{seed}/{strategy}/round-{rounds[-1]['round']:02d}/choices.json"
        chosen = place.read_json(inner)
        parts.append(f"<h3>{html.escape(strategy)}, seed {seed}, round {rounds[-1]['round']}</h3>")
        parts.append(paragraph(chosen["undecided"] or f"Candidates: {_counts(chosen['stages'])}."))
        parts.append(_choices(chosen["choices"][:CHOICES_SHOWN]))
        parts.append(paragraph(f"All choices: {inner}"))
    return "\n".join(parts)


def _choices(choices: Sequence[Mapping[str, Any]]) -> str:
    names = ("rank", "candidate_id", "score", "key", "stage", "gap")
    return table(list(names), [[text(choice[name]) for name in names] for choice in choices])
