"""The report of a study: what its `study.json` says, as one HTML page and one picture. Trains nothing.

The page needs no network and no other file. What the data do not allow is said in words where it would have stood.
"""

import html
import itertools
import math

import yaml

from dpo_ray.comparisons import Interval
from dpo_ray.curve_families import FAMILIES
from dpo_ray.curves import CurveFit, gain_from_doubling, pairs_needed
from dpo_ray.errors import InputError
from dpo_ray.page import document, image, paragraph, picture, table, text, with_interval
from dpo_ray.storage import Folder
from dpo_ray.study import (
    ALPHA,
    MIN_PAIRS,
    MIN_SEEDS,
    Comparison,
    Compute,
    Configuration,
    Estimate,
    Standing,
    Study,
    configurations,
    read_study,
)
from dpo_ray.study_findings import Findings, SizeCurve, findings
from dpo_ray.study_panels import study_figure

POINT = 0.01
"""One point of a share."""


def write_study_report(folder: str) -> list[str]:
    """Write `report.html` and `report.png` into a study's folder, and return their paths.

    Raises:
        InputError: `study.json` is missing or unreadable, or the folder cannot be written.
    """
    place = Folder(folder)
    if not place.exists("study.json"):
        raise InputError(f"no study.json in {place.path}: not the folder of a study")
    try:
        tree = place.read_json("study.json")
    except ValueError as error:
        raise InputError(f"{place.path}/study.json is not JSON: {error}") from None
    found = findings(read_study(tree))
    recipe = place.read("best.yaml").decode() if place.exists("best.yaml") else None
    png = picture(study_figure(found))
    place.write("report.png", png)
    place.write("report.html", document(found.study.name, _body(found, png, recipe)))
    return [f"{place.path}/report.html", f"{place.path}/report.png"]


def _body(found: Findings, png: bytes, recipe: str | None) -> str:
    parts = [_summary(found), image(png, "Panels of the study")]
    if found.search is not None:
        parts += ["<h2>Configurations</h2>", _standing_table(found.study, found.search), _notes(found)]
    if found.confirmation is not None:
        parts += ["<h2>Confirmation on fresh seeds</h2>", _confirmation(found, found.confirmation)]
    if found.front:
        names = ", ".join(f"{objective.metric} ({objective.mode})" for objective in found.study.objectives)
        rows = [
            [configuration.label(), *(_estimate(configuration, o.metric) for o in found.study.objectives)]
            for configuration in found.front
        ]
        heads = ["configuration", *(objective.metric for objective in found.study.objectives)]
        parts += ["<h2>Pareto front</h2>", paragraph(f"By the means of {names}."), table(heads, rows)]
    if found.curves:
        parts += ["<h2>Data size</h2>", *(_size_curve(found.study, curve) for curve in found.curves)]
    parts += ["<h2>Compute</h2>", _compute(found), "<h2>Trials</h2>", _trials(found.study)]
    if recipe is not None:
        parts += ["<h2>Best recipe</h2>", f"<pre>{html.escape(recipe)}</pre>"]
    elif found.search is not None:
        settings = yaml.safe_dump(found.search.best.settings, sort_keys=False, allow_unicode=True)
        parts += ["<h2>Best settings</h2>", f"<pre>{html.escape(settings)}</pre>"]
    return "\n".join(parts)


def _summary(found: Findings) -> str:
    study = found.study
    trials, failed = study.searched, sum(trial.status == "failed" for trial in study.searched)
    reason = f" ({study.stop_reason})" if study.stop_reason else ""
    done = (
        f"{study.status.capitalize()}{reason}: "
        f"{_count(len(trials), 'trial')} of {_count(len(configurations(trials)), 'configuration')}"
        f"{f', {failed} failed' if failed else ''}, in {_duration(study.seconds)}."
    )
    if study.status != "completed":
        done += " What follows is of the trials that finished."
    parts = [paragraph(study.question)] if study.question else []
    parts.append(paragraph(done))
    if found.search is None:
        return "\n".join([*parts, paragraph("No trial finished with a value, so nothing can be ranked.")])

    best = found.search.best
    chosen = f"Best of the search: {best.label()}, {study.objective.metric} {_estimate(best, study.objective.metric)}."
    parts.append(f"<p><strong>{html.escape(chosen)}</strong> {html.escape(_tally(found.search))}</p>")
    if found.confirmation is None:
        parts.append(paragraph("It was chosen by these values, which flatter it; no confirmation was run."))
    else:
        fresh, metric = found.confirmation, study.objective.metric
        parts.append(
            paragraph(
                f"Confirmed on fresh seeds: {fresh.best.label()}, {_estimate(fresh.best, metric)}."
                if fresh.best.key == best.key
                else "The confirmation of the search's winner has no value."
            )
        )
    return "\n".join(parts)


def _tally(standing: Standing) -> str:
    if not standing.comparisons:
        return "There is no other configuration to compare it with."
    counts = {
        verdict: sum(comparison.verdict == verdict for comparison in standing.comparisons)
        for verdict in ("worse", "better", "not distinguishable", "untestable")
    }
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count)
    return f"Of {_count(len(standing.comparisons), 'other')}: {said}."


def _standing_table(study: Study, standing: Standing) -> str:
    """Configurations by rank; the settings that vary have columns of their own."""
    keys = list(dict.fromkeys(key for configuration in standing.ranked for key in configuration.settings))
    against = {comparison.configuration.key: comparison for comparison in standing.comparisons}
    metrics = [objective.metric for objective in study.objectives]
    heads = ["rank", *keys, *metrics, "interval over", "less the best", "adjusted p", "verdict"]
    rows = []
    for rank, configuration in enumerate(standing.ranked, 1):
        values = [_estimate(configuration, metric, is_short=True) for metric in metrics]
        over = _over(configuration.estimate(metrics[0]))
        settings = [configuration.shown(key) for key in keys]
        rows.append([str(rank), *settings, *values, over, *_verdict(against.get(configuration.key))])
    return table(heads, rows)


def _verdict(comparison: Comparison | None) -> list[str]:
    if comparison is None:
        return ["-", "-", "best"]
    if comparison.difference is None:
        return ["-", "-", "untestable"]
    over = f" (over {comparison.num_common} pairs)" if comparison.over == "pairs" else ""
    return [_interval(comparison.difference), text(comparison.p_value), f"{comparison.verdict}{over}"]


def _notes(found: Findings) -> str:
    """What the table's verdicts rest on; only what applies to it."""
    assert found.search is not None
    standing = found.search
    tests = {comparison.over for comparison in standing.comparisons}
    count = len(standing.ranked)
    notes = []
    if tests - {None}:
        notes.append(
            f"Verdicts: paired two-sided tests against the best, p by Holm among the {count * (count - 1) // 2} "
            f"pairs of configurations, because the best was picked by the values that are tested; worse is p < {ALPHA}."
            " The intervals are not adjusted. Few seeds decide little among many configurations; confirming the best "
            "few on fresh seeds compares only those."
        )
    if "pairs" in tests:
        notes.append(
            f"With fewer than {MIN_SEEDS} common seeds the test is over held-out pairs: whether other pairs would "
            f"have decided otherwise, not whether another seed would."
        )
    if None in tests:
        notes.append(
            f"Untestable: neither {MIN_SEEDS} common seeds nor the margins of the same {MIN_PAIRS} or more pairs."
        )
    stopped = sum(t.status == "stopped_by_scheduler" for c in standing.ranked for t in c.finished)
    if stopped:
        notes.append(
            f"{_count(stopped, 'trial')} stopped by the scheduler: such values come from less training than others."
        )
    return "\n".join(map(paragraph, notes))


def _confirmation(found: Findings, fresh: Standing) -> str:
    metric = found.study.objective.metric
    before = {configuration.key: configuration for configuration in configurations(found.study.searched)}
    against = {comparison.configuration.key: comparison for comparison in fresh.comparisons}
    rows = [
        [
            configuration.label(),
            _estimate(before[configuration.key], metric) if configuration.key in before else "-",
            _estimate(configuration, metric),
            *_verdict(against.get(configuration.key))[:2],
            against[configuration.key].verdict if configuration.key in against else "the one compared with",
        ]
        for configuration in fresh.ranked
    ]
    heads = ["configuration", "in the search", "confirmed", "less the winner", "adjusted p", "verdict"]
    note = "The search chose on its own seeds, so its values flatter what it chose; those of fresh seeds do not."
    if fresh.ranked[0] is not fresh.best:
        note += f" On fresh seeds {fresh.ranked[0].label()} has the best mean."
    return f"{table(heads, rows)}\n{paragraph(note)}"


def _size_curve(study: Study, curve: SizeCurve) -> str:
    metric = study.objective.metric
    parts = [f"<h3>{html.escape(curve.label)}</h3>"]
    rows = [[str(point.pairs), _with(point.estimate)] for point in curve.points]
    parts.append(table(["training pairs", metric], rows))
    said = []
    if curve.num_stopped:
        said.append(f"{_count(curve.num_stopped, 'trial')} stopped by the scheduler had less training than the others.")
    if curve.fit is not None:
        said += _forecast(curve.fit, is_share=study.objective.is_share)
    if curve.trend is not None:
        steps = [
            [f"{step.smaller} to {step.larger}", _interval(step.difference), step.verdict] for step in curve.trend.steps
        ]
        parts.append(table(["step", "change", "verdict"], steps))
        if curve.trend.plateau_from is not None:
            said.append(f"Plateau from {curve.trend.plateau_from} pairs on: all larger sizes are within two points.")
        elif all(step.verdict == "untestable" for step in curve.trend.steps):
            said.append("Dips and plateaus are untestable with one seed per size.")
        else:
            said.append("No plateau is shown.")
    if curve.subset is not None:
        subset = curve.subset
        said.append(
            f"Less is more: {subset.smallest} pairs are not worse than all {subset.whole} by one point."
            if subset.smallest is not None
            else f"Less is more: {subset.verdict}."
        )
    said += [f"{refusal[:1].upper()}{refusal[1:]}." for refusal in curve.refusals]
    return "\n".join([*parts, *map(paragraph, said)])


def _forecast(fit: CurveFit, *, is_share: bool) -> list[str]:
    parameters = ", ".join(f"{name} = {text(value)}" for name, value in fit.parameters.items())
    largest = int(fit.study.sizes[-1])
    said = [
        f"Curve: {fit.family}, {FAMILIES[fit.family].formula}, with {parameters}.",
        f"Forecast: doubling {largest} pairs changes the metric by {_interval(gain_from_doubling(fit))}.",
    ]
    if is_share:
        target = float(fit.predict([largest])[0]) + fit.study.sign * POINT
        if 0 <= target <= 1:
            said.append(f"One point more ({text(target)}): {pairs_needed(fit, target)}.")
    return said


def _compute(found: Findings) -> str:
    search, confirmation, reference = found.compute, found.confirmation_compute, found.study.reference
    rows = [
        ["full grid", f"{search.full} steps"],
        ["made", _of(search.spent, search)],
        ["saved by early stopping", _of(search.saved_early, search)],
        ["saved by the scheduler", _of(search.saved_by_scheduler, search)],
        ["not made: failed or cut off", _of(search.cut_off, search)],
        ["pairs seen", str(search.pairs_seen)],
        ["training time of all trials", _duration(search.train_seconds)],
    ]
    if confirmation.full:
        rows.append(["confirmation, on top", f"{confirmation.spent} steps"])
    rows.append(["reference pass", f"{reference.computed} responses computed, {reference.from_store} from the store"])
    return table([], rows)


def _of(steps: int, of: Compute) -> str:
    return f"{steps} steps ({steps / of.full:.0%})" if of.full else f"{steps} steps"


def _trials(study: Study) -> str:
    metric = study.objective.metric
    heads = ["trial", "settings", "seed", "state", "steps", f"best {metric}", "at step", "seconds", "remarks"]
    rows = []
    for trial in sorted(study.trials, key=lambda trial: trial.number):
        remarks = [
            f"confirms {trial.confirms}" if trial.confirms else "",
            f"{trial.attempts} attempts" if trial.attempts > 1 else "",
            trial.stop_reason or "",
            trial.error or "",
        ]
        rows.append(
            [
                trial.id,
                Configuration(trial.settings, trial.labels, [trial]).label(),
                str(trial.seed),
                trial.status.replace("_", " "),
                f"{trial.steps} of {trial.num_steps}",
                text(trial.value(metric)),
                text((trial.best or {}).get("step")),
                f"{trial.train_seconds:.0f}",
                "; ".join(filter(None, remarks)),
            ]
        )
    return table(heads, rows)


def _estimate(configuration: Configuration, metric: str, *, is_short: bool = False) -> str:
    estimate = configuration.estimate(metric)
    if estimate is None:
        return "-"
    short = with_interval(estimate.value, estimate.low, estimate.high)
    return short if is_short else _with(estimate)


def _with(estimate: Estimate) -> str:
    """`0.7 (0.6 to 0.8; 3 seeds)`."""
    within = [] if estimate.low is None else [f"{text(estimate.low)} to {text(estimate.high)}"]
    return f"{text(estimate.value)} ({'; '.join([*within, _over(estimate)])})"


def _over(estimate: Estimate | None) -> str:
    if estimate is None:
        return "-"
    return _count(estimate.num_seeds, "seed") + (", its pairs" if estimate.over == "pairs" else "")


def _interval(interval: Interval) -> str:
    estimate, low, high = (f"{round(value, 6) if math.isfinite(value) else value:+.4g}" for value in interval)
    return f"{estimate} ({low} to {high})" if math.isfinite(interval.low) else f"{estimate} (no interval)"


def _count(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _duration(seconds: float) -> str:
    """The two largest units."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    rest = round(seconds)
    parts: list[str] = []
    for name, size in units:
        number, rest = divmod(rest, size)
        if number or (name == "s" and not parts):
            parts.append(f"{number} {name}")
    return " ".join(itertools.islice(parts, 2))
