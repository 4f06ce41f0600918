"""A case as JSON, and back: the format that corpora keep and that the fuzzers in Rust begin with.

`RingCase.to_json` writes one object; `from_json` takes it back and refuses what it does not know. Numbers are integers,
bytes are hexadecimal, and what has its default may be left out:

| key | what |
|---|---|
| ``virtio-test`` | ``"ring-case"``: what this is |
| ``version`` | 1; it grows when a key changes its meaning |
| ``row``, ``title`` | the row of the catalogue, or empty, and what is special |
| ``end`` | ``"device"`` or ``"driver"``: which end is judged |
| ``packed``, ``size``, ``features`` | the queue; RING_PACKED is implied by ``packed`` |
| ``start`` | where both indices stand: 16 bits (split), or slot and wrap counter in bit 15 (packed) |
| ``switches`` | switches of `Policy` that differ from both named ones, name to value |
| ``regions`` | list of [address, size, writable] |
| ``ring``, ``tables``, ``entries`` | addresses of ring and tables, and descriptors of each table |
| ``areas`` | arguments of `QueueConfig` that differ for the judged end: size, desc, driver, device |
| ``state`` | [avail, used] to go on from, where it is not ``start`` |
| ``buffers`` | list of {readable: [[address, length]], writable: [[address, length]], indirect, data} |
| ``writes`` | list of changes, each [name, arguments of the act in order]: ``["put", "avail.idx", 9, 0]`` |
| ``later`` | list of acts, the same |
| ``interop``, ``strict`` | {chains, rule, built, segments, used} under that policy; null: nothing is known |

``rule`` is the broken one, or null; ``chains`` counts what is handed out before; ``built`` is false where the queue is
refused; ``segments`` is a list, for each chain [[address, length, device-writable]], and ``used``, for each used buffer
[its number, bytes written], or null where it does not matter.

The image of memory that a case begins with is `scene.memory.read(0, 0x10000)` in `with case.play() as scene`; what
follows is in ``later``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from virtio_test.errors import InvalidArgument

from .acts import ACTS, Act, Add, Buffer, Write

if TYPE_CHECKING:
    from .case import RingCase

__all__ = ["decode", "encode"]

_FORMAT: Final = "ring-case"
_VERSION: Final = 1


def encode(case: RingCase) -> str:
    """One line; what has its default is left out."""
    plain = type(case)()
    found: dict[str, Any] = {"virtio-test": _FORMAT, "version": _VERSION}
    for each in fields(case):
        value = getattr(case, each.name)
        if value != getattr(plain, each.name):
            found[each.name] = _plain(each.name, value)
    return json.dumps(found)


def _plain(key: str, value: Any) -> Any:
    match key:
        case "buffers":
            return [_from_buffer(each) for each in value]
        case "writes" | "later":
            return [_from_act(each) for each in value]
        case "interop" | "strict":
            return value._asdict()
        case _:
            return value


def _from_buffer(buffer: Buffer) -> dict[str, Any]:
    return buffer._asdict() | {"data": buffer.data.hex()}


def _from_act(act: Act) -> list[Any]:
    values: tuple[Any, ...] = act
    if isinstance(act, Write):
        values = (act.address, act.data.hex())
    elif isinstance(act, Add):
        values = (_from_buffer(act.buffer),)
    return [type(act).__name__.lower(), *values]


# ------------------------------------------------------------------------------------------------------------- and back


def decode(text: str | bytes) -> dict[str, Any]:
    """The fields of the case; `InvalidArgument` for anything else than a whole case of this version."""
    try:
        found = json.loads(text)
        if found.pop("virtio-test") != _FORMAT or found.pop("version") != _VERSION:
            raise InvalidArgument(f"a ring case of version {_VERSION} is wanted")
        return {key: _FIELDS[key](value) for key, value in found.items()}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise InvalidArgument(f"this is no ring case: {error!r}") from error


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 128:
        raise TypeError(f"{value!r} is no number")
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise TypeError(f"{value!r} is neither true nor false")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"{value!r} is no text")
    return value


def _end(value: Any) -> str:
    if value not in ("device", "driver"):
        raise ValueError(f"{value!r} is no end")
    return value


def _row(*kinds: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    """A list with exactly these."""
    return lambda value: tuple(kind(each) for kind, each in zip(kinds, value, strict=True))


def _rows(kind: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, ...]]:
    return lambda value: tuple(kind(each) for each in value)


def _optional(kind: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else kind(value)


def _named(kind: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    return lambda value: {_text(key): kind(each) for key, each in value.items()}


def _switch(value: Any) -> bool | int:
    return value if type(value) is bool else _number(value)


def _to_buffer(found: dict[str, Any]) -> Buffer:
    spans = _rows(_row(_number, _number))
    kinds: dict[str, Callable[[Any], Any]] = {
        "readable": spans,
        "writable": spans,
        "indirect": _flag,
        "data": bytes.fromhex,
    }
    return Buffer(**{key: kinds[key](value) for key, value in found.items()})


_ARGUMENTS: Final[dict[str, Callable[[Any], Any]]] = {
    "field": _text,
    "data": bytes.fromhex,
    "writable": _flag,
    "buffer": _to_buffer,
}
"""Arguments of acts that are no numbers."""


def _to_act(found: Iterable[Any]) -> Act:
    name, *values = found
    kind = ACTS[name]
    names = kind._fields
    if len(values) > len(names):
        raise ValueError(f"{name} has {len(names)} arguments")
    return kind(*(_ARGUMENTS.get(key, _number)(value) for key, value in zip(names, values, strict=False)))


def _to_outcome(found: dict[str, Any]) -> Any:
    from .case import Outcome

    kinds: dict[str, Callable[[Any], Any]] = {
        "chains": _number,
        "rule": _optional(_text),
        "built": _flag,
        "segments": _optional(_rows(_rows(_row(_number, _number, _flag)))),
        "used": _optional(_rows(_row(_number, _number))),
    }
    return Outcome(**{key: kinds[key](value) for key, value in found.items()})


_FIELDS: Final[dict[str, Callable[[Any], Any]]] = {
    **dict.fromkeys(("row", "title"), _text),
    "end": _end,
    "packed": _flag,
    **dict.fromkeys(("size", "features", "start", "ring", "tables", "entries"), _number),
    "switches": _named(_switch),
    "regions": _rows(_row(_number, _number, _flag)),
    "areas": _named(_number),
    "state": _optional(_row(_number, _number)),
    "buffers": _rows(_to_buffer),
    **dict.fromkeys(("writes", "later"), _rows(_to_act)),
    **dict.fromkeys(("interop", "strict"), _optional(_to_outcome)),
}
