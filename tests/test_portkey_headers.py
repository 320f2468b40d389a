"""Every header that the documentation lists, sent through the proxy: it does what is said there and stays here."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from replicate_proxy_mw import KeyRequest
from tests.raw_asgi import KEY, TOKEN, Caller, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream

DOCUMENTED = Path(__file__).parent.parent.joinpath("docs", "portkey-headers.md").read_text(encoding="utf-8")
REQUEST, ANSWER = DOCUMENTED.split("## In answers")


@dataclass
class Seen:
    """What came of one request."""

    caller: Caller
    asked: KeyRequest | None
    spans: tuple[ReadableSpan, ...]

    def on_all_spans(self, name: str, value: str) -> bool:
        return len(self.spans) == 2 and all((span.attributes or {}).get(name) == value for span in self.spans)

    def asked_with(self, name: str, value: object) -> bool:
        return self.caller.status == 200 and getattr(self.asked, name) == value


def _passes(seen: Seen) -> bool:
    return seen.caller.status == 200


def _refused(seen: Seen) -> bool:
    return seen.caller.status == 400


HEADERS: dict[str, tuple[str, Callable[[Seen], bool]]] = {
    "x-portkey-api-key": ("pk-team-a", lambda seen: seen.asked_with("api_key", "pk-team-a")),
    "x-portkey-provider": ("@team", lambda seen: seen.asked_with("provider", "@team")),
    "x-portkey-virtual-key": ("replicate-abc", lambda seen: seen.asked_with("virtual_key", "replicate-abc")),
    "x-portkey-config": ("pc-slug", lambda seen: seen.asked_with("config", "pc-slug")),
    "x-portkey-trace-id": (
        "order-42",
        lambda seen: (
            seen.on_all_spans("portkey.trace_id", "order-42")
            and seen.caller.header(b"x-portkey-trace-id") == [b"order-42"]
        ),
    ),
    "x-portkey-span-id": ("s", lambda seen: seen.on_all_spans("portkey.span_id", "s")),
    "x-portkey-parent-span-id": ("p", lambda seen: seen.on_all_spans("portkey.parent_span_id", "p")),
    "x-portkey-span-name": ("n", lambda seen: seen.on_all_spans("portkey.span_name", "n")),
    "x-portkey-metadata": (
        '{"_user": "u1"}',
        lambda seen: seen.on_all_spans("portkey.metadata._user", "u1") and seen.asked_with("metadata", {"_user": "u1"}),
    ),
    "x-portkey-request-timeout": ("50", lambda seen: seen.caller.status == 408),
    "x-portkey-cache": ("simple", _passes),
    "x-portkey-cache-force-refresh": (
        "true",
        lambda seen: seen.caller.header(b"x-portkey-cache-status") == [b"DISABLED"],
    ),
    "x-portkey-cache-namespace": ("mine", _passes),
    "x-portkey-debug": ("false", _passes),
    "x-portkey-sensitive-headers": ("x-mine", _passes),
    "x-portkey-custom-host": ("https://evil.test", _refused),
    "x-portkey-forward-headers": ("x-mine,cookie,authorization", _passes),
    "x-portkey-mode": ("proxy replicate", lambda seen: seen.asked_with("provider", "replicate")),
    "x-portkey-retry-count": ("5", _passes),
    "x-portkey-strict-open-ai-compliance": ("false", _passes),
    "x-portkey-package-version": ("portkey-2.3.4", _passes),
    "x-portkey-runtime": ("CPython", _passes),
    "x-portkey-runtime-version": ("3.11.7", _passes),
    "x-portkey-fetch-integrated-models": ("true", _passes),
    "x-portkey-default-input-guardrails": ("[", _passes),
    "x-portkey-default-output-guardrails": ("[]", _passes),
    "x-portkey-aws-secret-access-key": ("hunter2", _passes),
}


def test_the_documentation_lists_what_is_tested_here() -> None:
    assert re.findall(r"^\| `(x-portkey-[\w-]+)`", REQUEST, re.MULTILINE) == list(HEADERS)


@pytest.mark.anyio
@pytest.mark.parametrize("name", HEADERS)
async def test_a_header_does_what_is_said(
    upstream: RawUpstream, tracer_provider: TracerProvider, exporter: InMemorySpanExporter, name: str
) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            if name == "x-portkey-request-timeout":
                connection.wait_closed()
            connection.answer()

    upstream.script = script
    asked: list[KeyRequest] = []

    async def resolver(request: KeyRequest) -> str:
        asked.append(request)
        return TOKEN

    value, as_said = HEADERS[name]
    sent = {KEY[0]: KEY[1], name.encode(): value.encode(), b"x-mine": b"1", b"cookie": b"sid=1"}
    app = proxy(upstream.url, key_resolver=resolver, tracer_provider=tracer_provider)
    caller = await call(app, http_scope("POST", "/v1/predictions", list(sent.items())))
    assert as_said(Seen(caller, asked[0] if asked else None, exporter.get_finished_spans()))
    for received in upstream.requests:
        framing = {b"host", b"content-length", b"accept-encoding", b"via"}
        assert {field for field, _ in received.headers} == {*framing, b"authorization"}
        assert received.header(b"authorization") == [b"Bearer " + TOKEN.encode()]


@pytest.mark.anyio
async def test_only_what_the_host_lists_is_forwarded(upstream: RawUpstream) -> None:
    headers = [KEY, (b"x-portkey-forward-headers", b"x-mine,x-other"), (b"x-mine", b"1"), (b"x-other", b"2")]
    options: dict[str, Any] = {"forward_headers": ["X-Mine"]}
    await call(proxy(upstream.url, options=options), http_scope(headers=headers))
    assert (upstream.requests[0].header(b"x-mine"), upstream.requests[0].header(b"x-other")) == ([b"1"], [])


@pytest.mark.anyio
async def test_the_documentation_lists_what_answers_carry(upstream: RawUpstream) -> None:
    documented = {name.encode() for name in re.findall(r"^\| `(x-portkey-[\w-]+)`", ANSWER, re.MULTILINE)}
    carried = {name for name, _ in (await call(proxy(upstream.url), http_scope())).headers}
    carried |= {name for name, _ in (await call(proxy(upstream.url), http_scope(headers=[]))).headers}
    assert {name for name in carried if name.startswith(b"x-portkey-")} == documented
