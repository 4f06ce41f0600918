//! The same requests answered by a handler in Rust over the same device end: what a batch in numpy is measured against.
//!
//! `handler split|packed BURST FILLS`: for each line on standard input one round, and on standard output a line with the
//! nanoseconds per request of its median burst and all answers in hexadecimal. Rings, requests and what is timed are
//! those of `benches/pairs/handlers.py`.

#![allow(
    clippy::indexing_slicing,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program that prints, and stops when it cannot measure"
)]

use std::fmt::Write as _;
use std::hint::black_box;
use std::io::stdin;
use std::time::Instant;

use virtio_test::chain::{Element, Segment};
use virtio_test::iov::Iov;
use virtio_test::mem::{Access, Backing, GuestMemory, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, feature};
use virtio_test::ring::RingLayout;

const SIZE: u16 = 1024;
const REQUESTS: u32 = 512;
const BUFFERS: u64 = 0x10000;

/// The test device's arithmetic.
fn handler(request: &[u8; 48]) -> [u8; 12] {
    let mut answer = [0; 12];
    for (word, out) in request[4..16].chunks_exact(4).zip(answer.chunks_exact_mut(4)) {
        let word = u32::from_le_bytes(word.try_into().unwrap());
        out.copy_from_slice(&word.wrapping_add(100).to_le_bytes());
    }
    answer
}

fn request(number: u32) -> [u8; 48] {
    let mut bytes = [0; 48];
    let words = [number, number + 1, u32::MAX - number, 7 * number];
    for (word, out) in words.iter().zip(bytes.chunks_exact_mut(4)) {
        out.copy_from_slice(&word.to_le_bytes());
    }
    bytes[16..31].copy_from_slice(b"hello back end!");
    bytes
}

fn place(number: u32) -> u64 {
    BUFFERS + 64 * u64::from(number)
}

/// Take up to `limit` chains and answer them; their number.
fn answer<A: Access>(
    mem: &A,
    device: &mut DeviceQueue,
    limit: usize,
    segments: &mut Vec<Segment>,
    elements: &mut Vec<Element>,
) -> usize {
    elements.clear();
    segments.clear();
    let count = device.pop_many(mem, limit, segments, elements).unwrap();
    let mut request = [0; 48];
    for element in &*elements {
        let own = segments.get(element.first..element.first + element.count).unwrap();
        let iov = Iov::new(own, element.epoch);
        iov.read(mem, 0, &mut request).unwrap();
        let written = iov.write(mem, 0, &handler(&request)).unwrap();
        device.complete(mem, &element.ticket(), written as u64).unwrap();
    }
    device.publish(mem).unwrap();
    black_box(device.wants_call(mem).unwrap());
    count
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [ring, burst, fills] = &arguments[..] else {
        panic!("usage: handler split|packed BURST FILLS")
    };
    let (packed, burst, fills) = (
        ring == "packed",
        burst.parse::<usize>().unwrap(),
        fills.parse::<u32>().unwrap(),
    );
    let region = RegionSpec {
        gpa: 0,
        size: 1 << 20,
        backing: Backing::Memfd,
    };
    let memory = GuestMemory::new(vec![region], None).unwrap();
    let pin = memory.pin();
    let mem = pin.mapped();
    let layout = RingLayout::contiguous(SIZE, packed, 0x1000).unwrap();
    let config = QueueConfig {
        size: u32::from(SIZE),
        desc: layout.desc,
        driver: layout.driver,
        device: layout.device,
        index: 0,
        features: if packed { feature::RING_PACKED } else { 0 },
        policy: Policy::INTEROP,
    };
    let mut driver = DriverQueue::new(&mem, config, None, None).unwrap();
    let mut device = DeviceQueue::new(&mem, config, None).unwrap();
    let (mut elements, mut segments) = (Vec::new(), Vec::new());
    for number in 0..REQUESTS {
        memory.write(place(number), &request(number)).unwrap();
    }
    for _ in stdin().lines() {
        let (mut spent, mut answers) = (Vec::new(), String::new());
        for fill in 0..fills {
            for number in 0..REQUESTS {
                let at = place(number);
                memory.write(at + 48, &[0; 12]).unwrap();
                driver.add(&mem, &[(at, 48)], &[(at + 48, 12)], false).unwrap();
            }
            driver.publish(&mem).unwrap();
            loop {
                let start = Instant::now();
                let count = answer(&mem, &mut device, burst, &mut segments, &mut elements);
                let nanos = start.elapsed().as_nanos();
                if count < burst {
                    break;
                }
                spent.push(nanos);
            }
            for _ in 0..REQUESTS {
                let (_, written) = driver.get_used(&mem).unwrap().unwrap();
                assert_eq!(written, 12, "an answer of the wrong length");
            }
            for number in 0..REQUESTS {
                let mut found = [0; 12];
                memory.read(place(number) + 48, &mut found).unwrap();
                if fill + 1 < fills {
                    continue;
                }
                for byte in found {
                    write!(answers, "{byte:02x}").unwrap();
                }
            }
        }
        spent.sort_unstable();
        #[allow(clippy::cast_precision_loss, reason = "nanoseconds of one burst fit the mantissa")]
        let nanos = spent[spent.len() / 2] as f64 / burst as f64;
        println!("{nanos} {answers}");
    }
}
