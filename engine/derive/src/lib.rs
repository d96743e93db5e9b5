//! `#[derive(Entity)]`: a Rust struct as a type of the schema.
//!
//! ```text
//! #[derive(Serialize, Deserialize, Entity, Clone, Debug)]
//! #[entity(name = "workout", version = 1, index = "started_at", unique = "started_at")]
//! struct Workout {
//!     title: String,                                        // lww
//!     #[field(required, timestamp)] started_at: String,
//!     #[merge(text)] notes: String,
//!     #[merge(manual, group = "log")] sets: Vec<SetEntry>,  // one json value
//!     #[merge(counter)] reps: i64,
//!     tags: BTreeSet<String>,                               // a set, add wins
//! }
//! ```
//!
//! The macro writes the type's definition in the schema's own language and implements
//! `anabranch::Entity` by reading it: whatever a file can say means the same here. Besides,
//! each field gets a constant, as in `Workout::STARTED_AT`, to build queries with.
//!
//! What a struct alone can get wrong is an error while compiling, at the attribute that is
//! wrong; that references name a type is checked when a schema is put together.

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

mod attributes;
mod entity;
mod field_type;

/// Makes a struct a type of the schema.
///
/// **On the struct**, `#[entity(…)]`: `name` and `version` (both needed: they are what devices
/// agree on, whatever the struct is called), `merge` (the policy of fields that name none),
/// `group` (one group of all fields), `index` and `unique` (`"a, b"`, each as often as
/// needed), `priority`.
///
/// **On a field**, `#[merge(policy, group = "…", tie = "manual")]`, each part optional, and
/// `#[field(…)]`: `required`, `one_of = […]`, `min`, `max`, `max_bytes`, `default`,
/// `to = "type"` (a reference), `timestamp`, `json`, `blob`, `media = […]`, `keep_days`,
/// `keep = "forever"`, and `rename`, which must agree with serde's.
///
/// **Types**: `bool`; integers up to 64 bits → int; floats → float; `String` → string, with
/// `#[merge(text)]` text; `BTreeSet`, `HashSet` → set; `Vec<T>` → with `#[merge(list)]` a list,
/// else json; `BTreeMap<String, T>`, `HashMap<String, T>` → map; `Option<T>` → as `T`;
/// anything else → json. `timestamp`, `to` and `blob` on a set, list or map are about its
/// elements; `json` makes the whole field one value.
///
/// Fields are named as serde names them: `rename`, `rename_all` and `skip` are honoured.
#[proc_macro_derive(Entity, attributes(entity, field, merge))]
pub fn derive_entity(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    entity::expand(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}
