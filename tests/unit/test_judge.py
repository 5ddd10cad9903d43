"""The judge against a server that speaks the protocol and misbehaves on command: what is asked, kept, counted, told."""

import itertools
import json
import logging
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.acquisition.answers import Answer, Preferred
from dpo_ray.acquisition.chat import Chat, Pace, backoff, retry_after
from dpo_ray.acquisition.judge import TEMPLATE, Judge, agreed, render, verdict
from dpo_ray.config import LlmOracleConfig
from dpo_ray.errors import InputError
from dpo_ray.pairs import Candidate
from dpo_ray.storage import Folder

KEY = "sk-very/secret+key"


class Question(NamedTuple):
    """What the template of these tests asks: `prompt|a|b`."""

    prompt: str
    a: str
    b: str


@dataclass
class Response:
    text: str | None = "A"
    status: int = 200
    usage: dict[str, int] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: str | None = None
    """Instead of a completion."""

    hangs: bool = False
    closes: bool = False
    finish: str = "stop"


class Server:
    """An OpenAI-compatible endpoint on this machine; `answer` decides what each question gets."""

    def __init__(self) -> None:
        self.answer: Callable[[Question], Response] = lambda question: Response()
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.ended = threading.Event()
        self.most_at_once = self._at_once = 0
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._http.daemon_threads = True
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    @property
    def questions(self) -> list[Question]:
        return [Question(*body["messages"][0]["content"].split("|")) for body in self.bodies]

    def close(self) -> None:
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def script(self, *responses: Response) -> None:
        """These in turn, and then the last one for ever."""
        left = iter(responses)
        self.answer = lambda question: next(left, responses[-1])

    def _handler(server) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 65_536  # head and body in one packet, or each answer waits 40 ms

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server._at_once += 1
                    server.most_at_once = max(server.most_at_once, server._at_once)
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers))
                    server.paths.append(self.path)
                response = server.answer(Question(*body["messages"][0]["content"].split("|")))
                if response.hangs:
                    server.ended.wait(20)
                with server._lock:
                    server._at_once -= 1
                if response.hangs or response.closes:
                    self.close_connection = True
                    return
                content = (response.body if response.body is not None else _completion(response)).encode()
                self.send_response_only(response.status)
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        return Handler


def _completion(response: Response) -> str:
    choice = {"message": {"role": "assistant", "content": response.text}, "finish_reason": response.finish}
    return json.dumps({"choices": [choice]} | ({"usage": response.usage} if response.usage else {}))


class FakeTime:
    """Sleeping takes no time, and is written down."""

    def __init__(self) -> None:
        self.now = 500.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        if seconds > 0:
            with self._lock:
                self.now += seconds
                self.slept.append(seconds)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    made = Server()
    yield made
    made.close()


@pytest.fixture
def clock() -> FakeTime:
    return FakeTime()


@pytest.fixture
def ask(server: Server, clock: FakeTime, tmp_path: Path) -> Callable[..., list[Answer]]:
    """Ask about some candidates, with the answers in their order."""

    def asked(candidates: list[Candidate], judge: Judge | None = None, **config: Any) -> list[Answer]:
        judge = judge or judge_at(server, tmp_path / "cache", clock, **config)
        answers: list[Answer] = []
        judge.ask(candidates, answers.append)
        assert sorted(a.candidate_id for a in answers) == sorted(c.candidate_id for c in candidates)
        by_id = {answer.candidate_id: answer for answer in answers}
        return [by_id[candidate.candidate_id] for candidate in candidates]

    return asked


def judge_at(server: Server, cache: Path, clock: FakeTime, **config: Any) -> Judge:
    given: dict[str, Any] = {"url": server.url, "model": "judge-1", "template": "{prompt}|{a}|{b}"} | config
    should_stop = given.pop("should_stop", lambda: False)
    connect = partial(Chat, clock=clock, sleep=clock.sleep, jitter=lambda: 0.5)
    return Judge(LlmOracleConfig(**given), Folder(str(cache)), should_stop=should_stop, connect=connect)


def pair(number: int = 0) -> Candidate:
    return Candidate(f"prompt {number}", f"good {number}", f"bad {number}")


def prefers(word: str) -> Callable[[Question], Response]:
    """A judge that knows what it wants, wherever it stands."""
    return lambda question: Response("A" if question.a.startswith(word) else "B")


# The question and its answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A", "A"),
        ("Both are fine, A more so.\n\nB", "B"),
        ("thoughts\n[[C]]\n\n  \n", "C"),
        ("Answer: A", "A"),
        ("**Answer:** B.", "B"),
        ("**A**", "A"),
        ("(B)", "B"),
        ("_C_", "C"),
        ("$\\boxed{A}$", "A"),
        ("Final answer: **B**", "B"),
        ("The better one is A.", "A"),
        ("Answer B is better.", "B"),
        ("C (tie)", "C"),
        ("C: it is a tie", "C"),
        ("answer: a", "A"),
        ("[[b]]", "B"),
        ("Compared with B, the better answer is A.", "A"),
        ("Between A and B: B", "B"),
        ("A or B? [[A]]", "A"),
        ("B is better than A.", None),
        ("A and B are equally good", None),
        ("A/B", None),
        ("Answer: A or B", None),
        ("A tie", None),
        ("A\nThe end", None),
        ("ABC", None),
        ("DAB", None),
        ("it is a mystery", None),
        ("A1", None),
        ("", None),
        (" \n\t\n", None),
    ],
)
def test_the_verdict_is_the_letter_of_the_last_line(text: str, expected: str | None):
    assert verdict(text) == expected


@given(st.text(), st.sampled_from("ABC"))
def test_whatever_stands_above_the_last_line_is_no_verdict(text: str, letter: str):
    assert verdict(f"{text}\n{letter}") == letter


def test_braces_in_texts_do_not_meet_the_template():
    assert render("{x}{ {prompt} / {a} / {b} }", "{a}", "{b}{", "}\\1{prompt}") == "{x}{ {a} / {b}{ / }\\1{prompt} }"


def test_the_built_in_template_shows_all_three_texts_and_asks_for_a_letter():
    shown = render(TEMPLATE, "PROMPT?", "ONE!", "OTHER!")
    for text in ("<prompt>\nPROMPT?\n</prompt>", "<answer_a>\nONE!\n</answer_a>", "<answer_b>\nOTHER!\n</answer_b>"):
        assert text in shown
    assert verdict(shown) is None, "a judge that repeats the question says nothing"


@pytest.mark.parametrize(
    ("one", "another", "expected"),
    [
        ("first", "first", ("first", None)),
        ("second", "second", ("second", None)),
        ("tie", "tie", ("tie", None)),
        ("first", "second", ("tie", "contradicts itself")),
        ("tie", "first", ("tie", "a tie in one order only")),
        ("second", "tie", ("tie", "a tie in one order only")),
    ],
)
def test_only_what_both_orders_say_names_a_side(one: Preferred, another: Preferred, expected: tuple[Preferred, str]):
    assert agreed(one, another) == expected


def test_a_judge_that_knows_is_heard_in_both_orders(server: Server, ask: Callable[..., list[Answer]]):
    server.answer = prefers("good")
    [answer] = ask([pair()])
    assert (answer.preferred, answer.by, answer.note) == ("first", "llm:judge-1", None)
    assert server.questions == [("prompt 0", "good 0", "bad 0"), ("prompt 0", "bad 0", "good 0")]
    assert server.paths == ["/v1/chat/completions"] * 2
    server.answer = prefers("bad")
    assert ask([pair(1)])[0].preferred == "second"


def test_the_request_is_what_the_protocol_wants(server: Server, ask: Callable[..., list[Answer]]):
    ask([pair()], both_orders=False, temperature=0.25, max_tokens=77, url=server.url + "/")
    assert server.bodies == [
        {
            "model": "judge-1",
            "messages": [{"role": "user", "content": "prompt 0|good 0|bad 0"}],
            "max_tokens": 77,
            "temperature": 0.25,
        }
    ]
    assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert server.paths == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    ("letters", "expected"),
    [
        ("AA", ("tie", "contradicts itself")),
        ("BB", ("tie", "contradicts itself")),
        ("CC", ("tie", None)),
        ("CA", ("tie", "a tie in one order only")),
        ("AB", ("first", None)),
        ("BA", ("second", None)),
    ],
)
def test_a_liking_for_a_place_makes_ties_not_labels(
    server: Server, ask: Callable[..., list[Answer]], letters: str, expected: tuple[str, str | None]
):
    server.script(*(Response(f"Well.\n{letter}") for letter in letters))
    [answer] = ask([pair()])
    assert (answer.preferred, answer.note) == expected


@pytest.mark.parametrize(("letter", "expected"), [("A", "first"), ("B", "second"), ("C", "tie")])
def test_one_order_is_one_request(server: Server, ask: Callable[..., list[Answer]], letter: str, expected: str):
    server.script(Response(letter))
    assert ask([pair()], both_orders=False)[0].preferred == expected
    assert len(server.bodies) == 1


def test_conversations_are_shown_as_text(server: Server, ask: Callable[..., list[Answer]]):
    turns = ({"role": "system", "content": "Be {brief}."}, {"role": "user", "content": "Hi"})
    one, other = ({"role": "assistant", "content": "{a}"},), ({"role": "assistant", "content": "no"},)
    ask([Candidate(turns, one, other)], both_orders=False)
    assert server.questions == [("system: Be {brief}.\n\nuser: Hi", "{a}", "no")]


# Trouble


def test_servers_errors_are_waited_for_ever_longer(server: Server, ask: Callable[..., list[Answer]], clock: FakeTime):
    server.script(*(Response(status=status) for status in (500, 503, 408, 409, 429, 529)), Response("A"), Response("B"))
    [answer] = ask([pair()])
    assert answer.preferred == "first"
    assert clock.slept == [1.5, 3.0, 6.0, 12.0, 24.0, 48.0]
    assert answer.cost == {"requests": 8, "prompt_tokens": 0, "answer_tokens": 0}


def test_waits_have_jitter_and_stay_between_a_second_and_a_minute():
    assert [backoff(n, 0.0) for n in range(1, 9)] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert [backoff(n, 0.999) for n in (1, 2, 6, 500)] == [1.999, 3.998, 60, 60]


@pytest.mark.parametrize("status", [500, 429])
def test_no_number_of_errors_ends_a_round(server: Server, ask: Callable[..., list[Answer]], status: int):
    server.answer = lambda question: (
        prefers("good")(question) if question.prompt == "prompt 1" else Response(status=status, body="<h1>busy</h1>")
    )
    answers = ask([pair(number) for number in range(3)], max_retries=2)
    assert [answer.preferred for answer in answers] == ["none", "first", "none"]
    note = f"{server.url}/chat/completions answered {status}: <h1>busy</h1> (the last of 3 requests)"
    assert answers[0].note == answers[2].note == note
    assert [answer.cost["requests"] for answer in answers] == [3, 2, 3]
    assert Counter(question.prompt for question in server.questions) == {"prompt 0": 3, "prompt 1": 2, "prompt 2": 3}


def test_a_server_that_hangs_is_given_up(server: Server, ask: Callable[..., list[Answer]]):
    server.answer = lambda question: Response(hangs=question.prompt == "prompt 0")
    one, other = ask([pair(0), pair(1)], max_retries=1, timeout_seconds=0.15, both_orders=False)
    assert (one.preferred, one.cost["requests"]) == ("none", 2)
    assert one.note == f"no answer of {server.url}/chat/completions within 0.15 s (the last of 2 requests)"
    assert other.preferred == "first"


def test_a_closed_connection_is_tried_again(server: Server, ask: Callable[..., list[Answer]]):
    server.script(Response(closes=True), Response(closes=True), Response("C"))
    [answer] = ask([pair()], both_orders=False)
    assert (answer.preferred, answer.cost["requests"]) == ("tie", 3)


def test_a_server_that_is_not_there_makes_no_answers(server: Server, ask: Callable[..., list[Answer]]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    answers = ask([pair(0), pair(1)], url=url, max_retries=1)
    assert [answer.preferred for answer in answers] == ["none", "none"]
    assert answers[0].note == f"no connection to {url}/chat/completions (ConnectionError) (the last of 2 requests)"


NONSENSE = [
    (Response("I like both."), "no usable answer, which ends in `I like both.`"),
    (Response(""), "no usable answer, which ends in ``"),
    (Response(None), "no usable answer, which ends in ``"),
    (
        Response("x" * 100 + " and then", finish="length"),
        f"no usable answer, which ends in `{'x' * 71} and then`, cut off after `max_tokens`: 256",
    ),
    (Response(body="<html>"), "{url} answered with no JSON"),
    (Response(body="[]"), "no usable answer, which ends in ``"),
    (Response(body='{"choices": []}'), "no usable answer, which ends in ``"),
    (Response(body='{"error": {"message": "upstream"}}'), "no usable answer, which ends in ``: upstream"),
]


@pytest.mark.parametrize(("response", "note"), NONSENSE)
def test_nonsense_is_asked_again_and_is_no_answer_in_the_end(
    server: Server, ask: Callable[..., list[Answer]], clock: FakeTime, response: Response, note: str
):
    server.script(response, Response("B"))
    assert ask([pair(1)], both_orders=False)[0].preferred == "second"
    assert clock.slept == [1.5]
    server.script(response)
    [answer] = ask([pair()], max_retries=0)
    expected = note.replace("{url}", f"{server.url}/chat/completions")
    assert (answer.preferred, answer.note, answer.cost["requests"]) == ("none", expected, 1)


def test_one_order_alone_is_no_answer(server: Server, ask: Callable[..., list[Answer]]):
    server.answer = lambda question: Response("A") if question.a.startswith("good") else Response(status=500)
    [answer] = ask([pair()], max_retries=1)
    assert (answer.preferred, answer.cost["requests"]) == ("none", 3)
    server.answer = prefers("good")
    [answer] = ask([pair()])
    assert (answer.preferred, answer.cost["requests"]) == ("first", 1), "the other half was kept"


@pytest.mark.parametrize(
    ("header", "waits"),
    [
        ("7", [7.0]),
        ("2.5", [2.5]),
        ("0", [1.0]),
        ("Wed, 21 Oct 2026 07:28:40 GMT", [40.0]),
        ("soon", [1.5]),
        ("-5", [1.5]),
        ("3600", [3600.0]),
    ],
)
def test_the_pause_that_a_server_asks_for_is_kept(
    server: Server, ask: Callable[..., list[Answer]], clock: FakeTime, header: str, waits: list[float]
):
    headers = {"Retry-After": header, "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    server.script(Response(status=429, headers=headers), Response("A"))
    assert ask([pair()], both_orders=False)[0].preferred == "first"
    assert clock.slept == waits


def test_a_pause_of_hours_is_not_waited_for(server: Server, ask: Callable[..., list[Answer]], clock: FakeTime):
    server.script(Response(status=429, headers={"Retry-After": "86400"}))
    [answer] = ask([pair()])
    assert (answer.preferred, answer.cost["requests"], clock.slept) == ("none", 1, [])


def test_a_date_is_compared_with_the_servers_clock_and_else_with_ours():
    date = "Wed, 21 Oct 2026 07:28:40 GMT"
    assert retry_after({"Retry-After": date, "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}) == 40
    assert retry_after({"Retry-After": date, "Date": "Wed, 21 Oct 2026 08:00:00 GMT"}) == 0
    assert retry_after({"Retry-After": "Sun, 01 Jan 2023 00:00:00 -0000"}) == 0
    far = retry_after({"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"})
    assert far == pytest.approx(4102444800 - time.time(), abs=5)
    assert retry_after({}) is None


def test_a_pause_holds_for_all_threads():
    clock = FakeTime()
    pace = Pace(None, clock)
    assert [pace.reserve(), pace.reserve()] == [0, 0]
    pace.hold(30)
    clock.now += 10
    assert [pace.reserve(), pace.reserve()] == [20, 20]
    pace.hold(5)
    assert pace.reserve() == 20, "a shorter pause ends no longer one"
    clock.now += 25
    assert pace.reserve() == 0


# Refusals


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            401,
            '{"error": {"message": "Incorrect API key: KEY", "code": "x"}}',
            "401: Incorrect API key: ***; is the key",
        ),
        (403, '{"detail": "no"}', '403: {"detail": "no"}; is the key in `OPENAI_API_KEY` right?'),
        (404, '{"error": "model judge-1\\nnot found"}', "404: model judge-1 not found"),
        (400, '{"message": "temperature is not supported"}', "400: temperature is not supported"),
        (418, "KEY is a teapot", "418: *** is a teapot"),
        (307, "", "307: Temporary Redirect"),
    ],
)
def test_what_no_patience_mends_ends_at_once(
    server: Server, ask: Callable[..., list[Answer]], clock: FakeTime, status: int, body: str, message: str
):
    server.script(Response(status=status, body=body.replace("KEY", KEY), headers={"Location": server.url}))
    with pytest.raises(InputError) as caught:
        ask([pair()])
    assert f"`acquire.oracle`: {server.url}/chat/completions answered {message}" in str(caught.value)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (len(server.bodies), clock.slept) == (1, [])


def test_a_refusal_ends_those_that_wait(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With real sleeps: the other threads are in theirs when the key turns out wrong."""
    tried = threading.Event()

    def answer(question: Question) -> Response:
        if question.prompt == "prompt 0":
            tried.wait(5)
            return Response(status=401, body="no")
        tried.set()
        return Response(status=500, headers={"Retry-After": "30"})

    server.answer = answer
    judge = Judge(LlmOracleConfig(url=server.url, model="m", template="{prompt}|{a}|{b}"), Folder(str(tmp_path)))
    began = time.monotonic()
    with pytest.raises(InputError, match="401"):
        judge.ask([pair(number) for number in range(20)], lambda answer: None)
    assert time.monotonic() - began < 5


def test_a_pair_that_is_too_long_or_filtered_is_no_answer_and_the_others_go_on(
    server: Server, ask: Callable[..., list[Answer]]
):
    refusals = {
        "prompt 0": Response(status=400, body='{"error": {"message": "maximum context length is 4096 tokens"}}'),
        "prompt 1": Response(status=413, body="large"),
        "prompt 2": Response(status=422, body='{"error": {"message": "blocked by the content management policy"}}'),
    }
    server.answer = lambda question: refusals.get(question.prompt) or prefers("good")(question)
    answers = ask([pair(number) for number in range(4)])
    assert [answer.preferred for answer in answers] == ["none", "none", "none", "first"]
    assert [answer.cost["requests"] for answer in answers] == [1, 1, 1, 2]
    assert answers[0].note == f"{server.url}/chat/completions answered 400: maximum context length is 4096 tokens"


def test_a_server_with_the_newer_name_of_the_limit_gets_it(server: Server, ask: Callable[..., list[Answer]]):
    refusal = Response(status=400, body='{"error": {"message": "Use `max_completion_tokens` instead."}}')
    judge = prefers("good")
    server.answer = lambda question: refusal if "max_tokens" in server.bodies[-1] else judge(question)
    answers = ask([pair(number) for number in range(3)], concurrency=1, temperature=None)
    assert [answer.preferred for answer in answers] == ["first"] * 3
    assert [sorted(body) for body in server.bodies] == [
        ["max_tokens", "messages", "model"],
        *[["max_completion_tokens", "messages", "model"]] * 6,
    ]


# Cost and cache


def test_tokens_of_all_requests_are_counted_and_priced(server: Server, ask: Callable[..., list[Answer]]):
    server.script(
        Response("hm", usage={"prompt_tokens": 100, "completion_tokens": 7, "total_tokens": 107}),
        Response(status=500),
        Response("A", usage={"prompt_tokens": 1000, "completion_tokens": 30}),
        Response("B", usage={"prompt_tokens": 2000, "completion_tokens": 60}),
    )
    [answer] = ask([pair()], prices=(2.5, 10.0))
    assert answer.cost == {
        "requests": 4,
        "prompt_tokens": 3100,
        "answer_tokens": 97,
        "price": pytest.approx((3100 * 2.5 + 97 * 10) / 1e6),
    }
    json.dumps(answer._asdict())


def test_an_answer_that_is_known_is_not_asked_for_again_and_costs_nothing(
    server: Server, ask: Callable[..., list[Answer]]
):
    server.answer = prefers("good")
    candidates = [pair(number) for number in range(4)]
    before = ask(candidates)
    server.script(Response(status=500))
    after = ask(candidates, url=server.url + "//", prices=(1.0, 1.0))
    assert len(server.bodies) == 8
    assert [answer.preferred for answer in after] == [answer.preferred for answer in before]
    assert after[0].cost == {"requests": 0, "prompt_tokens": 0, "answer_tokens": 0, "price": 0.0}


@pytest.mark.parametrize(
    "change",
    [
        {"model": "judge-2"},
        {"temperature": 0.5},
        {"temperature": None},
        {"max_tokens": 9},
        {"template": "Which? {prompt}|{a}|{b}"},
    ],
)
def test_another_question_is_asked(server: Server, ask: Callable[..., list[Answer]], change: dict[str, Any]):
    for _ in range(2):
        ask([pair()])
        ask([pair()], **change)
    assert len(server.bodies) == 4


def test_failures_are_not_cached_nor_is_a_file_that_says_nothing(
    server: Server, ask: Callable[..., list[Answer]], tmp_path: Path
):
    server.script(Response("no idea"))
    assert ask([pair()], max_retries=0)[0].preferred == "none"
    assert Folder(str(tmp_path / "cache")).names() == []
    server.answer = prefers("good")
    ask([pair()])
    one, other = sorted((tmp_path / "cache").iterdir())
    one.write_text("")
    other.write_text('{"answer": "what?"}')
    assert ask([pair()])[0].cost["requests"] == 2
    assert ask([pair()])[0].cost["requests"] == 0


# The key


def test_the_key_is_nowhere_but_in_the_header(
    server: Server, ask: Callable[..., list[Answer]], tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    server.answer = lambda question: {
        "prompt 0": Response(f"I saw {KEY}\nA"),
        "prompt 1": Response(f"{KEY} is no verdict"),
        "prompt 2": Response(status=500, body=json.dumps({"error": f"key {KEY}"}).replace("/", "\\/")),
    }[question.prompt]
    answers = ask([pair(number) for number in range(3)], max_retries=1)
    assert [answer.preferred for answer in answers] == ["tie", "none", "none"]
    kept = "".join(file.read_text() for file in (tmp_path / "cache").iterdir())
    assert "I saw ***" in kept
    for text in (kept, repr(answers), caplog.text):
        assert KEY not in text
    assert "key ***" in caplog.text
    assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in server.headers)


@pytest.mark.parametrize(
    ("value", "message"), [(None, "holds no key"), (" \n", "holds no key"), ("a\nb", "holds cannot be a key")]
)
def test_a_missing_key_is_named_by_its_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str | None, message: str
):
    monkeypatch.delenv("MY_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(InputError, match=rf"`acquire\.oracle\.api_key_env`.*`MY_KEY` {message}") as caught:
        Judge(LlmOracleConfig(model="m", api_key_env="MY_KEY"), Folder(str(tmp_path)))
    assert "a\nb" not in str(caught.value)


def test_a_key_from_a_file_with_a_line_end_works(
    server: Server, ask: Callable[..., list[Answer]], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MY_KEY", "k1\n")
    ask([pair()], api_key_env="MY_KEY")
    assert server.headers[0]["Authorization"] == "Bearer k1"


def test_without_a_key_none_is_sent_not_even_one_of_the_home_folder(
    server: Server, ask: Callable[..., list[Answer]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password mine\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    ask([pair()], api_key_env=None)
    assert "Authorization" not in server.headers[0]
    ask([pair(1)])
    assert server.headers[-1]["Authorization"] == f"Bearer {KEY}"


# Many at once


def test_requests_keep_to_the_rate_whatever_the_threads_do():
    clock = FakeTime()
    pace = Pace(30, clock)
    waits: list[float] = []
    threads = [threading.Thread(target=lambda: waits.append(pace.reserve())) for _ in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(waits) == pytest.approx([2.0 * turn for turn in range(40)])
    clock.now += 500
    assert [pace.reserve(), pace.reserve()] == [0, 2], "time that passed is not saved up"


def test_a_judge_keeps_to_its_rate(server: Server, ask: Callable[..., list[Answer]], clock: FakeTime):
    times: list[float] = []

    def answer(question: Question) -> Response:
        times.append(clock.now)
        return prefers("good")(question)

    server.answer = answer
    ask([pair(number) for number in range(5)], requests_per_minute=12, concurrency=1)
    assert len(times) == 10
    assert {later - earlier for earlier, later in itertools.pairwise(times)} == {5.0}


def test_no_more_requests_run_at_a_time_than_allowed(server: Server, ask: Callable[..., list[Answer]]):
    def answer(question: Question) -> Response:
        time.sleep(0.02)
        return prefers("good")(question)

    server.answer = answer
    ask([pair(number) for number in range(12)], concurrency=3)
    assert server.most_at_once == 3


def test_answers_come_in_the_callers_thread(server: Server, clock: FakeTime, tmp_path: Path):
    threads = []
    judge = judge_at(server, tmp_path, clock)
    judge.ask([pair(number) for number in range(6)], lambda answer: threads.append(threading.current_thread()))
    assert threads == [threading.current_thread()] * 6


def test_what_the_caller_raises_ends_asking_and_what_was_paid_for_is_kept(
    server: Server, ask: Callable[..., list[Answer]], clock: FakeTime, tmp_path: Path
):
    def stop(answer: Answer) -> None:
        raise KeyboardInterrupt

    server.answer = prefers("good")
    judge = judge_at(server, tmp_path / "cache", clock, concurrency=2)
    with pytest.raises(KeyboardInterrupt):
        judge.ask([pair(number) for number in range(50)], stop)
    asked = len(server.bodies)
    assert asked < 50
    assert len(Folder(str(tmp_path / "cache")).names()) == asked
    answers = ask([pair(number) for number in range(50)], judge=judge)
    assert [answer.preferred for answer in answers] == ["first"] * 50
    assert len(server.bodies) == 100


def test_a_judge_that_waits_can_be_stopped(server: Server, tmp_path: Path):
    server.script(Response(status=500))
    ends = iter([False, True])
    config = LlmOracleConfig(url=server.url, model="m", template="{prompt}|{a}|{b}")
    judge = Judge(config, Folder(str(tmp_path)), should_stop=lambda: next(ends))
    answers: list[Answer] = []
    judge.ask([pair()], answers.append)
    assert answers == []
    assert len(server.bodies) == 1


# What is refused before anything is asked


@pytest.mark.parametrize(
    ("template", "lacks"),
    [("{prompt} {a}", "{b}"), ("", "{a}, {b}, {prompt}"), ("{prompt}{A}{b}{{a}", None), ("{prompt}{ a }{b}", "{a}")],
)
def test_a_template_without_its_places_is_an_input_error(
    server: Server, clock: FakeTime, tmp_path: Path, template: str, lacks: str | None
):
    if lacks is None:
        judge_at(server, tmp_path, clock, template=template)
        return
    with pytest.raises(InputError) as caught:
        judge_at(server, tmp_path, clock, template=template)
    assert str(caught.value) == f"`acquire.oracle.template` lacks {lacks}"


@pytest.mark.parametrize("url", ["api.openai.com/v1", "", "ftp://host", "https://"])
def test_an_address_that_is_none_is_an_input_error(server: Server, clock: FakeTime, tmp_path: Path, url: str):
    with pytest.raises(InputError, match=r"`acquire\.oracle\.url`: `.*` is no URL of a server"):
        judge_at(server, tmp_path, clock, url=url)
