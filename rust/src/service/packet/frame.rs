//! A frame that was sent: read once, and judged where it then lies (VIRTIO 1.4, 5.1.9).

use super::{Finding, LONGEST, MOST_HEADER, Setup};
use crate::chain::Element;
use crate::iov::Iov;
use crate::mem::{Access, MemoryError};

/// `flags`: the checksum is to be filled in.
const NEEDS_CSUM: u8 = 1;
/// `flags` that a driver must not set: DATA_VALID and RSC_INFO.
const FORBIDDEN: u8 = 2 | 4;
/// `gso_type` of a plain packet.
const GSO_NONE: u8 = 0;
/// A frame that is received in one buffer, without any offload; the short header ends before `num_buffers` (5.1.9.3.2).
pub(super) const PLAIN: [u8; MOST_HEADER] = [0, GSO_NONE, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];

/// A rule that a frame breaks.
#[derive(Debug)]
pub(super) struct Broken {
    pub(super) rule: &'static str,
    pub(super) clause: &'static str,
    pub(super) message: String,
}

impl Broken {
    #[cold]
    const fn new(rule: &'static str, clause: &'static str, message: String) -> Self {
        Self { rule, clause, message }
    }

    /// Where it was found.
    pub(super) fn found(self, queue: u16, head: u16) -> Finding {
        let Self { rule, clause, message } = self;
        Finding {
            rule,
            clause,
            message,
            queue,
            head,
        }
    }
}

/// Room for one frame behind its header.
#[derive(Debug)]
pub(super) struct Frame(Box<[u8]>);

impl Default for Frame {
    fn default() -> Self {
        Self(vec![0; MOST_HEADER + LONGEST].into_boxed_slice())
    }
}

impl Frame {
    /// Read a chain, judge it, and make its header one to be received with. What is not passed on is read as well: whoever
    /// discards a frame has received it.
    ///
    /// # Errors
    /// The chain's memory cannot be read; and inside of it what is wrong with the frame.
    pub(super) fn read<A: Access>(
        &mut self,
        mem: &A,
        (element, iov): (&Element, Iov<'_>),
        setup: &Setup,
    ) -> Result<Result<&mut [u8], Broken>, MemoryError> {
        let length = usize::try_from(element.readable).unwrap_or(usize::MAX);
        if let Err(broken) = fits(length, setup) {
            return Ok(Err(broken));
        }
        // A header and a frame that fit are no longer than the room for them.
        let whole = self.0.get_mut(..length).unwrap_or_default();
        iov.read(mem, 0, whole)?;
        Ok(receivable(whole, setup).map(|()| whole))
    }
}

/// Whether a header asks for nothing: most do.
#[inline(always)]
pub(super) const fn asks_nothing(header: &[u8; MOST_HEADER]) -> bool {
    matches!(header, [0, GSO_NONE, ..])
}

/// Whether a chain of so many readable bytes can be a frame: looked at before anything is read.
#[inline(always)]
pub(super) fn fits(readable: usize, setup: &Setup) -> Result<(), Broken> {
    match readable.checked_sub(setup.header) {
        Some(1..) if readable - setup.header <= setup.longest => Ok(()),
        length => Err(unfit(readable, length, setup)),
    }
}

#[cold]
fn unfit(readable: usize, length: Option<usize>, setup: &Setup) -> Broken {
    match length {
        None => {
            let message = format!("{readable} bytes, the header has {}", setup.header);
            Broken::new("HeaderTooShort", "5.1.9", message)
        }
        Some(0) => Broken::new("FrameMissing", "5.1.9", "a header and no frame".to_owned()),
        // 5.1.4.2: the driver sends nothing larger than the mtu, where it knows that.
        Some(length) => {
            let message = format!("a frame of {length} bytes, at most {} can be sent", setup.longest);
            Broken::new("FrameTooLong", "5.1.4.2", message)
        }
    }
}

/// What is to be done about a frame's checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sum {
    start: u16,
    offset: u16,
}

/// Judge a header and its frame, which [`fits`], and make the header one to be received with.
#[inline(always)]
pub(super) fn receivable(whole: &mut [u8], setup: &Setup) -> Result<(), Broken> {
    match whole.first_chunk_mut::<MOST_HEADER>() {
        Some(header) if setup.header == MOST_HEADER && asks_nothing(header) => *header = PLAIN,
        _ => {
            let sum = judge(whole, setup)?;
            prepare(whole, sum, setup);
        }
    }
    Ok(())
}

/// What is to be done about the checksum of a frame whose header is good.
#[inline(never)]
fn judge(whole: &[u8], setup: &Setup) -> Result<Option<Sum>, Broken> {
    let length = whole.len().saturating_sub(setup.header);
    let (&[flags, gso_type, ..], &[start_low, start_high, offset_low, offset_high]) =
        (whole.get(..2).unwrap_or(&[0; 2]), whole.get(6..10).unwrap_or(&[0; 4]))
    else {
        return Ok(None);
    };
    // 5.1.9.2.1: no offload that was not negotiated, and ours are none but the checksum. Unknown flags are ignored.
    if flags & FORBIDDEN != 0 || gso_type != GSO_NONE {
        let message = format!("flags {flags:#x}, gso_type {gso_type:#x}, and no such offload was negotiated");
        return Err(Broken::new("OffloadNotNegotiated", "5.1.9.2.1", message));
    }
    if flags & NEEDS_CSUM == 0 {
        return Ok(None);
    }
    if !setup.checksum {
        let message = "NEEDS_CSUM, and CSUM was not negotiated".to_owned();
        return Err(Broken::new("OffloadNotNegotiated", "5.1.9.2.1", message));
    }
    let sum = Sum {
        start: u16::from_le_bytes([start_low, start_high]),
        offset: u16::from_le_bytes([offset_low, offset_high]),
    };
    // Two 16-bit numbers, added where they cannot wrap; the sum's own two bytes lie in the frame.
    if usize::from(sum.start) + usize::from(sum.offset) + 2 > length {
        let message = format!(
            "csum_start {} and csum_offset {} in a frame of {length} bytes",
            sum.start, sum.offset
        );
        return Err(Broken::new("ChecksumBeyondFrame", "5.1.9.2.1", message));
    }
    Ok(Some(sum))
}

fn prepare(whole: &mut [u8], sum: Option<Sum>, setup: &Setup) {
    let Some((header, frame)) = whole.split_at_mut_checked(setup.header) else {
        return;
    };
    received(header);
    match (sum, setup.guest_checksum) {
        (Some(Sum { start, offset }), true) => {
            if let Some([flags, ..]) = header.get_mut(..1) {
                *flags = NEEDS_CSUM;
            }
            if let Some(fields) = header.get_mut(6..10) {
                let ([a, b], [c, d]) = (start.to_le_bytes(), offset.to_le_bytes());
                fields.copy_from_slice(&[a, b, c, d]);
            }
        }
        (Some(sum), false) => complete(frame, sum),
        (None, _) => {}
    }
}

/// Make it a header of a frame that is received in one buffer, without any offload (5.1.9.3.2).
pub(super) fn received(header: &mut [u8]) {
    for (byte, plain) in header.iter_mut().zip(PLAIN) {
        *byte = plain;
    }
}

/// Fill in a checksum: the sum of 16-bit words from `start` on, in ones' complement.
fn complete(frame: &mut [u8], sum: Sum) {
    let summed = frame.get(usize::from(sum.start)..).unwrap_or_default();
    // At most 32777 words of 16 bits: the sum fits 32 bits.
    let mut total: u32 = summed
        .chunks(2)
        .map(|word| match *word {
            [high, low] => u32::from(u16::from_be_bytes([high, low])),
            [high] => u32::from(high) << 8,
            _ => 0,
        })
        .sum();
    while total >> 16 != 0 {
        total = (total & 0xFFFF) + (total >> 16);
    }
    let at = usize::from(sum.start) + usize::from(sum.offset);
    if let Some(place) = frame.get_mut(at..at + 2) {
        let [_, _, high, low] = (!total & 0xFFFF).to_be_bytes();
        place.copy_from_slice(&[high, low]);
    }
}
