//! Schemas: the types of a workspace, their fields, and the policy of each.
//!
//! A schema is written in TOML ([`Schema::parse`]) or comes from `#[derive(Entity)]`; both
//! build the same [`Schema`], and equal schemas have equal [`Schema::hash`]es. It is the same
//! on the relay, on every device and in every language.
//!
//! Values of fields are checked and brought into their one canonical form by [`Field::check`];
//! whether a schema may follow a published one says [`Schema::compatibility`].

mod check;
mod export;
mod model;
mod parse;
mod value;

#[cfg(test)]
mod tests;

pub use check::{Change, Severity};
pub use model::{
    BlobRule, Bound, EntityType, Field, FieldKind, FieldType, Group, Keep, Policy, ScalarType, Schema, Tie,
};
pub use parse::{ERRORS_MAX, FIELDS_MAX, SOURCE_BYTES_MAX, SchemaError, SchemaErrors, TYPES_MAX};
pub(crate) use value::describe;
pub use value::{
    JSON_DEPTH_MAX, JsonError, MAP_KEY_BYTES_MAX, VALUE_BYTES_MAX, ValueError, canonical_json, check_json,
    timestamp_from_ms, timestamp_to_ms,
};
