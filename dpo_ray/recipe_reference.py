"""The page of recipe keys (`docs/recipe.md`), written from the schema. Imports the configuration only.

`python -m dpo_ray.recipe_reference > docs/recipe.md`, or `make docs`; a test holds the page to the schema.
"""

import sys
import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from dpo_ray.config import RunConfig

_HEAD = """# Recipe

Every key of a recipe, from the schema (`dpo_ray/config.py`; written by `make docs`, do not edit). A recipe is YAML; on
the command line keys are dotted: `dpo-ray train recipe.yaml loss.beta=0.3 data.sources.0.path=pairs.jsonl`. An unknown
key is an error. `*` stands for the number of an item, from 0.
"""


class Section(NamedTuple):
    """A part of a recipe: its dotted key and the models that may stand there (several by `kind`)."""

    key: str
    models: tuple[type[BaseModel], ...]
    is_optional: bool


def recipe_reference() -> str:
    """The whole page."""
    parts = [_HEAD, _table(RunConfig, "")]
    first: dict[tuple[type[BaseModel], ...], Section] = {}
    for section in _sections(RunConfig, ""):
        shown = first.setdefault(section.models, section)
        if shown is not section:  # the same keys at another place
            parts.append(f"## {section.key}\n\nThe keys of [{shown.key}](#{_anchor(shown)}).\n")
            continue
        for model in section.models:
            of_kind = f" (kind: {model.model_fields['kind'].default})" if len(section.models) > 1 else ""
            parts.append(f"## {section.key}{of_kind}\n")
            if section.is_optional:
                parts.append("May be null.\n")
            parts.append(_table(model, f"{section.key}."))
    return "\n".join(parts)


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = ["| key | default | allowed | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        meaning = " ".join((field.description or "").split())
        sections = list(_sections_of(field.annotation, f"{prefix}{name}"))
        if sections:
            meaning = f"{meaning} Keys: [{sections[0].key}](#{_anchor(sections[0])}).".strip()
        row = (f"`{prefix}{name}`", _default(field), _allowed(field), meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    return "\n".join(rows) + "\n"


def _sections(model: type[BaseModel], prefix: str) -> Iterator[Section]:
    for name, field in model.model_fields.items():
        for section in _sections_of(field.annotation, f"{prefix}{name}"):
            yield section
            for below in section.models:
                yield from _sections(below, f"{section.key}.")


def _sections_of(annotation: Any, key: str) -> Iterator[Section]:
    """The section at a key, if its annotation holds models: `Model`, `Model | None`, `A | B`, `tuple[Model, ...]`."""
    options = _options(annotation)
    models = tuple(option for option in options if isinstance(option, type) and issubclass(option, BaseModel))
    if models:
        yield Section(key, models, type(None) in options)
    for option in options:
        if get_origin(option) is tuple:
            yield from _sections_of(get_args(option)[0], f"{key}.*")


def _options(annotation: Any) -> tuple[Any, ...]:
    if get_origin(annotation) is Annotated:
        return _options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(part for option in get_args(annotation) for part in _options(option))
    return (annotation,)


def _anchor(section: Section) -> str:
    """GitHub's anchor of the section's (first) heading."""
    kind = f"-kind-{section.models[0].model_fields['kind'].default}" if len(section.models) > 1 else ""
    return section.key.replace(".", "").replace("*", "") + kind


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "as below"
    return "`null`" if value is None or value is PydanticUndefined else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, float) and value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return str(value)


def _allowed(field: FieldInfo) -> str:
    words = [_words(option) for option in _options(field.annotation)]
    bounds = [text for item in field.metadata for text in _bounds(item)]
    kinds = " or ".join(dict.fromkeys(word for word in words if word))
    return ", ".join([kinds, *bounds])


def _words(annotation: Any) -> str:
    """An annotation in a reader's words."""
    origin = get_origin(annotation)
    if origin is Literal:
        return ", ".join(f"`{_yaml(value)}`" for value in get_args(annotation))
    if origin is tuple:
        first, *more = get_args(annotation)
        inner = _options(first)[0]
        count = "list" if more == [...] else f"list of {1 + len(more)}"
        of = "sections" if isinstance(inner, type) and issubclass(inner, BaseModel) else f"{_words(inner)}s"
        return f"{count} of {of}" if more == [...] else f"{count} {of}"
    if origin is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    return {str: "text", int: "integer", float: "number", bool: "`true`, `false`", type(None): "`null`"}[annotation]


def _bounds(item: Any) -> Iterator[str]:
    match item:
        case annotated_types.Ge(ge=value):
            yield f">= {value}"
        case annotated_types.Gt(gt=value):
            yield f"> {value}"
        case annotated_types.Le(le=value):
            yield f"<= {value}"
        case annotated_types.Lt(lt=value):
            yield f"< {value}"
        case annotated_types.MinLen(min_length=value):
            yield f"at least {value}"
        case _ if getattr(item, "pattern", None):
            yield f"matches `{item.pattern}`"


if __name__ == "__main__":
    sys.stdout.write(recipe_reference())
