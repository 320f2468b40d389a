"""The resolvers that need nothing but their arguments."""

from __future__ import annotations

import hmac
import re
from collections.abc import Iterable, Mapping
from hashlib import sha256

from .accounts import choose
from .contract import KeyRequest, KeyResolver, ReplicateKey

# The form of Replicate's tokens, and that of the old ones.
_REPLICATE_TOKEN = re.compile(r"r8_[A-Za-z0-9_]{8,128}|[0-9a-f]{40}")


def _digest(api_key: str) -> bytes:
    return sha256(api_key.encode("utf-8", "surrogatepass")).digest()


class StaticKeyResolver:
    """One Replicate token for everyone who has one of the given keys.

    Args:
        key: the token, or a `ReplicateKey` with a tenant.
        api_keys: the keys that callers may send; at least one, since without any the proxy would be open.
    """

    def __init__(self, key: ReplicateKey | str, *, api_keys: Iterable[str]) -> None:
        self._key = _key(key)
        self._digests = tuple(_digest(api_key) for api_key in _not_empty(api_keys))

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        digest = _digest(request.api_key)
        # Every digest is compared, so that the time taken does not tell which one came close.
        found = [hmac.compare_digest(digest, known) for known in self._digests]
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

    def __init__(
        self, keys: Mapping[str, ReplicateKey | str | Mapping[str, ReplicateKey | str]], *, caller_tokens: bool = False
    ) -> None:
        _not_empty(keys)
        self._caller_tokens = caller_tokens
        self._keys = {
            _digest(api_key): _accounts(key) if isinstance(key, Mapping) else _key(key) for api_key, key in keys.items()
        }

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        found = self._keys.get(_digest(request.api_key))
        if found is None:
            return None
        key = found if isinstance(found, ReplicateKey) else choose(request, found)
        token = request.caller_token
        if not self._caller_tokens or request.provider != "replicate" or not token:
            return key
        # SDKs put all sorts of words there, and a caller may have mixed up two keys: those go nowhere.
        if not _REPLICATE_TOKEN.fullmatch(token) or _digest(token) in self._keys:
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

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | str | None:
        for resolver in self._resolvers:
            answer = await resolver(request)
            if answer is not None:
                return answer
        return None


def _key(key: ReplicateKey | str) -> ReplicateKey:
    return key if isinstance(key, ReplicateKey) else ReplicateKey(key)


def _accounts(keys: Mapping[str, ReplicateKey | str]) -> Mapping[str, ReplicateKey]:
    if not keys:
        raise ValueError("accounts by slug: a key needs at least one")
    if not all(keys) or any(slug.startswith("@") for slug in keys):
        raise ValueError("accounts by slug: a slug is not empty and is written without @")
    return {slug: _key(key) for slug, key in keys.items()}


def _not_empty(api_keys: Iterable[str]) -> list[str]:
    if isinstance(api_keys, str):
        raise TypeError("api_keys is a list of keys, not one key")
    listed = list(api_keys)
    if not listed or not all(listed):
        raise ValueError("a resolver needs at least one key, and none that is empty")
    return listed
