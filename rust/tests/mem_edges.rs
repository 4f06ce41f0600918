//! Edges of memory, found by breaking it in every small way (`make mutants-rust`): where words that belong together end, and
//! what the kernel may be given at once.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::far::Far;
use common::files::{file, lost, received};
use common::{BIG, DATA, HOLE, NEXT_DOOR, ROM, memory, region};
use rustix::fs::ftruncate;
use rustix::io::{Errno, pwrite};
use virtio_test::chain::Segment;
use virtio_test::iov::Iov;
use virtio_test::mem::{
    Access, AliasSpec, Area, At, Backing, Elsewhere, GuestMemory, Log, MAX_TRANSLATIONS, MemoryError, RegionError,
    RegionSpec, Trace, Vector, Want,
};

const PAGE: u64 = 0x1000;

/// Words that belong together, as they are loaded and stored: their offsets.
type Group<A> = (
    &'static [u64],
    fn(&A, At, u64) -> Result<Vec<u64>, MemoryError>,
    Store<A>,
);
type Store<A> = fn(&A, At, u64, &[u64]) -> Result<(), MemoryError>;

fn groups<A: Access>() -> [Group<A>; 4] {
    [
        (
            &[0, 8],
            |mem, at, off| mem.load_desc(at, off).map(|(a, b)| vec![a, b]),
            |mem, at, off, w| mem.store_desc(at, off, (w[0], w[1])),
        ),
        (
            &[0, 8, 12],
            |mem, at, off| {
                mem.load_packed_desc(at, off)
                    .map(|(a, b, c)| vec![a, b.into(), c.into()])
            },
            |mem, at, off, w| mem.store_packed_desc(at, off, (w[0], w[1] as u32, w[2] as u16)),
        ),
        (
            &[0, 4],
            |mem, at, off| mem.load_used(at, off).map(|(a, b)| vec![a.into(), b.into()]),
            |mem, at, off, w| mem.store_used(at, off, (w[0] as u32, w[1] as u32)),
        ),
        (
            &[0, 4],
            |mem, at, off| mem.load_packed_used(at, off).map(|(a, b)| vec![a.into(), b.into()]),
            |mem, at, off, w| mem.store_packed_used(at, off, (w[0] as u32, w[1] as u16)),
        ),
    ]
}

/// Through any address and over any border they are the words that lie there; where one of them does not, that is said, and
/// none behind it is stored.
fn group_by_group<A: Access>(mem: &A) {
    let values = [0x1102, 0x2203, 0x3304];
    for (number, (offsets, load, store)) in groups::<A>().into_iter().enumerate() {
        let align = offsets[1];
        for (gpa, inside) in [
            (DATA + 16, offsets.len()),
            (NEXT_DOOR - align, offsets.len()),
            (HOLE - align, 1),
            (HOLE, 0),
        ] {
            for at in [At::unresolved(gpa), At::unresolved(gpa - 0x40)] {
                let off = gpa - at.gpa;
                let beyond = Err(MemoryError::Unmapped { gpa: HOLE });
                let clear = mem.fill(At::unresolved(HOLE - align), 0, align, 0);
                clear.unwrap();
                let stored = store(mem, at, off, &values);
                let loaded = load(mem, at, off);
                if inside == offsets.len() {
                    assert_eq!(
                        (stored, loaded),
                        (Ok(()), Ok(values[..inside].to_vec())),
                        "{number} {gpa:#x}"
                    );
                } else {
                    assert_eq!((stored, loaded.map(drop)), (beyond, beyond), "{number} {gpa:#x}");
                    let first = mem.load_u16(At::unresolved(HOLE - align), 0).unwrap();
                    assert_eq!(u64::from(first), if inside == 1 { values[0] } else { 0 });
                }
            }
        }
        // One of them begins where memory does: what comes first is missed, and nothing is stored.
        let at = At::unresolved(BIG - align);
        mem.fill(At::unresolved(BIG), 0, 16, 0).unwrap();
        let refused = Err(MemoryError::Unmapped { gpa: BIG - align });
        assert_eq!(store(mem, at, 0, &values), refused, "{number}");
        assert_eq!(load(mem, at, 0).map(drop), refused, "{number}");
        assert_eq!(mem.load_u64(At::unresolved(BIG), 0), Ok(0), "{number}");
        // For reading only.
        let rom = mem.resolve(ROM, 16, Want::Read).unwrap();
        assert_eq!(
            store(mem, rom, 0, &values),
            Err(MemoryError::ReadOnly { gpa: ROM }),
            "{number}"
        );
        assert_eq!(load(mem, rom, 0), Ok(vec![0; offsets.len()]), "{number}");
    }
}

#[test]
fn words_that_belong_together_end_where_memory_does() {
    let mem = memory();
    group_by_group(&mem.pin().mapped());
    group_by_group(&mem.pin().whole());
}

/// An area gives its words directly as soon as it is aligned for the largest of them, and all that it has.
#[test]
fn an_area_shows_its_words_where_they_are_aligned() {
    let mem = memory();
    for (gpa, value) in [(DATA, 7_u8), (DATA + 2, 8), (DATA + 8, 9)] {
        mem.write(gpa, &[value]).unwrap();
    }
    let pin = mem.pin();
    let mem = pin.mapped();
    for (skip, len, heads, descs) in [
        (0, 64, true, true),
        (8, 64, true, true),
        (2, 64, true, false),
        (4, 64, true, false),
        (1, 64, false, false),
        (0, 16, true, true),
        (0, 15, true, false),
        (0, 4, true, false),
        (0, 3, false, false),
        (0, 1, false, false),
    ] {
        let at = mem.resolve(DATA + skip, len, Want::Read).unwrap();
        assert_eq!(mem.heads(Area::of(at)).idx().is_some(), heads, "{skip} {len}");
        assert_eq!(mem.descs(Area::of(at)).split(0).is_some(), descs, "{skip} {len}");
    }
}

// ------------------------------------------------------------------------------------------- for the kernel

#[test]
fn the_kernel_is_given_64_parts_and_many_small_ones_not_at_all() {
    let mem = memory();
    let pin = mem.pin();
    let mem = pin.mapped();
    let at = mem.resolve(BIG, 1 << 20, Want::Write).unwrap();
    // (parts, bytes of each, of the last one; worth a call)
    for (parts, len, last, worth) in [
        (0, 0, 0, false),
        (1, 1, 1, true),
        (1, 0, 0, false),
        (63, 4, 4, true),
        (64, 4, 4, false),
        (64, 256, 256, true),
        (64, 256, 255, false),
        (64, 1024, 1024, true),
    ] {
        let mut vector = Vector::new(&mem, Want::Write);
        for number in 0..parts {
            assert!(vector.push(at, 4096 * number, if number == parts - 1 { last } else { len }));
        }
        assert_eq!(vector.is_worth_it(), worth, "{parts} {len} {last}");
        assert_eq!(vector.push(at, 0, 4), parts < 64, "no more than 64");
    }
    let fd = file(PAGE);
    pwrite(&fd, b"bytes of a file", 0).unwrap();
    let mut vector = Vector::new(&mem, Want::Write);
    assert!(vector.push(at, 0, 5) && vector.push(at, 100, 3));
    assert!(!vector.push(at, (1 << 20) - 4, 5), "not beyond what was resolved");
    assert_eq!(vector.read_from(fd.as_fd(), 0), Ok(8));
    assert_eq!(vector.read_from(fd.as_fd(), PAGE), Ok(0));
    assert_eq!(vector.read_from(fd.as_fd(), 1 << 63), Err(Errno::INVAL));
    assert_eq!(vector.write_to(fd.as_fd(), 9), Ok(8));
    assert_eq!(vector.write_to(fd.as_fd(), 1 << 63), Err(Errno::INVAL));
    let mut bytes = [0; 8];
    mem.read(at, 0, &mut bytes[..5]).unwrap();
    mem.read(at, 100, &mut bytes[5..]).unwrap();
    assert_eq!(&bytes, b"bytes of");
    // What may only be read is filled with nothing.
    let mut vector = Vector::new(&mem, Want::Read);
    assert!(vector.push(at, 0, 5));
    assert_eq!(vector.read_from(fd.as_fd(), 0), Err(Errno::FAULT));
    let rom = mem.resolve(ROM, 16, Want::Read).unwrap();
    assert!(!Vector::new(&mem, Want::Write).push(rom, 0, 16));
}

// ------------------------------------------------------------------------------------------- what is refused

#[test]
fn live_bytes_are_those_of_one_region() {
    let mem = memory();
    let end = HOLE;
    assert_eq!(mem.live(NEXT_DOOR, PAGE, Want::Write).unwrap().len(), 0x1000);
    assert_eq!(mem.live(end - 8, 8, Want::Write).unwrap().len(), 8);
    assert_eq!(
        mem.live(end - 8, 9, Want::Read).map(drop),
        Err(MemoryError::Unmapped { gpa: end })
    );
    assert!(!mem.live(ROM, 8, Want::Read).unwrap().is_empty());
    assert!(mem.live(ROM, 0, Want::Read).unwrap().is_empty());
    assert_eq!(
        mem.live(ROM, 8, Want::Write).map(drop),
        Err(MemoryError::ReadOnly { gpa: ROM })
    );
    assert!(!mem.pin().table().has_remote());
    mem.add(Far::new(BIG + (1 << 30), 64).spec(true)).unwrap();
    assert!(mem.pin().table().has_remote());
}

#[test]
fn too_much_is_refused_in_the_words_of_the_operating_system() {
    let backing = || RegionSpec {
        gpa: 0,
        size: 1 << 63,
        backing: Backing::Memfd,
    };
    let refused = GuestMemory::new(vec![backing()], None).map(drop);
    assert!(
        matches!(
            refused,
            Err(RegionError::System {
                what: "size a memfd",
                ..
            })
        ),
        "{refused:?}"
    );
}

#[test]
fn a_memory_of_translations_holds_4096_of_them() {
    let real = GuestMemory::new(vec![region(0, PAGE)], None).unwrap();
    let shown = GuestMemory::new(vec![], None).unwrap();
    let one = |at: u64| AliasSpec {
        gpa: 16 * at,
        size: 8,
        region: Arc::clone(&real.regions()[0]),
        skip: 8,
        access: (true, true),
    };
    let limit = MAX_TRANSLATIONS as u64;
    shown.translate(vec![], (0..limit).map(one).collect()).unwrap();
    let more = shown.translate(vec![], vec![one(limit)]);
    assert!(matches!(more, Err(RegionError::TooMany { .. })), "{more:?}");
}

// ------------------------------------------------------------------------------------------- copies and logs

/// Copies within memory that others carry: each transfer of them may fail, and is then said to have.
#[test]
fn a_copy_between_regions_of_any_kind_fails_where_a_transfer_does() {
    let (near, one, other) = (0, PAGE, 2 * PAGE);
    for (dst, src) in [
        (near, one),
        (one, near),
        (one, other),
        (other, one),
        (one, one + 8),
        (one + 8, one),
    ] {
        for number in 0.. {
            let (first, second) = (Far::new(one, 4096), Far::new(other, 4096));
            let mem = GuestMemory::new(vec![region(near, PAGE), first.spec(true), second.spec(true)], None).unwrap();
            for (gpa, value) in [(near, 1), (one, 2), (other, 3)] {
                mem.fill(gpa, PAGE, value).unwrap();
            }
            for far in [&first, &second] {
                far.fails.store(far.count() + number, Ordering::Relaxed);
            }
            let counts = || first.count() + second.count();
            let (begun, failing) = (counts(), [first.count() + number, second.count() + number]);
            let copied = mem.copy(dst, src, 64);
            let failed = first.count() > failing[0] || second.count() > failing[1];
            assert_eq!(copied.is_err(), failed, "{src} to {dst}, transfer {number}");
            if !failed {
                assert!(counts() > begun && number > 0);
                break;
            }
        }
    }
}

#[test]
fn a_log_that_is_lost_is_said_to_be() {
    let mem = GuestMemory::new(vec![region(0, 128 * PAGE)], None).unwrap();
    let fd = file(PAGE);
    mem.set_log(Some(Log::new(fd.as_fd(), 0, 16, vec![]).unwrap())).unwrap();
    let seen = Log::new(fd.as_fd(), 0, 16, vec![]).unwrap();
    mem.write(5 * PAGE, &[1]).unwrap();
    assert!(!seen.lost());
    assert_eq!(seen.take(), [5]);
    ftruncate(&fd, 0).unwrap();
    assert_eq!(mem.write(6 * PAGE, &[1]), lost(6 * PAGE));
    assert_eq!(mem.read(7 * PAGE, &mut [0]), lost(7 * PAGE));
    assert!(mem.pin().table().log().unwrap().lost());
    assert!(!seen.lost(), "nobody has noticed there");
}

#[test]
fn a_stretch_of_no_bytes_is_logged_nowhere_else() {
    let mem = GuestMemory::new(vec![region(0, 128 * PAGE)], None).unwrap();
    let (log, fd) = Log::fresh(16).unwrap();
    let nothing = Elsewhere {
        gpa: 4 * PAGE,
        size: 0,
        logged: 100 * PAGE,
    };
    mem.set_log(Some(Log::new(fd.as_fd(), 0, 16, vec![nothing]).unwrap()))
        .unwrap();
    mem.fill(3 * PAGE, 3 * PAGE, 1).unwrap();
    assert_eq!(log.take(), [3, 4, 5]);
    mem.write(4 * PAGE, &[1]).unwrap();
    assert_eq!(log.take(), [4]);
}

/// Of several buffers, as of one: a copy that touched lost memory brought nothing.
#[test]
fn a_copy_of_several_buffers_is_lost_with_one_of_them() {
    for writable in [false, true] {
        for gone in 0..3 {
            let files = [file(PAGE), file(PAGE), file(PAGE)];
            let regions = (0..).zip(&files).map(|(at, fd)| received(0x10000 * at, PAGE, fd));
            let memory = GuestMemory::new(regions.collect(), None).unwrap();
            let pin = memory.pin();
            let mem = pin.mapped();
            let segment = |at: u64| Segment {
                at: mem.resolve(0x10000 * at, 8, Want::Write).unwrap(),
                len: 8,
                writable,
            };
            let segments: Vec<_> = (0..3).map(segment).collect();
            let iov = Iov::new(&segments, mem.epoch());
            ftruncate(&files[gone as usize], 0).unwrap();
            // (from byte, bytes): all of it, and what begins in the middle of a buffer.
            for (offset, len) in [(0, 24), (0, 8), (4, 4), (12, 8), (20, 4)] {
                let touched = (8 * gone..8 * gone + 8).any(|at| (offset..offset + len).contains(&at));
                let mut bytes = vec![0; usize::try_from(len).unwrap()];
                let mut done = Vec::new();
                if writable {
                    done.push(iov.write(&mem, offset, &bytes));
                    done.push(iov.fill(&mem, offset, bytes.len(), 0));
                } else {
                    done.push(iov.read(&mem, offset, &mut bytes));
                }
                for what in done {
                    let good = what == Ok(bytes.len());
                    let gone_with_it = matches!(what, Err(MemoryError::Lost { .. }));
                    assert_eq!((good, gone_with_it), (!touched, touched), "{gone}: {len} at {offset}");
                }
            }
        }
    }
}

/// A process that is killed before its access `number` has done all before it, and nothing from there on.
#[test]
fn a_run_that_ends_writes_up_to_its_end() {
    for end in 0..3 {
        let trace = Arc::new(Trace::new());
        let mem = GuestMemory::new(vec![region(0, PAGE)], Some(Arc::clone(&trace))).unwrap();
        trace.end_at(end);
        let pin = mem.pin();
        let view = pin.mediated().unwrap();
        for at in 0..3 {
            view.store_u16(At::unresolved(2 * at), 0, 1).unwrap();
        }
        drop(pin);
        let mut bytes = [0; 6];
        mem.read(0, &mut bytes).unwrap();
        let written = bytes.iter().map(|&byte| u64::from(byte)).sum::<u64>();
        assert_eq!(written, end);
    }
}

/// From one place to another, as far as both are given directly: for reading, for writing, whole, and as they are now.
#[test]
fn bytes_are_passed_on_where_both_places_are_given_directly() {
    let memory = memory();
    let bytes: Vec<u8> = (0..=255).collect();
    let (from, to) = (DATA, BIG);
    let reset = || {
        memory.write(from, &bytes).unwrap();
        memory.fill(to, 0x200, 0xee).unwrap();
    };
    let pin = memory.pin();
    let mem = pin.mapped();
    let read = mem.resolve(from, 256, Want::Read).unwrap();
    let write = mem.resolve(to, 256, Want::Write).unwrap();
    let rom = mem.resolve(ROM, 256, Want::Read).unwrap();
    let only_read = mem.resolve(to, 256, Want::Read).unwrap();
    let [short_read, short_write] =
        [(from, Want::Read), (to, Want::Write)].map(|(gpa, want)| mem.resolve(gpa, 16, want).unwrap());
    let apart = GuestMemory::new(vec![region(DATA, PAGE), region(BIG, PAGE)], None).unwrap();
    let others = apart.pin();
    let [old_from, old_to] = [from, to].map(|gpa| others.mapped().resolve(gpa, 256, Want::Write).unwrap());
    for (src, dst, len, passes) in [
        (read, write, 256, true),
        (read, write, 12, true),
        (read, write, 4, true),
        (read, write, 3, false),
        (read, write, 0, false),
        (read, write, 257, false),
        (short_read, write, 17, false),
        (short_read, write, 16, true),
        (read, short_write, 17, false),
        (read, short_write, 16, true),
        (read, write, u64::MAX, false),
        (rom, write, 100, true),
        (read, rom, 8, false),
        (only_read, write, 8, true),
        (At::unresolved(from), write, 8, false),
        (read, At::unresolved(to), 8, false),
        (old_from, write, 8, false),
        (read, old_to, 8, false),
    ] {
        for head in [Some([7, 8, 9, 10]), None] {
            reset();
            let mut expected = bytes_at(&memory, to, 0x200);
            let source = bytes_at(&memory, src.gpa, 256);
            let makes = |found: &[u8; 4]| {
                assert_eq!(*found, source[..4]);
                head
            };
            let passed = mem.relay(src, dst, len, makes);
            assert_eq!(passed, passes && head.is_some(), "{src:?} {dst:?} {len}");
            if let (true, Some(head)) = (passes, head) {
                let len = len as usize;
                expected[4..len].copy_from_slice(&source[4..len]);
                expected[..4].copy_from_slice(&head);
            }
            assert_eq!(bytes_at(&memory, to, 0x200), expected);
            // What somebody may have to be told of is passed by nobody.
            assert!(!pin.whole().relay(src, dst, len, |_: &[u8; 4]| Some([0; 4])));
            assert_eq!(bytes_at(&memory, to, 0x200), expected);
        }
    }
    // They may overlap: what was there is what arrives.
    reset();
    let later = mem.resolve(from + 2, 250, Want::Write).unwrap();
    assert!(mem.relay(read, later, 100, |_: &[u8; 4]| Some([0; 4])));
    assert_eq!(bytes_at(&memory, from + 6, 96), bytes[4..100]);
    assert_eq!(bytes_at(&memory, from, 6), [0, 1, 0, 0, 0, 0]);
}

fn bytes_at(memory: &GuestMemory, gpa: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    memory.read(gpa, &mut bytes).unwrap();
    bytes
}
