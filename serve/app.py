"""The service on Ray Serve: one deployment of engines for each set of weights, and one that speaks HTTP.

    serve run serve.app:build_app models='[{"name": "chat", "path": "/models/chat"}]' insecure=true

`dpo-ray serve` does the same with less typing.
"""

import logging
import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import Application
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)
from ray.serve.handle import DeploymentHandle

from dpo_ray.config import validated
from serve.answers import ReplicaLost
from serve.config import ServeConfig, ServedModel
from serve.process import EngineProcess, schedule
from serve.schema import ApiError, Ask, Begun, Load, Piece, Reward

DRAIN_S = 120.0
"""An old replica has so long to finish its streams."""

GONE = (RayActorError, ReplicaUnavailableError, DeploymentUnavailableError)
INGRESS_REQUESTS = 4096
"""Requests that a process that speaks HTTP has open; those that no engine has room for are refused before."""

NORMAL_PRIORITY = {"RAY_worker_niceness": "0"}
"""Ray gives its workers a low one, as for work that nobody waits for; an engine would stand behind its own clients."""


class EngineReplica:
    """An engine on Ray Serve."""

    def __init__(self, served: dict[str, Any], max_tokens: int) -> None:
        model = ServedModel.model_validate(served)
        self._name = model.name
        schedule("SCHED_BATCH")
        self._engine = EngineProcess(model, max_tokens)

    async def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        """See `Engine.write`."""
        await self._here(ask.model)
        source = self._engine.write(ask)
        try:
            async for item in source:
                yield item
        finally:
            await source.aclose()

    async def rewards(self, model: str, items: Any) -> list[list[Reward]] | ApiError:
        """See `Engine.rewards`."""
        await self._here(model)
        return await self._engine.rewards(model, items)

    async def load(self) -> Load:
        return self._engine.load()

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises."""
        problem = self._engine.problem()
        if problem is not None:
            raise RuntimeError(problem)

    async def _here(self, name: str) -> None:
        """Let Ray Serve know which adapters are in memory here: their requests come to where they are."""
        if name != self._name:
            await self._adapter(name)

    @serve.multiplexed(max_num_models_per_replica=8)  # type: ignore[untyped-decorator]
    async def _adapter(self, name: str) -> str:
        return name

    def __del__(self) -> None:
        engine = getattr(self, "_engine", None)
        if engine is not None:
            engine.close()


class RayBackend:
    """The engines behind their handles."""

    def __init__(self, config: ServeConfig, handles: Mapping[str, DeploymentHandle]) -> None:
        self._config, self._handles = config, handles

    async def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        """See `Backend.write`."""
        found = self._handle(ask.model).options(stream=True).write.remote(ask)
        is_over = False
        try:
            async for item in found:
                yield item
            is_over = True
        except BackPressureError:
            is_over = True
            raise _busy() from None
        except GONE as error:
            is_over = True
            raise ReplicaLost(str(error)) from None
        finally:
            if not is_over:
                found.cancel()

    async def rewards(self, model: str, items: Any) -> list[list[Reward]] | ApiError:
        """See `Backend.rewards`. They are the same wherever they are computed, so another replica is asked again."""
        for _ in range(3):
            try:
                found: list[list[Reward]] | ApiError = await self._handle(model).rewards.remote(model, items)
                return found
            except BackPressureError:
                raise _busy() from None
            except GONE:
                continue
        return ApiError(503, "no replica could answer", code="replica_lost", retry_after_s=2)

    async def loads(self) -> dict[str, Sequence[Load]]:
        """See `Backend.loads`."""
        found = {}
        for name, handle in self._handles.items():
            try:
                found[name] = await handle.broadcast("load").results_async(timeout_s=5)
            except (RayError, RayServeException, TimeoutError):
                found[name] = []
            if not found[name]:
                raise ApiError(503, f"no replica of `{name}` answers", code="not_ready", retry_after_s=2)
        return found

    def _handle(self, name: str) -> DeploymentHandle:
        served = self._config.model_behind(name)
        handle = self._handles[served.name]
        return handle if name == served.name else handle.options(multiplexed_model_id=name)


def _busy() -> ApiError:
    return ApiError(429, "all engines are busy, and enough requests wait", code="overloaded", retry_after_s=1)


@serve.ingress()
class Ingress:
    """The process that speaks HTTP."""

    def __init__(self, config: dict[str, Any], handles: dict[str, DeploymentHandle]) -> None:
        schedule("SCHED_BATCH")
        # Into Ray Serve's own log of this replica, which is rotated: logs/serve/replica_dpo-ray_ingress_*.log.
        for handler in logging.getLogger("ray.serve").handlers:
            logging.getLogger("dpo_ray.serve").addHandler(handler)
        self._config = ServeConfig.model_validate(config)
        self._backend = RayBackend(self._config, handles)

    def __serve_build_asgi_app__(self) -> FastAPI:
        from serve.api import create_api

        return create_api(self._config, self._backend)


def build_app(args: dict[str, Any] | ServeConfig) -> Application:
    """The application of some arguments; see `ServeConfig`.

    Raises:
        InputError: An argument is wrong; names it.
    """
    config = args if isinstance(args, ServeConfig) else validated(ServeConfig, args)
    engines = {model.name: _engines(model, config.limits.max_tokens) for model in config.models}
    ingress = serve.deployment(Ingress).options(
        name="ingress",
        num_replicas=config.ingress_replicas,
        max_ongoing_requests=INGRESS_REQUESTS,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        max_surge_percent=100,
        ray_actor_options={"num_cpus": 0},
    )
    return ingress.bind(config.model_dump(mode="json"), engines)


def _engines(model: ServedModel, max_tokens: int) -> Application:
    scaling = {
        "min_replicas": model.min_replicas,
        "max_replicas": model.max_replicas,
        "target_ongoing_requests": max(1, model.concurrency // 2),
        "upscale_delay_s": 5,
        "downscale_delay_s": 120,
    }
    is_fixed = model.min_replicas == model.max_replicas
    deployment = serve.deployment(EngineReplica).options(
        name=re.sub(r"[^A-Za-z0-9_-]", "-", f"engine-{model.name}"),
        **({"num_replicas": model.min_replicas} if is_fixed else {"autoscaling_config": scaling}),
        max_ongoing_requests=model.concurrency,
        max_queued_requests=model.max_queued,
        graceful_shutdown_timeout_s=DRAIN_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        max_surge_percent=100,
        ray_actor_options={
            "num_cpus": model.num_cpus,
            "num_gpus": model.num_gpus,
            "runtime_env": {"env_vars": NORMAL_PRIORITY},
        },
    )
    return deployment.bind(model.model_dump(mode="json"), max_tokens)
