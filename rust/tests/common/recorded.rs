//! A device end that keeps a record of what is in flight, in a file that others can write.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::{pread, pwrite};
use virtio_test::inflight::{Area, Part};
use virtio_test::mem::Backing;
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, QueueState, StartError};

use super::{PACKED, World, config, files};

pub const SIZE: u16 = 8;
pub const BYTES: usize = 0x1000;

pub fn part(file: &OwnedFd) -> Part {
    let backing = Backing::Received {
        fd: file.try_clone().unwrap(),
        offset: 0,
        writable: true,
    };
    Part::new(Arc::new(Area::new(BYTES as u64, backing, None).unwrap()), 0, SIZE)
}

pub fn content(file: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; BYTES];
    assert_eq!(pread(file, &mut bytes, 0).unwrap(), BYTES);
    bytes
}

/// A file, a device end that records in it, and a driver that has made nine buffers available so far: eight one after the
/// other; the fifth and the eighth are in flight still, and the ninth, of two descriptors, was never popped.
pub struct Recorded {
    pub world: World,
    pub file: OwnedFd,
}

impl Recorded {
    pub fn new(features: u64) -> Self {
        let world = World::interop(SIZE, features);
        let mut recorded = Self {
            world,
            file: files::file(BYTES as u64),
        };
        recorded.restart(None).unwrap();
        let mut held = Vec::new();
        for at in 0..8 {
            recorded.world.give(true);
            let element = recorded.world.take();
            if [4, 7].contains(&at) {
                held.push(element);
            } else {
                assert!(recorded.world.finish(&element, 0));
                recorded.world.used().unwrap().unwrap();
            }
        }
        recorded.world.give(false);
        recorded
    }

    pub fn restart(&mut self, state: Option<QueueState>) -> Result<(), StartError> {
        let features = self.world.device.config().features;
        let pin = self.world.mem.pin();
        let config = config(SIZE, features, Policy::INTEROP);
        self.world.device = DeviceQueue::recorded(&pin.mapped(), config, state, part(&self.file))?;
        self.world.segments.clear();
        Ok(())
    }

    pub fn put(&self, at: u64, value: u64, bytes: usize) {
        pwrite(&self.file, &value.to_le_bytes()[..bytes], at).unwrap();
    }

    /// The record is refused, for a reason with `words`, and stays as it is.
    pub fn refused(&mut self, words: &str) {
        let before = content(&self.file);
        match self.restart(None) {
            Err(StartError::Record(error)) => assert!(error.to_string().contains(words), "{error}"),
            other => panic!("{other:?}"),
        }
        assert!(content(&self.file) == before);
    }
}

pub fn entry(features: u64, index: u64) -> u64 {
    if features & PACKED == 0 {
        16 + 16 * index
    } else {
        32 + 32 * index
    }
}

pub fn flying(recorded: &Recorded, features: u64) -> Vec<u64> {
    let bytes = content(&recorded.file);
    let marked = (0..SIZE.into()).filter(|&index| bytes[usize::try_from(entry(features, index)).unwrap()] == 1);
    marked.collect()
}
