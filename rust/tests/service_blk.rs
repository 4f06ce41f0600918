//! The block service, request by request, beside its file: what it answers, what it writes, what it counts.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a test stops at what it did not expect"
)]

mod common;

use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use common::far::Far;
use common::files::{file, received};
use common::{BIG, DATA, World, memory};
use rustix::fs::{fstat, ftruncate};
use rustix::io::{Errno, pread, pwrite};
use virtio_test::error::Fault;
use virtio_test::mem::MemoryError;
use virtio_test::rule::Rule;
use virtio_test::service::{Bounds, File, FileCounters, Service, Terms, Traits, Turn, run, term};

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const FLUSH_OUT: u32 = 5;
const GET_ID: u32 = 8;
const GET_LIFETIME: u32 = 10;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const EVERYTHING: u32 = term::FLUSH | term::LEGACY | term::DISCARD | term::WRITE_ZEROES | term::LIFETIME;
const SECTORS: u64 = 64;
const SIZE: u64 = SECTORS * 512;
const TRAITS: Traits = Traits {
    serial: *b"virtio-test serial\0\0",
    lifetime: [1, 2, 3, 4, 5, 6],
    max_discard: (8, 2),
    max_write_zeroes: (16, 3),
};
const BOUNDS: Bounds = Bounds {
    chains: 64,
    bytes: 1 << 30,
};

// Where the parts of a request lie: header, data, room, status.
const HEAD: u64 = DATA;
const BODY: u64 = DATA + 0x1000;
const ROOM: u64 = DATA + 0x8000;
const STATUS: u64 = DATA + 0x40;
/// Remote memory, or a file that can be cut short.
const ODD: u64 = BIG + (1 << 30);

struct Rig {
    world: World,
    disk: File,
    fd: OwnedFd,
}

/// A disk of random-looking bytes, and what it holds.
fn image() -> (OwnedFd, Vec<u8>) {
    let byte = |at| u8::try_from((at * 7 + at / 512) % 255 + 1).unwrap();
    let (fd, bytes): (_, Vec<u8>) = (file(SIZE), (0..SIZE).map(byte).collect());
    pwrite(&fd, &bytes, 0).unwrap();
    (fd, bytes)
}

impl Rig {
    fn new(fd: OwnedFd) -> Self {
        let world = World::interop(64, 0);
        let disk = File::new(fd.try_clone().unwrap(), TRAITS);
        let rig = Self { world, disk, fd };
        rig.terms().capacity.store(SECTORS, Ordering::Relaxed);
        rig.agree(EVERYTHING);
        rig
    }

    fn terms(&self) -> &Arc<Terms> {
        self.disk.terms()
    }

    fn agree(&self, flags: u32) {
        self.terms().flags.store(flags, Ordering::Relaxed);
    }

    fn met(&self, which: impl Fn(&FileCounters) -> &AtomicU64) -> u64 {
        which(self.disk.counters()).load(Ordering::Relaxed)
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(SIZE).unwrap()];
        let count = pread(&self.fd, &mut bytes, 0).unwrap();
        bytes.truncate(count);
        bytes
    }

    /// Blocks that the file really has.
    fn blocks(&self) -> i64 {
        fstat(&self.fd).unwrap().st_blocks
    }

    fn put(&self, gpa: u64, kind: u32, sector: u64) {
        let header = [&kind.to_le_bytes()[..], &[0xee; 4], &sector.to_le_bytes()].concat();
        self.world.mem.write(gpa, &header).unwrap();
        self.world.mem.write(STATUS, &[0xee]).unwrap();
    }

    /// One turn, reached as the memory asks for.
    fn turn(&mut self, bounds: Bounds) -> Result<Turn, Fault> {
        let pin = self.world.mem.pin();
        let queues = &mut [&mut self.world.device];
        match pin.mediated() {
            Some(mem) => run(&mut self.disk, &mem, queues, bounds).turn,
            None => run(&mut self.disk, &pin.mapped(), queues, bounds).turn,
        }
    }

    /// A request of these buffers: used length and status.
    fn request(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Result<(u32, u8), Fault> {
        self.world.add(readable, writable);
        self.world.publish();
        self.turn(BOUNDS)?;
        let (_, used) = self.world.used().unwrap().unwrap();
        let mut status = [0];
        self.world.mem.read(STATUS, &mut status).unwrap();
        Ok((used, status[0]))
    }

    /// A request whose data lies at `BODY`, and whose `room` bytes lie at `ROOM`: the status; all that can be is written.
    fn ask(&mut self, kind: u32, sector: u64, data: &[u8], room: u32) -> u8 {
        self.put(HEAD, kind, sector);
        self.world.mem.write(BODY, data).unwrap();
        self.world.mem.fill(ROOM, 0x2000, 0xee).unwrap();
        let (mut readable, mut writable) = (vec![(HEAD, 16)], vec![(ROOM, room), (STATUS, 1)]);
        if !data.is_empty() {
            readable.push((BODY, u32::try_from(data.len()).unwrap()));
        }
        if room == 0 {
            writable.remove(0);
        }
        let (used, status) = self.request(&readable, &writable).unwrap();
        assert_eq!(used, room + 1);
        status
    }

    fn room(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.world.mem.read(ROOM, &mut bytes).unwrap();
        bytes
    }
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn segments(all: &[(u64, u32, u32)]) -> Vec<u8> {
    all.iter()
        .flat_map(|&(sector, sectors, flags)| segment(sector, sectors, flags))
        .collect()
}

#[test]
fn sectors_are_read_and_written_as_far_as_the_device_reaches() {
    let (fd, mut bytes) = image();
    let mut rig = Rig::new(fd);
    for (sector, count) in [(0, 1), (3, 4), (SECTORS - 1, 1), (SECTORS - 8, 8)] {
        let (at, len) = (usize::try_from(sector * 512).unwrap(), count * 512);
        assert_eq!(rig.ask(IN, sector, &[], u32::try_from(len).unwrap()), OK);
        assert_eq!(rig.room(len), bytes[at..at + len]);
        let data = vec![0x5a; len];
        assert_eq!(rig.ask(OUT, sector, &data, 0), OK);
        bytes[at..at + len].fill(0x5a);
        assert!(rig.content() == bytes);
    }
    assert_eq!((rig.met(|c| &c.read), rig.met(|c| &c.written)), (14 * 512, 14 * 512));
    assert_eq!((rig.met(|c| &c.ok), rig.met(|c| &c.ioerr)), (8, 0));
    // One sector too far, none that begins in it, no whole number of sectors, beyond all numbers.
    for (sector, len) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (0, 511),
        (0, 513),
        (1 << 55, 512),
        (u64::MAX >> 9, 512),
    ] {
        assert_eq!(rig.ask(IN, sector, &[], len), IOERR, "{sector} {len}");
        assert!(
            rig.room(len as usize).iter().all(|&byte| byte == 0),
            "what is not read is zeroed"
        );
        assert_eq!(rig.ask(OUT, sector, &vec![1; len as usize], 0), IOERR, "{sector} {len}");
    }
    rig.agree(EVERYTHING | term::READ_ONLY);
    assert_eq!(rig.ask(OUT, 0, &[1; 512], 0), IOERR);
    assert_eq!(rig.ask(IN, 0, &[], 512), OK);
    assert!(rig.content() == bytes);
    assert_eq!((rig.met(|c| &c.ioerr), rig.met(|c| &c.host_errors)), (13, 0));
}

#[test]
fn a_request_has_a_header_and_a_status_or_it_is_none() {
    let mut rig = Rig::new(image().0);
    rig.put(HEAD, IN, 0);
    assert_eq!(
        rig.request(&[(HEAD, 15)], &[(ROOM, 512), (STATUS, 1)]).unwrap(),
        (513, IOERR)
    );
    assert_eq!(
        rig.request(&[(HEAD, 16)], &[(ROOM, 512), (STATUS, 1)]).unwrap(),
        (513, OK)
    );
    rig.world.mem.write(STATUS, &[0xee]).unwrap();
    assert_eq!(rig.request(&[(HEAD, 16)], &[]).unwrap(), (0, 0xee));
    let met = (rig.met(|c| &c.no_status), rig.met(|c| &c.ok), rig.met(|c| &c.ioerr));
    assert_eq!(met, (1, 1, 1));
}

#[test]
fn what_was_not_agreed_upon_is_not_supported() {
    let whole = segment(0, 1, 0);
    for (kind, data, room, needs) in [
        (FLUSH, &[][..], 0, term::FLUSH),
        (FLUSH_OUT, &[], 0, term::LEGACY | term::FLUSH),
        (GET_LIFETIME, &[], 6, term::LIFETIME),
        (DISCARD, &whole, 0, term::DISCARD),
        (WRITE_ZEROES, &whole, 0, term::WRITE_ZEROES),
    ] {
        let mut rig = Rig::new(image().0);
        assert_eq!(rig.ask(kind, 0, data, room), OK, "{kind}");
        rig.agree(needs);
        assert_eq!(rig.ask(kind, 0, data, room), OK, "{kind}");
        for bit in (0..32).map(|bit| 1 << bit).filter(|bit| needs & bit != 0) {
            rig.agree(EVERYTHING & !bit);
            assert_eq!(rig.ask(kind, 0, data, room), UNSUPP, "{kind} without {bit:#x}");
        }
        assert_eq!(rig.ask(2, 0, &[], 0), UNSUPP);
        assert!(rig.met(|c| &c.unsupp) >= 2);
    }
}

#[test]
fn what_the_device_is_goes_into_room_of_just_its_size() {
    let mut rig = Rig::new(image().0);
    for (kind, expected) in [(GET_ID, &TRAITS.serial[..]), (GET_LIFETIME, &TRAITS.lifetime[..])] {
        let len = expected.len();
        assert_eq!(rig.ask(kind, 0, &[], u32::try_from(len).unwrap()), OK);
        assert_eq!(rig.room(len), expected);
        for other in [len - 1, len + 1] {
            assert_eq!(rig.ask(kind, 0, &[], u32::try_from(other).unwrap()), IOERR);
            assert_eq!(rig.room(other), vec![0; other]);
        }
    }
}

/// What of a list of segments is wrong, and what becomes of the file where nothing is.
#[test]
fn segments_are_judged_together_before_one_is_done() {
    let good = |sectors, count: usize| segments(&vec![(8, sectors, 0); count]);
    // (kind, most sectors, most segments)
    for (kind, sectors, most) in [(DISCARD, 8, 2), (WRITE_ZEROES, 16, 3)] {
        let (fd, bytes) = image();
        let mut rig = Rig::new(fd);
        for (data, status) in [
            (vec![], IOERR),
            (vec![0; 8], IOERR),
            ([segment(0, 1, 0), vec![0]].concat(), IOERR),
            (good(1, most + 1), IOERR),
            (good(sectors + 1, 1), IOERR),
            (segments(&[(0, 1, 0), (SECTORS, 1, 0)]), IOERR),
            (segments(&[(0, 1, 0), (SECTORS - 1, 2, 0)]), IOERR),
            (segments(&[(0, 1, 0), (0, 1, 2)]), UNSUPP),
            (
                segments(&[(0, 1, 0), (0, 1, UNMAP)]),
                if kind == DISCARD { UNSUPP } else { OK },
            ),
        ] {
            assert_eq!(rig.ask(kind, 0, &data, 0), status, "{kind} {data:?}");
            assert!(status == OK || rig.content() == bytes, "{kind} {data:?}");
        }
        let (fd, mut bytes) = image();
        let mut rig = Rig::new(fd);
        assert_eq!(rig.ask(kind, 0, &good(sectors, most), 0), OK);
        bytes[8 * 512..(8 + sectors as usize) * 512].fill(0);
        assert!(rig.content() == bytes, "{kind}");
        // The very last one.
        assert_eq!(rig.ask(kind, 0, &segment(SECTORS - 1, 1, 0), 0), OK);
        bytes[63 * 512..].fill(0);
        assert!(rig.content() == bytes, "{kind}");
        assert_eq!(rig.ask(kind, 0, &segment(0, 0, 0), 0), OK, "of no sectors");
        assert!(rig.content() == bytes, "{kind}");
    }
}

#[test]
fn only_who_may_unmap_makes_a_hole() {
    for (kind, flags, hole, stable) in [
        (DISCARD, 0, true, 0),
        (WRITE_ZEROES, 0, false, 1),
        (WRITE_ZEROES, UNMAP, true, 1),
    ] {
        let mut rig = Rig::new(image().0);
        rig.agree(EVERYTHING | term::WRITE_THROUGH);
        let before = rig.blocks();
        assert_eq!(rig.ask(kind, 0, &segment(8, 8, flags), 0), OK);
        assert_eq!(rig.blocks() < before, hole, "{kind} {flags}");
        assert_eq!(rig.met(|c| &c.flushes), stable, "{kind}");
        assert!(rig.content()[4096..8192].iter().all(|&byte| byte == 0));
    }
}

/// This one takes no zeros at a place of it either, so whoever writes them hears of it.
#[test]
fn where_there_are_no_holes_a_discard_does_nothing_and_zeros_are_written() {
    let comm = "/proc/thread-self/comm";
    let odd = std::fs::File::options().read(true).write(true).open(comm).unwrap();
    let mut rig = Rig::new(OwnedFd::from(odd));
    for round in 1..3 {
        assert_eq!(rig.ask(DISCARD, 0, &segment(0, 1, 0), 0), OK);
        assert_eq!(rig.ask(WRITE_ZEROES, 0, &segment(0, 1, UNMAP), 0), IOERR);
        let last = rig.disk.counters().last_errno.load(Ordering::Relaxed);
        assert_eq!(
            (rig.met(|c| &c.host_errors), last),
            (round, Errno::SPIPE.raw_os_error())
        );
    }
}

/// The file, what was agreed upon, kind, data, room, and what the operating system says.
type Case<'a> = (&'a dyn Fn() -> OwnedFd, u32, u32, &'a [u8], u32, Errno);

/// What the operating system refuses is an error of the request and of nothing else, and is noted.
#[test]
fn what_the_host_refuses_is_an_error_that_is_noted() {
    let read_only = || {
        let (fd, _) = image();
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        OwnedFd::from(std::fs::File::open(path).unwrap())
    };
    let short = || {
        let (fd, _) = image();
        ftruncate(&fd, 512).unwrap();
        fd
    };
    let pipe = || rustix::pipe::pipe().unwrap().1;
    let through = EVERYTHING | term::WRITE_THROUGH;
    let one = segment(0, 1, 0);
    let cases: [Case<'_>; 8] = [
        (&short, EVERYTHING, IN, &[], 1024, Errno::IO),
        (&read_only, EVERYTHING, OUT, &[1; 512], 0, Errno::BADF),
        (&read_only, EVERYTHING, DISCARD, &one, 0, Errno::BADF),
        (&read_only, EVERYTHING, WRITE_ZEROES, &one, 0, Errno::BADF),
        (&pipe, EVERYTHING, FLUSH, &[], 0, Errno::INVAL),
        (&pipe, through, OUT, &[], 0, Errno::INVAL),
        (&pipe, EVERYTHING, IN, &[], 512, Errno::SPIPE),
        (&pipe, EVERYTHING, OUT, &[1; 512], 0, Errno::SPIPE),
    ];
    for (number, (fd, flags, kind, data, room, errno)) in cases.into_iter().enumerate() {
        let mut rig = Rig::new(fd());
        rig.agree(flags);
        assert_eq!(rig.ask(kind, 0, data, room), IOERR, "case {number}");
        assert_eq!(
            rig.room(room as usize),
            vec![0; room as usize],
            "case {number}: nothing half done is shown"
        );
        let met = (rig.met(|c| &c.host_errors), rig.met(|c| &c.ioerr), rig.met(|c| &c.ok));
        assert_eq!(met, (1, 1, 0), "case {number}");
        let last = rig.disk.counters().last_errno.load(Ordering::Relaxed);
        assert_eq!(last, errno.raw_os_error(), "case {number}");
    }
}

#[test]
fn a_turn_says_whether_something_is_to_be_noted() {
    let mut rig = Rig::new(image().0);
    for (capacity, notable) in [(SECTORS, false), (SECTORS + 2, true), (SECTORS, false)] {
        rig.terms().capacity.store(capacity, Ordering::Relaxed);
        rig.put(HEAD, IN, capacity - 1);
        rig.world.add(&[(HEAD, 16)], &[(ROOM, 512), (STATUS, 1)]);
        rig.world.publish();
        let turn = rig.turn(BOUNDS).unwrap();
        assert_eq!((turn.done, turn.more, turn.notable), (1, false, notable));
        assert!(rig.world.used().unwrap().is_some());
    }
    assert_eq!(rig.disk.queues(), 1);
}

/// Work beside the buffers counts: a turn ends behind the request that reaches its bound.
#[test]
fn what_takes_long_counts_as_bytes() {
    let eight = segment(0, 8, 0);
    let none = segments(&[(0, 0, UNMAP), (0, 0, 0), (1, 0, UNMAP)]);
    for (kind, data, charge) in [
        (FLUSH, &[][..], 1 << 20),
        (DISCARD, &eight, 8 * 512),
        (WRITE_ZEROES, &eight, 8 * 512),
        (WRITE_ZEROES, &none, 3 * 512),
        (DISCARD, &none[16..32], 512),
        (IN, &[], 0),
    ] {
        let weight = 17 + data.len() as u64 + charge;
        for (bytes, done) in [
            (1, 1),
            (weight, 1),
            (weight + 1, 2),
            (2 * weight, 2),
            (2 * weight + 1, 3),
        ] {
            let mut rig = Rig::new(image().0);
            rig.put(HEAD, kind, 0);
            rig.world.mem.write(BODY, data).unwrap();
            for _ in 0..4 {
                let readable = [(HEAD, 16), (BODY, u32::try_from(data.len()).unwrap())];
                let readable = if data.is_empty() { &readable[..1] } else { &readable };
                rig.world.add(readable, &[(STATUS, 1)]);
            }
            rig.world.publish();
            let turn = rig.turn(Bounds { chains: 64, bytes }).unwrap();
            assert_eq!((turn.done, turn.more), (done, true), "{kind} {bytes}");
            assert_eq!(
                rig.turn(BOUNDS).unwrap().done,
                4 - done,
                "what is left is there for the next turn"
            );
        }
    }
}

/// Memory that is copied by others: everything goes the long way, and each transfer may fail.
#[test]
fn a_transfer_that_fails_is_an_error_and_the_status_says_so() {
    for (kind, readable, writable, used) in [
        (IN, vec![(HEAD, 16)], vec![(ODD, 1024), (STATUS, 1)], 1025),
        (OUT, vec![(HEAD, 16), (ODD, 1024)], vec![(STATUS, 1)], 1),
        (WRITE_ZEROES, vec![(HEAD, 16), (ODD, 16)], vec![(STATUS, 1)], 1),
        (GET_ID, vec![(HEAD, 16)], vec![(ODD, 20), (STATUS, 1)], 21),
        (FLUSH, vec![(HEAD, 16)], vec![(ODD, 100), (STATUS, 1)], 101),
    ] {
        let far = Far::new(ODD, 0x1000);
        let mut rig = Rig::new(image().0);
        rig.world.mem.add(far.spec(true)).unwrap();
        rig.world.mem.write(ODD, &segment(0, 4, 0)).unwrap();
        rig.put(HEAD, kind, 2);
        let begun = far.count();
        assert_eq!(rig.request(&readable, &writable).unwrap(), (used, OK), "{kind}");
        assert!(far.count() > begun, "{kind}");
        if kind == IN {
            let mut bytes = vec![0; 1024];
            rig.world.mem.read(ODD, &mut bytes).unwrap();
            assert!(bytes == image().1[1024..2048]);
        }
        let content = rig.content();
        far.fails.store(far.count(), Ordering::Relaxed);
        rig.put(HEAD, kind, 2);
        assert_eq!(rig.request(&readable, &writable).unwrap(), (0, IOERR), "{kind}");
        assert!(rig.content() == content, "{kind}");
        assert_eq!((rig.met(|c| &c.ok), rig.met(|c| &c.ioerr)), (1, 1), "{kind}");
    }
    // The status byte itself.
    let far = Far::new(ODD, 0x1000);
    let mut rig = Rig::new(image().0);
    rig.world.mem.add(far.spec(true)).unwrap();
    rig.put(HEAD, FLUSH, 0);
    far.fails.store(0, Ordering::Relaxed);
    rig.world.add(&[(HEAD, 16)], &[(ODD, 1)]);
    rig.world.publish();
    rig.turn(BOUNDS).unwrap();
    assert_eq!(rig.world.used().unwrap().unwrap().1, 0);
    assert_eq!((rig.met(|c| &c.ok), rig.met(|c| &c.ioerr)), (0, 1));
}

/// Where a driver's file was cut short the kernel copies as well, and nothing is made of that.
#[test]
fn what_was_lost_before_latches_the_queue() {
    for (kind, readable, writable) in [
        (IN, vec![(HEAD, 16)], vec![(ODD, 512), (STATUS, 1)]),
        (OUT, vec![(HEAD, 16), (ODD, 512)], vec![(STATUS, 1)]),
    ] {
        let cut = file(0x1000);
        let mut rig = Rig::new(image().0);
        rig.world.mem.add(received(ODD, 0x1000, &cut)).unwrap();
        ftruncate(&cut, 0).unwrap();
        assert_eq!(rig.world.mem.read(ODD, &mut [0]), Err(MemoryError::Lost { gpa: ODD }));
        rig.put(HEAD, kind, 0);
        let fault = rig.request(&readable, &writable).unwrap_err();
        assert_eq!(fault.rule, Rule::MemoryLost, "{kind}");
        assert!(rig.world.device.broken());
        assert_eq!(
            (rig.met(|c| &c.ok), rig.met(|c| &c.read), rig.met(|c| &c.written)),
            (0, 0, 0),
            "{kind}"
        );
    }
    assert!(memory().is_mapped(DATA, 1));
}
