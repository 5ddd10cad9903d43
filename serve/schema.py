"""The OpenAI API as this service speaks it: requests that are read strictly, responses and errors in their shapes.

Pure: bytes in, values out. A parameter that would change the answer and that we do not have is an error with its name,
never ignored. Shapes are those of the OpenAI API reference (chat completions, completions, models), 2026.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_STOPS, MAX_CHOICES = 4, 16


class ApiError(Exception):
    """A refusal, as the client sees it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors cross processes: the arguments by name, which pickle would lose."""
        return _rebuilt, (self.status, self.message, self.param, self.code, self.retry_after_s)

    @property
    def kind(self) -> str:
        """OpenAI's `type` of the error."""
        if self.status in (401, 403):
            return "authentication_error" if self.status == 401 else "permission_error"
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _rebuilt(status: int, message: str, param: str | None, code: str | None, retry_after_s: float | None) -> ApiError:
    return ApiError(status, message, param=param, code=code, retry_after_s=retry_after_s)


class Strict(BaseModel):
    """Unknown keys are errors, and values are not bent into another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TextPart(Strict):
    type: Literal["text"]
    text: str


class Message(Strict):
    """A turn. Content in parts is text only."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": self.text}


class StreamOptions(Strict):
    include_usage: bool = False


class SamplingRequest(Strict):
    """What both kinds of completions have in common."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=MAX_CHOICES)
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    user: str | None = None
    """Taken and not used, as the API says: it names the client's own user."""

    @field_validator("temperature", "top_p", "n", "stream", "presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        """Clients send null for what they do not set; a whole number is a number."""
        if value is None:
            return cls.model_fields[info.field_name].default
        is_number = info.field_name not in ("n", "stream") and isinstance(value, int) and not isinstance(value, bool)
        return float(value) if is_number else value

    @model_validator(mode="after")
    def _stream_options_are_for_streams(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream: true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        found = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return tuple(text for text in found if text)

    @property
    def wants_usage(self) -> bool:
        """In a stream; a whole response always has it."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(SamplingRequest):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer; None: up to the model's last position."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)


class CompletionRequest(SamplingRequest):
    """`POST /v1/completions`."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: Literal[0] | None = None
    """0: of the drawn tokens; rankings of others are not kept."""
    echo: Literal[False] = False

    @property
    def prompts(self) -> list[str]:
        return [self.prompt] if isinstance(self.prompt, str) else self.prompt

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None


class RewardItem(Strict):
    """A prompt, as text or as messages, and responses to it."""

    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    responses: list[str] = Field(min_length=1, max_length=MAX_CHOICES)

    @model_validator(mode="after")
    def _one_prompt(self) -> "RewardItem":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either `prompt` or `messages`")
        return self

    @property
    def text(self) -> str | tuple[dict[str, Any], ...]:
        """The prompt, as engines take it."""
        return self.prompt if self.prompt is not None else tuple(m.turn for m in self.messages or ())


class RewardRequest(Strict):
    """`POST /v1/rewards`."""

    model: str
    input: list[RewardItem] = Field(min_length=1, max_length=64)


NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "parallel_tool_calls": (None, True, False),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "top_logprobs": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "prediction": (None,),
    "reasoning_effort": (None, "none"),
    "verbosity": (None,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "metadata": (None, {}),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "web_search_options": (None,),
}
"""Parameters of the API that this service does not have, and the values with which they change nothing."""

Request = TypeVar("Request", bound=Strict)


def read(kind: type[Request], body: bytes) -> Request:
    """A request of some kind.

    Raises:
        ApiError: 400, which names the parameter.
    """
    try:
        tree = json.loads(body.decode())
        json.dumps(tree, ensure_ascii=False).encode()  # half a surrogate pair, as an escape, is no character
    except (UnicodeDecodeError, UnicodeEncodeError):
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise ApiError(400, "the body is not a JSON object", code="invalid_json")
    for name in tree.keys() & NEUTRAL.keys() - kind.model_fields.keys():
        if not any(tree[name] == value and type(tree[name]) is type(value) for value in NEUTRAL[name]):
            raise ApiError(400, f"`{name}` is not supported", param=name, code="unsupported_parameter")
    known = {name: value for name, value in tree.items() if name not in NEUTRAL or name in kind.model_fields}
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        raise _explained(error) from None


def _explained(error: ValidationError) -> ApiError:
    """The first problem, by the client's own names."""
    problem = error.errors()[0]
    # pydantic puts the kind of an alternative into the place: `stop.list[...]`, `messages.0.content.str`.
    place = [str(part) for part in problem["loc"] if isinstance(part, int) or str(part).isidentifier()]
    place = [part for part in place if part not in ("str", "int", "bool", "float", "TextPart")]
    name = ".".join(place)
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"unknown parameter `{name}`", param=name, code="unknown_parameter")
    if problem["type"] == "missing":
        return ApiError(400, f"`{name}` is required", param=name, code="missing_required_parameter")
    message = problem["msg"].removeprefix("Value error, ")
    return ApiError(400, f"`{name}`: {message}" if name else message, param=name or None, code="invalid_value")


class TokenLogp(NamedTuple):
    """A token of an answer and its log-prob under the model itself, nats."""

    text: str
    logp: float


class Ask(NamedTuple):
    """What an engine is to write. Values only: it crosses processes."""

    model: str
    prompts: tuple[str | tuple[dict[str, Any], ...], ...]
    n: int = 1
    """Answers to each prompt."""
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stops: tuple[str, ...] = ()
    seed: int = 0
    is_stream: bool = False
    wants_logps: bool = False


class Begun(NamedTuple):
    """An engine has taken a request up."""

    prompt_tokens: int


class Piece(NamedTuple):
    """What has come of an answer since the last piece of it."""

    number: int
    """From 0: all answers to the first prompt, then to the second."""
    text: str
    num_tokens: int
    finish_reason: Literal["stop", "length"] | None = None
    logps: Sequence[TokenLogp] | None = None


class Reward(NamedTuple):
    """What a model thinks of a response, against its reference."""

    reward: float
    """beta (log pi - log pi_ref), nats."""
    logps: float
    """Summed log p(response | prompt) under the model."""
    ref_logps: float
    num_tokens: int
    """Of the response, with its end token."""


class Load(NamedTuple):
    """What an engine is at, and has done since its start."""

    running: int
    """Answers in the batch."""
    waiting: int
    cache_used: float
    """Share of the cache that requests hold."""
    steps: int
    tokens: int
    """Written."""
    requests: int


class Choice(NamedTuple):
    """One answer, or a piece of one in a stream."""

    number: int
    """From 0, of `n`."""
    text: str
    finish_reason: Literal["stop", "length"] | None = None
    logps: Sequence[TokenLogp] | None = None


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int

    @property
    def tree(self) -> dict[str, int]:
        return self._asdict() | {"total_tokens": self.prompt_tokens + self.completion_tokens}


class Envelope(NamedTuple):
    """What all parts of a response share."""

    id: str
    created: int
    """Seconds since 1970."""
    model: str


def chat_response(envelope: Envelope, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
    """A whole answer of `/v1/chat/completions`."""
    listed = [
        _choice(choice, _chat_logprobs) | {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        for choice in choices
    ]
    return _tree(envelope, "chat.completion", listed) | {"usage": usage.tree}


def chat_chunk(
    envelope: Envelope, choices: Sequence[Choice], *, is_first: bool = False, usage: Usage | None = None
) -> dict[str, Any]:
    """A piece of a stream; the last one with usage has no choices."""
    listed = []
    for choice in choices:
        delta = {"role": "assistant", "content": ""} if is_first else {"content": choice.text} if choice.text else {}
        listed.append(_choice(choice, _chat_logprobs) | {"delta": delta})
    tree = _tree(envelope, "chat.completion.chunk", listed)
    return tree if usage is None else tree | {"usage": usage.tree}


def completion_response(envelope: Envelope, choices: Sequence[Choice], usage: Usage | None) -> dict[str, Any]:
    """An answer of `/v1/completions`, whole or, without usage, a piece of a stream: both have one shape."""
    listed = [_choice(choice, _completion_logprobs) | {"text": choice.text} for choice in choices]
    tree = _tree(envelope, "text_completion", listed)
    return tree if usage is None else tree | {"usage": usage.tree}


def rewards_response(envelope: Envelope, rewards: Sequence[Sequence[Reward]]) -> dict[str, Any]:
    """An answer of `/v1/rewards`, in the order of the request."""
    data = [{"index": i, "rewards": [reward._asdict() for reward in behind]} for i, behind in enumerate(rewards)]
    return envelope._asdict() | {"object": "list", "data": data}


def models_response(models: Mapping[str, int]) -> dict[str, Any]:
    """`GET /v1/models`: names, and when each was made."""
    listed = [
        {"id": name, "object": "model", "created": created, "owned_by": "dpo-ray"} for name, created in models.items()
    ]
    return {"object": "list", "data": listed}


def event(tree: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return f"data: {json.dumps(tree, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


DONE = b"data: [DONE]\n\n"


def _tree(envelope: Envelope, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
    return envelope._asdict() | {"object": kind, "choices": choices}


def _choice(choice: Choice, logprobs: Any) -> dict[str, Any]:
    told = None if choice.logps is None else logprobs(choice.logps)
    return {"index": choice.number, "finish_reason": choice.finish_reason, "logprobs": told}


def _chat_logprobs(logps: Sequence[TokenLogp]) -> dict[str, Any]:
    listed = [
        {"token": item.text, "logprob": item.logp, "bytes": list(item.text.encode()), "top_logprobs": []}
        for item in logps
    ]
    return {"content": listed, "refusal": None}


def _completion_logprobs(logps: Sequence[TokenLogp]) -> dict[str, Any]:
    offsets = [0]
    for item in logps:
        offsets.append(offsets[-1] + len(item.text))
    return {
        "tokens": [item.text for item in logps],
        "token_logprobs": [item.logp for item in logps],
        "top_logprobs": None,
        "text_offset": offsets[:-1],
    }
