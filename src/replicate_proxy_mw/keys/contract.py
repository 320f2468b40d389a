"""What a resolver is asked, and what it answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from hashlib import sha256
from typing import Any, NoReturn, Protocol

from ..policy import Policy

# RFC 6750, section 2.1 (b68token): nothing that could end the header line.
_TOKEN = re.compile(r"[A-Za-z0-9\-._~+/=]{8,256}")

_OPEN = Policy()


class ReplicateKey:
    """A Replicate API token and whose it is. It cannot be printed, formatted, copied, pickled or serialised.

    Args:
        token: the API token, such as `r8_…`: 8 to 256 characters of `A-Z a-z 0-9 - . _ ~ + / =`.
        tenant: the name under which spans and metrics count this key, and whose predictions are kept apart; never the
            caller's own key. Where several resolvers are in use, each needs names of its own.
        policy: what the key may do; by default everything but reading the account's webhook secret.

    Raises:
        ValueError: the token is not of that form (the text does not hold it), the tenant is no name, or the policy has
            a rule that counts by tenant and there is none.
    """

    __slots__ = ("_token", "policy", "tenant")

    def __init__(self, token: str, *, tenant: str | None = None, policy: Policy = _OPEN) -> None:
        self._token = token if isinstance(token, str) and _TOKEN.fullmatch(token) else ""
        self.tenant, self.policy = tenant, policy
        del token
        if not self._token:
            raise ValueError("not a Replicate API token: 8 to 256 letters, digits or -._~+/=")
        if tenant is not None and not (isinstance(tenant, str) and tenant and tenant.isprintable()):
            raise ValueError("tenant: must be a text that can be printed")
        if not tenant and (policy.own_predictions or policy.max_in_flight is not None):
            raise ValueError("own_predictions and max_in_flight hold for a tenant: name one")

    def of(self, *, tenant: str | None, policy: Policy) -> ReplicateKey:
        """The same token for another tenant."""
        return ReplicateKey(self._token, tenant=tenant, policy=policy)

    def authorization(self) -> bytes:
        """The value of the header that goes up. Replicate takes `Bearer` (and, from old SDKs, `Token`)."""
        return b"Bearer " + self._token.encode()

    def identity(self) -> str:
        """A digest of tenant and token in hex: requests whose keys differ in it share no answer."""
        return sha256(f"{self._token}\n{self.tenant or ''}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"ReplicateKey('***', tenant={self.tenant!r})"

    def __format__(self, spec: str) -> str:
        return format(repr(self), spec)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a ReplicateKey is neither copied nor pickled")

    def __getstate__(self) -> NoReturn:
        raise TypeError("a ReplicateKey has no state to give away")


def digest(api_key: str) -> bytes:
    """What a caller's key is known by: nothing keeps the key itself."""
    return sha256(api_key.encode("utf-8", "surrogatepass")).digest()


# Not frozen, which would take several times as long to make.
@dataclass(kw_only=True, slots=True)
class KeyRequest:
    """What a resolver may look at, and is not to change: who calls, and for what. Printing it shows no secret.

    Attributes:
        api_key: the caller's key, from `x-portkey-api-key`, else from `Authorization`. Never empty, unless
            `require_key` is off.
        provider: `x-portkey-provider` as sent: a name (`replicate`) or a slug (`@team-account`).
        caller_token: a Replicate token that the caller brings beside its key, in `Authorization` or as `api_key` of an
            inline config; never the key itself and no placeholder of an SDK.
        virtual_key: `x-portkey-virtual-key` as sent (a legacy slug).
        config: `x-portkey-config` as sent: a slug or JSON.
        metadata: `x-portkey-metadata`, at most 32 entries of 256 characters; empty where there is none.
        operation: the operation id of Replicate's OpenAPI document, None for anything it does not have.
        model: `owner/name` where the path names a model, else None: the key is resolved before a body is read.
        method: the HTTP method.
        path: the path below the prefix, percent-encoded as it came.
        client: the caller's address as the server tells it.
        scope: the ASGI scope, with the host's own user, session and state.
    """

    api_key: str = field(repr=False)
    provider: str | None = None
    caller_token: str | None = field(default=None, repr=False)
    virtual_key: str | None = field(default=None, repr=False)
    config: str | None = field(default=None, repr=False)
    metadata: Mapping[str, str] = field(default_factory=dict)
    operation: str | None = None
    model: str | None = None
    method: str
    path: str
    client: str | None = None
    scope: Mapping[str, Any] = field(repr=False)


class Later(Enum):
    """What a resolver answers at once if it cannot: it has to be awaited."""

    LATER = "later"


LATER = Later.LATER

Answer = ReplicateKey | str | None


def at_once(resolver: KeyResolver, request: KeyRequest) -> Answer | Later:
    """What `resolver` answers without being awaited, and so without a time limit: that takes ten times as long.

    Only our own can, by a method of that name. It is not inherited: a subclass may do more in its `__call__`.
    """
    kind = type(resolver)
    # Of ours alone: a host may have a method of that name.
    method = vars(kind).get("_at_once") if kind.__module__.startswith("replicate_proxy_mw.") else None
    return LATER if method is None else method(resolver, request)


class KeyResolver(Protocol):
    """Any async callable from a `KeyRequest` to the key to use.

    None means that the caller is unknown (401); raise `PermissionDenied("reason")` for a caller that is known and
    may not (403). Any other exception, no answer within `resolver_timeout` seconds, or another value: 503.
    """

    async def __call__(self, request: KeyRequest, /) -> Answer:
        """The key to use: a `ReplicateKey`, a token as text, or None for a caller who is unknown."""
