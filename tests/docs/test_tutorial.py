"""docs/tutorial.md is typed as it stands there, by somebody with an empty folder and a clone; but for ports and ids."""

from __future__ import annotations

import re
import shutil
import site
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from replicate_proxy_mw import ProxyConfig
from tests.docs.programs import environment, free_port, running, shell
from tests.documents import ROOT, Page, execute

TUTORIAL = Page("docs/tutorial.md")
# Different in each run: ids, times, and how long things took.
CHANGING = re.compile(r"\b[0-9a-f]{32}\b|\b[a-z0-9]{26}\b|\d{4}-\d\d-\d\dT[\d:.]+Z|\b\d\.\d+\b")


def _stable(text: str) -> str:
    return CHANGING.sub("…", text)


def _after(command: str) -> str:
    """The block that follows the command: what it prints."""
    blocks = [code for _, code in TUTORIAL.code]
    return blocks[blocks.index(command) + 1]


@dataclass
class Reader:
    """In an empty folder with a clone in it; `ports` are free ones in the place of the page's."""

    home: Path
    env: dict[str, str]
    ports: dict[str, str]

    @property
    def folder(self) -> Path:
        return self.home / "my-app"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['8000']}"

    def typed(self, text: str) -> str:
        for port, free in self.ports.items():
            text = text.replace(port, free)
        # pip finds uvicorn installed already, and makes no command of it.
        return re.sub("^uvicorn", "python -m uvicorn", text, flags=re.MULTILINE)

    def types(self, containing: str, **instead: str) -> tuple[str, str]:
        """What a command prints, and what the page says that it does."""
        command = TUTORIAL.block("sh", containing)
        typed = self.typed(command)
        for old, new in instead.items():
            typed = typed.replace(old, new)
        return _stable(shell(typed, self.folder, self.env)), _stable(self.typed(_after(command)))

    def traces(self, target: str) -> Any:
        return httpx.get(f"{self.url}/traces/{target}").json()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with a clone in it."""
    home = tmp_path_factory.mktemp("tutorial")
    clone = home / "replicate-proxy-mw"
    shutil.copytree(ROOT / "src", clone / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    return home


@pytest.fixture(scope="module")
def reader(home: Path) -> Iterator[Reader]:
    env = environment(HOME=str(home), PIP_DISABLE_PIP_VERSION_CHECK="1")
    reader = Reader(home, env, {port: str(free_port()) for port in ("9000", "8000")})
    create, pip = TUTORIAL.block("sh", "pip install").split("pip install")
    # Tests have no network: dependencies, and pip itself, are found where those of the tests are.
    packages = "import site; print(site.getsitepackages()[0])"
    beside = f"echo {site.getsitepackages()[0]} > $(python -c '{packages}')/beside.pth\n"
    create = create.replace("-m venv", "-m venv --without-pip")
    shell(f"{create}{beside}python -m pip install -q --no-index --no-build-isolation{pip}", home, env)
    for name in ("fake.py", "app.py"):
        reader.folder.joinpath(name).write_text(reader.typed(TUTORIAL.block("python", f"# {name}")))
    fake, app = TUTORIAL.block("sh", "uvicorn fake:app"), TUTORIAL.block("sh", "uvicorn app:app")
    in_folder, said = "cd my-app\n. .venv/bin/activate\n", "Application startup complete."
    assert app.startswith(in_folder)
    with (
        running(in_folder + reader.typed(fake), home, int(reader.ports["9000"]), env) as of_fake,
        running(reader.typed(app), home, int(reader.ports["8000"]), env) as of_app,
    ):
        for log, command in ((of_fake, fake), (of_app, app)):
            assert said in _after(command)
            _until(log, reader.typed(_after(command)))
        yield reader


def _until(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def test_what_is_installed_is_the_clone(reader: Reader) -> None:
    ask = ". .venv/bin/activate\npython -c 'import replicate_proxy_mw as it; print(it.__file__)'"
    assert Path(shell(ask, reader.folder, reader.env).strip()).is_relative_to(reader.folder / ".venv")


def test_what_a_reader_types_and_sees(reader: Reader) -> None:
    printed, shown = reader.types(":8000/\n")
    assert printed == shown.rstrip("\n")
    for containing in ("A tulip", "pk-stranger"):
        printed, shown = reader.types(containing)
        assert printed == shown

    [create] = [one for one in reader.traces("requests.json")["requests"] if one["status"] == 201]
    [id] = re.findall(r"/v1/predictions/(\w+)", TUTORIAL.block("sh", "/v1/predictions/"))
    deadline = time.monotonic() + 20
    while '"succeeded"' not in (told := reader.types("/v1/predictions/", **{id: create["prediction_id"]}))[0]:
        assert time.monotonic() < deadline
    assert told[0] == told[1]
    _sees_in_the_viewer(reader)


def _sees_in_the_viewer(reader: Reader) -> None:
    assert "<html" in httpx.get(f"{reader.url}/traces/").text
    deadline = time.monotonic() + 20
    while (listed := reader.traces("requests.json")["requests"])[-1]["cost"] is None:
        assert time.monotonic() < deadline
    create = listed[-1]
    told = (create["status"], create["tenant"], create["model"], create["metadata"], create["cost"], create["currency"])
    assert told == (201, "me", "black-forest-labs/flux-schnell", {"team": "design"}, 0.003, "USD")
    refused = httpx.get(f"{reader.url}/v1/predictions", headers={"x-portkey-api-key": "pk-stranger"}).json()
    [found] = reader.traces(f"requests.json?q={refused['request_id']}")["requests"]
    assert (found["status"], found["outcome"]) == (401, "auth_invalid")

    rows = reader.traces(f"story.json?trace={create['trace_id']}")["rows"]
    kinds = [row["kind"] for row in rows]
    assert kinds[:4] == ["create", "attempt", "queue", "run"]
    assert {*kinds[4:]} == {"poll", "attempt"}
    for kind in ("queue", "run"):
        [row] = [row for row in rows if row["kind"] == kind]
        assert f"| {kind} | for {(row['end'] - row['start']) / 1000:.1f} s " in TUTORIAL.text
    told_of = re.findall(r"^\| (\w+) \| \w", TUTORIAL.text, re.MULTILINE)
    assert told_of == [kind for kind in dict.fromkeys(kinds) if kind != "attempt"]


def test_the_real_replicate_is_two_lines_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first is the variable that the app's terminal has set; without the second, the default holds."""
    [name] = re.findall(r"^read -rs (\w+) && export \1$", TUTORIAL.block("sh", "read -rs"), re.MULTILINE)
    assert f"export {name}=r8_the_token\n" in TUTORIAL.block("sh", "uvicorn app:app")
    app, line = TUTORIAL.block("python", "# app.py"), TUTORIAL.block("diff", "-  ")[1:]
    assert app.count(line) == 1
    monkeypatch.setenv(name, "r8_your_own_token")
    monkeypatch.setenv("REPLICATE_PROXY_KEYS", "me=pk-of-mine")
    [proxy] = execute(app.replace(line, ""))["app"].user_middleware
    assert "config" not in proxy.kwargs
    assert ProxyConfig().upstream == "https://api.replicate.com/v1"


def test_every_block_is_run_and_every_link_leads_somewhere() -> None:
    assert [TUTORIAL.count(name) for name in ("sh", "python", "json", "text", "diff")] == [8, 2, 4, 2, 1]
    assert len(TUTORIAL.code) == 17
    assert TUTORIAL.missing_links() == []
