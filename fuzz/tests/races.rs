//! Two threads, one queue, every order of their accesses that the memory model allows (loom).
//!
//! The ring code is the real one. Each scenario is run again over memory that is weaker than the ring code asked for, and
//! must then fail: a scenario that no lost ordering breaks would prove nothing.
//!
//! | scenario | what holds | what it needs |
//! |---|---|---|
//! | publish | who pops sees descriptors and payload whole, and who takes the used buffer sees the answer | acquire, release |
//! | sleep of the device | a chain that a device did not see before it sleeps is announced | fence |
//! | sleep of the driver | a used buffer that a driver did not see before it sleeps is announced | fence |
//! | reset | nothing of an old generation is written once the reset was answered | the generation |

mod model;

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use loom::model::Builder;
use loom::sync::{Arc, Mutex};
use loom::thread;
use model::{Model, REQUEST, RESPONSE, Side, Weak};
use virtio_test::iov::Iov;
use virtio_test::mem::{Access, At};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, QueueState, feature};
use virtio_test::ring::RingLayout;

/// In how many orders what is raced for came in time; not loom's, so it orders nothing.
static SEEN: AtomicU64 = AtomicU64::new(0);

#[derive(Clone, Copy, Debug)]
struct Kind {
    packed: bool,
    event_idx: bool,
    policy: Policy,
}

const KINDS: [Kind; 4] = [
    Kind::of(false, false),
    Kind::of(false, true),
    Kind::of(true, false),
    Kind::of(true, true),
];

impl Kind {
    const fn of(packed: bool, event_idx: bool) -> Self {
        Self {
            packed,
            event_idx,
            policy: Policy::INTEROP,
        }
    }

    fn layout(self) -> RingLayout {
        RingLayout::contiguous(2, self.packed, 0).expect("it is small")
    }

    /// Where both ends begin: one lap behind an event that was asked for long ago.
    fn state(self) -> QueueState {
        let at = if self.packed { 0x8001 } else { 7 };
        QueueState { avail: at, used: at }
    }

    fn config(self) -> QueueConfig {
        let layout = self.layout();
        let packed = if self.packed { feature::RING_PACKED } else { 0 };
        let event_idx = if self.event_idx { feature::EVENT_IDX } else { 0 };
        QueueConfig {
            size: u32::from(layout.size),
            desc: layout.desc,
            driver: layout.driver,
            device: layout.device,
            index: 0,
            features: packed | event_idx,
            policy: self.policy,
        }
    }

    /// Both ends, each with its side of the memory.
    fn world(self, weak: Weak) -> (Side, DriverQueue, Side, DeviceQueue) {
        let layout = self.layout();
        let model = Model::new(&layout, weak);
        if self.packed && self.event_idx {
            // Events that were asked for a lap ago: slot 0 with wrap counter 1, which nobody passes here.
            for event in [layout.driver, layout.device] {
                model.set(event, 0x8000);
                model.set(event + 2, 2);
            }
        }
        if !self.packed {
            let at = u64::from(self.state().avail);
            model.set(layout.driver + 2, at);
            model.set(layout.device + 2, at);
        }
        let (ours, theirs) = model.sides();
        let driver = DriverQueue::new(&ours, self.config(), Some(self.state()), None).expect("a good ring");
        let device = DeviceQueue::new(&theirs, self.config(), Some(self.state())).expect("a good ring");
        (ours, driver, theirs, device)
    }
}

/// How an end finds that there is nothing, and sleeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// It takes what there is: none.
    Take,
    /// It asks whether there is something.
    Ask,
    /// It had said that it wants no notifications, and enables them.
    Enable,
}

const LOOKS: [Look; 3] = [Look::Take, Look::Ask, Look::Enable];

fn explore(scenario: impl Fn() + Sync + Send + 'static) {
    let mut builder = Builder::new();
    builder.preemption_bound = Some(2);
    builder.check(scenario);
}

/// Whether loom finds an order in which the scenario fails.
fn fails(scenario: impl Fn() + Sync + Send + std::panic::UnwindSafe + 'static) -> bool {
    std::panic::catch_unwind(|| explore(scenario)).is_err()
}

/// Request and response, each with its payload, through both ends; neither waits for the other.
fn publish(kind: Kind, weak: Weak) {
    let (ours, mut driver, theirs, mut device) = kind.world(weak);
    let worker = thread::spawn(move || {
        let mut segments = Vec::new();
        let popped = device.pop(&theirs, &mut segments).expect("the driver broke no rule");
        let Some(element) = popped else { return };
        assert_eq!((element.readable, element.writable, element.count), (8, 8, 2));
        let iov = Iov::new(&segments, element.epoch);
        let mut request = [0; 8];
        assert_eq!(iov.read(&theirs, 0, &mut request), Ok(8));
        assert_eq!(request, [1; 8]);
        assert_eq!(iov.write(&theirs, 0, &[2; 8]), Ok(8));
        assert_eq!(device.complete(&theirs, &element.ticket(), 8), Ok(true));
        device.publish(&theirs).expect("the ring is there");
    });
    ours.write(At::unresolved(REQUEST), 0, &[1; 8]).expect("it is there");
    let token = driver.add(&ours, &[(REQUEST, 8)], &[(RESPONSE, 8)], false);
    assert_eq!(driver.publish(&ours), Ok(1));
    if let Some(used) = driver.get_used(&ours).expect("the device broke no rule") {
        SEEN.fetch_add(1, Relaxed);
        assert_eq!(token, Ok(used.0));
        assert_eq!(used.1, 8);
        let mut response = [0; 8];
        ours.read(At::unresolved(RESPONSE), 0, &mut response)
            .expect("it is there");
        assert_eq!(response, [2; 8]);
    }
    worker.join().expect("its asserts hold");
}

/// A device that finds nothing asks to be kicked and sleeps.
fn device_sleeps(kind: Kind, weak: Weak, look: Look) {
    let (ours, mut driver, theirs, mut device) = kind.world(weak);
    if look == Look::Enable {
        device.disable_kicks(&theirs).expect("the ring is there");
    }
    let worker = thread::spawn(move || match look {
        Look::Take => device
            .pop(&theirs, &mut Vec::new())
            .expect("the driver broke no rule")
            .is_some(),
        Look::Ask => device.has_work(&theirs),
        Look::Enable => device.enable_kicks(&theirs).expect("the ring is there"),
    });
    driver.add(&ours, &[(REQUEST, 8)], &[], false).expect("there is room");
    driver.publish(&ours).expect("the ring is there");
    let kicked = driver.wants_kick(&ours).expect("the ring is there");
    let found = worker.join().expect("it does not panic");
    SEEN.fetch_add(u64::from(found), Relaxed);
    assert!(found || kicked, "the device sleeps and nobody kicked it");
}

/// A driver that finds nothing used asks to be called and sleeps.
fn driver_sleeps(kind: Kind, weak: Weak, look: Look) {
    let (ours, mut driver, theirs, mut device) = kind.world(weak);
    if look == Look::Enable {
        driver.disable_calls(&ours).expect("the ring is there");
    }
    let mut turn = |driver: &mut DriverQueue| {
        driver.add(&ours, &[(REQUEST, 8)], &[], false).expect("there is room");
        driver.publish(&ours).expect("the ring is there");
        let popped = device.pop(&theirs, &mut Vec::new());
        popped.expect("the driver broke no rule").expect("a chain")
    };
    // A first answer is always announced; after it, what the driver asked for counts.
    let first = turn(&mut driver);
    let second = turn(&mut driver);
    assert_eq!(device.complete(&theirs, &first.ticket(), 0), Ok(true));
    device.publish(&theirs).expect("the ring is there");
    device.wants_call(&theirs).expect("the ring is there");
    assert!(driver.get_used(&ours).expect("the device broke no rule").is_some());
    let worker = thread::spawn(move || {
        assert_eq!(device.complete(&theirs, &second.ticket(), 0), Ok(true));
        device.publish(&theirs).expect("the ring is there");
        device.wants_call(&theirs).expect("the ring is there")
    });
    let found = match look {
        Look::Take => driver.get_used(&ours).expect("the device broke no rule").is_some(),
        Look::Ask => driver.has_used(&ours),
        Look::Enable => driver.enable_calls(&ours).expect("the ring is there"),
    };
    let called = worker.join().expect("its asserts hold");
    SEEN.fetch_add(u64::from(found), Relaxed);
    assert!(found || called, "the driver sleeps and nobody called it");
}

/// A worker completes while the queue is reset; whoever reset it then begins the ring anew.
fn reset(kind: Kind) {
    let (ours, mut driver, theirs, mut device) = kind.world(Weak::Nothing);
    driver.add(&ours, &[(REQUEST, 8)], &[], false).expect("there is room");
    driver.publish(&ours).expect("the ring is there");
    let popped = device.pop(&theirs, &mut Vec::new());
    let element = popped.expect("the driver broke no rule").expect("a chain");
    let device = Arc::new(Mutex::new(device));
    let (mem, shared) = (theirs.clone(), Arc::clone(&device));
    let worker = thread::spawn(move || {
        let done = shared
            .lock()
            .expect("nobody panics")
            .complete(&mem, &element.ticket(), 0);
        shared
            .lock()
            .expect("nobody panics")
            .publish(&mem)
            .expect("the ring is there");
        done
    });
    let state = kind.state();
    let answered = device.lock().expect("nobody panics").reset(&theirs, None, Some(state));
    assert_eq!(answered, Ok(()));
    let layout = kind.layout();
    // The first used entry and idx, or the first packed descriptor: nobody touches them from here on.
    let words = if kind.packed {
        [layout.desc + 16 + 8, layout.desc + 16 + 12, layout.desc + 16 + 14]
    } else {
        [layout.device + 2, layout.device + 4 + 8, layout.device + 8 + 8]
    };
    words.iter().for_each(|&word| ours.set(word, 0x77));
    let done = worker.join().expect("its asserts hold").expect("no rule is broken");
    assert!(
        words.iter().all(|&word| ours.peek(word) == 0x77),
        "written after the reset was answered"
    );
    let device = device.lock().expect("nobody panics");
    assert_eq!(device.in_flight(), 0);
    assert_eq!(device.counters().dropped, u64::from(!done));
}

/// All orders; in some of them what is raced for was seen in time, or the scenario shows nothing.
fn holds(scenario: impl Fn() + Sync + Send + 'static) {
    SEEN.store(0, Relaxed);
    explore(scenario);
    assert!(SEEN.load(Relaxed) > 0, "it never came in time");
}

// One test, because loom counts what was SEEN in one place.
#[test]
fn nothing_is_torn_and_nothing_is_lost() {
    for kind in KINDS {
        holds(move || publish(kind, Weak::Nothing));
        assert!(fails(move || publish(kind, Weak::Acquire)), "{kind:?} without acquire");
        assert!(fails(move || publish(kind, Weak::Release)), "{kind:?} without release");
        for look in LOOKS {
            // Without EVENT_IDX notifications are wanted until they are disabled.
            if look != Look::Enable && !kind.event_idx {
                continue;
            }
            holds(move || device_sleeps(kind, Weak::Nothing, look));
            assert!(
                fails(move || device_sleeps(kind, Weak::Fence, look)),
                "{kind:?} without fence"
            );
            holds(move || driver_sleeps(kind, Weak::Nothing, look));
            assert!(
                fails(move || driver_sleeps(kind, Weak::Fence, look)),
                "{kind:?} without fence"
            );
        }
    }
}

#[test]
fn nothing_of_an_old_generation_is_written_after_a_reset() {
    for kind in KINDS {
        explore(move || reset(kind));
    }
}
