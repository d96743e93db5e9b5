//! A light body: the same changes, held in plain ordered maps.
//!
//! What a change means is worked out here by the rules of Automerge's op sets: an operation
//! names those that it replaces, what nobody replaced is visible, increments add to the counter that
//! they name, and an inserted element stands behind the one that it names, before those
//! inserted there earlier. The changes themselves are Automerge's, to the byte, so that
//! everything outside of an entity is none the wiser.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::sync::Arc;

use automerge::legacy::{ElementId, Key, ObjectId, Op as RawOp, OpId, OpType};
use automerge::{ActorId, Change, ChangeHash, ExpandedChange, ObjId, ObjType, ScalarValue};

use super::{At, Commit, DocumentError, Step};
use crate::admission::derived_actor;

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
}

/// From now on documents of this thread have light bodies, or Automerge's again. Both say the same
/// and make the same changes.
#[cfg(feature = "light")]
pub fn set(on: bool) {
    ON.set(on);
}

pub(super) fn is_on() -> bool {
    ON.get()
}

type Id = (u64, ActorId);
/// None is the root.
type Object = Option<Id>;
/// Which changes count, by place; none is all.
type Scope = Option<Vec<bool>>;

/// See the [module](self).
#[derive(Clone, Debug, Default)]
pub(in crate::entity) struct Light(Arc<State>);

#[derive(Clone, Debug, Default)]
struct State {
    /// In the order of arrival, which is causal.
    changes: Vec<Arc<Taken>>,
    places: BTreeMap<ChangeHash, usize>,
    heads: BTreeSet<ChangeHash>,
    /// Places of an actor's changes, by sequence.
    actors: BTreeMap<ActorId, Vec<usize>>,
    maps: BTreeMap<Object, BTreeMap<String, Vec<Op>>>,
    sequences: BTreeMap<Object, Vec<Element>>,
    max_op: u64,
}

#[derive(Debug)]
struct Taken {
    raw: Change,
    deps: Vec<usize>,
}

#[derive(Clone, Debug)]
struct Op {
    id: Id,
    place: usize,
    held: Held,
    /// Who replaced it, or by how much they incremented it.
    successors: Vec<(usize, Option<i64>)>,
}

#[derive(Clone, Debug)]
enum Held {
    Scalar(ScalarValue),
    Object,
}

#[derive(Clone, Debug)]
struct Element {
    id: Id,
    op: Op,
}

fn counts(scope: &Scope, place: usize) -> bool {
    scope.as_ref().is_none_or(|scope| scope.get(place).copied().unwrap_or_default())
}

impl Op {
    fn is_counter(&self) -> bool {
        matches!(self.held, Held::Scalar(ScalarValue::Counter(_)))
    }

    fn visible(&self, scope: &Scope) -> bool {
        let hides = |(place, by): &(usize, Option<i64>)| {
            counts(scope, *place) && !(self.is_counter() && by.is_some())
        };
        counts(scope, self.place) && !self.successors.iter().any(hides)
    }

    fn scalar(&self, scope: &Scope) -> Option<ScalarValue> {
        let Held::Scalar(scalar) = &self.held else { return None };
        if !self.is_counter() {
            return Some(scalar.clone());
        }
        let added = self.successors.iter().filter(|(place, _)| counts(scope, *place));
        let added: i64 = added.filter_map(|(_, by)| *by).fold(0, i64::wrapping_add);
        Some(ScalarValue::counter(scalar.as_i64().unwrap_or_default().wrapping_add(added)))
    }

    fn obj_id(&self) -> ObjId {
        ObjId::Id(self.id.0, self.id.1.clone(), 0)
    }
}

fn object(obj: &ObjId) -> Object {
    match obj {
        ObjId::Root => None,
        ObjId::Id(counter, actor, _) => Some((*counter, actor.clone())),
    }
}

fn id(id: &OpId) -> Id {
    (id.counter(), id.actor().clone())
}

fn told(error: impl std::fmt::Display) -> DocumentError {
    error.to_string()
}

impl Light {
    pub(super) fn load(snapshot: &[u8]) -> Result<Self, DocumentError> {
        let mut changes = Vec::new();
        let mut rest = snapshot;
        while !rest.is_empty() {
            let (length, after) = rest.split_first_chunk::<4>().ok_or("a snapshot ends early")?;
            let length = u32::from_be_bytes(*length) as usize;
            let (bytes, after) = after.split_at_checked(length).ok_or("a snapshot ends early")?;
            changes.push(Change::try_from(bytes).map_err(told)?);
            rest = after;
        }
        let mut light = Self::default();
        light.apply(changes)?;
        Ok(light)
    }

    pub(super) fn save(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for change in &self.0.changes {
            let raw = change.raw.raw_bytes();
            bytes.extend_from_slice(&(raw.len() as u32).to_be_bytes());
            bytes.extend_from_slice(raw);
        }
        bytes
    }

    /// What is saved is what was taken: there is nothing to be proved.
    pub(super) fn save_proved(&self) -> Result<Vec<u8>, &'static str> {
        Ok(self.save())
    }

    pub(super) fn apply(&mut self, changes: Vec<Change>) -> Result<(), DocumentError> {
        let before = self.clone();
        let state = Arc::make_mut(&mut self.0);
        let mut waiting = changes;
        loop {
            let mut blocked = Vec::new();
            let count = waiting.len();
            for change in waiting {
                if state.places.contains_key(&change.hash()) {
                    continue;
                }
                if !change.deps().iter().all(|dep| state.places.contains_key(dep)) {
                    blocked.push(change);
                } else if let Err(error) = state.take(change) {
                    *self = before;
                    return Err(error);
                }
            }
            if blocked.is_empty() || blocked.len() == count {
                return Ok(());
            }
            waiting = blocked;
        }
    }

    pub(super) fn fork_at(&self, heads: &[ChangeHash]) -> Result<Self, DocumentError> {
        let scope = self.0.scope(heads);
        let kept = self.0.changes.iter().enumerate().filter(|(place, _)| scope[*place]);
        let mut fork = Self::default();
        fork.apply(kept.map(|(_, change)| change.raw.clone()).collect())?;
        Ok(fork)
    }

    pub(super) fn heads(&self) -> Vec<ChangeHash> {
        self.0.heads.iter().copied().collect()
    }

    pub(super) fn has(&self, hash: &ChangeHash) -> bool {
        self.0.places.contains_key(hash)
    }

    pub(super) fn change(&self, hash: &ChangeHash) -> Option<Change> {
        Some(self.0.changes[*self.0.places.get(hash)?].raw.clone())
    }

    pub(super) fn changes_since(&self, heads: &[ChangeHash]) -> Vec<Change> {
        let scope = self.0.scope(heads);
        let new = self.0.changes.iter().enumerate().filter(|(place, _)| !scope[*place]);
        new.map(|(_, change)| change.raw.clone()).collect()
    }

    pub(super) fn change_of(&self, id: &ObjId) -> Option<ChangeHash> {
        let (counter, actor) = object(id)?;
        let places = self.0.actors.get(&actor)?;
        let of = |place: &&usize| {
            let change = &self.0.changes[**place].raw;
            (change.start_op().get()..=change.max_op()).contains(&counter)
        };
        places.iter().find(of).map(|place| self.0.changes[*place].raw.hash())
    }

    pub(super) fn values(&self, obj: &ObjId, key: &str, at: At<'_>) -> Vec<(ScalarValue, ObjId)> {
        let scope = self.0.scope_at(at);
        let ops = self.0.at_key(&object(obj), key).iter().filter(|op| op.visible(&scope));
        ops.filter_map(|op| Some((op.scalar(&scope)?, op.obj_id()))).collect()
    }

    fn winner(&self, key: &str, scope: &Scope) -> Option<&Op> {
        self.0.at_key(&None, key).iter().rfind(|op| op.visible(scope))
    }

    pub(super) fn value(&self, key: &str, at: At<'_>) -> Option<ScalarValue> {
        let scope = self.0.scope_at(at);
        self.winner(key, &scope)?.scalar(&scope)
    }

    pub(super) fn container(&self, key: &str, at: At<'_>) -> Option<ObjId> {
        let winner = self.winner(key, &self.0.scope_at(at))?;
        matches!(winner.held, Held::Object).then(|| winner.obj_id())
    }

    pub(super) fn keys(&self, obj: &ObjId, at: At<'_>) -> Vec<String> {
        let scope = self.0.scope_at(at);
        let keys = self.0.maps.get(&object(obj)).into_iter().flatten();
        keys.filter(|(_, ops)| ops.iter().any(|op| op.visible(&scope))).map(|(key, _)| key.clone()).collect()
    }

    fn visible(&self, obj: &ObjId, at: At<'_>) -> (Scope, Vec<&Op>) {
        let scope = self.0.scope_at(at);
        let elements = self.0.sequences.get(&object(obj)).into_iter().flatten();
        let ops = elements.map(|element| &element.op).filter(|op| op.visible(&scope)).collect();
        (scope, ops)
    }

    pub(super) fn length(&self, obj: &ObjId, at: At<'_>) -> usize {
        self.visible(obj, at).1.len()
    }

    pub(super) fn items(&self, obj: &ObjId, at: At<'_>) -> Vec<(ScalarValue, ObjId)> {
        let (scope, ops) = self.visible(obj, at);
        ops.into_iter().filter_map(|op| Some((op.scalar(&scope)?, op.obj_id()))).collect()
    }

    pub(super) fn text(&self, obj: &ObjId, at: At<'_>) -> String {
        let (scope, ops) = self.visible(obj, at);
        ops.into_iter().filter_map(|op| Some(op.scalar(&scope)?.as_str()?.to_owned())).collect()
    }

    pub(super) fn commit(&mut self, commit: Commit<'_>, steps: Vec<Step>) -> Result<Change, DocumentError> {
        let before = self.clone();
        let made = Arc::make_mut(&mut self.0).commit(commit, steps);
        if made.is_err() {
            *self = before;
        }
        made
    }
}

impl State {
    /// What a version includes.
    fn scope(&self, heads: &[ChangeHash]) -> Vec<bool> {
        let mut scope = vec![false; self.changes.len()];
        for place in heads.iter().filter_map(|head| self.places.get(head)) {
            scope[*place] = true;
        }
        for place in (0..self.changes.len()).rev() {
            if scope[place] {
                for dep in &self.changes[place].deps {
                    scope[*dep] = true;
                }
            }
        }
        scope
    }

    fn scope_at(&self, at: At<'_>) -> Scope {
        at.map(|heads| self.scope(heads))
    }

    fn at_key(&self, object: &Object, key: &str) -> &[Op] {
        self.maps.get(object).and_then(|map| map.get(key)).map(Vec::as_slice).unwrap_or_default()
    }

    fn take(&mut self, raw: Change) -> Result<(), DocumentError> {
        let expanded = raw.decode();
        let place = self.changes.len();
        for (number, op) in expanded.operations.iter().enumerate() {
            let id = (expanded.start_op.get() + number as u64, expanded.actor_id.clone());
            self.carry_out(place, id, op)?;
        }
        self.log(raw)
    }

    /// Writes a change down whose operations were carried out.
    fn log(&mut self, raw: Change) -> Result<(), DocumentError> {
        let place = self.changes.len();
        let own = self.actors.entry(raw.actor_id().clone()).or_default();
        if own.len() as u64 + 1 != raw.seq() {
            return Err(format!("change {} of an actor comes after {}", raw.seq(), own.len()));
        }
        own.push(place);
        for dep in raw.deps() {
            self.heads.remove(dep);
        }
        self.heads.insert(raw.hash());
        self.places.insert(raw.hash(), place);
        self.max_op = self.max_op.max(raw.max_op());
        let deps = raw.deps().iter().filter_map(|dep| self.places.get(dep)).copied().collect();
        self.changes.push(Arc::new(Taken { raw, deps }));
        Ok(())
    }

    /// What one operation does.
    fn carry_out(&mut self, place: usize, own: Id, op: &RawOp) -> Result<(), DocumentError> {
        let object = match &op.obj {
            ObjectId::Root => None,
            ObjectId::Id(of) => Some(id(of)),
        };
        let by = match op.action {
            OpType::Increment(by) => Some(by),
            _ => None,
        };
        let held = match &op.action {
            OpType::Put(scalar) => Some(Held::Scalar(scalar.clone())),
            OpType::Make(kind) => {
                self.begin(&own, *kind);
                Some(Held::Object)
            }
            OpType::Delete | OpType::Increment(_) => None,
            OpType::MarkBegin(_) | OpType::MarkEnd(_) => return Err("marks are not known here".into()),
        };
        let new = held.map(|held| Op { id: own.clone(), place, held, successors: Vec::new() });
        match &op.key {
            Key::Map(key) => {
                let map = match object.is_none() {
                    true => self.maps.entry(object).or_default(),
                    false => self.maps.get_mut(&object).ok_or("an object is not known")?,
                };
                let ops = map.entry(key.to_string()).or_default();
                for pred in op.pred.iter().map(id) {
                    let replaced = ops.iter_mut().find(|op| op.id == pred);
                    replaced.ok_or("what is replaced is not known")?.successors.push((place, by));
                }
                if let Some(new) = new {
                    let at = ops.partition_point(|op| op.id < new.id);
                    ops.insert(at, new);
                }
            }
            Key::Seq(after) => {
                let elements = self.sequences.get_mut(&object).ok_or("an object is not known")?;
                let named = match after {
                    ElementId::Head => None,
                    ElementId::Id(of) => {
                        let of = id(of);
                        let at = elements.iter().position(|element| element.id == of);
                        Some(at.ok_or("an element is not known")?)
                    }
                };
                match (new, op.insert, named) {
                    (Some(new), true, named) => {
                        let mut at = named.map_or(0, |at| at + 1);
                        while elements.get(at).is_some_and(|other| other.id > own) {
                            at += 1;
                        }
                        elements.insert(at, Element { id: own, op: new });
                    }
                    (None, false, Some(at)) => elements[at].op.successors.push((place, by)),
                    _ => return Err("items are inserted and removed, and not replaced".into()),
                }
            }
        }
        Ok(())
    }

    fn begin(&mut self, id: &Id, kind: ObjType) {
        let object = Some(id.clone());
        match kind {
            ObjType::Map | ObjType::Table => {
                self.maps.insert(object, BTreeMap::new());
            }
            ObjType::List | ObjType::Text => {
                self.sequences.insert(object, Vec::new());
            }
        }
    }

    fn commit(&mut self, commit: Commit<'_>, steps: Vec<Step>) -> Result<Change, DocumentError> {
        let place = self.changes.len();
        let mut deps = commit.at.map_or_else(|| self.heads.iter().copied().collect(), <[ChangeHash]>::to_vec);
        let mut scope = self.scope_at(commit.at);
        let mut actor = commit.actor.clone();
        match &mut scope {
            Some(scope) => {
                // An actor goes on only from a version that has all that it did.
                for level in 1.. {
                    let newest = self.actors.get(&actor).and_then(|own| own.last());
                    if newest.is_none_or(|newest| scope[*newest]) {
                        break;
                    }
                    actor = derived_actor(&commit.actor, level);
                }
                // The change sees what it does itself.
                scope.push(true);
            }
            None => {
                let last = self.actors.get(&actor).and_then(|own| own.last());
                let last = last.map(|last| self.changes[*last].raw.hash());
                deps.extend(last.filter(|last| !deps.contains(last)));
            }
        }
        deps.sort_unstable();
        let seq = self.actors.get(&actor).map_or(0, Vec::len) as u64 + 1;
        let mut draft =
            Draft { place, scope, start: self.max_op + 1, actor: actor.clone(), operations: Vec::new() };
        for step in steps {
            draft.step(self, step)?;
        }
        if draft.operations.is_empty() {
            return Err("nothing was changed".into());
        }
        let footer = match seq {
            1 => [&[1, commit.author.len() as u8][..], &commit.author].concat(),
            _ => Vec::new(),
        };
        let raw = Change::from(ExpandedChange {
            operations: draft.operations,
            actor_id: actor,
            hash: None,
            seq,
            start_op: NonZeroU64::new(draft.start).ok_or("no counter is left")?,
            time: commit.time,
            message: Some(commit.message),
            deps,
            extra_bytes: footer,
            author: None,
        });
        self.log(raw.clone())?;
        Ok(raw)
    }
}

/// A change that is being made.
struct Draft {
    place: usize,
    scope: Scope,
    start: u64,
    actor: ActorId,
    operations: Vec<RawOp>,
}

impl Draft {
    fn step(&mut self, state: &mut State, step: Step) -> Result<(), DocumentError> {
        match step {
            Step::Put { obj, key, value, fresh } => {
                if fresh {
                    self.at_key(state, &obj, &key, OpType::Delete)?;
                }
                self.at_key(state, &obj, &key, OpType::Put(value))
            }
            Step::Remove { obj, key } => self.at_key(state, &obj, &key, OpType::Delete),
            Step::Increment { key, by } => self.at_key(state, &ObjId::Root, &key, OpType::Increment(by)),
            Step::Insert { obj, at, items } => {
                let at = at.unwrap_or_else(|| self.elements(state, &obj).len());
                self.insert(state, &obj, at, items)
            }
            Step::RemoveItems { obj, at, count } => self.remove(state, &obj, at, count),
            Step::Splice { obj, at, delete, insert } => {
                let letters: Vec<ScalarValue> = insert.chars().map(ScalarValue::from).collect();
                let come = letters.len();
                if come > 0 {
                    self.insert(state, &obj, at, letters)?;
                }
                self.remove(state, &obj, at + come, delete)
            }
        }
    }

    fn push(&mut self, state: &mut State, op: RawOp) -> Result<(), DocumentError> {
        let id = (self.start + self.operations.len() as u64, self.actor.clone());
        state.carry_out(self.place, id, &op)?;
        self.operations.push(op);
        Ok(())
    }

    /// Puts, removes or increments what stands at a key.
    fn at_key(
        &mut self,
        state: &mut State,
        obj: &ObjId,
        key: &str,
        mut action: OpType,
    ) -> Result<(), DocumentError> {
        let mut there: Vec<&Op> =
            state.at_key(&object(obj), key).iter().filter(|op| op.visible(&self.scope)).collect();
        match (&action, there.last().map(|op| &op.held)) {
            (OpType::Delete, None) => return Ok(()),
            (OpType::Put(value), Some(Held::Scalar(held))) if value == held => {
                if there.len() == 1 {
                    return Ok(());
                }
                // The value stands already: only what competes with it goes.
                there.pop();
                action = OpType::Delete;
            }
            (OpType::Increment(_), _) if !there.iter().any(|op| op.is_counter()) => {
                return Err("there is no counter to increment".into());
            }
            _ => {}
        }
        let pred: Vec<OpId> = there.iter().map(|op| OpId::new(op.id.0, &op.id.1)).collect();
        let op = RawOp { action, obj: raw(obj), key: Key::Map(key.into()), pred: pred.into(), insert: false };
        self.push(state, op)
    }

    fn elements(&self, state: &State, obj: &ObjId) -> Vec<Id> {
        let elements = state.sequences.get(&object(obj)).into_iter().flatten();
        elements.filter(|element| element.op.visible(&self.scope)).map(|element| element.id.clone()).collect()
    }

    fn insert(
        &mut self,
        state: &mut State,
        obj: &ObjId,
        at: usize,
        items: Vec<ScalarValue>,
    ) -> Result<(), DocumentError> {
        let there = self.elements(state, obj);
        let mut after = match at.checked_sub(1) {
            None => ElementId::Head,
            Some(before) => {
                let (counter, actor) = there.get(before).ok_or("a position is beyond the end")?;
                ElementId::Id(OpId::new(*counter, actor))
            }
        };
        for item in items {
            let next = OpId::new(self.start + self.operations.len() as u64, &self.actor);
            let op = RawOp {
                action: OpType::Put(item),
                obj: raw(obj),
                key: Key::Seq(after),
                pred: Vec::new().into(),
                insert: true,
            };
            self.push(state, op)?;
            after = ElementId::Id(next);
        }
        Ok(())
    }

    fn remove(
        &mut self,
        state: &mut State,
        obj: &ObjId,
        at: usize,
        count: usize,
    ) -> Result<(), DocumentError> {
        let there = self.elements(state, obj);
        let end = at.checked_add(count).filter(|end| *end <= there.len());
        for (counter, actor) in &there[at..end.ok_or("a position is beyond the end")?] {
            let of = OpId::new(*counter, actor);
            let op = RawOp {
                action: OpType::Delete,
                obj: raw(obj),
                key: Key::Seq(ElementId::Id(of.clone())),
                pred: vec![of].into(),
                insert: false,
            };
            self.push(state, op)?;
        }
        Ok(())
    }
}

fn raw(obj: &ObjId) -> ObjectId {
    match obj {
        ObjId::Root => ObjectId::Root,
        ObjId::Id(counter, actor, _) => ObjectId::Id(OpId::new(*counter, actor)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::full::Full;
    use super::super::{Commit, Document, Step};
    use super::*;
    use crate::genesis::{Genesis, GenesisKind};

    /// Chance that can be repeated (splitmix64).
    struct Dice(u64);

    impl Dice {
        fn roll(&mut self, count: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) % count.max(1) as u64) as usize
        }
    }

    /// One device's document, with both bodies.
    struct Pair {
        full: Document,
        light: Document,
        author: u8,
        /// Versions that it had.
        versions: Vec<Vec<ChangeHash>>,
    }

    const REGISTERS: [&str; 3] = ["a", "b", "c"];
    const TAGS: [&str; 4] = ["\"x\"", "\"y\"", "z", "ü"];

    impl Pair {
        fn new(author: u8) -> Self {
            let kinds = [
                ("count", GenesisKind::Counter),
                ("tags", GenesisKind::Set),
                ("list", GenesisKind::List),
                ("text", GenesisKind::Text),
            ];
            let genesis = kinds.map(|(field, kind)| Genesis::new("thing", field, kind).change().clone());
            let mut pair = Pair {
                full: Document::Full(Full::new()),
                light: Document::Light(Light::default()),
                author,
                versions: Vec::new(),
            };
            pair.apply(genesis.to_vec());
            pair
        }

        fn apply(&mut self, changes: Vec<Change>) {
            self.full.apply(changes.clone()).unwrap();
            self.light.apply(changes).unwrap();
            self.versions.push(self.full.heads());
        }

        fn some_version(&self, dice: &mut Dice) -> Vec<ChangeHash> {
            self.versions[dice.roll(self.versions.len())].clone()
        }

        fn edit(&mut self, dice: &mut Dice) {
            let version = self.some_version(dice);
            let at = (dice.roll(3) == 0).then_some(&version[..]);
            let container = |name: &str| self.full.container(name, None).unwrap();
            let (tags, list, text) = (container("tags"), container("list"), container("text"));
            let mut lengths = [self.full.length(&list, at), self.full.length(&text, at)];
            let mut steps = Vec::new();
            for _ in 0..1 + dice.roll(4) {
                let number = dice.roll(3) as i64;
                let value = match dice.roll(3) {
                    0 => ScalarValue::Null,
                    1 => ScalarValue::Int(number),
                    _ => ScalarValue::Str(format!("s{number}").into()),
                };
                let fresh = dice.roll(2) == 0;
                let word: String = ["", "a", "öß", "x\u{1f300}y"][dice.roll(4)].into();
                steps.push(match dice.roll(8) {
                    0 | 1 => {
                        let key = REGISTERS[dice.roll(3)].to_owned();
                        Step::Put { obj: ObjId::Root, key, value, fresh }
                    }
                    2 => Step::Increment { key: "count".into(), by: number - 1 },
                    3 => Step::Put { obj: tags.clone(), key: TAGS[dice.roll(4)].into(), value, fresh },
                    4 => Step::Remove { obj: tags.clone(), key: TAGS[dice.roll(4)].into() },
                    5 => {
                        let place = dice.roll(lengths[0] + 1);
                        let items = vec![value; dice.roll(3)];
                        let at = (place < lengths[0] || fresh).then_some(place);
                        lengths[0] += items.len();
                        Step::Insert { obj: list.clone(), at, items }
                    }
                    6 => {
                        let place = dice.roll(lengths[0] + 1);
                        let count = dice.roll(lengths[0] - place + 1).min(2);
                        lengths[0] -= count;
                        Step::RemoveItems { obj: list.clone(), at: place, count }
                    }
                    _ => {
                        let place = dice.roll(lengths[1] + 1);
                        let delete = dice.roll(lengths[1] - place + 1).min(3);
                        lengths[1] = lengths[1] + word.chars().count() - delete;
                        Step::Splice { obj: text.clone(), at: place, delete, insert: word }
                    }
                });
            }
            let commit = || Commit {
                actor: ActorId::from(&[self.author; 16][..]),
                author: vec![self.author; 41],
                at,
                message: "d".into(),
                time: 1_000 + self.versions.len() as i64,
            };
            let (full, light) =
                (self.full.commit(commit(), steps.clone()), self.light.commit(commit(), steps));
            let (full, light) = (full.map(|c| c.raw_bytes().to_vec()), light.map(|c| c.raw_bytes().to_vec()));
            assert_eq!(full, light, "the same change, to the byte");
            self.versions.push(self.full.heads());
        }

        /// Takes some of what another has, and that only in causal order.
        fn sync(&mut self, other: &Pair, dice: &mut Dice) {
            let mut changes = other.full.changes_since(&self.full.heads());
            changes.retain(|change| !self.full.has(&change.hash()));
            changes.truncate(1 + dice.roll(changes.len()));
            if dice.roll(2) == 0 {
                changes.reverse();
            }
            self.apply(changes);
        }

        fn compare(&self, dice: &mut Dice) {
            assert_eq!(self.full.heads(), self.light.heads());
            let version = self.some_version(dice);
            // Each in some causal order.
            let hashes = |doc: &Document| -> BTreeSet<ChangeHash> {
                doc.changes_since(&version).iter().map(Change::hash).collect()
            };
            assert_eq!(hashes(&self.full), hashes(&self.light));
            for at in [None, Some(&version[..])] {
                for (full, light) in self.seen(&self.full, at).iter().zip(self.seen(&self.light, at)) {
                    assert_eq!(*full, light);
                }
            }
        }

        /// All that can be read in a version, as text.
        fn seen(&self, doc: &Document, at: At<'_>) -> Vec<String> {
            let mut seen = Vec::new();
            let mut tell = |what: &dyn std::fmt::Debug| seen.push(format!("{what:?}"));
            let ids = |found: Vec<(ScalarValue, ObjId)>| -> Vec<(ScalarValue, String, Option<ChangeHash>)> {
                found.into_iter().map(|(value, id)| (value, id.to_string(), doc.change_of(&id))).collect()
            };
            tell(&doc.keys(&ObjId::Root, at));
            for key in REGISTERS {
                tell(&ids(doc.values(&ObjId::Root, key, at)));
                tell(&doc.value(key, at));
            }
            tell(&doc.value("count", at).and_then(|count| count.as_i64()));
            for name in ["tags", "list", "text"] {
                let Some(obj) = doc.container(name, at) else { continue };
                tell(&obj.to_string());
                match name {
                    "tags" => {
                        tell(&doc.keys(&obj, at));
                        TAGS.iter().for_each(|key| tell(&ids(doc.values(&obj, key, at))));
                    }
                    "list" => tell(&(doc.length(&obj, at), ids(doc.items(&obj, at)))),
                    _ => tell(&(doc.length(&obj, at), doc.text(&obj, at), ids(doc.items(&obj, at)))),
                }
            }
            seen
        }
    }

    #[test]
    fn both_bodies_say_the_same_of_any_history() {
        for seed in 0..60 {
            let dice = &mut Dice(seed);
            let mut pairs: Vec<Pair> = (1..=2 + dice.roll(3) as u8).map(Pair::new).collect();
            for _ in 0..40 {
                let at = dice.roll(pairs.len());
                let mut pair = pairs.swap_remove(at);
                match dice.roll(3) {
                    0 => {
                        let other = dice.roll(pairs.len());
                        pair.sync(&pairs[other], dice);
                    }
                    _ => pair.edit(dice),
                }
                pair.compare(dice);
                pairs.push(pair);
            }
            let pair = &pairs[0];
            let again = Light::load(&pair.light.save()).map(Document::Light).unwrap();
            assert_eq!(pair.seen(&again, None), pair.seen(&pair.full, None));
            let version = pair.some_version(dice);
            let [full, light] = [&pair.full, &pair.light].map(|doc| doc.fork_at(&version).unwrap());
            assert_eq!(full.heads(), light.heads());
            assert_eq!(pair.seen(&full, None), pair.seen(&light, None));
        }
    }

    #[test]
    fn what_a_document_cannot_hold_leaves_no_trace() {
        let mut pair = Pair::new(1);
        let dice = &mut Dice(7);
        (0..10).for_each(|_| pair.edit(dice));
        let before = pair.light.heads();
        let last = pair.light.change(&before[0]).unwrap();
        let mut forged = last.decode();
        forged.seq += 5;
        forged.start_op = NonZeroU64::new(500).unwrap();
        forged.deps = before.clone();
        forged.hash = None;
        assert!(pair.light.apply(vec![Change::from(forged)]).is_err());
        assert_eq!(pair.light.heads(), before);
        let beyond =
            Step::RemoveItems { obj: pair.light.container("list", None).unwrap(), at: 900, count: 1 };
        let commit = Commit {
            actor: ActorId::from(&[1; 16][..]),
            author: vec![1; 41],
            at: None,
            message: "d".into(),
            time: 9_999,
        };
        assert!(pair.light.commit(commit.clone(), vec![beyond.clone()]).is_err());
        assert!(pair.full.commit(commit, vec![beyond]).is_err());
        assert_eq!(pair.light.heads(), before);
        pair.compare(dice);
    }
}
