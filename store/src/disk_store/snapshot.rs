//! One published state, read at leisure while writing goes on.
//!
//! From the moment at which a snapshot begins, the writer thread keeps the value that each key
//! had before a group changes it, unless the snapshot has that key behind it or kept already. What
//! was kept lies over what the backend shows: together they are the state of that moment.
//! Nothing waits for a snapshot but the writer thread, and that only where too much was
//! changed ahead of it.
//!
//! Entries are read as they are stored, below encryption and in the order on disk, so that
//! reading costs no key and no sorting.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::Duration;

use anabranch_core::store::StoreError;

use super::{Before, Shadow, Shared, open, seal};
use crate::backend::{Backend, Bytes};
use crate::durability::lock;
use crate::keys::{KeyRange, OWN};
use crate::merge::{merge_page, source};

/// Bytes of kept values, beyond which the writer thread waits until the snapshot has come further.
const KEPT_BYTES_MAX: usize = 64 << 20;
/// Entries of a page: a value has 64 KiB at most.
const PAGE_ENTRIES: usize = 128;

/// How often to look whether a group is still being applied.
const GROUP_WAIT: Duration = Duration::from_millis(1);

/// What a store needs for its snapshots, of which there is one at a time.
#[derive(Default)]
pub(super) struct Snapshots {
    turn: Mutex<()>,
    kept: Mutex<Option<Kept>>,
    room: Condvar,
}

/// What keys had before they were changed, as stored. Of a snapshot that is under way.
#[derive(Default)]
struct Kept {
    before: BTreeMap<Bytes, Option<Bytes>>,
    bytes: usize,
    /// All keys up to this one were read.
    passed: Option<Bytes>,
}

impl Snapshots {
    /// Whether one is under way.
    pub(super) fn is_active(&self) -> bool {
        lock(&self.kept).is_some()
    }

    /// Keeps what a group is about to change. Waits while too much is kept.
    pub(super) fn keep(&self, shadow: &Shadow) {
        let mut kept = lock(&self.kept);
        while kept.as_ref().is_some_and(|kept| kept.bytes > KEPT_BYTES_MAX) {
            kept = self.room.wait(kept).unwrap_or_else(PoisonError::into_inner);
        }
        if let Some(kept) = kept.as_mut() {
            kept.add(shadow);
        }
    }
}

impl Kept {
    fn add(&mut self, shadow: &Shadow) {
        for Before { stored_key: key, stored } in shadow.values() {
            if self.passed.as_ref().is_none_or(|passed| key > passed) && !self.before.contains_key(key) {
                self.bytes += entry_bytes(key, stored);
                self.before.insert(Bytes::clone(key), stored.clone());
            }
        }
    }

    fn pass(&mut self, key: Bytes) {
        while let Some(first) = self.before.first_entry()
            && *first.key() <= key
        {
            self.bytes -= entry_bytes(first.key(), first.get());
            first.remove();
        }
        self.passed = Some(key);
    }
}

fn entry_bytes(key: &Bytes, value: &Option<Bytes>) -> usize {
    // What the map itself takes counts too: many short entries must not be free.
    64 + key.len() + value.as_ref().map_or(0, |value| value.len())
}

/// See the [module](self).
pub(super) struct Snapshot<'a> {
    shared: &'a Shared,
    backend: Arc<dyn Backend>,
    last: u64,
    next: Option<Vec<u8>>,
    _turn: MutexGuard<'a, ()>,
}

impl<'a> Snapshot<'a> {
    /// The state that is published now. Waits for an earlier snapshot to end.
    pub(super) fn begin(shared: &'a Shared) -> Result<Snapshot<'a>, StoreError> {
        let turn = lock(&shared.snapshots.turn);
        let _applying = between_groups(shared)?;
        let published = shared.published();
        let backend = Arc::clone(published.backend()?);
        let mut kept = Kept::default();
        for shadow in &published.shadows {
            kept.add(shadow);
        }
        *lock(&shared.snapshots.kept) = Some(kept);
        Ok(Snapshot { shared, backend, last: published.last, next: Some(Vec::new()), _turn: turn })
    }

    /// The number of its newest commit.
    pub(super) fn last(&self) -> u64 {
        self.last
    }

    /// The next entries in the order of their stored keys, without the store's own; `None` at the end.
    pub(super) fn page(&mut self) -> Result<Option<Vec<(Bytes, Bytes)>>, StoreError> {
        loop {
            self.shared.durability.check()?;
            let Some(from) = self.next.take() else { return Ok(None) };
            let mut page = self.shared.guarded(|| self.read(from))?;
            if page.len() == PAGE_ENTRIES
                && let Some((key, _)) = page.last()
            {
                self.next = Some([&**key, &[0]].concat());
            }
            page.retain(|(key, _)| !key.starts_with(&[OWN.0]));
            if !page.is_empty() || self.next.is_none() {
                return Ok((!page.is_empty()).then_some(page));
            }
        }
    }

    fn read(&self, from: Vec<u8>) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        let reader = self.backend.stored().reader()?;
        // After the look at the backend: what that shows of later groups was kept before.
        let mut kept = lock(&self.shared.snapshots.kept);
        let kept = kept.get_or_insert_default();
        let lower = Bound::Included(Bytes::from(from.as_slice()));
        let before = kept.before.range((lower, Bound::Unbounded)).map(|(k, v)| Ok((k.clone(), v.clone())));
        let range = KeyRange { prefix: Vec::new(), lower: from, upper: None };
        let below = reader.range(&range, false)?.map(|entry| entry.map(|(k, v)| (k, Some(v))));
        let page = merge_page(vec![source(before), source(below)], false, PAGE_ENTRIES)?;
        if let Some((key, _)) = page.last() {
            kept.pass(key.clone());
            self.shared.snapshots.room.notify_all();
        }
        Ok(page)
    }

    /// An entry of a page as it was given to the store: its physical key and its value, which
    /// had the right checksum.
    ///
    /// # Errors
    /// [`StoreError::Damaged`].
    pub(super) fn reveal(&self, key: &Bytes, stored: &Bytes) -> Result<(Bytes, Bytes), StoreError> {
        let (key, value) = self.backend.opened_entry(key, stored)?;
        seal::unseal(&key, &value)?;
        Ok((key, value))
    }

    /// The store's own records of this state, as stored.
    pub(super) fn own_records(&self, epoch: &[u8]) -> Result<Vec<(Bytes, Bytes)>, StoreError> {
        let records = open::own_records(epoch, self.last);
        let stored = records.into_iter().map(|(key, value)| {
            let change = self.backend.sealed(key, Some(value))?;
            Ok(change.stored.map(|stored| (change.stored_key, stored)))
        });
        stored.filter_map(Result::transpose).collect()
    }
}

/// Waits until no group is in the middle of being applied. A backend that does not answer never
/// lets go; then the store is stopped, and this says so.
fn between_groups(shared: &Shared) -> Result<MutexGuard<'_, ()>, StoreError> {
    loop {
        shared.durability.check()?;
        match shared.applying.try_lock() {
            Ok(guard) => return Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => thread::sleep(GROUP_WAIT),
        }
    }
}

impl Drop for Snapshot<'_> {
    fn drop(&mut self) {
        *lock(&self.shared.snapshots.kept) = None;
        self.shared.snapshots.room.notify_all();
    }
}
