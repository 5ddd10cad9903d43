"""Evaluation without a cluster: which recipe, which prompts, held-out trees, rankings, imported annotations, judges."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from dpo_ray import evaluation
from dpo_ray.acquisition.pool import OpenPrompt
from dpo_ray.cli import app
from dpo_ray.config import parse_run, split_recipe
from dpo_ray.errors import InputError
from dpo_ray.evaluate import generations
from dpo_ray.evaluate.generations import Writer, read_prompts
from dpo_ray.evaluate.held_out import HeldOut, held_out_tree
from dpo_ray.evaluate.judging import Verdict
from dpo_ray.evaluation import Played, flat_numbers, folder_of, recipe_for
from dpo_ray.generate import Generated, Responses, Sampling
from dpo_ray.models import ModelSource
from dpo_ray.pairs import Candidate, PreferencePair, TokenizedPair
from dpo_ray.storage import Folder


def recipe(**evaluate: Any) -> Any:
    return parse_run(
        {"name": "x", "model": {"path": "m"}, "data": {"sources": [{"path": "p.jsonl"}]}, "evaluate": evaluate}
    )


def pairs(count: int) -> list[PreferencePair]:
    return [PreferencePair(f"Question {i}?", "yes", "no", source="f", row=i) for i in range(count)]


def test_a_word_without_an_equals_sign_is_the_recipe():
    assert split_recipe(["r.yaml", "a=1"]) == (Path("r.yaml"), ["a=1"])
    assert split_recipe(["a=1", "b=2"]) == (None, ["a=1", "b=2"])
    assert split_recipe([]) == (None, [])


def test_fewer_prompts_are_among_the_more_and_each_comes_once():
    held_out = [*pairs(50), *pairs(50)]
    few, more = (read_prompts(recipe(num_prompts=n), held_out) for n in (10, 30))
    assert len({prompt.prompt_id for prompt in more}) == len(more) == 30
    assert few == more[:10]
    assert read_prompts(recipe(num_prompts=10), list(reversed(held_out))) == few
    assert read_prompts(recipe(num_prompts=10, seed=1), held_out) != few
    assert read_prompts(recipe(num_prompts=0), held_out) == []


def test_prompts_come_from_pairs_and_from_bare_prompts(tmp_path: Path):
    rows = [
        {"prompt": "Alone?"},
        {"chosen": "Say it: yes", "rejected": "Say it: no"},
        {"instruction": "Do", "output": "d"},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_prompts(recipe(prompts=[{"path": str(tmp_path / "mixed.jsonl")}]), pairs(5))
    assert {prompt.prompt for prompt in found} == {"Alone?", "Say it:", "Do"}
    (tmp_path / "bad.jsonl").write_text('{"text": "no prompt"}\n')
    with pytest.raises(InputError, match=r"bad\.jsonl:1: "):
        read_prompts(recipe(prompts=[{"path": str(tmp_path / "bad.jsonl")}]), [])


def test_models_draw_with_seeds_of_their_own(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    seeds = []

    def remember(prompts: Any, policy: Any, run: Any, how: Any, *rest: Any) -> list[Responses]:
        seeds.append(how[2])
        return [Responses([Generated(np.array([5, 1], np.int32), -1.0, True)]) for _ in prompts]

    monkeypatch.setattr(generations, "stored_responses", remember)
    source = ModelSource(str(tiny_model))
    for seed in (0, 1):
        writer = Writer(recipe(seed=seed), 0.0, lambda text, done, total: None)
        for place in (0, 1, 2):
            ((answer,),) = writer.write(source, [OpenPrompt("Why?", None, False, "f", 1)], Sampling(4), 1, place)
            assert answer.is_finished
    assert len(set(seeds)) == 6


def tokenized(lengths: list[tuple[int, int]]) -> list[TokenizedPair]:
    return [TokenizedPair(str(i), np.arange(2), np.arange(c), np.arange(r)) for i, (c, r) in enumerate(lengths)]


def test_the_held_out_tree_by_hand():
    """Four pairs, one wrong and one tied; two sources."""
    chosen, rejected = np.array([1.0, 2.0, 0.0, 0.5]), np.array([0.0, 0.5, 1.0, 0.5])
    table = tokenized([(5, 3), (4, 4), (3, 9), (8, 2)])
    tree = held_out_tree(
        HeldOut({"loss": 1.0}, chosen, rejected), None, table, {"0": "a", "1": "a", "2": "b", "3": "b"}
    )
    assert tree["longer_is_better"]["value"] == (1 + 0.5 + 0 + 1) / 4
    first, second = tree["by_source"]
    assert (first["source"], first["rewards/accuracies"], first["rewards/margins"]) == ("a", 1.0, 1.25)
    assert (second["source"], second["rewards/accuracies"], second["rewards/margins"]) == ("b", 0.25, -0.5)
    assert [(group["tokens"], group["num_pairs"]) for group in tree["by_length"]] == [("8-8", 2), ("10-12", 2)]
    assert tree["rewards"] == {"before": None, "after": {"chosen": chosen.tolist(), "rejected": rejected.tolist()}}
    assert "calibration" not in tree  # four pairs draw no curve


def test_a_loss_without_rewards_has_metrics_only():
    tree = held_out_tree(HeldOut({"loss": 1.0}, None, None), None, tokenized([(1, 1)]), {"0": "a"})
    assert tree == {"num_pairs": 1, "metrics": {"loss": 1.0}}


def test_where_results_go(tmp_path: Path):
    run = recipe()
    (tmp_path / "recipe.yaml").write_text("")
    assert folder_of(str(tmp_path), None, run).path == f"{tmp_path}/evaluation"
    assert folder_of("org/model", None, run).path.endswith("runs/x/evaluation")
    assert folder_of(str(tmp_path), "elsewhere", run).path.endswith("elsewhere")


def test_which_recipe(tmp_path: Path):
    with pytest.raises(InputError, match="name a RECIPE"):
        recipe_for("org/model", None, {}, None, None)
    with pytest.raises(InputError, match="--reference"):
        recipe_for("org/model", None, {}, "pairs.jsonl", None)
    found = recipe_for("org/model", None, {"loss.beta": 0.3}, "pairs.jsonl", "org/base")
    assert (found.model.path, found.reference.path, found.loss.model_dump()["beta"]) == ("org/model", "org/base", 0.3)
    tree = {"name": "r", "model": {"path": "org/base"}, "data": {"sources": [{"path": "own.jsonl"}]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    found = recipe_for(str(tmp_path), None, {}, "pairs.jsonl", None)
    assert (found.name, found.data.sources[0].path, found.data.eval.num_pairs) == ("r", "pairs.jsonl", 0)


def test_a_ranking_puts_the_winner_first():
    def played(score: float) -> Played:
        candidates = [Candidate(f"{i}", "a", "b") for i in range(20)]
        return Played([Verdict(score, (), "j", None, {}) for _ in candidates], candidates)

    ranking = evaluation._ranking(
        ["a", "b", "c"], {("a", "b"): played(0), ("a", "c"): played(0.5), ("b", "c"): played(1)}
    )
    assert ranking[0]["model"] == "b"
    assert ranking[0]["low"] > ranking[1]["high"]
    assert sum(row["rating"] for row in ranking) == pytest.approx(0, abs=1e-9)


@pytest.fixture
def evaluated(tmp_path: Path) -> Path:
    tree = {
        "model": "runs/mine",
        "folder": str(tmp_path),
        "win_rate": [
            {"against": "base", "judge": "function:f", "value": 0.5, "low": 0.4, "high": 0.6, "num_prompts": 9}
            | {"wins": 4, "ties": 1, "losses": 4, "missing": 0, "length_controlled": None}
        ],
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(tree))
    return tmp_path


def annotations(path: Path, model: str, wins: int) -> str:
    rows = [
        {"instruction": str(i), "output_1": "a", "generator_1": "gpt", "output_2": "bb", "generator_2": model}
        | {"preference": 2 if i < wins else 1}
        for i in range(12)
    ]
    path.write_text(json.dumps(rows))
    return str(path)


def test_annotations_take_the_place_of_those_of_the_same_file(evaluated: Path, tmp_path: Path):
    file = annotations(tmp_path / "a.json", "mine", 9)
    evaluation.import_annotations(Folder(str(evaluated)), file)
    annotations(tmp_path / "a.json", "mine", 6)
    tree = evaluation.import_annotations(Folder(str(evaluated)), file)
    assert [(row["against"], row["value"]) for row in tree["win_rate"]] == [("base", 0.5), ("gpt", 0.5)]
    assert (evaluated / "evaluation.html").exists()


def test_annotations_of_another_model_are_refused(evaluated: Path, tmp_path: Path):
    file = annotations(tmp_path / "a.json", "theirs", 9)
    with pytest.raises(InputError, match="--as names"):
        evaluation.import_annotations(Folder(str(evaluated)), file)
    tree = evaluation.import_annotations(Folder(str(evaluated)), file, "theirs")
    assert tree["win_rate"][1]["wins"] == 9
    with pytest.raises(InputError, match="comes first"):
        evaluation.import_annotations(Folder(str(tmp_path / "none")), file)


def test_numbers_for_mlflow_have_names_that_it_takes():
    tree = {
        "held_out": {"metrics": {"loss": 1.0}},
        "win_rate": [{"against": "org/base:1", "value": 0.6, "low": 0.5, "high": 0.7, "length_controlled": None}],
        "kl": {"value": 3.0, "low": 2.0, "high": 4.0},
    }
    assert flat_numbers(tree) == {
        "evaluate/loss": 1.0,
        "evaluate/win_rate/org/base_1": 0.6,
        "evaluate/win_rate/org/base_1_low": 0.5,
        "evaluate/win_rate/org/base_1_high": 0.7,
        "evaluate/kl": 3.0,
        "evaluate/kl_low": 2.0,
        "evaluate/kl_high": 4.0,
    }


@pytest.mark.parametrize("name", ["mt_bench/human_majority", "pandalm/annotations"])
def test_a_judge_by_length_against_people(name: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`dpo-ray judge`: preferring the longer answer agrees with people as often as people prefer the longer one."""
    (tmp_path / "judge_by_length.py").write_text("def longer(prompt, response):\n    return len(response)\n")
    monkeypatch.chdir(tmp_path)
    tree = {
        "name": "j",
        "model": {"path": "none"},
        "data": {"sources": [{"path": str(shared / f"data/{name}.jsonl.gz")}], "on_bad_row": "drop"},
        "evaluate": {"judge": {"kind": "function", "function": "judge_by_length:longer"}},
    }
    (tmp_path / "j.yaml").write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["judge", "j.yaml", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "runs/j/judge.json").read_text())
    assert found["num_pairs"] > 150
    assert found["longer_is_better"]["judge"]["value"] == 1.0
    assert found["agreement"]["value"] == pytest.approx(found["longer_is_better"]["people"]["value"], abs=1e-9)
    assert 0.4 < found["agreement"]["value"] < 0.8
    assert found["kappa"] < 0.6


def test_a_recipe_without_a_judge_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    tree = {"name": "j", "model": {"path": "none"}, "data": {"sources": [{"path": "p.jsonl"}]}}
    (tmp_path / "j.yaml").write_text(yaml.safe_dump(tree))
    done = CliRunner().invoke(app, ["judge", "j.yaml"])
    assert done.exit_code == 2
    assert "evaluate.judge" in done.output
