"""Loops: a request says by which proxies of this package it has come, and none of them takes it twice."""

from __future__ import annotations

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from .errors import LoopDetected

PSEUDONYM = b"replicate-proxy-mw-"

# Proxies of this package in a row: more than anybody has a use for, and less than a header has room for.
MAX_PROXIES = 16

_ENTRY = re.compile(rb"[0-9](?:\.[0-9])? %b[0-9a-f]{8}" % PSEUDONYM)


class Via:
    """The `Via` of requests that go up (RFC 9110, section 7.6.3).

    Its name for this proxy is made of `upstream` and `prefix`: the same in every process of a deployment, since a loop
    may come back to another one, and another one for a proxy in front of this.
    """

    def __init__(self, *, upstream: str, prefix: str) -> None:
        self._name = PSEUDONYM + sha256(f"{upstream}\n{prefix}".encode()).hexdigest()[:8].encode()
        self._first = (b"via", b"1.1 " + self._name)

    def up(self, scope: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """The header as it goes up: other proxies of this package, and this one. What else the caller has come by is
        not for Replicate to know.

        Raises:
            LoopDetected: it has come by here, or by more than `MAX_PROXIES`, which looks like a loop without end.
        """
        lines = [value for name, value in scope["headers"] if name == b"via"]
        version = scope.get("http_version", "1.1")
        if not lines and version == "1.1":
            return self._first
        together = b",".join(lines).lower()
        entries = [entry.strip() for entry in together.split(b",")]
        passed = [entry for entry in entries if _ENTRY.fullmatch(entry)]
        if self._name in together or len(passed) > MAX_PROXIES:
            raise LoopDetected()
        return b"via", b", ".join((*passed, b"%b %b" % (version.encode(), self._name)))
