"""An ensemble of small reward heads on frozen hidden states: how much trained models of one set of labels may differ.

Pure torch: no model, no file, no Ray. The states come from a policy that is not trained here; the margins go to
`scores.bald` and `scores.bal_pm`. L is the number of labelled pairs, N of candidates, E of members, D the width of
hidden states, H of a head's hidden layer.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dpo_ray.config import EnsembleConfig

States = Tensor | NDArray[np.floating]
_ROWS = 4096
"""Pairs that are in float64 at once."""

Parameters = tuple[Tensor, ...]
"""Of E heads: output [E, H, 1], hidden layer [E, D, H] and bias [E, 1, H]; of linear heads only the output [E, D, 1].

All start standard normal and a layer is divided by the root of its inputs, so that an untrained head's rewards are of
order 1 at any D and H, and a `pull` means the same everywhere."""


def ensemble_margins(labelled: States, pool: States, config: EnsembleConfig, seed: int) -> NDArray[np.float64]:
    """Margins of the candidates by each member of an ensemble that is trained on the labelled pairs.

    Every member starts at random and minimises, full-batch by AdamW at a rate that falls to 0,

        (sum_i c_i softplus(-margin_i) + pull * |theta - theta_start|^2) / L

    with c_i how often pair i is in the member's own bootstrap resample: the Bradley-Terry loss, and the pull of Liu et
    al. 2024 (SEA, arXiv:2411.01493), which keeps members apart where no label is. With 1/2 it is a standard normal
    prior around each member's start (Pearce et al. 2020, arXiv:1810.05546), which many labels outweigh.

    Args:
        labelled: [L, 2, D], hidden states of the labelled pairs, the chosen response first. Their order decides who is
            in which resample.
        pool: [N, 2, D], of the candidates, in any order. Both are standardised by their common mean and deviation.
        config: `members`, `width`, `steps`, `learning_rate`, `pull`.
        seed: Of starts and resamples; a member's do not depend on how many members there are.

    Returns:
        [N, E], in logits. All 0 where there is no label: heads at random would only look like disagreement.
    """
    known, candidates = torch.as_tensor(labelled).cpu(), torch.as_tensor(pool).cpu()
    if len(known) == 0:
        return np.zeros((len(candidates), config.members))
    mean, deviation = _statistics(known, candidates)
    starts, counts = zip(
        *(_start(known.shape[2], len(known), config.width, seed, member) for member in range(config.members)),
        strict=True,
    )
    start = tuple(torch.stack(parts) for parts in zip(*starts, strict=True))
    heads = fitted(start, (known.double() - mean) / deviation, torch.stack(counts), config)
    found = torch.cat([margins(heads, (block - mean) / deviation) for block in _blocks(candidates)], dim=1)
    return found.T.contiguous().numpy()


def fitted(start: Parameters, pairs: Tensor, counts: Tensor, config: EnsembleConfig) -> Parameters:
    """All members trained at once from their starts.

    Args:
        pairs: [L, 2, D], standardised, the chosen response first.
        counts: [E, L], how often a member sees each.
    """
    heads = tuple(part.clone().requires_grad_() for part in start)
    optimizer = torch.optim.AdamW(heads, lr=config.learning_rate, weight_decay=0.0)
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - step / config.steps)
        # Members share no parameter: the gradient of the sum is each one's own.
        loss = member_losses(heads, start, pairs, counts, config.pull).sum()
        for part, gradient in zip(heads, torch.autograd.grad(loss, heads), strict=True):
            part.grad = gradient
        optimizer.step()
    return tuple(part.detach() for part in heads)


def member_losses(heads: Parameters, start: Parameters, pairs: Tensor, counts: Tensor, pull: float) -> Tensor:
    """[E], what each member minimises; see `ensemble_margins`."""
    misfit = (counts * F.softplus(-margins(heads, pairs))).sum(1)
    moved = sum((now - before).square().sum((1, 2)) for now, before in zip(heads, start, strict=True))
    return (misfit + pull * moved) / len(pairs)


def margins(heads: Parameters, pairs: Tensor) -> Tensor:
    """[E, n], reward of the first response less that of the second, in logits, of pairs [n, 2, D]; the exact negative
    when the two are swapped."""
    return rewards(heads, pairs[:, 0]) - rewards(heads, pairs[:, 1])


def rewards(heads: Parameters, states: Tensor) -> Tensor:
    """[E, n], in logits, of states [n, D]."""
    output, *layer = heads
    inputs, scale = states, 1.0
    if layer:
        hidden, bias = layer
        inputs = F.relu(states @ hidden / math.sqrt(states.shape[1]) + bias)
        scale = math.sqrt(2)  # a rectified standard normal number has mean square 1/2
    return (inputs @ output).squeeze(-1) * (scale / math.sqrt(output.shape[1]))


def _blocks(pairs: Tensor) -> Iterator[Tensor]:
    """So many pairs at a time, in float64."""
    return (pairs[first : first + _ROWS].double() for first in range(0, len(pairs), _ROWS))


def _statistics(*tables: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each feature, [D], over both responses of all pairs [n, 2, D] of some tables.

    The two of a pair are added first, so that nothing changes when they are swapped. A feature that is the same
    everywhere has no deviation, infinite here: it becomes 0 and not amplified rounding.
    """
    size = 2 * sum(len(table) for table in tables)
    mean = torch.stack([block.sum(1).sum(0) for table in tables for block in _blocks(table)]).sum(0) / size
    squares = [(block - mean).square().sum(1).sum(0) for table in tables for block in _blocks(table)]
    deviation = (torch.stack(squares).sum(0) / size).sqrt()
    return mean, torch.where(deviation > 1e-9 * mean.abs(), deviation, math.inf)


def _start(size: int, num_labelled: int, width: int, seed: int, member: int) -> tuple[Parameters, Tensor]:
    """A member's random start, and how often each labelled pair is in its resample [L]."""
    state = int(np.random.SeedSequence([seed, member]).generate_state(1, np.uint64)[0] >> 1)
    generator = torch.Generator().manual_seed(state)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    heads = (normal(width, 1), normal(size, width), normal(1, width)) if width else (normal(size, 1),)
    drawn = torch.randint(num_labelled, (num_labelled,), generator=generator)
    return heads, torch.bincount(drawn, minlength=num_labelled).to(torch.float64)
