from __future__ import annotations

import gzip
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from functools import partial
from typing import Any, Protocol

import anyio
import hishel
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from replicate_proxy_mw import MappingKeyResolver, Policy, ReplicateKey
from replicate_proxy_mw.layers.cache import READS, cache_catalogue
from replicate_proxy_mw.operations import OPERATIONS
from replicate_proxy_mw.store.responses import MAX_PER_KEY
from replicate_proxy_mw.store.responses_memory import MemoryResponses
from replicate_proxy_mw.testing import FakeReplicate, ManualClock
from replicate_proxy_mw.testing.serve import serve
from tests.raw_asgi import TOKEN, Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.services import RedisServer, redis_server
from tests.store.storing import Switched, nothing
from tests.tenants import sends

pytestmark = pytest.mark.anyio

OTHER_TOKEN = "r8_22222222222222222222222222222222222"
KEYS = {
    "pk-team-a": ReplicateKey(TOKEN, tenant="team-a"),
    "pk-team-b": ReplicateKey(TOKEN, tenant="team-b"),
    "pk-team-a-too": ReplicateKey(OTHER_TOKEN, tenant="team-a"),
}
MODEL = "/v1/models/acme/mine"
DEPLOYMENT = "/v1/deployments/acme/hello"
GZIP = (b"accept-encoding", b"gzip")
REFRESH = (b"x-portkey-cache-force-refresh", b"true")
ETAG = b'etag: "1"\r\n'


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> ManualClock:
    """The time that hishel and the layer read."""
    clock = ManualClock()
    monkeypatch.setattr(time, "time", clock.now)
    return clock


class Make(Protocol):
    def __call__(self, **of_the_layer: Any) -> Any: ...


@pytest.fixture
async def cached(upstream: RawUpstream) -> AsyncIterator[Make]:
    """Makes proxies with the layer, in front of `upstream`. Each request has a connection, and so a script, of its own;
    no certificates are loaded for it, which takes longer than all else."""
    async with httpx.AsyncHTTPTransport(verify=False, limits=httpx.Limits(max_keepalive_connections=0)) as transport:
        yield partial(_proxy, upstream.url, transport=transport)


def _proxy(upstream: str, *, policy: Policy | None = None, **more: Any) -> Any:
    keys = KEYS if policy is None else {"pk-team-a": ReplicateKey(TOKEN, tenant="team-a", policy=policy)}
    of_the_proxy = {name: more.pop(name) for name in ("options", "tracer_provider", "transport") if name in more}
    layers = [cache_catalogue(**more)]
    return proxy(upstream, layers=layers, key_resolver=MappingKeyResolver(keys), **of_the_proxy)


async def read(app: Any, target: str = MODEL, *headers: tuple[bytes, bytes], key: str = "pk-team-a") -> Caller:
    return await Caller().call(app, http_scope("GET", target, [(b"x-portkey-api-key", key.encode()), *headers]))


async def write(app: Any, method: str, target: str, key: str = "pk-team-a") -> Caller:
    return await Caller([b"{}"]).call(app, http_scope(method, target, [(b"x-portkey-api-key", key.encode())]))


def word(caller: Caller) -> str:
    [value] = caller.header(b"x-portkey-cache-status")
    return value.decode()


async def words(app: Any, target: str = MODEL, *headers: tuple[bytes, bytes], times: int = 2, **more: Any) -> list[str]:
    return [word(await read(app, target, *headers, **more)) for _ in range(times)]


def lines(upstream: RawUpstream) -> list[str]:
    return [request.line.decode().removesuffix(" HTTP/1.1") for request in upstream.requests]


def counting(headers: bytes = b"", status: bytes = b"200 OK") -> Callable[[Connection], None]:
    """Each answer is another one."""

    def script(connection: Connection) -> None:
        while connection.request():
            body = b'{"n":%d}' % len(connection.upstream.requests)
            connection.answer(body, headers=headers, status=status)

    return script


def confirming(then: bytes = b"", first: bytes = ETAG, status: bytes = b"304 Not Modified") -> Any:
    """A request with a condition gets `status` and the headers `then`."""

    def script(connection: Connection) -> None:
        while request := connection.request():
            if request.header(b"if-none-match") or request.header(b"if-modified-since"):
                connection.send(b"HTTP/1.1 " + status + b"\r\n" + then + b"\r\n")
            else:
                connection.answer(b'{"n":%d}' % len(connection.upstream.requests), headers=first)

    return script


# --- what is cached


async def test_a_second_read_reaches_nothing_upstream() -> None:
    with FakeReplicate(tokens={TOKEN: "acme"}).serve() as fake, serve(_proxy(fake.url)) as served:
        async with httpx.AsyncClient(headers={"x-portkey-api-key": "pk-team-a"}) as client:
            answers = [await client.get(f"{served.url}/v1/models/replicate/hello-world") for _ in range(3)]
    assert [answer.headers["x-portkey-cache-status"] for answer in answers] == ["MISS", "HIT", "HIT"]
    assert [request.target for request in fake.requests] == [b"/v1/models/replicate/hello-world"]
    assert fake.violations == []
    assert answers[0].json()["name"] == "hello-world"
    assert answers[0].headers["content-encoding"] == "gzip"
    assert answers[0].content == answers[1].content == answers[2].content


def _target(path: str) -> str:
    return "/v1" + "/".join("x" if segment.startswith("{") else segment for segment in path.split("/"))


async def test_only_reads_of_the_catalogue_are(cached: Make) -> None:
    app = cached(policy=Policy(operations=("*", "webhooks.*")))
    told = {
        operation.id: [word(await write(app, operation.method, _target(operation.path))) for _ in range(2)]
        for operation in OPERATIONS
        if operation.method == "GET"
    }
    assert {id for id, words in told.items() if words == ["MISS", "HIT"]} == READS
    assert [words for id, words in told.items() if id not in READS] == [["DISABLED"] * 2] * (len(told) - len(READS))
    for operation in OPERATIONS:
        if operation.method != "GET":
            assert word(await write(app, operation.method, _target(operation.path))) == "DISABLED"


async def test_a_hit_is_the_answer_as_it_came(cached: Make, upstream: RawUpstream, clock: ManualClock) -> None:
    body = gzip.compress(b'{"name": "mine"}' * 100)
    sent = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"vary", b"Cookie, origin"),
        (b"Content-Encoding", b"gzip"),
        (b"ratelimit-remaining", b"2999"),
        (b"link", b"</a>"),
        (b"cf-ray", b"\xe9"),
        (b"link", b"</b>"),
        (b"set-cookie", b"a=b"),
        (b"authorization", b"hunter2"),
    ]

    def script(connection: Connection) -> None:
        while connection.request():
            head = b"".join(b"%s: %s\r\n" % pair for pair in sent)
            connection.send(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + body)

    upstream.script = script
    app = cached()
    first = await read(app, MODEL, GZIP)
    clock.advance(7.5)
    second = await read(app, MODEL, GZIP)
    assert first.content == second.content == body

    def replicate_s(caller: Caller) -> list[tuple[bytes, bytes]]:
        return [pair for pair in caller.headers if not pair[0].startswith(b"x-portkey-")]

    expected = [(name.lower(), value) for name, value in sent[:-2]]
    added = [(b"cache-control", b"private, no-store"), (b"x-content-type-options", b"nosniff")]
    assert replicate_s(first) == [*expected, *added]
    assert replicate_s(second) == [*expected, (b"age", b"7"), *added]
    assert len(upstream.requests) == 1


async def test_what_a_layer_said_of_one_answer_is_not_said_again(cached: Make, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(
                status=b"200 OK" if len(upstream.requests) > 1 else b"502 Bad Gateway", headers=b"retry-after: 0\r\n"
            )

    upstream.script = script
    app = cached(options={"safe_retries": 1})
    answers = [await read(app) for _ in range(2)]
    assert [(answer.status, word(answer)) for answer in answers] == [(200, "MISS"), (200, "HIT")]
    assert [answer.header(b"x-portkey-retry-attempt-count") for answer in answers] == [[b"1"], [b"0"]]


@pytest.mark.parametrize(
    "header",
    [
        (b"range", b"bytes=0-"),
        (b"if-none-match", b'"1"'),
        (b"if-modified-since", b"x"),
        (b"cache-control", b"no-cache"),
    ],
)
async def test_requests_that_ask_for_more_pass_by(
    cached: Make, upstream: RawUpstream, header: tuple[bytes, bytes]
) -> None:
    app = cached()
    assert await words(app) == ["MISS", "HIT"]
    assert await words(app, MODEL, header) == ["DISABLED"] * 2
    assert await words(app) == ["HIT", "HIT"]
    assert len(upstream.requests) == 3


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "QUERY"])
async def test_other_methods_neither_find_nor_end_anything(cached: Make, upstream: RawUpstream, method: str) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")

    upstream.script = script
    app = cached()
    for target in (MODEL, "/v1/models"):
        assert await words(app, target) == ["MISS", "HIT"]
        assert word(await write(app, method, target)) == "DISABLED"
        assert await words(app, target) == ["HIT", "HIT"]


async def test_what_a_rule_looks_up_for_a_create_passes_by(
    cached: Make, upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    policy = Policy(models=("acme/mine",))
    app = cached(policy=policy, options={"lookup_versions": True}, tracer_provider=tracer_provider)
    scope = http_scope("POST", "/v1/predictions", [(b"x-portkey-api-key", b"pk-team-a"), JSON])
    assert word(await Caller([b'{"version": "%s"}' % (b"ab" * 32)]).call(app, scope)) == "DISABLED"
    assert len(upstream.requests) == 2
    assert _statuses(exporter) == [None]


JSON = (b"content-type", b"application/json")


def _statuses(exporter: InMemorySpanExporter) -> list[Any]:
    return _on_spans(exporter, "replicate_proxy.cache.status")


def _on_spans(exporter: InMemorySpanExporter, name: str) -> list[Any]:
    spans = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    return [(span.attributes or {}).get(name) for span in spans]


async def test_the_request_span_says_it(
    cached: Make, upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    app = cached(tracer_provider=tracer_provider)
    await words(app)
    await words(app, MODEL, REFRESH, times=1)
    await words(app, "/v1/account", times=1)
    assert _statuses(exporter) == ["MISS", "HIT", "REFRESH", None]
    outcomes = _on_spans(exporter, "replicate_proxy.outcome")
    assert outcomes == ["forwarded", "answered", "forwarded", "forwarded"]


# --- whose it is


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ({"key": "pk-team-a"}, {"key": "pk-team-b"}),
        ({"key": "pk-team-a"}, {"key": "pk-team-a-too"}),
        ({"target": MODEL}, {"target": MODEL + "?a=1"}),
        ({"target": MODEL}, {"target": MODEL + "/versions"}),
        ({"target": "/v1/search?query=a"}, {"target": "/v1/search?query=b"}),
        ({"target": "/v1/models?cursor=a"}, {"target": "/v1/models?cursor=b"}),
        *[
            ({"header": (name, b"a")}, {"header": (name, other)})
            for name in (b"accept", b"accept-encoding", b"accept-language", b"x-portkey-cache-namespace")
            for other in (b"b", b"a, b", b"\xe9", b"")
        ],
    ],
    ids=repr,
)
async def test_an_answer_is_for_one_kind_of_request(
    cached: Make, upstream: RawUpstream, here: dict[str, Any], there: dict[str, Any]
) -> None:
    upstream.script = counting()
    app = cached()

    async def ask(target: str = MODEL, header: Any = None, key: str = "pk-team-a") -> tuple[bytes, str]:
        caller = await read(app, target, *([header] if header else []), key=key)
        return caller.content, word(caller)

    expected = [(b'{"n":1}', "MISS"), (b'{"n":2}', "MISS"), (b'{"n":1}', "HIT"), (b'{"n":2}', "HIT")]
    assert [await ask(**one) for one in (here, there, here, there)] == expected


@pytest.mark.parametrize("name", [b"origin", b"x-org", b"prefer"])
async def test_it_differs_by_whatever_goes_up(cached: Make, upstream: RawUpstream, name: bytes) -> None:
    app = cached(options={"forward_headers": ("origin", "x-org")})
    for header in ([], [(name, b"one")], [(name, b"two")], [(name, b"one"), (name, b"two")]):
        assert await words(app, MODEL, *header) == ["MISS", "HIT"]


async def test_nothing_else_that_is_sent_makes_a_difference(cached: Make, upstream: RawUpstream) -> None:
    app = cached()
    assert await words(app, MODEL, (b"user-agent", b"a"), times=1) == ["MISS"]
    for header in ((b"user-agent", b"b"), (b"cookie", b"a=b"), (b"origin", b"https://a.test"), (b"x-org", b"one")):
        assert await words(app, MODEL, header, times=1) == ["HIT"]


@pytest.mark.parametrize("vary", [b"*", b"user-agent", b"Cookie, prefer"])
async def test_what_differs_by_something_else_is_not_kept(cached: Make, upstream: RawUpstream, vary: bytes) -> None:
    upstream.script = counting(b"vary: " + vary + b"\r\n")
    assert await words(cached()) == ["MISS", "MISS"]


# --- for how long


async def test_an_answer_that_states_no_lifetime_has_that_of_the_host(
    cached: Make, upstream: RawUpstream, clock: ManualClock
) -> None:
    upstream.script = counting(b"last-modified: Sat, 01 Jan 2000 00:00:00 GMT\r\n")
    app = cached(lifetime=30)
    first = await read(app)
    assert first.header(b"cache-control") == [b"private, no-store"]
    clock.advance(29.5)
    kept = await read(app)
    assert (word(kept), kept.header(b"age")) == ("HIT", [b"29"])
    assert kept.header(b"cache-control") == [b"private, no-store"]
    clock.advance(0.5)
    assert word(await read(app)) == "MISS"
    clock.advance(29.9)
    assert word(await read(app)) == "HIT"


@pytest.mark.parametrize(
    ("stated", "seconds"),
    [
        (b"", 100),
        (b"cache-control: max-age=7\r\n", 7),
        (b'cache-control: Max-Age="7"\r\n', 7),
        (b"cache-control: public\r\ncache-control: max-age=7\r\n", 7),
        (b"cache-control: s-maxage=1, max-age=7\r\n", 7),
        (b"cache-control: s-maxage=7\r\n", 0),
        (b"cache-control: private\r\n", 100),
        (b"cache-control: private, max-age=7\r\n", 7),
        (b"cache-control: must-revalidate\r\n", 100),
        (b"cache-control: max-age=0\r\n", 0),
        (b"cache-control: max-age=soon\r\n", 0),
        (b"cache-control: no-cache\r\n", 0),
        (b"cache-control: no-store\r\n", 0),
        (b"cache-control: no-store, max-age=7\r\n", 0),
        (b"expires: Mon, 21 Sep 2026 14:13:27 GMT\r\n", 7),
        (b"expires: 0\r\n", 0),
        (b"cache-control: max-age=7\r\nexpires: 0\r\n", 7),
        (b"age: 60\r\n", 40),
        (b"age: \xb2\r\n", 100),
        (b"age: 60\r\ncache-control: max-age=67\r\n", 7),
    ],
)
async def test_what_an_answer_states_is_obeyed(
    cached: Make, upstream: RawUpstream, clock: ManualClock, stated: bytes, seconds: int
) -> None:
    assert formatdate(clock.now(), usegmt=True) == "Mon, 21 Sep 2026 14:13:20 GMT"
    # Old for long: nothing is guessed from that.
    upstream.script = counting(b"last-modified: Sat, 01 Jan 2000 00:00:00 GMT\r\n" + stated)
    app = cached(lifetime=100)
    assert word(await read(app)) == "MISS"
    if seconds:
        clock.advance(seconds - 0.5)
        assert word(await read(app)) == "HIT"
        clock.advance(0.5)
    assert word(await read(app)) == "MISS"


async def test_the_time_that_the_answer_took_counts(cached: Make, upstream: RawUpstream, clock: ManualClock) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            clock.advance(20)
            connection.answer(headers=b"age: 5\r\n")

    upstream.script = script
    app = cached(lifetime=30)
    assert word(await read(app)) == "MISS"
    kept = await read(app)
    assert (word(kept), kept.header(b"age")) == ("HIT", [b"25"])
    clock.advance(5)
    assert word(await read(app)) == "MISS"


async def test_fields_that_must_not_be_kept_are_not(cached: Make, upstream: RawUpstream) -> None:
    upstream.script = counting(b'cache-control: max-age=60, no-cache="cf-ray"\r\ncf-ray: 1\r\n')
    app = cached()
    first, second = await read(app), await read(app)
    assert (word(second), first.header(b"cf-ray"), second.header(b"cf-ray")) == ("HIT", [b"1"], [])


async def test_the_host_s_date_header_is_given_back(cached: Make, upstream: RawUpstream) -> None:
    date = formatdate(1e9, usegmt=True)
    upstream.script = counting(b"date: " + date.encode() + b"\r\n")
    app = cached(options={"return_headers": ("date",)})
    answers = [await read(app) for _ in range(2)]
    assert [(word(answer), answer.header(b"date")) for answer in answers] == [
        ("MISS", [date.encode()]),
        ("HIT", [date.encode()]),
    ]


# --- what is stale


async def test_a_304_makes_a_stale_answer_fresh(cached: Make, upstream: RawUpstream, clock: ManualClock) -> None:
    first = (
        ETAG + b"last-modified: Sat, 01 Jan 2000 00:00:00 GMT\r\nvary: Cookie\r\nratelimit-remaining: 9\r\nage: 1\r\n"
    )
    upstream.script = confirming(b'etag: "1"\r\nratelimit-remaining: 8\r\ncontent-type: text/plain\r\n', first)
    app = cached(lifetime=30)
    assert word(await read(app)) == "MISS"
    clock.advance(31)
    for age in (b"0", b"29"):
        kept = await read(app)
        assert (kept.status, kept.content, word(kept)) == (200, b'{"n":1}', "HIT")
        assert kept.headers[:7] == [
            (b"content-type", b"application/json"),
            (b"content-length", b"7"),
            (b"last-modified", b"Sat, 01 Jan 2000 00:00:00 GMT"),
            (b"vary", b"Cookie"),
            (b"etag", b'"1"'),
            (b"ratelimit-remaining", b"8"),
            (b"age", age),
        ]
        clock.advance(29)
    assert len(upstream.requests) == 2
    assert upstream.requests[1].header(b"if-none-match") == [b'"1"']
    assert upstream.requests[1].header(b"if-modified-since") == [b"Sat, 01 Jan 2000 00:00:00 GMT"]
    clock.advance(2)
    assert word(await read(app)) == "HIT"
    assert len(upstream.requests) == 3


async def test_a_304_may_state_another_lifetime(cached: Make, upstream: RawUpstream, clock: ManualClock) -> None:
    upstream.script = confirming(b"cache-control: max-age=5\r\n", ETAG + b"cache-control: max-age=60\r\n")
    app = cached()
    await read(app)
    clock.advance(60)
    assert await words(app) == ["HIT", "HIT"]
    assert len(upstream.requests) == 2
    clock.advance(5)
    assert await words(app) == ["HIT", "HIT"]
    assert len(upstream.requests) == 3


async def test_what_was_confirmed_keeps_the_connection(upstream: RawUpstream, clock: ManualClock) -> None:
    upstream.script = confirming(ETAG)
    app = _proxy(upstream.url)
    await read(app)
    clock.advance(301)
    await read(app)
    await read(app, key="pk-team-b")
    assert len(upstream.requests) == 3
    assert len(upstream.connections) == 1
    await app.aclose()


async def test_a_new_answer_takes_the_place_of_a_stale_one(
    cached: Make, upstream: RawUpstream, clock: ManualClock
) -> None:
    upstream.script = counting(ETAG)
    storage = MemoryResponses()
    app = cached(storage=storage)
    for n in (1, 2, 3):
        first, second = await read(app), await read(app)
        assert (word(first), word(second)) == ("MISS", "HIT")
        assert first.content == second.content == b'{"n":%d}' % n
        clock.advance(300)
    assert len(storage) == 1


async def test_a_304_of_something_else_confirms_nothing(upstream: RawUpstream, clock: ManualClock) -> None:
    upstream.script = confirming(b'etag: "2"\r\n')
    # The connection is free for the second request.
    app = _proxy(upstream.url, options={"max_connections": 1, "connection_wait": 0.2})
    await read(app)
    clock.advance(300)
    answer = await read(app)
    assert (answer.status, answer.content, word(answer)) == (200, b'{"n":3}', "MISS")
    assert upstream.requests[2].header(b"if-none-match") == []
    assert (await read(app)).content == b'{"n":3}'
    await app.aclose()


async def test_a_304_that_nobody_asked_for_is_passed_on(cached: Make, upstream: RawUpstream) -> None:
    upstream.script = sends(b"HTTP/1.1 304 Not Modified\r\n\r\n")
    caller = await read(cached())
    assert (caller.status, caller.complete, word(caller)) == (304, True, "MISS")


# --- what is not kept


@pytest.mark.parametrize("status", [b"201 Created", b"301 Moved", b"404 Not Found", b"410 Gone", b"500 Oops"])
async def test_other_statuses_are_not_kept(cached: Make, upstream: RawUpstream, status: bytes) -> None:
    upstream.script = counting(b"cache-control: max-age=60\r\n", status)
    assert await words(cached()) == ["MISS", "MISS"]
    assert len(upstream.requests) == 2


@pytest.mark.parametrize(
    ("status", "ends"),
    [
        (b"404 Not Found", True),
        (b"401 Unauthorized", True),
        (b"429 Slow", False),
        (b"500 Oops", False),
        (b"503 Later", False),
    ],
)
@pytest.mark.parametrize("fresh", [True, False])
async def test_an_answer_that_counts_ends_the_one_before(
    cached: Make, upstream: RawUpstream, clock: ManualClock, status: bytes, ends: bool, fresh: bool
) -> None:
    storage = MemoryResponses()
    app = cached(storage=storage, options={"safe_retries": 0})
    upstream.script = counting(ETAG)
    await read(app)
    upstream.script = counting(status=status)
    clock.advance(1 if fresh else 301)
    failed = await read(app, MODEL, *([REFRESH] if fresh else []))
    assert (failed.status, word(failed)) == (int(status[:3]), "REFRESH" if fresh else "MISS")
    assert len(storage) == (0 if ends else 1)


async def test_an_answer_that_is_cut_is_not_kept(cached: Make, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{")

    upstream.script = script
    storage = MemoryResponses()
    app = cached(storage=storage)
    caller = await read(app)
    assert (caller.status, json.loads(caller.content)["error"]["code"]) == (502, "upstream_failed")
    assert len(storage) == 0


async def test_a_long_answer_goes_out_as_it_comes(cached: Make, upstream: RawUpstream) -> None:
    body = b"x" * 200_000

    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 200001\r\n\r\n" + body)
            connection.upstream.go_on.wait(5)
            connection.send(b"y")

    upstream.script = script
    storage = MemoryResponses(max_size=800_000)
    app = cached(storage=storage)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("GET", MODEL))
        with anyio.fail_after(5):
            await caller.got_chunk.wait()
        upstream.go_on.set()
    assert caller.content == body + b"y"
    assert word(caller) == "MISS"
    assert word(await read(app)) == "MISS"
    assert len(storage) == 0


async def test_a_caller_who_leaves_leaves_nothing(cached: Make, upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\n{")
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    storage = MemoryResponses()
    app = cached(storage=storage)
    caller = Caller()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("GET", MODEL))
        await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        caller.left.set()
    await anyio.to_thread.run_sync(upstream.closed.wait, 5)
    assert len(storage) == 0
    upstream.script = counting()
    assert await words(app) == ["MISS", "HIT"]


async def test_each_search_is_on_its_own(cached: Make) -> None:
    app = cached()
    searches = [f"/v1/search?query={n}" for n in range(MAX_PER_KEY + 1)]
    for expected in ("MISS", "HIT"):
        assert [word(await read(app, search)) for search in searches] == [expected] * len(searches)


async def test_memory_is_bounded(cached: Make, upstream: RawUpstream) -> None:
    upstream.script = counting()
    app = cached(max_size=200_000)
    targets = [f"/v1/models/acme/model-{n}" for n in range(60)]
    for target in targets:
        assert await words(app, target) == ["MISS", "HIT"]
    assert [await words(app, target, times=1) for target in (targets[-1], targets[0])] == [["HIT"], ["MISS"]]


# --- refreshing


async def test_a_refresh_finds_nothing_and_replaces_the_answer(cached: Make, upstream: RawUpstream) -> None:
    upstream.script = counting(ETAG)
    app = cached()
    assert word(await read(app)) == "MISS"
    new = await read(app, MODEL, REFRESH)
    assert (word(new), new.content) == ("REFRESH", b'{"n":2}')
    assert upstream.requests[1].header(b"if-none-match") == []
    kept = await read(app)
    assert (word(kept), kept.content) == ("HIT", b'{"n":2}')
    assert word(await read(app, MODEL, (b"x-portkey-cache-force-refresh", b"false"))) == "HIT"


async def test_what_was_asked_for_before_a_refresh_does_not_replace_its_answer(
    cached: Make, upstream: RawUpstream
) -> None:
    app = cached()
    async with _slow_read(app, upstream):
        upstream.script = counting()
        assert word(await read(app, MODEL, REFRESH)) == "REFRESH"
    assert (await read(app)).content == b'{"n":2}'


# --- writes


class _SlowRead:
    """A read whose answer is from before the block, and comes after it."""

    def __init__(self, app: Any, upstream: RawUpstream, target: str) -> None:
        self._app, self._upstream, self._target = app, upstream, target
        self._tasks = anyio.create_task_group()

    async def __aenter__(self) -> None:
        def script(connection: Connection) -> None:
            connection.request()
            connection.upstream.ready.set()
            connection.upstream.go_on.wait(5)
            connection.answer(b'{"n":"old"}')

        self._upstream.script = script
        await self._tasks.__aenter__()
        self._tasks.start_soon(read, self._app, self._target)
        await anyio.to_thread.run_sync(self._upstream.ready.wait, 5)

    async def __aexit__(self, *error: Any) -> None:
        self._upstream.go_on.set()
        await self._tasks.__aexit__(*error)


def _slow_read(app: Any, upstream: RawUpstream, target: str = MODEL) -> _SlowRead:
    return _SlowRead(app, upstream, target)


@pytest.mark.parametrize(
    ("method", "target", "ended"),
    [
        ("PATCH", DEPLOYMENT, ["/v1/deployments", "/v1/deployments?cursor=a", DEPLOYMENT]),
        ("DELETE", DEPLOYMENT, ["/v1/deployments", "/v1/deployments?cursor=a", DEPLOYMENT]),
        ("PATCH", "/v1/deployments/%61cme/Hello?x", ["/v1/deployments", "/v1/deployments?cursor=a", DEPLOYMENT]),
        ("PATCH", DEPLOYMENT + "/", ["/v1/deployments", "/v1/deployments?cursor=a", DEPLOYMENT]),
        ("POST", "/v1/deployments", ["/v1/deployments", "/v1/deployments?cursor=a"]),
        ("POST", "/v1/models", ["/v1/models"]),
        ("PATCH", MODEL, ["/v1/models", MODEL, MODEL + "/readme", MODEL + "/versions", MODEL + "/versions/x"]),
        (
            "DELETE",
            MODEL + "/versions/x",
            ["/v1/models", MODEL, MODEL + "/readme", MODEL + "/versions", MODEL + "/versions/x"],
        ),
        ("PUT", MODEL + "/new", ["/v1/models", MODEL, MODEL + "/readme", MODEL + "/versions", MODEL + "/versions/x"]),
        ("POST", DEPLOYMENT + "/predictions", []),
        ("POST", MODEL + "/predictions", []),
        ("POST", MODEL + "/versions/x/trainings", []),
        ("POST", "/v1/predictions", []),
        ("DELETE", "/v1/files/x", []),
        ("POST", "/v1/", []),
    ],
)
async def test_a_write_ends_what_it_may_have_changed(
    cached: Make, upstream: RawUpstream, method: str, target: str, ended: list[str]
) -> None:
    reads = ["/v1/deployments", "/v1/deployments?cursor=a", DEPLOYMENT, "/v1/deployments/acme/other", "/v1/models"]
    reads += [MODEL, MODEL + "/readme", MODEL + "/versions", MODEL + "/versions/x", "/v1/models/acme/other"]
    reads += ["/v1/hardware", "/v1/collections/x", "/v1/search?query=mine"]
    app = cached()
    for one in reads:
        assert await words(app, one, times=1) == ["MISS"]
    assert word(await write(app, method, target)) == "DISABLED"
    assert [one for one in reads if await words(app, one, times=1) == ["MISS"]] == ended


async def test_a_write_ends_every_variant(cached: Make, upstream: RawUpstream) -> None:
    app = cached()
    variants = [GZIP, (b"accept-language", b"de"), (b"x-portkey-cache-namespace", b"n")]
    for variant in variants:
        assert await words(app, MODEL, variant) == ["MISS", "HIT"]
    await write(app, "PATCH", MODEL)
    for variant in variants:
        assert await words(app, MODEL, variant) == ["MISS", "HIT"]


async def test_nobody_else_s_answers_end(cached: Make, upstream: RawUpstream) -> None:
    app = cached()
    for key in KEYS:
        assert await words(app, key=key) == ["MISS", "HIT"]
    await write(app, "PATCH", MODEL)
    assert [await words(app, key=key, times=1) for key in KEYS] == [["MISS"], ["HIT"], ["HIT"]]


@pytest.mark.parametrize(("status", "ends"), [(b"204 No Content", True), (b"422 Wrong", False), (b"500 Oops", True)])
async def test_a_write_that_is_refused_ends_nothing(
    cached: Make, upstream: RawUpstream, status: bytes, ends: bool
) -> None:
    app = cached()
    await read(app)
    upstream.script = counting(status=status)
    await write(app, "PATCH", MODEL)
    upstream.script = counting()
    assert await words(app, times=1) == (["MISS"] if ends else ["HIT"])


async def test_a_write_whose_outcome_is_unknown_ends_it(cached: Make, upstream: RawUpstream) -> None:
    app = cached()
    await read(app)
    upstream.script = sends(b"")
    assert (await write(app, "PATCH", MODEL)).status == 502
    upstream.script = counting()
    assert await words(app, times=1) == ["MISS"]


async def test_so_does_one_whose_caller_has_left(cached: Make, upstream: RawUpstream) -> None:
    app = cached()
    await read(app)

    def script(connection: Connection) -> None:
        connection.request()
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    caller = Caller([b"{}"])
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(caller.call, app, http_scope("PATCH", MODEL))
        await anyio.to_thread.run_sync(upstream.ready.wait, 5)
        caller.left.set()
    upstream.script = counting()
    assert await words(app, times=1) == ["MISS"]


@pytest.mark.parametrize("target", [DEPLOYMENT, "/v1/deployments", "/v1/deployments?cursor=a"])
async def test_what_was_asked_for_before_a_write_is_not_kept(cached: Make, upstream: RawUpstream, target: str) -> None:
    app = cached()
    async with _slow_read(app, upstream, target):
        upstream.script = counting()
        assert (await write(app, "PATCH", DEPLOYMENT)).status == 200
    assert await words(app, target) == ["MISS", "HIT"]


# --- storages


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"lifetime": 0.9}, "lifetime"),
        ({"lifetime": float("nan")}, "lifetime"),
        ({"lifetime": float("inf")}, "lifetime"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"max_size": 1}, "max_size"),
        ({"storage": {}}, "storage"),
    ],
)
def test_an_option_out_of_range_is_told(options: dict[str, Any], name: str) -> None:
    with pytest.raises(ValueError, match=name):
        cache_catalogue(**options)


async def _refuses() -> None:
    raise OSError("hunter2")


@pytest.mark.parametrize("fails", [_refuses, anyio.sleep_forever])
async def test_a_storage_that_fails_is_as_if_nothing_were_stored(
    cached: Make, upstream: RawUpstream, fails: Callable[[], Awaitable[None]], caplog: pytest.LogCaptureFixture
) -> None:
    upstream.script = counting(ETAG)
    storage = Switched()
    app = cached(storage=storage, timeout=0.02)
    assert await words(app) == ["MISS", "HIT"]
    storage.before = fails
    storage.calls.clear()
    answers = [await read(app), await read(app, MODEL, REFRESH)]
    assert [(answer.status, word(answer)) for answer in answers] == [(200, "MISS"), (200, "REFRESH")]
    assert storage.calls == ["get", "get"]  # it is not asked to store what it would not find
    assert (await write(app, "PATCH", MODEL)).status == 200
    assert "hunter2" not in caplog.text
    storage.before = nothing
    assert (await read(app)).content == b'{"n":1}'


async def test_a_storage_that_fails_to_store_costs_nobody_the_answer(
    cached: Make, upstream: RawUpstream, clock: ManualClock
) -> None:
    upstream.script = confirming(ETAG)
    storage = Switched()
    app = cached(storage=storage)
    storage.fails_at = "create"
    assert await words(app) == ["MISS", "MISS"]
    storage.fails_at = "update"
    assert await words(app) == ["MISS", "HIT"]
    clock.advance(300)
    assert await words(app) == ["HIT", "HIT"]
    assert len(upstream.requests) == 5


@pytest.fixture
def own_server() -> Iterator[RedisServer]:
    with redis_server() as server:
        yield server


@asynccontextmanager
async def _redis(server: RedisServer, **options: Any) -> AsyncIterator[hishel.AsyncRedisStorage]:
    async with Redis.from_url(server.url, **options) as client:
        yield hishel.AsyncRedisStorage(client, key_prefix=str(uuid.uuid4()))


on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])


@on_asyncio
async def test_processes_share_what_is_in_redis(
    cached: Make, upstream: RawUpstream, redis_service: RedisServer, clock: ManualClock
) -> None:
    upstream.script = confirming(ETAG)
    async with _redis(redis_service) as storage:
        here, there = cached(storage=storage, timeout=10.0), cached(storage=storage, timeout=10.0)
        assert [word(await read(app)) for app in (here, there, here)] == ["MISS", "HIT", "HIT"]
        assert len(upstream.requests) == 1
        clock.advance(301)
        assert [word(await read(app)) for app in (there, here)] == ["HIT", "HIT"]
        assert len(upstream.requests) == 2
        assert word(await read(here, MODEL, key="pk-team-b")) == "MISS"
        refreshed = await read(here, MODEL, REFRESH)
        assert refreshed.content == (await read(there)).content == b'{"n":4}'
        await write(there, "DELETE", MODEL)
        assert [word(await read(app)) for app in (here, there)] == ["MISS", "HIT"]
        assert word(await read(there, MODEL, key="pk-team-b")) == "HIT"


@on_asyncio
async def test_what_is_in_redis_has_no_secret_and_an_end(
    cached: Make, upstream: RawUpstream, redis_service: RedisServer
) -> None:
    async with Redis.from_url(redis_service.url) as client:
        prefix = str(uuid.uuid4())
        app = cached(
            storage=hishel.AsyncRedisStorage(client, key_prefix=prefix), options={"forward_headers": ["x-org"]}
        )
        scope = [(b"x-portkey-metadata", b'{"_user": "wilhelmina"}'), (b"x-portkey-cache-namespace", b"n"), GZIP]
        assert await words(app, MODEL, *scope, (b"x-org", b"hunter2")) == ["MISS", "HIT"]
        keys = [key async for key in client.scan_iter(prefix + "*")]
        assert len(keys) == 4
        stored = b"".join(keys)
        for key in keys:
            assert 3600 < await client.ttl(key) <= 3600 + 300 + 180
            value = await client.get(key) if b":entry:" in key else None
            stored += value if isinstance(value, bytes) else b""
        for secret in (TOKEN, "pk-team-a", "team-a", "wilhelmina", "hunter2"):
            assert secret.encode() not in stored
        assert b"/models/acme/mine" in stored


@on_asyncio
async def test_a_redis_that_is_stopped_or_frozen_is_as_if_nothing_were_stored(
    cached: Make, upstream: RawUpstream, own_server: RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    upstream.script = counting()
    async with _redis(own_server) as storage:
        app = cached(storage=storage, timeout=1.0)
        assert await words(app) == ["MISS", "HIT"]
        with own_server.frozen():
            assert await words(app) == ["MISS", "MISS"]
            assert (await write(app, "PATCH", DEPLOYMENT)).status == 200
        assert (await read(app)).content == b'{"n":1}'
        own_server.stop()
        assert await words(app) == ["MISS", "MISS"]
        assert (await write(app, "PATCH", DEPLOYMENT)).status == 200
        own_server.start()
        assert await words(app) == ["MISS", "HIT"]
    assert caplog.messages
    for secret in (TOKEN, "pk-team-a"):
        assert secret not in caplog.text


@on_asyncio
async def test_a_redis_that_freezes_before_it_stores_costs_nobody_the_answer(
    cached: Make, upstream: RawUpstream, own_server: RedisServer
) -> None:
    with ExitStack() as frozen:

        def script(connection: Connection) -> None:
            connection.request()
            frozen.enter_context(own_server.frozen())
            connection.answer()

        upstream.script = script
        async with _redis(own_server) as storage:
            app = cached(storage=storage, timeout=0.5)
            assert await words(app, times=1) == ["MISS"]
            frozen.close()
            upstream.script = counting()
            # What the server had been sent, it may do now.
            assert all(answer.content in (b"{}", b'{"n":2}') for answer in [await read(app), await read(app)])
            assert await words(app, times=1) == ["HIT"]


@on_asyncio
async def test_a_redis_that_refuses_is_as_if_nothing_were_stored(
    cached: Make, upstream: RawUpstream, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = Redis(port=1, retry=Retry(NoBackoff(), 0))
    app = cached(storage=hishel.AsyncRedisStorage(nobody))
    assert await words(app) == ["MISS", "MISS"]
    assert (await write(app, "PATCH", MODEL)).status == 200
    assert "hishel: could not read entries, treating this as a cache miss" in caplog.messages
    for secret in (TOKEN, "pk-team-a"):
        assert secret not in caplog.text
    await nobody.aclose()


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_redis_needs_asyncio(cached: Make, redis_service: RedisServer) -> None:
    app = cached(storage=hishel.AsyncRedisStorage(Redis.from_url(redis_service.url)))
    assert await words(app) == ["MISS", "MISS"]


# --- the invariant


@dataclass
class Catalogue(httpx.AsyncBaseTransport):
    """A Replicate that remembers what it has answered to whom: each answer has a number."""

    clock: ManualClock
    asking: tuple[Any, ...] = ()
    answers: list[tuple[tuple[Any, ...], float]] = field(default_factory=list)
    lifetime: int | None = None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        headers = {"vary": "Cookie, origin"}
        if self.lifetime is not None:
            headers["cache-control"] = f"max-age={self.lifetime}"
        self.answers.append((self.asking, self.clock.now()))
        return httpx.Response(200, headers=headers, json=len(self.answers) - 1)


TARGETS = ["/models/a/b", "/models/a/b/readme", "/models", "/models?cursor=x", "/deployments/a/b", "/deployments"]
LISTS = ("/models", "/models?cursor=x", "/deployments")
WRITES = {
    ("PATCH", "/models/a/b"): {"/models/a/b", "/models/a/b/readme", "/models", "/models?cursor=x"},
    ("DELETE", "/deployments/a/b"): {"/deployments/a/b", "/deployments"},
    ("POST", "/models"): {"/models", "/models?cursor=x"},
    ("POST", "/models/a/b/predictions"): set(),
}
# Whose key, what for, encoding, namespace.
ASKING = (sorted(KEYS), TARGETS, [None, "gzip"], [None, "a", "b"])
_STEP = st.one_of(
    st.tuples(st.just("read"), *(st.sampled_from(choices) for choices in ASKING)),
    # As the last one, but for one thing.
    st.integers(0, 3).flatmap(lambda at: st.tuples(st.just("vary"), st.just(at), st.sampled_from(ASKING[at]))),
    st.tuples(st.just("repeat"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("write"), st.sampled_from(sorted(WRITES))),
    st.tuples(st.just("pass"), st.integers(0, 40)),
    st.tuples(st.just("state"), st.sampled_from([None, 0, 20])),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(_STEP, min_size=5, max_size=30))
def test_no_answer_is_another_one_s_or_older_than_it_may_be(steps: list[tuple[Any, ...]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        clock = ManualClock()
        patch.setattr(time, "time", clock.now)
        anyio.run(_play, steps, clock)


async def _play(steps: list[tuple[Any, ...]], clock: ManualClock) -> None:
    replicate = Catalogue(clock)
    storage = MemoryResponses(max_size=60_000, now=clock.now)
    app = proxy(
        "https://api.replicate.com/v1",
        layers=[cache_catalogue(lifetime=30, storage=storage)],
        key_resolver=MappingKeyResolver(KEYS),
        transport=replicate,
    )
    written: dict[tuple[str, str], int] = {}
    stated: list[int] = []
    reads: list[tuple[Any, ...]] = []

    async def check(asking: tuple[Any, ...], *more: tuple[bytes, bytes]) -> str:
        key, target, encoding, namespace = asking
        # The links of lists are rewritten above the layer, which is asked for lists without encoding.
        replicate.asking = (key, target, None if target in LISTS else encoding, namespace)
        before = len(replicate.answers)
        headers = [*more]
        headers += [(b"accept-encoding", encoding.encode())] if encoding else []
        headers += [(b"x-portkey-cache-namespace", namespace.encode())] if namespace else []
        caller = await read(app, "/v1" + target, *headers, key=key)
        if len(replicate.answers) > before:
            stated.append(30 if replicate.lifetime is None else replicate.lifetime)
        number = json.loads(caller.content)
        whose, at = replicate.answers[number]
        assert whose == replicate.asking
        assert number >= written.get((key, target), 0)
        assert (number >= before) == (word(caller) != "HIT")
        assert number >= before or clock.now() - at < stated[number]
        assert storage.size <= 60_000
        return word(caller)

    for step in steps:
        match step:
            case ("read", *fields):
                reads.append(tuple(fields))
                await check(reads[-1])
            case ("vary", at, value) if reads:
                reads.append((*reads[-1][:at], value, *reads[-1][at + 1 :]))
                await check(reads[-1])
                if replicate.lifetime != 0:
                    assert await check(reads[-1]) == "HIT"
            case ("repeat", back, refresh):
                for asking in reads[-back:]:
                    assert (await check(asking, *([REFRESH] if refresh else [])) == "REFRESH") == refresh
            case ("write", (method, target)) if reads:
                key = reads[-1][0]
                assert (await write(app, method, "/v1" + target, key=key)).status == 200
                stated.append(0)
                for changed in WRITES[method, target]:
                    written[key, changed] = len(replicate.answers)
            case ("pass", seconds):
                clock.advance(seconds)
            case ("state", lifetime):
                replicate.lifetime = lifetime
