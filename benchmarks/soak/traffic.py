"""What callers do all day, with faults in between."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field
from time import monotonic

from ..compare.scenarios import Wrong
from ..compare.traffic import BODY, ID
from .caller import Caller, Cut, head
from .upstream import EVENT, FAULTS

# As many of each in a hundred.
MIX = {"poll": 40, "create": 30, "list": 10, "stream": 10, "upload": 10}
SIZE = 64 << 10
LEAVING = "the caller leaves"


@dataclass
class Traffic:
    """Requests to one port, each answered as it should be or noted.

    Attributes:
        share: of faults.
        done: requests by kind.
        wrong: by what was wrong.
    """

    port: int
    share: float
    seed: int = 1
    done: Counter[str] = field(default_factory=Counter)
    wrong: Counter[str] = field(default_factory=Counter)

    async def run(self, number: int, *, concurrency: int, seconds: float = 0.0) -> None:
        """So many requests; spread over so much time if they take less."""
        started, todo = monotonic(), iter(range(number))

        async def worker(seed: int) -> None:
            chance = random.Random(seed)
            connection = None
            for each in todo:
                await asyncio.sleep(max(0.0, started + seconds * each / number - monotonic()))
                connection = await self._one(chance, connection or await Caller(self.port).__aenter__())
            if connection is not None:
                connection.leave()

        async with asyncio.TaskGroup() as workers:
            for each in range(concurrency):
                workers.create_task(worker(self.seed * 1000 + each))

    async def _one(self, chance: random.Random, caller: Caller) -> Caller | None:
        """One request; the connection if another can follow."""
        if chance.random() < self.share:
            kind = chance.choice([*FAULTS, LEAVING])
        else:
            kind = chance.choices(list(MIX), list(MIX.values()))[0]
        self.done[kind] += 1
        try:
            async with asyncio.timeout(30):
                if kind in FAULTS:
                    await _fault(caller, kind, chance)
                else:
                    await _PLAY[kind](caller, chance)
        except (Wrong, OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            self.wrong[f"{kind}: {error or type(error).__name__}"] += 1
        except Cut:
            self.wrong[f"{kind}: cut"] += 1
        else:
            if kind in MIX:
                return caller
        caller.leave(rudely=chance.random() < 0.5)
        return None


async def _poll(caller: Caller, chance: random.Random) -> None:
    asked = f"{chance.getrandbits(60):026d}"
    caller.ask("GET", f"/v1/predictions/{asked}")
    status, content = await caller.answer()
    if status != 200 or json.loads(content)["id"] != asked:
        raise Wrong(f"{status}, or another's")


async def _create(caller: Caller, chance: random.Random) -> None:
    caller.ask("POST", "/v1/predictions", BODY.encode())
    status, content = await caller.answer()
    if status != 201 or "input" not in json.loads(content):
        raise Wrong(str(status))


async def _list(caller: Caller, chance: random.Random) -> None:
    caller.ask("GET", "/v1/predictions")
    status, content = await caller.answer()
    if status != 200 or json.loads(content)["results"][0]["id"] != ID:
        raise Wrong(str(status))


async def _stream(caller: Caller, chance: random.Random) -> None:
    caller.ask("GET", "/v1/events?events=5&every=0.02")
    status, content = await caller.answer()
    if (status, content) != (200, EVENT * 5):
        raise Wrong(f"{status}, {len(content)} bytes")


async def _upload(caller: Caller, chance: random.Random) -> None:
    size = chance.randrange(1, SIZE)
    if chance.random() < 0.5:
        caller.ask("POST", "/v1/files", bytes(size))
    else:
        caller.send(head("POST", "/v1/files", 0, transfer_encoding="chunked"))
        caller.send(b"%x\r\n%b\r\n0\r\n\r\n" % (size, bytes(size)))
    status, content = await caller.answer()
    if status != 201 or json.loads(content)["size"] != size:
        raise Wrong(str(status))


async def _leave(caller: Caller, chance: random.Random) -> None:
    caller.ask(*chance.choice([("POST", "/v1/predictions?held=20"), ("GET", "/v1/events?events=20&every=1")]))
    await asyncio.sleep(chance.random() / 2)


async def _fault(caller: Caller, kind: str, chance: random.Random) -> None:
    post = chance.random() < 0.5
    path = "/v1/predictions" if post else "/v1/predictions/x"
    caller.ask("POST" if post else "GET", f"{path}?fault={kind}", BODY.encode() if post else b"")
    got: int | str
    try:
        got = (await caller.answer())[0]
    except Cut:
        got = "cut"
    if got not in FAULTS[kind].expected:
        raise Wrong(str(got))


_PLAY = {"poll": _poll, "create": _create, "list": _list, "stream": _stream, "upload": _upload, LEAVING: _leave}
