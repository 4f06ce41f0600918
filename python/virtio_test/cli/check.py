"""``virtio-test check``: all that is broken in a queue of a dump of guest memory.

The queue is described by options or by one JSON object of the same names, `-` written as `_`; an option wins over the
description. Numbers are decimal or hexadecimal (``0x``), in JSON numbers or strings.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, cast

from virtio_test._core import GuestMemory, Policy, QueueConfig, QueueState
from virtio_test.checks import Ring
from virtio_test.console import print_line, shown
from virtio_test.errors import InvalidArgument, QueueViolation
from virtio_test.features import FeatureSet

__all__ = ["check"]

_NUMBERS: Final = {"size": 32, "desc": 64, "driver": 64, "device": 64, "at": 64}
_NUMBERS_16: Final = {"index": 16, "avail_from": 16, "taken": 16}
_NEEDED: Final = ("size", "desc", "driver", "device")
_BITS: Final = _NUMBERS | _NUMBERS_16
_KEYS: Final = (*_BITS, "packed", "features", "policy")
_MOST: Final = 1 << 16
_PACKED: Final = FeatureSet("RING_PACKED").bits


def check(
    dump: Path,
    *,
    queue: Path | None = None,
    as_json: bool = False,
    show: Callable[[str], object] = print_line,
    **options: Any,
) -> int:
    """Show each finding in a line, or all as one JSON object; 1 when there are any, else 0.

    Args:
        dump: raw guest memory.
        queue: description of the queue.
        as_json: one object instead of lines.
        show: takes the output.
        options: what the description says, by its names; None where the option was not given.

    Raises:
        InvalidArgument: the dump, or the description, is none.
        OSError: a file cannot be read.
    """
    values = _described(queue) if queue is not None else {}
    values |= {name: value for name, value in options.items() if value is not None}
    config, at = _config(values), _number(values, "at", 0)
    device, driver = (QueueState(_number(values, name)) if name in values else None for name in ("avail_from", "taken"))
    if driver is not None and config.packed:
        raise InvalidArgument("--taken is for split rings: a packed ring does not keep what was used")
    # A pipe without a writer must not keep us: it is refused as what it is.
    fd = os.open(dump, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        found = Ring(_mapped(fd, dump, at), config, state=device, driver_state=driver).check()
    finally:
        os.close(fd)
    if as_json:
        show(json.dumps({"queue": _told(config), "findings": [_as_dict(each) for each in found]}, indent=2))
    else:
        for each in found:
            show(str(each))
        if not found:
            kind = "packed" if config.packed else "split"
            show(f"nothing is broken in the {kind} ring of {config.size}")
    return 1 if found else 0


def _mapped(fd: int, dump: Path, at: int) -> GuestMemory:
    """The dump as memory, read where it is looked at and not written."""
    about = os.fstat(fd)
    if not stat.S_ISREG(about.st_mode):
        raise InvalidArgument(f"{dump}: not a regular file, so no dump")
    if not about.st_size or about.st_size % 8:
        raise InvalidArgument(f"{dump}: {about.st_size} bytes, a dump of memory has a multiple of 8")
    memory = GuestMemory()
    memory.add_remote(
        at,
        about.st_size,
        read=lambda address, length: os.pread(fd, length, address - at),
        write=lambda _address, _data: None,
    )
    return memory


def _described(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST + 1)
        if len(text) > _MOST:
            raise InvalidArgument(f"{path}: more than {_MOST} bytes, a description of a queue has a few hundred")
        values: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"{path}: not JSON: {error}") from None
    if not isinstance(values, dict):
        raise InvalidArgument(f"{path}: not one JSON object")
    found = cast("dict[str, Any]", values)
    if unknown := sorted(found.keys() - set(_KEYS)):
        raise InvalidArgument(f"{path}: {shown(unknown[0])} is none of {', '.join(_KEYS)}")
    return found


def _config(values: Mapping[str, Any]) -> QueueConfig:
    if missing := [name for name in _NEEDED if name not in values]:
        raise InvalidArgument(f"no {missing[0]} of the queue: give --{missing[0]}, or a description with --queue")
    packed, policy = values.get("packed", False), values.get("policy", "strict")
    if not isinstance(packed, bool):
        raise InvalidArgument(f"packed is {shown(packed)}: give true or false")
    if policy not in ("interop", "strict"):
        raise InvalidArgument(f"policy is {shown(policy)}: give interop or strict")
    return QueueConfig(
        _number(values, "size"),
        desc=_number(values, "desc"),
        driver=_number(values, "driver"),
        device=_number(values, "device"),
        index=_number(values, "index", 0),
        features=_features(values.get("features", 0)) | _PACKED * packed,
        policy=Policy.strict if policy == "strict" else Policy.interop,
    )


def _number(values: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = values.get(name, default)
    option, bits = name.replace("_", "-"), _BITS.get(name, 64)
    if isinstance(value, str) and re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,20}", value):
        value = int(value, 16 if value[:2] in ("0x", "0X") else 10)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << bits:
        raise InvalidArgument(f"{option} is {shown(value)}: give a number below 2**{bits}, decimal or with 0x")
    return value


def _features(value: Any) -> int:
    """Bits of a number, of names with commas between, or of a list of names."""
    if isinstance(value, str) and not re.fullmatch(r"(0[xX])?[0-9a-fA-F]+", value):
        value = [name for name in value.split(",") if name]
    if not isinstance(value, list):
        return _number({"features": value}, "features")
    return FeatureSet(*map(str, cast("list[object]", value))).bits


def _told(config: QueueConfig) -> dict[str, Any]:
    return {
        "index": config.index,
        "size": config.size,
        "packed": config.packed,
        "features": config.features,
        "policy": "strict" if config.policy == Policy.strict else "interop",
        **{name: getattr(config, name) for name in ("desc", "driver", "device")},
    }


def _as_dict(error: QueueViolation) -> dict[str, Any]:
    return {
        "rule": error.rule,
        "clause": error.clause,
        "message": error.message,
        "expected": error.expected,
        **error.places(),
    }
