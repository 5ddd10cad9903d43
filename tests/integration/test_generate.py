"""The pool of actors writes what one process writes, in the order of the prompts, whatever the number of actors."""

from pathlib import Path

import numpy as np
import pytest

from dpo_ray import generate as module
from dpo_ray.generate import ResponseGenerator, Sampling, generate
from dpo_ray.models import ModelSource

pytestmark = pytest.mark.ray


def test_a_pool_of_actors_writes_what_one_process_writes(
    cluster: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "REQUESTS_PER_BLOCK", 4)
    source, sampling = ModelSource(str(tiny_model)), Sampling(max_tokens=8, temperature=0.8)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 258, length).astype(np.int32) for length in (3, 300, 9, 1, 5, 0, 7)]
    progress: list[tuple[int, int]] = []
    pooled = generate(
        prompts,
        source,
        sampling,
        num_responses=2,
        seed=3,
        precision="fp32",
        num_actors=2,
        cpus_per_actor=1,
        gpus_per_actor=0,
        on_progress=lambda done, total: progress.append((done, total)),
    )
    alone = ResponseGenerator(source, "fp32").generate(prompts, 2, sampling, seed=3)
    assert [item.error for item in pooled] == [item.error for item in alone]
    assert [item.error is None for item in pooled] == [True, False, True, True, True, False, True]
    for one, other in zip(pooled, alone, strict=True):
        assert [r.ids.tolist() for r in one.responses] == [r.ids.tolist() for r in other.responses]
        assert [r.is_finished for r in one.responses] == [r.is_finished for r in other.responses]
        assert [r.logps for r in one.responses] == pytest.approx([r.logps for r in other.responses], abs=1e-4)
    assert progress[-1] == (7, 7)
    assert len(progress) == 4
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
