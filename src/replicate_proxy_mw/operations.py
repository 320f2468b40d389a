"""Replicate's HTTP API as one table (its OpenAPI document: 26 paths, 37 operations)."""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["prediction", "training", "file"]


class Operation(NamedTuple):
    """`creates` and `reads` name what the answer's body is about, where it is one prediction, training or file."""

    id: str
    method: str
    path: str
    creates: Kind | None = None
    reads: Kind | None = None


OPERATIONS = (
    Operation("account.get", "GET", "/account"),
    Operation("collections.list", "GET", "/collections"),
    Operation("collections.get", "GET", "/collections/{collection_slug}"),
    Operation("deployments.list", "GET", "/deployments"),
    Operation("deployments.create", "POST", "/deployments"),
    Operation("deployments.get", "GET", "/deployments/{deployment_owner}/{deployment_name}"),
    Operation("deployments.update", "PATCH", "/deployments/{deployment_owner}/{deployment_name}"),
    Operation("deployments.delete", "DELETE", "/deployments/{deployment_owner}/{deployment_name}"),
    Operation(
        "deployments.predictions.create",
        "POST",
        "/deployments/{deployment_owner}/{deployment_name}/predictions",
        creates="prediction",
    ),
    Operation("files.list", "GET", "/files"),
    Operation("files.create", "POST", "/files", creates="file"),
    Operation("files.get", "GET", "/files/{file_id}", reads="file"),
    Operation("files.delete", "DELETE", "/files/{file_id}"),
    Operation("files.download", "GET", "/files/{file_id}/download"),
    Operation("hardware.list", "GET", "/hardware"),
    Operation("models.list", "GET", "/models"),
    Operation("models.create", "POST", "/models"),
    Operation("models.search", "QUERY", "/models"),
    Operation("models.get", "GET", "/models/{model_owner}/{model_name}"),
    Operation("models.update", "PATCH", "/models/{model_owner}/{model_name}"),
    Operation("models.delete", "DELETE", "/models/{model_owner}/{model_name}"),
    Operation("models.examples.list", "GET", "/models/{model_owner}/{model_name}/examples"),
    Operation(
        "models.predictions.create",
        "POST",
        "/models/{model_owner}/{model_name}/predictions",
        creates="prediction",
    ),
    Operation("models.readme.get", "GET", "/models/{model_owner}/{model_name}/readme"),
    Operation("models.versions.list", "GET", "/models/{model_owner}/{model_name}/versions"),
    Operation("models.versions.get", "GET", "/models/{model_owner}/{model_name}/versions/{version_id}"),
    Operation("models.versions.delete", "DELETE", "/models/{model_owner}/{model_name}/versions/{version_id}"),
    Operation(
        "trainings.create",
        "POST",
        "/models/{model_owner}/{model_name}/versions/{version_id}/trainings",
        creates="training",
    ),
    Operation("predictions.list", "GET", "/predictions"),
    Operation("predictions.create", "POST", "/predictions", creates="prediction"),
    Operation("predictions.get", "GET", "/predictions/{prediction_id}", reads="prediction"),
    Operation("predictions.cancel", "POST", "/predictions/{prediction_id}/cancel", reads="prediction"),
    Operation("search", "GET", "/search"),
    Operation("trainings.list", "GET", "/trainings"),
    Operation("trainings.get", "GET", "/trainings/{training_id}", reads="training"),
    Operation("trainings.cancel", "POST", "/trainings/{training_id}/cancel", reads="training"),
    Operation("webhooks.default.secret.get", "GET", "/webhooks/default/secret"),
)
