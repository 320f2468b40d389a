"""docs/trace-viewer.md is run as it stands there, in front of a fake Replicate."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib.resources import files
from typing import Any

import httpx
import pytest
from fastapi import Request
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from replicate_proxy_mw.devtools import TraceBuffer, trace_story
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.docs.hosts import KEY, app_of, create, with_upstream
from tests.documents import Page, execute

PAGE = Page("docs/trace-viewer.md")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeReplicate]:
    with FakeReplicate().serve() as fake:
        monkeypatch.setenv("REPLICATE_API_TOKEN", fake.token)
        monkeypatch.setenv("REPLICATE_PROXY_KEYS", "team-a=pk-team-a")
        monkeypatch.setenv("SESSION_SECRET", "a secret of the test's")
        yield fake


def looked_at(client: httpx.Client) -> list[dict[str, Any]]:
    """What the page lists, once there is a create and a poll in it that have ended."""
    page = client.get("/traces", follow_redirects=True)
    assert page.status_code == 200
    assert page.url.path == "/traces/"
    requests: list[dict[str, Any]] = []
    while len(requests) < 2 or None in [request["duration"] for request in requests]:  # spans end after answers
        requests = client.get(page.url.join("requests.json")).json()["requests"]
    return requests


@pytest.mark.parametrize("containing", ["app = FastAPI()\napp.mount", "Mount(", "Litestar([viewer]", "async def pages"])
def test_an_app_with_the_viewer(fake: FakeReplicate, containing: str) -> None:
    [code] = [code for language, code in PAGE.code if containing in code and "for_staff" not in code]
    with serve(app_of(code, fake)) as served, httpx.Client(base_url=served.url, trust_env=False) as client:
        create(client)
        poll, created = looked_at(client)
        assert (poll["operation"], created["operation"]) == ("predictions.get", "predictions.create")
        assert created["tenant"] == "team-a"
        story = client.get("/traces/story.json", params={"trace": poll["trace_id"]}).json()
        assert [row["kind"] for row in story["rows"] if row["kind"] != "attempt"] == ["create", "poll"]
        assert client.get("/traces/", headers={"host": "evil.example"}).status_code == 403
        assert client.get("/other").status_code == (200 if "my own app" in code else 404)


def test_an_app_that_has_a_provider(fake: FakeReplicate, monkeypatch: pytest.MonkeyPatch) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    monkeypatch.setattr(trace, "get_tracer_provider", lambda: provider)
    known = execute(PAGE.block("python", "trace.get_tracer_provider().add_span_processor(traces)"))
    provider.get_tracer("replicate_proxy_mw").start_span("request").end()
    assert len(known["traces"].snapshot().traces) == 1


def test_behind_a_login(fake: FakeReplicate) -> None:
    known = execute(with_upstream(PAGE.block("python", "for_staff"), fake))

    async def signed_in(request: Request) -> None:
        request.session["role"] = "staff"

    known["app"].add_api_route("/signed-in", signed_in)
    elsewhere = {"host": "app.example", "x-forwarded-for": "192.0.2.1"}
    with serve(known["app"]) as served, httpx.Client(base_url=served.url, trust_env=False) as client:
        create(client)
        for path in ("/traces/", "/traces/requests.json", "/traces/story.json"):
            assert client.get(path, headers=elsewhere).status_code == 401
        client.get("/signed-in")
        assert client.get("/traces/", headers=elsewhere).status_code == 200
        assert len(looked_at(client)) == 2


def test_what_a_search_finds(fake: FakeReplicate) -> None:
    code = PAGE.block("python", "async def pages")
    said = {"x-portkey-trace-id": "order-42", "x-portkey-metadata": '{"team": "design"}'}
    with serve(app_of(code, fake)) as served, httpx.Client(base_url=served.url, trust_env=False) as client:
        link = create(client, **said)
        refused = client.get("/v1/account", headers={"x-portkey-api-key": "pk-stranger"})
        fake.fail(429, operation="account.get")
        client.get("/v1/account", headers=KEY)
        while len(looked_at(client)) < 4:
            pass

        def count(text: str) -> int:
            total: int = client.get("/traces/requests.json", params={"q": text}).json()["total"]
            return total

        words = re.findall(r"`([^`]+)`", PAGE.text.partition("## Search")[2].partition("## Keys")[0])
        counts = {word: count(word) for word in words if word != "x-portkey-trace-id"}
        assert counts == {
            "x-portkey-metadata": 0,
            "team=design": 2,
            "request_id": 0,
            "team-a": 3,
            "predictions.create": 1,
            "429": 1,
            "limited": 0,
            "failed": 0,
        }
        assert count("ORDER-42 Design") == 2
        assert count(link.rpartition("/")[2]) == 2
        assert count(refused.json()["request_id"]) == 1


class Keys(HTMLParser):
    """The keys that the page itself lists."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self._stack: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("dl", "kbd"):
            self._stack.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._stack[-1:] == [tag]:
            self._stack.pop()

    def handle_data(self, data: str) -> None:
        if self._stack == ["dl", "kbd"]:
            self.found.add(data)


def test_the_keys_are_those_that_the_page_lists() -> None:
    keys = Keys()
    keys.feed(files("replicate_proxy_mw.devtools").joinpath("viewer.html").read_text(encoding="utf-8"))
    table = PAGE.text.partition("## Keys")[2].partition("##")[0]
    assert {
        key for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for key in re.findall("`(.*?)`", line)
    } == (keys.found)


def test_kinds_of_rows() -> None:
    table = PAGE.text.partition("**The story**")[2].partition("**The details**")[0]
    kinds = [kind for line in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for kind in re.findall("`(.*?)`", line)]
    assert sorted(kinds) == sorted(trace_story.Kind.__args__)  # type: ignore[attr-defined]


def test_bounds() -> None:
    defaults = TraceBuffer.__init__.__kwdefaults__ or {}
    assert dict(re.findall(r"^\| `(max_\w+)` \| (.+?) \|", PAGE.text, re.MULTILINE)) == {
        "max_traces": str(defaults["max_traces"]),
        "max_spans_per_trace": str(defaults["max_spans_per_trace"]),
        "max_bytes": f"{defaults['max_bytes'] // 2**20} MiB",
    }
    assert f"{trace_story.MAX_LINES} lines at most" in PAGE.text
    assert f"{trace_story.MAX_ROWS} lines at most" in PAGE.text
    assert f"{trace_story.MAX_TEXT:,}\ncharacters" in PAGE.text


def test_no_block_is_forgotten() -> None:
    assert PAGE.count("python") == len(PAGE.code) == 6


def test_files_that_it_links_to_are_there() -> None:
    assert PAGE.missing_links() == []
