"""Several runs on one page: what their recipes differ in, their curves laid over one another, what came of each.

It shows; it does not test. Which setting is better is asked of a study (`dpo-ray sweep`), which has seeds.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dpo_ray.errors import InputError
from dpo_ray.page import (
    BLUE,
    BROWN,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    Panel,
    document,
    estimate,
    panels_side_by_side,
    paragraph,
    percent_with_interval,
    section,
    sheet,
    table,
    text,
    with_interval,
)
from dpo_ray.recipe_diff import between
from dpo_ray.report import accuracy_of, speed_of
from dpo_ray.run_record import RunRecord, read_run, series
from dpo_ray.storage import Folder, absolute, redacted

Runs = Mapping[str, RunRecord]
"""Name on the page -> run."""

_COLOURS = (BLUE, RED, GREEN, ORANGE, PURPLE, BROWN)
_STYLES = ("-", "--", ":", "-.")
_METRICS = ("loss", "rewards/margins", "logps/chosen", "kl")


def write_comparison(folders: Sequence[str], output: str | None = None) -> list[str]:
    """Write `comparison.html` and `comparison.png` of several runs, and return their paths.

    Args:
        output: Where to; None: the folder that all of them are in.

    Raises:
        InputError: One is not the folder of a finished run, one is named twice, or no folder holds all of them.
    """
    paths = [absolute(folder).rstrip("/") for folder in folders]
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise InputError(f"{twice[0]} is named twice")
    place = Folder(output or _common_parent(paths))
    runs = dict(zip(_names(paths), map(read_run, paths), strict=True))
    panels = comparison_panels(runs)
    if panels:
        place.write("comparison.png", sheet(panels))
    place.write("comparison.html", document("Comparison of runs", _body(runs, panels), ", ".join(runs)))
    return [f"{place.path}/{name}" for name in ("comparison.html", "comparison.png")[: 2 if panels else 1]]


def _common_parent(paths: Sequence[str]) -> str:
    parents = [path.split("/")[:-1] for path in paths]
    common = [level[0] for level in takewhile(lambda level: len(set(level)) == 1, zip(*parents, strict=False))]
    if not "".join(common) or (common[0].endswith(":") and len(common) < 3):  # "s3:", "", bucket
        raise InputError("no folder holds all of these runs: name one with --output")
    return "/".join(common)


def _names(paths: Sequence[str]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [path.split("/") for path in paths]
    for number in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-number:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(paths)


def comparison_panels(runs: Runs) -> list[Panel]:
    """One panel for each metric that any run has held out, one line for each run."""
    wanted = (
        ("Held-out accuracy", "rewards/accuracies", "Bands: 95 % intervals."),
        ("Held-out loss", "loss", "Losses of different kinds are not comparable."),
        ("Held-out margins", "rewards/margins", "Nats; they grow with beta."),
        ("KL to the reference", "kl", "Nats per token, on the held-out responses."),
        ("Log-probs of chosen responses", "logps/chosen", "Nats."),
    )
    panels = []
    for title, name, note in wanted:
        if any(series(run.lines, f"eval/{name}") for run in runs.values()):
            panels.append(Panel(title, f"{name} by step, a line for each run. {note}", _curves(runs, name)))
    gained = {name: _by_kl(run) for name, run in runs.items()}
    if any(gained.values()):
        caption = "Held-out accuracy over KL to the reference, one point for each evaluation: up and left is better."
        panels.append(Panel("Accuracy against KL", caption, _gains(gained)))
    return panels


def _look(number: int) -> dict[str, Any]:
    """Of the run of this number: colours first, then kinds of line."""
    style = _STYLES[number // len(_COLOURS) % len(_STYLES)]
    return {"color": _COLOURS[number % len(_COLOURS)], "linestyle": style, "linewidth": 1.2}


def _curves(runs: Runs, name: str) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for number, (label, run) in enumerate(runs.items()):
            found = series(run.lines, f"eval/{name}")
            axes.plot([*found], [*found.values()], marker="o", markersize=3, label=_plain(label), **_look(number))
            low, high = (series(run.lines, f"eval/{name}{end}") for end in ("_low", "_high"))
            steps = [step for step in low if step in high]
            if steps:
                band = [low[step] for step in steps], [high[step] for step in steps]
                axes.fill_between(steps, *band, color=_look(number)["color"], alpha=0.1)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.legend(fontsize=8, frameon=False)

    return draw


def _by_kl(run: RunRecord) -> list[tuple[float, float]]:
    """KL and accuracy of each evaluation."""
    kl, accuracies = series(run.lines, "eval/kl"), series(run.lines, "eval/rewards/accuracies")
    return [(kl[step], accuracies[step]) for step in kl if step in accuracies]


def _gains(gained: Mapping[str, list[tuple[float, float]]]) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for number, (label, points) in enumerate(gained.items()):
            xs, ys = [x for x, _ in points], [y for _, y in points]
            axes.plot(xs, ys, marker="o", markersize=4, label=_plain(label), **_look(number))
        axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
        axes.set(xlabel="KL to the reference (nats per token)", ylabel="rewards/accuracies")
        axes.legend(fontsize=8, frameon=False)

    return draw


def _body(runs: Runs, panels: Sequence[Panel]) -> str:
    rows = [
        [name, *(text(run.summary.get(key)) for key in ("status", "steps", "best_step", "pairs_seen"))]
        for name, run in runs.items()
    ]
    parts = [
        section("Runs", table(["run", "status", "steps", "best step", "pairs seen"], rows), *_same_data(runs)),
        section("What their recipes differ in", _differences(runs)),
        section("Curves", panels_side_by_side(panels) or paragraph("None of them was evaluated.")),
        section("Held-out metrics", _metrics(runs)),
    ]
    if any(run.evaluation for run in runs.values()):
        parts.append(section("Evaluations", _evaluations(runs)))
    return "\n".join([*parts, section("Speed and cost", _speed(runs))])


def _same_data(runs: Runs) -> list[str]:
    if len({run.summary.get("data_fingerprint") for run in runs.values()}) == 1:
        return [paragraph("All have the same data.")]
    return [paragraph("Their data is not the same: accuracies may be of different held-out pairs.")]


def _differences(runs: Runs) -> str:
    found = between([run.settings for run in runs.values()])
    rows = [[key, *(redacted(text(value)) for value in values)] for key, values in found if key != "name"]
    return table(["key", *runs], rows) if rows else paragraph("Nothing but their names.")


def _metrics(runs: Runs) -> str:
    """The best and the last evaluation of each run, an accuracy with its interval."""
    rows = []
    for name, run in runs.items():
        for which in ("best_eval", "eval"):
            metrics = {key.removeprefix("eval/"): value for key, value in (run.summary.get(which) or {}).items()}
            if metrics:
                accuracy = percent_with_interval(*accuracy_of(metrics))
                head = [name, "best" if which == "best_eval" else "last", accuracy, text(metrics.get("num_pairs"))]
                rows.append([*head, *(text(metrics.get(metric)) for metric in _METRICS)])
    return table(["run", "evaluation", "accuracy (95 %)", "pairs", *_METRICS], rows)


def _evaluations(runs: Runs) -> str:
    """Win rates, perplexities and KL of the runs that `dpo-ray evaluate` has seen."""
    rows = []
    for name, run in runs.items():
        tree = run.evaluation or {}
        for rate in tree.get("win_rate") or []:
            value = percent_with_interval(rate.get("value"), rate.get("low"), rate.get("high"))
            rows.append([name, f"win rate against {rate['against']}", value, f"judge {rate['judge']}"])
        for row in (tree.get("retention") or {}).get("perplexity") or []:
            value = with_interval(row["change"], row.get("low"), row.get("high"))
            rows.append([name, f"change on {redacted(row['source'])}", value, "nats per token, lower is better"])
        if tree.get("kl"):
            rows.append([name, "KL to the reference", estimate(tree["kl"]), "nats per response"])
    return table(["run", "", "value (95 %)", ""], rows)


def _speed(runs: Runs) -> str:
    found = [speed_of(run.summary) for run in runs.values()]
    rows = [[name, *(one[name] for one in found)] for name in found[0]]
    return table(["", *runs], [row for row in rows if any(cell != "-" for cell in row[1:])])


def _plain(name: str, most: int = 40) -> str:
    """For a legend: the end of a long name, and a dollar is a dollar (matplotlib would read mathematics)."""
    return (name if len(name) <= most else f"…{name[1 - most :]}").replace("$", r"\$")
