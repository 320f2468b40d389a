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

    A slug is read from `x-portkey-provider` (`@slug`), else `x-portkey-virtual-key`, else `provider` (`@slug`) or
    `virtual_key` of an inline config. Names that may mean something else count if there is such an account: a provider
    without `@`, then a config's own slug. `targets` of a config are not looked at.

    Args:
        accounts: at least one, by slugs without `@`.

    Raises:
        PermissionDenied: there is no account of that slug, or the config is no JSON.
    """
    slugs, hints = _named(request)
    for slug in slugs:
        if slug in accounts:
            return accounts[slug]
        if slug != _ANY:
            raise PermissionDenied("This key has no provider of that name.")
    return accounts[next((hint for hint in hints if hint in accounts), next(iter(accounts)))]


def _named(request: KeyRequest) -> tuple[list[str], list[str]]:
    """Slugs that can mean nothing but an account, and names that can: each with what is said in headers first."""
    inline = _inline(request) if (request.config or "").startswith("{") else {}
    slugs: list[str] = []
    hints: list[str] = []
    for name, is_slug in (
        (request.provider, False),
        (request.virtual_key, True),
        (inline.get("provider"), False),
        (inline.get("virtual_key"), True),
        (None if inline else request.config, False),
    ):
        if isinstance(name, str) and name:
            (slugs if is_slug or name.startswith("@") else hints).append(name.removeprefix("@"))
    return slugs, hints


def _inline(request: KeyRequest) -> Mapping[str, object]:
    try:
        config: Mapping[str, object] = json.loads(request.config or "")
        return config
    except (ValueError, RecursionError):
        pass
    # Not within `except`: that exception holds the whole text, and a config may hold a token.
    raise PermissionDenied("x-portkey-config is not valid JSON.")
