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
        details: what telemetry keeps for the end: JSON of at most 2 KiB, which is not the store's to read.
        status: the last one seen.
        reads: how often it was asked for since.
        reported: its end has been reported, so that nobody else does.
    """

    tenant: str | None
    traceparent: str | None = None
    details: str | None = None
    status: str | None = None
    reads: int = 0
    reported: bool = False


class PredictionStore(Protocol):
    """From the ids of predictions, trainings and files to what is known of them.

    Whatever a method raises, or if it takes more than `store_timeout` seconds, the store counts as out of order: what
    depends on it is answered 503.
    """

    async def put(self, id: str, prediction: StoredPrediction, /) -> None:
        """Remember a creation. The same may be put twice, and in parts: of an id that is known, `traceparent`,
        `details` and `status` are filled in where they are None; all else stays as it is, its time to live too."""
        ...

    async def get(self, ids: Collection[str], /) -> Mapping[str, StoredPrediction]:
        """What is known of `ids`; those that are not known are absent."""
        ...

    async def read(self, id: str, status: str, /) -> StoredPrediction | None:
        """Count one more read, which showed `status`, and remember that. What is returned has the read counted and the
        status that was known before; None if nothing is known, and then nothing is remembered. Of reads at the same
        time, in any process, each sees the one before it."""
        ...

    async def claim(self, id: str, /) -> StoredPrediction | None:
        """The right to report the end of `id`: what is known of it for the first who asks, in any process, and None
        for all others, or if nothing is known."""
        ...
