"""Who may call, and with which Replicate token."""

from .contract import KeyRequest, KeyResolver, ReplicateKey
from .resolution import resolve
from .resolvers import MappingKeyResolver, StaticKeyResolver

__all__ = ["KeyRequest", "KeyResolver", "MappingKeyResolver", "ReplicateKey", "StaticKeyResolver", "resolve"]
