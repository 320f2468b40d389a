from __future__ import annotations

import time

import pytest

from replicate_proxy_mw.testing import Clock, ManualClock


def test_real_time_runs_and_can_be_advanced() -> None:
    clock = Clock()
    assert abs(clock.now() - time.time()) < 1
    clock.advance(3600)
    assert abs(clock.now() - time.time() - 3600) < 1


def test_manual_time_stands_still() -> None:
    clock = ManualClock(start=100)
    time.sleep(0.01)
    assert clock.now() == 100
    clock.advance(2.5)
    assert clock.now() == 102.5


def test_time_does_not_go_back() -> None:
    with pytest.raises(ValueError, match="cannot go back"):
        ManualClock().advance(-1)
