"""The page and the picture of a study say what was planted in it, and nothing that it does not hold."""

import base64
import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

from dpo_ray.errors import InputError
from dpo_ray.study import read_study
from dpo_ray.study_findings import findings
from dpo_ray.study_panels import study_figure
from dpo_ray.study_report import _duration, write_study_report
from tests.unit.studies import ACCURACIES, KL, MARGINS, planted, sized, study, trial

PNG = b"\x89PNG\r\n\x1a\n"
BETA_AND_SIZE = {128: 0.60, 256: 0.66, 512: 0.70}


def page_of(path: Path, tree: dict[str, Any], recipe: str | None = None) -> str:
    path.mkdir(exist_ok=True)
    (path / "study.json").write_text(json.dumps(tree))
    if recipe is not None:
        (path / "best.yaml").write_text(recipe)
    assert write_study_report(str(path)) == [f"{path}/report.html", f"{path}/report.png"]
    return (path / "report.html").read_text()


def cells(page: str) -> list[list[str]]:
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    return [[html.unescape(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in rows]


def said(page: str) -> list[str]:
    found = re.findall(r"<p>(.*?)</p>", page, flags=re.S)
    return [html.unescape(re.sub(r"<.*?>", "", one)) for one in found]


def panels(tree: dict[str, Any]) -> dict[str, Axes]:
    figure = study_figure(findings(read_study(tree)))
    return {axes.get_title(): axes for axes in figure.axes if axes.get_title()}


def labels(axes: Axes) -> list[str]:
    legend = axes.get_legend()
    return [] if legend is None else [entry.get_text() for entry in legend.get_texts()]


def test_the_planted_winner_its_interval_and_the_verdicts_are_on_the_page(tmp_path: Path):
    page = page_of(tmp_path / "s", study(planted()), "name: best\nloss: {beta: 0.1}\n")
    picture = (tmp_path / "s" / "report.png").read_bytes()
    assert picture.startswith(PNG)
    (embedded,) = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert base64.b64decode(embedded) == picture
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "the page needs another file"

    rows, texts = cells(page), said(page)
    heads = ["rank", "loss.beta", ACCURACIES, "interval over", "less the best", "adjusted p", "verdict"]
    assert rows[0] == heads
    winner, close, worse = rows[1:4]
    assert winner[:2] == ["1", "0.1"]
    assert winner[2].startswith("0.7")
    assert winner[3:] == ["5 seeds", "-", "-", "best"]
    assert (close[1], close[-1]) == ("0.03", "not distinguishable")
    assert (worse[1], worse[-1]) == ("1", "worse")
    assert re.fullmatch(r"-0\.1 \(-0\.\d+ to -0\.\d+\)", worse[4])
    assert float(worse[5]) < 0.05 < float(close[5])
    assert texts[0] == "Which beta?"
    assert texts[1] == "Completed: 15 trials of 3 configurations, in 1 h 2 min."
    assert re.match(r"Best of the search: beta=0\.1, rewards/accuracies 0\.7\w* \(.* to .*; 5 seeds\)", texts[2])
    assert texts[2].endswith("Of 2 others: 1 worse, 1 not distinguishable.")
    assert "no confirmation was run" in texts[3]
    assert "<h2>Best recipe</h2>\n<pre>name: best\nloss: {beta: 0.1}\n</pre>" in page
    assert ["reference pass", "1200 responses computed, 300 from the store"] in rows
    assert "Confirmation" not in page
    assert "Pareto" not in page


def test_a_trial_has_its_row_with_state_steps_and_error(tmp_path: Path):
    trials = [
        trial(0, {"loss.beta": 0.1}, 0.7),
        trial(1, {"loss.beta": 0.1}, 0.65, seed=1, status="stopped_by_scheduler", steps=40, stop_reason="ASHA, rung 1"),
        trial(2, {"loss.beta": 0.2}, None, steps=5, attempts=3),
    ]
    page = page_of(tmp_path / "s", study(trials))
    rows = cells(page)
    assert ["t000", "beta=0.1", "0", "completed", "100 of 100", "0.7", "60", "50", ""] in rows
    stopped = ["t001", "beta=0.1", "1", "stopped by scheduler", "40 of 100", "0.65", "60", "50", "ASHA, rung 1"]
    assert stopped in rows
    remarks = "3 attempts; OutOfMemoryError: no memory"
    assert ["t002", "beta=0.2", "0", "failed", "5 of 100", "-", "-", "50", remarks] in rows
    assert "Completed: 3 trials of 2 configurations, 1 failed, in 1 h 2 min." in said(page)
    assert "1 trial stopped by the scheduler: such values come from less training than others." in said(page)
    for row in (
        ["full grid", "300 steps"],
        ["made", "145 steps (48%)"],
        ["saved by the scheduler", "60 steps (20%)"],
        ["not made: failed or cut off", "95 steps (32%)"],
    ):
        assert row in rows
    assert "<h2>Best settings</h2>\n<pre>loss.beta: 0.1\n</pre>" in page


def test_one_trial_is_a_study(tmp_path: Path):
    page = page_of(tmp_path / "s", study([trial(0, {}, 0.7)]))
    assert "There is no other configuration to compare it with." in said(page)[2]
    assert "the recipe as it is" in page
    assert "<h2>Data size</h2>" not in page


@pytest.mark.parametrize("trials", [[], [trial(0, {"loss.beta": 0.1}, None), trial(1, {"loss.beta": 0.2}, None)]])
def test_a_study_without_a_result_says_so(tmp_path: Path, trials: list[dict[str, Any]]):
    page = page_of(tmp_path / "s", study(trials, status="interrupted"))
    assert "No trial finished with a value, so nothing can be ranked." in said(page)
    assert (tmp_path / "s" / "report.png").read_bytes().startswith(PNG)
    assert "<h2>Configurations</h2>" not in page


def test_an_interrupted_study_says_so_and_ranks_what_finished(tmp_path: Path):
    trials = [*planted(), trial(90, {"loss.beta": 5.0}, 0.99, status="interrupted", steps=20)]
    page = page_of(tmp_path / "s", study(trials, status="interrupted", stop_reason="Ctrl-C"))
    assert said(page)[1].startswith("Interrupted (Ctrl-C): 16 trials of 4 configurations, in 1 h 2 min.")
    assert said(page)[1].endswith("What follows is of the trials that finished.")
    assert cells(page)[1][1] == "0.1"
    assert ["not made: failed or cut off", "80 steps (5%)"] in cells(page)


def test_hostile_names_are_text_in_page_and_picture(tmp_path: Path):
    bad = "<script>alert(1)</script> $\\frac{$ _x\n"
    trials = [
        trial(i, {"data.sources": f"{bad}{i}"}, 0.6 + i / 10, labels={"data.sources": f"{bad}{i}"}, error=bad)
        for i in range(3)
    ]
    tree = study(trials, name=bad, question=bad, stop_reason=bad)
    page = page_of(tmp_path / "s", tree, recipe=bad)
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)") > 10
    assert "mixtures" in panels(tree)


def test_three_sizes_are_refused_in_words_and_tested_all_the_same(tmp_path: Path):
    page = page_of(tmp_path / "s", study(sized({100: 0.60, 200: 0.70, 400: 0.65}, 6, noise=0.002)))
    assert "A learning curve needs at least 4 sizes, got 3." in said(page)
    steps = [row for row in cells(page) if len(row) == 3 and " to " in row[0]]
    assert [(row[0], row[2]) for row in steps] == [("100 to 200", "rise"), ("200 to 400", "dip")]
    assert "Less is more: 200 pairs are not worse than all 400 by one point." in said(page)


def test_six_sizes_have_curve_forecast_and_plateau(tmp_path: Path):
    sizes = {128: 0.60, 256: 0.65, 512: 0.69, 1024: 0.715, 2048: 0.72, 4096: 0.721}
    tree = study(sized(sizes, 4))
    texts = said(page_of(tmp_path / "s", tree))
    assert "Plateau from 1024 pairs on: all larger sizes are within two points." in texts
    assert any(re.match(r"Curve: \w+, c .* with c = ", text) for text in texts)
    (forecast,) = [text for text in texts if text.startswith("Forecast: ")]
    assert forecast == "Forecast: doubling 4096 pairs changes the metric by +0 (+0 to +0)."
    assert any(re.match(r"One point more \(0\.729\d*\): not reached within 8192 pairs", text) for text in texts)
    axes = panels(tree)["data size"]
    assert "forecast, to twice the largest size" in labels(axes)
    assert max(max(line.get_xdata(), default=0) for line in axes.lines) == pytest.approx(8192, rel=0.05)
    assert axes.get_xscale() == "log"


def test_one_seed_per_size_is_untestable_in_words(tmp_path: Path):
    texts = said(page_of(tmp_path / "s", study(sized({100: 0.6, 200: 0.7, 400: 0.7}, 1))))
    assert "Dips and plateaus are untestable with one seed per size." in texts
    assert "Less is more: untestable." in texts
    assert any(text.startswith("Untestable: neither 3 common seeds nor the margins") for text in texts)


def test_held_out_pairs_stand_in_for_seeds_and_the_page_says_what_that_means(tmp_path: Path):
    trials = [
        trial(i, {"loss.beta": i}, share, margins={f"p{j}": 1.0 if j < 100 * share else -1.0 for j in range(100)})
        for i, share in enumerate((0.9, 0.5))
    ]
    page = page_of(tmp_path / "s", study(trials))
    assert cells(page)[2][-1] == "worse (over 100 pairs)"
    assert cells(page)[1][3] == "1 seed, its pairs"
    assert any("not whether another seed would" in text for text in said(page))
    assert "Untestable:" not in page


def test_the_confirmation_is_shown_apart_and_names_who_leads_there(tmp_path: Path):
    fresh = [
        trial(50 + 10 * i + s, {"loss.beta": beta}, value + s / 1000, seed=70 + s, confirms="t005")
        for i, (beta, value) in enumerate(((0.1, 0.65), (0.03, 0.68)))
        for s in range(3)
    ]
    fresh[0]["best"][ACCURACIES] += 0.0005
    tree = study(planted() + fresh)
    page = page_of(tmp_path / "s", tree)
    texts, rows = said(page), cells(page)
    assert any(re.match(r"Confirmed on fresh seeds: beta=0\.1, 0\.6512 \(.*; 3 seeds\)\.", text) for text in texts)
    assert any(text.endswith("On fresh seeds beta=0.03 has the best mean.") for text in texts)
    assert [row[-1] for row in rows if row[0] in ("beta=0.03", "beta=0.1")] == ["better", "the one compared with"]
    assert rows[1][2].startswith("0.7 ("), "the search's own value moved"
    assert ["confirmation, on top", "600 steps"] in rows
    assert labels(panels(tree)["confirmation"]) == ["search, which chose them", "confirmation, fresh seeds"]


def test_several_objectives_have_a_front(tmp_path: Path):
    trials = [trial(i, {"loss.beta": b}, v) for i, (b, v) in enumerate(((0.1, 0.7), (0.2, 0.65), (0.3, 0.6)))]
    for one, kl in zip(trials, (0.5, 0.1, 0.2), strict=True):
        one["best"][KL] = kl
    tree = study(trials, objectives=[{"metric": ACCURACIES, "mode": "max"}, {"metric": KL, "mode": "min"}])
    page = page_of(tmp_path / "s", tree)
    after = cells(page[page.index("<h2>Pareto front</h2>") : page.index("<h2>Compute</h2>")])
    assert [row[0] for row in after] == ["configuration", "beta=0.1", "beta=0.2"]
    axes = panels(tree)["Pareto front of the objectives"]
    front = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    assert front["Pareto front"] == [(0.65, 0.1), (0.7, 0.5)]


def test_a_panel_is_there_only_with_its_data():
    assert set(panels(study([trial(0, {}, 0.7)]))) == {
        f"training: {ACCURACIES}",
        f"held out: {ACCURACIES}",
        "compute: 100% of the full grid's steps",
    }
    both = [
        {**one, "number": 100 * i + one["number"]}
        for i, beta in enumerate((0.1, 1.0))
        for one in sized(BETA_AND_SIZE, 2, **{"loss.beta": beta})
    ]
    drawn = panels(study(both))
    assert {"loss.beta (star: best)", "data size", ACCURACIES, "reward against KL"} <= set(drawn)
    assert "data.fraction (star: best)" not in drawn
    assert labels(drawn["loss.beta (star: best)"]) == ["fraction=1", "fraction=0.5", "fraction=0.25"]
    assert drawn["loss.beta (star: best)"].get_xscale() == "log"
    cells_ = drawn[ACCURACIES].images[0].get_array()
    assert cells_.shape == (2, 3)
    assert [text.get_text() for text in drawn[ACCURACIES].texts][2] == f"{cells_[0, 2]:.3g}"


def test_values_within_a_decade_have_a_linear_axis():
    trials = [trial(i, {"loss.beta": beta}, 0.7) for i, beta in enumerate((0.1, 0.2, 0.5))]
    assert panels(study(trials))["loss.beta (star: best)"].get_xscale() == "linear"


def test_the_star_is_on_the_best_and_intervals_on_every_point():
    axes = panels(study(planted()))["loss.beta (star: best)"]
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    assert list(star.get_xdata()) == [0.1]
    assert list(star.get_ydata()) == pytest.approx([0.7])
    (bars,) = axes.containers
    low, high = bars.lines[2][0].get_segments()[1][:, 1]
    assert low < 0.7 < high
    assert (low + high) / 2 == pytest.approx(0.7)


def test_a_random_search_has_no_lines_between_its_points():
    points = [(0.01 * 1.7**i, 1e-6 * (1 + i)) for i in range(8)]
    trials = [trial(i, {"loss.beta": b, "optim.lr": lr}, 0.6 + i / 100) for i, (b, lr) in enumerate(points)]
    drawn = panels(study(trials))
    assert {"loss.beta (star: best)", "optim.lr (star: best)"} <= set(drawn)
    assert ACCURACIES not in drawn, "one value per row and column is no heat map"
    assert labels(drawn["loss.beta (star: best)"]) == []


def test_every_trial_ends_in_the_mark_of_its_state():
    trials = [
        trial(0, {"loss.beta": 0.1}, 0.7),
        trial(1, {"loss.beta": 0.2}, 0.65, status="stopped_early", steps=80),
        trial(2, {"loss.beta": 0.3}, 0.6, status="stopped_by_scheduler", steps=40),
    ]
    for one in trials:
        one["evaluations"] = [line for line in one["evaluations"] if line["step"] <= one["steps"]]
    axes = panels(study(trials))[f"held out: {ACCURACIES}"]
    marks = {line.get_marker(): list(line.get_xdata()) for line in axes.lines if line.get_marker() != "None"}
    assert marks == {"o": [100], "s": [80], "X": [40]}
    assert {"ran to its end", "stopped early", "stopped by the scheduler", "beta=0.1"} <= set(labels(axes))


def test_margins_are_drawn_against_kl_unless_beta_scales_them():
    trials = [trial(i, {"optim.lr": 1e-6 * (i + 1)}, 0.6 + i / 10) for i in range(3)]
    for one, (kl, margin) in zip(trials, ((0.1, 1.0), (0.2, 3.0), (0.3, 2.0)), strict=True):
        one["best"] |= {KL: kl, MARGINS: margin}
    axes = panels(study(trials))["reward against KL"]
    assert axes.get_ylabel() == f"held-out {MARGINS}"
    (frontier,) = [line for line in axes.lines if line.get_label() == "frontier"]
    assert list(zip(*frontier.get_data(), strict=True)) == [(0.1, 1.0), (0.2, 3.0)]
    scaled = panels(study([one | {"settings": {"loss.beta": one["number"] + 1}} for one in trials]))
    assert scaled["reward against KL"].get_ylabel() == f"held-out {ACCURACIES}"
    for one in trials:
        one["best"][KL] = None
    assert "reward against KL" not in panels(study(trials))


def test_mixtures_are_rows_named_by_their_labels():
    settings = [("all", [1, 1]), ("only helpful", [1, 0]), ("only harmless", [0, 1])]
    trials = [
        trial(3 * i + s, {"data.sources": w}, 0.7 - i / 20 + s / 200, seed=s, labels={"data.sources": name})
        for i, (name, w) in enumerate(settings)
        for s in range(3)
    ]
    axes = panels(study(trials))["mixtures"]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["all", "only helpful", "only harmless"]
    (bars,) = axes.containers
    assert list(bars.lines[0].get_xdata()) == pytest.approx([0.705, 0.655, 0.605])


def test_values_that_are_not_finite_break_nothing(tmp_path: Path):
    trials = planted()
    for line in (*trials[0]["evaluations"], trials[0]["best"], *trials[0]["train"]):
        line |= {ACCURACIES: math.nan, KL: math.inf, MARGINS: None}
    assert "not distinguishable" in page_of(tmp_path / "s", study(trials))


def test_a_missing_or_broken_file_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"no study\.json in .*: not the folder of a study"):
        write_study_report(str(tmp_path))
    for content, message in (("{", r"study\.json is not JSON"), ("{}", r"study\.json: `name`")):
        (tmp_path / "study.json").write_text(content)
        with pytest.raises(InputError, match=message):
            write_study_report(str(tmp_path))
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (7200, "2 h"), (90061, "1 d 1 h")]
)
def test_durations_have_two_units(seconds: float, shown: str):
    assert _duration(seconds) == shown
