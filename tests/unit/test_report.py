"""The report shows what the run folder says, and nothing else."""

import html
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.errors import InputError
from dpo_ray.evaluation_report import write_evaluation_report
from dpo_ray.page import LONG_TEXT, Panel, document, said, section, table, text
from dpo_ray.report import write_report
from dpo_ray.run_comparison import write_comparison
from dpo_ray.run_panels import curve_panels, kl_panels, reward_panels, reward_panels_of
from dpo_ray.run_record import read_run, series
from tests.unit.runs import DATA, HOSTILE, LINES, LONG, SUMMARY, complete_run, evaluation, recipe, write_run

PNG = b"\x89PNG\r\n\x1a\n"
SECTIONS = {
    "summary": "Summary",
    "curves": "Curves",
    "reward-distributions": "Reward distributions",
    "kl-against-reward": "KL against reward",
    "evaluation": "Evaluation",
    "examples": "Examples",
    "anomalies": "Anomalies",
    "data": "Data",
    "speed-and-cost": "Speed and cost",
    "recipe": "Recipe",
    "versions-and-fingerprints": "Versions and fingerprints",
}
SHORT = [{"step": 1, "loss": 0.7}, {"step": 2, "loss": 0.6}]
STEPS = [1, 10, 20, 30, 40, 50, 60]


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a run that has everything."""
    path = complete_run(tmp_path_factory.mktemp("runs") / "hh")
    write_report(str(path))
    return (path / "report.html").read_text()


def page_of(path: Path) -> str:
    write_report(str(path))
    return (path / "report.html").read_text()


def part(page: str, name: str) -> str:
    """A section by its id."""
    (found,) = re.findall(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    return str(found)


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def words(page: str) -> str:
    """The text of a page, on one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def drawn(panel: Panel) -> Axes:
    axes = Figure().subplots()
    panel.draw(axes)
    return axes


def named(panels: list[Panel]) -> dict[str, Panel]:
    return {panel.title: panel for panel in panels}


def curves(panel: Panel) -> dict[str, tuple[list[float], list[float]]]:
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in drawn(panel).lines}


# The page


@pytest.mark.parametrize("is_uri", [False, True])
def test_the_report_is_written_into_the_run_folder(tmp_path: Path, is_uri: bool):
    path = write_run(tmp_path / "hh", lines=SHORT)
    folder = path.as_uri() if is_uri else str(path)
    assert write_report(folder) == [f"{folder}/report.html", f"{folder}/report.png"]
    assert (path / "report.png").read_bytes().startswith(PNG)
    assert (path / "report.html").read_text().startswith("<!doctype html>")


def test_every_section_is_there_in_order_with_its_pictures(complete: str):
    assert re.findall(r'<section id="([^"]*)">\n<h2>(.*?)</h2>', complete) == list(SECTIONS.items())
    assert re.findall(r'<li><a href="#([^"]*)">(.*?)</a></li>', complete) == list(SECTIONS.items())
    pictures = {name: part(complete, name).count("<img ") for name in SECTIONS}
    assert pictures == dict.fromkeys(SECTIONS, 0) | {
        "curves": 6,
        "reward-distributions": 2,
        "kl-against-reward": 2,
        "evaluation": 2,
        "speed-and-cost": 1,
    }


def test_the_page_needs_no_network_and_forbids_it(complete: str):
    assert not re.findall(r'(?:src|href)="(?!data:|#)', complete), "the page needs another file"
    assert not re.findall(r"https?://", complete)
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', complete)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    assert '<html lang="en">' in complete
    assert 'name="viewport" content="width=device-width, initial-scale=1"' in complete


def test_what_can_not_be_seen_is_said_and_headings_are_in_order(complete: str):
    assert all(len(meaning) > 20 for meaning in re.findall(r'<img alt="([^"]*)"', complete))
    assert complete.count("<img ") == complete.count('<img alt="') == complete.count("<figcaption>")
    levels = [int(level) for level in re.findall(r"<h([1-6])>", complete)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_texts_of_users_are_only_text(complete: str):
    assert "<script" not in complete
    assert "<img src=x" not in complete
    assert html.escape(HOSTILE) in part(complete, "examples")


def test_no_password_is_on_the_page(complete: str):
    assert "secret" not in complete
    assert "s3://***@bucket/more.jsonl" in complete


# Its sections


def test_the_summary_says_how_it_ended_and_what_came_of_it(complete: str):
    said_ = words(part(complete, "summary"))
    for sentence in (
        "Stopped early after 60 of 80 steps: rewards/accuracies has not risen for 1 evaluation. It saw 3840 pairs in "
        "30 min on 4 workers.",
        "At the best evaluation, of step 40, the policy gives the chosen response the higher reward in 68.0% (62.0% to "
        "73.0%) of 300 held-out pairs. That is better than guessing.",
        "Against base, judged by function:demo, it wins 61.3% (54.0% to 68.0%) of 200 prompts: it is better.",
        "Against other, judged by llm:judge, it wins 50.3% (43.0% to 57.0%) of 200 prompts: neither is shown to be "
        "better.",
        "Perplexity on books: 12.1 before, 12.6 after (change +0.0405 (+0.01 to +0.07) nats per token): worse.",
        "arc, acc: 0.5 before, 0.49 after (change -0.01 (-0.03 to +0.01)): no change is shown.",
        "1 anomaly: likelihood displacement (step 40).",
    ):
        assert sentence in said_
    tiles = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)<", complete))
    assert tiles["steps"] == "60"
    assert tiles["held-out accuracy"] == "68.0%"
    assert tiles["win rate against base"] == "61.3%"
    assert tiles["anomalies"] == "1"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(0.51, 0.7, "better than guessing"), (0.5, 0.6, "not distinguishable from guessing"), (0.3, 0.49, "worse than")],
)
def test_an_accuracy_is_judged_by_its_interval(tmp_path: Path, low: float, high: float, verdict: str):
    best = {"rewards/accuracies": 0.5, "rewards/accuracies_low": low, "rewards/accuracies_high": high, "num_pairs": 9}
    page = page_of(write_run(tmp_path / "a", lines=SHORT, summary=SUMMARY | {"best_eval": best}))
    assert verdict in words(part(page, "summary"))


@pytest.mark.parametrize(
    ("anomalies", "told"),
    [({}, "It was not watched for anomalies."), ({"anomalies": []}, "No anomaly was seen.")],
)
def test_no_anomaly_is_not_the_same_as_not_looked(tmp_path: Path, anomalies: dict[str, Any], told: str):
    summary = {key: value for key, value in SUMMARY.items() if key != "anomalies"} | anomalies
    page = page_of(write_run(tmp_path / "a", lines=SHORT, summary=summary))
    assert told in words(part(page, "summary"))
    assert told in words(part(page, "anomalies"))


def test_an_anomaly_has_its_evidence_and_advice(complete: str):
    row = [
        "likelihood displacement",
        "40",
        "logps/chosen fell by 2 nats while margins rose",
        "raise `loss.beta`",
    ]
    assert row in cells(part(complete, "anomalies"))


def test_the_evaluation_shows_every_part_with_its_interval(complete: str):
    rows = cells(part(complete, "evaluation"))
    assert ["metric", "last", "best", "meaning"] in rows
    accuracy = "pairs whose chosen reward is the higher; a tie counts half"
    assert ["rewards/accuracies", "0.63 (0.57 to 0.68)", "0.68 (0.62 to 0.73)", accuracy] in rows
    assert ["rewards/accuracies", "0.68 (0.62 to 0.73)", "share", accuracy] in rows
    won = ["61.3% (54.0% to 68.0%)", "58.0% (51.0% to 65.0%)", "57.2%"]
    assert ["base", "200", "120, 4, 75", *won, "it is better"] in rows
    assert ["other", "200", "90, 20, 89", "50.3% (43.0% to 57.0%)", "-", "-", "neither is shown to be better"] in rows
    assert ["other", "llm:judge", "56.0% (51.0% to 61.0%)", "1", "requests 400"] in rows
    assert ["base", "-0.3 (-0.5 to -0.1)"] in rows
    assert ["helpful-pairs", "150", "70.0% (62.0% to 77.0%)", "0.5", "0.04"] in rows
    assert ["1-31", "150", "70.0% (62.0% to 77.0%)", "0.5", "0.04"] in rows
    assert ["books", "64", "9000", "12.1", "12.6", "+0.0405 (+0.01 to +0.07)", "worse"] in rows
    assert ["arc", "acc", "0.5", "0.49", "-0.01 (-0.03 to +0.01)", "no change is shown"] in rows
    assert ["response length", "tokens", "40", "55", "+15 (+9 to +21)", "higher"] in rows
    told = words(part(complete, "evaluation"))
    assert "With responses of equal length the accuracy would be 66.0% (60.0% to 72.0%)." in told
    assert "The rule that the longer response wins scores 61.0% (55.0% to 66.0%) on them." in told
    assert "Calibration error 0.05 (0.02 to 0.09)" in told
    assert "expected calibration error 0.06, of which a calibrated model would have 0.03 by chance" in told
    assert "Brier score 0.21" in told
    assert "KL(policy || reference) is 3.2 (2.9 to 3.5) nats per response (0.07 per token), from 400 responses" in told


def test_without_an_evaluation_the_command_is_named(tmp_path: Path):
    page = page_of(write_run(tmp_path / "mine", lines=SHORT))
    assert "`dpo-ray evaluate mine`" in part(page, "evaluation")
    assert "`dpo-ray evaluate mine`" in part(page, "examples")
    assert "Win rates" not in part(page, "evaluation")


def test_examples_stand_side_by_side_and_long_ones_are_folded(complete: str):
    examples = part(complete, "examples")
    first, second = examples.split("<h3>Example 2</h3>")
    assert "<h4>Before</h4>" in first
    assert "<h4>After, preferred</h4>" in first
    assert "preferred" not in second.lower()
    assert "Unfinished." in second
    assert first.count("<details>") == 1
    assert f"all {len(LONG)} characters" in first
    assert LONG in first


@pytest.mark.parametrize(("length", "is_folded"), [(LONG_TEXT, False), (LONG_TEXT + 1, True)])
def test_a_text_is_folded_when_it_is_long(length: int, is_folded: bool):
    assert ("<details>" in said("x" * length)) == is_folded
    assert "x" * length in said("x" * length)


def test_the_data_is_told_with_every_reason(complete: str):
    rows = cells(part(complete, "data"))
    assert "4300 rows gave 4240 pairs; 3900 for training, 300 held out." in words(part(complete, "data"))
    assert "A note on the data." in words(part(complete, "data"))
    assert rows[1:7] == [
        ["tie", "in the sources", "dropped", "50"],
        ["empty response", "in the sources", "dropped", "10"],
        ["over long", "training pairs, encoded", "dropped", "40"],
        ["prompt", "training pairs, encoded", "truncated", "3"],
        ["by fraction", "in the mixture", "left out", "11"],
        ["says the opposite of another pair", "in the sources", "kept", "7"],
    ]
    assert ["for training", "3900", "1200000", "400000", "800000", "280", "700", "1024", "62.0%"] in rows
    assert ["org/helpful-pairs", "4200", "4140", "300", "7", "60"] in rows


def test_what_is_dropped_from_held_out_sources_is_told(tmp_path: Path):
    held_out = {"path": "eval.jsonl", "rows": 9, "pairs": 5, "held_out": 5, "dropped": {"tie": 4}, "contradictions": 0}
    page = page_of(write_run(tmp_path / "a", lines=SHORT, data=DATA | {"eval_sources": [held_out]}))
    rows = cells(part(page, "data"))
    assert ["tie", "in the sources of held-out pairs", "dropped", "4"] in rows
    assert ["eval.jsonl", "9", "5", "5", "0", "4"] in rows


def test_speed_and_cost(complete: str):
    rows = cells(part(complete, "speed-and-cost"))
    for row in (
        ["pairs per second", "12.35"],
        ["tokens per second", "123457"],
        ["share of tokens that are padding", "12.5%"],
        ["share of the devices' peak (MFU)", "41.0%"],
        ["peak memory of a worker", "31.5 GiB"],
        ["worker hours (device hours on GPUs)", "2"],
        ["reference log-probs of responses", "8000 computed, 280 from the store"],
        ["restarts", "1"],
    ):
        assert row in rows, "1800 s on 4 workers are 2 hours"


def test_the_recipe_tells_first_what_differs(complete: str):
    found = part(complete, "recipe")
    assert ["loss.beta", "0.05", "0.1"] in cells(found)
    assert "data.chat" not in found.partition("<details>")[0]
    assert "chat: auto" in found.partition("<details>")[2]


def test_versions_and_fingerprints(complete: str):
    rows = cells(part(complete, "versions-and-fingerprints"))
    for row in (["torch", "9.8.7"], ["data fingerprint", "da7a"], ["model path", "s3://***@bucket/runs/hh/model"]):
        assert row in rows


def test_a_failed_run_has_a_report(tmp_path: Path):
    """It has no more than its status and what it had logged."""
    summary = {"status": "failed", "stop_reason": "a worker died", "mlflow_run_id": None, "versions": {}}
    page = page_of(write_run(tmp_path / "a", lines=SHORT, summary=summary))
    assert "Failed: a worker died." in words(part(page, "summary"))
    assert "No held-out pair was evaluated." in words(part(page, "summary"))
    assert "Not measured in this run." in part(page, "kl-against-reward")
    assert "Not measured in this run." in part(page, "reward-distributions")
    assert "Not measured in this run." in part(page, "speed-and-cost")
    assert re.findall(r'<section id="([^"]*)">', page) == list(SECTIONS)


@pytest.mark.parametrize("name", ["metrics.jsonl", "summary.json", "data_report.json", "recipe.yaml"])
def test_a_missing_file_is_named(tmp_path: Path, name: str):
    path = write_run(tmp_path / "hh")
    (path / name).unlink()
    with pytest.raises(InputError, match=f"no {name} in {path}"):
        write_report(str(path))
    assert not (path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("summary.json", "{", "summary.json is not JSON"),
        ("data_report.json", "[]", "data_report.json holds no object"),
        ("metrics.jsonl", "{\n", "metrics.jsonl is not JSONL"),
        ("recipe.yaml", "a: [", "recipe.yaml is not a recipe"),
        ("recipe.yaml", "a text", "recipe.yaml is not a recipe"),
    ],
)
def test_an_unreadable_file_is_named(tmp_path: Path, name: str, content: str, message: str):
    path = write_run(tmp_path / "hh")
    (path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        write_report(str(path))


# Its pictures


def test_the_curves_are_those_of_training_and_held_out():
    panels = named(curve_panels(LINES, 40))
    assert list(panels) == ["Loss", "Accuracies", "Rewards", "Log-probs", "KL to the reference", "Gradient norm"]
    loss = curves(panels["Loss"])
    assert loss["loss, training"] == (STEPS, [0.7 - step / 300 for step in STEPS])
    assert loss["loss, held out"] == ([20, 40, 60], [0.69 - step / 500 for step in (20, 40, 60)])
    assert len(curves(panels["Rewards"])) == 7, "three metrics, training and held out, and the best step"
    (band,) = drawn(panels["Accuracies"]).collections
    corners = {(x, round(float(y), 3)) for x, y in band.get_paths()[0].vertices}
    assert corners == {(20, 0.57), (20, 0.68), (40, 0.62), (40, 0.73), (60, 0.57), (60, 0.68)}


def test_the_best_step_is_marked_in_every_panel():
    for panel in curve_panels(LINES, 40):
        assert [40, 40] in [list(line.get_xdata()) for line in drawn(panel).lines], panel.title
        assert "Dotted: the best step, 40." in panel.caption
    for panel in curve_panels(LINES, None):
        assert [40, 40] not in [list(line.get_xdata()) for line in drawn(panel).lines]


def test_what_was_not_measured_has_no_panel():
    only_loss = [{"step": line["step"], "loss": line["loss"], "logps/chosen": -1.0} for line in LINES if "loss" in line]
    assert list(named(curve_panels(only_loss, None))) == ["Loss", "Log-probs"]
    assert curve_panels([], None) == []
    assert kl_panels(only_loss, None) == []


def test_kl_against_reward_has_a_point_for_each_evaluation():
    panels = named(kl_panels(LINES, 40))
    axes = drawn(panels["Accuracy against KL"])
    points = axes.lines[0].get_xydata()
    assert points == pytest.approx(np.array([[20 / 300, 0.63], [40 / 300, 0.68], [60 / 300, 0.63]]))
    assert [note.get_text() for note in axes.texts] == ["20", "40", "60"]
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert (star.get_xdata()[0], star.get_ydata()[0]) == (40 / 300, 0.68)
    margins = drawn(panels["Margin against KL"]).lines[0].get_ydata()
    assert list(margins) == [step / 60 - step / 200 for step in (20, 40, 60)]


def test_before_and_after_come_from_the_evaluation():
    rewards, margins = reward_panels_of(evaluation())
    after = evaluation()["held_out"]["rewards"]["after"]
    share = np.mean(np.array(after["chosen"]) > np.array(after["rejected"]))
    assert f"before: 50.0%, after: {share:.1%}" in margins.caption, "before, every margin is a tie"
    axes = drawn(rewards)
    lines = [line for line in axes.lines if line.get_label() in ("chosen, before", "rejected, before")]
    assert [list(line.get_xdata()) for line in lines] == [[0, 0], [0, 0]], "all are one value: a line, no bars"
    edges = {round(side, 6) for bar in axes.patches if isinstance(bar, Rectangle) for side in (bar.get_x(),)}
    inner = np.quantile(after["chosen"] + after["rejected"], 0.005)
    assert min(edges) == pytest.approx(inner, abs=1e-6), "the zeros before move no bin"
    bars = sum(patch.get_height() for patch in axes.patches if isinstance(patch, Rectangle))
    assert bars == 600, "no far reward is left out"


def test_a_run_alone_shows_its_first_and_its_best_margins(tmp_path: Path):
    margins = {20: [-1.0, 1.0], 40: [-1.0, 1.0, 2.0, 3.0], 60: [5.0, 5.0]}
    run = read_run(str(write_run(tmp_path / "a", margins=margins)))
    assert run.margins == {20: margins[20], 40: margins[40]}
    (panel,) = reward_panels(run)
    assert "step 20: 50.0%, step 40: 75.0%" in panel.caption
    run = read_run(str(write_run(tmp_path / "b", margins=margins, summary=SUMMARY | {"best_step": None})))
    assert list(run.margins) == [20, 60], "the last one, where none is best"


@pytest.mark.parametrize(
    "rewards", [None, {}, {"before": None, "after": None}, {"after": {"chosen": [], "rejected": []}}]
)
def test_an_evaluation_without_rewards_draws_none(rewards: Any):
    assert reward_panels_of({"held_out": {"rewards": rewards}}) == []


def test_the_rewards_of_the_reference_itself_are_zero():
    """An evaluation against the reference does not list them; of another model that was not scored nothing is known."""
    tree = evaluation()
    tree["held_out"]["rewards"]["before"] = None
    assert "before" not in reward_panels_of(tree)[1].caption
    tree["reference"] = tree["against"][0]["path"]
    assert "before: 50.0%" in reward_panels_of(tree)[1].caption


def test_a_step_that_a_resumed_run_repeats_counts_once_and_in_order():
    lines = [{"step": 1, "loss": 3.0}, {"step": 20, "loss": 9.0}, {"step": 10, "loss": None}, {"step": 10, "loss": 2.0}]
    assert list(series([*lines, {"step": 20, "loss": 1.0}], "loss").items()) == [(1, 3.0), (10, 2.0), (20, 1.0)]


# Several runs


def test_several_runs_are_laid_side_by_side(tmp_path: Path):
    write_run(tmp_path / "one", evaluated=evaluation())
    other = SUMMARY | {"best_eval": SUMMARY["eval"], "world_size": 2, "status": "completed"}
    write_run(tmp_path / "two", settings=recipe(name="two", loss={"kind": "dpo", "beta": 0.3}), summary=other)
    written = write_comparison([str(tmp_path / "one"), str(tmp_path / "two")])
    assert written == [f"{tmp_path}/comparison.html", f"{tmp_path}/comparison.png"]
    page = (tmp_path / "comparison.html").read_text()
    assert cells(part(page, "what-their-recipes-differ-in")) == [["key", "one", "two"], ["loss.beta", "0.05", "0.3"]]
    rows = cells(part(page, "held-out-metrics"))
    assert ["one", "best", "68.0% (62.0% to 73.0%)", "300", "0.61", "0.4667", "-62", "0.1333"] in rows
    assert ["two", "best", "63.0% (57.0% to 68.0%)", "300", "0.57", "0.7", "-63", "0.2"] in rows
    assert ["one", "win rate against base", "61.3% (54.0% to 68.0%)", "judge function:demo"] in cells(page)
    assert ["worker hours (device hours on GPUs)", "2", "1"] in cells(part(page, "speed-and-cost"))
    assert part(page, "curves").count("<img ") == 6
    assert "All have the same data." in page


def test_runs_of_one_name_are_told_apart_and_other_data_is_said(tmp_path: Path):
    write_run(tmp_path / "a" / "hh", lines=[], settings=recipe())
    write_run(tmp_path / "b" / "hh", lines=[], settings=recipe(), summary=SUMMARY | {"data_fingerprint": "0"})
    folders = [str(tmp_path / "a" / "hh"), str(tmp_path / "b" / "hh")]
    assert write_comparison(folders, str(tmp_path / "out")) == [f"{tmp_path}/out/comparison.html"]
    page = (tmp_path / "out" / "comparison.html").read_text()
    assert ["run", "status", "steps", "best step", "pairs seen"] in cells(page)
    assert [row[0] for row in cells(part(page, "runs"))[1:]] == ["a/hh", "b/hh"]
    assert "Their data is not the same" in page
    assert "Nothing but their names." in page
    assert "None of them was evaluated." in page


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["runs/a", "runs/a/"], "runs/a is named twice"),
        (["s3://one/a", "s3://two/b"], "name one with --output"),
        (["s3://one/a", "/two/b"], "name one with --output"),
    ],
)
def test_what_cannot_be_compared_is_refused(folders: list[str], message: str):
    with pytest.raises(InputError, match=message):
        write_comparison(folders)


def test_the_command_takes_one_run_or_several(tmp_path: Path):
    paths = [str(write_run(tmp_path / name, lines=SHORT)) for name in ("one", "two")]
    done = CliRunner().invoke(app, ["report", paths[0]])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "one" / "report.html").exists()
    done = CliRunner().invoke(app, ["report", *paths, "--output", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "comparison.html").exists()
    done = CliRunner().invoke(app, ["report", paths[0], "--output", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "--output is for several runs" in done.stderr


# The parts of a page


def test_a_heading_that_comes_twice_has_two_anchors():
    page = document("a", section("Data", "x") + section("Data", "y") + section("<b> & more", "z")).decode()
    assert re.findall(r'<section id="([^"]*)">', page) == ["data", "data-again", "b-more"]
    assert '<a href="#b-more">&lt;b&gt; &amp; more</a>' in page


def test_a_table_escapes_and_scrolls_in_its_own_box():
    assert table(["<a>"], [["<b>"]]).startswith('<div class="wide"><table>')
    assert cells(table(["<a>"], [["<b>"]])) == [["<a>"], ["<b>"]]
    assert table([], []) == "<p>None.</p>"


@pytest.mark.parametrize(
    ("value", "shown"), [(0.123456, "0.1235"), (9999.4, "9999"), (123456.7, "123457"), (1e-7, "1e-07"), (None, "-")]
)
def test_numbers_are_for_readers(value: Any, shown: str):
    assert text(value) == shown


def test_the_evaluation_of_a_page_of_its_own(tmp_path: Path):
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation()))
    written = write_evaluation_report(str(tmp_path))
    assert written == [f"{tmp_path}/evaluation.html", f"{tmp_path}/evaluation.png"]
    page = (tmp_path / "evaluation.html").read_text()
    heads = re.findall(r"<h2>(.*?)</h2>", page)
    assert heads[:4] == ["Summary", "Win rates", "Ranking", "Held-out pairs"]
    assert heads[-3:] == ["Reward distributions", "Examples", "Versions and fingerprints"]
    assert ["model fingerprint", "f00d"] in cells(page)
    assert "secret" not in page


def test_an_evaluation_with_next_to_nothing(tmp_path: Path):
    parts = {name: None for name in evaluation() if name not in ("model", "held_out")}
    (tmp_path / "evaluation.json").write_text(json.dumps({"model": "m", "held_out": {"rewards": None}, **parts}))
    assert write_evaluation_report(str(tmp_path)) == [f"{tmp_path}/evaluation.html"]
    (tmp_path / "evaluation.json").write_text("{}")
    write_evaluation_report(str(tmp_path))
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json is not JSON"):
        write_evaluation_report(str(tmp_path))
    (tmp_path / "evaluation.json").unlink()
    with pytest.raises(InputError, match=r"no evaluation\.json in .*: `dpo-ray evaluate` writes it"):
        write_evaluation_report(str(tmp_path))
