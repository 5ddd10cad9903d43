"""What sets recipes apart, and nothing else."""

from dpo_ray.recipe_diff import between, flat, from_defaults
from tests.unit.runs import recipe


def test_only_what_a_recipe_sets_differs_from_the_defaults():
    found = {key: (value, default) for key, value, default in from_defaults(recipe())}
    assert found == {
        "name": ("hh", "required"),
        "model.path": ("org/base-model", "required"),
        "data.sources.0.path": ("org/helpful-pairs", "required"),
        "data.sources.1.path": ("s3://bucket/more.jsonl", "required"),
        "data.max_tokens": (2048, 1024),
        "loss.beta": (0.05, 0.1),
        "optim.learning_rate": (1e-6, 5e-7),
    }


def test_the_defaults_are_those_of_the_loss():
    """The beta of IPO is no difference to DPO's recipe; a loss that this version does not know is one."""
    keys = [key for key, _, _ in from_defaults(recipe(loss={"kind": "simpo"}))]
    assert [key for key in keys if key.startswith("loss.")] == ["loss.kind"]
    unknown = {**recipe(), "loss": {"kind": "later", "gamma": 2}}
    found = {key: (value, default) for key, value, default in from_defaults(unknown)}
    assert found["loss.kind"] == ("later", "dpo")
    assert found["loss.gamma"] == (2, None)


def test_a_section_that_is_turned_off_is_a_difference():
    found = {key: (value, default) for key, value, default in from_defaults(recipe(early_stopping=None))}
    value, default = found["early_stopping"]
    assert value is None
    assert default["metric"] == "rewards/accuracies"


def test_between_recipes_only_what_is_not_the_same_in_all():
    one, two = recipe(), recipe(name="b", loss={"kind": "dpo", "beta": 0.3})
    assert between([one, two]) == [("name", ["hh", "b"]), ("loss.beta", [0.05, 0.3])]
    assert between([one, one]) == []


def test_a_further_source_differs_by_its_path_alone():
    sources = [{"path": "org/helpful-pairs"}]
    one, two = recipe(), recipe(data={"sources": sources, "max_tokens": 2048})
    assert between([one, two]) == [("data.sources.1.path", ["s3://bucket/more.jsonl", None])]


def test_a_source_of_held_out_pairs_has_the_defaults_of_a_source():
    sources = [{"path": "org/helpful-pairs"}, {"path": "s3://bucket/more.jsonl"}]
    held_out = {"sources": [{"path": "org/test-pairs"}]}
    one, two = recipe(), recipe(data={"sources": sources, "max_tokens": 2048, "eval": held_out})
    assert [key for key, _ in between([one, two])] == ["data.eval.sources.0.path"]
    assert "data.eval.sources.0.format" not in [key for key, _, _ in from_defaults(two)]


def test_a_key_that_an_older_recipe_lacks_differs_only_from_other_values_than_the_default():
    old = recipe()
    del old["optim"]["eps"]
    assert between([old, recipe()]) == []
    assert between([old, recipe(optim={"learning_rate": 1e-6, "eps": 1e-6})]) == [("optim.eps", [None, 1e-6])]


def test_flat_names_items_of_sections_and_keeps_plain_lists():
    assert flat({"a": {"b": [1, 2]}, "c": [{"d": 1}, {"d": 2}], "e": {}, "f": []}) == {
        "a.b": [1, 2],
        "c.0.d": 1,
        "c.1.d": 2,
        "e": {},
        "f": [],
    }
