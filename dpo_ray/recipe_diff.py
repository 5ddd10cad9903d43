"""What sets a recipe apart: from the defaults, and from other recipes. Pure: trees of plain values, no file."""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_ray.config import parse_run
from dpo_ray.errors import InputError

Tree = Mapping[str, Any]

REQUIRED = {"name": "required", "model": {"path": "required"}, "data": {"sources": [{"path": "required"}]}}
"""The least recipe: everything else in it is a default."""


def from_defaults(recipe: Tree) -> list[tuple[str, Any, Any]]:
    """Dotted key, value and default of everything that differs from a recipe that sets no more than it must.

    Keys that a recipe must set have the default "required"; those that this version does not know have None.
    """
    found = ((key, value, _default(recipe, key)) for key, value in flat(recipe).items())
    return [(key, value, default) for key, value, default in found if value != default]


def between(recipes: Sequence[Tree]) -> list[tuple[str, list[Any]]]:
    """Dotted key, and its value in each recipe, for every key that is not the same in all; None where it is not set.

    A key that some do not have and the others have at its default makes no difference.
    """
    every = [flat(recipe) for recipe in recipes]
    rows = []
    for key in dict.fromkeys(key for one in every for key in one):
        values = [_at(recipe, key) for recipe in recipes]
        told = [value for value, one in zip(values, every, strict=True) if key in one]
        is_default = len(told) < len(recipes) and all(value == _default(recipes[0], key) for value in told)
        if not is_default and any(value != values[0] for value in values):
            rows.append((key, values))
    return rows


def flat(tree: Tree) -> dict[str, Any]:
    """Dotted key -> value; items of lists of sections have their number for a name."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        is_sections = isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value)
        below = {str(i): item for i, item in enumerate(value)} if is_sections else value
        if isinstance(below, Mapping) and below:
            found |= {f"{name}.{key}": item for key, item in flat(below).items()}
        else:
            found[name] = value
    return found


def _default(recipe: Tree, key: str) -> Any:
    """Of a recipe with the same loss; all sources have the same defaults, also those of held-out pairs."""
    loss = recipe.get("loss")
    kind = loss.get("kind") if isinstance(loss, Mapping) else None
    source = re.sub(r"^data\.(eval\.)?sources\.\d+\.", "data.sources.0.", key)
    return _at(_defaults(kind), source)


@functools.cache
def _defaults(kind: str | None) -> dict[str, Any]:
    """With the options of this loss, but the default kind; those of the default loss where the kind is not known."""
    plain = parse_run(REQUIRED).model_dump(mode="json")
    try:
        options = parse_run({**REQUIRED, "loss": {"kind": kind or plain["loss"]["kind"]}}).model_dump(mode="json")
    except InputError:
        return plain
    return {**options, "loss": {**options["loss"], "kind": plain["loss"]["kind"]}}


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key; None where there is none."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[int(part)] if part.isdigit() and int(part) < len(tree) else None
        else:
            tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
