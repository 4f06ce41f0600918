"""One attack on a vhost-user back-end, and whether it serves afterwards.

Theory
------
A trial has one connection for the attack and, if that is lost, another for the good request. On the attack's own
connection the ring is set up anew the way the protocol does it: GET_VRING_BASE stops it, and a new SET_VRING cycle
begins a fresh one. Nothing is waited for longer than `patience`, and every end of the process is seen.

Some devices begin only when all their queues are set up (a network card's two), so the queues beside the attacked
one get empty rings.
"""

from __future__ import annotations

import select
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from virtio_test._core import GuestMemory, QueueConfig, RingLayout
from virtio_test.errors import MessageError, PeerDisconnected, PeerError, PeerTimeout, QueueViolation
from virtio_test.features import FeatureSet
from virtio_test.strategies import MessageProgram, RingCase
from virtio_test.transport.vhost_user.frontend import USER_OFFSET, FrontEnd, FrontEndRing
from virtio_test.transport.vhost_user.messages import ProtocolFeature, Request
from virtio_test.transport.vhost_user.payloads import MAX_TABLE_REGIONS

from .child import Child
from .rings import GOOD, GOOD_BYTES, Good, Image, image_of, used_entry
from .target import Target
from .verdict import Observation

__all__ = ["NotOffered", "VhostTrial", "moved", "refusal"]

_F = ProtocolFeature
_PROTOCOL: Final = _F.MQ | _F.REPLY_ACK | _F.CONFIG | _F.RESET_DEVICE | _F.STATUS
_RUNNING: Final = 0xF
_IDLE: Final = 0x4000
_RING_FEATURES: Final = FeatureSet("INDIRECT_DESC", "EVENT_IDX", "RING_PACKED", "IN_ORDER", "ACCESS_PLATFORM")
_LOOK_SECONDS: Final = 0.002
_DEATH_SECONDS: Final = 0.05
_LAST: Final = 2**64 - 1


class NotOffered(PeerError):
    """The target has no such rings, so the case cannot be put to it."""


class VhostTrial:
    """One case against one running back-end.

    Args:
        child: its process.
        path: its socket.
        target: what it serves.
        patience: seconds that anything may take.
    """

    def __init__(self, child: Child, path: Path, target: Target, *, patience: float) -> None:
        self._child = child
        self._path = path
        self._target = target
        self._patience = patience

    def ring(self, case: RingCase) -> Observation:
        """Put a ring in front of it.

        Raises:
            NotOffered: it cannot be asked that.
        """
        seen = Observation()
        if case.packed and not case.start & 0x8000:
            raise NotOffered("a base of 0 is a fresh ring to some, and one in its second lap to others")
        if not all(writable for _, _, writable in case.regions):
            raise NotOffered("vhost-user has no memory that is only read")
        if case.state is not None:
            raise NotOffered("vhost-user has one number for where a ring goes on, and no used index")
        image = image_of(case)
        if max(image.config.desc, image.config.driver, image.config.device) + USER_OFFSET > _LAST:
            raise NotOffered("a ring at the end of the address space has no user address")
        if len(image.memory.regions) > MAX_TABLE_REGIONS:
            raise NotOffered(f"vhost-user shares {MAX_TABLE_REGIONS} regions at once")
        front: FrontEnd | None = None
        try:
            front = self._connect(packed=case.packed, features=case.features)
            self._attack(front, image, seen)
        except NotOffered:
            if front is not None:
                front.close()
            raise
        except PeerError as error:
            seen.refused = refusal(error)
        if front is not None:
            self._heal_same(front, image.memory, seen, packed=case.packed)
            front.close()
        self._heal_new(seen, packed=case.packed)
        return seen

    def messages(self, program: MessageProgram) -> Observation:
        """Let it have messages."""
        seen = Observation()
        try:
            came = program.run(self._path, timeout=self._patience)
        except PeerError as error:
            came, seen.refused = [], refusal(error)
        said = {"silence": "does not answer", "closed": "ends the connection", "refused": "refuses a message"}
        seen.refused = seen.refused or next((words for word, words in said.items() if word in came), "")
        # Who hangs up in the middle waits for nothing: then nothing is known but that it serves on.
        if program.messages[-1].answer and not seen.refused:
            seen.used, seen.count = "takes it", 1
        self._heal_new(seen, packed=False)
        # The program's own connection is over in any case.
        seen.healed = seen.healed and "same"
        return seen

    # ------------------------------------------------------------------------------------------------------ the attack

    def _connect(self, *, packed: bool, features: int = 0) -> FrontEnd:
        front = FrontEnd(self._path, timeout=self._patience)
        try:
            wanted = FeatureSet("VERSION_1") | FeatureSet.from_bits(features) & _RING_FEATURES
            wanted |= FeatureSet("RING_PACKED") if packed else FeatureSet()
            missing = wanted - front.negotiate(wanted, protocol_features=_PROTOCOL)
        except BaseException:
            front.close()
            raise
        if missing:
            front.close()
            raise NotOffered(f"{self._target.name} does not offer {missing}")
        return front

    def _attack(self, front: FrontEnd, image: Image, seen: Observation) -> None:
        front.share(image.memory)
        attacked = self._target.attacked
        ring: FrontEndRing | None = None
        try:
            for index in range(self._target.queues):
                if index == attacked:
                    config = moved(image.config, index)
                    base = image.state.avail | (image.state.used << 16 if image.config.packed else 0)
                    ring = self._start(front, config, base)
                else:
                    self._start(front, self._idle(image.memory, index, packed=image.config.packed))
            if front.protocol & _F.STATUS:
                front.set_status(_RUNNING)
            assert ring is not None
            ring.kick.notify()
            self._watch(front, ring, image, seen)
            shared = image.memory.epoch
            for _ in image.later():
                if image.memory.epoch != shared:
                    shared = image.memory.epoch
                    front.share(image.memory)
                before = used_entry(image)[1]
                ring.kick.notify()
                self._watch(front, ring, image, seen, before)
        finally:
            if ring is not None:
                seen.error = bool(select.select([ring.error.fileno()], [], [], 0)[0])
                seen.used, seen.count = used_entry(image)

    @staticmethod
    def _start(front: FrontEnd, config: QueueConfig, base: int | None = None) -> FrontEndRing:
        if base is None:
            base = 0x8000 | 0x8000 << 16 if config.packed else 0
        ring = front.setup_ring(config, base=base)
        front.enable(config.index)
        return ring

    @staticmethod
    def _idle(memory: GuestMemory, index: int, *, packed: bool) -> QueueConfig:
        """A ring without buffers."""
        layout = RingLayout.contiguous(8, GOOD + _IDLE + 0x1000 * index, packed=packed)
        memory.fill(layout.desc, 0x1000)
        return QueueConfig.from_layout(layout, index=index, features=(1 << 34) * packed)

    def _watch(self, front: FrontEnd, ring: FrontEndRing, image: Image, seen: Observation, before: int = 0) -> None:
        """Until something happens beside the `before` used ones, or nothing for long enough; then whether it sleeps."""
        watched = [front.socket.fileno(), ring.error.fileno(), self._child.fileno()]
        end = time.monotonic() + self._patience / 2
        while time.monotonic() < end and used_entry(image)[1] == before:
            ready, _, _ = select.select(watched, [], [], _LOOK_SECONDS)
            if self._child.fileno() in ready or ring.error.fileno() in ready:
                break
            if front.socket.fileno() in ready:
                front.check_silent()
        self._look_whether_it_sleeps(seen)

    def _look_whether_it_sleeps(self, seen: Observation) -> None:
        if not self._target.polls and self._child.alive:
            seen.spins = self._child.spins()

    # ----------------------------------------------------------------------------------------------------- the service

    def _heal_same(self, front: FrontEnd, memory: GuestMemory, seen: Observation, *, packed: bool) -> None:
        if self._child.died() or seen.refused.startswith("ends"):
            return
        with suppress(PeerError):
            if front.rings:
                for index in range(self._target.queues):
                    front.get_base(index)
            if front.protocol & _F.STATUS:
                front.set_status(0)
            if front.protocol & _F.RESET_DEVICE:
                front.request(Request.RESET_DEVICE)
            front.share(memory)
            if self._serves(front, memory, packed=packed):
                seen.healed = "same"

    def _heal_new(self, seen: Observation, *, packed: bool) -> None:
        seen.death = self._child.died(_DEATH_SECONDS)
        if seen.death:
            return
        if seen.healed:
            # It may still die of what the connection has left behind; who answers the next one is over that.
            answers = False
            with suppress(PeerError):
                self._connect(packed=packed).close()
                answers = True
            seen.death = self._child.died(0.0 if answers else self._patience)
            return
        # Some take the next one only a while after they have seen that the last has left.
        for wait in (0.0, 0.1, 0.5):
            time.sleep(wait)
            try:
                with self._connect(packed=packed) as front:
                    memory = GuestMemory([(GOOD, GOOD_BYTES)])
                    front.share(memory)
                    if self._serves(front, memory, packed=packed):
                        seen.healed = "new"
                        break
            except PeerTimeout:
                break
            except PeerError:
                continue
        seen.death = self._child.died()
        if not seen.healed:
            self._look_whether_it_sleeps(seen)

    def _serves(self, front: FrontEnd, memory: GuestMemory, *, packed: bool) -> bool:
        target = self._target
        good = Good(memory, target, packed=packed)
        ring: FrontEndRing | None = None
        for index in range(target.queues):
            own = index == target.attacked
            started = self._start(front, good.config if own else self._idle(memory, index, packed=packed))
            ring = started if own else ring
        if front.protocol & _F.STATUS:
            front.set_status(_RUNNING)
        assert ring is not None
        ring.kick.notify()
        end = time.monotonic() + self._patience
        while time.monotonic() < end and self._child.alive:
            try:
                right = good.answered()
            except QueueViolation:
                return False
            if right is not None:
                return right
            select.select([ring.call.fileno(), self._child.fileno()], [], [], _LOOK_SECONDS)
        return False


def moved(config: QueueConfig, index: int) -> QueueConfig:
    """The same for another queue."""
    return QueueConfig(
        config.size,
        desc=config.desc,
        driver=config.driver,
        device=config.device,
        index=index,
        features=config.features,
        policy=config.policy,
    )


def refusal(error: PeerError) -> str:
    """What a target did instead of taking something, in words."""
    if isinstance(error, PeerDisconnected):
        return f"ends the connection ({error})"
    if isinstance(error, PeerTimeout):
        return f"does not answer ({error})"
    return f"refuses: {error.message if isinstance(error, MessageError) else error}"
