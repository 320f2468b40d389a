"""Pages of the project's documentation, whose code is run as it stands there."""

from __future__ import annotations

import itertools
import re
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

_NUMBERS = itertools.count()


@dataclass(frozen=True)
class Page:
    """A page; `path` is below the project's folder."""

    path: str

    @property
    def text(self) -> str:
        return ROOT.joinpath(self.path).read_text(encoding="utf-8")

    @property
    def code(self) -> list[tuple[str, str]]:
        """Language and text of each block of code."""
        return re.findall(r"^```(\w+)\n(.*?)^```", self.text, re.DOTALL | re.MULTILINE)

    def block(self, language: str, containing: str) -> str:
        [found] = [code for name, code in self.code if name == language and containing in code]
        return found

    def count(self, *languages: str) -> int:
        return len([1 for language, _ in self.code if language in languages])

    def missing_links(self) -> list[str]:
        """Relative links that lead to no file."""
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", self.text)
        return [target for target in targets if not ROOT.joinpath(self.path).parent.joinpath(target).exists()]


def execute(code: str, **known: Any) -> dict[str, Any]:
    """The names that `code` defines, as a module: frameworks look up annotations there."""
    module = types.ModuleType(f"page_{next(_NUMBERS)}")
    sys.modules[module.__name__] = module
    module.__dict__.update(known)
    exec(compile(code, module.__name__, "exec"), module.__dict__)
    return module.__dict__
