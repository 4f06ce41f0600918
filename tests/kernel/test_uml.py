"""The whole system with user-mode Linux as the guest: its kernel, our driver, our back-end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from virtio_test.spec.ids import DeviceId

from tests.kernel import checks
from tests.kernel.guest import Uml
from tests.kernel.server import Server
from tests.kernel.transcript import (
    OPEN_FAILED,
    USAGE,
    WRITE_FAILED,
    device_request,
    driver_request,
)

pytestmark = pytest.mark.kernel

Serve = Callable[..., Server]
Boot = Callable[..., Uml]
RINGS = pytest.mark.parametrize("ring", [("--features", "-RING_PACKED"), ("--features", "-INDIRECT_DESC"), ()])


@RINGS
def test_a_request_reads_as_the_original_on_both_consoles(serve: Serve, uml: Boot, ring: tuple[str, ...]) -> None:
    server = serve(*ring)
    guest = uml(server)
    guest.load()
    assert guest.command("run virtio 10") == driver_request(10)
    assert server.said(5) == device_request(10)
    checks.ran(guest, transport="vhost-user", carrier="vhost-user")
    for count, number in enumerate((0, 253, 254, 255), 2):
        assert guest.command(f"run virtio {number}") == driver_request(number)
        assert server.said(5 * count)[-5:] == device_request(number)
    guest.power_off()
    assert len(server.said(5 * 5)) == 5 * 5
    assert server.stop() == 0
    assert not server.path.exists()


def test_the_program_explains_itself(serve: Serve, uml: Boot) -> None:
    server = serve()
    guest = uml(server)
    assert guest.command("run virtio 10", status=1) == OPEN_FAILED
    guest.load()
    for arguments in ("", " 256", " -1", " 1x", " 1 0", " 1 2 3", " 99999999999999999999"):
        assert guest.command(f"run virtio{arguments}", status=1) == USAGE
    assert server.lines == []


def test_two_processes_at_once(serve: Serve, uml: Boot) -> None:
    server = serve()
    guest = uml(server)
    guest.load("quiet=1")
    guest.command("start virtio 20 500")
    guest.command("start virtio 30 500")
    guest.command("wait")
    lines = server.said(5 * 1000)
    requests = [lines[i : i + 5] for i in range(0, len(lines), 5)]
    assert len(requests) == 1000
    assert requests.count(device_request(20)) == 500
    assert requests.count(device_request(30)) == 500


def test_the_module_goes_and_comes_back(serve: Serve, uml: Boot) -> None:
    server = serve()
    guest = uml(server)
    for number in (1, 2, 3):
        guest.load()
        assert guest.command(f"run virtio {number}") == driver_request(number)
        guest.command("rmmod virtio_test")
        assert guest.command("run virtio 9", status=1) == OPEN_FAILED
    assert server.said(15) == device_request(1) + device_request(2) + device_request(3)


def test_the_next_front_end_is_served_after_one_was_killed(serve: Serve, uml: Boot) -> None:
    server = serve()
    fds = server.fds()
    for number in range(3):
        guest = uml(server)
        guest.load("quiet=1")
        guest.command(f"run virtio {number}")
        # It dies with requests on their way.
        guest.command(f"start virtio {number} 100000")
        guest.close()
        server.wait_for_disconnects(number + 1)
        assert server.fds() == fds
    guest = uml(server)
    guest.load()
    assert guest.command("run virtio 10") == driver_request(10)
    server.console.wait_until(lambda lines: lines[-5:] == device_request(10), "request 10 on the device's console")


def test_ten_thousand_requests_leave_nothing_behind(serve: Serve, uml: Boot) -> None:
    server = serve()
    idle_fds = server.fds()
    guest = uml(server)
    guest.load("quiet=1")
    guest.command("run virtio 1 1000")
    fds, mappings, memory = server.fds(), server.mappings(), server.memory()
    guest.command("run virtio 1 10000", timeout=120)
    assert server.fds() == fds
    assert abs(server.mappings() - mappings) <= 4
    assert server.memory() - memory < 1 << 20
    said = server.said(5 * 11000)
    assert said.count(device_request(1)[0]) == 11000, "each answered once: none is in flight"
    guest.command("rmmod virtio_test")
    guest.power_off()
    server.wait_for_disconnects(1)
    assert server.fds() == idle_fds


def test_a_killed_writer_takes_nobody_with_it(serve: Serve, uml: Boot) -> None:
    server = serve()
    guest = uml(server)
    guest.load()
    server.pause()
    guest.command("start virtio 5")
    guest.command("sleep 0.2")
    guest.command("kill")
    guest.command("wait", status=137)
    server.resume()
    guest.console.wait_for(driver_request(5)[-1])
    assert guest.command("run virtio 6") == driver_request(6)
    guest.command("rmmod virtio_test")
    assert server.said(10) == device_request(5) + device_request(6)


def test_unbinding_fails_what_is_in_flight(serve: Serve, uml: Boot) -> None:
    server = serve()
    guest = uml(server)
    guest.load()
    server.pause()
    for number in range(4):
        guest.command(f"start virtio {number}")
    guest.command("sleep 0.2")
    # The driver's remove waits for the back-end, long after the writers were told. The back-end may still answer some
    # before: every writer hears one of the two, once.
    unbind = "write /sys/bus/virtio/drivers/virtio_test/unbind virtio0"
    guest.start(unbind)
    guest.start("wait")
    server.resume()
    guest.console.wait_for(f"guest: end: 0 {unbind}")
    assert sum(guest.ends_of_writers(range(4))) == 4
    guest.command("write /sys/bus/virtio/drivers/virtio_test/bind virtio0")
    assert guest.command("run virtio 7") == driver_request(7)
    guest.command("rmmod virtio_test")


def test_a_back_end_that_dies_leaves_no_writer_waiting(serve: Serve, uml: Boot) -> None:
    server = serve()
    guest = uml(server)
    guest.load()
    server.pause()
    guest.command("start virtio 5")
    guest.command("sleep 0.2")
    server.close()
    assert WRITE_FAILED in guest.command("wait", status=1)
    assert guest.command("run virtio 6", status=1) == OPEN_FAILED
    guest.command("rmmod virtio_test")


def test_without_can_print_there_is_no_request_api(serve: Serve, uml: Boot) -> None:
    server = serve("--features", "-CAN_PRINT")
    guest = uml(server)
    assert any("the device does not offer CAN_PRINT: no request API" in line for line in guest.load())
    assert guest.command("run virtio 10", status=1) == OPEN_FAILED
    guest.command("rmmod virtio_test")


@pytest.mark.parametrize("native", [None, "loop", "blocking", "adaptive"])
def test_linux_own_drivers_of_a_disk_and_of_entropy(
    serve: Serve, uml: Boot, native: str | None, tmp_path: Path
) -> None:
    """Its disk and its source of entropy, each in a guest that has only that."""
    how = () if native is None else ("--native", native)
    server = serve("--device", "rng", *how)
    guest = uml(server, virtio_id=DeviceId.ENTROPY)
    assert "guest: out: virtio_rng.0" in guest.command("read /sys/class/misc/hw_random/rng_current")
    guest.power_off()
    assert server.stop() == 0
    image = tmp_path / "image"
    text = b"".join(b"this is line %d of the disk\n" % line for line in range(16))
    image.write_bytes(text.ljust(512, b"\n"))
    server = serve("--device", "blk", "--image", str(image), *how)
    guest = uml(server, virtio_id=DeviceId.BLOCK)
    seen = guest.command("read /dev/vda")
    assert [f"guest: out: {line}" for line in text.decode().splitlines()] == seen[:16]
    guest.power_off()
    assert server.stop() == 0
