"""The report shows what the run folder says, and nothing else."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.errors import InputError
from dpo_ray.report import _figure, _series, write_report

PNG = b"\x89PNG\r\n\x1a\n"

TRAIN = [
    {
        "step": step,
        "epoch": step / 40,
        "loss": 0.7 - step / 100,
        "rewards/chosen": step / 50,
        "rewards/rejected": -step / 100,
        "rewards/margins": 3 * step / 100,
        "rewards/accuracies": 0.5 + step / 100,
        "logps/chosen": -40.0,
        "logps/rejected": -50.0,
        "entropy": 2.0,
        "kl": step / 1000,
        "grad_norm": 1.0,
        "learning_rate": 1e-6,
        "num_pairs": 64,
    }
    for step in (1, 10, 20)
]
EVAL = [
    {
        "step": step,
        "eval/loss": 0.69 - step / 200,
        "eval/rewards/accuracies": 0.6,
        "eval/rewards/accuracies_low": 0.5,
        "eval/rewards/accuracies_high": 0.7 + step / 1000,
        "eval/kl": 0.25,
        "eval/num_pairs": 100,
    }
    for step in (10, 20)
]
SUMMARY = {
    "status": "stopped_early",
    "stop_reason": None,
    "best_step": 10,
    "pairs_per_second": 12.3456789,
    "eval": {"loss": 0.59, "rewards/accuracies": 0.6, "rewards/accuracies_low": 0.5, "rewards/accuracies_high": 0.72},
    "best_eval": {"loss": 0.64, "rewards/accuracies": 0.625},
    "versions": {"torch": "9.8.7"},
}
DATA = {
    "read": 120,
    "kept": 117,
    "dropped": {"over_long": 2, "empty_response": 1},
    "sources": [{"path": "a.jsonl", "read": 100}, {"path": "b.jsonl", "read": 20, "ties": 4}],
}
RECIPE = "name: a\nmodel: {path: <script>alert(1)</script>}\n"


def run_folder(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.mkdir()
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path / "summary.json").write_text(json.dumps(SUMMARY))
    (path / "data_report.json").write_text(json.dumps(DATA))
    (path / "recipe.yaml").write_text(RECIPE)
    return path


def curves(figure: Any, panel: int) -> dict[str, tuple[list[float], list[float]]]:
    return {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in figure.axes[panel].lines}


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [re.findall(r"<t[hd]>(.*?)</t[hd]>", row) for row in rows]


@pytest.mark.parametrize("is_uri", [False, True])
def test_the_page_carries_its_picture_and_every_number(tmp_path: Path, is_uri: bool):
    path = run_folder(tmp_path / "hh", TRAIN + EVAL)
    folder = path.as_uri() if is_uri else str(path)
    assert write_report(folder) == [f"{folder}/report.html", f"{folder}/report.png"]

    picture, page = (path / "report.png").read_bytes(), (path / "report.html").read_text()
    assert picture.startswith(PNG)
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(embedded) == picture
    assert not re.findall(r'(?:src|href)="(?!data:)', page), "the page needs another file"

    rows = cells(page)
    assert ["metric", "last", "best"] in rows
    assert ["rewards/accuracies", "0.6 (0.5 to 0.72)", "0.625"] in rows
    assert ["loss", "0.59", "0.64"] in rows
    for row in (["status", "stopped_early"], ["stop_reason", "-"], ["pairs_per_second", "12.35"], ["torch", "9.8.7"]):
        assert row in rows
    for row in (["kept", "117"], ["over_long", "2"], ["path", "read", "ties"], ["a.jsonl", "100", "-"]):
        assert row in rows
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page


def test_the_panels_show_training_and_held_out():
    figure = _figure(TRAIN + EVAL, best_step=10)
    loss = curves(figure, 0)
    assert loss["loss"] == ([1, 10, 20], [line["loss"] for line in TRAIN])
    assert loss["eval/loss"] == ([10, 20], [line["eval/loss"] for line in EVAL])
    accuracies = curves(figure, 1)
    assert accuracies["eval/rewards/accuracies"] == ([10, 20], [0.6, 0.6])
    (band,) = figure.axes[1].collections
    corners = {(x, round(float(y), 3)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(10, 0.5), (20, 0.5), (10, 0.71), (20, 0.72)}
    assert {"rewards/margins", "rewards/chosen", "rewards/rejected"} <= set(curves(figure, 2))
    assert {"logps/chosen", "logps/rejected"} <= set(curves(figure, 3))
    kl = [list(line.get_ydata()) for line in figure.axes[4].lines]
    assert kl == [[0.001, 0.01, 0.02], [0.25, 0.25]]


def test_the_best_step_is_marked_in_every_panel():
    for panel in _figure(TRAIN + EVAL, best_step=10).axes[:4]:
        assert [10, 10] in [list(line.get_xdata()) for line in panel.lines]
    for panel in _figure(TRAIN + EVAL, best_step=None).axes[:4]:
        assert [10, 10] not in [list(line.get_xdata()) for line in panel.lines]


def test_a_run_without_rewards_says_so():
    only_loss = [{"step": line["step"], "loss": line["loss"], "logps/chosen": -1.0} for line in TRAIN]
    figure = _figure(only_loss, best_step=None)
    notes = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert notes == [[], ["not measured in this run"], ["not measured in this run"], []]


def test_a_step_that_a_resumed_run_repeats_counts_once_and_in_order():
    lines = [{"step": 1, "loss": 3.0}, {"step": 20, "loss": 9.0}, {"step": 10, "loss": None}, {"step": 10, "loss": 2.0}]
    assert list(_series([*lines, {"step": 20, "loss": 1.0}], "loss").items()) == [(1, 3.0), (10, 2.0), (20, 1.0)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "data_report.json", "recipe.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    path = run_folder(tmp_path / "hh", TRAIN)
    (path / name).unlink()
    with pytest.raises(InputError, match=f"no {name} in {path}"):
        write_report(str(path))
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(("name", "content"), [("summary.json", "{"), ("data_report.json", "[]")])
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: str):
    path = run_folder(tmp_path / "hh", TRAIN)
    (path / name).write_text(content)
    with pytest.raises(InputError, match=name):
        write_report(str(path))
    (path / name).write_text("{}")
    (path / "metrics.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl is not JSONL"):
        write_report(str(path))
