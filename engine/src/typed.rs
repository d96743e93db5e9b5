//! Entities as the app's own types.

use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;

use crate::error::{Category, Error};
use crate::schema::EntityType;
use crate::workspace::{BoxStream, Page, Record, Workspace};
use crate::{Edit, EntityKey, Expect, Filter, Intent, Op, Query, parse_version};

/// A type of the app whose values are entities. Derive it.
pub trait Entity: Serialize + DeserializeOwned + Clone + Send + Sync + 'static {
    /// The type's part of the schema.
    fn entity_type() -> EntityType;
}

/// A field of a type, for filters and orders that can't be misspelt.
pub struct FieldName<T> {
    name: &'static str,
    entity: PhantomData<fn() -> T>,
}

impl<T> Clone for FieldName<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for FieldName<T> {}

macro_rules! comparison {
    ($($(#[$doc:meta])* $method:ident $op:ident;)*) => {
        $($(#[$doc])*
        pub fn $method(self, value: impl Serialize) -> Filter {
            self.filter(Op::$op, value)
        })*
    };
}

impl<T> FieldName<T> {
    /// The field of this name.
    pub const fn new(name: &'static str) -> Self {
        Self { name, entity: PhantomData }
    }

    /// Its name.
    pub const fn name(self) -> &'static str {
        self.name
    }

    fn filter(self, op: Op, value: impl Serialize) -> Filter {
        // What has no JSON form, NaN for one, is null.
        let value = serde_json::to_value(value).unwrap_or(Json::Null);
        Filter { field: self.name.to_owned(), op, value }
    }

    comparison! {
        /// Equal.
        eq Eq;
        /// Not equal.
        ne Ne;
        /// Less.
        lt Lt;
        /// Less or equal.
        le Le;
        /// Greater.
        gt Gt;
        /// Greater or equal.
        ge Ge;
        /// A text contains a text, a set or list an element, a map a key.
        contains Contains;
    }
}

/// An entity with the version that was read.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Loaded<T> {
    /// Its id.
    pub id: String,
    /// Its value.
    pub value: T,
    /// For [`Entities::save`].
    pub version: String,
}

/// The entities of one type in a workspace.
pub struct Entities<T> {
    workspace: Workspace,
    name: String,
    entity: PhantomData<fn() -> T>,
}

impl<T> Clone for Entities<T> {
    fn clone(&self) -> Self {
        Self { workspace: self.workspace.clone(), name: self.name.clone(), entity: PhantomData }
    }
}

impl Workspace {
    /// The entities of a type of the app.
    pub fn entities<T: Entity>(&self) -> Entities<T> {
        Entities { workspace: self.clone(), name: T::entity_type().name, entity: PhantomData }
    }
}

impl<T: Entity> Entities<T> {
    /// Creates an entity under a new id, which is given back. Durable when this returns.
    pub async fn create(&self, value: &T) -> Result<String, Error> {
        let id = new_id();
        self.create_with_id(&id, value).await?;
        Ok(id)
    }

    /// Creates an entity under an id of the app. Durable when this returns.
    pub async fn create_with_id(&self, id: &str, value: &T) -> Result<(), Error> {
        let intents = to_fields(value)?
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(field, value)| Intent::Set { field, value })
            .collect();
        self.write(id, intents, None, Expect::New).await
    }

    /// One entity; none if it does not exist or is deleted.
    pub async fn get(&self, id: &str) -> Result<Option<T>, Error> {
        Ok(self.load(id).await?.map(|loaded| loaded.value))
    }

    /// One entity with its version, to be edited and saved.
    pub async fn load(&self, id: &str) -> Result<Option<Loaded<T>>, Error> {
        self.workspace.get(&self.name, id).await?.map(to_loaded).transpose()
    }

    /// Runs `change` on a copy and writes what it changed, as an edit of exactly the version
    /// that it saw. Durable when this returns.
    pub async fn update(&self, id: &str, change: impl FnOnce(&mut T)) -> Result<(), Error> {
        let Some(mut loaded) = self.load(id).await? else { return Err(self.missing(id)) };
        let before = loaded.value.clone();
        change(&mut loaded.value);
        self.write_difference(id, &before, &loaded.value, &loaded.version).await
    }

    /// Writes what differs between a value that was loaded before and an edited one. If the
    /// entity changed meanwhile, this merges as the concurrent edit that it is.
    pub async fn save(&self, before: &Loaded<T>, after: &T) -> Result<(), Error> {
        self.write_difference(&before.id, &before.value, after, &before.version).await
    }

    async fn write_difference(&self, id: &str, before: &T, after: &T, version: &str) -> Result<(), Error> {
        let before = to_fields(before)?;
        let intents: Vec<Intent> = to_fields(after)?
            .into_iter()
            .filter(|(field, value)| before.get(field) != Some(value))
            .map(|(field, value)| Intent::Set { field, value })
            .collect();
        if intents.is_empty() {
            return Ok(());
        }
        self.write(id, intents, Some(version), Expect::Existing).await
    }

    /// Deletes an entity. Durable when this returns.
    pub async fn delete(&self, id: &str) -> Result<(), Error> {
        self.write(id, vec![Intent::Delete], None, Expect::Existing).await
    }

    async fn write(
        &self,
        id: &str,
        intents: Vec<Intent>,
        version: Option<&str>,
        expect: Expect,
    ) -> Result<(), Error> {
        let key = EntityKey::new(&*self.name, id)?;
        let based_on = version.and_then(parse_version);
        self.workspace.write(vec![Edit { key, intents, based_on, expect }]).await?;
        Ok(())
    }

    /// Entities that meet a condition.
    pub fn find(&self, filter: Filter) -> Find<T> {
        let query = Query { type_name: self.name.clone(), filters: vec![filter], ..Query::default() };
        Find { workspace: self.workspace.clone(), query, entity: PhantomData }
    }

    /// All entities.
    pub fn all(&self) -> Find<T> {
        let query = Query { type_name: self.name.clone(), ..Query::default() };
        Find { workspace: self.workspace.clone(), query, entity: PhantomData }
    }

    /// Where an entity stands between this device and the relay; none if it does not exist.
    pub async fn sync_status(&self, id: &str) -> Result<Option<crate::SyncStatus>, Error> {
        Ok(self.workspace.get(&self.name, id).await?.map(|record| record.status))
    }

    fn missing(&self, id: &str) -> Error {
        Error::new(Category::NotFound, "not_found", format!("{}/{id} does not exist", self.name))
    }
}

/// A query in the making.
#[must_use]
pub struct Find<T> {
    workspace: Workspace,
    query: Query,
    entity: PhantomData<fn() -> T>,
}

impl<T: Entity> Find<T> {
    /// Another condition.
    pub fn and(mut self, filter: Filter) -> Self {
        self.query.filters.push(filter);
        self
    }

    /// Smallest first.
    pub fn order_by(mut self, field: FieldName<T>) -> Self {
        self.query.order_by = Some((field.name().to_owned(), false));
        self
    }

    /// Largest first.
    pub fn order_by_descending(mut self, field: FieldName<T>) -> Self {
        self.query.order_by = Some((field.name().to_owned(), true));
        self
    }

    /// At most so many.
    pub fn limit(mut self, limit: usize) -> Self {
        self.query.limit = Some(limit);
        self
    }

    /// The result.
    pub async fn list(self) -> Result<Vec<Loaded<T>>, Error> {
        to_values(self.workspace.query(&self.query).await?)
    }

    /// The result, then the result again after each change to it.
    pub fn watch(self) -> BoxStream<Result<Vec<Loaded<T>>, Error>> {
        use futures_util::StreamExt as _;
        Box::pin(self.workspace.watch(self.query).map(|page| page.and_then(to_values)))
    }
}

fn to_values<T: Entity>(page: Page) -> Result<Vec<Loaded<T>>, Error> {
    page.records.into_iter().map(to_loaded).collect()
}

fn to_loaded<T: Entity>(record: Record) -> Result<Loaded<T>, Error> {
    let Record { id, fields, version, type_name, .. } = record;
    let key = EntityKey::new(type_name, id)?;
    let value = from_fields(&key, fields.into_iter().collect())?;
    Ok(Loaded { id: key.id().to_owned(), value, version })
}

/// Ids that sort by when they were made.
pub(crate) fn new_id() -> String {
    uuid::Uuid::now_v7().simple().to_string()
}

pub(crate) fn from_fields<T: Entity>(
    key: &EntityKey,
    fields: serde_json::Map<String, Json>,
) -> Result<T, Error> {
    // Fields that were never written are left out, so that the type's own defaults apply.
    let fields = fields.into_iter().filter(|(_, value)| !value.is_null()).collect();
    serde_json::from_value(Json::Object(fields)).map_err(|error| {
        let message = format!("{key} does not fit the app's type: {error}");
        Error::new(Category::Validation, "wrong_type", message)
            .with_help("mark fields that may be missing with #[serde(default)] or as Option")
    })
}

pub(crate) fn to_fields<T: Entity>(value: &T) -> Result<serde_json::Map<String, Json>, Error> {
    match serde_json::to_value(value) {
        Ok(Json::Object(fields)) => Ok(fields),
        Ok(_) => {
            Err(Error::new(Category::Validation, "wrong_type", "an entity is a struct with named fields"))
        }
        Err(error) => Err(Error::new(Category::Validation, "wrong_type", error.to_string())),
    }
}
