//! What users do and what goes wrong, as a list that follows from a seed.
//!
//! Every step carries its own dice, and every message's delay follows from the link that it
//! takes, so that a step can be left out and the others mean what they meant before. That
//! is what makes a failing plan small.

use std::collections::BTreeSet;

use crate::dice::Dice;

/// A way in which things go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// Messages don't arrive, either way.
    Partition,
    /// Messages don't arrive one way.
    OneWay,
    /// A link breaks with messages under way.
    Cut,
    /// A message is damaged on its way.
    Damage,
    /// A device is slow to take what the relay sends.
    Slow,
    /// A device loses power.
    Crash,
    /// A device loses power, and its disk keeps half of a batch.
    Torn,
    /// The relay loses power.
    CrashRelay,
    /// A device's disk is full.
    Full,
    /// A device gets an older backup of its disk.
    Restore,
    /// The relay gets an older backup of its disk.
    RestoreRelay,
    /// A device's clock jumps.
    Jump,
    /// A device's clock drifts.
    Drift,
    /// The rights of a device expire while it is at work.
    Expiry,
    /// A device has a newer schema than others.
    Schema,
    /// A device is away for months.
    Months,
    /// A device writes what the relay must refuse.
    Forbidden,
    /// Someone attacks the relay.
    Hostile,
}

impl Fault {
    /// All of them.
    pub const ALL: [Fault; 18] = {
        use Fault::*;
        [
            Partition,
            OneWay,
            Cut,
            Damage,
            Slow,
            Crash,
            Torn,
            CrashRelay,
            Full,
            Restore,
            RestoreRelay,
            Jump,
            Drift,
            Expiry,
            Schema,
            Months,
            Forbidden,
            Hostile,
        ]
    };

    /// Its name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Fault::Partition => "partition",
            Fault::OneWay => "one-way",
            Fault::Cut => "cut",
            Fault::Damage => "damage",
            Fault::Slow => "slow",
            Fault::Crash => "crash",
            Fault::Torn => "torn",
            Fault::CrashRelay => "crash-relay",
            Fault::Full => "full",
            Fault::Restore => "restore",
            Fault::RestoreRelay => "restore-relay",
            Fault::Jump => "jump",
            Fault::Drift => "drift",
            Fault::Expiry => "expiry",
            Fault::Schema => "schema",
            Fault::Months => "months",
            Fault::Forbidden => "forbidden",
            Fault::Hostile => "hostile",
        }
    }

    /// From its name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|fault| fault.name() == name)
    }

    /// Those that happen unless told otherwise: all.
    pub fn usual() -> BTreeSet<Fault> {
        Self::ALL.into_iter().collect()
    }

    /// How often it is chosen, beside the others.
    fn weight(self) -> usize {
        match self {
            Fault::Hostile => 8,
            Fault::Crash => 6,
            Fault::Restore => 9,
            Fault::RestoreRelay => 6,
            Fault::Cut | Fault::Torn => 5,
            Fault::Damage | Fault::Schema => 4,
            Fault::Months | Fault::Expiry | Fault::Jump | Fault::Drift | Fault::Full => 2,
            _ => 3,
        }
    }
}

/// What happens in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Act {
    /// A user edits an entity.
    Write,
    /// A user edits some entities at once.
    Transaction,
    /// An app imports many entities.
    Import,
    /// A user settles a conflict.
    Resolve,
    /// A user opens a form, and saves it some time later.
    OpenForm,
    /// A user sends a refused edit again, and dismisses it.
    Retry,
    /// A backup of a device is taken.
    Backup,
    /// A backup of the relay is taken.
    BackupRelay,
    /// An app asks to be sure that it has everything.
    Confirm,
    /// Something goes wrong.
    Fault(Fault),
}

/// One step of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// When, in milliseconds of true time.
    pub at_ms: u64,
    /// To which device, where it is to one.
    pub device: usize,
    /// What.
    pub act: Act,
    /// Its own dice.
    pub dice: u64,
}

/// Most devices of a run.
const DEVICES_MAX: usize = 10_000;

/// What a run is made from.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many devices; none draws a number.
    pub devices: Option<usize>,
    /// How many steps; none draws a number.
    pub steps: Option<usize>,
    /// What may go wrong.
    pub faults: BTreeSet<Fault>,
    /// Only these steps of the plan; none is all.
    pub only: Option<BTreeSet<usize>>,
    /// Devices that are never there.
    pub absent: BTreeSet<usize>,
    /// Whether documents have light bodies, so that thousands of devices fit. Needs the feature
    /// `fast`.
    pub fast: bool,
    /// Whether to write down all that happens.
    pub trace: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            devices: None,
            steps: None,
            faults: Fault::usual(),
            only: None,
            absent: BTreeSet::new(),
            fast: false,
            trace: false,
        }
    }
}

/// A plan.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What it follows from.
    pub seed: u64,
    /// How many devices there are.
    pub devices: usize,
    /// What happens, in order.
    pub steps: Vec<Step>,
}

impl Plan {
    /// The plan that follows from a seed.
    pub fn new(seed: u64, options: &Options) -> Self {
        let mut dice = Dice::of(seed, 1);
        let drawn = match dice.roll(240) {
            0 => 50 + dice.roll(151),
            1..=19 => 12 + dice.roll(12),
            20..=79 => 6 + dice.roll(5),
            _ => 2 + dice.roll(4),
        };
        let devices = options.devices.unwrap_or(drawn).clamp(2, DEVICES_MAX);
        let steps = options.steps.unwrap_or(120 + 12 * devices.min(60) + dice.roll(200));
        // Where both a device and the relay may go back, some losses are excused. So that they are not
        // everywhere, a third of the runs has restored devices only, and a third restored relays.
        let spared: [&[Fault]; 3] = [&[Fault::Restore, Fault::Torn], &[Fault::RestoreRelay], &[]];
        let spared = spared[(seed % 3) as usize];
        let spares = options.faults == Fault::usual();
        let faults: Vec<Fault> = options
            .faults
            .iter()
            .filter(|fault| !(spares && spared.contains(fault)))
            .flat_map(|fault| std::iter::repeat_n(*fault, fault.weight()))
            .collect();
        // Some runs are calm, so that long work without faults is seen too.
        let calm = *dice.pick(&[2, 2, 3, 3, 4, 20]);
        let mut at_ms = 0;
        let steps = (0..steps)
            .map(|_| {
                at_ms += match dice.roll(10) {
                    0..=2 => 0,
                    3..=7 => dice.between(1, 200),
                    8 => dice.between(200, 3_000),
                    _ => dice.between(3_000, 40_000),
                };
                let act = if !faults.is_empty() && dice.once_in(calm) {
                    Act::Fault(*dice.pick(&faults))
                } else {
                    match dice.roll(40) {
                        0..=24 => Act::Write,
                        25..=29 => Act::Transaction,
                        30 => Act::Import,
                        31..=33 => Act::Resolve,
                        34..=35 => Act::OpenForm,
                        36 => Act::Retry,
                        37 => *dice.pick(&[Act::Backup, Act::BackupRelay]),
                        38 => Act::Backup,
                        _ => Act::Confirm,
                    }
                };
                if act == Act::Fault(Fault::Months) {
                    at_ms += dice.between(40, 150) * 24 * 60 * 60 * 1000;
                }
                Step { at_ms, device: dice.roll(devices), act, dice: dice.word() }
            })
            .collect();
        Self { seed, devices, steps }
    }
}
