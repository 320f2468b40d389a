from __future__ import annotations

import gzip
from typing import Any

import anyio
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id

from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.store import MemoryPredictionStore, StoredPrediction, ledger
from replicate_proxy_mw.store.ledger import PROBE
from replicate_proxy_mw.telemetry.names import STORE_FAILED
from replicate_proxy_mw.testing import FakeReplicate
from tests.raw_asgi import Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream
from tests.tenants import (
    CREATED,
    CREATES,
    JSON,
    OPTIONS,
    A,
    Switched,
    answers,
    ask,
    code,
    created,
    hangs,
    owned,
    refuses,
    sends,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return OPTIONS


async def test_it_is_written_before_the_answer_leaves(fake_replicate: FakeReplicate) -> None:
    store, caller = Switched(), Caller([CREATES["predictions.create"].body])
    seen: list[tuple[bool, int | None, int]] = []

    async def note(id: str) -> None:
        seen.append((id == PROBE, caller.status, len(fake_replicate.requests)))

    store.before_put = note
    app = owned(fake_replicate.url, store=store)
    await caller.call(app, http_scope("POST", "/v1/predictions", [A, JSON]))
    await app.aclose()
    assert seen == [(True, None, 0), (False, None, 1)]


async def test_no_cache_keeps_what_is_a_tenant_s(fake_replicate: FakeReplicate) -> None:
    app = owned(fake_replicate.url, options={"public_url": "https://app.example/v1"})
    create = CREATES["predictions.create"]
    caller = await ask(app, A, "POST", create.target, create.body, JSON)
    assert (caller.status, caller.header(b"cache-control")) == (201, [b"private, no-store"])


async def test_a_store_that_hangs_holds_up_no_paid_answer_for_its_own_time(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PAID_TIMEOUT", 0.05)
    monkeypatch.setattr(ledger, "PAUSES", ())
    store = Switched()

    async def hangs_for_creations(id: str) -> None:
        if id != PROBE:
            await anyio.sleep_forever()

    store.before_put = hangs_for_creations
    upstream.script = answers(CREATED, b"201 Created")
    caller = await ask(owned(upstream.url, store=store, options={"store_timeout": 60.0}), A, "POST", "/v1/predictions")
    assert (caller.status, caller.content) == (201, CREATED)


async def test_what_is_remembered(
    fake_replicate: FakeReplicate, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    store = Switched()
    id = await created(owned(fake_replicate.url, store=store, tracer_provider=tracer_provider), A)
    [span] = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert span.context is not None
    flags = f"{span.context.trace_flags:02x}"
    traceparent = f"00-{format_trace_id(span.context.trace_id)}-{format_span_id(span.context.span_id)}-{flags}"
    stored = (await store.get([id]))[id]
    assert (stored.tenant, stored.traceparent) == ("team-a", traceparent)
    assert STORE_FAILED not in (span.attributes or {})


async def test_without_telemetry_it_is_remembered_too(fake_replicate: FakeReplicate) -> None:
    store = MemoryPredictionStore()
    id = await created(owned(fake_replicate.url, store=store), A)
    assert await store.get([id, PROBE]) == {id: StoredPrediction(tenant="team-a")}


@pytest.mark.parametrize("status", [b"400 Bad Request", b"402 Payment Required", b"422 X", b"500 X", b"302 Found"])
async def test_what_replicate_refuses_is_not_remembered(upstream: RawUpstream, status: bytes) -> None:
    store = Switched()
    upstream.script = answers(b'{"id": "p1"}', status)
    caller = await ask(owned(upstream.url, store=store), A, "POST", "/v1/predictions")
    assert (str(caller.status).encode(), caller.content) == (status[:3], b'{"id": "p1"}')
    assert store.put_ids == [PROBE]


LONG = b'"' + b"x" * (9 << 20) + b'"'


@pytest.mark.parametrize(
    ("body", "encoding"),
    [
        (b' { "id" : "p1"}', b"identity"),
        (b'{"a": {"id": "no"}, "id": "\\u0070\\u0031", "b": 1}', b"identity"),
        (b'{"id": "p1", "a": \xff}', b"identity"),
        (b'{"id": "p1", "a": ', b"identity"),
        (gzip.compress(b'{"id": "p1"}', mtime=0), b"gzip"),
        (b'{"id": "p1", "output": ' + LONG + b"}", b"identity"),
    ],
)
async def test_where_the_id_is_found(upstream: RawUpstream, body: bytes, encoding: bytes) -> None:
    store = Switched()
    upstream.script = answers(body, b"201 Created", b"content-encoding: " + encoding + b"\r\n")
    caller = await ask(owned(upstream.url, store=store), A, "POST", "/v1/predictions")
    assert caller.content == (body if encoding == b"identity" else gzip.decompress(body))
    assert store.put_ids == [PROBE, "p1"]


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b"",
        b"[]",
        b"late",
        b'{"id": null}',
        b'{"id": ["p1"]}',
        b'{"a" 1, "id": "p1"}',
        b'{"a": ' + b"[" * 100_000,
        b'{"output": ' + LONG + b', "id": "p1"}',
    ],
)
async def test_an_answer_without_an_id_is_paid_and_passes(
    upstream: RawUpstream,
    body: bytes,
    caplog: pytest.LogCaptureFixture,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
) -> None:
    store = Switched()
    upstream.script = answers(body, b"201 Created")
    app = owned(upstream.url, store=store, tracer_provider=tracer_provider)
    caller = await ask(app, A, "POST", "/v1/predictions")
    assert (caller.status, caller.content) == (201, body)
    assert store.put_ids == [PROBE]
    assert caplog.messages == [
        "own_predictions: the answer to predictions.create has no id; nobody will reach what it made"
    ]
    [span] = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert (span.attributes or {})[STORE_FAILED] is True


async def test_an_answer_of_events_is_not_held(upstream: RawUpstream, caplog: pytest.LogCaptureFixture) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        head = b"HTTP/1.1 201 Created\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        connection.send(head + b"9\r\ndata: 1\n\n\r\n")
        connection.upstream.go_on.wait(5)
        connection.send(b"0\r\n\r\n")

    upstream.script = script
    app = owned(upstream.url)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A]))
        with anyio.fail_after(2):
            await caller.got_chunk.wait()
        upstream.go_on.set()
    assert (caller.content, caller.complete) == (b"data: 1\n\n", True)
    assert "has no id" in caplog.text
    await app.aclose()


async def test_a_long_answer_that_is_cut_is_cut(upstream: RawUpstream) -> None:
    store = Switched()
    head = b"HTTP/1.1 201 Created\r\ncontent-type: application/json\r\ncontent-length: 99000000\r\n\r\n"
    upstream.script = sends(head + b'{"id": "p1", "output": ' + LONG)
    caller, app = Caller(), owned(upstream.url, store=store)
    with pytest.raises(UpstreamAborted):
        await caller.call(app, http_scope("POST", "/v1/predictions", [A]))
    assert (caller.status, caller.complete) == (201, False)
    assert store.put_ids == [PROBE, "p1"]
    await app.aclose()


async def test_a_caller_who_leaves_while_it_is_written(upstream: RawUpstream) -> None:
    store, caller = Switched(), Caller()

    async def leaves(id: str) -> None:
        if id != PROBE:
            caller.left.set()
            await anyio.wait_all_tasks_blocked()
            await anyio.sleep(0.01)

    store.before_put = leaves
    upstream.script = answers(CREATED, b"201 Created")
    app = owned(upstream.url, store=store)
    await caller.call(app, http_scope("POST", "/v1/predictions", [A]))
    await app.aclose()
    assert await store.get(["p1"]) == {"p1": StoredPrediction(tenant="team-a")}


async def test_a_caller_who_leaves_while_it_is_not_written(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PAUSES", (0.01,))
    store, caller = Switched(), Caller()

    async def leaves_once(id: str) -> None:
        if len(store.put_ids) == 2:
            caller.left.set()
            await anyio.wait_all_tasks_blocked()
            await refuses(id)

    store.before_put = leaves_once
    upstream.script = answers(CREATED, b"201 Created")
    app = owned(upstream.url, store=store)
    await caller.call(app, http_scope("POST", "/v1/predictions", [A]))
    await app.aclose()
    assert await store.get(["p1"]) == {"p1": StoredPrediction(tenant="team-a")}


async def test_a_host_that_is_cancelled_while_it_is_written(upstream: RawUpstream) -> None:
    store, caller = Switched(), Caller()
    upstream.script = answers(CREATED, b"201 Created")
    app = owned(upstream.url, store=store)
    async with anyio.create_task_group() as tasks:

        async def cancels(id: str) -> None:
            if id != PROBE:
                tasks.cancel_scope.cancel()
                await anyio.sleep(0.01)

        store.before_put = cancels
        tasks.start_soon(caller.call, app, http_scope("POST", "/v1/predictions", [A]))
    await app.aclose()
    assert await store.get(["p1"]) == {"p1": StoredPrediction(tenant="team-a")}


async def test_a_caller_s_own_limit_that_runs_out_while_it_is_written(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PAID_TIMEOUT", 5.0)
    store = Switched()

    async def slow(id: str) -> None:
        if id != PROBE:
            await anyio.sleep(1.5)

    store.before_put = slow
    upstream.script = answers(CREATED, b"201 Created")
    app = owned(upstream.url, store=store, options={"store_timeout": 5.0})
    caller = await ask(app, A, "POST", "/v1/predictions", b"", (b"x-portkey-request-timeout", b"1200"))
    assert (caller.status, caller.content) == (201, CREATED)
    assert "p1" in await store.get(["p1"])


async def test_a_caller_s_own_limit_that_runs_out_before(upstream: RawUpstream) -> None:
    store = Switched()
    store.before_put = hangs
    app = owned(upstream.url, store=store, options={"store_timeout": 5.0})
    caller = await ask(app, A, "POST", "/v1/predictions", b"", (b"x-portkey-request-timeout", b"50"))
    assert code(caller) == (408, "request_timeout")
    assert not upstream.requests
