"""What the fake Replicate remembers: accounts with their predictions, trainings, files and deployments."""

from __future__ import annotations

import base64
import hashlib
import hmac
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .catalogue import FakeModel, FakeVersion
from .clock import Clock
from .predictions import Job, timestamp

FILE_LIFETIME = 3600.0  # seconds, as in the example of the schema `file_response`


def new_id() -> str:
    """26 characters, like Replicate's."""
    return "".join(secrets.choice("abcdefghijklmnopqrstuvwxyz0123456789") for _ in range(26))


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    id: str
    name: str
    content: bytes = field(repr=False)
    media_type: str
    metadata: dict[str, Any]
    created_at: float

    def as_json(self, api_url: str) -> dict[str, Any]:
        """Schema `file_response`."""
        return {
            "id": self.id,
            "name": self.name,
            "content_type": self.media_type,
            "size": len(self.content),
            "etag": hashlib.md5(self.content, usedforsecurity=False).hexdigest(),
            "checksums": {"sha256": hashlib.sha256(self.content).hexdigest()},
            "metadata": self.metadata,
            "created_at": timestamp(self.created_at),
            "expires_at": timestamp(self.created_at + FILE_LIFETIME),
            "urls": {"get": f"{api_url}/files/{self.id}"},
        }


@dataclass(frozen=True, kw_only=True)
class Deployment:
    owner: str
    name: str
    model: str
    version: str
    hardware: str
    min_instances: int
    max_instances: int
    created_at: float
    number: int = 1

    def as_json(self, account: Account) -> dict[str, Any]:
        """Schema `deployment_response`."""
        return {
            "owner": self.owner,
            "name": self.name,
            "current_release": {
                "number": self.number,
                "model": self.model,
                "version": self.version,
                "created_at": timestamp(self.created_at),
                "created_by": account.as_json(),
                "configuration": {
                    "hardware": self.hardware,
                    "min_instances": self.min_instances,
                    "max_instances": self.max_instances,
                },
            },
        }


@dataclass(kw_only=True)
class Account:
    """What one user or organization owns. Nothing of it is visible to another account."""

    username: str
    webhook_secret: str = field(
        repr=False, default_factory=lambda: f"whsec_{base64.b64encode(secrets.token_bytes(24)).decode()}"
    )
    predictions: dict[str, Job] = field(default_factory=dict)
    trainings: dict[str, Job] = field(default_factory=dict)
    files: dict[str, StoredFile] = field(default_factory=dict)
    deployments: dict[str, Deployment] = field(default_factory=dict)

    def jobs(self, kind: Literal["predictions", "trainings"]) -> dict[str, Job]:
        return self.predictions if kind == "predictions" else self.trainings

    def as_json(self) -> dict[str, Any]:
        """The answer of `account.get`."""
        return {
            "type": "organization",
            "username": self.username,
            "name": f"{self.username.capitalize()} Corp, Inc.",
            "avatar_url": f"https://cdn.replicate.com/avatars/{self.username}.png",
            "github_url": f"https://github.com/{self.username}",
        }


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A version that a training adds to its destination once it has succeeded."""

    account: Account
    training: str
    base: str
    destination: str
    version: str


@dataclass(kw_only=True)
class World:
    """Everything there is. Changed by the thread that serves; other threads only look, and add models."""

    clock: Clock
    queue_time: float
    run_time: float
    page_size: int | None
    max_file_size: int
    stream_url: str
    models: dict[str, FakeModel]
    deliver: Callable[[Account, Job], None]
    accounts: dict[str, Account] = field(default_factory=dict)
    streams: dict[str, tuple[Account, str]] = field(default_factory=dict)
    promises: list[Promise] = field(default_factory=list)
    files_secret: bytes = field(repr=False, default_factory=lambda: secrets.token_bytes(32))
    closing: bool = False

    def settle(self) -> None:
        """Give the destinations of finished trainings their new versions, which run like the trained model."""
        now = self.clock.now()
        for promise in [*self.promises]:
            job = promise.account.trainings[promise.training]
            if not job.ended(now):
                continue
            self.promises.remove(promise)
            target, base = self.models.get(promise.destination), self.models.get(promise.base)
            if job.status(now) == "succeeded" and target is not None and base is not None:
                self.models[promise.destination] = replace(
                    target,
                    run=base.run,
                    streams=base.streams,
                    input_schema=base.input_schema,
                    output_schema=base.output_schema,
                    versions=(FakeVersion(id=promise.version, created_at=job.ended_at), *(target.versions or ())),
                )

    def model(self, full_name: str, account: Account) -> FakeModel | None:
        """A model this account may see."""
        found = self.models.get(full_name)
        return found if found and (found.visibility == "public" or found.owner == account.username) else None

    def signature(self, owner: str, file_id: str, expiry: str) -> str:
        """Of a download URL, by the description of the parameter `signature` of `files.download`."""
        digest = hmac.digest(self.files_secret, f"{owner} {file_id} {expiry}".encode(), "sha256")
        return base64.b64encode(digest).decode()
