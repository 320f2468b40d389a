"""The trace viewer's page in a real browser, on a real server, fed by requests that really go through the proxy."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import SpanKind
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect, sync_playwright

from replicate_proxy_mw import (
    MappingKeyResolver,
    ProxyConfig,
    Rates,
    ReplicateKey,
    ReplicateProxyMiddleware,
    devtools,
)
from replicate_proxy_mw.devtools import TraceBuffer, TraceViewer
from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.testing import FakeModel, FakeReplicate
from tests.clients.drivers import require

HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"
LLAMA = "meta/meta-llama-3-8b-instruct"
PRICES = {"replicate/hello-world": Rates(per_second=0.0001), "acme/film": Rates(per_run=1.5, currency="EUR")}

PAGE = Path(devtools.__file__).with_name("viewer.html")

# What would run if a text of somebody else's were taken for markup, a script or an address.
IMAGE = "<img src=x onerror=window.__pwned=1>"
SCRIPT = "</script><script>window.__pwned=1</script>"
ADDRESS = "javascript:window.__pwned=1"

# In the page before anything else: what the browser refuses, and less patience between two questions.
WATCH = """
const wait = window.setTimeout;
window.setTimeout = (act, delay, ...more) => wait(act, delay === 1000 ? 100 : delay, ...more);
window.__violations = [];
addEventListener("securitypolicyviolation", (event) => window.__violations.push(event.violatedDirective));
"""

expect.set_options(timeout=10_000)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    require("chromium")
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        yield browser
        browser.close()


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[int]:
    """Uvicorn in a thread, at a port of one's own choice; yields the port."""
    # One that names its protocol: else asyncio leaves Nagle's algorithm on, which takes 40 ms a call.
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, lifespan="on", loop="asyncio", timeout_graceful_shutdown=1)
        )
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield int(listening.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()


class Host:
    """An app with the proxy and the viewer in it, and its callers."""

    def __init__(self, fake: FakeReplicate, **tenants: str) -> None:
        self.fake = fake
        self.traces = TraceBuffer()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(self.traces)
        self.app = FastAPI()
        self.app.mount("/traces", TraceViewer(self.traces))
        keys = {f"pk-{name}": ReplicateKey(fake.token, tenant=tenant) for name, tenant in tenants.items()}
        self.app.add_middleware(
            ReplicateProxyMiddleware,
            key_resolver=MappingKeyResolver(keys),
            config=ProxyConfig(
                upstream=fake.url,
                capture_content="SPAN_ONLY",
                proxy_streams=True,
                stream_key="a key of the tests, long enough for it",
                stream_hosts=[fake.streams_url.partition("://")[2]],
                webhook_secrets=[fake.webhook_secret],
            ),
            prices=PRICES,
            tracer_provider=self.provider,
        )
        self.port = 0
        self.caller = httpx.Client(timeout=30)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/traces/"

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        key: str = "pk-design",
        trace: str | None = None,
        metadata: Any = None,
        **headers: str,
    ) -> dict[str, Any]:
        headers["x-portkey-api-key"] = key
        if trace is not None:
            headers["x-portkey-trace-id"] = trace
        if metadata is not None:
            headers["x-portkey-metadata"] = json.dumps(metadata)
        response = self.caller.request(method, f"http://127.0.0.1:{self.port}/v1{path}", json=body, headers=headers)
        answer: dict[str, Any] = response.json()
        return answer

    def create(self, text: str = "Alice", **more: Any) -> str:
        created = self.call("POST", "/predictions", {"version": HELLO_WORLD, "input": {"text": text}}, **more)
        return str(created["id"])

    def get(self, prediction: str, **more: Any) -> dict[str, Any]:
        return self.call("GET", f"/predictions/{prediction}", **more)

    def story(self, text: str = "Alice", **more: Any) -> str:
        """A prediction from its create to the poll that sees its end."""
        prediction = self.create(text, **more)
        self.fake.clock.advance(2)
        assert self.get(prediction, **more)["status"] == "succeeded"
        return prediction

    def trace_of(self, prediction: str) -> str:
        """The id of the trace in which it was created."""
        listed = self.caller.get(f"{self.url}requests.json", params={"q": f"{prediction} predictions.create"}).json()
        return str(listed["requests"][0]["trace_id"])


@pytest.fixture
def host() -> Iterator[Host]:
    film = FakeModel(owner="acme", name="film", official=True, run=lambda given: "a film", queue_time=10, run_time=30)
    with FakeReplicate(models=[film], queue_time=0.4, run_time=1.1).serve() as fake:
        host = Host(fake, design="design", web="checkout")
        with serving(host.app) as host.port, host.caller:
            yield host
        host.provider.shutdown()


class Watched:
    """A page, and what it did that it should not have done."""

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.page = context.new_page()
        self.page.add_init_script(WATCH)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.expected: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)

    def _dialog(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def assert_innocent(self, host: Host) -> None:
        assert self.complaints == self.expected
        assert self.page.evaluate("window.__violations") == []
        assert self.page.evaluate("window.__pwned") is None
        assert self.requests
        assert [url for url in self.requests if not url.startswith((host.url, "data:image/svg+xml,"))] == []


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser, host: Host) -> Iterator[Open]:
    """Opens the viewer; all pages have to have behaved at the end."""
    with ExitStack() as stack:
        opened: list[Watched] = []

        def open_page(
            at: str = "",
            *,
            width: int = 1280,
            height: int = 800,
            scheme: Literal["light", "dark"] = "light",
            motion: Literal["reduce", "no-preference"] = "reduce",
            complaints: tuple[str, ...] = (),
        ) -> Page:
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme, reduced_motion=motion
            )
            stack.callback(context.close)
            opened.append(Watched(context))
            opened[-1].expected += complaints
            opened[-1].page.goto(host.url + at)
            return opened[-1].page

        yield open_page
        for one in opened:
            one.assert_innocent(host)


def rows(page: Page) -> Locator:
    return page.get_by_role("grid").get_by_role("row").filter(has=page.get_by_role("gridcell"))


def row(page: Page, *words: str) -> Locator:
    found = rows(page)
    for word in words:
        found = found.filter(has_text=word)
    return found


def lines(page: Page) -> Locator:
    return page.get_by_role("treegrid", name="Waterfall").get_by_role("row")


def kinds(page: Page) -> list[str]:
    return lines(page).locator(".kind").all_inner_texts()


def test_nothing_becomes_markup() -> None:
    page = PAGE.read_text()
    script = page[page.index("<script>") : page.index("</script>")]
    for sink in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "srcdoc"):
        assert sink not in page
    assert 'setAttribute("style"' not in script
    # What the policy would refuse without a word.
    assert not re.search(r"<[^>]*\s(style|on\w+)\s*=", page[: page.index("<script>")])
    assert page.count("<script") == page.count("<style") == 1
    assert re.findall(r"(?:src|href)=.{6}", page) == ['href="data:']
    assert not re.search(r"@import|url\(", page)


def test_the_list_tells_what_matters_of_each_request(host: Host, open_page: Open) -> None:
    host.story(trace="order-4711", metadata={"team": "design", "_user": "ada"})
    host.call("GET", "/predictions/none", key="pk-web")
    host.call("GET", "/models", key="pk-of-nobody")
    host.fake.fail(503, operation="predictions.create")
    host.call("POST", "/predictions", {"version": HELLO_WORLD, "input": {"text": "Alice"}})
    page = open_page(width=1600)
    expect(rows(page)).to_have_count(5)
    headers = page.get_by_role("columnheader").all_inner_texts()
    assert headers == [
        *("Time", "Status", "Operation", "Tenant", "Model", "Duration", "Prediction", "Cost"),
        "Caller's trace and metadata",
    ]
    failed, refused, missing, poll, created = (
        dict(zip(headers, one.get_by_role("gridcell").all_inner_texts(), strict=True)) for one in rows(page).all()
    )
    assert (
        created.items()
        >= {
            "Status": "201",
            "Operation": "predictions.createPOST /v1/predictions",
            "Tenant": "design",
            "Model": "replicate/hello-world",
            "Prediction": "succeeded 1.50 s",
            "Cost": "$0.00011",
            "Caller's trace and metadata": "order-4711 team=design _user=ada",
        }.items()
    )
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", created["Time"])
    assert re.fullmatch(r"[\d.]+ (µs|ms|s)", created["Duration"])
    assert (poll["Status"], poll["Prediction"], poll["Cost"]) == ("200", "succeeded", "")
    assert (missing["Status"], missing["Tenant"], missing["Prediction"]) == ("404", "checkout", "")
    assert (refused["Status"], refused["Tenant"]) == ("401 key_unknown", "")
    assert failed["Status"].startswith("503")
    marks = [one.locator(".status").first for one in rows(page).all()]
    # Shape, colour and text.
    assert [mark.evaluate("node => getComputedStyle(node, '::before').content[1]") for mark in marks] == list("■▲▲●●")
    assert len({mark.evaluate("node => getComputedStyle(node).color") for mark in marks}) == 3
    expect(page.locator("#count")).to_have_text("5 requests")
    expect(page.locator("#state")).to_have_text("Live")


def test_search_asks_the_server_and_stays_in_the_address(host: Host, open_page: Open) -> None:
    one = host.story(trace="order-1", metadata={"team": "red", "name": "Ada Lovelace"})
    other = host.story(key="pk-web", trace="order-2", metadata={"team": "blue"})
    page = open_page(width=1600)
    expect(rows(page)).to_have_count(4)
    box = page.get_by_role("searchbox", name="Search requests")
    for words, found in {
        "order-1": 2,
        "ORDER-2": 2,
        "team=blue": 2,
        "name=Ada Lovelace": 2,
        one: 2,
        f"{other} create": 1,
        host.trace_of(one): 1,
        "checkout": 2,
        "hello-world 201": 2,
        "team=green": 0,
    }.items():
        box.fill(words)
        expect(page.locator("#count")).to_have_text(f"{found} match" + ("" if found == 1 else "es"))
        expect(rows(page)).to_have_count(found)
    expect(page.get_by_role("heading", name="Nothing matches “team=green”")).to_be_visible()
    box.fill("team=blue create")
    expect(rows(page)).to_have_count(1)
    assert page.url == f"{host.url}?q=team%3Dblue+create"
    page.reload()
    expect(box).to_have_value("team=blue create")
    expect(rows(page)).to_have_count(1)
    row(page, "checkout").click()
    page.get_by_role("button", name="order-2").click()
    expect(box).to_have_value("order-2")
    expect(rows(page)).to_have_count(2)
    page.get_by_role("button", name="Close the story").click()
    box.press("End")
    box.press("/")
    expect(box).to_have_value("order-2/")
    box.press("Escape")
    expect(rows(page)).to_have_count(4)
    assert page.url == host.url


def test_a_click_opens_the_story_and_a_click_on_a_bar_its_details(host: Host, open_page: Open) -> None:
    prediction = host.create("Alice", metadata={"team": "design"})
    host.get(prediction)
    host.fake.clock.advance(2)
    host.get(prediction)
    page = open_page()
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    row(page, "predictions.create").click()
    story = page.get_by_role("region", name="Story")
    expect(story.get_by_role("heading", name=prediction)).to_be_visible()
    assert page.url == f"{host.url}#{host.trace_of(prediction)}"
    expect(lines(page)).to_have_count(8)
    assert kinds(page) == ["create", "attempt", "queue", "run", "poll", "attempt", "poll", "attempt"]
    assert [line.get_attribute("aria-level") for line in lines(page).all()] == list("12221212")
    facts = dict(zip(story.locator("dt").all_inner_texts(), story.locator("dd").all_inner_texts(), strict=True))
    assert (
        facts.items()
        >= {
            **{"Prediction": "succeeded", "Total": "1.50 s", "Queue": "400 ms", "Run": "1.10 s"},
            **{"Cost": "$0.00011", "Polls": "2"},
        }.items()
    )
    queue, run = (lines(page).nth(number) for number in (2, 3))
    expect(queue).to_contain_text("400 ms")
    expect(run).to_contain_text("1.10 s")
    # On one axis: the run begins where the queue ends.
    left, right = queue.locator(".bar").bounding_box(), run.locator(".bar").bounding_box()
    assert left is not None
    assert right is not None
    assert abs(left["x"] + left["width"] - right["x"]) < 1.5
    assert 2.6 < right["width"] / left["width"] < 2.9

    run.locator(".bar").click()
    details = page.get_by_role("complementary", name="Details")
    expect(details.get_by_role("heading", name="run generate_content replicate/hello-world")).to_be_visible()
    expect(run).to_have_attribute("aria-selected", "true")
    told = {
        line.locator("th").inner_text(): line.locator("td > :first-child").inner_text()
        for line in details.locator("tr").all()
    }
    assert told["replicate.prediction.cost"] == "0.00011"
    assert told["portkey.metadata.team"] == "design"
    assert told["replicate.input"] == '{\n  "text": "Alice"\n}'
    expect(details.get_by_role("heading", name=re.compile(r"Event at \+4\d\d ms: replicate.started"))).to_be_visible()
    details.get_by_role("button", name="Copy replicate.prediction.id").click()
    expect(details.get_by_role("button", name="Copy replicate.prediction.id")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == prediction

    lines(page).nth(6).click()
    details.get_by_role("link", name=host.trace_of(prediction)).click()
    expect(page).to_have_url(f"{host.url}#{host.trace_of(prediction)}")
    expect(details).to_be_hidden()


def test_a_story_has_the_stream_the_webhook_and_the_cancel(host: Host, open_page: Open) -> None:
    asked = {"stream": True, "input": {"prompt": "one two three"}}
    spoken = host.call("POST", f"/models/{LLAMA}/predictions", asked)
    host.fake.clock.advance(2)
    host.caller.get(spoken["urls"]["stream"], headers={"x-portkey-api-key": "pk-design"})
    film = host.call("POST", "/models/acme/film/predictions", {"input": {}})["id"]
    host.call("POST", f"/predictions/{film}/cancel")
    told = host.call(
        "POST",
        "/models/acme/film/predictions",
        {"input": {}, "webhook": f"http://127.0.0.1:{host.port}/v1/-/webhooks", "webhook_events_filter": ["completed"]},
    )["id"]
    host.fake.clock.advance(50)
    page = open_page(width=1600)
    row(page, "streams/{token}").click()
    expect(page.get_by_role("heading", name=spoken["id"])).to_be_visible()
    expect(lines(page).filter(has_text="stream")).to_contain_text("200")
    assert [kind for kind in kinds(page) if kind in ("create", "stream")] == ["create", "stream"]
    assert lines(page).filter(has_text="stream").get_attribute("class") == "line here"
    row(page, "predictions.cancel").click()
    expect(page.get_by_role("heading", name=film)).to_be_visible()
    expect(lines(page).filter(has=page.locator(".kind", has_text="cancel"))).to_contain_text("200")
    assert [kind for kind in kinds(page) if kind != "attempt"] == ["create", "queue", "cancel"]
    expect(lines(page).filter(has_text="never started")).to_contain_text("canceled")
    expect(page.locator("#facts")).to_contain_text("canceled")
    row(page, "/-/webhooks").click()
    expect(page.get_by_role("heading", name=told)).to_be_visible()
    assert [kind for kind in kinds(page) if kind != "attempt"] == ["create", "queue", "run", "webhook"]
    expect(page.locator("#facts")).to_contain_text("webhook")


def test_a_link_opens_a_story_and_the_back_button_closes_it(host: Host, open_page: Open) -> None:
    one, other = host.story(), host.story()
    missing = "console: Failed to load resource: the server responded with a status of 404 (Not Found)"
    page = open_page(f"#{host.trace_of(one)}", complaints=(missing,))
    expect(page.get_by_role("heading", name=one)).to_be_visible()
    expect(row(page, "create").nth(1)).to_have_attribute("aria-selected", "true")
    assert page.title() == f"{one} · Traces"
    row(page, "create").first.click()
    expect(page.get_by_role("heading", name=other)).to_be_visible()
    page.go_back()
    expect(page.get_by_role("heading", name=one)).to_be_visible()
    page.get_by_role("button", name="Close the story").click()
    expect(page.get_by_role("region", name="Story")).to_be_hidden()
    page.go_back()
    expect(page.get_by_role("heading", name=one)).to_be_visible()
    page.goto(f"{host.url}#{'0' * 32}")
    expect(page.locator("#about")).to_contain_text("This trace is not kept here.")
    page.goto(f"{host.url}#nonsense")
    expect(page.get_by_role("region", name="Story")).to_be_hidden()


def test_requests_that_share_a_trace_have_stories_of_their_own(host: Host, open_page: Open) -> None:
    parent = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    one = host.create(**parent)
    other = host.create(**parent)
    page = open_page()
    row(page, "create").last.click()
    expect(page.get_by_role("heading", name=one)).to_be_visible()
    assert page.url == f"{host.url}#{'a' * 32}"
    row(page, "create").first.click()
    expect(page.get_by_role("heading", name=other)).to_be_visible()
    assert re.fullmatch(rf"{host.url}#{'a' * 32}/[0-9a-f]{{16}}", page.url)
    selected = [one.get_attribute("aria-selected") for one in rows(page).all()]
    assert selected == ["true", "false"]
    page.get_by_role("button", name="Close the story").click()
    page.get_by_role("searchbox").fill(other)
    expect(rows(page)).to_have_count(1)
    rows(page).click()
    expect(page.get_by_role("heading", name=other)).to_be_visible()


def test_all_of_it_goes_by_keyboard(host: Host, open_page: Open) -> None:
    predictions = [host.story() for _ in range(2)]
    page = open_page()
    expect(rows(page)).to_have_count(4)
    press = page.keyboard.press
    press("j")
    expect(rows(page).nth(0)).to_be_focused()
    press("ArrowDown")
    press("j")
    press("ArrowUp")
    expect(rows(page).nth(1)).to_be_focused()
    assert rows(page).nth(1).evaluate("node => getComputedStyle(node).outlineStyle") == "solid"
    press("End")
    expect(rows(page).nth(3)).to_be_focused()
    press("k")
    press("j")
    press("Enter")
    expect(page.get_by_role("heading", name=predictions[0])).to_be_visible()
    expect(lines(page).nth(0)).to_be_focused()
    press("j")
    press("ArrowDown")
    press("j")
    expect(lines(page).nth(3)).to_be_focused()
    press("Enter")
    details = page.get_by_role("complementary", name="Details")
    expect(details).to_contain_text("run generate_content")
    press("k")
    expect(details).to_contain_text("queue")
    press("Escape")
    expect(details).to_be_hidden()
    expect(lines(page).nth(2)).to_be_focused()
    press("z")
    whole = page.get_by_role("button", name="Whole story")
    expect(whole).to_be_visible()
    press("0")
    expect(whole).to_be_hidden()
    press("Escape")
    expect(page.get_by_role("region", name="Story")).to_be_hidden()
    expect(rows(page).nth(3)).to_be_focused()
    press("/")
    expect(page.get_by_role("searchbox")).to_be_focused()
    page.keyboard.type("create")
    expect(rows(page)).to_have_count(2)
    press("Enter")
    expect(rows(page).nth(0)).to_be_focused()
    press("?")
    keys = page.get_by_role("dialog", name="Keys")
    expect(keys).to_be_visible()
    press("j")
    press("Escape")
    expect(keys).to_be_hidden()
    expect(rows(page).nth(0)).to_be_focused()
    press("Escape")
    expect(rows(page)).to_have_count(4)
    press("p")
    expect(page.locator("#state")).to_have_text("Paused")
    host.create()
    press("p")
    expect(rows(page)).to_have_count(5)


def test_it_is_live(host: Host, open_page: Open) -> None:
    prediction = host.call("POST", "/models/acme/film/predictions", {"input": {}})["id"]
    page = open_page()
    row(page, "create").click()
    expect(lines(page)).to_have_count(2)
    page.evaluate("window.__loaded = 1")
    host.get(prediction)
    expect(rows(page)).to_have_count(2)
    expect(lines(page)).to_have_count(4)
    host.fake.clock.advance(50)
    host.get(prediction)
    created = row(page, "create").last
    expect(created).to_contain_text("€1.50")
    expect(lines(page)).to_have_count(8)
    expect(created).to_have_attribute("aria-selected", "true")

    # Replicate holds it until there is an end, or for 60 s.
    wait = threading.Thread(
        target=lambda: host.call("POST", "/models/acme/film/predictions", {"input": {}}, prefer="wait")
    )
    wait.start()
    held = row(page, "create").first
    expect(held).to_contain_text("open")
    expect(held.locator(".c-duration")).to_have_text(re.compile("…$"))
    held.click()
    expect(lines(page).first).to_contain_text("open")
    assert lines(page).first.locator(".bar.open").evaluate("node => getComputedStyle(node).animationName") == "none"
    host.fake.clock.advance(60)
    wait.join()
    expect(held).to_contain_text("succeeded")
    expect(lines(page).filter(has_text="run").first).to_contain_text("30.0 s")
    assert page.evaluate("window.__loaded") == 1


def test_new_requests_move_nothing_that_one_looks_at(host: Host, open_page: Open) -> None:
    for number in range(30):
        host.create(f"{number}")
    page = open_page(height=400)
    expect(rows(page)).to_have_count(30)
    page.get_by_role("columnheader", name="Time").hover()
    page.mouse.wheel(0, 300)
    seen = rows(page).nth(12)
    expect(seen).to_be_in_viewport()
    key, before = seen.get_attribute("data-key"), seen.bounding_box()
    host.create("new")
    host.create("newer")
    newer = page.get_by_role("button", name="↑ 2 new")
    expect(newer).to_be_visible()
    assert before is not None
    after = page.locator(f"[data-key='{key}']").bounding_box()
    assert after is not None
    assert abs(after["y"] - before["y"]) < 1
    page.locator(f"[data-key='{key}']").click()
    host.create("newest")
    expect(page.get_by_role("button", name="↑ 3 new")).to_be_visible()
    expect(page.locator(f"[data-key='{key}']")).to_be_focused()
    expect(page.locator(f"[data-key='{key}']")).to_have_attribute("aria-selected", "true")
    page.get_by_role("button", name="↑ 3 new").click()
    expect(rows(page).nth(0)).to_be_in_viewport()
    expect(rows(page).nth(0)).to_be_focused()
    expect(page.locator("#newer")).to_be_hidden()


def test_many_polls_are_few_lines(host: Host, open_page: Open) -> None:
    prediction = host.call("POST", "/models/acme/film/predictions", {"input": {}})["id"]
    seen: Counter[str] = Counter()
    for _ in range(45):
        seen[host.get(prediction)["status"]] += 1
        host.fake.clock.advance(1)
    assert min(seen[status] for status in ("starting", "processing", "succeeded")) > 2
    page = open_page()
    # All that see it in the same state are one line of the list, too.
    expect(rows(page)).to_have_count(4)
    for status, times in seen.items():
        expect(row(page, "predictions.get", status)).to_contain_text(f"\u00d7{times}")
    row(page, "models.predictions.create").click()
    expect(lines(page)).to_have_count(7)
    for status, times in seen.items():
        expect(lines(page).filter(has_text=f"{times} polls{status}")).to_be_visible()
    processing = lines(page).filter(has_text="pollsprocessing")
    expect(processing).to_have_attribute("aria-expanded", "false")
    processing.click()
    expect(processing).to_have_attribute("aria-expanded", "true")
    expect(lines(page)).to_have_count(7 + seen["processing"] * 2)
    page.keyboard.press("ArrowLeft")
    expect(lines(page)).to_have_count(7)
    page.keyboard.press("ArrowRight")
    page.keyboard.press("j")
    page.keyboard.press("Enter")
    expect(page.get_by_role("complementary", name="Details")).to_contain_text(
        "poll GET /v1/predictions/{prediction_id}"
    )


def test_spans_of_the_host_are_there_for_whoever_asks(host: Host, open_page: Open) -> None:
    class Instrumented:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            with host.provider.get_tracer("host").start_as_current_span(f"the host's {scope['method']}"):
                await self.app(scope, receive, send)

    host.app.middleware_stack = Instrumented(host.app.middleware_stack)
    host.create()
    page = open_page()
    row(page, "create").click()
    expect(lines(page)).to_have_count(2)
    page.get_by_role("button", name="1 span of the host").click()
    expect(lines(page)).to_have_count(3)
    assert kinds(page) == ["host", "create", "attempt"]
    expect(lines(page).first).to_contain_text("the host's POST")


def test_the_axis_zooms_to_what_is_drawn_on_it(host: Host, open_page: Open) -> None:
    host.story()
    page = open_page()
    row(page, "create").click()
    run = lines(page).filter(has_text="run").locator(".bar")
    expect(run).to_be_visible()
    axis, before = page.locator("#ticks").bounding_box(), run.bounding_box()
    assert axis is not None
    assert before is not None
    page.mouse.move(axis["x"] + axis["width"] / 2, axis["y"] + 10)
    page.mouse.down()
    page.mouse.move(axis["x"] + axis["width"] * 0.75, axis["y"] + 10)
    page.mouse.up()
    expect(page.get_by_role("button", name="Whole story")).to_be_visible()
    zoomed = run.bounding_box()
    assert zoomed is not None
    assert abs(zoomed["width"] - axis["width"]) < 8
    assert (
        lines(page).filter(has_text="queue").locator(".beyond").inner_text()
        == "\N{SINGLE LEFT-POINTING ANGLE QUOTATION MARK}"
    )
    page.get_by_role("button", name="Whole story").click()
    assert run.bounding_box() == before
    # There is an end to it.
    for _ in range(5):
        page.mouse.move(axis["x"] + axis["width"] / 2, axis["y"] + 10)
        page.mouse.down()
        page.mouse.move(axis["x"] + axis["width"] / 2 + 6, axis["y"] + 10)
        page.mouse.up()
    assert page.locator("#ticks span").count() > 1


def test_what_strangers_write_is_text(browser: Browser) -> None:
    hostile = FakeModel(owner="acme", name=IMAGE, run=lambda given: given["prompt"])
    with FakeReplicate(models=[hostile], queue_time=0.1, run_time=0.1).serve() as fake:
        host = Host(fake, evil=f"{SCRIPT}{IMAGE}")
        version = (hostile.versions or ())[0].id
        prompt = f'{IMAGE}{SCRIPT} {ADDRESS} \u202eevil\u202c \x00\x1b[31m "><svg onload=window.__pwned=1> {{{{7*7}}}}'
        words: dict[str, Any] = {
            "key": "pk-evil",
            "trace": IMAGE,
            "metadata": {"prompt": prompt, IMAGE: ADDRESS, "link": ADDRESS, "turned": "a\u202eb\u2066c\x07"},
            "user-agent": IMAGE,
        }
        with serving(host.app) as host.port, host.caller:
            created = host.call(
                "POST", "/predictions", {"version": version, "input": {"prompt": prompt, IMAGE: SCRIPT}}, **words
            )
            fake.clock.advance(1)
            assert host.get(created["id"], **words)["output"] == prompt
            host.call("GET", f"/predictions/{httpx.QueryParams({'x': IMAGE})}".replace("x=", ""), **words)
            host.call("GET", "/%3Cscript%3Ewindow.__pwned=1%3C/script%3E", **words)
            context = browser.new_context(viewport={"width": 1600, "height": 900})
            watched = Watched(context)
            page = watched.page
            page.goto(host.url)
            expect(rows(page)).to_have_count(4)
            create = row(page, "predictions.create")
            expect(create).to_contain_text(f"acme/{IMAGE}")
            expect(create.locator(".c-tenant")).to_have_text(f"{SCRIPT}{IMAGE}")
            expect(create.locator(".c-caller")).to_contain_text(f"{IMAGE}  ")
            expect(create.locator(".c-caller")).to_contain_text(f"link={ADDRESS}")
            expect(create.locator(".c-caller")).to_contain_text(r"turned=a\u202eb\u2066c\x07")
            create.click()
            expect(page.locator("#about")).to_contain_text(f"acme/{IMAGE}")
            for number in range(lines(page).count()):
                lines(page).nth(number).click()
                expect(page.locator("#details")).to_be_visible()
                if kinds(page)[number] == "run":
                    text = page.locator("#details").inner_text()
                    assert text.count(SCRIPT) >= 3  # tenant, input and output
                    assert "\u202e" not in text
            for one in row(page, "predictions.get").all():
                one.click()
                expect(lines(page).first).to_be_visible()
            page.get_by_role("button", name=f"link={ADDRESS}").first.click()
            expect(page.get_by_role("searchbox")).to_have_value(f"link={ADDRESS}")
            page.get_by_role("searchbox").fill(f"{IMAGE} nothing")
            expect(page.get_by_role("heading", name=f"Nothing matches “{IMAGE} nothing”")).to_be_visible()
            page.goto(f"{host.url}?q={IMAGE}#{SCRIPT}")
            expect(page.get_by_role("searchbox")).to_have_value(IMAGE)
            expect(rows(page)).to_have_count(4)
            # Whatever is a link leads to a story of this page, and no element came from a text.
            addresses = page.locator("a[href]").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
            assert [address for address in addresses if not re.fullmatch("#[0-9a-f]{32}", address)] == []
            assert page.locator("img, iframe, object, embed, svg:not(h1 svg), script:not(body > script)").count() == 0
            watched.assert_innocent(host)
            context.close()
        host.provider.shutdown()


def test_words_that_javascript_knows_are_words_and_deep_json_is_not_unfolded(host: Host, open_page: Open) -> None:
    deep = "[" * 4000 + "]" * 4000  # 32 MB with a line and its indent for each
    for word in ("constructor", "__proto__"):
        told = {
            **{names.PREDICTION_ID: word, names.PREDICTION_STATUS: word, names.OUTCOME: word, names.ERROR_TYPE: word},
            **{names.COST: 0.5, names.COST_CURRENCY: word, names.PORTKEY_METADATA + word: word, word: deep},
        }
        tracer = host.provider.get_tracer("replicate_proxy_mw")
        tracer.start_span(word, kind=SpanKind.SERVER, attributes=told).end()
    page = open_page(width=1600)
    for word in ("constructor", "__proto__"):
        cells = {"status": word, "prediction": word, "cost": f"0.50 {word}", "caller": f"{word}={word}"}
        for name, text in cells.items():
            expect(row(page, word).locator(f".c-{name}")).to_have_text(text)
        expect(row(page, word).locator(".prediction")).to_have_class("prediction quiet")
        row(page, word).click()
        expect(page.get_by_role("heading", name=word)).to_be_visible()
        lines(page).first.click()
        value = page.locator("#details tr", has_text=deep)
        expect(value).to_have_count(1)
        expect(value.locator("pre")).to_have_count(0)


def test_what_one_would_not_see_is_a_marked_escape(open_page: Open) -> None:
    page = open_page()
    shown = page.evaluate(
        """(texts) => texts.map((text) => {
            const node = put(document.createElement("p"), text);
            return [node.textContent, [...node.children].map((mark) => mark.className + mark.textContent).join(" ")];
        })""",
        ["plain", "a\u202eb", "\x1b[0m", "\u2066\ufeff\u00ad", "❤️ 👍", "\U000e0041", "<b>", ""],
    )
    assert shown == [
        ["plain", ""],
        [r"a\u202eb", r"escape\u202e"],
        [r"\x1b[0m", r"escape\x1b"],
        [r"\u2066\ufeff\xad", r"escape\u2066 escape\ufeff escape\xad"],
        ["❤️ 👍", ""],
        [r"\u{e0041}", r"escape\u{e0041}"],
        ["<b>", ""],
        ["", ""],
    ]


def test_times_and_money_are_readable(open_page: Open) -> None:
    page = open_page()
    for seconds, text in {
        **{0: "0", 0.0000004: "1 µs", 0.00034: "340 µs", 0.00999: "10 ms", 0.0042: "4.2 ms", 0.0999: "100 ms"},
        **{0.9996: "1.00 s", 1.5: "1.50 s", 12.34: "12.3 s", 59.97: "1 min 00 s", 125: "2 min 05 s"},
        **{3725: "1 h 02 min", 90000: "1 d 01 h", -0.1: "0"},
    }.items():
        assert page.evaluate("duration", seconds) == text
    for amount, currency, text in (
        *((0.00011, "USD", "$0.00011"), (0.0000001, "USD", "$0.0000001"), (1234.5, "USD", "$1234.50")),
        *((0.5, "USD", "$0.50"), (0.003, "EUR", "€0.003"), (0, None, "$0.00"), (0.0125, "SEK", "0.013 SEK")),
        *((None, "USD", ""), (0.99999, "USD", "$1.00")),
    ):
        assert page.evaluate("([amount, currency]) => money(amount, currency)", [amount, currency]) == text


CONTRAST = """(selectors) => {
    const part = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const rgb = (text) => {
        const numbers = text.match(/[\\d.]+/g).map(Number);
        return text.startsWith("color(") ? numbers : [...numbers.slice(0, 3).map((one) => one / 255), numbers[3] ?? 1];
    };
    const light = ([red, green, blue]) => 0.2126 * part(red) + 0.7152 * part(green) + 0.0722 * part(blue);
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const colour = rgb(getComputedStyle(node).backgroundColor);
            if (colour[3] !== 0) return colour;
        }
    };
    const ratio = (one, other) => {
        const [low, high] = [light(one), light(other)].sort((a, b) => a - b);
        return (high + 0.05) / (low + 0.05);
    };
    return selectors.flatMap(([selector, property, pseudo]) => [...document.querySelectorAll(selector)].map((node) => {
        const colour = rgb(getComputedStyle(node, pseudo ?? null)[property]);
        return [selector, ratio(colour, behind(property === "color" ? node : node.parentElement))];
    }));
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_there_is_enough_contrast(scheme: Literal["light", "dark"], host: Host, open_page: Open) -> None:
    host.story(metadata={"team": "design"})
    prediction = host.call("POST", "/models/acme/film/predictions", {"input": {}})["id"]
    host.call("POST", f"/predictions/{prediction}/cancel")
    for _ in range(3):
        host.get(prediction)
    host.fake.fail(503, operation="predictions.get")
    host.get(prediction)
    host.call("GET", "/models", key="pk-of-nobody")
    page = open_page(scheme=scheme, width=1600)
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(246, 246, 244)" if scheme == "light" else "rgb(17, 19, 22)"
    )
    texts: list[list[str]] = [[f"#rows .c-{name}", "color"] for name in ("time", "operation", "tenant", "caller")]
    texts += [["#q", "color", "::placeholder"], ["#count", "color"], [".head span", "color"], ["button", "color"]]
    texts += [[f".{name}", "color"] for name in ("ok", "warn", "bad", "times", "route", "status")]
    row(page, "models.predictions.create").click()
    expect(lines(page).filter(has_text="polls")).to_be_visible()
    lines(page).first.click()
    page.evaluate("put(document.querySelector('#omitted'), 'a\\u202eb')")
    texts += [[selector, "color"] for selector in ("#about", "dt", "dd span", ".kind", ".name", ".took", "#ticks span")]
    texts += [[selector, "color"] for selector in ("#details th span", "#details td", "#details a", "h4", ".escape")]
    found = page.evaluate(CONTRAST, texts)
    assert {selector for selector, _ in found} == {selector for selector, *_ in texts}
    assert [(selector, ratio) for selector, ratio in found if ratio < 4.5] == []
    bars = page.evaluate(CONTRAST, [[".line .dot", "backgroundColor"]])
    assert len(bars) > 4
    assert [ratio for _, ratio in bars if ratio < 3] == []


@pytest.mark.parametrize("width", [360, 768, 1600])
def test_nothing_is_wider_than_the_window(width: int, host: Host, open_page: Open) -> None:
    host.story("a" * 400, metadata={"team": "b" * 200}, trace="c" * 200)
    host.call("GET", "/predictions/" + "d" * 200)
    page = open_page(width=width, height=740)
    expect(rows(page)).to_have_count(3)

    def too_wide() -> list[str]:
        found: list[str] = page.evaluate(
            """() => [document.documentElement, ...document.querySelectorAll(".scroller, #details, .story-head")]
                .filter((node) => node.scrollWidth > node.clientWidth).map((node) => node.id || node.className)"""
        )
        return found

    assert too_wide() == []
    row(page, "create").click()
    expect(lines(page)).to_have_count(6)
    lines(page).filter(has_text="run").click()
    expect(page.locator("#details")).to_be_visible()
    assert too_wide() == []
    for line in lines(page).all():
        bar = line.locator(".bar").bounding_box()
        assert bar is not None
        assert bar["x"] >= 0
        assert bar["x"] + bar["width"] <= width
    if width < 1000:  # the story is before the list, which nobody tabs into meanwhile
        assert page.locator("#list").evaluate("node => node.inert")
        page.get_by_role("button", name="Close the story").click()
        expect(row(page, "create")).to_be_focused()


def test_an_empty_list_says_what_to_do(host: Host, open_page: Open) -> None:
    page = open_page()
    expect(page.get_by_role("heading", name="No requests yet")).to_be_visible()
    expect(page.locator("#empty pre")).to_contain_text(f"curl http://127.0.0.1:{host.port}/v1/predictions")
    host.create()
    expect(rows(page)).to_have_count(1)
    expect(page.locator("#empty")).to_be_hidden()


def test_a_server_that_is_gone_is_said_and_found_again(browser: Browser) -> None:
    with FakeReplicate().serve() as fake, ExitStack() as stack:
        host = Host(fake, design="design")
        stack.callback(host.provider.shutdown)
        stack.enter_context(host.caller)
        context = browser.new_context()
        stack.callback(context.close)
        page = context.new_page()
        with serving(host.app) as host.port:
            port = host.port
            host.create()
            page.goto(host.url)
            expect(rows(page)).to_have_count(1)
            row(page, "create").click()
            expect(lines(page)).to_have_count(2)
        expect(page.locator("#state")).to_have_text("Disconnected")
        banner = page.get_by_role("alert")
        expect(banner).to_have_text(
            re.compile(r"^The server does not answer\. What you see is from \d\d:\d\d:\d\d\. This page tries again")
        )
        expect(rows(page)).to_have_count(1)
        expect(lines(page)).to_have_count(2)
        # As after a restart: nothing of before is known there.
        other = Host(fake, web="checkout")
        stack.callback(other.provider.shutdown)
        stack.enter_context(other.caller)
        with serving(other.app, port) as other.port:
            other.create(key="pk-web")
            expect(page.locator("#state")).to_have_text("Live")
            expect(banner).to_be_hidden()
            expect(row(page, "checkout")).to_have_count(1)
            expect(row(page, "design")).to_have_count(0)
            expect(lines(page)).to_have_count(2)
