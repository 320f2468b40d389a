"""`python -m benchmarks.compare [--only c32,held] [--seconds 2] [--repeat 5] [--write]`; needs Linux and two cores."""

from __future__ import annotations

import argparse
import importlib.util
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from . import report, scenarios
from .contestants import CONTESTANTS, Contestant, running
from .processes import LOAD_CORE, PROXY_CORE, Process
from .upstream import held_streamed_large, small

ROOT = Path(__file__).parents[2]
SCENARIOS = (*scenarios.CONCURRENCY, "sse", "down", "up", "held", "host", "import")
SOCKETS = 20_000
OURS = [each.name for each in CONTESTANTS if each.ours]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__)
    parser.add_argument("--only", type=names(SCENARIOS), default=SCENARIOS, help=f"some of {','.join(SCENARIOS)}")
    every = tuple(each.name for each in CONTESTANTS)
    parser.add_argument("--contestants", type=names(every), default=every, help=f"some of {','.join(every)}")
    parser.add_argument("--seconds", type=int, default=2, help="of load for each measurement (2)")
    parser.add_argument("--repeat", type=int, default=5, help="measurements of each load (5)")
    parser.add_argument("--held", type=int, default=2000, help="requests that are held (2000)")
    parser.add_argument("--hold", type=int, default=6, help="seconds for which they are (6)")
    parser.add_argument("--mebibytes", type=int, default=1024, help="of each download and upload (1024)")
    parser.add_argument("--loop", choices=("uvloop", "asyncio"), default="uvloop", help="of all servers in Python")
    parser.add_argument(
        "--write",
        nargs="?",
        type=Path,
        const=ROOT / "docs/performance.md",
        metavar="PAGE",
        help="put the tables into this page (docs/performance.md), and the plot beside it",
    )
    return parser.parse_args()


def names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        chosen = value.split(",")
        if unknown := [name for name in chosen if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not among {', '.join(known)}")
        return tuple(name for name in known if name in chosen)

    return parse


def missing(contestants: Sequence[Contestant], loop: str) -> list[str]:
    found = [f"{program} (Debian: apt install {program})" for program in ("nginx", "wrk") if not shutil.which(program)]
    if not shutil.which("taskset"):
        found.append("taskset (Debian: apt install util-linux)")
    modules = {"httptools", "uvicorn", *({"uvloop"} if loop == "uvloop" else {})}
    modules.update(*(each.needs for each in contestants))
    for module in sorted(modules):
        if not importable(module):
            found.append(f"{module} (pip install --group bench, or leave out who needs it: --contestants, --loop)")
    if PROXY_CORE == LOAD_CORE:
        found.append("a second core")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < SOCKETS:
        found.append(f"a hard limit of {SOCKETS} open files (ulimit -Hn)")
    return found


def importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


@contextmanager
def everyone(
    contestants: Sequence[Contestant], upstream: Process, folder: Path, loop: str
) -> Iterator[dict[str, Process]]:
    """All at once, since who has nothing to do costs nothing; the upstream itself is there as `direct`."""
    folder.mkdir()
    with ExitStack() as stack:
        processes = {scenarios.DIRECT: upstream}
        for each in contestants:
            processes[each.name] = stack.enter_context(running(each, upstream, folder, loop))
        yield processes


def measured(options: argparse.Namespace, folder: Path) -> scenarios.Results:
    results = scenarios.Results()
    contestants = [each for each in CONTESTANTS if each.name in options.contestants]
    small_answers = [scenario for scenario in options.only if scenario in scenarios.CONCURRENCY]
    if small_answers:
        with (
            small(folder / "upstream") as upstream,
            everyone(contestants, upstream, folder / "small", options.loop) as processes,
        ):
            for scenario in small_answers:
                scenarios.loads(results, processes, scenario, options.seconds, options.repeat)
    if {"sse", "down", "up", "held"} & {*options.only}:
        proxies = [each for each in contestants if each.forwards]
        with (
            held_streamed_large(folder) as upstream,
            everyone(proxies, upstream, folder / "large", options.loop) as processes,
        ):
            if "sse" in options.only:
                scenarios.events(results, processes, options.repeat * 5)
            for scenario in ("down", "up"):
                if scenario in options.only:
                    scenarios.bulk(results, processes, scenario, options.mebibytes, 2)
            if "held" in options.only:
                scenarios.held(results, processes, options.held, options.hold)
    if "host" in options.only:
        results.host = {each.name: scenarios.host_requests(each.app) for each in contestants if each.ours}
    if "import" in options.only:
        results.importing = scenarios.importing()
    return results


def main() -> None:
    options = arguments()
    contestants = [each for each in CONTESTANTS if each.name in options.contestants]
    if lacking := missing(contestants, options.loop):
        sys.exit("Not there:\n" + "\n".join(f"- {each}" for each in lacking))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended
    resource.setrlimit(resource.RLIMIT_NOFILE, (SOCKETS, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    os.sched_setaffinity(0, {LOAD_CORE})
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        results = measured(options, Path(folder))
    text = report.text(results, report.setting(options))
    print(text)
    if options.write is not None:
        report.write(options.write, text, results)
    # A peer may well fail; what is compared with it may not.
    if failed := [name for _, name in results.failed if name in ("direct", "nginx", *OURS)]:
        sys.exit(f"Failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
