"""Responses that a model writes to prompts, in batches on a pool of Ray Data actors, so that a rerun writes the same.

All randomness of a response is a function of its own seed, which is a hash of its prompt and its number: what else is
in a batch, the order, the blocks and the number of actors play no part. What remains is rounding, as batches of other
shapes sum in another order: in fp32 it turned none of 19 200 tokens, in bf16 one in a hundred. The same prompts in one
call make the same batches, so a rerun writes the same in any precision.

Log-probs are those of the model itself, at temperature 1 and with nothing cut off, whatever a response was sampled at.
"""

import hashlib
import importlib
import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpo_ray.actor_pool import on_actors
from dpo_ray.errors import InputError
from dpo_ray.models import (
    DTYPES,
    ModelSource,
    end_token_ids,
    load_language_model,
    load_tokenizer,
    local_folder,
    read_config,
)
from dpo_ray.pairs import Ids

Engine = Literal["auto", "transformers", "vllm"]

REQUESTS_PER_BLOCK = 128
"""Responses of one call of an actor, about: what is lost when an actor dies, and the step of the progress. It does not
depend on the number of actors, so that this does not show in the rounding either."""

CACHE_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Prompt and response tokens of all requests at work together, at most. Without flash attention each new token is
compared with all of them, so more is slower."""

BATCH_TOKENS = {"cpu": 256, "cuda": 2048}
"""Tokens of one forward pass, at most."""

PAGE_TOKENS = {"cpu": 32, "cuda": 256}
"""Tokens of a page of the cache. Flash attention reads pages of 256."""

SPARE_PAGES = 16
"""Models that mix kinds of attention hand out their cache in lots of several pages."""

NUCLEUS_TOKENS = 1024
"""Where these hold the probability that is asked for, the vocabulary is not sorted."""


class Sampling(NamedTuple):
    """How the tokens of a response are drawn."""

    max_tokens: int
    temperature: float = 1.0
    """0 takes the most probable token."""

    top_p: float = 1.0
    """Tokens are drawn from the smallest set that has this probability, at the temperature."""

    presence_penalty: float = 0.0
    """Taken off the logit of each token that the response has already, as in OpenAI's API."""

    frequency_penalty: float = 0.0
    """Taken off it once more for each time that it has come."""

    @property
    def is_penalised(self) -> bool:
        return bool(self.presence_penalty or self.frequency_penalty)


class Generated(NamedTuple):
    """A response that a model wrote."""

    ids: Ids
    """With the end token, if it came to one."""

    logps: float
    """Summed log p(ids | prompt) under the model itself, nats; minus its mean over samples at temperature 1 estimates
    the entropy."""

    is_finished: bool
    """It ended by an end token, not by its length."""


class Responses(NamedTuple):
    """What came of one prompt: all its responses, in the order of their numbers, or the reason why there are none."""

    responses: list[Generated]
    error: str | None = None


class Request(NamedTuple):
    """One response that is wanted."""

    prompt_ids: Ids
    seed: int
    sampling: Sampling


def request_seed(seed: int, prompt_ids: Ids, index: int) -> int:
    """Seed of a prompt's response number `index`, in [0, 2^63): a hash, so the same on every machine."""
    digest = hashlib.blake2b(f"{seed} {index}\n".encode(), digest_size=8)
    digest.update(np.ascontiguousarray(prompt_ids, "<i4").tobytes())
    return int.from_bytes(digest.digest(), "little") >> 1


# The draw. SplitMix64 is the generator of Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"
# (OOPSLA), with the finalizer that they took from Stafford: number n of the stream of a state is a hash of state + n *
# step. A request's seed is one state; its n-th number is the state of position n, whose stream has the vocabulary's.

_STEP = 0x9E3779B97F4A7C15
_MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))
"""Shifts and factors of the finalizer."""


def position_keys(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.uint64]:
    """States of the noise at one position of each seed, [B]: number `position` of the SplitMix64 stream of the seed,
    which is in [0, 2^64)."""
    state = np.array(seeds, np.uint64) + np.array(positions, np.uint64) * np.uint64(_STEP)
    for shift, factor in _MIX:
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    return state


def gumbel_noise(keys: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise that is a function of (key, token) alone, finite throughout.

    Each 64-bit number of the SplitMix64 stream of a key serves two tokens.

    Args:
        keys: [B] int64, the bits of `position_keys`.
        size: V, size of the vocabulary.

    Returns:
        [B, V] float32, between -2.9 and 22.2.
    """
    state = keys[:, None] + torch.arange((size + 1) // 2, device=keys.device).mul_(_signed(_STEP))
    shifted = torch.empty_like(state)
    for shift, factor in _MIX:
        torch.bitwise_right_shift(state, shift, out=shifted)
        state ^= shifted.bitwise_and_(2 ** (64 - shift) - 1)  # the shift of signed numbers repeats the sign
        state *= _signed(factor)
    return _gumbel(state.view(torch.int32)[:, :size])


def _gumbel(bits: Tensor) -> Tensor:
    """-log(-log(1 - u)) for u = (31 bits + 1/2) / 2^31. The large values are those of a small u, which float32 keeps
    apart; the largest u would be rounded to 1, and is not let there."""
    u = (bits & 0x7FFFFFFF).float().add_(0.5).mul_(2.0**-31).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def draw(
    logits: Tensor, keys: Tensor, temperature: Tensor, top_p: Tensor | None, penalised: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw a token of each row by the Gumbel-max trick: argmax(logits / T + G) is a sample of softmax(logits / T).

    Gumbel 1954; see Maddison, Tarlow and Minka 2014 (arXiv:1411.0030), section 2. Scaled by T, it takes T = 0.

    Args:
        logits: [B, V] float32, of the model itself.
        keys: [B] int64, the bits of `position_keys`.
        temperature: [B] float32, at least 0.
        top_p: [B] float32 in (0, 1]; None is 1 everywhere.
        penalised: Logits [B, V] to draw from instead; see `penalise`.

    Returns:
        Tokens [B] int64, and their log-probs under softmax(logits) [B] float32.
    """
    allowed = logits if penalised is None else penalised
    allowed = allowed if top_p is None else nucleus(allowed, temperature, top_p)
    tokens = (allowed + temperature[:, None] * gumbel_noise(keys, logits.shape[-1])).argmax(-1)
    return tokens, logits.gather(-1, tokens[:, None]).squeeze(-1) - logits.logsumexp(-1)


def nucleus(logits: Tensor, temperature: Tensor, top_p: Tensor) -> Tensor:
    """Logits [B, V], -inf outside of the smallest set of tokens that has the probability `top_p` at the temperature
    (Holtzman et al. 2020, arXiv:1904.09751). Tokens as probable as its last one belong to it."""
    probs = (logits / temperature[:, None].clamp_min(1e-4)).softmax(-1)
    ranked = probs.topk(min(NUCLEUS_TOKENS, probs.shape[-1])).values
    total = ranked.double().cumsum(-1)
    if (total[:, -1] < top_p).logical_and_(top_p < 1).any():
        ranked = probs.sort(dim=-1, descending=True).values
        total = ranked.double().cumsum(-1)
    last = ranked.masked_fill(total - ranked >= top_p[:, None], math.inf).amin(-1)
    return logits.masked_fill((probs < last[:, None]) & (top_p[:, None] < 1), -math.inf)


def penalise(logits: Tensor, drawn: Sequence[Sequence[int]], samplings: Sequence[Sampling]) -> Tensor | None:
    """Logits [B, V] less the penalties on the tokens that each row's response has already; None without any.

    With c(v) the times that token v has come: logit(v) - frequency_penalty c(v) - presence_penalty [c(v) > 0], as the
    OpenAI API reference says.
    """
    if not any(sampling.is_penalised for sampling in samplings):
        return None
    result = logits.clone()
    for row, (tokens, sampling) in enumerate(zip(drawn, samplings, strict=True)):
        if tokens and sampling.is_penalised:
            counts = torch.bincount(torch.tensor(tokens, device=logits.device), minlength=logits.shape[-1])
            result[row] -= sampling.frequency_penalty * counts + sampling.presence_penalty * (counts > 0)
    return result


class RequestSampler:
    """Draws the next tokens of a batch of continuous batching, each by its request's own seed.

    Continuous batching knows processors with arguments per request, but it samples from one global generator, and the
    log-probs it reports are those of the processed logits. So this stands in two of its places: of its list of
    processors, where it passes on the arguments that travel with a batch, and of the sampling step.
    """

    tensors_required = 4  # rows: two halves of the key, temperature, top_p
    do_processing = True

    def __init__(self) -> None:
        self._arguments: Tensor | None = None
        self._has_top_p = False
        self._samplings: list[Sampling] = []
        self._drawn: list[Sequence[int]] = []

    def check_kwargs(self, kwargs: dict[str, Any]) -> None:
        """Any request of ours is right."""

    def fill_defaults(self, int32_tensor: Tensor) -> None:
        """For rows that no request has; what is drawn there is dropped."""
        int32_tensor.zero_()

    def prepare_tensor_args(self, requests_in_batch: Sequence[Any], arg_storage: Tensor) -> Tensor:
        """Write the arguments of a batch, as bits, into its storage [4, most requests] int32."""
        states = [request.state for request in requests_in_batch if request.has_new_token]
        wanted: list[Request] = [state.logit_processor_kwargs["request"] for state in states]
        # The position in the whole text, which also holds when a request was put off and begun anew.
        keys = position_keys([w.seed for w in wanted], [state.position_offset for state in states])
        rows: NDArray[np.int32] = np.empty((4, len(states)), np.int32)
        rows[:2] = keys.view(np.int32).reshape(-1, 2).T
        rows[2] = np.array([w.sampling.temperature for w in wanted], np.float32).view(np.int32)
        rows[3] = np.array([w.sampling.top_p for w in wanted], np.float32).view(np.int32)
        arg_storage[:, : len(states)] = torch.from_numpy(rows).to(arg_storage.device)
        self._samplings = [w.sampling for w in wanted]
        self._has_top_p = any(sampling.top_p < 1 for sampling in self._samplings)
        self._drawn = [
            _drawn(state) if w.sampling.is_penalised else () for w, state in zip(wanted, states, strict=True)
        ]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        """The logits as they are."""
        self._arguments = logits_processor_args
        return scores

    def sample(self, scores: Tensor, output_ids: Tensor) -> None:
        """Draw from logits [1, B, V]; tokens and the bits of their log-probs go into the first columns of `output_ids`,
        [2, most tokens] int32."""
        assert self._arguments is not None
        logits = scores[0]
        penalised = penalise(logits[: len(self._drawn)], self._drawn, self._samplings)
        if penalised is not None:
            penalised = torch.cat((penalised, logits[len(self._drawn) :]))  # rows that no request has
        arguments = self._arguments[:, : len(logits)]
        keys = arguments[:2].T.contiguous().view(torch.int64).squeeze(-1)
        temperature, top_p = arguments[2:].view(torch.float32)
        tokens, logps = draw(logits, keys, temperature, top_p if self._has_top_p else None, penalised)
        output_ids[0, : len(tokens)] = tokens
        output_ids[1, : len(tokens)] = logps.view(torch.int32)


def _drawn(state: Any) -> list[int]:
    """The tokens of a request's response so far, also when it was put off and begun anew behind its own tokens."""
    before: int = state._true_initial_tokens
    drawn: list[int] = (state.initial_tokens[before:] if before else []) + state.generated_tokens
    return drawn


class Progress(NamedTuple):
    """A response while it is written."""

    name: str
    """Of its request."""
    ids: Sequence[int]
    """All tokens so far."""
    logps: Sequence[float]
    """Log p of each under the model itself, nats."""
    is_done: bool
    error: str | None = None


class Load(NamedTuple):
    """What continuous batching is at."""

    running: int
    waiting: int
    cache_used: float
    """Share of the cache that requests hold. What is kept for later requests that begin alike makes room for them."""
    steps: int
    """Forward passes since the start."""


class ContinuousBatching:
    """transformers' continuous batching of one model: requests come and go, each with its own seed and sampling.

    A context: the loop runs in a thread, which ends with the context. Requests that are submitted before `start` are
    taken up in their order, whatever the speed of the machine.

    Args:
        model: A causal language model, on its device. Its attention may be exchanged for a faster one.
        longest: Most tokens of a request, prompt and response.
        concurrency: Most requests at work together.
        cache_tokens: Prompt and response tokens that there is room for; default: of so many requests, each the longest.
            When it is full, requests are put off and begun anew.
    """

    def __init__(
        self,
        model: Any,
        end_tokens: frozenset[int],
        *,
        longest: int,
        concurrency: int,
        cache_tokens: int | None = None,
    ) -> None:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        kind = model.device.type
        page = PAGE_TOKENS[kind]
        pages = concurrency * -(-longest // page) if cache_tokens is None else -(-max(cache_tokens, longest) // page)
        self._end_tokens, self._open, self._is_started = end_tokens, set[str](), False
        self._manager: Any = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=page,
                num_blocks=pages + SPARE_PAGES,
                max_batch_tokens=BATCH_TOKENS[kind],
                max_requests_per_batch=concurrency,
                return_logprobs=True,
                safety_margin=0.0,  # there is room for all that are at work
                auto_switch_to_flash=kind == "cuda" and model.dtype != torch.float32,
                # A captured graph would keep the sampler's choices of the first batch.
                use_cuda_graph=False,
                use_async_batching=False,
            ),
        )
        sampler = RequestSampler()
        self._manager.logit_processor = sampler
        self._manager.warmup()  # makes the cache and the runner
        self._manager.batch_processor.model_runner._sample = sampler.sample

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the loop; what is open fails."""
        if self._is_started:
            self._manager.stop(hard_stop=True)

    def submit(self, name: str, request: Request) -> None:
        """Queue a request under a name that no other has."""
        self._open.add(name)
        self._add(name, request, streaming=False)

    def stream(self, name: str, request: Request, deliver: Callable[[Progress], object], *, by_token: bool) -> None:
        """Queue a request from within an event loop, which calls `deliver` as the response is written.

        Args:
            by_token: After every token; else once, at the end.
        """

        def tell(output: Any) -> None:
            error = None if output.error is None else _one_line(output.error)
            deliver(Progress(name, output.generated_tokens, output.logprobs, output.is_finished(), error))

        self._manager.register_result_handler(name, tell)
        self._add(name, request, streaming=by_token)

    def cancel(self, name: str) -> None:
        """Stop a request that was streamed; it delivers no more, and its part of the cache is free at the next step."""
        router = self._manager.output_router
        with router._lock:
            known = router.result_handlers.pop(name, None)
        if known is not None:
            self._manager.cancel_request(name)

    @property
    def load(self) -> Load:
        processor = self._manager.batch_processor
        waiting = len(processor.scheduler.waiting_requests) + self._manager.input_queue.qsize()
        parts = processor.cache.cache_allocators.values()
        held = sum(len(blocks) for part in parts for blocks in list(part.block_table.values()))
        used = held / sum(part.num_blocks for part in parts)
        return Load(len(processor.scheduler.active_requests), waiting, used, self._manager.current_batch)

    @property
    def is_running(self) -> bool:
        """Whether the loop lives: an error ends it, and with it all that were at work."""
        return bool(self._manager.is_running())

    def start(self) -> None:
        """Begin, with what was submitted so far."""
        self._is_started = True
        self._manager.current_batch = 0
        self._manager.start()

    def _add(self, name: str, request: Request, *, streaming: bool) -> None:
        self._manager.add_request(
            request.prompt_ids.tolist(),
            request_id=name,
            max_new_tokens=request.sampling.max_tokens,
            eos_token_id=sorted(self._end_tokens),
            streaming=streaming,
            request=request,
        )

    def results(self) -> Iterator[tuple[str, Generated | str]]:
        """What comes of each request, by its name and in the order of their ends; a text is the reason of a failure.
        It ends when no request is open."""
        while self._open:
            was_running = self._manager.is_running()
            output = self._manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                self._open.discard(output.request_id)
                yield (
                    output.request_id,
                    _generated(output.generated_tokens, output.logprobs, self._end_tokens)
                    if output.error is None
                    else _one_line(output.error),
                )
            elif output is None and not was_running:
                yield from ((name, "generation stopped before its turn") for name in sorted(self._open))
                self._open.clear()


class GenerationEngine(Protocol):
    """What writes responses: a loaded model."""

    def run(self, requests: Sequence[Request]) -> list[Generated | str]:
        """The response to each request, in their order; a text is the reason why there is none."""


class TransformersEngine:
    """A model in transformers, on the GPU if there is one: continuous batching, or what `generate` does where an
    architecture needs it."""

    def __init__(self, model: ModelSource, precision: str, end_tokens: frozenset[int]) -> None:
        from transformers import GenerationConfig

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_language_model(model, precision).to(device).eval()
        self._model.generation_config = GenerationConfig()  # penalties that a model comes with are not its distribution
        self._end_tokens = end_tokens
        self._run = self._continuously if continuous_batching_fits(self._model) else self._by_length

    def run(self, requests: Sequence[Request]) -> list[Generated | str]:
        """See `GenerationEngine`. When the engine breaks down, those that it left are tried again one at a time."""
        if not requests:
            return []
        longest = max(len(request.prompt_ids) + request.sampling.max_tokens for request in requests)
        kind = self._model.device.type
        at_once = max(1, min(len(requests), CACHE_TOKENS[kind] // longest, BATCH_TOKENS[kind]))
        results = self._run(requests, longest, at_once)
        failed = [i for i, result in enumerate(results) if isinstance(result, str)]
        if failed and at_once > 1:
            again = self._run([requests[i] for i in failed], longest, 1)
            for i, result in zip(failed, again, strict=True):
                results[i] = result
        return results

    def _continuously(self, requests: Sequence[Request], longest: int, at_once: int) -> list[Generated | str]:
        return run_continuously(self._model, self._end_tokens, requests, longest, at_once)

    def _by_length(self, requests: Sequence[Request], longest: int, at_once: int) -> list[Generated | str]:
        """Batches of one prompt length, so that nothing is padded: some architectures have no mask for it."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, request in enumerate(requests):
            alike.setdefault((len(request.prompt_ids), request.sampling.max_tokens), []).append(i)
        results: dict[int, Generated | str] = {}
        for numbers in alike.values():
            for start in range(0, len(numbers), at_once):
                part = numbers[start : start + at_once]
                results |= zip(part, self._batch([requests[i] for i in part]), strict=True)
        return [results[i] for i in range(len(requests))]

    def _batch(self, requests: Sequence[Request]) -> Sequence[Generated | str]:
        from transformers import LogitsProcessorList

        prompts = torch.from_numpy(np.stack([request.prompt_ids for request in requests])).long()
        prompts = prompts.to(self._model.device)
        draws = _Draws(requests, prompts.device)
        try:
            whole = self._model.generate(
                input_ids=prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                logits_processor=LogitsProcessorList([draws]),
                max_new_tokens=requests[0].sampling.max_tokens,
                eos_token_id=sorted(self._end_tokens) or None,
                pad_token_id=0,
            )
        except RuntimeError as error:  # out of memory
            return [_one_line(error)] * len(requests)
        rows = whole[:, prompts.shape[1] :].tolist()
        return [_generated(*row, self._end_tokens) for row in zip(rows, draws.logps(), strict=True)]


class _Draws:
    """The draws of a batch in `generate`: its greedy choice is told which token to take."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        self._seeds, self._samplings = [r.seed for r in requests], [r.sampling for r in requests]
        samplings, self._start = self._samplings, len(requests[0].prompt_ids)
        self._temperature = torch.tensor([s.temperature for s in samplings], device=device)
        self._top_p = torch.tensor([s.top_p for s in samplings], device=device)
        self._has_top_p = any(s.top_p < 1 for s in samplings)
        self._logps: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        keys = position_keys(self._seeds, [input_ids.shape[1]] * len(input_ids)).view(np.int64)
        top_p = self._top_p if self._has_top_p else None
        logits = scores.float()
        penalised = penalise(logits, input_ids[:, self._start :].tolist(), self._samplings)
        tokens, logps = draw(logits, torch.from_numpy(keys).to(scores.device), self._temperature, top_p, penalised)
        self._logps.append(logps)
        return torch.full_like(scores, -math.inf).scatter_(-1, tokens[:, None], 0.0)

    def logps(self) -> list[list[float]]:
        """Of each row and position."""
        return torch.stack(self._logps, dim=1).tolist()


def _generated(tokens: Sequence[int], logps: Sequence[float], end_tokens: frozenset[int]) -> Generated | str:
    """A response of tokens [n], up to its end token, and their log-probs [n]."""
    length = next((i + 1 for i, token in enumerate(tokens) if token in end_tokens), len(tokens))
    total = math.fsum(logps[:length])
    if not length or not math.isfinite(total):
        return f"the model gives {length} tokens with the log-prob {total}"
    return Generated(np.array(tokens[:length], np.int32), total, tokens[length - 1] in end_tokens)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or "generation failed"


def run_continuously(
    model: Any, end_tokens: frozenset[int], requests: Sequence[Request], longest: int, at_once: int
) -> list[Generated | str]:
    """The response to each request by continuous batching, in their order."""
    names = [str(i) for i in range(len(requests))]
    with ContinuousBatching(model, end_tokens, longest=longest, concurrency=at_once) as batching:
        for name, request in zip(names, requests, strict=True):
            batching.submit(name, request)
        batching.start()
        results = dict(batching.results())
    return [results[name] for name in names]


def continuous_batching_fits(model: Any) -> bool:
    """Whether continuous batching gives the model's own numbers: it is tried on some short prompts.

    It refuses some architectures, and with others it loses the positions in silence. Caps of attention scores, which it
    leaves out, show in long texts only, so they are known by their configuration.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, config.vocab_size, length).astype(np.int32) for length in (7, 3, 5)]
    requests = [Request(prompt, seed, Sampling(max_tokens=6)) for seed, prompt in enumerate(prompts)]
    log = logging.getLogger("ContinuousBatchingLogger")  # of transformers; it reports what it cannot do as a crash
    level, attention = log.level, model.config._attn_implementation
    log.setLevel(logging.CRITICAL)
    try:
        results = run_continuously(model, frozenset(), requests, longest=16, at_once=len(requests))
    except (ValueError, TypeError, LookupError, AttributeError, NotImplementedError):
        return False
    finally:
        log.setLevel(level)
        if model.config._attn_implementation != attention:  # a refusal may leave the one for its cache behind
            model.set_attn_implementation(attention)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.5
    return all(
        not isinstance(result, str)
        and math.isclose(result.logps, _plain_logps(model, request, result), rel_tol=1e-4, abs_tol=tolerance)
        for request, result in zip(requests, results, strict=True)
    )


@torch.no_grad()
def _plain_logps(model: Any, request: Request, result: Generated) -> float:
    ids = torch.from_numpy(np.concatenate((request.prompt_ids, result.ids))).long()[None].to(model.device)
    logps = model(input_ids=ids).logits[0, len(request.prompt_ids) - 1 : -1].double().log_softmax(-1)
    return float(logps.gather(-1, ids[0, len(request.prompt_ids) :, None]).sum())


class VllmEngine:
    """A model in vLLM. Its seeds are per request too, but they give other texts than transformers."""

    def __init__(self, model: ModelSource, precision: str, end_tokens: frozenset[int], max_length: int | None) -> None:
        vllm: Any = importlib.import_module("vllm")

        self._sampling_params = vllm.SamplingParams
        self._end_tokens = end_tokens
        self._llm = vllm.LLM(
            model=str(local_folder(model)),
            trust_remote_code=model.trust_remote_code,
            dtype=str(DTYPES[precision]).removeprefix("torch."),
            max_model_len=max_length,
            logprobs_mode="raw_logprobs",  # of the model itself: before temperature and top_p
            generation_config="vllm",  # no defaults of the model's
        )

    def run(self, requests: Sequence[Request]) -> list[Generated | str]:
        """See `GenerationEngine`."""
        if not requests:
            return []
        outputs = self._llm.generate(
            [{"prompt_token_ids": request.prompt_ids.tolist()} for request in requests],
            [
                self._sampling_params(
                    temperature=request.sampling.temperature,
                    top_p=request.sampling.top_p,
                    presence_penalty=request.sampling.presence_penalty,
                    frequency_penalty=request.sampling.frequency_penalty,
                    max_tokens=request.sampling.max_tokens,
                    seed=request.seed,
                    stop_token_ids=sorted(self._end_tokens),
                    logprobs=0,  # of the drawn token alone
                    detokenize=False,
                )
                for request in requests
            ],
            use_tqdm=False,
        )
        return [self._generated(output.outputs[0]) for output in outputs]

    def _generated(self, completion: Any) -> Generated | str:
        tokens = list(completion.token_ids)
        logps = [at[token].logprob for at, token in zip(completion.logprobs, tokens, strict=True)]
        return _generated(tokens, logps, self._end_tokens)


def choose_engine(
    wanted: Engine, model: ModelSource, key: str = "acquire.generate.engine"
) -> Literal["transformers", "vllm"]:
    """The engine for a model here: vLLM where it is installed, there is a GPU, and the weights are whole.

    Args:
        key: What messages call the choice.

    Raises:
        InputError: vLLM is asked for and cannot be had.
    """
    if wanted == "transformers":
        return wanted
    is_there = importlib.util.find_spec("vllm") is not None
    is_whole = not (local_folder(model) / "adapter_config.json").exists()
    if wanted == "auto":
        return "vllm" if is_there and is_whole and torch.cuda.is_available() else "transformers"
    if not is_there:
        raise InputError(f"`{key}`: vllm is not installed")
    if not is_whole:
        raise InputError(f"`{key}`: vllm takes whole weights, and {model.path} is an adapter")
    return wanted


class ResponseGenerator:
    """Writes responses to prompts with one model.

    A plain class: tests call it directly, and Ray Data runs it as a pool of actors, each loading the model once.

    Args:
        max_length: Most tokens of a prompt with its response that will be asked for; None is what the model can take.

    Raises:
        InputError: There is no such model, or it has no tokenizer, or the engine cannot be had.
    """

    def __init__(
        self, model: ModelSource, precision: str, *, engine: Engine = "auto", max_length: int | None = None
    ) -> None:
        config = read_config(model)
        self._vocab_size: int = config.vocab_size
        limits = [limit for limit in (getattr(config, "max_position_embeddings", None), max_length) if limit]
        self._max_length: int | None = min(limits, default=None)
        end_tokens = frozenset(end_token_ids(model)) | {load_tokenizer(model).eos_token_id} - {None}
        self._engine: GenerationEngine = (
            VllmEngine(model, precision, end_tokens, self._max_length)
            if choose_engine(engine, model) == "vllm"
            else TransformersEngine(model, precision, end_tokens)
        )

    def generate(self, prompts: Sequence[Ids], num_responses: int, sampling: Sampling, seed: int) -> list[Responses]:
        """`num_responses` responses to each prompt, in their order. A response ends at the model's last position too.

        A prompt that cannot be answered has an error, and the others have their responses. Equal prompts have equal
        responses.
        """
        problems = [self._problem(prompt) for prompt in prompts]
        requests = [
            Request(prompt, request_seed(seed, prompt, index), self._fitting(sampling, prompt))
            for prompt, problem in zip(prompts, problems, strict=True)
            if problem is None
            for index in range(num_responses)
        ]
        results = iter(self._engine.run(requests))
        return [
            _gathered([next(results) for _ in range(num_responses)]) if problem is None else Responses([], problem)
            for problem in problems
        ]

    def __call__(self, block: pa.Table, *, num_responses: int, sampling: Sampling, seed: int) -> pa.Table:
        """Answer a block of prompts: columns `number` and `prompt_ids`. See `_table` for what comes back."""
        prompts = [np.asarray(ids, np.int32) for ids in block.column("prompt_ids").to_pylist()]
        return _table(block.column("number").to_pylist(), self.generate(prompts, num_responses, sampling, seed))

    def _problem(self, prompt: Ids) -> str | None:
        """Why a prompt cannot be answered at all; such a one would take the others of its batch down."""
        if not len(prompt):
            return "the prompt has no token"
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            return f"the prompt has a token outside of the model's {self._vocab_size}"
        if self._max_length is not None and len(prompt) >= self._max_length:
            return f"the prompt has {len(prompt)} tokens, and there is room for {self._max_length} with a response"
        return None

    def _fitting(self, sampling: Sampling, prompt: Ids) -> Sampling:
        room = math.inf if self._max_length is None else self._max_length - len(prompt)
        return sampling if sampling.max_tokens <= room else sampling._replace(max_tokens=int(room))


def _gathered(results: Sequence[Generated | str]) -> Responses:
    errors = [result for result in results if isinstance(result, str)]
    responses = [result for result in results if not isinstance(result, str)]
    return Responses([], errors[0]) if errors else Responses(responses)


def _table(numbers: Sequence[int], found: Sequence[Responses]) -> pa.Table:
    """Prompts by their numbers, a row each, with lists over their responses."""
    lists = [item.responses for item in found]
    return pa.table(
        {
            "number": pa.array(numbers, pa.int64()),
            "ids": pa.array([[r.ids for r in responses] for responses in lists], pa.list_(pa.list_(pa.int32()))),
            "logps": pa.array([[r.logps for r in responses] for responses in lists], pa.list_(pa.float64())),
            "is_finished": pa.array([[r.is_finished for r in responses] for responses in lists], pa.list_(pa.bool_())),
            "error": pa.array([item.error for item in found], pa.string()),
        }
    )


def _from_table(table: pa.Table) -> Iterator[tuple[int, Responses]]:
    for row in table.to_pylist():
        each = zip(row["ids"], row["logps"], row["is_finished"], strict=True)
        responses = [Generated(np.asarray(ids, np.int32), *rest) for ids, *rest in each]
        yield row["number"], Responses(responses, row["error"])


def _blocks(prompts: Sequence[Ids], num_responses: int) -> list[pa.Table]:
    """Prompts with their numbers, in blocks of about equal work."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    num_blocks = min(len(prompts), -(-len(prompts) * num_responses // REQUESTS_PER_BLOCK))
    return [
        pa.table(
            {
                "number": pa.array(order[i::num_blocks], pa.int64()),
                "prompt_ids": pa.array([prompts[n] for n in order[i::num_blocks]], pa.list_(pa.int32())),
            }
        )
        for i in range(num_blocks)
    ]


def generate(
    prompts: Sequence[Ids],
    model: ModelSource,
    sampling: Sampling,
    *,
    num_responses: int,
    seed: int,
    precision: str,
    num_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    engine: Engine = "auto",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Responses]:
    """Write responses to prompts on a pool of Ray Data actors. See `ResponseGenerator.generate`.

    Args:
        precision: `fp32`, `bf16` or `fp16`.
        num_actors: Most actors; a busy cluster gives what it has.
        on_progress: Called with the prompts done and all prompts.

    Raises:
        InputError: There is no such model, or the engine cannot be had.
    """
    if not prompts:
        return []
    if engine == "vllm":
        choose_engine(engine, model)  # before a cluster is asked for anything
    blocks = _blocks(prompts, num_responses)
    written = on_actors(
        blocks,
        ResponseGenerator,
        constructor=(model, precision),
        constructor_options={"engine": engine, "max_length": max(map(len, prompts)) + sampling.max_tokens},
        call_options={"num_responses": num_responses, "sampling": sampling, "seed": seed},
        num_actors=num_actors,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
    )
    found: dict[int, Responses] = {}
    for table in written.iter_batches(batch_format="pyarrow", batch_size=None):
        found.update(_from_table(table))
        on_progress(len(found), len(prompts))
    return [found[number] for number in range(len(prompts))]
