//! What must hold when everything is healed and quiet.
//!
//! *Healed*: no way is closed, every disk has room, everything is switched on, tokens are new, and
//! every device has connected anew. Clocks stay as wrong as they are. *Quiet*: nothing is
//! under way, every disk has flushed, and only timers wait. That must be reached within a
//! bounded number of events, or something is stuck.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use anabranch_core::admission::Judge;
use anabranch_core::change::{Change, Origin, Role};
use anabranch_core::digest::Digest;
use anabranch_core::entity::{Conflict, Entity, Row};
use anabranch_core::id::{EntityHash, EntityKey};
use anabranch_core::intent::Intent;
use anabranch_core::replica::{ChannelState, Held, Replica, version_token};
use anabranch_core::rows::ConflictRecord;
use anabranch_core::schema::{EntityType, FieldKind, Schema};
use anabranch_core::wire::{FaultCode, FeedBody, GrantRole};
use automerge::ChangeHash;
use serde_json::Value as Json;

use crate::cluster::{Cluster, Event};
use crate::device::{Device, START_MS};
use crate::dice::Dice;
use crate::draft::screen_of;
use crate::ledger::{Ended, Fate, Made, Promise, PromiseId};
use crate::model::{Edit, EditId, Effects, Log, Seen};
use crate::salvage::{Beyond, Salvage};

/// Times that all connect anew until nothing is left to do: the second takes what the relay
/// could not take before, the third what waited for what was refused.
const ROUNDS_MAX: usize = 5;
/// How far a change may be dated before it was written: the skew that is tolerated, what the
/// handshake can't measure, and what a clock drifts before it is measured again.
const BEFORE_MS_MAX: u64 = 60_000 + 5_000 + 5_000;

/// One entity as the relay's feed has it.
#[derive(Default)]
struct Admitted {
    changes: Vec<Change>,
    genesis: Vec<(String, u8)>,
}

impl Cluster {
    /// Ends all faults and lets everything come to rest. `false` if it does not.
    pub(crate) fn heal(&mut self) -> bool {
        self.healing = true;
        self.tell(format_args!("all is healed"));
        for device in &mut self.devices {
            device.blocked_ms = [0; 2];
            device.slow_until_ms = 0;
            device.full_until_ms = 0;
            device.stale_tokens = 0;
            device.away = false;
            device.doomed = false;
            device.disk.set_full(false);
        }
        self.relay_disk.set_full(false);
        self.relay_doomed = false;
        for link in self.links.values_mut() {
            (link.damages, link.lingers) = (false, false);
        }
        let strangers: Vec<_> = self.strangers_links();
        for conn in strangers {
            self.cut_off(conn);
        }
        self.after(0, 10, Event::StartRelay);
        for device in 0..self.devices.len() {
            self.after(0, 10, Event::Start(device));
        }
        if !self.rest() {
            return false;
        }
        self.check_links();
        // What only a newer schema knows waits until the relay has that.
        if self.devices.iter().any(|device| device.upgraded) {
            self.upgrade(0);
            if !self.rest() {
                return false;
            }
            self.devices[0].brings_schema = true;
        }
        for round in 0..ROUNDS_MAX {
            for device in 0..self.devices.len() {
                if let Some(conn) = self.devices[device].link {
                    self.cut_off(conn);
                }
                self.after(1, 100, Event::Dial(device));
            }
            if !self.rest() {
                return false;
            }
            self.report.peak("rounds of healing", round as u64 + 1);
            let open: Vec<usize> = (0..self.devices.len()).filter(|device| !self.is_done(*device)).collect();
            if open.is_empty() {
                return true;
            }
            for device in open {
                self.let_go(device);
            }
            if !self.rest() {
                return false;
            }
        }
        for device in 0..self.devices.len() {
            if !self.is_done(device) && !self.waits_for_others(device) {
                let replica = self.devices[device].replica.as_ref();
                let state = replica.map(|replica| (replica.channel_state().clone(), replica.status()));
                let pending: Vec<String> = self
                    .ledger
                    .pending_on(device)
                    .map(|promise| format!("{} as {:?}", promise.key, promise.changes.last()))
                    .collect();
                self.wrong(format!("device {device} is stuck: {state:?}, pending {pending:?}"));
            }
        }
        true
    }

    /// Whoever is connected has been told everything, with no need to connect anew.
    fn check_links(&mut self) {
        let Some((_, digest)) =
            self.relay.as_ref().and_then(|relay| relay.digest(&Self::workspace()).ok().flatten())
        else {
            return;
        };
        for device in 0..self.devices.len() {
            let this = &self.devices[device];
            let (Some(replica), Some(conn)) = (&this.replica, this.link) else { continue };
            let stands = self.links.get(&conn).is_some_and(|link| !link.broken);
            if !stands || *replica.channel_state() != ChannelState::Live {
                continue;
            }
            if replica.status().digest != digest {
                self.wrong(format!("device {device} is connected, and was not told all"));
            }
            self.report.count("devices that rest with nothing to hear", 1);
        }
    }

    /// Both ends of a link let go of it, at once.
    fn cut_off(&mut self, conn: anabranch_core::relay::ConnId) {
        if let Some(link) = self.links.get_mut(&conn) {
            link.broken = true;
            link.up.under_way.clear();
            link.down.under_way.clear();
        }
        self.relay_hangs_up(conn);
        self.device_hangs_up(conn);
    }

    fn is_done(&self, device: usize) -> bool {
        let Some(replica) = &self.devices[device].replica else { return self.devices[device].absent };
        replica.is_complete() && replica.status().pending == 0
    }

    /// What a device still has waits for what the relay lost and others must bring; `check_salvage` looks
    /// whether it does.
    fn waits_for_others(&self, device: usize) -> bool {
        let held = self.devices[device].replica.as_ref().and_then(|replica| replica.held().ok().flatten());
        self.may_differ && matches!(held, Some(Held::MissingAtRelay { .. }))
    }

    /// What still waits has a reason, and the device says so. The user lets go of what was refused.
    fn let_go(&mut self, device: usize) {
        self.flush_all(device);
        let Ok(refused) = self.devices[device].rows().refused() else { return };
        let waits = self.ledger.pending_on(device).count();
        let replica = self.devices[device].replica.as_ref();
        let held = replica.and_then(|replica| replica.held().ok().flatten());
        // The relay lost the schema, and who has it is not back yet: the state tells.
        let no_schema = replica.map(Replica::channel_state).is_some_and(|state| {
            matches!(state, ChannelState::Faulted { code: FaultCode::SchemaMissing, .. })
        });
        if waits > 0 && held.is_none() && !no_schema {
            let what: Vec<String> = self.ledger.pending_on(device).map(|p| p.key.to_string()).collect();
            self.wrong(format!("on device {device} {what:?} wait, and it does not say why"));
        }
        self.report.count("edits that waited for a refused one", waits as u64);
        for (number, _) in refused {
            self.dismiss(device, number);
        }
    }

    /// Runs until only timers wait. `false` if that takes more events than it may.
    fn rest(&mut self) -> bool {
        let changes = self.ledger.made.len() as u64;
        let bound = self.events + 20_000 + (200 + 20 * changes) * self.devices.len() as u64;
        while self.step() {
            if self.events > bound {
                let waiting = self.waiting();
                self.wrong(format!("it never rests: {waiting:?}"));
                return false;
            }
        }
        true
    }

    /// Holds everything to the model. Called when all is quiet.
    pub(crate) fn check(&mut self) {
        let Some(log) = self.audit() else { return };
        let entities = self.read_feed(&log);
        self.read_inboxes();
        let admitted: BTreeSet<ChangeHash> =
            entities.values().flat_map(|entity| &entity.changes).map(Change::hash).collect();
        let salvages = self.check_salvage(&admitted);
        self.check_promises(&admitted, &salvages);
        if !self.may_differ {
            self.check_taken(&admitted);
            if let Some(device) = salvages.iter().position(|salvage| !salvage.is_empty()) {
                self.wrong(format!(
                    "device {device} holds what the relay does not have: {:?}",
                    salvages[device]
                ));
            }
        }
        let mut digest = Digest::default();
        for (key, admitted) in &entities {
            if let Some(heads) = self.check_entity(key, admitted, &salvages) {
                digest.replace(EntityHash::of(&Self::workspace(), key), &[], &heads);
            }
        }
        self.check_digests(digest);
        self.check_strays(&entities, &salvages);
        self.report.count("entities", entities.len() as u64);
    }

    /// A device that was never there before gets the whole feed.
    fn audit(&mut self) -> Option<Vec<anabranch_core::wire::FeedEntry>> {
        let number = self.devices.len();
        let (schema, source) = self.schemas[1].clone();
        self.devices.push(Device::new(number, GrantRole::Reader, &schema, &source));
        self.auditor = Some(number);
        self.start(number);
        if !self.rest() || !self.is_done(number) {
            self.wrong("a new device does not get the feed".into());
            return None;
        }
        Some(std::mem::take(&mut self.audited))
    }

    fn read_feed(&mut self, log: &[anabranch_core::wire::FeedEntry]) -> BTreeMap<EntityKey, Admitted> {
        let mut entities: BTreeMap<EntityKey, Admitted> = BTreeMap::new();
        let mut refused = BTreeSet::new();
        let mut known: BTreeSet<ChangeHash> = BTreeSet::new();
        for (place, entry) in log.iter().enumerate() {
            if entry.seq != place as u64 + 1 {
                self.wrong(format!("entry {} of the feed stands at {}", entry.seq, place + 1));
            }
            match &entry.body {
                FeedBody::Changes { author, unit } => {
                    for part in &unit.entities {
                        let Ok(key) = EntityKey::new(part.type_name.clone(), part.id.clone()) else {
                            self.wrong("the feed names an entity that has no name".into());
                            continue;
                        };
                        let admitted = entities.entry(key.clone()).or_default();
                        admitted.genesis.extend(part.genesis.iter().cloned());
                        for bytes in &part.changes {
                            let change = match Change::parse(bytes) {
                                Ok(change) => change,
                                Err(error) => {
                                    self.ledger
                                        .wrong
                                        .push(format!("the feed has what is no change: {error}"));
                                    continue;
                                }
                            };
                            if !known.insert(change.hash()) {
                                self.ledger.wrong.push(format!("the feed has {} twice", change.hash()));
                            }
                            self.check_author(&key, author, &change);
                            if let Some(admitted) = entities.get_mut(&key) {
                                admitted.changes.push(change);
                            }
                        }
                    }
                    self.check_transactions(unit);
                }
                FeedBody::Refused(one) => {
                    refused.insert((one.type_name.clone(), one.id.clone(), ChangeHash(one.hash)));
                }
                FeedBody::Own(_) => self.wrong("a reader is told of own changes".into()),
                FeedBody::Device { .. } | FeedBody::Schema { .. } => {}
            }
        }
        for (key, admitted) in &entities {
            for hash in admitted.changes.iter().map(Change::hash) {
                if refused.contains(&(key.type_name().to_owned(), key.id().to_owned(), hash)) {
                    self.ledger.wrong.push(format!("{hash} of {key} was refused and is in the feed"));
                }
            }
        }
        self.report.count("admitted changes", known.len() as u64);
        self.report.count("refused changes", refused.len() as u64);
        entities
    }

    /// A transaction is in one entry, whole.
    fn check_transactions(&mut self, unit: &anabranch_core::wire::Unit) {
        type Members<'a> = BTreeSet<(&'a str, &'a str)>;
        let mut seen: BTreeMap<[u8; 16], (u32, Members<'_>)> = BTreeMap::new();
        for part in &unit.entities {
            for change in part.changes.iter().filter_map(|bytes| Change::parse(bytes).ok()) {
                if let Some(tx) = change.note().tx {
                    let members = seen.entry(tx.id).or_insert((tx.members, BTreeSet::new()));
                    members.1.insert((&part.type_name, &part.id));
                }
            }
        }
        for (members, found) in seen.values() {
            if *members as usize != found.len() {
                self.ledger.wrong.push(format!("a transaction of {members} comes as {found:?}"));
            }
        }
    }

    /// Whoever wrote an admitted change was who they say, and it was meant.
    fn check_author(&mut self, key: &EntityKey, author: &[u8; 32], change: &Change) {
        if self.strangers.get(&change.hash()) == Some(key) {
            return;
        }
        let Some(made) = self.ledger.made.get(&change.hash()) else {
            self.ledger.wrong.push(format!("a change of {key} was admitted that nobody made"));
            return;
        };
        let promise = &self.ledger.promises[made.promise];
        let device = &self.devices[promise.device];
        let role = if device.role == GrantRole::Authority { Role::Authority } else { Role::Device };
        // What a relay lost is brought back by authorities and admins too.
        let vouches = |other: &Device| {
            other.config.device.0 == *author && matches!(other.role, GrantRole::Authority | GrantRole::Admin)
        };
        let brought =
            device.config.device.0 == *author || self.may_differ && self.devices.iter().any(vouches);
        if promise.key != *key || !brought || change.note().role != role {
            self.ledger.wrong.push(format!("a change of {key} was admitted as another's"));
        }
        if !promise.changes.iter().any(|(hash, _)| *hash == change.hash()) {
            self.ledger.wrong.push(format!("a change of {key} left its device before it was durable there"));
        }
    }

    /// What the relay said that it took of strangers is in the feed.
    fn check_taken(&mut self, admitted: &BTreeSet<ChangeHash>) {
        let lost: Vec<ChangeHash> = self.taken.difference(admitted).copied().collect();
        if !lost.is_empty() {
            self.wrong(format!("strangers were told that {lost:?} are taken, and the feed has none of them"));
        }
    }

    fn check_promises(&mut self, admitted: &BTreeSet<ChangeHash>, salvages: &[Salvage]) {
        let contested = self.contested();
        let displaced = self.displaced(&contested, admitted, salvages);
        // What was displaced, or went with that, may have come back since, and what built on it was refused meanwhile.
        let sent: Vec<&Change> = self.ledger.sent.values().map(|(_, change)| change).collect();
        let unsure = if self.may_differ { with_what_follows(contested, &sent) } else { BTreeSet::new() };
        let (unsure, tainted) = (self.tainted(&unsure), self.tainted(&displaced));
        let mut wrong = Vec::new();
        let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
        let mut lost: BTreeSet<PromiseId> = BTreeSet::new();
        for (id, promise) in self.ledger.promises.iter().enumerate() {
            let Promise { device, key, fate, void, excused, .. } = promise;
            // One that a backup brought back may be written down twice.
            let hashes: BTreeSet<ChangeHash> = promise.changes.iter().map(|(hash, _)| *hash).collect();
            let times = hashes.intersection(admitted).count();
            // What its author holds and does not bring is a matter of `check_salvage`.
            let held = || {
                let beyond = salvages[*device].get(&EntityHash::of(&Self::workspace(), key));
                let held: BTreeSet<ChangeHash> = beyond.into_iter().flat_map(Beyond::changes).collect();
                promise.changes.iter().any(|(hash, _)| held.contains(hash))
            };
            let told = format!("device {device}'s edit of {key} at {} ms", promise.meant.at_ms);
            let mut count = |what| *counts.entry(what).or_default() += 1;
            if times > 1 {
                wrong.push(format!("{told} was applied {times} times: {:?}", promise.changes));
            }
            match fate {
                _ if *void => {
                    count("edits never promised");
                    if times > 0 {
                        wrong.push(format!("{told} was admitted, and was never durable at its author"));
                    }
                }
                Some((Fate::Refused { code, message, intents }, _)) => {
                    count("edits refused");
                    if times > 0 {
                        wrong.push(format!("{told} counts as refused, and was admitted"));
                    }
                    let follows = ["depends_on_refused", "transaction"].contains(&code.as_str());
                    let causes = if follows { &unsure } else { &tainted };
                    if promise.meant.checked && !causes.contains(&(*device, key.clone())) {
                        wrong.push(format!("{told} was refused without a cause ({code}: {message})"));
                    }
                    let asked = promise.changes.iter().filter_map(|(hash, _)| self.ledger.made.get(hash));
                    if !asked.into_iter().any(|made| made.intents == *intents) {
                        wrong.push(format!("{told} was refused and kept as something else: {intents:?}"));
                    }
                }
                _ if times > 0 => count("edits kept"),
                _ if *excused => {
                    count("edits lost with a restored disk");
                    lost.insert(id);
                }
                Some((Fate::Forgotten, _)) => count("edits forgotten by their author"),
                _ if self.may_differ && held() => count("edits that wait for what the relay lost"),
                // Whoever else may bring it would have.
                Some((Fate::Admitted, _)) if self.may_differ && self.ledger.restored.contains(device) => {
                    count("edits lost by the relay and by their author");
                    lost.insert(id);
                }
                Some((Fate::Admitted, _)) if !hashes.is_disjoint(&displaced) => {
                    count("edits lost with what they built on");
                    lost.insert(id);
                }
                Some((Fate::Admitted, _)) => wrong
                    .push(format!("{told} was acknowledged, and is not in the feed: {:?}", promise.changes)),
                None => wrong.push(format!("{told} is lost: {:?}", promise.changes)),
            }
        }
        let mut told: BTreeMap<PromiseId, Vec<Option<Ended>>> = BTreeMap::new();
        for one in &self.ledger.told_lost {
            let ended = one.ended.map(|(how, _)| how);
            *counts.entry("tellings of a loss").or_default() += 1;
            match ended {
                Some(Ended::Withdrawn) => *counts.entry("tellings of a loss withdrawn").or_default() += 1,
                _ => told.entry(one.promise).or_default().push(ended),
            }
        }
        for (id, promise) in self.ledger.promises.iter().enumerate() {
            let told = told.get(&id).map(Vec::as_slice).unwrap_or_default();
            let stand = told.iter().filter(|ended| ended.is_none()).count();
            let edit = || {
                format!("device {}'s edit of {} at {} ms", promise.device, promise.key, promise.meant.at_ms)
            };
            if stand > 1 {
                wrong.push(format!("{} is told to be lost {stand} times", edit()));
            }
            if stand > 0 && !lost.contains(&id) {
                wrong.push(format!("{} is told to be lost, and is not", edit()));
            }
            // Who never went back knows of each edit what became of it.
            if told.is_empty() && lost.contains(&id) && !self.ledger.restored.contains(&promise.device) {
                wrong.push(format!("{} is lost, and its user was not told", edit()));
            }
        }
        self.ledger.wrong.extend(wrong);
        for (what, times) in counts {
            self.report.count(what, times);
        }
    }

    /// What authors whose stores went back sent in the same place as something else, or of the same edit.
    fn contested(&self) -> BTreeSet<ChangeHash> {
        let author =
            |change: &ChangeHash| Some(self.ledger.promises[self.ledger.made.get(change)?.promise].device);
        let mut places: BTreeMap<(&EntityKey, Vec<u8>, u64), Vec<ChangeHash>> = BTreeMap::new();
        let mut edits: BTreeMap<(&EntityKey, Option<usize>, Origin), Vec<ChangeHash>> = BTreeMap::new();
        for (hash, (key, change)) in &self.ledger.sent {
            if author(hash).is_some_and(|author| self.ledger.restored.contains(&author)) {
                let actor = change.actor().to_bytes().to_vec();
                places.entry((key, actor, change.seq())).or_default().push(*hash);
                edits.entry((key, author(hash), change.origin())).or_default().push(*hash);
            }
        }
        places.into_values().chain(edits.into_values()).filter(|same| same.len() > 1).flatten().collect()
    }

    /// What nobody holds any more as its author went back, and the relay too, and the author then wrote something
    /// else in its place: with what built on it, and with the rest of its transactions.
    fn displaced(
        &self,
        contested: &BTreeSet<ChangeHash>,
        admitted: &BTreeSet<ChangeHash>,
        salvages: &[Salvage],
    ) -> BTreeSet<ChangeHash> {
        let held: BTreeSet<ChangeHash> =
            salvages.iter().flat_map(BTreeMap::values).flat_map(Beyond::changes).collect();
        let gone = |hash: &ChangeHash| !admitted.contains(hash) && !held.contains(hash);
        let left: Vec<&Change> = self
            .ledger
            .sent
            .values()
            .map(|(_, change)| change)
            .filter(|change| gone(&change.hash()))
            .collect();
        if !self.may_differ {
            return BTreeSet::new();
        }
        let displaced = left.iter().map(|change| change.hash()).filter(|hash| contested.contains(hash));
        with_what_follows(displaced.collect(), &left)
    }

    /// Entities of a device in which something may be refused: those that software without
    /// checks wrote to, or an app with a schema that the relay did not know, those that lost what
    /// was `displaced`, and what such a refusal takes with it.
    fn tainted(&self, displaced: &BTreeSet<ChangeHash>) -> BTreeSet<(usize, EntityKey)> {
        let lost: BTreeSet<&EntityKey> =
            displaced.iter().filter_map(|change| Some(&self.ledger.sent.get(change)?.0)).collect();
        let mut tainted: BTreeSet<(usize, EntityKey)> = self
            .ledger
            .promises
            .iter()
            .filter(|promise| {
                let is_new = |intent: &Intent| intent.field().is_some_and(|name| name.starts_with("added_"));
                !promise.meant.checked
                    || promise.meant.intents.iter().any(is_new)
                    || lost.contains(&promise.key)
            })
            .map(|promise| (promise.device, promise.key.clone()))
            .collect();
        let mut transactions: BTreeMap<[u8; 16], Vec<&Promise>> = BTreeMap::new();
        for promise in &self.ledger.promises {
            if let Some(tx) = promise.tx {
                transactions.entry(tx).or_default().push(promise);
            }
        }
        loop {
            let before = tainted.len();
            for members in transactions.values() {
                if members.iter().any(|p| tainted.contains(&(p.device, p.key.clone()))) {
                    tainted.extend(members.iter().map(|p| (p.device, p.key.clone())));
                }
            }
            if tainted.len() == before {
                return tainted;
            }
        }
    }

    /// Holds one entity, and what every device shows of it, to the model. Returns its heads.
    fn check_entity(
        &mut self,
        key: &EntityKey,
        admitted: &Admitted,
        salvages: &[Salvage],
    ) -> Option<Vec<ChangeHash>> {
        let ty = self.schemas[1].0.types.get(key.type_name())?.clone();
        let mut entity = Entity::new(&Self::workspace(), key, Some(&ty));
        entity.name_containers(&admitted.genesis);
        let received = entity.receive(admitted.changes.clone(), Some(&ty), Judge::Admitted, true);
        if received.applied.len() != admitted.changes.len() {
            self.wrong(format!("not all admitted changes of {key} can be applied: {:?}", received.refused));
            return None;
        }
        let foreign =
            admitted.changes.iter().filter(|change| self.strangers.contains_key(&change.hash())).count();
        self.report.count("admitted changes of strangers", foreign as u64);
        if foreign > 0 {
            // What strangers do within their rights has no user whom the model could ask, and it
            // tells items of sequences apart by what they are.
            self.check_orders(key, &ty, &entity, admitted);
            self.check_devices(key, &entity, salvages);
            return Some(entity.heads());
        }
        match self.model(&ty, &entity, &admitted.changes) {
            Ok((log, ids)) => {
                let all: Seen = ids.values().copied().collect();
                let row = entity.row(&ty);
                if let Err(wrong) = log.check(&all, &row) {
                    self.wrong(format!("{key} is not what its users made of it: {wrong}"));
                }
                self.check_tries(key, &log, &ids);
                self.report.count("open conflicts", row.conflicts.len() as u64);
                self.report.peak("changes of one entity", all.len() as u64);
            }
            Err(wrong) => self.wrong(format!("{key}: {wrong}")),
        }
        self.check_orders(key, &ty, &entity, admitted);
        self.check_devices(key, &entity, salvages);
        Some(entity.heads())
    }

    fn read_inboxes(&mut self) {
        self.inboxes = self
            .devices
            .iter()
            .map(|device| {
                let mut inbox: BTreeMap<EntityKey, Vec<ConflictRecord>> = BTreeMap::new();
                for (key, conflict) in device.rows().conflicts().unwrap_or_default() {
                    inbox.entry(key).or_default().push(conflict);
                }
                inbox
            })
            .collect();
    }

    /// What each device shows of an entity is what it is, with what the device holds beyond the relay.
    fn check_devices(&mut self, key: &EntityKey, entity: &Entity, salvages: &[Salvage]) {
        // As each of the two schemas shows it.
        let ty = |schema: &Schema| schema.types.get(key.type_name()).cloned();
        let rows = self.schemas.each_ref().map(|(schema, _)| ty(schema).map(|ty| entity.row(&ty)));
        let version = version_token(&entity.heads());
        let place = EntityHash::of(&Self::workspace(), key);
        for device in 0..self.devices.len() {
            let this = &self.devices[device];
            let Some(ty) = this.ty(key).filter(|_| !this.absent) else { continue };
            let checked = match salvages.get(device).and_then(|salvage| salvage.get(&place)) {
                None => {
                    let newer = Arc::ptr_eq(&this.config.schema, &self.schemas[1].0);
                    let Some(row) = &rows[usize::from(newer)] else { continue };
                    self.check_device(device, key, row, &version)
                }
                Some(beyond) => {
                    let Some(shown) = self.with_more(entity, ty, beyond) else { continue };
                    self.check_device(device, key, &shown.row(ty), &version_token(&shown.heads()))
                }
            };
            if let Err(wrong) = checked {
                self.wrong(format!("{key} on device {device}: {wrong}"));
            }
        }
    }

    /// An entity with what a device holds beyond the relay; none if something in that was never seen to
    /// leave a device.
    fn with_more(&self, entity: &Entity, ty: &EntityType, beyond: &Beyond) -> Option<Entity> {
        let sent = |hash| self.ledger.sent.get(&hash).map(|(_, change)| change.clone());
        let more: Vec<Change> = beyond.changes().filter_map(sent).collect();
        let mut shown = entity.clone();
        shown.receive(more, Some(ty), Judge::Admitted, false);
        beyond.changes().all(|hash| shown.headers().contains(&hash)).then_some(shown)
    }

    /// The reference model's log of an entity, from what users meant.
    fn model(
        &self,
        ty: &EntityType,
        entity: &Entity,
        changes: &[Change],
    ) -> Result<(Log, BTreeMap<ChangeHash, EditId>), String> {
        let mut log = Log::new(ty);
        let mut ids: BTreeMap<ChangeHash, EditId> = BTreeMap::new();
        for change in changes {
            let Some(made) = self.ledger.made.get(&change.hash()) else {
                return Err("it has a change that is no user's".into());
            };
            let saw = past(&log, &ids, change.deps());
            let promise = &self.ledger.promises[made.promise];
            let (intents, screen) = match made.again {
                false => {
                    let base = past(&log, &ids, &promise.meant.base);
                    if base != saw {
                        return Err(format!(
                            "{} says that its author saw {saw:?}, who saw {base:?}",
                            change.hash()
                        ));
                    }
                    (&promise.meant.intents, promise.meant.screen.clone())
                }
                true => {
                    let first = promise.changes.first().and_then(|(hash, _)| self.ledger.made.get(hash));
                    if let Some(first) = first {
                        same_intents(ty, first, made)?;
                    }
                    (&made.intents, self.screen_at(ty, entity, made, change))
                }
            };
            self.check_time(promise, change)?;
            let device = self.devices[promise.device].config.device;
            let role = change.note().role;
            let deeds = log.understand(&saw, &screen, intents);
            let effects = log.judge(role, &saw, &deeds);
            let effects = match effects {
                Ok(effects) if effects.any() => effects,
                other => return Err(format!("{intents:?} was admitted, which is {other:?} after {saw:?}")),
            };
            if !made.again {
                // What the outbox keeps is what was meant.
                let kept = log.judge(role, &saw, &log.understand(&saw, &screen, &made.intents));
                if kept.as_ref() != Ok(&effects) {
                    return Err(format!("{intents:?} was kept as {:?}", made.intents));
                }
            }
            let (time, actor) = (change.time(), change.actor().to_bytes().to_vec());
            ids.insert(change.hash(), log.push(Edit { device, role, time, actor, saw, deeds, effects }));
        }
        Ok((log, ids))
    }

    /// What lists and texts showed where a change was made again.
    fn screen_at(
        &self,
        ty: &EntityType,
        entity: &Entity,
        made: &Made,
        change: &Change,
    ) -> crate::model::Screen {
        let reads = |intent: &Intent| intent.field().is_some_and(|name| is_sequence(ty, name));
        if !made.intents.iter().any(reads) {
            return BTreeMap::new();
        }
        let base: Vec<ChangeHash> =
            change.deps().iter().filter(|dep| entity.headers().contains(dep)).copied().collect();
        if base.is_empty() {
            let empty = ty.fields.values().map(|field| (field.name.clone(), field.empty_value())).collect();
            return screen_of(ty, &empty);
        }
        screen_of(ty, &entity.row_at(ty, &base).fields)
    }

    /// Nothing is dated before it was written, by more than clocks are allowed to be off.
    fn check_time(&self, promise: &Promise, change: &Change) -> Result<(), String> {
        let written = START_MS + promise.meant.at_ms;
        let dated = change.time().wall().0;
        let device = &self.devices[promise.device];
        // Who sets the clock between writing and connecting can't be helped.
        if promise.meant.jumps != device.jumps {
            return Ok(());
        }
        // A clock that drifts while nobody can measure it is wrong about when, too.
        let wandered_ms = device.wandered_ms(self.time_ms) - promise.meant.wandered_ms;
        if dated + BEFORE_MS_MAX + wandered_ms < written {
            return Err(format!(
                "{} is dated {} s before device {} wrote it",
                change.hash(),
                (written - dated) / 1_000,
                promise.device
            ));
        }
        Ok(())
    }

    /// What was not made must not be right.
    fn check_tries(&mut self, key: &EntityKey, log: &Log, ids: &BTreeMap<ChangeHash, EditId>) {
        let mut wrong = Vec::new();
        let mut checked = 0;
        for tried in self.tries.iter().filter(|tried| tried.key == *key) {
            if tried.meant.base.iter().any(|head| !ids.contains_key(head)) {
                continue;
            }
            checked += 1;
            let saw = past(log, ids, &tried.meant.base);
            let role = if tried.role == GrantRole::Authority { Role::Authority } else { Role::Device };
            let deeds = log.understand(&saw, &tried.meant.screen, &tried.meant.intents);
            let judged = log.judge(role, &saw, &deeds);
            let fits = match &judged {
                Ok(effects) => !tried.denied && *effects == Effects::none(),
                Err(_) => tried.denied,
            };
            if !fits {
                wrong.push(format!("{key}: {:?} was not made, it is {judged:?}", tried.meant.intents));
            }
        }
        self.report.count("denials checked", checked);
        self.ledger.wrong.extend(wrong);
    }

    /// The row follows from the changes, not from their order; and what is saved loads as the
    /// same.
    fn check_orders(&mut self, key: &EntityKey, ty: &EntityType, entity: &Entity, admitted: &Admitted) {
        let row = entity.row(ty);
        let mut dice = Dice::of(self.seed, 3 + admitted.changes.len() as u64);
        let mut open = admitted.changes.clone();
        dice.shuffle(&mut open);
        let mut fresh = Entity::new(&Self::workspace(), key, Some(ty));
        let mut held: Vec<Change> = Vec::new();
        while !open.is_empty() || !held.is_empty() {
            let part = (1 + dice.roll(open.len().max(1))).min(open.len());
            held.extend(open.drain(..part));
            let received = fresh.receive(held.clone(), Some(ty), Judge::Admitted, dice.once_in(2));
            let before = held.len();
            held.retain(|change| !fresh.headers().contains(&change.hash()));
            if part == 0 && before == held.len() {
                return self.wrong(format!("{key} can't be put together in another order: {received:?}"));
            }
        }
        if fresh.row(ty) != row || fresh.heads() != entity.heads() {
            self.wrong(format!("{key} depends on the order in which its changes arrive"));
        }
        let loaded = entity.save_proved().and_then(|snapshot| {
            let named = entity.named_containers();
            Entity::load(&Self::workspace(), key, Some(ty), &snapshot, &[], entity.headers().clone(), &named)
        });
        match loaded {
            Ok(loaded) if loaded.row(ty) == row && loaded.heads() == entity.heads() => {}
            Ok(_) => self.wrong(format!("{key} changes by being saved")),
            Err(error) => self.wrong(format!("{key} can't be saved: {error}")),
        }
    }

    /// What a device shows of an entity is what it is.
    fn check_device(&self, device: usize, key: &EntityKey, row: &Row, version: &str) -> Result<(), String> {
        let this = &self.devices[device];
        let record = this.rows().get(key).map_err(|error| error.to_string())?;
        let Some(record) = record else { return Err("it is missing".into()) };
        if record.deleted != row.deleted {
            return Err(format!("it says deleted {}, it is {}", record.deleted, row.deleted));
        }
        for (name, value) in &row.fields {
            if record.fields.get(name) != Some(value) {
                return Err(format!("{name} shows {:?}, it is {value}", record.fields.get(name)));
            }
        }
        if record.version != version {
            return Err("it has another version".into());
        }
        let shown: Vec<_> = self.inboxes[device].get(key).into_iter().flatten().map(told).collect();
        let wanted: Vec<_> = row.conflicts.iter().map(meant).collect();
        if shown != wanted {
            return Err(format!("its inbox has {shown:?}, it must have {wanted:?}"));
        }
        Ok(())
    }

    fn check_digests(&mut self, digest: Digest) {
        let at_relay = self.relay.as_ref().and_then(|relay| relay.digest(&Self::workspace()).ok().flatten());
        match at_relay {
            Some((_, found)) if found == digest => {}
            found => self.wrong(format!("the relay's digest is {found:?}, it must be {digest}")),
        }
        for device in 0..self.devices.len() {
            let Some(replica) = &self.devices[device].replica else { continue };
            let found = replica.status().digest;
            if found != digest {
                self.wrong(format!("device {device}'s digest is {found}, it must be {digest}"));
            }
        }
    }

    /// No device shows what the relay does not have.
    fn check_strays(&mut self, entities: &BTreeMap<EntityKey, Admitted>, salvages: &[Salvage]) {
        for device in 0..self.devices.len() {
            let rows = self.devices[device].rows();
            let names: Vec<String> = self.devices[device].config.schema.types.keys().cloned().collect();
            let mut strays = Vec::new();
            for name in names {
                let mut after = None;
                while let Ok((page, more)) = rows.page(&name, after.as_deref()) {
                    after = page.last().map(|(key, _)| key.id().to_owned());
                    strays.extend(
                        page.into_iter().map(|(key, _)| key).filter(|key| !entities.contains_key(key)),
                    );
                    if !more {
                        break;
                    }
                }
            }
            // But for what the relay lost and it can't bring back.
            strays.retain(|key| {
                let beyond =
                    salvages.get(device).and_then(|s| s.get(&EntityHash::of(&Self::workspace(), key)));
                !self.may_differ || beyond.is_none()
            });
            if !strays.is_empty() {
                self.wrong(format!("device {device} shows {strays:?}, which the relay does not have"));
            }
        }
    }
}

/// Changes with what builds on them, and with the rest of the transactions of all of these.
fn with_what_follows(mut changes: BTreeSet<ChangeHash>, among: &[&Change]) -> BTreeSet<ChangeHash> {
    loop {
        let before = changes.len();
        let torn: BTreeSet<[u8; 16]> = among
            .iter()
            .filter(|change| changes.contains(&change.hash()))
            .filter_map(|change| Some(change.note().tx?.id))
            .collect();
        let follows = |change: &&&Change| {
            change.deps().iter().any(|dep| changes.contains(dep))
                || change.note().tx.is_some_and(|tx| torn.contains(&tx.id))
        };
        let more: Vec<ChangeHash> = among.iter().filter(follows).map(|change| change.hash()).collect();
        changes.extend(more);
        if changes.len() == before {
            return changes;
        }
    }
}

/// A version's edits.
fn past(log: &Log, ids: &BTreeMap<ChangeHash, EditId>, heads: &[ChangeHash]) -> Seen {
    let mut past = Seen::new();
    // What has no id is a container's beginning.
    for id in heads.iter().filter_map(|head| ids.get(head)) {
        past.extend(&log.edit(*id).saw);
        past.insert(*id);
    }
    past
}

fn is_sequence(ty: &EntityType, name: &str) -> bool {
    ty.fields.get(name).is_some_and(|field| matches!(field.kind(), FieldKind::Text | FieldKind::List))
}

/// What a change puts into texts and lists, in no order: a code point or an item each.
fn inserted<'a>(ty: &EntityType, made: &'a Made) -> Vec<(&'a str, String)> {
    let mut inserted = Vec::new();
    for intent in &made.intents {
        let Some(field) = intent.field().filter(|name| is_sequence(ty, name)) else { continue };
        match intent {
            Intent::Splice { insert, .. } => {
                inserted.extend(insert.chars().map(|char| (field, char.to_string())));
            }
            Intent::Insert { items, .. } => {
                inserted.extend(items.iter().map(|item| (field, item.to_string())));
            }
            Intent::Set { value, .. } => inserted.push((field, value.to_string())),
            _ => {}
        }
    }
    inserted.sort();
    inserted
}

/// A change that was made again means what it meant, apart from positions.
fn same_intents(ty: &EntityType, first: &Made, again: &Made) -> Result<(), String> {
    let plain = |made: &Made| -> Vec<Intent> {
        let is_plain = |intent: &&Intent| !intent.field().is_some_and(|name| is_sequence(ty, name));
        made.intents.iter().filter(is_plain).cloned().collect()
    };
    let differs = plain(first) != plain(again) || inserted(ty, first) != inserted(ty, again);
    if differs || first.authority != again.authority {
        return Err(format!("{:?} was made again as {:?}", first.intents, again.intents));
    }
    Ok(())
}

/// Field, kind, sides by device, time and value, and what they started from. A record does not
/// tell null from nothing there.
type Told = (String, String, Vec<([u8; 32], u64, Json)>, Json);

fn told(conflict: &ConflictRecord) -> Told {
    let sides = conflict.sides.iter().map(|side| (side.device, side.time_ms, side.value.clone())).collect();
    (conflict.field.clone(), conflict.kind.clone(), sides, conflict.base.clone().unwrap_or_default())
}

fn meant(conflict: &Conflict) -> Told {
    let sides = conflict.sides.iter();
    let sides = sides.map(|side| (side.device.0, side.time.wall().0, side.value.clone())).collect();
    (
        conflict.field.clone(),
        conflict.kind.name().to_owned(),
        sides,
        conflict.base.clone().unwrap_or_default(),
    )
}
