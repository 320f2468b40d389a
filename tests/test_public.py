from __future__ import annotations

import subprocess
import sys

import replicate_proxy_mw


def test_what_is_public_is_there_and_sorted() -> None:
    assert replicate_proxy_mw.__all__ == sorted(replicate_proxy_mw.__all__)
    assert all(hasattr(replicate_proxy_mw, name) for name in replicate_proxy_mw.__all__)


def test_the_core_imports_no_optional_package() -> None:
    optional = [
        *("opentelemetry.sdk", "opentelemetry.exporter", "opentelemetry.instrumentation", "standardwebhooks"),
        *("litestar", "starlette", "uvicorn", "redis", "trio"),
    ]
    code = f"import replicate_proxy_mw, sys; print([name for name in {optional} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_what_takes_and_tells_is_public() -> None:
    assert {"PriceRequest", "Rates", "WebhookEvent", "configure_telemetry"} <= {*replicate_proxy_mw.__all__}
