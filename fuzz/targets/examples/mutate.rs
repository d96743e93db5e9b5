//! The built-in mutation loop: `cargo run --release -p anabranch-fuzz-targets --example mutate --
//! TARGET SECONDS [SEED]`. It knows nothing of coverage; it is for machines without libFuzzer. With a
//! file in place of the seconds it runs that input alone.
//!
//! An input that fails is written to `fuzz/artifacts/TARGET/`, and the program ends with an error.

// A program for people: printing is its purpose, a panic its report.
#![allow(clippy::unwrap_used)]

use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant};

use anabranch_fuzz_targets::{Noise, TARGETS, admission, target};

/// Longest input.
const INPUT_BYTES_MAX: usize = 64 * 1024;
/// Inputs kept to start from.
const POOL_MAX: usize = 4_096;

fn main() {
    let mut args = std::env::args().skip(1);
    let name = args.next().unwrap_or_default();
    let Some(target) = target(&name) else {
        let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
        eprintln!("no target {name:?}; there are {}", names.join(", "));
        std::process::exit(2);
    };
    let given = args.next().unwrap_or("60".to_owned());
    let Ok(seconds) = given.parse::<u64>() else {
        return (target.run)(&std::fs::read(given).unwrap());
    };
    let mut noise = Noise::new(args.next().and_then(|text| text.parse().ok()).unwrap_or(1));
    let mut pool = (target.seeds)();
    pool.extend(corpus(target.name));
    // Panics that a promise allows for are caught where they happen; they say nothing.
    std::panic::set_hook(Box::new(|_| {}));
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut inputs: u64 = 0;
    while Instant::now() < end {
        let input = mutated(&pool, &mut noise);
        inputs += 1;
        if catch_unwind(|| (target.run)(&input)).is_err() {
            let _ = std::panic::take_hook();
            report(target.name, &input);
            let _ = catch_unwind(|| (target.run)(&input));
            std::process::exit(1);
        }
        if pool.len() < POOL_MAX && noise.below(50) == 0 {
            pool.push(input);
        }
    }
    println!("{name}: {inputs} inputs in {seconds} s, 0 findings");
    if name == "admission" {
        println!("{:?}", admission::FIGURES);
    }
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../corpus").join(name);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.into_iter().filter_map(|path| std::fs::read(path).ok()).collect()
}

fn mutated(pool: &[Vec<u8>], noise: &mut Noise) -> Vec<u8> {
    let mut input = pool[noise.below(pool.len())].clone();
    for _ in 0..1 + noise.below(6) {
        let at = noise.below(input.len() + 1);
        match noise.below(7) {
            0 | 1 if at < input.len() => input[at] ^= 1 << noise.below(8),
            2 if at < input.len() => input[at] = noise.word() as u8,
            3 => input.insert(at, noise.word() as u8),
            4 if at < input.len() => drop(input.drain(at..(at + 1 + noise.below(8)).min(input.len()))),
            5 => {
                let other = &pool[noise.below(pool.len())];
                let from = noise.below(other.len() + 1);
                let piece = other[from..(from + noise.below(32)).min(other.len())].to_vec();
                input.splice(at..at, piece);
            }
            _ => {
                let length = noise.below(24);
                input.extend(noise.bytes(length));
            }
        }
    }
    input.truncate(INPUT_BYTES_MAX);
    input
}

fn report(name: &str, input: &[u8]) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../artifacts").join(name);
    std::fs::create_dir_all(&folder).unwrap();
    let path = folder.join(format!(
        "loop-{:016x}",
        input.iter().fold(7u64, |hash, byte| { (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3) })
    ));
    std::fs::write(&path, input).unwrap();
    eprintln!("{name}: an input of {} bytes breaks a promise; it is in {}", input.len(), path.display());
}
