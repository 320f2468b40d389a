"""The resolvers that need nothing but their arguments."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping

from .accounts import choose
from .contract import Answer, KeyRequest, KeyResolver, Later, ReplicateKey, at_once, digest

# The form of Replicate's tokens, and that of the old ones.
_REPLICATE_TOKEN = re.compile(r"r8_[A-Za-z0-9_]{8,128}|[0-9a-f]{40}")


# One account, or several by slug.
Given = ReplicateKey | str | Mapping[str, ReplicateKey | str]


class StaticKeyResolver:
    """One Replicate token for everyone who has one of the given keys.

    Args:
        key: the token, or a `ReplicateKey` with a tenant.
        api_keys: the keys that callers may send; at least one, since without any the proxy would be open.

    Raises:
        ValueError: there is no key, or an empty one; or what `ReplicateKey` raises.
    """

    def __init__(self, key: ReplicateKey | str, *, api_keys: Iterable[str]) -> None:
        keys, problem = _by_digest(dict.fromkeys(api_keys, key) if not isinstance(api_keys, str) else {})
        del key, api_keys  # exceptions show the locals of their frames
        if problem:
            raise ValueError(problem)
        self._digests = tuple(keys)
        self._key = next(key for key in keys.values() if isinstance(key, ReplicateKey))

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        return self._at_once(request)

    def _at_once(self, request: KeyRequest) -> ReplicateKey | None:
        asked = digest(request.api_key)
        # Every digest is compared, so that the time taken does not tell which one came close.
        found = [hmac.compare_digest(asked, known) for known in self._digests]
        return self._key if any(found) else None


class MappingKeyResolver:
    """Each caller's key to its own Replicate token: `{"pk-team-a": ReplicateKey("r8_…", tenant="team-a")}`.

    Only digests of the keys are kept.

    Args:
        keys: at least one. Instead of a token there may be several by slug, as in Portkey's model catalog, of which the
            first is the default: `{"pk-team-a": {"main": "r8_…", "video": "r8_…"}}`. A slug that is not there is
            refused (403); a key with one token takes any.
        caller_tokens: whether a known caller that says `x-portkey-provider: replicate` may bring its own token, which
            is then used for its tenant and under its policy; what is none of Replicate's counts as not brought. Not by
            default: the house's tokens are what it knows and pays for.

    Raises:
        ValueError: there is no key, or an empty one; no account for a key, or one whose slug is empty or begins with
            `@`; or what `ReplicateKey` raises.
    """

    def __init__(self, keys: Mapping[str, Given], *, caller_tokens: bool = False) -> None:
        self._keys, problem = _by_digest(keys)
        del keys  # exceptions show the locals of their frames
        if problem:
            raise ValueError(problem)
        self._caller_tokens = caller_tokens

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        return self._at_once(request)

    def _at_once(self, request: KeyRequest) -> ReplicateKey | None:
        found = self._keys.get(digest(request.api_key))
        if found is None:
            return None
        key = found if isinstance(found, ReplicateKey) else choose(request, found)
        token = request.caller_token
        if not self._caller_tokens or request.provider != "replicate" or not token:
            return key
        # SDKs put all sorts of words there, and a caller may have mixed up two keys: those go nowhere.
        if not _REPLICATE_TOKEN.fullmatch(token) or digest(token) in self._keys:
            return key
        return ReplicateKey(token, tenant=key.tenant, policy=key.policy)


class FirstOf:
    """The answer of the first resolver that knows the caller, asked one after another.

    Only None leads to the next. `PermissionDenied` and every other exception end it: the next might let in whom this
    one refuses, or would have refused, had it been able to answer.

    Args:
        resolvers: at least one. All of them share the `resolver_timeout` of one request.
    """

    def __init__(self, *resolvers: KeyResolver) -> None:
        if not resolvers:
            raise ValueError("FirstOf needs at least one resolver")
        self._resolvers = resolvers

    async def __call__(self, request: KeyRequest, /) -> Answer:
        for resolver in self._resolvers:
            answer = await resolver(request)
            if answer is not None:
                return answer
        return None

    def _at_once(self, request: KeyRequest) -> Answer | Later:
        for resolver in self._resolvers:
            answer = at_once(resolver, request)
            if answer is not None:
                return answer
        return None


def _by_digest(keys: Mapping[str, Given]) -> tuple[dict[bytes, ReplicateKey | dict[str, ReplicateKey]], str | None]:
    """The keys, or else what is wrong. Raises nothing, since its locals are secrets."""
    if not keys or not all(keys):
        return {}, "a resolver needs a list of keys, at least one key and none that is empty"
    found: dict[bytes, ReplicateKey | dict[str, ReplicateKey]] = {}
    try:
        for api_key, given in keys.items():
            if not isinstance(given, Mapping):
                found[digest(api_key)] = _key(given)
            elif not given or not all(given) or any(slug.startswith("@") for slug in given):
                return {}, "accounts by slug: a key needs at least one, and a slug is not empty and written without @"
            else:
                found[digest(api_key)] = {slug: _key(key) for slug, key in given.items()}
    except ValueError as error:
        return {}, str(error)
    return found, None


def _key(key: ReplicateKey | str) -> ReplicateKey:
    return key if isinstance(key, ReplicateKey) else ReplicateKey(key)
