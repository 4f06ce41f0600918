//! Adding one to an eventfd that is somebody else's as well, without ever waiting for room in it.
//!
//! # Theory
//!
//! Writing to an eventfd waits while it is full, unless its open file is marked O_NONBLOCK. Who sent it to us holds the
//! same open file, so the mark is theirs to take away at any time, and a look for room (poll) says nothing about the next
//! moment. RWF_NOWAIT is not for writes to eventfds. What never waits is the kernel's own signal, as its devices give it:
//! it adds what still fits. Linux AIO gives it for us: an operation that names the eventfd as the one to signal
//! (IOCB_FLAG_RESFD) signals it on completion. Our operation polls the eventfd itself for "readable or writable", which
//! every eventfd is at every moment but one (a counter at 2⁶⁴ - 1 reports an error, which is polled for always): so it
//! completes within the call, and one call is one signal. Where another signal of the same eventfd comes between the look and
//! the wait, the kernel may leave it to a worker of its own, and it comes a moment after the call.
//!
//! There is one AIO context in a process, made at the first signal. Nobody reads its events, so they are thrown away when
//! there is no room for more. A child of fork has none (the kernel says EINVAL) and makes its own.
//!
//! Where AIO is refused (no such kernel option, a filter of system calls, or none left on the machine) we look for room and
//! write as everybody does, [watched](super::watch).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::event::PollFlags;
use rustix::io::Errno;

use super::watch;

/// Operations that the context has room for, at least.
const ROOM: libc::c_long = 256;
/// Events thrown away by one call.
const BATCH: u8 = 64;
/// Times that room is made for one signal: the kernel keeps some room back for each processor.
const TRIES: usize = 4;
/// What is in place of a context: not asked for yet, and refused.
const NONE: usize = 0;
const REFUSED: usize = usize::MAX;

const CMD_POLL: u16 = 5;
const FLAG_RESFD: u32 = 1;

/// `struct iocb` of the kernel's interface.
#[repr(C)]
#[derive(Default)]
struct Iocb {
    data: u64,
    key_and_rw_flags: [u32; 2],
    opcode: u16,
    priority: i16,
    fd: u32,
    buf: u64,
    nbytes: u64,
    offset: i64,
    reserved2: u64,
    flags: u32,
    resfd: u32,
}

/// `struct io_event` of the kernel's interface.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct IoEvent {
    words: [u64; 4],
}

/// The context of the process; of the one that it is a fork of, until a child finds out.
static CONTEXT: AtomicUsize = AtomicUsize::new(NONE);

/// Add one to `fd`, unless it is full.
///
/// # Errors
/// What the operating system says of a file that is no eventfd.
pub(super) fn signal(fd: &Arc<OwnedFd>) -> Result<(), Errno> {
    signal_with(&CONTEXT, fd)
}

fn signal_with(known: &AtomicUsize, fd: &Arc<OwnedFd>) -> Result<(), Errno> {
    for _ in 0..TRIES {
        let context = match known.load(Ordering::Acquire) {
            NONE => setup(known, NONE),
            context => context,
        };
        if context == REFUSED {
            break;
        }
        match submit(context, fd.as_fd()) {
            Err(Errno::AGAIN) => drop(discard(context)),
            // No eventfd, or no context of this process.
            Err(Errno::INVAL) if discard(context).is_err() => drop(setup(known, context)),
            done => return done,
        }
    }
    watch::write(fd)
}

/// Put a context in the place of `old` in `known`; the one that is there then, if another thread was first.
fn setup(known: &AtomicUsize, old: usize) -> usize {
    let mut made: usize = 0;
    // SAFETY: the kernel writes one word, the new context's name, into ours.
    let done = unsafe { libc::syscall(libc::SYS_io_setup, ROOM, ptr::from_mut(&mut made)) };
    let new = if done == 0 { made } else { REFUSED };
    match known.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => new,
        Err(first) => {
            if done == 0 {
                destroy(made);
            }
            first
        }
    }
}

fn destroy(context: usize) {
    // SAFETY: takes a name by value, of a context that nobody will use any more.
    unsafe { libc::syscall(libc::SYS_io_destroy, context) };
}

/// One operation that completes at once and signals `fd`.
fn submit(context: usize, fd: BorrowedFd<'_>) -> Result<(), Errno> {
    let number = u32::try_from(fd.as_raw_fd()).map_err(|_| Errno::BADF)?;
    let mut operation = Iocb {
        opcode: CMD_POLL,
        fd: number,
        buf: u64::from((PollFlags::IN | PollFlags::OUT).bits()),
        flags: FLAG_RESFD,
        resfd: number,
        ..Iocb::default()
    };
    let one: libc::c_long = 1;
    let mut list = [ptr::from_mut(&mut operation)];
    // SAFETY: the kernel reads a list of one pointer and the operation behind it, and writes the operation's key, all
    // before it returns; the operation has no buffer.
    let taken = unsafe { libc::syscall(libc::SYS_io_submit, context, one, list.as_mut_ptr()) };
    match taken {
        1 => Ok(()),
        _ => Err(last_error()),
    }
}

/// Make room: throw away events of operations that are complete.
///
/// # Errors
/// `INVAL` if there is no such context here.
fn discard(context: usize) -> Result<(), Errno> {
    let mut events = [IoEvent::default(); BATCH as usize];
    let (none, most): (libc::c_long, libc::c_long) = (0, BATCH.into());
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes at most BATCH events into an array of so many, and reads the time, before it returns.
    let taken = unsafe {
        libc::syscall(
            libc::SYS_io_getevents,
            context,
            none,
            most,
            events.as_mut_ptr(),
            ptr::from_mut(&mut now),
        )
    };
    if taken < 0 { Err(last_error()) } else { Ok(()) }
}

fn last_error() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        reason = "a test that panics has failed, which is what it is for"
    )]

    use std::sync::{Mutex, MutexGuard, PoisonError};
    use std::thread;
    use std::time::{Duration, Instant};

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, memfd_create};
    use rustix::io::read;

    use super::super::ready;
    use super::*;

    fn value(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; 8];
        read(fd, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    /// For tests that make contexts of their own: the kernel gives the name of one that is gone to the next. The context of the
    /// process is there then, so nobody else makes one.
    fn making() -> MutexGuard<'static, ()> {
        static MAKING: Mutex<()> = Mutex::new(());
        signal(&Arc::new(eventfd(0, EventfdFlags::empty()).unwrap())).unwrap();
        MAKING.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Four threads, each 3,000 times.
    fn together(signal: impl Fn() + Sync) {
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..3000).for_each(|_| signal()));
            }
        });
    }

    #[test]
    fn threads_that_signal_more_than_there_is_room_for_lose_nothing() {
        let fd = Arc::new(eventfd(0, EventfdFlags::empty()).unwrap());
        signal(&fd).unwrap();
        let context = CONTEXT.load(Ordering::Acquire);
        together(|| {
            while let Err(refused) = submit(context, fd.as_fd()) {
                assert_eq!(refused, Errno::AGAIN);
                discard(context).unwrap();
            }
        });
        // What was left to the kernel's worker comes a moment later.
        let (mut count, begun) = (0, Instant::now());
        while count < 12_001 && begun.elapsed() < Duration::from_secs(10) {
            if ready(fd.as_fd(), PollFlags::IN) {
                count += value(&fd);
            }
        }
        assert_eq!(count, 12_001);
    }

    /// Where room is made in vain it is written, and a write that is let out costs counts, but never the last of them.
    #[test]
    fn threads_that_signal_however_it_goes_lose_no_wake_up() {
        let fd = Arc::new(eventfd(0, EventfdFlags::empty()).unwrap());
        together(|| signal(&fd).unwrap());
        assert!(ready(fd.as_fd(), PollFlags::IN));
        assert!((1..=12_000).contains(&value(&fd)));
    }

    #[test]
    fn a_context_that_is_full_of_events_takes_more() {
        let _alone = making();
        let context = setup(&AtomicUsize::new(NONE), NONE);
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        let mut signals = 0;
        while submit(context, fd.as_fd()) == Ok(()) {
            signals += 1;
        }
        assert!(signals >= 128, "{signals}");
        discard(context).unwrap();
        assert_eq!(submit(context, fd.as_fd()), Ok(()));
        assert_eq!(value(&fd), signals + 1);
        destroy(context);
    }

    #[test]
    fn a_context_that_is_gone_is_replaced() {
        let _alone = making();
        let known = AtomicUsize::new(NONE);
        let fd = Arc::new(eventfd(0, EventfdFlags::empty()).unwrap());
        signal_with(&known, &fd).unwrap();
        let first = known.load(Ordering::Relaxed);
        // As a child of fork finds it.
        destroy(first);
        assert_eq!(discard(first), Err(Errno::INVAL));
        signal_with(&known, &fd).unwrap();
        assert_eq!(value(&fd), 2);
        // Somebody else was quicker.
        let second = known.load(Ordering::Relaxed);
        assert_eq!(setup(&known, NONE), second);
        destroy(second);
    }

    #[test]
    fn where_it_is_refused_it_is_written() {
        let fd = Arc::new(eventfd(0, EventfdFlags::empty()).unwrap());
        signal_with(&AtomicUsize::new(REFUSED), &fd).unwrap();
        assert_eq!(value(&fd), 1);
    }

    #[test]
    fn a_file_that_is_no_eventfd_is_told() {
        let memory = Arc::new(memfd_create(c"test", MemfdFlags::CLOEXEC).unwrap());
        assert_eq!(signal(&memory), Err(Errno::INVAL));
    }
}
