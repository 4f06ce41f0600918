//! What must hold at both ends of a queue whatever the bytes are: one module for each fuzz target.
//!
//! # Theory
//!
//! Every target is a function from bytes that panics when something is wrong; libFuzzer calls it with bytes that it
//! makes up (`targets/`), tests call it with bytes from elsewhere. A run begins by choosing a queue (`setup`), and reaches
//! memory through [`watched::Watched`], which counts loads and knows where stores may go. Memory is made once for each
//! process: mapping is slower than the code under test.

pub mod device;
pub mod differential;
pub mod driver;
pub mod inflight;
pub mod made;
pub mod setup;
pub mod state;
pub mod tables;
pub mod watched;

/// What a target is.
pub type Target = fn(&[u8]);

/// Every target by its name.
pub const TARGETS: [(&str, Target); 7] = [
    ("device_split", device::split),
    ("device_packed", device::packed),
    ("driver_end", driver::run),
    ("inflight_record", inflight::run),
    ("tables", tables::run),
    ("state", state::run),
    ("differential", |data| {
        differential::run(data);
    }),
];
