//! The packet loop (VIRTIO 1.4, 5.1): one pair of queues of a network device, without a network.
//!
//! # Theory
//!
//! Frames that are sent come back on the same pair, or go nowhere; or receive buffers are filled with frames that are made
//! here. It does what the network device does in Python, check by check, and a test compares the two.
//!
//! **A header is judged in memory of ours**: what the driver changes meanwhile changes nothing of what was judged. A frame
//! whose header asks for nothing goes straight from buffer to buffer (`straight`). Any other is read, header and all, and that
//! reading is judged, whatever led here; one copy puts both into a receive buffer.
//!
//! **All buffers of a frame are taken, then written, then completed**, and what was taken for a frame that does not fit is
//! there for the next. Receive buffers are taken in bursts, as many as there are frames waiting; what is left at the end
//! of a turn goes back to the ring.
//!
//! The receive queue is looked at when there is something to put into it, and its driver is asked for no kicks, unless
//! frames are made here: then work is what there is room for.

mod frame;
mod made;
mod receive;
mod straight;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use frame::Frame;
use made::Made;
use receive::{Placed, Receive};

use super::{Bounds, Burst, Service, Turn};
use crate::error::{Fault, QueueError};
use crate::mem::Access;
use crate::queue::DeviceQueue;

/// Bytes of the longest header.
pub const MOST_HEADER: usize = 12;
/// Bytes of the longest frame: 65535 and an Ethernet header with a VLAN tag.
pub const LONGEST: usize = 0xFFFF + 18;
/// Frames that come back, or are made, before any of them is shown to the driver: each time the two cores meet at the same lines
/// of the ring. With 32 instead, 6 % fewer frames of 64 bytes go round, and 30 % fewer are made.
const BURST: usize = 128;
/// Findings that are kept until somebody takes them.
const MAX_FINDINGS: usize = 1000;

/// What becomes of frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// They come back.
    Loopback,
    /// They go nowhere.
    Discard,
    /// They go nowhere, and others are made, so many.
    Generate(u64),
}

/// What was negotiated, and what is so now.
#[derive(Clone, Debug)]
#[allow(clippy::struct_excessive_bools, reason = "three feature bits and a state")]
pub struct Setup {
    /// Bytes of the header: 10 or 12 (5.1.9.1).
    pub header: usize,
    /// MRG_RXBUF.
    pub mergeable: bool,
    /// CSUM: the driver may leave a checksum out.
    pub checksum: bool,
    /// GUEST_CSUM: it takes such a frame.
    pub guest_checksum: bool,
    /// Bytes of the longest frame, at most [`LONGEST`].
    pub longest: usize,
    /// Whether there is a link, and the pair is in use.
    pub usable: bool,
    /// The frame that is made.
    pub frame: Vec<u8>,
    /// Where in it its number goes, in 8 big-endian bytes.
    pub number_at: Option<usize>,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            header: MOST_HEADER,
            mergeable: false,
            checksum: false,
            guest_checksum: false,
            longest: LONGEST,
            usable: false,
            frame: Vec::new(),
            number_at: None,
        }
    }
}

/// A rule that the driver broke, with which the queue goes on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Its name.
    pub rule: &'static str,
    /// Its clause.
    pub clause: &'static str,
    /// What was found.
    pub message: String,
    /// Index of the queue.
    pub queue: u16,
    /// Head or id of the chain.
    pub head: u16,
}

/// What it has met since it was made; may be read meanwhile.
#[derive(Debug, Default)]
pub struct Told {
    /// Frames that the driver has sent, and their bytes.
    pub sent: [AtomicU64; 2],
    /// Frames that it was given, and their bytes.
    pub received: [AtomicU64; 2],
    /// Frames that found no buffer, no link or no pair.
    pub dropped: AtomicU64,
    /// Frames that broke a rule.
    pub broken: AtomicU64,
    findings: Mutex<Vec<Finding>>,
}

impl Told {
    /// What was found since this was asked last.
    pub fn take_findings(&self) -> Vec<Finding> {
        std::mem::take(&mut *self.findings.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[cold]
    fn note(&self, finding: Finding) {
        let mut findings = self.findings.lock().unwrap_or_else(PoisonError::into_inner);
        if findings.len() < MAX_FINDINGS {
            findings.push(finding);
        }
    }
}

/// Counts of one turn.
#[derive(Debug, Default)]
struct Tally {
    sent: [u64; 2],
    received: [u64; 2],
    dropped: u64,
    broken: u64,
}

impl Tally {
    #[inline(always)]
    const fn sent(&mut self, length: u64) {
        self.sent[0] += 1;
        self.sent[1] += length;
    }

    #[inline(always)]
    const fn received(&mut self, length: u64) {
        self.received[0] += 1;
        self.received[1] += length;
    }

    fn tell(&self, told: &Told) {
        let counters = [&told.sent[0], &told.sent[1], &told.received[0], &told.received[1]];
        let counted = [self.sent[0], self.sent[1], self.received[0], self.received[1]];
        let rest = [(&told.dropped, self.dropped), (&told.broken, self.broken)];
        for (counter, count) in counters.into_iter().zip(counted).chain(rest) {
            if count > 0 {
                counter.fetch_add(count, Ordering::Relaxed);
            }
        }
    }
}

/// The service; its queues are the receive and the transmit queue of a pair. See the module's head.
#[derive(Debug)]
pub struct Packets {
    mode: Mode,
    setup: Setup,
    told: Arc<Told>,
    sent: Burst,
    receive: Receive,
    frame: Frame,
    made: Made,
    generated: u64,
    /// Frames that are taken at once at most: as many as the last turn had bytes for, since what is left goes back.
    ahead: usize,
    /// Whether what is made did not fit, so that only another buffer can change that.
    stuck: bool,
}

impl Packets {
    /// One that does nothing until it is set up.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        Self {
            mode,
            setup: Setup::default(),
            told: Arc::default(),
            sent: Burst::default(),
            receive: Receive::default(),
            frame: Frame::default(),
            made: Made::default(),
            generated: 0,
            ahead: usize::MAX,
            stuck: false,
        }
    }

    /// What it has met.
    #[must_use]
    pub const fn told(&self) -> &Arc<Told> {
        &self.told
    }

    /// Frames that are taken at once, if a turn has bytes for them. Those that go nowhere are shown to nobody, and of fewer at a
    /// time more are still in the cache when they are read.
    const fn burst(&self) -> usize {
        if matches!(self.mode, Mode::Loopback) {
            BURST
        } else {
            super::BURST
        }
    }

    /// From now on it is so.
    pub fn set_up(&mut self, setup: Setup) {
        // There is room for no longer one.
        let longest = setup.longest.min(LONGEST);
        self.setup = Setup { longest, ..setup };
        self.made.forget();
        self.stuck = false;
    }

    /// Frames made so far.
    #[must_use]
    pub const fn generated(&self) -> u64 {
        self.generated
    }

    /// Go on with this number.
    pub const fn set_generated(&mut self, number: u64) {
        self.generated = number;
    }

    /// Whether there are frames to be made.
    const fn makes(&self) -> bool {
        matches!(self.mode, Mode::Generate(count) if self.setup.usable && self.generated < count)
    }

    /// Fill receive buffers with frames of ours.
    fn make<A: Access>(
        &mut self,
        mem: &A,
        queue: &mut DeviceQueue,
        bounds: Bounds,
        tally: &mut Tally,
    ) -> Result<Turn, Fault> {
        let mut turn = Turn::default();
        let length = self.setup.frame.len() as u64;
        // What the turn has bytes for: the rest would go back.
        let fit = usize::try_from(bounds.bytes.div_ceil(length.max(1))).unwrap_or(usize::MAX);
        let most = bounds.chains.min(fit);
        self.stuck = false;
        while self.makes() {
            turn.more = turn.done >= most;
            if turn.more {
                break;
            }
            let Self {
                setup,
                receive,
                made,
                told,
                generated,
                ..
            } = self;
            let ahead = most.saturating_sub(turn.done).min(BURST);
            match receive.place(mem, queue, setup, made.frame(setup, *generated), ahead, told)? {
                Placed::Done => {}
                Placed::Empty => break,
                Placed::Few | Placed::Small => {
                    // A buffer that comes from now on brings a kick; one that came meanwhile is there.
                    queue.enable_kicks(mem)?;
                    if receive.place(mem, queue, setup, made.frame(setup, *generated), ahead, told)? != Placed::Done {
                        self.stuck = true;
                        break;
                    }
                }
            }
            made.done(setup);
            self.generated += 1;
            tally.received(length);
            turn.done += 1;
            if turn.done % BURST == 0 {
                self.receive.complete(mem, queue)?;
                queue.publish(mem)?;
            }
        }
        Ok(turn)
    }

    /// Take what the driver has sent.
    fn take<A: Access>(
        &mut self,
        mem: &A,
        (rx, tx): (&mut DeviceQueue, &mut DeviceQueue),
        bounds: Bounds,
        tally: &mut Tally,
    ) -> Result<Turn, Fault> {
        let mut turn = Turn::default();
        let mut bytes = 0_u64;
        loop {
            let room = bounds.chains.saturating_sub(turn.done);
            turn.more = room == 0 || bytes >= bounds.bytes;
            if turn.more {
                break;
            }
            let count = self.sent.pop(mem, tx, room.min(self.ahead).min(self.burst()))?;
            if count == 0 {
                break;
            }
            self.sent.prefetch(mem);
            tx.prefetch_used(mem, count);
            let mut done = 0;
            while bytes < bounds.bytes && done < count {
                done += self.straight(mem, done, bounds, &mut bytes, tally);
                if bytes < bounds.bytes && done < count {
                    self.pass(mem, (rx, tx), (done, count), &mut bytes, tally)?;
                    done += 1;
                }
            }
            self.sent.put_back(tx, done);
            turn.done += done;
            self.sent.complete(mem, tx, done)?;
            self.receive.complete(mem, rx)?;
            tx.publish(mem)?;
            rx.publish(mem)?;
        }
        self.ahead = if bytes < bounds.bytes {
            usize::MAX
        } else {
            turn.done.max(1)
        };
        Ok(turn)
    }

    /// Pass on the frame in the chain of this number, of `count` that were popped.
    fn pass<A: Access>(
        &mut self,
        mem: &A,
        (rx, tx): (&mut DeviceQueue, &mut DeviceQueue),
        (number, count): (usize, usize),
        bytes: &mut u64,
        tally: &mut Tally,
    ) -> Result<(), Fault> {
        let Self {
            setup,
            sent,
            receive,
            frame,
            told,
            ..
        } = self;
        let Some((element, iov)) = sent.get(number) else {
            return Ok(());
        };
        *bytes = bytes.saturating_add(element.readable).saturating_add(element.writable);
        let whole = match frame.read(mem, (element, iov), setup) {
            Ok(Ok(whole)) => whole,
            Ok(Err(broken)) => {
                tally.broken += 1;
                told.note(broken.found(tx.config().index, element.head));
                return Ok(());
            }
            Err(error) => {
                return match tx.copied::<()>(Err(error)) {
                    Err(QueueError::Violation(fault)) => Err(fault),
                    // A transfer of remote memory that failed: it is answered, and nothing is known of it.
                    _ => Ok(()),
                };
            }
        };
        let length = whole.len().saturating_sub(setup.header) as u64;
        *bytes = bytes.saturating_add(length);
        tally.sent(length);
        if !setup.usable {
            tally.dropped += 1;
        } else if self.mode == Mode::Loopback {
            match receive.place(mem, rx, setup, whole, count.saturating_sub(number), told) {
                Ok(Placed::Done) => tally.received(length),
                Ok(_) => tally.dropped += 1,
                Err(fault) => {
                    // The transmit queue is not to blame, and its chain is answered.
                    let end = number.saturating_add(1);
                    tally.dropped += 1;
                    sent.complete(mem, tx, end)?;
                    sent.put_back(tx, end);
                    return Err(fault);
                }
            }
        }
        Ok(())
    }
}

impl Service for Packets {
    fn queues(&self) -> usize {
        2
    }

    fn looks(&self, queue: usize) -> bool {
        queue != 0 || (self.makes() && !self.stuck)
    }

    fn kicked(&self, queue: usize) -> bool {
        // What did not fit has asked for a kick behind the last buffer; asked for once more, behind those that went back,
        // the driver would have passed that place already.
        queue != 0 || (self.makes() && !self.stuck)
    }

    fn turn<A: Access>(&mut self, mem: &A, queues: &mut [&mut DeviceQueue], bounds: Bounds) -> Result<Turn, Fault> {
        let [rx, tx] = queues else { return Ok(Turn::default()) };
        let mut tally = Tally::default();
        let made = if matches!(self.mode, Mode::Generate(_)) {
            self.make(mem, rx, bounds, &mut tally)
        } else {
            Ok(Turn::default())
        };
        let taken = self.take(mem, (rx, tx), bounds, &mut tally);
        let full = self.receive.complete(mem, rx);
        self.receive.put_back(rx);
        tally.tell(&self.told);
        let (made, taken) = (made?, taken?);
        full?;
        Ok(Turn {
            done: made.done + taken.done,
            more: made.more || taken.more,
            notable: false,
        })
    }
}
