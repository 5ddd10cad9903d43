"""Spaces: what ships, what users write, and the trials that come of it."""

from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import RunConfig, parse_run
from dpo_ray.errors import InputError
from dpo_ray.space import SHIPPED, Choice, Range, Space, Trial, at_random, extremes, grid, label_of, load_space

TREE: dict[str, Any] = {
    "name": "run",
    "model": {"path": "none"},
    "data": {"sources": [{"path": "data/harmless/train.jsonl"}, {"path": "data/helpful/train.jsonl"}]},
    "train": {"seed": 7},
}


@pytest.fixture
def run() -> RunConfig:
    return parse_run(TREE)


def write(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_trial_of_a_shipped_space_is_a_recipe(name: str, run: RunConfig):
    space = load_space(name, run)
    assert space.name == name
    assert space.question.endswith(".") or "?" in space.question
    assert space.objectives == [("rewards/accuracies", "max")]
    trials = at_random(space, 20)
    assert len({trial.id for trial in trials}) == len(trials) > 1
    for trial in trials:
        parsed = parse_run(TREE, trial.overrides)
        assert parsed.train.seed == trial.seed
        assert set(trial.labels) == set(trial.settings)


def test_a_grid_has_every_combination_once_seed_by_seed(tmp_path: Path, run: RunConfig):
    text = "space: {loss.beta: [0.1, 0.2, 0.3], data.fraction: [0.5, 1.0], train.seed: [3, 4]}"
    trials = grid(load_space(write(tmp_path, text), run))
    points = [(t.seed, t.settings["loss.beta"], t.settings["data.fraction"]) for t in trials]
    assert points == [(seed, beta, share) for seed in (3, 4) for beta in (0.1, 0.2, 0.3) for share in (0.5, 1.0)]
    assert [trial.number for trial in trials] == list(range(12))


def test_a_space_without_a_seed_takes_the_recipes(tmp_path: Path, run: RunConfig):
    path = write(tmp_path, "loss.beta: [0.1, 0.2]")
    assert load_space(path, run).seeds == [7]
    assert load_space(path, run, num_seeds=3).seeds == [7, 8, 9]


def test_ranges_are_drawn_within_their_bounds_and_repeatably(tmp_path: Path, run: RunConfig):
    text = """
    optim.learning_rate: {loguniform: [1.0e-7, 1.0e-3]}
    loss.beta: {uniform: [0.1, 0.2]}
    model.lora.rank: {int: [2, 4]}
    """
    space = load_space(write(tmp_path, text), run)
    trials = at_random(space, 300, random_seed=1)
    rates = sorted(trial.settings["optim.learning_rate"] for trial in trials)
    assert 1e-7 <= rates[0] < 1e-6
    assert 1e-4 < rates[-1] <= 1e-3
    assert 1e-6 < rates[150] < 1e-4  # the middle of the logarithms, 1e-5
    assert all(0.1 <= trial.settings["loss.beta"] <= 0.2 for trial in trials)
    assert {trial.settings["model.lora.rank"] for trial in trials} == {2, 3, 4}
    assert trials == at_random(space, 300, random_seed=1)
    assert trials != at_random(space, 300, random_seed=2)


def test_a_random_search_takes_no_point_twice(tmp_path: Path, run: RunConfig):
    space = load_space(write(tmp_path, "loss.beta: [0.1, 0.2, 0.3]\ntrain.seed: [0, 1]"), run)
    trials = at_random(space, 50)
    assert len(trials) == 6
    assert {trial.settings["loss.beta"] for trial in trials} == {0.1, 0.2, 0.3}


def test_mixtures_are_each_source_alone_and_all_together(run: RunConfig):
    values = load_space("mixture", run).settings["data.sources"]
    assert isinstance(values, list)
    weights = {choice.label: [source["weight"] for source in choice.value] for choice in values}
    assert weights == {
        "only harmless/train.jsonl": [1.0, 0.0],
        "only helpful/train.jsonl": [0.0, 1.0],
        "all, equal shares": [1.0, 1.0],
        "all, by size": [None, None],
    }


def test_what_trials_may_read_is_known_beforehand(tmp_path: Path, run: RunConfig):
    space = load_space(write(tmp_path, "data.fraction: {uniform: [0.2, 0.9]}\nloss.beta: [0.1, 0.2]"), run)
    assert list(extremes(space, {"data"})) == [
        {"data.fraction": 0.9, "loss.beta": 0.1},
        {"data.fraction": 0.2, "loss.beta": 0.1},
    ]
    assert len(list(extremes(space, {"data", "loss"}))) == 4


def test_equal_settings_and_seed_have_an_equal_id():
    first = Trial(0, {"loss.beta": 0.1, "data.fraction": 1.0}, {}, 0)
    assert first.id == first._replace(settings={"data.fraction": 1.0, "loss.beta": 0.1}).id
    others = [first._replace(seed=1), first._replace(settings={"loss.beta": 0.2}), first._replace(confirms="000-x")]
    assert len({first.id, *(other.id for other in others)}) == 4


def test_user_spaces_from_a_module(tmp_path: Path, run: RunConfig, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ours_of_test.py").write_text(
        '"""Which one?"""\nRATES = {"optim.learning_rate": [1e-6, 1e-5]}\nMETRIC = "kl"\nMODE = "min"\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    space = load_space("ours_of_test:RATES", run)
    assert space == Space(
        "rates",
        {"optim.learning_rate": [Choice(1e-6, "1e-06"), Choice(1e-5, "1e-05")]},
        [7],
        [("kl", "min")],
        "Which one?",
    )


def test_objectives_may_be_given_with_their_direction(tmp_path: Path, run: RunConfig):
    path = write(tmp_path, "loss.beta: [0.1, 0.2]")
    assert load_space(path, run, ["eval/rewards/margins", "kl:max"]).objectives == [
        ("rewards/margins", "max"),
        ("kl", "max"),
    ]


def test_labels_are_short():
    assert label_of(1e-06) == "1e-06"
    assert label_of({"kind": "dpo", "beta": 0.1}) == "dpo beta=0.1"
    assert label_of(None) == "null"
    assert label_of("adam") == "adam"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("loss.betas: [1]", "no recipe key `loss.betas`"),
        ("loss.beta: 0.1", "`loss.beta` needs a list of values or a range"),
        ("loss.beta: []", "`loss.beta` needs a list"),
        ("loss.beta: {loguniform: [0, 1]}", "needs bounds above 0"),
        ("loss.beta: {uniform: [2, 1]}", "`loss.beta` is no range"),
        ("loss.beta: {gauss: [1, 2]}", "`loss.beta` is no range"),
        ("loss.beta: {uniform: 3}", "`loss.beta` is no range"),
        ("loss.beta: {mixtures: singles_and_all}", "is a value of `data.sources`"),
        ("train.seed: {int: [1, 3]}", "`train.seed` is a list"),
        ("train.seed: [1]", "varies nothing"),
        ("[1, 2]", "maps no recipe keys"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_wrong_space_is_told_by_its_key(tmp_path: Path, run: RunConfig, text: str, told: str):
    with pytest.raises(InputError, match=told.replace("[", r"\[")):
        load_space(write(tmp_path, text), run)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("betas", "no space `betas`: one of beta, "),
        ("nowhere.yaml", "no space at nowhere.yaml"),
        ("no_such_module:SPACE", "no space no_such_module:SPACE: No module"),
        ("tune_spaces.beta:OTHER", "no space tune_spaces.beta:OTHER"),
    ],
)
def test_a_space_that_is_not_there_is_told(run: RunConfig, name: str, told: str):
    with pytest.raises(InputError, match=told):
        load_space(name, run)


def test_a_grid_of_a_range_and_an_unknown_metric_are_told(tmp_path: Path, run: RunConfig):
    with pytest.raises(InputError, match=r"`loss\.beta` is a range: a grid needs a list"):
        grid(Space("s", {"loss.beta": Range("uniform", 0, 1)}, [0], [], ""))
    with pytest.raises(InputError, match="no metric `accuracy`"):
        load_space("beta", run, ["accuracy"])
    with pytest.raises(InputError, match="`min` or `max`"):
        load_space("beta", run, ["kl:low"])


def test_mixtures_need_two_sources():
    one = parse_run(TREE | {"data": {"sources": [{"path": "a"}]}})
    with pytest.raises(InputError, match=r"at least two `data\.sources`"):
        load_space("mixture", one)
