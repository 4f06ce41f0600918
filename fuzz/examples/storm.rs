//! One target without libFuzzer, as fast as it goes: inputs of its corpus, changed at random.
//!
//!     storm TARGET SECONDS SEED CORPUS...
//!
//! Prints how many inputs there were. An input that fails is written to `storm-TARGET-SEED`, and ends it.

use std::cell::RefCell;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use std::{env, fs};

use virtio_test_fuzz::TARGETS;
use virtio_test_fuzz::made::Dice;

/// Inputs between two looks at the clock.
const BATCH: u64 = 4096;
const ROOM: usize = 1400;

thread_local!(static INPUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) });

fn corpus(folders: &[String]) -> Vec<Vec<u8>> {
    let files = folders
        .iter()
        .flat_map(|folder| fs::read_dir(folder).into_iter().flatten().flatten());
    let mut inputs: Vec<_> = files.filter_map(|file| fs::read(file.path()).ok()).collect();
    inputs.push(vec![0; 8]);
    inputs.sort();
    inputs
}

fn main() -> ExitCode {
    let args: Vec<String> = env::args().skip(1).collect();
    let [target, seconds, seed, folders @ ..] = args.as_slice() else {
        eprintln!("storm TARGET SECONDS SEED CORPUS...");
        return ExitCode::from(2);
    };
    let found = TARGETS.iter().find(|(name, _)| name == target);
    let (Some(&(name, run)), Ok(seconds), Ok(seed)) = (found, seconds.parse(), seed.parse()) else {
        eprintln!("storm: no target {target}, or no number of seconds, or no seed");
        return ExitCode::from(2);
    };
    let last = format!("storm-{name}-{seed}");
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        usual(info);
        INPUT.with_borrow(|input| drop(fs::write(&last, input)));
        std::process::exit(1);
    }));
    let inputs = corpus(folders);
    let mut dice = Dice::new(seed);
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..BATCH {
            let one = &inputs[dice.below(inputs.len() as u64) as usize];
            let other = &inputs[dice.below(inputs.len() as u64) as usize];
            INPUT.with_borrow_mut(|input| {
                input.clone_from(one);
                dice.change(input, other, ROOM);
            });
            INPUT.with_borrow(|input| run(input));
        }
        count += BATCH;
    }
    println!(
        "{name}: {count} inputs from {} in {:.1} s",
        inputs.len(),
        start.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}
