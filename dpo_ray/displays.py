"""What a person sees of a command: progress as it goes, and its result as a table. All of it goes to stderr, but tables
of results, which nobody asked for as JSON.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import rich.live
from rich.console import Console, Group
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from dpo_ray.terminal import console, say


class Live:
    """Progress on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description} {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=12),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[told]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._is_terminal = console.is_terminal
        self._told_at = 0.0

    def __enter__(self) -> "Live":
        if self._is_terminal:
            self._progress.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self._is_terminal:
            for task in self._tasks.values():
                self._progress.update(task, visible=False)
            self._progress.stop()

    def phase(self, text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    def progress(self, text: str, done: int, total: int) -> None:
        if self._is_terminal:
            if text not in self._tasks:
                self._tasks[text] = self._progress.add_task(text, total=total, told="")
            self._progress.update(self._tasks[text], completed=done, visible=done < total)
        elif done and (time.monotonic() - self._told_at > 5 or done == total):
            self._told_at = time.monotonic()
            console.print(f"{text} {done}/{total}", highlight=False)

    def line(self, line: Mapping[str, Any]) -> None:
        told = told_of_anomaly(line["anomaly"]) if "anomaly" in line else line.get("event")
        if told:
            say(f"step {line['step']}: {told}", style="yellow")
            return
        told = brief(line)
        if self._is_terminal and "eval/loss" not in line:
            self._progress.update(self._tasks["training"], completed=line["step"], told=short(line))
        else:
            console.print(f"step {line['step']}: {told}", highlight=False, soft_wrap=True)


class StudyLive(Live):
    """The trials of a study as a table on a terminal; elsewhere a line when one begins or ends."""

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._table: Table | str = ""
        self._told: dict[str, str] = {}
        self._live = rich.live.Live(console=console, get_renderable=lambda: Group(self._table, self._progress))

    def __enter__(self) -> "StudyLive":
        if self._is_terminal:
            self._live.start()
        return self

    def __exit__(self, *args: object) -> None:
        if self._is_terminal:
            for task in self._tasks.values():
                self._progress.update(task, visible=False)
            self._live.stop()

    def trials(self, records: Sequence[Mapping[str, Any]], total: int | None, metric: str, mode: str) -> None:
        if self._is_terminal:
            self._table = trials_table(records, total, metric, mode, time.monotonic() - self._began)
            return
        for record in records:
            if self._told.get(record["id"]) != record["status"]:
                self._told[record["id"]] = record["status"]
                best = f"  {metric} {record['best'][metric]:.4g}" if record["best"] else ""
                reason = record["error"] or record["stop_reason"] or ""
                console.print(
                    f"trial {record['number']} ({settings_of(record)}): {record['status']}{best}"
                    + (f"  ({reason})" if reason else ""),
                    markup=False,
                    highlight=False,
                    soft_wrap=True,
                )


TRIALS_SHOWN = 20


def trials_table(
    records: Sequence[Mapping[str, Any]], total: int | None, metric: str, mode: str, seconds: float
) -> Table:
    """States, the best so far, the time left."""
    done = [r for r in records if r["status"] not in ("waiting", "running", "interrupted")]
    scored = [r for r in records if r["best"]]
    best = (max if mode == "max" else min)(scored, key=lambda r: r["best"][metric], default=None)
    title = f"{len(done)} of {total or '?'} trials done"
    if best is not None:
        title += f"; best {metric} {best['best'][metric]:.4f} ({settings_of(best)})"
    if done and total and len(done) < total and seconds:
        title += f"; about {seconds / len(done) * (total - len(done)) / 60:.0f} min left"
    table = Table(title=title)
    for heading in ("trial", "settings", "state", "step", metric):
        table.add_column(heading)
    busy = [r for r in records if r["status"] == "running"]
    for record in [*done[-max(0, TRIALS_SHOWN - len(busy)) :], *busy]:
        value = f"{record['best'][metric]:.4f}" if record["best"] else ""
        table.add_row(str(record["number"]), settings_of(record), record["status"], str(record["steps"]), value)
    return table


def settings_of(record: Mapping[str, Any]) -> str:
    """A trial's settings in few words."""
    told = [f"{key.rpartition('.')[2]}={label}" for key, label in record["labels"].items()]
    return " ".join([*told, f"seed={record['seed']}"]) + (", confirms" if record["confirms"] else "")


def show_study(study: Mapping[str, Any]) -> None:
    """All trials, and where the report is."""
    objective = study["objectives"][0]
    console.print(trials_table(study["trials"], len(study["trials"]), objective["metric"], objective["mode"], 0.0))
    reason = f": {study['stop_reason']}" if study["stop_reason"] not in (None, study["status"]) else ""
    console.print(f"{study['status']}{reason}; {study['seconds']:.0f} s", highlight=False)
    folder = study["trials"][0]["folder"].rpartition("/trials/")[0] if study["trials"] else ""
    console.print(f"report: {folder}/report.html; best recipe: {folder}/best.yaml", highlight=False, soft_wrap=True)


def show_acquisition(tree: Mapping[str, Any], folder: str) -> None:
    """The last round of every arm, and where the report is."""
    table = Table(title=str(tree["status"]))
    for heading in ("strategy", "seed", "labels", tree["metric"], "model"):
        table.add_column(heading, overflow="fold")
    for arm in tree["arms"]:
        for last in arm["rounds"][-1:]:
            value = "" if last["value"] is None else f"{last['value']:.4f}"
            table.add_row(arm["strategy"], str(arm["seed"]), str(last["asked"]), value, last["model"] or "")
    console.print(table)
    console.print(f"report: {folder}/report.html", highlight=False, soft_wrap=True)


def short(line: Mapping[str, Any]) -> str:
    """What fits beside a progress bar."""
    names = {"loss": "loss", "rewards/accuracies": "acc", "rewards/margins": "margin", "pairs_per_second": "pairs/s"}
    return "  ".join(f"{told} {line[name]:.3g}" for name, told in names.items() if name in line)


def brief(line: Mapping[str, Any]) -> str:
    """The few numbers of a metrics line that people watch."""
    shown = ("loss", "rewards/accuracies", "rewards/margins", "kl", "grad_norm", "pairs_per_second")
    parts = []
    for prefix in ("", "eval/"):
        parts += [f"{prefix}{name} {line[prefix + name]:.4g}" for name in shown if prefix + name in line]
    return "  ".join(parts)


def told_of_anomaly(anomaly: Mapping[str, Any]) -> str:
    return f"{anomaly['name']}: {anomaly['evidence']}; try: {anomaly['advice']}"


def show_summary(summary: Mapping[str, Any]) -> None:
    """Best and last evaluation side by side, and where everything is."""
    table = Table(title=f"{summary['status']}" + (f": {summary['stop_reason']}" if summary["stop_reason"] else ""))
    table.add_column("held out")
    table.add_column(f"best (step {summary['best_step']})", justify="right")
    table.add_column(f"last (step {summary['steps']})", justify="right")
    for name, value in summary["eval"].items():
        table.add_row(name, f"{summary['best_eval'][name]:.4f}", f"{value:.4f}")
    console.print(table)
    rate = summary["pairs_per_second"]
    console.print(
        f"{summary['pairs_seen']} pairs in {summary['train_seconds']:.1f} s of training"
        + (f", {rate:.1f} pairs/s" if rate else "")
        + "; reference: {computed} computed, {from_store} from the store".format(**summary["reference"])
    )
    for anomaly in summary["anomalies"]:
        say(f"step {anomaly['step']}: {told_of_anomaly(anomaly)}", style="yellow")
    console.print(f"model: {summary['model_path']}", highlight=False, soft_wrap=True)


def show_plan(plan: Mapping[str, Any]) -> None:
    import yaml

    print(yaml.safe_dump(dict(plan), sort_keys=False), end="")


def show_metrics(title: str, values: Mapping[str, Any]) -> None:
    table = Table(title=title)
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in values.items():
        table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)


def show_evaluation(tree: Mapping[str, Any]) -> None:
    """The numbers that matter most, each with its interval, and where the rest is."""
    told: dict[str, Any] = {}
    if held_out := tree.get("held_out"):
        metrics = held_out["metrics"]
        told |= {name: metrics[name] for name in ("loss", "rewards/margins", "kl") if name in metrics}
        if "rewards/accuracies" in metrics:
            told["rewards/accuracies"] = {
                "value": metrics["rewards/accuracies"],
                "low": metrics["rewards/accuracies_low"],
                "high": metrics["rewards/accuracies_high"],
            }
        told |= {name: held_out[name] for name in ("length_controlled_accuracy",) if name in held_out}
    for rate in tree.get("win_rate", []):
        told[f"win rate against {rate['against']}"] = rate
        if rate["length_controlled"]:
            told[f"  length-controlled, against {rate['against']}"] = rate["length_controlled"]
    for row in tree.get("ranking", []):
        told[f"rating of {row['model']} (nats)"] = {**row, "value": row["rating"]}
    if "kl" in tree:
        told["KL to the reference (nats per response)"] = tree["kl"]
    for text in tree.get("retention", {}).get("perplexity", []):
        name = text["source"].rpartition("/")[2]
        told[f"perplexity on {name}"] = f"{text['before']:.3f} -> {text['after']:.3f}"
        told[f"  change of the loss on {name} (nats per token)"] = {**text, "value": text["change"]}
    for task in tree.get("retention", {}).get("tasks", []):
        told[f"{task['task']} ({task['metric']})"] = f"{task['before']:.3f} -> {task['after']:.3f}"
        told[f"  change of {task['task']}"] = {**task, "value": task["change"]}
    for change in tree.get("drift", []):
        told[f"{change['name']} ({change['unit']})"] = f"{change['before']:.4g} -> {change['after']:.4g}"
    show_metrics("Evaluation", flat_shares(told))
    console.print(f"{tree['folder']}/evaluation.html", highlight=False, soft_wrap=True)


def flat_shares(values: Mapping[str, Any]) -> dict[str, Any]:
    """Each value with an interval in one cell."""
    return {
        name: f"{value['value']:.4f} ({value['low']:.4f} to {value['high']:.4f})"
        if isinstance(value, Mapping) and "low" in value
        else value
        for name, value in values.items()
    }


def show_data(tree: Mapping[str, Any]) -> None:
    """What was found and what to do, and where it stands in full."""
    pairs = tree["pairs"]
    table = Table(title=f"{pairs['train']} training and {pairs['held_out']} held-out pairs of {pairs['rows']} rows")
    for heading in ("what", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in tree["findings"]:
        table.add_row(*map(Text, (finding["what"], finding["found"], finding["advice"])))
    Console().print(table)
    console.print(f"report: {tree['folder']}/quality.html", highlight=False, soft_wrap=True)


def show_versions(name: str, versions: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=name)
    for heading in ("version", "aliases", "win rate", "data", "labels"):
        table.add_column(heading, overflow="fold")
    for one in versions:
        rate = ""
        if one["win_rate"] is not None:
            rate = "{:.1%} ({:.1%} to {:.1%})".format(*(float(one[key]) for key in ("win_rate", "low", "high")))
        rate += " forced" if one["forced"] == "true" else ""
        cells = (", ".join(one["aliases"]), rate, one["data_fingerprint"] or "", one["labels"] or "")
        table.add_row(one["version"], *map(Text, cells))
    Console().print(table)


def show_findings(found: list[dict[str, Any]]) -> None:
    table = Table()
    for heading in ("", "what", "where", "found"):
        table.add_column(heading, overflow="fold")
    for finding in found:
        state, told = finding["state"], finding["found"]
        if state != "ok":
            told = f"{told}\n-> {finding['fix']}"
        style = {"ok": None, "warn": "yellow", "fail": "red"}[state]
        where = finding["where"]
        named = ", ".join(where[:3]) + (f" and {len(where) - 3} more" if len(where) > 3 else "")
        table.add_row(state, finding["name"], named, Text(told), style=style)
    Console().print(table)
