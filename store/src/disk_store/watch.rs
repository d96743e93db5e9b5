//! Notices that the backend does not answer.
//!
//! sled was seen to wait for ever on a volume that was full to the last byte. A call into it
//! can't be taken back, but nobody has to wait for it: the store is stopped, its thread and its
//! lock on the directory are left behind until the process ends.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::durability::lock;

/// Slow cards need many seconds for one sync under load; nothing that works needs this long.
pub(super) const STUCK_AFTER: Duration = Duration::from_secs(120);

/// What the store is stopped with.
pub(super) const WORDS: &str = "the backend does not answer; the volume may be full or gone";

/// Who calls the backend.
#[derive(Clone, Copy, Debug)]
pub(super) enum Caller {
    Writer,
    Syncer,
}

/// See the [module](self).
pub(super) struct Watch {
    limit: Duration,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Since when each caller has been inside the backend.
    since: [Option<Instant>; 2],
    running: usize,
    stuck: bool,
}

impl Watch {
    pub(super) fn new(limit: Duration) -> Self {
        Watch { limit, state: Mutex::default(), changed: Condvar::new() }
    }

    /// Runs a call into the backend.
    pub(super) fn over<T>(&self, caller: Caller, call: impl FnOnce() -> T) -> T {
        lock(&self.state).since[caller as usize] = Some(Instant::now());
        let result = call();
        lock(&self.state).since[caller as usize] = None;
        result
    }

    /// A thread that may call the backend begins.
    pub(super) fn begin(&self) {
        lock(&self.state).running += 1;
    }

    /// It has ended.
    pub(super) fn end(&self) {
        lock(&self.state).running -= 1;
        self.changed.notify_all();
    }

    /// Returns when all threads have ended, or one is stuck: then true.
    pub(super) fn wait(&self) -> bool {
        let mut state = lock(&self.state);
        loop {
            if state.running == 0 || state.stuck {
                return state.stuck;
            }
            let oldest = state.since.iter().flatten().map(Instant::elapsed).max().unwrap_or_default();
            if oldest >= self.limit {
                state.stuck = true;
                self.changed.notify_all();
                return true;
            }
            let next = self.limit - oldest;
            let waited = self.changed.wait_timeout(state, next);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
