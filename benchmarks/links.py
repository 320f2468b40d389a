"""What rewriting links costs per answer: `python benchmarks/links.py`.

Three ways for the same bytes: pass them on, splice links into their text as the layer does, parse and write them anew.
"""

from __future__ import annotations

import json
import timeit
from collections.abc import Callable
from typing import Any

from replicate_proxy_mw.layers.links import PUBLIC_BASE, rewritten

HERE = "https://app.example/v1"


def link(url: str) -> str | None:
    return HERE + url[len(PUBLIC_BASE) :] if url.startswith(PUBLIC_BASE + "/") else None


def prediction() -> bytes:
    """1.2 kB, as most are."""
    own = f"{PUBLIC_BASE}/predictions/gm3qorzdhgbfurvjtvhg6dckhu"
    return json.dumps(
        {
            "id": "gm3qorzdhgbfurvjtvhg6dckhu",
            "model": "replicate/hello-world",
            "version": "5c7d5dc6dd8bf75c1acaa8565735e7986bc5b66206b55cca93cb72c9bf15ccaa",
            "input": {"text": "Alice", "seed": 42, "guidance": 7.5, "prompt": "an astronaut on a horse, " * 8},
            "logs": "Using seed: 42\n" * 16,
            "output": ["https://replicate.delivery/pbxt/gm3qorzdhgbfurvjtvhg6dckhu/out-0.png"],
            "data_removed": False,
            "error": None,
            "source": "api",
            "status": "succeeded",
            "created_at": "2026-11-21T09:00:00.000Z",
            "started_at": "2026-11-21T09:00:00.200Z",
            "completed_at": "2026-11-21T09:00:00.800Z",
            "urls": {
                "get": own,
                "cancel": f"{own}/cancel",
                "web": "https://replicate.com/p/gm3qorzdhgbfurvjtvhg6dckhu",
            },
            "metrics": {"predict_time": 0.6, "total_time": 0.8},
        }
    ).encode()


def models() -> bytes:
    """2 MB, as recorded: 25 models, each with the schema of its latest version."""
    parameter = {"type": "number", "title": "Guidance scale", "minimum": 0, "maximum": 20, "default": 7.5, "x-order": 3}
    schema = {"components": {"schemas": {"Input": {f"parameter_{i}": parameter for i in range(700)}}}}
    model = {"owner": "acme", "url": "https://replicate.com/acme/x", "latest_version": {"openapi_schema": schema}}
    return json.dumps({"next": f"{PUBLIC_BASE}/models?cursor=cD0", "previous": None, "results": [model] * 25}).encode()


def anew(body: bytes, edit: Callable[[Any], None]) -> bytes:
    content = json.loads(body)
    edit(content)
    return json.dumps(content).encode()


def edit_urls(content: Any) -> None:
    content["urls"] |= {name: link(content["urls"][name]) for name in ("get", "cancel")}


def edit_list(content: Any) -> None:
    content["next"] = link(content["next"])


def microseconds(run: Callable[[], object]) -> float:
    """The best of seven, each of a fifth of a second or so."""
    timer = timeit.Timer(run)
    count, seconds = timer.autorange()
    return min(seconds, *timer.repeat(repeat=6, number=count)) / count * 1e6


def main() -> None:
    jobs = {"get": link, "cancel": link}
    lists = {"next": link, "previous": link}
    print(
        f"{'':<16}{'bytes':>10}{'passed on':>12}{'spliced':>12}{'anew':>12}{'anew/spliced':>14}{'spliced/passed':>16}"
    )
    for name, body, edits, within, edit in (
        ("a prediction", prediction(), jobs, "urls", edit_urls),
        ("25 models", models(), lists, None, edit_list),
    ):

        def splice(body: bytes = body, edits: Any = edits, within: str | None = within) -> bytes:
            return rewritten(body.decode(), edits=edits, within=within).encode()

        def again(body: bytes = body, edit: Callable[[Any], None] = edit) -> bytes:
            return anew(body, edit)

        def passed(body: bytes = body) -> bytes:
            return body

        assert splice() == again() != body
        nothing, spliced, parsed = microseconds(passed), microseconds(splice), microseconds(again)
        figures = f"{len(body):>10}{nothing:>9.2f} µs{spliced:>9.1f} µs{parsed:>9.1f} µs"
        print(f"{name:<16}{figures}{parsed / spliced:>14.1f}{spliced / nothing:>16.0f}")


if __name__ == "__main__":
    main()
