from __future__ import annotations

import json
import logging
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import anyio
import limits
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.aio.storage import MemoryStorage, RedisStorage

from replicate_proxy_mw import Forward, MappingKeyResolver, ProxyRequest, ProxyResponse, ReplicateKey
from replicate_proxy_mw.errors import LimitExceeded, StoreFailed
from replicate_proxy_mw.exchange import Chunks
from replicate_proxy_mw.layers.limits import TenantLimits, limit_requests
from tests.counting import on_asyncio, out_of_order, storage_of
from tests.raw_asgi import TOKEN, call, http_scope, proxy
from tests.raw_upstream import Connection, RawUpstream
from tests.requests import request_of
from tests.services import RedisServer, redis_server, two_processes

pytestmark = pytest.mark.anyio

CREATE, READ = ("POST", "/predictions"), ("GET", "/predictions/p1")


class Upstream:
    """What lies below the layer; counts."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, request: ProxyRequest) -> ProxyResponse:
        self.calls += 1
        return ProxyResponse(status=200, headers=(), body=Chunks([]))


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_790_000_000.0

    def __call__(self) -> float:
        return self.now


def team(name: str) -> ReplicateKey:
    return ReplicateKey(TOKEN, tenant=name)


async def passed(forward: Forward, key: ReplicateKey, method: str = "POST", target: str = "/predictions") -> bool:
    try:
        await forward(request_of(method, target, key=key))
    except LimitExceeded:
        return False
    return True


async def count(forward: Forward, key: ReplicateKey, about: tuple[str, str] = CREATE, *, tries: int = 10) -> int:
    """How many of so many requests pass."""
    return sum([await passed(forward, key, *about) for _ in range(tries)])


# --- what is answered


async def test_one_more_than_the_limit_is_refused_and_goes_nowhere(upstream: RawUpstream) -> None:
    keys = MappingKeyResolver({"pk-a": team("team-a"), "pk-b": "r8_1111111111111111111111111111"})
    layers = [limit_requests(creates="2/2 minutes", others="1/hour", now=Time())]
    app = proxy(upstream.url, key_resolver=keys, layers=layers)
    a, b = (b"x-portkey-api-key", b"pk-a"), (b"x-portkey-api-key", b"pk-b")
    for who, whose in ((a, "tenant"), (b, "key")):
        for _ in range(2):
            assert (await call(app, http_scope("POST", "/v1/predictions", [who]), b"{}")).status == 200
        sent = len(upstream.requests)
        refused = await call(app, http_scope("POST", "/v1/predictions", [who]), b"{}")
        assert refused.status == 429
        error = json.loads(refused.content)["error"]
        assert error["code"] == "limit_exceeded"
        assert error["message"] == (
            f"limit_requests: 2 creates per 2 minutes is what this {whose} may make; try again in 120 s."
        )
        told = {name: value for name, value in refused.headers if name == b"retry-after" or b"ratelimit" in name}
        assert told == {
            b"retry-after": b"120",
            b"ratelimit-limit": b"2",
            b"ratelimit-remaining": b"0",
            b"ratelimit-reset": b"120",
        }
        assert (await call(app, http_scope(target="/v1/account", headers=[who]))).status == 200
        refused = await call(app, http_scope(target="/v1/account", headers=[who]))
        assert "1 other requests per hour is what" in json.loads(refused.content)["error"]["message"]
        assert len(upstream.requests) == sent + 1
    await app.aclose()


async def test_what_passes_keeps_what_replicate_says_of_its_own_limit(upstream: RawUpstream) -> None:
    def script(connection: Connection) -> None:
        while connection.request():
            connection.answer(b"{}", status=b"429 Too Many", headers=b"ratelimit-remaining: 7\r\nretry-after: 3\r\n")

    upstream.script = script
    caller = await call(proxy(upstream.url, layers=[limit_requests()]), http_scope())
    assert caller.status == 429
    assert caller.header(b"ratelimit-remaining") == [b"7"]
    assert caller.header(b"retry-after") == [b"3"]
    assert caller.header(b"ratelimit-limit") == []


@pytest.mark.parametrize(
    ("method", "target", "kind"),
    [
        ("POST", "/predictions", "creates"),
        ("POST", "/models/a/b/predictions", "creates"),
        ("POST", "/deployments/a/b/predictions", "creates"),
        ("POST", "/models/a/b/versions/c/trainings", "creates"),
        ("POST", "/files", "others"),
        ("POST", "/models", "others"),
        ("POST", "/predictions/p1/cancel", "others"),
        ("GET", "/predictions", "others"),
        ("GET", "/what/nobody/knows", "others"),
        ("POST", "/what/nobody/knows", "creates"),
        ("POST", "/predictions/", "creates"),
        ("POST", "/Predictions", "creates"),
        ("POST", "/predictions%2f", "creates"),
        ("GET", "/predictions/", "others"),
    ],
)
async def test_creates_count_apart_from_all_else(method: str, target: str, kind: str) -> None:
    limited = limit_requests(creates="3/minute", others="4/minute", now=Time())(Upstream())
    assert await count(limited, team("a"), (method, target)) == {"creates": 3, "others": 4}[kind]
    assert (
        await count(limited, team("a"), READ if kind == "creates" else CREATE) == 7 - {"creates": 3, "others": 4}[kind]
    )


async def test_by_default_a_tenant_has_what_replicate_allows_an_account() -> None:
    limited = limit_requests(now=Time())(Upstream())
    assert await count(limited, team("a"), CREATE, tries=601) == 600
    assert await count(limited, team("a"), READ, tries=3001) == 3000


async def test_tenants_may_have_other_limits_or_none() -> None:
    tenants: dict[str, TenantLimits] = {"a": {"creates": "1/minute"}, "b": {"creates": None, "others": "2/hour"}}
    limited = limit_requests(creates="3/minute", others=None, tenants=tenants, now=Time())(Upstream())
    counted = {name: (await count(limited, team(name)), await count(limited, team(name), READ)) for name in "abc"}
    assert counted == {"a": (1, 10), "b": (10, 2), "c": (3, 10)}


async def test_a_tenant_is_counted_whatever_its_tokens_and_a_key_without_one_by_itself() -> None:
    limited = limit_requests(creates="2/minute", tenants={"": {"creates": None}}, now=Time())(Upstream())
    same, other = (ReplicateKey(f"r8_{digit * 20}", tenant="a") for digit in "12")
    assert [await passed(limited, key) for key in (same, other, same, other)] == [True, True, False, False]
    free, else_free = (ReplicateKey(f"r8_{digit * 20}") for digit in "12")
    assert [await passed(limited, key) for key in (free, else_free) * 3] == [True] * 4 + [False] * 2


@given(
    st.lists(st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=8), unique=True, max_size=8)
)
def test_no_two_tenants_share_a_limit_whatever_their_names(names: list[str]) -> None:
    async def play() -> None:
        limited = limit_requests(creates="1/minute", others="1/minute", now=Time())(Upstream())
        # Among them such as run into each other where they are joined with "/".
        keys = [team(name) for name in {*names, "a", "a/1", "1/a", "creates/a"}]
        for about in (CREATE, READ):
            assert [await count(limited, key, about, tries=2) for key in keys] == [1] * len(keys)

    anyio.run(play)


async def test_what_a_short_limit_refuses_does_not_count_for_a_longer_one() -> None:
    clock = Time()
    limited = limit_requests(creates="10/day; 2/second; 2/second", now=clock)(Upstream())
    for _ in range(5):
        assert await count(limited, team("a")) == 2
        clock.now += 1.5
    with pytest.raises(LimitExceeded, match="10 creates per day is what this tenant may make; try again in 86393 s"):
        await limited(request_of(*CREATE, key=team("a")))


LIMITS = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.sampled_from([("second", 1), ("minute", 60)])),
    min_size=1,
    max_size=3,
)


@settings(deadline=None)
@given(LIMITS, st.lists(st.sampled_from([0.0, 0.001, 0.5, 1.0, 1.001, 7.0, 59.0, 60.0, 61.5, 240.0]), max_size=60))
def test_no_window_ever_has_more_than_allowed_and_none_is_refused_while_there_is_room(
    given_limits: list[tuple[int, int, tuple[str, int]]], pauses: list[float]
) -> None:
    anyio.run(_arrivals, given_limits, pauses)


async def _arrivals(given_limits: list[tuple[int, int, tuple[str, int]]], pauses: list[float]) -> None:
    clock, let_pass = Time(), list[float]()
    spans = dict.fromkeys((amount, multiple * seconds) for amount, multiple, (_, seconds) in given_limits)
    # What each limit has counted: a request that a shorter one has let pass, whatever a longer one says.
    counted: dict[tuple[int, int], list[float]] = {limit: [] for limit in sorted(spans, key=lambda limit: limit[1])}
    text = ";".join(f"{amount}/{multiple} {name}" for amount, multiple, (name, _) in given_limits)
    limited = limit_requests(creates=text, now=clock)(Upstream())
    for pause in pauses:
        clock.now += pause
        has_room = True
        for (amount, span), moments in counted.items():
            has_room = sum(moment >= clock.now - span for moment in moments) < amount
            if not has_room:
                break
            moments.append(clock.now)
        assert await passed(limited, team("a")) == has_room
        if has_room:
            let_pass.append(clock.now)
    for amount, span in spans:
        assert all(sum(start <= moment <= start + span for moment in let_pass) <= amount for start in let_pass)


@settings(deadline=None)
@given(st.integers(1, 5), st.sampled_from([1, 3, 60]), st.lists(st.floats(0, 30), max_size=20))
def test_who_comes_back_when_told_is_let_pass(amount: int, seconds: int, pauses: list[float]) -> None:
    async def play() -> None:
        clock = Time()
        limited = limit_requests(creates=f"{amount}/{seconds} seconds", now=clock)(Upstream())
        for pause in pauses:
            clock.now += pause
            try:
                await limited(request_of(*CREATE, key=team("a")))
            except LimitExceeded as error:
                # The way here takes a moment, too.
                clock.now += int(dict(error.headers)[b"retry-after"]) + 0.001
                assert await passed(limited, team("a"))

    anyio.run(play)


# --- options


@pytest.mark.parametrize(
    "bad", ["", "many", "600", "0/minute", "600/minute;0/day", "-1/minute", "1/fortnight", "1000001/day", 600, b"1/day"]
)
async def test_a_limit_has_to_be_one(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^creates: must be like '600/minute'"):
        limit_requests(creates=bad)
    with pytest.raises(ValueError, match=r"^others: must be like"):
        limit_requests(others=bad)
    with pytest.raises(ValueError, match=r"^tenants: 'a': creates: must be like"):
        limit_requests(tenants={"a": {"creates": bad}})


@pytest.mark.parametrize("bad", ["60/minute", {"create": "1/minute"}, None])
async def test_a_tenants_limits_have_names(bad: Any) -> None:
    with pytest.raises(ValueError, match=r"^tenants: 'a' needs a mapping with 'creates', 'others' or both"):
        limit_requests(tenants={"a": bad})


async def test_a_storage_that_would_hold_up_the_event_loop_is_refused() -> None:
    for storage in (
        limits.storage.MemoryStorage(),
        limits.storage.RedisStorage("redis://127.0.0.1:1"),
        MemoryStorage(),
    ):
        with pytest.raises(ValueError, match=r"^storage: must be asynchronous, .* None is memory$"):
            limit_requests(storage=storage)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^storage: must be one of limits.aio.storage that has moving windows"):
        limit_requests(storage="async+redis://127.0.0.1:1")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^timeout: must be more than 0 seconds$"):
        limit_requests(timeout=0)


async def test_memory_has_no_thread() -> None:
    before = set(threading.enumerate())
    limited = limit_requests(creates="5/second")(Upstream())
    assert await count(limited, team("a"), tries=3) == 3
    assert set(threading.enumerate()) <= before


# --- Redis


class Asked(RedisStorage):
    """Notes how often it is asked."""

    times = 0

    async def acquire_entry(self, key: str, limit: int, expiry: int, amount: int = 1) -> bool:
        self.times += 1
        return await super().acquire_entry(key, limit, expiry, amount)


@pytest.fixture(scope="module")
def own_server() -> Iterator[RedisServer]:
    """A server that a test may stop."""
    with redis_server() as server:
        yield server


@on_asyncio
async def test_many_at_once_are_all_counted(redis_service: RedisServer) -> None:
    async with storage_of(redis_service) as storage:
        limited = limit_requests(creates="300/hour", storage=storage)(Upstream())
        passing: list[str] = []

        async def one(who: str) -> None:
            if await passed(limited, team(who)):
                passing.append(who)

        async with anyio.create_task_group() as tasks:
            for who in [*"a" * 2000, *"b" * 400]:
                tasks.start_soon(one, who)
        assert [passing.count(who) for who in "ab"] == [300, 300]


@on_asyncio
async def test_redis_counts_as_memory_does(redis_service: RedisServer) -> None:
    async with storage_of(redis_service) as storage:
        upstream = Upstream()
        limited = limit_requests(creates="5/minute;7/hour", others="3/minute", storage=storage)(upstream)
        assert [await count(limited, team(name)) for name in "ab"] == [5, 5]
        assert await count(limited, team("a"), READ) == 3
        with pytest.raises(LimitExceeded, match="5 creates per minute") as refused:
            await limited(request_of(*CREATE, key=team("a")))
        assert 1 <= int(dict(refused.value.headers)[b"ratelimit-reset"]) <= 60
        assert upstream.calls == 13


ANOTHER_PROCESS = """
import asyncio, sys
from limits.aio.storage import RedisStorage
from replicate_proxy_mw.layers.limits import limit_requests
from tests.layers.test_limits import Upstream, count, team

async def main(url, prefix):
    storage = RedisStorage(url, implementation="redispy", key_prefix=prefix)
    limited = limit_requests(creates="100/hour", storage=storage, timeout=10, fail_open=False)(Upstream())
    await storage.check()
    print("ready", flush=True)
    sys.stdin.readline()
    print(sum(await asyncio.gather(*[count(limited, team("a"), tries=20) for _ in range(10)])))
    await storage.bridge.storage.aclose()

asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


def test_two_processes_let_pass_exactly_as_many_as_one(redis_service: RedisServer) -> None:
    told = two_processes(ANOTHER_PROCESS, f"async+{redis_service.url}", str(uuid.uuid4()))
    assert sum(map(int, told)) == 100


@pytest.mark.parametrize("outage", ["stopped", "frozen"])
@on_asyncio
async def test_while_redis_is_out_of_order_requests_pass_uncounted_and_not_each_is_logged(
    own_server: RedisServer, outage: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with storage_of(own_server, kind=Asked) as storage:
        upstream = Upstream()
        limited = limit_requests(creates="2/hour", storage=storage, timeout=0.1)(upstream)
        assert await count(limited, team("a"), tries=3) == 2
        with out_of_order(own_server, outage):
            assert await count(limited, team("a")) == 10
            # One has waited for it; a second later, one more will.
            assert storage.times == 4
        assert upstream.calls == 12
        [line] = caplog.records
        assert line.levelno == logging.ERROR
        assert line.getMessage() in {
            f"limit_requests: storage failed: {name}" for name in ("TimeoutError", "ConnectionError")
        }
        # Nobody asks for a second; then the limit is there again.
        with anyio.fail_after(10):
            while await passed(limited, team("b")):  # noqa: ASYNC110 - it tells nobody
                await anyio.sleep(0.05)


@pytest.mark.parametrize("outage", ["stopped", "frozen"])
@on_asyncio
async def test_a_host_may_have_them_refused_instead(own_server: RedisServer, outage: str) -> None:
    async with storage_of(own_server) as storage:
        upstream = Upstream()
        limited = limit_requests(creates="2/hour", others=None, storage=storage, timeout=0.1, fail_open=False)(upstream)
        with out_of_order(own_server, outage):
            for _ in range(2):
                with pytest.raises(
                    StoreFailed, match=r"^limit_requests: this could not be counted, and nothing was sent"
                ):
                    await limited(request_of(*CREATE, key=team("a")))
            assert upstream.calls == 0
            # What has no limit needs no storage.
            assert await count(limited, team("a"), READ) == 10
        assert await count(limited, team("b"), tries=3) == 2


@pytest.mark.parametrize("anyio_backend", ["trio"])
async def test_under_trio_redis_is_out_of_order(redis_service: RedisServer) -> None:
    storage: Any = RedisStorage(f"async+{redis_service.url}", implementation="redispy")
    with pytest.raises(StoreFailed):
        await limit_requests(storage=storage, fail_open=False)(Upstream())(request_of(*CREATE, key=team("a")))
