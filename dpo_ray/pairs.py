"""Preference pairs as text, as token ids and as a batch: names, types and shapes. No file and no model.

`PreferencePair` -> (encode) -> `TokenizedPair` -> (batching) -> `PairBatch`.
"""

import dataclasses
import hashlib
import json
import math
import unicodedata
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Message = dict[str, Any]
"""One turn: `{"role": ..., "content": ...}`, perhaps with `tool_calls` and other keys of the chat template."""

Text = str | tuple[Message, ...]
"""Plain text, or the turns of a conversation."""

Ids = NDArray[np.int32]


@dataclasses.dataclass(frozen=True)
class PreferencePair:
    """A prompt with a chosen and a rejected response.

    All three are plain text, or all three are turns: the prompt ends before the response's first assistant turn.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    tools: tuple[dict[str, Any], ...] | None = None
    """Tool descriptions for the chat template."""

    is_transcript: bool = False
    """The turns came from a plain-text transcript (`\\n\\nHuman: ...`) and can be written back as one."""

    chosen_score: float | None = None
    rejected_score: float | None = None

    weight: float | None = None
    """Weight of the pair in the loss, where the recipe asks for weights."""

    margin: float | None = None
    """By how much the chosen response is better, where the recipe asks for margins; else the gap of the scores."""

    group: str | None = None
    """What must stay on one side of the held-out split besides the prompt: a document, a debate."""

    source: str = ""
    """Where the pair was read: the file or data set."""

    row: int = 0
    """Its row there: the line of a text file, else the record, from 1."""

    @cached_property
    def pair_id(self) -> str:
        """Hash of the normalised content; equal on every machine, in every order."""
        return content_hash(self.prompt, self.tools, self.chosen, self.rejected)

    @cached_property
    def prompt_id(self) -> str:
        """Hash of the normalised prompt."""
        return content_hash(self.prompt, self.tools)

    @cached_property
    def group_id(self) -> str:
        """What the held-out split goes by: `group`, else the conversation's opening, so that no prompt, and no
        conversation, stands on both sides. A pair without any prompt is a group of its own."""
        if self.group is not None:
            return content_hash(self.group)
        if not self.prompt:
            return self.pair_id
        if isinstance(self.prompt, str):
            return self.prompt_id
        users = [i for i, message in enumerate(self.prompt) if message["role"] == "user"]
        opening = self.prompt[: users[0] + 1] if users else self.prompt
        return content_hash(opening, self.tools)

    @property
    def place(self) -> str:
        """`file:row`, for messages."""
        return f"{self.source}:{self.row}"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A prompt with two responses that may be compared. Which comes first says nothing about their worth: they stand
    in the order of their content."""

    prompt: Text
    first: Text
    second: Text
    tools: tuple[dict[str, Any], ...] | None = None
    is_transcript: bool = False
    gold_gap: float | None = None
    """Worth of the first less that of the second, where the data knows and hides it; 1 or -1 for a bare label."""

    weight: float | None = None
    group: str | None = None
    source: str = ""
    row: int = 0

    @classmethod
    def of(cls, prompt: Text, one: Text, other: Text, gold_gap: float | None = None, **rest: Any) -> "Candidate":
        """The candidate of two responses in any order; `gold_gap` is that of `one` less `other`."""
        if content_hash(one) <= content_hash(other):
            return cls(prompt, one, other, gold_gap=gold_gap, **rest)
        return cls(prompt, other, one, gold_gap=None if gold_gap is None else -gold_gap, **rest)

    @cached_property
    def candidate_id(self) -> str:
        """Hash of the normalised content: the same whichever response is the better one."""
        return content_hash("candidate", self.prompt, self.tools, self.first, self.second)

    @cached_property
    def prompt_id(self) -> str:
        """As `PreferencePair.prompt_id`."""
        return content_hash(self.prompt, self.tools)

    @property
    def record(self) -> dict[str, Any]:
        """What people and files see of it, for JSON. What the data knows of its worth is left out."""
        known = dataclasses.asdict(self)
        return {name: value for name, value in known.items() if name not in ("gold_gap", "weight", "group")}

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Candidate":
        """As it was before JSON, which has no tuples."""
        known: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
        return cls(**known)

    def labelled(self, *, is_first: bool, margin: float | None = None) -> PreferencePair:
        """The pair that a label makes of it."""
        chosen, rejected = (self.first, self.second) if is_first else (self.second, self.first)
        return PreferencePair(
            self.prompt,
            chosen,
            rejected,
            tools=self.tools,
            is_transcript=self.is_transcript,
            weight=self.weight,
            margin=margin,
            group=self.group,
            source=self.source,
            row=self.row,
        )


def content_hash(*content: Any) -> str:
    """32 hex digits of BLAKE2b over canonical JSON; text is NFC-normalised and stripped at both ends."""
    return hashlib.blake2b(
        json.dumps(_normalised(content), sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode(),
        digest_size=16,
    ).hexdigest()


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        return unicodedata.normalize("NFC", value).strip()
    if isinstance(value, dict):
        return {key: _normalised(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_normalised(item) for item in value]
    return value


class TokenizedPair(NamedTuple):
    """Token ids of a pair. Both responses continue the same prompt; a whole response ends in one end token."""

    pair_id: str
    prompt_ids: Ids
    chosen_ids: Ids
    rejected_ids: Ids
    weight: float = math.nan
    margin: float = math.nan

    @property
    def num_tokens(self) -> int:
        """Real tokens: the prompt once, each response once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def branches(self) -> "PromptBranches":
        return PromptBranches(self.prompt_ids, (self.chosen_ids, self.rejected_ids))


class PromptBranches(NamedTuple):
    """A prompt and the responses behind it: two for a pair, any number when candidates are scored."""

    prompt_ids: Ids
    responses: tuple[Ids, ...]


class PairBatch(NamedTuple):
    """One micro-batch. R rows, T tokens a row, B prompts, S responses, N response tokens.

    The same for training, reference pass and scoring. In training S = 2 B: response 2 i is the chosen one of pair i,
    2 i + 1 its rejected one.
    """

    input_ids: Tensor  # [R, T] int64; padding is 0
    position_ids: Tensor  # [R, T] int64; a branch continues from its prompt's end
    segment_ids: Tensor  # [R, T] int32; which prompt of the row a token belongs to, -1 for padding
    branch_ids: Tensor  # [R, T] int32; 0 in the prompt, k in the k-th response
    predict_index: Tensor  # [N] int64; place in the flattened [R * T] whose output predicts a response token
    target_ids: Tensor  # [N] int64; that response token
    response_index: Tensor  # [N] int64; which of the S responses it belongs to
    num_responses: int  # S
    num_tokens: int  # real tokens: each prompt once, each response once
    num_filled: int  # of the R * T places, those that are not padding
    is_branched: bool  # False: plain causal rows (the padded layout)

    @property
    def num_slots(self) -> int:
        """Tokens computed, padding included: R * T."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> "PairBatch":
        """The same batch on a device."""
        return self._replace(
            input_ids=self.input_ids.to(device),
            position_ids=self.position_ids.to(device),
            segment_ids=self.segment_ids.to(device),
            branch_ids=self.branch_ids.to(device),
            predict_index=self.predict_index.to(device),
            target_ids=self.target_ids.to(device),
            response_index=self.response_index.to(device),
        )
