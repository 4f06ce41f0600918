"""What implementations do with a row, where no rule tells it: read in sources from February 2025 to August 2026."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

__all__ = ["PRACTICE"]

PRACTICE: Final = MappingProxyType(
    {
        "A03": "rust-vmm's queue once took a wrapped idx for one that is too far ahead.",
        "A07": "Nobody finds it.",
        "A08": "All look at bit 0 alone.",
        "A14": "QEMU, rust-vmm, crosvm, Firecracker and OpenVMM keep the used idx to themselves; a back-end that reads "
        "it from the ring lets the driver choose where it writes.",
        "A17": "QEMU compares without a sign since CVE-2011-2512.",
        "A18": "Firecracker once lost a kick that came too early.",
        "C06": "rust-vmm and Firecracker look at next only where NEXT is set.",
        "C08": "vringh calls it a protocol error; cloud-hypervisor skips such chains of its console and entropy "
        "devices; others have a rule for each device.",
        "C09": "crosvm gives an error for any flag but NEXT and WRITE; others ignore them.",
        "C12": "Nobody looks.",
        "B05": "A check that is off by one, or looks at the first byte only, has been in DPDK and libkrun.",
        "B11": "QEMU breaks the device at more than 1024 segments.",
        "B16": "vhost asks for what is missing and waits.",
        "B17": "Many take 0 for an address that was never set.",
        "B19": "DPDK read beyond such chains (CVE-2022-2132).",
        "I10": "rust-vmm refused it until 0.7.1.",
        "I15": "vhost stops at the first entry without NEXT.",
        "I16": "All ignore it.",
        "I19": "libvhost-user reads the length twice; DPDK had several such double reads.",
        "P06": "No device end looks at ids.",
        "P09": "OpenVMM had wrap counters that did not turn at an exact lap.",
        "P11": "DPDK and OpenVMM once took only powers of two.",
        "P18": "QEMU's loop over a queue that is not empty went on for ever (CVE-2026-16457).",
        "P19": "crosvm and DPDK set WRITE where a length is given; drivers of Linux and Windows take the length without"
        " it.",
        "P20": "QEMU wrote used descriptors of several lists to wrong places.",
        "P21": "QEMU counted the wrap twice in one place.",
        "P22": "QEMU takes 2 and 3 for a place even without EVENT_IDX; drivers of Linux, crosvm, OpenVMM and DPDK "
        "notify.",
        "P24": "OpenVMM bounds it by what is in flight.",
        "P28": "DPDK stores the flags of a batch's first descriptor last.",
        "Q05": "Firecracker let size and addresses change (CVE-2026-5747), QEMU lets them change; crosvm locks a queue "
        "that is ready, and vhost one that has a back-end.",
        "Q06": "QEMU breaks the device at another value than 1.",
        "Q07": "cloud-hypervisor once started such queues.",
        "Q10": "Nobody looks.",
        "Q17": "QEMU divided by the alignment (CVE-2017-17381).",
        "D02": "QEMU refuses the write, without a trace for the driver.",
        "D08": "Resets that left something behind have been in QEMU and cloud-hypervisor.",
        "D09": "A block request that completed after its device was gone has been in cloud-hypervisor (CVE-2026-45782)."
        "",
        "D11": "Firecracker and cloud-hypervisor set DEVICE_NEEDS_RESET.",
        "D12": "OpenVMM once sent one.",
        "X02": "Firecracker and cloud-hypervisor once used such a vector as an index.",
        "X05": "cloud-hypervisor did not heed the length.",
        "U01": "QEMU takes any length; bytes of the host came out that way (CVE-2024-8612).",
        "U03": "rust-vmm, crosvm, libkrun and Firecracker compare the head with the size only; QEMU's count of what is "
        "in flight could go below 0.",
        "U04": "rust-vmm and libkrun move their index before the store that can fail.",
        "U09": "QEMU wrote the number of buffers to one that it had given back (CVE-2021-3748).",
        "U10": "QEMU's first in-order queue could go round for ever.",
        "U12": "Each of QEMU (CVE-2022-26353) and DPDK (CVE-2020-10726) lost something with every malformed chain.",
        "N01": "virtio-drivers compares with >=, which is wrong at the wrap.",
        "N05": "rust-vmm ignores the flag even without EVENT_IDX, and always notifies.",
        "N06": "crosvm needed four fixes of its barriers.",
        "N10": "A back-end that tests for equality depends on being asked after each buffer.",
        "T01": "DPDK read lengths twice in several places.",
        "T06": "A back-end that reads the id back from the used ring takes what the driver has put there.",
        "T08": "DPDK's crypto back-end checked a header and read it again (CVE-2020-14374 to 14378).",
        "T12": "DPDK takes a lock for each queue; others count who uses a mapping.",
        "R02": "QEMU and OpenVMM refuse it.",
        "R03": "QEMU finds the indices inconsistent and refuses the state.",
        "R06": "QEMU ends by an assertion.",
        "R10": "crosvm and Firecracker once lost what was to be notified.",
        "R11": "libvhost-user and others indexed with what stands in the region, and ended by assertions.",
        "M01": "libvhost-user ends by an assertion at a short read.",
        "M03": "DPDK left fds open (CVE-2019-14818).",
        "M05": "rust-vmm's messages and DPDK check the sums; libvhost-user finds overlaps.",
        "M06": "libvhost-user panics.",
        "M08": "rust-vmm cuts the base to 16 bits; vhost refuses more.",
        "M15": "DPDK added size and offset without a check (CVE-2020-10722), vhost wrote beyond its list "
        "(CVE-2019-14835).",
        "G05": "The Linux driver would go round as often as the idx says.",
        "G09": "Linux counts such interrupts as none of its own.",
        "G16": "Linux refuses a size that is no power of two.",
        "G18": "virtio-drivers compares tokens.",
        "G19": "Several drivers leak such buffers on purpose.",
    }
)
"""Id of a row to sentences."""
