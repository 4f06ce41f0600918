//! Remote memory: all of a queue or parts of it behind transfers, which may fail anywhere.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::far::{Far, NEVER};
use common::{EVENT_IDX, IN_ORDER, INDIRECT_DESC, PACKED, TABLES, config, region};
use virtio_test::chain::Segment;
use virtio_test::error::{Misuse, QueueError};
use virtio_test::iov::Iov;
use virtio_test::mem::{
    Access, At, Backing, GuestMemory, Log, MAX_TRANSFER, MemoryError, RegionError, RegionSpec, Transfer,
    TransferFailed, Want, transferring,
};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, IndirectArea, QueueState, feature};
use virtio_test::rule::Rule;

const PAGE: u64 = 4096;

fn bytes(mem: &GuestMemory, gpa: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    mem.read(gpa, &mut out).unwrap();
    out
}

/// Mapped, remote, mapped, remote, without a gap; then a remote page that is read-only.
fn mixed() -> (GuestMemory, [Arc<Far>; 3]) {
    let page = usize::try_from(PAGE).unwrap();
    let far = [Far::new(PAGE, page), Far::new(3 * PAGE, page), Far::new(4 * PAGE, page)];
    let regions = vec![
        far[2].spec(false),
        region(0, PAGE),
        far[0].spec(true),
        region(2 * PAGE, PAGE),
        far[1].spec(true),
    ];
    (GuestMemory::new(regions, None).unwrap(), far)
}

#[test]
fn copies_cross_between_mapped_and_remote_regions() {
    let (mem, far) = mixed();
    let data: Vec<u8> = (0..3 * PAGE).map(|i| u8::try_from(i % 251).unwrap()).collect();
    mem.write(PAGE / 2, &data).unwrap();
    assert_eq!(bytes(&mem, PAGE / 2, data.len()), data);
    assert_eq!(bytes(&mem, PAGE - 1, 2), data[2047..2049]);
    assert_eq!(far[0].bytes.lock().unwrap()[0], data[2048]);
    mem.fill(PAGE - 3, PAGE + 6, 0xEE).unwrap();
    assert_eq!(far[0].bytes.lock().unwrap()[..], [0xEE; 4096]);
    assert_eq!(bytes(&mem, 2 * PAGE, 4), [0xEE, 0xEE, 0xEE, data[6147]]);
    // (address, length, what a write finds first)
    let read_only = |gpa| Err(MemoryError::ReadOnly { gpa });
    let unmapped = |gpa| Err(MemoryError::Unmapped { gpa });
    for (gpa, len, found) in [
        (4 * PAGE - 1, 2, read_only(4 * PAGE)),
        (4 * PAGE, 0, Ok(())),
        (3 * PAGE, 2 * PAGE + 1, read_only(4 * PAGE)),
        (5 * PAGE, 1, unmapped(5 * PAGE)),
    ] {
        let before = bytes(&mem, 0, 5 * 4096);
        let len = usize::try_from(len).unwrap();
        assert_eq!(mem.write(gpa, &vec![7; len]), found, "{gpa:#x} {len:#x}");
        assert_eq!(mem.check(gpa, len as u64, Want::Write), found);
        assert_eq!(bytes(&mem, 0, 5 * 4096), before, "all or nothing");
    }
    assert!(mem.is_mapped(0, 5 * PAGE) && !mem.is_mapped(0, 5 * PAGE + 1));
    assert_eq!(
        mem.check(1, u64::MAX, Want::Read),
        Err(MemoryError::Wraps { gpa: 1, len: u64::MAX })
    );
}

/// Remote memory is reached by messages whether or not there is a log, and was before.
#[test]
fn a_log_that_ends_leaves_remote_memory_as_it_was() {
    let (mem, far) = mixed();
    for log in [Some(Log::fresh(8).unwrap().0), None] {
        mem.set_log(log).unwrap();
        let before = far[0].count();
        mem.write(2 * PAGE - 4, &[7; 8]).unwrap();
        let pin = mem.pin();
        let at = pin.mediated().unwrap().resolve(PAGE, 8, Want::Write).unwrap();
        assert_eq!(pin.mediated().unwrap().load_u16(at, 0), Ok(0));
        drop(pin);
        assert_eq!(bytes(&mem, 2 * PAGE - 4, 8), [7; 8]);
        assert!(far[0].count() > before);
    }
}

#[test]
fn copies_inside_guest_memory_behave_as_if_read_whole_first() {
    for (dst, src, len) in [
        (100, 3000, 9000),
        (3000, 100, 9000),
        (PAGE, PAGE + 1, 4000),
        (PAGE + 1, PAGE, 4000),
        (2 * PAGE - 5, PAGE - 5, 8000),
        (PAGE - 5, 2 * PAGE - 5, 8000),
        (0, 0, 100),
        (PAGE, 3 * PAGE, 4096),
        (10, 4 * PAGE, 4096),
    ] {
        let (mem, far) = mixed();
        let whole: Vec<u8> = (0..4 * PAGE).map(|i| u8::try_from(i * 7 % 253).unwrap()).collect();
        mem.write(0, &whole).unwrap();
        far[2].bytes.lock().unwrap().fill(0xAB);
        let mut model = bytes(&mem, 0, 5 * 4096);
        mem.copy(dst, src, len).unwrap();
        let [dst, src, len] = [dst, src, len].map(|number| usize::try_from(number).unwrap());
        model.copy_within(src..src + len, dst);
        assert!(bytes(&mem, 0, 5 * 4096) == model, "{dst:#x} {src:#x} {len}");
    }
    let (mem, _) = mixed();
    assert_eq!(mem.copy(4 * PAGE, 0, 1), Err(MemoryError::ReadOnly { gpa: 4 * PAGE }));
}

#[test]
fn words_are_single_transfers_and_little_endian() {
    let (mem, far) = mixed();
    let pin = mem.pin();
    let view = pin.mediated().unwrap();
    let at = view.resolve(PAGE, 64, Want::Write).unwrap();
    view.store_u64(at, 8, 0x0102_0304_0506_0708).unwrap();
    view.store_u16_release(at, 16, 0xBBAA).unwrap();
    view.store_u32(at, 20, 0x0403_0201).unwrap();
    view.store_u16(at, 24, 0x2211).unwrap();
    assert_eq!(far[0].bytes.lock().unwrap()[8..16], [8, 7, 6, 5, 4, 3, 2, 1]);
    assert_eq!(
        far[0].bytes.lock().unwrap()[16..26],
        [0xAA, 0xBB, 0, 0, 1, 2, 3, 4, 0x11, 0x22]
    );
    assert_eq!(view.load_u64(at, 8), Ok(0x0102_0304_0506_0708));
    assert_eq!(view.load_u16_acquire(at, 16), Ok(0xBBAA));
    assert_eq!(view.load_u32(at, 20), Ok(0x0403_0201));
    assert_eq!(view.load_u16(at, 24), Ok(0x2211));
    assert_eq!(*far[0].lengths.lock().unwrap(), [8, 2, 4, 2, 8, 2, 4, 2]);
    let before = far[0].count();
    assert_eq!(
        view.load_u32(at, 2),
        Err(MemoryError::Misaligned {
            gpa: PAGE + 2,
            align: 4
        })
    );
    assert_eq!(
        view.store_u16(At::unresolved(4 * PAGE), 8, 1),
        Err(MemoryError::ReadOnly { gpa: 4 * PAGE + 8 })
    );
    assert_eq!(view.load_u16(At::unresolved(4 * PAGE), 8), Ok(0));
    assert_eq!(
        view.load_u16(at, u64::MAX - 1),
        Err(MemoryError::Wraps {
            gpa: PAGE,
            len: u64::MAX - 1
        })
    );
    let behind = At::unresolved(5 * PAGE);
    assert_eq!(view.load_u64(behind, 0), Err(MemoryError::Unmapped { gpa: 5 * PAGE }));
    assert_eq!(
        (far[0].count(), far[2].count()),
        (before, 1),
        "what is refused is not transferred"
    );
    view.fence();
    // What knows only mapped memory sees nothing here.
    assert_eq!(pin.mapped().load_u16(at, 0), Err(MemoryError::Unmapped { gpa: PAGE }));
    assert!(common::memory().pin().mediated().is_none());
}

#[test]
fn long_copies_are_made_in_pieces() {
    let size = 2 * MAX_TRANSFER + 24;
    let far = Far::new(1 << 32, size);
    let mem = GuestMemory::new(vec![far.spec(true)], None).unwrap();
    let data: Vec<u8> = (0..size).map(|i| u8::try_from(i % 249).unwrap()).collect();
    mem.write(1 << 32, &data).unwrap();
    assert!(bytes(&mem, 1 << 32, size) == data);
    mem.copy((1 << 32) + 8, 1 << 32, size as u64 - 8).unwrap();
    assert!(bytes(&mem, (1 << 32) + 8, size - 8) == data[..size - 8]);
    mem.fill(1 << 32, size as u64, 5).unwrap();
    assert!(far.bytes.lock().unwrap().iter().all(|&byte| byte == 5));
}

#[test]
fn remote_regions_are_checked_as_others_are() {
    let far = |gpa| Far::new(gpa, 64).spec(true);
    let odd = RegionSpec { gpa: 4, ..far(4) };
    assert!(matches!(
        GuestMemory::new(vec![odd], None),
        Err(RegionError::Misaligned { align: 8, .. })
    ));
    let mem = GuestMemory::new(vec![far(8), far(72)], None).unwrap();
    assert!(matches!(mem.add(far(128)), Err(RegionError::Overlap { .. })));
    assert_eq!(
        mem.live(8, 8, Want::Read).map(drop),
        Err(MemoryError::Unmapped { gpa: 8 })
    );
    let regions = mem.regions();
    assert!(regions.iter().all(|region| region.remote().is_some()
        && region.mapping().is_none()
        && region.fd().is_none()
        && !region.own()));
    assert_eq!(mem.epoch(), 0);
    mem.remove(72, 64).unwrap();
    assert_eq!(
        (mem.epoch(), mem.is_mapped(8, 64), mem.is_mapped(8, 65)),
        (1, true, false)
    );
}

/// From inside a transfer looks at the memory that it serves, and tries what would wait for it.
#[derive(Debug, Default)]
struct Nosy {
    mem: Mutex<Option<Arc<GuestMemory>>>,
    asked: AtomicU64,
}

impl Transfer for Nosy {
    fn read(&self, _: u64, dst: &mut [u8]) -> Result<(), TransferFailed> {
        dst.fill(9);
        let mem = self.mem.lock().unwrap().clone().unwrap();
        assert!(mem.in_transfer() && transferring());
        assert_eq!(mem.add(region(1 << 40, PAGE)), Err(RegionError::InTransfer));
        assert_eq!(mem.remove(0, 64), Err(RegionError::InTransfer));
        assert_eq!(mem.replace(Vec::new()), Err(RegionError::InTransfer));
        let other = GuestMemory::new(vec![region(0, PAGE)], None).unwrap();
        assert!(!other.in_transfer());
        other.add(region(PAGE, PAGE)).unwrap();
        assert_eq!(other.follow(&mem), Err(RegionError::InTransfer));
        assert_eq!(mem.follow(&other), Err(RegionError::InTransfer));
        assert_eq!(mem.set_log(None), Err(RegionError::InTransfer));
        assert_eq!(mem.translate(vec![], vec![]), Err(RegionError::InTransfer));
        let elsewhere = std::thread::scope(|scope| scope.spawn(transferring).join().unwrap());
        assert!(!elsewhere, "of this thread alone");
        self.asked.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn write(&self, _: u64, _: &[u8]) -> Result<(), TransferFailed> {
        Err(TransferFailed)
    }
}

#[test]
fn inside_a_transfer_its_memory_does_not_change() {
    let nosy = Arc::new(Nosy::default());
    let spec = RegionSpec {
        gpa: 0,
        size: 64,
        backing: Backing::Remote {
            transfer: Arc::clone(&nosy) as _,
            writable: true,
        },
    };
    let mem = Arc::new(GuestMemory::new(vec![spec], None).unwrap());
    *nosy.mem.lock().unwrap() = Some(Arc::clone(&mem));
    assert_eq!(bytes(&mem, 0, 64), [9; 64]);
    assert_eq!(mem.write(8, &[1]), Err(MemoryError::Transfer { gpa: 8 }));
    assert_eq!(nosy.asked.load(Ordering::Relaxed), 1);
    assert!(!mem.in_transfer() && !transferring());
    mem.remove(0, 64).unwrap();
    *nosy.mem.lock().unwrap() = None;
}

// ------------------------------------------------------------------------------------------------- queues over it

/// Where the buffers of the story lie: the first of them on both sides of a border.
const BUFFERS: u64 = 0x10_0000;
const CROSSING: u64 = BUFFERS - 24;

struct Story {
    mem: GuestMemory,
    rings: Arc<Far>,
    buffers: Arc<Far>,
}

/// Rings and indirect tables behind one way, buffers behind another.
fn story(rings: Arc<Far>, buffers: Arc<Far>) -> Story {
    let mem = GuestMemory::new(
        vec![rings.spec(true), buffers.spec(true), region(TABLES, 1 << 20)],
        None,
    )
    .unwrap();
    Story { mem, rings, buffers }
}

fn ways(ring_fails: u64, buffer_fails: u64, for_good: bool) -> Story {
    story(
        Far::failing(0, usize::try_from(BUFFERS).unwrap(), ring_fails, for_good),
        Far::failing(BUFFERS, 1 << 16, buffer_fails, for_good),
    )
}

/// What came of the story: whether each end found its ring gone, and how often a copy failed.
#[derive(Debug, Default, PartialEq, Eq)]
struct Outcome {
    device: bool,
    driver: bool,
    copies: u32,
    served: u64,
}

/// Both ends over `mem` do everything that touches memory, whatever fails; each failure must be one of the expected.
fn tell(Story { mem, .. }: &Story, features: u64) -> Outcome {
    let config = config(16, features, Policy::INTEROP);
    let area = IndirectArea {
        address: 0x8_0000,
        entries: 4,
    };
    let pin = mem.pin();
    let view = &pin.mediated().unwrap();
    let mut outcome = Outcome::default();
    let fresh = DriverQueue::new(view, config, None, Some(area));
    let Ok(mut driver) = fresh.map_err(|fault| assert_eq!(fault.rule, Rule::RingUnmapped)) else {
        outcome.driver = true;
        return outcome;
    };
    let mut device = DeviceQueue::new(view, config, None).unwrap();
    let gone = |rule: Rule| assert!(matches!(rule, Rule::RingUnmapped | Rule::IndirectUnmapped), "{rule:?}");
    // The last rounds serve what earlier ones left.
    for round in 0..8u64 {
        let indirect = round % 3 == 2 && features & INDIRECT_DESC != 0;
        for _ in 0..if round < 6 { 2 } else { 0 } {
            match driver.add(
                view,
                &[(CROSSING, 48)],
                &[(CROSSING + 64, 16), (BUFFERS + 80, 8)],
                indirect,
            ) {
                Ok(_) => {}
                Err(QueueError::Violation(fault)) => gone(fault.rule),
                Err(QueueError::Misuse(misuse)) => {
                    assert!(matches!(misuse, Misuse::Latched | Misuse::QueueFull { .. }), "{misuse}");
                }
            }
        }
        if round == 4 {
            driver.disable_calls(view).unwrap_or_else(|fault| gone(fault.rule));
            device.disable_kicks(view).unwrap_or_else(|fault| gone(fault.rule));
        }
        driver.publish(view).map_or_else(|fault| gone(fault.rule), drop);
        driver.wants_kick(view).map_or_else(|fault| gone(fault.rule), drop);
        let (mut segments, mut elements) = (Vec::<Segment>::new(), Vec::new());
        device.has_work(view);
        let popped = device.pop_many(view, 8, &mut segments, &mut elements);
        popped.map_or_else(|fault| gone(fault.rule), drop);
        for element in &elements {
            let iov = Iov::new(&segments[element.first..element.first + element.count], element.epoch);
            let mut request = [0; 48];
            let read = iov.read(view, 0, &mut request);
            let written = read.and_then(|_| iov.write(view, 0, &[7; 24]));
            let written = written.unwrap_or_else(|error| {
                assert!(matches!(error, MemoryError::Transfer { .. }), "{error}");
                outcome.copies += 1;
                0
            });
            match device.complete(view, &element.ticket(), written as u64) {
                Ok(_) => {}
                Err(QueueError::Violation(fault)) => gone(fault.rule),
                Err(QueueError::Misuse(misuse)) => assert_eq!(misuse, Misuse::StaleChain),
            }
        }
        device.publish(view).unwrap_or_else(|fault| gone(fault.rule));
        device.wants_call(view).map_or_else(|fault| gone(fault.rule), drop);
        if round == 5 {
            driver.enable_calls(view).map_or_else(|fault| gone(fault.rule), drop);
            device.enable_kicks(view).map_or_else(|fault| gone(fault.rule), drop);
        }
        driver.has_used(view);
        match driver.get_used(view) {
            Ok(used) => outcome.served += u64::from(used.is_some()),
            Err(fault) => gone(fault.rule),
        }
        match driver.get_used_many(view, 8) {
            Ok(used) => outcome.served += used.len() as u64,
            Err(fault) => gone(fault.rule),
        }
    }
    outcome.device = device.broken();
    outcome.driver = driver.latched().is_some();
    if outcome.device {
        assert_eq!(device.pop(view, &mut Vec::new()), Ok(None), "what is broken stays so");
        assert!(!device.has_work(view));
    }
    if outcome.driver {
        assert!(!driver.has_used(view));
    }
    outcome
}

const FEATURES: [u64; 6] = [
    0,
    EVENT_IDX | feature::NOTIFY_ON_EMPTY,
    INDIRECT_DESC | IN_ORDER,
    PACKED,
    PACKED | EVENT_IDX | IN_ORDER,
    PACKED | INDIRECT_DESC,
];

#[test]
fn both_ends_work_over_remote_rings_and_buffers() {
    for features in FEATURES {
        let far = ways(NEVER, NEVER, false);
        let want = Outcome {
            served: 12,
            ..Outcome::default()
        };
        assert_eq!(tell(&far, features), want, "{features:#x}");
        // The same bytes as in memory that is mapped; traced, since that is what else goes this way.
        let regions = vec![region(0, 1 << 20), region(BUFFERS, 1 << 16), region(TABLES, 1 << 20)];
        let near = Story {
            mem: GuestMemory::new(regions, Some(Arc::default())).unwrap(),
            rings: Far::new(0, 8),
            buffers: Far::new(0, 8),
        };
        assert_eq!(tell(&near, features), want);
        for (gpa, len) in [(0, 1 << 20), (BUFFERS, 1 << 16)] {
            assert!(bytes(&far.mem, gpa, len) == bytes(&near.mem, gpa, len), "{features:#x}");
        }
    }
}

#[test]
fn a_ring_transfer_that_fails_anywhere_latches_the_end_that_made_it() {
    for features in FEATURES {
        let count = {
            let far = ways(NEVER, NEVER, false);
            tell(&far, features);
            far.rings.count()
        };
        let mut latched = [0u32; 2];
        for for_good in [false, true] {
            for number in 0..count {
                let far = ways(number, NEVER, for_good);
                let outcome = tell(&far, features);
                assert!(far.rings.count() > number);
                // Only what was found behind good chains, or by a mere question, may pass when it fails but once.
                assert!(
                    outcome.device || outcome.driver || outcome.copies > 0 || !for_good,
                    "{features:#x} {number}"
                );
                latched[0] += u32::from(outcome.device);
                latched[1] += u32::from(outcome.driver);
                if !for_good && !outcome.device && !outcome.driver && outcome.copies == 0 {
                    assert_eq!(outcome.served, 12, "{features:#x} {number}: nothing is lost");
                }
            }
        }
        assert!(latched[0] > 20 && latched[1] > 20, "{latched:?}");
    }
}

#[test]
fn a_buffer_transfer_that_fails_is_the_chains_trouble_alone() {
    for features in FEATURES {
        let count = {
            let far = ways(NEVER, NEVER, false);
            tell(&far, features);
            far.buffers.count()
        };
        assert!(count >= 36);
        for number in 0..count {
            let far = ways(NEVER, number, false);
            let want = Outcome {
                copies: 1,
                served: 12,
                ..Outcome::default()
            };
            assert_eq!(tell(&far, features), want, "{features:#x} {number}");
        }
    }
}

#[test]
fn a_fault_says_where_and_a_reset_goes_on() {
    for features in [0, PACKED] {
        let far = Far::failing(0, 1 << 20, NEVER, true);
        let mem = GuestMemory::new(vec![far.spec(true)], None).unwrap();
        let config = config(8, features, Policy::STRICT);
        let pin = mem.pin();
        let view = &pin.mediated().unwrap();
        let mut device = DeviceQueue::new(view, config, None).unwrap();
        far.fails.store(0, Ordering::Relaxed);
        let fault = device.pop(view, &mut Vec::new()).unwrap_err();
        assert_eq!(fault.rule, Rule::RingUnmapped);
        assert!(fault.message.contains("transfer") && fault.address.is_some(), "{fault}");
        assert_eq!(device.latched(), Some(&fault));
        far.fails.store(NEVER, Ordering::Relaxed);
        assert_eq!(device.pop(view, &mut Vec::new()), Ok(None));
        device.reset(view, None, None).unwrap();
        assert_eq!(device.pop(view, &mut Vec::new()), Ok(None));
        assert!(device.latched().is_none());
        assert_eq!(device.state(), QueueState::fresh(features & PACKED != 0));
        // A driver end that cannot zero its areas is not built.
        far.fails.store(0, Ordering::Relaxed);
        assert_eq!(
            DriverQueue::new(view, config, None, None).unwrap_err().rule,
            Rule::RingUnmapped
        );
    }
}
