"""What the pages on configuration, errors and headers have from the code: `python -m tests.docs.reference --write`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from tests.docs import reference_of_config, reference_of_errors, reference_of_headers

DOCS = Path(__file__).parents[2] / "docs"
BEGIN, END = "<!-- reference: begin -->", "<!-- reference: end -->"

PAGES: Mapping[str, Callable[[], Iterator[str]]] = {
    "configuration.md": reference_of_config.lines,
    "errors.md": reference_of_errors.lines,
    "headers.md": reference_of_headers.lines,
}


def reference(name: str) -> str:
    """The text between the two marks of a page."""
    return "\n".join(PAGES[name]()) + "\n"


def written(name: str, page: str) -> str:
    """`page` with the reference as it should be.

    Raises:
        ValueError: a mark is missing.
    """
    before, begin, rest = page.partition(BEGIN + "\n")
    _, end, after = rest.partition(END + "\n")
    if not begin or not end:
        raise ValueError(f"{name} has no {BEGIN} … {END}")
    return f"{before}{begin}\n{reference(name)}\n{end}{after}"


if __name__ == "__main__":
    stale = []
    for name in PAGES:
        page = (DOCS / name).read_text(encoding="utf-8")
        if written(name, page) != page:
            stale.append(name)
            if sys.argv[1:] == ["--write"]:
                (DOCS / name).write_text(written(name, page), encoding="utf-8")
    if stale and sys.argv[1:] != ["--write"]:
        sys.exit(f"stale: {', '.join(stale)}")
