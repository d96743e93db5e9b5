//! Making a failing plan small: whole classes of faults, whole devices, then step by step.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::plan::{Act, Options, Plan};
use crate::run::run;

/// Leaves out of a failing plan what it fails without. `tries` bounds the runs, and none begins when
/// `time` has passed, as a run of a hundred devices takes minutes; what is found by then fails too.
pub fn minimise(seed: u64, options: &Options, mut tries: usize, time: Duration) -> Options {
    let started = Instant::now();
    let plan = Plan::new(seed, options);
    // The plan follows from these, so they must be said.
    let mut best = Options { devices: Some(plan.devices), steps: Some(plan.steps.len()), ..options.clone() };
    best.only = Some(match &options.only {
        Some(only) => only.clone(),
        None => (0..plan.steps.len()).collect(),
    });
    best.trace = false;
    if Plan::new(seed, &best).steps.len() != plan.steps.len() {
        return options.clone();
    }
    let mut fails = |candidate: &Options| {
        tries = tries.saturating_sub(1);
        tries > 0 && started.elapsed() < time && !run(seed, candidate).wrong.is_empty()
    };
    if !fails(&best) {
        return options.clone();
    }
    let faults: BTreeSet<_> = plan
        .steps
        .iter()
        .filter_map(|step| match step.act {
            Act::Fault(fault) => Some(fault),
            _ => None,
        })
        .collect();
    for fault in faults {
        let without = keep(&best, |step| plan.steps[step].act != Act::Fault(fault));
        if fails(&without) {
            best = without;
        }
    }
    // The first device brings the schema.
    for device in (1..plan.devices).rev() {
        let mut without = keep(&best, |step| plan.steps[step].device != device);
        without.absent.insert(device);
        if fails(&without) {
            best = without;
        }
    }
    let mut part = steps(&best).len().div_ceil(2).max(1);
    loop {
        let mut at = 0;
        let mut shrank = false;
        while at < steps(&best).len() {
            let all = steps(&best);
            let gone: BTreeSet<usize> = all[at..(at + part).min(all.len())].iter().copied().collect();
            let without = keep(&best, |step| !gone.contains(&step));
            if fails(&without) {
                best = without;
                shrank = true;
            } else {
                at += part;
            }
        }
        if part == 1 && !shrank {
            return best;
        }
        part = part.div_ceil(2).max(1);
        // It still fails, unless there is no try left to say so.
        if !fails(&best) {
            return best;
        }
    }
}

fn steps(options: &Options) -> Vec<usize> {
    options.only.iter().flatten().copied().collect()
}

fn keep(options: &Options, wanted: impl Fn(usize) -> bool) -> Options {
    let only = steps(options).into_iter().filter(|step| wanted(*step)).collect();
    Options { only: Some(only), ..options.clone() }
}
