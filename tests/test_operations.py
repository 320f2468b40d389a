from __future__ import annotations

from replicate_proxy_mw.operations import OPERATIONS


def test_the_table_has_the_document_s_size() -> None:
    assert len(OPERATIONS) == len({operation.id for operation in OPERATIONS}) == 37
    assert len({operation.path for operation in OPERATIONS}) == 26


def test_what_operations_create_and_read() -> None:
    assert {operation.id: operation.creates for operation in OPERATIONS if operation.creates} == {
        "deployments.predictions.create": "prediction",
        "files.create": "file",
        "models.predictions.create": "prediction",
        "predictions.create": "prediction",
        "trainings.create": "training",
    }
    assert {operation.id: operation.reads for operation in OPERATIONS if operation.reads} == {
        "files.get": "file",
        "predictions.cancel": "prediction",
        "predictions.get": "prediction",
        "trainings.cancel": "training",
        "trainings.get": "training",
    }
