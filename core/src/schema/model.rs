//! What a schema is once it has been read and checked.

use std::collections::BTreeMap;
use std::fmt;

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

/// What any single value can have, and therefore a type as the default of its fields.
pub(super) const VALUE_POLICIES: &[Policy] = &[
    Policy::ServerWins,
    Policy::ServerOnly,
    Policy::ClientWins,
    Policy::Lww,
    Policy::FirstWrite,
    Policy::Manual,
];

impl FieldType {
    /// The name in schema files.
    pub fn name(&self) -> &'static str {
        match self {
            FieldType::Scalar(scalar) => scalar.name(),
            FieldType::Text => "text",
            FieldType::Set(_) => "set",
            FieldType::List(_) => "list",
            FieldType::Map(_) => "map",
        }
    }

    /// The type of the value, of each element, or of each entry; a text's is a string.
    pub fn scalar(&self) -> ScalarType {
        match self {
            FieldType::Scalar(scalar)
            | FieldType::Set(scalar)
            | FieldType::List(scalar)
            | FieldType::Map(scalar) => scalar.clone(),
            FieldType::Text => ScalarType::String,
        }
    }

    /// The policy of a container that names none, whatever the type's default. For a map it
    /// is the policy of its entries.
    pub fn implied_policy(&self) -> Option<Policy> {
        match self {
            FieldType::Scalar(_) => None,
            FieldType::Text => Some(Policy::Text),
            FieldType::Set(_) => Some(Policy::Set),
            FieldType::List(_) => Some(Policy::List),
            FieldType::Map(_) => Some(Policy::Lww),
        }
    }

    /// The policies that `merge` may name for a field of this type.
    pub fn allowed_policies(&self) -> Vec<Policy> {
        let numbers: &[Policy] = match self.scalar() {
            ScalarType::Int | ScalarType::Float | ScalarType::Timestamp => &[Policy::Max, Policy::Min],
            _ => &[],
        };
        match self {
            FieldType::Scalar(scalar) => {
                let counter: &[Policy] = match scalar {
                    ScalarType::Int => &[Policy::Counter],
                    _ => &[],
                };
                [VALUE_POLICIES, numbers, counter].concat()
            }
            FieldType::Map(_) => {
                [&[Policy::Map, Policy::Lww, Policy::FirstWrite, Policy::Manual], numbers].concat()
            }
            FieldType::Text => vec![Policy::Text],
            FieldType::Set(_) => vec![Policy::Set],
            FieldType::List(_) => vec![Policy::List],
        }
    }

    pub(super) fn description(&self) -> String {
        match self {
            FieldType::Scalar(scalar) => format!("type = {:?}", scalar.name()),
            FieldType::Text => "type = \"text\"".to_owned(),
            FieldType::Set(of) | FieldType::List(of) | FieldType::Map(of) => {
                format!("a {} of {}", self.name(), of.name())
            }
        }
    }
}

impl ScalarType {
    /// The name in schema files.
    pub fn name(&self) -> &'static str {
        match self {
            ScalarType::Bool => "bool",
            ScalarType::Int => "int",
            ScalarType::Float => "float",
            ScalarType::String => "string",
            ScalarType::Timestamp => "timestamp",
            ScalarType::Json => "json",
            ScalarType::Ref(_) => "ref",
            ScalarType::Blob => "blob",
        }
    }
}

impl Field {
    /// Whether an index or a unique key may hold the field: one value that has an order.
    pub fn is_indexable(&self) -> bool {
        match &self.ty {
            FieldType::Scalar(ScalarType::Json | ScalarType::Blob) => false,
            FieldType::Scalar(_) => self.policy != Policy::Counter,
            _ => false,
        }
    }
}

impl Bound {
    pub(super) fn is_above(self, other: Bound) -> bool {
        match (self, other) {
            (Bound::Int(a), Bound::Int(b)) => a > b,
            (a, b) => a.as_f64() > b.as_f64(),
        }
    }

    fn as_f64(self) -> f64 {
        match self {
            Bound::Int(int) => int as f64,
            Bound::Float(float) => float,
        }
    }
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Bound::Int(int) => write!(f, "{int}"),
            Bound::Float(float) => write!(f, "{float}"),
        }
    }
}

impl Tie {
    /// The name in schema files.
    pub fn name(self) -> &'static str {
        match self {
            Tie::Clock => "clock",
            Tie::Manual => "manual",
        }
    }
}
