"""Asking the resolver, and failing closed when it does not answer as it should."""

from __future__ import annotations

import asyncio
import logging

import anyio

from ..errors import KeyUnknown, ProxyError, ResolverFailed
from .contract import KeyRequest, KeyResolver, ReplicateKey

logger = logging.getLogger("replicate_proxy_mw")


async def resolve(resolver: KeyResolver, request: KeyRequest, *, seconds: float) -> ReplicateKey:
    """The key of `request`. It has so many `seconds` to answer.

    Raises:
        KeyUnknown: the resolver answered None.
        ProxyError: what the resolver raised of that tree, such as `PermissionDenied`.
        ResolverFailed: it raised something else, took too long, or answered with what is no key. The log gets the
            class name alone, since exception texts may hold secrets.
    """
    try:
        with anyio.fail_after(seconds):
            answer = await resolver(request)
        if answer is not None:
            return answer if isinstance(answer, ReplicateKey) else ReplicateKey(answer)
        failure = None
    except ProxyError:
        raise
    except anyio.get_cancelled_exc_class() as error:
        if _cancelled():
            raise
        failure = type(error).__name__
    except Exception as error:
        failure = type(error).__name__
    if failure is None:
        raise KeyUnknown()
    answer = None  # it may be a token, and exceptions show the locals of their frames
    logger.error("key resolver failed: %s", failure)
    raise ResolverFailed()


def _cancelled() -> bool:
    """Whether it is us who are cancelled, and not just a task that the resolver waited for (asyncio knows both)."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return True
    return task is None or task.cancelling() > 0
