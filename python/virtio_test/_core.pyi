"""The Rust core: guest memory, both ends of both virtqueue formats, notifiers and the poller.

Addresses are guest physical addresses (ints below 2**64), lengths are bytes. Every error is a class of
`virtio_test.errors`: `UsageError` when the caller is at fault (guest memory is then unchanged),
`QueueViolation` when the other side broke a rule (the queue is then latched and the error is raised once).
All classes are frozen and may be used from any thread.
"""

from collections.abc import Callable, Sequence
from typing import Final, Literal, final

from typing_extensions import Buffer, disjoint_base

from .errors import QueueViolation

__all__ = [
    "Access", "Batch", "Chain", "Counters", "DeviceQueue", "DirtyLog", "DriverQueue", "EntropyService", "FileService",
    "GuestMemory", "InflightArea", "InflightPart", "Missing", "Notifier", "PacketService", "Player", "Policy", "Poller",
    "QueueConfig", "QueueState", "Region", "RingLayout", "Rule", "Service", "Trace", "Worker", "__version__",
    "build_info", "need_event", "rules",
]  # fmt: skip

__version__: Final[str]

def build_info() -> dict[str, str]:
    """How this core was built: ``version``, ``profile`` (``debug`` or ``release``), ``abi``, ``target``."""

def rules() -> list[Rule]:
    """Every rule that the core can find broken, in the order of the specification."""

def need_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from `old` to `new` passes `event` (16-bit arithmetic; VIRTIO 1.4, 2.7.10)."""

@final
class Rule:
    """One check: its stable name, its clause of VIRTIO 1.4 and one line that says what must hold."""

    @property
    def name(self) -> str: ...
    @property
    def clause(self) -> str: ...
    @property
    def summary(self) -> str: ...

@final
class Policy:
    """Which tolerances towards real peers hold. ``Policy.interop`` and ``Policy.strict`` are the two names.

    Args:
        base: the named policy whose switches hold where none is given.
        zero_length: accept descriptors of length 0 (they become no segment).
        mixed_order: accept device-readable descriptors after device-writable ones.
        duplicate_heads: accept a head (packed: id) that is already in flight.
        indirect_beyond_queue: accept indirect tables of more entries than the queue size, up to `max_indirect`.
        indirect_remainder: accept a table length that is no multiple of 16 (rounded down).
        packed_table_flags: ignore flags other than WRITE in a packed indirect table (else INDIRECT there is broken).
        avail_decrease: accept an avail index that goes back without passing what was consumed.
        used_len_beyond: clamp a used length above the writable size instead of refusing it (driver end).
        used_without_write: take the used length of a packed descriptor without WRITE as written bytes, if the buffer
            has so many (driver end).
        max_indirect: entries of one indirect table at most, 1 to 65536.
    """

    interop: Final[Policy]
    strict: Final[Policy]

    def __new__(
        cls,
        base: Literal["interop", "strict"] = "interop",
        *,
        zero_length: bool | None = None,
        mixed_order: bool | None = None,
        duplicate_heads: bool | None = None,
        indirect_beyond_queue: bool | None = None,
        indirect_remainder: bool | None = None,
        packed_table_flags: bool | None = None,
        avail_decrease: bool | None = None,
        used_len_beyond: bool | None = None,
        used_without_write: bool | None = None,
        max_indirect: int | None = None,
    ) -> Policy: ...
    def switches(self) -> dict[str, bool | int]:
        """Every switch by name, `max_indirect` included."""
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Region:
    """One stretch of guest memory: `size` bytes at `address`, backed by `fd` at `offset`; None: anonymous or remote."""

    @property
    def address(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def fd(self) -> int | None: ...
    @property
    def offset(self) -> int: ...
    @property
    def writable(self) -> bool: ...
    @property
    def remote(self) -> bool:
        """Whether it is reached through the functions of `GuestMemory.add_remote`."""
    @property
    def lost(self) -> bool:
        """Whether its file was found cut short: it is zeros from there on, and nobody sees what is written."""

@final
class Access:
    """One access to traced memory: `kind` is ``load``, ``store``, ``read``, ``write`` or ``fence``."""

    @property
    def kind(self) -> Literal["load", "store", "read", "write", "fence"]: ...
    @property
    def address(self) -> int: ...
    @property
    def length(self) -> int: ...

@final
class Trace:
    """Records every access that queues and chains make to a memory, and can change memory in between.

    `load` and `store` are single ring words (2, 4 or 8 bytes); `read` and `write` are copies. Accesses are
    numbered from 0 since the last `clear()`.
    """

    def __new__(cls) -> Trace: ...
    def log(self) -> list[Access]:
        """All accesses since the last `clear()`, oldest first."""
    def clear(self) -> None:
        """Forget the log and the changes that are still planned; numbering starts at 0 again."""
    def change_at(self, number: int, address: int, data: Buffer) -> None:
        """Write `data` to `address` just before access `number` happens, as a racing other side would."""
    def end_at(self, number: int) -> None:
        """Write nothing from access `number` on, as if all went well: what a process that is killed there leaves."""
    @property
    def count(self) -> int:
        """Accesses since the last `clear()`."""
    @property
    def missed(self) -> int:
        """Changes since the last `clear()` that could not be made: not mapped for writing at that moment."""

@final
class DirtyLog:
    """A dirty log for whoever reads it: `size` bytes of a file to share, a bit for each 4096 bytes from address 0."""

    def __new__(cls, size: int) -> DirtyLog: ...
    @property
    def fd(self) -> int: ...
    @property
    def size(self) -> int: ...
    def take(self) -> list[int]:
        """The numbers of the pages that are marked, ascending; they are marked no more."""

@final
class Missing:
    """A translation that the next chain of a queue cannot be read without; see `DeviceQueue.missing`."""

    @property
    def address(self) -> int:
        """First address without one."""
    @property
    def length(self) -> int:
        """Bytes from there to the end of the buffer (or indirect table), at least 1."""
    @property
    def writable(self) -> bool:
        """Whether it is wanted for writing."""
    @property
    def violation(self) -> QueueViolation:
        """The rule that the driver has broken if the translation does not come."""

@final
class GuestMemory:
    """Guest memory: a table of regions that never overlap, with an epoch that grows at each change of the table.

    Whoever else has the file of a region can cut it short, unless it is sealed. What meets this makes the region
    `lost`. From then on copies from and to it raise `RuleViolation` ("MemoryLost"), and queues that use it latch.

    Args:
        regions: pairs of (guest address, size in bytes), mapped at once. Address and size are multiples of 4096.
        backing: ``memfd`` (can be shared with another process) or ``anonymous``.
        trace: records every access of queues and chains; costs speed, for tests and tools.
    """

    def __new__(
        cls,
        regions: Sequence[tuple[int, int]] = (),
        *,
        backing: Literal["memfd", "anonymous"] = "memfd",
        trace: Trace | None = None,
    ) -> GuestMemory: ...
    @property
    def epoch(self) -> int: ...
    @property
    def regions(self) -> list[Region]: ...
    @property
    def trace(self) -> Trace | None: ...
    def add_region(
        self, address: int, size: int, *, fd: int | None = None, offset: int = 0, writable: bool = True
    ) -> None:
        """Map `size` bytes of `fd` from `offset` (duplicated; ours stays open), or fresh memory when `fd` is None.

        Raises:
            InvalidArgument: overlap, more than 509 regions, a size of 0, a wrap, or a file shorter than the region.
        """
    def add_remote(
        self,
        address: int,
        size: int,
        *,
        read: Callable[[int, int], Buffer],
        write: Callable[[int, bytes], object] | None,
    ) -> None:
        """Memory that cannot be mapped: `read(address, length)` gives its bytes, `write(address, data)` takes them.

        `write=None` is read-only; `address` and `size` are multiples of 8. Each access is one call, of 1 MiB at most;
        that of a ring word, of 2, 4 or 8 bytes, must be made whole. Calls come from any thread, may wait, and must not
        use queues or this memory (`StateError`). What they raise, or a wrong length, makes the access fail as unmapped
        memory does, and is the `__cause__`; what is no `Exception` (KeyboardInterrupt) makes all later accesses of the
        operation fail too, and is raised in place of its result.
        """
    def remove_region(self, address: int, size: int) -> None:
        """Unmap exactly that region; returns after running copies have ended."""
    def replace(self, regions: Sequence[tuple[int, int, int, int]]) -> None:
        """Put a whole new table of (address, size, fd, offset) in place, or change nothing and raise."""
    def follow(self, other: GuestMemory) -> None:
        """Show the regions of `other` as they are now, at the same addresses; what was here goes."""
    def translate(
        self,
        other: GuestMemory,
        *,
        remove: Sequence[int] = (),
        add: Sequence[tuple[int, int, int, bool, bool]] = (),
    ) -> None:
        """Be the memory of an IOMMU, which shows parts of `other`; all in one change of the table.

        The first time everything that was here goes, and from then on what is shown nowhere is missing rather than
        unmapped: a queue that comes to it waits (`DeviceQueue.missing`). `follow` and `replace` end that.

        Args:
            other: whose bytes are shown; they stay mapped as long as they are.
            remove: addresses of parts, as they were added, that are shown no more.
            add: (address, size, address in `other`, readable, writable); multiples of 8, each in one region of `other`.

        Raises:
            InvalidArgument: a part is not in `other`, two overlap, or there are more than 4096; nothing was changed.
        """
    def start_log(self, fd: int, size: int, *, offset: int = 0, elsewhere: Sequence[tuple[int, int, int]] = ()) -> None:
        """From now on mark each page that is written through this memory, in `size` bytes of `fd` from `offset` on.

        Queues, chains and the methods of this object mark; a live view does not. Bits count the pages of 4096 bytes
        from address 0 on (of an IOMMU's memory: the addresses in the memory that it shows); pages beyond the log are
        not marked. Returns after running copies, which mark the log before this one, have ended.

        Args:
            fd: the file, duplicated.
            size: bytes.
            offset: where they begin.
            elsewhere: (address, size, other address): what is written there is marked at the other address.

        Raises:
            InvalidArgument: the file cannot be mapped, or is shorter.
        """
    def stop_log(self) -> None:
        """Mark nothing any more; returns after running copies have ended."""
    @property
    def log_size(self) -> int:
        """Bytes of the dirty log; 0 when there is none."""
    def read(self, address: int, length: int) -> bytes: ...
    def read_into(self, address: int, buffer: Buffer) -> None:
        """Fill the whole writable, contiguous `buffer` from `address` on."""
    def write(self, address: int, data: Buffer) -> None: ...
    def fill(self, address: int, length: int, value: int = 0) -> None: ...
    def copy(self, destination: int, source: int, length: int) -> None:
        """Copy inside guest memory; overlapping ranges behave as if `source` was read whole first."""
    def is_mapped(self, address: int, length: int) -> bool:
        """Whether regions, remote ones included, hold all of it."""
    def live_view(self, address: int, length: int, *, writable: bool = False) -> memoryview:
        """A view of the bytes themselves, which the other side can change at any time; keeps the mapping alive.

        The range must lie in one region that is not remote, else `InvalidArgument`. What is written through it is not
        marked in a dirty log.
        """

@final
class RingLayout:
    """Where the fields of one virtqueue lie: addresses in guest memory (offsets, when the bases are 0)."""

    def __new__(
        cls, size: int, *, packed: bool = False, desc: int = 0, driver: int = 0, device: int = 0
    ) -> RingLayout: ...
    @staticmethod
    def contiguous(size: int, base: int, *, packed: bool = False) -> RingLayout:
        """The three areas one after another from `base` on (a multiple of 16), each aligned as 2.7 and 2.8 ask."""
    @staticmethod
    def legacy(size: int, base: int, *, align: int = 4096) -> RingLayout:
        """The layout of 2.7.2: the used ring at a multiple of `align`, a power of two >= 16; `base` is one too."""
    @property
    def size(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def desc(self) -> int: ...
    @property
    def driver(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def desc_bytes(self) -> int: ...
    @property
    def driver_bytes(self) -> int: ...
    @property
    def device_bytes(self) -> int: ...
    @property
    def end(self) -> int:
        """First address after all three areas."""
    def fields(self) -> dict[str, tuple[int, int, int, int]]:
        """Every field: name → (address of the first, size in bytes, stride, count).

        Split: desc.addr, desc.len, desc.flags, desc.next, avail.flags, avail.idx, avail.ring, used_event,
        used.flags, used.idx, used.ring.id, used.ring.len, avail_event. Packed: desc.addr, desc.len, desc.id,
        desc.flags, driver_event.off_wrap, driver_event.flags, device_event.off_wrap, device_event.flags.
        """
    def at(self, field: str, index: int = 0) -> int:
        """Address of entry `index` of `field`; InvalidArgument for an unknown name or an index beyond its count."""

@final
class QueueState:
    """Where a stopped queue stands. Split: 16-bit indices. Packed: 15-bit offset with the wrap counter in bit 15."""

    def __new__(cls, avail: int, used: int | None = None) -> QueueState: ...
    @property
    def avail(self) -> int: ...
    @property
    def used(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class QueueConfig:
    """All that a queue is made of: validated when a queue is built from it.

    Args:
        size: number of descriptors. Split: a power of two up to 32768; packed: 1 to 32768.
        desc: address of the descriptor table (split) or ring (packed).
        driver: address of the avail ring (split) or driver event area (packed).
        device: address of the used ring (split) or device event area (packed).
        index: number of the queue in its device, for messages.
        features: negotiated bits; INDIRECT_DESC 28, EVENT_IDX 29, RING_PACKED 34, IN_ORDER 35 count, NOTIFY_ON_EMPTY
            24 unless VERSION_1 32 is negotiated too; those from 64 on concern no queue and are dropped.
        policy: tolerances towards the other side.
    """

    def __new__(
        cls,
        size: int,
        *,
        desc: int,
        driver: int,
        device: int,
        index: int = 0,
        features: int = 0,
        policy: Policy = ...,
    ) -> QueueConfig: ...
    @staticmethod
    def from_layout(layout: RingLayout, *, index: int = 0, features: int = 0, policy: Policy = ...) -> QueueConfig:
        """The same from a layout; RING_PACKED in `features` is set as the layout says."""
    @property
    def size(self) -> int: ...
    @property
    def desc(self) -> int: ...
    @property
    def driver(self) -> int: ...
    @property
    def device(self) -> int: ...
    @property
    def index(self) -> int: ...
    @property
    def features(self) -> int: ...
    @property
    def packed(self) -> bool: ...
    @property
    def policy(self) -> Policy: ...
    def layout(self) -> RingLayout: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class Notifier:
    """How one end wakes the other: an eventfd, any fd that takes 8 bytes (a pipe), or a Python callback."""

    @staticmethod
    def eventfd() -> Notifier:
        """A new eventfd, non-blocking."""
    @staticmethod
    def from_fd(fd: int) -> Notifier:
        """Write to a duplicate of `fd`; a full pipe or counter is not an error, nothing blocks."""
    @staticmethod
    def callback(function: Callable[[], object]) -> Notifier:
        """Call `function()` in the thread that notifies."""
    def notify(self) -> None: ...
    def fileno(self) -> int:
        """The fd to wait on; `InvalidArgument` for a callback."""
    def drain(self) -> int:
        """Take the count of an eventfd, or all bytes of a pipe (divided by 8); 0 when there is none. Never blocks."""
    @property
    def count(self) -> int:
        """How often `notify` was called on this object."""

@final
class Player:
    """Plays a `RingCase` at our ends in one call; `virtio_test.strategies` does it where that comes to the same."""

    def __new__(cls, kinds: Sequence[type], *, index: int) -> Player: ...
    def play(
        self, memory: GuestMemory, case: object, policy: Policy
    ) -> (
        tuple[
            int,
            str | None,
            bool,
            tuple[tuple[tuple[int, int, bool], ...], ...] | None,
            tuple[tuple[int, int], ...] | None,
        ]
        | None
    ):
        """Chains or used buffers, the rule, whether the end was built, segments, used; None for what is unusual.

        `memory` has the regions of the case, and is zeros, now and afterwards. What is no `Exception`
        (KeyboardInterrupt) is raised.
        """

@final
class Poller:
    """Waits for readable fds with the GIL released; `wake()` from any thread ends a wait."""

    def __new__(cls) -> Poller: ...
    def add(self, fd: int) -> None: ...
    def remove(self, fd: int) -> None: ...
    def wait(self, timeout: float | None = None) -> list[int]:
        """fds readable, closed by the peer or in error; empty after `timeout` seconds or `wake()`; signals are seen."""
    def wake(self) -> None: ...

@final
class Counters:
    """What has happened at one end of a queue since it was built or reset."""

    @property
    def popped(self) -> int: ...
    @property
    def pushed(self) -> int: ...
    @property
    def dropped(self) -> int:
        """Completions that came after a reset or a latch."""
    @property
    def rejected(self) -> int:
        """Chains that were completed with 0 bytes because they did not fit the handler (too short, too small)."""
    @property
    def notified(self) -> int: ...
    @property
    def suppressed(self) -> int:
        """Notifications that the other side had not asked for."""

@final
class Chain:
    """One validated descriptor chain, popped and not yet pushed. Usable until pushed, put back or reset."""

    @property
    def head(self) -> int:
        """Head descriptor index (split) or buffer id (packed)."""
    @property
    def queue_index(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def descriptors(self) -> int:
        """Number of descriptors walked, those of indirect tables included."""
    @property
    def readable(self) -> int:
        """Bytes that the device may read, all segments together."""
    @property
    def writable(self) -> int:
        """Bytes that the device may write, all segments together."""
    @property
    def written(self) -> int:
        """End of the furthest byte written so far, counted from the start of the writable part."""
    @property
    def segments(self) -> list[tuple[int, int, bool]]:
        """(guest address, length, device-writable) of every non-empty descriptor, in order."""
    def read(self, length: int | None = None, *, offset: int = 0) -> bytes:
        """Up to `length` bytes (all, when None) of the readable part from `offset` on; short at its end."""
    def read_into(self, buffer: Buffer, *, offset: int = 0) -> int:
        """Fill `buffer` from the readable part; the number of bytes copied."""
    def write(self, data: Buffer, *, offset: int = 0) -> int:
        """Copy `data` into the writable part; the number of bytes copied (fewer when it ends)."""
    def fill(self, value: int = 0, *, offset: int = 0, length: int | None = None) -> int:
        """Set bytes of the writable part; the number of bytes set."""

@final
class InflightArea:
    """Memory of the other side in which the queues of a device record what they have in flight (vhost-user.rst).

    Args:
        size: bytes, a multiple of 8; the file has all of them.
        fd: its file, duplicated.
        offset: of the file, a multiple of 8.
        trace: numbers the accesses together with those to guest memory.
    """

    def __new__(cls, size: int, *, fd: int, offset: int = 0, trace: Trace | None = None) -> InflightArea: ...
    @property
    def size(self) -> int: ...
    def part(self, offset: int, entries: int) -> InflightPart:
        """The record of a queue of up to `entries` descriptors, from byte `offset` on, a multiple of 8."""

@final
class InflightPart:
    """Where the record of one queue lies; see `DeviceQueue`."""

    @staticmethod
    def bytes(entries: int, packed: bool) -> int:
        """How many bytes a record has."""
    @property
    def entries(self) -> int: ...
    def clear(self) -> None:
        """Make it one that nobody has written yet: nothing is in flight, and the ring may begin anew."""

@final
class Batch:
    """Several chains taken at once: requests in one buffer, responses from one buffer, one publication.

    A batch that is dropped before `respond` puts its chains back into the ring, newest first. An example is
    `examples/batch_device.py`.
    """

    def __len__(self) -> int:
        """The number of rows: of chains, without those that were left out by `requests`; 0 after `respond`."""
    def requests(self, itemsize: int) -> memoryview:
        """The first `itemsize` readable bytes of every chain, as a read-only view of shape (len * itemsize,) of bytes.

        A chain with fewer readable bytes is completed with 0 by `respond`, counted as rejected and left out, so the
        rows of the view are the batch's chains: read `len(batch)` after this call. ``numpy.frombuffer`` and
        ``memoryview.cast`` read the view in place; it stays valid after `respond`, for it is a copy.

        Raises:
            StaleChain: the batch was responded to already, or its queue was reset or latched.
            StaleMemory: a buffer is mapped no more, or the transfer from it failed.
            InvalidArgument: the rows are more bytes than there can be.
            QueueViolation: the memory is lost ("MemoryLost"); the queue is then latched.
        """
    def respond(self, responses: Buffer, *, itemsize: int | None = None) -> int:
        """Write row k to chain k, push all and publish once; the number pushed with a response.

        `responses` is any C-contiguous buffer of len(batch) rows of `itemsize` bytes, which is
        len(responses) / len(batch) when None. A chain with fewer writable bytes is completed with 0 and counted as
        rejected. Chains of a queue that was reset or latched meanwhile are dropped. The driver is then notified if it
        wants to be.

        Raises:
            InvalidArgument: other than a whole number of rows; the batch is as it was.
            StaleChain: the batch was responded to already.
            StaleMemory: buffers that are mapped no more: their chains were completed with 0, all others with their
                rows, and then it was raised.
            QueueViolation: the ring is mapped no more, or memory is lost; the queue is then latched.
        """

@final
class DeviceQueue:
    """The device end of one virtqueue, split or packed.

    Args:
        memory: where the rings and buffers lie.
        config: sizes, addresses, features and policy; `QueueViolation` when it, or `state`, is impossible.
        state: where to go on; a fresh ring when None.
        call: wakes the driver when chains were used.
        miss: wakes whoever can get translations when a chain lacks one; once for each `missing`.
        record: where to record what is in flight, and what to go on from: if there is a record already, it counts and
            `state` does not, and what was left is popped first. `MessageError` ("InflightState") when it is no record
            that this queue can have; it is unchanged then. A reset ends the recording, and leaves the record as it was.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        config: QueueConfig,
        *,
        state: QueueState | None = None,
        call: Notifier | None = None,
        miss: Notifier | None = None,
        record: InflightPart | None = None,
    ) -> DeviceQueue: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def config(self) -> QueueConfig: ...
    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def left(self) -> int:
        """Chains that an earlier device end left in its record, and that were not popped yet."""
    @property
    def keeps_record(self) -> bool: ...
    @property
    def latched(self) -> QueueViolation | None:
        """The violation that latched this queue; None while it works."""
    @property
    def missing(self) -> Missing | None:
        """What the last pop could not read a chain without, in the memory of an IOMMU (`GuestMemory.translate`).

        The chain is still in the ring, and there is no work until the memory has changed. If the translation is
        refused, `latch` the queue with the rule that this breaks.
        """
    @property
    def stopped(self) -> bool: ...
    @property
    def state(self) -> QueueState: ...
    @property
    def counters(self) -> Counters: ...
    def layout(self) -> RingLayout: ...
    def has_work(self) -> bool:
        """Whether a chain is available; if not, a kick is asked for. False when latched or stopped. Never raises."""
    def pop(self) -> Chain | None:
        """The next chain, wholly validated; None when there is none, or the queue is latched or stopped.

        Raises:
            QueueViolation: the driver broke a rule; once, then the queue is latched.
        """
    def pop_many(self, limit: int = 32) -> Batch:
        """Up to `limit` chains (1 to 32768); raises as `pop`, but hands out good chains before a broken one first."""
    def push(self, chain: Chain, written: int | None = None) -> bool:
        """Mark `chain` used with `written` bytes (default: `chain.written`) and publish it.

        False when it was dropped because the queue was reset or latched since the pop.

        Raises:
            InvalidArgument: `written` is more than the chain's writable bytes.
            ForeignChain, StaleChain: not this queue's chain, or completed or put back already.
        """
    def unpop(self, chain: Chain) -> None:
        """Put the newest popped chain back, as if it had not been popped.

        `StateError` when it is not the newest, or was left by an earlier device end: the ring has it no longer.
        """
    def put_back(self, chain: Chain) -> None:
        """Put any popped chain back: into the ring when it is the newest, else the next pop hands it out again.

        Guest memory is not touched. In the second case it stays in flight, and `state` does not tell of it. A chain of
        a queue that was reset or latched since is dropped.

        Raises:
            ForeignChain, StaleChain: as `push`.
        """
    def process(
        self,
        handler: Callable[[bytes], Buffer | None],
        *,
        limit: int = 32768,
        max_request: int = 16777216,
        max_bytes: int | None = None,
    ) -> int:
        """Pop chains, call `handler(request)` for each, write its response, push, and notify once at the end.

        Up to 32 chains are taken at a time, and completed together when all their handlers were called; nothing is
        locked while a handler runs. None means a response of 0 bytes. A response longer than the writable part is not
        written: the chain is completed with 0 and counted as rejected, and so is a request of more than `max_request`
        bytes, without the handler being asked. When the handler raises, earlier responses stay, the chain is kept
        (`take_failed`), later ones are put back, and the exception propagates; so it is with a chain whose memory has
        gone when its request is read or its response is written (`StaleMemory`), but others of its burst whose
        responses have none get 0 bytes.

        It ends with the chain that makes it `max_bytes` bytes read, written and charged (`charge`); None: no bound.

        Returns:
            The number of chains completed.
        """
    def charge(self, count: int) -> None:
        """For a handler of `process`: its request is as much work as `count` bytes more."""
    def process_batch(
        self,
        handler: Callable[[memoryview, memoryview], object],
        *,
        request_size: int,
        response_size: int,
        limit: int = 256,
    ) -> int:
        """Pop up to `limit` chains and call `handler(requests, responses)` once: rows of the two given sizes.

        `requests` is read-only, of shape (rows * request_size,) of bytes; `responses` is writable and zeroed, of shape
        (rows * response_size,). Row k of it is written to the chain of row k after the call; nothing is locked during
        the call. Chains that are too short or too small have no row: they are completed with 0 and counted as
        rejected. Without rows the handler is not called. When it raises, all chains are put back.

        Returns:
            The number of chains completed.

        Raises:
            InvalidArgument: a limit that is not 1 to 32768, or rows of more bytes than there can be.
            StaleMemory, QueueViolation: as `Batch.requests` (all chains are put back) and `Batch.respond`.
        """
    def take_failed(self) -> Chain | None:
        """A chain whose handler raised in `process`, once, newest first; the caller pushes it or puts it back."""
    def signal(self) -> bool:
        """Notify the driver if something was pushed since the last call and it wants to be told; whether it was."""
    def set_call(self, call: Notifier | None) -> None:
        """Wake the driver with `call` from now on, or not at all. From any thread."""
    def enable_kicks(self) -> bool:
        """Ask for kicks; True when work arrived meanwhile, so that no kick may come for it."""
    def disable_kicks(self) -> None: ...
    def latch(self, violation: QueueViolation) -> None:
        """Break the queue by decision of the device (a handler that failed); as if the driver had broken a rule."""
    def stop(self) -> QueueState:
        """No more pops; completions are still taken. The state to go on from counts unfinished chains as popped."""
    def resume(self) -> None:
        """Undo `stop`."""
    def reset(self, config: QueueConfig | None = None, *, state: QueueState | None = None) -> None:
        """A new generation: what was in flight is dropped, a latch is cleared, indices are fresh (or as `state`)."""

@disjoint_base
class Service:
    """A native handler: it answers the chains of its queues without Python. Make one of its subclasses.

    A service may be run by one `Worker` and by `turn` too: one turn waits for the other.
    """

    @property
    def queues(self) -> int:
        """How many queues it works on, in the order in which it is given them."""
    def turn(self, queues: Sequence[DeviceQueue], *, limit: int = 256, max_bytes: int = 524288) -> tuple[int, bool]:
        """Answer up to `limit` chains (1 to 32768), end with the one that makes it `max_bytes` bytes; wake the driver.

        Memory is pinned and the queues are locked meanwhile, the GIL is released. Of every kind of memory.

        Returns:
            How many chains were answered, and whether it ended at a bound, so that there may be more.

        Raises:
            QueueViolation: the driver broke a rule; that queue is latched. What was answered before is visible, and the
                driver is told, whatever is raised.
            InvalidArgument: another number of queues than `queues`, one twice, or of several memories.
        """
    def arm(self, queues: Sequence[DeviceQueue]) -> bool:
        """Ask for the kicks that the service wants; True when there is work already, so that none may come for it.

        Raises:
            QueueViolation, InvalidArgument: as `turn`.
        """

@final
class EntropyService(Service):
    """Fills buffers with random bytes of the operating system (VIRTIO 1.4, 5.4); one queue.

    Args:
        limit: bytes that one buffer gets at most, from 1.
    """

    def __new__(cls, *, limit: int = 65536) -> EntropyService: ...
    @property
    def counters(self) -> dict[str, int]:
        """``delivered`` bytes, ``odd`` buffers that a driver must not put in, ``failed`` ones that got too little."""

@final
class FileService(Service):
    """Answers block requests (VIRTIO 1.4, 5.2) from a file, as `devices.blk.BlkDevice` does; one queue.

    Mapped memory that nobody logs or traces is read and written by the operating system directly. Before `agree` the
    device has no sectors.

    Args:
        fd: the file, duplicated; open for reading, and for writing unless nothing is ever to be written.
        serial: the device ID string, 20 bytes.
        lifetime: what GET_LIFETIME answers, 6 bytes.
        max_discard: sectors of a segment and segments of a request.
        max_write_zeroes: the same.
    """

    def __new__(
        cls,
        fd: int,
        *,
        serial: Buffer,
        lifetime: Buffer,
        max_discard: tuple[int, int],
        max_write_zeroes: tuple[int, int],
    ) -> FileService: ...
    def agree(
        self,
        *,
        capacity: int,
        read_only: bool,
        flush: bool,
        legacy: bool,
        write_through: bool,
        discard: bool,
        write_zeroes: bool,
        lifetime: bool,
    ) -> None:
        """What holds from the next request on. From any thread.

        Args:
            capacity: sectors of 512 bytes that the device has.
            read_only: writes are refused.
            flush: FLUSH is offered.
            legacy: VERSION_1 was not negotiated.
            write_through: a write is completed when it is stable (5.2.6.2).
            discard: DISCARD was negotiated.
            write_zeroes: WRITE_ZEROES was.
            lifetime: LIFETIME was.
        """
    @property
    def last_errno(self) -> int:
        """What the operating system said of the last of `host_errors`; 0 for none."""
    @property
    def counters(self) -> dict[str, int]:
        """The fields of `devices.blk.BlkCounters`."""

@final
class PacketService(Service):
    """The packet loop of a network device (VIRTIO 1.4, 5.1): one pair of queues, receive and transmit, in this order.

    Args:
        mode: ``loopback``: frames come back on the same pair; ``drop``: they go nowhere; ``generate``: so do they, and
            receive buffers are filled with frames that are made here.
        count: how many are made; without end when None.
    """

    def __new__(cls, mode: Literal["loopback", "drop", "generate"], *, count: int | None = None) -> PacketService: ...
    def set_up(
        self,
        *,
        header: int = 12,
        mergeable: bool = False,
        checksum: bool = False,
        guest_checksum: bool = False,
        longest: int = 65553,
        usable: bool = True,
        frame: bytes | None = None,
        number_at: int | None = None,
    ) -> None:
        """What was negotiated and is so from the next turn on; before the first call nothing is passed on.

        Args:
            header: bytes before each frame, 10 or 12.
            mergeable: a frame may be spread over several receive buffers.
            checksum: the driver may leave a checksum out.
            guest_checksum: it takes such a frame; else the checksum is completed.
            longest: bytes of the longest frame.
            usable: there is a link, and the pair is in use; else frames are dropped.
            frame: what is made.
            number_at: where in it its number goes, 8 big-endian bytes; nowhere when None.

        Raises:
            InvalidArgument: a size that cannot be.
        """
    @property
    def generated(self) -> int:
        """Frames made so far, which is the number of the next."""
    @generated.setter
    def generated(self, number: int) -> None: ...
    @property
    def counters(self) -> dict[str, int]:
        """``sent`` and ``received`` frames, ``sent_bytes`` and ``received_bytes``, ``dropped`` and ``broken`` ones."""
    def take_findings(self) -> list[tuple[str, str, str, int, int]]:
        """What the driver did wrong since the last call, 1000 at most: rule, clause, message, queue, head."""

@final
class Worker:
    """A thread that runs turns of a service without the GIL; it begins at once, and ends with `stop`.

    It is one of the process that made it: in a child of fork it does not run, and all calls return at once. One that
    still runs when the interpreter ends is stopped first; one that is dropped is stopped, too.

    While it runs the driver is asked for no kicks. With nothing to do it looks at the rings for a while (`wait`), asks
    for kicks, looks once more, and waits for `kicks` or `wake`.

    Args:
        service: what answers the chains.
        queues: as many as the service works on, of one memory.
        kicks: eventfds or pipes on which the driver's kicks arrive, duplicated; the worker alone reads them.
        wait: ``blocking``; ``adaptive``: look at the rings for `spin` microseconds first; ``busy``: look at them all
            the time. A worker whose queues are all latched or stopped never spins.
        spin: microseconds, up to a second.
        cpu: the CPU to run on; any, when None.
        tell: wakes the owner when it must see to something: a queue is latched, turns have to be made `elsewhere`, a
            kick fd is waited for no longer (`deaf`), or the file of a service has failed.
        limit: chains of one turn.
        max_bytes: bytes of one turn; see `Service.turn`.

    Raises:
        InvalidArgument: as `Service.turn`; `wait`, `spin` or a kick that cannot be; a CPU that is not ours.
        OSError: there is no thread or fd to be had.
    """

    def __new__(
        cls,
        service: Service,
        queues: Sequence[DeviceQueue],
        kicks: Sequence[int] = (),
        *,
        wait: Literal["blocking", "adaptive", "busy"] = "blocking",
        spin: float = 50.0,
        cpu: int | None = None,
        tell: Notifier | None = None,
        limit: int = 256,
        max_bytes: int = 524288,
    ) -> Worker: ...
    def wake(self) -> None:
        """Have it look at its queues, if it waits. From any thread."""
    def set_kicks(self, fds: Sequence[int]) -> None:
        """Wait for kicks on these fds from now on."""
    def park(self) -> None:
        """Return when no turn runs and none will begin before `resume`. Parks nest.

        `StateError` in its own thread, in a callback that it has called, and in a function that reads or writes remote
        memory.
        """
    def resume(self) -> None:
        """Undo one `park`; it looks at its queues then. `StateError` when it is not parked."""
    def stop(self) -> None:
        """End it when its turn has ended; once more does nothing. Kicks may be suppressed then: look at the queues.

        `StateError` in a function that reads or writes remote memory.
        """
    @property
    def parked(self) -> bool: ...
    @property
    def running(self) -> bool:
        """Whether its thread lives."""
    @property
    def elsewhere(self) -> bool:
        """Whether its last turn was not made: memory is remote, which only its owner reaches (`Service.turn`)."""
    @property
    def deaf(self) -> bool:
        """Whether a kick fd is waited for no longer: its other end is closed, or it is ready and holds nothing."""
    @property
    def broken(self) -> list[int]:
        """The queues in which its turns have found a rule broken, by number; `DeviceQueue.latched` says which."""
    @property
    def turns(self) -> int: ...
    @property
    def chains(self) -> int:
        """Chains answered so far."""

@final
class DriverQueue:
    """The driver end of one virtqueue, split or packed; keeps private shadow state and trusts nothing it reads.

    Args:
        memory: where the rings and buffers lie.
        config: sizes, addresses, features and policy.
        state: where to go on; a fresh ring when None. A fresh ring's areas are zeroed first.
        kick: wakes the device when chains were made available.
        indirect: address of `size * indirect_entries * 16` bytes for indirect tables; None for none.
        indirect_entries: entries of each table.
    """

    def __new__(
        cls,
        memory: GuestMemory,
        config: QueueConfig,
        *,
        state: QueueState | None = None,
        kick: Notifier | None = None,
        indirect: int | None = None,
        indirect_entries: int = 16,
    ) -> DriverQueue: ...
    @property
    def memory(self) -> GuestMemory: ...
    @property
    def config(self) -> QueueConfig: ...
    @property
    def index(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def generation(self) -> int: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def free(self) -> int:
        """Descriptors that are free."""
    @property
    def latched(self) -> QueueViolation | None: ...
    @property
    def state(self) -> QueueState: ...
    @property
    def counters(self) -> Counters: ...
    def layout(self) -> RingLayout: ...
    def add(
        self,
        readable: Sequence[tuple[int, int]],
        writable: Sequence[tuple[int, int]] = (),
        *,
        indirect: bool = False,
    ) -> int:
        """Build a chain from (address, length) pairs; not visible to the device before `publish` or `signal`.

        Returns:
            A token, unique in this queue's life, that `get_used` gives back.

        Raises:
            QueueFull: not enough free descriptors.
            InvalidArgument: no buffers, more than the queue or table holds, a length of 0 or above 2**32 - 1.
            NoFeature: `indirect` without INDIRECT_DESC negotiated or without room given for tables.
        """
    def add_many(self, chains: Sequence[tuple[Sequence[tuple[int, int]], Sequence[tuple[int, int]]]]) -> list[int]:
        """Build chains from (readable, writable), each (address, length) pairs: as many as there is room for.

        Returns:
            The tokens of the first ones, one each: fewer than `chains` when the queue is full, or when the one behind
            is none, which the next call with it says.

        Raises:
            InvalidArgument: as `add`, of the first chain; a length above 2**32 - 1 in any, with nothing added.
            QueueViolation: the ring is no longer mapped; `detach` gives the tokens of those that were added.
        """
    def publish(self) -> int:
        """Make all added chains visible; their number."""
    def signal(self) -> bool:
        """`publish`, then kick the device if it wants to be told; whether it was kicked."""
    def has_used(self) -> bool: ...
    def get_used(self) -> tuple[int, int] | None:
        """(token, bytes written) of the next used chain, or None.

        Raises:
            QueueViolation: the device broke a rule; once, then the queue is latched.
        """
    def get_used_many(self, limit: int = 32768) -> list[tuple[int, int]]: ...
    def detach(self) -> list[int]:
        """Tokens of everything in flight, each once, oldest first; the queue is then empty and must be reset."""
    def enable_calls(self) -> bool:
        """Ask for calls; True when something was used meanwhile."""
    def disable_calls(self) -> None: ...
    def reset(self, config: QueueConfig | None = None, *, state: QueueState | None = None) -> None: ...
