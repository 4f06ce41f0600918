//! The device ends that are compared: ours, and the three idioms of the virtio-queue crate. Each takes a burst of chains,
//! uses all of them, and decides whether to notify.

use std::hint::black_box;
use std::io::{Read, Write};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use virtio_test::chain::{Element, Segment};
use virtio_test::iov::Iov;
use virtio_test::mem::Mapped;
use virtio_test::queue::DeviceQueue;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::world::World;

/// What every device answers.
pub const RESPONSE: [u8; 12] = *b"answer of 12";
const ROOM: usize = 4 * 4096;
/// Chains of a burst at most.
const BURST: usize = 32;

/// What a device did, so that two of them can be compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Done {
    pub chains: u64,
    pub readable: u64,
    pub writable: u64,
    /// Heads, and the bytes that were copied; kept only outside of what is timed.
    pub kept: Option<Vec<(u16, Vec<u8>)>>,
}

/// What is added up while a burst is served, in registers.
#[derive(Default)]
struct Sum {
    chains: u64,
    readable: u64,
    writable: u64,
}

impl Done {
    #[inline]
    fn chain(&mut self, sum: &mut Sum, head: u16, readable: u64, writable: u64, copied: &[u8]) {
        sum.chains += 1;
        sum.readable += readable;
        sum.writable += writable;
        if !copied.is_empty() {
            black_box(copied);
        }
        if let Some(kept) = &mut self.kept {
            kept.push((head, copied.to_vec()));
        }
    }

    #[inline]
    fn add(&mut self, sum: &Sum) {
        self.chains += sum.chains;
        self.readable += sum.readable;
        self.writable += sum.writable;
    }
}

/// A device end.
pub trait End {
    /// Take up to `burst` chains and use them; how many there were.
    fn serve(&mut self, burst: usize, done: &mut Done) -> usize;
    /// Whether the driver wants to hear of it.
    fn notify(&mut self) -> bool;
}

/// Our device end; with or without copies.
pub struct Ours<const COPY: bool> {
    pub mem: &'static Mapped<'static>,
    pub queue: DeviceQueue,
    pub segments: Vec<Segment>,
    pub elements: Vec<Element>,
    pub request: Box<[u8; ROOM]>,
}

impl<const COPY: bool> Ours<COPY> {
    pub fn new(world: &World) -> Self {
        Self {
            mem: world.mem,
            queue: world.device(),
            segments: Vec::new(),
            elements: Vec::new(),
            request: Box::new([0; ROOM]),
        }
    }
}

impl<const COPY: bool> End for Ours<COPY> {
    #[inline]
    fn serve(&mut self, burst: usize, done: &mut Done) -> usize {
        let mem = self.mem;
        self.segments.clear();
        self.elements.clear();
        let popped = self.queue.pop_many(mem, burst, &mut self.segments, &mut self.elements);
        let count = popped.expect("the driver breaks no rule");
        if count == 0 {
            return 0;
        }
        let mut sum = Sum::default();
        for element in &self.elements {
            let copied = if COPY {
                answer(mem, element, &self.segments, &mut self.request)
            } else {
                &[]
            };
            done.chain(&mut sum, element.head, element.readable, element.writable, copied);
        }
        let tickets = self.elements.iter().map(|element| (element.ticket(), element.writable));
        let used = self.queue.complete_many(mem, tickets).expect("the ring is mapped");
        assert_eq!(used, count as u64, "chains completed");
        done.add(&sum);
        self.queue.publish(mem).expect("the ring is mapped");
        count
    }

    #[inline]
    fn notify(&mut self) -> bool {
        self.queue.wants_call(self.mem).expect("the ring is mapped")
    }
}

/// Read a request and write its answer; what was read.
#[expect(clippy::inline_always, reason = "the call would be measured too")]
#[inline(always)]
fn answer<'a>(mem: &Mapped<'_>, element: &Element, segments: &[Segment], request: &'a mut [u8; ROOM]) -> &'a [u8] {
    let segments = &segments[element.first..element.first + element.count];
    let iov = Iov::new(segments, element.epoch);
    let room = usize::try_from(element.readable).unwrap_or(ROOM).min(ROOM);
    let got = iov.read(mem, 0, &mut request[..room]).expect("it is mapped");
    iov.write(mem, 0, &RESPONSE).expect("it is mapped");
    &request[..got]
}

/// Our device end for who takes one chain at a time.
pub struct OursSingly<const COPY: bool>(Ours<COPY>);

impl<const COPY: bool> OursSingly<COPY> {
    pub fn new(world: &World) -> Self {
        Self(Ours::new(world))
    }
}

impl<const COPY: bool> End for OursSingly<COPY> {
    #[inline]
    fn serve(&mut self, burst: usize, done: &mut Done) -> usize {
        assert_eq!(burst, 1, "chains of a burst");
        let Ours {
            mem,
            queue,
            segments,
            request,
            ..
        } = &mut self.0;
        segments.clear();
        let popped = queue.pop(*mem, segments).expect("the driver breaks no rule");
        let Some(element) = popped else { return 0 };
        let mut sum = Sum::default();
        let copied = if COPY {
            answer(mem, &element, segments, request)
        } else {
            &[]
        };
        done.chain(&mut sum, element.head, element.readable, element.writable, copied);
        done.add(&sum);
        let used = queue.complete(*mem, &element.ticket(), element.writable);
        assert!(used.expect("the ring is mapped"), "the chain is completed");
        queue.publish(*mem).expect("the ring is mapped");
        1
    }

    #[inline]
    fn notify(&mut self) -> bool {
        self.0.notify()
    }
}

/// The queue of the crate over the same ring.
fn queue(world: &World) -> Queue {
    let mut queue = Queue::new(world.ring.size).expect("a power of two");
    let set = [
        queue.try_set_desc_table_address(GuestAddress(world.layout.desc)),
        queue.try_set_avail_ring_address(GuestAddress(world.layout.driver)),
        queue.try_set_used_ring_address(GuestAddress(world.layout.device)),
    ];
    assert!(set.iter().all(Result::is_ok), "the ring is aligned");
    queue.set_event_idx(true);
    queue.set_ready(true);
    assert!(queue.is_valid(world.theirs), "the ring is mapped");
    queue
}

macro_rules! theirs {
    ($name:ident, $doc:literal) => {
        #[doc = $doc]
        pub struct $name<const COPY: bool> {
            pub mem: &'static GuestMemoryMmap,
            pub queue: Queue,
            pub request: Box<[u8; ROOM]>,
        }

        impl<const COPY: bool> $name<COPY> {
            pub fn new(world: &World) -> Self {
                Self {
                    mem: world.theirs,
                    queue: queue(world),
                    request: Box::new([0; ROOM]),
                }
            }
        }
    };
}

theirs!(ByIter, "The crate's iterator: `avail.idx` is loaded once for a burst.");
theirs!(ByPop, "The crate's `pop_descriptor_chain`.");
theirs!(
    ByReader,
    "The crate's `pop_descriptor_chain` with `Reader` and `Writer`, as the vhost-device daemons have it."
);

/// Walk a chain by its descriptors; the bytes that can be written.
#[inline]
fn walk<const COPY: bool>(
    mem: &'static GuestMemoryMmap,
    chain: DescriptorChain<&'static GuestMemoryMmap>,
    request: &mut [u8; ROOM],
    done: &mut Done,
    sum: &mut Sum,
) -> (u16, u32) {
    let head = chain.head_index();
    let (mut readable, mut writable) = (0, 0);
    for desc in chain {
        let len = desc.len() as usize;
        if desc.is_write_only() {
            if COPY {
                let answer = &RESPONSE[..len.min(RESPONSE.len())];
                mem.write_slice(answer, desc.addr()).expect("it is mapped");
            }
            writable += len;
        } else {
            if COPY {
                let into = &mut request[readable..readable + len];
                mem.read_slice(into, desc.addr()).expect("it is mapped");
            }
            readable += len;
        }
    }
    let copied = if COPY { &request[..readable] } else { &[] };
    done.chain(sum, head, readable as u64, writable as u64, copied);
    (head, u32::try_from(writable).expect("it is small"))
}

impl<const COPY: bool> End for ByIter<COPY> {
    #[inline]
    fn serve(&mut self, burst: usize, done: &mut Done) -> usize {
        // The iterator borrows the queue, so what it gives is used afterwards.
        let (mut used, mut count, mut sum) = ([(0, 0); BURST], 0, Sum::default());
        let chains = self.queue.iter(self.mem).expect("the ring is mapped");
        for (chain, used) in chains.take(burst).zip(&mut used) {
            *used = walk::<COPY>(self.mem, chain, &mut self.request, done, &mut sum);
            count += 1;
        }
        for &(head, written) in &used[..count] {
            let added = self.queue.add_used(self.mem, head, written);
            added.expect("the ring is mapped");
        }
        done.add(&sum);
        count
    }

    #[inline]
    fn notify(&mut self) -> bool {
        self.queue.needs_notification(self.mem).expect("the ring is mapped")
    }
}

impl<const COPY: bool> End for ByPop<COPY> {
    #[inline]
    fn serve(&mut self, burst: usize, done: &mut Done) -> usize {
        let (mut sum, mut count) = (Sum::default(), 0);
        while count < burst {
            let Some(chain) = self.queue.pop_descriptor_chain(self.mem) else {
                break;
            };
            count += 1;
            let (head, written) = walk::<COPY>(self.mem, chain, &mut self.request, done, &mut sum);
            let added = self.queue.add_used(self.mem, head, written);
            added.expect("the ring is mapped");
        }
        done.add(&sum);
        count
    }

    #[inline]
    fn notify(&mut self) -> bool {
        self.queue.needs_notification(self.mem).expect("the ring is mapped")
    }
}

impl<const COPY: bool> End for ByReader<COPY> {
    #[inline]
    fn serve(&mut self, burst: usize, done: &mut Done) -> usize {
        let (mut sum, mut count) = (Sum::default(), 0);
        while count < burst {
            let Some(chain) = self.queue.pop_descriptor_chain(self.mem) else {
                break;
            };
            count += 1;
            let head = chain.head_index();
            let mut reader = chain.clone().reader(self.mem).expect("it is mapped");
            let mut writer = chain.writer(self.mem).expect("it is mapped");
            let (readable, writable) = (reader.available_bytes(), writer.available_bytes());
            let mut copied: &[u8] = &[];
            if COPY {
                let into = &mut self.request[..readable];
                reader.read_exact(into).expect("so many bytes there are");
                copied = into;
                let answer = &RESPONSE[..writable.min(RESPONSE.len())];
                writer.write_all(answer).expect("so many bytes there are");
            }
            done.chain(&mut sum, head, readable as u64, writable as u64, copied);
            let written = u32::try_from(writable).expect("it is small");
            let added = self.queue.add_used(self.mem, head, written);
            added.expect("the ring is mapped");
        }
        done.add(&sum);
        count
    }

    #[inline]
    fn notify(&mut self) -> bool {
        self.queue.needs_notification(self.mem).expect("the ring is mapped")
    }
}
