"""The illustration desk of a magazine: writers ask for pictures, illustrators pick the requests up.

It was here before the proxy, with a lifespan, CORS, an error handler and a path below `/v1` of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from replicate_proxy_mw import KeyRequest, PermissionDenied, ProxyConfig, Rates, ReplicateKey, ReplicateProxyMiddleware
from replicate_proxy_mw.config import STREAM_HOSTS
from replicate_proxy_mw.devtools import TraceBuffer, TraceViewer
from replicate_proxy_mw.telemetry import SAMPLE_PRICES

# Samples, in US dollars: what a model costs is on its page at Replicate.
PRICES: dict[str, Rates | str] = {
    **SAMPLE_PRICES,
    "replicate/hello-world": "cpu",
    "meta/meta-llama-3-8b-instruct": Rates(per_input_token=0.05e-6, per_output_token=0.25e-6),
    "black-forest-labs/flux-schnell": Rates(per_output=0.003),
}


class NewPicture(BaseModel):
    article: str = Field(min_length=1, max_length=200)
    wish: str = Field(min_length=1, max_length=2000)


class Picture(NewPicture):
    id: int
    illustrator: str | None = None


@dataclass(frozen=True)
class Team:
    name: str
    may_generate: bool = True


@dataclass
class Desk:
    """What the desk knows; a database in a bigger house."""

    pictures: dict[int, Picture] = field(default_factory=dict)
    numbers: count[int] = field(default_factory=lambda: count(1))
    teams: dict[str, Team] = field(
        default_factory=lambda: {
            "pk-team-a": Team("team-a"),
            "pk-team-b": Team("team-b"),
            "pk-archive": Team("archive", may_generate=False),
        }
    )


class NoSuchPicture(Exception):
    def __init__(self, number: int) -> None:
        self.number = number


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.desk = Desk()
    yield
    app.state.desk = None


def the_desk(request: Request) -> Desk:
    desk: Desk = request.app.state.desk
    return desk


AtDesk = Annotated[Desk, Depends(the_desk)]


async def no_such_picture(request: Request, error: NoSuchPicture) -> JSONResponse:
    return JSONResponse({"error": "no_such_picture", "picture": error.number}, status_code=404)


def create_app(
    *, upstream: str, token: str, stream_hosts: Sequence[str] = STREAM_HOSTS, traces: TraceBuffer | None = None
) -> FastAPI:
    """The service. `upstream` is Replicate's API or a fake of it, with `/v1`; `token` is the one all teams share.

    `stream_hosts` are those of `upstream`'s streams. The requests in `traces` are shown at `/traces/`, to this machine.
    """
    app = FastAPI(
        title="Illustration desk",
        lifespan=lifespan,
        exception_handlers={NoSuchPicture: no_such_picture},
        # Of these FastAPI opens no spans of its own: the viewer asks each second, and a stream's path is a secret.
        telemetry={"exclude": lambda scope: scope["path"].startswith(("/traces", "/v1/-/streams/"))},
    )
    app.add_middleware(CORSMiddleware, allow_origins=["https://desk.example"], allow_methods=["GET", "POST"])

    @app.get("/pictures")
    async def pictures(desk: AtDesk) -> list[Picture]:
        return list(desk.pictures.values())

    @app.post("/pictures", status_code=201)
    async def ask(desk: AtDesk, new: NewPicture) -> Picture:
        picture = Picture(id=next(desk.numbers), **new.model_dump())
        desk.pictures[picture.id] = picture
        return picture

    @app.get("/pictures/{number}")
    async def picture(desk: AtDesk, number: int) -> Picture:
        if number not in desk.pictures:
            raise NoSuchPicture(number)
        return desk.pictures[number]

    @app.get("/v1/status")
    async def status(desk: AtDesk) -> dict[str, str | int]:
        return {"service": "illustration desk", "pictures": len(desk.pictures)}

    # What follows is all that the proxy needed.

    async def key_of_team(request: KeyRequest) -> ReplicateKey | None:
        team = app.state.desk.teams.get(request.api_key)
        if team is None:
            return None
        if not team.may_generate:
            raise PermissionDenied("This team reads the archive only.")
        return ReplicateKey(token, tenant=team.name)

    # Added last, so outermost: CORS above does not open /v1 to browsers, where a team's key has no place.
    app.add_middleware(
        ReplicateProxyMiddleware,
        key_resolver=key_of_team,
        config=ProxyConfig(
            upstream=upstream,
            exclude=["/v1/status"],
            proxy_streams=True,
            stream_key=secrets.token_urlsafe(32),  # several processes would need one that they share
            stream_hosts=stream_hosts,
        ),
        prices=PRICES,
    )
    if traces is not None:
        app.mount("/traces", TraceViewer(traces))
    return app
