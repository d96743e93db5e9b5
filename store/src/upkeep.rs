//! What can be done about a store beside those who read and write it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anabranch_core::store::{Keyspace, Store, StoreError};

use crate::backend::BackendKind;
use crate::backup::BackupReport;
use crate::disk_store::DiskStore;
use crate::options::StoreOptions;

/// What entries of a store are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum StorageKind {
    /// Document snapshots and increments.
    Documents,
    /// The header of each change.
    History,
    /// What entities are at.
    Entities,
    /// Rows as people see them.
    Rows,
    /// Index entries.
    Indexes,
    /// Changes that wait to be sent.
    Outbox,
    /// Open conflicts.
    Conflicts,
    /// Refused changes.
    Refused,
    /// A relay's feeds.
    Feed,
    /// A relay's grants and used invites.
    Grants,
    /// Known devices.
    Devices,
    /// Schemas.
    Schemas,
    /// Parts of any of these that are too large for one entry.
    LargeValues,
    /// Small records that exist once.
    State,
    /// What this version does not know.
    Unknown,
}

impl StorageKind {
    fn of(keyspace: Keyspace) -> StorageKind {
        match keyspace {
            Keyspace::META => StorageKind::State,
            Keyspace::ENTITY => StorageKind::Entities,
            Keyspace::DOC => StorageKind::Documents,
            Keyspace::HEADER => StorageKind::History,
            Keyspace::ROW => StorageKind::Rows,
            Keyspace::INDEX => StorageKind::Indexes,
            Keyspace::OUTBOX => StorageKind::Outbox,
            Keyspace::CONFLICT => StorageKind::Conflicts,
            Keyspace::REFUSED => StorageKind::Refused,
            Keyspace::DEVICE => StorageKind::Devices,
            Keyspace::FEED => StorageKind::Feed,
            Keyspace::GRANT => StorageKind::Grants,
            Keyspace::SCHEMA => StorageKind::Schemas,
            Keyspace::SPILL => StorageKind::LargeValues,
            _ => StorageKind::Unknown,
        }
    }

    /// A name for programs, which stays.
    pub fn name(self) -> &'static str {
        match self {
            StorageKind::Documents => "documents",
            StorageKind::History => "history",
            StorageKind::Entities => "entities",
            StorageKind::Rows => "rows",
            StorageKind::Indexes => "indexes",
            StorageKind::Outbox => "outbox",
            StorageKind::Conflicts => "conflicts",
            StorageKind::Refused => "refused",
            StorageKind::Feed => "feed",
            StorageKind::Grants => "grants",
            StorageKind::Devices => "devices",
            StorageKind::Schemas => "schemas",
            StorageKind::LargeValues => "large_values",
            StorageKind::State => "state",
            StorageKind::Unknown => "unknown",
        }
    }
}

/// What entries of one kind take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KindFigures {
    /// The kind.
    pub kind: StorageKind,
    /// How many entries.
    pub entries: u64,
    /// Bytes of their keys and values: with checksums, and with what encryption adds.
    pub bytes: u64,
}

/// How a store is kept, and what takes the space.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct StorageFigures {
    /// What keeps the bytes.
    pub backend: BackendKind,
    /// Whether it is encrypted.
    pub encrypted: bool,
    /// The version of the stored format.
    pub format: u32,
    /// Bytes on disk.
    pub disk_bytes: u64,
    /// Bytes of all entries. What the disk holds beyond that is the backend's own, or what it
    /// has not given back; compaction gives it back.
    pub live_bytes: u64,
    /// By kind, those that there are.
    pub kinds: Vec<KindFigures>,
}

/// What can be done about an open store beside those who use it: look at it, check it, back
/// it up. Cheap to clone. Once the store is shut down everything answers [`StoreError::Closed`].
///
/// All of it blocks on the disk, for as long as reading the whole store takes.
#[derive(Clone)]
pub struct Upkeep {
    store: Arc<DiskStore>,
}

impl std::fmt::Debug for Upkeep {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Upkeep").finish_non_exhaustive()
    }
}

impl Upkeep {
    /// Of this store.
    pub fn of(store: &Arc<DiskStore>) -> Upkeep {
        Upkeep { store: Arc::clone(store) }
    }

    /// Opens the store in `dir`, which must exist, for its upkeep alone. What a roll-back means
    /// is left to those who use the store.
    ///
    /// # Errors
    /// Those of [`DiskStore::open`].
    pub fn open(dir: impl AsRef<Path>, options: StoreOptions) -> Result<Upkeep, StoreError> {
        Ok(Upkeep { store: Arc::new(DiskStore::open(dir, options)?) })
    }

    /// Closes the store.
    ///
    /// # Errors
    /// What went wrong before or does now.
    pub fn close(&self) -> Result<(), StoreError> {
        self.store.shut_down()
    }

    /// Counts what the store holds, in one state.
    ///
    /// # Errors
    /// Those of [`DiskStore::usage`].
    pub fn figures(&self) -> Result<StorageFigures, StoreError> {
        let usage = self.store.usage()?;
        let mut kinds: Vec<KindFigures> = Vec::new();
        for (keyspace, one) in &usage.keyspaces {
            let kind = StorageKind::of(*keyspace);
            match kinds.iter_mut().find(|known| known.kind == kind) {
                Some(known) => {
                    known.entries += one.entries;
                    known.bytes += one.bytes;
                }
                None => kinds.push(KindFigures { kind, entries: one.entries, bytes: one.bytes }),
            }
        }
        kinds.sort_by_key(|one| one.kind);
        Ok(StorageFigures {
            backend: self.store.backend(),
            encrypted: self.store.is_encrypted(),
            format: self.store.format_version(),
            disk_bytes: self.store.stats().disk_bytes,
            live_bytes: usage.total().bytes,
            kinds,
        })
    }

    /// Reads everything and compares checksums; see [`DiskStore::verify`]. Returns how many
    /// entries there were.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] says what is.
    pub fn verify(&self) -> Result<u64, StoreError> {
        self.store.verify()
    }

    /// The store, for whoever knows what its values mean.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Makes a backup; see [`DiskStore::backup`].
    ///
    /// # Errors
    /// Those of [`DiskStore::backup`].
    pub fn backup(
        &self,
        target: &Path,
        files: &[(PathBuf, PathBuf)],
        progress: &mut dyn FnMut(u64),
    ) -> Result<BackupReport, StoreError> {
        self.store.backup(target, files, progress)
    }
}
