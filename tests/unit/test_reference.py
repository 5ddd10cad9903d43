"""The store gives back what was put in, by content; a scorer's values are those of plain forwards, however packed."""

import hashlib
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow as pa
import pytest
import torch
import transformers

from dpo_ray.config import BatchConfig
from dpo_ray.data.batching import Layout
from dpo_ray.models import ModelSource, load_to_score
from dpo_ray.pairs import PromptBranches, TokenizedPair
from dpo_ray.reference import (
    HIDDEN_WIDTH,
    ReferenceStore,
    ReferenceTable,
    ResponseScorer,
    ResponseValue,
    ScoringActor,
    View,
    narrowed,
    response_key,
)


def ids(*values: int) -> Any:
    return np.array(values, np.int32)


VALUES = {
    response_key(ids(1), ids(2, 3)): ResponseValue(-1 / 3, 2, 0.1, -0.5),
    response_key(ids(1), ids(4)): ResponseValue(-1e-17, 1, 2.5, -0.5),
    response_key(ids(5), ids(4)): ResponseValue(-12345.678901234567, 900, 0.0, -0.5),
}


@pytest.fixture(params=["local", "uri"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "store") if request.param == "local" else (tmp_path / "store").as_uri()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=64, initializer_range=0.3, **sizes)
    folder = tmp_path_factory.mktemp("model")
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return ModelSource(str(folder))


def candidates() -> list[PromptBranches]:
    """Prompts with one to five responses."""
    generator = np.random.default_rng(0)
    return [
        PromptBranches(
            generator.integers(3, 64, generator.integers(1, 12)).astype(np.int32),
            tuple(generator.integers(3, 64, generator.integers(1, 9)).astype(np.int32) for _ in range(k)),
        )
        for k in (2, 1, 5, 3, 2, 4)
    ]


def by_plain_forwards(model: ModelSource, items: list[PromptBranches]) -> dict[bytes, tuple[float, int, float]]:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.path).eval()
    result = {}
    for item in items:
        for response in item.responses:
            whole = torch.from_numpy(np.concatenate((item.prompt_ids, response))).long()[None]
            with torch.no_grad():
                logits = loaded(input_ids=whole).logits[0, len(item.prompt_ids) - 1 : -1].double()
            logps = logits.log_softmax(-1)
            total = logps.gather(-1, whole[0, len(item.prompt_ids) :, None]).sum().item()
            entropy = -(logps.exp() * logps).sum().item()
            result[response_key(item.prompt_ids, response)] = (total, len(response), entropy)
    return result


def scorer(model: ModelSource, **batch: Any) -> ResponseScorer:
    return ResponseScorer(model, "fp32", BatchConfig(**batch))


def test_a_key_depends_on_every_token_and_on_where_the_prompt_ends():
    contents = [
        (ids(1, 2), ids(3)),
        (ids(1), ids(2, 3)),
        (ids(1, 2), ids(4)),
        (ids(2, 1), ids(3)),
        (ids(1, 2, 3), ids()),
        (ids(), ids(1, 2, 3)),
        (ids(1, 2), ids(3, 0)),
    ]
    keys = [response_key(*content) for content in contents]
    assert len(set(keys)) == len(contents)
    assert {len(key) for key in keys} == {16}
    assert keys[0] == response_key(np.array([1, 2], np.int64), np.array([9, 3, 9], np.int32)[1:2])
    as_written = struct.pack("<I3i", 2, 1, 2, 3)  # stores are read by later versions
    assert keys[0] == hashlib.blake2b(as_written, digest_size=16).digest()


def test_the_store_gives_back_every_bit_of_what_was_wanted(root: str):
    store = ReferenceStore(root, "fingerprint", "fp32")
    assert store.read(VALUES) == {}
    store.write(VALUES)
    assert store.read(VALUES) == VALUES
    first, *_ = VALUES
    assert store.read([first, response_key(ids(9), ids(9))]) == {first: VALUES[first]}
    assert store.read([]) == {}


def test_values_of_other_weights_or_another_precision_are_not_seen(root: str):
    ReferenceStore(root, "one", "fp32").write(VALUES)
    assert ReferenceStore(root, "other", "fp32").read(VALUES) == {}
    assert ReferenceStore(root, "one", "bf16").read(VALUES) == {}
    assert ReferenceStore(root, "one", "fp32").read(VALUES) == VALUES


def test_parts_add_up_and_the_same_content_is_one_file(root: str, tmp_path: Path):
    store = ReferenceStore(root, "f", "fp32")
    first, second, third = VALUES
    store.write({first: VALUES[first], second: VALUES[second]})
    store.write({second: VALUES[second], first: VALUES[first]})  # another actor that computed the same
    assert len(list((tmp_path / "store" / "f-fp32-3").iterdir())) == 1
    store.write({third: VALUES[third]})
    assert len(list((tmp_path / "store" / "f-fp32-3").iterdir())) == 2
    assert store.read(VALUES) == VALUES


def test_a_part_left_unfinished_is_ignored(root: str, tmp_path: Path):
    store = ReferenceStore(root, "f", "fp32")
    store.write(VALUES)
    (part,) = (tmp_path / "store" / "f-fp32-3").iterdir()
    (part.parent / f".tmp-{part.name}-0123abcd").write_bytes(part.read_bytes()[:40])
    (part.parent / "notes.txt").write_text("not a part")
    assert store.read(VALUES) == VALUES


@pytest.mark.parametrize("layout", ["branches", "padded"])
@pytest.mark.parametrize(("tokens_per_device", "row_tokens"), [(60, 20), (120, 60), (4096, 512)])
def test_scores_are_those_of_plain_forwards_for_any_packing(
    model: ModelSource, layout: Layout, tokens_per_device: int, row_tokens: int
):
    items = candidates()
    budget = tokens_per_device if layout == "branches" else 2 * tokens_per_device
    options = {"layout": layout, "tokens_per_device": budget, "row_tokens": row_tokens}
    values = scorer(model, **options).score(items)
    expected = by_plain_forwards(model, items)
    assert values.keys() == expected.keys()
    for key, (logps, num_tokens, entropy) in expected.items():
        assert values[key].num_tokens == num_tokens
        assert values[key].logps == pytest.approx(logps, abs=1e-4)
        assert values[key].entropy == pytest.approx(entropy, abs=1e-4)


def block(items: list[PromptBranches], views: list[int]) -> pa.Table:
    return pa.table(
        {
            "prompt_ids": [item.prompt_ids.tolist() for item in items],
            "responses": [[response.tolist() for response in item.responses] for item in items],
            "views": [views for _ in items],
        }
    )


def test_a_call_stores_the_values_of_its_block_and_returns_their_number(model: ModelSource, root: str):
    items = candidates()
    store = ReferenceStore(root, "f", "fp32")
    actor = ScoringActor([View(model, store)], "fp32", BatchConfig())
    assert actor(block(items, [0])).to_pydict() == {"computed": [17], "keys": [[]], "errors": [[]]}
    expected = by_plain_forwards(model, items)
    stored = store.read(expected)
    assert stored == scorer(model).score(items)
    assert stored.keys() == expected.keys() == store.keys(expected)


def test_a_prompt_that_cannot_be_scored_is_told_and_loses_no_other(model: ModelSource, root: str):
    items = candidates()
    store = ReferenceStore(root, "f", "fp32")
    budget = max(len(item.prompt_ids) + sum(len(r) - 1 for r in item.responses) for item in items) - 1
    actor = ScoringActor([View(model, store)], "fp32", BatchConfig(tokens_per_device=budget))
    told = actor(block(items, [0])).to_pydict()
    largest = max(items, key=lambda item: len(item.prompt_ids) + sum(len(r) - 1 for r in item.responses))
    lost = {response_key(largest.prompt_ids, response) for response in largest.responses}
    assert set(told["keys"][0]) == lost
    assert all("more than tokens_per_device" in reason for reason in told["errors"][0])
    assert told["computed"] == [17 - len(lost)]
    assert store.keys(by_plain_forwards(model, items)) == set(by_plain_forwards(model, items)) - lost


def test_a_log_prob_that_is_not_finite_is_an_error_and_not_a_value(
    model: ModelSource, root: str, monkeypatch: pytest.MonkeyPatch
):
    items = candidates()[:2]
    store = ReferenceStore(root, "f", "fp32")
    actor = ScoringActor([View(model, store)], "fp32", BatchConfig())
    values = scorer(model).score(items)
    wrong = next(iter(values))
    monkeypatch.setattr(ResponseScorer, "score", lambda *_: values | {wrong: values[wrong]._replace(logps=math.nan)})
    assert actor(block(items, [0])).to_pydict() == {"computed": [2], "keys": [[wrong]], "errors": [["log-prob nan"]]}
    assert wrong not in store.read([wrong])


def test_hidden_states_are_means_over_the_positions_that_predict_and_the_prompts_end(model: ModelSource, root: str):
    items = candidates()
    store = ReferenceStore(root, "f", "fp32")
    store.write(scorer(model).score(items))
    keys = by_plain_forwards(model, items)
    assert store.keys(keys, hidden=True) == set(), "values without them do not serve"
    ScoringActor([View(model, store, hidden=True)], "fp32", BatchConfig())(block(items, [0]))
    found = store.read(keys, hidden=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model.path).eval()
    for item in items:
        for response in item.responses:
            whole = torch.from_numpy(np.concatenate((item.prompt_ids, response)))[None].long()
            with torch.no_grad():
                states = loaded.base_model(input_ids=whole).last_hidden_state[0].double()
            end = len(item.prompt_ids) - 1
            expected = torch.cat([states[end:-1].mean(0), states[end]]).numpy()
            value = found[response_key(item.prompt_ids, response)]
            np.testing.assert_allclose(value.hidden, expected, atol=1e-5)


def test_wide_hidden_states_keep_their_distances_when_they_are_narrowed():
    states = torch.randn(40, 2, 3 * HIDDEN_WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(narrowed(states), narrowed(states))
    assert narrowed(states).shape == (40, 2, HIDDEN_WIDTH)
    assert torch.equal(narrowed(states[..., :HIDDEN_WIDTH]), states[..., :HIDDEN_WIDTH])
    kept = (narrowed(states[:20]) - narrowed(states[20:])).norm(dim=-1) / (states[:20] - states[20:]).norm(dim=-1)
    assert float((kept - 1).abs().max()) < 4 / HIDDEN_WIDTH**0.5


def test_an_adapter_and_its_base_share_their_weights_and_give_the_values_of_each_alone(
    model: ModelSource, tmp_path: Path
):
    torch.manual_seed(1)
    base = transformers.AutoModelForCausalLM.from_pretrained(model.path)
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "adapter")
    adapter = ModelSource(str(tmp_path / "adapter"))
    items = candidates()
    on, off = (ReferenceStore(str(tmp_path / name), "f", "fp32") for name in ("on", "off"))
    views = [View(adapter, on, hidden=True), View(model, off)]
    shared = load_to_score([adapter, model], "fp32")
    assert shared[0].model is shared[1].model
    ScoringActor(views, "fp32", BatchConfig())(block(items, [0, 1]))
    keys = by_plain_forwards(model, items)
    for store, alone in ((on, scorer(adapter)), (off, scorer(model))):
        expected = alone.score(items)
        found = store.read(keys)
        assert all(found[key].logps == pytest.approx(expected[key].logps, abs=1e-4) for key in keys)
    assert any(abs(on.read(keys)[key].logps - off.read(keys)[key].logps) > 0.1 for key in keys)


def test_a_table_gives_the_values_of_each_pair_by_its_number(tmp_path: Path):
    pairs = [
        TokenizedPair("a", ids(1), ids(2, 3), ids(4)),
        TokenizedPair("b", ids(1), ids(4), ids(2, 3)),
        TokenizedPair("c", ids(5), ids(4), ids(4)),
    ]
    store = ReferenceStore(str(tmp_path), "f", "fp32")
    store.write(VALUES)
    table = ReferenceTable(store, pairs)
    logps = table.logps([2, 0, 1, 0])
    long, short, other = VALUES.values()
    assert logps.chosen.tolist() == [other.logps, long.logps, short.logps, long.logps]
    assert logps.rejected.tolist() == [other.logps, short.logps, long.logps, short.logps]
    assert logps.chosen_tokens.tolist() == [900, 2, 1, 2]
    assert logps.rejected_tokens.tolist() == [900, 1, 2, 1]
    assert logps.chosen.dtype == torch.float64
    assert table.entropy == pytest.approx(2 * (long.entropy + short.entropy) + 2 * other.entropy)


def test_log_probs_of_tokens_are_computed_once_a_loss_asks_for_them(model: ModelSource, root: str):
    items = [item for item in candidates() if len(item.responses) == 2]
    store = ReferenceStore(root, "f", "fp32")
    plain = scorer(model).score(items)
    store.write(plain)
    assert store.read(plain, per_token=True) == {}, "without them a value does not serve"
    with_tokens = ResponseScorer(model, "fp32", BatchConfig(), per_token=True).score(items)
    store.write(with_tokens)
    assert store.read(plain, per_token=True).keys() == plain.keys()
    for value in store.read(plain, per_token=True).values():
        assert value.token_logps is not None
        assert len(value.token_logps) == value.num_tokens
        assert sum(value.token_logps) == pytest.approx(value.logps, abs=1e-5)
    assert {key: value[:4] for key, value in store.read(plain).items()} == {key: v[:4] for key, v in plain.items()}

    pairs = [TokenizedPair(str(i), item.prompt_ids, *item.responses) for i, item in enumerate(items)]
    logps = ReferenceTable(store, pairs, tails=True).logps([1, 0])
    for i, pair in enumerate((pairs[1], pairs[0])):
        shorter = min(len(pair.chosen_ids), len(pair.rejected_ids))
        for ids_of_side, tail in ((pair.chosen_ids, logps.chosen_tail), (pair.rejected_ids, logps.rejected_tail)):
            tokens = with_tokens[response_key(pair.prompt_ids, ids_of_side)].token_logps or ()
            assert tail is not None
            assert tail[i].item() == pytest.approx(sum(tokens[shorter:]), abs=1e-5)


def test_a_pair_that_is_not_in_the_store_is_an_error(tmp_path: Path):
    store = ReferenceStore(str(tmp_path), "f", "fp32")
    store.write(VALUES)
    with pytest.raises(KeyError):
        ReferenceTable(store, [TokenizedPair("a", ids(1), ids(2, 3), ids(77))])
