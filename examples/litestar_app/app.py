"""The illustration desk of a magazine: writers ask for pictures, illustrators pick the requests up.

It was here before the proxy, with a lifespan, CORS, an error handler and a path below `/v1` of its own.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Annotated, Any

from litestar import Litestar, Request, Response, asgi, get, post
from litestar.config.cors import CORSConfig
from litestar.datastructures import State
from litestar.params import FromPath, JSONBody
from msgspec import Meta, Struct

from replicate_proxy_mw import KeyRequest, PermissionDenied, ProxyConfig, Rates, ReplicateKey
from replicate_proxy_mw.config import STREAM_HOSTS
from replicate_proxy_mw.devtools import TraceBuffer, TraceViewer
from replicate_proxy_mw.litestar import ReplicateProxyPlugin
from replicate_proxy_mw.telemetry import SAMPLE_PRICES

# Samples, in US dollars: what a model costs is on its page at Replicate.
PRICES: dict[str, Rates | str] = {
    **SAMPLE_PRICES,
    "replicate/hello-world": "cpu",
    "meta/meta-llama-3-8b-instruct": Rates(per_input_token=0.05e-6, per_output_token=0.25e-6),
    "black-forest-labs/flux-schnell": Rates(per_output=0.003),
}


class NewPicture(Struct):
    article: Annotated[str, Meta(min_length=1, max_length=200)]
    wish: Annotated[str, Meta(min_length=1, max_length=2000)]


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
async def lifespan(app: Litestar) -> AsyncIterator[None]:
    app.state.desk = Desk()
    yield
    del app.state.desk


def no_such_picture(request: Request[Any, Any, Any], error: NoSuchPicture) -> Response[Any]:
    return Response({"error": "no_such_picture", "picture": error.number}, status_code=404)


@get("/pictures")
async def pictures(state: State) -> list[Picture]:
    return list(state.desk.pictures.values())


@post("/pictures")
async def ask(state: State, data: JSONBody[NewPicture]) -> Picture:
    picture = Picture(id=next(state.desk.numbers), article=data.article, wish=data.wish)
    state.desk.pictures[picture.id] = picture
    return picture


@get("/pictures/{number:int}")
async def picture(state: State, number: FromPath[int]) -> Picture:
    if number not in state.desk.pictures:
        raise NoSuchPicture(number)
    found: Picture = state.desk.pictures[number]
    return found


@get("/v1/status")
async def status(state: State) -> dict[str, str | int]:
    return {"service": "illustration desk", "pictures": len(state.desk.pictures)}


def create_app(
    *, upstream: str, token: str, stream_hosts: Sequence[str] = STREAM_HOSTS, traces: TraceBuffer | None = None
) -> Litestar:
    """The service. `upstream` is Replicate's API or a fake of it, with `/v1`; `token` is the one all teams share.

    `stream_hosts` are those of `upstream`'s streams. The requests in `traces` are shown at `/traces/`, to this machine.
    """

    # What the proxy needed: this resolver, prices and `plugins`.
    async def key_of_team(request: KeyRequest) -> ReplicateKey | None:
        team = app.state.desk.teams.get(request.api_key)
        if team is None:
            return None
        if not team.may_generate:
            raise PermissionDenied("This team reads the archive only.")
        return ReplicateKey(token, tenant=team.name)

    config = ProxyConfig(
        upstream=upstream,
        proxy_streams=True,
        stream_key=secrets.token_urlsafe(32),  # several processes would need one that they share
        stream_hosts=stream_hosts,
    )
    app = Litestar(
        route_handlers=[pictures, ask, picture, status],
        lifespan=[lifespan],
        exception_handlers={NoSuchPicture: no_such_picture},
        cors_config=CORSConfig(allow_origins=["https://desk.example"], allow_methods=["GET", "POST"]),
        plugins=[ReplicateProxyPlugin(key_resolver=key_of_team, config=config, prices=PRICES)],
    )
    if traces is not None:
        app.register(asgi("/traces", is_mount=True, copy_scope=True)(TraceViewer(traces)))
    return app
