//! A case by its words, and both of its sides.

use crate::cores;
use crate::device::{Bursts, Side};
use crate::driver;
use crate::ends::{ByIter, ByPop, ByReader, Ours, OursSingly};
use crate::shape::{self, Shape};
use crate::world::{Ring, World};

/// Measures a round, ours first if it is told so: ours, the peer's.
pub type Rounds = Box<dyn FnMut(bool) -> Result<(f64, f64), String>>;

/// Which idiom of the virtio-queue crate is measured beside us.
#[derive(Clone, Copy, Debug)]
pub enum Peer {
    Iter,
    Pop,
    Reader,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub enum What {
    Device(Peer),
    Driver,
    Cores(Peer),
    /// Our device end against itself in a ring that is like this.
    Flat(Ring),
}

/// One case.
#[derive(Clone, Copy, Debug)]
pub struct Case {
    pub what: What,
    pub ring: Ring,
    pub shape: &'static Shape,
    pub burst: u16,
    pub copies: bool,
}

/// A ring: `split:128:1:0` is the format, the size, the number of memory regions, and of chains before.
fn ring(word: &str) -> Option<Ring> {
    let mut parts = word.split(':');
    let packed = match parts.next()? {
        "split" => false,
        "packed" => true,
        _ => return None,
    };
    let (size, regions) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    let before = parts.next()?.parse().ok()?;
    Some(Ring {
        size,
        packed,
        regions,
        before,
    })
}

/// What is measured: `device:iter`, `driver`, `cores:pop`, `flat:split:128:1:0`.
fn what(word: &str) -> Option<What> {
    let (kind, rest) = word.split_once(':').unwrap_or((word, ""));
    let peer = || match rest {
        "iter" => Some(Peer::Iter),
        "pop" => Some(Peer::Pop),
        "reader" => Some(Peer::Reader),
        _ => None,
    };
    match kind {
        "device" => peer().map(What::Device),
        "cores" => peer().map(What::Cores),
        "driver" => Some(What::Driver),
        "flat" => ring(rest).map(What::Flat),
        _ => None,
    }
}

impl Case {
    /// From five words: what, ring, shape, burst, `copy` or `plain`.
    pub fn parse(words: [&str; 5]) -> Option<Self> {
        let case = Self {
            what: what(words[0])?,
            ring: ring(words[1])?,
            shape: shape::ALL.iter().find(|shape| shape.name == words[2])?,
            // Sets of buffers are taken a burst at a time.
            burst: words[3]
                .parse()
                .ok()
                .filter(|burst: &u16| *burst <= 32 && burst.is_power_of_two())?,
            copies: words[4] == "copy",
        };
        // A driver end that adds many at once adds no tables.
        let tables = matches!(case.what, What::Device(_) | What::Flat(_));
        (tables || !case.shape.indirect).then_some(case)
    }

    fn side<E: Bursts + 'static>(&self, ring: Ring, end: impl FnOnce(&World) -> E) -> Side {
        let world = World::new(ring);
        let end = Box::new(end(&world));
        Side::new(world, end, self.shape, self.burst, self.copies)
    }

    /// Our device end in this ring.
    pub fn our_device(&self, ring: Ring) -> Side {
        match (self.burst, self.copies) {
            (1, true) => self.side(ring, OursSingly::<true>::new),
            (1, false) => self.side(ring, OursSingly::<false>::new),
            (_, true) => self.side(ring, Ours::<true>::new),
            (_, false) => self.side(ring, Ours::<false>::new),
        }
    }

    pub fn their_device(&self, peer: Peer) -> Side {
        match (peer, self.copies) {
            (Peer::Iter, false) => self.side(self.ring, ByIter::<false>::new),
            (Peer::Iter, true) => self.side(self.ring, ByIter::<true>::new),
            (Peer::Pop, false) => self.side(self.ring, ByPop::<false>::new),
            (Peer::Pop, true) => self.side(self.ring, ByPop::<true>::new),
            (Peer::Reader, false) => self.side(self.ring, ByReader::<false>::new),
            (Peer::Reader, true) => self.side(self.ring, ByReader::<true>::new),
        }
    }

    /// Set both sides up; what this gives measures one round, ours first if it is told so.
    pub fn open(self) -> Rounds {
        match self.what {
            What::Device(peer) => devices(self.our_device(self.ring), self.their_device(peer), true),
            // Queues of different sizes are filled differently: only what was done in all is the same.
            What::Flat(base) => devices(self.our_device(self.ring), self.our_device(base), false),
            What::Driver => drivers(self),
            What::Cores(peer) => two_cores(self, peer),
        }
    }
}

fn both<T>(first: bool, ours: impl FnOnce() -> T, theirs: impl FnOnce() -> T) -> (T, T) {
    if first {
        let ours = ours();
        (ours, theirs())
    } else {
        let theirs = theirs();
        (ours(), theirs)
    }
}

fn devices(mut ours: Side, mut theirs: Side, same: bool) -> Rounds {
    Box::new(move |first| {
        let (mine, other) = both(first, || ours.round(), || theirs.round());
        if same && mine.done != other.done {
            return Err(format!("ours did {:?}, the peer {:?}", mine.done, other.done));
        }
        if same && ours.kept() != theirs.kept() {
            return Err("the two took different chains, or copied different bytes".to_owned());
        }
        Ok((mine.nanos, other.nanos))
    })
}

fn drivers(case: Case) -> Rounds {
    let mut ours = driver::ours(case.ring, case.shape, case.burst);
    let mut theirs = driver::theirs(case.ring, case.shape, case.burst);
    Box::new(move |first| {
        let ((mine, did), (other, they)) = both(first, || ours.round(), || theirs.round());
        if did != they {
            return Err(format!("the device saw {did:?} of ours, {they:?} of the peer's"));
        }
        Ok((mine, other))
    })
}

fn two_cores(case: Case, peer: Peer) -> Rounds {
    let world = World::new(case.ring);
    Box::new(move |first| {
        let ours = || cores::round(&world, case.shape, case.burst, Ours::<false>::new);
        let theirs = || match peer {
            Peer::Iter => cores::round(&world, case.shape, case.burst, ByIter::<false>::new),
            Peer::Pop => cores::round(&world, case.shape, case.burst, ByPop::<false>::new),
            Peer::Reader => cores::round(&world, case.shape, case.burst, ByReader::<false>::new),
        };
        let ((mine, did), (other, they)) = both(first, ours, theirs);
        if did != they {
            return Err(format!("ours did {did:?}, the peer {they:?}"));
        }
        Ok((mine, other))
    })
}
