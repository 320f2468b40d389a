from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from replicate_proxy_mw import ProxyRequest, ProxyResponse
from replicate_proxy_mw.errors import Overloaded, UpstreamUnreachable
from replicate_proxy_mw.layers import resend as module
from replicate_proxy_mw.layers.resend import _wait, resend
from tests.requests import request_of

pytestmark = pytest.mark.anyio


async def _waits(monkeypatch: pytest.MonkeyPatch, came: Sequence[bytes | None], attempts: int) -> list[float]:
    """Seconds between the attempts: each is answered by 503 with this `Retry-After`, or not at all for None."""
    waits: list[float] = []
    left = list(came)

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    async def forward(request: ProxyRequest) -> ProxyResponse:
        if not left:
            return ProxyResponse.json(200, {})
        if (seconds := left.pop(0)) is None:
            raise UpstreamUnreachable()
        return ProxyResponse.json(503, {}, headers=((b"retry-after", seconds),))

    monkeypatch.setattr(module, "anyio", SimpleNamespace(sleep=sleep))
    await resend(attempts=attempts)(forward)(request_of())
    return waits


async def test_the_waits_begin_with_a_second_and_double(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = await _waits(monkeypatch, [None] * 4, attempts=4)
    assert len(waits) == 4
    for wait, longest in zip(waits, [1, 2, 4, 8], strict=True):
        assert longest / 2 <= wait <= longest


async def test_a_minute_of_waiting_in_all_is_not_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _waits(monkeypatch, [b"60"], attempts=1) == [60.0]
    assert await _waits(monkeypatch, [b"20", b"40"], attempts=2) == [20.0, 40.0]


async def test_more_than_a_minute_in_all_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await _waits(monkeypatch, [b"40", b"40"], attempts=2) == [40.0]


def test_waits_are_spread_over_their_upper_half() -> None:
    waits = [_wait(UpstreamUnreachable(), 8.0) for _ in range(500)]
    assert 4 <= min(waits) < 5
    assert 7 < max(waits) <= 8


def test_what_our_own_refusal_tells_callers_is_not_for_us() -> None:
    assert _wait(Overloaded(), 0.001) <= 0.001
