"""The dashboards' queries, asked of a real Prometheus; run by `scripts/prometheus`."""

from __future__ import annotations

import argparse
import logging
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.dashboards.prometheus import Prometheus  # noqa: E402
from tests.dashboards.queries import Asked, of_panels, replaced  # noqa: E402
from tests.dashboards.scraped import WINDOW, chosen, scraped  # noqa: E402

PAGE = ROOT / "docs" / "dashboards.md"
PICTURED = "sort_desc(sum by (replicate_operation, replicate_proxy_outcome) (replicate_proxy_requests_total))"
MARKS = re.compile(r"(<!-- prometheus -->\n).*(\n<!-- end of prometheus -->)", re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/prometheus", description=__doc__)
    parser.add_argument(
        "--write", nargs="?", type=Path, const=PAGE, metavar="PAGE", help="put the table into docs/dashboards.md"
    )
    parser.add_argument("--screenshot", type=Path, metavar="PNG", help="of Prometheus, by Chromium")
    options = parser.parse_args()
    binary = shutil.which("prometheus")
    if binary is None:
        print("scripts/prometheus: there is no prometheus on PATH (Debian: apt install prometheus).", file=sys.stderr)
        return 2
    logging.disable()  # what is to fail there fails
    with scraped() as server:
        text, empty = table(server, binary)
        print(text)
        if options.screenshot is not None:
            picture(server, options.screenshot)
    if options.write is not None:
        page = options.write.read_text(encoding="utf-8")
        options.write.write_text(MARKS.sub(lambda found: f"{found[1]}\n{text}\n{found[2]}", page), encoding="utf-8")
    return min(empty, 1)


def table(server: Prometheus, binary: str) -> tuple[str, int]:
    """What each panel would show, and how many would show nothing."""
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
    version = (said.stdout + said.stderr).split("version ")[1].split()[0]
    variables = chosen(server)
    lines, empty = [], 0
    for asked in of_panels():
        found = server.query(replaced(asked.expr, variables, WINDOW))
        numbers = [one for one in found if math.isfinite(float(one["value"][1]))]
        empty += not numbers
        lines.append(f"| {asked.where.partition(' (')[0]} | {len(found)} | {_largest(asked, numbers)} |")
    head = f"{date.today().isoformat()}, `scripts/prometheus`, Prometheus {version}, some seconds of traffic."
    return "\n".join([head, "", "| panel | series | the largest |", "| --- | --- | --- |", *lines]), empty


def _largest(asked: Asked, found: Sequence[Mapping[str, Any]]) -> str:
    if not found:
        return "nothing"
    one = max(found, key=lambda series: float(series["value"][1]))
    legend = asked.legend.replace("__auto", "")
    legend = re.sub(r"{{(\w+)}}", lambda label: str(one["metric"].get(label[1], "")), legend).strip()
    number = f"{float(one['value'][1]):.3g}"
    return f"{number} ({legend})" if legend else number


def picture(server: Prometheus, path: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    query = urlencode({"g0.expr": PICTURED, "g0.tab": "1"})
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(f"{server.url}/classic/graph?{query}")
            page.get_by_text("forwarded").first.wait_for()
            page.screenshot(path=path)
        finally:
            browser.close()


if __name__ == "__main__":
    sys.exit(main())
