//! Looking at everything that is stored, a few entities at a time: does each document load, do
//! its headers, row, index entries and conflicts follow from it, and do the heads of all
//! add up to the digest. A checksum can't see that something is missing; this can.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use automerge::ChangeHash;

use super::apply::Remake;
use super::layout::{EntityRecord, RowRecord, from_json};
use super::{Output, Replica, for_each};
use crate::admission::RefusalCode;
use crate::change::Origin;
use crate::clock::Now;
use crate::codec::{self, HeaderRecord};
use crate::digest::Digest;
use crate::entity::Entity;
use crate::header::Header;
use crate::id::{Author, EntityHash, EntityKey};
use crate::rows::index_keys;
use crate::store::{Batch, Keyspace, StoreError, View};

/// What a step found wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Where: an entity, or nothing for what concerns all of them.
    pub entity: Option<EntityKey>,
    /// What, for people.
    pub what: String,
    /// Whether it was mended, or will be by the next sync.
    pub mended: bool,
}

/// What a step of [`Replica::verify`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verified {
    /// Entries looked at: entities first, then rows, index entries and conflicts.
    pub entries: u64,
    /// What was wrong.
    pub faults: Vec<Fault>,
    /// Whether everything was looked at; the next step begins anew.
    pub done: bool,
}

/// How far the look at everything has come.
#[derive(Debug)]
pub(super) struct Scrub {
    stage: Stage,
    /// The first key that was not looked at.
    from: Vec<u8>,
    /// Digest of the entities before it, as the store has them now.
    digest: Digest,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Entities,
    /// What stands for an entity: is there one?
    Derived(Keyspace),
}

impl Stage {
    fn next(self) -> Option<Stage> {
        match self {
            Stage::Entities => Some(Stage::Derived(Keyspace::ROW)),
            Stage::Derived(Keyspace::ROW) => Some(Stage::Derived(Keyspace::INDEX)),
            Stage::Derived(Keyspace::INDEX) => Some(Stage::Derived(Keyspace::CONFLICT)),
            Stage::Derived(_) => None,
        }
    }
}

impl Replica {
    /// Has the next [`Replica::verify`] begin anew.
    pub fn verify_from_start(&mut self) {
        self.scrub = None;
    }

    /// Looks at the next entries, `limit` at most, and goes on from there next time. Other
    /// calls may come between two steps.
    ///
    /// With `mend`, what follows from a document is written anew. A document that can't be
    /// read is removed, so that the next sync with the relay fetches it again; what was not yet
    /// sent of it is kept among the refused changes, as `damaged`. The digest is set to what
    /// is really there, so that the next sync notices what is missing and reads the feed again.
    ///
    /// # Errors
    /// [`StoreError::Damaged`] where the store itself can't read an entry; it names the key.
    pub fn verify(&mut self, now: Now, limit: usize, mend: bool) -> Result<Verified, StoreError> {
        let mut scrub = self.scrub.take().unwrap_or_else(|| Scrub {
            stage: Stage::Entities,
            from: Vec::new(),
            digest: Digest::default(),
        });
        let keyspace = match scrub.stage {
            Stage::Entities => Keyspace::ENTITY,
            Stage::Derived(keyspace) => keyspace,
        };
        let store = Arc::clone(&self.store);
        let page = store.scan(View::Latest, keyspace, &self.keys.prefix(), &scrub.from, limit)?;
        let mut verified = Verified { entries: page.len() as u64, ..Verified::default() };
        let mut batch = Batch::new();
        let mut changed = Vec::new();
        for (key, value) in &page {
            let found = match scrub.stage {
                Stage::Entities => self.check_entity(value, &mut scrub.digest)?,
                Stage::Derived(keyspace) => self.check_derived(keyspace, key, value)?,
            };
            let Some((mut fault, mend_by)) = found else { continue };
            // It was written anew with another, and the store does not show that yet.
            if fault.entity.as_ref().is_some_and(|entity| changed.contains(entity)) {
                continue;
            }
            if mend {
                let entity = fault.entity.as_ref();
                let touched =
                    self.mend(&mut batch, now, keyspace, key, entity, mend_by, &mut scrub.digest)?;
                changed.extend(fault.entity.clone());
                changed.extend(touched);
                fault.mended = true;
            }
            verified.faults.push(fault);
        }
        match page.last() {
            Some((key, _)) if page.len() == limit => scrub.from = [&key[..], &[0]].concat(),
            _ => {
                if scrub.stage == Stage::Entities {
                    verified.faults.extend(self.check_digest(scrub.digest, mend));
                }
                match scrub.stage.next() {
                    Some(stage) => {
                        scrub.stage = stage;
                        scrub.from.clear();
                    }
                    None => verified.done = true,
                }
            }
        }
        self.scrub = (!verified.done).then_some(scrub);
        if mend && !verified.faults.is_empty() {
            let after = self.commit(batch)?;
            self.outputs.push_back(Output::Changed { after, entities: changed });
            self.outputs.push_back(Output::Status);
        }
        self.trim_cache();
        Ok(verified)
    }

    /// Accounts for an entity's admitted heads in the digest, and in that of a look at
    /// everything which has passed the entity.
    pub(super) fn account(
        &mut self,
        hash: EntityHash,
        before: &[automerge::ChangeHash],
        after: &[automerge::ChangeHash],
    ) {
        let mut digest = Digest(self.state.digest);
        if !(mutated!(LeaveOutOfDigest) && hash.0[0] < 16) {
            digest.replace(hash, before, after);
        }
        self.state.digest = digest.0;
        let place = self.keys.entity(hash);
        if let Some(scrub) = &mut self.scrub
            && (scrub.stage != Stage::Entities || place < scrub.from)
        {
            scrub.digest.replace(hash, before, after);
        }
    }

    /// Holds an entity's records against each other.
    fn check_entity(
        &mut self,
        record: &[u8],
        digest: &mut Digest,
    ) -> Result<Option<(Fault, Mend)>, StoreError> {
        let record = self.read_entity(record)?;
        let Ok(key) = EntityKey::new(record.type_name.clone(), record.id.clone()) else {
            return Err(StoreError::Damaged { what: "the record of an entity has no name".into() });
        };
        let hash = self.hash(&key);
        // While a repair of the relay goes on, what an entity was admitted with is being found
        // out, and so is what is shown of it.
        let settled = record.generation == self.repair.generation;
        let heads: Vec<_> = record.admitted_heads.iter().map(|head| automerge::ChangeHash(*head)).collect();
        if settled {
            digest.replace(hash, &[], &heads);
        }
        let fault =
            |what: String, mend| Some((Fault { entity: Some(key.clone()), what, mended: false }, mend));
        if record.headers == 0 {
            return Ok(None);
        }
        let ty = self.ty(key.type_name()).cloned();
        let entity = match self.load_stored(&key, hash, &record, ty.as_ref()) {
            Ok(entity) => entity,
            Err(StoreError::Damaged { what }) => return Ok(fault(what, Mend::Document)),
            Err(error) => return Err(error),
        };
        if !settled {
            return Ok(None);
        }
        if entity.headers().admitted_heads() != heads {
            return Ok(fault("its admitted heads are not those of its headers".into(), Mend::Document));
        }
        if self.needs_writing(&key, hash, &entity, &record)? {
            return Ok(fault("its row, index entries or conflicts are not what it says".into(), Mend::Row));
        }
        Ok(None)
    }

    /// Whether what is shown of an entity is not what its document says.
    fn needs_writing(
        &self,
        key: &EntityKey,
        hash: EntityHash,
        entity: &Entity,
        record: &EntityRecord,
    ) -> Result<bool, StoreError> {
        let Some(ty) = self.ty(key.type_name()) else { return Ok(false) };
        let (row, conflicts) = self.presented(ty, key, hash, entity, record);
        let place = self.keys.row(key);
        let read = |keyspace| match self.keys.get(&*self.store, View::Latest, keyspace, &place) {
            // A part of a large value is missing: the whole has to be written again.
            Err(StoreError::Damaged { .. }) => Ok(None),
            read => read,
        };
        let stored: Option<RowRecord> =
            read(Keyspace::ROW)?.and_then(|bytes| from_json(&bytes, "a row").ok());
        if stored.as_ref() != Some(&row) {
            return Ok(true);
        }
        for entry in index_keys(&self.keys, ty, key, &row) {
            if self.store.get(View::Latest, Keyspace::INDEX, &entry)?.is_none() {
                return Ok(true);
            }
        }
        let stored = match read(Keyspace::CONFLICT)? {
            Some(bytes) => from_json(&bytes, "conflicts").ok(),
            None => Some(Vec::new()),
        };
        Ok(stored != Some(conflicts))
    }

    /// Whether a row, index entry or conflict belongs to an entity.
    fn check_derived(
        &self,
        keyspace: Keyspace,
        key: &[u8],
        value: &[u8],
    ) -> Result<Option<(Fault, Mend)>, StoreError> {
        let entity = match keyspace {
            Keyspace::INDEX => self.keys.parse_index(key, value),
            _ => self.keys.parse_row(key),
        };
        let fault = |what: &str| {
            let fault = Fault { entity: entity.clone(), what: what.to_owned(), mended: false };
            Some((fault, Mend::Entry))
        };
        let Some(entity) = &entity else { return Ok(fault("an entry has no name of an entity")) };
        let place = self.keys.entity(self.hash(entity));
        let record = self.store.get(View::Latest, Keyspace::ENTITY, &place)?;
        let record = record.map(|bytes| self.keys.entity_record(&*self.store, &bytes)).transpose()?;
        if record.is_none_or(|record| record.headers == 0) {
            return Ok(fault("it is shown, but there is no document of it"));
        }
        if keyspace == Keyspace::INDEX
            && let Some(ty) = self.ty(entity.type_name())
        {
            let row = self.keys.get(&*self.store, View::Latest, Keyspace::ROW, &self.keys.row(entity))?;
            // That a row is missing was said of the entity.
            let Some(row) = row else { return Ok(None) };
            let entries = index_keys(&self.keys, ty, entity, &from_json(&row, "a row")?);
            if !entries.iter().any(|entry| entry == key) {
                return Ok(fault("an index finds it by a value that it does not have"));
            }
        }
        Ok(None)
    }

    fn check_digest(&mut self, digest: Digest, mend: bool) -> Option<Fault> {
        if digest.0 == self.state.digest {
            return None;
        }
        if mend {
            // The relay's will differ from it, and the whole feed will be read again.
            self.state.digest = digest.0;
        }
        Some(Fault {
            entity: None,
            what: "the entities don't add up to the digest: some are missing or old".into(),
            mended: mend,
        })
    }

    /// Returns which other entities it changed.
    #[expect(clippy::too_many_arguments, reason = "one call, and all of it is looked at")]
    fn mend(
        &mut self,
        batch: &mut Batch,
        now: Now,
        keyspace: Keyspace,
        place: &[u8],
        entity: Option<&EntityKey>,
        by: Mend,
        passed: &mut Digest,
    ) -> Result<Vec<EntityKey>, StoreError> {
        match (by, entity) {
            (Mend::Row, Some(key)) => {
                let hash = self.load(key)?;
                self.materialise(batch, hash)?;
                // Entries that the row had before are taken to be there.
                let (Some(ty), Some(loaded)) = (self.ty(key.type_name()), self.cache.get(&hash)) else {
                    return Ok(Vec::new());
                };
                let (row, _) = self.presented(ty, key, hash, &loaded.entity, &loaded.record);
                for entry in index_keys(&self.keys, ty, key, &row) {
                    batch.put(Keyspace::INDEX, entry, key.id().as_bytes());
                }
                Ok(Vec::new())
            }
            (Mend::Document, Some(key)) => self.give_up_document(batch, now, key, passed),
            (Mend::Entry, _) | (_, None) => {
                let (store, keys) = (Arc::clone(&self.store), self.keys);
                if keyspace == Keyspace::INDEX {
                    batch.delete(keyspace, place);
                } else {
                    keys.delete(&*store, batch, keyspace, place.to_vec())?;
                }
                Ok(Vec::new())
            }
        }
    }

    /// Removes an entity whose document can't be read. What was pending of it can't be sent any
    /// more: it goes where refused changes are, so that a person can send it again, and so does the
    /// rest of its transactions. Of what the relay had once and is not known to have now the user is told too. Returns which other entities those were of.
    fn give_up_document(
        &mut self,
        batch: &mut Batch,
        now: Now,
        key: &EntityKey,
        passed: &mut Digest,
    ) -> Result<Vec<EntityKey>, StoreError> {
        let hash = self.hash(key);
        let numbers: Vec<u64> = self.pending.get(&hash).into_iter().flatten().copied().collect();
        let sends = self.to_send(hash);
        let mut siblings: BTreeMap<EntityHash, BTreeSet<ChangeHash>> = BTreeMap::new();
        let mut halves: BTreeSet<EntityKey> = BTreeSet::new();
        for number in numbers {
            let pending = self.read_outbox(number)?;
            // Of what may be at the relay, the relay says what became of it.
            for member in self.outbox.values().filter(|_| pending.tx.is_some() && !pending.sent) {
                if member.tx == pending.transaction() && member.entity != hash {
                    siblings.entry(member.entity).or_default().insert(member.hash);
                }
            }
            if pending.again {
                // Nobody takes the others of its transaction without it. Who has all of them brings them.
                let beside = self.beside(number).filter(|(_, other)| other.again && other.entity != hash);
                for number in beside.map(|(number, _)| *number).collect::<Vec<_>>() {
                    let Some(left) = self.delete_outbox(batch, number)? else { continue };
                    self.lacking.insert(left.entity);
                    batch.put(Keyspace::META, self.keys.lacking(left.entity), []);
                    halves.insert(left.key);
                }
                self.delete_outbox(batch, number)?;
                continue;
            }
            let (why, edit) = match pending.sent {
                true => (
                    "the stored document was damaged before the relay was heard to have this; send it again",
                    Some(pending.origin()),
                ),
                false => ("the stored document was damaged before this was sent; send it again", None),
            };
            self.put_refused(batch, now, key, damaged(why), pending.intents, edit)?;
            self.delete_outbox(batch, number)?;
        }
        let mut touched = self.give_up_siblings(batch, now, siblings)?;
        for half in halves {
            if touched.contains(&half) {
                continue;
            }
            match self.load(&half) {
                Ok(hash) => self.materialise(batch, hash)?,
                // It has its own turn.
                Err(StoreError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            }
            touched.push(half);
        }
        let place = self.keys.entity(hash);
        let Some(bytes) = self.store.get(View::Latest, Keyspace::ENTITY, &place)? else { return Ok(touched) };
        let mut record = self.read_entity(&bytes)?;
        let told: BTreeSet<Origin> =
            self.lost.get(key).into_iter().flatten().map(|(_, edit)| *edit).collect();
        let lost = self.own_unadmitted(hash, &record).into_iter().filter(|change| !sends.contains(change));
        for edit in lost.map(|change| Origin::of(&change)).filter(|edit| !told.contains(edit)) {
            let why = damaged("the stored document was damaged before the relay had this again");
            self.put_refused(batch, now, key, why, Vec::new(), Some(edit))?;
        }
        let heads: Vec<_> = record.admitted_heads.iter().map(|head| automerge::ChangeHash(*head)).collect();
        passed.replace(hash, &heads, &[]);
        // What this device wrote under the present incarnation may be known elsewhere, and its
        // numbers must not be used again.
        record.rebuilds += 1;
        self.cache.remove(&hash);
        self.remove(batch, hash, key, &record)?;
        Ok(touched)
    }

    /// What this device wrote of an entity and the relay is not known to have, as far as that can be read.
    fn own_unadmitted(&self, hash: EntityHash, record: &EntityRecord) -> Vec<ChangeHash> {
        let device = self.config.device;
        let current = record.generation == self.repair.generation;
        let author = |header: &Header| Author::from_bytes(&record.actors.get(header.actor as usize)?.1);
        let mut found = Vec::new();
        let read = for_each(&*self.store, Keyspace::HEADER, &self.keys.headers(hash), |_, bytes| {
            let header = Header::from(codec::decode::<HeaderRecord>(bytes, "a header")?);
            let own = author(&header).is_some_and(|author| author.device == device);
            found.extend((own && !(current && header.admitted)).then_some(header.hash));
            Ok(())
        });
        if let Err(error) = read {
            tracing::warn!(%error, "not all that this device wrote of a damaged document can be told");
        }
        found
    }

    /// Takes out changes that are nothing without a member of their transaction.
    fn give_up_siblings(
        &mut self,
        batch: &mut Batch,
        now: Now,
        siblings: BTreeMap<EntityHash, BTreeSet<ChangeHash>>,
    ) -> Result<Vec<EntityKey>, StoreError> {
        let why =
            "a document that was changed with this one was damaged before both were sent; send it again";
        let mut touched = Vec::new();
        for (hash, gone) in siblings {
            let key = self.key_of(hash)?;
            match self.load(&key) {
                Ok(_) => {}
                // It has its own turn.
                Err(StoreError::Damaged { .. }) => continue,
                Err(error) => return Err(error),
            }
            self.rebuild(batch, now, hash, &Remake::without(gone, RefusalCode::Transaction, why))?;
            self.persist(batch, hash, &[], &[], true, false)?;
            touched.push(key);
        }
        Ok(touched)
    }
}

fn damaged(message: &str) -> (String, String) {
    ("damaged".to_owned(), message.to_owned())
}

/// What mends a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mend {
    /// Writing anew what follows from the document.
    Row,
    /// Fetching the document again.
    Document,
    /// Removing the entry.
    Entry,
}
