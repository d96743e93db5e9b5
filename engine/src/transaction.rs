//! Several entities of the app's own types, written as one.

use std::collections::BTreeMap;

use serde_json::{Map, Value as Json};

use crate::error::{Category, Error};
use crate::typed::{Entity, from_fields, new_id, to_fields};
use crate::workspace::Workspace;
use crate::{Edit, EntityKey, Expect, Intent, parse_version};

/// Edits of several entities that are made together or not at all: on this device, on the relay
/// and on every other device. Made by [`Workspace::transaction`]; nothing is written before
/// [`Transaction::commit`], and dropped without it a transaction leaves nothing behind.
///
/// ```
/// # use anabranch::{Engine, Entity};
/// # use serde::{Deserialize, Serialize};
/// #[derive(Serialize, Deserialize, Entity, Clone, Debug)]
/// #[entity(name = "account", version = 1)]
/// struct Account {
///     owner: String,
///     #[merge(counter)]
///     points: i64,
/// }
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let dir = tempfile::tempdir()?;
/// # let engine = Engine::builder(dir.path()).register::<Account>().open().await?;
/// let workspace = engine.workspace("home").await?;
/// let mut tx = workspace.transaction();
/// let ann = tx.create(&Account { owner: "Ann".into(), points: 10 })?;
/// let ben = tx.create(&Account { owner: "Ben".into(), points: 0 })?;
/// tx.commit().await?; // durable when it returns
///
/// let mut tx = workspace.transaction();
/// tx.update::<Account>(&ann, |account| account.points -= 3).await?;
/// tx.update::<Account>(&ben, |account| account.points += 3).await?;
/// tx.commit().await?;
///
/// let accounts = workspace.entities::<Account>();
/// assert_eq!(accounts.get(&ann).await?.map(|account| account.points), Some(7));
/// assert_eq!(accounts.get(&ben).await?.map(|account| account.points), Some(3));
///
/// // All or nothing: there is no third account to take from.
/// let mut tx = workspace.transaction();
/// tx.update::<Account>(&ann, |account| account.points += 5).await?;
/// tx.delete::<Account>("nobody")?;
/// assert!(tx.commit().await.is_err());
/// assert_eq!(accounts.get(&ann).await?.map(|account| account.points), Some(7));
/// # Ok(engine.shutdown().await?)
/// # }
/// ```
#[must_use = "nothing is written before `commit`"]
pub struct Transaction {
    workspace: Workspace,
    drafts: BTreeMap<EntityKey, Draft>,
}

/// What becomes of one entity.
enum Draft {
    New(Map<String, Json>),
    Changed { before: Map<String, Json>, after: Map<String, Json>, version: String },
    Deleted,
}

impl Workspace {
    /// Begins a transaction over entities of the app's types. [`Workspace::write`] is the same
    /// for dynamic ones.
    pub fn transaction(&self) -> Transaction {
        Transaction { workspace: self.clone(), drafts: BTreeMap::new() }
    }
}

impl Transaction {
    /// Creates an entity under a new id, which is given back.
    pub fn create<T: Entity>(&mut self, value: &T) -> Result<String, Error> {
        let id = new_id();
        self.create_with_id(&id, value)?;
        Ok(id)
    }

    /// Creates an entity under an id of the app. If it exists, the commit fails.
    pub fn create_with_id<T: Entity>(&mut self, id: &str, value: &T) -> Result<(), Error> {
        let key = key::<T>(id)?;
        if self.drafts.contains_key(&key) {
            let message = format!("{key} is in this transaction already");
            return Err(Error::new(Category::Validation, "exists", message));
        }
        self.drafts.insert(key, Draft::New(to_fields(value)?));
        Ok(())
    }

    /// Runs `change` on a copy, which shows what this transaction has made of the entity so far.
    /// What it changed is committed as an edit of the version that was seen first: what arrives
    /// meanwhile is merged and not overwritten.
    pub async fn update<T: Entity>(&mut self, id: &str, change: impl FnOnce(&mut T)) -> Result<(), Error> {
        let key = key::<T>(id)?;
        if !self.drafts.contains_key(&key) {
            let found = self.workspace.entities::<T>().load(id).await?;
            let loaded = found.ok_or_else(|| missing(&key))?;
            let before = to_fields(&loaded.value)?;
            let draft = Draft::Changed { after: before.clone(), before, version: loaded.version };
            self.drafts.insert(key.clone(), draft);
        }
        let Some(Draft::New(fields) | Draft::Changed { after: fields, .. }) = self.drafts.get_mut(&key)
        else {
            return Err(missing(&key));
        };
        let mut value: T = from_fields(&key, fields.clone())?;
        change(&mut value);
        *fields = to_fields(&value)?;
        Ok(())
    }

    /// Deletes an entity. If it does not exist, the commit fails.
    pub fn delete<T: Entity>(&mut self, id: &str) -> Result<(), Error> {
        let key = key::<T>(id)?;
        match self.drafts.remove(&key) {
            // It never was.
            Some(Draft::New(_)) => {}
            _ => drop(self.drafts.insert(key, Draft::Deleted)),
        }
        Ok(())
    }

    /// Writes all of it. When this returns it is durable, and the next read shows it; after an
    /// error none of it was made. Dropped before it returns, all of it or nothing may be made.
    pub async fn commit(self) -> Result<(), Error> {
        let edits: Vec<Edit> = self
            .drafts
            .into_iter()
            .map(|(key, draft)| draft.edit(key))
            .filter(|e| !e.intents.is_empty())
            .collect();
        if !edits.is_empty() {
            self.workspace.write(edits).await?;
        }
        Ok(())
    }
}

impl Draft {
    fn edit(self, key: EntityKey) -> Edit {
        let set = |(field, value): (String, Json)| Intent::Set { field, value };
        let (intents, based_on, expect) = match self {
            Draft::New(fields) => {
                let written = fields.into_iter().filter(|(_, value)| !value.is_null());
                (written.map(set).collect(), None, Expect::New)
            }
            Draft::Changed { before, after, version } => {
                let changed = after.into_iter().filter(|(field, value)| before.get(field) != Some(value));
                (changed.map(set).collect(), parse_version(&version), Expect::Existing)
            }
            Draft::Deleted => (vec![Intent::Delete], None, Expect::Existing),
        };
        Edit { key, intents, based_on, expect }
    }
}

fn key<T: Entity>(id: &str) -> Result<EntityKey, Error> {
    Ok(EntityKey::new(T::entity_type().name, id)?)
}

fn missing(key: &EntityKey) -> Error {
    Error::new(Category::NotFound, "not_found", format!("{key} does not exist"))
}
