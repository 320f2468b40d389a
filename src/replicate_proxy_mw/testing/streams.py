"""The second origin: Server-Sent Events of predictions, and the files models put out.

Replicate serves these from other hosts than its API (stream.replicate.com, replicate.delivery); the opaque part of
the URL is all the permission that is needed, a token sent along is ignored. The event names are those Replicate's
clients know (``output``, ``logs``, ``error``, ``done``); the format is that of the HTML standard.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from .clock import until
from .predictions import Event, Job
from .problems import problem
from .state import Account, World

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


async def answer(world: World, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer one request to the stream origin."""
    request = Request(scope, receive)
    match scope["method"], scope["path"].split("/"):
        case "GET", ["", "v1", "files", opaque] if opaque in world.streams:
            lines = _lines(world, *world.streams[opaque], request)
            await _Unwatched(lines, headers={"cache-control": "no-store"}, media_type="text/event-stream")(
                scope, receive, send
            )
        case "GET", ["", "files", job_id, number] if number.isdecimal():
            await _output_file(world, job_id, int(number))(scope, receive, send)
        case _:
            await problem(404).response()(scope, receive, send)


def _output_file(world: World, job_id: str, number: int) -> Response:
    now = world.clock.now()
    for account in world.accounts.values():
        job = account.predictions.get(job_id)
        if job and number < len(job.files()) and job.output_complete(now) and not job.as_json(now)["data_removed"]:
            file = job.files()[number]
            return Response(file.content, media_type=file.media_type)
    return problem(404).response()


class _Unwatched(StreamingResponse):
    """Sends what it is given; the one reader of `receive` is the iterator itself."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.stream_response(send)


async def _lines(world: World, account: Account, job_id: str, request: Request) -> AsyncIterator[str]:
    seen, last = 0, request.headers.get("last-event-id")
    skipping = last is not None

    def news() -> list[Event]:
        return account.predictions[job_id].events(world.clock.now())[seen:]

    while True:
        here = await until(lambda: world.closing or bool(news()), request.receive)
        if world.closing or not here:
            return
        for event in news():
            event_id = f"{int(event.at)}:{seen}"
            seen += 1
            if not skipping or event.name == "completed":
                yield _message(account.predictions[job_id], event, event_id)
            skipping = skipping and event_id != last
            if event.name == "completed":
                return


def _message(job: Job, event: Event, event_id: str) -> str:
    if event.name == "start":
        return ""
    if event.name != "completed":
        return _event(event.name, event_id, str(event.data))
    status = job.status(event.at)
    if status == "failed":
        error = _event("error", f"{event_id}-error", json.dumps({"detail": job.error}))
        return error + _event("done", event_id, '{"reason":"error"}')
    return _event("done", event_id, "{}" if status == "succeeded" else '{"reason":"canceled"}')


def _event(name: str, event_id: str, data: str) -> str:
    lines = "".join(f"data: {line}\n" for line in data.split("\n"))
    return f"event: {name}\nid: {event_id}\n{lines}\n"
