from __future__ import annotations

import gzip
import json
import logging
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from replicate_proxy_mw import Forward, PermissionDenied, ProxyRequest, ProxyResponse, creates
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.layers import results
from replicate_proxy_mw.layers.idempotency import idempotency_keys
from replicate_proxy_mw.layers.results import reuse_results
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.testing import FakeReplicate, ManualClock
from replicate_proxy_mw.testing.catalogue import seed
from tests.paid import CALLERS, A, B, C, D, Header, Replicate, SwitchedOnce, code, create, hangs, paying, refuses, told
from tests.raw_asgi import Caller, http_scope
from tests.raw_upstream import Connection, RawUpstream
from tests.telemetry.scenarios import Recorded, of
from tests.tenants import CREATES, HELLO_WORLD, JSON

pytestmark = pytest.mark.anyio

[FAILS] = [(model.versions or ())[0].id for model in seed() if model.full_name == "replicate/always-fails"]
SIMPLE = (b"x-portkey-config", b'{"cache": {"mode": "simple"}}')
REFRESH = (b"x-portkey-cache-force-refresh", b"true")
QUEUE, RUN = 1.0, 2.0


def aged(seconds: float) -> Header:
    return b"x-portkey-config", json.dumps({"cache": {"mode": "simple", "max_age": seconds}}).encode()


def body(version: str = HELLO_WORLD, **more: Any) -> bytes:
    return json.dumps({"version": version, "input": {"text": "Ada"}, **more}).encode()


class Stage:
    """A FakeReplicate whose clock is that of the layer and its store, too."""

    def __init__(self, **options: Any) -> None:
        self.clock = ManualClock()
        tokens = {key.authorization().decode().split()[1]: "acme" for key in CALLERS.values()}
        self.fake = FakeReplicate(tokens=tokens, clock=self.clock, queue_time=QUEUE, run_time=RUN)
        self.store = SwitchedOnce(now=self.clock.now)
        self.transport = httpx.ASGITransport(self.fake)
        self.app = self.proxy(**options)

    def proxy(self, *, below: Any = (), **options: Any) -> Any:
        defaults: dict[str, Any] = {"store": self.store, "now": self.clock.now}
        layer = reuse_results(**(defaults | options))
        return paying("http://127.0.0.1:1/v1", transport=self.transport, layers=[layer, *below])

    async def ask(self, *headers: Header, **more: Any) -> tuple[str, str]:
        """What became of a create, as the cache says, and its id."""
        more.setdefault("body", body())
        caller = await create(self.app, *headers, **more)
        assert caller.status == 201, caller.content
        [said] = caller.header(b"x-portkey-cache-status")
        return said.decode(), told(caller)["id"]

    @property
    def created(self) -> int:
        return sum(request.method == "POST" for request in self.fake.requests)

    @property
    def read(self) -> int:
        return sum(request.method == "GET" for request in self.fake.requests)


async def test_an_identical_create_is_answered_with_what_the_first_has_made() -> None:
    stage = Stage()
    said, id = await stage.ask(SIMPLE)
    assert said == "MISS"
    stage.clock.advance(QUEUE + RUN)
    caller = await create(stage.app, SIMPLE, body=body())
    assert (caller.status, caller.header(b"x-portkey-cache-status")) == (201, [b"HIT"])
    content = told(caller)
    assert (content["id"], content["status"], content["output"]) == (id, "succeeded", "hello Ada")
    assert stage.created == 1
    own = {b"content-type", b"content-length"}
    added = {b"cache-control", b"x-content-type-options"}
    assert {name for name, _ in caller.headers if not name.startswith(b"x-portkey-")} == own | added
    assert caller.header(b"content-length") == [str(len(caller.content)).encode()]
    # Links lead to the proxy, as they do in the answer to any create.
    assert content["urls"]["get"].startswith("http://proxy.test/v1/predictions/")


async def test_a_cache_is_only_for_those_who_ask_for_it() -> None:
    stage = Stage()
    configs = [b'{"cache": {"mode": "semantic"}}', b'{"cache": {}}', b'{"cache": true}', b"{}", b"pc-slug-1"]
    for headers in ([], *([(b"x-portkey-config", config)] for config in configs)):
        assert (await stage.ask(*headers))[0] == "DISABLED"
    assert stage.store.calls == []
    assert code(await create(stage.app, aged(0))) == (400, "bad_request")


@pytest.mark.parametrize(
    "sent",
    [
        b'{"input":{"text":"Ada"},"version":"%s"}' % HELLO_WORLD.encode(),
        b' {"version" : "%s", "input":\n{"text": "\\u0041da"}}' % HELLO_WORLD.encode(),
    ],
)
async def test_identical_is_what_means_the_same(sent: bytes) -> None:
    stage = Stage()
    _, id = await stage.ask(SIMPLE)
    stage.clock.advance(QUEUE + RUN)
    assert await stage.ask(SIMPLE, body=sent) == ("HIT", id)


async def test_a_create_goes_up_as_it_came() -> None:
    stage = Stage()
    sent = b' {"version" : "%s", "input":\n{"text": "\\u0041da"}}' % HELLO_WORLD.encode()
    caller = Caller([sent[:7], sent[7:]])
    await caller.call(stage.app, http_scope("POST", "/v1/predictions", [A, JSON, SIMPLE]))
    [request] = stage.fake.requests
    assert request.body == sent


async def test_the_answer_is_asked_for_in_a_form_that_can_be_read(upstream: RawUpstream) -> None:
    app = paying(upstream.url, layers=[reuse_results()])
    scope = http_scope("POST", "/v1/predictions")
    # Without a Host no links are rewritten, for which the same is asked.
    await Caller([body()]).call(app, scope | {"headers": [A, JSON, SIMPLE, (b"accept-encoding", b"zstd")]})
    assert upstream.requests[0].header(b"accept-encoding") == [b"identity"]
    await app.aclose()


@pytest.mark.parametrize(
    ("more", "headers"),
    [
        ({"body": body(input={"text": "Bob"})}, []),
        ({"body": body(input={"text": "Ada", "seed": 1})}, []),
        ({"who": B}, []),
        ({"who": C}, []),
        ({"who": D}, []),
        ({}, [(b"x-portkey-cache-namespace", b"other")]),
    ],
)
async def test_what_differs_is_created(more: Any, headers: list[Header]) -> None:
    stage = Stage()
    first = await stage.ask(SIMPLE)
    stage.clock.advance(QUEUE + RUN)
    said, id = await stage.ask(SIMPLE, *headers, **more)
    assert said == "MISS"
    assert id != first[1]
    assert stage.created == 2


async def test_the_same_body_for_another_model_is_created() -> None:
    stage = Stage()
    both = b'{"input":{"text":"Ada","prompt":"Ada"}}'
    for target in ("models/meta/meta-llama-3-8b-instruct", "deployments/acme/hello"):
        assert (await stage.ask(SIMPLE, target=f"/v1/{target}/predictions", body=both))[0] == "MISS"
        stage.clock.advance(QUEUE + RUN)
        assert (await stage.ask(SIMPLE, target=f"/v1/{target}/predictions", body=both))[0] == "HIT"
    assert stage.created == 2


@pytest.mark.parametrize(
    "sent",
    [
        body(webhook="https://a.example/hook"),
        body(webhook=None),
        body(webhook_completed="https://a.example/hook"),
        body(webhook_events_filter=["start"]),
        body(stream=True),
        body(stream="yes"),
        b'{"version":"%s","input":{"text":"Ada"},"input":{"text":"Ada"}}' % HELLO_WORLD.encode(),
        b'{"version":"%s","input":{"text":"Ada","a":NaN}}' % HELLO_WORLD.encode(),
        b"[]",
        b"{",
        b"",
        body(input={"text": "x" * creates.MAX_SIZE}),
    ],
    ids=lambda sent: repr(sent[:40]),
)
async def test_what_must_be_sent_each_time_is(upstream: RawUpstream, sent: bytes) -> None:
    store = SwitchedOnce()
    app = paying(upstream.url, layers=[reuse_results(store=store)])
    for _ in "ab":
        caller = await create(app, SIMPLE, body=sent)
        assert caller.header(b"x-portkey-cache-status") == [b"DISABLED"]
    assert [request.body.endswith(sent[-10:]) for request in upstream.requests] == [True, True]
    assert sum(len(request.body) for request in upstream.requests) == 2 * len(sent)
    assert store.calls == []
    await app.aclose()


async def test_a_query_is_not_understood(upstream: RawUpstream) -> None:
    store = SwitchedOnce()
    app = paying(upstream.url, layers=[reuse_results(store=store)])
    caller = await create(app, SIMPLE, target="/v1/predictions?a=b")
    assert caller.header(b"x-portkey-cache-status") == [b"DISABLED"]
    assert store.calls == []
    await app.aclose()


async def test_only_predictions_are_results(upstream: RawUpstream) -> None:
    store = SwitchedOnce()
    app = paying(upstream.url, layers=[reuse_results(store=store)])
    for operation, one in CREATES.items():
        await create(app, SIMPLE, target=one.target, body=one.body)
        assert bool(store.calls) == operation.endswith("predictions.create") or not operation.endswith(".create")
        store.calls.clear()
    for method in ("GET", "DELETE"):
        await Caller().call(app, http_scope(method, "/v1/predictions/p1", [A, SIMPLE]))
    assert store.calls == []
    await app.aclose()


# --- what is answered again


@pytest.mark.parametrize("after", [0, QUEUE, QUEUE + RUN - 0.1])
async def test_what_has_not_ended_is_no_result(after: float) -> None:
    stage = Stage()
    _, id = await stage.ask(SIMPLE)
    stage.clock.advance(after)
    assert (await stage.ask(SIMPLE))[0] == "MISS"
    # It is still the first, which is the first to have one: else creates that come faster would all be paid.
    stage.clock.advance(QUEUE + RUN - after)
    assert await stage.ask(SIMPLE) == ("HIT", id)
    assert stage.created == 2


async def test_what_has_failed_is_no_result() -> None:
    stage = Stage()
    failing = body(FAILS)
    await stage.ask(SIMPLE, body=failing)
    stage.clock.advance(QUEUE + RUN)
    assert (await stage.ask(SIMPLE, body=failing))[0] == "MISS"
    assert stage.store.calls == ["result", "put_result"] * 2


async def test_what_was_canceled_is_no_result() -> None:
    stage = Stage()
    _, id = await stage.ask(SIMPLE)
    await create(stage.app, target=f"/v1/predictions/{id}/cancel", body=b"")
    stage.clock.advance(QUEUE + RUN)
    said, other = await stage.ask(SIMPLE)
    assert said == "MISS"
    stage.clock.advance(QUEUE + RUN)
    assert await stage.ask(SIMPLE) == ("HIT", other)


async def test_what_a_host_has_go_up_beside_is_part_of_a_create() -> None:
    shown = json.dumps(DONE | {"completed_at": _time(NOW)}).encode()
    replicate = Replicate(shown={"p0": httpx.Response(200, stream=httpx.ByteStream(shown))})
    layers = [reuse_results(now=lambda: NOW)]
    app = paying(transport=replicate, layers=layers, options={"forward_headers": ["x-org"]})
    said = [
        (await create(app, SIMPLE, *headers, body=body())).header(b"x-portkey-cache-status")
        for headers in (
            [(b"x-org", b"one")],
            [(b"x-org", b"two")],
            [],
            [(b"x-org", b"one"), (b"accept", b"*/*"), (b"x-other", b"two")],
        )
    ]
    assert said == [[b"MISS"], [b"MISS"], [b"MISS"], [b"HIT"]]


async def test_an_output_is_answered_as_long_as_it_lives_for_a_minute_more() -> None:
    stage = Stage(max_age=100_000)
    _, id = await stage.ask(aged(50_000))
    stage.clock.advance(QUEUE + RUN + 3539)
    assert await stage.ask(aged(50_000)) == ("HIT", id)
    stage.clock.advance(1)
    assert (await stage.ask(aged(50_000)))[0] == "MISS"


@pytest.mark.parametrize(("of_host", "of_caller", "seconds"), [(600, None, 600), (600, 300, 300), (300, 600, 300)])
async def test_the_shorter_age_holds(of_host: float, of_caller: float | None, seconds: float) -> None:
    stage = Stage(max_age=of_host)
    asked = SIMPLE if of_caller is None else aged(of_caller)
    _, id = await stage.ask(asked)
    stage.clock.advance(seconds - 0.5)
    assert await stage.ask(asked) == ("HIT", id)
    stage.clock.advance(1)
    assert (await stage.ask(asked))[0] == "MISS"


async def test_a_refresh_creates_and_is_answered_from_then_on() -> None:
    stage = Stage()
    await stage.ask(SIMPLE)
    stage.clock.advance(QUEUE + RUN)
    said, id = await stage.ask(SIMPLE, REFRESH)
    assert said == "REFRESH"
    assert stage.read == 0
    stage.clock.advance(QUEUE + RUN)
    assert await stage.ask(SIMPLE) == ("HIT", id)


def _time(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat()


def _type() -> tuple[str, str]:
    return "content-type", "application/json"


DONE = {
    "id": "p0",
    "status": "succeeded",
    "output": "x",
    "data_removed": False,
}
NOW = 1_790_001_000.0


@pytest.mark.parametrize(
    ("change", "hit"),
    [
        ({}, True),
        ({"id": "p9"}, False),
        ({"status": "processing"}, False),
        ({"status": "failed"}, False),
        ({"status": "canceled"}, False),
        ({"status": "aborted"}, False),
        ({"status": "unheard-of"}, False),
        ({"output": None}, False),
        ({"output": ""}, True),
        ({"output": []}, True),
        ({"data_removed": True}, False),
        ({"data_removed": None}, True),
        ({"completed_at": None}, False),
        ({"completed_at": "yesterday"}, False),
        ({"completed_at": "2020-01-01T00:00:00Z"}, False),
    ],
    ids=str,
)
async def test_what_replicate_shows_decides(change: dict[str, Any], hit: bool) -> None:
    shown = json.dumps(DONE | {"completed_at": _time(NOW - 3500)} | change, indent=1).encode()
    assert await _hits(httpx.Response(200, headers=dict([_type()]), stream=httpx.ByteStream(shown))) == hit


async def _hits(shown: httpx.Response | Exception, **options: Any) -> bool:
    """Whether a second create is answered with what a read of the first shows."""
    replicate = Replicate(shown={"p0": shown})
    app = paying(transport=replicate, layers=[reuse_results(now=lambda: NOW, **options)])
    first, second = [await create(app, SIMPLE, body=body()) for _ in "ab"]
    assert (first.status, second.status) == (201, 201)
    assert replicate.reads == ["/v1/predictions/p0"]
    hit = second.header(b"x-portkey-cache-status") == [b"HIT"]
    assert len(replicate.made) == 2 - hit
    assert hit or told(second)["id"] == "p1"
    return hit


@pytest.mark.parametrize(
    "shown",
    [
        httpx.Response(404, stream=httpx.ByteStream(b"{}")),
        httpx.Response(429, stream=httpx.ByteStream(b"{}")),
        httpx.Response(500, stream=httpx.ByteStream(b"{}")),
        httpx.Response(202, stream=httpx.ByteStream(json.dumps(DONE | {"completed_at": _time(NOW)}).encode())),
        httpx.Response(200, stream=httpx.ByteStream(b"")),
        httpx.Response(200, stream=httpx.ByteStream(b"[]")),
        httpx.Response(200, stream=httpx.ByteStream(b"[" * 100_000)),
        httpx.Response(200, headers={"content-encoding": "gzip"}, stream=httpx.ByteStream(b"no gzip")),
        httpx.ConnectError("no"),
        httpx.ReadTimeout("late"),
    ],
    ids=repr,
)
async def test_a_read_that_shows_no_result_leads_to_a_create(shown: Any) -> None:
    assert not await _hits(shown)


async def test_a_result_in_an_encoding_is_answered_in_it() -> None:
    shown = gzip.compress(json.dumps(DONE | {"completed_at": _time(NOW)}).encode())
    headers = dict([_type(), ("content-encoding", "gzip"), ("content-length", str(len(shown)))])
    assert await _hits(httpx.Response(200, headers=headers, stream=httpx.ByteStream(shown)))


async def test_a_read_that_is_cut_or_too_long_leads_to_a_create(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while request := connection.request():
            if request.line.startswith(b"POST"):
                connection.answer(b'{"id":"p0"}', status=b"201 Created")
            elif len(upstream.requests) < 3:
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")
                return
            else:
                connection.answer(b'{"id":"p0","status":"succeeded","output":"%s"}' % (b"x" * (9 << 20)))

    upstream.script = script
    app = paying(upstream.url, layers=[reuse_results()])
    for _ in range(3):
        caller = await create(app, SIMPLE, body=body())
        assert (caller.status, caller.header(b"x-portkey-cache-status")) == (201, [b"MISS"])
    lines = [request.line[:4] for request in upstream.requests]
    assert lines == [b"POST", b"GET ", b"POST", b"GET ", b"POST"]
    await app.aclose()


async def test_a_read_that_takes_long_leads_to_a_create(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "READ_TIMEOUT", 0.1)

    def script(connection: Connection) -> None:
        while request := connection.request():
            if request.line.startswith(b"GET"):
                connection.wait_closed()
                return
            connection.answer(b'{"id":"p0"}', status=b"201 Created")

    upstream.script = script
    app = paying(upstream.url, layers=[reuse_results()])
    for _ in "ab":
        caller = await create(app, SIMPLE, body=body())
        assert (caller.status, caller.header(b"x-portkey-cache-status")) == (201, [b"MISS"])
    assert [request.line[:4] for request in upstream.requests] == [b"POST", b"GET ", b"POST"]
    assert upstream.closed.wait(5)
    await app.aclose()


def _below(answer: Any) -> Any:
    def layer(forward: Forward) -> Forward:
        async def answered(request: ProxyRequest) -> ProxyResponse:
            return (await answer(request)) or await forward(request)

        return answered

    return layer


async def test_a_layer_below_that_refuses_the_read_leads_to_a_create() -> None:
    async def no_reads(request: ProxyRequest) -> None:
        if request.method == "GET":
            raise PermissionDenied("not to be read")

    stage = Stage()
    stage.app = stage.proxy(below=[_below(no_reads)])
    await stage.ask(SIMPLE)
    stage.clock.advance(QUEUE + RUN)
    assert (await stage.ask(SIMPLE))[0] == "MISS"


@pytest.mark.parametrize(
    "header", [(b"content-type", b"text/event-stream"), (b"idempotency-replayed", b"true"), (b"x-other", b"y")]
)
async def test_what_is_no_new_result_is_not_kept(header: Header) -> None:
    async def answer(request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse(status=201, headers=(header,), body=Chunks([b'{"id":"p0"}']))

    stage = Stage()
    stage.app = stage.proxy(below=[_below(answer)])
    await stage.ask(SIMPLE)
    assert ("put_result" in stage.store.calls) == (header[0] == b"x-other")


@pytest.mark.parametrize("outcome", ["refused", "error", "no id", "throttled"])
async def test_what_made_nothing_is_not_kept(outcome: str) -> None:
    replicate, store = Replicate(outcomes=[outcome]), SwitchedOnce()
    app = paying(transport=replicate, layers=[reuse_results(store=store)])
    caller = await create(app, SIMPLE, body=body())
    assert caller.header(b"x-portkey-cache-status") == [b"MISS"]
    assert store.calls == ["result"]


@pytest.mark.parametrize("outermost", ["results", "keys"])
async def test_a_key_and_a_cache_go_well_together(outermost: str) -> None:
    stage = Stage()
    layers = [reuse_results(store=stage.store, now=stage.clock.now), idempotency_keys(store=stage.store)]
    stage.app = paying(transport=stage.transport, layers=layers if outermost == "results" else layers[::-1])
    one, other = ((b"idempotency-key", name) for name in (b"k1", b"k2"))
    ids = {(await stage.ask(SIMPLE, one))[1] for _ in range(3)}
    stage.clock.advance(QUEUE + RUN)
    assert (await stage.ask(SIMPLE, other))[0] == "HIT"
    for headers in ([SIMPLE, other], [other], [SIMPLE, one], [one], [SIMPLE]):
        if headers != [other] or outermost == "keys":
            ids.add((await stage.ask(*headers))[1])
    assert len(ids) == stage.created == 1


# --- the store out of order


@pytest.mark.parametrize("how", [refuses, hangs])
@pytest.mark.parametrize("method", ["result", "put_result"])
async def test_without_the_store_every_create_is_sent(how: Any, method: str, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage(store_timeout=0.05)
    stage.store.before[method] = how
    for number in (1, 2):
        assert (await stage.ask(SIMPLE))[0] == "MISS"
        assert stage.created == number
        stage.clock.advance(QUEUE + RUN)
    assert "the store of results failed: " in caplog.text
    assert "hunter2" not in caplog.text
    stage.store.before.clear()
    last = (await stage.ask(SIMPLE))[0]
    assert last == ("HIT" if method == "result" else "MISS")


async def test_an_answer_that_is_paid_does_not_wait_long_for_the_store() -> None:
    stage = Stage(store_timeout=60)
    stage.store.before["put_result"] = hangs
    assert (await stage.ask(SIMPLE))[0] == "MISS"


async def test_what_was_paid_is_kept_even_if_its_caller_leaves() -> None:
    stage = Stage()
    writing, go_on = anyio.Event(), anyio.Event()

    async def slow() -> None:
        writing.set()
        await go_on.wait()

    stage.store.before["put_result"] = slow
    caller = Caller([body()])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, stage.app, http_scope("POST", "/v1/predictions", [A, JSON, SIMPLE]))
        await writing.wait()
        caller.left.set()
        for _ in range(20):
            await anyio.lowlevel.checkpoint()
        go_on.set()
    stage.clock.advance(QUEUE + RUN)
    assert (await stage.ask(SIMPLE))[0] == "HIT"


async def test_what_a_store_raises_of_ours_is_a_failure_too() -> None:
    async def denies() -> None:
        raise PermissionDenied("hunter2")

    stage = Stage()
    stage.store.before |= {"result": denies, "put_result": denies}
    assert (await stage.ask(SIMPLE))[0] == "MISS"


# --- options


@pytest.mark.parametrize("option", ["max_age", "store_timeout"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_times_have_to_be_some(option: str, value: float) -> None:
    options: dict[str, Any] = {option: value}
    with pytest.raises(ValueError, match=f"{option}: "):
        reuse_results(**options)


# --- what is told of it


async def test_the_spans_of_it(exporter: InMemorySpanExporter, tracer_provider: TracerProvider) -> None:
    stage = Stage()
    layer = reuse_results(store=stage.store, now=stage.clock.now)
    stage.app = paying(transport=stage.transport, layers=[layer], tracer_provider=tracer_provider)
    _, first = await stage.ask(SIMPLE)
    _, second = await stage.ask(SIMPLE)  # the first has not ended: a read that is dropped, and a create
    stage.clock.advance(QUEUE + RUN)
    await stage.ask(SIMPLE)
    spans = Recorded(exporter).unchecked
    requests = [span for span in spans if span.kind is SpanKind.SERVER]
    wanted = names.OUTCOME, names.CACHE_STATUS, names.PREDICTION_ID, names.PREDICTION_STATUS
    assert [of(span, *wanted) for span in requests] == [
        ["forwarded", "MISS", first, "starting"],
        ["forwarded", "MISS", second, "starting"],
        ["answered", "HIT", first, "succeeded"],
    ]
    below: list[list[str]] = []
    for request in requests:
        assert request.context is not None
        own = [span for span in spans if span.parent is not None and span.parent.span_id == request.context.span_id]
        below.append([span.name.split()[0] for span in own if "/v1" in span.name])
    assert below == [["POST"], ["GET", "POST"], ["GET"]]
    # What is answered again leads to where it was made; what was made anew leads nowhere.
    links = [[link.context.span_id for link in span.links] for span in requests]
    assert links == [[], [], [requests[0].context and requests[0].context.span_id]]


async def test_a_create_that_fails_after_a_read_is_not_about_what_was_read(
    exporter: InMemorySpanExporter, tracer_provider: TracerProvider
) -> None:
    replicate = Replicate(outcomes=["made", "error"])
    app = paying(transport=replicate, layers=[reuse_results()], tracer_provider=tracer_provider)
    for _ in "ab":
        await create(app, SIMPLE, body=body())
    assert replicate.reads == ["/v1/predictions/p0"]
    last = [span for span in Recorded(exporter).all if span.kind is SpanKind.SERVER][-1]
    assert of(last, names.OUTCOME, names.PREDICTION_ID, names.CACHE_STATUS) == ["forwarded", None, "MISS"]


# --- the invariant


@dataclass(frozen=True)
class Step:
    who: Header
    body: bytes
    target: str
    max_age: float | None
    refresh: bool
    namespace: bytes
    fault: str
    then: float


FAILING = body(FAILS)
STEPS = st.lists(
    st.builds(
        Step,
        who=st.sampled_from([A, A, B, C, D]),
        body=st.sampled_from([body(), body(), body(input={"text": "Bob"}), FAILING, body(webhook="https://a.example")]),
        target=st.sampled_from(["/v1/predictions", "/v1/predictions", "/v1/predictions?"]),
        max_age=st.sampled_from([None, 100.0, 2000.0, 10_000.0]),
        refresh=st.sampled_from([False, False, False, True]),
        namespace=st.sampled_from([b"", b"", b"n"]),
        fault=st.sampled_from(["", "", "", "result", "put_result"]),
        then=st.sampled_from([0.0, QUEUE, QUEUE + RUN, QUEUE + RUN, 99.0, 101.0, 3400.0, 3600.0]),
    ),
    max_size=10,
)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@settings(max_examples=50, deadline=None)
@given(steps=STEPS)
def test_a_result_is_answered_to_whom_it_belongs_as_long_as_it_lives_and_nothing_else_is_kept_from_being_made(
    backend: str, steps: list[Step]
) -> None:
    async def play() -> None:
        stage = Stage(max_age=5000)
        # By who and what: the id of what was made first since there was no other to be waited for, and when.
        made: dict[Any, tuple[str, float]] = {}
        for step in steps:
            stage.store.before = {step.fault: refuses}
            config = {"cache": {"mode": "simple"} | ({} if step.max_age is None else {"max_age": step.max_age})}
            headers = [
                (b"x-portkey-config", json.dumps(config).encode()),
                (b"x-portkey-cache-namespace", step.namespace),
                *([REFRESH] if step.refresh else []),
            ]
            key, at, created = (step.who, step.body, step.namespace), stage.clock.now(), stage.created
            id, then = made.get(key, ("", 0.0))
            lives = (
                id != ""
                and step.body != FAILING
                and QUEUE + RUN <= at - then < QUEUE + RUN + 3540
                and at - then <= min(5000, step.max_age or 5000)
            )
            is_under_way = (
                id != ""
                and not step.refresh
                and step.fault != "result"
                and at - then < QUEUE + RUN
                and at - then <= min(5000, step.max_age or 5000)
            )
            said, answered = await stage.ask(*headers, body=step.body, target=step.target, who=step.who)
            if b"webhook" in step.body:
                assert said == "DISABLED"
            elif lives and not step.refresh and step.fault != "result":
                assert (said, answered) == ("HIT", id)
            else:
                assert said == ("REFRESH" if step.refresh else "MISS")
                assert answered not in [one for one, _ in made.values()]
                if step.fault != "put_result" and not is_under_way:
                    made[key] = answered, at
            assert stage.created == created + (said != "HIT")
            stage.clock.advance(step.then)

    logging.getLogger("replicate_proxy_mw").setLevel(logging.CRITICAL)
    try:
        anyio.run(play, backend=backend)
    finally:
        logging.getLogger("replicate_proxy_mw").setLevel(logging.NOTSET)
