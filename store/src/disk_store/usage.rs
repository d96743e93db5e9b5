//! What a store holds, counted by reading it.

use std::collections::BTreeMap;

use anabranch_core::store::{Keyspace, StoreError};

use super::Shared;
use super::snapshot::Snapshot;

/// What a keyspace holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct KeyspaceUsage {
    /// How many entries.
    pub entries: u64,
    /// Bytes of their keys and values as the backend is given them: with checksums, and with what
    /// encryption adds.
    pub bytes: u64,
}

/// What a store holds; see [`DiskStore::usage`](super::DiskStore::usage).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Usage {
    /// By keyspace, those that hold anything.
    pub keyspaces: BTreeMap<Keyspace, KeyspaceUsage>,
}

impl Usage {
    /// All keyspaces together.
    pub fn total(&self) -> KeyspaceUsage {
        self.keyspaces.values().fold(KeyspaceUsage::default(), |sum, one| KeyspaceUsage {
            entries: sum.entries + one.entries,
            bytes: sum.bytes + one.bytes,
        })
    }

    pub(super) fn count(shared: &Shared) -> Result<Usage, StoreError> {
        let mut usage = Usage::default();
        let mut snapshot = Snapshot::begin(shared)?;
        while let Some(page) = snapshot.page()? {
            for (key, value) in page {
                usage.add(&key, &value);
            }
        }
        Ok(usage)
    }

    pub(super) fn add(&mut self, stored_key: &[u8], stored: &[u8]) {
        let keyspace = Keyspace(stored_key.first().copied().unwrap_or(0));
        let one = self.keyspaces.entry(keyspace).or_default();
        one.entries += 1;
        one.bytes += (stored_key.len() + stored.len()) as u64;
    }
}
