"""Hidden states -> log-probs of given tokens, without ever holding [tokens, vocabulary].

Pure functions of tensors. N response tokens, D hidden width, V vocabulary, S responses.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**27}
"""Most logits alive at once, by device (32 MiB and 512 MiB in fp32): chunks have CHUNK_LOGITS // V tokens."""


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """log p(target) and the entropy of the next-token distribution at each position.

    logits = scale * (hidden @ weight.T + bias), then softcap * tanh(logits / softcap) where the architecture has it.
    Forward keeps one log-sum-exp a token; backward computes the logits of a chunk again (the memory of two chunks,
    one matrix product more).

    Args:
        hidden: [N, D], the outputs at the positions that predict the targets.
        weight: [V, D], the output layer.
        target_ids: [N] int64.
        bias: [V] or None.
        chunk_tokens: Tokens whose logits are held at once; None: by `CHUNK_LOGITS`.

    Returns:
        logps [N] in nats, float32 (float64 for float64 input), with gradient; entropy [N] in nats, without.
    """
    if chunk_tokens is None:
        chunk_tokens = max(1, CHUNK_LOGITS.get(weight.device.type, 2**23) // weight.shape[0])
    logps, entropy = _TokenLogps.apply(hidden, weight, bias, target_ids, scale, softcap, chunk_tokens)  # type: ignore[no-untyped-call]
    return logps, entropy


def sum_by_response(values: Tensor, response_index: Tensor, num_responses: int) -> Tensor:
    """Sum of `values` [N] over the tokens of each response: [S]. In float64, so that packing does not change sums."""
    sums = torch.zeros(num_responses, dtype=torch.float64, device=values.device)
    return sums.index_add(0, response_index, values.double())


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    """[n, V] of one chunk, in float32 (float64 for float64 input)."""
    logits = hidden @ weight.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if bias is not None:
        logits = logits + bias
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


class _TokenLogps(torch.autograd.Function):
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
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=dtype, device=hidden.device)
        entropy, log_norm = torch.empty_like(logps), torch.empty_like(logps)
        for start in range(0, len(hidden), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            logits = _logits(hidden[part], weight, bias, scale, softcap)
            log_norm[part] = logits.logsumexp(-1)
            logps[part] = logits.gather(-1, target_ids[part, None])[:, 0] - log_norm[part]
            probs = (logits - log_norm[part, None]).exp_()
            entropy[part] = log_norm[part] - torch.linalg.vecdot(probs, logits)
        ctx.save_for_backward(hidden, weight, bias, target_ids, log_norm)
        ctx.scale, ctx.softcap, ctx.chunk_tokens = scale, softcap, chunk_tokens
        ctx.mark_non_differentiable(entropy)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, grad_logps: Tensor, _grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
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
