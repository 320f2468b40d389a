from __future__ import annotations

import logging
import time
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from replicate_proxy_mw import ReplicateKey
from replicate_proxy_mw.errors import StoreFailed
from replicate_proxy_mw.store.counters import MAX_CALLS, Counters, MemoryCounters, of_tenant, owner
from tests.raw_asgi import TOKEN

pytestmark = pytest.mark.anyio

KEYS = st.sampled_from("abc")


class CountersMachine(RuleBasedStateMachine):
    """Memory against what is written down of every call."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.counters = MemoryCounters(now=lambda: self.now)
        self.counts: dict[str, tuple[int, float]] = {}
        self.entries: dict[str, list[float]] = {}

    def run(self, call: Any) -> Any:
        with pytest.raises(StopIteration) as done:  # nothing in it waits
            call.send(None)
        return done.value.value

    def count_of(self, key: str) -> int:
        count, end = self.counts.get(key, (0, 0.0))
        return count if self.now <= end else 0

    @rule(seconds=st.sampled_from([0.0, 0.5, 1.0, 9.0, 10.0, 30.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(key=KEYS, expiry=st.sampled_from([1, 10]), amount=st.integers(-5, 5))
    def a_count_ends_so_long_after_its_beginning(self, key: str, expiry: int, amount: int) -> None:
        _, end = self.counts.get(key, (0, 0.0))
        self.counts[key] = self.count_of(key) + amount, end if self.now <= end else self.now + expiry
        assert self.run(self.counters.incr(key, expiry, amount)) == self.counts[key][0]
        assert self.run(self.counters.get_expiry(key)) == self.counts[key][1]

    @rule(key=KEYS, amount=st.integers(1, 4))
    def no_window_of_10_seconds_has_more_than_3(self, key: str, amount: int) -> None:
        entries = self.entries.setdefault(f"window {key}", [])
        inside = [moment for moment in entries if moment >= self.now - 10]
        has_room = len(inside) + amount <= 3
        entries += [self.now] * amount * has_room
        assert self.run(self.counters.acquire_entry(f"window {key}", 3, 10, amount)) == has_room

    @rule(key=KEYS)
    def what_is_cleared_is_as_new(self, key: str) -> None:
        for each in (key, f"window {key}"):
            self.run(self.counters.clear(each))
            self.counts.pop(each, None)
            self.entries.pop(each, None)

    @rule()
    def all_is_cleared(self) -> None:
        self.run(self.counters.reset())
        self.counts.clear()
        self.entries.clear()

    @invariant()
    def it_has_what_was_written_down_and_nothing_that_has_ended(self) -> None:
        alive = 0
        for key in "abc":
            assert self.run(self.counters.get(key)) == self.count_of(key)
            alive += key in self.counts and self.now <= self.counts[key][1]
            inside = [moment for moment in self.entries.get(f"window {key}", []) if moment >= self.now - 10]
            expected = (inside[0], len(inside)) if inside else (self.now, 0)
            assert self.run(self.counters.get_moving_window(f"window {key}", 3, 10)) == expected
            alive += bool(inside)
        assert len(self.counters._ends) == len(self.counters._counts) + len(self.counters._windows) == alive


TestMemory = CountersMachine.TestCase
TestMemory.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


async def test_a_window_moves() -> None:
    moments = iter([1000.0, 1007.0, 1010.0, 1010.5, 1017.0, 1017.5])
    counters = MemoryCounters(now=lambda: next(moments))
    assert await counters.acquire_entry("a", 2, 10)
    assert await counters.acquire_entry("a", 2, 10)
    assert not await counters.acquire_entry("a", 2, 10)
    assert await counters.get_moving_window("a", 2, 10) == (1007.0, 1)
    assert await counters.get_moving_window("a", 2, 10) == (1007.0, 1)
    assert await counters.get_moving_window("a", 2, 10) == (1017.5, 0)


async def test_for_one_more_key_the_one_that_ends_next_is_forgotten() -> None:
    counters = MemoryCounters(max_keys=2, now=lambda: 1000.0)
    await counters.incr("long", 100)
    await counters.incr("short", 10)
    await counters.acquire_entry("window", 1, 50)
    assert [await counters.get(key) for key in ("long", "short")] == [1, 0]
    await counters.incr("long", 100)
    await counters.incr("other", 60)
    assert await counters.acquire_entry("window", 1, 50)
    assert [await counters.get(key) for key in ("long", "other")] == [2, 0]
    assert await counters.reset() == 2
    assert await counters.check()
    assert issubclass(ValueError, counters.base_exceptions)


async def test_threads_may_share_it() -> None:
    counters = MemoryCounters()

    def count() -> None:
        for _ in range(500):
            with pytest.raises(StopIteration):
                counters.incr("a", 100).send(None)

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(anyio.to_thread.run_sync, count)
    assert await counters.get("a") == 2000


async def test_counters_are_those_of_a_tenant_or_of_a_key_without_one() -> None:
    tenant, free, else_free = (
        owner(key) for key in (ReplicateKey(TOKEN, tenant="a"), ReplicateKey(TOKEN), ReplicateKey(TOKEN[::-1]))
    )
    assert tenant == of_tenant("a") == owner(ReplicateKey(TOKEN[::-1], tenant="a"))
    assert len({tenant, free, else_free, of_tenant(""), of_tenant("b"), of_tenant("\ud800")}) == 6


# --- a storage that is asked in bounded time


class Slow(MemoryCounters):
    """Takes so many steps to count, which hold up the event loop for so many seconds each."""

    def __init__(self, *, steps: float = 0, seconds: float = 0.0) -> None:
        super().__init__()
        self.steps, self.seconds, self.calls, self.most, self._under_way = steps, seconds, 0, 0, 0

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        self.calls += 1
        self._under_way += 1
        self.most = max(self.most, self._under_way)
        try:
            step = 0
            while step < self.steps:
                step += 1
                time.sleep(self.seconds)  # noqa: ASYNC251 - that is what it is for
                await (anyio.sleep(0.05) if self.steps == FOREVER else anyio.lowlevel.checkpoint())
        finally:
            self._under_way -= 1
        return await super().incr(key, expiry, amount)


FOREVER = float("inf")


async def _counted(counters: Counters) -> bool:
    try:
        await counters.call(lambda storage: storage.incr("a", 100))
    except StoreFailed:
        return False
    return True


async def _at_once(counters: Counters, times: int) -> list[bool]:
    counted: list[bool] = []

    async def one() -> None:
        counted.append(await _counted(counters))

    async with anyio.create_task_group() as tasks:
        for _ in range(times):
            tasks.start_soon(one)
    return counted


async def test_waiting_for_a_turn_takes_nothing_of_a_call_s_time() -> None:
    storage = Slow(steps=1, seconds=0.0005)
    counters = Counters("counting", storage, timeout=0.02)
    assert await _at_once(counters, 300) == [True] * 300
    assert storage.most == MAX_CALLS


async def test_an_event_loop_that_is_held_up_is_no_outage() -> None:
    counters = Counters("counting", Slow(steps=5, seconds=0.02), timeout=0.02)
    assert await _counted(counters)


@pytest.mark.parametrize("rest", [0.0, 60.0])
async def test_who_waits_for_a_turn_while_it_hangs_fails_with_the_first(
    rest: float, caplog: pytest.LogCaptureFixture
) -> None:
    storage = Slow(steps=FOREVER)
    counters = Counters("counting", storage, timeout=0.1, rest=rest)
    assert await _at_once(counters, 300) == [False] * 300
    assert storage.calls == MAX_CALLS
    assert caplog.messages == ["counting: storage failed: TimeoutError"]
    storage.steps = 0
    assert await _counted(counters) == (not rest)


async def test_who_leaves_while_it_waits_for_a_turn_has_counted_nothing() -> None:
    storage = Slow(steps=FOREVER)
    counters = Counters("counting", storage, timeout=60)
    async with anyio.create_task_group() as tasks:
        for _ in range(MAX_CALLS):
            tasks.start_soon(_counted, counters)
        await anyio.wait_all_tasks_blocked()
        with anyio.move_on_after(0.05) as left:
            await counters.call(lambda storage: storage.incr("a", 100), shield=True)
        assert left.cancelled_caught
        assert storage.calls == MAX_CALLS
        tasks.cancel_scope.cancel()


async def test_what_it_raises_is_told_by_its_name(caplog: pytest.LogCaptureFixture) -> None:
    async def fails(_: Any) -> None:
        raise OSError("hunter2")

    counters = Counters("counting", Slow(), timeout=60)
    with pytest.raises(StoreFailed, match=r"^counting: this could not be counted"), caplog.at_level(logging.ERROR):
        await counters.call(fails)
    assert caplog.messages == ["counting: storage failed: OSError"]
