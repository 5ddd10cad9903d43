"""Does serving cost much beside the engine alone, and how does it stand beside `transformers serve`?

A Llama of about 33 M random parameters, fp32, on the two cores of one machine; loopback only. 32 clients ask for 128
answers, each one after the other, to prompts of real pairs; an answer has as many tokens as the real one has words, 8
to 128. Each has its turn, the others idle:

    offline             the engine in this process, no HTTP: 32 answers at work, one torch thread
    ours                `dpo-ray serve`, one replica of one torch thread; streams
    transformers, cb    `transformers serve --continuous-batching` of the same sizes; streams
    transformers        `transformers serve` as it is; streams

Tokens are those that the server counts in its answers. A last part sends ours ten times what it has room for, and asks
again at once.

    python benchmarks/serving.py [--repeats 3] [--clients 32] [--rounds 4] [--data hh|tldr]
"""

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from common import arguments, data_of, make_model, ratios, spread, table, write

PROMPT_WORDS = 24
MIN_TOKENS, MAX_TOKENS = 8, 128
BIN = Path(sys.executable).parent
KEY = "dpo-a-key-for-the-benchmark"
CONTENDERS = ("offline", "ours", "transformers, cb", "transformers")


class Wanted(NamedTuple):
    """One answer."""

    prompt: str
    max_tokens: int


def wanted_of(data: str, number: int = 256) -> list[Wanted]:
    """The beginnings of real prompts, and the lengths of their answers: equal ones would all end at the same moment."""
    from dpo_ray.config import DataConfig, SourceConfig
    from dpo_ray.data.mixture import load_pool

    pool = load_pool(DataConfig(sources=(SourceConfig(path=data),), num_pairs=number))
    return [
        Wanted(
            " ".join(_text(pair.prompt).split()[:PROMPT_WORDS]),
            min(max(len(_text(pair.chosen).split()), MIN_TOKENS), MAX_TOKENS),
        )
        for pair in pool.train
    ]


def _text(text: Any) -> str:
    from dpo_ray.data.formats import transcript

    return text if isinstance(text, str) else transcript(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(command: list[str], url: str, environment: dict[str, str], log: Path) -> Iterator[None]:
    """A server that answers, until the context ends."""
    import requests

    with log.open("w") as file:
        process = subprocess.Popen(
            command, env=os.environ | environment, stdout=file, stderr=file, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while True:
            try:
                if requests.get(url, timeout=2).status_code == 200:
                    break
            except requests.RequestException:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit(f"{command[0]} does not serve:\n{log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


async def offline(engine: Any, wanted: Iterator[Wanted], clients: int) -> dict[str, Any]:
    """As many answers at work all the time, without HTTP."""
    from serve.schema import Ask

    tokens, began = 0, time.perf_counter()

    async def client() -> None:
        nonlocal tokens
        for prompt, max_tokens in wanted:
            async for item in engine.write(Ask("bench", (prompt,), max_tokens=max_tokens, seed=0)):
                if isinstance(item, list):
                    tokens += sum(piece.num_tokens for piece in item)

    await asyncio.gather(*(client() for _ in range(clients)))
    return {"tokens_per_s": tokens / (time.perf_counter() - began)}


async def over_http(url: str, model: str, wanted: Iterator[Wanted], clients: int) -> dict[str, Any]:
    """Streams, one after the other from each client: tokens as the server counts them, times as the client sees."""
    import aiohttp

    tokens, first, between, statuses = 0, list[float](), list[float](), Counter[int]()
    started = time.perf_counter()

    async def client(session: aiohttp.ClientSession) -> None:
        nonlocal tokens
        for prompt, max_tokens in wanted:
            body = {"model": model, "prompt": prompt, "max_tokens": max_tokens}
            body |= {"temperature": 1.0, "stream": True, "stream_options": {"include_usage": True}}
            began, at, counted = time.perf_counter(), list[float](), 0
            async with session.post(f"{url}/v1/completions", json=body) as response:
                statuses[response.status] += 1
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    counted = (chunk.get("usage") or {}).get("completion_tokens", counted)
                    if any(choice.get("text") for choice in chunk.get("choices", [])):
                        at.append(time.perf_counter())
            tokens += counted
            if at and counted > 1:
                first.append(at[0] - began)
                between.append((at[-1] - at[0]) / (counted - 1))

    headers = {"Authorization": f"Bearer {KEY}"}
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return {
        "tokens_per_s": tokens / (time.perf_counter() - started),
        "tokens": tokens,
        "first_ms": [1000 * quantile(first, q) for q in (0.5, 0.99)],
        "between_ms": [1000 * quantile(between, q) for q in (0.5, 0.99)],
        "statuses": dict(statuses),
    }


def quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(q * len(values)))] if values else float("nan")


async def overload(url: str, wanted: list[Wanted], clients: int) -> dict[str, Any]:
    """So many requests at once, and one more when they are over."""
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=300)
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector) as session:

        async def ask(number: int) -> int:
            prompt, max_tokens = wanted[number % len(wanted)]
            body = {"model": "bench", "prompt": prompt, "max_tokens": max_tokens}
            async with session.post(f"{url}/v1/completions", json=body) as response:
                await response.read()
                return response.status

        statuses = Counter(await asyncio.gather(*(ask(number) for number in range(clients))))
        began = time.perf_counter()
        after = await ask(0)
    return {"statuses": dict(statuses), "after": after, "after_s": time.perf_counter() - began}


def main() -> None:
    parser = arguments(__doc__ or "", pairs=0, repeats=3)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4, help="Answers to each client, in the mean.")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="Leave the others out.")
    options = parser.parse_args()
    data = data_of(options)
    wanted = wanted_of(data)
    contenders = [name for name in CONTENDERS if name in options.only]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        model = folder / "bench"
        make_model(model, data)
        keep_writing(model)
        urls = {name: f"http://127.0.0.1:{free_port()}" for name in CONTENDERS[1:]}
        ports = {name: url.rpartition(":")[2] for name, url in urls.items()}
        sizes = ["--cb-block-size", "32", "--cb-num-blocks", "200", "--cb-max-batch-tokens", "256"]
        plain = [str(BIN / "transformers"), "serve", str(model), "--device", "cpu", "--dtype", "float32"]
        commands = {
            "ours": [
                *(str(BIN / "dpo-ray"), "serve", str(model), "--name", "bench", "--port", ports["ours"]),
                *("--preferences", "none", "--address", "local", f"--set=concurrency={options.clients}"),
            ],
            "transformers, cb": [*plain, "--port", ports["transformers, cb"], "--continuous-batching", *sizes],
            "transformers": [*plain, "--port", ports["transformers"]],
        }
        threads = {"OMP_NUM_THREADS": "1"}  # two per process are slower: the cores have more to do than multiply
        for name, command in commands.items():
            if name not in contenders:
                continue
            ready = f"{urls[name]}/{'readyz' if name == 'ours' else 'health'}"
            extra = {"DPO_RAY_API_KEY": KEY, "RAY_AUTH_MODE": "disabled"} if name == "ours" else threads
            stack.enter_context(server(command, ready, extra, folder / f"{name}.log"))

        import torch

        from serve.config import ServedModel
        from serve.engine import Engine

        torch.set_num_threads(1)
        engine = Engine(ServedModel(name="bench", path=str(model), concurrency=options.clients))
        stack.callback(engine.close)

        def measure(name: str, clients: int, rounds: int) -> dict[str, Any]:
            queue = itertools.islice(itertools.cycle(wanted), clients * rounds)
            if name == "offline":
                return asyncio.run(offline(engine, queue, clients))
            called = "bench" if name == "ours" else str(model)
            return asyncio.run(over_http(urls[name], called, queue, clients))

        for name in contenders:  # to warm up
            measure(name, 4, 1)
        for _ in range(options.repeats):
            for name in contenders:
                # One after the other, an answer takes as long whatever waits: one round is enough to know that.
                runs[name].append(measure(name, options.clients, 1 if name == "transformers" else options.rounds))
        flood = asyncio.run(overload(urls["ours"], wanted, 10 * options.clients))
    told = told_of(runs, flood)
    write("serving", vars(options), {"runs": runs, "overload": flood}, told)


def keep_writing(model: Path) -> None:
    """Let no token of the model's own settings end an answer; the weights are random, so it hardly comes anyway."""
    for name in ("generation_config.json", "config.json"):
        file = model / name
        tree = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(tree | {"eos_token_id": None}))


def told_of(runs: dict[str, list[dict[str, Any]]], flood: dict[str, Any]) -> str:
    rates = {name: [run["tokens_per_s"] for run in listed] for name, listed in runs.items()}
    rows = []
    for name, listed in runs.items():
        row = [name, spread(rates[name], 0), spread(ratios(rates[name], rates["offline"]))]
        for key in ("first_ms", "between_ms"):
            row += [spread([run[key][i] for run in listed], 0) if key in listed[0] else "" for i in (0, 1)]
        rows.append(row)
    head = ["", "tokens/s", "of offline", "first token p50, ms", "p99", "between tokens p50, ms", "p99"]
    lines = [table(head, rows), ""]
    for name in [name for name in runs if name.startswith("transformers")]:
        lines.append(f"Ours beside `{name}`: {spread(ratios(rates['ours'], rates[name]), 2, ' times')} the tokens/s.")
    lines.append(
        f"Ten times as many requests at once: {flood['statuses']}; the next one after them: {flood['after']} in "
        f"{1000 * flood['after_s']:.0f} ms."
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
