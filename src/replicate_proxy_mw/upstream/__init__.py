"""The way to Replicate: one origin, a transport of our own or any `httpx.AsyncBaseTransport`."""

from .forward import Answer, Upstream, classify
from .transport import PooledTransport

__all__ = ["Answer", "PooledTransport", "Upstream", "classify"]
