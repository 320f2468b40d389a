"""Row 6: the token and the caller's key are in no text that is printed, logged, raised, reported or exported."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from base64 import b64encode
from collections.abc import Callable
from traceback import TracebackException
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import Forward, MappingKeyResolver, ProxyRequest, ProxyResponse, ReplicateKey
from replicate_proxy_mw.errors import UpstreamAborted
from tests.raw_asgi import Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.rows import row

pytestmark = pytest.mark.anyio

# Of no form that a scrubber could tell.
TOKEN = "9d3f7a1c5e8b2046af91d7c3e5082b6479fc13ad"
KEY = "caller.Fn83QsdLx0WmZt5KhRvBy2"


def _pieces(text: str) -> set[str]:
    return {text[start : start + 12] for start in range(len(text) - 11)}


def _leaks(text: str, *secrets: str) -> set[str]:
    """The pieces of 12 characters of a secret, as it is or in base64, that `text` has."""
    forms = [*secrets, *(b64encode(b" " * i + one.encode()).decode()[4:-4] for one in secrets for i in range(3))]
    return {piece for form in forms for piece in _pieces(form) if piece in text}


def _report(error: BaseException) -> str:
    """What an error tracker makes of it: all of its chain, with the locals of all frames but the tests' own."""
    lines: list[str] = []
    rest: list[TracebackException | None] = [TracebackException.from_exception(error, capture_locals=True)]
    while rest:
        if (one := rest.pop()) is not None:
            lines += one.format_exception_only()
            for frame in one.stack:
                if "/tests/" not in frame.filename:
                    lines.append(f"{frame.filename} {frame.name} {frame.locals}")
            rest += [one.__cause__, one.__context__, *(one.exceptions or ())]
    return "\n".join(lines)


@row("2.6")
@pytest.mark.parametrize("show", [repr, str, format, ascii, lambda key: f"{key:>80}{key!r}%s" % key, lambda key: [key]])
def test_a_key_prints_no_token(show: Callable[[object], object]) -> None:
    assert not _leaks(repr(show(ReplicateKey(TOKEN, tenant="team-a"))), TOKEN)


@row("2.6")
@pytest.mark.parametrize("give", [pickle.dumps, copy.copy, copy.deepcopy, json.dumps, vars, dict, bytes])
def test_a_key_is_not_given_away(give: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError) as raised:
        give(ReplicateKey(TOKEN))
    assert not _leaks(_report(raised.value), TOKEN)


def _closes(connection: Connection) -> None:
    connection.request()


def _resets(connection: Connection) -> None:
    connection.request()
    connection.reset()


def _garbage(connection: Connection) -> None:
    request = connection.request()
    # Who takes our request for an answer tells the token back.
    connection.send(b"garbage\r\n" + (request.head if request else b"") + b"\r\n\r\n")


def _tells_back(connection: Connection) -> None:
    request = connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\nx-request-id: " + (request.head if request else b"").replace(b"\r", b"\x01"))
    connection.send(b"\r\ncontent-length: 0\r\n\r\n")


def _silent(connection: Connection) -> None:
    connection.request()
    connection.upstream.ready.set()
    connection.wait_closed()


def _cut(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc")


FAILURES = {"closes": _closes, "resets": _resets, "garbage": _garbage, "tells": _tells_back, "silent": _silent}


class Stage:
    """A host with a layer that reports all that fails below it."""

    def __init__(self, url: str, transport: str = "default", *, read_timeout: float = 5, **keywords: Any) -> None:
        resolver = MappingKeyResolver({KEY: ReplicateKey(TOKEN, tenant="team-a")})
        options = {"read_timeout": read_timeout, "capture_content": True, "fast": transport == "fast"}
        self._given = httpx.AsyncHTTPTransport() if transport == "given" else None
        keywords |= {"key_resolver": resolver, "layers": [self._reporting], "transport": self._given}
        self.app = proxy(url, options=options, **keywords)
        self.reports: list[str] = []

    def _reporting(self, forward: Forward) -> Forward:
        async def reporting(request: ProxyRequest) -> ProxyResponse:
            try:
                return await forward(request)
            except BaseException as error:
                self.reports.append(f"{request!r} {_report(error)}")
                raise

        return reporting

    async def ask(self, *more: tuple[bytes, bytes], method: str = "POST", target: str = "/v1/x") -> Caller:
        caller, key = Caller([b"{}"]), KEY.encode()
        scope = http_scope(method, target, [(b"x-portkey-api-key", key), *more])
        try:
            return await caller.call(self.app, scope)
        finally:
            await self.app.aclose()
            if self._given is not None:
                await self._given.aclose()


TRANSPORTS = ["default", "fast", "given"]


@row("2.6")
@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("failure", [*FAILURES, "refused"])
async def test_a_failure_tells_neither_token_nor_key(
    upstream: RawUpstream, failure: str, transport: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="replicate_proxy_mw")
    upstream.script = FAILURES.get(failure, _closes)
    url = "http://127.0.0.1:9/v1" if failure == "refused" else upstream.url
    stage = Stage(url, transport, read_timeout=0.1)
    caller = await stage.ask()
    assert caller.status in (502, 504)
    [report] = stage.reports
    assert "forward.py" in report
    logged = "".join(f"{record.getMessage()} {vars(record)}" for record in caplog.records)
    assert not _leaks(report + logged + repr(caller), TOKEN, KEY)


@row("2.6")
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_host_that_cancels_finds_no_token(upstream: RawUpstream, transport: str) -> None:
    upstream.script = _silent
    stage = Stage(upstream.url, transport)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(stage.ask)
        assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        tasks.cancel_scope.cancel()
    [report] = stage.reports
    assert "forward.py" in report
    assert not _leaks(report, TOKEN, KEY)


@row("2.6")
@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_what_leaves_the_middleware_holds_no_token(upstream: RawUpstream, transport: str) -> None:
    upstream.script = _cut
    with pytest.raises(UpstreamAborted) as raised:
        await Stage(upstream.url, transport).ask()
    assert not _leaks(_report(raised.value), TOKEN)


@row("2.6")
@pytest.mark.usefixtures("tells_secrets")
async def test_no_span_holds_token_or_key(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            told = {"id": "p1", "model": f"acme/{TOKEN}", "status": "failed", "error": f"no {TOKEN}", "output": [TOKEN]}
            connection.answer(json.dumps(told).encode(), status=b"201 Created")

    upstream.script = script
    stage = Stage(upstream.url, tracer_provider=tracer_provider)
    said = [(b"x-portkey-trace-id", KEY), (b"x-portkey-metadata", json.dumps({"_user": KEY})), (b"user-agent", KEY)]
    await stage.ask(*((name, value.encode()) for name, value in said), target="/v1/predictions")
    exported = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert "REDACTED" in exported
    assert not _leaks(exported, TOKEN, KEY)


@row("2.6")
async def test_no_span_holds_the_text_of_an_exception(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    stage = Stage(upstream.url, tracer_provider=tracer_provider)

    async def send(message: Any) -> None:
        raise RuntimeError("no postgres://user:hunter2@db")

    caller = Caller()
    scope = http_scope(headers=[(b"x-portkey-api-key", KEY.encode())])
    with pytest.raises(RuntimeError):
        await stage.app(scope, caller.receive, send)
    await stage.app.aclose()
    spans = exporter.get_finished_spans()
    assert spans
    assert "hunter2" not in "".join(span.to_json() for span in spans)
