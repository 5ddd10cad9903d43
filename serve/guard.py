"""What stands before every route: keys, request ids, security headers, one log line. Whatever is not public needs
a key.

ASGI without a framework, so that no route can be added behind its back.
"""

import json
import logging
import re
import time
import uuid
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serve.auth import ApiKey, KeyRing, bearer
from serve.metrics import Metrics
from serve.schema import ApiError

logger = logging.getLogger("dpo_ray.serve")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

PUBLIC = re.compile(r"/(healthz|readyz|compare|label|static/[A-Za-z0-9._-]+)?")
"""Whole paths without a key, GET only: states without numbers, and pages, which hold no data of their own."""

LOOPBACK = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d+)?", re.IGNORECASE)
ANYBODY = ApiKey(name="anybody", sha256="0" * 64)
"""Who asks a service without keys; no secret has this hash."""

HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """Lets requests through to an application, or answers them itself.

    Args:
        keys: None answers anybody, on loopback names only: a page elsewhere must not reach this machine's service.
    """

    def __init__(self, app: Asgi, keys: KeyRing | None, metrics: Metrics) -> None:
        self._app, self._keys, self._metrics = app, keys, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], state["started"] = request_id, time.monotonic()
        status = 0

        async def told(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name.lower() for name, _ in message["headers"]}
                more = HEADERS if given == request_id else HEADERS | {"x-request-id": request_id}
                message["headers"] = [
                    *message["headers"],
                    *((k.encode(), v.encode()) for k, v in more.items() if k.encode() not in own),
                ]
            await send(message)

        self._metrics.open.inc()
        try:
            try:
                state["key"] = self._admitted(scope, headers)
            except ApiError as error:
                await refuse(error, told)
            else:
                await self._app(scope, receive, told)
        finally:
            self._metrics.open.dec()
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.requests.labels(route, str(status)).inc()
            key = state.get("key")
            line = {
                "request_id": request_id,
                "method": scope["method"],
                "route": route,
                "status": status,
                "ms": round(1000 * (time.monotonic() - state["started"]), 1),
                "key": key.name if key is not None else None,
            }
            logger.info(json.dumps(line | state.get("told", {})))

    def _admitted(self, scope: Scope, headers: dict[bytes, bytes]) -> ApiKey | None:
        """Whose key the request has; None where none is needed."""
        if self._keys is None:
            if not LOOPBACK.fullmatch(headers.get(b"host", b"").decode("latin-1")):
                raise ApiError(403, "without keys the service answers to the names of this machine's loopback only")
            return ANYBODY
        if scope["method"] in ("GET", "HEAD") and PUBLIC.fullmatch(scope["path"]):
            return None
        secret = bearer(headers.get(b"authorization", b"").decode("latin-1"))
        if secret is None:
            raise ApiError(401, "an API key is needed: Authorization: Bearer KEY", code="missing_api_key")
        key = self._keys.find(secret)
        if key is None:
            raise ApiError(401, "the API key is wrong", code="invalid_api_key")
        return key


async def refuse(error: ApiError, send: Send) -> None:
    """Answer with an error."""
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(name.encode(), value.encode()) for name, value in headers_of(error).items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def headers_of(error: ApiError) -> dict[str, str]:
    """What goes with an error besides its body."""
    if error.status == 401:
        return {"www-authenticate": "Bearer"}
    if error.retry_after_s is not None:
        return {"retry-after": str(max(1, round(error.retry_after_s + 0.5)))}
    return {}
