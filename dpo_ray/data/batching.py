"""Which pairs share a step, a row and a device; and the tensors of a micro-batch.

Everything follows from lengths, a seed and the number of workers, so all ranks make the same plan without talking, and
make the same number of forward passes. What is in a step does not depend on the workers or the token budget.
"""

import bisect
import heapq
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from dpo_ray.pairs import PairBatch, PromptBranches, TokenizedPair

Layout = Literal["branches", "one_row", "padded"]
"""`branches`: prompt once, both responses behind it, in rows of several pairs. `one_row`: the same with the whole
micro-batch in one row, for attention that does no work between pairs. `padded`: every response in a row of its own."""

Row = list[int]
"""Items that share a row, by their number in the step."""


class Lengths(NamedTuple):
    """Token counts of a prompt and the responses behind it."""

    prompt: int
    responses: tuple[int, ...]

    @property
    def branched(self) -> int:
        """Places of the item in the branches layout. A response's last token predicts nothing, so it is not fed."""
        return self.prompt + sum(n - 1 for n in self.responses)

    @property
    def padded(self) -> int:
        """Places of one of the item's rows in the padded layout."""
        return self.prompt + max(self.responses) - 1

    @property
    def attended(self) -> int:
        """Pairs of tokens of which one sees the other, itself included, the prompt's once."""
        fed = [n - 1 for n in self.responses]
        return self.prompt * (self.prompt + 1) // 2 + sum(n * self.prompt + n * (n + 1) // 2 for n in fed)


def lengths_of(pair: TokenizedPair) -> Lengths:
    return Lengths(len(pair.prompt_ids), (len(pair.chosen_ids), len(pair.rejected_ids)))


class MicroBatch(NamedTuple):
    """What one rank computes in one forward pass."""

    items: list[int]  # numbers in the step, in the order of the batch's responses
    rows: list[Row]  # the same items by row
    counts: bool  # False: fills the rank's quota of passes, with weight 0


class StepOrder:
    """The pairs of every step: epochs of seeded permutations, one after another, cut into `pairs_per_step`.

    A pure function of its arguments, so a resumed run, and any number of workers, sees the same steps.
    """

    def __init__(self, num_pairs: int, pairs_per_step: int, *, seed: int, epochs: float, max_steps: int | None) -> None:
        total = math.ceil(num_pairs * epochs - 1e-9) if max_steps is None else max_steps * pairs_per_step
        self.num_steps = math.ceil(total / pairs_per_step)
        self._total, self._num_pairs, self._pairs_per_step, self._seed = total, num_pairs, pairs_per_step, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def pairs_of(self, step: int) -> list[int]:
        """Numbers of the pairs behind step `step` (from 1). The last step of a run may have fewer."""
        first = (step - 1) * self._pairs_per_step
        return [self._pair_at(i) for i in range(first, min(first + self._pairs_per_step, self._total))]

    def pairs_before(self, step: int) -> int:
        """Pairs seen when step `step` is done."""
        return min(step * self._pairs_per_step, self._total)

    def epoch_at(self, step: int) -> float:
        """Passes over the data when step `step` is done."""
        return self.pairs_before(step) / self._num_pairs

    def _pair_at(self, place: int) -> int:
        epoch, within = divmod(place, self._num_pairs)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._num_pairs)
        return int(self._order[within])


ROW_WIDTHS = (0.5, 0.75, 1.0, 1.25)
"""Widths of rows that a plan tries, in `row_tokens`."""


def plan_step(
    lengths: Sequence[Lengths], *, num_workers: int, tokens_per_device: int, row_tokens: int, layout: Layout
) -> list[list[MicroBatch]]:
    """Micro-batches of a step: `plan[m][rank]`; every rank has as many.

    Rows are packed by best-fit decreasing and levelled; rows of like width share a micro-batch, and micro-batches of
    like cost run at the same time, so that little is padding and ranks that wait for each other have about the same
    work. Of some row widths, the cheapest is taken; in one row nothing is padding. No micro-batch has more than
    `tokens_per_device` places.

    Raises:
        ValueError: One item alone is larger than `tokens_per_device`.
    """
    if layout == "one_row":
        return _plan_single_rows([item.branched for item in lengths], num_workers, tokens_per_device)
    if layout == "branches":
        sizes = [item.branched for item in lengths]
        share = math.ceil(sum(sizes) / num_workers)  # wider rows would leave a worker without one
        widths = {
            min(math.ceil(row_tokens * factor), tokens_per_device, most)
            for factor in ROW_WIDTHS
            for most in (share, math.ceil(share / 2))
        }
        candidates = [
            [_Unit(sum(sizes[i] for i in row), 1, row) for row in level_rows(pack_rows(sizes, width), sizes)]
            for width in sorted(widths)
        ]
    else:
        candidates = [[_Unit(item.padded, len(item.responses), [i]) for i, item in enumerate(lengths)]]
    plans = [_arrange(units, num_workers, tokens_per_device) for units in candidates]
    best = min(plans, key=lambda plan: sum(max(map(_cost, beside)) for beside in plan))
    filler = min(range(len(lengths)), key=lambda i: (lengths[i].branched, i))
    return [[_micro_batch(units, filler) for units in beside] for beside in best]


def _plan_single_rows(sizes: Sequence[int], num_workers: int, tokens_per_device: int) -> list[list[MicroBatch]]:
    """Items, costliest first, each to the micro-batch with the least work so far; as few passes as the budget lets."""
    by_cost = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
    _require_fit(by_cost[0], sizes[by_cost[0]], tokens_per_device)
    passes = max(1, math.ceil(sum(sizes) / (tokens_per_device * num_workers)))
    while True:
        rows: list[Row] = [[] for _ in range(passes * num_workers)]
        filled = [(0.0, 0, r) for r in range(len(rows))]  # (work, places, row), a heap
        for item in by_cost:
            work, places, r = filled[0]
            heapq.heapreplace(filled, (work + _row_cost(sizes[item]), places + sizes[item], r))
            rows[r].append(item)
        if max(places for _, places, _ in filled) <= tokens_per_device:
            break
        passes += 1
    filler = by_cost[-1]
    order = [r for _, _, r in sorted(filled, reverse=True)]
    micro_batches = [MicroBatch(rows[r] or [filler], [rows[r] or [filler]], counts=bool(rows[r])) for r in order]
    return [micro_batches[m * num_workers : (m + 1) * num_workers][:: -1 if m % 2 else 1] for m in range(passes)]


def _require_fit(item: int, places: int, tokens_per_device: int) -> None:
    if places > tokens_per_device:
        raise ValueError(f"item {item} has {places} tokens, more than tokens_per_device {tokens_per_device}")


def pack_rows(sizes: Sequence[int], capacity: int) -> list[Row]:
    """Best-fit decreasing: items into rows of at most `capacity`; a larger item has a row of its own."""
    rows: list[Row] = []
    free: list[tuple[int, int]] = []  # (space left, row), sorted
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        fit = bisect.bisect_left(free, (sizes[item], -1))
        if fit == len(free):
            rows.append([item])
            left, row = capacity - sizes[item], len(rows) - 1
        else:
            left, row = free.pop(fit)
            rows[row].append(item)
            left -= sizes[item]
        if left > 0:
            bisect.insort(free, (left, row))
    return rows


def level_rows(rows: Sequence[Row], sizes: Sequence[int]) -> list[Row]:
    """The same items in as many rows: items of wide rows go to narrow ones, or change places with smaller items there,
    while that makes the wider of the two narrower.

    Rows that share a micro-batch are padded to the widest: best-fit decreasing alone leaves its last row half empty.
    """
    rows = [list(row) for row in rows]
    by_width = sorted((sum(sizes[i] for i in row), r) for r, row in enumerate(rows))
    while by_width:
        wide_width, wide = by_width.pop()
        moves = []
        for place, (width, narrow) in enumerate(by_width[:NARROW_ROWS]):
            for item in rows[wide]:
                for other in (None, *rows[narrow]):
                    moved = sizes[item] - (0 if other is None else sizes[other])
                    if 0 < moved < wide_width - width:
                        moves.append((max(wide_width - moved, width + moved), place, item, other))
        if not moves:
            continue
        _, place, item, other = min(moves, key=lambda move: move[:3])
        _, narrow = by_width.pop(place)
        rows[wide].remove(item)
        rows[narrow].append(item)
        if other is not None:
            rows[narrow].remove(other)
            rows[wide].append(other)
        for row in (wide, narrow):
            bisect.insort(by_width, (sum(sizes[i] for i in rows[row]), row))
    return [row for row in rows if row]


NARROW_ROWS = 8
"""How many of the narrowest rows a wide one looks at: enough to find a good exchange, few enough for long lists."""


class _Unit(NamedTuple):
    """What is not divided: a row, or the rows of an item."""

    width: int
    height: int
    items: Row


def _arrange(units: list[_Unit], num_workers: int, tokens_per_device: int) -> list[list[list[_Unit]]]:
    """Units into bins, `plan[m][rank]`: as few passes as the budget allows."""
    units = sorted(units, key=lambda unit: (-unit.width, unit.items))
    for unit in units:
        _require_fit(unit.items[0], unit.width * unit.height, tokens_per_device)
    places = sum(unit.width * unit.height for unit in units)
    passes = max(1, math.ceil(places / (tokens_per_device * num_workers)))
    while (bins := _partition(units, passes * num_workers, tokens_per_device)) is None:
        passes += 1
    bins.sort(key=_cost, reverse=True)
    # Neighbours in cost run at the same time; the order turns so that no rank always gets the larger one.
    return [bins[m * num_workers : (m + 1) * num_workers][:: -1 if m % 2 else 1] for m in range(passes)]


def _partition(units: Sequence[_Unit], num_bins: int, tokens_per_device: int) -> list[list[_Unit]] | None:
    """Units, widest first, cut into bins of neighbours whose largest cost is least; None if they are too few.

    A bin is as wide as its first unit. Whether a limit on the cost can be kept is seen by filling one bin after
    another; the least such limit is found by bisection.
    """

    def filled(limit: float) -> list[list[_Unit]]:
        bins: list[list[_Unit]] = []
        height = 0
        for unit in units:
            height += unit.height
            width = bins[-1][0].width if bins else 0
            if not bins or width * height > tokens_per_device or _row_cost(width) * height > limit:
                bins.append([])
                height = unit.height
            bins[-1].append(unit)
        return bins

    high = sum(_row_cost(unit.width) * unit.height for unit in units) + 1.0
    low = high / (num_bins + 1)
    if len(filled(math.inf)) > num_bins:
        return None
    high = max(high, max(_cost(bin_) for bin_ in filled(math.inf)))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if len(filled(middle)) <= num_bins:
            high = middle
        else:
            low = middle
    bins = filled(high)
    return bins + [[] for _ in range(num_bins - len(bins))]


BISECTIONS = 20
"""Halvings of the cost limit: to a millionth."""


def _cost(units: Sequence[_Unit]) -> float:
    """Work of a bin, padding included."""
    return _row_cost(units[0].width) * sum(unit.height for unit in units) if units else 0.0


def _row_cost(width: int) -> float:
    """Work of a row: linear in tokens, and attention's square, which doubles it at some 8,000 tokens."""
    return width + width * width / 8192


def _micro_batch(units: Sequence[_Unit], filler: int) -> MicroBatch:
    rows = [unit.items for unit in units] or [[filler]]
    return MicroBatch([i for row in rows for i in row], rows, counts=bool(units))


def make_batch(items: Sequence[PromptBranches], rows: Sequence[Row], layout: Layout) -> PairBatch:
    """Tensors of a micro-batch; responses are numbered in the order of `rows`, each item's in its own order.

    `branches`, `one_row`: `[prompt | response 1 | response 2 | ...]` per item, items one after another in a row.
    `padded`: each response in a row of its own behind a copy of its prompt.
    """
    spans: list[list[_Span]] = []
    for row in rows:
        branches = [items[i] for i in row]
        if layout != "padded":
            spans.append([_Span(item.prompt_ids, item.responses) for item in branches])
        else:
            spans += [[_Span(item.prompt_ids, (response,))] for item in branches for response in item.responses]
    width = max(sum(span.places for span in row) for row in spans)

    input_ids = np.zeros((len(spans), width), np.int64)
    position_ids = np.zeros((len(spans), width), np.int64)
    segment_ids = np.full((len(spans), width), -1, np.int32)
    branch_ids = np.zeros((len(spans), width), np.int32)
    predict, targets, owners = [], [], []
    num_responses = 0
    for r, spans_of_row in enumerate(spans):
        at = 0
        for segment, span in enumerate(spans_of_row):
            length = len(span.prompt_ids)
            input_ids[r, at : at + length] = span.prompt_ids
            position_ids[r, at : at + length] = np.arange(length)
            segment_ids[r, at : at + span.places] = segment
            prompt_end = r * width + at + length - 1
            at += length
            for branch, response in enumerate(span.responses, start=1):
                fed = len(response) - 1
                input_ids[r, at : at + fed] = response[:-1]
                position_ids[r, at : at + fed] = np.arange(length, length + fed)
                branch_ids[r, at : at + fed] = branch
                # The prompt's last token predicts the first token of every response; then each token the next.
                predict.append(np.concatenate(([prompt_end], r * width + at + np.arange(fed))))
                targets.append(response)
                owners.append(np.full(len(response), num_responses))
                num_responses += 1
                at += fed
    chosen = [items[i] for row in rows for i in row]
    return PairBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        segment_ids=torch.from_numpy(segment_ids),
        branch_ids=torch.from_numpy(branch_ids),
        predict_index=torch.from_numpy(np.concatenate(predict).astype(np.int64)),
        target_ids=torch.from_numpy(np.concatenate(targets).astype(np.int64)),
        response_index=torch.from_numpy(np.concatenate(owners).astype(np.int64)),
        num_responses=num_responses,
        num_tokens=sum(len(item.prompt_ids) + sum(map(len, item.responses)) for item in chosen),
        num_filled=int((segment_ids >= 0).sum()),
        is_branched=layout != "padded",
    )


class _Span(NamedTuple):
    """A prompt with the responses that share its row."""

    prompt_ids: np.ndarray
    responses: tuple[np.ndarray, ...]

    @property
    def places(self) -> int:
        return len(self.prompt_ids) + sum(len(response) - 1 for response in self.responses)
