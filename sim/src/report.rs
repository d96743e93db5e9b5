//! Figures of runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::hostile::FORGERIES;
use crate::plan::Fault;

/// What goes wrong beside what a plan says, or in its course.
const CLASSES: [&str; 23] = [
    "duplicate unit",
    "flushed untold",
    "hostile: another's change",
    "hostile: cut frame",
    "hostile: damaged frame",
    "hostile: dated alike",
    "hostile: decompression bomb",
    "hostile: flood of connections",
    "hostile: huge message",
    "hostile: lies about where it is",
    "hostile: names containers",
    "hostile: never reads",
    "hostile: one of a thousand writers",
    "hostile: out of turn",
    "hostile: reader pretends",
    "hostile: refused brought back",
    "hostile: revives beside a deletion",
    "hostile: too much in a unit",
    "hostile: writes nothing",
    "lost message",
    "lost unflushed",
    "reordered message",
    "token expired",
];

/// All classes of faults. That a token expired is part of its class of plans.
pub fn classes() -> BTreeSet<&'static str> {
    let planned = Fault::ALL.into_iter().filter(|fault| *fault != Fault::Hostile).map(Fault::name);
    planned.chain(FORGERIES).chain(CLASSES).collect()
}

/// What happened, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Injected faults by class.
    pub faults: BTreeMap<&'static str, u64>,
    /// Everything else that was counted.
    pub counts: BTreeMap<&'static str, u64>,
    /// Branches of the policies and machines, and how often each was reached. Only with the feature
    /// `marks`.
    pub reached: BTreeMap<&'static str, u64>,
    /// The largest of what was measured.
    pub peaks: BTreeMap<&'static str, u64>,
}

impl Report {
    /// Counts a fault.
    pub fn fault(&mut self, class: &'static str) {
        *self.faults.entry(class).or_default() += 1;
    }

    /// Counts something else.
    pub fn count(&mut self, what: &'static str, times: u64) {
        *self.counts.entry(what).or_default() += times;
    }

    /// Keeps the largest.
    pub fn peak(&mut self, what: &'static str, value: u64) {
        let peak = self.peaks.entry(what).or_default();
        *peak = value.max(*peak);
    }

    /// How often something was counted.
    pub fn get(&self, what: &str) -> u64 {
        self.counts.get(what).or(self.faults.get(what)).copied().unwrap_or_default()
    }

    /// All faults.
    pub fn all_faults(&self) -> u64 {
        self.faults.values().sum()
    }

    /// Adds another run's.
    pub fn add(&mut self, other: &Report) {
        for (class, times) in &other.faults {
            *self.faults.entry(class).or_default() += times;
        }
        for (what, times) in &other.counts {
            *self.counts.entry(what).or_default() += times;
        }
        for (what, times) in &other.reached {
            *self.reached.entry(what).or_default() += times;
        }
        for (what, value) in &other.peaks {
            self.peak(what, *value);
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |map: &BTreeMap<&'static str, u64>| {
            let parts: Vec<String> = map.iter().map(|(name, times)| format!("{name} {times}")).collect();
            parts.join(", ")
        };
        writeln!(f, "{}", list(&self.counts))?;
        writeln!(f, "at most: {}", list(&self.peaks))?;
        writeln!(f, "{} faults:", self.all_faults())?;
        self.faults.iter().try_for_each(|(class, times)| writeln!(f, "  {times:>9} {class}"))
    }
}
