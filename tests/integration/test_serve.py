"""The service on Ray Serve, started by the command: the official client, a killed replica, an update, overload."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
import requests
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.ray

COMMAND = str(Path(sys.executable).with_name("dpo-ray"))
SECRET = "dpo-a-key-for-tests-0123456789"
HEADERS = {"Authorization": f"Bearer {SECRET}"}


@pytest.fixture(scope="module")
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        found: int = probe.getsockname()[1]
        return found


@pytest.fixture(scope="module")
def serve_model(cluster: None, port: int) -> Callable[[Path], None]:
    """Serve a model, or update the service to it."""
    import ray

    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "DPO_RAY_API_KEY": SECRET}

    def command(model: Path) -> None:
        options = ["--name", "tiny", "--port", str(port), "--replicas", "2", "--preferences", "none", "--detach"]
        options += [f"--set={key}" for key in ("num_cpus=0.4", "concurrency=4", "max_queued=16")]
        done = subprocess.run(
            [COMMAND, "serve", str(model), *options], env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        assert f"serving tiny at http://127.0.0.1:{port}/v1" in done.stderr
        assert SECRET not in done.stderr + done.stdout

    return command


@pytest.fixture(scope="module")
def url(serve_model: Callable[[Path], None], tiny_model: Path, port: int) -> Iterator[str]:
    from ray import serve

    serve_model(tiny_model)
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0, timeout=60)


def text(client: openai.OpenAI, seed: int, num_tokens: int = 40) -> str:
    found = client.completions.create(model="tiny", prompt="Once upon", max_tokens=num_tokens, seed=seed)
    return found.choices[0].text


@contextmanager
def load(client: openai.OpenAI, num_clients: int) -> Iterator[tuple[list[Any], list[Any]]]:
    """Clients that ask without a pause, whole and streamed by turns: (seed, text) or errors of each kind."""
    whole: list[Any] = []
    streamed: list[Any] = []
    ended = threading.Event()
    seeds = itertools.count()

    def ask() -> None:
        while not ended.is_set():
            seed = next(seeds) % 16
            try:
                if seed % 4:
                    whole.append((seed, text(client, seed)))
                else:
                    chunks = client.completions.create(
                        model="tiny", prompt="Once upon", max_tokens=40, seed=seed, stream=True
                    )
                    streamed.append((seed, "".join(c.choices[0].text for c in chunks if c.choices)))
            except openai.APIError as error:
                (whole if seed % 4 else streamed).append(error)

    threads = [threading.Thread(target=ask) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    try:
        yield whole, streamed
    finally:
        ended.set()
        for thread in threads:
            thread.join(60)


def engines() -> list[psutil.Process]:
    named = "ray::ServeReplica:dpo-ray:engine-tiny"
    return [process for process in psutil.process_iter(["cmdline"]) if named in " ".join(process.info["cmdline"] or [])]


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.2)


def test_the_official_client_is_answered(client: openai.OpenAI, url: str):
    asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Once"}], "max_tokens": 20}
    whole = client.chat.completions.create(**asked, seed=1)
    chunks = client.chat.completions.create(**asked, seed=1, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    with pytest.raises(openai.BadRequestError, match="room for"):
        client.chat.completions.create(**(asked | {"max_tokens": 10_000}))
    assert requests.get(f"{url}/readyz", timeout=30).json() == {"status": "ready"}
    assert requests.get(f"{url}/v1/models", timeout=30).status_code == 401
    assert 'dpo_ray_replicas{model="tiny"} 2.0' in requests.get(f"{url}/metrics", headers=HEADERS, timeout=30).text


@pytest.mark.skipif(sys.platform != "linux", reason="Linux schedules by policy")
def test_engines_come_before_those_who_carry_their_pieces(client: openai.OpenAI):
    for replica in engines():
        (engine,) = replica.children()
        assert (os.sched_getscheduler(engine.pid), engine.nice()) == (os.SCHED_OTHER, 0)
        policies = [os.sched_getscheduler(thread.id) for thread in replica.threads()]
        assert policies.count(os.SCHED_BATCH) > len(policies) // 2


def test_whoever_hangs_up_frees_the_engines(url: str):
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 200, "n": 8}

    def at_work() -> float:
        lines = requests.get(f"{url}/metrics", headers=HEADERS, timeout=30).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(("dpo_ray_running", "dpo_ray_waiting")))

    for is_stream in (True, False):
        with pytest.raises(requests.RequestException):  # noqa: PT012
            asked = requests.post(
                f"{url}/v1/completions", json=body | {"stream": is_stream}, headers=HEADERS, timeout=0.15, stream=True
            )
            asked.close()
            raise requests.RequestException
        wait_for(lambda: at_work() == 0)


def test_a_killed_replica_loses_no_whole_answer(client: openai.OpenAI):
    expected = {seed: text(client, seed) for seed in range(16)}
    with load(client, 6) as (whole, streamed):
        wait_for(lambda: len(whole) > 20)
        victim = engines()[0]
        victim.send_signal(signal.SIGKILL)
        before = len(whole)
        wait_for(lambda: len(whole) > before + 20)
        wait_for(lambda: len(engines()) == 2 and victim.pid not in [process.pid for process in engines()])
        before = len(whole)
        wait_for(lambda: len(whole) > before + 20)
    assert [item for item in whole if not isinstance(item, tuple)] == []
    assert {item for item in whole if item[1] != expected[item[0]]} == set()
    cut = [item for item in streamed if not isinstance(item, tuple)]
    assert all("replica" in str(error) for error in cut)
    assert len(cut) <= 4  # those that were at work on it
    assert {item for item in streamed if isinstance(item, tuple) and item[1] != expected[item[0]]} == set()


def test_an_update_to_another_model_fails_no_request(
    client: openai.OpenAI,
    serve_model: Callable[[Path], None],
    tiny_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
):
    folder = tmp_path_factory.mktemp("new") / "model"
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(5)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)

    old = {seed: text(client, seed) for seed in range(16)}
    with load(client, 4) as (whole, streamed):
        wait_for(lambda: len(whole) > 10)
        serve_model(folder)
        before = len(whole)
        wait_for(lambda: len(whole) > before + 20)
    new = {seed: text(client, seed) for seed in range(16)}
    answers = [*whole, *streamed]
    assert [item for item in answers if not isinstance(item, tuple)] == []
    assert all(answer in (old[seed], new[seed]) for seed, answer in answers)
    assert any(answer == new[seed] != old[seed] for seed, answer in answers)


def test_overload_is_refused_and_soon_over(url: str, client: openai.OpenAI):
    body = {"model": "tiny", "prompt": "Once", "max_tokens": 150, "temperature": 0.0}

    def ask(_: int) -> requests.Response:
        return requests.post(f"{url}/v1/completions", json=body, headers=HEADERS, timeout=120)

    with ThreadPoolExecutor(80) as pool:  # 10 times what 2 replicas of 4 write at once
        answers = list(pool.map(ask, range(240)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}, {status: statuses.count(status) for status in statuses}
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "overloaded"
    assert text(client, 1)
