"""Hostile targets and headers through the real proxy and its real transports, judged by what they would have sent.

Each case depends on seed and number alone: what fails is shown with the command that plays it again, and as small as it
could be made. Run by `scripts/fuzz`.

With --atheris coverage guides what is tried (`pip install atheris==3.0.0`, which is not among our dependencies).
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from random import Random, SystemRandom
from types import FunctionType
from typing import Any
from urllib.parse import unquote

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.security.generated import Case, Judge, header_set, judges, target

KINDS = {"targets": target, "header-sets": header_set}

# Cases between two lines of progress.
STEP = 20_000


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/fuzz", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", type=int, default=100_000, help="how many odd targets; %(default)s")
    parser.add_argument("--header-sets", type=int, default=20_000, help="how many odd sets of headers; %(default)s")
    parser.add_argument("--seed", type=int, help="a number, by default another each time")
    parser.add_argument("--case", metavar="KIND:NUMBER", help="only this case of the seed, shown: targets:17")
    parser.add_argument("--processes", type=int, default=1, help="how many share the work; %(default)s")
    parser.add_argument("--share", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--atheris", action="store_true", help="guided by coverage; in one process, and much slower")
    options = parser.parse_args()
    # What callers send is told there, too.
    logging.disable(logging.CRITICAL)
    if options.seed is None:
        options.seed = SystemRandom().randrange(1 << 32)
    if options.case is not None:
        kind, _, number = options.case.partition(":")
        return asyncio.run(_play(kind, options.seed, int(number)))
    counts = {"targets": options.targets, "header-sets": options.header_sets}
    if not options.share:
        print(f"seed {options.seed}", flush=True)
    if options.atheris:
        return _guided(counts, options.seed)
    others = [
        subprocess.Popen([sys.executable, *_again(options), "--share", str(share)])
        for share in range(options.share + 1, options.processes if not options.share else 0)
    ]
    failed = asyncio.run(_run(counts, options.seed, options.share, options.processes))
    return max([failed, *(other.wait() for other in others)])


def _again(options: argparse.Namespace) -> list[str]:
    named = ("targets", "header_sets", "seed", "processes")
    given = [text for name in named for text in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    return [__file__, *given]


async def _run(counts: dict[str, int], seed: int, share: int, shares: int) -> int:
    failed = 0
    with judges() as all_judges:
        for kind, count in counts.items():
            before = sum(judge.forwarded for judge in all_judges)
            began, cpu = time.monotonic(), time.process_time()
            for done, number in enumerate(range(share, count, shares), 1):
                case, judge = _case(kind, seed, number), all_judges[number % len(all_judges)]
                if await judge.wrong(case):
                    failed = 1
                    await _show(kind, seed, number, case, judge)
                if done % STEP == 0 or number + shares >= count:
                    sent = sum(judge.forwarded for judge in all_judges) - before
                    seconds = time.monotonic() - began
                    told = f"{done:,} {kind}, {sent:,} of them sent, {seconds:.0f} s, {done / seconds:,.0f}/s"
                    print(f"{told}, {done / (time.process_time() - cpu):,.0f} per second of CPU", flush=True)
        for judge in all_judges:
            await judge.app.aclose()
    return failed


def _case(kind: str, seed: int, number: int) -> Case:
    random = Random(seed << 32 | number).random
    return KINDS[kind](lambda below: int(random() * below))


async def _play(kind: str, seed: int, number: int) -> int:
    with judges() as all_judges:
        case, judge = _case(kind, seed, number), all_judges[number % len(all_judges)]
        return await _show(kind, seed, number, case, judge)


async def _show(kind: str, seed: int, number: int, case: Case, judge: Judge) -> int:
    small = await _smaller(case, judge)
    wrong = await judge.wrong(small)
    print(f"scripts/fuzz --seed {seed} --case {kind}:{number} {'is wrong' if wrong else 'is right'}: {wrong}")
    print(f"    before {judge.upstream}, fast: {judge.fast}\n    {small!r}", flush=True)
    return int(bool(wrong))


async def _smaller(case: Case, judge: Judge) -> Case:
    """A case that is wrong still, with nothing in it that could be left out."""
    if not await judge.wrong(case):
        return case
    left = [case]
    while left:
        other = left.pop()
        if await judge.wrong(other):
            case, left = other, list(_without(other))
    return case


def _without(case: Case) -> Iterator[Case]:
    """The same with a little less, each in one way."""
    for at in range(len(case.headers)):
        yield replace(case, headers=case.headers[:at] + case.headers[at + 1 :])
        name, value = case.headers[at]
        for shorter in (value[:-1], value[1:]):
            if value:
                yield replace(case, headers=(*case.headers[:at], (name, shorter), *case.headers[at + 1 :]))
    if case.query:
        yield replace(case, query=case.query[1:])
    if len(case.body) > 1 or case.body[0]:
        yield replace(case, body=case.body[1:] or (b"",))
    # Where both say the same they are to say it still.
    if case.raw_path is not None and unquote(case.raw_path.decode("latin-1")) == case.path:
        for at in range(len(case.raw_path)):
            raw = case.raw_path[:at] + case.raw_path[at + 1 :]
            yield replace(case, raw_path=raw, path=unquote(raw.decode("latin-1")))


def _guided(counts: dict[str, int], seed: int) -> int:
    try:
        atheris: Any = import_module("atheris")
    except ImportError:
        sys.exit("--atheris: pip install atheris==3.0.0")
    loop = asyncio.new_event_loop()
    with judges() as all_judges:

        def one(data: bytes) -> None:
            given = atheris.FuzzedDataProvider(data)
            kind = KINDS[list(KINDS)[given.ConsumeIntInRange(0, 1)]]
            judge = all_judges[given.ConsumeIntInRange(0, len(all_judges) - 1)]
            case = kind(lambda below: int(given.ConsumeIntInRange(0, below - 1)))
            if wrong := loop.run_until_complete(judge.wrong(case)):
                print(f"wrong: {wrong}\n{loop.run_until_complete(_smaller(case, judge))!r}", flush=True)
                raise AssertionError

        for function in _ours():
            atheris.instrument_func(function)
        atheris.Setup(
            [sys.argv[0], f"-runs={sum(counts.values())}", "-max_len=512", "-len_control=0", f"-seed={seed}"], one
        )
        atheris.Fuzz()
    return 0


def _ours() -> Iterator[FunctionType]:
    """What there is to cover: the functions of the package, also those of classes."""
    for name, module in list(sys.modules.items()):
        if name.startswith("replicate_proxy_mw."):
            for value in vars(module).values():
                for each in vars(value).values() if isinstance(value, type) else (value,):
                    if isinstance(each, FunctionType) and each.__module__ == name:
                        yield each


if __name__ == "__main__":
    sys.exit(main())
