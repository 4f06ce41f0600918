//! How one end of a queue wakes the other: an eventfd, a pipe or socket, or a function.
//!
//! # Theory
//!
//! Waking must never block: the counter or pipe belongs to the other side as well, who may fill it and make it
//! blocking at any time. When there is no room, the other side has a wake-up before it that it has not taken yet, and one
//! more would say nothing new. That the reader has gone is no error either: the connection that carried the fd will tell.
//! A look for room before a write is not enough, since it may be filled in between. So each kind has its own way:
//!
//! - An eventfd is [signalled by the kernel](counter), which does not wait.
//! - A socket is asked to not wait by each send and each receive.
//! - A pipe is opened again through /proc: O_NONBLOCK of that open file is ours alone. Where that cannot be done (no
//!   /proc, a pipe of another user) each write and read asks to not wait, which pipes know from Linux 6.4 on; before it,
//!   there is a look for room, and a peer who fills the pipe in between and made it blocking can hold us. Whoever reads or
//!   writes a pipe holds its lock while his own memory is reached, so a peer whose memory is on a file system of his own
//!   can hold it too, on any kernel: take pipes from those you trust. We make none ourselves.
//!
//! A wake-up is always the same 8 bytes, a native-endian u64 of 1: what an eventfd counts, and in a pipe one unit.

mod counter;
mod watch;

use std::fmt;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{FileType, Mode, OFlags, fcntl_getfl, fstat, open};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev2, read, retry_on_intr, write};
use rustix::net::{RecvFlags, SendFlags, recv, send};

/// Bytes of one wake-up.
const UNIT: usize = 8;
/// Reads of one [`Notifier::drain`] at most (1 MiB, the largest pipe that an unprivileged peer can have): whoever
/// writes faster than we read must not keep us here.
const DRAIN_ROUNDS: usize = 256;

/// Why an fd cannot be a notifier, or a notifier cannot do what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotifyError {
    /// A file of another kind than eventfd, pipe or socket.
    #[error("the file is neither an eventfd nor a pipe nor a socket")]
    WrongKind,
    /// The fd is open for reading only: it can be waited on and drained.
    #[error("the fd is open for reading only and cannot notify")]
    ReadOnly,
    /// The operating system refused.
    #[error("cannot {what}: {errno}")]
    System {
        /// What was tried.
        what: &'static str,
        /// The reason.
        errno: Errno,
    },
}

enum Kind {
    /// A counter: one read takes all of it.
    Counter(Arc<OwnedFd>),
    /// A pipe, and whether its open file is ours alone and does not wait: bytes are read until there are none.
    Pipe(OwnedFd, bool),
    /// A socket, as a pipe.
    Socket(OwnedFd),
    /// A function of ours.
    Callback(Box<dyn Fn() + Send + Sync>),
}

/// Wakes the other end; see the module's head.
pub struct Notifier {
    kind: Kind,
    read_only: bool,
    count: AtomicU64,
}

impl Notifier {
    const fn of(kind: Kind, read_only: bool) -> Self {
        Self {
            kind,
            read_only,
            count: AtomicU64::new(0),
        }
    }

    /// A new eventfd, non-blocking.
    ///
    /// # Errors
    /// What the operating system says.
    pub fn eventfd() -> Result<Self, NotifyError> {
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let fd = eventfd(0, flags).map_err(|errno| NotifyError::System {
            what: "make an eventfd",
            errno,
        })?;
        Ok(Self::of(Kind::Counter(Arc::new(fd)), false))
    }

    /// An eventfd, pipe or socket that somebody gave us.
    ///
    /// # Errors
    /// `WrongKind` for a file that could be readable for ever or that cannot wake anybody.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NotifyError> {
        let refused = |errno| NotifyError::System {
            what: "look at the fd",
            errno,
        };
        let stat = fstat(&fd).map_err(refused)?;
        let mode = fcntl_getfl(&fd).map_err(refused)? & OFlags::ACCMODE;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Fifo => match reopened(fd.as_fd(), mode) {
                Some(ours) => Kind::Pipe(ours, true),
                None => Kind::Pipe(fd, false),
            },
            FileType::Socket => Kind::Socket(fd),
            // eventfd (as every anonymous inode) has no type of file.
            FileType::Unknown => Kind::Counter(Arc::new(fd)),
            _ => return Err(NotifyError::WrongKind),
        };
        Ok(Self::of(kind, mode == OFlags::RDONLY))
    }

    /// Call `function` in the thread that notifies.
    #[must_use]
    pub fn callback(function: Box<dyn Fn() + Send + Sync>) -> Self {
        Self::of(Kind::Callback(function), false)
    }

    /// Wake the other end. Never blocks; a full counter or pipe, or a reader that is gone, is no error.
    ///
    /// # Errors
    /// `ReadOnly` for the reading end of a pipe, or what the operating system says of a file that is no eventfd.
    pub fn notify(&self) -> Result<(), NotifyError> {
        self.count_one();
        if self.read_only {
            return Err(NotifyError::ReadOnly);
        }
        let unit = 1_u64.to_ne_bytes();
        let done = match &self.kind {
            Kind::Callback(function) => {
                function();
                return Ok(());
            }
            Kind::Counter(fd) => counter::signal(fd),
            Kind::Pipe(fd, true) => retry_on_intr(|| write(fd, &unit)).map(drop),
            Kind::Pipe(fd, false) => put(fd.as_fd(), &unit),
            Kind::Socket(fd) => {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                retry_on_intr(|| send(fd, &unit, flags)).map(drop)
            }
        };
        match done {
            Ok(()) | Err(Errno::AGAIN | Errno::PIPE | Errno::CONNRESET) => Ok(()),
            Err(errno) => Err(NotifyError::System {
                what: "write a notification",
                errno,
            }),
        }
    }

    /// Count a notification that was delivered in another way.
    pub fn count_one(&self) {
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// How often `notify` was called.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// The fd to wait on; none for a callback.
    #[must_use]
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        match &self.kind {
            Kind::Counter(fd) => Some(fd.as_fd()),
            Kind::Pipe(fd, _) | Kind::Socket(fd) => Some(fd.as_fd()),
            Kind::Callback(_) => None,
        }
    }

    /// Take what has been notified: the count of an eventfd, or a pipe's bytes divided by 8 (a rest counts as one).
    /// Never blocks; 0 for a callback, and when there is nothing or the fd cannot be read.
    #[must_use]
    pub fn drain(&self) -> u64 {
        match &self.kind {
            Kind::Counter(fd) => {
                let mut value = [0; UNIT];
                match take(fd.as_fd(), &mut value) {
                    Ok(UNIT) => u64::from_ne_bytes(value),
                    _ => 0,
                }
            }
            Kind::Pipe(fd, true) => all(|buffer| retry_on_intr(|| read(fd, &mut *buffer)).unwrap_or(0)),
            Kind::Pipe(fd, false) => all(|buffer| match take(fd.as_fd(), buffer) {
                Err(Errno::OPNOTSUPP) if ready(fd.as_fd(), PollFlags::IN) => {
                    retry_on_intr(|| read(fd, &mut *buffer)).unwrap_or(0)
                }
                taken => taken.unwrap_or(0),
            }),
            Kind::Socket(fd) => all(|buffer| {
                let received = retry_on_intr(|| recv(fd, &mut *buffer, RecvFlags::DONTWAIT));
                received.map_or(0, |(taken, _)| taken)
            }),
            Kind::Callback(_) => 0,
        }
    }
}

impl fmt::Debug for Notifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut out = f.debug_struct("Notifier");
        match &self.kind {
            Kind::Counter(fd) => out.field("counter", fd),
            Kind::Pipe(fd, ours) => out.field("pipe", fd).field("ours", ours),
            Kind::Socket(fd) => out.field("socket", fd),
            Kind::Callback(_) => out.field("callback", &format_args!("…")),
        };
        out.field("read_only", &self.read_only)
            .field("count", &self.count())
            .finish()
    }
}

/// Whether `fd` can do `what` now, or has an error that doing it will report.
fn ready(fd: BorrowedFd<'_>, what: PollFlags) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(fd, what)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    retry_on_intr(|| poll(&mut fds, Some(&now))).is_ok_and(|count| count > 0)
}

/// The same pipe in an open file of our own, whose O_NONBLOCK nobody else can take away; none where there is no /proc,
/// or the pipe is another user's.
fn reopened(pipe: BorrowedFd<'_>, mode: OFlags) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    open(path, mode | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()).ok()
}

/// Write `unit` to a pipe whose O_NONBLOCK is anybody's, without waiting where the kernel knows how; see the module's head.
fn put(pipe: BorrowedFd<'_>, unit: &[u8]) -> Result<(), Errno> {
    let at_its_position = u64::MAX;
    let now = retry_on_intr(|| pwritev2(pipe, &[IoSlice::new(unit)], at_its_position, ReadWriteFlags::NOWAIT));
    match now {
        Err(Errno::OPNOTSUPP) if ready(pipe, PollFlags::OUT) => retry_on_intr(|| write(pipe, unit)).map(drop),
        Err(Errno::OPNOTSUPP) => Ok(()),
        now => now.map(drop),
    }
}

/// Read once into `buffer`, if there is something; how many bytes. Others hold the fd too, and can take what a poll has
/// announced before we read it: so this read cannot wait.
///
/// # Errors
/// What the operating system says; `OPNOTSUPP` for pipes before Linux 6.4 and files that know no such read.
fn take(fd: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<usize, Errno> {
    let at_its_position = u64::MAX;
    retry_on_intr(|| {
        preadv2(
            fd,
            &mut [IoSliceMut::new(&mut *buffer)],
            at_its_position,
            ReadWriteFlags::NOWAIT,
        )
    })
}

/// Units in what `read` gives until there is no more; a rest counts as one.
fn all(read: impl Fn(&mut [u8]) -> usize) -> u64 {
    let mut buffer = [0; 4096];
    let rounds = (0..DRAIN_ROUNDS).map(|_| read(&mut buffer));
    let bytes: usize = rounds.take_while(|&taken| taken > 0).sum();
    bytes.div_ceil(UNIT) as u64
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        reason = "a test that panics has failed, which is what it is for"
    )]

    use std::os::unix::net::UnixStream;
    use std::sync::Arc;

    use rustix::pipe::{PipeFlags, pipe, pipe_with};

    use super::*;

    #[test]
    fn an_eventfd_counts_and_never_blocks_when_full() {
        let notifier = Notifier::eventfd().unwrap();
        assert_eq!(notifier.drain(), 0);
        notifier.notify().unwrap();
        notifier.notify().unwrap();
        assert_eq!((notifier.drain(), notifier.drain(), notifier.count()), (2, 0, 2));
        // Blocking, as the other side may make it, and full.
        let fd = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let full = Notifier::from_fd(fd).unwrap();
        full.notify().unwrap();
        full.notify().unwrap();
        assert_eq!((full.drain(), full.drain()), (u64::MAX, 0));
    }

    #[test]
    fn a_pipe_takes_8_bytes_a_time_until_it_is_full() {
        let (reader, writer) = pipe().unwrap();
        let mut out = [0; 16];
        let peek = reader.try_clone().unwrap();
        let (reader, writer) = (Notifier::from_fd(reader).unwrap(), Notifier::from_fd(writer).unwrap());
        writer.notify().unwrap();
        assert_eq!(read(&peek, &mut out), Ok(8));
        assert_eq!(out.first_chunk(), Some(&1_u64.to_ne_bytes()));
        for _ in 0..20_000 {
            writer.notify().unwrap();
        }
        // The default pipe holds 64 KiB; poll calls it full when its last page is begun.
        let drained = reader.drain();
        assert!((7000..=8192).contains(&drained), "{drained}");
        assert_eq!((reader.drain(), writer.count()), (0, 20_001));
        assert!(matches!(reader.notify(), Err(NotifyError::ReadOnly)));
        drop((reader, peek));
        writer.notify().unwrap();
    }

    #[test]
    fn a_pipe_that_cannot_be_opened_again_does_not_wait_either() {
        let (reader, writer) = pipe().unwrap();
        let (reader, writer) = (Kind::Pipe(reader, false), Kind::Pipe(writer, false));
        let (reader, writer) = (Notifier::of(reader, true), Notifier::of(writer, false));
        assert_eq!(reader.drain(), 0);
        for _ in 0..10_000 {
            writer.notify().unwrap();
        }
        assert_eq!((reader.drain(), reader.drain()), (8192, 0));
        drop(reader);
        writer.notify().unwrap();
    }

    #[test]
    fn a_socket_is_the_same_whoever_made_it_blocking() {
        let (reader, writer) = UnixStream::pair().unwrap();
        let (reader, writer) = (reader.into(), writer.into());
        let (reader, writer) = (Notifier::from_fd(reader).unwrap(), Notifier::from_fd(writer).unwrap());
        assert_eq!(reader.drain(), 0);
        for _ in 0..10_000 {
            writer.notify().unwrap();
        }
        let drained = reader.drain();
        assert!((100..10_000).contains(&drained), "{drained}");
        assert_eq!(reader.drain(), 0);
        drop(reader);
        writer.notify().unwrap();
    }

    #[test]
    fn a_broken_unit_is_a_wake_up_too() {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let reader = Notifier::from_fd(reader).unwrap();
        write(&writer, &[1]).unwrap();
        assert_eq!((reader.drain(), reader.drain()), (1, 0));
    }

    #[test]
    fn files_that_are_readable_for_ever_are_refused() {
        for path in ["/dev/zero", "/", "/proc/self/maps"] {
            let fd = OwnedFd::from(std::fs::File::open(path).unwrap());
            assert!(matches!(Notifier::from_fd(fd), Err(NotifyError::WrongKind)), "{path}");
        }
    }

    #[test]
    fn a_callback_is_called_each_time() {
        let calls = Arc::new(AtomicU64::new(0));
        let inner = Arc::clone(&calls);
        let notifier = Notifier::callback(Box::new(move || {
            inner.fetch_add(1, Ordering::Relaxed);
        }));
        notifier.notify().unwrap();
        notifier.notify().unwrap();
        assert_eq!(
            (calls.load(Ordering::Relaxed), notifier.count(), notifier.drain()),
            (2, 2, 0)
        );
        assert!(notifier.fd().is_none());
    }
}
