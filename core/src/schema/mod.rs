//! Schemas: the types of a workspace, their fields, and the policy of each.
//!
//! A schema is written in TOML ([`Schema::parse`]) or comes from `#[derive(Entity)]`; both
//! build the same [`Schema`], and equal schemas have equal [`Schema::hash`]es. It is the same
//! on the relay, on every device and in every language.

mod model;

pub use model::{
    BlobRule, Bound, EntityType, Field, FieldKind, FieldType, Group, Keep, Policy, ScalarType, Schema, Tie,
};
