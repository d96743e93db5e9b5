//! What two ends of a link say to each other, and the one codec of the wire.
//!
//! A message is `[kind][flags][body]`. Bit 0 of the flags marks a message that the receiver
//! must understand: an unknown kind with it set ends the session with a reason, without it
//! the message is skipped. Bit 1 marks a zstd-compressed body. Fields that a later version
//! appends to a body are ignored by an older reader. Every decode is bounded.

use bincode::{Decode, Encode};

/// Protocol versions that this program speaks.
pub const VERSION_MIN: u16 = 1;
/// See [`VERSION_MIN`].
pub const VERSION_MAX: u16 = 1;
/// Largest message in bytes, compressed or not.
pub const MESSAGE_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Largest unit in bytes of changes; a larger transaction is refused when it is written.
pub const UNIT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Most that the changes of a unit weigh together, in bytes: see
/// [`Change::weight`](crate::change::Change::weight).
pub const UNIT_WEIGHT_MAX: usize = 48 * 1024 * 1024;
/// Most bytes of all changes of an entity; those beyond are refused for good.
pub const ENTITY_BYTES_MAX: usize = 48 * 1024 * 1024;
/// Most entities of a unit.
pub const UNIT_ENTITIES_MAX: usize = 10_000;
/// Bodies larger than this are compressed if it helps.
const COMPRESS_OVER_BYTES: usize = 256;

const FLAG_REQUIRED: u8 = 1;
const FLAG_ZSTD: u8 = 2;

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
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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

/// Changes that are shown together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Encode, Decode)]
pub struct Unit {
    /// By entity.
    pub entities: Vec<EntityChanges>,
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
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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

/// Something that happened in a workspace.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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

/// An entry of the feed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct FeedEntry {
    /// Its place: gap-free from 1.
    pub seq: u64,
    /// What happened.
    pub body: FeedBody,
}

/// A page of the feed.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
pub struct Feed {
    /// The channel.
    pub channel: Channel,
    /// Entries in order.
    pub entries: Vec<FeedEntry>,
    /// The newest entry of the whole feed, for progress.
    pub end: u64,
}

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
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
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

macro_rules! messages {
    ($($(#[$doc:meta])* $code:literal $name:ident,)*) => {
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
    1 Hello,
    /// See [`Welcome`].
    2 Welcome,
    /// See [`SignIn`].
    3 SignIn,
    /// See [`Granted`].
    4 Granted,
    /// See [`Open`].
    5 Open,
    /// See [`Changes`].
    6 Changes,
    /// See [`Ack`].
    7 Ack,
    /// See [`Feed`].
    8 Feed,
    /// See [`CaughtUp`].
    9 CaughtUp,
    /// See [`PushSchema`].
    10 PushSchema,
    /// See [`SchemaIs`].
    11 SchemaIs,
    /// See [`FetchSchema`].
    12 FetchSchema,
    /// See [`Refresh`].
    13 Refresh,
    /// See [`Fault`].
    14 Fault,
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<MESSAGE_BYTES_MAX>()
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

    #[test]
    fn a_hostile_length_prefix_is_refused() {
        // A vector that claims 2^62 elements.
        assert!(Message::decode(&[8, 1, 0, 253, 0, 0, 0, 0, 0, 0, 0, 64]).is_err());
    }
}
