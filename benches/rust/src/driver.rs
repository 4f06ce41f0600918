//! Driver ends in one thread: nanoseconds per chain of adding, publishing, deciding whether to kick, and taking back.
//!
//! The peer is the queue of the virtio-driver crate. It cannot be built without one of the crate's transports, so a
//! thread plays the back-end of a vhost-user connection for as long as that takes; addresses are then those of the process,
//! and our device end gets memory in which they are guest addresses.

use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::net::UnixListener;
use std::time::Instant;

use virtio_driver::virtqueue::Virtqueue;
use virtio_driver::{IovaTranslator, Le32, VhostUser, VirtioFeatureFlags, VirtioTransport, iovec};
use virtio_test::mem::{Backing, GuestMemory, Mapped, Pin, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, feature};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::device::median;
use crate::shape::Shape;
use crate::world::{Buffers, Ring, World};

/// Chains of one timed round, about.
const CHAINS: u64 = 16_384;
const SIZE: usize = 4 << 20;
/// Where buffers begin in the peer's memory; the ring comes first.
const DATA: usize = 2 << 20;
const SETS: usize = 32;
const SET: usize = 0x5000;

/// A driver end. Chains are numbered by their set of buffers.
pub trait End {
    /// Add chains of these sets.
    fn add(&mut self, sets: Range<usize>);
    /// Make visible what was added; whether a kick is wanted.
    fn kick(&mut self) -> bool;
    /// Take back up to so many; how many there were.
    fn take(&mut self, limit: usize) -> usize;
}

/// One driver end and the device that answers it.
pub struct Side<E> {
    end: E,
    device: DeviceQueue,
    mem: &'static Mapped<'static>,
    fill: usize,
    burst: usize,
}

impl<E: End> Side<E> {
    /// Nanoseconds per chain of the median pass, and chains and bytes that the device saw.
    pub fn round(&mut self) -> (f64, (u64, u64, u64)) {
        let mut seen = (0, 0, 0);
        let mut passes = Vec::new();
        for _ in 0..CHAINS.div_ceil(self.fill as u64) {
            let start = Instant::now();
            self.timed_add();
            let added = start.elapsed().as_nanos();
            self.answer(&mut seen);
            let start = Instant::now();
            self.timed_take();
            passes.push(added + start.elapsed().as_nanos());
            assert_eq!(self.end.take(1), 0, "and none twice");
        }
        (median(passes, self.fill as u64), seen)
    }

    /// Fill the ring, burst by burst. By its name its instructions are counted, as those of `timed_take`.
    #[inline(never)]
    fn timed_add(&mut self) {
        for first in (0..self.fill).step_by(self.burst) {
            let set = first % SETS;
            self.end.add(set..set + self.burst);
            black_box(self.end.kick());
        }
    }

    #[inline(never)]
    fn timed_take(&mut self) {
        for _ in (0..self.fill).step_by(self.burst) {
            assert_eq!(self.end.take(self.burst), self.burst, "every chain was used");
        }
    }

    fn answer(&mut self, seen: &mut (u64, u64, u64)) {
        let (mut segments, mut elements) = (Vec::new(), Vec::new());
        let popped = self.device.pop_many(self.mem, self.fill, &mut segments, &mut elements);
        assert_eq!(
            popped.expect("the driver breaks no rule"),
            self.fill,
            "chains of one pass"
        );
        for element in &elements {
            let used = self.device.complete(self.mem, &element.ticket(), element.writable);
            used.expect("the ring is mapped");
            seen.0 += 1;
            seen.1 += element.readable;
            seen.2 += element.writable;
        }
        self.device.publish(self.mem).expect("the ring is mapped");
    }
}

fn fill(ring: Ring, shape: &Shape, burst: u16) -> usize {
    let fit = ring.size / shape.slots();
    usize::from(fit - fit % burst)
}

/// Our driver end.
pub struct Ours {
    mem: &'static Mapped<'static>,
    queue: DriverQueue,
    used: Vec<(u64, u32)>,
    buffers: Vec<Buffers>,
}

impl End for Ours {
    #[inline]
    fn add(&mut self, sets: Range<usize>) {
        match &self.buffers[sets] {
            [(readable, writable)] => {
                let added = self.queue.add(self.mem, readable, writable, false);
                added.expect("the ring has room");
            }
            chains => {
                let added = self.queue.add_many(self.mem, chains).expect("they are chains");
                assert_eq!(added.count(), chains.len(), "the ring has room");
            }
        }
    }

    #[inline]
    fn kick(&mut self) -> bool {
        self.queue.publish(self.mem).expect("the ring is mapped");
        self.queue.wants_kick(self.mem).expect("the ring is mapped")
    }

    #[inline]
    fn take(&mut self, limit: usize) -> usize {
        self.used.clear();
        let taken = self.queue.get_used_into(self.mem, limit, &mut self.used);
        taken.expect("the device breaks no rule")
    }
}

pub fn ours(ring: Ring, shape: &'static Shape, burst: u16) -> Side<Ours> {
    let world = World::new(ring);
    let end = Ours {
        mem: world.mem,
        queue: world.driver(),
        used: Vec::new(),
        buffers: (0..SETS as u64).map(|set| world.buffers(shape, set)).collect(),
    };
    Side {
        end,
        device: world.device(),
        mem: world.mem,
        fill: fill(ring, shape, burst),
        burst: usize::from(burst),
    }
}

/// The crate's.
pub struct Theirs {
    queue: Virtqueue<'static, ()>,
    buffers: Vec<Vec<(iovec, bool)>>,
}

impl End for Theirs {
    #[inline]
    fn add(&mut self, sets: Range<usize>) {
        for buffers in &self.buffers[sets] {
            let added = self
                .queue
                .add_request(|(), add| buffers.iter().try_for_each(|&(buffer, writable)| add(buffer, writable)));
            added.expect("the ring has room");
        }
    }

    #[inline]
    fn kick(&mut self) -> bool {
        self.queue.avail_notif_needed()
    }

    #[inline]
    fn take(&mut self, limit: usize) -> usize {
        self.queue.completions().take(limit).map(black_box).count()
    }
}

pub fn theirs(ring: Ring, shape: &'static Shape, burst: u16) -> Side<Theirs> {
    let features = VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
    let (features, format) = if ring.packed {
        (features | VirtioFeatureFlags::RING_PACKED, feature::RING_PACKED)
    } else {
        (features, 0)
    };
    let (base, ours, shared) = memory();
    // SAFETY: the mapping has `SIZE` bytes and is never unmapped. What lies before `DATA` is used as a slice by nobody
    // else: our device end reaches it through another mapping, as the other process that it stands for would.
    let ring_memory = unsafe { std::slice::from_raw_parts_mut(shared, DATA) };
    let queue = Virtqueue::new(translator(), ring_memory, ring.size, features).expect("the ring fits");
    let address = |ptr: *const u8| ptr.addr() as u64;
    let config = QueueConfig {
        size: u32::from(ring.size),
        desc: address(queue.desc_table_ptr()),
        driver: address(queue.driver_area_ptr()),
        device: address(queue.device_area_ptr()),
        index: 0,
        features: format | feature::EVENT_IDX,
        policy: Policy::INTEROP,
    };
    let mut device = DeviceQueue::new(ours, config, None).expect("the ring is mapped");
    device.disable_kicks(ours).expect("the ring is mapped");
    let set = |set: usize| {
        let mut at = base + DATA + set * SET;
        let readable = shape.readable.iter().map(|&len| (len, false));
        let all = readable.chain(shape.writable.iter().map(|&len| (len, true)));
        all.map(|(len, writable)| {
            let buffer = iovec {
                iov_base: std::ptr::without_provenance_mut(at),
                iov_len: len as usize,
            };
            at += buffer.iov_len.next_multiple_of(16);
            (buffer, writable)
        })
        .collect()
    };
    Side {
        end: Theirs {
            queue,
            buffers: (0..SETS).map(set).collect(),
        },
        device,
        mem: ours,
        fill: fill(ring, shape, burst),
        burst: usize::from(burst),
    }
}

/// Memory of `SIZE` bytes, mapped twice: its address here, and the view in which that is its guest address.
fn memory() -> (usize, &'static Mapped<'static>, *mut u8) {
    let spec = RegionSpec {
        gpa: 0,
        size: SIZE as u64,
        backing: Backing::Memfd,
    };
    let origin = GuestMemory::new(vec![spec], None).expect("memory can be had");
    let regions = origin.regions();
    let fd = regions[0].fd().expect("a memfd has one");
    let file = File::from(fd.try_clone().expect("one more descriptor"));
    let range = (GuestAddress(0), SIZE, Some(FileOffset::new(file, 0)));
    let shared = GuestMemoryMmap::<()>::from_ranges_with_files([range]).expect("it can be mapped twice");
    let ptr = shared.get_host_address(GuestAddress(0)).expect("it is mapped");
    let spec = RegionSpec {
        gpa: ptr.addr() as u64,
        size: SIZE as u64,
        backing: Backing::Received {
            fd: fd.try_clone().expect("one more descriptor"),
            offset: 0,
            writable: true,
        },
    };
    let memory = GuestMemory::new(vec![spec], None).expect("it can be mapped");
    let memory: &'static GuestMemory = Box::leak(Box::new(memory));
    let pin: &'static Pin<'static> = Box::leak(Box::new(memory.pin()));
    Box::leak(Box::new(shared));
    (ptr.addr(), Box::leak(Box::new(pin.mapped())), ptr)
}

/// What the crate's vhost-user transport makes of addresses: nothing.
fn translator() -> Box<dyn IovaTranslator> {
    let path = std::env::temp_dir().join(format!("virtio-test-benches-{}", std::process::id()));
    let listener = UnixListener::bind(&path).expect("a socket can be made");
    let server = std::thread::spawn(move || greet(&listener));
    let name = path.to_str().expect("the name is ours");
    let transport = VhostUser::<Le32, ()>::new(name, VirtioFeatureFlags::VERSION_1.bits());
    let translator = transport.expect("the back-end answers").iova_translator();
    server.join().expect("it ends").expect("it understood");
    std::fs::remove_file(&path).expect("it is there");
    translator
}

/// Answer what is asked of a back-end before it gets any memory or queue.
fn greet(listener: &UnixListener) -> std::io::Result<()> {
    const GET_FEATURES: u32 = 1;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const GET_MAX_MEM_SLOTS: u32 = 36;
    let (mut socket, _) = listener.accept()?;
    loop {
        let mut header = [0; 12];
        if socket.read(&mut header)? == 0 {
            return Ok(());
        }
        let [request, _, size] = [0, 4, 8].map(|at| {
            let word = header[at..at + 4].try_into().unwrap_or_default();
            u32::from_le_bytes(word)
        });
        socket.read_exact(&mut vec![0; size as usize])?;
        let answer: u64 = match request {
            // VERSION_1 and PROTOCOL_FEATURES; REPLY_ACK, CONFIG and CONFIGURE_MEM_SLOTS.
            GET_FEATURES => 1 << 32 | 1 << 30,
            GET_PROTOCOL_FEATURES => 1 << 3 | 1 << 9 | 1 << 15,
            GET_MAX_MEM_SLOTS => 8,
            _ => continue,
        };
        let words = [request, 1 | 1 << 2, 8].map(u32::to_le_bytes).concat();
        socket.write_all(&words)?;
        socket.write_all(&answer.to_le_bytes())?;
    }
}
