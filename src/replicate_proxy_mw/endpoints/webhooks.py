"""Webhooks that Replicate delivers: what its signature does not prove is refused, what was taken is not taken again.

Facts: Replicate's pages "Receive webhooks" and "Verify webhooks", and the specification of Standard Webhooks. A
delivery may hold the URL of a stream, which is all that reading it needs, so that no traceback's locals show one.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import hmac
import io
import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import anyio
from anyio.lowlevel import RunVar

from ..errors import (
    BadRequest,
    BodyTooLarge,
    MethodNotAllowed,
    Overloaded,
    ProxyError,
    StoreFailed,
    WebhookFailed,
    WebhookReplayed,
    WebhookUnsigned,
    WebhookUnverified,
)
from ..exchange import Chunks, ProxyResponse
from ..headers import HeaderList, length
from ..host_calls import HostFailed, ask
from ..store import Ledger, StoredPrediction

logger = logging.getLogger("replicate_proxy_mw")

# Bytes of a body, as of all that is looked at; and of all that are read at a time, since anybody may send some.
MAX_SIZE = 8 << 20
MAX_UNVERIFIED = 8 * MAX_SIZE

# Seconds for a body to arrive; senders give the whole exchange 15 to 30 (Standard Webhooks, "Request timeouts").
READ_TIMEOUT = 15.0

# Seconds that a delivery's time may be from now, as every library for Standard Webhooks has it. An id is remembered for
# twice as long, since what is older fails by its time.
TOLERANCE = 300.0

# About 25 MB. Only ids that a signature has proved are remembered, so that no stranger can have one forgotten.
MAX_REMEMBERED = 100_000

_READ = (b"webhook-id", b"webhook-timestamp", b"webhook-signature", b"content-length")

# No full stop: it ends the id in what is signed, and another split of the same bytes would pass.
_ID = re.compile(rb"[!-\-/-~]{1,256}")
_TIMESTAMP = re.compile(rb"[1-9][0-9]{0,11}")
_SIGNATURE = re.compile(rb"v1,[A-Za-z0-9+/]{43}=")
_MAX_SIGNATURES = 4096  # bytes of that header

_SECRET = re.compile(r"whsec_([A-Za-z0-9+/]+)={0,2}")
_MIN_KEY = 24  # bytes (Standard Webhooks, "Signature scheme"); Replicate's are as long


@dataclass(frozen=True, kw_only=True, slots=True)
class WebhookEvent:
    """A delivery whose signature is right.

    Attributes:
        id: the same for every attempt at it; for telling whether it was handled already.
        sent_at: when this attempt was made, in seconds since the epoch.
        prediction: the prediction, or training, as it was then.
        body: the bytes that were signed.
    """

    id: str
    sent_at: float
    prediction: Mapping[str, Any] = field(repr=False)
    body: bytes = field(repr=False)


OnWebhook = Callable[[WebhookEvent], Awaitable[None]]


class WebhookEndpoint:
    """Verifies deliveries and hands them to the host.

    A delivery is taken once `on_event` has returned; then it is answered 204, and any other with its id is refused. One
    that was not taken may come again. An attempt that arrives during another at the same delivery waits for its end.

    Nothing is lost where that can be helped, so that `on_event` may get an event twice and has to recognise its `id`:
    when it fails or is stopped halfway, when attempts reach two processes at the same moment, and when they reach
    different ones while the store is out of order: then a process goes by its own memory, since of the deliveries of a
    prediction Replicate repeats the last one only, for about a minute. For the same reason `on_event` goes on when
    Replicate has hung up.

    Args:
        secrets: of the account, `whsec_…` as `webhooks.default.secret.get` gives them. More than one while they are
            exchanged, or for several accounts.
        on_event: the host's; what it raises is answered 500, for Replicate to try again. None to only verify.
        timeout: seconds for `on_event`.
        ledger: its store is where other processes look, too; it has an entry for each id then. None where there are
            none: memory of this process is enough.
        now: seconds since the epoch.

    Raises:
        ValueError: names the option and what is wrong with it, never a secret.
    """

    def __init__(
        self,
        *,
        secrets: Sequence[str],
        on_event: OnWebhook | None,
        timeout: float,
        ledger: Ledger | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        macs = None if isinstance(secrets, str) else [_mac(secret) for secret in secrets]
        del secrets  # an error's traceback shows locals
        if macs is None:
            raise ValueError("webhook_secrets: a list of strings, not one string")
        if not macs:
            raise ValueError("webhook_secrets: must list one at least")
        # Keyed once and copied for each delivery: the keys are nowhere else.
        self._macs = [mac for mac in macs if mac is not None]
        if len(self._macs) < len(macs):
            raise ValueError(f"webhook_secrets: each must be 'whsec_' and base64 of {_MIN_KEY} bytes or more")
        if not timeout > 0:
            raise ValueError("webhook_timeout: must be more than 0 seconds")
        self._on_event, self._timeout = on_event, timeout
        self._ledger, self._now = ledger, now
        self._unverified = 0
        self._taken: OrderedDict[str, float] = OrderedDict()
        # Locks know one event loop each; anyio before 4.10 tells variables apart by name alone.
        self._turns: RunVar[WeakValueDictionary[str, anyio.Lock]] = RunVar(f"replicate_proxy_mw.webhooks.{uuid4()}")

    async def answer(
        self, *, method: str, headers: Iterable[tuple[bytes, bytes]], body: AsyncIterable[bytes]
    ) -> tuple[ProxyResponse, Mapping[str, Any]]:
        """204 and the prediction, once the host has taken it. `headers` are all that came, in lower case; nothing of
        `body` is read if they tell enough.

        Raises:
            MethodNotAllowed: not a POST.
            WebhookUnsigned, BadRequest: a header is missing, comes twice or is malformed; for the latter also, the body
                does not arrive in time, or is no JSON object.
            WebhookUnverified: no signature is right, or the delivery's time is not now.
            BodyTooLarge, Overloaded: more than is read of one, or of all at a time.
            WebhookReplayed: taken already.
            WebhookFailed: by the host.
        """
        headers = tuple(pair for pair in headers if pair[0] in _READ)  # credentials are not to be among the locals
        if method != "POST":
            raise MethodNotAllowed("Webhooks are delivered by POST.", headers=((b"allow", b"POST"),))
        delivery = self._announced(headers)
        macs = [mac.copy() for mac in self._macs]
        for mac in macs:
            mac.update(b"%b.%b." % (delivery.id, delivery.timestamp))
        event = _verified(delivery, macs, await self._read(body, macs))
        if isinstance(event, ProxyError):
            raise event
        await self._hand_over(event)
        return ProxyResponse(status=204, headers=(), body=Chunks([])), event.prediction

    def _announced(self, headers: HeaderList) -> _Delivery:
        """What the headers tell, which is not proved yet."""
        id, timestamp, signatures = (_one(headers, name) for name in _READ[:3])
        if not _ID.fullmatch(id):
            raise BadRequest("The webhook-id header is malformed.")
        if not _TIMESTAMP.fullmatch(timestamp):
            raise BadRequest("The webhook-timestamp header is not a number of seconds.")
        if len(signatures) > _MAX_SIGNATURES:
            raise BadRequest("The webhook-signature header is too long.")
        if abs(self._now() - int(timestamp)) > TOLERANCE:
            raise WebhookUnverified("The time of this delivery is too far from now.")
        # Others may be of a later version, and are not for us to judge.
        known = [signature for signature in signatures.split(b" ") if _SIGNATURE.fullmatch(signature)]
        if not known:
            raise WebhookUnverified()
        if (length(headers) or 0) > MAX_SIZE:
            raise BodyTooLarge()
        return _Delivery(id, timestamp, known)

    async def _read(self, body: AsyncIterable[bytes], macs: Sequence[hmac.HMAC]) -> io.BytesIO:
        """`body`, which `macs` have seen too, as it came: at once, it would hold up the event loop."""
        read = io.BytesIO()
        try:
            with anyio.move_on_after(READ_TIMEOUT) as limit:
                async for chunk in body:
                    self._unverified += read.write(chunk)
                    for mac in macs:
                        mac.update(chunk)
                    del chunk
                    if read.tell() > MAX_SIZE:
                        raise BodyTooLarge()
                    if self._unverified > MAX_UNVERIFIED:
                        raise Overloaded("Too many deliveries arrive at a time; try again.")
        finally:
            self._unverified -= read.tell()
        if limit.cancelled_caught:
            raise BadRequest("The body did not arrive in time.")
        return read

    async def _hand_over(self, event: WebhookEvent) -> None:
        key = f"webhook:{hashlib.sha256(event.id.encode()).hexdigest()}"
        turns = self._turns.get(None)
        if turns is None:
            turns = WeakValueDictionary()
            self._turns.set(turns)
        turn = turns.setdefault(key, anyio.Lock())
        async with turn:
            if await self._is_taken(key):
                raise WebhookReplayed()
            # Even if nobody waits for the answer any more: not every delivery comes again.
            with anyio.CancelScope(shield=True):
                await self._call(event)
                await self._remember(key)

    async def _is_taken(self, key: str) -> bool:
        if self._taken.get(key, 0.0) >= self._now():
            return True
        if self._ledger is None:
            return False
        try:
            return key in await self._ledger.call(lambda store: store.get([key]))
        except StoreFailed:
            return False

    async def _call(self, event: WebhookEvent) -> None:
        on_event = self._on_event
        if on_event is None:
            return
        try:
            await ask(lambda: on_event(event), seconds=self._timeout)
            return
        except HostFailed as error:
            failure = error.name
        except ProxyError as error:
            failure = type(error).__name__
        logger.error("webhook callback failed: %s", failure)
        raise WebhookFailed()

    async def _remember(self, key: str) -> None:
        # In the order of their time, unless the clock was set back: then some stay longer.
        now = self._now()
        while self._taken and next(iter(self._taken.values())) < now:
            self._taken.popitem(last=False)
        if len(self._taken) >= MAX_REMEMBERED:
            self._taken.popitem(last=False)
        self._taken[key] = now + 2 * TOLERANCE
        if self._ledger is not None:
            with contextlib.suppress(StoreFailed):  # the host has it, and this process knows
                await self._ledger.call(lambda store: store.put(key, StoredPrediction(tenant=None)))


@dataclass(frozen=True, slots=True)
class _Delivery:
    id: bytes
    timestamp: bytes
    signatures: Sequence[bytes] = field(repr=False)


def _mac(secret: str) -> hmac.HMAC | None:
    """What signs with `secret`, None if that is none. No errors: the traceback of one would show it."""
    found = _SECRET.fullmatch(secret) if isinstance(secret, str) else None
    if found is None:
        return None
    try:
        key = base64.b64decode(found[1] + "=" * (-len(found[1]) % 4))
    except binascii.Error:
        return None
    return hmac.new(key, digestmod="sha256") if len(key) >= _MIN_KEY else None


def _one(headers: HeaderList, name: bytes) -> bytes:
    values = [value for key, value in headers if key == name]
    if not values:
        raise WebhookUnsigned()
    if len(values) > 1:
        raise BadRequest(f"There is more than one {name.decode()} header.")
    return values[0]


def _verified(delivery: _Delivery, macs: Sequence[hmac.HMAC], read: io.BytesIO) -> WebhookEvent | ProxyError:
    """Errors are returned: the traceback of one that is raised would show the body."""
    right = False
    for mac in macs:
        # As text, since more than one text stands for the same bytes; and all, so that no time tells which it was.
        expected = b"v1," + base64.b64encode(mac.digest())
        for signature in delivery.signatures:
            right |= hmac.compare_digest(expected, signature)
    if not right:
        return WebhookUnverified()
    body = read.getvalue()
    try:
        prediction = json.loads(body.decode())
    except (ValueError, RecursionError):
        prediction = None
    if not isinstance(prediction, dict):
        return BadRequest("The body is not a JSON object.")
    return WebhookEvent(id=delivery.id.decode(), sent_at=float(delivery.timestamp), prediction=prediction, body=body)
