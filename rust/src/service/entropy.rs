//! The entropy service (VIRTIO 1.4, 5.4): fills buffers with random bytes of the operating system.
//!
//! A buffer gets `limit` bytes at most, so a driver that offers gigabytes cannot keep the thread from anything else; the
//! used length says how many it got (5.4.6.2 allows less than the entire buffer). A buffer with nothing to write to, or with
//! something to read in it (5.4.6.1), is counted as odd: the former gets nothing, the latter is filled all the same.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

use super::{Answer, Bounds, Burst, Service, Turn, each};
use crate::error::{Fault, QueueError};
use crate::iov::Iov;
use crate::mem::Access;
use crate::queue::DeviceQueue;

/// Bytes asked for at once, which the kernel gives whole.
const PIECE: usize = 256;

/// What it has met since it was made; may be read meanwhile.
#[derive(Debug, Default)]
pub struct EntropyCounters {
    /// Bytes given out.
    pub delivered: AtomicU64,
    /// Buffers that a driver must not put in.
    pub odd: AtomicU64,
    /// Buffers that got less because the operating system gave no random bytes, or their memory has gone.
    pub failed: AtomicU64,
}

/// The service; see the module's head.
#[derive(Debug)]
pub struct Entropy {
    limit: u64,
    counters: Arc<EntropyCounters>,
    burst: Burst,
}

impl Entropy {
    /// One that gives a buffer `limit` bytes at most.
    #[must_use]
    pub fn new(limit: u64) -> Self {
        Self {
            limit,
            counters: Arc::default(),
            burst: Burst::default(),
        }
    }

    /// What it has met.
    #[must_use]
    pub const fn counters(&self) -> &Arc<EntropyCounters> {
        &self.counters
    }
}

impl Service for Entropy {
    fn queues(&self) -> usize {
        1
    }

    fn turn<A: Access>(&mut self, mem: &A, queues: &mut [&mut DeviceQueue], bounds: Bounds) -> Result<Turn, Fault> {
        let Self { limit, counters, burst } = self;
        let Some(queue) = queues.first_mut() else {
            return Ok(Turn::default());
        };
        each(burst, mem, queue, bounds, |queue, element, iov| {
            if element.readable > 0 || element.writable == 0 {
                counters.odd.fetch_add(1, Ordering::Relaxed);
            }
            let used = fill(mem, queue, iov, element.writable.min(*limit), counters)?;
            counters.delivered.fetch_add(used, Ordering::Relaxed);
            Ok(Answer { used, charge: 0 })
        })
    }
}

/// Fill the first `wanted` bytes; how many that were.
fn fill<A: Access>(
    mem: &A,
    queue: &mut DeviceQueue,
    iov: Iov<'_>,
    wanted: u64,
    counters: &EntropyCounters,
) -> Result<u64, Fault> {
    let mut bytes = [0; PIECE];
    let mut done = 0_u64;
    while done < wanted {
        let length = usize::try_from(wanted - done).unwrap_or(PIECE).min(PIECE);
        let Some(piece) = bytes.get_mut(..length) else { break };
        let copied = match random(piece) {
            Ok(()) => queue.copied(iov.write(mem, done, piece)),
            Err(_) => break,
        };
        match copied {
            Ok(copied) => done = done.saturating_add(copied as u64),
            Err(QueueError::Violation(fault)) => return Err(fault),
            // A transfer of remote memory that failed.
            Err(QueueError::Misuse(_)) => break,
        }
    }
    if done < wanted {
        counters.failed.fetch_add(1, Ordering::Relaxed);
    }
    Ok(done)
}

fn random(bytes: &mut [u8]) -> Result<(), Errno> {
    let mut rest = bytes;
    while !rest.is_empty() {
        match getrandom(&mut *rest, GetRandomFlags::empty()) {
            Ok(count) => rest = rest.get_mut(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}
