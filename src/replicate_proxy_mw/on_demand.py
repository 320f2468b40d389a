"""What few hosts use of a package, imported when it is asked for: the rest of it is there sooner."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def on_demand(
    package: str, names: Mapping[str, Sequence[str]]
) -> tuple[Callable[[str], Any], Callable[[], Sequence[str]]]:
    """The `__getattr__` and `__dir__` (PEP 562) of `package`, which has `names` by the module that defines them."""
    module_of = {name: f"{package}.{module}" for module, defined in names.items() for name in defined}

    def getattr_(name: str) -> Any:
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module_of[name]), name)
        setattr(sys.modules[package], name, value)
        return value

    def dir_() -> Sequence[str]:
        return sorted({*vars(sys.modules[package]), *module_of})

    return getattr_, dir_
