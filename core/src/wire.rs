//! What two ends of a link say to each other, and the one codec of the wire.
//!
//! A message is `[kind][flags][body]`. Bit 0 of the flags marks a message that the receiver
//! must understand: an unknown kind with it set ends the session with a reason, without it
//! the message is skipped. Bit 1 marks a zstd-compressed body. Fields that a later version
//! appends to a body are ignored by an older reader. Every decode is bounded.

use bincode::de::Decoder;
use bincode::error::DecodeError;
use bincode::{Decode, Encode};

use crate::change;

/// Protocol versions that this program speaks.
pub const VERSION_MIN: u16 = 1;
/// See [`VERSION_MIN`].
pub const VERSION_MAX: u16 = 1;
/// Largest message in bytes, compressed or not.
pub const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Largest message of a device that has not signed in, in bytes, compressed or not.
pub const STRANGER_BYTES_MAX: usize = 64 * 1024;
/// What a decoded message may take in memory, in bytes: what its lists hold and what it took on the
/// wire, together. A list of empty texts takes 24 times as much in memory as on the wire.
pub const DECODED_BYTES_MAX: usize = 4 * MESSAGE_BYTES_MAX;
/// Largest unit in bytes of changes; a larger transaction is refused when it is written.
pub const UNIT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most that the changes of a unit weigh together, in bytes: see
/// [`Change::weight`](crate::change::Change::weight).
pub const UNIT_WEIGHT_MAX: usize = 48 * 1024 * 1024;
/// Most bytes of all changes of an entity; those beyond are refused for good.
pub const ENTITY_BYTES_MAX: usize = 48 * 1024 * 1024;
/// Most entities of a unit.
pub const UNIT_ENTITIES_MAX: usize = 10_000;
/// Most changes of a unit.
const UNIT_CHANGES_MAX: usize = 20_000;
/// Largest answer or feed entry that a unit can lead to, so that both fit a message.
const DERIVED_BYTES_MAX: usize = MESSAGE_BYTES_MAX - 1024 * 1024;
/// By how much a change grows when it is made again, with room to spare: it says of which edit it is, may be
/// the first of its actor, and names the earlier actors of the device whose values it replaces.
const MADE_AGAIN_BYTES: usize = 128;
/// Bodies larger than this are compressed if it helps.
const COMPRESS_OVER_BYTES: usize = 256;

const FLAG_REQUIRED: u8 = 1;
const FLAG_ZSTD: u8 = 2;

/// Reads a list. What its items take in memory stays claimed: the limit is on that too, and not on
/// the bytes of the wire alone.
fn list<T: Decode<C>, C, D: Decoder<Context = C>>(decoder: &mut D) -> Result<Vec<T>, DecodeError> {
    let length = u64::decode(decoder)?;
    let length = usize::try_from(length).map_err(|_| DecodeError::OutsideUsizeRange(length))?;
    decoder.claim_container_read::<T>(length)?;
    let mut list = Vec::with_capacity(length);
    for _ in 0..length {
        list.push(T::decode(decoder)?);
    }
    Ok(list)
}

/// Decodes fields in order, those in brackets as a [`list`].
macro_rules! decode_lists {
    ($name:ident { $($field:tt),* }) => {
        impl<C> Decode<C> for $name {
            fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
                decode_lists!(@ decoder, $name {} $($field)*)
            }
        }

        bincode::impl_borrow_decode!($name);
    };
    (@ $decoder:ident, $name:ident { $($done:tt)* }) => { Ok($name { $($done)* }) };
    (@ $decoder:ident, $name:ident { $($done:tt)* } [$field:ident] $($rest:tt)*) => {
        decode_lists!(@ $decoder, $name { $($done)* $field: list($decoder)?, } $($rest)*)
    };
    (@ $decoder:ident, $name:ident { $($done:tt)* } $field:ident $($rest:tt)*) => {
        decode_lists!(@ $decoder, $name { $($done)* $field: Decode::decode($decoder)?, } $($rest)*)
    };
}

/// A channel within a connection: one workspace.
pub type Channel = u32;

/// A 32-byte change hash.
pub type Hash = [u8; 32];

/// The first message of the device.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Hello {
    /// Least version spoken.
    pub version_min: u16,
    /// Greatest version spoken.
    pub version_max: u16,
    /// Name and version of the software.
    pub software: String,
    /// The device's wall clock in milliseconds since 1970.
    pub wall_ms: u64,
    /// Features that the other end must have.
    pub features_required: u64,
    /// Features offered.
    pub features: u64,
    /// Proof of the device key over the TLS exporter, for links whose TLS does not carry the
    /// key. Empty where TLS did.
    pub proof: Vec<u8>,
}

/// The relay's answer to [`Hello`].
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Welcome {
    /// The version that both will speak.
    pub version: u16,
    /// Name and version of the software.
    pub software: String,
    /// The relay's wall clock in milliseconds since 1970.
    pub wall_ms: u64,
    /// Features that the other end must have.
    pub features_required: u64,
    /// Features offered.
    pub features: u64,
}

/// Asks for access to a workspace.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct SignIn {
    /// The channel that will carry the workspace.
    pub channel: Channel,
    /// The workspace.
    pub workspace: String,
    /// A token, unless the device relies on the grant that it already has.
    pub token: Option<String>,
    /// What people call the device.
    pub device_name: String,
    /// Its operating system.
    pub platform: String,
    /// Which life of the device's store this is.
    pub incarnation: u32,
    /// How many changes this life of the store had sent, by its own count.
    pub sent: u64,
}

/// What the relay grants.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Granted {
    /// The channel.
    pub channel: Channel,
    /// The grant, as the relay stores it: see [`Grant`].
    pub grant: Grant,
    /// Hash of the workspace's schema, zeros where none was pushed.
    pub schema: Hash,
    /// The store went back: the relay has seen more of this life than the device knows. The
    /// device must start a new incarnation.
    pub behind: bool,
    /// The newest incarnation of the device that the relay has seen. A new one is above it: a copy
    /// of the store may have begun one too.
    pub incarnation: u32,
    /// The life of the relay's feed. Cursors of another epoch mean nothing.
    pub epoch: [u8; 16],
}

/// A stored right to act in a workspace. The same bytes become the body of a device
/// certificate.
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub struct Grant {
    /// The workspace.
    pub workspace: String,
    /// The device's key.
    pub device: [u8; 32],
    /// Whose device it is.
    pub user: String,
    /// `reader`, `writer`, `authority` or `admin`, as [`GrantRole`].
    pub role: u8,
    /// Types that the device may see; empty means all.
    pub types: Vec<String>,
    /// From when it holds, milliseconds since 1970.
    pub not_before_ms: u64,
    /// Until when it holds, milliseconds since 1970.
    pub not_after_ms: u64,
    /// Grows by one with each grant of the workspace.
    pub serial: u64,
}

decode_lists!(Grant { workspace, device, user, role, [types], not_before_ms, not_after_ms, serial });

/// What a grant allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum GrantRole {
    /// Reads.
    Reader,
    /// Reads and writes as a person's device.
    Writer,
    /// Reads and writes as the app's backend.
    Authority,
    /// Like a writer, and manages the workspace: pushes schemas.
    Admin,
}

impl GrantRole {
    /// Its number.
    pub fn code(self) -> u8 {
        match self {
            GrantRole::Reader => 1,
            GrantRole::Writer => 2,
            GrantRole::Authority => 3,
            GrantRole::Admin => 4,
        }
    }

    /// From its number.
    pub fn from_code(code: u8) -> Option<Self> {
        [Self::Reader, Self::Writer, Self::Authority, Self::Admin].into_iter().find(|r| r.code() == code)
    }

    /// Its name in tokens and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            GrantRole::Reader => "reader",
            GrantRole::Writer => "writer",
            GrantRole::Authority => "authority",
            GrantRole::Admin => "admin",
        }
    }

    /// From its name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Reader, Self::Writer, Self::Authority, Self::Admin].into_iter().find(|r| r.name() == name)
    }
}

/// Asks for the feed from a cursor on.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Open {
    /// The channel.
    pub channel: Channel,
    /// The feed's epoch as the device knows it; zeros at first.
    pub epoch: [u8; 16],
    /// The last entry that the device has.
    pub cursor: u64,
    /// The device's digest of what the relay admitted up to there.
    pub digest: Hash,
    /// Send the device's own changes in full too: it lost them.
    pub full: bool,
}

/// Changes of one entity.
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub struct EntityChanges {
    /// The entity's type.
    pub type_name: String,
    /// Its id.
    pub id: String,
    /// Containers whose genesis changes these depend on directly, as (field, kind), so that a
    /// receiver with an older schema can make them too.
    pub genesis: Vec<(String, u8)>,
    /// The changes in causal order, plain bytes.
    pub changes: Vec<Vec<u8>>,
    /// For a signature over the author's newest change. Empty in version 1.
    pub signature: Vec<u8>,
}

decode_lists!(EntityChanges { type_name, id, [genesis], [changes], signature });

/// Changes that are shown together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode)]
pub struct Unit {
    /// By entity.
    pub entities: Vec<EntityChanges>,
}

decode_lists!(Unit { [entities] });

/// What a unit counts, for the limits that the relay and those who write for it hold it to.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct UnitSize {
    entities: usize,
    changes: usize,
    weight: u64,
    /// Of changes alone.
    change_bytes: usize,
    /// With names, and room for hashes, lengths and what the store keeps beside.
    unit_bytes: usize,
    /// Of an answer that refuses all of it.
    answer_bytes: usize,
}

/// A limit of units that is exceeded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitLimit {
    /// What there is too much of.
    pub what: &'static str,
    /// How much there is.
    pub got: u64,
    /// How much there may be.
    pub max: u64,
}

impl std::fmt::Display for UnitLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}, at most {} are allowed", self.got, self.what, self.max)
    }
}

impl UnitSize {
    pub(crate) fn of(unit: &Unit) -> Self {
        let mut size = Self::default();
        unit.entities.iter().for_each(|part| size.add(part));
        size
    }

    /// What the changes weigh, in bytes: see [`Change::weight`](crate::change::Change::weight).
    pub(crate) fn weight(&self) -> u64 {
        self.weight
    }

    /// How much of that is more than their bytes.
    pub(crate) fn hidden(&self) -> u64 {
        self.weight.saturating_sub(self.change_bytes as u64)
    }

    /// Counts an entity.
    pub(crate) fn add(&mut self, part: &EntityChanges) {
        let bytes: usize = part.changes.iter().map(Vec::len).sum();
        let name_bytes = part.type_name.len() + part.id.len();
        let named_bytes: usize = part.genesis.iter().map(|(field, _)| field.len() + 4).sum();
        self.entities += 1;
        self.changes += part.changes.len();
        self.change_bytes += bytes;
        self.unit_bytes +=
            bytes + name_bytes + part.signature.len() + 40 * part.changes.len() + 16 + named_bytes;
        self.answer_bytes += part.changes.len() * (name_bytes + 48);
        self.weight += part.changes.iter().map(|bytes| change::weight(bytes) as u64).sum::<u64>();
    }

    /// The same after every change was made again.
    pub(crate) fn made_again(self) -> Self {
        let more = MADE_AGAIN_BYTES * self.changes;
        Self {
            change_bytes: self.change_bytes + more,
            unit_bytes: self.unit_bytes + more,
            weight: self.weight + more as u64,
            ..self
        }
    }

    /// The first limit that is exceeded.
    pub(crate) fn exceeds(&self) -> Option<UnitLimit> {
        [
            ("entities", self.entities as u64, UNIT_ENTITIES_MAX as u64),
            ("changes", self.changes as u64, UNIT_CHANGES_MAX as u64),
            ("bytes as its operations are counted", self.weight, UNIT_WEIGHT_MAX as u64),
            ("bytes of changes", self.change_bytes as u64, UNIT_BYTES_MAX as u64),
            ("bytes with names and containers", self.unit_bytes as u64, DERIVED_BYTES_MAX as u64),
            ("bytes to answer with", self.answer_bytes as u64, DERIVED_BYTES_MAX as u64),
        ]
        .into_iter()
        .find(|(_, got, max)| got > max)
        .map(|(what, got, max)| UnitLimit { what, got, max })
    }
}

/// A unit on its way to the relay.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Changes {
    /// The channel.
    pub channel: Channel,
    /// The sender's name for the unit, echoed in the [`Ack`].
    pub unit_id: u64,
    /// How many changes this life of the store has sent, these included.
    pub sent: u64,
    /// What changed.
    pub unit: Unit,
}

/// One refused change.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Refused {
    /// Its entity's type.
    pub type_name: String,
    /// Its entity's id.
    pub id: String,
    /// The change.
    pub hash: Hash,
    /// A [`RefusalCode`](crate::admission::RefusalCode).
    pub code: u16,
    /// For people.
    pub message: String,
}

/// The relay's durable answer to one unit: what is not refused is stored.
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub struct Ack {
    /// The channel.
    pub channel: Channel,
    /// The unit.
    pub unit_id: u64,
    /// The newest feed entry of the unit.
    pub seq: u64,
    /// What was refused, each for itself.
    pub refused: Vec<Refused>,
}

decode_lists!(Ack { channel, unit_id, seq, [refused] });

/// Something that happened in a workspace.
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub enum FeedBody {
    /// Changes of another device.
    Changes {
        /// Who wrote them.
        author: [u8; 32],
        /// What changed.
        unit: Unit,
    },
    /// The receiver's own changes, by (type, id, hashes).
    Own(Vec<(String, String, Vec<Hash>)>),
    /// A change that was refused for good.
    Refused(Refused),
    /// A device signed in for the first time, or changed its name.
    Device {
        /// Its key.
        key: [u8; 32],
        /// Its name.
        name: String,
        /// Its operating system.
        platform: String,
    },
    /// A schema was pushed.
    Schema {
        /// Its hash.
        hash: Hash,
    },
}

impl<C> Decode<C> for FeedBody {
    fn decode<D: Decoder<Context = C>>(decoder: &mut D) -> Result<Self, DecodeError> {
        Ok(match u32::decode(decoder)? {
            0 => FeedBody::Changes { author: Decode::decode(decoder)?, unit: Decode::decode(decoder)? },
            1 => FeedBody::Own(list(decoder)?),
            2 => FeedBody::Refused(Decode::decode(decoder)?),
            3 => FeedBody::Device {
                key: Decode::decode(decoder)?,
                name: Decode::decode(decoder)?,
                platform: Decode::decode(decoder)?,
            },
            4 => FeedBody::Schema { hash: Decode::decode(decoder)? },
            _ => return Err(DecodeError::Other("no entry of a feed")),
        })
    }
}

bincode::impl_borrow_decode!(FeedBody);

/// An entry of the feed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FeedEntry {
    /// Its place: gap-free from 1.
    pub seq: u64,
    /// What happened.
    pub body: FeedBody,
}

/// A page of the feed.
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub struct Feed {
    /// The channel.
    pub channel: Channel,
    /// Entries in order.
    pub entries: Vec<FeedEntry>,
    /// The newest entry of the whole feed, for progress.
    pub end: u64,
}

decode_lists!(Feed { channel, [entries], end });

/// Everything up to the cursor was sent.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct CaughtUp {
    /// The channel.
    pub channel: Channel,
    /// The feed's epoch.
    pub epoch: [u8; 16],
    /// The newest entry.
    pub cursor: u64,
    /// The relay's digest there.
    pub digest: Hash,
}

/// Pushes a schema. Admins and authorities only.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct PushSchema {
    /// The channel.
    pub channel: Channel,
    /// The schema file's text.
    pub source: String,
}

/// The answer to [`PushSchema`] and [`FetchSchema`].
#[derive(Clone, Debug, PartialEq, Eq, Encode)]
pub struct SchemaIs {
    /// The channel.
    pub channel: Channel,
    /// Hash of the workspace's schema, zeros where there is none.
    pub hash: Hash,
    /// Its text, where it was asked for.
    pub source: Option<String>,
    /// Why the push was refused; empty where it was taken.
    pub problems: Vec<String>,
}

decode_lists!(SchemaIs { channel, hash, source, [problems] });

/// Asks for the workspace's schema.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FetchSchema {
    /// The channel.
    pub channel: Channel,
}

/// A new token for a channel that is open.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Refresh {
    /// The channel.
    pub channel: Channel,
    /// The token.
    pub token: String,
}

/// Why something was not done.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Fault {
    /// The channel; none where it concerns the whole connection.
    pub channel: Option<Channel>,
    /// A [`FaultCode`].
    pub code: u16,
    /// For people.
    pub message: String,
}

/// Kinds of [`Fault`]. The numbers go over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
#[non_exhaustive]
pub enum FaultCode {
    /// No version in common, or a required feature is missing.
    Incompatible = 1,
    /// A message that the protocol does not allow here.
    Protocol = 2,
    /// The token can't be read or its signature is wrong.
    TokenInvalid = 3,
    /// The token or grant has expired.
    TokenExpired = 4,
    /// A single-use token was used by another device.
    TokenUsed = 5,
    /// The token is for another workspace.
    WrongWorkspace = 6,
    /// Neither a token nor a grant.
    NotSignedIn = 7,
    /// The device was revoked.
    Revoked = 8,
    /// The role does not allow it.
    Forbidden = 9,
    /// The workspace has no schema yet.
    SchemaMissing = 10,
    /// A limit was reached.
    Quota = 11,
    /// The relay failed.
    Internal = 12,
    /// The relay is shutting down.
    ShuttingDown = 13,
    /// The relay's disk is full. What was sent is not stored; sent again later it may be.
    NoSpace = 14,
}

impl FaultCode {
    /// From its number.
    pub fn from_u16(code: u16) -> Option<Self> {
        use FaultCode::*;
        [
            Incompatible,
            Protocol,
            TokenInvalid,
            TokenExpired,
            TokenUsed,
            WrongWorkspace,
            NotSignedIn,
            Revoked,
            Forbidden,
            SchemaMissing,
            Quota,
            Internal,
            ShuttingDown,
            NoSpace,
        ]
        .into_iter()
        .find(|known| *known as u16 == code)
    }

    /// The name that programs see.
    pub fn name(self) -> &'static str {
        match self {
            FaultCode::Incompatible => "incompatible",
            FaultCode::Protocol => "protocol",
            FaultCode::TokenInvalid => "token_invalid",
            FaultCode::TokenExpired => "token_expired",
            FaultCode::TokenUsed => "token_used",
            FaultCode::WrongWorkspace => "wrong_workspace",
            FaultCode::NotSignedIn => "not_signed_in",
            FaultCode::Revoked => "revoked",
            FaultCode::Forbidden => "forbidden",
            FaultCode::SchemaMissing => "schema_missing",
            FaultCode::Quota => "quota",
            FaultCode::Internal => "internal",
            FaultCode::ShuttingDown => "shutting_down",
            FaultCode::NoSpace => "no_space",
        }
    }

    /// Whether the same may succeed later with nothing changed but time.
    pub fn is_retryable(self) -> bool {
        matches!(self, FaultCode::Quota | FaultCode::Internal | FaultCode::ShuttingDown | FaultCode::NoSpace)
    }

    /// Whether signing in again is what helps.
    pub fn is_auth(self) -> bool {
        matches!(
            self,
            FaultCode::TokenInvalid
                | FaultCode::TokenExpired
                | FaultCode::TokenUsed
                | FaultCode::WrongWorkspace
                | FaultCode::NotSignedIn
                | FaultCode::Revoked
                | FaultCode::Forbidden
        )
    }
}

/// Why bytes are no message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than a message may be.
    #[error("a message of {0} bytes is longer than {MESSAGE_BYTES_MAX}")]
    TooLarge(usize),
    /// Not what this kind of message looks like.
    #[error("the message can't be decoded: {0}")]
    Malformed(&'static str),
    /// A message that must be understood and is not.
    #[error("message kind {0} is required but not known here; update this software")]
    UnknownRequired(u8),
}

/// Who sends a kind of message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Sender {
    /// The relay.
    Relay,
    /// A device that has signed in.
    Member,
    /// Any device: it may not know yet that it could not sign in.
    Anyone,
}

macro_rules! messages {
    ($($(#[$doc:meta])* $code:literal $name:ident from $sender:ident,)*) => {
        /// Any message.
        #[derive(Clone, Debug, PartialEq, Eq)]
        pub enum Message {
            $($(#[$doc])* $name($name),)*
        }

        $(impl From<$name> for Message {
            fn from(body: $name) -> Self {
                Message::$name(body)
            }
        })*

        impl Message {
            /// The bytes to send.
            pub fn encode(&self) -> Vec<u8> {
                match self {
                    $(Message::$name(body) => encode($code, body),)*
                }
            }

            /// Who sends such a message, by its kind alone; none if the kind is not known.
            pub(crate) fn sender(bytes: &[u8]) -> Option<Sender> {
                match bytes.first()? {
                    $($code => Some(Sender::$sender),)*
                    _ => None,
                }
            }

            /// How long a message is without compression, by its own word, which is held against it when
            /// it is read.
            pub fn plain_bytes(bytes: &[u8]) -> usize {
                match bytes {
                    [_, flags, a, b, c, d, ..] if flags & FLAG_ZSTD != 0 => {
                        u32::from_le_bytes([*a, *b, *c, *d]) as usize
                    }
                    _ => bytes.len(),
                }
            }

            /// Reads the bytes of one message. `None` is a message that may be skipped.
            pub fn decode(bytes: &[u8]) -> Result<Option<Self>, WireError> {
                if bytes.len() > MESSAGE_BYTES_MAX {
                    return Err(WireError::TooLarge(bytes.len()));
                }
                let [kind, flags, body @ ..] = bytes else {
                    return Err(WireError::Malformed("shorter than its header"));
                };
                match kind {
                    $($code => Ok(Some(Message::$name(decode(*flags, body)?))),)*
                    _ if flags & FLAG_REQUIRED != 0 => Err(WireError::UnknownRequired(*kind)),
                    _ => Ok(None),
                }
            }
        }
    };
}

messages! {
    /// See [`Hello`].
    1 Hello from Anyone,
    /// See [`Welcome`].
    2 Welcome from Relay,
    /// See [`SignIn`].
    3 SignIn from Anyone,
    /// See [`Granted`].
    4 Granted from Relay,
    /// See [`Open`].
    5 Open from Anyone,
    /// See [`Changes`].
    6 Changes from Member,
    /// See [`Ack`].
    7 Ack from Relay,
    /// See [`Feed`].
    8 Feed from Relay,
    /// See [`CaughtUp`].
    9 CaughtUp from Relay,
    /// See [`PushSchema`].
    10 PushSchema from Anyone,
    /// See [`SchemaIs`].
    11 SchemaIs from Relay,
    /// See [`FetchSchema`].
    12 FetchSchema from Anyone,
    /// See [`Refresh`].
    13 Refresh from Anyone,
    /// See [`Fault`].
    14 Fault from Anyone,
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<DECODED_BYTES_MAX>()
}

fn encode(kind: u8, body: &impl Encode) -> Vec<u8> {
    let mut bytes = vec![kind, FLAG_REQUIRED];
    // Without a limit while encoding: what is sent was bounded when it was made.
    match bincode::encode_to_vec(body, bincode::config::standard()) {
        Ok(plain) => {
            let packed = (plain.len() > COMPRESS_OVER_BYTES)
                .then(|| zstd::bulk::compress(&plain, 3).ok())
                .flatten()
                .filter(|packed| packed.len() + 4 < plain.len());
            match packed {
                Some(packed) => {
                    bytes[1] |= FLAG_ZSTD;
                    bytes.extend_from_slice(&(plain.len() as u32).to_le_bytes());
                    bytes.extend_from_slice(&packed);
                }
                None => bytes.extend_from_slice(&plain),
            }
        }
        // Encoding to memory has no way to fail but a type without a form; ours all have one.
        Err(error) => tracing::error!(%error, kind, "a message could not be encoded"),
    }
    bytes
}

fn decode<T: Decode<()>>(flags: u8, body: &[u8]) -> Result<T, WireError> {
    let inflated;
    let plain = if flags & FLAG_ZSTD != 0 {
        let (length, packed) = body.split_first_chunk::<4>().ok_or(WireError::Malformed("no length"))?;
        let length = u32::from_le_bytes(*length) as usize;
        if length > MESSAGE_BYTES_MAX {
            return Err(WireError::TooLarge(length));
        }
        inflated = inflate(packed, length)?;
        &inflated[..]
    } else {
        body
    };
    // What follows the fields known here was appended by a later version.
    bincode::decode_from_slice(plain, config())
        .map(|(value, _)| value)
        .map_err(|_| WireError::Malformed("its body does not fit its kind"))
}

/// Inflates at most `length` bytes, growing with what really comes out.
fn inflate(packed: &[u8], length: usize) -> Result<Vec<u8>, WireError> {
    use std::io::Read;
    let mut plain = Vec::new();
    zstd::stream::read::Decoder::new(packed)
        .and_then(|mut decoder| {
            decoder.window_log_max(23)?;
            decoder.take(length as u64 + 1).read_to_end(&mut plain)
        })
        .map_err(|_| WireError::Malformed("its compression is damaged"))?;
    if plain.len() != length {
        return Err(WireError::Malformed("its length is not the one announced"));
    }
    Ok(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unit(bytes: usize) -> Message {
        Message::from(Changes {
            channel: 1,
            unit_id: 2,
            sent: 3,
            unit: Unit {
                entities: vec![EntityChanges {
                    type_name: "note".into(),
                    id: "n1".into(),
                    genesis: vec![("body".into(), 5)],
                    changes: vec![vec![7; bytes]],
                    signature: Vec::new(),
                }],
            },
        })
    }

    #[test]
    fn messages_read_back_compressed_or_not() {
        for message in [unit(10), unit(100_000), Message::from(FetchSchema { channel: 9 })] {
            assert_eq!(Message::decode(&message.encode()), Ok(Some(message)));
        }
        assert!(unit(100_000).encode().len() < 1_000);
    }

    #[test]
    fn no_prefix_of_a_message_is_one() {
        let bytes = unit(300).encode();
        for end in 0..bytes.len() {
            assert!(Message::decode(&bytes[..end]).is_err(), "{end}");
        }
    }

    #[test]
    fn what_a_later_version_appends_is_ignored() {
        let mut bytes = Message::from(FetchSchema { channel: 9 }).encode();
        bytes.extend([1, 2, 3]);
        assert_eq!(Message::decode(&bytes), Ok(Some(Message::from(FetchSchema { channel: 9 }))));
    }

    #[test]
    fn unknown_messages_are_skipped_or_refused_as_their_sender_says() {
        assert_eq!(Message::decode(&[200, 0, 1]), Ok(None));
        assert_eq!(Message::decode(&[200, FLAG_REQUIRED, 1]), Err(WireError::UnknownRequired(200)));
    }

    #[test]
    fn a_bomb_is_refused_before_it_grows() {
        let zeros = zstd::bulk::compress(&vec![0; 64 * 1024 * 1024], 19).unwrap();
        for announced in [u32::MAX, 1024, MESSAGE_BYTES_MAX as u32] {
            let mut bytes = vec![6, FLAG_REQUIRED | FLAG_ZSTD];
            bytes.extend(announced.to_le_bytes());
            bytes.extend(&zeros);
            assert!(Message::decode(&bytes).is_err());
        }
    }

    /// 1 KB of the wire was two hundred million bytes of empty changes.
    #[test]
    fn a_message_takes_little_more_memory_than_its_length() {
        let with = |changes: usize| {
            let empty = Unit {
                entities: vec![EntityChanges {
                    type_name: String::new(),
                    id: String::new(),
                    genesis: Vec::new(),
                    changes: vec![Vec::new(); changes],
                    signature: Vec::new(),
                }],
            };
            Message::from(Changes { channel: 1, unit_id: 2, sent: 3, unit: empty })
        };
        // A length counts eight bytes, whatever it takes on the wire.
        let fits = DECODED_BYTES_MAX / (size_of::<Vec<u8>>() + 8) - 100;
        assert!(Message::decode(&with(fits).encode()) == Ok(Some(with(fits))), "so many are read");
        let bomb = with(MESSAGE_BYTES_MAX - 100).encode();
        assert!(bomb.len() < 2_000, "{}", bomb.len());
        assert!(matches!(Message::decode(&bomb), Err(WireError::Malformed(_))), "more are not");
    }

    /// What a relay may send, and a device: the largest of each is far below the bound.
    #[test]
    fn the_largest_honest_messages_are_read() {
        let name = "n".repeat(64);
        let refused = |n: u32| Refused {
            type_name: name.clone(),
            id: n.to_string(),
            hash: [7; 32],
            code: 1,
            message: String::new(),
        };
        let own = (0..UNIT_ENTITIES_MAX).map(|n| (name.clone(), n.to_string(), vec![[7; 32]; 2])).collect();
        let entity = |n: usize| EntityChanges {
            type_name: name.clone(),
            id: n.to_string(),
            genesis: vec![("body".into(), 5); 4],
            changes: vec![vec![7; UNIT_BYTES_MAX / UNIT_CHANGES_MAX]; UNIT_CHANGES_MAX / UNIT_ENTITIES_MAX],
            signature: Vec::new(),
        };
        let unit = Unit { entities: (0..UNIT_ENTITIES_MAX).map(entity).collect() };
        let feed = |body| Feed { channel: 1, entries: vec![FeedEntry { seq: 1, body }], end: 1 };
        for message in [
            Message::from(Ack {
                channel: 1,
                unit_id: 2,
                seq: 3,
                refused: (0..UNIT_CHANGES_MAX as u32).map(refused).collect(),
            }),
            feed(FeedBody::Own(own)).into(),
            feed(FeedBody::Changes { author: [1; 32], unit: unit.clone() }).into(),
            Changes { channel: 1, unit_id: 2, sent: 3, unit }.into(),
        ] {
            assert_eq!(Message::decode(&message.encode()), Ok(Some(message)));
        }
    }

    #[test]
    fn entries_of_a_feed_read_back() {
        let bodies = [
            FeedBody::Changes { author: [1; 32], unit: Unit::default() },
            FeedBody::Own(vec![("note".into(), "n1".into(), vec![[2; 32]])]),
            FeedBody::Device { key: [3; 32], name: "phone".into(), platform: "test".into() },
            FeedBody::Schema { hash: [4; 32] },
        ];
        let entries = bodies.into_iter().zip(1..).map(|(body, seq)| FeedEntry { seq, body }).collect();
        let message = Message::from(Feed { channel: 1, entries, end: 9 });
        assert_eq!(Message::decode(&message.encode()), Ok(Some(message)));
        let unknown = bincode::encode_to_vec((1u32, vec![(1u64, 5u32)], 9u64), config()).unwrap();
        let message = [&[8, FLAG_REQUIRED][..], &unknown].concat();
        assert!(matches!(Message::decode(&message), Err(WireError::Malformed(_))));
    }

    #[test]
    fn a_hostile_length_prefix_is_refused() {
        // A vector that claims 2^62 elements.
        assert!(Message::decode(&[8, 1, 0, 253, 0, 0, 0, 0, 0, 0, 0, 64]).is_err());
    }
}
