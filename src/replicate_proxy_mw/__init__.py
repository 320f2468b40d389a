"""Portkey's Replicate proxy as ASGI middleware: in your own process, on your own OpenTelemetry dashboards."""

from typing import TYPE_CHECKING

from .config import ProxyConfig
from .errors import PermissionDenied
from .exchange import Forward, Layer, ProxyRequest, ProxyResponse
from .keys import KeyRequest, KeyResolver, ReplicateKey
from .middleware import ReplicateProxyMiddleware
from .on_demand import on_demand
from .policy import Policy
from .store import MemoryPredictionStore, PredictionStore

if TYPE_CHECKING:
    from .endpoints.webhooks import WebhookEvent
    from .keys import CachedKeyResolver, EnvKeyResolver, FileKeyResolver, FirstOf, MappingKeyResolver, StaticKeyResolver
    from .telemetry import PriceRequest, Rates, configure_telemetry
else:
    # Of these a host uses few, and some bring much along.
    __getattr__, __dir__ = on_demand(
        __name__,
        {
            "endpoints.webhooks": ["WebhookEvent"],
            "keys.cached": ["CachedKeyResolver"],
            "keys.env": ["EnvKeyResolver"],
            "keys.file": ["FileKeyResolver"],
            "keys.resolvers": ["FirstOf", "MappingKeyResolver", "StaticKeyResolver"],
            "telemetry.prices": ["PriceRequest", "Rates"],
            "telemetry.setup": ["configure_telemetry"],
        },
    )

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
