"""Cases a second: rings with one defect, and legal traffic, generated and judged; beside the same played plainly.

Ours is what anybody calls: a case is made, `check` plays it under the strict policy and holds what comes of it against
what must. The peer plays the same cases as one writes it down: memory of its own for each, every act a call
(`Scene`), and the same comparison. Both draw the cases by the same generator from the same seeds, so they have the
same ones, and a round's last word is that they found the same rules.

What the table of targets asks for is the rate of ours; there is no promise about the ratio. A case is judged under one
policy here, so `check()` without a name, which judges under both, does half as many. With Hypothesis drawing is what
costs on both sides; two processes have a half of the examples each there, as two cores are asked for.
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from multiprocessing import get_context
from random import Random

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy
from virtio_test.strategies import RandomDraw, RingCase, Scene, defects, legal, random_case
from virtio_test.strategies.traffic import legal_case

from benches.runner import BenchError, Case, Round, turns

EXAMPLES = 2000
"""Cases of a round by the bare generator; by Hypothesis a quarter of it."""
FEW = 100
PROCESSES = 2

Found = Counter[str | None]
Generate = Callable[[Random], RingCase]


def any_legal(random: Random) -> RingCase:
    """Legal traffic from the bare generator."""
    return legal_case(RandomDraw(random))


def ours(case: RingCase) -> str | None:
    """The rule that was found broken, as it must."""
    case.check("strict")
    return case.strict.rule if case.strict is not None else None


def plainly(case: RingCase) -> str | None:
    """The same in memory of its own, act by act."""
    found = Scene(case, "strict").run()
    if case.strict is None or not case.strict.agrees(found):
        raise BenchError(f"{case}: {found} came of it, and {case.strict} is what must")
    return found.rule


def bare(generate: Generate, judge: Callable[[RingCase], str | None], count: int, start: int) -> tuple[float, Found]:
    """Cases a second, and the rules that were found broken."""
    random, found = Random(start), Found()
    gc.disable()
    try:
        begin = time.perf_counter()
        for _ in range(count):
            found[judge(generate(random))] += 1
        return count / (time.perf_counter() - begin), found
    finally:
        gc.enable()


STRATEGIES: dict[str, Callable[[], SearchStrategy[RingCase]]] = {"defects": defects, "legal": legal}


def drawn(name: str, judge: Callable[[RingCase], str | None], count: int, start: int) -> tuple[float, Found]:
    """Seconds and rules of so many examples of a strategy, all of them new."""
    found = Found()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(STRATEGIES[name]())
    def test(case: RingCase) -> None:
        found[judge(case)] += 1

    begin = time.perf_counter()
    test()
    return time.perf_counter() - begin, found


def side(
    one: Callable[[int], tuple[float, Found]],
) -> tuple[Callable[[], float], list[Found]]:
    """A side that has other cases in each round; what it found, round by round."""
    rounds: list[Found] = []

    def measure() -> float:
        gc.collect()
        rate, found = one(len(rounds))
        rounds.append(found)
        return rate

    return measure, rounds


def agreed(both: Round, left: list[Found], right: list[Found]) -> Round:
    """A round after which both must have found the same."""

    def one() -> tuple[float, float]:
        rates = both()
        if left[-1] != right[-1]:
            raise BenchError(f"the two found different rules broken: {left[-1] - right[-1]}, {right[-1] - left[-1]}")
        return rates

    return one


@contextmanager
def by_generator(generate: Generate, quick: bool) -> Generator[Round]:
    """Both sides on one core."""
    count = FEW if quick else EXAMPLES
    fast, left = side(partial(bare, generate, ours, count))
    slow, right = side(partial(bare, generate, plainly, count))
    yield agreed(turns(fast, slow), left, right)


@contextmanager
def by_hypothesis(name: str, quick: bool) -> Generator[Round]:
    """Both sides on as many cores as there are processes; the slowest counts."""
    count = (FEW if quick else EXAMPLES) // 4
    with ProcessPoolExecutor(PROCESSES, mp_context=get_context("spawn")) as pool:

        def together(judge: Callable[[RingCase], str | None], start: int) -> tuple[float, Found]:
            tasks = [pool.submit(drawn, name, judge, count, PROCESSES * start + each) for each in range(PROCESSES)]
            done = [task.result() for task in tasks]
            found = sum((rules for _, rules in done), Found())
            return found.total() / max(spent for spent, _ in done), found

        fast, left = side(partial(together, ours))
        slow, right = side(partial(together, plainly))
        yield agreed(turns(fast, slow), left, right)


def cases() -> Sequence[Case]:
    """One defect and legal traffic, by the bare generator and by Hypothesis."""
    rows: list[tuple[str, int, Callable[[bool], AbstractContextManager[Round]]]] = [
        ("one defect, bare generator, one core", 1, partial(by_generator, random_case)),
        ("legal round trip, bare generator, one core", 1, partial(by_generator, any_legal)),
        ("one defect, Hypothesis, two cores", PROCESSES, partial(by_hypothesis, "defects")),
        ("legal round trip, Hypothesis, two cores", PROCESSES, partial(by_hypothesis, "legal")),
    ]
    return [Case("cases", shape, "cases/s", opened, more_is_better=True, cores=cores) for shape, cores, opened in rows]
