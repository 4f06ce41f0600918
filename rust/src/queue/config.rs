//! What a queue is made of, validated: nothing of it changes while the queue lives (2.7, 2.8, 4.1.4.3).

use crate::chain::ChainRules;
use crate::error::Fault;
use crate::policy::Policy;
use crate::ring::{MAX_SIZE, RingLayout};
use crate::rule::Rule;

/// Feature bits that change how a queue works (VIRTIO 1.4, 6).
pub mod feature {
    /// `VIRTIO_F_NOTIFY_ON_EMPTY` of the legacy interface (6.3); a bit of the device class beside `VERSION_1`.
    pub const NOTIFY_ON_EMPTY: u64 = 1 << 24;
    /// `VIRTIO_F_INDIRECT_DESC`.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// `VIRTIO_F_EVENT_IDX`.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// `VIRTIO_F_VERSION_1`.
    pub const VERSION_1: u64 = 1 << 32;
    /// `VIRTIO_F_RING_PACKED`.
    pub const RING_PACKED: u64 = 1 << 34;
    /// `VIRTIO_F_IN_ORDER`.
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Size, addresses, features and policy of one queue, as the other side or our caller gave them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueConfig {
    /// Number of descriptors, not yet checked.
    pub size: u32,
    /// Descriptor area.
    pub desc: u64,
    /// Driver area.
    pub driver: u64,
    /// Device area.
    pub device: u64,
    /// Number of the queue in its device.
    pub index: u16,
    /// Negotiated feature bits.
    pub features: u64,
    /// Tolerances towards the other side.
    pub policy: Policy,
}

impl QueueConfig {
    /// Whether a feature was negotiated.
    #[must_use]
    pub const fn has(&self, bit: u64) -> bool {
        self.features & bit != 0
    }

    /// Whether the ring is packed.
    #[must_use]
    pub const fn packed(&self) -> bool {
        self.has(feature::RING_PACKED)
    }

    /// Whether a device that runs out of available buffers says so whatever the driver suppressed (6.3).
    #[must_use]
    pub const fn notify_on_empty(&self) -> bool {
        self.has(feature::NOTIFY_ON_EMPTY) && !self.has(feature::VERSION_1)
    }

    /// What the walk of a chain needs to know.
    pub(crate) const fn rules(&self, size: u16) -> ChainRules {
        ChainRules {
            policy: self.policy,
            packed: self.packed(),
            queue: self.index,
            size,
            indirect: self.has(feature::INDIRECT_DESC),
        }
    }

    /// The layout, when size and alignment are possible.
    ///
    /// # Errors
    /// `QueueSizeZero`, `QueueSizeTooBig`, `QueueSizeNotPowerOfTwo`, `RingMisaligned`.
    pub fn layout(&self) -> Result<RingLayout, Fault> {
        let rules = self.rules(0);
        // 2.7, 2.8: 1 to 32768 descriptors; a power of two in the split format.
        if self.size == 0 {
            return Err(rules.fault(Rule::QueueSizeZero, "the queue has size 0".to_owned()));
        }
        let Some(size) = u16::try_from(self.size).ok().filter(|&size| size <= MAX_SIZE) else {
            let message = format!("the queue has size {}, at most {MAX_SIZE} is possible", self.size);
            return Err(rules.fault(Rule::QueueSizeTooBig, message));
        };
        if !self.packed() && !size.is_power_of_two() {
            let message = format!("the split queue has size {size}, which is no power of two");
            return Err(rules.fault(Rule::QueueSizeNotPowerOfTwo, message));
        }
        let layout = RingLayout {
            size,
            packed: self.packed(),
            desc: self.desc,
            driver: self.driver,
            device: self.device,
        };
        // 2.7.1, 2.8.11: alignment of the three areas.
        let areas = [
            ("descriptor", self.desc),
            ("driver", self.driver),
            ("device", self.device),
        ];
        for ((name, address), align) in areas.into_iter().zip(layout.alignments()) {
            if address % align != 0 {
                let message = format!("the {name} area at {address:#x} is not aligned to {align} bytes");
                let mut fault = rules.fault(Rule::RingMisaligned, message);
                fault.address = Some(address);
                return Err(fault);
            }
        }
        Ok(layout)
    }

    /// The state to begin with, when it is possible for this layout.
    ///
    /// # Errors
    /// `StateOutOfRange`.
    pub(crate) fn start(&self, layout: &RingLayout, state: Option<QueueState>) -> Result<QueueState, Fault> {
        let Some(state) = state else {
            return Ok(QueueState::fresh(self.packed()));
        };
        let rules = self.rules(layout.size);
        // 2.8.1: an offset lies in the ring. 2.7.6, 2.7.8: not more in flight than the ring has entries.
        for (name, bits) in [("avail", state.avail), ("used", state.used)] {
            if self.packed() && bits & 0x7fff >= layout.size {
                let message = format!("{name} offset {} is beyond a ring of {}", bits & 0x7fff, layout.size);
                return Err(rules.fault(Rule::StateOutOfRange, message));
            }
        }
        let ahead = if self.packed() {
            // Places lie on a circle of two laps; the second one has the wrap counter 0.
            let place =
                |bits: u16| u32::from(bits & 0x7fff) + if bits & 0x8000 == 0 { u32::from(layout.size) } else { 0 };
            let circle = 2 * u32::from(layout.size);
            (place(state.avail) + circle - place(state.used)) % circle
        } else {
            u32::from(state.avail.wrapping_sub(state.used))
        };
        if ahead > u32::from(layout.size) {
            let message = format!(
                "avail {:#x} and used {:#x} are further apart than the {} entries of the ring",
                state.avail, state.used, layout.size
            );
            return Err(rules.fault(Rule::StateOutOfRange, message));
        }
        Ok(state)
    }
}

/// Where a queue stands: split, free-running indices; packed, offset with the wrap counter in bit 15.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct QueueState {
    /// Next entry to make available or to pop.
    pub avail: u16,
    /// Next entry to use or to take.
    pub used: u16,
}

impl QueueState {
    /// Of a ring that was never used: wrap counters begin at 1 (2.8.1).
    #[must_use]
    pub const fn fresh(packed: bool) -> Self {
        let bits = if packed { 0x8000 } else { 0 };
        Self {
            avail: bits,
            used: bits,
        }
    }
}
