//! How far a store has kept its word: the newest durable commit, whether the store has
//! failed or was closed, who waits for it, and the hook.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use anabranch_core::store::{CommitNo, DurableHook, StoreError};

/// Locks whether or not a panic happened under the lock: each place that holds one leaves
/// whole state behind, and a panic of a store thread poisons the store by other means.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the [module](self).
pub(crate) struct Durability {
    state: Mutex<State>,
    hook: Mutex<Hook>,
}

struct State {
    durable: u64,
    failure: Option<String>,
    closed: bool,
    /// By the newest commit that each covers; what lies behind the newest group waits at the last.
    /// Threads are woken when their group is durable, all of one group in one call to the
    /// system: with many writers, waking each by itself costs more than writing the group.
    gates: BTreeMap<u64, Gate>,
}

/// What threads wait at until a group is durable.
struct Gate {
    /// The oldest commit that somebody waits for here.
    oldest: u64,
    opened: Arc<OnceLock<()>>,
}

impl Gate {
    fn new() -> Gate {
        Gate { oldest: u64::MAX, opened: Arc::default() }
    }
}

#[derive(Default)]
struct Hook {
    call: Option<DurableHook>,
    told: u64,
    told_failure: bool,
}

impl Durability {
    pub(crate) fn new(durable: CommitNo) -> Self {
        Durability {
            state: Mutex::new(State::new(durable)),
            hook: Mutex::new(Hook { told: durable.0, ..Hook::default() }),
        }
    }

    /// Refuses if the store has failed or was closed. A failure is told even after closing:
    /// it explains more.
    pub(crate) fn check(&self) -> Result<(), StoreError> {
        lock(&self.state).check()
    }

    pub(crate) fn durable(&self) -> Result<CommitNo, StoreError> {
        let state = lock(&self.state);
        state.check()?;
        Ok(CommitNo(state.durable))
    }

    /// The newest durable commit, whatever happened since.
    pub(crate) fn newest(&self) -> CommitNo {
        CommitNo(lock(&self.state).durable)
    }

    pub(crate) fn wait(&self, commit: CommitNo) -> Result<(), StoreError> {
        loop {
            let opened = {
                let mut state = lock(&self.state);
                if state.failure.is_none() && state.durable >= commit.0 {
                    return Ok(());
                }
                state.check()?;
                state.gate(commit.0)
            };
            opened.wait();
        }
    }

    /// Says that commits up to this one will become durable together, unless more join them.
    pub(crate) fn expect(&self, last: CommitNo) {
        let mut state = lock(&self.state);
        let gate = state.gates.remove(&u64::MAX).unwrap_or_else(Gate::new);
        state.gates.insert(last.0, gate);
    }

    /// Raises the newest durable commit and tells everyone. Does nothing once the store has
    /// failed: nothing more becomes durable then.
    pub(crate) fn advance(&self, commit: CommitNo) {
        let reached = {
            let mut state = lock(&self.state);
            if state.failure.is_some() || commit.0 <= state.durable {
                return;
            }
            state.durable = commit.0;
            // A gate that covers later commits too opens with the first: whoever still waits comes back.
            let mut reached = Vec::new();
            state.gates.retain(|last, gate| {
                let waits = *last > commit.0 && gate.oldest > commit.0;
                if !waits {
                    reached.push(Arc::clone(&gate.opened));
                }
                waits
            });
            reached
        };
        open(reached);
        self.tell();
    }

    /// Stops the store for good. The first failure is the one that is kept and told.
    pub(crate) fn poison(&self, cause: impl Into<String>) {
        let waiting = {
            let mut state = lock(&self.state);
            if state.failure.is_some() || state.closed {
                return;
            }
            let cause = cause.into();
            tracing::error!(%cause, "the store stopped");
            state.failure = Some(cause);
            std::mem::take(&mut state.gates)
        };
        open(waiting.into_values().map(|gate| gate.opened));
        self.tell();
    }

    /// Later calls are refused. Drops the hook, so that what it holds is let go.
    pub(crate) fn close(&self) {
        let waiting = {
            let mut state = lock(&self.state);
            state.closed = true;
            std::mem::take(&mut state.gates)
        };
        open(waiting.into_values().map(|gate| gate.opened));
        let hook = lock(&self.hook).call.take();
        drop(hook);
    }

    /// Starts again after a failure, as if opened anew.
    pub(crate) fn restart(&self, durable: CommitNo) {
        let mut hook = lock(&self.hook);
        hook.told = durable.0;
        hook.told_failure = false;
        *lock(&self.state) = State::new(durable);
    }

    pub(crate) fn set_hook(&self, call: DurableHook) {
        let earlier = lock(&self.hook).call.replace(call);
        drop(earlier);
    }

    /// Calls the hook with what it has not heard: what is durable first, then the failure.
    /// The lock on the hook is held meanwhile, so the numbers it hears only grow, whichever
    /// threads bring them.
    fn tell(&self) {
        let mut hook = lock(&self.hook);
        let (durable, failure) = {
            let state = lock(&self.state);
            (state.durable, state.failure.clone())
        };
        if durable > hook.told {
            hook.told = durable;
            hook.call(Ok(CommitNo(durable)));
        }
        if let Some(cause) = failure
            && !hook.told_failure
        {
            hook.told_failure = true;
            hook.call(Err(StoreError::Poisoned { cause }));
        }
    }
}

impl Hook {
    fn call(&self, news: Result<CommitNo, StoreError>) {
        if let Some(call) = &self.call
            && catch_unwind(AssertUnwindSafe(|| call(news))).is_err()
        {
            // What is durable stays durable: a bug of the listener must not stop the store.
            tracing::error!("the durable hook panicked");
        }
    }
}

fn open(gates: impl IntoIterator<Item = Arc<OnceLock<()>>>) {
    for gate in gates {
        // Nobody else opens it.
        let _ = gate.set(());
    }
}

impl State {
    fn new(durable: CommitNo) -> Self {
        State { durable: durable.0, failure: None, closed: false, gates: BTreeMap::new() }
    }

    /// Where to wait for a commit.
    fn gate(&mut self, commit: u64) -> Arc<OnceLock<()>> {
        let covering = self.gates.range(commit..).next().map_or(u64::MAX, |(last, _)| *last);
        let gate = self.gates.entry(covering).or_insert_with(Gate::new);
        gate.oldest = gate.oldest.min(commit);
        Arc::clone(&gate.opened)
    }

    fn check(&self) -> Result<(), StoreError> {
        match &self.failure {
            Some(cause) => Err(StoreError::Poisoned { cause: cause.clone() }),
            None if self.closed => Err(StoreError::Closed),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// However commits are divided into groups, and whether or not someone said so before.
    #[test]
    fn each_waits_until_its_own_commit_is_durable_and_no_longer() {
        for expected in [&[][..], &[6], &[1, 4], &[2, 3, 9]] {
            let durability = Durability::new(CommitNo(0));
            std::thread::scope(|scope| {
                for commit in (1..=6).cycle().take(24) {
                    let durability = &durability;
                    scope.spawn(move || {
                        durability.wait(CommitNo(commit)).unwrap();
                        assert!(durability.newest() >= CommitNo(commit));
                    });
                }
                for last in expected {
                    durability.expect(CommitNo(*last));
                    std::thread::yield_now();
                }
                for commit in 1..=6 {
                    durability.advance(CommitNo(commit));
                    std::thread::yield_now();
                }
            });
            assert!(lock(&durability.state).gates.range(..=6).next().is_none());
        }
    }

    #[test]
    fn a_failure_wakes_whoever_waits() {
        let durability = Durability::new(CommitNo(0));
        durability.expect(CommitNo(1));
        std::thread::scope(|scope| {
            let waiting = [1, 2].map(|commit| {
                scope.spawn({
                    let durability = &durability;
                    move || durability.wait(CommitNo(commit))
                })
            });
            durability.poison("to order");
            for waiting in waiting {
                assert!(matches!(waiting.join().unwrap(), Err(StoreError::Poisoned { .. })));
            }
        });
    }
}
