"""One poll for many: reads of one prediction that come at the same time are one call upstream."""

from __future__ import annotations

import math
from functools import partial
from itertools import takewhile
from typing import NamedTuple

import anyio

from ..event_loops import OfLoop
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse
from ..headers import HeaderList
from ..portkey import Retry
from ..sharing import SharedCall, forwarded_apart
from ..telemetry.joining import Joint

# Bytes of an answer that several get; four times the largest that was recorded.
MAX_SIZE = 8 << 20

_POLLS = {"predictions.get": "prediction_id", "trainings.get": "training_id"}
_CANCELS = {"predictions.cancel": "prediction_id", "trainings.cancel": "training_id"}


def coalesce_polls(*, interval: float = 0.5) -> Layer:
    """Let concurrent GETs of one prediction or training share one call to Replicate.

    Those share it that differ in nothing that Replicate could tell apart, but for `user-agent`: same token and tenant,
    same target, same headers that go up, and the same `retry` in their configs. All get its answer byte for byte, or
    its error. It is sent as whoever began it would have sent it, and goes on when that one leaves or runs out of time
    (408), until the last who waits for it has left.

    Nobody gets an answer that was there before it asked: whoever comes between two calls waits for the next one,
    together with all others, since an SDK that is told from a cache that a prediction is still running polls for ever.
    What waits holds no connection. A cancel ends the waiting of polls of the same token and tenant, and one of them
    that comes after its answer joins no call that was begun before.

    An answer of more than 8 MiB and a stream of events are not shared: each who waited for it asks by itself. All this
    holds for one event loop of one process; others, each with this layer, call and count by themselves.

    Args:
        interval: seconds from the start of one call for a prediction to the start of the next. Half a second is what
            Replicate's SDKs wait from an answer to the next poll: one alone is not delayed, and however many poll,
            there are two calls a second. With 0 nobody waits, and only what comes during a call shares it.

    Raises:
        ValueError: `interval` is negative or not finite.
    """
    if not 0 <= interval < math.inf:
        raise ValueError("interval: must be 0 seconds or more, and finite")

    def layer(forward: Forward) -> Forward:
        polls = OfLoop(lambda: _Polls(forward, interval))

        async def coalesced(request: ProxyRequest) -> ProxyResponse:
            operation = request.operation or ""
            is_poll = operation in _POLLS and request.method == "GET"
            if not is_poll and operation not in _CANCELS:
                return await forward(request)
            if is_poll:
                return await polls.get().answer(request)
            try:
                return await forward(request)
            finally:
                # Even without an answer, it may have been received.
                polls.get().forget(request.route.params[_CANCELS[operation]], request.key.identity())

        return coalesced

    return layer


class _Key(NamedTuple):
    """What tells polls apart."""

    id: str
    identity: str
    target: str
    headers: HeaderList
    retry: Retry | None

    @classmethod
    def of(cls, request: ProxyRequest) -> _Key:
        return cls(
            id=request.route.params[_POLLS[request.operation or ""]],
            identity=request.key.identity(),
            target=request.target,
            headers=tuple(pair for pair in request.headers if pair[0] != b"user-agent"),
            retry=request.portkey.retry,
        )


class _Poll:
    """A call that is under way, or waits until it is `due`."""

    call: SharedCall[ProxyResponse | None]

    def __init__(self) -> None:
        self.joint = Joint()
        self.due, self.is_begun = anyio.Event(), False


class _Polls:
    """What is known in one event loop: the calls to join, and when the last ones of the last interval were begun.

    Times are the event loop's own.
    """

    def __init__(self, forward: Forward, interval: float) -> None:
        self._forward, self._interval = forward, interval
        self._open: dict[_Key, _Poll] = {}
        self._begun: dict[_Key, float] = {}  # the oldest first

    async def answer(self, request: ProxyRequest) -> ProxyResponse:
        key = _Key.of(request)
        poll = self._open.get(key)
        if poll is None or not poll.call.is_open:
            # Known before it begins: some event loops run a task up to its first wait where it is made.
            poll = self._open[key] = _Poll()
            poll.call = SharedCall(partial(self._ask, key, poll, request))
        with poll.joint.waiting():
            response = await poll.call.result()
        return await self._forward(request) if response is None else response

    def forget(self, id: str, identity: str) -> None:
        """Nobody joins any more what is under way, and what waits for its time begins: for whom it may concern, since
        anybody may try to cancel."""
        about = (id, identity)
        for key in [key for key in self._begun if key[:2] == about]:
            del self._begun[key]
        for key in [key for key in self._open if key[:2] == about]:
            if self._open[key].is_begun:
                del self._open[key]
            else:
                self._open[key].due.set()

    async def _ask(self, key: _Key, poll: _Poll, request: ProxyRequest) -> ProxyResponse | None:
        """The answer, None if it cannot be shared."""
        try:
            self._drop_old()
            if key in self._begun:
                with anyio.CancelScope(deadline=self._begun[key] + self._interval):
                    await poll.due.wait()
            poll.is_begun = True
            self._begun.pop(key, None)  # to stand last, then
            self._begun[key] = anyio.current_time()
            response, whole = await forwarded_apart(self._forward, request, max_size=MAX_SIZE)
        finally:
            if self._open.get(key) is poll:
                del self._open[key]
            self._drop_old()
        return response if whole else None

    def _drop_old(self) -> None:
        """So that there is never more than one interval has brought."""
        old = anyio.current_time() - self._interval
        for key, _ in list(takewhile(lambda begun: begun[1] <= old, self._begun.items())):
            del self._begun[key]
