"""The HTTP application, and what runs it."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import secrets
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gemma_wgpu.apps.server.choices import ChatFormat, Choice, Format, TextFormat, TokenTexts, usage
from gemma_wgpu.apps.server.engine import BusyError, Engine, StoppedError, Turn
from gemma_wgpu.apps.server.metrics import Metrics
from gemma_wgpu.apps.server.schemas import (
    MOST_CHOICES,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorResponse,
    Health,
    ModelCard,
    ModelList,
    Options,
)
from gemma_wgpu.engine import structured
from gemma_wgpu.engine.request import Text
from gemma_wgpu.errors import GemmaError, RequestError
from gemma_wgpu.gemma import Gemma

MOST_BODY = 1 << 20  # bytes of a request
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
_HUNG_UP = 499  # as nginx counts it; nobody is there to read it
_GRACE = 10  # seconds that requests under way have to end when the server is to stop
_KEY = HTTPBearer(auto_error=False, description="The key that the server was started with, if it was.")


class Refusal(HTTPException):
    """A response that says what is wrong, as OpenAI's API does."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, **headers: str
    ) -> None:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(status, message, named)
        self.param, self.code = param, code


def create_app(
    gemma: Gemma,
    engine: Engine,
    metrics: Metrics,
    *,
    name: str | None = None,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    local_only: bool = True,
) -> FastAPI:
    """The application: `gemma` as the model `name`, taking turns in `engine`.

    `origins` are the web pages' that may use it beside its own; `local_only` refuses what is addressed to a name that
    is not this machine's own, as a web page's can be made to be; where there is an `api_key`, that suffices.
    """
    served = name or gemma.name
    created = int(time.time())
    texts = TokenTexts(gemma.tokenizer)

    def check_host(request: Request) -> None:
        if local_only and not api_key and not _is_local(request.url.hostname or ""):
            raise Refusal(403, f"this server answers on this machine only, not as {request.url.hostname}")

    def check_key(given: Annotated[HTTPAuthorizationCredentials | None, Depends(_KEY)]) -> None:
        if api_key and not (given and secrets.compare_digest(given.credentials.encode(), api_key.encode())):
            message = "the API key is wrong" if given else "an API key is needed, as Authorization: Bearer KEY"
            raise Refusal(401, message, code="invalid_api_key", WWW_Authenticate="Bearer")

    def check_model(asked: str) -> None:
        if asked != served:
            raise Refusal(
                404, f"there is no model {asked!r}; {served!r} is served", param="model", code="model_not_found"
            )

    app = FastAPI(
        title="gemma_wgpu",
        version=version("gemma-wgpu"),
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        dependencies=[Depends(check_host)],
        responses={code: {"model": ErrorResponse} for code in ("4XX", "5XX")},
    )
    app.add_middleware(_LimitedBody)
    app.add_middleware(metrics.counted)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    for kind in (HTTPException, RequestValidationError, GemmaError, Exception):
        app.add_exception_handler(kind, _refused)
    metrics.watch(gemma, engine)
    keyed = [Depends(check_key)]
    card = ModelCard(id=served, created=created, owned_by="google", context_length=gemma.context_length)

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        content = files("gemma_wgpu.apps.server").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(content, headers=_PAGE_HEADERS)

    @app.get("/health")
    async def health(response: Response) -> Health:
        """Whether the last generation went well."""
        failure = engine.failure
        response.status_code = 503 if failure else 200
        return Health(
            status="failing" if failure else "ok",
            detail=str(failure) if failure else None,
            running=engine.running,
            waiting=engine.waiting,
        )

    @app.get("/metrics", dependencies=keyed, response_class=PlainTextResponse)
    def prometheus() -> Response:
        """Figures, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> ModelList:
        """The models that are served."""
        return ModelList(data=[card])

    @app.get("/v1/models/{model:path}", dependencies=keyed)
    async def model(model: str) -> ModelCard:
        """A model that is served."""
        check_model(model)
        return card

    @app.post("/v1/chat/completions", dependencies=keyed, response_model=ChatCompletion, responses=_STREAM)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """The reply to a chat."""
        check_model(body.model)
        messages = [message.model_dump(include={"role", "content"}) for message in body.messages]
        for message in messages:
            if message["role"] == "developer":  # OpenAI's newer name
                message["role"] = "system"
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        most = body.max_completion_tokens or body.max_tokens

        def drafts() -> list[Text]:
            constraint = _constraint(body.response_format)
            each = _options(body, most, logprobs)
            return [gemma.chat(messages, **options, constraint=constraint).draft for options in each]

        made = await asyncio.to_thread(drafts)
        return await answer(body, request, made, 1, logprobs is not None, ChatFormat(served))

    @app.post("/v1/completions", dependencies=keyed, response_model=Completion, responses=_STREAM)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """What goes on from a prompt, or from several."""
        check_model(body.model)
        prompts = _prompts(body.prompt)
        if not 1 <= len(prompts) * (body.n or 1) <= MOST_CHOICES:
            raise Refusal(400, f"prompts times n must be from 1 to {MOST_CHOICES}", param="prompt")

        def drafts() -> list[Text]:
            each = [_options(body, body.max_tokens, body.logprobs) for _ in prompts]
            return [gemma.generate(p, **o).draft for p, options in zip(prompts, each, strict=True) for o in options]

        made = await asyncio.to_thread(drafts)
        return await answer(body, request, made, len(prompts), body.logprobs is not None, TextFormat(served))

    async def answer(
        body: Options, request: Request, drafts: list[Text], prompts: int, logprobs: bool, form: Format
    ) -> Response:
        choices = [Choice(draft, texts, logprobs) for draft in drafts]
        turn = engine.submit(drafts)
        watching = asyncio.create_task(_cancel_when_gone(request, turn))
        if body.stream:

            async def events() -> AsyncIterator[str]:
                async with _cancelled_at_end(turn, watching):
                    async for event in _events(turn, choices, prompts, form, with_usage=body.include_usage):
                        yield event

            return StreamingResponse(
                events(),
                media_type="text/event-stream",
                headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            )
        async with _cancelled_at_end(turn, watching):
            async for index, piece in turn:
                choices[index].push(piece)
        return Response(_json(form.whole(choices, usage(drafts, prompts))), media_type="application/json")

    return app


class _LimitedBody:
    """Refuses a request whose body has more than MOST_BODY bytes, when so many have come."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        came = 0

        async def count() -> Message:
            nonlocal came
            message = await receive()
            came += len(message.get("body", b""))
            if came > MOST_BODY:
                raise Refusal(413, f"the body has more than {MOST_BODY:,} bytes")
            return message

        await self._app(scope, count, send)


async def _events(
    turn: Turn, choices: Sequence[Choice], prompts: int, form: Format, *, with_usage: bool
) -> AsyncIterator[str]:
    """The server-sent events of a stream. An error is one of them: the status has gone out already."""
    begun = set()
    try:
        async for index, piece in turn:
            if index not in begun:
                begun.add(index)
                if first := form.begin(index):
                    yield _event(_json(first))
            choice = choices[index]
            choice.push(piece)
            part = choice.take()
            if piece is None or part.text or part.logprobs:
                yield _event(_json(form.chunk(index, part, None if piece else choice.finish_reason)))
        if with_usage:
            yield _event(_json(form.last(usage(turn.texts, prompts))))
        yield _event("[DONE]")
    except GemmaError as error:
        yield _event(json.dumps(_content(str(error), "server_error", None, None)))
    except Exception:
        yield _event(json.dumps(_content("the server failed; its log says why", "server_error", None, None)))


@asynccontextmanager
async def _cancelled_at_end(turn: Turn, watching: asyncio.Task[None]) -> AsyncIterator[None]:
    """However it ends, the turn does not go on, and nobody watches for the client."""
    try:
        yield
    finally:
        watching.cancel()
        turn.cancel()


async def _cancel_when_gone(request: Request, turn: Turn) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    turn.cancel()


def _options(body: Options, most: int | None, logprobs: int | None) -> list[dict[str, Any]]:
    """Those of `Gemma.generate`, for each of the n texts."""
    options = body.model_dump(include=_SAMPLING, exclude_none=True)
    options |= {"max_new_tokens": most, "logprobs": logprobs, "stop": body.stop or ()}
    seeds = [None if body.seed is None else (body.seed + index) % (1 << 32) for index in range(body.n or 1)]
    return [options | {"seed": seed} for seed in seeds]


def _constraint(response_format: dict[str, Any] | None) -> structured.Constraint | None:
    try:
        return structured.from_response_format(response_format) if response_format else None
    except RequestError as error:
        raise Refusal(400, f"response_format: {error}", param="response_format") from error


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [token for token in prompt if isinstance(token, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


def _json(model: BaseModel) -> str:
    return model.model_dump_json()


def _event(data: str) -> str:
    return f"data: {data}\n\n"


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# Errors.


def _content(message: str, kind: str, param: str | None, code: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


async def _refused(request: Request, error: Exception) -> JSONResponse:
    """The response to whatever a request raised."""
    refusal = _refusal(error)
    # A body that does not come to its end is a bad one, too.
    if refusal.status_code in (400, 503) and await request.is_disconnected():
        refusal = Refusal(_HUNG_UP, "the client hung up")
    status = refusal.status_code
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    return JSONResponse(_content(refusal.detail, kind, refusal.param, refusal.code), status, refusal.headers)


def _refusal(error: Exception) -> Refusal:
    match error:
        case Refusal():
            return error
        case HTTPException():
            return Refusal(error.status_code, error.detail)
        case RequestValidationError():
            return _invalid(error)
        case BusyError():
            return Refusal(429, str(error), code="busy", Retry_After=str(error.retry_after))
        case StoppedError():
            return Refusal(503, str(error), code="stopped")
        case RequestError():
            too_long = "context_length" in str(error)
            return Refusal(400, str(error), code="context_length_exceeded" if too_long else None)
        case GemmaError():
            return Refusal(500, str(error))
    return Refusal(500, "the server failed; its log says why")


def _invalid(error: RequestValidationError) -> Refusal:
    first = error.errors()[0]
    if first["type"] == "json_invalid":
        return Refusal(400, f"the body is not JSON: {first['ctx']['error']}")
    where = [str(part) for part in first["loc"][1:]]
    name = first.get("ctx", {}).get("name") or (where[0] if where else None)
    prefix = f"{'.'.join(where)}: " if where else ""
    return Refusal(400, prefix + first["msg"], param=name, code=first["type"])


_STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Whole, or as a stream"}
}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


# What runs it.


def bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet; port 0 is any that is free. Raises RequestError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        raise RequestError(f"cannot serve at {host} port {port}: {error}; choose another --host or --port") from error
    return bound


def is_local(bound: socket.socket) -> bool:
    """Whether only this machine reaches a socket."""
    return _is_local(bound.getsockname()[0].partition("%")[0])


def address(bound: socket.socket) -> str:
    """The URL of a socket."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    gemma: Gemma,
    bound: socket.socket,
    *,
    name: str | None = None,
    api_key: str | None = None,
    origins: Sequence[str] = (),
    batch_size: int = 8,
    waiting: int = 16,
) -> None:
    """Serve `gemma` until SIGINT or SIGTERM: what runs then has 10 seconds to end, and is cut off on another one."""
    metrics = Metrics()
    with Engine(gemma, batch_size, waiting, metrics.ended) as engine:
        app = create_app(
            gemma,
            engine,
            metrics,
            name=name,
            api_key=api_key,
            origins=origins,
            local_only=is_local(bound),
        )
        # uvicorn raises the signals once more when it is done, for handlers that were there before.
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        server(app, grace=_GRACE).run([bound])


def server(app: FastAPI, *, grace: int) -> uvicorn.Server:
    """What runs `app`."""
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace
    )
    return uvicorn.Server(config)
