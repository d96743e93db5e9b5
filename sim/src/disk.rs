//! A disk: it keeps what was flushed, may be full, may tear, and can be copied. What passes is
//! watched: a replica's outbox is noted, and no commit may leave half of a transaction.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anabranch_core::codec::{self, HeaderRecord};
use anabranch_core::header::Header;
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
    Refused { commit: CommitNo, number: u64, record: serde_json::Value },
    /// A refused change that the user has let go of, or that came back.
    Withdrawn { commit: CommitNo, number: u64 },
    /// A commit left this many of a transaction's members.
    Half { commit: CommitNo, found: usize, members: u32 },
}

/// A store whose flushes come when they are told to.
pub(crate) struct Disk {
    store: MemoryStore,
    full: AtomicBool,
    torn: AtomicBool,
    noted: Mutex<Vec<Noted>>,
    /// Read when it is first needed.
    transactions: Mutex<Option<Transactions>>,
}

/// Which entities have a change of which transaction.
#[derive(Default)]
struct Transactions {
    /// By the key of a header.
    of: BTreeMap<Vec<u8>, [u8; 16]>,
    /// How many members a transaction has, and the headers of those that are there.
    there: BTreeMap<[u8; 16], (u32, BTreeSet<Vec<u8>>)>,
}

impl Transactions {
    /// Those of which a store has something.
    fn on(store: &MemoryStore) -> Self {
        let mut transactions = Self::default();
        let headers = store.scan(View::Latest, Keyspace::HEADER, &[], &[], usize::MAX);
        for (key, value) in headers.unwrap_or_default() {
            transactions.take(&key, Some(&value));
        }
        transactions
    }

    /// Takes note of a header that was written or removed. Returns the transactions that it moved.
    fn take(&mut self, key: &[u8], value: Option<&[u8]>) -> [Option<[u8; 16]>; 2] {
        let before = self.of.remove(key);
        if let Some((_, there)) = before.and_then(|id| self.there.get_mut(&id)) {
            there.remove(key);
        }
        let header = value.and_then(|bytes| codec::decode::<HeaderRecord>(bytes, "a header").ok());
        let after = header.and_then(|header| Header::from(header).tx);
        if let Some(tx) = after {
            self.of.insert(key.to_vec(), tx.id);
            self.there.entry(tx.id).or_insert((tx.members, BTreeSet::new())).1.insert(key.to_vec());
        }
        [before, after.map(|tx| tx.id)]
    }

    /// How many entities have a change of a transaction, if that is neither none nor all.
    fn half(&self, id: &[u8; 16]) -> Option<(usize, u32)> {
        let (members, there) = self.there.get(id)?;
        // The last four bytes say where in its entity a header is.
        let entities: BTreeSet<&[u8]> = there.iter().map(|key| &key[..key.len() - 4]).collect();
        let whole = entities.is_empty() || entities.len() == *members as usize;
        (!whole).then_some((entities.len(), *members))
    }
}

impl Disk {
    pub(crate) fn new() -> Self {
        Self::of(MemoryStore::manual())
    }

    fn of(store: MemoryStore) -> Self {
        Self {
            store,
            full: AtomicBool::new(false),
            torn: AtomicBool::new(false),
            noted: Mutex::default(),
            transactions: Mutex::default(),
        }
    }

    /// A batch is on the disk in part. A store must find that out when it is opened and say so;
    /// that ours does is proved by tests of its own.
    pub(crate) fn tear(&self) {
        self.torn.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_torn(&self) -> bool {
        self.torn.load(Ordering::Relaxed)
    }

    fn readable(&self) -> Result<(), StoreError> {
        match self.is_torn() {
            true => Err(StoreError::Damaged { what: "a batch is there in part".into() }),
            false => Ok(()),
        }
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
            Op::Put(Keyspace::REFUSED, key, value) => {
                Some(Noted::Refused { commit, number: number(key)?, record: json(value)? })
            }
            Op::Delete(Keyspace::REFUSED, key) => Some(Noted::Withdrawn { commit, number: number(key)? }),
            _ => None,
        });
        let mut noted: Vec<Noted> = noted.collect();
        noted.extend(self.halves(commit, ops));
        self.noted.lock().unwrap_or_else(PoisonError::into_inner).extend(noted);
    }

    /// Transactions of which a commit leaves some members and not all.
    fn halves(&self, commit: CommitNo, ops: &[Op]) -> Vec<Noted> {
        let mut known = self.transactions.lock().unwrap_or_else(PoisonError::into_inner);
        let transactions = known.get_or_insert_with(|| Transactions::on(&self.store));
        let mut moved = BTreeSet::new();
        for op in ops {
            moved.extend(match op {
                Op::Put(Keyspace::HEADER, key, value) => transactions.take(key, Some(value)),
                Op::Delete(Keyspace::HEADER, key) => transactions.take(key, None),
                _ => [None, None],
            });
        }
        let half = |id| transactions.half(&id).map(|(found, members)| Noted::Half { commit, found, members });
        moved.into_iter().flatten().filter_map(half).collect()
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
        self.readable()?;
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
        self.readable()?;
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
        self.readable()?;
        self.store.scan_rev(view, keyspace, prefix, before, limit)
    }

    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError> {
        if self.is_full() && !batch.is_empty() {
            return Err(StoreError::NoSpace { free_bytes: 0, floor_bytes: 1 });
        }
        let watched = |op: &&Op| {
            let (Op::Put(keyspace, ..) | Op::Delete(keyspace, _)) = op;
            matches!(*keyspace, Keyspace::OUTBOX | Keyspace::REFUSED | Keyspace::HEADER)
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
