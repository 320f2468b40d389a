"""Who may call, and with which Replicate token."""

from typing import TYPE_CHECKING

from ..on_demand import on_demand
from .contract import KeyRequest, KeyResolver, ReplicateKey
from .resolution import resolve

if TYPE_CHECKING:
    from .cached import CachedKeyResolver
    from .env import EnvKeyResolver
    from .file import FileKeyResolver
    from .resolvers import FirstOf, MappingKeyResolver, StaticKeyResolver
else:
    # A host uses one or two of them.
    __getattr__, __dir__ = on_demand(
        __name__,
        {
            "cached": ["CachedKeyResolver"],
            "env": ["EnvKeyResolver"],
            "file": ["FileKeyResolver"],
            "resolvers": ["FirstOf", "MappingKeyResolver", "StaticKeyResolver"],
        },
    )

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
