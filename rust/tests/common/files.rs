//! Files of another side, which it can cut short under a region.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use virtio_test::mem::{Backing, MemoryError, RegionSpec};

pub fn file(size: u64) -> OwnedFd {
    let fd = memfd_create("lost", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fd
}

pub fn received(gpa: u64, size: u64, fd: &OwnedFd) -> RegionSpec {
    RegionSpec {
        gpa,
        size,
        backing: Backing::Received {
            fd: fd.try_clone().unwrap(),
            offset: 0,
            writable: true,
        },
    }
}

pub fn lost<T>(gpa: u64) -> Result<T, MemoryError> {
    Err(MemoryError::Lost { gpa })
}
