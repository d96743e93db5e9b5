//! The store on disk, on top of sled or redb.
//!
//! # How a batch travels
//! ```text
//! commit ───▶ pending queue ─▶ writer thread ───────────▶ sync thread ──────────▶ published
//! (checksums,  (bounded; its     merges what waits into     backend.sync(),        durable, hook
//! encrypts)    contents are the  one group: shadow,         once for all groups
//!              Latest overlay)   backend.apply()            applied before it began
//! ```
//! There is one writer thread, so what can be done before is done by the threads that commit.
//!
//! While the sync thread syncs, the writer merges the next group: many batches share one
//! sync. redb syncs within `apply`, and its `sync` has nothing to do.
//!
//! # Who sees what
//! sled has no snapshots and shows a batch, even half of one, before it is flushed. So before
//! a group is applied its *shadow* is put up: the values its keys had before. Invariant:
//! every key in which the backend may differ from the published state is in a shadow.
//! Published reads look into the shadows first, the oldest first, then into the backend. A
//! group is published by taking its shadow down under the write lock that each page of a scan
//! holds for reading; nobody syncs under that lock, so reads never wait for the disk to sync.
//!
//! redb shows a group whole, and only when it is durable: what its readers see is what is
//! published, and there are no shadows.
//!
//! Latest reads look into the overlay first: the newest value of each key that is queued or
//! not yet durable. Invariant: every key in any shadow is in the overlay too.
//!
//! An encrypted store has another backend between these and the engine; see
//! [`encrypt`](crate::encrypt).

mod archive;
mod commits;
mod compact;
mod format;
mod lock;
mod open;
mod pending;
mod seal;
mod snapshot;
mod space;
mod swap;
mod usage;
mod watch;
mod worker;

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;

use anabranch_core::store::{
    Batch, CommitNo, DurableHook, Entry, Keyspace, Store, StoreError, StoreStats, View,
};

use crate::backend::{Backend, BackendKind, Bytes, Change, Reader, panic_words, release};
use crate::backup::BackupReport;
use crate::durability::{Durability, lock};
use crate::encrypt::{self, StoreKey};
use crate::keys::{KeyRange, OWN, check_batch, check_keyspace, logical, physical};
use crate::merge::{Source, merge_page, source};
use crate::options::StoreOptions;
pub use archive::restore;
use commits::Commits;
#[doc(hidden)]
pub use commits::reread_commits;
pub use compact::{CompactOptions, CompactReport, CompactStep, Encryption, compact};
use format::Format;
#[doc(hidden)]
pub use format::reread_format;
use pending::{Pending, Sealed};
use snapshot::Snapshots;
use space::Space;
pub use usage::{KeyspaceUsage, Usage};
use watch::Watch;

/// Opens the store in the directory `dir`, or makes one there. See [`DiskStore::open`].
pub fn open(dir: impl AsRef<Path>, options: StoreOptions) -> Result<Arc<DiskStore>, StoreError> {
    DiskStore::open(dir, options).map(Arc::new)
}

/// Makes `new` the key of the encrypted store in `dir`, which must not be open, in place of
/// `old`. Nothing but the file `KEY` is written. When this returns the change is durable; a
/// kill at any moment before leaves a store that opens with one of the two.
///
/// # Errors
/// [`StoreError::WrongKey`] if `old` is not the key, [`StoreError::NotEncrypted`] if there is
/// none, [`StoreError::InUse`] if the store is open: nothing was changed.
pub fn rekey(dir: impl AsRef<Path>, old: &StoreKey, new: &StoreKey) -> Result<(), StoreError> {
    open::rekey(dir.as_ref(), old, new)
}

/// How a directory keeps its store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Kept {
    /// What keeps the bytes.
    pub backend: BackendKind,
    /// Whether it is encrypted.
    pub encrypted: bool,
}

/// Says how the store in `dir` is kept, without opening it; `None` if there is none.
///
/// # Errors
/// [`StoreError::Damaged`] or [`StoreError::NewerFormat`] if that can't be read. Nothing is changed.
pub fn peek(dir: impl AsRef<Path>) -> Result<Option<Kept>, StoreError> {
    swap::finish(dir.as_ref())?;
    let format = Format::load(dir.as_ref())?;
    Ok(format.map(|format| Kept { backend: format.backend, encrypted: format.encrypted }))
}

/// A durable store in a directory of its own, which one process at a time may have open.
///
/// Besides the backend's files the directory holds `LOCK` (the owner's process id), `FORMAT`
/// (the version of the stored format, the backend, whether it is encrypted), `COMMITS` (how far
/// the store had come; it tells when the rest was silently taken back), and if it is encrypted
/// `KEY` (the data key, wrapped).
///
/// Dropping the store shuts it down like [`Store::shut_down`], without saying how that went.
pub struct DiskStore {
    shared: Arc<Shared>,
    workers: Mutex<Vec<JoinHandle<()>>>,
    /// Held while the store is open, let go last.
    dir_lock: Mutex<Option<lock::DirLock>>,
    rolled_back: bool,
    format: Format,
}

/// What the threads of a store share. Locks are taken in the order of the fields.
struct Shared {
    dir: PathBuf,
    space: Mutex<Space>,
    pending: Pending,
    /// Held while a group is applied.
    applying: Mutex<()>,
    published: RwLock<Published>,
    snapshots: Snapshots,
    commits: Mutex<Commits>,
    durability: Durability,
    watch: Watch,
}

struct Published {
    /// Taken when the store is closed: files are let go of only with the last handle.
    backend: Option<Arc<dyn Backend>>,
    /// Of the groups that are not yet durable, the oldest first.
    shadows: VecDeque<Arc<Shadow>>,
    /// The newest commit that is published.
    last: u64,
}

/// For each key a group touches, what was stored before.
type Shadow = BTreeMap<Bytes, Before>;

/// See [`Shadow`]. Encrypted still: few of them are ever read.
struct Before {
    stored_key: Bytes,
    stored: Option<Bytes>,
}

impl Before {
    /// What is stored now where a change will be.
    fn read(backend: &dyn Backend, reader: &dyn Reader, change: &Change) -> Result<Before, StoreError> {
        let stored_key = Bytes::clone(&change.stored_key);
        let stored = if backend.is_absent(&change.key) { None } else { reader.get(&stored_key)? };
        Ok(Before { stored_key, stored })
    }

    fn opened(&self, backend: &dyn Backend) -> Result<Option<Bytes>, StoreError> {
        match &self.stored {
            Some(stored) => Ok(Some(backend.opened_entry(&self.stored_key, stored)?.1)),
            None => Ok(None),
        }
    }
}

impl DiskStore {
    /// Opens the store in `dir`, or makes one there. When this returns, everything that the
    /// store shows is durable.
    ///
    /// # Errors
    /// - [`StoreError::InUse`] after waiting two seconds for another process to let go.
    /// - [`StoreError::NewerFormat`], [`StoreError::OtherBackend`], [`StoreError::KeyNeeded`],
    ///   [`StoreError::NotEncrypted`], [`StoreError::WrongKey`]: nothing was changed.
    /// - [`StoreError::Damaged`]: the directory was renamed to `<dir>.damaged-N`, as the
    ///   error says, and nothing in it was deleted. Opening again makes a new, empty store;
    ///   that is for the caller to decide.
    /// - [`StoreError::NoSpace`] (below 4 MiB free in any case, as no backend
    ///   opens without writing), [`StoreError::Io`]: the directory is as it was; opening
    ///   may succeed once the cause is gone.
    pub fn open(dir: impl AsRef<Path>, options: StoreOptions) -> Result<DiskStore, StoreError> {
        let opened = open::open(dir.as_ref(), &options)?;
        Self::start(dir.as_ref(), &options, opened, watch::STUCK_AFTER)
    }

    fn start(
        dir: &Path,
        options: &StoreOptions,
        opened: open::Opened,
        stuck_after: std::time::Duration,
    ) -> Result<DiskStore, StoreError> {
        let shared = Arc::new(Shared {
            space: Mutex::new(Space::new(dir, options.free_space_floor_bytes)),
            dir: dir.to_path_buf(),
            pending: Pending::new(opened.last),
            applying: Mutex::default(),
            published: RwLock::new(Published {
                backend: Some(opened.backend),
                shadows: VecDeque::new(),
                last: opened.last,
            }),
            snapshots: Snapshots::default(),
            commits: Mutex::new(opened.commits),
            durability: Durability::new(CommitNo(opened.last)),
            watch: Watch::new(stuck_after),
        });
        let workers = worker::start(&shared)?;
        Ok(DiskStore {
            shared,
            workers: Mutex::new(workers),
            dir_lock: Mutex::new(Some(opened.lock)),
            rolled_back: opened.rolled_back,
            format: opened.format,
        })
    }

    /// What keeps the bytes.
    pub fn backend(&self) -> BackendKind {
        self.format.backend
    }

    /// The version of the stored format.
    pub fn format_version(&self) -> u32 {
        self.format.version
    }

    /// Whether the store is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.format.encrypted
    }

    /// Makes `new` the key of the open store in place of `old`; see [`rekey`].
    pub fn rekey(&self, old: &StoreKey, new: &StoreKey) -> Result<(), StoreError> {
        self.shared.durability.check()?;
        encrypt::rekey(&self.shared.dir, old, new)
    }

    /// Whether the store is behind what it had once made durable, or that can't be ruled
    /// out: an older copy was put in its place, a file was lost, or the backend went back silently.
    ///
    /// Whoever numbers things by this store must start numbering under a new name, then call
    /// [`DiskStore::roll_back_handled`]. Until then each opening reports it again. Commit
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

    /// Reads every stored value and compares its checksum, then lets the backend check its
    /// pages. Returns how many values were read. Takes as long as reading everything; with
    /// redb, reads and commits wait while the pages are checked.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] names the first damaged key, or what the backend found. What is
    /// missing can't be found this way with sled.
    pub fn verify(&self) -> Result<u64, StoreError> {
        self.shared.durability.check()?;
        let backend = self.shared.published().backend()?.clone();
        self.shared.guarded(|| {
            let mut values = 0;
            backend.reader()?.walk(&mut |key, stored| {
                values += u64::from(!key.starts_with(&[OWN.0]));
                seal::unseal(key, stored).map(drop)
            })?;
            backend.verify()?;
            Ok(values)
        })
    }

    /// Counts what the store holds, in the state that is published now. Reads everything;
    /// meanwhile writing goes on.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], and what any read answers.
    pub fn usage(&self) -> Result<Usage, StoreError> {
        Usage::count(&self.shared)
    }

    /// Writes a backup of the state that is published now into the new directory `target`,
    /// and with it `files`: the name that each shall have there, and where it lies. Meanwhile
    /// reading and writing go on; only a writer that changes more than 64 MB ahead of the
    /// backup waits for it. Calls `progress` with the number of entries so far.
    ///
    /// When this returns, the backup is complete and durable. It holds what the files hold and
    /// what the store holds, as secret as that: that of an encrypted store opens with the key that the
    /// store has now. [`restore`] makes a directory of it.
    ///
    /// # Errors
    /// [`StoreError::Exists`], [`StoreError::Damaged`] if the store is damaged,
    /// [`StoreError::Io`]. Then nothing is left in `target`.
    pub fn backup(
        &self,
        target: impl AsRef<Path>,
        files: &[(PathBuf, PathBuf)],
        progress: &mut dyn FnMut(u64),
    ) -> Result<BackupReport, StoreError> {
        archive::backup(&self.shared, self.format, target.as_ref(), files, progress)
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
        let bounds = || range.bounds::<Bytes>();
        let shared = &*self.shared;
        let found = shared.guarded(|| match view {
            View::Latest => {
                // Held for the page: an entry leaves the overlay only when the backend has it.
                let overlay = shared.pending.overlay();
                let published = shared.published();
                let reader = published.backend()?.reader()?;
                let known =
                    overlay.range::<Bytes, _>(bounds()).map(|(k, v)| Ok((k.clone(), v.value.clone())));
                let known = in_direction(known, descending);
                let below = in_backend(&*reader, &range, descending)?;
                merge_page(vec![known, below], descending, limit)
            }
            View::Published => {
                let published = shared.published();
                let backend = &**published.backend()?;
                let reader = backend.reader()?;
                let mut sources = Vec::with_capacity(published.shadows.len() + 1);
                for shadow in &published.shadows {
                    let known = shadow.range::<Bytes, _>(bounds());
                    let known = known.map(|(key, before)| Ok((key.clone(), before.opened(backend)?)));
                    sources.push(in_direction(known, descending));
                }
                sources.push(in_backend(&*reader, &range, descending)?);
                merge_page(sources, descending, limit)
            }
        })?;
        let unsealed = found.into_iter().map(|(key, stored)| {
            let value = seal::unseal(&key, &stored)?.to_vec();
            Ok((logical(&key), value))
        });
        unsealed.collect()
    }

    /// Ends the threads, lets go of the backend and then of the directory. Says what had gone wrong
    /// before, or does so now.
    fn stop(&self) -> Result<(), StoreError> {
        let mut workers = lock(&self.workers);
        let shared = &*self.shared;
        shared.pending.close();
        // A worker may drop the last handle inside the hook; it can't wait for itself.
        let own = |worker: &JoinHandle<()>| worker.thread().id() == std::thread::current().id();
        if !workers.iter().any(own) && shared.watch.wait() {
            // Whoever opened the directory now would meet the call that is still under way.
            std::mem::forget(lock(&self.dir_lock).take());
            workers.clear();
            shared.poison(watch::WORDS);
            return shared.durability.check();
        }
        for worker in workers.drain(..) {
            if worker.thread().id() != std::thread::current().id() && worker.join().is_err() {
                shared.poison("a thread of the store panicked");
            }
        }
        let mut outcome = shared.durability.check();
        if outcome.is_ok() {
            outcome = lock(&shared.commits).sync_durable(shared.durability.newest().0);
        }
        let backend = shared.publishing().backend.take();
        release(backend);
        shared.durability.close();
        drop(lock(&self.dir_lock).take());
        outcome
    }
}

fn in_direction<'a>(
    known: impl DoubleEndedIterator<Item = Result<(Bytes, Option<Bytes>), StoreError>> + 'a,
    descending: bool,
) -> Source<'a, Bytes, Bytes> {
    if descending { source(known.rev()) } else { source(known) }
}

fn in_backend<'a>(
    reader: &'a (dyn Reader + 'a),
    range: &KeyRange,
    descending: bool,
) -> Result<Source<'a, Bytes, Bytes>, StoreError> {
    let entries = reader.range(range, descending)?;
    Ok(source(entries.map(|entry| entry.map(|(key, value)| (key, Some(value))))))
}

impl Shared {
    fn published(&self) -> std::sync::RwLockReadGuard<'_, Published> {
        self.published.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn publishing(&self) -> std::sync::RwLockWriteGuard<'_, Published> {
        self.published.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Stops the store for good and wakes everyone who waits for it.
    fn poison(&self, cause: impl Into<String>) {
        self.durability.poison(cause);
        self.pending.stop();
    }

    /// Runs a read. A backend panics where it meets damage; what it leaves behind then is not
    /// to be used again.
    fn guarded<T>(&self, read: impl FnOnce() -> Result<T, StoreError>) -> Result<T, StoreError> {
        catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|panic| {
            let what = format!("the backend panicked while reading: {}", panic_words(&*panic));
            self.poison(what.clone());
            Err(StoreError::Damaged { what })
        })
    }
}

impl Published {
    fn backend(&self) -> Result<&Arc<dyn Backend>, StoreError> {
        self.backend.as_ref().ok_or(StoreError::Closed)
    }

    /// A value as stored.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError> {
        match self.shadows.iter().find_map(|shadow| shadow.get(key)) {
            Some(before) => before.opened(&**self.backend()?),
            None => self.backend()?.reader()?.get(key),
        }
    }
}

impl Store for DiskStore {
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
        stored.map(|stored| seal::unseal(&key, &stored).map(<[u8]>::to_vec)).transpose()
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
        let backend = Arc::clone(self.shared.published().backend()?);
        match self.shared.pending.push(Sealed::new(batch, &*backend)?) {
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
        let disk_bytes = shared.published().backend.as_ref().map_or(0, |backend| backend.disk_bytes());
        StoreStats { disk_bytes, queued_batches, durable }
    }

    fn shut_down(&self) -> Result<(), StoreError> {
        self.stop()
    }
}

impl Drop for DiskStore {
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

    fn sled() -> StoreOptions {
        StoreOptions::default().backend(BackendKind::Sled)
    }

    fn redb() -> StoreOptions {
        StoreOptions::default().backend(BackendKind::Redb)
    }

    fn encrypted(options: StoreOptions) -> StoreOptions {
        options.encryption(StoreKey::from_bytes([5; 32]))
    }

    fn all_kinds() -> [StoreOptions; 4] {
        [sled(), redb(), encrypted(sled()), encrypted(redb())]
    }

    fn the_contract_holds(options: StoreOptions) {
        contract::run_all(&|| {
            let dir = tempfile::tempdir().unwrap();
            let options = options.clone();
            Box::new(move || open(dir.path(), options.clone()).unwrap())
        });
    }

    #[test]
    fn the_contract_holds_on_sled() {
        the_contract_holds(sled());
    }

    #[test]
    fn the_contract_holds_on_redb() {
        the_contract_holds(redb());
    }

    #[test]
    fn the_contract_holds_on_encrypted_sled() {
        the_contract_holds(encrypted(sled()));
    }

    #[test]
    fn the_contract_holds_on_encrypted_redb() {
        the_contract_holds(encrypted(redb()));
    }

    #[test]
    fn the_contract_holds_behind_the_fault_wrapper() {
        for options in all_kinds() {
            let new_store = || -> contract::Opener {
                let dir = tempfile::tempdir().unwrap();
                let options = options.clone();
                Box::new(move || {
                    let inner = DiskStore::open(dir.path(), options.clone()).unwrap();
                    Arc::new(FaultStore::new(inner).unwrap())
                })
            };
            contract::latest_shows_a_commit_at_once(&new_store);
            contract::what_was_acknowledged_outlives_the_store(&new_store);
            contract::a_closed_store_says_so(&new_store);
            contract::published_scans_are_never_torn(&new_store);
        }
    }

    fn put(key: &str, value: &str) -> Batch {
        let mut batch = Batch::new();
        batch.put(Keyspace::ROW, key, value);
        batch
    }

    #[test]
    fn a_failure_of_a_thread_poisons_the_store_and_the_directory_opens_again() {
        for options in all_kinds() {
            a_failure_poisons(&options);
        }
    }

    fn a_failure_poisons(options: &StoreOptions) {
        let dir = tempfile::tempdir().unwrap();
        let store = DiskStore::open(dir.path(), options.clone()).unwrap();
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
        let store = DiskStore::open(dir.path(), options.clone()).unwrap();
        assert!(!store.rolled_back());
        assert_eq!(store.durable().unwrap(), commit);
    }

    /// A backend whose writes end only when it is told so.
    struct Hanging {
        inner: Box<dyn Backend>,
        free: Arc<(Mutex<bool>, std::sync::Condvar)>,
    }

    impl Backend for Hanging {
        fn shows_unsynced(&self) -> bool {
            self.inner.shows_unsynced()
        }

        fn reader(&self) -> Result<Box<dyn Reader + '_>, StoreError> {
            self.inner.reader()
        }

        fn apply(&self, changes: &[Change]) -> Result<(), StoreError> {
            let (free, told) = &*self.free;
            drop(told.wait_while(lock(free), |free| !*free).unwrap());
            self.inner.apply(changes)
        }

        fn sync(&self) -> Result<(), StoreError> {
            self.inner.sync()
        }

        fn verify(&self) -> Result<(), StoreError> {
            self.inner.verify()
        }

        fn stored(&self) -> &dyn Backend {
            self.inner.stored()
        }

        fn sealed(&self, key: Bytes, value: Option<Bytes>) -> Result<Change, StoreError> {
            self.inner.sealed(key, value)
        }

        fn opened_entry(&self, key: &Bytes, stored: &Bytes) -> Result<(Bytes, Bytes), StoreError> {
            self.inner.opened_entry(key, stored)
        }

        fn trim(&self) -> Result<(), StoreError> {
            self.inner.trim()
        }

        fn disk_bytes(&self) -> u64 {
            self.inner.disk_bytes()
        }
    }

    #[test]
    fn a_backend_that_does_not_answer_is_an_error_for_everyone_who_waits() {
        let dir = tempfile::tempdir().unwrap();
        let mut opened = open::open(dir.path(), &redb()).unwrap();
        let free = Arc::new((Mutex::new(false), std::sync::Condvar::new()));
        let inner: Box<dyn Backend> = BackendKind::Redb.open(&other_dir(), &redb()).unwrap();
        opened.backend = Arc::new(Hanging { inner, free: Arc::clone(&free) });
        let limit = std::time::Duration::from_millis(50);
        let store = DiskStore::start(dir.path(), &redb(), opened, limit).unwrap();
        let commit = store.commit(put("a", "1")).unwrap();
        assert!(matches!(store.wait_durable(commit), Err(StoreError::Poisoned { .. })));
        assert!(matches!(store.commit(put("a", "2")), Err(StoreError::Poisoned { .. })));
        let error = store.shut_down().unwrap_err().to_string();
        assert!(error.contains("does not answer"), "{error}");
        assert!(matches!(DiskStore::open(dir.path(), redb()), Err(StoreError::InUse { .. })));
        *lock(&free.0) = true;
        free.1.notify_all();
    }

    /// A directory that outlives the test, as a thread that hangs does.
    fn other_dir() -> PathBuf {
        tempfile::tempdir().unwrap().keep()
    }

    /// Writes to the backend what the store would never write.
    fn plant(store: &DiskStore, key: &[u8], value: &[u8]) {
        let backend = store.shared.published().backend().unwrap().clone();
        let change = backend.sealed(key.into(), Some(value.into())).unwrap();
        backend.apply(&[change]).unwrap();
        backend.sync().unwrap();
    }

    #[test]
    fn a_value_that_was_changed_behind_the_stores_back_is_named() {
        for options in all_kinds() {
            let dir = tempfile::tempdir().unwrap();
            let store = DiskStore::open(dir.path(), options).unwrap();
            let commit = store.commit(put("good", "1")).unwrap();
            store.wait_durable(commit).unwrap();
            assert_eq!(store.verify().unwrap(), 1);
            plant(&store, b"\x05bad", b"no checksum");
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
    }

    /// Changes one byte of what is stored under a key, counted from the end.
    fn damage(store: &DiskStore, key: &[u8], from_end: usize) {
        let backend = store.shared.published().backend().unwrap().clone();
        let stored_key = backend.sealed(key.into(), None).unwrap().stored_key;
        let below = backend.stored();
        let mut stored = below.reader().unwrap().get(&stored_key).unwrap().unwrap().to_vec();
        let at = stored.len() - from_end;
        stored[at] ^= 1;
        below.apply(&[Change::plain(stored_key, Some(stored.into()))]).unwrap();
        below.sync().unwrap();
    }

    #[test]
    fn one_damaged_value_of_an_encrypted_store_costs_that_value_alone() {
        // Of the tag, and of the value.
        for (options, from_end) in [(encrypted(sled()), 1), (encrypted(redb()), 20)] {
            let dir = tempfile::tempdir().unwrap();
            let store = DiskStore::open(dir.path(), options.clone()).unwrap();
            for key in ["bad", "good"] {
                store.commit(put(key, "the value of a row")).unwrap();
            }
            store.wait_durable(CommitNo(2)).unwrap();
            damage(&store, b"\x05bad", from_end);
            store.shut_down().unwrap();

            let store = DiskStore::open(dir.path(), options).unwrap();
            assert!(store.get(View::Published, Keyspace::ROW, b"good").unwrap().is_some());
            for damaged in [
                store.get(View::Published, Keyspace::ROW, b"bad").map(|_| ()),
                store.scan(View::Published, Keyspace::ROW, b"", b"", 9).map(|_| ()),
                store.verify().map(|_| ()),
            ] {
                assert!(matches!(damaged, Err(StoreError::Damaged { .. })), "{damaged:?}");
            }
            let commit = store.commit(put("bad", "once more")).unwrap();
            store.wait_durable(commit).unwrap();
            assert_eq!(store.scan(View::Published, Keyspace::ROW, b"", b"", 9).unwrap().len(), 2);
            assert_eq!(store.verify().unwrap(), 2);
        }
    }

    #[test]
    fn an_encrypted_store_whose_key_of_an_entry_is_damaged_is_moved_aside() {
        for options in [encrypted(sled()), encrypted(redb())] {
            let parent = tempfile::tempdir().unwrap();
            let dir = parent.path().join("store");
            let store = DiskStore::open(&dir, options.clone()).unwrap();
            let commit = store.commit(put("bad", "value")).unwrap();
            store.wait_durable(commit).unwrap();
            // Tag, checksum and value lie behind the key.
            damage(&store, b"\x05bad", 16 + 4 + "value".len() + 1);
            store.shut_down().unwrap();
            drop(store);
            assert!(matches!(DiskStore::open(&dir, options), Err(StoreError::Damaged { .. })));
            assert!(parent.path().join("store.damaged-1").exists());
        }
    }

    /// Keyspaces whose keys are kept in order on disk answer any range in order, also one that
    /// is not behind one hash.
    #[test]
    fn ranges_across_hidden_hashes_are_in_order() {
        for options in [encrypted(sled()), encrypted(redb())] {
            let dir = tempfile::tempdir().unwrap();
            let store = DiskStore::open(dir.path(), options).unwrap();
            let key = |workspace: u8, entity: u8, place: u8| {
                [&[workspace; 16][..], &[entity; 32], &[place]].concat()
            };
            let mut batch = Batch::new();
            let mut expected = Vec::new();
            for (workspace, entity, place) in (0..60).map(|n| (n / 20, n / 4 % 5, n % 4)) {
                batch.put(Keyspace::HEADER, key(workspace, entity, place), [place]);
                expected.push((key(workspace, entity, place), vec![place]));
            }
            let commit = store.commit(batch).unwrap();
            for view in [View::Latest, View::Published] {
                store.wait_durable(commit).unwrap();
                let scan = |prefix: &[u8], from: &[u8], limit| {
                    store.scan(view, Keyspace::HEADER, prefix, from, limit).unwrap()
                };
                assert_eq!(scan(b"", b"", 100), expected);
                assert_eq!(scan(&[1; 16], b"", 100), expected[20..40]);
                assert_eq!(scan(&key(1, 2, 0)[..48], b"", 100), expected[28..32]);
                assert_eq!(scan(&key(1, 2, 0)[..48], &key(1, 2, 2), 100), expected[30..32]);
                assert_eq!(scan(&[1; 9], &key(1, 2, 3), 6), expected[31..37]);
                let mut back = store.scan_rev(view, Keyspace::HEADER, &[1; 16], &key(1, 4, 2), 5).unwrap();
                back.reverse();
                assert_eq!(back, expected[33..38]);
            }
        }
    }

    #[test]
    fn pages_of_large_values_that_a_backend_puts_aside_survive() {
        for options in all_kinds() {
            large_values_survive(&options);
        }
    }

    fn large_values_survive(options: &StoreOptions) {
        let dir = tempfile::tempdir().unwrap();
        let large = |n: u8| vec![n; anabranch_core::store::VALUE_BYTES_MAX];
        let store = DiskStore::open(dir.path(), options.clone()).unwrap();
        for round in 0..2 {
            for n in 0..60_u8 {
                let mut batch = Batch::new();
                batch.put(Keyspace::DOC, [n], large(n ^ round));
                store.commit(batch).unwrap();
            }
        }
        store.shut_down().unwrap();
        let store = DiskStore::open(dir.path(), options.clone()).unwrap();
        assert_eq!(store.verify().unwrap(), 60);
        for n in 0..60_u8 {
            assert_eq!(store.get(View::Published, Keyspace::DOC, &[n]).unwrap().unwrap(), large(n ^ 1));
        }
    }
}
