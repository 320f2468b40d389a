from __future__ import annotations

import re
from typing import Any

import httpx
import pytest

from replicate_proxy_mw import Forward, ProxyConfig, ProxyRequest, ProxyResponse, StaticKeyResolver
from replicate_proxy_mw.errors import LoopDetected
from replicate_proxy_mw.json_bodies import asking_for
from replicate_proxy_mw.testing import FakeReplicate, serve
from replicate_proxy_mw.via import MAX_PROXIES, Via
from tests.raw_asgi import KEY, TOKEN, call, host, http_scope, proxy
from tests.raw_upstream import RawUpstream

API = "https://api.replicate.com/v1"
OTHER = b"replicate-proxy-mw-00000000"


def own(upstream: str = API, prefix: str = "/v1") -> bytes:
    name, value = Via(upstream=upstream, prefix=prefix).up(http_scope())
    assert name == b"via"
    return value


def up(*lines: bytes, **more: Any) -> bytes:
    scope = http_scope(headers=[(b"via", line) for line in lines], **more)
    return Via(upstream=API, prefix="/v1").up(scope)[1]


def test_a_name_is_that_of_a_deployment() -> None:
    assert re.fullmatch(rb"1\.1 replicate-proxy-mw-[0-9a-f]{8}", own())
    assert own() == own()
    assert len({own(), own(upstream="https://gateway.example/v1"), own(prefix="/v2"), own(prefix="")}) == 4


def test_a_scope_need_not_say_its_protocol() -> None:
    via = Via(upstream=API, prefix="/v1")
    assert via.up({"headers": []})[1] == own()
    assert via.up({"headers": [(b"via", b"1.1 google")]})[1] == own()


@pytest.mark.parametrize("version", ["1.0", "1.1", "2", "3"])
def test_the_protocol_is_the_caller_s(version: str) -> None:
    assert up(http_version=version) == version.encode() + own()[3:]
    assert up(b"1.1 " + OTHER, http_version=version) == b"1.1 " + OTHER + b", " + version.encode() + own()[3:]


@pytest.mark.parametrize(
    ("lines", "passed"),
    [
        ([b"1.1 google"], []),
        ([b"HTTP/1.1 proxy.internal:8080 (squid), 1.0 fred"], []),
        ([b""], []),
        ([b",,"], []),
        ([b"1.1 " + OTHER], [b"1.1 " + OTHER]),
        ([b"1.1 google , 2 " + OTHER + b"\t,1.1 nginx"], [b"2 " + OTHER]),
        (
            [b"1.1 replicate-proxy-mw-11111111", b"1.1 x", b"1.1 " + OTHER],
            [b"1.1 replicate-proxy-mw-11111111", b"1.1 " + OTHER],
        ),
        ([b"1.1 Replicate-Proxy-MW-0000000A"], [b"1.1 replicate-proxy-mw-0000000a"]),
        ([b"1.1 " + OTHER + b" (inner.host)"], []),
        ([b"1.1 " + OTHER + b".inner.host"], []),
        ([OTHER], []),
        ([b"1.1 replicate-proxy-mw-secret"], []),
    ],
)
def test_only_proxies_of_this_package_are_told_of(lines: list[bytes], passed: list[bytes]) -> None:
    assert up(*lines) == b", ".join([*passed, own()])


@pytest.mark.parametrize("name", ["own", "upper", "within", "commented", "second", "after others"])
def test_who_has_come_by_here_does_not_pass_again(name: str) -> None:
    lines = {
        "own": [own()],
        "upper": [own().upper()],
        "within": [b"1.1 a, " + own() + b",1.1 b"],
        "commented": [own() + b" (of mine)"],
        "second": [b"1.1 a", own()],
        "after others": [b"1.1 " + OTHER + b", " + own()],
    }[name]
    with pytest.raises(LoopDetected):
        up(*lines)


def test_a_chain_ends_somewhere() -> None:
    names = [b"1.1 replicate-proxy-mw-%08x" % i for i in range(MAX_PROXIES + 1)]
    assert len(up(b", ".join(names[:-1]))) < 1000
    with pytest.raises(LoopDetected):
        up(b", ".join(names))
    with pytest.raises(LoopDetected):
        up(*names)


# --- on the wire

on_both_transports = pytest.mark.usefixtures("either_transport")


@pytest.mark.anyio
@on_both_transports
async def test_it_goes_up_whatever_the_caller_says(upstream: RawUpstream) -> None:
    app = proxy(upstream.url)
    headers = [KEY, (b"via", b"1.1 google"), (b"via", b"1.1 " + OTHER), (b"connection", b"via")]
    await call(app, http_scope("POST", "/v1/predictions", headers), b"{}")
    await call(app, http_scope("GET", "/v1/predictions"))
    first, second = [received.header(b"via") for received in upstream.requests]
    assert second == [own(upstream.url)]
    assert first == [b"1.1 " + OTHER + b", " + own(upstream.url)]


@pytest.mark.anyio
async def test_what_a_layer_asks_for_goes_the_same_way(upstream: RawUpstream) -> None:
    def layer(forward: Forward) -> Forward:
        async def asking(request: ProxyRequest) -> ProxyResponse:
            await forward(asking_for(request, "/models/acme/painter"))
            return await forward(request)

        return asking

    await call(proxy(upstream.url, layers=[layer]), http_scope(headers=[KEY, (b"via", b"1.1 " + OTHER)]))
    sent = b"1.1 " + OTHER + b", " + own(upstream.url)
    assert [received.header(b"via") for received in upstream.requests] == [[sent], [sent]]


@pytest.mark.anyio
async def test_a_loop_is_refused_before_anything_is_asked_of_anyone(upstream: RawUpstream) -> None:
    asked = []

    async def resolver(request: Any) -> str:
        asked.append(request)
        return TOKEN

    app = proxy(upstream.url, key_resolver=resolver)
    caller = await call(app, http_scope("POST", headers=[KEY, (b"via", own(upstream.url))]), b"{}")
    assert caller.status == 508
    assert (asked, upstream.requests) == ([], [])


def test_a_host_cannot_have_another_go_up() -> None:
    with pytest.raises(ValueError, match="forward_headers: 'Via' is never passed on"):
        ProxyConfig(forward_headers=["Via"])


class Site:
    """Apps that are made when their address is known. Those of one address take turns, as replicas do."""

    def __init__(self) -> None:
        self.apps: dict[int, list[Any]] = {}
        self.came: list[dict[bytes, bytes]] = []

    def add(self, url: str, upstream: str, *keys: str, token: str = TOKEN) -> None:
        resolver = StaticKeyResolver(token, api_keys=keys or ("pk-team-a", TOKEN))
        self.apps.setdefault(httpx.URL(url).port or 0, []).append(proxy(upstream, key_resolver=resolver))

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await host(scope, receive, self._closing(send))
            return
        assert len(self.came) < 10, "a loop without end"
        self.came.append(dict(scope["headers"]))
        apps = self.apps[scope["server"][1]]
        await apps[len(self.came) % len(apps)](scope, receive, send)

    def _closing(self, send: Any) -> Any:
        async def closing(message: Any) -> None:
            for app in [app for apps in self.apps.values() for app in apps]:
                await app.aclose()
            await send(message)

        return closing


@on_both_transports
@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_an_upstream_that_leads_back_ends_at_once(method: str, replicas: int, length: int) -> None:
    site = Site()
    with serve(site, *[site] * (length - 1)) as served:
        for i, url in enumerate(served.urls):
            for _ in range(replicas):
                site.add(url, served.urls[(i + 1) % length] + "/v1")
        answer = httpx.request(method, served.url + "/v1/predictions", headers={"x-portkey-api-key": "pk-team-a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (508, "loop_detected")
    assert len(site.came) == length + 1
    assert site.came[-1][b"via"].count(b"replicate-proxy-mw-") == length


@on_both_transports
def test_a_proxy_may_stand_before_another(fake_replicate: FakeReplicate) -> None:
    site = Site()
    with serve(site, site) as served:
        outer, inner = served.urls
        site.add(outer, inner + "/v1", "pk-team-a", token="pk-of-the-outer-one")
        site.add(inner, fake_replicate.url, "pk-of-the-outer-one", token=fake_replicate.token)
        answer = httpx.get(outer + "/v1/account", headers={"x-portkey-api-key": "pk-team-a"})
    assert (answer.status_code, answer.json()["type"]) == (200, "organization")
    [received] = fake_replicate.requests
    names = own(inner + "/v1") + b", " + own(fake_replicate.url)
    assert [value for name, value in received.headers if name == b"via"] == [names]
