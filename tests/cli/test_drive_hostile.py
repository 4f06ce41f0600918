"""``virtio-test drive`` and devices whose configuration space says what cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from virtio_test._core import Chain
from virtio_test.devices.blk import BlkDevice

from tests.unit.vhost_user_world import serving

from .conftest import Run

SIZE = 8 << 20


class Shrinking(BlkDevice):
    """A disk that says at its hundredth request that it has its first sectors only, and goes on all the same."""

    answered = 0

    def answer(self, chain: Chain) -> int:
        self.answered += 1
        if self.answered == 100:
            self.config.update(capacity=8)
        chain.write(bytes(chain.writable))
        return chain.writable


@pytest.mark.parametrize("size", [3 << 30, 1 << 22, 1 << 20, 5000, 1])
def test_blocks_that_no_memory_holds_are_read_in_parts(run: Run, tmp_path: Path, size: int) -> None:
    device = BlkDevice(bytearray(SIZE))
    device.config["blk_size"] = size
    path = tmp_path / "s"
    with serving(path, device):
        result = run("drive", "--socket", str(path), "--device", "blk", "--count", "60", "--depth", "32", "--json")
    assert (result.status, result.err) == (0, "")
    facts = json.loads(result.out)
    assert (facts["requests"], facts["block_size"]) == (60, size)


@pytest.mark.parametrize("write", [(), ("--write",)], ids=["read", "write"])
def test_a_disk_that_shrinks_is_a_finding(run: Run, tmp_path: Path, write: tuple[str, ...]) -> None:
    path = tmp_path / "s"
    with serving(path, Shrinking(bytearray(SIZE))):
        result = run("drive", "--socket", str(path), "--device", "blk", "--count", "20000", "--depth", "4", *write)
    assert result.status == 1
    assert result.err == "virtio-test: the capacity is 8 sectors now, and was at least 16384\n"
    assert "findings" in result.out
