"""What a key may do: closed sets, and what cannot be told from a request counts as not in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from unicodedata import normalize
from urllib.parse import unquote

from .errors import PermissionDenied
from .operations import OPERATIONS
from .routing import Route

SECRET = "webhooks.default.secret.get"

_SEGMENT = r"[A-Za-z0-9*][A-Za-z0-9*._-]*"
_PATTERN = rf"(?:deployments/)?{_SEGMENT}/{_SEGMENT}"

# What no server takes for something else (RFC 3986, section 2.3), and what may end an id in base64.
_PLAIN = re.compile(r"[A-Za-z0-9._~=/-]*")

# More than any chain of servers would do, and bounded: each takes a look at the whole path.
_DECODINGS = 9


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """What a key may do. The default: everything but the account's webhook secret.

    Raises:
        ValueError: names the rule and what is wrong with it.
    """

    operations: Sequence[str] = ("*",)
    """Operation ids of Replicate's OpenAPI document, with `*` for any text: `predictions.*`. What the document does not
    have is only allowed by `*` alone. `webhooks.default.secret.get` hands out a secret of the account, so that a
    pattern has to begin with `webhooks.` to allow it."""

    models: Sequence[str] | None = None
    """Models as `owner/name` and deployments as `deployments/owner/name`, with `*` within a part: `acme/*`. Whatever
    names another one is refused, to read it too; None is no such rule. A bare version id does not say whose it is:
    callers write `owner/name:id`, or `lookup_versions` has it looked up."""

    own_predictions: bool = False
    """The tenant lists, reads, cancels and streams only predictions, trainings and files that it has created through
    the proxy, as far as the store remembers. Not by default: what was created before is then out of reach."""

    max_in_flight: int | None = None
    """Requests of the tenant that are under way at a time, in each process; more get 429. None is no limit."""

    expires_at: datetime | None = None
    """From then on every request is refused. With a time zone."""

    operation_ids: frozenset[str] = field(init=False, repr=False, compare=False)
    """The operations that `operations` stands for."""

    unlisted: bool = field(init=False, repr=False, compare=False)
    """Whether requests that Replicate's document does not have may pass."""

    _models: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        operations = _texts("operations", self.operations)
        models = None if self.models is None else _texts("models", self.models)
        if self.max_in_flight is not None and not (type(self.max_in_flight) is int and self.max_in_flight > 0):
            raise ValueError("max_in_flight: must be a whole number above 0")
        if not isinstance(self.own_predictions, bool):
            raise ValueError("own_predictions: must be true or false")
        if self.expires_at is not None and (not isinstance(self.expires_at, datetime) or not self.expires_at.tzinfo):
            raise ValueError("expires_at: must be a date and time with a time zone")
        put = object.__setattr__
        put(self, "operations", operations)
        put(self, "models", models)
        put(self, "operation_ids", _operation_ids(operations))
        put(self, "unlisted", "*" in operations and models is None and not self.own_predictions)
        put(self, "_models", _any_of(models or ()))

    def allows_model(self, name: str) -> bool:
        """Whether the rule `models` has `name`, an `owner/name` or `deployments/owner/name`."""
        return self.models is None or self._models.fullmatch(name) is not None


def permit(policy: Policy, route: Route, path: str) -> None:
    """Check the rules that a request's head is enough for: `expires_at` and `operations`.

    Raises:
        PermissionDenied: names the rule.
    """
    if policy.expires_at is not None and datetime.now(UTC) >= policy.expires_at:
        raise PermissionDenied(f"expires_at: this key expired at {policy.expires_at.isoformat()}.")
    operation = route.operation
    if not _is_plain(policy, operation, path):
        raise PermissionDenied("operations: the path of this request can be read in more than one way.")
    if operation is None:
        if not policy.unlisted:
            raise PermissionDenied("operations: Replicate's API has no such operation, and this key is restricted.")
    elif operation not in policy.operation_ids:
        raise PermissionDenied(f"operations: this key may not use {operation}.")


def _is_plain(policy: Policy, operation: str | None, path: str) -> bool:
    """Whether no server behind us can take `path` for what the policy refuses, however it decodes and cuts it."""
    if not policy.unlisted:
        return _PLAIN.fullmatch(unquote(path)) is not None
    if SECRET in policy.operation_ids or (operation is not None and "%" not in path):
        return True
    decoded = path
    for _ in range(_DECODINGS):
        decoded = unquote(decoded)
    letters = re.sub("[^a-z]", "", normalize("NFKC", decoded).casefold())
    return unquote(decoded) == decoded and not ("webhooks" in letters and "secret" in letters)


def _texts(rule: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{rule}: a list of strings")
    return tuple(value)


# Resolvers may make a policy for each request.
@lru_cache
def _operation_ids(patterns: tuple[str, ...]) -> frozenset[str]:
    ids: set[str] = set()
    for pattern in patterns:
        matches = {one.id for one in OPERATIONS if re.fullmatch(_glob(pattern, any_="[a-z.]*"), one.id)}
        if not matches:
            raise ValueError(f"operations: {pattern!r} stands for no operation of Replicate's API")
        ids |= matches if pattern.startswith("webhooks.") else matches - {SECRET}
    return frozenset(ids)


@lru_cache
def _any_of(models: tuple[str, ...]) -> re.Pattern[str]:
    for pattern in models:
        if not re.fullmatch(_PATTERN, pattern):
            raise ValueError(f"models: {pattern!r} is neither owner/name nor deployments/owner/name")
    return re.compile("|".join(_glob(one, any_="[^/]*") for one in models) or r"(?!)")


def _glob(pattern: str, *, any_: str) -> str:
    return any_.join(map(re.escape, pattern.split("*")))
