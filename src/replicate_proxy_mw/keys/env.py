"""One Replicate token and the callers' keys, from environment variables."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from ..policy import Policy
from .contract import KeyRequest, ReplicateKey
from .resolvers import MappingKeyResolver

_TOKEN, _KEYS = "REPLICATE_API_TOKEN", "REPLICATE_PROXY_KEYS"

# A tenant is printed on spans, so that the first half of a key that has a `=` must not be taken for one.
_ENTRY = re.compile(r"(?:(?!pk-)([A-Za-z0-9][A-Za-z0-9._-]*)=)?((?<==).{8,}|[^=]{8,})")

_OPEN = Policy()


class EnvKeyResolver:
    """The token `REPLICATE_API_TOKEN` for everyone who has a key of `REPLICATE_PROXY_KEYS`.

    Keys are separated by commas or white space, each as `pk-…` or `tenant=pk-…`: of 8 characters or more, and with its
    tenant if it holds a `=`. Tenants are of `A-Z a-z 0-9 . _ -`, begin with a letter or digit, but not with `pk-`, and
    may have several keys. The variables are read once, when the resolver is made; only digests of the keys are kept.

    Args:
        environ: where the variables are.
        policy: what each of the keys may do.

    Raises:
        ValueError: a variable is missing or cannot be read. Names it and the number of the entry, and no secret.
    """

    def __init__(self, *, environ: Mapping[str, str] = os.environ, policy: Policy = _OPEN) -> None:
        keys, problem = _read(environ, policy)
        del environ  # exceptions show the locals of their frames
        if problem:
            raise ValueError(problem)
        self._resolver = MappingKeyResolver(keys)

    async def __call__(self, request: KeyRequest, /) -> ReplicateKey | None:
        return self._at_once(request)

    def _at_once(self, request: KeyRequest) -> ReplicateKey | None:
        return self._resolver._at_once(request)


def _read(environ: Mapping[str, str], policy: Policy) -> tuple[dict[str, ReplicateKey], str | None]:
    """The keys, or else what is wrong. Raises nothing, since its locals are secrets."""
    token = environ.get(_TOKEN, "").strip()
    entries = [entry for entry in re.split(r"[,\s]+", environ.get(_KEYS, "")) if entry]
    if not token or not entries:
        return {}, f"{_KEYS if token else _TOKEN} is not set, or empty"
    keys: dict[str, ReplicateKey] = {}
    where = _TOKEN
    try:
        ReplicateKey(token)
        for number, entry in enumerate(entries, 1):
            where = f"{_KEYS}, entry {number}"
            parts = _ENTRY.fullmatch(entry)
            if not parts:
                return {}, f"{where}: neither a key of 8 characters or more, nor tenant=key"
            if parts[2] in keys:
                return {}, f"{where}: this key is there before"
            keys[parts[2]] = ReplicateKey(token, tenant=parts[1], policy=policy)
    except ValueError as error:
        return {}, f"{where}: {error}"
    return keys, None
