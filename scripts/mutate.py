"""Runs mutmut on one module after the other, each with the tests that have to notice. See scripts/mutate."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent
PACKAGE = Path("src/replicate_proxy_mw")

MODULES = {
    "headers.py": "test_headers.py",
    "routing.py": "test_routing.py test_operations.py test_model_names.py test_policy.py",
    "policy.py": "test_policy.py keys/test_key_file.py keys/test_contract.py keys/test_env.py",
    "errors.py": "test_errors.py keys/test_resolution.py",
    "layers/resend.py": "layers/test_resend.py",
    "keys/contract.py": "keys/test_contract.py keys/test_resolvers.py keys/test_resolution.py",
    "keys/resolvers.py": "keys/test_resolvers.py keys/test_resolution.py keys/test_contract.py",
    "keys/resolution.py": "keys/test_resolution.py",
    "keys/accounts.py": "keys/test_accounts.py keys/test_resolvers.py",
    "keys/env.py": "keys/test_env.py",
    "keys/cached.py": "keys/test_cached.py",
}
# Written only to notice: in a file of the module's name.
EXTRA = "security/test_mutants_{}.py"

# What mutmut copies beside the package: the tests read documents and examples, too.
BESIDE = ("tests", "examples", "docs", "scripts", "benchmarks", "requirements", ".github", "README.md", "SECURITY.md")

# Two, as the machine that runs the suite has.
WORKERS = 2

NOTICED = {"killed", "timeout", "segfault", "suspicious"}


def main() -> int:
    work, *names = sys.argv[1:]
    fresh = "--fresh" in names
    chosen = [name for name in names if name != "--fresh"] or list(MODULES)
    if unknown := set(chosen) - set(MODULES):
        sys.exit(f"scripts/mutate: no such module: {', '.join(sorted(unknown))}. There are: {', '.join(MODULES)}")
    made = noticed = 0
    for name in chosen:
        tree = Path(work, name.removesuffix(".py").replace("/", "-"))
        if fresh:
            shutil.rmtree(tree, ignore_errors=True)
        began = time.monotonic()
        results = run(name, tree)
        survivors = [mutant for mutant, result in results.items() if result not in NOTICED]
        made, noticed = made + len(results), noticed + len(results) - len(survivors)
        print(f"\n{name}: {_score(len(results), len(results) - len(survivors))}, {time.monotonic() - began:.0f} s")
        for mutant in survivors:
            print(f"\n{mutant}: {results[mutant]}\n{change(mutant, tree)}", flush=True)
    print(f"\nall: {_score(made, noticed)}")
    return 0


def run(name: str, tree: Path) -> dict[str, str]:
    """What became of each mutant of a module, by its name."""
    module = PACKAGE / name
    files = [*MODULES[name].split(), EXTRA.format(module.stem)]
    _copy(tree)
    tests = [f"tests/{file}" for file in files if (tree / "tests" / file).exists()]
    settings = {
        "source_paths": ["src"],
        "only_mutate": [str(module)],
        "also_copy": [path for path in BESIDE if (tree / path).exists()],
        "pytest_add_cli_args": ["-p", "no:cacheprovider", "--timeout", "20"],
        "pytest_add_cli_args_test_selection": tests,
    }
    lines = [f"{key} =\n" + "".join(f"    {value}\n" for value in values) for key, values in settings.items()]
    (tree / "setup.cfg").write_text("[mutmut]\n" + "".join(lines))
    with (tree / "mutmut.log").open("w") as log:
        ended = subprocess.run(
            [_mutmut(), "run", "--max-children", str(WORKERS)], cwd=tree, stdout=log, stderr=subprocess.STDOUT
        )
    if ended.returncode:
        sys.exit(f"scripts/mutate: mutmut ended with {ended.returncode} on {name}; see {log.name}")
    listed = subprocess.run(
        [_mutmut(), "results", "--all", "true"], cwd=tree, stdout=subprocess.PIPE, check=True, text=True
    )
    pairs = (line.strip().rpartition(": ") for line in listed.stdout.splitlines() if "__mutmut_" in line)
    return {mutant: result for mutant, _, result in pairs}


def change(mutant: str, tree: Path) -> str:
    """The lines that differ."""
    shown = subprocess.run([_mutmut(), "show", mutant], cwd=tree, stdout=subprocess.PIPE, check=True, text=True).stdout
    return "\n".join(line for line in shown.splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---"))


def _copy(tree: Path) -> None:
    """As it is now. Times are kept: by them mutmut knows what has changed."""
    for path in (*BESIDE, "src", "pyproject.toml", "LICENSE"):
        source, copy = SOURCE / path, tree / path
        if source.is_dir():
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
        elif source.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)


def _mutmut() -> str:
    return str(Path(sys.executable).with_name("mutmut"))


def _score(made: int, noticed: int) -> str:
    return f"{made} mutants, {noticed} noticed, {made - noticed} not: {100 * noticed / max(made, 1):.1f} %"


if __name__ == "__main__":
    sys.exit(main())
