//! Taking refused changes out of an entity.
//!
//! A new change can't undo a refused one: it would build on it, and be refused too. So the
//! document is built again without the refused changes and all that builds on them, and the
//! author's own pending edits among those are made again from their intents, under a new
//! incarnation: no (actor, seq) is ever used twice.

use std::collections::{BTreeMap, BTreeSet};

use automerge::ChangeHash;
use automerge::legacy::{Key, ObjectId, OpId, OpType};

use super::document::Document;
use super::{Again, EditContext, Entity, LoadError};
use crate::change::{Change, Origin, Role, TxMark};
use crate::clock::{Hlc, WallMs};
use crate::id::Author;
use crate::intent::Intent;
use crate::schema::{EntityType, FieldKind};

/// One of the author's own changes that the relay has not admitted yet.
#[derive(Clone, Debug)]
pub struct Pending {
    /// The change.
    pub hash: ChangeHash,
    /// What it means.
    pub intents: Vec<Intent>,
    /// In which role it was written.
    pub role: Role,
    /// Its transaction.
    pub tx: Option<TxMark>,
    /// Which edit it makes.
    pub origin: Origin,
    /// What its time shall be if it is written again; none keeps the time that it has.
    pub wall: Option<WallMs>,
    /// The same edit as the relay has it, a change of the entity that does not build on this one and
    /// takes its place.
    pub twin: Option<ChangeHash>,
}

/// What became of one pending change.
#[derive(Clone, Debug)]
pub enum Rewritten {
    /// It does not build on what was refused and stays as it is.
    Kept(ChangeHash),
    /// It was made again.
    Again {
        /// What it was.
        old: ChangeHash,
        /// What it is now.
        change: Box<Change>,
        /// Its intents, with positions as they are now.
        intents: Vec<Intent>,
    },
    /// The relay has the same edit by another name.
    Replaced,
    /// It was refused itself, or means nothing without what was refused.
    Gone {
        /// What it was.
        old: ChangeHash,
        /// Why, unless it was refused itself.
        why: Option<String>,
    },
}

/// An entity without the refused changes.
#[derive(Clone, Debug)]
pub struct Rebuilt {
    /// The entity.
    pub entity: Entity,
    /// The author's pending changes, in their order.
    pub pending: Vec<Rewritten>,
}

impl Entity {
    /// Builds the entity again without `refused` and what builds on it. `pending` are the own
    /// changes not yet admitted, in order; those that build on what was refused or has a twin, and
    /// those named in `again`, are made again by `author`. Its incarnation must be new unless none
    /// of them ever left the device.
    pub fn rebuild(
        &self,
        refused: &BTreeSet<ChangeHash>,
        again: &BTreeSet<ChangeHash>,
        pending: &[Pending],
        ty: &EntityType,
        author: Author,
    ) -> Result<Rebuilt, LoadError> {
        let replaced = pending.iter().filter(|own| own.twin.is_some()).map(|own| own.hash);
        let roots = refused.union(again).copied().chain(replaced).collect();
        let gone = self.headers.descendants(&roots);
        let mut entity = self.without(&gone)?;
        let mut results = Vec::with_capacity(pending.len());
        // An edit that is made again stays between those that the device made before and after it.
        let own =
            entity.headers.headers().iter().filter(|header| entity.headers.device(header) == author.device);
        let mut kept: Vec<Hlc> = own.map(|header| header.time).collect();
        kept.sort_unstable();
        let mut newest_again = Hlc::ZERO;
        // Where each change that is gone has its place in the new document.
        let mut stands_for: BTreeMap<ChangeHash, Vec<ChangeHash>> = BTreeMap::new();
        let mut ids: BTreeMap<(u64, Vec<u8>), OpId> = BTreeMap::new();
        for own in pending {
            if !gone.contains(&own.hash) {
                results.push(Rewritten::Kept(own.hash));
                continue;
            }
            let Some(header) = self.headers.by_hash(&own.hash) else {
                results.push(Rewritten::Gone { old: own.hash, why: Some("its change is not known".into()) });
                continue;
            };
            let old_base: Vec<ChangeHash> =
                header.deps.iter().filter_map(|dep| self.headers.get(*dep)).map(|h| h.hash).collect();
            let new_base = entity.newest_of(old_base.iter().flat_map(|dep| match stands_for.get(dep) {
                Some(places) => places.clone(),
                None => vec![*dep],
            }));
            if refused.contains(&own.hash) {
                stands_for.insert(own.hash, new_base);
                results.push(Rewritten::Gone { old: own.hash, why: None });
                continue;
            }
            let old_raw = self.doc.change(&own.hash);
            if let Some(twin) = own.twin {
                if let (Some(old), Some(new)) = (old_raw, self.doc.change(&twin)) {
                    pair_inserts(&old, &new, &mut ids);
                }
                stands_for.insert(own.hash, vec![twin]);
                results.push(Rewritten::Replaced);
                continue;
            }
            let intents = self.moved(&own.intents, ty, &old_base, &entity, &new_base, &ids);
            let before = kept.partition_point(|time| *time <= header.time);
            let before = before.checked_sub(1).map_or(Hlc::ZERO, |last| kept[last]);
            let context = EditContext {
                ty,
                author,
                role: own.role,
                wall: own.wall.unwrap_or(header.time.wall()),
                // The same in every life of the device.
                spread: 0,
                tx: own.tx,
                again: Some(Again { origin: own.origin, after: before.max(newest_again) }),
                based_on: Some(&new_base),
                checked: true,
            };
            match entity.edit(&context, &intents) {
                Ok(Some(edited)) => {
                    if let Some(old) = old_raw {
                        pair_inserts(&old, edited.change.raw(), &mut ids);
                    }
                    newest_again = newest_again.max(edited.change.time());
                    stands_for.insert(own.hash, vec![edited.change.hash()]);
                    results.push(Rewritten::Again {
                        old: own.hash,
                        change: Box::new(edited.change),
                        intents: edited.intents,
                    });
                }
                Ok(None) => {
                    stands_for.insert(own.hash, new_base);
                    results.push(Rewritten::Gone {
                        old: own.hash,
                        why: Some("it changes nothing any more".into()),
                    });
                }
                Err(error) => {
                    stands_for.insert(own.hash, new_base);
                    results.push(Rewritten::Gone { old: own.hash, why: Some(error.to_string()) });
                }
            }
        }
        Ok(Rebuilt { entity, pending: results })
    }

    /// The entity without some changes and all that builds on them.
    pub(crate) fn without_all_of(&self, roots: &BTreeSet<ChangeHash>) -> Result<Entity, LoadError> {
        self.without(&self.headers.descendants(roots))
    }

    /// The entity without some changes; they must include all their descendants.
    fn without(&self, gone: &BTreeSet<ChangeHash>) -> Result<Entity, LoadError> {
        let fail = |what: String| LoadError { entity: self.key.clone(), what };
        let mut entity = Entity {
            workspace: self.workspace.clone(),
            key: self.key.clone(),
            doc: Document::new(),
            headers: crate::header::HeaderIndex::new(),
            genesis: self.genesis.clone(),
            begun: BTreeSet::new(),
            weight: 0,
            proved: false,
        };
        let kept = self.headers.headers().iter().filter(|header| !gone.contains(&header.hash));
        let changes = self.raw_changes(|hash| !gone.contains(hash));
        let mut parsed = Vec::with_capacity(changes.len());
        for (header, raw) in kept.zip(changes) {
            let change = Change::from_raw(raw).map_err(|error| fail(error.to_string()))?;
            if change.hash() != header.hash {
                return Err(fail(format!("lacks the change {}", header.hash)));
            }
            entity.headers.push(&change, self.headers.author(header), header.admitted);
            parsed.push(change);
        }
        entity.apply(&parsed).map_err(|_| fail("does not hold its own changes".into()))?;
        Ok(entity)
    }

    /// The changes among `hashes` that no other of them builds on.
    fn newest_of(&self, hashes: impl Iterator<Item = ChangeHash>) -> Vec<ChangeHash> {
        let places = hashes.filter_map(|hash| self.headers.place(&hash)).collect();
        let newest = self.headers.newest_of(&places);
        newest.iter().rev().filter_map(|place| self.headers.get(*place)).map(|header| header.hash).collect()
    }

    /// Intents with their positions carried over: what stood before position 7 may now stand
    /// elsewhere, or be gone.
    pub(super) fn moved(
        &self,
        intents: &[Intent],
        ty: &EntityType,
        old_base: &[ChangeHash],
        new: &Entity,
        new_base: &[ChangeHash],
        ids: &BTreeMap<(u64, Vec<u8>), OpId>,
    ) -> Vec<Intent> {
        // Positions of one edit build on each other, so each sequence is replayed as a list of
        // elements: those that were there by their place in the new document, new ones as none.
        let mut sequences: BTreeMap<&str, Vec<Option<usize>>> = BTreeMap::new();
        let mut result = Vec::with_capacity(intents.len());
        for intent in intents {
            let Some(name) = intent.field().filter(|name| {
                ty.fields.get(*name).is_some_and(|f| matches!(f.kind(), FieldKind::Text | FieldKind::List))
            }) else {
                result.push(intent.clone());
                continue;
            };
            let sequence = sequences
                .entry(name)
                .or_insert_with(|| self.element_places(name, old_base, new, new_base, ids));
            match intent {
                Intent::Splice { field, at, delete, insert } => {
                    let (start, runs) = stretch(sequence, *at, *delete);
                    let come = insert.chars().count();
                    replace(sequence, *at, *delete, start, runs.iter().map(|(_, count)| count).sum(), come);
                    let splice =
                        |at, delete, insert| Intent::Splice { field: field.clone(), at, delete, insert };
                    let (first, later) = match runs.split_first() {
                        Some(((_, first), later)) => (*first, later),
                        None => (0, &[][..]),
                    };
                    // The last first: the positions of the others stay.
                    result.extend(later.iter().rev().map(|(at, count)| splice(*at, *count, String::new())));
                    let lost = usize::from(mutated!(LoseInserted));
                    let insert = insert.chars().skip(lost).collect();
                    result.push(splice(start, first, insert));
                }
                Intent::RemoveItems { field, at, count } => {
                    let (start, runs) = stretch(sequence, *at, *count);
                    replace(sequence, *at, *count, start, runs.iter().map(|(_, count)| count).sum(), 0);
                    let remove = |(at, count)| Intent::RemoveItems { field: field.clone(), at, count };
                    result.extend(runs.into_iter().rev().map(remove));
                }
                Intent::Insert { field, at: Some(at), items } => {
                    let (start, _) = stretch(sequence, *at, 0);
                    replace(sequence, *at, 0, start, 0, items.len());
                    result.push(Intent::Insert {
                        field: field.clone(),
                        at: Some(start),
                        items: items.clone(),
                    });
                }
                other => result.push(other.clone()),
            }
        }
        result
    }

    /// For each element of a sequence in an old version, its position in the new one; none
    /// for an element that is gone.
    fn element_places(
        &self,
        field: &str,
        old_base: &[ChangeHash],
        new: &Entity,
        new_base: &[ChangeHash],
        ids: &BTreeMap<(u64, Vec<u8>), OpId>,
    ) -> Vec<Option<usize>> {
        let old_ids = self.element_ids(field, old_base);
        let new_ids = new.element_ids(field, new_base);
        let places: BTreeMap<(u64, Vec<u8>), usize> =
            new_ids.into_iter().enumerate().map(|(place, id)| (id, place)).collect();
        old_ids
            .into_iter()
            .map(|id| {
                let id = match ids.get(&id) {
                    Some(again) => (again.counter(), again.actor().to_bytes().to_vec()),
                    None => id,
                };
                places.get(&id).copied()
            })
            .collect()
    }

    /// The ids of a sequence's elements in a version. An empty version means none.
    fn element_ids(&self, field: &str, at: &[ChangeHash]) -> Vec<(u64, Vec<u8>)> {
        let Some(obj) = self.doc.container(field, None) else { return Vec::new() };
        if at.is_empty() {
            return Vec::new();
        }
        let items = self.doc.items(&obj, Some(at)).into_iter();
        items
            .filter_map(|(_, id)| match id {
                automerge::ObjId::Id(counter, actor, _) => Some((counter, actor.to_bytes().to_vec())),
                automerge::ObjId::Root => None,
            })
            .collect()
    }
}

/// Where a stretch of the old sequence lies in the new one: its start, and the runs (position, count)
/// of its elements that are still there. Between them may stand what was removed in the old one.
fn stretch(sequence: &[Option<usize>], at: usize, count: usize) -> (usize, Vec<(usize, usize)>) {
    let at = at.min(sequence.len());
    let end = at.saturating_add(count).min(sequence.len());
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for place in sequence[at..end].iter().copied().flatten() {
        match runs.last_mut() {
            Some((start, count)) if *start + *count == place => *count += 1,
            _ => runs.push((place, 1)),
        }
    }
    let behind = || sequence[..at].iter().rev().flatten().next().map_or(0, |place| place + 1);
    (runs.first().map_or_else(behind, |(start, _)| *start), runs)
}

/// Carries the replay on: `come` new elements at `start` in place of `gone` ones.
fn replace(
    sequence: &mut Vec<Option<usize>>,
    at: usize,
    count: usize,
    start: usize,
    gone: usize,
    come: usize,
) {
    let at = at.min(sequence.len());
    let end = at.saturating_add(count).min(sequence.len());
    sequence.splice(at..end, (start..start + come).map(Some));
    for place in sequence.iter_mut().skip(at + come).flatten() {
        *place = (*place + come).saturating_sub(gone);
    }
}

/// Notes which element of the new change stands for which of the old one. Both insert the
/// same elements in the same order.
fn pair_inserts(old: &automerge::Change, new: &automerge::Change, ids: &mut BTreeMap<(u64, Vec<u8>), OpId>) {
    let inserted = |change: &automerge::Change| -> Vec<OpId> {
        let expanded = change.decode();
        let start = expanded.start_op.get();
        expanded
            .operations
            .iter()
            .enumerate()
            .filter(|(_, op)| {
                op.insert
                    && matches!(op.action, OpType::Put(_))
                    && matches!((&op.obj, &op.key), (ObjectId::Id(_), Key::Seq(_)))
            })
            .map(|(place, _)| OpId::new(start + place as u64, &expanded.actor_id))
            .collect()
    };
    for (old, new) in inserted(old).into_iter().zip(inserted(new)) {
        ids.insert((old.counter(), old.actor().to_bytes().to_vec()), new);
    }
}
