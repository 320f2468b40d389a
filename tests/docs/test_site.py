"""The site that scripts/site builds: strict about links, from no other host, searchable, readable on a phone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.clients.drivers import require
from tests.documents import ROOT

# The build and the look at all pages take seconds, and many times that on a busy machine.
pytestmark = pytest.mark.timeout(180)

# A configuration of its own that differs from the site's in what it has to.
SMALL = """INHERIT: {root}/mkdocs.yml
docs_dir: pages
site_dir: site
hooks: [{root}/scripts/site_hook.py]
plugins: [search]
extra_css: []
watch: []
nav: [index.md]
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("site") / "built"
    built = subprocess.run([ROOT / "scripts/site", folder], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    assert "MkDocs 2" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def url(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    require("chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium")
        yield browser
        browser.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


class Watch:
    """What a page does that it should not: requests that fail or go elsewhere, and errors."""

    def __init__(self, page: Page, url: str) -> None:
        self.seen: list[str] = []
        self.wrong: list[str] = []
        self._origin = urlsplit(url)[:2]
        page.on("request", lambda request: self._requested(request.url))
        page.on("response", lambda response: self._answered(response.url, response.status))
        page.on("requestfailed", lambda request: self._failed(request.url, request.failure))
        page.on("console", lambda message: self.wrong.extend([message.text] * (message.type == "error")))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("websocket", lambda socket: self.wrong.append(socket.url))

    def _requested(self, url: str) -> None:
        self.seen.append(url)
        if urlsplit(url)[:2] != self._origin and not url.startswith(("data:", "blob:")):
            self.wrong.append(f"elsewhere: {url}")

    def _failed(self, url: str, why: str | None) -> None:
        if why != "net::ERR_ABORTED":  # by the next page
            self.wrong.append(f"{why}: {url}")

    def _answered(self, url: str, status: int) -> None:
        if status >= 400:
            self.wrong.append(f"{status}: {url}")


def _pages(site: Path) -> list[str]:
    return sorted(path.name for path in site.glob("*.html") if path.name != "404.html")


def test_no_page_asks_another_host_or_fails(site: Path, url: str, chromium: Browser) -> None:
    context = chromium.new_context(viewport={"width": 390, "height": 844})
    page = context.new_page()
    watch = Watch(page, url)
    pages = _pages(site)
    assert {"index.html", "keys.html", "api.html", "security.html"} <= {*pages}
    too_wide = []
    for path in pages:
        page.goto(url + path, wait_until="load")
        # Tables and code scroll by themselves; a page that is wider than a phone cannot be read.
        if page.evaluate("document.documentElement.scrollWidth > window.innerWidth"):
            too_wide.append(path)
    context.close()
    assert watch.wrong == []
    assert too_wide == []
    assert len(watch.seen) > len(pages)


def test_the_watch_sees_what_is_wrong(url: str, chromium: Browser) -> None:
    context = chromium.new_context()
    page = context.new_page()
    watch = Watch(page, url)
    page.goto(url)
    page.evaluate("fetch('/not-there'); fetch('http://localhost:9/').catch(() => {}); console.error('loud')")
    page.evaluate("setTimeout(() => { throw new Error('thrown') })")
    page.wait_for_timeout(100)
    context.close()
    assert "elsewhere: http://localhost:9/" in watch.wrong
    assert {"loud", f"404: {url}not-there"} <= {*watch.wrong}
    assert any("thrown" in wrong for wrong in watch.wrong)


def test_search_finds_an_option_and_leads_there(url: str, chromium: Browser) -> None:
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    watch = Watch(page, url)
    page.goto(url + "keys.html")
    page.get_by_role("textbox", name="Search").fill("body_timeout")
    found = page.locator(".md-search-result__link", has_text="body_timeout").first
    expect(found).to_be_visible()
    found.click()
    expect(page.locator("mark", has_text="body_timeout").first).to_be_visible()
    context.close()
    assert watch.wrong == []


@pytest.mark.parametrize(("scheme", "expected"), [("light", "default"), ("dark", "slate")])
def test_the_palette_is_the_system_s(url: str, chromium: Browser, scheme: Any, expected: str) -> None:
    context = chromium.new_context(color_scheme=scheme)
    page = context.new_page()
    page.goto(url + "keys.html")
    assert page.locator("body").get_attribute("data-md-color-scheme") == expected
    context.close()


def test_code_can_be_copied(url: str, chromium: Browser) -> None:
    context = chromium.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto(url + "configuration.html")
    code = page.locator("pre").first
    code.hover()
    page.get_by_title("Copy to clipboard").first.click()
    expect(page.get_by_text("Copied to clipboard")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()").startswith("from fastapi import FastAPI\n")
    context.close()


def test_every_page_and_file_of_docs_is_there(site: Path) -> None:
    for path in (ROOT / "docs").rglob("*"):
        if path.is_file() and path.suffix != ".py":
            name = path.relative_to(ROOT / "docs")
            assert (site / (name.with_suffix(".html") if name.suffix == ".md" else name)).is_file(), name
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    assert any(entry["location"] == "errors.html#key_missing" for entry in index["docs"])


def test_every_page_with_code_has_a_test_that_runs_it() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    pages = [path for path in (ROOT / "docs").glob("*.md") if "\n```" in path.read_text(encoding="utf-8")]
    assert len(pages) > 10
    assert [path.name for path in pages if f'"docs/{path.name}"' not in tests] == []


def test_what_leads_nowhere_fails_the_build(tmp_path: Path) -> None:
    text = "# A\n\n[a](b.md) [c](#d) [e](other.md#f) [g](../h.py) [i](/j)\n"
    built = _build(tmp_path, {"index.md": text, "other.md": "# Other\n"})
    assert built.returncode == 1
    assert "Aborted with 6 warnings in strict mode!" in built.stdout
    for what in (
        "a link '../h.py', but the target is not found",
        "a link 'b.md', but the target is not found",
        "a link '#d', but there is no such anchor",
        "a link 'other.md#f', but the doc 'other.md' does not contain an anchor '#f'",
        "contains an absolute link '/j'",
        'not included in the "nav" configuration',
    ):
        assert what in built.stderr


LEAVING = """# A

[`thing`](../src/a.py) [the *file*](../src/a.py#L3) [src/a.py](../src/a.py) [its `code`](../src/a.py)
[a folder of it](../src/)
[here](#a) [elsewhere](https://example.org/)

    [in code](../src/a.py)
"""


def test_links_that_leave_are_plain_without_a_repository(tmp_path: Path) -> None:
    html = _built(tmp_path, LEAVING, "")
    assert "<code>thing</code>" in html
    assert "<span>the <em>file</em> (<code>src/a.py</code>)</span>" in html
    assert "<span><code>src/a.py</code></span>" in html
    assert "<span>its <code>code</code> (<code>src/a.py</code>)</span>" in html
    assert "<span>a folder of it (<code>src</code>)</span>" in html
    assert "../src" not in html.replace("[in code](../src/a.py)", "")


def test_links_that_leave_lead_to_the_repository(tmp_path: Path) -> None:
    html = _built(tmp_path, LEAVING, "repo_url: https://github.com/OWNER/NAME/\n")
    blob = "https://github.com/OWNER/NAME/blob/HEAD/src"
    assert f'<a href="{blob}/a.py"><code>thing</code></a>' in html
    assert f'<a href="{blob}/a.py#L3">the <em>file</em></a>' in html
    assert f'<a href="{blob}">a folder of it</a>' in html
    assert "[in code](../src/a.py)" in html
    # Of a repository that it knows the theme asks GitHub for its stars.
    assert 'data-md-component="source"' not in html


def test_a_folder_with_something_in_it_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("all of it")
    for arguments in ([tmp_path], [], ["--help"], [tmp_path, "more"]):
        assert subprocess.run([ROOT / "scripts/site", *arguments], capture_output=True).returncode == 2
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def _built(folder: Path, text: str, more: str) -> str:
    (folder / "src").mkdir()
    (folder / "src" / "a.py").touch()
    built = _build(folder, {"index.md": text}, more)
    assert built.returncode == 0, built.stderr
    return (folder / "site" / "index.html").read_text(encoding="utf-8")


def _build(folder: Path, pages: dict[str, str], more: str = "") -> subprocess.CompletedProcess[str]:
    (folder / "pages").mkdir()
    for name, text in pages.items():
        (folder / "pages" / name).write_text(text, encoding="utf-8")
    (folder / "mkdocs.yml").write_text(SMALL.format(root=ROOT) + more, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict"],
        cwd=folder,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
