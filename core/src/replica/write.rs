//! Local edits.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};

use automerge::ChangeHash;

use super::layout::{OutboxRecord, RefusedRecord};
use super::{Output, PendingRef, Replica, version_token};
use crate::change::TxMark;
use crate::clock::Now;
use crate::entity::{EditContext, EditError, Edited, WHOLE_ENTITY};
use crate::id::{EntityHash, EntityKey};
use crate::intent::Intent;
use crate::store::{Batch, CommitNo, StoreError};
use crate::wire::{GrantRole, UNIT_ENTITIES_MAX, UnitLimit, UnitSize};

/// Edits are dated less than this many readings of the clock later than they need be: a sixteenth of a
/// millisecond, less than any edit takes.
const SPREAD_MAX: u16 = 4096;

/// Whether an entity must exist before an edit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Expect {
    /// Created or updated, as it is.
    #[default]
    Any,
    /// It must not exist.
    New,
    /// It must have been created, by whomever. If it is deleted, only its revival is taken.
    Existing,
}

/// One entity's part of a write.
#[derive(Clone, Debug, PartialEq)]
pub struct Edit {
    /// The entity.
    pub key: EntityKey,
    /// What was meant.
    pub intents: Vec<Intent>,
    /// The version that the user saw; none is the present.
    pub based_on: Option<Vec<ChangeHash>>,
    /// Whether it must exist.
    pub expect: Expect,
}

/// What a write came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Durable once this commit is.
    pub commit: CommitNo,
    /// The version of each entity now, in the order of the edits.
    pub versions: Vec<String>,
    /// How many entities changed.
    pub changed: usize,
}

/// Why a write was not made. Nothing of it was.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WriteError {
    /// One of the edits.
    #[error("{0}")]
    Edit(#[from] EditError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The entity exists.
    #[error("{0} exists already; update it, or choose another id")]
    Exists(EntityKey),
    /// The schema has no such type.
    #[error("the schema has no type {name:?}; it has {known}")]
    UnknownType {
        /// The name given.
        name: String,
        /// The names there are.
        known: String,
    },
    /// The grant of this device only reads.
    #[error("this device may only read this workspace; sign in with a token of role writer")]
    ReadOnly,
    /// Larger than the relay takes as one.
    #[error("the transaction has {0}; split it into smaller ones")]
    TooLarge(UnitLimit),
}

impl Replica {
    /// Makes all edits as one transaction: they become visible, durable and synced together,
    /// or none of them. Edits of one entity are merged into one.
    ///
    /// The write may be told to the app when [`Written::commit`] is durable. `checked` is off
    /// only in tests that prove the relay's own checks.
    pub fn write(&mut self, now: Now, edits: &[Edit], checked: bool) -> Result<Written, WriteError> {
        let (state, conflicts, last_commit) = (self.state.clone(), self.conflicts, self.last_commit);
        let mut forgotten = Vec::new();
        let result = self.try_write(now, edits, checked, &mut forgotten);
        if result.is_err() {
            // What was edited in memory and not committed is read again.
            for edit in edits {
                let hash = self.hash(&edit.key);
                self.cache.remove(&hash);
            }
        }
        if result.is_err() && self.last_commit == last_commit {
            // The store has none of it: what was queued would wait for ever, and what was
            // forgotten would never be sent.
            self.unwritten.clear();
            let queued: Vec<u64> =
                self.outbox.range(state.outbox_next..).map(|(number, _)| *number).collect();
            for number in queued {
                self.untrack(number);
            }
            for (number, pending) in forgotten {
                self.track(number, pending);
            }
            self.state = state;
            self.conflicts = conflicts;
        }
        self.trim_cache();
        result
    }

    /// `forgotten` gets what leaves the outbox.
    fn try_write(
        &mut self,
        now: Now,
        edits: &[Edit],
        checked: bool,
        forgotten: &mut Vec<(u64, PendingRef)>,
    ) -> Result<Written, WriteError> {
        if checked && self.role() == GrantRole::Reader {
            return Err(WriteError::ReadOnly);
        }
        self.watch_clock(now);
        let merged = merge(edits)?;
        let limit = UnitLimit { what: "entities", got: merged.len() as u64, max: UNIT_ENTITIES_MAX as u64 };
        if limit.got > limit.max {
            return Err(WriteError::TooLarge(limit));
        }
        let tx =
            (merged.len() > 1).then(|| TxMark { id: self.transaction_id(), members: merged.len() as u32 });
        let mut made: Vec<(EntityHash, Edit, Option<Edited>)> = Vec::with_capacity(merged.len());
        let mut size = UnitSize::default();
        for edit in merged {
            let (hash, edited) = self.edit_one(now, &edit, tx, checked)?;
            if let Some(edited) = &edited {
                let changes = std::slice::from_ref(&edited.change);
                size.add(&self.loaded(hash)?.entity.part(changes));
            }
            made.push((hash, edit, edited));
        }
        // What the relay would never take would be sent to it for ever.
        if let Some(limit) = size.made_again().exceeds() {
            return Err(WriteError::TooLarge(limit));
        }
        // A member that changes nothing is no member: the count rides in every message, so the
        // transaction is made again without it.
        let changed = made.iter().filter(|(_, _, edited)| edited.is_some()).count();
        if tx.is_some() && changed != made.len() && changed > 0 {
            for (hash, ..) in &made {
                self.cache.remove(hash);
            }
            let kept: Vec<Edit> = made
                .iter()
                .filter(|(_, _, edited)| edited.is_some())
                .map(|(_, edit, _)| edit.clone())
                .collect();
            let mut written = self.try_write(now, &kept, checked, forgotten)?;
            written.versions = self.versions(edits)?;
            return Ok(written);
        }
        if changed == 0 {
            return Ok(Written { commit: self.last_commit, versions: self.versions(edits)?, changed: 0 });
        }
        let mut batch = Batch::new();
        let mut touched = Vec::with_capacity(made.len());
        let mut numbers = Vec::with_capacity(made.len());
        for (hash, edit, edited) in made {
            let Some(edited) = edited else { continue };
            touched.push(edit.key.clone());
            if matches!(edit.intents[..], [Intent::Delete]) && tx.is_none() && self.never_left(hash) {
                self.forget(&mut batch, hash, forgotten)?;
                continue;
            }
            numbers.push(self.queue(&mut batch, hash, &edit.key, &edited, tx)?);
            self.persist(&mut batch, hash, &[edited.change], &[], false, true)?;
        }
        let commit = self.commit(batch)?;
        for number in numbers {
            if let Some(pending) = self.outbox.get_mut(&number) {
                pending.commit = commit;
            }
        }
        let versions = self.versions(edits)?;
        self.outputs.push_back(Output::Changed { after: commit, entities: touched });
        self.outputs.push_back(Output::Status);
        Ok(Written { commit, versions, changed })
    }

    fn versions(&mut self, edits: &[Edit]) -> Result<Vec<String>, WriteError> {
        let mut versions = Vec::with_capacity(edits.len());
        for edit in edits {
            let hash = self.load(&edit.key)?;
            versions.push(version_token(&self.loaded(hash)?.entity.heads()));
        }
        Ok(versions)
    }

    fn edit_one(
        &mut self,
        now: Now,
        edit: &Edit,
        tx: Option<TxMark>,
        checked: bool,
    ) -> Result<(EntityHash, Option<Edited>), WriteError> {
        let schema = std::sync::Arc::clone(&self.config.schema);
        let Some(ty) = schema.types.get(edit.key.type_name()) else {
            return Err(WriteError::UnknownType {
                name: edit.key.type_name().to_owned(),
                known: schema.types.keys().cloned().collect::<Vec<_>>().join(", "),
            });
        };
        let (wall, spread) = (self.corrected(now), self.spread());
        let role = self.change_role();
        let hash = self.load(&edit.key)?;
        let author = {
            let record = &self.loaded(hash)?.record;
            let record = record.clone();
            self.author(&record)
        };
        let entity = &mut self.loaded(hash)?.entity;
        let missing = entity.headers().is_empty() || entity.is_deleted();
        match edit.expect {
            Expect::New if !missing => return Err(WriteError::Exists(edit.key.clone())),
            Expect::Existing if entity.headers().is_empty() => {
                return Err(EditError::NotFound(format!("{} does not exist", edit.key)).into());
            }
            _ => {}
        }
        let mut intents = edit.intents.clone();
        // Creating what was deleted brings it back.
        if missing && !entity.headers().is_empty() && edit.expect == Expect::New {
            intents.insert(0, Intent::Revive);
        }
        let context = EditContext {
            ty,
            author,
            role,
            wall,
            spread,
            tx,
            again: None,
            based_on: edit.based_on.as_deref(),
            checked,
        };
        // A fault of the document library costs this edit, not the engine: the entity is read
        // again from the store.
        let edited = catch_unwind(AssertUnwindSafe(|| entity.edit(&context, &intents)));
        let edited =
            edited.unwrap_or_else(|_| Err(EditError::Document("the document library panicked".into())));
        Ok((hash, edited?))
    }

    /// Queues a change that was just made. Returns its number.
    fn queue(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        key: &EntityKey,
        edited: &Edited,
        tx: Option<TxMark>,
    ) -> Result<u64, StoreError> {
        let number = self.state.outbox_next;
        self.state.outbox_next += 1;
        let record = OutboxRecord {
            type_name: key.type_name().to_owned(),
            id: key.id().to_owned(),
            hash: edited.change.hash().0,
            intents: kept(&edited.intents),
            authority: edited.change.note().role == crate::change::Role::Authority,
            tx: tx.map(|tx| (tx.id, tx.members)),
            origin: None,
            skew_ms: self.correction_ms(),
            dated: false,
            // While a session is live the change leaves as soon as it is durable. Marking it in
            // the same commit saves a second one.
            sent: self.channel.is_live() && !self.channel.clock_unsure,
            bytes: edited.change.weight() as u32,
            again: false,
            author: None,
        };
        if record.sent {
            self.state.sent += 1;
        }
        self.put_outbox(batch, number, &record)?;
        self.track(
            number,
            PendingRef {
                entity: hash,
                key: key.clone(),
                hash: edited.change.hash(),
                origin: edited.change.origin(),
                tx: record.transaction(),
                // Set when the batch has its number; until then it can't be sent.
                commit: CommitNo(u64::MAX),
                sent: record.sent,
                mark: self.state.sent,
                bytes: record.bytes as usize,
                again: false,
            },
        );
        Ok(number)
    }

    /// Whether nobody else can know of the entity: none of it was admitted, sent, or shown
    /// together with other entities.
    fn never_left(&self, hash: EntityHash) -> bool {
        let Some(loaded) = self.cache.get(&hash) else { return false };
        let Some(numbers) = self.pending.get(&hash) else { return false };
        // The deletion itself is in the document, and not in the outbox.
        loaded.entity.headers().len() == numbers.len() + 1
            && numbers.iter().filter_map(|n| self.outbox.get(n)).all(|p| !p.sent && p.tx.is_none())
    }

    /// Removes an entity that was created and deleted before anything was sent.
    fn forget(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        forgotten: &mut Vec<(u64, PendingRef)>,
    ) -> Result<(), StoreError> {
        for number in self.pending.get(&hash).cloned().unwrap_or_default() {
            let pending = self.delete_outbox(batch, number)?;
            forgotten.extend(pending.map(|pending| (number, pending)));
        }
        let loaded = self.loaded(hash)?;
        let (key, mut record) = (loaded.entity.key().clone(), loaded.record.clone());
        // Its actor has used these numbers on this device: another life begins after them.
        record.rebuilds += 1;
        self.remove(batch, hash, &key, &record)
    }

    /// See [`EditContext::spread`].
    fn spread(&self) -> u16 {
        let mut hasher = blake3::Hasher::new_keyed(&self.config.seed);
        hasher.update(b"spread");
        let random = hasher.finalize().as_bytes().first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes));
        random % SPREAD_MAX
    }

    fn transaction_id(&mut self) -> [u8; 16] {
        self.transactions += 1;
        let mut hasher = blake3::Hasher::new_keyed(&self.config.seed);
        hasher.update(&self.transactions.to_be_bytes());
        let mut id = [0; 16];
        id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        id
    }

    /// The edit that settles a conflict with `value`. For [`WHOLE_ENTITY`], null confirms the
    /// deletion and anything else brings the entity back.
    pub fn resolution(key: &EntityKey, field: &str, value: serde_json::Value) -> Edit {
        let intent = match (field, value.is_null()) {
            (WHOLE_ENTITY, true) => Intent::Delete,
            (WHOLE_ENTITY, false) => Intent::Revive,
            _ => Intent::Resolve { field: field.to_owned(), value },
        };
        Edit { key: key.clone(), intents: vec![intent], based_on: None, expect: Expect::Existing }
    }

    /// Sends a refused edit again as a new one.
    pub fn retry_refused(&mut self, now: Now, record: &RefusedRecord) -> Result<Written, WriteError> {
        let key = EntityKey::new(record.type_name.clone(), record.id.clone())
            .map_err(|error| EditError::Validation(error.to_string()))?;
        if record.intents.is_empty() {
            let message = format!(
                "what was refused of {key} was forgotten here when the relay had it: write it anew, and dismiss this"
            );
            return Err(EditError::Validation(message).into());
        }
        let edit = Edit { key, intents: record.intents.clone(), based_on: None, expect: Expect::Any };
        self.write(now, &[edit], true)
    }
}

/// What the outbox keeps of what was meant: all of it.
fn kept(intents: &[Intent]) -> Vec<Intent> {
    let forgotten = usize::from(mutated!(ForgetIntent));
    intents[..intents.len().saturating_sub(forgotten).max(1)].to_vec()
}

/// Merges edits of one entity; their order stays.
fn merge(edits: &[Edit]) -> Result<Vec<Edit>, WriteError> {
    let mut places: BTreeMap<&EntityKey, usize> = BTreeMap::new();
    let mut merged: Vec<Edit> = Vec::with_capacity(edits.len());
    for edit in edits {
        match places.get(&edit.key) {
            Some(place) => {
                let first = &mut merged[*place];
                if first.based_on != edit.based_on {
                    let message =
                        format!("{} is edited twice in one transaction, based on two versions", edit.key);
                    return Err(EditError::Validation(message).into());
                }
                first.intents.extend(edit.intents.iter().cloned());
            }
            None => {
                places.insert(&edit.key, merged.len());
                merged.push(edit.clone());
            }
        }
    }
    Ok(merged)
}
