"""Preference pairs -> token ids: chat template or plain text, hard checks, over-long pairs, the token cache.

The prompt and each response are tokenised apart, as at generation time, so prompt ids are shared by construction and no
merge crosses the border. A pair that cannot be encoded is counted with its reason, never dropped in silence.
"""

import hashlib
import json
import math
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jinja2 import TemplateError

from dpo_ray.config import DataConfig
from dpo_ray.data.formats import transcript
from dpo_ray.errors import InputError
from dpo_ray.pairs import Ids, Message, PreferencePair, TokenizedPair
from dpo_ray.storage import Folder

PAIRS_PER_PART = 1024
"""Pairs of one cache file. Subsets are prefixes of one order, so runs of different data sizes share files."""

ENCODING_VERSION = 3
"""Part of the cache key; raise it when the same text gives other ids."""


class EncodedPart(NamedTuple):
    """Some pairs as ids, and what happened to the others."""

    pairs: list[TokenizedPair]
    dropped: Counter[str]
    truncated: Counter[str]


class PairEncoder:
    """Encodes pairs with one tokenizer and one set of rules.

    Args:
        tokenizer: A Hugging Face tokenizer.
        data: `max_tokens`, `over_long` and `chat` are read.
        end_ids: Tokens that end a response when the template writes them; the tokenizer's EOS is always one.

    Raises:
        InputError: The tokenizer has no end token.
    """

    def __init__(self, tokenizer: Any, data: DataConfig, end_ids: Iterable[int] = ()) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no end-of-sequence token")
        self._tokenizer = tokenizer
        self._max_tokens, self._over_long, self._chat = data.max_tokens, data.over_long, data.chat
        self._end_ids = {tokenizer.eos_token_id, *end_ids}
        # SentencePiece tokenizers put a blank before a text; a response continues one, so it is tokenised behind an
        # anchor that is then cut off.
        self._anchor = self._ids(["\n"])[0]
        self._adds_blank = self._ids(["\na"])[0][len(self._anchor) :] != self._ids(["a"])[0]
        self._adds_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of all that decides the ids of a pair."""
        tokenizer = self._tokenizer
        vocabulary = (
            tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
        )
        special = [tokenizer.bos_token_id, sorted(self._end_ids), self._adds_bos]
        rules = [self._max_tokens, self._over_long, self._chat]
        content = json.dumps([ENCODING_VERSION, vocabulary, tokenizer.chat_template, special, rules])
        return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()

    def encode(self, pairs: Sequence[PreferencePair]) -> EncodedPart:
        """Encode pairs in their order; those that cannot be are counted by reason.

        Raises:
            InputError: A conversation, but the tokenizer has no chat template; or the template refuses it.
        """
        texts = [self._render(pair) for pair in pairs]
        templated = [text.is_templated for text in texts]
        prompts = self._prompt_ids([text.prompt for text in texts], templated)
        chosen = self._response_ids([text.chosen for text in texts], templated)
        rejected = self._response_ids([text.rejected for text in texts], templated)
        part = EncodedPart([], Counter(), Counter())
        for pair, ids in zip(pairs, zip(prompts, chosen, rejected, strict=True), strict=True):
            fitted, truncated = self._fit(*ids)
            if isinstance(fitted, str):
                part.dropped[fitted] += 1
                continue
            if truncated:
                part.truncated[truncated] += 1
            prompt_ids, chosen_ids, rejected_ids = (np.asarray(side, np.int32) for side in fitted)
            weight, margin = (math.nan if number is None else number for number in (pair.weight, pair.margin))
            part.pairs.append(TokenizedPair(pair.pair_id, prompt_ids, chosen_ids, rejected_ids, weight, margin))
        return part

    def prompt_ids(self, pair: PreferencePair) -> Ids:
        """Ids of a pair's prompt alone, as they stand before its responses."""
        text = self._render(pair)
        return np.asarray(self._prompt_ids([text.prompt], [text.is_templated])[0], np.int32)

    def with_response(self, pair: PreferencePair) -> tuple[Ids, Ids]:
        """Ids of a pair's prompt and of its chosen response, however long they are."""
        text = self._render(pair)
        prompt = self._prompt_ids([text.prompt], [text.is_templated])[0]
        response = self._response_ids([text.chosen], [text.is_templated])[0]
        return np.asarray(prompt, np.int32), np.asarray(response, np.int32)

    def response_text(self, prompt_ids: Ids, response_ids: Ids, *, is_plain: bool) -> str:
        """The text of a response that a model wrote behind a prompt, without its end token.

        Plain text keeps the blank that it begins with, which some tokenizers only give back behind other text; an
        assistant turn has none.
        """
        ids = [int(token) for token in response_ids]
        while ids and ids[-1] in self._end_ids:
            ids.pop()
        if not is_plain:
            return str(self._tokenizer.decode(ids, skip_special_tokens=True)).strip()
        before = self._tokenizer.decode(prompt_ids.tolist(), skip_special_tokens=True)
        whole = self._tokenizer.decode([*prompt_ids.tolist(), *ids], skip_special_tokens=True)
        return str(whole[len(before) :])

    def _render(self, pair: PreferencePair) -> "_Rendered":
        """The three texts of a pair: plain, or written by the chat template."""
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
            if self._chat != "always":
                return _Rendered(prompt, chosen, rejected, is_templated=False)
            prompt = ({"role": "user", "content": prompt},)
            chosen, rejected = (
                ({"role": "assistant", "content": chosen},),
                ({"role": "assistant", "content": rejected},),
            )
        assert not isinstance(prompt, str)
        assert not isinstance(chosen, str)
        assert not isinstance(rejected, str)
        if self._tokenizer.chat_template is None or self._chat == "never":
            if not pair.is_transcript:
                raise InputError(
                    f"{pair.place}: a conversation, but "
                    + ("`data.chat` is `never`" if self._chat == "never" else "the tokenizer has no chat template")
                    + "; use a model with a chat template, or plain-text data"
                )
            before = transcript(prompt)
            ends = tuple(transcript((*prompt, *response)) for response in (chosen, rejected))
            opening = before + "\n\nAssistant:"
            return _Rendered(opening, ends[0][len(opening) :], ends[1][len(opening) :], is_templated=False)

        before = self._template(pair, prompt, add_generation_prompt=True)
        ends = tuple(self._template(pair, (*prompt, *response)) for response in (chosen, rejected))
        if not all(end.startswith(before) for end in ends):
            # The template writes the prompt otherwise when an answer follows, such as an opened thinking tag.
            before = self._template(pair, prompt)
            if not all(end.startswith(before) for end in ends):
                raise InputError(f"{pair.place}: the chat template does not keep the prompt when a response follows it")
        return _Rendered(before, ends[0][len(before) :], ends[1][len(before) :], is_templated=True)

    def _template(self, pair: PreferencePair, turns: tuple[Message, ...], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(turns),
                tools=list(pair.tools) if pair.tools else None,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise InputError(f"{pair.place}: the chat template refuses this conversation: {error}") from None
        return text

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids without BOS and EOS; special tokens that stand in a text (templated by hand) stay what they are."""
        if not texts:
            return []
        ids: list[list[int]] = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _prompt_ids(self, texts: Sequence[str], templated: Sequence[bool]) -> list[list[int]]:
        """Prompts with exactly one BOS where the tokenizer has one and uses it."""
        bos = self._tokenizer.bos_token_id
        result = []
        for ids, is_templated in zip(self._ids(texts), templated, strict=True):
            starts = bos is not None and ids[:1] == [bos]
            if bos is not None and not starts and (self._adds_bos and not is_templated):
                ids = [bos, *ids]
            while bos is not None and ids[:2] == [bos, bos]:
                ids = ids[1:]
            # The first response token needs a token before it to be predicted from.
            result.append(ids or [bos if bos is not None else self._tokenizer.eos_token_id])
        return result

    def _response_ids(self, texts: Sequence[str], templated: Sequence[bool]) -> list[list[int]]:
        """Responses that end in one end token. What a template writes behind its last one is cut off."""
        if self._adds_blank:
            skip = len(self._anchor)
            anchored = self._ids(["\n" + text for text in texts])
            found = [
                ids[skip:] if ids[:skip] == self._anchor else self._ids([text])[0]
                for ids, text in zip(anchored, texts, strict=True)
            ]
        else:
            found = self._ids(texts)
        result = []
        for ids, is_templated in zip(found, templated, strict=True):
            ends = [i for i, token in enumerate(ids) if token in self._end_ids]
            if ends and (is_templated or ends[-1] == len(ids) - 1):
                result.append(ids[: ends[-1] + 1])
            else:
                result.append([*ids, self._tokenizer.eos_token_id])
        return result

    def _fit(
        self, prompt: list[int], chosen: list[int], rejected: list[int]
    ) -> tuple[tuple[list[int], list[int], list[int]] | str, str | None]:
        """The pair within `max_tokens`, or the reason why it is dropped; and how it was truncated."""
        if chosen == rejected:
            return "identical_tokens", None
        excess = len(prompt) + max(len(chosen), len(rejected)) - self._max_tokens
        if excess <= 0:
            return (prompt, chosen, rejected), None
        if self._over_long == "drop":
            return "over_long", None
        if self._over_long == "truncate_prompt_left":
            keeps = [prompt[0]] if prompt[0] == self._tokenizer.bos_token_id else []
            left = len(prompt) - excess - len(keeps)
            if left < 1:
                return "response_over_long", None
            return ([*keeps, *prompt[-left:]], chosen, rejected), "prompt"
        room = self._max_tokens - len(prompt)
        if room < 1:
            return "prompt_over_long", None
        chosen, rejected = chosen[:room], rejected[:room]  # a cut response has no end token: it did not end there
        if chosen == rejected:
            return "identical_tokens", None
        return (prompt, chosen, rejected), "response"


class _Rendered(NamedTuple):
    prompt: str
    chosen: str
    rejected: str
    is_templated: bool


class TokenFiles(NamedTuple):
    """Encoded pairs on storage, ready to be sent to workers: values only."""

    folder: str
    parts: tuple[str, ...]
    num_pairs: int
    """Pairs that count; the last part may hold more."""

    def open(self) -> "TokenTable":
        """The pairs; files of a remote storage are first copied to this machine, once."""
        cache = Path(tempfile.gettempdir()) / f"dpo-ray-tokens-{os.getuid()}"
        return TokenTable([Folder(self.folder).fetch(name, cache) for name in self.parts], self.num_pairs)


def encode_to_files(
    pairs: Sequence[PreferencePair], encoder: PairEncoder, cache: Folder, num_pairs: int | None = None
) -> tuple[TokenFiles, dict[str, Any]]:
    """Encode pairs into cache files by content, up to `num_pairs` that survive; what is there is not done again.

    Returns:
        The files, and the part of the data report: `encoded`, `from_cache`, `dropped`, `truncated`.
    """
    names, count = [], 0
    dropped: Counter[str] = Counter()
    truncated: Counter[str] = Counter()
    from_cache = 0
    for start in range(0, len(pairs), PAIRS_PER_PART):
        block = pairs[start : start + PAIRS_PER_PART]
        name = f"{_block_key(encoder, block)}.arrow"
        counts = _read_counts(cache, name)
        if counts is None:
            part = encoder.encode(block)
            cache.write(name, _to_arrow(part))
            counts = _counts(part)
        else:
            from_cache += len(block)
        dropped.update(counts["dropped"])
        truncated.update(counts["truncated"])
        count += counts["pairs"]
        names.append(name)
        if num_pairs is not None and count >= num_pairs:
            count = num_pairs
            break
    files = TokenFiles(cache.path, tuple(names), count)
    return files, {"from_cache": from_cache, "dropped": dict(dropped), "truncated": dict(truncated)}


def _block_key(encoder: PairEncoder, block: Sequence[PreferencePair]) -> str:
    """Hash of the encoding and of the exact texts: pairs of one id may differ in blanks, which are tokens too."""
    exact = [[p.pair_id, p.prompt, p.chosen, p.rejected, p.tools, p.is_transcript, p.weight, p.margin] for p in block]
    content = json.dumps([encoder.fingerprint, exact], sort_keys=True)
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _counts(part: EncodedPart) -> dict[str, Any]:
    return {"pairs": len(part.pairs), "dropped": part.dropped, "truncated": part.truncated}


def _read_counts(cache: Folder, name: str) -> dict[str, Any] | None:
    """What a cache file says of itself; None if it is not there, or damaged."""
    if not cache.exists(name):
        return None
    try:
        with pa.ipc.open_file(pa.BufferReader(cache.read(name))) as reader:
            counts: dict[str, Any] = json.loads(reader.schema.metadata[b"counts"])
    except pa.ArrowInvalid:
        return None
    return counts


def _to_arrow(part: EncodedPart) -> bytes:
    columns = {
        name: pa.array([getattr(pair, name) for pair in part.pairs], pa.list_(pa.int32()))
        for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }
    columns |= {
        name: pa.array([getattr(pair, name) for pair in part.pairs], pa.float64()) for name in ("weight", "margin")
    }
    table = pa.table({"pair_id": pa.array([pair.pair_id for pair in part.pairs], pa.string()), **columns})
    table = table.replace_schema_metadata({"counts": json.dumps(_counts(part))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=PAIRS_PER_PART)
    return bytes(sink.getvalue())


class TokenTable(Sequence[TokenizedPair]):
    """Encoded pairs, memory-mapped: reading one copies nothing."""

    def __init__(self, paths: Sequence[Path], num_pairs: int) -> None:
        tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in paths]
        table = pa.concat_tables(tables).slice(0, num_pairs) if tables else None
        self._chunks = [] if table is None else [_Chunk(batch) for batch in table.to_batches()]
        self._starts = np.cumsum([0, *(len(chunk.pair_ids) for chunk in self._chunks)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> TokenizedPair:  # type: ignore[override]
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._chunks[chunk].pair(index - int(self._starts[chunk]))


class _Chunk:
    def __init__(self, batch: pa.RecordBatch) -> None:
        self.pair_ids = batch.column("pair_id")
        self._columns: list[tuple[Ids, Ids]] = []
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            column = batch.column(name)
            self._columns.append((column.offsets.to_numpy(), column.values.to_numpy()))
        self._numbers = [batch.column(name).to_numpy() for name in ("weight", "margin")]

    def pair(self, index: int) -> TokenizedPair:
        prompt, chosen, rejected = (values[offsets[index] : offsets[index + 1]] for offsets, values in self._columns)
        weight, margin = (float(column[index]) for column in self._numbers)
        return TokenizedPair(self.pair_ids[index].as_py(), prompt, chosen, rejected, weight, margin)
