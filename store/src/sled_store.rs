//! The store on disk, on top of sled 0.34.
//!
//! # How a batch travels
//! ```text
//! commit ─▶ pending queue ─▶ writer thread ───────────▶ sync thread ──────────▶ published
//!           (bounded; its     merges what waits into     fdatasync of <dir>/db,  durable, hook
//!           contents are the  one sled batch: shadow,    once for all groups
//!           Latest overlay)   apply, flush               flushed before it began
//! ```
//! sled's `flush` does not sync on Linux (it is `pwrite` and `sync_file_range`), so the sync
//! thread does so itself on a second handle of the same file. While it syncs, the writer
//! merges the next group: many batches share one sync.
//!
//! # Who sees what
//! sled has no snapshots and shows a batch, even half of one, before it is flushed. So before
//! a group is applied its *shadow* is put up: the values its keys had before. Invariant:
//! every key in which sled may differ from the published state is in a shadow. Published
//! reads look into the shadows first, the oldest first, then into sled. A group is published
//! by taking its shadow down under the write lock that each page of a scan holds for reading;
//! nobody syncs under that lock, so reads never wait for the disk to sync.
//!
//! Latest reads look into the overlay first: the newest value of each key that is queued or
//! not yet durable. Invariant: every key in any shadow is in the overlay too.

mod commits;
mod disk;
mod open;
mod pending;
mod worker;

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use anabranch_core::store::{
    Batch, CommitNo, DurableHook, Entry, Keyspace, Store, StoreError, StoreStats, View,
};
use sled::IVec;

use crate::durability::{Durability, lock};
use crate::keys::{KeyRange, check_batch, check_keyspace, logical, physical};
use crate::merge::{Source, merge_page, source};
use commits::Commits;
use disk::Space;
use pending::Pending;

/// How a store on disk is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StoreOptions {
    /// Bytes of memory for cached pages. 48 MB by default, which suits a device; a relay
    /// wants 512 MB or more.
    pub cache_bytes: u64,
    /// Commits are refused with [`StoreError::NoSpace`] while fewer bytes than this are free
    /// on the volume. 16 MiB by default; it has to hold what is queued and what sled rewrites.
    pub free_space_floor_bytes: u64,
}

impl Default for StoreOptions {
    fn default() -> Self {
        StoreOptions { cache_bytes: 48_000_000, free_space_floor_bytes: 16 << 20 }
    }
}

impl StoreOptions {
    /// Sets [`StoreOptions::cache_bytes`].
    #[must_use]
    pub fn cache_bytes(mut self, bytes: u64) -> Self {
        self.cache_bytes = bytes;
        self
    }

    /// Sets [`StoreOptions::free_space_floor_bytes`].
    #[must_use]
    pub fn free_space_floor_bytes(mut self, bytes: u64) -> Self {
        self.free_space_floor_bytes = bytes;
        self
    }
}

/// Opens the store in the directory `dir`, or makes one there. See [`SledStore::open`].
pub fn open(dir: impl AsRef<Path>, options: StoreOptions) -> Result<Arc<SledStore>, StoreError> {
    SledStore::open(dir, options).map(Arc::new)
}

/// A durable store in a directory of its own, which one process at a time may have open.
///
/// Besides sled's files the directory holds `LOCK` (the owner's process id), `FORMAT` (the
/// version of the stored format) and `COMMITS` (how far the store had come; it tells when
/// the rest was silently taken back).
///
/// Dropping the store shuts it down like [`Store::shut_down`], without saying how that went.
pub struct SledStore {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    /// Held while the store is open, let go last.
    dir_lock: Mutex<Option<open::DirLock>>,
    rolled_back: bool,
}

/// What the threads of a store share. Locks are taken in the order of the fields.
struct Shared {
    dir: PathBuf,
    space: Mutex<Space>,
    pending: Pending,
    published: RwLock<Published>,
    commits: Mutex<Commits>,
    durability: Durability,
}

struct Published {
    /// Taken when the store is closed, as sled lets go of its files only with the last handle.
    db: Option<sled::Db>,
    /// Of the groups that are not yet durable, the oldest first.
    shadows: VecDeque<Arc<Shadow>>,
}

/// For each key a group touches, what it was before (values as stored).
type Shadow = BTreeMap<IVec, Option<IVec>>;

impl SledStore {
    /// Opens the store in `dir`, or makes one there. When this returns, everything that the
    /// store shows is durable.
    ///
    /// # Errors
    /// - [`StoreError::InUse`] after waiting two seconds for another process to let go.
    /// - [`StoreError::NewerFormat`]: nothing was changed.
    /// - [`StoreError::Damaged`]: the directory was renamed to `<dir>.damaged-N`, as the
    ///   error says, and nothing in it was deleted. Opening again makes a new, empty store;
    ///   that is for the caller to decide.
    /// - [`StoreError::NoSpace`] (below 4 MiB free in any case, as sled can't open without
    ///   writing), [`StoreError::Io`]: the directory is as it was; opening
    ///   may succeed once the cause is gone.
    pub fn open(dir: impl AsRef<Path>, options: StoreOptions) -> Result<SledStore, StoreError> {
        let opened = open::open(dir.as_ref(), &options)?;
        let shared = Arc::new(Shared {
            space: Mutex::new(Space::new(dir.as_ref(), options.free_space_floor_bytes)),
            dir: dir.as_ref().to_path_buf(),
            pending: Pending::new(opened.last),
            published: RwLock::new(Published { db: Some(opened.db), shadows: VecDeque::new() }),
            commits: Mutex::new(opened.commits),
            durability: Durability::new(CommitNo(opened.last)),
        });
        let workers = worker::start(&shared, opened.disk)?;
        Ok(SledStore {
            shared,
            workers: Mutex::new(workers),
            dir_lock: Mutex::new(Some(opened.lock)),
            rolled_back: opened.rolled_back,
        })
    }

    /// Whether the store is behind what it had once made durable, or that can't be ruled
    /// out: an older copy was put in its place, a file was lost, or sled went back silently.
    ///
    /// Whoever numbers things by this store must start numbering under a new name, then call
    /// [`SledStore::roll_back_handled`]. Until then each opening reports it again. Commit
    /// numbers go on behind the newest that was ever acknowledged. A copy of the whole
    /// directory can't be told from the original.
    pub fn rolled_back(&self) -> bool {
        self.rolled_back
    }

    /// Confirms a roll-back, so that later openings don't report it. Durable when this
    /// returns. Call it when what was done about it is durable.
    pub fn roll_back_handled(&self) -> Result<(), StoreError> {
        self.shared.durability.check()?;
        let settled = lock(&self.shared.commits).settle();
        settled.inspect_err(|e| self.shared.poison(e.to_string()))
    }

    /// Reads every stored value and compares its checksum. Returns how many were read. Takes
    /// as long as reading everything; other calls go on meanwhile.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] names the first damaged key. What is missing can't be found
    /// this way.
    pub fn verify(&self) -> Result<u64, StoreError> {
        const PAGE: usize = 256;
        let mut values = 0;
        for keyspace in 1..=u8::MAX {
            let mut from = Vec::new();
            loop {
                let page = self.scan(View::Published, Keyspace(keyspace), &[], &from, PAGE)?;
                values += page.len() as u64;
                match page.into_iter().last() {
                    Some((last, _)) => {
                        from = last;
                        from.push(0);
                    }
                    None => break,
                }
            }
        }
        Ok(values)
    }

    fn page(
        &self,
        view: View,
        keyspace: Keyspace,
        range: Option<KeyRange>,
        limit: usize,
        descending: bool,
    ) -> Result<Vec<Entry>, StoreError> {
        self.shared.durability.check()?;
        check_keyspace(keyspace)?;
        let Some(range) = range else { return Ok(Vec::new()) };
        let bounds = || range.bounds::<IVec>();
        let shared = &*self.shared;
        let found = shared.guarded(|| match view {
            View::Latest => {
                // Held for the page: an entry leaves the overlay only when sled has it.
                let overlay = shared.pending.overlay();
                let known = overlay.range::<IVec, _>(bounds()).map(|(k, v)| Ok((k.clone(), v.value.clone())));
                let known = in_direction(known, descending);
                let published = shared.published();
                let below = in_sled(published.db()?, bounds(), descending);
                merge_page(vec![known, below], descending, limit)
            }
            View::Published => {
                let published = shared.published();
                let mut sources = Vec::with_capacity(published.shadows.len() + 1);
                for shadow in &published.shadows {
                    let known = shadow.range::<IVec, _>(bounds()).map(|(k, v)| Ok((k.clone(), v.clone())));
                    sources.push(in_direction(known, descending));
                }
                sources.push(in_sled(published.db()?, bounds(), descending));
                merge_page(sources, descending, limit)
            }
        })?;
        let unsealed = found.into_iter().map(|(key, stored)| {
            let value = disk::unseal(&key, &stored)?.to_vec();
            Ok((logical(&key), value))
        });
        unsealed.collect()
    }

    /// Ends the threads, lets go of sled and then of the directory. Says what had gone wrong
    /// before, or does so now.
    fn stop(&self) -> Result<(), StoreError> {
        let mut workers = lock(&self.workers);
        let shared = &*self.shared;
        shared.pending.close();
        for worker in workers.drain(..) {
            // A worker may drop the last handle inside the hook; it can't wait for itself.
            if worker.thread().id() != std::thread::current().id() && worker.join().is_err() {
                shared.poison("a thread of the store panicked");
            }
        }
        let mut outcome = shared.durability.check();
        if outcome.is_ok() {
            outcome = lock(&shared.commits).sync_durable(shared.durability.newest().0);
        }
        let db = shared.published.write().unwrap_or_else(PoisonError::into_inner).db.take();
        if catch_unwind(AssertUnwindSafe(|| drop(db))).is_err() {
            tracing::warn!(dir = %shared.dir.display(), "sled panicked while it was closed");
        }
        shared.durability.close();
        drop(lock(&self.dir_lock).take());
        outcome
    }
}

fn in_direction<'a>(
    known: impl DoubleEndedIterator<Item = Result<(IVec, Option<IVec>), StoreError>> + 'a,
    descending: bool,
) -> Source<'a, IVec, IVec> {
    if descending { source(known.rev()) } else { source(known) }
}

fn in_sled<'a>(
    db: &sled::Db,
    bounds: (std::ops::Bound<IVec>, std::ops::Bound<IVec>),
    descending: bool,
) -> Source<'a, IVec, IVec> {
    let entries = db.range::<IVec, _>(bounds).map(|entry| match entry {
        Ok((key, value)) => Ok((key, Some(value))),
        Err(e) => Err(disk::sled_error("scan", e)),
    });
    in_direction(entries, descending)
}

impl Shared {
    fn published(&self) -> std::sync::RwLockReadGuard<'_, Published> {
        self.published.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the store for good and wakes everyone who waits for it.
    fn poison(&self, cause: impl Into<String>) {
        self.durability.poison(cause);
        self.pending.stop();
    }

    /// Runs a read. sled panics where it meets damage; what it leaves behind then is not to
    /// be used again.
    fn guarded<T>(&self, read: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
            let what = format!("sled panicked while reading: {}", disk::panic_words(&*panic));
            self.poison(what.clone());
            Err(StoreError::Damaged { what })
        })
    }
}

impl Published {
    fn db(&self) -> Result<&sled::Db, StoreError> {
        self.db.as_ref().ok_or(StoreError::Closed)
    }

    /// A value as stored.
    fn get(&self, key: &[u8]) -> Result<Option<IVec>, StoreError> {
        match self.shadows.iter().find_map(|shadow| shadow.get(key)) {
            Some(known) => Ok(known.clone()),
            None => self.db()?.get(key).map_err(|e| disk::sled_error("get", e)),
        }
    }
}

impl Store for SledStore {
    fn get(&self, view: View, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let shared = &*self.shared;
        shared.durability.check()?;
        check_keyspace(keyspace)?;
        let key = physical(keyspace, key);
        let stored = shared.guarded(|| {
            // What is not in the overlay is in no shadow either.
            if view == View::Latest
                && let Some(known) = shared.pending.overlay().get(key.as_slice())
            {
                return Ok(known.value.clone());
            }
            shared.published().get(&key)
        })?;
        stored.map(|stored| disk::unseal(&key, &stored).map(<[u8]>::to_vec)).transpose()
    }

    fn scan(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        self.page(view, keyspace, KeyRange::forward(keyspace, prefix, from), limit, false)
    }

    fn scan_rev(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        before: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        self.page(view, keyspace, KeyRange::reverse(keyspace, prefix, before), limit, true)
    }

    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError> {
        self.shared.durability.check()?;
        check_batch(&batch)?;
        lock(&self.shared.space).check(batch.size_bytes() as u64)?;
        match self.shared.pending.push(batch) {
            Some(commit) => Ok(CommitNo(commit)),
            None => {
                self.shared.durability.check()?;
                Err(StoreError::Closed)
            }
        }
    }

    fn durable(&self) -> Result<CommitNo, StoreError> {
        self.shared.durability.durable()
    }

    fn wait_durable(&self, commit: CommitNo) -> Result<(), StoreError> {
        self.shared.durability.wait(commit)
    }

    fn set_durable_hook(&self, hook: DurableHook) {
        self.shared.durability.set_hook(hook);
    }

    fn stats(&self) -> StoreStats {
        let shared = &*self.shared;
        let durable = shared.durability.newest();
        let queued_batches = shared.pending.last().saturating_sub(durable.0);
        let disk_bytes = shared.published().db.as_ref().and_then(|db| db.size_on_disk().ok());
        StoreStats { disk_bytes: disk_bytes.unwrap_or(0), queued_batches, durable }
    }

    fn shut_down(&self) -> Result<(), StoreError> {
        self.stop()
    }
}

impl Drop for SledStore {
    fn drop(&mut self) {
        match self.stop() {
            Ok(()) | Err(StoreError::Closed) => {}
            Err(e) => tracing::warn!(dir = %self.shared.dir.display(), error = %e, "closing the store"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FaultStore, contract};

    #[test]
    fn the_contract_holds() {
        contract::run_all(&|| {
            let dir = tempfile::tempdir().unwrap();
            Box::new(move || open(dir.path(), StoreOptions::default()).unwrap())
        });
    }

    #[test]
    fn the_contract_holds_behind_the_fault_wrapper() {
        let new_store = || -> contract::Opener {
            let dir = tempfile::tempdir().unwrap();
            Box::new(move || {
                let inner = SledStore::open(dir.path(), StoreOptions::default()).unwrap();
                Arc::new(FaultStore::new(inner).unwrap())
            })
        };
        contract::latest_shows_a_commit_at_once(&new_store);
        contract::what_was_acknowledged_outlives_the_store(&new_store);
        contract::a_closed_store_says_so(&new_store);
        contract::published_scans_are_never_torn(&new_store);
    }

    fn put(key: &str, value: &str) -> Batch {
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, key, value);
        batch
    }

    #[test]
    fn a_failure_of_a_thread_poisons_the_store_and_the_directory_opens_again() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path(), StoreOptions::default()).unwrap();
        let heard = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&heard);
        store.set_durable_hook(Arc::new(move |news| lock(&log).push(news.is_ok())));
        let commit = store.commit(put("a", "1")).unwrap();
        store.wait_durable(commit).unwrap();
        store.shared.poison("a sync failed to order");
        assert!(matches!(store.commit(put("a", "2")), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.wait_durable(CommitNo(2)), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.get(View::Latest, Keyspace::ROW, b"a"), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.shut_down(), Err(StoreError::Poisoned { .. })));
        assert_eq!(*lock(&heard), [true, false]);
        let store = SledStore::open(dir.path(), StoreOptions::default()).unwrap();
        assert!(!store.rolled_back());
        assert_eq!(store.durable().unwrap(), commit);
    }

    #[test]
    fn a_value_that_was_changed_behind_the_stores_back_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let store = SledStore::open(dir.path(), StoreOptions::default()).unwrap();
        let commit = store.commit(put("good", "1")).unwrap();
        store.wait_durable(commit).unwrap();
        assert_eq!(store.verify().unwrap(), 1);
        store.shared.published().db().unwrap().insert(b"\x05bad", b"no checksum").unwrap();
        for damaged in [
            store.get(View::Published, Keyspace::ROW, b"bad").map(|_| ()),
            store.scan(View::Latest, Keyspace::ROW, b"", b"", 9).map(|_| ()),
            store.verify().map(|_| ()),
        ] {
            let error = damaged.unwrap_err();
            assert!(matches!(error, StoreError::Damaged { .. }));
            assert!(error.to_string().contains("keyspace 5, key 626164"), "{error}");
        }
        assert!(store.get(View::Published, Keyspace::ROW, b"good").unwrap().is_some());
    }

    #[test]
    fn pages_of_large_values_that_sled_puts_aside_are_synced_and_survive() {
        let dir = tempfile::tempdir().unwrap();
        let large = |n: u8| vec![n; anabranch_core::store::VALUE_BYTES_MAX];
        let store = SledStore::open(dir.path(), StoreOptions::default()).unwrap();
        for round in 0..4 {
            for n in 0..60_u8 {
                let mut batch = Batch::new();
                batch.put(Keyspace::DOC, [n], large(n ^ round));
                store.commit(batch).unwrap();
            }
        }
        store.shut_down().unwrap();
        let store = SledStore::open(dir.path(), StoreOptions::default()).unwrap();
        assert_eq!(store.verify().unwrap(), 60);
        for n in 0..60_u8 {
            assert_eq!(store.get(View::Published, Keyspace::DOC, &[n]).unwrap().unwrap(), large(n ^ 3));
        }
    }
}
