"""Portkey's Replicate proxy as ASGI middleware: in your own process, on your own OpenTelemetry dashboards."""

from .config import ProxyConfig
from .errors import PermissionDenied
from .exchange import Forward, Layer, ProxyRequest, ProxyResponse
from .keys import (
    CachedKeyResolver,
    EnvKeyResolver,
    FileKeyResolver,
    FirstOf,
    KeyRequest,
    KeyResolver,
    MappingKeyResolver,
    ReplicateKey,
    StaticKeyResolver,
)
from .middleware import ReplicateProxyMiddleware
from .policy import Policy
from .store import MemoryPredictionStore, PredictionStore

__all__ = [
    "CachedKeyResolver",
    "EnvKeyResolver",
    "FileKeyResolver",
    "FirstOf",
    "Forward",
    "KeyRequest",
    "KeyResolver",
    "Layer",
    "MappingKeyResolver",
    "MemoryPredictionStore",
    "PermissionDenied",
    "Policy",
    "PredictionStore",
    "ProxyConfig",
    "ProxyRequest",
    "ProxyResponse",
    "ReplicateKey",
    "ReplicateProxyMiddleware",
    "StaticKeyResolver",
]
