"""Tokens as they come -> text that may be sent: whole characters only, and nothing of a stop sequence.

Pure. What was sent can never be taken back, so text is held as long as it could still be a part of a character or the
beginning of a stop sequence.
"""

from collections.abc import Callable, Sequence

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What tokenizers write for bytes that are no whole character yet."""

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of one response, token by token.

    Args:
        decode: Text of some tokens; special tokens give nothing.
        stops: The response ends before the first of these, wherever it crosses tokens.
        before: Last tokens of the prompt: some tokenizers write a blank only behind other text.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = (), before: Sequence[int] = ()) -> None:
        self._decode, self._stops = decode, tuple(stops)
        # Only the tokens from `_start` on are decoded: those before `_read` are text already, and give the context.
        self._ids, self._start, self._read = list(before), 0, len(before)
        self._held = ""
        self.is_stopped = False
        """A stop sequence has come; there is no more text."""

    def push(self, token: int) -> str:
        """Text that may be sent now that this token has come; often none."""
        if self.is_stopped:
            return ""
        self._ids.append(token)
        known, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if whole.endswith(UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._released(whole[len(known) :], is_last=False)

    def finish(self) -> str:
        """The rest, when no token comes any more; half a character stays as the tokenizer writes it."""
        if self.is_stopped:
            return ""
        known, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        return self._released(whole[len(known) :], is_last=True)

    def _released(self, new: str, *, is_last: bool) -> str:
        """Of the text that is held and the new one, what no stop sequence can need."""
        text = self._held + new
        ends = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if ends:
            self.is_stopped, self._held = True, ""
            return text[: min(ends)]
        keep = 0 if is_last else max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a true beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
