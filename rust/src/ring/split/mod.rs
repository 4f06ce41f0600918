//! The split virtqueue (VIRTIO 1.4, 2.7).
//!
//! Free-running 16-bit indices count entries of the avail and used rings; an entry lies at `index & (size - 1)`.
//! The driver publishes by storing `avail.idx`, the device by storing `used.idx`, each with release ordering
//! after the entries (2.7.13.3.1, 2.7.8.2); the reader loads with acquire ordering.

mod device;
mod driver;

pub(crate) use device::SplitDevice;
pub(crate) use driver::SplitDriver;
