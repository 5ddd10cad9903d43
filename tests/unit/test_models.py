"""Models as folders: their identity, what is wrong with them, dropout off, and an export that others read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from dpo_ray.config import LoraConfig, ModelConfig
from dpo_ray.data.batching import make_batch
from dpo_ray.errors import InputError
from dpo_ray.models import (
    ModelSource,
    PairModel,
    copy_generation_settings,
    end_token_ids,
    export,
    load_language_model,
    load_policy,
    load_tokenizer,
    local_folder,
    read_config,
    usable_layout,
    weights_fingerprint,
)
from dpo_ray.pairs import PairBatch, PromptBranches

IDS = torch.tensor([[1, 5, 9, 13, 7]])


def llama(seed: int = 0, **more: Any) -> Any:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, initializer_range=0.3, **(sizes | more))
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, resid_pdrop=0.3, attn_pdrop=0.3)
    return transformers.GPT2LMHeadModel(config).eval()


def opt() -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.OPTConfig(
        vocab_size=32, word_embed_proj_dim=16, dropout=0.3, attention_dropout=0.3, activation_dropout=0.3, **sizes
    )
    return transformers.OPTForCausalLM(config).eval()


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(32)}, unk_token="w0"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", chat_template="{{ messages }}")


def saved(folder: Path, model: Any) -> ModelSource:
    model.save_pretrained(folder)
    return ModelSource(str(folder))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


def batch() -> PairBatch:
    responses = (np.array([3, 4, 5], np.int32), np.array([6, 2], np.int32))
    return make_batch([PromptBranches(np.array([1, 8, 9], np.int32), responses)], [[0]], "branches")


def adapter_on(base: ModelSource, folder: Path) -> tuple[ModelSource, Any]:
    """A saved adapter with weights that do something, and the model it was saved from."""
    import peft

    model = load_language_model(base, "fp32")
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False))
    adapted.save_pretrained(folder)
    return ModelSource(str(folder)), adapted.eval()


def test_equal_weights_have_equal_fingerprints_wherever_they_are(tmp_path: Path):
    first, second = saved(tmp_path / "a", llama()), saved(tmp_path / "elsewhere" / "b", llama())
    assert weights_fingerprint(first) == weights_fingerprint(second)


def test_one_other_weight_gives_another_fingerprint(tmp_path: Path):
    source = saved(tmp_path / "a", llama())
    before = weights_fingerprint(source)
    file = tmp_path / "a" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, file, metadata={"format": "pt"})
    assert weights_fingerprint(source) != before


def test_another_configuration_of_the_same_weights_gives_another_fingerprint(tmp_path: Path):
    one, other = saved(tmp_path / "a", llama()), saved(tmp_path / "b", llama(rms_norm_eps=1e-3))
    assert weights_fingerprint(one) != weights_fingerprint(other)


def test_the_fingerprint_of_an_adapter_is_of_its_base_too(tmp_path: Path):
    base = saved(tmp_path / "base", llama())
    adapter, _ = adapter_on(base, tmp_path / "adapter")
    before = weights_fingerprint(adapter)
    assert before == weights_fingerprint(adapter)
    assert before != weights_fingerprint(base)
    saved(tmp_path / "base", llama(seed=1))
    assert weights_fingerprint(adapter) != before


def test_a_tokenizer_is_no_part_of_the_fingerprint(tmp_path: Path):
    source = saved(tmp_path / "a", llama())
    before = weights_fingerprint(source)
    tokenizer().save_pretrained(tmp_path / "a")
    assert weights_fingerprint(source) == before


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def unknown_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such", "architectures": ["NoSuch"]}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors is damaged"),
        (emptied, r"model\.safetensors is damaged"),
        (without_config, r"is not a model: it has no config\.json"),
        (without_weights, "has no safetensors weights"),
        (pickled, "has no safetensors weights"),
        (unknown_architecture, r"cannot load .*no-such"),
    ],
)
def test_a_damaged_folder_is_an_input_error_in_one_line(tmp_path: Path, damage: Callable[[Path], None], message: str):
    source = saved(tmp_path / "model", llama())
    load_language_model(source, "fp32")
    damage(tmp_path / "model")
    with pytest.raises(InputError, match=message) as caught:
        load_language_model(source, "fp32")
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_not_there_is_an_input_error(tmp_path: Path):
    for path in (str(tmp_path / "missing"), "./missing", "~/missing-model"):
        with pytest.raises(InputError, match=f"^no model at {path}$"):
            local_folder(ModelSource(path))


def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_an_input_error():
    for name in ("nobody/nothing", "not a name at all"):
        with pytest.raises(InputError, match=f"no model at {name}, and none on the hub"):
            local_folder(ModelSource(name))


def test_a_folder_without_a_tokenizer_is_an_input_error(tmp_path: Path):
    source = saved(tmp_path / "model", llama())
    with pytest.raises(InputError, match="has no tokenizer"):
        load_tokenizer(source)


def test_end_tokens_are_those_of_the_generation_settings(tmp_path: Path):
    source = saved(tmp_path / "model", llama())
    settings = tmp_path / "model" / "generation_config.json"
    for given, expected in ({"eos_token_id": 5}, [5]), ({"eos_token_id": [5, 7]}, [5, 7]), ({}, []):
        settings.write_text(json.dumps(given))
        assert end_token_ids(source) == expected
    settings.unlink()
    assert end_token_ids(source) == []


@pytest.mark.parametrize("build", [gpt2, opt, lambda: llama(attention_dropout=0.5)], ids=["gpt2", "opt", "llama"])
def test_dropout_is_off_also_in_training(tmp_path: Path, build: Callable[[], Any]):
    source = saved(tmp_path / "model", build())
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").train()
    assert not torch.equal(logits(loaded), logits(loaded)), "the model has dropout"
    policy = load_language_model(source, "fp32").train()
    assert torch.equal(logits(policy), logits(policy))
    torch.testing.assert_close(logits(policy), logits(build()))


def test_weights_come_in_the_type_of_the_precision(tmp_path: Path):
    source = saved(tmp_path / "model", llama())
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        assert {p.dtype for p in load_language_model(source, precision).parameters()} == {dtype}


def test_the_folder_of_an_adapter_loads_as_its_base_with_the_adapter_merged(tmp_path: Path):
    base = saved(tmp_path / "base", llama())
    source, adapted = adapter_on(base, tmp_path / "adapter")
    merged = load_language_model(source, "fp32")
    assert type(merged) is transformers.LlamaForCausalLM
    torch.testing.assert_close(logits(merged), logits(adapted))
    assert (logits(merged) - logits(load_language_model(base, "fp32"))).abs().max() > 0.01
    assert read_config(source).hidden_size == 16


def test_new_adapters_change_nothing_and_are_the_same_for_a_seed(tmp_path: Path):
    source = saved(tmp_path / "model", llama())
    config = ModelConfig(path=source.path, lora=LoraConfig(rank=2))
    policies = [load_policy(config, "fp32", seed=seed) for seed in (0, 0, 1)]
    full = load_policy(ModelConfig(path=source.path), "fp32", seed=0)
    assert (policies[0].has_adapter, full.has_adapter) == (True, False)
    for policy in policies:
        assert torch.equal(policy(batch()).logps, full(batch()).logps)
        assert {"lora" in name for name, p in policy.named_parameters() if p.requires_grad} == {True}
    first, again, other = ([p for p in policy.parameters() if p.requires_grad] for policy in policies)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_adapter_targets_that_are_not_there_are_an_input_error(tmp_path: Path):
    source = saved(tmp_path / "model", llama())
    with pytest.raises(InputError, match=r"`model\.lora\.targets`: .*no_such_layer"):
        load_policy(ModelConfig(path=source.path, lora=LoraConfig(targets=("no_such_layer",))), "fp32", seed=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("computed", "dtype"), [("float32", "float32"), ("float32", "bfloat16"), ("bfloat16", "float32")]
)
def test_an_export_is_read_by_plain_transformers(tmp_path: Path, tied: bool, computed: str, dtype: str):
    policy = PairModel(llama(tie_word_embeddings=tied).to(getattr(torch, computed)))
    weights = policy.language_model.state_dict()
    if tied:
        del weights["lm_head.weight"]  # as `full_weights` gives a shared weight: once
    export(policy, weights, tokenizer(), tmp_path / "model", dtype=dtype)

    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {getattr(torch, dtype)}
    assert ("lm_head.weight" in stored) is not tied
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").eval()
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}, "the configuration says so too"
    expected = llama(tie_word_embeddings=tied)
    for parameter in expected.parameters():  # the tables of the positions stay in float32
        parameter.data = parameter.data.to(getattr(torch, computed)).to(getattr(torch, dtype))
    assert torch.equal(logits(model), logits(expected))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").chat_template == "{{ messages }}"


def test_an_export_is_of_the_given_weights_not_of_the_models_own(tmp_path: Path):
    """Under ZeRO-3 the model itself holds shards."""
    export(PairModel(llama()), llama(seed=1).state_dict(), tokenizer(), tmp_path / "model", dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert torch.equal(logits(model), logits(llama(seed=1)))


def test_an_exported_adapter_gives_the_policy_again(tmp_path: Path):
    source = saved(tmp_path / "base", llama())
    policy = load_policy(ModelConfig(path=source.path, lora=LoraConfig(rank=2)), "fp32", seed=0).eval()
    trained = {name: p for name, p in policy.language_model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.data += 0.1
    export(policy, {name: p.detach() for name, p in trained.items()}, tokenizer(), tmp_path / "out", dtype="float32")

    assert not (tmp_path / "out" / "model.safetensors").exists()
    loaded = load_language_model(ModelSource(str(tmp_path / "out")), "fp32").eval()
    expected = policy(batch()).logps
    torch.testing.assert_close(PairModel(loaded)(batch()).logps, expected, rtol=1e-5, atol=1e-5)
    assert (expected - PairModel(llama())(batch()).logps).abs().max() > 0.01


def test_generation_settings_go_with_the_model(tmp_path: Path):
    source = saved(tmp_path / "model", llama())
    (tmp_path / "out").mkdir()
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    copy_generation_settings(source, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"eos_token_id": [5, 7]}'
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "model" / "generation_config.json").unlink()
    copy_generation_settings(source, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def build_tiny(architecture: str) -> Any:
    """A random two-layer model of another family."""
    torch.manual_seed(0)
    sizes = {"mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2}, "gpt_neo": {"hidden_size": 32, "num_heads": 4}}
    more = {"gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]], "window_size": 4}}
    llama = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {**sizes.get(architecture, llama), **more.get(architecture, {}), "vocab_size": 64}
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(architecture, **options)
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return PairModel(model)


@pytest.mark.parametrize(("architecture", "layout"), [("llama", "one_row"), ("mpt", "padded"), ("gpt_neo", "padded")])
def test_an_architecture_that_ignores_the_mask_falls_back_to_padded_rows(architecture: str, layout: str):
    model = build_tiny(architecture)
    assert usable_layout(model, model, "branches", "fp32") == layout
