"""The report of a run: what its folder says, as one HTML page and pictures. Reads files only, trains nothing.

Everything shown is in the run folder already; the page needs no network and no other file.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from dpo_ray.evaluation_report import evaluation_numbers, evaluation_sections, evaluation_sentences, examples
from dpo_ray.metrics import METRICS
from dpo_ray.page import (
    BLUE,
    Panel,
    document,
    duration,
    folded,
    numbers,
    panels_side_by_side,
    paragraph,
    percent,
    percent_with_interval,
    section,
    sheet,
    subsection,
    table,
    text,
    with_interval,
)
from dpo_ray.recipe_diff import from_defaults
from dpo_ray.run_panels import curve_panels, kl_panels, reward_panels
from dpo_ray.run_record import RunRecord, read_run
from dpo_ray.storage import Folder, redacted


def write_report(folder: str) -> list[str]:
    """Write `report.html` and `report.png` into a run folder, and return their paths.

    Raises:
        InputError: A file of the run is missing or unreadable, or the folder cannot be written.
    """
    run, place = read_run(folder), Folder(folder)
    best = run.summary.get("best_step")
    panels = [*curve_panels(run.lines, best), *reward_panels(run), *kl_panels(run.lines, best)]
    place.write("report.png", sheet(panels))
    place.write("report.html", document(run.name, _body(run), "Training run"))
    return [f"{place.path}/report.html", f"{place.path}/report.png"]


def _body(run: RunRecord) -> str:
    best = run.summary.get("best_step")
    nothing = paragraph("Not measured in this run.")
    rewards, kl = panels_side_by_side(reward_panels(run)), panels_side_by_side(kl_panels(run.lines, best))
    shown = examples(run.evaluation or {}) or paragraph(
        f"None yet: `dpo-ray evaluate {run.name}` writes responses before and after."
    )
    return "\n".join(
        [
            section("Summary", *map(paragraph, _sentences(run)), numbers(_key_numbers(run))),
            section("Curves", panels_side_by_side(curve_panels(run.lines, best)) or nothing),
            section("Reward distributions", rewards or nothing, _before(run) if rewards else ""),
            section("KL against reward", kl or nothing),
            section("Evaluation", _evaluation(run)),
            section("Examples", shown),
            section("Anomalies", _anomalies(run.summary)),
            section("Data", _data(run.data)),
            section("Speed and cost", _speed(run.summary)),
            section("Recipe", _recipe(run)),
            section("Versions and fingerprints", _origin(run)),
        ]
    )


def _sentences(run: RunRecord) -> list[str]:
    """What happened, and what came of it."""
    summary, metrics = run.summary, run.metrics
    told = [_how_it_ended(summary)]
    if metrics.get("rewards/accuracies") is not None:
        value = percent_with_interval(*accuracy_of(metrics))
        at = f"At the best evaluation, of step {summary['best_step']}, the" if summary.get("best_step") else "The"
        told.append(
            f"{at} policy gives the chosen response the higher reward in {value} of "
            f"{text(metrics.get('num_pairs'))} held-out pairs. {_against_chance(metrics)}".rstrip()
        )
    elif not metrics:
        told.append("No held-out pair was evaluated.")
    told += evaluation_sentences(run.evaluation or {})
    return [*told, _told_anomalies(summary)]


def _how_it_ended(summary: Mapping[str, Any]) -> str:
    status, reason = str(summary.get("status", "unknown")).replace("_", " ").capitalize(), summary.get("stop_reason")
    steps, of = summary.get("steps"), summary.get("num_steps")
    done = "" if steps is None else f" after {steps} steps" if of in (None, steps) else f" after {steps} of {of} steps"
    told = f"{status}{done}{f': {redacted(str(reason))}' if reason and reason != 'interrupted' else ''}."
    seconds, pairs, workers = (summary.get(name) for name in ("train_seconds", "pairs_seen", "world_size"))
    if seconds is not None and pairs is not None:
        on = f" on {workers} worker{'' if workers == 1 else 's'}" if workers else ""
        told += f" It saw {pairs} pairs in {duration(seconds)}{on}."
    return told


def _against_chance(metrics: Mapping[str, float]) -> str:
    """What the accuracy's interval says about guessing."""
    _, low, high = accuracy_of(metrics)
    if low is None or high is None:
        return ""
    if low > 0.5:
        return "That is better than guessing."
    return "That is worse than guessing." if high < 0.5 else "That is not distinguishable from guessing."


def accuracy_of(metrics: Mapping[str, float]) -> tuple[float | None, float | None, float | None]:
    """Held-out accuracy with its interval."""
    value, low, high = (metrics.get(f"rewards/accuracies{end}") for end in ("", "_low", "_high"))
    return value, low, high


def _told_anomalies(summary: Mapping[str, Any]) -> str:
    found = summary.get("anomalies")
    if found is None:
        return "It was not watched for anomalies."
    if not found:
        return "No anomaly was seen."
    names = ", ".join(f"{one['name'].replace('_', ' ')} (step {one['step']})" for one in found)
    return f"{len(found)} anomal{'y' if len(found) == 1 else 'ies'}: {names}."


def _key_numbers(run: RunRecord) -> list[tuple[str, str, str]]:
    summary, metrics = run.summary, run.metrics
    steps = text(summary.get("steps"))
    value, low, high = accuracy_of(metrics)
    found = [
        ("status", str(summary.get("status", "-")).replace("_", " "), ""),
        ("steps", steps, f"of {summary['num_steps']}" if summary.get("num_steps") else ""),
        (
            "best step",
            text(summary.get("best_step")),
            f"by {summary['best_metric']}" if "best_metric" in summary else "",
        ),
    ]
    if value is not None:
        within = "" if low is None or high is None else f"{percent(low)} to {percent(high)}"
        found.append(("held-out accuracy", percent(value), within))
    found += evaluation_numbers(run.evaluation or {})
    if summary.get("anomalies") is not None:
        found.append(("anomalies", str(len(summary["anomalies"])), ""))
    return found


def _before(run: RunRecord) -> str:
    """What "before" is in the distributions, where the run's own margins are shown."""
    if ((run.evaluation or {}).get("held_out") or {}).get("rewards"):
        return ""
    reference = (run.settings.get("reference") or {}).get("path")
    zero = " Before the first step every margin is 0, since the reference is the model itself." if not reference else ""
    return paragraph(
        f"Margins of the same held-out pairs at the run's first and its best evaluation.{zero} `dpo-ray evaluate "
        f"{run.name}` adds the rewards of each response."
    )


def _evaluation(run: RunRecord) -> str:
    if run.evaluation:
        rest = evaluation_sections(run.evaluation)
    else:
        rest = paragraph(f"Win rate, retention and drift: `dpo-ray evaluate {run.name}` measures them.")
    return subsection("Held-out pairs during training", held_out_table(run.summary)) + "\n" + rest


def held_out_table(summary: Mapping[str, Any]) -> str:
    """Metrics in rows, the last and the best evaluation in columns; an accuracy carries its interval."""
    evaluations = {"last": summary.get("eval") or {}, "best": summary.get("best_eval") or {}}
    columns = {
        head: {key.removeprefix("eval/"): value for key, value in values.items()}
        for head, values in evaluations.items()
        if values
    }
    if not columns:
        return paragraph("No evaluation.")
    names = dict.fromkeys(name for values in columns.values() for name in values)
    rows = [
        [
            name,
            *(with_interval(*(values.get(name + end) for end in ("", "_low", "_high"))) for values in columns.values()),
            METRICS[name].meaning if name in METRICS else "",
        ]
        for name in names
        if not name.endswith(("_low", "_high"))
    ]
    return table(["metric", *columns, "meaning"], rows)


def _anomalies(summary: Mapping[str, Any]) -> str:
    found = summary.get("anomalies")
    if not found:
        return paragraph(_told_anomalies(summary))
    rows = [[one["name"].replace("_", " "), text(one["step"]), one["evidence"], one["advice"]] for one in found]
    return table(["anomaly", "step", "evidence", "what to try"], rows)


def _data(data: Mapping[str, Any]) -> str:
    """`data_report.json` in words and tables. A row is what a source holds, a pair what came of it."""
    sides = [(name, data[key]) for key, name in (("train", "for training"), ("held_out", "held out")) if key in data]
    told = [
        f"{text(data.get('rows'))} rows gave {text(data.get('pairs'))} pairs; "
        + ", ".join(f"{text(side.get('pairs'))} {name}" for name, side in sides if isinstance(side, dict))
        + "."
    ]
    told += [f"{note[:1].upper()}{note[1:]}." for note in data.get("notes") or []]
    return "\n".join(
        [
            *map(paragraph, told),
            subsection("Not used", _dropped(data)),
            subsection("Tokens", _tokens([(name, side) for name, side in sides if isinstance(side, dict)])),
            subsection("Sources", _sources(data.get("sources") or [])),
            subsection("Sources of held-out pairs", _sources(data.get("eval_sources") or [])),
        ]
    )


def _dropped(data: Mapping[str, Any]) -> str:
    """Every count of what is not trained or evaluated on as it was, with its reason."""
    held_out = {"dropped": _sum_of_dropped(data.get("eval_sources") or [])}
    places = [("in the sources", data), ("in the sources of held-out pairs", held_out)]
    places += [
        (f"{name} pairs, encoded", data[key])
        for key, name in (("train", "training"), ("held_out", "held-out"))
        if isinstance(data.get(key), dict)
    ]
    rows = [
        [reason.replace("_", " "), where, what, str(count)]
        for where, part in places
        for what in ("dropped", "truncated")
        for reason, count in (part.get(what) or {}).items()
    ]
    rows += [
        [f"by {name}", "in the mixture", "left out", str(n)] for name, n in (data.get("left_out") or {}).items() if n
    ]
    if data.get("contradictions"):
        rows.append(["says the opposite of another pair", "in the sources", "kept", str(data["contradictions"])])
    return table(["reason", "where", "what was done", "number"], rows) if rows else paragraph("Every row was used.")


def _sum_of_dropped(sources: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for source in sources:
        for reason, count in (source.get("dropped") or {}).items():
            total[reason] = total.get(reason, 0) + count
    return total


def _tokens(sides: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    rows = []
    for name, side in sides:
        a_pair = side.get("pair_tokens") or {}
        rows.append(
            [
                name,
                *(text(side.get(key)) for key in ("pairs", "tokens", "prompt_tokens", "response_tokens")),
                *(text(a_pair.get(key)) for key in ("median", "p95", "max")),
                percent(side.get("chosen_longer")),
            ]
        )
    heads = ["", "pairs", "tokens", "of prompts", "of responses", "median of a pair", "95 % below", "longest"]
    return table([*heads, "chosen is longer"], rows) if rows else ""


def _sources(sources: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        [
            redacted(str(source.get("path"))),
            *(text(source.get(key)) for key in ("rows", "pairs", "held_out", "contradictions")),
            str(sum((source.get("dropped") or {}).values())),
        ]
        for source in sources
    ]
    return table(["path", "rows", "pairs", "held out", "contradictions", "dropped"], rows) if rows else ""


def _speed(summary: Mapping[str, Any]) -> str:
    rows = [[name, value] for name, value in speed_of(summary).items() if value != "-"]
    if not rows:
        return paragraph("Not measured in this run.")
    return panels_side_by_side(_time_panels(summary)) + table([], rows)


def speed_of(summary: Mapping[str, Any]) -> dict[str, str]:
    """What the run cost, and how fast it was; a dash where that is not known."""
    seconds, workers, mfu = (summary.get(name) for name in ("train_seconds", "world_size", "mfu"))
    hours = None if seconds is None or workers is None else seconds * workers / 3600
    reference = summary.get("reference") or {}
    made = f"{text(reference.get('computed'))} computed, {text(reference.get('from_store'))} from the store"
    return {
        "pairs per second": text(summary.get("pairs_per_second")),
        "tokens per second": text(summary.get("tokens_per_second")),
        "share of tokens that are padding": percent(summary.get("padding_fraction")),
        "share of the devices' peak (MFU)": percent(mfu),
        "attention": text(summary.get("attention")),
        "peak memory of a worker": _with_unit(summary.get("peak_memory_gib"), "GiB"),
        "training steps": "-" if seconds is None else duration(seconds),
        "worker hours (device hours on GPUs)": text(hours),
        "waiting for checkpoints": percent(summary.get("checkpoint_share")),
        "from start to end": "-" if summary.get("wall_seconds") is None else duration(summary["wall_seconds"]),
        "reference log-probs of responses": made if reference else "-",
        "restarts": text(summary.get("restarts")),
        "steps done again": text(summary.get("lost_steps")),
        "steps left out, not finite": text(summary.get("skipped_steps")),
    }


def _with_unit(value: Any, unit: str) -> str:
    return "-" if value is None else f"{text(value)} {unit}"


def _time_panels(summary: Mapping[str, Any]) -> list[Panel]:
    split = summary.get("time_split") or {}
    if not split:
        return []

    def draw(axes: Axes) -> None:
        bars = axes.barh([*split], [100 * share for share in split.values()], color=BLUE, alpha=0.8)
        axes.bar_label(bars, labels=[f"{share:.1%}" for share in split.values()], padding=3, fontsize=8)
        axes.set(xlabel="% of the time from the first step to the last")
        axes.invert_yaxis()
        axes.margins(x=0.15)

    return [Panel("Where the time went", "Shares by the steps that were timed.", draw, 2.6)]


def _recipe(run: RunRecord) -> str:
    rows = [[key, redacted(text(value)), text(default)] for key, value, default in from_defaults(run.settings)]
    whole = f"<pre>{html.escape(redacted(run.recipe))}</pre>"
    return "\n".join(
        [
            paragraph("What differs from the defaults."),
            table(["key", "value", "default"], rows),
            folded("The whole recipe, as resolved", whole),
        ]
    )


def _origin(run: RunRecord) -> str:
    names = ("data_fingerprint", "reference_fingerprint", "model_path", "mlflow_run_id", "resumed_from_step")
    rows = [[name.replace("_", " "), redacted(text(run.summary[name]))] for name in names if name in run.summary]
    versions = run.summary.get("versions") or {}
    return table(
        [], [["folder", redacted(run.path)], *rows, *([name, text(value)] for name, value in versions.items())]
    )
