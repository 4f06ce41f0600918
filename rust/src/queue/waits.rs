//! A chain that cannot be read yet, because the memory of an IOMMU lacks a translation.
//!
//! # Theory
//!
//! That breaks no rule: the chain stays in the ring, where the next pop finds it again, and whoever can ask for the
//! translation is told once. Until another table is in place there is nothing to look for. What rule the chain breaks
//! if the translation is refused is kept with it.

use crate::error::Fault;

#[derive(Debug)]
struct Wait {
    fault: Fault,
    /// Of the table in which it was looked for.
    epoch: u64,
    told: bool,
}

/// What a queue waits for, if anything.
#[derive(Debug, Default)]
pub(super) struct Waits(Option<Wait>);

impl Waits {
    /// What a pop that failed broke: nothing, if all that it lacks is a translation.
    #[cold]
    #[inline(never)]
    pub(super) fn judge(&mut self, epoch: u64, fault: Fault) -> Option<Fault> {
        if fault.missing.is_some() {
            self.wait(epoch, fault);
            return None;
        }
        self.0 = None;
        Some(fault)
    }

    /// Whether it waits for nothing.
    #[inline(always)]
    pub(super) const fn is_none(&self) -> bool {
        self.0.is_none()
    }

    /// A pop lacked nothing.
    #[inline(always)]
    pub(super) fn clear(&mut self) {
        if self.0.is_some() {
            self.0 = None;
        }
    }

    #[cold]
    #[inline(never)]
    fn wait(&mut self, epoch: u64, fault: Fault) {
        let known = self.0.as_ref().is_some_and(|wait| wait.fault.missing == fault.missing);
        let told = known && self.0.as_ref().is_some_and(|wait| wait.told);
        self.0 = Some(Wait { fault, epoch, told });
    }

    /// The rule that is broken if it does not come.
    pub(super) fn fault(&self) -> Option<&Fault> {
        self.0.as_ref().map(|wait| &wait.fault)
    }

    /// Whether nothing can have come since.
    pub(super) fn still(&self, epoch: u64) -> bool {
        self.0.as_ref().is_some_and(|wait| wait.epoch == epoch)
    }

    /// Whether nobody has been told.
    pub(super) fn tell(&mut self) -> bool {
        self.0
            .as_mut()
            .is_some_and(|wait| !std::mem::replace(&mut wait.told, true))
    }
}
