"""Block devices whose requests are answered in Python, and by the native service; for what both do alike."""

from __future__ import annotations

import os
from typing import Any

import pytest
from virtio_test.devices.blk import BlkDevice

NATIVE = pytest.mark.parametrize("native", [False, True], ids=["python", "native"])


def disk(content: bytes | bytearray, *, native: bool, **options: Any) -> BlkDevice:
    """A device of this content: in memory, or in a file that only the device knows."""
    if not native:
        return BlkDevice(bytearray(content), **options)
    fd = os.memfd_create("disk")
    try:
        os.ftruncate(fd, len(content))
        os.pwrite(fd, content, 0)
        return BlkDevice(fd, native=True, **options)
    finally:
        os.close(fd)


def content(device: BlkDevice) -> bytes:
    """All of what the device holds now."""
    out = bytearray(device.image.size)
    device.image.read_into(memoryview(out), 0)
    return bytes(out)
