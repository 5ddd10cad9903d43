"""The HTTP service: routes over a `Backend`. No Ray here, so that a test runs it whole in one process:

    create_api(config, LocalBackend({name: Engine(model)}))

`app` puts the same thing on Ray Serve.
"""

import asyncio
import logging
import mimetypes
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from dpo_ray import __version__
from dpo_ray.acquisition.label_queue import LabelQueue, open_queue
from dpo_ray.errors import InputError
from serve import compare, labels, metrics, schema
from serve.answers import Backend, gathered, new_seed, pick, pieces
from serve.auth import ApiKey, KeyRing, Meter, read_keys
from serve.config import ServeConfig
from serve.guard import Guard, headers_of, logger
from serve.schema import ApiError, Ask, Begun, Choice, Envelope, Piece, Usage

WEB = Path(__file__).parent / "web"
PAGES = {"/": "chat.html", "/compare": "compare.html", "/label": "label.html"}
CHARS_PER_TOKEN = 4
"""About, for the limits of keys: what a prompt really has is known to the engine only, and taken into account then."""

Kind = TypeVar("Kind", bound=schema.Strict)
Events = AsyncGenerator[bytes]


class Service:
    """What the routes share.

    Raises:
        InputError: No key though keys are needed, or a folder cannot be used.
    """

    def __init__(self, config: ServeConfig, backend: Backend) -> None:
        self.config, self.backend = config, backend
        self.keys = None if config.insecure else KeyRing([*config.api_keys, *read_keys(config.keys)])
        if self.keys is not None and not len(self.keys):
            raise InputError("no API key: set DPO_RAY_API_KEY, or name a file of keys, or be `insecure` on loopback")
        self.meter, self.metrics = Meter(), metrics.Metrics()
        self.created = int(time.time())
        self.store = None if config.preferences is None else compare.PreferenceStore(config.preferences)
        self.secret = None if config.preferences is None else compare.load_secret(config.preferences)
        self.queue = None if config.queue is None else open_queue(config.queue)

    @property
    def names(self) -> list[str]:
        return [*self.config.split, *self.config.real_names]

    def real_name(self, name: str, by: str) -> str:
        """The model that answers to a name; `by` decides where traffic is split."""
        if name in self.config.split:
            return pick(self.config.split[name], by)
        if name not in self.config.real_names:
            known = ", ".join(self.names)
            raise ApiError(
                404, f"there is no model `{name}`; there are: {known}", param="model", code="model_not_found"
            )
        return name

    async def read(self, request: Request, kind: type[Kind]) -> Kind:
        """The body of a request, within bounds of size and time."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":  # what a foreign page may send without asking is none of this
            raise ApiError(415, "the body must be JSON: Content-Type: application/json")
        limits, body = self.config.limits, bytearray()
        try:
            async with asyncio.timeout(limits.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limits.max_body_bytes:
                        raise ApiError(413, f"the body is larger than {limits.max_body_bytes} bytes")
        except TimeoutError:
            raise ApiError(408, f"the body did not come within {limits.body_timeout_s:g} s") from None
        return schema.read(kind, bytes(body))

    def enter(self, request: Request, tokens: int) -> ApiKey:
        """Count a request against the limits of its key; `Meter.leave` must follow."""
        key: ApiKey = request.state.key
        refusal = self.meter.enter(key, tokens)
        if refusal is not None:
            self.metrics.refused.labels(refusal.limit).inc()
            raise ApiError(
                429,
                f"the limit `{refusal.limit}` of this key is reached",
                code="rate_limit_exceeded",
                retry_after_s=refusal.retry_after_s,
            )
        return key

    # Completions

    async def complete(self, request: Request, ask: Ask, shape: "Shape") -> Response:
        """Answer as a stream or whole."""
        estimate = sum(map(_characters, ask.prompts)) // CHARS_PER_TOKEN
        num_answers = ask.n * len(ask.prompts)
        key = self.enter(request, estimate + num_answers * (ask.max_tokens or 0))
        found = self._metered(request, ask, key, estimate)
        if not ask.is_stream:
            try:
                whole = await unless_gone(request, gathered(found, num_answers))
            finally:
                await found.aclose()
            if whole is None:
                return Response(status_code=499)
            self._tell(request, ask, "".join(choice.text for choice in whole.choices))
            return JSONResponse(shape.whole(whole.choices, whole.usage))
        try:
            first = await anext(found)
        except BaseException:
            await found.aclose()
            raise
        assert isinstance(first, Begun)
        return EventStream(self._events(request, ask, shape, first, found))

    async def _metered(
        self, request: Request, ask: Ask, key: ApiKey, estimate: int
    ) -> AsyncGenerator[Begun | list[Piece]]:
        """The pieces of an answer, counted."""
        started, first_at, tokens = time.monotonic(), 0.0, 0
        source = pieces(self.backend, ask, self.metrics, started + self.config.limits.request_timeout_s)
        request.state.told = {"model": ask.model}
        try:
            async for item in source:
                if isinstance(item, Begun):
                    self.meter.charge(key, item.prompt_tokens - estimate)
                    self.metrics.prompt_tokens.labels(ask.model).inc(item.prompt_tokens)
                    request.state.told["prompt_tokens"] = item.prompt_tokens
                else:
                    tokens += sum(piece.num_tokens for piece in item)
                    if not first_at:
                        first_at = time.monotonic()
                        if ask.is_stream:
                            self.metrics.first_token.labels(ask.model).observe(first_at - started)
                yield item
        finally:
            await source.aclose()
            self.meter.leave(key)
            self.metrics.completion_tokens.labels(ask.model).inc(tokens)
            self.metrics.duration.labels(ask.model).observe(time.monotonic() - started)
            if ask.is_stream and tokens > 1:
                self.metrics.between_tokens.labels(ask.model).observe((time.monotonic() - first_at) / (tokens - 1))
            request.state.told["completion_tokens"] = tokens

    async def _events(
        self, request: Request, ask: Ask, shape: "Shape", begun: Begun, found: AsyncGenerator[Begun | list[Piece]]
    ) -> Events:
        """Server-sent events of a stream whose first item is there."""
        text, tokens = "", 0
        try:
            for data in shape.opening(ask.n * len(ask.prompts)):
                yield schema.event(data)
            async for item in found:
                assert not isinstance(item, Begun)
                data = shape.piece([Choice(p.number, p.text, p.finish_reason, p.logps) for p in item])
                tokens += sum(piece.num_tokens for piece in item)
                if self.config.log_text:
                    text += "".join(piece.text for piece in item)
                yield schema.event(data)
            usage = Usage(begun.prompt_tokens, tokens)
            if shape.wants_usage:
                yield schema.event(shape.last(usage))
            yield schema.DONE
            self._tell(request, ask, text)
        except ApiError as error:
            yield schema.event(error.body)
        finally:
            await found.aclose()

    def _tell(self, request: Request, ask: Ask, text: str) -> None:
        if self.config.log_text:
            request.state.told |= {"prompts": list(ask.prompts), "text": text}


def _characters(prompt: str | tuple[dict[str, Any], ...]) -> int:
    return len(prompt) if isinstance(prompt, str) else sum(len(turn["content"]) for turn in prompt)


class Shape:
    """How answers of one route look."""

    def __init__(self, envelope: Envelope, *, is_chat: bool, wants_usage: bool) -> None:
        self._envelope, self._is_chat, self.wants_usage = envelope, is_chat, wants_usage

    def whole(self, choices: Sequence[Choice], usage: Usage) -> dict[str, Any]:
        build = schema.chat_response if self._is_chat else schema.completion_response
        return build(self._envelope, choices, usage)

    def opening(self, num_answers: int) -> list[dict[str, Any]]:
        """What stands before the first text: the role of each answer in a chat."""
        roles = [Choice(number, "") for number in range(num_answers)]
        return [schema.chat_chunk(self._envelope, roles, is_first=True)] if self._is_chat else []

    def piece(self, choices: Sequence[Choice]) -> dict[str, Any]:
        build = schema.chat_chunk if self._is_chat else schema.completion_response
        return build(self._envelope, choices, usage=None)

    def last(self, usage: Usage) -> dict[str, Any]:
        build = schema.chat_chunk if self._is_chat else schema.completion_response
        return build(self._envelope, [], usage=usage)


class EventStream(StreamingResponse):
    """A stream whose source ends with it, also when its client is gone before the first event."""

    def __init__(self, events: Events) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self._events = events

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()


Result = TypeVar("Result")


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result | None:
    """The result of some work; None, and the work is stopped, once the client has hung up."""
    task = asyncio.ensure_future(work)

    async def hung_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watch = asyncio.create_task(hung_up())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return await task if task.done() else None
    finally:
        watch.cancel()
        if not task.done():
            task.cancel()
            await asyncio.wait({task})


def create_api(config: ServeConfig, backend: Backend) -> FastAPI:
    """The application.

    Raises:
        InputError: See `Service`.
    """
    service = Service(config, backend)
    api = FastAPI(title="dpo-ray", version=__version__, docs_url=None, redoc_url=None)
    api.state.service = service
    _add_errors(api)
    _add_completions(api, service)
    _add_rewards(api, service)
    _add_preferences(api, service)
    _add_labels(api, service)
    _add_pages(api)
    _add_health(api, service)
    api.add_middleware(Guard, keys=service.keys, metrics=service.metrics)
    if config.cors:  # outermost: a browser asks beforehand, without a key
        api.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.cors),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
        )
    return api


def _add_errors(api: FastAPI) -> None:
    """Every error in the API's shape."""

    async def told(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, headers=headers_of(error))

    async def by_framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return await told(request, ApiError(error.status_code, error.detail or "there is nothing here"))

    async def of_input(request: Request, error: Exception) -> Response:
        return await told(request, ApiError(400, str(error)))

    async def unexpected(request: Request, error: Exception) -> Response:
        logger.error("request %s failed", request.state.request_id, exc_info=error)
        return await told(request, ApiError(500, f"the service failed; request {request.state.request_id}"))

    api.add_exception_handler(ApiError, told)
    api.add_exception_handler(HTTPException, by_framework)
    api.add_exception_handler(InputError, of_input)
    api.add_exception_handler(Exception, unexpected)


def _add_completions(api: FastAPI, service: Service) -> None:
    def ask_of(wanted: schema.SamplingRequest, prompts: Sequence[Any], limit: int | None, by: str) -> Ask:
        return Ask(
            service.real_name(wanted.model, wanted.user or by),
            tuple(prompts),
            n=wanted.n,
            max_tokens=limit,
            temperature=wanted.temperature,
            top_p=wanted.top_p,
            presence_penalty=wanted.presence_penalty,
            frequency_penalty=wanted.frequency_penalty,
            stops=wanted.stops,
            seed=new_seed() if wanted.seed is None else wanted.seed,
            is_stream=wanted.stream,
        )

    @api.post("/v1/chat/completions", **_described(schema.ChatRequest, service.names))
    async def chat(request: Request) -> Response:
        wanted = await service.read(request, schema.ChatRequest)
        by = request.state.request_id
        prompt = tuple(message.turn for message in wanted.messages)
        ask = ask_of(wanted, [prompt], wanted.limit, by)._replace(wants_logps=wanted.wants_logprobs)
        envelope = Envelope(f"chatcmpl-{by}", int(time.time()), ask.model)
        return await service.complete(request, ask, Shape(envelope, is_chat=True, wants_usage=wanted.wants_usage))

    @api.post("/v1/completions", **_described(schema.CompletionRequest, service.names))
    async def completions(request: Request) -> Response:
        wanted = await service.read(request, schema.CompletionRequest)
        by = request.state.request_id
        ask = ask_of(wanted, wanted.prompts, wanted.limit, by)._replace(wants_logps=wanted.wants_logprobs)
        envelope = Envelope(f"cmpl-{by}", int(time.time()), ask.model)
        return await service.complete(request, ask, Shape(envelope, is_chat=False, wants_usage=wanted.wants_usage))

    @api.get("/v1/models")
    async def models() -> Response:
        return JSONResponse(schema.models_response(dict.fromkeys(service.names, service.created)))

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        service.real_name(name, "")
        (found,) = schema.models_response({name: service.created})["data"]
        return JSONResponse(found)


def _add_rewards(api: FastAPI, service: Service) -> None:
    @api.post("/v1/rewards", **_described(schema.RewardRequest, service.names))
    async def rewards(request: Request) -> Response:
        wanted = await service.read(request, schema.RewardRequest)
        model = service.real_name(wanted.model, request.state.request_id)
        items = [(item.text, tuple(item.responses)) for item in wanted.input]
        estimate = sum(_characters(text) + sum(map(len, responses)) for text, responses in items) // CHARS_PER_TOKEN
        key = service.enter(request, estimate)
        try:
            found = await unless_gone(request, service.backend.rewards(model, items))
        finally:
            service.meter.leave(key)
        if found is None:
            return Response(status_code=499)
        if isinstance(found, ApiError):
            raise found
        envelope = Envelope(f"reward-{request.state.request_id}", int(time.time()), model)
        return JSONResponse(schema.rewards_response(envelope, found))


def _add_preferences(api: FastAPI, service: Service) -> None:
    def need(what: Any, option: str) -> Any:
        if what is None:
            raise ApiError(404, f"this service was started without `{option}`", code="not_configured")
        return what

    async def record(request: Request, preference: compare.PreferenceRequest, comparison: str | None) -> str:
        key = service.enter(request, 0)
        try:
            add = need(service.store, "preferences").add
            found: str = await run_in_threadpool(add, preference, by=key.name, comparison=comparison)
        finally:
            service.meter.leave(key)
        service.metrics.preferences.labels(str(comparison is not None).lower()).inc()
        return found

    def sides(comparison: str) -> tuple[str, str]:
        need(service.store, "preferences")
        return compare.sides(service.secret or b"", comparison, need(service.config.compare, "compare"))

    def learnt(messages: list[schema.Message], *names: str) -> str | list[schema.Message]:
        """The prompt as these models would be trained on it: the bare text, where they only continue text."""
        continues = all(service.config.model_behind(name).chat == "plain" for name in names)
        return messages[0].text if continues and len(messages) == 1 else messages

    @api.post("/v1/preferences", status_code=201, **_described(compare.PreferenceRequest))
    async def preferences(request: Request) -> Response:
        need(service.store, "preferences")
        found = await record(request, await service.read(request, compare.PreferenceRequest), None)
        return JSONResponse({"id": found, "object": "preference"}, 201)

    @api.post("/compare/stream", **_described(compare.CompareRequest))
    async def one_side(request: Request) -> Response:
        wanted = await service.read(request, compare.CompareRequest)
        left, right = sides(wanted.comparison)
        ask = Ask(
            left if wanted.side == "left" else right,
            (tuple(message.turn for message in wanted.messages),),
            max_tokens=wanted.max_tokens,
            temperature=wanted.temperature,
            seed=new_seed(),
            is_stream=True,
        )
        envelope = Envelope(f"compare-{request.state.request_id}", int(time.time()), "hidden")
        return await service.complete(request, ask, Shape(envelope, is_chat=True, wants_usage=False))

    @api.post("/compare/vote", **_described(compare.VoteRequest))
    async def vote(request: Request) -> Response:
        wanted = await service.read(request, compare.VoteRequest)
        left, right = sides(wanted.comparison)
        named = wanted.named((left, right))
        written = learnt(wanted.messages, left, right)
        found = await record(request, named.model_copy(update={"prompt": written}), wanted.comparison)
        return JSONResponse({"id": found, "left_model": left, "right_model": right})


def _add_labels(api: FastAPI, service: Service) -> None:
    async def of_queue(work: Callable[[LabelQueue], Any]) -> Response:
        queue = service.queue
        if queue is None:
            raise ApiError(404, "this service was started without `queue`", code="not_configured")
        try:
            return JSONResponse(await run_in_threadpool(work, queue))
        except InputError as error:
            raise ApiError(409, str(error), code="label_refused") from None

    @api.get("/label/task")
    async def task(person: str = "") -> Response:
        who = labels.named(person)
        return await of_queue(lambda queue: labels.task(queue, who))

    @api.get("/label/progress")
    async def progress() -> Response:
        return await of_queue(labels.progress)

    @api.post("/label/answer", **_described(labels.AnswerRequest))
    async def answer(request: Request) -> Response:
        wanted = await service.read(request, labels.AnswerRequest)
        return await of_queue(lambda queue: labels.answer(queue, wanted.person, wanted.id, wanted.preferred))

    @api.post("/label/skip", **_described(labels.SkipRequest))
    async def skip(request: Request) -> Response:
        wanted = await service.read(request, labels.SkipRequest)
        return await of_queue(lambda queue: labels.skip(queue, wanted.person, wanted.id))

    @api.post("/label/undo", **_described(labels.UndoRequest))
    async def undo(request: Request) -> Response:
        wanted = await service.read(request, labels.UndoRequest)
        return await of_queue(lambda queue: labels.undo(queue, wanted.person))


def _add_pages(api: FastAPI) -> None:
    files = {file.name: file for file in WEB.iterdir() if file.is_file()}

    def shown(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"there is no file {name}")
        media = mimetypes.guess_type(name)[0] or "application/octet-stream"
        return Response(files[name].read_bytes(), media_type=media)

    def page(name: str) -> Callable[[], Response]:  # an argument of the route itself could be set in its URL
        return lambda: shown(name)

    for path, name in PAGES.items():
        api.add_api_route(path, page(name), include_in_schema=False, methods=["GET"])
    api.add_api_route("/static/{name}", shown, include_in_schema=False, methods=["GET"])


def _add_health(api: FastAPI, service: Service) -> None:
    @api.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @api.get("/readyz")
    async def readyz() -> Response:
        await service.backend.loads()
        return JSONResponse({"status": "ready"})

    @api.get("/metrics")
    async def prometheus() -> Response:
        try:
            loads: Mapping[str, Sequence[schema.Load]] = await service.backend.loads()
        except ApiError:  # what this process has counted is worth telling without them
            loads = {}
        return Response(service.metrics.text(loads), headers={"content-type": metrics.CONTENT_TYPE})


def _described(kind: type[schema.Strict], names: Sequence[str] = ()) -> dict[str, Any]:
    """What OpenAPI says of a route whose body is read by `schema.read`; `names` are those of the models."""
    tree = kind.model_json_schema()
    if names:
        tree["properties"]["model"]["enum"] = list(names)
    errors = {code: {"description": told} for code, told in ERRORS.items()}
    return {
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(tree)}}}
        },
        "responses": errors,
    }


ERRORS = {
    400: "A parameter is wrong; the error names it.",
    401: "There is no API key, or it is wrong.",
    404: "There is no such model, or the service was started without this.",
    408: "The body did not come in time.",
    409: "The queue of pairs says otherwise.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    429: "A limit is reached, or all engines are busy; see Retry-After.",
    503: "No engine could answer.",
}


def _inlined(tree: dict[str, Any]) -> dict[str, Any]:
    """A JSON schema without references: those of pydantic count from the schema, OpenAPI's from the document."""
    definitions = tree.pop("$defs", {})

    def put(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return put(definitions[node["$ref"].rpartition("/")[2]])
            return {key: put(value) for key, value in node.items()}
        return [put(item) for item in node] if isinstance(node, list) else node

    found: dict[str, Any] = put(tree)
    return found


class LocalBackend:
    """Engines in this process, by the name of their model or adapter."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self._engines = engines

    def write(self, ask: Ask) -> AsyncGenerator[ApiError | Begun | list[Piece]]:
        source: AsyncGenerator[ApiError | Begun | list[Piece]] = self._engines[ask.model].write(ask)
        return source

    async def rewards(self, model: str, items: Any) -> list[list[schema.Reward]] | ApiError:
        found: list[list[schema.Reward]] | ApiError = await self._engines[model].rewards(model, items)
        return found

    async def loads(self) -> dict[str, list[schema.Load]]:
        problems = [engine.problem() for engine in self._engines.values()]
        told = next((problem for problem in problems if problem is not None), None)
        if told is not None:
            raise ApiError(503, told)
        return {name: [engine.load()] for name, engine in self._engines.items()}


logging.getLogger("dpo_ray.serve").setLevel(logging.INFO)
