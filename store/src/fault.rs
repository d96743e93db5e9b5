//! Faults to order, so that what must hold when a store fails can be tested.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex};

use anabranch_core::store::{
    Batch, CommitNo, DurableHook, Entry, Keyspace, Op, Store, StoreError, StoreStats, View,
};

use crate::durability::{Durability, lock};
use crate::keys::{KeyRange, check_batch, check_keyspace, logical, physical};
use crate::memory::HELD_BATCHES_MAX;
use crate::merge::{merge_page, source};

/// Wraps a store and fails on request, the same way each time.
///
/// Faults are ordered by methods that change nothing else: [`fail_commit`](Self::fail_commit),
/// [`poison`](Self::poison), [`fill`](Self::fill) with [`make_room`](Self::make_room), [`hold`](Self::hold) with [`release`](Self::release), and
/// [`crash`](Self::crash) with [`restart`](Self::restart). While batches are held they are
/// kept here and the wrapped store hears nothing of them, so a crash loses exactly those.
///
/// The wrapped store must be used through this wrapper only.
pub struct FaultStore<S> {
    inner: S,
    state: Mutex<State>,
    durability: Arc<Durability>,
}

struct State {
    /// Number of the newest commit, held ones included.
    last: u64,
    /// Number of the newest commit that the wrapped store was given.
    forwarded: u64,
    holding: bool,
    held: VecDeque<(u64, Batch)>,
    /// What held batches say of each physical key, and the newest commit that says so.
    overlay: BTreeMap<Vec<u8>, (u64, Option<Vec<u8>>)>,
    fails_in: Option<u64>,
    full: bool,
}

impl<S: Store> FaultStore<S> {
    /// Wraps `inner`, in which everything must be durable. No fault is ordered yet.
    pub fn new(inner: S) -> Result<Self, StoreError> {
        let durable = inner.durable()?;
        let durability = Arc::new(Durability::new(durable));
        let listener = Arc::clone(&durability);
        inner.set_durable_hook(Arc::new(move |news| match news {
            Ok(commit) => listener.advance(commit),
            Err(e) => listener.poison(e.to_string()),
        }));
        let state = State {
            last: durable.0,
            forwarded: durable.0,
            holding: false,
            held: VecDeque::new(),
            overlay: BTreeMap::new(),
            fails_in: None,
            full: false,
        };
        Ok(FaultStore { inner, state: Mutex::new(state), durability })
    }

    /// Makes the `n`th commit from now fail (1 is the next) and thereby poison the store.
    /// 0 takes an earlier order back.
    pub fn fail_commit(&self, n: u64) {
        lock(&self.state).fails_in = (n > 0).then_some(n);
    }

    /// From now on commits are refused with [`StoreError::NoSpace`], and nothing of them is queued.
    pub fn fill(&self) {
        lock(&self.state).full = true;
    }

    /// Takes [`fill`](Self::fill) back.
    pub fn make_room(&self) {
        lock(&self.state).full = false;
    }

    /// Stops the store as a failed sync would.
    pub fn poison(&self, cause: &str) {
        self.durability.poison(cause);
    }

    /// From now on nothing becomes durable: batches show in [`View::Latest`] only. At most
    /// 65,536 are held; a commit beyond them is refused.
    pub fn hold(&self) {
        lock(&self.state).holding = true;
    }

    /// Hands held batches on in order and holds no more.
    pub fn release(&self) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        state.holding = false;
        self.forward(&mut state, CommitNo(u64::MAX))
    }

    /// Hands on held batches up to `commit` and keeps holding.
    pub fn release_up_to(&self, commit: CommitNo) -> Result<(), StoreError> {
        self.forward(&mut lock(&self.state), commit)
    }

    /// Loses every held batch and answers [`StoreError::Poisoned`] to everything, as after a
    /// power cut, until [`restart`](Self::restart).
    pub fn crash(&self) {
        let mut state = lock(&self.state);
        state.held.clear();
        state.overlay.clear();
        self.durability.poison("crash to order");
    }

    /// Opens again after a crash or an ordered failure, with what survived and without any
    /// ordered fault. What was held is lost here too, if it was not before.
    pub fn restart(&self) -> Result<(), StoreError> {
        let mut state = lock(&self.state);
        self.inner.wait_durable(CommitNo(state.forwarded))?;
        let durable = self.inner.durable()?;
        *state = State {
            last: durable.0,
            forwarded: durable.0,
            holding: false,
            held: VecDeque::new(),
            overlay: BTreeMap::new(),
            fails_in: None,
            full: false,
        };
        self.durability.restart(durable);
        Ok(())
    }

    /// The wrapped store, to look at.
    pub fn inner(&self) -> &S {
        &self.inner
    }

    fn forward(&self, state: &mut State, upto: CommitNo) -> Result<(), StoreError> {
        while state.held.front().is_some_and(|(commit, _)| *commit <= upto.0) {
            self.durability.check()?;
            let Some((commit, batch)) = state.held.pop_front() else { break };
            self.hand_on(state, commit, batch)?;
            state.overlay.retain(|_, (newest, _)| *newest > commit);
        }
        Ok(())
    }

    fn hand_on(&self, state: &mut State, commit: u64, batch: Batch) -> Result<(), StoreError> {
        let given = self.inner.commit(batch)?;
        state.forwarded = given.0;
        if given.0 != commit {
            self.durability.poison("the wrapped store was used past its wrapper");
            self.durability.check()?;
        }
        Ok(())
    }

    fn page(
        &self,
        view: View,
        keyspace: Keyspace,
        range: Option<KeyRange>,
        limit: usize,
        descending: bool,
        inner: impl Fn(usize) -> Result<Vec<Entry>, StoreError>,
    ) -> Result<Vec<Entry>, StoreError> {
        self.durability.check()?;
        check_keyspace(keyspace)?;
        let Some(range) = range else { return Ok(Vec::new()) };
        let state = lock(&self.state);
        if view == View::Published || state.overlay.is_empty() {
            return inner(limit);
        }
        let known = state.overlay.range::<Vec<u8>, _>(range.bounds::<Vec<u8>>());
        let mut known: Vec<_> = known.map(|(key, (_, value))| Ok((logical(key), value.clone()))).collect();
        if descending {
            known.reverse();
        }
        // Each key that is known here may take one of the wrapped store's off the page.
        let below = inner(limit.saturating_add(known.len()))?;
        let below = below.into_iter().map(|(key, value)| Ok((key, Some(value))));
        merge_page(vec![source(known.into_iter()), source(below)], descending, limit)
    }
}

impl<S: Store> Store for FaultStore<S> {
    fn get(&self, view: View, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        self.durability.check()?;
        check_keyspace(keyspace)?;
        let state = lock(&self.state);
        if view == View::Latest
            && let Some((_, value)) = state.overlay.get(&physical(keyspace, key))
        {
            return Ok(value.clone());
        }
        self.inner.get(view, keyspace, key)
    }

    fn scan(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let range = KeyRange::forward(keyspace, prefix, from);
        let inner = |limit| self.inner.scan(view, keyspace, prefix, from, limit);
        self.page(view, keyspace, range, limit, false, inner)
    }

    fn scan_rev(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        before: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let range = KeyRange::reverse(keyspace, prefix, before);
        let inner = |limit| self.inner.scan_rev(view, keyspace, prefix, before, limit);
        self.page(view, keyspace, range, limit, true, inner)
    }

    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError> {
        check_batch(&batch)?;
        let mut state = lock(&self.state);
        self.durability.check()?;
        if state.full {
            return Err(StoreError::NoSpace { free_bytes: 0, floor_bytes: 1 });
        }
        match state.fails_in {
            Some(1) => {
                state.fails_in = None;
                self.durability.poison("commit: failed to order");
                return Err(StoreError::Io { operation: "commit", cause: "failed to order".into() });
            }
            Some(n) => state.fails_in = Some(n - 1),
            None => {}
        }
        let commit = state.last + 1;
        if state.holding || !state.held.is_empty() {
            if state.held.len() >= HELD_BATCHES_MAX {
                return Err(StoreError::Io {
                    operation: "queue a batch",
                    cause: format!("{HELD_BATCHES_MAX} batches are held already"),
                });
            }
            for op in batch.ops() {
                let (key, value) = match op {
                    Op::Put(keyspace, key, value) => (physical(*keyspace, key), Some(value.clone())),
                    Op::Delete(keyspace, key) => (physical(*keyspace, key), None),
                };
                state.overlay.insert(key, (commit, value));
            }
            state.held.push_back((commit, batch));
        } else {
            self.hand_on(&mut state, commit, batch)?;
        }
        state.last = commit;
        Ok(CommitNo(commit))
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
        let inner = self.inner.stats();
        let held = lock(&self.state).held.len() as u64;
        StoreStats {
            disk_bytes: inner.disk_bytes,
            queued_batches: inner.queued_batches + held,
            durable: self.durability.newest(),
        }
    }

    fn shut_down(&self) -> Result<(), StoreError> {
        self.durability.check()?;
        self.release()?;
        self.inner.shut_down()?;
        self.durability.close();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::MemoryStore;
    use crate::contract;

    fn put(key: &str, value: &str) -> Batch {
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, key, value);
        batch
    }

    fn keys(store: &impl Store, view: View) -> Vec<String> {
        let page = store.scan(view, Keyspace::ROW, b"", b"", 100).unwrap();
        page.into_iter().map(|(key, _)| String::from_utf8(key).unwrap()).collect()
    }

    #[test]
    fn the_contract_holds() {
        contract::run_all(&|| {
            let held: Mutex<Option<Arc<FaultStore<MemoryStore>>>> = Mutex::new(None);
            Box::new(move || {
                let mut held = held.lock().unwrap();
                let inner = match held.take() {
                    None => MemoryStore::new(),
                    Some(earlier) => earlier.inner().reopen(),
                };
                let store = Arc::new(FaultStore::new(inner).unwrap());
                *held = Some(store.clone());
                store
            })
        });
    }

    #[test]
    fn held_batches_show_in_latest_only_and_are_lost_in_a_crash() {
        let store = FaultStore::new(MemoryStore::new()).unwrap();
        store.commit(put("a", "1")).unwrap();
        store.commit(put("b", "1")).unwrap();
        store.hold();
        let mut batch = put("c", "1");
        batch.delete(Keyspace::ROW, "a");
        let third = store.commit(batch).unwrap();
        store.commit(put("d", "1")).unwrap();
        assert_eq!(keys(&store, View::Latest), ["b", "c", "d"]);
        assert_eq!(keys(&store, View::Published), ["a", "b"]);
        let newest = store.scan_rev(View::Latest, Keyspace::ROW, b"", b"", 2).unwrap();
        assert_eq!(newest[0].0, b"d");

        store.release_up_to(third).unwrap();
        assert_eq!(store.durable().unwrap(), third);
        assert_eq!(keys(&store, View::Published), ["b", "c"]);

        store.crash();
        assert!(matches!(store.commit(put("e", "1")), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.durable(), Err(StoreError::Poisoned { .. })));
        store.restart().unwrap();
        assert_eq!(keys(&store, View::Latest), ["b", "c"]);
        assert_eq!(store.commit(put("e", "1")).unwrap(), CommitNo(third.0 + 1));
    }

    #[test]
    fn the_ordered_commit_fails_and_the_hook_hears_of_it_once() {
        let store = FaultStore::new(MemoryStore::new()).unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&heard);
        store.set_durable_hook(Arc::new(move |news| log.lock().unwrap().push(news.is_ok())));
        store.fail_commit(2);
        store.commit(put("a", "1")).unwrap();
        assert!(matches!(store.commit(put("b", "1")), Err(StoreError::Io { .. })));
        assert!(matches!(store.commit(put("c", "1")), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.get(View::Published, Keyspace::ROW, b"a"), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.wait_durable(CommitNo(2)), Err(StoreError::Poisoned { .. })));
        store.poison("again");
        assert_eq!(*heard.lock().unwrap(), [true, false]);
    }
}
