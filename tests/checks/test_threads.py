from __future__ import annotations

import json
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
import pytest

from replicate_proxy_mw.checks.input_schema import valid_input
from replicate_proxy_mw.checks.patterns import matches
from replicate_proxy_mw.checks.reading import MAX_INPUT, object_of
from replicate_proxy_mw.checks.threads import MAX_THREADS, in_thread
from tests.checks.asking import checked

pytestmark = pytest.mark.anyio

SCHEMA = {"latest_version": {"openapi_schema": {"components": {"schemas": {"Input": {"required": ["x"]}}}}}}


@pytest.mark.parametrize(
    "check",
    [
        lambda: matches("secret")(checked("a secret")),
        lambda: valid_input()(checked({}, at={"/models/a/b": SCHEMA})),
        lambda: object_of(json.dumps({"x": "x" * MAX_INPUT}).encode()),
    ],
    ids=["matches", "valid_input", "object_of"],
)
async def test_no_check_waits_for_threads_of_the_host(check: Callable[[], Awaitable[Any]]) -> None:
    limiter, free = anyio.to_thread.current_default_thread_limiter(), threading.Event()
    async with anyio.create_task_group() as tasks:
        for _ in range(int(limiter.total_tokens)):
            tasks.start_soon(anyio.to_thread.run_sync, partial(free.wait))
        await anyio.wait_all_tasks_blocked()
        assert limiter.available_tokens == 0
        try:
            with anyio.fail_after(10):
                assert await check()
        finally:
            free.set()


async def test_so_many_are_busy_at_a_time() -> None:
    begun, free, returned = list[int](), threading.Event(), list[int]()

    def call(number: int) -> int:
        begun.append(number)
        free.wait()
        return number

    async def one(number: int) -> None:
        returned.append(await in_thread(partial(call, number)))

    async with anyio.create_task_group() as tasks:
        for number in range(2 * MAX_THREADS):
            tasks.start_soon(one, number)
        await anyio.wait_all_tasks_blocked()
        assert len(begun) <= MAX_THREADS
        free.set()
    assert sorted(returned) == list(range(2 * MAX_THREADS))


async def test_who_has_no_time_left_does_not_wait_for_its_thread() -> None:
    begun, free = threading.Event(), threading.Event()

    def call() -> None:
        begun.set()
        free.wait()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(in_thread, call)
            await anyio.to_thread.run_sync(begun.wait)
            tasks.cancel_scope.cancel()
    finally:
        free.set()
