//! Batches on their way: the bounded queue to the writer thread, and the overlay that
//! [`View::Latest`](anabranch_core::store::View::Latest) reads.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use anabranch_core::store::{Batch, Op, StoreError};

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
    overlay: Overlay,
    closing: bool,
    stopped: bool,
}

/// A batch as the backend will be given it.
pub(super) struct Queued {
    pub(super) commit: u64,
    pub(super) ops: Vec<Change>,
    bytes: usize,
}

/// A batch that is sealed and not yet queued.
pub(super) struct Sealed {
    ops: Vec<Change>,
    /// The value of each operation as the overlay shows it.
    values: Vec<Option<Bytes>>,
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
        Ok(Sealed { ops, values, bytes })
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
        let queue = Mutex::new(Queue { last, ..Queue::default() });
        Pending { queue, work: Condvar::new(), room: Condvar::new() }
    }

    /// Numbers a batch, queues it and shows it in the overlay. Blocks while the queue is
    /// full. `None` once the queue is closed or stopped.
    pub(super) fn push(&self, batch: Sealed) -> Option<u64> {
        let Sealed { ops, values, bytes } = batch;
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
        queue.last += 1;
        let commit = queue.last;
        queue.ops += ops.len();
        queue.bytes += bytes;
        for (op, value) in ops.iter().zip(values) {
            queue.overlay.insert(Bytes::clone(&op.key), Latest { commit, value });
        }
        // The writer waits only while there is nothing.
        let awaited = queue.batches.is_empty();
        queue.batches.push_back(Queued { commit, ops, bytes });
        drop(queue);
        if awaited {
            self.work.notify_one();
        }
        Some(commit)
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
