"""The picture of a study: panels, each drawn only where the study has the data for it. Tests nothing itself."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator
from matplotlib.transforms import ScaledTranslation

from dpo_ray.page import BLUE, BROWN, GREEN, GREY, ORANGE, PALE, PURPLE, RED, text
from dpo_ray.study import (
    MIXTURE_KEYS,
    SIZE_KEYS,
    Configuration,
    Estimate,
    Objective,
    Side,
    Standing,
    Trial,
    by_other_settings,
    configurations,
    numeric_settings,
)
from dpo_ray.study_findings import Findings

Panel = Callable[[Axes], None]

_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, RED, BROWN)
"""More groups than these cannot be told apart: they are drawn grey."""

_ENDS = {
    "completed": ("o", "ran to its end"),
    "stopped_early": ("s", "stopped early"),
    "stopped_by_scheduler": ("X", "stopped by the scheduler"),
    "failed": ("v", "failed"),
    "interrupted": (">", "interrupted"),
    "running": (">", "running"),
}

_MOST_BARS = 200
_MOST_CELLS = 12


def study_figure(found: Findings) -> Figure:
    """All panels, two in a row."""
    panels = [
        *_setting_panels(found),
        *_size_panel(found),
        *_mixture_panel(found),
        *_heat_panel(found),
        *_step_panels(found),
        *_frontier_panel(found),
        *_objectives_panel(found),
        *_confirmation_panel(found),
        *_compute_panel(found),
    ]
    rows = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(12, 4.4 * rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    every = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, panel in zip(every, panels, strict=False):
        panel(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.title.set_fontweight("bold")
    for axes in every[len(panels) :]:
        axes.set_axis_off()
    if not panels:
        every[0].text(0.5, 0.5, "no trial was started", ha="center", va="center", transform=every[0].transAxes)
    return figure


def _setting_panels(found: Findings) -> list[Panel]:
    """Each varied number against the metric; sizes and mixtures have panels of their own."""
    if found.search is None:
        return []
    standing, objective = found.search, found.study.objective
    hidden = SIZE_KEYS if found.curves else ()
    keys = [key for key in numeric_settings(found.study) if key not in hidden and not key.startswith(MIXTURE_KEYS)]

    def panel(key: str) -> Panel:
        def draw(axes: Axes) -> None:
            groups = by_other_settings(standing.ranked, [key])
            are_lines = len(groups) <= len(_COLOURS) and any(len(group) > 1 for group in groups)
            for i, group in enumerate(groups):
                ordered = sorted(group, key=lambda configuration: float(configuration.settings[key]))
                rest = [other for other in ordered[0].settings if other != key]
                _points(
                    axes,
                    [float(configuration.settings[key]) for configuration in ordered],
                    _estimates(ordered, objective),
                    colour=_COLOURS[i] if are_lines else GREY,
                    line="-" if are_lines else "",
                    label=ordered[0].label(rest) if are_lines and rest else "",
                    shift=(i - (len(groups) - 1) / 2) * 2.5 if are_lines else 0.0,
                )
            best = standing.best
            _star(axes, float(best.settings[key]), _estimates([best], objective)[0].value)
            values = sorted({float(configuration.settings[key]) for configuration in standing.ranked})
            _scale(axes, values)
            _frame(axes, values)
            _focus(axes, _estimates(standing.ranked, objective))
            axes.set(title=_plain(f"{key} (star: best)"), xlabel=_plain(key), ylabel=_plain(objective.metric))
            _legend(axes)

        return draw

    return [panel(key) for key in keys]


def _size_panel(found: Findings) -> list[Panel]:
    if not found.curves:
        return []

    def draw(axes: Axes) -> None:
        sizes = sorted({point.pairs for curve in found.curves for point in curve.points})
        for i, curve in enumerate(found.curves):
            colour = _COLOURS[i % len(_COLOURS)]
            pairs = [float(point.pairs) for point in curve.points]
            estimates = [point.estimate for point in curve.points]
            _points(axes, pairs, estimates, colour=colour, line="" if curve.fit else ":", label=curve.label, shift=0.0)
            if curve.fit is None:
                continue
            smallest, largest = float(curve.fit.study.sizes[0]), float(curve.fit.study.sizes[-1])
            for low, high, style in ((smallest, largest, "-"), (largest, float(curve.fit.limit), "--")):
                at = np.geomspace(low, high, 60)[1:-1]
                axes.plot(at, curve.fit.predict(at), style, color=colour, linewidth=1.5)
                if band := curve.fit.band(at):
                    axes.fill_between(at, *band, color=colour, alpha=0.12, linewidth=0)
        if any(curve.fit for curve in found.curves):
            axes.axvline(sizes[-1], color=GREY, linestyle=":", linewidth=1)
            axes.plot([], [], "--", color=GREY, label="forecast, to twice the largest size")
        _scale(axes, [float(size) for size in sizes])
        _focus(axes, [point.estimate for curve in found.curves for point in curve.points])
        axes.set(title="data size", xlabel="training pairs", ylabel=_plain(found.study.objective.metric))
        _legend(axes)

    return [draw]


def _mixture_panel(found: Findings) -> list[Panel]:
    """One row per mixture; within it, colours are the other settings."""
    if found.search is None:
        return []
    standing, objective = found.search, found.study.objective
    keys = [key for key in standing.best.settings if key.startswith(MIXTURE_KEYS)]
    names = list(dict.fromkeys(_mixture(configuration, keys) for configuration in standing.ranked))
    if not keys or len(names) < 2:
        return []

    def draw(axes: Axes) -> None:
        groups = by_other_settings(standing.ranked, keys)
        is_coloured = len(groups) <= len(_COLOURS)
        for i, group in enumerate(groups):
            rest = [other for other in group[0].settings if other not in keys]
            offset = (i - (len(groups) - 1) / 2) * 0.6 / len(groups)
            _rows(
                axes,
                [names.index(_mixture(configuration, keys)) + offset for configuration in group],
                _estimates(group, objective),
                colour=_COLOURS[i] if is_coloured else GREY,
                label=group[0].label(rest) if is_coloured and rest else "",
            )
        _name_rows(axes, names)
        axes.set(title="mixtures", xlabel=_plain(objective.metric))
        _legend(axes)

    return [draw]


def _mixture(configuration: Configuration, keys: Sequence[str]) -> str:
    if len(keys) == 1:
        return configuration.shown(keys[0])
    return ", ".join(f"{key.removeprefix(MIXTURE_KEYS).strip('.')}={configuration.shown(key)}" for key in keys)


def _heat_panel(found: Findings) -> list[Panel]:
    """Two varied numbers, sizes across; only where at least half of their table is filled."""
    if found.search is None:
        return []
    order, objective = found.search.ranked, found.study.objective
    keys = [key for key in numeric_settings(found.study) if not key.startswith(MIXTURE_KEYS)]
    keys.sort(key=lambda key: key in SIZE_KEYS)
    if len(keys) < 2:
        return []
    down, across = keys[0], keys[-1] if keys[-1] in SIZE_KEYS else keys[1]
    rows, columns = (sorted({float(found_.settings[key]) for found_ in order}) for key in (down, across))
    means: dict[tuple[float, float], list[float]] = {}
    for configuration, estimate in zip(order, _estimates(order, objective), strict=True):
        cell = float(configuration.settings[down]), float(configuration.settings[across])
        means.setdefault(cell, []).append(estimate.value)
    if min(len(rows), len(columns)) < 2 or max(len(rows), len(columns)) > _MOST_CELLS:
        return []
    if len(means) < len(rows) * len(columns) / 2:
        return []

    def draw(axes: Axes) -> None:
        cells = np.array([[float(np.mean(means.get((y, x), [math.nan]))) for x in columns] for y in rows])
        shown = axes.imshow(
            cells, origin="lower", aspect="auto", cmap="viridis" if objective.mode == "max" else "viridis_r"
        )
        middle = (np.nanmin(cells) + np.nanmax(cells)) / 2
        for (y, x), value in np.ndenumerate(cells):
            if math.isfinite(value):
                is_light = (value - middle) * objective.sign > 0
                axes.text(x, y, f"{value:.3g}", ha="center", va="center", color="black" if is_light else "white")
        axes.set_xticks(range(len(columns)), [text(value) for value in columns])
        axes.set_yticks(range(len(rows)), [text(value) for value in rows])
        averaged = " (mean over the rest)" if any(len(values) > 1 for values in means.values()) else ""
        axes.set(title=_plain(f"{objective.metric}{averaged}"), xlabel=_plain(across), ylabel=_plain(down))
        axes.figure.colorbar(shown, ax=axes)

    return [draw]


def _step_panels(found: Findings) -> list[Panel]:
    """Training and held-out accuracy over steps, every trial with how it ended; without accuracies, the objective."""
    trials = found.study.trials
    accuracies = "rewards/accuracies"
    metric = accuracies if any(t.series("evaluations", accuracies) for t in trials) else found.study.objective.metric
    colours, labels = _colours(found)

    def panel(side: Side, name: str) -> Panel:
        def draw(axes: Axes) -> None:
            ends: dict[str, None] = {}
            for trial in trials:
                series = trial.series(side, metric)
                if series:
                    colour = colours.get(trial.key, PALE)
                    front = 3 if colour == BLUE else 2
                    axes.plot([*series], [*series.values()], color=colour, linewidth=1, alpha=0.8, zorder=front)
                    marker, meaning = _ENDS[trial.status]
                    last = list(series)[-1]
                    axes.plot(last, series[last], marker, color=colour, markersize=6, zorder=front + 2)
                    ends[meaning] = None
            markers = {meaning: marker for marker, meaning in _ENDS.values()}
            handles = [Line2D([], [], color=colour, label=_plain(label)) for label, colour in labels.items()]
            handles += [Line2D([], [], color=GREY, linestyle="", marker=markers[end], label=end) for end in ends]
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set(title=_plain(f"{name}: {metric}"), xlabel="step", ylabel=_plain(metric))
            _legend(axes, handles)

        return draw

    sides: tuple[tuple[Side, str], ...] = (("train", "training"), ("evaluations", "held out"))
    return [panel(side, name) for side, name in sides if any(trial.series(side, metric) for trial in trials)]


def _colours(found: Findings) -> tuple[dict[str, str], dict[str, str]]:
    """Configuration -> colour, and what the legend says: all of a few, or the best against the rest."""
    every = configurations(found.study.trials)
    if len(every) <= len(_COLOURS):
        first = [found.search.best] if found.search else []
        ordered = first + [c for c in every if not first or c.key != first[0].key]
        pairs = list(zip(ordered, _COLOURS, strict=False))
        return {c.key: colour for c, colour in pairs}, {c.label(): colour for c, colour in pairs}
    if found.search is None:
        return {}, {}
    best = found.search.best
    return {best.key: BLUE}, {f"best: {best.label()}": BLUE, "others": PALE}


def _frontier_panel(found: Findings) -> list[Panel]:
    """What a nat of KL buys, one point per trial at its best evaluation.

    Margins carry beta as a factor, so where beta varies it is the accuracies that can be compared.
    """
    is_scaled = "loss.beta" in found.study.varied
    order = ("rewards/accuracies", "rewards/margins") if is_scaled else ("rewards/margins", "rewards/accuracies")
    for metric in order:
        points = [
            (kl, value, trial)
            for trial in found.study.trials
            if trial.is_finished
            if (kl := trial.value("kl")) is not None and (value := trial.value(metric)) is not None
        ]
        if len(points) > 1:
            return [_frontier(found, metric, points)]
    return []


def _frontier(found: Findings, metric: str, points: list[tuple[float, float, Trial]]) -> Panel:
    def draw(axes: Axes) -> None:
        colours, labels = _colours(found)
        for kl, value, trial in points:
            axes.plot(kl, value, _ENDS[trial.status][0], color=colours.get(trial.key, PALE), markersize=6, zorder=3)
        edge: list[tuple[float, float]] = []
        for kl, value, _ in sorted(points, key=lambda point: (point[0], -point[1])):
            if not edge or value > edge[-1][1]:
                edge.append((kl, value))
        axes.step(*zip(*edge, strict=True), where="post", color=GREY, linewidth=1, label="frontier")
        for label, colour in labels.items():
            axes.plot([], [], "o", color=colour, label=_plain(label))
        if min(kl for kl, _, _ in points) > 0 and len(edge) > 1:
            _scale(axes, sorted({kl for kl, _, _ in points}), ticks=False)
        axes.set(title="reward against KL", xlabel="held-out kl (nats per token)", ylabel=_plain(f"held-out {metric}"))
        _legend(axes)

    return draw


def _objectives_panel(found: Findings) -> list[Panel]:
    if not found.front or found.search is None:
        return []
    first, second = found.study.objectives[:2]
    order = found.search.ranked

    def draw(axes: Axes) -> None:
        for members, colour, label in ((order, PALE, "dominated"), (found.front, BLUE, "Pareto front")):
            points = [
                (a.value, b.value)
                for configuration in members
                if (a := configuration.estimate(first.metric)) and (b := configuration.estimate(second.metric))
            ]
            line = "-" if members is found.front and len(found.study.objectives) == 2 else ""
            xs, ys = zip(*sorted(points), strict=True)
            axes.plot(xs, ys, marker="o", linestyle=line, color=colour, label=label)
        axes.set(title="Pareto front of the objectives")
        axes.set(xlabel=_plain(f"{first.metric} ({first.mode})"), ylabel=_plain(f"{second.metric} ({second.mode})"))
        _legend(axes)

    return [draw]


def _confirmation_panel(found: Findings) -> list[Panel]:
    if found.confirmation is None or found.search is None:
        return []
    search: Standing = found.search
    confirmed, objective = found.confirmation.ranked, found.study.objective

    def draw(axes: Axes) -> None:
        rows = list(range(len(confirmed)))
        before = {configuration.key: configuration for configuration in search.ranked}
        searched = [(row, before[c.key]) for row, c in zip(rows, confirmed, strict=True) if c.key in before]
        at, members = [row - 0.15 for row, _ in searched], [configuration for _, configuration in searched]
        _rows(axes, at, _estimates(members, objective), colour=GREY, label="search, which chose them")
        fresh = _estimates(confirmed, objective)
        _rows(axes, [row + 0.15 for row in rows], fresh, colour=BLUE, label="confirmation, fresh seeds")
        _name_rows(axes, [configuration.label() for configuration in confirmed])
        axes.set(title="confirmation", xlabel=_plain(objective.metric))
        _legend(axes)

    return [draw]


def _compute_panel(found: Findings) -> list[Panel]:
    """Steps made against steps of the full grid, a bar per trial."""
    trials = sorted(found.study.searched, key=lambda trial: trial.number)
    if not trials or len(trials) > _MOST_BARS:
        return []
    colours = {"stopped_early": GREEN, "stopped_by_scheduler": ORANGE, "failed": RED}

    def draw(axes: Axes) -> None:
        rows = range(len(trials))
        thick = 0.8 if len(trials) <= 40 else 1.0  # gaps of less than a pixel would be drawn as stripes
        axes.barh(rows, [trial.num_steps for trial in trials], height=thick, color="#ececec", label="not made")
        for status, (_, meaning) in _ENDS.items():
            chosen = [(row, trial.steps) for row, trial in zip(rows, trials, strict=True) if trial.status == status]
            if chosen:
                axes.barh(
                    [row for row, _ in chosen],
                    [steps for _, steps in chosen],
                    height=thick,
                    color=colours.get(status, BLUE),
                    label=meaning,
                )
        axes.invert_yaxis()
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=12))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda row, _: str(trials[int(row)].number) if row in rows else "")
        )
        spent = found.compute.spent / found.compute.full if found.compute.full else 0.0
        axes.set(title=f"compute: {spent:.0%} of the full grid's steps", xlabel="steps", ylabel="trial")
        _legend(axes)

    return [draw]


def _estimates(found: Iterable[Configuration], objective: Objective) -> list[Estimate]:
    """Of ranked configurations, which all have one."""
    estimates = [configuration.estimate(objective.metric) for configuration in found]
    assert all(estimate is not None for estimate in estimates)
    return [estimate for estimate in estimates if estimate is not None]


def _points(
    axes: Axes, xs: list[float], estimates: list[Estimate], *, colour: str, line: str, label: str, shift: float
) -> None:
    """Values with their intervals, moved sideways by `shift` points so that groups do not hide one another."""
    moved = axes.transData + ScaledTranslation(shift / 72, 0, axes.figure.dpi_scale_trans)
    axes.errorbar(
        xs,
        [estimate.value for estimate in estimates],
        yerr=_arms(estimates),
        color=colour,
        linestyle=line,
        marker="o",
        markersize=4,
        linewidth=1.2,
        elinewidth=1,
        capsize=2,
        label=_plain(label),
        transform=moved,
    )


def _rows(axes: Axes, ys: list[float], estimates: list[Estimate], *, colour: str, label: str) -> None:
    values = [estimate.value for estimate in estimates]
    axes.errorbar(
        values, ys, xerr=_arms(estimates), color=colour, linestyle="", marker="o", capsize=3, label=_plain(label)
    )


def _arms(estimates: list[Estimate]) -> Any:
    """Lengths of the interval's sides, [2, N]; none where there is no interval."""
    below = [0.0 if e.low is None else max(e.value - e.low, 0.0) for e in estimates]
    above = [0.0 if e.high is None else max(e.high - e.value, 0.0) for e in estimates]
    return np.array([below, above])


def _name_rows(axes: Axes, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [_plain(name, 32) for name in names], fontsize=8)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)


def _star(axes: Axes, x: float, y: float) -> None:
    axes.plot(x, y, "*", color=RED, markersize=13, zorder=5)


def _scale(axes: Axes, values: list[float], *, ticks: bool = True) -> None:
    """Logarithmic where positive values span a decade; up to eight values are the ticks themselves."""
    if values[0] > 0 and values[-1] >= 10 * values[0]:
        axes.set_xscale("log")
    if ticks and len(values) <= 8:
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.6g}"))


def _frame(axes: Axes, values: list[float]) -> None:
    """From the first to the last value, with a tenth of the width on either side."""
    first, last = values[0], values[-1]
    if axes.get_xscale() == "log":
        edge = (last / first) ** 0.1
        axes.set_xlim(first / edge, last * edge)
    else:
        edge = (last - first) / 10 or abs(first) / 10 or 1.0
        axes.set_xlim(first - edge, last + edge)


def _focus(axes: Axes, estimates: list[Estimate]) -> None:
    """The values fill the panel: the interval of two seeds may be ten times as long as all their differences."""
    values = [estimate.value for estimate in estimates]
    span = max(values) - min(values) or abs(values[0]) / 10 or 1.0
    low = max(min(min(e.value if e.low is None else e.low, e.value) for e in estimates), min(values) - span)
    high = min(max(max(e.value if e.high is None else e.high, e.value) for e in estimates), max(values) + span)
    axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))


def _legend(axes: Axes, handles: list[Any] | None = None) -> None:
    """Below the panel, where it hides nothing."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        longest = max(len(str(handle.get_label())) for handle in handles)
        axes.legend(
            handles=handles,
            fontsize=7,
            frameon=False,
            ncols=min(3, 90 // (longest + 8)),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.16),
        )


def _plain(name: str, most: int = 48) -> str:
    """On one line, not too long, and a dollar is a dollar: matplotlib would read mathematics between two."""
    line = " ".join(name.split())
    return (line if len(line) <= most else line[: most - 1] + "…").replace("$", r"\$")
