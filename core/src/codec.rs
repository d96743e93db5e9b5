//! The one codec of the store: versioned, bounded, and apart from live state.
//!
//! A record is one byte of version and a bincode body, never longer than
//! [`RECORD_BYTES_MAX`]. Values above [`VALUE_BYTES_MAX`] are
//! split over several keys by [`put_large`].

use bincode::{Decode, Encode};

use crate::change::{Role, TxMark};
use crate::clock::Hlc;
use crate::header::Header;
use crate::store::{Batch, Keyspace, Store, StoreError, VALUE_BYTES_MAX, View};

/// Largest record in bytes.
pub const RECORD_BYTES_MAX: usize = 64 * 1024 * 1024;
const VERSION: u8 = 1;
/// Bytes of one part of a large value, below the store's bound with room for checksums.
pub(crate) const PART_BYTES: usize = VALUE_BYTES_MAX - 1024;
/// Largest value that is split: a text of control characters takes six times its bytes in a row.
pub const LARGE_BYTES_MAX: usize = 8 * RECORD_BYTES_MAX;
/// Most parts of a value; a record that names more is damaged.
pub const PARTS_MAX: u32 = (LARGE_BYTES_MAX / PART_BYTES) as u32 + 1;

/// The record of `value`.
pub fn encode(value: &impl Encode) -> Vec<u8> {
    encode_as(VERSION, value)
}

/// The record of `value`, of a kind that has changed since version 1.
pub fn encode_as(version: u8, value: &impl Encode) -> Vec<u8> {
    let mut bytes = vec![version];
    // Encoding to memory has no way to fail but a type without a form; ours all have one.
    if let Ok(body) = bincode::encode_to_vec(value, bincode::config::standard()) {
        bytes.extend(body);
    }
    bytes
}

/// Reads a record. `what` names it where it is damaged.
pub fn decode<T: Decode<()>>(bytes: &[u8], what: &str) -> Result<T, StoreError> {
    decode_as(VERSION, bytes, what)
}

/// Reads a record of a version, or says that it is newer.
pub fn decode_as<T: Decode<()>>(known: u8, bytes: &[u8], what: &str) -> Result<T, StoreError> {
    let damaged = |how: &str| StoreError::Damaged { what: format!("{what} {how}") };
    let (version, body) = bytes.split_first().ok_or_else(|| damaged("is empty"))?;
    if *version > known {
        return Err(StoreError::NewerFormat { found: u32::from(*version), supported: u32::from(known) });
    }
    let config = bincode::config::standard().with_limit::<RECORD_BYTES_MAX>();
    match bincode::decode_from_slice(body, config) {
        Ok((value, read)) if read == body.len() => Ok(value),
        Ok(_) => Err(damaged("is longer than it should be")),
        Err(_) => Err(damaged("can't be decoded")),
    }
}

/// Puts a value of any size under `key` ‖ part number, and removes the parts that an earlier,
/// longer value of `parts_before` parts had. Returns the number of parts.
pub fn put_large(batch: &mut Batch, keyspace: Keyspace, key: &[u8], value: &[u8], parts_before: u32) -> u32 {
    let parts = value.chunks(PART_BYTES).len().max(1) as u32;
    for (part, chunk) in value.chunks(PART_BYTES).enumerate() {
        batch.put(keyspace, part_key(key, part as u32), chunk);
    }
    if value.is_empty() {
        batch.put(keyspace, part_key(key, 0), Vec::new());
    }
    delete_parts(batch, keyspace, key, parts..parts_before);
    parts
}

/// Reads what [`put_large`] wrote in `parts` parts.
pub fn get_large(
    store: &dyn Store,
    view: View,
    keyspace: Keyspace,
    key: &[u8],
    parts: u32,
) -> Result<Vec<u8>, StoreError> {
    let mut value = Vec::new();
    for part in 0..parts {
        let chunk = store.get(view, keyspace, &part_key(key, part))?.ok_or_else(|| StoreError::Damaged {
            what: format!("part {part} of {parts} of a value in keyspace {} is missing", keyspace.0),
        })?;
        value.extend_from_slice(&chunk);
    }
    Ok(value)
}

/// Removes parts of a large value.
pub fn delete_parts(batch: &mut Batch, keyspace: Keyspace, key: &[u8], parts: std::ops::Range<u32>) {
    for part in parts {
        batch.delete(keyspace, part_key(key, part));
    }
}

fn part_key(key: &[u8], part: u32) -> Vec<u8> {
    let mut full = key.to_vec();
    full.extend_from_slice(&part.to_be_bytes());
    full
}

/// A [`Header`] as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct HeaderRecord {
    hash: [u8; 32],
    actor: u32,
    seq: u64,
    time: u64,
    max_op: u64,
    /// Bit 0: authority. Bit 1: revives. Bit 2: admitted.
    flags: u8,
    tx: Option<([u8; 16], u32)>,
    deps: Vec<u32>,
}

impl From<&Header> for HeaderRecord {
    fn from(header: &Header) -> Self {
        let flag = |on: bool, bit: u8| if on { 1 << bit } else { 0 };
        Self {
            hash: header.hash.0,
            actor: header.actor,
            seq: header.seq,
            time: header.time.to_u64(),
            max_op: header.max_op,
            flags: flag(header.role == Role::Authority, 0)
                | flag(header.revives, 1)
                | flag(header.admitted, 2),
            tx: header.tx.map(|tx| (tx.id, tx.members)),
            deps: header.deps.clone(),
        }
    }
}

impl From<HeaderRecord> for Header {
    fn from(record: HeaderRecord) -> Self {
        Self {
            hash: automerge::ChangeHash(record.hash),
            actor: record.actor,
            seq: record.seq,
            time: Hlc::from_u64(record.time),
            max_op: record.max_op,
            role: if record.flags & 1 != 0 { Role::Authority } else { Role::Device },
            revives: record.flags & 2 != 0,
            admitted: record.flags & 4 != 0,
            tx: record.tx.map(|(id, members)| TxMark { id, members }),
            deps: record.deps,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A row of 70 MiB was written, and was damage to whoever read it.
    #[test]
    fn what_is_written_in_parts_has_no_more_than_are_read() {
        let mut batch = Batch::new();
        let parts = put_large(&mut batch, Keyspace::SPILL, b"key", &vec![0; 70 << 20], 0);
        assert_eq!(batch.ops().len(), parts as usize);
        assert!(parts <= PARTS_MAX && LARGE_BYTES_MAX.div_ceil(PART_BYTES) <= PARTS_MAX as usize);
    }

    #[test]
    fn records_read_back_and_damage_is_named() {
        let record = (7u32, String::from("seven"));
        let bytes = encode(&record);
        assert_eq!(decode::<(u32, String)>(&bytes, "a record").unwrap(), record);
        for end in 0..bytes.len() {
            assert!(decode::<(u32, String)>(&bytes[..end], "a record").is_err());
        }
        let mut newer = bytes;
        newer[0] = VERSION + 1;
        assert!(matches!(decode::<(u32, String)>(&newer, "a record"), Err(StoreError::NewerFormat { .. })));
        let hostile = [VERSION, 253, 255, 255, 255, 255, 255, 255, 255, 127];
        assert!(decode::<Vec<u8>>(&hostile, "a record").is_err());
    }
}
