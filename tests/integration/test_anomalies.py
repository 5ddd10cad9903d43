"""Anomalies in real runs: three that are made to go wrong, and three that are sound and stay silent."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import parse_run
from dpo_ray.launch import RunResult, Silent, fit
from dpo_ray.models import ModelSource, weights_fingerprint

pytestmark = pytest.mark.ray

STEPS, PAIRS_PER_STEP, NUM_HELD_OUT = 20, 16, 300


class Seen(Silent):
    """Remembers the lines that a person would have seen."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def line(self, line: Any) -> None:
        self.lines.append(dict(line))


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for all runs of this file, so that they share one reference store."""
    return tmp_path_factory.mktemp("runs")


Row = dict[str, str]
COLUMNS = ("prompt", "chosen", "rejected")


def rows(name: str, numbers: range, responses: Callable[[random.Random], tuple[str, str]]) -> list[Row]:
    """Pairs with a prompt of its own each; `responses` gives chosen and rejected."""
    rng = random.Random(f"{name} {numbers}")
    return [dict(zip(COLUMNS, (f"{name} {number}:", *responses(rng)), strict=True)) for number in numbers]


def write(path: Path, pairs: list[Row]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return str(path)


def turned(pairs: list[Row]) -> list[Row]:
    return [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in pairs]


def letters(rng: random.Random, most: int) -> str:
    return " " + "".join(rng.choices("abcdefgh", k=rng.randint(most - 8, most)))


def rule(rng: random.Random) -> tuple[str, str]:
    """Learnt in a few steps; both responses have the same length."""
    tail = "".join(rng.choices("abcdefgh", k=4))
    return f" yes {tail}", f" nay {tail}"


RULE, RULE_HELD_OUT = rows("rule", range(1200), rule), rows("rule", range(2000, 2000 + NUM_HELD_OUT), rule)
EXCEPTIONS = turned(rows("odd", range(250), rule))
"""The rule the other way round, as their prompts tell to whom reads them."""
BY_THE_RULE = rows("odd", range(2000, 2000 + NUM_HELD_OUT), rule)
"""What the exceptions contradict."""
LONGER = rows("longer", range(STEPS * PAIRS_PER_STEP), lambda rng: (letters(rng, 30), letters(rng, 12)))
MIXED = rows("mixed", range(NUM_HELD_OUT), lambda rng: (letters(rng, 30), letters(rng, 12)))
MIXED[::2] = turned(MIXED[::2])


def run(
    storage: Path, name: str, model: Path, train: list[Row], held_out: list[Row], **overrides: Any
) -> tuple[RunResult, Seen]:
    tree = {
        "name": name,
        "storage": {"path": str(storage)},
        "model": {"path": str(model)},
        "data": {
            "sources": [{"path": write(storage / f"{name}-train.jsonl", train)}],
            "max_tokens": 160,
            "num_pairs": STEPS * PAIRS_PER_STEP,
            "eval": {
                "num_pairs": NUM_HELD_OUT,
                "sources": [{"path": write(storage / f"{name}-held-out.jsonl", held_out)}],
            },
        },
        "batch": {"pairs_per_step": PAIRS_PER_STEP},
        "optim": {"learning_rate": 3e-4},
        "train": {"log_every_steps": 1, "epochs": 1},
        "engine": {"precision": "fp32", "zero_stage": 0},
        "eval": {"every_steps": 2},
        "early_stopping": None,
        "checkpoint": {"every_steps": 1000},
        "cluster": {"num_workers": 1, "cpus_per_worker": 1},
        "tracking": {"kind": "none"},
    }
    seen = Seen()
    recipe = parse_run(tree, {key.replace("__", "."): value for key, value in overrides.items()})
    return fit(recipe, display=seen), seen


def told(result: RunResult) -> dict[str, int]:
    return {anomaly["name"]: anomaly["step"] for anomaly in result.summary["anomalies"]}


def test_a_rule_that_is_learnt_is_sound(cluster: None, storage: Path, tiny_model: Path):
    result, seen = run(storage, "rule", tiny_model, RULE, RULE_HELD_OUT)
    assert result.summary["eval"]["rewards/accuracies"] > 0.9
    assert told(result) == {}
    assert not any("anomaly" in line for line in seen.lines)


def test_a_loss_without_a_reference_is_sound(cluster: None, storage: Path, tiny_model: Path):
    result, _ = run(storage, "simpo", tiny_model, RULE, RULE_HELD_OUT, loss={"kind": "simpo"}, train__seed=1)
    assert result.summary["eval"]["rewards/accuracies"] > 0.9
    assert told(result) == {}


def test_human_preferences_are_sound(cluster: None, storage: Path, shared: Path):
    result, _ = run(
        storage,
        "human",
        shared / "models/stories260K",
        [],
        [],
        data__sources=[{"path": str(shared / "data/hh_rlhf/harmless-base.test.jsonl.gz")}],
        data__eval={"num_pairs": 200},
        optim__learning_rate=1e-4,
        eval__every_steps=5,
    )
    assert told(result) == {}


def test_exceptions_that_undo_the_rule_at_a_rate_that_grows_to_the_end(
    cluster: None, storage: Path, tiny_model: Path, tmp_path: Path
):
    """First the rule is learnt, of which the held-out pairs are; then the exceptions, against it; then all breaks."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    result, seen = run(
        storage,
        "exceptions",
        tiny_model,
        RULE + EXCEPTIONS,
        BY_THE_RULE,
        data__num_pairs=None,
        eval__every_steps=10,
        optim__learning_rate=0.027,
        optim__warmup_ratio=0.95,
        tracking={"kind": "mlflow", "uri": uri, "register_as": "exceptions"},
    )
    found = told(result)
    assert found.keys() >= {"overtraining", "accuracy_dip", "likelihood_displacement", "exploding_kl", "gradient_spike"}
    in_file = map(json.loads, (Path(result.folder) / "metrics.jsonl").read_text().splitlines())
    lines = [line for line in in_file if "anomaly" in line]
    assert {line["anomaly"]["name"]: line["step"] for line in lines} == found
    assert [line for line in seen.lines if "anomaly" in line] == lines, "each was shown, once"
    client = MlflowClient(tracking_uri=uri)
    run_id = result.summary["mlflow_run_id"]
    assert client.get_run(run_id).data.tags["anomalies"] == ",".join(found)
    kept = json.loads(Path(client.download_artifacts(run_id, "anomalies.json", str(tmp_path))).read_text())
    assert kept == result.summary["anomalies"]

    version = client.get_model_version_by_alias("exceptions", "challenger")
    assert version.tags == {
        "data_fingerprint": result.summary["data_fingerprint"],
        "reference_fingerprint": weights_fingerprint(ModelSource(str(tiny_model))),
        "model_fingerprint": weights_fingerprint(ModelSource(result.summary["model_path"])),
        "run_folder": result.folder,
        "labels": f"{storage}/exceptions-train.jsonl",
    }


def test_a_reward_that_learns_nothing_but_length(cluster: None, storage: Path, tiny_model: Path):
    """Every chosen response in training is the longer; of the held-out ones, where labels are noise, half are."""
    result, _ = run(storage, "length", tiny_model, LONGER, MIXED, optim__schedule="constant")
    assert told(result).keys() == {"length_hacking", "accuracy_plateau"}
    assert result.summary["eval"]["rewards/accuracies_longer"] > 0.9
    assert result.summary["eval"]["rewards/accuracies_shorter"] < 0.1


def test_a_rate_at_which_nothing_moves(cluster: None, storage: Path, tiny_model: Path):
    result, _ = run(storage, "dead", tiny_model, RULE, RULE_HELD_OUT, optim__learning_rate=1e-9, eval__every_steps=10)
    assert told(result) == {"dead_learning_rate": STEPS // 4}


def test_a_model_that_is_faster_than_its_batches_are_planned(cluster: None, storage: Path, tiny_model: Path):
    """One layer of eight units computes a batch of 256 short pairs sooner than it is read and planned."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(tiny_model)
    config.update({"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1})
    config.update({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8})
    LlamaForCausalLM(config).save_pretrained(storage / "smallest")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(storage / "smallest")
    result, _ = run(
        storage,
        "starved",
        storage / "smallest",
        rows("", range(2048), lambda rng: (" " + rng.choice("abcd"), " " + rng.choice("efgh"))),
        [],
        data__num_pairs=None,
        data__eval={"num_pairs": 0},
        batch={"pairs_per_step": 256, "tokens_per_device": 32768, "layout": "padded"},
    )
    assert told(result).keys() == {"loader_starvation"}
    assert "of a step's time is spent on reading and planning" in result.summary["anomalies"][0]["evidence"]
