//! The bare core: nanoseconds per chain of 48 + 12 bytes, both ends in one thread, medians of rounds.
//!
//! Run with `cargo bench --no-default-features`. Machines are noisy: compare rows of one run, not runs.

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a program that prints, and stops when it cannot measure"
)]

use std::hint::black_box;
use std::time::Instant;

use virtio_test::iov::Iov;
use virtio_test::mem::{Access, Backing, GuestMemory, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, feature};
use virtio_test::ring::RingLayout;

const SIZE: u16 = 256;
const ROUNDS: usize = 31;
const CHAINS: u64 = 40_000;

/// Nanoseconds per chain of the three parts of one round: add, device, take back.
struct Cost([f64; 3]);

fn config(packed: bool) -> QueueConfig {
    let layout = RingLayout::contiguous(SIZE, packed, 0x1000).unwrap();
    QueueConfig {
        size: u32::from(SIZE),
        desc: layout.desc,
        driver: layout.driver,
        device: layout.device,
        index: 0,
        features: if packed { feature::RING_PACKED } else { 0 },
        policy: Policy::INTEROP,
    }
}

/// One round in bursts of `burst`, with or without copies of requests and responses.
fn round<A: Access>(mem: &A, driver: &mut DriverQueue, device: &mut DeviceQueue, burst: u64, copy: bool) -> Cost {
    let mut spent = [0u128; 3];
    let (mut elements, mut segments) = (Vec::new(), Vec::new());
    let (mut request, response) = ([0u8; 48], [7u8; 12]);
    for _ in 0..CHAINS / burst {
        let start = Instant::now();
        for i in 0..burst {
            let base = 0x10000 + i * 64;
            driver.add(mem, &[(base, 48)], &[(base + 48, 12)], false).unwrap();
        }
        driver.publish(mem).unwrap();
        let added = Instant::now();
        elements.clear();
        segments.clear();
        let limit = usize::try_from(burst).unwrap();
        assert_eq!(
            device.pop_many(mem, limit, &mut segments, &mut elements).unwrap(),
            limit
        );
        for element in &elements {
            if copy {
                let end = element.first + element.count;
                let iov = Iov::new(segments.get(element.first..end).unwrap(), element.epoch);
                iov.read(mem, 0, &mut request).unwrap();
                black_box(&mut request);
                iov.write(mem, 0, &response).unwrap();
            }
            device.complete(mem, &element.ticket(), element.writable).unwrap();
        }
        device.publish(mem).unwrap();
        black_box(device.wants_call(mem).unwrap());
        let used = Instant::now();
        for _ in 0..burst {
            black_box(driver.get_used(mem).unwrap().unwrap());
        }
        let taken = Instant::now();
        let parts = [added - start, used - added, taken - used];
        spent
            .iter_mut()
            .zip(parts)
            .for_each(|(sum, part)| *sum += part.as_nanos());
    }
    #[allow(clippy::cast_precision_loss, reason = "nanoseconds of one round fit the mantissa")]
    Cost(spent.map(|nanos| nanos as f64 / CHAINS as f64))
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

fn main() {
    let region = RegionSpec {
        gpa: 0,
        size: 1 << 20,
        backing: Backing::Memfd,
    };
    let memory = GuestMemory::new(vec![region], None).unwrap();
    println!("ns per chain, 48 + 12 bytes, queue of {SIZE}: median of {ROUNDS} rounds (timer cost included)");
    println!(
        "{:<8} {:>6} {:>6} {:>8} {:>8} {:>8}",
        "ring", "burst", "copy", "add", "device", "take"
    );
    for packed in [false, true] {
        for burst in [1, 32] {
            for copy in [false, true] {
                let pin = memory.pin();
                let mem = pin.mapped();
                let mut driver = DriverQueue::new(&mem, config(packed), None, None).unwrap();
                let mut device = DeviceQueue::new(&mem, config(packed), None).unwrap();
                let rounds: Vec<Cost> = (0..ROUNDS)
                    .map(|_| round(&mem, &mut driver, &mut device, burst, copy))
                    .collect();
                let [add, handled, take] = [0, 1, 2].map(|part| {
                    median(
                        rounds
                            .iter()
                            .map(|cost| cost.0.get(part).copied().unwrap_or(f64::NAN))
                            .collect(),
                    )
                });
                let ring = if packed { "packed" } else { "split" };
                println!("{ring:<8} {burst:>6} {copy:>6} {add:>8.1} {handled:>8.1} {take:>8.1}");
            }
        }
    }
}
