//! `Traced`: `Mapped` memory whose every access is recorded, and that can change between two accesses.
//!
//! # Theory
//!
//! The other side shares the memory and may change it at any time. To test that, a `Trace` is told "just before
//! access n, write these bytes there", and then plays the racing other side exactly there. The log of the same run
//! without a change says which numbers there are.
//!
//! Accesses of all queues and threads that use one `Trace` are numbered together, in the order in which they begin.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::mapped::Mapped;
use super::table::Table;
use super::{Access, At, MemoryError, Want};

/// What an access was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessKind {
    /// Load of one ring word.
    Load,
    /// Store of one ring word.
    Store,
    /// Copy out of guest memory.
    Read,
    /// Copy into guest memory, or a fill.
    Write,
    /// Full fence; of no address and no length.
    Fence,
}

impl AccessKind {
    /// Its name in lower case.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Load => "load",
            Self::Store => "store",
            Self::Read => "read",
            Self::Write => "write",
            Self::Fence => "fence",
        }
    }
}

/// One recorded access, whether or not it succeeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// What it was.
    pub kind: AccessKind,
    /// Guest address of the first byte.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Bytes to write to a guest address.
type Change = (u64, Vec<u8>);

#[derive(Debug, Default)]
struct State {
    log: Vec<Record>,
    changes: BTreeMap<u64, Vec<Change>>,
    missed: u64,
}

/// The log of accesses and the changes that are planned; see the module's head.
#[derive(Debug, Default)]
pub struct Trace {
    state: Mutex<State>,
}

impl Trace {
    /// An empty trace.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Whoever panicked while holding it left a log that is complete up to there.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every access since the last `clear`, oldest first.
    #[must_use]
    pub fn log(&self) -> Vec<Record> {
        self.state().log.clone()
    }

    /// How many accesses there were since the last `clear`: the number of the next one.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.state().log.len() as u64
    }

    /// Changes since the last `clear` that could not be made, because their address was not mapped for writing.
    #[must_use]
    pub fn missed(&self) -> u64 {
        self.state().missed
    }

    /// Forget the log and the planned changes; numbering starts at 0 again.
    pub fn clear(&self) {
        *self.state() = State::default();
    }

    /// Write `data` to `gpa` just before access `number`; several changes for one number are made in this order.
    pub fn change_at(&self, number: u64, gpa: u64, data: Vec<u8>) {
        self.state().changes.entry(number).or_default().push((gpa, data));
    }

    /// Record an access and make the changes planned for it.
    fn before(&self, mem: Mapped<'_>, record: Record) {
        let mut state = self.state();
        let number = state.log.len() as u64;
        state.log.push(record);
        for (gpa, data) in state.changes.remove(&number).unwrap_or_default() {
            if mem.write(At::unresolved(gpa), 0, &data).is_err() {
                state.missed = state.missed.saturating_add(1);
            }
        }
    }
}

/// A pinned view of guest memory that records what is done through it.
#[derive(Clone, Copy, Debug)]
pub struct Traced<'a> {
    mem: Mapped<'a>,
    trace: &'a Trace,
}

impl<'a> Traced<'a> {
    /// View memory through `table`, recording in `trace`.
    #[must_use]
    pub const fn new(table: &'a Table, trace: &'a Trace) -> Self {
        Self {
            mem: Mapped::new(table),
            trace,
        }
    }

    fn note(&self, kind: AccessKind, at: At, off: u64, len: u64) {
        self.trace.before(
            self.mem,
            Record {
                kind,
                gpa: at.gpa.saturating_add(off),
                len,
            },
        );
    }
}

macro_rules! load {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64) -> Result<$word, MemoryError> {
            self.note(AccessKind::Load, at, off, size_of::<$word>() as u64);
            self.mem.$name(at, off)
        }
    };
}

macro_rules! store {
    ($name:ident, $word:ty) => {
        fn $name(&self, at: At, off: u64, value: $word) -> Result<(), MemoryError> {
            self.note(AccessKind::Store, at, off, size_of::<$word>() as u64);
            self.mem.$name(at, off, value)
        }
    };
}

impl Access for Traced<'_> {
    fn epoch(&self) -> u64 {
        self.mem.epoch()
    }

    fn resolve(&self, gpa: u64, len: u64, want: Want) -> Result<At, MemoryError> {
        self.mem.resolve(gpa, len, want)
    }

    load!(load_u16, u16);
    load!(load_u16_acquire, u16);
    load!(load_u32, u32);
    load!(load_u64, u64);
    store!(store_u16, u16);
    store!(store_u16_release, u16);
    store!(store_u32, u32);
    store!(store_u64, u64);

    fn fence(&self) {
        self.note(AccessKind::Fence, At::unresolved(0), 0, 0);
        self.mem.fence();
    }

    fn read(&self, at: At, off: u64, dst: &mut [u8]) -> Result<(), MemoryError> {
        self.note(AccessKind::Read, at, off, dst.len() as u64);
        self.mem.read(at, off, dst)
    }

    fn write(&self, at: At, off: u64, src: &[u8]) -> Result<(), MemoryError> {
        self.note(AccessKind::Write, at, off, src.len() as u64);
        self.mem.write(at, off, src)
    }

    unsafe fn read_raw(&self, at: At, off: u64, dst: *mut u8, len: usize) -> Result<(), MemoryError> {
        self.note(AccessKind::Read, at, off, len as u64);
        // SAFETY: our caller's promise is the one that is asked for.
        unsafe { self.mem.read_raw(at, off, dst, len) }
    }

    unsafe fn write_raw(&self, at: At, off: u64, src: *const u8, len: usize) -> Result<(), MemoryError> {
        self.note(AccessKind::Write, at, off, len as u64);
        // SAFETY: our caller's promise is the one that is asked for.
        unsafe { self.mem.write_raw(at, off, src, len) }
    }

    fn fill(&self, at: At, off: u64, len: u64, value: u8) -> Result<(), MemoryError> {
        self.note(AccessKind::Write, at, off, len);
        self.mem.fill(at, off, len, value)
    }
}
