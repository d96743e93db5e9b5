//! Durable ordered stores behind the [`Store`] trait of `anabranch-core`.
//!
//! - [`DiskStore`] keeps its word on disk, on top of sled or redb, encrypted or not; open one
//!   with [`open`].
//! - [`MemoryStore`] is for tests and the simulator: durable at once, or when told.
//! - [`FaultStore`] wraps either and fails, holds back and crashes to order.
//!
//! One suite, the module `contract`, says what all of them promise; it is built for this crate's own
//! tests and with the feature `contract`.
//!
//! Keyspace 0 belongs to the stores themselves; a call that names it is refused.

mod durability;
mod files;
mod keys;
mod merge;
mod options;

mod backend;
mod backup;
#[cfg(any(test, feature = "contract"))]
pub mod contract;
mod disk_store;
mod encrypt;
mod fault;
mod memory;
mod upkeep;

pub use anabranch_core::store::{
    Batch, CommitNo, DurableHook, Entry, Keyspace, Op, Store, StoreError, StoreStats, View,
};
pub use backend::BackendKind;
pub use backup::BackupReport;
#[doc(hidden)]
pub use backup::{reread_entries, reread_manifest};
pub use disk_store::{
    CompactOptions, CompactReport, CompactStep, DiskStore, Encryption, Kept, KeyspaceUsage, Usage, compact,
    open, peek, rekey, restore,
};
#[doc(hidden)]
pub use disk_store::{reread_commits, reread_format};
pub use encrypt::StoreKey;
#[doc(hidden)]
pub use encrypt::reread_key;
pub use fault::FaultStore;
pub use memory::MemoryStore;
pub use options::StoreOptions;
pub use upkeep::{KindFigures, StorageFigures, StorageKind, Upkeep};
