from __future__ import annotations

import asyncio

import anyio
import anyio.lowlevel
import pytest

from replicate_proxy_mw.errors import StoreFailed
from replicate_proxy_mw.store import keyed
from replicate_proxy_mw.store.keyed import KeyedCreates
from replicate_proxy_mw.store.once import KeyedCreate
from tests.paid import SwitchedOnce, hangs, nothing, refuses

pytestmark = pytest.mark.anyio

ONE = KeyedCreate(mark="1", fingerprint="f", left=180.0)
OTHER = KeyedCreate(mark="2", fingerprint="f", left=180.0)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyed, "PAUSES", (0.0, 0.01, 0.01))
    monkeypatch.setattr(keyed, "LONG_PAUSES", (0.01,))


def creates(store: SwitchedOnce) -> KeyedCreates:
    return KeyedCreates(store, lifetime=1000, timeout=0.05)


async def forgotten(store: SwitchedOnce) -> None:
    with anyio.fail_after(5):
        while len(store):
            await anyio.lowlevel.checkpoint()


async def test_whoever_is_cancelled_while_it_is_noted_still_gets_to_know() -> None:
    store, asked, go_on = SwitchedOnce(), anyio.Event(), anyio.Event()
    known: list[object] = []

    async def slow() -> None:
        asked.set()
        await go_on.wait()

    store.after["begin"] = slow

    async def begin() -> None:
        known.append(await KeyedCreates(store, lifetime=1000, timeout=5).begin("a", ONE))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(begin)
        await asked.wait()
        tasks.cancel_scope.cancel()
        go_on.set()
    assert known == [None]


@pytest.mark.parametrize("how", [refuses, hangs])
async def test_what_was_noted_and_is_not_sent_is_forgotten(how: object) -> None:
    store = SwitchedOnce()
    store.after["begin"] = how  # type: ignore[assignment]
    with pytest.raises(StoreFailed):
        await creates(store).begin("a", ONE)
    assert len(store) == 1
    await forgotten(store)
    store.after.clear()
    assert await creates(store).begin("a", OTHER) is None


async def test_what_somebody_else_has_begun_since_is_left_alone() -> None:
    store = SwitchedOnce()
    store.before["begin"] = refuses
    with pytest.raises(StoreFailed):
        await creates(store).begin("a", ONE)
    store.before.clear()
    await store.begin("a", OTHER, 1000)
    for _ in range(50):
        await anyio.lowlevel.checkpoint()
    assert "forget" in store.calls
    assert len(store) == 1


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_a_task_that_is_cancelled_by_a_host_that_knows_no_scopes_leaves_the_key_free() -> None:
    store, asked = SwitchedOnce(), anyio.Event()

    async def slow() -> None:
        asked.set()
        await anyio.sleep_forever()

    store.after["begin"] = slow
    task = asyncio.create_task(KeyedCreates(store, lifetime=1000, timeout=60).begin("a", ONE))
    await asked.wait()
    assert len(store) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await forgotten(store)


async def test_what_a_store_notes_late_is_taken_back_when_it_can_be() -> None:
    """A store that was frozen does all that it was asked for, in any order."""
    store, tried = SwitchedOnce(), anyio.Event()

    async def is_frozen() -> None:
        if store.calls.count("forget") == 20:
            tried.set()
        raise OSError

    store.before |= {"begin": refuses, "forget": is_frozen}
    with pytest.raises(StoreFailed):
        await creates(store).begin("a", ONE)
    with anyio.fail_after(5):
        await tried.wait()
    taken: list[int] = []

    async def notes_late() -> None:
        taken.append(len(store))
        if len(taken) == 1:
            store.before.clear()
            await store.begin("a", ONE, 1000)

    store.before.clear()
    store.after["forget"] = notes_late
    with anyio.fail_after(5):
        while len(taken) < 2:  # noqa: ASYNC110 - it is told by nobody
            await anyio.sleep(0.01)
    assert len(store) == 0


async def test_it_is_given_up_when_the_key_is_free_anyhow(caplog: pytest.LogCaptureFixture) -> None:
    store = SwitchedOnce()
    store.before |= {"begin": refuses, "forget": hangs}
    with pytest.raises(StoreFailed):
        await KeyedCreates(store, lifetime=0.2, timeout=0.05).begin("a", ONE)
    with anyio.fail_after(5):
        while len(caplog.messages) < 2:  # noqa: ASYNC110 - it is told by nobody
            await anyio.sleep(0.01)
    assert caplog.messages[1].startswith("the store of Idempotency-Keys did not take back a create that was not sent")


async def test_no_more_than_some_are_waited_for_so_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keyed, "MAX_TAKEN_BACK", 1)
    store = SwitchedOnce()
    store.before |= {"begin": refuses, "forget": refuses}
    begun = creates(store)
    for key in "ab":
        with pytest.raises(StoreFailed):
            await begun.begin(key, ONE)
    with anyio.fail_after(5):
        while len(caplog.messages) < 3:  # noqa: ASYNC110 - it is told by nobody
            await anyio.sleep(0.01)
    assert [message for message in caplog.messages if "take back" in message] == caplog.messages[2:]
    # The other one is still tried.
    store.before.clear()
    calls = len(store.calls)
    with anyio.fail_after(5):
        while store.calls[calls:].count("forget") < 2:  # noqa: ASYNC110 - it is told by nobody
            await anyio.sleep(0.01)


async def test_writing_is_tried_again_and_given_up(caplog: pytest.LogCaptureFixture) -> None:
    store = SwitchedOnce()
    await store.begin("a", ONE, 1000)
    store.before["end"] = refuses
    assert not await creates(store).write("a", ONE, ONE)
    assert not caplog.records
    told: list[object] = []
    await creates(store).write_later("a", ONE, ONE, lambda: told.append(ONE))
    assert store.calls == ["begin", *["end"] * 4]
    assert caplog.messages == ["the store of Idempotency-Keys did not take what came of a create"]
    store.before.clear()
    await creates(store).write_later("a", ONE, None, lambda: told.append(None))
    assert store.calls[5:] == ["forget"]
    assert len(store) == 0
    assert told == [ONE, None]


@pytest.mark.parametrize("fails", [False, True])
async def test_it_is_told_when_it_is_settled(fails: bool) -> None:
    store, is_settled = SwitchedOnce(), anyio.Event()
    store.before["end"] = refuses if fails else nothing
    await creates(store).settle("a", ONE, ONE, is_settled.set)
    assert is_settled.is_set() != fails
    store.before.clear()
    with anyio.fail_after(5):
        await is_settled.wait()
    assert len(store) == 1
