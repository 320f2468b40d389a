"""Who may call, and with which Replicate token."""

from .cached import CachedKeyResolver
from .contract import KeyRequest, KeyResolver, ReplicateKey
from .env import EnvKeyResolver
from .file import FileKeyResolver
from .resolution import resolve
from .resolvers import FirstOf, MappingKeyResolver, StaticKeyResolver

__all__ = [
    "CachedKeyResolver",
    "EnvKeyResolver",
    "FileKeyResolver",
    "FirstOf",
    "KeyRequest",
    "KeyResolver",
    "MappingKeyResolver",
    "ReplicateKey",
    "StaticKeyResolver",
    "resolve",
]
