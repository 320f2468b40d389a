from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import httpx
import pytest

from replicate_proxy_mw.upstream.pool import Origin, Pool

pytestmark = pytest.mark.anyio

ONE, OTHER = Origin("http", "one.test", 80), Origin("http", "other.test", 80)


class Kept:
    """A connection that is told what to say of itself."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self.usable = True
        self.closed = False
        self.gone = anyio.Event()

    def is_usable(self) -> bool:
        return self.usable

    async def aclose(self) -> None:
        self.closed = True
        self.gone.set()
        await anyio.lowlevel.checkpoint()


class Opening:
    """Opens connections, when it may."""

    def __init__(self) -> None:
        self.opened: list[Kept] = []
        self.gate: anyio.Event | None = None
        self.failure: Exception | None = None

    async def __call__(self, origin: Origin, seconds: float | None) -> Kept:
        if self.gate is not None:
            await self.gate.wait()
        if self.failure is not None:
            raise self.failure
        self.opened.append(Kept(origin))
        return self.opened[-1]

    def pool(self, max_connections: int = 2, keepalive: float = 60.0) -> Pool[Kept]:
        return Pool(self, max_connections=max_connections, keepalive=keepalive)


@pytest.fixture
def opening() -> Opening:
    return Opening()


async def _free(pool: Pool[Kept], count: int) -> None:
    """Exactly so many connections can be had."""
    taken = [await pool.acquire(ONE, {"pool": 0.01}) for _ in range(count)]
    with pytest.raises(httpx.PoolTimeout):
        await pool.acquire(ONE, {"pool": 0.01})
    for connection in taken:
        await pool.release(connection, ONE, reusable=False)


async def test_the_last_one_used_is_the_next(opening: Opening) -> None:
    pool = opening.pool()
    first, second = [await pool.acquire(ONE, {}) for _ in range(2)]
    for connection in (second, first):
        await pool.release(connection, ONE, reusable=True)
    assert [await pool.acquire(ONE, {}) for _ in range(2)] == [first, second]


async def test_each_origin_has_its_own(opening: Opening) -> None:
    pool = opening.pool()
    first = await pool.acquire(ONE, {})
    await pool.release(first, ONE, reusable=True)
    other = await pool.acquire(OTHER, {})
    assert (other.origin, first.closed) == (OTHER, False)
    await pool.release(other, OTHER, reusable=True)
    assert await pool.acquire(ONE, {}) is first


async def test_the_oldest_idle_one_makes_room_for_another_origin(opening: Opening) -> None:
    pool = opening.pool()
    first, second = [await pool.acquire(ONE, {}) for _ in range(2)]
    for connection in (first, second):
        await pool.release(connection, ONE, reusable=True)
    await pool.acquire(OTHER, {})
    assert (first.closed, second.closed) == (True, False)


async def test_what_cannot_be_used_again_is_closed(opening: Opening) -> None:
    pool = opening.pool()
    connection = await pool.acquire(ONE, {})
    await pool.release(connection, ONE, reusable=False)
    assert connection.closed
    await _free(pool, 2)


async def test_one_that_died_while_idle_is_passed_over(opening: Opening) -> None:
    pool = opening.pool(3)
    taken = [await pool.acquire(ONE, {}) for _ in range(3)]
    for connection in taken:
        await pool.release(connection, ONE, reusable=True)
    taken[1].usable = taken[2].usable = False
    assert await pool.acquire(ONE, {}) is taken[0]
    assert [connection.closed for connection in taken] == [False, True, True]
    await pool.release(taken[0], ONE, reusable=True)
    taken[0].usable = False
    assert await pool.acquire(ONE, {}) is opening.opened[3]


async def test_one_that_was_idle_for_too_long_is_passed_over(opening: Opening) -> None:
    pool = opening.pool(keepalive=0)
    connection = await pool.acquire(ONE, {})
    await pool.release(connection, ONE, reusable=True)
    assert await pool.acquire(ONE, {}) is not connection
    assert connection.closed


async def test_after_a_burst_their_number_falls(opening: Opening, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("replicate_proxy_mw.upstream.pool.monotonic", lambda: now)
    pool = opening.pool(6, keepalive=5)
    taken = [await pool.acquire(origin, {}) for origin in (ONE, OTHER, ONE, OTHER, ONE)]
    for connection in taken[:-1]:
        await pool.release(connection, connection.origin, reusable=True)
    now = 4.0
    await pool.release(taken[-1], ONE, reusable=True)
    now = 6.0
    assert await pool.acquire(ONE, {}) is taken[-1]
    assert [connection.closed for connection in taken] == [True, True, False, False, False]
    await pool.release(taken[-1], ONE, reusable=True)
    assert await pool.acquire(ONE, {}) is taken[-1]
    assert [connection.closed for connection in taken] == [True, True, True, True, False]


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_what_a_burst_left_is_closed_though_nobody_comes(opening: Opening) -> None:
    pool = opening.pool(max_connections=3, keepalive=0.05)
    taken = [await pool.acquire(ONE, {}) for _ in range(3)]
    for one in taken[:2]:
        await pool.release(one, ONE, reusable=True)
    await anyio.sleep(0.03)
    await pool.release(taken[2], ONE, reusable=True)
    for one in taken[:2]:
        await one.gone.wait()
    assert not taken[2].closed
    await taken[2].gone.wait()
    again = await pool.acquire(ONE, {})
    assert again not in taken
    await pool.release(again, ONE, reusable=True)
    await again.gone.wait()
    await _free(pool, 3)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_nothing_is_left_to_sweep_once_it_is_closed(opening: Opening) -> None:
    pool, before = opening.pool(keepalive=0.01), asyncio.all_tasks()
    one, other = [await pool.acquire(ONE, {}) for _ in range(2)]
    await pool.release(one, ONE, reusable=True)
    await one.gone.wait()
    await pool.release(other, ONE, reusable=True)
    await pool.aclose()
    assert other.closed
    await anyio.sleep(0.02)
    assert asyncio.all_tasks() == before


async def test_those_who_wait_are_served_in_order(opening: Opening) -> None:
    pool = opening.pool(1)
    held = await pool.acquire(ONE, {})
    served = []

    async def waiter(number: int) -> None:
        connection = await pool.acquire(ONE, {"pool": 5})
        served.append(number)
        assert connection is held
        await pool.release(connection, ONE, reusable=True)

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(waiter, number)
            await anyio.wait_all_tasks_blocked()
        await pool.release(held, ONE, reusable=True)
    assert served == list(range(5))
    assert len(opening.opened) == 1


async def test_no_newcomer_gets_in_before_one_who_waits(opening: Opening) -> None:
    pool = opening.pool(1)
    held = await pool.acquire(ONE, {})
    served = []

    async def waiter(name: str) -> None:
        connection = await pool.acquire(ONE, {"pool": 5})
        served.append(name)
        await pool.release(connection, ONE, reusable=True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waiter, "waiter")
        await anyio.wait_all_tasks_blocked()
        await pool.release(held, ONE, reusable=True)
        await waiter("newcomer")
    assert served == ["waiter", "newcomer"]
    await _free(pool, 1)


async def test_who_waits_too_long_takes_no_slot_along(opening: Opening) -> None:
    pool = opening.pool(1)
    held = await pool.acquire(ONE, {})
    for _ in range(3):
        with pytest.raises(httpx.PoolTimeout):
            await pool.acquire(ONE, {"pool": 0.01})
    await pool.release(held, ONE, reusable=True)
    await _free(pool, 1)


async def test_who_leaves_while_waiting_takes_no_slot_along(opening: Opening) -> None:
    pool = opening.pool(1)
    held = await pool.acquire(ONE, {})
    with anyio.move_on_after(0.01):
        await pool.acquire(ONE, {})
    await pool.release(held, ONE, reusable=True)
    await _free(pool, 1)


async def test_who_leaves_as_a_slot_is_handed_over_hands_it_on(opening: Opening) -> None:
    pool = opening.pool(1)
    held = await pool.acquire(ONE, {})

    async def waiter() -> None:
        await pool.release(await pool.acquire(ONE, {}), ONE, reusable=True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waiter)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
        await pool.release(held, ONE, reusable=True)
    await _free(pool, 1)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_so_does_a_task_that_asyncio_cancels(opening: Opening) -> None:
    pool = opening.pool(1)
    held = await pool.acquire(ONE, {})
    task = asyncio.ensure_future(pool.acquire(ONE, {}))
    await anyio.wait_all_tasks_blocked()
    await pool.release(held, ONE, reusable=True)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    await _free(pool, 1)


async def test_who_leaves_while_connecting_takes_no_slot_along(opening: Opening) -> None:
    pool = opening.pool(1)
    opening.gate = anyio.Event()
    with anyio.move_on_after(0.01):
        await pool.acquire(ONE, {})
    opening.gate = None
    await _free(pool, 1)


async def test_who_cannot_connect_takes_no_slot_along(opening: Opening) -> None:
    pool = opening.pool(1)
    opening.failure = httpx.ConnectError("refused")
    with pytest.raises(httpx.ConnectError):
        await pool.acquire(ONE, {})
    opening.failure = None
    await _free(pool, 1)


@pytest.mark.parametrize("reusable", [True, False])
async def test_who_is_cancelled_while_giving_back_gives_back(opening: Opening, reusable: bool) -> None:
    pool = opening.pool(1)
    connection = await pool.acquire(ONE, {})
    with anyio.CancelScope() as scope:
        scope.cancel()
        await pool.release(connection, ONE, reusable=reusable)
    assert connection.closed is not reusable
    await _free(pool, 1)


async def test_who_is_cancelled_while_making_room_takes_no_slot_along(opening: Opening) -> None:
    pool = opening.pool(1)
    for origin in (ONE, OTHER):
        await pool.release(await pool.acquire(ONE, {}), ONE, reusable=True)
        opening.opened[-1].usable = False
        with anyio.CancelScope() as scope:
            scope.cancel()
            await pool.acquire(origin, {})
        assert opening.opened[-1].closed
    await _free(pool, 1)


async def test_closing_closes_what_is_idle_now_and_the_rest_when_it_is_given_back(opening: Opening) -> None:
    pool = opening.pool(3)
    taken = [await pool.acquire(ONE, {}) for _ in range(3)]
    for connection in taken[1:]:
        await pool.release(connection, ONE, reusable=True)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await pool.aclose()
    assert [connection.closed for connection in taken] == [False, True, True]
    await pool.release(taken[0], ONE, reusable=True)
    assert taken[0].closed


async def test_what_is_idle_does_not_make_it_slower(opening: Opening) -> None:
    """Not one of a thousand is looked at but the one that is taken."""
    pool = opening.pool(1000)
    asked = []

    class Counted(Kept):
        def is_usable(self) -> bool:
            asked.append(self)
            return True

    taken = [await pool.acquire(ONE, {}) for _ in range(1000)]
    for connection in taken:
        connection.__class__ = Counted
        await pool.release(connection, ONE, reusable=True)
    for _ in range(10):
        await pool.release(await pool.acquire(ONE, {}), ONE, reusable=True)
    assert asked == [taken[-1]] * 10
