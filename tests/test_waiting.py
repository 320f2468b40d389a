from __future__ import annotations

from contextlib import suppress

import pytest

from replicate_proxy_mw import waiting
from replicate_proxy_mw.waiting import Waiting


class Watch:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    watch = Watch()
    monkeypatch.setattr(waiting, "perf_counter", watch)
    return watch


def test_what_is_within_is_counted_and_nothing_else(watch: Watch) -> None:
    counted = Waiting()
    assert counted.seconds == 0.0
    for seconds in (2.0, 3.0):
        watch.now += 50.0
        with counted:
            watch.now += seconds
    watch.now += 50.0
    assert counted.seconds == 5.0


def test_what_overlaps_is_counted_once(watch: Watch) -> None:
    """As tasks do it: the one that began first may end first."""
    counted = Waiting()
    counted.__enter__()
    watch.now += 1.0
    counted.__enter__()
    watch.now += 1.0
    counted.__exit__()
    assert counted.seconds == 0.0
    watch.now += 1.0
    counted.__exit__()
    assert counted.seconds == 3.0


def test_what_fails_was_waited_for_too(watch: Watch) -> None:
    counted = Waiting()
    with suppress(ZeroDivisionError), counted:
        watch.now += 1.0
        raise ZeroDivisionError
    with counted:
        watch.now += 1.0
    assert counted.seconds == 2.0
