"""docs/scaling.md: its arithmetic is done again, and what can be counted is counted again."""

from __future__ import annotations

import itertools
import re
import shlex
from dataclasses import astuple

import pytest
from uvicorn.main import main as uvicorn

from benchmarks import store, volume
from replicate_proxy_mw import MemoryPredictionStore, ProxyConfig
from tests.documents import Page, execute

SCALING, PERFORMANCE = Page("docs/scaling.md"), Page("docs/performance.md")
EXAMPLE = SCALING.block("python", "Little's law")

Rows = dict[str, list[str]]


def figures(mark: str) -> str:
    return SCALING.text.partition(f"<!-- {mark} -->\n")[2].partition(f"<!-- end of {mark} -->")[0]


def rows(text: str) -> Rows:
    """Of tables: what stands behind the first cell."""
    lines = [[cell.strip() for cell in line.strip("| ").split("|")] for line in text.splitlines() if line[:2] == "| "]
    return {first: rest for first, *rest in lines}


def number(cell: str) -> float:
    return float(cell.replace(",", "").split()[0])


def test_the_worked_example_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    execute(EXAMPLE)
    assert capsys.readouterr().out == SCALING.block("text", "requests a minute:")


def test_the_worked_example_begins_with_what_was_measured() -> None:
    known = rows(figures("volume"))
    polled, waited = known["a prediction with 10 polls"], known["create that waits until the end, with the run"]
    assert f"polled * {polled[0]} + waiting * {waited[0]}" in EXAMPLE
    assert f"polled * {polled[2]} + waiting * {waited[2]}" in EXAMPLE
    # Bytes that a clock or an id adds change no result.
    for used, measured in zip(
        re.findall(r"\d+_\d+", EXAMPLE), [polled[1], waited[1], polled[3], waited[3]], strict=True
    ):
        assert number(used.replace("_", "")) == pytest.approx(number(measured), rel=0.02)
    size = re.findall(r"an entry takes (\d+) bytes", figures("store"))
    assert float(size[0]) == pytest.approx(840, rel=0.1)
    assert EXAMPLE.count("840") == 2


def test_the_worked_example_reckons_with_what_a_request_takes() -> None:
    assert "(1.0 + 0.6) / 1000" in EXAMPLE
    assert pytest.approx(1000, rel=0.35) == _first_table("replicate_proxy_mw, OpenTelemetry SDK")[1]
    each = re.findall(
        r"^\| replicate_proxy_mw.* \| 2,000 \| [\d.]+ \| [\d.]+ \| ([\d.]+)", PERFORMANCE.text, re.MULTILINE
    )
    assert "held * 40 / 1024" in EXAMPLE
    assert 25 < max(map(float, each)) < 45


def _first_table(name: str) -> tuple[float, float]:
    """Of the results: requests a second, and microseconds of CPU for each, at 32 connections."""
    [row] = re.findall(rf"^\| {re.escape(name)} \| (\d+) \| ([\d.]+) \(", PERFORMANCE.text, re.MULTILINE)
    return float(row[0]), float(row[1])


@pytest.mark.parametrize("kind", volume.KINDS)
@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_telemetry_is_as_much_as_it_says(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume, "AT_ONCE", 100)
    told = [number(cell) for cell in rows(figures("volume"))[kind]]
    found = astuple(await volume.volume(volume.KINDS[kind]))
    assert told[::2] == list(found[::2])
    assert told[1::2] == pytest.approx(list(found[1::2]), rel=0.02)


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_tenants_make_as_many_points_as_it_says() -> None:
    counts = [await volume.points(tenants) for tenants in volume.TENANTS]
    told = [rows(figures("volume"))[name] for name in ("1 tenant, one model", "50 tenants, one model")]
    assert [int(number(cells[0])) for cells in told] == [points for points, _ in counts]
    assert round((counts[1][0] - counts[0][0]) / 49) == 3
    assert "about three for each" in SCALING.text


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("use", store.USES, ids=lambda use: use.name)
async def test_the_store_is_asked_as_often_as_it_says(use: store.Use, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "BATCH", 5)
    counted = store.Counting(MemoryPredictionStore())
    app = store.App(use, counted, itertools.count())
    for kind in store.REQUESTS:
        requests = await app.prepared(kind)
        counted.before = counted.after = 0
        await app.batch(requests)
        told = re.findall(rf"^\| {kind} \| {re.escape(use.name)} \| (\d) \| (\d) \|", figures("store"), re.MULTILINE)
        assert told == [(str(counted.before // store.BATCH), str(counted.after // store.BATCH))]


def test_what_one_process_holds_is_what_was_measured() -> None:
    [(bare, recorded)] = re.findall(r"([\d,]+) a second; (\d+) with spans and metrics", SCALING.text)
    assert number(bare) == pytest.approx(_first_table("replicate_proxy_mw")[0], rel=0.35)
    assert number(recorded) == pytest.approx(_first_table("replicate_proxy_mw, OpenTelemetry SDK")[0], rel=0.35)
    fast = _first_table("replicate_proxy_mw, fast")[1] / _first_table("replicate_proxy_mw")[1]
    assert "takes a sixth of the CPU away" in SCALING.text
    assert 0.6 < fast < 0.95
    recorded = [_first_table(f"replicate_proxy_mw{kind}, OpenTelemetry SDK")[1] for kind in (", fast", "")]
    assert "a twelfth with spans and metrics" in SCALING.text
    assert 0.8 < recorded[0] / recorded[1] < 0.98


def test_limits_are_those_of_the_code() -> None:
    config = ProxyConfig()
    for option, told in re.findall(r"`(max_\w+)` \(([\d,]+)\)", SCALING.text):
        assert getattr(config, option) == number(told)
    assert (config.read_timeout, config.stream_timeout) == (75.0, 600.0)


def test_workers_are_started_by_options_that_there_are() -> None:
    [line] = SCALING.block("sh", "--workers").splitlines()
    program, *arguments = shlex.split(line)
    assert program == "uvicorn"
    taken = uvicorn.make_context("uvicorn", arguments).params
    assert (taken["workers"], taken["timeout_graceful_shutdown"], taken["timeout_keep_alive"]) == (4, 75, 75)


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert SCALING.count("python") == SCALING.count("sh") == SCALING.count("text") == 1
    assert len(SCALING.code) == 3
    assert SCALING.missing_links() == []
