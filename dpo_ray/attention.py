"""Which token of a packed row sees which, and three ways to compute attention that keeps to it.

    flex   FlexAttention (arXiv:2412.05496): compiled kernels that pass over blocks where nothing is seen. For half
           precision on a GPU.
    spans  every prompt and every response by a call of its own, with the keys of its own path. For a CPU.
    mask   one additive mask over whole rows, for whatever attention the architecture came with.

All three apply one rule, `visible`. R rows, T tokens a row, H heads, D their width.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dpo_ray.data.batching import make_batch
from dpo_ray.pairs import PairBatch, PromptBranches

Kernel = Literal["flex", "spans", "mask"]

BLOCK = 128
"""Places on a side of the blocks that FlexAttention passes over or computes: its default."""

FLEX_CAPABILITY = (8, 0)
FLEX_HEAD_WIDTHS = range(16, 257)
"""GPUs and heads that FlexAttention is asked of: Ampere and later; narrower heads it cannot do, wider ones spill."""


FORWARD_ONLY = ("cpu", "mps")
"""Where FlexAttention has no backward."""


class Attention(NamedTuple):
    """How a model attends, and why so."""

    kernel: Kernel
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.reason})"


class Places(NamedTuple):
    """What the rule asks of tokens: integer tensors that broadcast against each other."""

    place: Tensor  # in the row
    segment: Tensor  # the prompt of the row that a token belongs to; of padding a number that no other place has
    branch: Tensor  # 0 in the prompt, k in the k-th response
    position: Tensor  # on the path from the prompt's start


def visible(query: Places, key: Places, window: int | Tensor | None) -> Tensor:
    """True where `query` sees `key`: what stands before it in its own prompt and its own branch, and itself.

    Windows go by positions: in a second branch their difference is less than that of the places. Padding sees itself
    alone, so that no softmax is over nothing.
    """
    seen = (query.segment == key.segment) & (query.place >= key.place)
    seen = seen & ((key.branch == 0) | (key.branch == query.branch))
    return seen if window is None else seen & (query.position - key.position < window)


def places_of(batch: PairBatch) -> Places:
    """Of every token of a batch: [R, T] int32 each."""
    place = torch.arange(batch.input_ids.shape[1], dtype=torch.int32, device=batch.input_ids.device)
    place = place.expand(batch.input_ids.shape)
    segment = torch.where(batch.segment_ids >= 0, batch.segment_ids, -1 - place)
    return Places(place, segment, batch.branch_ids, batch.position_ids.int())


def visible_pairs(places: Places, window: int | None) -> Tensor:
    """The rule between all tokens of a row: [..., T] -> [..., T, T] bool, the query before the key."""
    return visible(Places(*(x.unsqueeze(-1) for x in places)), Places(*(x.unsqueeze(-2) for x in places)), window)


def attention_inputs(batch: PairBatch, config: Any, kernel: Kernel, dtype: torch.dtype) -> dict[str, Any]:
    """What a decoder is given beside the tokens; masks are by layer type where an architecture has two.

    Masks are additive: Gemma 2 and GPT-OSS take boolean ones and compute something else.

    Args:
        config: The text configuration: windows, and which layers have them.
        dtype: Of the computation.
    """
    if not batch.is_branched:
        return {"attention_mask": (batch.segment_ids >= 0).long()}
    if kernel == "flex":
        return {"attention_mask": _for_layers(config, lambda window: block_mask(batch, window))}
    if kernel == "spans":
        return {
            "attention_mask": _for_layers(config, lambda window: _path_mask(batch, window, dtype)),
            "spans": spans_of(batch),
        }
    places = places_of(batch)
    return {"attention_mask": _for_layers(config, lambda window: _additive(visible_pairs(places, window), dtype))}


def _for_layers(config: Any, make: Callable[[int | None], Any]) -> Any:
    """`make(window)` for the layers of an architecture: one value, or one by layer type."""
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return make(None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return make(window)
    if "sliding_attention" not in layer_types:
        return make(None)
    return {"full_attention": make(None), "sliding_attention": make(window)}


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """[R, T, T] bool -> [R, 1, T, T], 0 where allowed."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


class Span(NamedTuple):
    """Neighbouring places of a batch's flattened rows: a prompt, a response, or padding."""

    length: int
    branch: int  # 0 a prompt, k its k-th response, -1 padding


def spans_of(batch: PairBatch) -> list[Span]:
    """The spans of all rows, one after another."""
    row = torch.arange(len(batch.segment_ids), dtype=torch.int32)[:, None].expand(batch.segment_ids.shape)
    branch = batch.branch_ids.where(batch.segment_ids >= 0, -1)
    codes = torch.stack((row, batch.segment_ids, branch)).flatten(1)
    runs, lengths = torch.unique_consecutive(codes, return_counts=True, dim=1)
    return [Span(*span) for span in zip(lengths.tolist(), runs[2].tolist(), strict=True)]


def _path_mask(batch: PairBatch, window: int | None, dtype: torch.dtype) -> Tensor:
    """The additive mask [1, 1, L, L] of one path as long as the longest; a span's is a part of it."""
    position = torch.arange(int(batch.position_ids.max()) + 1, dtype=torch.int32)[None]
    alone = torch.zeros_like(position)
    return _additive(visible_pairs(Places(position, alone, alone, position), window), dtype)


def spans_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    spans: list[Span],
    scaling: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, a span at a time: a response's keys are its prompt's and its own.

    Args:
        query: [R, H, T, D]; key and value may have fewer heads.
        attention_mask: [1, 1, L, L], of a path.

    Returns:
        [R, T, H, D], and no weights.
    """
    _refuse(others)
    rows = query.shape[0]
    lengths = [span.length for span in spans]
    parts = (torch.split(x.transpose(1, 2).flatten(0, 1), lengths) for x in (query, key, value))
    found = []
    for span, q, k, v in zip(spans, *parts, strict=True):  # [length, H, D] each
        if span.branch < 0:
            found.append(v.new_zeros(span.length, q.shape[1], v.shape[2]))
            continue
        if span.branch == 0:
            prompt = k, v
        else:
            k, v = torch.cat((prompt[0], k)), torch.cat((prompt[1], v))
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=attention_mask[:, :, len(k) - span.length : len(k), : len(k)],
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        found.append(attended[0].transpose(0, 1))
    out = torch.cat(found)
    return out.view(rows, -1, *out.shape[1:]), None


def block_mask(batch: PairBatch, window: int | None) -> BlockMask:
    """FlexAttention's mask of a batch: blocks where something is seen, those where all is, and the rule for the others.

    Found from the extremes of each block's numbers, in R (T / BLOCK)^2 steps, without a look at single pairs: a block
    may be called partly seen when nothing in it is, never the other way round.
    """
    places = places_of(batch)
    rows, width = batch.segment_ids.shape
    is_real = batch.segment_ids >= 0

    def in_blocks(values: Tensor, empty: int) -> Tensor:
        """[R, 1, blocks, BLOCK], with `empty` for padding."""
        return F.pad(values.where(is_real, empty), (0, -width % BLOCK), value=empty).view(rows, 1, -1, BLOCK)

    low = Places(*(in_blocks(x, torch.iinfo(torch.int32).max).amin(-1) for x in places))  # of keys: [R, 1, blocks]
    high = Places(*(in_blocks(x, -1).amax(-1) for x in places))
    whole = in_blocks(places.segment, -1).amin(-1) >= 0
    query_low, query_high = (Places(*(x.transpose(1, 2) for x in extremes)) for extremes in (low, high))

    block = torch.arange(low.place.shape[-1], device=is_real.device)
    before = block[:, None] > block
    same = (
        (low.segment == high.segment) & (query_low.segment == query_high.segment) & (low.segment == query_low.segment)
    )
    seen = before & (low.segment <= query_high.segment) & (query_low.segment <= high.segment)
    seen &= ~(same & (low.branch > 0) & (query_low.branch > high.branch))
    one_path = (query_low.branch == query_high.branch) & (high.branch == query_high.branch)
    one_path &= (low.branch == high.branch) | (high.branch == 1)  # a first response has its prompt just before it
    full = seen & same & ((high.branch == 0) | one_path) & whole & whole.transpose(1, 2)
    if window is not None:
        seen &= query_low.position - high.position < window
        full &= query_high.position - low.position < window
    partial = (seen & ~full) | torch.eye(len(block), dtype=torch.bool, device=is_real.device)

    # A tensor like the others: a captured number would be compiled in, or, as a symbol, break the CPU's code.
    bound = None if window is None else torch.tensor(window, dtype=torch.int32, device=is_real.device)

    def rule(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return visible(Places(*(x[row, query] for x in places)), Places(*(x[row, key] for x in places)), bound)

    return BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=rule, seq_lengths=(width, width)
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """[R, blocks, blocks] bool -> how many key blocks every query block has, and their numbers, those first."""
    order = blocks.int().argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None].contiguous()


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    """FlexAttention, compiled for rows of any length; again for a window, for gradients, and for more rows than one.

    Dynamo by itself gives up after eight of these, and would then compute every pair of tokens.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return torch.compile(flex_attention, dynamic=True)


def flex_row_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it, by FlexAttention. Arguments and result as of `spans_attention`.

    Args:
        softcap: Bound c of the scores, c tanh(score / c) (Gemma 2).
    """
    _refuse(others)

    out = _compiled_flex()(
        query,
        key,
        value,
        score_mod=None if softcap is None else _cap(softcap),
        block_mask=attention_mask,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out.transpose(1, 2).contiguous(), None


def _cap(bound: float) -> Callable[..., Tensor]:
    def capped(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return bound * torch.tanh(score / bound)

    return capped


def _refuse(arguments: dict[str, Any]) -> None:
    """What changes the scores and is not computed here."""
    for name in ("s_aux", "position_bias", "softcap"):
        if arguments.get(name) is not None:
            raise ValueError(f"attention with `{name}`")
    if arguments.get("dropout"):
        raise ValueError("attention with dropout")


IMPLEMENTATIONS: dict[Kernel, Callable[..., tuple[Tensor, None]]] = {
    "flex": flex_row_attention,
    "spans": spans_attention,
}


def set_kernel(model: Any, kernel: Kernel, own: str) -> None:
    """Make a transformers model attend by `kernel`; by its own implementation, named `own`, for masks.

    Raises:
        ValueError: The architecture attends in its own code.
    """
    from transformers import AttentionInterface

    name = own
    if kernel in IMPLEMENTATIONS:
        name = f"dpo_ray_{kernel}"
        AttentionInterface.register(name, IMPLEMENTATIONS[kernel])
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise ValueError("attention in the architecture's own code")


def choose_attention(model: Any, device: torch.device, dtype: torch.dtype) -> Attention:
    """The fastest attention for packed rows that a device and an architecture can do.

    Whether the model then gives the right numbers is asked by `models.usable_layout`.

    Args:
        model: A causal language model of transformers.
    """
    config = model.config.get_text_config()
    if any(name.endswith("sinks") for name, _ in model.named_parameters()):
        return Attention("mask", "attention sinks")
    softcap = getattr(config, "attn_logit_softcapping", None)
    if device.type == "cpu":
        if softcap is not None:
            return Attention("mask", "capped scores")
        return Attention("spans", "CPU")
    if device.type != "cuda":
        return Attention("mask", device.type)
    if dtype not in (torch.bfloat16, torch.float16):
        return Attention("mask", "full precision")
    if torch.cuda.get_device_capability(device) < FLEX_CAPABILITY:
        return Attention("mask", f"{torch.cuda.get_device_name(device)} is older than FlexAttention's kernels")
    if not model._supports_flex_attn:
        return Attention("mask", f"{type(model).__name__} does not support FlexAttention")
    heads = config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if head_width not in FLEX_HEAD_WIDTHS:
        return Attention("mask", f"heads of width {head_width}")
    trouble = flex_trouble(heads, getattr(config, "num_key_value_heads", None) or heads, head_width, device, dtype)
    if trouble is not None:
        return Attention("mask", f"FlexAttention failed its check: {trouble}")
    return Attention("flex", torch.cuda.get_device_name(device))


def flex_trouble(heads: int, key_heads: int, head_width: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with FlexAttention on a device, or None: its output and gradients beside a masked attention's.

    Some ragged items of several blocks, once with a window.
    """
    lengths = [(150, (100, 41)), (1, (2, 70)), (60, (130, 1, 9))]
    items = [
        PromptBranches(np.zeros(prompt, np.int32), tuple(np.zeros(n, np.int32) for n in responses))
        for prompt, responses in lengths
    ]
    batch = make_batch(items, [[0, 1, 2]], "branches").to(device)
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, count, batch.input_ids.shape[1], head_width) for count in (heads, key_heads, key_heads, heads)]
    *inputs, weights = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    asks_gradient = device.type not in FORWARD_ONLY

    @torch.enable_grad()
    def results(attend: Callable[..., Tensor], values: list[Tensor]) -> list[Tensor]:
        values = [value.detach().requires_grad_(asks_gradient) for value in values]
        out = attend(*values)
        gradients = torch.autograd.grad((out * weights.to(out.dtype)).sum(), values) if asks_gradient else ()
        return [out.detach(), *gradients]

    for window in (None, 50):
        allowed = visible_pairs(places_of(batch), window)[:, None]

        def masked(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor = allowed) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=heads != key_heads)

        def flex(q: Tensor, k: Tensor, v: Tensor, window: int | None = window) -> Tensor:
            return flex_row_attention(None, q, k, v, block_mask(batch, window))[0].transpose(1, 2)

        expected = results(masked, [value.float() for value in inputs])
        try:
            found = results(flex, list(inputs))
        except Exception as error:  # a compiler fails in ways of its own
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for name, want, got in zip(("output", "d query", "d key", "d value"), expected, found, strict=False):
            apart = float((got.float() - want).norm() / want.norm())
            if not apart < FLEX_TOLERANCE[dtype]:
                return f"{name} is {apart:.2g} apart"
    return None


FLEX_TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest relative difference (of norms) of a right kernel: some roundings of each type."""
