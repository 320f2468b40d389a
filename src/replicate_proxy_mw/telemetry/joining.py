"""Requests that wait for one call: the one that began it has the attempt, the others link to it and see what it saw."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from ..waiting import Waiting
from . import names
from .prediction import scrubbed
from .request import RequestSpan, Sighting, current


class Joint:
    """A call for several requests, begun by the one that is under way where this is made."""

    def __init__(self) -> None:
        self._beginner = current()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within `with`, the request that is under way here waits for the call.

        The beginner may be over by then, and its span closed; what the attempt has told it is there all the same.
        """
        span = current()
        if span is None:
            yield
            return
        beginner = None if self._beginner is span else self._beginner
        if self._beginner is not span:
            span.notes[names.COALESCED] = True
        if beginner is not None:
            span.span.add_link(beginner.span.get_span_context())
        waiting = span.waiting
        # What the attempt waits is within this already, and may go on when its beginner has left.
        span.waiting = None if waiting is None else Waiting()
        try:
            with waiting or nullcontext():
                yield
        finally:
            span.waiting = waiting
            if beginner is not None and beginner.sighting is not None:
                span.sighting = _seen(beginner.sighting, span)


def _seen(sighting: Sighting, span: RequestSpan) -> Sighting:
    """What another request has seen, without what may be on no signal of this one."""
    if sighting.prediction is None:
        return sighting
    prediction = scrubbed(sighting.prediction, span.scrub)
    return Sighting(sighting.id, sighting.kind, sighting.by, prediction, sighting.at)
