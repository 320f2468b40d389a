"""`python -m examples.litestar_app`: serves the app, and prints the span tree of each request."""

from __future__ import annotations

import os
from contextlib import ExitStack

import uvicorn
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider

from replicate_proxy_mw.devtools import SpanTreePrinter

from .app import create_app

if __name__ == "__main__":
    provider = TracerProvider()
    provider.add_span_processor(SpanTreePrinter())
    trace.set_tracer_provider(provider)

    with ExitStack() as stack:
        upstream, token = "https://api.replicate.com/v1", os.environ.get("REPLICATE_API_TOKEN", "")
        if not token:
            from replicate_proxy_mw.testing import FakeReplicate

            fake = stack.enter_context(FakeReplicate().serve())
            upstream, token = fake.url, fake.token
        port = int(os.environ.get("PORT", "8000"))
        print(
            f"The illustration desk, with Replicate ({upstream}) at http://127.0.0.1:{port}/v1. Ctrl-C ends it.",
            flush=True,
        )
        uvicorn.run(create_app(upstream=upstream, token=token), port=port, log_level="warning")
