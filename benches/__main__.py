"""The command: `python -m benches [NAME…] [--shape TEXT] [--json] [--rounds N] [--quick] [--instructions] [--list]`.

Exit status: 0 when all was measured, whatever the ratios are; 1 when a side did not do its work or the two disagree; 2
for a wrong command line, or a peer that is not there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections.abc import Sequence

from virtio_test._core import build_info

from benches import pairs
from benches.calm import Calm
from benches.runner import ROUNDS, BenchError, Case, MissingPeer, table


def names() -> list[str]:
    """All there are: one for each module in `benches/pairs`."""
    return sorted(module.name for module in pkgutil.iter_modules(pairs.__path__))


def cases_of(name: str) -> Sequence[Case]:
    """The cases of one name."""
    module = importlib.import_module(f"benches.pairs.{name}")
    cases: Sequence[Case] = module.cases()
    return cases


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is no number of rounds")
    return int(text)


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benches", description="Measures what things cost beside their peers.")
    parser.add_argument("name", nargs="*", help=f"pairs to measure, of: {', '.join(names())} (all)")
    parser.add_argument("--shape", metavar="TEXT", default="", help="only shapes with this in their words")
    parser.add_argument("--json", action="store_true", help="one JSON object per line")
    parser.add_argument("--rounds", type=_positive, default=None, metavar="N", help=f"rounds that count ({ROUNDS})")
    parser.add_argument("--quick", action="store_true", help="little work, one round: shows that it runs, no more")
    parser.add_argument("--instructions", action="store_true", help="count them too, by valgrind (pair core, one core)")
    parser.add_argument("--list", action="store_true", help="the shapes, without measuring")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it; the exit status."""
    asked = _arguments(arguments)
    unknown = sorted(set(asked.name) - set(names()))
    if unknown:
        print(f"benches: no pair {unknown[0]!r}: there are {', '.join(names())}", file=sys.stderr)
        return 2
    chosen = [case for name in asked.name or names() for case in cases_of(name) if asked.shape in case.shape]
    if not chosen:
        print(f"benches: no shape with {asked.shape!r}: --list shows them", file=sys.stderr)
        return 2
    if asked.list:
        print("\n".join(f"{case.pair}: {case.shape}" for case in chosen), flush=True)
        return 0
    if build_info()["profile"] != "release":
        print("benches: the core is a debug build: `make` builds a release", file=sys.stderr)
        return 2
    rounds = asked.rounds or (1 if asked.quick else ROUNDS)
    slowdown = None
    if not asked.quick:
        calm = Calm()
        calm.begin()
        slowdown = calm.slowdown
    lines = table(
        chosen,
        rounds=rounds,
        quick=asked.quick,
        as_json=asked.json,
        instructions=asked.instructions,
        slowdown=slowdown,
    )
    try:
        for line in lines:
            print(line, flush=True)
    except BenchError as error:
        print(f"benches: {error}", file=sys.stderr)
        return 2 if isinstance(error, MissingPeer) else 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:
        # Whoever read has seen enough (`| head`); nor shall the interpreter try to write the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
