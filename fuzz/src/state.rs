//! What a queue may be made of: any size, addresses, features and start state, then resets with others.
//!
//! Judged by a second opinion on which configuration is possible and which rule another one breaks; a refused reset
//! changes nothing, an accepted one begins a new generation.
//!
//! Input: configurations of 15 bytes, one after another: byte 0 is bit 0 packed, 1 IN_ORDER, 2 EVENT_IDX, 3 a start
//! state, 4 the driver end (of the first one only); byte 1 the size; then three addresses of 3 bytes; then the start state.

use virtio_test::mem::{Access, GuestMemory, Want};
use virtio_test::policy::Policy;
use virtio_test::queue::{DeviceQueue, DriverQueue, QueueConfig, QueueState, feature};
use virtio_test::rule::Rule;

use crate::setup::Bytes;
use crate::tables::{memory, unusable};

const SIZES: [u32; 16] = [
    1,
    2,
    4,
    8,
    3,
    7,
    16,
    256,
    0,
    32767,
    32768,
    32769,
    65535,
    65536,
    65537,
    u32::MAX,
];

#[derive(Clone, Copy, Debug)]
struct Choice {
    config: QueueConfig,
    state: Option<QueueState>,
    driver: bool,
}

fn address(bytes: &mut Bytes<'_>) -> Option<u64> {
    let kind = bytes.byte()?;
    let word = u64::from(bytes.word()?);
    Some(match kind % 6 {
        0 => word & 0xff0,
        1 => word % 0x2000,
        2 => 0x10000 + word % 0x1000,
        3 => (1 << 32) + (word << 12),
        4 => u64::MAX - word,
        _ => 0x2000 - (word & 0xff),
    })
}

fn choice(bytes: &mut Bytes<'_>) -> Option<Choice> {
    let flags = bytes.byte()?;
    let size = SIZES[usize::from(bytes.byte()?) % 16];
    let (desc, driver, device) = (address(bytes)?, address(bytes)?, address(bytes)?);
    let (avail, used) = (bytes.word()?, bytes.word()?);
    let names = [feature::RING_PACKED, feature::IN_ORDER, feature::EVENT_IDX];
    let chosen = (0..).zip(names).filter(|(bit, _)| flags >> bit & 1 != 0);
    Some(Choice {
        config: QueueConfig {
            size,
            desc,
            driver,
            device,
            index: 9,
            features: chosen.map(|(_, name)| name).sum(),
            policy: Policy::INTEROP,
        },
        state: (flags & 8 != 0).then_some(QueueState { avail, used }),
        driver: flags & 16 != 0,
    })
}

/// The rule that the first thing wrong with it breaks.
fn wrong(choice: &Choice, driver_end: bool) -> Option<Rule> {
    let config = &choice.config;
    let packed = config.features & feature::RING_PACKED != 0;
    match config.size {
        0 => return Some(Rule::QueueSizeZero),
        32769.. => return Some(Rule::QueueSizeTooBig),
        size if !packed && size.count_ones() != 1 => return Some(Rule::QueueSizeNotPowerOfTwo),
        _ => {}
    }
    let aligned = if packed { [16, 4, 4] } else { [16, 2, 4] };
    let areas = [config.desc, config.driver, config.device];
    if areas.iter().zip(aligned).any(|(address, align)| address % align != 0) {
        return Some(Rule::RingMisaligned);
    }
    if let Some(QueueState { avail, used }) = choice.state {
        let possible = if packed {
            let (a, u) = (u32::from(avail & 0x7fff), u32::from(used & 0x7fff));
            // In the same lap avail is not behind; a lap further it is not ahead.
            let near = if (avail ^ used) & 0x8000 == 0 { a >= u } else { a <= u };
            a < config.size && u < config.size && near
        } else {
            u32::from(avail.wrapping_sub(used)) <= config.size
        };
        if !possible || (driver_end && avail != used) {
            return Some(Rule::StateOutOfRange);
        }
    }
    let n = u64::from(config.size);
    let lengths = if packed {
        [16 * n, 4, 4]
    } else {
        [16 * n, 6 + 2 * n, 6 + 8 * n]
    };
    // A fresh driver zeroes all three areas.
    let zeroes = driver_end && choice.state.is_none();
    let writes = [packed || driver_end, driver_end, !driver_end || zeroes];
    let mut spans = areas.into_iter().zip(lengths).zip(writes);
    let bad = spans.any(|((address, len), write)| unusable(address, len, write).is_some());
    bad.then_some(Rule::RingUnmapped)
}

/// See the module's head.
pub fn run(data: &[u8]) {
    thread_local!(static MEMORY: GuestMemory = memory());
    MEMORY.with(|memory| {
        let pin = memory.pin();
        let mut bytes = Bytes(data);
        let Some(first) = choice(&mut bytes) else { return };
        if first.driver {
            driver(&pin.mapped(), &first, bytes);
        } else {
            device(&pin.mapped(), &first, bytes);
        }
    });
}

fn device<A: Access>(mem: &A, first: &Choice, mut bytes: Bytes<'_>) {
    let made = DeviceQueue::new(mem, first.config, first.state);
    assert_eq!(
        made.as_ref().err().map(|fault| fault.rule),
        wrong(first, false),
        "{first:?}"
    );
    let Ok(mut queue) = made else { return };
    while let Some(next) = choice(&mut bytes) {
        let before = (*queue.config(), queue.state(), queue.generation());
        let reset = queue.reset(mem, Some(next.config), next.state);
        assert_eq!(
            reset.as_ref().err().map(|fault| fault.rule),
            wrong(&next, false),
            "{next:?}"
        );
        let fresh = next.state.unwrap_or_else(|| QueueState::fresh(next.config.packed()));
        let after = (*queue.config(), queue.state(), queue.generation());
        let expected = if reset.is_ok() {
            (next.config, fresh, before.2 + 1)
        } else {
            before
        };
        assert_eq!(after, expected);
        assert_eq!((queue.in_flight(), queue.broken(), queue.stopped()), (0, false, false));
        life(mem, &mut queue);
    }
}

/// A queue over whatever is in memory pops or breaks, stops and goes on.
fn life<A: Access>(mem: &A, queue: &mut DeviceQueue) {
    let mut segments = Vec::new();
    assert_eq!(queue.stop(), queue.state());
    assert!(queue.stopped() && matches!(queue.pop(mem, &mut segments), Ok(None)));
    queue.resume();
    if let Ok(Some(element)) = queue.pop(mem, &mut segments) {
        assert_eq!(queue.unpop(&element.ticket()), Ok(()));
    }
    assert_eq!(queue.in_flight(), 0);
    if queue.broken() {
        let state = queue.state();
        assert_eq!(queue.stop(), state);
        assert!(
            !queue.stopped() && queue.latched().is_some(),
            "a latch is not undone by stopping"
        );
    }
    // Leave it as the next reset expects to find it, if that is refused.
    if queue.broken() {
        let config = *queue.config();
        assert!(queue.reset(mem, Some(config), None).is_ok());
    }
}

fn driver<A: Access>(mem: &A, first: &Choice, mut bytes: Bytes<'_>) {
    let made = DriverQueue::new(mem, first.config, first.state, None);
    assert_eq!(
        made.as_ref().err().map(|fault| fault.rule),
        wrong(first, true),
        "{first:?}"
    );
    let Ok(mut queue) = made else { return };
    while let Some(next) = choice(&mut bytes) {
        let token = queue.add(mem, &[(0x800, 1)], &[], false);
        assert!(token.is_ok(), "a fresh queue has room");
        let before = (*queue.config(), queue.free(), queue.in_flight(), queue.generation());
        let reset = queue.reset(mem, Some(next.config), next.state);
        assert_eq!(
            reset.as_ref().err().map(|fault| fault.rule),
            wrong(&next, true),
            "{next:?}"
        );
        let after = (*queue.config(), queue.free(), queue.in_flight(), queue.generation());
        if reset.is_ok() {
            assert_eq!((after.0, after.2, after.3), (next.config, 0, before.3 + 1));
            assert_eq!(u32::from(after.1), next.config.size);
            assert!(mem.resolve(next.config.driver, 2, Want::Write).is_ok());
        } else {
            assert_eq!(after, before);
            assert_eq!(queue.detach(), [token.unwrap_or(u64::MAX)]);
            return;
        }
    }
}
