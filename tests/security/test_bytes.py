"""Bytes that are no UTF-8 pass as they came or are refused; none fails a request."""

from __future__ import annotations

import pytest

from tests.raw_asgi import KEY, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.refusals import told
from tests.security.rows import row

pytestmark = pytest.mark.anyio

ODD = bytes(range(0x80, 0x100))


@row("2.28")
@pytest.mark.parametrize("name", [b"user-agent", b"accept", b"if-none-match"])
async def test_a_header_s_bytes_go_up_as_they_came(upstream: RawUpstream, name: bytes) -> None:
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, (name, b'"a' + ODD + b'z"')]))
    assert caller.status == 200
    assert upstream.requests[0].header(name) == [b'"a' + ODD + b'z"']


@row("2.28")
@pytest.mark.parametrize("name", [b"trace-id", b"span-name", b"metadata", b"provider", b"mode", b"debug", b"unknown"])
async def test_no_bytes_in_portkey_s_headers_fail_a_request(upstream: RawUpstream, name: bytes) -> None:
    caller = await call(proxy(upstream.url), http_scope(headers=[KEY, (b"x-portkey-" + name, b"a" + ODD)]))
    assert caller.status == 200


@row("2.28")
@pytest.mark.parametrize("path", ["/%ff%fe", "/%C3%28", "/%ED%A0%80"])
async def test_encoded_bytes_go_up_as_they_came(upstream: RawUpstream, path: str) -> None:
    assert (await call(proxy(upstream.url), http_scope(target=f"/v1{path}?q=%ff"))).status == 200
    assert upstream.requests[0].line == f"GET /v1{path}?q=%ff HTTP/1.1".encode()


@row("2.28")
@pytest.mark.parametrize("target", ["/v1/caf\xe9", "/v1/\xff\xfe", "/v1/x?q=\xe9"])
async def test_bare_bytes_in_a_target_are_refused(upstream: RawUpstream, target: str) -> None:
    assert told(await call(proxy(upstream.url), http_scope(target=target))) == (400, "bad_request")
    assert upstream.requests == []
