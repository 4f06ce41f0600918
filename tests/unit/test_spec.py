"""The constants agree with the specification's tables, and with each other."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import pytest
import virtio_test.spec
from virtio_test.spec import blk, clauses, console, features, ids, mmio, net, pci, rng, status

SPEC_FILES = sorted(Path(next(iter(virtio_test.spec.__path__))).glob("*.py"))


def test_spec_imports_nothing_of_ours_and_defines_no_function() -> None:
    assert {each.stem for each in SPEC_FILES} >= {"ids", "features", "status", "clauses", "pci", "mmio"}
    for path in SPEC_FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda), path
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, path
                assert (node.module or "").partition(".")[0] in sys.stdlib_module_names, path
            elif isinstance(node, ast.Import):
                assert all(each.name.partition(".")[0] in sys.stdlib_module_names for each in node.names), path


def test_device_ids() -> None:
    assert (ids.DeviceId.NET, ids.DeviceId.BLOCK, ids.DeviceId.CONSOLE, ids.DeviceId.SPI) == (1, 2, 3, 45)
    assert ids.TEST_DEVICE_ID == 45
    assert set(range(1, 50)) - set(ids.DEVICE_NAMES) == {14, 15, 37}
    assert ids.DEVICE_NAMES[2] == "block"
    assert all(ids.DEVICE_IDS[name] == number for number, name in ids.DEVICE_NAMES.items())
    assert len(ids.DEVICE_IDS) == len(ids.DEVICE_NAMES) == 46


def test_pci_ids() -> None:
    assert (ids.PCI_VENDOR_ID, ids.PCI_TEST_DEVICE_ID) == (0x1AF4, 0x1013)
    assert ids.PCI_TEST_DEVICE_ID in ids.PCI_TRANSITIONAL_DEVICE_IDS
    assert ids.PCI_TEST_DEVICE_ID not in ids.PCI_TRANSITIONAL_IDS.values()
    listed = [int(each) for each in ids.PCI_TRANSITIONAL_IDS]
    assert listed == [1, 2, 5, 3, 8, 4, 9]
    assert list(ids.PCI_TRANSITIONAL_IDS.values()) == [0x1000, 0x1001, 0x1002, 0x1003, 0x1004, 0x1005, 0x1009]
    for each in ids.DeviceId:
        assert ids.PCI_MODERN_DEVICE_ID_BASE + each in ids.PCI_MODERN_DEVICE_IDS


@pytest.mark.parametrize(
    ("name", "bit"),
    [
        ("INDIRECT_DESC", 28),
        ("EVENT_IDX", 29),
        ("VERSION_1", 32),
        ("ACCESS_PLATFORM", 33),
        ("RING_PACKED", 34),
        ("IN_ORDER", 35),
        ("ORDER_PLATFORM", 36),
        ("SR_IOV", 37),
        ("NOTIFICATION_DATA", 38),
        ("NOTIF_CONFIG_DATA", 39),
        ("RING_RESET", 40),
        ("ADMIN_VQ", 41),
        ("SUSPEND", 43),
    ],
)
def test_feature_bit(name: str, bit: int) -> None:
    feature = features.FEATURE_BY_NAME[name]
    assert feature.bit == bit
    assert features.FEATURE_BY_BIT[bit] is feature
    assert not feature.legacy
    assert feature.requires == (("VERSION_1",) if bit > 32 else ())
    assert feature.clause in clauses.CLAUSES


def test_feature_table_has_nothing_else_than_legacy() -> None:
    assert sorted(each.bit for each in features.FEATURES if each.legacy) == [24, 27]
    assert len(features.FEATURES) == 15
    assert [each.name for each in features.FEATURES if each.transports] == ["SR_IOV", "ADMIN_VQ"]


def test_feature_ranges_cover_each_bit_once() -> None:
    ranges = [*features.DEVICE_TYPE_RANGES, *features.QUEUE_RANGES, features.RESERVED_RANGE]
    assert sorted(bit for each in ranges for bit in each) == list(range(features.FEATURE_BITS))
    for each in features.FEATURES:
        assert any(each.bit in queue for queue in features.QUEUE_RANGES), each


def test_status_bits() -> None:
    assert [each.value for each in status.Status] == [1, 2, 4, 8, 0x10, 0x40, 0x80]
    assert sum(each.value for each in status.Status) == status.STATUS_DEFINED
    assert status.STATUS_DEFINED ^ status.STATUS_UNDEFINED == 0xFF
    assert [each.value for each in status.INIT_SEQUENCE] == [1, 2, 8, 4]


def test_clauses_are_short_and_in_order() -> None:
    def key(clause: str) -> list[int]:
        return [int(part) for part in clause.split(".")]

    numbers = list(clauses.CLAUSES)
    assert numbers == sorted(numbers, key=key)
    for number, text in clauses.CLAUSES.items():
        assert re.fullmatch(r"\d+(\.\d+)*", number)
        assert 20 <= len(text) <= 200, number
        assert text.endswith("."), number
        assert "MUST" not in text, f"{number} must be in our own words"


def test_common_structure_is_contiguous() -> None:
    offset = 0
    for name, register in pci.COMMON.items():
        assert register.offset == offset, name
        offset += register.size
    assert offset == pci.COMMON_SIZE
    readonly = [name for name, register in pci.COMMON.items() if not register.driver_writable]
    assert readonly == [
        "device_feature",
        "num_queues",
        "config_generation",
        "queue_notify_off",
        "queue_notif_config_data",
        "admin_queue_index",
        "admin_queue_num",
    ]


def test_capability_structures() -> None:
    assert [int(each) for each in pci.CapType] == [1, 2, 3, 4, 5, 8, 9]
    last = pci.CAP["length"]
    assert last.offset + last.size == pci.CAP_SIZE == pci.CAP_NOTIFY_MULTIPLIER.offset == pci.CAP_PCI_CFG_DATA.offset
    assert pci.CAP64_OFFSET_HI.offset + 4 == pci.CAP64_LENGTH_HI.offset == pci.CAP64_SIZE - 4
    assert (pci.CAP_NOTIFY_SIZE, pci.CAP_PCI_CFG_SIZE) == (20, 20)
    assert (pci.NO_VECTOR, list(pci.BARS)) == (0xFFFF, [0, 1, 2, 3, 4, 5])


def test_mmio_registers_are_aligned_words() -> None:
    offsets = [each.offset for each in mmio.REGISTERS.values()]
    assert offsets == sorted(set(offsets))
    assert all(offset % 4 == 0 and offset < mmio.CONFIG for offset in offsets)
    assert mmio.MAGIC.to_bytes(4, "little") == b"virt"
    assert (mmio.REGISTERS["Status"], mmio.REGISTERS["ConfigGeneration"]) == ((0x70, "RW"), (0xFC, "R"))
    both_ways = [name for name, each in mmio.REGISTERS.items() if each.access == "RW"]
    assert both_ways == ["QueueReady", "Status", "QueueReset"]
    for low in [name for name in mmio.REGISTERS if name.endswith("Low")]:
        high = low.removesuffix("Low") + "High"
        assert mmio.REGISTERS[high].offset == mmio.REGISTERS[low].offset + 4


@pytest.mark.parametrize("module", [blk, console, net, rng])
def test_class_features_keep_to_their_ranges(module: ModuleType) -> None:
    names: Mapping[str, int] = module.FEATURE_NAMES
    assert len(set(names.values())) == len(names)
    assert all(any(bit in each for each in features.DEVICE_TYPE_RANGES) for bit in names.values())
    assert not set(names) & set(features.FEATURE_BY_NAME)
    requires: Mapping[str, tuple[str, ...]] = getattr(module, "REQUIRES", {})
    for name, needs in requires.items():
        assert {name}.union(*(need.split("|") for need in needs)) <= set(names)


def test_class_structures() -> None:
    assert (blk.HEADER.size, blk.SEGMENT.size, blk.LIFETIME.size) == (16, 16, 6)
    assert (console.CONTROL.size, console.RESIZE.size) == (8, 4)
    assert (net.HEADER_LEGACY.size, net.HEADER.size) == (10, 12)
    assert [int(each) for each in blk.RequestType] == [0, 1, 4, 8, 10, 11, 13, 14]
    assert [int(each) for each in console.ControlEvent] == list(range(8))
    assert set(blk.FIELD_FEATURES) <= {each[0] for each in blk.CONFIG_FIELDS}
    assert set(blk.FIELD_FEATURES.values()) <= set(blk.FEATURE_NAMES)
