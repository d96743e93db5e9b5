//! The reference model: from the log of what users meant to what people must see.
//!
//! It knows nothing of documents, operations or changes. An edit is a device, a role, a time,
//! the set of edits that its author had seen, and what was meant. From these the table of
//! policies gives every row, every deletion and every open conflict, the slow and plain way.
//!
//! The one thing that the policies leave open is where concurrent insertions into a list or a
//! text stand among each other. There the model asks for what every author may rely on: all
//! that was inserted and not removed is there once, in an order that contradicts nobody's
//! screen. After edits one after the other that leaves exactly one answer.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::change::Role;
use anabranch_core::clock::Hlc;
use anabranch_core::entity::{ConflictKind, Row, WHOLE_ENTITY};
use anabranch_core::id::DeviceId;
use anabranch_core::intent::Intent;
use anabranch_core::schema::{Bound, EntityType, Field, FieldKind, Policy, Tie, canonical_json};
use serde_json::{Map, Value as Json};

/// An edit's place in the log.
pub type EditId = usize;
/// A set of edits with all that their authors had seen.
pub type Seen = BTreeSet<EditId>;
/// What lists and texts showed to the author: items, or characters. Each item is unique in
/// the log, so that it can be followed.
pub type Screen = BTreeMap<String, Vec<Json>>;

/// Something that holds one value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// A field.
    Field(String),
    /// A group, whose value is the object of its members.
    Group(String),
    /// An entry of a map.
    Entry(String, String),
    /// Whether the entity is deleted.
    Tombstone,
}

/// What a user meant, with the elements of sequences in place of positions.
#[derive(Clone, Debug, PartialEq)]
pub enum Deed {
    /// All but what follows.
    Plain(Intent),
    /// Lists and texts: what went, what came, and how it all looked to the author afterwards.
    Sequence {
        /// The field.
        field: String,
        /// What was removed.
        gone: Vec<Json>,
        /// What was inserted.
        came: Vec<Json>,
        /// How it looked afterwards.
        view: Vec<Json>,
        /// Whether something came and went within the edit, which is an edit all the same.
        fleeting: bool,
    },
}

/// What went, what came, and how it looked to the author afterwards.
type Sequence = (Vec<Json>, Vec<Json>, Vec<Json>);

/// What an edit does to what people see.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Effects {
    writes: BTreeMap<Place, Json>,
    increments: BTreeMap<String, i64>,
    adds: BTreeSet<(String, String)>,
    removes: BTreeSet<(String, String)>,
    sequences: BTreeMap<String, Sequence>,
    revives: bool,
    any: bool,
}

impl Effects {
    /// Nothing.
    pub fn none() -> Self {
        Self::default()
    }

    /// Whether there is anything to be seen of the edit.
    pub fn any(&self) -> bool {
        self.any
    }
}

/// One edit in the log.
#[derive(Clone, Debug)]
pub struct Edit {
    /// Whose.
    pub device: DeviceId,
    /// In which role.
    pub role: Role,
    /// When.
    pub time: Hlc,
    /// Decides between equal times.
    pub actor: Vec<u8>,
    /// What its author had seen.
    pub saw: Seen,
    /// What was meant.
    pub deeds: Vec<Deed>,
    /// What it did.
    pub effects: Effects,
}

/// Why an edit can't be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum No {
    /// The schema or the role forbids it.
    Validation,
    /// What it writes waits for a person.
    Conflict,
    /// There is no living entity to edit.
    NotFound,
}

/// Something that waits for a person, as the model has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Open {
    /// As in the row.
    pub field: String,
    /// As in the row.
    pub kind: ConflictKind,
    /// Device, time and value of each side, the newest first.
    pub sides: Vec<(DeviceId, Hlc, Json)>,
    /// What they started from.
    pub base: Option<Json>,
}

/// The log of one entity.
#[derive(Clone, Debug)]
pub struct Log {
    ty: EntityType,
    edits: Vec<Edit>,
}

/// What one place comes to.
struct Shown {
    value: Option<Json>,
    open: Option<(ConflictKind, Vec<(EditId, Json)>)>,
}

enum Life {
    Alive,
    Deleted { by: EditId, lost: Vec<EditId> },
}

impl Log {
    /// An empty log.
    pub fn new(ty: &EntityType) -> Self {
        Self { ty: ty.clone(), edits: Vec::new() }
    }

    /// An edit.
    pub fn edit(&self, id: EditId) -> &Edit {
        &self.edits[id]
    }

    /// Writes an edit down.
    pub fn push(&mut self, edit: Edit) -> EditId {
        self.edits.push(edit);
        self.edits.len() - 1
    }

    // ── What was meant ────────────────────────────────────────────────────────────────────

    /// Reads intents as their author meant them who saw `saw`, and `screen` of the sequences.
    /// A container that is set as a whole is meant as what that changes.
    pub fn understand(&self, saw: &Seen, screen: &Screen, intents: &[Intent]) -> Vec<Deed> {
        let mut views = screen.clone();
        let mut sequences: BTreeMap<String, (Vec<Json>, Vec<Json>, bool)> = BTreeMap::new();
        let mut deeds = Vec::new();
        let replace = |views: &mut Screen,
                       sequences: &mut BTreeMap<String, (Vec<Json>, Vec<Json>, bool)>,
                       field: &str,
                       at: Option<usize>,
                       delete: usize,
                       items: Vec<Json>| {
            let view = views.entry(field.to_owned()).or_default();
            let at = at.unwrap_or(view.len());
            let removed: Vec<Json> = view.splice(at..at + delete, items.iter().cloned()).collect();
            let (gone, came, fleeting) = sequences.entry(field.to_owned()).or_default();
            came.extend(items);
            for item in removed {
                // What came and went within one edit never was.
                match came.iter().position(|new| *new == item) {
                    Some(place) => {
                        came.remove(place);
                        *fleeting = true;
                    }
                    None => gone.push(item),
                }
            }
        };
        for intent in intents {
            match intent {
                Intent::Splice { field, at, delete, insert } => {
                    replace(&mut views, &mut sequences, field, Some(*at), *delete, characters(insert));
                }
                Intent::Insert { field, at, items } => {
                    replace(&mut views, &mut sequences, field, *at, 0, items.clone())
                }
                Intent::RemoveItems { field, at, count } => {
                    replace(&mut views, &mut sequences, field, Some(*at), *count, Vec::new())
                }
                Intent::Set { field, value } => match self.ty.fields.get(field).map(|f| f.kind()) {
                    Some(FieldKind::Text | FieldKind::List) => {
                        let wanted = match value {
                            Json::String(text) => characters(text),
                            Json::Array(items) => items.clone(),
                            _ => Vec::new(),
                        };
                        let shown = screen.get(field).cloned().unwrap_or_default();
                        let gone = shown.iter().filter(|item| !wanted.contains(item)).cloned();
                        let came = wanted.iter().filter(|item| !shown.contains(item)).cloned();
                        sequences.insert(field.clone(), (gone.collect(), came.collect(), false));
                        views.insert(field.clone(), wanted);
                    }
                    Some(FieldKind::Counter) => {
                        let by = value.as_i64().unwrap_or(0) - self.counter(field, saw);
                        deeds.push(Deed::Plain(Intent::Increment { field: field.clone(), by }));
                    }
                    Some(FieldKind::Set) => {
                        let shown = self.set(field, saw);
                        let wanted = value.as_array().cloned().unwrap_or_default();
                        for element in shown.iter().filter(|e| !wanted.contains(e)).cloned() {
                            deeds.push(Deed::Plain(Intent::Remove { field: field.clone(), element }));
                        }
                        for element in wanted.into_iter().filter(|e| !shown.contains(e)) {
                            deeds.push(Deed::Plain(Intent::Add { field: field.clone(), element }));
                        }
                    }
                    Some(FieldKind::Map) => {
                        let shown = self.map(field, saw).0;
                        let wanted = value.as_object().cloned().unwrap_or_default();
                        let mut put = |key: &String, value: Json| {
                            let (field, key) = (field.clone(), key.clone());
                            deeds.push(Deed::Plain(Intent::Put { field, key, value }));
                        };
                        for key in shown.keys().filter(|key| !wanted.contains_key(*key)) {
                            put(key, Json::Null);
                        }
                        for (key, value) in wanted.iter().filter(|(k, v)| shown.get(*k) != Some(v)) {
                            put(key, value.clone());
                        }
                    }
                    _ => deeds.push(Deed::Plain(intent.clone())),
                },
                other => deeds.push(Deed::Plain(other.clone())),
            }
        }
        for (field, (gone, came, fleeting)) in sequences {
            let view = views[&field].clone();
            deeds.push(Deed::Sequence { field, gone, came, view, fleeting });
        }
        deeds
    }

    /// What deeds do when their author saw `saw`; the effects are empty where nothing changes.
    pub fn judge(&self, role: Role, saw: &Seen, deeds: &[Deed]) -> Result<Effects, No> {
        self.judge_life(role, saw, deeds)?;
        let mut effects = Effects::default();
        let mut groups: BTreeMap<&str, Vec<(&str, &Json)>> = BTreeMap::new();
        for deed in deeds {
            let field = match deed {
                Deed::Sequence { field, .. } => Some(field.as_str()),
                Deed::Plain(intent) => intent.field(),
            };
            let field = field.and_then(|name| self.ty.fields.get(name.split('.').next()?));
            let reference = self.ty.is_server_only() || field.is_some_and(|f| f.policy == Policy::ServerOnly);
            if reference && role != Role::Authority {
                return Err(No::Validation);
            }
            if let (Deed::Plain(intent), Some(field)) = (deed, field)
                && !fits(field, intent)
            {
                return Err(No::Validation);
            }
            match deed {
                Deed::Sequence { field, gone, came, view, fleeting } => {
                    if *fleeting || !gone.is_empty() || !came.is_empty() {
                        effects.any = true;
                        effects.sequences.insert(field.clone(), (gone.clone(), came.clone(), view.clone()));
                    }
                }
                Deed::Plain(Intent::Increment { field, by }) => {
                    if *by != 0 {
                        effects.any = true;
                        *effects.increments.entry(field.clone()).or_default() += by;
                    }
                }
                Deed::Plain(Intent::Add { field, element }) => {
                    let element = (field.clone(), canonical_json(element));
                    effects.adds.insert(element);
                    effects.any = true;
                }
                Deed::Plain(Intent::Remove { field, element }) => {
                    let shows = self.set(field, saw).contains(element);
                    let element = (field.clone(), canonical_json(element));
                    // An edit's later word on an element takes back its earlier one.
                    if effects.adds.remove(&element) || shows {
                        effects.removes.insert(element);
                        effects.any = true;
                    }
                }
                Deed::Plain(Intent::Set { field: name, value }) => {
                    let field = &self.ty.fields[name];
                    if value.is_null() && field.required {
                        return Err(No::Validation);
                    }
                    match &field.group {
                        Some(group) => groups.entry(group).or_default().push((name, value)),
                        None => self.write(&mut effects, saw, Place::Field(name.clone()), value, false)?,
                    }
                }
                Deed::Plain(Intent::Put { field, key, value }) => {
                    let place = Place::Entry(field.clone(), key.clone());
                    self.write(&mut effects, saw, place, value, false)?;
                }
                Deed::Plain(Intent::Resolve { field, value }) => {
                    let place = match field.split_once('.') {
                        Some((field, key)) => Place::Entry(field.to_owned(), key.to_owned()),
                        None if self.ty.groups.contains_key(field) => Place::Group(field.clone()),
                        None => Place::Field(field.clone()),
                    };
                    let value = match &place {
                        Place::Group(_) => {
                            self.with_members(&effects, saw, &place, value.as_object().unwrap())
                        }
                        _ => value.clone(),
                    };
                    self.write(&mut effects, saw, place, &value, true)?;
                }
                Deed::Plain(Intent::Delete) => {
                    effects.writes.insert(Place::Tombstone, Json::Bool(true));
                    effects.any = true;
                }
                Deed::Plain(Intent::Revive) => {
                    effects.writes.insert(Place::Tombstone, Json::Bool(false));
                    effects.revives = true;
                    effects.any = true;
                }
                Deed::Plain(other) => panic!("{other:?} was not understood"),
            }
        }
        for (group, members) in groups {
            let place = Place::Group(group.to_owned());
            let members = members.into_iter().map(|(name, value)| (name.to_owned(), value.clone())).collect();
            let value = self.with_members(&effects, saw, &place, &members);
            let begun = effects.writes.contains_key(&place) || self.shown(&place, saw).value.is_some();
            if begun || value.as_object().unwrap().values().any(|value| !value.is_null()) {
                let mut value = value;
                if !begun {
                    value.as_object_mut().unwrap().retain(|_, value| !value.is_null());
                }
                self.write(&mut effects, saw, place, &value, false)?;
            }
        }
        Ok(effects)
    }

    fn judge_life(&self, role: Role, saw: &Seen, deeds: &[Deed]) -> Result<(), No> {
        let has = |wanted: &Intent| deeds.iter().any(|d| matches!(d, Deed::Plain(i) if i == wanted));
        let (deletes, revives) = (has(&Intent::Delete), has(&Intent::Revive));
        let reference = self.ty.is_server_only() && role != Role::Authority;
        if (deletes && deeds.len() > 1) || ((deletes || revives) && reference) {
            return Err(No::Validation);
        }
        if saw.is_empty() {
            if deletes || revives {
                return Err(No::NotFound);
            }
            let given = |name: &str| {
                deeds.iter().any(|deed| {
                    matches!(deed, Deed::Plain(Intent::Set { field, value }) if field == name && !value.is_null())
                })
            };
            return match self.ty.fields.values().any(|field| field.required && !given(&field.name)) {
                true => Err(No::Validation),
                false => Ok(()),
            };
        }
        match self.life(saw) {
            Life::Alive => Ok(()),
            Life::Deleted { lost, .. } if deletes && !lost.is_empty() => Ok(()),
            Life::Deleted { .. } if revives => Ok(()),
            Life::Deleted { .. } => Err(No::NotFound),
        }
    }

    /// The members of a group as shown, with some of them written.
    fn with_members(
        &self,
        effects: &Effects,
        saw: &Seen,
        group: &Place,
        members: &Map<String, Json>,
    ) -> Json {
        let mut all = match effects.writes.get(group).cloned().or(self.shown(group, saw).value) {
            Some(Json::Object(all)) => all,
            _ => Map::new(),
        };
        all.extend(members.clone());
        Json::Object(all)
    }

    fn write(
        &self,
        effects: &mut Effects,
        saw: &Seen,
        place: Place,
        value: &Json,
        resolves: bool,
    ) -> Result<(), No> {
        // Within one edit a later word builds on the earlier one.
        let shown = match effects.writes.get(&place) {
            Some(earlier) => Shown { value: Some(earlier.clone()), open: None },
            None => self.shown(&place, saw),
        };
        let policy = self.rule(&place).0;
        if shown.open.is_some() {
            if !resolves {
                return Err(No::Conflict);
            }
        } else {
            let before = shown.value.filter(|value| !value.is_null());
            if before.as_ref().unwrap_or(&Json::Null) == value {
                return Ok(());
            }
            if let Some(before) = before {
                match policy {
                    Policy::FirstWrite => return Err(No::Validation),
                    Policy::Max | Policy::Min if value.is_null() => return Err(No::Validation),
                    Policy::Max if size(value) <= size(&before) => return Ok(()),
                    Policy::Min if size(value) >= size(&before) => return Ok(()),
                    _ => {}
                }
            }
        }
        effects.writes.insert(place, value.clone());
        effects.any = true;
        Ok(())
    }

    // ── What people see ───────────────────────────────────────────────────────────────────

    /// The later of two edits, where nothing else decides.
    fn later(&self, a: EditId, b: EditId) -> Ordering {
        let order = |id: EditId| (self.edits[id].time, &self.edits[id].actor);
        order(a).cmp(&order(b))
    }

    fn rule(&self, place: &Place) -> (Policy, Tie) {
        match place {
            Place::Field(name) | Place::Entry(name, _) => {
                (self.ty.fields[name].policy, self.ty.fields[name].tie)
            }
            Place::Group(name) => (self.ty.groups[name].policy, self.ty.groups[name].tie),
            Place::Tombstone => (Policy::Lww, Tie::Clock),
        }
    }

    /// The writes among `seen` that nobody overwrote who knew of them.
    fn standing(&self, place: &Place, seen: &Seen, role: Option<Role>) -> Vec<(EditId, Json)> {
        let writes: Vec<EditId> = seen
            .iter()
            .copied()
            .filter(|id| self.edits[*id].effects.writes.contains_key(place))
            .filter(|id| role.is_none_or(|role| self.edits[*id].role == role))
            .collect();
        writes
            .iter()
            .filter(|id| !writes.iter().any(|other| self.edits[*other].saw.contains(id)))
            .map(|id| (*id, self.edits[*id].effects.writes[place].clone()))
            .collect()
    }

    fn shown(&self, place: &Place, seen: &Seen) -> Shown {
        let (policy, tie) = self.rule(place);
        let first = match policy {
            Policy::ServerWins => Role::Authority,
            Policy::ClientWins => Role::Device,
            _ => return self.decide(policy, tie, self.standing(place, seen, None)),
        };
        let second = if first == Role::Authority { Role::Device } else { Role::Authority };
        let privileged = self.standing(place, seen, Some(first));
        let mut others = self.standing(place, seen, Some(second));
        let winner = privileged.into_iter().max_by(|a, b| self.later(a.0, b.0));
        if let Some(winner) = winner {
            others.retain(|(id, _)| self.edits[*id].saw.contains(&winner.0));
            if others.is_empty() {
                others.push(winner);
            }
        }
        self.decide(Policy::Lww, Tie::Clock, others)
    }

    fn decide(&self, policy: Policy, tie: Tie, standing: Vec<(EditId, Json)>) -> Shown {
        let mut newest_first = standing;
        newest_first.sort_by(|a, b| self.later(b.0, a.0));
        // Who writes what another wrote agrees with it.
        let mut sides: Vec<(EditId, Json)> = Vec::new();
        for (id, value) in &newest_first {
            if !sides.iter().any(|(_, known)| known == value) {
                sides.push((*id, value.clone()));
            }
        }
        let newest = sides.first().map(|(_, value)| value.clone());
        let real = || newest_first.iter().filter(|(_, value)| !value.is_null());
        let best = |best: Option<&(EditId, Json)>| best.map(|(_, value)| value.clone()).or(newest.clone());
        let value = match policy {
            Policy::FirstWrite => best(real().min_by(|a, b| self.later(a.0, b.0))),
            Policy::Max => best(real().max_by(|a, b| size(&a.1).cmp(&size(&b.1)))),
            Policy::Min => best(real().min_by(|a, b| size(&a.1).cmp(&size(&b.1)))),
            _ => newest.clone(),
        };
        let kind = match (policy, tie) {
            (Policy::Manual, _) => Some(ConflictKind::Manual),
            (Policy::Lww | Policy::Map, Tie::Manual) => {
                if let Some((newest, _)) = sides.first() {
                    let wall = self.edits[*newest].time.wall();
                    sides.retain(|(id, _)| self.edits[*id].time.wall() == wall);
                }
                Some(ConflictKind::Tie)
            }
            _ => None,
        };
        let open = kind.filter(|_| sides.len() > 1).map(|kind| (kind, sides));
        Shown { value, open }
    }

    fn counter(&self, field: &str, seen: &Seen) -> i64 {
        seen.iter().filter_map(|id| self.edits[*id].effects.increments.get(field)).sum()
    }

    /// An add stays until someone removes the element who had seen the add.
    fn set(&self, field: &str, seen: &Seen) -> Vec<Json> {
        let mut elements = BTreeMap::new();
        for add in seen {
            for element in self.edits[*add].effects.adds.iter().filter(|(name, _)| name == field) {
                let removed = seen.iter().any(|id| {
                    self.edits[*id].effects.removes.contains(element) && self.edits[*id].saw.contains(add)
                });
                if !removed {
                    let value: Json = serde_json::from_str(&element.1).unwrap();
                    elements.insert(rank(&value), value);
                }
            }
        }
        elements.into_values().collect()
    }

    fn map(&self, field: &str, seen: &Seen) -> (Map<String, Json>, Vec<Open>) {
        let places: BTreeSet<&Place> = seen
            .iter()
            .flat_map(|id| self.edits[*id].effects.writes.keys())
            .filter(|place| matches!(place, Place::Entry(name, _) if name == field))
            .collect();
        let mut entries = Map::new();
        let mut open = Vec::new();
        for place in places {
            let Place::Entry(_, key) = place else { continue };
            let shown = self.shown(place, seen);
            open.extend(self.open(format!("{field}.{key}"), place, &shown, seen));
            if let Some(value) = shown.value.filter(|value| !value.is_null()) {
                entries.insert(key.clone(), value);
            }
        }
        (entries, open)
    }

    fn open(&self, field: String, place: &Place, shown: &Shown, seen: &Seen) -> Option<Open> {
        let (kind, sides) = shown.open.as_ref()?;
        let common = sides
            .iter()
            .map(|(id, _)| &self.edits[*id].saw)
            .fold(seen.clone(), |common, saw| common.intersection(saw).copied().collect());
        Some(Open {
            field,
            kind: *kind,
            sides: sides
                .iter()
                .map(|(id, value)| (self.edits[*id].device, self.edits[*id].time, value.clone()))
                .collect(),
            base: self.shown(place, &common).value,
        })
    }

    /// Deleted, unless an edit that the deletion did not know of is later, or a later one
    /// brought the entity back.
    fn life(&self, seen: &Seen) -> Life {
        let deletes = self.standing(&Place::Tombstone, seen, None);
        let deletes = deletes.into_iter().filter(|(_, deleted)| *deleted == Json::Bool(true));
        let Some((by, _)) = deletes.max_by(|a, b| self.later(a.0, b.0)) else { return Life::Alive };
        let mut lost = Vec::new();
        for id in seen.iter().copied().filter(|id| *id != by && !self.edits[by].saw.contains(id)) {
            let effects = &self.edits[id].effects;
            if self.edits[id].saw.contains(&by) {
                if effects.revives {
                    return Life::Alive;
                }
            } else if effects.writes.get(&Place::Tombstone) == Some(&Json::Bool(true)) {
                // Another deletion is no edit.
            } else if self.later(id, by) == Ordering::Greater {
                return Life::Alive;
            } else {
                lost.push(id);
            }
        }
        Life::Deleted { by, lost }
    }

    /// Whether the entity is deleted, every field that is no sequence, and all that waits for
    /// a person, in order of field names.
    pub fn row(&self, seen: &Seen) -> (bool, BTreeMap<String, Json>, Vec<Open>) {
        let mut fields = BTreeMap::new();
        let mut open = Vec::new();
        for field in self.ty.fields.values() {
            let name = &field.name;
            let value = match field.kind() {
                FieldKind::Text | FieldKind::List => continue,
                FieldKind::Counter => Json::from(self.counter(name, seen)),
                FieldKind::Set => Json::Array(self.set(name, seen)),
                FieldKind::Map => {
                    let (entries, conflicts) = self.map(name, seen);
                    open.extend(conflicts);
                    Json::Object(entries)
                }
                FieldKind::Register => {
                    let place = Place::Field(name.clone());
                    let shown = self.shown(&place, seen);
                    open.extend(self.open(name.clone(), &place, &shown, seen));
                    shown.value.unwrap_or(Json::Null)
                }
                FieldKind::GroupMember => {
                    let group = field.group.as_ref().unwrap();
                    let shown = self.shown(&Place::Group(group.clone()), seen).value.unwrap_or(Json::Null);
                    shown.get(name).cloned().unwrap_or(Json::Null)
                }
            };
            let value = if value.is_null() { field.default.clone().unwrap_or(Json::Null) } else { value };
            fields.insert(name.clone(), value);
        }
        for name in self.ty.groups.keys() {
            let place = Place::Group(name.clone());
            open.extend(self.open(name.clone(), &place, &self.shown(&place, seen), seen));
        }
        let deleted = match self.life(seen) {
            Life::Alive => false,
            Life::Deleted { by, lost } => {
                open = self.lost(by, &lost).into_iter().collect();
                true
            }
        };
        open.sort_by(|a, b| a.field.cmp(&b.field));
        (deleted, fields, open)
    }

    /// The report of a deletion that swallowed edits: itself, and the newest edit of each
    /// device.
    fn lost(&self, by: EditId, lost: &[EditId]) -> Option<Open> {
        let mut newest: BTreeMap<DeviceId, EditId> = BTreeMap::new();
        for id in lost {
            let kept = newest.entry(self.edits[*id].device).or_insert(*id);
            if self.later(*id, *kept) == Ordering::Greater {
                *kept = *id;
            }
        }
        let mut sides: Vec<EditId> = newest.into_values().collect();
        sides.sort_by(|a, b| self.later(*b, *a));
        sides.insert(0, by);
        let side = |id: &EditId| (self.edits[*id].device, self.edits[*id].time, Json::Null);
        (sides.len() > 1).then(|| Open {
            field: WHOLE_ENTITY.to_owned(),
            kind: ConflictKind::LostEdit,
            sides: sides.iter().map(side).collect(),
            base: None,
        })
    }

    // ── The comparison ────────────────────────────────────────────────────────────────────

    /// Holds a row of the engine to what it must be after the edits `seen`.
    pub fn check(&self, seen: &Seen, row: &Row) -> Result<(), String> {
        self.check_fields(seen, row.deleted, &row.fields)?;
        let open = self.row(seen).2;
        let mut found: Vec<Open> = row
            .conflicts
            .iter()
            .map(|conflict| Open {
                field: conflict.field.clone(),
                kind: conflict.kind,
                sides: conflict
                    .sides
                    .iter()
                    .map(|side| {
                        let whole = conflict.kind == ConflictKind::LostEdit;
                        (side.device, side.time, if whole { Json::Null } else { side.value.clone() })
                    })
                    .collect(),
                base: conflict.base.clone(),
            })
            .collect();
        found.sort_by(|a, b| a.field.cmp(&b.field));
        if found != open {
            return Err(format!("conflicts: it reports {found:#?}, there must be {open:#?}"));
        }
        Ok(())
    }

    /// The same for a row of which only the fields are known.
    pub fn check_fields(
        &self,
        seen: &Seen,
        deleted: bool,
        shown: &BTreeMap<String, Json>,
    ) -> Result<(), String> {
        let (must_be, fields, _) = self.row(seen);
        if deleted != must_be {
            return Err(format!("deleted: it says {deleted}, it must be {must_be}"));
        }
        for (name, value) in shown {
            match fields.get(name) {
                None => self.check_sequence(name, seen, value)?,
                Some(wanted) if wanted != value => {
                    return Err(format!("{name}: it shows {value}, it must be {wanted}"));
                }
                Some(_) => {}
            }
        }
        if shown.len() != self.ty.fields.len() {
            return Err("a field is missing".into());
        }
        Ok(())
    }

    fn check_sequence(&self, field: &str, seen: &Seen, value: &Json) -> Result<(), String> {
        let shown = match value {
            Json::String(text) => characters(text),
            Json::Array(items) => items.clone(),
            other => return Err(format!("{field}: it shows {other}")),
        };
        let edits: Vec<&Sequence> =
            seen.iter().filter_map(|id| self.edits[*id].effects.sequences.get(field)).collect();
        let removed: BTreeSet<String> =
            edits.iter().flat_map(|(gone, ..)| gone).map(canonical_json).collect();
        let mut alive: Vec<String> = edits
            .iter()
            .flat_map(|(_, came, _)| came)
            .map(canonical_json)
            .filter(|item| !removed.contains(item))
            .collect();
        let shown: Vec<String> = shown.iter().map(canonical_json).collect();
        let mut sorted = shown.clone();
        sorted.sort();
        alive.sort();
        if sorted != alive {
            return Err(format!("{field}: it shows {shown:?}, it must hold {alive:?}"));
        }
        let places: BTreeMap<&String, usize> = shown.iter().enumerate().map(|(n, item)| (item, n)).collect();
        for (_, _, view) in edits {
            let view: Vec<String> = view.iter().map(canonical_json).collect();
            let order: Vec<usize> = view.iter().filter_map(|item| places.get(item).copied()).collect();
            if !order.is_sorted() {
                return Err(format!("{field}: it shows {shown:?}, but someone's screen read {view:?}"));
            }
        }
        Ok(())
    }
}

/// A text's characters as items.
pub fn characters(text: &str) -> Vec<Json> {
    text.chars().map(|c| Json::String(c.to_string())).collect()
}

/// The size of a number or an instant. Tests use fractions that have exact thousandths.
fn size(value: &Json) -> i128 {
    match value {
        Json::String(instant) => anabranch_core::schema::timestamp_to_ms(instant).unwrap().into(),
        number => match number.as_i64() {
            Some(whole) => i128::from(whole) * 1000,
            None => (number.as_f64().unwrap() * 1000.0) as i128,
        },
    }
}

/// The order in which sets print: numbers by size, strings by their bytes.
fn rank(value: &Json) -> (i128, String) {
    match value {
        Json::Number(_) => (size(value), String::new()),
        Json::String(text) => (0, text.clone()),
        other => (0, canonical_json(other)),
    }
}

/// Whether a value keeps the rules of its field: one of those allowed, within its bounds.
fn fits(field: &Field, intent: &Intent) -> bool {
    let value = match intent {
        Intent::Set { value, .. } | Intent::Put { value, .. } | Intent::Resolve { value, .. } => value,
        Intent::Add { element, .. } => element,
        _ => return true,
    };
    if value.is_null() || value.is_array() || value.is_object() {
        return true;
    }
    let number = |bound: Bound| match bound {
        Bound::Int(int) => int as f64,
        Bound::Float(float) => float,
    };
    let allowed = field.one_of.is_empty() || field.one_of.contains(value);
    allowed
        && value.as_f64().is_none_or(|value| {
            field.min.is_none_or(|min| value >= number(min))
                && field.max.is_none_or(|max| value <= number(max))
        })
}
