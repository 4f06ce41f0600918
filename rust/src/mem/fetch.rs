//! Hints to the processor: lines that are about to be used.
//!
//! Where the other end runs on another core, each line that it has written takes as long to come as a hundred instructions,
//! and one after the other as long as they are asked for one after the other.

#[cfg(target_arch = "x86_64")]
use std::arch::{
    asm,
    x86_64::{_MM_HINT_T0, _mm_prefetch},
};

use super::Want;

/// Have the cache line of `ptr` come, to be written to or only to be read. On other processors nothing happens.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(super) fn fetch(ptr: *mut u8, want: Want) {
    if want == Want::Write {
        // Of the intrinsic the compiler makes a fetch for reading, and the line would come twice.
        // SAFETY: a hint accesses nothing as the language sees it, and faults at no address; processors that do not know it
        // do nothing.
        unsafe { asm!("prefetchw [{}]", in(reg) ptr, options(nostack, preserves_flags, readonly)) };
    } else {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(ptr.cast_const().cast()) };
    }
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
pub(super) const fn fetch(_ptr: *mut u8, _want: Want) {}
