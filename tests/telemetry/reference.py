"""The reference in docs/telemetry.md, made from the registry: `python -m tests.telemetry.reference --write`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from replicate_proxy_mw.telemetry import names
from replicate_proxy_mw.telemetry.names import ATTRIBUTES, EVENTS, METRICS

PAGE = Path(__file__).parents[2] / "docs" / "telemetry.md"
BEGIN, END = "<!-- reference: begin -->", "<!-- reference: end -->"

# What the registry cannot know: a span's name, kind and status are code.
SPANS = (
    (
        "request",
        "`{METHOD} {http.route}`, `HTTP {http.route}` for methods that HTTP has not",
        "SERVER; INTERNAL below a span that the host opened in this process",
        "Error for a 5xx and for an answer that did not go out to its end; unset for a 4xx and for a caller who left",
    ),
    (
        "attempt",
        "`{METHOD} {url.template}`, `GET` for a stream",
        "CLIENT",
        "Error from 400 on, and for an answer that did not come or was cut; unset for a caller who left",
    ),
    (
        "run",
        "`generate_content {owner/name}`, `train {owner/name}`; the word alone where the model is not known",
        "CLIENT",
        "Error for `failed` (`prediction_failed`) and `aborted` (`deadline_exceeded`), else unset",
    ),
)


def reference() -> str:
    """The text between the two markers."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield f"Made by `python -m tests.telemetry.reference --write`; the schema is <{names.SCHEMA_URL}>."
    yield ""
    yield "**S** is a stable semantic convention, **D** one in development, **C** our own: `replicate.*` comes from"
    yield "Replicate's answers, `replicate_proxy.*` is about the proxy, `portkey.*` comes from the caller's headers."
    yield ""
    yield "### Spans"
    yield ""
    yield from _table(("span", "name", "kind", "status"), SPANS)
    yield ""
    yield "### Events"
    yield ""
    yield from _table(
        ("event", "mark", "on", "meaning"), [(f"`{name}`", "C", "run", meaning) for name, meaning in EVENTS.items()]
    )
    yield ""
    yield "### Attributes"
    yield ""
    yield from _table(
        ("attribute", "mark", "on", "meaning"),
        [
            (f"`{_shown(each.name)}`", each.mark, ", ".join(each.on) or "metrics alone", each.meaning)
            for each in ATTRIBUTES.values()
        ],
    )
    yield ""
    yield "### Metrics"
    yield ""
    yield from _table(
        ("metric", "mark", "kind", "unit", "labels", "buckets", "meaning"),
        [
            (
                *(f"`{each.name}`", each.mark, each.kind, f"`{each.unit}`"),
                *(_listed(each.labels), _range(each.buckets), each.meaning),
            )
            for each in METRICS.values()
        ],
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"


def _shown(name: str) -> str:
    return name + "<key>" if name == names.PORTKEY_METADATA else name


def _listed(labels: Iterable[str]) -> str:
    return ", ".join(f"`{label}`" for label in labels)


def _range(buckets: Sequence[float]) -> str:
    return f"{len(buckets)} from {buckets[0]:.12g} to {buckets[-1]:.12g}" if buckets else ""


def written(page: str) -> str:
    """`page` with the reference as it should be.

    Raises:
        ValueError: a marker is missing.
    """
    before, begin, rest = page.partition(BEGIN + "\n")
    _, end, after = rest.partition(END + "\n")
    if not begin or not end:
        raise ValueError(f"{PAGE.name} has no {BEGIN} … {END}")
    return before + begin + "\n" + reference() + "\n" + end + after


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    if sys.argv[1:] == ["--write"]:
        PAGE.write_text(written(page), encoding="utf-8")
    else:
        sys.exit("stale" if written(page) != page else 0)
