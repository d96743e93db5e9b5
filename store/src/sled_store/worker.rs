//! The two threads of a store: one writes groups of batches to sled, one syncs them.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::thread::{self, JoinHandle};

use anabranch_core::store::{CommitNo, StoreError};
use sled::IVec;

use super::disk::{self, Disk, io_error, seal, sled_error};
use super::pending::Queued;
use super::{Shadow, Shared, open};
use crate::durability::lock;

/// Groups that are flushed and wait for a sync; the writer waits when there are more. A page
/// of published state looks through one shadow for each, so this stays small.
const FLUSHED_GROUPS_MAX: usize = 4;

/// A group that sled has flushed.
struct Flushed {
    last: u64,
    shadow: Arc<Shadow>,
}

/// Starts both threads. They end when the queue is closed, or when the store is poisoned.
pub(super) fn start(shared: &Arc<Shared>, disk: Disk) -> Result<Vec<JoinHandle<()>>, StoreError> {
    let db = shared.published().db()?.clone();
    let (to_sync, flushed) = sync_channel(FLUSHED_GROUPS_MAX);
    let writer = spawn("anabranch-store-write", shared, move |shared| write_groups(shared, &db, &to_sync))?;
    let syncer = spawn("anabranch-store-sync", shared, move |shared| sync_groups(shared, disk, &flushed));
    match syncer {
        Ok(syncer) => Ok(vec![writer, syncer]),
        Err(e) => {
            shared.pending.stop();
            let _ = writer.join();
            Err(e)
        }
    }
}

fn spawn(
    name: &str,
    shared: &Arc<Shared>,
    run: impl FnOnce(&Shared) -> Result<(), StoreError> + Send + 'static,
) -> Result<JoinHandle<()>, StoreError> {
    let shared = Arc::clone(shared);
    let body = move || match catch_unwind(AssertUnwindSafe(|| run(&shared))) {
        Ok(Ok(())) => {}
        Ok(Err(e)) => shared.poison(e.to_string()),
        Err(panic) => shared.poison(format!("panic: {}", disk::panic_words(&*panic))),
    };
    thread::Builder::new().name(name.to_owned()).spawn(body).map_err(io_error("start a thread"))
}

fn write_groups(shared: &Shared, db: &sled::Db, to_sync: &SyncSender<Flushed>) -> Result<(), StoreError> {
    while let Some(group) = shared.pending.take_group() {
        let Some(last) = group.last().map(|batch| batch.commit) else { continue };
        lock(&shared.commits).reserve(last)?;
        let changes = merged(group);

        // sled holds all groups before this one, so what it says is what this one replaces.
        let mut shadow = Shadow::new();
        for key in changes.keys() {
            let before = db.get(key).map_err(|e| sled_error("read what a commit replaces", e))?;
            shadow.insert(key.clone(), before);
        }
        let shadow = Arc::new(shadow);
        // Up before sled is touched: from here on sled differs from what is published.
        let mut published = shared.published.write().unwrap_or_else(PoisonError::into_inner);
        published.shadows.push_back(Arc::clone(&shadow));
        drop(published);

        let mut batch = sled::Batch::default();
        for (key, value) in changes {
            match value {
                Some(value) => batch.insert(key, value),
                None => batch.remove(key),
            }
        }
        batch.insert(&open::COMMIT_KEY, seal(&open::COMMIT_KEY, last.to_be_bytes().to_vec()));
        db.apply_batch(batch).map_err(|e| sled_error("commit", e))?;
        db.flush().map_err(|e| sled_error("flush", e))?;
        if to_sync.send(Flushed { last, shadow }).is_err() {
            // The sync thread has failed and said so.
            return Ok(());
        }
    }
    Ok(())
}

fn merged(group: Vec<Queued>) -> BTreeMap<IVec, Option<IVec>> {
    group.into_iter().flat_map(|batch| batch.ops).collect()
}

fn sync_groups(shared: &Shared, mut disk: Disk, flushed: &Receiver<Flushed>) -> Result<(), StoreError> {
    while let Ok(first) = flushed.recv() {
        // One sync for all that were flushed before it begins.
        let mut groups = vec![first];
        groups.extend(flushed.try_iter().take(FLUSHED_GROUPS_MAX));
        let Some(last) = groups.last().map(|group| group.last) else { continue };
        disk.sync().map_err(io_error("sync"))?;
        if shared.durability.check().is_err() {
            return Ok(());
        }
        {
            let mut published = shared.published.write().unwrap_or_else(PoisonError::into_inner);
            published.shadows.drain(..groups.len());
        }
        shared.pending.forget(groups.iter().map(|group| &*group.shadow), last);
        lock(&shared.commits).note_durable(last)?;
        shared.durability.advance(CommitNo(last));
    }
    Ok(())
}
