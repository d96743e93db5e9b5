//! The shape of an entity's document: which keys its root has, and how values are held.
//!
//! | key | holds |
//! |---|---|
//! | `name` | a register, or a container made by its genesis change |
//! | `name!` | the register's shadow, written only by authorities (`server_wins`, `client_wins`) |
//! | `#group` | all members of a group as one canonical JSON object |
//! | `#group!` | that register's shadow |
//! | `~` | the tombstone: `true` deletes, `false` revives |
//!
//! Every value is one scalar: an edit inside a nested object, against a replacement of it,
//! would be lost without a conflict. JSON is held as its canonical text.

use std::collections::BTreeMap;

use automerge::ScalarValue;
use serde_json::Value as Json;

use crate::schema::{Field, FieldType, ScalarType, canonical_json, timestamp_from_ms, timestamp_to_ms};

/// Key of the tombstone register.
pub const TOMBSTONE: &str = "~";

/// A key of the root map, taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RootKey<'a> {
    /// A field's register, or its shadow.
    Field {
        /// The field.
        name: &'a str,
        /// Whether this is the authorities' register.
        shadow: bool,
    },
    /// A group's register, or its shadow.
    Group {
        /// The group.
        name: &'a str,
        /// Whether this is the authorities' register.
        shadow: bool,
    },
    /// The tombstone register.
    Tombstone,
}

impl<'a> RootKey<'a> {
    /// Takes a key apart; `None` if no entity has such a key.
    pub fn parse(key: &'a str) -> Option<Self> {
        if key == TOMBSTONE {
            return Some(RootKey::Tombstone);
        }
        let (rest, shadow) = match key.strip_suffix('!') {
            Some(rest) => (rest, true),
            None => (key, false),
        };
        let (name, group) = match rest.strip_prefix('#') {
            Some(name) => (name, true),
            None => (rest, false),
        };
        let plain = name.len() <= crate::id::NAME_BYTES_MAX
            && name.starts_with(|c: char| c.is_ascii_alphabetic())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
        match (plain, group) {
            (false, _) => None,
            (true, true) => Some(RootKey::Group { name, shadow }),
            (true, false) => Some(RootKey::Field { name, shadow }),
        }
    }

    /// The key.
    pub fn to_key(self) -> String {
        let (sign, name, shadow) = match self {
            RootKey::Field { name, shadow } => ("", name, shadow),
            RootKey::Group { name, shadow } => ("#", name, shadow),
            RootKey::Tombstone => ("", TOMBSTONE, false),
        };
        format!("{sign}{name}{}", if shadow { "!" } else { "" })
    }
}

fn scalar_type(field: &Field) -> Option<&ScalarType> {
    match &field.ty {
        FieldType::Scalar(ty) | FieldType::Set(ty) | FieldType::List(ty) | FieldType::Map(ty) => Some(ty),
        FieldType::Text => None,
    }
}

/// The scalar that holds a checked value of a register, list or map.
pub fn json_to_scalar(field: &Field, json: &Json) -> ScalarValue {
    match (scalar_type(field), json) {
        (_, Json::Null) => ScalarValue::Null,
        (Some(ScalarType::Bool), Json::Bool(value)) => ScalarValue::Boolean(*value),
        (Some(ScalarType::Int), Json::Number(n)) => n.as_i64().map_or(ScalarValue::Null, ScalarValue::Int),
        (Some(ScalarType::Float), Json::Number(n)) => n.as_f64().map_or(ScalarValue::Null, ScalarValue::F64),
        (Some(ScalarType::Timestamp), Json::String(text)) => {
            timestamp_to_ms(text).map_or(ScalarValue::Null, ScalarValue::Timestamp)
        }
        (Some(ScalarType::String | ScalarType::Ref(_)), Json::String(text)) => {
            ScalarValue::Str(text.as_str().into())
        }
        (_, other) => ScalarValue::Str(canonical_json(other).into()),
    }
}

/// The value that a scalar of a register, list or map stands for; `None` if it is none of the field's type.
pub fn scalar_to_json(field: &Field, scalar: &ScalarValue) -> Option<Json> {
    match (scalar_type(field)?, scalar) {
        (_, ScalarValue::Null) => Some(Json::Null),
        (ScalarType::Bool, ScalarValue::Boolean(value)) => Some(Json::Bool(*value)),
        (ScalarType::Int, ScalarValue::Int(value)) => Some(Json::from(*value)),
        (ScalarType::Float, ScalarValue::F64(value)) => {
            serde_json::Number::from_f64(*value).map(Json::Number)
        }
        (ScalarType::Timestamp, ScalarValue::Timestamp(ms)) => Some(Json::String(timestamp_from_ms(*ms))),
        (ScalarType::String | ScalarType::Ref(_), ScalarValue::Str(text)) => {
            Some(Json::String(text.to_string()))
        }
        (ScalarType::Json | ScalarType::Blob, ScalarValue::Str(text)) => parse_canonical(text),
        _ => None,
    }
}

/// The map key that stands for a set's element: its canonical JSON.
pub fn element_to_key(element: &Json) -> String {
    canonical_json(element)
}

/// The element that a map key of a set stands for; `None` if the key is not canonical.
pub fn element_from_key(key: &str) -> Option<Json> {
    parse_canonical(key)
}

/// The scalar that holds all members of a group.
pub fn group_to_scalar(members: &BTreeMap<String, Json>) -> ScalarValue {
    let object = members.iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    ScalarValue::Str(canonical_json(&Json::Object(object)).into())
}

/// The members that a group's scalar holds, the unknown ones too; `None` if it is not a
/// canonical JSON object.
pub fn group_from_scalar(scalar: &ScalarValue) -> Option<BTreeMap<String, Json>> {
    let ScalarValue::Str(text) = scalar else { return None };
    match parse_canonical(text)? {
        Json::Object(members) => Some(members.into_iter().collect()),
        _ => None,
    }
}

/// Parses JSON that must be in canonical form, so that equal values are equal bytes.
fn parse_canonical(text: &str) -> Option<Json> {
    let value: Json = serde_json::from_str(text).ok()?;
    (canonical_json(&value) == text).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_keys_read_back() {
        for key in ["title", "title!", "#log", "#log!", "~"] {
            assert_eq!(RootKey::parse(key).map(RootKey::to_key).as_deref(), Some(key));
        }
        for key in ["", "!", "#", "~!", "#!", "a b", "title!!", "##log", "1st", "é"] {
            assert_eq!(RootKey::parse(key), None, "{key}");
        }
    }

    #[test]
    fn a_group_keeps_members_that_it_does_not_know() {
        let scalar = ScalarValue::Str(r#"{"a":1,"zz":[true,null]}"#.into());
        let members = group_from_scalar(&scalar).unwrap();
        assert_eq!(members["zz"], serde_json::json!([true, null]));
        assert_eq!(group_to_scalar(&members), scalar);
        assert_eq!(group_from_scalar(&ScalarValue::Str(r#"{"b":1, "a":2}"#.into())), None, "not canonical");
    }
}
