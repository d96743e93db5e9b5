//! What users do, and what goes wrong: the steps of a plan carried out.

use std::collections::BTreeMap;
use std::sync::Arc;

use anabranch_core::id::EntityKey;
use anabranch_core::intent::Intent;
use anabranch_core::relay::{ConnId, Relay};
use anabranch_core::replica::{Edit, Expect, Replica, WriteError};
use anabranch_core::schema::{Field, FieldKind, Policy};
use anabranch_core::store::{CommitNo, StoreError};
use anabranch_core::wire::GrantRole;
use serde_json::{Value as Json, json};

use crate::cluster::{Cluster, Event};
use crate::device::View;
use crate::dice::Dice;
use crate::draft::{self, Draw};
use crate::ledger::Meant;
use crate::plan::{Act, Fault, Step};

/// Ids that all types share, so that references meet; the favourite first.
const IDS: [&str; 8] = ["a", "b", "ü", "c", "e", "f", "g", "h"];
/// Backups that are kept of each disk.
const BACKUPS_MAX: usize = 3;
const YEAR_MS: i64 = 365 * 24 * 60 * 60 * 1000;

/// An edit that is about to be made.
struct Draft {
    key: EntityKey,
    intents: Vec<Intent>,
    view: View,
    /// Whether the version that the user saw is named; else the edit is based on the present.
    based: bool,
}

impl Cluster {
    pub(crate) fn act(&mut self, step: Step) {
        let mut dice = Dice(step.dice);
        let device = step.device;
        match step.act {
            Act::Write => {
                let key = self.some_key(&mut dice);
                self.write(device, std::slice::from_ref(&key), &mut dice);
                if dice.once_in(8) {
                    // Someone else has the same idea in the same instant.
                    let other = (device + 1 + dice.roll(self.devices.len() - 1)) % self.devices.len();
                    let mut dice = Dice(step.dice ^ 1);
                    dice.roll(2);
                    self.write(other, &[key], &mut dice);
                }
            }
            Act::Transaction => {
                let mut keys: Vec<EntityKey> =
                    (0..2 + dice.roll(3)).map(|_| self.some_key(&mut dice)).collect();
                keys.sort();
                keys.dedup();
                self.write(device, &keys, &mut dice);
            }
            Act::Import => {
                let name = dice.pick(&self.types).clone();
                for number in 0..5 + dice.roll(25) {
                    let id = format!("import-{:x}-{number}", step.dice as u32);
                    let key = EntityKey::new(name.clone(), id).expect("a name");
                    self.write(device, &[key], &mut dice);
                }
            }
            Act::Resolve => self.resolve(device, &mut dice),
            Act::OpenForm => {
                let key = self.some_key(&mut dice);
                if let Ok(Some(view)) = self.devices[device].look(&key) {
                    self.devices[device].forms.insert(key, view);
                }
            }
            Act::Retry => self.retry(device),
            Act::Confirm => {
                if let Some(replica) = &mut self.devices[device].replica {
                    replica.confirm();
                    self.settle(device, None);
                }
                if dice.once_in(3) {
                    // Its app has a new token before the old one expires.
                    self.bring_token(device);
                }
            }
            Act::Backup => {
                let this = &mut self.devices[device];
                let backup = this.disk.backup();
                this.backups.push(backup);
                if this.backups.len() > BACKUPS_MAX {
                    this.backups.remove(0);
                }
            }
            Act::BackupRelay => {
                self.relay_backups.push(self.relay_disk.backup());
                if self.relay_backups.len() > BACKUPS_MAX {
                    self.relay_backups.remove(0);
                }
            }
            Act::Fault(fault) => self.go_wrong(fault, device, &mut dice),
        }
    }

    fn some_key(&self, dice: &mut Dice) -> EntityKey {
        let name = self.types[dice.skewed(self.types.len())].clone();
        EntityKey::new(name, IDS[dice.skewed(IDS.len())]).expect("a name")
    }

    // ── Users ─────────────────────────────────────────────────────────────────────────────

    fn write(&mut self, device: usize, keys: &[EntityKey], dice: &mut Dice) {
        let drafts: Vec<Draft> = keys.iter().filter_map(|key| self.draft(device, key, dice)).collect();
        self.submit(device, drafts, true);
    }

    /// What a user of a device might do to an entity, as they see it.
    fn draft(&mut self, device: usize, key: &EntityKey, dice: &mut Dice) -> Option<Draft> {
        let this = &mut self.devices[device];
        this.replica.as_ref()?;
        let view = match this.forms.remove(key) {
            Some(form) => form,
            None => this.look(key).ok()??,
        };
        let ty = this.ty(key)?.clone();
        let draws: Vec<Draw> = (0..1 + dice.roll(3)).map(|_| (dice.word() as u32).to_be_bytes()).collect();
        let unique = self.unique.entry(key.clone()).or_default();
        let intents = draft::intents(&ty, &view.row, &view.screen, &draws, !view.exists, unique);
        Some(Draft { key: key.clone(), intents, view, based: true })
    }

    /// Makes edits as one, and writes down what was promised.
    fn submit(&mut self, device: usize, drafts: Vec<Draft>, checked: bool) {
        if drafts.is_empty() {
            return;
        }
        let now = self.now(device);
        let at_ms = self.time_ms;
        let this = &mut self.devices[device];
        let Some(replica) = &mut this.replica else { return };
        let edits: Vec<Edit> = drafts
            .iter()
            .map(|draft| Edit {
                key: draft.key.clone(),
                intents: draft.intents.clone(),
                based_on: draft.based.then(|| draft.view.base.clone()),
                expect: Expect::Any,
            })
            .collect();
        let written = replica.write(now, &edits, checked);
        let alone = drafts.len() == 1;
        let meant: BTreeMap<EntityKey, Meant> = drafts
            .into_iter()
            .map(|draft| {
                let Draft { key, intents, view, .. } = draft;
                let (jumps, wandered_ms) = (this.jumps, this.wandered_ms(at_ms));
                let View { base, screen, .. } = view;
                let meant = Meant { intents, base, screen, at_ms, checked, jumps, wandered_ms };
                (key, meant)
            })
            .collect();
        match written {
            Ok(written) => {
                self.report.count("writes", written.changed as u64);
                self.tell(format_args!("device {device} writes {} of {:?}", written.changed, meant.keys()));
                if written.changed == 0 && alone {
                    self.tried(device, &meant, false);
                }
            }
            Err(WriteError::Store(StoreError::NoSpace { .. })) => {
                self.report.count("writes that found no space", 1)
            }
            Err(WriteError::Store(error)) => self.wrong(format!("device {device} can't write: {error}")),
            Err(WriteError::Edit(error)) => {
                use anabranch_core::entity::EditError::{Conflict, NotFound, UnknownVersion, Validation};
                self.report.count("writes denied", 1);
                self.tell(format_args!("device {device} may not write {:?}: {error}", meant.keys()));
                match error {
                    Validation(_) | Conflict { .. } | NotFound(_) if alone && checked => {
                        self.tried(device, &meant, true)
                    }
                    // What it named may have been made again since.
                    Validation(_) | Conflict { .. } | NotFound(_) | UnknownVersion(_) => {}
                    error if checked => self.wrong(format!("device {device} can't write: {error}")),
                    _ => {}
                }
            }
            Err(error) => self.wrong(format!("device {device} can't write: {error}")),
        }
        self.settle(device, Some(&meant));
    }

    fn tried(&mut self, device: usize, meant: &BTreeMap<EntityKey, Meant>, denied: bool) {
        for (key, meant) in meant {
            let role = self.devices[device].role;
            self.tries.push(Tried { key: key.clone(), meant: meant.clone(), role, denied });
        }
    }

    fn resolve(&mut self, device: usize, dice: &mut Dice) {
        self.flush_all(device);
        let this = &self.devices[device];
        if this.replica.is_none() {
            return;
        }
        let Ok(open) = this.rows().conflicts() else { return };
        if open.is_empty() {
            return;
        }
        let (key, conflict) = dice.pick(&open).clone();
        let Ok(Some(view)) = this.look(&key) else { return };
        let value = match conflict.field.as_str() {
            "*" if dice.once_in(2) => Json::Null,
            "*" => json!(true),
            _ => dice.pick(&conflict.sides).value.clone(),
        };
        let edit = Replica::resolution(&key, &conflict.field, value);
        self.report.count("conflicts settled", 1);
        self.submit(device, vec![Draft { key, intents: edit.intents, view, based: false }], true);
    }

    fn retry(&mut self, device: usize) {
        self.flush_all(device);
        let this = &mut self.devices[device];
        if this.replica.is_none() {
            return;
        }
        let Ok(refused) = this.rows().refused() else { return };
        let Some((number, record)) = refused.into_iter().next() else { return };
        let Ok(key) = EntityKey::new(record.type_name.clone(), record.id.clone()) else { return };
        // The model tells items of sequences apart by what they are, so none may come twice: a
        // restored device would try the same again.
        let inserts = |intent: &Intent| match intent {
            Intent::Splice { .. } | Intent::Insert { .. } => true,
            Intent::Set { value, .. } => value.is_array() || value.is_string(),
            _ => false,
        };
        if record.intents.iter().any(inserts) && self.is_sequence_type(device, &key) {
            return self.dismiss(device, number);
        }
        let now = self.now(device);
        let Ok(Some(view)) = self.devices[device].look(&key) else { return };
        let Some(replica) = &mut self.devices[device].replica else { return };
        let retried = replica.retry_refused(now, &record);
        self.tell(format_args!(
            "device {device} tries {key} again: {:?}",
            retried.as_ref().map(|written| written.changed).map_err(ToString::to_string)
        ));
        let meant = Meant {
            intents: record.intents,
            base: view.base,
            screen: view.screen,
            at_ms: self.time_ms,
            checked: true,
            jumps: self.devices[device].jumps,
            wandered_ms: self.devices[device].wandered_ms(self.time_ms),
        };
        self.report.count("refused edits tried again", 1);
        self.settle(device, Some(&BTreeMap::from([(key, meant)])));
        self.dismiss(device, number);
    }

    /// Whether a type has lists or texts.
    fn is_sequence_type(&self, device: usize, key: &EntityKey) -> bool {
        let sequence = |field: &Field| matches!(field.kind(), FieldKind::Text | FieldKind::List);
        self.devices[device].ty(key).is_some_and(|ty| ty.fields.values().any(sequence))
    }

    pub(crate) fn dismiss(&mut self, device: usize, number: u64) {
        let Some(replica) = &mut self.devices[device].replica else { return };
        self.ledger.dismissed = Some((device, number));
        match replica.dismiss(number) {
            Ok(_) | Err(StoreError::NoSpace { .. }) => {}
            Err(error) => self.wrong(format!("device {device} can't dismiss {number}: {error}")),
        }
        self.settle(device, None);
        self.ledger.dismissed = None;
    }

    // ── Faults ────────────────────────────────────────────────────────────────────────────

    fn go_wrong(&mut self, fault: Fault, device: usize, dice: &mut Dice) {
        // What strikes nothing is not counted.
        let linked = self.devices[device].link.is_some();
        let injected = match fault {
            Fault::Partition => {
                let ms = dice.between(100, 90_000);
                self.block(device, true, true, ms, dice);
                linked
            }
            Fault::OneWay => {
                let (up, ms) = (dice.once_in(2), dice.between(100, 60_000));
                self.block(device, up, !up, ms, dice);
                linked
            }
            Fault::Cut if !dice.once_in(3) => {
                if let Some(link) = self.devices[device].link.and_then(|conn| self.links.get_mut(&conn)) {
                    link.lingers = true;
                }
                // So that there is something to be late.
                self.act(Step { at_ms: self.time_ms, device, act: Act::Confirm, dice: dice.word() });
                false
            }
            Fault::Cut => match self.devices[device].link {
                Some(conn) => {
                    self.break_link(conn, dice);
                    true
                }
                None => false,
            },
            Fault::Damage => {
                self.damage(device, dice);
                false
            }
            Fault::Slow => {
                self.devices[device].slow_until_ms = self.time_ms + dice.between(1_000, 60_000);
                linked
            }
            Fault::Crash if !dice.once_in(4) => {
                // Where it hurts: with something that is not flushed.
                self.devices[device].doomed = true;
                self.settle(device, None);
                false
            }
            Fault::Crash => {
                let on = self.devices[device].replica.is_some();
                self.power_off(device);
                let ms = if dice.once_in(6) { 60_000 } else { 2_000 };
                self.at(self.time_ms + dice.between(10, ms), Event::Start(device));
                on
            }
            Fault::Torn => {
                let on = self.devices[device].replica.is_some();
                self.power_off(device);
                self.devices[device].disk.tear();
                self.at(self.time_ms + dice.between(10, 2_000), Event::Start(device));
                on
            }
            Fault::CrashRelay if dice.once_in(2) => {
                self.relay_doomed = true;
                false
            }
            Fault::CrashRelay => {
                let on = self.relay.is_some();
                if dice.once_in(4) {
                    // It finds no room, stops, and is started again when there is some.
                    self.relay_disk.set_full(true);
                } else {
                    self.relay_off(dice);
                    self.at(self.time_ms + dice.between(10, 8_000), Event::StartRelay);
                }
                on
            }
            Fault::Full => {
                let ms = dice.between(50, 8_000);
                let this = &mut self.devices[device];
                this.full_until_ms = self.time_ms + ms;
                this.disk.set_full(true);
                let on = this.replica.is_some();
                self.at(self.time_ms + ms, Event::Room(device));
                on
            }
            Fault::Restore => self.restore(device, dice),
            Fault::RestoreRelay => self.restore_relay(dice),
            Fault::Jump => {
                let this = &mut self.devices[device];
                let by =
                    *dice.pick(&[YEAR_MS, -YEAR_MS, 3_600_000, -3_600_000, 90_000, -90_000, 400_000, 20_000]);
                let to = if dice.once_in(3) { 0 } else { this.offset_ms.saturating_add(by) };
                let from = std::mem::replace(&mut this.offset_ms, to.clamp(-3 * YEAR_MS, 3 * YEAR_MS));
                let jumped = this.offset_ms != from;
                this.jumps += u32::from(jumped);
                jumped
            }
            Fault::Drift => {
                let time_ms = self.time_ms;
                self.devices[device].drift_by(time_ms, dice.between(0, 400) as i64 - 200);
                true
            }
            Fault::Expiry => {
                // Its app has old tokens for a while, and it must sign in anew.
                self.devices[device].stale_tokens = 1 + dice.roll(2) as u32;
                if let Some(conn) = self.devices[device].link {
                    self.break_link(conn, dice);
                }
                true
            }
            Fault::Schema => {
                let older = |device: &usize| !self.devices[*device].upgraded && !self.devices[*device].absent;
                self.next_device(device, older).is_some_and(|device| self.upgrade(device))
            }
            Fault::Months => {
                // Time has passed for all, as the plan says; this device is away for longer.
                let away = &mut self.devices[device].away;
                *away = !*away;
                if *away {
                    if let Some(conn) = self.devices[device].link {
                        self.break_link(conn, dice);
                    }
                } else {
                    self.at(self.time_ms, Event::Dial(device));
                }
                true
            }
            Fault::Forbidden => {
                let able = |device: &usize| {
                    let device = &self.devices[*device];
                    device.role != GrantRole::Authority && device.replica.is_some()
                };
                self.next_device(device, able).is_some_and(|device| self.forbidden(device, dice))
            }
            Fault::Hostile => return self.attack(dice),
        };
        if injected {
            self.report.fault(fault.name());
        }
    }

    /// The device, or the first one after it, of which something is true.
    fn next_device(&self, device: usize, wanted: impl Fn(&usize) -> bool) -> Option<usize> {
        let count = self.devices.len();
        (0..count).map(|step| (device + step) % count).find(wanted)
    }

    /// Damages a message under way to or from a device, or the next one that will be.
    fn damage(&mut self, device: usize, dice: &mut Dice) {
        let Some(conn) = self.devices[device].link else { return };
        let Some(link) = self.links.get_mut(&conn) else { return };
        let up = match (link.up.under_way.is_empty(), link.down.under_way.is_empty()) {
            (true, true) => {
                link.damages = true;
                return;
            }
            (up, down) => !up && (down || dice.once_in(2)),
        };
        self.damage_one(conn, up, dice);
    }

    /// Damages a message under way. The transport is authenticated, so bytes that changed into
    /// other words never arrive: only what reads as no message does.
    pub(crate) fn damage_one(&mut self, conn: ConnId, up: bool, dice: &mut Dice) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        self.report.fault(Fault::Damage.name());
        let stream = link.stream(up);
        let place = dice.roll(stream.under_way.len());
        let bytes = &mut stream.under_way[place];
        crate::hostile::damage(bytes, dice);
        if matches!(anabranch_core::wire::Message::decode(bytes), Ok(Some(_))) {
            stream.under_way.truncate(place);
            self.break_link(conn, dice);
        }
    }

    fn restore(&mut self, device: usize, dice: &mut Dice) -> bool {
        if self.devices[device].backups.is_empty() {
            return false;
        }
        self.power_off(device);
        let this = &mut self.devices[device];
        let number = dice.roll(this.backups.len());
        let disk = this.backups[number].backup();
        this.backups.truncate(number + 1);
        self.tell(format_args!("device {device} gets an older backup"));
        self.replace_disk(device, disk);
        self.at(self.time_ms + dice.between(500, 5_000), Event::Start(device));
        true
    }

    fn restore_relay(&mut self, dice: &mut Dice) -> bool {
        if self.relay_backups.is_empty() {
            return false;
        }
        self.relay_off(dice);
        for link in self.links.values_mut() {
            link.up.under_way.clear();
            link.down.under_way.clear();
        }
        let number = dice.roll(self.relay_backups.len());
        self.relay_disk = Arc::new(self.relay_backups[number].backup());
        self.relay_backups.truncate(number + 1);
        self.tell(format_args!("the relay gets an older backup"));
        if dice.once_in(3) {
            // Its operator says so.
            let mut epoch = [1; 16];
            epoch[..8].copy_from_slice(&dice.word().to_be_bytes());
            let renewed = Relay::renew_epoch(&*self.relay_disk, epoch);
            if renewed.is_err() || self.relay_disk.flush(CommitNo(u64::MAX)).is_err() {
                self.wrong("the relay can't begin a new epoch".into());
            }
        }
        self.at(self.time_ms + dice.between(500, 5_000), Event::StartRelay);
        true
    }

    /// A device's app is updated to one with a newer schema. Authorities bring it to the relay.
    pub(crate) fn upgrade(&mut self, device: usize) -> bool {
        if self.devices[device].upgraded {
            return false;
        }
        self.flush_all(device);
        self.power_off(device);
        let (schema, source) = self.schemas[1].clone();
        let this = &mut self.devices[device];
        this.config.schema = schema;
        this.config.schema_source = source;
        this.upgraded = true;
        self.tell(format_args!("device {device} has the newer schema"));
        self.at(self.time_ms + 100, Event::Start(device));
        if self.devices[device].role == GrantRole::Authority {
            self.devices[device].brings_schema = true;
        }
        true
    }

    /// Software without checks writes what only the relay can stop.
    fn forbidden(&mut self, device: usize, dice: &mut Dice) -> bool {
        let this = &self.devices[device];
        if this.role == GrantRole::Authority || this.replica.is_none() {
            return false;
        }
        self.flush_all(device);
        let set = |field: &str, value: Json| Intent::Set { field: field.into(), value };
        let id = IDS[dice.skewed(IDS.len())];
        let (name, intents) = match dice.roll(4) {
            0 => ("exercise", vec![set("name", json!("mine")), set("level", json!("low"))]),
            1 => ("hero", vec![set("name", json!("h")), set("age", json!(500))]),
            2 => ("invoice", vec![set("amount_cents", json!(-5))]),
            _ => ("alert", vec![set("title", json!("t")), set("severity", json!("none"))]),
        };
        let key = EntityKey::new(name, id).expect("a name");
        let Ok(Some(view)) = self.devices[device].look(&key) else { return false };
        let mut drafts = vec![Draft { key, intents, view, based: true }];
        if dice.once_in(2) {
            let other = self.some_key(dice);
            if other != drafts[0].key
                && let Some(draft) = self.draft(device, &other, dice)
                && !matches!(draft.intents[..], [Intent::Delete])
                && !self.overwrites_first(&draft)
            {
                drafts.push(draft);
            }
        }
        self.submit(device, drafts, false);
        true
    }

    /// Whether it writes what only the first may write. That is up to devices: the relay takes it, and the first
    /// value goes on to show.
    fn overwrites_first(&self, draft: &Draft) -> bool {
        let ty = self.schemas[1].0.types.get(draft.key.type_name());
        let first = |field: &str| {
            ty.is_some_and(|ty| ty.fields.get(field).is_some_and(|f| f.policy == Policy::FirstWrite))
        };
        draft.intents.iter().filter_map(Intent::field).any(first)
    }

    /// A device has room on its disk again.
    pub(crate) fn room(&mut self, device: usize) {
        if self.devices[device].full_until_ms <= self.time_ms {
            self.devices[device].disk.set_full(false);
        }
    }

    /// An authority brings its schema to the relay.
    pub(crate) fn push_schema(&mut self, device: usize) {
        if let Some(replica) = &mut self.devices[device].replica {
            replica.exchange_schema(true);
        }
    }
}

/// An edit that the engine did not make.
#[derive(Clone, Debug)]
pub(crate) struct Tried {
    pub(crate) key: EntityKey,
    pub(crate) meant: Meant,
    pub(crate) role: GrantRole,
    /// It may not be made; else there was nothing to change.
    pub(crate) denied: bool,
}
