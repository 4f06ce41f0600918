//! The core of virtio-test: guest memory, both virtqueue formats, both ends of each.
//!
//! The core knows nothing of Python; only `py`, behind the feature `python`, does. What may be assumed, and
//! what must never be, is written in `SAFETY.md`.

pub mod chain;
pub mod error;
pub mod inflight;
pub mod iov;
pub mod mem;
pub mod notify;
pub mod policy;
pub mod poller;
#[cfg(feature = "python")]
mod py;
pub mod queue;
pub mod ring;
pub mod rule;
pub mod service;
pub mod worker;
