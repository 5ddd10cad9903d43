"""The command line on a user's mistakes: one clear line, the right exit code, nothing half-written taken for good."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from click.testing import Result
from typer.testing import CliRunner

from dpo_ray.cli import app, connect, signals_set
from dpo_ray.displays import StudyLive, trials_table
from dpo_ray.launch import Interrupt

PAIRS = [{"prompt": f"Question {i}?", "chosen": f"Yes, {i}.", "rejected": "No."} for i in range(20)]

Run = Callable[..., Result]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return file


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path, data: Path) -> Run:
    """`run("loss.beta=0.3")`: a dry run of a small recipe with overrides."""
    recipe = tmp_path / "recipe.yaml"
    tree = {
        "name": "small",
        "storage": {"path": str(tmp_path / "runs")},
        "model": {"path": str(tiny_model)},
        "data": {"sources": [{"path": str(data)}], "max_tokens": 64, "eval": {"num_pairs": 4}},
        "batch": {"pairs_per_step": 4, "tokens_per_device": 512},
        "engine": {"precision": "fp32"},
    }
    recipe.write_text(yaml.safe_dump(tree))
    return lambda *arguments: CliRunner().invoke(app, ["train", str(recipe), "--dry-run", *arguments])


def one_line(result: Result, code: int = 2) -> str:
    """The one line of an error."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]


def test_a_dry_run_tells_pairs_steps_and_memory(run: Run, tmp_path: Path):
    result = run("train.epochs=2")
    assert result.exit_code == 0, result.output
    told = yaml.safe_load(result.stdout)
    assert told["recipe"]["train"]["epochs"] == 2
    assert (told["plan"]["train_pairs"], told["plan"]["held_out_pairs"]) == (16, 4)
    assert told["plan"]["steps"] == 8
    assert told["plan"]["memory"]["parameters"] > 10_000
    assert not (tmp_path / "runs/small").exists()


def test_a_dry_run_says_what_would_make_it_fit(run: Run):
    def memory(*arguments: str) -> dict[str, Any]:
        told: dict[str, Any] = yaml.safe_load(run(*arguments).stdout)["plan"]["memory"]
        return told

    roomy = memory("--device-gib", "80")
    assert roomy["fits"]
    assert "would_fit_with" not in roomy
    needed = roomy["gib_per_worker"]
    tight = memory("--device-gib", str(needed - 0.001))
    assert not tight["fits"]
    assert tight["would_fit_with"] == {"engine.activation_checkpointing": True}
    assert isinstance(memory("--device-gib", "0.001")["would_fit_with"], str)
    with_it = memory("engine.activation_checkpointing=true", "--device-gib", str(needed - 0.001))
    assert with_it["fits"], "what is advised does fit"


@pytest.mark.parametrize(("key", "column"), [("data_weights", "weight"), ("margin_weight", "margin")])
def test_a_pair_without_the_number_that_the_loss_reads_is_named(run: Run, data: Path, key: str, column: str):
    rows = [json.loads(line) | {column: 1.5} for line in data.read_text().splitlines()]
    rows[6].pop(column)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = one_line(run(f"loss.{key}=1"))
    assert f"{data}:7" in told
    assert f"`{column}`" in told
    assert run().exit_code == 0, "only where it is read"


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("loss.betta=0.3", "unknown key `loss.betta`; did you mean `loss.beta`?"),
        ("loss.beta=-1", "`loss.beta`"),
        ("beta", "expected key=value"),
        ("data.sources.0.path=./nowhere.jsonl", "nowhere.jsonl"),
        ("model.path=./nowhere", "no model at"),
        ("data.max_tokens=100000", "more than the 256 positions"),
        ("data.max_tokens=10", "over_long 16"),
        ("batch.tokens_per_device=16", "less than the"),
        ("early_stopping.metric=accuracy", "no metric `accuracy`"),
        ("name=a/b", "`name`"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(run: Run, override: str, told: str):
    assert told in one_line(run(override))


def test_json_gives_the_plan_and_nothing_else_on_stdout(run: Run, capfd: pytest.CaptureFixture[str]):
    assert run("--json").exit_code == 0
    assert json.loads(capfd.readouterr().out)["plan"]["train_pairs"] == 16


def test_a_missing_recipe_is_one_line():
    assert "no recipe at nowhere.yaml" in one_line(CliRunner().invoke(app, ["train", "nowhere.yaml"]))


def test_a_bad_row_is_named_by_file_and_line(run: Run, data: Path):
    lines = data.read_text().splitlines()
    lines[6] = json.dumps({"prompt": "Question?", "chosen": "Yes."})
    data.write_text("\n".join(lines))
    told = one_line(run())
    assert f"{data}:7" in told
    assert "rejected" in told
    assert run("data.on_bad_row=drop").exit_code == 0


def test_empty_data_is_named(run: Run, data: Path):
    data.write_text("")
    assert str(data) in one_line(run())


def test_a_conversation_without_chat_template_is_named(run: Run, data: Path):
    turns = {
        "prompt": [{"role": "user", "content": "Well?"}],
        "chosen": [{"role": "assistant", "content": "Yes."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }
    data.write_text("".join(json.dumps({**turns, "id": i}) + "\n" for i in range(3)) + json.dumps(PAIRS[0]) + "\n")
    told = one_line(run("data.eval.num_pairs=0"))
    assert f"{data}:1" in told
    assert "no chat template" in told


def test_a_damaged_weight_file_is_named(run: Run, tiny_model: Path, tmp_path: Path):
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_model, damaged)
    whole = (damaged / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    told = one_line(run(f"model.path={damaged}"))
    assert "model.safetensors is damaged" in told


def test_weights_in_another_format_are_refused(run: Run, tiny_model: Path, tmp_path: Path):
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    assert "has no safetensors weights" in one_line(run(f"model.path={pickled}"))


def started(run: Run, *arguments: str) -> Result:
    """The same recipe without `--dry-run`; for mistakes that are found before Ray starts."""
    recipe = run.__closure__[0].cell_contents  # type: ignore[attr-defined]
    return CliRunner().invoke(app, ["train", str(recipe), *arguments])


def test_a_storage_that_cannot_be_written_is_named(run: Run, data: Path):
    told = one_line(started(run, f"storage.path={data}/runs"))  # below a file
    assert f"cannot write {data}/runs/small" in told


def test_a_name_that_exists_is_refused(run: Run, tmp_path: Path):
    (tmp_path / "runs/small").mkdir(parents=True)
    (tmp_path / "runs/small/recipe.yaml").write_text("name: small\n")
    told = one_line(started(run))
    assert "exists" in told
    assert "--resume" in told


def test_export_needs_a_run_folder(tmp_path: Path):
    assert "not a run folder" in one_line(CliRunner().invoke(app, ["export", str(tmp_path)]))


def test_export_needs_a_checkpoint(tmp_path: Path, tiny_model: Path):
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump({"name": "x", "model": {"path": str(tiny_model)}, "data": {"sources": [{"path": "x.jsonl"}]}})
    )
    assert "no checkpoint" in one_line(CliRunner().invoke(app, ["export", str(tmp_path)]))


def test_evaluate_needs_pairs_and_a_reference(tiny_model: Path, data: Path):
    assert "name a RECIPE" in one_line(CliRunner().invoke(app, ["evaluate", str(tiny_model)]))
    assert "--reference" in one_line(CliRunner().invoke(app, ["evaluate", str(tiny_model), "--data", str(data)]))


def test_a_judge_that_is_not_there_is_told_before_anything_is_written(tiny_model: Path, data: Path, tmp_path: Path):
    words = (
        "evaluate",
        str(tiny_model),
        "--data",
        str(data),
        "--reference",
        str(tiny_model),
        "--output",
        str(tmp_path),
    )
    judge = "evaluate.judge={kind: function, function: 'no_such_module_here:f'}"
    assert "`evaluate.judge.function`: cannot import" in one_line(CliRunner().invoke(app, [*words, judge]))
    judge = "evaluate.judge={kind: llm, model: j, api_key_env: NO_SUCH_VARIABLE_HERE}"
    assert "`evaluate.judge.api_key_env`" in one_line(CliRunner().invoke(app, [*words, judge]))


def test_ctrl_c_ends_any_command_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from dpo_ray import report

    def interrupted(folder: str) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "write_report", interrupted)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 130
    assert result.stderr.strip() == "interrupted"


def test_schema_is_the_recipes_json_schema():
    result = CliRunner().invoke(app, ["schema"])
    schema: dict[str, Any] = json.loads(result.stdout)
    assert schema["properties"]["loss"]["discriminator"]["propertyName"] == "kind"
    assert schema["required"] == ["name", "model", "data"]


def test_doctor_names_what_is_there():
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code in (0, 3)
    assert "torch" in result.stdout
    assert "g++" in result.stdout


def test_an_event_is_shown_as_it_is_also_with_brackets_in_it(capsys: pytest.CaptureFixture[str]):
    """Rich would take `[/path]` for a closing tag and fail, and the run with it."""
    from dpo_ray.displays import Live

    with Live() as display:
        display.line({"step": 3, "event": "went on: [/a/b.cc:537] reset by peer"})
        display.phase("held by [/x]")
    told = capsys.readouterr().err
    assert "step 3: went on: [/a/b.cc:537] reset by peer" in told
    assert "held by [/x]" in told


def test_an_anomaly_is_shown_with_what_to_try(capsys: pytest.CaptureFixture[str]):
    from dpo_ray.displays import Live

    with Live() as display:
        display.line(
            {"step": 3, "anomaly": {"name": "exploding_kl", "evidence": "kl [1.2]", "advice": "a larger beta"}}
        )
    assert capsys.readouterr().err == "step 3: exploding_kl: kl [1.2]; try: a larger beta\n"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--space", "betas"], "no space `betas`"),
        (["--space", "beta_and_lr"], "--search random needs --trials"),
        (["--space", "beta", "--scheduler", "pbt"], "--scheduler: one of asha, median, none"),
        (["--space", "beta", "--metric", "accuracy"], "no metric `accuracy`"),
        (["--space", "mixture"], "at least two `data.sources`"),
        (["--space", "beta", "--search", "optuna", "--trials", "3", "--seeds", "2"], "take one seed"),
    ],
)
def test_a_sweep_that_cannot_be_is_told_in_one_line(run: Run, tmp_path: Path, options: list[str], told: str):
    assert told in one_line(CliRunner().invoke(app, ["sweep", str(tmp_path / "recipe.yaml"), "--dry-run", *options]))


def test_the_dry_run_of_a_sweep_lists_its_trials(run: Run, tmp_path: Path):
    command = ["sweep", str(tmp_path / "recipe.yaml"), "--space", "beta", "--seeds", "2", "--dry-run"]
    plan = yaml.safe_load(CliRunner().invoke(app, command).stdout)
    assert (plan["search"], plan["scheduler"], len(plan["trials"])) == ("grid", "asha", 12)
    assert not (tmp_path / "runs/small-beta").exists()


def test_the_state_of_a_study_is_told_trial_by_trial(capsys: pytest.CaptureFixture[str]):
    record = {
        "id": "000-a",
        "number": 0,
        "labels": {"loss.beta": "0.1"},
        "seed": 3,
        "status": "running",
        "stop_reason": None,
        "error": None,
        "confirms": None,
        "steps": 4,
        "best": None,
    }
    with StudyLive() as live:
        live.trials([record], 4, "rewards/accuracies", "max")
        live.trials([record], 4, "rewards/accuracies", "max")
        done = record | {"status": "stopped_by_scheduler", "stop_reason": "asha at step 8"}
        live.trials([done | {"best": {"rewards/accuracies": 0.6}}], 4, "rewards/accuracies", "max")
    assert capsys.readouterr().err.splitlines() == [
        "trial 0 (beta=0.1 seed=3): running",
        "trial 0 (beta=0.1 seed=3): stopped_by_scheduler  rewards/accuracies 0.6  (asha at step 8)",
    ]


def test_the_table_of_a_study_has_the_best_and_the_time_left():
    records = [
        {"number": n, "labels": {}, "seed": n, "status": status, "confirms": None, "steps": 8, "best": best}
        for n, (status, best) in enumerate([("completed", {"kl": 0.2}), ("failed", None), ("running", {"kl": 0.3})])
    ]
    title = str(trials_table(records, 6, "kl", "min", 120.0).title)
    assert title == "2 of 6 trials done; best kl 0.2000 (seed=0); about 4 min left"


def test_ray_does_not_take_the_signal_that_saves(monkeypatch: pytest.MonkeyPatch):
    def init(**options: Any) -> Any:  # as Ray's own
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))
        return SimpleNamespace(dashboard_url=None)

    monkeypatch.setattr("ray.init", init)
    interrupt = Interrupt()
    with signals_set(interrupt):
        connect(None)
        signal.raise_signal(signal.SIGTERM)
        assert interrupt.is_set
