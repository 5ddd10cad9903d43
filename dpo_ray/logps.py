"""Hidden states -> log-probs of given tokens, without ever holding [tokens, vocabulary].

Pure functions of tensors. N response tokens, D hidden width, V vocabulary, S responses.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Most logits alive at once, by device (32 MiB and 512 MiB in fp32): chunks have CHUNK_LOGITS // V tokens."""


class TokenLogps(NamedTuple):
    """What the next-token distributions say, in nats; float32 (float64 for float64 input)."""

    logps: Tensor  # [N], log p(target), with gradient
    entropy: Tensor  # [N], without
    log_collision: Tensor  # [N], log sum over v of p(v)^2, without


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> TokenLogps:
    """log p(target) at each position, with the entropy and the collision probability of its distribution.

    logits = scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) where the architecture has it.
    Forward keeps one log-sum-exp a token; backward computes the logits of a chunk again (the memory of two chunks,
    one matrix product more).

    Args:
        hidden: [N, D], the outputs at the positions that predict the targets.
        weight: [V, D], the output layer.
        target_ids: [N] int64.
        bias: [V] or None.
        chunk_tokens: Tokens whose logits are held at once; None: by `CHUNK_LOGITS`.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS.get(weight.device.type, 2**23) // weight.shape[0])
    return TokenLogps(*_ChunkedHead.apply(hidden, weight, bias, target_ids, scale, softcap, chunk_tokens))  # type: ignore[no-untyped-call]


def sum_by_response(values: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """Sum of `values` [N] over the tokens of each response: [S]. In float64, so that packing does not change sums."""
    sums = torch.zeros(num_responses, dtype=torch.float64, device=values.device)
    return sums.index_add(0, response_index, values.double())


def tail_sums(token_logps: Tensor, response_index: Tensor, num_tokens: Tensor) -> Tensor:
    """Of each response of a pair, the summed log-prob beyond the length of the pair's shorter one: [S].

    Args:
        token_logps: [N], the tokens of each response in their order.
        response_index: [N] int64, in rising order; responses 2 i and 2 i + 1 are a pair.
        num_tokens: [S], lengths of the responses.
    """
    lengths = num_tokens.long()
    place = torch.arange(len(token_logps), device=token_logps.device) - (lengths.cumsum(0) - lengths)[response_index]
    shorter = lengths.view(-1, 2).min(1).values.repeat_interleave(2)
    return sum_by_response(token_logps * (place >= shorter[response_index]), response_index, len(lengths))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[n, V] of one chunk, in float32 (float64 for float64 input)."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _ChunkedHead(torch.autograd.Function):
    """The chunked head. One class for all architectures, so that training, reference and scoring share every bit."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target_ids: Tensor,
        scale: float,
        softcap: float | None,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy, log_collision, log_norm = (torch.empty_like(logps) for _ in range(3))
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, bias, scale, softcap)
            log_norm[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, target_ids[part, None])[:, 0] - log_norm[part]
            probs = (logits - log_norm[part, None]).exp_()
            entropy[part] = log_norm[part] - torch.linalg.vecdot(probs, logits)
            log_collision[part] = torch.linalg.vecdot(probs, probs).log()
        ctx.save_for_backward(hidden, weight, bias, target_ids, log_norm)
        ctx.scale, ctx.softcap, ctx.chunk_tokens = scale, softcap, chunk_tokens
        ctx.mark_non_differentiable(entropy, log_collision)
        return logps, entropy, log_collision

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, *_unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target_ids, log_norm = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        # In float32: a sum of many chunks in bfloat16 would lose more with every chunk.
        grad_weight = torch.zeros_like(weight, dtype=log_norm.dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=log_norm.dtype) if bias is not None and need_bias else None
        for start in range(0, len(hidden), ctx.chunk_tokens):
            part = slice(start, start + ctx.chunk_tokens)
            logits = _logits(hidden[part], weight, bias, ctx.scale, ctx.softcap)
            capped = None if ctx.softcap is None else 1 - (logits / ctx.softcap) ** 2
            # d log p(target) / d logits = onehot(target) - softmax
            grad = (logits - log_norm[part, None]).exp_().neg_()
            grad.scatter_add_(-1, target_ids[part, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grad_logps[part, None])
            if capped is not None:
                grad.mul_(capped)
            if ctx.scale != 1.0:
                grad.mul_(ctx.scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight
            if grad_weight is not None and grad_weight.dtype == grad.dtype:
                grad_weight.addmm_(grad.T, hidden[part])
            elif grad_weight is not None:
                grad_weight += grad.T @ hidden[part]
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )
