//! A disk: it keeps what was flushed, may be full, and can be copied. What a replica writes to
//! its outbox is noted as it passes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anabranch_core::store::{
    Batch, CommitNo, DurableHook, Entry, Keyspace, Op, Store, StoreError, StoreStats, View,
};
use anabranch_store::MemoryStore;

/// What a batch says of the outbox or of what was refused: see [`Disk::take_noted`].
#[derive(Clone, Debug)]
pub(crate) enum Noted {
    /// A pending change, new or written again.
    Pending { commit: CommitNo, number: u64, record: serde_json::Value },
    /// A pending change that is pending no more.
    Settled { commit: CommitNo, number: u64 },
    /// A change that was refused.
    Refused { commit: CommitNo, record: serde_json::Value },
}

/// A store whose flushes come when they are told to.
pub(crate) struct Disk {
    store: MemoryStore,
    full: AtomicBool,
    noted: Mutex<Vec<Noted>>,
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self::of(MemoryStore::manual())
    }

    fn of(store: MemoryStore) -> Self {
        Self { store, full: AtomicBool::new(false), noted: Mutex::default() }
    }

    /// From now on there is no room, or there is again.
    pub(crate) fn set_full(&self, full: bool) {
        self.full.store(full, Ordering::Relaxed);
    }

    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// The flush of everything up to `commit` is done.
    pub(crate) fn flush(&self, commit: CommitNo) -> Result<(), StoreError> {
        self.store.make_durable(commit)
    }

    /// What is found after the process died: all that was flushed.
    pub(crate) fn after_a_crash(&self) -> Self {
        Self::of(self.store.reopen())
    }

    /// What a backup that is taken now holds.
    pub(crate) fn backup(&self) -> Self {
        Self::of(self.store.copy())
    }

    /// What went by since this was asked last.
    pub(crate) fn take_noted(&self) -> Vec<Noted> {
        std::mem::take(&mut *self.noted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The durable outbox: numbers and records.
    pub(crate) fn outbox(&self) -> Vec<(u64, serde_json::Value)> {
        let found = self.store.scan(View::Published, Keyspace::OUTBOX, &[], &[], usize::MAX);
        let found = found.unwrap_or_default();
        found.iter().filter_map(|(key, value)| Some((number(key)?, json(value)?))).collect()
    }

    fn note(&self, commit: CommitNo, ops: &[Op]) {
        let noted = ops.iter().filter_map(|op| match op {
            Op::Put(Keyspace::OUTBOX, key, value) => {
                Some(Noted::Pending { commit, number: number(key)?, record: json(value)? })
            }
            Op::Delete(Keyspace::OUTBOX, key) => Some(Noted::Settled { commit, number: number(key)? }),
            Op::Put(Keyspace::REFUSED, _, value) => Some(Noted::Refused { commit, record: json(value)? }),
            _ => None,
        });
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).extend(noted);
    }
}

fn number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*key.last_chunk::<8>()?))
}

/// A record that is JSON and lies in its place, not spilled: none in a simulation is that large.
fn json(value: &[u8]) -> Option<serde_json::Value> {
    serde_json::from_slice(value.strip_prefix(&[0])?).ok()
}

impl Store for Disk {
    fn get(&self, view: View, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.store.get(view, keyspace, key)
    }

    fn scan(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        self.store.scan(view, keyspace, prefix, from, limit)
    }

    fn scan_rev(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        before: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        self.store.scan_rev(view, keyspace, prefix, before, limit)
    }

    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError> {
        if self.is_full() && !batch.is_empty() {
            return Err(StoreError::NoSpace { free_bytes: 0, floor_bytes: 1 });
        }
        let watched = |op: &&Op| {
            let (Op::Put(keyspace, ..) | Op::Delete(keyspace, _)) = op;
            matches!(*keyspace, Keyspace::OUTBOX | Keyspace::REFUSED)
        };
        let ops: Vec<Op> = batch.ops().iter().filter(watched).cloned().collect();
        let commit = self.store.commit(batch)?;
        self.note(commit, &ops);
        Ok(commit)
    }

    fn durable(&self) -> Result<CommitNo, StoreError> {
        self.store.durable()
    }

    fn wait_durable(&self, commit: CommitNo) -> Result<(), StoreError> {
        self.store.wait_durable(commit)
    }

    fn set_durable_hook(&self, hook: DurableHook) {
        self.store.set_durable_hook(hook);
    }

    fn stats(&self) -> StoreStats {
        self.store.stats()
    }

    fn shut_down(&self) -> Result<(), StoreError> {
        self.store.shut_down()
    }
}
