"""`ReplicateProxyMiddleware`: which requests are ours, and one exchange, read top to bottom."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterable, Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import anyio

from . import ending, headers, portkey, routing
from .config import ProxyConfig
from .egress import Reply, complete, render
from .errors import (
    AnswerTimeout,
    BadRequest,
    ClientDisconnected,
    KeyMissing,
    Overloaded,
    ProxyError,
    UpstreamAborted,
    UpstreamFailed,
    UpstreamTimeout,
)
from .exchange import Chunks, Layer, ProxyRequest, nothing_to_close
from .ingress import RequestBody, in_time, too_late, while_connected
from .json_bodies import plainly
from .keys import KeyRequest, KeyResolver, resolve
from .layers.deadline import request_timeout
from .layers.in_flight import limit_in_flight
from .layers.links import are_rewritten, rewrite_links
from .layers.model_rules import check_models
from .layers.ownership import own_predictions
from .layers.recording import record_creations
from .layers.resend import resend
from .layers.unwrap import unwrap_data
from .layers.whole import whole_answers
from .policy import permit
from .store import Ledger, MemoryPredictionStore, PredictionStore
from .telemetry import Redact, RequestSpan, Telemetry
from .upstream import Upstream
from .via import Via

if TYPE_CHECKING:
    import httpx
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

    from .endpoints.streams import StreamEndpoint
    from .endpoints.webhooks import OnWebhook, WebhookEndpoint
    from .telemetry import Prices

logger = logging.getLogger("replicate_proxy_mw")

# Frameworks disagree about the types of scope and messages; asgiref's are used inside, none at the door.
ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]

# An endpoint of our own: what it does for a request before it is watched, and then. The path is handed over, not bound:
# that of a stream may be read by whoever has it, and a traceback shows what is bound.
_Own = Callable[[Mapping[str, Any], str, RequestBody, Reply, RequestSpan], Awaitable[Callable[[], Awaitable[None]]]]

_CLOSING = frozenset(("lifespan.shutdown.complete", "lifespan.shutdown.failed", "lifespan.startup.failed"))


class ReplicateProxyMiddleware:
    """Answers `/v1` and what lies below it from Replicate; everything else is the host's.

    Put it outermost: an app around it may end a cut answer as if it were complete (Starlette's `BaseHTTPMiddleware`).

    Args:
        app: the host.
        key_resolver: from the caller's key to the Replicate token to use.
        config: every other setting.
        transport: any `httpx.AsyncBaseTransport`; never closed here. By default one is opened for each event loop at
            its first request, and closed with the host's lifespan. httpx's own gives what is left over of an answer to
            the next request, which may be another tenant's; ours closes such a connection.
        layers: what requests pass on their way to Replicate, outermost first.
        store: what is known of predictions beyond a request; by default in the memory of this process.
        prices: what predictions cost, by model, deployment or hardware: a table, or an async callable.
        on_webhook: what takes Replicate's deliveries, once their signature is verified (`webhook_secrets`). It may get
            one twice, and knows it by its id.
        redact: with `capture_content`, from the path and value of each leaf of an input or output to what is shown.
        tracer_provider: where spans go; by default OpenTelemetry's global one.
        meter_provider: where metrics go, likewise.

    Raises:
        ValueError: an argument is not what it should be; the text names it.
    """

    def __init__(
        self,
        app: ASGIApp,
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
    ) -> None:
        self.app = app
        self._config = config = config or ProxyConfig()
        self._prefix = config.prefix
        self._decoded_prefix = unquote(config.prefix)
        self._in_flight = self._under_way = 0
        self._key_resolver = key_resolver
        self._forward_headers = frozenset(name.lower().encode() for name in config.forward_headers)
        ledger = Ledger(MemoryPredictionStore() if store is None else store, timeout=config.store_timeout)
        self._telemetry = Telemetry(
            prefix=config.prefix,
            upstream=config.upstream,
            trust_traceparent=config.trust_traceparent,
            propagate_upstream=config.propagate_upstream,
            ledger=ledger,
            prices=prices,
            capture_content=config.capture_content,
            redact=redact,
            tracer_provider=tracer_provider,
            meter_provider=meter_provider,
        )
        self._via = Via(upstream=config.upstream, prefix=config.prefix)
        self._upstream = Upstream(config, transport)
        self._stream_hosts = Upstream(replace(config, max_connections=config.max_streams), transport)
        self._streams = self._stream_endpoint()
        self._webhooks = self._webhook_endpoint(on_webhook, ledger)
        self._forward = self._telemetry.attempts(self._upstream.forward)
        for layer in reversed(self._layers(layers, ledger)):
            self._forward = layer(self._forward)

    def _stream_endpoint(self) -> StreamEndpoint | None:
        config = self._config
        if not config.proxy_streams or config.stream_key is None:
            return None
        from .endpoints.streams import StreamEndpoint  # here, since few hosts have it

        return StreamEndpoint(
            key=config.stream_key,
            lifetime=config.stream_lifetime,
            hosts=config.stream_hosts,
            send=self._stream_hosts.send,
            timeout=self._stream_hosts.timeout | {"read": config.stream_timeout},
        )

    def _webhook_endpoint(self, on_webhook: OnWebhook | None, ledger: Ledger) -> WebhookEndpoint | None:
        config = self._config
        if not config.webhook_secrets:
            if on_webhook is not None:
                raise ValueError("on_webhook: needs webhook_secrets, since strangers can send to it")
            return None
        from .endpoints.webhooks import WebhookEndpoint  # here, since few hosts have it

        return WebhookEndpoint(
            secrets=config.webhook_secrets,
            on_event=on_webhook,
            timeout=config.webhook_timeout,
            # Nobody else looks into this process, and deliveries would take the room of predictions.
            ledger=None if ledger.in_memory else ledger,
        )

    def _layers(self, of_the_host: Sequence[Layer], ledger: Ledger) -> list[Layer]:
        """From the outside in. The host's own see bodies unwrapped and links as Replicate wrote them, and only what
        the key's policy lets pass."""
        config = self._config
        outer = [request_timeout, *([unwrap_data] if config.unwrap_data else [])]
        links = rewrite_links(
            upstream=config.upstream,
            prefix=config.prefix,
            public_url=config.public_url,
            stream_path=self._streams.path_for if self._streams else None,
        )
        rules = [limit_in_flight, check_models(lookup_versions=config.lookup_versions), own_predictions(ledger)]
        inner = [record_creations(ledger), whole_answers, resend(attempts=config.safe_retries)]
        return [*outer, links, *rules, *of_the_host, *inner]

    # A plain function that returns a coroutine would be taken for ASGI 2 by uvicorn and hypercorn.
    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            # A quick no for the host's own requests, each of which passes here: the decoded path says enough for that.
            path, prefix, root = scope["path"], self._decoded_prefix, scope.get("root_path")
            if path.startswith(prefix) or (root and prefix in path):
                claimed = self._claim(scope)
                if claimed is not None:
                    below, repaired = claimed
                    body = RequestBody(receive, timeout=self._config.body_timeout)
                    reply = Reply(send, method=scope["method"])
                    afterwards: list[Callable[[], Awaitable[None]]] = []
                    self._under_way += 1
                    try:
                        await self._exchange(scope, below, body, reply, afterwards, repaired=repaired)
                    finally:
                        try:
                            if afterwards:
                                await ending.run(afterwards)
                        finally:
                            self._under_way -= 1
                    return
        elif scope["type"] == "lifespan":
            receive, send = self._ending(receive), self._closing(send)
        await self.app(scope, receive, send)

    async def aclose(self) -> None:
        """Close the connections of this event loop: for hosts that have no lifespan. Those in use close with their
        requests."""
        await self._upstream.aclose()
        await self._stream_hosts.aclose()

    async def ended(self) -> None:
        """Return when no request is under way, or after 10 seconds: for hosts that have no lifespan, before they close
        what requests use. Not to be called within a request."""
        await self._ended(anyio.current_time() + ending.AFTERWARDS_TIMEOUT)

    async def _ended(self, deadline: float) -> None:
        with anyio.CancelScope(deadline=deadline):
            while self._under_way:  # noqa: ASYNC110 - they may be of several event loops
                await anyio.sleep(0.01)

    def _ending(self, receive: Any) -> Any:
        held: list[tuple[Any, float]] = []

        async def when_all_have_ended() -> Any:
            if not held:
                message = await receive()
                # uvicorn says so as soon as it has cancelled what was left: the host would close its telemetry and
                # stores under what still has to be told and kept.
                if message["type"] != "lifespan.shutdown":
                    return message
                held.append((message, anyio.current_time() + ending.AFTERWARDS_TIMEOUT))
            # A host that does not wait for so long asks again.
            message, deadline = held[0]
            await self._ended(deadline)
            held.clear()
            return message

        return when_all_have_ended

    def _closing(self, send: Any) -> Any:
        async def closing(message: Any) -> None:
            # Before the server hears of it, since it then stops the event loop.
            if message["type"] in _CLOSING:
                await self.aclose()
            await send(message)

        return closing

    def _claim(self, scope: Mapping[str, Any]) -> tuple[str, bool] | None:
        """The path below the prefix and whether it had to be repaired, None if the request is the host's."""
        path = routing.path_of(scope)
        if not path.startswith(self._prefix):
            return None
        below = path[len(self._prefix) :]
        meant = routing.meant(scope["method"], below, scope["headers"])
        if meant is None or routing.is_excluded((path, self._prefix + meant), self._config.exclude):
            return None
        return meant, meant != below

    async def _exchange(
        self,
        scope: Mapping[str, Any],
        path: str,
        body: RequestBody,
        reply: Reply,
        afterwards: list[Callable[[], Awaitable[None]]],
        *,
        repaired: bool,
    ) -> None:
        route, own = self._route(scope, path)
        with self._telemetry.request(scope, route, afterwards) as span:
            body.waiting = reply.waiting = span.waiting
            failure: Exception | None = None
            try:
                if self._in_flight >= self._config.max_in_flight:
                    raise Overloaded(f"max_in_flight: {self._in_flight} requests are under way; try again.")
                self._in_flight += 1
                try:
                    begun: Awaitable[Callable[[], Awaitable[None]]]
                    if own is None:
                        begun = self._admit(scope, path, route, body, reply, span, afterwards, repaired)
                    else:
                        begun = own(scope, path, body, reply, span)
                    seconds, deadline = self._config.total_timeout, None
                    if seconds is not None:
                        deadline = anyio.current_time() + seconds
                        begun = in_time(begun, seconds, partial(too_late, sent=False))
                    relay = await begun
                    await while_connected(
                        body, relay, ending=reply.is_ending, starting=reply.is_starting, deadline=deadline
                    )
                finally:
                    self._in_flight -= 1
            except Exception as error:
                failure = error
            try:
                # Not within `except`: what the server's `send` raises would carry it along as its context.
                if failure is not None:
                    await self._refuse(failure, scope, body, reply, span)
            finally:
                span.status, span.complete = reply.status, reply.complete
                span.request_size, span.response_size = body.size, reply.size

    def _route(self, scope: Mapping[str, Any], path: str) -> tuple[routing.Route, _Own | None]:
        """Where a request goes, and what answers it if that is not Replicate's API."""
        if self._streams is not None and self._streams.is_meant(path):
            return routing.STREAM, partial(self._stream, self._streams)
        if self._webhooks is not None and path == routing.WEBHOOK.template:
            return routing.WEBHOOK, partial(self._webhook, self._webhooks)
        return routing.match(scope["method"], path), None

    async def _admit(
        self,
        scope: Mapping[str, Any],
        path: str,
        route: routing.Route,
        body: RequestBody,
        reply: Reply,
        span: RequestSpan,
        afterwards: list[Callable[[], Awaitable[None]]],
        repaired: bool,
    ) -> Callable[[], Awaitable[None]]:
        """All that is decided before anything goes up. The key is resolved before a byte of body is read, so that a
        refusal costs the caller no upload."""
        via = self._via.up(scope)
        target = routing.check(scope["method"], path, scope["query_string"])
        caller = portkey.read(scope["headers"])
        span.caller(caller)
        kept = headers.up(scope["headers"], self._forward_headers)
        if are_rewritten(route, scope["method"]):
            kept = plainly(kept)
        declared = headers.length(scope["headers"])
        if caller.api_key is None and self._config.require_key:
            raise KeyMissing()
        key = await resolve(
            self._key_resolver,
            KeyRequest(
                api_key=caller.api_key or "",
                provider=caller.provider,
                caller_token=caller.caller_token,
                virtual_key=caller.virtual_key,
                config=caller.config,
                metadata=caller.metadata or {},
                operation=route.operation,
                model=route.model,
                method=scope["method"],
                path=path,
                client=scope["client"][0] if scope.get("client") else None,
                scope=scope,
            ),
            seconds=self._config.resolver_timeout,
        )
        span.resolved(key)
        permit(key.policy, route, path)
        await body.begin(declared, limit=self._config.max_body_size)
        whole = body.whole()
        length = declared if whole is None else len(whole)
        content: AsyncIterable[bytes] = body if whole is None else Chunks([whole])
        if scope["method"] in ("GET", "HEAD"):
            # Portkey's asynchronous SDK sends `{}` along; content has no meaning there (RFC 9110, section 9.3.1).
            body.abandon()
            content, kept, length = Chunks([]), headers.without_content(kept), 0
        request = ProxyRequest(
            method=scope["method"],
            target=target,
            route=route,
            headers=kept,
            body=content,
            content_length=length,
            key=key,
            portkey=caller,
            scope=scope,
            repaired_path=repaired,
            via=(via,),
            traceparent=span.traceparent,
            notes=span.notes,
            afterwards=afterwards,
        )
        return partial(self._relay, request, body, reply, span.id)

    async def _relay(self, request: ProxyRequest, body: RequestBody, reply: Reply, request_id: str) -> None:
        try:
            response = await self._forward(request)
            if response.aclose is not nothing_to_close and all(one.aclose != response.aclose for one in request.opened):
                # Of a layer's own making: what has come from Replicate is there already.
                request.opened.append(response)
            body.abandon()
            trace_id = request.portkey.trace_id or request_id
            await reply.relay(complete(response, method=request.method, trace_id=trace_id))
        finally:
            if request.opened:
                await ending.close(request.opened)

    async def _stream(
        self,
        streams: StreamEndpoint,
        scope: Mapping[str, Any],
        path: str,
        body: RequestBody,
        reply: Reply,
        span: RequestSpan,
    ) -> Callable[[], Awaitable[None]]:
        await body.begin()
        body.abandon()
        with suppress(BadRequest):  # what it says of itself; who may read is in the URL
            span.caller(portkey.read(scope["headers"]))
        stream = streams.find(path=path, method=scope["method"])
        kept = headers.up(scope["headers"])

        async def relay() -> None:
            response = await self._telemetry.stream(
                span,
                streams.fetch(stream, kept),
                host=stream.url.host,
                port=stream.url.port or 443,
                prediction_id=stream.id,
            )
            try:
                await reply.relay(complete(response, method=scope["method"], trace_id=span.id))
            finally:
                await ending.close([response])

        return relay

    async def _webhook(
        self,
        webhooks: WebhookEndpoint,
        scope: Mapping[str, Any],
        _path: str,
        body: RequestBody,
        reply: Reply,
        span: RequestSpan,
    ) -> Callable[[], Awaitable[None]]:
        await body.begin(headers.length(scope["headers"]))

        async def relay() -> None:
            response, payload = await webhooks.answer(method=scope["method"], headers=scope["headers"], body=body)
            self._telemetry.delivered(span, payload)
            await reply.relay(complete(response, method=scope["method"], trace_id=span.id))

        return relay

    async def _refuse(
        self, error: Exception, scope: Mapping[str, Any], body: RequestBody, reply: Reply, span: RequestSpan
    ) -> None:
        """Answer for `error`, or let it go where an answer is not ours to give or has begun already."""
        if body.failure is not None:
            raise body.failure
        if reply.status is not None and not isinstance(error, ClientDisconnected):
            raise AnswerTimeout() if isinstance(error, UpstreamTimeout) else error
        if isinstance(error, UpstreamAborted):
            error = UpstreamFailed()
        if not isinstance(error, ProxyError):
            logger.error("request failed: %s", type(error).__name__)
            error = ProxyError()
        span.refuse(error)
        if reply.status is None:
            # To a caller who has left, too: a host around us may insist on an answer.
            answer, trace_id = render(error, request_id=span.id), (span.portkey and span.portkey.trace_id) or span.id
            with suppress(ClientDisconnected):
                await reply.relay(complete(answer, method=scope["method"], trace_id=trace_id))
