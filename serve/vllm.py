"""vLLM in the place of transformers' continuous batching, where it is installed and there is a GPU.

Written to vLLM's documented interface (`AsyncLLMEngine`, 0.11 and later) and tested against that alone: it has not run
on a GPU yet. Its seeds give other texts than transformers.
"""

import asyncio
import importlib
from collections.abc import Callable
from typing import Any

from dpo_ray.generate import Load, Progress, Request
from dpo_ray.models import DTYPES, ModelSource


class VllmEngine:
    """One set of weights in vLLM, with any adapters."""

    def __init__(
        self,
        source: ModelSource,
        precision: str,
        end_tokens: frozenset[int],
        *,
        longest: int,
        concurrency: int,
        max_adapters: int,
    ) -> None:
        self._vllm: Any = importlib.import_module("vllm")
        self.end_tokens = end_tokens
        lora = {"enable_lora": True, "max_loras": max_adapters} if max_adapters else {}
        self.engine: Any = self._vllm.AsyncLLMEngine.from_engine_args(
            self._vllm.AsyncEngineArgs(
                model=source.path,
                trust_remote_code=source.trust_remote_code,
                dtype=str(DTYPES[precision]).removeprefix("torch."),
                max_model_len=longest,
                max_num_seqs=concurrency,
                logprobs_mode="raw_logprobs",  # of the model itself: before temperature, top_p and penalties
                generation_config="vllm",  # no defaults of the model's
                **lora,
            )
        )

    def params(self, request: Request) -> Any:
        sampling = request.sampling
        return self._vllm.SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            max_tokens=sampling.max_tokens,
            seed=request.seed,
            stop_token_ids=sorted(self.end_tokens),
            logprobs=0,  # of the drawn token alone
            detokenize=False,
        )

    def adapter(self, name: str, number: int, folder: str) -> Any:
        return importlib.import_module("vllm.lora.request").LoRARequest(name, number, folder)


class VllmBatching:
    """Requests to one model or adapter in vLLM; see `ContinuousBatching`."""

    def __init__(self, engine: VllmEngine, adapter: Any = None) -> None:
        self._engine, self._adapter = engine, adapter
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._steps = 0

    def stream(self, name: str, request: Request, deliver: Callable[[Progress], object], *, by_token: bool) -> None:
        """See `ContinuousBatching.stream`."""
        self._tasks[name] = asyncio.get_running_loop().create_task(self._run(name, request, deliver, by_token))

    async def _run(self, name: str, request: Request, deliver: Callable[[Progress], object], by_token: bool) -> None:
        outputs = self._engine.engine.generate(
            {"prompt_token_ids": request.prompt_ids.tolist()},
            self._engine.params(request),
            name,
            **({} if self._adapter is None else {"lora_request": self._adapter}),
        )
        try:
            async for output in outputs:
                self._steps += 1
                if by_token or output.finished:
                    ids = list(output.outputs[0].token_ids)
                    logps = [at[i].logprob for at, i in zip(output.outputs[0].logprobs, ids, strict=True)]
                    deliver(Progress(name, ids, logps, output.finished))
        except (RuntimeError, ValueError) as error:
            deliver(Progress(name, (), (), True, " ".join(str(error).split())[:300] or "vLLM failed"))
        finally:
            self._tasks.pop(name, None)

    def cancel(self, name: str) -> None:
        """See `ContinuousBatching.cancel`. vLLM ends a request whose generator is cancelled."""
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()

    @property
    def load(self) -> Load:
        """vLLM tells its queue and its cache in its own metrics."""
        return Load(len(self._tasks), 0, 0.0, self._steps)

    @property
    def is_running(self) -> bool:
        return not self._engine.engine.errored

    def close(self) -> None:
        for name in list(self._tasks):
            self.cancel(name)
