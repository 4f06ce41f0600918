//! The quick ways through the device end beside the plain ones, on rings that are legal or broken in any way.
//!
//! `Mapped` finds the words of a ring once for a burst and buffers without a search; [`Watched`] has neither and asks the
//! seam for each. One call takes a burst, or one call each takes a chain. All of them must take the same.

use virtio_test::chain::{Element, Segment};
use virtio_test::error::Fault;
use virtio_test::mem::Access;
use virtio_test::queue::DeviceQueue;
use virtio_test_fuzz::made::Dice;
use virtio_test_fuzz::setup::{MEMORY, lay, memory, setup};
use virtio_test_fuzz::watched::Watched;

/// Everything that was taken, and what ended it; addresses instead of ways to memory.
type Taken = (Vec<Element>, Vec<(u64, u32, bool)>, Option<Fault>, String);

fn take<A: Access>(mem: &A, bytes: &[u8], packed: bool, burst: usize) -> Option<Taken> {
    let setup = setup(bytes, Some(packed))?;
    lay(mem, setup.image);
    let mut queue = DeviceQueue::new(mem, setup.config, setup.state).ok()?;
    let (mut segments, mut elements): (Vec<Segment>, Vec<Element>) = (Vec::new(), Vec::new());
    let mut fault = None;
    // Nobody uses them, so no more than the ring has can be taken, but by policies that take a head twice.
    for _ in 0..40 {
        let popped = if burst == 1 {
            let popped = queue.pop(mem, &mut segments);
            popped.map(|element| elements.extend(element))
        } else {
            let popped = queue.pop_many(mem, burst, &mut segments, &mut elements);
            popped.map(drop)
        };
        if let Err(found) = popped {
            fault = Some(found);
            break;
        }
        if elements.len() >= 24 {
            break;
        }
    }
    elements.truncate(24);
    let end = elements.last().map_or(0, |last| last.first + last.count);
    let segments = segments
        .iter()
        .take(end)
        .map(|s| (s.at.gpa, s.len, s.writable))
        .collect();
    // What is beyond the cut may be the fault that only some bursts come to.
    let fault = fault.filter(|_| elements.len() < 24);
    let state = if elements.len() < 24 {
        format!("{:?} {:?} {:?}", queue.state(), queue.counters(), queue.in_flight())
    } else {
        String::new()
    };
    Some((elements, segments, fault, state))
}

#[test]
fn every_way_takes_the_same() {
    let memory = memory();
    let pin = memory.pin();
    let mem = pin.mapped();
    let (mut chains, mut faults) = (0, 0);
    for seed in 0..4000 {
        for packed in [false, true] {
            let bytes = Dice::new(seed).ring(packed);
            let plain = {
                let watched = Watched::new(&mem);
                watched.allow([(0, MEMORY)]);
                take(&watched, &bytes, packed, 1)
            };
            for burst in [1, 2, 7, 64] {
                assert_eq!(
                    take(&mem, &bytes, packed, burst),
                    plain,
                    "seed {seed}, bursts of {burst}"
                );
            }
            if let Some((elements, _, fault, _)) = plain {
                chains += elements.len();
                faults += usize::from(fault.is_some());
            }
        }
    }
    assert!(chains > 3000 && faults > 1000, "{chains} chains, {faults} faults");
}
