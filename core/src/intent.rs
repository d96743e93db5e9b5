//! What a user meant by an edit, apart from how a document holds it.
//!
//! The outbox keeps the intents of every pending change. When a change that others build on
//! is refused, the rest is written again from them: differences between rows would double
//! counters, and text positions would dangle.

use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

/// One thing that a user did to one entity. Positions count Unicode code points in texts and
/// items in lists, in the version that the edit is based on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Intent {
    /// Set a register or a group's member; null clears it.
    Set {
        /// The field.
        field: String,
        /// The value.
        value: Json,
    },
    /// Add to a counter.
    Increment {
        /// The field.
        field: String,
        /// How much; negative takes away.
        by: i64,
    },
    /// Add an element to a set.
    Add {
        /// The field.
        field: String,
        /// The element.
        element: Json,
    },
    /// Remove an element from a set.
    Remove {
        /// The field.
        field: String,
        /// The element.
        element: Json,
    },
    /// Insert items into a list.
    Insert {
        /// The field.
        field: String,
        /// Before which item; none appends.
        at: Option<usize>,
        /// The items.
        items: Vec<Json>,
    },
    /// Remove items from a list.
    RemoveItems {
        /// The field.
        field: String,
        /// The first one.
        at: usize,
        /// How many.
        count: usize,
    },
    /// Set an entry of a map; null removes it.
    Put {
        /// The field.
        field: String,
        /// The key.
        key: String,
        /// The value.
        value: Json,
    },
    /// Replace a stretch of text.
    Splice {
        /// The field.
        field: String,
        /// Where.
        at: usize,
        /// How many code points go.
        delete: usize,
        /// What comes.
        insert: String,
    },
    /// Delete the entity.
    Delete,
    /// Bring a deleted entity back.
    Revive,
    /// Settle a conflict: of a register, a group (by its name, with all its members), or an
    /// entry of a map (`field.key`).
    Resolve {
        /// What.
        field: String,
        /// The value that shall stand.
        value: Json,
    },
}

impl Intent {
    /// The field that it names, if any.
    pub fn field(&self) -> Option<&str> {
        match self {
            Intent::Set { field, .. }
            | Intent::Increment { field, .. }
            | Intent::Add { field, .. }
            | Intent::Remove { field, .. }
            | Intent::Insert { field, .. }
            | Intent::RemoveItems { field, .. }
            | Intent::Put { field, .. }
            | Intent::Splice { field, .. }
            | Intent::Resolve { field, .. } => Some(field),
            Intent::Delete | Intent::Revive => None,
        }
    }
}
