//! One run: a plan carried out, healed, and held to the oracle.

use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::cluster::Cluster;
use crate::plan::{Options, Plan};
use crate::report::Report;

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// What it followed from.
    pub seed: u64,
    /// How many devices there were.
    pub devices: usize,
    /// How many steps its plan has.
    pub steps: usize,
    /// What is against the rules, the first one first; empty where all is well.
    pub wrong: Vec<String>,
    /// Figures.
    pub report: Report,
    /// All that happened, a line each, if it was asked for.
    pub trace: String,
}

/// Events that a step may lead to, for each device.
const EVENTS_PER_STEP_MAX: u64 = 500;

thread_local! {
    static PANIC: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Makes panics quiet, and keeps what they say: in a run they are findings, and in the document
/// library they are part of the game. For programs that do nothing else.
pub fn keep_panics() {
    std::panic::set_hook(Box::new(|info| {
        PANIC.with(|panic| *panic.borrow_mut() = Some(info.to_string()));
    }));
}

/// Runs the plan that follows from a seed. The same seed and options give the same outcome, to
/// the byte.
pub fn run(seed: u64, options: &Options) -> Outcome {
    #[cfg(feature = "fast")]
    anabranch_core::entity::set_light_bodies(options.fast);
    // What another run of this thread reached is its own.
    #[cfg(feature = "marks")]
    anabranch_core::reached::take();
    let plan = Plan::new(seed, options);
    let (devices, steps) = (plan.devices, plan.steps.len());
    let mut cluster = None;
    let finished = catch_unwind(AssertUnwindSafe(|| {
        let cluster = cluster.insert(Cluster::new(plan, options));
        let bound = EVENTS_PER_STEP_MAX * (steps as u64 + 100) * devices as u64;
        while cluster.step() {
            if cluster.events > bound {
                let waiting = cluster.waiting();
                cluster.wrong(format!("more than {bound} events: {waiting:?}"));
            }
            if !cluster.ledger.wrong.is_empty() {
                return;
            }
        }
        if cluster.heal() && cluster.ledger.wrong.is_empty() {
            cluster.check();
        }
    }));
    let mut wrong = Vec::new();
    if let Err(panic) = finished {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        let kept = PANIC.with(|panic| panic.borrow_mut().take());
        wrong.push(format!("panic: {}", kept.or(text).unwrap_or_default()));
    }
    let mut outcome =
        Outcome { seed, devices, steps, wrong, report: Report::default(), trace: String::new() };
    if let Some(mut cluster) = cluster {
        outcome.wrong.append(&mut cluster.ledger.wrong);
        outcome.report = std::mem::take(&mut cluster.report);
        #[cfg(feature = "marks")]
        outcome
            .report
            .reached
            .extend(anabranch_core::reached::take().into_iter().map(|(mark, n)| (mark.what(), n)));
        outcome.report.count("events", cluster.events);
        outcome.report.count("runs", 1);
        outcome.report.count("devices", devices as u64);
        outcome.trace = cluster.take_trace();
    }
    outcome
}
