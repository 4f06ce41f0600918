"""Both sides of a pair, measured turn by turn: medians, ratio and spread.

# Theory

A machine that does other things too is slow for seconds at a time. So a *round* measures both sides, one after the
other and each time another one first, and what counts is the ratio within a round: the median over the rounds, with its
quartiles as the spread. Times are medians too, and hold for this machine and this minute only. The first round warms
both sides up and is thrown away. Rounds are measured while the cores are at full speed, as far as that can be had:
see `calm`.

Nothing here knows a peer or virtio.
"""

from __future__ import annotations

import gc
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from benches.calm import Rounds, first_cores, rounds_of

ROUNDS = 9


class BenchError(Exception):
    """A side did not do its work, or the two disagree."""


class MissingPeer(BenchError):
    """A program to measure against is not there: what, where it was looked for, and what to do."""


Round = Callable[[], tuple[float, float]]
"""Measures one round of both sides: (ours, the peer's)."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Args:
        pair: the name of its module.
        shape: what is done, in words; unique in the pair.
        unit: of both numbers: "ns/request", "Mpps".
        open: sets both sides up, for a quick run if its argument is true, and gives what measures a round; raises
            `BenchError` where a side did not do the work or the two disagree.
        more_is_better: whether the numbers are rates; else they are times.
        must: the least ratio that we promise.
        aim: the ratio that we want.
        count: processor instructions of a chain or request on both sides, (ours, the peer's), which are the same on a
            noisy machine; None where nothing can count them.
        cores: how many it runs on, the first that there are.
    """

    pair: str
    shape: str
    unit: str
    open: Callable[[bool], AbstractContextManager[Round]]
    more_is_better: bool = False
    must: float | None = None
    aim: float | None = None
    count: Round | None = None
    cores: int = 2


@dataclass(frozen=True)
class Result:
    """What was measured of a case; `ratio` is above 1 when we are faster, `spread` its quartiles over the rounds.

    `calm` of the rounds were measured with the cores at full speed, None where nobody looked. `instructions` of both
    sides, where they were asked for and can be counted.
    """

    case: Case
    ours: float
    peer: float
    ratio: float
    spread: tuple[float, float]
    calm: int | None = None
    instructions: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        """`aim`, `must`, `below`, or nothing where nothing is promised."""
        if self.case.aim is not None and self.ratio >= self.case.aim:
            return "aim"
        if self.case.must is None:
            return ""
        return "must" if self.ratio >= self.case.must else "below"

    def json(self) -> str:
        """One line, with the case's bounds."""
        case = self.case
        line = {
            "pair": case.pair,
            "shape": case.shape,
            "ours": _digits(self.ours),
            "peer": _digits(self.peer),
            "unit": case.unit,
            "ratio": _digits(self.ratio),
            "spread": [_digits(quartile) for quartile in self.spread],
            "must": case.must,
            "aim": case.aim,
        }
        if self.calm is not None:
            line["calm"] = self.calm
        if self.instructions is not None:
            line["instructions"] = [_digits(count) for count in self.instructions]
        return json.dumps(line, ensure_ascii=False)


def turns(ours: Callable[[], float], peer: Callable[[], float]) -> Round:
    """A round of two functions that each measure one side; who goes first alternates."""
    ours_first = itertools.cycle((True, False))

    def one() -> tuple[float, float]:
        if next(ours_first):
            return ours(), peer()
        theirs = peer()
        return ours(), theirs

    return one


def measure(
    case: Case,
    *,
    rounds: int = ROUNDS,
    quick: bool = False,
    instructions: bool = False,
    slowdown: Callable[[], float] | None = None,
) -> Result:
    """Run a case: `rounds` rounds after one to warm up, which a quick run does without; then count, if asked.

    Rounds are measured in calm moments, if there is somebody to ask: `Calm.slowdown`.

    Raises:
        BenchError: as `Case.open` and `Case.count` say, or a side that took no time at all.
    """
    gc.collect()
    with first_cores(case.cores), case.open(quick) as one:
        if not quick:
            one()
        if slowdown is None:
            found, calm = Rounds([one() for _ in range(rounds)], 0), None
        else:
            found = rounds_of(one, rounds, slowdown)
            calm = found.calm
    measured = found.measured
    if not all(ours > 0 and peer > 0 for ours, peer in measured):
        raise BenchError(f"{case.pair}, {case.shape}: a round measured nothing: {measured}")
    ratios = [ours / peer if case.more_is_better else peer / ours for ours, peer in measured]
    return Result(
        case,
        statistics.median(ours for ours, _ in measured),
        statistics.median(peer for _, peer in measured),
        statistics.median(ratios),
        _quartiles(ratios),
        calm,
        case.count() if instructions and case.count is not None else None,
    )


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _digits(value: float) -> float:
    """Four of them: the rest is noise."""
    return float(f"{value:.4g}")


WIDTHS = (12, 58, 11, 11, 14, 8, 17, 5, 18, 14)
HEAD = ("pair", "shape", "ours", "peer", "unit", "ratio", "spread", "calm", "must / aim", "instructions")


def _line(cells: Iterable[str]) -> str:
    placed = [f"{cell:<{width}}" for cell, width in zip(cells, WIDTHS, strict=True)]
    return " ".join(placed).rstrip()


def head() -> str:
    """The line above the table."""
    return _line(HEAD)


def render(result: Result) -> str:
    """The line of a table for a result."""
    case = result.case
    bounds = [f"{bound:g}" if bound is not None else "-" for bound in (case.must, case.aim)]
    low, high = result.spread
    return _line(
        (
            case.pair,
            case.shape,
            f"{_digits(result.ours):,}",
            f"{_digits(result.peer):,}",
            case.unit,
            f"{result.ratio:.2f}",
            f"{low:.2f} to {high:.2f}",
            "" if result.calm is None else f"{result.calm}",
            f"{' / '.join(bounds)}  {result.verdict}" if (case.must, case.aim) != (None, None) else "",
            " : ".join(f"{count:.0f}" for count in result.instructions or ()),
        )
    )


def table(
    cases: Iterable[Case],
    *,
    rounds: int,
    quick: bool,
    as_json: bool,
    instructions: bool = False,
    slowdown: Callable[[], float] | None = None,
) -> Iterator[str]:
    """The lines of a run, each as soon as it is known."""
    if not as_json:
        yield head()
    for case in cases:
        result = measure(case, rounds=rounds, quick=quick, instructions=instructions, slowdown=slowdown)
        yield result.json() if as_json else render(result)
