"""The memory estimate in closed form, and the settings that it advises."""

from typing import Any

import pytest

from dpo_ray.config import RunConfig, parse_run
from dpo_ray.device import GIB
from dpo_ray.memory import Shape, memory_estimate, settings_that_fit

EIGHT_BILLION = Shape(8 * 10**9, 2_600_000, num_layers=32, hidden_size=4096, num_attention_heads=32)


def run(**overrides: Any) -> RunConfig:
    tree = {"name": "a", "model": {"path": "m"}, "data": {"sources": [{"path": "d"}]}}
    laid = {"engine.zero_stage": 1, "cluster.num_workers": 8} | {k.replace("__", "."): v for k, v in overrides.items()}
    return parse_run(tree, laid)


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(1, 16, 32, 12), (2, 16, 4, 12), (3, 2, 4, 12)]
)
def test_each_stage_shards_what_its_paper_says(stage: int, weights: float, gradients: float, optimizer: float):
    told = memory_estimate(run(engine__zero_stage=stage), EIGHT_BILLION)
    expected = {"weights": weights, "gradients": gradients, "optimizer": optimizer}
    for name, gigabytes in expected.items():
        assert told[name] == pytest.approx(gigabytes * 1e9 / GIB, abs=1e-3)
    assert told["gib_per_worker"] == pytest.approx(
        sum(told[name] for name in (*expected, "activations", "output_layer"))
    )


def test_adapters_train_little_and_offload_keeps_no_state_on_the_device():
    told = memory_estimate(run(model__lora={"rank": 16}), EIGHT_BILLION)
    assert told["trained_parameters"] == 16 * 2_600_000
    assert memory_estimate(run(engine__offload_optimizer=True), EIGHT_BILLION)["optimizer"] == 0


def test_full_precision_keeps_no_copy_and_stage_0_shards_nothing():
    told = memory_estimate(run(engine__precision="fp32", engine__zero_stage=0), EIGHT_BILLION)
    sizes = [told[name] * GIB / 8e9 for name in ("weights", "gradients", "optimizer")]
    assert sizes == pytest.approx([4, 4, 8], abs=1e-3)


@pytest.mark.parametrize("device_gib", [80.0, 40.0, 24.0, 16.0])
def test_what_is_advised_fits_and_nothing_of_it_is_spare(device_gib: float):
    advised = settings_that_fit(run(), EIGHT_BILLION, device_gib)
    assert advised
    laid = {key.replace(".", "__"): value for key, value in advised.items()}
    assert memory_estimate(run(**laid), EIGHT_BILLION)["gib_per_worker"] <= device_gib
    for spare in laid:
        fewer = {key: value for key, value in laid.items() if key != spare}
        assert memory_estimate(run(**fewer), EIGHT_BILLION)["gib_per_worker"] > device_gib


def test_nothing_is_advised_where_nothing_helps():
    assert settings_that_fit(run(), EIGHT_BILLION, 1.0) is None
    assert settings_that_fit(run(), EIGHT_BILLION, 1000.0) == {}
