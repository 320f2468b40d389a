from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest
from anyio.lowlevel import checkpoint

from replicate_proxy_mw import ending
from replicate_proxy_mw.exchange import AtOnce

pytestmark = pytest.mark.anyio

Step = Callable[[], Awaitable[None]]


class Opened:
    """What is closed in a way of its own."""

    def __init__(self, aclose: Step) -> None:
        self.aclose = aclose


def _step(ran: list[str], name: str) -> Step:
    async def run() -> None:
        await checkpoint()
        ran.append(name)

    return run


async def _fails() -> None:
    raise ZeroDivisionError("hunter2")


async def test_the_last_is_closed_first() -> None:
    ran: list[str] = []
    opened = [Opened(_step(ran, name)) for name in "abc"]
    await ending.close(opened)
    assert ran == ["c", "b", "a"]
    assert len(opened) == 3


async def test_what_fails_or_hangs_keeps_no_other_open(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ending, "CLOSE_TIMEOUT", 0.05)
    ran: list[str] = []
    steps = [_step(ran, "a"), anyio.sleep_forever, _step(ran, "b"), _fails, _step(ran, "c"), anyio.sleep_forever]
    await ending.close([Opened(step) for step in steps])
    assert ran == ["c", "b", "a"]
    assert caplog.messages == ["closing an answer failed: ZeroDivisionError"]


async def test_what_needs_no_waiting_is_closed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []

    def fails() -> None:
        raise ZeroDivisionError("hunter2")

    await ending.close([AtOnce(lambda: ran.append("a")), AtOnce(fails), Opened(_step(ran, "b"))])
    assert ran == ["a", "b"]
    assert caplog.messages == ["closing an answer failed: ZeroDivisionError"]
    await AtOnce(lambda: ran.append("c")).aclose()
    assert ran[-1] == "c"


@pytest.mark.parametrize("end", ["close", "run"])
async def test_a_request_that_is_cancelled_ends_all_the_same(end: str) -> None:
    ran: list[str] = []
    steps = [_step(ran, "a"), _step(ran, "b")]
    with anyio.CancelScope() as scope:
        scope.cancel()
        await (ending.close([Opened(step) for step in steps]) if end == "close" else ending.run(steps))
    assert sorted(ran) == ["a", "b"]


async def test_what_is_to_be_done_is_done_in_order(caplog: pytest.LogCaptureFixture) -> None:
    ran: list[str] = []
    await ending.run([_step(ran, "a"), _fails, _step(ran, "b")])
    assert ran == ["a", "b"]
    assert caplog.messages == ["what a layer does afterwards failed: ZeroDivisionError"]


async def test_one_step_may_add_another() -> None:
    ran: list[str] = []
    steps: list[Step] = []

    async def adds() -> None:
        steps.append(_step(ran, "added"))

    steps.append(adds)
    await ending.run(steps)
    assert ran == ["added"]


async def test_all_together_have_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "AFTERWARDS_TIMEOUT", 0.05)
    ran: list[str] = []
    await ending.run([_step(ran, "a"), anyio.sleep_forever, _step(ran, "b")])
    assert ran == ["a"]


async def test_nothing_to_do() -> None:
    await ending.close([])
    await ending.run([])
