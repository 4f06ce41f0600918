"""The block device (VIRTIO 1.4, 5.2), backed by a file or by memory.

Theory
------
A request is a header, data and a status byte, however it is cut into descriptors (2.7.4): the header is the first 16
readable bytes, the status byte is the last writable one, and data is what lies between. Its length is what the buffers
hold; nothing in the header says it.

**Judged whole, then done.** Type, length, sectors and flags are checked before the first byte of the image is touched.
What breaks a rule is answered IOERR, what this device does not do, or was not agreed upon, UNSUPP (5.2.6.2). With no
room for a status byte there is no answer: 0 bytes. Nothing of this breaks the device.

**The used length** covers the status byte, so all bytes before it count as written, and they are: what a request
leaves of its writable buffers is zeroed. A driver that reads no further than it may (2.7.8.3) always finds the status,
and never old memory.

**When a write is stable** (5.2.6.2): at its completion if the driver took neither FLUSH nor CONFIG_WCE although they
were on offer, or took CONFIG_WCE and `writeback` is 0; else when a flush that comes after it is completed.

**Native**: requests to an image in a file can be answered without Python (`_core.FileService`), by the same rules, in
the owner loop or in one thread for each queue.

Trouble of the host (EIO, ENOSPC, a file that became shorter) is an IOERR for that one request and a line in the log.
What earlier pieces of such a request have written stays written.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

from virtio_test._core import Chain, FileService
from virtio_test.config import ConfigLayout, ConfigSpace
from virtio_test.errors import InvalidArgument, SavedStateError
from virtio_test.features import FeatureSet
from virtio_test.spec.blk import (
    CONFIG_FIELDS,
    FEATURE_NAMES,
    FLUSH_OUT,
    HEADER,
    ID_SIZE,
    LIFETIME,
    LIFETIME_LIMITS,
    SECTOR,
    SEGMENT,
    SEGMENT_UNMAP,
    RequestStatus,
    RequestType,
)
from virtio_test.spec.ids import DeviceId

from .base import OnHandlerError
from .chains import CHUNK
from .image import FileImage, Image, RamImage
from .native import NativeDevice, WaitStrategy, threads

__all__ = ["CONFIG_LAYOUT", "BlkCounters", "BlkDevice"]

CONFIG_LAYOUT: Final = ConfigLayout(*CONFIG_FIELDS)

_QUEUE_SIZE: Final = 128
_MAX_DISCARD: Final = (1 << 16, 64)
_MAX_WRITE_ZEROES: Final = (1 << 13, 16)
"""Sectors of a segment and segments of a request: what one request can keep us busy with."""

_SYNC_WORK: Final = 1 << 20
"""Making the image stable counts as that many bytes of a turn's work."""

_OK, _IOERR, _UNSUPP = RequestStatus.OK, RequestStatus.IOERR, RequestStatus.UNSUPP


@dataclass(slots=True)
class BlkCounters:
    """What the device has met since it was made.

    Attributes:
        ok: requests done.
        ioerr: requests refused with IOERR, whoever was at fault.
        unsupp: requests refused with UNSUPP.
        no_status: requests without room for a status byte, completed with 0 bytes.
        host_errors: requests that failed because the image did.
        read: bytes that drivers have read.
        written: bytes that drivers have written.
        flushes: times that the image was made stable.
    """

    ok: int = 0
    ioerr: int = 0
    unsupp: int = 0
    no_status: int = 0
    host_errors: int = 0
    read: int = 0
    written: int = 0
    flushes: int = 0

    def as_dict(self) -> dict[str, int]:
        """The counters by name."""
        return asdict(self)


class BlkDevice(NativeDevice):
    """The block device.

    Args:
        image: path or descriptor of a file, a bytearray that is the image itself, or an `Image` of one's own. Its size
            is a multiple of 512 bytes.
        read_only: offer RO, fail writes, and open a path for reading only.
        block_size: the block size shown: a power of two from 512 to 32768. Requests count in 512 bytes all the same.
        num_queues: request queues; more than one offer MQ.
        queue_size: largest size of each.
        serial: the device ID string, 20 bytes of ASCII at most.
        write_cache: `writeback` after a reset, where the driver can change it.
        flush: offer FLUSH and CONFIG_WCE. Without them a write is as stable as the host's page cache.
        discard: offer DISCARD.
        write_zeroes: offer WRITE_ZEROES.
        size_max: bytes of the largest segment; None offers no SIZE_MAX.
        seg_max: segments of data in a request; `queue_size` less 2 when None.
        geometry: cylinders, heads, sectors; None offers no GEOMETRY.
        physical_block_exp: logical blocks per physical block, as a power of two.
        alignment_offset: the first aligned logical block.
        min_io_size: suggested smallest access in blocks.
        opt_io_size: suggested largest access in blocks.
        lifetime: wear of the storage, if that can be told: three values as 5.2.6 has them. None offers no LIFETIME.
        device_id: virtio device id.
        transitional: serve a driver without VERSION_1 too.
        on_handler_error: what becomes of a request when an `Image` raises anything but OSError.
        native: answer from the file without Python.
        wait: how the threads of a native device wait, one for each queue; None serves in the owner loop.
        spin: microseconds that an ``adaptive`` one looks at the rings.
        cpus: the CPUs that its threads run on, over and over; any, when None.

    Attributes:
        image: the image.

    Raises:
        InvalidArgument: an image that cannot be used, or a value that the configuration space cannot show.
    """

    def __init__(
        self,
        image: str | os.PathLike[str] | int | bytearray | Image,
        *,
        read_only: bool = False,
        block_size: int = SECTOR,
        num_queues: int = 1,
        queue_size: int = _QUEUE_SIZE,
        serial: str = "virtio-test",
        write_cache: bool = True,
        flush: bool = True,
        discard: bool = True,
        write_zeroes: bool = True,
        size_max: int | None = None,
        seg_max: int | None = None,
        geometry: tuple[int, int, int] | None = None,
        physical_block_exp: int = 0,
        alignment_offset: int = 0,
        min_io_size: int = 1,
        opt_io_size: int = 0,
        lifetime: tuple[int, int, int] | None = None,
        device_id: int = DeviceId.BLOCK,
        transitional: bool = True,
        on_handler_error: OnHandlerError = "broken",
        native: bool = False,
        wait: WaitStrategy | None = None,
        spin: float = 50.0,
        cpus: Sequence[int] | None = None,
    ) -> None:
        if block_size & (block_size - 1) or not SECTOR <= block_size <= 32768:
            raise InvalidArgument(f"block size {block_size} is no power of two from 512 to 32768")
        if not 1 <= num_queues <= 0xFFFF:
            raise InvalidArgument(f"{num_queues} request queues; 1 to 65535 are possible")
        if not serial.isascii() or len(serial) > ID_SIZE:
            raise InvalidArgument(f"serial {serial!r} is not ASCII, or longer than {ID_SIZE} bytes")
        if lifetime is not None and not all(
            0 <= each <= limit for each, limit in zip(lifetime, LIFETIME_LIMITS, strict=True)
        ):
            raise InvalidArgument(f"lifetime {lifetime} is beyond {LIFETIME_LIMITS}, which is reserved")
        how = threads(native=native, wait=wait, spin=spin, cpus=cpus)
        self.image = _open(image, read_only=read_only)
        if native and not isinstance(self.image, FileImage):
            raise InvalidArgument(f"{self.image!r} is no file: a native device answers from one")
        changes = not read_only
        offered = [
            ("RO", read_only),
            ("BLK_SIZE", True),
            ("SEG_MAX", True),
            ("TOPOLOGY", True),
            ("FLUSH", flush),
            ("CONFIG_WCE", flush),
            ("MQ", num_queues > 1),
            ("DISCARD", discard and changes),
            ("WRITE_ZEROES", write_zeroes and changes),
            ("SIZE_MAX", size_max is not None),
            ("GEOMETRY", geometry is not None),
            ("LIFETIME", lifetime is not None),
        ]
        features = FeatureSet(*(name for name, offer in offered if offer), device=FEATURE_NAMES)
        cylinders, heads, sectors = geometry or (0, 0, 0)
        values = {
            "capacity": self._sectors(),
            "size_max": size_max or 0,
            "seg_max": max(1, queue_size - 2) if seg_max is None else seg_max,
            "cylinders": cylinders,
            "heads": heads,
            "sectors": sectors,
            "blk_size": block_size,
            "physical_block_exp": physical_block_exp,
            "alignment_offset": alignment_offset,
            "min_io_size": min_io_size,
            "opt_io_size": opt_io_size,
            "writeback": int(write_cache and flush),
            "num_queues": num_queues if num_queues > 1 else 0,
        }
        if "DISCARD" in features:
            values.update(
                max_discard_sectors=_MAX_DISCARD[0],
                max_discard_seg=_MAX_DISCARD[1],
                discard_sector_alignment=block_size // SECTOR,
            )
        if "WRITE_ZEROES" in features:
            values.update(
                max_write_zeroes_sectors=_MAX_WRITE_ZEROES[0],
                max_write_zeroes_seg=_MAX_WRITE_ZEROES[1],
                write_zeroes_may_unmap=1,
            )
        self._serial = serial.encode("ascii").ljust(ID_SIZE, b"\0")
        services = [self._service(self.image, lifetime, self._serial) for _ in range(num_queues) if native]
        super().__init__(
            device_id,
            services={(index,): service for index, service in enumerate(services)},
            threads=how,
            chains={} if native else dict.fromkeys(range(num_queues), self.answer),
            queue_sizes=(queue_size,) * num_queues,
            features=features,
            config=ConfigSpace(CONFIG_LAYOUT, **values),
            transitional=transitional,
            on_handler_error=on_handler_error,
        )
        self.config.on_driver_write = self._config_written
        self.read_only = read_only
        self.write_cache = write_cache and flush
        self.lifetime = lifetime
        self._services = services
        self._counters = BlkCounters()
        self._failures = 0
        self._buffer = memoryview(bytearray(CHUNK))
        self._write_through = False
        self._agree()

    @staticmethod
    def _service(image: Image, lifetime: tuple[int, int, int] | None, serial: bytes) -> FileService:
        assert isinstance(image, FileImage)
        return FileService(
            image.fileno(),
            serial=serial,
            lifetime=LIFETIME.pack(*(lifetime or (0, 0, 0))),
            max_discard=_MAX_DISCARD,
            max_write_zeroes=_MAX_WRITE_ZEROES,
        )

    @property
    def counters(self) -> BlkCounters:
        """What it has met, of all its queues."""
        if not self._services:
            return self._counters
        met = [service.counters for service in self._services]
        return BlkCounters(**{name: sum(each[name] for each in met) for name in met[0]})

    def close(self) -> None:
        """Let go of the image. The device must not be used any more."""
        super().close()
        self.image.close()

    def refresh_capacity(self) -> int:
        """Look at the image's size again, and tell the driver if it has changed (5.2.6.2); in sectors.

        Raises:
            InvalidArgument: it is no multiple of 512 bytes any more.
        """
        self.config.update(capacity=self._sectors())
        self._agree()
        return self.config.capacity

    # --- what the driver agrees upon ------------------------------------------------------------------------

    def activate(self, features: FeatureSet) -> None:
        """See `Device.activate`; the cache mode follows what was negotiated (5.2.5.2, 5.2.5.3)."""
        flush = "FLUSH" in features
        if "CONFIG_WCE" not in features:
            self.config.update(writeback=int(flush))
        elif not flush and "VERSION_1" in features:
            self.config.update(writeback=0)
        super().activate(features)
        self._settle_cache()

    def reset(self) -> None:
        """See `Device.reset`; the cache mode is the first one again."""
        super().reset()
        self.config.update(writeback=int(self.write_cache))

    def _config_written(self, _: tuple[str, ...]) -> None:
        if self.active and "CONFIG_WCE" not in self.negotiated:
            self.config.update(writeback=int("FLUSH" in self.negotiated))
        elif self.config.writeback > 1:
            self.config.update(writeback=1)
        self._settle_cache()

    def _settle_cache(self) -> None:
        negotiated = self.negotiated
        if "CONFIG_WCE" in negotiated:
            self._write_through = self.config.writeback == 0
        else:
            self._write_through = "FLUSH" in self.features and "FLUSH" not in negotiated
        self._agree()

    def _agree(self) -> None:
        """Tell the services what holds from now on."""
        negotiated = self.negotiated
        for service in self._services:
            service.agree(
                capacity=self.config.capacity,
                read_only=self.read_only,
                flush="FLUSH" in self.features,
                legacy="VERSION_1" not in negotiated,
                write_through=self._write_through,
                discard="DISCARD" in negotiated,
                write_zeroes="WRITE_ZEROES" in negotiated,
                lifetime=self.lifetime is not None and "LIFETIME" in negotiated,
            )

    # --- requests -------------------------------------------------------------------------------------------

    def lost(self, chain: Chain) -> None:
        """See `ChainDevice.lost`: drivers that look at the status byte alone must not find an old one there."""
        self.counters.ioerr += 1
        if chain.writable:
            chain.write(bytes((_IOERR,)), offset=chain.writable - 1)

    def answer(self, chain: Chain) -> int:
        """Do one request, and say how many bytes of its writable part are used: all, or none where no status fits."""
        if not chain.writable:
            self.counters.no_status += 1
            return 0
        header = chain.read(HEADER.size)
        produced = 0
        if len(header) < HEADER.size:
            status = _IOERR
        else:
            kind, _, sector = HEADER.unpack(header)
            try:
                status, produced = self._do(chain, kind, sector)
            except OSError as error:
                status = _IOERR
                self._host_failed(kind, error)
        if status is _OK:
            self.counters.ok += 1
        elif status is _IOERR:
            self.counters.ioerr += 1
        else:
            self.counters.unsupp += 1
        room = chain.writable - 1
        if produced < room:
            chain.fill(0, offset=produced, length=room - produced)
        chain.write(bytes((status,)), offset=room)
        return room + 1

    def _do(self, chain: Chain, kind: int, sector: int) -> tuple[RequestStatus, int]:
        """Do one request: its status, and how many bytes of its writable data are produced."""
        if kind == RequestType.IN:
            return self._in(chain, sector)
        if kind == RequestType.OUT:
            return self._out(chain, sector), 0
        if kind == RequestType.FLUSH or (kind == FLUSH_OUT and "VERSION_1" not in self.negotiated):
            # Offered is enough: a legacy driver may flush without having negotiated it (5.2.6.3).
            return self._flush(), 0
        if kind == RequestType.GET_ID:
            return self._give(chain, self._serial)
        if kind == RequestType.GET_LIFETIME and self.lifetime is not None and "LIFETIME" in self.negotiated:
            return self._give(chain, LIFETIME.pack(*self.lifetime))
        if kind == RequestType.DISCARD and "DISCARD" in self.negotiated:
            return self._segments(chain, discard=True), 0
        if kind == RequestType.WRITE_ZEROES and "WRITE_ZEROES" in self.negotiated:
            return self._segments(chain, discard=False), 0
        return _UNSUPP, 0

    def _in(self, chain: Chain, sector: int) -> tuple[RequestStatus, int]:
        length = chain.writable - 1
        if not self._within(sector, length):
            return _IOERR, 0
        for done in range(0, length, CHUNK):
            piece = self._buffer[: min(CHUNK, length - done)]
            self.image.read_into(piece, sector * SECTOR + done)
            chain.write(piece, offset=done)
        self.counters.read += length
        return _OK, length

    def _out(self, chain: Chain, sector: int) -> RequestStatus:
        length = chain.readable - HEADER.size
        if self.read_only or not self._within(sector, length):
            return _IOERR
        for done in range(0, length, CHUNK):
            piece = self._buffer[: min(CHUNK, length - done)]
            chain.read_into(piece, offset=HEADER.size + done)
            self.image.write(piece, sector * SECTOR + done)
            self.counters.written += len(piece)
        return self._stable()

    def _flush(self) -> RequestStatus:
        if "FLUSH" not in self.features:
            return _UNSUPP
        self._sync()
        return _OK

    def _give(self, chain: Chain, data: bytes) -> tuple[RequestStatus, int]:
        if chain.writable - 1 != len(data):
            return _IOERR, 0
        return _OK, chain.write(data)

    def _segments(self, chain: Chain, *, discard: bool) -> RequestStatus:
        config, length = self.config, chain.readable - HEADER.size
        name = "discard" if discard else "write_zeroes"
        if not 0 < length <= config[f"max_{name}_seg"] * SEGMENT.size or length % SEGMENT.size:
            return _IOERR
        segments = list(SEGMENT.iter_unpack(chain.read(length, offset=HEADER.size)))
        allowed = 0 if discard else SEGMENT_UNMAP
        if any(flags & ~allowed for _, _, flags in segments):
            return _UNSUPP
        for sector, count, _ in segments:
            if count > config[f"max_{name}_sectors"] or not self._within(sector, count * SECTOR):
                return _IOERR
        for sector, count, flags in segments:
            # One of no sectors is a call to the host all the same.
            self.charge(max(count, 1) * SECTOR)
            if discard:
                self.image.discard(sector * SECTOR, count * SECTOR)
            else:
                self.image.zero(sector * SECTOR, count * SECTOR, unmap=bool(flags & SEGMENT_UNMAP))
        return _OK if discard else self._stable()

    def _within(self, sector: int, length: int) -> bool:
        """Whole sectors that the image has (5.2.6.1)."""
        return not length % SECTOR and sector * SECTOR + length <= self.config.capacity * SECTOR

    def _stable(self) -> RequestStatus:
        if self._write_through:
            self._sync()
        return _OK

    def _sync(self) -> None:
        self.charge(_SYNC_WORK)
        self.counters.flushes += 1
        self.image.sync()

    def noticed(self) -> None:
        """See `NativeDevice.noticed`: failures of the file that services have met."""
        before, self._failures = self._failures, sum(each.counters["host_errors"] for each in self._services)
        # As many as there were, if one of them would have been written down.
        if before.bit_length() != self._failures.bit_length():
            error = max(each.last_errno for each in self._services)
            self._log_failure("a request", self._failures, OSError(error, os.strerror(error)))

    def _host_failed(self, kind: int, error: OSError) -> None:
        self.counters.host_errors += 1
        count = self.counters.host_errors
        # A driver can ask again and again: the 1st, 2nd, 4th, 8th … is written down.
        if not count & (count - 1):
            self._log_failure(f"request type {kind}", count, error)

    def _log_failure(self, what: str, count: int, error: OSError) -> None:
        # Loaded only here: importing the package must stay cheap.
        import logging

        logging.getLogger("virtio_test.device").error(
            "%r: %s failed, answered IOERR (failure %d): %s", self.image, what, count, error
        )

    def _sectors(self) -> int:
        sectors, rest = divmod(self.image.size, SECTOR)
        if rest:
            raise InvalidArgument(f"{self.image!r} has {self.image.size} bytes, which is no multiple of {SECTOR}")
        return sectors

    # --- saved state ----------------------------------------------------------------------------------------

    def check_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.check_state`; only the cache mode may differ from this device's configuration."""
        super().check_state(state)
        saved = ConfigSpace(self.config.layout)
        saved.restore(state["config"])
        for name in self.config.layout.names():
            if name == "writeback" and saved.writeback <= 1:
                continue
            if saved[name] != self.config[name]:
                raise SavedStateError(
                    f"the saved state's {name} is {saved[name]!r}, this device's {self.config[name]!r}"
                )

    def apply_state(self, state: Mapping[str, object]) -> None:
        """See `BaseDevice.apply_state`."""
        super().apply_state(state)
        self._settle_cache()


def _open(image: str | os.PathLike[str] | int | bytearray | Image, *, read_only: bool) -> Image:
    if isinstance(image, bytearray):
        return RamImage(image)
    if isinstance(image, str | os.PathLike | int):
        return FileImage(image, read_only=read_only)
    return image
