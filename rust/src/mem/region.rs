//! One region: a stretch of guest addresses and the host mapping behind it.
//!
//! # Theory
//!
//! A region is either ours (a fresh memfd, which can be handed to another process, or anonymous memory) or was
//! received as a file descriptor with an offset, as vhost-user front-ends send them. Two rules about alignment keep
//! the rest simple: guest address, size and file offset are multiples of 8, so that an aligned ring word lies in one
//! region and is aligned in the host as well (M3). Any page alignment is this module's own business: it maps from the
//! page below.
//!
//! Or it is remote: no bytes of ours at all, but somebody who reads and writes them for us (see `transfer`).
//!
//! What is mapped must exist: a file that ends before `offset + size` is refused. Our own memfds are sealed against
//! shrinking before anybody else can hold them. A file that we receive may be cut short later, unless it is sealed
//! already: then its mapping is guarded (see `lost`).

use std::ffi::c_void;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::lost::{Guard, Guarded};
use super::{Transfer, host_size};

/// Alignment of memory that we make ourselves, in bytes.
pub const OWN_ALIGN: u64 = 4096;
/// Alignment of address, size and file offset of memory that we receive, in bytes.
pub const RECEIVED_ALIGN: u64 = 8;

/// Why a table of regions cannot be what was asked for; the table is then unchanged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RegionError {
    /// A region of no bytes.
    #[error("region at {gpa:#x} has a size of 0")]
    Empty {
        /// Its guest address.
        gpa: u64,
    },
    /// A region that does not end below 2^64 (in guest addresses or in its file).
    #[error("region of {size} bytes at {what} {start:#x} does not end below 2**64")]
    Wraps {
        /// `address` or `offset`.
        what: &'static str,
        /// Where it starts.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// Address, size or offset is no multiple of what it must be.
    #[error("{what} {value:#x} of the region at {gpa:#x} is no multiple of {align}")]
    Misaligned {
        /// `address`, `size` or `offset`.
        what: &'static str,
        /// The value.
        value: u64,
        /// What it must be a multiple of.
        align: u64,
        /// Guest address of the region.
        gpa: u64,
    },
    /// Two regions share guest addresses.
    #[error("region of {size:#x} bytes at {gpa:#x} overlaps the region of {other_size:#x} bytes at {other:#x}")]
    Overlap {
        /// Guest address of the later one.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
        /// Guest address of the earlier one.
        other: u64,
        /// Its size in bytes.
        other_size: u64,
    },
    /// More regions than a table holds.
    #[error("{count} regions are more than a table's {limit}")]
    TooMany {
        /// How many were asked for.
        count: usize,
        /// How many a table holds.
        limit: usize,
    },
    /// Memory of an IOMMU was given a region of its own, or other memory a translation.
    #[error("memory has either regions of its own or those that an IOMMU shows of another: not both")]
    Mixed,
    /// No region of exactly that address and size.
    #[error("no region of {size:#x} bytes at {gpa:#x}")]
    NotFound {
        /// The guest address asked for.
        gpa: u64,
        /// The size asked for, in bytes.
        size: u64,
    },
    /// The file ends before the region does.
    #[error("the file of the region at {gpa:#x} has {actual:#x} bytes, the region needs {needed:#x}")]
    FileTooShort {
        /// Guest address of the region.
        gpa: u64,
        /// Bytes that the file must have.
        needed: u64,
        /// Bytes that it has.
        actual: u64,
    },
    /// The thread that asks is inside a transfer of this memory, which the change would wait for.
    #[error("memory cannot change from inside a transfer of its own")]
    InTransfer,
    /// The operating system refused.
    #[error("cannot {what} for the region of {size:#x} bytes at {gpa:#x}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Guest address of the region.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
        /// The reason.
        errno: Errno,
    },
}

/// Where the bytes of a new region come from.
#[derive(Debug)]
pub enum Backing {
    /// A fresh memfd, zeroed; can be shared with another process.
    Memfd,
    /// Fresh anonymous memory, zeroed.
    Anonymous,
    /// A file descriptor that somebody gave us.
    Received {
        /// The file; kept open as long as the region.
        fd: OwnedFd,
        /// Offset of the region's first byte in the file.
        offset: u64,
        /// Whether it is mapped for writing.
        writable: bool,
    },
    /// Somebody else's memory, which cannot be mapped.
    Remote {
        /// Who reads and writes it for us.
        transfer: Arc<dyn Transfer>,
        /// Whether it may be written.
        writable: bool,
    },
}

/// A host mapping; unmapped when the last holder (table or live view) lets go.
#[derive(Debug)]
pub struct Mapping {
    /// Start of what was mapped, aligned to a page.
    base: *mut c_void,
    /// Length of what was mapped.
    mapped: usize,
    /// First byte of the region, inside the mapping.
    ptr: *mut u8,
    /// Of a file that can be cut short.
    guard: Option<Guard>,
}

// SAFETY: a mapping is an address range that belongs to the process, not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: `&Mapping` gives out the address only; accesses follow the rules of `Mapped` (M1).
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Host address of the first byte that was asked for.
    #[must_use]
    pub const fn ptr(&self) -> *mut u8 {
        self.ptr
    }

    /// Map `size` bytes of a file of somebody else, for what is called `gpa` in errors; guarded if it can be cut short.
    pub(super) fn received(
        fd: BorrowedFd<'_>,
        offset: u64,
        gpa: u64,
        size: u64,
        writable: bool,
    ) -> Result<Self, RegionError> {
        let at = Place { gpa, size };
        // In this order: what is sealed first is as long later as it is found then.
        let sealed = fcntl_get_seals(fd).is_ok_and(|seals| seals.contains(SealFlags::SHRINK));
        let granule = at.check_file(fd, offset)?;
        let mut mapping = at.map_file(fd, offset, writable, granule)?;
        if can_be_missing(sealed, granule) {
            mapping.guard(granule, writable).map_err(at.refused("guard the file"))?;
        }
        Ok(mapping)
    }

    fn guard(&mut self, granule: u64, writable: bool) -> Result<(), Errno> {
        let guard = Guard::new(Guarded {
            base: self.base,
            len: self.mapped,
            granule: host_size(granule),
            writable,
        })?;
        self.guard = Some(guard);
        Ok(())
    }

    pub(super) fn lost(&self) -> bool {
        self.guard.as_ref().is_some_and(Guard::lost)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // The handler must have forgotten the range before it can be anybody else's (M7).
        if self.guard.as_ref().is_some_and(|guard| !guard.release()) {
            return;
        }
        // SAFETY: `base` and `mapped` are what mmap was given and returned (M1), and the last holder is gone. The
        // call cannot fail for such a range; were it to, the range would stay mapped, which is safe.
        let _ = unsafe { munmap(self.base, self.mapped) };
    }
}

/// One region of guest memory.
#[derive(Debug)]
pub struct Region {
    gpa: u64,
    size: u64,
    offset: u64,
    fd: Option<Arc<OwnedFd>>,
    readable: bool,
    writable: bool,
    own: bool,
    /// The address that the dirty log knows its first byte by.
    physical: u64,
    bytes: Bytes,
}

/// Where the bytes of a region are.
#[derive(Debug)]
enum Bytes {
    /// From so many bytes into the mapping on.
    Mapped(Arc<Mapping>, usize),
    Remote(Arc<dyn Transfer>),
}

impl Backing {
    /// A fresh memfd of `size` bytes for `gpa` that *we* map for reading only; whoever gets its fd may write it.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn fresh_read_only(gpa: u64, size: u64) -> Result<Self, RegionError> {
        let fd = Place { gpa, size }.memfd()?;
        Ok(Self::Received {
            fd,
            offset: 0,
            writable: false,
        })
    }
}

impl Region {
    /// Map `size` bytes for the guest address `gpa`.
    ///
    /// # Errors
    /// `Empty`, `Wraps`, `Misaligned`, `FileTooShort`, or what the operating system says.
    pub fn new(gpa: u64, size: u64, backing: Backing) -> Result<Self, RegionError> {
        if size == 0 {
            return Err(RegionError::Empty { gpa });
        }
        if gpa.checked_add(size).is_none() {
            return Err(RegionError::Wraps {
                what: "address",
                start: gpa,
                size,
            });
        }
        let align = match backing {
            Backing::Memfd | Backing::Anonymous => OWN_ALIGN,
            Backing::Received { .. } | Backing::Remote { .. } => RECEIVED_ALIGN,
        };
        check_align("address", gpa, align, gpa)?;
        check_align("size", size, align, gpa)?;
        let at = Place { gpa, size };
        match backing {
            Backing::Memfd => {
                let fd = at.memfd()?;
                let mapping = at.map_file(fd.as_fd(), 0, true, OWN_ALIGN)?;
                Ok(at.region(Some(fd), 0, true, true, Bytes::mapped(mapping)))
            }
            Backing::Anonymous => Ok(at.region(None, 0, true, true, Bytes::mapped(at.map_anonymous()?))),
            Backing::Received { fd, offset, writable } => {
                check_align("offset", offset, align, gpa)?;
                let mapping = Mapping::received(fd.as_fd(), offset, gpa, size, writable)?;
                Ok(at.region(Some(fd), offset, writable, false, Bytes::mapped(mapping)))
            }
            Backing::Remote { transfer, writable } => Ok(at.region(None, 0, writable, false, Bytes::Remote(transfer))),
        }
    }

    /// Guest address of the first byte.
    #[must_use]
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// First guest address after the region.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.gpa.saturating_add(self.size)
    }

    /// The file behind it, unless anonymous or remote; holding it keeps the file open and not the mapping.
    #[must_use]
    pub const fn fd(&self) -> Option<&Arc<OwnedFd>> {
        self.fd.as_ref()
    }

    /// Offset of the first byte in the file.
    #[must_use]
    pub const fn offset(&self) -> u64 {
        self.offset
    }

    /// `size` bytes from `skip` on, shown at `gpa` too: the same mapping, held by both.
    ///
    /// # Errors
    /// `Empty`, `Wraps`, `Misaligned`; `NotFound` when it has no such bytes, or is remote.
    pub fn alias(
        &self,
        gpa: u64,
        skip: u64,
        size: u64,
        (readable, writable): (bool, bool),
    ) -> Result<Self, RegionError> {
        if size == 0 {
            return Err(RegionError::Empty { gpa });
        }
        if gpa.checked_add(size).is_none() {
            let what = "address";
            return Err(RegionError::Wraps { what, start: gpa, size });
        }
        // M3: guest and host alignment agree.
        check_align("address", gpa, RECEIVED_ALIGN, gpa)?;
        check_align("size", size, RECEIVED_ALIGN, gpa)?;
        check_align("offset", skip, RECEIVED_ALIGN, gpa)?;
        let physical = self.physical.saturating_add(skip);
        let missing = RegionError::NotFound { gpa: physical, size };
        let inside = skip.checked_add(size).is_some_and(|end| end <= self.size);
        let Bytes::Mapped(mapping, before) = &self.bytes else {
            return Err(missing);
        };
        if !inside {
            return Err(missing);
        }
        Ok(Self {
            gpa,
            size,
            offset: self.offset.saturating_add(skip),
            fd: self.fd.clone(),
            readable,
            writable: writable && self.writable,
            own: false,
            physical,
            bytes: Bytes::Mapped(Arc::clone(mapping), before.saturating_add(host_size(skip))),
        })
    }

    /// Whether it may be read: all may but what an IOMMU shows for writing only.
    #[must_use]
    pub const fn readable(&self) -> bool {
        self.readable
    }

    /// Whether it may be written.
    #[must_use]
    pub const fn writable(&self) -> bool {
        self.writable
    }

    /// The guest physical address of the first byte, which an IOMMU shows at another.
    #[must_use]
    pub const fn physical(&self) -> u64 {
        self.physical
    }

    /// Whether we made it ourselves (memfd or anonymous) rather than received it.
    #[must_use]
    pub const fn own(&self) -> bool {
        self.own
    }

    /// Whether its file was found cut short: what is read there may be zeros, and nobody sees what is written.
    #[must_use]
    pub fn lost(&self) -> bool {
        self.mapping().is_some_and(|(mapping, _)| mapping.lost())
    }

    /// The host mapping and how many bytes of it come before the region, unless it is remote.
    #[must_use]
    pub const fn mapping(&self) -> Option<(&Arc<Mapping>, usize)> {
        match &self.bytes {
            Bytes::Mapped(mapping, skip) => Some((mapping, *skip)),
            Bytes::Remote(_) => None,
        }
    }

    /// Who reads and writes it, if it is remote.
    #[must_use]
    pub const fn remote(&self) -> Option<&Arc<dyn Transfer>> {
        match &self.bytes {
            Bytes::Mapped(..) => None,
            Bytes::Remote(transfer) => Some(transfer),
        }
    }
}

impl Bytes {
    fn mapped(mapping: Mapping) -> Self {
        Self::Mapped(Arc::new(mapping), 0)
    }
}

/// A file of `size` bytes for a log, zeroed and sealed against shrinking.
pub(super) fn log_file(size: u64) -> Result<OwnedFd, RegionError> {
    Place { gpa: 0, size }.memfd()
}

/// Whether pages of a mapped file may be gone one day. Huge ones can be missing even of a file that is sealed: whoever has
/// it may punch a hole when there are no more.
const fn can_be_missing(sealed: bool, granule: u64) -> bool {
    !sealed || granule != OWN_ALIGN
}

/// What a file of these blocks is mapped in: hugetlbfs reports its page size as block size, and maps nothing smaller.
fn granule_of(block: u64) -> u64 {
    if block.is_power_of_two() {
        block.max(OWN_ALIGN)
    } else {
        OWN_ALIGN
    }
}

fn check_align(what: &'static str, value: u64, align: u64, gpa: u64) -> Result<(), RegionError> {
    if value & (align - 1) == 0 {
        Ok(())
    } else {
        Err(RegionError::Misaligned {
            what,
            value,
            align,
            gpa,
        })
    }
}

/// Address and size of a region in the making, checked.
#[derive(Clone, Copy)]
struct Place {
    gpa: u64,
    size: u64,
}

impl Place {
    fn region(self, fd: Option<OwnedFd>, offset: u64, writable: bool, own: bool, bytes: Bytes) -> Region {
        Region {
            gpa: self.gpa,
            size: self.size,
            offset,
            fd: fd.map(Arc::new),
            readable: true,
            writable,
            own,
            physical: self.gpa,
            bytes,
        }
    }

    fn refused(self, what: &'static str) -> impl Fn(Errno) -> RegionError {
        move |errno| RegionError::System {
            what,
            gpa: self.gpa,
            size: self.size,
            errno,
        }
    }

    /// A file of ours, zeroed and sealed against shrinking.
    fn memfd(self) -> Result<OwnedFd, RegionError> {
        let fd = memfd_create("virtio-test-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
            .map_err(self.refused("make a memfd"))?;
        ftruncate(&fd, self.size).map_err(self.refused("size a memfd"))?;
        // Whoever gets this fd could else cut the file short under our mapping.
        fcntl_add_seals(&fd, SealFlags::SHRINK).map_err(self.refused("seal a memfd"))?;
        Ok(fd)
    }

    /// Check that the file holds the region; its mapping granule (page or huge page) in bytes.
    fn check_file(self, fd: BorrowedFd<'_>, offset: u64) -> Result<u64, RegionError> {
        let wraps = RegionError::Wraps {
            what: "offset",
            start: offset,
            size: self.size,
        };
        let needed = offset.checked_add(self.size).ok_or(wraps)?;
        let stat = fstat(fd).map_err(self.refused("look at the file"))?;
        // Only regular files (memfd, hugetlbfs) have a size that says anything; a device's is 0.
        if FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile {
            let actual = u64::try_from(stat.st_size).unwrap_or(0);
            if actual < needed {
                return Err(RegionError::FileTooShort {
                    gpa: self.gpa,
                    needed,
                    actual,
                });
            }
        }
        Ok(granule_of(u64::try_from(stat.st_blksize).unwrap_or(0)))
    }

    /// Map from the granule below `offset` to the granule above its end.
    fn map_file(self, fd: BorrowedFd<'_>, offset: u64, writable: bool, granule: u64) -> Result<Mapping, RegionError> {
        let lead = offset & (granule - 1);
        let wraps = RegionError::Wraps {
            what: "offset",
            start: offset,
            size: self.size,
        };
        let mapped = lead
            .checked_add(self.size)
            .and_then(|n| n.checked_next_multiple_of(granule))
            .ok_or(wraps)?;
        let mapped = host_size(mapped);
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a null hint lets the kernel choose a free range, so no mapping of ours is replaced.
        let base = unsafe { mmap(std::ptr::null_mut(), mapped, protection, flags, fd, offset - lead) }
            .map_err(self.refused("map the file"))?;
        Ok(Mapping {
            base,
            mapped,
            ptr: base.cast::<u8>().wrapping_add(host_size(lead)),
            guard: None,
        })
    }

    fn map_anonymous(self) -> Result<Mapping, RegionError> {
        let mapped = host_size(self.size);
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a null hint lets the kernel choose a free range, so no mapping of ours is replaced.
        let base = unsafe { mmap_anonymous(std::ptr::null_mut(), mapped, ProtFlags::READ | ProtFlags::WRITE, flags) }
            .map_err(self.refused("map memory"))?;
        Ok(Mapping {
            base,
            mapped,
            ptr: base.cast(),
            guard: None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{can_be_missing, granule_of};

    /// Of files with huge pages, which a machine need not have.
    #[test]
    fn files_with_huge_pages_are_mapped_in_those_and_always_guarded() {
        for (block, granule) in [(0, 4096), (512, 4096), (4096, 4096), (2 << 20, 2 << 20), (6144, 4096)] {
            assert_eq!(granule_of(block), granule);
        }
        for (sealed, granule, guarded) in [
            (true, 4096, false),
            (false, 4096, true),
            (true, 2 << 20, true),
            (false, 2 << 20, true),
        ] {
            assert_eq!(can_be_missing(sealed, granule), guarded);
        }
    }
}
