//! What a schema is once it has been read and checked.

use std::collections::BTreeMap;

use serde_json::Value as Json;

/// The types of a workspace by name. Build one with [`Schema::parse`](super::Schema::parse).
#[derive(Clone, Debug, PartialEq)]
pub struct Schema {
    /// Types by name.
    pub types: BTreeMap<String, EntityType>,
}

/// A type of entity.
#[derive(Clone, Debug, PartialEq)]
pub struct EntityType {
    /// The type's name: `[a-z][a-z0-9_]*`, at most 64 bytes.
    pub name: String,
    /// Version of the type's definition, ≥ 1.
    pub version: u32,
    /// Policy of fields that name none and whose type implies none. `None` means `lww`.
    pub default_policy: Option<Policy>,
    /// Fields by name.
    pub fields: BTreeMap<String, Field>,
    /// Groups by name. Their members are the fields whose `group` names them.
    pub groups: BTreeMap<String, Group>,
    /// Secondary indexes: each a list of field names.
    pub indexes: Vec<Vec<String>>,
    /// Unique keys: each a list of field names.
    pub unique: Vec<Vec<String>>,
    /// What is sent first: larger before smaller, default 0.
    pub priority: i32,
}

impl EntityType {
    /// Whether only an authority may create, change or delete entities of this type: the
    /// type's own policy is `server_only`.
    pub fn is_server_only(&self) -> bool {
        self.default_policy == Some(Policy::ServerOnly)
    }
}

/// A field of a type, with every default already resolved.
#[derive(Clone, Debug, PartialEq)]
pub struct Field {
    /// The field's name: `[A-Za-z][A-Za-z0-9_]*`, at most 64 bytes.
    pub name: String,
    /// What values it takes.
    pub ty: FieldType,
    /// How concurrent values meet. For a container this is the policy of its entries (a map)
    /// or the implied merge of the container itself.
    pub policy: Policy,
    /// The group that the field is resolved with.
    pub group: Option<String>,
    /// A value must be present when the entity is created, and can't be cleared.
    pub required: bool,
    /// The only values allowed, where not empty.
    pub one_of: Vec<Json>,
    /// Least number allowed.
    pub min: Option<Bound>,
    /// Greatest number allowed.
    pub max: Option<Bound>,
    /// Longest value in bytes: of a string's UTF-8, of canonical JSON, or of a blob.
    pub max_bytes: Option<u64>,
    /// Shown while no value was written. Never written by reading.
    pub default: Option<Json>,
    /// What equal times mean for `lww`.
    pub tie: Tie,
    /// Rules for a blob.
    pub blob: Option<BlobRule>,
}

impl Field {
    /// How the field is held in the document.
    pub fn kind(&self) -> FieldKind {
        match (&self.ty, &self.group, self.policy) {
            (_, Some(_), _) => FieldKind::GroupMember,
            (FieldType::Text, ..) => FieldKind::Text,
            (FieldType::Set(_), ..) => FieldKind::Set,
            (FieldType::List(_), ..) => FieldKind::List,
            (FieldType::Map(_), ..) => FieldKind::Map,
            (FieldType::Scalar(_), None, Policy::Counter) => FieldKind::Counter,
            (FieldType::Scalar(_), None, _) => FieldKind::Register,
        }
    }
}

/// How a field is held in the document. See the module on documents.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FieldKind {
    /// One scalar in the root map.
    Register,
    /// A member of a group's register.
    GroupMember,
    /// A counter made by a genesis change.
    Counter,
    /// A map of elements made by a genesis change.
    Set,
    /// A list made by a genesis change.
    List,
    /// A map made by a genesis change.
    Map,
    /// A text made by a genesis change.
    Text,
}

/// What values a field takes.
#[derive(Clone, Debug, PartialEq)]
pub enum FieldType {
    /// One value.
    Scalar(ScalarType),
    /// Text that merges by character.
    Text,
    /// A set of scalars.
    Set(ScalarType),
    /// A list of scalars.
    List(ScalarType),
    /// Scalars by key.
    Map(ScalarType),
}

/// One value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ScalarType {
    /// `true` or `false`.
    Bool,
    /// A signed 64-bit integer.
    Int,
    /// A 64-bit float; NaN and infinities are refused.
    Float,
    /// A string.
    String,
    /// An instant with millisecond precision, RFC 3339 in JSON.
    Timestamp,
    /// Any JSON value, one unit: no merge inside.
    Json,
    /// The id of an entity of the named type.
    Ref(String),
    /// An attachment: `{hash, size, media, name}`.
    Blob,
}

/// How concurrent values of a field become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Policy {
    /// An authority's value stands unless a device had seen it when it wrote.
    ServerWins,
    /// Only authorities write.
    ServerOnly,
    /// A device's value stands unless the authority had seen it when it wrote.
    ClientWins,
    /// The newest by hybrid logical clock.
    Lww,
    /// The first by hybrid logical clock.
    FirstWrite,
    /// The largest number.
    Max,
    /// The smallest number.
    Min,
    /// The sum of all increments.
    Counter,
    /// Union; an add wins over a concurrent remove.
    Set,
    /// Concurrent inserts are all kept, each in its order.
    List,
    /// Each key by itself.
    Map,
    /// Merge by character.
    Text,
    /// More than one value at once waits for a person.
    Manual,
}

impl Policy {
    /// The name in schema files.
    pub fn name(self) -> &'static str {
        match self {
            Policy::ServerWins => "server_wins",
            Policy::ServerOnly => "server_only",
            Policy::ClientWins => "client_wins",
            Policy::Lww => "lww",
            Policy::FirstWrite => "first_write",
            Policy::Max => "max",
            Policy::Min => "min",
            Policy::Counter => "counter",
            Policy::Set => "set",
            Policy::List => "list",
            Policy::Map => "map",
            Policy::Text => "text",
            Policy::Manual => "manual",
        }
    }
}

/// What happens when the newest values of an `lww` field have equal milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Tie {
    /// The rest of the clock and then the actor decide.
    #[default]
    Clock,
    /// A person decides.
    Manual,
}

/// A numeric bound, exact for both kinds of number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bound {
    /// A bound on integers (or on floats, compared as numbers).
    Int(i64),
    /// A bound on floats.
    Float(f64),
}

/// Fields that are resolved as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The group's name, which is also its name in conflicts.
    pub name: String,
    /// The members' common policy.
    pub policy: Policy,
    /// What equal times mean for `lww`.
    pub tie: Tie,
    /// Field names in order.
    pub members: Vec<String>,
}

/// Rules for an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlobRule {
    /// Media types allowed; empty allows all.
    pub media: Vec<String>,
    /// How long devices keep the bytes.
    pub keep: Keep,
}

/// How long a device keeps an attachment's bytes after last use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Keep {
    /// As space allows.
    #[default]
    Cached,
    /// For ever.
    Forever,
    /// This many days.
    Days(u32),
}
