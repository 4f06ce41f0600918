//! The SIGBUS handler: installed while there is something to guard, and a good neighbour to every other.
//!
//! # Theory
//!
//! A signal has one handler in a process. Ours looks whether the fault is in guarded memory (see `lost`); for everything
//! else it does what would have happened without it, by what it found when it was installed: it calls the older handler,
//! or restores the default and returns, upon which the access faults again and ends the process, as it should.
//!
//! Others come and go as well. Whoever puts a handler in front of ours (Python's faulthandler, enabled late) gets
//! signals first; if it is the deadly kind, guarded memory is not guarded then. The next mapping to be guarded puts ours in
//! front once more. It must not be the same function: the one in the middle may call, or restore, what it found, which is
//! ours, and each would call the other for ever. So there are several *levels* of one handler, each with its own older one.
//! A level is free again only when we removed it ourselves from where we had put it.
//!
//! A handler that stands in front of ours when the last guard goes is left alone. What it found is a level of ours, which
//! goes on to pass everything to what that had found.
//!
//! All that runs in a handler is async-signal-safe: atomics, mmap, sigaction and raise. It takes no lock, allocates
//! nothing and cannot unwind. It runs on the alternate stack of its thread, if there is one, and needs little of it.
//! A thread that blocks SIGBUS is beyond help: the kernel then ends the process without asking a handler.

use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicUsize, Ordering};

use libc::{
    BUS_ADRERR, BUS_MCEERR_AR, SA_NODEFER, SA_ONSTACK, SA_RESETHAND, SA_RESTART, SA_SIGINFO, SI_KERNEL, SIG_DFL,
    SIG_IGN, SIGBUS, siginfo_t,
};
use rustix::io::Errno;

use super::lost::cover;

type Handler = extern "C" fn(c_int, *mut siginfo_t, *mut c_void);

/// All levels of our handler.
static LEVELS: [Handler; 8] = [
    on_bus::<0>,
    on_bus::<1>,
    on_bus::<2>,
    on_bus::<3>,
    on_bus::<4>,
    on_bus::<5>,
    on_bus::<6>,
    on_bus::<7>,
];
/// What each level found, for itself: written before the level is installed.
static OLDER: [Older; LEVELS.len()] = [const { Older::new() }; LEVELS.len()];

struct Older {
    handler: AtomicUsize,
    flags: AtomicI32,
}

impl Older {
    const fn new() -> Self {
        Self {
            handler: AtomicUsize::new(SIG_DFL),
            flags: AtomicI32::new(0),
        }
    }

    fn set(&self, action: &libc::sigaction) {
        self.flags.store(action.sa_flags, Ordering::SeqCst);
        self.handler.store(action.sa_sigaction, Ordering::SeqCst);
    }

    fn has(&self, flag: c_int) -> bool {
        self.flags.load(Ordering::SeqCst) & flag != 0
    }
}

/// Which levels are in use, and what each of them found.
pub(super) struct Chain(Vec<libc::sigaction>);

impl Chain {
    pub(super) const fn new() -> Self {
        Self(Vec::new())
    }

    /// Make a level of ours the handler, unless one is.
    ///
    /// # Errors
    /// What the operating system says; `BUSY` when all levels are in use.
    pub(super) fn install(&mut self) -> Result<(), Errno> {
        let found = present()?;
        if level_of(&found).is_some() {
            return Ok(());
        }
        let level = self.0.len();
        let (Some(&handler), Some(older)) = (LEVELS.get(level), OLDER.get(level)) else {
            return Err(Errno::BUSY);
        };
        older.set(&found);
        let mut ours = found;
        ours.sa_sigaction = handler as usize;
        // The older one is called with the signals blocked that it asked for, and interrupts what it would have.
        ours.sa_flags = SA_SIGINFO | SA_ONSTACK | (found.sa_flags & (SA_NODEFER | SA_RESTART));
        let replaced = exchange(Some(&ours))?;
        older.set(&replaced);
        self.0.push(replaced);
        Ok(())
    }

    /// Put back what was found, unless somebody stands in front of us.
    pub(super) fn remove(&mut self) {
        let Ok(found) = present() else { return };
        let Some(level) = level_of(&found) else { return };
        let Some(older) = self.0.get(level) else { return };
        if exchange(Some(older)).is_ok() && level.saturating_add(1) == self.0.len() {
            self.0.pop();
        }
    }
}

fn level_of(action: &libc::sigaction) -> Option<usize> {
    LEVELS.iter().position(|&level| level as usize == action.sa_sigaction)
}

fn present() -> Result<libc::sigaction, Errno> {
    exchange(None)
}

/// The handler that there was; `action` is the new one, if given.
fn exchange(action: Option<&libc::sigaction>) -> Result<libc::sigaction, Errno> {
    let new = action.map_or(null(), std::ptr::from_ref);
    let mut old = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: both pointers are null or valid for the call; a new handler is one that was found installed or ours, which
    // does only what a handler may (M8).
    let failed = unsafe { libc::sigaction(SIGBUS, new, old.as_mut_ptr()) } != 0;
    if failed {
        return Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::INVAL));
    }
    // SAFETY: the call has succeeded and filled it; all its fields are numbers, of which zero is one.
    Ok(unsafe { old.assume_init() })
}

extern "C" fn on_bus<const LEVEL: usize>(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: it returns the address of this thread's errno, always.
    let errno = unsafe { libc::__errno_location() };
    // SAFETY: as above; nobody else has this thread's.
    let before = unsafe { errno.read() };
    // SAFETY: the kernel hands a siginfo to a handler with SA_SIGINFO, which each of ours is installed with.
    let known = unsafe { info.as_ref() };
    let code = known.map_or(0, |known| known.si_code);
    // SAFETY: of a fault this field holds an address; of anything else we only compare it.
    let address = known.map_or(null_mut(), |known| unsafe { known.si_addr() });
    // Of the reasons for SIGBUS the one that a short file has.
    let guarded = code == BUS_ADRERR && cover(address);
    if !guarded {
        pass_on(OLDER.get(LEVEL), code, signal, info, context);
    }
    // SAFETY: as above.
    unsafe { errno.write(before) };
}

/// What would have happened without us.
fn pass_on(older: Option<&Older>, code: c_int, signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    let handler = older.map_or(SIG_DFL, |older| older.handler.load(Ordering::SeqCst));
    // The reasons up to this one are faults: whoever returns makes the same access again.
    let fault = (1..=BUS_MCEERR_AR).contains(&code);
    if handler == SIG_DFL || (handler == SIG_IGN && (fault || code == SI_KERNEL)) {
        // A fault comes again when we return, and ends the process. The kernel lets nobody ignore one.
        restore_default();
        if !fault {
            // SAFETY: it only sends a signal, to this thread.
            unsafe { libc::raise(signal) };
        }
        return;
    }
    if handler == SIG_IGN {
        return;
    }
    if older.is_some_and(|older| older.has(SA_RESETHAND)) {
        restore_default();
    }
    // SAFETY: it was installed as a handler (M8). The kernel passes these three to one without SA_SIGINFO as well.
    let call = unsafe { std::mem::transmute::<usize, Handler>(handler) };
    call(signal, info, context);
}

fn restore_default() {
    // SAFETY: all its fields are numbers (or a function that may be absent), of which zero is one; SIG_DFL is zero.
    let default: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    // SAFETY: the pointers are valid or null; the default is no code of anybody's.
    unsafe { libc::sigaction(SIGBUS, &raw const default, null_mut()) };
}
