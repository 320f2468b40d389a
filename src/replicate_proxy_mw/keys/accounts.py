"""Which of several Replicate accounts a caller means, as in Portkey's model catalog: `@slug`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TypeVar

from ..errors import PermissionDenied
from .contract import KeyRequest

T = TypeVar("T")

# What Portkey's own snippets for Replicate say, whatever the account is called here.
_ANY = "replicate"


def choose(request: KeyRequest, accounts: Mapping[str, T]) -> T:
    """The account that `request` names, of `accounts` by slug; the first of them if it names none.

    A slug is read from `x-portkey-provider` (`@slug`), else `x-portkey-virtual-key`, else `provider` or `virtual_key`
    of an inline config; a name without `@` and a config's own slug count if there is such an account.

    Raises:
        PermissionDenied: there is no account of that slug.
    """
    slug, must_exist = _named(request)
    if slug in accounts:
        return accounts[slug]
    if must_exist and slug != _ANY:
        raise PermissionDenied("This key has no provider of that name.")
    return next(iter(accounts.values()))


def _named(request: KeyRequest) -> tuple[str, bool]:
    """A slug, and whether nothing else can be meant by it."""
    provider = request.provider or ""
    if provider.startswith("@"):
        return provider[1:], True
    if request.virtual_key:
        return request.virtual_key.removeprefix("@"), True
    config = request.config or ""
    if not config.startswith("{"):
        return (config or provider), False
    content = json.loads(config)
    for name in ("provider", "virtual_key"):
        slug = content.get(name)
        if isinstance(slug, str) and (slug.startswith("@") or name == "virtual_key"):
            return slug.removeprefix("@"), True
    return provider, False
