"""Oracles: who is asked which response is better. Hidden labels, a function, a reward model, a judge, people.

`make_oracle` builds the one that a recipe names, with the noise it asks for. The judge is in `judge`, the queue of
people in `label_queue`; what answers are is in `answers`.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jinja2 import TemplateError
from safetensors import SafetensorError

from dpo_ray.acquisition.answers import Answer, Oracle, by_gap, other, plain_text
from dpo_ray.acquisition.judge import Judge
from dpo_ray.acquisition.label_queue import LabelQueue
from dpo_ray.acquisition.scores import uniform
from dpo_ray.config import (
    AnyOracle,
    FunctionOracleConfig,
    LabelsOracleConfig,
    LlmOracleConfig,
    PeopleOracleConfig,
    RewardModelOracleConfig,
)
from dpo_ray.errors import InputError
from dpo_ray.models import ModelSource, load_tokenizer, local_folder
from dpo_ray.pairs import Candidate, Text
from dpo_ray.storage import Folder

__all__ = ["Answer", "Oracle", "make_oracle", "plain_text"]

CACHE_FOLDER = ".judge"
BATCH_TOKENS = 16_384
"""Tokens of one batch of the reward model, padding included."""

OnAnswer = Callable[[Answer], None]


def make_oracle(
    config: AnyOracle,
    *,
    seed: int,
    storage: str,
    queue: str | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Oracle:
    """The oracle of a recipe.

    Args:
        seed: Of the answers that are flipped.
        storage: `storage.path`, where the judge keeps its answers unless the recipe says otherwise.
        queue: Folder of the people's queue, which other processes open to label; only people need one.
        should_stop: Judges and people are waited for until it says so; then `ask` returns early.

    Raises:
        InputError: Something that the oracle needs is missing or wrong.
    """
    oracle: Oracle
    match config:
        case LabelsOracleConfig():
            oracle = LabelsOracle()
        case FunctionOracleConfig():
            oracle = FunctionOracle(config)
        case RewardModelOracleConfig():
            oracle = RewardModelOracle(config)
        case LlmOracleConfig():
            cache = Folder(storage) / CACHE_FOLDER if config.cache is None else Folder(config.cache)
            oracle = Judge(config, cache, should_stop=should_stop)
        case PeopleOracleConfig():
            assert queue is not None
            oracle = PeopleOracle(LabelQueue(Folder(queue), config.labellers, config.lease_minutes), should_stop)
    return NoisyOracle(oracle, config.flip, seed) if config.flip else oracle


class NoisyOracle:
    """Another oracle, a share of whose answers is turned round. Which ones depends on seed and content alone."""

    def __init__(self, oracle: Oracle, flip: float, seed: int) -> None:
        self._oracle, self._flip, self._seed = oracle, flip, seed

    def ask(self, candidates: Sequence[Candidate], on_answer: OnAnswer) -> None:
        self._oracle.ask(candidates, lambda answer: on_answer(flipped(answer, self._flip, self._seed)))


def flipped(answer: Answer, flip: float, seed: int) -> Answer:
    """The answer, turned round with probability `flip`. Ties and missing ones have no other side."""
    if answer.preferred not in ("first", "second"):
        return answer
    if uniform(np.array([answer.candidate_id]), seed, "flip")[0] >= flip:
        return answer
    return answer._replace(
        preferred=other(answer.preferred), note="flipped" if answer.note is None else f"{answer.note}; flipped"
    )


class LabelsOracle:
    """The labels, or scores, that the data hides."""

    def ask(self, candidates: Sequence[Candidate], on_answer: OnAnswer) -> None:
        """As `Oracle.ask`.

        Raises:
            InputError: The data has no label for a candidate; nothing is answered then.
        """
        answers = [by_gap(c.candidate_id, _gold_gap(c), "labels") for c in candidates]
        for answer in answers:
            on_answer(answer)


def _gold_gap(candidate: Candidate) -> float:
    if candidate.gold_gap is None or not math.isfinite(candidate.gold_gap):
        raise InputError(f"{candidate.source}:{candidate.row}: the data has no label here; choose another oracle")
    return candidate.gold_gap


class FunctionOracle:
    """A function of prompt and response, both text. A value that is not finite makes `none`.

    Raises:
        InputError: There is no such function.
    """

    def __init__(self, config: FunctionOracleConfig) -> None:
        self._name, self._value = config.function, load_function(config.function)

    def ask(self, candidates: Sequence[Candidate], on_answer: OnAnswer) -> None:
        """As `Oracle.ask`.

        Raises:
            InputError: The function returned something that is not a number.
        """
        by = f"function:{self._name}"
        for candidate in candidates:
            first, second = self._of(candidate, candidate.first), self._of(candidate, candidate.second)
            if math.isfinite(first) and math.isfinite(second):
                on_answer(by_gap(candidate.candidate_id, first - second, by))
            else:
                on_answer(Answer(candidate.candidate_id, "none", by, note=f"the values are {first} and {second}"))

    def _of(self, candidate: Candidate, response: Text) -> float:
        value = self._value(plain_text(candidate.prompt), plain_text(response))
        try:
            return float(value)
        except (TypeError, ValueError):
            place = f"{candidate.source}:{candidate.row}"
            raise InputError(f"`{self._name}` gave a {type(value).__name__}, not a number, for {place}") from None


def load_function(name: str) -> Callable[[str, str], Any]:
    """A function by `module:NAME`; modules of the current directory come first, as under `python -m`.

    Raises:
        InputError: The module or the function is missing.
    """
    module_name, _, function_name = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"`acquire.oracle.function`: cannot import `{module_name}`: {error}") from None
    function = vars(module).get(function_name)
    if not callable(function):
        raise InputError(f"`acquire.oracle.function`: `{module_name}` ({module.__file__}) has no `{function_name}`")
    found: Callable[[str, str], Any] = function
    return found


class RewardModelOracle:
    """A model for sequence classification with one output. Its weights are in memory only while it is asked.

    Raises:
        InputError: There is no such model, or it has another number of outputs.
    """

    def __init__(self, config: RewardModelOracleConfig) -> None:
        from transformers import AutoConfig

        self._path, self._source = config.path, ModelSource(config.path, config.revision)
        try:
            found = AutoConfig.from_pretrained(local_folder(self._source), trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise InputError(f"`acquire.oracle.path`: {config.path}: {_one_line(error)}") from None
        if found.num_labels != 1:
            raise InputError(f"`acquire.oracle.path`: {config.path} has {found.num_labels} outputs, not one")
        self._tokenizer = load_tokenizer(self._source)
        self._tokenizer.truncation_side = "left"
        positions = getattr(found.get_text_config(), "max_position_embeddings", None) or config.max_tokens
        self._max_tokens = min(config.max_tokens, positions, self._tokenizer.model_max_length)

    def ask(self, candidates: Sequence[Candidate], on_answer: OnAnswer) -> None:
        """As `Oracle.ask`.

        Raises:
            InputError: The model cannot be loaded, lacks its head, or its template refuses a conversation.
        """
        pairs = [(self._ids(c, c.first), self._ids(c, c.second)) for c in candidates]
        by = f"reward_model:{self._path}"
        for row, (first, second) in _scored(self._load(), pairs):
            on_answer(by_gap(candidates[row].candidate_id, first - second, by))
        torch.cuda.empty_cache()  # training may want the same GPU next

    def _ids(self, candidate: Candidate, response: Text) -> list[int]:
        """Prompt and response as the model reads them; what is too long loses its beginning."""
        prompt = candidate.prompt
        if isinstance(prompt, str) or isinstance(response, str):
            text, is_templated = plain_text(prompt) + plain_text(response), False
        elif self._tokenizer.chat_template is None:
            text, is_templated = plain_text((*prompt, *response)), False
        else:
            text, is_templated = self._templated(candidate, (*prompt, *response)), True
        ids: list[int] = self._tokenizer(
            text, add_special_tokens=not is_templated, truncation=True, max_length=self._max_tokens
        )["input_ids"]
        return ids

    def _templated(self, candidate: Candidate, turns: tuple[dict[str, Any], ...]) -> str:
        tools = list(candidate.tools) if candidate.tools else None
        try:
            text: str = self._tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False)
        except TemplateError as error:
            place = f"{candidate.source}:{candidate.row}"
            raise InputError(f"{place}: the chat template of {self._path} refuses this conversation: {error}") from None
        return text

    def _load(self) -> Any:
        """In float32 on a CPU, in the type of its weights on a GPU."""
        from transformers import AutoModelForSequenceClassification

        device, dtype = ("cuda", "auto") if torch.cuda.is_available() else ("cpu", torch.float32)
        try:
            model, loading = AutoModelForSequenceClassification.from_pretrained(
                local_folder(self._source),
                dtype=dtype,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"`acquire.oracle.path`: cannot load {self._path}: {_one_line(error)}") from None
        if loading["missing_keys"]:
            missing = sorted(loading["missing_keys"])[0]
            raise InputError(f"`acquire.oracle.path`: {self._path} is no reward model: it has no weights `{missing}`")
        return model.eval().to(device)


def _scored(model: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> Iterator[tuple[int, tuple[float, float]]]:
    """Each pair's row and the rewards of its two texts."""
    pad = _pad_id(model.config.get_text_config(), pairs)
    for rows in length_batches([max(map(len, pair)) for pair in pairs], BATCH_TOKENS):
        rewards = _rewards(model, [ids for row in rows for ids in pairs[row]], pad)
        yield from zip(rows, zip(rewards[::2], rewards[1::2], strict=True), strict=True)


def length_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Rows in batches of about equal lengths, the longest first, so that what does not fit into memory shows at once.

    Args:
        lengths: Tokens of the longer text of each pair.
        max_tokens: Of a batch, both padded texts of each pair counted; a pair that is longer has its own.
    """
    batch: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        if batch and 2 * lengths[batch[0]] * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _pad_id(config: Any, pairs: Sequence[tuple[list[int], list[int]]]) -> int | None:
    """The padding token, by which decoders find the end of a text: the model's own.

    A model that has none gets one that occurs in no text here, so that it reads the last token as it does without
    padding. None where all tokens occur: texts then go one by one.
    """
    pad: int | None = getattr(config, "pad_token_id", None)
    if pad is None:
        used = {token for pair in pairs for ids in pair for token in ids}
        pad = config.pad_token_id = next((token for token in range(config.vocab_size) if token not in used), None)
    return pad


@torch.inference_mode()
def _rewards(model: Any, texts: Sequence[list[int]], pad: int | None) -> list[float]:
    """[len(texts)], logits."""
    if pad is None and len(texts) > 1:
        return [reward for ids in texts for reward in _rewards(model, [ids], pad)]
    longest = max(map(len, texts))
    input_ids = torch.tensor([ids + [pad or 0] * (longest - len(ids)) for ids in texts], device=model.device)
    lengths = torch.tensor([len(ids) for ids in texts], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    rewards: list[float] = model(input_ids=input_ids, attention_mask=mask.long()).logits[:, 0].float().tolist()
    return rewards


class PeopleOracle:
    """People who work off a queue. Asking waits for them; what they said stays in the queue whenever that ends."""

    def __init__(self, queue: LabelQueue, should_stop: Callable[[], bool] = lambda: False) -> None:
        self._queue, self._should_stop = queue, should_stop

    def ask(self, candidates: Sequence[Candidate], on_answer: OnAnswer) -> None:
        """As `Oracle.ask`; returns early when `should_stop` says so."""
        self._queue.add(candidates)
        self._queue.wait(on_answer, [c.candidate_id for c in candidates], should_stop=self._should_stop)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
