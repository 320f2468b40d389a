"""Asking the resolver, and failing closed when it does not answer as it should."""

from __future__ import annotations

import logging

from ..errors import KeyMissing, KeyUnknown, ProxyError, ResolverFailed
from ..host_calls import ask, failure_of
from .contract import LATER, KeyRequest, KeyResolver, ReplicateKey, at_once

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
        answer = at_once(resolver, request)
        if answer is LATER:
            answer = await ask(lambda: resolver(request), seconds=seconds)
        if answer is None:
            raise KeyUnknown() if request.api_key else KeyMissing()
        return answer if isinstance(answer, ReplicateKey) else ReplicateKey(answer)
    except ProxyError:
        raise
    except Exception as error:
        failure = failure_of(error)
    answer = None  # it may be a token, and exceptions show the locals of their frames
    logger.error("key resolver failed: %s", failure)
    raise ResolverFailed()
