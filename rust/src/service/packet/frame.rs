//! What a header says of a frame, and whether it may (VIRTIO 1.4, 5.1.9).

use super::Setup;

/// `flags`: the checksum is to be filled in.
const NEEDS_CSUM: u8 = 1;
/// `flags` that a driver must not set: DATA_VALID and RSC_INFO.
const FORBIDDEN: u8 = 2 | 4;
/// `gso_type` of a plain packet.
const GSO_NONE: u8 = 0;

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
}

/// Whether a chain of so many readable bytes can be a frame: looked at before anything is read.
pub(super) fn fits(readable: usize, setup: &Setup) -> Result<(), Broken> {
    let Some(length) = readable.checked_sub(setup.header) else {
        let message = format!("{readable} bytes, the header has {}", setup.header);
        return Err(Broken::new("HeaderTooShort", "5.1.9", message));
    };
    if length == 0 {
        let message = "a header and no frame".to_owned();
        return Err(Broken::new("FrameMissing", "5.1.9", message));
    }
    // 5.1.4.2: the driver sends nothing larger than the mtu, where it knows that.
    if length > setup.longest {
        let message = format!("a frame of {length} bytes, at most {} can be sent", setup.longest);
        return Err(Broken::new("FrameTooLong", "5.1.4.2", message));
    }
    Ok(())
}

/// What is to be done about a frame's checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sum {
    start: u16,
    offset: u16,
}

/// A header that was found good.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// Bytes of the frame behind it.
    pub(super) length: usize,
    sum: Option<Sum>,
}

/// Judge a header and its frame, which [`fits`].
pub(super) fn judge(whole: &[u8], setup: &Setup) -> Result<Header, Broken> {
    let length = whole.len().saturating_sub(setup.header);
    let (&[flags, gso_type, ..], &[start_low, start_high, offset_low, offset_high]) =
        (whole.get(..2).unwrap_or(&[0; 2]), whole.get(6..10).unwrap_or(&[0; 4]))
    else {
        return Ok(Header { length, sum: None });
    };
    // 5.1.9.2.1: no offload that was not negotiated, and ours are none but the checksum. Unknown flags are ignored.
    if flags & FORBIDDEN != 0 || gso_type != GSO_NONE {
        let message = format!("flags {flags:#x}, gso_type {gso_type:#x}, and no such offload was negotiated");
        return Err(Broken::new("OffloadNotNegotiated", "5.1.9.2.1", message));
    }
    if flags & NEEDS_CSUM == 0 {
        return Ok(Header { length, sum: None });
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
    Ok(Header { length, sum: Some(sum) })
}

impl Header {
    /// Make the header before a frame that was read one that it can be received with; both, in one piece.
    pub(super) fn prepare<'a>(&self, bytes: &'a mut [u8], setup: &Setup) -> &'a mut [u8] {
        let whole = bytes.get_mut(..setup.header + self.length).unwrap_or_default();
        let Some((header, frame)) = whole.split_at_mut_checked(setup.header) else {
            return whole;
        };
        header.fill(0);
        match (self.sum, setup.guest_checksum) {
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
        whole
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
