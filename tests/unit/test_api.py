"""The HTTP service through the official client, and against everything that is not one."""

import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import openai
import pytest
import requests
import uvicorn

from dpo_ray.acquisition.label_queue import LabelQueue
from dpo_ray.config import SourceConfig
from dpo_ray.data.formats import to_pairs
from dpo_ray.data.sources import read_rows
from dpo_ray.pairs import Candidate
from dpo_ray.storage import Folder
from serve.answers import pick
from serve.api import LocalBackend, Service, create_api
from serve.auth import ApiKey, digest
from serve.config import Limits, ServeConfig, ServedModel
from serve.engine import Engine
from serve.guard import PUBLIC
from serve.metrics import Metrics
from serve.schema import Ask, Load

SECRET = "dpo-a-key-for-tests-0123456789"
KEY = ApiKey(name="tests", sha256=digest(SECRET))
BEARER = {"Authorization": f"Bearer {SECRET}"}
CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Once upon"}], "max_tokens": 5}


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> ServedModel:
    return ServedModel(name="tiny", path=str(tiny_model), reference=str(tiny_model), beta=0.5)


@pytest.fixture(scope="module")
def engine(served: ServedModel) -> Iterator[Engine]:
    made = Engine(served, max_tokens=100)
    yield made
    made.close()


@contextmanager
def running(engine: Any, served: ServedModel, **options: Any) -> Iterator[tuple[str, Service]]:
    """URL of a service on a free port of this process, until the context ends; then nothing may be left of it."""
    config = ServeConfig(**({"models": (served,), "api_keys": (KEY,)} | options))
    app = create_api(config, LocalBackend(dict.fromkeys(config.real_names, engine)))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}", app.state.service
        idle(engine, app.state.service)
    finally:
        server.should_exit = True
        thread.join(10)


class AnyName:
    """An engine that answers to every name."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.load, self.problem = engine.load, engine.problem

    def write(self, ask: Ask) -> Any:
        return self._engine.write(ask._replace(model="tiny"))


def idle(engine: Any, service: Service) -> None:
    """Nothing is left at work: no request, no answer, no part of the cache, nothing on a key's account."""
    for _ in range(200):
        load = engine.load()
        open_requests = service.metrics.open._value.get()
        held = sum(service.meter._at_work.values())
        if (load.running, load.waiting, load.cache_used, open_requests, held) == (0, 0, 0.0, 0, 0):
            return
        time.sleep(0.05)
    pytest.fail(f"left: {load}, {open_requests} requests, {held} counted")


@pytest.fixture(scope="module")
def url(engine: Engine, served: ServedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("service")
    queue = LabelQueue(Folder(str(folder / "queue")), 1, 15.0)
    queue.add([Candidate.of("Which?", "this", "that")])
    limits = Limits(max_body_bytes=20_000, body_timeout_s=1.0)
    options = {"preferences": str(folder / "preferences"), "queue": folder / "queue", "limits": limits}
    with running(engine, served, **options) as (found, _):
        yield found


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0)


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI):
    asked: dict[str, Any] = CHAT | {"seed": 7, "max_tokens": 30}
    whole = client.chat.completions.create(**asked)
    assert whole.object == "chat.completion"
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 30
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    assert len({c.id for c in chunks}) == 1


def test_completions_have_all_prompts_and_answers_in_order(client: openai.OpenAI):
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["Once", "The dog"], "n": 2, "max_tokens": 6, "seed": 1}
    whole = client.completions.create(**asked, logprobs=0)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.choices[0].logprobs is not None
    assert "".join(whole.choices[0].logprobs.tokens or []) == whole.choices[0].text
    texts = [""] * 4
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in whole.choices]
    alone = client.completions.create(**(asked | {"prompt": "The dog"}))
    assert [choice.text for choice in alone.choices] == texts[2:]


def test_log_probs_of_a_chat(client: openai.OpenAI):
    whole = client.chat.completions.create(**CHAT, logprobs=True, seed=3)
    assert whole.choices[0].logprobs is not None
    told = whole.choices[0].logprobs.content or []
    assert "".join(item.token for item in told) == whole.choices[0].message.content
    assert all(item.logprob <= 0 for item in told)


def test_models_are_listed(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("more", "kind", "param", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "model_not_found"),
        ({"max_tokens": 101}, openai.BadRequestError, "max_tokens", "context_length_exceeded"),
        ({"temperature": 3.0}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"n": 0}, openai.BadRequestError, "n", "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "invalid_value"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", None),
        ({"extra_body": {"top_k": 5}}, openai.BadRequestError, "top_k", "unknown_parameter"),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_errors_are_those_of_the_client(
    client: openai.OpenAI, more: dict[str, Any], kind: Any, param: str, code: str | None, is_stream: bool
):
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**(CHAT | more), stream=is_stream)
    body = cast(dict[str, Any], caught.value.body)
    assert body["param"] == param
    assert code is None or body["code"] == code
    assert caught.value.request_id or caught.value.response.headers["x-request-id"]


def test_a_wrong_key_is_an_authentication_error(url: str):
    wrong = openai.OpenAI(base_url=f"{url}/v1", api_key="dpo-wrong-key-0123456789", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        wrong.models.list()


def test_rewards(url: str):
    items = [{"prompt": "Once", "responses": [" upon", " a"]}, {"messages": CHAT["messages"], "responses": ["x"]}]
    found = requests.post(f"{url}/v1/rewards", json={"model": "tiny", "input": items}, headers=BEARER, timeout=30)
    assert found.status_code == 200
    data = found.json()["data"]
    assert [len(item["rewards"]) for item in data] == [2, 1]
    assert all(abs(reward["reward"]) < 1e-4 for item in data for reward in item["rewards"])  # it is its own reference
    assert data[0]["rewards"][0]["logps"] < 0


def test_a_preference_is_recorded(url: str):
    asked = {
        "prompt": [{"role": "user", "content": "Which?"}],
        "first": {"text": "this", "model": "tiny"},
        "second": {"text": "that", "model": "other"},
        "preferred": "second",
    }
    found = requests.post(f"{url}/v1/preferences", json=asked, headers=BEARER, timeout=30)
    assert found.status_code == 201
    text = requests.get(f"{url}/metrics", headers=BEARER, timeout=30).text
    assert 'dpo_ray_preferences_total{blind="false"} 1.0' in text


def test_preferences_are_read_by_training(engine: Engine, served: ServedModel, tmp_path: Path):
    folder = tmp_path / "preferences"
    with running(engine, served, preferences=str(folder)) as (url, _):
        for preferred in ("first", "second", "tie"):
            asked = {"prompt": "Which?", "preferred": preferred}
            asked |= {side: {"text": f"{side} text", "model": side} for side in ("first", "second")}
            requests.post(f"{url}/v1/preferences", json=asked, headers=BEARER, timeout=30).raise_for_status()
    source = SourceConfig(path=str(folder))
    parsed = [to_pairs(row, source) for row in read_rows(source)]
    pairs = [pair for part in parsed for pair in part.pairs]
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [
        ("first text", "second text"),
        ("second text", "first text"),
    ]
    assert sum(part.ties for part in parsed) == 1


@pytest.mark.parametrize(("chat", "prompt"), [("plain", "Which?"), ("template", [CHAT["messages"][0]])])
def test_a_blind_vote_is_kept_as_the_models_would_learn_it(
    engine: Engine, served: ServedModel, tmp_path: Path, chat: str, prompt: Any
):
    models = tuple(served.model_copy(update={"name": name, "chat": chat}) for name in ("one", "two"))
    text = prompt if isinstance(prompt, str) else prompt[0]["content"]
    options = {"models": models, "compare": ("one", "two"), "preferences": str(tmp_path / "kept")}
    with running(AnyName(engine), served, **options) as (url, _):
        body = {"comparison": "0123456789", "messages": [{"role": "user", "content": text}]}
        vote = body | {"left": "this", "right": "that", "preferred": "right"}
        found = requests.post(f"{url}/compare/vote", json=vote, headers=BEARER, timeout=30).json()
        assert {found["left_model"], found["right_model"]} == {"one", "two"}
    (row,) = (json.loads(line) for line in (tmp_path / "kept/preferences.jsonl").read_text().splitlines())
    assert (row["prompt"], row["model_2"], row["label"]) == (prompt, found["right_model"], 2)


def routes(url: str) -> list[tuple[str, str]]:
    """Every route of the service, from its own description and the pages."""
    paths = requests.get(f"{url}/openapi.json", headers=BEARER, timeout=30).json()["paths"]
    listed = [(method, path.replace("{name}", "tiny")) for path, methods in paths.items() for method in methods]
    return [*listed, ("get", "/openapi.json"), ("get", "/nothing"), ("delete", "/v1/models"), ("options", "/v1/models")]


def test_nobody_without_a_key_gets_anything(url: str):
    walked = routes(url)
    assert len(walked) > 15
    for method, path in walked:
        for headers in ({}, {"Authorization": "Bearer dpo-wrong"}, {"Authorization": f"Basic {SECRET}"}):
            found = requests.request(method, url + path, json=CHAT, headers=headers, timeout=30)
            if method == "get" and PUBLIC.fullmatch(path):
                assert found.status_code in (200, 404)
                assert "Which?" not in found.text
            else:
                assert found.status_code == 401, (method, path)
                assert found.json()["error"]["code"] in ("missing_api_key", "invalid_api_key")
    for path in (
        "//v1/models",
        "/static/../v1/models",
        "/healthz/../metrics",
        "/compare/stream",
        "/label/task?person=a",
    ):
        assert requests.get(url + path, timeout=30).status_code in (401, 404), path


def test_the_file_of_a_page_is_not_in_its_url(url: str):
    assert "<html" in requests.get(f"{url}/?name=style.css", timeout=30).text
    assert requests.get(f"{url}/static/..%2Fapi.py", timeout=30).status_code in (401, 404)


def test_pages_may_load_nothing_from_elsewhere(url: str):
    for path in ("/", "/compare", "/label"):
        headers = requests.get(url + path, timeout=30).headers
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
    denied = requests.get(f"{url}/v1/models", headers=BEARER | {"Origin": "https://elsewhere.example"}, timeout=30)
    assert "access-control-allow-origin" not in denied.headers


def test_cors_is_for_those_who_are_named(engine: Engine, served: ServedModel):
    with running(engine, served, cors=("https://friend.example",)) as (url, _):
        for origin, expected in (("https://friend.example", "https://friend.example"), ("https://foe.example", None)):
            asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            found = requests.options(f"{url}/v1/chat/completions", headers=asked, timeout=30)
            assert found.headers.get("access-control-allow-origin") == expected


def test_without_keys_only_loopback_names_are_answered(engine: Engine, served: ServedModel):
    with running(engine, served, api_keys=(), insecure=True) as (url, _):
        assert requests.get(f"{url}/v1/models", timeout=30).status_code == 200
        rebound = requests.get(f"{url}/v1/models", headers={"Host": "evil.example"}, timeout=30)
        assert rebound.status_code == 403
        form = requests.post(f"{url}/v1/chat/completions", data=json.dumps(CHAT), timeout=30)
        assert form.status_code == 415


@pytest.mark.parametrize(
    ("limit", "value", "code"),
    [("requests_per_minute", 2, "requests_per_minute"), ("tokens_per_minute", 30, "tokens_per_minute")],
)
def test_limits_of_a_key(engine: Engine, served: ServedModel, limit: str, value: int, code: str):
    key = KEY.model_copy(update={limit: value})
    with running(engine, served, api_keys=(key,)) as (url, _):
        answers = [requests.post(f"{url}/v1/chat/completions", json=CHAT, headers=BEARER, timeout=30) for _ in range(4)]
        assert [found.status_code for found in answers[:2]] == [200, 200]
        assert answers[3].status_code == 429
        assert code in answers[3].json()["error"]["message"]
        assert 1 <= int(answers[3].headers["retry-after"]) <= 60


def test_requests_of_a_key_at_the_same_time_are_limited(engine: Engine, served: ServedModel):
    with running(engine, served, api_keys=(KEY.model_copy(update={"concurrent": 1}),)) as (url, _):
        asked = CHAT | {"stream": True, "max_tokens": 100}
        with requests.post(f"{url}/v1/chat/completions", json=asked, headers=BEARER, timeout=30, stream=True) as first:
            assert first.status_code == 200
            second = requests.post(f"{url}/v1/chat/completions", json=CHAT, headers=BEARER, timeout=30)
        assert second.status_code == 429 or b"[DONE]" in first.content
        for _ in range(50):
            third = requests.post(f"{url}/v1/chat/completions", json=CHAT, headers=BEARER, timeout=30)
            if third.status_code == 200:
                return
            time.sleep(0.05)
        pytest.fail("the first request is still counted")


def test_traffic_is_split_by_the_shares_and_a_user_keeps_theirs(engine: Engine, served: ServedModel):
    shares = {"tiny": 0.8, "other": 0.2}
    picked = [pick(shares, str(i)) for i in range(4000)]
    assert 0.77 < picked.count("tiny") / 4000 < 0.83
    models = (served, served.model_copy(update={"name": "other"}))
    with running(AnyName(engine), served, models=models, split={"chat": shares}) as (url, _):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=SECRET, max_retries=0)
        asked = CHAT | {"model": "chat", "max_tokens": 1}
        of_user = {client.chat.completions.create(**asked, user="ann").model for _ in range(5)}
        assert of_user == {pick(shares, "ann")}
        assert {client.chat.completions.create(**asked).model for _ in range(40)} == {"tiny", "other"}


def raw(url: str, content: bytes, wait_s: float = 0.0) -> bytes:
    """What comes back when these bytes are sent; the connection is dropped after so long."""
    address = urlsplit(url)
    assert address.hostname is not None
    with socket.create_connection((address.hostname, address.port or 80), timeout=10) as connection:
        connection.sendall(content)
        if not wait_s:
            return b""
        connection.settimeout(wait_s)
        try:
            return connection.recv(65536)
        except TimeoutError:
            return b""


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {SECRET}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


def test_a_thousand_bad_bodies_do_no_harm(url: str, engine: Engine):
    rng = random.Random(0)
    good = json.dumps(CHAT | {"stream": True}).encode()
    values: list[Any] = [None, -1, 1e308, "", "x" * 3000, [], {}, [[]], {"a": 1}, True, "\ud800", [1, "a"], 2**70]
    paths = [
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/rewards",
        "/v1/preferences",
        "/compare/vote",
        "/label/answer",
    ]
    session = requests.Session()
    statuses: dict[int, int] = {}
    for number in range(1000):
        tree: dict[str, Any] = dict(CHAT)
        match number % 4:
            case 0:
                body = bytearray(good)
                for _ in range(rng.randint(1, 6)):
                    body[rng.randrange(len(body))] = rng.randrange(256)
            case 1:
                body = bytearray(good[: rng.randrange(len(good))])
            case 2:
                name = rng.choice([*CHAT, "temperature", "stop", "n", "stream", "seed", "logprobs", "prompt", "input"])
                tree[name] = rng.choice(values)
                body = bytearray(json.dumps(tree).encode())
            case _:
                body = bytearray(rng.randbytes(rng.randrange(200)))
        headers = BEARER | {"Content-Type": "application/json"}
        found = session.post(url + rng.choice(paths), data=bytes(body), headers=headers, timeout=30)
        statuses[found.status_code] = statuses.get(found.status_code, 0) + 1
        if found.status_code != 200:
            assert set(found.json()["error"]) == {"message", "type", "param", "code"}
    assert all(status < 500 for status in statuses), statuses
    assert statuses[400] > 800
    assert engine.problem() is None


def test_schemathesis_finds_no_failure_of_the_service(engine: Engine, served: ServedModel, tmp_path: Path):
    """Requests that fit the service's own description, and those that nearly do."""
    queue = LabelQueue(Folder(str(tmp_path / "queue")), 1, 15.0)
    queue.add([Candidate.of("Which?", "this", "that")])
    options = {"queue": tmp_path / "queue", "preferences": str(tmp_path / "kept"), "compare": ("tiny", "tiny")}
    with running(engine, served, limits=Limits(max_tokens=20), **options) as (url, _):
        command = [Path(sys.executable).parent / "schemathesis", "run", f"{url}/openapi.json", "--seed", "1"]
        command += ["--header", f"Authorization: Bearer {SECRET}", "--checks", "not_a_server_error"]
        command += ["--phases", "coverage,fuzzing", "--max-examples", "6", "--suppress-health-check", "all"]
        done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout[-3000:]
        assert int(re.search(r"(\d+) generated", done.stdout)[1]) > 300  # type: ignore[index]


def test_huge_slow_and_dropped_requests_do_no_harm(url: str, engine: Engine):
    huge = requests.post(
        f"{url}/v1/chat/completions",
        data=b"x" * 30_000,
        headers=BEARER | {"Content-Type": "application/json"},
        timeout=30,
    )
    assert huge.status_code == 413
    nested = b"[" * 15_000
    assert (
        requests.post(
            f"{url}/v1/completions", data=nested, headers=BEARER | {"Content-Type": "application/json"}, timeout=30
        ).status_code
        == 400
    )
    slow = raw(url, post("/v1/chat/completions", b'{"model"', length=100), wait_s=5)
    assert b" 408 " in slow.split(b"\r\n", 1)[0]
    body = json.dumps(CHAT | {"stream": True, "max_tokens": 100}).encode()
    for wait_s in (0.0, 0.001, 0.02, 0.1) * 5:
        raw(url, post("/v1/chat/completions", body), wait_s)
        raw(url, post("/v1/chat/completions", body[:40], length=len(body)), wait_s)
        whole = json.dumps(CHAT | {"max_tokens": 100}).encode()
        raw(url, post("/v1/chat/completions", whole), wait_s)
    assert raw(url, b"\x00\x01\x02 not http\r\n\r\n", wait_s=1).startswith((b"HTTP/1.1 400", b""))
    for _ in range(200):
        load = engine.load()
        if (load.running, load.waiting, load.cache_used) == (0, 0, 0.0):
            break
        time.sleep(0.05)
    else:
        pytest.fail(f"still at work: {engine.load()}")
    found = requests.post(f"{url}/v1/chat/completions", json=CHAT, headers=BEARER, timeout=30)
    assert found.status_code == 200


def test_logs_have_no_text_unless_asked(engine: Engine, served: ServedModel, caplog: pytest.LogCaptureFixture):
    for log_text in (False, True):
        caplog.clear()
        with caplog.at_level("INFO", logger="dpo_ray.serve"), running(engine, served, log_text=log_text) as (url, _):
            for is_stream in (False, True):
                asked = CHAT | {"stream": is_stream}
                found = requests.post(f"{url}/v1/chat/completions", json=asked, headers=BEARER, timeout=30)
                assert found.content
        lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "dpo_ray.serve"]
        assert [line["status"] for line in lines] == [200, 200]
        assert lines[0]["key"] == "tests"
        assert lines[0]["completion_tokens"] == 5
        assert all(("Once upon" in json.dumps(line)) == log_text for line in lines)
        assert all(SECRET not in json.dumps(line) for line in lines)


def test_metrics_count_and_hold_no_text(url: str):
    requests.post(
        f"{url}/v1/chat/completions", json=CHAT | {"stream": True}, headers=BEARER, timeout=30
    ).raise_for_status()
    text = requests.get(f"{url}/metrics", headers=BEARER, timeout=30).text
    for name in ("requests_total", "time_to_first_token_seconds_count", "cache_used_ratio", "engine_tokens"):
        assert re.search(rf"^dpo_ray_{name}\{{.*\}} [0-9.e+]+$", text, re.MULTILINE), name
    assert "Once" not in text


def test_it_is_ready_when_its_engines_are(url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch):
    assert requests.get(f"{url}/healthz", timeout=30).json() == {"status": "ok"}
    assert requests.get(f"{url}/readyz", timeout=30).status_code == 200
    monkeypatch.setattr(engine, "problem", lambda: "no step for 200 s")
    assert requests.get(f"{url}/readyz", timeout=30).status_code == 503
    assert requests.get(f"{url}/healthz", timeout=30).status_code == 200


def test_the_dashboard_shows_what_is_counted(repository: Path):
    text = Metrics().text({"m": [Load(1, 2, 0.5, 3, 4, 5)]}).decode()
    counted = set(re.findall(r"^# TYPE (\w+) ", text, re.MULTILINE))
    shown = re.findall(r"dpo_ray_\w+", (repository / "serve/grafana.json").read_text())
    assert len(set(shown)) > 12
    for name in shown:
        assert name in counted or name.removesuffix("_bucket") in counted, name
