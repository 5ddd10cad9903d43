"""What sets a recipe apart: from the defaults, and from other recipes. Pure: trees of plain values, no file."""

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
    loss = recipe.get("loss")
    kind = loss.get("kind") if isinstance(loss, Mapping) else None
    defaults = _defaults(kind)
    found = ((key, value, _at(defaults, key)) for key, value in flat(recipe).items())
    return [(key, value, default) for key, value, default in found if value != default]


def between(recipes: Sequence[Tree]) -> list[tuple[str, list[Any]]]:
    """Dotted key, and its value in each recipe, for every key that is not the same in all; None where it is not set."""
    every = [flat(recipe) for recipe in recipes]
    keys = dict.fromkeys(key for one in every for key in one)
    rows = [(key, [one.get(key) for one in every]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


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


def _defaults(kind: Any) -> dict[str, Any]:
    """Of a recipe with this loss; of one with the default loss where this version does not know the kind."""
    try:
        return parse_run({**REQUIRED, "loss": {"kind": kind}} if kind else REQUIRED).model_dump(mode="json")
    except InputError:
        return parse_run(REQUIRED).model_dump(mode="json")


def _at(tree: Any, key: str) -> Any:
    """The value at a dotted key; every item of a list has the first one's defaults. None where there is none."""
    for part in key.split("."):
        if isinstance(tree, list):
            tree = tree[0] if tree and re.fullmatch(r"\d+", part) else None
        else:
            tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
