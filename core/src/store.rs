//! The store contract: what every backend must promise to the engine.
//!
//! A store is an ordered map of byte keys in numbered [`Keyspace`]s, changed by atomic
//! [`Batch`]es. There is one writer at a time (the sequencer) and any number of readers.
//!
//! - [`Store::commit`] queues a batch and returns its number at once. Batches become
//!   durable in the order of their numbers, each whole or not at all.
//! - [`View::Published`] shows durable state only: what it returns survives power loss.
//!   [`View::Latest`] also shows batches that are queued but not yet durable; it is for
//!   the writer, so that it can build one change on top of another without waiting.
//! - Any failure to commit, flush or sync *poisons* the store: every later call returns
//!   [`StoreError::Poisoned`] and nothing more becomes durable until it is opened again.

use std::fmt;
use std::sync::Arc;

/// Number of a committed batch; grows by one with each commit of an open store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CommitNo(pub u64);

/// A family of keys. The numbers are part of the stored format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Keyspace(pub u8);

/// How an encrypted store keeps the keys of a keyspace, so that its files tell nothing of what
/// is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyForm {
    /// Keys hold names, ids or values, or are scanned in order beyond a hash: whole keys are
    /// hidden, and the store keeps all of them in memory.
    Secret,
    /// Keys begin with hashes of these lengths, which are hidden; numbers follow, which are
    /// not. Scans should name all the hashes in their prefix: others read the whole keyspace.
    Hashes(&'static [usize]),
}

/// Declares the keyspaces, each with how its keys are hidden: there is no keyspace without
/// that decision.
macro_rules! keyspaces {
    ($($(#[$doc:meta])* $name:ident = $number:literal, $form:expr;)*) => {
        impl Keyspace {
            $($(#[$doc])* pub const $name: Keyspace = Keyspace($number);)*

            /// Every keyspace with its name.
            pub const ALL: &[(Keyspace, &str)] = &[$((Keyspace::$name, stringify!($name))),*];

            /// How an encrypted store keeps the keys. Unknown keyspaces are secret.
            pub fn key_form(self) -> KeyForm {
                match self {
                    $(Keyspace::$name => $form,)*
                    _ => KeyForm::Secret,
                }
            }
        }
    };
}

/// Bytes of the hash of a workspace's name, with which most keys begin.
const WORKSPACE: usize = 16;
/// Bytes of an [`EntityHash`](crate::id::EntityHash).
const ENTITY: usize = 32;

keyspaces! {
    /// Small records that exist once: cursors, identity, format version.
    META = 1, KeyForm::Secret;
    /// What an entity is at: heads, admitted heads, counts, incarnation.
    ENTITY = 2, KeyForm::Secret;
    /// Document snapshots and increments.
    DOC = 3, KeyForm::Hashes(&[WORKSPACE, ENTITY]);
    /// The header index: one record for each change of an entity.
    HEADER = 4, KeyForm::Hashes(&[WORKSPACE, ENTITY]);
    /// Materialised rows.
    ROW = 5, KeyForm::Secret;
    /// Secondary index entries.
    INDEX = 6, KeyForm::Secret;
    /// Pending changes with their intents.
    OUTBOX = 7, KeyForm::Hashes(&[WORKSPACE]);
    /// Open conflicts.
    CONFLICT = 8, KeyForm::Secret;
    /// Refused changes.
    REFUSED = 9, KeyForm::Secret;
    /// Known devices.
    DEVICE = 10, KeyForm::Secret;
    /// The relay's feed.
    FEED = 11, KeyForm::Hashes(&[WORKSPACE]);
    /// Grants and used invites.
    GRANT = 12, KeyForm::Secret;
    /// Schemas by workspace.
    SCHEMA = 13, KeyForm::Secret;
    /// Parts of values too large for one record.
    SPILL = 14, KeyForm::Hashes(&[WORKSPACE]);
}

/// Longest key in bytes.
pub const KEY_BYTES_MAX: usize = 2048;
/// Longest value in bytes; callers split what is larger (sled never syncs larger blobs).
pub const VALUE_BYTES_MAX: usize = 64 * 1024;

/// One change of a batch.
#[derive(Clone, PartialEq, Eq)]
pub enum Op {
    /// Insert or replace.
    Put(Keyspace, Vec<u8>, Vec<u8>),
    /// Remove; removing what is absent is no error.
    Delete(Keyspace, Vec<u8>),
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Op::Put(ks, k, v) => write!(f, "Put({}, {} B key, {} B)", ks.0, k.len(), v.len()),
            Op::Delete(ks, k) => write!(f, "Delete({}, {} B key)", ks.0, k.len()),
        }
    }
}

/// Changes that become visible and durable together, or not at all.
/// Where one key occurs twice, the later operation wins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    ops: Vec<Op>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Inserts or replaces `key`.
    pub fn put(&mut self, keyspace: Keyspace, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.ops.push(Op::Put(keyspace, key.into(), value.into()));
    }

    /// Removes `key`.
    pub fn delete(&mut self, keyspace: Keyspace, key: impl Into<Vec<u8>>) {
        self.ops.push(Op::Delete(keyspace, key.into()));
    }

    /// The operations in order.
    pub fn ops(&self) -> &[Op] {
        &self.ops
    }

    /// Takes the operations in order.
    pub fn into_ops(self) -> Vec<Op> {
        self.ops
    }

    /// Appends all of `other`.
    pub fn append(&mut self, other: Batch) {
        self.ops.extend(other.ops);
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// Bytes of all keys and values.
    pub fn size_bytes(&self) -> usize {
        self.ops
            .iter()
            .map(|op| match op {
                Op::Put(_, k, v) => k.len() + v.len(),
                Op::Delete(_, k) => k.len(),
            })
            .sum()
    }
}

/// Which state a read sees. See the [module](self).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum View {
    /// Durable state only.
    Published,
    /// Everything committed, durable or not.
    Latest,
}

/// Why a store can't do what was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process has the directory open.
    #[error("the store {dir} is in use by process {pid}; stop it, or let it do the work")]
    InUse {
        /// The directory.
        dir: String,
        /// The owner's process id, 0 where it is not known.
        pid: u32,
    },
    /// The stored bytes can't be trusted.
    #[error("the store is damaged: {what}")]
    Damaged {
        /// What was found, and where the damaged directory was moved to if it was.
        what: String,
    },
    /// The store was written by a newer version of this program.
    #[error("the store has format {found}, this program reads up to {supported}; update the program")]
    NewerFormat {
        /// Format of the store.
        found: u32,
        /// Newest format that this program knows.
        supported: u32,
    },
    /// The directory has another backend than the one asked for.
    #[error(
        "the store {dir} is kept by {found}, {configured} is configured; change the configuration, or convert the store with `anabranch store compact --backend {configured}`"
    )]
    OtherBackend {
        /// The directory.
        dir: String,
        /// Name of the backend that it has.
        found: &'static str,
        /// Name of the backend that was asked for.
        configured: &'static str,
    },
    /// The store is encrypted and no key was given.
    #[error("the store {dir} is encrypted; give its key or passphrase")]
    KeyNeeded {
        /// The directory.
        dir: String,
    },
    /// A key was given for a store that has none.
    #[error("the store {dir} is not encrypted; open it without a key or passphrase")]
    NotEncrypted {
        /// The directory.
        dir: String,
    },
    /// The key or passphrase is not that of the store. Nothing was changed.
    #[error("the store {dir} has another key: {why}")]
    WrongKey {
        /// The directory.
        dir: String,
        /// What does not fit.
        why: &'static str,
    },
    /// There is less free space than the configured floor.
    #[error(
        "only {free_bytes} bytes are free where the store lies, {floor_bytes} are needed; free some space and try again"
    )]
    NoSpace {
        /// Bytes free.
        free_bytes: u64,
        /// Bytes that must stay free.
        floor_bytes: u64,
    },
    /// Something is where a backup, a restored directory or a rewritten store was to be made.
    #[error("{path} exists already; nothing is overwritten: choose another place, or move it away")]
    Exists {
        /// What is there.
        path: String,
    },
    /// A key or value exceeds its bound.
    #[error("a {what} of {bytes} bytes exceeds the bound of {max_bytes}")]
    TooLarge {
        /// "key" or "value".
        what: &'static str,
        /// Its size.
        bytes: usize,
        /// The bound.
        max_bytes: usize,
    },
    /// An earlier commit failed; see the [module](self).
    #[error("the store stopped after an earlier failure ({cause}); open it again")]
    Poisoned {
        /// The first failure.
        cause: String,
    },
    /// The operating system refused.
    #[error("{operation}: {cause}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The system's words.
        cause: String,
    },
    /// The store was closed.
    #[error("the store is closed")]
    Closed,
}

/// One key and its value.
pub type Entry = (Vec<u8>, Vec<u8>);

/// Figures of a store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StoreStats {
    /// Bytes on disk; 0 for a store in memory.
    pub disk_bytes: u64,
    /// Batches queued but not yet durable.
    pub queued_batches: u64,
    /// The newest durable commit.
    pub durable: CommitNo,
}

/// Called with the newest durable commit each time it grows, and once when the store is
/// poisoned. Runs on a thread of the store: return quickly, call no store method.
pub type DurableHook = Arc<dyn Fn(Result<CommitNo, StoreError>) + Send + Sync>;

/// A durable ordered store. See the [module](self) for what is promised.
pub trait Store: Send + Sync {
    /// The value of `key`.
    fn get(&self, view: View, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError>;

    /// At most `limit` entries whose keys start with `prefix`, in order, from the first key
    /// ≥ `from`. One call sees one state: never half a batch. An empty `from` starts at the
    /// prefix.
    fn scan(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError>;

    /// Like [`Store::scan`] in descending order, from the last key < `before` (an empty
    /// `before` starts at the end of the prefix).
    fn scan_rev(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        before: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError>;

    /// Queues a batch. When this returns the batch is visible in [`View::Latest`]; it is
    /// durable once [`Store::durable`] reaches the returned number. Blocks while the bounded
    /// queue is full.
    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError>;

    /// The newest durable commit.
    fn durable(&self) -> Result<CommitNo, StoreError>;

    /// Blocks until `commit` is durable, or the store is poisoned.
    fn wait_durable(&self, commit: CommitNo) -> Result<(), StoreError>;

    /// Sets the hook that is called when more becomes durable; replaces an earlier one.
    fn set_durable_hook(&self, hook: DurableHook);

    /// Figures.
    fn stats(&self) -> StoreStats;

    /// Makes everything queued durable and stops. Later calls return [`StoreError::Closed`].
    fn shut_down(&self) -> Result<(), StoreError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The numbers are part of the stored format, and so is how keys are hidden: a change to
    /// this table makes encrypted stores unreadable.
    #[test]
    fn keyspaces_and_their_key_forms_stay_as_they_are() {
        let table: Vec<String> = Keyspace::ALL
            .iter()
            .map(|(keyspace, name)| format!("{} {name} {:?}", keyspace.0, keyspace.key_form()))
            .collect();
        let expected = [
            "1 META Secret",
            "2 ENTITY Secret",
            "3 DOC Hashes([16, 32])",
            "4 HEADER Hashes([16, 32])",
            "5 ROW Secret",
            "6 INDEX Secret",
            "7 OUTBOX Hashes([16])",
            "8 CONFLICT Secret",
            "9 REFUSED Secret",
            "10 DEVICE Secret",
            "11 FEED Hashes([16])",
            "12 GRANT Secret",
            "13 SCHEMA Secret",
            "14 SPILL Hashes([16])",
        ];
        assert_eq!(table, expected);
        assert_eq!(Keyspace(200).key_form(), KeyForm::Secret, "what is not known is hidden whole");
    }
}
