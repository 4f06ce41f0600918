//! See `virtio_test_fuzz::device`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio_test_fuzz::device::split(data));
