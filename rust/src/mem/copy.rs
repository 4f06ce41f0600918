//! Copies between guest memory and ours: short ones in line, by words.
//!
//! # Theory
//!
//! A header or an answer of some dozen bytes costs less than calling whoever copies any number of them. A word from the
//! start and a word up to the end cover everything from one to two words, where they overlap as well. Both are loaded before
//! one is stored, so the two places may overlap too, as they may in a long copy.

/// Copy `len` bytes, as `memmove` does.
///
/// # Safety
/// `src` is valid for reads of `len` bytes and `dst` for writes. Either may be guest memory, which the other side changes
/// meanwhile: the racing bulk copy of M4.
#[inline(always)]
pub(super) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    match len {
        // What is long is not kept waiting by the questions for the rest.
        // SAFETY: our caller's promise, here and below; M4 for races.
        65.. | 0..=3 => unsafe { src.copy_to(dst, len) },
        // SAFETY: two words begin in each half.
        33..=64 => unsafe { words::<u128, 4>(src, dst, [0, 16, len.wrapping_sub(32), len.wrapping_sub(16)]) },
        // SAFETY: the last word ends where the bytes do, here and below.
        16..=32 => unsafe { words::<u128, 2>(src, dst, [0, len.wrapping_sub(16)]) },
        // SAFETY: as above.
        8..=15 => unsafe { words::<u64, 2>(src, dst, [0, len.wrapping_sub(8)]) },
        // SAFETY: as above.
        4..=7 => unsafe { words::<u32, 2>(src, dst, [0, len.wrapping_sub(4)]) },
    }
}

/// Copy the words at these offsets, which cover everything.
///
/// # Safety
/// As [`copy`], for a `W` from each offset on; any bytes are a value of it.
#[inline(always)]
unsafe fn words<W: Copy, const N: usize>(src: *const u8, dst: *mut u8, offsets: [usize; N]) {
    // SAFETY: our caller's promise.
    let words = offsets.map(|off| unsafe { src.wrapping_add(off).cast::<W>().read_unaligned() });
    for (off, word) in offsets.into_iter().zip(words) {
        // SAFETY: as above, of `dst`.
        unsafe { dst.wrapping_add(off).cast::<W>().write_unaligned(word) };
    }
}

#[cfg(test)]
mod tests {
    use super::copy;

    const ROOM: usize = 200;

    #[test]
    fn every_length_arrives_whole_and_touches_nothing_beside_it() {
        for len in 0..=100 {
            let bytes: Vec<u8> = (1..=255).collect();
            let mut room = [0u8; ROOM];
            // SAFETY: `bytes` has 255, and `room` has 200 with 50 before.
            unsafe { copy(bytes.as_ptr(), room.as_mut_ptr().wrapping_add(50), len) };
            let expected = std::iter::repeat_n(0, 50).chain(bytes.iter().copied().take(len));
            assert!(expected.chain(std::iter::repeat(0)).take(ROOM).eq(room), "{len} bytes");
        }
    }

    #[test]
    fn places_may_overlap_either_way() {
        for (len, from, to) in (0..=100).flat_map(|len| (0..=100).map(move |to| (len, 50, to))) {
            let mut room: Vec<u8> = (0..=255).collect();
            let mut expected = room.clone();
            expected.copy_within(from..from + len, to);
            let base = room.as_mut_ptr();
            // SAFETY: both places lie in the 256 bytes.
            unsafe { copy(base.wrapping_add(from).cast_const(), base.wrapping_add(to), len) };
            assert_eq!(room, expected, "{len} bytes from {from} to {to}");
        }
    }
}
