"""A recipe is closed and typed: what is misspelt, misplaced or unread is found."""

import ast
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from dpo_ray.config import DpoConfig, RunConfig, load_run, parse_override, parse_run, recipe_keys, recipe_schema
from dpo_ray.errors import InputError
from dpo_ray.losses import LOSSES
from dpo_ray.recipe_reference import recipe_reference

ROOT = Path(__file__).parent.parent.parent


def tree(**sections: Any) -> dict[str, Any]:
    return {"name": "a", "model": {"path": "m"}, "data": {"sources": [{"path": "d.jsonl"}, {"path": "e"}]}, **sections}


def overridden(*texts: str) -> RunConfig:
    return parse_run(tree(), dict(parse_override(text) for text in texts))


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("loss.betta", "loss.beta"),
        ("optim.lr_schedule", "optim.schedule"),
        ("data.sources.1.colums", "data.sources.*.columns"),
        ("trainn", "train"),
        ("batch.learning_rate", "optim.learning_rate"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, nearest: str):
    with pytest.raises(InputError) as caught:
        parse_run(tree(), {key: 1})
    assert str(caught.value) == f"unknown key `{key}`; did you mean `{nearest}`?"


def test_an_option_that_the_loss_ignores_is_an_error():
    with pytest.raises(InputError, match=r"`loss\.beta` is not an option of loss\.kind: sft"):
        parse_run(tree(loss={"kind": "sft", "beta": 0.1}))


def test_a_loss_without_a_kind_is_dpo():
    loss = parse_run(tree(loss={"beta": 0.3})).loss
    assert loss == DpoConfig(beta=0.3)


def test_sft_is_judged_by_its_loss_unless_the_recipe_says_otherwise():
    assert parse_run(tree(loss={"kind": "sft"})).best_metric == "loss"
    assert parse_run(tree(loss={"kind": "sft"}, early_stopping=None)).best_metric == "loss"
    assert parse_run(tree(loss={"kind": "sft"}, early_stopping={"metric": "kl"})).best_metric == "kl"
    assert parse_run(tree(early_stopping=None)).best_metric == "rewards/accuracies"


def test_overrides_mean_what_they_mean_in_yaml():
    run = overridden(
        "optim.learning_rate=5e-7",
        "optim.betas=[0.8, 0.99]",
        "early_stopping=null",
        "model.lora={rank: 4, targets: [q_proj, v_proj]}",
        "data.sources.1.path=f.jsonl",
        "engine.offload_optimizer=true",
        "name=b=c",
    )
    assert run.optim.learning_rate == 5e-7
    assert run.optim.betas == (0.8, 0.99)
    assert run.early_stopping is None
    assert run.model.lora is not None
    assert (run.model.lora.rank, run.model.lora.targets) == (4, ("q_proj", "v_proj"))
    assert [source.path for source in run.data.sources] == ["d.jsonl", "f.jsonl"]
    assert run.engine.offload_optimizer is True
    assert run.name == "b=c"


def test_a_sweep_gets_a_number_where_yaml_reads_text():
    assert parse_override("optim.learning_rate=5e-7") == ("optim.learning_rate", 5e-7)
    assert parse_override("model.path=org/name") == ("model.path", "org/name")


def test_an_override_goes_below_a_section_that_is_null():
    assert parse_run(tree(model={"path": "m", "lora": None}), {"model.lora.rank": 8}).model.lora.rank == 8


def test_overriding_leaves_the_recipe_as_it_was():
    recipe = tree()
    parse_run(recipe, {"data.sources.0.path": "other", "loss.beta": 0.5})
    assert recipe == tree()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.sources.2.path=x", "has 2 items"),
        ("data.sources.first.path=x", "has 2 items"),
        ("name.first=x", "`first` lies below a single value"),
        ("loss.beta", "expected key=value"),
        ("=3", "expected key=value"),
        ("loss.beta=0", "`loss.beta`: Input should be greater than 0, got 0"),
        ("loss.kind=ppo", "`loss`"),
        ("data.sources=[]", "`data.sources`"),
        ("data.sources.0.weight=0.5", "give `weight` to every source or to none"),
        ("engine={zero_stage: 0, offload_optimizer: true}", "offload_optimizer needs zero_stage"),
        ("loss={kind: ipo, margin_weight: 1}", "`loss.margin_weight` is not an option of loss.kind: ipo"),
        ("loss={kind: aot, wpo: true}", "`loss.wpo` is not an option of loss.kind: aot"),
        ("loss={kind: simpo, ld_alpha: 0.5}", "`loss.ld_alpha` is not an option of loss.kind: simpo"),
        ("loss={kind: sum, losses: [{kind: dpo}, {kind: sft}], weights: [1]}", "2 losses have 1 weights"),
        ("loss={kind: sum, losses: [{kind: sft}, {kind: dpo}], weights: [1, 1]}", "`sft` has none"),
        (
            "loss={kind: sum, losses: [{kind: dpo}, {kind: sft, gamma: 2}], weights: [1, 1]}",
            "`loss.losses.1.gamma` is not an option of loss.kind: sft",
        ),
        (
            "loss={kind: sum, losses: [{kind: dpo, betta: 2}, {kind: sft}], weights: [1, 1]}",
            "unknown key `loss.losses.0.betta`; did you mean `loss.losses.*.beta`?",
        ),
        ("name=../up", "`name`"),
        ("model=null", "`model`"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_its_key(override: str, message: str):
    with pytest.raises(InputError) as caught:
        overridden(override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_required_is_named():
    with pytest.raises(InputError, match=r"`model` is required"):
        parse_run({"name": "a", "data": {"sources": [{"path": "d"}]}})


@pytest.mark.parametrize("content", [None, "a: [1", "- a\n- b\n", "", "\x00"])
def test_a_file_that_is_no_recipe_is_named(tmp_path: Path, content: str | None):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError) as caught:
        load_run(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_shipped_recipe_loads():
    recipes = sorted((ROOT / "dpo_ray" / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert load_run(path).name


def models(model: type[BaseModel]) -> set[type[BaseModel]]:
    """A section's model and all below it."""
    found = {model}
    waiting = [field.annotation for field in model.model_fields.values()]
    while waiting:
        annotation = waiting.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            found |= models(annotation)
        else:
            waiting += getattr(annotation, "__args__", ())
    return found


def test_every_field_is_read_somewhere():
    """By name, as an attribute, outside the schema itself (its properties do count: they are for readers).

    The options of a loss are handed to its function as they are, so there they are keyword-only parameters.
    """
    fields = {f"{model.__name__}.{name}" for model in models(RunConfig) for name in model.model_fields}
    read: set[str] = set()
    for path in (ROOT / "dpo_ray").rglob("*.py"):
        body: list[ast.AST] = [ast.parse(path.read_text())]
        if path.name == "config.py":
            functions = [node for node in ast.walk(body[0]) if isinstance(node, ast.FunctionDef)]
            body = [f for f in functions if "property" in map(ast.unparse, f.decorator_list)]
        nodes = [node for part in body for node in ast.walk(part)]
        if path.name == "losses.py":
            read |= {a.arg for n in nodes if isinstance(n, ast.FunctionDef) for a in n.args.kwonlyargs}
        read |= {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    assert not sorted(field for field in fields if field.partition(".")[2] not in read)


def test_every_field_says_what_it_is():
    silent = [
        f"{model.__name__}.{name}"
        for model in models(RunConfig) - {RunConfig}
        for name, field in model.model_fields.items()
        if not field.description
    ]
    assert not silent


def test_the_page_of_keys_is_the_schema():
    assert (ROOT / "docs" / "recipe.md").read_text() == recipe_reference(), "run `make docs`"


def test_the_page_has_every_key():
    page = recipe_reference()
    again = ("data.eval.sources.*.", "evaluate.prompts.*.", "evaluate.retention.sources.*.")  # keys of data.sources
    missing = [key for key in recipe_keys() if f"`{key}`" not in page and not key.startswith(again)]
    assert not missing
    for row in (
        "| `loss.beta` | `0.1` | number, > 0 | Weight of the implicit KL penalty",
        "| `optim.learning_rate` | `5.0e-7` | number, > 0 |",
        "| `optim.betas` | `[0.9, 0.95]` | list of 2 numbers |",
        "| `train.max_steps` | `null` | integer or `null`, >= 1 |",
        "| `engine.zero_stage` | `2` | `0`, `1`, `2`, `3` |",
        "| `model.path` | required | text |",
    ):
        assert row in page


def test_the_json_schema_is_closed():
    schema = recipe_schema()
    assert schema["additionalProperties"] is False
    assert {"name", "model", "data"} == set(schema["required"])


def test_a_shipped_recipe_is_found_by_its_name():
    assert load_run(Path("hh-rlhf"), {"loss.beta": 0.3}).data.sources[0].path == "Anthropic/hh-rlhf"


@pytest.mark.parametrize(
    "loss", [{"kind": kind} for kind in LOSSES] + [{"f_divergence": "alpha_divergence", "f_alpha": 2}]
)
def test_a_resolved_recipe_loads_again(loss: dict[str, Any]):
    """As `resume`, `evaluate` and `export` do."""
    run = parse_run({"name": "a", "model": {"path": "m"}, "data": {"sources": [{"path": "p.jsonl"}]}, "loss": loss})
    assert parse_run(yaml.safe_load(yaml.safe_dump(run.model_dump(mode="json")))) == run


def test_the_order_of_a_divergence_that_has_none_is_an_error():
    tree = {"name": "a", "model": {"path": "m"}, "data": {"sources": [{"path": "p.jsonl"}]}, "loss": {"f_alpha": 0.5}}
    with pytest.raises(InputError, match=r"`loss`: f_alpha goes with f_divergence: alpha_divergence"):
        parse_run(tree)
