"""Requests are read strictly and refused by name; responses have the shapes that the OpenAI client reads."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import types
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from serve.schema import (
    ApiError,
    ChatRequest,
    Choice,
    CompletionRequest,
    Envelope,
    TokenLogp,
    Usage,
    chat_chunk,
    chat_response,
    completion_response,
    event,
    models_response,
    read,
)

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def chat(**more: Any) -> ChatRequest:
    return read(ChatRequest, json.dumps(CHAT | more).encode())


def refused(kind: Any, body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        read(kind, body)
    assert caught.value.status == 400
    assert caught.value.body["error"]["type"] == "invalid_request_error"
    assert "\n" not in caught.value.message
    return caught.value


def test_defaults_are_those_of_the_api():
    request = chat()
    assert (request.temperature, request.top_p, request.n, request.stream) == (1.0, 1.0, 1, False)
    assert (request.limit, request.stops, request.seed, request.wants_logprobs, request.wants_usage) == (
        None,
        (),
        None,
        False,
        False,
    )
    assert read(CompletionRequest, b'{"model": "m", "prompt": "p"}').limit == 16


def test_null_is_as_good_as_nothing():
    names = ("temperature", "top_p", "n", "stream", "stop", "seed", "presence_penalty", "logprobs", "tools", "user")
    assert chat(**dict.fromkeys(names)) == chat()


def test_everything_that_is_supported_is_read():
    request = chat(
        max_completion_tokens=7,
        max_tokens=9,
        temperature=0,
        top_p=0.5,
        n=2,
        stop=["a", "", "b"],
        seed=-5,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        presence_penalty=1,
        frequency_penalty=-0.5,
        user="u",
    )
    assert (request.limit, request.temperature, request.stops, request.seed) == (7, 0.0, ("a", "b"), -5)
    assert (request.wants_usage, request.wants_logprobs, request.presence_penalty) == (True, True, 1.0)
    assert chat(stop="x").stops == ("x",)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts}])
    assert request.messages[0].turn == {"role": "system", "content": "ab"}
    prompts = read(CompletionRequest, b'{"model": "m", "prompt": ["p", "q"], "logprobs": 0}')
    assert (prompts.prompts, prompts.wants_logprobs) == (["p", "q"], True)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"temperature": 2.1}, "temperature", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"temperature": True}, "temperature", "invalid_value"),
    ({"top_p": 0}, "top_p", "invalid_value"),
    ({"n": 0}, "n", "invalid_value"),
    ({"n": 1.0}, "n", "invalid_value"),
    ({"n": 17}, "n", "invalid_value"),
    ({"max_tokens": 0}, "max_tokens", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"stop": [1]}, "stop", "invalid_value"),
    ({"seed": 2**63}, "seed", "invalid_value"),
    ({"stream": "yes"}, "stream", "invalid_value"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
    ({"model": None}, "model", "invalid_value"),
    ({"temprature": 1}, "temprature", "unknown_parameter"),
    ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
    ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
    ({"top_logprobs": 3}, "top_logprobs", "unsupported_parameter"),
    ({"top_logprobs": False}, "top_logprobs", "unsupported_parameter"),
    ({"store": True}, "store", "unsupported_parameter"),
    ({"best_of": 2}, "best_of", "unsupported_parameter"),
]


@pytest.mark.parametrize(("more", "param", "code"), WRONG)
def test_what_cannot_be_done_is_refused_by_its_name(more: dict[str, Any], param: str, code: str):
    error = refused(ChatRequest, json.dumps(CHAT | more).encode())
    assert (error.param, error.code) == (param, code)
    assert f"`{param}`" in error.message


def test_what_changes_nothing_is_taken():
    neutral = {"tools": [], "response_format": {"type": "text"}, "modalities": ["text"], "store": False, "best_of": 1}
    assert chat(**neutral) == chat()


def test_stream_options_need_a_stream():
    assert "stream: true" in refused(ChatRequest, json.dumps(CHAT | {"stream_options": {}}).encode()).message


def test_a_completion_refuses_what_it_cannot_do():
    for more, param in (({"echo": True}, "echo"), ({"logprobs": 2}, "logprobs"), ({"suffix": "x"}, "suffix")):
        assert refused(CompletionRequest, json.dumps({"model": "m", "prompt": "p"} | more).encode()).param == param
    for prompt in ([], [1, 2], None):
        error = refused(CompletionRequest, json.dumps({"model": "m", "prompt": prompt}).encode())
        assert (error.param or "").startswith("prompt")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'"x"', b"[" * 100000, b"nan"])
def test_a_body_that_is_no_object_is_refused(body: bytes):
    assert refused(ChatRequest, body).code == "invalid_json"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.sampled_from([*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "top_logprobs", "x"])


@given(st.dictionaries(NAMES, JSON, max_size=6), st.sampled_from([ChatRequest, CompletionRequest]))
def test_no_json_ends_in_anything_but_a_request_or_a_refusal(tree: dict[str, Any], kind: Any):
    found: Any
    try:
        found = read(kind, json.dumps(tree).encode())
    except ApiError as error:
        found = error
    if isinstance(found, ApiError):
        assert (found.status, json.loads(json.dumps(found.body))) == (400, found.body)
    else:
        assert isinstance(found, kind)


ENVELOPE = Envelope("id-1", 1700000000, "m")
LOGPS = [TokenLogp("Hé", -0.5), TokenLogp("!", -1.25)]


def test_responses_have_the_shapes_that_the_client_knows():
    whole = chat_response(ENVELOPE, [Choice(0, "Hé!", "stop", LOGPS), Choice(1, "", "length")], Usage(3, 2))
    read_back = ChatCompletion.model_validate(whole, strict=True)
    assert read_back.choices[0].message.content == "Hé!"
    assert read_back.usage is not None
    assert read_back.usage.total_tokens == 5
    assert read_back.choices[0].logprobs is not None
    assert read_back.choices[0].logprobs.content is not None
    assert [item.logprob for item in read_back.choices[0].logprobs.content] == [-0.5, -1.25]
    assert bytes(read_back.choices[0].logprobs.content[0].bytes or []).decode() == "Hé"

    first = ChatCompletionChunk.model_validate(chat_chunk(ENVELOPE, [Choice(0, "")], is_first=True), strict=True)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    last = ChatCompletionChunk.model_validate(chat_chunk(ENVELOPE, [], usage=Usage(1, 2)), strict=True)
    assert (last.choices, last.usage and last.usage.total_tokens) == ([], 3)

    legacy = types.Completion.model_validate(
        completion_response(ENVELOPE, [Choice(0, "Hé!", "stop", LOGPS)], Usage(1, 2)), strict=True
    )
    assert legacy.choices[0].logprobs is not None
    assert legacy.choices[0].logprobs.text_offset == [0, 2]
    assert types.Model.model_validate(models_response({"m": 5})["data"][0], strict=True).id == "m"


def test_an_event_is_one_line_whatever_the_text():
    sent = event(chat_chunk(ENVELOPE, [Choice(0, "a\n\nb\u2028")]))
    assert sent.endswith(b"\n\n")
    assert sent.count(b"\n") == 2
    assert json.loads(sent.removeprefix(b"data: "))["choices"][0]["delta"]["content"] == "a\n\nb\u2028"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_errors_have_their_type(status: int, kind: str):
    assert ApiError(status, "x", param="p", code="c").body == {
        "error": {"message": "x", "type": kind, "param": "p", "code": "c"}
    }
