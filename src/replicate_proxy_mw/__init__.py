"""Portkey's Replicate proxy as ASGI middleware: in your own process, on your own OpenTelemetry dashboards."""

from .config import ProxyConfig
from .endpoints.webhooks import WebhookEvent
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
from .telemetry import PriceRequest, Rates, configure_telemetry

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
    "PriceRequest",
    "ProxyConfig",
    "ProxyRequest",
    "ProxyResponse",
    "Rates",
    "ReplicateKey",
    "ReplicateProxyMiddleware",
    "StaticKeyResolver",
    "WebhookEvent",
    "configure_telemetry",
]
