"""Who sees whom, by hand and by brute force; every kernel keeps to the same rule; nothing is over nothing."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from dpo_ray import attention
from dpo_ray.attention import (
    Attention,
    Kernel,
    Span,
    attention_inputs,
    block_mask,
    choose_attention,
    flex_row_attention,
    flex_trouble,
    places_of,
    spans_of,
    visible_pairs,
)
from dpo_ray.data.batching import Lengths, Row, make_batch
from dpo_ray.models import PairModel, usable_layout
from dpo_ray.pairs import PairBatch, PromptBranches

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 6
ARCHITECTURES: dict[str, Any] = {
    "llama": transformers.LlamaConfig(**SIZES),
    "mistral with a window": transformers.MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2 (windows in half the layers, capped scores)": transformers.Gemma2Config(**SIZES, sliding_window=WINDOW),
    "gemma3 (windows in half the layers)": transformers.Gemma3TextConfig(
        **SIZES, sliding_window=WINDOW, layer_types=["sliding_attention", "full_attention"]
    ),
}


def batch_of(lengths: list[tuple[int, tuple[int, ...]]], rows: list[Row] | None = None, seed: int = 0) -> PairBatch:
    generator = np.random.default_rng(seed)
    items = [
        PromptBranches(
            generator.integers(3, 64, prompt).astype(np.int32),
            tuple(generator.integers(3, 64, n).astype(np.int32) for n in responses),
        )
        for prompt, responses in lengths
    ]
    return make_batch(items, rows or [list(range(len(items)))], "branches")


RAGGED = batch_of([(5, (3, 7)), (1, (1, 9)), (12, (10, 2)), (3, (4,)), (9, (1, 5, 12))], [[2, 0, 1], [3], [4]])
"""Three rows of which two end in padding."""

batches = st.lists(
    st.tuples(st.integers(1, 12), st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=6,
).flatmap(lambda lengths: st.integers(1, len(lengths)).map(lambda cut: (lengths, cut)))


@contextmanager
def uncompiled() -> Iterator[None]:
    """FlexAttention as it is written, without its compiler."""
    with torch.compiler.set_stance("force_eager"):
        yield


def by_walking_back(batch: PairBatch, window: int | None) -> Tensor:
    """[R, T, T]: from every token back along its own path: its branch, then its prompt."""
    rows, width = batch.input_ids.shape
    seen = torch.zeros(rows, width, width, dtype=torch.bool)
    for r in range(rows):
        segment, branch = batch.segment_ids[r].tolist(), batch.branch_ids[r].tolist()
        for query in range(width):
            seen[r, query, query] = True
            if segment[query] < 0:
                continue
            behind = [k for k in range(query + 1) if segment[k] == segment[query] and branch[k] in (0, branch[query])]
            seen[r, query, behind[-window:] if window else behind] = True
    return seen


def dense(mask: Any) -> Tensor:
    """What a block mask lets through: [R, T, T]."""
    width = mask.seq_lengths[0]
    rows, blocks = mask.kv_num_blocks.shape[0], mask.kv_num_blocks.shape[2]
    size = mask.BLOCK_SIZE[0]
    index = torch.arange(width)
    seen = torch.zeros(rows, width, width, dtype=torch.bool)
    for r in range(rows):
        rule = mask.mask_mod(torch.tensor(r), torch.tensor(0), index[:, None], index[None, :])
        for q in range(blocks):
            at = slice(q * size, (q + 1) * size)
            for k in mask.kv_indices[r, 0, q, : mask.kv_num_blocks[r, 0, q]].tolist():
                seen[r, at, k * size : (k + 1) * size] = rule[at, k * size : (k + 1) * size]
            for k in mask.full_kv_indices[r, 0, q, : mask.full_kv_num_blocks[r, 0, q]].tolist():
                assert k not in mask.kv_indices[r, 0, q, : mask.kv_num_blocks[r, 0, q]].tolist()
                seen[r, at, k * size : (k + 1) * size] = True
    return seen


def test_who_sees_whom_worked_by_hand():
    #         prompt of 2, responses of 3 and 2 (of which 2 and 1 are fed), a prompt of 1 with a response of 2, padding
    batch = batch_of([(2, (3, 2)), (1, (2,)), (1, (9,))], [[0, 1], [2]])
    expected = [
        "#........",
        "##.......",
        "###......",
        "####.....",
        "##..#....",
        ".....#...",
        ".....##..",
        ".......#.",
        "........#",
    ]
    assert ["".join(".#"[int(x)] for x in row) for row in visible_pairs(places_of(batch), None)[0]] == expected
    windowed = visible_pairs(places_of(batch), 2)[0]
    assert ["".join(".#"[int(x)] for x in row) for row in windowed][3:5] == ["..##.....", ".#..#...."], (
        "the second response follows the prompt's end, wherever it stands"
    )


@given(lengths_and_cut=batches, window=st.sampled_from([None, 1, 3, 8]))
@settings(max_examples=40, deadline=None)
def test_the_rule_is_a_walk_back_along_the_path(lengths_and_cut: Any, window: int | None):
    lengths, cut = lengths_and_cut
    batch = batch_of(lengths, [row for row in (list(range(cut)), list(range(cut, len(lengths)))) if row])
    assert torch.equal(visible_pairs(places_of(batch), window), by_walking_back(batch, window))


@given(lengths_and_cut=batches)
@settings(max_examples=20, deadline=None)
def test_what_an_item_attends_is_counted_from_its_lengths(lengths_and_cut: Any):
    lengths, _ = lengths_and_cut
    batch = batch_of(lengths)
    assert int(visible_pairs(places_of(batch), None).sum()) == sum(Lengths(*item).attended for item in lengths)


@given(lengths_and_cut=batches, window=st.sampled_from([None, 1, 3, 8]), block=st.sampled_from([1, 2, 4, 16]))
@settings(max_examples=80, deadline=None)
def test_a_block_mask_lets_through_what_the_rule_does(lengths_and_cut: Any, window: int | None, block: int):
    lengths, cut = lengths_and_cut
    batch = batch_of(lengths, [row for row in (list(range(cut)), list(range(cut, len(lengths)))) if row])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        mask = block_mask(batch, window)
    assert torch.equal(dense(mask), visible_pairs(places_of(batch), window))


@pytest.mark.parametrize("window", [None, 100])
def test_hardly_more_blocks_are_computed_than_those_where_something_is_seen(window: int | None):
    generator = np.random.default_rng(0)
    lengths = [(int(p), (int(c), int(r))) for p, c, r in generator.integers(20, 300, (8, 3))]
    batch = batch_of(lengths)
    width = batch.input_ids.shape[1]
    ours = block_mask(batch, window)
    torchs = create_block_mask(ours.mask_mod, B=1, H=None, Q_LEN=width, KV_LEN=width, device="cpu")
    assert torch.equal(dense(ours), dense(torchs))
    counts = [int(mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum()) for mask in (ours, torchs)]
    assert counts[1] <= counts[0] <= (1.1 if window is None else 1.5) * counts[1]
    assert counts[0] < 0.3 * ours.kv_indices.shape[2] ** 2, "most of a row of many prompts is passed over"
    assert int(ours.full_kv_num_blocks.sum()) == int(torchs.full_kv_num_blocks.sum())


def test_additive_masks_and_block_masks_are_by_the_layers_of_the_architecture():
    for name, config in ARCHITECTURES.items():
        masked = attention_inputs(RAGGED, config, "mask", torch.float32)["attention_mask"]
        blocks = attention_inputs(RAGGED, config, "flex", torch.float32)["attention_mask"]
        pairs = {"": (masked, blocks)} if not isinstance(masked, dict) else {k: (masked[k], blocks[k]) for k in masked}
        assert set(pairs) == ({""} if "gemma" not in name else {"full_attention", "sliding_attention"})
        for layer_type, (additive, block) in pairs.items():
            window = WINDOW if layer_type == "sliding_attention" or "mistral" in name else None
            allowed = visible_pairs(places_of(RAGGED), window)
            assert torch.equal(additive[:, 0] == 0, allowed)
            assert additive[~allowed[:, None]].eq(torch.finfo(torch.float32).min).all()
            assert torch.equal(dense(block), allowed)


def test_spans_are_prompts_responses_and_padding_of_all_rows():
    batch = batch_of([(2, (3, 1, 2)), (1, (1,)), (4, (2,))], [[0, 1], [2]])
    assert spans_of(batch) == [Span(2, 0), Span(2, 1), Span(1, 3), Span(1, 0), Span(4, 0), Span(1, 1), Span(1, -1)]


def model_of(name: str) -> PairModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(ARCHITECTURES[name])).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return PairModel(model)


def logps_by(model: PairModel, kernel: Kernel, batch: PairBatch) -> Tensor:
    model.attend_with(Attention(kernel, "asked"))
    with torch.no_grad(), uncompiled():
        logps: Tensor = model(batch).logps
    return logps


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_says_the_same_with_flex_attention(name: str):
    model = model_of(name)
    for batch in (RAGGED, batch_of([(90, (80, 60)), (1, (30,)), (150, (1, 100))])):
        expected = logps_by(model, "mask", batch)
        torch.testing.assert_close(logps_by(model, "flex", batch), expected, rtol=1e-5, atol=3e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_compiled_flex_attention_agrees_with_a_masked_one(window: int | None):
    """Forward only: there is no backward on a CPU; tests/gpu has both. Two lengths share what was compiled."""
    torch._dynamo.reset()
    for lengths in ([(150, (100, 41)), (1, (2, 70))], [(60, (130, 1, 9)), (200, (90,))]):
        batch = batch_of(lengths)
        width = batch.input_ids.shape[1]
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, heads, width, 16, generator=generator) for heads in (4, 2, 2))
        out, _ = flex_row_attention(None, query, key, value, block_mask(batch, window))
        allowed = visible_pairs(places_of(batch), window)[:, None]
        expected = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, enable_gqa=True
        )
        torch.testing.assert_close(out.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [None, 50])
def test_rows_of_any_length_share_what_was_compiled(monkeypatch: pytest.MonkeyPatch, window: int | None):
    """After some compilations dynamo gives up and computes every pair of tokens: rows must not ask for them."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(flex_attention, dynamic=True, backend="eager")
    monkeypatch.setattr(attention, "_compiled_flex", lambda: compiled)
    for seed in range(6):
        batch = batch_of([(40 + 17 * seed + i, (30 + 5 * i, 90 - seed)) for i in range(1 + seed)])
        query, key, value = (torch.randn(1, heads, batch.input_ids.shape[1], 16) for heads in (4, 2, 2))
        flex_row_attention(None, query, key, value, block_mask(batch, window))
    # The second where a row has by chance as many blocks as there are heads, and the first took them for one number.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("kernel", ["mask", "spans", "flex"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_gives_no_nan(kernel: Kernel, dtype: torch.dtype):
    """Nor may its gradient be one: 0 times nan is nan."""
    model = model_of("llama").to(dtype)
    batch = batch_of([(200, (60, 9)), (1, (2,))], [[0], [1]])
    assert int((batch.segment_ids < 0).sum()) > 256, "whole blocks of padding"
    model.attend_with(Attention(kernel, "asked"))
    inputs = attention_inputs(batch, model.config, kernel, dtype)
    with uncompiled(), torch.set_grad_enabled(kernel != "flex"):
        hidden = model.body(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **inputs
        ).last_hidden_state
    assert hidden.isfinite().all()
    if kernel != "flex":
        hidden[0].float().sum().backward()
        assert all(p.grad.isfinite().all() for p in model.body.parameters())


@pytest.mark.parametrize("kernel", ["mask", "spans"])
def test_recomputed_activations_change_no_gradient(kernel: Kernel):
    gradients = []
    for recomputes in (False, True):
        model = model_of("gemma3 (windows in half the layers)").train()
        if recomputes:
            model.language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            model.language_model.enable_input_require_grads()
        model.attend_with(Attention(kernel, "asked"))
        model(RAGGED).logps.sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_plain_rows_keep_the_mask_of_transformers():
    batch = make_batch(
        [PromptBranches(np.arange(3, 6, dtype=np.int32), (np.arange(2, dtype=np.int32),))], [[0]], "padded"
    )
    for kernel in ("mask", "spans", "flex"):
        inputs = attention_inputs(batch, ARCHITECTURES["llama"], kernel, torch.float32)
        assert inputs.keys() == {"attention_mask"}
        assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1]]


def test_an_export_does_not_name_our_kernels(tmp_path: Any):
    model = model_of("llama")
    model.attend_with(Attention("spans", "asked"))
    model.language_model.save_pretrained(tmp_path)
    assert "dpo_ray" not in (tmp_path / "config.json").read_text()


def test_an_architecture_that_attends_in_its_own_code_is_refused():
    config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=64)
    model = PairModel(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(ValueError, match="in the architecture's own code"):
        model.attend_with(Attention("spans", "asked"))


def test_flex_attention_passes_its_check_and_a_wrong_or_broken_one_does_not(monkeypatch: pytest.MonkeyPatch):
    with uncompiled():
        assert flex_trouble(4, 2, 16, CPU, torch.float32) is None
    monkeypatch.setattr(attention, "_compiled_flex", lambda: lambda q, k, v, **_: q)
    assert "output is" in str(flex_trouble(4, 4, 16, CPU, torch.float32))
    monkeypatch.setattr(attention, "_compiled_flex", lambda: 1 / 0)
    assert flex_trouble(4, 2, 16, CPU, torch.float32) == "ZeroDivisionError: division by zero"


def dense_flex(query: Tensor, key: Tensor, value: Tensor, *, block_mask: Any, enable_gqa: bool, **_: Any) -> Tensor:
    """What FlexAttention computes, by way of all pairs of tokens; it can be differentiated on a CPU."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=dense(block_mask)[:, None], enable_gqa=enable_gqa
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_check_looks_at_gradients_too(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype):
    """As where there is a GPU; it is made while no gradients are asked for."""
    monkeypatch.setattr(attention, "FORWARD_ONLY", ())
    monkeypatch.setattr(attention, "_compiled_flex", lambda: dense_flex)
    with torch.no_grad():
        assert flex_trouble(4, 2, 16, CPU, dtype) is None

    def wrong_behind(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        return dense_flex(query, 0.9 * key + 0.1 * key.detach(), value, **options)

    monkeypatch.setattr(attention, "_compiled_flex", lambda: wrong_behind)
    with torch.no_grad():
        assert "d key is 0.1 apart" in str(flex_trouble(4, 2, 16, CPU, dtype))


class OnAnH200:
    """A GPU that is not there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
        patch.setattr(attention, "flex_trouble", lambda *sizes: None)

    def choice(self, config: Any, dtype: torch.dtype = torch.bfloat16) -> Attention:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        return choose_attention(model, torch.device("cuda"), dtype)


def test_the_choice_of_a_kernel_names_its_reason(monkeypatch: pytest.MonkeyPatch):
    gpu = OnAnH200(monkeypatch)
    llama = transformers.LlamaConfig(**SIZES)
    assert gpu.choice(llama) == ("flex", "H200")
    assert gpu.choice(ARCHITECTURES["gemma2 (windows in half the layers, capped scores)"]).kernel == "flex"
    assert gpu.choice(llama, torch.float32) == ("mask", "full precision")
    narrow = transformers.LlamaConfig(**SIZES | {"head_dim": 8})
    assert gpu.choice(narrow) == ("mask", "heads of width 8")
    sinks = transformers.GptOssConfig(**SIZES, num_local_experts=2)
    assert gpu.choice(sinks) == ("mask", "attention sinks")
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_supports_flex_attn", False)
    assert gpu.choice(llama) == ("mask", "LlamaForCausalLM does not support FlexAttention")
    monkeypatch.undo()

    gpu = OnAnH200(monkeypatch)
    monkeypatch.setattr(attention, "flex_trouble", lambda *sizes: "no compiler")
    assert gpu.choice(llama) == ("mask", "FlexAttention failed its check: no compiler")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert gpu.choice(llama) == ("mask", "H200 is older than FlexAttention's kernels")
    monkeypatch.undo()

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(llama)
    assert choose_attention(model, CPU, torch.float32) == ("spans", "CPU")
    assert choose_attention(model, torch.device("xpu"), torch.bfloat16) == ("mask", "xpu")


def wrong(*arguments: Any, **options: Any) -> Any:
    out, weights = flex_row_attention(*arguments, **options)
    return 1.1 * out, weights


def broken(*arguments: Any, **options: Any) -> Any:
    raise RuntimeError("no such kernel")


@pytest.mark.parametrize("kernel", [wrong, broken])
def test_a_kernel_that_errs_in_the_model_gives_way_to_the_mask(monkeypatch: pytest.MonkeyPatch, kernel: Any):
    model = model_of("llama")
    chosen = Attention("flex", "for a test")
    monkeypatch.setattr("dpo_ray.models.choose_attention", lambda *_: chosen)
    with uncompiled():
        assert usable_layout(model, model, "branches", "fp32") == "one_row"
        assert model.attention == chosen
        monkeypatch.setitem(attention.IMPLEMENTATIONS, "flex", kernel)
        assert usable_layout(model, model, "branches", "fp32") == "branches"
    assert model.attention == ("mask", "flex gave wrong numbers")


def test_padded_rows_stay_with_the_attention_of_the_architecture():
    model = model_of("llama")
    assert usable_layout(model, model, "branches", "fp32") == "one_row"
    assert usable_layout(model, model, "padded", "fp32") == "padded"
    assert (model.attention.kernel, model.causal.config._attn_implementation) == ("mask", "sdpa")
