"""Generation against mathematics: noise, draws, the distribution of whole responses, and what they depend on."""

import gc
import importlib
import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import transformers
from scipy import stats
from torch import Tensor

from dpo_ray import generate as module
from dpo_ray.errors import InputError
from dpo_ray.generate import (
    ContinuousBatching,
    Generated,
    Request,
    ResponseGenerator,
    Responses,
    Sampling,
    choose_engine,
    continuous_batching_fits,
    draw,
    gumbel_noise,
    nucleus,
    position_keys,
    request_seed,
    run_continuously,
)
from dpo_ray.models import ModelSource
from dpo_ray.pairs import Ids
from tests.numerics.architectures import SIZES, build

ENDS = frozenset({1, 4})
PROMPT = np.array([2, 5, 3], np.int32)


@pytest.fixture(scope="module", autouse=True)
def little_garbage() -> Iterator[None]:
    """Continuous batching collects garbage whenever it ends: it need not look at all that is imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def ids(*values: int) -> Ids:
    return np.array(values, np.int32)


def keys(count: int, position: int = 0, first: int = 0) -> Tensor:
    """Keys of so many requests at one position."""
    return torch.from_numpy(position_keys(range(first, first + count), [position] * count).view(np.int64))


# The noise


def test_keys_are_the_numbers_of_splitmix64():
    """The generator's first numbers from state 1234567, as its authors' C code prints them."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert position_keys([1234567] * 5, range(1, 6)).tolist() == expected


def test_noise_is_minus_log_minus_log_of_the_keys_own_stream():
    key = position_keys([3], [8]).item()
    numbers = position_keys([key] * 4, range(4)).tolist()
    halves = [(number >> shift) & 0x7FFFFFFF for number in numbers for shift in (0, 32)]
    expected = [-math.log(-math.log1p(-(half + 0.5) / 2**31)) for half in halves]
    found = gumbel_noise(keys(4, 8)[3:], 7)
    assert found.shape == (1, 7)
    np.testing.assert_allclose(found[0], expected[:7], rtol=1e-5, atol=1e-6)


def test_noise_depends_on_key_and_token_alone():
    whole = gumbel_noise(keys(5), 1001)
    assert torch.equal(gumbel_noise(keys(5)[[3, 1]], 1001), whole[[3, 1]])
    assert torch.equal(gumbel_noise(keys(5), 6), whole[:, :6])
    assert len(set(whole.flatten().tolist())) > 5000, "no two alike, but by chance"


def test_noise_is_gumbel():
    noise = gumbel_noise(keys(40), 25_000).flatten().double().numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > 0.01
    assert noise.mean() == pytest.approx(np.euler_gamma, abs=5e-3)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=1e-2)
    assert stats.kstest(noise[noise > 9] - 9, "expon").pvalue > 0.01, "its upper tail decides about rare tokens"


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(lambda: (gumbel_noise(keys(200, 7), 500), gumbel_noise(keys(200, 8), 500)), id="positions"),
        pytest.param(lambda: (gumbel_noise(keys(200), 500), gumbel_noise(keys(200, first=1), 500)), id="seeds"),
        pytest.param(lambda: gumbel_noise(keys(200), 1000).unflatten(1, (500, 2)).unbind(2), id="halves of a number"),
        pytest.param(lambda: gumbel_noise(keys(200), 1000)[:, 1:-1].unflatten(1, (499, 2)).unbind(2), id="numbers"),
        pytest.param(lambda: gumbel_noise(keys(200), 10_000).unflatten(1, (2, 5000)).unbind(1), id="far tokens"),
    ],
)
def test_neighbours_are_independent(pairs: Callable[[], tuple[Tensor, Tensor]]):
    one, other = (torch.exp(-torch.exp(-side.flatten().double())).numpy() for side in pairs())
    counts = np.histogram2d(one, other, bins=20, range=[[0, 1], [0, 1]])[0]
    assert stats.chi2_contingency(counts).pvalue > 0.01
    assert stats.chisquare(counts.flatten()).pvalue > 0.01


def test_noise_is_finite_at_both_ends():
    ends = module._gumbel(torch.tensor([0, -(2**31), 2**31 - 1, -1], dtype=torch.int32))
    assert ends.tolist() == pytest.approx([22.18, 22.18, -2.81, -2.81], abs=0.01)


# The draw

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.5, -3.0, 0.0, -0.5])


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (1.0, 1.0), (0.5, None), (2.0, None), (0.7, 0.9)])
def test_draws_are_those_of_the_softmax(temperature: float, top_p: float | None):
    count = 30_000
    tokens, logps = draw(
        LOGITS.expand(count, -1),
        keys(count),
        torch.full((count,), temperature),
        None if top_p is None else torch.full((count,), top_p),
    )
    probs = (LOGITS.double() / temperature).softmax(-1)
    if top_p is not None and top_p < 1:
        probs[by_hand(probs.tolist(), top_p)] = 0
        probs /= probs.sum()
    counts = np.bincount(tokens, minlength=7)
    assert not counts[probs == 0].any()
    assert stats.chisquare(counts[probs > 0], probs[probs > 0] * count).pvalue > 0.01
    torch.testing.assert_close(logps, LOGITS.log_softmax(-1)[tokens], rtol=0, atol=1e-6)


def by_hand(probs: Sequence[float], top_p: float) -> list[int]:
    """The tokens that are left out."""
    total, out = 0.0, []
    for token in sorted(range(len(probs)), key=lambda token: (-probs[token], token)):
        if total >= top_p:
            out.append(token)
        total += probs[token]
    return out


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-6, [2]),
        (0.5, [2]),
        (0.5001, [0, 2]),
        (0.75, [0, 2]),
        (0.76, [0, 1, 2]),
        (0.9, [0, 1, 2, 4]),
        (0.96, [0, 1, 2, 4]),
        (0.97, [0, 1, 2, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_the_nucleus_is_the_smallest_set_of_the_probability(top_p: float, kept: list[int]):
    """Probabilities 1/4, 1/8, 1/2, 1/32, 3/32."""
    logits = torch.tensor([1 / 4, 1 / 8, 1 / 2, 1 / 32, 3 / 32]).log()[None]
    found = nucleus(logits, torch.ones(1), torch.tensor([top_p]))[0]
    assert (found > -math.inf).nonzero().flatten().tolist() == kept
    assert torch.equal(found[kept], logits[0, kept])


def test_tokens_as_probable_as_the_last_one_belong_to_the_nucleus():
    found = nucleus(torch.tensor([[0.0, 1.0, 0.0, -1.0]]), torch.ones(1), torch.tensor([0.6]))
    assert found[0].tolist() == [0.0, 1.0, 0.0, -math.inf]


@pytest.mark.parametrize("rows", [[0], [1], [0, 1]], ids=["few tokens hold it", "many do", "side by side"])
def test_the_nucleus_of_a_large_vocabulary_is_exact(rows: list[int]):
    logits = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[4.0], [0.5]])
    top_p = torch.tensor([0.9, 0.9])
    found = nucleus(logits[rows], torch.ones(len(rows)), top_p[rows])
    for row, kept in zip(rows, found > -math.inf, strict=True):
        out = by_hand(logits[row].double().softmax(-1).tolist(), 0.9)
        assert sorted((~kept).nonzero().flatten().tolist()) == sorted(out)
        assert (kept.sum() > module.NUCLEUS_TOKENS) == (row == 1)


def test_the_nucleus_is_taken_at_the_temperature_row_by_row():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    temperature, top_p = torch.tensor([0.3, 1.0, 2.0, 1.0, 0.0, 1e-7]), torch.tensor([0.9, 0.5, 0.95, 0.1, 0.9, 0.9])
    found = nucleus(logits, temperature, top_p)
    for row in range(4):
        out = by_hand((logits[row].double() / temperature[row]).softmax(-1).tolist(), top_p[row].item())
        assert sorted((found[row] == -math.inf).nonzero().flatten().tolist()) == sorted(out)
    assert (found[4:] > -math.inf).sum(1).tolist() == [1, 1]


def test_a_row_without_top_p_is_the_same_beside_one_with_it():
    """Three times a third is more than 1 in float32, before the rarest tokens are counted."""
    logits = torch.cat([torch.zeros(3), torch.full((50,), -40.0)]).expand(2, -1)
    found = nucleus(logits, torch.ones(2), torch.tensor([1.0, 0.99]))
    assert torch.equal(found[0], logits[0])
    assert (found[1] == -math.inf).sum() == 50


def test_temperature_zero_takes_the_best_token_whatever_the_noise():
    logits = torch.tensor([[1.0, 3.0, 2.0], [1e30, -1e30, 0.0], [-math.inf, -5.0, -math.inf]])
    tokens, logps = draw(logits, keys(3), torch.zeros(3), None)
    assert tokens.tolist() == [1, 0, 1]
    assert logps.tolist() == pytest.approx([-0.40760596, 0, 0], abs=1e-6)


def test_seeds_are_hashes_of_seed_prompt_and_number():
    prompts = [ids(1, 2), ids(1, 2, 0), ids(2, 1), ids(1)]
    seeds = {request_seed(*content) for content in itertools.product((0, 1, 10), prompts, (0, 1, 10))}
    assert len(seeds) == 3 * 4 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert request_seed(1, ids(1, 2), 0) == request_seed(1, np.array([9, 1, 2], np.int64)[1:].astype(np.int32), 0)
    assert request_seed(0, ids(1, 2), 3) == 7064617356523030114  # written down once: another one is another text


# Whole responses of a model of six tokens


def save(folder: Path, model: Any, vocabulary_size: int, ends: Sequence[int] = (), **settings: Any) -> ModelSource:
    """A model with a tokenizer whose end token is 1, and end tokens and generation settings of its own."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {"<s>": 0, "</s>": 1} | {f"t{i}": i for i in range(2, vocabulary_size)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<s>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    model.generation_config = transformers.GenerationConfig(eos_token_id=list(ends) or None, **settings)
    model.save_pretrained(folder)
    return ModelSource(str(folder))


def llama(vocabulary_size: int, **more: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(
        vocab_size=vocabulary_size, initializer_range=0.25, max_position_embeddings=64, **(sizes | more)
    )
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(tmp_path_factory.mktemp("six"), llama(6), 6, sorted(ENDS))


@pytest.fixture(scope="module")
def six_writer(six: ModelSource) -> ResponseGenerator:
    return ResponseGenerator(six, "fp32")


@pytest.fixture(scope="module")
def samples(six_writer: ResponseGenerator) -> list[Generated]:
    (found,) = six_writer.generate([PROMPT], 2500, Sampling(max_tokens=3), seed=0)
    assert found.error is None
    return found.responses


@pytest.fixture(scope="module")
def exact(six: ModelSource) -> dict[tuple[int, ...], float]:
    """Log-probs of all responses of at most three tokens."""
    model = transformers.AutoModelForCausalLM.from_pretrained(six.path, dtype=torch.float64).eval()
    found: dict[tuple[int, ...], float] = {}
    open_ones: dict[tuple[int, ...], float] = {(): 0.0}
    for length in (1, 2, 3):
        inputs = torch.tensor([[*PROMPT.tolist(), *prefix] for prefix in open_ones])
        with torch.no_grad():
            logps = model(input_ids=inputs).logits[:, -1].log_softmax(-1)
        longer = {
            (*prefix, token): before + row[token].item()
            for (prefix, before), row in zip(open_ones.items(), logps, strict=True)
            for token in range(6)
        }
        found |= {key: value for key, value in longer.items() if key[-1] in ENDS or length == 3}
        open_ones = {key: value for key, value in longer.items() if key[-1] not in ENDS}
    assert sum(map(math.exp, found.values())) == pytest.approx(1, abs=1e-9)
    return found


def test_each_response_is_as_frequent_as_it_is_probable(samples: list[Generated], exact: dict[tuple[int, ...], float]):
    counts = Counter(tuple(sample.ids.tolist()) for sample in samples)
    assert counts.keys() <= exact.keys()
    expected = {key: math.exp(logp) * len(samples) for key, logp in exact.items()}
    large = [key for key, value in expected.items() if value >= 5]
    rest = len(samples) - sum(expected[key] for key in large)
    assert len(large) > 40
    observed = [counts[key] for key in large]
    p = stats.chisquare([*observed, len(samples) - sum(observed)], [*(expected[key] for key in large), rest]).pvalue
    assert p > 0.01


@pytest.mark.parametrize("position", [0, 1, 2])
def test_tokens_of_each_position_follow_the_softmax_behind_what_came_before(
    samples: list[Generated], exact: dict[tuple[int, ...], float], position: int
):
    prefix, _ = Counter(
        tuple(s.ids[:position].tolist()) for s in samples if len(s.ids) > position or not position
    ).most_common(1)[0]
    mass = np.zeros(6)
    for key, logp in exact.items():
        if key[:position] == prefix:
            mass[key[position]] += math.exp(logp)
    behind = [s.ids[position] for s in samples if len(s.ids) > position and tuple(s.ids[:position]) == prefix]
    assert len(behind) > 150
    assert stats.chisquare(np.bincount(behind, minlength=6), mass / mass.sum() * len(behind)).pvalue > 0.01


def test_log_probs_of_samples_are_those_of_the_enumeration(
    samples: list[Generated], exact: dict[tuple[int, ...], float]
):
    assert all(sample.logps == pytest.approx(exact[tuple(sample.ids.tolist())], abs=1e-4) for sample in samples)


def test_minus_the_mean_log_prob_estimates_the_entropy(samples: list[Generated], exact: dict[tuple[int, ...], float]):
    p, logps = np.exp(list(exact.values())), np.array(list(exact.values()))
    entropy = -(p * logps).sum()
    error = math.sqrt((p * (logps + entropy) ** 2).sum() / len(samples))
    assert abs(-np.mean([sample.logps for sample in samples]) - entropy) < 3 * error
    assert error < 0.05


def test_a_response_ends_at_any_of_the_end_tokens_and_at_no_other(samples: list[Generated]):
    assert {sample.ids[-1] for sample in samples if len(sample.ids) < 3} == ENDS
    for sample in samples:
        assert sample.is_finished == (sample.ids[-1] in ENDS)
        assert not ENDS & set(sample.ids[:-1].tolist())
        assert 1 <= len(sample.ids) <= 3
        assert sample.ids.dtype == np.int32
    assert any(sample.is_finished for sample in samples if len(sample.ids) == 3)


def test_without_end_tokens_every_response_has_its_full_length():
    model = llama(6)
    requests = [Request(PROMPT, seed, Sampling(length)) for seed, length in enumerate((1, 2, 9))]
    found = run_continuously(model, frozenset(), requests, longest=12, at_once=3)
    assert [(len(f.ids), f.is_finished) for f in found if not isinstance(f, str)] == [
        (1, False),
        (2, False),
        (9, False),
    ]


# What a response depends on


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return save(tmp_path_factory.mktemp("tiny"), llama(50), 50)


@pytest.fixture(scope="module")
def writer(source: ModelSource) -> ResponseGenerator:
    return ResponseGenerator(source, "fp32")


def prompts(count: int = 5) -> list[Ids]:
    generator = np.random.default_rng(1)
    return [generator.integers(2, 50, length).astype(np.int32) for length in generator.integers(1, 20, count)]


def texts(found: Sequence[Responses]) -> list[list[list[int]]]:
    return [[response.ids.tolist() for response in item.responses] for item in found]


@pytest.fixture(scope="module")
def together(writer: ResponseGenerator) -> list[Responses]:
    return writer.generate(prompts(), 3, Sampling(24), seed=5)


def test_responses_are_the_same_alone_in_another_order_and_in_other_blocks(
    writer: ResponseGenerator, together: list[Responses]
):
    expected = texts(together)
    assert texts(writer.generate(prompts()[::-1], 3, Sampling(24), seed=5)) == expected[::-1]
    assert texts(writer.generate(prompts()[3:4], 1, Sampling(24), seed=5)) == [expected[3][:1]]
    more = writer.generate([*prompts(9)[5:], *prompts()], 4, Sampling(24), seed=5)[4:]
    assert [item[:3] for item in texts(more)] == expected
    for item, other in zip(together, more, strict=True):
        for one, two in zip(item.responses, other.responses, strict=False):
            assert one.logps == pytest.approx(two.logps, abs=1e-4)


def test_responses_are_the_same_when_few_find_room_at_a_time(
    writer: ResponseGenerator, together: list[Responses], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(module.CACHE_TOKENS, "cpu", 90)
    monkeypatch.setitem(module.BATCH_TOKENS, "cpu", 5)
    assert texts(writer.generate(prompts(), 3, Sampling(24), seed=5)) == texts(together)


def test_requests_that_are_put_off_begin_anew_and_write_the_same(monkeypatch: pytest.MonkeyPatch):
    model = llama(50)
    requests = [Request(p, request_seed(5, p, i), Sampling(24)) for p in prompts() for i in range(3)]
    expected = run_continuously(model, frozenset({1}), requests, longest=44, at_once=15)
    monkeypatch.setitem(module.PAGE_TOKENS, "cpu", 8)
    monkeypatch.setattr(module, "SPARE_PAGES", 2)
    positions = []
    prepare = module.RequestSampler.prepare_tensor_args

    def watched(self: Any, requests_in_batch: Any, arg_storage: Tensor) -> Tensor:
        positions.append({r.state.request_id: r.state.position_offset for r in requests_in_batch})
        return prepare(self, requests_in_batch, arg_storage)

    monkeypatch.setattr(module.RequestSampler, "prepare_tensor_args", watched)
    found = run_continuously(model, frozenset({1}), requests, longest=8, at_once=15)  # too little room for fifteen
    assert any(len(before.keys() - after.keys()) for before, after in itertools.pairwise(positions[:10]))
    for one, other in zip(expected, found, strict=True):
        assert not isinstance(one, str)
        assert not isinstance(other, str)
        assert one.ids.tolist() == other.ids.tolist()
        assert one.logps == pytest.approx(other.logps, abs=1e-4)


def test_numbers_seeds_and_prompts_make_other_responses(writer: ResponseGenerator, together: list[Responses]):
    first = [tuple(text) for item in texts(together) for text in item]
    assert len(set(first)) == 15
    other = [tuple(text) for item in texts(writer.generate(prompts(), 3, Sampling(24), seed=6)) for text in item]
    assert not set(first) & set(other)


def test_equal_prompts_have_equal_responses(writer: ResponseGenerator, together: list[Responses]):
    twice = writer.generate([prompts()[2], prompts()[2]], 2, Sampling(24), seed=5)
    assert texts(twice) == [texts(together)[2][:2]] * 2


def test_temperature_zero_is_greedy_generate(writer: ResponseGenerator, source: ModelSource):
    model = transformers.AutoModelForCausalLM.from_pretrained(source.path)
    found = writer.generate(prompts(), 1, Sampling(24, temperature=0.0), seed=5)
    nearly = writer.generate(prompts(), 1, Sampling(24, temperature=1e-6, top_p=0.9), seed=5)
    for prompt, item, other in zip(prompts(), found, nearly, strict=True):
        greedy = model.generate(
            input_ids=torch.from_numpy(prompt).long()[None], do_sample=False, max_new_tokens=24, pad_token_id=0
        )
        assert item.responses[0].ids.tolist() == greedy[0, len(prompt) :].tolist() == other.responses[0].ids.tolist()


def plain(source: ModelSource, prompt: Ids, response: Ids) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.float64)
    whole = torch.from_numpy(np.concatenate((prompt, response))).long()[None]
    with torch.no_grad():
        logps = model(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(-1, whole[0, len(prompt) :, None]).sum().item()


@pytest.mark.parametrize("sampling", [Sampling(24), Sampling(24, 0.6, 0.8), Sampling(24, 0.0), Sampling(24, 1.7)])
def test_log_probs_are_those_of_a_plain_forward_whatever_the_sampling(
    writer: ResponseGenerator, source: ModelSource, sampling: Sampling
):
    for prompt, item in zip(prompts(), writer.generate(prompts(), 2, sampling, seed=5), strict=True):
        for response in item.responses:
            assert response.logps == pytest.approx(plain(source, prompt, response.ids), abs=1e-4)


def test_a_real_model_writes_the_same_story_in_any_company(shared: Path):
    source = ModelSource(str(shared / "models/stories260K"))
    writer = ResponseGenerator(source, "fp32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source.path)
    openings = ["Once upon a time", "Lily and Tom went to the", "The dog was"]
    asked = [np.array(tokenizer(text)["input_ids"], np.int32) for text in openings]
    found = writer.generate(asked, 6, Sampling(40, 0.8, 0.95), seed=1)
    alone = writer.generate(asked[1:2], 2, Sampling(40, 0.8, 0.95), seed=1)
    assert texts(alone) == [texts(found)[1][:2]]
    assert len({tuple(text) for item in texts(found) for text in item}) == 18
    words = tokenizer.decode([token for text in texts(found)[0] for token in text]).split()
    assert len({"the", "a", "was", "and", "to"} & set(words)) == 5
    for prompt, item in zip(asked, found, strict=True):
        assert item.responses[0].logps == pytest.approx(plain(source, prompt, item.responses[0].ids), abs=1e-4)


# What goes wrong


def test_a_prompt_that_cannot_be_answered_has_an_error_and_the_others_their_responses(
    writer: ResponseGenerator, together: list[Responses]
):
    """The model has 64 positions."""
    asked = [prompts()[0], np.full(64, 3, np.int32), ids(), ids(3, 50), ids(-1), np.full(60, 3, np.int32)]
    found = writer.generate(asked, 3, Sampling(24), seed=5)
    assert texts(found[:1]) == texts(together[:1])
    assert [len(item.responses) for item in found] == [3, 0, 0, 0, 0, 3]
    assert [item.error for item in found] == [
        None,
        "the prompt has 64 tokens, and there is room for 64 with a response",
        "the prompt has no token",
        "the prompt has a token outside of the model's 50",
        "the prompt has a token outside of the model's 50",
        None,
    ]
    for response in found[5].responses:
        assert len(response.ids) == 4 or (response.is_finished and len(response.ids) < 4)


def test_a_limit_of_the_caller_is_kept(source: ModelSource):
    (found, none) = ResponseGenerator(source, "fp32", max_length=10).generate(
        [np.full(8, 3, np.int32), np.full(10, 3, np.int32)], 8, Sampling(24), seed=0
    )
    assert max(len(response.ids) for response in found.responses) == 2
    assert none.error is not None


def break_down(monkeypatch: pytest.MonkeyPatch, *, when: Callable[[int], bool]) -> None:
    """The sampling step fails for some sizes of a batch."""
    sample = module.RequestSampler.sample

    def failing(self: Any, scores: Tensor, output_ids: Tensor) -> None:
        if when(scores.shape[1]):
            raise RuntimeError("out of\nmemory")
        sample(self, scores, output_ids)

    monkeypatch.setattr(module.RequestSampler, "sample", failing)


def test_when_a_batch_breaks_down_its_requests_are_tried_one_at_a_time(
    writer: ResponseGenerator, together: list[Responses], monkeypatch: pytest.MonkeyPatch
):
    break_down(monkeypatch, when=lambda size: size > 1)
    assert texts(writer.generate(prompts(), 3, Sampling(24), seed=5)) == texts(together)


def test_when_nothing_works_each_prompt_has_the_reason(writer: ResponseGenerator, monkeypatch: pytest.MonkeyPatch):
    break_down(monkeypatch, when=lambda size: True)
    assert writer.generate(prompts(), 2, Sampling(4), seed=5) == [Responses([], "out of memory")] * 5


def test_a_log_prob_that_is_no_number_is_an_error():
    found = module._generated([3, 1, 7], [-1.0, -0.5, math.nan], frozenset({1}))
    assert not isinstance(found, str)
    assert (found.ids.tolist(), found.logps, found.is_finished) == ([3, 1], -1.5, True)
    assert module._generated([3, 1], [math.nan, -0.5], ENDS) == "the model gives 2 tokens with the log-prob nan"
    assert module._generated([], [], ENDS) == "the model gives 0 tokens with the log-prob 0.0"


def test_leaving_early_ends_the_loop():
    with ContinuousBatching(llama(6), frozenset(), longest=64, concurrency=2) as batching:
        for i in range(50):
            batching.submit(str(i), Request(PROMPT, i, Sampling(60)))
        batching.start()
        assert batching._manager.is_running()
    assert not batching._manager.is_running()


def test_requests_may_come_while_others_are_at_work():
    expected = run_continuously(llama(6), ENDS, [Request(PROMPT, i, Sampling(9)) for i in range(4)], 12, 4)
    with ContinuousBatching(llama(6), ENDS, longest=12, concurrency=4) as batching:
        batching.start()
        found = {}
        for i in range(4):
            batching.submit(str(i), Request(PROMPT, i, Sampling(9)))
            found |= dict(batching.results()) if i % 2 else {}
    assert [found[str(i)].ids.tolist() for i in range(4)] == [item.ids.tolist() for item in expected]


# Architectures that continuous batching does not take


def gptj() -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 128}
    return transformers.GPTJForCausalLM(transformers.GPTJConfig(vocab_size=64, initializer_range=0.3, **sizes)).eval()


def mamba() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=64, **sizes)).eval()


@pytest.mark.parametrize(
    ("make", "fits"),
    [
        pytest.param(lambda: build("llama"), True, id="llama"),
        pytest.param(lambda: build("gemma3 (windows)"), True, id="windows"),
        pytest.param(lambda: build("gemma2 (windows, capped logits)"), False, id="capped scores"),
        pytest.param(gptj, False, id="positions lost in silence"),
        pytest.param(mamba, False, id="no attention"),
    ],
)
def test_both_ways_of_batching_write_the_same(make: Callable[[], Any], fits: bool, tmp_path: Path):
    source = save(tmp_path, make(), SIZES["vocab_size"], do_sample=True, top_k=3, repetition_penalty=5.0)
    writer = ResponseGenerator(source, "fp32")
    engine: Any = writer._engine
    assert continuous_batching_fits(engine._model) == fits
    assert engine._run == (engine._continuously if fits else engine._by_length)
    found = writer.generate(prompts(), 2, Sampling(12, 0.9, 0.95), seed=3)
    for prompt, item in zip(prompts(), found, strict=True):
        for response in item.responses:
            assert response.logps == pytest.approx(plain(source, prompt, response.ids), abs=1e-4)
    engine._run = engine._by_length
    again = writer.generate(prompts(), 2, Sampling(12, 0.9, 0.95), seed=3)
    assert texts(again) == texts(found)
    assert [r.is_finished for item in again for r in item.responses] == [
        r.is_finished for i in found for r in i.responses
    ]


# vLLM

VLLM = """
from types import SimpleNamespace as Value

CALLS = []


class SamplingParams(Value):
    pass


class LLM:
    def __init__(self, **options):
        CALLS.append(options)

    def generate(self, prompts, params, use_tqdm):
        CALLS.append((prompts, params))
        return [Value(outputs=[self.complete(p["prompt_token_ids"], one)]) for p, one in zip(prompts, params)]

    def complete(self, prompt, params):
        tokens = [*prompt, 1][: params.max_tokens]
        logprobs = [{token: Value(logprob=-0.25 - token), 49: Value(logprob=-9.0)} for token in tokens]
        return Value(token_ids=tuple(tokens), logprobs=logprobs, finish_reason="stop")
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module that takes vLLM's place and writes the prompt and an end token."""
    (tmp_path / "vllm.py").write_text(VLLM)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    yield importlib.import_module("vllm")
    del sys.modules["vllm"]


def test_vllm_is_asked_for_the_same_and_its_answers_are_read(vllm: Any, source: ModelSource):
    writer = ResponseGenerator(source, "bf16", engine="vllm", max_length=40)
    found = writer.generate([ids(5, 6), ids(), ids(7, 8, 9)], 2, Sampling(3, 0.7, 0.9), seed=4)
    options, (asked, params) = vllm.CALLS
    assert options == {
        "model": source.path,
        "trust_remote_code": False,
        "dtype": "bfloat16",
        "max_model_len": 40,
        "logprobs_mode": "raw_logprobs",
        "generation_config": "vllm",
    }
    assert asked == [{"prompt_token_ids": p} for p in ([5, 6], [5, 6], [7, 8, 9], [7, 8, 9])]
    assert [vars(one) for one in params] == [
        {
            "temperature": 0.7,
            "top_p": 0.9,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "max_tokens": 3,
            "seed": request_seed(4, prompt, index),
            "stop_token_ids": [1],
            "logprobs": 0,
            "detokenize": False,
        }
        for prompt in (ids(5, 6), ids(7, 8, 9))
        for index in (0, 1)
    ]
    assert [item.error for item in found] == [None, "the prompt has no token", None]
    for item, tokens, is_finished in ((found[0], [5, 6, 1], True), (found[2], [7, 8, 9], False)):
        for response in item.responses:
            assert response.ids.tolist() == tokens
            assert response.ids.dtype == np.int32
            assert response.logps == pytest.approx(-sum(tokens) - 0.75)
            assert response.is_finished == is_finished


@pytest.mark.parametrize(("has_gpu", "expected"), [(True, "vllm"), (False, "transformers")])
def test_vllm_is_taken_where_it_is_and_a_gpu_too(
    vllm: Any, source: ModelSource, monkeypatch: pytest.MonkeyPatch, has_gpu: bool, expected: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert choose_engine("auto", source) == expected
    assert choose_engine("vllm", source) == "vllm"
    assert choose_engine("transformers", source) == "transformers"


def test_vllm_takes_no_adapter(vllm: Any, tmp_path: Path, source: ModelSource, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes((Path(source.path) / "model.safetensors").read_bytes())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_engine("auto", ModelSource(str(tmp_path))) == "transformers"
    with pytest.raises(
        InputError, match=r"`acquire\.generate\.engine`: vllm takes whole weights, and .* is an adapter"
    ):
        choose_engine("vllm", ModelSource(str(tmp_path)))


def test_without_vllm_it_cannot_be_asked_for(source: ModelSource, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine("auto", source) == "transformers"
    with pytest.raises(InputError, match=r"`acquire\.generate\.engine`: vllm is not installed"):
        module.generate(
            prompts(),
            source,
            Sampling(4),
            num_responses=1,
            seed=0,
            precision="fp32",
            num_actors=1,
            cpus_per_actor=1,
            gpus_per_actor=0,
            engine="vllm",
        )


# The blocks of a pool of actors


@pytest.mark.parametrize(
    ("num_prompts", "num_responses", "num_blocks"), [(7, 2, 1), (2, 500, 2), (130, 2, 3), (1, 1, 1)]
)
def test_each_prompt_is_in_one_block_with_its_number(num_prompts: int, num_responses: int, num_blocks: int):
    asked = prompts(num_prompts)
    blocks = module._blocks(asked, num_responses)
    rows = [row for block in blocks for row in block.to_pylist()]
    assert len(blocks) == num_blocks
    assert sorted(row["number"] for row in rows) == list(range(num_prompts))
    assert all(row["prompt_ids"] == asked[row["number"]].tolist() for row in rows)
    sizes = [sum(map(len, block.column("prompt_ids").to_pylist())) for block in blocks]
    assert max(sizes) - min(sizes) <= max(map(len, asked))


def test_a_call_answers_a_block_and_keeps_numbers_and_errors(writer: ResponseGenerator, together: list[Responses]):
    asked = [*prompts(), ids(50)]
    order = [4, 5, 0]
    block = pa.table({"number": order, "prompt_ids": [asked[i].tolist() for i in order]})
    table = writer(block, num_responses=3, sampling=Sampling(24), seed=5)
    found = dict(module._from_table(table))
    assert list(found) == order
    assert texts([found[4], found[0]]) == texts([together[4], together[0]])
    assert found[5] == Responses([], "the prompt has a token outside of the model's 50")
    for one, other in zip(found[0].responses, together[0].responses, strict=True):
        assert one.logps == pytest.approx(other.logps, abs=1e-4)
        assert (one.is_finished, one.ids.dtype) == (other.is_finished, np.int32)


def test_no_prompts_need_no_cluster(source: ModelSource):
    assert (
        module.generate(
            [],
            source,
            Sampling(4),
            num_responses=1,
            seed=0,
            precision="fp32",
            num_actors=1,
            cpus_per_actor=1,
            gpus_per_actor=0,
        )
        == []
    )
