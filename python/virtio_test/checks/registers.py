"""The rules of features, status, queues' registers and MMIO: what a driver writes, and what a device shows."""

from __future__ import annotations

from typing import Final

from .entry import Outcome, table

__all__ = ["REGISTER_ENTRIES"]

_READ_ONLY: Final = "4.1.1 4.1.4.3.2 4.1.4.5.1 4.1.4.10 4.2.2.2"

_WRITTEN: Final = table(
    Outcome.IGNORED,
    (
        ("BadFeatures", "2.2.2", "D01 D03", "FEATURES_OK stands only over offered features that fit together."),
        ("StatusAfterFailed", "2.1.1", "", "After FAILED a driver resets the device before it goes on."),
        ("StatusBitCleared", "2.1.1", "D05", "A driver clears no status bit but by a reset."),
        ("StatusWidth", "4.1.3.1 4.2.2.2", "D15", "The status is accessed with the width that it has."),
        ("DriverOkWithoutFeaturesOk", "3.1.1", "D04", "DRIVER_OK comes after FEATURES_OK was set and read back."),
        ("SuspendNotPossible", "3.4.1", "D17", "Only a running device with SUSPEND negotiated is suspended."),
        ("UsedWhileSuspended", "3.4.1", "D17", "A suspended device is neither kicked nor configured."),
        ("DriverSetNeedsReset", "2.1", "D06", "DEVICE_NEEDS_RESET is the device's bit."),
        ("UndefinedStatusBit", "2.1", "D07", "No undefined status bit is set."),
        ("RequirementNotAccepted", "2.2.1", "D03", "A feature is accepted with those that it requires."),
        ("Version1NotAccepted", "6.1", "D01", "VERSION_1 is accepted where it is offered."),
        ("FeaturesAfterOk", "3.1.1", "D02", "Features stand once FEATURES_OK is set."),
        ("MixedInterfaces", "1.3.1", "", "A driver uses one interface until its reset, legacy or modern."),
        ("BadQueueSize", "2.6 2.7 4.1.4.3.1", "Q01 Q02 Q03 Q04 G16", "The size of a queue is a legal one."),
        ("BadQueueAddress", "2.7.2", "Q09 Q17", "A legacy queue lies at an address that its layout allows."),
        ("EnabledQueueWritten", "2.6 4.2.4", "Q05 Q06", "Size and addresses of a queue stand while it is enabled."),
        ("NoSuchQueue", "2.6 4.1.4.3.1 4.1.5.1.3.1 4.2.4", "A17", "The queue that is written to exists."),
        ("QueueResetNotNegotiated", "2.6.1", "Q14", "A queue is reset alone only with RING_RESET."),
        ("BadQueueReset", "4.1.4.3.1 4.2.2", "Q14", "A queue is reset by writing 1."),
        ("BadQueueEnable", "4.1.4.3.2", "Q06", "A queue is enabled by writing 1, and not disabled that way."),
        ("BadQueueReady", "4.2.2", "Q06", "QueueReady is written with 0 or 1."),
        ("ConfigAccess", "4.2.2.2", "X01", "The configuration space is accessed by 1, 2 or 4 bytes, aligned."),
        ("ConfigOutOfRange", "2.5", "X09", "An access lies within the configuration space."),
        ("RegisterWidth", "4.2.2.2", "X01", "Control registers are accessed by 4 bytes, aligned."),
        ("NoSuchRegister", "4.2.2.2", "X01", "An access meets a register of this version of the interface."),
        ("ReadOnlyRegister", _READ_ONLY, "X04 X07", "What can only be read is not written."),
        ("WriteOnlyRegister", "4.2.2.2", "", "What can only be written is not read."),
        ("BadGuestPageSize", "4.2.4", "Q17", "A legacy page size is a power of two."),
        ("BadQueueAlign", "4.2.4", "Q17", "A legacy alignment is a power of two."),
        ("NoGuestPageSize", "4.2.4", "Q17", "A legacy page size is written before a page number."),
        ("AccessWidth", "4.1.1 4.1.3.1 4.1.4.10", "X01 D15", "A PCI register is accessed with the width that it has."),
        ("BadVector", "4.1.5.1.2.2", "X02", "A vector is one of the MSI-X table, or NO_VECTOR."),
        ("BadNotification", "4.1.5.2.1", "X03", "A notification has the width and the place, or value, of a queue."),
        ("BadWindow", "4.1.4.9.2", "X05", "The window aims at what another structure describes, aligned."),
    ),
)  # fmt: skip

_COUNTED: Final = table(
    Outcome.NOTED,
    (
        ("FeatureNotOffered", "2.2.1 6.3", "D01 D14", "Only what is offered is accepted; else FEATURES_OK is refused."),
        ("ConfigAccessWidth", "4.2.2.2", "", "A field of the configuration space is accessed with its own width."),
        ("SelectNotWritten", "4.2.2.2", "", "A selector is written before what it selects is used."),
        ("UndefinedAckBits", "4.2.2.2", "", "Only defined events are acknowledged."),
        ("NotificationValue", "4.1.5.2.1", "X03", "A notification's value and its place name one queue."),
        ("NotifiedEarly", "3.1.1", "A18", "Nothing is notified before DRIVER_OK."),
    ),
)  # fmt: skip

_SHOWN: Final = table(
    Outcome.RAISED,
    (
        ("StatusBitLost", "2.1", "G17", "A status bit that was set reads back."),
        ("StatusBitInvented", "2.1", "", "A device shows no status bit that nobody set."),
        ("FeaturesRefused", "3.1.1", "G17", "A device that offers features takes a legal choice of them."),
        ("RequiredFeatureMissing", "2.2.1", "G17", "A driver goes on only with the features that it needs."),
        ("Version1NotOffered", "6.2", "G17", "A device offers VERSION_1."),
        ("UndefinedOffered", "2.2.2", "", "A device offers no feature that is not defined."),
        ("TransportNotSupported", "2.2.1 2.2.2", "D03", "A feature goes only over transports that have it."),
        ("RequirementNotOffered", "2.2.2", "D03", "A feature is offered with those that it requires."),
        ("QueueGone", "2.6.1.1", "Q15", "A queue is there again after its reset."),
        ("ConfigNeverStable", "2.5", "G15", "The configuration space stands still for as long as a read takes."),
        ("ConfigTooShort", "2.5", "G15", "The configuration space holds the fields that the features name."),
        ("BadMagic", "4.2.2.2", "", "MagicValue is that of virtio-mmio."),
        ("UnknownVersion", "4.2.2.2", "", "Version is 1 (legacy) or 2."),
        ("TooManyQueues", "4.2.2", "G16", "There is an end to the queues that are available."),
        ("QueueSizeMaxTooLarge", "2.7", "G16", "No queue has more than 32768 descriptors."),
        ("QueueSizeMaxNoPowerOfTwo", "2.7", "G16", "The maximum of a split queue is a power of two."),
        ("QueueInUse", "4.2.3.2", "", "A queue is not in use before it is set up."),
        ("QueueNotReady", "4.2.2", "", "QueueReady reads back what was written."),
        ("QueueStaysReady", "4.2.2.1 4.2.2.2", "", "QueueReady reads 0 once the queue is taken back or reset."),
        ("QueueResetEndless", "4.2.2.1", "", "QueueReset reads 0 once the queue is reset."),
        ("InterruptWithoutCause", "4.2.2.1", "G09", "The line is asserted only while InterruptStatus says why."),
        ("BadSharedMemory", "4.2.2", "", "A shared memory region has a length and an end."),
    ),
)  # fmt: skip

REGISTER_ENTRIES: Final = _WRITTEN + _COUNTED + _SHOWN
