//! Devices that edit one entity and meet now and then, each held to the model at every step.

use std::collections::{BTreeMap, BTreeSet};

use anabranch_core::admission::{Judge, Refusal, RefusalCode, Vouches};
use anabranch_core::change::{Change, Note, Role};
use anabranch_core::clock::{Hlc, WallMs};
use anabranch_core::entity::{EditContext, EditError, Entity, Row};
use anabranch_core::id::{Author, DeviceId, EntityKey, Incarnation, WorkspaceId};
use anabranch_core::intent::Intent;
use anabranch_core::schema::{EntityType, Schema};
use automerge::transaction::{CommitOptions, Transaction};
use automerge::{Automerge, ChangeHash, ReadDoc};

use anabranch_sim::dice::Dice;
pub use anabranch_sim::draft::screen_of;

use crate::model::{Edit, EditId, Effects, Log, No, Screen, Seen};

/// The wall clock when a world begins.
pub const START_MS: u64 = 1_750_000_000_000;

/// A device with its replica of the entity.
pub struct Device {
    /// Who it is.
    pub author: Author,
    /// In which role it writes.
    pub role: Role,
    /// What it holds.
    pub entity: Entity,
    /// How far its clock is off.
    pub offset_ms: i64,
    /// Every version that it ever showed.
    pub versions: Vec<Vec<ChangeHash>>,
}

/// Some devices, one entity, and the log of all edits.
pub struct World {
    /// The entity's type.
    pub ty: EntityType,
    /// The entity's name.
    pub key: EntityKey,
    /// Its workspace.
    pub workspace: WorkspaceId,
    /// The devices.
    pub devices: Vec<Device>,
    /// What users meant.
    pub log: Log,
    /// Right time, in milliseconds.
    pub wall_ms: u64,
    /// A replica that judges every change as the relay does.
    pub relay: Entity,
    changes: Vec<Change>,
    intents: Vec<Vec<Intent>>,
    ids: BTreeMap<ChangeHash, EditId>,
}

/// Reads a schema that must be right.
pub fn schema(source: &str) -> Schema {
    Schema::parse(source, "test.toml").unwrap_or_else(|errors| panic!("{errors}"))
}

/// A type with these fields, given as lines of TOML.
pub fn fields(lines: &str) -> EntityType {
    schema(&format!("[thing]\nversion = 1\n[thing.fields]\n{lines}\n")).types["thing"].clone()
}

impl World {
    /// Devices with these roles, none of which holds anything yet.
    pub fn new(ty: &EntityType, roles: &[Role]) -> Self {
        let workspace = WorkspaceId::new("home").unwrap();
        let key = EntityKey::new(&ty.name, "e").unwrap();
        let device = |(n, role): (usize, &Role)| Device {
            author: Author { device: DeviceId([n as u8 + 1; 32]), incarnation: Incarnation::new(0, 0) },
            role: *role,
            entity: Entity::new(&workspace, &key, Some(ty)),
            offset_ms: 0,
            versions: Vec::new(),
        };
        Self {
            devices: roles.iter().enumerate().map(device).collect(),
            ty: ty.clone(),
            log: Log::new(ty),
            relay: Entity::new(&workspace, &key, Some(ty)),
            workspace,
            key,
            wall_ms: START_MS,
            changes: Vec::new(),
            intents: Vec::new(),
            ids: BTreeMap::new(),
        }
    }

    /// Some ordinary devices.
    pub fn of(ty: &EntityType, devices: usize) -> Self {
        Self::new(ty, &vec![Role::Device; devices])
    }

    /// The edits that a device holds.
    pub fn seen_by(&self, device: usize) -> Seen {
        self.seen_in(&self.devices[device].entity)
    }

    /// The edits that a replica holds.
    pub fn seen_in(&self, entity: &Entity) -> Seen {
        entity.headers().headers().iter().map(|header| self.ids[&header.hash]).collect()
    }

    /// The change of an edit.
    pub fn change(&self, id: EditId) -> &Change {
        &self.changes[id]
    }

    /// The intents of an edit as the outbox keeps them.
    pub fn intents(&self, id: EditId) -> &[Intent] {
        &self.intents[id]
    }

    /// The edit of a change.
    pub fn id(&self, change: &ChangeHash) -> EditId {
        self.ids[change]
    }

    /// What a device shows.
    pub fn row(&self, device: usize) -> Row {
        self.devices[device].entity.row(&self.ty)
    }

    /// What lists and texts show at a version.
    pub fn screen(&self, device: usize, base: Option<&[ChangeHash]>) -> Screen {
        let entity = &self.devices[device].entity;
        let row = match base {
            Some(base) => entity.row_at(&self.ty, base),
            None => entity.row(&self.ty),
        };
        screen_of(&self.ty, &row.fields)
    }

    /// Lets a device edit, `wait_ms` later, and asks the model whether that is right. `base` is
    /// an older version that the user looks at.
    pub fn try_edit(
        &mut self,
        device: usize,
        base: Option<&[ChangeHash]>,
        intents: &[Intent],
    ) -> Result<Option<EditId>, EditError> {
        let saw = match base {
            Some(base) => self.past_of(base),
            None => self.seen_by(device),
        };
        let screen = self.screen(device, base);
        let Device { author, role, offset_ms, .. } = self.devices[device];
        let deeds = self.log.understand(&saw, &screen, intents);
        let wanted = self.log.judge(role, &saw, &deeds);
        let wall = WallMs(self.wall_ms.saturating_add_signed(offset_ms));
        let context = EditContext {
            ty: &self.ty,
            author,
            role,
            wall,
            spread: 0,
            tx: None,
            again: None,
            based_on: base,
            checked: true,
        };
        let before = self.devices[device].entity.heads();
        let made = self.devices[device].entity.edit(&context, intents);
        let told = format!("{intents:?} on {:?}", self.devices[device].entity.row(&self.ty));
        match (&made, &wanted) {
            (Err(error), Err(no)) => {
                let kind = match error {
                    EditError::Validation(_) => No::Validation,
                    EditError::Conflict { .. } => No::Conflict,
                    EditError::NotFound(_) => No::NotFound,
                    other => panic!("{told}: {other}"),
                };
                assert_eq!(kind, *no, "{told}: {error}");
            }
            (Ok(None), Ok(effects)) => assert_eq!(effects, &Effects::none(), "nothing was changed by {told}"),
            (Ok(Some(edited)), Ok(effects)) => {
                assert!(effects.any(), "something was changed by {told}");
                let id = self.log.push(Edit {
                    device: author.device,
                    role,
                    time: edited.change.time(),
                    actor: edited.change.actor().to_bytes().to_vec(),
                    saw: saw.clone(),
                    deeds,
                    effects: effects.clone(),
                });
                self.ids.insert(edited.change.hash(), id);
                self.changes.push(edited.change.clone());
                self.intents.push(edited.intents.clone());
                self.check_header(id, wall);
                let judged = self.submit(device, edited.change.clone());
                assert_eq!(judged, Ok(()), "the relay refuses what is right: {told}\n{}", self.story());
            }
            _ => {
                let made = made.as_ref().map(Option::is_some);
                panic!("{told}: the engine says {made:?}, the model {wanted:?}\n{}", self.story())
            }
        }
        if !matches!(made, Ok(Some(_))) {
            assert_eq!(self.devices[device].entity.heads(), before, "no edit and yet a new version");
        }
        self.note_version(device);
        self.check(device);
        made.map(|edited| edited.map(|edited| self.ids[&edited.change.hash()]))
    }

    /// Offers a change of a device to the relay, whose clock is far ahead.
    pub fn submit(&mut self, device: usize, change: Change) -> Result<(), Refusal> {
        let Device { author, role, .. } = self.devices[device];
        let judge =
            Judge::Relay { device: author.device, role, vouches: Vouches::Own, now: WallMs(START_MS * 2) };
        let received = self.relay.receive(vec![change], Some(&self.ty), judge, true);
        received.refused.into_iter().next().map_or(Ok(()), |(_, refusal)| Err(refusal))
    }

    /// A change that no honest device makes: what `forge` does to a device's document, with the
    /// actor, message and a time as they should be. Nobody has taken it yet.
    pub fn forge(&self, device: usize, forge: impl FnOnce(&mut Transaction<'_>)) -> Change {
        let Device { author, role, entity, .. } = &self.devices[device];
        let mut doc = Automerge::load(&entity.save()).unwrap();
        // Naming an author draws a new actor.
        doc.set_author(Some(automerge::Author::from(author.to_bytes())));
        doc.set_actor(author.actor(&self.workspace, &self.key));
        let mut tx = doc.transaction();
        forge(&mut tx);
        let time = Hlc::from_wall(WallMs(self.wall_ms + 1_000_000_000)).to_change_time();
        let message = Note { role: *role, ..Note::default() }.to_message();
        let (hash, _) = tx.commit_with(CommitOptions::default().with_message(message).with_time(time));
        Change::from_raw(doc.get_change_by_hash(&hash.unwrap()).unwrap()).unwrap()
    }

    /// An edit that must change something.
    pub fn edit(&mut self, device: usize, intents: &[Intent]) -> EditId {
        self.wall_ms += 1_000;
        self.try_edit(device, None, intents).unwrap().unwrap()
    }

    /// The change says exactly what its author had seen, and it is later than all of that.
    fn check_header(&self, id: EditId, wall: WallMs) {
        let (edit, change) = (self.log.edit(id), &self.changes[id]);
        let known: Vec<ChangeHash> =
            change.deps().iter().filter(|dep| self.ids.contains_key(dep)).copied().collect();
        assert_eq!(self.past_of(&known), edit.saw, "what its author had seen");
        assert!(edit.time.wall() >= wall, "{:?} is before the clock {wall:?}", edit.time);
        for seen in &edit.saw {
            assert!(edit.time > self.log.edit(*seen).time, "an edit is dated before what its author saw");
        }
    }

    /// A version's edits.
    pub fn past_of(&self, heads: &[ChangeHash]) -> Seen {
        let mut past = Seen::new();
        for id in heads.iter().map(|head| self.ids[head]) {
            past.extend(&self.log.edit(id).saw);
            past.insert(id);
        }
        past
    }

    fn note_version(&mut self, device: usize) {
        let device = &mut self.devices[device];
        let heads = device.entity.heads();
        if device.versions.last() != Some(&heads) && !heads.is_empty() {
            device.versions.push(heads);
        }
    }

    /// Hands the first `part` of `whole` of what one device knows to another.
    pub fn meet(&mut self, from: usize, to: usize, part: usize, whole: usize) {
        let known: Vec<Change> = {
            let headers = self.devices[from].entity.headers().headers();
            let some = (headers.len() * part).div_ceil(whole);
            headers[..some].iter().map(|header| self.changes[self.ids[&header.hash]].clone()).collect()
        };
        let received = self.devices[to].entity.receive(known, Some(&self.ty), Judge::Admitted, true);
        assert!(received.refused.is_empty(), "{:?}", received.refused);
        self.note_version(to);
        self.check(to);
    }

    /// Both tell each other everything.
    pub fn exchange(&mut self, a: usize, b: usize) {
        self.meet(a, b, 1, 1);
        self.meet(b, a, 1, 1);
    }

    /// Everybody tells everybody everything.
    pub fn meet_all(&mut self) {
        for other in 1..self.devices.len() {
            self.meet(other, 0, 1, 1);
        }
        for other in 1..self.devices.len() {
            self.meet(0, other, 1, 1);
        }
    }

    /// Holds a device to the model.
    pub fn check(&self, device: usize) {
        self.check_entity(&self.devices[device].entity);
    }

    /// Holds a replica to the model.
    pub fn check_entity(&self, entity: &Entity) {
        let row = entity.row(&self.ty);
        if let Err(wrong) = self.log.check(&self.seen_in(entity), &row) {
            panic!("{wrong}\n{}", self.story());
        }
    }

    /// The log, for people.
    pub fn story(&self) -> String {
        let line = |(n, _): (usize, &Change)| {
            let edit = self.log.edit(n);
            let who = edit.device.0[0];
            format!("{n}: {:?} {who} at {:?} saw {:?}: {:?}\n", edit.role, edit.time, edit.saw, edit.deeds)
        };
        self.changes.iter().enumerate().map(line).collect()
    }

    /// A replica that never edited, told of everything in an order, grouping and repetition
    /// that follow from `seed`.
    pub fn fresh(&self, seed: u64) -> Entity {
        let mut dice = Dice(seed);
        let mut open: Vec<Change> = self.changes.clone();
        for change in &self.changes {
            if dice.roll(3) == 0 {
                open.push(change.clone());
            }
        }
        for place in (1..open.len()).rev() {
            open.swap(place, dice.roll(place + 1));
        }
        let mut entity = Entity::new(&self.workspace, &self.key, Some(&self.ty));
        // What can't be applied yet is offered again with what comes next.
        let mut held: Vec<Change> = Vec::new();
        while !open.is_empty() || !held.is_empty() {
            let size = (1 + dice.roll(4)).min(open.len());
            held.extend(open.drain(..size));
            let offered = held.len();
            let received = entity.receive(held.clone(), Some(&self.ty), Judge::Admitted, dice.roll(2) == 0);
            let waiting: BTreeSet<ChangeHash> = received
                .refused
                .iter()
                .map(|(change, refusal)| {
                    assert!(waits(refusal.code), "{refusal:?}");
                    *change
                })
                .collect();
            held.retain(|change| waiting.contains(&change.hash()));
            assert!(size > 0 || held.len() < offered, "changes wait for nothing:\n{}", self.story());
            if !entity.headers().is_empty() {
                self.check_entity(&entity);
            }
        }
        entity
    }

    /// All devices learn all, and so do replicas told in other orders: one row for everyone,
    /// which is the model's, and which survives being saved.
    pub fn settle(&mut self, seed: u64) {
        self.meet_all();
        let row = self.row(0);
        let heads = self.devices[0].entity.heads();
        for device in 0..self.devices.len() {
            assert_eq!(self.row(device), row);
            assert_eq!(self.devices[device].entity.heads(), heads);
        }
        assert_eq!(self.relay.row(&self.ty), row);
        for turn in 0..3 {
            let entity = self.fresh(seed.wrapping_add(turn));
            assert_eq!(entity.row(&self.ty), row, "an order of arrival mattered:\n{}", self.story());
            assert_eq!(entity.row(&self.ty), row, "a row changes by being read");
            assert_eq!(entity.heads(), heads);
            self.check_saved(&entity);
        }
        self.check_saved(&self.devices[0].entity);
    }

    /// What was saved loads as what it was.
    pub fn check_saved(&self, entity: &Entity) {
        let snapshot = entity.save_proved().unwrap();
        let loaded = Entity::load(
            &self.workspace,
            &self.key,
            Some(&self.ty),
            &snapshot,
            &[],
            entity.headers().clone(),
            &entity.named_containers(),
        )
        .unwrap();
        assert_eq!(loaded.row(&self.ty), entity.row(&self.ty));
        assert_eq!(loaded.heads(), entity.heads());
    }
}

/// Whether a refused change may be taken later, when more is known. An actor is named by its
/// first change, so a later one that comes before it is out of its sequence.
fn waits(code: RefusalCode) -> bool {
    matches!(code, RefusalCode::MissingDependency | RefusalCode::DependsOnRefused | RefusalCode::BadSequence)
}
