"""The rules of PCI functions and of the device classes: what a device shows and answers."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from .entry import Entry, Outcome, table

__all__ = ["CLASS_ENTRIES", "PCI_ENTRIES"]

_STRUCTURES: Final = table(
    Outcome.UNUSED,
    (
        ("CapabilityBelowHeader", "4.1.1", "", "A capability lies behind the header."),
        ("CapabilityLoop", "4.1.1", "", "The list of capabilities has an end."),
        ("CapabilityUnaligned", "4.1.1", "", "A capability begins at a multiple of 4."),
        ("CapabilityBeyondSpace", "4.1.1", "", "A capability ends within the configuration space."),
        ("CapabilityTooShort", "4.1.4.2", "", "A capability has all fields of its type."),
        ("BadNotifyMultiplier", "4.1.4.4.1", "", "The multiplier of notifications is 0 or an even power of 2."),
        ("NoSuchBar", "4.1.4", "", "A structure lies in a BAR that the function has."),
        ("RegionMisaligned", "4.1.4.3.1 4.1.4.4.1 4.1.4.5.1 4.1.4.6.1", "", "A structure is aligned as its type asks."),
        ("RegionTooShort", "4.1.4.3.1 4.1.4.4.1 4.1.4.5.1 4.1.4.6.1", "", "A structure is as long as its type needs."),
        ("RegionWraps", "4.1.4 4.1.4.7.1", "", "A structure ends within the address space of its BAR."),
        ("RegionBeyondBar", "4.1.4 4.1.4.7.1", "", "A structure ends within its BAR."),
        ("RegionInIoBar", "4.1.4.7.1", "", "Shared memory lies in a memory BAR."),
        ("DuplicateSharedMemory", "4.1.4.7.1", "", "The id of a shared memory region is unique."),
        ("VendorDataSize", "4.1.4.8.1", "", "Vendor data is a multiple of 4 bytes long."),
        ("VendorDataOfVirtio", "4.1.4.8.1", "", "Vendor data is not of vendor 0x1AF4."),
    ),
)  # fmt: skip

_NOTED: Final = table(
    Outcome.FINDING,
    (
        ("SubsystemMismatch", "4.1.2.3", "", "A transitional device's subsystem id is its virtio id."),
        ("BadBar", "4.1.1", "", "A BAR sizes to a power of two."),
        ("NoInterrupt", "4.1.1", "", "A function has MSI-X or an interrupt pin."),
        ("BadMsixTable", "4.1.5.1.2.1", "", "The MSI-X table lies within a memory BAR."),
    ),
)

_FATAL: Final = table(
    Outcome.RAISED,
    (
        ("NotVirtio", "4.1.2.2", "", "The function has the vendor id and a device id of virtio."),
        ("BadHeader", "4.1.1", "", "The function has the header of an endpoint."),
        ("BarNotWritable", "4.1.1", "", "A BAR takes the address that it is given."),
        ("NoInterface", "4.1.5.1.1.1", "", "A device has the modern interface, or the legacy one in BAR 0."),
        ("MissingCommon", "4.1.4.3.1", "", "There is a usable common configuration structure."),
        ("MissingNotify", "4.1.4.4.1", "", "There is a usable notification structure."),
        ("MissingIsr", "4.1.4.5.1", "", "There is a usable ISR structure."),
        ("MissingWindow", "4.1.4.9.1", "", "There is a usable window to the BARs in the configuration space."),
        ("CommonTooShort", "4.1.4.3", "", "The common configuration has the registers that the features name."),
        ("NotifyBeyondRegion", "4.1.4.4.1", "", "The place of each queue's notification lies in the structure."),
        ("NotifyMisaligned", "4.1.4.4.1", "", "The place of each queue's notification is aligned."),
        ("QueueEnabledOnReset", "4.1.4.3.1 4.1.5.1.3.1", "", "No queue is enabled before it is set up."),
        ("QueueSizeRefused", "4.1.4.3 4.1.5.1.3.1", "", "A legal queue size reads back."),
        ("QueueNotEnabled", "4.1.4.3.1 4.1.5.1.3.1", "", "A queue that was enabled reads as enabled."),
        ("QueueStillEnabled", "4.1.4.3.1", "", "A queue is not enabled after its reset."),
        ("MsixTableNotWritable", "4.1.5.1.2.1", "", "An entry of the MSI-X table takes what is written."),
        ("VectorRefused", "4.1.5.1.2.1", "", "An event can be mapped to one of the vectors."),
        ("VectorMismatch", "4.1.5.1.2.1", "", "A vector reads back as written, or as NO_VECTOR."),
        ("LineNeverLowered", "4.1.4.5.1", "G09", "Reading ISR lowers the interrupt line."),
    ),
)

PCI_ENTRIES: Final = _STRUCTURES + _NOTED + _FATAL

_ANSWERS: Final = table(
    Outcome.FAILED,
    (
        ("StatusMissing", "5.2.6", "", "A request's status byte is written."),
        ("StatusUnknown", "5.2.6", "", "A request's status is OK, IOERR or UNSUPP."),
        ("ReservedLifetime", "5.2.6.2", "", "Values of a LIFETIME answer are within their limits."),
        ("NoRandomBytes", "5.4.6.2", "", "Each entropy buffer gets at least one byte."),
        ("NotRandom", "5.4.6.2", "", "Entropy is neither one byte repeated nor the same again."),
        ("AckMissing", "5.1.9.5", "", "A command of the control queue is acknowledged."),
        ("AckUnknown", "5.1.9.5", "", "An acknowledgement is OK or ERR."),
    ),
)

_FRAMES: Final = table(
    Outcome.FINDING,
    (
        ("HeaderTooShort", "5.1.9", "", "A packet begins with a whole header."),
        ("BufferNotFull", "5.1.9.4.1", "", "A packet fills all its buffers but the last."),
        ("BufferEmpty", "5.1.9.4.1", "", "No buffer of a packet is empty."),
        ("OffloadNotNegotiated", "5.1.9.2.1 5.1.9.4.1", "", "A header shows no offload that was not negotiated."),
        ("FrameMissing", "5.1.9", "", "Behind a header comes a frame."),
        ("ChecksumBeyondFrame", "5.1.9.2.1", "", "A checksum to be filled in lies in its frame."),
        (
            "BufferTooSmall",
            "5.1.9.3.1",
            "",
            "A receive buffer holds a header, and without MRG_RXBUF a whole packet.",
        ),
        (
            "CommandMalformed",
            "5.1.9.5",
            "",
            "A command is known and negotiated, and has its data and an ack.",
        ),
        ("FrameTooLong", "5.1.4.1 5.1.4.2", "", "No frame is longer than the mtu allows."),
        ("ControlTooShort", "5.3.6.2", "", "A control message has its 8 bytes."),
        ("UnknownPort", "5.3.6.2.1", "", "A control message names a port that was added."),
        ("UnknownEvent", "5.3.6.2", "", "A control message carries an event of the device, with its data."),
        ("PortExists", "5.3.6.2.1", "", "No port is added twice."),
        ("PortBeyondMaximum", "5.3.6.2.1", "", "No port is added beyond max_nr_ports."),
    ),
)

_SPACES: Final = table(
    Outcome.RAISED,
    (
        ("BadNumQueues", "5.2.4", "", "A block device has the request queues that its num_queues says."),
        ("BadSegments", "5.2.4", "", "A block device's seg_max and size_max leave room for data."),
        ("QueueMissing", "5.1.9", "", "A network device has its queues."),
        ("BadMtu", "5.1.4.1", "", "The mtu is 68 to 65535."),
    ),
)

_OWN: Final = table(
    Outcome.OURS,
    (
        ("DeviceBroken", "2.1.2", "D16", "Of a device that broke no queue goes on, and it sets DEVICE_NEEDS_RESET."),
        ("DeviceStuck", "2.1.2", "", "A device lets go of its chains when it is stopped."),
        ("HandlerFailed", "2.1.2", "", "A handler that fails breaks its queue; the driver learns of it."),
    ),
)

_LENIENT: Final = (
    Entry(
        name="UsedLengthShort",
        family="virtio",
        clauses=("2.7.8.2",),
        summary="The used length covers all that the device has written: data and status of a block request.",
        interop=Outcome.ACCEPTED,
        strict=Outcome.FAILED,
        practice="Where the answer carries data, interop fails the request too.",
        peer="QEMU and OpenVMM never set WRITE in packed used descriptors, so a length may mean nothing",
        rows=("P19",),
    ),
    replace(
        _FRAMES[0],
        name="BadNumBuffers",
        clauses=("5.1.9.3.2",),
        summary="num_buffers is the number of buffers that hold the packet: 1 without MRG_RXBUF.",
        practice="Without MRG_RXBUF interop takes any value; with it both policies drop the frame.",
        interop=Outcome.ACCEPTED,
        peer="devices that leave num_buffers at 0 where it counts nothing",
    ),
)

CLASS_ENTRIES: Final = _ANSWERS + _FRAMES + _SPACES + _OWN + _LENIENT
