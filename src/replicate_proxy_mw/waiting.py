"""How long a request has waited for Replicate or for its caller: the rest of its time is the proxy's own."""

from __future__ import annotations

from time import perf_counter


class Waiting:
    """Counts the seconds within `with`, once where several overlap.

    Attributes:
        seconds: those of what has ended.
    """

    __slots__ = ("_depth", "_since", "seconds")

    def __init__(self) -> None:
        self._depth = 0
        self._since = 0.0
        self.seconds = 0.0

    def __enter__(self) -> None:
        if not self._depth:
            self._since = perf_counter()
        self._depth += 1

    def __exit__(self, *error: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.seconds += perf_counter() - self._since
