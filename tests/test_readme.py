"""What the README shows is run as it stands there, but for addresses and tokens."""

from __future__ import annotations

import re
import subprocess
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from replicate_proxy_mw import KeyRequest, ReplicateProxyMiddleware, StaticKeyResolver
from replicate_proxy_mw.testing import FakeReplicate, serve
from tests.clients.drivers import require
from tests.documents import Page, execute
from tests.raw_asgi import host

README = Page("README.md")
HELLO_WORLD = "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa"


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeReplicate]:
    with FakeReplicate().serve() as fake:
        yield fake


def _app(fake: FakeReplicate, containing: str, **known: Any) -> Any:
    code = README.block("python", containing)
    code = re.sub(r"r8_the_token\w*", fake.token, code)
    code = code.replace("key_resolver=", f"config=ProxyConfig(upstream={fake.url!r}), key_resolver=", 1)
    return execute("from replicate_proxy_mw import ProxyConfig\n" + code, **known)["app"]


async def _find_team(api_key: str) -> Any:
    return types.SimpleNamespace(name="team-a", may_generate=True, replicate_token=FAKE_TOKEN[0])


FAKE_TOKEN: list[str] = []


@pytest.fixture(scope="module", params=["FastAPI()", "Litestar(", "find_team"])
def origin(request: pytest.FixtureRequest, fake: FakeReplicate) -> Iterator[str]:
    FAKE_TOKEN[:] = [fake.token]
    app = _app(fake, request.param, app=host, find_team=_find_team)
    with serve(app) as served:
        yield served.url


def _called(fake: FakeReplicate) -> None:
    request = fake.requests.pop()
    assert (request.operation, request.header("authorization")) == ("predictions.create", f"Bearer {fake.token}")
    assert fake.violations == []


def _addressed(code: str, origin: str) -> str:
    return code.replace("http://127.0.0.1:8000", origin).replace("VERSION", HELLO_WORLD)


@pytest.mark.parametrize("client", ["import Portkey", "import OpenAI", "from replicate import"])
def test_clients_of_python(origin: str, fake: FakeReplicate, client: str) -> None:
    known = execute(_addressed(README.block("python", client), origin))
    prediction = known["prediction"]
    assert prediction["status"] if isinstance(prediction, dict) else prediction.status
    for name in ("portkey", "openai", "replicate"):
        if name in known:
            getattr(known[name], "_client", known[name]).close()
    _called(fake)


@pytest.mark.parametrize("client", ["{ Portkey }", "import OpenAI", "import Replicate"])
def test_clients_of_node(origin: str, fake: FakeReplicate, client: str) -> None:
    require("node")
    code = _addressed(README.block("js", client), origin) + "\nconsole.log(prediction.status);"
    done = subprocess.run(
        ["node", "--input-type=module", "-e", code],
        cwd=Path(__file__).parent / "clients" / "node",
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() in ("starting", "processing"), done.stderr
    _called(fake)


def test_curl(origin: str, fake: FakeReplicate) -> None:
    require("curl")
    done = subprocess.run(_addressed(README.block("sh", "curl"), origin), shell=True, capture_output=True, text=True)
    assert '"status"' in done.stdout, done.stderr
    _called(fake)


@pytest.mark.anyio
async def test_the_resolver_tells_callers_apart() -> None:
    async def find_team(api_key: str) -> Any:
        teams = {"pk-archive": types.SimpleNamespace(may_generate=False)}
        return teams.get(api_key)

    known = execute(README.block("python", "find_team"), app=host, find_team=find_team)
    request: dict[str, Any] = {"method": "GET", "path": "/x", "scope": {}}
    assert await known["key_resolver"](KeyRequest(api_key="pk-nobody", **request)) is None
    with pytest.raises(known["PermissionDenied"], match="archive only"):
        await known["key_resolver"](KeyRequest(api_key="pk-archive", **request))


def test_the_rest_of_the_python_at_least_runs() -> None:
    assert execute(README.block("python", "config = ProxyConfig("))["config"].exclude == ["/v1/status"]
    assert callable(execute(README.block("python", "def quota("))["quota"])
    assert execute(README.block("python", "policy=Policy("))["key"].policy.own_predictions
    assert execute(README.block("python", "pytest_plugins ="))["pytest_plugins"]


def test_telemetry_is_switched_on_and_has_prices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")  # the rest of the process is to keep its own
    known = execute(README.block("python", "configure_telemetry()"))
    assert known["telemetry"].shutdown()
    ReplicateProxyMiddleware(
        host, key_resolver=StaticKeyResolver("r8_the_token", api_keys=["a"]), prices=known["prices"]
    )


def test_no_block_is_forgotten() -> None:
    assert README.count("python", "js", "sh") == 15


def test_files_that_it_links_to_are_there() -> None:
    assert README.missing_links() == []
