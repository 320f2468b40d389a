"""docs/how-it-works.md is run as it stands there, and its steps are those of the code."""

from __future__ import annotations

import inspect
import re
from xml.etree import ElementTree

import anyio
import pytest

from replicate_proxy_mw import (
    KeyRequest,
    ProxyConfig,
    ReplicateProxyMiddleware,
    StaticKeyResolver,
    errors,
    ingress,
    json_bodies,
)
from replicate_proxy_mw.errors import ProxyError
from replicate_proxy_mw.layers import model_rules, ownership, resend, unwrap, whole
from replicate_proxy_mw.operations import OPERATIONS
from replicate_proxy_mw.store import Ledger, MemoryPredictionStore
from replicate_proxy_mw.telemetry import attempt
from replicate_proxy_mw.testing import FakeReplicate
from tests.documents import ROOT, Page, execute
from tests.raw_asgi import TOKEN, Caller, host, http_scope, proxy

HOW = Page("docs/how-it-works.md")
MIB = 1 << 20


def section(name: str) -> str:
    return HOW.text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("what", ["What becomes of a request", "How the run joins the create"])
def test_what_a_program_prints_is_what_stands_below_it(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    [(program, printed)] = re.findall(r"```python\n(.*?)```\n\n```text\n(.*?)```", section(what), re.DOTALL)
    execute(program)
    assert _without_ids(capsys.readouterr().out) == _without_ids(printed)


def _without_ids(text: str) -> str:
    return re.sub(r"/predictions/\w+", "/predictions/ID", text)


def test_layers_stand_in_the_order_that_is_told() -> None:
    [told] = re.findall(r"from the outside in: (.*?)\. \|", HOW.text)
    mark = object()
    middleware = ReplicateProxyMiddleware(host, key_resolver=StaticKeyResolver(TOKEN, api_keys=["pk-team-a"]))
    layers = middleware._layers([mark], Ledger(MemoryPredictionStore(), timeout=1.0))  # type: ignore[list-item]
    names = ["**yours**" if layer is mark else _named(layer) for layer in layers]
    assert told.split(", ") == names


def _named(layer: object) -> str:
    """By the function that makes it."""
    return f"`{getattr(layer, '__qualname__', '').partition('.')[0]}`"


def test_steps_come_in_the_order_of_the_code() -> None:
    exchange = inspect.getsource(ReplicateProxyMiddleware._exchange)
    code = exchange.replace("self._admit(", inspect.getsource(ReplicateProxyMiddleware._admit), 1)
    steps = [
        "self._route(",
        "self._telemetry.request(",
        "max_in_flight",
        "self._via.up(",
        "routing.check(",
        "portkey.read(",
        "headers.up(",
        "KeyMissing()",
        "await resolve(",
        "permit(",
        "body.begin(",
        "while_connected(",
    ]
    places = [code.index(step) for step in steps]
    assert places == sorted(places)
    assert len(OPERATIONS) == int(re.findall(r"Replicate's (\d+) operations", HOW.text)[0])


@pytest.mark.anyio
async def test_the_resolver_is_let_finish_and_then_nothing_is_sent() -> None:
    caller, finished = Caller(body=[]), []

    async def key_resolver(request: KeyRequest) -> str:
        caller.left.set()
        await anyio.sleep(0.3)  # longer than anybody waits who looks out
        finished.append(True)
        return TOKEN

    with FakeReplicate().serve() as fake:
        app = proxy(fake.url, key_resolver=key_resolver)
        await caller.call(app, http_scope("POST", "/v1/predictions"))
        await app.aclose()
        assert (finished, fake.requests) == ([True], [])


def test_codes_and_names_are_those_of_the_code() -> None:
    codes = {error.code for error in vars(errors).values() if isinstance(error, type) and issubclass(error, ProxyError)}
    named = set(re.findall(r"\d{3} `(\w+)`", HOW.text))
    assert named == {"overloaded", "loop_detected", "key_missing", "permission_denied"}
    assert named <= codes
    options = set(re.findall(r"`((?:max|safe|unwrap)_\w+)`", HOW.text))
    assert options - {"unwrap_data"} <= set(ProxyConfig.__dataclass_fields__)


def test_bounds_are_those_of_the_code() -> None:
    assert (unwrap._LONGEST_HEAD, unwrap.MAX_SIZE, model_rules.MAX_SIZE) == (64, MIB, MIB)
    assert (whole.MAX_SIZE, ownership.MAX_PAGE, attempt.MAX_SIZE) == (8 * MIB, 16 * MIB, MIB)
    assert json_bodies.MAX_SIZE == inspect.signature(json_bodies.held).parameters["max_size"].default == 8 * MIB
    assert "\nPATIENCE = 0.25\n" in inspect.getsource(ingress)  # tests look out sooner
    assert {"GET", "HEAD", "OPTIONS"} == resend.SAFE
    assert {429, 502, 503, 504} == resend.STATUS_CODES


def test_the_picture_is_made_by_hand_and_loads_nothing() -> None:
    text = ROOT.joinpath("docs/images/how-it-works.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    kinds = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert kinds <= {"svg", "title", "desc", "style", "defs", "marker", "path", "rect", "text"}
    assert re.findall(r"https?://\S+", text) == ['http://www.w3.org/2000/svg"']
    words = {element.text for element in root.iter() if element.get("class") == "name"}
    assert words == {"caller", "edge", "layers", "transport", "Replicate", "telemetry", "store"}


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert HOW.count("python") == HOW.count("text") == 2
    assert len(HOW.code) == 4
    assert HOW.missing_links() == []
