from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from replicate.client import Client
from replicate.pagination import paginate

from replicate_proxy_mw import MappingKeyResolver, Policy, ReplicateKey
from replicate_proxy_mw.layers import ownership
from replicate_proxy_mw.store import StoredPrediction
from replicate_proxy_mw.store.ledger import PROBE
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.clients.drivers import NODE, require
from tests.clients.stage import Driver
from tests.raw_asgi import TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.tenants import (
    CREATES,
    JSON,
    LIST,
    OPTIONS,
    A,
    B,
    Create,
    Switched,
    answers,
    ask,
    code,
    created,
    each_create,
    owned,
    refuses,
    sends,
    store_of,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def fake_replicate_options() -> dict[str, Any]:
    return OPTIONS


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


async def test_a_key_that_has_lost_its_tenant_reachesnothing(upstream: RawUpstream) -> None:
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


async def test_the_head_of_a_list_saysnothing_of_its_length(upstream: RawUpstream) -> None:
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
