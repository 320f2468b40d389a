"""The results as Markdown, between the marks in the page that shows them; the goals; the plot beside it."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from . import plot
from .contestants import CONTESTANTS
from .page import machine, put
from .scenarios import DIRECT, Held, Load, Results

MARK = "results"
LABELS = {DIRECT: "no proxy", **{each.name: each.label for each in CONTESTANTS}}
NONE = "-"
PACKAGES = (
    *("uvicorn", "uvloop", "httptools", "httpx", "httpcore", "h11"),
    *("fastapi-proxy-lib", "starlette", "opentelemetry-api"),
)

Figure = Callable[[Results, str], float | None]


def write(page: Path, text: str, results: Results) -> None:
    put(page, MARK, text)
    if values := {name: value for name in LABELS if (value := cpu(results, name, "c32"))}:
        rows = [
            plot.Bar(each.label.replace("`", ""), values[each.name], each.ours)
            for each in CONTESTANTS
            if each.name in values
        ]
        folder = page.with_suffix("")
        folder.mkdir(exist_ok=True)
        title = "CPU per request at 32 connections, microseconds (logarithmic; less is better)"
        folder.joinpath("cpu.svg").write_text(plot.bars(title, rows), encoding="utf-8")


def setting(options: argparse.Namespace) -> str:
    """When, where and with what."""
    versions = [_said("nginx", "-v", r"nginx/(\S+)"), _said("wrk", "-v", r"wrk \S*?([\d.]+)")]
    for package in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    command = " ".join(["python -m benchmarks.compare", *sys.argv[1:]])
    loads = f"{options.repeat} times {options.seconds} s for each load"
    return (
        f"{datetime.now(UTC):%Y-%m-%d}, `{command}`, {loads}, {options.loop}; {machine()}, {', '.join(versions)}. "
        f"Load average of the machine at the end: {os.getloadavg()[0]:.1f}."
    )


def _said(program: str, option: str, version: str) -> str:
    told = subprocess.run([program, option], capture_output=True, text=True)
    found = re.search(version, told.stdout + told.stderr)
    return f"{program} {found[1]}" if found else program


# Figures.


def of(results: Results, scenario: str, name: str) -> list[Load]:
    return results.loads.get(scenario, {}).get(name, []) if (scenario, name) not in results.failed else []


def cpu(results: Results, name: str, scenario: str) -> float | None:
    measured = of(results, scenario, name)
    return statistics.median(load.cpu for load in measured) if measured else None


def ratio(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None


def cpu_to(other: str) -> Figure:
    return lambda results, name: ratio(cpu(results, name, "c32"), cpu(results, other, "c32"))


def growing(results: Results, name: str) -> float | None:
    return ratio(cpu(results, name, "c256"), cpu(results, name, "c32"))


def added(results: Results, name: str) -> float | None:
    """Microseconds of latency over direct, of the same turn."""
    pairs = zip(of(results, "c1", name), of(results, "c1", DIRECT), strict=False)
    differences = [load.p50 - direct.p50 for load, direct in pairs]
    return statistics.median(differences) if differences else None


def added_to_nginx(results: Results, name: str) -> float | None:
    return ratio(added(results, name), added(results, "nginx"))


def wall(results: Results, name: str) -> float | None:
    """Of held requests over direct, if all have finished."""
    held, direct = results.held.get(name), results.held.get(DIRECT)
    if held is None or direct is None or held.finished < direct.finished:
        return None
    return held.seconds / direct.seconds


def held_memory(results: Results, name: str) -> float | None:
    return results.held[name].memory if wall(results, name) is not None else None


def first_event(results: Results, name: str) -> float | None:
    pairs = zip(results.events.get(name, []), results.events.get(DIRECT, []), strict=False)
    differences = [event - direct for event, direct in pairs]
    return statistics.median(differences) if differences and ("sse", name) not in results.failed else None


def growth(scenario: str) -> Figure:
    def most(results: Results, name: str) -> float | None:
        measured = results.bulk.get(scenario, {}).get(name)
        return max(each.growth for each in measured) if measured else None

    return most


def per_gibibyte(scenario: str) -> Figure:
    def least(results: Results, name: str) -> float | None:
        measured = results.bulk.get(scenario, {}).get(name)
        return min(each.cpu for each in measured) if measured else None

    return least


def unfinished(results: Results, name: str) -> float | None:
    held, direct = results.held.get(name), results.held.get(DIRECT)
    return direct.finished - held.finished if held and direct else None


def host(results: Results, name: str) -> float | None:
    return results.host.get(name)


def imported(results: Results, name: str) -> float | None:
    return results.importing if name == "default" else None


# Goals.


@dataclass(frozen=True)
class Goal:
    """What is to be at most `default` and `fast`."""

    name: str
    figure: Figure
    default: float
    fast: float | None
    form: str = ".3g"
    reciprocal: bool = False

    def row(self, results: Results) -> tuple[str, ...] | None:
        figures = [self.figure(results, name) for name in ("default", "fast")]
        if figures == [None, None]:
            return None
        cells = [self.name]
        for aim, figure in zip((self.default, self.fast), figures, strict=True):
            missed = figure is not None and aim is not None and figure > aim
            cells += [self.said(aim), self.said(figure) + (", **missed**" if missed else "")]
        return tuple(cells)

    def said(self, value: float | None) -> str:
        if self.reciprocal and value:
            return f"1/{1 / value:.3g}"
        return shown(value, self.form)


GOALS = (
    Goal("CPU per request, c=32, times nginx's", cpu_to("nginx"), 18, 11),
    Goal("… times that of uvicorn answering by itself", cpu_to("uvicorn"), 8.5, 5),
    Goal("… times fastapi-proxy-lib's", cpu_to("fastapi-proxy-lib"), 1 / 5, 1 / 9, reciprocal=True),
    Goal("CPU per request, c=256, times that at c=32", growing, 1.3, 1.3),
    Goal("p50 added to direct, c=1, times what nginx adds", added_to_nginx, 3.2, 2.5),
    Goal("held requests that do not finish", unfinished, 0, 0, ".0f"),
    Goal("… seconds for all, times direct", wall, 1.2, 1.15),
    Goal("… KiB each", held_memory, 20, 20),
    Goal("first event, ms over direct", first_event, 1.2, 1.0, ".2f"),
    Goal("1 GiB down, MiB grown", growth("down"), 8, 8, ".1f"),
    Goal("1 GiB up, MiB grown", growth("up"), 8, 8, ".1f"),
    Goal("a request that is not ours, µs", host, 0.4, 0.4, ".2f"),
    Goal("import beyond httpx and opentelemetry-api, ms", imported, 20, None),
)


def goals(results: Results) -> Iterator[str]:
    rows = [row for row in (goal.row(results) for goal in GOALS) if row is not None]
    if rows:
        yield from table(("at most", "default", "measured", "fast", "measured"), rows)


# Tables.


def text(results: Results, setting: str) -> str:
    parts = [[setting, ""], goals(results), small(results), large(results), failures(results)]
    return "\n".join(line for part in parts for line in part).rstrip() + "\n"


def small(results: Results) -> Iterator[str]:
    """The create, by what it takes."""
    if not results.loads:
        return
    yield "A create and its answer of 1.2 kB. CPU is of the proxy's process, in microseconds per request."
    yield ""
    head = [
        "",
        "requests/s, c=32",
        "CPU, c=32 (least, most)",
        "times nginx",
        "times uvicorn",
        "times fastapi-proxy-lib",
    ]
    head += ["CPU, c=256 to c=32", "CPU, c=1", "p50 added, c=1, µs", "times nginx's"]
    names = sorted(LABELS, key=lambda name: cpu(results, name, "c32") or cpu(results, name, "c1") or 0)
    rows = []
    for name in names:
        if name == DIRECT or not any(name in measured for measured in results.loads.values()):
            continue
        measured = of(results, "c32", name)
        spread = f" ({min(x.cpu for x in measured):.0f}, {max(x.cpu for x in measured):.0f})" if measured else ""
        rows.append(
            (
                LABELS[name],
                shown(statistics.median(x.rate for x in measured) if measured else None, ".0f"),
                shown(cpu(results, name, "c32"), ".1f") + spread,
                *(shown(cpu_to(other)(results, name), ".3g") for other in ("nginx", "uvicorn", "fastapi-proxy-lib")),
                shown(growing(results, name), ".2f"),
                shown(cpu(results, name, "c1"), ".0f"),
                shown(added(results, name), ".0f"),
                shown(added_to_nginx(results, name), ".2f"),
            )
        )
    yield from table(head, rows)


def large(results: Results) -> Iterator[str]:
    if not (results.held or results.events or results.bulk):
        return
    direct = results.held.get(DIRECT)
    if direct is not None:
        yield f"{direct.finished:,} creates held; the first event of a stream; one large file down and up."
        yield ""
    head = ("", "held: finished", "seconds", "times direct", "KiB each", "first event, ms over direct")
    rows = []
    for name in LABELS:
        if name not in {*results.held, *results.events, *(key for each in results.bulk.values() for key in each)} or (
            name == DIRECT and direct is None
        ):
            continue
        held: Held | None = results.held.get(name)
        rows.append(
            (
                LABELS[name],
                f"{held.finished:,}" if held else NONE,
                f"{held.seconds:.1f}" if held else NONE,
                shown(wall(results, name), ".2f"),
                shown(held_memory(results, name) if name != DIRECT else None, ".1f"),
                shown(first_event(results, name) if name != DIRECT else None, ".2f"),
                *(shown(growth(way)(results, name) if name != DIRECT else None, ".1f") for way in ("down", "up")),
                *(shown(per_gibibyte(way)(results, name) if name != DIRECT else None, ".2f") for way in ("down", "up")),
            )
        )
    yield from table((*head, "MiB grown down", "… up", "CPU s/GiB down", "… up"), rows)


def failures(results: Results) -> Iterator[str]:
    for (scenario, name), reason in results.failed.items():
        yield f"- {LABELS[name]}, {scenario}: {reason}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""


def shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)
