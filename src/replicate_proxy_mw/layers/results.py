"""Paid results, paid once: what an identical create has made a short while ago is answered again."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar

import anyio

from .. import creates, headers, portkey, rereading
from ..errors import ProxyError, UpstreamAborted
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse
from ..host_calls import HostFailed, ask, failure_of
from ..json_bodies import asking_for_plain, held, plain_of
from ..portkey import Caching
from ..store.ledger import PAID_TIMEOUT
from ..store.once import MemoryOnceStore, OnceStore
from ..telemetry import names, prediction
from ..telemetry.request import current

T = TypeVar("T")

logger = logging.getLogger("replicate_proxy_mw")

# Seconds from its end until Replicate deletes input and output of a prediction.
OUTPUT_LIFETIME = 3600.0

# Seconds of these that are left to whoever gets a result: the files in it are still to be fetched.
MARGIN = 60.0

# Seconds that Replicate has to show the earlier prediction; then there is a new one.
READ_TIMEOUT = 5.0


def reuse_results(
    *,
    store: OnceStore | None = None,
    max_age: float = 3600.0,
    store_timeout: float = 0.5,
    now: Callable[[], float] = time.time,
) -> Layer:
    """Answer a create of a prediction with what an identical one has made, where the caller asks for that.

    A caller asks with `x-portkey-config: {"cache": {"mode": "simple", "max_age": 600}}`. Identical are creates of the
    same tenant and token, of one operation and path, with the same JSON whatever the order of its members and its
    white space, one `x-portkey-cache-namespace`, and the same of the headers that `forward_headers` lists. The earlier
    prediction is read from Replicate, and answered with 201 and `x-portkey-cache-status: HIT`, if it has succeeded and
    its output lives for a minute more; a file in it is a URL, also where a create that waits would have had it inline.
    Else the create goes up, and what it makes is answered from then on: `MISS`, or `REFRESH` where
    `x-portkey-cache-force-refresh: true` asks for it. While the earlier one is under way, what else is created is paid
    for, too, and the earlier one is answered once it has succeeded.

    Trainings, creates with a webhook or `stream: true`, targets with a query, and bodies that are not JSON, that have
    a name twice or are longer than 1 MiB pass (`DISABLED`). Identical creates at the same time are all sent.

    The store has a digest of each create, the id of what it made and when. While it is out of order every create goes
    up, and is paid as it would be without the layer.

    List it below `idempotency_keys`: above it, a key that was used with another body is answered with a result in the
    place of 422.

    Args:
        store: what is known of creates: by default in the memory of this process, for several `RedisOnceStore`.
        max_age: seconds for which a result may be used, at most; callers may ask for less. By default an hour, after
            which Replicate has deleted most.
        store_timeout: seconds for each call of the store; an answer that is paid waits for 0.4 at most. Half a second:
            a model runs for longer.
        now: seconds since the epoch, as Replicate's times have them.

    Raises:
        ValueError: `max_age` or `store_timeout` is no number of seconds above 0.
    """
    for option, seconds in (("max_age", max_age), ("store_timeout", store_timeout)):
        if not 0 < seconds < math.inf:
            raise ValueError(f"{option}: must be more than 0 seconds, and finite")
    results = _Results(MemoryOnceStore() if store is None else store, max_age, store_timeout, now)

    def layer(forward: Forward) -> Forward:
        async def reusing(request: ProxyRequest) -> ProxyResponse:
            operation = request.route.details
            if operation is None or operation.creates != "prediction":
                return await forward(request)
            asked = portkey.caching(request.portkey.config, request.scope["headers"])
            if not asked.results or "?" in request.target:
                return await forward(request)
            request, body, whole = await held(request, max_size=creates.MAX_SIZE)
            key = _key(request, body, asked.namespace) if whole else None
            if key is None:
                return await forward(request)
            return await results.answer(forward, request, key, asked)

        return reusing

    return layer


def _key(request: ProxyRequest, body: bytes, namespace: str) -> str | None:
    """What is the same for identical creates; None for one that has to be sent."""
    try:
        content = creates.content_of(request.headers, body)
        if not isinstance(content, dict) or content.get("stream") not in (None, False):
            return None
        if any(name.startswith("webhook") for name in content):
            return None
        own = request.key.identity(), request.operation or "", request.target
        # What a host has go up beside what always does may well mean something to Replicate.
        listed = [part for pair in request.headers if pair[0] not in headers.UP for part in pair]
        return creates.digest("result", *own, creates.canonical(content), namespace, *listed)
    except ValueError:
        return None


class _Results:
    """What creates have made, as far as it may be answered again."""

    def __init__(self, store: OnceStore, max_age: float, timeout: float, now: Callable[[], float]) -> None:
        self._store, self._max_age, self._timeout, self._now = store, max_age, timeout, now

    async def answer(self, forward: Forward, request: ProxyRequest, key: str, asked: Caching) -> ProxyResponse:
        earlier, is_under_way = None, False
        if not asked.force_refresh:
            earlier, is_under_way = await self._earlier(forward, request, key, asked)
        word = "HIT" if earlier is not None else "REFRESH" if asked.force_refresh else "MISS"
        request.notes[names.CACHE_STATUS] = word
        if earlier is None:
            earlier = await self._created(forward, request, key, is_kept=not is_under_way)
        return replace(earlier, headers=(*earlier.headers, (b"x-portkey-cache-status", word.encode())))

    async def _earlier(
        self, forward: Forward, request: ProxyRequest, key: str, asked: Caching
    ) -> tuple[ProxyResponse | None, bool]:
        """The earlier result; and where there is none, whether it is still under way."""
        known = await self._ask(lambda: self._store.result(key))
        if known is None or known.age > min(self._max_age, asked.max_age or math.inf):
            return None, False
        found, is_under_way = None, False
        with anyio.move_on_after(READ_TIMEOUT):
            found, is_under_way = await self._read(forward, request, known.id)
        if found is None and (span := current()) is not None:
            # The story of this request is that of what it creates.
            span.sighting = None
        return found, is_under_way

    async def _read(self, forward: Forward, request: ProxyRequest, id: str) -> tuple[ProxyResponse | None, bool]:
        try:
            response, body, whole = await rereading.read_again(forward, request, "prediction", id)
        except (ProxyError, UpstreamAborted):
            return None, False
        plain = plain_of(response, body) if whole and response.status == 200 else None
        if plain is not None and self._lives(plain, id):
            return replace(response, status=201), False
        await response.aclose()  # now, so that the attempt is over before that of the create
        seen = None if plain is None else prediction.read(plain)
        return None, seen is not None and seen.id == id and not seen.is_final

    async def _created(self, forward: Forward, request: ProxyRequest, key: str, *, is_kept: bool) -> ProxyResponse:
        """What is created, which is the result from now on if it `is_kept`: of creates that come faster than the model
        runs, the first that succeeds is."""
        if not is_kept:
            return await forward(request)
        response = await forward(asking_for_plain(request))
        # A create that is answered again is not a new result (`layers.idempotency`).
        if response.is_event_stream or any(name == b"idempotency-replayed" for name, _ in response.headers):
            return response
        response, body, whole = await held(response)
        id = creates.created_id(response, body, whole=whole)
        if id is not None:
            await self._ask(lambda: self._store.put_result(key, id, self._max_age), paid=True)
        return response

    def _lives(self, body: bytes, id: str) -> bool:
        """Whether it is the prediction `id`, a success with its output, for a while yet."""
        try:
            content = json.loads(body)
        except (ValueError, RecursionError):
            return False
        seen = prediction.of(content) if isinstance(content, dict) else None
        return (
            seen is not None
            and (seen.id, seen.status) == (id, "succeeded")
            and seen.output is not None
            and content.get("data_removed") is not True
            and seen.completed_at is not None
            and self._now() < seen.completed_at + OUTPUT_LIFETIME - MARGIN
        )

    async def _ask(self, call: Callable[[], Awaitable[T]], *, paid: bool = False) -> T | None:
        """What `call` returns of the store, None if it is out of order."""
        seconds = min(self._timeout, PAID_TIMEOUT) if paid else self._timeout
        try:
            return await ask(call, seconds=seconds, shield=paid)
        except (HostFailed, ProxyError) as error:
            logger.error("the store of results failed: %s", failure_of(error))
            return None
