//! Waiting for readable fds, with an end to the wait that any thread can call for.
//!
//! # Theory
//!
//! poll(2) over a handful of fds: each device's loop has one socket and a few kicks, for which nothing faster is
//! needed. The fds are borrowed numbers, not ours: holding a duplicate would keep a connection open that its owner has
//! closed. A number that is closed while it is watched is reported as ready, and its owner finds out.
//!
//! One eventfd ends waits: its upper half counts calls of [`Poller::wake`], its lower half changes of the set, which a
//! running wait takes up without ending.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::{Errno, fcntl_getfd, read, retry_on_intr, write};

/// What one `wake` adds to the eventfd.
const WAKE: u64 = 1 << 32;
/// What one change of the set adds.
const CHANGE: u64 = 1;

/// Why a poller cannot do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PollerError {
    /// The number is no open fd.
    #[error("fd {fd} is not open")]
    NotOpen {
        /// The number.
        fd: RawFd,
    },
    /// The fd is watched already.
    #[error("fd {fd} is watched already")]
    Twice {
        /// The number.
        fd: RawFd,
    },
    /// The fd is not watched.
    #[error("fd {fd} is not watched")]
    Unknown {
        /// The number.
        fd: RawFd,
    },
    /// The operating system refused.
    #[error("cannot {what}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The reason.
        errno: Errno,
    },
}

/// How a wait ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Polled {
    /// These fds are readable, closed by the peer or in error (`wake` may have been called too).
    Ready(Vec<RawFd>),
    /// `wake` was called.
    Woken,
    /// The time is over.
    Timeout,
    /// A signal handler ran.
    Interrupted,
}

/// Waits for readable fds; see the module's head.
#[derive(Debug)]
pub struct Poller {
    wake: OwnedFd,
    fds: Mutex<Vec<RawFd>>,
}

impl Poller {
    /// A poller that watches nothing.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn new() -> Result<Self, PollerError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let wake = eventfd(0, flags).map_err(|errno| PollerError::System {
            what: "make an eventfd",
            errno,
        })?;
        Ok(Self {
            wake,
            fds: Mutex::default(),
        })
    }

    fn fds(&self) -> MutexGuard<'_, Vec<RawFd>> {
        // A list of numbers is whole at every moment.
        self.fds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fds that are watched, in the order in which they were added.
    #[must_use]
    pub fn watched(&self) -> Vec<RawFd> {
        self.fds().clone()
    }

    /// Watch `fd`, which stays its owner's.
    ///
    /// # Errors
    /// `NotOpen` or `Twice`.
    pub fn add(&self, fd: RawFd) -> Result<(), PollerError> {
        if fd < 0 || fcntl_getfd(borrow(fd)).is_err() {
            return Err(PollerError::NotOpen { fd });
        }
        let mut fds = self.fds();
        if fds.contains(&fd) {
            return Err(PollerError::Twice { fd });
        }
        fds.push(fd);
        drop(fds);
        self.signal(CHANGE);
        Ok(())
    }

    /// Watch `fd` no more.
    ///
    /// # Errors
    /// `Unknown`.
    pub fn remove(&self, fd: RawFd) -> Result<(), PollerError> {
        let mut fds = self.fds();
        let place = fds
            .iter()
            .position(|&known| known == fd)
            .ok_or(PollerError::Unknown { fd })?;
        fds.remove(place);
        drop(fds);
        self.signal(CHANGE);
        Ok(())
    }

    /// End one wait, the running or the next one; from any thread.
    pub fn wake(&self) {
        self.signal(WAKE);
    }

    fn signal(&self, what: u64) {
        // Full means that wake-ups enough are waiting; there is no other way for this write to fail.
        let _ = retry_on_intr(|| write(&self.wake, &what.to_ne_bytes()));
    }

    /// Take what was signalled; whether `wake` was among it.
    fn woken(&self) -> bool {
        let mut value = [0; 8];
        retry_on_intr(|| read(&self.wake, &mut value)).is_ok() && u64::from_ne_bytes(value) >= WAKE
    }

    /// Wait until an fd is ready, `wake` is called, a signal arrives or `timeout` is over.
    ///
    /// # Errors
    /// What the operating system says (no memory).
    pub fn wait(&self, timeout: Duration) -> Result<Polled, PollerError> {
        let start = Instant::now();
        loop {
            let watched = self.watched();
            let all = std::iter::once(self.wake.as_fd()).chain(watched.iter().map(|&fd| borrow(fd)));
            let mut polled: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
            let left = timeout.saturating_sub(start.elapsed());
            let left = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut polled, Some(&left)) {
                Ok(0) => return Ok(Polled::Timeout),
                Ok(_) => {}
                Err(Errno::INTR) => return Ok(Polled::Interrupted),
                Err(errno) => return Err(PollerError::System { what: "poll", errno }),
            }
            let mut events = polled.iter().map(|fd| !fd.revents().is_empty());
            let signalled = events.next() == Some(true);
            let ready: Vec<_> = watched
                .iter()
                .zip(events)
                .filter(|(_, ready)| *ready)
                .map(|(&fd, _)| fd)
                .collect();
            let woken = signalled && self.woken();
            if !ready.is_empty() {
                return Ok(Polled::Ready(ready));
            }
            if woken {
                return Ok(Polled::Woken);
            }
        }
    }
}

/// The number as rustix wants it; never -1.
fn borrow<'a>(fd: RawFd) -> BorrowedFd<'a> {
    // SAFETY: the number is not negative (`add` refuses those). It is only handed to poll and F_GETFD, which take any
    // number and report one that is not open (M5).
    unsafe { BorrowedFd::borrow_raw(fd) }
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        reason = "a test that panics has failed, which is what it is for"
    )]

    use std::os::fd::AsRawFd;

    use rustix::pipe::pipe;

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn what_is_readable_closed_or_invalid_is_ready() {
        let poller = Poller::new().unwrap();
        let (quiet, _open) = pipe().unwrap();
        let (reader, writer) = pipe().unwrap();
        let (hung, gone) = pipe().unwrap();
        for fd in [&quiet, &reader, &hung] {
            poller.add(fd.as_raw_fd()).unwrap();
        }
        assert_eq!(poller.wait(Duration::from_millis(1)).unwrap(), Polled::Timeout);
        write(&writer, &[1]).unwrap();
        assert_eq!(poller.wait(LONG).unwrap(), Polled::Ready(vec![reader.as_raw_fd()]));
        drop(gone);
        assert_eq!(
            poller.wait(LONG).unwrap(),
            Polled::Ready(vec![reader.as_raw_fd(), hung.as_raw_fd()])
        );
        poller.remove(reader.as_raw_fd()).unwrap();
        poller.remove(hung.as_raw_fd()).unwrap();
        assert_eq!(poller.watched(), [quiet.as_raw_fd()]);
    }

    #[test]
    fn wrong_numbers_are_refused() {
        let poller = Poller::new().unwrap();
        let (reader, _writer) = pipe().unwrap();
        let fd = reader.as_raw_fd();
        poller.add(fd).unwrap();
        assert_eq!(poller.add(fd), Err(PollerError::Twice { fd }));
        let input = fcntl_getfd(std::io::stdin()).map(drop);
        assert_eq!(poller.add(0).is_ok(), input.is_ok(), "0 is a number like any other");
        for fd in [-1, i32::MIN, 1_000_000] {
            assert_eq!(poller.add(fd), Err(PollerError::NotOpen { fd }));
            assert_eq!(poller.remove(fd), Err(PollerError::Unknown { fd }));
        }
    }

    #[test]
    fn a_wake_ends_one_wait_and_a_change_of_the_set_ends_none() {
        let poller = Poller::new().unwrap();
        poller.wake();
        poller.wake();
        assert_eq!(poller.wait(LONG).unwrap(), Polled::Woken);
        assert_eq!(poller.wait(Duration::ZERO).unwrap(), Polled::Timeout);
        let (reader, writer) = pipe().unwrap();
        write(&writer, &[1]).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| poller.wait(LONG).unwrap());
            std::thread::sleep(Duration::from_millis(30));
            poller.add(reader.as_raw_fd()).unwrap();
            assert_eq!(waiter.join().unwrap(), Polled::Ready(vec![reader.as_raw_fd()]));
            poller.remove(reader.as_raw_fd()).unwrap();
            let waiter = scope.spawn(|| poller.wait(LONG).unwrap());
            std::thread::sleep(Duration::from_millis(30));
            poller.wake();
            assert_eq!(waiter.join().unwrap(), Polled::Woken);
        });
    }
}
