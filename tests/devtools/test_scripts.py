"""The two commands for newcomers: `scripts/setup`, with a Python that only writes down what it is asked; the demo."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests import trees
from tests.clients.drivers import require

ROOT = Path(__file__).resolve().parents[2]

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


def demo(tmp_path: Path, *, path: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/demo.py", "--once"],
        # As set on a machine that traces other things and reaches the world through a proxy.
        env={
            **{name: value for name, value in os.environ.items() if name != "COLUMNS"},
            "PATH": path,
            "OTEL_SDK_DISABLED": "true",
            "HTTP_PROXY": "http://127.0.0.1:9",
            "PYTHONWARNINGS": "default",
        },
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
    )


@pytest.mark.parametrize("curl", [True, False])
def test_the_demo_shows_every_call_with_its_tree(tmp_path: Path, curl: bool) -> None:
    require("curl" if curl else None)
    with demo(tmp_path, path=os.environ["PATH"] if curl else str(tmp_path)) as process:
        shown, _ = process.communicate(timeout=50)
    assert process.returncode == 0, shown
    assert shown.splitlines()[1].startswith("All of it runs on this machine, on FakeReplicate")
    assert shown.splitlines()[-1] == "Every call went as it should."
    for called in (
        'portkey.post("predictions",',
        "portkey.get(path=",
        "curl -sS -N http" if curl else "urlopen(Request(",
    ):
        assert called in shown
    for answered in ('"output": "hello Alice"', '"status": "canceled"', "event: done", "→ 401"):
        assert answered in shown
    for outcome in ("outcome=forwarded  tenant=team-a", "outcome=forwarded  tenant=team-b", "outcome=auth_invalid"):
        assert outcome in shown
    for run in (
        "generate_content replicate/hello-world",
        "prediction.queue_time=0.4  prediction.run_time=1.1",
        "prediction.cost=0.00011  prediction.cost.currency=USD",
        "prediction.cost.basis=per_input_token,per_output_token",
        "lifecycle.observed_by=cancel",
    ):
        assert run in shown
    assert shown.count("the tree of its create is complete") == 4
    [of_readme] = trees.shown(ROOT.joinpath("README.md").read_text(encoding="utf-8"))
    # How often it was asked until the end differs, and is a number.
    assert of_readme in [trees.words(part) for part in shown.split("\n\n")]
    for noise in ("\x1b", "\r", "Traceback", "Warning"):
        assert noise not in shown


def test_ctrl_c_ends_the_demo_without_a_traceback(tmp_path: Path) -> None:
    with demo(tmp_path, path=os.environ["PATH"]) as process:
        assert process.stdout is not None
        while "2. Poll" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in shown
