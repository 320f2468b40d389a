"""The demo's traffic in Arize Phoenix: found by what the caller said of it, and photographed. Run by `scripts/phoenix`.

Phoenix binds its gRPC port on all interfaces, whatever it is told: so all of it runs where there is none but loopback.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements" / "phoenix.txt"
PATIENCE = 90.0  # seconds; Phoenix takes 8 to start, and longer at its first start

# What the demo's Portkey client says of its requests.
TRACE_ID = ("portkey.trace_id", "demo")
METADATA = ("portkey.metadata.team", "design")
MODEL = "replicate/hello-world"

# What has to be in the picture, from the first.
SHOWN = ("portkey.trace_id", METADATA[0], "replicate.prediction.cost", "replicate_proxy.tenant")

# Nothing of Phoenix's that a trace does not need, and nothing that asks the internet.
SETTINGS = {
    "PHOENIX_HOST": "127.0.0.1",
    "PHOENIX_TELEMETRY_ENABLED": "false",
    "PHOENIX_ALLOW_EXTERNAL_RESOURCES": "false",
    "PHOENIX_ALLOWED_SANDBOX_PROVIDERS": "NONE",
    "PHOENIX_DISABLE_AGENT_ASSISTANT": "true",
    "PHOENIX_AGENTS_DISABLE_BASH": "true",
    "PHOENIX_AGENTS_DISABLE_WEB_ACCESS": "true",
    "PHOENIX_AGENTS_DISABLE_GITHUB": "true",
    # It keeps attributes in the order of a set: with this one, the proxy's stand together.
    "PYTHONHASHSEED": "1",
}
SPANS = """query ($condition: String) {
  projects { edges { node { ... on Project { id name spans(first: 1000, filterCondition: $condition) {
    edges { node { name spanId } }
  } } } } }
}"""

T = TypeVar("T")
direct = build_opener(ProxyHandler({}))


class Failed(Exception):
    """What is told to whoever runs this."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/phoenix", description="The demo's traffic in Arize Phoenix, on this machine alone."
    )
    parser.add_argument("--screenshot", type=Path, metavar="PATH", help="take a picture of the prediction's trace")
    parser.add_argument(
        "--exposed",
        action="store_true",
        help="run where others may reach Phoenix's gRPC port, if this machine has no network namespaces",
    )
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # it has started itself there
    given = parser.parse_args()
    for name in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, lambda *_: sys.exit(143))
    try:
        if given.screenshot is not None and shutil.which("chromium") is None:
            raise Failed("--screenshot needs Chromium (Debian and Ubuntu: apt install chromium)")
        if given.inside:
            keep_to_loopback()
        elif not given.exposed:
            check_for_namespaces()
        folder = installed()
        if not (given.inside or given.exposed):
            arguments = ["unshare", "--map-root-user", "--net", sys.executable, __file__, "--inside", *sys.argv[1:]]
            os.execvpe(arguments[0], arguments, {**os.environ, "PHOENIX_DIR": str(folder)})
        show(folder, given.screenshot)
    except Failed as error:
        print(f"scripts/phoenix: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


# Nobody else.


def check_for_namespaces() -> None:
    try:
        done = subprocess.run(["unshare", "--map-root-user", "--net", "true"], capture_output=True, text=True)
        reason = done.stderr.strip() if done.returncode else ""
    except OSError:
        reason = "there is no program unshare"
    if reason:
        raise Failed(
            "not started. Phoenix binds its gRPC port on all interfaces of the machine and lets everybody in, so it is"
            " run in a network namespace of its own, which cannot be made here"
            f" ({reason}). On a machine that nobody else reaches, add --exposed."
        )


def keep_to_loopback() -> None:
    """Bring up the namespace's `lo`, and make sure that there is nothing else."""
    import fcntl  # Linux has it, as it has namespaces

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:

        def flags(name: str) -> int:
            answer = fcntl.ioctl(any_socket, 0x8913, struct.pack("16s24x", name.encode()))  # SIOCGIFFLAGS
            return int(struct.unpack("16xH22x", answer)[0])

        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sH22x", b"lo", flags("lo") | 1))  # SIOCSIFFLAGS, IFF_UP
        others = [name for _, name in socket.if_nameindex() if name != "lo" and flags(name) & 1]
    if others:
        raise Failed(f"not started: {', '.join(others)} can be reached from elsewhere")


# The server.


def installed() -> Path:
    """The folder with Phoenix's own virtual environment, made if it is not there or not as `REQUIREMENTS` says."""
    default = Path(os.environ.get("TMPDIR") or "/tmp") / f"replicate-proxy-mw-phoenix-{os.getuid()}"
    folder = Path(os.environ.get("PHOENIX_DIR") or default).absolute()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise Failed(f"{folder} is somebody else's")
    stamp, wanted = folder / "installed", sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return folder
    stamp.unlink(missing_ok=True)
    print(f"Installing Phoenix in {folder} (855 MB, about a minute) ...", flush=True)
    run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], "there is no virtual environment")
    # Without dependencies, since the list has all of them, and pip takes those with extras for not pinned.
    install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--no-deps"]
    python = str(folder / "venv" / "bin" / "python")
    run([python, *install, "-r", str(REQUIREMENTS)], "Phoenix could not be installed")
    run([python, "-m", "pip", "check"], "what was installed does not fit together")
    stamp.write_text(wanted)
    return folder


@contextmanager
def phoenix(folder: Path) -> Iterator[str]:
    """Where it listens. It forgets all when it ends."""
    port, grpc_port = free_port(), free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="data-", dir=folder) as data, open(f"{data}/log", "w+") as log:
        environment = {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            **SETTINGS,
            "HOME": data,
            "PHOENIX_WORKING_DIR": data,
            "PHOENIX_PORT": str(port),
            "PHOENIX_GRPC_PORT": str(grpc_port),
        }
        server = subprocess.Popen(
            [folder / "venv" / "bin" / "phoenix", "serve"],
            env=environment,
            cwd=data,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            wait_for(lambda: server.poll() is not None or answers(url), "Phoenix did not start")
            if server.poll() is not None:
                log.seek(0)
                raise Failed(f"Phoenix did not start:\n{log.read()[-2000:]}")
            yield url
        finally:
            end(server)
    for what in (port, grpc_port):
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", what)) == 0:
                raise Failed(f"something still listens on port {what}")
    print("Phoenix has ended, and nothing listens.")


def end(server: subprocess.Popen[bytes]) -> None:
    """With whatever it has started."""
    for how, seconds in ((signal.SIGTERM, 15.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(server.pid, how)
            server.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def answers(url: str) -> bool:
    try:
        with direct.open(f"{url}/healthz", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


# What is done with it.


def show(folder: Path, screenshot: Path | None) -> None:
    print("Starting Phoenix ...", flush=True)
    with phoenix(folder) as url:
        print(f"The demo sends its spans to {url}/v1/traces ...", flush=True)
        demo = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--once", "--otlp", url]
        run(demo, "the demo failed")
        found = find(url)
        print(found.text)
        if screenshot is not None:
            screenshot = screenshot.absolute()
            photograph(f"{url}/projects/{found.project}/traces/{found.trace_id}", screenshot)
            print(f"\n{screenshot}: {screenshot.stat().st_size / 1000:.0f} kB")


@dataclass(frozen=True)
class Found:
    """A prediction, and where Phoenix shows it."""

    project: str
    trace_id: str
    text: str


def find(url: str) -> Found:
    """The prediction, by the caller's trace id and by its metadata, in both of Phoenix's APIs."""
    lines: list[str] = []
    for name, value in (TRACE_ID, METADATA):
        spans = wait_for(partial(complete, url, name, value), f"a request with {name} is not found")
        condition = f"attributes{''.join(f'[{part!r}]' for part in name.split('.'))} == {value!r}"
        project, ids = by_graphql(url, condition)
        if ids != set(spans):
            raise Failed(f"REST finds {len(spans)} spans with {name}, and GraphQL {len(ids)}")
        traces = {span["context"]["trace_id"] for span in spans.values()}
        lines.append(f"\n{name} is {value!r}: {len(spans)} spans in {len(traces)} traces")
        lines.append(
            f"  REST     GET /v1/projects/default/spans?{urlencode({'attribute': f'{name}:{value}'}, safe=':')}"
        )
        lines.append(f"  GraphQL  filterCondition: {condition}")
    [run] = [span for span in spans.values() if span["name"] == f"generate_content {MODEL}"]
    return Found(project, run["context"]["trace_id"], "\n".join([*lines, "", *story(run)]))


def complete(url: str, name: str, value: str) -> Mapping[str, Any] | None:
    """The spans, once the run of each prediction is among them: they come a moment after they were sent."""
    spans = by_rest(url, name, value)
    created = [span for span in spans.values() if span["attributes"].get("replicate.operation", "").endswith("create")]
    ended = {span["parent_id"] for span in spans.values() if span["name"].startswith("generate_content ")}
    return spans if created and ended >= {span["context"]["span_id"] for span in created} else None


def by_rest(url: str, name: str, value: str) -> Mapping[str, Any]:
    query = urlencode({"attribute": f"{name}:{value}", "limit": 1000})
    found = ask(Request(f"{url}/v1/projects/default/spans?{query}"))
    return {span["context"]["span_id"]: span for span in found["data"]}


def by_graphql(url: str, condition: str) -> tuple[str, set[str]]:
    body = json.dumps({"query": SPANS, "variables": {"condition": condition}}).encode()
    found = ask(Request(f"{url}/graphql", body, {"content-type": "application/json"}))
    if found.get("errors"):
        raise Failed(f"GraphQL: {found['errors'][0]['message']}")
    [project] = [edge["node"] for edge in found["data"]["projects"]["edges"] if edge["node"]["name"] == "default"]
    return project["id"], {edge["node"]["spanId"] for edge in project["spans"]["edges"]}


def ask(request: Request) -> Any:
    try:
        with direct.open(request, timeout=30) as answer:
            return json.load(answer)
    except (OSError, ValueError) as error:
        raise Failed(f"{request.full_url}: {error}") from None


def story(run: Mapping[str, Any]) -> list[str]:
    """What happened, who ran it, and what it cost."""
    told = run["attributes"]
    try:
        who = f"{told['portkey.metadata._user']} of {told[METADATA[0]]}"
        return [
            f"Prediction {told['replicate.prediction.id']} of {told['replicate.model.name']}"
            f" {told['replicate.prediction.status']}:",
            f"  {told['replicate.prediction.queue_time']:.1f} s in the queue,"
            f" {told['replicate.prediction.run_time']:.1f} s of running,"
            f" read {told['replicate_proxy.lifecycle.polls']} times until its end was known",
            f"  for the tenant {told['replicate_proxy.tenant']}: {who}",
            f"  {told['replicate.prediction.cost']:.5f} {told['replicate.prediction.cost.currency']}, by the app's own"
            f" prices ({told['replicate.prediction.cost.basis']})",
            f"  trace {run['context']['trace_id']}",
        ]
    except KeyError as missing:
        raise Failed(f"the run of the prediction was found, but it says nothing of {missing}") from None


def photograph(url: str, path: Path) -> None:
    """The trace as a tree, with the run's attributes beside it."""
    from playwright.sync_api import Error, expect, sync_playwright

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with sync_playwright() as playwright:
            # Its sandbox wants what a namespace does not give; the only page it opens is Phoenix's own.
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 960}, reduced_motion="reduce")
            page.add_init_script("localStorage.setItem('arize-phoenix-theme', 'light')")
            page.goto(url, wait_until="networkidle")
            page.get_by_text(f"generate_content {MODEL}").first.click()
            page.get_by_role("button", name="Collapse side navigation").click()
            page.get_by_role("tab", name="Attributes").click()
            shown = [page.get_by_text(name, exact=True).first for name in SHOWN]
            shown[0].evaluate("row => row.scrollIntoView({block: 'start'})")
            page.mouse.wheel(0, -40)
            page.wait_for_load_state("networkidle")
            page.wait_for_timeout(500)  # what slides in has arrived
            for row in shown:
                expect(row).to_be_in_viewport()
            page.get_by_role("dialog").first.screenshot(path=path)
            browser.close()
    except (AssertionError, Error) as error:
        raise Failed(f"no picture: {error}") from None


# Small things.


def run(arguments: list[str], otherwise: str) -> None:
    done = subprocess.run(arguments, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise Failed(f"{otherwise}:\n{(done.stdout + done.stderr)[-2000:]}")


def wait_for(what: Callable[[], T | None], otherwise: str) -> T:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.2)
    raise Failed(f"{otherwise} within {PATIENCE:.0f} s")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
