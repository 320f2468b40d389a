from __future__ import annotations

import gzip
import json
import math
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anyio
import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.aio.storage import RedisStorage

from replicate_proxy_mw import Forward, ProxyRequest, ProxyResponse, Rates, ReplicateKey, ending
from replicate_proxy_mw.errors import (
    ClientDisconnected,
    CreateUnknown,
    GuardrailDenied,
    IdempotencyKeyReused,
    Overloaded,
    ProxyError,
    SpendLimitReached,
    StoreFailed,
    UpstreamFailed,
    UpstreamUnreachable,
)
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.json_bodies import MAX_SIZE
from replicate_proxy_mw.layers.spending import SpendingLimit, limit_spending
from replicate_proxy_mw.store.counters import MemoryCounters, owner
from replicate_proxy_mw.telemetry import PriceRequest
from replicate_proxy_mw.testing import FakeReplicate
from replicate_proxy_mw.testing.clock import ManualClock
from tests.counting import on_asyncio, out_of_order, storage_of
from tests.raw_asgi import TOKEN, Caller, call, http_scope, proxy
from tests.requests import request_of
from tests.services import RedisServer, redis_server, two_processes

pytestmark = pytest.mark.anyio

A, B, FREE = ReplicateKey(TOKEN, tenant="a"), ReplicateKey(TOKEN, tenant="b"), ReplicateKey(TOKEN)

NOON = 20_000 * 86400 + 43200.0  # 2024-10-04
PRICES = {"acme/painter": Rates(per_second=0.25)}
COST = 0.5  # of each run


@dataclass
class Replicate:
    """What lies below the layer: runs that take 2 seconds, and end when the test says so."""

    now: float = NOON
    runs: dict[str, str] = field(default_factory=dict)
    calls: int = 0
    answer: Callable[[ProxyRequest], ProxyResponse] | None = None
    created_as: str = "starting"
    model: str = "acme/painter"
    name: str = "p"

    async def __call__(self, request: ProxyRequest) -> ProxyResponse:
        self.calls += 1
        about = request.route.details
        if self.answer is not None:
            return self.answer(request)
        if about is not None and about.creates:
            id = f"{self.name}{len(self.runs)}"
            self.runs[id] = self.created_as
            return ProxyResponse.json(201, self.payload(id))
        [id] = request.route.params.values()
        return ProxyResponse.json(200, self.payload(id))

    def payload(self, id: str, **more: Any) -> dict[str, Any]:
        moment = "2024-10-04T12:00:00.000000Z"
        ended = {"started_at": moment, "metrics": {"predict_time": 2.0}} if self.runs[id] in ENDS else {}
        return {"id": id, "status": self.runs[id], "model": self.model, "created_at": moment, **ended, **more}

    def end(self, status: str = "succeeded") -> None:
        self.runs = dict.fromkeys(self.runs, status)


ENDS = ("succeeded", "failed", "canceled", "aborted")


async def exchange(forward: Forward, key: ReplicateKey, method: str, target: str) -> ProxyResponse:
    """What the middleware does with a request."""
    request = request_of(method, target, key=key)
    try:
        return await forward(request)
    finally:
        await ending.run(request.afterwards)


async def create(forward: Forward, key: ReplicateKey = A, target: str = "/predictions") -> ProxyResponse:
    return await exchange(forward, key, "POST", target)


async def poll(forward: Forward, id: str, key: ReplicateKey = A) -> ProxyResponse:
    return await exchange(forward, key, "GET", f"/predictions/{id}")


async def creates(forward: Forward, key: ReplicateKey = A, *, tries: int = 10) -> int:
    """How many of so many creates pass."""
    passed = 0
    for _ in range(tries):
        with suppress(SpendLimitReached):
            passed += (await create(forward, key)).status == 201
    return passed


def spending(replicate: Replicate, **options: Any) -> tuple[SpendingLimit, Forward]:
    defaults: dict[str, Any] = {"per_day": 10.0, "prices": PRICES, "now": lambda: replicate.now}
    layer = limit_spending(**(defaults | options))
    return layer, layer(replicate)


# --- what counts


async def test_a_run_counts_once_when_its_end_is_first_read() -> None:
    layer, forward = spending(replicate := Replicate())
    await create(forward)
    assert await layer.spent("a") == 0
    await poll(forward, "p0")
    assert await layer.spent("a") == 0
    replicate.end()
    for _ in range(3):
        await poll(forward, "p0")
        await exchange(forward, A, "POST", "/predictions/p0/cancel")
        assert await layer.spent("a") == COST
    assert await layer.spent("b") == 0


@pytest.mark.parametrize("status", ENDS)
async def test_a_create_or_a_cancel_may_be_the_first_to_tell_the_end(status: str) -> None:
    layer, forward = spending(replicate := Replicate(created_as=status))
    await create(forward)
    assert await layer.spent("a") == COST
    replicate.created_as = "processing"
    await create(forward)
    replicate.end("canceled")
    await exchange(forward, A, "POST", "/predictions/p1/cancel")
    assert await layer.spent("a") == 2 * COST


async def test_trainings_count_as_predictions_do() -> None:
    asked: list[PriceRequest] = []

    async def prices(request: PriceRequest) -> Rates:
        asked.append(request)
        return Rates(per_run=3)

    layer, forward = spending(replicate := Replicate(), prices=prices, per_day=3)
    await create(forward, target="/models/a/b/versions/c/trainings")
    replicate.end()
    for _ in range(2):
        await exchange(forward, A, "GET", "/trainings/p0")
    assert await layer.spent("a") == 3
    [request] = asked
    assert (request.kind, request.tenant, request.model) == ("training", "a", "acme/painter")
    for target in ("/predictions", "/models/a/b/predictions", "/deployments/a/b/predictions"):
        with pytest.raises(SpendLimitReached):
            await create(forward, target=target)


async def test_what_others_created_counts_for_them_and_what_nobody_did_for_who_reads_it() -> None:
    layer, forward = spending(replicate := Replicate(), reserve=1.0)
    await create(forward, A)
    replicate.runs["elsewhere"] = "succeeded"
    replicate.end()
    await poll(forward, "p0", B)
    assert [await layer.spent(tenant) for tenant in "ab"] == [1.0, 0]
    await poll(forward, "p0", A)
    await poll(forward, "p0", B)
    assert [await layer.spent(tenant) for tenant in "ab"] == [COST, 0]
    for key in (B, A):
        await poll(forward, "elsewhere", key)
    assert [await layer.spent(tenant) for tenant in "ab"] == [COST, COST]


async def test_a_run_counts_on_the_day_of_its_creation() -> None:
    replicate = Replicate(now=NOON + 86400 / 2 + 1)  # the proxy's clock is ahead: there it is the next day
    layer, forward = spending(replicate, reserve=2.0)
    await create(forward)
    assert await layer.spent("a") == 0
    replicate.now = NOON
    assert await layer.spent("a") == 2.0
    replicate.end()
    replicate.now = NOON + 86400
    await poll(forward, "p0")
    assert await layer.spent("a") == 0
    replicate.now = NOON
    assert await layer.spent("a") == COST


async def test_a_run_without_a_day_counts_today_and_what_is_reserved_for_it_stays() -> None:
    def answer(request: ProxyRequest) -> ProxyResponse:
        return ProxyResponse.json(200, replicate.payload("p0", created_at=None))

    replicate = Replicate(answer=answer, runs={"p0": "starting"})
    layer, forward = spending(replicate, reserve=2.0)
    await create(forward)
    replicate.end()
    await poll(forward, "p0")
    assert await layer.spent("a") == 2.0 + COST


async def fails(request: PriceRequest) -> Rates:
    raise OSError("hunter2")


@pytest.mark.parametrize(
    "prices",
    [
        {"acme/other": Rates(per_run=9)},
        {"acme/painter": Rates(per_run=9, currency="EUR")},
        {"acme/painter": Rates(per_input_token=9)},
        fails,
    ],
)
async def test_what_has_no_price_counts_as_what_was_reserved(prices: Any) -> None:
    layer, forward = spending(replicate := Replicate(runs={"elsewhere": "succeeded"}), prices=prices, reserve=2.0)
    await create(forward)
    replicate.end()
    for id in ("p1", "elsewhere"):  # the first of them was created here
        for _ in range(2):
            await poll(forward, id)
    assert await layer.spent("a") == 4.0


async def test_another_currency_is_the_hosts_to_choose() -> None:
    prices = {"acme/painter": Rates(per_second=0.25, currency="EUR")}
    _, forward = spending(Replicate(created_as="succeeded"), prices=prices, currency="EUR", per_day=0.6)
    assert await creates(forward) == 2
    with pytest.raises(SpendLimitReached, match=r"1 of 0\.6 EUR a day"):
        await create(forward)


@given(st.lists(st.floats(0, 1e300), max_size=20))
def test_amounts_are_counted_in_millionths_rounded_up(amounts: list[float]) -> None:
    async def play() -> None:
        remaining = list(amounts)

        async def prices(request: PriceRequest) -> Rates:
            return Rates(per_run=remaining.pop())

        layer, forward = spending(Replicate(created_as="succeeded"), prices=prices, per_day=None)
        assert await creates(forward, tries=len(amounts)) == len(amounts)
        known = [min(float(f"{amount:.12g}"), 1e9) for amount in amounts]
        spent = await layer.spent("a")
        assert math.fsum(known) * 0.999999 - 1e-6 <= spent <= math.fsum(known) * 1.000001 + 1.001e-6 * len(known)

    anyio.run(play)


# --- the limit


async def test_creates_are_refused_beyond_the_limit_and_reads_never() -> None:
    layer, forward = spending(replicate := Replicate(created_as="succeeded"), per_day=1.2)
    assert await creates(forward) == 3
    calls = replicate.calls
    replicate.now += 3600.5
    for target in ("/predictions", "/models/a/b/versions/c/trainings"):
        with pytest.raises(SpendLimitReached) as refused:
            await create(forward, target=target)
        assert refused.value.message == (
            "limit_spending: 1.5 of 1.2 USD a day are spent or reserved; nothing was created. "
            "There is room again by 2024-10-05T00:00:00Z."
        )
        assert dict(refused.value.headers) == {b"retry-after": b"39600"}
    assert replicate.calls == calls
    assert await creates(forward, B) == 3
    for method, target in (("GET", "/predictions/p0"), ("POST", "/predictions/p0/cancel"), ("GET", "/files/p0")):
        assert (await exchange(forward, A, method, target)).status == 200
    replicate.answer = lambda request: ProxyResponse(status=200, headers=(), body=Chunks([]))
    for method, target in (("POST", "/files"), ("GET", "/predictions"), ("GET", "/nobody/knows")):
        assert (await exchange(forward, A, method, target)).status == 200
    replicate.answer = None
    replicate.now = NOON + 86400
    assert (await create(forward)).status == 201
    assert await layer.spent("a") == 0  # it was created, it says, the day before


async def test_tenants_may_have_other_limits_or_none_and_a_key_without_one_has_its_own() -> None:
    _, forward = spending(Replicate(created_as="succeeded"), per_day=2, tenants={"b": 1, "c": None, "d": 0})
    keys = [A, B, FREE, ReplicateKey(TOKEN[::-1]), *(ReplicateKey(TOKEN, tenant=name) for name in "cd")]
    assert [await creates(forward, key, tries=6) for key in keys] == [4, 2, 4, 4, 6, 0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"per_day": -1}, "per_day: must be a number of at least 0 and at most 1000000000"),
        ({"per_day": math.inf}, "per_day: must be a number"),
        ({"per_day": math.nan}, "per_day: must be a number"),
        ({"per_day": True}, "per_day: must be a number"),
        ({"per_day": "20"}, "per_day: must be a number"),
        ({"tenants": {"b": -1}}, "tenants: 'b': must be a number"),
        ({"reserve": -1}, "reserve: must be a number"),
        ({"reserve": None, "per_day": None}, "reserve: must be a number"),
        ({"reserve": 11}, "per_day: is less than reserve"),
        ({"reserve": 1, "tenants": {"b": 0.5}}, "tenants: 'b': is less than reserve"),
        ({"currency": "euro"}, "currency: must be three capitals"),
        ({"prices": 5}, "prices: must be a table or an async callable"),
        ({"timeout": 0}, "timeout: must be more than 0 seconds"),
        ({"storage": "redis://"}, "storage: must be one of limits.aio.storage"),
    ],
)
async def test_an_option_has_to_be_one(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{says}"):
        spending(Replicate(), **options)


# --- what is reserved


async def test_what_is_reserved_is_replaced_by_the_cost() -> None:
    layer, forward = spending(replicate := Replicate(), per_day=3, reserve=1.0)
    assert await creates(forward) == 3
    with pytest.raises(SpendLimitReached, match="3 of 3 USD a day are spent or reserved"):
        await create(forward)
    assert await layer.spent("a") == 3
    replicate.end()
    await poll(forward, "p0")
    assert await layer.spent("a") == 2.5
    await poll(forward, "p1")
    assert await layer.spent("a") == 2
    assert await creates(forward) == 1


def status(number: int, content: Any = None) -> Callable[[ProxyRequest], ProxyResponse]:
    return lambda request: ProxyResponse.json(number, content or {"detail": "no"})


def raises(error: Exception) -> Callable[[ProxyRequest], ProxyResponse]:
    def answer(request: ProxyRequest) -> ProxyResponse:
        raise error

    return answer


NOTHING_CREATED = [
    *(status(number) for number in (400, 401, 402, 403, 404, 413, 422, 429)),
    *(raises(error) for error in (UpstreamUnreachable(), Overloaded(), IdempotencyKeyReused())),
]
MAYBE_CREATED = [
    *(status(number) for number in (408, 409, 446, 500, 502, 503, 504, 302)),
    *(raises(error) for error in (UpstreamFailed(), CreateUnknown(), GuardrailDenied(), ClientDisconnected())),
    raises(ZeroDivisionError()),
]
UNREADABLE = [
    status(201),
    status(201, ["p0"]),
    lambda request: ProxyResponse(status=200, headers=((b"content-type", b"text/event-stream"),), body=Chunks([b"x"])),
    lambda request: ProxyResponse(
        status=201,
        headers=((b"content-type", b"application/json"), (b"content-encoding", b"gzip")),
        body=Chunks([b"damaged"]),
    ),
    lambda request: ProxyResponse(
        status=201,
        headers=((b"content-type", b"application/json"),),
        body=Chunks([json.dumps(Replicate(runs={"p0": "failed"}).payload("p0")).encode(), b" " * MAX_SIZE], _more()),
    ),
]


async def _more() -> AsyncIterator[bytes]:
    yield b" "


@pytest.mark.parametrize("answer", NOTHING_CREATED)
async def test_what_surely_created_nothing_counts_as_nothing(answer: Any) -> None:
    layer, forward = spending(replicate := Replicate(answer=answer), per_day=1, reserve=1.0)
    for _ in range(3):
        with suppress(UpstreamUnreachable, Overloaded, IdempotencyKeyReused):  # a refusal is none of them
            assert 400 <= (await create(forward)).status < 500
    assert await layer.spent("a") == 0
    replicate.answer = None
    assert await creates(forward) == 1


@pytest.mark.parametrize("answer", [*MAYBE_CREATED, *UNREADABLE])
async def test_what_may_have_created_something_counts_as_what_was_reserved(answer: Any) -> None:
    layer, forward = spending(replicate := Replicate(answer=answer), per_day=1, reserve=1.0)
    with suppress(ProxyError, ZeroDivisionError):
        await create(forward)
    assert await layer.spent("a") == 1
    replicate.answer = None
    assert await creates(forward) == 0


async def test_an_earlier_run_that_answers_a_create_is_not_reserved_for_again() -> None:
    layer, forward = spending(replicate := Replicate(), reserve=1.0)
    await create(forward)
    replicate.answer = lambda request: ProxyResponse.json(201, replicate.payload("p0"))
    await create(forward)
    assert await layer.spent("a") == 1
    replicate.end()
    for _ in range(2):
        await create(forward)
        assert await layer.spent("a") == COST


@pytest.mark.parametrize("target", ["/predictions/", "/Predictions", "/predictions%2f", "/what/nobody/knows"])
async def test_a_post_that_may_be_another_spelling_of_a_create_counts_as_one(target: str) -> None:
    layer, forward = spending(replicate := Replicate(), per_day=1, reserve=1.0)
    replicate.answer = status(404)
    await create(forward, target=target)
    assert await layer.spent("a") == 0
    replicate.runs["p0"] = "starting"
    replicate.answer = lambda request: ProxyResponse.json(201, replicate.payload("p0"))
    await create(forward, target=target)
    assert await layer.spent("a") == 1
    with pytest.raises(SpendLimitReached):
        await create(forward, target=target)
    assert replicate.calls == 2
    assert (await exchange(forward, A, "GET", target)).status == 201  # no other method is refused
    replicate.end()
    await poll(forward, "p0")
    assert await layer.spent("a") == COST


async def test_what_was_reserved_for_an_answer_that_was_not_read_counts_beside_the_cost() -> None:
    layer, forward = spending(replicate := Replicate(), reserve=1.0)
    replicate.answer = raises(ClientDisconnected())
    with suppress(ClientDisconnected):
        await create(forward)
    replicate.answer, replicate.runs["p0"] = None, "succeeded"
    await poll(forward, "p0")
    assert await layer.spent("a") == 1 + COST


async def test_who_leaves_before_anything_went_up_has_spent_nothing_and_after_it_what_was_reserved() -> None:
    async def hangs(request: ProxyRequest) -> ProxyResponse:
        under_way.set()
        await anyio.sleep_forever()
        raise AssertionError

    under_way = anyio.Event()
    layer = limit_spending(per_day=10, prices=PRICES, reserve=1.0)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await create(layer(hangs))
    assert not under_way.is_set()
    assert await layer.spent("a") == 0
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(create, layer(hangs))
        await under_way.wait()
        tasks.cancel_scope.cancel()
    assert await layer.spent("a") == 1


class Hanging(MemoryCounters):
    """Counts, and then takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.counted, self.go_on = anyio.Event(), anyio.Event()

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        count = await super().incr(key, expiry, amount)
        self.counted.set()
        await self.go_on.wait()
        return count


async def test_who_leaves_while_it_is_reserved_for_has_spent_nothing() -> None:
    storage = Hanging()
    layer, forward = spending(replicate := Replicate(), reserve=1.0, storage=storage, timeout=60)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(create, forward)
        await storage.counted.wait()
        tasks.cancel_scope.cancel()
        storage.go_on.set()
    assert replicate.calls == 0
    assert await layer.spent("a") == 0


async def test_encoded_answers_are_read_and_go_out_as_they_came() -> None:
    def answer(request: ProxyRequest) -> ProxyResponse:
        plain = json.dumps(replicate.payload("p0")).encode()
        encoding = (b"content-encoding", b"gzip")
        return ProxyResponse(
            status=200, headers=((b"content-type", b"application/json"), encoding), body=Chunks([gzip.compress(plain)])
        )

    layer, forward = spending(replicate := Replicate(answer=answer, runs={"p0": "succeeded"}))
    response = await poll(forward, "p0")
    body = b"".join([chunk async for chunk in response.body])
    assert json.loads(gzip.decompress(body))["id"] == "p0"
    assert await layer.spent("a") == COST


# --- what the host was told


async def test_a_webhook_may_tell_the_end_and_counts_no_more_than_once() -> None:
    asked: list[PriceRequest] = []

    async def prices(request: PriceRequest) -> Rates:
        asked.append(request)
        return Rates(per_second=0.25)

    layer, forward = spending(replicate := Replicate(), reserve=1.0, prices=prices)
    for _ in range(2):
        await create(forward)
    await layer.count(replicate.payload("p0"), tenant="a")
    await layer.count({"id": "p0"}, tenant="a")
    assert await layer.spent("a") == 2
    replicate.end()
    await layer.count(replicate.payload("p0"), tenant="b")
    for _ in range(2):
        await layer.count(replicate.payload("p0"), tenant="a")
        await poll(forward, "p0")
    urls = {"get": "https://api.replicate.com/v1/trainings/p1"}
    await layer.count(replicate.payload("p1", urls=urls), tenant="a")
    assert [await layer.spent(tenant) for tenant in "ab"] == [2 * COST, 0]
    assert [(request.kind, request.tenant) for request in asked] == [("prediction", "a"), ("training", "a")]


# --- in any order


class Yielding(MemoryCounters):
    """Others run before each call, so often as `pauses` says."""

    def __init__(self, pauses: list[int]) -> None:
        super().__init__(now=lambda: NOON)
        self._pauses = pauses

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        await self._pause()
        return await super().incr(key, expiry, amount)

    async def get(self, key: str) -> int:
        await self._pause()
        return await super().get(key)

    async def _pause(self) -> None:
        for _ in range(self._pauses.pop() if self._pauses else 0):
            await anyio.lowlevel.checkpoint()


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.integers(0, 6), min_size=20, max_size=20),
    st.lists(st.sampled_from(["poll", "cancel", "webhook", "settle"]), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 2.0]),
)
def test_each_run_counts_once_whoever_sees_its_end_first(
    pauses: list[int], seers: list[str], ends_at_once: bool, reserve: float
) -> None:
    """All at the same time; the create's own record may come last."""

    async def play() -> None:
        replicate = Replicate(created_as="succeeded" if ends_at_once else "starting")
        layer, forward = spending(replicate, reserve=reserve, storage=Yielding(pauses), timeout=60)
        made = request_of("POST", "/predictions", key=A)
        await forward(made)
        replicate.end()
        async with anyio.create_task_group() as tasks:
            for seer in [*seers, "settle"]:
                if seer == "settle":
                    afterwards, made.afterwards[:] = list(made.afterwards), []
                    tasks.start_soon(ending.run, afterwards)
                elif seer == "webhook":
                    tasks.start_soon(partial(layer.count, replicate.payload("p0"), tenant="a"))
                elif seer == "poll":
                    tasks.start_soon(poll, forward, "p0")
                else:
                    tasks.start_soon(exchange, forward, A, "POST", "/predictions/p0/cancel")
        counted = {"settle"} == set(seers) and not ends_at_once
        assert await layer.spent("a") == (reserve if counted else COST)

    anyio.run(play)


OUTCOMES = ("created", "ended", "refused", "unknown", "unreachable", "left")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from([A, B, FREE]), st.sampled_from(OUTCOMES), st.booleans()), max_size=25),
    st.sampled_from([0.5, 0.75, 1.0]),
)
def test_no_tenant_spends_more_than_its_limit_and_all_that_is_reserved_is_settled(
    steps: list[tuple[ReplicateKey, str, bool]], reserve: float
) -> None:
    anyio.run(_play, steps, reserve)


async def _play(steps: list[tuple[ReplicateKey, str, bool]], reserve: float) -> None:
    """Creates, of which some are polled later; what is done afterwards is done when all have been tried."""
    replicate = Replicate()
    layer, forward = spending(replicate, per_day=3.0, reserve=reserve)
    answers = {"refused": status(422), "unknown": status(500), "unreachable": raises(UpstreamUnreachable())}
    expected: dict[str, list[float]] = {owner(key): [] for key in (A, B, FREE)}
    later: list[ProxyRequest] = []
    to_poll: list[tuple[str, ReplicateKey]] = []
    for key, outcome, at_once in steps:
        replicate.answer = answers.get(outcome)
        replicate.created_as = "failed" if outcome == "ended" else "starting"
        request = request_of("POST", "/predictions", key=key)
        spent = expected[owner(key)]
        before = replicate.calls
        with anyio.CancelScope() as scope:
            if outcome == "left":
                replicate.answer = partial(_leave, scope)
            try:
                response = await forward(request)
                assert response.status in (201, 422, 500)
                await anyio.lowlevel.checkpoint()
            except (SpendLimitReached, UpstreamUnreachable):
                pass
        sent = replicate.calls > before
        if sent and outcome == "created":
            to_poll.append((f"p{len(replicate.runs) - 1}", key))
        if at_once:
            await ending.run(request.afterwards)
        else:
            later.append(request)
        spent += {"created": [reserve], "ended": [COST], "unknown": [reserve], "left": [reserve]}.get(
            outcome, []
        ) * sent
        assert sum(spent) <= 3.0
        # Nobody is refused who has room, unless what others gave back had not come back yet.
        assert sent or later or sum(spent) + reserve > 3.0
    for request in later:
        await ending.run(request.afterwards)
    by_storage = {
        who: await layer._spent.on(who, int(NOON // 86400)) / 1e6
        for who in expected  # those without a tenant, too
    }
    assert by_storage == {who: pytest.approx(sum(spent)) for who, spent in expected.items()}
    replicate.answer = None
    replicate.end()
    for id, key in to_poll:
        await poll(forward, id, key)
        expected[owner(key)].remove(reserve)
        expected[owner(key)].append(COST)
    for who, spent in expected.items():
        assert await layer._spent.on(who, int(NOON // 86400)) / 1e6 == pytest.approx(sum(spent))


def _leave(scope: anyio.CancelScope, request: ProxyRequest) -> ProxyResponse:
    scope.cancel()
    return ProxyResponse(status=500, headers=(), body=Chunks([]))


# --- Redis


@pytest.fixture(scope="module")
def own_server() -> Iterator[RedisServer]:
    """A server that a test may stop."""
    with redis_server() as server:
        yield server


@on_asyncio
async def test_counters_in_redis_end(redis_service: RedisServer) -> None:
    async with storage_of(redis_service) as storage:
        layer, forward = spending(replicate := Replicate(), reserve=1.0, storage=storage)
        await create(forward)
        replicate.end()
        for _ in range(2):
            await poll(forward, "p0")
        assert await layer.spent("a") == COST
        redis = storage.bridge.storage
        ends = {key: await redis.ttl(key) async for key in redis.scan_iter(f"{storage.bridge.key_prefix}:*")}
        assert len(ends) == 3
        assert all(0 < ttl <= (2 * 86400 if b"/spent/" in key else 86400) for key, ttl in ends.items())
        assert sum(b"/spent/" in key for key in ends) == 1


ANOTHER_PROCESS = """
import asyncio, os, sys
from limits.aio.storage import RedisStorage
from tests.layers.test_spending import Replicate, creates, poll, spending

async def main(url, prefix):
    storage = RedisStorage(url, implementation="redispy", key_prefix=prefix)
    redis = storage.bridge.storage
    await storage.check()
    print("ready", flush=True)
    sys.stdin.readline()
    replicate = Replicate(name=f"p{os.getpid()}-")
    layer, forward = spending(replicate, per_day=50, reserve=1.0, storage=storage, timeout=10)
    print(sum(await asyncio.gather(*[creates(forward) for _ in range(6)])))
    await redis.sadd(prefix + "runs", "elsewhere", *replicate.runs)
    await redis.incr(prefix + "done")
    while int(await redis.get(prefix + "done")) < 2:
        await asyncio.sleep(0.01)
    # Both see the end of every run, at the same time.
    replicate.runs = {id.decode(): "succeeded" for id in await redis.smembers(prefix + "runs")}
    await asyncio.gather(*[poll(forward, id) for id in replicate.runs for _ in range(3)])
    await redis.aclose()

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


@on_asyncio
async def test_two_processes_spend_exactly_as_much_as_one_and_count_each_run_once(redis_service: RedisServer) -> None:
    prefix = str(uuid.uuid4())
    told = await anyio.to_thread.run_sync(two_processes, ANOTHER_PROCESS, f"async+{redis_service.url}", prefix)
    assert sum(map(int, told)) == 50
    # One more run than those was there for both to see.
    async with storage_of(redis_service, prefix) as storage:
        layer, _ = spending(Replicate(), storage=storage)
        assert await layer.spent("a") == 51 * COST


@pytest.mark.parametrize("outage", ["stopped", "frozen"])
@on_asyncio
async def test_while_redis_is_out_of_order_creates_are_refused_and_all_else_passes(
    own_server: RedisServer, outage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with storage_of(own_server) as storage:
        replicate = Replicate(runs={"p0": "succeeded"})
        layer, forward = spending(replicate, storage=storage, timeout=0.1)
        with out_of_order(own_server, outage):
            for _ in range(2):
                with pytest.raises(
                    StoreFailed, match=r"^limit_spending: this could not be counted, and nothing was sent"
                ):
                    await create(forward)
            assert replicate.calls == 0
            assert (await poll(forward, "p0")).status == 200
            assert (await exchange(forward, A, "POST", "/predictions/p0/cancel")).status == 200
            with pytest.raises(StoreFailed):
                await layer.spent("a")
            with pytest.raises(StoreFailed):
                await layer.count(replicate.payload("p0"), tenant="a")
        [line] = caplog.records
        assert line.getMessage().startswith("limit_spending: storage failed: ")
        # What was not counted then is when it is read again.
        assert await layer.spent("a") == 0
        await poll(forward, "p0")
        assert await layer.spent("a") == COST
        assert await creates(forward, tries=2) == 2


@pytest.mark.parametrize("outage", ["stopped", "frozen"])
@on_asyncio
async def test_a_host_may_have_creates_pass(own_server: RedisServer, outage: str) -> None:
    async with storage_of(own_server) as storage:
        layer, forward = spending(replicate := Replicate(), storage=storage, timeout=0.1, reserve=1.0, fail_open=True)
        made = request_of("POST", "/predictions", key=A)
        with out_of_order(own_server, outage):
            assert await creates(forward, tries=3) == 3
            assert (await forward(made)).status == 201
        # Of one whose exchange outlasts the outage, all is known.
        await ending.run(made.afterwards)
        assert await layer.spent("a") == 1
        replicate.end()
        for id in ("p0", "p3"):
            await poll(forward, id)
        assert await layer.spent("a") == 2 * COST


@pytest.mark.parametrize("outage", ["stopped", "frozen"])
@on_asyncio
async def test_no_answer_waits_for_redis_and_what_was_reserved_stays(own_server: RedisServer, outage: str) -> None:
    async with storage_of(own_server) as storage:
        replicate = Replicate(created_as="succeeded")
        layer, forward = spending(replicate, storage=storage, timeout=1000, reserve=1.0)
        made, read = request_of("POST", "/predictions", key=A), request_of("GET", "/predictions/p0", key=A)

        def answer(request: ProxyRequest) -> ProxyResponse:
            replicate.answer = None
            outages.enter_context(out_of_order(own_server, outage))
            replicate.runs["p0"] = "succeeded"
            return ProxyResponse.json(201, replicate.payload("p0"))

        replicate.answer = answer
        with ExitStack() as outages:
            with anyio.fail_after(10):
                for request in (made, read):
                    response = await forward(request)
                    body = b"".join([chunk async for chunk in response.body])
                    assert json.loads(body)["id"] == "p0"
            # All that is left to do has little time, however much the storage has.
            with anyio.fail_after(10), pytest.MonkeyPatch.context() as patch:
                patch.setattr(ending, "AFTERWARDS_TIMEOUT", 0.2)
                await ending.run(made.afterwards)
                await ending.run(read.afterwards)
        assert await layer.spent("a") == (1 if outage == "frozen" else 0)  # the one that was stopped is empty now


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_under_trio_redis_is_out_of_order(redis_service: RedisServer) -> None:
    storage = RedisStorage(f"async+{redis_service.url}", implementation="redispy")
    _, forward = spending(replicate := Replicate(), storage=storage)
    with pytest.raises(StoreFailed):
        await create(forward)
    assert replicate.calls == 0


# --- as a whole


@dataclass
class House:
    """The proxy in front of a FakeReplicate whose runs take 2 seconds, by a clock that a test advances."""

    layer: SpendingLimit
    clock: ManualClock
    app: Any

    async def ask(self, method: str, target: str, content: Mapping[str, Any] | None = None) -> Caller:
        body = b"" if content is None else json.dumps(content).encode()
        headers = [(b"x-portkey-api-key", b"pk-team-a"), (b"content-type", b"application/json")]
        return await call(self.app, http_scope(method, target, headers), body)

    async def create(self) -> Caller:
        return await self.ask(
            "POST", "/v1/models/meta/meta-llama-3-8b-instruct/predictions", {"input": {"prompt": "Ada"}}
        )


def house(**options: Any) -> House:
    clock = ManualClock(NOON)
    fake = FakeReplicate(
        tokens={TOKEN: "acme"}, clock=clock, queue_time=1, run_time=2, api_url="https://api.replicate.com/v1"
    )
    prices = {"meta/meta-llama-3-8b-instruct": Rates(per_second=0.25)}
    layer = limit_spending(per_day=1, prices=prices, now=clock.now, **options)
    app = proxy("https://api.replicate.com/v1", transport=httpx.ASGITransport(fake), layers=[layer])
    return House(layer, clock, app)


async def test_a_tenant_spends_its_day_and_has_another_the_next() -> None:
    stage = house(reserve=0.6)
    first = await stage.create()
    assert first.status == 201
    assert await stage.layer.spent("team-a") == 0.6
    refused = await stage.create()
    assert refused.status == 402
    error = json.loads(refused.content)["error"]
    assert error["code"] == "spend_limit_reached"
    assert error["message"].startswith("limit_spending: 0.6 of 1 USD a day are spent or reserved; nothing was created.")
    assert refused.header(b"retry-after") == [b"43200"]
    id = json.loads(first.content)["id"]
    stage.clock.advance(10)
    for _ in range(2):
        assert json.loads((await stage.ask("GET", f"/v1/predictions/{id}")).content)["status"] == "succeeded"
        assert await stage.layer.spent("team-a") == pytest.approx(COST)
    assert (await stage.create()).status == 402
    stage.clock.advance(43200)
    assert await stage.layer.spent("team-a") == 0
    assert (await stage.create()).status == 201
