//! Mappings whose file can shrink under us: what the SIGBUS handler knows of them, and what it does.
//!
//! # Theory
//!
//! An access to a page that a mapped file no longer has raises SIGBUS in the thread that accesses. Of files that
//! are sealed against shrinking there is nothing to fear; every other file that we receive gets a [`Guard`], an entry in
//! a table of fixed size, made of atomics alone, which a signal handler can read. The handler (see `sigbus`) asks
//! [`cover`]: if the address is a guarded one, the mapping is marked lost, zero pages of our own are mapped from the fault
//! to the end of the mapping, and the access goes on, into those.
//!
//! So the access itself cannot fail, and what it brought may be zeros. Whoever acts on it looks afterwards, by
//! [`any_lost`], and then by [`Access::intact`](super::Access::intact): the flag is set before the first zero can be read.
//!
//! An address that the table names must belong to the mapping that the table means for as long as a handler acts on it
//! (M7): an entry appears after mmap and goes before munmap, and a handler counts itself as a visitor of the entry
//! before it looks whether that is alive; who takes the entry away first marks it dead and then waits for the visitors.
//! Each of the two therefore sees the other.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, compiler_fence, fence};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};

use super::sigbus::Chain;

/// Mappings of files that are not sealed, in the whole process: eight full tables.
const CAPACITY: usize = 4096;
/// Milliseconds to wait for handlers; they take microseconds, unless their thread was left behind by a fork.
const PATIENCE: u32 = 1000;

/// One mapping, as the handler knows it.
struct Entry {
    /// Whether the other fields hold, and the mapping exists.
    alive: AtomicBool,
    /// Handlers that are looking at this entry.
    visitors: AtomicUsize,
    /// First byte of the mapping, and how many there are.
    base: AtomicPtr<c_void>,
    len: AtomicUsize,
    /// What the mapping is made of: a page or a huge page.
    granule: AtomicUsize,
    writable: AtomicBool,
    lost: AtomicBool,
}

static ENTRIES: [Entry; CAPACITY] = [const { Entry::new() }; CAPACITY];
/// Entries from this one on were never used.
static REACH: AtomicUsize = AtomicUsize::new(0);
/// How many entries are lost. A handler adds to it before it marks the entry, so it is never less than that.
static LOST: AtomicUsize = AtomicUsize::new(0);
/// Entries that are alive, and the handler that goes with them.
static CLAIMED: Mutex<Claimed> = Mutex::new(Claimed {
    entries: 0,
    chain: Chain::new(),
});

struct Claimed {
    entries: usize,
    chain: Chain,
}

fn claimed() -> MutexGuard<'static, Claimed> {
    CLAIMED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether anything in this process is lost, asked after an access and before anything is made of it. It costs a load.
#[inline]
pub(crate) fn any_lost() -> bool {
    // The access comes first: neither the compiler nor the processor may look before it has read.
    compiler_fence(Ordering::SeqCst);
    fence(Ordering::Acquire);
    LOST.load(Ordering::Relaxed) != 0
}

/// In a signal handler: if `address` is in a guarded mapping, mark that lost and put zero pages there. Otherwise,
/// or when the kernel has none to give, false.
pub(super) fn cover(address: *mut c_void) -> bool {
    let reach = REACH.load(Ordering::Acquire);
    ENTRIES.iter().take(reach).any(|entry| entry.cover(address))
}

impl Entry {
    const fn new() -> Self {
        Self {
            alive: AtomicBool::new(false),
            visitors: AtomicUsize::new(0),
            base: AtomicPtr::new(null_mut()),
            len: AtomicUsize::new(0),
            granule: AtomicUsize::new(0),
            writable: AtomicBool::new(false),
            lost: AtomicBool::new(false),
        }
    }

    /// Offset of `address` in this mapping.
    fn offset(&self, address: *mut c_void) -> Option<usize> {
        if !self.alive.load(Ordering::SeqCst) {
            return None;
        }
        let base = self.base.load(Ordering::Relaxed);
        let offset = address.addr().wrapping_sub(base.addr());
        (offset < self.len.load(Ordering::Relaxed)).then_some(offset)
    }

    fn cover(&self, address: *mut c_void) -> bool {
        if self.offset(address).is_none() {
            return false;
        }
        // From here on nobody unmaps what was found alive after it (M7).
        self.visitors.fetch_add(1, Ordering::SeqCst);
        let covered = self.offset(address).is_some_and(|offset| self.cover_from(offset));
        self.visitors.fetch_sub(1, Ordering::SeqCst);
        covered
    }

    /// For a visitor of an entry that is alive.
    fn cover_from(&self, offset: usize) -> bool {
        // Counted first, marked second, and only then can anybody read zeros.
        LOST.fetch_add(1, Ordering::SeqCst);
        if self.lost.swap(true, Ordering::SeqCst) {
            LOST.fetch_sub(1, Ordering::SeqCst);
        }
        // To the end, not a page: a mapping that breaks up into many would be as deadly in another way.
        let granule = self.granule.load(Ordering::Relaxed);
        let skip = offset & !granule.wrapping_sub(1);
        let start = self.base.load(Ordering::Relaxed).wrapping_byte_add(skip);
        let len = self.len.load(Ordering::Relaxed).wrapping_sub(skip);
        let protection = if self.writable.load(Ordering::Relaxed) {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
        // SAFETY: `start` and `len` are the end of a mapping that is ours and stays mapped while we visit its entry
        // (M7); its bytes may change at any time anyhow (N1, N3).
        unsafe { mmap_anonymous(start, len, protection, flags) }.is_ok()
    }
}

/// What the handler has to know of a mapping.
#[derive(Clone, Copy, Debug)]
pub(super) struct Guarded {
    pub(super) base: *mut c_void,
    pub(super) len: usize,
    /// A power of two.
    pub(super) granule: usize,
    pub(super) writable: bool,
}

/// The place of one mapping in the handler's table.
#[derive(Debug)]
pub(super) struct Guard(usize);

impl Guard {
    /// Guard a mapping, which exists, and installs the handler if there is none.
    ///
    /// # Errors
    /// `NOBUFS` when the table is full, or what the operating system says to the handler.
    pub(super) fn new(mapping: Guarded) -> Result<Self, Errno> {
        let mut claimed = claimed();
        let free = |entry: &Entry| {
            let (alive, visitors) = (&entry.alive, &entry.visitors);
            !alive.load(Ordering::SeqCst) && visitors.load(Ordering::SeqCst) == 0
        };
        let index = ENTRIES.iter().position(free).ok_or(Errno::NOBUFS)?;
        let entry = ENTRIES.get(index).ok_or(Errno::NOBUFS)?;
        entry.base.store(mapping.base, Ordering::Relaxed);
        entry.len.store(mapping.len, Ordering::Relaxed);
        entry.granule.store(mapping.granule, Ordering::Relaxed);
        entry.writable.store(mapping.writable, Ordering::Relaxed);
        entry.lost.store(false, Ordering::Relaxed);
        // Each time, not only for the first: somebody may have put a handler in front of ours.
        claimed.chain.install()?;
        claimed.entries = claimed.entries.saturating_add(1);
        REACH.fetch_max(index.saturating_add(1), Ordering::AcqRel);
        entry.alive.store(true, Ordering::SeqCst);
        Ok(Self(index))
    }

    /// Whether the file has shrunk under the mapping, and somebody noticed.
    pub(super) fn lost(&self) -> bool {
        ENTRIES
            .get(self.0)
            .is_some_and(|entry| entry.lost.load(Ordering::SeqCst))
    }

    /// Guard the mapping no longer, before it is unmapped; false when it must stay mapped for ever, because a handler
    /// does not come to an end. The last one takes the handler away.
    pub(super) fn release(&self) -> bool {
        let Some(entry) = ENTRIES.get(self.0) else { return false };
        entry.alive.store(false, Ordering::SeqCst);
        let gone = entry.wait();
        if entry.lost.load(Ordering::SeqCst) {
            LOST.fetch_sub(1, Ordering::SeqCst);
        }
        let mut claimed = claimed();
        claimed.entries = claimed.entries.saturating_sub(1);
        if claimed.entries == 0 {
            claimed.chain.remove();
        }
        gone
    }
}

impl Entry {
    /// Wait for the visitors to go; whether they did.
    fn wait(&self) -> bool {
        (0..PATIENCE).any(|_| {
            let gone = self.visitors.load(Ordering::SeqCst) == 0;
            if !gone {
                std::thread::sleep(Duration::from_millis(1));
            }
            gone
        })
    }
}

#[cfg(test)]
#[allow(
    clippy::indexing_slicing,
    clippy::unwrap_used,
    reason = "a test that panics has failed"
)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::mem::{Backing, Region};

    /// A guard of a mapping that stays as long as the region does.
    fn guard() -> (Region, Guard) {
        // A page more than is guarded: nobody else's begins there.
        let region = Region::new(0, 8192, Backing::Anonymous).unwrap();
        let base = region.mapping().unwrap().0.ptr().cast();
        let guard = Guard::new(Guarded {
            base,
            len: 4096,
            granule: 4096,
            writable: true,
        });
        (region, guard.unwrap())
    }

    #[test]
    fn whoever_ends_an_entry_waits_for_its_visitors() {
        let (region, guard) = guard();
        let visitors = &ENTRIES[guard.0].visitors;
        visitors.fetch_add(1, Ordering::SeqCst);
        let start = Instant::now();
        let gone = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(50));
                visitors.fetch_sub(1, Ordering::SeqCst);
            });
            guard.release()
        });
        assert!(gone && start.elapsed() >= Duration::from_millis(50));
        assert!(!cover(region.mapping().unwrap().0.ptr().cast()), "it is dead");
    }

    #[test]
    fn an_entry_with_a_visitor_is_never_given_away() {
        let (_region, stuck) = guard();
        ENTRIES[stuck.0].visitors.fetch_add(1, Ordering::SeqCst);
        assert!(!stuck.release(), "the mapping has to stay");
        let others: Vec<_> = (0..3).map(|_| guard()).collect();
        assert!(others.iter().all(|(_, other)| other.0 != stuck.0));
        assert!(others.iter().all(|(_, other)| other.release()));
        ENTRIES[stuck.0].visitors.fetch_sub(1, Ordering::SeqCst);
    }

    #[test]
    fn what_is_lost_is_counted_until_it_is_gone() {
        let (region, one) = guard();
        assert!(!any_lost() && !one.lost());
        let address: *mut c_void = region.mapping().unwrap().0.ptr().cast();
        assert!(!cover(address.wrapping_byte_add(4096)) && !one.lost(), "just behind it");
        assert!(cover(address));
        assert!(any_lost() && one.lost());
        assert!(cover(address), "by two threads at once, say");
        assert!(one.release());
        assert!(!any_lost());
    }
}
