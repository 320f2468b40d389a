from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import AsyncIterator

import anyio
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from replicate_proxy_mw.testing import serve


async def hello(request: Request) -> PlainTextResponse:
    return PlainTextResponse(f"hello from {request.url.port}")


def test_each_app_has_a_port_of_its_own() -> None:
    app = Starlette(routes=[Route("/", hello, methods=["QUERY"])])
    began = time.perf_counter()
    with serve(app, PlainTextResponse("other")) as served:
        assert time.perf_counter() - began < 1
        assert len(set(served.urls)) == 2
        answer = httpx.request("QUERY", served.url)
        assert answer.text == f"hello from {httpx.URL(served.url).port}"
        assert "server" not in answer.headers
        assert httpx.get(served.urls[1]).text == "other"
    with pytest.raises(httpx.ConnectError):
        httpx.get(served.url)


def test_httptools_can_be_chosen() -> None:
    pytest.importorskip("httptools")
    with serve(Starlette(routes=[Route("/", hello)]), http="httptools") as served:
        assert httpx.get(served.url).status_code == 200


def test_lifespan_runs_around() -> None:
    seen = []

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        seen.append("up")
        yield
        seen.append("down")

    with serve(Starlette(lifespan=lifespan)):
        assert seen == ["up"]
    assert seen == ["up", "down"]


def test_lifespan_can_be_off() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await PlainTextResponse("up")(scope, receive, send)

    with serve(app, lifespan="off") as served:
        assert httpx.get(served.url).text == "up"


def test_an_error_at_start_is_raised() -> None:
    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        raise LookupError("no database")
        yield

    with pytest.raises(LookupError, match="no database"), serve(Starlette(lifespan=lifespan)):
        pytest.fail("was served")


def test_a_refusal_to_start_is_raised() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "not today"})

    with pytest.raises(RuntimeError, match="not today"), serve(app):
        pytest.fail("was served")


def test_a_missing_parser_is_raised() -> None:
    with pytest.raises(Exception, match="nonsense"), serve(Starlette(), http="nonsense:Parser"):  # type: ignore[arg-type]
        pytest.fail("was served")


def test_open_streams_do_not_hold_up_the_end() -> None:
    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await anyio.sleep(0.01)

    async def stream(request: Request) -> StreamingResponse:
        return StreamingResponse(endless())

    with httpx.Client() as client:
        with serve(Starlette(routes=[Route("/", stream)]), grace=0) as served:
            answer = client.send(client.build_request("GET", served.url), stream=True)
            chunks = answer.iter_raw()
            assert next(chunks).startswith(b"x")
        answer.close()


def test_answers_under_way_are_finished() -> None:
    entered = threading.Event()

    async def slow(request: Request) -> PlainTextResponse:
        entered.set()
        await anyio.sleep(0.05)
        return PlainTextResponse("done")

    texts: list[str] = []
    with serve(Starlette(routes=[Route("/", slow)])) as served:
        thread = threading.Thread(target=lambda: texts.append(httpx.get(served.url).text))
        thread.start()
        assert entered.wait(5)
    thread.join()
    assert texts == ["done"]
