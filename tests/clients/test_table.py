"""The table of clients: every row as expected, the one in the docs as measured, and nothing left out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import pytest
from replicate.account import Accounts
from replicate.client import Client
from replicate.collection import Collections
from replicate.deployment import Deployments, DeploymentsPredictions
from replicate.file import Files
from replicate.hardware import HardwareNamespace
from replicate.model import Models, ModelsPredictions
from replicate.prediction import Prediction, Predictions
from replicate.training import Training, Trainings
from replicate.version import Versions
from replicate.webhook import Webhooks

from replicate_proxy_mw.operations import OPERATIONS
from tests.clients.drivers import require
from tests.clients.rows import CLIENTS, ROWS, Row
from tests.clients.stage import Stage
from tests.clients.table import DOCS, document, measure

MAY_HAVE_BEEN_RECEIVED = [
    *(f"Replicate answers {status}" for status in (408, 409, 500, 503)),
    "the connection drops before the answer",
    "the connection drops within the answer",
]
TIMEOUTS = {"Replicate did not answer in time": "read_timeout=0.2", "Request exceeded the timeout": ""}
SDKS = [name for name in CLIENTS if name != "cURL" and "asynchronous" not in name]

Measured = Callable[[Row], Row]


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    require("node")
    require("curl")
    with Stage() as stage:
        yield stage


@pytest.fixture(scope="module")
def measured(stage: Stage) -> Measured:
    known: dict[Row, Row] = {}

    def once(row: Row) -> Row:
        if row not in known:
            known[row] = measure(stage, row)
        return known[row]

    return once


def calls(client: str) -> str:
    return "\n".join(row.call for row in ROWS if row.client == client)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.client}: {row.when} {row.call}"[:100])
def test_row(row: Row, measured: Measured) -> None:
    assert measured(row) == row


@pytest.mark.timeout(300)
def test_the_table_in_the_docs_is_the_measured_one(measured: Measured) -> None:
    old = DOCS.read_text()
    assert document([measured(row) for row in ROWS], old) == old


@pytest.mark.parametrize("when", MAY_HAVE_BEEN_RECEIVED)
@pytest.mark.parametrize("client", SDKS)
def test_a_create_that_fails_is_one_request(client: str, when: str, measured: Measured) -> None:
    (row,) = (row for row in ROWS if (row.client, row.when) == (client, when) and row.reached == "predictions.create")
    assert measured(row).reached == "predictions.create"


@pytest.mark.parametrize("text", TIMEOUTS)
@pytest.mark.parametrize("client", SDKS)
def test_a_create_that_takes_too_long_is_one_request(client: str, text: str, measured: Measured) -> None:
    rows = [row for row in ROWS if row.client == client and row.when == TIMEOUTS[text] and text in row.result]
    assert {measured(row).reached for row in rows} == {"predictions.create"}


def test_no_row_stands_twice() -> None:
    assert len({(row.client, row.call, row.when) for row in ROWS}) == len(ROWS)


def test_every_operation_is_called() -> None:
    reached = {row.reached for row in ROWS if row.client == "cURL"}
    assert reached >= {operation.id for operation in OPERATIONS}


@pytest.mark.parametrize(
    ("owner", "names"),
    [
        ("replicate", Client),
        ("accounts", Accounts),
        ("collections", Collections),
        ("deployments", Deployments),
        ("deployments.predictions", DeploymentsPredictions),
        ("files", Files),
        ("hardware", HardwareNamespace),
        ("models", Models),
        ("models.predictions", ModelsPredictions),
        ("prediction", Prediction),
        ("predictions", Predictions),
        ("training", Training),
        ("trainings", Trainings),
        ("versions", Versions),
        ("webhooks.default", Webhooks.Default),
    ],
)
def test_every_method_of_replicates_python_sdk_is_called(owner: str, names: type) -> None:
    own = {name for name, value in vars(names).items() if inspect.isfunction(value) and not name.startswith("_")}
    missing = {
        name for name in own if not name.startswith("async_") and f"{owner}.{name}(" not in calls("replicate (Python)")
    }
    assert own
    assert missing - {"dict"} == set()


def test_every_method_of_replicates_node_sdk_is_called(stage: Stage) -> None:
    walk = (
        "const walk = (object, path) => Object.entries(object).flatMap(([name, value]) => "
        'typeof value === "function" ? [path + name] : '
        'value?.constructor === Object ? walk(value, path + name + ".") : [])'
    )
    own = "Object.getOwnPropertyNames(Object.getPrototypeOf(replicate))"
    found = stage.play("Node", f'{walk}; [...walk(replicate, ""), ...{own}]').answer["value"]
    methods = set(found) - {"constructor", "fetch"}
    assert len(methods) > 20
    assert {name for name in methods if f"replicate.{name}" not in calls("replicate (Node)")} == set()


@pytest.mark.parametrize(
    ("client", "verbs"),
    [
        ("portkey-ai (Python)", ["portkey.post(", "portkey.get(", "portkey.put(", "portkey.delete("]),
        ("portkey-ai (Node)", ["portkey.post(", "portkey.get(", "portkey.put(", "portkey.delete("]),
        ("openai (Python)", ["openai.post(", "openai.get(", "openai.put(", "openai.patch(", "openai.delete("]),
        ("openai (Node)", ["openai.post(", "openai.get(", "openai.put(", "openai.patch(", "openai.delete("]),
    ],
)
def test_every_verb_of_the_other_sdks_is_called(client: str, verbs: list[str]) -> None:
    assert [verb for verb in verbs if verb not in calls(client)] == []
