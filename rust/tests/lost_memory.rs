//! Direct accesses to memory whose file is cut short, one by one and in races.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::os::fd::OwnedFd;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use common::files::{file, lost, received};
use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use rustix::io::pwrite;
use virtio_test::mem::{Access, At, Backing, GuestMemory, MemoryError, RegionSpec, Trace, Want};

const PAGE: u64 = 4096;

/// A file of four pages at address 0, one of one page behind it, and own memory behind that.
fn three(trace: Option<std::sync::Arc<Trace>>) -> (OwnedFd, GuestMemory) {
    let (fd, whole) = (file(4 * PAGE), file(PAGE));
    let own = RegionSpec {
        gpa: 5 * PAGE,
        size: PAGE,
        backing: Backing::Memfd,
    };
    let regions = vec![received(0, 4 * PAGE, &fd), received(4 * PAGE, PAGE, &whole), own];
    let mem = GuestMemory::new(regions, trace).unwrap();
    mem.fill(0, 6 * PAGE, 7).unwrap();
    (fd, mem)
}

fn losses(mem: &GuestMemory) -> Vec<bool> {
    mem.regions().iter().map(|region| region.lost()).collect()
}

#[test]
fn each_kind_of_access_says_that_the_memory_is_lost() {
    type Touch = fn(&GuestMemory) -> Result<(), MemoryError>;
    let touches: [(Touch, u64); 7] = [
        (|mem| mem.read(2 * PAGE, &mut [0; 16]), 2 * PAGE),
        (|mem| mem.read(PAGE - 1, &mut [0; 2]), PAGE - 1),
        (|mem| mem.write(3 * PAGE, &[1]), 3 * PAGE),
        (|mem| mem.fill(PAGE, 4 * PAGE, 1), PAGE),
        (|mem| mem.copy(2 * PAGE, 5 * PAGE, 64), 2 * PAGE),
        (|mem| mem.copy(5 * PAGE, 2 * PAGE, 64), 2 * PAGE),
        (|mem| mem.read(0, &mut vec![0; 6 * 4096]), 0),
    ];
    for (touch, gpa) in touches {
        let (fd, mem) = three(None);
        ftruncate(&fd, PAGE).unwrap();
        assert_eq!(losses(&mem), [false; 3], "nobody has noticed");
        assert_eq!(touch(&mem), lost(gpa));
        assert_eq!(losses(&mem), [true, false, false]);
        // The whole region from then on, and only that.
        assert_eq!(mem.read(0, &mut [0]), lost(0));
        let mut one = [0];
        mem.read(4 * PAGE, &mut one).unwrap();
        mem.write(5 * PAGE, &[9]).unwrap();
        mem.remove(0, 4 * PAGE).unwrap();
        assert_eq!(losses(&mem), [false; 2]);
        mem.add(received(0, PAGE, &file(PAGE))).unwrap();
        mem.read(0, &mut one).unwrap();
        assert_eq!(one, [0]);
    }
}

#[test]
fn ring_words_are_zeros_then_and_intact_says_so() {
    let (fd, mem) = three(None);
    let pin = mem.pin();
    let view = pin.mapped();
    let at = view.resolve(0, 4 * PAGE, Want::Write).unwrap();
    assert_eq!(view.load_u64(at, PAGE).unwrap(), 0x0707_0707_0707_0707);
    assert_eq!(view.intact(0, u64::MAX), Ok(()));
    ftruncate(&fd, PAGE).unwrap();
    view.store_u16(at, 3 * PAGE, 5).unwrap();
    assert_eq!(view.load_u16_acquire(at, 3 * PAGE).unwrap(), 5, "in a page of our own");
    assert_eq!(view.load_u64(at, PAGE).unwrap(), 0);
    assert_eq!(view.load_u16(at, 0).unwrap(), 0x0707, "still the file's");
    assert_eq!(view.intact(PAGE, 8), lost(PAGE));
    assert_eq!(view.intact(4 * PAGE, PAGE), Ok(()));
    assert_eq!(view.intact(4 * PAGE, 0), Ok(()));
}

#[test]
fn a_traced_memory_and_a_read_only_one_are_no_exception() {
    let (fd, mem) = three(Some(std::sync::Arc::new(Trace::new())));
    ftruncate(&fd, 0).unwrap();
    let pin = mem.pin();
    let view = pin.mediated().unwrap();
    assert_eq!(view.read(At::unresolved(8), 0, &mut [0; 8]), lost(8));
    assert_eq!(view.write(At::unresolved(8), 0, &[0; 8]), lost(8));
    assert_eq!(view.fill(At::unresolved(8), 0, 8, 0), lost(8));
    drop(pin);
    let fd = file(2 * PAGE);
    let backing = Backing::Received {
        fd: fd.try_clone().unwrap(),
        offset: PAGE + 8,
        writable: false,
    };
    let rom = RegionSpec {
        gpa: 64,
        size: 128,
        backing,
    };
    let mem = GuestMemory::new(vec![rom], None).unwrap();
    ftruncate(&fd, 3).unwrap();
    assert_eq!(mem.read(64, &mut [0; 128]), lost(64));
    assert_eq!(mem.write(64, &[0]), Err(MemoryError::ReadOnly { gpa: 64 }));
}

#[test]
fn a_sealed_file_cannot_be_cut_and_is_not_lost() {
    let fd = file(PAGE);
    fcntl_add_seals(&fd, SealFlags::SHRINK).unwrap();
    let mem = GuestMemory::new(vec![received(0, PAGE, &fd)], None).unwrap();
    assert!(ftruncate(&fd, 0).is_err());
    mem.fill(0, PAGE, 1).unwrap();
    assert_eq!(losses(&mem), [false]);
}

/// Threads read and write while files are cut under them and the table is exchanged. What a read says is good
/// is the file's own: no zero ever passes for a byte of it. Memory that is mapped meanwhile stays what it is.
#[test]
fn races_with_truncation_never_show_a_zero() {
    const ROUNDS: usize = 4000;
    const SIZE: u64 = 4 * PAGE;
    let mem = GuestMemory::new(Vec::new(), None).unwrap();
    let (stop, good, bad) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let barrier = Barrier::new(4);
    thread::scope(|scope| {
        for thread in 0..3u64 {
            let (mem, stop, good, bad, barrier) = (&mem, &stop, &good, &bad, &barrier);
            scope.spawn(move || {
                barrier.wait();
                let mut bytes = vec![0; 4096 * 2];
                for round in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    thread::yield_now();
                    let gpa = PAGE * ((round + thread) % 3);
                    let outcome = if thread == 2 {
                        mem.write(gpa, &[0xaa; 4096 * 2])
                    } else {
                        let read = mem.read(gpa, &mut bytes);
                        assert!(read.is_err() || bytes.iter().all(|&byte| byte == 0xaa), "a zero");
                        read
                    };
                    match outcome {
                        Ok(()) => good.fetch_add(1, Ordering::Relaxed),
                        Err(MemoryError::Lost { .. }) => bad.fetch_add(1, Ordering::Relaxed),
                        Err(MemoryError::Unmapped { .. }) => 0,
                        Err(error) => panic!("{error}"),
                    };
                }
            });
        }
        barrier.wait();
        let full = vec![0xaa; 4096 * 4];
        for round in 0..ROUNDS {
            let fd = file(SIZE);
            assert_eq!(pwrite(&fd, &full, 0).unwrap(), full.len());
            mem.replace(vec![received(0, SIZE, &fd)]).unwrap();
            if round % 4 != 0 {
                thread::yield_now();
            }
            ftruncate(&fd, PAGE * (round as u64 % 4)).unwrap();
            if round % 3 == 0 {
                thread::yield_now();
            }
            // It may get the addresses of what has just gone, while handlers return from there.
            mem.replace(Vec::new()).unwrap();
            let own = RegionSpec {
                gpa: 0,
                size: SIZE,
                backing: Backing::Anonymous,
            };
            let fresh = GuestMemory::new(vec![own], None).unwrap();
            fresh.fill(0, SIZE, 0x55).unwrap();
            let mut bytes = vec![0; 4096 * 4];
            fresh.read(0, &mut bytes).unwrap();
            assert!(
                bytes.iter().all(|&byte| byte == 0x55),
                "zeros over memory of somebody else"
            );
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(
        good.load(Ordering::Relaxed) > 0 && bad.load(Ordering::Relaxed) > 0,
        "both happened"
    );
}
