"""The packet loop beside the network device in Python: whatever a driver does with its rings, both do the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from virtio_test._core import GuestMemory
from virtio_test.carrier.loopback import Loopback
from virtio_test.device import RING_FEATURES
from virtio_test.devices.net import Backend, Generate, NetDevice
from virtio_test.driver.net import NetDriver
from virtio_test.driver.request import Request
from virtio_test.errors import DeviceNeedsReset, QueueFull, RuleViolation, StateError
from virtio_test.features import FeatureSet
from virtio_test.spec.net import FEATURE_NAMES, HEADER

RX, TX = 0, 1
NOWHERE: Final = 0x9000_0000_0000


class Raw(NetDriver):
    """Puts in what it is told to, and nothing else."""

    def _offer(self) -> None:
        return


@dataclass(frozen=True)
class Send:
    """A chain for the transmit queue: a header with such fields and a frame of so many bytes, cut short or not."""

    length: int
    flags: int = 0
    gso_type: int = 0
    start: int = 0
    offset: int = 0
    short: int | None = None
    writable: int = 0
    cut: int = 0


@dataclass(frozen=True)
class Offer:
    """A receive buffer of these writable parts, after so many readable bytes."""

    parts: tuple[int, ...]
    readable: int = 0


@dataclass(frozen=True)
class Spoil:
    """All buffers of a queue that the device has not had lie nowhere."""

    queue: int


@dataclass(frozen=True)
class Settle:
    """The device gets its turns."""


Act = Send | Offer | Spoil | Settle

SIZES = st.sampled_from([1, 9, 10, 11, 12, 13, 20, 60, 64, 200, 1526])
LENGTHS = st.sampled_from([1, 2, 3, 48, 60, 61, 200, 1514, 1515])
FIELDS = st.sampled_from([0, 1, 2, 10, 14, 58, 59, 60, 0xFFFF])
SENDS = st.builds(
    Send,
    LENGTHS,
    flags=st.sampled_from([0, 0, 0, 1, 1, 2, 4, 0x81, 0xF8]),
    gso_type=st.sampled_from([0, 0, 0, 0, 1, 0x80]),
    start=FIELDS,
    offset=FIELDS,
    short=st.sampled_from([None, None, None, None, 1, 9, 10, 11, 12]),
    writable=st.sampled_from([0, 0, 0, 5]),
    cut=st.integers(0, 40),
)
OFFERS = st.builds(Offer, st.lists(SIZES, min_size=1, max_size=3).map(tuple), st.sampled_from([0, 0, 0, 3]))
ACTS = st.lists(
    st.one_of(SENDS, SENDS, OFFERS, OFFERS, OFFERS, st.just(Settle())),
    max_size=40,
)
ENDS = st.sampled_from([[], [], [], [Spoil(RX), Send(60), Settle()], [Spoil(TX), Settle()], [Offer((60,)), Spoil(RX)]])
"""How it ends: most often well."""

BACKENDS: Final[list[Backend]] = ["loopback", "loopback", "drop", Generate(64, count=20), Generate(20), Generate(1000)]


@dataclass
class World:
    """One device and its driver."""

    device: NetDevice
    names: tuple[str, ...]
    packed: bool
    requests: list[Request] = field(default_factory=list[Request])

    def __post_init__(self) -> None:
        self.loopback = Loopback(self.device, memory=GuestMemory([(0, 1 << 22)]))
        ring = RING_FEATURES if self.packed else RING_FEATURES - FeatureSet("RING_PACKED")
        self.driver = Raw(self.loopback, wanted=ring | FeatureSet(*self.names, device=FEATURE_NAMES), queue_size=16)
        self.driver.initialize()

    def act(self, act: Act) -> None:
        """Do it; what the ring or a broken device has no room for is left."""
        try:
            if isinstance(act, Send):
                self._send(act)
            elif isinstance(act, Offer):
                readable = [b"\xee" * act.readable] if act.readable else []
                self.requests.append(self.driver.submit(RX, readable, act.parts, publish=True))
            elif isinstance(act, Spoil):
                self._spoil(act.queue)
            else:
                self.driver.loop.run_pending()
        except (QueueFull, StateError, DeviceNeedsReset):
            pass

    def _send(self, act: Send) -> None:
        header = HEADER.pack(act.flags, act.gso_type, 0, 0, act.start, act.offset, 0)
        data = (header + bytes(each * 31 + act.length & 0xFF for each in range(act.length)))[: act.short]
        cut = min(act.cut, len(data))
        parts = [part for part in (data[:cut], data[cut:]) if part]
        self.requests.append(self.driver.submit(TX, parts, [act.writable] if act.writable else []))

    def _spoil(self, index: int) -> None:
        """Every buffer that is still in the ring."""
        queue = self.driver.queues[index]
        layout = queue.layout()
        for slot in range(queue.size):
            self.driver.memory.write(layout.at("desc.addr", slot), NOWHERE.to_bytes(8, "little"))

    def seen(self) -> dict[str, Any]:
        """Everything that anybody can see of it."""
        asked = [
            (each.done, each.data if each.done and each.error is None else None, type(each.error))
            for each in self.requests
        ]
        broken = [(each.rule, each.places()) for each in self.loopback.errors if isinstance(each, RuleViolation)]
        held = [self.driver.memory.read(at, size) for each in self.requests for at, size in each.writable]
        return {
            "asked": asked,
            "broken": broken,
            "held": held,
            # How often it is looked whether what is generated fits, and when, nobody says; the rest is in order.
            "findings": [each for each in self.device.findings if each.queue == TX],
            "small": {str(each) for each in self.device.findings if each.queue == RX},
            "counters": self.device.counters,
            "state": self.device.save(),
        }


@pytest.mark.row("CVE-2021-3748", "CVE-2022-26353", "CVE-2023-6693", "U09")
@given(
    backend=st.sampled_from(BACKENDS),
    acts=st.tuples(ACTS, ENDS).map(lambda each: each[0] + each[1]),
    packed=st.booleans(),
    mergeable=st.booleans(),
    names=st.sampled_from([(), ("CSUM",), ("CSUM", "GUEST_CSUM"), ("GUEST_CSUM",), ("MTU",)]),
)
def test_both_do_the_same(
    backend: Backend, acts: list[Act], packed: bool, mergeable: bool, names: tuple[str, ...]
) -> None:
    if isinstance(backend, Generate):
        # What is sent and what is generated are turns of two kinds, and who meets a broken ring first nobody says.
        acts = [act for act in acts if not isinstance(act, Spoil)]
    options: dict[str, Any] = {"mergeable": mergeable, "checksum": True, "mtu": 1000 if "MTU" in names else None}
    plain = World(NetDevice(backend, **options), names, packed)
    native = World(NetDevice(backend, native=True, **options), names, packed)
    for act in (*acts, Settle()):
        plain.act(act)
        native.act(act)
        if isinstance(act, Settle):
            assert native.seen() == plain.seen()
