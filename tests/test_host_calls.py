from __future__ import annotations

import asyncio
import traceback

import anyio
import pytest

from replicate_proxy_mw import PermissionDenied
from replicate_proxy_mw.errors import ProxyError
from replicate_proxy_mw.host_calls import HostFailed, ask

pytestmark = pytest.mark.anyio


async def _hangs() -> None:
    await anyio.sleep_forever()


async def test_what_the_call_returns() -> None:
    async def call() -> int:
        return 42

    assert await ask(call, seconds=1) == 42


@pytest.mark.parametrize("error", [PermissionDenied("only on weekdays"), ProxyError()])
async def test_errors_with_an_answer_of_their_own_pass(error: ProxyError) -> None:
    async def call() -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        await ask(call, seconds=1)
    assert raised.value is error


class Secretive(Exception):
    pass


async def test_any_other_is_told_by_its_class_alone() -> None:
    async def call() -> None:
        raise Secretive("postgres://user:hunter2@db")

    with pytest.raises(HostFailed) as raised:
        await ask(call, seconds=1)
    assert (raised.value.name, str(raised.value)) == ("Secretive", "Secretive")
    assert raised.value.__context__ is None
    report = traceback.TracebackException.from_exception(raised.value, capture_locals=True)
    assert "hunter2" not in "".join(report.format())


async def test_a_call_that_is_not_even_one() -> None:
    def call() -> None:
        return None

    with pytest.raises(HostFailed, match="TypeError"):
        await ask(call, seconds=1)  # type: ignore[arg-type]


async def test_a_call_that_takes_too_long() -> None:
    ended = False

    async def call() -> None:
        nonlocal ended
        try:
            await _hangs()
        finally:
            ended = True

    with pytest.raises(HostFailed, match="TimeoutError"):
        await ask(call, seconds=0.01)
    assert ended


async def test_what_ends_the_process_passes() -> None:
    class Stop(BaseException):
        pass

    async def call() -> None:
        raise Stop

    with pytest.raises(Stop):
        await ask(call, seconds=1)


async def test_cancellation_passes() -> None:
    with anyio.move_on_after(0.01) as scope:
        await ask(_hangs, seconds=5)
    assert scope.cancelled_caught


async def test_a_shielded_call_is_finished_first() -> None:
    finished = False

    async def call() -> None:
        nonlocal finished
        await anyio.sleep(0.05)
        finished = True

    with anyio.CancelScope() as scope:
        scope.cancel()
        await ask(call, seconds=5, shield=True)
        await anyio.lowlevel.checkpoint()
    assert finished
    assert scope.cancelled_caught


async def test_a_shielded_call_has_its_time_too() -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        with pytest.raises(HostFailed, match="TimeoutError"):
            await ask(_hangs, seconds=0.01, shield=True)


def test_a_cancelled_task_that_the_call_waited_for() -> None:
    async def main() -> None:
        shared = asyncio.ensure_future(asyncio.sleep(10))
        shared.cancel()

        async def call() -> None:
            await shared

        with pytest.raises(HostFailed, match="CancelledError"):
            await ask(call, seconds=1)

    asyncio.run(main())


def test_a_task_that_is_cancelled_itself() -> None:
    async def main() -> None:
        task = asyncio.ensure_future(ask(_hangs, seconds=5))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
