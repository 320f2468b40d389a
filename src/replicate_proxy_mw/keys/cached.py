"""Remembering what a resolver answered, for hosts whose keys are behind a network."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from hashlib import sha256
from typing import Any, NamedTuple
from uuid import uuid4

import anyio
from anyio.lowlevel import RunVar

from ..errors import PermissionDenied, ProxyError, ResolverFailed
from .contract import LATER, KeyRequest, KeyResolver, Later, ReplicateKey

logger = logging.getLogger("replicate_proxy_mw")

_FIELDS = frozenset(one.name for one in fields(KeyRequest))

# JSON tells where one value ends and another begins, and None from an empty one.
_json = json.JSONEncoder(ensure_ascii=False).encode

# So many accounts and configs one caller may go through; a caller who varies more is asked for again.
MAX_OF_ONE = 16

# Seconds between two lines in the log that say the same of one outage.
_QUIET = 60.0


class NotVaried(Exception):
    """A resolver in a `CachedKeyResolver` looked at a field that the cache does not tell answers apart by.

    No `AttributeError`: `getattr` with a default and `hasattr` would swallow it.
    """

    def __init__(self, field: str) -> None:
        cure = "ask what needs it around the cache" if field == "scope" else "name it in vary of CachedKeyResolver"
        super().__init__(f"KeyRequest.{field} is not shown to a cached resolver: {cure}")
        self.field = field


class CachedKeyResolver:
    """Asks `inner` once for many requests that are alike.

    `inner` sees only the fields named in `vary`: each other raises `NotVaried`, and so 503, since an answer that
    depends on it would be given to requests for which it is wrong. What has to look at more goes around the cache.

    Requests that are alike and come at the same time, in one event loop, ask once. If that fails, all of them fail; if
    its caller leaves, the next asks. Keys are kept as SHA-256 digests.

    Args:
        inner: the resolver to ask.
        ttl: seconds that a key is remembered for, from when it was asked for, and so the longest that one who is
            revoked still gets in. Half a minute is one question for hundreds of polls.
        negative_ttl: the same for an unknown caller and for `PermissionDenied`. Short, since someone who has just been
            let in tries again. Nothing else is remembered: no other exception, and nothing that is no key.
        stale_on_error: seconds beyond `ttl` that a key is still used if `inner` fails or hangs. None by default: what
            is revoked in an outage stays usable so much longer.
        timeout: seconds for `inner` to answer: below `resolver_timeout`, so that there is time left for a stale key, or
            to ask again after a caller has left.
        max_entries: how many callers' keys are remembered, and how many refusals; the one longest unused is forgotten
            for one more. They are counted apart, so that unknown keys push out no known one. 10,000 of each take about
            12 MB. Of one caller's key no more than 16 requests that differ are remembered.
        vary: fields of `KeyRequest`, `api_key` among them, but not `scope`: nothing tells two states of a host apart.
            By default what says who calls and with which account, not what for: one entry serves all operations.
        now: seconds that only grow.

    Raises:
        ValueError: names the argument.
    """

    def __init__(
        self,
        inner: KeyResolver,
        *,
        ttl: float = 30.0,
        negative_ttl: float = 5.0,
        stale_on_error: float = 0.0,
        timeout: float = 1.0,
        max_entries: int = 10_000,
        vary: Iterable[str] = ("api_key", "caller_token", "provider", "virtual_key", "config"),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        for name, value in (("ttl", ttl), ("negative_ttl", negative_ttl), ("stale_on_error", stale_on_error)):
            if not value >= 0:
                raise ValueError(f"{name}: must not be below 0 seconds")
        if not timeout > 0:
            raise ValueError("timeout: must be more than 0 seconds")
        if max_entries < 1:
            raise ValueError("max_entries: must be at least 1")
        self._vary = tuple(vary)
        if "scope" in self._vary:
            raise ValueError("vary: nothing tells two states of a host apart, so that scope cannot be in it")
        if "api_key" not in self._vary or not _FIELDS.issuperset(self._vary):
            raise ValueError("vary: has to have api_key, and nothing that is no field of KeyRequest")
        self._inner, self._timeout, self._now = inner, timeout, now
        self._ttl, self._negative_ttl, self._stale_on_error = ttl, negative_ttl, stale_on_error
        self._known, self._refused = _Entries(max_entries), _Entries(max_entries)
        self._lock = threading.Lock()
        self._generation = 0
        # Events wake only those of their own event loop; anyio before 4.10 tells variables apart by name alone.
        self._flights: RunVar[dict[_Digest, _Flight]] = RunVar(f"replicate_proxy_mw.key_lookups.{uuid4()}")
        self._told: set[str] = set()
        self._quiet_until = float("-inf")

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | str | None:
        if not request.api_key:  # whom the host knows by other means, which nothing here tells apart
            return await self._inner(_Shown.of(request, self._vary))
        digest = self._digest(request)
        flights = self._flights.get(None)
        if flights is None:
            flights = {}
            self._flights.set(flights)
        while True:
            entry = self._remembered(digest)
            if entry is not None:
                return _give(entry.answer)
            flight = flights.get(digest)
            if flight is None or flight.generation != self._generation:
                flight = flights[digest] = _Flight(self._generation)
                try:
                    return await self._ask(flight, digest, request)
                finally:
                    if flights.get(digest) is flight:
                        del flights[digest]
                    flight.over.set()
            await flight.over.wait()
            if flight.landed:
                return _give(flight.answer)

    def _at_once(self, request: KeyRequest) -> ReplicateKey | str | Later | None:
        entry = self._remembered(self._digest(request)) if request.api_key else None
        return LATER if entry is None else _give(entry.answer)

    def _digest(self, request: KeyRequest) -> _Digest:
        return _Digest(_digest(request.api_key), _digest([_plain(getattr(request, name)) for name in self._vary]))

    def invalidate(self, api_key: str | None = None) -> None:
        """Forget everything, or what is remembered of one caller's key. It may be called from any thread.

        Lookups under way still answer those who asked before, and are not remembered; who asks from now on does not
        wait for them.
        """
        caller = None if api_key is None else _digest(api_key)
        with self._lock:
            self._generation += 1
            for entries in (self._known, self._refused):
                entries.forget(caller)

    def _remembered(self, digest: _Digest) -> _Entry | None:
        now = self._now()
        with self._lock:
            for entries, seconds in ((self._known, self._ttl), (self._refused, self._negative_ttl)):
                entry = entries.get(digest)
                if entry is not None and now < entry.asked + seconds:
                    return entry
        return None

    async def _ask(self, flight: _Flight, digest: _Digest, request: KeyRequest) -> ReplicateKey | str | None:
        """Ask `inner`, for all who wait for `flight` too. Cancelled, it does not land, and the next of them asks."""
        asked = self._now()
        try:
            with anyio.fail_after(self._timeout):
                answer = await self._inner(_Shown.of(request, self._vary))
        except Exception as error:
            refusal = error.anew() if isinstance(error, ProxyError) else ResolverFailed()
            if isinstance(error, PermissionDenied):
                self._remember(flight, digest, _Entry(refusal, asked))
            if isinstance(error, NotVaried):
                self._tell(error.field)
            # What is below 500 was said of the caller, on purpose: the resolver is in order.
            stale = self._stale(digest, error) if refusal.status >= 500 else None
            flight.land(stale.answer if stale else refusal)
            if stale is None:
                raise
            return _give(stale.answer)
        if isinstance(answer, str):
            with suppress(ValueError):  # what is no token is refused where it arrives
                answer = ReplicateKey(answer)
        if answer is None or isinstance(answer, ReplicateKey):
            self._remember(flight, digest, _Entry(answer, asked))
        flight.land(answer)
        return answer

    def _remember(self, flight: _Flight, digest: _Digest, entry: _Entry) -> None:
        with self._lock:
            if flight.generation != self._generation:
                return
            # From both: an outage must not bring back who is refused now.
            self._known.drop(digest)
            self._refused.drop(digest)
            (self._known if isinstance(entry.answer, ReplicateKey) else self._refused).put(digest, entry)

    def _tell(self, field: str) -> None:
        """Say once which field it was: `resolve` logs the class of an exception alone."""
        if field not in self._told:
            self._told.add(field)
            logger.error("a cached key resolver looked at KeyRequest.%s, which its vary does not name", field)

    def _stale(self, digest: _Digest, error: Exception) -> _Entry | None:
        """What to use in spite of `error`. The log gets its class name alone, and not with every request."""
        now = self._now()
        with self._lock:
            entry = self._known.get(digest)
            if entry is None or now >= entry.asked + self._ttl + self._stale_on_error:
                return None
            quiet = now < self._quiet_until
            self._quiet_until = self._quiet_until if quiet else now + _QUIET
        if not quiet:
            logger.warning("key resolver failed: %s; using what it answered before", type(error).__name__)
        return entry


class _Shown(KeyRequest):
    """A request of which only some fields can be read."""

    __slots__ = ()

    @classmethod
    def of(cls, request: KeyRequest, names: Iterable[str]) -> _Shown:
        shown = object.__new__(cls)
        for name in names:
            object.__setattr__(shown, name, getattr(request, name))
        return shown

    def __getattr__(self, name: str) -> Any:
        if name not in _FIELDS:
            raise AttributeError(f"KeyRequest has no {name!r}", name=name)
        raise NotVaried(name)

    def __repr__(self) -> str:
        shown = []
        for one in fields(self):
            with suppress(NotVaried):
                shown += [f"{one.name}={getattr(self, one.name)!r}"] if one.repr else []
        return f"KeyRequest({', '.join(shown)})"


class _Digest(NamedTuple):
    """What tells requests apart: whose they are, and all that is looked at."""

    caller: bytes
    request: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    answer: ReplicateKey | ProxyError | None
    asked: float


class _Entries:
    """Answers by caller, so that nobody who varies a request pushes out others."""

    def __init__(self, max_callers: int) -> None:
        self._max_callers = max_callers
        self._by_caller: OrderedDict[bytes, OrderedDict[bytes, _Entry]] = OrderedDict()

    def get(self, digest: _Digest) -> _Entry | None:
        entries = self._by_caller.get(digest.caller)
        if entries is None or digest.request not in entries:
            return None
        self._by_caller.move_to_end(digest.caller)
        entries.move_to_end(digest.request)
        return entries[digest.request]

    def put(self, digest: _Digest, entry: _Entry) -> None:
        entries = self._by_caller.setdefault(digest.caller, OrderedDict())
        self._by_caller.move_to_end(digest.caller)
        entries[digest.request] = entry
        if len(entries) > MAX_OF_ONE:
            entries.popitem(last=False)
        if len(self._by_caller) > self._max_callers:
            self._by_caller.popitem(last=False)

    def drop(self, digest: _Digest) -> None:
        entries = self._by_caller.get(digest.caller)
        if entries is not None and digest.request in entries:
            del entries[digest.request]
            if not entries:
                del self._by_caller[digest.caller]

    def forget(self, caller: bytes | None) -> None:
        """Everything, if `caller` is None."""
        if caller is None:
            self._by_caller.clear()
        else:
            self._by_caller.pop(caller, None)


class _Flight:
    """One question that is under way, and who waits for its answer."""

    __slots__ = ("answer", "generation", "landed", "over")

    def __init__(self, generation: int) -> None:
        self.generation, self.over = generation, anyio.Event()
        self.landed = False
        self.answer: ReplicateKey | ProxyError | str | None = None

    def land(self, answer: ReplicateKey | ProxyError | str | None) -> None:
        self.landed, self.answer = True, answer


def _give(answer: ReplicateKey | ProxyError | str | None) -> ReplicateKey | str | None:
    if isinstance(answer, ProxyError):
        raise answer.anew()
    return answer


def _plain(value: object) -> object:
    return sorted(value.items()) if isinstance(value, Mapping) else value


def _digest(value: object) -> bytes:
    return sha256(_json(value).encode("utf-8", "surrogatepass")).digest()
