"""The addresses of the server, and what stands at each."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from imagen_scale.errors import ImagenScaleError
from imagen_scale.serving.calls import Call, GoneError, datum
from imagen_scale.serving.engine import Engine
from imagen_scale.serving.limits import Limits
from imagen_scale.serving.metrics import CONTENT_TYPE
from imagen_scale.serving.refusal import Refusal, refusal_of
from imagen_scale.serving.request import Asked, read_request, unknown_model
from imagen_scale.serving.waiting import Made

IMAGES = "/v1/images/generations"
BODY_S = 30  # within which a body has to arrive
GONE = 499  # as nginx counts callers who went away; nobody reads it


def application(
    engine: Engine, model: str, *, limits: Limits, key: str | None, hosts: list[str] | None
) -> Any:
    """The server as an ASGI application.

    Args:
        engine: Makes the pictures.
        model: What the run or the bundle is called.
        limits: How much a request may ask for.
        key: That callers must know; None asks for none.
        hosts: Names under which it is addressed; None takes any.
    """
    app, answers = FastAPI(openapi_url=None), _Answers(engine, model, limits, key)
    for path, method, answer, is_open in (
        (IMAGES, "POST", answers.images, False),
        ("/v1/models", "GET", answers.models, False),
        ("/v1/models/{name:path}", "GET", answers.one_model, False),
        ("/metrics", "GET", answers.metrics, False),
        ("/healthz", "GET", answers.healthz, True),
        ("/readyz", "GET", answers.readyz, True),
    ):
        known = [] if is_open else [Depends(answers.check_key)]
        methods = ["GET", "HEAD"] if method == "GET" else [method]  # some balancers send HEAD
        app.add_api_route(path, answer, methods=methods, dependencies=known, response_model=None)
    for kind in (Refusal, ImagenScaleError, Exception):
        app.add_exception_handler(kind, _refused)
    app.add_exception_handler(HTTPException, _not_here)
    if hosts is not None:  # a page elsewhere whose name is made to point here is not answered
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    app.add_middleware(_Counted, engine=engine)
    return app


class _Answers:
    """What is answered at each address; see `application`."""

    def __init__(self, engine: Engine, model: str, limits: Limits, key: str | None) -> None:
        self.engine, self.model, self.limits, self.key = engine, model, limits, key
        created = int(time.time())
        self.card = {
            "id": model, "object": "model", "created": created, "owned_by": "imagen-scale"
        }  # fmt: skip

    async def check_key(self, request: Request) -> None:
        if self.key is None:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(given.strip().encode("latin-1"), self.key.encode())
        if scheme.lower() != "bearer" or not is_right:
            raise Refusal(
                401, "a key is needed: send Authorization: Bearer with it.", code="invalid_api_key"
            )

    async def images(self, request: Request) -> Response:
        try:
            body = await _body(request, self.limits.body)
        except ClientDisconnect:
            return Response(status_code=GONE)
        asked = read_request(body, self.engine.cascade, self.model, self.limits)
        call = Call(self.engine, asked)
        if asked.streams:
            return _Stream(call, _streamed(call, asked, request))
        made = {}
        try:
            async with aclosing(call.events(request.receive)) as events:
                async for index, event in events:
                    if isinstance(event, Made):
                        made[index] = await datum(event.picture)
        except GoneError:
            return Response(status_code=GONE)
        data = [made[index] for index in range(len(made))]
        return JSONResponse({"created": int(time.time()), **_facts(asked), "data": data})

    async def models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self.card]}

    async def one_model(self, name: str) -> dict[str, Any]:
        if name != self.model:
            raise unknown_model(name, self.model)
        return self.card

    async def metrics(self) -> Response:
        return Response(self.engine.metrics.text(), media_type=CONTENT_TYPE)

    async def healthz(self) -> dict[str, str]:
        return {"status": "ok"}

    async def readyz(self) -> JSONResponse:
        state = self.engine.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)


async def _refused(request: Request, error: Exception) -> JSONResponse:
    refusal = refusal_of(error)
    return JSONResponse(refusal.body, refusal.status, refusal.headers)


async def _not_here(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:60]}: {error.detail}."
    return JSONResponse(Refusal(error.status_code, message).body, error.status_code)


async def _body(request: Request, most: int) -> bytes:
    """The body of a request.

    Raises:
        Refusal: If it is no JSON by its type, too large, or does not come.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page elsewhere can send other types without asking
        raise Refusal(400, "the body is not JSON by its header; send Content-Type: "
                      "application/json.", code="invalid_json")  # fmt: skip
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most:
                    raise Refusal(413, f"the body is larger than {most} bytes.", code="too_large")
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_S} s.") from None
    return bytes(body)


def _facts(asked: Asked) -> dict[str, Any]:
    return {"size": f"{asked.size}x{asked.size}", "output_format": "png"}


async def _streamed(call: Call, asked: Asked, request: Request) -> AsyncIterator[str]:
    """Steps and pictures as server-sent events, then OpenAI's last line."""
    try:
        async with aclosing(call.events(request.receive)) as events:
            async for index, event in events:
                if isinstance(event, Made):
                    facts = {**_facts(asked), "created_at": int(time.time())}
                    made = {"index": index, **await datum(event.picture), **facts}
                    yield _event("image_generation.completed", made)
                else:
                    told = {"index": index, **event._asdict()}
                    yield _event("image_generation.progress", told)
    except GoneError:
        return
    except Refusal as refusal:
        yield _event("error", refusal.body)
    yield "data: [DONE]\n\n"


def _event(kind: str, values: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **values})}\n\n"


class _Stream(StreamingResponse):
    """Events of a call, which ends with them, whether anybody heard of one or not."""

    def __init__(self, call: Call, events: AsyncIterator[str]) -> None:
        super().__init__(events, media_type="text/event-stream")
        self.call = call

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.call.end()


class _Counted:
    """Counts the requests for images by their status."""

    def __init__(self, app: Any, engine: Engine) -> None:
        self.app, self.requests = app, engine.metrics.requests

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self.requests.labels(message["status"]).inc()
            await send(message)

        is_image = scope.get("path") == IMAGES
        await self.app(scope, receive, send_counted if is_image else send)
