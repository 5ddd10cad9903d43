"""What an acquisition refuses before it starts, and what it would do; no Ray."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.acquire import _check_same, acquire, check, plan
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError
from dpo_ray.prepare import resolve
from dpo_ray.storage import Folder


def recipe(folder: Path, model: Path, changes: dict[str, Any] | None = None) -> RunConfig:
    rows = [{"prompt": f"p{i} ", "chosen": "good", "rejected": "bad"} for i in range(40)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tree = {
        "name": "active",
        "storage": {"path": str(folder)},
        "model": {"path": str(model)},
        "data": {"sources": [{"path": str(folder / "pairs.jsonl")}], "eval": {"num_pairs": 8}, "max_tokens": 64},
        "tracking": {"kind": "none"},
        "acquire": {"labels_per_round": 6, "budget": 20},
    }
    return resolve(parse_run(tree, changes or {}))


WRONG: list[tuple[dict[str, Any], list[str], str]] = [
    ({"acquire": None}, [], "no `acquire` section"),
    ({}, ["certanty"], "`acquire.strategy`: no strategy `certanty`"),
    ({"acquire.options": {"betta": 1}}, [], "`acquire.options`: strategy `certainty` has no option `betta`"),
    ({"loss": {"kind": "simpo"}}, [], "`loss.kind`: simpo has no reference"),
    ({"acquire.pool": {"kind": "prompts", "pairing": "best_vs_worst"}}, [], "`acquire.pool.pairing`"),
    ({"tracking.register_as": "best"}, ["random", "certainty"], "`tracking.register_as`: a comparison"),
    ({"early_stopping.metric": "accuracy"}, [], "accuracy"),
]


@pytest.mark.parametrize(("changes", "strategies", "message"), WRONG)
def test_what_cannot_be_is_refused_before_anything_is_read(
    tmp_path: Path, tiny_model: Path, changes: dict[str, Any], strategies: list[str], message: str
):
    run = recipe(tmp_path, tiny_model, changes)
    with pytest.raises(InputError) as caught:
        acquire(run, strategies=strategies, connect=lambda: pytest.fail("it joined a cluster"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "active").exists() or not list((tmp_path / "active").iterdir())


def test_random_needs_no_reference(tmp_path: Path, tiny_model: Path):
    check(recipe(tmp_path, tiny_model, {"loss": {"kind": "simpo"}}), ["random", "oracle_gap", "bald"])


def test_a_plan_says_what_it_would_cost(tmp_path: Path, tiny_model: Path):
    found = plan(recipe(tmp_path, tiny_model), ["random", "certainty", "random"], 3)
    assert (found["rounds"], found["labels"], found["arms"]) == (4, 20, 6)
    assert found["pool"]["candidates"] == 32
    assert found["pool"]["held_out"] == 8
    assert found["strategies"]["random"] == "none"
    assert found["trainings"] == "at most 24; equal ones are shared"


def test_an_acquisition_is_continued_only_as_what_it_was(tmp_path: Path, tiny_model: Path):
    run = recipe(tmp_path, tiny_model)
    folder = Folder(run.folder)
    folder.write("recipe.yaml", yaml.safe_dump(run.model_dump(mode="json")).encode())
    with pytest.raises(InputError, match="exists; continue it with --resume"):
        _check_same(folder, run, resume=False)
    _check_same(folder, run, resume=True)
    for changes in ({"acquire.budget": 99}, {"acquire.strategy": "random"}, {"cluster.num_workers": 4}):
        _check_same(folder, recipe(tmp_path, tiny_model, changes), resume=True)
    for changes, key in (
        ({"loss.beta": 0.5}, "loss"),
        ({"acquire.labels_per_round": 7}, "acquire.labels_per_round"),
        ({"acquire.oracle": {"kind": "people"}}, "acquire.oracle"),
    ):
        with pytest.raises(InputError, match=f"cannot resume: `{key}`"):
            _check_same(folder, recipe(tmp_path, tiny_model, changes), resume=True)
