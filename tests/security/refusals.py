"""What a caller was told."""

from __future__ import annotations

import json

from tests.raw_asgi import Caller


def told(caller: Caller) -> tuple[int | None, str | None]:
    """Status and code of our own answer; None for the code of any other."""
    try:
        return caller.status, json.loads(caller.content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return caller.status, None
