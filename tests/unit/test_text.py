"""Streamed text is the whole text, cut where the first stop sequence begins, whatever the tokens."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from serve.text import TextStream, overlap


def by_bytes(tokens: Sequence[int]) -> str:
    """A tokenizer whose tokens are bytes."""
    return bytes(tokens).decode(errors="replace")


def streamed(stream: TextStream, tokens: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.finish()]


def cut(text: str, stops: Sequence[str]) -> str:
    """What a reader of the whole text would keep: up to the stop sequence that ends first, from where it begins."""
    ends = sorted((place + len(stop), place) for stop in stops if (place := text.find(stop)) >= 0)
    return text[: min(place for end, place in ends if end == ends[0][0])] if ends else text


@given(st.text(max_size=30))
def test_pieces_are_whole_characters_and_make_the_text(text: str):
    pieces = streamed(TextStream(by_bytes), list(text.encode()))
    assert "".join(pieces) == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


@given(st.text("ab\u20ac", max_size=30), st.lists(st.text("ab\u20ac", min_size=1, max_size=4), max_size=3))
def test_nothing_of_a_stop_sequence_is_sent(text: str, stops: list[str]):
    stream = TextStream(by_bytes, stops)
    assert "".join(streamed(stream, list(text.encode()))) == cut(text, stops)
    assert stream.is_stopped == any(stop in text for stop in stops)


@given(st.text("ab", max_size=12), st.text("ab", min_size=1, max_size=6))
def test_the_overlap_is_the_longest_end_that_begins_the_stop(text: str, stop: str):
    sizes = [size for size in range(len(stop)) if text.endswith(stop[:size]) and size <= len(text)]
    assert overlap(text, stop) == max(sizes)


def test_text_is_held_no_longer_than_it_must_be():
    stream = TextStream(by_bytes, ["END"])
    assert [stream.push(token) for token in b"aEbENc"] == ["a", "", "Eb", "", "", "ENc"]
    assert [stream.push(token) for token in b"xENDy"] == ["x", "", "", "", ""]
    assert stream.is_stopped
    assert stream.finish() == ""


def test_half_a_character_at_the_end_is_told():
    stream = TextStream(by_bytes)
    assert [stream.push(token) for token in "é".encode()[:1]] == [""]
    assert stream.finish() == "\ufffd"


TEXTS = [
    "Once upon a time, there was a dog.",
    " leading blank",
    "two  blanks\n\nand lines ",
    "naïve café 日本語 👍🏽 end",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["stories260K", "tokenizer-gpt2", "tiny"])
def test_real_tokenizers_give_the_text_behind_a_prompt(shared: Path, tiny_model: Path, name: str, text: str):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model if name == "tiny" else shared / "models" / name)
    prompt, ids = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("It was late.", text))

    def decode(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    expected = decode([*prompt, *ids])[len(decode(prompt)) :]
    assert "".join(streamed(TextStream(decode, before=prompt), ids)) == expected
    assert text.strip() in expected
