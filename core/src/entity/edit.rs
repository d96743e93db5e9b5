//! From intents to a change.

use std::collections::BTreeMap;

use automerge::{ChangeHash, ObjId, ROOT, ScalarValue};
use serde_json::Value as Json;

use super::Entity;
use super::document::{Commit, Step};
use super::resolve::{Candidate, Life, Reader, compare_numbers, register_key};
use crate::admission::{INCREMENT_MAX, derived_actor};
use crate::change::{
    CHANGE_BYTES_MAX, CHANGE_KEY_BYTES_MAX, Change, EDIT_OPS_MAX, Note, Origin, Role, TxMark,
};
use crate::clock::{Hlc, WallMs};
use crate::columns;
use crate::genesis::{Genesis, GenesisKind};
use crate::header::{DEVICE_ACTORS_MAX, Header};
use crate::id::{Author, DeviceId, EntityKey};
use crate::intent::Intent;
use crate::schema::{EntityType, Field, FieldKind, Policy, Tie};
use crate::shape::{self, RootKey, TOMBSTONE};
use crate::wire::ENTITY_BYTES_MAX;

/// Everything that an edit needs to know beside the entity.
#[derive(Clone, Copy, Debug)]
pub struct EditContext<'a> {
    /// The entity's type.
    pub ty: &'a EntityType,
    /// Who edits.
    pub author: Author,
    /// In which role.
    pub role: Role,
    /// The corrected wall clock.
    pub wall: WallMs,
    /// By how many readings of the clock the edit is dated later than it need be. Drawn anew whenever a
    /// store is opened, so that a store that is opened twice does not make the same change of two
    /// edits.
    pub spread: u16,
    /// The transaction.
    pub tx: Option<TxMark>,
    /// The edit that is made again; none is a new one.
    pub again: Option<Again>,
    /// The version that the user saw; none is the present, an empty one is the entity before
    /// its first change.
    pub based_on: Option<&'a [ChangeHash]>,
    /// Whether rules of the schema and the role are checked. Off only in tests that prove the
    /// relay's own check.
    pub checked: bool,
}

/// An edit that is made again.
#[derive(Clone, Copy, Debug)]
pub struct Again {
    /// Which edit it is.
    pub origin: Origin,
    /// The date of the device's last edit before it.
    pub after: Hlc,
}

/// A change that was made, and what it means.
#[derive(Clone, Debug)]
pub struct Edited {
    /// The change.
    pub change: Change,
    /// Its intents, assignments to whole containers written as what they changed.
    pub intents: Vec<Intent>,
}

/// Why an edit was not made. Nothing was changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EditError {
    /// It breaks a rule of the schema.
    #[error("{0}")]
    Validation(String),
    /// The field waits for a person.
    #[error("{field} is in conflict; resolve it before writing to it")]
    Conflict {
        /// The field or group.
        field: String,
    },
    /// The entity is deleted, or was never created.
    #[error("{0}")]
    NotFound(String),
    /// The version named is none of this entity's.
    #[error("the version is not one of {0}; read it again and use the version that comes with it")]
    UnknownVersion(String),
    /// Larger than a change may be.
    #[error("the edit takes {bytes} bytes, more than {CHANGE_BYTES_MAX}; split it")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// More operations than a change may have.
    #[error("the edit takes {operations} operations, more than {EDIT_OPS_MAX}; split it")]
    TooManyOperations {
        /// How many.
        operations: usize,
    },
    /// More than an entity may hold.
    #[error("{entity} would hold {bytes} bytes, more than {ENTITY_BYTES_MAX}; go on in a new one")]
    Full {
        /// The entity.
        entity: EntityKey,
        /// What it would hold.
        bytes: usize,
    },
    /// A fault of the document library.
    #[error("the document refused the edit: {0}")]
    Document(String),
}

fn invalid<T>(message: impl Into<String>) -> Result<T, EditError> {
    Err(EditError::Validation(message.into()))
}

impl Entity {
    /// Makes one change of the intents, or none where nothing would change. The change is in
    /// the document and the header index when this returns.
    pub fn edit(
        &mut self,
        context: &EditContext<'_>,
        intents: &[Intent],
    ) -> Result<Option<Edited>, EditError> {
        let heads = self.headers.heads();
        let seen = match context.based_on {
            Some(base) => {
                if base.iter().any(|head| !self.headers.contains(head)) {
                    return Err(EditError::UnknownVersion(self.key.to_string()));
                }
                let mut sorted = base.to_vec();
                sorted.sort_unstable();
                sorted.dedup();
                (sorted != heads).then_some(sorted)
            }
            None => None,
        };
        let intents = expand(&self.reader(seen.as_deref()), context.ty, intents)?;
        self.begin_containers(context.ty, &intents)?;
        self.check_life(context, &intents, &self.reader(seen.as_deref()))?;
        let version = seen.as_deref().unwrap_or(&heads);
        let time = self.time_of(context, version);
        let narrowed = (version.len() > self.base_max())
            .then(|| self.narrowed(version, seen.as_deref(), context.ty, &intents));
        let (base, intents) = match narrowed {
            Some(base) => {
                let moved = self.moved(&intents, context.ty, version, self, &base, &BTreeMap::new());
                let own = self.own_previous(version, context).filter(|own| !base.contains(own));
                (Some(base.into_iter().chain(own).collect()), moved)
            }
            None => (seen, intents),
        };
        let (isolated, previous) = match base {
            Some(base) => {
                let mut base = self.with_containers(context.ty, base, &intents);
                let own = self.own_previous(&base, context);
                // Each change names its actor's previous one.
                base.extend(own.filter(|own| !base.contains(own)));
                (Some(base), own)
            }
            None => (None, self.own_newest(context).map(|header| header.hash)),
        };
        let intents = &intents[..];
        let steps = self.plan(context, intents, isolated.as_deref(), time)?;
        if steps.is_empty() {
            return Ok(None);
        }
        if context.checked && previous.is_none() && self.headers.is_full_of(context.author.device) {
            // The relay would refuse it.
            return invalid(format!(
                "this device has edited {} {DEVICE_ACTORS_MAX} times on versions that lacked its own edits; \
                 read it again and edit the version that comes with it",
                self.key
            ));
        }
        let revives = intents.iter().any(|intent| matches!(intent, Intent::Revive));
        let note = Note {
            role: context.role,
            revives,
            tx: context.tx,
            origin: context.again.map(|again| again.origin),
        };
        let change = self.commit(context.author, isolated.as_deref(), note, time, steps)?;
        self.headers.push(&change, context.author, false);
        self.weight += change.bytes().len();
        Ok(Some(Edited { change, intents: intents.to_vec() }))
    }

    fn time_of(&self, context: &EditContext<'_>, base: &[ChangeHash]) -> Hlc {
        let mut after = base
            .iter()
            .filter_map(|head| self.headers.by_hash(head))
            .map(|h| h.time)
            .fold(Hlc::ZERO, Hlc::max);
        // What this device says later counts as later, whatever version it is based on: edits of earlier versions
        // have actors of their own.
        after = after.max(match &context.again {
            Some(again) => again.after,
            None => self.newest_of_device(context.author.device),
        });
        Hlc::at_least(context.wall, after).later_by(context.spread)
    }

    /// The date of a device's last edit.
    fn newest_of_device(&self, device: DeviceId) -> Hlc {
        let actors = self.headers.actors().iter().filter(|entry| entry.author.device == device);
        let newest = actors.filter_map(|entry| self.headers.get(entry.newest()?));
        newest.map(|header| header.time).fold(Hlc::ZERO, Hlc::max)
    }

    /// The newest change of the author's first actor.
    fn own_newest(&self, context: &EditContext<'_>) -> Option<&Header> {
        let actor = context.author.actor(&self.workspace, &self.key);
        self.headers.get(self.headers.actor(&actor)?.newest()?)
    }

    /// Puts the containers that the intents need into the document.
    fn begin_containers(&mut self, ty: &EntityType, intents: &[Intent]) -> Result<(), EditError> {
        for name in intents.iter().filter_map(Intent::field) {
            let name = name.split('.').next().unwrap_or(name);
            if self.begun.contains(name) {
                continue;
            }
            if let Some(genesis) = self.container_of(ty, name) {
                self.doc.apply(vec![genesis.change().clone()]).map_err(EditError::Document)?;
                self.begun.insert(name.to_owned());
            }
        }
        Ok(())
    }

    /// A version that also includes the containers which the intents need.
    fn with_containers(
        &self,
        ty: &EntityType,
        mut base: Vec<ChangeHash>,
        intents: &[Intent],
    ) -> Vec<ChangeHash> {
        let mut missing: Vec<ChangeHash> = intents
            .iter()
            .filter_map(Intent::field)
            .filter_map(|field| self.container_of(ty, field.split('.').next().unwrap_or(field)))
            .filter(|genesis| !self.is_begun_at(&genesis.field, &base))
            .map(|genesis| genesis.hash)
            .collect();
        missing.sort_unstable();
        missing.dedup();
        base.extend(missing);
        base
    }

    /// The container that holds a field. A peer may have named one where the type has none.
    fn container_of(&self, ty: &EntityType, field: &str) -> Option<&Genesis> {
        let kind = ty.fields.get(field).and_then(|field| GenesisKind::of(field.kind()))?;
        self.genesis.get(field).filter(|genesis| genesis.kind == kind)
    }

    fn is_begun_at(&self, field: &str, at: &[ChangeHash]) -> bool {
        self.doc.container(field, Some(at)).is_some() || self.doc.value(field, Some(at)).is_some()
    }

    /// The newest change in a version of the actor that will write an edit of it. None where the edit
    /// begins an actor.
    fn own_previous(&self, version: &[ChangeHash], context: &EditContext<'_>) -> Option<ChangeHash> {
        let actor = context.author.actor(&self.workspace, &self.key);
        let past = self.reader(None).version(version);
        (0..)
            .map_while(|level| self.headers.actor(&derived_actor(&actor, level))?.newest())
            .find(|newest| past.contains(*newest))
            .and_then(|newest| self.headers.get(newest))
            .map(|header| header.hash)
    }

    fn plan(
        &self,
        context: &EditContext<'_>,
        intents: &[Intent],
        at: Option<&[ChangeHash]>,
        time: Hlc,
    ) -> Result<Vec<Step>, EditError> {
        let reader = self.reader(at);
        let mut plan = Plan {
            context,
            reader,
            time,
            steps: Vec::new(),
            groups: BTreeMap::new(),
            written: BTreeMap::new(),
            elements: BTreeMap::new(),
            lengths: BTreeMap::new(),
            key: self.key.to_string(),
        };
        for intent in intents {
            plan.intent(intent)?;
        }
        plan.finish_groups()?;
        if self.creates(at) && context.checked {
            plan.check_required(intents)?;
        }
        Ok(plan.steps)
    }

    /// Whether an edit of this version begins the entity. Nothing of it is there then, or only
    /// containers.
    fn creates(&self, at: Option<&[ChangeHash]>) -> bool {
        self.headers.is_empty() || at.is_some_and(|at| !at.iter().any(|head| self.headers.contains(head)))
    }

    fn check_life(
        &self,
        context: &EditContext<'_>,
        intents: &[Intent],
        reader: &Reader<'_>,
    ) -> Result<(), EditError> {
        let deletes = intents.iter().any(|intent| matches!(intent, Intent::Delete));
        let revives = intents.iter().any(|intent| matches!(intent, Intent::Revive));
        if deletes && intents.len() > 1 {
            return invalid("a deletion stands alone: make other edits before it or leave them out");
        }
        let reference = context.ty.is_server_only() && context.role != Role::Authority;
        if context.checked && (deletes || revives) && reference {
            return invalid(format!(
                "{} is reference data: only an authority deletes it or brings it back",
                context.ty.name
            ));
        }
        if self.creates(reader.at) {
            return if deletes || revives {
                Err(EditError::NotFound(format!("{} does not exist", self.key)))
            } else {
                Ok(())
            };
        }
        match reader.life() {
            Life::Alive => Ok(()),
            // Deleting again confirms a deletion that swallowed edits.
            Life::Deleted { lost, .. } if deletes && !lost.is_empty() => {
                reached!(DeleteAgain);
                Ok(())
            }
            Life::Deleted { .. } if revives => {
                reached!(WriteRevives);
                Ok(())
            }
            Life::Deleted { .. } => {
                reached!(WriteDeleted);
                Err(EditError::NotFound(format!("{} is deleted; revive it to edit it", self.key)))
            }
        }
    }

    fn commit(
        &mut self,
        author: Author,
        at: Option<&[ChangeHash]>,
        note: Note,
        time: Hlc,
        steps: Vec<Step>,
    ) -> Result<Change, EditError> {
        let before = self.doc.heads();
        let commit = Commit {
            actor: author.actor(&self.workspace, &self.key),
            author: author.to_bytes(),
            at,
            message: note.to_message(),
            time: time.to_change_time(),
        };
        let raw = self.doc.commit(commit, steps).map_err(EditError::Document)?;
        let (bytes, operations) = (raw.raw_bytes().len(), raw.len());
        let key_bytes = columns::claim(raw.raw_bytes()).map_or(0, |claim| claim.text_bytes as usize);
        let change = if bytes > CHANGE_BYTES_MAX {
            Err(EditError::TooLarge { bytes })
        } else if key_bytes > CHANGE_KEY_BYTES_MAX {
            Err(EditError::TooLarge { bytes: key_bytes })
        } else if operations > EDIT_OPS_MAX {
            Err(EditError::TooManyOperations { operations })
        } else if self.weight + bytes > ENTITY_BYTES_MAX {
            Err(EditError::Full { entity: self.key.clone(), bytes: self.weight + bytes })
        } else {
            Change::from_raw(raw).map_err(|error| EditError::Document(error.to_string()))
        };
        if change.is_err() {
            self.restore(&before).map_err(|error| EditError::Document(error.to_string()))?;
        }
        change
    }
}

struct Plan<'a> {
    context: &'a EditContext<'a>,
    reader: Reader<'a>,
    time: Hlc,
    steps: Vec<Step>,
    /// Members to write by group.
    groups: BTreeMap<String, BTreeMap<String, Json>>,
    /// What the steps so far write, by map (none is the root) and key: a later intent of an
    /// edit builds on the earlier ones, not on what the user saw before them.
    written: BTreeMap<(Option<String>, String), ScalarValue>,
    /// Elements that the steps so far add or remove, by set and key.
    elements: BTreeMap<(String, String), bool>,
    /// Lengths of lists and texts as the steps so far leave them.
    lengths: BTreeMap<String, usize>,
    key: String,
}

impl<'a> Plan<'a> {
    fn intent(&mut self, intent: &Intent) -> Result<(), EditError> {
        match intent {
            Intent::Set { field, value } => self.set(field, value),
            Intent::Increment { field, by } => {
                let field = self.field(field, FieldKind::Counter, "a counter")?;
                if by.checked_abs().is_none_or(|by| by > INCREMENT_MAX) {
                    return invalid(format!("{}: an increment is at most {INCREMENT_MAX}", field.name));
                }
                if *by != 0 {
                    self.steps.push(Step::Increment { key: field.name.clone(), by: *by });
                }
                Ok(())
            }
            Intent::Add { field, element } => {
                let field = self.field(field, FieldKind::Set, "a set")?;
                let element = checked_element(field, element)?;
                let obj = self.container(field)?;
                // A new value each time: re-added as it was, it would lose to a removal.
                let value = ScalarValue::Int(self.time.to_change_time());
                let key = shape::element_to_key(&element);
                self.elements.insert((field.name.clone(), key.clone()), true);
                self.steps.push(Step::Put { obj, key, value, fresh: false });
                Ok(())
            }
            Intent::Remove { field, element } => {
                let field = self.field(field, FieldKind::Set, "a set")?;
                let key = shape::element_to_key(&checked_element(field, element)?);
                let obj = self.container(field)?;
                let there = match self.elements.insert((field.name.clone(), key.clone()), false) {
                    Some(there) => there,
                    None => self.reader.keys(&field.name).contains(&key),
                };
                if there {
                    self.steps.push(Step::Remove { obj, key });
                }
                Ok(())
            }
            Intent::Insert { field, at, items } => {
                let field = self.field(field, FieldKind::List, "a list")?;
                let obj = self.container(field)?;
                let items = items
                    .iter()
                    .map(|item| Ok(shape::json_to_scalar(field, &checked_element(field, item)?)))
                    .collect::<Result<Vec<_>, EditError>>()?;
                self.stretch(&field.name, *at, 0, items.len())?;
                if !items.is_empty() {
                    self.steps.push(Step::Insert { obj, at: *at, items });
                }
                Ok(())
            }
            Intent::RemoveItems { field, at, count } => {
                let field = self.field(field, FieldKind::List, "a list")?;
                let obj = self.container(field)?;
                self.stretch(&field.name, Some(*at), *count, 0)?;
                if *count > 0 {
                    self.steps.push(Step::RemoveItems { obj, at: *at, count: *count });
                }
                Ok(())
            }
            Intent::Put { field, key, value } => self.put(field, key, value, false),
            Intent::Splice { field, at, delete, insert } => {
                let field = self.field(field, FieldKind::Text, "a text")?;
                let obj = self.container(field)?;
                self.stretch(&field.name, Some(*at), *delete, insert.chars().count())?;
                if !insert.is_empty() || *delete > 0 {
                    self.steps.push(Step::Splice { obj, at: *at, delete: *delete, insert: insert.clone() });
                }
                Ok(())
            }
            Intent::Delete => {
                self.tombstone(true);
                Ok(())
            }
            Intent::Revive => {
                self.tombstone(false);
                Ok(())
            }
            Intent::Resolve { field, value } => self.resolve(field, value),
        }
    }

    fn tombstone(&mut self, deleted: bool) {
        let fresh = !self.reader.candidates(&ROOT, TOMBSTONE).is_empty();
        self.steps.push(Step::Put {
            obj: ROOT,
            key: TOMBSTONE.to_owned(),
            value: ScalarValue::Boolean(deleted),
            fresh,
        });
    }

    /// A field that may be written by this role.
    fn writable(&self, name: &str) -> Result<&'a Field, EditError> {
        let ty = self.context.ty;
        let Some(field) = ty.fields.get(name) else {
            let known: Vec<&str> = ty.fields.keys().map(String::as_str).collect();
            return invalid(format!("{} has no field {name:?}; it has {}", ty.name, known.join(", ")));
        };
        let reference = field.policy == Policy::ServerOnly || ty.is_server_only();
        if self.context.checked && reference && self.context.role != Role::Authority {
            reached!(WriteReference);
            return invalid(format!("{}.{name} is reference data: only an authority writes it", ty.name));
        }
        Ok(field)
    }

    fn field(&self, name: &str, kind: FieldKind, what: &str) -> Result<&'a Field, EditError> {
        let field = self.writable(name)?;
        if field.kind() != kind {
            return invalid(format!("{}.{name} is not {what}", self.context.ty.name));
        }
        Ok(field)
    }

    fn container(&self, field: &Field) -> Result<ObjId, EditError> {
        // Not through the reader: a container begins with this edit where it was not there.
        let found = self.reader.doc.container(&field.name, None);
        found.ok_or_else(|| EditError::Document(format!("{} has no container", field.name)))
    }

    fn set(&mut self, name: &str, value: &Json) -> Result<(), EditError> {
        let field = self.writable(name)?;
        let value = self.checked(field, value)?;
        if let Some(group) = &field.group {
            self.groups.entry(group.clone()).or_default().insert(name.to_owned(), value);
            return Ok(());
        }
        let scalar = shape::json_to_scalar(field, &value);
        self.write_register(name, false, field.policy, field.tie, scalar, false)
    }

    fn checked(&self, field: &Field, value: &Json) -> Result<Json, EditError> {
        if !self.context.checked {
            return Ok(field.check(value).unwrap_or_else(|_| value.clone()));
        }
        field.check(value).map_err(|error| EditError::Validation(error.to_string()))
    }

    /// Writes the register that belongs to this role, unless the policy drops or refuses it.
    fn write_register(
        &mut self,
        name: &str,
        group: bool,
        policy: Policy,
        tie: Tie,
        value: ScalarValue,
        resolves: bool,
    ) -> Result<(), EditError> {
        let key = register_key(name, group, policy, self.context.role).to_key();
        let place = (None, key);
        let (shown, open) = match self.written.get(&place) {
            Some(earlier) => (Some(earlier.clone()), false),
            None => {
                let own = register_key(name, group, policy, Role::Device);
                let shown = self.reader.register(own, policy, tie);
                (shown.value.clone(), shown.is_open())
            }
        };
        if open && !resolves {
            reached!(WriteOpen);
            return Err(EditError::Conflict { field: format!("{} of {}", name, self.key) });
        }
        match (open, group) {
            (true, true) => reached!(ResolveGroup),
            (true, false) => reached!(ResolveRegister),
            (false, _) => {}
        }
        // What is not in conflict is written, whatever the write is called.
        if !open && !self.moves(policy, shown.as_ref(), &value, name)? {
            return Ok(());
        }
        let held = self.reader.candidates(&ROOT, &place.1);
        self.write(ROOT, place, value, &held);
        Ok(())
    }

    fn write(&mut self, obj: ObjId, place: (Option<String>, String), value: ScalarValue, held: &[Candidate]) {
        let fresh = held.len() > 1 || held.iter().any(|candidate| candidate.scalar == value);
        self.steps.push(Step::Put { obj, key: place.1.clone(), value: value.clone(), fresh });
        self.written.insert(place, value);
    }

    /// Whether a write changes anything under the policy.
    fn moves(
        &self,
        policy: Policy,
        shown: Option<&ScalarValue>,
        value: &ScalarValue,
        name: &str,
    ) -> Result<bool, EditError> {
        let shown = shown.filter(|shown| **shown != ScalarValue::Null);
        let same = match shown {
            Some(shown) => shown == value,
            None => *value == ScalarValue::Null,
        };
        if same {
            reached!(WriteSame);
            return Ok(false);
        }
        match (policy, shown) {
            (Policy::FirstWrite, Some(_)) if self.context.checked => {
                reached!(WriteFirstTaken);
                invalid(format!("{name} was written before, and the first value stands"))
            }
            (Policy::Max | Policy::Min, Some(shown)) => {
                if *value == ScalarValue::Null {
                    reached!(WriteBoundCleared);
                    return invalid(format!("{name} keeps its {} and can't be cleared", policy.name()));
                }
                let wanted = if policy == Policy::Max {
                    std::cmp::Ordering::Greater
                } else {
                    std::cmp::Ordering::Less
                };
                let moves = compare_numbers(value, shown) == wanted;
                reached!(moves, WriteBoundMoved, WriteBoundKept);
                Ok(moves)
            }
            _ => Ok(true),
        }
    }

    fn put(&mut self, name: &str, key: &str, value: &Json, resolves: bool) -> Result<(), EditError> {
        let field = self.field(name, FieldKind::Map, "a map")?;
        field.check_key(key).map_err(|error| EditError::Validation(error.to_string()))?;
        let value = if value.is_null() { Json::Null } else { checked_element(field, value)? };
        let value = shape::json_to_scalar(field, &value);
        let obj = self.container(field)?;
        let place = (Some(name.to_owned()), key.to_owned());
        let (shown, open) = match self.written.get(&place) {
            Some(earlier) => (Some(earlier.clone()), false),
            None => {
                let shown = self.reader.entry(field, &obj, key);
                (shown.value.clone(), shown.is_open())
            }
        };
        if open && !resolves {
            reached!(WriteEntryOpen);
            return Err(EditError::Conflict { field: format!("{name}.{key} of {}", self.key) });
        }
        if open {
            reached!(ResolveEntry);
        }
        if !open && !self.moves(field.policy, shown.as_ref(), &value, &format!("{name}.{key}"))? {
            return Ok(());
        }
        let held = self.reader.candidates(&obj, key);
        self.write(obj, place, value, &held);
        Ok(())
    }

    fn resolve(&mut self, name: &str, value: &Json) -> Result<(), EditError> {
        let ty = self.context.ty;
        if let Some((map, key)) = name.split_once('.') {
            return self.put(map, key, value, true);
        }
        if let Some(group) = ty.groups.get(name) {
            let Json::Object(given) = value else {
                return invalid(format!(
                    "{name} is a group: give an object with its members {}",
                    group.members.join(", ")
                ));
            };
            let shown = self.group_shown(name, group.policy, group.tie);
            let mut members = shown.as_ref().and_then(shape::group_from_scalar).unwrap_or_default();
            for (member, value) in given {
                match ty.fields.get(member).filter(|field| field.group.as_deref() == Some(name)) {
                    Some(field) => members.insert(member.clone(), self.checked(field, value)?),
                    None if members.contains_key(member) => members.insert(member.clone(), value.clone()),
                    None => return invalid(format!("{member:?} is no member of group {name:?}")),
                };
            }
            return self.write_register(
                name,
                true,
                group.policy,
                group.tie,
                shape::group_to_scalar(&members),
                true,
            );
        }
        let field = self.field(name, FieldKind::Register, "a register or a group")?;
        let value = self.checked(field, value)?;
        self.write_register(name, false, field.policy, field.tie, shape::json_to_scalar(field, &value), true)
    }

    /// A group's value as this edit has left it so far.
    fn group_shown(&self, name: &str, policy: Policy, tie: Tie) -> Option<ScalarValue> {
        let key = register_key(name, true, policy, self.context.role).to_key();
        match self.written.get(&(None, key)) {
            Some(earlier) => Some(earlier.clone()),
            None => self.reader.register(RootKey::Group { name, shadow: false }, policy, tie).value,
        }
    }

    fn finish_groups(&mut self) -> Result<(), EditError> {
        for (name, written) in std::mem::take(&mut self.groups) {
            let Some(group) = self.context.ty.groups.get(&name) else { continue };
            let shown = self.group_shown(&name, group.policy, group.tie);
            let mut members = shown.as_ref().and_then(shape::group_from_scalar).unwrap_or_default();
            members.extend(written);
            // A cleared member that was never set is nothing new.
            if shown.is_none() {
                members.retain(|_, value| !value.is_null());
                if members.is_empty() {
                    continue;
                }
            }
            self.write_register(
                &name,
                true,
                group.policy,
                group.tie,
                shape::group_to_scalar(&members),
                false,
            )?;
        }
        Ok(())
    }

    fn check_required(&self, intents: &[Intent]) -> Result<(), EditError> {
        for field in self.context.ty.fields.values().filter(|field| field.required) {
            let given = intents.iter().any(
                |intent| matches!(intent, Intent::Set { field: name, value } if *name == field.name && !value.is_null()),
            );
            if !given {
                return invalid(format!(
                    "{}.{} is required; give it a value",
                    self.context.ty.name, field.name
                ));
            }
        }
        Ok(())
    }

    /// Checks a stretch against the length that the sequence has by now, and notes the new one.
    fn stretch(
        &mut self,
        name: &str,
        at: Option<usize>,
        delete: usize,
        insert: usize,
    ) -> Result<(), EditError> {
        let length = match self.lengths.get(name) {
            Some(length) => *length,
            None => self.reader.length(name),
        };
        let start = at.unwrap_or(length);
        if start.checked_add(delete).is_none_or(|end| end > length) {
            return invalid(format!(
                "{name}: positions {start} to {start}+{delete} are beyond its length {length}"
            ));
        }
        self.lengths.insert(name.to_owned(), length - delete + insert);
        Ok(())
    }
}

fn checked_element(field: &Field, value: &Json) -> Result<Json, EditError> {
    field.check_element(value).map_err(|error| EditError::Validation(error.to_string()))
}

/// Writes assignments to whole containers as what they change: the outbox must know that 5
/// was added to a counter, not that it became 15.
pub(super) fn expand(
    reader: &Reader<'_>,
    ty: &EntityType,
    intents: &[Intent],
) -> Result<Vec<Intent>, EditError> {
    let mut expanded: Vec<Intent> = Vec::with_capacity(intents.len());
    for intent in intents {
        let Intent::Set { field: name, value } = intent else {
            expanded.push(intent.clone());
            continue;
        };
        let Some(field) =
            ty.fields.get(name).filter(|f| !matches!(f.kind(), FieldKind::Register | FieldKind::GroupMember))
        else {
            expanded.push(intent.clone());
            continue;
        };
        if expanded.iter().any(|earlier| earlier.field() == Some(name)) {
            return invalid(format!("{name} is edited and set as a whole in one edit; do one of them"));
        }
        let value = field.check(value).map_err(|error| EditError::Validation(error.to_string()))?;
        assign(reader, field, &value, &mut expanded);
    }
    Ok(expanded)
}

fn assign(reader: &Reader<'_>, field: &Field, value: &Json, out: &mut Vec<Intent>) {
    let name = field.name.clone();
    match field.kind() {
        FieldKind::Register | FieldKind::GroupMember => {}
        FieldKind::Counter => {
            let by = value.as_i64().unwrap_or_default().saturating_sub(reader.counter(&name));
            if by != 0 {
                out.push(Intent::Increment { field: name, by });
            }
        }
        FieldKind::Text => {
            let before: Vec<char> = reader.text(&name).chars().collect();
            let after: Vec<char> = value.as_str().unwrap_or_default().chars().collect();
            for (at, delete, insert) in splices(&before, &after) {
                out.push(Intent::Splice {
                    field: name.clone(),
                    at,
                    delete,
                    insert: insert.into_iter().collect(),
                });
            }
        }
        FieldKind::Set => {
            let before = reader.set(&name);
            let after = value.as_array().cloned().unwrap_or_default();
            for element in before.iter().filter(|element| !after.contains(element)) {
                out.push(Intent::Remove { field: name.clone(), element: element.clone() });
            }
            for element in after.into_iter().filter(|element| !before.contains(element)) {
                out.push(Intent::Add { field: name.clone(), element });
            }
        }
        FieldKind::List => {
            // Items compare by their canonical text.
            let text = |items: &[Json]| items.iter().map(crate::schema::canonical_json).collect::<Vec<_>>();
            let items = value.as_array().cloned().unwrap_or_default();
            let mut next = 0;
            for (at, delete, insert) in splices(&text(&reader.list(field)), &text(&items)) {
                if delete > 0 {
                    out.push(Intent::RemoveItems { field: name.clone(), at, count: delete });
                }
                if !insert.is_empty() {
                    // `at` is a position in the new list: what stands before it is final.
                    next = at.max(next);
                    let items = items[next..next + insert.len()].to_vec();
                    out.push(Intent::Insert { field: name.clone(), at: Some(at), items });
                }
            }
        }
        FieldKind::Map => {
            let before = match reader.row_map(field) {
                Json::Object(before) => before,
                _ => serde_json::Map::new(),
            };
            let after = value.as_object().cloned().unwrap_or_default();
            for key in before.keys().filter(|key| !after.contains_key(*key)) {
                out.push(Intent::Put { field: name.clone(), key: key.clone(), value: Json::Null });
            }
            for (key, value) in after {
                if before.get(&key) != Some(&value) {
                    out.push(Intent::Put { field: name.clone(), key, value });
                }
            }
        }
    }
}

/// The replacements that turn one sequence into another, each (position, deleted, inserted),
/// in order; a position counts in the sequence as the earlier ones left it.
fn splices<T: Clone + Eq + std::hash::Hash + Ord>(before: &[T], after: &[T]) -> Vec<(usize, usize, Vec<T>)> {
    let mut found: Vec<(usize, usize, Vec<T>)> = Vec::new();
    // Counted here: an insertion that the library moves before a deletion leaves the deletion's own
    // position in the new sequence as it was.
    let mut at = 0;
    for op in similar::capture_diff_slices(similar::Algorithm::Myers, before, after) {
        let (tag, old, new) = op.as_tag_tuple();
        let deleted = if tag == similar::DiffTag::Insert { 0 } else { old.len() };
        let inserted = if tag == similar::DiffTag::Delete { &[] } else { &after[new] };
        if tag != similar::DiffTag::Equal {
            found.push((at, deleted, inserted.to_vec()));
        }
        at += inserted.len();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All texts of up to four letters, of three.
    fn short_texts() -> Vec<String> {
        let mut texts = vec![String::new()];
        let mut first = 0;
        for _ in 0..4 {
            let shorter = texts[first..].to_vec();
            first = texts.len();
            texts.extend(
                shorter.iter().flat_map(|text| ["a", "b", "c"].map(|letter| format!("{text}{letter}"))),
            );
        }
        texts
    }

    #[test]
    fn splices_turn_one_text_into_the_other() {
        let texts = short_texts();
        let mut pairs: Vec<(&str, &str)> = vec![("kitten", "sitting"), ("a b c", "c b a")];
        pairs.extend(texts.iter().flat_map(|before| texts.iter().map(|after| (&**before, &**after))));
        for (before, after) in pairs {
            let mut text: Vec<char> = before.chars().collect();
            let target: Vec<char> = after.chars().collect();
            for (at, delete, insert) in splices(&text.clone(), &target) {
                text.splice(at..at + delete, insert);
            }
            assert_eq!(text, target, "{before} -> {after}");
        }
    }
}
