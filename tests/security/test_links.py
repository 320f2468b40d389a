"""Row 16: links lead to where the host says, or to where this caller has reached it; no other text changes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.raw_asgi import KEY, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.rows import row

pytestmark = pytest.mark.anyio

GET = "https://api.replicate.com/v1/predictions/p1"
CANCEL = GET + "/cancel"


async def _read(upstream: RawUpstream, content: Any, *headers: tuple[bytes, bytes], **options: Any) -> Caller:
    """A prediction that reads as `content`; `headers` come in the place of the caller's Host."""

    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(content if isinstance(content, bytes) else json.dumps(content).encode())

    upstream.script = script
    scope = http_scope(target="/v1/predictions/p1")
    scope["headers"] = [KEY, *headers]
    return await call(proxy(upstream.url, options=options), scope)


def _links(caller: Caller) -> list[str]:
    urls = json.loads(caller.content)["urls"]
    return [urls["get"], urls["cancel"]]


PREDICTION = {"id": "p1", "urls": {"get": GET, "cancel": CANCEL}}


@row("2.16")
@pytest.mark.parametrize("host", [b"evil.test", b"app.example", b"127.0.0.1:1"])
async def test_a_public_url_is_what_links_lead_to_whatever_host_says(upstream: RawUpstream, host: bytes) -> None:
    forwarded = (b"x-forwarded-host", b"evil.test")
    caller = await _read(upstream, PREDICTION, (b"host", host), forwarded, public_url="https://app.example/v1")
    assert _links(caller) == ["https://app.example/v1/predictions/p1", "https://app.example/v1/predictions/p1/cancel"]


@row("2.16")
async def test_without_one_links_lead_to_where_this_caller_is_and_nobody_keeps_them(upstream: RawUpstream) -> None:
    names = b"x-forwarded-host x-forwarded-server x-original-host x-host x-forwarded-proto x-forwarded-prefix".split()
    forwarded = [*((name, b"evil.test") for name in names), (b"forwarded", b"host=evil.test;proto=https")]
    caller = await _read(upstream, PREDICTION, (b"host", b"app.example:8443"), *forwarded)
    base = "http://app.example:8443/v1/predictions/p1"
    assert _links(caller) == [base, base + "/cancel"]
    assert caller.header(b"cache-control") == [b"private, no-store"]


@row("2.16")
@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [b""],
        [b"app.example", b"evil.test"],
        [b"user@evil.test"],
        [b"app.example/evil"],
        [b"app.example?x"],
        [b"app.example#x"],
        [b'app.example"evil'],
        [b"app.example\\evil"],
        [b"app.example evil"],
        [b"app.example,evil.test"],
        [b"app.example:port"],
        [b"app.example:99999"],
        [b"app.example:80:80"],
        [b"[::1"],
        [b"[evil.test]"],
        [b"1.2.3.4.5"],
        [b"-evil.test"],
        [b"app..example"],
        [b"app.ex\xe4mple"],
        [b"app.example%00"],
        [b"<script>"],
        [b"a" * 300],
    ],
)
async def test_a_host_that_is_none_leads_nowhere(upstream: RawUpstream, hosts: list[bytes]) -> None:
    caller = await _read(upstream, PREDICTION, *((b"host", host) for host in hosts))
    # Two of one name are refused; all else is answered, as Replicate has written it.
    assert caller.status == 400 if len(hosts) > 1 else _links(caller) == [GET, CANCEL]


@row("2.16")
@pytest.mark.parametrize(
    "link",
    [
        "https://api.replicate.com/v1evil/predictions/p1",
        "https://api.replicate.com/v2/predictions/p1",
        "https://api.replicate.com.evil.test/v1/predictions/p1",
        "https://api.replicate.com@evil.test/v1/predictions/p1",
        "https://api.replicate.com:8443/v1/predictions/p1",
        "http://api.replicate.com/v1/predictions/p1",
        "//api.replicate.com/v1/predictions/p1",
        "HTTPS://API.REPLICATE.COM/v1/predictions/p1",
        " https://api.replicate.com/v1/predictions/p1",
        "https://evil.test/?u=https://api.replicate.com/v1/predictions/p1",
    ],
)
async def test_only_links_of_replicate_itself_change(upstream: RawUpstream, link: str) -> None:
    content = {"id": "p1", "urls": {"get": link, "cancel": CANCEL}}
    caller = await _read(upstream, content, public_url="https://app.example/v1")
    assert _links(caller) == [link, "https://app.example/v1/predictions/p1/cancel"]


@row("2.16")
async def test_nothing_changes_but_known_fields(upstream: RawUpstream) -> None:
    other: dict[str, Any] = {
        "id": GET,
        "input": {"urls": {"get": GET, "cancel": GET}, "next": GET, "prompt": f'"urls": {{"get": "{GET}"}}'},
        "output": [GET, {"urls": {"get": GET}}],
        "error": GET,
        "logs": f'\\"urls\\":{{\\"get\\":\\"{GET}\\"}}',
        "next": GET,
        "get": GET,
    }
    more: dict[str, Any] = {"web": GET, "stream": GET, "files": [GET], "nested": {"get": GET}}
    content = {**other, "urls": {"get": GET, "cancel": CANCEL, **more}}
    caller = await _read(upstream, content, public_url="https://app.example/v1")
    own = {"get": "https://app.example/v1/predictions/p1", "cancel": "https://app.example/v1/predictions/p1/cancel"}
    assert json.loads(caller.content) == {**other, "urls": {**own, **more}}
