"""The request span around everything, and one span for each attempt to reach Replicate."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Literal
from urllib.parse import urlsplit

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, Span, SpanKind, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from ..errors import ClientDisconnected, ProxyError, UpstreamAborted
from ..exchange import Forward, ProxyRequest, ProxyResponse
from ..portkey import PortkeyContext
from ..routing import Route
from . import attributes, names

TrustTraceparent = Literal["parent", "link", "ignore"]

_PROPAGATOR = TraceContextTextMapPropagator()

# The request span above an attempt, which is several layers away from it.
_above: ContextVar[RequestSpan] = ContextVar("replicate_proxy_mw.request_span")


class Telemetry:
    """The spans of one middleware. Without an SDK in the process every call here is close to free."""

    def __init__(
        self,
        *,
        prefix: str,
        upstream: str,
        trust_traceparent: TrustTraceparent,
        tracer_provider: TracerProvider | None,
    ) -> None:
        self._prefix = prefix
        self._upstream = urlsplit(upstream)
        self._trust = trust_traceparent
        self._tracer = trace.get_tracer(
            "replicate_proxy_mw", version("replicate-proxy-mw"), tracer_provider, names.SCHEMA_URL
        )

    @contextmanager
    def request(self, scope: Mapping[str, Any], route: Route) -> Iterator[RequestSpan]:
        """The request span: SERVER, or INTERNAL below a span that the host has opened for the same request."""
        current = trace.get_current_span().get_span_context()
        local = current.is_valid and not current.is_remote
        parent, links = (None, ()) if local else self._caller(scope)
        template = self._prefix + route.template
        span = self._tracer.start_span(
            attributes.span_name(scope["method"], template),
            parent,
            SpanKind.INTERNAL if local else SpanKind.SERVER,
            {names.HTTP_REQUEST_METHOD: attributes.method(scope["method"]), names.HTTP_ROUTE: template},
            links,
        )
        if span.is_recording():
            span.set_attributes(attributes.of_scope(scope) | attributes.of_route(route))
            if route.is_secret:
                span.set_attribute(names.URL_PATH, template)
        observed = RequestSpan(span)
        above = _above.set(observed)
        with trace.use_span(span, record_exception=False, set_status_on_exception=False):
            try:
                yield observed
            except BaseException as error:
                observed.fail(error)
                raise
            finally:
                observed.finish()
                span.end()
                _above.reset(above)

    def _caller(self, scope: Mapping[str, Any]) -> tuple[Context | None, tuple[Link, ...]]:
        """The caller's own span, as a parent or as a link, as far as it is trusted."""
        if self._trust == "ignore":
            return None, ()
        carrier = {
            name.decode(): value.decode("latin-1")
            for name, value in scope["headers"]
            if name in (b"traceparent", b"tracestate")
        }
        if "traceparent" not in carrier:
            return None, ()
        context = _PROPAGATOR.extract(carrier, Context())
        if self._trust == "parent":
            return context, ()
        return None, (Link(trace.get_current_span(context).get_span_context()),)

    def attempts(self, forward: Forward) -> Forward:
        """The innermost layer: a CLIENT span for each request that is sent, until its answer's last byte."""

        async def attempt(request: ProxyRequest) -> ProxyResponse:
            span = self._tracer.start_span(
                attributes.span_name(request.method, self._upstream.path + request.route.template),
                kind=SpanKind.CLIENT,
            )
            above = _above.get(None)
            if above is not None:
                above.forwarded(request)
            if not span.is_recording():
                return await forward(request)
            span.set_attributes(attributes.of_attempt(request, self._upstream))
            sent = _Counted(request.body)
            observed = _Attempt(span, sent)
            try:
                with trace.use_span(span, record_exception=False, set_status_on_exception=False):
                    response = await forward(replace(request, body=sent))
            except BaseException as error:
                observed.end(error)
                raise
            return observed.answer(response)

        return attempt


class RequestSpan:
    """The request span while it is open. What is not known yet when it ends is absent.

    Attributes:
        id: the trace id in hex, or a random one where there is no trace: what a caller can report.
        portkey_trace_id: the caller's `x-portkey-trace-id`.
        outcome: a word of the list in `errors`; `forwarded` where Replicate answered, `answered` where a layer did.
        status: the status that went out; None if none did.
        request_size, response_size: bytes of body, read and sent.
        complete: the answer went out to its last byte.
        notes: what layers have to say, by names of the registry.
        traceparent: this span's (W3C Trace Context, section 3.2), None where there is no trace.
    """

    def __init__(self, span: Span) -> None:
        self._span = span
        self._error_type: str | None = None
        self.portkey_trace_id: str | None = None
        self.outcome = "answered"
        self.status: int | None = None
        self.request_size = 0
        self.response_size = 0
        self.complete = False
        self.notes: dict[str, bool | int | float | str] = {}
        context = span.get_span_context()
        self.id = trace.format_trace_id(context.trace_id) if context.is_valid else uuid.uuid4().hex
        self.traceparent = (
            f"00-{self.id}-{trace.format_span_id(context.span_id)}-{context.trace_flags:02x}"
            if context.is_valid
            else None
        )

    def caller(self, portkey: PortkeyContext) -> None:
        self.portkey_trace_id = portkey.trace_id
        if self._span.is_recording():
            self._span.set_attributes(attributes.of_portkey(portkey) | attributes.of_caller(portkey))

    def tenant(self, tenant: str | None) -> None:
        if tenant is not None:
            self._span.set_attribute(names.TENANT, tenant)

    def forwarded(self, request: ProxyRequest) -> None:
        """The request goes to Replicate, as the layers have made it."""
        self.outcome = "forwarded"
        if request.unwrapped_data:
            self._span.set_attribute(names.UNWRAPPED_DATA, True)
        if request.repaired_path:
            self._span.set_attribute(names.REPAIRED_PATH, True)

    def refuse(self, error: ProxyError) -> None:
        """The answer is our own."""
        self.outcome = error.outcome
        self._error_type = error.code

    def fail(self, error: BaseException) -> None:
        """There is no answer, or only a part of one."""
        if isinstance(error, UpstreamAborted):
            self.outcome, self._error_type = error.outcome, error.code
        elif isinstance(error, Exception):
            self.outcome, self._error_type = "bad_request", "host_error"
        else:
            self.outcome, self._error_type = "client_disconnected", "cancelled"

    def finish(self) -> None:
        span = self._span
        if not span.is_recording():
            return
        span.set_attribute(names.OUTCOME, self.outcome)
        for name, value in self.notes.items():
            span.set_attribute(name, value)
        span.set_attribute(names.HTTP_REQUEST_BODY_SIZE, self.request_size)
        span.set_attribute(names.HTTP_RESPONSE_BODY_SIZE, self.response_size)
        if self.status is not None and self.status != ClientDisconnected.status:
            span.set_attribute(names.HTTP_RESPONSE_STATUS_CODE, self.status)
        if self._error_type == ClientDisconnected.code:
            return
        if self._error_type is None and self.status is not None and self.status >= 500:
            self._error_type = str(self.status)
        if self._error_type is not None:
            span.set_attribute(names.ERROR_TYPE, self._error_type)
        if not self.complete or self.status is None or self.status >= 500:
            span.set_status(StatusCode.ERROR)


class _Counted:
    """A body that counts its bytes as they pass."""

    def __init__(self, body: AsyncIterable[bytes]) -> None:
        self._chunks = body.__aiter__()
        self.size = 0
        self.complete = False
        self.failed = False

    def __aiter__(self) -> _Counted:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._chunks.__anext__()
        except StopAsyncIteration:
            self.complete = True
            raise
        except Exception:
            self.failed = True
            raise
        self.size += len(chunk)
        return chunk


class _Attempt:
    """An attempt's span while it is open: until the answer is closed, not only until its head is there."""

    def __init__(self, span: Span, sent: _Counted) -> None:
        self._span = span
        self._sent = sent

    def answer(self, response: ProxyResponse) -> ProxyResponse:
        body = _Counted(response.body)

        async def aclose() -> None:
            try:
                await response.aclose()
            finally:
                span = self._span
                span.set_attribute(names.HTTP_RESPONSE_STATUS_CODE, response.status)
                span.set_attribute(names.HTTP_RESPONSE_BODY_SIZE, body.size)
                if response.status >= 400:
                    self._fail(str(response.status))
                elif body.failed:
                    self._fail(UpstreamAborted.code)
                self.end(None)

        return replace(response, body=body, aclose=aclose)

    def end(self, error: BaseException | None) -> None:
        """A caller who leaves is no error of the attempt, and neither is a cancellation."""
        if isinstance(error, ProxyError) and not isinstance(error, ClientDisconnected):
            self._fail(error.code)
        self._span.set_attribute(names.HTTP_REQUEST_BODY_SIZE, self._sent.size)
        self._span.end()

    def _fail(self, error_type: str) -> None:
        self._span.set_attribute(names.ERROR_TYPE, error_type)
        self._span.set_status(StatusCode.ERROR)
