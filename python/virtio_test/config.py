"""The device configuration space: a declared layout, and the bytes behind it (VIRTIO 1.4, 2.5).

Theory
------
The driver sees bytes and may read or write any range of them, narrower or wider than a field. The device sees
fields with names and values. `ConfigSpace` is both views of the same bytes, little endian.

The generation lets a driver find out that two of its reads do not belong together. Two demands pull at it: a
plain counter per change could wrap its 8 bits on PCI between two looks of the driver (note in 4.1.4.3.1), and
it must stand still between two looks if nothing changed (4.2.2, ConfigGeneration). Both hold when it grows at a
change, but only if the driver has read anything since it last grew: what nobody read needs no new generation,
so one look of the driver at the space costs at most one step.

Whose fault is what: a range outside of the space comes from the other side and raises a `StatusViolation`; a
write to a read-only field is ignored and counted, because drivers that write whole structures back are common;
an impossible value assigned by the device itself is our mistake and raises `InvalidArgument`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, Final, Literal, cast

from .console import shown
from .errors import InvalidArgument, SavedStateError, StatusViolation

__all__ = ["ConfigLayout", "ConfigSpace", "Field", "FieldSpec"]

FieldSpec = tuple[str, str] | tuple[str, str, Literal["ro", "rw"]]
"""How a layout declares a field: name, type, and who may write it."""

_INTEGERS: Final = {"u8": 1, "le16": 2, "le32": 4, "le64": 8}
_MAX_BYTES_FIELD: Final = 0x10000
_STATE_VERSION: Final = 1
_STATE_KEYS: Final = {"version", "generation", "values"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a layout.

    Attributes:
        name: an identifier.
        type: ``u8``, ``le16``, ``le32``, ``le64`` or ``bytes(n)``.
        offset: bytes from the start of the space.
        size: bytes.
        driver_writable: whether the driver's writes take effect.
    """

    name: str
    type: str
    offset: int
    size: int
    driver_writable: bool

    @property
    def is_integer(self) -> bool:
        """Whether the field's value is an int (else it is bytes of exactly `size`)."""
        return self.type in _INTEGERS

    def encode(self, value: object) -> bytes:
        """The bytes of `value`.

        Raises:
            InvalidArgument: it is of another type or does not fit.
        """
        if self.is_integer:
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 8 * self.size:
                limit = (1 << 8 * self.size) - 1
                raise InvalidArgument(f"{self.name} is {shown(value)}; a {self.type} holds integers from 0 to {limit}")
            return value.to_bytes(self.size, "little")
        if not isinstance(value, bytes) or len(value) != self.size:
            raise InvalidArgument(f"{self.name} is {shown(value)}; it must be exactly {self.size} bytes")
        return value

    def decode(self, data: bytes) -> int | bytes:
        """The value of `data`, which has the field's size."""
        return int.from_bytes(data, "little") if self.is_integer else data


class ConfigLayout:
    """The fields of a configuration space in their order, without gaps.

    Args:
        fields: tuples ``(name, type)`` or ``(name, type, "rw")``; the type is ``u8``, ``le16``, ``le32``, ``le64``
            or ``bytes(n)``; ``"rw"`` lets the driver write the field, ``"ro"`` is the default.

    Raises:
        InvalidArgument: a name that is no identifier or comes twice, an unknown type or access.
    """

    __slots__ = ("_fields", "_size")

    def __init__(self, *fields: FieldSpec) -> None:
        made: dict[str, Field] = {}
        offset = 0
        for each in fields:
            name, kind, access = each if len(each) == 3 else (*each, "ro")
            if not name.isidentifier() or iskeyword(name) or name.startswith("_") or name in made:
                raise InvalidArgument(f"field name {name!r} is taken, or no public identifier")
            if access not in ("ro", "rw"):
                raise InvalidArgument(f"access of {name} is {access!r}; it must be 'ro' or 'rw'")
            size = _size_of(name, kind)
            made[name] = Field(name, kind, offset, size, access == "rw")
            offset += size
        self._fields = made
        self._size = offset

    @property
    def size(self) -> int:
        """Bytes of the whole space."""
        return self._size

    def names(self) -> list[str]:
        """The names in order."""
        return list(self._fields)

    def overlapping(self, offset: int, length: int) -> list[Field]:
        """The fields that share a byte with the range; none for an empty range."""
        if length <= 0:
            return []
        return [each for each in self if each.offset < offset + length and offset < each.offset + each.size]

    def __getitem__(self, name: str) -> Field:
        if name not in self._fields:
            raise InvalidArgument(f"no field {name!r}; fields: {', '.join(self._fields) or 'none'}")
        return self._fields[name]

    def __contains__(self, name: object) -> bool:
        return name in self._fields

    def __iter__(self) -> Iterator[Field]:
        return iter(self._fields.values())

    def __len__(self) -> int:
        return len(self._fields)

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, ConfigLayout) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        access = {True: ", 'rw'", False: ""}
        parts = (f"({each.name!r}, {each.type!r}{access[each.driver_writable]})" for each in self)
        return f"ConfigLayout({', '.join(parts)})"


class ConfigSpace:
    """The bytes of one configuration space, seen as bytes by the driver and as fields by the device.

    Args:
        layout: what the bytes mean.
        values: first values by field name; fields not named start at 0.

    Fields are read and set as ``space.actual`` or ``space["actual"]``; a field that has the name of a method is
    reached by the latter only. `on_change` is called once after the device changed a value, `on_driver_write`
    with the names of the writable fields that a driver's write touched; both after the bytes have changed.

    Raises:
        InvalidArgument: no such field, or a value that it cannot hold.
    """

    __slots__ = ("_data", "_generation", "_ignored", "_layout", "_seen", "on_change", "on_driver_write")

    on_change: Callable[[], object] | None
    on_driver_write: Callable[[tuple[str, ...]], object] | None

    def __init__(self, layout: ConfigLayout, /, **values: int | bytes) -> None:
        self._layout = layout
        self._data = bytearray(layout.size)
        self._generation = 0
        self._seen = False
        self._ignored = Counter[str]()
        self.on_change = None
        self.on_driver_write = None
        self._store(values)

    @property
    def layout(self) -> ConfigLayout:
        """What the bytes mean."""
        return self._layout

    @property
    def size(self) -> int:
        """Bytes of the space."""
        return self._layout.size

    @property
    def generation(self) -> int:
        """The generation as 32 bits (MMIO)."""
        return self._generation & 0xFFFF_FFFF

    @property
    def generation_u8(self) -> int:
        """The generation as 8 bits (PCI)."""
        return self._generation & 0xFF

    @property
    def ignored(self) -> dict[str, int]:
        """How many driver writes touched which read-only field, without effect."""
        return dict(self._ignored)

    def read(self, offset: int, length: int) -> bytes:
        """The driver reads `length` bytes at `offset`.

        Raises:
            StatusViolation: `ConfigOutOfRange` (2.5), the range is not within the space.
        """
        self._check_range("read", offset, length)
        self._seen = True
        return bytes(self._data[offset : offset + length])

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """The driver writes `data` at `offset`; bytes of read-only fields are ignored and counted.

        Raises:
            StatusViolation: `ConfigOutOfRange` (2.5), the range is not within the space; nothing was written.
        """
        data = bytes(data)
        self._check_range("write", offset, len(data))
        written: list[str] = []
        for field in self._layout.overlapping(offset, len(data)):
            if not field.driver_writable:
                self._ignored[field.name] += 1
                continue
            start, end = max(offset, field.offset), min(offset + len(data), field.offset + field.size)
            self._data[start:end] = data[start - offset : end - offset]
            written.append(field.name)
        if written and self.on_driver_write is not None:
            self.on_driver_write(tuple(written))

    def update(self, **values: int | bytes) -> bool:
        """The device changes several fields as one change.

        Returns:
            Whether any value is now different: then the generation moved on and `on_change` was called.

        Raises:
            InvalidArgument: no such field, or a value that it cannot hold; nothing was changed.
        """
        if not self._store(values):
            return False
        self._grow()
        if self.on_change is not None:
            self.on_change()
        return True

    def save(self) -> dict[str, object]:
        """The state as JSON values; bytes fields as hexadecimal text."""
        values = {name: _to_json(self[name]) for name in self._layout.names()}
        return {"version": _STATE_VERSION, "generation": self.generation, "values": values}

    def restore(self, state: object) -> None:
        """Take over what `save` gave, without calling `on_change`.

        The generation becomes different from both the present one and the saved one, in 8 bits as well, because a
        driver may have seen either.

        Raises:
            SavedStateError: the state is malformed or of another layout; nothing was changed.
        """
        generation, values = _checked_state(state, self._layout)
        seen = {generation & 0xFF, self.generation_u8}
        self._generation = next(
            each for each in range(max(generation, self.generation) + 1, 1 << 33) if each & 0xFF not in seen
        )
        self._seen = False
        self._store(values)

    def _check_range(self, verb: str, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size:
            message = f"{verb} of {length} bytes at offset {offset}, the configuration space has {self.size}"
            raise StatusViolation("ConfigOutOfRange", "2.5", message)

    def _store(self, values: Mapping[str, int | bytes]) -> bool:
        fields = [(self._layout[name], self._layout[name].encode(value)) for name, value in values.items()]
        before = bytes(self._data)
        for field, data in fields:
            self._data[field.offset : field.offset + field.size] = data
        return bytes(self._data) != before

    def _grow(self) -> None:
        if self._seen:
            self._generation += 1
            self._seen = False

    def __getitem__(self, name: str) -> Any:  # int or bytes, as the layout says; a union helps nobody
        field = self._layout[name]
        return field.decode(bytes(self._data[field.offset : field.offset + field.size]))

    def __setitem__(self, name: str, value: int | bytes) -> None:
        self.update(**{name: value})

    def __getattr__(self, name: str) -> Any:
        # Asked only for what is no attribute. Private names first: while unpickling there is no layout yet.
        if name.startswith("_") or name not in self._layout:
            raise AttributeError(f"no attribute or configuration field {name!r}")
        return self[name]

    def __setattr__(self, name: str, value: object) -> None:
        if hasattr(type(self), name):
            object.__setattr__(self, name, value)
        elif name in self._layout:
            self[name] = cast("int | bytes", value)
        else:
            raise AttributeError(f"no attribute or configuration field {name!r}")

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *self._layout.names()]

    def __eq__(self, other: object) -> bool:
        """Equal layout and equal bytes; generation, counters and hooks do not matter."""
        if not isinstance(other, ConfigSpace):
            return NotImplemented
        return self._layout == other._layout and self._data == other._data

    __hash__ = None  # type: ignore[assignment] - it changes

    def __repr__(self) -> str:
        values = "".join(f", {name}={self[name]!r}" for name in self._layout.names())
        return f"ConfigSpace({self._layout!r}{values})"


def _size_of(name: str, kind: str) -> int:
    if kind in _INTEGERS:
        return _INTEGERS[kind]
    count = kind.removeprefix("bytes(").removesuffix(")")
    if kind == f"bytes({count})" and count.isascii() and count.isdecimal() and len(count) <= 5:
        size = int(count)
        if 0 < size <= _MAX_BYTES_FIELD and str(size) == count:
            return size
    known = ", ".join(_INTEGERS)
    raise InvalidArgument(f"type of {name} is {kind!r}; known: {known}, bytes(n) with n from 1 to {_MAX_BYTES_FIELD}")


def _to_json(value: int | bytes) -> int | str:
    return value.hex() if isinstance(value, bytes) else value


def _checked_state(state: object, layout: ConfigLayout) -> tuple[int, dict[str, int | bytes]]:
    """Generation and values of a saved state, everything checked."""
    if not isinstance(state, Mapping) or set(cast("Mapping[object, object]", state)) != _STATE_KEYS:
        raise SavedStateError(f"saved configuration space: it must be a mapping with {sorted(_STATE_KEYS)}")
    parts = cast("Mapping[str, object]", state)
    version, generation, saved = parts["version"], parts["generation"], parts["values"]
    if version != _STATE_VERSION or isinstance(version, bool):
        raise SavedStateError(f"saved configuration space: version {shown(version)}, this is version {_STATE_VERSION}")
    if not isinstance(generation, int) or isinstance(generation, bool) or not 0 <= generation < 1 << 32:
        raise SavedStateError(f"saved configuration space: generation {shown(generation)} is not a 32-bit number")
    if not isinstance(saved, Mapping) or set(cast("Mapping[object, object]", saved)) != set(layout.names()):
        raise SavedStateError(f"saved configuration space: the fields must be {layout.names()}")
    values: dict[str, int | bytes] = {}
    for name, value in cast("Mapping[str, object]", saved).items():
        field = layout[name]
        try:
            plain = bytes.fromhex(value) if isinstance(value, str) and not field.is_integer else value
            values[name] = field.decode(field.encode(plain))
        except ValueError as error:
            raise SavedStateError(f"saved configuration space: {name}: {error}") from None
    return generation, values
