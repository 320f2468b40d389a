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
                _saw(beginner.sighting, span)

    async def over(self) -> None:
        """The call is over: what it has shown is told now, if its beginner was over before; else that one tells it."""
        if self._beginner is not None:
            await self._beginner.follow_up()


def _saw(sighting: Sighting, span: RequestSpan) -> None:
    """`span` has seen what another request has, without what may be on no signal of this one."""
    prediction = None if sighting.prediction is None else scrubbed(sighting.prediction, span.scrub)
    if sighting.by != "create":
        span.sighting = sighting._replace(prediction=prediction)
    elif prediction is not None:
        # A creation is told once, by whoever began it.
        span.joined(prediction)
