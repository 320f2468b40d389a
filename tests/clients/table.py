"""The table of clients in `docs/clients.md`, as measured. `python -m tests.clients.table --write` measures it anew."""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.clients.drivers import NODE
from tests.clients.rows import CLIENTS, ROWS, Row
from tests.clients.stage import Stage, counted

DOCS = Path(__file__).parents[2] / "docs" / "clients.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
WIDTH = 160

# What differs from one run to the next.
_UNSTEADY = (
    (re.compile(r"(?<=://)127\.0\.0\.1:\d+"), "HOST"),
    (re.compile(r"\b[0-9a-f]{64}\b|\b[0-9a-f]{32}\b|\b(?=[a-z]*\d)[a-z0-9]{26}\b"), "ID"),
    (re.compile(r"\s+"), " "),
)


def steady(text: str) -> str:
    """`text` on one line, without what no two runs have in common, and not too long."""
    for pattern, word in _UNSTEADY:
        text = pattern.sub(word, text)
    text = text.strip()
    return text if len(text) <= WIDTH else text[:WIDTH] + "…"


def words(answer: Mapping[str, Any]) -> str:
    """What a caller gets, in a few words."""
    if "error" not in answer:
        return _words(answer["value"])
    status, message = answer.get("status"), steady(answer["message"])
    shown = f" {status}" if status and str(status) not in message else ""
    return f"{answer['error']}{shown}: {message}".removesuffix(": ")


def _words(value: Any) -> str:
    if isinstance(value, list):
        short = all(isinstance(item, (str, int)) for item in value)
        return steady(json.dumps(value)) if short else f"list of {len(value)}"
    return _object(value) if isinstance(value, dict) else steady(json.dumps(value, ensure_ascii=False))


def _object(value: Mapping[str, Any]) -> str:
    match value:
        case {"$response": status, "body": None}:
            return str(status)
        case {"$response": status, "body": body}:
            return f"{status} {_words(body)}"
        case {"$bytes": size}:
            return f"{size} bytes"
        case {"error": {"code": code}, "detail": detail}:
            return f"{code}: {steady(detail)}"
        case {"status": str(status), "urls": {"cancel": cancel}, "output": output} if output is not None:
            return f"{_job(cancel)}: {status}, {_words(output)}"
        case {"status": str(status), "urls": {"cancel": cancel}}:
            return f"{_job(cancel)}: {status}"
        case {"results": list(results), "next": following}:
            return f"page of {len(results)}" + (", and a next one" if following else "")
        case {"results": list(results)}:
            return f"page of {len(results)}"
        case {"current_release": _, "name": name}:
            return f"deployment {name}"
        case {"latest_version": _, "name": name}:
            return f"model {name}"
        case {"checksums": _, "size": size}:
            return f"file of {size} bytes"
        case {"username": name}:
            return f"account {name}"
        case {"cog_version": _}:
            return "version"
        case {"key": _}:
            return "secret"
        case {"slug": slug, "models": models}:
            return f"collection {slug}, list of {len(models or [])}"
        case {"query": _, "models": models}:
            return f"found: list of {len(models)}"
        case {"detail": str(detail)}:
            return steady(detail)
    return steady(json.dumps(value, ensure_ascii=False))


def _job(cancel: str) -> str:
    return "training" if "/trainings/" in cancel else "prediction"


def measure(stage: Stage, row: Row) -> Row:
    """The row as it is."""
    seen = stage.play(CLIENTS[row.client].driver, row.call, row.when)
    reached = ", ".join(f"FORBIDDEN {what}" for what in seen.violations) or counted(seen.reached)
    return Row(row.client, row.call, words(seen.answer), reached, row.when)


def render(rows: list[Row]) -> str:
    parts = []
    for name, client in CLIENTS.items():
        parts.append(f"### {name}\n\n{client.preamble}\n")
        lines = ["| call | when | the caller gets | Replicate gets |", "| --- | --- | --- | --- |"]
        for row in rows:
            if row.client == name:
                cells = (_code(row.call), row.when or "", _text(row.result), row.reached)
                lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _code(text: str) -> str:
    fence = "``" if "`" in text else "`"
    return f"{fence}{text.replace('|', chr(92) + '|')}{fence}"


def _text(text: str) -> str:
    for character in "\\|<>*_`[]":
        text = text.replace(character, "\\" + character)
    return text


def versions() -> str:
    """The clients that were run."""
    node = json.loads((NODE / "package.json").read_text())["dependencies"]
    found = {
        "Python": [f"{name} {version(name)}" for name in ("portkey-ai", "openai", "replicate")],
        "Node": [f"{name} {node[name]}" for name in ("portkey-ai", "openai", "replicate")],
    }
    return "\n".join(f"- {language}: {', '.join(names)}" for language, names in found.items())


def document(rows: list[Row], old: str) -> str:
    """The page with the table put in."""
    before, _, rest = old.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{versions()}\n\n{render(rows)}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--write", action="store_true", help="write the table into the docs; else only tell what changed"
    )
    write = parser.parse_args().write
    logging.disable()  # of the apps and servers, which tell of every cut answer
    with Stage() as stage:
        measured = [measure(stage, row) for row in ROWS]
    changed = [(row, now) for row, now in zip(ROWS, measured, strict=True) if row != now]
    for row, now in changed:
        print(f"{row.client}: {row.call}  {row.when}\n  expected: {row.result}  [{row.reached}]")
        print(f"  measured: {now.result}  [{now.reached}]")
    if write:
        DOCS.write_text(document(measured, DOCS.read_text()))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
