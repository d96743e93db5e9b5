//! Reading what a replica has materialised. Reads don't queue behind writes: they are served
//! from durable rows, from any thread.

use std::sync::Arc;

use serde_json::Value as Json;

use crate::codec;
use crate::id::{DeviceId, EntityKey, ID_BYTES_MAX, NAME_BYTES_MAX, WorkspaceId};
use crate::replica::layout::{DeviceRecord, Keys, from_json};
use crate::schema::{EntityType, Field, FieldType, ScalarType, Schema, timestamp_to_ms};
use crate::store::{KEY_BYTES_MAX, Keyspace, Store, StoreError, View};

pub use crate::replica::layout::{ConflictRecord, RefusedRecord, RowRecord, SideRecord, SyncStatus};

/// Rows of one page of a scan.
const PAGE_ROWS: usize = 256;

/// Index keys with the entities that they stand for, and whether there are more.
pub type IndexPage = (Vec<(Vec<u8>, EntityKey)>, bool);

/// A reader of one workspace.
#[derive(Clone)]
pub struct Rows {
    store: Arc<dyn Store>,
    schema: Arc<Schema>,
    keys: Keys,
}

impl Rows {
    /// A reader of what `store` holds of `workspace`.
    pub fn new(store: Arc<dyn Store>, schema: Arc<Schema>, workspace: &WorkspaceId) -> Self {
        Self { store, schema, keys: Keys::of(workspace) }
    }

    /// The schema that rows follow.
    pub fn schema(&self) -> &Schema {
        &self.schema
    }

    /// One entity, deleted or not.
    pub fn get(&self, entity: &EntityKey) -> Result<Option<RowRecord>, StoreError> {
        let found = self.keys.get(&*self.store, View::Published, Keyspace::ROW, &self.keys.row(entity))?;
        found.map(|bytes| from_json(&bytes, "a row")).transpose()
    }

    /// One entity among others that were found; none too where it can't be read.
    pub(crate) fn get_found(&self, entity: &EntityKey) -> Result<Option<RowRecord>, StoreError> {
        let found = self.keys.get(&*self.store, View::Published, Keyspace::ROW, &self.keys.row(entity))?;
        Ok(found.and_then(|bytes| readable(&bytes, "a row", entity)))
    }

    /// Rows of a type in order of their ids, from the first id after `after`: at most one page,
    /// and where to go on. One that can't be read is left out; [`get`](Self::get) says why.
    pub fn page(
        &self,
        type_name: &str,
        after: Option<&str>,
    ) -> Result<(Vec<(EntityKey, RowRecord)>, bool), StoreError> {
        let prefix = self.keys.rows(type_name);
        let from = match after {
            Some(id) => {
                let mut from = prefix.clone();
                from.extend_from_slice(id.as_bytes());
                from.push(0);
                from
            }
            None => Vec::new(),
        };
        let found = self.store.scan(View::Published, Keyspace::ROW, &prefix, &from, PAGE_ROWS)?;
        let more = found.len() == PAGE_ROWS;
        let mut rows = Vec::with_capacity(found.len());
        for (key, head) in found {
            let Some(entity) = self.keys.parse_row(&key) else { continue };
            let bytes = self.found(Keyspace::ROW, &key, &head)?;
            let row = bytes.and_then(|bytes| readable(&bytes, "a row", &entity));
            rows.extend(row.map(|row| (entity, row)));
        }
        Ok((rows, more))
    }

    /// Ids of a type from an index, in order of the indexed values. `range` bounds the encoded
    /// values. At most one page after the index key `after`.
    pub fn index_page(
        &self,
        type_name: &str,
        index: u8,
        prefix_values: &[u8],
        after: Option<&[u8]>,
        descending: bool,
    ) -> Result<IndexPage, StoreError> {
        let mut prefix = self.keys.index(type_name, index);
        prefix.extend_from_slice(prefix_values);
        let found = if descending {
            self.store.scan_rev(
                View::Published,
                Keyspace::INDEX,
                &prefix,
                after.unwrap_or_default(),
                PAGE_ROWS,
            )?
        } else {
            let from = after.map(|after| [after, &[0]].concat()).unwrap_or_default();
            self.store.scan(View::Published, Keyspace::INDEX, &prefix, &from, PAGE_ROWS)?
        };
        let more = found.len() == PAGE_ROWS;
        let entries = found
            .into_iter()
            .filter_map(|(key, id)| {
                let id = String::from_utf8(id).ok()?;
                Some((key, EntityKey::new(type_name, id).ok()?))
            })
            .collect();
        Ok((entries, more))
    }

    /// Everything that waits for a person, in order of type and id. An entity whose conflicts can't be read
    /// keeps nobody from those of the others.
    pub fn conflicts(&self) -> Result<Vec<(EntityKey, ConflictRecord)>, StoreError> {
        let mut all = Vec::new();
        self.each(Keyspace::CONFLICT, |key, bytes| {
            if let Some(entity) = self.keys.parse_row(key) {
                let records: Option<Vec<ConflictRecord>> = readable(&bytes, "a conflict", &entity);
                all.extend(records.into_iter().flatten().map(|record| (entity.clone(), record)));
            }
            Ok(())
        })?;
        Ok(all)
    }

    /// What was refused, oldest first, each with its number.
    pub fn refused(&self) -> Result<Vec<(u64, RefusedRecord)>, StoreError> {
        let mut all = Vec::new();
        self.each(Keyspace::REFUSED, |key, bytes| {
            let number = key.last_chunk::<8>().map(|n| u64::from_be_bytes(*n)).unwrap_or_default();
            let record = readable(&bytes, "a refused change", &number);
            all.extend(record.map(|record| (number, record)));
            Ok(())
        })?;
        Ok(all)
    }

    /// What people call a device; its key where nobody has told.
    pub fn device_name(&self, device: &DeviceId) -> Result<String, StoreError> {
        let found = self.store.get(View::Published, Keyspace::DEVICE, &self.keys.device(&device.0))?;
        match found {
            Some(bytes) => Ok(codec::decode::<DeviceRecord>(&bytes, "a device")?.name),
            None => Ok(device.to_string()),
        }
    }

    /// The value that a scan found. Where it was spilled and replaced since, as it is now; none
    /// where it is gone.
    fn found(&self, keyspace: Keyspace, key: &[u8], head: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        match self.keys.whole(&*self.store, View::Published, head) {
            Err(StoreError::Damaged { .. }) => self.keys.get(&*self.store, View::Published, keyspace, key),
            whole => whole.map(Some),
        }
    }

    fn each(
        &self,
        keyspace: Keyspace,
        mut visit: impl FnMut(&[u8], Vec<u8>) -> Result<(), StoreError>,
    ) -> Result<(), StoreError> {
        let prefix = self.keys.prefix();
        let mut from = Vec::new();
        loop {
            let page = self.store.scan(View::Published, keyspace, &prefix, &from, PAGE_ROWS)?;
            for (key, head) in &page {
                if let Some(bytes) = self.found(keyspace, key, head)? {
                    visit(key, bytes)?;
                }
            }
            match page.last() {
                Some((key, _)) if page.len() == PAGE_ROWS => from = [&key[..], &[0]].concat(),
                _ => return Ok(()),
            }
        }
    }
}

/// A record among others, unless it can't be read. Every record was whole when it was written: what a store
/// damages it reports itself, but no store knows how deep the JSON is that a peer wrote.
fn readable<T: serde::de::DeserializeOwned>(
    bytes: &[u8],
    what: &str,
    of: &dyn std::fmt::Display,
) -> Option<T> {
    let read = from_json(bytes, what);
    read.inspect_err(|error| tracing::error!(%of, %error, "a record is left out: it can't be read")).ok()
}

/// Counts up when the keys of indexes change their form: stores of an earlier one are indexed
/// anew.
pub(crate) const INDEX_FORM: u8 = 2;
/// Bytes of a text, escaped, that an index orders by; a hash stands for the rest.
const INDEX_TEXT_BYTES_MAX: usize = 256;
/// Bytes of that hash.
const INDEX_HASH_BYTES: usize = 16;
/// Bytes of all values of an index entry. The workspace, the longest name of a type and the
/// longest id leave this much of a key.
const INDEX_VALUES_BYTES_MAX: usize = KEY_BYTES_MAX - 16 - NAME_BYTES_MAX - 2 - ID_BYTES_MAX;

/// Encodes the values of an index entry, or of the leading fields that a query binds, one after
/// the other; see [`index_value`]. What no key holds is left out: from there on entries stand in
/// the order of their ids, and whoever looks something up compares the row.
pub(crate) fn index_values<'a>(values: impl Iterator<Item = (&'a Field, &'a Json)>) -> Vec<u8> {
    let mut all = Vec::new();
    let mut one = Vec::new();
    for (field, value) in values {
        one.clear();
        index_value(field, value, &mut one);
        if all.len() + one.len() > INDEX_VALUES_BYTES_MAX {
            break;
        }
        all.extend_from_slice(&one);
    }
    all
}

/// Encodes a value so that byte order is value order within a field: null first, then the values.
/// Texts end with a zero pair, so that a prefix sorts before what it begins; long ones are cut
/// and end with a hash of the whole, so that equal encodings mean equal texts.
pub(crate) fn index_value(field: &Field, value: &Json, out: &mut Vec<u8>) {
    let FieldType::Scalar(ty) = &field.ty else { return };
    match (ty, value) {
        (_, Json::Null) => out.push(0),
        (ScalarType::Bool, Json::Bool(value)) => out.extend([1, u8::from(*value)]),
        (ScalarType::Int, Json::Number(n)) => push_int(whole(n), out),
        (ScalarType::Timestamp, Json::String(text)) => {
            push_int(timestamp_to_ms(text).unwrap_or_default(), out)
        }
        (ScalarType::Float, Json::Number(n)) => {
            // Adding zero turns -0.0 into 0.0, which it equals.
            let bits = (n.as_f64().unwrap_or_default() + 0.0).to_bits();
            let ordered = if bits >> 63 == 1 { !bits } else { bits | (1 << 63) };
            out.push(1);
            out.extend(ordered.to_be_bytes());
        }
        (_, Json::String(text)) => push_text(text, out),
        _ => out.push(0),
    }
}

fn push_text(text: &str, out: &mut Vec<u8>) {
    out.push(1);
    let start = out.len();
    for byte in text.bytes() {
        let escaped: &[u8] = if byte == 0 { &[0, 0xff] } else { &[byte] };
        if out.len() - start + escaped.len() > INDEX_TEXT_BYTES_MAX {
            let hash = blake3::hash(text.as_bytes());
            out.extend([0, 1]);
            out.extend_from_slice(&hash.as_bytes()[..INDEX_HASH_BYTES]);
            return;
        }
        out.extend_from_slice(escaped);
    }
    out.extend([0, 0]);
}

/// A number as the integer that it equals. What equals none is found by no integer.
fn whole(n: &serde_json::Number) -> i64 {
    n.as_i64().or_else(|| n.as_f64().map(|float| float as i64)).unwrap_or_default()
}

fn push_int(value: i64, out: &mut Vec<u8>) {
    out.push(1);
    out.extend(((value as u64) ^ (1 << 63)).to_be_bytes());
}

/// Keys of all index entries of a row, without the workspace.
pub(crate) fn index_keys(keys: &Keys, ty: &EntityType, entity: &EntityKey, row: &RowRecord) -> Vec<Vec<u8>> {
    if row.deleted {
        return Vec::new();
    }
    ty.indexes
        .iter()
        .enumerate()
        .map(|(number, fields)| {
            let mut key = keys.index(&ty.name, number as u8);
            let values = fields
                .iter()
                .filter_map(|name| Some((ty.fields.get(name)?, row.fields.get(name).unwrap_or(&Json::Null))));
            key.extend(index_values(values));
            key.extend_from_slice(entity.id().as_bytes());
            key
        })
        .collect()
}
