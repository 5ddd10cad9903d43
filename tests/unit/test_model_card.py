"""The card says what the model is, what was measured and what was not; it gives nothing away."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpo_ray.config import RunConfig, parse_run
from dpo_ray.model_card import card_of, metrics_at, model_card, step_of, write_model_card
from dpo_ray.models import ModelSource, weights_fingerprint
from dpo_ray.storage import Folder
from tests.unit.runs import DATA, RECIPE, SUMMARY, evaluation, recipe, write_run

WIN = "Against base, judged by function:demo, it wins 61.3% (54.0% to 68.0%) of 200 prompts: it is better."


def run(**sections: Any) -> RunConfig:
    return parse_run(RECIPE | sections)


def front(card: str) -> dict[str, Any]:
    found = re.match(r"---\n(.*?)---\n\n# ", card, re.DOTALL)
    assert found is not None
    tree: dict[str, Any] = yaml.safe_load(found[1])
    return tree


def part(card: str, title: str) -> str:
    return card.partition(f"## {title}\n\n")[2].partition("\n## ")[0]


def test_the_front_matter_is_that_of_the_hub():
    card = model_card(run(), SUMMARY, DATA)
    assert front(card) == {
        "library_name": "transformers",
        "base_model": "org/base-model",
        "base_model_relation": "finetune",
        "datasets": ["org/helpful-pairs"],
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "dpo-ray"],
        "dpo_ray": {"run": "hh", "step": 40},
    }
    hub = pytest.importorskip("huggingface_hub")
    assert hub.ModelCard(card).data.base_model == "org/base-model"


def test_an_adapter_says_so():
    card = model_card(run(model={"path": "org/base-model", "lora": {"rank": 8}}), SUMMARY, DATA)
    assert front(card)["library_name"] == "peft"
    assert front(card)["base_model_relation"] == "adapter"
    assert "from peft import AutoPeftModelForCausalLM" in part(card, "How to load it")
    assert "| `model.lora.rank` | 8 |" in part(card, "Recipe")


def test_what_lies_on_a_disk_is_named_by_its_last_part_alone():
    sources = [{"path": "/home/ada/private/pairs.jsonl"}]
    local = run(model={"path": "/home/ada/models/tiny"}, data={"sources": sources})
    card = model_card(local, SUMMARY, DATA | {"sources": [DATA["sources"][1] | {"path": sources[0]["path"]}]})
    assert "base_model" not in front(card)
    assert "datasets" not in front(card)
    assert "ada" not in card
    assert "`tiny`" in card
    assert "| pairs.jsonl | 100 | 100 | 0 |" in part(card, "Training data")


def test_no_password_is_in_the_card():
    card = model_card(run(), SUMMARY, DATA, evaluation())
    assert "secret" not in card
    assert "s3://***@bucket/more.jsonl" in part(card, "Training data")


def test_no_text_of_the_data_is_in_the_card():
    found = evaluation()
    bad = [DATA["sources"][0] | {"bad_rows": ["a.jsonl:7: a private text"]}]
    card = model_card(run(), SUMMARY, DATA | {"sources": bad}, found)
    assert "private text" not in card
    assert not any(example[side] in card for example in found["examples"] for side in ("prompt", "before", "after"))


def test_a_name_can_not_break_the_tables():
    source = DATA["sources"][0] | {"path": "s3://bucket/a|b\n# <script>"}
    found = part(model_card(run(), SUMMARY, DATA | {"sources": [source]}), "Training data")
    assert "| s3://bucket/a\\|b # &lt;script> | 4200 | 4140 | 300 |" in found


def test_data_and_recipe_are_told():
    card = model_card(run(), SUMMARY, DATA)
    assert "trained with `dpo` (beta 0.05) on 3900 preference pairs; checkpoint of step 40 of 60." in card
    assert "3900 pairs (1200000 tokens) were trained on. 300 pairs (90000 tokens) were held out." in card
    assert "Fingerprint of the data, as encoded: `da7a`." in card
    for row in ("| `loss.beta` | 0.05 |", "| `optim.learning_rate` | 1e-06 |", "| `data.max_tokens` | 2048 |"):
        assert row in part(card, "Recipe")
    assert "storage" not in part(card, "Recipe")
    assert "tracking" not in part(card, "Recipe")


@pytest.mark.parametrize(
    ("step", "accuracy"), [(40, "0.68 (0.62 to 0.73)"), (60, "0.63 (0.57 to 0.68)"), (20, None), (None, "0.68 (0.62")]
)
def test_metrics_are_those_of_this_step_or_none(step: int | None, accuracy: str | None):
    card = model_card(run(), SUMMARY, DATA, step=step)
    found = part(card, "Held-out pairs")
    assert front(card)["dpo_ray"]["step"] == (step or 40)
    if accuracy is None:
        assert found.strip() == "Not evaluated at this step."
        assert "implicit reward is right" not in card
    else:
        assert f"| rewards/accuracies | {accuracy}" in found


def test_without_a_summary_nothing_is_claimed():
    card = model_card(run(), None, None, step=7)
    assert "checkpoint of step 7." in card
    assert "Not evaluated at this step." in card
    assert metrics_at({}, None) == {}


def test_the_evaluation_is_told_with_its_intervals():
    found = part(model_card(run(), SUMMARY, DATA, evaluation()), "Evaluation")
    assert f"- {WIN}" in found
    assert "Perplexity on books: 12.1 before, 12.6 after" in found
    assert "- KL to the reference: 3.2 (2.9 to 3.5) nats per response, from 400 of its own." in found
    assert "`dpo-ray evaluate` does" in part(model_card(run(), SUMMARY, DATA), "Evaluation")


def test_limits_follow_from_what_is_known():
    limits = part(model_card(run(), SUMMARY, DATA), "Intended use and limits")
    for told in (
        "trained on 3900 pairs",
        "is right in 68.0% (62.0% to 73.0%).",
        "has not been measured",
        "the longer one in 62.0%",
        "7 pairs of the data say the opposite",
        "at step 40: likelihood displacement.",
        "Safety, facts and bias have not been evaluated.",
    ):
        assert told in limits
    best = SUMMARY["best_eval"] | {"rewards/accuracies_low": 0.49}
    unsure = part(model_card(run(), SUMMARY | {"best_eval": best}, DATA, evaluation()), "Intended use and limits")
    assert "not distinguishable from guessing" in unsure
    assert "has not been measured" not in unsure, "the evaluation has win rates and retention"


@pytest.fixture
def finished(tmp_path: Path, tiny_model: Path) -> Path:
    """A run folder with a model, a card of step 40 and an evaluation of another model."""
    folder = write_run(tmp_path / "hh", evaluated=evaluation())
    shutil.copytree(tiny_model, folder / "model")
    place = Folder(str(folder))
    (folder / "model/README.md").write_text(card_of(place, parse_run(recipe()), place / "model", SUMMARY, 40))
    return folder


def test_an_evaluation_is_told_only_of_the_weights_it_is_of(finished: Path):
    card = finished / "model/README.md"
    assert WIN not in card.read_text(), "it is of another model"
    found = evaluation() | {"model_fingerprint": weights_fingerprint(ModelSource(str(finished / "model")))}
    (finished / "evaluation/evaluation.json").write_text(json.dumps(found))
    assert write_model_card(str(finished)) == str(card)
    assert WIN in card.read_text()


def test_a_card_that_is_written_again_keeps_its_step(finished: Path):
    place = Folder(str(finished))
    card = finished / "model/README.md"
    card.write_text(card_of(place, parse_run(recipe()), place / "model", SUMMARY, 20))
    write_model_card(str(finished))
    assert step_of(card.read_text()) == 20
    card.unlink()
    write_model_card(str(finished))
    assert step_of(card.read_text()) == 40, "the best one"


@pytest.mark.parametrize("card", ["", "# a card\n", "---\nlicense: mit\n---\n", "---\n\n---\n", "---\na: [\n---\n"])
def test_a_card_of_someone_else_has_no_step(card: str):
    assert step_of(card) is None
