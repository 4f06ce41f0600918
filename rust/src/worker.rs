//! A worker: a thread that runs the turns of a service, and waits for work as it was told to.
//!
//! # Theory
//!
//! While a worker runs it has kicks suppressed. When there is nothing to do it looks at the rings for a bounded time (*spins*),
//! then asks for kicks, looks once more, and waits in poll(2) for one of its kick fds or for its own eventfd. Between two
//! turns it holds neither pin nor lock.
//!
//! **A spin is a bet** that work comes soon on a core that nobody else needs. It yields that core between looks, and when it gets
//! it back late, somebody else needed it: then the next waits are made without a spin, twice as many each time that this
//! happens, and as ever once a spin has found something in time.
//!
//! **Parked** it touches nothing: `park` returns when no turn runs and none will begin before `resume`. A turn is bounded, so
//! is this. Parks nest.
//!
//! **A kick fd is the other side's.** It may be readable without anything to take, hung up, or filled again as fast as it is
//! taken. One that has nothing to take `EMPTY` times in a row, or whose other end is closed, is waited for no longer; whoever
//! made the worker is told, and can still wake it. A kick costs a turn that finds nothing, and that is all it costs.
//!
//! **In a child of fork** there is no thread, and whatever it held at that moment is held for ever. So a worker is the
//! worker of the process that made it; in another one it does not run, and every call returns at once.
//!
//! **What went wrong** (a broken ring, memory that is not to be reached from here) is for the owner: the work says so by its
//! `tell`, and sleeps until it is woken.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, ThreadId};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::{Errno, read, retry_on_intr, write};
use rustix::thread::{CpuSet, sched_setaffinity};

use crate::notify::Notifier;

/// Wake-ups without anything to take after which a kick fd is waited for no longer.
const EMPTY: u32 = 16;
/// Pauses between two looks of a spinning worker: the locks are free for most of the time.
const PAUSES: u32 = 8;
/// Looks between two readings of the clock.
const LOOKS: u32 = 16;

/// Waits without a spin after a core was lost for the first time, and at most.
const SOBER: (u32, u32) = (16, 4096);

/// What an adaptive worker has lost its bets for.
#[derive(Default)]
struct Bets {
    /// Waits to come without a spin.
    sober: u32,
    /// How many there were to be the last time.
    last: u32,
}

impl Bets {
    /// Whether to spin now.
    const fn place(&mut self) -> bool {
        let spins = self.sober == 0;
        self.sober = self.sober.saturating_sub(1);
        spins
    }

    /// A spin ended after `spent`, where `limit` was wanted.
    fn settle(&mut self, spent: Duration, limit: Duration, found: bool) {
        if spent > limit.saturating_mul(4) + Duration::from_micros(200) {
            let (first, most) = SOBER;
            self.last = self.last.saturating_mul(2).clamp(first, most);
            self.sober = self.last;
        } else if found {
            self.last = 0;
        }
    }
}

/// How a worker waits when there is nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// At once in poll(2).
    Blocking,
    /// Looking at the rings for this long, then in poll(2).
    Adaptive(Duration),
    /// Looking at the rings all the time, as long as anything can come.
    Busy,
}

/// What became of a turn, as far as the worker must know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turned {
    /// There may be more to do.
    More,
    /// There is nothing to do.
    Idle,
    /// There is nothing to do here until the owner says so.
    Asleep,
}

/// What a worker works on. All calls are made in its thread.
pub trait Work: Send + 'static {
    /// One bounded turn.
    fn turn(&mut self) -> Turned;
    /// Whether a turn would find something.
    fn look(&mut self) -> bool;
    /// Whether there can ever be anything to find, without a change of which the worker is told.
    fn alive(&mut self) -> bool;
    /// Ask for kicks; whether something has come meanwhile, for which there may be none.
    fn arm(&mut self) -> bool;
    /// Ask for no kicks.
    fn disarm(&mut self);
    /// Tell the owner that a kick fd is waited for no longer.
    fn deaf(&mut self);
}

#[derive(Debug, Default)]
struct State {
    parks: u32,
    stopping: bool,
    /// Whether the thread may touch anything but its fds.
    busy: bool,
    /// Whether the thread has ended.
    ended: bool,
}

/// A fd that kicks arrive on.
#[derive(Debug)]
pub struct Kick {
    fd: Notifier,
    empty: AtomicU32,
    dead: AtomicBool,
}

impl Kick {
    /// An eventfd or pipe that somebody gave us.
    ///
    /// # Errors
    /// As [`Notifier::from_fd`].
    pub fn new(fd: OwnedFd) -> Result<Self, crate::notify::NotifyError> {
        Ok(Self {
            fd: Notifier::from_fd(fd)?,
            empty: AtomicU32::new(0),
            dead: AtomicBool::new(false),
        })
    }

    /// It is ready, with these events; whether it is dead from now on.
    fn take(&self, events: PollFlags) -> bool {
        if self.fd.drain() > 0 {
            self.empty.store(0, Ordering::Relaxed);
            return false;
        }
        let gone = PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL;
        let empty = self.empty.fetch_add(1, Ordering::Relaxed);
        let dead = events.intersects(gone) || empty >= EMPTY;
        if dead {
            self.dead.store(true, Ordering::Relaxed);
        }
        dead
    }
}

/// What the thread and its owner share.
#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// Whether `state` has something to say to a busy thread.
    attention: AtomicBool,
    wake: OwnedFd,
    kicks: Mutex<Vec<Arc<Kick>>>,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        // Counts and flags are whole at every moment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kicks(&self) -> Vec<Arc<Kick>> {
        let kicks = self.kicks.lock().unwrap_or_else(PoisonError::into_inner);
        kicks
            .iter()
            .filter(|kick| !kick.dead.load(Ordering::Relaxed))
            .cloned()
            .collect()
    }

    fn wake(&self) {
        // Full means that it will wake anyway; there is no other way for this write to fail.
        let _ = retry_on_intr(|| write(&self.wake, &1_u64.to_ne_bytes()));
    }

    /// Wait while it is parked, then be busy; false when it is to end.
    fn enter(&self) -> bool {
        let mut state = self.state();
        while state.parks > 0 && !state.stopping {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.attention.store(false, Ordering::Relaxed);
        state.busy = !state.stopping;
        state.busy
    }

    fn leave(&self) {
        self.state().busy = false;
        self.changed.notify_all();
    }

    fn attention(&self) -> bool {
        self.attention.load(Ordering::Acquire)
    }
}

/// Says that the thread has ended, however it did.
struct Ending(Arc<Control>);

impl Drop for Ending {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.busy = false;
        state.ended = true;
        self.0.changed.notify_all();
    }
}

/// Why a worker cannot begin.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The operating system gave no thread or eventfd.
    #[error("cannot start a worker: {0}")]
    System(#[from] io::Error),
    /// There is no such CPU, or it is not ours to use.
    #[error("a worker cannot run on CPU {cpu}: {errno}")]
    Cpu {
        /// Its number.
        cpu: usize,
        /// The reason.
        errno: Errno,
    },
}

/// A running worker; stopped when it is dropped. See the module's head.
#[derive(Debug)]
pub struct Worker {
    control: Arc<Control>,
    thread: Mutex<Option<JoinHandle<()>>>,
    id: ThreadId,
    process: u32,
}

impl Worker {
    /// Start a thread that works on `work`, woken by `kicks`; it begins with a turn.
    ///
    /// # Errors
    /// When there is no thread to be had, or not on that CPU.
    pub fn start(work: impl Work, kicks: Vec<Arc<Kick>>, wait: Wait, cpu: Option<usize>) -> Result<Self, WorkerError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(io::Error::from)?;
        let control = Arc::new(Control {
            state: Mutex::default(),
            changed: Condvar::new(),
            attention: AtomicBool::new(false),
            wake,
            kicks: Mutex::new(kicks),
        });
        let (placed, place) = std::sync::mpsc::channel();
        let shared = Arc::clone(&control);
        let thread = Builder::new().name("virtio-worker".to_owned()).spawn(move || {
            let ending = Ending(shared);
            let done = cpu.map_or(Ok(()), stay_on);
            let fine = done.is_ok();
            let _ = placed.send(done);
            if fine {
                work_on(&ending.0, work, wait);
            }
        })?;
        let id = thread.thread().id();
        if let (Ok(Err(errno)), Some(cpu)) = (place.recv(), cpu) {
            // What it shares with others is let go of by the time that they hear of it.
            let _ = thread.join();
            return Err(WorkerError::Cpu { cpu, errno });
        }
        Ok(Self {
            control,
            thread: Mutex::new(Some(thread)),
            id,
            process: std::process::id(),
        })
    }

    /// Have it look at its queues, if it waits or sleeps. From any thread.
    pub fn wake(&self) {
        if self.is_ours() {
            self.control.wake();
        }
    }

    /// Whether this is the process that its thread is in.
    fn is_ours(&self) -> bool {
        std::process::id() == self.process
    }

    /// Wait for kicks on these fds from now on.
    pub fn set_kicks(&self, kicks: Vec<Arc<Kick>>) {
        if !self.is_ours() {
            return;
        }
        *self.control.kicks.lock().unwrap_or_else(PoisonError::into_inner) = kicks;
        self.control.wake();
    }

    /// Return when no turn runs and none will begin before `resume`. Not from its own thread.
    pub fn park(&self) {
        if !self.is_ours() {
            return;
        }
        let mut state = self.control.state();
        state.parks = state.parks.saturating_add(1);
        self.control.attention.store(true, Ordering::Release);
        while state.busy {
            state = self.control.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Undo one `park`; false when it is not parked. It looks at its queues then.
    pub fn resume(&self) -> bool {
        if !self.is_ours() {
            return true;
        }
        let mut state = self.control.state();
        let parked = state.parks > 0;
        state.parks = state.parks.saturating_sub(1);
        drop(state);
        self.control.changed.notify_all();
        self.control.wake();
        parked
    }

    /// Whether it is parked.
    #[must_use]
    pub fn parked(&self) -> bool {
        self.is_ours() && self.control.state().parks > 0
    }

    /// Whether its thread lives.
    #[must_use]
    pub fn running(&self) -> bool {
        self.is_ours() && !self.control.state().ended
    }

    /// Whether this is its own thread.
    #[must_use]
    pub fn is_inside(&self) -> bool {
        std::thread::current().id() == self.id
    }

    /// End it, when its turn has ended. In its own thread, where nobody could wait for that, it is only asked to.
    pub fn stop(&self) {
        if self.ask_to_end() && !self.is_inside() {
            // It panicked, which is a bug of ours that was reported: it has ended all the same.
            let _ = self.take_thread().map(JoinHandle::join);
        }
    }

    /// Have it end when its turn has ended, and wait for nothing, neither now nor when it is dropped: for who may have what
    /// that turn waits for.
    pub fn leave(&self) {
        if self.ask_to_end() {
            drop(self.take_thread());
        }
    }

    /// False in a process that has no such thread.
    fn ask_to_end(&self) -> bool {
        if !self.is_ours() {
            // Neither joined nor detached: there is no such thread.
            let thread = self.thread.try_lock().ok().and_then(|mut thread| thread.take());
            std::mem::forget(thread);
            return false;
        }
        let mut state = self.control.state();
        state.stopping = true;
        self.control.attention.store(true, Ordering::Release);
        drop(state);
        self.control.changed.notify_all();
        self.control.wake();
        true
    }

    fn take_thread(&self) -> Option<JoinHandle<()>> {
        self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop();
    }
}

fn stay_on(cpu: usize) -> Result<(), Errno> {
    if cpu >= CpuSet::MAX_CPU {
        return Err(Errno::INVAL);
    }
    let mut cpus = CpuSet::new();
    cpus.set(cpu);
    sched_setaffinity(None, &cpus)
}

fn work_on(control: &Control, mut work: impl Work, wait: Wait) {
    let mut bets = Bets::default();
    while control.enter() {
        let block = serve(control, &mut work, wait, &mut bets);
        control.leave();
        if block && !wait_for_kicks(control, &mut work) {
            return;
        }
    }
}

/// Run turns until somebody has something to say, or there is nothing to do; whether to wait for kicks.
fn serve(control: &Control, work: &mut impl Work, wait: Wait, bets: &mut Bets) -> bool {
    work.disarm();
    loop {
        if control.attention() {
            return false;
        }
        match work.turn() {
            Turned::More => continue,
            Turned::Asleep => return true,
            Turned::Idle => {}
        }
        match bet(control, work, wait, bets) {
            Some(true) => {}
            Some(false) => return false,
            None if work.arm() => work.disarm(),
            None => return true,
        }
    }
}

/// As `spin`, unless a bet is better not placed.
fn bet(control: &Control, work: &mut impl Work, wait: Wait, bets: &mut Bets) -> Option<bool> {
    let Wait::Adaptive(limit) = wait else {
        return spin(control, work, wait);
    };
    if !bets.place() {
        return None;
    }
    let start = Instant::now();
    let found = spin(control, work, wait);
    bets.settle(start.elapsed(), limit, found == Some(true));
    found
}

/// Look at the rings as long as `wait` says: whether there is something; `Some(false)` when the owner wants something.
fn spin(control: &Control, work: &mut impl Work, wait: Wait) -> Option<bool> {
    let limit = match wait {
        Wait::Blocking => return None,
        Wait::Adaptive(limit) => Some(limit),
        Wait::Busy => None,
    };
    let start = Instant::now();
    loop {
        if !work.alive() || limit.is_some_and(|limit| start.elapsed() >= limit) {
            return None;
        }
        for _ in 0..LOOKS {
            if control.attention() {
                return Some(false);
            }
            if work.look() {
                return Some(true);
            }
            for _ in 0..PAUSES {
                std::hint::spin_loop();
            }
        }
        // Whoever is to give us work may be waiting for this very core; a busy worker has one of its own.
        if limit.is_some() {
            std::thread::yield_now();
        }
    }
}

/// Wait until kicked or woken; false when that cannot be.
fn wait_for_kicks(control: &Control, work: &mut impl Work) -> bool {
    let kicks = control.kicks();
    let own = std::iter::once(control.wake.as_fd());
    let all = own.chain(kicks.iter().filter_map(|kick| kick.fd.fd()));
    let mut polled: Vec<_> = all.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
    match poll(&mut polled, None) {
        Ok(_) | Err(Errno::INTR) => {}
        Err(_) => {
            work.deaf();
            return false;
        }
    }
    let mut events = polled.iter().map(PollFd::revents);
    if events.next().is_some_and(|events| !events.is_empty()) {
        let mut value = [0; 8];
        let _ = retry_on_intr(|| read(&control.wake, &mut value));
    }
    for (kick, events) in kicks.iter().zip(events) {
        if !events.is_empty() && kick.take(events) {
            work.deaf();
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_that_is_lost_is_bet_on_more_and_more_rarely() {
        let limit = Duration::from_micros(50);
        let (late, soon) = (Duration::from_millis(3), Duration::from_micros(7));
        let mut bets = Bets::default();
        let waits_until_the_next = |bets: &mut Bets| (0..10_000).take_while(|_| !bets.place()).count();
        bets.settle(limit, limit, false);
        bets.settle(soon, limit, true);
        assert_eq!(waits_until_the_next(&mut bets), 0);
        // Whether it has found something or not: it came too late.
        for (found, wanted) in [(true, 16), (false, 32), (true, 64)] {
            bets.settle(late, limit, found);
            assert_eq!(waits_until_the_next(&mut bets), wanted);
        }
        bets.settle(limit, limit, false);
        bets.settle(late, limit, false);
        assert_eq!(waits_until_the_next(&mut bets), 128, "a spin in vain proves nothing");
        bets.settle(soon, limit, true);
        bets.settle(late, limit, false);
        assert_eq!(waits_until_the_next(&mut bets), 16);
        for _ in 0..20 {
            bets.settle(late, limit, false);
        }
        assert_eq!(waits_until_the_next(&mut bets), 4096);
    }
}
