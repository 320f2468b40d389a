from __future__ import annotations

import asyncio
import json
import logging
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from redis.asyncio import Redis

from replicate_proxy_mw import ending
from replicate_proxy_mw.errors import StoreFailed
from replicate_proxy_mw.store import MemoryPredictionStore, StoredPrediction, ledger
from replicate_proxy_mw.store.ledger import PROBE
from replicate_proxy_mw.store.redis import RedisPredictionStore
from replicate_proxy_mw.telemetry.names import OUTCOME, STORE_FAILED
from tests.raw_asgi import Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream
from tests.services import redis_server
from tests.tenants import (
    CREATED,
    CREATES,
    LIST,
    OPTIONS,
    A,
    B,
    Switched,
    answers,
    ask,
    code,
    denies,
    hangs,
    nothing,
    owned,
    refuses,
    refuses_creations,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return OPTIONS


fast = {"store_timeout": 0.25}
each_failure = pytest.mark.parametrize("failure", [refuses, hangs, denies])


@each_failure
async def test_while_the_store_is_out_of_ordernothing_goes_up(
    upstream: RawUpstream, failure: Any, caplog: pytest.LogCaptureFixture
) -> None:
    store = Switched()
    store.before_put = store.before_get = failure
    app = owned(upstream.url, store=store, options=fast)
    targets = [("POST", one.target) for one in CREATES.values()]
    targets += [("GET", "/v1/predictions/p1"), ("POST", "/v1/trainings/p1/cancel"), ("DELETE", "/v1/files/p1")]
    for method, target in targets:
        caller = await ask(app, A, method, target)
        assert code(caller) == (503, "store_failed")
        assert caller.header(b"retry-after") == [b"1"]
    assert not upstream.requests
    assert "hunter2" not in caplog.text
    assert len(caplog.messages) == len(targets)


@each_failure
async def test_no_list_is_shown_while_the_store_is_out_of_order(upstream: RawUpstream, failure: Any) -> None:
    store = Switched()
    store.before_get = failure
    upstream.script = answers(LIST)
    caller = await ask(owned(upstream.url, store=store, options=fast), A, "GET", "/v1/predictions")
    assert code(caller) == (503, "store_failed")
    assert b"p1" not in caller.content


async def test_a_store_that_only_reads_stops_creates_before_they_go_up(upstream: RawUpstream) -> None:
    store = Switched()
    await store.put("p1", StoredPrediction(tenant="team-a"))
    store.before_put = refuses
    app = owned(upstream.url, store=store)
    assert code(await ask(app, A, "POST", "/v1/predictions")) == (503, "store_failed")
    assert not upstream.requests
    assert (await ask(app, A, "GET", "/v1/predictions/p1")).status == 200


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_store_that_is_cancelled_from_within(upstream: RawUpstream) -> None:
    async def cancelled(id: str) -> None:
        task = asyncio.create_task(asyncio.sleep(60))
        task.cancel()
        await task

    store = Switched()
    store.before_put = store.before_get = cancelled
    app = owned(upstream.url, store=store)
    for method, target in (("POST", "/v1/predictions"), ("GET", "/v1/predictions/p1")):
        assert code(await ask(app, A, method, target)) == (503, "store_failed")
    assert not upstream.requests


@each_failure
async def test_the_paid_answer_reaches_its_caller_all_the_same(
    upstream: RawUpstream,
    failure: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tracer_provider: TracerProvider,
    exporter: InMemorySpanExporter,
) -> None:
    monkeypatch.setattr(ledger, "PAUSES", (0.01,))
    store = Switched()

    async def fails(id: str) -> None:
        if id != PROBE:
            await failure(id)

    store.before_put = fails
    upstream.script = answers(CREATED, b"201 Created", b"x: y\r\n")
    app = owned(upstream.url, store=store, options=fast, tracer_provider=tracer_provider)
    with caplog.at_level(logging.INFO, "replicate_proxy_mw"):
        caller = await ask(app, A, "POST", "/v1/predictions")
    assert (caller.status, caller.content, caller.complete) == (201, CREATED, True)
    name = {refuses: "OSError", hangs: "TimeoutError", denies: "PermissionDenied"}[failure]
    # The record, the second attempt at it, and what telemetry keeps.
    assert caplog.messages == [f"prediction store failed: {name}"] * 3
    [span] = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert (span.attributes or {})[STORE_FAILED] is True
    assert (span.attributes or {})[OUTCOME] == "forwarded"


async def test_it_is_written_again_when_the_answer_is_out(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PAUSES", (0.01, 0.01, 0.01))
    store, caller = Switched(), Caller()

    async def fails_twice(id: str) -> None:
        assert caller.complete is (len(store.put_ids) > 2)
        if 2 <= len(store.put_ids) <= 3:
            await refuses(id)

    store.before_put = fails_twice
    upstream.script = answers(CREATED, b"201 Created")
    app = owned(upstream.url, store=store)
    await caller.call(app, http_scope("POST", "/v1/predictions", [A]))
    await app.aclose()
    assert store.put_ids == [PROBE, "p1", "p1", "p1"]
    assert await store.get(["p1"]) == {"p1": StoredPrediction(tenant="team-a")}


async def _failed(
    upstream: RawUpstream, store: Switched, monkeypatch: pytest.MonkeyPatch, *ids: str, pause: float = 100.0
) -> Any:
    """The proxy after creates that could not be written, neither with them nor afterwards."""
    monkeypatch.setattr(ledger, "PAUSES", (pause,))
    monkeypatch.setattr(ending, "AFTERWARDS_TIMEOUT", 0.01)
    app = owned(upstream.url, store=store)
    for id in ids:
        store.before_put = refuses_creations
        upstream.script = answers(b'{"id":"%s"}' % id.encode(), b"201 Created")
        assert (await ask(app, A, "POST", "/v1/predictions")).status == 201
    store.put_ids.clear()
    return app


async def test_meanwhile_its_creator_reaches_it_and_nobody_else(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Switched()
    app = await _failed(upstream, store, monkeypatch, "p1")
    upstream.script = answers(LIST)
    store.before_get = refuses
    assert (await ask(app, A, "GET", "/v1/predictions/p1")).status == 200
    store.before_get = nothing
    assert json.loads((await ask(app, A, "GET", "/v1/predictions")).content)["results"] == [
        {"id": "p1", "x": 1.5, "y": "é"}
    ]
    upstream.requests.clear()
    assert code(await ask(app, B, "GET", "/v1/predictions/p1")) == (404, "not_found")
    assert not upstream.requests


@pytest.mark.parametrize(("method", "target"), [("POST", "/v1/predictions"), ("GET", "/v1/predictions/p9")])
async def test_it_is_written_with_a_later_request(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch, method: str, target: str
) -> None:
    store = Switched()
    app = await _failed(upstream, store, monkeypatch, "p1", pause=0.0)
    store.before_put = nothing
    await ask(app, B, method, target)
    assert store.put_ids[0] == "p1"
    assert (await store.get(["p1"]))["p1"].tenant == "team-a"
    store.put_ids.clear()
    await ask(app, B, "GET", "/v1/predictions/p9")
    assert store.put_ids == []


async def test_not_every_request_tries_to(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Switched()
    app = await _failed(upstream, store, monkeypatch, "p1")
    for _ in range(3):
        await ask(app, B, "GET", "/v1/predictions/p9")
    assert store.put_ids == ["p1"]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_with_redis_that_stops_between_replicate_s_answer_and_the_write(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PAUSES", (0.0,))
    with redis_server() as server, ExitStack() as thawing:

        def script(connection: Connection) -> None:
            connection.request()
            thawing.enter_context(server.frozen())
            connection.answer(CREATED, status=b"201 Created")

        async with Redis.from_url(server.url) as redis, Redis.from_url(server.url) as of_another:
            apps = [owned(upstream.url, store=RedisPredictionStore(client)) for client in (redis, of_another)]
            upstream.script = script
            assert (await ask(apps[0], A, "POST", "/v1/predictions")).status == 201
            upstream.script = answers(b"{}")
            assert (await ask(apps[0], A, "GET", "/v1/predictions/p1")).status == 200
            assert (await ask(apps[0], B, "GET", "/v1/predictions/p1")).status == 503
            assert (await ask(apps[1], A, "GET", "/v1/predictions/p1")).status == 503
            thawing.close()
            assert (await ask(apps[0], B, "GET", "/v1/predictions/p1")).status == 404
            assert (await ask(apps[1], A, "GET", "/v1/predictions/p1")).status == 200
            assert (await ask(apps[1], B, "GET", "/v1/predictions/p1")).status == 404


async def test_one_that_the_store_never_takes_holds_up_no_other(
    upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Switched()
    app = await _failed(upstream, store, monkeypatch, "odd", "p1", pause=0.0)

    async def odd(id: str) -> None:
        if id == "odd":
            await refuses(id)

    store.before_put = odd
    for _ in range(2):
        await ask(app, B, "GET", "/v1/predictions/p9")
    assert "p1" in await store.get(["p1"])


@each_failure
async def test_any_call_is_bounded_and_told_alike(failure: Any, caplog: pytest.LogCaptureFixture) -> None:
    store = Switched()
    known = StoredPrediction(tenant="team-a")
    await store.put("p1", known)
    bounded = ledger.Ledger(store, timeout=0.05)
    store.before_get = failure
    with pytest.raises(StoreFailed):
        await bounded.call(lambda store: store.read("p1", "starting"))
    assert "hunter2" not in caplog.text
    assert [message.partition(":")[0] for message in caplog.messages] == ["prediction store failed"]
    store.before_get = nothing
    assert await bounded.call(lambda store: store.read("p1", "starting")) == replace(known, reads=1)


async def test_any_call_of_memory_comes_back_at_once() -> None:
    store = MemoryPredictionStore()
    await store.put("p1", StoredPrediction(tenant="team-a"))
    assert await ledger.Ledger(store, timeout=0.0).call(lambda store: store.claim("p1")) is not None


async def test_what_is_not_written_is_bounded(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_UNWRITTEN", 2)
    app = await _failed(upstream, Switched(), monkeypatch, "p1", "p2", "p3")
    upstream.script = answers(b"{}")
    reached = [(await ask(app, A, "GET", f"/v1/predictions/p{n}")).status for n in (1, 2, 3)]
    assert reached == [404, 200, 200]
