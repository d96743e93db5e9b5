//! A few short runs in every test run; `cargo xtask sim` runs as many as one likes.

use anabranch_sim::{Fault, Options, classes, run};

fn short() -> Options {
    Options { devices: Some(4), steps: Some(150), ..Options::default() }
}

#[test]
fn some_seeds_keep_every_promise() {
    let mut admitted = 0;
    for seed in 0..8 {
        let outcome = run(seed, &short());
        assert!(outcome.wrong.is_empty(), "seed {seed}: {:#?}", outcome.wrong);
        admitted += outcome.report.get("admitted changes");
    }
    assert!(admitted > 500, "{admitted} admitted changes prove little");
}

#[test]
fn the_same_seed_tells_the_same_to_the_byte() {
    let options = Options { trace: true, ..short() };
    let (first, second) = (run(3, &options), run(3, &options));
    assert!(first.trace.lines().count() > 100);
    assert_eq!(first.trace, second.trace);
    assert_eq!(first.report, second.report);
    assert_ne!(first.trace, run(4, &options).trace);
}

/// Light bodies change nothing that can be seen.
#[cfg(feature = "fast")]
#[test]
fn both_tiers_tell_the_same_to_the_byte() {
    for seed in 0..6 {
        let options = Options { trace: true, ..short() };
        let (real, light) = (run(seed, &options), run(seed, &Options { fast: true, ..options.clone() }));
        assert_eq!(real.trace, light.trace, "seed {seed}");
        assert_eq!(real.report, light.report, "seed {seed}");
        assert!(light.wrong.is_empty(), "seed {seed}: {:#?}", light.wrong);
    }
}

#[test]
fn every_class_of_faults_is_injected() {
    let mut faults = std::collections::BTreeMap::new();
    let mut answered = [0; 2];
    for fault in Fault::usual() {
        // One class alone, so that a run is about it.
        let options = Options { faults: [fault].into(), ..short() };
        for seed in 100..104 {
            let outcome = run(seed, &options);
            assert!(outcome.wrong.is_empty(), "{} in seed {seed}: {:#?}", fault.name(), outcome.wrong);
            let known = classes();
            let strange = outcome.report.faults.keys().find(|class| !known.contains(*class));
            assert_eq!(strange, None, "a class that `classes` leaves out");
            for (told, times) in answered.iter_mut().zip(["taken", "refused"]) {
                *told += outcome.report.get(&format!("strangers' changes {times}"));
            }
            *faults.entry(fault).or_insert(0) += match fault {
                Fault::Hostile => outcome.report.all_faults(),
                _ => outcome.report.faults.get(fault.name()).copied().unwrap_or_default(),
            };
        }
    }
    assert!(faults.values().all(|times| *times > 0), "{faults:?}");
    assert!(answered.iter().all(|times| *times > 0), "strangers are not answered: {answered:?}");
}
