"""Catalogue reads are answered again for a while as Replicate has answered them (RFC 9111, decided by `hishel`)."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from urllib.parse import unquote

import hishel

from .. import portkey
from ..exchange import Chunks, Forward, Layer, ProxyRequest, ProxyResponse
from ..json_bodies import held
from ..store.responses import Responses, texts, to_store
from ..store.responses_memory import MemoryResponses
from ..telemetry.names import CACHE_STATUS

READS = frozenset(
    (
        *("collections.get", "collections.list", "deployments.get", "deployments.list", "hardware.list", "search"),
        *("models.examples.list", "models.get", "models.list", "models.readme.get"),
        *("models.versions.get", "models.versions.list"),
    )
)

# What goes up and `Vary` may name. Cookies are told apart by never going up.
VARIANT = frozenset((b"accept", b"accept-encoding", b"accept-language", b"origin"))
TOLD_APART = frozenset((*(name.decode() for name in VARIANT), "cookie"))

# Seconds for which a stale answer is kept beyond `lifetime`: a 304 may still confirm it.
CONFIRMABLE = 3600.0

_OPTIONS = hishel.CacheOptions(shared=False, supported_methods=["GET"], allow_stale=False)


def cache_catalogue(
    *,
    lifetime: float = 300.0,
    storage: hishel.AsyncBaseStorage | None = None,
    max_size: int = 64 << 20,
    timeout: float = 0.25,
) -> Layer:
    """Answer GETs of models, their versions, examples and READMEs, of collections, hardware, deployments and searches
    from earlier answers of the same tenant and token, `x-portkey-cache-namespace`, and headers that go up, but for
    `user-agent`.

    Only whole answers of status 200 and at most 8 MiB are kept; such go out when they are whole. Their `Cache-Control`
    and `Expires` are obeyed as by a private cache, and what is stale and has a validator is confirmed at Replicate. A
    write to a model or deployment through the proxy ends all that the same tenant and token have of it, and of its
    list; searches, collections, and other tenants and tokens see it when the lifetime is over. So may those of another
    process: what that one had asked for before the write, and got afterwards, is stored all the same. Requests with
    Range, Cache-Control or a condition pass by.

    `x-portkey-cache-status` tells HIT (also if Replicate confirmed it), MISS, REFRESH (the caller sent
    `x-portkey-cache-force-refresh: true`: the answer is new, and replaces the old one), or DISABLED for all other
    requests. A HIT has Replicate's headers as they came, and `age`.

    Args:
        lifetime: seconds for an answer that states none, as none of Replicate's do. Five minutes: models change by the
            day, and those who release one can ask for a refresh.
        storage: by default the memory of this process. `hishel.AsyncRedisStorage(client)` shares answers between
            processes; the client stays the host's to close, has to allow 25 connections, and must not have
            `decode_responses` set.
        max_size: bytes of that memory, see `MemoryResponses`; it says nothing of another storage.
        timeout: seconds for each call of the storage. If it fails or takes longer, a read is a MISS and its answer is
            not kept; a write goes through, and what it should have ended may be answered until its time is over. A
            quarter of a second: less than Replicate takes, and a hundred times what Redis does.

    Raises:
        ValueError: an option is out of range; the text names it.
    """
    if not 1 <= lifetime <= 365 * 86400:
        raise ValueError("lifetime: must be from 1 second to a year")
    responses = Responses(MemoryResponses(max_size=max_size) if storage is None else storage, timeout=timeout)
    cache = _Cache(responses, int(lifetime))

    def layer(forward: Forward) -> Forward:
        async def cached(request: ProxyRequest) -> ProxyResponse:
            if _is_read(request):
                return await cache.read(request, forward)
            if _is_write(request):
                return await cache.write(request, forward)
            return await forward(request)

        return cached

    return layer


def _is_read(request: ProxyRequest) -> bool:
    # A layer may look something up for a request of another kind, of which a status would say nothing.
    if request.operation not in READS or not request.method == request.scope["method"] == "GET":
        return False
    conditional = any(name == b"range" or name.startswith(b"if-") for name, _ in request.headers)
    return not conditional and all(name != b"cache-control" for name, _ in request.scope["headers"])


def _is_write(request: ProxyRequest) -> bool:
    """Whether it may change the catalogue. What the API does not have yet may."""
    creates = request.route.details is not None and request.route.details.creates
    safe = request.method in ("GET", "HEAD", "OPTIONS", "QUERY")
    return not safe and not creates and _resource(request)[:1] in (["models"], ["deployments"])


def _resource(request: ProxyRequest) -> list[str]:
    """The model or deployment that a target is about or lies below, or else the target, however they are spelled."""
    if request.operation == "search":
        return [request.target]
    segments = unquote(request.target.partition("?")[0]).lower().split("/")
    return [segment for segment in segments if segment][:3]


def _key(request: ProxyRequest, resource: Sequence[str]) -> str:
    return sha256("\n".join((request.key.identity(), *resource)).encode("utf-8", "surrogatepass")).hexdigest()


class _Cache:
    def __init__(self, responses: Responses, lifetime: int) -> None:
        self._responses, self._lifetime = responses, lifetime

    async def read(self, request: ProxyRequest, forward: Forward) -> ProxyResponse:
        asked = portkey.caching(request.portkey.config, request.scope["headers"])
        key, wanted = _key(request, _resource(request)), _wanted(request, asked.namespace)
        looked = await self._responses.look(key, wanted)
        found = looked.found if looked and not asked.force_refresh else None
        if asked.force_refresh:
            self._responses.outdate(key)
        state: hishel.AnyState = hishel.IdleClient(_OPTIONS).next(wanted, [found.entry] if found else [])
        while isinstance(state, hishel.CacheMiss | hishel.NeedRevalidation):
            since, generation = time.time(), self._responses.generation(key)
            response = await forward(_conditional(request, state.request))
            pairs = texts(response)
            if found and response.status == 304 and isinstance(state, hishel.NeedRevalidation):
                await held(response)  # so that the connection can be used again
                await response.aclose()
                found = found.freshened(pairs)
                pairs = found.pairs
            headers = to_store(pairs, since, self._lifetime)
            state = state.next(hishel.Response(response.status, headers))
            if isinstance(state, hishel.InvalidateEntries):
                state = state.next()  # they are among `looked.old`
            if isinstance(state, hishel.NeedToBeUpdated):
                [confirmed] = state.updating_entries
                await self._responses.update(confirmed)
                state = state.next()
        if found and isinstance(state, hishel.FromCache):
            return _told(request, found.again(state.entry.response.headers), "HIT")
        # What Replicate has answered since counts, even where it cannot be kept; a passing failure does not.
        if looked and response.status < 500 and response.status != 429:
            response, entry = await self._entry(wanted, state, response)
            ttl = self._lifetime + CONFIRMABLE
            await self._responses.replace(key, looked, entry, generation=generation, ttl=ttl)
        return _told(request, response, "REFRESH" if asked.force_refresh else "MISS")

    async def _entry(
        self, wanted: hishel.Request, state: hishel.AnyState, response: ProxyResponse
    ) -> tuple[ProxyResponse, tuple[hishel.Request, hishel.Response] | None]:
        """What is kept of `response`, if anything is."""
        if not isinstance(state, hishel.StoreAndUse) or response.status != 200:
            return response, None
        if not _is_told_apart(state.response.headers):
            return response, None
        response, body, whole = await held(response, max_size=self._responses.max_body)
        return response, (wanted, replace(state.response, stream=aiter(Chunks([body])))) if whole else None

    async def write(self, request: ProxyRequest, forward: Forward) -> ProxyResponse:
        response = None
        try:
            response = await forward(request)
            return response
        finally:
            # What failed on the way, or whose caller has left, may have been done.
            if response is None or not 400 <= response.status < 500:
                resource = _resource(request)
                for key in {_key(request, resource), _key(request, resource[:1])}:
                    await self._responses.end(key)


def _wanted(request: ProxyRequest, namespace: str) -> hishel.Request:
    """All that an answer is found by. No more: it is stored with it."""
    headers: dict[str, list[str]] = {"x-portkey-cache-namespace": [namespace]}
    others = []
    for name, value in request.headers:
        if name in VARIANT:
            headers.setdefault(name.decode(), []).append(value.decode("latin-1"))
        elif name != b"user-agent":
            others.append((name.decode("latin-1"), value.decode("latin-1")))
    if others:
        # A host may have any header go up: what it says is not stored.
        headers["x-portkey-cache-others"] = [sha256(json.dumps(others).encode()).hexdigest()]
    return hishel.Request("GET", request.target, hishel.Headers(headers))


def _conditional(request: ProxyRequest, wanted: hishel.Request) -> ProxyRequest:
    conditions = [
        (name.encode(), value.encode("latin-1")) for name, value in wanted.headers.items() if name.startswith("if-")
    ]
    return replace(request, headers=(*request.headers, *conditions)) if conditions else request


def _is_told_apart(headers: hishel.Headers) -> bool:
    return {name.strip().lower() for name in headers.get("vary", "cookie").split(",")} <= TOLD_APART


def _told(request: ProxyRequest, response: ProxyResponse, word: str) -> ProxyResponse:
    request.notes[CACHE_STATUS] = word
    return replace(response, headers=(*response.headers, (b"x-portkey-cache-status", word.encode())))
