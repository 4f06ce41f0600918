"""Saved state: what a `RegisterBank` is at one moment, as JSON values, and the way back.

Theory
------
Guest memory is not part of a state, and neither is the driver: both go on where they are. So nothing may be in flight
in the device: saving parks and drains each queue first, and what the device has not answered lies in its ring again.
What it cannot put back, because a later request was answered before, ends as in any queue that stops (`BaseDevice`);
of a device that is held, and may answer nothing, no state is saved then (`StateError`).
What was marked and not yet told is told once more after the restore, since nobody knows whether it was.

**A state comes from somewhere else.** `check` judges all of it, and the queues in guest memory too, before anything is
changed: sizes, positions, addresses (R01 to R03, R09 of the robustness catalogue), lists without a queue twice or too
many (R04), features that are on offer (R08), a status that a device can have. The device judges its own part last
(R06, R07), and nothing after that can fail. What is wrong raises `SavedStateError`; it is not the driver that broke a
rule.

A transport adds its own registers: `fields`, `number`, `numbers` and `data` judge the shapes of those.

**Format** (version 2): ``version``; ``status``; ``features``, as bits; ``interface``, null before the first write;
``config_due``, whether a configuration change is still to be told; ``queues``, those that the driver has written to:
index, size, three addresses, enabled, and the positions ``avail`` and ``used`` as in `QueueState`, null where there is
no queue yet; ``device``, the device's own state.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, cast

from virtio_test._core import QueueState
from virtio_test.console import shown
from virtio_test.device import Device
from virtio_test.errors import InvalidArgument, PeerError, SavedStateError
from virtio_test.features import FEATURE_BITS, FeatureSet, judge_accepted
from virtio_test.status import DeviceStatus, Status

from .bank import TRANSPORT_FEATURES, RegisterBank
from .slot import QueueSlot

__all__ = ["STATE_VERSION", "Checked", "check", "data", "fields", "number", "numbers", "restore", "save", "version"]

STATE_VERSION: Final = 2

_FIELDS: Final = ("version", "status", "features", "interface", "config_due", "queues", "device")
_QUEUE_FIELDS: Final = ("index", "size", "desc", "driver", "device", "enabled", "avail", "used")
_DEPTH: Final = 32
"""How deep lists and objects of a state may lie in each other; ours have six levels."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A state that fits its bank, with the queues made of it."""

    device: Device
    status: int
    features: FeatureSet
    interface: Literal["modern", "legacy"] | None
    slots: list[QueueSlot]
    own: Mapping[str, object]
    config_due: bool


def save(bank: RegisterBank) -> dict[str, object]:
    """The state of `bank` and its device; everything goes on afterwards.

    Raises:
        StateError: the device is held, and requests in flight can neither be answered nor go back into their rings.
    """
    queues = [_saved_queue(slot, position) for slot, position in bank.park()]
    return {
        "version": STATE_VERSION,
        "status": bank.status.save(),
        "features": bank.accepted.bits,
        "interface": bank.interface,
        "config_due": bank.config_due,
        "queues": [each for each in queues if each is not None],
        "device": bank.device.save(),
    }


def restore(bank: RegisterBank, checked: Checked) -> None:
    """Take over what `check` gave.

    Raises:
        SavedStateError: the device refuses its own part; nothing was changed.
    """
    bank.adopt(
        checked.device,
        status=checked.status,
        features=checked.features,
        interface=checked.interface,
        slots=checked.slots,
        own=checked.own,
        config_due=checked.config_due,
    )


def check(bank: RegisterBank, state: object, device: Device, *, interfaces: Collection[str] = ("modern",)) -> Checked:
    """Judge a state for `bank` with `device` behind it; nothing is changed.

    Args:
        bank: who would take it over.
        state: what `save` gave, or anything else.
        device: the device from then on; it has to do all that the bank offers.
        interfaces: those that the transport has: ``modern``, ``legacy``.

    Raises:
        SavedStateError: it is malformed or does not fit.
    """
    parts = fields(state, "state", _FIELDS)
    version(parts["version"], STATE_VERSION)
    DeviceStatus().restore(parts["status"])
    status = cast("int", parts["status"])
    interface = parts["interface"]
    if interface is not None and interface not in interfaces:
        raise SavedStateError(f"the saved interface is {shown(interface)}, here is {' and '.join(interfaces)}")
    if extra := bank.offered - device.features - TRANSPORT_FEATURES:
        raise SavedStateError(f"{extra} is offered here, and the device cannot do it")
    features = _features(bank, parts["features"], status, device, legacy=interface == "legacy")
    if not isinstance(parts["config_due"], bool):
        raise SavedStateError(f"the saved config_due is {shown(parts['config_due'])}, not true or false")
    if not isinstance(parts["device"], dict) or not isinstance(parts["queues"], list):
        raise SavedStateError("the saved state has no device, or no list of queues")
    own = cast("dict[str, object]", parts["device"])
    _plain(own, _DEPTH)
    slots = [QueueSlot(index, size, size) for index, size in enumerate(device.queue_sizes)]
    seen: set[int] = set()
    for each in cast("list[object]", parts["queues"]):
        slot = _slot(bank, each, slots, features, status)
        if slot.index in seen:
            raise SavedStateError(f"the saved state has the queue {slot.index} twice")
        seen.add(slot.index)
        slots[slot.index] = slot
    return Checked(device, status, features, interface, slots, own, parts["config_due"])


# --- the shapes of values, for transports too ---------------------------------------------------------------------


def fields(value: object, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    """`value` as an object with exactly these fields.

    Raises:
        SavedStateError: it is none.
    """
    if not isinstance(value, dict) or set(cast("dict[object, object]", value)) != set(names):
        raise SavedStateError(f"a saved {what} is an object with the fields {', '.join(names)}")
    return cast("dict[str, Any]", value)


def version(value: object, own: int) -> None:
    """Refuse a state of another version than our `own`.

    Raises:
        SavedStateError: it is of one.
    """
    if isinstance(value, bool) or value != own:
        raise SavedStateError(f"the saved state has version {shown(value)}, this is version {own}")


def number(value: object, what: str, limit: int) -> int:
    """`value` as a number from 0 to `limit`.

    Raises:
        SavedStateError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
        raise SavedStateError(f"the saved {what} is {shown(value)}, not a number from 0 to {limit:#x}")
    return value


def numbers(value: object, what: str, limit: int, *, count: int | None = None) -> list[int]:
    """`value` as a list of numbers from 0 to `limit`; of exactly `count`, unless that is None.

    Raises:
        SavedStateError: it is none.
    """
    given = cast("list[object]", value) if isinstance(value, list) else None
    if given is None or (count is not None and len(given) != count):
        of = "" if count is None else f" of {count}"
        raise SavedStateError(f"the saved {what} are {shown(given)}, not a list{of}")
    return [number(each, what, limit) for each in given]


def data(value: object, what: str, length: int) -> bytes:
    """`value` as exactly `length` bytes, from hexadecimal text.

    Raises:
        SavedStateError: it is none.
    """
    if isinstance(value, str) and len(value) == 2 * length:
        try:
            found = bytes.fromhex(value)
        except ValueError:
            found = b""
        if len(found) == length:
            return found
    raise SavedStateError(f"the saved {what} is {shown(value)}, not {length} bytes as hexadecimal text")


# --- the parts -----------------------------------------------------------------------------------------------------


def _saved_queue(slot: QueueSlot, position: QueueState | None) -> dict[str, object] | None:
    if slot == QueueSlot(slot.index, slot.max_size, slot.max_size):
        return None
    avail, used = (None, None) if position is None else (position.avail, position.used)
    values = (slot.index, slot.size, slot.desc, slot.driver, slot.device, slot.enabled, avail, used)
    return dict(zip(_QUEUE_FIELDS, values, strict=True))


def _features(bank: RegisterBank, bits: object, status: int, device: Device, *, legacy: bool) -> FeatureSet:
    value = number(bits, "features", (1 << FEATURE_BITS) - 1)
    features = FeatureSet.from_bits(value, device=bank.offered.device)
    if legacy:
        beyond = value & ~bank.legacy_features()
        if beyond and status & Status.FEATURES_OK:
            raise SavedStateError(f"the saved features do not fit: the legacy interface does not offer {beyond:#x}")
    elif status & Status.FEATURES_OK:
        problem = judge_accepted(bank.offered, features, requires=device.requires, transport=bank.kind)
        if problem is not None:
            raise SavedStateError(f"the saved features do not fit: {problem}")
    if status & Status.SUSPEND and "SUSPEND" not in features:
        raise SavedStateError("the saved device is suspended, and SUSPEND was not negotiated")
    return features


def _slot(bank: RegisterBank, saved: object, fresh: list[QueueSlot], features: FeatureSet, status: int) -> QueueSlot:
    parts = fields(saved, "queue", _QUEUE_FIELDS)
    index = number(parts["index"], "queue's index", len(fresh) - 1)
    size = number(parts["size"], f"size of queue {index}", fresh[index].max_size)
    if size == 0 or ("RING_PACKED" not in features and size & (size - 1)):
        raise SavedStateError(f"the saved size of queue {index} is {size}, which no queue of this format has")
    desc, driver, area = (
        number(parts[name], f"{name} of queue {index}", (1 << 64) - 1) for name in ("desc", "driver", "device")
    )
    enabled = parts["enabled"]
    if not isinstance(enabled, bool):
        raise SavedStateError(f"the saved queue {index} is enabled: {shown(enabled)}, not true or false")
    slot = QueueSlot(index, fresh[index].max_size, size, desc, driver, area, enabled=enabled)
    if parts["avail"] is None and parts["used"] is None:
        if enabled and status & (Status.DRIVER_OK | Status.SUSPEND) and not status & Status.DEVICE_NEEDS_RESET:
            raise SavedStateError(f"the saved queue {index} runs, and has no position")
        return slot
    avail, used = (number(parts[name], f"{name} of queue {index}", 0xFFFF) for name in ("avail", "used"))
    if not enabled or not status & Status.FEATURES_OK:
        raise SavedStateError(f"the saved queue {index} has a position, and is not enabled")
    try:
        slot.queue = bank.make_queue(slot, features, QueueState(avail, used))
    except (PeerError, InvalidArgument) as error:
        raise SavedStateError(f"the saved queue {index} does not fit: {error}") from error
    return slot


def _plain(value: object, depth: int) -> None:
    """Refuse what is no JSON value, so that a device finds text as the names of its fields."""
    if depth == 0:
        raise SavedStateError(f"the saved state of the device lies deeper than {_DEPTH} levels")
    if isinstance(value, dict):
        for key, each in cast("dict[object, object]", value).items():
            if not isinstance(key, str):
                raise SavedStateError(f"a field of the saved device is called {shown(key)}, which is no text")
            _plain(each, depth - 1)
    elif isinstance(value, list):
        for each in cast("list[object]", value):
            _plain(each, depth - 1)
    elif value is not None and not isinstance(value, str | int | float):
        raise SavedStateError(f"the saved state of the device has {shown(value)}, which is no JSON value")
