//! What hangs on the seam of memory: the dirty log, and the memory of an IOMMU that shows parts of another.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{INDIRECT_DESC, PACKED, config, region};
use virtio_test::chain::Segment;
use virtio_test::iov::Iov;
use virtio_test::mem::{
    Access, AliasSpec, At, Backing, Elsewhere, GuestMemory, LOG_PAGE, Log, MAX_TRANSLATIONS, MemoryError, RegionError,
    RegionSpec, Trace, Want,
};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig};
use virtio_test::rule::Rule;

const PAGE: u64 = LOG_PAGE;
const READ: (bool, bool) = (true, false);
const BOTH: (bool, bool) = (true, true);

/// A log of `bytes` that `mem` marks, as its reader sees it.
fn logged(mem: &GuestMemory, bytes: u64, elsewhere: Vec<Elsewhere>) -> Log {
    let (log, fd) = Log::fresh(bytes).unwrap();
    mem.set_log(Some(Log::new(fd.as_fd(), 0, bytes, elsewhere).unwrap()))
        .unwrap();
    log
}

fn alias(of: &GuestMemory, gpa: u64, physical: u64, size: u64, access: (bool, bool)) -> AliasSpec {
    let pin = of.pin();
    let region = Arc::clone(pin.table().region_of(physical).unwrap());
    AliasSpec {
        gpa,
        size,
        skip: physical - region.gpa(),
        region,
        access,
    }
}

// ------------------------------------------------------------------------------------------------- the dirty log

#[test]
fn each_way_of_writing_marks_the_pages_that_it_wrote() {
    let mem = GuestMemory::new(vec![region(0, 64 * PAGE), region(64 * PAGE, 64 * PAGE)], None).unwrap();
    let log = logged(&mem, 16, vec![]);
    let at = At::unresolved;
    assert!(log.take().is_empty());
    mem.write(PAGE - 1, &[1, 2]).unwrap();
    assert_eq!(log.take(), [0, 1]);
    assert!(log.take().is_empty(), "what was taken is marked no more");
    mem.fill(5 * PAGE, 20 * PAGE, 7).unwrap();
    assert_eq!(log.take(), (5..25).collect::<Vec<_>>());
    mem.copy(64 * PAGE - 1, 0, 2).unwrap();
    assert_eq!(
        log.take(),
        [63, 64],
        "across two regions, and what is read is not marked"
    );
    mem.write(3, &[]).unwrap();
    mem.fill(3, 0, 1).unwrap();
    mem.copy(3, 9, 0).unwrap();
    assert!(log.take().is_empty(), "nothing was written");
    mem.write(128 * PAGE - 1, &[1, 2]).unwrap_err();
    assert!(log.take().is_empty(), "what was refused was not written");
    let pin = mem.pin();
    let view = pin.mediated().unwrap();
    view.store_u16(at(2), 2 * PAGE, 1).unwrap();
    view.store_u16_release(at(0), 3 * PAGE, 1).unwrap();
    let word = view.resolve(9 * PAGE, 8, Want::Write).unwrap();
    view.store_u32(word, 4, 1).unwrap();
    view.store_u64(at(127 * PAGE), 8, 1).unwrap();
    let bytes = view.resolve(11 * PAGE, 8, Want::Write).unwrap();
    view.write(bytes, 0, &[1; 8]).unwrap();
    view.load_u64(at(4 * PAGE), 0).unwrap();
    view.read(at(6 * PAGE), 0, &mut [0]).unwrap();
    view.store_u16(at(1), 2 * PAGE, 1).unwrap_err();
    assert_eq!(log.take(), [2, 3, 9, 11, 127]);
}

#[test]
fn a_log_that_is_too_small_or_away_costs_nothing_else() {
    let mem = GuestMemory::new(vec![region(0, 128 * PAGE)], None).unwrap();
    assert!(mem.pin().mediated().is_none());
    let log = logged(&mem, 1, vec![]);
    assert!(mem.pin().mediated().is_some());
    mem.fill(6 * PAGE, 100 * PAGE, 1).unwrap();
    assert_eq!(log.take(), [6, 7], "and nothing beyond it");
    mem.write(127 * PAGE, &[1]).unwrap();
    assert!(log.take().is_empty());
    // A change of the table keeps it.
    mem.add(region(1 << 20, PAGE)).unwrap();
    mem.write(PAGE, &[1]).unwrap();
    assert_eq!(log.take(), [1]);
    mem.set_log(None).unwrap();
    mem.write(PAGE, &[1]).unwrap();
    assert!(log.take().is_empty());
    assert!(mem.pin().mediated().is_none());
    assert!(matches!(
        Log::fresh(0),
        Err(RegionError::System { .. } | RegionError::Empty { .. })
    ));
    let (_, fd) = Log::fresh(8).unwrap();
    let empty = Log::new(fd.as_fd(), 0, 0, vec![]).unwrap_err();
    assert_eq!(empty, RegionError::Empty { gpa: 0 });
    for (offset, size) in [(1, 8), (0, 9), (u64::MAX, 8), (8, u64::MAX), (u64::MAX, u64::MAX)] {
        assert!(Log::new(fd.as_fd(), offset, size, vec![]).is_err(), "{offset} {size}");
    }
    // Not a byte beyond it, though the file has more.
    mem.set_log(Some(Log::new(fd.as_fd(), 0, 1, vec![]).unwrap())).unwrap();
    mem.fill(0, 100 * PAGE, 1).unwrap();
    let seen = Log::new(fd.as_fd(), 0, 8, vec![]).unwrap();
    assert_eq!(seen.take(), (0..8).collect::<Vec<_>>());
    // No alignment is asked for.
    let odd = Log::new(fd.as_fd(), 3, 5, vec![]).unwrap();
    mem.set_log(Some(odd)).unwrap();
    mem.write(9 * PAGE, &[1]).unwrap();
    let seen = Log::new(fd.as_fd(), 0, 8, vec![]).unwrap();
    assert_eq!(seen.take(), [3 * 8 + 9]);
}

#[test]
fn a_stretch_can_be_logged_elsewhere() {
    let mem = GuestMemory::new(vec![region(0, 64 * PAGE)], None).unwrap();
    let moved = Elsewhere {
        gpa: 4 * PAGE + 8,
        size: PAGE,
        logged: 100 * PAGE + 8,
    };
    let log = logged(&mem, 16, vec![moved]);
    mem.write(4 * PAGE, &[1; 8]).unwrap();
    assert_eq!(log.take(), [4], "just before it");
    mem.write(4 * PAGE + 8, &[1; 8]).unwrap();
    assert_eq!(log.take(), [100]);
    mem.write(5 * PAGE + 8, &[1]).unwrap();
    assert_eq!(log.take(), [5], "just behind it");
    mem.fill(3 * PAGE, 4 * PAGE, 1).unwrap();
    assert_eq!(log.take(), [3, 4, 5, 6, 100, 101]);
}

#[test]
fn many_threads_lose_no_mark() {
    let mem = GuestMemory::new(vec![region(0, 64 * PAGE)], None).unwrap();
    let log = logged(&mem, 8, vec![]);
    let done = AtomicBool::new(false);
    let seen = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            // What is marked was written before: a page is never newer than the last look at it.
            let mut copies = [[0_u8; 8]; 64];
            loop {
                let last = done.load(Ordering::Acquire);
                for page in log.take() {
                    mem.read(page * PAGE, &mut copies[usize::try_from(page).unwrap()])
                        .unwrap();
                }
                if last {
                    return copies;
                }
            }
        });
        let writers: Vec<_> = (0..4_u64)
            .map(|own| {
                let mem = &mem;
                scope.spawn(move || {
                    for round in 0..2000_u64 {
                        let page = own + 4 * (round % 16);
                        mem.write(page * PAGE, &round.to_le_bytes()).unwrap();
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Release);
        reader.join().unwrap()
    });
    for (page, copy) in (0..64).zip(seen) {
        let mut now = [0; 8];
        mem.read(page * PAGE, &mut now).unwrap();
        assert_eq!(copy, now, "page {page}");
    }
}

#[test]
fn what_a_trace_changes_the_other_side_has_written() {
    let trace = Arc::new(Trace::new());
    let mem = GuestMemory::new(vec![region(0, 64 * PAGE)], Some(Arc::clone(&trace))).unwrap();
    let log = logged(&mem, 8, vec![]);
    trace.change_at(0, 5 * PAGE, vec![1]);
    let pin = mem.pin();
    pin.mediated().unwrap().write(At::unresolved(PAGE), 0, &[1]).unwrap();
    assert_eq!(log.take(), [1]);
    assert_eq!(trace.missed(), 0);
}

// ------------------------------------------------------------------------------------------ memory of an IOMMU

fn two() -> (GuestMemory, GuestMemory) {
    let real = GuestMemory::new(vec![region(0, 16 * PAGE), region(1 << 30, 16 * PAGE)], None).unwrap();
    let shown = GuestMemory::new(vec![], None).unwrap();
    shown.translate(vec![], vec![]).unwrap();
    (real, shown)
}

#[test]
fn translations_show_the_bytes_of_other_memory() {
    let (real, shown) = two();
    let parts = vec![
        alias(&real, 7 * PAGE, 2 * PAGE, PAGE, BOTH),
        alias(&real, 8 * PAGE, 1 << 30, PAGE, BOTH),
        alias(&real, u64::MAX - PAGE + 1 - 8, (1 << 30) + 8, 16, READ),
    ];
    shown.translate(vec![], parts).unwrap();
    shown.write(8 * PAGE - 2, b"abcd").unwrap();
    let mut found = [0; 2];
    real.read(3 * PAGE - 2, &mut found).unwrap();
    assert_eq!(&found, b"ab");
    real.read(1 << 30, &mut found).unwrap();
    assert_eq!(&found, b"cd");
    assert_eq!(shown.regions()[0].physical(), 2 * PAGE);
    // The log is about physical addresses.
    let log = logged(&shown, 1 << 16, vec![]);
    shown.write(8 * PAGE - 2, b"abcd").unwrap();
    assert_eq!(log.take(), [2, (1 << 30) / PAGE]);
    // It holds the bytes, whatever becomes of the memory they are of.
    real.replace(vec![]).unwrap();
    shown.read(8 * PAGE - 2, &mut found).unwrap();
    assert_eq!(&found, b"ab");
    shown.translate(vec![8 * PAGE], vec![]).unwrap();
    assert_eq!(shown.regions().len(), 2);
    let gone = MemoryError::Untranslated {
        gpa: 8 * PAGE,
        want: Want::Write,
    };
    assert_eq!(shown.write(8 * PAGE - 1, &[1, 2]), Err(gone));
    assert_eq!(gone.to_string(), "0x8000 has no translation to write");
}

#[test]
fn what_is_not_shown_for_this_is_missing_and_no_fault() {
    let (real, shown) = two();
    shown
        .translate(
            vec![],
            vec![
                alias(&real, 0, 0, PAGE, READ),
                alias(&real, PAGE, 0, PAGE, (false, true)),
                alias(&real, 2 * PAGE, 0, PAGE, BOTH),
            ],
        )
        .unwrap();
    let missing = |gpa, want| Err(MemoryError::Untranslated { gpa, want });
    assert_eq!(shown.write(8, &[1]), missing(8, Want::Write));
    assert_eq!(shown.read(PAGE, &mut [0]), missing(PAGE, Want::Read));
    assert_eq!(shown.check(PAGE, 2 * PAGE, Want::Write), Ok(()));
    assert_eq!(
        shown.check(2 * PAGE, 2 * PAGE, Want::Read),
        missing(3 * PAGE, Want::Read)
    );
    assert!(shown.live(0, 8, Want::Write).is_err());
    assert!(shown.live(PAGE, 8, Want::Read).is_err());
    assert!(shown.live(2 * PAGE, 8, Want::Write).is_ok());
    let wraps = MemoryError::Wraps { gpa: u64::MAX, len: 2 };
    assert_eq!(shown.check(u64::MAX, 2, Want::Read), Err(wraps));
    // In other memory the same is what it was.
    assert_eq!(
        real.check(16 * PAGE, 1, Want::Read),
        Err(MemoryError::Unmapped { gpa: 16 * PAGE })
    );
}

#[test]
fn a_translation_that_cannot_be_changes_nothing() {
    let (real, shown) = two();
    shown.translate(vec![], vec![alias(&real, 0, 0, PAGE, BOTH)]).unwrap();
    let epoch = shown.epoch();
    for (gpa, physical, size) in [
        (PAGE, 0, 0),
        (PAGE, 0, 17 * PAGE),
        (PAGE, 15 * PAGE, 2 * PAGE),
        (PAGE, PAGE, u64::MAX),
        (u64::MAX - 7, 0, 16),
        (PAGE + 4, 0, PAGE),
        (PAGE, 4, PAGE),
        (PAGE, 0, 12),
        (PAGE - 8, 0, PAGE),
    ] {
        let part = alias(&real, gpa, physical, size, BOTH);
        assert!(
            shown.translate(vec![], vec![part]).is_err(),
            "{gpa:#x} {physical:#x} {size:#x}"
        );
    }
    let too_many = (0..=MAX_TRANSLATIONS as u64).map(|at| alias(&real, at * 16, 0, 8, BOTH));
    assert!(matches!(
        shown.translate(vec![0], too_many.collect()),
        Err(RegionError::TooMany { .. })
    ));
    assert_eq!(shown.epoch(), epoch);
    assert_eq!(shown.add(region(PAGE, PAGE)), Err(RegionError::Mixed));
    assert_eq!(shown.remove(0, PAGE), Err(RegionError::Mixed));
    assert_eq!(shown.regions().len(), 1);
    shown.follow(&real).unwrap();
    assert_eq!(shown.regions().len(), 2);
    assert!(!shown.pin().table().translated());
    let read_only = RegionSpec {
        gpa: 1 << 20,
        size: PAGE,
        backing: Backing::fresh_read_only(1 << 20, PAGE).unwrap(),
    };
    real.add(read_only).unwrap();
    shown
        .translate(vec![], vec![alias(&real, 0, 1 << 20, PAGE, BOTH)])
        .unwrap();
    assert!(
        shown.check(0, 1, Want::Write).is_err(),
        "nobody may write more than it could before"
    );
}

// -------------------------------------------------------------------------------------- a queue in such memory

struct Iommu {
    real: GuestMemory,
    shown: GuestMemory,
    driver: DriverQueue,
    device: DeviceQueue,
    segments: Vec<Segment>,
}

/// The driver's ring lies in pages 0 to 3 at the same address in both; its buffers where it likes.
impl Iommu {
    fn new(features: u64) -> Self {
        let real = GuestMemory::new(vec![region(0, 64 * PAGE)], None).unwrap();
        let shown = GuestMemory::new(vec![], None).unwrap();
        shown
            .translate(vec![], vec![alias(&real, 0, 0, 4 * PAGE, BOTH)])
            .unwrap();
        let config: QueueConfig = config(8, features, Policy::INTEROP);
        let driver = {
            // A driver speaks of addresses that only the device looks up.
            let all = GuestMemory::new(vec![], None).unwrap();
            all.follow(&real).unwrap();
            DriverQueue::new(&all.pin().mapped(), config, None, None).unwrap()
        };
        let device = DeviceQueue::new(&shown.pin().mapped(), config, None).unwrap();
        Self {
            real,
            shown,
            driver,
            device,
            segments: Vec::new(),
        }
    }

    fn pop(&mut self) -> Option<virtio_test::chain::Element> {
        let pin = self.shown.pin();
        self.device.pop(&pin.mapped(), &mut self.segments).unwrap()
    }

    fn has_work(&mut self) -> bool {
        let pin = self.shown.pin();
        self.device.has_work(&pin.mapped())
    }
}

#[test]
fn a_pop_waits_for_each_translation_and_then_takes_the_chain() {
    for features in [0, PACKED] {
        let mut world = Iommu::new(features);
        {
            let pin = world.real.pin();
            let readable = [(32 * PAGE - 4, 8)];
            world
                .driver
                .add(&pin.mapped(), &readable, &[(40 * PAGE, 3 * 4096)], false)
                .unwrap();
            world.driver.publish(&pin.mapped()).unwrap();
        }
        assert!(world.has_work());
        let steps = [
            (31, 32 * PAGE - 4, 8, Want::Read, READ),
            (32, 32 * PAGE, 4, Want::Read, READ),
            (40, 40 * PAGE, 3 * PAGE, Want::Write, BOTH),
            (41, 41 * PAGE, 2 * PAGE, Want::Write, BOTH),
            (42, 42 * PAGE, PAGE, Want::Write, BOTH),
        ];
        for (page, address, len, want, access) in steps {
            assert_eq!(world.pop(), None);
            assert_eq!(world.pop(), None);
            assert!(world.device.waits_anew());
            assert_eq!(world.pop(), None);
            assert!(!world.device.waits_anew(), "who was told is not told again");
            assert!(!world.has_work(), "nothing to spin on");
            let fault = world.device.waits().unwrap().clone();
            let missing = fault.missing.unwrap();
            assert_eq!((missing.address, missing.len, missing.want), (address, len, want));
            assert_eq!((fault.rule, fault.address), (Rule::UnmappedAddress, Some(address)));
            assert!(world.segments.is_empty());
            let page = alias(&world.real, page * PAGE, page * PAGE, PAGE, access);
            world.shown.translate(vec![], vec![page]).unwrap();
            assert!(world.has_work(), "it is worth another look");
        }
        let element = world.pop().unwrap();
        assert!(world.device.waits().is_none());
        assert_eq!((element.readable, element.writable), (8, 3 * PAGE));
        let pin = world.shown.pin();
        let iov = Iov::new(&world.segments, element.epoch);
        assert_eq!(iov.write(&pin.mapped(), PAGE - 1, b"xy").unwrap(), 2);
        drop(pin);
        // Gone between pop and copy: an error, and nothing is written.
        world.shown.translate(vec![41 * PAGE], vec![]).unwrap();
        let pin = world.shown.pin();
        let stale = iov.write(&pin.mapped(), PAGE - 1, b"zz").unwrap_err();
        assert_eq!(
            stale,
            MemoryError::Untranslated {
                gpa: 41 * PAGE,
                want: Want::Write
            }
        );
        let mut now = [0; 2];
        world.real.read(41 * PAGE - 1, &mut now).unwrap();
        assert_eq!(&now, b"xy");
        assert!(world.device.complete(&pin.mapped(), &element.ticket(), 2).unwrap());
        world.device.publish(&pin.mapped()).unwrap();
    }
}

#[test]
fn an_indirect_table_is_waited_for_too() {
    for features in [INDIRECT_DESC, INDIRECT_DESC | PACKED] {
        let mut world = Iommu::new(features);
        // One descriptor by hand: a table over two pages of which none is shown.
        let split = features & PACKED == 0;
        let (table, bytes) = (50 * PAGE - 16, 32_u32);
        let flags: u16 = if split { 4 } else { 4 | 1 << 7 };
        let config = *world.device.config();
        world.real.write(config.desc, &table.to_le_bytes()).unwrap();
        world.real.write(config.desc + 8, &bytes.to_le_bytes()).unwrap();
        let at = config.desc + if split { 12 } else { 14 };
        world.real.write(at, &flags.to_le_bytes()).unwrap();
        if split {
            world.real.write(config.driver + 2, &1_u16.to_le_bytes()).unwrap();
        }
        for (address, len) in [(table, 32), (50 * PAGE, 16)] {
            assert_eq!(world.pop(), None);
            let fault = world.device.waits().unwrap();
            assert_eq!(fault.rule, Rule::IndirectUnmapped);
            let missing = fault.missing.unwrap();
            assert_eq!((missing.address, missing.len, missing.want), (address, len, Want::Read));
            let page = address - address % PAGE;
            let page = alias(&world.real, page, page, PAGE, READ);
            world.shown.translate(vec![], vec![page]).unwrap();
        }
        assert!(world.device.latched().is_none());
    }
}

#[test]
fn good_chains_before_one_that_waits_are_taken() {
    let mut world = Iommu::new(0);
    {
        let pin = world.real.pin();
        for page in [3, 2, 50] {
            world
                .driver
                .add(&pin.mapped(), &[(page * PAGE, 4)], &[], false)
                .unwrap();
        }
        world.driver.publish(&pin.mapped()).unwrap();
    }
    let mut elements = Vec::new();
    let pin = world.shown.pin();
    let popped = world
        .device
        .pop_many(&pin.mapped(), 8, &mut world.segments, &mut elements)
        .unwrap();
    assert_eq!(popped, 2);
    drop(pin);
    assert_eq!(world.device.waits().unwrap().address, Some(50 * PAGE));
    assert_eq!(world.pop(), None);
    assert_eq!(world.device.state().avail, 2);
    assert!(world.device.latched().is_none());
}
