"""`python -m examples.fastapi_app`: serves the app and the viewer of its traces, and prints the span tree of each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from urllib.parse import urlsplit

import uvicorn
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from replicate_proxy_mw.config import STREAM_HOSTS
from replicate_proxy_mw.devtools import SpanTreePrinter, TraceBuffer

from .app import create_app

if __name__ == "__main__":
    traces = TraceBuffer()
    provider = TracerProvider()
    provider.add_span_processor(SpanTreePrinter())
    provider.add_span_processor(traces)
    trace.set_tracer_provider(provider)

    with ExitStack() as stack:
        upstream, token = "https://api.replicate.com/v1", os.environ.get("REPLICATE_API_TOKEN", "")
        stream_hosts: Sequence[str] = STREAM_HOSTS
        if not token:
            from replicate_proxy_mw.testing import FakeReplicate

            fake = stack.enter_context(FakeReplicate().serve())
            upstream, token = fake.url, fake.token
            stream_hosts = [urlsplit(fake.streams_url).netloc]
        port = int(os.environ.get("PORT", "8000"))
        here = f"http://127.0.0.1:{port}"
        print(
            f"The illustration desk, with Replicate ({upstream}) at {here}/v1. What it does: {here}/traces/. "
            "Ctrl-C ends it.",
            flush=True,
        )
        app = create_app(upstream=upstream, token=token, stream_hosts=stream_hosts, traces=traces)
        uvicorn.run(app, port=port, log_level="warning")
