"""``virtio-test request`` and ``virtio-test timer``: the transcripts word for word, and bad input in one line."""

from __future__ import annotations

import json
import time

import pytest
from virtio_test.cli.session import request, timer

from .conftest import Run

TEN = """\
QEMU_BACK_END: >>> get type [ 10 ] form the front end <<<
QEMU_BACK_END: >>> get arg1 [ 11 ] form the front end <<<
QEMU_BACK_END: >>> get arg2 [ 12 ] form the front end <<<
QEMU_BACK_END: >>> get arg3 [ 13 ] form the front end <<<
QEMU_BACK_END: >>> get arg3 [ hello back end! ] form the front end <<<
virtio test_request_done get ack
virtio response ret is 111
virtio response arg1 is 112
virtio response arg2 is 113
"""

RINGS = (("--ring", "split"), ("--ring", "packed"), ("--indirect",), ("--ring", "packed", "--indirect"))
REGISTERS = (
    ("--transport", "mmio"),
    ("--transport", "pci"),
    ("--transport", "pci", "--intx"),
    ("--transport", "pci", "--flavour", "transitional"),
    ("--transport", "pci", "--flavour", "non-transitional"),
)
LEGACY = (
    ("--transport", "mmio", "--interface", "legacy"),
    ("--transport", "pci", "--interface", "legacy"),
    ("--transport", "pci", "--flavour", "transitional", "--interface", "legacy", "--intx"),
)
WAYS = pytest.mark.parametrize(
    "way",
    [
        (),
        *RINGS,
        *((*registers, *ring) for registers in REGISTERS for ring in ((), *RINGS)),
        *((*registers, *ring) for registers in LEGACY for ring in ((), ("--indirect",))),
    ],
    ids=" ".join,
)


@WAYS
def test_request_10(run: Run, way: tuple[str, ...]) -> None:
    result = run("request", "10", *way)
    assert (result.status, result.out, result.err) == (0, TEN, "")


def test_request_10_as_a_process(spawn: Run) -> None:
    result = spawn("request", "10")
    assert (result.status, result.out, result.err) == (0, TEN, "")


@pytest.mark.parametrize(
    ("number", "arguments"), [(253, (254, 255, 0)), (254, (255, 0, 1)), (255, (0, 1, 2)), (0, (1, 2, 3))]
)
def test_the_original_counts_in_a_byte(run: Run, number: int, arguments: tuple[int, int, int]) -> None:
    lines = run("request", str(number)).out.splitlines()
    assert lines[0] == f"QEMU_BACK_END: >>> get type [ {number} ] form the front end <<<"
    for place, argument in enumerate(arguments, start=1):
        assert lines[place] == f"QEMU_BACK_END: >>> get arg{place} [ {argument} ] form the front end <<<"
    assert lines[6:] == [
        f"virtio response {name} is {argument + 100}"
        for name, argument in zip(("ret", "arg1", "arg2"), arguments, strict=True)
    ]


def test_count(run: Run) -> None:
    assert run("request", "10", "--count", "300", "--ring", "packed").out == TEN * 300


@pytest.mark.parametrize("ring", ["split", "packed"])
def test_request_as_json(run: Run, ring: str) -> None:
    result = run("request", "255", "--json", "--count", "2", "--ring", ring)
    found = json.loads(result.out)
    assert found["number"] == 255
    assert found["ring"] == ring
    assert found["responses"] == [{"ret": 100, "arg1": 101, "arg2": 102}] * 2
    assert len(found["lines"]) == 18
    assert ("RING_PACKED" in found["features"]) == (ring == "packed")
    assert "CAN_PRINT" in found["features"]


@pytest.mark.parametrize(("way", "interface"), [(("--interface", "modern"), "modern"), (LEGACY[1], "legacy")])
def test_request_as_json_says_which_way_it_went(run: Run, way: tuple[str, ...], interface: str) -> None:
    found = json.loads(run("request", "10", "--json", *way).out)
    assert found["transport"] == ("pci" if "pci" in way else "none")
    assert found["interface"] == interface
    assert ("VERSION_1" in found["features"]) == (interface == "modern")


@pytest.mark.parametrize(
    ("way", "says"),
    [
        (("--flavour", "generic"), "PCI"),
        (("--transport", "mmio", "--intx"), "PCI"),
        (("--interface", "legacy"), "pci or mmio"),
        ((*LEGACY[0], "--ring", "packed"), "--ring split"),
        (("--transport", "pci", "--flavour", "non-transitional", "--interface", "legacy"), "no legacy interface"),
        (("--transport", "isa"), "'isa'"),
        (("--flavour", "bitter"), "'bitter'"),
    ],
)
@pytest.mark.parametrize("command", [("request", "10"), ("timer",)])
def test_ways_that_are_none(run: Run, command: tuple[str, ...], way: tuple[str, ...], says: str) -> None:
    result = run(*command, *way)
    assert (result.status, result.out) == (2, "")
    assert result.err.count("\n") == 1
    assert says in result.err


def ticks(count: int) -> str:
    return "".join(
        f"==============set config:{k}\n"
        "virttest virttest_changed\n"
        "virttest get config change\n"
        f"=========get virtio num:{k + 1}\n"
        "virttest get ack\n"
        for k in range(count)
    )


@WAYS
def test_timer_9(run: Run, way: tuple[str, ...]) -> None:
    started = time.monotonic()
    result = run("timer", "--ticks", "9", *way)
    assert (result.status, result.out, result.err) == (0, ticks(9), "")
    assert time.monotonic() - started < 5, "at once, though it tells of 38 seconds"


def test_timer_times(run: Run) -> None:
    found = json.loads(run("timer", "--ticks", "3", "--first-after", "5", "--every", "0.5", "--json").out)
    assert found["seconds"] == 6.0
    assert found["ticks"] == 3
    assert "\n".join(found["lines"]) + "\n" == ticks(3)


def test_timer_in_real_time(run: Run) -> None:
    started = time.monotonic()
    result = run("timer", "--ticks", "3", "--first-after", "0.2", "--every", "0.1", "--real-time")
    assert result.out == ticks(3)
    assert time.monotonic() - started >= 0.4


def test_what_prints_also_returns() -> None:
    shown: list[str] = []
    assert request(10, show=shown.append) == TEN.rstrip("\n") == "\n".join(shown)
    shown.clear()
    assert timer(2, show=shown.append) == ticks(2).rstrip("\n") == "\n".join(shown)
    shown.clear()
    assert [request(10, as_json=True, show=shown.append)] == shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["request", "256"], "256 is out of range: give a number from 0 to 255"),
        (["request", "-1"], "-1 is negative"),
        (["request", "--", "-1"], "-1 is out of range: give a number from 0 to 255"),
        (["request", "ten"], "'ten' is not a whole number: give one from 0 to 255"),
        (["request", "1.5"], "'1.5' is not a whole number"),
        (["request", ""], "'' is not a whole number"),
        (["request", "1" * 5000], "is not a whole number"),
        (["request", "\u0661"], "is not a whole number"),
        (["request"], "NUMBER"),
        (["request", "1", "2"], "unexpected extra argument"),
        (["request", "10", "--ring", "round"], "'round' is not one of 'split', 'packed'"),
        (["request", "10", "--count", "0"], "0 is out of range: give a number of at least 1"),
        (["request", "10", "--count", "-5"], "-5 is out of range: give a number of at least 1"),
        (["request", "10", "--no-such"], "No such option"),
        (["timer", "--ticks", "0"], "0 is out of range: give a number of at least 1"),
        (["timer", "--ticks", "x"], "'x' is not a whole number"),
        (["timer", "--first-after", "-1"], "-1 is not a time that can be waited for: give 0 or more seconds"),
        (["timer", "--first-after", "soon"], "'soon' is not a time"),
        (["timer", "--every", "0"], "0 is not a time that can be waited for: give more than 0 seconds"),
        (["timer", "--every", "nan"], "nan is not a time"),
        (["timer", "--every", "1e300"], "1e300 is not a time"),
        (["nothing"], "No such command 'nothing'"),
        (["--nothing"], "No such option"),
    ],
)
def test_bad_input_is_one_line(run: Run, arguments: list[str], says: str) -> None:
    result = run(*arguments)
    assert result.status == 2
    assert result.out == ""
    assert result.err.count("\n") == 1
    assert says in result.err
    assert "Traceback" not in result.err
    assert len(result.err) < 6000


def test_bad_input_as_a_process(spawn: Run) -> None:
    result = spawn("request", "256")
    assert (result.status, result.out) == (2, "")
    assert result.err == (
        "virtio-test: Invalid value for 'NUMBER': 256 is out of range: give a number from 0 to 255"
        " (see virtio-test request --help)\n"
    )


@pytest.mark.parametrize(
    "arguments", [["--help"], ["request", "--help"], ["timer", "-h"], ["serve", "-h"], ["info", "-h"]]
)
def test_help(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith("Usage: virtio-test")


def test_without_a_command_it_shows_the_help(run: Run) -> None:
    result = run()
    assert result.status == 2
    assert "Commands:" in result.out + result.err
