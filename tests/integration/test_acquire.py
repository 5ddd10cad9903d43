"""Active learning through Ray: passes that lose an actor, a comparison that loses its driver, the commands."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from dpo_ray.config import parse_run
from dpo_ray.models import ModelSource
from dpo_ray.reference import ReferenceStore, ResponseScorer, View, by_prompt, response_key, score_responses
from dpo_ray.storage import Folder, read_lines

pytestmark = pytest.mark.ray

WORTH = """
import time

def worth(prompt, response):
    with open({log!r}, "a") as file:
        file.write(prompt + "|" + response + "\\n")
    time.sleep({seconds})
    return response.count("a") - response.count("b")
"""


class SlowStore(ReferenceStore):
    """Tells of every write, and takes its time, so that a test can come between."""

    def write(self, values: dict[bytes, Any]) -> None:
        time.sleep(0.5)
        super().write(values)
        with open(f"{self.root}/writes.log", "a") as file:
            file.write(f"{os.getpid()} {len(values)}\n")


def test_a_killed_actor_loses_nothing_and_repeats_at_most_its_block(cluster: None, tiny_model: Path, tmp_path: Path):
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    (tmp_path / "s").mkdir()
    store = SlowStore(str(tmp_path / "s"), "f", "fp32")
    run = parse_run(
        {
            "name": "a",
            "model": {"path": str(tiny_model)},
            "reference": {"store": str(tmp_path / "s")},
            "data": {"sources": [{"path": "none"}]},
            "engine": {"precision": "fp32"},
            "cluster": {"num_workers": 2},
        }
    )
    chance = np.random.default_rng(0)
    responses = [
        (chance.integers(3, 90, 6).astype(np.int32), chance.integers(3, 90, 5).astype(np.int32)) for _ in range(160)
    ]
    view = View(ModelSource(str(tiny_model)), store)
    killed: list[int] = []

    def kill_one(done: int, total: int) -> None:
        if not killed:
            ours = psutil.Process().children(recursive=True)
            actor = next(process for process in ours if "ScoringActor" in " ".join(process.cmdline()))
            killed.append(actor.pid)
            actor.kill()

    (found,), errors = score_responses(responses, [view], run, 0.0, kill_one)
    assert killed
    assert errors == {}
    assert (found.computed, found.from_store) == (160, 0)
    expected = ResponseScorer(view.model, "fp32", run.batch).score(by_prompt(responses))
    stored = store.read(expected)
    assert stored.keys() == expected.keys()
    assert all(stored[key].logps == pytest.approx(expected[key].logps, abs=1e-4) for key in expected)
    writes = [line.split() for line in (tmp_path / "s" / "writes.log").read_text().splitlines()]
    blocks = len([name for name in Folder(store.path).names() if name.endswith(".parquet")])
    assert blocks <= len(writes) <= blocks + 1, "one block at most was computed twice"
    assert {response_key(*item) for item in responses} == store.keys(expected)

    again, _ = score_responses(responses, [view], run, 0.0)
    assert (again[0].computed, again[0].from_store) == (0, 160), "a second pass repeats nothing"


def write_recipe(folder: Path, model: Path, name: str, seconds: float) -> Path:
    """Pairs of bytes, and an oracle that counts letters and keeps a log of what it is asked."""
    chance = np.random.default_rng(0)
    words = lambda: "".join(chance.choice(list("abcd"), 6))  # noqa: E731
    rows = [{"prompt": f"p{i:02d} ", "responses": [words(), words()]} for i in range(48)]
    (folder / "pool.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [{"prompt": f"q{i:02d} ", "chosen": "aa" + words(), "rejected": "bb" + words()} for i in range(24)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (folder / f"{name}_oracle.py").write_text(WORTH.format(log=str(folder / f"{name}.log"), seconds=seconds))
    recipe = {
        "name": name,
        "storage": {"path": str(folder / "runs")},
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": str(folder / "pool.jsonl")}],
            "eval": {"num_pairs": 24, "sources": [{"path": str(folder / "held.jsonl")}]},
            "max_tokens": 64,
        },
        "batch": {"pairs_per_step": 4},
        "optim": {"learning_rate": 1e-3},
        "train": {"epochs": 2},
        "engine": {"precision": "fp32", "zero_stage": 0},
        "early_stopping": None,
        "tracking": {"kind": "none"},
        "acquire": {
            "strategy": "certainty",
            "labels_per_round": 8,
            "budget": 16,
            "oracle": {"kind": "function", "function": f"{name}_oracle:worth"},
        },
    }
    path = folder / f"{name}.json"  # JSON is YAML
    path.write_text(json.dumps(recipe))
    return path


def command(recipe: Path, *more: str) -> list[str]:
    code = "from dpo_ray.cli import main; main()"
    return [sys.executable, "-c", code, "acquire", str(recipe), "--address", "local", *more]


def decided(folder: Path, strategies: tuple[str, ...]) -> dict[str, Any]:
    """What each arm chose and was answered, and what came of it."""
    found: dict[str, Any] = {}
    for strategy in strategies:
        arm = Folder(str(folder / "seed-0" / strategy))
        found[strategy] = [
            [line["candidate_id"], line["preferred"], line["round"]] for line in read_lines(arm.read("labels.jsonl"))
        ]
        for number in (1, 2):
            chosen = arm.read_json(f"round-{number:02d}/choices.json")["choices"]
            result = arm.read_json(f"round-{number:02d}/round.json")
            names = [choice["candidate_id"] for choice in chosen]
            found[f"{strategy} {number}"] = (
                names,
                result["value"],
                result["eval"]["logps/chosen"],
                result["agreement"],
            )
    return found


def test_an_acquisition_whose_driver_is_killed_goes_on_with_the_same_choices(
    ray_tmpdir: Path, tiny_model: Path, tmp_path: Path
):
    strategies = ("random", "certainty")
    compared = ("--strategy", ",".join(strategies))
    whole = write_recipe(tmp_path, tiny_model, "whole", 0.0)
    subprocess.run(command(whole, *compared), cwd=tmp_path, check=True, capture_output=True)
    expected = decided(tmp_path / "runs" / "whole", strategies)
    assert expected["random 1"] == expected["certainty 1"], "the first round is random, and trained once"
    assert expected["random 2"][0] != expected["certainty 2"][0]
    runs = [folder for folder in (tmp_path / "runs/whole/seed-0/runs").iterdir() if (folder / "summary.json").exists()]
    assert len(runs) == 3

    broken = write_recipe(tmp_path, tiny_model, "broken", 0.05)
    folder = tmp_path / "runs" / "broken"
    moments = [
        lambda: len(_lines(folder / "seed-0/random/labels.jsonl")) >= 3,  # in the middle of asking
        lambda: any((folder / "seed-0/runs").glob("16-*/metrics.jsonl")),  # in the training of a second round
    ]
    for number, has_come in enumerate(moments):
        resume = ("--resume",) if number else ()
        process = subprocess.Popen(command(broken, *compared, *resume), cwd=tmp_path, stderr=subprocess.DEVNULL)
        _wait(has_come, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
    done = subprocess.run(
        command(broken, *compared, "--resume", "--json"), cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["status"] == "completed"
    assert decided(folder, strategies) == expected
    asked = Counter(_lines(tmp_path / "broken.log"))
    labels = [line[0] for strategy in strategies for line in expected[strategy]]
    # Both arms ask for their own labels; the one in hand when the driver died may have been scored twice.
    assert sum(asked.values()) <= 2 * len(labels) + 2
    assert (folder / "report.html").exists()


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _wait(has_come: Any, process: Any, seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not has_come():
        assert process.poll() is None, "the acquisition ended before it could be killed"
        assert time.monotonic() < end
        time.sleep(0.05)
