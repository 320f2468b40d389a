"""`Idempotency-Key` on creates: sent once, whatever becomes of the caller, its connection or this process.

IETF draft-ietf-httpapi-idempotency-key-header.
"""

from __future__ import annotations

import math
import secrets
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import anyio

from .. import creates, ending, rereading
from ..errors import BodyTooLarge, CreateUnknown, IdempotencyKeyReused, UpstreamFailed
from ..event_loops import OfLoop
from ..exchange import Forward, Layer, Opened, ProxyRequest, ProxyResponse
from ..json_bodies import asking_for_plain, held
from ..operations import Kind
from ..sharing import SharedCall, forwarded_apart
from ..store.keyed import KeyedCreates
from ..store.once import KeyedCreate, MemoryOnceStore, OnceStore
from ..telemetry import names
from ..telemetry.joining import Joint
from ..telemetry.request import current

# Bytes of a body that is held to be compared, and of an answer that is held for all who wait for it.
MAX_SIZE = 16 << 20

# Seconds between looks at what another process is about to learn: the first, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0

_REPLAYED = (b"idempotency-replayed", b"true")


def idempotency_keys(
    *,
    store: OnceStore | None = None,
    lifetime: float = 86400.0,
    longest_create: float = 180.0,
    store_timeout: float = 2.0,
) -> Layer:
    """Send a create of a prediction or training with an `Idempotency-Key` once, and answer it again with the same key.

    Its answer is awaited even if its caller leaves. Whoever sends the same key and body again, with the same tenant and
    token, gets that very answer while it is under way, and waits for it where it is in another process; later, what was
    made as Replicate shows it now, with the first one's status. Both have `idempotency-replayed: true`. JSON is the
    same whatever the order of its members and its white space, up to 1 MiB; all else byte for byte.

    A key can be used again where nothing was made: after 4xx of Replicate's, but for 408 and 409, and after whatever
    failed or was refused before it was sent. Where that is not known it is never sent again (409 `create_unknown`).
    While the store is out of order nothing is sent (503 `store_failed`), and an answer that is there goes out all the
    same. A store that loses what it has does not know the keys any more.

    List it below guardrails: what they refuse has then not begun; and above `reuse_results`, whose answers are what was
    made: the other way round, a key that was used with another body may be answered with a result in the place of 422.

    Args:
        store: what was begun: by default in the memory of this process, for several `RedisOnceStore`.
        lifetime: seconds for which a key is known. A day: longer than anybody tries again.
        longest_create: seconds until a create of which nothing is heard counts as lost, and for which a caller waits
            for another's at most. By default what the middleware's own allow: 10 to connect and 5 for a connection, 30
            for the upload, 75 for the answer, and 60 of waiting between attempts.
        store_timeout: seconds for each call of the store before anything goes up; an answer that is paid waits for 0.4
            at most. As long as the middleware has for its own.

    Raises:
        ValueError: an option is no number of seconds above 0, or `lifetime` is less than `longest_create`.
    """
    options = {"lifetime": lifetime, "longest_create": longest_create, "store_timeout": store_timeout}
    for option, seconds in options.items():
        if not 0 < seconds < math.inf:
            raise ValueError(f"{option}: must be more than 0 seconds, and finite")
    if lifetime < longest_create:
        raise ValueError("lifetime: must be at least longest_create, for which a create may be under way")
    begun = KeyedCreates(MemoryOnceStore() if store is None else store, lifetime=lifetime, timeout=store_timeout)
    keys = _Keys(begun, longest_create)

    def layer(forward: Forward) -> Forward:
        async def once(request: ProxyRequest) -> ProxyResponse:
            kind = None if request.route.details is None else request.route.details.creates
            if kind is None or kind == "file":
                return await forward(request)
            value = creates.idempotency_key(request.scope["headers"])
            if value is None:
                return await forward(request)
            whole = (request.content_length or 0) <= MAX_SIZE
            if whole:
                request, body, whole = await held(request, max_size=MAX_SIZE)
            if not whole:
                raise BodyTooLarge(f"Idempotency-Key: more than {MAX_SIZE} bytes are not compared; nothing was sent.")
            key = creates.digest("create", request.key.identity(), value)
            return await keys.answer(forward, request, body, kind, key)

        return once

    return layer


class _UnderWay:
    """A create of this event loop until its end is written. It counts as lost at `until`.

    Attributes:
        opened: what is closed when the call ends, since the exchange that began it is over.
    """

    call: SharedCall[ProxyResponse | KeyedCreate]

    def __init__(self, fingerprint: str, until: float) -> None:
        self.fingerprint, self.until = fingerprint, until
        self.joint = Joint()
        self.opened: list[Opened] = []


class _Keys:
    """What was begun with which key: here as a call to wait for, elsewhere as the store has it."""

    def __init__(self, begun: KeyedCreates, longest: float) -> None:
        self._begun, self._longest = begun, longest
        self._calls = OfLoop[dict[str, _UnderWay]](dict)

    async def answer(self, forward: Forward, request: ProxyRequest, body: bytes, kind: Kind, key: str) -> ProxyResponse:
        create = KeyedCreate(
            mark=secrets.token_hex(16), fingerprint=creates.fingerprint(request, body), left=self._longest
        )
        came, is_first = await self._came(forward, request, key, create)
        if isinstance(came, KeyedCreate):
            assert came.id is not None
            assert came.status is not None
            came = await rereading.made(forward, request, kind, came.id, status=came.status)
        if is_first:
            return replace(came)
        if (cached := dict(came.headers).get(b"x-portkey-cache-status")) is not None:
            request.notes[names.CACHE_STATUS] = cached.decode("latin-1")
        return replace(came, headers=(*came.headers, _REPLAYED))

    async def _came(
        self, forward: Forward, request: ProxyRequest, key: str, create: KeyedCreate
    ) -> tuple[ProxyResponse | KeyedCreate, bool]:
        """What came of the create with this key, and whether that is this one."""
        calls, pause = self._calls.get(), FIRST_PAUSE
        until = anyio.current_time() + self._longest
        while anyio.current_time() < until:
            if (under_way := calls.get(key)) is not None:
                _check(under_way.fingerprint, create)
                return await _awaited(under_way), False
            known = await self._begun.begin(key, create)
            if known is None:
                # Without a pause since it has begun: whoever is cancelled now cannot end it any more.
                return await self._sent(forward, request, key, create), True
            _check(known.fingerprint, create)
            if known.id is not None:
                return known, False
            if known.left <= 0:
                break
            with _waiting():
                await anyio.sleep(min(pause, known.left))
            pause = min(pause * 2, LONGEST_PAUSE)
        raise CreateUnknown()

    async def _sent(
        self, forward: Forward, request: ProxyRequest, key: str, create: KeyedCreate
    ) -> ProxyResponse | KeyedCreate:
        # Known before it begins: some event loops run a task up to its first wait where it is made.
        under_way = self._calls.get()[key] = _UnderWay(create.fingerprint, anyio.current_time() + self._longest)
        under_way.call = SharedCall(partial(self._create, under_way, forward, request, key, create), to_the_end=True)
        try:
            return await _awaited(under_way)
        finally:
            if under_way.call.is_open:
                # What layers above hold for as long as the exchange lasts, such as a place, this call still needs.
                under_way.opened += request.opened
                request.opened.clear()

    async def _create(
        self, under_way: _UnderWay, forward: Forward, request: ProxyRequest, key: str, create: KeyedCreate
    ) -> ProxyResponse | KeyedCreate:
        """Send it; what came of it is written before it is told."""
        asked = creates.watched(asking_for_plain(request))
        ended: KeyedCreate | None = replace(create, left=0)
        then = partial(self._calls.get().pop, key, None)

        async def joined(request: ProxyRequest) -> ProxyResponse:
            request.afterwards.append(under_way.joint.over)
            asked.watch.opened = request.opened
            return await forward(request)

        try:
            try:
                response, whole = await forwarded_apart(joined, asked, max_size=MAX_SIZE)
            except Exception as error:
                await self._begun.settle(key, create, None if creates.is_unsent(asked, error) else ended, then)
                raise
            head = b""
            if not response.is_event_stream:  # which has no end to wait for
                response, head, _ = await held(response, max_size=MAX_SIZE)
            id = creates.created_id(response, head, whole=whole)
            if id is not None:
                ended = replace(create, left=0, status=response.status, id=id)
            elif creates.is_refused(response) or creates.is_unsent(asked, None):
                ended = None
            await self._begun.settle(key, create, ended, then)
        except anyio.get_cancelled_exc_class():
            # The event loop ends, or what was waited for. Until it counts as lost it is under way for the store.
            then()
            raise
        finally:
            await ending.close(under_way.opened)
        if whole:
            return response
        if id is None or ended is None:
            raise UpstreamFailed("Idempotency-Key: the answer is too long, or a stream, and cannot be held.")
        return ended


def _check(fingerprint: str, create: KeyedCreate) -> None:
    if fingerprint != create.fingerprint:
        raise IdempotencyKeyReused()


async def _awaited(under_way: _UnderWay) -> ProxyResponse | KeyedCreate:
    deadline = under_way.until if under_way.call.is_open else math.inf
    with under_way.joint.waiting(), anyio.CancelScope(deadline=deadline):
        return await under_way.call.result()
    raise CreateUnknown()


def _waiting() -> AbstractContextManager[object]:
    """What is waited for here is another process's: none of the proxy's own time."""
    span = current()
    return nullcontext() if span is None or span.waiting is None else span.waiting
