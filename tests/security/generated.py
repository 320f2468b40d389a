"""Hostile targets and headers, made of what has fooled proxies, and the way of one through the real proxy.

Upstream is in memory: whatever the transport would write to a socket is recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote

from replicate_proxy_mw import ProxyConfig, ReplicateProxyMiddleware, StaticKeyResolver
from replicate_proxy_mw.upstream import transport
from tests.raw_asgi import host
from tests.security import reference
from tests.security.reference import MARK, Pair

TOKEN = "r8_Gq4TzX8mWc2LhV6sRb9KdY3nPf7JxE5uAi1oM"
API_KEY = b"pk-" + MARK
UPSTREAMS = (
    reference.Upstream(host=b"api.upstream.test", base=b"/v1", token=TOKEN),
    reference.Upstream(host=b"api.upstream.test:8443", base=b"/a/proxy/v2", token=TOKEN),
    reference.Upstream(host=b"api.upstream.test", base=b"", token=TOKEN),
)

# An answer for any request, on a connection that stays.
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n"


@dataclass(frozen=True)
class Case:
    """One request, as a server gives it to an app. `raw_path` is None where a server has none."""

    method: str = "GET"
    path: str = "/v1/predictions"
    raw_path: bytes | None = b"/v1/predictions"
    query: bytes = b""
    root_path: str = ""
    headers: tuple[Pair, ...] = ((b"x-portkey-api-key", API_KEY),)
    body: tuple[bytes, ...] = (b"",)

    @property
    def scope(self) -> dict[str, Any]:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": self.method,
            "scheme": "http",
            "path": self.path,
            "raw_path": self.raw_path,
            "query_string": self.query,
            "root_path": self.root_path,
            "headers": list(self.headers),
            "client": ("192.0.2.1", 4321),
            "server": ("proxy.test", 80),
            "state": {},
        }
        if self.raw_path is None:
            del scope["raw_path"]
        return scope


class _Stream:
    """A connection on which each request is answered once it is there."""

    def __init__(self, requests: list[bytes]) -> None:
        self._requests = requests
        self._written: list[bytes] = []

    async def read(self, *_: object) -> bytes:
        request = b"".join(self._written)
        self._written.clear()
        self._requests.append(request)
        return _ANSWER if request.startswith(b"HEAD ") else _ANSWER + b"{}"

    async def write(self, buffer: bytes, *_: object) -> None:
        self._written.append(buffer)

    async def aclose(self) -> None:
        pass

    def get_extra_info(self, info: str) -> Any:
        return info == "is_idle"


class Judge:
    """The proxy in front of an upstream in memory, and what `reference` says of each exchange."""

    at_work: Judge

    def __init__(self, upstream: reference.Upstream, *, fast: bool) -> None:
        self.upstream, self.fast = upstream, fast
        self._requests: list[bytes] = []
        self._connected: set[tuple[bytes, bool]] = set()
        self.forwarded = 0
        self.app = ReplicateProxyMiddleware(
            host,
            key_resolver=StaticKeyResolver(TOKEN, api_keys=[API_KEY.decode()]),
            config=ProxyConfig(upstream=f"https://{upstream.host.decode()}{upstream.base.decode()}", fast=fast),
        )

    async def connect(self, host: str, port: int, *, ssl_context: object, **_: object) -> _Stream:
        name = host.encode() + (b"" if port == 443 else b":%d" % port)
        self._connected.add((name, ssl_context is not None))
        return _Stream(self._requests)

    async def wrong(self, case: Case) -> list[str]:
        """What is wrong with how `case` was treated."""
        Judge.at_work = self
        self._requests.clear()
        pieces = list(case.body)
        start: dict[str, Any] = {}
        wrong = []

        async def receive() -> dict[str, Any]:
            if not pieces:
                await asyncio.get_running_loop().create_future()
            return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                start.update(message)

        try:
            await self.app(case.scope, receive, send)
        except Exception as error:
            wrong.append(f"raised: {error!r}")
        if self._connected - {(self.upstream.host, True)}:
            wrong.append(f"connected to {self._connected}")
        for request in self._requests:
            self.forwarded += 1
            wrong += reference.leaving(request, case.headers, b"".join(case.body), self.upstream)
        if len(self._requests) > 1:
            wrong.append("more than one request")
        return wrong + reference.answered(start.get("status"), start.get("headers", ()), case.headers, TOKEN)


@contextmanager
def judges() -> Iterator[list[Judge]]:
    """One for each upstream and transport; whatever connects meanwhile connects to the one that is at work."""
    with patch.object(transport, "connect", lambda *args, **options: Judge.at_work.connect(*args, **options)):
        yield [Judge(upstream, fast=fast) for upstream in UPSTREAMS for fast in (False, True)]


# --- what cases are made of. `choose(n)` is a number below n, from whatever chooses.

Choose = Callable[[int], int]

PREFIXES: Sequence[bytes] = (
    b"/v1",
    *(b"/v1/",) * 100,
    *b"/v1// /V1/ //v1/ /v1beta/ /v1. /v1%2f /v1%2F.. /%761/ /v1;/ /./v1/ /../v1/ /v1/../v1/ / * v1/".split(),
    *b"http://evil.test/v1/ //evil.test/v1/ https://api.upstream.test/v1/ /v1@evil.test/ /v1:80/".split(),
    *b"/v1http://evil/ /v1\\ /v1%5c /v1%00/ /v1%20/ /v1?/ /v1# /v1%23/ /v1%3f/ /v1[object /v1predictions".split(),
)
PIECES: Sequence[bytes] = (
    # One that is refused is enough in a target, so most are made of what is not.
    *b"predictions models deployments files a b 0 - _ ~ ; : @ = / / / %2f %C3%A9 %zz".split() * 25,
    *b"predictions/p1 predictions/p1/cancel models/a/b models/a/b/predictions files/f1/download trainings".split(),
    *b"account collections hardware webhooks default secret v1 V1 admin".split(),
    *b". .. ... ./ ../ /.. /../ /./ // /// ..; ..;/ ;a=b .%2e %2e. %2e %2E %2e%2e %252e %252e%252e %2F".split(),
    *b"%2f.. ..%2f %252f %5c %5C \\ ..\\ %5c.. %255c %00 %0a %0d %0d%0a %09 %20 %7f %80 %ff %23 %3f %3F".split(),
    *b"# ? & [ ] ! \" < > ` { } | ^ ' ( ) * + , $ :80 @evil.test //evil.test/ http://evil.test/ evil.test%2f".split(),
    *b"%c0%ae %c0%ae%c0%ae %e0%80%ae %c0%af %c1%9c %ef%bc%8f %e2%80%a4 %u002e %u2215 % %% %2 %1 %2%65 %%32%65".split(),
    *b"\xc3\xa9 \xff \xc0\xae \xe2\x80\xae \x00 \x0b \x1f \x7f \x85 \xa0 \r\n \t \r\nHost:evil".split(b" "),
    b" HTTP/1.1\r\n",
    b"a" * 300,
    b"/" * 40,
    b"../" * 20,
    b"%2e%2e%2f" * 8,
    b" ",
)
QUERIES: Sequence[bytes] = (
    *b"a=b a=../.. %00 # a#b \\ //evil.test http://evil.test/?x ?? & &&a ;a %2e%2e cursor=cD0yMDI= x=\xff".split(),
    *b"\r\n \x00 % \t".split(b" "),
    b"a b",
    b"x-portkey-api-key=pk-x",
    b"a" * 2000,
)
METHODS: Sequence[str] = (
    *("GET",) * 20,
    *("POST",) * 14,
    *"PUT PATCH DELETE HEAD OPTIONS QUERY TRACE CONNECT get PURGE M-SEARCH".split(),  # noqa: SIM905
)
BODIES: Sequence[tuple[bytes, ...]] = (
    (b"",),
    (b"{}",),
    (b'{"input":{"a":1}}',),
    (b"", b'{"input"', b":{}}"),
    (b"0\r\n\r\nGET /admin HTTP/1.1\r\n\r\n",),
)


def target(choose: Choose) -> Case:
    """A request for an odd target, with ordinary headers."""
    raw = PREFIXES[choose(len(PREFIXES))] + b"".join(PIECES[choose(len(PIECES))] for _ in range(choose(6)))
    for _ in range(max(0, choose(8) - 6)):
        raw = _mutated(raw, choose)
    query = QUERIES[choose(len(QUERIES))] if not choose(4) else b""
    decoded = unquote(raw.decode("latin-1"))
    how = choose(24)
    # As a server has it; with no raw path; with one that a middleware has left as it was; and below a mount.
    if how == 0:
        return _asked(choose, Case(path=decoded, raw_path=None, query=query))
    if how == 1:
        return _asked(choose, Case(path=decoded, raw_path=b"/v1/predictions", query=query))
    if how == 2:
        return _asked(choose, Case(path="/v1/predictions", raw_path=raw, query=query))
    if how == 3:
        mount = ("/api", "/v1", "/a b", "/api/", "/..")[choose(5)]
        return _asked(choose, Case(path=mount + decoded, raw_path=mount.encode() + raw, root_path=mount, query=query))
    return _asked(choose, Case(path=decoded, raw_path=raw, query=query))


def _asked(choose: Choose, case: Case) -> Case:
    method, body = METHODS[choose(len(METHODS))], BODIES[choose(len(BODIES))]
    return Case(method, case.path, case.raw_path, case.query, case.root_path, case.headers, body)


def _mutated(raw: bytes, choose: Choose) -> bytes:
    at = choose(len(raw)) if raw else 0
    how = choose(6)
    if how == 0:
        return raw[:at] + b"%%%02x" % raw[at] + raw[at + 1 :] if raw else raw
    if how == 1:
        return raw[:at] + bytes([choose(256)]) + raw[at + 1 :]
    if how == 2:
        return raw[:at] + bytes([choose(256)]) + raw[at:]
    if how == 3:
        return raw[:at] + raw[at + 1 :]
    if how == 4:
        return raw[:at] + raw[at:].replace(b"%", b"%25", 1)
    return raw[:at] + raw[at:].swapcase()


TARGETS = (
    *("/v1/predictions",) * 3,
    "/v1/predictions/p1",
    "/v1/predictions/p1/cancel",
    "/v1/models/a/b/predictions",
    "/v1/files",
    "/v1/files/f1/download",
    "/v1/account",
    "/v1/x",
    "/v1predictions",
)
# Names that may go up, that may not, and that only look as if they might.
MAY = tuple(sorted(reference.CALLERS))
MAY_NOT: Sequence[bytes] = (
    *b"authorization cookie set-cookie api-key x-api-key x-auth-token proxy-authorization proxy-authenticate".split(),
    *b"connection keep-alive proxy-connection te trailer upgrade http2-settings expect max-forwards".split(),
    *b"host x-host x-forwarded-for x-forwarded-host x-forwarded-proto x-original-url x-rewrite-url forwarded".split(),
    *b"x-real-ip x-http-method-override x-http-method x-method-override via baggage traceparent tracestate b3".split(),
    *b"x-portkey-custom-host x-portkey-config x-portkey-virtual-key x-portkey-provider x-portkey-trace-id".split(),
    *b"x-portkey-forward-headers x-portkey-base-url x-portkey-metadata x-portkey-cache-force-refresh".split(),
    *b"x_portkey_api_key content_length transfer_encoding user_agent content_type authorization_ x-evil".split(),
    *b"referer origin idempotency-key sec-fetch-site content-md5 date dnt from pragma warning x-request-id".split(),
    *b"Authorization Cookie Host X-Evil Transfer-Encoding Content-Length User_Agent accept\xff a:b (x) accept,x".split(
        b" "
    ),
    b"",
    b"x evil",
    b"x-evil\r\nauthorization",
    b":path",
    b":authority",
)
VALUES: Sequence[bytes] = (
    *b"a */* application/json text/event-stream wait wait=5 respond-async 5m bytes=0-1 gzip identity br,gzip".split()
    * 8,
    *b"a, ,a a,,b \t \r\nx:y a\r\nauthorization:x a\nb a\x00b \x7f \xff\xfe %0d%0a ${jndi:x} ../.. {{7*7}}".split(b" "),
    b"",
    b" padded ",
    b"in the middle",
    b"a" * 9000,
)
CONNECTIONS: Sequence[bytes] = (
    *b"close keep-alive upgrade authorization host content-length x-portkey-api-key transfer-encoding via".split(),
    *b"content-type,accept ,accept prefer,,range Authorization user-agent;x".split(),
    b"",
    b"close, user-agent , accept-encoding",
    b"accept\r\nx: y",
)
LENGTHS: Sequence[bytes] = (
    *b"0 1 2 17 5 -1 +2 0x2 2,2 1e1 99999999999999999999 \xb2 00002 2;x abc".split(),
    b"",
    b" 2",
)
CODINGS: Sequence[bytes] = (
    *b"chunked Chunked gzip,chunked identity xchunked chunked,chunked".split(),
    b" chunked",
    b"",
)
METADATA: Sequence[bytes] = (
    *b'{} {"a":"b"} {"a":1} [] null {"a": {"a":NaN} {"\\ud800":"\\udfff"} {"a":1e999} \xff'.split(),
    b"[" * 3000,
    b'{"a":' * 1000,
    b'{"n":' + b"9" * 5000 + b"}",
    b"{" + b",".join(b'"k%d":"v"' % number for number in range(500)) + b"}",
)
_SPECIAL = {
    b"connection": CONNECTIONS,
    b"x-portkey-metadata": METADATA,
    b"x-portkey-config": (*METADATA, b'{"override_params":{"model":"x"},"custom_host":"http://evil.test"}', b"pc-x"),
    b"x-portkey-provider": (b"replicate", b"@team", b"openai", b"@" * 300, b"\xff"),
    b"authorization": (b"Bearer x", b"Bearer " + API_KEY, b"Token r8_x", b"Basic eDp5", b"Bearer", b"Bearer \xff"),
    b"host": (b"evil.test", b"api.upstream.test", b"a:b:c", b"", b"evil.test\r\nx: y", b"[::1]:x"),
    b"via": (b"1.1 evil", b"1.1 replicate-proxy-mw-00000000", b"1.1 replicate-proxy-mw-x, 1.1 y", b"\xff," * 50, b","),
}


def header_set(choose: Choose) -> Case:
    """A request with odd headers for an ordinary target."""
    path = TARGETS[choose(len(TARGETS))]
    headers = [] if not choose(20) else [(b"x-portkey-api-key", API_KEY)]
    for _ in range(choose(9)):
        headers.append(_header(choose))
    if not choose(8):
        headers.append((b"content-length", LENGTHS[choose(len(LENGTHS))]))
    if not choose(6):
        headers.append((b"transfer-encoding", CODINGS[choose(len(CODINGS))]))
    if not choose(12):
        headers += headers[-2:]
    if headers and not choose(6):
        headers.insert(choose(len(headers)), (b"connection", headers[choose(len(headers))][0]))
    if not choose(8):
        at = choose(len(headers) + 1)
        headers.insert(at, (b"x-portkey-api-key", (API_KEY, b"pk-unknown", b"")[choose(3)]))
    method, body = METHODS[choose(len(METHODS))], BODIES[choose(len(BODIES))]
    return Case(method, path, path.encode(), b"", "", tuple(headers), body)


def _header(choose: Choose) -> Pair:
    if not choose(2):
        return MAY[choose(len(MAY))], VALUES[choose(len(VALUES))]
    name = MAY_NOT[choose(len(MAY_NOT))]
    values = _SPECIAL.get(name)
    # What is read has to be well-formed to be read; all else is marked, and differs by name: one header is echoed.
    if values is not None and choose(4):
        return name, values[choose(len(values))]
    return name, MARK + name[-3:] + VALUES[choose(len(VALUES))]
