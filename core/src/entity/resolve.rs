//! From a document to what people see: the policies.
//!
//! Everything here is a pure function of the document, its header index and the schema, so
//! that every device and the relay compute the same row whatever the order of arrival.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};

use automerge::{ChangeHash, ObjId, ROOT, ScalarValue};
use serde_json::Value as Json;

use super::document::Document;

use crate::change::Role;
use crate::clock::Hlc;
use crate::header::{HeaderIndex, Past};
use crate::id::DeviceId;
use crate::schema::{EntityType, Field, FieldKind, Policy, Tie};
use crate::shape::{self, RootKey, TOMBSTONE};

/// The name under which the loss of edits to a deletion stands in the inbox.
pub const WHOLE_ENTITY: &str = "*";

/// What people see of an entity.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Every field of the schema, with its default or null where nothing was written.
    pub fields: BTreeMap<String, Json>,
    /// Whether it is deleted; the fields then show what a revival would bring back.
    pub deleted: bool,
    /// What waits for a person.
    pub conflicts: Vec<Conflict>,
}

/// Something that waits for a person.
#[derive(Clone, Debug, PartialEq)]
pub struct Conflict {
    /// A field, a group, `field.key` for an entry of a map, or [`WHOLE_ENTITY`].
    pub field: String,
    /// Why it is one.
    pub kind: ConflictKind,
    /// What competes, the newest first.
    pub sides: Vec<Side>,
    /// What all sides started from; none where they have no common beginning.
    pub base: Option<Json>,
}

/// Why something waits for a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConflictKind {
    /// The policy is `manual` and values are concurrent.
    Manual,
    /// The policy is `lww` with `tie = "manual"`, and the newest values have equal times.
    Tie,
    /// The entity was deleted after an edit that the deleting device had not seen.
    LostEdit,
}

impl ConflictKind {
    /// The name that programs see.
    pub fn name(self) -> &'static str {
        match self {
            ConflictKind::Manual => "manual",
            ConflictKind::Tie => "tie",
            ConflictKind::LostEdit => "lost_edit",
        }
    }

    /// From its name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Manual, Self::Tie, Self::LostEdit].into_iter().find(|kind| kind.name() == name)
    }
}

/// One of the competing values.
#[derive(Clone, Debug, PartialEq)]
pub struct Side {
    /// The device that wrote it last.
    pub device: DeviceId,
    /// Other devices that wrote the same value, the last first.
    pub others: Vec<DeviceId>,
    /// When `device` wrote it, by the hybrid logical clock.
    pub time: Hlc,
    /// In which change.
    pub change: ChangeHash,
    /// The value; null for a cleared field or a deletion.
    pub value: Json,
}

/// A value that a register holds, and who put it there.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Candidate {
    pub(super) scalar: ScalarValue,
    pub(super) place: u32,
    change: ChangeHash,
    counter: u64,
    time: Hlc,
    actor: Vec<u8>,
    device: DeviceId,
}

impl Candidate {
    pub(super) fn order(&self) -> (Hlc, &[u8], u64) {
        if mutated!(DropTieBreak) {
            return (self.time, &[], u64::from(self.place));
        }
        (self.time, &self.actor, self.counter)
    }
}

/// What a register comes to.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Resolved {
    pub(super) value: Option<ScalarValue>,
    kind: Option<ConflictKind>,
    sides: Vec<Contender>,
}

/// A value that competes with others, and all who put it there.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Contender {
    newest: Candidate,
    /// Other devices that wrote the same value, the last first.
    others: Vec<DeviceId>,
}

impl Resolved {
    pub(super) fn is_open(&self) -> bool {
        self.kind.is_some()
    }
}

/// A document at one moment, with what is needed to resolve it.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    pub(super) doc: &'a Document,
    pub(super) headers: &'a HeaderIndex,
    /// The version to read; none is the present.
    pub(super) at: Option<&'a [ChangeHash]>,
}

impl<'a> Reader<'a> {
    pub(super) fn candidates(&self, obj: &ObjId, key: &str) -> Vec<Candidate> {
        self.doc
            .values(obj, key, self.at)
            .into_iter()
            .filter_map(|(scalar, id)| {
                let ObjId::Id(counter, actor, _) = &id else { return None };
                let change = self.doc.change_of(&id)?;
                let place = self.headers.place(&change)?;
                let header = self.headers.get(place)?;
                Some(Candidate {
                    scalar,
                    place,
                    change,
                    counter: *counter,
                    time: header.time,
                    actor: actor.to_bytes().to_vec(),
                    device: self.headers.device(header),
                })
            })
            .collect()
    }

    pub(super) fn container(&self, field: &str) -> Option<ObjId> {
        self.doc.container(field, self.at)
    }

    /// Resolves a register of the root, with its shadow where the policy has one.
    pub(super) fn register(&self, key: RootKey<'_>, policy: Policy, tie: Tie) -> Resolved {
        let own = self.candidates(&ROOT, &key.to_key());
        let shadow = match (policy, key) {
            (Policy::ServerWins | Policy::ClientWins, RootKey::Field { name, .. }) => {
                self.candidates(&ROOT, &RootKey::Field { name, shadow: true }.to_key())
            }
            (Policy::ServerWins | Policy::ClientWins, RootKey::Group { name, .. }) => {
                self.candidates(&ROOT, &RootKey::Group { name, shadow: true }.to_key())
            }
            _ => Vec::new(),
        };
        match policy {
            Policy::ServerWins => {
                reached!(PrivilegedAuthority);
                self.privileged(shadow, own)
            }
            Policy::ClientWins => {
                reached!(PrivilegedDevice);
                self.privileged(own, shadow)
            }
            _ => pick(own, policy, tie),
        }
    }

    /// One role's values stand unless the other role had seen the winning one when it wrote.
    fn privileged(&self, first: Vec<Candidate>, second: Vec<Candidate>) -> Resolved {
        if mutated!(MaskAuthority) {
            return pick([first, second].concat(), Policy::Lww, Tie::Clock);
        }
        let Some(winner) = first.into_iter().max_by(|a, b| a.order().cmp(&b.order())) else {
            reached!(PrivilegedNone);
            return pick(second, Policy::Lww, Tie::Clock);
        };
        let mut aware: Vec<Candidate> =
            second.into_iter().filter(|late| self.headers.is_ancestor(winner.place, late.place)).collect();
        if aware.is_empty() {
            reached!(PrivilegedStands);
            aware.push(winner);
        } else {
            reached!(PrivilegedSeen);
        }
        pick(aware, Policy::Lww, Tie::Clock)
    }

    /// Whether the entity lives, and which changes a deletion swallowed unseen.
    pub(super) fn life(&self) -> Life {
        let mut deletes = self.candidates(&ROOT, TOMBSTONE);
        deletes.retain(|candidate| candidate.scalar == ScalarValue::Boolean(true));
        deletes.sort_by(|a, b| b.order().cmp(&a.order()));
        let Some(winner) = deletes.first() else {
            reached!(LifeNoDelete);
            return Life::Alive;
        };
        if mutated!(DropTombstone) && self.headers.headers().len() as u32 > winner.place + 1 {
            return Life::Alive;
        }
        let below = self.headers.past([winner.place]);
        let above = self.headers.above(winner.place);
        let version = self.at.map(|heads| self.version(heads));
        let deleting: BTreeSet<u32> = deletes.iter().map(|delete| delete.place).collect();
        let mut lost = Vec::new();
        for (place, header) in self.headers.headers().iter().enumerate() {
            let place = place as u32;
            if below.contains(place) {
                continue;
            }
            if let Some(version) = &version
                && !version.contains(place)
            {
                continue;
            }
            if above[place as usize] {
                if header.revives {
                    reached!(LifeRevived);
                    return Life::Alive;
                }
                continue;
            }
            if deleting.contains(&place) {
                continue;
            }
            let actor = self.headers.actors()[header.actor as usize].actor.to_bytes();
            if (header.time, actor) > (winner.time, &winner.actor[..]) {
                reached!(LifeEditedLater);
                return Life::Alive;
            }
            lost.push(place);
        }
        // A deletion that someone took back or confirmed since is no edit that was lost.
        self.leave_deletions_out(winner.change, &mut lost);
        reached!(lost.is_empty(), LifeDeleted, LifeLostEdit);
        match contenders(deletes).pop() {
            Some(by) => Life::Deleted { by, lost },
            None => Life::Alive,
        }
    }

    /// Takes out changes that do nothing but delete. `winner` builds on none of them.
    fn leave_deletions_out(&self, winner: ChangeHash, lost: &mut Vec<u32>) {
        if lost.is_empty() {
            return;
        }
        // Together: the library walks over the whole document for one as for all.
        let changes = self.doc.changes_since(&[winner]).into_iter();
        let changes: BTreeMap<ChangeHash, automerge::Change> =
            changes.map(|change| (change.hash(), change)).collect();
        lost.retain(|place| {
            let header = &self.headers.headers()[*place as usize];
            let Some(change) = changes.get(&header.hash).filter(|_| !header.revives) else { return true };
            let deletes = change.decode().operations.iter().all(|op| op.key == TOMBSTONE.into());
            if deletes {
                reached!(LifeOnlyDeletes);
            }
            !deletes
        });
    }

    /// What a version includes.
    pub(super) fn version(&self, heads: &[ChangeHash]) -> Past<'a> {
        self.headers.past(heads.iter().filter_map(|head| self.headers.place(head)))
    }

    /// The whole row.
    pub(super) fn row(&self, ty: &EntityType) -> Row {
        let mut fields = BTreeMap::new();
        let mut conflicts = Vec::new();
        for field in ty.fields.values() {
            let value = match field.kind() {
                FieldKind::Register => {
                    let key = RootKey::Field { name: &field.name, shadow: false };
                    let resolved = self.register(key, field.policy, field.tie);
                    let json =
                        |scalar: &ScalarValue| shape::scalar_to_json(field, scalar).unwrap_or(Json::Null);
                    if resolved.is_open() {
                        let base = |at: &[ChangeHash]| {
                            let value = self.at(at).register(key, field.policy, field.tie).value;
                            value.as_ref().map(json)
                        };
                        conflicts.push(self.conflict(field.name.clone(), &resolved, json, base));
                    }
                    resolved.value.as_ref().map(json)
                }
                FieldKind::GroupMember => None,
                FieldKind::Counter => Some(Json::from(self.counter(&field.name))),
                FieldKind::Text => Some(Json::String(self.text(&field.name))),
                FieldKind::Set => Some(Json::Array(self.set(&field.name))),
                FieldKind::List => Some(Json::Array(self.list(field))),
                FieldKind::Map => Some(Json::Object(self.map(field, &mut conflicts))),
            };
            let value = value.filter(|v| !v.is_null()).or_else(|| field.default.clone());
            fields.insert(field.name.clone(), value.unwrap_or(Json::Null));
        }
        for group in ty.groups.values() {
            let key = RootKey::Group { name: &group.name, shadow: false };
            let resolved = self.register(key, group.policy, group.tie);
            let json = |scalar: &ScalarValue| group_json(scalar).unwrap_or(Json::Null);
            if resolved.is_open() {
                let base = |at: &[ChangeHash]| {
                    let value = self.at(at).register(key, group.policy, group.tie).value;
                    value.as_ref().map(json)
                };
                conflicts.push(self.conflict(group.name.clone(), &resolved, json, base));
            }
            let mut members = resolved.value.as_ref().and_then(shape::group_from_scalar).unwrap_or_default();
            if mutated!(ResolveApart) {
                let all = self.candidates(&ROOT, &key.to_key());
                let oldest = all.iter().min_by(|a, b| a.order().cmp(&b.order()));
                let other = oldest.and_then(|c| shape::group_from_scalar(&c.scalar)).unwrap_or_default();
                members.extend(other.into_iter().take(1));
            }
            for name in &group.members {
                if let Some(value) = members.get(name).filter(|v| !v.is_null()) {
                    fields.insert(name.clone(), value.clone());
                }
            }
        }
        let deleted = match self.life() {
            Life::Alive => false,
            Life::Deleted { by, lost } => {
                conflicts.clear();
                if !lost.is_empty() {
                    conflicts.push(self.lost_edit(by, &lost, &fields));
                }
                true
            }
        };
        Row { fields, deleted, conflicts }
    }

    fn at<'b>(&self, heads: &'b [ChangeHash]) -> Reader<'b>
    where
        'a: 'b,
    {
        Reader { doc: self.doc, headers: self.headers, at: Some(heads) }
    }

    pub(super) fn counter(&self, field: &str) -> i64 {
        self.doc.value(field, self.at).and_then(|scalar| scalar.as_i64()).unwrap_or_default()
    }

    pub(super) fn text(&self, field: &str) -> String {
        let Some(obj) = self.container(field) else { return String::new() };
        self.doc.text(&obj, self.at)
    }

    pub(super) fn set(&self, field: &str) -> Vec<Json> {
        let mut elements: Vec<Json> =
            self.keys(field).iter().filter_map(|key| shape::element_from_key(key)).collect();
        elements.sort_by(compare_json);
        elements
    }

    pub(super) fn keys(&self, field: &str) -> Vec<String> {
        let Some(obj) = self.container(field) else { return Vec::new() };
        self.doc.keys(&obj, self.at)
    }

    pub(super) fn length(&self, field: &str) -> usize {
        let Some(obj) = self.container(field) else { return 0 };
        self.doc.length(&obj, self.at)
    }

    pub(super) fn list(&self, field: &Field) -> Vec<Json> {
        let Some(obj) = self.container(&field.name) else { return Vec::new() };
        let items = self.doc.items(&obj, self.at);
        items.iter().filter_map(|(scalar, _)| shape::scalar_to_json(field, scalar)).collect()
    }

    /// One entry of a map.
    pub(super) fn entry(&self, field: &Field, obj: &ObjId, key: &str) -> Resolved {
        pick(self.candidates(obj, key), field.policy, field.tie)
    }

    /// A map's entries as they show.
    pub(super) fn row_map(&self, field: &Field) -> Json {
        Json::Object(self.map(field, &mut Vec::new()))
    }

    fn map(&self, field: &Field, conflicts: &mut Vec<Conflict>) -> serde_json::Map<String, Json> {
        let Some(obj) = self.container(&field.name) else { return serde_json::Map::new() };
        let json = |scalar: &ScalarValue| shape::scalar_to_json(field, scalar).unwrap_or(Json::Null);
        let mut entries = serde_json::Map::new();
        for key in self.keys(&field.name) {
            let resolved = self.entry(field, &obj, &key);
            if resolved.is_open() {
                let base = |at: &[ChangeHash]| self.at(at).entry(field, &obj, &key).value.as_ref().map(json);
                conflicts.push(self.conflict(format!("{}.{key}", field.name), &resolved, json, base));
            }
            if let Some(value) = resolved.value.as_ref().map(json).filter(|v| !v.is_null()) {
                entries.insert(key, value);
            }
        }
        entries
    }

    fn conflict(
        &self,
        field: String,
        resolved: &Resolved,
        json: impl Fn(&ScalarValue) -> Json,
        base: impl Fn(&[ChangeHash]) -> Option<Json>,
    ) -> Conflict {
        let places: Vec<u32> = resolved.sides.iter().map(|side| side.newest.place).collect();
        let common = self.common_heads(&places);
        Conflict {
            field,
            kind: resolved.kind.unwrap_or(ConflictKind::Manual),
            sides: resolved
                .sides
                .iter()
                .map(|Contender { newest, others }| Side {
                    device: newest.device,
                    others: others.clone(),
                    time: newest.time,
                    change: newest.change,
                    value: json(&newest.scalar),
                })
                .collect(),
            base: if common.is_empty() {
                reached!(NoCommonBase);
                None
            } else {
                reached!(CommonBase);
                base(&common)
            },
        }
    }

    fn lost_edit(&self, by: Contender, lost: &[u32], fields: &BTreeMap<String, Json>) -> Conflict {
        // One side for each device that lost edits, at its newest one.
        let mut newest: BTreeMap<DeviceId, u32> = BTreeMap::new();
        // By what every device knows, not by the order of arrival.
        let order = |place: u32| {
            let header = &self.headers.headers()[place as usize];
            (header.time, self.headers.actors()[header.actor as usize].actor.to_bytes())
        };
        for place in lost {
            let header = &self.headers.headers()[*place as usize];
            let kept = newest.entry(self.headers.device(header)).or_insert(*place);
            if order(*place) > order(*kept) {
                *kept = *place;
            }
        }
        // Who lost an edit besides is on that side.
        let Contender { newest: winner, mut others } = by;
        others.retain(|device| !newest.contains_key(device));
        let mut sides = vec![Side {
            device: winner.device,
            others,
            time: winner.time,
            change: winner.change,
            value: Json::Null,
        }];
        let mut newest: Vec<(DeviceId, u32)> = newest.into_iter().collect();
        newest.sort_by(|a, b| order(b.1).cmp(&order(a.1)));
        for (device, place) in newest {
            let header = &self.headers.headers()[place as usize];
            let value =
                Json::Object(fields.iter().map(|(name, value)| (name.clone(), value.clone())).collect());
            sides.push(Side { device, others: Vec::new(), time: header.time, change: header.hash, value });
        }
        Conflict { field: WHOLE_ENTITY.to_owned(), kind: ConflictKind::LostEdit, sides, base: None }
    }

    /// The newest changes that all of `places` had seen.
    fn common_heads(&self, places: &[u32]) -> Vec<ChangeHash> {
        let mut sides = places.iter().map(|side| self.headers.past_below([*side]));
        let Some(mut common) = sides.next() else { return Vec::new() };
        for side in sides {
            if common.is_empty() {
                break;
            }
            common.retain(&side);
        }
        let newest = self.headers.newest_of(&common.newest().collect());
        newest.iter().map(|place| self.headers.headers()[*place as usize].hash).collect()
    }
}

/// Whether an entity lives.
#[derive(Clone, Debug)]
pub(super) enum Life {
    Alive,
    Deleted { by: Contender, lost: Vec<u32> },
}

fn group_json(scalar: &ScalarValue) -> Option<Json> {
    Some(Json::Object(shape::group_from_scalar(scalar)?.into_iter().collect()))
}

/// Chooses among the candidates of one register. Equal values are one candidate: two devices
/// that write the same agree.
fn pick(mut candidates: Vec<Candidate>, policy: Policy, tie: Tie) -> Resolved {
    candidates.sort_by(|a, b| b.order().cmp(&a.order()));
    let written = |c: &&Candidate| c.scalar != ScalarValue::Null;
    // Who writes the first value again later must not make it a later one.
    let first = candidates.iter().rev().find(written).map(|c| c.scalar.clone());
    let mut distinct = contenders(candidates);
    let newest = distinct.first().map(|c| c.newest.scalar.clone());
    let plain = |value| Resolved { value, kind: None, sides: Vec::new() };
    match policy {
        Policy::Manual if distinct.len() > 1 => {
            reached!(PickManualOpen);
            Resolved { value: newest, kind: Some(ConflictKind::Manual), sides: distinct }
        }
        Policy::Lww if tie == Tie::Manual && distinct.len() > 1 => {
            let at = distinct[0].newest.time.wall();
            distinct.retain(|c| c.newest.time.wall() == at);
            if distinct.len() > 1 {
                reached!(PickTieOpen);
                Resolved { value: newest, kind: Some(ConflictKind::Tie), sides: distinct }
            } else {
                reached!(PickTieByTime);
                plain(newest)
            }
        }
        Policy::FirstWrite if first.is_some() => {
            reached!(PickFirst);
            plain(first)
        }
        Policy::Max | Policy::Min => {
            let wanted = if policy == Policy::Max { Ordering::Greater } else { Ordering::Less };
            let best = distinct.iter().map(|c| &c.newest).filter(written).fold(
                None,
                |best: Option<&Candidate>, c| match best {
                    Some(best) if compare_numbers(&c.scalar, &best.scalar) != wanted => Some(best),
                    _ => Some(c),
                },
            );
            match (policy, best) {
                (Policy::Max, Some(_)) => reached!(PickMax),
                (_, Some(_)) => reached!(PickMin),
                (_, None) => reached!(PickBoundNull),
            }
            plain(best.map(|c| c.scalar.clone()).or(newest))
        }
        _ => {
            match (policy, distinct.len()) {
                (Policy::FirstWrite, 1..) => reached!(PickFirstNull),
                (_, 2..) => reached!(PickNewest),
                (_, 1) => reached!(PickOnly),
                _ => {}
            }
            plain(newest)
        }
    }
}

/// One for each value, by its newest candidate. `candidates` come newest first.
fn contenders(candidates: Vec<Candidate>) -> Vec<Contender> {
    let mut distinct: Vec<Contender> = Vec::new();
    let mut alike: BTreeMap<(u8, Vec<u8>), Vec<usize>> = BTreeMap::new();
    for candidate in candidates {
        if matches!(candidate.scalar, ScalarValue::F64(number) if number.is_nan()) {
            // Equal to nothing.
            distinct.push(Contender { newest: candidate, others: Vec::new() });
            continue;
        }
        let places = alike.entry(likeness(&candidate.scalar)).or_default();
        match places.iter().copied().find(|place| distinct[*place].newest.scalar == candidate.scalar) {
            Some(place) => {
                let Contender { newest, others } = &mut distinct[place];
                if candidate.device != newest.device && !others.contains(&candidate.device) {
                    reached!(EqualValues);
                    others.push(candidate.device);
                }
            }
            None => {
                places.push(distinct.len());
                distinct.push(Contender { newest: candidate, others: Vec::new() });
            }
        }
    }
    distinct
}

/// Equal for equal values, and for hardly any others.
fn likeness(scalar: &ScalarValue) -> (u8, Vec<u8>) {
    match scalar {
        ScalarValue::Bytes(bytes) => (0, bytes.clone()),
        ScalarValue::Str(text) => (1, text.as_bytes().to_vec()),
        ScalarValue::Int(number) => (2, number.to_be_bytes().to_vec()),
        ScalarValue::Uint(number) => (3, number.to_be_bytes().to_vec()),
        // The zeros are equal.
        ScalarValue::F64(number) => (4, (number + 0.0).to_bits().to_be_bytes().to_vec()),
        ScalarValue::Counter(_) => (5, Vec::new()),
        ScalarValue::Timestamp(time) => (6, time.to_be_bytes().to_vec()),
        ScalarValue::Boolean(truth) => (7, vec![u8::from(*truth)]),
        ScalarValue::Unknown { bytes, .. } => (8, bytes.clone()),
        ScalarValue::Null => (9, Vec::new()),
    }
}

/// Order of numbers and instants; anything else counts as equal.
pub(super) fn compare_numbers(a: &ScalarValue, b: &ScalarValue) -> Ordering {
    match (a, b) {
        (ScalarValue::Int(a), ScalarValue::Int(b))
        | (ScalarValue::Timestamp(a), ScalarValue::Timestamp(b)) => a.cmp(b),
        _ => match (a.as_f64(), b.as_f64()) {
            (Some(a), Some(b)) => a.total_cmp(&b),
            _ => Ordering::Equal,
        },
    }
}

/// A total order of JSON scalars: by kind, then by value. Sets print in it.
fn compare_json(a: &Json, b: &Json) -> Ordering {
    let rank = |v: &Json| match v {
        Json::Null => 0,
        Json::Bool(_) => 1,
        Json::Number(_) => 2,
        Json::String(_) => 3,
        Json::Array(_) => 4,
        Json::Object(_) => 5,
    };
    match (a, b) {
        (Json::Bool(a), Json::Bool(b)) => a.cmp(b),
        (Json::Number(a), Json::Number(b)) => match (a.as_i64(), b.as_i64()) {
            (Some(a), Some(b)) => a.cmp(&b),
            _ => a.as_f64().unwrap_or_default().total_cmp(&b.as_f64().unwrap_or_default()),
        },
        (Json::String(a), Json::String(b)) => a.cmp(b),
        _ => rank(a).cmp(&rank(b)),
    }
}

/// Which register a role writes.
pub(super) fn register_key<'a>(name: &'a str, group: bool, policy: Policy, role: Role) -> RootKey<'a> {
    let shadow = matches!(policy, Policy::ServerWins | Policy::ClientWins) && role == Role::Authority;
    if group { RootKey::Group { name, shadow } } else { RootKey::Field { name, shadow } }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Stores and programs hold the names.
    #[test]
    fn kinds_of_conflicts_keep_their_names() {
        let kinds = [
            (ConflictKind::Manual, "manual"),
            (ConflictKind::Tie, "tie"),
            (ConflictKind::LostEdit, "lost_edit"),
        ];
        for (kind, name) in kinds {
            assert_eq!(kind.name(), name);
            assert_eq!(ConflictKind::from_name(name), Some(kind));
        }
        assert_eq!(ConflictKind::from_name("lost"), None);
    }

    #[test]
    fn equal_values_are_alike_and_others_are_not() {
        let scalars = [
            ScalarValue::Null,
            ScalarValue::Boolean(false),
            ScalarValue::Boolean(true),
            ScalarValue::Int(0),
            ScalarValue::Uint(0),
            ScalarValue::Int(1),
            ScalarValue::F64(0.0),
            // No device writes it, and anyone can.
            ScalarValue::F64(-0.0),
            ScalarValue::F64(1.0),
            ScalarValue::Timestamp(0),
            ScalarValue::Str("0".into()),
            ScalarValue::Bytes(b"0".to_vec()),
        ];
        for a in &scalars {
            for b in &scalars {
                assert_eq!(a == b, likeness(a) == likeness(b), "{a:?} {b:?}");
            }
        }
    }
}
