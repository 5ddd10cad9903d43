"""Real data with cases planted in it: the texts of a data set, and small edits of a text."""

import random
from collections.abc import Callable
from pathlib import Path

from dpo_ray.config import SourceConfig
from dpo_ray.data.duplicates import TextPair
from dpo_ray.data.formats import to_pairs
from dpo_ray.data.quality import text_of
from dpo_ray.data.sources import read_rows

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=7)) for i in range(400)]

EDITS: dict[str, Callable[[random.Random, str], str]] = {
    "white space": lambda rng, text: "".join(rng.choice((" ", "  ", "\n")) if c == " " else c for c in text) + "\n",
    "case": lambda rng, text: text.upper(),
    "word": lambda rng, text: one_word(rng, text),
    "sentence": lambda rng, text: f"{text} That is what I think about it.",
}


def one_word(rng: random.Random, text: str) -> str:
    """The text with one of its words changed for another."""
    words = text.split(" ")
    words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def real(shared: Path, name: str) -> list[TextPair]:
    """The pairs of a file of the shared data."""
    source = SourceConfig(path=str(shared / f"data/{name}.jsonl.gz"))
    return [text_of(pair) for row in read_rows(source) for pair in to_pairs(row, source).pairs]
