//! The two threads of a store: one writes groups of batches to the backend, one syncs them.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, JoinHandle};

use anabranch_core::store::{CommitNo, StoreError};

use super::pending::Queued;
use super::seal::seal;
use super::watch::{self, Caller};
use super::{Before, Shadow, Shared, open};
use crate::backend::{Backend, Bytes, Change, panic_words, put_in_order};
use crate::durability::lock;
use crate::files::io_error;

/// Groups that are applied and wait for a sync; the writer waits when there are more. A page
/// of published state looks through one shadow for each, so this stays small.
const APPLIED_GROUPS_MAX: usize = 4;

/// A group that was applied and waits to be synced.
struct Applied {
    last: u64,
    keys: Vec<Bytes>,
}

/// Starts both threads. They end when the queue is closed, or when the store is poisoned.
pub(super) fn start(shared: &Arc<Shared>) -> Result<Vec<JoinHandle<()>>, StoreError> {
    let backend = shared.published().backend()?.clone();
    let (to_sync, applied) = sync_channel(APPLIED_GROUPS_MAX);
    let to_write = Arc::clone(&backend);
    let writer =
        spawn("anabranch-store-write", shared, move |shared| write_groups(shared, &*to_write, &to_sync))?;
    let syncer =
        spawn("anabranch-store-sync", shared, move |shared| sync_groups(shared, &*backend, &applied));
    let watcher = syncer.and_then(|syncer| Ok((syncer, watch_over(shared)?)));
    match watcher {
        Ok((syncer, _)) => Ok(vec![writer, syncer]),
        Err(e) => {
            shared.pending.stop();
            let _ = writer.join();
            Err(e)
        }
    }
}

/// Starts the thread that stops the store when the backend does not answer. It ends by itself.
fn watch_over(shared: &Arc<Shared>) -> Result<JoinHandle<()>, StoreError> {
    let shared = Arc::clone(shared);
    let body = move || {
        if shared.watch.wait() {
            shared.poison(watch::WORDS);
        }
    };
    let name = "anabranch-store-watch".to_owned();
    thread::Builder::new().name(name).spawn(body).map_err(io_error("start a thread"))
}

fn spawn(
    name: &str,
    shared: &Arc<Shared>,
    run: impl FnOnce(&Shared) -> Result<(), StoreError> + Send + 'static,
) -> Result<JoinHandle<()>, StoreError> {
    let shared = Arc::clone(shared);
    shared.watch.begin();
    let thread = thread::Builder::new().name(name.to_owned());
    let watched = Arc::clone(&shared);
    let body = move || {
        match catch_unwind(AssertUnwindSafe(|| run(&shared))) {
            Ok(Ok(())) => {}
            Ok(Err(e)) => shared.poison(e.to_string()),
            Err(panic) => shared.poison(format!("panic: {}", panic_words(&*panic))),
        }
        shared.watch.end();
    };
    let started = thread.spawn(body).map_err(io_error("start a thread"));
    started.inspect_err(|_| watched.watch.end())
}

fn write_groups(
    shared: &Shared,
    backend: &dyn Backend,
    to_sync: &SyncSender<Applied>,
) -> Result<(), StoreError> {
    while let Some(group) = shared.pending.take_group() {
        let Some(last) = group.last().map(|batch| batch.commit) else { continue };
        shared.durability.expect(CommitNo(last));
        lock(&shared.commits).reserve(last)?;
        let mut changes = merged(group);
        let applying = lock(&shared.applying);
        if backend.shows_unsynced() || shared.snapshots.is_active() {
            let shadow = Arc::new(before(backend, &changes)?);
            shared.snapshots.keep(&shadow);
            if backend.shows_unsynced() {
                // Up before the backend is touched: from here on it differs from what is published.
                shared.publishing().shadows.push_back(shadow);
            }
        }
        let own = seal(&open::COMMIT_KEY, last.to_be_bytes().to_vec());
        changes.push(backend.sealed(Bytes::from(&open::COMMIT_KEY[..]), Some(own))?);
        shared.watch.over(Caller::Writer, || backend.apply(&changes))?;
        if !backend.shows_unsynced() {
            shared.publishing().last = last;
        }
        drop(applying);
        let keys = changes.into_iter().map(|change| change.key).collect();
        if to_sync.send(Applied { last, keys }).is_err() {
            // The sync thread has failed and said so.
            return Ok(());
        }
    }
    Ok(())
}

fn merged(group: Vec<Queued>) -> Vec<Change> {
    let mut changes = group.into_iter().flat_map(|batch| batch.ops).collect();
    put_in_order(&mut changes);
    changes
}

/// What a group replaces: the backend holds all groups before it.
fn before(backend: &dyn Backend, changes: &[Change]) -> Result<Shadow, StoreError> {
    let reader = backend.stored().reader()?;
    let before = |change: &Change| Ok((Bytes::clone(&change.key), Before::read(backend, &*reader, change)?));
    changes.iter().map(before).collect()
}

fn sync_groups(
    shared: &Shared,
    backend: &dyn Backend,
    applied: &Receiver<Applied>,
) -> Result<(), StoreError> {
    while let Ok(first) = applied.recv() {
        // One sync for all that were applied before it begins.
        let mut groups = vec![first];
        groups.extend(applied.try_iter().take(APPLIED_GROUPS_MAX));
        let Some(last) = groups.last().map(|group| group.last) else { continue };
        shared.watch.over(Caller::Syncer, || backend.sync())?;
        if shared.durability.check().is_err() {
            return Ok(());
        }
        if backend.shows_unsynced() {
            let mut published = shared.publishing();
            published.shadows.drain(..groups.len());
            published.last = last;
        }
        shared.pending.forget(groups.iter().flat_map(|group| &group.keys), last);
        lock(&shared.commits).note_durable(last)?;
        shared.durability.advance(CommitNo(last));
    }
    Ok(())
}
