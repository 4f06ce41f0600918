//! `Trace`: every access to a memory recorded, and changes of it between two accesses.
//!
//! # Theory
//!
//! The other side shares the memory and may change it at any time. To test that, a `Trace` is told "just before
//! access n, write these bytes there", and then plays the racing other side exactly there. The log of the same run
//! without a change says which numbers there are. Or the run ends there, for all that others can see of it.
//!
//! Accesses of all queues and threads that use one `Trace` are numbered together, in the order in which they begin.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::{Access, At};

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
    /// From this access on nothing is written.
    end: Option<u64>,
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

    /// Write nothing from access `number` on, and say that it was written: what a process that is killed there leaves.
    pub fn end_at(&self, number: u64) {
        self.state().end = Some(number);
    }

    /// Record an access and make the changes planned for it; whether it may write.
    pub(super) fn before<A: Access>(&self, mem: &A, record: Record) -> bool {
        let (changes, alive) = {
            let mut state = self.state();
            let number = state.log.len() as u64;
            state.log.push(record);
            (state.changes.remove(&number), state.end.is_none_or(|end| number < end))
        };
        // Without the lock: a change of remote memory runs foreign code.
        for (gpa, data) in changes.unwrap_or_default() {
            if mem.write(At::unresolved(gpa), 0, &data).is_err() {
                let mut state = self.state();
                state.missed = state.missed.saturating_add(1);
            }
        }
        alive
    }
}
