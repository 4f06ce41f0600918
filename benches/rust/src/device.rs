//! Device ends in one thread: nanoseconds per chain of taking, using and deciding whether to notify.
//!
//! Our driver end fills the ring beforehand. Inside of what is timed `avail.idx` of a split ring is stored burst by burst, so
//! that a device never sees more than one burst at a time, and no clock is read in between. A packed ring is seen whole.

use std::time::Instant;

use virtio_test::queue::DriverQueue;

use crate::ends::{Done, End, RESPONSE};
use crate::shape::Shape;
use crate::world::{Buffers, World};

/// Chains of one timed round, about, and passes at least.
const CHAINS: u64 = 16_384;
const PASSES: u64 = 5;

/// One device end, its driver and its ring.
pub struct Side {
    world: World,
    end: Box<dyn Bursts>,
    driver: DriverQueue,
    shape: &'static Shape,
    buffers: Vec<Buffers>,
    burst: u16,
    copies: bool,
    /// What the driver has added so far, on 16 bits as `avail.idx` counts.
    idx: u16,
}

/// A whole timed stretch behind one dynamic call.
pub trait Bursts {
    fn run(&mut self, world: &World, idx: u16, bursts: u16, burst: u16, done: &mut Done);
}

impl<E: End> Bursts for E {
    fn run(&mut self, world: &World, mut idx: u16, bursts: u16, burst: u16, done: &mut Done) {
        for _ in 0..bursts {
            idx = idx.wrapping_add(burst);
            if !world.ring.packed {
                world.show(idx);
            }
            let count = self.serve(usize::from(burst), done);
            assert_eq!(count, usize::from(burst), "chains of one burst");
            std::hint::black_box(self.notify());
        }
    }
}

/// Nanoseconds per chain of the median pass of `chains` each: who takes the core away meanwhile hits few of them.
pub fn median(mut passes: Vec<u128>, chains: u64) -> f64 {
    passes.sort_unstable();
    #[allow(clippy::cast_precision_loss, reason = "nanoseconds of one pass fit the mantissa")]
    let nanos = passes[passes.len() / 2] as f64 / chains as f64;
    nanos
}

/// What one side did in a round.
pub struct Round {
    /// Nanoseconds per chain.
    pub nanos: f64,
    pub done: Done,
}

impl Side {
    pub fn new(world: World, end: Box<dyn Bursts>, shape: &'static Shape, burst: u16, copies: bool) -> Self {
        let driver = world.driver();
        let buffers: Vec<Buffers> = (0..32).map(|number| world.buffers(shape, number)).collect();
        for (number, (readable, _)) in (0u8..).zip(&buffers) {
            for &(gpa, len) in readable {
                world
                    .memory
                    .fill(gpa, u64::from(len), number + 1)
                    .expect("it is mapped");
            }
        }
        Self {
            idx: world.ring.start(),
            world,
            end,
            driver,
            shape,
            buffers,
            burst,
            copies,
        }
    }

    /// One timed round, whose time is that of its median pass; its bytes are not kept.
    pub fn round(&mut self) -> Round {
        let fill = u64::from(self.fill());
        let mut done = Done::default();
        let passes = (0..CHAINS.div_ceil(fill).max(PASSES)).map(|_| self.pass(&mut done));
        let nanos = median(passes.collect(), fill);
        Round { nanos, done }
    }

    /// One pass of the ring, not timed, with everything that the device did.
    pub fn kept(&mut self) -> Done {
        let mut done = Done {
            kept: Some(Vec::new()),
            ..Done::default()
        };
        self.pass(&mut done);
        done
    }

    /// Chains that are in the ring at once.
    fn fill(&self) -> u16 {
        let fit = self.world.ring.size / self.shape.slots();
        fit - fit % self.burst
    }

    /// Fill the ring, have the device empty it, and take everything back; nanoseconds of the device.
    fn pass(&mut self, done: &mut Done) -> u128 {
        let (mem, fill, before) = (self.world.mem, self.fill(), done.chains);
        for number in 0..fill {
            let (readable, writable) = &self.buffers[usize::from(number) % self.buffers.len()];
            let added = self.driver.add(mem, readable, writable, self.shape.indirect);
            added.expect("the ring has room");
        }
        if self.world.ring.packed {
            self.driver.publish(mem).expect("the ring is mapped");
        }
        let start = Instant::now();
        self.end.run(&self.world, self.idx, fill / self.burst, self.burst, done);
        let spent = start.elapsed().as_nanos();
        self.idx = self.idx.wrapping_add(fill);
        self.driver.publish(mem).expect("the ring is mapped");
        assert_eq!(done.chains - before, u64::from(fill), "chains of one pass");
        let written = self.shape.bytes().1;
        for _ in 0..fill {
            let used = self.driver.get_used(mem).expect("the device breaks no rule");
            let (_, len) = used.expect("every chain is used");
            assert_eq!(u64::from(len), written, "bytes that the device says it wrote");
        }
        if done.kept.is_some() && self.copies {
            self.check_responses();
        }
        spent
    }

    fn check_responses(&self) {
        let used = usize::from(self.fill()).min(self.buffers.len());
        for &(gpa, len) in self.buffers.iter().take(used).flat_map(|(_, writable)| writable) {
            let mut bytes = vec![0; len as usize];
            self.world.memory.read(gpa, &mut bytes).expect("it is mapped");
            assert_eq!(bytes, RESPONSE, "the answer at {gpa:#x}");
            self.world.memory.fill(gpa, u64::from(len), 0).expect("it is mapped");
        }
    }
}
