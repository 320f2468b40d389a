"""The rule `models` of a policy: what names another model, or cannot be told, is refused before it goes up."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from .. import model_names
from ..errors import PermissionDenied, UpstreamFailed
from ..exchange import Forward, Layer, ProxyRequest, ProxyResponse, where
from ..json_bodies import asking_for, held
from ..model_names import Named, NotUnderstood

# Parsing a longer body holds up all other requests: the worst of this size a tenth of a second.
MAX_SIZE = 1 << 20

# Requests that one unknown version id may cause.
MAX_CANDIDATES = 20

MAX_REMEMBERED = 10_000
UNKNOWN_AGAIN = 60.0  # seconds until a version that was not found is looked up again: it may be new


def check_models(*, lookup_versions: bool, now: Callable[[], float] = time.monotonic) -> Layer:
    """Let pass what names only models that the key's policy has; all of it, where the policy has no such rule.

    Args:
        lookup_versions: whether a version id is asked for at Replicate, in each model that the policy names without
            `*`, and remembered. Else a bare id is refused, and `owner/name:id` is taken for what it says.
        now: seconds that only grow.
    """
    known = _Versions(now)

    def layer(forward: Forward) -> Forward:
        async def checked(request: ProxyRequest) -> ProxyResponse:
            try:
                named = list(model_names.in_path(request.route, request.target))
                if model_names.has_body(request.route):
                    request, body, whole = await held(request, max_size=MAX_SIZE)
                    if not whole:
                        raise NotUnderstood(f"a body of more than {MAX_SIZE} bytes is not searched for its model")
                    named += model_names.in_body(request.route, request.headers, body)
            except NotUnderstood as error:
                raise PermissionDenied(f"models: {error}, since this key is restricted to some models.") from None
            for one in named:
                await _check(one, request, forward, known if lookup_versions else None)
            return await forward(request)

        return where(lambda request: request.key.policy.models is not None, then=checked, otherwise=forward)

    return layer


async def _check(named: Named, request: ProxyRequest, forward: Forward, known: _Versions | None) -> None:
    policy = request.key.policy
    if named.name is not None and not policy.allows_model(named.name):
        raise PermissionDenied(f"models: this key may not use {named.name}.")
    if named.version is None or (named.name is not None and known is None):
        return
    if known is None:
        raise PermissionDenied("models: write owner/name:id; a bare version id does not say whose it is.")
    literal = [one for one in policy.models or () if "*" not in one and one.count("/") == 1]
    for name in [named.name] if named.name is not None else literal[:MAX_CANDIDATES]:
        if await known.has(name, named.version, request, forward):
            return
    raise PermissionDenied("models: this version id is none of a model that this key may use.")


class _Versions:
    """Which model has which version, as far as a tenant's token lets see."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._until: OrderedDict[tuple[str | None, str, str], float | None] = OrderedDict()

    async def has(self, model: str, version: str, request: ProxyRequest, forward: Forward) -> bool:
        key = (request.key.tenant, model, version)
        if key in self._until:
            self._until.move_to_end(key)
            until = self._until[key]
            if until is None or self._now() < until:
                return until is None
        found = await _look_up(f"/models/{model}/versions/{version}", request, forward)
        # A version stays its model's for good.
        self._until[key] = None if found else self._now() + UNKNOWN_AGAIN
        if len(self._until) > MAX_REMEMBERED:
            self._until.popitem(last=False)
        return found


async def _look_up(target: str, request: ProxyRequest, forward: Forward) -> bool:
    response = await forward(asking_for(request, target))
    await held(response)  # so that the connection can be used again
    await response.aclose()
    if response.status not in (200, 403, 404):
        raise UpstreamFailed("The version could not be looked up at Replicate; nothing was created.")
    return response.status == 200
