"""The pictures of the trace viewer in docs/images, taken of the real demo by Chromium; run by `scripts/screenshots`."""

from __future__ import annotations

import argparse
import base64
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1280, 800
MAX_SIZE = 250_000  # bytes of a picture: they are cloned with the repository
STORY = "meta/meta-llama-3-8b-instruct"  # the demo's model with the most to tell: a stream, a poll and a retry

# From a picture to its 256 most frequent colours, and for each pixel the number of the nearest of them.
FEW_COLOURS = """async (png) => {
    const image = await createImageBitmap(await (await fetch("data:image/png;base64," + png)).blob());
    const canvas = new OffscreenCanvas(image.width, image.height).getContext("2d");
    canvas.drawImage(image, 0, 0);
    const pixels = new Uint32Array(canvas.getImageData(0, 0, image.width, image.height).data.buffer);
    const counts = new Map();
    for (let at = 0, from = 0; at < pixels.length; from = at) {
        while (pixels[at] === pixels[from]) at++;  // most pixels are as the one before
        counts.set(pixels[from], (counts.get(pixels[from]) ?? 0) + at - from);
    }
    const rgb = (pixel) => [pixel & 255, (pixel >> 8) & 255, (pixel >> 16) & 255];
    const palette = [...counts].sort((a, b) => b[1] - a[1]).slice(0, 256).map(([pixel]) => rgb(pixel));
    const numbers = new Map();
    for (const pixel of counts.keys()) {
        const distances = palette.map((known) => Math.hypot(...rgb(pixel).map((part, at) => part - known[at])));
        numbers.set(pixel, distances.indexOf(Math.min(...distances)));
    }
    let text = "";
    for (let at = 0, from = 0; at < pixels.length; from = at) {
        while (pixels[at] === pixels[from]) at++;
        text += String.fromCharCode(numbers.get(pixels[from])).repeat(at - from);
    }
    return { width: image.width, height: image.height, palette: palette.flat(), pixels: btoa(text) };
}"""


@contextmanager
def demo() -> Iterator[str]:
    """The demo, when it has made its calls; the address of its viewer."""
    command = [sys.executable, str(ROOT / "scripts/demo.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, encoding="utf-8") as process:
        assert process.stdout is not None
        try:
            shown = ""
            while "Ctrl-C" not in (line := process.stdout.readline()):
                if not line:
                    raise SystemExit(f"The demo ended:\n{shown}")
                shown += line
            yield re.findall(r"http://\S+/traces/", shown)[-1]
        finally:
            process.send_signal(signal.SIGINT)
            process.stdout.read()


def take(viewer: str, folder: Path) -> list[Path]:
    """Pictures of the list and of a prediction's story, in light and in dark."""
    from playwright.sync_api import sync_playwright

    with urlopen(f"{viewer}requests.json") as answer:
        requests: list[dict[str, Any]] = json.load(answer)["requests"]
    [create] = [one for one in requests if one["model"] == STORY and one["method"] == "POST"]
    taken = []
    with sync_playwright() as playwright:
        sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=sandbox)
        painter = browser.new_page()
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, device_scale_factor=2)
        for suffix in ("", "-dark"):
            page.emulate_media(color_scheme="dark" if suffix else "light", reduced_motion="reduce")
            for name, at in (("viewer", ""), ("story", f"#{create['trace_id']}")):
                page.goto(viewer + at)
                page.get_by_text(STORY).first.wait_for()
                if at:
                    page.get_by_text("run", exact=True).click()  # what is known of it, below
                    page.get_by_text("replicate.prediction.queue_time").wait_for()
                taken.append(folder / f"{name}{suffix}.png")
                shown = page.screenshot(animations="disabled", caret="hide")
                taken[-1].write_bytes(smaller(painter.evaluate(FEW_COLOURS, base64.b64encode(shown).decode())))
        browser.close()
    return taken


def smaller(picture: Mapping[str, Any]) -> bytes:
    """A PNG with a palette: less than half of what Chromium makes of the same."""
    width, pixels = picture["width"], base64.b64decode(picture["pixels"])
    rows = b"".join(b"\0" + pixels[at : at + width] for at in range(0, len(pixels), width))
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, picture["height"], 8, 3, 0, 0, 0),
        b"PLTE": bytes(picture["palette"]),
        b"IDAT": zlib.compress(rows, 9),
        b"IEND": b"",
    }
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/screenshots", description="Pictures of the trace viewer.")
    parser.add_argument("--of", metavar="URL", help="a viewer that shows the demo's requests; by default a demo's own")
    parser.add_argument("--to", metavar="FOLDER", type=Path, default=ROOT / "docs/images")
    given = parser.parse_args()
    os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1"
    if given.of is not None:
        taken = take(given.of, given.to)
    else:
        with demo() as viewer:
            taken = take(viewer, given.to)
    for path in taken:
        size = path.stat().st_size
        print(f"{path}  {size // 1000} kB")
        if size > MAX_SIZE:
            raise SystemExit(f"{path.name} is larger than {MAX_SIZE // 1000} kB")


if __name__ == "__main__":
    main()
