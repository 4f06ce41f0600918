//! A worker and its owner: turns begin and end as parks, kicks and wakes say, whatever the work is.

#![allow(
    clippy::unwrap_used,
    reason = "a test that panics has failed, which is what it is for"
)]

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustix::io::write;
use rustix::pipe::pipe;
use rustix::thread::CpuSet;
use virtio_test::worker::{Kick, Turned, Wait, Work, Worker, WorkerError};

/// What there is to do, and what was done.
#[derive(Debug, Default)]
struct Desk {
    waiting: AtomicU64,
    done: AtomicU64,
    turns: AtomicU64,
    looks: AtomicU64,
    armed: AtomicBool,
    dead: AtomicBool,
    asleep: AtomicBool,
    deaf: AtomicU64,
    inside: AtomicBool,
}

struct Clerk(Arc<Desk>);

impl Work for Clerk {
    fn turn(&mut self) -> Turned {
        self.0.inside.store(true, Ordering::SeqCst);
        self.0.turns.fetch_add(1, Ordering::SeqCst);
        let turned = if self.0.asleep.load(Ordering::SeqCst) {
            Turned::Asleep
        } else if self.0.waiting.load(Ordering::SeqCst) > 0 {
            self.0.waiting.fetch_sub(1, Ordering::SeqCst);
            self.0.done.fetch_add(1, Ordering::SeqCst);
            Turned::More
        } else {
            Turned::Idle
        };
        self.0.inside.store(false, Ordering::SeqCst);
        turned
    }

    fn look(&mut self) -> bool {
        self.0.looks.fetch_add(1, Ordering::SeqCst);
        self.0.waiting.load(Ordering::SeqCst) > 0
    }

    fn alive(&mut self) -> bool {
        !self.0.dead.load(Ordering::SeqCst)
    }

    fn arm(&mut self) -> bool {
        self.0.armed.store(true, Ordering::SeqCst);
        self.0.waiting.load(Ordering::SeqCst) > 0
    }

    fn disarm(&mut self) {
        self.0.armed.store(false, Ordering::SeqCst);
    }

    fn deaf(&mut self) {
        self.0.deaf.fetch_add(1, Ordering::SeqCst);
    }
}

const WAITS: [Wait; 3] = [Wait::Blocking, Wait::Adaptive(Duration::from_micros(50)), Wait::Busy];

fn eventually(holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "it does not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn start(wait: Wait) -> (Arc<Desk>, Worker, OwnedFd) {
    let desk = Arc::new(Desk::default());
    let (reader, writer) = pipe().unwrap();
    let kick = Arc::new(Kick::new(reader).unwrap());
    let worker = Worker::start(Clerk(Arc::clone(&desk)), vec![kick], wait, None).unwrap();
    (desk, worker, writer)
}

#[test]
fn a_kick_is_a_turn_and_what_lies_there_needs_none() {
    for wait in WAITS {
        let (desk, worker, writer) = start(wait);
        desk.waiting.store(100, Ordering::SeqCst);
        write(&writer, &[1; 8]).unwrap();
        eventually(|| desk.done.load(Ordering::SeqCst) == 100);
        if wait == Wait::Busy {
            desk.waiting.store(1, Ordering::SeqCst);
            eventually(|| desk.done.load(Ordering::SeqCst) == 101);
            assert!(!desk.armed.load(Ordering::SeqCst));
        } else {
            eventually(|| desk.armed.load(Ordering::SeqCst));
        }
        worker.stop();
        assert!(!worker.running());
    }
}

#[test]
fn nothing_runs_while_it_is_parked() {
    for wait in WAITS {
        let (desk, worker, writer) = start(wait);
        for round in 1..=50 {
            worker.park();
            assert!(!desk.inside.load(Ordering::SeqCst));
            let (turns, looks) = (desk.turns.load(Ordering::SeqCst), desk.looks.load(Ordering::SeqCst));
            desk.waiting.fetch_add(1, Ordering::SeqCst);
            write(&writer, &[1; 8]).unwrap();
            worker.wake();
            std::thread::yield_now();
            assert_eq!(desk.turns.load(Ordering::SeqCst), turns);
            assert_eq!(desk.looks.load(Ordering::SeqCst), looks);
            assert!(worker.resume());
            eventually(|| desk.done.load(Ordering::SeqCst) == round);
        }
        assert!(!worker.resume());
    }
}

#[test]
fn parks_nest_and_one_that_is_parked_ends() {
    let (desk, worker, _writer) = start(Wait::Busy);
    assert!(worker.running() && !worker.parked() && !worker.is_inside());
    worker.park();
    worker.park();
    assert!(worker.resume());
    assert!(worker.parked());
    let turns = desk.turns.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(desk.turns.load(Ordering::SeqCst), turns);
    worker.stop();
    worker.stop();
    assert!(!worker.running());
    // Nobody is waited for who is not there any more.
    worker.park();
}

#[test]
fn nobody_spins_where_nothing_can_come() {
    let (desk, worker, writer) = start(Wait::Busy);
    desk.dead.store(true, Ordering::SeqCst);
    eventually(|| desk.armed.load(Ordering::SeqCst));
    let looks = desk.looks.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(desk.looks.load(Ordering::SeqCst), looks);
    desk.waiting.store(1, Ordering::SeqCst);
    write(&writer, &[1; 8]).unwrap();
    eventually(|| desk.done.load(Ordering::SeqCst) == 1);
    // Asleep it looks at nothing either, and each wake is one turn.
    desk.dead.store(false, Ordering::SeqCst);
    desk.asleep.store(true, Ordering::SeqCst);
    worker.wake();
    let turns = desk.turns.load(Ordering::SeqCst);
    eventually(|| desk.turns.load(Ordering::SeqCst) > turns || desk.asleep.load(Ordering::SeqCst));
    std::thread::sleep(Duration::from_millis(20));
    let looks = desk.looks.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(desk.looks.load(Ordering::SeqCst), looks);
    worker.stop();
}

#[test]
fn a_kick_whose_other_end_is_gone_is_let_go_of_once() {
    let (desk, worker, writer) = start(Wait::Blocking);
    write(&writer, &[1; 8]).unwrap();
    drop(writer);
    eventually(|| desk.deaf.load(Ordering::SeqCst) == 1);
    let turns = desk.turns.load(Ordering::SeqCst);
    std::thread::sleep(Duration::from_millis(20));
    assert!(desk.turns.load(Ordering::SeqCst) <= turns + 1);
    assert_eq!(desk.deaf.load(Ordering::SeqCst), 1);
    let (reader, writer) = pipe().unwrap();
    worker.set_kicks(vec![Arc::new(Kick::new(reader).unwrap())]);
    desk.waiting.store(1, Ordering::SeqCst);
    write(&writer, &[1; 8]).unwrap();
    eventually(|| desk.done.load(Ordering::SeqCst) == 1);
}

#[test]
fn a_cpu_that_is_not_there_is_refused() {
    let desk = Arc::new(Desk::default());
    for cpu in [1023, CpuSet::MAX_CPU, CpuSet::MAX_CPU + 1, usize::MAX] {
        let refused = Worker::start(Clerk(Arc::clone(&desk)), Vec::new(), Wait::Blocking, Some(cpu));
        assert!(matches!(refused, Err(WorkerError::Cpu { .. })));
    }
    assert_eq!(desk.turns.load(Ordering::SeqCst), 0);
    assert_eq!(Arc::strong_count(&desk), 1);
}

/// One kick after the other has something to take, so none is one too many.
#[test]
fn kicks_that_bring_something_never_wear_out() {
    let (desk, worker, writer) = start(Wait::Blocking);
    for round in 1..=100 {
        desk.waiting.store(1, Ordering::SeqCst);
        write(&writer, &[1; 8]).unwrap();
        eventually(|| desk.done.load(Ordering::SeqCst) == round);
    }
    assert_eq!(desk.deaf.load(Ordering::SeqCst), 0);
    drop(worker);
}

/// A fd that is readable for ever, with nothing to take: an epoll of a pipe that nobody empties.
#[test]
fn a_kick_with_nothing_to_take_is_let_go_of_after_sixteen() {
    let desk = Arc::new(Desk::default());
    let (reader, writer) = pipe().unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let (data, flags) = (
        rustix::event::epoll::EventData::new_u64(0),
        rustix::event::epoll::EventFlags::IN,
    );
    rustix::event::epoll::add(&epoll, &reader, data, flags).unwrap();
    write(&writer, &[1]).unwrap();
    let kick = Arc::new(Kick::new(epoll).unwrap());
    let worker = Worker::start(Clerk(Arc::clone(&desk)), vec![kick], Wait::Blocking, None).unwrap();
    eventually(|| desk.deaf.load(Ordering::SeqCst) == 1);
    // The first turn, and one for each of 16 wakes and for the one that was too many.
    eventually(|| desk.turns.load(Ordering::SeqCst) == 18);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(desk.turns.load(Ordering::SeqCst), 18);
    worker.wake();
    eventually(|| desk.turns.load(Ordering::SeqCst) == 19);
    drop(worker);
}

#[test]
fn whoever_leaves_a_worker_waits_for_nothing_and_it_ends() {
    for wait in WAITS {
        let (desk, worker, _writer) = start(wait);
        worker.leave();
        eventually(|| Arc::strong_count(&desk) == 1);
        assert!(!worker.running());
    }
}

/// Asleep and alone, only a wake brings a turn, and each brings one.
#[test]
fn a_wake_is_a_turn() {
    let (desk, worker, _writer) = start(Wait::Blocking);
    desk.asleep.store(true, Ordering::SeqCst);
    eventually(|| desk.turns.load(Ordering::SeqCst) == 1);
    for round in 2..20 {
        std::thread::sleep(Duration::from_millis(2));
        worker.wake();
        eventually(|| desk.turns.load(Ordering::SeqCst) == round);
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(desk.turns.load(Ordering::SeqCst), 19, "what has woken it was taken");
    assert_eq!(
        desk.deaf.load(Ordering::SeqCst),
        0,
        "a kick that was not there is none in vain"
    );
    drop(worker);
}

#[test]
fn work_without_end_is_parked_between_two_turns() {
    for wait in WAITS {
        let (desk, worker, _writer) = start(wait);
        desk.waiting.store(u64::MAX, Ordering::SeqCst);
        worker.wake();
        eventually(|| desk.done.load(Ordering::SeqCst) > 10);
        worker.park();
        let done = desk.done.load(Ordering::SeqCst);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(desk.done.load(Ordering::SeqCst), done);
        worker.stop();
    }
}

/// Ends its own worker, from inside.
#[derive(Clone, Default)]
struct Quitter {
    worker: Arc<OnceLock<Worker>>,
    /// Its turn takes until somebody lets it go on, for two seconds at most.
    held: Arc<AtomicBool>,
    inside: Arc<AtomicBool>,
    done: Arc<AtomicBool>,
}

impl Work for Quitter {
    fn turn(&mut self) -> Turned {
        let start = Instant::now();
        while self.held.load(Ordering::SeqCst) && start.elapsed() < Duration::from_secs(2) {
            std::thread::yield_now();
        }
        if let Some(worker) = self.worker.get() {
            self.inside.store(worker.is_inside(), Ordering::SeqCst);
            worker.stop();
            self.done.store(true, Ordering::SeqCst);
        }
        Turned::Asleep
    }

    fn look(&mut self) -> bool {
        false
    }

    fn alive(&mut self) -> bool {
        true
    }

    fn arm(&mut self) -> bool {
        false
    }

    fn disarm(&mut self) {}

    fn deaf(&mut self) {}
}

#[test]
fn a_worker_that_is_ended_in_its_own_thread_does_not_wait_for_itself() {
    let work = Quitter::default();
    let worker = Worker::start(work.clone(), Vec::new(), Wait::Blocking, None).unwrap();
    assert!(work.worker.set(worker).is_ok());
    let worker = work.worker.get().unwrap();
    worker.wake();
    eventually(|| !worker.running());
    assert!(work.done.load(Ordering::SeqCst), "the call came back");
    assert!(work.inside.load(Ordering::SeqCst) && !worker.is_inside());
}

#[test]
fn who_leaves_a_worker_in_the_middle_of_a_turn_does_not_wait_for_it() {
    let work = Quitter::default();
    work.held.store(true, Ordering::SeqCst);
    let worker = Worker::start(work.clone(), Vec::new(), Wait::Blocking, None).unwrap();
    let start = Instant::now();
    worker.leave();
    drop(worker);
    assert!(start.elapsed() < Duration::from_secs(1));
    work.held.store(false, Ordering::SeqCst);
    eventually(|| Arc::strong_count(&work.held) == 1);
}
