"""The driver of a network device (VIRTIO 1.4, 5.1): frames out, frames in, no offloads.

Theory
------
Each frame is preceded by a header: 12 bytes with VERSION_1 or MRG_RXBUF, else 10 (5.1.9.1). No checksum or
segmentation offload is ever accepted, so ours is all zeros, and so must theirs be but for `num_buffers`. Through a
legacy interface without ANY_LAYOUT the header has a descriptor of its own in both directions.

**Receiving**: `buffers` buffers are kept in receiveq1 and put back as they come. A frame may be spread over several of
them with MRG_RXBUF (5.1.9.4.1). Whole frames go to `on_frame`, or wait in a queue of `max_frames`; what finds that
full is dropped and counted, as a network does.

What breaks a rule is kept in `findings` and the frame in question is dropped: `HeaderTooShort`, `BadNumBuffers`,
`BufferNotFull`, `OffloadNotNegotiated`, `FrameTooLong` (all 5.1.9.4.1 or 5.1.4.1), `BadMtu`.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Final

from virtio_test._core import Policy
from virtio_test.config import ConfigLayout
from virtio_test.errors import AnswerViolation, InvalidArgument, NoFeature, QueueFull, RequestFailed, StateError
from virtio_test.features import FeatureSet
from virtio_test.spec.net import (
    CONFIG_FIELDS,
    CONTROL_ERR,
    CONTROL_OK,
    ETHERNET_HEADER,
    FEATURE_NAMES,
    GSO_NONE,
    HEADER,
    HEADER_LEGACY,
    MAC_ADDR_SET,
    MAX_FRAME,
    MTU_RANGE,
    RECEIVE_QUEUE,
    REQUIRES,
    RX_PROMISC,
    TRANSMIT_QUEUE,
    VLAN_TAG,
    ControlClass,
    LinkStatus,
)

from .alloc import Arena
from .base import DRIVER_FEATURES, Driver
from .registers import Registers
from .request import Request

__all__ = ["MAX_FINDINGS", "NetDriver"]

MAX_FINDINGS: Final = 1000

_WANTED: Final = FeatureSet(
    "MAC", "STATUS", "MTU", "MRG_RXBUF", "CTRL_VQ", "CTRL_RX", "CTRL_MAC_ADDR", device=FEATURE_NAMES
)
_MERGEABLE: Final = FeatureSet("MRG_RXBUF", device=FEATURE_NAMES)
_CONTROL_QUEUE: Final = 2
_UNSET: Final = 0xFF
_OWN_MAC: Final = bytes.fromhex("02005e100001")
"""A locally administered address, for a device that gives none (5.1.4.2)."""


class NetDriver(Driver):
    """The driver of a network device, on its first pair of queues.

    Args:
        registers: the device as the transport shows it.
        on_frame: takes each frame, in the owner loop; frames wait for `receive` when None.
        mergeable: accept MRG_RXBUF.
        buffers: receive buffers in the ring.
        buffer_size: bytes of frame that one buffer holds, beside the header; the largest frame when None.
        max_frames: frames that wait for `receive`.
        wanted: features of the ring to accept; those that the core can do, when None.
        queue_size: largest size of a queue.
        indirect: put every chain into an indirect table.
        policy: tolerances towards the device; with `used_without_write`, num_buffers counts with MRG_RXBUF only.
        arena: where rings and buffers lie.
        timeout: seconds of the loop's clock that waits take at most.

    Attributes:
        mac: the address, 6 bytes.
        mtu: the device's, if it gives one.
        findings: rules that the device broke, the first `MAX_FINDINGS`.
        counters: ``received``, ``dropped`` (nobody took them), ``broken`` (frames that broke a rule) and ``sent``.

    Raises:
        InvalidArgument: a number below 1.
    """

    requires = REQUIRES

    def __init__(
        self,
        registers: Registers,
        *,
        on_frame: Callable[[bytes], object] | None = None,
        mergeable: bool = True,
        buffers: int = 32,
        buffer_size: int | None = None,
        max_frames: int = 1024,
        wanted: FeatureSet | None = None,
        queue_size: int | None = None,
        indirect: bool = False,
        policy: Policy = Policy.interop,
        arena: Arena | None = None,
        timeout: float = 10.0,
    ) -> None:
        if min(buffers, max_frames, 1 if buffer_size is None else buffer_size) < 1:
            raise InvalidArgument(f"{buffers} buffers of {buffer_size} bytes, {max_frames} frames: at least 1 each")
        features = _WANTED if mergeable else _WANTED - _MERGEABLE
        super().__init__(
            registers,
            wanted=features | (DRIVER_FEATURES if wanted is None else wanted),
            layout=ConfigLayout(*CONFIG_FIELDS),
            queue_size=queue_size,
            indirect=indirect,
            policy=policy,
            arena=arena,
            timeout=timeout,
        )
        self.on_frame = on_frame
        self.buffers = buffers
        self.buffer_size = buffer_size
        self.max_frames = max_frames
        self.mac = _OWN_MAC
        self.mtu: int | None = None
        self.findings: list[AnswerViolation] = []
        self.counters: Counter[str] = Counter()
        self.frames: deque[bytes] = deque()
        self._header = HEADER
        self._apart = False
        self._offered = self._room = 0
        # The frame that is still coming in, and how many buffers of it are to come.
        self._parts: list[bytes] = []
        self._missing = 0

    # --- bring-up -------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """See `Driver.set_up`.

        Raises:
            AnswerViolation: `BadMtu` (5.1.4.1), or queues that are not there (5.1.2).
        """
        if TRANSMIT_QUEUE not in self.queues or ("CTRL_VQ" in self.features and _CONTROL_QUEUE not in self.queues):
            raise AnswerViolation("QueueMissing", "5.1.9", f"there are only the queues {sorted(self.queues)}")
        self._header = HEADER if "MRG_RXBUF" in self.features or not self._old else HEADER_LEGACY
        self._apart = self._old and "ANY_LAYOUT" not in self.features
        self.findings.clear()
        self._parts.clear()
        self._missing = self._offered = 0
        self.mac = self._field("mac", "MAC", _OWN_MAC)
        self.mtu = int.from_bytes(self._field("mtu", "MTU", b""), "little") or None
        if "MTU" in self.features and self.mtu not in MTU_RANGE:
            raise AnswerViolation("BadMtu", "5.1.4.1", f"the mtu is {self.mtu or 0}, it must be 68 to 65535")
        self._offer()

    @property
    def _old(self) -> bool:
        return "VERSION_1" not in self.features

    def _field(self, name: str, feature: str, default: bytes) -> bytes:
        place = self.layout[name]
        return self.read_config(place.offset, place.size) if feature in self.features else default

    @property
    def header_size(self) -> int:
        """Bytes before each frame: 12, or 10 through a legacy interface without MRG_RXBUF."""
        return self._header.size

    @property
    def link_up(self) -> bool:
        """Whether the link is up; without STATUS it is taken to be (5.1.4.2)."""
        status = int.from_bytes(self._field("status", "STATUS", b"\1"), "little")
        return bool(status & LinkStatus.LINK_UP)

    # --- sending --------------------------------------------------------------------------------------------

    def send(self, frame: bytes, *, timeout: float | None = None) -> Request:
        """Send one Ethernet frame and go on; waits only while the ring is full.

        Raises:
            InvalidArgument: it is empty, or longer than the device takes (5.1.4.2).
            PeerTimeout: the ring stays full.
        """
        longest = MAX_FRAME + VLAN_TAG if self.mtu is None else self.mtu + ETHERNET_HEADER + VLAN_TAG
        if not 1 <= len(frame) <= longest:
            raise InvalidArgument(f"a frame of {len(frame)} bytes; 1 to {longest} can be sent")
        header = bytes(self._header.size)
        chain = [header, frame] if self._apart else [header + frame]
        while True:
            try:
                request = self.submit(TRANSMIT_QUEUE, chain)
            except (QueueFull, StateError):
                waiting = next((each for each in self.in_flight if each.queue_index == TRANSMIT_QUEUE), None)
                if waiting is None or not self.live:
                    raise
                waiting.wait(timeout=timeout)
            else:
                self.counters["sent"] += 1
                return request

    # --- receiving ------------------------------------------------------------------------------------------

    def receive(self, *, timeout: float | None = None) -> bytes:
        """The next frame, without its header.

        Raises:
            PeerTimeout: none came.
        """
        if not self.frames:
            self.run_until(lambda: bool(self.frames), "a frame", timeout=timeout)
        return self.frames.popleft()

    def _offer(self) -> None:
        room = self.buffer_size
        if room is None:
            room = max(MAX_FRAME, (self.mtu or 0) + ETHERNET_HEADER) + VLAN_TAG
        self._room = self._header.size + room
        writable = [self._header.size, room] if self._apart else [self._room]
        while self._offered < self.buffers:
            try:
                self.submit(RECEIVE_QUEUE, [], writable, on_done=self._received)
            except (QueueFull, StateError):
                return  # what is in the ring has to do
            self._offered += 1

    def _received(self, request: Request) -> None:
        self._offered -= 1
        if request.error is not None:
            return
        try:
            self._take(request.data)
        except AnswerViolation as violation:
            self.counters["broken"] += 1
            self._parts.clear()
            if len(self.findings) < MAX_FINDINGS:
                self.findings.append(violation)
        self._offer()

    def _take(self, data: bytes) -> None:
        """One used buffer: a frame, the start of one, or more of one."""
        if self._missing:
            self._missing -= 1
            if not self._parts:
                return  # the frame was given up at an earlier buffer
            self._parts.append(data)
        else:
            self._parts = [data[self._header.size :]]
            self._missing = self._judge(data) - 1
        if self._missing and len(data) < self._room:
            raise self._fault("BufferNotFull", "5.1.9.4.1", f"{len(data)} bytes in a buffer that is not the last")
        if not data:
            raise self._fault("BufferEmpty", "5.1.9.4.1", "a buffer with nothing in it")
        if not self._missing:
            frame = b"".join(self._parts)
            self._parts = []
            self._deliver(frame)

    def _judge(self, data: bytes) -> int:
        """Look at a header; how many buffers its frame has."""
        if len(data) < self._header.size:
            raise self._fault("HeaderTooShort", "5.1.9", f"{len(data)} bytes, the header has {self._header.size}")
        flags, gso_type, *_, last = self._header.unpack_from(data)
        merged = "MRG_RXBUF" in self.features
        count = last if merged else 1
        shown = last if self._header is HEADER else 1
        lenient = not merged and self.policy.switches()["used_without_write"]
        if not 1 <= count <= self.queues[RECEIVE_QUEUE].size or (shown != count and not lenient):
            raise self._fault("BadNumBuffers", "5.1.9.3.2", f"num_buffers is {shown}")
        if flags or gso_type != GSO_NONE:
            # The buffers that follow belong to it, and are taken with it.
            self._missing = count - 1
            message = f"flags {flags:#x}, gso_type {gso_type:#x}, and no offload was negotiated"
            raise self._fault("OffloadNotNegotiated", "5.1.9.4.1", message)
        return count

    def _deliver(self, frame: bytes) -> None:
        if self.mtu is not None and len(frame) > self.mtu + ETHERNET_HEADER + VLAN_TAG:
            raise self._fault("FrameTooLong", "5.1.4.1", f"a frame of {len(frame)} bytes, the mtu is {self.mtu}")
        self.counters["received"] += 1
        if self.on_frame is not None:
            self.on_frame(frame)
        elif len(self.frames) < self.max_frames:
            self.frames.append(frame)
        else:
            self.counters["dropped"] += 1

    @staticmethod
    def _fault(rule: str, clause: str, message: str) -> AnswerViolation:
        return AnswerViolation(rule, clause, message, queue=RECEIVE_QUEUE)

    # --- commands -------------------------------------------------------------------------------------------

    def command(self, kind: int, command: int, data: bytes, *, timeout: float | None = None) -> None:
        """Send a command through the control queue and wait for its `ack` (5.1.9.5).

        Raises:
            NoFeature: CTRL_VQ was not negotiated.
            RequestFailed: the device answered that it does not do it.
            AnswerViolation: `AckMissing`, `AckUnknown`: it answered something else.
        """
        if "CTRL_VQ" not in self.features:
            raise NoFeature("there is no control queue: CTRL_VQ was not negotiated")
        request = self.submit(_CONTROL_QUEUE, [bytes((kind, command)), data], [1], publish=False)
        self.memory.write(request.writable[0][0], bytes((_UNSET,)))
        self.flush(_CONTROL_QUEUE)
        answer = request.wait(timeout=timeout)
        if not answer or answer[0] == _UNSET:
            raise AnswerViolation("AckMissing", "5.1.9.5", f"command {kind}.{command}: no ack", queue=_CONTROL_QUEUE)
        if answer[0] == CONTROL_ERR:
            raise RequestFailed(f"command {kind}.{command} was answered ERR")
        if answer[0] != CONTROL_OK:
            message = f"command {kind}.{command}: the ack is {answer[0]}"
            raise AnswerViolation("AckUnknown", "5.1.9.5", message, queue=_CONTROL_QUEUE)

    def set_promiscuous(self, *, on: bool) -> None:
        """Ask for all frames, or only for those to our address.

        Raises:
            NoFeature: CTRL_RX was not negotiated.
        """
        self._needs("CTRL_RX")
        self.command(ControlClass.RX, RX_PROMISC, bytes((on,)))

    def set_mac(self, mac: bytes) -> None:
        """Give the device another address.

        Raises:
            NoFeature: CTRL_MAC_ADDR was not negotiated.
            InvalidArgument: it has not 6 bytes.
        """
        self._needs("CTRL_MAC_ADDR")
        if len(mac) != 6:
            raise InvalidArgument(f"{mac!r} is no MAC address of 6 bytes")
        self.command(ControlClass.MAC, MAC_ADDR_SET, mac)
        self.mac = mac

    def _needs(self, feature: str) -> None:
        if feature not in self.features:
            raise NoFeature(f"{feature} was not negotiated")
