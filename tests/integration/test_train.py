"""Training for real: Ray Train, DeepSpeed and gloo on the local cluster, a small real model, real preference pairs."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_ray import manifest
from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError, RunFailed
from dpo_ray.launch import Interrupt, RunResult, Silent, fit
from dpo_ray.prepare import describe_plan, prepare, reference_source, resolve
from dpo_ray.storage import Folder

pytestmark = pytest.mark.ray

STEPS = 20


def recipe(shared: Path, storage: Path, name: str, **overrides: Any) -> RunConfig:
    """20 steps of 16 HH-RLHF pairs on the 260k-parameter model; overrides by dotted key, with `__` for the dot."""
    tree = {
        "name": name,
        "storage": {"path": str(storage)},
        "model": {"path": str(shared / "models/stories260K")},
        "data": {
            "sources": [{"path": str(shared / "data/hh_rlhf/harmless-base.test.jsonl.gz")}],
            "max_tokens": 200,
            "num_pairs": 80,
            "eval": {"num_pairs": 37},  # no multiple of any batch size: the last one is ragged
        },
        "batch": {"pairs_per_step": 16, "tokens_per_device": 4096},
        "optim": {"learning_rate": 3e-4},
        "train": {"log_every_steps": 1, "epochs": 4},
        "engine": {"precision": "fp32", "zero_stage": 2},
        "eval": {"every_steps": 10},
        "early_stopping": None,
        "checkpoint": {"every_steps": 10},
        "cluster": {"num_workers": 2, "cpus_per_worker": 1},
        "tracking": {"kind": "none"},
    }
    return parse_run(tree, {key.replace("__", "."): value for key, value in overrides.items()})


def lines(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def losses(folder: str) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def last_evaluation(folder: str) -> dict[str, float]:
    return [line for line in lines(folder) if "eval/loss" in line][-1]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage for all runs of this file, so that they share one reference store."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def first(cluster: None, shared: Path, storage: Path) -> RunResult:
    """The run that the others are compared with: 2 workers, ZeRO-2."""
    return fit(recipe(shared, storage, "first"))


def test_the_first_loss_is_ln_2_and_training_lowers_it(first: RunResult):
    found = losses(first.folder)
    assert len(found) == STEPS
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert sum(found[-5:]) / 5 < 0.68


def test_the_summary_tells_what_was_done(first: RunResult):
    summary = json.loads((Path(first.folder) / "summary.json").read_text())
    assert summary == first.summary
    assert summary["status"] == "completed"
    assert (summary["steps"], summary["pairs_seen"], summary["world_size"]) == (STEPS, 320, 2)
    assert (
        summary["eval"]["num_pairs"]
        == json.loads((Path(first.folder) / "data_report.json").read_text())["held_out"]["pairs"]
    )
    assert summary["reference"]["from_store"] == 0
    assert summary["reference"]["computed"] > 100
    assert 0 <= summary["eval"]["rewards/accuracies_low"] < summary["eval"]["rewards/accuracies"]
    assert summary["attention"] == "spans (CPU)"
    assert set(summary["time_split"]) == {"data", "forward", "backward", "optimizer", "communication"} | {
        "evaluation",
        "checkpoint",
    }
    assert sum(summary["time_split"].values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "passes", "overrides"),
    [
        ("zero-0-padded", 1, {"engine__zero_stage": 0, "batch__layout": "padded"}),
        ("zero-1", 1, {"engine__zero_stage": 1}),
        ("zero-3", 1, {"engine__zero_stage": 3}),
        ("eight-passes", 8, {"cluster__num_workers": 1, "batch__tokens_per_device": 520, "batch__row_tokens": 300}),
    ],
)
def test_losses_and_evaluation_do_not_depend_on_stage_workers_or_micro_batches(
    first: RunResult, shared: Path, storage: Path, name: str, passes: int, overrides: dict[str, Any]
):
    run = recipe(shared, storage, name, **overrides)
    assert describe_plan(run, prepare(resolve(run)))["forward_passes_per_step"] == passes
    other = fit(run)
    assert losses(other.folder) == pytest.approx(losses(first.folder), abs=1e-4)
    expected, found = last_evaluation(first.folder), last_evaluation(other.folder)
    assert found["eval/rewards/accuracies"] == expected["eval/rewards/accuracies"]
    assert found["eval/num_pairs"] == expected["eval/num_pairs"]
    assert found["eval/loss"] == pytest.approx(expected["eval/loss"], abs=1e-4)
    assert other.summary["reference"]["computed"] == 0


def test_another_beta_computes_no_reference(first: RunResult, shared: Path, storage: Path):
    other = fit(recipe(shared, storage, "beta", loss__beta=0.5, train__max_steps=1))
    assert other.summary["reference"] == {"computed": 0, "from_store": first.summary["reference"]["computed"]}


class StopAt(Silent):
    """Interrupts a run when a step's line is seen."""

    def __init__(self, step: int) -> None:
        self.interrupt, self._step = Interrupt(), step

    def line(self, line: Any) -> None:
        if line["step"] >= self._step:
            self.interrupt.is_set = True


def test_an_interrupted_run_resumes_bit_for_bit(first: RunResult, shared: Path, storage: Path):
    run = recipe(shared, storage, "resumed")
    stop = StopAt(3)
    stopped = fit(run, display=stop, interrupt=stop.interrupt)
    assert stopped.summary["status"] == "interrupted"
    at = stopped.summary["steps"]
    assert 3 <= at < STEPS
    assert stopped.summary["model_path"] is None

    resumed = fit(run, resume=True)
    assert resumed.summary["status"] == "completed"
    assert resumed.summary["resumed_from_step"] == at
    assert losses(resumed.folder) == losses(first.folder)  # every bit, also before the stop
    assert resumed.summary["eval"] == first.summary["eval"]


def test_a_run_goes_on_with_fewer_and_with_more_workers_and_on_any_stage(first: RunResult, shared: Path, storage: Path):
    for workers, stage, until in ((2, 0, 3), (1, 1, 7), (2, 2, 11), (1, 3, STEPS + 1)):
        stop = StopAt(until)
        run = recipe(shared, storage, "moving", cluster__num_workers=workers, engine__zero_stage=stage)
        last = fit(run, resume=True, display=stop, interrupt=stop.interrupt)
        assert last.summary["world_size"] == workers
        assert last.summary["status"] == ("interrupted" if until < STEPS else "completed")
    assert losses(last.folder) == pytest.approx(losses(first.folder), abs=1e-4)
    assert last.summary["eval"]["loss"] == pytest.approx(first.summary["eval"]["loss"], abs=1e-4)


def test_damage_to_any_file_of_a_checkpoint_is_named(first: RunResult, tmp_path: Path):
    folder = Path(first.folder) / "checkpoints/step-000020"
    names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    assert {"engine.json", "state.json", "rng-00001.safetensors", "shards/00001-0000.safetensors"} < set(names)
    assert {"manifest-00000.json", "manifest-00001.json", "model/model.safetensors"} < set(names)

    def faults() -> list[str]:
        here = Folder(str(tmp_path / "copy"))
        try:
            return manifest.changed(here, manifest.read(here).files.items())
        except manifest.Damaged as fault:
            return [str(fault)]

    shutil.copytree(folder, tmp_path / "copy")
    assert faults() == []
    for name in names:
        file = tmp_path / "copy" / name
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        for damaged in (content[: len(content) // 2], bytes(flipped), None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            assert [fault.partition(" ")[0] for fault in faults()] == [name]
            file.write_bytes(content)


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(first: RunResult, shared: Path, storage: Path):
    """Two are damaged, so the run goes on from the first; then all are, and it is refused."""
    run = recipe(shared, storage, "damaged", checkpoint__every_steps=5, checkpoint__keep=9)
    folder = Path(fit(run).folder)
    shard = folder / "checkpoints/step-000020/shards/00001-0000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-5] ^= 1
    shard.write_bytes(content)
    (folder / "checkpoints/step-000015/engine.json").unlink()
    shutil.rmtree(folder / "checkpoints/step-000005")  # Ray's list still has it

    again = fit(run, resume=True)
    assert (again.summary["status"], again.summary["resumed_from_step"]) == ("completed", 10)
    assert losses(again.folder) == losses(first.folder)
    told = [line["event"] for line in lines(again.folder) if "checkpoint not used" in line.get("event", "")]
    assert told == [
        "checkpoint not used, step-000020: shards/00001-0000.safetensors has changed",
        "checkpoint not used, step-000015: engine.json is missing",
    ]
    names = {path.name for path in (folder / "checkpoints").glob("step-*")}
    assert {"step-000020", "step-000020-2"} <= names, "the damaged one is not mixed with the new one"
    for path in (folder / "checkpoints").glob("step-*/shards/00000-0000.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        InputError, match=r"cannot resume: no checkpoint of .*/damaged is whole \(step-000020-2: shards/"
    ):
        fit(run, resume=True)


def test_a_name_that_exists_is_refused_without_resume(first: RunResult, shared: Path, storage: Path):
    with pytest.raises(InputError, match="exists"):
        fit(recipe(shared, storage, "first"))


def test_a_resumed_run_with_other_numbers_is_refused(first: RunResult, shared: Path, storage: Path):
    with pytest.raises(InputError, match=r"loss.beta.*0\.1.*0\.3"):
        fit(recipe(shared, storage, "first", loss__beta=0.3), resume=True)


def test_more_workers_than_the_cluster_has_are_refused_at_once(cluster: None, shared: Path, storage: Path):
    with pytest.raises(InputError, match="needs 64 CPUs; the cluster has 2"):
        fit(recipe(shared, storage, "too-many", cluster__num_workers=64))


def test_the_model_reloads_with_plain_transformers(first: RunResult, shared: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = first.summary["model_path"]
    aligned = AutoModelForCausalLM.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(shared / "models/stories260K")
    assert any(not torch.equal(a, b) for a, b in zip(aligned.parameters(), start.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder)("Once upon")["input_ids"]
    assert "stories260K" in (Path(folder) / "README.md").read_text()


def test_the_exported_model_has_the_evaluated_log_probs(first: RunResult, shared: Path, storage: Path):
    from dpo_ray.evaluate.held_out import evaluate_model
    from dpo_ray.models import ModelSource

    run = resolve(recipe(shared, storage, "first"))
    found = evaluate_model(
        run,
        ModelSource(first.summary["model_path"]),
        reference_source(run),
        prepare(run).held_out_pairs,
        gpus_per_actor=0,
    )
    for name, value in first.summary["best_eval"].items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-4), name


@pytest.mark.parametrize("stage", [2, 3])
def test_lora_trains_and_its_adapter_reloads(cluster: None, shared: Path, storage: Path, stage: int):
    from dpo_ray.evaluate.held_out import evaluate_model
    from dpo_ray.models import ModelSource

    run = resolve(
        recipe(
            shared,
            storage,
            f"lora-{stage}",
            model__lora={"rank": 4},
            engine__zero_stage=stage,
            optim__learning_rate=3e-3,
        )
    )
    result = fit(run)
    found = losses(result.folder)
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert sum(found[-5:]) / 5 < 0.68
    assert (Path(result.summary["model_path"]) / "adapter_model.safetensors").exists()
    again = evaluate_model(
        run,
        ModelSource(result.summary["model_path"]),
        reference_source(run),
        prepare(run).held_out_pairs,
        gpus_per_actor=0,
    )
    assert again.metrics["loss"] == pytest.approx(result.summary["best_eval"]["loss"], abs=1e-4)
    assert again.metrics["rewards/accuracies"] == result.summary["best_eval"]["rewards/accuracies"]


def test_early_stopping_keeps_the_best_checkpoint(first: RunResult, shared: Path, storage: Path):
    """At a rate that breaks the model accuracy soon falls: the run ends early, and `model/` is the best step's."""
    from safetensors.torch import load_file

    result = fit(
        recipe(
            shared,
            storage,
            "early",
            cluster__num_workers=1,
            optim__learning_rate=1e-2,
            eval__every_steps=2,
            checkpoint__every_steps=100,
            early_stopping={"patience": 2},
        )
    )
    summary = result.summary
    evaluations = [line for line in lines(result.folder) if "eval/loss" in line]
    assert summary["status"] == "stopped_early"
    assert "rewards/accuracies has not improved in 2 evaluations" in summary["stop_reason"]
    assert summary["steps"] == evaluations[-1]["step"] < STEPS
    best = max(evaluations, key=lambda line: (line["eval/rewards/accuracies"], -line["step"]))
    assert summary["best_step"] == best["step"] == summary["steps"] - 4
    assert summary["best_eval"]["rewards/accuracies"] == best["eval/rewards/accuracies"]
    kept = Path(result.folder) / f"checkpoints/step-{best['step']:06d}/model/model.safetensors"
    last = Path(result.folder) / f"checkpoints/step-{summary['steps']:06d}/model/model.safetensors"
    exported = load_file(Path(summary["model_path"]) / "model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in load_file(kept).items())
    assert any(not torch.equal(value, exported[name]) for name, value in load_file(last).items())


def test_a_reference_that_is_not_the_models_is_refused_before_step_1(first: RunResult, shared: Path, storage: Path):
    """Half a nat too much in every stored value of a rejected response: the first loss is not ln 2."""
    from dpo_ray.reference import ReferenceStore, response_key

    run = resolve(recipe(shared, storage, "wrong-reference"))
    pairs = [*(prepared := prepare(run)).train_pairs, *prepared.held_out_pairs]
    fingerprint = first.summary["reference_fingerprint"]
    right = ReferenceStore(str(run.reference.store), fingerprint, "fp32")
    wrong = ReferenceStore(str(storage / "wrong"), fingerprint, "fp32")
    rejected = {response_key(pair.prompt_ids, pair.rejected_ids) for pair in pairs}
    chosen = {response_key(pair.prompt_ids, pair.chosen_ids) for pair in pairs}
    shifted = {key: value._replace(logps=value.logps + 0.5) for key, value in right.read(rejected).items()}
    wrong.write(right.read(chosen) | shifted)
    with pytest.raises(RunFailed, match=r"self-check: .* not ln 2"):
        fit(recipe(shared, storage, "wrong-reference", reference__store=str(storage / "wrong")))
    assert not (storage / "wrong-reference/metrics.jsonl").exists()
