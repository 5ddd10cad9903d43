"""Blocks through a pool of Ray Data actors: the one way in which models are asked about much data."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa


def on_actors(
    blocks: Sequence[pa.Table],
    actor: type,
    *,
    num_actors: int,
    cpus_per_actor: float,
    gpus_per_actor: float,
    constructor: tuple[Any, ...] = (),
    constructor_options: Mapping[str, Any] | None = None,
    call_options: Mapping[str, Any] | None = None,
) -> Any:
    """What `actor(*constructor)(block)` gives for each block, as a lazy Ray Data set; a block is one call.

    Args:
        actor: A plain class whose calls take and give a table; each actor makes it once.
        num_actors: Most actors. All are asked for at once; a busy cluster gives what it has, and goes on with those.
    """
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False  # callers show their own
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    most = min(num_actors, len(blocks))
    return ray.data.from_arrow(list(blocks)).map_batches(
        actor,
        fn_constructor_args=constructor,
        fn_constructor_kwargs=dict(constructor_options or {}),
        fn_kwargs=dict(call_options or {}),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=most, initial_size=most),
        num_cpus=cpus_per_actor / 2,  # Ray Data needs a part of the cluster for itself
        num_gpus=gpus_per_actor,
    )
