"""The life of a prediction or a training, as a pure function of time.

Nothing happens to a `Job` by itself: what it shows at a moment follows from its timestamps. Facts are from the
schemas `prediction_response` and `training_response` of Replicate's OpenAPI document and the descriptions of
the operations `predictions.get` and `predictions.create`, unless another source is named.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

Status: TypeAlias = Literal["starting", "processing", "succeeded", "failed", "canceled", "aborted"]
WEBHOOK_EVENTS = ("start", "output", "logs", "completed")
RETENTION = 3600.0  # seconds after which input, output and logs of an API prediction are removed
THROTTLE = 0.5  # seconds at least between two webhooks for output or logs


@dataclass(frozen=True)
class FakeFile:
    """A file a model puts out: an URL in a prediction, a ``data:`` URI in the answer of a sync create."""

    content: bytes = field(repr=False)
    media_type: str = "application/octet-stream"

    @property
    def data_uri(self) -> str:
        return f"data:{self.media_type};base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Event:
    """Something that happened to a job: `at` seconds since the epoch, `data` the new chunk or log line."""

    at: float
    name: Literal["start", "output", "logs", "completed"]
    data: Any = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """A prediction or a training. Times are seconds, timestamps seconds since the epoch.

    `chunks` are the parts a streaming model puts out one by one (otherwise one part, the whole output), the last
    of them after nine tenths of `run_time`; `logs` are lines spread over it. `error` makes it fail at its end.
    """

    id: str
    kind: Literal["predictions", "trainings"]
    model: str
    version: str
    input: Mapping[str, Any]
    created_at: float
    queue_time: float
    run_time: float
    chunks: tuple[Any, ...] = ()
    streams: bool = False
    error: str | None = None
    logs: tuple[str, ...] = ()
    deployment: str | None = None
    deadline: float | None = None
    canceled_at: float | None = None
    webhook: str | None = None
    webhook_events_filter: Sequence[str] | None = None
    source: Literal["api", "web"] = "api"
    urls: Mapping[str, str] = field(default_factory=dict)
    files_url: str = ""

    @property
    def started_at(self) -> float:
        return self.created_at + self.queue_time

    @property
    def stopped_at(self) -> float | None:
        """When it was cancelled or ran into its deadline, if that came before its own end."""
        end = self.started_at + self.run_time
        return min((at for at in (self.canceled_at, self.deadline) if at is not None and at < end), default=None)

    @property
    def ended_at(self) -> float:
        stopped = self.stopped_at
        return self.started_at + self.run_time if stopped is None else stopped

    def ended(self, now: float) -> bool:
        return now >= self.ended_at

    def status(self, now: float) -> Status:
        """`aborted` is a deadline before the start; a user's cancel is `canceled` at any time (recorded)."""
        if not self.ended(now):
            return "processing" if now >= self.started_at else "starting"
        if self.stopped_at is not None:
            early = self.stopped_at < self.started_at and self.stopped_at != self.canceled_at
            return "aborted" if early else "canceled"
        return "succeeded" if self.error is None else "failed"

    def events(self, now: float) -> list[Event]:
        """What has happened up to `now`, in order. What has happened does not change any more."""
        found = [Event(self.started_at, "start")] if self.ended_at >= self.started_at else []
        for index, line in enumerate(self.logs):
            found.append(Event(self.started_at + self.run_time * index / len(self.logs), "logs", line))
        for index, chunk in enumerate(self.chunks, 1):
            found.append(Event(self.started_at + self.run_time * 0.9 * index / len(self.chunks), "output", chunk))
        found = sorted((event for event in found if event.at <= self.ended_at), key=lambda event: event.at)
        return [event for event in (*found, Event(self.ended_at, "completed")) if event.at <= now]

    def webhooks(self, now: float) -> list[Event]:
        """The events due for delivery: those asked for; output and logs at most once in half a second."""
        wanted = ("output", "completed") if self.webhook_events_filter is None else self.webhook_events_filter
        due: list[Event] = []
        last: dict[str, float] = {}
        for event in self.events(now):
            if event.name not in wanted:
                continue
            if event.name in ("output", "logs"):
                if event.at - last.get(event.name, float("-inf")) < THROTTLE:
                    continue
                last[event.name] = event.at
            due.append(event)
        return due

    def output_complete(self, now: float) -> bool:
        return not self.error and sum(event.name == "output" for event in self.events(now)) == len(self.chunks)

    def files(self) -> list[FakeFile]:
        """The files in its output, in order."""
        return [part for chunk in self.chunks for part in _parts(chunk) if isinstance(part, FakeFile)]

    def metrics(self) -> dict[str, float]:
        """Of a job that has ended. Token counts for models that stream text, as seen in recorded answers."""
        found = {"total_time": round(self.ended_at - self.created_at, 6)}
        if self.stopped_at is None or self.stopped_at >= self.started_at:
            seconds = self.ended_at - self.started_at
            found["predict_time"] = round(seconds, 6)
            if self.streams:
                moments = [event.at for event in self.events(self.ended_at) if event.name == "output"]
                found["input_token_count"] = len(str(self.input.get("prompt", "")).split())
                found["output_token_count"] = len(moments)
                found["tokens_per_second"] = round(len(moments) / seconds, 6) if seconds else 0.0
                if moments:
                    found["time_to_first_token"] = round(moments[0] - self.started_at, 6)
        return found

    def as_json(self, now: float, *, sync: bool = False) -> dict[str, Any]:
        """What the API shows at `now`.

        `sync`: as the answer of a create with ``Prefer: wait``. Files are then inside as ``data:`` URIs, sent as
        soon as all are there and so still `processing` and without metrics (recorded; Replicate's page "Create a
        prediction"). A wait that ran out shows `starting` (`predictions.create`).
        """
        events, ended, removed = self.events(now), self.ended(now), now >= self.ended_at + RETENTION
        status = self.status(now)
        early = sync and (not ended or bool(self.files())) and self.output_complete(now)
        if sync and not ended and not early:
            events, status = [], "starting"
        if early:
            ended, status = False, "processing"
        chunks = [event.data for event in events if event.name == "output"]
        output: Any = None if removed or not chunks else chunks if self.streams else chunks[0]
        body: dict[str, Any] = {
            "id": self.id,
            "model": self.model,
            "version": self.version,
            "input": {} if removed else self.input,
            "logs": "" if removed else "".join(event.data + "\n" for event in events if event.name == "logs"),
            "output": self._linked(output, sync),
            "data_removed": removed,
            "error": self.error if status == "failed" else None,
            "source": self.source,
            "status": status,
            "created_at": timestamp(self.created_at),
            "urls": dict(self.urls),
        }
        if self.kind == "trainings":
            del body["data_removed"]
            if output is None:  # an object or absent, unlike a prediction's
                del body["output"]
        if status != "starting" and any(event.name == "start" for event in events):
            body["started_at"] = timestamp(self.started_at)
        if ended:
            body["completed_at"] = timestamp(self.ended_at)
            body["metrics"] = self.metrics()
        for name in ("deployment", "webhook", "webhook_events_filter"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        if self.deadline is not None:
            body["deadline"] = timestamp(self.deadline)
        return body

    def _linked(self, output: Any, inline: bool) -> Any:
        number = itertools.count()

        def link(value: Any) -> Any:
            if isinstance(value, FakeFile):
                return value.data_uri if inline else f"{self.files_url}/{self.id}/{next(number)}"
            return [link(item) for item in value] if isinstance(value, list) else value

        return link(output)


def _parts(chunk: Any) -> list[Any]:
    return chunk if isinstance(chunk, list) else [chunk]


def outcome(run: Callable[[Mapping[str, Any]], Any], given: Mapping[str, Any]) -> tuple[tuple[Any, ...], str | None]:
    """Run a model's function: its chunks, and the error it raised if any (after the chunks it had yielded)."""
    chunks: list[Any] = []
    try:
        result = run(given)
        if isinstance(result, (str, bytes, list, dict)) or not hasattr(result, "__iter__"):
            chunks.append(result)
        else:
            for chunk in result:
                chunks.append(chunk)
    except Exception as exc:
        return tuple(chunks), str(exc) or type(exc).__name__
    return tuple(chunks), None


def timestamp(at: float) -> str:
    """RFC 3339 in UTC with microseconds, as Replicate writes it."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def prefer_wait(header: str) -> float | None:
    """Seconds of a `Prefer` header by the document's pattern (60 without a number, 60 at most), or None."""
    match = re.fullmatch(r"wait(?:=([1-9][0-9]?))?", header)
    return match and min(float(match[1] or 60), 60.0)


def duration(header: str) -> float | None:
    """Seconds of a `Cancel-After` header like ``30``, ``5m`` or ``1h30m45s``; None if not one, or below 5 s."""
    match = re.fullmatch(r"(?=[0-9])(?:([0-9]{1,6})h)?(?:([0-9]{1,6})m)?(?:([0-9]{1,6})s?)?", header, re.ASCII)
    if match is None:
        return None
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = float(hours * 3600 + minutes * 60 + seconds)
    return total if total >= 5 else None
