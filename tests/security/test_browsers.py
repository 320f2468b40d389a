"""Rows 14 and 15: nothing that comes from a model or from upstream acts in the host's origin."""

from __future__ import annotations

from typing import Any

import pytest

from replicate_proxy_mw import ProxyConfig
from tests.raw_asgi import KEY, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.security.rows import row

pytestmark = pytest.mark.anyio

SANDBOX = [b"sandbox; default-src 'none'"]

HOSTILE = b"""set-cookie: session=of-an-attacker; Path=/
Set-Cookie: __Host-session=1
clear-site-data: "*"
strict-transport-security: max-age=0
service-worker-allowed: /
access-control-allow-origin: *
access-control-allow-credentials: true
access-control-allow-headers: *
content-security-policy: default-src *
content-security-policy-report-only: default-src 'none'; report-uri https://evil.test
refresh: 0; url=https://evil.test
nel: {"report_to": "x"}
report-to: {"endpoints": [{"url": "https://evil.test"}]}
reporting-endpoints: x="https://evil.test"
alt-svc: h3="evil.test:443"
public-key-pins: pin-sha256="x"
x-content-type-options: sniff
x-frame-options: ALLOWALL
x-xss-protection: 0
referrer-policy: unsafe-url
permissions-policy: camera=*
cross-origin-opener-policy: unsafe-none
cross-origin-embedder-policy: unsafe-none
cross-origin-resource-policy: cross-origin
timing-allow-origin: *
origin-agent-cluster: ?0
sourcemap: https://evil.test
x-accel-redirect: /internal/secrets
x-sendfile: /etc/passwd
x-lighttpd-send-file: /etc/passwd
www-authenticate: Basic realm="give me your password"
proxy-authenticate: Basic
authentication-info: x
upgrade: h2c
server: evil
x-powered-by: evil
x-unknown: evil
"""


@row("2.14")
@pytest.mark.usefixtures("either_transport")
async def test_of_what_upstream_says_only_what_is_listed_comes_back(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(headers=HOSTILE.replace(b"\n", b"\r\n") + b"etag: 1\r\nx-request-id: 2\r\n")

    upstream.script = script
    caller = await call(proxy(upstream.url), http_scope())
    names = [name for name, _ in caller.headers if not name.startswith(b"x-portkey-")]
    ours = [b"cache-control", b"x-content-type-options"]
    assert sorted(names) == sorted([b"content-type", b"content-length", b"etag", b"x-request-id", *ours])


@row("2.14")
@pytest.mark.parametrize("name", ["set-cookie", "Set-Cookie", "upgrade", "proxy-authenticate"])
def test_a_host_cannot_have_a_cookie_come_back(name: str) -> None:
    with pytest.raises(ValueError, match="never passed on"):
        ProxyConfig(return_headers=["x-fine", name])


async def _answer(upstream: RawUpstream, headers: bytes, body: bytes = b"<script>1</script>", **options: Any) -> Caller:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.send(b"HTTP/1.1 200 OK\r\n%scontent-length: %d\r\n\r\n%s" % (headers, len(body), body))

    upstream.script = script
    caller = await call(proxy(upstream.url, options=options), http_scope())
    assert caller.content == body
    return caller


@row("2.15")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize(
    "kind",
    [
        b"text/html",
        b"TEXT/HTML; charset=utf-7",
        b" text/html ;x=y",
        b"application/xhtml+xml",
        b"image/svg+xml",
        b"Image/SVG+XML;charset=utf-8",
        b"text/xml",
        b"application/xml",
        b"application/atom+xml",
        b"multipart/x-mixed-replace; boundary=x",
        b"text/plain, text/html",
    ],
)
async def test_what_a_browser_would_run_is_sandboxed(upstream: RawUpstream, kind: bytes) -> None:
    caller = await _answer(upstream, b"content-type: " + kind + b"\r\n")
    assert caller.header(b"content-security-policy") == SANDBOX
    assert caller.header(b"x-content-type-options") == [b"nosniff"]


@row("2.15")
@pytest.mark.usefixtures("either_transport")
@pytest.mark.parametrize("headers", [b"", b"content-type: \r\n"])
async def test_what_has_no_type_is_none_that_runs_and_is_sandboxed(upstream: RawUpstream, headers: bytes) -> None:
    caller = await _answer(upstream, headers)
    assert caller.header(b"content-type") == [b"application/octet-stream"]
    assert caller.header(b"content-security-policy") == SANDBOX
    assert caller.header(b"x-content-type-options") == [b"nosniff"]


@row("2.15")
async def test_of_two_types_one_is_told(upstream: RawUpstream) -> None:
    caller = await _answer(upstream, b"content-type: text/plain\r\ncontent-type: text/html\r\n")
    assert len(caller.header(b"content-type")) == 1
    assert caller.header(b"content-type") == [b"text/plain"] or caller.header(b"content-security-policy") == SANDBOX
    assert caller.header(b"x-content-type-options") == [b"nosniff"]


@row("2.15")
@pytest.mark.parametrize("kind", [b"application/json", b"text/plain", b"image/png", b"text/event-stream", b"video/mp4"])
async def test_nothing_is_sniffed(upstream: RawUpstream, kind: bytes) -> None:
    caller = await _answer(upstream, b"content-type: " + kind + b"\r\n")
    assert caller.header(b"x-content-type-options") == [b"nosniff"]
    assert caller.header(b"content-security-policy") == []


@row("2.15")
async def test_upstream_cannot_weaken_it_even_where_a_host_lists_its_headers(upstream: RawUpstream) -> None:
    weak = b"content-type: text/html\r\ncontent-security-policy: default-src *\r\nx-content-type-options: sniff\r\n"
    listed = ["content-security-policy", "x-content-type-options"]
    caller = await _answer(upstream, weak, return_headers=listed)
    assert caller.header(b"content-security-policy") == SANDBOX
    assert caller.header(b"x-content-type-options") == [b"nosniff"]


@row("2.15")
@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (b"", b"private, no-store"),
        (b"cache-control: public, max-age=600, immutable\r\n", b"private, no-store"),
        (b"cache-control: s-maxage=1\r\nexpires: Thu, 01 Jan 2099 00:00:00 GMT\r\n", b"private, no-store"),
        (b"cache-control: no-store\r\n", b"no-store"),
    ],
)
async def test_no_cache_keeps_an_answer(upstream: RawUpstream, said: bytes, kept: bytes) -> None:
    caller = await _answer(upstream, b"content-type: application/json\r\n" + said)
    assert caller.header(b"cache-control") == [kept]


@row("2.15")
@pytest.mark.parametrize(
    ("method", "target", "headers", "status"),
    [
        ("GET", "/v1/x", [], 401),
        ("GET", "/v1/x/..", [KEY], 400),
        ("TRACE", "/v1/x", [KEY], 405),
        ("GET", "/v1/-/streams/unknown", [], 404),
        ("POST", "/v1/-/webhooks", [], 400),
        ("GET", "/v1/<script>alert(1)</script>", [KEY], 502),
    ],
)
async def test_our_own_answers_are_json_that_is_not_sniffed_and_not_kept(
    upstream: RawUpstream, method: str, target: str, headers: list[tuple[bytes, bytes]], status: int
) -> None:
    upstream.script = lambda connection: None
    options = {"proxy_streams": True, "stream_key": "k" * 32, "webhook_secrets": ["whsec_" + "QUJD" * 8]}
    caller = await call(proxy(upstream.url, options=options), http_scope(method, target, headers))
    assert caller.status == status
    assert caller.header(b"content-type") == [b"application/json"]
    assert caller.header(b"x-content-type-options") == [b"nosniff"]
    assert caller.header(b"cache-control") == [b"private, no-store"]
    assert b"<script>" not in caller.content
