//! Writing to an eventfd that may fill up before we do, where there is no better way: watched by a thread that lets us out.
//!
//! # Theory
//!
//! The write is preceded by a look for room, so it waits only if somebody fills the counter in between and has made it
//! blocking. A thread looks every few milliseconds whether the same write is still under way, and then takes the counter's
//! value, which makes room. The wake-up gets through; what is lost is a count that was there to do harm.
//!
//! A writer that stands still for want of a processor looks the same, and may have written already: then its own is what is
//! taken. So a write that was let out is followed by another where nothing is to be read. A peer that refills it each time,
//! and reads what we wrote at once, costs us [`TRIES`] times twice [`PATIENCE`] a wake-up, and cannot do more than that.
//!
//! The thread is made at the first write and waits while nothing is written. A child of fork makes its own.

use std::os::fd::{AsFd, OwnedFd};
use std::process;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use rustix::event::PollFlags;
use rustix::io::{Errno, retry_on_intr};

use super::{UNIT, ready, take};

/// How long a write may wait, at most twice this.
const PATIENCE: Duration = Duration::from_millis(2);

/// What is being written now.
struct Writes {
    /// Process that has the thread.
    watched: u32,
    /// Number of the next write.
    next: u64,
    under_way: Vec<Write>,
}

/// One write.
struct Write {
    ticket: u64,
    fd: Arc<OwnedFd>,
    /// Whether the counter's value was taken meanwhile.
    let_out: bool,
}

/// Writes for one wake-up: more than that are let out where a peer wants it so.
const TRIES: usize = 4;

static WRITES: Mutex<Writes> = Mutex::new(Writes {
    watched: 0,
    next: 0,
    under_way: Vec::new(),
});
static BEGUN: Condvar = Condvar::new();

fn writes() -> MutexGuard<'static, Writes> {
    WRITES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Add one to `fd` if it has room; each of [`TRIES`] waits for twice [`PATIENCE`] at worst.
///
/// # Errors
/// What the operating system says, of the write or when there is no thread to be had.
pub(super) fn write(fd: &Arc<OwnedFd>) -> Result<(), Errno> {
    for _ in 0..TRIES {
        if !ready(fd.as_fd(), PollFlags::OUT) {
            break;
        }
        let ticket = begin(fd)?;
        let written = retry_on_intr(|| rustix::io::write(fd, &1_u64.to_ne_bytes()));
        let let_out = end(ticket);
        match written {
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(errno) => return Err(errno),
        }
        if !let_out || ready(fd.as_fd(), PollFlags::IN) {
            break;
        }
    }
    Ok(())
}

/// That write is done; whether it was let out.
fn end(ticket: u64) -> bool {
    let mut writes = writes();
    let place = writes.under_way.iter().position(|write| write.ticket == ticket);
    place.is_some_and(|place| writes.under_way.swap_remove(place).let_out)
}

/// Have a write to `fd` watched; its number.
fn begin(fd: &Arc<OwnedFd>) -> Result<u64, Errno> {
    let mut writes = writes();
    let us = process::id();
    if writes.watched != us {
        // What a parent was writing is not ours to watch.
        writes.under_way.clear();
        thread::Builder::new()
            .name("notifier watch".to_owned())
            .spawn(watch)
            .map_err(|_| Errno::AGAIN)?;
        writes.watched = us;
    }
    let ticket = writes.next;
    writes.next = ticket.wrapping_add(1);
    writes.under_way.push(Write {
        ticket,
        fd: Arc::clone(fd),
        let_out: false,
    });
    BEGUN.notify_one();
    Ok(ticket)
}

/// Make room for writes that were under way when we looked last. Never ends.
fn watch() {
    let mut seen = Vec::new();
    let mut writes = writes();
    loop {
        for write in &mut writes.under_way {
            if seen.contains(&write.ticket) {
                // Cannot wait either. The write holds the fd, and the lock keeps the write from ending.
                let _ = take(write.fd.as_fd(), &mut [0; UNIT]);
                write.let_out = true;
            }
        }
        seen.clear();
        seen.extend(writes.under_way.iter().map(|write| write.ticket));
        writes = if seen.is_empty() {
            BEGUN.wait(writes).unwrap_or_else(PoisonError::into_inner)
        } else {
            let (writes, _) = BEGUN
                .wait_timeout_while(writes, PATIENCE, |_| true)
                .unwrap_or_else(PoisonError::into_inner);
            writes
        };
    }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        reason = "a test that panics has failed, which is what it is for"
    )]

    use rustix::event::{EventfdFlags, eventfd};
    use rustix::io::read;

    use super::*;

    fn blocking(value: u64) -> Arc<OwnedFd> {
        let fd = eventfd(0, EventfdFlags::empty()).unwrap();
        if value > 0 {
            rustix::io::write(&fd, &value.to_ne_bytes()).unwrap();
        }
        Arc::new(fd)
    }

    fn value(fd: &OwnedFd) -> u64 {
        let mut bytes = [0; UNIT];
        read(fd, &mut bytes).unwrap();
        u64::from_ne_bytes(bytes)
    }

    #[test]
    fn a_write_adds_one_unless_it_is_full() {
        let (fd, full) = (blocking(0), blocking(u64::MAX - 1));
        write(&fd).unwrap();
        write(&fd).unwrap();
        write(&full).unwrap();
        assert_eq!((value(&fd), value(&full)), (2, u64::MAX - 1));
    }

    #[test]
    fn a_write_that_waits_is_let_out_and_arrives() {
        let full = blocking(u64::MAX - 1);
        // As if it had been filled after the look for room.
        for _ in 0..3 {
            let ticket = begin(&full).unwrap();
            rustix::io::write(full.as_ref(), &1_u64.to_ne_bytes()).unwrap();
            assert!(end(ticket), "it was let out");
            assert_eq!(value(&full), 1);
            rustix::io::write(full.as_ref(), &(u64::MAX - 1).to_ne_bytes()).unwrap();
        }
    }

    /// A writer that gets no processor behind its write has its own taken, and knows of it.
    #[test]
    fn who_has_written_and_is_let_out_all_the_same_is_told() {
        let fd = blocking(0);
        let ticket = begin(&fd).unwrap();
        rustix::io::write(fd.as_ref(), &1_u64.to_ne_bytes()).unwrap();
        while ready(fd.as_fd(), PollFlags::IN) {
            thread::sleep(PATIENCE);
        }
        assert!(end(ticket));
        let quick = begin(&fd).unwrap();
        assert!(!end(quick) && !end(quick));
    }

    /// As the watch does it, in the moment between a write and its end.
    #[test]
    fn a_wake_up_that_was_taken_from_who_had_written_it_comes_all_the_same() {
        let mut taken = 0;
        for _ in 0..100_000 {
            let (fd, before) = (blocking(0), taken);
            thread::scope(|scope| {
                let thread = scope.spawn(|| write(&fd).unwrap());
                while taken == before && !thread.is_finished() {
                    let mut all = writes();
                    let ours = all.under_way.iter_mut().find(|write| Arc::ptr_eq(&write.fd, &fd));
                    if let Some(ours) = ours.filter(|_| ready(fd.as_fd(), PollFlags::IN)) {
                        assert_eq!(value(&fd), 1);
                        ours.let_out = true;
                        taken += 1;
                    }
                }
            });
            assert!(ready(fd.as_fd(), PollFlags::IN), "it is lost");
            if taken >= 3 {
                return;
            }
        }
        unreachable!("never between the two");
    }

    #[test]
    fn what_was_written_is_not_watched_any_more() {
        let fd = blocking(0);
        write(&fd).unwrap();
        thread::sleep(PATIENCE * 10);
        assert!(ready(fd.as_fd(), PollFlags::IN), "it is still there");
    }
}
