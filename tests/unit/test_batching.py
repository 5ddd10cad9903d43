"""The plan of a step by its promises (nothing lost, nothing too large, no rank waits), and the tensors of a batch."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.config import parse_run
from dpo_ray.data.batching import (
    Layout,
    Lengths,
    StepOrder,
    lengths_of,
    level_rows,
    make_batch,
    pack_rows,
    plan_step,
)
from dpo_ray.pairs import PairBatch, PromptBranches
from dpo_ray.prepare import prepare, resolve

LAYOUTS: tuple[Layout, ...] = ("branches", "one_row", "padded")

lengths_of_steps = st.lists(
    st.builds(Lengths, st.integers(1, 40), st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)),
    min_size=1,
    max_size=20,
)


def items_of(lengths: list[Lengths]) -> list[PromptBranches]:
    """Items of given lengths; every token of every item is another number."""
    counter = iter(range(1, 100_000))

    def ids(length: int) -> Any:
        return np.array([next(counter) for _ in range(length)], np.int32)

    return [PromptBranches(ids(item.prompt), tuple(ids(n) for n in item.responses)) for item in lengths]


def places(item: Lengths, layout: Layout) -> int:
    """Places that an item takes alone; a response's last token is never fed."""
    fed = [n - 1 for n in item.responses]
    return item.prompt + sum(fed) if layout != "padded" else len(fed) * (item.prompt + max(fed))


@given(
    lengths=lengths_of_steps,
    num_workers=st.integers(1, 5),
    spare=st.integers(0, 400),
    row_tokens=st.integers(2, 200),
    layout=st.sampled_from(LAYOUTS),
)
@settings(max_examples=150, deadline=None)
def test_a_plan_keeps_its_promises(
    lengths: list[Lengths], num_workers: int, spare: int, row_tokens: int, layout: Layout
):
    tokens_per_device = max(places(item, layout) for item in lengths) + spare
    row_tokens = min(row_tokens, tokens_per_device)
    options: dict[str, Any] = {
        "num_workers": num_workers,
        "tokens_per_device": tokens_per_device,
        "row_tokens": row_tokens,
        "layout": layout,
    }
    plan = plan_step(lengths, **options)
    items = items_of(lengths)

    assert plan == plan_step(lengths, **options), "the same plan on every rank"
    assert {len(passes) for passes in plan} == {num_workers}, "every rank makes every pass"
    micro_batches = [micro_batch for passes in plan for micro_batch in passes]
    counted = Counter(i for micro_batch in micro_batches if micro_batch.counts for i in micro_batch.items)
    assert counted == Counter(range(len(lengths))), "every item once"
    for micro_batch in micro_batches:
        assert micro_batch.items == [i for row in micro_batch.rows for i in row]
        assert micro_batch.items, "no pass is empty"
        batch = make_batch(items, micro_batch.rows, layout)
        assert batch.num_slots <= tokens_per_device
        if layout == "one_row":
            assert len(batch.input_ids) == 1
            assert batch.num_filled == batch.num_slots, "nothing is padding"
    assert any(micro_batch.counts for micro_batch in plan[-1]), "no pass is made for nothing"


@given(lengths=lengths_of_steps, layout=st.sampled_from(LAYOUTS))
@settings(max_examples=30, deadline=None)
def test_workers_without_an_item_compute_the_smallest_one_and_do_not_count_it(lengths: list[Lengths], layout: Layout):
    num_workers = len(lengths) + 3
    (passes,) = plan_step(lengths, num_workers=num_workers, tokens_per_device=1000, row_tokens=500, layout=layout)
    assert len(passes) == num_workers
    assert sum(not micro_batch.counts for micro_batch in passes) >= 3
    smallest = min(places(item, "branches") for item in lengths)
    for micro_batch in passes:
        if not micro_batch.counts:
            (item,) = micro_batch.items
            assert places(lengths[item], "branches") == smallest, "a filler costs as little as possible"


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), capacity=st.integers(50, 150))
def test_levelled_rows_hold_the_same_and_none_is_wider_than_before(sizes: list[int], capacity: int):
    packed = pack_rows(sizes, capacity)
    levelled = level_rows(packed, sizes)
    assert sorted(i for row in levelled for i in row) == list(range(len(sizes)))
    assert len(levelled) == len(packed)
    widths = [[sum(sizes[i] for i in row) for row in rows] for rows in (packed, levelled)]
    assert max(widths[1]) <= max(widths[0])
    assert sum(w * w for w in widths[1]) <= sum(w * w for w in widths[0])


def test_levelling_moves_and_exchanges_items():
    sizes = [6, 5, 4, 3, 1]
    assert [sorted(row) for row in level_rows([[0, 1, 4], [2, 3]], sizes)] == [[1, 2, 4], [0, 3]], "6 for 3: 10 and 9"
    assert sorted(map(len, level_rows([[0, 1, 2], [3]], [2, 2, 2, 2]))) == [2, 2]
    assert level_rows([[0], [1], [2]], [9, 1, 1]) == [[0], [1], [2]], "a row of one item cannot be narrower"


@pytest.mark.parametrize(("num_workers", "tokens_per_device"), [(1, 2048), (1, 8192), (2, 8192), (8, 8192)])
def test_little_of_a_step_of_real_pairs_is_padding(
    shared: Path, tmp_path: Path, num_workers: int, tokens_per_device: int
):
    """HH-RLHF, 64 pairs a step."""
    data = {"sources": [{"path": str(shared / "data/hh_rlhf/helpful-base.test.jsonl.gz")}], "max_tokens": 512}
    tree = {"name": "a", "storage": {"path": str(tmp_path)}, "model": {"path": str(shared / "models/stories260K")}}
    run = parse_run(tree | {"data": data | {"num_pairs": 512, "eval": {"num_pairs": 0}}})
    lengths = [lengths_of(pair) for pair in prepare(resolve(run)).train_pairs]
    filled = slots = 0
    for start in range(0, 512, 64):
        options = {"num_workers": num_workers, "tokens_per_device": tokens_per_device, "row_tokens": 1024}
        step = lengths[start : start + 64]
        for micro_batch in (one for passes in plan_step(step, layout="branches", **options) for one in passes):
            widths = [sum(step[i].branched for i in row) for row in micro_batch.rows]
            filled += sum(widths) * micro_batch.counts
            slots += max(widths) * len(widths)
    assert 1 - filled / slots < 0.03


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_item_larger_than_a_device_is_refused(layout: Layout):
    lengths = [Lengths(5, (5, 5)), Lengths(20, (11, 21))]
    needed = 2 * (20 + 20) if layout == "padded" else 20 + 10 + 20
    options: dict[str, Any] = {"num_workers": 2, "row_tokens": 30, "layout": layout}
    plan_step(lengths, tokens_per_device=needed, **options)
    with pytest.raises(ValueError, match=rf"^item 1 has {needed} tokens, more than tokens_per_device {needed - 1}$"):
        plan_step(lengths, tokens_per_device=needed - 1, **options)


def test_rows_longer_than_a_device_takes_are_cut_to_it():
    """`row_tokens` changes speed, never what fits."""
    lengths = [Lengths(4, (4, 4))] * 6
    plan = plan_step(lengths, num_workers=1, tokens_per_device=25, row_tokens=512, layout="branches")
    items = items_of(lengths)
    assert sorted(i for (micro_batch,) in plan for i in micro_batch.items) == list(range(6))
    for (micro_batch,) in plan:
        assert make_batch(items, micro_batch.rows, "branches").num_slots <= 25


@pytest.mark.parametrize("layout", ["branches", "one_row"])
def test_ranks_that_wait_for_each_other_have_about_the_same_work(layout: Layout):
    generator = np.random.default_rng(0)
    lengths = [Lengths(*(int(n) for n in generator.integers(20, 200, 1)), (60, 80)) for _ in range(64)]
    plan = plan_step(lengths, num_workers=4, tokens_per_device=2048, row_tokens=512, layout=layout)
    for passes in plan:
        work = [sum(places(lengths[i], layout) for i in micro_batch.items) for micro_batch in passes]
        assert min(work) > (0.75 if layout == "branches" else 0.95) * max(work)


def test_rows_are_spread_over_all_workers_rather_than_packed_onto_one():
    plan = plan_step(
        [Lengths(10, (10, 10))] * 8, num_workers=4, tokens_per_device=8192, row_tokens=512, layout="branches"
    )
    assert [[len(micro_batch.items) for micro_batch in passes] for passes in plan] == [[2, 2, 2, 2]]


@given(sizes=st.lists(st.integers(1, 60), max_size=40), capacity=st.integers(1, 80))
@settings(max_examples=150, deadline=None)
def test_packing_keeps_every_item_and_the_capacity(sizes: list[int], capacity: int):
    rows = pack_rows(sizes, capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert sum(sizes[i] for i in row) <= capacity or len(row) == 1
    # Best fit is an any-fit rule: no two rows could have been one.
    fills = sorted(sum(sizes[i] for i in row) for row in rows)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


def test_packing_takes_the_tightest_row_that_fits():
    # 7, 6, then 3 goes beside 7 (it leaves 0), 2 beside 6.
    assert pack_rows([2, 3, 6, 7], 10) == [[3, 1], [2, 0]]


@given(
    num_pairs=st.integers(1, 30),
    pairs_per_step=st.integers(1, 12),
    seed=st.integers(0, 5),
    epochs=st.sampled_from([0.5, 1.0, 1.75, 3.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_epoch_is_a_permutation(num_pairs: int, pairs_per_step: int, seed: int, epochs: float):
    order = StepOrder(num_pairs, pairs_per_step, seed=seed, epochs=epochs, max_steps=None)
    steps = [order.pairs_of(step) for step in range(1, order.num_steps + 1)]
    seen = [pair for step in steps for pair in step]
    assert len(seen) == math.ceil(num_pairs * epochs)
    assert [len(step) for step in steps[:-1]] == [pairs_per_step] * (order.num_steps - 1)
    assert 1 <= len(steps[-1]) <= pairs_per_step
    for start in range(0, len(seen), num_pairs):
        epoch = seen[start : start + num_pairs]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(num_pairs))
    assert order.pairs_before(order.num_steps) == len(seen)
    assert order.epoch_at(order.num_steps) == pytest.approx(len(seen) / num_pairs)


def test_the_last_step_is_ragged_and_the_counts_know_it():
    order = StepOrder(10, 4, seed=0, epochs=1, max_steps=None)
    assert order.num_steps == 3
    assert [len(order.pairs_of(step)) for step in (1, 2, 3)] == [4, 4, 2]
    assert [order.pairs_before(step) for step in (0, 1, 2, 3)] == [0, 4, 8, 10]
    assert [order.epoch_at(step) for step in (1, 3)] == [0.4, 1.0]


def test_max_steps_may_run_over_several_epochs_and_stop_within_one():
    order = StepOrder(5, 4, seed=3, epochs=1, max_steps=4)
    seen = [pair for step in range(1, 5) for pair in order.pairs_of(step)]
    assert (order.num_steps, len(seen)) == (4, 16)
    assert all(sorted(seen[start : start + 5]) == list(range(5)) for start in (0, 5, 10))
    assert order.epoch_at(4) == 3.2
    assert StepOrder(100, 4, seed=3, epochs=1, max_steps=2).num_steps == 2


def test_epochs_and_seeds_give_other_orders_and_the_same_seed_the_same():
    def seen(seed: int) -> list[int]:
        order = StepOrder(50, 50, seed=seed, epochs=2, max_steps=None)
        return [*order.pairs_of(1), *order.pairs_of(2)]

    assert seen(0) == seen(0)
    assert seen(0) != seen(1)
    assert seen(0)[:50] != seen(0)[50:]
    assert seen(0)[:50] != list(range(50))


def test_a_resumed_run_sees_the_steps_of_an_unbroken_one():
    """A step is a function of its number: what was asked before, in which order, changes nothing."""
    whole = StepOrder(7, 3, seed=1, epochs=3, max_steps=None)
    steps = [whole.pairs_of(step) for step in range(1, 8)]
    for step in (5, 1, 7, 3):
        assert StepOrder(7, 3, seed=1, epochs=3, max_steps=None).pairs_of(step) == steps[step - 1]
        assert whole.pairs_of(step) == steps[step - 1]


def test_pairs_do_not_depend_on_how_long_the_run_is():
    short = StepOrder(20, 4, seed=1, epochs=1, max_steps=None)
    long = StepOrder(20, 4, seed=1, epochs=1, max_steps=50)
    assert [short.pairs_of(step) for step in range(1, 6)] == [long.pairs_of(step) for step in range(1, 6)]


def test_a_batch_in_branches_worked_by_hand():
    items = [
        PromptBranches(np.array([1, 2, 3], np.int32), (np.array([4, 5], np.int32), np.array([6, 7, 8], np.int32))),
        PromptBranches(np.array([9], np.int32), (np.array([10], np.int32),)),
    ]
    batch = make_batch(items, [[0, 1], [1]], "branches")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 6, 7, 9], [9, 0, 0, 0, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 3, 4, 0], [0, 0, 0, 0, 0, 0, 0]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, 0, 0, 1], [0, -1, -1, -1, -1, -1, -1]]
    assert batch.branch_ids.tolist() == [[0, 0, 0, 1, 2, 2, 0], [0, 0, 0, 0, 0, 0, 0]]
    assert batch.predict_index.tolist() == [2, 3, 2, 4, 5, 6, 7]
    assert batch.target_ids.tolist() == [4, 5, 6, 7, 8, 10, 10]
    assert batch.response_index.tolist() == [0, 0, 1, 1, 1, 2, 3]
    assert (batch.num_responses, batch.num_tokens, batch.num_filled, batch.num_slots) == (4, 12, 8, 14)
    assert batch.is_branched


def test_a_padded_batch_worked_by_hand():
    items = [
        PromptBranches(np.array([1, 2, 3], np.int32), (np.array([4, 5], np.int32), np.array([6, 7, 8], np.int32))),
    ]
    batch = make_batch(items, [[0]], "padded")
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 0], [1, 2, 3, 6, 7]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 4]]
    assert batch.segment_ids.tolist() == [[0, 0, 0, 0, -1], [0, 0, 0, 0, 0]]
    assert batch.predict_index.tolist() == [2, 3, 7, 8, 9]
    assert batch.target_ids.tolist() == [4, 5, 6, 7, 8]
    assert batch.response_index.tolist() == [0, 0, 1, 1, 1]
    assert (batch.num_responses, batch.num_tokens, batch.num_filled, batch.num_slots) == (2, 8, 9, 10)
    assert not batch.is_branched


def path_of(batch: PairBatch, place: int) -> list[int]:
    """Tokens that stand on the path to a place, itself included: by segment, branch and position alone."""
    row, at = divmod(place, batch.input_ids.shape[1])
    segment, branch = batch.segment_ids[row, at], batch.branch_ids[row, at]
    seen = (
        (batch.segment_ids[row] == segment)
        & ((batch.branch_ids[row] == 0) | (batch.branch_ids[row] == branch))
        & (batch.position_ids[row] <= batch.position_ids[row, at])
    )
    order = batch.position_ids[row][seen].argsort()
    assert batch.position_ids[row][seen][order].tolist() == list(range(int(seen.sum()))), "positions without a gap"
    return batch.input_ids[row][seen][order].tolist()


@given(lengths=lengths_of_steps, num_rows=st.integers(1, 4), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=60, deadline=None)
def test_every_target_is_predicted_behind_its_prompt_and_all_that_came_before_it(
    lengths: list[Lengths], num_rows: int, layout: Layout
):
    items = items_of(lengths)
    rows = [row for row in (list(range(i, len(items), num_rows)) for i in range(num_rows)) if row]
    batch = make_batch(items, rows, layout)

    chosen = [items[i] for row in rows for i in row]
    responses = [(item.prompt_ids, response) for item in chosen for response in item.responses]
    expected = [
        (r, prompt.tolist() + response[:k].tolist(), int(response[k]))
        for r, (prompt, response) in enumerate(responses)
        for k in range(len(response))
    ]
    found = [
        (int(r), path_of(batch, int(place)), int(target))
        for r, place, target in zip(batch.response_index, batch.predict_index, batch.target_ids, strict=True)
    ]
    assert found == expected
    assert batch.num_responses == len(responses)
    assert batch.num_filled == int((batch.segment_ids >= 0).sum())
    assert batch.num_filled == sum(
        item.branched if layout != "padded" else sum(item.prompt + n - 1 for n in item.responses) for item in lengths
    )
    assert batch.num_tokens == sum(item.prompt + sum(item.responses) for item in lengths)
    assert batch.input_ids[batch.segment_ids < 0].sum() == 0


def test_a_batch_moves_whole_to_another_device():
    (item,) = items_of([Lengths(3, (2, 2))])
    moved = make_batch([item], [[0]], "branches").to("meta")
    assert {field.device.type for field in moved if isinstance(field, torch.Tensor)} == {"meta"}
