"""Each patch of tests/security/patches removes a defence: the tests that it names have to fail on a copy of the source
that is patched so, with an assertion, and to pass on one that is not."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests" / "security" / "patches"
AT_A_TIME = 2

# Seconds for the tests of one patch. One that hangs for want of a defence fails by its own assertions before.
PATIENCE = 120


@dataclass(frozen=True)
class Defence:
    """A patch: its file, the tests it names, and what it removes."""

    path: Path
    tests: tuple[str, ...]
    removes: str

    @property
    def name(self) -> str:
        return self.path.stem

    @classmethod
    def of(cls, path: Path) -> Defence:
        head = path.read_text(encoding="utf-8").split("\n--- ", 1)[0]
        [removes] = re.findall(r"^Removes: (.+)$", head, re.MULTILINE)
        tests = re.findall(r"^Test: (\S+)$", head, re.MULTILINE)
        if not tests:
            raise ValueError(f"{path.name}: names no test")
        return cls(path, tuple(tests), removes)


def main(names: Sequence[str]) -> int:
    defences = [Defence.of(path) for path in sorted(PATCHES.glob("*.patch"))]
    chosen = [one for one in defences if not names or any(one.name.startswith(name) for name in names)]
    for name in names:
        if not any(one.name.startswith(name) for one in chosen):
            print(f"no patch begins with {name}", file=sys.stderr)
            return 2
    started = time.monotonic()
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        tests = sorted({test for one in chosen for test in one.tests})
        # The longest first.
        unpatched = pool.submit(_unpatched, tests)
        problems = []
        for one, problem in zip(chosen, pool.map(_problem, chosen), strict=True):
            problems.append(problem)
            print(f"{one.name:44} {problem or 'fails without it, as it should'}", flush=True)
    problems.append(unpatched.result())
    print(f"{'without any patch':44} {problems[-1] or f'{len(tests)} tests pass, as they should'}")
    failed = sum(map(bool, problems))
    print(f"{len(chosen)} defences, {failed} problems, {time.monotonic() - started:.0f} s")
    return min(failed, 1)


def _unpatched(tests: Sequence[str]) -> str | None:
    with tempfile.TemporaryDirectory(prefix="defences-") as folder:
        outcome = _run(Path(folder), tests, until_shown=False)
    return None if outcome.get("status") == 0 else f"FAILED\n{outcome.get('problem') or outcome['said']}"


def _problem(defence: Defence) -> str | None:
    """What is wrong with a patch or its tests, None if they do what they are there for."""
    with tempfile.TemporaryDirectory(prefix="defences-") as folder:
        outcome = _run(Path(folder), defence.tests, patch=defence.path)
    if "problem" in outcome:
        return str(outcome["problem"])
    if missing := [test for test in defence.tests if test not in outcome["shown"]]:
        return f"NOT SHOWN by {', '.join(missing)} (exit status {outcome['status']})\n{outcome['said']}"
    return None


def _run(folder: Path, tests: Sequence[str], *, patch: Path | None = None, until_shown: bool = True) -> dict[str, Any]:
    """Run `tests` in a process of their own, which imports a copy of the source in `folder`."""
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    # Within a repository git would take the paths for that one's.
    alone = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}
    if patch is not None:
        applied = subprocess.run(["git", "apply", str(patch)], cwd=folder, env=alone, capture_output=True, text=True)
        if applied.returncode:
            return {"problem": f"DOES NOT APPLY: {applied.stderr.strip()}"}
    found = folder / "outcome.json"
    command = [sys.executable, __file__, "--within", str(folder), str(int(until_shown)), str(found), *tests]
    try:
        ran = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(folder / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            timeout=PATIENCE if until_shown else 10 * PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return {"problem": "DOES NOT END"}
    if not found.exists():
        return {"problem": f"DID NOT RUN\n{ran.stdout[-3000:]}{ran.stderr[-3000:]}"}
    outcome: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return outcome | {"said": ran.stdout[-3000:]}


class _Watch:
    """Which of the named tests have failed with an assertion; nothing more is run when all of them have."""

    def __init__(self, tests: Sequence[str], *, stop: bool) -> None:
        self._tests, self._stop = tests, stop
        self.shown: set[str] = set()

    def pytest_exception_interact(self, node: Any, call: Any, report: Any) -> None:
        import pytest

        if report.when != "call" or not call.excinfo.errisinstance((AssertionError, pytest.fail.Exception)):
            return
        self.shown |= {test for test in self._tests if re.split(r"\[", node.nodeid)[0] == test}
        if self._stop and self.shown == set(self._tests):
            node.session.shouldstop = "shown"


def within(folder: str, until_shown: bool, found: Path, tests: Sequence[str]) -> int:
    import pytest

    spec = find_spec("replicate_proxy_mw")
    if spec is None or not str(spec.origin).startswith(f"{folder}/src/"):
        print(f"replicate_proxy_mw would be imported from {spec and spec.origin}, not from the copy", file=sys.stderr)
        return 70
    watch = _Watch(tests, stop=until_shown)
    options = ["-q", "-p", "no:cacheprovider", "--timeout", "20", "--tb", "short"]
    status = pytest.main([*options, *tests], plugins=[watch])
    imported = sys.modules["replicate_proxy_mw"].__file__
    if not str(imported).startswith(f"{folder}/src/"):
        print(f"replicate_proxy_mw was imported from {imported}, not from the copy", file=sys.stderr)
        return 70
    found.write_text(json.dumps({"status": int(status), "shown": sorted(watch.shown)}), encoding="utf-8")
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--within"]:
        sys.exit(within(sys.argv[2], sys.argv[3] == "1", Path(sys.argv[4]), sys.argv[5:]))
    sys.exit(main(sys.argv[1:]))
