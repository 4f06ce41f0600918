//! Where the fields of a virtqueue lie (VIRTIO 1.4, 2.7 and 2.8.11 to 2.8.14).
//!
//! | split | offset | packed | offset |
//! |---|---|---|---|
//! | desc\[i\] | 16 i, aligned 16 | desc\[i\] | 16 i, aligned 16 |
//! | avail flags, idx, ring\[i\], used_event | 0, 2, 4 + 2 i, 4 + 2 size; aligned 2 | driver event: off_wrap, flags | 0, 2; aligned 4 |
//! | used flags, idx, ring\[i\], avail_event | 0, 2, 4 + 8 i, 4 + 8 size; aligned 4 | device event: off_wrap, flags | 0, 2; aligned 4 |

/// Largest size of a queue in either format (VIRTIO 1.4, 2.7 and 2.8).
pub const MAX_SIZE: u16 = 32768;

/// One field of the layout: `count` words of `size` bytes, `stride` bytes apart, the first at `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Name, as in the specification's structures.
    pub name: &'static str,
    /// Guest address of the first one.
    pub address: u64,
    /// Bytes of one.
    pub size: u64,
    /// Bytes from one to the next.
    pub stride: u64,
    /// How many there are.
    pub count: u64,
}

/// Format, size and addresses of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct RingLayout {
    /// Number of descriptors.
    pub size: u16,
    /// Packed (2.8) or split (2.7).
    pub packed: bool,
    /// Descriptor table, or descriptor ring.
    pub desc: u64,
    /// Avail ring, or driver event area.
    pub driver: u64,
    /// Used ring, or device event area.
    pub device: u64,
}

/// Of the avail ring and of the used ring alike.
pub(crate) const FLAGS: u64 = 0;
pub(crate) const AVAIL_IDX: u64 = 2;
pub(crate) const AVAIL_RING: u64 = 4;
pub(crate) const USED_IDX: u64 = 2;
pub(crate) const USED_RING: u64 = 4;
pub(crate) const EVENT_OFF_WRAP: u64 = 0;
pub(crate) const EVENT_FLAGS: u64 = 2;

impl RingLayout {
    /// The three areas one after another from `base` on; None when they leave the address space.
    #[must_use]
    pub fn contiguous(size: u16, packed: bool, base: u64) -> Option<Self> {
        let mut layout = Self {
            size,
            packed,
            desc: base,
            driver: 0,
            device: 0,
        };
        layout.driver = base.checked_add(layout.desc_bytes())?;
        layout.device = layout
            .driver
            .checked_add(layout.driver_bytes())?
            .checked_next_multiple_of(4)?;
        layout.device.checked_add(layout.device_bytes())?;
        Some(layout)
    }

    /// The layout of the legacy interface (2.7.2): a split queue whose used ring begins at the next multiple of
    /// `align` after the avail ring; None when `align` is no power of two or the queue leaves the address space.
    #[must_use]
    pub fn legacy(size: u16, base: u64, align: u64) -> Option<Self> {
        if !align.is_power_of_two() {
            return None;
        }
        let mut layout = Self::contiguous(size, false, base)?;
        let end = layout.driver.checked_add(layout.driver_bytes())?;
        layout.device = end.checked_next_multiple_of(align)?;
        layout.device.checked_add(layout.device_bytes())?;
        Some(layout)
    }

    /// Bytes of the descriptor area.
    #[must_use]
    pub const fn desc_bytes(&self) -> u64 {
        16 * self.size as u64
    }

    /// Bytes of the driver area; with `used_event` always, as 2.7.6 lays it out.
    #[must_use]
    pub const fn driver_bytes(&self) -> u64 {
        if self.packed { 4 } else { 6 + 2 * self.size as u64 }
    }

    /// Bytes of the device area; with `avail_event` always, as 2.7.8 lays it out.
    #[must_use]
    pub const fn device_bytes(&self) -> u64 {
        if self.packed { 4 } else { 6 + 8 * self.size as u64 }
    }

    /// Address and bytes of the three areas: descriptor, driver, device.
    pub(crate) const fn spans(&self) -> [(u64, u64); 3] {
        [
            (self.desc, self.desc_bytes()),
            (self.driver, self.driver_bytes()),
            (self.device, self.device_bytes()),
        ]
    }

    /// Alignment of the three areas in bytes: descriptor, driver, device (2.7, 2.8.11).
    #[must_use]
    pub const fn alignments(&self) -> [u64; 3] {
        if self.packed { [16, 4, 4] } else { [16, 2, 4] }
    }

    /// Offset of `used_event` in the driver area of a split ring.
    #[must_use]
    pub(crate) const fn used_event(&self) -> u64 {
        AVAIL_RING + 2 * self.size as u64
    }

    /// Offset of `avail_event` in the device area of a split ring.
    #[must_use]
    pub(crate) const fn avail_event(&self) -> u64 {
        USED_RING + 8 * self.size as u64
    }

    /// Every field by name.
    #[must_use]
    pub fn fields(&self) -> Vec<Field> {
        let n = u64::from(self.size);
        let f = |name, base: u64, off: u64, size, stride, count| Field {
            name,
            address: base.wrapping_add(off),
            size,
            stride,
            count,
        };
        if self.packed {
            vec![
                f("desc.addr", self.desc, 0, 8, 16, n),
                f("desc.len", self.desc, 8, 4, 16, n),
                f("desc.id", self.desc, 12, 2, 16, n),
                f("desc.flags", self.desc, 14, 2, 16, n),
                f("driver_event.off_wrap", self.driver, EVENT_OFF_WRAP, 2, 2, 1),
                f("driver_event.flags", self.driver, EVENT_FLAGS, 2, 2, 1),
                f("device_event.off_wrap", self.device, EVENT_OFF_WRAP, 2, 2, 1),
                f("device_event.flags", self.device, EVENT_FLAGS, 2, 2, 1),
            ]
        } else {
            vec![
                f("desc.addr", self.desc, 0, 8, 16, n),
                f("desc.len", self.desc, 8, 4, 16, n),
                f("desc.flags", self.desc, 12, 2, 16, n),
                f("desc.next", self.desc, 14, 2, 16, n),
                f("avail.flags", self.driver, FLAGS, 2, 2, 1),
                f("avail.idx", self.driver, AVAIL_IDX, 2, 2, 1),
                f("avail.ring", self.driver, AVAIL_RING, 2, 2, n),
                f("used_event", self.driver, self.used_event(), 2, 2, 1),
                f("used.flags", self.device, FLAGS, 2, 2, 1),
                f("used.idx", self.device, USED_IDX, 2, 2, 1),
                f("used.ring.id", self.device, USED_RING, 4, 8, n),
                f("used.ring.len", self.device, USED_RING + 4, 4, 8, n),
                f("avail_event", self.device, self.avail_event(), 2, 2, 1),
            ]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legacy_layout_pads_the_avail_ring_up_to_the_alignment() {
        // 2.7.2, virtq_size: ALIGN(16 n + 2 (3 + n)) + ALIGN(2 * 3 + 8 n).
        let round = |bytes: u64, align: u64| bytes.div_ceil(align) * align;
        for shift in 0..=15 {
            for align in [16, 64, 4096, 1 << 20] {
                let (n, base) = (1u64 << shift, 7 * align);
                let layout = RingLayout::legacy(1 << shift, base, align);
                let areas = layout.map(|layout| (layout.packed, layout.desc, layout.driver, layout.device));
                let used = base + round(16 * n + 2 * (3 + n), align);
                assert_eq!(areas, Some((false, base, base + 16 * n, used)), "{n} at {base:#x}");
            }
        }
        let top = RingLayout::legacy(1, u64::MAX - 0xfff, 4096);
        assert_eq!(top, None, "the used ring would be beyond the address space");
        let behind = |base| (RingLayout::legacy(2, base, 4), RingLayout::legacy(2, base, 16));
        assert!(
            matches!(behind(u64::MAX - 0x47), (Some(_), None)),
            "only the padded one would be"
        );
    }

    #[test]
    fn a_layout_ends_in_the_address_space() {
        // 16 + 8 + 14 bytes.
        assert!(RingLayout::contiguous(1, false, u64::MAX - 39).is_some());
        assert_eq!(RingLayout::contiguous(1, false, u64::MAX - 35), None);
    }

    #[test]
    fn an_alignment_is_a_power_of_two() {
        assert!(
            [0, 3, 4095]
                .iter()
                .all(|&align| RingLayout::legacy(8, 0, align).is_none())
        );
    }
}
