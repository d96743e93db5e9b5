//! Every target over its corpus and over random inputs, as ordinary tests.

// In a test a panic is the report.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::atomic::Ordering;

use anabranch_fuzz_targets::{Noise, TARGETS, admission, target};
use proptest::prelude::*;

/// Inputs of each target that are made up here; `ANABRANCH_FUZZ_INPUTS` sets another number.
fn inputs() -> u32 {
    std::env::var("ANABRANCH_FUZZ_INPUTS").ok().and_then(|text| text.parse().ok()).unwrap_or(64)
}

fn stored(folder: &str, name: &str) -> Vec<(String, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder).join(name);
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut files: Vec<_> = entries.flatten().map(|entry| entry.path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.display().to_string(), std::fs::read(path).unwrap())).collect()
}

fn holds(name: &str) {
    let target = target(name).unwrap();
    let mut known = stored("corpus", name);
    assert!(known.len() >= 5, "the corpus of {name} is missing; `--example seeds` writes it");
    known.extend(stored("found", name));
    for (path, input) in known {
        let outcome = std::panic::catch_unwind(|| (target.run)(&input));
        assert!(outcome.is_ok(), "{path} breaks the promise of {name}: {}", target.promise);
    }
    let config = ProptestConfig { cases: inputs(), failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(input in prop::collection::vec(any::<u8>(), 0..300))| (target.run)(&input));
    // Mutations of what is known reach further than noise does.
    let seeds = (target.seeds)();
    let mut noise = Noise::new(5);
    for _ in 0..inputs() {
        let mut input = seeds[noise.below(seeds.len())].clone();
        for _ in 0..1 + noise.below(3) {
            let at = noise.below(input.len().max(1));
            if let Some(byte) = input.get_mut(at) {
                *byte ^= 1 << noise.below(8);
            }
        }
        (target.run)(&input);
    }
}

macro_rules! targets {
    ($($name:ident,)*) => {
        $(#[test]
        fn $name() {
            holds(stringify!($name));
        })*

        #[test]
        fn no_target_is_forgotten() {
            let names: Vec<&str> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(names, [$(stringify!($name)),*]);
            for name in names {
                let binary = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../fuzz_targets/{name}.rs"));
                assert!(binary.exists(), "{} is missing", binary.display());
            }
        }
    };
}

targets! {
    wire,
    frame,
    change,
    schema,
    token,
    invite,
    files,
    query,
    values,
    store,
    relay,
    link,
    admission,
    replica_model,
    engine_model,
}

/// The checked-in corpus is the one that its makers make.
#[test]
fn the_corpus_is_of_our_own_making() {
    for target in TARGETS {
        let made = (target.seeds)();
        let kept: Vec<Vec<u8>> = stored("corpus", target.name).into_iter().map(|(_, bytes)| bytes).collect();
        assert_eq!(made, kept, "{}: `--example seeds` writes it anew", target.name);
    }
}

/// Valid changes that were changed and have the checksum that belongs to them: none panics, none
/// that is accepted leaves a document that does not load again. `ANABRANCH_MUTATED_CHANGES` says
/// how many; 2,000 unless it does.
#[test]
fn no_changed_change_breaks_a_document() {
    let count = std::env::var("ANABRANCH_MUTATED_CHANGES").ok().and_then(|text| text.parse().ok());
    let seed = std::env::var("ANABRANCH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    let done = admission::run_many(seed, count.unwrap_or(2_000));
    let figures = &admission::FIGURES;
    println!("{done} changed changes: {figures:?}");
    assert!(figures.accepted.load(Ordering::Relaxed) > 0, "some are harmless, or nothing is tested");
    assert!(figures.refused.load(Ordering::Relaxed) > 0);
}
