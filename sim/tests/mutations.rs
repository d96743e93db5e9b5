//! The oracle can see: each known fault, built in, is found. Runs with
//! `cargo test --release -p anabranch-sim --features mutations`.

#![cfg(feature = "mutations")]

use std::time::Duration;

use anabranch_core::mutation::{self, Mutation};
use anabranch_sim::{Options, minimise, run};

/// Seeds within which each must be seen.
const SEEDS_MAX: u64 = 400;

#[test]
fn every_known_fault_is_seen() {
    let mut missed = Vec::new();
    for mutation in Mutation::ALL {
        mutation::set(Some(mutation));
        let seen = (0..SEEDS_MAX).find(|seed| !run(*seed, &Options::default()).wrong.is_empty());
        mutation::set(None);
        match seen {
            Some(seed) => {
                let without = run(seed, &Options::default()).wrong;
                assert!(without.is_empty(), "seed {seed} fails without {mutation:?} too: {without:#?}");
                println!("{mutation:?}: seen after {} seeds", seed + 1);
            }
            None => missed.push(mutation),
        }
    }
    assert!(missed.is_empty(), "not seen: {missed:?}");
}

#[test]
fn a_failing_plan_becomes_small_and_still_fails() {
    mutation::set(Some(Mutation::SplitTransaction));
    let options = Options::default();
    let seed = (0..50).find(|seed| !run(*seed, &options).wrong.is_empty()).unwrap();
    let small = minimise(seed, &options, 400, Duration::MAX);
    let (before, after) = (run(seed, &options), run(seed, &small));
    mutation::set(None);
    assert!(!after.wrong.is_empty());
    assert!(small.only.unwrap().len() * 10 < before.steps, "{} steps", before.steps);
}
