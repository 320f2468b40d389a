"""Which row of the threat table a test proves: `2.n` for a threat, `3.name` for a fault."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


def row(number: str) -> Callable[[F], F]:
    """Ties a test to its row; `docs/security.md` is checked against what is tied."""

    def tie(test: F) -> F:
        vars(test)["row"] = number
        return test

    return tie
