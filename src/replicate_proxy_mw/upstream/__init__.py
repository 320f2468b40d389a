"""The way to Replicate: one origin, any `httpx.AsyncBaseTransport`."""

from .forward import Upstream
from .transport import BoundedTransport

__all__ = ["BoundedTransport", "Upstream"]
