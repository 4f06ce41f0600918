"""The network device (VIRTIO 1.4, 5.1): pairs of queues, mergeable buffers, a control queue; the network is a back-end.

Theory
------
What the driver sends is a header and a frame, however cut (2.7.4); the header has 12 bytes with VERSION_1 or MRG_RXBUF,
else 10 (5.1.9.1). The **back-end** says what comes back on the same pair: the frame itself (``"loopback"``), nothing
(``"drop"``), or what a callable makes of it. `Generate` instead fills receive buffers as fast as there are any.
Frames from elsewhere come through `deliver`.

**As on a wire**, a frame that finds no buffer is dropped and counted, and so is one for a pair that is not in use, or
while the link is down. All buffers of a frame are taken, then written, and only then used, so that none is shown when
one of them is bad. What the driver must not send is kept in `findings`, with its clause, and goes no further; the
device lives: `HeaderTooShort`, `FrameMissing`, `OffloadNotNegotiated`, `ChecksumBeyondFrame`, `FrameTooLong`. A receive
buffer in which nothing fits (`BufferTooSmall`) stays for a frame that does.

**Checksums** (CSUM, GUEST_CSUM) are passed through: a frame that the driver left without one reaches a driver that
accepts this so, and is completed for everybody else. There is no other offload.

**Queues** (5.1.2): a receive and a transmit queue for each pair, then the control queue: behind the last pair with MQ,
behind the first one without. Where that queue runs, a driver uses as many pairs as it asks for (5.1.9.5.5); where it is
somebody else's, as behind vhost-user, every pair whose queues run is in use. What the other commands say (`control`) is
kept and changes nothing of what is received: filters may be imperfect, and this one lets everything pass (5.1.9.5.2).

**Native**, every pair is served by a `_core.PacketService`, which does the same without Python, in the owner loop or in
a thread for each pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, cast

from virtio_test._core import Chain, DeviceQueue, PacketService
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.errors import (
    HandlerError,
    InvalidArgument,
    QueueViolation,
    RequestViolation,
    SavedStateError,
    StaleMemory,
    StateError,
)
from virtio_test.features import FeatureSet
from virtio_test.spec.ids import DeviceId
from virtio_test.spec.net import (
    CONFIG_FIELDS,
    ETHERNET_HEADER,
    FEATURE_NAMES,
    GSO_NONE,
    HEADER,
    HEADER_LEGACY,
    MTU_RANGE,
    PAIRS_RANGE,
    REQUIRES,
    VLAN_TAG,
    HeaderFlags,
    LinkStatus,
)

from .base import BUDGET, OnHandlerError
from .chains import DirectHandler
from .native import NativeDevice, WaitStrategy, threads
from .netcontrol import Control
from .netframes import LONGEST, Backend, Frame, Generate

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["CONFIG_LAYOUT", "MAX_FINDINGS", "Backend", "Generate", "NetDevice"]

# Through the legacy interface the address is the driver's to write (5.1.4.3).
CONFIG_LAYOUT: Final = ConfigLayout(("mac", "bytes(6)", "rw"), *CONFIG_FIELDS[1:])
MAX_FINDINGS: Final = 1000
MAC: Final = bytes.fromhex("02005e100002")
"""The address that a device has when none is given: a locally administered one."""

_QUEUE_SIZE: Final = 256
_TAKEN: Final = 1024
"""Bytes of work that taking a receive buffer and putting it back counts as."""
_FORBIDDEN: Final = HeaderFlags.DATA_VALID | HeaderFlags.RSC_INFO


class NetDevice(NativeDevice):
    """The network device.

    Args:
        backend: ``"loopback"``, ``"drop"``, a `Generate`, or a callable that takes each frame, without header and with
            its checksum, and returns the frames that come back for it; None is none.
        mac: the address, 6 bytes.
        mtu: the largest payload, 68 to 65535; None offers no MTU.
        pairs: pairs of queues; more than one offer MQ.
        mergeable: offer MRG_RXBUF.
        checksum: offer CSUM and GUEST_CSUM.
        control: have a control queue; offers CTRL_VQ, CTRL_RX, CTRL_RX_EXTRA, CTRL_VLAN, CTRL_MAC_ADDR, GUEST_ANNOUNCE.
        queue_size: largest size of each queue.
        device_id: virtio device id.
        transitional: serve a driver without VERSION_1 too.
        on_handler_error: what becomes of a frame when the callable raises; see `BaseDevice`.
        native: serve the pairs without Python; not with a callable.
        wait: how the threads of a native device wait, one for each pair; None serves in the owner loop.
        spin: microseconds that an ``adaptive`` one looks at its rings.
        cpus: the CPUs that the threads run on; any, when None.

    Attributes:
        control: what the driver's commands have set.

    Raises:
        InvalidArgument: a value that the configuration space cannot show, MQ without a control queue, or a native
            device with a callable.
    """

    def __init__(
        self,
        backend: Backend = "loopback",
        *,
        mac: bytes = MAC,
        mtu: int | None = None,
        pairs: int = 1,
        mergeable: bool = True,
        checksum: bool = False,
        control: bool = True,
        queue_size: int = _QUEUE_SIZE,
        device_id: int = DeviceId.NET,
        transitional: bool = True,
        on_handler_error: OnHandlerError = "broken",
        native: bool = False,
        wait: WaitStrategy | None = None,
        spin: float = 50.0,
        cpus: Sequence[int] | None = None,
    ) -> None:
        if native and callable(backend):
            raise InvalidArgument("a native device calls no function: its back-end is loopback, drop or a Generate")
        if isinstance(backend, str) and backend not in ("loopback", "drop"):
            raise InvalidArgument(f"back-end {backend!r}: say 'loopback', 'drop', a Generate, or give a callable")
        if len(mac) != 6 or mac[0] & 1:
            raise InvalidArgument(f"{mac!r} is no address of 6 bytes that one interface can have")
        if mtu is not None and mtu not in MTU_RANGE:
            raise InvalidArgument(f"the mtu {mtu} is not {MTU_RANGE.start} to {MTU_RANGE.stop - 1}")
        if pairs not in PAIRS_RANGE:
            raise InvalidArgument(f"{pairs} pairs of queues; 1 to {PAIRS_RANGE.stop - 1} are possible")
        if pairs > 1 and not control:
            raise InvalidArgument(f"{pairs} pairs need a control queue: MQ requires CTRL_VQ (5.1.3.1)")
        commands = ("CTRL_VQ", "CTRL_RX", "CTRL_RX_EXTRA", "CTRL_VLAN", "CTRL_MAC_ADDR", "GUEST_ANNOUNCE")
        offered = [
            ("MAC", True),
            ("STATUS", True),
            ("MTU", mtu is not None),
            ("MRG_RXBUF", mergeable),
            ("MQ", pairs > 1),
            ("CSUM", checksum),
            ("GUEST_CSUM", checksum),
            *((name, control) for name in commands),
        ]
        self._services = [_service(backend) for _ in range(pairs)] if native else []
        super().__init__(
            device_id,
            services={(2 * pair, 2 * pair + 1): service for pair, service in enumerate(self._services)},
            threads=threads(native=native, wait=wait, spin=spin, cpus=cpus),
            chains={},
            queue_sizes=(queue_size,) * (2 * pairs + control),
            features=FeatureSet(*(name for name, offer in offered if offer), device=FEATURE_NAMES),
            config=ConfigSpace(
                CONFIG_LAYOUT,
                mac=mac,
                status=LinkStatus.LINK_UP,
                max_virtqueue_pairs=pairs if pairs > 1 else 0,
                mtu=mtu or 0,
            ),
            requires=REQUIRES,
            transitional=transitional,
            on_handler_error=on_handler_error,
        )
        self.config.on_driver_write = self._config_written
        self.backend: Backend = backend
        self.pairs = pairs
        self.control = Control(self, mac)
        self._findings: list[RequestViolation] = []
        self._counters: Counter[str] = Counter()
        self._mac = mac
        self._mtu = mtu
        self._header = HEADER.size
        # Frames generated since the reset, by pair.
        self._generated: Counter[int] = Counter()
        # Receive queues whose driver has not been told yet.
        self._unsignalled: set[int] = set()
        # Without MQ the third queue is none of a pair's.
        self._pairs_parties = dict(self._parties)

    # --- what a transport calls -----------------------------------------------------------------------------

    def activate(self, features: FeatureSet) -> None:
        """See `Device.activate`; header and queues follow what was negotiated (5.1.9.1, 5.1.2)."""
        super().activate(features)
        new = "VERSION_1" in features or "MRG_RXBUF" in features
        self._header = HEADER.size if new else HEADER_LEGACY.size
        known = range(self.known_pairs)
        handlers: dict[int, DirectHandler] = {}
        if not self._services:
            handlers = {2 * pair + 1: partial(self._transmit, pair) for pair in known}
        self._parties = {index: party for index, party in self._pairs_parties.items() if index // 2 in known}
        if self.control_queue is not None:
            handlers[self.control_queue] = self.control.obey
        self._chains = handlers
        self._settle_mac()
        self.changed()

    def start_queue(self, queue: DeviceQueue) -> None:
        """See `Device.start_queue`."""
        super().start_queue(queue)
        if queue.index == self.control_queue:
            self.changed()
        # A receive buffer that arrives is looked at when there is something to put in.
        if self._pair_of(queue.index) is not None and not isinstance(self.backend, Generate):
            queue.disable_kicks()

    def take_kick(self, queue_index: int, fd: int | None) -> bool:
        """See `Threaded.take_kick`; before anything was negotiated nobody knows whose the third queue is."""
        sure = self.active or queue_index < 2
        return super().take_kick(queue_index, fd if sure else None) and sure

    def kicked(self, queue_index: int) -> bool:
        """See `Device.kicked`."""
        if queue_index in self._parties:
            return super().kicked(queue_index)
        if queue_index in self._chains:
            try:
                return super().kicked(queue_index)
            finally:
                self._signal()
        pair = self._pair_of(queue_index)
        if pair is None or not isinstance(self.backend, Generate):
            return False
        return self._generate(self.backend, pair)

    def reset(self) -> None:
        """See `Device.reset`; the address, the link's ANNOUNCE and what commands have set are the first ones again."""
        super().reset()
        self._parties = dict(self._pairs_parties)
        self._chains = {}
        self._unsignalled.clear()
        self._generated.clear()
        for service in self._services:
            service.generated = 0
        self.control.reset()
        self.quietly(mac=self._mac, status=self.config.status & LinkStatus.LINK_UP)

    # --- our side -------------------------------------------------------------------------------------------

    @property
    def header_size(self) -> int:
        """Bytes before each frame, by what was negotiated and never by what comes."""
        return self._header

    @property
    def known_pairs(self) -> int:
        """Pairs that the driver knows of: without MQ one (5.1.2)."""
        return self.pairs if "MQ" in self.negotiated else 1

    @property
    def control_queue(self) -> int | None:
        """The index of the control queue; None without CTRL_VQ."""
        return 2 * self.known_pairs if "CTRL_VQ" in self.negotiated else None

    @property
    def pairs_in_use(self) -> int:
        """How many pairs frames may go to."""
        return self.control.pairs if self.control_queue in self._queues else self.known_pairs

    @property
    def link_up(self) -> bool:
        """Whether there is a link."""
        return bool(self.config.status & LinkStatus.LINK_UP)

    @property
    def findings(self) -> list[RequestViolation]:
        """Rules that the driver broke, the first `MAX_FINDINGS`."""
        for service in self._services:
            for rule, clause, message, queue, head in service.take_findings():
                self.note(RequestViolation(rule, clause, message, queue=queue, head=head))
        return self._findings

    @property
    def counters(self) -> Counter[str]:
        """Frames ``sent`` by the driver, ``received`` by it, and bytes of both; ``dropped`` and ``broken`` ones.

        Dropped is what found no buffer, no such pair, or no link, and broken what broke a rule.
        """
        total = Counter(self._counters)
        for service in self._services:
            total.update(service.counters)
        return +total

    def set_link(self, *, up: bool) -> None:
        """The link comes or goes; a driver with STATUS is told."""
        status = self.config.status & ~LinkStatus.LINK_UP
        self.config.update(status=status | LinkStatus.LINK_UP if up else status)
        self.changed()

    def announce(self) -> bool:
        """Ask the driver to make itself known to the network (5.1.9.5.4); False if it has not GUEST_ANNOUNCE."""
        if "GUEST_ANNOUNCE" not in self.negotiated:
            return False
        self.config.update(status=self.config.status | LinkStatus.ANNOUNCE)
        return True

    def deliver(self, frame: Buffer, *, pair: int = 0) -> bool:
        """Give the driver a frame from elsewhere, in the owner loop; False when it was dropped.

        Raises:
            InvalidArgument: it is empty, or longer than can be.
            StateError: the device is native, and its receive queues are not Python's.
        """
        if self._services:
            raise StateError("a native device takes no frames from elsewhere")
        data = bytes(frame)
        if not 1 <= len(data) <= LONGEST:
            raise InvalidArgument(f"a frame of {len(data)} bytes; 1 to {LONGEST} are possible")
        # While we are held nobody may touch guest memory.
        done = not self._held and self._receive(pair, Frame(data))
        self._signal()
        return done

    def quietly(self, **values: int | bytes) -> None:
        """Change configuration fields that the driver knows to change: it asked for it, or has reset us."""
        told, self.config.on_change = self.config.on_change, None
        try:
            self.config.update(**values)
        finally:
            self.config.on_change = told

    def _config_written(self, _: tuple[str, ...]) -> None:
        if self.active:
            self._settle_mac()

    def _settle_mac(self) -> None:
        """5.1.4.3: what a driver has written is its address through the legacy interface, and nothing otherwise."""
        if "VERSION_1" in self.negotiated:
            self.quietly(mac=self.control.mac)
        else:
            self.control.mac = self.config.mac
        self.changed()

    def changed(self) -> None:
        """Link, pairs in use or address may be others now: a generator may have something to do."""
        for pair, service in enumerate(self._services):
            self._set_up(pair, service)
        if isinstance(self.backend, Generate) and self._bus is not None:
            for pair in range(self.pairs_in_use):
                self._bus.kick(2 * pair)

    def _set_up(self, pair: int, service: PacketService) -> None:
        backend = self.backend
        service.set_up(
            header=self._header,
            mergeable="MRG_RXBUF" in self.negotiated,
            checksum="CSUM" in self.negotiated,
            guest_checksum="GUEST_CSUM" in self.negotiated,
            longest=self._longest,
            usable=self.link_up and pair < self.pairs_in_use,
            frame=backend.frame(self.control.mac, 0) if isinstance(backend, Generate) else None,
            number_at=backend.number_at if isinstance(backend, Generate) else None,
        )

    def _pair_of(self, queue_index: int) -> int | None:
        """The pair whose receive queue this is."""
        return queue_index // 2 if queue_index % 2 == 0 and queue_index < 2 * self.known_pairs else None

    @property
    def _longest(self) -> int:
        """Bytes of the longest frame; where the driver knows the mtu, in both directions (5.1.4.1, 5.1.4.2)."""
        known = self._mtu if "MTU" in self.negotiated else None
        return LONGEST if known is None else known + ETHERNET_HEADER + VLAN_TAG

    def _signal(self) -> None:
        """Tell the driver of what its receive queues were given, once for all of it."""
        for index in sorted(self._unsignalled):
            if (queue := self._queues.get(index)) is not None:
                try:
                    queue.signal()
                except QueueViolation as error:
                    self.bus.broken(error)
        self._unsignalled.clear()

    # --- from the driver ------------------------------------------------------------------------------------

    def _transmit(self, pair: int, chain: Chain) -> int:
        try:
            frame = self._judge(chain)
        except RequestViolation as violation:
            self._counters["broken"] += 1
            self.note(violation)
            return 0
        self._counters["sent"] += 1
        self._counters["sent_bytes"] += len(frame.data)
        if not self.link_up or pair >= self.pairs_in_use:
            self._counters["dropped"] += 1
        elif self.backend == "loopback":
            self._pass(pair, frame)
        elif callable(self.backend):
            for reply in self.backend(frame.whole()) or ():
                data = bytes(reply)
                if not 1 <= len(data) <= LONGEST:
                    raise HandlerError(f"the back-end returned a frame of {len(data)} bytes, not 1 to {LONGEST}")
                self._pass(pair, Frame(data))
        return 0

    def _pass(self, pair: int, frame: Frame) -> None:
        self.charge(len(frame.data))
        self._receive(pair, frame)

    def _judge(self, chain: Chain) -> Frame:
        """A frame as it was sent.

        Raises:
            RequestViolation: the driver must not send that.
        """
        size, longest = chain.readable - self._header, self._longest
        if size < 0:
            raise _fault(chain, "HeaderTooShort", "5.1.9", f"{chain.readable} bytes, the header has {self._header}")
        if size == 0:
            raise _fault(chain, "FrameMissing", "5.1.9", "a header and no frame")
        if size > longest:
            raise _fault(chain, "FrameTooLong", "5.1.4.2", f"a frame of {size} bytes, at most {longest} can be sent")
        whole = chain.read()
        flags, gso_type, _, _, start, offset = HEADER_LEGACY.unpack_from(whole)
        # 5.1.9.2.1: no offload that was not negotiated, and ours are none but the checksum. Unknown flags are ignored.
        if flags & _FORBIDDEN or gso_type != GSO_NONE:
            message = f"flags {flags:#x}, gso_type {gso_type:#x}, and no such offload was negotiated"
            raise _fault(chain, "OffloadNotNegotiated", "5.1.9.2.1", message)
        if not flags & HeaderFlags.NEEDS_CSUM:
            return Frame(whole[self._header :])
        if "CSUM" not in self.negotiated:
            raise _fault(chain, "OffloadNotNegotiated", "5.1.9.2.1", "NEEDS_CSUM, and CSUM was not negotiated")
        # Two 16-bit numbers, added where they cannot wrap; the sum's own two bytes lie in the frame.
        if start + offset + 2 > size:
            message = f"csum_start {start} and csum_offset {offset} in a frame of {size} bytes"
            raise _fault(chain, "ChecksumBeyondFrame", "5.1.9.2.1", message)
        return Frame(whole[self._header :], HeaderFlags.NEEDS_CSUM, start, offset)

    def note(self, violation: RequestViolation) -> None:
        """Keep what the driver did wrong."""
        if len(self._findings) < MAX_FINDINGS:
            self._findings.append(violation)

    # --- to the driver --------------------------------------------------------------------------------------

    def _generate(self, backend: Generate, pair: int) -> bool:
        """Fill what buffers there are; whether to come again."""
        queue = self._queues.get(2 * pair)
        if queue is None or self._held or not self.link_up or pair >= self.pairs_in_use:
            return False
        try:
            queue.disable_kicks()
            for _ in range(BUDGET):
                if self._generated[pair] == backend.count:
                    return False
                if not queue.has_work() and not queue.enable_kicks():
                    return False
                frame = Frame(backend.frame(self.control.mac, self._generated[pair]))
                if not self._place(queue, frame):
                    # A buffer that comes from now on brings a kick; one that came meanwhile is there.
                    queue.enable_kicks()
                    if not self._place(queue, frame):
                        return False
                self._generated[pair] += 1
                self._counters["received"] += 1
                self._counters["received_bytes"] += len(frame.data)
        except QueueViolation as error:
            self.bus.broken(error)
            return False
        finally:
            self._signal()
        return True

    def _receive(self, pair: int, frame: Frame) -> bool:
        """Put one frame into receive buffers; False, and they are as they were, when it is dropped."""
        queue = self._queues.get(2 * pair)
        usable = self.link_up and 0 <= pair < self.pairs_in_use and len(frame.data) <= self._longest
        done = queue is not None and usable and self._place(queue, frame)
        self._counters["received" if done else "dropped"] += 1
        if done:
            self._counters["received_bytes"] += len(frame.data)
        return done

    def _place(self, queue: DeviceQueue, frame: Frame) -> bool:
        if "GUEST_CSUM" not in self.negotiated:
            frame = Frame(frame.whole())
        total = self._header + len(frame.data)
        taken: list[Chain] = []
        try:
            room = 0
            while room < total and (not taken or "MRG_RXBUF" in self.negotiated):
                chain = queue.pop()
                if chain is None:
                    break
                taken.append(chain)
                # 5.1.9.3.1: the first buffer holds the header at least.
                room = 0 if len(taken) == 1 and chain.writable < self._header else room + chain.writable
                if not room:
                    break
            if room >= total:
                self._fill(taken, frame)
                for chain in taken:
                    queue.push(chain)
                self._unsignalled.add(queue.index)
                return True
            if taken and (not room or "MRG_RXBUF" not in self.negotiated):
                message = f"{taken[0].writable} bytes for a header of {self._header} and a frame of {len(frame.data)}"
                self.note(_fault(taken[0], "BufferTooSmall", "5.1.9.3.1", message))
        except StaleMemory:
            # The memory of a buffer has gone meanwhile: it is found out about when it is taken again.
            pass
        except QueueViolation as error:
            # What was taken before it is not ours any more either.
            self.bus.broken(error)
            return False
        except BaseException:
            for chain in reversed(taken):
                self._put_back(queue, chain)
            raise
        # A ring full of tiny buffers makes each frame that does not fit as much work as this.
        self.charge(_TAKEN * len(taken))
        for chain in reversed(taken):
            queue.unpop(chain)
        return False

    def _fill(self, chains: list[Chain], frame: Frame) -> None:
        """Everything is written before the first of them is shown (CVE-2021-3748); all but the last are full."""
        # 5.1.9.3.2: num_buffers counts them, and is 1 without MRG_RXBUF.
        header = HEADER.pack(frame.flags, GSO_NONE, 0, 0, frame.csum_start, frame.csum_offset, len(chains))
        data = memoryview(header[: self._header] + frame.data)
        for chain in chains:
            data = data[chain.write(data[: chain.writable]) :]

    # --- saved state ----------------------------------------------------------------------------------------

    def save(self) -> dict[str, object]:
        """The base's state, what the commands have set, and how many frames were generated by pair."""
        generated = [self._generated[pair] for pair in range(self.pairs)]
        if self._services:
            generated = [service.generated for service in self._services]
        return {**super().save(), "control": self.control.save(), "generated": generated}

    def check_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.check_state`."""
        super().check_state(state)
        saved = ConfigSpace(self.config.layout)
        saved.restore(state["config"])
        for name in ("max_virtqueue_pairs", "mtu"):
            if saved[name] != self.config[name]:
                raise SavedStateError(f"the saved state's {name} is {saved[name]}, this device's {self.config[name]}")
        self.control.check(state["control"], most=self.pairs)
        self._checked(state["generated"])

    def apply_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.apply_state`."""
        super().apply_state(state)
        self.control.restore(state["control"])
        generated = self._checked(state["generated"])
        self._generated = Counter(dict(enumerate(generated)))
        for service, number in zip(self._services, generated, strict=False):
            service.generated = number

    def _checked(self, saved: object) -> list[int]:
        numbers = cast("list[object]", saved) if isinstance(saved, list) else []
        checked = [
            each for each in numbers if isinstance(each, int) and not isinstance(each, bool) and 0 <= each < 1 << 64
        ]
        if len(checked) != self.pairs or len(numbers) != self.pairs:
            raise SavedStateError(f"generated is not a count for each of {self.pairs} pairs")
        return checked


def _service(backend: Backend) -> PacketService:
    if isinstance(backend, Generate):
        return PacketService("generate", count=backend.count)
    assert not callable(backend)
    return PacketService(backend)


def _fault(chain: Chain, rule: str, clause: str, message: str) -> RequestViolation:
    return RequestViolation(rule, clause, message, queue=chain.queue_index, head=chain.head)
