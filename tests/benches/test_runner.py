"""The runner: what it makes of rounds, and what the command says."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from benches import __main__ as command
from benches.runner import BenchError, Case, MissingPeer, Round, measure, render, turns

ROOT = Path(__file__).parents[2]


def case(rounds: Iterable[tuple[float, float]], *, more: bool = False, must: float | None = None) -> Case:
    """A case whose rounds give these numbers."""
    given = iter(rounds)

    @contextmanager
    def opened(quick: bool) -> Generator[Round]:
        yield lambda: next(given)

    return Case("made-up", "a shape", "ns", opened, more, must)


def test_medians_ratio_and_spread() -> None:
    result = measure(case([(99, 99), (10, 20), (10, 30), (20, 20), (10, 10), (40, 200)]), rounds=5)
    assert (result.ours, result.peer) == (10, 20)
    assert result.ratio == 2
    assert result.spread == (1, 3)


def test_a_rate_is_better_when_it_is_more() -> None:
    assert measure(case([(1, 1), (30, 10)], more=True), rounds=1).ratio == 3


def test_a_quick_run_has_no_round_to_warm_up() -> None:
    result = measure(case([(10, 25)]), rounds=1, quick=True)
    assert result.ratio == 2.5
    assert result.spread == (2.5, 2.5)


def test_a_side_that_takes_no_time_did_nothing() -> None:
    with pytest.raises(BenchError, match="measured nothing"):
        measure(case([(0, 5)]), rounds=1, quick=True)


def test_instructions_are_counted_when_asked_for() -> None:
    counting = dataclasses.replace(case([(1, 2)]), count=lambda: (331.4, 888.2))
    assert measure(counting, rounds=1, quick=True).instructions is None
    result = measure(dataclasses.replace(counting, open=case([(1, 2)]).open), rounds=1, quick=True, instructions=True)
    assert json.loads(result.json())["instructions"] == [331.4, 888.2]
    assert render(result).endswith("331 : 888")


def test_the_calm_rounds_are_told() -> None:
    looks = iter([1, 1, 1, 1.5, 1.1, 1.1])
    result = measure(case([(9, 9), (1, 1), (1, 2), (1, 3)]), rounds=2, slowdown=lambda: next(looks))
    # The one that ended on a slow core does not count.
    assert (result.ratio, result.calm) == (2, 2)
    assert json.loads(result.json())["calm"] == 2
    assert render(result).split()[-1] == "2"


def test_turns_alternate() -> None:
    order: list[str] = []

    def side(name: str, value: float) -> float:
        order.append(name)
        return value

    one = turns(lambda: side("ours", 1), lambda: side("peer", 2))
    assert [one() for _ in range(3)] == [(1, 2)] * 3
    assert order == ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_what_is_printed() -> None:
    result = measure(case([(3, 10)], must=3.5), rounds=1, quick=True)
    assert json.loads(result.json()) == {
        "pair": "made-up",
        "shape": "a shape",
        "ours": 3,
        "peer": 10,
        "unit": "ns",
        "ratio": 3.333,
        "spread": [3.333, 3.333],
        "must": 3.5,
        "aim": None,
    }
    line = render(result)
    assert line.startswith("made-up ")
    assert line.endswith("3.5 / -  below")
    assert "3.33 to 3.33" in line


def test_every_name_has_shapes_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == len(set(listed))
    assert {line.partition(":")[0] for line in listed} == set(command.names())


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command_line = [sys.executable, "-m", "benches", "--list"]
    ran = subprocess.run(command_line, stdout=writer, stderr=subprocess.PIPE, cwd=ROOT, timeout=60, check=False)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (0, b"")


def test_the_command_lists_and_measures(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["handlers", "--list", "--shape", "split"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed
    assert all(line.startswith("handlers: ") and "split" in line for line in listed)
    assert command.main(["handlers", "--quick", "--json", "--shape", "split, per request"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["pair"] for row in rows} == {"handlers"}
    assert all(row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [(["nothing"], "no pair 'nothing': there are"), (["handlers", "--shape", "nothing"], "no shape with 'nothing'")],
)
def test_what_is_not_there_is_told(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    assert command.main(arguments) == 2
    said = capsys.readouterr().err
    assert text in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("error", "status"), [(BenchError("they disagree"), 1), (MissingPeer("no qsd in /usr"), 2)])
def test_what_goes_wrong_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BenchError, status: int
) -> None:
    def rounds() -> Generator[tuple[float, float]]:
        raise error
        yield (1, 1)

    def cases(name: str) -> Sequence[Case]:
        return [case(rounds())]

    monkeypatch.setattr(command, "cases_of", cases)
    assert command.main(["handlers"]) == status
    assert capsys.readouterr().err == f"benches: {error}\n"
