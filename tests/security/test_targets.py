"""Row 3: a target that someone behind us could read differently is refused, and any other goes up byte for byte."""

from __future__ import annotations

import pytest

from tests.raw_asgi import call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.rows import row

pytestmark = pytest.mark.anyio

DOTS = ["/..", "/.", "/../admin", "/a/../../admin", "/a/./b", "//..", "/..;/../x/.."]
ENCODED_DOTS = ["/%2e%2e/admin", "/%2E%2e", "/.%2e/x", "/a%2f..%2fadmin", "/a%2f%2e%2e%2fx", "/%2e", "/..%2fadmin"]
BACKSLASHES = ["/a\\b", "/..\\admin", "/a%5cb", "/..%5Cadmin"]
CONTROLS = ["/a%00", "/a%0d%0ahost:%20evil", "/a%0A", "/%7f", "/a\r\nhost: evil", "/a\nb", "/a\x00b", "/a\tb", "/%1f"]
UNENCODED = [
    "/a#b",
    "/a#/../admin",
    "/a b",
    "/a\xe9",
    "/a\x80",
    "/x?a=b#c",
    "/x?a= b",
    "/x?a=\r\nhost: evil",
    "/x?\xff",
]


async def _refused(upstream: RawUpstream, below: str) -> None:
    path, _, query = below.partition("?")
    # Not decoded by our own hand: servers tell both, and only one of them is read.
    scope = http_scope("POST", target="/v1" + path)
    scope["query_string"] = query.encode("latin-1")
    caller = await call(proxy(upstream.url), scope, b"{}")
    assert (caller.status, upstream.connections) == (400, [])


@row("2.3")
@pytest.mark.parametrize("below", DOTS)
async def test_dot_segments_are_refused(upstream: RawUpstream, below: str) -> None:
    await _refused(upstream, below)


@row("2.3")
@pytest.mark.parametrize("below", ENCODED_DOTS)
async def test_dot_segments_that_are_encoded_are_refused(upstream: RawUpstream, below: str) -> None:
    await _refused(upstream, below)


@row("2.3")
@pytest.mark.parametrize("below", BACKSLASHES + CONTROLS)
async def test_backslashes_and_control_characters_are_refused(upstream: RawUpstream, below: str) -> None:
    await _refused(upstream, below)


@row("2.3")
@pytest.mark.parametrize("below", UNENCODED)
async def test_what_no_uri_may_hold_is_refused(upstream: RawUpstream, below: str) -> None:
    await _refused(upstream, below)


@row("2.3")
@pytest.mark.parametrize("raw", [b"/v1/%2e?", b"/v1/%2e%2e?a", b"/v1/x?a"])
async def test_a_raw_path_has_no_query(upstream: RawUpstream, raw: bytes) -> None:
    scope = http_scope("POST")
    scope["path"], scope["raw_path"] = raw.decode().replace("%2e", "."), raw
    caller = await call(proxy(upstream.url), scope, b"{}")
    assert (caller.status, upstream.connections) == (400, [])


@row("2.3")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize(
    "below",
    [
        "/a%2Fb",
        "/a%2fb%2F",
        "/%252e%252e/x",
        "/%252E%252e%252fx",
        "/a%255cb",
        "/%2500",
        "/a..b/.c/...",
        "/%41%7E?x=%2e%2e%2f&y=%00%5c",
        "/%zz/%",
        "/%ff%fe",
        "//a//b",
    ],
)
async def test_all_others_go_up_byte_for_byte(upstream: RawUpstream, below: str) -> None:
    assert (await call(proxy(upstream.url), http_scope(target="/v1" + below))).status == 200
    [sent] = upstream.requests
    assert sent.line == f"GET /v1{below} HTTP/1.1".encode()
