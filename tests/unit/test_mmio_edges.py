"""Where what a virtio-mmio page takes begins and ends: each number, and the next one."""

from __future__ import annotations

from typing import Any

import pytest
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.devices.base import BaseDevice
from virtio_test.errors import InvalidArgument
from virtio_test.spec.mmio import CONFIG, NO_SHARED_MEMORY

from .test_mmio import Machine


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"shared_memory": {0: (0, 0)}}, True),
        ({"shared_memory": {255: (0, 1)}}, True),
        ({"shared_memory": {256: (0, 1)}}, False),
        ({"shared_memory": {-1: (0, 1)}}, False),
        ({"shared_memory": {0: (0, -1)}}, False),
        ({"shared_memory": {0: (1, NO_SHARED_MEMORY - 2)}}, True),
        ({"shared_memory": {0: (1, NO_SHARED_MEMORY - 1)}}, False),
        ({"vendor_id": 0}, True),
        ({"vendor_id": 0xFFFF_FFFF}, True),
        ({"vendor_id": 1 << 32}, False),
        ({"vendor_id": -1}, False),
    ],
)
def test_the_least_and_the_largest_declaration(options: dict[str, Any], *, possible: bool) -> None:
    if possible:
        machine = Machine(**options)
        assert machine.get("VendorID") == options.get("vendor_id", 0x1AF4)
        assert machine.mmio.shared_memory == options.get("shared_memory", {})
    else:
        with pytest.raises(InvalidArgument):
            Machine(**options)


def test_an_access_that_is_as_wide_as_the_field_begins_where_it_does() -> None:
    layout = ConfigLayout(("odd", "u8"), ("one", "le16"), ("two", "le16"), ("rest", "bytes(3)"))
    machine = Machine(BaseDevice(7, handlers={0: bytes.upper}, config=ConfigSpace(layout, one=0x1234, two=0x5678)))
    assert machine.mmio.read(CONFIG + 2, 2) == b"\x12\x78"
    assert machine.rules() == {"ConfigAccessWidth": 1}


def test_a_legacy_queue_can_be_taken_back_before_the_page_size_is_said() -> None:
    machine = Machine(version=1)
    machine.put("QueuePFN", 0)
    assert machine.rules() == {}
    machine.put("QueuePFN", 1)
    assert machine.rules() == {"NoGuestPageSize": 1}


def test_a_device_without_legacy_rules_has_a_page_of_version_2() -> None:
    assert Machine(BaseDevice(7, handlers={0: bytes.upper}, transitional=False)).get("Version") == 2
