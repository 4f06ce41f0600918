// What `tests/mutants_rust.py` puts behind the core's lib.rs: the choice that stands in the place of each check.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};

/// The number of the mutant that lives here; 0 is none, and then what is reached is noted.
static ALIVE: AtomicU32 = AtomicU32::new(u32::MAX);
static REACHED: [AtomicBool; SIZE] = [const { AtomicBool::new(false) }; SIZE];

/// Small, since it stands wherever a check does.
#[inline(always)]
pub fn mutant(number: u32) -> bool {
    let alive = ALIVE.load(Relaxed);
    if alive.wrapping_add(1) > 1 { alive == number } else { first(alive, number) }
}

/// Nobody has asked yet who lives here, or nobody does.
#[cold]
#[inline(never)]
fn first(mut alive: u32, number: u32) -> bool {
    if alive == u32::MAX {
        alive = std::env::var("MUTANT")
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        ALIVE.store(alive, Relaxed);
    }
    if alive == 0 && !REACHED[number as usize].swap(true, Relaxed) {
        note(number);
    }
    alive == number
}

pub fn not<T: std::ops::Not<Output = O>, O: std::ops::Not<Output = O>>(mutant: bool, value: T) -> O {
    if mutant { !!value } else { !value }
}

/// At once, and from whatever process: tests start others, and some of those end by a signal.
fn note(number: u32) {
    if let Ok(path) = std::env::var("REACHED") {
        let file = std::fs::OpenOptions::new().create(true).append(true).open(path);
        std::io::Write::write_all(&mut file.unwrap(), format!("{number} ").as_bytes()).unwrap();
    }
}
