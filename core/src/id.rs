//! Names of workspaces, entities, devices, and the actors derived from them.

use std::fmt;

use automerge::ActorId;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;

/// Longest workspace, type or field name in bytes.
pub const NAME_BYTES_MAX: usize = 64;
/// Longest entity id in bytes.
pub const ID_BYTES_MAX: usize = 256;

/// Why a name is not one.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} {why}")]
pub struct NameError {
    what: &'static str,
    value: String,
    why: &'static str,
}

fn check(what: &'static str, value: &str, bytes_max: usize) -> Result<(), NameError> {
    let why = if value.is_empty() {
        "is empty; give it at least one character"
    } else if value.len() > bytes_max {
        "is too long (names: 64 bytes, entity ids: 256 bytes)"
    } else if value.chars().any(char::is_control) {
        "contains a control character; use printable characters"
    } else {
        return Ok(());
    };
    Err(NameError { what, value: value.chars().take(80).collect(), why })
}

/// The unit of access and replication.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkspaceId(String);

impl WorkspaceId {
    /// Checks and takes a name: 1–64 bytes, no control characters.
    pub fn new(name: impl Into<String>) -> Result<Self, NameError> {
        let name = name.into();
        check("workspace", &name, NAME_BYTES_MAX)?;
        Ok(Self(name))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for WorkspaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// An entity: a type and an id that is unique within it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntityKey {
    type_name: String,
    id: String,
}

impl EntityKey {
    /// Checks and takes a type name (1–64 bytes) and an id (1–256 bytes), both without
    /// control characters.
    pub fn new(type_name: impl Into<String>, id: impl Into<String>) -> Result<Self, NameError> {
        let (type_name, id) = (type_name.into(), id.into());
        check("type", &type_name, NAME_BYTES_MAX)?;
        check("id", &id, ID_BYTES_MAX)?;
        Ok(Self { type_name, id })
    }

    /// The type's name.
    pub fn type_name(&self) -> &str {
        &self.type_name
    }

    /// The id within the type.
    pub fn id(&self) -> &str {
        &self.id
    }
}

impl fmt::Display for EntityKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.type_name, self.id)
    }
}

/// A device's public ed25519 key, which is its identity.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceId(pub [u8; 32]);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&URL_SAFE_NO_PAD.encode(self.0))
    }
}

impl fmt::Debug for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceId({self})")
    }
}

/// Which life of a device wrote a change to an entity. The high half counts the lives of
/// the store (it grows when a roll-back, restore or clone was noticed), the low half the
/// rebuilds of the one entity. No (actor, seq) is ever used twice because of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// The newest life of a store that a relay believes in. Honest devices are at a few; of one at the end of
/// the numbers no later life could be told from it.
pub const STORE_LIFE_MAX: u32 = u32::MAX / 2;
/// How many lives the relay may know that a store has forgotten. A machine that is reset to the same image
/// every minute takes two years for these.
pub const STORE_LIVES_FORGOTTEN_MAX: u32 = 1 << 20;

impl Incarnation {
    /// From the two counts.
    pub fn new(store: u32, rebuilds: u32) -> Self {
        Self((u64::from(store) << 32) | u64::from(rebuilds))
    }

    /// The life of a store that begins when `known` turns out to be the newest that others know of it;
    /// `None` if that can't be: whoever says so could leave the device without a life of its own.
    pub fn next_store(own: u32, known: u32) -> Option<u32> {
        let forgotten = known.saturating_sub(own);
        let next = own.max(known).saturating_add(1);
        (forgotten <= STORE_LIVES_FORGOTTEN_MAX && next <= STORE_LIFE_MAX).then_some(next)
    }

    /// Which life of the store it is of.
    pub fn store(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// Who wrote a change: stored once per actor, in the footer of its first change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Author {
    /// The device.
    pub device: DeviceId,
    /// Its life.
    pub incarnation: Incarnation,
}

const AUTHOR_VERSION: u8 = 1;

impl Author {
    /// The stored form: version 1, key, incarnation (big-endian): 41 bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(41);
        bytes.push(AUTHOR_VERSION);
        bytes.extend_from_slice(&self.device.0);
        bytes.extend_from_slice(&self.incarnation.0.to_be_bytes());
        bytes
    }

    /// Reads the stored form; `None` if it is anything else.
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let rest = bytes.strip_prefix(&[AUTHOR_VERSION])?;
        let (device, incarnation) = rest.split_first_chunk::<32>()?;
        let incarnation: [u8; 8] = incarnation.try_into().ok()?;
        Some(Self { device: DeviceId(*device), incarnation: Incarnation(u64::from_be_bytes(incarnation)) })
    }

    /// The actor of this author in one entity: the first 16 bytes of
    /// blake3(workspace ‖ type ‖ id ‖ device ‖ incarnation), each name behind its length.
    /// It binds a change to its entity and device and costs no bytes on the wire.
    pub fn actor(&self, workspace: &WorkspaceId, entity: &EntityKey) -> ActorId {
        let mut hasher = blake3::Hasher::new_derive_key("anabranch 2026 actor v1");
        for part in [workspace.as_str(), entity.type_name(), entity.id()] {
            hasher.update(&(part.len() as u32).to_be_bytes());
            hasher.update(part.as_bytes());
        }
        hasher.update(&self.device.0);
        hasher.update(&self.incarnation.0.to_be_bytes());
        ActorId::from(&hasher.finalize().as_bytes()[..16])
    }
}

/// Storage and digest key of an entity within a workspace: 16 bytes of blake3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EntityHash(pub [u8; 16]);

impl EntityHash {
    /// The key of `entity` in `workspace`.
    pub fn of(workspace: &WorkspaceId, entity: &EntityKey) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("anabranch 2026 entity v1");
        for part in [workspace.as_str(), entity.type_name(), entity.id()] {
            hasher.update(&(part.len() as u32).to_be_bytes());
            hasher.update(part.as_bytes());
        }
        let mut short = [0; 16];
        short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(short)
    }
}
