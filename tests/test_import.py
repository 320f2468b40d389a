from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import replicate_proxy_mw

PACKAGES = ["replicate_proxy_mw", "replicate_proxy_mw.keys", "replicate_proxy_mw.telemetry"]

# What a host has imported before us; what these bring along is not ours.
BEFORE = "import anyio, asyncio, httpx, opentelemetry.metrics, opentelemetry.propagate, opentelemetry.trace"

# Packages that take long, and parts of our own that few hosts use.
NOT_NEEDED = [
    *("h11", "httpcore", "httptools", "importlib.metadata", "opentelemetry.sdk", "redis", "tomllib", "uvicorn"),
    *("endpoints.streams", "endpoints.webhooks", "keys.cached", "keys.env", "keys.file", "keys.resolvers"),
    *(
        "litestar",
        "telemetry.prices",
        "telemetry.sample_prices",
        "telemetry.setup",
        "upstream.fast",
        "upstream.transport",
    ),
]


def loaded(code: str) -> set[str]:
    """The modules that `code` imports, our own by their names within the package."""
    script = f"{BEFORE}\nimport sys\nbefore = {{*sys.modules}}\n{code}\nprint(*{{*sys.modules}} - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return {name.removeprefix("replicate_proxy_mw.") for name in done.stdout.split()}


def test_an_import_brings_along_nothing_that_few_hosts_use() -> None:
    assert loaded("import replicate_proxy_mw").isdisjoint(NOT_NEEDED)


def test_an_import_brings_along_what_each_host_needs() -> None:
    needed = {"middleware", "config", "exchange", "policy", "keys.contract", "telemetry.spans", "upstream.forward"}
    assert needed <= loaded("import replicate_proxy_mw")


def test_a_resolver_brings_along_no_other() -> None:
    found = loaded("from replicate_proxy_mw import MappingKeyResolver")
    assert "keys.resolvers" in found
    assert found.isdisjoint(("keys.cached", "keys.env", "keys.file", "tomllib"))


@pytest.mark.parametrize(
    ("options", "endpoint"),
    [
        ("proxy_streams=True, stream_key='k' * 32", "endpoints.streams"),
        (f"webhook_secrets=['whsec_{'A' * 32}']", "endpoints.webhooks"),
    ],
)
def test_an_endpoint_is_there_before_the_first_request(options: str, endpoint: str) -> None:
    made = "ReplicateProxyMiddleware(None, key_resolver=None, config=ProxyConfig({}))"
    code = f"from replicate_proxy_mw import ProxyConfig, ReplicateProxyMiddleware\n{made}"
    assert endpoint not in loaded(code.format(""))
    assert endpoint in loaded(code.format(options))


@pytest.mark.parametrize("package", PACKAGES)
def test_what_comes_on_demand_looks_as_if_it_were_there(package: str) -> None:
    module = import_module(package)
    assert {*module.__all__} <= {*dir(module)}
    namespace: dict[str, object] = {}
    exec(f"from {package} import *", namespace)
    assert {*module.__all__} <= {*namespace}
    assert all(namespace[name] is vars(module)[name] for name in module.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_name_that_is_nowhere_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"^module '{package}' has no attribute 'nothing'$"):
        assert import_module(package).nothing
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec(f"from {package} import nothing")


def test_what_comes_on_demand_is_the_same_from_everywhere() -> None:
    from replicate_proxy_mw import keys
    from replicate_proxy_mw.keys.file import FileKeyResolver

    assert replicate_proxy_mw.FileKeyResolver is keys.FileKeyResolver is FileKeyResolver
