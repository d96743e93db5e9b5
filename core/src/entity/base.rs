//! On which changes an edit is based where there are more of them than a change may name.
//!
//! Whoever edits then sees only some of what was written side by side, and leaves the rest for the next
//! edit: first what stands where the edit writes, so that it takes effect, then the newest.

use std::collections::{BTreeMap, BTreeSet};

use automerge::{ChangeHash, ObjId, ROOT};

use super::Entity;
use super::document::At;
use super::resolve::{Candidate, Reader};
use crate::change::CHANGE_DEPS_MAX;
use crate::intent::Intent;
use crate::schema::{EntityType, FieldKind, Policy, Tie};
use crate::shape::{self, RootKey, TOMBSTONE};

impl Entity {
    /// On how many changes an edit may be based: room is left for containers and for the device's own
    /// previous change.
    pub(super) fn base_max(&self) -> usize {
        CHANGE_DEPS_MAX - 1 - self.genesis.len().min(CHANGE_DEPS_MAX / 2)
    }

    /// As many changes of `version` as an edit may be based on. `at` is the version, none the present.
    pub(super) fn narrowed(
        &self,
        version: &[ChangeHash],
        at: At<'_>,
        ty: &EntityType,
        intents: &[Intent],
    ) -> Vec<ChangeHash> {
        let max = self.base_max();
        let headers = self.headers.headers();
        let mut heads: Vec<u32> = version.iter().filter_map(|head| self.headers.place(head)).collect();
        heads.sort_by_key(|place| {
            let header = &headers[*place as usize];
            let actor = &self.headers.actors()[header.actor as usize].actor;
            std::cmp::Reverse((header.time, actor.to_bytes()))
        });
        let mut wanted = self.wanted(self.reader(at), ty, intents);
        wanted.truncate(max);
        // By what is wanted, the newest that includes it.
        let mut found: Vec<Option<u32>> = vec![None; wanted.len()];
        for head in &heads {
            let past = self.headers.past([*head]);
            for (place, found) in wanted.iter().zip(&mut found) {
                if found.is_none() && past.contains(*place) {
                    *found = Some(*head);
                }
            }
        }
        let mut chosen = BTreeSet::new();
        for head in found.into_iter().flatten().chain(heads) {
            if chosen.len() < max {
                chosen.insert(head);
            }
        }
        let mut base: Vec<ChangeHash> = chosen.iter().map(|place| headers[*place as usize].hash).collect();
        base.sort_unstable();
        base
    }

    /// The changes that hold what stands where the intents write, what counts most first.
    fn wanted(&self, reader: Reader<'_>, ty: &EntityType, intents: &[Intent]) -> Vec<u32> {
        let mut lists = vec![places(reader.candidates(&ROOT, TOMBSTONE), None)];
        let mut registers = BTreeMap::new();
        let mut sequences = BTreeSet::new();
        for intent in intents {
            let Some(name) = intent.field() else { continue };
            let name_of_field = name.split('.').next().unwrap_or(name);
            let group = ty.groups.get(name);
            let Some(field) = ty.fields.get(name_of_field) else {
                registers.extend(group.map(|group| ((name, true), (group.policy, group.tie))));
                continue;
            };
            if let Some((name, group)) = field.group.as_ref().and_then(|name| ty.groups.get_key_value(name)) {
                registers.insert((&**name, true), (group.policy, group.tie));
                continue;
            }
            match (field.kind(), intent) {
                (FieldKind::Register, _) => {
                    registers.insert((name, false), (field.policy, field.tie));
                }
                (FieldKind::Text | FieldKind::List, _) => {
                    sequences.insert(name);
                }
                (FieldKind::Set, Intent::Add { element, .. } | Intent::Remove { element, .. }) => {
                    let Some(obj) = reader.container(name) else { continue };
                    let key = shape::element_to_key(&field.check_element(element).unwrap_or(element.clone()));
                    lists.push(places(reader.candidates(&obj, &key), None));
                }
                (FieldKind::Map, _) => {
                    let key = match intent {
                        Intent::Put { key, .. } => Some(&**key),
                        _ => name.split_once('.').map(|(_, key)| key),
                    };
                    let Some((obj, key)) = reader.container(&field.name).zip(key) else { continue };
                    let shown = reader.entry(field, &obj, key).value;
                    lists.push(places(reader.candidates(&obj, key), shown.as_ref()));
                }
                _ => {}
            }
        }
        for ((name, group), (policy, tie)) in registers {
            lists.extend(registers_of(reader, name, group, policy, tie));
        }
        lists.extend(sequences.into_iter().map(|name| self.wanted_items(reader, name, intents)));
        // In turn, so that no field takes the room of the others.
        let longest = lists.iter().map(Vec::len).max().unwrap_or_default();
        let mut seen = BTreeSet::new();
        let in_turn = (0..longest).flat_map(|nth| lists.iter().filter_map(move |list| list.get(nth)));
        in_turn.copied().filter(|place| seen.insert(*place)).collect()
    }

    /// The changes that inserted what the intents remove from a sequence, or insert behind.
    fn wanted_items(&self, reader: Reader<'_>, field: &str, intents: &[Intent]) -> Vec<u32> {
        let Some(obj) = reader.container(field) else { return Vec::new() };
        let items = self.doc.items(&obj, reader.at);
        // Positions count in the sequence as the intents before left it.
        let mut sequence: Vec<Option<&ObjId>> = items.iter().map(|(_, id)| Some(id)).collect();
        let mut touched = Vec::new();
        for intent in intents.iter().filter(|intent| intent.field() == Some(field)) {
            let (at, delete, insert) = match intent {
                Intent::Splice { at, delete, insert, .. } => (*at, *delete, insert.chars().count()),
                Intent::RemoveItems { at, count, .. } => (*at, *count, 0),
                Intent::Insert { at, items, .. } => (at.unwrap_or(sequence.len()), 0, items.len()),
                _ => continue,
            };
            let start = at.min(sequence.len());
            let end = at.saturating_add(delete).min(sequence.len());
            touched.extend(sequence[start.saturating_sub(1)..end].iter().copied().flatten());
            sequence.splice(start..end, std::iter::repeat_n(None, insert));
        }
        let mut known = BTreeSet::new();
        let changes = touched.into_iter().filter_map(|id| self.headers.place(&self.doc.change_of(id)?));
        changes.filter(|place| known.insert(*place)).collect()
    }
}

/// What stands in a register and in the one that belongs to the other role.
fn registers_of(reader: Reader<'_>, name: &str, group: bool, policy: Policy, tie: Tie) -> [Vec<u32>; 2] {
    let key = |shadow| match group {
        true => RootKey::Group { name, shadow },
        false => RootKey::Field { name, shadow },
    };
    let shown = reader.register(key(false), policy, tie).value;
    [false, true].map(|shadow| places(reader.candidates(&ROOT, &key(shadow).to_key()), shown.as_ref()))
}

/// The changes of candidates: of those that show first, then of the newest.
fn places(mut candidates: Vec<Candidate>, shown: Option<&automerge::ScalarValue>) -> Vec<u32> {
    candidates.sort_by(|a, b| {
        let rank = |candidate: &Candidate| Some(&candidate.scalar) != shown;
        rank(a).cmp(&rank(b)).then_with(|| b.order().cmp(&a.order()))
    });
    candidates.into_iter().map(|candidate| candidate.place).collect()
}
