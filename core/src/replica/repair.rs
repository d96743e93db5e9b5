//! A relay that went back: noticed, and repaired from what this device holds.
//!
//! A relay that was restored from an older copy, or replaced by an empty one, shows by a new epoch
//! of its feed, by a feed that ends before this device's cursor, or by another digest at the same
//! cursor. Then a new *generation* begins: nothing counts as admitted any more, and the feed is
//! read from its start, which says what the relay still has. What it has not is put into the outbox
//! as it is, same bytes and same hash: a device brings what it wrote itself; an authority or admin
//! brings what anyone wrote, as the relay takes their word for it. What neither can bring is counted
//! until whoever wrote it has been there.
//!
//! Every step is durable before the next relies on it. If one is cut short, it is done again: the
//! feed goes on from the cursor, and what the outbox has already is not put there twice.

use std::collections::{BTreeMap, BTreeSet};

use automerge::ChangeHash;

use super::Replica;
use super::apply::Touched;
use crate::admission::{RefusalCode, Vouches};
use crate::change::Change;
use crate::header::Header;
use crate::id::EntityHash;
use crate::store::{Batch, Keyspace, StoreError};
use crate::wire::{GrantRole, Refused};

/// Most schemas of the relay that are remembered.
const SCHEMAS_MAX: usize = 256;

impl Replica {
    /// From now on nothing counts as admitted but what the feed of `epoch` brings from its start.
    /// The caller commits.
    pub(super) fn begin_repair(&mut self, epoch: [u8; 16]) {
        tracing::warn!("the relay went back: finding out what it lacks");
        self.channel.repaired = true;
        self.channel.rereads = true;
        self.repair.generation += 1;
        self.repair.reading = true;
        self.repair.waits_for_schema = self.repair.schema != [0; 32];
        self.state.epoch = epoch;
        self.state.cursor = 0;
        self.state.digest = [0; 32];
        // Entities learn of their generation when they are loaded.
        self.cache.clear();
        // A look at everything begins anew with the digest.
        self.scrub = None;
    }

    pub(super) fn is_offered_again(&self, number: u64) -> bool {
        self.outbox.get(&number).is_some_and(|pending| pending.again)
    }

    /// Whether a change waits to be offered again.
    pub(super) fn offers_again(&self, hash: EntityHash, change: &ChangeHash) -> bool {
        self.number_again(hash, change).is_some()
    }

    pub(super) fn is_pending(&self, hash: EntityHash, change: &ChangeHash) -> bool {
        self.pending_number(hash, change).is_some()
    }

    fn number_again(&self, hash: EntityHash, change: &ChangeHash) -> Option<u64> {
        let number = self.pending_number(hash, change);
        number.filter(|number| self.is_offered_again(*number))
    }

    pub(super) fn pending_number(&self, hash: EntityHash, change: &ChangeHash) -> Option<u64> {
        let is_it = |number: &&u64| self.outbox.get(number).is_some_and(|pending| pending.hash == *change);
        self.pending.get(&hash)?.iter().find(is_it).copied()
    }

    /// Deals with the answer that a change which was offered again is refused, where that is not for good. What
    /// is for good the feed tells, whatever the answer.
    pub(super) fn refused_again(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        refusal: &Refused,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<bool, StoreError> {
        let change = ChangeHash(refusal.hash);
        let Some(number) = self.number_again(hash, &change) else { return Ok(false) };
        if refusal.code == RefusalCode::Superseded as u16 && self.is_here_again(hash, &change)? {
            return Ok(false);
        }
        match RefusalCode::from_u16(refusal.code) {
            // Who has what it builds on, or the schema that it was written by, may bring that yet; a clock may be
            // set right; the same edit by another name comes by the feed.
            Some(
                RefusalCode::MissingDependency
                | RefusalCode::ClockAhead
                | RefusalCode::UnknownField
                | RefusalCode::Superseded,
            ) => {
                self.channel.stalled.insert(hash);
                touched.entry(hash).or_default();
            }
            // Its operations are numbered after some that the relay may not have yet. Those that came beside it
            // count from now on.
            Some(RefusalCode::BadSequence) => {
                self.channel.stalled.insert(hash);
                if touched.entry(hash).or_default().has_admitted() {
                    self.channel.overtaken.insert(hash);
                }
            }
            // This device lost the right to speak for it, and for what goes with it, or to write at all. Others
            // may have it.
            Some(RefusalCode::ForgedAuthor | RefusalCode::ForgedRole | RefusalCode::Forbidden) => {
                let beside =
                    self.beside(number).filter(|(_, pending)| pending.again).map(|(number, _)| *number);
                let gone: BTreeSet<u64> = beside.chain([number]).collect();
                for number in gone {
                    let Some(pending) = self.delete_outbox(batch, number)? else { continue };
                    self.load(&pending.key)?;
                    self.lacking.insert(pending.entity);
                    batch.put(Keyspace::META, self.keys.lacking(pending.entity), []);
                    touched.entry(pending.entity).or_default();
                }
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Whether the edit of a change is here, admitted, as another one: it came while nobody knew that the relay had
    /// gone back.
    fn is_here_again(&mut self, hash: EntityHash, change: &ChangeHash) -> Result<bool, StoreError> {
        let entity = &self.loaded(hash)?.entity;
        let headers = entity.headers();
        let Some(device) = headers.by_hash(change).map(|header| headers.device(header)) else {
            return Ok(false);
        };
        let of_device = headers.headers().iter().filter(|header| headers.device(header) == device);
        let admitted = of_device.filter(|header| header.admitted).map(|header| header.hash).collect();
        let edit = entity.changes(&BTreeSet::from([*change])).first().map(Change::origin);
        Ok(entity.changes(&admitted).iter().any(|other| Some(other.origin()) == edit))
    }

    /// The relay has more of an entity: what waited for that is tried again, with what travels
    /// with it.
    pub(super) fn unstall(&mut self, hash: EntityHash) {
        let mut open = vec![hash];
        while let Some(next) = open.pop() {
            if self.channel.stalled.remove(&next) {
                let numbers = self.pending.get(&next).into_iter().flatten();
                open.extend(numbers.flat_map(|number| self.members(*number)));
            }
        }
    }

    /// Sees whether the relay still lacks something of an entity that others have to bring.
    pub(super) fn note_lacking(&mut self, batch: &mut Batch, hash: EntityHash) {
        if !self.lacking.contains(&hash) || self.repair.reading {
            return;
        }
        let pending = self.pending_of(hash);
        let lacks = |header: &Header| !header.admitted && !pending.contains(&header.hash);
        let lacks =
            self.cache.get(&hash).is_some_and(|loaded| loaded.entity.headers().headers().iter().any(lacks));
        if !lacks {
            self.lacking.remove(&hash);
            batch.delete(Keyspace::META, self.keys.lacking(hash));
        }
    }

    pub(super) fn pending_of(&self, hash: EntityHash) -> BTreeSet<ChangeHash> {
        let numbers = self.pending.get(&hash).into_iter().flatten();
        numbers.filter_map(|number| self.outbox.get(number)).map(|pending| pending.hash).collect()
    }

    pub(super) fn vouches(&self) -> Option<Vouches> {
        match self.role() {
            GrantRole::Reader => None,
            GrantRole::Writer => Some(Vouches::Own),
            GrantRole::Admin => Some(Vouches::Devices),
            GrantRole::Authority => Some(Vouches::Anyone),
        }
    }

    /// Whether the relay lost the schema too. Who may push it does, if it is the one that was lost.
    pub(super) fn look_at_schema(&mut self) {
        let lost = self.repair.schema;
        self.end_wait_for_schema();
        let manages = matches!(self.role(), GrantRole::Admin | GrantRole::Authority);
        if self.repair.waits_for_schema && manages && self.config.schema.hash() == lost {
            self.exchange_schema(true);
        }
    }

    /// Ends the wait for a schema that the relay lost, unless the one that it has is an older one.
    fn end_wait_for_schema(&mut self) {
        let has = self.channel.relay_schema.unwrap_or_default();
        // Where the relay has none at all, it says so of each change, and takes none.
        self.repair.waits_for_schema &= has != [0; 32] && self.is_older(has, self.repair.schema);
        if !self.repair.waits_for_schema && has != [0; 32] {
            self.repair.schema = has;
        }
    }

    /// Whether the relay had a schema before it had another.
    fn is_older(&self, schema: [u8; 32], than: [u8; 32]) -> bool {
        let place = |hash| self.schemas.iter().position(|known| *known == hash);
        match (place(schema), place(than)) {
            (Some(schema), Some(than)) => schema < than,
            (known, _) => known.is_some(),
        }
    }

    /// Writes down that the feed tells of a schema. One that a relay still has after it went back keeps its place
    /// among the others; one that it gets again is its newest.
    pub(super) fn note_schema(&mut self, hash: [u8; 32]) {
        let known = self.schemas.contains(&hash);
        if hash == [0; 32] || self.schemas.last() == Some(&hash) || (known && self.repair.reading) {
            return;
        }
        self.schemas.retain(|known| *known != hash);
        self.schemas.push(hash);
        let surplus = self.schemas.len().saturating_sub(SCHEMAS_MAX);
        self.schemas.drain(..surplus);
        self.schemas_changed = true;
    }
}
