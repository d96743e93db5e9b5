//! One place for one change, and one change for one edit.
//!
//! A store that went back writes again under the places of what it had written before, and dates again what
//! it had dated before. It learns of that from the relay as it signs in, or, if the relay went back
//! too, only as its lost changes come by the feed, brought by who still had them. What the relay
//! admitted stands. What this device holds in its place is written again if it is this device's own and
//! pending, and is taken out otherwise, with what builds on it and the rest of its transactions.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use automerge::ChangeHash;

use super::apply::{Answer, Remake, Touched, depends_on_refused};
use super::whole::{Part, authors};
use super::{Replica, for_each};
use crate::admission::RefusalCode;
use crate::change::{Change, Origin};
use crate::clock::Now;
use crate::codec::{self, HeaderRecord};
use crate::header::Header;
use crate::id::{Author, DeviceId, EntityHash, EntityKey, Incarnation};
use crate::store::{Batch, Keyspace, StoreError, View};

/// Entities read from the store at once.
const PAGE: usize = 256;

impl Replica {
    /// Whether changes of the feed have places which others have that the relay is known to have admitted:
    /// then it went back, and this is the first that shows of it.
    pub(super) fn contradict(&mut self, parts: &[Part]) -> Result<bool, StoreError> {
        for part in parts {
            let hash = self.load(&part.key)?;
            let headers = self.loaded(hash)?.entity.headers();
            let contradicts = |change: &Change| {
                let places = headers.actor(change.actor()).map(|entry| entry.places.as_slice());
                let place = places.and_then(|places| places.get(change.seq().checked_sub(1)? as usize));
                let header = place.and_then(|place| headers.get(*place));
                header.is_some_and(|header| header.admitted && header.hash != change.hash())
            };
            if part.changes.iter().any(contradicts) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether an entity may have changes that the relay is not known to have.
    fn has_unadmitted(&self, hash: EntityHash) -> bool {
        self.recovering || self.repair.generation > 0 || self.pending.contains_key(&hash)
    }

    /// What a unit brings that is here already is admitted before anything makes room for the rest of it, and does
    /// not go with that.
    pub(super) fn admit_known(
        &mut self,
        batch: &mut Batch,
        parts: &[Part],
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        for part in parts {
            let hash = self.load(&part.key)?;
            if self.has_unadmitted(hash) {
                let coming: Vec<ChangeHash> = part.changes.iter().map(Change::hash).collect();
                self.admitted(batch, hash, &coming, touched)?;
            }
        }
        Ok(())
    }

    /// Frees the places that changes of the feed have in the sequences of their actors.
    pub(super) fn make_room(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        coming: &[Change],
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        if !self.has_unadmitted(hash) {
            return Ok(());
        }
        self.meet_own_lives(hash, coming)?;
        let headers = self.loaded(hash)?.entity.headers();
        let mut taken: BTreeMap<u32, u64> = BTreeMap::new();
        for change in coming.iter().filter(|change| !headers.contains(&change.hash())) {
            if let Some(actor) = headers.actor_place(change.actor()) {
                let seq = taken.entry(actor).or_insert(change.seq());
                *seq = change.seq().min(*seq);
            }
        }
        let in_place = |header: &&Header| {
            !header.admitted && taken.get(&header.actor).is_some_and(|seq| header.seq >= *seq)
        };
        let occupants = headers.headers().iter().filter(in_place).map(|header| header.hash).collect();
        self.displace(batch, now, hash, occupants, touched)
    }

    /// The relay learns of a life when a device signs in, so a life that was lost before it did so again
    /// shows only by what it made.
    fn meet_own_lives(&mut self, hash: EntityHash, coming: &[Change]) -> Result<(), StoreError> {
        let device = self.config.device;
        let headers = self.loaded(hash)?.entity.headers();
        let authors = coming.iter().zip(authors(coming, headers));
        let unknown = authors.filter(|(change, _)| !headers.contains(&change.hash()));
        let lives = unknown.filter_map(|(_, author)| author).filter(|author| author.device == device);
        let newest = lives.map(|author| author.incarnation.store()).max();
        let newer = newest.filter(|newest| *newest >= self.state.incarnation && !mutated!(ReuseIncarnation));
        if let Some(newest) = newer {
            match Incarnation::next_store(self.state.incarnation, newest) {
                Some(next) => self.state.incarnation = next,
                // No change of this device will ever be of such a life, so none is mixed up with it.
                None => {
                    tracing::error!(newest, "the feed has changes of a life that this device can't have had")
                }
            }
        }
        Ok(())
    }

    /// Takes out what is an edit that came by the feed as another change: the store of its author went back
    /// to before it was made again, and it would count twice.
    pub(super) fn replace_twins(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        origins: &[(Origin, ChangeHash)],
        applied: &[ChangeHash],
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        self.replace_own_twins(batch, now, hash, origins, touched)?;
        if self.repair.generation == 0 || applied.is_empty() {
            return Ok(());
        }
        let new = |(_, change): &&(Origin, ChangeHash)| applied.contains(change);
        let origins: Vec<(Origin, ChangeHash)> = origins.iter().filter(new).copied().collect();
        let headers = self.loaded(hash)?.entity.headers();
        let left = headers.headers().iter().filter(|header| !header.admitted).map(|header| header.hash);
        let left: BTreeSet<ChangeHash> = left.collect();
        if left.is_empty() {
            return Ok(());
        }
        let entity = &self.loaded(hash)?.entity;
        let device = |change: &ChangeHash| {
            entity.headers().by_hash(change).map(|header| entity.headers().device(header))
        };
        let replaced = entity.changes(&left).into_iter().filter(|change| {
            origins.iter().any(|(origin, twin)| {
                *origin == change.origin() && *twin != change.hash() && device(twin) == device(&change.hash())
            })
        });
        let replaced = replaced.map(|change| change.hash()).collect();
        self.displace(batch, now, hash, replaced, touched)
    }

    /// The same of whatever was admitted just now, where something is left that others have to bring.
    pub(super) fn displace_twins_of_admitted(
        &mut self,
        batch: &mut Batch,
        now: Now,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        if self.repair.reading {
            return Ok(());
        }
        let admitted = touched.iter().filter(|(_, what)| what.has_admitted()).map(|(hash, _)| *hash);
        let admitted: Vec<EntityHash> = admitted.filter(|hash| self.lacking.contains(hash)).collect();
        for hash in admitted {
            self.displace_twins(batch, now, hash, touched)?;
        }
        Ok(())
    }

    /// Takes out of an entity that is loaded what waits for others to bring it, though its edit was admitted as
    /// another change.
    pub(super) fn displace_twins(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        let pending = self.pending_of(hash);
        let entity = &self.loaded(hash)?.entity;
        let headers = entity.headers();
        let which = |which: &dyn Fn(&Header) -> bool| -> BTreeSet<ChangeHash> {
            headers.headers().iter().filter(|header| which(header)).map(|header| header.hash).collect()
        };
        let left = which(&|header| !header.admitted && !pending.contains(&header.hash));
        let lacks: BTreeSet<DeviceId> =
            left.iter().filter_map(|change| Some(headers.device(headers.by_hash(change)?))).collect();
        let has = which(&|header| header.admitted && lacks.contains(&headers.device(header)));
        if left.is_empty() || has.is_empty() {
            return Ok(());
        }
        let edits = |changes: &BTreeSet<ChangeHash>| {
            let edit = |change: Change| {
                let header = headers.by_hash(&change.hash())?;
                Some(((headers.device(header), change.origin()), change.hash()))
            };
            entity.changes(changes).into_iter().filter_map(edit).collect::<Vec<_>>()
        };
        let admitted: BTreeSet<(DeviceId, Origin)> = edits(&has).into_iter().map(|(edit, _)| edit).collect();
        let twins = edits(&left).into_iter().filter(|(edit, _)| admitted.contains(edit));
        let twins = twins.map(|(_, change)| change).collect();
        self.displace(batch, now, hash, twins, touched)
    }

    /// What of that is pending has to be followed by what builds on it.
    fn replace_own_twins(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        origins: &[(Origin, ChangeHash)],
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        let Some(numbers) = self.pending.get(&hash) else { return Ok(()) };
        let pending = numbers.iter().filter_map(|number| self.outbox.get(number));
        let pending: Vec<(Origin, ChangeHash, bool)> = pending
            .filter(|pending| !pending.again)
            .map(|pending| (pending.origin, pending.hash, pending.sent))
            .collect();
        let device = self.config.device;
        let headers = self.loaded(hash)?.entity.headers();
        let mut remake = Remake::default();
        for (origin, own, sent) in pending {
            remake.new_incarnation |= sent;
            let twin = origins.iter().find(|(other, twin)| *other == origin && *twin != own);
            let Some((_, twin)) = twin else { continue };
            // Nobody else has a say in what this device meant.
            if headers.by_hash(twin).is_none_or(|header| headers.device(header) != device) {
                continue;
            }
            // What the relay has can't be taken out.
            let builds_on = headers.descendants(&BTreeSet::from([own]));
            if !builds_on.iter().any(|hash| headers.by_hash(hash).is_some_and(|header| header.admitted)) {
                remake.twins.insert(own, *twin);
            }
        }
        if remake.twins.is_empty() {
            return Ok(());
        }
        tracing::info!(edits = remake.twins.len(), "the relay has pending edits by other names");
        self.rebuild(batch, now, hash, &remake)?;
        touched.entry(hash).or_default().rewritten = true;
        Ok(())
    }

    /// Takes `roots` out of an entity, in whose places others have come. What of them is this device's to send is
    /// written again.
    fn displace(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        roots: BTreeSet<ChangeHash>,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        if roots.is_empty() {
            return Ok(());
        }
        let own = self.to_send(hash);
        let (mut again, gone): (BTreeSet<ChangeHash>, BTreeSet<ChangeHash>) =
            roots.into_iter().partition(|change| own.contains(change));
        let mut displaced = self.with_transactions(hash, gone)?;
        displaced.entry(hash).or_default();
        for (entity, gone) in displaced {
            tracing::warn!(
                ?entity,
                changes = gone.len(),
                "another change has come in the place of what is here"
            );
            let (code, why) = match entity == hash {
                true => (RefusalCode::BadSequence, "the relay has another change in its place"),
                false => (RefusalCode::Transaction, "the relay has another change in the place of a member"),
            };
            let again = if entity == hash { std::mem::take(&mut again) } else { BTreeSet::new() };
            let below = self.loaded(entity)?.entity.headers().descendants(&gone);
            let mut remake = Remake { again, ..Remake::without(gone, code, why) };
            for change in below {
                let replaced =
                    || depends_on_refused("what it built on was replaced by another change".into());
                remake.reasons.entry(change).or_insert_with(replaced);
            }
            self.take_out(batch, now, entity, &remake, touched)?;
        }
        Ok(())
    }

    /// Takes changes out of an entity that is loaded, and writes others again.
    fn take_out(
        &mut self,
        batch: &mut Batch,
        now: Now,
        hash: EntityHash,
        remake: &Remake,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        self.rebuild(batch, now, hash, remake)?;
        if self.cache.contains_key(&hash) {
            touched.entry(hash).or_default().rewritten = true;
        }
        self.unstall(hash);
        Ok(())
    }

    /// What goes with a change that the relay has refused for good, if that is not this device's to send: what is
    /// held of its transaction, and of those of what builds on it. That it is here at all is left from a feed that
    /// the relay has lost.
    pub(super) fn held_beside(
        &mut self,
        hash: EntityHash,
        refused: ChangeHash,
    ) -> Result<BTreeMap<EntityHash, BTreeSet<ChangeHash>>, StoreError> {
        if self.to_send(hash).contains(&refused) {
            return Ok(BTreeMap::new());
        }
        let mut beside = self.with_transactions(hash, BTreeSet::from([refused]))?;
        if let Some(own) = beside.get_mut(&hash) {
            own.remove(&refused);
        }
        beside.retain(|_, changes| !changes.is_empty());
        Ok(beside)
    }

    /// Takes that out.
    pub(super) fn take_out_beside(
        &mut self,
        batch: &mut Batch,
        now: Now,
        beside: BTreeMap<EntityHash, BTreeSet<ChangeHash>>,
        answer: &Answer,
        touched: &mut BTreeMap<EntityHash, Touched>,
    ) -> Result<(), StoreError> {
        for (entity, mut gone) in beside {
            let Some(loaded) = self.cache.get(&entity) else { continue };
            gone.retain(|change| loaded.entity.headers().contains(change));
            if !gone.is_empty() {
                tracing::warn!(
                    ?entity,
                    changes = gone.len(),
                    "what is left of a refused transaction is taken out"
                );
                let why = "another member of its transaction was refused";
                let mut remake = Remake::without(gone, RefusalCode::Transaction, why);
                // Of what is refused for itself the user reads why.
                for (change, reason) in &mut remake.reasons {
                    if let Some(own) = answer.reasons.get(change) {
                        *reason = own.clone();
                    }
                }
                self.take_out(batch, now, entity, &remake, touched)?;
            }
        }
        Ok(())
    }

    /// What this device wrote and is yet to send, or to hear of.
    pub(super) fn to_send(&self, hash: EntityHash) -> BTreeSet<ChangeHash> {
        let numbers = self.pending.get(&hash).into_iter().flatten();
        let pending = numbers.filter_map(|number| self.outbox.get(number));
        pending.filter(|pending| !pending.again).map(|pending| pending.hash).collect()
    }

    /// `gone` of an entity, with what is left of the transactions that it and all that builds on it are of.
    fn with_transactions(
        &mut self,
        hash: EntityHash,
        gone: BTreeSet<ChangeHash>,
    ) -> Result<BTreeMap<EntityHash, BTreeSet<ChangeHash>>, StoreError> {
        let mut found: BTreeMap<EntityHash, BTreeSet<ChangeHash>> = BTreeMap::new();
        let mut torn = BTreeSet::new();
        let mut open = BTreeMap::from([(hash, gone)]);
        while let Some((entity, gone)) = open.pop_first() {
            let own = self.to_send(entity);
            self.load(&self.key_of(entity)?)?;
            let headers = self.loaded(entity)?.entity.headers();
            let gone: BTreeSet<ChangeHash> = gone
                .into_iter()
                .filter(|change| headers.by_hash(change).is_some_and(|header| !header.admitted))
                .collect();
            let all = headers.descendants(&gone);
            let lost = all.iter().filter(|change| !own.contains(change));
            let of_lost = lost.filter_map(|change| {
                let header = headers.by_hash(change)?;
                Some((headers.device(header), header.tx?.id))
            });
            let more: BTreeSet<(DeviceId, [u8; 16])> = of_lost.filter(|tx| torn.insert(*tx)).collect();
            found.entry(entity).or_default().extend(gone);
            for (sibling, change) in self.members_held(&more)? {
                if !found.get(&sibling).is_some_and(|found| found.contains(&change)) {
                    open.entry(sibling).or_default().insert(change);
                }
            }
        }
        found.retain(|_, gone| !gone.is_empty());
        Ok(found)
    }

    /// The changes of transactions, by author and id, that this store holds, admitted or not.
    fn members_held(
        &self,
        transactions: &BTreeSet<(DeviceId, [u8; 16])>,
    ) -> Result<Vec<(EntityHash, ChangeHash)>, StoreError> {
        let mut held = Vec::new();
        if transactions.is_empty() {
            return Ok(held);
        }
        let store = Arc::clone(&self.store);
        let prefix = self.keys.prefix();
        let mut from = Vec::new();
        loop {
            let page = store.scan(View::Latest, Keyspace::ENTITY, &prefix, &from, PAGE)?;
            for (_, bytes) in &page {
                let record = self.keys.entity_record(&*store, bytes)?;
                let Ok(key) = EntityKey::new(record.type_name, record.id) else { continue };
                let hash = self.hash(&key);
                let device = |header: &Header| {
                    let (_, author) = record.actors.get(header.actor as usize)?;
                    Author::from_bytes(author).map(|author| author.device)
                };
                for_each(&*store, Keyspace::HEADER, &self.keys.headers(hash), |_, bytes| {
                    let header = Header::from(codec::decode::<HeaderRecord>(bytes, "a header")?);
                    let tx = header.tx.and_then(|tx| Some((device(&header)?, tx.id)));
                    if tx.is_some_and(|tx| transactions.contains(&tx)) {
                        held.push((hash, header.hash));
                    }
                    Ok(())
                })?;
            }
            match page.last() {
                Some((key, _)) if page.len() == PAGE => from = [&key[..], &[0]].concat(),
                _ => return Ok(held),
            }
        }
    }
}
