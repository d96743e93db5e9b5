//! `cargo xtask sim`: see `docs/src/testing.md`.

use anabranch_sim::{Options, keep_panics, run};

fn main() {
    keep_panics();
    let mut args = std::env::args().skip(1);
    let from: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(0);
    let to: u64 = args.next().and_then(|a| a.parse().ok()).unwrap_or(from + 1);
    let trace = args.next().is_some();
    let mut faults = anabranch_sim::Fault::usual();
    for name in std::env::var("WITHOUT").unwrap_or_default().split(',') {
        if let Some(fault) = anabranch_sim::Fault::from_name(name) {
            faults.remove(&fault);
        }
    }
    let mut total = anabranch_sim::Report::default();
    let started = std::time::Instant::now();
    for seed in from..to {
        let outcome = run(seed, &Options { trace, faults: faults.clone(), ..Options::default() });
        if trace {
            print!("{}", outcome.trace);
        }
        total.add(&outcome.report);
        if !outcome.wrong.is_empty() {
            println!("seed {seed} ({} devices, {} steps):", outcome.devices, outcome.steps);
            for wrong in outcome.wrong.iter().take(4) {
                println!("   {}", &wrong.chars().take(1500).collect::<String>());
            }
        }
    }
    println!("{total}\n{:?}", started.elapsed());
}
