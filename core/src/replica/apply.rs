//! What comes from the relay: the feed, answers, refusals.

use std::collections::{BTreeMap, BTreeSet};

use automerge::ChangeHash;

use super::layout::{OutboxRecord, PendingTx};
use super::outbox::{ChannelState, REMAKES_MAX};
use super::whole::Part;
use super::{Output, Replica};
use crate::admission::{Judge, RefusalCode};
use crate::change::{Change, Origin, Role, TxMark};
use crate::clock::{Now, WallMs};
use crate::entity::{Entity, Pending, Rewritten};
use crate::header::Header;
use crate::id::{EntityHash, EntityKey};
use crate::store::{Batch, Keyspace, StoreError};
use crate::wire::{Ack, CaughtUp, Feed, FeedBody, Refused};

/// How often in a row the feed may stop at own changes that this store lacks. Each time it is asked for in
/// full; some answers to what was asked before may come first.
const OWN_UNKNOWN_MAX: u32 = 16;

/// What is to be taken out of an entity, and made again.
#[derive(Default)]
pub(super) struct Remake {
    /// Refused, with all that builds on it.
    pub(super) gone: BTreeSet<ChangeHash>,
    /// Made again.
    pub(super) again: BTreeSet<ChangeHash>,
    /// Pending changes whose edits the relay has as other changes.
    pub(super) twins: BTreeMap<ChangeHash, ChangeHash>,
    /// What is made again is not dated later than this.
    pub(super) wall: Option<WallMs>,
    /// What the relay found to be dated too late: whatever its clock was measured by is wrong.
    pub(super) late: BTreeSet<ChangeHash>,
    /// Code and message of what is refused.
    pub(super) reasons: BTreeMap<ChangeHash, (String, String)>,
    /// Some of it may have left the device.
    pub(super) new_incarnation: bool,
}

impl Remake {
    /// Changes that may have left the device go, all for one reason.
    pub(super) fn without(gone: BTreeSet<ChangeHash>, code: RefusalCode, why: &str) -> Self {
        let reason = (code.name().to_owned(), why.to_owned());
        let reasons = gone.iter().map(|change| (*change, reason.clone())).collect();
        Self { gone, reasons, new_incarnation: true, ..Self::default() }
    }

    /// Code and message of a change that is gone: its own, or that of what goes with another.
    fn reason(&self, change: &ChangeHash, why: Option<String>) -> (String, String) {
        let own = self.reasons.get(change).cloned();
        own.unwrap_or_else(|| depends_on_refused(why.unwrap_or_default()))
    }
}

/// What an answer says besides what becomes of each change.
#[derive(Default)]
pub(super) struct Answer {
    /// Transactions that can't be saved.
    condemned: BTreeSet<PendingTx>,
    /// Code and message of what is refused for what it is itself.
    pub(super) reasons: BTreeMap<ChangeHash, (String, String)>,
}

/// What a page of the feed did to one entity.
#[derive(Default)]
pub(super) struct Touched {
    changes: Vec<Change>,
    admitted: Vec<u32>,
    pub(super) rewritten: bool,
}

impl Touched {
    pub(super) fn has_admitted(&self) -> bool {
        !self.admitted.is_empty()
    }
}

impl Replica {
    pub(super) fn on_feed(&mut self, now: Now, feed: Feed) -> Result<(), StoreError> {
        let mut batch = Batch::new();
        let mut touched: BTreeMap<EntityHash, Touched> = BTreeMap::new();
        let mut moved = false;
        let mut went_back = false;
        let mut gap = None;
        let mut asked_anew = false;
        let mut schemas = Vec::new();
        for entry in feed.entries {
            // Entries of an earlier request may still be under way.
            let is_next = entry.seq == self.state.cursor + 1
                || (mutated!(AcceptStaleCursor) && entry.seq > self.state.cursor);
            if !is_next {
                if entry.seq > self.state.cursor && self.must_be_next() {
                    gap = Some(entry.seq);
                    break;
                }
                continue;
            }
            match entry.body {
                FeedBody::Changes { unit, .. } => {
                    let parts = self.whole_only(unit)?;
                    // Once in a session: a feed that contradicts itself is read once more, not for ever.
                    if self.channel.granted && !self.channel.repaired && self.contradict(&parts)? {
                        went_back = true;
                        break;
                    }
                    self.admit_known(&mut batch, &parts, &mut touched)?;
                    let edits = self.own_edits(&parts)?;
                    for part in parts {
                        self.take_changes(&mut batch, now, part, &mut touched)?;
                    }
                    for (key, edits) in edits {
                        self.withdraw_refused(&mut batch, &key, &edits)?;
                    }
                }
                FeedBody::Own(list) => {
                    if !self.take_own(&mut batch, list, &mut touched)? {
                        // Own changes that this store does not have: it lost them.
                        asked_anew = true;
                        break;
                    }
                }
                FeedBody::Refused(refused) => {
                    if self.has_admitted(&refused)? {
                        went_back = self.channel.granted && !self.channel.repaired;
                        if went_back {
                            break;
                        }
                        tracing::warn!(
                            entity = refused.id,
                            "the relay refuses what it admitted: not believed"
                        );
                    } else {
                        self.take_refused(&mut batch, now, refused, &mut touched)?;
                    }
                }
                FeedBody::Device { key, name, platform } => {
                    self.put_device(&mut batch, key, &name, &platform)
                }
                FeedBody::Schema { hash } => schemas.push(hash),
            }
            self.state.cursor = entry.seq;
            moved = true;
        }
        if moved {
            self.channel.rereads = false;
            self.channel.own_unknown = 0;
        }
        if asked_anew {
            self.channel.rereads = true;
            self.channel.own_unknown += 1;
            if self.channel.own_unknown <= OWN_UNKNOWN_MAX {
                self.open_feed(true);
            } else if self.channel.granted {
                let seq = self.state.cursor.saturating_add(1);
                self.distrust(format!(
                    "the relay keeps back what entry {seq} of its feed says that this device wrote"
                ));
            }
        }
        if moved {
            if let ChannelState::CatchingUp { .. } = self.channel.state {
                self.channel.state = ChannelState::CatchingUp { cursor: self.state.cursor, end: feed.end };
            }
            for hash in schemas {
                self.schema_in_feed(hash);
            }
            self.displace_twins_of_admitted(&mut batch, now, &mut touched)?;
            self.finish(batch, now, touched)?;
        }
        if went_back {
            reached!(FeedContradicts);
            self.begin_repair(self.state.epoch);
            self.channel.state = ChannelState::CatchingUp { cursor: 0, end: feed.end };
            self.commit(Batch::new())?;
            self.open_feed(true);
        }
        if let Some(seq) = gap {
            self.lacks_entries(seq);
        }
        Ok(())
    }

    /// Whether what comes of the feed goes on where this device is, or lies before that.
    fn must_be_next(&self) -> bool {
        self.channel.granted && !self.channel.rereads && !mutated!(AcceptStaleCursor)
    }

    /// The feed goes on at `seq` though entries before it did not come.
    fn lacks_entries(&mut self, seq: u64) {
        self.distrust(format!(
            "the relay's feed went on with entry {seq}, and entry {} has not come",
            self.state.cursor.saturating_add(1)
        ));
    }

    /// Writes what was touched, in one batch.
    pub(super) fn finish(
        &mut self,
        mut batch: Batch,
        now: Now,
        mut touched: BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        for hash in self.keep_whole(&mut batch, now)? {
            touched.entry(hash).or_default().rewritten = true;
        }
        let mut entities = Vec::with_capacity(touched.len());
        for (hash, what) in touched {
            let Some(loaded) = self.cache.get(&hash) else { continue };
            entities.push(loaded.entity.key().clone());
            self.persist(&mut batch, hash, &what.changes, &what.admitted, what.rewritten, false)?;
        }
        let after = self.commit(batch)?;
        if !entities.is_empty() {
            self.outputs.push_back(Output::Changed { after, entities });
        }
        self.outputs.push_back(Output::Status);
        Ok(())
    }

    fn take_changes(
        &mut self,
        batch: &mut Batch,
        now: Now,
        part: Part,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        let Part { key, genesis, changes: parsed } = part;
        let ty = self.ty(key.type_name()).cloned();
        let hash = self.load(&key)?;
        let origins: Vec<(Origin, ChangeHash)> =
            parsed.iter().map(|change| (change.origin(), change.hash())).collect();
        let mut by_hash: BTreeMap<ChangeHash, Change> =
            parsed.iter().map(|change| (change.hash(), change.clone())).collect();
        self.make_room(batch, now, hash, &parsed, touched)?;
        let entity = &mut self.loaded(hash)?.entity;
        entity.name_containers(&genesis);
        let received = entity.receive(parsed, ty.as_ref(), Judge::Admitted, true);
        for (change, refusal) in &received.refused {
            tracing::warn!(entity = %key, %change, code = refusal.code.name(), %refusal, "a change of the feed can't be applied here");
        }
        self.received += received.applied.len() as u64;
        if !received.applied.is_empty() {
            self.unstall(hash);
            let what = touched.entry(hash).or_default();
            what.changes.extend(received.applied.iter().filter_map(|hash| by_hash.remove(hash)));
        }
        // In a full feed own changes come back whole: those that were pending are admitted.
        self.admitted(batch, hash, &received.known, touched)?;
        self.replace_twins(batch, now, hash, &origins, &received.applied, touched)
    }

    /// Own changes that the relay admitted. `false` if one of them is not known here.
    fn take_own(
        &mut self,
        batch: &mut Batch,
        list: Vec<(String, String, Vec<[u8; 32]>)>,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<bool, StoreError> {
        let mut parts = Vec::with_capacity(list.len());
        for (type_name, id, hashes) in list {
            let Ok(key) = EntityKey::new(type_name, id) else { return Ok(false) };
            let hash = self.load(&key)?;
            let hashes: Vec<ChangeHash> = hashes.into_iter().map(ChangeHash).collect();
            let headers = self.loaded(hash)?.entity.headers();
            if hashes.iter().any(|change| !headers.contains(change)) {
                return Ok(false);
            }
            parts.push((hash, hashes));
        }
        for (hash, hashes) in parts {
            self.admitted(batch, hash, &hashes, touched)?;
        }
        Ok(true)
    }

    pub(super) fn admitted(
        &mut self,
        batch: &mut Batch,
        hash: EntityHash,
        hashes: &[ChangeHash],
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        let places = self.loaded(hash)?.entity.admit(hashes);
        let numbers = self.pending.get(&hash).cloned().unwrap_or_default();
        let mut settled = false;
        for number in numbers {
            if self.outbox.get(&number).is_some_and(|pending| hashes.contains(&pending.hash)) {
                self.delete_outbox(batch, number)?;
                self.sent += 1;
                settled = true;
            }
        }
        if settled {
            self.channel.remakes.remove(&hash);
        }
        if settled || !places.is_empty() {
            self.unstall(hash);
            touched.entry(hash).or_default().admitted.extend(places);
        }
        Ok(())
    }

    pub(super) fn on_ack(&mut self, now: Now, ack: Ack) -> Result<(), StoreError> {
        let Some((numbers, entities)) = self.channel.in_flight.remove(&ack.unit_id) else { return Ok(()) };
        self.channel.answered = self.channel.answered.max(ack.seq);
        self.channel.busy.retain(|entity| !entities.contains(entity));
        let mut refused: BTreeMap<ChangeHash, Refused> =
            ack.refused.into_iter().map(|refused| (ChangeHash(refused.hash), refused)).collect();
        let mut by_entity: BTreeMap<EntityHash, (EntityKey, Vec<ChangeHash>, Vec<Refused>)> = BTreeMap::new();
        for pending in numbers.iter().filter_map(|number| self.outbox.get(number)) {
            let (_, accepted, denied) = by_entity
                .entry(pending.entity)
                .or_insert_with(|| (pending.key.clone(), Vec::new(), Vec::new()));
            match refused.remove(&pending.hash) {
                Some(refusal) => denied.push(refusal),
                None => accepted.push(pending.hash),
            }
        }
        let denied =
            by_entity.iter().flat_map(|(hash, (_, _, denied))| denied.iter().map(|one| (*hash, one)));
        let condemned = self.condemned(denied);
        let mut answer = Answer { condemned, ..Answer::default() };
        // Whatever has one of these codes follows from another.
        let follows =
            [RefusalCode::Transaction, RefusalCode::DependsOnRefused, RefusalCode::MissingDependency];
        let denied = by_entity.values().flat_map(|(_, _, denied)| denied);
        let causes = denied.filter(|refusal| !follows.iter().any(|code| *code as u16 == refusal.code));
        answer.reasons = causes.map(|refusal| (ChangeHash(refusal.hash), reason(refusal))).collect();
        let mut batch = Batch::new();
        let mut touched = BTreeMap::new();
        for (hash, (key, accepted, denied)) in by_entity {
            self.load(&key)?;
            self.admitted(&mut batch, hash, &accepted, &mut touched)?;
            let mut settled = Vec::with_capacity(denied.len());
            for refusal in denied {
                let change = ChangeHash(refusal.hash);
                if !self.offers_again(hash, &change) {
                    settled.push(refusal);
                } else if !self.refused_again(&mut batch, hash, &refusal, &mut touched)? {
                    self.refuse_held(&mut batch, now, hash, refusal, &answer, &mut touched)?;
                }
            }
            // Some of them may have gone with others.
            settled.retain(|refusal| self.is_pending(hash, &ChangeHash(refusal.hash)));
            if !settled.is_empty() {
                self.refuse(&mut batch, now, hash, settled, &answer, &mut touched)?;
            }
        }
        for hash in entities {
            if self.channel.overtaken.remove(&hash) {
                self.unstall(hash);
            }
        }
        self.displace_twins_of_admitted(&mut batch, now, &mut touched)?;
        self.finish(batch, now, touched)
    }

    /// A refusal that came by the feed: of an own change whose answer was lost, or of a change
    /// that came here by another way.
    fn take_refused(
        &mut self,
        batch: &mut Batch,
        now: Now,
        refused: Refused,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        let Ok(key) = EntityKey::new(refused.type_name.clone(), refused.id.clone()) else { return Ok(()) };
        let hash = self.load(&key)?;
        if self.loaded(hash)?.entity.headers().contains(&ChangeHash(refused.hash)) {
            let condemned = self.condemned(std::iter::once((hash, &refused)));
            let answer = Answer { condemned, ..Answer::default() };
            self.refuse_held(batch, now, hash, refused, &answer, touched)?;
        }
        Ok(())
    }

    /// Takes a refused change out of an entity, with what goes with it elsewhere if it is not this device's to send.
    fn refuse_held(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        refused: Refused,
        answer: &Answer,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        let change = ChangeHash(refused.hash);
        let beside = self.held_beside(hash, change)?;
        self.refuse(batch, now, hash, vec![refused], answer, touched)?;
        let is_left = |loaded: &super::Loaded| loaded.entity.headers().contains(&change);
        if !self.cache.get(&hash).is_some_and(is_left) {
            // What waited for it waits for nothing.
            self.unstall(hash);
            self.take_out_beside(batch, now, beside, answer, touched)?;
        }
        Ok(())
    }

    /// Whether a refusal is of a change that the feed has brought as admitted. Either the relay went back since,
    /// or it contradicts itself; taking the change out would lose what can't be written again.
    fn has_admitted(&mut self, refused: &Refused) -> Result<bool, StoreError> {
        let Ok(key) = EntityKey::new(refused.type_name.clone(), refused.id.clone()) else { return Ok(false) };
        let hash = self.load(&key)?;
        let headers = self.loaded(hash)?.entity.headers();
        Ok(headers.by_hash(&ChangeHash(refused.hash)).is_some_and(|header| header.admitted))
    }

    /// The outbox number and the transaction of a pending change that has both.
    fn transaction_of(&self, hash: EntityHash, change: &ChangeHash) -> Option<(u64, PendingTx)> {
        let number = self
            .pending
            .get(&hash)?
            .iter()
            .find(|number| self.outbox.get(number).is_some_and(|pending| pending.hash == *change))?;
        Some((*number, self.outbox.get(number)?.tx?))
    }

    /// Transactions that can't be saved: a member is refused for what it is itself, or is no
    /// longer pending.
    fn condemned<'a>(&self, denied: impl Iterator<Item = (EntityHash, &'a Refused)>) -> BTreeSet<PendingTx> {
        let mut condemned = BTreeSet::new();
        for (hash, refusal) in denied {
            let Some((number, tx)) = self.transaction_of(hash, &ChangeHash(refusal.hash)) else { continue };
            let spread = matches!(
                RefusalCode::from_u16(refusal.code),
                Some(
                    RefusalCode::Transaction
                        | RefusalCode::DependsOnRefused
                        | RefusalCode::MissingDependency
                        | RefusalCode::ClockAhead
                        | RefusalCode::BadSequence
                        | RefusalCode::Superseded
                )
            );
            if !spread || tx.members != self.members(number).count() as u32 {
                condemned.insert(tx);
            }
        }
        condemned
    }

    /// Takes refused changes out of an entity, and writes again what can be. Of condemned transactions nothing is
    /// written again.
    fn refuse(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        denied: Vec<Refused>,
        answer: &Answer,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        let own = self.to_send(hash);
        let condemned = &answer.condemned;
        let curable = |replica: &Self, refusal: &Refused| {
            let change = ChangeHash(refusal.hash);
            let tx = replica.transaction_of(hash, &change).map(|(_, tx)| tx);
            match RefusalCode::from_u16(refusal.code) {
                // What the relay had once goes as it is or not at all.
                _ if !own.contains(&change) => false,
                Some(
                    RefusalCode::MissingDependency
                    | RefusalCode::ClockAhead
                    | RefusalCode::BadSequence
                    | RefusalCode::Superseded,
                ) => true,
                // It is rebuilt with what it depends on, unless it goes with its transaction.
                Some(RefusalCode::DependsOnRefused) => tx.is_none_or(|tx| !condemned.contains(&tx)),
                // Another member only depends on what was refused: all are made again.
                Some(RefusalCode::Transaction) => tx.is_some_and(|tx| !condemned.contains(&tx)),
                _ => false,
            }
        };
        // What is refused for good leaves the outbox, and what waits for another change is not made again, so
        // only rounds without that could go on for ever.
        let settles = denied.iter().any(|refusal| !curable(self, refusal));
        let stalls = |refusal: &Refused| refusal.code == RefusalCode::MissingDependency as u16;
        let remakes = self.channel.remakes.entry(hash).or_default();
        *remakes = if settles { 0 } else { *remakes + u32::from(!denied.iter().all(stalls)) };
        let exhausted = *remakes > REMAKES_MAX;
        let mut remake = Remake { new_incarnation: true, ..Remake::default() };
        let mut waiting = Vec::new();
        for refusal in denied {
            let change = ChangeHash(refusal.hash);
            let code = RefusalCode::from_u16(refusal.code);
            match code {
                // What it builds on is not at the relay now. It may be later.
                Some(RefusalCode::MissingDependency) => {
                    reached!(AckStalled);
                    waiting.push(change);
                    continue;
                }
                // The other change comes by the feed and takes its place.
                Some(RefusalCode::Superseded) if curable(self, &refusal) => {
                    reached!(AckSuperseded);
                    waiting.push(change);
                    continue;
                }
                _ => {}
            }
            if !exhausted && curable(self, &refusal) {
                reached!(AckAgain);
                remake.again.insert(change);
                if code == Some(RefusalCode::ClockAhead) {
                    remake.late.insert(change);
                }
            } else {
                reached!(AckGone);
                remake.gone.insert(change);
            }
            remake.reasons.insert(change, reason(&refusal));
        }
        if !remake.gone.is_empty() || !remake.again.is_empty() {
            remake.wall = (!remake.late.is_empty()).then(|| self.relay_clock(now));
            self.rebuild(batch, now, hash, &remake)?;
            if self.cache.contains_key(&hash) {
                touched.entry(hash).or_default().rewritten = true;
            }
        }
        // What is still what it was.
        let as_sent = |change: &ChangeHash| {
            let number = self.pending_number(hash, change);
            number.is_some_and(|number| self.beside(number).all(|(_, pending)| pending.sent))
        };
        if waiting.iter().any(as_sent) {
            self.channel.stalled.insert(hash);
        }
        Ok(())
    }

    /// Writes pending changes of an entity again that `which` picks by whether they may have
    /// left the device, dated by the clock as it is corrected now. The caller persists the entity.
    pub(super) fn write_again(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        which: impl Fn(bool) -> bool,
    ) -> Result<(), StoreError> {
        let numbers = self.pending.get(&hash).cloned().unwrap_or_default();
        let pending = || numbers.iter().filter_map(|number| self.outbox.get(number));
        let Some(key) = pending().next().map(|pending| pending.key.clone()) else { return Ok(()) };
        let again: BTreeSet<ChangeHash> =
            pending().filter(|pending| which(pending.sent)).map(|pending| pending.hash).collect();
        self.load(&key)?;
        self.rebuild(batch, now, hash, &Remake { again, ..Remake::default() })
    }

    pub(super) fn rebuild(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        remake: &Remake,
    ) -> Result<(), StoreError> {
        let correction = self.correction_ms();
        let relay_clock = self.relay_clock(now);
        let numbers: Vec<u64> = self.pending.get(&hash).cloned().unwrap_or_default().into_iter().collect();
        let mut records = Vec::with_capacity(numbers.len());
        let mut pending = Vec::with_capacity(numbers.len());
        for number in &numbers {
            let mut record = self.read_outbox(*number)?;
            let change = ChangeHash(record.hash);
            let header_wall = self.loaded(hash)?.entity.headers().by_hash(&change).map(|h| h.time.wall());
            let dated = record.sent || record.dated;
            let off = if dated { 0 } else { correction - record.skew_ms };
            let lowered = remake.wall.zip(header_wall).is_some_and(|(wall, written)| written > wall);
            record.dated = dated && !remake.late.contains(&change) && !(lowered && self.channel.clock_unsure);
            pending.push(Pending {
                hash: change,
                intents: record.intents.clone(),
                role: if record.authority { Role::Authority } else { Role::Device },
                tx: record.tx.map(|(id, members)| TxMark { id, members }),
                origin: record.origin(),
                twin: remake.twins.get(&change).copied(),
                wall: match (remake.wall, header_wall) {
                    (Some(wall), Some(written)) => Some(written.min(wall)),
                    (None, Some(written)) if off != 0 => {
                        Some(WallMs(written.0.saturating_add_signed(off)).min(relay_clock))
                    }
                    _ => None,
                },
            });
            records.push(record);
        }
        let loaded = self.loaded(hash)?;
        if remake.new_incarnation {
            loaded.record.rebuilds += 1;
        }
        let record = loaded.record.clone();
        let key = loaded.entity.key().clone();
        let author = self.author(&record);
        let writes = records.iter().any(|record| !record.again);
        let Some(ty) = self.ty(key.type_name()).filter(|_| writes).cloned() else {
            if writes && !(remake.again.is_empty() && remake.twins.is_empty()) {
                return Err(StoreError::Damaged { what: format!("{key} has pending changes and no type") });
            }
            // No type is needed to take something out.
            let left = self.loaded(hash)?.entity.without_all_of(&remake.gone)?;
            self.replace_entity(batch, now, hash, left, remake)?;
            for (number, record) in numbers.into_iter().zip(records) {
                let change = ChangeHash(record.hash);
                if !self.loaded(hash)?.entity.headers().contains(&change) {
                    let reason = remake.reason(&change, None);
                    self.give_up_pending(batch, now, &key, number, record, reason)?;
                }
            }
            return Ok(());
        };
        let rebuilt =
            self.loaded(hash)?.entity.rebuild(&remake.gone, &remake.again, &pending, &ty, author)?;
        self.replace_entity(batch, now, hash, rebuilt.entity, remake)?;
        for ((number, mut record), result) in numbers.into_iter().zip(records).zip(rebuilt.pending) {
            match result {
                Rewritten::Kept(_) => {}
                Rewritten::Replaced => {
                    self.delete_outbox(batch, number)?;
                    self.sent += 1;
                }
                Rewritten::Again { change, intents, .. } => {
                    // An answer that is still under way is about the change that it was.
                    for (sent, _) in self.channel.in_flight.values_mut() {
                        sent.retain(|other| *other != number);
                    }
                    record.origin = Some(record.origin().0);
                    record.hash = change.hash().0;
                    record.bytes = change.weight() as u32;
                    record.intents = intents;
                    record.skew_ms = correction;
                    record.sent = false;
                    self.put_outbox(batch, number, &record)?;
                    let commit = crate::store::CommitNo(self.last_commit.0 + 1);
                    if let Some(pending) = self.outbox.get_mut(&number) {
                        pending.hash = change.hash();
                        pending.bytes = record.bytes as usize;
                        pending.sent = false;
                        // Part of the batch under construction, or of one that is durable.
                        pending.commit = commit;
                    }
                    // It is answered anew, and what travels with it.
                    self.unstall(hash);
                    for member in self.members(number).collect::<Vec<_>>() {
                        self.unstall(member);
                    }
                }
                Rewritten::Gone { old, why } => {
                    let reason = remake.reason(&old, why);
                    self.give_up_pending(batch, now, &key, number, record, reason)?;
                }
            }
        }
        Ok(())
    }

    /// A pending change is gone. Of one that was offered again [`Replica::replace_entity`] tells.
    fn give_up_pending(
        &mut self,
        batch: &mut Batch,
        now: Now,
        key: &EntityKey,
        number: u64,
        record: OutboxRecord,
        reason: (String, String),
    ) -> Result<(), StoreError> {
        self.delete_outbox(batch, number)?;
        if record.again {
            return Ok(());
        }
        self.broke(record.tx);
        self.put_refused(batch, now, key, reason, record.intents, None)
    }

    /// Puts an entity without some of its changes in the place of what it was. The user is told of those that this
    /// device wrote and the relay had once, unless their edits are here by other names.
    fn replace_entity(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        entity: Entity,
        remake: &Remake,
    ) -> Result<(), StoreError> {
        let pending = self.to_send(hash);
        let device = self.config.device;
        let before = std::mem::replace(&mut self.loaded(hash)?.entity, entity);
        let wrote = |entity: &Entity, which: &dyn Fn(&Header) -> bool| {
            let headers = entity.headers();
            let wrote = headers.headers().iter().filter(|header| headers.device(header) == device);
            let hashes = wrote.filter(|header| which(header)).map(|header| header.hash).collect();
            entity.changes(&hashes)
        };
        let entity = &self.loaded(hash)?.entity;
        let lost = wrote(&before, &|header| {
            !header.admitted && !pending.contains(&header.hash) && !entity.headers().contains(&header.hash)
        });
        if lost.is_empty() {
            return Ok(());
        }
        let mut known: BTreeSet<Origin> = wrote(entity, &|_| true).iter().map(Change::origin).collect();
        known.extend(self.lost.get(before.key()).into_iter().flatten().map(|(_, edit)| *edit));
        // Of an edit that was here by two names the user is told once.
        for change in lost.iter().filter(|change| known.insert(change.origin())) {
            let reason = remake.reason(&change.hash(), None);
            self.put_refused(batch, now, before.key(), reason, Vec::new(), Some(change.origin()))?;
        }
        Ok(())
    }

    pub(super) fn on_caught_up(&mut self, now: Now, caught_up: CaughtUp) -> Result<(), StoreError> {
        // A channel that was refused stays so, though the relay still feeds it.
        if !self.channel.granted || caught_up.epoch != self.state.epoch {
            reached!(CaughtUpLate);
            return Ok(());
        }
        // An answer has overtaken the feed: what it admitted counts in the digest here, and not
        // in this one. The next comes with the entries that lie between.
        if caught_up.cursor < self.channel.answered {
            reached!(CaughtUpOvertaken);
            return Ok(());
        }
        // A feed only grows, so this one has lost its end.
        let went_back = caught_up.cursor < self.state.cursor;
        let differs = caught_up.cursor == self.state.cursor && caught_up.digest != self.state.digest;
        if (went_back || differs) && !self.channel.repaired {
            // Either the relay went back and on since, or something is missing here. What the relay
            // has, all of it, tells which.
            reached!(CaughtUpWentBack);
            tracing::warn!(went_back, "the relay holds something else: reading its feed from the start");
            self.begin_repair(caught_up.epoch);
            self.channel.state = ChannelState::CatchingUp { cursor: 0, end: caught_up.cursor };
            self.commit(Batch::new())?;
            self.open_feed(true);
            return Ok(());
        }
        if caught_up.cursor != self.state.cursor {
            reached!(CaughtUpElsewhere);
            if caught_up.cursor > self.state.cursor && self.must_be_next() {
                self.lacks_entries(caught_up.cursor);
            }
            return Ok(());
        }
        self.channel.rereads = false;
        self.channel.diverged = differs;
        if differs {
            tracing::error!("the digest differs from the relay's even after everything was read again");
        }
        if std::mem::take(&mut self.channel.ask_again) {
            reached!(CaughtUpAskAgain);
            self.open_feed(false);
            return Ok(());
        }
        let mut redated = Vec::new();
        if std::mem::take(&mut self.recovering) {
            reached!(CaughtUpRecovered);
            // What the store lost has come. What is still pending has not been sent.
            let mut batch = Batch::new();
            batch.delete(Keyspace::META, self.keys.recovering());
            redated = self.redate(&mut batch, now, true)?;
            // What the relay lacks is looked for in the store.
            self.commit(batch)?;
        }
        if self.repair.reading {
            reached!(CaughtUpRepaired);
            self.offer_again(now)?;
        } else {
            // A relay may go back to just where this device's cursor is, and to an older schema than it was known
            // to have, pushed from here perhaps and never heard of in the feed.
            self.repair.waits_for_schema = self.repair.schema != [0; 32];
            self.look_at_schema();
            self.offer_lacking()?;
            if !self.repair.waits_for_schema {
                self.repair.schema = self.channel.relay_schema.unwrap_or_default();
                self.note_schema(self.repair.schema);
            }
        }
        self.channel.schema_unsure = false;
        reached!(Live);
        self.channel.state = ChannelState::Live;
        if self.outbox.is_empty() {
            self.channel.refusals = 0;
        }
        self.state.synced_ms = self.relay_clock(now).0;
        let after = self.commit(Batch::new())?;
        if !redated.is_empty() {
            self.outputs.push_back(Output::Changed { after, entities: redated });
        }
        self.outputs.push_back(Output::Status);
        Ok(())
    }
}

/// The code and the message of a refusal.
fn reason(refusal: &Refused) -> (String, String) {
    let code = RefusalCode::from_u16(refusal.code).map_or("unknown", RefusalCode::name);
    (code.to_owned(), refusal.message.clone())
}

pub(super) fn depends_on_refused(message: String) -> (String, String) {
    (RefusalCode::DependsOnRefused.name().to_owned(), message)
}
