"""The timer variant with a real guest: the device ticks, the driver answers from its work queue."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kernel.guest import Uml
from tests.kernel.qemu import Qemu
from tests.kernel.server import Server
from tests.kernel.transcript import ACK, device_tick, driver_tick

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]

TICKS = 4


def _first_ticks(server: Server, guest: Uml | Qemu, ticks: int, timeout: float = 30) -> None:
    """Waits for some ticks and compares both consoles, word for word, from the first on."""
    guest.console.wait_for(ACK, count=ticks, timeout=timeout)
    said = [line for line in guest.console.lines if line.startswith("virttest ")]
    assert said[: 3 * ticks] == driver_tick() * ticks
    assert server.said(2 * ticks)[: 2 * ticks] == [line for k in range(ticks) for line in device_tick(k)]


def test_both_consoles_read_as_the_original(serve: Serve, uml: Callable[..., Uml]) -> None:
    server = serve("--timer", "--first-after", "3", "--every", "0.5")
    guest = uml(server)
    guest.load("timer=1")
    _first_ticks(server, guest, TICKS)


@pytest.mark.parametrize("machine", ["q35", "microvm"])
def test_under_qemu(serve: Serve, qemu: Callable[..., Qemu], machine: str) -> None:
    server = serve("--timer", "--first-after", "10", "--every", "0.6")
    guest = qemu(server, on=machine)
    guest.load("timer=1")
    _first_ticks(server, guest, TICKS)


def test_ticks_before_the_driver_are_printed_and_not_made_up(serve: Serve, uml: Callable[..., Uml]) -> None:
    server = serve("--timer", "--first-after", "0", "--every", "0.5")
    server.console.wait_for("==============set config:2")
    guest = uml(server)
    guest.load("timer=1")
    guest.console.wait_for(ACK, count=2)
    server.console.wait_for("=========get virtio num:2")
    lines = server.lines
    ticks = [int(line.split(":")[1]) for line in lines if "set config:" in line]
    assert ticks == list(range(len(ticks)))
    first = lines.index("=========get virtio num:1")
    assert lines[first - 1].startswith("==============set config:")
    assert int(lines[first - 1].split(":")[1]) >= 3
    assert lines[first + 1 : first + 3] == [f"==============set config:{ticks_seen(lines[:first])}", lines[first + 2]]
    assert lines[first + 2] == "=========get virtio num:2"


def ticks_seen(lines: list[str]) -> int:
    """How many ticks there were, hence the number of the next."""
    return sum("set config:" in line for line in lines)


def test_a_reset_neither_stops_the_timer_nor_sets_it_back(serve: Serve, uml: Callable[..., Uml]) -> None:
    server = serve("--timer", "--first-after", "2", "--every", "0.4")
    guest = uml(server)
    guest.load("timer=1")
    guest.console.wait_for(ACK, count=2)
    guest.command("rmmod virtio_test")
    seen = ticks_seen(server.lines)
    guest.load("timer=1")
    acknowledged = guest.console.lines.count(ACK)
    guest.console.wait_for(ACK, count=acknowledged + 2)
    server.console.wait_for("=========get virtio num:2", count=2)
    lines = server.lines
    ticks = [int(line.split(":")[1]) for line in lines if "set config:" in line]
    assert ticks == list(range(len(ticks)))
    assert len(ticks) >= seen + 2
    assert lines.count("=========get virtio num:1") == 2, "the driver's own number begins anew"


def test_the_true_thirty_seconds(serve: Serve, uml: Callable[..., Uml]) -> None:
    server = serve("--timer")
    guest = uml(server)
    guest.load("timer=1")
    _first_ticks(server, guest, 3, timeout=60)
    first, *others = [server.console.time_of(device_tick(k)[0]) for k in range(3)]
    assert 30 <= first - server.started < 33, "30 s after the server was started, which takes its time"
    assert all(0.9 < later - earlier < 1.3 for earlier, later in zip([first, *others], others, strict=False))
