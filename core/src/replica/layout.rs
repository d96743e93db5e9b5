//! Where a replica keeps what: keys and records.
//!
//! Every key starts with 16 bytes of blake3 of the workspace's name.
//!
//! | keyspace | key after the workspace | record |
//! |---|---|---|
//! | META | `state` | [`StateRecord`] |
//! | META | `schema` | hash of the schema that rows and indexes follow, and the form of index keys |
//! | META | `recovering` | nothing: the store went back, and what it lost has not all come yet |
//! | META | `repair` | [`RepairRecord`]; none before the relay first went back |
//! | META | `schemas` | hashes of the schemas that the relay had, in the order in which it got them |
//! | META | `lacking`, entity hash | nothing: the relay lacks something of it that is not this device's to bring |
//! | ENTITY | entity hash | [`EntityRecord`], or where it is if it is large |
//! | DOC | entity hash, 0 | the snapshot |
//! | DOC | entity hash, 1, number | an increment: changes since, each behind its length |
//! | HEADER | entity hash, place | [`HeaderRecord`](crate::codec::HeaderRecord) |
//! | ROW | type, 0, id | [`RowRecord`] |
//! | INDEX | type, 0, index number, [values](crate::rows::index_values), id | id |
//! | OUTBOX | number | [`OutboxRecord`] |
//! | CONFLICT | type, 0, id | [`ConflictRecord`]s |
//! | REFUSED | number | [`RefusedRecord`] |
//! | DEVICE | device key | [`DeviceRecord`] |
//! | SPILL | number, part | parts of the above where they are large |

use std::collections::BTreeMap;

use automerge::ChangeHash;
use bincode::{Decode, Encode};
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::change::Origin;
use crate::codec;
use crate::id::{EntityHash, EntityKey, WorkspaceId};
use crate::intent::Intent;
use crate::store::{Batch, Keyspace, Store, StoreError, View};

/// Values longer than this are spilled.
const INLINE_BYTES_MAX: usize = 60 * 1024;

/// Makes the keys of one workspace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Keys {
    prefix: [u8; 16],
}

impl Keys {
    pub(crate) fn of(workspace: &WorkspaceId) -> Self {
        let hash = blake3::derive_key("anabranch 2026 workspace v1", workspace.as_str().as_bytes());
        let mut prefix = [0; 16];
        prefix.copy_from_slice(&hash[..16]);
        Self { prefix }
    }

    fn key(&self, parts: &[&[u8]]) -> Vec<u8> {
        let mut key = self.prefix.to_vec();
        for part in parts {
            key.extend_from_slice(part);
        }
        key
    }

    /// What all keys of the workspace start with.
    pub(crate) fn prefix(&self) -> Vec<u8> {
        self.prefix.to_vec()
    }

    pub(crate) fn state(&self) -> Vec<u8> {
        self.key(&[b"state"])
    }

    pub(crate) fn schema(&self) -> Vec<u8> {
        self.key(&[b"schema"])
    }

    pub(crate) fn schemas(&self) -> Vec<u8> {
        self.key(&[b"schemas"])
    }

    pub(crate) fn recovering(&self) -> Vec<u8> {
        self.key(&[b"recovering"])
    }

    pub(crate) fn repair(&self) -> Vec<u8> {
        self.key(&[b"repair"])
    }

    /// What the keys of [`Keys::lacking`] start with.
    pub(crate) fn all_lacking(&self) -> Vec<u8> {
        self.key(&[b"lacking"])
    }

    pub(crate) fn lacking(&self, entity: EntityHash) -> Vec<u8> {
        self.key(&[b"lacking", &entity.0])
    }

    pub(crate) fn entity(&self, entity: EntityHash) -> Vec<u8> {
        self.key(&[&entity.0])
    }

    pub(crate) fn snapshot(&self, entity: EntityHash) -> Vec<u8> {
        self.key(&[&entity.0, &[0]])
    }

    pub(crate) fn increment(&self, entity: EntityHash, number: u32) -> Vec<u8> {
        self.key(&[&entity.0, &[1], &number.to_be_bytes()])
    }

    pub(crate) fn header(&self, entity: EntityHash, place: u32) -> Vec<u8> {
        self.key(&[&entity.0, &place.to_be_bytes()])
    }

    pub(crate) fn headers(&self, entity: EntityHash) -> Vec<u8> {
        self.key(&[&entity.0])
    }

    pub(crate) fn rows(&self, type_name: &str) -> Vec<u8> {
        self.key(&[type_name.as_bytes(), &[0]])
    }

    pub(crate) fn row(&self, entity: &EntityKey) -> Vec<u8> {
        self.key(&[entity.type_name().as_bytes(), &[0], entity.id().as_bytes()])
    }

    pub(crate) fn index(&self, type_name: &str, number: u8) -> Vec<u8> {
        self.key(&[type_name.as_bytes(), &[0, number]])
    }

    pub(crate) fn number(&self, number: u64) -> Vec<u8> {
        self.key(&[&number.to_be_bytes()])
    }

    pub(crate) fn device(&self, device: &[u8; 32]) -> Vec<u8> {
        self.key(&[device])
    }

    fn spill(&self, number: u64) -> Vec<u8> {
        self.key(&[&number.to_be_bytes()])
    }

    /// The type and id in a row's key.
    pub(crate) fn parse_row(&self, key: &[u8]) -> Option<EntityKey> {
        let rest = key.get(self.prefix.len()..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        let type_name = std::str::from_utf8(&rest[..end]).ok()?;
        let id = std::str::from_utf8(&rest[end + 1..]).ok()?;
        EntityKey::new(type_name, id).ok()
    }

    /// The type and id in an index entry: its key and value.
    pub(crate) fn parse_index(&self, key: &[u8], value: &[u8]) -> Option<EntityKey> {
        let rest = key.get(self.prefix.len()..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        EntityKey::new(std::str::from_utf8(&rest[..end]).ok()?, std::str::from_utf8(value).ok()?).ok()
    }

    /// Puts a value of any size. `spills` numbers spilled values and must never repeat.
    /// What the key held before is read to free its parts.
    pub(crate) fn put(
        &self,
        store: &dyn Store,
        batch: &mut Batch,
        spills: &mut u64,
        keyspace: Keyspace,
        key: Vec<u8>,
        value: &[u8],
    ) -> Result<(), StoreError> {
        self.free(store, batch, keyspace, &key)?;
        if value.len() <= INLINE_BYTES_MAX {
            let mut inline = Vec::with_capacity(value.len() + 1);
            inline.push(0);
            inline.extend_from_slice(value);
            batch.put(keyspace, key, inline);
        } else {
            check_size(value, codec::LARGE_BYTES_MAX)?;
            *spills += 1;
            let parts = codec::put_large(batch, Keyspace::SPILL, &self.spill(*spills), value, 0);
            batch.put(keyspace, key, head(LARGE, *spills, parts));
        }
        Ok(())
    }

    /// Removes a value of any size.
    pub(crate) fn delete(
        &self,
        store: &dyn Store,
        batch: &mut Batch,
        keyspace: Keyspace,
        key: Vec<u8>,
    ) -> Result<(), StoreError> {
        self.free(store, batch, keyspace, &key)?;
        batch.delete(keyspace, key);
        Ok(())
    }

    fn free(
        &self,
        store: &dyn Store,
        batch: &mut Batch,
        keyspace: Keyspace,
        key: &[u8],
    ) -> Result<(), StoreError> {
        if let Some(old) = store.get(View::Latest, keyspace, key)?
            && let Some((number, parts)) = spilled(&old)
        {
            codec::delete_parts(batch, Keyspace::SPILL, &self.spill(number), 0..parts);
        }
        Ok(())
    }

    /// Reads a value of any size.
    pub(crate) fn get(
        &self,
        store: &dyn Store,
        view: View,
        keyspace: Keyspace,
        key: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        // A spilled value can be replaced between the two reads; then the first is repeated.
        const TRIES: usize = 8;
        for attempt in 1.. {
            let Some(head) = store.get(view, keyspace, key)? else { return Ok(None) };
            match self.whole(store, view, &head) {
                Err(StoreError::Damaged { .. }) if attempt < TRIES => continue,
                whole => return whole.map(Some),
            }
        }
        Ok(None)
    }

    /// The value that a record found by a scan stands for.
    pub(crate) fn whole(&self, store: &dyn Store, view: View, head: &[u8]) -> Result<Vec<u8>, StoreError> {
        match spilled(head) {
            Some((number, parts)) => {
                codec::get_large(store, view, Keyspace::SPILL, &self.spill(number), parts)
            }
            None => match head.split_first() {
                Some((0, value)) => Ok(value.to_vec()),
                _ => Err(StoreError::Damaged { what: "a record has an unknown form".into() }),
            },
        }
    }

    /// Puts the record of an entity. It grows with the number of those who wrote to the entity. Where it fits
    /// it stands as it is, without the mark that other values have, since it always did.
    pub(crate) fn put_entity(
        &self,
        store: &dyn Store,
        batch: &mut Batch,
        spills: &mut u64,
        entity: EntityHash,
        record: &EntityRecord,
    ) -> Result<(), StoreError> {
        let (key, bytes) = (self.entity(entity), codec::encode(record));
        self.free_entity(store, batch, &key)?;
        if bytes.len() <= INLINE_BYTES_MAX {
            batch.put(Keyspace::ENTITY, key, bytes);
            return Ok(());
        }
        check_size(&bytes, codec::RECORD_BYTES_MAX)?;
        *spills += 1;
        let parts = codec::put_large(batch, Keyspace::SPILL, &self.spill(*spills), &bytes, 0);
        batch.put(Keyspace::ENTITY, key, head(LARGE_ENTITY, *spills, parts));
        Ok(())
    }

    /// Removes the record of an entity.
    pub(crate) fn delete_entity(
        &self,
        store: &dyn Store,
        batch: &mut Batch,
        entity: EntityHash,
    ) -> Result<(), StoreError> {
        let key = self.entity(entity);
        self.free_entity(store, batch, &key)?;
        batch.delete(Keyspace::ENTITY, key);
        Ok(())
    }

    fn free_entity(&self, store: &dyn Store, batch: &mut Batch, key: &[u8]) -> Result<(), StoreError> {
        if let Some(old) = store.get(View::Latest, Keyspace::ENTITY, key)?
            && let Some((number, parts)) = parts_of(&old, LARGE_ENTITY)
        {
            codec::delete_parts(batch, Keyspace::SPILL, &self.spill(number), 0..parts);
        }
        Ok(())
    }

    /// The record of an entity, from what is found at its key.
    pub(crate) fn entity_record(&self, store: &dyn Store, found: &[u8]) -> Result<EntityRecord, StoreError> {
        const WHAT: &str = "an entity";
        match parts_of(found, LARGE_ENTITY) {
            Some((number, parts)) => {
                let place = self.spill(number);
                codec::decode(&codec::get_large(store, View::Latest, Keyspace::SPILL, &place, parts)?, WHAT)
            }
            None => codec::decode(found, WHAT),
        }
    }
}

/// What a value begins with whose parts are elsewhere.
const LARGE: u8 = 1;
/// The same for the record of an entity: no record has this version.
const LARGE_ENTITY: u8 = 0;

/// What could not be read again is not written.
fn check_size(value: &[u8], max_bytes: usize) -> Result<(), StoreError> {
    if value.len() > max_bytes {
        return Err(StoreError::TooLarge { what: "value", bytes: value.len(), max_bytes });
    }
    Ok(())
}

fn head(mark: u8, number: u64, parts: u32) -> Vec<u8> {
    [&[mark][..], &number.to_be_bytes(), &parts.to_be_bytes()].concat()
}

fn spilled(head: &[u8]) -> Option<(u64, u32)> {
    parts_of(head, LARGE)
}

fn parts_of(head: &[u8], mark: u8) -> Option<(u64, u32)> {
    let rest = head.strip_prefix(&[mark])?;
    let (number, parts) = rest.split_first_chunk::<8>()?;
    let parts = u32::from_be_bytes(parts.try_into().ok()?);
    (parts <= codec::PARTS_MAX).then_some((u64::from_be_bytes(*number), parts))
}

/// What a replica knows of itself.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct StateRecord {
    /// Epoch of the relay's feed; zeros before the first session.
    pub(crate) epoch: [u8; 16],
    /// Last feed entry applied.
    pub(crate) cursor: u64,
    /// Digest of what the relay admitted.
    pub(crate) digest: [u8; 32],
    /// Which life of the store this is.
    pub(crate) incarnation: u32,
    /// The life of the store that the incarnation belongs to.
    pub(crate) store_life: u32,
    /// Changes sent in this life.
    pub(crate) sent: u64,
    /// Next number in the outbox.
    pub(crate) outbox_next: u64,
    /// Next number among refused changes.
    pub(crate) refused_next: u64,
    /// Last number of a spilled value.
    pub(crate) spills: u64,
    /// How far the relay's clock is ahead of this device's, milliseconds.
    pub(crate) skew_ms: i64,
    /// Role of the last grant, as a number; 0 before the first.
    pub(crate) role: u8,
    /// When the last sync completed, milliseconds since 1970.
    pub(crate) synced_ms: u64,
}

/// Where a replica stands with a relay that went back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct RepairRecord {
    /// How often the relay went back. What an entity's record and headers say of admission holds
    /// only if it is of this generation.
    pub(crate) generation: u64,
    /// The feed is being read from its start, and what the relay lacks is not yet in the outbox.
    pub(crate) reading: bool,
    /// Hash of the schema that the relay had when all was well; zeros before.
    pub(crate) schema: [u8; 32],
    /// The relay lost that schema: as long as `reading`, the feed has not told of it so far. What fits it
    /// may not fit an older one and would be refused for good, so nothing is sent until somebody has
    /// pushed one.
    pub(crate) waits_for_schema: bool,
}

/// What is kept of an entity beside its document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub(crate) struct EntityRecord {
    pub(crate) type_name: String,
    pub(crate) id: String,
    /// Bytes of the snapshot.
    pub(crate) snapshot_bytes: u64,
    /// Bytes of each increment stored after the snapshot.
    pub(crate) increments: Vec<u64>,
    /// Actors with their authors, in order.
    pub(crate) actors: Vec<(Vec<u8>, Vec<u8>)>,
    /// Containers by field.
    pub(crate) containers: Vec<(String, u8)>,
    /// How many headers there are.
    pub(crate) headers: u32,
    /// Heads of what the relay admitted, in byte order.
    pub(crate) admitted_heads: Vec<[u8; 32]>,
    /// How often it was rebuilt: the low half of the incarnation.
    pub(crate) rebuilds: u32,
    /// The [`RepairRecord::generation`] that the admitted heads and headers are of.
    pub(crate) generation: u64,
}

/// Where an entity stands between this device and the relay.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum SyncStatus {
    /// The relay has all of it.
    Synced,
    /// Made here and not yet admitted.
    PendingCreate,
    /// Changed here since.
    PendingUpdate,
    /// Deleted here, and the relay does not know yet.
    PendingDelete,
    /// Something of it was refused.
    Failed,
    /// Something of it waits for a person.
    Conflict,
}

impl SyncStatus {
    /// The name that programs see.
    pub fn name(self) -> &'static str {
        match self {
            SyncStatus::Synced => "synced",
            SyncStatus::PendingCreate => "pending_create",
            SyncStatus::PendingUpdate => "pending_update",
            SyncStatus::PendingDelete => "pending_delete",
            SyncStatus::Failed => "failed",
            SyncStatus::Conflict => "conflict",
        }
    }
}

/// An entity as people see it, materialised.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RowRecord {
    /// Every field of the schema.
    pub fields: BTreeMap<String, Json>,
    /// Its version: a token for edits based on it.
    pub version: String,
    /// Where it stands.
    pub status: SyncStatus,
    /// Whether it is deleted.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deleted: bool,
    /// When its first change was written, milliseconds since 1970.
    pub created_ms: u64,
    /// When its last change was written, milliseconds since 1970.
    pub updated_ms: u64,
    /// The device of the last change, as base64url of its key.
    pub updated_by: String,
}

/// A transaction in the outbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PendingTx {
    /// None of what this device means to say: that is its own.
    pub(crate) author: Option<[u8; 32]>,
    pub(crate) id: [u8; 16],
    /// How many members it has.
    pub(crate) members: u32,
}

/// A change on its way to the relay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OutboxRecord {
    pub(crate) type_name: String,
    pub(crate) id: String,
    pub(crate) hash: [u8; 32],
    pub(crate) intents: Vec<Intent>,
    pub(crate) authority: bool,
    /// Transaction id and member count.
    pub(crate) tx: Option<([u8; 16], u32)>,
    /// The edit that it makes, where it is not the first change that was made for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) origin: Option<[u8; 12]>,
    /// The correction of the clock when it was written, milliseconds.
    pub(crate) skew_ms: i64,
    /// Whether it may have left the device.
    pub(crate) sent: bool,
    /// The edit left the device once, as another change, and keeps the date that it had: what leaves is dated by a
    /// clock that was measured.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) dated: bool,
    /// What the change [weighs](crate::change::Change::weight), in bytes.
    pub(crate) bytes: u32,
    /// The relay had admitted it and lost it: it goes as it is or not at all.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) again: bool,
    /// Who wrote what goes again, if it is part of a transaction: anyone can write the id of another's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) author: Option<[u8; 32]>,
}

impl OutboxRecord {
    /// The transaction that it is part of.
    pub(crate) fn transaction(&self) -> Option<PendingTx> {
        self.tx.map(|(id, members)| PendingTx { author: self.author, id, members })
    }

    /// The edit that it makes.
    pub(crate) fn origin(&self) -> Origin {
        self.origin.map_or_else(|| Origin::of(&ChangeHash(self.hash)), Origin)
    }
}

/// A change that the relay refused, or that meant nothing without one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RefusedRecord {
    /// The entity's type.
    pub type_name: String,
    /// Its id.
    pub id: String,
    /// For programs.
    pub code: String,
    /// For people.
    pub message: String,
    /// What the user had meant: show it, edit it, send it again. Empty where the relay had it and lost it: that was
    /// forgotten when it was admitted.
    pub intents: Vec<Intent>,
    /// When it was refused, milliseconds since 1970.
    pub time_ms: u64,
    /// Which edit it was, or the change that made it, where the relay had it or may have had it: this goes by itself
    /// should that come back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub edit: Option<[u8; 12]>,
}

/// Something that waits for a person, as it is stored.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ConflictRecord {
    /// A field, a group, `field.key`, or `*` for the whole entity.
    pub field: String,
    /// `manual`, `tie` or `lost_edit`.
    pub kind: String,
    /// What competes, the newest first.
    pub sides: Vec<SideRecord>,
    /// What all sides started from.
    pub base: Option<Json>,
}

/// One side of a [`ConflictRecord`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SideRecord {
    /// Key of the device that wrote it last.
    pub device: [u8; 32],
    /// Keys of other devices that wrote the same value, the last first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<[u8; 32]>,
    /// The value; null for a cleared field or a deletion.
    pub value: Json,
    /// When it was written, milliseconds since 1970.
    pub time_ms: u64,
}

/// A device of the workspace.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(crate) struct DeviceRecord {
    pub(crate) name: String,
    pub(crate) platform: String,
}

/// The record of a value whose form is JSON: rows and intents hold JSON themselves.
pub(crate) fn to_json(value: &impl Serialize) -> Vec<u8> {
    // Our records serialise to JSON without fail: string keys and plain values only.
    serde_json::to_vec(value).unwrap_or_default()
}

/// Reads such a record.
pub(crate) fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8], what: &str) -> Result<T, StoreError> {
    serde_json::from_slice(bytes).map_err(|error| StoreError::Damaged { what: format!("{what}: {error}") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_not_be_read_again_is_not_written() {
        let value = [0; 9];
        assert!(check_size(&value, 9).is_ok());
        assert!(matches!(check_size(&value, 8), Err(StoreError::TooLarge { bytes: 9, max_bytes: 8, .. })));
    }

    /// A record whose count of parts was damaged had four thousand million keys deleted, one by
    /// one, before the next value could be put in its place.
    #[test]
    fn a_damaged_count_of_parts_frees_nothing() {
        let head = |parts: u32| [&[1][..], &7u64.to_be_bytes(), &parts.to_be_bytes()].concat();
        assert_eq!(spilled(&head(3)), Some((7, 3)));
        for damaged in [codec::PARTS_MAX + 1, u32::MAX] {
            assert_eq!(spilled(&head(damaged)), None);
        }
    }
}
