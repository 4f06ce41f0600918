"""`NativeDevice`: a device some of whose queues are served by native services, in the owner loop or in threads.

Theory
------
A service (`_core.Service`) answers the chains of a *party* of queues without Python: one queue, or several that it
works on at once. Without threads `kicked` makes a turn of it. With threads a party has a `_core.Worker` from when the
last of its queues starts until the first of them stops; `kicked` only wakes it. All other queues are a `ChainDevice`'s.

**The owner loop stays the owner.** A worker ends, and is waited for, before a queue stops or is reset, so before its
state is read, saved or forgotten; it is parked while the device is held. What goes wrong in it comes back as a kick
(`Bus.kick`): a latched queue is then reported as broken, once. A turn that has to be made here, because memory is
remote, is made here.

**Kicks** that arrive on an fd are the worker's to wait for, where the transport hands it over (`Threaded`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from virtio_test._core import DeviceQueue, Notifier, Service, Worker
from virtio_test.config import ConfigSpace
from virtio_test.errors import InvalidArgument, QueueViolation
from virtio_test.features import FeatureSet, Requirements

from .base import BUDGET, WEIGHT, OnHandlerError
from .chains import ChainDevice, DirectHandler

__all__ = ["NativeDevice", "Threads", "WaitStrategy", "threads"]

WaitStrategy: TypeAlias = Literal["blocking", "adaptive", "busy"]

_NO_REQUIREMENTS: Final[Requirements] = MappingProxyType({})
_STRATEGIES: Final = ("blocking", "adaptive", "busy")


@dataclass(frozen=True, kw_only=True)
class Threads:
    """How the threads of a device wait; see `_core.Worker`.

    Attributes:
        wait: the strategy.
        spin: microseconds that an ``adaptive`` one looks at the rings.
        cpus: the CPUs to run on, one thread on each, over and over; any, when None.

    Raises:
        InvalidArgument: one of them cannot be.
    """

    wait: WaitStrategy = "blocking"
    spin: float = 50.0
    cpus: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.wait not in _STRATEGIES:
            raise InvalidArgument(f"wait is {self.wait!r}; it is one of {', '.join(_STRATEGIES)}")
        if not 0 <= self.spin <= 1e6:
            raise InvalidArgument(f"spin is {self.spin}; it is 0 to 1,000,000 microseconds")
        if self.cpus is not None and not self.cpus:
            raise InvalidArgument("cpus is empty; it names at least one CPU, or is None for any")


def threads(
    *, native: bool, wait: WaitStrategy | None, spin: float = 50.0, cpus: Sequence[int] | None = None
) -> Threads | None:
    """What a device's own arguments ask for.

    Raises:
        InvalidArgument: threads without native services, or as `Threads`.
    """
    if wait is None:
        return None
    if not native:
        raise InvalidArgument(f"wait={wait!r} is how native services wait: say native=True too")
    return Threads(wait=wait, spin=spin, cpus=cpus)


@dataclass
class _Party:
    """Queues that one service works on."""

    service: Service
    indices: tuple[int, ...]
    number: int
    worker: Worker | None = None
    parked: bool = False
    deaf: bool = False
    kicks: dict[int, int] = field(default_factory=dict[int, int])

    def fds(self) -> list[int]:
        return list(self.kicks.values())


class NativeDevice(ChainDevice):
    """A device from services, and from handlers for the queues that have none.

    Args:
        device_id: virtio device id, 1 to 65535.
        services: the queues of each service to it.
        threads: how its threads wait; None serves in the owner loop.
        chains: queue index to handler, of other queues.
        queue_sizes: largest size of each queue.
        features: feature bits of the class; the ring's bits are added.
        config: configuration space; empty when None.
        requires: features of the class that presuppose others.
        transitional: serve a driver without VERSION_1 too, by the legacy rules.
        on_handler_error: ``broken`` or ``complete0``, as for `BaseDevice`.

    Raises:
        InvalidArgument: a queue that does not exist, or is served twice; not as many as the service works on.
    """

    def __init__(
        self,
        device_id: int,
        *,
        services: Mapping[tuple[int, ...], Service],
        threads: Threads | None = None,
        chains: Mapping[int, DirectHandler],
        queue_sizes: Sequence[int],
        features: FeatureSet | None = None,
        config: ConfigSpace | None = None,
        requires: Requirements = _NO_REQUIREMENTS,
        transitional: bool = True,
        on_handler_error: OnHandlerError = "broken",
    ) -> None:
        super().__init__(
            device_id,
            chains=chains,
            queue_sizes=queue_sizes,
            features=features,
            config=config,
            requires=requires,
            transitional=transitional,
            on_handler_error=on_handler_error,
        )
        self.threads = threads
        self._parties: dict[int, _Party] = {}
        for (indices, service), number in zip(services.items(), count()):
            if len(indices) != service.queues:
                raise InvalidArgument(f"{service!r} works on {service.queues} queues, not on {indices}")
            party = _Party(service, indices, number)
            for index in indices:
                if index in self._parties or index in chains or not 0 <= index < len(self.queue_sizes):
                    raise InvalidArgument(f"queue {index} does not exist, or is served twice")
                self._parties[index] = party
        self._reported: set[int] = set()

    @property
    def workers(self) -> list[Worker]:
        """The threads that run now."""
        return [each.worker for each in self._each_party() if each.worker is not None]

    def close(self) -> None:
        """End the threads, if any still runs. The device must not be used any more."""
        for party in self._each_party():
            self._end(party)

    # --- what a transport calls -----------------------------------------------------------------------------

    def take_kick(self, queue_index: int, fd: int | None) -> bool:
        """See `Threaded.take_kick`."""
        party = self._parties.get(queue_index)
        if party is None or self.threads is None:
            return False
        kicks = {index: known for index, known in party.kicks.items() if index != queue_index}
        if fd is not None:
            kicks[queue_index] = fd
        if party.worker is not None:
            # When there is no fd to be had for it, the one before it stays: the number of another that is closed then
            # would be somebody else's by the time that a worker starts.
            party.worker.set_kicks(list(kicks.values()))
        party.kicks, party.deaf = kicks, False
        return True

    def start_queue(self, queue: DeviceQueue) -> None:
        """See `Device.start_queue`."""
        super().start_queue(queue)
        self._reported.discard(queue.index)
        party = self._parties.get(queue.index)
        if party is None or self.threads is None:
            return
        self._end(party)
        queues = self._queues_of(party)
        if queues is not None:
            bus, index, cpus = self.bus, queue.index, self.threads.cpus
            party.worker = Worker(
                party.service,
                queues,
                party.fds(),
                wait=self.threads.wait,
                spin=self.threads.spin,
                cpu=None if cpus is None else cpus[party.number % len(cpus)],
                tell=Notifier.callback(lambda: bus.kick(index)),
                limit=BUDGET,
                max_bytes=WEIGHT,
            )

    def kicked(self, queue_index: int) -> bool:
        """See `Device.kicked`."""
        party = self._parties.get(queue_index)
        if party is None:
            return super().kicked(queue_index)
        queues = self._queues_of(party)
        if queues is None:
            return False
        worker = party.worker
        try:
            for queue in queues:
                self._report(worker, queue)
            if worker is not None and worker.deaf and not party.deaf:
                party.deaf = True
                _log(f"queue {queue_index}: nothing comes on its kick fd any more, and it is not waited for")
            if worker is not None and worker.running and not worker.elsewhere:
                worker.wake()
                return False
            return self._turn(party, queues)
        except QueueViolation as error:
            self.bus.broken(error)
            return False
        finally:
            self.noticed()

    def stop_queue(self, queue_index: int) -> None:
        """See `Device.stop_queue`."""
        party, queue = self._parties.get(queue_index), self._queues.get(queue_index)
        worker = None if party is None else party.worker
        if party is not None:
            self._end(party)
        super().stop_queue(queue_index)
        if worker is not None and queue is not None:
            # What its thread found just before it ended would come too late as a kick.
            try:
                self._report(worker, queue)
            except QueueViolation as error:
                self.bus.broken(error)
            self.noticed()

    def reset(self) -> None:
        """See `Device.reset`."""
        for party in self._each_party():
            self._end(party)
        self._reported.clear()
        super().reset()

    def hold(self) -> None:
        """See `Holdable.hold`; waits for turns under way."""
        super().hold()
        for party in self._each_party():
            if party.worker is not None and not party.parked:
                party.worker.park()
                party.parked = True

    def release(self) -> None:
        """See `Holdable.release`."""
        super().release()
        for party in self._each_party():
            if party.worker is not None and party.parked:
                party.worker.resume()
            party.parked = False

    # --- what a subclass may extend -------------------------------------------------------------------------

    def noticed(self) -> None:
        """Something may have happened that is worth a line in the log: turns were made, or a worker has told."""

    # --- inside ---------------------------------------------------------------------------------------------

    def _each_party(self) -> list[_Party]:
        return list({party.number: party for party in self._parties.values()}.values())

    def _queues_of(self, party: _Party) -> list[DeviceQueue] | None:
        """The party's queues; None unless all of them run."""
        queues = [self._queues.get(index) for index in party.indices]
        running = [queue for queue in queues if queue is not None]
        return running if len(running) == len(queues) else None

    def _report(self, worker: Worker | None, queue: DeviceQueue) -> None:
        """Raise what a worker has found broken, once."""
        if worker is None or queue.index not in worker.broken or queue.index in self._reported:
            return
        self._reported.add(queue.index)
        if (error := queue.latched) is not None:
            raise error

    def _turn(self, party: _Party, queues: list[DeviceQueue]) -> bool:
        for queue in queues:
            queue.disable_kicks()
        _, more = party.service.turn(queues, limit=BUDGET, max_bytes=WEIGHT)
        return party.service.arm(queues) or more

    def _end(self, party: _Party) -> None:
        worker, party.worker = party.worker, None
        party.parked = party.deaf = False
        if worker is not None:
            worker.stop()


def _log(line: str) -> None:
    # Loaded only here: importing the package must stay cheap.
    import logging

    logging.getLogger("virtio_test.device").info(line)
