//! What [`DiskStore`](crate::DiskStore) needs of the engine below it.
//!
//! A backend is an ordered map on disk, changed by one group of changes at a time. Queueing,
//! merging, publishing, checksums, the lock and the roll-back detector are the disk store's.

pub(crate) mod redb;
pub(crate) mod sled;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::{fmt, io};

use anabranch_core::store::StoreError;

use crate::files::io_error;
use crate::keys::KeyRange;
use crate::options::StoreOptions;

/// A physical key or a stored value.
pub(crate) type Bytes = Arc<[u8]>;

/// An entry that is put or removed, as it was given and as it will be stored.
#[derive(Clone)]
pub(crate) struct Change {
    /// The key as it was given.
    pub(crate) key: Bytes,
    /// The key on disk.
    pub(crate) stored_key: Bytes,
    /// The value on disk, or that the entry goes.
    pub(crate) stored: Option<Bytes>,
}

impl Change {
    /// Where entries are stored as they are given.
    pub(crate) fn plain(key: Bytes, value: Option<Bytes>) -> Change {
        Change { stored_key: Bytes::clone(&key), key, stored: value }
    }
}

/// Puts a group of changes, the newest of which come last, in the order on disk, each key once.
pub(crate) fn put_in_order(changes: &mut Vec<Change>) {
    changes.sort_by(|a, b| a.stored_key.cmp(&b.stored_key));
    changes.dedup_by(|later, earlier| {
        let same = later.stored_key == earlier.stored_key;
        if same {
            std::mem::swap(later, earlier);
        }
        same
    });
}

/// Entries of a range, in the order asked for.
pub(crate) type Entries<'a> = Box<dyn Iterator<Item = Result<(Bytes, Bytes), StoreError>> + 'a>;

/// Called with a key and its value.
pub(crate) type Visit<'a> = dyn FnMut(&[u8], &[u8]) -> Result<(), StoreError> + 'a;

/// Which engine keeps the bytes of a store on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum BackendKind {
    /// sled 0.34: fewest bytes written for each small commit. The default.
    #[default]
    Sled,
    /// redb 4: opens and reads several times as fast, and needs less disk after many small
    /// commits.
    Redb,
}

impl BackendKind {
    /// Every backend.
    pub const ALL: [BackendKind; 2] = [BackendKind::Sled, BackendKind::Redb];

    /// The name that configurations and `FORMAT` use.
    pub fn name(self) -> &'static str {
        match self {
            BackendKind::Sled => "sled",
            BackendKind::Redb => "redb",
        }
    }

    /// The backend of that name.
    pub fn from_name(name: &str) -> Option<BackendKind> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The file in a store's directory that shows that the backend has been there.
    pub(crate) fn main_file(self) -> &'static str {
        match self {
            BackendKind::Sled => "db",
            BackendKind::Redb => redb::FILE,
        }
    }

    /// Waits until a backend that was dropped has let go of its files.
    pub(crate) fn wait_released(self, dir: &Path) -> Result<(), StoreError> {
        match self {
            BackendKind::Sled => sled::wait_released(dir),
            BackendKind::Redb => Ok(()),
        }
    }

    /// Opens the backend's files in `dir`, or makes them. What it then shows is durable.
    ///
    /// May panic where the files are damaged.
    pub(crate) fn open(self, dir: &Path, options: &StoreOptions) -> Result<Box<dyn Backend>, StoreError> {
        match self {
            BackendKind::Sled => Ok(Box::new(sled::Sled::open(dir, options)?)),
            BackendKind::Redb => Ok(Box::new(redb::Redb::open(dir, options)?)),
        }
    }
}

impl fmt::Display for BackendKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An ordered map on disk. Any method may panic where it meets damage.
pub(crate) trait Backend: Send + Sync {
    /// Whether readers see changes, perhaps half of a group, before they are durable. If not,
    /// each reader sees whole groups that are durable, and one state throughout.
    fn shows_unsynced(&self) -> bool;

    /// A look at the current state. Short-lived: it may keep old pages from being freed.
    fn reader(&self) -> Result<Box<dyn Reader + '_>, StoreError>;

    /// Writes a group, whole or not at all. Only one thread does so. Each key occurs once.
    fn apply(&self, changes: &[Change]) -> Result<(), StoreError>;

    /// When this returns, every group whose `apply` returned before survives power loss.
    fn sync(&self) -> Result<(), StoreError>;

    /// The backend that holds the entries as they are stored: below encryption, or itself.
    fn stored(&self) -> &dyn Backend;

    /// A change in the form that [`Backend::apply`] takes. Touches nothing, so that any thread can
    /// do this work.
    fn sealed(&self, key: Bytes, value: Option<Bytes>) -> Result<Change, StoreError>;

    /// What was given to this backend to be stored as this entry.
    fn opened_entry(&self, key: &Bytes, stored: &Bytes) -> Result<(Bytes, Bytes), StoreError>;

    /// Whether there is certainly no such entry, as far as that is known without reading. Asked between
    /// two groups.
    fn is_absent(&self, _key: &[u8]) -> bool {
        false
    }

    /// Looks for damage that reading every entry would not show. Others may have to wait.
    fn verify(&self) -> Result<(), StoreError>;

    /// Gives space inside of the files back where the backend can. Others may have to wait.
    fn trim(&self) -> Result<(), StoreError>;

    /// Bytes on disk.
    fn disk_bytes(&self) -> u64;
}

/// See [`Backend::reader`].
pub(crate) trait Reader {
    /// The value of a key.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, StoreError>;

    /// The entries of a range.
    fn range(&self, range: &KeyRange, descending: bool) -> Result<Entries<'_>, StoreError>;

    /// Visits every entry, in no order that means anything.
    fn walk(&self, visit: &mut Visit<'_>) -> Result<(), StoreError>;
}

/// The words of a panic.
pub(crate) fn panic_words(panic: &(dyn Any + Send)) -> String {
    if let Some(words) = panic.downcast_ref::<&str>() {
        (*words).to_owned()
    } else if let Some(words) = panic.downcast_ref::<String>() {
        words.clone()
    } else {
        "no words".to_owned()
    }
}

/// Lets go of a backend, which may panic over damage even then.
pub(crate) fn release<T>(backend: T) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| drop(backend))) {
        tracing::warn!(words = panic_words(&*panic), "the backend panicked while it was closed");
    }
}

/// Says whether a backend met damage or the system refused.
fn file_error(operation: &'static str, error: io::Error) -> StoreError {
    use io::ErrorKind::{InvalidData, NotFound, UnexpectedEof};
    match error.kind() {
        // A file that is missing or too short, once the store is open, is damage.
        InvalidData | NotFound | UnexpectedEof => {
            StoreError::Damaged { what: format!("{operation}: {error}") }
        }
        _ => io_error(operation)(error),
    }
}
