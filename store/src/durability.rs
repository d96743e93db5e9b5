//! How far a store has kept its word: the newest durable commit, whether the store has
//! failed or was closed, who waits for it, and the hook.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anabranch_core::store::{CommitNo, DurableHook, StoreError};

/// Locks whether or not a panic happened under the lock: each place that holds one leaves
/// whole state behind, and a panic of a store thread poisons the store by other means.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// See the [module](self).
pub(crate) struct Durability {
    state: Mutex<State>,
    changed: Condvar,
    hook: Mutex<Hook>,
}

struct State {
    durable: u64,
    failure: Option<String>,
    closed: bool,
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
            state: Mutex::new(State { durable: durable.0, failure: None, closed: false }),
            changed: Condvar::new(),
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
        let mut state = lock(&self.state);
        loop {
            if state.failure.is_none() && state.durable >= commit.0 {
                return Ok(());
            }
            state.check()?;
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Raises the newest durable commit and tells everyone. Does nothing once the store has
    /// failed: nothing more becomes durable then.
    pub(crate) fn advance(&self, commit: CommitNo) {
        {
            let mut state = lock(&self.state);
            if state.failure.is_some() || commit.0 <= state.durable {
                return;
            }
            state.durable = commit.0;
        }
        self.changed.notify_all();
        self.tell();
    }

    /// Stops the store for good. The first failure is the one that is kept and told.
    pub(crate) fn poison(&self, cause: impl Into<String>) {
        {
            let mut state = lock(&self.state);
            if state.failure.is_some() || state.closed {
                return;
            }
            let cause = cause.into();
            tracing::error!(%cause, "the store stopped");
            state.failure = Some(cause);
        }
        self.changed.notify_all();
        self.tell();
    }

    /// Later calls are refused. Drops the hook, so that what it holds is let go.
    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.changed.notify_all();
        let hook = lock(&self.hook).call.take();
        drop(hook);
    }

    /// Starts again after a failure, as if opened anew.
    pub(crate) fn restart(&self, durable: CommitNo) {
        let mut hook = lock(&self.hook);
        hook.told = durable.0;
        hook.told_failure = false;
        *lock(&self.state) = State { durable: durable.0, failure: None, closed: false };
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

impl State {
    fn check(&self) -> Result<(), StoreError> {
        match &self.failure {
            Some(cause) => Err(StoreError::Poisoned { cause: cause.clone() }),
            None if self.closed => Err(StoreError::Closed),
            None => Ok(()),
        }
    }
}
