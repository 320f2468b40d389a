"""The dashboards in `docs/dashboards`, which `python -m tests.dashboards.make --write` makes.

Queries are written as Prometheus spells our names; `test_dashboards.py` holds them to `telemetry/names.py`.
"""

from __future__ import annotations

import json
import sys

from tests.dashboards.grafana import (
    Json,
    Query,
    Row,
    buckets,
    choice,
    dashboard,
    lines,
    link,
    listing,
    number,
    of_series,
)
from tests.documents import ROOT

FOLDER = ROOT / "docs/dashboards"

TRAFFIC, PREDICTIONS = "replicate-proxy-traffic", "replicate-proxy-predictions"

# What somebody has to be called for, and what its caller has to mend.
FAILED = "upstream_error|upstream_timeout|overloaded|resolver_error"
REFUSED = "auth_missing|auth_invalid|denied|limited|bad_request|body_too_large"

JOB = 'job=~"$job"'
OPERATION = f'{JOB}, replicate_operation=~"$operation"'
BY_OUTCOME = f'{OPERATION}, replicate_proxy_outcome=~"$outcome"'
TENANT = f'{OPERATION}, replicate_proxy_tenant=~"$tenant"'
REQUEST = f'{TENANT}, replicate_proxy_outcome=~"$outcome"'
ATTEMPT = f'{JOB}, server_address=~"$upstream"'
MODEL = f'{JOB}, replicate_model_name=~"$model"'
COST = f'{MODEL}, replicate_proxy_tenant=~"$tenant"'
GEN_AI = f'{JOB}, gen_ai_response_model=~"$model"'


def rate(metric: str, where: str, by: str = "") -> str:
    """Per second."""
    return f"sum{_by(by)} (rate({metric}{{{where}}}[$__rate_interval]))"


def total(metric: str, where: str, by: str = "") -> str:
    """In the whole time range."""
    return f"sum{_by(by)} (increase({metric}{{{where}}}[$__range]))"


def quantile(q: float, metric: str, where: str, by: str = "", window: str = "$__rate_interval") -> str:
    by = f"le, {by}" if by else "le"
    return f"histogram_quantile({q}, sum by ({by}) (rate({metric}_bucket{{{where}}}[{window}])))"


def quantiles(metric: str, where: str) -> list[Query]:
    return [Query(quantile(q, metric, where), f"{q:.0%}") for q in (0.5, 0.95, 0.99)]


def mean(metric: str, where: str, by: str) -> str:
    return f"{rate(f'{metric}_sum', where, by)} / {rate(f'{metric}_count', where, by)}"


def share(metric: str, part: str, where: str, by: str = "") -> str:
    """Of `where`, what is in `part`, too: 0 where nothing ever was."""
    whole = rate(metric, where, by)
    return f"({rate(metric, f'{where}, {part}', by)} or 0 * {whole}) / {whole}"


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def traffic() -> Json:
    requests, seconds = "replicate_proxy_requests_total", "replicate_proxy_request_duration_seconds"
    overhead = "replicate_proxy_overhead_duration_seconds"
    client, server = "http_client_request_duration_seconds", "http_server_request_duration_seconds"
    return dashboard(
        uid=TRAFFIC,
        title="Replicate proxy: traffic",
        description="Requests through replicate_proxy_mw: how many, what became of them, and how long they took.",
        variables=[
            choice("job", "Job", f"label_values({requests}, job)"),
            choice("tenant", "Tenant", f"label_values({requests}{{{JOB}}}, replicate_proxy_tenant)"),
            choice("operation", "Operation", f"label_values({requests}{{{JOB}}}, replicate_operation)"),
            choice("outcome", "Outcome", f"label_values({requests}{{{JOB}}}, replicate_proxy_outcome)"),
            choice(
                "upstream",
                "Upstream",
                f'label_values({client}_count{{{JOB}, url_template=~"/.+"}}, server_address)',
                all_value=None,
            ),
        ],
        links=[link("Predictions", PREDICTIONS)],
        rows=[
            Row(
                "Now",
                4,
                [
                    number(
                        "Requests",
                        "All requests below the prefix, whatever became of them.",
                        Query(rate(requests, REQUEST)),
                        unit="reqps",
                    ),
                    number(
                        "Failed",
                        "The part of the requests that failed, by Replicate (upstream_error, upstream_timeout) or by "
                        "the proxy and its host (overloaded, resolver_error). An error that Replicate answers with is "
                        "forwarded, and not in it: see “Replicate's answers”.",
                        Query(share(requests, f'replicate_proxy_outcome=~"{FAILED}"', TENANT)),
                        unit="percentunit",
                        steps=(("green", None), ("orange", 0.01), ("red", 0.05)),
                    ),
                    number(
                        "Refused",
                        "The part of the requests that the proxy refused: keys, policies, limits, malformed requests.",
                        Query(share(requests, f'replicate_proxy_outcome=~"{REFUSED}"', TENANT)),
                        unit="percentunit",
                        steps=(("green", None), ("orange", 0.1), ("red", 0.5)),
                    ),
                    number(
                        "95 % are answered within",
                        "From the first byte of a request to the last of its answer. A create that waits "
                        "(Prefer: wait) takes up to a minute, a stream as long as it is read: choose operations above.",
                        Query(quantile(0.95, seconds, BY_OUTCOME)),
                        unit="s",
                    ),
                    number(
                        "Overhead, 95 %",
                        "The proxy's own part of that time, with the key resolver and the store of predictions.",
                        Query(quantile(0.95, overhead, OPERATION)),
                        unit="s",
                        steps=(("green", None), ("orange", 0.05), ("red", 0.25)),
                    ),
                    number(
                        "In flight",
                        "Requests under way. max_in_flight (10,000 for each process by default) is where the proxy "
                        "begins to answer 503.",
                        Query(f"sum (replicate_proxy_in_flight{{{OPERATION}}})"),
                        unit="short",
                    ),
                ],
            ),
            Row(
                "Requests",
                9,
                [
                    lines(
                        "By operation",
                        "Operation ids of Replicate's API; streams and webhooks are the proxy's own, _OTHER is no path "
                        "of the API.",
                        Query(rate(requests, REQUEST, "replicate_operation"), "{{replicate_operation}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "By outcome",
                        "forwarded: Replicate answered, with an error perhaps. answered: the proxy did, from a cache "
                        "or as the receiver of a webhook. client_disconnected: the caller left.",
                        Query(rate(requests, REQUEST, "replicate_proxy_outcome"), "{{replicate_proxy_outcome}}"),
                        unit="reqps",
                        stacked=True,
                    ),
                    lines(
                        "By tenant",
                        "As the key resolver names them. A request without a valid key has no tenant, and a stream "
                        "or webhook has none, either.",
                        Query(rate(requests, REQUEST, "replicate_proxy_tenant"), "{{replicate_proxy_tenant}}"),
                        unit="reqps",
                        stacked=True,
                        links=[of_series("Its predictions", PREDICTIONS, "tenant", "replicate_proxy_tenant")],
                    ),
                    lines(
                        "In flight, by operation",
                        "Requests under way. What grows and does not fall again waits for Replicate, or leaks.",
                        Query(
                            f"sum by (replicate_operation) (replicate_proxy_in_flight{{{OPERATION}}})",
                            "{{replicate_operation}}",
                        ),
                        unit="short",
                        stacked=True,
                    ),
                ],
            ),
            Row(
                "Errors",
                9,
                [
                    lines(
                        "Failed, by outcome",
                        "upstream_error: Replicate could not be reached, or its answer was cut; or the proxy or a "
                        "layer of yours failed (internal_error on spans). upstream_timeout: it took too long. "
                        "overloaded: a limit of this process. resolver_error: your key resolver, store, check of "
                        "guardrails or webhook function.",
                        Query(
                            rate(requests, f'{TENANT}, replicate_proxy_outcome=~"{FAILED}"', "replicate_proxy_outcome"),
                            "{{replicate_proxy_outcome}}",
                        ),
                        unit="reqps",
                        stacked=True,
                        width=8,
                    ),
                    lines(
                        "Refused, by outcome",
                        "auth_missing and auth_invalid: no key, or one that nobody knows. denied: a policy or the key "
                        "resolver. limited: requests, spending or predictions of a tenant.",
                        Query(
                            rate(
                                requests, f'{TENANT}, replicate_proxy_outcome=~"{REFUSED}"', "replicate_proxy_outcome"
                            ),
                            "{{replicate_proxy_outcome}}",
                        ),
                        unit="reqps",
                        stacked=True,
                        width=8,
                    ),
                    lines(
                        "Failed, by operation",
                        "The part of each operation's requests that failed. The dashed line is where the alert is, for "
                        "all of them together.",
                        Query(
                            share(requests, f'replicate_proxy_outcome=~"{FAILED}"', TENANT, "replicate_operation"),
                            "{{replicate_operation}}",
                        ),
                        unit="percentunit",
                        limit=0.05,
                        width=8,
                    ),
                    lines(
                        "Replicate's answers, by status",
                        "Each attempt counts. 401: the token is wrong. 402: no credit. 422: wrong input. 429: too "
                        "many requests for the account. 5xx: Replicate fails. All tenants.",
                        Query(
                            rate(
                                f"{client}_count",
                                f'{ATTEMPT}, http_response_status_code!=""',
                                "http_response_status_code",
                            ),
                            "{{http_response_status_code}}",
                        ),
                        unit="reqps",
                        stacked=True,
                        width=8,
                    ),
                    lines(
                        "Attempts without an answer",
                        "Why none came: codes of the proxy's own errors, or the class of what went wrong. All tenants.",
                        Query(
                            rate(
                                f"{client}_count",
                                f'{ATTEMPT}, http_response_status_code="", error_type!=""',
                                "error_type",
                            ),
                            "{{error_type}}",
                        ),
                        unit="reqps",
                        stacked=True,
                        width=8,
                    ),
                    lines(
                        "Retries, by reason",
                        "Attempts after the first, by what the one before came to. All tenants.",
                        Query(
                            rate("replicate_proxy_upstream_retries_total", JOB, "replicate_proxy_retry_reason"),
                            "{{replicate_proxy_retry_reason}}",
                        ),
                        unit="reqps",
                        stacked=True,
                        width=8,
                    ),
                    listing(
                        "Whose requests fail or are refused",
                        "In the whole time range.",
                        [
                            (
                                "Requests",
                                Query(
                                    total(
                                        requests,
                                        f'{TENANT}, replicate_proxy_outcome=~"{FAILED}|{REFUSED}"',
                                        "replicate_proxy_tenant, replicate_operation, replicate_proxy_outcome",
                                    ),
                                    now=True,
                                ),
                                "short",
                            )
                        ],
                        {
                            "replicate_proxy_tenant": "Tenant",
                            "replicate_operation": "Operation",
                            "replicate_proxy_outcome": "Outcome",
                        },
                    ),
                ],
            ),
            Row(
                "Latency",
                9,
                [
                    lines(
                        "95 % are answered within, by operation",
                        "From the first byte of a request to the last of its answer. All tenants.",
                        Query(quantile(0.95, seconds, BY_OUTCOME, "replicate_operation"), "{{replicate_operation}}"),
                        unit="s",
                        width=8,
                    ),
                    lines(
                        "Quantiles of the chosen operations",
                        "All tenants.",
                        *quantiles(seconds, BY_OUTCOME),
                        unit="s",
                        width=8,
                    ),
                    buckets(
                        "How long requests take",
                        "Requests by duration. All tenants.",
                        Query(rate(f"{seconds}_bucket", BY_OUTCOME, "le"), "{{le}}"),
                        unit="s",
                        width=8,
                    ),
                    lines(
                        "Replicate's part, 95 %",
                        "How long attempts took, until the last byte. Those without a path are streams. All tenants.",
                        Query(
                            quantile(0.95, client, ATTEMPT, "http_request_method, url_template"),
                            "{{http_request_method}} {{url_template}}",
                        ),
                        unit="s",
                        width=8,
                    ),
                    lines(
                        "Overhead by operation, 95 %",
                        "The proxy's own part, with the key resolver and the store. All tenants.",
                        Query(quantile(0.95, overhead, OPERATION, "replicate_operation"), "{{replicate_operation}}"),
                        unit="s",
                        limit=0.25,
                        width=8,
                    ),
                    lines(
                        "Overhead, quantiles",
                        "If this rises for all operations at once, the event loop is blocked or the CPU is short. "
                        "All tenants.",
                        *quantiles(overhead, OPERATION),
                        unit="s",
                        width=8,
                    ),
                ],
            ),
            Row(
                "HTTP, as the server counts it",
                9,
                [
                    lines(
                        "Answers by status",
                        "The stable HTTP metric, by who counts: a host's own instrumentation has the host's other "
                        "routes, too, and the proxy (replicate_proxy_mw) counts where the host opens no span.",
                        Query(
                            rate(f"{server}_count", JOB, "otel_scope_name, http_response_status_code"),
                            "{{http_response_status_code}} {{otel_scope_name}}",
                        ),
                        unit="reqps",
                    ),
                    lines(
                        "95 % are answered within, by route",
                        "A host's own instrumentation does not know the proxy's routes: they have no name there.",
                        Query(
                            quantile(0.95, server, JOB, "otel_scope_name, http_request_method, http_route"),
                            "{{http_request_method}} {{http_route}} {{otel_scope_name}}",
                        ),
                        unit="s",
                    ),
                ],
            ),
        ],
    )


def predictions() -> Json:
    requests, ended = "replicate_proxy_requests_total", "replicate_prediction_terminal_total"
    queue, run = "replicate_prediction_queue_duration_seconds", "replicate_prediction_run_duration_seconds"
    whole, lag = "replicate_prediction_duration_seconds", "replicate_proxy_prediction_observation_lag_seconds"
    polls, cost = "replicate_proxy_prediction_polls", "replicate_prediction_cost_total"
    gen_ai, tokens = "gen_ai_client_operation_duration_seconds", "gen_ai_client_token_usage"
    by_model, by_observer = ("replicate_model_name", "replicate_proxy_lifecycle_observed_by")
    failed = 'replicate_prediction_status="failed"'
    money = "replicate_prediction_cost_currency"
    return dashboard(
        uid=PREDICTIONS,
        title="Replicate proxy: predictions",
        description="Predictions whose end was seen through replicate_proxy_mw: how they ended, how long they waited "
        "and ran, who saw it, and what they cost by your own prices.",
        variables=[
            choice("job", "Job", f"label_values({requests}, job)"),
            choice("model", "Model", f"label_values({ended}{{{JOB}}}, {by_model})"),
            choice("tenant", "Tenant", f"label_values({requests}{{{JOB}}}, replicate_proxy_tenant)"),
        ],
        links=[link("Traffic", TRAFFIC)],
        rows=[
            Row(
                "In this time range",
                4,
                [
                    number(
                        "Ended",
                        "Predictions whose end was seen. One that nobody asks about again is not counted.",
                        Query(total(ended, MODEL), now=True),
                        unit="short",
                    ),
                    number(
                        "Failed",
                        "Of those that ended: the model raised an error. Canceled and aborted ones are not failures.",
                        Query(
                            f"({total(ended, f'{MODEL}, {failed}')} or vector(0)) / {total(ended, MODEL)}",
                            now=True,
                        ),
                        unit="percentunit",
                        steps=(("green", None), ("orange", 0.05), ("red", 0.2)),
                    ),
                    number(
                        "Queue, 95 %",
                        "From creation until the model was started: cold starts, and Replicate's own queue.",
                        Query(quantile(0.95, queue, MODEL, window="$__range"), now=True),
                        unit="s",
                        steps=(("green", None), ("orange", 30), ("red", 120)),
                    ),
                    number(
                        "Run, 95 %",
                        "How long models ran.",
                        Query(quantile(0.95, run, MODEL, window="$__range"), now=True),
                        unit="s",
                    ),
                    number(
                        "Seen late, 95 %",
                        "From a prediction's end until it was first seen: how seldom callers ask. All models.",
                        Query(quantile(0.95, lag, JOB, window="$__range"), now=True),
                        unit="s",
                        steps=(("green", None), ("orange", 30), ("red", 300)),
                    ),
                    number(
                        "Cost",
                        "Estimated by your own prices; nothing for models that have none. Trainings are in it.",
                        Query(total(cost, COST, money), f"{{{{{money}}}}}", now=True),
                        unit="short",
                    ),
                ],
            ),
            Row(
                "Ends",
                9,
                [
                    lines(
                        "By status",
                        "failed: the model raised an error. canceled: somebody canceled it. aborted: it was not "
                        "started before its deadline.",
                        Query(rate(ended, MODEL, "replicate_prediction_status"), "{{replicate_prediction_status}}"),
                        unit="ops",
                        stacked=True,
                        width=8,
                    ),
                    lines(
                        "Failed, by model",
                        "The part of each model's predictions. The dashed line is that of the alert.",
                        Query(share(ended, failed, MODEL, by_model), f"{{{{{by_model}}}}}"),
                        unit="percentunit",
                        limit=0.2,
                        width=8,
                    ),
                    lines(
                        "By who saw the end",
                        "create: it waited (Prefer: wait). poll, cancel, stream, webhook: the request that told.",
                        Query(rate(ended, MODEL, by_observer), f"{{{{{by_observer}}}}}"),
                        unit="ops",
                        stacked=True,
                        width=8,
                    ),
                    listing(
                        "Models",
                        "In the whole time range. The cost alone is that of the chosen tenants, and adds up what is in "
                        "several currencies: see “Who spends on what”.",
                        [
                            ("Ended", Query(total(ended, MODEL, by_model), now=True), "short"),
                            ("Failed", Query(total(ended, f"{MODEL}, {failed}", by_model), now=True), "short"),
                            ("Queue, 95 %", Query(quantile(0.95, queue, MODEL, by_model, "$__range"), now=True), "s"),
                            ("Run, 95 %", Query(quantile(0.95, run, MODEL, by_model, "$__range"), now=True), "s"),
                            ("Cost", Query(total(cost, COST, by_model), now=True), "short"),
                        ],
                        {by_model: "Model"},
                    ),
                ],
            ),
            Row(
                "Times",
                9,
                [
                    lines(
                        "Queue by model, 95 %",
                        "From creation until the model was started. The dashed line is that of the alert.",
                        Query(quantile(0.95, queue, MODEL, by_model), f"{{{{{by_model}}}}}"),
                        unit="s",
                        limit=120,
                        width=8,
                    ),
                    lines(
                        "Run by model, 95 %",
                        "How long models ran.",
                        Query(quantile(0.95, run, MODEL, by_model), f"{{{{{by_model}}}}}"),
                        unit="s",
                        width=8,
                    ),
                    lines(
                        "From creation to end, quantiles",
                        "What a caller waits for, at the least.",
                        *quantiles(whole, MODEL),
                        unit="s",
                        width=8,
                    ),
                    buckets(
                        "How long predictions wait",
                        "Predictions by their time in the queue.",
                        Query(rate(f"{queue}_bucket", MODEL, "le"), "{{le}}"),
                        unit="s",
                    ),
                    buckets(
                        "How long models run",
                        "Predictions by the time that their model ran.",
                        Query(rate(f"{run}_bucket", MODEL, "le"), "{{le}}"),
                        unit="s",
                    ),
                ],
            ),
            Row(
                "Polls",
                9,
                [
                    lines(
                        "Seen late, 95 %",
                        "From a prediction's end until it was first seen. Polls that are far apart make it long; so do "
                        "webhooks that cannot be delivered. All models.",
                        Query(quantile(0.95, lag, JOB, by_observer), f"{{{{{by_observer}}}}}"),
                        unit="s",
                        limit=300,
                        width=8,
                    ),
                    lines(
                        "Reads of a prediction",
                        "How often one was read until its end was seen, on average. Many reads are what a wait, a "
                        "stream or a webhook would save. All models.",
                        Query(mean(polls, JOB, by_observer), f"{{{{{by_observer}}}}}"),
                        unit="short",
                        width=8,
                    ),
                    lines(
                        "Creates and polls",
                        "Requests that read a prediction, and requests that create one. All models.",
                        Query(
                            rate(
                                requests,
                                f'{JOB}, replicate_proxy_tenant=~"$tenant", replicate_operation="predictions.get"',
                            ),
                            "polls",
                        ),
                        Query(
                            rate(
                                requests,
                                f'{JOB}, replicate_proxy_tenant=~"$tenant", '
                                'replicate_operation=~"(.+[.])?predictions[.]create"',
                            ),
                            "creates",
                        ),
                        unit="reqps",
                        width=8,
                    ),
                ],
            ),
            Row(
                "Cost",
                9,
                [
                    lines(
                        "Per hour, by tenant",
                        "Estimated by your own prices, when the end of a prediction is seen.",
                        Query(
                            f"3600 * {rate(cost, COST, f'replicate_proxy_tenant, {money}')}",
                            f"{{{{replicate_proxy_tenant}}}}, {{{{{money}}}}}",
                        ),
                        unit="short",
                        stacked=True,
                        links=[of_series("Its requests", TRAFFIC, "tenant", "replicate_proxy_tenant")],
                    ),
                    lines(
                        "Per hour, by model",
                        "Estimated by your own prices, when the end of a prediction is seen.",
                        Query(
                            f"3600 * {rate(cost, COST, f'{by_model}, {money}')}", f"{{{{{by_model}}}}}, {{{{{money}}}}}"
                        ),
                        unit="short",
                        stacked=True,
                    ),
                    listing(
                        "Who spends on what",
                        "In the whole time range.",
                        [
                            (
                                "Cost",
                                Query(total(cost, COST, f"replicate_proxy_tenant, {by_model}, {money}"), now=True),
                                "short",
                            )
                        ],
                        {"replicate_proxy_tenant": "Tenant", by_model: "Model", money: "Currency"},
                    ),
                ],
            ),
            Row(
                "Tokens, and the GenAI conventions",
                9,
                [
                    lines(
                        "Tokens per second",
                        "Where Replicate counts them.",
                        Query(
                            rate(f"{tokens}_sum", GEN_AI, "gen_ai_response_model, gen_ai_token_type"),
                            "{{gen_ai_response_model}}, {{gen_ai_token_type}}",
                        ),
                        unit="short",
                        width=8,
                    ),
                    lines(
                        "Operations by model, 95 %",
                        "create_prediction: the request that creates; generate_content: the prediction, from creation "
                        "to end.",
                        Query(
                            quantile(0.95, gen_ai, GEN_AI, "gen_ai_operation_name, gen_ai_response_model"),
                            "{{gen_ai_operation_name}} {{gen_ai_response_model}}",
                        ),
                        unit="s",
                        width=8,
                    ),
                    lines(
                        "Errors",
                        "Statuses of creates that Replicate refused, and what became of predictions.",
                        Query(
                            rate(f"{gen_ai}_count", f'{JOB}, error_type!=""', "gen_ai_operation_name, error_type"),
                            "{{gen_ai_operation_name}} {{error_type}}",
                        ),
                        unit="ops",
                        stacked=True,
                        width=8,
                    ),
                ],
            ),
        ],
    )


def made() -> dict[str, str]:
    """Text by name of the file."""
    return {
        f"{name}.json": json.dumps(model, indent=2, ensure_ascii=False) + "\n"
        for name, model in (("predictions", predictions()), ("traffic", traffic()))
    }


def main() -> None:
    for name, text in made().items():
        path = FOLDER / name
        if "--write" in sys.argv:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"{path} is not up to date: python -m tests.dashboards.make --write")


if __name__ == "__main__":
    main()
