"""A short run of `benchmarks.aborts`: callers who leave, on every server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from benchmarks.aborts import GOAL, PHASES, SERVERS, STRICT, Stage, bursts, faults, left, quantile, stage

# Each server once, the transports by turns.
TRANSPORTS = dict(zip(sorted(SERVERS), ("default", "fast", "default", "fast", "default"), strict=True))
CONNECTIONS = 100


def _on(server: str, folder: Path, play: Callable[[Stage], Awaitable[None]], *python: str) -> None:
    async def run() -> None:
        async with stage(server, TRANSPORTS[server], folder, python=python, connections=CONNECTIONS) as running:
            await play(running)

    asyncio.run(run())


@pytest.mark.timeout(60)
@pytest.mark.parametrize("server", sorted(SERVERS))
def test_who_leaves_takes_upstreams_connection_along(server: str, tmp_path: Path) -> None:
    async def play(running: Stage) -> None:
        results = {phase.name: await left(running, phase, 3) for phase in PHASES}
        for phase in PHASES:
            assert results[phase.name].stayed == results[phase.name].made_whole == 0, results
            assert not results[phase.name].took or quantile(results[phase.name].took, 0.99) < GOAL, results
        for name in ("in the upload", "waiting for the head", "between events", "in a slow download"):
            assert len(results[name].took) == 3, results
        assert await running.asked() == 200

    _on(server, tmp_path, play)


@pytest.mark.timeout(60)
def test_a_burst_that_leaves_at_once_leaves_nothing(tmp_path: Path) -> None:
    async def play(running: Stage) -> None:
        crowd = await bursts(running, 1, connections=CONNECTIONS, warm=0)
        assert crowd.good, crowd

    _on("uvicorn-httptools", tmp_path, play)


@pytest.mark.timeout(60)
def test_faults_leave_nothing_and_nobody_warns(tmp_path: Path) -> None:
    async def play(running: Stage) -> None:
        crowd = await faults(running, 120, warm=0, connections=CONNECTIONS)
        assert crowd.good, crowd

    _on("uvicorn-h11", tmp_path, play, *STRICT)
