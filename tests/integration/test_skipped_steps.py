"""A gradient that is not finite leaves no trace, at every ZeRO stage: weights and moments as if it had not been."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

SCRIPT = """
import os, sys, torch
os.environ["LOCAL_RANK"] = "0"
from dpo_ray.config import EngineConfig, OptimConfig
from dpo_ray.engine import ZeroEngine

torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)

def train(stage, precision, factors):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    optim = OptimConfig(learning_rate=1e-2, schedule="constant", warmup_ratio=0.0)
    engine = ZeroEngine(model, EngineConfig(zero_stage=stage, precision=precision), optim, 10)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    norms = []
    for factor in factors:
        for part in range(2):  # two micro-batches: the first one's gradient must go too
            x = torch.arange(8.0).reshape(2, 4).to(dtype) + part
            engine.backward(engine._engine(x).float().square().mean() * (factor if part else 1.0), is_last=part == 1)
        norms.append(engine.step(len(norms) + 1)["grad_norm"])
    probe = engine._engine(torch.ones(1, 4, dtype=dtype)).float().tolist()
    return norms, probe

for stage, precision in [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]:
    _, expected = train(stage, precision, [1.0, 1.0, 1.0])
    norms, found = train(stage, precision, [1.0, float("nan"), 1.0, float("inf"), 1.0])
    finite = [bool(torch.tensor(norm).isfinite()) for norm in norms]
    assert finite == [True, False, True, False, True], (stage, precision, norms)
    assert found == expected, (stage, precision, found, expected)
    print(stage, precision, "as if they had not been")
"""


def test_a_step_that_is_not_finite_is_not_taken(tmp_path: Path):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "store")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as if they had not been") == 7
