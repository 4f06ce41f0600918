//! The oracles of the fuzz targets without libFuzzer: a few thousand made-up inputs for each, the same in every run.

use std::collections::BTreeMap;

use virtio_test::rule::Rule;
use virtio_test_fuzz::made::Dice;
use virtio_test_fuzz::{device, differential, driver, inflight, state, tables};

#[test]
fn both_device_ends_keep_their_promises() {
    for seed in 0..4000 {
        device::split(&Dice::new(seed).ring(false));
        device::packed(&Dice::new(seed).ring(true));
    }
}

#[test]
fn the_driver_end_keeps_its_promises() {
    for seed in 0..4000 {
        let mut dice = Dice::new(seed);
        let mut bytes = dice.bytes(4);
        bytes.extend([0, 0]);
        bytes.extend(dice.bytes(150));
        driver::run(&bytes);
    }
}

#[test]
fn a_record_of_what_is_in_flight_is_refused_or_kept() {
    for seed in 0..3000 {
        let mut dice = Dice::new(seed);
        let mut bytes = dice.ring(seed % 2 == 1);
        // After the image: an empty record, so that the device end fills it itself, or any bytes.
        let moves = bytes.split_off(6 + 700);
        let record = if dice.one_in(3) { dice.bytes(200) } else { Vec::new() };
        bytes.extend((record.len() as u16).to_le_bytes());
        bytes.extend(record);
        bytes.extend(moves);
        bytes.extend(dice.bytes(20));
        inflight::run(&bytes);
    }
}

#[test]
fn indirect_tables_are_judged_alike() {
    for seed in 0..20_000 {
        let mut dice = Dice::new(seed);
        let mut bytes = vec![dice.byte() & if dice.one_in(3) { 0xff } else { 0x13 }];
        let len = 16 * dice.below(12) + u64::from(dice.one_in(20));
        bytes.extend((len as u16).to_le_bytes());
        bytes.push(dice.byte() % if dice.one_in(3) { 12 } else { 4 });
        for index in 1..dice.below(20) {
            let flags = dice.byte() & if dice.one_in(20) { 7 } else { 3 };
            let next = if dice.one_in(9) { dice.below(13) } else { index };
            bytes.extend([
                dice.byte() % if dice.one_in(9) { 16 } else { 1 },
                dice.byte() % 3,
                flags,
                next as u8,
            ]);
        }
        tables::run(&bytes);
    }
}

#[test]
fn what_a_queue_may_be_made_of_is_judged_alike() {
    for seed in 0..20_000 {
        let mut dice = Dice::new(seed);
        let mut bytes = Vec::new();
        for _ in 0..4 {
            bytes.extend([
                dice.byte() & if dice.one_in(2) { 31 } else { 23 },
                dice.byte() & if dice.one_in(2) { 15 } else { 7 },
            ]);
            for _ in 0..3 {
                bytes.push(dice.byte() % if dice.one_in(8) { 6 } else { 1 });
                bytes.extend(dice.bytes(2));
            }
            let place = dice.byte() & 7;
            bytes.extend([
                place,
                0,
                if dice.one_in(2) { place } else { dice.byte() & 7 },
                0x80 & dice.byte(),
            ]);
        }
        state::run(&bytes);
    }
}

#[test]
fn the_virtio_queue_crate_takes_what_we_take_and_differs_as_listed() {
    let (mut equal, mut raised) = (0, BTreeMap::new());
    for seed in 0..20_000 {
        let outcome = differential::run(&Dice::new(seed).ring(false));
        equal += outcome.equal;
        if let Some(rule) = outcome.raised {
            *raised.entry(rule.name()).or_insert(0) += 1;
        }
    }
    assert!(equal > 5000, "{equal} chains were compared");
    let known = [
        Rule::AvailIdxTooFar,
        Rule::HeadOutOfRange,
        Rule::NextOutOfRange,
        Rule::ChainTooLong,
        Rule::NestedIndirect,
        Rule::IndirectBadLen,
        Rule::OutOfOrder,
        Rule::UnmappedAddress,
        Rule::AddressWraps,
        Rule::IndirectAndNext,
    ];
    for rule in known {
        assert!(
            raised.contains_key(rule.name()),
            "{} was never met: {raised:?}",
            rule.name()
        );
    }
}
