from __future__ import annotations

import asyncio
import gc
import weakref

import anyio
import pytest
import trio

from replicate_proxy_mw.event_loops import OfLoop, asyncio_task

BACKENDS = ("asyncio", "trio")


def test_the_task_that_runs_is_asyncio_s_only_there() -> None:
    async def main() -> bool:
        return asyncio_task() is not None

    assert [anyio.run(main, backend=backend) for backend in BACKENDS] == [True, False]
    assert asyncio_task() is None


def test_trio_as_a_guest_of_asyncio_is_trio() -> None:
    async def guest() -> bool:
        asyncio.get_running_loop()
        return asyncio_task() is None

    async def main() -> bool:
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        trio.lowlevel.start_guest_run(
            guest,
            run_sync_soon_threadsafe=asyncio.get_running_loop().call_soon_threadsafe,
            done_callback=lambda outcome: done.set_result(outcome.unwrap()),
        )
        return await done

    assert asyncio.run(main())


def test_each_event_loop_has_one_of_its_own() -> None:
    of_loop: OfLoop[list[object]] = OfLoop(list)
    other: OfLoop[list[object]] = OfLoop(list)

    async def main() -> list[object]:
        value = of_loop.get()
        assert of_loop.get() is value
        assert other.get() is not value
        value.append(1)
        return value

    assert [anyio.run(main, backend=backend) for backend in [*BACKENDS, *BACKENDS]] == [[1]] * 4


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_taken_is_made_anew(backend: str) -> None:
    of_loop: OfLoop[list[object]] = OfLoop(list)

    async def main() -> None:
        assert of_loop.take() is None
        value = of_loop.get()
        assert of_loop.take() is value
        assert of_loop.take() is None
        assert of_loop.get() is not value

    anyio.run(main, backend=backend)


def test_two_loops_by_turns_keep_theirs() -> None:
    of_loop: OfLoop[list[object]] = OfLoop(list)

    async def ask() -> list[object]:
        return of_loop.get()

    with asyncio.Runner() as one, asyncio.Runner() as two:
        first, second = one.run(ask()), two.run(ask())
        assert first is not second
        assert one.run(ask()) is first
        assert two.run(ask()) is second


def test_a_loop_that_is_over_is_not_kept() -> None:
    of_loop: OfLoop[list[object]] = OfLoop(list)

    async def main() -> weakref.ref[asyncio.AbstractEventLoop]:
        of_loop.get()
        return weakref.ref(asyncio.get_running_loop())

    loop = asyncio.run(main())
    gc.collect()
    assert loop() is None
