from __future__ import annotations

import base64
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks.webhooks import Webhook

from replicate_proxy_mw.egress import Reply, render
from replicate_proxy_mw.endpoints import webhooks
from replicate_proxy_mw.endpoints.webhooks import OnWebhook, WebhookEndpoint, WebhookEvent
from replicate_proxy_mw.errors import (
    BadRequest,
    BodyTooLarge,
    ClientDisconnected,
    MethodNotAllowed,
    Overloaded,
    PermissionDenied,
    ProxyError,
    WebhookFailed,
    WebhookReplayed,
    WebhookUnsigned,
    WebhookUnverified,
)
from replicate_proxy_mw.exchange import Chunks, ProxyResponse
from replicate_proxy_mw.headers import HeaderList
from replicate_proxy_mw.ingress import RequestBody, while_connected
from replicate_proxy_mw.store import Ledger, MemoryPredictionStore, StoredPrediction
from replicate_proxy_mw.testing import FakeReplicate, ManualClock
from replicate_proxy_mw.testing.webhooks import sign
from tests.tracebacks import locals_of

# the example of the Standard Webhooks specification, and that of Replicate's client for Python
from tests.webhooks import Host

SECRET = "whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD"
OTHER = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
NOW = 1_790_000_000
STREAM = "https://stream.replicate.com/v1/files/opaque"
BODY = json.dumps({"id": "p1", "status": "succeeded", "urls": {"stream": STREAM}}).encode()
VERSION = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def endpoint(
    on_event: OnWebhook | None = None,
    *,
    secrets: Sequence[str] = (SECRET,),
    timeout: float = 5.0,
    ledger: Ledger | None = None,
    now: Callable[[], float] = lambda: float(NOW),
) -> WebhookEndpoint:
    return WebhookEndpoint(secrets=secrets, on_event=on_event, timeout=timeout, ledger=ledger, now=now)


def signed(body: bytes = BODY, *, id: str = "msg_1", at: object = NOW, secret: str = SECRET) -> HeaderList:
    signature = sign(secret, id, str(at), body)
    return headers_of(id.encode(), str(at).encode(), signature.encode())


def headers_of(id: bytes, timestamp: bytes, signature: bytes) -> HeaderList:
    return ((b"webhook-id", id), (b"webhook-timestamp", timestamp), (b"webhook-signature", signature))


async def deliver(
    made: WebhookEndpoint, headers: HeaderList | None = None, body: bytes = BODY
) -> tuple[ProxyResponse, Mapping[str, Any]]:
    halves = Chunks([body[: len(body) // 2], body[len(body) // 2 :]])
    return await made.answer(method="POST", headers=signed(body) if headers is None else headers, body=halves)


async def unread() -> AsyncIterator[bytes]:
    raise AssertionError("the body was not to be read")
    yield b""


@pytest.mark.anyio
async def test_a_delivery_is_handed_to_the_host() -> None:
    host = Host()
    answer, prediction = await deliver(endpoint(host))
    assert (answer.status, answer.headers, [chunk async for chunk in answer.body]) == (204, (), [])
    assert prediction == json.loads(BODY)
    assert host.events == [WebhookEvent(id="msg_1", sent_at=float(NOW), prediction=json.loads(BODY), body=BODY)]
    assert repr(host.events[0]) == "WebhookEvent(id='msg_1', sent_at=1790000000.0)"


@pytest.mark.anyio
async def test_without_a_callback_it_is_verified_and_taken_all_the_same() -> None:
    made = endpoint()
    assert (await deliver(made))[1]["id"] == "p1"
    with pytest.raises(WebhookReplayed):
        await deliver(made)
    with pytest.raises(WebhookUnverified):
        await deliver(made, signed(b"{}"))


@pytest.mark.anyio
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "OPTIONS", "post"])
async def test_any_other_method_is_refused(method: str) -> None:
    with pytest.raises(MethodNotAllowed) as raised:
        await endpoint().answer(method=method, headers=signed(), body=unread())
    assert raised.value.headers == ((b"allow", b"POST"),)


def _with(name: bytes, value: bytes) -> HeaderList:
    return tuple((key, value if key == name else old) for key, old in signed())


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("headers", "error"),
    [
        ((), WebhookUnsigned),
        (signed()[:2], WebhookUnsigned),
        (signed()[1:], WebhookUnsigned),
        ((signed()[0], signed()[2]), WebhookUnsigned),
        ((*signed(), signed()[0]), BadRequest),
        ((*signed(), signed()[1]), BadRequest),
        ((*signed(), (b"webhook-signature", b"v1,x")), BadRequest),
        (signed(id=""), BadRequest),
        (signed(id="m" * 257), BadRequest),
        (signed(id="msg 1"), BadRequest),
        (signed(id="msg\n"), BadRequest),
        (signed(id="msg_é"), BadRequest),
        (signed(at=""), BadRequest),
        (signed(at=f"0{NOW}"), BadRequest),
        (signed(at=f"-{NOW}"), BadRequest),
        (signed(at=f"{NOW}.0"), BadRequest),
        (signed(at="1_790_000_000"), BadRequest),
        (signed(at="9" * 13), BadRequest),
        (_with(b"webhook-timestamp", "١٧٩٠٠٠٠٠٠٠".encode()), BadRequest),
        (_with(b"webhook-signature", signed()[2][1] + b" v1,x" * 1000), BadRequest),
        ((*signed(), (b"content-length", b"many")), BadRequest),
        ((*signed(), (b"content-length", b"8388609")), BodyTooLarge),
        (signed(at=NOW - 301), WebhookUnverified),
        (signed(at=NOW + 301), WebhookUnverified),
        (_with(b"webhook-signature", b""), WebhookUnverified),
        (_with(b"webhook-signature", signed()[2][1][3:]), WebhookUnverified),
        (_with(b"webhook-signature", signed()[2][1].replace(b"v1", b"v2")), WebhookUnverified),
        (_with(b"webhook-signature", signed()[2][1].replace(b"v1", b"v1a")), WebhookUnverified),
        (_with(b"webhook-signature", signed()[2][1].replace(b"=", b"")), WebhookUnverified),
        (_with(b"webhook-signature", signed()[2][1].replace(b",", b", ")), WebhookUnverified),
        (_with(b"webhook-signature", b"v1,***"), WebhookUnverified),
    ],
)
async def test_what_headers_tell_costs_no_body(headers: HeaderList, error: type[ProxyError]) -> None:
    with pytest.raises(error) as raised:
        await endpoint(Host()).answer(method="POST", headers=headers, body=unread())
    if error is WebhookUnverified:
        assert dict(raised.value.headers)[b"www-authenticate"]


@pytest.mark.anyio
@pytest.mark.parametrize("at", [NOW - 300, NOW + 300])
async def test_clocks_may_differ_by_five_minutes(at: int) -> None:
    assert (await deliver(endpoint(), signed(at=at)))[0].status == 204


@pytest.mark.anyio
async def test_another_split_of_the_signed_bytes_is_refused() -> None:
    body = b"ends.1790000001.{}"
    (_, timestamp, signature) = (value for _, value in signed(body))
    moved = headers_of(b"msg_1." + timestamp + b".ends", b"1790000001", signature)
    assert sign(SECRET, "msg_1", str(NOW), body) == sign(SECRET, f"msg_1.{NOW}.ends", "1790000001", b"{}")
    with pytest.raises(BadRequest):
        await deliver(endpoint(), moved, b"{}")


@given(st.data())
@settings(deadline=None)
@pytest.mark.anyio
async def test_any_change_of_one_byte_is_refused(data: st.DataObject) -> None:
    host = Host()
    made = endpoint(host)
    parts = [*(value for _, value in signed()), BODY]
    which = data.draw(st.integers(0, 3))
    where = data.draw(st.integers(0, len(parts[which]) - 1))
    old = parts[which][where]
    new = data.draw(st.integers(0, 255).filter(lambda byte: byte != old))
    parts[which] = parts[which][:where] + bytes([new]) + parts[which][where + 1 :]
    with pytest.raises((BadRequest, WebhookUnverified)):
        await deliver(made, headers_of(*parts[:3]), parts[3])
    assert host.events == []
    await deliver(made)
    assert len(host.events) == 1


def lib_verifies(secret: str, headers: HeaderList, signature: str, body: bytes) -> bool:
    given = {name.decode(): value.decode() for name, value in headers} | {"webhook-signature": signature}
    try:
        Webhook(secret).verify(body, given)
    except Exception:  # it raises other errors, too, for what is malformed
        return False
    return True


secrets_of_any_size = st.binary(min_size=24, max_size=64).map(lambda key: "whsec_" + base64.b64encode(key).decode())
ids = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="."), min_size=1, max_size=256)
payloads = st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.text(max_size=20), max_size=4)


@given(secrets_of_any_size, secrets_of_any_size, ids, payloads, st.booleans(), st.booleans())
@settings(deadline=None)
@pytest.mark.anyio
async def test_what_the_reference_library_signs_is_accepted(
    secret: str, other: str, id: str, payload: dict[str, Any], ascii_only: bool, padded: bool
) -> None:
    text, at = json.dumps(payload, ensure_ascii=ascii_only), datetime.now(UTC)
    signature = Webhook(secret).sign(id, at, text)
    host = Host()
    made = endpoint(host, secrets=[other, secret if padded else secret.rstrip("=")], now=time.time)
    headers = headers_of(id.encode(), str(int(at.timestamp())).encode(), signature.encode())
    assert (await deliver(made, headers, text.encode()))[1] == payload
    assert host.events[0].id == id


def entries(body: bytes) -> st.SearchStrategy[list[str]]:
    right = st.sampled_from([SECRET, OTHER, "whsec_" + "A" * 32]).map(lambda key: sign(key, "msg_1", str(NOW), body))
    altered = st.tuples(right, st.integers(0, 46), st.sampled_from("Av1,=!-+ /")).map(
        lambda drawn: drawn[0][: drawn[1]] + drawn[2] + drawn[0][drawn[1] + 1 :]
    )
    later = right.map(lambda signature: signature.replace("v1,", "v1a,"))
    malformed = st.sampled_from(["", "v1", "v1,", "v1,***", ",", "v1,a,b", "v2,AAAA"])
    return st.lists(right | altered | later | malformed, min_size=1, max_size=5)


@given(entries(BODY))
@settings(deadline=None, max_examples=200)
@pytest.mark.anyio
async def test_what_is_accepted_the_reference_library_verifies(given: list[str]) -> None:
    at = int(time.time())
    known = [sign(secret, "msg_1", str(NOW), BODY) for secret in (SECRET, OTHER)]
    # signed anew for now, which is the only time that the library knows
    fresh = dict(zip(known, [sign(secret, "msg_1", str(at), BODY) for secret in (SECRET, OTHER)], strict=True))
    given = [fresh.get(entry, entry) for entry in given]
    headers = headers_of(b"msg_1", str(at).encode(), " ".join(given).encode())
    verified = any(lib_verifies(secret, headers, entry, BODY) for secret in (SECRET, OTHER) for entry in given)
    try:
        await deliver(endpoint(secrets=[SECRET, OTHER], now=time.time), headers)
    except WebhookUnverified:
        assert not any(entry in fresh.values() for entry in given)
    else:
        assert verified


@pytest.mark.anyio
async def test_secrets_and_signatures_are_exchanged_one_by_one() -> None:
    old, new, later = sign(SECRET, "msg_1", str(NOW), BODY), sign(OTHER, "msg_1", str(NOW), BODY), "v1a,hnO3f9T8Ytu9="
    for both in (old, new, f"{old} {new}", f"{new} {old}", f"{later} {new}", f"v1,*** {old} v1"):
        for known in ([SECRET, OTHER], [OTHER, SECRET]):
            headers = headers_of(b"msg_1", str(NOW).encode(), both.encode())
            assert (await deliver(endpoint(secrets=known), headers))[0].status == 204
    with pytest.raises(WebhookUnverified):
        await deliver(endpoint(secrets=[SECRET]), signed(secret=OTHER))


@pytest.mark.anyio
@pytest.mark.parametrize(
    "body", [b"", b"null", b"[]", b'"x"', b"{", b"{}x", b'{"a": "\xff"}', "{}".encode("utf-16"), b'{"a":' * 100_000]
)
async def test_what_is_signed_but_no_object_is_malformed(body: bytes) -> None:
    host = Host()
    with pytest.raises(BadRequest, match="not a JSON object"):
        await deliver(endpoint(host), signed(body), body)
    with pytest.raises(WebhookUnverified):  # which is told first
        await deliver(endpoint(host), signed(body, secret=OTHER), body)
    assert host.events == []


@pytest.mark.anyio
async def test_a_body_may_be_so_long_and_no_longer() -> None:
    longest = b'{"logs":"' + b"x" * (webhooks.MAX_SIZE - 11) + b'"}'
    assert len(longest) == 8 << 20
    length = (b"content-length", str(len(longest)).encode())
    assert (await deliver(endpoint(), (*signed(longest), length), longest))[0].status == 204
    read = 0

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal read
        while True:
            read += 1 << 20
            yield b"x" * (1 << 20)

    async with aclosing(endless()) as body:
        with pytest.raises(BodyTooLarge):
            await endpoint().answer(method="POST", headers=signed(longest), body=body)
    assert read == 9 << 20


@pytest.mark.anyio
async def test_bodies_that_arrive_at_a_time_are_limited_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "MAX_UNVERIFIED", 2 * len(BODY) - 1)
    made, more = endpoint(), anyio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield BODY
        await more.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lambda: made.answer(method="POST", headers=signed(id="msg_0"), body=slow()))
        await anyio.wait_all_tasks_blocked()
        with pytest.raises(Overloaded, match="deliveries"):
            await deliver(made)
        more.set()
    assert (await deliver(made))[0].status == 204


@pytest.mark.anyio
async def test_a_body_that_does_not_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "READ_TIMEOUT", 0.01)

    async def stalled() -> AsyncIterator[bytes]:
        yield BODY
        await anyio.sleep_forever()

    with pytest.raises(BadRequest, match="in time"):
        await endpoint().answer(method="POST", headers=signed(), body=stalled())


@pytest.mark.anyio
async def test_a_caller_who_leaves_while_sending_has_delivered_nothing() -> None:
    async def cut() -> AsyncIterator[bytes]:
        yield BODY
        raise ClientDisconnected()

    host = Host()
    made = endpoint(host)
    with pytest.raises(ClientDisconnected) as raised:
        await made.answer(method="POST", headers=signed(), body=cut())
    assert host.events == []
    assert STREAM not in locals_of(raised.value)
    await deliver(made)
    assert len(host.events) == 1


@pytest.mark.anyio
async def test_a_replay_is_refused_whoever_signs_it_anew() -> None:
    host = Host()
    made = endpoint(host, secrets=[SECRET, OTHER])
    await deliver(made)
    for headers in (signed(), signed(at=NOW + 1), signed(secret=OTHER)):
        with pytest.raises(WebhookReplayed) as raised:
            await deliver(made, headers)
        assert raised.value.status == 409
    await deliver(made, signed(id="msg_2"))
    assert [event.id for event in host.events] == ["msg_1", "msg_2"]


@pytest.mark.anyio
async def test_unverified_ids_have_none_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webhooks, "MAX_REMEMBERED", 2)
    made = endpoint()
    await deliver(made)
    for i in range(10):
        with pytest.raises(WebhookUnverified):
            await deliver(made, signed(id=f"forged_{i}", secret=OTHER))
    with pytest.raises(WebhookReplayed):
        await deliver(made)
    await deliver(made, signed(id="msg_2"))
    await deliver(made, signed(id="msg_3"))
    for id in ("msg_2", "msg_3"):
        with pytest.raises(WebhookReplayed):
            await deliver(made, signed(id=id))
    assert (await deliver(made))[0].status == 204  # the oldest, for want of room


@pytest.mark.anyio
async def test_an_id_is_remembered_for_as_long_as_its_time_can_pass() -> None:
    clock = Clock()
    made = endpoint(now=clock)
    await deliver(made, signed(at=NOW + 300))
    clock.now += 600.0
    with pytest.raises(WebhookReplayed):
        await deliver(made, signed(at=NOW + 300))
    clock.now += 0.5
    with pytest.raises(WebhookUnverified, match="too far"):
        await deliver(made, signed(at=NOW + 300))
    await deliver(made, signed(id="msg_2", at=NOW + 600))
    assert len(made._taken) == 1


@pytest.mark.anyio
@pytest.mark.parametrize("failure", [RuntimeError("postgres://user:hunter2@db"), PermissionDenied("hunter2")])
async def test_what_the_host_failed_to_take_may_come_again(
    failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    host = Host(failure)
    made = endpoint(host)
    with pytest.raises(WebhookFailed) as raised:
        await deliver(made)
    assert caplog.record_tuples == [
        ("replicate_proxy_mw", logging.ERROR, f"webhook callback failed: {type(failure).__name__}")
    ]
    assert "hunter2" not in locals_of(raised.value) + str(raised.value)
    assert raised.value.__context__ is None
    await deliver(made, signed(at=NOW + 1))
    assert [event.sent_at - NOW for event in host.events] == [0.0, 1.0]
    with pytest.raises(WebhookReplayed):
        await deliver(made)


@pytest.mark.anyio
async def test_the_host_has_so_much_time(caplog: pytest.LogCaptureFixture) -> None:
    async def hangs(event: WebhookEvent) -> None:
        await anyio.sleep_forever()

    with pytest.raises(WebhookFailed):
        await deliver(endpoint(hangs, timeout=0.01))
    assert caplog.messages == ["webhook callback failed: TimeoutError"]


class Held(Host):
    """A callback that goes on when it is told to."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__(*failures)
        self.release = anyio.Event()
        self.finished = 0

    async def __call__(self, event: WebhookEvent) -> None:
        failed = bool(self.failures)
        self.events.append(event)
        await self.release.wait()
        if failed:
            raise self.failures.pop(0)
        self.finished += 1


async def outcomes(attempts: Sequence[Callable[[], Awaitable[Any]]], host: Held) -> list[str]:
    """How each attempt ended, all made while the host is busy with the first."""
    ended: list[str] = []

    async def one(attempt: Callable[[], Awaitable[Any]]) -> None:
        try:
            await attempt()
            ended.append("taken")
        except ProxyError as error:
            ended.append(error.code)

    async with anyio.create_task_group() as tasks:
        for attempt in attempts:
            tasks.start_soon(one, attempt)
            await anyio.wait_all_tasks_blocked()
        assert len(host.events) == 1
        host.release.set()
    return ended


@pytest.mark.anyio
async def test_an_attempt_waits_for_the_end_of_another() -> None:
    host = Held()
    made = endpoint(host)
    attempts = [lambda at=NOW + i: deliver(made, signed(at=at)) for i in range(3)]
    assert await outcomes(attempts, host) == ["taken", "webhook_replayed", "webhook_replayed"]
    assert len(host.events) == 1


@pytest.mark.anyio
async def test_an_attempt_that_waited_is_taken_if_the_other_failed() -> None:
    host = Held(RuntimeError())
    made = endpoint(host)
    attempts = [lambda at=NOW + i: deliver(made, signed(at=at)) for i in range(3)]
    assert await outcomes(attempts, host) == ["webhook_failed", "taken", "webhook_replayed"]
    assert [event.sent_at - NOW for event in host.events] == [0.0, 1.0]


@pytest.mark.anyio
async def test_deliveries_of_other_ids_do_not_wait() -> None:
    host = Held()
    made = endpoint(host)
    async with anyio.create_task_group() as tasks:
        for i in range(3):
            tasks.start_soon(deliver, made, signed(id=f"msg_{i}"))
        await anyio.wait_all_tasks_blocked()
        assert len(host.events) == 3
        host.release.set()


@pytest.mark.anyio
async def test_the_host_goes_on_when_replicate_hangs_up() -> None:
    host = Held()
    ledger = Ledger(store := MemoryPredictionStore(), timeout=1.0)
    made = endpoint(host, ledger=ledger)
    async with anyio.create_task_group() as outer, anyio.create_task_group() as inner:
        inner.start_soon(deliver, made)
        await anyio.wait_all_tasks_blocked()
        inner.cancel_scope.cancel()
        outer.start_soon(_release_when_idle, host)
    assert host.finished == 1
    assert len(store) == 1
    with pytest.raises(WebhookReplayed):
        await deliver(made)


async def _release_when_idle(host: Held) -> None:
    await anyio.wait_all_tasks_blocked()
    host.release.set()


@pytest.mark.anyio
async def test_one_who_hangs_up_while_waiting_holds_up_nobody() -> None:
    host = Held()
    made = endpoint(host)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(deliver, made)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0):
            await deliver(made)
        host.release.set()
    with pytest.raises(WebhookReplayed):
        await deliver(made)
    assert len(host.events) == 1


def test_event_loops_share_what_was_taken() -> None:
    host = Host()
    made = endpoint(host)
    anyio.run(deliver, made)
    for backend in ("asyncio", "trio"):
        with pytest.raises(WebhookReplayed):
            anyio.run(deliver, made, backend=backend)


@pytest.mark.anyio
async def test_a_replay_to_another_process_is_refused() -> None:
    store, host = MemoryPredictionStore(), Host()
    first, second, alone = (endpoint(host, ledger=ledger) for ledger in (_ledger(store), _ledger(store), None))
    await deliver(first)
    with pytest.raises(WebhookReplayed):
        await deliver(second)
    await deliver(alone)
    assert len(host.events) == 2
    (key,) = store._entries
    assert key.startswith("webhook:")
    assert "msg_1" not in key


@pytest.mark.anyio
async def test_what_another_process_failed_to_take_may_come_here() -> None:
    store = MemoryPredictionStore()
    with pytest.raises(WebhookFailed):
        await deliver(endpoint(Host(RuntimeError()), ledger=_ledger(store)))
    assert len(store) == 0
    assert (await deliver(endpoint(ledger=_ledger(store))))[0].status == 204


class Broken(MemoryPredictionStore):
    async def get(self, ids: Collection[str], /) -> Mapping[str, StoredPrediction]:
        raise OSError("redis://user:hunter2@host")

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        raise OSError("redis://user:hunter2@host")


def _ledger(store: MemoryPredictionStore) -> Ledger:
    return Ledger(store, timeout=1.0)


@pytest.mark.anyio
async def test_without_the_store_a_process_goes_by_its_own_memory(caplog: pytest.LogCaptureFixture) -> None:
    host = Host()
    made = endpoint(host, ledger=_ledger(Broken()))
    assert (await deliver(made))[0].status == 204
    with pytest.raises(WebhookReplayed):
        await deliver(made)
    assert len(host.events) == 1
    assert caplog.messages == ["prediction store failed: OSError"] * 2


@pytest.mark.anyio
async def test_no_refusal_shows_what_is_delivered_or_a_key() -> None:
    token = (b"authorization", b"Bearer r8_0000000000000000000000000000000000000")
    array = json.dumps([STREAM]).encode()
    taken = endpoint()
    await deliver(taken)
    attempts: list[tuple[WebhookEndpoint, HeaderList, bytes]] = [
        (endpoint(), (), BODY),
        (endpoint(), signed(secret=OTHER), BODY),
        (endpoint(), signed(array), array),
        (taken, signed(), BODY),
        (endpoint(Host(RuntimeError())), signed(), BODY),
        (endpoint(), signed(), BODY * 100_000),
    ]
    key = base64.b64decode(SECRET.removeprefix("whsec_"))
    for made, headers, body in attempts:
        with pytest.raises(ProxyError) as raised:
            await deliver(made, (*headers, token), body)
        shown = locals_of(raised.value) + raised.value.message
        assert not any(word in shown for word in (STREAM, "r8_0", SECRET[6:], repr(key)[2:-1]))
        assert not any(word in repr(vars(made)) for word in (SECRET[6:], repr(key)[2:-1]))


@pytest.mark.parametrize(
    "secrets",
    [
        SECRET,
        [],
        [SECRET, ""],
        [SECRET.removeprefix("whsec_")],  # as other things look, too
        ["whsk_" + SECRET.removeprefix("whsec_")],
        [SECRET + "\n"],
        [SECRET[:-4]],
        [SECRET + "A"],
        [SECRET[:-1] + "_"],
        [SECRET, SECRET.encode()],
        [None],
    ],
)
def test_secrets_are_checked_and_never_shown(secrets: Any) -> None:
    with pytest.raises(ValueError, match=r"^webhook_secrets: ") as raised:
        endpoint(secrets=secrets)
    assert "C2FV" not in str(raised.value) + locals_of(raised.value)


def test_its_time_limit_is_checked() -> None:
    with pytest.raises(ValueError, match=r"^webhook_timeout: "):
        WebhookEndpoint(secrets=[SECRET], on_event=None, timeout=0.0)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_prediction_of_the_fake_is_told_to_the_host() -> None:
    host = Host(RuntimeError())

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, reply = RequestBody(receive), Reply(send, method=scope["method"])

        async def relay() -> None:
            try:
                answer, _ = await receiver.answer(method=scope["method"], headers=scope["headers"], body=body)
            except ProxyError as error:
                answer = render(error, request_id="-")
            await reply.relay(answer)

        await body.begin()
        await while_connected(body, relay, ending=lambda: reply.ending)

    fake = FakeReplicate(
        clock=ManualClock(),
        queue_time=1.0,
        run_time=10.0,
        webhook_transport=httpx.ASGITransport(app),
        webhook_retry_delay=0.01,
    )
    receiver = endpoint(host, secrets=[OTHER, fake.webhook_secret], now=fake.clock.now)
    authorization = {"authorization": f"Bearer {fake.token}"}
    with fake.serve(), httpx.Client(base_url=fake.url, headers=authorization, verify=False) as client:
        wanted = {"webhook": "https://app.test/v1/-/webhooks", "webhook_events_filter": ["start", "completed"]}
        body = {"version": VERSION, "input": {"text": "Bob"}, **wanted}
        id = client.post("predictions", json=body).json()["id"]
        fake.clock.advance(1)
        until(lambda: len(fake.deliveries) == 1)  # which comes only once, whatever it met
        host.failures = [RuntimeError()]
        fake.clock.advance(10)
        until(lambda: len(fake.deliveries) == 3)
    assert [one.status for one in fake.deliveries] == [500, 500, 204]
    assert [event.prediction["status"] for event in host.events] == ["processing", "succeeded", "succeeded"]
    assert {event.prediction["id"] for event in host.events} == {id}
    assert host.events[1].id == host.events[2].id != host.events[0].id
