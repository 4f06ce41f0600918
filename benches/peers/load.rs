//! A driver that does nothing but ask: random reads of 4 KiB, or random bytes, over a ring that somebody else set up.
//!
//! `load SOCKET MEMORY BYTES SIZE PACKED FEATURES KIND DEPTH SECTORS`: the ring of SIZE descriptors lies contiguous from 0x1000 on in
//! the file MEMORY of BYTES bytes; kicks go to fd 0, calls come on fd 1. Each line on SOCKET is a round: requests, microseconds to
//! look at the ring before waiting for a call, seed. Its answer is a line: nanoseconds, kicks, waits. Each sector of the disk
//! begins with its number, which is checked of each answer. The last line is what went wrong.

#![allow(
    clippy::print_stderr,
    reason = "a program, whose output is fd 1 and therefore something else"
)]

use std::error::Error;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use virtio_test::mem::{Access, Backing, GuestMemory, RegionSpec};
use virtio_test::notify::Notifier;
use virtio_test::policy::Policy;
use virtio_test::poller::Poller;
use virtio_test::queue::{DriverQueue, QueueConfig};
use virtio_test::ring::RingLayout;

type Trouble = Box<dyn Error>;

const RING: u64 = 0x1000;
/// Where slots begin; each has a header, its data and a status byte.
const SLOTS: u64 = 0x10_0000;
const SLOT: u64 = 0x2000;
const DATA: u64 = 0x1000;
const BLOCK: u32 = 4096;
const LONGEST_WAIT: Duration = Duration::from_secs(10);
const FOR_EVER: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Disk,
    Entropy,
}

/// What a round is to do.
struct Round {
    requests: u64,
    spin: Duration,
    seed: u64,
}

/// What it has done.
#[derive(Default)]
struct Done {
    kicks: u64,
    waits: u64,
}

struct Load {
    queue: DriverQueue,
    kick: Notifier,
    call: Notifier,
    poller: Poller,
    kind: Kind,
    blocks: u64,
    /// Slots that are free.
    free: Vec<u64>,
    /// Token, slot and block of what is in flight.
    busy: Vec<(u64, u64, u64)>,
}

fn number<T: std::str::FromStr>(word: Option<&str>) -> Result<T, Trouble> {
    word.and_then(|word| word.parse().ok())
        .ok_or_else(|| "an argument is no number".into())
}

/// The next of a sequence that only depends on its seed (xorshift64).
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

impl Load {
    fn ask<A: Access>(&mut self, mem: &A, seed: &mut u64) -> Result<(), Trouble> {
        let slot = self.free.pop().ok_or("no slot is free")?;
        let base = SLOTS + slot * SLOT;
        let block = if self.kind == Kind::Disk {
            next(seed) % self.blocks
        } else {
            0
        };
        let token = match self.kind {
            Kind::Disk => {
                let header = mem.resolve(base, 16, virtio_test::mem::Want::Write)?;
                mem.store_u64(header, 0, 0)?;
                mem.store_u64(header, 8, block * 8)?;
                let writable = [(base + DATA, BLOCK), (base + 16, 1)];
                self.queue.add(mem, &[(base, 16)], &writable, false)?
            }
            Kind::Entropy => self.queue.add(mem, &[], &[(base + DATA, 8)], false)?,
        };
        self.busy.push((token, slot, block));
        Ok(())
    }

    fn take<A: Access>(&mut self, mem: &A) -> Result<u64, Trouble> {
        let mut taken = 0;
        while let Some((token, written)) = self.queue.get_used(mem)? {
            let place = self.busy.iter().position(|(known, _, _)| *known == token);
            let (_, slot, block) = self.busy.swap_remove(place.ok_or("an answer that nobody waits for")?);
            let base = SLOTS + slot * SLOT;
            if self.kind == Kind::Disk {
                let at = mem.resolve(base, SLOT, virtio_test::mem::Want::Read)?;
                let (first, last) = (mem.load_u64(at, DATA)?, mem.load_u64(at, DATA + 7 * 512)?);
                let status = mem.load_u16(at, 16)? & 0xff;
                if (written, status, first, last) != (BLOCK + 1, 0, block * 8, block * 8 + 7) {
                    return Err(
                        format!("block {block}: {written} bytes, status {status}, sectors {first} to {last}").into(),
                    );
                }
            } else if written != 8 {
                return Err(format!("{written} random bytes, where 8 were asked for").into());
            }
            self.free.push(slot);
            taken += 1;
        }
        Ok(taken)
    }

    fn round<A: Access>(&mut self, mem: &A, round: &Round) -> Result<Done, Trouble> {
        let (mut asked, mut answered, mut done, mut seed) = (0, 0, Done::default(), round.seed);
        self.queue.disable_calls(mem)?;
        let mut since = None;
        while answered < round.requests {
            if asked < round.requests && !self.free.is_empty() {
                while asked < round.requests && !self.free.is_empty() {
                    self.ask(mem, &mut seed)?;
                    asked += 1;
                }
                self.queue.publish(mem)?;
                if self.queue.wants_kick(mem)? {
                    self.kick.notify()?;
                    done.kicks += 1;
                }
            }
            let taken = self.take(mem)?;
            answered += taken;
            if taken > 0 {
                since = None;
                continue;
            }
            let since = since.get_or_insert_with(Instant::now);
            if since.elapsed() < round.spin {
                // The back-end may be waiting for this very core, unless each has one of its own.
                if round.spin < FOR_EVER {
                    std::thread::yield_now();
                }
                continue;
            }
            if !self.queue.enable_calls(mem)? {
                done.waits += 1;
                let start = Instant::now();
                while self.call.drain() == 0 {
                    self.poller.wait(LONGEST_WAIT)?;
                    if start.elapsed() >= LONGEST_WAIT {
                        return Err(format!("no answer to {} requests", self.busy.len()).into());
                    }
                }
            }
            self.queue.disable_calls(mem)?;
        }
        Ok(done)
    }
}

fn main() -> Result<(), Trouble> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let mut words = words.iter().map(String::as_str);
    let mut socket = UnixStream::connect(words.next().ok_or("no socket is named")?)?;
    let file = File::options()
        .read(true)
        .write(true)
        .open(words.next().ok_or("no memory is named")?)?;
    let (bytes, size, packed) = (number(words.next())?, number(words.next())?, words.next() == Some("1"));
    let features = number(words.next())?;
    let kind = if words.next() == Some("blk") {
        Kind::Disk
    } else {
        Kind::Entropy
    };
    let depth: u64 = number(words.next())?;
    let sectors: u64 = number(words.next())?;
    let backing = Backing::Received {
        fd: file.into(),
        offset: 0,
        writable: true,
    };
    let guest = GuestMemory::new(
        vec![RegionSpec {
            gpa: 0,
            size: bytes,
            backing,
        }],
        None,
    )?;
    let layout = RingLayout::contiguous(size, packed, RING).ok_or("the ring has no such size")?;
    let config = QueueConfig {
        size: u32::from(size),
        desc: layout.desc,
        driver: layout.driver,
        device: layout.device,
        index: 0,
        features,
        policy: Policy::INTEROP,
    };
    let pin = guest.pin();
    let mem = pin.mapped();
    let call = Notifier::from_fd(std::io::stdout().as_fd().try_clone_to_owned()?)?;
    let poller = Poller::new()?;
    poller.add(call.fd().ok_or("calls come on no fd")?.as_raw_fd())?;
    let mut load = Load {
        queue: DriverQueue::new(&mem, config, None, None)?,
        kick: Notifier::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?,
        call,
        poller,
        kind,
        blocks: sectors / 8,
        free: (0..depth).collect(),
        busy: Vec::new(),
    };
    // The ring is fresh from here on.
    writeln!(socket, "ready")?;
    let lines = BufReader::new(socket.try_clone()?).lines();
    for line in lines {
        let line = line?;
        let mut words = line.split(' ');
        let round = Round {
            requests: number(words.next())?,
            spin: Duration::from_micros(number(words.next())?),
            seed: number(words.next())?,
        };
        let start = Instant::now();
        match load.round(&mem, &round) {
            Ok(done) => writeln!(socket, "{} {} {}", start.elapsed().as_nanos(), done.kicks, done.waits)?,
            Err(error) => {
                writeln!(socket, "{error}")?;
                return Err(error);
            }
        }
    }
    Ok(())
}
