"""The faults on trio, which reads from the network by other code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from replicate_proxy_mw.errors import UpstreamAborted
from replicate_proxy_mw.testing import FAULTS, FaultServer
from tests.raw_asgi import KEY, Caller, http_scope, proxy

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("either_transport")]

OPTIONS = {
    "connect_timeout": 0.4,
    "read_timeout": 0.4,
    "write_timeout": 0.4,
    "connection_wait": 0.4,
    "max_connections": 1,
}

# Of those that take their time a few are enough.
NAMES = [
    *(name for name, fault in FAULTS.items() if 504 not in fault.expected and not fault.pace and "silence" not in name),
    *("tls-silent", "silence-before-head", "interim-trickled", "silence-in-body"),
]


@pytest.fixture
def anyio_backend() -> str:
    return "trio"


@pytest.fixture(scope="module")
def upstream() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.mark.parametrize("name", NAMES)
async def test_a_fault(upstream: FaultServer, name: str) -> None:
    fault = FAULTS[name]
    upstream.requests.clear()
    app = proxy(upstream.url_for(name), options=OPTIONS)
    body = b"x" * (4 << 20 if fault.reads in ("head", "part") else 10)
    headers = (KEY, (b"content-length", b"%d" % len(body)))
    caller = Caller([body[:5], body[5:]])
    try:
        try:
            await caller.call(app, http_scope("POST", f"/v1/x/{name}", headers))
            assert caller.complete
            came = caller.status if caller.header(b"x-portkey-gateway-exception") else "relayed"
        except UpstreamAborted:
            assert not caller.complete
            came = "cut"
        assert came in fault.expected
        if came in ("relayed", "cut"):
            assert caller.status == fault.status
            assert caller.content == fault.content or (came == "cut" and fault.content.startswith(caller.content))
        assert len(upstream.requests) == fault.sent
        if fault.origin == "http":
            again = await Caller().call(app, http_scope(target="/v1/good"))
            assert (again.status, b'"/v1/good"' in again.content) == (200, True)
    finally:
        await app.aclose()
    assert upstream.all_closed()
