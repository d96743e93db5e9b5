//! The slow look at everything that is stored, while the hub has nothing else to do.

use std::time::Duration;

use anabranch_core::clock::MonoMs;
use anabranch_core::id::WorkspaceId;
use anabranch_core::replica::Verified;

use super::Hub;
use crate::error::Error;

/// Entries of one step: a few milliseconds of work.
const STEP_ENTRIES: usize = 32;
/// Entries of one step when somebody waits for the end.
const STEP_ENTRIES_NOW: usize = 256;
/// Pause between two steps, so that a hundred thousand entities take hours and no core.
const STEP_PAUSE: Duration = Duration::from_millis(500);
/// How long after the engine was opened the first look begins: short commands never begin one.
const FIRST_PAUSE: Duration = Duration::from_secs(60);

/// How long after a look without pauses the next may begin, if a damaged record is met that none of them mends.
const HURRY_AGAIN: Duration = Duration::from_secs(60 * 60);

/// When the next step is due, and where.
#[derive(Debug)]
pub(super) struct Schedule {
    /// Time between two looks at everything; none for never.
    every: Option<Duration>,
    due: MonoMs,
    /// The workspace that is being looked at, by its place among the open ones.
    place: usize,
    /// The look goes on without pauses.
    hurried: bool,
    /// The next step is the first of a look.
    begins: bool,
    /// When the next look without pauses may begin.
    may_hurry: MonoMs,
}

impl Schedule {
    pub(super) fn new(every: Option<Duration>, now: MonoMs) -> Self {
        let due = after(now, FIRST_PAUSE);
        Self { every, due, place: 0, hurried: false, begins: false, may_hurry: now }
    }

    /// A damaged record was met, which ends the link each time until it is mended: a look at everything begins
    /// at once and makes no pauses.
    pub(super) fn hurry(&mut self, now: MonoMs) {
        if self.every.is_some() && now >= self.may_hurry {
            tracing::warn!("a damaged record was met: looking at everything that is stored");
            *self = Self { due: now, hurried: true, begins: true, ..Self::new(self.every, now) };
            self.may_hurry = after(now, HURRY_AGAIN);
        }
    }

    /// When [`Hub::scrub`] has something to do.
    pub(super) fn next_wakeup(&self) -> Option<MonoMs> {
        self.every.map(|_| self.due)
    }
}

fn after(now: MonoMs, pause: Duration) -> MonoMs {
    MonoMs(now.0.saturating_add(u64::try_from(pause.as_millis()).unwrap_or(u64::MAX)))
}

impl Hub {
    /// Makes a step if one is due. What is found is told in the status and the log, and mended.
    pub(super) fn scrub(&mut self) {
        let now = self.config.clock.now();
        let Some(every) = self.scrubbing.every else { return };
        if now.mono < self.scrubbing.due {
            return;
        }
        if self.failed.is_some() || self.reopen().is_err() {
            self.scrubbing.due = after(now.mono, FIRST_PAUSE);
            return;
        }
        if std::mem::take(&mut self.scrubbing.begins) {
            self.slots.values_mut().for_each(|slot| slot.replica.verify_from_start());
        }
        let Some(workspace) = self.slots.keys().nth(self.scrubbing.place).cloned() else {
            self.scrubbing.place = 0;
            self.scrubbing.hurried = false;
            self.scrubbing.due = after(now.mono, every);
            return;
        };
        let pause = if self.scrubbing.hurried { Duration::ZERO } else { STEP_PAUSE };
        self.scrubbing.due = after(now.mono, pause);
        match self.verify_step(&workspace, STEP_ENTRIES, true) {
            Ok(step) if !step.done => {}
            Ok(_) => self.scrubbing.place += 1,
            Err(error) => {
                // The store can't read a value: nothing behind it can be looked at.
                tracing::error!(%workspace, %error, "the look at everything that is stored was cut short");
                self.scrubbing.place += 1;
            }
        }
    }

    /// Makes a step for somebody who waits. The slow look keeps out of the way.
    pub(super) fn verify_now(
        &mut self,
        workspace: &WorkspaceId,
        from_start: bool,
        mend: bool,
    ) -> Result<Verified, Error> {
        self.scrubbing.due = after(self.config.clock.now().mono, FIRST_PAUSE);
        if let Some(slot) = self.slots.get_mut(workspace).filter(|_| from_start) {
            slot.replica.verify_from_start();
        }
        self.verify_step(workspace, STEP_ENTRIES_NOW, mend)
    }

    /// Looks at the next entries of a workspace.
    fn verify_step(
        &mut self,
        workspace: &WorkspaceId,
        entries: usize,
        mend: bool,
    ) -> Result<Verified, Error> {
        let now = self.config.clock.now();
        let Some(slot) = self.slots.get_mut(workspace) else { return Err(Error::closed()) };
        let step = match slot.replica.verify(now, entries, mend) {
            Ok(step) => step,
            Err(error) => {
                slot.damage += 1;
                // What was to be mended may be ahead of the store.
                self.stale = true;
                return Err(error.into());
            }
        };
        for fault in &step.faults {
            let entity = fault.entity.as_ref().map(ToString::to_string).unwrap_or_default();
            tracing::error!(%workspace, %entity, what = %fault.what, mended = fault.mended, "a fault in what is stored");
        }
        slot.damage += step.faults.len() as u64;
        self.drain();
        Ok(step)
    }
}
