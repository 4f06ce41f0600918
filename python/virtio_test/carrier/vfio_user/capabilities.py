"""The capabilities of VERSION: a JSON object with a final NUL, each member checked for its type and range."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

from .payloads import MAX_DATA
from .rules import violation

__all__ = ["Capabilities", "pack_capabilities", "parse_capabilities"]

_NUMBERS: Final = {"max_msg_fds": 0, "max_data_xfer_size": 1, "max_dma_maps": 1, "pgsizes": 1}
"""Each with its least value; the largest is what a 64-bit number holds."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What one side can do; the values that hold when it does not say.

    Attributes:
        max_msg_fds: fds that it takes with one message.
        max_data_xfer_size: bytes of data that it takes in one message.
        max_dma_maps: regions that can be mapped at once.
        pgsizes: sizes of pages, a bit for each.
        write_multiple: whether REGION_WRITE_MULTI is used.
        named: the names that it did say.
    """

    max_msg_fds: int = 1
    max_data_xfer_size: int = MAX_DATA
    max_dma_maps: int = 65535
    pgsizes: int = 4096
    write_multiple: bool = False
    named: frozenset[str] = frozenset()


def parse_capabilities(data: bytes) -> Capabilities:
    """Read version data; what it has that is not known here is left alone.

    Raises:
        MessageError: VersionData, Capability.
    """
    if not data:
        return Capabilities()
    if data[-1]:
        raise violation("VersionData", f"{len(data)} bytes of version data do not end with a NUL")
    try:
        found: object = json.loads(data[:-1])
    except (ValueError, RecursionError) as error:
        raise violation("VersionData", f"version data is no JSON: {type(error).__name__}") from error
    given = _object(found, "version data").get("capabilities", {})
    members = _object(given, "capabilities")
    values: dict[str, Any] = {}
    for name, least in _NUMBERS.items():
        value = members.get(name, least)
        # A bool is an int to Python, not to JSON.
        if type(value) is not int or not least <= value < 1 << 64:
            raise violation("Capability", f"{name} is no number from {least} on that 64 bits hold")
        if name in members:
            values[name] = value
    value = members.get("write_multiple", False)
    if not isinstance(value, bool):
        raise violation("Capability", "write_multiple is neither true nor false")
    return Capabilities(**values, write_multiple=value, named=frozenset(members))


def _object(value: object, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise violation("VersionData", f"{what} is no JSON object")
    return cast("dict[str, Any]", value)


def pack_capabilities(capabilities: Capabilities) -> bytes:
    """The version data that says those of the capabilities that are `named`."""
    members = {
        name: getattr(capabilities, name) for name in (*_NUMBERS, "write_multiple") if name in capabilities.named
    }
    return json.dumps({"capabilities": members}).encode("ascii") + b"\0"
