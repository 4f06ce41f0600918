//! The core beside other people's: what `python -m benches core` runs.
//!
//! `run CASE` sets a case up and measures one round for each line that it reads, so that whoever asks decides when, and
//! prints `{"ours", "peer"}`. `spin ours|peer ROUNDS CASE` runs one side of a device end only, for profilers, and prints how
//! many chains that were. A case is five words: what (`device:iter`, `device:pop`, `device:reader`, `driver`, `cores:pop`,
//! `cores:reader`, `flat:RING`), its RING (`split:128:1:0`: format, size, regions, chains that it has had), a shape, chains per burst, and
//! `copy` or `plain`.

#![allow(missing_docs, unreachable_pub, reason = "a program, and nobody's library")]

mod cases;
mod cores;
mod device;
mod driver;
mod ends;
mod shape;
mod world;

use std::io::BufRead;
use std::process::ExitCode;

use cases::{Case, What};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match arguments[..] {
        ["run", what, ring, shape, burst, copies] => parse([what, ring, shape, burst, copies]).and_then(run),
        ["spin", side, rounds, what, ring, shape, burst, copies] => {
            parse([what, ring, shape, burst, copies]).and_then(|case| spin(case, side, rounds))
        }
        _ => Err("usage: run CASE | spin ours|peer ROUNDS CASE".to_owned()),
    };
    done.map_or_else(
        |message| {
            eprintln!("virtio-test-benches: {message}");
            ExitCode::from(2)
        },
        |()| ExitCode::SUCCESS,
    )
}

fn parse(words: [&str; 5]) -> Result<Case, String> {
    Case::parse(words).ok_or_else(|| format!("there is no case {words:?}"))
}

fn run(case: Case) -> Result<(), String> {
    let mut round = case.open();
    let mut first = true;
    for line in std::io::stdin().lock().lines() {
        line.map_err(|error| error.to_string())?;
        let (ours, peer) = round(first)?;
        println!(r#"{{"ours": {ours:.3}, "peer": {peer:.3}}}"#);
        first = !first;
    }
    Ok(())
}

fn spin(case: Case, side: &str, rounds: &str) -> Result<(), String> {
    let rounds: u64 = rounds
        .parse()
        .map_err(|_| format!("{rounds:?} is no number of rounds"))?;
    let mut round: Box<dyn FnMut() -> u64> = match (case.what, side) {
        (What::Device(_) | What::Flat(_), "ours") => {
            let mut side = case.our_device(case.ring);
            Box::new(move || side.round().done.chains)
        }
        (What::Device(peer), "peer") => {
            let mut side = case.their_device(peer);
            Box::new(move || side.round().done.chains)
        }
        (What::Driver, "ours") => {
            let mut side = driver::ours(case.ring, case.shape, case.burst);
            Box::new(move || side.round().1.0)
        }
        (What::Driver, "peer") => {
            let mut side = driver::theirs(case.ring, case.shape, case.burst);
            Box::new(move || side.round().1.0)
        }
        _ => return Err("no side of this case runs alone".to_owned()),
    };
    let chains: u64 = (0..rounds).map(|_| round()).sum();
    println!("{chains}");
    Ok(())
}
