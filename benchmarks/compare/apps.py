"""The ASGI apps that are compared, as factories for uvicorn. Each forwards to the origin in `$UPSTREAM` with the token.

The peers are written as their documentation has it, but for their limits: stock httpx keeps 100 connections, and one
held request needs one.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Sequence
from importlib import import_module
from typing import Any

from .traffic import KEY, PREDICTION, RESPONSE_HEADERS, TOKEN

UPSTREAM = os.environ.get("UPSTREAM", "")
MAX_CONNECTIONS = 4096

# Not forwarded: hop-by-hop (RFC 9110, section 7.6.1), and what is replaced.
DROPPED = frozenset((b"host", b"authorization", b"connection", b"keep-alive", b"te", b"trailer", b"upgrade"))

Headers = list[tuple[bytes, bytes]]


def replicate_proxy_mw(*, fast: bool = False, sdk: bool = False) -> Any:
    from replicate_proxy_mw import ProxyConfig, ReplicateProxyMiddleware, StaticKeyResolver

    return ReplicateProxyMiddleware(
        host,
        key_resolver=StaticKeyResolver(TOKEN, api_keys=[KEY]),
        config=ProxyConfig(upstream=f"{UPSTREAM}/v1", max_connections=MAX_CONNECTIONS, fast=fast),
        **(providers() if sdk else {}),
    )


def providers() -> dict[str, Any]:
    """The SDK with spans in batches, to an exporter that drops them, and metrics."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Dropping(SpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    tracer_provider = TracerProvider()
    tracer_provider.add_span_processor(BatchSpanProcessor(Dropping()))
    return {"tracer_provider": tracer_provider, "meter_provider": MeterProvider([InMemoryMetricReader()])}


def default() -> Any:
    return replicate_proxy_mw()


def default_sdk() -> Any:
    return replicate_proxy_mw(sdk=True)


def fast() -> Any:
    return replicate_proxy_mw(fast=True)


def fast_sdk() -> Any:
    return replicate_proxy_mw(fast=True, sdk=True)


async def host(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    await send({"type": "http.response.start", "status": 404, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def lifespan(receive: Any, send: Any, close: Callable[[], Any] | None = None) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": message["type"] + ".complete"})
    if close is not None:
        await close()
    await send({"type": "lifespan.shutdown.complete"})


def bare() -> Any:
    """No proxy: what the server takes for itself."""
    content = PREDICTION.encode()
    headers = [(name.encode(), value.encode()) for name, value in RESPONSE_HEADERS.items()]
    headers += [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        await send({"type": "http.response.start", "status": 201, "headers": headers})
        await send({"type": "http.response.body", "body": content})

    return app


def client() -> Any:
    import httpx

    limits = httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=MAX_CONNECTIONS)
    return httpx.AsyncClient(limits=limits, timeout=60, trust_env=False)


def swapped(headers: Headers) -> Headers:
    kept = [(name, value) for name, value in headers if name not in DROPPED and not name.startswith(b"x-portkey-")]
    return [*kept, (b"authorization", f"Bearer {TOKEN}".encode())]


def stock_httpx() -> Any:
    upstream = client()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send, upstream.aclose)
            return

        async def body() -> AsyncIterator[bytes]:
            while True:
                message = await receive()
                yield message.get("body", b"")
                if not message.get("more_body"):
                    return

        url = f"{UPSTREAM}{scope['path']}?{scope['query_string'].decode()}".rstrip("?")
        content = body() if scope["method"] == "POST" else None
        request = upstream.build_request(scope["method"], url, headers=swapped(scope["headers"]), content=content)
        response = await upstream.send(request, stream=True)
        try:
            headers = [(name.lower(), value) for name, value in response.headers.raw]
            headers = [field for field in headers if field[0] not in (b"connection", b"transfer-encoding")]
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()

    return app


def starlette_recipe() -> Any:
    from starlette.applications import Starlette
    from starlette.background import BackgroundTask
    from starlette.requests import Request
    from starlette.responses import StreamingResponse
    from starlette.routing import Route

    upstream = client()

    async def proxy(request: Request) -> StreamingResponse:
        url = f"{UPSTREAM}{request.url.path}?{request.url.query}".rstrip("?")
        content = request.stream() if request.method == "POST" else None
        sent = upstream.build_request(request.method, url, headers=swapped(request.headers.raw), content=content)
        response = await upstream.send(sent, stream=True)
        return StreamingResponse(
            response.aiter_raw(),
            status_code=response.status_code,
            headers=response.headers,
            background=BackgroundTask(response.aclose),
        )

    return Starlette(routes=[Route("/{path:path}", proxy, methods=["GET", "POST"])])


def fastapi_proxy_lib() -> Any:
    library = import_module("fastapi_proxy_lib.fastapi.app")
    forward = library.reverse_http_app(client=client(), base_url=f"{UPSTREAM}/")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":  # it has no hook for headers
            host = [(name, value) for name, value in scope["headers"] if name == b"host"]
            scope = {**scope, "headers": [*host, *swapped(scope["headers"])]}
        await forward(scope, receive, send)

    return app
