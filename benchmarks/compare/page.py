"""Pages that show what was measured: where it stands in them, and on what machine that was."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def put(page: Path, mark: str, text: str) -> None:
    """Between the comments `mark` and `end of mark`.

    Raises:
        ValueError: the page has no such marks.
    """
    first, last = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    before, begin, rest = page.read_text(encoding="utf-8").partition(first)
    _, end, after = rest.partition(last)
    if not begin or not end:
        raise ValueError(f"{page.name} has no {first.strip()} and {last.strip()}")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = model[1].strip() if model else platform.machine()
    return f"{os.cpu_count()} cores, {name}, CPython {platform.python_version()}"
