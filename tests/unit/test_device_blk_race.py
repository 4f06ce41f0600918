"""Row T08 of the robustness catalogue: a request's header changes while the device is at work on it."""

from __future__ import annotations

import contextlib

import pytest
from virtio_test._core import GuestMemory, Trace
from virtio_test.carrier.loopback import Loopback
from virtio_test.driver.blk import BlkDriver
from virtio_test.errors import RequestFailed
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import HEADER, RequestType

from .disks import NATIVE, content, disk

SIZE = 1 << 20


@pytest.mark.row("T08")
@NATIVE
@pytest.mark.parametrize(("field", "value"), [("sector", 1), ("sector", 1 << 60), ("kind", int(RequestType.GET_ID))])
def test_a_header_that_changes_meanwhile_is_one_or_the_other(field: str, value: int, *, native: bool) -> None:
    """Before each access of the device another header is there: what is done is what one of both says."""

    def run(number: int | None) -> tuple[tuple[bytes, int | None], int]:
        """What a write of sector 0 comes to, with the change before that access; and how many accesses it took."""
        trace, device = Trace(), disk(bytes(SIZE), native=native)
        registers = Loopback(device, memory=GuestMemory([(0, 1 << 20)], trace=trace))
        driver = BlkDriver(registers, wanted=FeatureSet("VERSION_1"))
        driver.initialize()
        request = driver.submit_request(RequestType.OUT, 0, b"x" * 512, 0, publish=False)
        layout = registers.bank.queue(0).layout()
        (header,) = [
            int.from_bytes(registers.memory.read(layout.at("desc.addr", index), 8), "little")
            for index in range(layout.size)
            if registers.memory.read(layout.at("desc.len", index), 4) == HEADER.size.to_bytes(4, "little")
        ]
        trace.clear()
        driver.flush(0)
        before = len(trace.log())
        if number is not None:
            changed = HEADER.pack(value if field == "kind" else RequestType.OUT, 0, value if field == "sector" else 0)
            trace.change_at(before + number, header, changed)
        with contextlib.suppress(RequestFailed):
            request.wait()
        log = trace.log()[before:]
        assert sum(access.kind == "read" and access.address == header for access in log) == 1
        found = content(device)[:1024]
        device.close()
        return (found, request.status), len(log)

    (untouched, count), (whole, _) = run(None), run(0)
    assert whole != untouched
    outcomes = [run(number)[0] for number in range(count)]
    assert set(outcomes) == {whole, untouched}
    # There is one moment at which the header is read.
    assert outcomes == sorted(outcomes, key=lambda each: each != whole)
