"""The way to Replicate: one origin, any `httpx.AsyncBaseTransport`."""

from .forward import Answer, Upstream, classify
from .transport import BoundedTransport

__all__ = ["Answer", "BoundedTransport", "Upstream", "classify"]
