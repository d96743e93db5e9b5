//! Where the relay keeps what: every key and every stored record, in one place.
//!
//! | keyspace | key | value |
//! |---|---|---|
//! | META | `relay` | [`RelayRecord`] |
//! | META | ws | [`WorkspaceRecord`]: feed end and digest, always of the same moment |
//! | ENTITY | ws ‖ entity | [`EntityRecord`], with the bytes of all changes since layout 3 |
//! | ENTITY | ws ‖ entity ‖ actor number (u32) | [`ActorRecord`] |
//! | HEADER | ws ‖ entity ‖ place (u32) | [`HeaderRecord`](crate::codec::HeaderRecord), with [`ChangeTargets`] since layout 2 |
//! | HEADER | ws ‖ entity ‖ place (u32) ‖ part (u32) | what such a record goes on with that is longer than a value, since layout 3 |
//! | REFUSED | ws ‖ entity ‖ change hash | [`RefusalRecord`] |
//! | REFUSED | ws ‖ entity ‖ device key ‖ origin | nothing: a change that makes this edit again was admitted |
//! | DEVICE | ws ‖ device key | [`DeviceRecord`] |
//! | FEED | ws ‖ seq (u64) ‖ part (u32) | [`FeedRecord`](super::feed::FeedRecord), split |
//! | GRANT | ws ‖ `0` ‖ device key | [`Grant`](crate::wire::Grant), as on the wire |
//! | GRANT | ws ‖ `1` ‖ blake3 of a token id | [`UsedTokenRecord`] |
//! | SCHEMA | ws | [`SchemaRecord`] |
//! | SCHEMA | ws ‖ part (u32) | the schema's text, split |
//!
//! *ws* is 16 bytes of blake3 over the workspace's name, *entity* an
//! [`EntityHash`](crate::id::EntityHash); numbers are big-endian. The heads of an entity are
//! not stored: they follow from its headers, which are needed whenever the heads are.

use bincode::{Decode, Encode};

use crate::change::Origin;
use crate::codec::{self, HeaderRecord};
use crate::header::Header;
use crate::id::{DeviceId, EntityHash, WorkspaceId};
use crate::store::{Batch, Entry, Keyspace, StoreError};
use crate::targets::ChangeTargets;

/// Version of this layout.
pub(super) const LAYOUT_VERSION: u32 = 3;
/// Version of the records of headers.
const HEADER_VERSION: u8 = 2;
/// Version of the records of entities.
const ENTITY_VERSION: u8 = 2;
/// Key of the [`RelayRecord`]. Never 16 bytes long, as a workspace's key is.
pub(super) const RELAY_KEY: &[u8] = b"relay";

/// What every key of a workspace begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct WorkspaceHash(pub(super) [u8; 16]);

impl WorkspaceHash {
    pub(super) fn of(workspace: &WorkspaceId) -> Self {
        let hash = blake3::derive_key("anabranch 2026 workspace v1", workspace.as_str().as_bytes());
        let mut short = [0; 16];
        short.copy_from_slice(&hash[..16]);
        Self(short)
    }

    fn key(self, parts: &[&[u8]]) -> Vec<u8> {
        let mut key = self.0.to_vec();
        parts.iter().for_each(|part| key.extend_from_slice(part));
        key
    }

    pub(super) fn entity(self, entity: EntityHash) -> Vec<u8> {
        self.key(&[&entity.0])
    }

    pub(super) fn numbered(self, entity: EntityHash, number: u32) -> Vec<u8> {
        self.key(&[&entity.0, &number.to_be_bytes()])
    }

    pub(super) fn refusal(self, entity: EntityHash, change: &[u8; 32]) -> Vec<u8> {
        self.key(&[&entity.0, change])
    }

    pub(super) fn made_again(self, entity: EntityHash, device: DeviceId, origin: Origin) -> Vec<u8> {
        self.key(&[&entity.0, &device.0, &origin.0])
    }

    pub(super) fn device(self, device: DeviceId) -> Vec<u8> {
        self.key(&[&device.0])
    }

    /// The key that the parts of a feed entry share.
    pub(super) fn feed(self, seq: u64) -> Vec<u8> {
        self.key(&[&seq.to_be_bytes()])
    }

    pub(super) fn grant(self, device: DeviceId) -> Vec<u8> {
        self.key(&[&[0], &device.0])
    }

    pub(super) fn used_token(self, token_id: &str) -> Vec<u8> {
        self.key(&[&[1], blake3::hash(token_id.as_bytes()).as_bytes()])
    }
}

/// Puts the record of a header with where its change acted, which takes a few bytes for each time that it
/// goes to another place: where that is longer than a value, it goes on at keys behind its own.
pub(super) fn put_header(batch: &mut Batch, key: &[u8], header: &Header, targets: ChangeTargets) {
    let record = codec::encode_as(HEADER_VERSION, &(HeaderRecord::from(header), targets));
    for (part, bytes) in record.chunks(codec::PART_BYTES).enumerate() {
        let mut key = key.to_vec();
        if part > 0 {
            key.extend_from_slice(&(part as u32).to_be_bytes());
        }
        batch.put(Keyspace::HEADER, key, bytes);
    }
}

/// Puts the records of headers together from what is found in their order. `None` where a part is missing.
pub(super) fn join_headers(found: Vec<Entry>) -> Option<Vec<Vec<u8>>> {
    const KEY_BYTES: usize = size_of::<WorkspaceHash>() + size_of::<EntityHash>() + size_of::<u32>();
    let mut records: Vec<Vec<u8>> = Vec::with_capacity(found.len());
    let mut next: Option<(Vec<u8>, u32)> = None;
    for (key, bytes) in found {
        if key.len() == KEY_BYTES {
            next = Some((key, 1));
            records.push(bytes);
            continue;
        }
        let (begun, part) = next.as_mut()?;
        if key.strip_prefix(&begun[..])? != part.to_be_bytes() {
            return None;
        }
        *part += 1;
        records.last_mut()?.extend(bytes);
    }
    Some(records)
}

/// Reads the record of a header; before layout 2 it did not say where its change acted.
pub(super) fn decode_header(bytes: &[u8]) -> Result<(Header, Option<ChangeTargets>), StoreError> {
    if bytes.first() == Some(&HEADER_VERSION) {
        let (header, targets): (HeaderRecord, ChangeTargets) =
            codec::decode_as(HEADER_VERSION, bytes, "a header")?;
        return Ok((header.into(), Some(targets)));
    }
    codec::decode::<HeaderRecord>(bytes, "a header").map(|header| (header.into(), None))
}

/// The record of an entity with the bytes of all its changes.
pub(super) fn encode_entity(record: EntityRecord, bytes: u64) -> Vec<u8> {
    codec::encode_as(ENTITY_VERSION, &(record, bytes))
}

/// Reads the record of an entity; before layout 3 it did not say how many bytes its changes have, and only
/// those are counted that came since.
pub(super) fn decode_entity(bytes: &[u8]) -> Result<(EntityRecord, u64), StoreError> {
    const WHAT: &str = "the record of an entity";
    if bytes.first() == Some(&ENTITY_VERSION) {
        return codec::decode_as(ENTITY_VERSION, bytes, WHAT);
    }
    codec::decode(bytes, WHAT).map(|record| (record, 0))
}

/// Takes the key of a part of a feed entry apart: (seq, part).
pub(super) fn feed_place(key: &[u8]) -> Option<(u64, u32)> {
    let (seq, part) = key.get(16..)?.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*seq), u32::from_be_bytes(part.try_into().ok()?)))
}

#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct RelayRecord {
    /// [`LAYOUT_VERSION`] of the program that wrote the store last.
    pub(super) layout: u32,
    /// The life of all feeds. Replaced when the store is restored from a backup.
    pub(super) epoch: [u8; 16],
}

#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct WorkspaceRecord {
    pub(super) name: String,
    pub(super) feed_end: u64,
    /// The digest at `feed_end`.
    pub(super) digest: [u8; 32],
    /// Serial of the newest grant.
    pub(super) serial: u64,
}

#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct EntityRecord {
    pub(super) type_name: String,
    pub(super) id: String,
    /// Containers that devices named while no schema was known, as (field, kind).
    pub(super) genesis: Vec<(String, u8)>,
    pub(super) changes: u32,
    pub(super) actors: u32,
}

#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct ActorRecord {
    pub(super) actor: Vec<u8>,
    pub(super) author: Vec<u8>,
}

#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct RefusalRecord {
    pub(super) code: u16,
    pub(super) message: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub(super) struct DeviceRecord {
    pub(super) name: String,
    pub(super) platform: String,
    /// The newest life of the device's store that was seen.
    pub(super) incarnation: u32,
    /// How many changes that life had sent, by its own count.
    pub(super) sent: u64,
}

impl DeviceRecord {
    /// Whether people see the device as the same.
    pub(super) fn is_called_as(&self, other: &Self) -> bool {
        (&self.name, &self.platform) == (&other.name, &other.platform)
    }
}

#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct UsedTokenRecord {
    /// The first device that used it, and the only one that may.
    pub(super) device: [u8; 32],
}

#[derive(Clone, Debug, Encode, Decode)]
pub(super) struct SchemaRecord {
    pub(super) hash: [u8; 32],
    pub(super) parts: u32,
}
