"""Perplexity on general text: what is read of a source, and the change by hand."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dpo_ray.config import SourceConfig, parse_run
from dpo_ray.errors import InputError
from dpo_ray.evaluate.retention import _change, _Text, _texts
from dpo_ray.models import ModelSource


def recipe(tiny_model: Path, **retention: object) -> object:
    return parse_run(
        {
            "name": "x",
            "model": {"path": str(tiny_model)},
            "data": {"sources": [{"path": "p.jsonl"}]},
            "evaluate": {"retention": retention},
        }
    )


def write(path: Path, texts: list[object]) -> SourceConfig:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return SourceConfig(path=str(path))


def test_texts_begin_with_bos_end_at_the_limit_and_come_once(tiny_model: Path, tmp_path: Path):
    source = write(tmp_path / "t.jsonl", ["abc", "abc", "  ", "d" * 50])
    found = _texts(source, recipe(tiny_model, max_tokens=10), ModelSource(str(tiny_model)))
    assert sorted(len(rest) for _, rest in found) == [3, 9]
    assert all(first.tolist() == [0] for first, _ in found)


def test_fewer_texts_are_among_the_more(tiny_model: Path, tmp_path: Path):
    source = write(tmp_path / "t.jsonl", [f"text {i}" for i in range(30)])
    few, more = (
        {rest.tobytes() for _, rest in _texts(source, recipe(tiny_model, num_texts=n), ModelSource(str(tiny_model)))}
        for n in (5, 20)
    )
    assert few < more


def test_a_row_without_text_is_named(tiny_model: Path, tmp_path: Path):
    source = write(tmp_path / "t.jsonl", ["abc", 7])
    with pytest.raises(InputError, match=r"t\.jsonl:2: no `text`"):
        _texts(source, recipe(tiny_model), ModelSource(str(tiny_model)))
    with pytest.raises(InputError, match="1 usable texts"):
        _texts(write(tmp_path / "one.jsonl", ["abc"]), recipe(tiny_model), ModelSource(str(tiny_model)))


def test_the_change_by_hand(tiny_model: Path):
    """20 texts of 10 tokens; every other one loses 2 nats: 0.1 nats a token on average."""
    texts = [_Text(20.0, 22.0 if i % 2 else 20.0, 10) for i in range(20)]
    found = _change(texts, recipe(tiny_model))
    assert found["change"] == pytest.approx(0.1)
    assert found["before"] == pytest.approx(math.exp(2.0))
    assert found["after"] == pytest.approx(math.exp(2.1))
    half = 1.96 * 0.1 / math.sqrt(20)
    assert found["low"] == pytest.approx(0.1 - half, abs=0.02)
    assert found["high"] == pytest.approx(0.1 + half, abs=0.02)
    assert np.isclose(found["change"], math.log(found["after"] / found["before"]))
