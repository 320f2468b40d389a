from __future__ import annotations

import asyncio
import gzip
import json
import logging
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, format_span_id, format_trace_id
from redis.asyncio import Redis
from replicate.client import Client
from replicate.pagination import paginate

from replicate_proxy_mw import MappingKeyResolver, PermissionDenied, Policy, ReplicateKey, middleware
from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.layers import ownership
from replicate_proxy_mw.store import MemoryPredictionStore, PredictionStore, StoredPrediction, ledger
from replicate_proxy_mw.store.ledger import PROBE
from replicate_proxy_mw.store.redis import RedisPredictionStore
from replicate_proxy_mw.telemetry.names import OUTCOME, STORE_FAILED
from replicate_proxy_mw.testing import FakeModel, FakeReplicate, serve
from tests.clients.drivers import NODE, require
from tests.clients.stage import Driver
from tests.raw_asgi import TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.services import redis_server

pytestmark = pytest.mark.anyio

A, B = ((b"x-portkey-api-key", b"pk-team-" + name) for name in (b"a", b"b"))
JSON = (b"content-type", b"application/json")
FORM = (b"content-type", b"multipart/form-data; boundary=x")
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
MINE = FakeModel(owner="acme", name="mine", visibility="private")


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return {"models": [MINE], "page_size": 3, "api_url": "https://api.replicate.com/v1", "tokens": {TOKEN: "acme"}}


def owned(upstream: str, *, store: PredictionStore | None = None, **more: Any) -> Any:
    """The proxy in front of `upstream`, with two tenants who share a token."""
    policy = Policy(own_predictions=True)
    keys = {f"pk-team-{name}": ReplicateKey(TOKEN, tenant=f"team-{name}", policy=policy) for name in "ab"}
    return proxy(upstream, key_resolver=MappingKeyResolver(keys), store=store, **more)


async def ask(
    app: Any, who: tuple[bytes, bytes], method: str, target: str, body: bytes = b"", *headers: tuple[bytes, bytes]
) -> Caller:
    return await call(app, http_scope(method, target, [who, *headers]), body)


def code(caller: Caller) -> tuple[int | None, str]:
    return caller.status, json.loads(caller.content)["error"]["code"]


async def _nothing(id: str) -> None:
    pass


class Switched(MemoryPredictionStore):
    """A store with a switch: what is awaited before it writes or reads an id may fail."""

    def __init__(self) -> None:
        super().__init__()
        self.put_ids: list[str] = []
        self.before_put: Callable[[str], Awaitable[None]] = _nothing
        self.before_get: Callable[[str], Awaitable[None]] = _nothing

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        self.put_ids.append(id)
        await self.before_put(id)
        await super().put(id, prediction)

    async def get(self, ids: Collection[str], /, *, read: bool = False) -> Mapping[str, StoredPrediction]:
        for id in ids:
            await self.before_get(id)
        return await super().get(ids, read=read)


async def refuses(id: str) -> None:
    raise OSError("hunter2")


async def hangs(id: str) -> None:
    await anyio.sleep_forever()


async def denies(id: str) -> None:
    raise PermissionDenied("hunter2")


async def refuses_creations(id: str) -> None:
    if id != PROBE:
        raise OSError("hunter2")


def store_of(*ids: str, tenant: str = "team-a") -> MemoryPredictionStore:
    store = MemoryPredictionStore()
    for id in ids:
        with pytest.raises(StopIteration):  # nothing in it waits
            store.put(id, StoredPrediction(tenant=tenant)).send(None)
    return store


def answers(body: bytes, status: bytes = b"200 OK", headers: bytes = b"") -> Callable[[Connection], None]:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(body, status=status, headers=headers)

    return script


def sends(answer: bytes) -> Callable[[Connection], None]:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(answer)

    return script


# --- what is created, and by whom it can be reached


@dataclass(frozen=True)
class Create:
    target: str
    where: str
    body: bytes
    content_type: tuple[bytes, bytes] = JSON
    cancels: bool = True


_INPUT = {"input": {"text": "Ada", "prompt": "Ada"}}
_UPLOAD = b'--x\r\ncontent-disposition: form-data; name="content"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
CREATES = {
    "predictions.create": Create(
        "/v1/predictions", "/v1/predictions", json.dumps({"version": HELLO_WORLD, **_INPUT}).encode()
    ),
    "models.predictions.create": Create(
        "/v1/models/meta/meta-llama-3-8b-instruct/predictions", "/v1/predictions", json.dumps(_INPUT).encode()
    ),
    "deployments.predictions.create": Create(
        "/v1/deployments/acme/hello/predictions", "/v1/predictions", json.dumps(_INPUT).encode()
    ),
    "trainings.create": Create(
        f"/v1/models/replicate/hello-world/versions/{HELLO_WORLD}/trainings",
        "/v1/trainings",
        json.dumps({"destination": "acme/mine", **_INPUT}).encode(),
    ),
    "files.create": Create("/v1/files", "/v1/files", _UPLOAD, FORM, cancels=False),
}
each_create = pytest.mark.parametrize("create", CREATES.values(), ids=CREATES)


async def created(app: Any, who: tuple[bytes, bytes], create: Create = CREATES["predictions.create"]) -> str:
    caller = await ask(app, who, "POST", create.target, create.body, create.content_type)
    assert caller.status == 201, caller.content
    return str(json.loads(caller.content)["id"])


def reaching(create: Create, id: str, fake: FakeReplicate) -> list[tuple[str, str]]:
    """Every request that is about `id`; the last ends it."""
    one = f"{create.where}/{id}"
    if create.cancels:
        return [("GET", one), ("HEAD", one), ("POST", one + "/cancel")]
    download = "/v1" + fake.download_url(id).partition("/v1")[2]
    return [("GET", one), ("HEAD", one), ("GET", download), ("HEAD", download), ("DELETE", one)]


@each_create
async def test_who_has_created_it_reaches_it(fake_replicate: FakeReplicate, create: Create) -> None:
    app = owned(fake_replicate.url)
    id = await created(app, A, create)
    for method, target in reaching(create, id, fake_replicate):
        caller = await ask(app, A, method, target)
        assert caller.status in ((405,) if method == "HEAD" else (200, 204)), (method, target)  # Replicate has no HEAD
        assert fake_replicate.requests[-1].target.decode() == target
        assert caller.header(b"cache-control") == [b"private, no-store"]


@each_create
async def test_nobody_else_reaches_it(fake_replicate: FakeReplicate, create: Create) -> None:
    app = owned(fake_replicate.url)
    id = await created(app, A, create)
    fake_replicate.requests.clear()
    for method, target in reaching(create, id, fake_replicate):
        caller = await ask(app, B, method, target)
        assert caller.status == 404
    assert not fake_replicate.requests
    assert (await ask(app, A, "GET", f"{create.where}/{id}")).status == 200


def _shape(caller: Caller) -> tuple[Any, ...]:
    [id] = caller.header(b"x-request-id")
    headers = [(name, value.replace(id, b"-")) for name, value in caller.headers]
    return caller.status, headers, caller.content.replace(id, b"-")


@each_create
async def test_what_is_others_and_what_is_nobody_s_are_answered_alike(
    fake_replicate: FakeReplicate, create: Create
) -> None:
    app = owned(fake_replicate.url)
    id = await created(app, A, create)
    fake_replicate.requests.clear()
    unknown = id[::-1]
    pairs = zip(reaching(create, id, fake_replicate), reaching(create, unknown, fake_replicate), strict=True)
    for (method, others), (_, nobodys) in pairs:
        assert _shape(await ask(app, B, method, others)) == _shape(await ask(app, B, method, nobodys))
    assert not fake_replicate.requests


async def test_both_are_asked_of_the_store(upstream: RawUpstream) -> None:
    store, asked = Switched(), []

    async def note(id: str) -> None:
        asked.append(id)

    store.before_get = note
    await store.put("others", StoredPrediction(tenant="team-a"))
    for id in ("others", "nobodys"):
        assert code(await ask(owned(upstream.url, store=store), B, "GET", f"/v1/predictions/{id}")) == (
            404,
            "not_found",
        )
    assert asked == ["others", "nobodys"]


async def test_what_is_written_to_see_whether_the_store_writes_is_nobody_s(fake_replicate: FakeReplicate) -> None:
    app = owned(fake_replicate.url, store=Switched())
    await created(app, A)
    fake_replicate.requests.clear()
    assert code(await ask(app, A, "GET", f"/v1/predictions/{PROBE}")) == (404, "not_found")
    assert not fake_replicate.requests


@pytest.mark.parametrize("spelled", ["/v1/predictions/%701", "/v1/%70redictions/p1", "/v1/predictions%2Fp1"])
async def test_other_spellings_of_an_id(upstream: RawUpstream, spelled: str) -> None:
    app = owned(upstream.url, store=store_of("p1"))
    assert (await ask(app, B, "GET", spelled)).status == 404
    assert not upstream.requests
    assert (await ask(app, A, "GET", spelled)).status == 200


@pytest.mark.parametrize(
    "target", ["/v1/predictions/p1/", "/v1/predictions/P1", "/v1/predictions/p1;x", "/v1/predictions/p1%2Flogs"]
)
async def test_what_is_no_operation_or_another_id_goes_nowhere(upstream: RawUpstream, target: str) -> None:
    caller = await ask(owned(upstream.url, store=store_of("p1")), A, "GET", target)
    assert caller.status in (403, 404)
    assert not upstream.requests


async def test_what_is_nobody_s_in_particular_passes(fake_replicate: FakeReplicate) -> None:
    app = owned(fake_replicate.url, store=Switched())
    for target in ("/v1/account", "/v1/models", "/v1/models/replicate/hello-world/examples", "/v1/hardware"):
        assert (await ask(app, A, "GET", target)).status == 200


async def test_without_the_rule_all_of_an_account_is_reached(fake_replicate: FakeReplicate) -> None:
    store = Switched()
    store.before_put = store.before_get = refuses
    keys = {f"pk-team-{name}": ReplicateKey(TOKEN, tenant=name) for name in "ab"}
    app = proxy(fake_replicate.url, key_resolver=MappingKeyResolver(keys), store=store)
    id = await created(app, A)
    assert (await ask(app, B, "GET", f"/v1/predictions/{id}")).status == 200


async def test_a_key_that_has_lost_its_tenant_reaches_nothing(upstream: RawUpstream) -> None:
    key = ReplicateKey(TOKEN, tenant="team-a", policy=Policy(own_predictions=True))
    key.tenant = None
    app = proxy(upstream.url, key_resolver=MappingKeyResolver({"pk-team-a": key}))
    for method, target in (("GET", "/v1/account"), ("GET", "/v1/predictions"), ("POST", "/v1/predictions")):
        assert code(await ask(app, A, method, target)) == (404, "not_found")
    assert not upstream.requests


async def test_own_streams_are_read(fake_replicate: FakeReplicate) -> None:
    options = {
        "proxy_streams": True,
        "stream_key": "a-key-of-more-than-32-characters-for-tests",
        "stream_hosts": [fake_replicate.streams_url.removeprefix("http://")],
    }
    app = owned(fake_replicate.url, options=options)
    create = CREATES["models.predictions.create"]
    caller = await ask(app, A, "POST", create.target, create.body, JSON)
    stream = json.loads(caller.content)["urls"]["stream"].removeprefix("http://proxy.test")
    assert stream.startswith("/v1/-/streams/")
    caller = await call(app, http_scope(target=stream, headers=()))
    assert b"event: done" in caller.content


# --- lists


async def _pages(app: Any, who: tuple[bytes, bytes], target: str, link: str = "next") -> tuple[list[list[str]], str]:
    """The ids on each page from `target` on, and the last page's URL."""
    pages = []
    while True:
        caller = await ask(app, who, "GET", target)
        assert caller.status == 200
        page = json.loads(caller.content)
        pages.append([item["id"] for item in page["results"]])
        if page[link] is None:
            return pages, target
        assert page[link].startswith("http://proxy.test/v1/")
        target = page[link].removeprefix("http://proxy.test")


WHOSE = "aabbbbbbbbaba"  # in the order of creation: one page at least is empty for team-a


@pytest.mark.parametrize("create", [CREATES[f"{kind}.create"] for kind in ("predictions", "trainings", "files")])
async def test_lists_show_what_is_own_page_by_page(fake_replicate: FakeReplicate, create: Create) -> None:
    app = owned(fake_replicate.url)
    ids: dict[str, list[str]] = {"a": [], "b": []}
    for name in WHOSE:
        ids[name].insert(0, await created(app, A if name == "a" else B, create))
    for who, name in ((A, "a"), (B, "b")):
        pages, last = await _pages(app, who, create.where)
        assert len(pages) == -(-len(WHOSE) // 3)
        assert [id for page in pages for id in page] == ids[name]
        back, _ = await _pages(app, who, last, "previous")
        assert back[::-1] == pages
    assert [] in (await _pages(app, A, create.where))[0]


@contextmanager
def _served(fake: FakeReplicate) -> Iterator[tuple[str, list[str]]]:
    """The proxy on a port, with predictions of two tenants; and those of team-a."""
    create = CREATES["predictions.create"]
    with serve(owned(fake.url)) as served, httpx.Client(base_url=served.url, headers=[JSON]) as client:
        own = []
        for name in WHOSE:
            headers = {"x-portkey-api-key": f"pk-team-{name}"}
            id = client.post(create.target, content=create.body, headers=headers).json()["id"]
            own += [id] if name == "a" else []
        yield served.url, own[::-1]


def test_replicate_s_client_for_python_walks_them(fake_replicate: FakeReplicate) -> None:
    with _served(fake_replicate) as (url, own):
        client = Client(api_token="pk-team-a", base_url=url)
        with client._client:
            pages = list(paginate(client.predictions.list))
            assert [one.id for page in pages for one in page] == own
            assert pages[-1].previous is not None
            assert len(client.predictions.list(cursor=pages[-1].previous)) == len(pages[-2])


def test_replicate_s_client_for_node_walks_them(fake_replicate: FakeReplicate) -> None:
    require("node")
    walk = (
        "const ids = []; for await (const page of replicate.paginate(replicate.predictions.list))"
        " ids.push(...page.map((one) => one.id)); ids"
    )
    with _served(fake_replicate) as (url, own):
        driver = Driver("node", "driver.mjs", cwd=NODE)
        try:
            assert driver({"call": walk, "url": url + "/v1", "key": "pk-team-a", "names": {}}) == {"value": own}
        finally:
            driver.close()


LIST = (
    b'{ "next":null,\n"previous" : null, "results": [ {"id":"p1", "x":1.50, "y":"\\u00e9"} , {"id": "p2"},\n'
    b'"p1", {"id": ["p1"]}, {"x": {"id": "p1"}}, null, {"z":0,"id":"p3"}]\n, "more": {"results": []} }'
)
FILTERED = (
    b'{ "next":null,\n"previous" : null, "results": [{"id":"p1", "x":1.50, "y":"\\u00e9"},{"z":0,"id":"p3"}]\n'
    b', "more": {"results": []} }'
)


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
async def test_no_byte_of_what_is_kept_changes(upstream: RawUpstream, encoding: str) -> None:
    body = gzip.compress(LIST) if encoding == "gzip" else LIST
    headers = b'content-encoding: %s\r\netag: "1"\r\ncache-control: public\r\n' % encoding.encode()
    upstream.script = answers(body, headers=headers)
    store = store_of("p1", "p3")
    caller = await ask(owned(upstream.url, store=store), A, "GET", "/v1/predictions")
    assert caller.content == FILTERED
    assert caller.header(b"content-length") == [str(len(FILTERED)).encode()]
    assert caller.header(b"cache-control") == [b"private, no-store"]
    assert caller.header(b"etag") == caller.header(b"content-encoding") == []
    caller = await ask(owned(upstream.url, store=store), B, "GET", "/v1/predictions")
    assert b"p1" not in caller.content
    assert json.loads(caller.content)["results"] == []


async def test_a_list_is_asked_for_whole(upstream: RawUpstream) -> None:
    upstream.script = answers(b'{"results": []}')
    headers = [(b"range", b"bytes=0-1"), (b"if-match", b"x"), (b"if-none-match", b"x"), (b"accept-encoding", b"br")]
    options = {"forward_headers": ["if-match", "range"]}
    await ask(owned(upstream.url, options=options), A, "GET", "/v1/trainings?cursor=x", b"", *headers)
    [received] = upstream.requests
    assert received.line == b"GET /v1/trainings?cursor=x HTTP/1.1"
    assert received.header(b"range") == received.header(b"if-match") == received.header(b"if-none-match") == []
    assert received.header(b"accept-encoding") == [b"identity"]


async def test_the_head_of_a_list_says_nothing_of_its_length(upstream: RawUpstream) -> None:
    upstream.script = sends(
        b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 999\r\netag: "1"\r\n\r\n'
    )
    caller = await ask(owned(upstream.url), A, "HEAD", "/v1/files")
    assert (caller.status, caller.content) == (200, b"")
    assert caller.header(b"content-length") == caller.header(b"etag") == []


async def test_an_error_in_place_of_a_list_passes(upstream: RawUpstream) -> None:
    upstream.script = answers(b'{"detail": "slow down"}', b"429 Too Many Requests", b"retry-after: 7\r\n")
    caller = await ask(owned(upstream.url), A, "GET", "/v1/predictions")
    assert (caller.status, caller.content) == (429, b'{"detail": "slow down"}')
    assert caller.header(b"retry-after") == [b"7"]


_ITEM = b'{"id": "p2"}'
_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "script",
    [
        answers(b"[" + _ITEM + b"]"),
        answers(b'{"next": null}'),
        answers(b'{"results": ' + _ITEM + b"}"),
        answers(b'{"results": [' + _ITEM + b"}"),
        answers(b'{"results": [' + _ITEM + b"],"),
        answers(b'{"results": [], "results": [' + _ITEM + b"]}"),
        answers(b'{"results": [], "p2": "\xff"}'),
        answers(b'{"results": ' + b"[" * 100_000 + _ITEM),
        answers(b"p2 is late"),
        answers(b""),
        answers(b'{"results": []}', b"206 Partial Content", b"content-range: bytes 0-14/99\r\n"),
        answers(b"p2", headers=b"content-encoding: gzip\r\n"),
        answers(gzip.compress(b'{"results": []}')[:-4], headers=b"content-encoding: gzip\r\n"),
        answers(gzip.compress(b'{"results": []}' + b" " * 2000), headers=b"content-encoding: gzip\r\n"),
        answers(b'{"results": []}', headers=b"content-encoding: br\r\n"),
        answers(b'{"results": []}' + b" " * 2000),
        sends(_HEAD + b"transfer-encoding: chunked\r\n\r\n7d0\r\n" + b" " * 2000 + b"\r\n0\r\n\r\n"),
        sends(b'HTTP/1.1 200 OK\r\ncontent-type: text/html\r\ncontent-length: 15\r\n\r\n{"results": []}'),
        sends(b'HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n{"results": []}'),
        sends(b"HTTP/1.1 204 No Content\r\n\r\n"),
    ],
)
async def test_what_cannot_be_read_as_a_list_is_not_shown(
    upstream: RawUpstream, script: Callable[[Connection], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ownership, "MAX_PAGE", 1000)
    upstream.script = script
    caller = await ask(owned(upstream.url, store=store_of("p1")), A, "GET", "/v1/predictions")
    assert code(caller) == (502, "upstream_failed")
    assert b"p2" not in caller.content


async def test_a_list_that_is_cut_is_a_failure(upstream: RawUpstream) -> None:
    upstream.script = sends(_HEAD + b'content-length: 99\r\n\r\n{"results": [')
    assert code(await ask(owned(upstream.url), A, "GET", "/v1/predictions")) == (502, "upstream_failed")


async def test_an_empty_page_needs_no_store(upstream: RawUpstream) -> None:
    store = Switched()
    store.before_get = refuses
    upstream.script = answers(b'{"results": [ ]}')
    assert (await ask(owned(upstream.url, store=store), A, "GET", "/v1/predictions")).status == 200


# --- what a create leaves in the store


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


async def test_what_is_remembered(
    fake_replicate: FakeReplicate, tracer_provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    store = Switched()
    id = await created(owned(fake_replicate.url, store=store, tracer_provider=tracer_provider), A)
    [span] = [span for span in exporter.get_finished_spans() if span.kind is SpanKind.SERVER]
    assert span.context is not None
    flags = f"{span.context.trace_flags:02x}"
    traceparent = f"00-{format_trace_id(span.context.trace_id)}-{format_span_id(span.context.span_id)}-{flags}"
    assert await store.get([id]) == {id: StoredPrediction(tenant="team-a", traceparent=traceparent)}
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
        (gzip.compress(b'{"id": "p1"}'), b"gzip"),
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


# --- a store that fails

fast = {"store_timeout": 0.05}
each_failure = pytest.mark.parametrize("failure", [refuses, hangs, denies])


@each_failure
async def test_while_the_store_is_out_of_order_nothing_goes_up(
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


# --- a write that fails when Replicate has accepted

CREATED = b'{"id":"p1","status":"starting"}'


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
    assert caplog.messages == [f"prediction store failed: {name}"] * 2
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
    monkeypatch.setattr(middleware, "AFTERWARDS_TIMEOUT", 0.01)
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
    store.before_get = _nothing
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
    store.before_put = _nothing
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


async def test_what_is_not_written_is_bounded(upstream: RawUpstream, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "MAX_UNWRITTEN", 2)
    app = await _failed(upstream, Switched(), monkeypatch, "p1", "p2", "p3")
    upstream.script = answers(b"{}")
    reached = [(await ask(app, A, "GET", f"/v1/predictions/p{n}")).status for n in (1, 2, 3)]
    assert reached == [404, 200, 200]


# --- callers who leave, and time that runs out


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
            await anyio.sleep(0.6)

    store.before_put = slow
    upstream.script = answers(CREATED, b"201 Created")
    app = owned(upstream.url, store=store, options={"store_timeout": 5.0})
    caller = await ask(app, A, "POST", "/v1/predictions", b"", (b"x-portkey-request-timeout", b"500"))
    assert (caller.status, caller.content) == (201, CREATED)
    assert "p1" in await store.get(["p1"])


async def test_a_caller_s_own_limit_that_runs_out_before(upstream: RawUpstream) -> None:
    store = Switched()
    store.before_put = hangs
    app = owned(upstream.url, store=store, options={"store_timeout": 5.0})
    caller = await ask(app, A, "POST", "/v1/predictions", b"", (b"x-portkey-request-timeout", b"50"))
    assert code(caller) == (408, "request_timeout")
    assert not upstream.requests
