"""The report of a run: what its folder says, as one HTML page and one picture. Reads files only, trains nothing.

Everything shown is in the run folder already; the page needs no network and no other file.
"""

import html
import json
from collections.abc import Iterable, Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dpo_ray.errors import InputError
from dpo_ray.page import BLUE, GREEN, GREY, RED, document, image, picture, table, text, with_interval
from dpo_ray.storage import Folder, read_lines

Series = dict[int, float]
"""Step -> value."""

_LOOK: dict[str, dict[str, Any]] = {"": {"linewidth": 1, "alpha": 0.6}, "eval/": {"marker": "o", "markersize": 4}}


def write_report(folder: str) -> list[str]:
    """Write `report.html` and `report.png` into a run folder, and return their paths.

    Raises:
        InputError: A file of the run is missing or unreadable, or the folder cannot be written.
    """
    run = Folder(folder)
    lines = _lines(run)
    summary, data, recipe = _json(run, "summary.json"), _json(run, "data_report.json"), _read(run, "recipe.yaml")
    png = picture(_figure(lines, summary.get("best_step")))
    run.write("report.png", png)
    run.write("report.html", document(run.path.rpartition("/")[2], _body(png, summary, data, recipe.decode())))
    return [f"{run.path}/report.html", f"{run.path}/report.png"]


def _read(run: Folder, name: str) -> bytes:
    if not run.exists(name):
        raise InputError(f"no {name} in {run.path}: not the folder of a finished run")
    return run.read(name)


def _json(run: Folder, name: str) -> dict[str, Any]:
    try:
        value = json.loads(_read(run, name))
    except ValueError as error:
        raise InputError(f"{run.path}/{name} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InputError(f"{run.path}/{name} holds no object")
    return value


def _lines(run: Folder) -> list[dict[str, Any]]:
    content = _read(run, "metrics.jsonl")
    try:
        return list(read_lines(content))
    except ValueError as error:
        raise InputError(f"{run.path}/metrics.jsonl is not JSONL: {error}") from None


def _series(lines: Iterable[Mapping[str, Any]], name: str) -> Series:
    """A metric by step. A resumed run writes some steps twice; the later line counts."""
    found = {int(line["step"]): float(line[name]) for line in lines if line.get(name) is not None}
    return dict(sorted(found.items()))


def _figure(lines: list[dict[str, Any]], best_step: int | None) -> Figure:
    """Four panels: loss, accuracies with their interval, rewards, logps with kl; the best step is a dotted line."""
    figure = Figure(figsize=(12, 8), layout="constrained")
    ((loss, accuracies), (rewards, logps)) = figure.subplots(2, 2)

    _panel(loss, "loss", lines, {"loss": BLUE})
    _panel(accuracies, "rewards/accuracies", lines, {"rewards/accuracies": BLUE})
    low = _series(lines, "eval/rewards/accuracies_low")
    high = _series(lines, "eval/rewards/accuracies_high")
    steps = [step for step in low if step in high]
    if steps:
        accuracies.fill_between(
            steps, [low[s] for s in steps], [high[s] for s in steps], color=BLUE, alpha=0.15, label="95 % interval"
        )
        accuracies.legend(fontsize=8)
    colours = {"rewards/margins": BLUE, "rewards/chosen": GREEN, "rewards/rejected": RED}
    _panel(rewards, "rewards (nats)", lines, colours)
    _panel(logps, "logps (nats)", lines, {"logps/chosen": GREEN, "logps/rejected": RED})
    kl = {prefix: _series(lines, f"{prefix}kl") for prefix in ("", "eval/")}
    if any(kl.values()):
        right = logps.twinx()
        right.set_ylabel("kl (nats per token)", color=GREY)
        for prefix, series in kl.items():
            right.plot([*series], [*series.values()], color=GREY, **_LOOK[prefix])

    if best_step is not None:
        for axes in (loss, accuracies, rewards, logps):
            axes.axvline(best_step, color=GREY, linestyle=":", linewidth=1)
        loss.set_title(f"loss (dotted line: best step, {best_step})")
    return figure


def _panel(axes: Axes, title: str, lines: list[dict[str, Any]], colours: dict[str, str]) -> None:
    """Some metrics, training thin and held out with marks."""
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for name, colour in colours.items():
        for prefix in ("", "eval/"):
            if series := _series(lines, prefix + name):
                axes.plot([*series], [*series.values()], color=colour, label=prefix + name, **_LOOK[prefix])
    if axes.lines:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured in this run", ha="center", va="center", transform=axes.transAxes)


def _body(png: bytes, summary: dict[str, Any], data: dict[str, Any], recipe: str) -> str:
    held_out = {name: summary[name] for name in ("eval", "best_eval") if isinstance(summary.get(name), dict)}
    rest = {name: value for name, value in summary.items() if name not in held_out}
    return f"""{image(png, "Curves of the run")}
<h2>Held out</h2>
{_held_out_table(held_out)}
<h2>Summary</h2>
{_tables(rest, "")}
<h2>Data</h2>
{_tables(data, "")}
<h2>Recipe</h2>
<pre>{html.escape(recipe)}</pre>"""


def _held_out_table(held_out: dict[str, dict[str, Any]]) -> str:
    """Metrics in rows, the last and the best evaluation in columns; an accuracy carries its interval."""
    if not any(held_out.values()):
        return "<p>No evaluation.</p>"
    heads = {"eval": "last", "best_eval": "best"}
    columns = [(heads[name], {key.removeprefix("eval/"): v for key, v in held_out[name].items()}) for name in held_out]
    names = dict.fromkeys(name for _, values in columns for name in values)
    shown = [name for name in names if not name.endswith(("_low", "_high"))]
    rows = [
        [name, *(with_interval(*(values.get(name + end) for end in ("", "_low", "_high"))) for _, values in columns)]
        for name in shown
    ]
    return table(["metric", *(head for head, _ in columns)], rows)


def _tables(tree: dict[str, Any], title: str) -> str:
    """A nested object: its plain values as one table, then each part below its name."""
    plain = {name: value for name, value in tree.items() if not isinstance(value, dict) and not _is_rows(value)}
    parts = [f"<h3>{html.escape(title)}</h3>"] if title else []
    if plain or not tree:
        parts.append(table([], [[name, text(value)] for name, value in plain.items()]))
    for name, value in tree.items():
        below = f"{title} / {name}" if title else name
        if isinstance(value, dict):
            parts.append(_tables(value, below))
        elif _is_rows(value):
            heads = list(dict.fromkeys(key for row in value for key in row))
            rows = [[text(row.get(head)) for head in heads] for row in value]
            parts.append(f"<h3>{html.escape(below)}</h3>{table(heads, rows)}")
    return "\n".join(parts)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)
