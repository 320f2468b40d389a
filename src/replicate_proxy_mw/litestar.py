"""`ReplicateProxyPlugin`: the middleware as a Litestar plugin, for apps that want CLI, guards and CORS around it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from litestar import Litestar
from litestar.exceptions import ImproperlyConfiguredException, NotFoundException
from litestar.handlers import ASGIRouteHandler
from litestar.plugins import InitPlugin, ReceiveRoutePlugin
from litestar.routes import BaseRoute
from litestar.types import Receive, Scope, Send

from . import routing
from .config import ProxyConfig
from .exchange import Layer
from .keys import KeyResolver
from .middleware import ReplicateProxyMiddleware

if TYPE_CHECKING:
    import httpx
    from litestar.config.app import AppConfig
    from litestar.types import Guard
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from .endpoints.webhooks import OnWebhook
    from .store import PredictionStore
    from .telemetry import Prices, Redact


class ReplicateProxyPlugin(InitPlugin, ReceiveRoutePlugin):
    """Mounts the proxy at its prefix. Takes the keywords of `ReplicateProxyMiddleware`, and `guards` for the mount.

    A mount, since Litestar's `middleware=[...]` sees neither paths that are not registered nor the lifespan. Routes of
    the host below the prefix (`/v1/own`) stay the host's, without `exclude`. List a route there that Replicate has too:
    the form in which Node's SDKs may send it (`/v1predictions`) would be repaired.

    Raises:
        ImproperlyConfiguredException: the prefix is empty; or, at start-up, a route of the host begins with the
            prefix but not at a segment (`/v1beta`): Litestar would hand its requests to the mount.
    """

    __slots__ = ("_config", "_guards", "_keywords", "_middleware", "_prefix")

    def __init__(
        self,
        *,
        key_resolver: KeyResolver,
        config: ProxyConfig | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        layers: Sequence[Layer] = (),
        store: PredictionStore | None = None,
        prices: Prices | None = None,
        on_webhook: OnWebhook | None = None,
        redact: Redact | None = None,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        guards: Sequence[Guard] = (),
    ) -> None:
        self._config = config or ProxyConfig()
        if not self._config.prefix:
            raise ImproperlyConfiguredException(
                "a mount needs a prefix: wrap the app in ReplicateProxyMiddleware instead"
            )
        self._guards = guards
        self._keywords: dict[str, Any] = {
            "key_resolver": key_resolver,
            "transport": transport,
            "layers": layers,
            "store": store,
            "prices": prices,
            "on_webhook": on_webhook,
            "redact": redact,
            "tracer_provider": tracer_provider,
            "meter_provider": meter_provider,
        }

    def on_app_init(self, app_config: AppConfig) -> AppConfig:
        # Litestar puts its own `path` before that of every route, the mount's too.
        above = app_config.path.rstrip("/")
        config = replace(
            self._config,
            prefix=above + self._config.prefix,
            exclude=[above + path for path in self._config.exclude],
        )
        self._prefix = config.prefix
        self._middleware = ReplicateProxyMiddleware(_not_ours, config=config, **self._keywords)

        async def proxy(scope: Scope, receive: Receive, send: Send) -> None:
            await self._middleware({**scope, "path": self._path(scope)}, receive, send)

        mount = ASGIRouteHandler(self._config.prefix, is_mount=True, copy_scope=True, guards=self._guards)
        app_config.route_handlers.append(mount(proxy))
        app_config.lifespan.append(self._lifespan)
        return app_config

    def receive_route(self, route: BaseRoute) -> None:
        if route.path.startswith(self._prefix) and not routing.within(route.path, self._prefix):
            raise ImproperlyConfiguredException(
                f"route {route.path!r} begins with the proxy's prefix {self._prefix!r}, whose mount would take its "
                "requests: rename one of them, or wrap the app in ReplicateProxyMiddleware instead"
            )

    def _path(self, scope: Any) -> str:
        """The path before Litestar took the prefix off, collapsed slashes and appended one."""
        raw_path: bytes | None = scope.get("raw_path")
        if raw_path is None:
            return self._prefix + str(scope["path"]).removesuffix("/")
        return unquote(raw_path.decode("latin-1"))

    @asynccontextmanager
    async def _lifespan(self, app: Litestar) -> AsyncIterator[None]:
        yield
        # Litestar's own ends after this: stores and telemetry are still open.
        await self._middleware.ended()
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections of this event loop. Litestar's lifespan does so by itself."""
        await self._middleware.aclose()


async def _not_ours(scope: Any, receive: Receive, send: Send) -> None:
    """What Litestar's mount takes without being below the prefix (`/v1beta`), and websockets."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1000, "reason": ""})
    else:
        raise NotFoundException()
