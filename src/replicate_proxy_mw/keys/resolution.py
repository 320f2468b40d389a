"""Asking the resolver, and failing closed when it does not answer as it should."""

from __future__ import annotations

import logging

from ..errors import KeyMissing, KeyUnknown, ResolverFailed
from ..host_calls import HostFailed, ask
from .contract import KeyRequest, KeyResolver, ReplicateKey

logger = logging.getLogger("replicate_proxy_mw")


async def resolve(resolver: KeyResolver, request: KeyRequest, *, seconds: float) -> ReplicateKey:
    """The key of `request`. It has so many `seconds` to answer.

    Raises:
        KeyUnknown: the resolver answered None. KeyMissing, if there was no key to know.
        ProxyError: what the resolver raised of that tree, such as `PermissionDenied`.
        ResolverFailed: it raised something else, took too long, or answered with what is no key. The log gets the
            class name alone, since exception texts may hold secrets.
    """
    try:
        answer = await ask(lambda: resolver(request), seconds=seconds)
        if answer is None:
            raise KeyUnknown() if request.api_key else KeyMissing()
        return answer if isinstance(answer, ReplicateKey) else ReplicateKey(answer)
    except HostFailed as error:
        failure = error.name
    except ValueError as error:
        failure = type(error).__name__
    answer = None  # it may be a token, and exceptions show the locals of their frames
    logger.error("key resolver failed: %s", failure)
    raise ResolverFailed()
