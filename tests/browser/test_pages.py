"""The three pages in Chromium, against the service in this process: what people see, do with keys, and leave behind."""

import asyncio
import itertools
import json
import re
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from dpo_ray.acquisition.label_queue import LOG, LabelQueue
from dpo_ray.pairs import Candidate
from dpo_ray.storage import Folder, read_lines
from serve.api import LocalBackend, create_api
from serve.compare import FILE, load_secret, sides
from serve.config import Limits, ServeConfig, ServedModel
from serve.engine import Engine
from serve.schema import ApiError, Ask, Begun, Piece

sync_api = pytest.importorskip("playwright.sync_api", reason="the pages are driven by playwright")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium"),
]

WEB = Path(__file__).parent.parent.parent / "serve" / "web"
PAGES = {"/": "chat", "/compare": "compare", "/label": "label"}
MODELS = ("base", "aligned")
ARGUMENTS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
PHONE = {"width": 360, "height": 740}
Page = Any
"""Playwright's; its module may be missing."""


class Watched:
    """A backend that remembers who wrote what, and can be held, or fail, after the first character of an answer."""

    def __init__(self, backend: LocalBackend) -> None:
        self._backend = backend
        self.written: list[tuple[Ask, str, bool]] = []
        """Requests with the text that was sent, and whether it was all."""
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.fails = False

    async def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        source, text, is_whole = self._backend.write(ask), "", False
        try:
            async for item in source:
                if isinstance(item, list):
                    (piece,) = item
                    if piece.text and not text and (self.fails or not self.may_go_on.is_set()):
                        text += piece.text[0]
                        yield [piece._replace(text=text, num_tokens=0, finish_reason=None)]
                        while not self.may_go_on.is_set():
                            await asyncio.sleep(0.01)
                        if self.fails:
                            yield ApiError(503, "the model went away")
                            return
                        piece = piece._replace(text=piece.text[1:])
                    text += piece.text
                    yield [piece]
                else:
                    yield item
            is_whole = True
        finally:
            await source.aclose()
            self.written.append((ask, text, is_whole))

    async def rewards(self, model: str, items: Any) -> Any:
        return await self._backend.rewards(model, items)

    async def loads(self) -> Any:
        return await self._backend.loads()


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ServedModel, ...]:
    """Two names for random weights that take conversations."""
    folder = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(tiny_model, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return tuple(ServedModel(name=name, path=str(folder), concurrency=4) for name in MODELS)


@pytest.fixture(scope="module")
def engines(models: tuple[ServedModel, ...]) -> Iterator[LocalBackend]:
    made = {model.name: Engine(model, Limits().max_tokens) for model in models}
    yield LocalBackend(made)
    for engine in made.values():
        engine.close()


@pytest.fixture
def backend(engines: LocalBackend, monkeypatch: pytest.MonkeyPatch) -> Watched:
    """With the same seeds in every test: random weights may also end an answer before it begins."""
    seeds = itertools.count(1)
    monkeypatch.setattr("serve.api.new_seed", lambda: next(seeds))
    return Watched(engines)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


Open = Callable[..., Page]


@pytest.fixture
def tab(chromium: Any) -> Iterator[Open]:
    """Opens pages in contexts of their own. What their consoles say, or what they ask of others, fails the test."""
    contexts, problems = [], []

    def opened(url: str, *, expected: str = "^$", **options: Any) -> Page:
        context = chromium.new_context(**options)
        context.set_default_timeout(20_000)
        contexts.append(context)
        page = context.new_page()

        def heard(text: str) -> None:
            if not re.search(expected, text):
                problems.append(text)

        page.on("console", lambda message: message.type in ("error", "warning") and heard(message.text))
        page.on("pageerror", lambda error: heard(str(error)))
        origin = "/".join([*url.split("/")[:3], ""])
        page.on("request", lambda request: request.url.startswith(origin) or heard(f"a request to {request.url}"))
        page.goto(url)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@contextmanager
def running(backend: Any, models: tuple[ServedModel, ...], **options: Any) -> Iterator[str]:
    """The service on a port of its own; its address without a slash."""
    api = create_api(ServeConfig(models=models, **options), backend)
    server = uvicorn.Server(uvicorn.Config(api, port=0, log_level="critical", timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the service did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def plain(backend: Watched, models: tuple[ServedModel, ...]) -> Iterator[str]:
    """A service without keys, comparisons and labels."""
    with running(backend, models, insecure=True) as url:
        yield url


@pytest.fixture
def comparing(backend: Watched, models: tuple[ServedModel, ...], tmp_path: Path) -> Iterator[str]:
    with running(backend, models, insecure=True, compare=MODELS, preferences=str(tmp_path)) as url:
        yield url


@pytest.fixture
def labelling(backend: Watched, models: tuple[ServedModel, ...], tmp_path: Path) -> Iterator[str]:
    """Twelve pairs for two labellers each."""
    queue = LabelQueue(Folder(str(tmp_path)), 2, 15.0)
    queue.add([Candidate.of(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(12)])
    with running(backend, models, insecure=True, queue=tmp_path) as url:
        yield url


def wait_until(page: Page, expression: str) -> None:
    """As `wait_for_function`, which the pages' policy forbids: it is `eval`."""
    end = time.monotonic() + 20
    while not page.evaluate(expression):
        assert time.monotonic() < end, f"it never was: {expression}"
        page.wait_for_timeout(20)


# Chat


def chat_with(page: Page, text: str, max_tokens: int = 24) -> None:
    page.wait_for_selector("#model option", state="attached")
    page.evaluate("(num) => { document.querySelector('#max-tokens').value = num; }", max_tokens)
    page.fill("#message", text)
    page.keyboard.press("Enter")


def answers(page: Page) -> list[str]:
    page.wait_for_selector("#send", state="visible")
    return [found.text_content() for found in page.query_selector_all("#log .assistant .text")]


def test_a_conversation_streams_and_is_text_whatever_it_says(plain: str, tab: Open, backend: Watched):
    page = tab(plain)
    backend.may_go_on.clear()
    text = "<b>Hi</b> <img src=x onerror=alert(1)>\n& you?"
    page.wait_for_selector("#model option", state="attached")
    page.select_option("#model", "aligned")
    chat_with(page, text, max_tokens=40)
    wait_until(page, "document.querySelector('.writes .text')?.textContent")
    assert len(page.text_content(".writes .text")) == 1
    backend.may_go_on.set()
    (whole,) = answers(page)
    assert len(whole) > 1
    assert whole == backend.written[0][1]
    assert page.text_content("#log .user .text") == text
    assert page.query_selector("#log img, #log b") is None
    note = page.text_content("#log .assistant .note")
    assert re.search(r"\d+ tokens in, \d+ out · \d+\.\d tokens/s · first after \d+\.\d\d s", note)
    chat_with(page, "And then?")
    assert len(answers(page)) == 2
    (ask, _, _) = backend.written[1]
    assert ask.model == "aligned"
    assert ask.prompts == (
        (
            {"role": "user", "content": text},
            {"role": "assistant", "content": whole},
            {"role": "user", "content": "And then?"},
        ),
    )
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_an_answer_can_be_stopped_and_the_model_stops_too(plain: str, tab: Open, backend: Watched):
    page = tab(plain)
    backend.may_go_on.clear()
    chat_with(page, "Go on.")
    wait_until(page, "document.querySelector('.writes .text')?.textContent")
    page.click("#stop")
    (text,) = answers(page)
    assert page.text_content("#log .assistant .note") == "stopped"
    end = time.monotonic() + 20
    while not backend.written and time.monotonic() < end:
        page.wait_for_timeout(20)
    assert [(sent, is_whole) for _, sent, is_whole in backend.written] == [(text, False)]
    assert page.text_content("#error") == ""


def test_the_last_answer_is_written_again_and_all_is_cleared(plain: str, tab: Open, backend: Watched):
    page = tab(plain)
    chat_with(page, "One")
    (first,) = answers(page)
    page.click("text=Retry")
    wait_until(page, "!document.querySelector('#send').hidden")
    assert len(answers(page)) == 1
    first_ask, second_ask = (ask for ask, _, _ in backend.written)
    assert first_ask.prompts == second_ask.prompts
    assert first == backend.written[0][1]
    page.click("#clear")
    assert answers(page) == []
    assert page.query_selector("#log article") is None


def test_settings_go_with_the_request(plain: str, tab: Open, backend: Watched):
    page = tab(plain)
    page.click("text=Settings")
    page.fill("#temperature", "0.25")
    page.fill("#system", "Be kind.")
    chat_with(page, "One", max_tokens=3)
    answers(page)
    ask = backend.written[0][0]
    assert (ask.temperature, ask.max_tokens) == (0.25, 3)
    assert ask.prompts[0][0] == {"role": "system", "content": "Be kind."}


def test_shift_enter_is_a_new_line_and_nothing_is_not_sent(plain: str, tab: Open, backend: Watched):
    page = tab(plain)
    chat_with(page, "  ")
    page.fill("#message", "one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#message") == "one\ntwo"
    assert page.query_selector("#log article") is None
    assert backend.written == []


def test_what_is_refused_is_said_and_not_lost(plain: str, tab: Open, backend: Watched):
    page = tab(plain, expected="the server responded with a status of 400")
    long = "too long " * 100
    chat_with(page, long)
    wait_until(page, "document.querySelector('#error').textContent")
    assert "tokens" in page.text_content("#error")
    assert page.input_value("#message") == long
    assert page.query_selector("#log article") is None
    backend.fails = True
    chat_with(page, "Hello")
    wait_until(page, "document.querySelector('#error').textContent === 'the model went away'")
    assert page.text_content("#log .assistant .note") == "broken off"
    assert answers(page) == [backend.written[-1][1]]


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(
    backend: Watched, models: tuple[ServedModel, ...], tab: Open, monkeypatch: Any
):
    monkeypatch.setenv("DPO_RAY_API_KEY", "the-right-key-of-the-test")
    with running(backend, models) as url:
        page = tab(url, expected="status of (401|404)")
        for key in ("the-wrong-key", "the-right-key-of-the-test"):
            page.wait_for_selector("dialog[open]")
            page.fill("#key-value", key)
            page.keyboard.press("Enter")
            if key == "the-wrong-key":
                page.wait_for_selector("dialog[open] >> text=The key was not accepted.")
        page.wait_for_selector("#model option", state="attached")
        chat_with(page, "Hello")
        assert len(answers(page)) == 1
        assert page.evaluate("Object.values(sessionStorage)") == ["the-right-key-of-the-test"]
        assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
        page.goto(f"{url}/label")  # the same tab has it still
        wait_until(page, "document.querySelector('#error').textContent.includes('`queue`')")


# Compare


def compared(page: Page, prompt: str) -> None:
    page.evaluate("document.querySelector('#max-tokens').value = 24")
    page.fill("#prompt", prompt)
    page.keyboard.press("Enter")
    page.wait_for_selector("#vote-left:enabled")


def preferences(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines((folder / FILE).read_bytes()))


def test_blind_votes_are_kept_with_the_models_that_wrote(comparing: str, tab: Open, backend: Watched, tmp_path: Path):
    page = tab(f"{comparing}/compare")
    secret, shown = load_secret(str(tmp_path)), []
    for number, (key, label) in enumerate([("1", 1), ("2", 2), ("t", "tie")] * 2):
        compared(page, f"Prompt {number}")
        shown.append([page.text_content(f"#{side} .text") for side in ("left", "right")])
        assert not any(name in page.inner_text("#answers") for name in MODELS)
        assert page.text_content("#left-name") == "Answer 1"
        page.keyboard.press(key)
        page.wait_for_selector("#next:visible")
        row = preferences(tmp_path)[-1]
        assert row["label"] == label
        assert (row["model_1"], row["model_2"]) == sides(secret, row["comparison"], MODELS)
        assert page.text_content("#left-name") == f"Answer 1: {row['model_1']}"
        assert page.text_content("#right-name") == f"Answer 2: {row['model_2']}"
        page.keyboard.press("n")
        wait_until(page, "document.activeElement.id === 'prompt'")
    rows = preferences(tmp_path)
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": f"Prompt {i}"}] for i in range(6)]
    assert [[row["response_1"], row["response_2"]] for row in rows] == shown
    assert all(row["is_blind"] for row in rows)
    wrote = {(ask.model, ask.prompts[0][0]["content"]): text for ask, text, _ in backend.written}
    for row in rows:
        for side in "12":
            assert wrote[row[f"model_{side}"], row["prompt"][0]["content"]] == row[f"response_{side}"]
    cells = [cell.text_content() for cell in page.query_selector_all("#tally tbody tr *")]
    wins = {name: sum(row[f"model_{row['label']}"] == name for row in rows if row["label"] != "tie") for name in MODELS}
    assert cells == ["aligned", str(wins["aligned"]), "base", str(wins["base"]), "Ties", "2"]


def test_a_stream_does_not_tell_which_model_writes(comparing: str, tab: Open):
    page = tab(f"{comparing}/compare")
    body = {
        "comparison": "comparison-1",
        "side": "left",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 3,
    }
    told = page.evaluate(
        """async (body) => {
            const headers = { "Content-Type": "application/json" };
            const response = await fetch("/compare/stream", { method: "POST", headers, body: JSON.stringify(body) });
            const told = [...response.headers].filter(([name]) => name !== "content-security-policy"); // `base-uri`
            return JSON.stringify(told) + await response.text();
        }""",
        body,
    )
    assert "[DONE]" in told
    assert not any(name in told for name in MODELS)


def test_nobody_votes_before_both_answers_are_there(comparing: str, tab: Open, backend: Watched, tmp_path: Path):
    page = tab(f"{comparing}/compare")
    backend.may_go_on.clear()
    page.evaluate("document.querySelector('#max-tokens').value = 24")
    page.fill("#prompt", "Go on.")
    page.keyboard.press("Enter")
    wait_until(
        page, "document.querySelector('#left .text').textContent && document.querySelector('#right .text').textContent"
    )
    page.keyboard.press("1")
    assert page.is_disabled("#vote-left")
    page.click("#stop")
    wait_until(page, "document.querySelector('#error').textContent === 'Stopped.'")
    page.keyboard.press("1")
    assert page.is_disabled("#vote-left")
    assert preferences(tmp_path) == []
    backend.may_go_on.set()
    page.fill("#prompt", "")  # and the page works on
    compared(page, "Again")
    page.click("#vote-right")
    page.wait_for_selector("#next:visible")
    assert len(preferences(tmp_path)) == 1


def test_a_vote_whose_answer_is_lost_counts_once(comparing: str, tab: Open, tmp_path: Path):
    page = tab(f"{comparing}/compare", expected="ERR_FAILED")

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/compare/vote", lose)  # early: the browser takes a moment to ask
    compared(page, "Hello")
    page.keyboard.press("2")
    wait_until(page, "document.querySelector('#error').textContent.includes('cannot be reached')")
    page.unroute("**/compare/vote")
    page.keyboard.press("2")
    page.wait_for_selector("#next:visible")
    assert len(preferences(tmp_path)) == 1


# Label


def begin(page: Page, person: str) -> None:
    page.keyboard.type(person)  # the field has the focus
    page.keyboard.press("Enter")
    ready(page)


def ready(page: Page) -> None:
    """A pair, or the news that there is none."""
    wait_until(page, "!document.querySelector('#undo').disabled && !document.querySelector('#says').hidden")


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_lines((folder / LOG).read_bytes()) if event["event"] == kind]


def good_side(page: Page) -> str:
    return "1" if page.text_content("#left").startswith("good") else "2"


def test_two_people_at_once_label_every_pair_once_each_with_keys_only(labelling: str, tab: Open, tmp_path: Path):
    ann, bob = (tab(f"{labelling}/label") for _ in range(2))
    for page, person in ((ann, "ann"), (bob, "bob")):
        begin(page, person)
    for number in range(12):
        said = []
        for page in (ann, bob):
            ready(page)
            assert page.is_visible("#task")
            said.append("t" if number % 4 == 3 else good_side(page))
        # Both are on their way at the same time.
        for page, key in zip((ann, bob), said, strict=True):
            page.keyboard.press(key)
    for page in (ann, bob):
        wait_until(page, "document.querySelector('#idle').textContent")
    labels = events(tmp_path, "label")
    names = [f"prompt {i}" for i in range(12)]
    by_id = {event["candidate_id"]: event["candidate"] for event in events(tmp_path, "add")}
    for person in ("ann", "bob"):
        own = [label for label in labels if label["person"] == person]
        assert sorted(by_id[label["candidate_id"]]["prompt"] for label in own) == sorted(names)
        assert [label["preferred"] for label in own].count("tie") == 3
        for label in own:
            if label["preferred"] != "tie":
                assert by_id[label["candidate_id"]][label["preferred"]].startswith("good")
        assert {label["left"] for label in own} == {"first", "second"}
    assert len(labels) == 24
    queue = LabelQueue(Folder(str(tmp_path)), 2, 15.0)
    assert queue.progress().done == 12
    for page in (ann, bob):
        page.reload()
        begin(page, "")  # the name is still there
        wait_until(page, "document.querySelector('#idle').textContent === 'All pairs are done.'")
        assert page.text_content("#counts") == "12 of 12 done, 0 in hand, 12 by you"
    ann.click("text=Agreement")
    wait_until(ann, "document.querySelector('#agreed').textContent.includes('100 % of 12 pairs')")


def test_a_label_is_taken_back_and_a_pair_is_skipped(labelling: str, tab: Open, tmp_path: Path):
    page = tab(f"{labelling}/label")
    begin(page, "ann")
    first = page.text_content("#prompt")
    page.keyboard.press("1")
    wait_until(page, "document.querySelector('#counts').textContent.endsWith('1 by you')")
    ready(page)
    assert page.text_content("#prompt") != first
    page.keyboard.press("u")
    wait_until(page, "document.querySelector('#counts').textContent.endsWith('0 by you')")
    ready(page)
    assert page.text_content("#prompt") == first
    page.keyboard.press("s")
    wait_until(page, f"document.querySelector('#prompt').textContent !== {json.dumps(first)}")
    ready(page)
    page.keyboard.press("u")
    wait_until(page, "document.querySelector('#toast').textContent.includes('no label to take back')")
    assert [len(events(tmp_path, kind)) for kind in ("label", "undo", "skip")] == [1, 1, 1]


def test_keys_that_are_pressed_twice_or_held_label_once(labelling: str, tab: Open, tmp_path: Path):
    page = tab(f"{labelling}/label")
    begin(page, "ann")
    page.evaluate("""() => {
        const press = (init) => document.body.dispatchEvent(
            new KeyboardEvent("keydown", { key: "1", bubbles: true, ...init }));
        press(); press(); press({ repeat: true }); press({ ctrlKey: true });
        document.querySelector("#say-right").click();
    }""")
    wait_until(page, "document.querySelector('#counts').textContent.endsWith('1 by you')")
    ready(page)
    page.evaluate("""() => document.body.dispatchEvent(
        new KeyboardEvent("keydown", { key: "1", bubbles: true, repeat: true }))""")
    page.wait_for_timeout(200)
    assert [label["preferred"] == label["left"] for label in events(tmp_path, "label")] == [True]


def test_a_label_whose_answer_is_lost_counts_once(labelling: str, tab: Open, tmp_path: Path):
    page = tab(f"{labelling}/label", expected="ERR_FAILED")

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/label/answer", lose)  # early: the browser takes a moment to ask
    begin(page, "ann")
    prompt = page.text_content("#prompt")
    page.keyboard.press("2")
    wait_until(page, "document.querySelector('#error').textContent.includes('cannot be reached')")
    ready(page)
    assert page.text_content("#prompt") == prompt
    page.unroute("**/label/answer")
    page.keyboard.press("2")
    wait_until(page, f"document.querySelector('#prompt').textContent !== {json.dumps(prompt)}")
    assert page.text_content("#error") == ""
    assert len(events(tmp_path, "label")) == 1


def test_a_refusal_is_told_and_the_next_pair_comes(labelling: str, tab: Open, tmp_path: Path):
    page = tab(f"{labelling}/label", expected="status of 409")
    begin(page, "ann")
    prompt = page.text_content("#prompt")
    queue = LabelQueue(Folder(str(tmp_path)), 2, 15.0)
    task = queue.take("ann")
    assert task is not None
    queue.label("ann", task.candidate.candidate_id, "tie")  # in another tab
    page.keyboard.press("1")
    wait_until(page, "document.querySelector('#error').textContent.includes('otherwise')")
    ready(page)
    assert page.text_content("#prompt") != prompt
    assert len(events(tmp_path, "label")) == 1


def test_the_page_looks_again_when_there_was_nothing(labelling: str, tab: Open, tmp_path: Path):
    queue = LabelQueue(Folder(str(tmp_path)), 2, 15.0)
    while (task := queue.take("ann")) is not None:
        queue.label("ann", task.candidate.candidate_id, "first")
    page = tab(f"{labelling}/label")
    begin(page, "ann")
    assert "nothing for you to label" in page.text_content("#idle")
    assert page.is_hidden("#task")
    queue.add([Candidate.of("late", "one", "other")])
    page.wait_for_selector("#task:visible")
    assert page.text_content("#prompt") == "late"


def test_a_page_says_what_the_service_was_started_without(plain: str, tab: Open):
    page = tab(f"{plain}/label", expected="status of 404")
    wait_until(page, "document.querySelector('#error').textContent.includes('started without `queue`')")
    assert page.is_hidden("#who")
    page = tab(f"{plain}/compare", expected="status of 404")
    page.fill("#prompt", "Hello")
    page.keyboard.press("Enter")
    wait_until(page, "document.querySelector('#error').textContent.includes('started without `preferences`')")


# For everyone


@pytest.fixture
def everything(backend: Watched, models: tuple[ServedModel, ...], tmp_path: Path) -> Iterator[str]:
    LabelQueue(Folder(str(tmp_path / "queue")), 1, 15.0).add([Candidate.of("prompt", "good", "bad")])
    options = {"compare": MODELS, "preferences": str(tmp_path / "preferences"), "queue": tmp_path / "queue"}
    with running(backend, models, insecure=True, **options) as url:
        yield url


UNNAMED = """() => [...document.querySelectorAll("input, select, textarea")].filter((field) => !field.labels.length)
    .concat([...document.querySelectorAll("button, a, summary, caption, h1, h2, h3")]
        .filter((item) => !item.textContent.trim()))
    .concat([...document.querySelectorAll("section, nav, [role=group], [role=log], progress, dialog")].filter((item) =>
        !item.getAttribute("aria-label") && !document.getElementById(item.getAttribute("aria-labelledby"))))
    .map((item) => item.outerHTML)"""


@pytest.mark.parametrize("path", PAGES)
def test_a_page_can_be_read_by_everyone(everything: str, tab: Open, path: str):
    page = tab(everything + path)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.title() == f"{PAGES[path].capitalize()} - dpo-ray"
    assert page.evaluate(UNNAMED) == []
    for wanted in ("h1", "main", "header", "nav", "nav [aria-current=page]", "[role=alert]", "[aria-live=polite]"):
        assert len(page.query_selector_all(wanted)) == 1, wanted
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((h) => Number(h.tagName[1]))")
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((item) => item.id)")
    assert len(ids) == len(set(ids))
    pointed = page.evaluate("""() => [...document.querySelectorAll("[aria-describedby], [aria-labelledby], label[for]")]
        .flatMap((item) => ["aria-describedby", "aria-labelledby", "for"].map((name) => item.getAttribute(name)))
        .filter(Boolean)""")
    assert set(pointed) <= set(ids)
    page.keyboard.press("Tab")
    page.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    page.focus("a")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"


@pytest.mark.parametrize("path", PAGES)
def test_the_focus_is_seen_wherever_it_is(everything: str, tab: Open, path: str):
    page = tab(everything + path)
    page.evaluate("document.querySelectorAll('details').forEach((item) => { item.open = true; })")
    page.focus(".jump")
    seen = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        found = page.evaluate("""() => {
            const style = getComputedStyle(document.activeElement);
            return [document.activeElement.outerHTML, style.outlineStyle, parseFloat(style.outlineWidth)];
        }""")
        if found[0].startswith("<body"):
            break
        assert (found[1], found[2] >= 2) == ("solid", True), found[0]
        seen.add(found[0])
    assert len(seen) >= 6


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance of `#rrggbb`."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_worked_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


TEXT_ON_GROUND = [
    *((text, ground) for text in ("text", "muted") for ground in ("ground", "panel", "own")),
    *(("accent", "ground"), ("on-accent", "accent"), ("error", "error-ground"), ("good", "good-ground")),
    ("ground", "text"),
]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_told_apart_in_both_schemes(plain: str, tab: Open, scheme: str):
    page = tab(plain, color_scheme=scheme)
    names = sorted({name for pair in TEXT_ON_GROUND for name in pair} | {"edge"})
    colours = page.evaluate(
        """(names) => names.map((name) =>
            getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim())""",
        names,
    )
    found = dict(zip(names, colours, strict=True))
    for text, ground in TEXT_ON_GROUND:
        assert contrast(found[text], found[ground]) >= 4.5, (text, ground)
    for edge in ("edge", "accent"):  # of controls, and the focus
        assert contrast(found[edge], found["ground"]) >= 3, edge
    assert (luminance(found["ground"]) < 0.1) == (scheme == "dark")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb({}, {}, {})".format(*(int(found["ground"][i : i + 2], 16) for i in (1, 3, 5)))


@pytest.mark.parametrize("path", PAGES)
def test_a_page_fits_a_phone(everything: str, tab: Open, path: str):
    page = tab(everything + path, viewport=PHONE, is_mobile=True, has_touch=True)
    page.evaluate("document.querySelectorAll('[hidden]').forEach((item) => { item.hidden = false; })")
    page.evaluate("document.querySelectorAll('details').forEach((item) => { item.open = true; })")
    page.evaluate("document.querySelectorAll('.text').forEach((item) => { item.textContent = 'x'.repeat(400); })")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    sizes = page.evaluate("""() => [...document.querySelectorAll("button, select, nav a, summary")]
        .map((item) => item.getBoundingClientRect()).map((box) => Math.min(box.width, box.height))""")
    assert min(sizes) >= 24, "WCAG 2.2, target size"


def test_nothing_moves_for_those_who_do_not_want_it(plain: str, tab: Open):
    names = []
    for motion in ("reduce", "no-preference"):
        page = tab(plain, reduced_motion=motion)
        page.evaluate("document.querySelector('#log').innerHTML = '<p class=\"writes\"><b class=\"text\">x</b></p>'")
        names.append(page.evaluate("getComputedStyle(document.querySelector('#log .text'), '::after').animationName"))
    assert names == ["none", "blink"]


@pytest.mark.parametrize("path", PAGES)
def test_a_page_is_small_and_runs_nothing_but_its_files(path: str):
    text = (WEB / f"{PAGES[path]}.html").read_text()
    files = set(re.findall(r"/static/([\w.-]+)", text))
    assert all((WEB / name).exists() for name in files)
    assert len(text) + sum((WEB / name).stat().st_size for name in files) < 30_000
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|https?://", text)
    assert all(re.search(r"\ssrc=", tag) for tag in re.findall(r"<script[^>]*>", text))


def test_scripts_only_ever_set_text():
    for file in WEB.glob("*.js"):
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|localStorage", file.read_text()
        )
