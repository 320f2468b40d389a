"""Row 12: nothing that one tenant's exchange leaves behind reaches another tenant's."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import aclosing
from itertools import count
from typing import Any

import anyio
import httpx
import pytest

from replicate_proxy_mw import CachedKeyResolver, KeyRequest, Layer, MappingKeyResolver, ReplicateKey
from replicate_proxy_mw.layers.cache import cache_catalogue
from replicate_proxy_mw.layers.coalescing import coalesce_polls
from replicate_proxy_mw.layers.idempotency import idempotency_keys
from tests.raw_asgi import Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.rows import row

pytestmark = pytest.mark.anyio

TOKENS = {"a": "r8_Td5HsQ9kLw2XvB7nMz4RcY8p", "b": "r8_Kx82PqLwTz5Rv0NbGh3Jm6Cd"}
# Two who share a token are two all the same.
TOKENS["c"] = TOKENS["a"]

KEYS = MappingKeyResolver({f"pk-team-{name}": ReplicateKey(token, tenant=name) for name, token in TOKENS.items()})


def _key(name: str) -> tuple[bytes, bytes]:
    return (b"x-portkey-api-key", f"pk-team-{name}".encode())


@row("2.12")
@pytest.mark.parametrize("transport", ["default", "fast", "given"])
async def test_no_cookie_of_one_goes_up_with_another_s_request(upstream: RawUpstream, transport: str) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(headers=b"set-cookie: session=of-the-first; path=/\r\n")

    upstream.script = script
    options = {"fast": transport == "fast"}
    async with aclosing(httpx.AsyncHTTPTransport()) as given:
        of_the_host = given if transport == "given" else None
        async with aclosing(proxy(upstream.url, key_resolver=KEYS, transport=of_the_host, options=options)) as app:
            for name in ("a", "b", "a"):
                assert (await Caller().call(app, http_scope(headers=[_key(name)]))).header(b"set-cookie") == []
    assert [sent.header(b"cookie") for sent in upstream.requests] == [[], [], []]
    sent = [sent.header(b"authorization") for sent in upstream.requests]
    assert sent == [[f"Bearer {TOKENS[name]}".encode()] for name in ("a", "b", "a")]


@row("2.12")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("late", [False, True])
async def test_what_is_left_over_of_one_s_answer_is_not_another_s(upstream: RawUpstream, late: bool) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            stray = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nstray"
            if late:
                connection.answer(b"whole")
                upstream.go_on.wait(5)
                connection.send(stray)
                upstream.ready.set()
            else:
                connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwhole" + stray)

    upstream.script = script
    async with aclosing(proxy(upstream.url, key_resolver=KEYS)) as app:
        for name in ("a", "b", "c"):
            assert (await Caller().call(app, http_scope(headers=[_key(name)]))).content == b"whole"
            upstream.go_on.set()
            if late:
                assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
                await anyio.sleep(0.02)
                upstream.ready.clear()
    assert len(upstream.connections) == 3


@row("2.12")
async def test_keys_of_one_beginning_are_remembered_apart(upstream: RawUpstream) -> None:
    beginning = "pk-of-the-same-forty-characters-at-first-"

    async def inner(request: KeyRequest) -> ReplicateKey | None:
        name = request.api_key.removeprefix(beginning)
        return ReplicateKey(TOKENS[name], tenant=name) if name in TOKENS else None

    app = proxy(upstream.url, key_resolver=CachedKeyResolver(inner))
    for name in ("a", "b", "", "aa", "b", "a"):
        header = (b"x-portkey-api-key", (beginning + name).encode())
        caller = await call(app, http_scope(headers=[header]))
        assert caller.status == (200 if name in TOKENS else 401)
    sent = [sent.header(b"authorization") for sent in upstream.requests]
    assert sent == [[f"Bearer {TOKENS[name]}".encode()] for name in ("a", "b", "b", "a")]


@row("2.12")
@pytest.mark.parametrize(
    ("layer", "method", "target"),
    [
        (cache_catalogue, "GET", "/v1/models/acme/x"),
        (coalesce_polls, "GET", "/v1/predictions/polled"),
        (idempotency_keys, "POST", "/v1/predictions"),
    ],
)
async def test_no_layer_answers_one_with_what_another_got(
    upstream: RawUpstream, layer: Callable[[], Layer], method: str, target: str
) -> None:
    serial = count()

    def script(connection: Connection) -> None:
        while sent := connection.request():
            last = sent.line.split()[1].rpartition(b"/")[2].decode()
            id = last if last[1:].isdigit() else f"p{next(serial)}"
            content = {"id": id, "for": [name for name in TOKENS if TOKENS[name] in str(sent.head)]}
            # For all of them to ask before the first has an answer.
            upstream.go_on.wait(0.05)
            connection.answer(
                json.dumps(content).encode(), status=b"201 Created" if sent.line[:4] == b"POST" else b"200 OK"
            )

    upstream.script = script
    got: dict[str, set[str]] = {name: set() for name in TOKENS}
    told: list[tuple[str, list[str]]] = []

    async def ask(app: Any, name: str) -> None:
        headers = [_key(name), (b"idempotency-key", b"of-everyone"), (b"content-type", b"application/json")]
        caller = await Caller([b'{"input": {}}']).call(app, http_scope(method, target, headers))
        answer = json.loads(caller.content)
        told.append((name, answer["for"]))
        got[name].add(answer["id"])

    async with aclosing(proxy(upstream.url, key_resolver=KEYS, layers=[layer()])) as app:
        for _ in range(2):
            async with anyio.create_task_group() as tasks:
                for name in TOKENS:
                    tasks.start_soon(ask, app, name)
    assert [name for name, whom in told if name not in whom] == []
    assert got["a"].isdisjoint(got["b"] | got["c"])
    assert got["b"].isdisjoint(got["c"])


@row("2.12")
async def test_nothing_is_cached_unless_the_host_says_so(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(headers=b"cache-control: public, max-age=3600\r\netag: 1\r\n")

    upstream.script = script
    app = proxy(upstream.url, key_resolver=KEYS)
    for name in ("a", "a", "b"):
        caller = await call(app, http_scope(target="/v1/models/acme/x", headers=[_key(name)]))
        assert caller.header(b"x-portkey-cache-status") == [b"DISABLED"]
    assert len(upstream.requests) == 3
