"""Search spaces: which settings of a recipe vary, over which values; from a declaration to the trials of a study.

A declaration maps dotted recipe keys to a list of values or to a range: `{loguniform: [1e-7, 1e-5]}`, `{uniform: ...}`
or `{int: ...}`. `train.seed` is taken apart from the others: trials that differ in it alone are one configuration. The
value `{mixtures: singles_and_all}` of `data.sources` stands for each source of the recipe alone and for all together.
"""

import hashlib
import importlib
import itertools
import json
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import yaml

from dpo_ray.config import RunConfig, recipe_keys
from dpo_ray.errors import InputError
from dpo_ray.metrics import METRICS, OBJECTIVES

SEED = "train.seed"
MIXTURES = "singles_and_all"
SHIPPED = ("beta", "beta_and_lr", "data_size", "mixture", "loss_family", "lora")


class Choice(NamedTuple):
    """One value of a setting, and how tables and pictures call it."""

    value: Any
    label: str


class Range(NamedTuple):
    """Numbers from `low` to `high`, both included."""

    kind: str
    """`uniform`, `loguniform` or `int`."""
    low: float
    high: float

    def draw(self, chance: random.Random) -> float | int:
        if self.kind == "int":
            return chance.randint(int(self.low), int(self.high))
        if self.kind == "uniform":
            return chance.uniform(self.low, self.high)
        return math.exp(chance.uniform(math.log(self.low), math.log(self.high)))


class Space(NamedTuple):
    """What a study varies, and what it looks for."""

    name: str
    settings: dict[str, list[Choice] | Range]
    """By dotted key; without `train.seed`."""
    seeds: list[int]
    objectives: list[tuple[str, str]]
    """Metric (without `eval/`) and `max` or `min`; the first one ranks and stops trials."""
    question: str


class Trial(NamedTuple):
    """One run of a study."""

    number: int
    settings: dict[str, Any]
    """Dotted key -> value."""
    labels: dict[str, str]
    seed: int
    confirms: str | None = None
    """Id of a trial with the same settings, which this one repeats with a fresh seed."""

    @property
    def key(self) -> str:
        """Equal for equal settings and seed, so that a study that is taken up again finds its runs."""
        content = json.dumps([self.settings, self.seed, self.confirms is not None], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=4).hexdigest()

    @property
    def id(self) -> str:
        """The name of its run."""
        return f"{self.number:03d}-{self.key}"

    @property
    def overrides(self) -> dict[str, Any]:
        return {**self.settings, SEED: self.seed}


def load_space(name: str, run: RunConfig, metrics: Sequence[str] = (), num_seeds: int | None = None) -> Space:
    """A space that ships with the package, a YAML file, or `module:NAME`.

    Args:
        run: The study's recipe; its first seed, and its sources where mixtures are tried.
        metrics: Take these for objectives: `rewards/accuracies`, `kl` or `kl:max`; empty: the space's own.
        num_seeds: So many seeds of each configuration; None: the space's own, else the recipe's.

    Raises:
        InputError: There is no such space, or it is none; names the key.
    """
    declared, found = _declaration(name)
    if not isinstance(declared, Mapping) or not declared:
        raise InputError(f"the space {name} maps no recipe keys to values")
    known = set(recipe_keys())
    settings: dict[str, list[Choice] | Range] = {}
    for key, values in declared.items():
        pattern = ".".join("*" if part.isdigit() else part for part in str(key).split("."))
        if pattern not in known:
            raise InputError(f"the space {name}: no recipe key `{key}`")
        settings[str(key)] = _values(name, str(key), values, run)
    seeds = settings.pop(SEED, None)
    if isinstance(seeds, Range):
        raise InputError(f"the space {name}: `{SEED}` is a list of numbers")
    numbers = [int(choice.value) for choice in seeds] if seeds else [run.train.seed]
    if num_seeds is not None:
        numbers = [numbers[0] + i for i in range(num_seeds)]
    if not settings and len(numbers) < 2:
        raise InputError(f"the space {name} varies nothing")
    own = [f"{found.get('METRIC', 'rewards/accuracies')}:{found['MODE']}" if "MODE" in found else found.get("METRIC")]
    wanted = list(metrics) or [metric for metric in own if metric] or ["rewards/accuracies"]
    return Space(
        Path(name).stem if name.endswith((".yaml", ".yml")) else name.rpartition(":")[2].lower(),
        settings,
        numbers,
        [_objective(text) for text in wanted],
        " ".join(str(found.get("__doc__") or found.get("QUESTION") or "").split()),
    )


def grid(space: Space) -> list[Trial]:
    """Every combination of the values, each with every seed.

    Raises:
        InputError: A range has no values to combine.
    """
    axes = []
    for key, values in space.settings.items():
        if isinstance(values, Range):
            raise InputError(f"`{key}` is a range: a grid needs a list of values; use --search random or optuna")
        axes.append([(key, choice) for choice in values])
    return _with_seeds([dict(point) for point in itertools.product(*axes)], space.seeds)


def at_random(space: Space, num_points: int, random_seed: int = 0) -> list[Trial]:
    """So many points, no two equal, each with every seed; fewer where there are no more."""
    chance = random.Random(random_seed)
    points: dict[str, dict[str, Choice]] = {}
    for _ in range(100 * num_points):
        point = {}
        for key, values in space.settings.items():
            if isinstance(values, Range):
                drawn = values.draw(chance)
                point[key] = Choice(drawn, label_of(drawn))
            else:
                point[key] = chance.choice(values)
        points.setdefault(json.dumps({key: choice.value for key, choice in point.items()}, sort_keys=True), point)
        if len(points) == num_points:
            break
    return _with_seeds(list(points.values()), space.seeds)


def extremes(space: Space, sections: Collection[str]) -> Iterator[dict[str, Any]]:
    """Settings that together reach all that trials may take of these sections of a recipe: every value of a list, both
    ends of a range. What else varies keeps its first value.
    """
    axes = []
    for key, values in space.settings.items():
        found = [values.high, values.low] if isinstance(values, Range) else [choice.value for choice in values]
        axes.append([(key, value) for value in (found if key.partition(".")[0] in sections else found[:1])])
    return (dict(point) for point in itertools.product(*axes))


def label_of(value: Any) -> str:
    """A value as tables show it."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping) and "kind" in value:
        others = [f"{key}={label_of(item)}" for key, item in value.items() if key != "kind"]
        return " ".join([str(value["kind"]), *others])
    return value if isinstance(value, str) else json.dumps(value)


def _with_seeds(points: list[dict[str, Choice]], seeds: list[int]) -> list[Trial]:
    """Seed by seed, so that a study that ends early has every configuration once before any twice."""
    return [
        Trial(
            number,
            {key: choice.value for key, choice in point.items()},
            {key: choice.label for key, choice in point.items()},
            seed,
        )
        for number, (seed, point) in enumerate(itertools.product(seeds, points))
    ]


def _declaration(name: str) -> tuple[Any, Mapping[str, Any]]:
    """The mapping, and what stands beside it."""
    if name.endswith((".yaml", ".yml")):
        try:
            tree = yaml.safe_load(Path(name).read_text())
        except FileNotFoundError:
            raise InputError(f"no space at {name}") from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"{name} is not YAML: {' '.join(str(error).split())}") from None
        if isinstance(tree, dict) and "space" in tree:
            return tree["space"], {key.upper(): value for key, value in tree.items()}
        return tree, {}
    module_name, _, attribute = name.partition(":")
    if not attribute and name not in SHIPPED:
        raise InputError(f"no space `{name}`: one of {', '.join(SHIPPED)}, a YAML file, or module:NAME")
    try:
        module: ModuleType = importlib.import_module(module_name if attribute else f"tune_spaces.{name}")
        return getattr(module, attribute or "SPACE"), vars(module)
    except (ImportError, AttributeError) as error:
        raise InputError(f"no space {name}: {error}") from None


def _values(name: str, key: str, values: Any, run: RunConfig) -> list[Choice] | Range:
    if isinstance(values, Mapping) and set(values) == {"mixtures"}:
        if key != "data.sources" or values["mixtures"] != MIXTURES:
            raise InputError(f"the space {name}: `mixtures: {MIXTURES}` is a value of `data.sources`, got {values!r}")
        return _mixtures(run)
    if isinstance(values, Mapping):
        return _range(name, key, values)
    if not isinstance(values, list | tuple) or not values:
        raise InputError(f"the space {name}: `{key}` needs a list of values or a range, got {values!r}")
    return [Choice(value, label_of(value)) for value in values]


def _range(name: str, key: str, values: Mapping[str, Any]) -> Range:
    kind, bounds = next(iter(values.items()), ("", None))
    try:
        low, high = map(float, bounds or ())
    except (TypeError, ValueError):
        low = high = math.nan
    if kind not in ("uniform", "loguniform", "int") or len(values) != 1 or not low < high:
        raise InputError(f"the space {name}: `{key}` is no range such as {{loguniform: [low, high]}}: {dict(values)!r}")
    if kind == "loguniform" and low <= 0:
        raise InputError(f"the space {name}: `{key}`: the logarithm needs bounds above 0, got {low:g}")
    return Range(kind, low, high)


def _mixtures(run: RunConfig) -> list[Choice]:
    """Each source alone, all in equal shares, and all in the shares of their sizes."""
    sources = [source.model_dump(mode="json") for source in run.data.sources]
    if len(sources) < 2:
        raise InputError("a study of mixtures needs a recipe with at least two `data.sources`")
    names = source_names([source["path"] for source in sources])

    def weighted(weights: Sequence[float | None]) -> list[dict[str, Any]]:
        return [source | {"weight": weight} for source, weight in zip(sources, weights, strict=True)]

    singles = [
        Choice(weighted([1.0 if i == alone else 0.0 for i in range(len(sources))]), f"only {name}")
        for alone, name in enumerate(names)
    ]
    equal, by_size = weighted([1.0] * len(sources)), weighted([None] * len(sources))
    return [*singles, Choice(equal, "all, equal shares"), Choice(by_size, "all, by size")]


def source_names(paths: Sequence[str]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [path.rstrip("/").split("/") for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{number}: {path}" for number, path in enumerate(paths)]


def _objective(text: str) -> tuple[str, str]:
    metric, _, mode = str(text).removeprefix("eval/").partition(":")
    if metric not in OBJECTIVES:
        raise InputError(f"no metric `{metric}`; there are {', '.join(OBJECTIVES)}")
    if mode not in ("", "min", "max"):
        raise InputError(f"the objective {text!r}: `min` or `max` stands behind the colon")
    return metric, mode or METRICS[metric].direction
