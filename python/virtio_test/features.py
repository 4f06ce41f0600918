"""Feature bits as an immutable set, and the rules by which both ends negotiate them (VIRTIO 1.4, 2.2 and 6).

Theory
------
The device offers a set, the driver accepts a subset, FEATURES_OK seals it. A `FeatureSet` is up to 128 bits
that know their names: those of the specification's chapter 6 everywhere, and those of a device class through
a mapping such as ``{"CAN_PRINT": 0}``. A bit without a name is shown as ``BIT_57``.

Who is judged decides what is raised. `judge_offered` and `judge_accepted` return the first broken rule as a
`StatusViolation`, whoever broke it; `check_accepted` (a device looks at its driver) and `negotiate` (a driver
looks at its device) raise it; `check_own_offer` turns the same finding about ourselves into `InvalidArgument`.

Requirements between features (2.2.1) come from the table in `spec.features` for the transport's bits, and from
`requires` for a device class: ``{"GUEST_ECN": ("GUEST_TSO4|GUEST_TSO6",)}`` reads "GUEST_ECN needs one of the two".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from .errors import InvalidArgument, StatusViolation
from .spec.features import DEVICE_TYPE_RANGES, FEATURE_BITS, FEATURE_BY_BIT, FEATURE_BY_NAME, FEATURES

__all__ = [
    "FeatureSet",
    "Requirements",
    "check_accepted",
    "check_own_offer",
    "judge_accepted",
    "judge_offered",
    "negotiate",
]

Requirements = Mapping[str, Sequence[str]]
"""Feature name to what it needs; each need is a name, or names joined by ``|`` of which one suffices."""

_NO_NAMES: Final[Mapping[str, int]] = MappingProxyType({})
_NO_REQUIREMENTS: Final[Requirements] = MappingProxyType({})
_WORD: Final = 32


class FeatureSet:
    """An immutable set of feature bits 0 to 127.

    It compares by its bits, iterates over names from the lowest bit up, and has the operators of a set.

    Args:
        features: names (``"RING_PACKED"``, ``"VIRTIO_F_RING_PACKED"``, ``"BIT_57"``; any case) or bit numbers.
        device: names of the device class's own bits, which lie in 0 to 23, 42 and 50 to 127 (2.2).

    Raises:
        InvalidArgument: unknown name, bit out of range, or a device name that contradicts the specification's.
    """

    __slots__ = ("_bits", "_by_bit", "_device")

    def __init__(self, *features: str | int, device: Mapping[str, int] = _NO_NAMES) -> None:
        self._device, self._by_bit = _checked_names(device)
        bits = 0
        for each in features:
            bits |= 1 << (self._bit_of_name(each) if isinstance(each, str) else _checked_bit(each))
        self._bits = bits

    @classmethod
    def from_bits(cls, bits: int, *, device: Mapping[str, int] = _NO_NAMES) -> FeatureSet:
        """The set whose bit n is bit n of `bits`, as registers and messages carry it.

        Raises:
            InvalidArgument: `bits` is negative or has a bit at 128 or above.
        """
        if bits < 0 or bits >> FEATURE_BITS:
            raise InvalidArgument(f"feature bits {bits:#x} do not fit into {FEATURE_BITS} bits")
        made = cls(device=device)
        made._bits = bits
        return made

    @classmethod
    def parse(cls, text: str, *, base: FeatureSet) -> FeatureSet:
        """Change `base` as a command line says: ``"+RING_PACKED,-EVENT_IDX"``.

        Args:
            text: names with a sign, separated by commas; spaces around them do not matter.
            base: the set to change; its device names are known too.

        Raises:
            InvalidArgument: a name without a sign, unknown, or both added and removed. One line.
        """
        added = removed = 0
        for token in text.split(","):
            item = token.strip()
            if not item:
                raise InvalidArgument(f"empty feature name in {text!r}; write +NAME or -NAME, separated by commas")
            sign, name = item[0], item[1:].strip()
            if sign not in "+-" or not name:
                raise InvalidArgument(f"feature {item!r} has no sign or no name; write +NAME to offer it, -NAME not to")
            bit = 1 << base._bit_of_name(name)
            if sign == "+":
                added |= bit
            else:
                removed |= bit
        if both := added & removed:
            raise InvalidArgument(f"feature {base._with_bits(both)} is both added and removed in {text!r}")
        return base._with_bits((base._bits | added) & ~removed)

    @property
    def bits(self) -> int:
        """All bits as one number."""
        return self._bits

    @property
    def device(self) -> Mapping[str, int]:
        """Names of the device class's own bits."""
        return self._device

    def known(self) -> list[str]:
        """Every name that this set understands, from the lowest bit up."""
        every = {**{each.bit: each.name for each in FEATURES}, **self._by_bit}
        return [every[bit] for bit in sorted(every)]

    def word(self, select: int) -> int:
        """The 32 bits that a register shows under `select`; 0 beyond the last (robustness catalogue, D14)."""
        return (self._bits >> (select * _WORD)) & 0xFFFF_FFFF if 0 <= select < FEATURE_BITS // _WORD else 0

    def with_word(self, select: int, value: int) -> FeatureSet:
        """This set after the register under `select` was written; unchanged for a word beyond the last (D14)."""
        if not 0 <= select < FEATURE_BITS // _WORD:
            return self
        shift = select * _WORD
        return self._with_bits(self._bits & ~(0xFFFF_FFFF << shift) | (value & 0xFFFF_FFFF) << shift)

    def undefined(self) -> FeatureSet:
        """The part without a name: neither in the specification's chapter 6 nor of the device class."""
        return self._with_bits(sum(1 << bit for bit in self.bit_numbers() if not self._named(bit)))

    def bit_numbers(self) -> list[int]:
        """The bit numbers, lowest first."""
        return [bit for bit in range(self._bits.bit_length()) if self._bits >> bit & 1]

    def isdisjoint(self, other: FeatureSet) -> bool:
        """Whether no bit is in both."""
        return not self._bits & other._bits

    def __iter__(self) -> Iterator[str]:
        return (self._name_of_bit(bit) for bit in self.bit_numbers())

    def __len__(self) -> int:
        return self._bits.bit_count()

    def __bool__(self) -> bool:
        return self._bits != 0

    def __contains__(self, feature: str | int) -> bool:
        """Whether a name or bit is in the set; a name that nobody knows is a mistake and raises."""
        bit = self._bit_of_name(feature) if isinstance(feature, str) else _checked_bit(feature)
        return bool(self._bits >> bit & 1)

    def __int__(self) -> int:
        return self._bits

    def __or__(self, other: FeatureSet) -> FeatureSet:
        return NotImplemented if _is_no_set(other) else self._combined(other, self._bits | other._bits)

    def __and__(self, other: FeatureSet) -> FeatureSet:
        return NotImplemented if _is_no_set(other) else self._combined(other, self._bits & other._bits)

    def __sub__(self, other: FeatureSet) -> FeatureSet:
        return NotImplemented if _is_no_set(other) else self._combined(other, self._bits & ~other._bits)

    def __xor__(self, other: FeatureSet) -> FeatureSet:
        return NotImplemented if _is_no_set(other) else self._combined(other, self._bits ^ other._bits)

    def __le__(self, other: FeatureSet) -> bool:
        return NotImplemented if _is_no_set(other) else not self._bits & ~other._bits

    def __lt__(self, other: FeatureSet) -> bool:
        return NotImplemented if _is_no_set(other) else self <= other and self._bits != other._bits

    def __ge__(self, other: FeatureSet) -> bool:
        return NotImplemented if _is_no_set(other) else other <= self

    def __gt__(self, other: FeatureSet) -> bool:
        return NotImplemented if _is_no_set(other) else other < self

    def __eq__(self, other: object) -> bool:
        return self._bits == other._bits if isinstance(other, FeatureSet) else NotImplemented

    def __hash__(self) -> int:
        return hash((FeatureSet, self._bits))

    def __str__(self) -> str:
        return ", ".join(self) or "none"

    def __repr__(self) -> str:
        parts = [repr(name) for name in self]
        if self._device:
            parts.append(f"device={dict(self._device)!r}")
        return f"FeatureSet({', '.join(parts)})"

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self._bits, dict(self._device))

    def _named(self, bit: int) -> bool:
        return bit in FEATURE_BY_BIT or bit in self._by_bit

    def _name_of_bit(self, bit: int) -> str:
        if bit in FEATURE_BY_BIT:
            return FEATURE_BY_BIT[bit].name
        return self._by_bit.get(bit) or f"BIT_{bit}"

    def _bit_of_name(self, name: str) -> int:
        plain = name.upper().removeprefix("VIRTIO_F_")
        if plain in FEATURE_BY_NAME:
            return FEATURE_BY_NAME[plain].bit
        if plain in self._device:
            return self._device[plain]
        number = plain.removeprefix("BIT_")
        if number != plain and number.isascii() and number.isdecimal():
            return _checked_bit(int(number) if len(number) <= 4 else FEATURE_BITS)
        raise InvalidArgument(f"unknown feature {name!r}; known: {', '.join(self.known())}, or BIT_0 to BIT_127")

    def _with_bits(self, bits: int) -> FeatureSet:
        made = object.__new__(FeatureSet)
        made._bits, made._device, made._by_bit = bits, self._device, self._by_bit
        return made

    def _combined(self, other: FeatureSet, bits: int) -> FeatureSet:
        if not other._device or other._device == self._device:
            return self._with_bits(bits)
        return FeatureSet.from_bits(bits, device=_merged(self._device, other._device))


def judge_offered(
    offered: FeatureSet, *, requires: Requirements = _NO_REQUIREMENTS, transport: str | None = None
) -> StatusViolation | None:
    """The first rule that an offer breaks, or None.

    Args:
        offered: what the device offers.
        requires: requirements between features of the device class.
        transport: ``"pci"``, ``"mmio"``, …; None judges no restriction to a transport.

    Returns:
        `Version1NotOffered` (6.2), `UndefinedOffered` (2.2.2), `TransportNotSupported` (2.2.2),
        `RequirementNotOffered` (2.2.2) or None.
    """
    if "VERSION_1" not in offered:
        return StatusViolation("Version1NotOffered", "6.2", f"the device offers no VERSION_1, only: {offered}")
    if undefined := offered.undefined():
        return StatusViolation("UndefinedOffered", "2.2.2", f"offered without being defined: {undefined}")
    if foreign := _foreign(offered, transport):
        return StatusViolation("TransportNotSupported", "2.2.2", f"{foreign} is not for the transport {transport}")
    for name, need in _unmet(offered, requires):
        return StatusViolation("RequirementNotOffered", "2.2.2", f"{name} is offered without {need}, which it requires")
    return None


def judge_accepted(
    offered: FeatureSet,
    accepted: FeatureSet,
    *,
    requires: Requirements = _NO_REQUIREMENTS,
    transport: str | None = None,
    legacy: bool = False,
) -> StatusViolation | None:
    """The first rule that a driver's acceptance breaks, or None: then FEATURES_OK may stand.

    Args:
        offered: what the device offers.
        accepted: what the driver wrote.
        requires: requirements between features of the device class.
        transport: ``"pci"``, ``"mmio"``, …; None judges no restriction to a transport.
        legacy: accept a driver that leaves VERSION_1 out.

    Returns:
        `FeatureNotOffered` (2.2.1), `Version1NotAccepted` (6.1), `TransportNotSupported` (2.2.1),
        `RequirementNotAccepted` (2.2.1) or None.
    """
    if extra := accepted - offered:
        return StatusViolation("FeatureNotOffered", "2.2.1", f"accepted without being offered: {extra}")
    if not legacy and "VERSION_1" in offered and "VERSION_1" not in accepted:
        return StatusViolation("Version1NotAccepted", "6.1", "VERSION_1 is offered and not accepted")
    if foreign := _foreign(accepted, transport):
        return StatusViolation("TransportNotSupported", "2.2.1", f"{foreign} is not for the transport {transport}")
    for name, need in _unmet(accepted, requires):
        message = f"{name} is accepted without {need}, which it requires"
        return StatusViolation("RequirementNotAccepted", "2.2.1", message)
    return None


def check_accepted(
    offered: FeatureSet,
    accepted: FeatureSet,
    *,
    requires: Requirements = _NO_REQUIREMENTS,
    transport: str | None = None,
    legacy: bool = False,
) -> None:
    """Raise what `judge_accepted` finds.

    Raises:
        StatusViolation: the driver's acceptance breaks a rule; a device then leaves FEATURES_OK clear (2.2.2).
    """
    found = judge_accepted(offered, accepted, requires=requires, transport=transport, legacy=legacy)
    if found is not None:
        raise found


def check_own_offer(
    offered: FeatureSet, *, requires: Requirements = _NO_REQUIREMENTS, transport: str | None = None
) -> None:
    """Refuse to build a device whose own offer breaks a rule.

    Raises:
        InvalidArgument: with the text of what `judge_offered` finds.
    """
    found = judge_offered(offered, requires=requires, transport=transport)
    if found is not None:
        raise InvalidArgument(f"impossible offer: {found}")


def negotiate(
    offered: FeatureSet,
    wanted: FeatureSet,
    required: FeatureSet | None = None,
    *,
    requires: Requirements = _NO_REQUIREMENTS,
    transport: str | None = None,
    legacy: bool = False,
) -> FeatureSet:
    """What a driver accepts of an offer (2.2.1).

    That is what is offered and wanted, without undefined and foreign bits, those of the other interface and features
    whose requirements are not met; VERSION_1 always. Unknown bits in the offer are no reason to fail.

    Args:
        offered: what the device offers.
        wanted: what the driver can use; bits that are not defined are never accepted.
        required: what the driver cannot do without, wanted by itself.
        requires: requirements between features of the device class.
        transport: ``"pci"``, ``"mmio"``, …; None restricts nothing.
        legacy: through a legacy interface, which has 32 bits and so no VERSION_1.

    Raises:
        StatusViolation: `Version1NotOffered` (6.2), or `RequiredFeatureMissing` (2.2.1): the driver then sets
            FAILED and stops.
    """
    if "VERSION_1" not in offered and not legacy:
        raise StatusViolation("Version1NotOffered", "6.2", f"the device offers no VERSION_1, only: {offered}")
    needed = FeatureSet() if required is None else required
    needed = needed - FeatureSet("VERSION_1") if legacy else needed | FeatureSet("VERSION_1")
    able = offered & (wanted | needed)
    able -= able.undefined() | _foreign(able, transport)
    if not legacy:
        able -= _LEGACY
    # Dropping one feature may leave another without what it requires, so this goes on until nothing changes.
    while unmet := [name for name, _ in _unmet(able, requires)]:
        able -= FeatureSet(*unmet, device=able.device)
    if missing := needed - able:
        hint = "not offered" if missing.isdisjoint(offered) else "not offered in a form that can be accepted"
        raise StatusViolation("RequiredFeatureMissing", "2.2.1", f"the driver cannot do without {missing}: {hint}")
    return able


def _is_no_set(other: object) -> bool:
    """Whether an operator of sets has nothing to say about it: Python then makes the TypeError."""
    return not isinstance(other, FeatureSet)


def _rebuild(bits: int, device: dict[str, int]) -> FeatureSet:
    return FeatureSet.from_bits(bits, device=device)


def _checked_bit(bit: int) -> int:
    if not 0 <= bit < FEATURE_BITS:
        raise InvalidArgument(f"feature bit {bit} is out of range; bits are 0 to {FEATURE_BITS - 1}")
    return bit


def _checked_names(device: Mapping[str, int]) -> tuple[Mapping[str, int], Mapping[int, str]]:
    by_bit: dict[int, str] = {}
    for name, bit in device.items():
        if not name.isidentifier() or name != name.upper() or name.startswith(("BIT_", "VIRTIO_F_")):
            raise InvalidArgument(f"device feature name {name!r} must be an upper-case identifier without a prefix")
        if name in FEATURE_BY_NAME or not any(bit in each for each in DEVICE_TYPE_RANGES):
            raise InvalidArgument(f"device feature {name} at bit {bit}: name or bit belongs to the specification")
        if bit in by_bit:
            raise InvalidArgument(f"device features {by_bit[bit]} and {name} share bit {bit}")
        by_bit[bit] = name
    return MappingProxyType(dict(device)), MappingProxyType(by_bit)


def _merged(one: Mapping[str, int], other: Mapping[str, int]) -> Mapping[str, int]:
    clash = [name for name in one.keys() & other.keys() if one[name] != other[name]]
    if clash:
        raise InvalidArgument(f"the two sets are of different device classes: {min(clash)} names two bits")
    return {**one, **other}


def _foreign(features: FeatureSet, transport: str | None) -> FeatureSet:
    """The part that another transport alone may offer."""
    if transport is None:
        return FeatureSet()
    names = [each.name for each in FEATURES if each.transports and transport not in each.transports]
    return features & FeatureSet(*names)


def _unmet(features: FeatureSet, requires: Requirements) -> Iterable[tuple[str, str]]:
    """Pairs of (feature in the set, requirement that is not in it)."""
    present = set(features)
    for name in features:
        own = FEATURE_BY_NAME[name].requires if name in FEATURE_BY_NAME else requires.get(name, ())
        for need in own:
            if present.isdisjoint(need.split("|")):
                yield name, need.replace("|", " or ")


_LEGACY: Final = FeatureSet(*(each.name for each in FEATURES if each.legacy))
