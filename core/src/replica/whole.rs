//! A transaction is all or nothing on every device, in every commit.
//!
//! When a pending member goes because it was refused, or because written again it means nothing, the
//! others go with it. The relay would refuse them next, and until then people would see half of
//! a transaction. And when a member that comes by the feed can't be taken yet, since the relay
//! went back and on by another way, the others wait with it for the feed to be read from its start.

use std::collections::{BTreeMap, BTreeSet};

use automerge::{ActorId, ChangeHash};

use super::Replica;
use super::apply::Remake;
use crate::admission::RefusalCode;
use crate::change::{Change, Origin};
use crate::clock::Now;
use crate::header::HeaderIndex;
use crate::id::{Author, DeviceId, EntityHash, EntityKey};
use crate::store::{Batch, StoreError};
use crate::wire::{EntityChanges, Unit};

/// What a unit of the feed brings for one entity.
pub(super) struct Part {
    pub(super) key: EntityKey,
    /// Containers that its changes may need.
    pub(super) genesis: Vec<(String, u8)>,
    pub(super) changes: Vec<Change>,
}

/// A transaction: its author and its id, as anyone can write the id of another's. Whose a change is that
/// builds on what is not here may not be known; it counts to all that have the id.
type Transaction = (Option<DeviceId>, [u8; 16]);

fn is_torn(torn: &BTreeSet<Transaction>, tx: &Transaction) -> bool {
    torn.contains(tx) || torn.contains(&(None, tx.1))
}

impl Part {
    fn parse(entity: EntityChanges) -> Option<Self> {
        let Ok(key) = EntityKey::new(entity.type_name, entity.id) else {
            tracing::warn!("the feed names an entity that has no valid name");
            return None;
        };
        let mut changes = Vec::with_capacity(entity.changes.len());
        for bytes in &entity.changes {
            match Change::parse(bytes) {
                Ok(change) => changes.push(change),
                Err(error) => {
                    tracing::warn!(entity = %key, %error, "the feed carries a change that can't be read")
                }
            }
        }
        Some(Self { key, genesis: entity.genesis, changes })
    }

    /// The transaction of each change, in their order.
    fn transactions(&self, headers: &HeaderIndex) -> Vec<Option<Transaction>> {
        let authors = authors(&self.changes, headers).into_iter();
        let transaction = |(change, author): (&Change, Option<Author>)| {
            Some((author.map(|author| author.device), change.note().tx?.id))
        };
        self.changes.iter().zip(authors).map(transaction).collect()
    }
}

/// Who wrote each change, in their order, where that is known: an actor's first change says it.
pub(super) fn authors(changes: &[Change], headers: &HeaderIndex) -> Vec<Option<Author>> {
    let mut begun: BTreeMap<&ActorId, Author> = BTreeMap::new();
    let author = |change| {
        begun.extend(Change::author(change).map(|author| (change.actor(), author)));
        let known = headers.actor(change.actor()).map(|entry| entry.author);
        known.or_else(|| begun.get(change.actor()).copied())
    };
    changes.iter().map(author).collect()
}

impl Replica {
    /// A unit of the feed without the transactions of which a member builds on what is not here.
    pub(super) fn whole_only(&mut self, unit: Unit) -> Result<Vec<Part>, StoreError> {
        let mut parts: Vec<Part> = unit.entities.into_iter().filter_map(Part::parse).collect();
        let mut torn = BTreeSet::new();
        // What builds on a member that waits has to wait too.
        while self.tears_more(&parts, &mut torn)? {}
        if !torn.is_empty() {
            tracing::info!(transactions = torn.len(), "a part of a transaction can't be taken yet");
            for part in &mut parts {
                let hash = self.load(&part.key)?;
                let mut transactions = part.transactions(self.loaded(hash)?.entity.headers()).into_iter();
                let mut waits = || transactions.next().flatten().is_some_and(|tx| is_torn(&torn, &tx));
                part.changes.retain(|_| !waits());
            }
        }
        Ok(parts)
    }

    /// The edits of this device that come, by whatever names, and the names of the changes as if they were the
    /// first for their edits. Nothing where nothing was told that they could take back, nor will be by this unit.
    pub(super) fn own_edits(
        &mut self,
        parts: &[Part],
    ) -> Result<Vec<(EntityKey, BTreeSet<Origin>)>, StoreError> {
        let mut edits = Vec::new();
        if !self.recovering && self.repair.generation == 0 && self.lost.is_empty() {
            return Ok(edits);
        }
        let device = self.config.device;
        for part in parts {
            let hash = self.load(&part.key)?;
            let authors = authors(&part.changes, self.loaded(hash)?.entity.headers());
            let changes = part.changes.iter().zip(authors);
            let own = changes.filter(|(_, author)| author.is_some_and(|author| author.device == device));
            let own = own.flat_map(|(change, _)| [change.origin(), Origin::of(&change.hash())]);
            edits.push((part.key.clone(), own.collect()));
        }
        Ok(edits)
    }

    /// Adds transactions of which a member builds on what is not here, or on one of `torn`. Whether there were
    /// any.
    fn tears_more(&mut self, parts: &[Part], torn: &mut BTreeSet<Transaction>) -> Result<bool, StoreError> {
        let before = torn.len();
        for part in parts.iter().filter(|part| part.changes.iter().any(|change| change.note().tx.is_some())) {
            let hash = self.load(&part.key)?;
            let entity = &mut self.loaded(hash)?.entity;
            entity.name_containers(&part.genesis);
            let mut with: BTreeSet<ChangeHash> = BTreeSet::new();
            for (change, tx) in part.changes.iter().zip(part.transactions(entity.headers())) {
                if entity.has_deps_of(change, &with) && tx.is_none_or(|tx| !is_torn(torn, &tx)) {
                    with.insert(change.hash());
                } else {
                    torn.extend(tx);
                }
            }
        }
        Ok(torn.len() > before)
    }

    /// Notes that a pending member of a transaction is gone.
    pub(super) fn broke(&mut self, tx: Option<([u8; 16], u32)>) {
        self.broken.extend(tx.map(|(id, _)| id));
    }

    /// Takes out what is left of transactions that lost a member. Returns the entities that were
    /// rebuilt.
    pub(super) fn keep_whole(
        &mut self,
        batch: &mut Batch,
        now: Now,
    ) -> Result<BTreeSet<EntityHash>, StoreError> {
        let mut rebuilt = BTreeSet::new();
        while let Some(tx) = self.broken.pop_first() {
            reached!(TransactionGone);
            let mut left: BTreeMap<EntityHash, (EntityKey, BTreeSet<ChangeHash>)> = BTreeMap::new();
            for pending in self.outbox.values().filter(|pending| !pending.again) {
                if pending.tx.is_some_and(|pending| pending.id == tx) {
                    let entity = left.entry(pending.entity);
                    entity.or_insert_with(|| (pending.key.clone(), BTreeSet::new())).1.insert(pending.hash);
                }
            }
            for (hash, (key, gone)) in left {
                self.load(&key)?;
                let why = "another member of its transaction was refused";
                let numbers = self.pending.get(&hash).into_iter().flatten();
                let new_incarnation =
                    numbers.filter_map(|number| self.outbox.get(number)).any(|pending| pending.sent);
                let remake =
                    Remake { new_incarnation, ..Remake::without(gone, RefusalCode::Transaction, why) };
                self.rebuild(batch, now, hash, &remake)?;
                self.unstall(hash);
                rebuilt.insert(hash);
            }
        }
        Ok(rebuilt)
    }
}
