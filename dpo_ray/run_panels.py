"""The pictures of a run: curves, reward distributions, KL against reward. A panel is made only where its data is."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dpo_ray.page import BLUE, GREEN, GREY, RED, Panel
from dpo_ray.run_record import RunRecord, series

Line = Mapping[str, Any]

_LOOK: dict[str, dict[str, Any]] = {"": {"linewidth": 1, "alpha": 0.7}, "eval/": {"marker": "o", "markersize": 4}}
_KIND = {"": "training", "eval/": "held out"}
_MOST_STEPS_NAMED = 8
_NO_SPREAD = 1e-6
"""Nats; values closer together than this are one value to a reader, and a histogram of them would show rounding."""


def curve_panels(lines: Sequence[Line], best_step: int | None) -> list[Panel]:
    """What was measured, step by step: training thin, held out with marks, the best step dotted."""
    dotted = f" Dotted: the best step, {best_step}." if best_step is not None else ""
    wanted = (
        ("Loss", "Loss in nats: training thin, held out with marks.", {"loss": BLUE}),
        ("Accuracies", "Share of pairs whose chosen response has the higher reward.", {"rewards/accuracies": BLUE}),
        (
            "Rewards",
            "Implicit rewards of the chosen (green) and the rejected (red) response, and their difference (blue), "
            "in nats.",
            {"rewards/margins": BLUE, "rewards/chosen": GREEN, "rewards/rejected": RED},
        ),
        (
            "Log-probs",
            "Log-probs of the chosen (green) and the rejected (red) response, in nats. Both may sink while the margin "
            "grows.",
            {"logps/chosen": GREEN, "logps/rejected": RED},
        ),
        (
            "KL to the reference",
            "How far the policy has left the data's responses, in nats per token.",
            {"kl": BLUE},
        ),
        ("Gradient norm", "Norm of the gradient before clipping.", {"grad_norm": BLUE}),
    )
    panels = []
    for title, caption, colours in wanted:
        if any(series(lines, prefix + name) for name in colours for prefix in _LOOK):
            band = title == "Accuracies" and _band(lines)
            told = caption + (" Band: 95 % interval of the held-out value." if band else "") + dotted
            panels.append(Panel(title, told, _curves(lines, colours, best_step)))
    return panels


def _curves(lines: Sequence[Line], colours: Mapping[str, str], best_step: int | None) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, colour in colours.items():
            for prefix, look in _LOOK.items():
                if found := series(lines, prefix + name):
                    axes.plot([*found], [*found.values()], color=colour, label=f"{name}, {_KIND[prefix]}", **look)
        if "rewards/accuracies" in colours:
            axes.axhline(0.5, color=GREY, linewidth=0.8, linestyle="--")
            if band := _band(lines):
                low, high = zip(*band.values(), strict=True)
                axes.fill_between([*band], low, high, color=BLUE, alpha=0.15, label="95 % interval")
        if best_step is not None:
            axes.axvline(best_step, color=GREY, linestyle=":", linewidth=1)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        axes.legend(fontsize=7, framealpha=0.6, edgecolor="none", ncols=2 if len(colours) > 1 else 1)

    return draw


def _band(lines: Sequence[Line]) -> dict[int, tuple[float, float]]:
    """Interval of the held-out accuracy, by step."""
    low = series(lines, "eval/rewards/accuracies_low")
    high = series(lines, "eval/rewards/accuracies_high")
    return {step: (low[step], high[step]) for step in low if step in high}


def reward_panels(run: RunRecord) -> list[Panel]:
    """Distributions before and after: by the evaluation, else the margins that the run kept at its evaluations."""
    if panels := reward_panels_of(run.evaluation or {}):
        return panels
    groups = {f"step {step}": margins for step, margins in run.margins.items() if margins}
    return [_margin_panel(groups)] if groups else []


def reward_panels_of(evaluation: Mapping[str, Any]) -> list[Panel]:
    """Rewards and margins of held-out pairs, by an evaluation."""
    rewards = _rewards_of(evaluation)
    if "after" not in rewards:
        return []
    styles = {"before": ("--", 0.0), "after": ("-", 0.3)}

    def draw(axes: Axes) -> None:
        edges = _edges([found[side] for found in rewards.values() for side in ("chosen", "rejected")])
        for when, found in rewards.items():
            for side, colour in (("chosen", GREEN), ("rejected", RED)):
                line, filled = styles[when]
                _histogram(axes, found[side], edges, colour, f"{side}, {when}", line=line, filled=filled)
        axes.set(xlabel="implicit reward (nats)", ylabel="pairs")
        axes.legend(fontsize=8, frameon=False)

    caption = (
        "Implicit rewards of held-out responses, chosen (green) and rejected (red), after training (filled)"
        + (" and before (dashed; a line where all are one value)" if "before" in rewards else "")
        + ". Where the two colours part, the policy tells them apart."
    )
    margins = {w: [c - r for c, r in zip(f["chosen"], f["rejected"], strict=True)] for w, f in rewards.items()}
    return [Panel("Rewards", caption, draw), _margin_panel(margins)]


def _rewards_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, list[float]]]:
    """When -> side -> reward of each pair. An evaluation does not list those of the reference itself, which are 0."""
    listed = (evaluation.get("held_out") or {}).get("rewards") or {}
    found = {when: listed[when] for when in ("before", "after") if listed.get(when) and listed[when]["chosen"]}
    others = evaluation.get("against") or []
    if "before" not in found and "after" in found and others and others[0].get("path") == evaluation.get("reference"):
        zeros = [0.0] * len(found["after"]["chosen"])
        return {"before": {"chosen": zeros, "rejected": zeros}, **found}
    return found


def _margin_panel(groups: Mapping[str, Sequence[float]]) -> Panel:
    """Margins of held-out pairs, the first group dashed where there are two."""

    def draw(axes: Axes) -> None:
        edges = _edges([*groups.values()])
        for i, (name, values) in enumerate(groups.items()):
            is_last = i == len(groups) - 1
            look: dict[str, Any] = {"line": "-", "filled": 0.3} if is_last else {"line": "--", "filled": 0.0}
            _histogram(axes, values, edges, BLUE if is_last else GREY, name, **look)
        axes.axvline(0, color=GREY, linewidth=0.8)
        axes.set(xlabel="margin (nats)", ylabel="pairs")
        axes.legend(fontsize=8, frameon=False)

    shares = [f"{name}: {(np.mean(np.sign(values)) + 1) / 2:.1%}" for name, values in groups.items()]
    caption = (
        f"Chosen less rejected reward of each held-out pair. Above zero, a tie counting half: {', '.join(shares)}."
    )
    return Panel("Margins", caption, draw)


def _edges(groups: Sequence[Sequence[float]]) -> Any:
    """Bins by Rice's rule over the inner 99 %: a few far values, which stand in the outer bins, squeeze nothing.

    Groups that are one value are drawn as lines and have no say, unless all are.
    """
    values = np.concatenate([group for group in groups if np.ptp(group) >= _NO_SPREAD] or [*groups])
    low, high = np.quantile(values, [0.005, 0.995])
    if high - low < _NO_SPREAD:
        low, high = low - 1, high + 1
    return np.linspace(low, high, 2 + math.ceil(2 * len(values) ** (1 / 3)))


def _histogram(
    axes: Axes, values: Sequence[float], edges: Any, colour: str, label: str, *, line: str, filled: float
) -> None:
    seen = np.asarray(values, dtype=np.float64)
    if np.ptp(seen) < _NO_SPREAD:
        axes.axvline(float(seen[0]), color=colour, linestyle=line, linewidth=1.5, label=label)
        return
    inside = np.clip(seen, edges[0], edges[-1])
    if filled:
        axes.hist(inside, bins=edges, color=colour, alpha=filled)
    axes.hist(inside, bins=edges, histtype="step", color=colour, linestyle=line, linewidth=1.3, label=label)


def kl_panels(lines: Sequence[Line], best_step: int | None) -> list[Panel]:
    """One point for each evaluation: what was gained, and how far the policy went for it."""
    kl = series(lines, "eval/kl")
    panels = []
    for name, title in (("rewards/margins", "Margin"), ("rewards/accuracies", "Accuracy")):
        values = series(lines, f"eval/{name}")
        steps = [step for step in kl if step in values]
        if steps:
            caption = (
                f"Held-out {name} over KL to the reference, one point for each evaluation, numbered by its step. "
                "Up is better, right is further from the reference."
            )
            band = _band(lines) if name == "rewards/accuracies" else {}
            draw = _kl_curve(kl, {step: values[step] for step in steps}, band, name, best_step)
            panels.append(Panel(f"{title} against KL", caption, draw))
    return panels


def _kl_curve(
    kl: Mapping[int, float],
    values: Mapping[int, float],
    band: Mapping[int, tuple[float, float]],
    name: str,
    best_step: int | None,
) -> Callable[[Axes], None]:
    steps = list(values)
    every = -(-len(steps) // _MOST_STEPS_NAMED)

    def draw(axes: Axes) -> None:
        xs = [kl[step] for step in steps]
        axes.plot(xs, [*values.values()], color=BLUE, marker="o", markersize=4, linewidth=1)
        for step in steps:
            if step in band:
                axes.plot([kl[step], kl[step]], band[step], color=BLUE, alpha=0.35, linewidth=1)
        for step in dict.fromkeys([*steps[::every], steps[-1]]):
            axes.annotate(str(step), (kl[step], values[step]), (4, 4), textcoords="offset points", fontsize=8)
        if best_step is not None and best_step in values:
            axes.plot(kl[best_step], values[best_step], "*", color=RED, markersize=12, zorder=5, label="best")
            axes.legend(fontsize=8, frameon=False)
        axes.set(xlabel="KL to the reference (nats per token)", ylabel=name)
        axes.locator_params(axis="x", nbins=6)
        axes.margins(0.1)

    return draw
