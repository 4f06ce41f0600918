//! The split device end beside the virtio-queue crate, over one and the same memory.
//!
//! Where both accept, all is equal: heads, descriptors but those of no bytes (which become no segment here), used entries,
//! `used.idx`, `avail_event`, and whether to notify. Where we raise, the crate does one of these, and nothing else:
//!
//! | our rule | the crate |
//! |---|---|
//! | `AvailIdxTooFar` | refuses too: `InvalidAvailRingIndex` |
//! | `HeadOutOfRange` | a chain of no descriptors |
//! | `NextOutOfRange`, `ChainTooLong`, `NestedIndirect`, `IndirectBadLen`, `ChainTooBig` | cuts the chain short there, silently |
//! | `OutOfOrder`, `UnmappedAddress`, `AddressWraps` | hands it out as it is, or cuts it short where lengths leave 32 bits |
//! | `IndirectAndNext`, `IndirectTooLong` | walks the table |
//! | `IndirectUnmapped` | walks the table as far as it is mapped |
//!
//! Input as in `setup`; format, features but EVENT_IDX, and the policy are fixed: what the crate knows. Moves: bit 0 of a
//! byte is half of the writable bytes as length; with bit 1 a change of memory follows once all is taken.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Error, Queue, QueueOwnedT, QueueT};
use virtio_test::chain::{Element, Segment};
use virtio_test::mem::{Access, At, Backing, GuestMemory, RegionSpec};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, QueueConfig, QueueState, feature};
use virtio_test::ring::RingLayout;
use virtio_test::rule::Rule;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::setup::{MEMORY, lay, overlay, setup};

/// What both see.
struct Shared {
    ours: GuestMemory,
    theirs: GuestMemoryMmap,
}

impl Shared {
    fn new() -> Self {
        let region = RegionSpec {
            gpa: 0,
            size: MEMORY,
            backing: Backing::Memfd,
        };
        let ours = GuestMemory::new(vec![region], None).expect("fresh memory can be mapped");
        let regions = ours.regions();
        let fd: &Arc<OwnedFd> = regions[0].fd().expect("a memfd has one");
        let file = File::from(fd.try_clone().expect("one more descriptor"));
        let range = (
            GuestAddress(0),
            usize::try_from(MEMORY).expect("it is small"),
            Some(FileOffset::new(file, regions[0].offset())),
        );
        let theirs = GuestMemoryMmap::from_ranges_with_files([range]).expect("it can be mapped twice");
        Self { ours, theirs }
    }
}

struct Play<'a, A> {
    mem: &'a A,
    memory: &'a GuestMemoryMmap,
    layout: RingLayout,
    event_idx: bool,
    ours: DeviceQueue,
    theirs: Queue,
    /// Whether the driver was considered for a notification before: the first time we always notify.
    signalled: bool,
}

/// How a run ended, for those who count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Chains that both took, the same.
    pub equal: u32,
    /// The rule where we stopped, if we did.
    pub raised: Option<Rule>,
}

/// See the module's head.
pub fn run(data: &[u8]) -> Outcome {
    thread_local!(static SHARED: Shared = Shared::new());
    SHARED.with(|shared| play(&shared.ours.pin().mapped(), &shared.theirs, data).unwrap_or_default())
}

fn play<A: Access>(mem: &A, memory: &GuestMemoryMmap, data: &[u8]) -> Option<Outcome> {
    let mut setup = setup(data, Some(false))?;
    lay(mem, setup.image);
    let event_idx = setup.config.has(feature::EVENT_IDX);
    let config = QueueConfig {
        features: feature::INDIRECT_DESC | if event_idx { feature::EVENT_IDX } else { 0 },
        policy: Policy::INTEROP,
        ..setup.config
    };
    let state = setup.state.unwrap_or(QueueState::fresh(false));
    let layout = setup.layout;
    let mut theirs = Queue::new(layout.size).expect("a size of 1 to 8");
    theirs
        .try_set_desc_table_address(GuestAddress(layout.desc))
        .expect("aligned");
    theirs
        .try_set_avail_ring_address(GuestAddress(layout.driver))
        .expect("aligned");
    theirs
        .try_set_used_ring_address(GuestAddress(layout.device))
        .expect("aligned");
    theirs.set_next_avail(state.avail);
    theirs.set_next_used(state.used);
    theirs.set_event_idx(event_idx);
    theirs.set_ready(true);
    assert!(theirs.is_valid(memory));
    let mut ours = DeviceQueue::new(mem, config, Some(state)).expect("the ring is mapped");
    ours.disable_kicks(mem).expect("the ring is mapped");
    let mut play = Play {
        mem,
        memory,
        layout,
        event_idx,
        ours,
        theirs,
        signalled: false,
    };
    let mut outcome = Outcome::default();
    for _ in 0..24 {
        let mut segments = Vec::new();
        let popped = play.ours.pop(mem, &mut segments);
        let refused = play.theirs.iter(memory).err();
        let chain = play.theirs.pop_descriptor_chain(memory);
        let what = setup.moves.byte();
        match popped {
            Ok(Some(element)) => {
                let chain = chain.expect("the crate takes it too");
                assert_eq!(chain.head_index(), element.head);
                play.same(&segments, chain);
                play.complete(&element, what.unwrap_or(0));
                outcome.equal += 1;
            }
            Ok(None) => {
                assert!(refused.is_none() && chain.is_none(), "the crate finds nothing either");
                play.ask();
                let Some(what) = what.filter(|what| what & 2 != 0) else {
                    break;
                };
                let (place, bytes) = setup.moves.overlay(what);
                overlay(mem, place, bytes);
            }
            Err(fault) => {
                let descs: Option<Vec<_>> = chain.map(|chain| chain.collect());
                differs(fault.rule, refused.as_ref(), descs.as_deref());
                outcome.raised = Some(fault.rule);
                break;
            }
        }
    }
    Some(outcome)
}

/// One of the differences of the table above.
fn differs(rule: Rule, refused: Option<&Error>, descs: Option<&[Descriptor]>) {
    if rule == Rule::AvailIdxTooFar {
        assert!(matches!(refused, Some(Error::InvalidAvailRingIndex)) && descs.is_none());
        return;
    }
    let descs = descs.expect("the crate hands out some chain");
    let beyond = |desc: &Descriptor| {
        let end = desc.addr().0.checked_add(u64::from(desc.len()));
        desc.len() > 0 && end.is_none_or(|end| end > MEMORY)
    };
    let late = |pair: &[Descriptor]| pair[0].is_write_only() && !pair[1].is_write_only();
    let good = !descs.iter().any(beyond) && !descs.windows(2).any(late);
    let cut = descs.last().is_none_or(Descriptor::has_next);
    match rule {
        Rule::HeadOutOfRange => assert!(descs.is_empty()),
        Rule::NextOutOfRange | Rule::ChainTooLong | Rule::NestedIndirect | Rule::IndirectBadLen | Rule::ChainTooBig => {
            assert!(good && cut, "{rule:?}: {descs:?}");
        }
        Rule::OutOfOrder => assert!(descs.windows(2).any(late) || cut, "{descs:?}"),
        Rule::UnmappedAddress | Rule::AddressWraps => assert!(descs.iter().any(beyond) || cut, "{descs:?}"),
        Rule::IndirectAndNext | Rule::IndirectTooLong | Rule::IndirectUnmapped => {}
        other => panic!("no difference that is known: {other:?}, {descs:?}"),
    }
}

impl<A: Access> Play<'_, A> {
    fn same(&self, segments: &[Segment], chain: impl Iterator<Item = Descriptor>) {
        let mut ours = segments.iter().map(|s| (s.at.gpa, s.len, s.writable));
        for desc in chain.filter(|desc| desc.len() > 0) {
            assert_eq!(ours.next(), Some((desc.addr().0, desc.len(), desc.is_write_only())));
        }
        assert_eq!(ours.next(), None, "the crate's chain is shorter");
    }

    fn load(&self, address: u64) -> u16 {
        self.mem
            .load_u16(At::unresolved(address), 0)
            .expect("the ring is mapped")
    }

    /// Both use the chain; the second one finds no trace of the first.
    fn complete(&mut self, element: &Element, what: u8) {
        let slot = u64::from(self.ours.state().used & (self.layout.size - 1));
        let (idx, entry) = (self.layout.device + 2, self.layout.device + 4 + 8 * slot);
        let written = if what & 1 == 0 {
            element.writable
        } else {
            element.writable / 2
        };
        let mem = self.mem;
        let read = || {
            let mut bytes = [0; 8];
            mem.read(At::unresolved(entry), 0, &mut bytes)
                .expect("the ring is mapped");
            (bytes, mem.load_u16(At::unresolved(idx), 0))
        };
        let before = read();
        assert_eq!(self.ours.complete(self.mem, &element.ticket(), written), Ok(true));
        self.ours.publish(self.mem).expect("the ring is mapped");
        let mine = read();
        self.mem
            .write(At::unresolved(entry), 0, &before.0)
            .expect("the ring is mapped");
        let idx_before = before.1.expect("the ring is mapped");
        mem.store_u16(At::unresolved(idx), 0, idx_before)
            .expect("the ring is mapped");
        let written = u32::try_from(written).expect("memory is small");
        self.theirs
            .add_used(self.memory, element.head, written)
            .expect("the ring is mapped");
        assert_eq!(read(), mine, "used entry and idx");
        assert_eq!(self.theirs.next_used(), self.ours.state().used);
        if self.event_idx {
            let ours = self.ours.wants_call(self.mem).expect("the ring is mapped");
            let theirs = self.theirs.needs_notification(self.memory).expect("the ring is mapped");
            assert_eq!(ours, theirs || !self.signalled, "whether to notify");
            self.signalled = true;
        }
    }

    /// Nothing is left: both ask for a kick, and for none again.
    fn ask(&mut self) {
        let event = self.layout.device + 4 + 8 * u64::from(self.layout.size);
        let ours = self.ours.enable_kicks(self.mem).expect("the ring is mapped");
        let mine = (self.load(event), self.load(self.layout.device));
        assert_eq!(
            self.theirs.enable_notification(self.memory).ok(),
            Some(ours),
            "something is available"
        );
        if self.event_idx {
            assert_eq!(self.load(event), mine.0, "avail_event");
        } else {
            assert_eq!(self.load(self.layout.device) & 1, mine.1 & 1, "used.flags");
        }
        self.ours.disable_kicks(self.mem).expect("the ring is mapped");
        self.theirs
            .disable_notification(self.memory)
            .expect("the ring is mapped");
    }
}
