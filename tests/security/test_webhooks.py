"""What is believed of a delivery is what its signature proves, and once."""

from __future__ import annotations

import hmac
import json
import time
from dataclasses import replace
from typing import Any

import pytest

from replicate_proxy_mw import Forward, PermissionDenied, ProxyRequest, ProxyResponse
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.testing.webhooks import sign
from tests.raw_asgi import KEY, Caller, call, http_scope, proxy
from tests.raw_upstream import RawUpstream
from tests.security.refusals import told
from tests.security.rows import row
from tests.tenants import JSON
from tests.webhooks import Host

pytestmark = pytest.mark.anyio

# The example of the Standard Webhooks specification, and that of Replicate's client for Python.
SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
OTHER = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
BODY = b'{"id": "p1", "status": "succeeded"}'


def _app(host: Host) -> Any:
    return proxy("http://127.0.0.1:1", options={"webhook_secrets": [SECRET]}, on_webhook=host)


def _headers(
    *secrets: str, body: bytes = BODY, id: str = "msg_1", late: float = 0.0, before: str = ""
) -> list[tuple[bytes, bytes]]:
    at = str(int(time.time() - late))
    signatures = " ".join(sign(secret, id, at, body) for secret in secrets or (SECRET,))
    return [
        (b"webhook-id", id.encode()),
        (b"webhook-timestamp", at.encode()),
        (b"webhook-signature", (before + signatures).encode()),
    ]


async def _deliver(app: Any, headers: list[tuple[bytes, bytes]], *body: bytes) -> Caller:
    return await call(app, http_scope("POST", "/v1/-/webhooks", headers), *(body or (BODY,)))


@row("2.29")
@pytest.mark.parametrize("before", ["", "v1,AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA= v1a,zzz "])
async def test_any_right_signature_will_do(before: str) -> None:
    host = Host()
    assert (await _deliver(_app(host), _headers(OTHER, SECRET, before=before), BODY[:9], BODY[9:])).status == 204
    assert [event.body for event in host.events] == [BODY]


@row("2.29")
@pytest.mark.parametrize(
    ("headers", "body", "answer"),
    [
        (_headers(OTHER), BODY, (401, "webhook_unverified")),
        (_headers(), BODY.replace(b"p1", b"p2"), (401, "webhook_unverified")),
        (_headers(), BODY + b" ", (401, "webhook_unverified")),
        ([(b"webhook-id", b"msg_2"), *_headers()[1:]], BODY, (401, "webhook_unverified")),
        ([*_headers()[:2], (b"webhook-signature", b"v1,")], BODY, (401, "webhook_unverified")),
        (_headers()[:2], BODY, (400, "webhook_unsigned")),
        ([KEY], BODY, (400, "webhook_unsigned")),
        ([*_headers(), _headers(OTHER)[2]], BODY, (400, "bad_request")),
    ],
)
async def test_what_is_not_signed_is_not_believed(
    headers: list[tuple[bytes, bytes]], body: bytes, answer: tuple[int, str]
) -> None:
    host = Host()
    assert told(await _deliver(_app(host), headers, body)) == answer
    assert host.events == []


@row("2.29")
@pytest.mark.parametrize("late", [310.0, -310.0])
async def test_a_delivery_is_good_for_five_minutes(late: float) -> None:
    host = Host()
    assert told(await _deliver(_app(host), _headers(late=late))) == (401, "webhook_unverified")
    assert (await _deliver(_app(host), _headers(late=late * 0.9))).status == 204
    assert len(host.events) == 1


@row("2.29")
async def test_a_delivery_is_taken_once() -> None:
    host = Host()
    app = _app(host)
    assert (await _deliver(app, _headers())).status == 204
    for late in (0.0, 1.0):
        assert told(await _deliver(app, _headers(late=late))) == (409, "webhook_replayed")
    assert len(host.events) == 1


@row("2.29")
async def test_more_than_8_mib_are_not_read() -> None:
    host = Host()
    caller = Caller([bytes(1 << 20)] * 16)
    app = _app(host)
    await caller.call(app, http_scope("POST", "/v1/-/webhooks", _headers()))
    assert told(caller) == (413, "body_too_large")
    assert caller.received < 16
    assert host.events == []


@row("2.29")
async def test_every_signature_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[bytes] = []
    compare_digest = hmac.compare_digest

    def counting(expected: Any, given: Any) -> bool:
        compared.append(given)
        return compare_digest(expected, given)

    monkeypatch.setattr(hmac, "compare_digest", counting)
    headers = _headers(SECRET, OTHER, OTHER)
    assert (await _deliver(_app(Host()), headers)).status == 204
    assert compared == headers[2][1].split(b" ")


@row("2.30")
async def test_a_webhook_in_a_create_is_the_caller_s_request_to_replicate(upstream: RawUpstream) -> None:
    body = json.dumps({"version": "v", "input": {}, "webhook": "https://elsewhere.example/x"}).encode()
    caller = await call(proxy(upstream.url), http_scope("POST", "/v1/predictions", [KEY, JSON]), body)
    assert caller.status == 200
    # Replicate calls it, we do not: one request has left, to upstream.
    assert [received.body for received in upstream.requests] == [body]
    assert len(upstream.connections) == 1


def _no_webhooks(forward: Forward) -> Forward:
    """A layer of a host that lets nobody have results sent elsewhere."""

    async def checked(request: ProxyRequest) -> ProxyResponse:
        body = b"".join([chunk async for chunk in request.body])
        if body and "webhook" in json.loads(body):
            raise PermissionDenied("webhook: not from here.")
        return await forward(replace(request, body=Chunks([body]), content_length=len(body)))

    return checked


@row("2.30")
async def test_a_host_may_refuse_webhooks_in_creates(upstream: RawUpstream) -> None:
    app = proxy(upstream.url, layers=[_no_webhooks])
    for body, status in ((b'{"webhook": "https://elsewhere.example/x"}', 403), (b'{"input": {}}', 200)):
        assert (await call(app, http_scope("POST", "/v1/predictions", [KEY, JSON]), body)).status == status
    assert len(upstream.requests) == 1
