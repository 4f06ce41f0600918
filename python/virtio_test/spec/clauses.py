"""What the clauses of VIRTIO 1.4 that we cite say, in our own words, one or two short sentences each.

The number is the section in which the requirement stands; requirements for one side have sections of their
own there ("Driver Requirements", "Device Requirements"). For an error message and for finding the place in
the specification; what binds is the specification.
"""

from types import MappingProxyType
from typing import Final

EDITION: Final = "VIRTIO 1.4"

CLAUSES: Final = MappingProxyType(
    {
        "1.3.1": "A transitional device serves drivers of the legacy interface too.",
        # 2.1 to 2.5: status, features, notifications, reset, configuration space
        "2.1": "The device status starts at 0 and shows the completed steps of the initialization; a reset makes it 0.",
        "2.1.1": "The driver sets status bits step by step and never clears one; after FAILED it resets first.",
        "2.1.2": "Before DRIVER_OK the device uses no buffer and notifies nobody; setting DEVICE_NEEDS_RESET after "
        "DRIVER_OK calls for a configuration change notification.",
        "2.2": "The device offers features, the driver accepts a subset; some bits are reserved.",
        "2.2.1": "The driver accepts only what was offered, with everything that it requires, and nothing reserved, "
        "unknown or not meant for this transport or device type.",
        "2.2.2": "The device offers no feature without those it requires and none that it cannot support; it refuses "
        "FEATURES_OK for a subset that it does not support.",
        "2.3": "Notifications are of three kinds: configuration change, available buffer, used buffer.",
        "2.4": "The driver may reset the device at any time, through the transport.",
        "2.4.1": "After a reset the status is 0, and the device leaves queues and driver alone until set up anew.",
        "2.4.2": "The driver takes a reset as complete once it reads status 0.",
        "2.5": "The configuration space is little endian; its generation changes when two reads could differ.",
        "2.5.1": "The driver reads wide or several fields again until the generation stands still, checks the feature "
        "of an optional field, and accepts a space that is longer than it needs.",
        "2.5.2": "Every configuration field can be read before FEATURES_OK, optional ones if their feature is offered.",
        # 2.6: virtqueues and their reset
        "2.6": "A virtqueue carries buffers; it has a descriptor area, a driver area and a device area.",
        "2.6.1": "With RING_RESET the driver can reset one virtqueue and enable it again.",
        "2.6.1.1.1": "A reset queue executes nothing and notifies nobody; all its state is back at the default.",
        "2.6.1.1.2": "The driver verifies that the queue is reset before it frees what the queue used.",
        "2.6.1.2.1": "A queue enabled again follows its new configuration.",
        "2.6.1.2.2": "To enable a queue again the driver configures it as at the first time.",
        # 2.7: split virtqueues
        "2.7": "A split virtqueue is a descriptor table, an available ring and a used ring; its size is a power of 2, "
        "at most 32768.",
        "2.7.1": "The parts are aligned: descriptor table 16, available ring 2, used ring 4 bytes.",
        "2.7.4": "How a request is cut into descriptors carries no meaning.",
        "2.7.4.1": "The device assumes nothing about the arrangement of descriptors; it may limit their number.",
        "2.7.4.2": "Device-writable descriptors come after all device-readable ones.",
        "2.7.5": "A descriptor holds address, length, flags and next; the queue size bounds the table and every chain.",
        "2.7.5.1": "The device writes neither to device-readable buffers nor to the descriptor table.",
        "2.7.5.2": "A chain holds at most 2^32 bytes, so it has no loop.",
        "2.7.5.3": "With INDIRECT_DESC a descriptor may refer to a table of descriptors, each 16 bytes.",
        "2.7.5.3.1": "INDIRECT needs INDIRECT_DESC, stands in no table, never together with NEXT; no chain is longer "
        "than the queue size.",
        "2.7.5.3.2": "The device ignores WRITE on a descriptor that refers to a table, and handles direct descriptors "
        "followed by one such descriptor.",
        "2.7.6": "An available ring entry is the head of a chain; idx counts up from 0, modulo 2^16.",
        "2.7.6.1": "The driver never decrements the available idx.",
        "2.7.7": "The driver may ask for fewer used buffer notifications, by flags or by used_event.",
        "2.7.7.1": "The driver sets flags to 0 or 1, to 0 with EVENT_IDX, and stands spurious notifications.",
        "2.7.7.2": "Without EVENT_IDX the flags decide whether the device notifies, with it used_event does.",
        "2.7.8": "A used ring entry is the head of a chain and the number of bytes written; idx counts up from 0.",
        "2.7.8.2": "The device sets len, and has written at least len bytes, before it updates the used idx.",
        "2.7.8.3": "The driver relies on no byte of a writable buffer beyond the first len.",
        "2.7.9": "With IN_ORDER one used entry may stand for a batch of buffers, the last of it.",
        "2.7.10": "The device may ask for fewer available buffer notifications, by flags or by avail_event.",
        "2.7.10.1": "Without EVENT_IDX the flags decide whether the driver notifies, with it avail_event does; the "
        "driver allocates the used ring with flags 0.",
        "2.7.10.2": "The device sets flags to 0 or 1, to 0 with EVENT_IDX, and stands spurious notifications.",
        "2.7.13": "The driver fills descriptors, then the ring, then idx, then notifies.",
        "2.7.13.3.1": "A memory barrier stands before the update of the available idx.",
        "2.7.13.4.1": "A memory barrier stands before flags or avail_event are read.",
        "2.7.14": "The driver takes used entries in order, from its last seen index up to the used idx.",
        # 2.8: packed virtqueues
        "2.8": "A packed virtqueue is one descriptor ring and two event suppression structures; its size is at most "
        "32768 and need not be a power of 2.",
        "2.8.1": "Both sides keep a wrap counter that starts at 1; AVAIL and USED are read against it.",
        "2.8.2": "Each side polls one place, the descriptor after the last it processed, and skips whole lists.",
        "2.8.3": "In a used descriptor WRITE says that the device has written something.",
        "2.8.4": "The length of a used descriptor is the number of bytes written; without WRITE it is ignored.",
        "2.8.5": "A list is direct or indirect, never both.",
        "2.8.6": "All descriptors of a list but the last carry NEXT; the buffer id stands in the last.",
        "2.8.7": "Entries of an indirect table follow each other; of their flags only WRITE counts, ids are ignored.",
        "2.8.8": "With IN_ORDER one used descriptor may stand for a batch of buffers, the last of it.",
        "2.8.10": "Event suppression knows enable, disable and one position; the position needs EVENT_IDX.",
        "2.8.10.1": "The parts are aligned: descriptor ring 16, event suppression structures 4 bytes.",
        "2.8.11": "The driver keeps the alignment of every part.",
        "2.8.12": "The device starts descriptors in ring order and writes used ones in the order of completion.",
        "2.8.13": "A descriptor holds address, length, buffer id and flags.",
        "2.8.14": "An event suppression structure holds offset and wrap counter in one word and flags in the next.",
        "2.8.15": "The device uses a descriptor only once AVAIL has changed, and leaves it alone once USED has.",
        "2.8.16": "The driver changes a descriptor only once USED has changed, and leaves it alone once AVAIL has.",
        "2.8.17": "No list is longer than the queue size or the device's limit; writable elements come last; the first "
        "descriptor is made available last.",
        "2.8.18": "The device takes the descriptors of a list in their order.",
        "2.8.19": "INDIRECT needs INDIRECT_DESC, stands in no table and in no list linked by NEXT; no chain is "
        "longer than the device allows.",
        "2.8.21": "The driver writes descriptors, then the flags of the first, then notifies.",
        "2.8.21.1.1": "A memory barrier stands before the update of the flags.",
        "2.8.21.3.1": "A memory barrier stands before the event suppression structure is read.",
        "2.8.22": "The driver takes used descriptors in ring order, skipping as many as each list had.",
        "2.9": "A driver notification names the queue, and with NOTIFICATION_DATA the next ring position.",
        # 3: initialization, operation, cleanup, suspend
        "3.1": "Initialization goes in steps that the device status shows.",
        "3.1.1": "Reset, ACKNOWLEDGE, DRIVER, features, FEATURES_OK and reading it back, set-up, DRIVER_OK, in this "
        "order; after FEATURES_OK the features stand; nothing is notified before DRIVER_OK.",
        "3.2.1": "The device notifies the driver of every configuration change that it makes.",
        "3.3.1": "The driver leaves available buffers alone until they are used or the queue is no longer live.",
        "3.4": "With SUSPEND the driver can suspend a running device and resume it.",
        "3.4.1": "The driver suspends only a running device that has SUSPEND negotiated, and reads the status back.",
        "3.4.2": "The device ignores SUSPEND before it is initialized; suspended it touches no queue and sends "
        "nothing; if it cannot suspend or resume it sets DEVICE_NEEDS_RESET.",
        # 4 and 6: what the layers above the rings cite
        "4.1.1": "The function meets the PCI specification: header, BARs, capability list.",
        "4.1.2.1": "The vendor id is 0x1AF4; the device id is 0x1040 plus the virtio id, or a transitional one.",
        "4.1.2.2": "The driver matches vendor 0x1AF4 and the device ids of the specification, with any revision.",
        "4.1.2.3": "A transitional device has revision 0 and its virtio id as subsystem device id.",
        "4.1.3.1": "The driver accesses every PCI register with the width that it has.",
        "4.1.4": "Each structure lies in a BAR of the function and is found by a vendor-specific capability.",
        "4.1.4.1": "The driver ignores reserved structure types and BARs, takes the first structure of a type that it "
        "can use, and copes with longer capabilities and regions.",
        "4.1.4.2": "cap_len counts the whole capability with its extra data.",
        "4.1.4.3": "The common configuration structure: its registers, in this order.",
        "4.1.4.3.1": "Status 0 resets and disables all queues; queue_reset and queue_enable are 0 after a queue's "
        "reset; queue_size is 0 or, split, a power of 2; the generation never shows old values as current.",
        "4.1.4.3.2": "The driver sets a queue up before it enables it, and waits for 0 in queue_reset.",
        "4.1.4.4.1": "There is a notification structure, aligned, with a multiplier of 0 or a power of 2, and long "
        "enough for every queue.",
        "4.1.4.5.1": "There is an ISR structure; reading it clears it.",
        "4.1.4.6.1": "The device configuration is 4-byte aligned.",
        "4.1.4.7.1": "A shared memory region lies inside its BAR, and its id is unique.",
        "4.1.4.8.1": "Vendor data is not of vendor 0x1AF4 and a multiple of 4 bytes long.",
        "4.1.4.9.1": "There is a window to the BARs in the configuration space.",
        "4.1.4.9.2": "The driver aims the window at what another virtio structure describes, aligned.",
        "4.1.4.10": "The legacy interface reaches feature bits 0 to 31 only.",
        "4.1.5.1.1.1": "A transitional device has the legacy interface in I/O space in BAR 0.",
        "4.1.5.1.2.1": "Any event can be mapped to any vector of the MSI-X table; reading back gives the vector, or "
        "NO_VECTOR where it failed; a reset unmaps all.",
        "4.1.5.1.2.2": "The driver copes with any table size and reads every mapping back.",
        "4.1.5.1.3.1": "A legacy queue is placed by its address divided by 4096; its size is the device's.",
        "4.1.5.2.1": "A notification has 16 bits, or 32 with NOTIFICATION_DATA, and names its queue.",
        "4.2.2": "The MMIO registers, each 32 bits wide.",
        "4.2.2.1": "What the device presents in its MMIO registers.",
        "4.2.2.2": "How the driver accesses MMIO registers: 32 bits wide and aligned.",
        "4.2.3.1.1": "The driver checks magic value and version first, and touches nothing more if the device id is 0.",
        "4.2.3.2": "A queue is set up in steps: it is not in use, its size, its addresses, then QueueReady.",
        "4.2.3.4.1": "The driver reads InterruptStatus to see what an interrupt means, and acknowledges that.",
        "4.2.4": "The legacy MMIO registers: queues lie at page numbers, with the page size and alignment that the "
        "driver gives, both powers of two.",
        "4.2.5": "Features that MMIO does not support.",
        # 5: device classes
        "5.1.3.1": "Which features of the network device require which others.",
        "5.1.4.1": "What the network device shows: 1 to 32768 queue pairs, an mtu of 68 to 65535 that never changes; "
        "it passes on no larger packets.",
        "5.1.4.2": "The driver writes no field of the configuration space, takes the MAC address from it, and sends "
        "nothing larger than the mtu.",
        "5.1.4.3": "Through the legacy interface the MAC address is driver-writable.",
        "5.1.9": "Each packet is preceded by a header, whose size depends on the features.",
        "5.1.9.1": "Through the legacy interface the header has no num_buffers unless MRG_RXBUF was negotiated.",
        "5.1.9.2.1": "The driver sets num_buffers to zero and uses no offload that it has not negotiated.",
        "5.1.9.3.1": "How large the buffers must be that the driver puts into a receive queue.",
        "5.1.9.3.2": "The device sets num_buffers to the number of buffers that hold the packet: 1 without MRG_RXBUF.",
        "5.1.9.4.1": "A packet fills all its buffers but the last; flags and gso_type show only what was negotiated.",
        "5.1.9.5": "A command of the control queue is class, command and data; the device answers with the byte ack.",
        "5.2.4": "The block device's configuration space: capacity always, the rest as its feature says.",
        "5.2.5.2": "The device offers FLUSH with CONFIG_WCE, starts with writeback 0 if only CONFIG_WCE is accepted, "
        "and shows padding as 0.",
        "5.2.6": "A request is a header, data and, last of all, the status byte.",
        "5.2.6.1": "The driver stays within the capacity and sends data of whole sectors, whole segments, or 20 bytes "
        "for the ID.",
        "5.2.6.2": "A read-only device fails writes and writes nothing; unknown flags are unsupported; stable writes "
        "are committed before they are completed.",
        "5.2.6.3": "Through the legacy interface the driver ignores used lengths, and FLUSH_OUT is another FLUSH.",
        "5.2.6.4": "A legacy driver uses one descriptor for the header and a separate one for the status byte.",
        "5.3.5.1": "The device takes a write to emerg_wr at any time and puts its lower byte out.",
        "5.3.6.1": "The driver puts no device-readable buffer into a receive queue and no device-writable one into a "
        "transmit queue.",
        "5.3.6.2": "With MULTIPORT, messages of 8 bytes and more on the control queues tell of ports.",
        "5.3.6.2.1": "The device adds no port twice and none beyond max_nr_ports, and removes only what it added.",
        "5.3.6.2.2": "The driver says DEVICE_READY first, and opens a port that is named a console.",
        "5.4.6.1": "The driver puts in no device-readable buffers and looks at how many bytes it got.",
        "5.4.6.2": "The device puts at least one random byte into each buffer.",
        "6": "The device-independent feature bits.",
        "6.1": "The driver accepts VERSION_1 if it is offered.",
        "6.2": "The device offers VERSION_1.",
        "6.3": "Feature bits of the legacy interface.",
    }
)
"""Clause number to text, in the order of the specification."""
