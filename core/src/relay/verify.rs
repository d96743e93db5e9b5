//! Looking at everything that is stored of a workspace: is the feed gap-free, is each change
//! what its hash says, does every entity have the headers of just those changes, and do their
//! heads add up to the digest.

use std::collections::BTreeMap;

use super::entities::Entity;
use super::feed::{self, FeedRecord};
use super::layout::{self, WorkspaceHash, WorkspaceRecord};
use super::workspace;
use crate::change::Change;
use crate::digest::Digest;
use crate::id::{EntityHash, EntityKey, WorkspaceId};
use crate::store::{Keyspace, Store, StoreError, View};

/// Keys read from the store at once.
const SCAN_KEYS: usize = 256;
/// Most faults that are told; a store that has more is lost as a whole.
const FAULTS_MAX: usize = 1_000;

/// What [`verify`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Entities looked at.
    pub entities: u64,
    /// Entries of the feed looked at.
    pub feed_entries: u64,
    /// What is wrong, for people; at most a thousand faults.
    pub faults: Vec<String>,
}

impl Checked {
    fn fault(&mut self, what: impl Into<String>) {
        if self.faults.len() < FAULTS_MAX {
            self.faults.push(what.into());
        }
    }
}

/// Looks at everything that `store` holds of a workspace, in any thread. `progress` hears the
/// number of entities and feed entries that were looked at, now and then.
///
/// `None` where the workspace was written to meanwhile, so that nothing can be said, or where
/// there is none.
///
/// # Errors
/// Those of the store itself, which can't read a value; they name its key.
pub fn verify(
    store: &dyn Store,
    workspace: &WorkspaceId,
    progress: &mut dyn FnMut(u64),
) -> Result<Option<Checked>, StoreError> {
    let hash = WorkspaceHash::of(workspace);
    let Some(before) = workspace::read_record(store, hash)? else { return Ok(None) };
    let checked = check(store, hash, workspace, &before, progress);
    let after = workspace::read_record(store, hash)?;
    if after.is_none_or(|after| (after.feed_end, after.digest) != (before.feed_end, before.digest)) {
        return Ok(None);
    }
    checked.map(Some)
}

fn check(
    store: &dyn Store,
    hash: WorkspaceHash,
    workspace: &WorkspaceId,
    record: &WorkspaceRecord,
    progress: &mut dyn FnMut(u64),
) -> Result<Checked, StoreError> {
    let mut checked = Checked::default();
    let mut fed = check_feed(store, hash, workspace, record.feed_end, &mut checked, progress)?;
    let mut digest = Digest::default();
    let mut from = Vec::new();
    loop {
        let page = store.scan(View::Latest, Keyspace::ENTITY, &hash.0, &from, SCAN_KEYS)?;
        // The records of an entity's actors lie behind its own.
        for (_, value) in page.iter().filter(|(key, _)| key.len() == hash.0.len() + size_of::<EntityHash>()) {
            checked.entities += 1;
            let (record, _) = layout::decode_entity(value)?;
            let Ok(key) = EntityKey::new(record.type_name, record.id) else {
                checked.fault("an entity has no name");
                continue;
            };
            let entity = EntityHash::of(workspace, &key);
            match Entity::load(store, hash, key.clone(), entity) {
                Ok(loaded) => {
                    digest.replace(entity, &[], &loaded.heads());
                    let wanted = fed.remove(&entity).unwrap_or_default();
                    if wanted != loaded.index.len() as u64 {
                        checked.fault(format!(
                            "{key} has {} changes, the feed has {wanted} of it",
                            loaded.index.len()
                        ));
                    }
                }
                Err(StoreError::Damaged { what }) => checked.fault(what),
                Err(error) => return Err(error),
            }
        }
        progress(checked.entities + checked.feed_entries);
        match page.last() {
            Some((key, _)) if page.len() == SCAN_KEYS => from = [&key[..], &[0]].concat(),
            _ => break,
        }
    }
    for lost in fed.values() {
        checked.fault(format!("an entity is missing, of which the feed has {lost} changes"));
    }
    if digest.0 != record.digest {
        checked.fault("the entities don't add up to the digest: some are missing or old");
    }
    Ok(checked)
}

/// Reads the whole feed; returns how many changes of each entity it holds.
fn check_feed(
    store: &dyn Store,
    hash: WorkspaceHash,
    workspace: &WorkspaceId,
    end: u64,
    checked: &mut Checked,
    progress: &mut dyn FnMut(u64),
) -> Result<BTreeMap<EntityHash, u64>, StoreError> {
    let mut fed: BTreeMap<EntityHash, u64> = BTreeMap::new();
    let mut next = 1;
    while next <= end {
        let records = match feed::records(store, hash, next, end) {
            Ok(read) => read,
            Err(StoreError::Damaged { what }) => {
                checked.fault(what);
                next += 1;
                continue;
            }
            Err(error) => return Err(error),
        };
        let last = records.last().map_or(next, |(seq, _)| *seq);
        for (seq, record) in records {
            let FeedRecord::Changes { entities, .. } = record else { continue };
            for entity in entities {
                let Ok(key) = EntityKey::new(entity.type_name, entity.id) else {
                    checked.fault(format!("feed entry {seq} has an entity without a name"));
                    continue;
                };
                *fed.entry(EntityHash::of(workspace, &key)).or_default() += entity.changes.len() as u64;
                for (wanted, bytes) in &entity.changes {
                    if !Change::parse(bytes).is_ok_and(|change| change.hash().0 == *wanted) {
                        checked.fault(format!("feed entry {seq} has a change of {key} with another hash"));
                    }
                }
            }
        }
        checked.feed_entries += last + 1 - next;
        next = last + 1;
        progress(checked.entities + checked.feed_entries);
    }
    Ok(fed)
}
