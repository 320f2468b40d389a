"""The way to Replicate: one origin, a transport of our own or any `httpx.AsyncBaseTransport`."""

from typing import TYPE_CHECKING

from ..on_demand import on_demand
from .forward import Answer, Upstream, classify

if TYPE_CHECKING:
    from .transport import PooledTransport
else:
    # A host may have a transport of its own, and h11 takes a quarter of the time that all else here does.
    __getattr__, __dir__ = on_demand(__name__, {"transport": ["PooledTransport"]})

__all__ = ["Answer", "PooledTransport", "Upstream", "classify"]
