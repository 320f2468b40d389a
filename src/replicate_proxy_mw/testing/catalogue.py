"""What the fake Replicate offers from the start: models with a behaviour, versions, collections, hardware."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from .predictions import FakeFile, timestamp

EPOCH = 1_650_000_000.0  # creation of the seeded models, in seconds; fixed, so that lists sort alike in every run
HARDWARE = {  # hardware.list
    "cpu": "CPU",
    "gpu-t4": "Nvidia T4 GPU",
    "gpu-a40-small": "Nvidia A40 GPU",
    "gpu-a40-large": "Nvidia A40 (Large) GPU",
    "gpu-l40s": "Nvidia L40S GPU",
    "gpu-a100-large": "Nvidia A100 (80GB) GPU",
    "gpu-h100": "Nvidia H100 GPU",
}
COLLECTIONS = {  # slug: name, description, models
    "language-models": ("Language models", "Models that write text.", ["meta/meta-llama-3-8b-instruct"]),
    "super-resolution": ("Super resolution", "Upscaling models that create high-quality images.", []),
    "text-to-image": ("Text to image", "Models that draw what you write.", ["black-forest-labs/flux-schnell"]),
}
_PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b550000000a49444154789c63680000008200"
    "8177cd72b60000000049454e44ae426082"
)


@dataclass(frozen=True, kw_only=True)
class FakeVersion:
    """A version of a model: `id` 64 hex digits, `created_at` seconds since the epoch."""

    id: str
    created_at: float
    cog_version: str | None = "0.16.7"


@dataclass(frozen=True, kw_only=True)
class FakeModel:
    """A model and what it does.

    - `run`: from the input to the output; must not block. A list is one output; a generator puts out chunk by
      chunk (give `streams` with it); an exception, also one in the midst of chunks, makes the prediction fail
      with its text. None: the model cannot run yet (created, but never trained).
    - `train`: called with the input of a training; an exception makes it fail. None: trainings succeed.
    - `official`: run by name, with ``version: "hidden"``; other models need a version, and get one by default.
    - `streams`: predictions have `urls.stream`.
    - `queue_time`, `run_time`: seconds; None takes those of the `FakeReplicate`.
    - `input_schema`: JSON Schema of the input, checked for what is required and for types: a wrong input is a 422.
    """

    owner: str
    name: str
    run: Callable[[Mapping[str, Any]], Any] | None = None
    train: Callable[[Mapping[str, Any]], Any] | None = None
    official: bool = False
    streams: bool = False
    queue_time: float | None = None
    run_time: float | None = None
    logs: tuple[str, ...] = ()
    input_schema: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    output_schema: Mapping[str, Any] = field(default_factory=dict)
    versions: tuple[FakeVersion, ...] | None = None
    examples: tuple[Mapping[str, Any], ...] = ()
    visibility: Literal["public", "private"] = "public"
    description: str | None = None
    readme: str | None = None
    github_url: str | None = None
    paper_url: str | None = None
    license_url: str | None = None
    weights_url: str | None = None
    cover_image_url: str | None = None
    run_count: int = 0
    created_at: float = EPOCH

    def __post_init__(self) -> None:
        if self.versions is None:
            made = hashlib.sha256(self.full_name.encode()).hexdigest()
            own = () if self.run is None or self.official else (FakeVersion(id=made, created_at=self.created_at),)
            object.__setattr__(self, "versions", own)

    @property
    def full_name(self) -> str:
        return f"{self.owner}/{self.name}"

    def version(self, version_id: str) -> FakeVersion | None:
        return next((version for version in self.versions or () if version.id == version_id), None)

    def version_json(self, version: FakeVersion) -> dict[str, Any]:
        """Schema `version_response`."""
        schemas = {
            "Input": {"title": "Input", **self.input_schema},
            "Output": {"title": "Output", **self.output_schema},
        }
        return {
            "id": version.id,
            "created_at": timestamp(version.created_at),
            "cog_version": version.cog_version,
            "openapi_schema": {"openapi": "3.0.2", "paths": {}, "components": {"schemas": schemas}},
        }

    def as_json(self) -> dict[str, Any]:
        """Schema `model_response`."""
        return {
            "url": f"https://replicate.com/{self.full_name}",
            "owner": self.owner,
            "name": self.name,
            "description": self.description,
            "visibility": self.visibility,
            "is_official": self.official,
            "github_url": self.github_url,
            "paper_url": self.paper_url,
            "license_url": self.license_url,
            "run_count": self.run_count,
            "cover_image_url": self.cover_image_url,
            "default_example": None,
            "latest_version": self.version_json(self.versions[0]) if self.versions else None,
        }


def _text(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": [name], "properties": {name: {"type": "string"}, **more}}


def _tokens(given: Mapping[str, Any]) -> Iterator[str]:
    words = f"You said: {given['prompt']}".split(" ")
    yield words[0]
    for word in words[1:]:
        yield f" {word}"


def _fail(given: Mapping[str, Any]) -> Any:
    raise ValueError("CUDA out of memory")


def seed() -> list[FakeModel]:
    """The models that are there from the start: enough of them for more than one page of 25."""
    return [
        FakeModel(
            owner="replicate",
            name="hello-world",
            description="A tiny model that says hello",
            readme="# Hello World Model\n\nThis is an example model that says hello.\n",
            github_url="https://github.com/replicate/cog-examples",
            run=lambda given: f"hello {given['text']}",
            logs=("saying hello",),
            input_schema=_text("text"),
            output_schema={"type": "string"},
            versions=(
                FakeVersion(
                    id="5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa",
                    created_at=EPOCH + 1000,
                    cog_version="0.3.0",
                ),
            ),
            examples=({"text": "Alice"},),
            run_count=5_681_081,
        ),
        FakeModel(
            owner="meta",
            name="meta-llama-3-8b-instruct",
            description="A language model that repeats what it is told",
            official=True,
            streams=True,
            run=_tokens,
            input_schema=_text("prompt", max_tokens={"type": "integer"}),
            output_schema={"type": "array", "items": {"type": "string"}, "x-cog-array-display": "concatenate"},
        ),
        FakeModel(
            owner="black-forest-labs",
            name="flux-schnell",
            description="Draws one grey pixel per output",
            official=True,
            run=lambda given: [FakeFile(_PIXEL, "image/png") for _ in range(given.get("num_outputs", 1))],
            input_schema=_text("prompt", num_outputs={"type": "integer", "minimum": 1, "maximum": 4}),
            output_schema={"type": "array", "items": {"type": "string", "format": "uri"}},
        ),
        FakeModel(owner="replicate", name="always-fails", description="Fails in every run", run=_fail, train=_fail),
        *(
            FakeModel(
                owner="replicate",
                name=f"echo-{number:02}",
                description="Gives its input back as JSON text",
                run=lambda given: json.dumps(dict(given)),
                created_at=EPOCH + number,
            )
            for number in range(26)
        ),
    ]
