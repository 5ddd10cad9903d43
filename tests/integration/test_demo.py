"""The embedded task through the real trainer: the aligned model wins clearly. `dpo-ray demo --seeds 3` repeats it."""

from pathlib import Path

import pytest

from dpo_ray.demo import run_demo

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]


def test_the_aligned_model_wins_by_the_true_reward(cluster: None, tmp_path: Path):
    result = run_demo(tmp_path / "demo", seeds=range(1))
    assert result["win_rate_low"] > 0.7
    assert result["aligned_reward"] > result["base_reward"] + 1
    assert result["kl"] < 1
    assert (tmp_path / "demo/seed-0/demo.png").read_bytes().startswith(b"\x89PNG")
