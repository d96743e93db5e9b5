//! Batches on their way: the bounded queue to the writer thread, and the overlay that
//! [`View::Latest`](anabranch_core::store::View::Latest) reads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anabranch_core::store::{Batch, Op, StoreError};

use super::Before;
use super::seal::seal;
use crate::backend::{Backend, Bytes, Change};
use crate::durability::lock;
use crate::keys::physical;

/// Bounds of the queue, beyond which `push` blocks. A batch that is larger by itself goes in
/// when the queue is empty.
const QUEUE_OPS_MAX: usize = 4096;
const QUEUE_BYTES_MAX: usize = 4 << 20;

/// Bounds of what is merged into one group; the first batch of a group may be larger.
const GROUP_OPS_MAX: usize = 256;
const GROUP_BYTES_MAX: usize = 1 << 20;

/// See the [module](self).
pub(super) struct Pending {
    queue: Mutex<Queue>,
    work: Condvar,
    room: Condvar,
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<Queued>,
    ops: usize,
    bytes: usize,
    last: u64,
    /// No newer commit has left the overlay.
    forgotten: u64,
    overlay: Overlay,
    closing: bool,
    stopped: bool,
}

/// A batch as the backend will be given it.
pub(super) struct Queued {
    pub(super) commit: u64,
    pub(super) ops: Vec<Change>,
    /// What some of them replace, by their keys.
    pub(super) foreseen: Vec<(Bytes, Before)>,
    bytes: usize,
}

/// A batch that is sealed and not yet queued.
pub(super) struct Sealed {
    ops: Vec<Change>,
    /// The value of each operation as the overlay shows it.
    values: Vec<Option<Bytes>>,
    /// See [`Settled`].
    pub(super) foreseen: Option<Foreseen>,
    bytes: usize,
}

impl Sealed {
    /// Checksums and encrypts a batch: work that the threads of those who commit do for themselves, in
    /// place of the one thread that writes.
    pub(super) fn new(batch: Batch, backend: &dyn Backend) -> Result<Sealed, StoreError> {
        let bytes = batch.size_bytes();
        let batch = batch.into_ops();
        let (mut ops, mut values) = (Vec::with_capacity(batch.len()), Vec::with_capacity(batch.len()));
        for op in batch {
            let (key, value) = stored(op);
            ops.push(backend.sealed(key, value.clone())?);
            values.push(value);
        }
        Ok(Sealed { ops, values, foreseen: None, bytes })
    }
}

/// Which keys of a batch no commit on its way was changing, when the newest commit was `last`. What the
/// backend holds under such a key then is what the batch is going to replace, unless a commit that
/// comes in between changes it. Such a commit is newer than `last`: it is in the overlay when the batch
/// is queued, or it has left the overlay and raised [`Queue::forgotten`] above `last`.
pub(super) struct Settled {
    last: u64,
    keys: Vec<bool>,
}

/// What a batch is going to replace, if the conditions of [`Settled`] hold when it is queued.
pub(super) struct Foreseen {
    last: u64,
    before: Vec<(Bytes, Before)>,
}

impl Settled {
    /// Reads what the settled keys have.
    pub(super) fn read(
        &self,
        batch: &Sealed,
        read: impl Fn(&Change) -> Result<Before, StoreError>,
    ) -> Result<Foreseen, StoreError> {
        let settled = batch.ops.iter().zip(&self.keys).filter(|(_, settled)| **settled);
        let before = settled.map(|(op, _)| Ok((Bytes::clone(&op.key), read(op)?)));
        Ok(Foreseen { last: self.last, before: before.collect::<Result<_, StoreError>>()? })
    }
}

impl Queue {
    /// What holds of what was foreseen.
    fn confirmed(&self, foreseen: Option<Foreseen>) -> Vec<(Bytes, Before)> {
        let Some(mut foreseen) = foreseen.filter(|foreseen| self.forgotten <= foreseen.last) else {
            return Vec::new();
        };
        foreseen.before.retain(|(key, _)| !self.overlay.contains_key(key));
        foreseen.before
    }
}

/// The newest value of each key that is not yet durable.
pub(super) type Overlay = BTreeMap<Bytes, Latest>;

/// A value as stored, or that it was deleted, and the commit that did so.
pub(super) struct Latest {
    commit: u64,
    pub(super) value: Option<Bytes>,
}

impl Pending {
    pub(super) fn new(last: u64) -> Self {
        let queue = Mutex::new(Queue { last, forgotten: last, ..Queue::default() });
        Pending { queue, work: Condvar::new(), room: Condvar::new() }
    }

    /// Numbers a batch, queues it and shows it in the overlay. Blocks while the queue is
    /// full. `None` once the queue is closed or stopped.
    pub(super) fn push(&self, batch: Sealed) -> Option<u64> {
        let Sealed { ops, values, foreseen, bytes } = batch;
        let mut queue = lock(&self.queue);
        loop {
            if queue.closing || queue.stopped {
                return None;
            }
            let fits = queue.ops + ops.len() <= QUEUE_OPS_MAX && queue.bytes + bytes <= QUEUE_BYTES_MAX;
            // Also in number: empty batches have neither operations nor bytes.
            if queue.batches.is_empty() || (fits && queue.batches.len() < QUEUE_OPS_MAX) {
                break;
            }
            queue = self.room.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        let foreseen = queue.confirmed(foreseen);
        queue.last += 1;
        let commit = queue.last;
        queue.ops += ops.len();
        queue.bytes += bytes;
        for (op, value) in ops.iter().zip(values) {
            queue.overlay.insert(Bytes::clone(&op.key), Latest { commit, value });
        }
        // The writer waits only while there is nothing.
        let awaited = queue.batches.is_empty();
        queue.batches.push_back(Queued { commit, ops, foreseen, bytes });
        drop(queue);
        if awaited {
            self.work.notify_one();
        }
        Some(commit)
    }

    /// See [`Settled`]. `None` while nothing is queued: then the writer has time, and whoever commits may
    /// be the one that has too much to do.
    pub(super) fn settled(&self, batch: &Sealed) -> Option<Settled> {
        let queue = lock(&self.queue);
        if queue.batches.is_empty() {
            return None;
        }
        let keys = batch.ops.iter().map(|op| !queue.overlay.contains_key(&op.key)).collect();
        Some(Settled { last: queue.last, keys })
    }

    /// Waits for batches and takes as many as one group may have. `None` when there will be
    /// no more.
    pub(super) fn take_group(&self) -> Option<Vec<Queued>> {
        let mut queue = lock(&self.queue);
        while queue.batches.is_empty() && !queue.closing && !queue.stopped {
            queue = self.work.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        if queue.stopped {
            return None;
        }
        let mut group = Vec::new();
        let (mut ops, mut bytes) = (0, 0);
        while let Some(next) = queue.batches.front() {
            let fits = ops + next.ops.len() <= GROUP_OPS_MAX
                && bytes + next.bytes <= GROUP_BYTES_MAX
                && group.len() < GROUP_OPS_MAX;
            if !group.is_empty() && !fits {
                break;
            }
            ops += next.ops.len();
            bytes += next.bytes;
            group.extend(queue.batches.pop_front());
        }
        queue.ops -= ops;
        queue.bytes -= bytes;
        drop(queue);
        self.room.notify_all();
        (!group.is_empty()).then_some(group)
    }

    /// Takes what is durable now out of the overlay: of `keys`, those that no
    /// commit after `durable` has changed again.
    pub(super) fn forget<'a>(&self, keys: impl Iterator<Item = &'a Bytes>, durable: u64) {
        let mut queue = lock(&self.queue);
        queue.forgotten = durable;
        for key in keys {
            if queue.overlay.get(key).is_some_and(|latest| latest.commit <= durable) {
                queue.overlay.remove(key);
            }
        }
    }

    /// The overlay; nothing is queued or becomes durable while this is held.
    pub(super) fn overlay(&self) -> OverlayGuard<'_> {
        OverlayGuard(lock(&self.queue))
    }

    /// The number of the newest commit.
    pub(super) fn last(&self) -> u64 {
        lock(&self.queue).last
    }

    /// Takes no more batches; what is queued is still handed out.
    pub(super) fn close(&self) {
        lock(&self.queue).closing = true;
        self.notify();
    }

    /// Takes and hands out nothing more.
    pub(super) fn stop(&self) {
        lock(&self.queue).stopped = true;
        self.notify();
    }

    fn notify(&self) {
        self.work.notify_all();
        self.room.notify_all();
    }
}

/// See [`Pending::overlay`].
pub(super) struct OverlayGuard<'a>(MutexGuard<'a, Queue>);

impl std::ops::Deref for OverlayGuard<'_> {
    type Target = Overlay;

    fn deref(&self) -> &Overlay {
        &self.0.overlay
    }
}

fn stored(op: Op) -> (Bytes, Option<Bytes>) {
    match op {
        Op::Put(keyspace, key, value) => {
            let key = physical(keyspace, &key);
            let sealed = seal(&key, value);
            (key.into(), Some(sealed))
        }
        Op::Delete(keyspace, key) => (physical(keyspace, &key).into(), None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anabranch_core::store::Keyspace;

    /// A batch that puts one key, sealed as by a backend that stores what it is given.
    fn put(key: &str) -> Sealed {
        let key = Bytes::from(key.as_bytes());
        let ops = vec![Change::plain(Bytes::clone(&key), Some(key))];
        Sealed { ops, values: vec![None], foreseen: None, bytes: 1 }
    }

    /// The batch once what it replaces was read: something that tells it from what is read later.
    fn foreseen(pending: &Pending, mut batch: Sealed) -> Sealed {
        let settled = pending.settled(&batch);
        let read = |change: &Change| {
            Ok(Before {
                stored_key: Bytes::clone(&change.stored_key),
                stored: Some(Bytes::from(&b"old"[..])),
            })
        };
        batch.foreseen = settled.map(|settled| settled.read(&batch, read).unwrap());
        batch
    }

    /// With one batch queued, so that the writer has something to do.
    fn busy(last: u64) -> Pending {
        let pending = Pending::new(last);
        pending.push(put("other")).unwrap();
        pending
    }

    /// How much of what was foreseen the writer is given with each batch of the next group.
    fn group(pending: &Pending) -> Vec<usize> {
        pending.take_group().unwrap().iter().map(|batch| batch.foreseen.len()).collect()
    }

    fn keys(batches: &[&str]) -> Vec<Bytes> {
        batches.iter().map(|key| Bytes::from(key.as_bytes())).collect()
    }

    #[test]
    fn what_was_foreseen_holds_while_no_other_commit_changes_the_key() {
        let pending = busy(0);
        let batch = foreseen(&pending, put("a"));
        pending.push(put("b")).unwrap();
        pending.push(batch).unwrap();
        assert_eq!(group(&pending), [0, 0, 1]);

        // Changed by a commit that is on its way when the key is read, or comes before the batch is queued.
        let pending = busy(0);
        let batch = foreseen(&pending, put("a"));
        pending.push(put("a")).unwrap();
        pending.push(foreseen(&pending, put("a"))).unwrap();
        pending.push(batch).unwrap();
        assert_eq!(group(&pending), [0, 0, 0, 0]);
    }

    #[test]
    fn what_was_foreseen_falls_with_a_commit_that_came_and_became_durable_meanwhile() {
        let pending = busy(6);
        let batch = foreseen(&pending, put("a"));
        assert_eq!(pending.push(put("a")), Some(8));
        assert_eq!(group(&pending), [0, 0]);
        pending.forget(keys(&["a"]).iter(), 8);
        pending.push(batch).unwrap();
        assert_eq!(group(&pending), [0]);

        // One that was on its way when the key was read, and is durable when the batch is queued.
        let pending = busy(6);
        pending.push(put("a")).unwrap();
        let batch = foreseen(&pending, put("a"));
        assert_eq!(group(&pending), [0, 0]);
        pending.forget(keys(&["a"]).iter(), 8);
        pending.push(batch).unwrap();
        assert_eq!(group(&pending), [0]);
        pending.forget(keys(&["a"]).iter(), 9);
        pending.push(put("b")).unwrap();
        pending.push(foreseen(&pending, put("a"))).unwrap();
        assert_eq!(group(&pending), [0, 1], "nothing that changes it is on its way");
    }

    #[test]
    fn the_overlay_shows_a_batch_until_it_is_durable() {
        let pending = Pending::new(0);
        let mut batch = Batch::new();
        batch.put(Keyspace(5), "k", "v");
        let op = stored(batch.into_ops().remove(0));
        let sealed = Sealed {
            ops: vec![Change::plain(Bytes::clone(&op.0), op.1.clone())],
            values: vec![op.1.clone()],
            foreseen: None,
            bytes: 2,
        };
        pending.push(sealed).unwrap();
        assert_eq!(pending.overlay()[&op.0].value, op.1);
        assert_eq!(group(&pending), [0]);
        pending.forget([op.0.clone()].iter(), 1);
        assert!(pending.overlay().is_empty());
    }
}
