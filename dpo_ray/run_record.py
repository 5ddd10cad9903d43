"""What a run folder holds, read for people: the report, the comparison of runs and the model card. Changes nothing."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import yaml

from dpo_ray.errors import InputError
from dpo_ray.storage import Folder, read_lines

EVALUATION_FILE = "evaluation/evaluation.json"

Series = dict[int, float]
"""Step -> value."""


class RunRecord(NamedTuple):
    """A run that has ended, as its folder tells it."""

    name: str
    path: str
    lines: list[dict[str, Any]]
    """`metrics.jsonl`."""
    summary: dict[str, Any]
    data: dict[str, Any]
    """`data_report.json`."""
    recipe: str
    """`recipe.yaml`."""
    evaluation: dict[str, Any] | None
    """What `dpo-ray evaluate` found; None where it was not asked."""
    margins: dict[int, list[float]]
    """Margins of the held-out pairs, nats, at the first and at the best evaluation (the last, where none is best)."""

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe as a tree."""
        tree: dict[str, Any] = yaml.safe_load(self.recipe)
        return tree

    @property
    def metrics(self) -> dict[str, float]:
        """Of the best evaluation, by their names without `eval/`; else of the last one."""
        found = self.summary.get("best_eval") or self.summary.get("eval") or {}
        return {name.removeprefix("eval/"): value for name, value in found.items()}


def read_run(path: str) -> RunRecord:
    """Read a run folder, local or remote.

    Raises:
        InputError: A file that every run writes is missing or unreadable.
    """
    run = Folder(path)
    lines, summary, data = _lines(run), _object(run, "summary.json"), _object(run, "data_report.json")
    recipe = _read(run, "recipe.yaml").decode()
    try:
        is_tree = isinstance(yaml.safe_load(recipe), dict)
    except yaml.YAMLError:
        is_tree = False
    if not is_tree:
        raise InputError(f"{run.path}/recipe.yaml is not a recipe")
    evaluation = _object(run, EVALUATION_FILE) if run.exists(EVALUATION_FILE) else None
    margins = _margins(run, summary.get("best_step"))
    return RunRecord(run.path.rpartition("/")[2], run.path, lines, summary, data, recipe, evaluation, margins)


def series(lines: Iterable[Mapping[str, Any]], name: str) -> Series:
    """A metric by step. A resumed run writes some steps twice; the later line counts."""
    found = {int(line["step"]): float(line[name]) for line in lines if line.get(name) is not None}
    return dict(sorted(found.items()))


def _margins(run: Folder, best_step: int | None) -> dict[int, list[float]]:
    place = run / "held_out"
    found = (re.fullmatch(r"step-(\d+)\.json", name) for name in place.names())
    files = {int(match[1]): match[0] for match in found if match}
    if not files:
        return {}
    end = best_step if best_step in files else max(files)
    return {step: [float(value) for value in _object(place, files[step]).values()] for step in (min(files), end)}


def _read(run: Folder, name: str) -> bytes:
    if not run.exists(name):
        raise InputError(f"no {name} in {run.path}: not the folder of a finished run")
    return run.read(name)


def _object(run: Folder, name: str) -> dict[str, Any]:
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
