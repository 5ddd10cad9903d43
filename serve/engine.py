"""One model in memory that writes and scores: continuous batching behind an async generator. No Ray, no HTTP.

Weights are in memory once: adapters, and the copies that score, are modules of their own on the same tensors. A request
that is no longer wanted leaves the batch and its part of the cache at the next step.
"""

import asyncio
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch

from dpo_ray.config import BatchConfig, DataConfig, SourceConfig
from dpo_ray.data.encode import PairEncoder
from dpo_ray.data.turns import SPEAKERS
from dpo_ray.errors import InputError
from dpo_ray.generate import (
    ContinuousBatching,
    Progress,
    Request,
    Sampling,
    choose_engine,
    continuous_batching_fits,
    request_seed,
)
from dpo_ray.generate import Load as BatchLoad
from dpo_ray.models import (
    Loaded,
    ModelSource,
    PairModel,
    end_token_ids,
    load_language_model,
    load_tokenizer,
    local_folder,
    read_config,
    shared_copy,
)
from dpo_ray.pairs import Ids, PreferencePair, PromptBranches, Text
from dpo_ray.reference import ResponseScorer, by_prompt, fitting, response_key
from serve.config import ServedModel
from serve.schema import ApiError, Ask, Begun, Load, Piece, Reward, TokenLogp
from serve.text import TextStream

CACHE_TOKENS = {"cpu": 32_768, "cuda": 131_072}
SCORED_TOKENS = {"cpu": 4096, "cuda": 16_384}
"""Of one forward pass that scores; a longer prompt with its responses has a pass of its own."""

STREAM_INTERVAL_S = 0.03
"""A stream sends no oftener; what comes meanwhile goes along."""

MESSAGES_PER_S = min(600, 50 * (os.cpu_count() or 1))
"""Of all streams together, about: on its way through Ray a message takes some milliseconds of other cores, so with many
streams each sends more seldom. The first text of an answer and its end never wait."""

STALL_S = 120.0
"""So long without a step while requests are at work, and the engine is stuck."""

MAX_ADAPTERS = 8
"""That are held ready beside the model itself."""

CONTEXT_TOKENS = 8
"""Of the prompt, for the blank at the beginning of a text that goes on."""


class Batching(Protocol):
    """Continuous batching, by transformers or by vLLM."""

    def stream(self, name: str, request: Request, deliver: Callable[[Progress], object], *, by_token: bool) -> None: ...

    def cancel(self, name: str) -> None: ...

    @property
    def load(self) -> BatchLoad: ...

    @property
    def is_running(self) -> bool: ...

    def close(self) -> None: ...


class Writer:
    """One model or adapter at work."""

    def __init__(self, batching: Batching) -> None:
        self.batching = batching
        self.open = 0
        """Answers at work."""
        self._seen = (0, time.monotonic())

    def problem(self) -> str | None:
        """Why this one cannot go on."""
        if not self.batching.is_running:
            return "the generation loop has ended"
        steps, now = self.batching.load.steps, time.monotonic()
        if steps != self._seen[0] or not self.open:
            self._seen = (steps, now)
        if now - self._seen[1] > STALL_S:
            return f"no step for {now - self._seen[1]:.0f} s with {self.open} answers at work"
        return None


class Wanted(NamedTuple):
    """Rewards that somebody waits for."""

    model: str
    items: list[PromptBranches]
    answer: "asyncio.Future[list[list[Reward]]]"


class Prompt(NamedTuple):
    """A prompt as the model takes it."""

    ids: Ids
    is_plain: bool
    """Text that goes on, not an assistant's turn."""


class Engine:
    """A served model with its adapters.

    Args:
        served: Folders and sizes.
        max_tokens: Most tokens of an answer, and of one that does not say.

    Raises:
        InputError: It cannot be loaded, or continuous batching gives other numbers than the model.
    """

    def __init__(self, served: ServedModel, max_tokens: int = 4096) -> None:
        self._served, self._max_tokens = served, max_tokens
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._precision = served.precision
        if self._precision == "auto":
            self._precision = "bf16" if self._device.type == "cuda" else "fp32"
        source = self._source(served.path)
        config = read_config(source)
        limits = [limit for limit in (getattr(config, "max_position_embeddings", None), served.max_length) if limit]
        self._max_length = min(limits, default=4096)
        # An adapter brings the tokenizer and template that it was trained with.
        words = self._source(served.adapter or served.path)
        tokenizer = load_tokenizer(words)
        self._decoder = load_tokenizer(words)
        self._chat = served.chat
        if self._chat == "auto":
            self._chat = "plain" if tokenizer.chat_template is None else "template"
        self._end_tokens = frozenset(end_token_ids(source)) | {tokenizer.eos_token_id} - {None}
        style: Literal["never", "auto"] = "never" if self._chat == "transcript" else "auto"
        data = DataConfig(sources=(SourceConfig(path="-"),), max_tokens=self._max_length, chat=style)
        self._encoder = PairEncoder(tokenizer, data, self._end_tokens)
        self._vllm = self._vllm_engine(source) if choose_engine(served.engine, source, "engine") == "vllm" else None
        if self._vllm is None and not continuous_batching_fits(shared_copy(self._base)):
            raise InputError(f"continuous batching gives other numbers than {served.path} itself: it cannot be served")
        self._writers: OrderedDict[str, Writer] = OrderedDict({served.name: self._new_writer(served.name)})
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._scorers: dict[str, tuple[ResponseScorer, ResponseScorer]] = {}
        self._queue: list[Wanted] = []
        self._scoring: asyncio.Task[None] | None = None
        self._scored_tokens = max(SCORED_TOKENS[self._device.type], self._max_length)
        self._names = itertools.count()
        self._tokenizing, self._preparing, self._computing = (
            ThreadPoolExecutor(1, name) for name in ("tokenizer", "loader", "scorer")
        )
        self._tokens = self._requests = self._streams = 0

    def close(self) -> None:
        """End all threads."""
        for writer in self._writers.values():
            writer.batching.close()
        for pool in (self._tokenizing, self._preparing, self._computing):
            pool.shutdown(cancel_futures=True)

    async def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        """Answer a request: what it takes first, then pieces as they come, or all together where no stream is wanted.

        An `ApiError` ends it. To stop early, close the generator.
        """
        loop = asyncio.get_running_loop()
        try:
            prompts = await loop.run_in_executor(self._tokenizing, self._prompts, ask)
            requests = [request for prompt in prompts for request in self._requests_for(prompt, ask)]
        except ApiError as error:
            yield error
            return
        arrived = Arrivals()
        answers = {
            str(next(self._names)): Answer(number, prompts[number // ask.n], ask, self)
            for number in range(len(requests))
        }
        by_token = ask.is_stream or bool(ask.stops)
        waiting, held = dict(answers), list[Piece]()
        writer = await self._claim(ask.model, len(answers))
        self._requests += 1
        self._streams += ask.is_stream
        try:
            yield Begun(sum(len(prompt.ids) for prompt in prompts))
            for name, request in zip(answers, requests, strict=True):
                writer.batching.stream(name, request, arrived.put, by_token=by_token)
            while waiting:
                latest = await arrived.take()
                failed = next((progress.error for progress in latest.values() if progress.error), None)
                if failed is not None:
                    yield ApiError(503, f"the engine failed: {failed}", code="engine_failed")
                    return
                began = loop.time()
                for name, progress in latest.items():
                    if name in waiting:
                        held.append(answers[name].piece(progress))
                        self._tokens += held[-1].num_tokens
                        if held[-1].finish_reason is not None:
                            del waiting[name]
                            writer.open -= 1
                            writer.batching.cancel(name)
                # What is wanted whole goes whole, also where tokens are watched for stop sequences.
                if ask.is_stream or not waiting:
                    yield held
                    held = []
                if waiting:
                    await arrived.pause(began + max(STREAM_INTERVAL_S, self._streams / MESSAGES_PER_S) - loop.time())
        finally:
            self._streams -= ask.is_stream
            writer.open -= len(waiting)
            for name in waiting:
                writer.batching.cancel(name)

    async def rewards(self, model: str, items: Sequence[tuple[Text, Sequence[str]]]) -> list[list[Reward]] | ApiError:
        """Implicit rewards of responses to prompts; those that are asked for meanwhile are scored in one go."""
        loop = asyncio.get_running_loop()
        if self._served.reference is None:
            return ApiError(400, f"`{model}` has no reference to measure rewards against", param="model")
        try:
            found = await loop.run_in_executor(self._tokenizing, lambda: [self._branches(*item) for item in items])
        except ApiError as error:
            return error
        self._queue.append(Wanted(model, found, loop.create_future()))
        wanted = self._queue[-1]
        if self._scoring is None or self._scoring.done():
            self._scoring = loop.create_task(self._score_waiting())  # nobody's own: whoever leaves stops no one else's
        return await wanted.answer

    def load(self) -> Load:
        """What all writers are at."""
        loads = [writer.batching.load for writer in list(self._writers.values())]
        return Load(
            sum(load.running for load in loads),
            sum(load.waiting for load in loads),
            max((load.cache_used for load in loads), default=0.0),
            sum(load.steps for load in loads),
            self._tokens,
            self._requests,
        )

    def problem(self) -> str | None:
        """Why this engine must be replaced; None while it works."""
        found = (writer.problem() for writer in list(self._writers.values()))
        return next((problem for problem in found if problem is not None), None)

    # Weights

    def _source(self, path: str) -> ModelSource:
        return ModelSource(path, None, self._served.trust_remote_code)

    def _adapter_of(self, name: str) -> str | None:
        return self._served.adapter if name == self._served.name else self._served.adapters[name]

    def _model(self, name: str) -> Any:
        """Modules of their own for a name, on the weights that all share."""
        adapter = self._adapter_of(name)
        if adapter is None:
            return shared_copy(self._base)
        from peft import PeftModel

        folder = local_folder(self._source(adapter))
        return PeftModel.from_pretrained(shared_copy(self._base), folder).to(self._device).eval()

    @cached_property
    def _base(self) -> Any:
        """The weights; where vLLM writes, only rewards need them."""
        return load_language_model(self._source(self._served.path), self._precision).to(self._device).eval()

    def _vllm_engine(self, source: ModelSource) -> Any:
        from serve.vllm import VllmEngine

        return VllmEngine(
            source,
            self._precision,
            self._end_tokens,
            longest=self._max_length,
            concurrency=self._served.concurrency,
            max_adapters=min(MAX_ADAPTERS, len(self._served.adapters) + (self._served.adapter is not None)),
        )

    def _new_writer(self, name: str) -> Writer:
        adapter = self._adapter_of(name)
        if self._vllm is not None:
            from serve.vllm import VllmBatching

            number = [self._served.name, *self._served.adapters].index(name) + 1
            return Writer(
                VllmBatching(self._vllm, None if adapter is None else self._vllm.adapter(name, number, adapter))
            )
        model = self._model(name)
        kind = self._device.type
        batching = ContinuousBatching(
            model if adapter is None else model.get_base_model(),
            self._end_tokens,
            longest=self._max_length,
            concurrency=self._served.concurrency,
            cache_tokens=self._served.cache_tokens
            or min(CACHE_TOKENS[kind], self._served.concurrency * self._max_length),
        )
        batching.start()
        return Writer(batching)

    async def _claim(self, name: str, num_answers: int) -> Writer:
        """What writes under a name, for so many answers more. What must be loaded keeps nobody else waiting."""
        while name not in self._writers:
            if name not in self._loading:
                self._loading[name] = asyncio.create_task(self._load_writer(name))
            await asyncio.shield(self._loading[name])
        writer = self._writers[name]
        self._writers.move_to_end(name)
        writer.open += num_answers
        return writer

    async def _load_writer(self, name: str) -> None:
        """Make an adapter ready; the one that was idle longest makes room."""
        loop = asyncio.get_running_loop()
        try:
            idle = [n for n, writer in self._writers.items() if not writer.open and n != self._served.name]
            for other in idle[: max(0, len(self._writers) - MAX_ADAPTERS)]:
                self._scorers.pop(other, None)
                await loop.run_in_executor(self._preparing, self._writers.pop(other).batching.close)
            self._writers[name] = await loop.run_in_executor(self._preparing, self._new_writer, name)
        finally:
            del self._loading[name]

    def _scorer(self, name: str) -> tuple[ResponseScorer, ResponseScorer]:
        """Policy and reference; a reference that is the adapter's own base takes no more memory."""
        if name not in self._scorers:
            assert self._served.reference is not None
            batch = BatchConfig(tokens_per_device=self._scored_tokens)
            policy = PairModel(self._model(name)).eval()
            if self._served.reference == self._served.path:
                below = shared_copy(self._base)
            else:
                below = load_language_model(self._source(self._served.reference), self._precision).eval()
            source = self._source(self._served.path)
            loaded = Loaded(policy, nullcontext), Loaded(PairModel(below).eval(), nullcontext)
            first, second = (ResponseScorer(source, self._precision, batch, loaded=one) for one in loaded)
            self._scorers[name] = first, second
        return self._scorers[name]

    # Words

    def _prompts(self, ask: Ask) -> list[Prompt]:
        return [self._prompt(text) for text in ask.prompts]

    def _prompt(self, text: Text) -> Prompt:
        pair = self._pair(text, "")
        try:
            ids = self._encoder.prompt_ids(pair)
        except InputError as error:
            raise ApiError(400, str(error).removeprefix(f"{pair.place}: "), param="messages") from None
        if len(ids) >= self._max_length:
            raise ApiError(
                400,
                f"the prompt has {len(ids)} tokens, and the model has room for {self._max_length} with the answer",
                code="context_length_exceeded",
            )
        return Prompt(ids, isinstance(pair.prompt, str) or self._chat == "transcript")

    def _pair(self, prompt: Text, response: str) -> PreferencePair:
        """Prompt and response as training has them; both sides are the same response."""
        if not isinstance(prompt, str):
            if self._chat != "plain":
                if self._chat == "transcript" and {turn["role"] for turn in prompt} - SPEAKERS.keys():
                    told = f"this model has no roles but {', '.join(SPEAKERS)}"
                    raise ApiError(400, told, param="messages")
                turn = ({"role": "assistant", "content": response},)
                return PreferencePair(prompt, turn, turn, is_transcript=self._chat == "transcript")
            if len(prompt) != 1 or prompt[0]["role"] != "user":
                raise ApiError(
                    400,
                    "this model has no chat template: it takes one message of the user, which it continues",
                    param="messages",
                )
            prompt = prompt[0]["content"]
        return PreferencePair(prompt, response, response)

    def _branches(self, prompt: Text, responses: Sequence[str]) -> PromptBranches:
        try:
            encoded = [self._encoder.with_response(self._pair(prompt, response)) for response in responses]
        except InputError as error:
            raise ApiError(400, str(error), param="messages") from None
        longest = max(len(prompt_ids) + len(ids) for prompt_ids, ids in encoded)
        if longest > self._max_length:
            raise ApiError(
                400,
                f"a prompt with its response has {longest} tokens, and the model has room for {self._max_length}",
                code="context_length_exceeded",
            )
        return PromptBranches(encoded[0][0], tuple(ids for _, ids in encoded))

    def _requests_for(self, prompt: Prompt, ask: Ask) -> Iterator[Request]:
        room = self._max_length - len(prompt.ids)
        if ask.max_tokens is not None and ask.max_tokens > min(room, self._max_tokens):
            raise ApiError(
                400,
                f"`max_tokens` is {ask.max_tokens}: behind this prompt of {len(prompt.ids)} tokens there is room for "
                f"{min(room, self._max_tokens)}",
                param="max_tokens",
                code="context_length_exceeded",
            )
        sampling = Sampling(
            ask.max_tokens or min(room, self._max_tokens),
            ask.temperature,
            ask.top_p,
            ask.presence_penalty,
            ask.frequency_penalty,
        )
        for index in range(ask.n):
            yield Request(prompt.ids, request_seed(ask.seed, prompt.ids, index), sampling)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._decoder.decode(list(ids), skip_special_tokens=True))

    def is_end(self, token: int) -> bool:
        return token in self._end_tokens

    # Rewards

    async def _score_waiting(self) -> None:
        """Score whatever waits, and what has come meanwhile, until nothing waits."""
        while self._queue:
            waiting, self._queue = self._queue, []
            try:
                answers = await asyncio.get_running_loop().run_in_executor(self._computing, self._score, waiting)
            except Exception as error:  # belongs to those who asked
                for wanted in waiting:
                    if not wanted.answer.done():
                        wanted.answer.set_exception(error)
                continue
            for wanted, answer in zip(waiting, answers, strict=True):
                if not wanted.answer.done():
                    wanted.answer.set_result(answer)

    def _score(self, waiting: Sequence["Wanted"]) -> list[list[list[Reward]]]:
        """Rewards of each request, all prompts of one model in one plan."""
        by_model: dict[str, list[PromptBranches]] = {}
        for wanted in waiting:
            by_model.setdefault(wanted.model, []).extend(wanted.items)
        values = {model: self._logps(model, items) for model, items in by_model.items()}
        beta = self._served.beta or 1.0
        return [
            [
                [
                    Reward(beta * (policy - reference), policy, reference, len(ids))
                    for ids in item.responses
                    for policy, reference in [values[wanted.model][response_key(item.prompt_ids, ids)]]
                ]
                for item in wanted.items
            ]
            for wanted in waiting
        ]

    def _logps(self, model: str, items: Sequence[PromptBranches]) -> dict[bytes, tuple[float, float]]:
        """Summed log-probs of every response under policy and reference."""
        unique = {
            response_key(item.prompt_ids, ids): (item.prompt_ids, ids) for item in items for ids in item.responses
        }
        parts = [part for whole in by_prompt(unique.values()) for part in fitting(whole, self._scored_tokens)]
        policy, reference = (scorer.score(parts) for scorer in self._scorer(model))
        return {key: (policy[key].logps, reference[key].logps) for key in policy}


class Answer:
    """One answer while it is written: tokens in, pieces of text out."""

    def __init__(self, number: int, prompt: Prompt, ask: Ask, engine: Engine) -> None:
        self._number, self._engine, self._wants_logps = number, engine, ask.wants_logps
        # Only text that goes on has a blank at its beginning.
        before = prompt.ids[-CONTEXT_TOKENS:].tolist() if prompt.is_plain else []
        self._text = TextStream(engine.decode, ask.stops, before)
        self._last, self._known = before[-1:], 0

    def piece(self, progress: Progress) -> Piece:
        """What is new since the last one."""
        new = list(zip(progress.ids[self._known :], progress.logps[self._known :], strict=False))
        self._known += len(new)
        text, logps, is_ended, num_tokens = "", [], False, 0
        for token, logp in new:
            is_ended = self._engine.is_end(token)
            num_tokens += 1
            if is_ended:
                break
            text += self._text.push(token)
            if self._wants_logps:
                logps.append(TokenLogp(self._alone(token), logp))
            self._last = [token]
            is_ended = self._text.is_stopped
            if is_ended:  # what was written on meanwhile is not counted: it depends on the speed of the machine
                break
        is_over = is_ended or progress.is_done
        return Piece(
            self._number,
            text + (self._text.finish() if is_over else ""),
            num_tokens,
            ("stop" if is_ended else "length") if is_over else None,
            logps if self._wants_logps else None,
        )

    def _alone(self, token: int) -> str:
        """A token's own text: the blank before it shows behind another one only."""
        return self._engine.decode([*self._last, token])[len(self._engine.decode(self._last)) :]


class Arrivals:
    """What has come of the answers to a request. Each progress holds all before it, so the last one of each counts."""

    def __init__(self) -> None:
        self._latest: dict[str, Progress] = {}
        self._has_come, self._is_pausing = asyncio.Event(), False

    def put(self, progress: Progress) -> None:
        self._latest[progress.name] = progress
        if progress.is_done or not self._is_pausing:
            self._has_come.set()

    async def take(self) -> dict[str, Progress]:
        """All that has come since the last time, by answer; waits for some."""
        if not self._latest:
            self._has_come.clear()
            await self._has_come.wait()
        found, self._latest = self._latest, {}
        return found

    async def pause(self, seconds: float) -> None:
        """Let more come, unless an answer ends: its client goes on at once."""
        self._has_come.clear()
        self._is_pausing = True
        try:
            async with asyncio.timeout(max(0.0, seconds)):
                await self._has_come.wait()
        except TimeoutError:
            pass
        finally:
            self._is_pausing = False
