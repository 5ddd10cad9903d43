"""The engine writes what the model would write alone, streamed or whole, and lets go of what nobody wants any more."""

import asyncio
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_ray.models import shared_copy
from serve.config import ServedModel
from serve.engine import Engine
from serve.schema import ApiError, Ask, Begun, Piece

BETA = 0.3
PROMPTS = ("Once upon a time", "The dog", "a", "Zebras ate \u20ac 5 of hay")


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other weights of the same shape."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes what the model says."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.5)
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def engine(tiny_model: Path, other_model: Path, adapter: Path) -> Iterator[Engine]:
    served = ServedModel(
        name="tiny", path=str(tiny_model), adapters={"lora": str(adapter)}, reference=str(other_model), beta=BETA
    )
    made = Engine(served, max_tokens=64)
    yield made
    made.close()


async def written(engine: Engine, ask: Ask) -> tuple[list[str], list[Piece], int]:
    """Texts of all answers, all pieces, prompt tokens."""
    texts, found, prompt_tokens = [""] * (ask.n * len(ask.prompts)), [], 0
    async for item in engine.write(ask):
        assert not isinstance(item, ApiError), item
        if isinstance(item, Begun):
            prompt_tokens = item.prompt_tokens
            continue
        for piece in item:
            texts[piece.number] += piece.text
            found.append(piece)
    return texts, found, prompt_tokens


def texts_of(engine: Engine, ask: Ask) -> list[str]:
    return asyncio.run(written(engine, ask))[0]


async def refusal(engine: Engine, ask: Ask) -> ApiError:
    (error,) = [item async for item in engine.write(ask)]
    assert isinstance(error, ApiError)
    return error


def plainly(folder: Path, prompt: str, num_tokens: int, penalties: tuple[float, float] = (0.0, 0.0)) -> str:
    """The most probable text, one token after the other, by the model's own forward pass."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    presence, frequency = penalties
    for _ in range(num_tokens):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1].double()
        for token in set(ids[start:]):
            logits[token] -= presence + frequency * ids[start:].count(token)
        ids.append(int(logits.argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    return whole[len(tokenizer.decode(ids[:start], skip_special_tokens=True)) :]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("penalties", [(0.0, 0.0), (0.7, 0.4)])
def test_the_text_is_the_models_own(engine: Engine, tiny_model: Path, penalties: tuple[float, float], is_stream: bool):
    ask = Ask("tiny", PROMPTS, max_tokens=12, temperature=0.0, is_stream=is_stream)
    ask = ask._replace(presence_penalty=penalties[0], frequency_penalty=penalties[1])
    assert texts_of(engine, ask) == [plainly(tiny_model, prompt, 12, penalties) for prompt in PROMPTS]


def test_a_seed_gives_the_same_text_whatever_else_is_at_work(engine: Engine):
    asks = [Ask("tiny", (PROMPTS[i % 4],), n=2, max_tokens=20, seed=i, is_stream=i % 3 == 0) for i in range(24)]

    async def together() -> list[list[str]]:
        return [texts for texts, _, _ in await asyncio.gather(*(written(engine, ask) for ask in asks))]

    found = asyncio.run(together())
    assert found == [texts_of(engine, ask._replace(is_stream=False)) for ask in asks]
    assert len({text for texts in found for text in texts}) > 40


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_stop_sequence_cuts_the_text_and_the_count(engine: Engine, is_stream: bool):
    ask = Ask("tiny", (PROMPTS[0],), max_tokens=40, seed=3)
    (whole,), _, _ = asyncio.run(written(engine, ask))
    stop = whole[10:13]
    (cut,), pieces, _ = asyncio.run(written(engine, ask._replace(stops=(stop,), is_stream=is_stream)))
    assert cut == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    counted = sum(piece.num_tokens for piece in pieces)
    assert counted < 40
    again = asyncio.run(written(engine, ask._replace(stops=(stop,), is_stream=True)))[1]
    assert sum(piece.num_tokens for piece in again) == counted


def test_log_probs_are_the_models_own_and_tell_the_text(engine: Engine, tiny_model: Path):
    ask = Ask("tiny", (PROMPTS[0],), max_tokens=4, temperature=1.5, top_p=0.9, wants_logps=True)
    for seed in range(100):  # tokens are bytes: only those of ASCII are the same when the text is encoded again
        (text,), pieces, prompt_tokens = asyncio.run(written(engine, ask._replace(seed=seed)))
        if text.isascii() and len(text) == 4:
            break
    told = [item for piece in pieces for item in piece.logps or ()]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompt = tokenizer(PROMPTS[0])["input_ids"]
    assert prompt_tokens == len(prompt)
    ids = [*prompt, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        logps = AutoModelForCausalLM.from_pretrained(tiny_model)(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    expected = [logps[i - 1, ids[i]].item() for i in range(len(prompt), len(ids))]
    assert [item.logp for item in told] == pytest.approx(expected, abs=1e-4)
    assert "".join(item.text for item in told) == text


@pytest.mark.parametrize("is_stream", [False, True])
def test_whoever_leaves_frees_the_batch_and_the_cache(engine: Engine, is_stream: bool):
    async def leave() -> None:
        ask = Ask("tiny", PROMPTS, n=4, max_tokens=60, seed=5, is_stream=is_stream)
        for _ in range(5):
            source = engine.write(ask)
            await anext(source)
            if is_stream:
                await anext(source)
            await source.aclose()
            left_at = engine.load().steps
            for _ in range(200):
                load = engine.load()
                if not load.running and not load.waiting and not load.cache_used:
                    break
                await asyncio.sleep(0.02)
            else:
                pytest.fail(f"still at work: {load}")
            assert load.steps - left_at < 15, "the answers were written to their end"

    asyncio.run(leave())
    assert all(writer.open == 0 for writer in engine._writers.values())
    assert engine.problem() is None


def test_what_cannot_be_answered_is_refused_with_the_reason(engine: Engine):
    long = asyncio.run(refusal(engine, Ask("tiny", ("x" * 300,))))
    assert (long.status, long.code) == (400, "context_length_exceeded")
    much = asyncio.run(refusal(engine, Ask("tiny", ("x",), max_tokens=65)))
    assert (much.status, much.param) == (400, "max_tokens")
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    chat = asyncio.run(refusal(engine, Ask("tiny", (turns,))))
    assert (chat.status, chat.param) == (400, "messages")


def test_a_model_without_a_template_continues_a_single_message(engine: Engine):
    message = ({"role": "user", "content": PROMPTS[0]},)
    ask = Ask("tiny", (PROMPTS[0],), max_tokens=12, temperature=0.0)
    assert texts_of(engine, ask._replace(prompts=(message,))) == texts_of(engine, ask)


def test_a_transcript_is_written_as_in_training(tiny_model: Path):
    made = Engine(ServedModel(name="tiny", path=str(tiny_model), chat="transcript"))
    try:
        turns = tuple({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c")))
        ask = Ask("tiny", (turns,), max_tokens=8, temperature=0.0)
        whole = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
        assert texts_of(made, ask) == texts_of(made, ask._replace(prompts=(whole,)))
        system = asyncio.run(refusal(made, ask._replace(prompts=(({"role": "system", "content": "x"}, *turns),))))
        assert (system.status, system.param) == (400, "messages")
    finally:
        made.close()


def test_an_adapter_writes_as_if_merged_and_shares_the_weights(engine: Engine, tiny_model: Path, adapter: Path):
    from peft import PeftModel

    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter).merge_and_unload()
    folder = adapter.parent / "merged"
    merged.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    ask = Ask("lora", PROMPTS, max_tokens=12, temperature=0.0)
    found = texts_of(engine, ask)
    assert found == [plainly(folder, prompt, 12) for prompt in PROMPTS]
    assert found != texts_of(engine, ask._replace(model="tiny"))
    shared = engine._model("lora").get_base_model().lm_head.weight
    assert shared.data_ptr() == engine._base.lm_head.weight.data_ptr()


def total_logp(folder: Path, prompt: str, response: str, adapter: Path | None = None) -> float:
    """Summed log p(response and end token | prompt), from the model's logits in float64."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double(), AutoTokenizer.from_pretrained(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter).double()
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([[*before, *after]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0].log_softmax(-1)
    return float(sum(logps[len(before) - 1 + i, token] for i, token in enumerate(after)))


def test_rewards_are_beta_times_the_log_ratio(engine: Engine, tiny_model: Path, other_model: Path, adapter: Path):
    items = [("Once", (" upon", " upon a time")), ("The dog", (" ran", " ran", ""))]

    async def both() -> Any:
        return await asyncio.gather(engine.rewards("tiny", items), engine.rewards("lora", items[:1]))

    own, lora = asyncio.run(both())
    for found, used, expected_items in ((own, None, items), (lora, adapter, items[:1])):
        for (prompt, responses), rewards in zip(expected_items, found, strict=True):
            for response, reward in zip(responses, rewards, strict=True):
                policy = total_logp(tiny_model, prompt, response, used)
                reference = total_logp(other_model, prompt, response)
                assert reward.logps == pytest.approx(policy, abs=1e-3)
                assert reward.ref_logps == pytest.approx(reference, abs=1e-3)
                assert reward.reward == pytest.approx(BETA * (policy - reference), abs=1e-3)


def test_rewards_asked_for_together_are_those_asked_for_alone(engine: Engine):
    items = [[(PROMPTS[i % 4], (f" number {i}", " x"))] for i in range(12)]

    async def all_at_once() -> Any:
        return await asyncio.gather(*(engine.rewards("tiny", item) for item in items))

    together = asyncio.run(all_at_once())
    alone = [asyncio.run(engine.rewards("tiny", item)) for item in items]
    for one, other in zip(together, alone, strict=True):
        assert not isinstance(other, ApiError)
        assert [r.reward for r in one[0]] == pytest.approx([r.reward for r in other[0]], abs=1e-4)


def test_an_engine_that_fails_says_so_and_asks_to_be_replaced(tiny_model: Path, monkeypatch: pytest.MonkeyPatch):
    broken = Engine(ServedModel(name="tiny", path=str(tiny_model)))
    try:
        assert broken.problem() is None
        monkeypatch.setattr(type(broken._base), "forward", _failing)

        async def ask() -> list[Any]:
            return [item async for item in broken.write(Ask("tiny", ("a",), max_tokens=4))]

        *_, error = asyncio.run(asyncio.wait_for(ask(), 20))
        assert isinstance(error, ApiError)
        assert error.status == 503
        assert "out of luck" in error.message
        deadline = time.monotonic() + 20  # the loop tells those at work first, and ends then
        while broken.problem() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        broken.close()


def _failing(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("out of luck")


def test_an_engine_that_stands_still_is_noticed(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    writer = engine._writers["tiny"]
    now = [1000.0]
    monkeypatch.setattr("serve.engine.time.monotonic", lambda: now[0])
    assert engine.problem() is None
    writer.open += 1
    try:
        now[0] += 100
        assert engine.problem() is None
        now[0] += 100
        assert "no step for 200 s" in str(engine.problem())
    finally:
        writer.open -= 1
    assert engine.problem() is None


def test_a_shared_copy_has_the_tensors_and_a_configuration_of_its_own(tiny_model: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    copy = shared_copy(model)
    assert [p.data_ptr() for p in copy.parameters()] == [p.data_ptr() for p in model.parameters()]
    copy.config._attn_implementation = "eager"
    assert model.config._attn_implementation != "eager"
    copy.model.layers[0].self_attn.q_proj = torch.nn.Identity()
    assert isinstance(model.model.layers[0].self_attn.q_proj, torch.nn.Linear)


VLLM = """
import asyncio
from types import SimpleNamespace as Value

CALLS = []
ABORTED = []


class SamplingParams(Value):
    pass


class AsyncEngineArgs(Value):
    pass


class AsyncLLMEngine:
    errored = False

    @classmethod
    def from_engine_args(cls, args):
        CALLS.append(vars(args))
        return cls()

    async def generate(self, prompt, params, request_id, lora_request=None):
        CALLS.append((prompt, vars(params), request_id, lora_request))
        tokens = [*prompt["prompt_token_ids"][:3], 1]
        try:
            for count in range(1, len(tokens) + 1):
                await asyncio.sleep(0.01)
                logprobs = [{token: Value(logprob=-0.5)} for token in tokens[:count]]
                output = Value(token_ids=tuple(tokens[:count]), logprobs=logprobs)
                yield Value(outputs=[output], finished=count == len(tokens))
        except asyncio.CancelledError:
            ABORTED.append(request_id)
            raise
"""


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A module that takes vLLM's place, and writes the beginning of the prompt and an end token."""
    (tmp_path / "vllm" / "lora").mkdir(parents=True)
    (tmp_path / "vllm" / "__init__.py").write_text(VLLM)
    (tmp_path / "vllm" / "lora" / "__init__.py").write_text("")
    (tmp_path / "vllm" / "lora" / "request.py").write_text("def LoRARequest(*values): return values")
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("vllm")
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def test_vllm_writes_behind_the_same_interface(vllm: Any, tiny_model: Path, adapter: Path):
    served = ServedModel(name="tiny", path=str(tiny_model), engine="vllm", adapters={"lora": str(adapter)})
    made = Engine(served)
    try:
        options = vllm.CALLS[0]
        assert (options["dtype"], options["max_model_len"], options["enable_lora"]) == ("float32", 256, True)
        ask = Ask("lora", ("abcdef",), max_tokens=9, temperature=0.5, presence_penalty=0.2, seed=4, wants_logps=True)
        texts, pieces, _ = asyncio.run(written(made, ask))
        assert texts == ["abc"]
        assert (pieces[-1].finish_reason, pieces[-1].num_tokens) == ("stop", 4)
        assert [item.logp for item in pieces[-1].logps or ()] == [-0.5] * 3
        _, params, _, lora = vllm.CALLS[1]
        assert (params["temperature"], params["presence_penalty"], params["max_tokens"]) == (0.5, 0.2, 9)
        assert lora == ("lora", 2, str(adapter))

        async def leave() -> None:
            source = made.write(ask._replace(model="tiny", is_stream=True))
            await anext(source)
            await anext(source)
            await source.aclose()
            await asyncio.sleep(0.05)

        asyncio.run(leave())
        assert len(vllm.ABORTED) == 1
        assert vllm.CALLS[2][3] is None
        assert made.load().running == 0
        vllm.AsyncLLMEngine.errored = True
        assert made.problem() == "the generation loop has ended"
    finally:
        made.close()


def test_more_adapters_than_are_held_take_turns(tiny_model: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.engine.MAX_ADAPTERS", 2)
    names = [f"lora-{number}" for number in range(4)]
    made = Engine(ServedModel(name="tiny", path=str(tiny_model), adapters=dict.fromkeys(names, str(adapter))))
    try:

        async def in_turn() -> list[list[str]]:
            found = []
            for name in [*names, *names]:
                found.append((await written(made, Ask(name, ("a",), max_tokens=4, temperature=0.0)))[0])
                assert len(made._writers) <= 3
                assert "tiny" in made._writers
            return found

        assert len({tuple(texts) for texts in asyncio.run(in_turn())}) == 1

        async def at_once() -> None:
            await asyncio.gather(*(written(made, Ask(name, ("a",), max_tokens=4)) for name in names * 3))

        asyncio.run(asyncio.wait_for(at_once(), 60))
    finally:
        made.close()
