//! Services: native handlers, which answer the chains of one or more queues without Python.
//!
//! # Theory
//!
//! A service knows nothing of threads, notifications and Python. It is given its queues, locked, and their memory, pinned,
//! and does one *turn*: a bounded number of chains or bytes, whatever comes first. Whoever runs it (the owner loop, or a
//! [`crate::worker`]) lets go of pin and locks between turns, so a change of the memory table, a stop and a reset wait for
//! one turn at most.
//!
//! A turn pops, copies and completes through the same calls as every other handler, so each check of the core is made, a
//! dirty log is marked, a record is kept, and a translation that is missing is waited for.

mod entropy;
mod file;
mod image;
pub mod packet;

pub use entropy::{Entropy, EntropyCounters};
pub use file::{File, FileCounters, Terms, Traits, term};
use packet::Packets;
use smallvec::SmallVec;

use crate::chain::{Element, Segment};
use crate::error::{Fault, QueueError};
use crate::iov::{Iov, prefetch};
use crate::mem::{Access, At};
use crate::queue::DeviceQueue;

/// Chains that are popped at once: enough to spread what a pop costs.
const BURST: usize = 32;

/// What one turn may do at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    /// Chains, at least 1.
    pub chains: usize,
    /// Bytes of buffers, and of work that is charged as such; the chain that reaches it is the last one.
    pub bytes: u64,
}

/// What one turn has done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Chains answered.
    pub done: usize,
    /// Whether it ended at a bound: there may be more.
    pub more: bool,
    /// Whether something has happened that the owner wants to write down.
    pub notable: bool,
}

/// A native handler; see the module's head.
pub trait Service {
    /// How many queues it works on.
    fn queues(&self) -> usize;

    /// Whether what is available in the queue of this number is work; else it is room, which is looked at when it is needed.
    fn looks(&self, _queue: usize) -> bool {
        true
    }

    /// Whether the driver is to kick for what it makes available there.
    fn kicked(&self, _queue: usize) -> bool {
        true
    }

    /// One turn over `queues`, of which there are as many as [`Service::queues`] says. What it completes it need not
    /// publish.
    ///
    /// # Errors
    /// The rule that the other side broke; its queue is latched.
    fn turn<A: Access>(&mut self, mem: &A, queues: &mut [&mut DeviceQueue], bounds: Bounds) -> Result<Turn, Fault>;
}

/// Every service there is.
#[derive(Debug)]
pub enum Native {
    /// Random bytes.
    Entropy(Entropy),
    /// Block requests, answered from a file.
    File(File),
    /// The packet loop.
    Packets(Box<Packets>),
}

macro_rules! native {
    ($native:expr, $service:ident => $does:expr) => {
        match $native {
            Native::Entropy($service) => $does,
            Native::File($service) => $does,
            Native::Packets($service) => $does,
        }
    };
}

impl Service for Native {
    fn queues(&self) -> usize {
        native!(self, service => service.queues())
    }

    fn looks(&self, queue: usize) -> bool {
        native!(self, service => service.looks(queue))
    }

    fn kicked(&self, queue: usize) -> bool {
        native!(self, service => service.kicked(queue))
    }

    fn turn<A: Access>(&mut self, mem: &A, queues: &mut [&mut DeviceQueue], bounds: Bounds) -> Result<Turn, Fault> {
        native!(self, service => service.turn(mem, queues, bounds))
    }
}

/// Who is to be woken after a turn, of one queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wake {
    /// The driver: chains were used.
    pub call: bool,
    /// Whoever can get translations: one is missing.
    pub miss: bool,
}

/// What became of a turn.
#[derive(Debug)]
pub struct Done {
    /// What was done, or the rule that was broken. What was answered before that is published all the same.
    pub turn: Result<Turn, Fault>,
    /// Who is to be woken, by queue; when pin and locks are free again.
    pub wakes: SmallVec<[Wake; 2]>,
    /// The numbers of the queues that were found broken in it.
    pub broken: SmallVec<[u16; 2]>,
}

/// One turn of `service`, and its publication.
pub fn run<S: Service, A: Access>(service: &mut S, mem: &A, queues: &mut [&mut DeviceQueue], bounds: Bounds) -> Done {
    let sound: SmallVec<[bool; 2]> = queues.iter().map(|queue| !queue.broken()).collect();
    let mut turn = service.turn(mem, queues, bounds);
    let (mut wakes, mut broken) = (SmallVec::new(), SmallVec::new());
    for (queue, sound) in queues.iter_mut().zip(sound) {
        let call = queue.publish(mem).and_then(|()| queue.wants_call(mem));
        // Told each time: the translation that it waited for may have come and gone again.
        let miss = queue.waits_anew() || queue.waits().is_some();
        wakes.push(Wake {
            call: *call.as_ref().unwrap_or(&false),
            miss,
        });
        if let (Ok(_), Err(fault)) = (&turn, call) {
            turn = Err(fault);
        }
        if sound && queue.broken() {
            broken.push(queue.config().index);
        }
    }
    Done { turn, wakes, broken }
}

/// Ask for the kicks that `service` wants; whether there is work already, for which none may come.
///
/// # Errors
/// As [`DeviceQueue::enable_kicks`].
pub fn arm<S: Service, A: Access>(service: &S, mem: &A, queues: &mut [&mut DeviceQueue]) -> Result<bool, Fault> {
    let mut found = false;
    for (index, queue) in queues.iter_mut().enumerate() {
        if service.kicked(index) {
            found |= queue.enable_kicks(mem)? && service.looks(index);
        }
    }
    Ok(found)
}

/// Chains popped at once, in memory that is used again.
#[derive(Debug, Default)]
pub struct Burst {
    segments: Vec<Segment>,
    elements: Vec<Element>,
}

impl Burst {
    /// Pop up to `limit` chains in place of those before; their number.
    ///
    /// # Errors
    /// As [`DeviceQueue::pop_many`].
    #[inline]
    pub fn pop<A: Access>(&mut self, mem: &A, queue: &mut DeviceQueue, limit: usize) -> Result<usize, Fault> {
        self.segments.clear();
        self.elements.clear();
        queue.pop_many(mem, limit, &mut self.segments, &mut self.elements)
    }

    /// Have the starts of the buffers fetched: nothing more than a hint.
    #[inline]
    pub fn prefetch<A: Access>(&self, mem: &A) {
        prefetch(mem, &self.segments);
    }

    /// The chain of this number, and its buffers.
    #[inline]
    #[must_use]
    pub fn get(&self, index: usize) -> Option<(&Element, Iov<'_>)> {
        let element = self.elements.get(index)?;
        Some((element, buffers(&self.segments, element)))
    }

    /// The chains from this number on that have one buffer, and it, up to one that has another number of them.
    #[inline(always)]
    fn alone(&self, index: usize) -> impl Iterator<Item = (&Element, At)> {
        let elements = self.elements.get(index..).unwrap_or_default();
        elements.iter().map_while(|element| {
            let segment = self.segments.get(element.first).filter(|_| element.count == 1)?;
            Some((element, segment.at))
        })
    }

    /// Complete the chains before `end`, with no byte used; not visible before it is published.
    ///
    /// # Errors
    /// As [`complete`].
    #[inline]
    pub fn complete<A: Access>(&self, mem: &A, queue: &mut DeviceQueue, end: usize) -> Result<(), Fault> {
        let elements = self.elements.get(..end).unwrap_or_default();
        complete_all(mem, queue, elements.iter().map(|element| (element, 0)))
    }

    /// Put the chains from `first` on back, newest first.
    pub fn put_back(&mut self, queue: &mut DeviceQueue, first: usize) {
        while self.elements.len() > first {
            let Some(element) = self.elements.pop() else { break };
            let segments = self.segments.get(element.first..).unwrap_or_default();
            queue.put_back(&element, segments.get(..element.count).unwrap_or_default());
        }
    }
}

/// The buffers of a chain, of the segments that were popped with it.
#[inline(always)]
fn buffers<'a>(segments: &'a [Segment], element: &Element) -> Iov<'a> {
    // One, as most frames have: said in the type, a copy asks no more of it.
    let own = match element.count {
        1 => segments.get(element.first).map(std::slice::from_ref),
        count => segments.get(element.first..).and_then(|rest| rest.get(..count)),
    };
    Iov::new(own.unwrap_or_default(), element.epoch)
}

/// What a chain was answered with.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    /// Bytes of its writable part that are used, at most all.
    pub used: u64,
    /// Bytes that it counts as, beside its buffers.
    pub charge: u64,
}

/// Answer the chains of one queue one after the other; each is visible to the driver as soon as it is answered.
///
/// # Errors
/// The rule that the driver broke, in the ring or in `answer`; the queue is latched.
pub fn each<A: Access>(
    burst: &mut Burst,
    mem: &A,
    queue: &mut DeviceQueue,
    bounds: Bounds,
    mut answer: impl FnMut(&mut DeviceQueue, &Element, Iov<'_>) -> Result<Answer, Fault>,
) -> Result<Turn, Fault> {
    let mut turn = Turn::default();
    let mut bytes = 0_u64;
    loop {
        let room = bounds.chains.saturating_sub(turn.done);
        turn.more = room == 0 || bytes >= bounds.bytes;
        if turn.more || burst.pop(mem, queue, room.min(BURST))? == 0 {
            return Ok(turn);
        }
        let mut index = 0;
        while let Some((element, iov)) = burst.get(index) {
            if bytes >= bounds.bytes {
                burst.put_back(queue, index);
                break;
            }
            let Answer { used, charge } = answer(queue, element, iov)?;
            complete(mem, queue, element, used)?;
            queue.publish(mem)?;
            let moved = element.readable.saturating_add(element.writable);
            bytes = bytes.saturating_add(moved).saturating_add(charge);
            index += 1;
        }
        turn.done += index;
    }
}

/// Complete a chain that this very turn has popped; not visible before it is published.
///
/// # Errors
/// A violation when the ring is no longer mapped.
#[inline]
pub fn complete<A: Access>(mem: &A, queue: &mut DeviceQueue, element: &Element, used: u64) -> Result<(), Fault> {
    match queue.complete(mem, &element.ticket(), used.min(element.writable)) {
        Err(QueueError::Violation(fault)) => Err(fault),
        // The queue was locked all the time and the chain is its own: there is no misuse.
        Ok(_) | Err(QueueError::Misuse(_)) => Ok(()),
    }
}

/// Complete chains that this very turn has popped, each with the bytes used; not visible before they are published.
///
/// # Errors
/// As [`complete`].
#[inline]
pub fn complete_all<'a, A: Access>(
    mem: &A,
    queue: &mut DeviceQueue,
    done: impl ExactSizeIterator<Item = (&'a Element, u64)>,
) -> Result<(), Fault> {
    if done.len() == 0 {
        return Ok(());
    }
    let done = done.map(|(element, used)| (element.ticket(), used.min(element.writable)));
    match queue.complete_many(mem, done) {
        Err(QueueError::Violation(fault)) => Err(fault),
        Ok(_) | Err(QueueError::Misuse(_)) => Ok(()),
    }
}
