"""The pool goes by content: nested, in proportion, in any row order, and no prompt on both sides."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dpo_ray.config import DataConfig
from dpo_ray.data.mixture import Pool, load_pool
from dpo_ray.errors import InputError
from dpo_ray.pairs import PreferencePair

Rows = list[dict[str, Any]]


def write(path: Path, rows: Rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pool_of(*sources: str | dict[str, Any], **data: Any) -> Pool:
    given_sources = [{"path": source} if isinstance(source, str) else source for source in sources]
    return load_pool(DataConfig.model_validate({"sources": given_sources, "eval": {"num_pairs": 0}, **data}))


def ids(pairs: list[PreferencePair]) -> list[str]:
    return [pair.pair_id for pair in pairs]


def rows(number: int, name: str = "", pairs_per_prompt: int = 1) -> Rows:
    return [
        {
            "prompt": f"{name} question {n // pairs_per_prompt}",
            "chosen": f"yes {n}",
            "rejected": f"no {n}",
            "doc": n % 7,
        }
        for n in range(number)
    ]


def test_rows_are_counted_by_what_became_of_them(tmp_path: Path):
    good = {"prompt": "p", "chosen": "c", "rejected": "r"}
    path = write(
        tmp_path / "a.jsonl",
        [
            good,
            {"text": "no pair"},
            good,
            {"prompt": " p", "chosen": "c ", "rejected": "r\n"},  # the same content
            {"prompt": "p", "chosen": "e\u0301 ", "rejected": "\u00e9"},  # identical when normalised
            {"prompt": "p", "chosen": " \n", "rejected": "r"},
            {"prompt": [{"role": "user", "content": "p"}], "chosen": "c", "rejected": ""},
            {"prompt": "p", "chosen": "x", "rejected": "y", "score_chosen": 1, "score_rejected": 1},
            {"prompt": "p", "chosen": "r", "rejected": "c"},  # says the opposite
            {"prompt": "q", "responses": [{"text": t, "score": s} for t, s in (("a", 2), ("b", 1), ("c", 1))]},
        ],
    )
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write("\n{\n" * 6)
    pool = pool_of({"path": path, "pairing": "all"}, on_bad_row="drop")
    dropped = {"bad_row": 7, "duplicate": 2, "empty_response": 2, "identical": 1, "tie": 2}
    (source,) = pool.report["sources"]
    assert source["bad_rows"][0] == f"{path}:2: no pair in it that is known; its columns are text"
    assert [place.split(": ")[0] for place in source["bad_rows"]] == [f"{path}:{n}" for n in (2, 12, 14, 16, 18)]
    del source["bad_rows"]
    assert source == {"path": path, "rows": 16, "pairs": 4, "held_out": 0, "dropped": dropped, "contradictions": 1}
    assert {key: pool.report[key] for key in ("rows", "pairs", "dropped", "contradictions", "train", "held_out")} == {
        "rows": 16,
        "pairs": 4,
        "dropped": dropped,
        "contradictions": 1,
        "train": 4,
        "held_out": 0,
    }
    assert len(pool.train) == 4


def test_a_bad_row_stops_with_its_place_unless_it_may_be_dropped(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n\n{"prompt": "p", "chosen": "c"}\n')
    with pytest.raises(InputError, match=rf"^{path}:3: no `rejected` beside `chosen`$"):
        pool_of(str(path))
    assert len(pool_of(str(path), on_bad_row="drop").train) == 1


def test_a_response_of_tool_calls_alone_is_not_empty(tmp_path: Path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    row = {"prompt": [{"role": "user", "content": "p"}], "chosen": [call], "rejected": "r"}
    assert len(pool_of(write(tmp_path / "a.jsonl", [row])).train) == 1


def test_a_source_without_pairs_is_named_with_its_counts(tmp_path: Path):
    good = write(tmp_path / "good.jsonl", rows(5))
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(InputError, match=rf"^no pairs in {empty}: 0 rows$"):
        pool_of(good, empty)
    bad = write(tmp_path / "bad.jsonl", [{"text": "t"}, {"prompt": "p", "chosen": "c", "rejected": "c"}])
    with pytest.raises(
        InputError, match=rf"^no pairs in {bad}: 2 rows; dropped: 1 bad_row, 1 identical; first: {bad}:1: "
    ):
        pool_of(good, bad, on_bad_row="drop")
    with pytest.raises(InputError, match=r"no pairs in .*copy.jsonl: 5 rows; dropped: 5 duplicate$"):
        pool_of(good, write(tmp_path / "copy.jsonl", rows(5)))


def test_of_equal_pairs_the_first_sources_stays(tmp_path: Path):
    first = write(tmp_path / "first.jsonl", rows(6))
    second = write(tmp_path / "second.jsonl", rows(9))
    pool = pool_of(first, second)
    assert Counter(pair.source for pair in pool.train) == {first: 6, second: 3}
    assert [source["dropped"] for source in pool.report["sources"]] == [{}, {"duplicate": 6}]


def test_a_source_of_weight_0_is_held_out_from_but_not_trained_on(tmp_path: Path):
    first, second = (
        write(tmp_path / "first.jsonl", rows(40, "a", 2)),
        write(tmp_path / "second.jsonl", rows(40, "b", 2)),
    )
    both = [
        pool_of({"path": first, "weight": 1}, {"path": second, "weight": w}, eval={"num_pairs": 10}) for w in (1, 0)
    ]
    assert ids(both[0].held_out) == ids(both[1].held_out)
    assert {pair.source for pair in both[1].held_out} == {first, second}
    assert {pair.source for pair in both[1].train} == {first}
    assert len(both[1].train) + sum(pair.source == first for pair in both[1].held_out) == 40


def test_contradictions_are_counted_across_sources(tmp_path: Path):
    first = write(tmp_path / "first.jsonl", rows(6))
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows(4)]
    pool = pool_of(first, write(tmp_path / "second.jsonl", swapped))
    assert (pool.report["contradictions"], len(pool.train)) == (4, 10)


def test_num_pairs_of_a_source_are_its_first_by_content(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", rows(20))
    taken = {n: set(ids(pool_of({"path": path, "num_pairs": n}).train)) for n in (5, 10, 20, 99)}
    assert [len(pairs) for pairs in taken.values()] == [5, 10, 20, 20]
    assert taken[5] < taken[10] < taken[20]
    assert pool_of({"path": path, "num_pairs": 5}).report["sources"][0]["dropped"] == {"over_num_pairs": 15}
    assert set(ids(pool_of({"path": path, "num_pairs": 5}, subset_seed=9).train)) == taken[5]
    turned = write(tmp_path / "turned.jsonl", rows(20)[::-1])
    assert set(ids(pool_of({"path": turned, "num_pairs": 5}).train)) == taken[5]
    # What a source does not take is still free for another one.
    copy = write(tmp_path / "copy.jsonl", rows(20))
    assert len(pool_of({"path": path, "num_pairs": 5}, copy).train) == 20


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(st.randoms(use_true_random=False), st.floats(0.05, 1), st.booleans())
def test_the_pool_does_not_depend_on_the_order_of_rows_and_files(
    tmp_path: Path, chance: random.Random, fraction: float, is_weighted: bool
):
    weights = ({"weight": 2}, {"weight": 1}) if is_weighted else ({}, {})
    options = {"fraction": fraction, "eval": {"num_pairs": 6}}
    contents = [rows(40, "a", 3), rows(25, "b", 2)]
    paths = [write(tmp_path / f"{name}.jsonl", content) for name, content in zip("ab", contents, strict=True)]
    sources = [{"path": path, **weight} for path, weight in zip(paths, weights, strict=True)]
    pool = pool_of(*sources, **options)
    for path, content in zip(paths, contents, strict=True):
        chance.shuffle(content)
        write(Path(path), content)
    again = pool_of(*reversed(sources), **options)
    assert ids(again.train) == ids(pool.train)
    assert ids(again.held_out) == ids(pool.held_out)
    assert again.report["left_out"] == pool.report["left_out"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.floats(0.1, 10)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 3),
)
def test_every_beginning_of_the_order_has_the_shares_of_the_mixture(
    tmp_path: Path, sizes: list[tuple[int, float]], is_weighted: bool, seed: int
):
    sources = []
    for name, (size, weight) in zip("abcd", sizes, strict=False):
        path = write(tmp_path / f"{name}.jsonl", rows(size, name))
        sources.append({"path": path} | ({"weight": weight} if is_weighted else {}))
    pool = pool_of(*sources, subset_seed=seed)
    weights = [weight if is_weighted else size for size, weight in sizes]
    shares = {source["path"]: weight / sum(weights) for source, weight in zip(sources, weights, strict=True)}
    counts: Counter[str] = Counter()
    for total, pair in enumerate(pool.train, 1):
        counts[pair.source] += 1
        for path, share in shares.items():
            # Sainte-Lague keeps each seat count within half a seat of share * t for one t; t is near the total.
            assert abs(counts[path] - share * total) <= 0.5 + share * len(sources) / 2 + 1e-9
    available = {source["path"]: size for source, (size, _) in zip(sources, sizes, strict=True)}
    if is_weighted:
        assert any(counts[path] == available[path] for path in available)
        assert pool.report["left_out"]["weights"] == sum(available.values()) - len(pool.train)
    else:
        assert counts == available
    assert len(set(ids(pool.train))) == len(pool.train)


def test_with_weights_the_order_ends_where_the_first_source_runs_out(tmp_path: Path):
    sources = [
        {"path": write(tmp_path / f"{name}.jsonl", rows(size, name)), "weight": weight}
        for name, size, weight in (("a", 100, 3), ("b", 20, 1), ("c", 100, 1))
    ]
    pool = pool_of(*sources)
    assert [sum(pair.source == source["path"] for pair in pool.train) for source in sources] == [61, 20, 20]
    assert pool.report["left_out"]["weights"] == 220 - 101


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 2))
def test_a_smaller_fraction_is_the_beginning_of_a_larger_one(tmp_path: Path, one: float, other: float, seed: int):
    sources = [write(tmp_path / "a.jsonl", rows(50, "a", 2)), write(tmp_path / "b.jsonl", rows(13, "b"))]
    options = {"eval": {"num_pairs": 5}, "subset_seed": seed}
    small, large = (pool_of(*sources, fraction=fraction, **options) for fraction in sorted((one, other)))
    whole = pool_of(*sources, **options)
    assert ids(large.train)[: len(small.train)] == ids(small.train)
    assert ids(whole.train)[: len(large.train)] == ids(large.train)
    assert ids(small.held_out) == ids(large.held_out) == ids(whole.held_out)
    assert len(large.train) == max(1, round(max(one, other) * len(whole.train)))
    assert large.report["left_out"]["fraction"] == len(whole.train) - len(large.train)


def test_another_subset_seed_is_another_family_on_the_same_held_out_pairs(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", rows(200))
    pools = [pool_of(path, fraction=0.25, subset_seed=seed, eval={"num_pairs": 20}) for seed in (0, 1)]
    assert ids(pools[0].held_out) == ids(pools[1].held_out)
    assert len(pools[0].train) == len(pools[1].train) == 45
    assert 0 < len({*ids(pools[0].train)} & {*ids(pools[1].train)}) < 45


def openings(pairs: list[PreferencePair]) -> set[str]:
    return {str(pair.prompt if isinstance(pair.prompt, str) else pair.prompt[0]) for pair in pairs}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4), st.booleans()), min_size=1, max_size=60),
    st.integers(0, 30),
    st.booleans(),
)
def test_no_prompt_and_no_group_stands_on_both_sides(
    tmp_path: Path, draws: list[tuple[int, int, bool]], num_pairs: int, is_grouped: bool
):
    content = []
    for n, (prompt, doc, is_long) in enumerate(draws):
        turns = [{"role": "user", "content": f"question {prompt}"}]
        if is_long:  # a later turn of the same conversation
            turns += [{"role": "assistant", "content": f"answer {n}"}, {"role": "user", "content": "go on"}]
        content.append({"prompt": turns, "chosen": f"c{n}", "rejected": f"r{n}", "doc": doc})
    path = write(tmp_path / "a.jsonl", content)
    try:
        pool = pool_of({"path": path, "group_by": "doc" if is_grouped else None}, eval={"num_pairs": num_pairs})
    except InputError:  # documents and prompts can hang together so that nothing is left to train on
        assert is_grouped
        return
    assert not openings(pool.train) & openings(pool.held_out)
    if is_grouped:
        assert not {pair.group for pair in pool.train} & {pair.group for pair in pool.held_out}
    (source,) = pool.report["sources"]
    leaked = source["dropped"].get("in_held_out", 0)
    assert leaked == 0 or is_grouped
    assert len(pool.train) + len(pool.held_out) + leaked == len(content)
    assert len(pool.held_out) <= len(content) // 5
    assert source["pairs"] == len(pool.train) + len(pool.held_out)
    assert (len(pool.held_out) > 0) or num_pairs == 0 or pool.report["notes"]


def test_whole_groups_are_held_out_until_there_are_enough(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", rows(300, pairs_per_prompt=3))
    sizes = [len(pool_of(path, eval={"num_pairs": n}).held_out) for n in (0, 1, 3, 4, 59, 60, 61, 10_000)]
    assert sizes == [0, 3, 3, 6, 60, 60, 60, 60]
    smaller, larger = (set(ids(pool_of(path, eval={"num_pairs": n}).held_out)) for n in (10, 40))
    assert smaller < larger


def test_a_single_prompt_is_never_held_out(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", rows(50, pairs_per_prompt=50))
    pool = pool_of(path, eval={"num_pairs": 5})
    assert (len(pool.train), pool.held_out) == (50, [])
    assert "nothing is held out" in pool.report["notes"][0]


def test_a_large_group_is_passed_over_and_smaller_ones_are_held_out(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", rows(90, "big", pairs_per_prompt=90) + rows(10, "small"))
    pool = pool_of(path, eval={"num_pairs": 8})
    assert len(pool.held_out) == 8
    assert all("small" in str(pair.prompt) for pair in pool.held_out)


def test_held_out_sources_take_their_prompts_away_from_training(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", rows(20, pairs_per_prompt=2))
    evaluated = write(tmp_path / "eval.jsonl", [{**row, "chosen": "other"} for row in rows(6, pairs_per_prompt=2)])
    pool = pool_of(train, eval={"sources": [{"path": evaluated}]})
    assert {pair.source for pair in pool.held_out} == {evaluated}
    assert len(pool.held_out) == 6
    assert not openings(pool.train) & openings(pool.held_out)
    assert pool.report["sources"][0]["dropped"] == {"in_held_out": 6}
    assert pool.report["eval_sources"][0]["pairs"] == 6
    assert len(pool.train) == 14
    with pytest.raises(InputError, match=r"no pairs in .*train.jsonl: 20 rows; dropped: 20 in_held_out"):
        pool_of(train, eval={"sources": [{"path": train}]})
    assert len(pool_of(train, eval={"sources": [{"path": evaluated}], "num_pairs": 0}).train) == 20


def test_grouped_training_pairs_are_known_by_their_prompt_too(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", rows(21))
    evaluated = write(tmp_path / "eval.jsonl", [{**row, "chosen": "other"} for row in rows(6)])
    pool = pool_of({"path": train, "group_by": "doc"}, eval={"sources": [{"path": evaluated}]})
    assert pool.report["sources"][0]["dropped"] == {"in_held_out": 6}
