"""Promotion against a real SQLite registry, and the decision by itself."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner

from dpo_ray.cli import app
from dpo_ray.config import parse_run
from dpo_ray.errors import InputError
from dpo_ray.lineage import LABELS_TAG, lineage
from dpo_ray.models import ModelSource, weights_fingerprint
from dpo_ray.prepare import model_of
from dpo_ray.promote import Verdict, decide, listing, promote
from dpo_ray.tracking import ModelRegistry, ModelVersion, open_tracker

RUN = {"name": "a", "model": {"path": "m"}, "data": {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl"}]}}


def version(number: str = "2", *aliases: str, **tags: str) -> ModelVersion:
    return ModelVersion(number, frozenset(aliases), {"model_fingerprint": f"weights-{number}", **tags})


def entry(low: float | None, high: float | None = 0.8, against: str = "base", **more: Any) -> dict[str, Any]:
    value = None if low is None or high is None else (low + high) / 2
    fixed = {"judge": "function:f", "num_prompts": 200, "wins": 1, "ties": 0, "losses": 0, "missing": 0}
    return {"against": against, **fixed, "value": value, "low": low, "high": high, **more}


def evaluation(*win_rate: dict[str, Any], number: str = "2") -> dict[str, Any]:
    """Of version 2, compared with the base and with version 1 under the name `old`."""
    against = [
        {"name": "base", "path": "m", "fingerprint": "weights-0"},
        {"name": "old", "path": "runs/a/model", "fingerprint": "weights-1"},
    ]
    return {"model_fingerprint": f"weights-{number}", "against": against, "win_rate": list(win_rate)}


CHAMPION = version("1", "champion")


def test_an_interval_above_a_half_wins():
    verdict = decide(evaluation(entry(0.52, 0.68, "old")), version(), CHAMPION)
    evidence = {"win_rate": 0.6, "low": 0.52, "high": 0.68, "judge": "function:f", "num_prompts": 200}
    assert verdict == Verdict(pytest.approx(evidence), None)


@pytest.mark.parametrize(
    ("low", "high", "refusal"),
    [
        (0.5, 0.7, "the win rate against old is 60.0% (50.0% to 70.0%): it includes 50 %"),
        (0.45, 0.55, "the win rate against old is 50.0% (45.0% to 55.0%): it includes 50 %"),
        (0.3, 0.5, "the win rate against old is 40.0% (30.0% to 50.0%): it includes 50 %"),
        (0.3, 0.4, "the win rate against old is 35.0% (30.0% to 40.0%): it lies below 50 %"),
    ],
)
def test_an_interval_that_does_not_lie_above_a_half_is_refused_with_its_evidence(low: float, high: float, refusal: str):
    verdict = decide(evaluation(entry(low, high, "old")), version(), CHAMPION)
    assert verdict.refusal == refusal
    assert verdict.evidence["low"] == low


def test_only_a_comparison_with_the_champion_counts():
    assert decide(evaluation(entry(0.9, against="base")), version(), CHAMPION).refusal == (
        "no win rate against the champion, version 1 is recorded (`dpo-ray evaluate ... --against MODEL`)"
    )
    both = evaluation(entry(0.9, against="base"), entry(0.4, 0.6, against="old"))
    assert "against old" in str(decide(both, version(), CHAMPION).refusal)
    untold = ModelVersion("1", frozenset({"champion"}), {})
    assert "no win rate" in str(decide(both, version(), untold).refusal), "its weights are not known"
    nameless = both | {"against": [{"name": "old", "path": None, "fingerprint": None}]}
    assert "no win rate" in str(decide(nameless, version(), untold).refusal)


def test_of_several_judges_the_least_favourable_counts():
    met = evaluation(entry(0.7, against="old"), entry(0.48, 0.6, "old", judge="llm"), entry(0.6, against="old"))
    verdict = decide(met, version(), CHAMPION)
    assert verdict.refusal is not None
    assert verdict.evidence["judge"] == "llm"


def test_a_first_champion_wins_against_its_reference_or_what_there_is():
    first = version(reference_fingerprint="weights-0")
    assert decide(evaluation(entry(0.6)), first, None).refusal is None
    assert decide(evaluation(entry(0.6), entry(0.4, against="old")), first, None).refusal is None
    assert decide(evaluation(entry(0.4), entry(0.6, against="old")), first, None).refusal is not None
    assert decide(evaluation(entry(0.6, against="old")), first, None).refusal is None
    assert decide(evaluation(entry(0.6), entry(0.4, against="old")), version(), None).refusal is not None
    assert "no win rate against anything" in str(decide(evaluation(), first, None).refusal)


@pytest.mark.parametrize("broken", [{"win_rate": None}, {"against": None}, {"win_rate": [entry(None, None, "old")]}])
def test_missing_parts_are_no_win_rate(broken: dict[str, Any]):
    found = evaluation(entry(0.9, against="old")) | broken
    assert "no win rate against the champion, version 1" in str(decide(found, version(), CHAMPION).refusal)


def test_a_comparison_that_is_missing_or_of_other_weights_is_refused():
    assert "no comparison is recorded" in str(decide(None, version(), None).refusal)
    other = decide(evaluation(entry(0.9), number="7"), version(), None)
    assert other == Verdict({}, "the recorded comparison is of other weights")
    untold = ModelVersion("2", frozenset(), {})
    assert decide(evaluation(entry(0.9)) | {"model_fingerprint": None}, untold, None).refusal == other.refusal


# Against a registry


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A store that is made once, which takes a second."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def registry(uri: str, request: pytest.FixtureRequest) -> ModelRegistry:
    return ModelRegistry(f"policy-{request.node.name}", uri)


def register(registry: ModelRegistry, uri: str, folder: Path, **tags: str) -> str:
    """A new version, as a run registers it."""
    tracker = open_tracker(parse_run(RUN, {"tracking.uri": uri, "storage.path": str(folder.parent)}))
    tracker.start("a", {})
    number = str(tracker.register(str(folder), registry.name, {"run_folder": str(folder), **tags}))
    tracker.finish("completed")
    return number


def record(run_folder: Path, found: dict[str, Any]) -> Path:
    path = run_folder / "evaluation/evaluation.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return path


def aliases(registry: ModelRegistry) -> dict[str, str]:
    return {alias: version.number for version in registry.versions() for alias in version.aliases}


def tags_of(registry: ModelRegistry, number: str) -> dict[str, str]:
    return next(version.tags for version in registry.versions() if version.number == number)


def test_the_newest_version_is_the_challenger_and_carries_its_lineage(
    registry: ModelRegistry, uri: str, tmp_path: Path, tiny_model: Path
):
    summary = {"data_fingerprint": "d1", "reference_fingerprint": None}
    made_from = lineage(parse_run(RUN), str(tmp_path), str(tiny_model), summary, {})
    assert made_from.keys() == {"data_fingerprint", "model_fingerprint", "run_folder", "labels"}
    assert (made_from["labels"], made_from["run_folder"]) == ("a.jsonl, b.jsonl", str(tmp_path))
    register(registry, uri, tmp_path)
    assert aliases(registry) == {"challenger": "1"}, "the first is no champion yet"
    register(registry, uri, tmp_path, **made_from)
    assert aliases(registry) == {"challenger": "2"}
    assert tags_of(registry, "2") == made_from


def test_a_registered_model_is_evaluated_by_its_alias(
    registry: ModelRegistry, uri: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    """`dpo-ray evaluate RUN --against models:/NAME@champion`: its weights are those that `promote` asks for."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    register(registry, uri, tiny_model)
    found = model_of(f"models:/{registry.name}@challenger")
    assert weights_fingerprint(found) == weights_fingerprint(ModelSource(str(tiny_model)))
    with pytest.raises(InputError, match=r"models:/nobody@champion is not in the registry"):
        model_of("models:/nobody@champion")


def test_labels_of_an_acquisition_are_named_and_remote_weights_have_no_fingerprint(tmp_path: Path):
    found = lineage(parse_run(RUN), "s3://b/a", "s3://b/a/model", {}, {LABELS_TAG: "runs/acq/labels.jsonl, round 3"})
    assert found == {"run_folder": "s3://b/a", "labels": "runs/acq/labels.jsonl, round 3"}


def test_equal_weights_have_one_fingerprint_and_others_another(tmp_path: Path, tiny_model: Path):
    def of(folder: Path) -> str:
        return lineage(parse_run(RUN), "r", str(folder), {}, {})["model_fingerprint"]

    shutil.copytree(tiny_model, tmp_path / "copy")
    assert of(tmp_path / "copy") == of(tiny_model)
    config = json.loads((tmp_path / "copy/config.json").read_text())
    (tmp_path / "copy/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert of(tmp_path / "copy") != of(tiny_model)


def test_champions_follow_one_another(registry: ModelRegistry, uri: str, tmp_path: Path):
    for number in ("1", "2", "3"):
        register(registry, uri, tmp_path / number, model_fingerprint=f"weights-{number}")
    record(tmp_path / "1", evaluation(entry(0.6), number="1"))
    assert promote(registry, number="1")["former"] is None
    assert aliases(registry) == {"champion": "1", "challenger": "3"}

    record(tmp_path / "2", evaluation(entry(0.4, 0.6, "old")))
    with pytest.raises(InputError, match=r"version 2 of .* stays as it is: .* 50.0% \(40.0% to 60.0%\): it includes"):
        promote(registry, number="2")
    assert aliases(registry) == {"champion": "1", "challenger": "3"}
    assert "promoted_at" not in tags_of(registry, "2")

    record(tmp_path / "2", evaluation(entry(0.55, 0.75, "old")))
    done = promote(registry, number="2")
    assert (done["version"], done["former"], done["forced"]) == ("2", "1", "false")
    assert aliases(registry) == {"champion": "2", "previous_champion": "1", "challenger": "3"}
    tags = tags_of(registry, "2")
    assert {name: tags[name] for name in ("low", "high", "judge", "num_prompts", "forced", "reason")} == {
        **{"low": "0.55", "high": "0.75", "judge": "function:f", "num_prompts": "200"},
        **{"forced": "false", "reason": ""},
    }
    assert float(tags["win_rate"]) == pytest.approx(0.65)
    assert tags["promoted_at"].endswith("+00:00")
    with pytest.raises(InputError, match=r"version 2 of .* is the champion already"):
        promote(registry, number="2")

    # The challenger was compared with version 1, which is the champion no more.
    record(tmp_path / "3", evaluation(entry(0.9, 0.95, "old"), number="3"))
    with pytest.raises(InputError, match="no win rate against the champion, version 2 is recorded"):
        promote(registry)


def test_force_needs_no_comparison_and_writes_down_why(registry: ModelRegistry, uri: str, tmp_path: Path):
    register(registry, uri, tmp_path, model_fingerprint="weights-1")
    with pytest.raises(InputError, match="no comparison is recorded"):
        promote(registry)
    promote(registry, reason="a hot fix")
    assert aliases(registry) == {"champion": "1", "challenger": "1"}
    tags = tags_of(registry, "1")
    assert (tags["forced"], tags["reason"], tags["win_rate"]) == ("true", "a hot fix", "")
    assert listing(registry)[0]["win_rate"] is None

    register(registry, uri, tmp_path, model_fingerprint="weights-2")
    record(tmp_path, evaluation(entry(0.2, 0.4, "old")))
    promote(registry, reason="another one")
    assert float(tags_of(registry, "2")["win_rate"]) == pytest.approx(0.3), "what was known is kept"

    # Back to the first, now by a comparison: what forced it before is gone.
    back = evaluation(entry(0.6, 0.7, "new"), number="1")
    back["against"] = [{"name": "new", "path": None, "fingerprint": "weights-2"}]
    record(tmp_path, back)
    promote(registry, number="1")
    tags = tags_of(registry, "1")
    assert (tags["forced"], tags["reason"], tags["low"]) == ("false", "", "0.6")
    assert aliases(registry) == {"champion": "1", "previous_champion": "2", "challenger": "2"}


def test_another_file_may_hold_the_comparison(registry: ModelRegistry, uri: str, tmp_path: Path):
    register(registry, uri, tmp_path, model_fingerprint="weights-1")
    path = record(tmp_path / "elsewhere", evaluation(entry(0.6), number="1"))
    with pytest.raises(InputError, match=r"no such file: .*/missing\.json"):
        promote(registry, evaluation=tmp_path / "missing.json")
    for content, message in (("{", "is not JSON"), ("[]", "holds no object")):
        (tmp_path / "broken.json").write_text(content)
        with pytest.raises(InputError, match=f"broken.json {message}"):
            promote(registry, evaluation=tmp_path / "broken.json")
    assert promote(registry, evaluation=path)["version"] == "1"


def test_versions_and_models_that_are_not_there_are_named(registry: ModelRegistry, uri: str, tmp_path: Path):
    with pytest.raises(InputError, match=f"registered model {registry.name} at sqlite"):
        promote(registry)
    register(registry, uri, tmp_path)
    with pytest.raises(InputError, match="has no version 9; it has 1"):
        promote(registry, number="9")
    MlflowClient(tracking_uri=uri).delete_registered_model_alias(registry.name, "challenger")
    with pytest.raises(InputError, match="no version with the alias `challenger`: name one with --version"):
        promote(registry)


def test_the_command_promotes_lists_and_refuses_in_one_line(
    uri: str, tmp_path: Path, registry: ModelRegistry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    register(registry, uri, tmp_path, model_fingerprint="weights-1", data_fingerprint="d1", labels="a.jsonl")

    def run(*arguments: str) -> tuple[int, str, str]:
        done = CliRunner().invoke(app, ["promote", registry.name, *arguments], env={"COLUMNS": "200"})
        return done.exit_code, done.stdout, done.stderr

    code, _, told = run()
    assert code == 2
    assert told.startswith("error: version 1 of")
    assert told.count("\n") == 1
    assert run("--force")[0] == run("--reason", "x")[0] == 2
    record(tmp_path, evaluation(entry(0.6, 0.7), number="1"))
    assert run("--version", "1")[0] == 0
    code, table, _ = run("--list")
    assert code == 0
    for cell in ("challenger, champion", "65.0% (60.0% to 70.0%)", "d1", "a.jsonl"):
        assert cell in table
