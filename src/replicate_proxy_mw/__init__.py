"""Portkey's Replicate proxy as ASGI middleware: in your own process, on your own OpenTelemetry dashboards."""

from .config import ProxyConfig
from .errors import PermissionDenied
from .exchange import Forward, Layer, ProxyRequest, ProxyResponse
from .keys import KeyRequest, KeyResolver, MappingKeyResolver, ReplicateKey, StaticKeyResolver
from .middleware import ReplicateProxyMiddleware

__all__ = [
    "Forward",
    "KeyRequest",
    "KeyResolver",
    "Layer",
    "MappingKeyResolver",
    "PermissionDenied",
    "ProxyConfig",
    "ProxyRequest",
    "ProxyResponse",
    "ReplicateKey",
    "ReplicateProxyMiddleware",
    "StaticKeyResolver",
]
