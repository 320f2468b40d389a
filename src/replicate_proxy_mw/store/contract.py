"""What is remembered of a prediction beyond the request that created it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredPrediction:
    """A prediction, training or file that was created through the proxy.

    Attributes:
        tenant: whose it is.
        traceparent: the request span that created it (W3C Trace Context, section 3.2), None where there was none.
        reads: how often it was asked for since.
        reported: its end has been reported, so that nobody else does.
    """

    tenant: str | None
    traceparent: str | None = None
    reads: int = 0
    reported: bool = False


class PredictionStore(Protocol):
    """From the ids of predictions, trainings and files to what is known of them.

    Whatever a method raises, or if it takes more than `store_timeout` seconds, the store counts as out of order: what
    depends on it is answered 503.
    """

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        """Remember a creation. What is known of an id already stays as it is: the same may be put twice."""
        ...

    async def get(self, ids: Collection[str], /, *, read: bool = False) -> Mapping[str, StoredPrediction]:
        """What is known of `ids`; those that are not known are absent. With `read`, each counts one more read,
        however often it is listed, and what is returned has it counted."""
        ...

    async def claim(self, id: str, /) -> StoredPrediction | None:
        """The right to report the end of `id`: what is known of it for the first who asks, in any process, and None
        for all others, or if nothing is known."""
        ...
