"""What newcomers run: `scripts/setup`, with a Python that writes down what it is asked; the demo, and its pictures."""

from __future__ import annotations

import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.clients.drivers import require
from tests.otlp import Sink

ROOT = Path(__file__).resolve().parents[2]
# The models that the demo creates predictions of.
MODELS = [
    "black-forest-labs/flux-schnell",
    "meta/meta-llama-3-8b-instruct",
    "replicate/always-fails",
    "replicate/hello-world",
]
PICTURES = ["story-dark.png", "story.png", "viewer-dark.png", "viewer.png"]

# Answers as Python would, as far as `scripts/setup` asks, and writes down each `-m`.
PYTHON = """#!/bin/sh
case "$*" in
*version_info*) exit ${FAKE_PYTHON_OLD:-0} ;;
*ensurepip*) exit ${FAKE_PYTHON_BARE:-0} ;;
"-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
esac
case "$1" in -m) echo "$*" >>log ;; esac
case "$*" in *pip*install*)
    echo "what pip says" >&2
    exit ${FAKE_PIP_FAILS:-0}
    ;;
esac
"""
PIP = "-m pip --disable-pip-version-check --no-input install --quiet"


class Clone:
    """A fresh clone, on a machine with the Python above."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for path in ("scripts/setup", "requirements/demo.txt", "requirements/dev.txt", "pyproject.toml"):
            (folder / path).parent.mkdir(exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
        self.python = folder / "any-python"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def setup(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self.folder / "scripts/setup", *arguments],
            env={"PATH": os.defpath, "PYTHON": str(self.python), **environment},
            cwd="/",
            capture_output=True,
            text=True,
        )

    def log(self) -> list[str]:
        """What Python was asked since the last look."""
        log = self.folder / "log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def installs(group: str) -> list[str]:
    return [f"{PIP} --require-hashes -r requirements/{group}.txt", f"{PIP} --no-deps --no-build-isolation -e ."]


def test_setup_installs_the_locked_group_and_the_package(clone: Clone) -> None:
    done = clone.setup("demo")
    assert done.returncode == 0
    assert clone.log() == ["-m venv --clear .venv", *installs("demo")]
    assert done.stdout == ""
    assert done.stderr.startswith("Setting up .venv (first run, about 30 s)  done in ")


def test_setup_is_quiet_when_there_is_nothing_to_do(clone: Clone) -> None:
    clone.setup("demo")
    clone.log()
    again = clone.setup("demo")
    assert (again.returncode, again.stdout, again.stderr, clone.log()) == (0, "", "", [])


def test_dev_holds_demo_but_not_the_other_way_round(clone: Clone) -> None:
    clone.setup("demo")
    clone.log()
    assert clone.setup("dev").stderr.startswith("Updating .venv  done")
    assert clone.log() == installs("dev")
    assert clone.setup("demo").stderr == ""
    assert clone.log() == []


@pytest.mark.parametrize("changed", ["requirements/demo.txt", "pyproject.toml"])
def test_setup_follows_changes(clone: Clone, changed: str) -> None:
    clone.setup("demo")
    clone.log()
    with (clone.folder / changed).open("a") as file:
        file.write("# changed\n")
    clone.setup("demo")
    assert clone.log() == installs("demo")


def test_a_set_up_that_failed_is_not_taken_for_done(clone: Clone) -> None:
    failed = clone.setup("demo", FAKE_PIP_FAILS="7")
    assert failed.returncode == 7
    assert failed.stderr.endswith("\nwhat pip says\n\nscripts/setup: not finished.\n")
    clone.log()
    assert clone.setup("demo").returncode == 0
    assert clone.log() == installs("demo")


def test_a_python_that_will_not_do_is_named(clone: Clone) -> None:
    old = clone.setup("demo", FAKE_PYTHON_OLD="1")
    assert old.returncode == 1
    assert f"PYTHON={clone.python} is not a Python 3.11 or newer" in old.stderr
    assert clone.log() == []


def test_no_python_at_all_is_said(clone: Clone, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("cat", "cksum", "dirname"):
        (tools / tool).symlink_to(str(shutil.which(tool)))
    none = clone.setup("demo", PYTHON="", PATH=str(tools))
    assert none.returncode == 1
    assert "no Python 3.11 or newer on PATH" in none.stderr
    (tools / "python3").symlink_to(clone.python)
    bare = clone.setup("demo", PYTHON="", PATH=str(tools), FAKE_PYTHON_BARE="1")
    assert bare.returncode == 1
    assert "python3 comes without venv and pip" in bare.stderr


def test_setup_wants_a_group(clone: Clone) -> None:
    for arguments in ((), ("judge",)):
        assert (clone.setup(*arguments).returncode, clone.log()) == (2, [])


def demo(folder: Path, *arguments: str, path: str = os.environ["PATH"]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/demo.py", *arguments],
        # As set on a machine that traces other things and reaches the world through a proxy.
        env={
            **{name: value for name, value in os.environ.items() if name != "COLUMNS"},
            "PATH": path,
            "OTEL_SDK_DISABLED": "true",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "PYTHONWARNINGS": "default",
        },
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


def shows_every_call(shown: str) -> None:
    assert shown.splitlines()[1].startswith("All of it runs on this machine, on FakeReplicate")
    for called in ('portkey.post("predictions",', "portkey.get(path="):
        assert called in shown
    for answered in (
        '"output": "hello Alice"',
        '"status": "canceled"',
        "event: done",
        '"error": "CUDA out of memory"',
        "→ 401",
    ):
        assert answered in shown
    for outcome in ("outcome=forwarded  tenant=team-a", "outcome=forwarded  tenant=team-b", "outcome=auth_invalid"):
        assert outcome in shown
    for run in (
        "generate_content replicate/hello-world",
        "prediction.queue_time=0.4  prediction.run_time=1.1",
        "prediction.cost=0.00011  prediction.cost.currency=USD",
        "prediction.cost.basis=per_input_token,per_output_token",
        "lifecycle.observed_by=cancel",
        "stream.complete=true",
        "503 error",
        "error.type=prediction_failed",
    ):
        assert run in shown
    assert shown.count("the tree of its create is complete") == 4
    assert "url.path=/v1/-/streams/" not in shown
    assert "url.path=/traces" not in shown
    for noise in ("\x1b", "\r", "Traceback", "Warning"):
        assert noise not in shown


def test_the_demo_shows_every_call_with_its_tree_and_sends_its_spans(tmp_path: Path) -> None:
    require("curl")
    with Sink() as sink, demo(tmp_path, "--once", "--otlp", f"{sink.url}/") as process:
        shown, _ = process.communicate(timeout=50)
    assert process.returncode == 0, shown
    shows_every_call(shown)
    assert "curl -sS -N http" in shown
    assert shown.splitlines()[-1] == "Every call went as it should."
    assert {span.resource["service.name"] for span in sink.spans} == {"illustration-desk"}
    sent = [span for span in sink.spans if span.scope == "replicate_proxy_mw"]
    assert sorted(span.name for span in sent if span.name.startswith("generate_content")) == [
        f"generate_content {model}" for model in MODELS
    ]
    assert {span.attributes["portkey.trace_id"] for span in sent if "portkey.trace_id" in span.attributes} == {
        "demo",
        "cover-story",
    }
    # What the terminal shows is what arrives: nothing was left in a batch.
    assert {span.trace_id for span in sink.spans} == set(re.findall(r"^trace (\w+)", shown, re.MULTILINE))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://127.0.0.1:9", "nothing takes spans at http://127.0.0.1:9: "),
        ("127.0.0.1:4318", "--otlp wants a URL as http://127.0.0.1:4318, not '127.0.0.1:4318'"),
    ],
)
def test_the_demo_says_where_its_spans_cannot_go(tmp_path: Path, url: str, reason: str) -> None:
    with demo(tmp_path, "--otlp", url) as process:
        shown, _ = process.communicate(timeout=50)
    assert process.returncode == 1
    assert f"The demo failed: {reason}" in shown
    assert "1. Create" not in shown


@pytest.fixture(scope="module")
def viewer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The viewer's address in a demo that has made its calls, without cURL, and stays."""
    folder = tmp_path_factory.mktemp("no_curl_here")
    with demo(folder, path=str(folder)) as process:
        assert process.stdout is not None
        shown = ""
        while "Ctrl-C" not in shown:
            assert process.poll() is None, shown
            shown += process.stdout.readline()
        try:
            addresses = re.findall(r"http://127\.0\.0\.1:\d+/traces/", shown)
            assert len(addresses) == 2
            assert len(set(addresses)) == 1
            yield addresses[0]
        finally:
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert rest.splitlines()[-1] == "Bye."
        shows_every_call(shown + rest)
        assert "urlopen(Request(" in shown


def test_the_demo_stays_with_a_viewer_of_what_it_did(viewer: str) -> None:
    page = httpx.get(viewer)
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    listed = httpx.get(f"{viewer}requests.json").json()["requests"]
    creates = [one for one in listed if one["queue_time"] is not None]
    assert sorted(one["model"] for one in creates) == MODELS
    assert {one["tenant"] for one in creates} == {"team-a", "team-b"}
    assert [one["outcome"] for one in listed if one["status"] == 401] == ["auth_invalid"]
    [of_llama] = [one for one in creates if one["model"].startswith("meta/")]
    rows = httpx.get(f"{viewer}story.json", params={"trace": of_llama["trace_id"]}).json()["rows"]
    assert {"create", "attempt", "queue", "run", "stream", "poll"} <= {row["kind"] for row in rows}


def test_pictures_are_taken_of_it(viewer: str, tmp_path: Path) -> None:
    require("chromium")
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/screenshots.py", "--of", viewer, "--to", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == PICTURES
    assert {size(path) for path in tmp_path.iterdir()} == {(2560, 1600)}
    # Four different ones, and none of an empty page.
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 4
    assert min(path.stat().st_size for path in tmp_path.iterdir()) > 20_000


def test_pictures_in_the_documentation_are_such() -> None:
    pictures = [ROOT / "docs/images" / name for name in PICTURES]
    assert {size(path) for path in pictures} == {(2560, 1600)}
    assert max(path.stat().st_size for path in pictures) < 250_000


def size(png: Path) -> tuple[int, int]:
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    return width, height


def test_ctrl_c_ends_the_demo_without_a_traceback(tmp_path: Path) -> None:
    with demo(tmp_path) as process:
        assert process.stdout is not None
        while "2. Poll" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in shown
