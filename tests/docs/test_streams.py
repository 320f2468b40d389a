"""What the page on streams shows is run as it stands there, but for the host that streams come from."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import pytest

from replicate_proxy_mw import MappingKeyResolver, ProxyConfig, ReplicateProxyMiddleware
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.documents import Page, execute

PAGE = Page("docs/streams.md")
KEY, MODEL = "pk-for-the-designers", "meta/meta-llama-3-8b-instruct"


async def host(scope: object, receive: object, send: object) -> None:
    raise AssertionError("not called")


def _streamed(config: ProxyConfig) -> tuple[str, str, httpx.Response]:
    """The proxy's own URL, `urls.stream` of a create, and what is read there without a key."""
    with FakeReplicate(queue_time=0.0, run_time=0.01).serve() as fake:
        config = replace(config, upstream=fake.url, stream_hosts=[urlsplit(fake.streams_url).netloc])
        resolver = MappingKeyResolver({KEY: fake.token})
        app = ReplicateProxyMiddleware(host, key_resolver=resolver, config=config)
        with serve(app, lifespan="off") as served:
            created = httpx.post(
                f"{served.url}/v1/models/{MODEL}/predictions",
                json={"input": {"prompt": "Hello"}},
                headers={"x-portkey-api-key": KEY},
            )
            url = created.json()["urls"]["stream"]
            read = httpx.get(url, headers={"accept": "text/event-stream"})
    return served.url, url, read


def test_with_it_streams_are_read_through_the_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    made = subprocess.run(["sh", "-c", PAGE.block("sh", "secrets")], capture_output=True, text=True, check=True)
    monkeypatch.setenv("STREAM_KEY", made.stdout.strip())
    served, url, read = _streamed(execute(PAGE.block("python", "proxy_streams=True"))["config"])
    assert url.startswith(f"{served}/v1/-/streams/")
    assert read.headers["content-type"] == "text/event-stream"
    assert "event: done" in read.text


def test_without_it_they_are_read_from_replicate() -> None:
    served, url, read = _streamed(ProxyConfig())
    assert not url.startswith(served)
    assert "event: done" in read.text


def test_a_stream_url_needs_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STREAM_KEY", "short")
    with pytest.raises(ValueError, match="stream_key: must have at least 32 characters"):
        execute(PAGE.block("python", "proxy_streams=True"))


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert (PAGE.count("python"), PAGE.count("sh"), len(PAGE.code)) == (1, 1, 2)
    assert PAGE.missing_links() == []
