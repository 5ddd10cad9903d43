"""The ensemble of heads against closed forms: where it starts, where it ends, and what it does not depend on."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import expit

from dpo_ray.acquisition import heads
from dpo_ray.acquisition.heads import ensemble_margins
from dpo_ray.acquisition.scores import Ask, Features, score
from dpo_ray.config import EnsembleConfig


def states(num: int, width: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(num, 2, width))


def separable(num: int, width: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Pairs whose chosen response lies farther along one direction, and that direction."""
    rng = np.random.default_rng(seed)
    pairs, direction = rng.normal(size=(num, 2, width)), rng.normal(size=width)
    turned = (pairs[:, 0] - pairs[:, 1]) @ direction < 0
    pairs[turned] = pairs[turned, ::-1]
    return pairs, direction


def random_heads(members: int, size: int, width: int, seed: int = 0) -> heads.Parameters:
    torch.manual_seed(seed)
    shapes = [(width, 1), (size, width), (1, width)] if width else [(size, 1)]
    return tuple(torch.randn(members, *shape, dtype=torch.float64) for shape in shapes)


# What a member minimises


@pytest.mark.parametrize("width", [0, 3])
def test_the_loss_worked_out_pair_by_pair(width: int):
    pairs, counts = torch.from_numpy(states(4)), torch.tensor([[2.0, 0.0, 1.0, 1.0], [0.0, 3.0, 0.0, 1.0]])
    now, start = random_heads(2, 5, width, 1), random_heads(2, 5, width, 2)
    found = heads.member_losses(now, start, pairs, counts.double(), pull=0.3)

    def reward(member: int, state: np.ndarray) -> float:
        output, *layer = (part[member].numpy() for part in now)
        if not layer:
            return float(state @ output[:, 0] / np.sqrt(5))
        hidden, bias = layer
        active = np.maximum(state @ hidden / np.sqrt(5) + bias[0], 0)
        return float(np.sqrt(2) * active @ output[:, 0] / np.sqrt(width))

    for member in range(2):
        margins = [reward(member, pair[0]) - reward(member, pair[1]) for pair in pairs.numpy()]
        misfit = sum(c * np.log1p(np.exp(-m)) for c, m in zip(counts[member].tolist(), margins, strict=True))
        moved = sum(float((a[member] - b[member]).square().sum()) for a, b in zip(now, start, strict=True))
        assert found[member].item() == pytest.approx((misfit + 0.3 * moved) / 4, rel=1e-12)


def test_the_gradient_of_a_linear_head_is_the_closed_form():
    # d/dw: -sum_i c_i (1 - p_i) d_i / (L sqrt D) + 2 pull (w - w0) / L
    pairs, counts = torch.from_numpy(states(6)), torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.0, 2.0]], dtype=torch.float64)
    (weight,), start = random_heads(1, 5, 0, 1), random_heads(1, 5, 0, 2)
    weight.requires_grad_()
    heads.member_losses((weight,), start, pairs, counts, pull=0.7).sum().backward()
    apart = (pairs[:, 0] - pairs[:, 1]) / np.sqrt(5)
    w = weight.detach()[0, :, 0]
    misfit = -(counts[0] * torch.sigmoid(-apart @ w)) @ apart
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad[0, :, 0], (misfit + 1.4 * (w - start[0][0, :, 0])) / 6)


# Where training ends


def test_a_linear_head_ends_at_the_optimum_of_its_penalised_logistic_regression():
    pairs = torch.from_numpy(states(8, 3))
    counts = torch.tensor([[1, 2, 0, 1, 1, 0, 3, 0], [0, 1, 1, 1, 2, 2, 0, 1]], dtype=torch.float64)
    start = random_heads(2, 3, 0)
    config = EnsembleConfig(members=2, width=0, steps=500, learning_rate=0.1, pull=0.5)
    (found,) = heads.fitted(start, pairs, counts, config)
    apart = (pairs[:, 0] - pairs[:, 1]).numpy() / np.sqrt(3)
    for member in range(2):
        count, centre = counts[member].numpy(), start[0][member, :, 0].numpy()

        def loss(w: np.ndarray, count: np.ndarray = count, centre: np.ndarray = centre) -> float:
            return float(count @ np.logaddexp(0, -apart @ w) + 0.5 * np.square(w - centre).sum())

        best = minimize(loss, np.zeros(3), tol=1e-12).x
        np.testing.assert_allclose(found[member, :, 0].numpy(), best, atol=1e-4)


def test_the_rate_falls_to_zero_in_a_line():
    # While a gradient hardly changes, a step of Adam is the rate, down the gradient: 1 + 3/4 + 1/2 + 1/4 rates in all.
    pairs, counts = torch.from_numpy(states(8, 3)), torch.ones(1, 8, dtype=torch.float64)
    start = random_heads(1, 3, 0)
    (found,) = heads.fitted(start, pairs, counts, EnsembleConfig(width=0, steps=4, learning_rate=1e-5, pull=0.0))
    np.testing.assert_allclose((found - start[0]).abs().numpy(), 2.5e-5, rtol=1e-3)


@pytest.mark.parametrize("width", [0, 8])
def test_members_are_trained_as_if_alone(width: int):
    pairs, counts = torch.from_numpy(states(6)), torch.ones(3, 6, dtype=torch.float64)
    config, start = EnsembleConfig(width=width, steps=20), random_heads(3, 5, width)
    together = heads.fitted(start, pairs, counts, config)
    for member in range(3):
        alone = heads.fitted(tuple(part[member : member + 1] for part in start), pairs, counts[:1], config)
        for one, all_ in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_[member])


def test_a_large_pull_keeps_heads_at_their_start():
    labelled, _ = separable(20)
    pool = states(30, seed=1)

    def found(pull: float) -> np.ndarray:
        return ensemble_margins(labelled, pool, EnsembleConfig(width=0, steps=100, pull=pull), seed=0)

    (start,) = zip(*(heads._start(5, 20, 0, 0, member)[0] for member in range(5)), strict=True)
    mean, deviation = heads._statistics(torch.from_numpy(labelled), torch.from_numpy(pool))
    untrained = heads.margins((torch.stack(start),), (torch.from_numpy(pool) - mean) / deviation)
    np.testing.assert_allclose(found(1e6), untrained.T.numpy(), atol=1e-3)
    assert np.abs(found(0.0) - untrained.T.numpy()).max() > 0.5


@pytest.mark.parametrize("width", [0, 32])
def test_what_separates_the_labels_is_learnt(width: int):
    labelled, direction = separable(200)
    pool = states(300, seed=1)
    config = EnsembleConfig(width=width, pull=0.0, steps=100, learning_rate=0.1)
    margins = ensemble_margins(labelled, np.concatenate([pool, labelled]), config, seed=0).mean(axis=1)
    expected = np.sign((pool[:, 0] - pool[:, 1]) @ direction)
    assert (np.sign(margins[:300]) == expected).mean() > 0.9
    assert (margins[300:] > 0).mean() > 0.95  # the first of a labelled pair is the chosen one


def test_each_member_sees_its_own_resample():
    # One label says yes; the other, seen as often by all, would cancel it. Resamples tell them apart.
    pair = states(1)
    labelled = np.concatenate([pair, pair[:, ::-1]])
    config = EnsembleConfig(members=40, width=0, pull=0.001, steps=150, learning_rate=0.1)
    margins = ensemble_margins(labelled, pair, config, seed=0)[0]
    drawn = [heads._start(5, 2, 0, 0, member)[1].tolist() for member in range(40)]
    assert {tuple(count) for count in drawn} == {(2.0, 0.0), (1.0, 1.0), (0.0, 2.0)}
    assert [m > 2 for m in margins] == [count == [2.0, 0.0] for count in drawn]


@pytest.mark.parametrize("width", [0, 32])
def test_members_agree_where_labels_are_many_and_not_elsewhere(width: int):
    # Labels differ along the first feature only; the pool has pairs along it, and along the others.
    rng = np.random.default_rng(0)

    def along(axes: list[int], num: int) -> np.ndarray:
        pairs = np.zeros((num, 2, 6))
        pairs[:, :, axes] = rng.normal(size=(num, 2, len(axes)))
        return pairs

    labelled = along([0], 400)
    labelled[labelled[:, 0, 0] < labelled[:, 1, 0]] = labelled[labelled[:, 0, 0] < labelled[:, 1, 0]][:, ::-1]
    known, unknown = along([0], 100), along([1, 2, 3, 4, 5], 100)
    margins = ensemble_margins(
        labelled, np.concatenate([known, unknown]), EnsembleConfig(width=width, learning_rate=0.05), seed=0
    )
    agree = (np.sign(margins) == np.sign(margins[:, :1])).all(axis=1)
    assert agree[:100].mean() > 0.9
    assert agree[100:].mean() < 0.5
    pool = Features([f"p{i:03}" for i in range(200)], ["q"] * 200, ["s"] * 200, head_margins=margins)
    information = score("bald", pool, Ask(8)).values
    assert np.median(information[100:]) > 10 * np.median(information[:100])


# What it does not depend on


@pytest.mark.parametrize("width", [0, 16])
def test_swapping_responses_turns_the_margin_round_exactly(width: int):
    labelled, _ = separable(20)
    pool, swapped = states(40, seed=1), states(40, seed=1)
    swapped[::3] = swapped[::3, ::-1].copy()
    config = EnsembleConfig(width=width, steps=30)
    one, other = ensemble_margins(labelled, pool, config, 3), ensemble_margins(labelled, swapped, config, 3)
    sign = np.ones((40, 1))
    sign[::3] = -1
    np.testing.assert_array_equal(other, sign * one)
    assert np.abs(one).min() > 0


def test_no_margin_depends_on_the_order_of_the_pool(monkeypatch: pytest.MonkeyPatch):
    labelled, _ = separable(20)
    pool, order = states(41, seed=1), np.random.default_rng(0).permutation(41)
    config = EnsembleConfig(steps=30)
    whole = ensemble_margins(labelled, pool, config, 0)
    np.testing.assert_allclose(ensemble_margins(labelled, pool[order], config, 0), whole[order], rtol=1e-9)
    monkeypatch.setattr(heads, "_ROWS", 7)
    np.testing.assert_allclose(ensemble_margins(labelled, pool, config, 0), whole, rtol=1e-9)


def test_the_seed_decides_everything_and_a_member_does_not_depend_on_the_others():
    labelled, _ = separable(20)

    def found(seed: int, members: int) -> np.ndarray:
        return ensemble_margins(labelled, states(10, seed=1), EnsembleConfig(members=members, steps=20), seed)

    torch.manual_seed(1)
    first = found(0, 4)
    torch.manual_seed(2)
    np.testing.assert_array_equal(found(0, 4), first)
    np.testing.assert_allclose(found(0, 2), first[:, :2], rtol=1e-9)
    assert np.abs(found(1, 4) - first).min(axis=0).max() > 0
    assert len({tuple(column) for column in first.T.round(9)}) == 4


@pytest.mark.parametrize("change", [lambda h: h * 1000 + 7, lambda h: h / 1e6 - 3])
def test_units_of_hidden_states_do_not_matter(change: Any):
    labelled, _ = separable(20)
    pool, config = states(10, seed=1), EnsembleConfig(steps=20)
    found = ensemble_margins(change(labelled), change(pool), config, 0)
    np.testing.assert_allclose(found, ensemble_margins(labelled, pool, config, 0), rtol=1e-6)


def test_a_feature_that_never_changes_is_no_feature():
    labelled, _ = separable(20)
    config = EnsembleConfig(steps=3)

    def found(value: float) -> np.ndarray:
        flat = (np.concatenate([p, np.full((len(p), 2, 1), value)], axis=2) for p in (labelled, states(10, seed=1)))
        return ensemble_margins(*flat, config, 0)

    np.testing.assert_array_equal(found(0.7), found(0.0))
    for value in np.random.default_rng(0).uniform(size=50):  # the mean of some differs from them in the last bit
        deviation = heads._statistics(torch.full((30, 2, 1), float(value), dtype=torch.float64))[1]
        assert torch.isinf(deviation).all()


def test_arrays_and_tensors_of_any_precision_are_taken():
    labelled, pool = separable(20)[0].astype(np.float32), states(10, seed=1).astype(np.float32)
    config = EnsembleConfig(steps=20)
    one = ensemble_margins(labelled, pool, config, 0)
    other = ensemble_margins(torch.from_numpy(labelled), torch.from_numpy(pool), config, 0)
    np.testing.assert_array_equal(one, other)
    assert (one.dtype, one.shape) == (np.float64, (10, 5))


def test_without_labels_nothing_is_known_and_bald_is_undecided():
    margins = ensemble_margins(np.zeros((0, 2, 5)), states(10), EnsembleConfig(members=3), seed=0)
    np.testing.assert_array_equal(margins, np.zeros((10, 3)))
    pool = Features([f"p{i}" for i in range(10)], ["q"] * 10, ["s"] * 10, head_margins=margins)
    assert score("bald", pool, Ask(4)).undecided


def test_untrained_rewards_are_of_order_one_at_any_width():
    for size, width in [(4, 0), (400, 0), (4, 64), (400, 64), (40, 1024)]:
        drawn = heads.rewards(random_heads(30, size, width), torch.randn(50, size, dtype=torch.float64))
        assert 0.7 < drawn.square().mean().sqrt() < 1.8, (size, width)


def test_many_labels_outweigh_the_pull():
    # The same label, once and two hundred times over: members then agree, and more surely.
    labelled, _ = separable(1)
    config = EnsembleConfig(width=0, steps=200, members=30, learning_rate=0.1)
    few, many = (ensemble_margins(np.repeat(labelled, n, axis=0), labelled, config, 0)[0] for n in (1, 200))
    assert expit(many).mean() > expit(few).mean()
    assert many.std() < few.std()
