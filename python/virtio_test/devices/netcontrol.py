"""The control queue of the network device (VIRTIO 1.4, 5.1.9.5): commands, judged whole before one is obeyed.

Every command is answered: OK, or ERR for what is malformed, unknown or not negotiated, and then nothing has changed.
What breaks a rule is kept in the device's `findings` as `CommandMalformed`; a buffer without room for the byte `ack` is
too, and gets no answer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Final, Protocol, cast

from virtio_test._core import Chain
from virtio_test.errors import RequestViolation, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.net import (
    ANNOUNCE_ACK,
    CONTROL_ERR,
    CONTROL_OK,
    MAC_ADDR_SET,
    MAC_TABLE_SET,
    MQ_VQ_PAIRS_SET,
    RX_ALLMULTI,
    RX_EXTRA,
    RX_PROMISC,
    VLAN_ADD,
    VLAN_DEL,
    VLAN_IDS,
    ControlClass,
    LinkStatus,
)

__all__ = ["MAX_TABLE", "Control"]

MAX_TABLE: Final = 1024
"""Addresses of one kind that the table holds."""

_MAC: Final = 6
_COUNT: Final = 4
_LONGEST: Final = 2 + 2 * (_COUNT + _MAC * MAX_TABLE)
"""Bytes of the longest command that can be obeyed."""

_RX_MODES: Final = (RX_PROMISC, RX_ALLMULTI, *RX_EXTRA)


class Owner(Protocol):
    """What the commands change of the device."""

    @property
    def negotiated(self) -> FeatureSet:
        """The negotiated features."""
        ...

    @property
    def known_pairs(self) -> int:
        """Pairs of queues that the driver may use."""
        ...

    def quietly(self, **values: int | bytes) -> None:
        """Change configuration fields and tell nobody."""
        ...

    def note(self, violation: RequestViolation) -> None:
        """Keep what the driver did wrong."""
        ...

    def changed(self) -> None:
        """Link, pairs in use or address may be others now."""
        ...

    @property
    def link_up(self) -> bool:
        """Whether there is a link."""
        ...


class Control:
    """What the commands of a driver have set since the last reset.

    Args:
        device: whose commands they are.
        mac: its address.

    Attributes:
        mac: the address, which the driver may have changed.
        modes: the receive modes that are on, by the number of their command.
        unicast: addresses that the driver wants frames for.
        multicast: group addresses, likewise.
        vlans: VLAN ids, likewise.
        pairs: pairs of queues in use.
    """

    def __init__(self, device: Owner, mac: bytes) -> None:
        self._device = device
        self._first_mac = mac
        self.mac = mac
        self.modes: set[int] = set()
        self.unicast: list[bytes] = []
        self.multicast: list[bytes] = []
        self.vlans: set[int] = set()
        self.pairs = 1

    def __repr__(self) -> str:
        return f"<Control of {self.mac.hex(':')}, modes {sorted(self.modes)}, {self.pairs} pairs>"

    def reset(self) -> None:
        """As before the first command."""
        self.mac = self._first_mac
        self.modes.clear()
        self.unicast, self.multicast = [], []
        self.vlans.clear()
        self.pairs = 1

    def obey(self, chain: Chain) -> int:
        """Do one command and answer it; the bytes used."""
        request = chain.read(_LONGEST + 1)
        done = len(request) <= _LONGEST and len(request) >= 2 and self._do(request[0], request[1], request[2:])
        if not done or not chain.writable:
            room = "" if chain.writable else ", no room for the ack"
            message = f"command {request[:2].hex('.') or 'missing'} of {chain.readable} bytes{room}"
            place = {"queue": chain.queue_index, "head": chain.head}
            self._device.note(RequestViolation("CommandMalformed", "5.1.9.5", message, **place))
        return chain.write(bytes((CONTROL_OK if done else CONTROL_ERR,)))

    def _do(self, kind: int, command: int, data: bytes) -> bool:
        feature, act = self._acts.get((kind, command), ("", None))
        return act is not None and feature in self._device.negotiated and act(command, data)

    @property
    def _acts(self) -> Mapping[tuple[int, int], tuple[str, Callable[[int, bytes], bool]]]:
        return {
            (ControlClass.RX, RX_PROMISC): ("CTRL_RX", self._set_mode),
            (ControlClass.RX, RX_ALLMULTI): ("CTRL_RX", self._set_mode),
            **{(ControlClass.RX, each): ("CTRL_RX_EXTRA", self._set_mode) for each in RX_EXTRA},
            (ControlClass.MAC, MAC_TABLE_SET): ("CTRL_RX", self._set_table),
            (ControlClass.MAC, MAC_ADDR_SET): ("CTRL_MAC_ADDR", self._set_mac),
            (ControlClass.VLAN, VLAN_ADD): ("CTRL_VLAN", self._set_vlan),
            (ControlClass.VLAN, VLAN_DEL): ("CTRL_VLAN", self._set_vlan),
            (ControlClass.ANNOUNCE, ANNOUNCE_ACK): ("GUEST_ANNOUNCE", self._announced),
            (ControlClass.MQ, MQ_VQ_PAIRS_SET): ("MQ", self._set_pairs),
        }

    def _set_mode(self, command: int, data: bytes) -> bool:
        """5.1.9.5.1: one byte, 0 or 1."""
        if data not in (b"\0", b"\1"):
            return False
        (self.modes.add if data[0] else self.modes.discard)(command)
        return True

    def _set_table(self, _: int, data: bytes) -> bool:
        """5.1.9.5.2: two tables, unicast and multicast, each a count of 32 bits and that many addresses."""
        found: list[list[bytes]] = []
        for _ in range(2):
            if len(data) < _COUNT:
                return False
            (count,) = struct.unpack_from("<I", data)
            end = _COUNT + _MAC * count
            if count > MAX_TABLE or end > len(data):
                return False
            found.append([data[at : at + _MAC] for at in range(_COUNT, end, _MAC)])
            data = data[end:]
        if data:
            return False
        self.unicast, self.multicast = found
        return True

    def _set_mac(self, _: int, data: bytes) -> bool:
        """5.1.9.5.2: an address of one interface."""
        if len(data) != _MAC or data[0] & 1:
            return False
        self.mac = data
        self._device.quietly(mac=data)
        self._device.changed()
        return True

    def _set_vlan(self, command: int, data: bytes) -> bool:
        """5.1.9.5.3: an id of 12 bits."""
        number = int.from_bytes(data, "little")
        if len(data) != 2 or number not in VLAN_IDS:
            return False
        (self.vlans.add if command == VLAN_ADD else self.vlans.discard)(number)
        return True

    def _announced(self, _: int, data: bytes) -> bool:
        """5.1.9.5.4: the driver has made itself known."""
        if data:
            return False
        self._device.quietly(status=LinkStatus.LINK_UP if self._device.link_up else 0)
        return True

    def _set_pairs(self, _: int, data: bytes) -> bool:
        """5.1.9.5.5: from 1 to max_virtqueue_pairs."""
        number = int.from_bytes(data, "little")
        if len(data) != 2 or not 1 <= number <= self._device.known_pairs:
            return False
        self.pairs = number
        self._device.changed()
        return True

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """What is set, as JSON values."""
        return {
            "mac": self.mac.hex(),
            "modes": sorted(self.modes),
            "unicast": [each.hex() for each in self.unicast],
            "multicast": [each.hex() for each in self.multicast],
            "vlans": sorted(self.vlans),
            "pairs": self.pairs,
        }

    def check(self, saved: object, most: int = 0x8000) -> None:
        """Refuse what `save` cannot have given.

        Raises:
            SavedStateError: malformed.
        """
        if not isinstance(saved, Mapping) or set(cast("Mapping[object, object]", saved)) != set(self.save()):
            raise SavedStateError(f"what the commands have set has the fields {', '.join(self.save())}")
        state = cast("Mapping[str, object]", saved)
        _address(state["mac"])
        for name in ("unicast", "multicast"):
            if len([_address(each) for each in _items(state[name])]) > MAX_TABLE:
                raise SavedStateError(f"the saved {name} table has more than {MAX_TABLE} addresses")
        for name, allowed in (("modes", range(len(_RX_MODES))), ("vlans", VLAN_IDS)):
            if any(type(each) is not int or each not in allowed for each in _items(state[name])):
                raise SavedStateError(f"the saved {name} are not all numbers from 0 to {allowed.stop - 1}")
        pairs = state["pairs"]
        if type(pairs) is not int or not 1 <= pairs <= most:
            raise SavedStateError(f"the saved number of pairs is {pairs!r}, not 1 to {most}")

    def restore(self, saved: object) -> None:
        """Take over what `check` has passed."""
        state = cast("Mapping[str, object]", saved)
        self.mac = _address(state["mac"])
        self.modes = set(cast("list[int]", state["modes"]))
        self.unicast = [_address(each) for each in _items(state["unicast"])]
        self.multicast = [_address(each) for each in _items(state["multicast"])]
        self.vlans = set(cast("list[int]", state["vlans"]))
        self.pairs = cast("int", state["pairs"])


def _items(saved: object) -> list[object]:
    if not isinstance(saved, list):
        raise SavedStateError(f"{saved!r} is no list")
    return cast("list[object]", saved)


def _address(saved: object) -> bytes:
    try:
        address = bytes.fromhex(cast("str", saved))
    except (TypeError, ValueError):
        address = b""
    if len(address) != _MAC:
        raise SavedStateError(f"{saved!r} is no MAC address in hexadecimal")
    return address
