//! The schema of a workspace at the relay: stored as its text, pushed by those who manage it.

use std::collections::BTreeMap;

use super::cut;
use super::feed::FeedRecord;
use super::layout::{SchemaRecord, WorkspaceHash};
use super::workspace::Draft;
use crate::codec;
use crate::genesis::Genesis;
use crate::schema::{EntityType, Schema, Severity};
use crate::store::{Keyspace, Store, StoreError, View};
use crate::wire::Hash;

/// Longest schema file in bytes; a longer one is refused as a problem of the push.
const SCHEMA_BYTES_MAX: usize = 512 * 1024;
/// Most problems that one answer lists; more are counted.
const PROBLEMS_MAX: usize = 100;
/// Longest description of one problem.
const PROBLEM_BYTES_MAX: usize = 1024;

/// A schema that devices of the workspace are held to.
#[derive(Debug)]
pub(super) struct Published {
    pub(super) hash: Hash,
    parts: u32,
    schema: Schema,
    /// By type and field: making them costs more than judging with them.
    genesis: BTreeMap<String, BTreeMap<String, Genesis>>,
}

impl Published {
    fn new(schema: Schema, hash: Hash, parts: u32) -> Self {
        let genesis = schema
            .types
            .values()
            .map(|ty| (ty.name.clone(), Genesis::all(ty).into_iter().map(|g| (g.field.clone(), g)).collect()))
            .collect();
        Self { hash, parts, schema, genesis }
    }

    /// Reads the schema of a workspace.
    pub(super) fn load(store: &dyn Store, workspace: WorkspaceHash) -> Result<Option<Self>, StoreError> {
        let Some(bytes) = store.get(View::Latest, Keyspace::SCHEMA, &workspace.0)? else { return Ok(None) };
        let record: SchemaRecord = codec::decode(&bytes, "the record of a schema")?;
        let source = read_source(store, workspace, record.parts)?;
        let schema = parse(&source)
            .map_err(|problems| StoreError::Damaged { what: format!("a schema: {}", problems.join("; ")) })?;
        Ok(Some(Self::new(schema, record.hash, record.parts)))
    }

    /// The text that was pushed.
    pub(super) fn source(&self, store: &dyn Store, workspace: WorkspaceHash) -> Result<String, StoreError> {
        read_source(store, workspace, self.parts)
    }

    /// A type with its containers.
    pub(super) fn of(&self, type_name: &str) -> Option<(&EntityType, &BTreeMap<String, Genesis>)> {
        Some((self.schema.types.get(type_name)?, self.genesis.get(type_name)?))
    }
}

fn read_source(store: &dyn Store, workspace: WorkspaceHash, parts: u32) -> Result<String, StoreError> {
    let bytes = codec::get_large(store, View::Latest, Keyspace::SCHEMA, &workspace.0, parts)?;
    String::from_utf8(bytes).map_err(|_| StoreError::Damaged { what: "a schema is no text".into() })
}

/// Checks a pushed schema and puts it into `draft`. `Ok(None)` means that it is the one in
/// force already; an error says why it can't be.
pub(super) fn push(
    current: Option<&Published>,
    source: &str,
    workspace: WorkspaceHash,
    draft: &mut Draft,
) -> Result<Option<Published>, Vec<String>> {
    if source.len() > SCHEMA_BYTES_MAX {
        return Err(vec![format!("the schema has {} bytes, {SCHEMA_BYTES_MAX} are allowed", source.len())]);
    }
    let schema = parse(source)?;
    let hash = schema.hash();
    if let Some(current) = current {
        if current.hash == hash {
            return Ok(None);
        }
        let breaks = breaking(&current.schema, &schema);
        if !breaks.is_empty() {
            return Err(breaks);
        }
    }
    let parts_before = current.map_or(0, |current| current.parts);
    let parts =
        codec::put_large(&mut draft.batch, Keyspace::SCHEMA, &workspace.0, source.as_bytes(), parts_before);
    draft.batch.put(Keyspace::SCHEMA, workspace.0, codec::encode(&SchemaRecord { hash, parts }));
    draft.append(&FeedRecord::Schema { hash });
    Ok(Some(Published::new(schema, hash, parts)))
}

/// Bounds what goes into an answer.
fn bounded(problems: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut problems = problems.into_iter();
    let mut listed: Vec<String> = problems
        .by_ref()
        .take(PROBLEMS_MAX)
        .map(|problem| cut(&problem, PROBLEM_BYTES_MAX).to_owned())
        .collect();
    let more = problems.count();
    if more > 0 {
        listed.push(format!("and {more} more"));
    }
    listed
}

/// Reads a schema file. Errors are its problems, for people.
fn parse(source: &str) -> Result<Schema, Vec<String>> {
    Schema::parse(source, "schema.toml")
        .map_err(|errors| bounded(errors.errors.iter().map(ToString::to_string)))
}

/// What devices with the old schema could not live with.
fn breaking(old: &Schema, new: &Schema) -> Vec<String> {
    let changes = old.compatibility(new).into_iter();
    bounded(changes.filter(|change| change.severity == Severity::Breaking).map(|change| change.text))
}
