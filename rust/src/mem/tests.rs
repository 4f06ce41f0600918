//! Tests of the memory layer, on real mappings.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test that panics has failed, which is what it is for"
)]

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::*;

const PAGE: u64 = 4096;

fn anonymous(gpa: u64, size: u64) -> RegionSpec {
    RegionSpec {
        gpa,
        size,
        backing: Backing::Anonymous,
    }
}

fn memory(regions: &[(u64, u64)]) -> GuestMemory {
    GuestMemory::new(regions.iter().map(|&(gpa, size)| anonymous(gpa, size)).collect(), None).unwrap()
}

fn file(size: u64) -> OwnedFd {
    let fd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

fn received(gpa: u64, size: u64, fd: OwnedFd, offset: u64, writable: bool) -> RegionSpec {
    RegionSpec {
        gpa,
        size,
        backing: Backing::Received { fd, offset, writable },
    }
}

fn misaligned<T>(gpa: u64, align: u64) -> Result<T, MemoryError> {
    Err(MemoryError::Misaligned { gpa, align })
}

fn bytes(mem: &GuestMemory, gpa: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    mem.read(gpa, &mut out).unwrap();
    out
}

#[test]
fn translation_is_one_operation_over_adjacent_regions() {
    let mem = memory(&[(0, PAGE), (PAGE, PAGE), (4 * PAGE, PAGE)]);
    let pin = mem.pin();
    let view = pin.mapped();
    // (address, length) → the first address that is missing
    let cases = [
        (0, 2 * PAGE, None),
        (PAGE - 1, 2, None),
        (2 * PAGE - 1, 1, None),
        (2 * PAGE - 1, 2, Some(2 * PAGE)),
        (0, 5 * PAGE, Some(2 * PAGE)),
        (3 * PAGE, 1, Some(3 * PAGE)),
        (5 * PAGE - 8, 8, None),
        (5 * PAGE - 8, 9, Some(5 * PAGE)),
        (5 * PAGE, 1, Some(5 * PAGE)),
        (3 * PAGE, 0, None),
        (u64::MAX, 0, None),
        (u64::MAX - 1, 1, Some(u64::MAX - 1)),
    ];
    for (gpa, len, missing) in cases {
        let want = missing.map_or(Ok(()), |gpa| Err(MemoryError::Unmapped { gpa }));
        assert_eq!(view.resolve(gpa, len, Want::Read).map(drop), want, "{gpa:#x} {len:#x}");
        assert_eq!(view.resolve(gpa, len, Want::Write).map(drop), want, "{gpa:#x} {len:#x}");
        assert_eq!(mem_is_mapped(&pin, gpa, len), missing.is_none());
    }
    for (gpa, len) in [(u64::MAX, 1), (1, u64::MAX), (u64::MAX, u64::MAX), (5 * PAGE, u64::MAX)] {
        assert_eq!(
            view.resolve(gpa, len, Want::Read).unwrap_err(),
            MemoryError::Wraps { gpa, len }
        );
    }
}

fn mem_is_mapped(pin: &Pin<'_>, gpa: u64, len: u64) -> bool {
    pin.table().check(gpa, len, Want::Read).is_ok()
}

#[test]
fn copies_and_words_cross_adjacent_regions_only_where_they_may() {
    let mem = memory(&[(PAGE, PAGE), (2 * PAGE, PAGE)]);
    let data: Vec<u8> = (0..100).collect();
    mem.write(2 * PAGE - 50, &data).unwrap();
    assert_eq!(bytes(&mem, 2 * PAGE - 50, 100), data);
    mem.fill(2 * PAGE - 1, 2, 0xEE).unwrap();
    assert_eq!(bytes(&mem, 2 * PAGE - 2, 4), [48, 0xEE, 0xEE, 51]);

    let pin = mem.pin();
    let view = pin.mapped();
    let crossing = view.resolve(2 * PAGE - 8, 16, Want::Write).unwrap();
    assert!(crossing.ptr.is_null());
    view.store_u64(crossing, 8, 0x0102_0304_0506_0708).unwrap();
    assert_eq!(view.load_u64(crossing, 8).unwrap(), 0x0102_0304_0506_0708);
    assert_eq!(view.load_u16(crossing, 8).unwrap(), 0x0708);
    assert_eq!(view.load_u32(crossing, 12).unwrap(), 0x0102_0304);
    assert_eq!(view.load_u16(crossing, 7), misaligned(2 * PAGE - 1, 2));
    assert_eq!(view.load_u64(crossing, 4), misaligned(2 * PAGE - 4, 8));
    assert_eq!(view.store_u32(crossing, 2, 0), misaligned(2 * PAGE - 6, 4));
    let inside = view.resolve(PAGE, 64, Want::Write).unwrap();
    assert_eq!(view.load_u16_acquire(inside, 3), misaligned(PAGE + 3, 2));
    assert_eq!(
        view.load_u16(At::unresolved(u64::MAX - 1), 0),
        Err(MemoryError::Wraps {
            gpa: u64::MAX - 1,
            len: 2
        })
    );
    assert_eq!(
        view.load_u16(inside, u64::MAX - 1),
        Err(MemoryError::Wraps {
            gpa: PAGE,
            len: u64::MAX - 1
        })
    );

    // A write that does not fit whole changes nothing.
    let before = view.load_u64(At::unresolved(3 * PAGE - 8), 0).unwrap();
    assert_eq!(
        view.write(At::unresolved(3 * PAGE - 8), 0, &[1; 9]),
        Err(MemoryError::Unmapped { gpa: 3 * PAGE })
    );
    assert_eq!(view.load_u64(At::unresolved(3 * PAGE - 8), 0).unwrap(), before);
}

#[test]
fn words_are_little_endian() {
    let mem = memory(&[(0, PAGE)]);
    mem.write(0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    let pin = mem.pin();
    let view = pin.mapped();
    let at = view.resolve(0, 8, Want::Write).unwrap();
    assert_eq!(view.load_u16(at, 0).unwrap(), 0x0201);
    assert_eq!(view.load_u32(at, 4).unwrap(), 0x0807_0605);
    view.store_u16_release(at, 2, 0xBBAA).unwrap();
    view.store_u16(at, 6, 0xDDCC).unwrap();
    let mut out = [0; 8];
    view.read(at, 0, &mut out).unwrap();
    assert_eq!(out, [1, 2, 0xAA, 0xBB, 5, 6, 0xCC, 0xDD]);
}

#[test]
fn an_address_of_another_table_or_beyond_its_range_is_translated_anew() {
    let mem = memory(&[(0, PAGE), (PAGE, PAGE)]);
    let other = memory(&[(0, PAGE)]);
    other.write(0, &[7, 0]).unwrap();
    let old = mem.pin().mapped().resolve(0, 8, Want::Write).unwrap();
    // Another memory of the same epoch.
    assert_eq!(other.pin().mapped().load_u16(old, 0), Ok(7));
    // Beyond the range it was resolved for, beyond its region, beyond all.
    mem.write(PAGE, &[9, 0]).unwrap();
    assert_eq!(mem.pin().mapped().load_u16(old, PAGE), Ok(9));
    assert_eq!(
        mem.pin().mapped().load_u16(old, 2 * PAGE),
        Err(MemoryError::Unmapped { gpa: 2 * PAGE })
    );
    // Its region is gone.
    mem.remove(0, PAGE).unwrap();
    assert_eq!(
        mem.pin().mapped().load_u16(old, 0),
        Err(MemoryError::Unmapped { gpa: 0 })
    );
    assert_eq!(
        mem.pin().mapped().write(old, 0, &[1]),
        Err(MemoryError::Unmapped { gpa: 0 })
    );
}

#[test]
fn read_only_regions_are_read_and_never_written() {
    let fd = file(PAGE);
    rustix::io::pwrite(&fd, &[5, 0, 6, 0], 0).unwrap();
    let mem = GuestMemory::new(vec![anonymous(0, PAGE), received(PAGE, PAGE, fd, 0, false)], None).unwrap();
    let refused = |gpa| Err(MemoryError::ReadOnly { gpa });
    assert_eq!(mem.write(PAGE - 1, &[1, 1]), refused(PAGE));
    assert_eq!(mem.fill(PAGE + 9, 1, 1), refused(PAGE + 9));
    assert_eq!(mem.copy(PAGE, 0, 4), refused(PAGE));
    assert_eq!(mem.live(PAGE, 8, Want::Write).map(drop), refused(PAGE));
    assert_eq!(bytes(&mem, PAGE - 1, 3), [0, 5, 0]);
    let pin = mem.pin();
    let view = pin.mapped();
    assert_eq!(view.resolve(PAGE, 8, Want::Write).map(drop), refused(PAGE));
    // Resolved for reading, a store must still be refused instead of faulting.
    let at = view.resolve(PAGE, 8, Want::Read).unwrap();
    assert_eq!(view.load_u16_acquire(at, 2), Ok(6));
    assert_eq!(view.store_u16(at, 2, 1), refused(PAGE + 2));
    assert_eq!(view.write(at, 0, &[1]), refused(PAGE));
}

#[test]
fn a_received_file_is_mapped_at_any_offset_of_8_and_must_be_long_enough() {
    let fd = file(3 * PAGE);
    rustix::io::pwrite(&fd, b"here", PAGE + 24).unwrap();
    let dup = || fd.try_clone().unwrap();
    let mem = GuestMemory::new(vec![received(0x8_0000, PAGE, dup(), PAGE + 24, true)], None).unwrap();
    assert_eq!(bytes(&mem, 0x8_0000, 4), b"here");
    mem.write(0x8_0000 + PAGE - 2, b"ok").unwrap();
    let mut out = [0; 2];
    rustix::io::pread(&fd, &mut out, 2 * PAGE + 22).unwrap();
    assert_eq!(&out, b"ok");
    mem.add(received(0x10_0000, PAGE, dup(), 2 * PAGE, true)).unwrap();

    let error = |gpa, size, offset| mem.add(received(gpa, size, dup(), offset, true)).unwrap_err();
    let align = RECEIVED_ALIGN;
    let needed = 3 * PAGE + 8;
    assert_eq!(
        error(0, PAGE, 2 * PAGE + 8),
        RegionError::FileTooShort {
            gpa: 0,
            needed,
            actual: 3 * PAGE
        }
    );
    assert_eq!(
        error(0, PAGE, 4),
        RegionError::Misaligned {
            what: "offset",
            value: 4,
            align,
            gpa: 0
        }
    );
    assert_eq!(
        error(2, 8, 0),
        RegionError::Misaligned {
            what: "address",
            value: 2,
            align,
            gpa: 2
        }
    );
    assert_eq!(
        error(8, 12, 0),
        RegionError::Misaligned {
            what: "size",
            value: 12,
            align,
            gpa: 8
        }
    );
    assert_eq!(error(8, 0, 0), RegionError::Empty { gpa: 8 });
    let start = 0u64.wrapping_sub(8);
    assert_eq!(
        error(start, 8, 0),
        RegionError::Wraps {
            what: "address",
            start,
            size: 8
        }
    );
    assert_eq!(
        error(0, 8, start),
        RegionError::Wraps {
            what: "offset",
            start,
            size: 8
        }
    );
    let directory = OwnedFd::from(std::fs::File::open("/").unwrap());
    assert!(matches!(
        mem.add(received(0, 8, directory, 0, false)),
        Err(RegionError::System { .. })
    ));
    assert_eq!(mem.epoch(), 1);
}

#[test]
fn own_memory_is_in_pages_and_its_file_cannot_shrink() {
    let align = OWN_ALIGN;
    let error = |gpa, size| GuestMemory::new(vec![anonymous(gpa, size)], None).unwrap_err();
    assert_eq!(
        error(8, PAGE),
        RegionError::Misaligned {
            what: "address",
            value: 8,
            align,
            gpa: 8
        }
    );
    assert_eq!(
        error(0, 8),
        RegionError::Misaligned {
            what: "size",
            value: 8,
            align,
            gpa: 0
        }
    );
    let region = Region::new(0, 2 * PAGE, Backing::Memfd).unwrap();
    assert_eq!(ftruncate(region.fd().unwrap(), PAGE), Err(rustix::io::Errno::PERM));
    // Too much for the address space: the operating system's word for it.
    assert!(matches!(error(0, 1 << 60), RegionError::System { .. }));
}

#[test]
fn tables_hold_509_regions_that_do_not_overlap() {
    // Every second page, from both sides of the scan limit on.
    for count in [16, 17, MAX_REGIONS as u64] {
        let mem = memory(&(0..count).map(|k| (2 * k * PAGE, PAGE)).rev().collect::<Vec<_>>());
        for k in 0..count {
            mem.write(2 * k * PAGE + 8, &k.to_le_bytes()).unwrap();
        }
        for k in 0..count {
            assert_eq!(bytes(&mem, 2 * k * PAGE + 8, 8), k.to_le_bytes());
            let gpa = (2 * k + 1) * PAGE;
            assert_eq!(mem.read(gpa, &mut [0]), Err(MemoryError::Unmapped { gpa }));
            assert_eq!(mem.read(gpa - 1, &mut [0; 2]), Err(MemoryError::Unmapped { gpa }));
        }
        if count == MAX_REGIONS as u64 {
            let limit = MAX_REGIONS;
            assert_eq!(
                mem.add(anonymous(PAGE, PAGE)),
                Err(RegionError::TooMany {
                    count: limit + 1,
                    limit
                })
            );
        }
    }
    let mem = memory(&[(2 * PAGE, 2 * PAGE)]);
    for (gpa, size) in [
        (0, 3 * PAGE),
        (3 * PAGE, PAGE),
        (3 * PAGE, 2 * PAGE),
        (2 * PAGE, 2 * PAGE),
        (0, 8 * PAGE),
    ] {
        assert!(
            matches!(mem.add(anonymous(gpa, size)), Err(RegionError::Overlap { .. })),
            "{gpa:#x}"
        );
    }
    assert_eq!(mem.epoch(), 0);
    mem.add(anonymous(0, 2 * PAGE)).unwrap();
    mem.add(anonymous(4 * PAGE, PAGE)).unwrap();
    assert!(mem.is_mapped(0, 5 * PAGE));
}

#[test]
fn every_change_of_the_table_is_an_epoch_and_a_refused_one_is_none() {
    let mem = memory(&[]);
    mem.add(anonymous(0, PAGE)).unwrap();
    mem.write(0, &[42]).unwrap();
    mem.add(anonymous(PAGE, PAGE)).unwrap();
    assert_eq!(mem.epoch(), 2);
    for (gpa, size) in [(0, 2 * PAGE), (PAGE, 8), (8, PAGE)] {
        assert_eq!(mem.remove(gpa, size), Err(RegionError::NotFound { gpa, size }));
    }
    let refused = mem.replace(vec![anonymous(0, PAGE), anonymous(8 * PAGE, PAGE), anonymous(0, PAGE)]);
    assert!(matches!(refused, Err(RegionError::Overlap { .. })));
    assert_eq!((mem.epoch(), mem.regions().len(), bytes(&mem, 0, 1)), (2, 2, vec![42]));
    mem.remove(PAGE, PAGE).unwrap();
    mem.replace(vec![anonymous(8 * PAGE, PAGE)]).unwrap();
    assert_eq!(
        (mem.epoch(), mem.is_mapped(0, 1), mem.is_mapped(8 * PAGE, PAGE)),
        (4, false, true)
    );
}

#[test]
fn overlapping_copies_read_before_they_write() {
    let data: Vec<u8> = (0..3 * PAGE).map(|k| (k % 251) as u8).collect();
    let (near, far) = (PAGE as usize - 100, 2 * PAGE as usize - 30);
    for (dst, src, len) in [
        (7, 0, 9000),
        (0, 7, 9000),
        (near, far, 3000),
        (far, near, 4000),
        (5000, 5000, 10),
    ] {
        let mem = memory(&[(0, PAGE), (PAGE, PAGE), (2 * PAGE, PAGE)]);
        mem.write(0, &data).unwrap();
        mem.copy(dst as u64, src as u64, len as u64).unwrap();
        let mut want = data.clone();
        want.copy_within(src..src + len, dst);
        assert!(bytes(&mem, 0, data.len()) == want, "{dst} {src} {len}");
    }
    let mem = memory(&[(0, PAGE)]);
    assert_eq!(mem.copy(0, PAGE - 4, 5), Err(MemoryError::Unmapped { gpa: PAGE }));
    assert_eq!(mem.copy(0, 0, 0), Ok(()));
}

#[test]
fn a_trace_numbers_accesses_and_changes_memory_before_one() {
    let trace = Arc::new(Trace::new());
    let mem = GuestMemory::new(vec![anonymous(0, PAGE)], Some(Arc::clone(&trace))).unwrap();
    trace.change_at(2, 16, vec![0x34, 0x12]);
    trace.change_at(9, PAGE, vec![1]);
    // Our own reads and writes are not the queues': not numbered.
    mem.write(16, &[1]).unwrap();
    let pin = mem.pin();
    let values = with_access!(pin, |view| {
        let at = view.resolve(16, 8, Want::Write).unwrap();
        let first = view.load_u16(at, 0).unwrap();
        view.store_u32(at, 4, 5).unwrap();
        let second = view.load_u16_acquire(at, 0).unwrap();
        view.fence();
        let mut out = [0; 3];
        view.read(at, 1, &mut out).unwrap();
        view.write(at, 0, &out).unwrap();
        view.fill(at, 2, 6, 0).unwrap();
        assert!(view.load_u64(at, PAGE).is_err());
        (first, second, out)
    });
    assert_eq!(values, (1, 0x1234, [0x12, 0, 0]));
    let record = |kind, gpa, len| Record { kind, gpa, len };
    let log = [
        record(AccessKind::Load, 16, 2),
        record(AccessKind::Store, 20, 4),
        record(AccessKind::Load, 16, 2),
        record(AccessKind::Fence, 0, 0),
        record(AccessKind::Read, 17, 3),
        record(AccessKind::Write, 16, 3),
        record(AccessKind::Write, 18, 6),
        record(AccessKind::Load, 16 + PAGE, 8),
    ];
    assert_eq!(trace.log(), log);
    assert_eq!((trace.count(), trace.missed()), (8, 0));
    let view = pin.mediated().unwrap();
    view.fence();
    view.fence();
    assert_eq!(trace.missed(), 1);
    trace.clear();
    assert_eq!((trace.count(), trace.missed()), (0, 0));
    drop(pin);
    assert!(memory(&[]).pin().mediated().is_none());
}

/// Lines of the process's memory map that name the address.
fn mappings_of(ptr: *const u8) -> usize {
    let holds = |line: &str| {
        let (low, high) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
        let number = |hex| usize::from_str_radix(hex, 16).unwrap();
        (number(low)..number(high)).contains(&ptr.addr())
    };
    std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter(|line| holds(line))
        .count()
}

#[test]
fn a_mapping_lives_as_long_as_its_last_holder() {
    // Large, so that nothing else is mapped there soon after.
    let size = 1 << 32;
    for backing in [
        Backing::Memfd,
        Backing::Received {
            fd: file(size + PAGE),
            offset: 8,
            writable: true,
        },
    ] {
        let mem = GuestMemory::new(vec![RegionSpec { gpa: 0, size, backing }], None).unwrap();
        let live = mem.live(16, 32, Want::Write).unwrap();
        mem.write(16, &[99]).unwrap();
        mem.remove(0, size).unwrap();
        assert_eq!(mappings_of(live.ptr()), 1);
        // SAFETY: `live` keeps the mapping.
        assert_eq!(unsafe { live.ptr().read() }, 99);
        let ptr = live.ptr();
        drop(live);
        assert_eq!(mappings_of(ptr), 0);
    }
    let mem = memory(&[(0, PAGE), (PAGE, PAGE)]);
    assert_eq!(
        mem.live(PAGE - 1, 2, Want::Read).unwrap_err(),
        MemoryError::Unmapped { gpa: PAGE }
    );
    assert_eq!(
        mem.live(2 * PAGE, 0, Want::Read).unwrap_err(),
        MemoryError::Unmapped { gpa: 2 * PAGE }
    );
}

#[test]
fn a_change_waits_for_pins() {
    let mem = memory(&[(0, PAGE)]);
    let removed = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let pin = mem.pin();
        scope.spawn(|| {
            mem.remove(0, PAGE).unwrap();
            removed.store(true, Ordering::SeqCst);
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!removed.load(Ordering::SeqCst));
        assert_eq!(pin.mapped().load_u16(At::unresolved(0), 0), Ok(0));
    });
    assert_eq!((removed.load(Ordering::SeqCst), mem.epoch()), (true, 1));
}

#[test]
fn regions_are_shared_between_both_ends_of_a_file() {
    let mem = GuestMemory::new(
        vec![RegionSpec {
            gpa: 0,
            size: PAGE,
            backing: Backing::Memfd,
        }],
        None,
    )
    .unwrap();
    let region = mem.regions().remove(0);
    let fd = region.fd().unwrap().try_clone().unwrap();
    let peer = GuestMemory::new(vec![received(0x4000, PAGE, fd, 0, true)], None).unwrap();
    peer.write(0x4000, b"seen").unwrap();
    assert_eq!(bytes(&mem, 0, 4), b"seen");
    assert!(region.own() && !peer.regions().remove(0).own());
}

#[test]
fn groups_of_words_end_with_their_memory() {
    let mut room = [0_u64; 8];
    let base: *mut u8 = room.as_mut_ptr().cast();
    for len in 0..40_u64 {
        // SAFETY: fewer bytes than `room` has, which lives longer and is aligned to 8.
        let words = unsafe { Words::<16>::new(base, len) };
        for index in 0..4_u32 {
            let inside = 16 * (u64::from(index) + 1) <= len;
            assert_eq!(words.split(index).is_some(), inside, "{index} of {len}");
            assert_eq!(words.packed(index as u16).is_some(), inside, "{index} of {len}");
        }
        // SAFETY: as above.
        let heads = unsafe { Words::<2>::new(base, len) };
        assert_eq!(heads.head(3).is_some(), 4 + 2 * 4 <= len, "{len}");
    }
    assert!(Words::<16>::none().split(0).is_none());
}

/// Whoever is told that something was not stored stores it by the seam, so it must be so in both cases.
#[test]
fn groups_of_stores_end_with_their_memory() {
    let mut room = [0_u64; 8];
    let base: *mut u8 = room.as_mut_ptr().cast();
    for len in 0..40_u64 {
        // SAFETY: fewer bytes than `room` has, which lives longer and is aligned to 8.
        let descs = unsafe { DescStores::new(base, len) };
        for index in 0..4_u16 {
            let inside = 16 * (u64::from(index) + 1) <= len;
            assert_eq!(descs.split(index, (1, 2)), inside, "{index} of {len}");
            assert_eq!(descs.packed(index, (1, 2, 3)), inside, "{index} of {len}");
            assert_eq!(descs.flags(index, 4), inside, "{index} of {len}");
            assert_eq!(descs.packed_used(index, (5, 6)), inside, "{index} of {len}");
        }
        // SAFETY: as above.
        let useds = unsafe { UsedStores::new(base, len) };
        assert_eq!(useds.used(2, (7, 8)), 4 + 8 * 3 <= len, "{len}");
        // SAFETY: as above.
        let heads = unsafe { HeadStores::new(base, len) };
        assert_eq!(heads.head(3, 1), 4 + 2 * 4 <= len, "{len}");
    }
}

#[test]
fn memory_of_others_is_copied_to_and_from() {
    let mem = memory(&[(0, PAGE)]);
    let (from, mut to) = ([1_u8, 2, 3], [0_u8; 3]);
    // SAFETY: it has three bytes, here and below.
    unsafe { mem.write_raw(PAGE - 3, from.as_ptr(), 3) }.unwrap();
    // SAFETY: as above.
    unsafe { mem.read_raw(PAGE - 3, to.as_mut_ptr(), 3) }.unwrap();
    // SAFETY: as above.
    let beyond = unsafe { mem.read_raw(PAGE - 2, to.as_mut_ptr(), 3) };
    assert_eq!(beyond, Err(MemoryError::Unmapped { gpa: PAGE }));
    assert_eq!(from, to);
}
