"""Deliveries to webhooks, signed as Replicate signs them.

Facts: the field `webhook` of the schema `prediction_request` in Replicate's OpenAPI document, Replicate's pages
"Receive webhooks" (only the last webhook is sent again, when it met no answer, a 4xx or a 5xx) and "Verify webhooks".
"""

from __future__ import annotations

import base64
import contextlib
import hmac
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
import httpx

from .clock import POLL, Clock
from .predictions import Event, Job
from .state import Account, new_id

ATTEMPTS = 3


@dataclass(frozen=True)
class Delivery:
    """One attempt at a delivery; `status` is None if there was no answer."""

    event: str
    url: str
    webhook_id: str
    attempt: int
    status: int | None
    body: bytes = field(repr=False)


def sign(secret: str, webhook_id: str, timestamp: str, body: bytes) -> str:
    """``v1,`` and base64 of HMAC-SHA256 over ``id.timestamp.body``, keyed with the decoded part after ``whsec_``."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return f"v1,{base64.b64encode(hmac.digest(key, f'{webhook_id}.{timestamp}.'.encode() + body, 'sha256')).decode()}"


class Courier:
    """Delivers in the background for as long as `running` lasts; jobs made outside of it get no deliveries."""

    def __init__(
        self, clock: Clock, sent: list[Delivery], *, transport: httpx.AsyncBaseTransport | None, retry_delay: float
    ) -> None:
        self._clock = clock
        self._sent = sent
        self._transport = transport
        self._retry_delay = retry_delay
        self._client: httpx.AsyncClient | None = None
        self._start: Callable[[Account, Job], object] | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            self._start = lambda account, job: tasks.start_soon(self._follow, account, job)
            yield
            self._start = None
            tasks.cancel_scope.cancel()
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def deliver(self, account: Account, job: Job) -> None:
        """Deliver the events of `job` as they happen, if it has a webhook."""
        if job.webhook is not None and self._start is not None:
            self._start(account, job)

    async def _follow(self, account: Account, job: Job) -> None:
        done = 0
        while True:
            now, current = self._clock.now(), account.jobs(job.kind)[job.id]
            due = current.webhooks(now)
            for event in due[done:]:
                await self._send(account, current, event)
            done = len(due)
            if current.ended(now):
                return
            await anyio.sleep(POLL)

    async def _send(self, account: Account, job: Job, event: Event) -> None:
        body, webhook_id, url = json.dumps(job.as_json(event.at)).encode(), f"msg_{new_id()}", str(job.webhook)
        timestamp = str(int(event.at))
        headers = {
            "content-type": "application/json",
            "webhook-id": webhook_id,
            "webhook-timestamp": timestamp,
            "webhook-signature": sign(account.webhook_secret, webhook_id, timestamp, body),
        }
        if self._client is None:  # made late, since it loads certificates, which every fixture would wait for
            self._client = httpx.AsyncClient(transport=self._transport, trust_env=False, timeout=5)
        attempts = ATTEMPTS if event.name == "completed" else 1
        for attempt in range(1, attempts + 1):
            status = None
            with contextlib.suppress(Exception):  # of a given transport too: one delivery must not end them all
                status = (await self._client.post(url, content=body, headers=headers)).status_code
            self._sent.append(Delivery(event.name, url, webhook_id, attempt, status, body))
            if status is not None and status < 400:
                return
            if attempt < attempts:
                await anyio.sleep(self._retry_delay * 2 ** (attempt - 1))
