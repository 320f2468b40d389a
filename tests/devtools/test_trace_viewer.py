from __future__ import annotations

import base64
import hashlib
import json
import math
import threading
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from anyio import CapacityLimiter, create_task_group, to_thread
from fastapi import FastAPI
from hypercorn.middleware import DispatcherMiddleware
from litestar import Litestar, Router, asgi
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Mount

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateProxyMiddleware
from replicate_proxy_mw.devtools import TraceBuffer, TraceViewer
from replicate_proxy_mw.devtools.trace_viewer import below, page, policy, remote, slashed
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.raw_asgi import TOKEN, Caller, http_scope
from tests.tenants import HELLO_WORLD

pytestmark = pytest.mark.anyio

Headers = list[tuple[bytes, bytes]]
LOCAL = (b"host", b"localhost:8000")


class Provider:
    """A viewer, and a tracer like the proxy's."""

    def __init__(self, **options: Any) -> None:
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.buffer = TraceBuffer()
        self.provider.add_span_processor(self.buffer)
        self.viewer = TraceViewer(self.buffer, **options)
        self.tracer = self.provider.get_tracer("replicate_proxy_mw")

    def request(self, **attributes: Any) -> str:
        told = {name.replace("__", "."): value for name, value in attributes.items()}
        span = self.tracer.start_span("request", kind=SpanKind.SERVER, attributes=told)
        span.end()
        return f"{span.get_span_context().trace_id:032x}"

    async def ask(self, target: str, method: str = "GET", headers: Headers | None = None, **more: Any) -> Caller:
        scope = http_scope(method, target, []) | {"client": ("127.0.0.1", 50000)} | more
        scope["headers"] = [LOCAL] if headers is None else headers
        return await Caller().call(self.viewer, scope)

    async def json(self, target: str) -> Any:
        answer = await self.ask(target)
        assert (answer.status, answer.header(b"content-type")) == (200, [b"application/json"])
        return json.loads(answer.content)


@pytest.fixture
def here() -> Provider:
    return Provider()


SUMMARY = (
    *("trace_id", "span_id", "start", "duration", "method", "route", "status", "outcome", "error", "operation"),
    *("tenant", "model", "prediction_id", "prediction_status", "cost", "currency", "queue_time", "run_time"),
    *("portkey_trace_id", "metadata", "first", "count", "until"),
)
ROW = (
    *("id", "trace_id", "parent", "depth", "kind", "name", "start", "end", "status", "code", "current"),
    *("attributes", "events", "links"),
)
SAFETY = {
    b"cache-control": b"no-store",
    b"cross-origin-resource-policy": b"same-origin",
    b"referrer-policy": b"no-referrer",
    b"x-content-type-options": b"nosniff",
}


class Elements(HTMLParser):
    """The texts of the elements that a policy is about, and whatever would need another one."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self.forbidden: list[str] = []
        self._within = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._within = tag
        known = [name for name, value in attrs if name == "style" or name.startswith("on") or name in ("src", "action")]
        self.forbidden += [f"{tag} {name}" for name in known]
        if tag in self.texts:
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        self._within = ""

    def handle_data(self, data: str) -> None:
        if self._within in self.texts:
            self.texts[self._within][-1] += data


async def test_the_page_is_one_and_its_policy_lets_nothing_in_but_its_own_style_and_script(here: Provider) -> None:
    answer = await here.ask("/")
    assert (answer.status, answer.header(b"content-type")) == (200, [b"text/html; charset=utf-8"])
    text = answer.content.decode()
    elements = Elements()
    elements.feed(text)
    assert elements.forbidden == []
    hashes = {
        element: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts
        )
        for element, texts in elements.texts.items()
    }
    [told] = answer.header(b"content-security-policy")
    assert told.decode() == (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "https://" not in text


@pytest.mark.parametrize(
    ("target", "method", "status"),
    [
        ("/", "GET", 200),
        ("/requests.json", "GET", 200),
        ("/requests.json", "POST", 405),
        ("/story.json?trace=1", "GET", 404),
        ("/other", "GET", 404),
        ("/", "DELETE", 405),
    ],
)
async def test_every_answer_has_the_headers_of_safety(here: Provider, target: str, method: str, status: int) -> None:
    answer = await here.ask(target, method)
    assert answer.status == status
    assert {name: answer.header(name) for name in SAFETY} == {name: [value] for name, value in SAFETY.items()}
    assert len(answer.header(b"content-security-policy")) == 1
    assert answer.header(b"content-length") == [str(len(answer.content)).encode()]
    if status >= 400:
        assert answer.header(b"content-type") == [b"application/json"]
        assert [*json.loads(answer.content)] == ["error"]
    assert answer.header(b"allow") == ([b"GET, HEAD"] if status == 405 else [])


@pytest.mark.parametrize("target", ["/", "/requests.json", "/other"])
async def test_head_is_get_without_the_body(here: Provider, target: str) -> None:
    get, head = await here.ask(target), await here.ask(target, "HEAD")
    assert (head.status, head.headers, head.content) == (get.status, get.headers, b"")
    assert get.content


async def test_requests_and_a_story(here: Provider) -> None:
    trace_id = here.request(replicate_proxy__tenant="team-a")
    here.request(replicate_proxy__tenant="team-b")
    answer = await here.json("/requests.json")
    assert sorted(answer) == ["requests", "total", "version"]
    assert (answer["total"], len(answer["requests"])) == (2, 2)
    assert [*answer["requests"][0]] == [*SUMMARY]
    [found] = (await here.json("/requests.json?q=%20TEAM-a&q=ignored"))["requests"]
    assert found["trace_id"] == trace_id
    told = await here.json(f"/story.json?trace={trace_id}")
    assert told == await here.json(f"/story.json?trace={trace_id}&span={found['span_id']}")
    assert (told["trace_id"], told["span_id"], told["tenant"]) == (trace_id, found["span_id"], "team-a")
    [row] = told["rows"]
    assert [*row] == [*ROW]
    assert row["attributes"] == [["replicate_proxy.tenant", "team-a"]]


async def test_nothing_is_sent_again_where_nothing_has_changed(here: Provider) -> None:
    here.request()
    version = (await here.json("/requests.json"))["version"]
    same = await here.ask(f"/requests.json?after={version}")
    assert (same.status, same.content, same.header(b"content-length")) == (204, b"", [])
    assert same.header(b"cache-control") == [b"no-store"]
    for after in (version - 1, version + 1, "x", "", f"{version}0"):
        assert (await here.ask(f"/requests.json?after={after}")).status == 200
    here.request()
    assert (await here.json(f"/requests.json?after={version}"))["version"] > version


@pytest.mark.parametrize("query", ["", "?trace=", "?trace=%ff", "?trace=1&span=2", "?span=1", "?" + "x" * 2000])
async def test_a_story_that_is_not_there(here: Provider, query: str) -> None:
    here.request()
    assert (await here.ask(f"/story.json{query}")).status == 404


async def test_answers_are_strict_json_and_hold_nothing_that_ends_a_script(here: Provider) -> None:
    hostile = "</script><!--\u2028\ud800\x00"
    told = {
        "http__route": hostile,
        "replicate__prediction__cost": math.nan,
        "replicate__prediction__run__time": math.inf,
        "http__response__status_code": 10**30,
        "portkey__metadata__</style>": hostile,
    }
    trace_id = here.request(**told)
    for target in ("/requests.json", f"/story.json?trace={trace_id}"):
        answer = await here.ask(target)
        assert b"</" not in answer.content
        assert answer.content.isascii()

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        content = json.loads(answer.content, parse_constant=refuse)
        json.dumps(content, ensure_ascii=False).encode()
    [summary] = (await here.json("/requests.json"))["requests"]
    assert (summary["cost"], summary["run_time"], summary["status"]) == (None, None, None)
    assert summary["route"] == "</script><!--\u2028" + r"\ud800\x00"
    assert [*summary["metadata"]] == ["</style>"]


# --- who may look


LOOPBACK = ["127.0.0.1", "127.8.9.10", "::1", "::ffff:127.0.0.1", "::1%lo"]
ELSEWHERE = ["192.0.2.1", "0.0.0.0", "2001:db8::1", "::ffff:192.0.2.1", "::", "localhost", "testclient", "", "127.0.0"]


@pytest.mark.parametrize("address", LOOPBACK)
async def test_this_machine_may_look(here: Provider, address: str) -> None:
    assert (await here.ask("/requests.json", client=[address, 1])).status == 200


@pytest.mark.parametrize("client", [*((address, 1) for address in ELSEWHERE), None, ()])
async def test_others_may_not(here: Provider, client: Any) -> None:
    for target in ("/", "", "/requests.json", "/story.json", "/other"):
        answer = await here.ask(target, client=client)
        assert answer.status == 403
        assert b"allow_remote=True" in answer.content
        assert answer.header(b"content-type") == [b"application/json"]


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LocalHost:8000",
        "127.0.0.1",
        "127.1.2.3:80",
        "[::1]",
        "[::1]:8000",
        "[::ffff:127.0.0.1]",
        "localhost:",
    ],
)
async def test_hosts_of_this_machine(here: Provider, host: str) -> None:
    assert (await here.ask("/requests.json", headers=[(b"host", host.encode())])).status == 200


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "192.0.2.1", ""),
        *(
            "localhost.",
            "127.0.0.1.",
            "127.1",
            "0.0.0.0",
            "[::]",
            "[localhost]",
            "localhost%2eevil.example",
            "LOCALHOST.EVIL",
        ),
        *("[::2]", "[2001:db8::1]:80", "::1", "localhost:80:80", "localhost@evil.example", "user@localhost", "[::1]x"),
        *(
            "localhost, evil.example",
            "localhost:80x",
            " localhost",
            "localhost\n",
            "2130706433",
            "0x7f.1",
            "[localhost",
        ),
    ],
)
async def test_a_site_that_has_its_name_lead_here_may_not(here: Provider, host: str) -> None:
    assert (await here.ask("/requests.json", headers=[(b"host", host.encode())])).status == 403


async def test_a_host_header_is_needed_and_there_is_one(here: Provider) -> None:
    assert (await here.ask("/requests.json", headers=[])).status == 403
    assert (await here.ask("/requests.json", headers=[LOCAL, LOCAL])).status == 403
    assert (await here.ask("/requests.json", headers=[(b"Host", b"localhost")])).status == 200


@pytest.mark.parametrize(
    "name", [b"forwarded", b"x-forwarded-for", b"X-Forwarded-For", b"x-forwarded-host", b"x-real-ip", b"via"]
)
async def test_whoever_comes_through_a_proxy_on_this_machine_may_not(here: Provider, name: bytes) -> None:
    answer = await here.ask("/requests.json", headers=[LOCAL, (name, b"127.0.0.1")])
    assert answer.status == 403
    assert name.lower() in answer.content


async def test_whoever_comes_through_an_nginx_that_adds_nothing_may_not(here: Provider) -> None:
    """It (1.22) speaks HTTP/1.0 unless it is told otherwise, and names the app's own address as the host."""
    for version, status in (("1.0", 403), ("1.1", 200), ("2", 200)):
        assert (await here.ask("/requests.json", http_version=version)).status == status


async def test_a_host_with_a_login_lets_others_in() -> None:
    there = Provider(allow_remote=True)
    for more in ({"client": ("192.0.2.1", 1)}, {"client": None}):
        for headers in ([(b"host", b"app.example"), (b"x-forwarded-for", b"192.0.2.1")], []):
            assert (await there.ask("/requests.json", headers=headers, **more)).status == 200
    assert (await there.ask("/requests.json", "POST")).status == 405


CROSS_SITE: list[Headers] = [
    [(b"origin", b"https://evil.example")],
    [(b"Origin", b"null")],
    [(b"sec-fetch-site", b"cross-site")],
    [(b"Sec-Fetch-Site", b"same-site")],  # another port of this machine's, and whoever has it
]


@pytest.mark.parametrize("headers", CROSS_SITE)
@pytest.mark.parametrize("allow_remote", [False, True])
async def test_pages_of_other_sites_may_not_read_what_a_host_opens_to_all_of_them(
    headers: Headers, allow_remote: bool
) -> None:
    here = Provider(allow_remote=allow_remote)
    trace_id = here.request()
    app = CORSMiddleware(here.viewer, allow_origins=["*"], allow_private_network=True)
    for target in ("/requests.json", f"/story.json?trace={trace_id}"):
        answer = await Caller().call(
            app, http_scope("GET", target, []) | {"client": ("127.0.0.1", 1), "headers": [LOCAL, *headers]}
        )
        assert (answer.status, json.loads(answer.content)) == (403, {"error": "This is for the viewer's own page."})


@pytest.mark.parametrize("site", [b"same-origin", b"none"])
async def test_its_own_page_and_whoever_types_an_address_may(here: Provider, site: bytes) -> None:
    assert (await here.ask("/requests.json", headers=[LOCAL, (b"sec-fetch-site", site)])).status == 200


async def test_a_link_from_another_site_leads_to_the_page(here: Provider) -> None:
    for target, status in (("/", 200), ("/other", 404)):
        assert (await here.ask(target, headers=[LOCAL, (b"sec-fetch-site", b"cross-site")])).status == status


async def test_the_hosts_event_loop_goes_on_meanwhile(here: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it wait for the threads of the host's own handlers."""
    asked, went_on = threading.Event(), threading.Event()
    snapshot = here.buffer.snapshot

    def slow() -> Any:
        asked.set()
        assert went_on.wait(5)
        return snapshot()

    monkeypatch.setattr(here.buffer, "snapshot", slow)
    busy = to_thread.current_default_thread_limiter()
    async with create_task_group() as tasks:
        for number in range(int(busy.total_tokens)):
            await busy.acquire_on_behalf_of(number)
        answers: list[int | None] = []

        async def ask() -> None:
            answers.append((await here.ask("/requests.json")).status)

        tasks.start_soon(ask)
        await to_thread.run_sync(asked.wait, 5, limiter=CapacityLimiter(1))
        went_on.set()
    assert answers == [200]
    for number in range(int(busy.total_tokens)):
        busy.release_on_behalf_of(number)


def test_the_reason_is_told() -> None:
    local = {"client": ("127.0.0.1", 1), "headers": [LOCAL]}
    reasons = [
        remote(local),
        remote({"headers": []}),
        remote(local | {"client": ("192.0.2.1", 1)}),
        remote(local | {"http_version": "1.0"}),
        remote(local | {"headers": []}),
        remote(local | {"headers": [LOCAL, LOCAL]}),
        remote(local | {"headers": [(b"host", b"evil.example")]}),
        remote(local | {"headers": [LOCAL, (b"forwarded", b"for=192.0.2.1")]}),
    ]
    assert reasons[0] is None
    assert len({*reasons}) == len(reasons)


# --- where it is mounted


def _litestar(viewer: TraceViewer) -> Any:
    return Litestar([asgi("/traces", is_mount=True, copy_scope=True)(viewer)])


def _router(viewer: TraceViewer) -> Any:
    handler = asgi("/traces", is_mount=True, copy_scope=True)(viewer)
    return Litestar([Router("/inner", route_handlers=[handler])])


def _dispatcher(viewer: Any) -> Any:
    return DispatcherMiddleware({"/traces": viewer})


def _fastapi(viewer: TraceViewer) -> Any:
    app = FastAPI()
    app.mount("/traces", viewer)
    return app


MOUNTS: dict[str, tuple[str, Callable[[TraceViewer], Any]]] = {
    "FastAPI": ("/traces", _fastapi),
    "Starlette": ("/traces", lambda viewer: Starlette(routes=[Mount("/traces", viewer)])),
    "a mount in a mount": ("/a/b c/traces", lambda viewer: Starlette(routes=[Mount("/a/b c", _fastapi(viewer))])),
    "Litestar": ("/traces", _litestar),
    "a router of Litestar's": ("/inner/traces", _router),
    "hypercorn's dispatcher": ("/traces", _dispatcher),
}


@pytest.mark.parametrize(("path", "mount"), MOUNTS.values(), ids=MOUNTS)
async def test_mounts(here: Provider, path: str, mount: Callable[[TraceViewer], Any]) -> None:
    trace_id = here.request()
    transport = httpx.ASGITransport(mount(here.viewer))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost", follow_redirects=True) as client:
        answer = await client.get(f"{path}?q=a%20b")
        assert answer.status_code == 200
        assert [one.status_code for one in answer.history] == [307]
        assert (answer.url.path, answer.url.query) == (f"{path}/", b"q=a%20b")
        assert answer.headers["content-type"] == "text/html; charset=utf-8"
        for target, status in (("requests.json", 200), (f"story.json?trace={trace_id}", 200), ("other", 404)):
            assert (await client.get(answer.url.join(target))).status_code == status


@pytest.mark.parametrize(
    ("path", "root_path", "more", "expected"),
    [
        ("/traces", "/traces", {}, ""),
        ("/traces/", "/traces", {}, "/"),
        ("/traces/requests.json", "/traces/", {}, "/requests.json"),
        ("/tracesque", "/traces", {}, "/tracesque"),
        ("/", "", {}, "/"),
        ("", "", {}, ""),
        ("/", "/outside", {}, "/"),
        ("/", "", {"raw_path": b"/traces"}, ""),
        ("/", "", {"raw_path": b"/traces/"}, "/"),
        ("/requests.json/", "", {"raw_path": b"/traces/requests.json"}, "/requests.json"),
        ("/traces/", "/api/traces", {"app_root_path": "/api"}, "/"),
        ("/api/traces/", "/api/traces", {"app_root_path": "/api"}, "/"),
        ("/a b/requests.json", "/a b", {"raw_path": b"/a%20b/requests.json"}, "/requests.json"),
    ],
)
def test_paths_below_the_mount(path: str, root_path: str, more: dict[str, Any], expected: str) -> None:
    assert below({"path": path, "root_path": root_path, **more}) == expected
    if not root_path:
        assert below({"path": path, **more}) == expected


@pytest.mark.parametrize(
    ("scope", "location"),
    [
        ({"path": "/traces", "query_string": b""}, b"./traces/"),
        ({"path": "/", "raw_path": b"/a/b%20c", "query_string": b"q=x"}, b"./b%20c/?q=x"),
        ({"path": "/a/b c:d", "raw_path": None, "query_string": b""}, b"./b%20c:d/"),
        ({"path": "/é\n", "query_string": b""}, b"./%C3%A9%0A/"),
        ({"path": "/\\evil.example", "query_string": b""}, b"./%5Cevil.example/"),
        ({"path": "", "query_string": b"q=x"}, b"./"),
    ],
)
def test_where_the_page_is(scope: dict[str, Any], location: bytes) -> None:
    assert slashed(scope) == location


def test_served_alone(here: Provider) -> None:
    """By a real server, lifespan and all, and asked by real clients."""
    here.request()
    with serve(here.viewer) as served, httpx.Client(trust_env=False) as client:
        assert client.get(f"{served.url}/").status_code == 200
        assert client.get(f"{served.url}/requests.json").json()["total"] == 1
        assert client.get(f"{served.url}/requests.json", headers={"host": "evil.example"}).status_code == 403


async def test_lifespan(here: Provider) -> None:
    sent: list[str] = []
    messages = ["lifespan.startup", "lifespan.shutdown"]

    async def receive() -> dict[str, Any]:
        return {"type": messages.pop(0)}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    await here.viewer({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_websockets_are_closed_and_other_scopes_are_left_alone(here: Provider) -> None:
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    await here.viewer({"type": "websocket"}, receive, send)
    await here.viewer({"type": "something new"}, receive, send)
    assert sent == [{"type": "websocket.close", "code": 1000}]


def test_in_an_app_with_the_proxy() -> None:
    """Its own requests, which the host traces, are not in the list."""
    here = Provider()
    app = FastAPI(telemetry={"logs": False, "metrics": False, "tracer_provider": here.provider})
    app.mount("/traces", here.viewer)
    with FakeReplicate(tokens={TOKEN: "acme"}).serve() as fake:
        app.add_middleware(
            ReplicateProxyMiddleware,
            key_resolver=MappingKeyResolver({"pk-team-a": TOKEN}),
            config=ProxyConfig(upstream=fake.url),
            tracer_provider=here.provider,
        )
        with serve(app) as served, httpx.Client(base_url=served.url, trust_env=False) as client:
            body = {"version": HELLO_WORLD, "input": {"text": "Ada"}}
            created = client.post("/v1/predictions", json=body, headers={"x-portkey-api-key": "pk-team-a"})
            assert created.status_code == 201
            answer = client.get("/traces/requests.json").json()
            while answer["requests"][0]["duration"] is None:  # its span ends after its answer
                answer = client.get("/traces/requests.json").json()
            [summary] = answer["requests"]
            assert summary["prediction_id"] == created.json()["id"]
            told = client.get("/traces/story.json", params={"trace": summary["trace_id"]}).json()
            assert client.get("/traces/requests.json", params={"after": answer["version"]}).status_code == 204
    assert [row["kind"] for row in told["rows"]] == ["host", "create", "attempt"]


def test_a_policy_without_anything_inline() -> None:
    assert "script-src 'none'; style-src 'none';" in policy("<p>nothing</p>")
    assert policy("<style>a</style><STYLE media=print>b\n</STYLE>").count("'sha256-") == 2


def test_without_its_page_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"viewer\.html is missing: install the whole package"):
        page(tmp_path)
