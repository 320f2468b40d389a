from __future__ import annotations

import asyncio
import gc
import json
import logging
import selectors
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import httpx
import pytest
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from replicate_proxy_mw import MappingKeyResolver, ReplicateKey
from replicate_proxy_mw import waiting as waiting_module
from replicate_proxy_mw.errors import LimitExceeded, ProxyError, RequestTimeout, UpstreamFailed
from replicate_proxy_mw.exchange import Forward, Layer, ProxyRequest, ProxyResponse
from replicate_proxy_mw.layers import coalescing
from replicate_proxy_mw.layers.coalescing import coalesce_polls
from replicate_proxy_mw.layers.deadline import request_timeout
from replicate_proxy_mw.portkey import PortkeyContext, Retry
from replicate_proxy_mw.telemetry import request as request_module
from replicate_proxy_mw.telemetry import story
from replicate_proxy_mw.testing import FakeReplicate
from replicate_proxy_mw.testing.serve import serve
from tests.raw_asgi import KEY, TOKEN, Arriving, Caller, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream, answer_all
from tests.requests import request_of
from tests.telemetry.scenarios import of
from tests.tenants import CREATES, A, B, ask, created

BACKENDS = ["asyncio", "trio"]
TARGET = "/predictions/p1"
OTHER_TOKEN = "r8_11111111111111111111111111111111111"
KEYS = {
    "a": ReplicateKey(TOKEN, tenant="team-a"),
    "b": ReplicateKey(TOKEN, tenant="team-b"),
    "c": ReplicateKey(OTHER_TOKEN, tenant="team-a"),
}
EPSILON = 1e-6


# --- a world without hurry: time passes only where everybody waits for it


class _Jumping(selectors.SelectSelector):
    now = 0.0

    def select(self, timeout: float | None = None) -> Any:
        self.now += timeout or 0.0
        return super().select(None if timeout is None else 0)


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now


def play(backend: str, scene: Callable[..., Awaitable[Any]], *arguments: object) -> None:
    options: dict[str, Any] = {"loop_factory": _Loop}
    if backend == "trio":
        options = {"clock": trio.testing.MockClock(autojump_threshold=0)}
    anyio.run(scene, *arguments, backend=backend, backend_options=options)


each_backend = pytest.mark.parametrize("backend", BACKENDS)


def polling(target: str = TARGET, *, who: str = "a", method: str = "GET", **more: Any) -> ProxyRequest:
    return request_of(method, target, **({"key": KEYS[who]} | more))


@dataclass
class Sent:
    """A request as it reached upstream, and the body of its answer."""

    request: ProxyRequest
    begun: float
    body: bytes
    answered: float | None = None
    cancelled: bool = False


@dataclass
class Upstream:
    """Numbers its answers, and takes `seconds` for each; the last of these for all that follow."""

    seconds: list[float] = field(default_factory=lambda: [0.1])
    outcome: Any = None
    sent: list[Sent] = field(default_factory=list)

    async def __call__(self, request: ProxyRequest) -> ProxyResponse:
        sent = Sent(request, anyio.current_time(), b'{"n":%d}' % len(self.sent))
        self.sent.append(sent)
        seconds = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        try:
            await anyio.sleep(seconds)
        except anyio.get_cancelled_exc_class():
            sent.cancelled = True
            raise
        sent.answered = anyio.current_time()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        headers = ((b"content-type", b"application/json"), (b"etag", sent.body))
        return self.outcome or ProxyResponse(status=200, headers=headers, body=Arriving([sent.body[:3], sent.body[3:]]))


class Poller:
    """One who polls once, and may leave."""

    def __init__(self, layered: Forward, request: ProxyRequest, *, at: float = 0.0, patience: float = 1e9) -> None:
        self._layered, self.request, self._at, self._patience = layered, request, at, patience
        self.left = False
        self.arrived = self.ended = -1.0
        self.response: ProxyResponse | None = None
        self.body: bytes | None = None
        self.error: Exception | None = None

    async def __call__(self) -> None:
        await anyio.sleep(self._at)
        self.arrived = anyio.current_time()
        with anyio.move_on_after(self._patience) as scope:
            try:
                self.response = await self._layered(self.request)
                self.body = b"".join([chunk async for chunk in self.response.body])
            except ProxyError as error:
                self.error = error
        self.left, self.ended = scope.cancelled_caught, anyio.current_time()


async def all_of(*pollers: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with anyio.create_task_group() as tasks:
        for poller in pollers:
            tasks.start_soon(poller)


# --- one call for several


@each_backend
def test_what_comes_at_the_same_time_is_one_call(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls()(upstream)
        pollers = [Poller(layered, polling(), at=at) for at in (0, 0, 0.05, 0.09)]
        await all_of(*pollers)
        assert [poller.body for poller in pollers] == [b'{"n":0}'] * 4
        assert len(upstream.sent) == 1
        for poller in pollers:
            assert poller.response is not None
            assert (poller.response.status, poller.response.headers[1]) == (200, (b"etag", b'{"n":0}'))
            assert [chunk async for chunk in poller.response.body] == [b'{"n":0}']  # once more

    play(backend, scene)


@each_backend
@pytest.mark.parametrize("target", ["/predictions/p1", "/trainings/p1"])
def test_what_comes_between_two_calls_waits_for_the_next_one(backend: str, target: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls()(upstream)
        pollers = [Poller(layered, polling(target), at=at) for at in (0, 0.15, 0.3, 0.45, 0.55)]
        await all_of(*pollers)
        assert [poller.body for poller in pollers] == [b'{"n":0}', *[b'{"n":1}'] * 4]
        assert [sent.begun for sent in upstream.sent] == pytest.approx([0, 0.5])

    play(backend, scene)


@each_backend
def test_25_pollers_at_2_hz_are_2_calls_a_second(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream([0.12])
        layered = coalesce_polls()(upstream)
        polls = 0

        async def poller(offset: float) -> None:
            nonlocal polls
            await anyio.sleep(offset)
            while anyio.current_time() < 10:
                began = anyio.current_time()
                await layered(polling())
                polls += 1
                await anyio.sleep(max(0.0, began + 0.5 - anyio.current_time()))

        await all_of(*(partial(poller, n * 0.02) for n in range(25)))
        begun = [sent.begun for sent in upstream.sent]
        assert all(later - earlier >= 0.5 - EPSILON for earlier, later in pairwise(begun))
        assert len([at for at in begun if at < 10]) <= 20
        assert polls > 20 * 20

    play(backend, scene)


@each_backend
@pytest.mark.parametrize("takes", [0.001, 0.2, 3.0])
def test_one_alone_who_waits_half_a_second_between_polls_is_not_delayed(backend: str, takes: float) -> None:
    async def scene() -> None:
        upstream = Upstream([takes])
        layered = coalesce_polls()(upstream)
        for _ in range(5):
            began = anyio.current_time()
            await layered(polling())
            assert anyio.current_time() - began == pytest.approx(takes)
            await anyio.sleep(0.5)
        assert len(upstream.sent) == 5

    play(backend, scene)


@each_backend
def test_an_interval_of_0_shares_only_what_comes_during_a_call(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls(interval=0)(upstream)
        pollers = [Poller(layered, polling(), at=at) for at in (0, 0.05, 0.11, 0.15)]
        await all_of(*pollers)
        assert [poller.body for poller in pollers] == [b'{"n":0}', b'{"n":0}', b'{"n":1}', b'{"n":1}']
        assert [sent.begun for sent in upstream.sent] == pytest.approx([0, 0.11])

    play(backend, scene)


@pytest.mark.parametrize("interval", [-0.1, float("nan"), float("inf")])
def test_what_is_no_interval(interval: float) -> None:
    with pytest.raises(ValueError, match=r"^interval: "):
        coalesce_polls(interval=interval)


APART = [
    polling(who="b"),
    polling(who="c"),
    polling("/predictions/p2"),
    polling("/predictions/p1?x=1"),
    polling("/predictions/%701"),
    polling("/trainings/p1"),
    polling(headers=((b"accept", b"text/plain"),)),
    polling(headers=((b"if-none-match", b"1"),)),
    polling(portkey=PortkeyContext(api_key="pk", retry=Retry(attempts=2))),
]


@each_backend
def test_what_replicate_could_tell_apart_is_called_apart(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls()(upstream)
        pollers = [Poller(layered, request) for request in (polling(), *APART)]
        await all_of(*pollers)
        assert len({poller.body for poller in pollers}) == len(upstream.sent) == 1 + len(APART)

    play(backend, scene)


@each_backend
def test_what_it_could_not_is_one_call(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls()(upstream)
        agents: list[tuple[tuple[bytes, bytes], ...]] = [(), ((b"user-agent", b"a"),), ((b"user-agent", b"b"),)]
        same = [polling(headers=headers) for headers in agents]
        same += [polling(key=KEYS["a"].of(tenant="team-a", policy=KEYS["b"].policy), scope={"x": 1})]
        same += [polling(portkey=PortkeyContext(api_key="another", trace_id="t", request_timeout=9.0))]
        await all_of(*(Poller(layered, request) for request in same))
        assert len(upstream.sent) == 1

    play(backend, scene)


@each_backend
@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("HEAD", "/predictions/p1"),
        ("POST", "/predictions"),
        ("GET", "/predictions"),
        ("GET", "/models/a/b"),
        ("PUT", "/predictions/p1"),
        ("POST", "/predictions/p1/cancel"),
        ("GET", "/files/f/download"),
        ("GET", "/nowhere"),
    ],
)
def test_nothing_else_is_held_up_or_shared(backend: str, method: str, target: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls()(upstream)
        requests = [polling(target, method=method) for _ in range(3)]
        pollers = [Poller(layered, request) for request in requests]
        await all_of(*pollers)
        assert {id(sent.request) for sent in upstream.sent} == {id(request) for request in requests}
        assert len(upstream.sent) == 3
        assert [poller.ended for poller in pollers] == pytest.approx([0.1] * 3)

    play(backend, scene)


@each_backend
def test_each_gets_an_error_of_its_own(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream(outcome=LimitExceeded(retry_after=7))
        layered = coalesce_polls()(upstream)
        pollers = [Poller(layered, polling()) for _ in range(3)]
        await all_of(*pollers)
        assert [type(poller.error) for poller in pollers] == [LimitExceeded] * 3
        assert len({id(poller.error) for poller in pollers}) == 3
        assert len(upstream.sent) == 1
        upstream.outcome = None
        poller = Poller(layered, polling())
        await poller()
        assert poller.body == b'{"n":1}'
        assert upstream.sent[1].begun == pytest.approx(0.5)

    play(backend, scene)


@each_backend
@pytest.mark.parametrize(
    ("content_type", "size"), [(b"application/json", coalescing.MAX_SIZE + 1), (b"text/event-stream", 1)]
)
def test_what_cannot_be_shared_is_asked_for_by_each(backend: str, content_type: bytes, size: int) -> None:
    class Large(Upstream):
        async def __call__(self, request: ProxyRequest) -> ProxyResponse:
            await super().__call__(request)
            body = Arriving([b"x" * (size - 1), b"y"])
            return ProxyResponse(status=200, headers=((b"content-type", content_type),), body=body)

    async def scene() -> None:
        upstream = Large()
        layered = coalesce_polls()(upstream)
        pollers = [Poller(layered, polling()) for _ in range(3)]
        await all_of(*pollers)
        assert [poller.body and len(poller.body) for poller in pollers] == [size] * 3
        assert len(upstream.sent) == 1 + 3

    play(backend, scene)


@each_backend
def test_the_largest_that_is_shared(backend: str) -> None:
    async def scene() -> None:
        body = b"x" * coalescing.MAX_SIZE
        upstream = Upstream(outcome=ProxyResponse(status=200, headers=(), body=Arriving([body])))
        layered = coalesce_polls()(upstream)
        pollers = [Poller(layered, polling()) for _ in range(3)]
        await all_of(*pollers)
        assert all(poller.body == body for poller in pollers)
        assert len(upstream.sent) == 1

    play(backend, scene)


# --- who leaves


@each_backend
@pytest.mark.parametrize("leaves", [(0,), (1,), (0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("when", ["under way", "waiting"])
def test_who_leaves_disturbs_nobody(backend: str, leaves: tuple[int, ...], when: str) -> None:
    async def scene() -> None:
        upstream = Upstream([0.1, 1.0])
        layered = coalesce_polls()(upstream)
        await layered(polling())
        patience = 0.6 if when == "under way" else 0.2
        pollers = [Poller(layered, polling(), patience=patience if i in leaves else 1e9) for i in range(3)]
        await all_of(*pollers)
        assert [poller.left for poller in pollers] == [i in leaves for i in range(3)]
        assert [poller.ended for poller in pollers if poller.left] == pytest.approx([0.1 + patience] * len(leaves))
        assert {poller.body for poller in pollers if not poller.left} == {b'{"n":1}'}
        assert len(upstream.sent) == 2
        assert upstream.sent[1].answered == pytest.approx(1.5)

    play(backend, scene)


@each_backend
def test_the_last_who_leaves_ends_the_call(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream([5.0, 0.1])
        layered = coalesce_polls()(upstream)
        later = Poller(layered, polling(), at=1.0)
        await all_of(*(Poller(layered, polling(), patience=patience) for patience in (0.1, 0.2)), later)
        assert [sent.cancelled for sent in upstream.sent] == [True, False]
        assert later.ended == pytest.approx(1.1)

    play(backend, scene)


@each_backend
def test_a_call_that_nobody_waits_for_any_more_is_not_begun(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls()(upstream)
        await layered(polling())
        await Poller(layered, polling(), patience=0.2)()
        await anyio.sleep(5)
        assert len(upstream.sent) == 1

    play(backend, scene)


@each_backend
def test_who_left_before_its_time_has_not_shortened_the_interval(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream()
        layered = coalesce_polls()(upstream)
        await layered(polling())
        await Poller(layered, polling(), patience=0.2)()
        await layered(polling())
        assert [sent.begun for sent in upstream.sent] == pytest.approx([0, 0.5])

    play(backend, scene)


@each_backend
def test_who_comes_while_an_abandoned_call_ends_begins_its_own(backend: str) -> None:
    async def scene() -> None:
        sent = 0

        async def forward(request: ProxyRequest) -> ProxyResponse:
            nonlocal sent
            sent += 1
            try:
                await anyio.sleep(5 if sent == 1 else 0.1)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(2)
            return ProxyResponse.json(200, {})

        layered = coalesce_polls(interval=0)(forward)
        second = Poller(layered, polling(), at=1.0)
        third = Poller(layered, polling(), at=3.05)
        await all_of(Poller(layered, polling(), patience=0.5), second, third)
        assert sent == 2
        assert second.ended == third.ended == pytest.approx(3.1)

    play(backend, scene)


@each_backend
@pytest.mark.parametrize("interval", [0.0, 0.5])
def test_a_time_limit_ends_the_waiting_of_whoever_has_it_alone(backend: str, interval: float) -> None:
    async def scene() -> None:
        upstream = Upstream([0.1, 1.0])
        layered = request_timeout(coalesce_polls(interval=interval)(upstream))
        await layered(polling())
        impatient = polling(portkey=PortkeyContext(api_key="pk", request_timeout=0.2))
        pollers = [Poller(layered, request, at=0.01 * i) for i, request in enumerate([impatient, polling()] * 2)]
        await all_of(*pollers)
        assert [type(poller.error) for poller in pollers] == [RequestTimeout, type(None)] * 2
        assert [poller.ended for poller in pollers[::2]] == pytest.approx([0.3, 0.32])
        assert [poller.body for poller in pollers[1::2]] == [b'{"n":1}'] * 2
        assert len(upstream.sent) == 2

    play(backend, scene)


# --- reading one's own cancel


def cancelling(target: str = TARGET, *, who: str = "a") -> ProxyRequest:
    return polling(f"{target}/cancel", who=who, method="POST")


@each_backend
@pytest.mark.parametrize("target", ["/predictions/p1", "/trainings/p1"])
def test_after_a_cancel_nothing_is_joined_that_was_begun_before(backend: str, target: str) -> None:
    async def scene() -> None:
        upstream = Upstream([1.0, 0.1, 0.1])
        layered = coalesce_polls()(upstream)
        before, after = Poller(layered, polling(target)), Poller(layered, polling(target), at=0.4)
        with_it = Poller(layered, polling(target), at=0.45)
        await all_of(before, Poller(layered, cancelling(target), at=0.2), after, with_it)
        assert before.body == b'{"n":0}'
        assert before.ended == pytest.approx(1.0)
        assert after.body == with_it.body == b'{"n":2}'
        assert after.ended == pytest.approx(0.5)
        assert upstream.sent[2].begun == pytest.approx(0.4)

    play(backend, scene)


@each_backend
def test_a_cancel_ends_the_waiting_for_the_next_call(backend: str) -> None:
    async def scene() -> None:
        upstream = Upstream([0.05])
        layered = coalesce_polls()(upstream)
        waits, after = Poller(layered, polling(), at=0.1), Poller(layered, polling(), at=0.27)
        await all_of(Poller(layered, polling()), waits, Poller(layered, cancelling(), at=0.2), after)
        assert waits.body == after.body == b'{"n":2}'
        assert [sent.begun for sent in upstream.sent] == pytest.approx([0, 0.2, 0.25])

    play(backend, scene)


@each_backend
@pytest.mark.parametrize("fate", ["refused", "left"])
def test_a_cancel_without_an_answer_may_have_been_received(backend: str, fate: str) -> None:
    async def scene() -> None:
        upstream = Upstream([1.0, 0.2, 0.1])
        layered = coalesce_polls()(upstream)
        cancel = Poller(layered, cancelling(), at=0.1, patience=0.1 if fate == "left" else 1e9)
        after = Poller(layered, polling(), at=0.4)

        async def refuse() -> None:
            await anyio.sleep(0.2)
            upstream.outcome = UpstreamFailed() if fate == "refused" else None
            await anyio.sleep(0.15)
            upstream.outcome = None

        await all_of(Poller(layered, polling()), cancel, after, refuse)
        assert cancel.left == (fate == "left")
        assert isinstance(cancel.error, UpstreamFailed) == (fate == "refused")
        assert after.body == b'{"n":2}'

    play(backend, scene)


@each_backend
@pytest.mark.parametrize(("target", "who"), [("/predictions/p2", "a"), (TARGET, "b"), (TARGET, "c")])
def test_a_cancel_of_another_prediction_or_by_another_key_changes_nothing(backend: str, target: str, who: str) -> None:
    async def scene() -> None:
        upstream = Upstream([1.0, 0.1])
        layered = coalesce_polls()(upstream)
        after = Poller(layered, polling(), at=0.4)
        await all_of(Poller(layered, polling()), Poller(layered, cancelling(target, who=who), at=0.1), after)
        assert after.body == b'{"n":0}'

    play(backend, scene)


# --- whatever happens


@dataclass(frozen=True)
class Step:
    """What one caller does, in tenths of seconds; `patience` is None for one who stays."""

    at: int
    does: str
    who: str = "a"
    target: str = TARGET
    headers: tuple[tuple[bytes, bytes], ...] = ()
    patience: int | None = None


STEPS = st.lists(
    st.builds(
        Step,
        at=st.integers(0, 25),
        does=st.sampled_from(["poll", "poll", "poll", "poll", "cancel"]),
        who=st.sampled_from("aaabc"),
        target=st.sampled_from([TARGET, TARGET, TARGET, "/predictions/p2", "/predictions/p1?x=1"]),
        headers=st.sampled_from([(), (), ((b"user-agent", b"x"),), ((b"accept", b"y"),)]),
        patience=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    ),
    max_size=25,
)


@each_backend
@settings(deadline=None, max_examples=150)
@given(steps=STEPS, seconds=st.lists(st.integers(0, 15), min_size=1, max_size=12), interval=st.sampled_from([0, 5, 10]))
def test_whoever_comes_leaves_and_cancels(backend: str, steps: list[Step], seconds: list[int], interval: int) -> None:
    play(backend, _scene, steps, seconds, interval)


async def _scene(steps: list[Step], seconds: list[int], tenths: int) -> None:
    interval, upstream = tenths / 10, Upstream([(n + 0.5) / 10 for n in seconds])
    layers: list[Any] = []

    class Polls(coalescing._Polls):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            layers.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coalescing, "_Polls", Polls)
        layered = coalesce_polls(interval=interval)(upstream)
        pollers = [_poller(layered, step) for step in steps]
        await all_of(*pollers)
    await anyio.sleep(1)
    polls = [poller for poller in pollers if poller.request.method == "GET"]
    cancels = [poller for poller in pollers if poller.request.method == "POST"]
    by_body = {sent.body: sent for sent in upstream.sent}
    for poll in polls:
        if poll.left:
            continue
        assert poll.body is not None, "each who stays gets an answer"
        _fits(
            poll,
            by_body[poll.body],
            [cancel for cancel in cancels if _about(cancel.request) == _about(poll.request)],
            interval,
        )
    _are_spaced(upstream.sent, cancels, interval)
    answered = {poll.body for poll in polls}
    for sent in upstream.sent:
        if sent.request.method == "GET":
            assert (sent.answered is not None) == (sent.body in answered), "nobody waits, nobody calls"
            assert sent.cancelled == (sent.answered is None)
    for known in layers:
        assert known._open == {}
        known._drop_old()
        assert known._begun == {}


def _poller(layered: Forward, step: Step) -> Poller:
    patience = 1e9 if step.patience is None else (step.patience + 0.25) / 10
    if step.does == "poll":
        request = polling(step.target, who=step.who, headers=step.headers)
    else:
        request = cancelling(step.target.partition("?")[0], who=step.who)
    return Poller(layered, request, at=step.at / 10, patience=patience)


def _about(request: ProxyRequest) -> tuple[str, str]:
    return request.route.params["prediction_id"], request.key.identity()


def _fits(poll: Poller, sent: Sent, cancels: list[Poller], interval: float) -> None:
    """The answer is one that this poll might have had alone, and it is none that was there before."""
    request = sent.request
    assert (request.key.identity(), request.target) == (poll.request.key.identity(), poll.request.target)
    assert _told(request) == _told(poll.request)
    assert poll.response is not None
    assert poll.response.headers == ((b"content-type", b"application/json"), (b"etag", sent.body))
    assert sent.answered is not None
    assert sent.answered >= poll.arrived - EPSILON
    assert poll.ended == pytest.approx(sent.answered)
    assert sent.begun <= poll.arrived + interval + EPSILON
    for cancel in cancels:
        if cancel.ended < poll.arrived - EPSILON:
            assert sent.begun >= cancel.ended - EPSILON


def _told(request: ProxyRequest) -> list[tuple[bytes, bytes]]:
    return [pair for pair in request.headers if pair[0] != b"user-agent"]


def _are_spaced(sent: list[Sent], cancels: list[Poller], interval: float) -> None:
    last: dict[object, Sent] = {}
    for one in sent:
        if one.request.method != "GET":
            continue
        key = (one.request.key.identity(), one.request.target, tuple(_told(one.request)))
        earlier, last[key] = last.get(key), one
        if earlier is not None and one.begun < earlier.begun + interval - EPSILON:
            ended = [cancel.ended for cancel in cancels if _about(cancel.request) == _about(one.request)]
            assert any(earlier.begun - EPSILON <= at <= one.begun + EPSILON for at in ended)


# --- what is kept


@each_backend
def test_what_is_kept_is_no_more_than_one_interval_has_brought(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    known: list[Any] = []

    class Polls(coalescing._Polls):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            known.append(self)

    monkeypatch.setattr(coalescing, "_Polls", Polls)

    async def scene() -> None:
        layered = coalesce_polls()(Upstream([0.01]))
        sizes = []

        async def all_the_time() -> None:
            """One that waits for the next call whenever that may begin."""
            for _ in range(20):
                await layered(polling("/predictions/all-the-time"))

        async def others() -> None:
            for n in range(300):
                await all_of(*(Poller(layered, polling(f"/predictions/p{n}-{i}")) for i in range(3)))
                sizes.append(len(known[0]._begun))

        await all_of(all_the_time, others)
        assert max(sizes) <= 3 * 51 + 1
        assert len(known) == 1
        await anyio.sleep(0.5)
        await layered(polling())
        assert len(known[0]._begun) == 1

    play(backend, scene)


# --- in the middleware


pytest_anyio = pytest.mark.anyio


def held(connection: Connection) -> None:
    """Answer when the test says so, each with a number of its own."""
    while connection.request():
        upstream = connection.upstream
        number = len(upstream.requests)
        upstream.ready.set()
        upstream.go_on.wait(5)
        connection.answer(b'{"id":"p1","status":"processing","n":%d}' % number)


async def under_way(upstream: RawUpstream) -> None:
    assert await anyio.to_thread.run_sync(upstream.ready.wait, 5)
    upstream.ready.clear()


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(5):
        while not condition():  # noqa: ASYNC110 - other threads decide
            await anyio.sleep(0.002)


def watched(layer: Layer, waiting: list[object]) -> Layer:
    """`layer`, telling who waits within."""

    def outer(forward: Forward) -> Forward:
        inner = layer(forward)

        async def counted(request: ProxyRequest) -> ProxyResponse:
            waiting.append(request)
            try:
                return await inner(request)
            finally:
                waiting[:] = [one for one in waiting if one is not request]

        return counted

    return outer


@pytest_anyio
async def test_links_are_those_of_each_caller(upstream: RawUpstream) -> None:
    body = b'{"id":"p1","status":"starting","urls":{"get":"https://api.replicate.com/v1/predictions/p1"}}'

    def script(connection: Connection) -> None:
        connection.request()
        connection.upstream.go_on.wait(5)
        connection.answer(body)

    upstream.script = script
    waiting: list[object] = []
    app = proxy(upstream.url, layers=[watched(coalesce_polls(), waiting)])
    callers = {name: Caller() for name in (b"a.test", b"b.test")}
    async with anyio.create_task_group() as tasks:
        for name, caller in callers.items():
            scope = http_scope("GET", "/v1/predictions/p1") | {"headers": [(b"host", name), KEY]}
            tasks.start_soon(caller.call, app, scope)
        await until(lambda: len(waiting) == 2)
        upstream.go_on.set()
    for name, caller in callers.items():
        assert json.loads(caller.content)["urls"]["get"] == f"http://{name.decode()}/v1/predictions/p1"
    assert len(upstream.requests) == 1
    await app.aclose()


@pytest_anyio
async def test_an_answer_that_is_cut_is_an_error_for_all(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.send(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nabc")
        connection.upstream.go_on.wait(5)

    upstream.script = script
    waiting: list[object] = []
    app = proxy(upstream.url, layers=[watched(coalesce_polls(), waiting)])
    callers = [Caller() for _ in range(3)]
    async with anyio.create_task_group() as tasks:
        for caller in callers:
            tasks.start_soon(caller.call, app, http_scope("GET", "/v1/predictions/p1"))
        await until(lambda: len(waiting) == 3)
        upstream.go_on.set()
    assert [caller.status for caller in callers] == [502] * 3
    assert len(upstream.requests) == 1
    await app.aclose()


@pytest_anyio
async def test_25_pollers_as_the_server_counts_them(fake_replicate: FakeReplicate) -> None:
    """An interval a tenth as long, and polls ten times as often: no more calls than the time has room for."""
    interval, rounds = 0.05, 6
    keys = {"pk-team-a": ReplicateKey(fake_replicate.token, tenant="team-a")}
    layers = [coalesce_polls(interval=interval)]
    app = proxy(fake_replicate.url, key_resolver=MappingKeyResolver(keys), layers=layers)
    id = await created(app, KEY, CREATES["predictions.create"])
    answers: list[tuple[int | None, str]] = []

    async def poller() -> None:
        for _ in range(rounds):
            caller = await Caller().call(app, http_scope("GET", f"/v1/predictions/{id}"))
            answers.append((caller.status, json.loads(caller.content)["id"]))
            await anyio.sleep(interval)

    began = time.monotonic()
    await all_of(*(poller for _ in range(25)))
    room = (time.monotonic() - began) / interval + 1
    await app.aclose()
    polls = [request for request in fake_replicate.requests if request.operation == "predictions.get"]
    assert answers == [(200, id)] * (25 * rounds)
    assert rounds <= len(polls) <= room
    assert len(polls) < 25 * rounds


# --- over a server


class Client:
    """A socket that asks once, and may be closed at any moment."""

    def __init__(self, url: str, target: str = "/v1/predictions/p1", method: str = "GET") -> None:
        host, _, port = url.removeprefix("http://").partition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=5)
        head = f"{method} {target} HTTP/1.1\r\nhost: {host}\r\nx-portkey-api-key: pk-team-a\r\nconnection: close\r\n"
        self._socket.sendall(head.encode() + b"content-length: 0\r\n\r\n" * (method == "POST") + b"\r\n")

    def answer(self) -> tuple[bytes, bytes]:
        """Status and body."""
        with self._socket:
            came = b"".join(iter(lambda: self._socket.recv(65536), b""))
        head, _, body = came.partition(b"\r\n\r\n")
        return head.split()[1], body

    def leave(self) -> None:
        self._socket.close()


@dataclass
class Served:
    url: str
    upstream: RawUpstream
    waiting: list[object]

    def wait(self, *, waiting: int, sent: int) -> None:
        """Until so many wait in the layer and so many requests went up."""
        deadline = time.monotonic() + 5
        while len(self.waiting) != waiting or len(self.upstream.requests) != sent:
            assert time.monotonic() < deadline, (len(self.waiting), len(self.upstream.requests))
            time.sleep(0.002)


@contextmanager
def served(upstream: RawUpstream, *, interval: float = 0.0) -> Iterator[Served]:
    waiting: list[object] = []
    app = proxy(upstream.url, layers=[watched(coalesce_polls(interval=interval), waiting)])
    with serve(app) as running:
        yield Served(running.url, upstream, waiting)


def halfway(connection: Connection) -> None:
    connection.request()
    connection.send(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 8\r\n\r\n" + b'{"n"')
    connection.upstream.ready.set()
    connection.upstream.go_on.wait(5)
    connection.send(b": 1}")


@pytest.mark.parametrize("script", [held, halfway])
@pytest.mark.parametrize("leaver", [0, 1])
def test_a_client_that_leaves_takes_nobody_along(
    upstream: RawUpstream, script: Callable[[Connection], None], leaver: int
) -> None:
    upstream.script = script
    with served(upstream) as server:
        clients = [Client(server.url)]
        server.wait(waiting=1, sent=1)
        clients += [Client(server.url), Client(server.url)]
        server.wait(waiting=3, sent=1)
        clients.pop(leaver).leave()
        server.wait(waiting=2, sent=1)
        assert not upstream.closed.is_set()
        upstream.go_on.set()
        answers = [client.answer() for client in clients]
    assert answers[0] == answers[1]
    assert answers[0][0] == b"200"
    assert json.loads(answers[0][1])["n"] == 1
    assert len(upstream.requests) == 1


def test_the_last_client_that_leaves_ends_the_call(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    upstream.script = script
    with served(upstream) as server:
        clients = [Client(server.url) for _ in range(3)]
        server.wait(waiting=3, sent=1)
        for client in clients:
            assert not upstream.closed.is_set()
            client.leave()
        assert upstream.closed.wait(5)
        upstream.script = answer_all
        assert Client(server.url).answer()[0] == b"200"


def test_a_client_that_leaves_while_it_waits_for_the_next_call(upstream: RawUpstream) -> None:
    with served(upstream, interval=60.0) as server:
        assert Client(server.url).answer()[0] == b"200"
        clients = [Client(server.url) for _ in range(2)]
        server.wait(waiting=2, sent=1)
        clients[0].leave()
        server.wait(waiting=1, sent=1)
        assert Client(server.url, "/v1/predictions/p1/cancel", "POST").answer()[0] == b"200"
        assert clients[1].answer()[0] == b"200"  # the cancel ended its waiting
        clients = [Client(server.url) for _ in range(2)]
        server.wait(waiting=2, sent=3)
        for client in clients:
            client.leave()
        server.wait(waiting=0, sent=3)


def test_a_client_that_leaves_just_as_the_answer_comes(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.upstream.ready.set()
            connection.answer()

    upstream.script = script
    with served(upstream) as server:
        for _ in range(30):
            upstream.ready.clear()
            clients = [Client(server.url) for _ in range(3)]
            assert upstream.ready.wait(5)
            clients.pop(0).leave()
            assert [client.answer() for client in clients] == [(b"200", b"{}")] * 2
        server.wait(waiting=0, sent=len(upstream.requests))


def test_a_server_that_stops_while_a_call_is_under_way(upstream: RawUpstream, caplog: pytest.LogCaptureFixture) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.wait_closed()

    upstream.script = script
    with serve(proxy(upstream.url, layers=[coalesce_polls()]), grace=0.01) as running:
        clients = [Client(running.url) for _ in range(2)]
        deadline = time.monotonic() + 5
        while not upstream.requests and time.monotonic() < deadline:
            time.sleep(0.002)
    assert upstream.closed.wait(5)
    for client in clients:
        client.leave()
    gc.collect()
    assert not [record for record in caplog.records if "destroyed" in record.getMessage()]


@each_backend
@pytest.mark.parametrize("phase", ["under way", "waiting", "abandoned"])
def test_an_event_loop_that_ends_while_a_call_is_under_way(
    upstream: RawUpstream, backend: str, phase: str, caplog: pytest.LogCaptureFixture
) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        if phase == "waiting":
            connection.answer()
        connection.upstream.ready.set()
        connection.wait_closed()

    upstream.script = script
    app = proxy(upstream.url, layers=[coalesce_polls(interval=60.0)])

    async def poll() -> None:
        await Caller().call(app, http_scope("GET", "/v1/predictions/p1"))

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            if phase == "waiting":
                await poll()
            tasks.start_soon(poll)
            await anyio.to_thread.run_sync(upstream.ready.wait, 5)
            if phase == "waiting":
                await anyio.sleep(0.05)
            tasks.cancel_scope.cancel()
        if phase == "abandoned":
            await anyio.sleep(0.05)
        if phase == "waiting":
            await app.aclose()

    async def ends_first() -> None:
        """The host's own tasks are ended by `asyncio.run`, with all others."""
        task = asyncio.ensure_future(poll())
        await asyncio.to_thread(upstream.ready.wait, 5)
        assert not task.done()

    if backend == "asyncio" and phase == "under way":
        asyncio.run(ends_first())
    else:
        anyio.run(main, backend=backend)
    assert upstream.closed.wait(5)
    gc.collect()
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("backends", [("asyncio", "asyncio"), ("trio", "trio"), ("asyncio", "trio")])
def test_two_event_loops_call_by_themselves(upstream: RawUpstream, backends: tuple[str, str]) -> None:
    upstream.script = held
    waiting: list[object] = []
    app = proxy(upstream.url, layers=[watched(coalesce_polls(), waiting)])
    contents: list[list[bytes]] = []

    async def main() -> None:
        callers = [Caller() for _ in range(5)]
        async with anyio.create_task_group() as tasks:
            for caller in callers:
                tasks.start_soon(caller.call, app, http_scope("GET", "/v1/predictions/p1"))
        contents.append([caller.content for caller in callers])
        await app.aclose()

    threads = [threading.Thread(target=partial(anyio.run, main, backend=backend)) for backend in backends]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 5
    while (len(waiting) < 10 or len(upstream.requests) < 2) and time.monotonic() < deadline:
        time.sleep(0.002)
    upstream.go_on.set()
    for thread in threads:
        thread.join()
    assert len(upstream.requests) == 2
    assert [len(set(one)) for one in contents] == [1, 1]
    assert len(contents[0]) == len(contents[1]) == 5


# --- as it is told


class Told:
    """What one proxy with this layer tells."""

    def __init__(self, exporter: InMemorySpanExporter, reader: InMemoryMetricReader) -> None:
        self._exporter, self._reader = exporter, reader

    def spans(self, name: str) -> list[ReadableSpan]:
        """In the order of their end."""
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    @property
    def polls(self) -> list[ReadableSpan]:
        return [span for span in self.spans(f"GET {ROUTE}") if span.kind is SpanKind.SERVER]

    @property
    def attempts(self) -> list[ReadableSpan]:
        return [span for span in self.spans(f"GET {ROUTE}") if span.kind is SpanKind.CLIENT]

    @property
    def runs(self) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name.startswith("generate_content")]

    def points(self, name: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        assert data is not None
        return [
            point
            for of_resource in data.resource_metrics
            for of_scope in of_resource.scope_metrics
            for metric in of_scope.metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


ROUTE = "/v1/predictions/{prediction_id}"
HEADERS = ("replicate_proxy.coalesced", "replicate_proxy.outcome", "http.response.status_code")


def _id(span: ReadableSpan) -> int:
    assert span.context is not None
    return int(span.context.span_id)


def _links(span: ReadableSpan) -> list[int]:
    return [link.context.span_id for link in span.links]


@pytest.fixture
def told(exporter: InMemorySpanExporter) -> Told:
    return Told(exporter, InMemoryMetricReader())


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(story, "GRACE", 0.0)


@contextmanager
def stage(told: Told, tracer_provider: TracerProvider, waiting: list[object], **options: Any) -> Iterator[Any]:
    """The proxy before a FakeReplicate whose polls wait for `gate`."""
    fake = FakeReplicate(tokens={TOKEN: "acme"}, queue_time=0.0, run_time=60.0)
    gate = threading.Event()

    class Gated(httpx.AsyncBaseTransport):
        """Over the network in memory, and polls only when the test says so."""

        def __init__(self) -> None:
            self._transport = httpx.ASGITransport(fake)
            self.polls: list[httpx.Request] = []

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            if request.method == "GET":
                self.polls.append(request)
                await until(gate.is_set)
            return await self._transport.handle_async_request(request)

    provider = MeterProvider([told._reader], shutdown_on_exit=False)
    transport = Gated()
    app = proxy(
        "https://api.replicate.com/v1",
        transport=transport,
        tracer_provider=tracer_provider,
        meter_provider=provider,
        layers=[watched(coalesce_polls(**options), waiting)],
    )
    yield app, fake, gate, transport


@pytest_anyio
async def test_each_has_a_span_linked_to_the_one_that_went_up(told: Told, tracer_provider: TracerProvider) -> None:
    waiting: list[object] = []
    with stage(told, tracer_provider, waiting) as (app, fake, gate, _):
        id = await created(app, KEY)
        fake.clock.advance(61)
        callers = [Caller() for _ in range(4)]
        async with anyio.create_task_group() as tasks:
            for caller in callers:
                tasks.start_soon(caller.call, app, http_scope("GET", f"/v1/predictions/{id}"))
            await until(lambda: len(waiting) == 4)
            gate.set()
    assert len({caller.content for caller in callers}) == 1
    [create] = told.spans("POST /v1/predictions")[-1:]
    [attempt] = told.attempts
    [beginner] = [span for span in told.polls if of(span, "replicate_proxy.coalesced") == [None]]
    others = [span for span in told.polls if span is not beginner]
    assert attempt.parent == beginner.context
    assert of(beginner, *HEADERS) == [None, "forwarded", 200]
    assert [of(span, *HEADERS) for span in others] == [[True, "answered", 200]] * 3
    assert _links(beginner) == [_id(create)]
    for span in others:
        assert _links(span) == [_id(beginner), _id(create)]
        assert of(span, "replicate.prediction.id", "replicate.prediction.status") == [id, "succeeded"]
    [run] = told.runs
    assert run.parent is not None
    assert run.parent.span_id == _id(create)
    assert [point.value for point in told.points("replicate.prediction.terminal")] == [1]
    assert run.attributes is not None
    assert 1 <= int(str(run.attributes["replicate_proxy.lifecycle.polls"])) <= 4


@pytest_anyio
@pytest.mark.parametrize("begun", [True, False])
async def test_a_beginner_that_left_takes_nothing_of_the_story_along(
    told: Told, tracer_provider: TracerProvider, exporter: InMemorySpanExporter, begun: bool
) -> None:
    """Its span may have ended before the attempt's begins, where it left while all waited for the next call."""
    waiting: list[object] = []
    with stage(told, tracer_provider, waiting, interval=0.2) as (app, fake, gate, transport):
        id = await created(app, KEY)
        scope = http_scope("GET", f"/v1/predictions/{id}")
        if not begun:
            gate.set()
            await Caller().call(app, scope)
            gate.clear()
            exporter.clear()
        fake.clock.advance(61)
        leaver, stays = Caller(), Caller()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leaver.call, app, scope)
            await until(lambda: len(waiting) == 1 and (len(transport.polls) == 1 or not begun))
            tasks.start_soon(stays.call, app, scope)
            await until(lambda: len(waiting) == 2)
            leaver.left.set()
            await until(lambda: len(told.polls) == 1)
            gate.set()
    [left, stayed] = told.polls
    [attempt] = told.attempts
    assert (stays.status, leaver.status) == (200, 499)
    assert of(left, "replicate_proxy.outcome") == ["client_disconnected"]
    assert left.status.status_code is StatusCode.UNSET
    assert attempt.parent == left.context
    assert attempt.status.status_code is StatusCode.UNSET
    assert of(attempt, "http.response.status_code") == [200]
    assert attempt.end_time is not None
    assert left.end_time is not None
    assert attempt.end_time >= left.end_time
    assert of(stayed, *HEADERS, "replicate.prediction.status") == [True, "answered", 200, "succeeded"]
    assert _links(stayed)[0] == _id(left)
    assert len(_links(stayed)) == 2
    [run] = told.runs
    assert of(run, "replicate_proxy.lifecycle.polls", "replicate_proxy.lifecycle.origin") == [2 - begun, "store"]


def _reached(size: Callable[[], int], expected: int) -> bool:
    return size() == expected


@pytest_anyio
async def test_waiting_is_no_overhead(
    told: Told, tracer_provider: TracerProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Time passes only while all wait, for the call and for the next one: some of them leave before the answer."""
    seconds = 0.0
    for module in (waiting_module, request_module):
        monkeypatch.setattr(module, "perf_counter", lambda: seconds)
    waiting: list[object] = []
    with stage(told, tracer_provider, waiting, interval=0.1) as (app, _, gate, transport):
        id = await created(app, KEY)
        scope = http_scope("GET", f"/v1/predictions/{id}")
        for sent in (1, 2):
            callers = [Caller() for _ in range(3)]
            async with anyio.create_task_group() as tasks:
                for n, caller in enumerate(callers, 1):
                    tasks.start_soon(caller.call, app, scope)
                    await until(partial(_reached, waiting.__len__, n))
                seconds += 30
                await until(partial(_reached, transport.polls.__len__, sent))
                seconds += 10
                callers[0].left.set()
                await until(lambda: len(waiting) == 2)
                seconds += 5
                gate.set()
            gate.clear()

    def total(name: str) -> float:
        points = told.points(name)
        return float(sum(point.sum for point in points if point.attributes["replicate.operation"] == "predictions.get"))

    assert total("replicate_proxy.request.duration") == 2 * (40 + 45 + 45)
    assert total("replicate_proxy.overhead.duration") == 0


@pytest_anyio
async def test_a_policy_s_own_predictions_come_first(upstream: RawUpstream) -> None:
    """What is not a tenant's own is refused above this layer, however many poll it."""
    from tests.tenants import owned, store_of

    app = owned(upstream.url, store=store_of("p1", tenant="team-a"), layers=[coalesce_polls()])
    assert [(await ask(app, who, "GET", "/v1/predictions/p1")).status for who in (A, B, B)] == [200, 404, 404]
    assert len(upstream.requests) == 1
