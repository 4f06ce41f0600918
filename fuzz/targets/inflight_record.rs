//! See `virtio_test_fuzz::inflight`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| virtio_test_fuzz::inflight::run(data));
