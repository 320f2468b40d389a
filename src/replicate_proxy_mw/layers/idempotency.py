"""`Idempotency-Key` on creates: sent once, whatever becomes of the caller, its connection or this process.

IETF draft-ietf-httpapi-idempotency-key-header.
"""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from uuid import uuid4

import anyio
from anyio.lowlevel import RunVar

from .. import creates
from ..errors import (
    BadRequest,
    BodyTooLarge,
    CreateUnknown,
    IdempotencyKeyReused,
    ProxyError,
    UpstreamAborted,
    UpstreamFailed,
)
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse
from ..json_bodies import asking_for_plain, held
from ..operations import Kind
from ..sharing import SharedCall, forwarded_apart
from ..store.keyed import KeyedCreates
from ..store.once import KeyedCreate, MemoryOnceStore, OnceStore
from ..telemetry.request import current

# Bytes of a body that is held to be compared, and of an answer that is held for all who wait for it.
MAX_SIZE = 16 << 20

# Seconds between looks at what another process is about to learn: the first, and the longest.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 1.0

# Visible characters: as they are, or as a string of Structured Fields (RFC 9651, section 3.3.3).
_BARE = re.compile(r"[!#-~]{1,255}")
_QUOTED = re.compile(r'"((?:[!#-\[\]-~]|\\["\\]){1,255})"')

_REPLAYED = (b"idempotency-replayed", b"true")


def idempotency_keys(
    *,
    store: OnceStore | None = None,
    lifetime: float = 86400.0,
    longest_create: float = 180.0,
    store_timeout: float = 2.0,
) -> Layer:
    """Send a create of a prediction or training with an `Idempotency-Key` once, and answer it again with the same key.

    The first goes up as soon as the store has taken note of it, and its answer is awaited even if its caller leaves or
    has a time limit. Whoever sends the same key and body again, with the same tenant and token, gets that very answer
    where it is under way in this process, and waits for it where it is in another; later, what was made as Replicate
    shows it now, with the first one's status. Both have `idempotency-replayed: true`. JSON is the same whatever the
    order of its members and its white space, up to 1 MiB; all else byte for byte.

    A key can be used again where nothing was made: after 4xx of Replicate's, but for 408 and 409, and after what failed
    or was refused before it was sent. Else:

    - 400: the header comes twice, or is not 1 to 255 visible ASCII characters, in quotes or not.
    - 409 `create_unknown`: something may have been made (the answer was 408, 409 or 5xx, was cut or has no id; or the
      process has ended before it was there). It is never sent again with this key.
    - 413: a body of more than 16 MiB, which is not compared.
    - 422 `idempotency_key_reused`: the key was sent with another body, or to another path.
    - 502 `upstream_failed`: what was made could not be read; the text has its id.
    - 503 `store_failed`: the store is out of order, and nothing was sent.

    The store has digests of key and body, the status and id of what was made, and times. Where it fails when a create
    is paid, the answer goes out all the same and is stored as soon as may be; if that fails for some seconds, the key
    is answered 409 from `longest_create` on. A store that loses what it has does not know the keys any more.

    List it below guardrails: what they refuse has then not begun. What a layer below it refuses leaves the key free as
    long as nothing was sent; what one answers with an id, as `reuse_results` does, is what was made.

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
    for option, seconds in (
        ("lifetime", lifetime),
        ("longest_create", longest_create),
        ("store_timeout", store_timeout),
    ):
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
            value = _value(request.scope["headers"])
            if value is None:
                return await forward(request)
            if (request.content_length or 0) > MAX_SIZE:
                raise _too_large()
            request, body, whole = await held(request, max_size=MAX_SIZE)
            if not whole:
                raise _too_large()
            key = creates.digest("create", request.key.identity(), value)
            return await keys.answer(forward, request, body, kind, key)

        return once

    return layer


def _value(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    values = [value.decode("latin-1").strip(" \t") for name, value in headers if name == b"idempotency-key"]
    if not values:
        return None
    quoted = _QUOTED.fullmatch(values[0])
    if len(values) > 1 or not (quoted or _BARE.fullmatch(values[0])):
        raise BadRequest("Idempotency-Key: must be one header of 1 to 255 visible ASCII characters.")
    return re.sub(r"\\(.)", r"\1", quoted[1]) if quoted else values[0]


def _too_large() -> ProxyError:
    return BodyTooLarge(f"Idempotency-Key: a body of more than {MAX_SIZE} bytes is not compared; nothing was sent.")


@dataclass(frozen=True, slots=True)
class _UnderWay:
    """A create of this event loop until its end is written. It counts as lost at `until`."""

    fingerprint: str
    call: SharedCall[ProxyResponse | KeyedCreate]
    until: float


class _Keys:
    """What was begun with which key: here as a call to wait for, elsewhere as the store has it."""

    def __init__(self, begun: KeyedCreates, longest: float) -> None:
        self._begun, self._longest = begun, longest
        # anyio before 4.10 tells them apart by name alone.
        self._calls: RunVar[dict[str, _UnderWay]] = RunVar(f"replicate_proxy_mw.idempotency.{uuid4()}")

    async def answer(self, forward: Forward, request: ProxyRequest, body: bytes, kind: Kind, key: str) -> ProxyResponse:
        create = KeyedCreate(
            mark=secrets.token_hex(16), fingerprint=creates.fingerprint(request, body), left=self._longest
        )
        came, is_first = await self._came(forward, request, body, key, create)
        if isinstance(came, KeyedCreate):
            came = await _again(forward, request, kind, came)
        headers = came.headers if is_first else (*came.headers, _REPLAYED)
        return ProxyResponse(status=came.status, headers=headers, body=came.body, aclose=came.aclose)

    async def _came(
        self, forward: Forward, request: ProxyRequest, body: bytes, key: str, create: KeyedCreate
    ) -> tuple[ProxyResponse | KeyedCreate, bool]:
        """What came of the create with this key, and whether that is this one."""
        calls, pause = self._calls_here(), FIRST_PAUSE
        until = anyio.current_time() + self._longest
        while anyio.current_time() < until:
            if (under_way := calls.get(key)) is not None:
                _check(under_way.fingerprint, create)
                return await _awaited(under_way), False
            known = await self._begun.begin(key, create)
            if known is None:
                # Without a pause since it has begun: whoever is cancelled now cannot end it any more.
                call = SharedCall(partial(self._create, forward, request, body, key, create), to_the_end=True)
                calls[key] = _UnderWay(create.fingerprint, call, anyio.current_time() + self._longest)
                return await _awaited(calls[key]), True
            _check(known.fingerprint, create)
            if known.id is not None:
                return known, False
            if known.left <= 0:
                break
            with _waiting():
                await anyio.sleep(min(pause, known.left))
            pause = min(pause * 2, LONGEST_PAUSE)
        raise CreateUnknown()

    def _calls_here(self) -> dict[str, _UnderWay]:
        try:
            return self._calls.get()
        except LookupError:
            self._calls.set({})
            return self._calls.get()

    async def _create(
        self, forward: Forward, request: ProxyRequest, body: bytes, key: str, create: KeyedCreate
    ) -> ProxyResponse | KeyedCreate:
        """Send it; what came of it is written before it is told."""
        sent = creates.Body(body)
        asked = asking_for_plain(replace(request, body=sent))
        ended: KeyedCreate | None = replace(create, left=0)
        try:
            response, whole = await forwarded_apart(forward, asked, max_size=MAX_SIZE)
        except Exception as error:
            await self._settle(key, create, None if creates.is_unsent(error, sent) else ended)
            raise
        except BaseException:
            # The event loop ends, or what was waited for. Until it counts as lost it is under way for the store.
            self._calls_here().pop(key, None)
            raise
        head = b""
        if not response.is_event_stream:  # which has no end to wait for
            response, head, _ = await held(response, max_size=MAX_SIZE)
        id = creates.created_id(response, head, whole=whole)
        if id is not None:
            ended = replace(create, left=0, status=response.status, id=id)
        elif creates.is_refused(response):
            ended = None
        await self._settle(key, create, ended)
        if whole:
            return response
        if id is None or ended is None:
            raise UpstreamFailed("Idempotency-Key: Replicate's answer is too long, or a stream, and cannot be held.")
        return ended

    async def _settle(self, key: str, create: KeyedCreate, ended: KeyedCreate | None) -> None:
        if await self._begun.write(key, create, ended):
            self._calls_here().pop(key, None)
        else:
            SharedCall(partial(self._settle_later, key, create, ended), to_the_end=True)

    async def _settle_later(self, key: str, create: KeyedCreate, ended: KeyedCreate | None) -> None:
        await self._begun.write_later(key, create, ended)
        self._calls_here().pop(key, None)


def _check(fingerprint: str, create: KeyedCreate) -> None:
    if fingerprint != create.fingerprint:
        raise IdempotencyKeyReused()


async def _awaited(under_way: _UnderWay) -> ProxyResponse | KeyedCreate:
    deadline = under_way.until if under_way.call.is_open else math.inf
    with _waiting(), anyio.CancelScope(deadline=deadline):
        return await under_way.call.result()
    raise CreateUnknown()


def _waiting() -> AbstractContextManager[object]:
    """What is waited for here is Replicate's, or another process's: none of the proxy's own time."""
    span = current()
    return nullcontext() if span is None or span.waiting is None else span.waiting


async def _again(forward: Forward, request: ProxyRequest, kind: Kind, done: KeyedCreate) -> ProxyResponse:
    """What was made, as Replicate shows it now."""
    assert done.id is not None
    assert done.status is not None
    status: object = "no answer"
    try:
        response, _, _ = await creates.read_again(forward, request, kind, done.id)
        if response.status == 200:
            return replace(response, status=done.status)
        status = response.status
    except UpstreamAborted:
        pass
    except ProxyError as error:
        if error.status < 500:
            raise
    raise UpstreamFailed(
        f"This Idempotency-Key has made {done.id}, which could not be read ({status}); nothing was created."
    )
