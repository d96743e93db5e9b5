//! A store in memory, for tests and the simulator.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use anabranch_core::mutated;
use anabranch_core::store::{
    Batch, CommitNo, DurableHook, Entry, Keyspace, Op, Store, StoreError, StoreStats, View,
};

use crate::durability::Durability;
use crate::keys::{KeyRange, check_batch, check_keyspace, logical, physical};

/// Most batches that may wait for [`MemoryStore::make_durable`]. Waiting for room would
/// hang a simulation of one thread, so at the bound a commit is refused instead.
pub(crate) const HELD_BATCHES_MAX: usize = 65_536;

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// A store that keeps everything in memory. It has no threads: the hook runs inside
/// [`Store::commit`] or [`MemoryStore::make_durable`], on the caller's thread.
pub struct MemoryStore {
    manual: bool,
    state: RwLock<State>,
    durability: Durability,
}

#[derive(Default)]
struct State {
    published: Map,
    /// Everything committed; only kept where it can differ from `published`.
    latest: Map,
    queued: VecDeque<(u64, Batch)>,
    last: u64,
}

impl Default for MemoryStore {
    fn default() -> Self {
        Self::new()
    }
}

impl MemoryStore {
    /// An empty store in which each batch is durable as soon as it is committed.
    pub fn new() -> Self {
        Self::with(false, State::default())
    }

    /// An empty store in which batches become durable only through
    /// [`MemoryStore::make_durable`]. At most 65,536 batches may wait; a commit beyond them
    /// is refused.
    pub fn manual() -> Self {
        Self::with(true, State::default())
    }

    fn with(manual: bool, state: State) -> Self {
        let durability = Durability::new(CommitNo(state.last));
        MemoryStore { manual, state: RwLock::new(state), durability }
    }

    /// Makes all queued batches up to `commit` durable and tells the hook.
    pub fn make_durable(&self, commit: CommitNo) -> Result<(), StoreError> {
        self.durability.check()?;
        let newest = match mutated!(SkipFlush) {
            false => self.write().publish(commit),
            true => {
                let mut state = self.write();
                let newest = CommitNo(commit.0.min(state.last));
                state.publish(CommitNo(newest.0.saturating_sub(1)));
                // The last one is said to be durable, and is nowhere.
                state.queued.retain(|(commit, _)| *commit > newest.0);
                newest
            }
        };
        self.durability.advance(newest);
        Ok(())
    }

    /// Stops this store as a failed sync would.
    pub fn poison(&self, cause: &str) {
        self.durability.poison(cause);
    }

    /// What another process would find after this one was killed now: a new store with all
    /// that is durable and nothing else. This one answers [`StoreError::Closed`] from now on.
    pub fn reopen(&self) -> MemoryStore {
        let mut state = self.write();
        self.durability.close();
        let published = std::mem::take(&mut state.published);
        let latest = if self.manual { published.clone() } else { Map::new() };
        let last = self.durability.newest().0;
        *state = State::default();
        MemoryStore::with(self.manual, State { published, latest, queued: VecDeque::new(), last })
    }

    /// A new store with all that is durable in this one, as a copy of a directory has.
    #[must_use]
    pub fn copy(&self) -> MemoryStore {
        let published = self.read().published.clone();
        let latest = if self.manual { published.clone() } else { Map::new() };
        let last = self.durability.newest().0;
        MemoryStore::with(self.manual, State { published, latest, queued: VecDeque::new(), last })
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn map<'a>(&self, state: &'a State, view: View) -> &'a Map {
        match view {
            View::Latest if self.manual => &state.latest,
            _ => &state.published,
        }
    }
}

impl State {
    fn publish(&mut self, upto: CommitNo) -> CommitNo {
        let mut newest = CommitNo(0);
        while self.queued.front().is_some_and(|(commit, _)| *commit <= upto.0) {
            let Some((commit, batch)) = self.queued.pop_front() else { break };
            apply(&mut self.published, batch);
            newest = CommitNo(commit);
        }
        newest
    }
}

fn apply(map: &mut Map, batch: Batch) {
    for op in batch.into_ops() {
        match op {
            Op::Put(keyspace, key, value) => map.insert(physical(keyspace, &key), value),
            Op::Delete(keyspace, key) => map.remove(&physical(keyspace, &key)),
        };
    }
}

impl Store for MemoryStore {
    fn get(&self, view: View, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.durability.check()?;
        check_keyspace(keyspace)?;
        Ok(self.map(&self.read(), view).get(&physical(keyspace, key)).cloned())
    }

    fn scan(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        self.durability.check()?;
        check_keyspace(keyspace)?;
        let Some(range) = KeyRange::forward(keyspace, prefix, from) else { return Ok(Vec::new()) };
        let state = self.read();
        let entries = self.map(&state, view).range::<Vec<u8>, _>(range.bounds::<Vec<u8>>());
        Ok(entries.take(limit).map(|(k, v)| (logical(k), v.clone())).collect())
    }

    fn scan_rev(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        before: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        self.durability.check()?;
        check_keyspace(keyspace)?;
        let Some(range) = KeyRange::reverse(keyspace, prefix, before) else { return Ok(Vec::new()) };
        let state = self.read();
        let entries = self.map(&state, view).range::<Vec<u8>, _>(range.bounds::<Vec<u8>>());
        Ok(entries.rev().take(limit).map(|(k, v)| (logical(k), v.clone())).collect())
    }

    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError> {
        check_batch(&batch)?;
        let commit = {
            let mut state = self.write();
            self.durability.check()?;
            if state.queued.len() >= HELD_BATCHES_MAX {
                return Err(StoreError::Io {
                    operation: "queue a batch",
                    cause: format!("{HELD_BATCHES_MAX} batches wait to be made durable already"),
                });
            }
            state.last += 1;
            let commit = CommitNo(state.last);
            if self.manual {
                apply(&mut state.latest, batch.clone());
                state.queued.push_back((commit.0, batch));
            } else {
                apply(&mut state.published, batch);
            }
            commit
        };
        if !self.manual {
            self.durability.advance(commit);
        }
        Ok(commit)
    }

    fn durable(&self) -> Result<CommitNo, StoreError> {
        self.durability.durable()
    }

    fn wait_durable(&self, commit: CommitNo) -> Result<(), StoreError> {
        self.durability.wait(commit)
    }

    fn set_durable_hook(&self, hook: DurableHook) {
        self.durability.set_hook(hook);
    }

    fn stats(&self) -> StoreStats {
        StoreStats {
            disk_bytes: 0,
            queued_batches: self.read().queued.len() as u64,
            durable: self.durability.newest(),
        }
    }

    fn shut_down(&self) -> Result<(), StoreError> {
        self.make_durable(CommitNo(u64::MAX))?;
        self.durability.close();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract;
    use std::sync::{Arc, Mutex};

    #[test]
    fn the_contract_holds() {
        contract::run_all(&|| {
            let held: Mutex<Option<Arc<MemoryStore>>> = Mutex::new(None);
            Box::new(move || {
                let mut held = held.lock().unwrap();
                let store = match held.take() {
                    None => Arc::new(MemoryStore::new()),
                    Some(earlier) => Arc::new(earlier.reopen()),
                };
                *held = Some(store.clone());
                store
            })
        });
    }

    #[test]
    fn only_what_was_made_durable_is_published_and_outlives_the_process() {
        let store = MemoryStore::manual();
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, "a", "1");
        let first = store.commit(batch).unwrap();
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, "a", "2");
        batch.put(Keyspace::ROW, "b", "2");
        let second = store.commit(batch).unwrap();
        assert_eq!(store.get(View::Published, Keyspace::ROW, b"a").unwrap(), None);
        assert_eq!(store.get(View::Latest, Keyspace::ROW, b"a").unwrap().unwrap(), b"2");

        store.make_durable(first).unwrap();
        assert_eq!(store.durable().unwrap(), first);
        assert_eq!(store.get(View::Published, Keyspace::ROW, b"a").unwrap().unwrap(), b"1");
        assert_eq!(store.get(View::Published, Keyspace::ROW, b"b").unwrap(), None);
        assert_eq!(store.stats().queued_batches, 1);

        let found = store.reopen();
        assert!(matches!(store.durable(), Err(StoreError::Closed)));
        assert_eq!(found.get(View::Latest, Keyspace::ROW, b"a").unwrap().unwrap(), b"1");
        assert_eq!(found.get(View::Latest, Keyspace::ROW, b"b").unwrap(), None);
        assert_eq!(found.commit(Batch::new()).unwrap(), second);
    }
}
