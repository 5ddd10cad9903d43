"""Hugging Face models: where they are, loading policy and tokenizer, LoRA, which layout suits one, export.

`PairModel` turns a causal language model into what training, reference pass and scoring need: a `PairBatch` in, the
log-probs of its responses out. It knows nothing of losses, sharding or Ray.
"""

import copy
import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dpo_ray.attention import Attention, attention_inputs, choose_attention, set_kernel
from dpo_ray.data.batching import Layout, Lengths, make_batch
from dpo_ray.errors import InputError
from dpo_ray.logps import TokenLogps, sum_by_response, token_logps
from dpo_ray.metrics import model_flops
from dpo_ray.pairs import Ids, PairBatch, PromptBranches

if TYPE_CHECKING:
    from dpo_ray.config import LoraConfig, ModelConfig

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`engine.precision` -> type of the weights in the computation."""


class ModelSource(NamedTuple):
    """Where weights come from: values only, so that it crosses processes."""

    path: str
    revision: str | None = None
    trust_remote_code: bool = False


class ResponseLogps(NamedTuple):
    """What a model says about each response of a batch."""

    logps: Tensor  # [S] float64, summed log p(response | prompt), nats, with gradient
    num_tokens: Tensor  # [S] float64
    entropy: Tensor  # [S] float64, summed entropy of the next-token distributions, nats, without gradient
    alignment: Tensor  # [S] float64, mean of log p(token) - log sum of p^2 over the vocabulary, without gradient
    token_logps: Tensor  # [N] log p of each response token, with gradient


class PairModel(nn.Module):
    """A causal language model that gives the log-probs of a batch's responses.

    The body runs once over all rows; the output layer only where a response token is predicted, in chunks.
    """

    def __init__(self, language_model: Any) -> None:
        super().__init__()
        self.language_model = language_model
        causal = self.causal
        config = causal.config.get_text_config()
        output = causal.get_output_embeddings()
        if type(output) is not nn.Linear:
            raise InputError(
                f"the output layer of {type(causal).__name__} is a {type(output).__name__}, not a plain one"
            )
        weight: Any = output.weight
        self.head = LogpHead(
            weight,
            output.bias,
            scale=_output_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
        )
        self._config = config
        self._own_attention: str = causal.config._attn_implementation
        self.attention = Attention("mask", "as loaded")

    @property
    def config(self) -> Any:
        """The text configuration of the model."""
        return self._config

    @property
    def body(self) -> Any:
        """The decoder without its output layer."""
        return self.causal.base_model

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.language_model, "peft_config")

    @property
    def causal(self) -> Any:
        """The language model without the adapter around it."""
        model: Any = self.language_model
        return model.get_base_model() if self.has_adapter else model

    def attend_with(self, attention: Attention) -> None:
        """Compute attention over packed rows by this kernel from now on.

        Raises:
            ValueError: The architecture does not let its attention be exchanged.
        """
        set_kernel(self.causal, attention.kernel, self._own_attention)
        self.attention = attention

    def flops(self, items: Iterable[Lengths]) -> int:
        """Operations of training on some prompts with their responses that the model cannot do without; see
        `metrics.model_flops`. Of weights that are not trained no gradient is counted. Fused experts are left out."""
        linear = [m.weight for m in self.body.modules() if isinstance(m, nn.Linear)]
        sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in linear]
        head = getattr(self.head.weight, "ds_numel", self.head.weight.numel())
        heads = self._config.num_attention_heads
        head_width = getattr(self._config, "head_dim", None) or self._config.hidden_size // heads
        items = list(items)
        num_tokens, num_predicted = sum(item.branched for item in items), sum(sum(item.responses) for item in items)
        frozen = num_tokens * sum(size for size, is_trained in sizes if not is_trained)
        frozen += 0 if self.head.weight.requires_grad else num_predicted * head
        return (
            model_flops(
                num_tokens=num_tokens,
                num_predicted=num_predicted,
                num_attended=sum(item.attended for item in items),
                body_weights=sum(size for size, _ in sizes),
                head_weights=head,
                attention_width=self._config.num_hidden_layers * heads * head_width,
            )
            - 2 * frozen
        )

    def forward(self, batch: PairBatch) -> ResponseLogps:
        return self._read(self._predicting(batch), batch)

    def with_hidden(self, batch: PairBatch) -> tuple[ResponseLogps, Tensor]:
        """Log-probs, and hidden states [S, 2, D], float64: of each response the mean of the last layer's states that
        predict its tokens, and the state at the end of its prompt."""
        predicting = self._predicting(batch)
        found, states = self._read(predicting, batch), predicting.double()
        sums = states.new_zeros(batch.num_responses, states.shape[1]).index_add_(0, batch.response_index, states)
        ends = found.num_tokens.cumsum(0).long()
        first = torch.cat([ends.new_zeros(1), ends[:-1]])  # a response's tokens stand together, in their order
        return found, torch.stack([sums / found.num_tokens[:, None], states[first]], dim=1)

    def _predicting(self, batch: PairBatch) -> Tensor:
        """Last hidden states at the positions that predict response tokens, [N, D]."""
        hidden = self.body(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            **attention_inputs(batch, self._config, self.attention.kernel, self.head.weight.dtype),
        ).last_hidden_state
        predicting: Tensor = hidden.reshape(-1, hidden.shape[-1])[batch.predict_index]
        return predicting

    def _read(self, predicting: Tensor, batch: PairBatch) -> ResponseLogps:
        found: TokenLogps = self.head(predicting, batch.target_ids)
        per_token = (
            found.logps,
            torch.ones_like(found.logps),
            found.entropy,
            found.logps.detach() - found.log_collision,
        )
        logps, num_tokens, entropy, alignment = (
            sum_by_response(values, batch.response_index, batch.num_responses) for values in per_token
        )
        return ResponseLogps(logps, num_tokens, entropy, alignment / num_tokens, found.logps)


class LogpHead(nn.Module):
    """The output layer as a module of its own, holding the layer's own parameters: ZeRO-3 then gathers them around its
    forward and backward as around any layer's."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, *, scale: float, softcap: float | None) -> None:
        super().__init__()
        self.weight, self.bias, self.scale, self.softcap = weight, bias, scale, softcap

    def forward(self, hidden: Tensor, target_ids: Tensor) -> TokenLogps:
        return token_logps(hidden, self.weight, target_ids, bias=self.bias, scale=self.scale, softcap=self.softcap)


def usable_layout(
    forward: Callable[[PairBatch], ResponseLogps], model: PairModel, layout: Layout, precision: str
) -> Layout:
    """Set the fastest attention that gives the right numbers, and return the layout for it.

    Some prompts with two responses are computed in padded rows and in packed ones. Where they differ, attention falls
    back to the architecture's own with a mask, and then to padded rows: some architectures ignore the mask in silence.
    Windows and chunks that only long texts reach are known by their configuration.

    Args:
        forward: `model`, or an engine around it; every rank must call this.
        layout: What the recipe asks for, `branches` or `padded`.
    """
    model.attend_with(Attention("mask", "padded rows"))
    if layout == "padded":
        return layout
    if any(getattr(model.config, name, None) for name in ("attention_types", "window_size", "attention_chunk_size")):
        return "padded"
    rng = np.random.default_rng(0)

    def ids(length: int) -> Ids:
        return rng.integers(0, model.config.vocab_size, length).astype(np.int32)

    device, dtype = model.head.weight.device, model.head.weight.dtype
    copies = 1 if device.type == "cpu" else 8  # several blocks of FlexAttention, as in training
    items = [
        PromptBranches(ids(prompt), (ids(first), ids(second)))
        for prompt, first, second in [(5, 7, 4), (3, 6, 8)] * copies
    ]
    numbers = list(range(len(items)))
    tolerance = 1e-3 if precision == "fp32" else 0.5
    with torch.no_grad():
        expected = forward(make_batch(items, [[i] for i in numbers], "padded")).logps
        candidates = [choose_attention(model.causal, device, dtype)]
        if candidates[0].kernel != "mask":
            candidates.append(Attention("mask", f"{candidates[0].kernel} gave wrong numbers"))
        for attention in candidates:
            try:
                model.attend_with(attention)
                found = forward(make_batch(items, [numbers], "branches")).logps
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):  # what it cannot take
                continue
            if torch.allclose(found, expected, rtol=1e-4, atol=tolerance):
                logger.info("attention: %s", attention)
                return "branches" if attention.kernel == "mask" else "one_row"
    model.attend_with(Attention("mask", "padded rows: packed ones gave wrong numbers"))
    return "padded"


def _output_scale(config: Any) -> float:
    """What an architecture multiplies its logits by (Cohere, Falcon-H1), or divides them by (Granite)."""
    if (factor := getattr(config, "lm_head_multiplier", None)) is not None:
        return float(factor)
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        return 1 / float(divisor)
    return float(getattr(config, "logit_scale", None) or 1.0)


def local_folder(source: ModelSource) -> Path:
    """The folder of a model: itself, or the hub's snapshot, downloaded once. Weights must be whole safetensors files.

    Raises:
        InputError: No such model, no safetensors, or a damaged file.
    """
    folder = Path(source.path).expanduser()
    if not folder.is_dir():
        folder = _snapshot(source)
    if not (folder / "config.json").exists() and not (folder / "adapter_config.json").exists():
        raise InputError(f"{source.path} is not a model: it has no config.json")
    files = weight_files(folder)
    if not files:
        raise InputError(f"{source.path} has no safetensors weights")
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file} is damaged: {error}") from None
    return folder


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _snapshot(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if source.path.startswith((".", "/", "~")):
        raise InputError(f"no model at {source.path}")
    wanted = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.py"]
    try:
        return Path(snapshot_download(source.path, revision=source.revision, allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        cause = " ".join(str(error).split())
        raise InputError(f"no model at {source.path}, and none on the hub: {cause[:200]}") from None


def weights_fingerprint(source: ModelSource) -> str:
    """Hash of a model's weights and configuration; of an adapter's and its base's. Equal weights, equal fingerprint."""
    folder = local_folder(source)
    digest = hashlib.blake2b(digest_size=16)
    adapter = folder / "adapter_config.json"
    for file in weight_files(folder):
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    config = json.loads((adapter if adapter.exists() else folder / "config.json").read_text())
    config.pop("base_model_name_or_path", None)  # the base counts by its weights, wherever it lies
    digest.update(json.dumps(config, sort_keys=True).encode())
    if adapter.exists():
        digest.update(weights_fingerprint(adapter_base(folder, source)).encode())
    return digest.hexdigest()


def load_tokenizer(source: ModelSource) -> Any:
    """The tokenizer beside a model's weights.

    Raises:
        InputError: There is none.
    """
    from transformers import AutoTokenizer

    folder = local_folder(source)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{source.path} has no tokenizer: {' '.join(str(error).split())[:200]}") from None


def end_token_ids(source: ModelSource) -> list[int]:
    """Tokens that end a response by the model's generation settings."""
    file = local_folder(source) / "generation_config.json"
    found = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    return [] if found is None else [found] if isinstance(found, int) else list(found)


def read_config(source: ModelSource) -> Any:
    """The text configuration of a model (of an adapter's base), without its weights."""
    from transformers import AutoConfig

    folder = local_folder(source)
    if (folder / "adapter_config.json").exists():
        return read_config(adapter_base(folder, source))
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=source.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"{source.path}: {' '.join(str(error).split())[:200]}") from None
    return config.get_text_config()


def load_language_model(source: ModelSource, precision: str) -> Any:
    """A causal language model in the type of `precision`, dropout off. An adapter's folder gives its base, merged.

    Raises:
        InputError: It cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    folder = local_folder(source)
    if (folder / "adapter_config.json").exists():
        from peft import PeftModel

        base = load_language_model(adapter_base(folder, source), precision)
        return PeftModel.from_pretrained(base, folder).merge_and_unload()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES[precision], trust_remote_code=source.trust_remote_code, use_safetensors=True
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"cannot load {source.path}: {' '.join(str(error).split())[:300]}") from None
    _disable_dropout(model)
    return model


def shared_copy(model: Any) -> Any:
    """A second model on the same tensors: its modules and its configuration are its own, so its attention may be
    exchanged, or an adapter put into it, and the first does not notice."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


class Loaded(NamedTuple):
    """A model that is ready to score."""

    model: PairModel
    as_itself: Callable[[], AbstractContextManager[Any]]
    """Within this the model is the one that was asked for: a base that lends its weights to an adapter too."""


def load_to_score(sources: Sequence[ModelSource], precision: str) -> list[Loaded]:
    """Models to score with, in evaluation mode. An adapter and its own base are one model: adapter on, adapter off."""
    prints = {source: weights_fingerprint(source) for source in sources}
    found: dict[ModelSource, Loaded] = {}
    for source in sources:
        folder = local_folder(source)
        if (folder / "adapter_config.json").exists():
            base = next((s for s in sources if prints[s] == weights_fingerprint(adapter_base(folder, source))), None)
            if base is not None and base not in found:
                from peft import PeftModel

                adapted = PeftModel.from_pretrained(load_language_model(base, precision), folder)
                model = PairModel(adapted).eval()
                found[source], found[base] = Loaded(model, nullcontext), Loaded(model, adapted.disable_adapter)
    for source in sources:
        if source not in found:
            found[source] = Loaded(PairModel(load_language_model(source, precision)).eval(), nullcontext)
    return [found[source] for source in sources]


def load_policy(config: "ModelConfig", precision: str, seed: int) -> PairModel:
    """The model to train: all its weights, or LoRA adapters on it, initialised from `seed`."""
    model = load_language_model(policy_source(config), precision)
    return PairModel(model if config.lora is None else _add_lora(model, config.lora, seed))


def policy_source(config: "ModelConfig") -> ModelSource:
    return ModelSource(config.path, config.revision, config.trust_remote_code)


def _add_lora(model: Any, config: "LoraConfig", seed: int) -> Any:
    from peft import LoraConfig as PeftLoraConfig
    from peft import get_peft_model

    torch.manual_seed(seed)  # every rank starts from the same adapter
    targets = config.targets if isinstance(config.targets, str) else list(config.targets)
    try:
        return get_peft_model(
            model,
            PeftLoraConfig(
                task_type="CAUSAL_LM",
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
            ),
        )
    except ValueError as error:
        raise InputError(f"`model.lora.targets`: {' '.join(str(error).split())[:200]}") from None


def adapter_base(folder: Path, source: ModelSource) -> ModelSource:
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    return ModelSource(base, None, source.trust_remote_code)


def _disable_dropout(model: nn.Module) -> None:
    """Preference losses compare log-probs with a reference's: noise in them is noise in the reward."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):  # plain numbers in some attention modules
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def export(model: PairModel, weights: Mapping[str, Tensor], tokenizer: Any, folder: Path, *, dtype: str) -> None:
    """Write a Hugging Face folder: safetensors (or the adapter), configuration, tokenizer, chat template.

    Args:
        weights: The whole weights by the names of `model.language_model`; for LoRA the adapter's suffice.
        dtype: Type of the written weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    typed = {name: value.to(getattr(torch, dtype)).contiguous() for name, value in weights.items()}
    language_model: Any = model.language_model
    language_model.save_pretrained(folder, state_dict=typed, safe_serialization=True)
    if not model.has_adapter:  # transformers writes the type of the model in memory, not of the weights given
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"dtype": dtype}, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def copy_generation_settings(source: ModelSource, folder: Path) -> None:
    """Keep the end tokens and sampling defaults of the model that was trained."""
    settings = local_folder(source) / "generation_config.json"
    if settings.exists():
        shutil.copy(settings, folder / settings.name)
