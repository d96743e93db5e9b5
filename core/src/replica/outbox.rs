//! The outbox and its channel to the relay: what leaves, when, and in which order.
//!
//! A change leaves only when it is durable *and* durably marked as sent: whoever restores
//! the store from before that mark is told `behind` by the relay. Within an entity order is
//! causal; a child waits until its parents were admitted (a cycle of parents goes as one); then
//! priority by type, then oldest first. While an entity has changes in flight, its newer ones
//! wait and travel together.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use automerge::ChangeHash;
use serde_json::Value as Json;

use super::layout::{RowRecord, from_json};
use super::{Output, PendingRef, Replica, SKEW_TOLERATED_MS};
use crate::clock::{MonoMs, Now, WallMs};
use crate::id::{EntityHash, EntityKey, Incarnation};
use crate::schema::{FieldType, ScalarType};
use crate::store::{Batch, CommitNo, Keyspace, StoreError, View};
use crate::wire::{
    Changes, Channel, FaultCode, FetchSchema, GrantRole, Granted, Message, Open, PushSchema, Refresh,
    SchemaIs, SignIn, Unit,
};

/// Units on their way at once.
const UNITS_IN_FLIGHT_MAX: usize = 16;
/// A unit takes no more entities when it has this many.
const UNIT_ENTITIES: usize = 256;
/// A unit takes no more changes when it has this many bytes.
const UNIT_BYTES: usize = 256 * 1024;
/// How often in a row an entity is written again within one session, with nothing of it taken
/// or refused for good between, before it counts as refused.
pub(super) const REMAKES_MAX: u32 = 3;
/// A wall clock that differs from the other clock by more than this since it was measured has been set,
/// in milliseconds.
const CLOCK_SET_MS: u64 = 2_000;
/// For how long a measured clock is relied on, in milliseconds: bad ones gain or lose some seconds by then.
const CLOCK_KEPT_MS: u64 = 6 * 60 * 60 * 1_000;
/// The longest wait after the first of a row of refusals that time may mend, in milliseconds. It
/// doubles with each.
const RETRY_MS_BASE: u64 = 1_000;
/// It stays at this from then on.
const RETRY_MS_MAX: u64 = 5 * 60 * 1_000;

/// How far the channel to the relay has come.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ChannelState {
    /// There is no link.
    #[default]
    Offline,
    /// Waiting for a grant.
    SigningIn,
    /// Receiving what happened meanwhile.
    CatchingUp {
        /// The last entry applied.
        cursor: u64,
        /// The newest entry of the feed.
        end: u64,
    },
    /// Everything was received; what is written goes out at once.
    Live,
    /// The relay refused the channel. Changes wait; nothing is lost.
    Faulted {
        /// For programs.
        code: FaultCode,
        /// For people.
        message: String,
    },
}

/// Why something is still to be exchanged though all that could be was.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Held {
    /// An entity waits for one that it refers to and that the relay refused.
    RefusedParent {
        /// What waits; others may too.
        entity: EntityKey,
        /// What was refused.
        parent: EntityKey,
    },
    /// The relay lacks what the changes of an entity build on. They are offered again when it has
    /// more of the entity, and at the next connect.
    MissingAtRelay {
        /// What waits; others may too.
        entity: EntityKey,
    },
    /// This device and the relay hold different things although everything was fetched again.
    Diverged,
    /// The relay went back and lost the schema. What was written by it might not fit an older one,
    /// so nothing is sent until somebody has pushed one.
    SchemaLost,
}

/// The channel of one replica on the current link.
#[derive(Debug, Default)]
pub(super) struct Link {
    pub(super) state: ChannelState,
    channel: Channel,
    /// Whether the grant is there and the feed was opened.
    pub(super) granted: bool,
    /// Outbox numbers and entities of each unit that was not answered yet.
    pub(super) in_flight: BTreeMap<u64, (Vec<u64>, BTreeSet<EntityHash>)>,
    /// Their entities: one unit at a time for each.
    pub(super) busy: BTreeSet<EntityHash>,
    /// Those of which something was queued since that may go before what is on its way.
    pub(super) overtaken: BTreeSet<EntityHash>,
    next_unit: u64,
    /// The newest entry of the feed that an answer told of.
    pub(super) answered: u64,
    durable: CommitNo,
    /// The feed was asked for again in full after a fault was found.
    pub(super) repaired: bool,
    /// How often in a row the feed stopped at own changes that are not here.
    pub(super) own_unknown: u32,
    /// What was asked for before the newest request may still be under way, from further on in the feed.
    pub(super) rereads: bool,
    /// The relay is to be asked once more when it has answered: someone wants to know what it
    /// has since it was asked.
    pub(super) ask_again: bool,
    /// The relay's clock minus this device's raw clock, in milliseconds.
    relay_ahead_ms: i64,
    /// When that was measured, by this device's clocks.
    measured: Option<Now>,
    /// The clock was set since, or measured long ago: nothing leaves before it is measured again.
    pub(super) clock_unsure: bool,
    pub(super) remakes: BTreeMap<EntityHash, u32>,
    /// What is lacking was looked at for what this device may bring by now.
    pub(super) looked: bool,
    /// The digest differed even after everything was fetched again.
    pub(super) diverged: bool,
    /// Entities that the relay can't take now; tried again at the next connect.
    pub(super) stalled: BTreeSet<EntityHash>,
    /// What the device signed in with, to do so again after a refusal that time may mend.
    token: Option<String>,
    /// How often in a row the channel was refused for such a reason.
    pub(super) refusals: u32,
    /// When to sign in again.
    retry_at: Option<MonoMs>,
    /// Schema requests that were not answered yet, in order: whether each is a push.
    schema_asked: VecDeque<bool>,
    /// The relay's answers to schema requests.
    schema_answers: Vec<SchemaIs>,
    /// The relay's schema is not the one that it had: a newer one, or it went back, which shows
    /// when the feed was read. Until then nothing is sent.
    pub(super) schema_unsure: bool,
    /// The schema's hash as the relay knows it.
    pub(super) relay_schema: Option<[u8; 32]>,
}

/// An entity that another one refers to and that the relay does not know.
struct Parent {
    hash: EntityHash,
    key: EntityKey,
    wait: Wait,
}

/// What such an entity waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// Its turn.
    Pending,
    /// Something that the relay lacks.
    Stalled,
    /// A person: it was refused.
    Refused,
}

impl Link {
    pub(super) fn is_live(&self) -> bool {
        self.granted && self.state == ChannelState::Live
    }

    /// The same replica without a link.
    pub(super) fn ended(&mut self) -> Self {
        let state = match std::mem::take(&mut self.state) {
            // Why the relay refused stays visible.
            faulted @ ChannelState::Faulted { .. } => {
                reached!(EndedFaulted);
                faulted
            }
            _ => {
                reached!(EndedOffline);
                ChannelState::Offline
            }
        };
        Self { state, durable: self.durable, next_unit: self.next_unit, ..Self::default() }
    }
}

impl Replica {
    /// How far the channel has come.
    pub fn channel_state(&self) -> &ChannelState {
        &self.channel.state
    }

    /// Whether everything was received and everything that can be sent was answered, a schema too.
    pub fn is_complete(&self) -> bool {
        let pushes = self.channel.schema_asked.contains(&true);
        self.channel.is_live() && self.channel.in_flight.is_empty() && !pushes && !self.has_sendable()
    }

    /// Why this device and the relay are not equal though [`Replica::is_complete`]; none where
    /// they are.
    pub fn held(&self) -> Result<Option<Held>, StoreError> {
        if !self.is_complete() {
            return Ok(None);
        }
        // Pending changes make no difference to the digest, so a fault outranks what waits.
        if self.channel.diverged {
            reached!(HeldDiverged);
            return Ok(Some(Held::Diverged));
        }
        if self.repair.waits_for_schema {
            reached!(HeldSchemaLost);
            return Ok(Some(Held::SchemaLost));
        }
        for (hash, numbers) in &self.pending {
            let first = numbers.first().and_then(|number| self.outbox.get(number));
            let Some(entity) = first.map(|pending| pending.key.clone()) else { continue };
            if self.channel.stalled.contains(hash) {
                reached!(HeldMissing);
                return Ok(Some(Held::MissingAtRelay { entity }));
            }
            let parents = self.parents(*hash)?;
            if let Some(Parent { key, .. }) = parents.into_iter().find(|parent| parent.wait == Wait::Refused)
            {
                reached!(HeldRefusedParent);
                return Ok(Some(Held::RefusedParent { entity, parent: key }));
            }
        }
        Ok(None)
    }

    /// The hash of the workspace's schema at the relay, once it is known; zeros mean none.
    pub fn relay_schema(&self) -> Option<[u8; 32]> {
        self.channel.relay_schema
    }

    /// A link stands: signs in on `channel` and opens the feed, without waiting for answers, so
    /// that a reconnect is one round trip. The relay's clock is told by
    /// [`Replica::relay_clock_is`] before its grant is received.
    pub fn connect(&mut self, channel: Channel, token: Option<String>) {
        self.channel = Link {
            state: {
                reached!(SigningIn);
                ChannelState::SigningIn
            },
            channel,
            relay_ahead_ms: self.channel.relay_ahead_ms,
            measured: self.channel.measured,
            clock_unsure: self.channel.clock_unsure,
            durable: self.channel.durable,
            next_unit: self.channel.next_unit,
            // On a link that stands.
            rereads: self.channel.rereads,
            token: token.clone(),
            refusals: self.channel.refusals,
            ..Link::default()
        };
        let durable = self.channel.durable;
        let undurable = self.outbox.values().filter(|p| p.sent && !p.again && p.commit > durable).count();
        let message = SignIn {
            channel,
            workspace: self.config.workspace.as_str().to_owned(),
            token,
            device_name: self.config.device_name.clone(),
            platform: self.config.platform.clone(),
            incarnation: self.state.incarnation,
            sent: self.state.sent.saturating_sub(undurable as u64),
        };
        self.send(message);
        self.open_feed(false);
        self.outputs.push_back(Output::Status);
    }

    /// The relay's clock minus this device's, in milliseconds, as the handshake of this link measured it
    /// when this device's clocks said `measured`.
    pub fn relay_clock_is(&mut self, measured: Now, ahead_ms: i64) {
        self.channel.relay_ahead_ms = ahead_ms;
        self.channel.measured = Some(measured);
        self.channel.clock_unsure = false;
    }

    /// Whether the wall clock still is what it was when it was measured: neither set, which shows by the
    /// other clock, nor given time to drift. A machine that slept looks as if its clock had been set, so
    /// which it was is for the next handshake to say.
    pub(super) fn watch_clock(&mut self, now: Now) {
        let Some(measured) = self.channel.measured.filter(|_| !self.channel.clock_unsure) else { return };
        let passed = now.mono.0.saturating_sub(measured.mono.0);
        let due = measured.wall.0.saturating_add(passed);
        if now.wall.0.abs_diff(due) > CLOCK_SET_MS || passed > CLOCK_KEPT_MS {
            tracing::info!("the clock may have been set: it is to be measured again");
            self.channel.clock_unsure = true;
            self.outputs.push_back(Output::Reconnect);
        }
    }

    /// Asks the relay once more for what is new, so that a sync on a link that stands is an
    /// exchange too: what the relay had by then has arrived when [`Replica::is_complete`].
    pub fn confirm(&mut self) {
        if self.channel.is_live() {
            self.channel.state =
                ChannelState::CatchingUp { cursor: self.state.cursor, end: self.state.cursor };
            self.open_feed(false);
            self.outputs.push_back(Output::Status);
        } else if self.channel.granted {
            self.channel.ask_again = true;
        }
    }

    /// The feed tells of a schema. Its last one is the one in force.
    pub(super) fn schema_in_feed(&mut self, hash: [u8; 32]) {
        self.note_schema(hash);
        if self.repair.reading {
            // Each schema can hold what was written by those before it, so whatever came after the one
            // that is looked for, that one is not lost.
            self.repair.waits_for_schema &= hash != self.repair.schema;
            self.schema_is(hash);
        } else if matches!(self.channel.state, ChannelState::CatchingUp { .. }) {
            // Somebody has pushed one since it was found lost. Should the relay have gone back again,
            // the end of the feed will tell, so which one is looked for stays.
            self.repair.waits_for_schema = false;
            self.schema_is(hash);
        } else {
            self.schema_came(hash);
        }
    }

    /// The relay has got a schema, or another one: what waited for it can go now.
    fn schema_came(&mut self, hash: [u8; 32]) {
        if self.channel.relay_schema != Some(hash) {
            self.repair.schema = hash;
            self.repair.waits_for_schema = false;
        }
        self.schema_is(hash);
    }

    fn schema_is(&mut self, hash: [u8; 32]) {
        self.channel.relay_schema = Some(hash);
        self.channel.stalled.clear();
        if matches!(self.channel.state, ChannelState::Faulted { code: FaultCode::SchemaMissing, .. }) {
            // By the grant that it has.
            self.connect(self.channel.channel, None);
        }
    }

    /// When to call [`Replica::tick`] if nothing happens before.
    pub fn next_wakeup(&self) -> Option<MonoMs> {
        self.channel.retry_at
    }

    /// Time passed: signs in again on a channel that was refused for what time may mend.
    pub fn tick(&mut self, now: Now) {
        self.watch_clock(now);
        if self.channel.retry_at.is_some_and(|at| at <= now.mono) {
            let token = self.channel.token.take();
            self.connect(self.channel.channel, token);
        }
    }

    /// When to come back, so that devices that were refused together don't come back together.
    fn retry_at(&mut self, now: Now) -> MonoMs {
        let ceiling = RETRY_MS_BASE.saturating_mul(1 << self.channel.refusals.min(20)).min(RETRY_MS_MAX);
        self.channel.refusals = self.channel.refusals.saturating_add(1);
        let mut hasher = blake3::Hasher::new_keyed(&self.config.seed);
        hasher.update(b"retry").update(&now.mono.0.to_be_bytes());
        let random = hasher.finalize().as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        now.mono + (ceiling / 2 + random % (ceiling / 2 + 1))
    }

    /// The link is gone. What was in flight is sent again over the next one.
    pub fn disconnect(&mut self) {
        self.channel = self.channel.ended();
        self.outputs.push_back(Output::Status);
    }

    /// Signs in anew on the open channel with a fresh token.
    pub fn refresh(&mut self, token: String) {
        let channel = self.channel.channel;
        match self.channel.state {
            ChannelState::Offline => {}
            ChannelState::Faulted { .. } => {
                self.connect(channel, Some(token));
            }
            _ => self.send(Refresh { channel, token }),
        }
    }

    /// Pushes the schema that the replica was opened with, or asks for the relay's. The answer
    /// comes through [`Replica::take_schema_answer`].
    pub fn exchange_schema(&mut self, push: bool) {
        let channel = self.channel.channel;
        self.channel.schema_asked.push_back(push);
        if push {
            let source = self.config.schema_source.clone();
            self.send(PushSchema { channel, source });
        } else {
            self.send(FetchSchema { channel });
        }
    }

    /// The oldest answer to a schema request.
    pub fn take_schema_answer(&mut self) -> Option<SchemaIs> {
        (!self.channel.schema_answers.is_empty()).then(|| self.channel.schema_answers.remove(0))
    }

    /// The store has made everything up to `commit` durable.
    pub fn durable(&mut self, commit: CommitNo) -> Result<(), StoreError> {
        self.channel.durable = self.channel.durable.max(commit);
        self.pump()
    }

    /// A message for this replica's channel.
    pub fn receive(&mut self, now: Now, message: Message) -> Result<(), StoreError> {
        self.watch_clock(now);
        match message {
            Message::Granted(granted) => self.on_granted(now, granted)?,
            Message::Feed(feed) => self.on_feed(now, feed)?,
            Message::CaughtUp(caught_up) => self.on_caught_up(now, caught_up)?,
            Message::Ack(ack) => {
                self.channel.refusals = 0;
                self.on_ack(now, ack)?;
            }
            Message::SchemaIs(answer) => {
                self.channel.schema_asked.pop_front();
                if answer.problems.is_empty() && answer.hash != [0; 32] {
                    self.schema_came(answer.hash);
                }
                self.channel.schema_answers.push(answer);
                self.outputs.push_back(Output::Status);
            }
            // The first refusal says why; what was asked in the same breath is refused after it.
            Message::Fault(_) if matches!(self.channel.state, ChannelState::Faulted { .. }) => {
                reached!(FaultedAfter);
            }
            Message::Fault(fault) => {
                reached!(Faulted);
                let code = FaultCode::from_u16(fault.code).unwrap_or(FaultCode::Internal);
                if code.is_retryable() {
                    reached!(FaultedRetry);
                }
                let retry_at = code.is_retryable().then(|| self.retry_at(now));
                self.fail(code, fault.message, retry_at);
            }
            // What only a relay takes.
            _ => tracing::debug!("a message that a device does not take was passed over"),
        }
        self.pump()?;
        self.trim_cache();
        Ok(())
    }

    /// Ends the exchange on this channel: what is written waits for another sign-in.
    fn fail(&mut self, code: FaultCode, message: String, retry_at: Option<MonoMs>) {
        self.channel.granted = false;
        self.channel.in_flight.clear();
        self.channel.busy.clear();
        self.channel.schema_asked.clear();
        self.channel.retry_at = retry_at;
        self.channel.state = ChannelState::Faulted { code, message };
        self.outputs.push_back(Output::Status);
    }

    /// The relay said what can't be so. What it says next can't be relied on either.
    pub(super) fn distrust(&mut self, message: String) {
        reached!(Distrusted);
        tracing::error!(message, "the relay breaks the protocol");
        self.fail(FaultCode::Protocol, message, None);
    }

    fn send(&mut self, message: impl Into<Message>) {
        self.outputs.push_back(Output::Send(message.into().encode()));
    }

    fn on_granted(&mut self, now: Now, granted: Granted) -> Result<(), StoreError> {
        let renewed = self.channel.granted;
        let next_life = Incarnation::next_store(self.state.incarnation, granted.incarnation);
        if granted.behind && !renewed && next_life.is_none() {
            let (known, own) = (granted.incarnation, self.state.incarnation);
            self.distrust(format!(
                "the relay says that this device's store has had {known} lives, which can't be: it is in its life {own}"
            ));
            return Ok(());
        }
        reached!(renewed, GrantRenewed, Granted);
        let role_changed = renewed && self.state.role != granted.grant.role;
        self.state.role = granted.grant.role;
        self.channel.relay_schema = Some(granted.schema);
        let mut batch = Batch::new();
        let mut redated = Vec::new();
        if !renewed {
            if self.state.epoch == [0; 16] {
                self.state.epoch = granted.epoch;
            } else if granted.epoch != self.state.epoch {
                reached!(GrantedNewEpoch);
                self.begin_repair(granted.epoch);
            }
            self.state.skew_ms = self.channel.relay_ahead_ms;
            if granted.behind {
                reached!(GrantedBehind);
                tracing::warn!("the store went back: a new incarnation begins");
                if !mutated!(ReuseIncarnation) {
                    self.state.incarnation = next_life.unwrap_or(self.state.incarnation);
                }
                self.state.sent = 0;
                self.outbox.values_mut().for_each(|pending| pending.mark = 0);
                self.recovering = true;
                batch.put(Keyspace::META, self.keys.recovering(), []);
            }
            if !self.recovering {
                redated = self.redate(&mut batch, now, false)?;
            }
            self.channel.granted = true;
            self.channel.state =
                ChannelState::CatchingUp { cursor: self.state.cursor, end: self.state.cursor };
            // A relay that lost its schema gets that one or none: what was written by it might not fit
            // an older one, and would be refused for good.
            let lost = self.repair.schema;
            self.channel.schema_unsure =
                granted.schema != [0; 32] && ![[0; 32], granted.schema].contains(&lost);
            if granted.schema == [0; 32]
                && matches!(self.role(), GrantRole::Authority | GrantRole::Admin)
                && (lost == [0; 32] || lost == self.config.schema.hash())
            {
                self.exchange_schema(true);
            }
            if self.recovering {
                self.open_feed(true);
            }
        }
        let after = self.commit(batch)?;
        if !redated.is_empty() {
            self.outputs.push_back(Output::Changed { after, entities: redated });
        }
        if role_changed {
            // What others had to bring may be this device's to bring now.
            self.channel.looked = false;
            if self.channel.is_live() {
                self.offer_lacking()?;
            }
        }
        self.outputs.push_back(Output::Status);
        Ok(())
    }

    /// Asks for the feed from the cursor on.
    pub(super) fn open_feed(&mut self, full: bool) {
        let message = Open {
            channel: self.channel.channel,
            epoch: self.state.epoch,
            cursor: self.state.cursor,
            digest: self.state.digest,
            full,
        };
        self.send(message);
    }

    /// Dates pending changes again whose clock was off by more than is tolerated. They have
    /// never left the device, so their places in the actor's sequence are free. Those of a store that `went_back` are
    /// all made again, by the actor of its new life: what it had written before may have left under the same
    /// places.
    pub(super) fn redate(
        &mut self,
        batch: &mut Batch,
        now: Now,
        went_back: bool,
    ) -> Result<Vec<EntityKey>, StoreError> {
        if mutated!(SkipRestamp) {
            return Ok(Vec::new());
        }
        let correction = self.correction_ms();
        let mut entities: BTreeSet<EntityHash> = BTreeSet::new();
        for (number, pending) in &self.outbox {
            if !pending.sent || mutated!(ApplyTwice) {
                let record = self.read_outbox(*number)?;
                let off = (correction - record.skew_ms).unsigned_abs() > SKEW_TOLERATED_MS;
                if (off && !record.dated) || went_back || mutated!(ApplyTwice) {
                    entities.insert(pending.entity);
                }
            }
        }
        for hash in &entities {
            self.write_again(batch, now, *hash, |sent| !sent || mutated!(ApplyTwice))?;
        }
        entities.extend(self.keep_whole(batch, now)?);
        // Each once: what is derived from an entity is written against what the store has of it.
        let mut redated = Vec::with_capacity(entities.len());
        for hash in entities {
            if let Some(loaded) = self.cache.get(&hash) {
                redated.push(loaded.entity.key().clone());
                self.persist(batch, hash, &[], &[], true, false)?;
            }
        }
        Ok(redated)
    }

    /// Whether something waits that could be sent now.
    fn has_sendable(&self) -> bool {
        if self.repair.waits_for_schema {
            return false;
        }
        let mut waiting = BTreeSet::new();
        self.pending.keys().any(|hash| matches!(self.group(*hash, &mut waiting), Ok(Some(_))))
    }

    /// Sends what may be sent.
    pub(super) fn pump(&mut self) -> Result<(), StoreError> {
        let repairs = self.recovering || self.repair.reading;
        let waits = repairs || self.repair.waits_for_schema || self.channel.schema_unsure;
        if !self.channel.granted || waits || self.channel.clock_unsure {
            return Ok(());
        }
        while self.channel.in_flight.len() < UNITS_IN_FLIGHT_MAX {
            let numbers = self.next_numbers()?;
            if numbers.is_empty() {
                return Ok(());
            }
            if self.mark_sent(&numbers)? {
                // They go when the mark is durable.
                continue;
            }
            let unit = self.unit(&numbers)?;
            let unit_id = self.channel.next_unit;
            self.channel.next_unit += 1;
            let pending = || numbers.iter().filter_map(|number| self.outbox.get(number));
            let sent = pending().map(|pending| pending.mark).max().unwrap_or_default();
            let entities: BTreeSet<EntityHash> = pending().map(|pending| pending.entity).collect();
            let message = Changes { channel: self.channel.channel, unit_id, sent, unit };
            self.channel.busy.extend(&entities);
            self.channel.in_flight.insert(unit_id, (numbers, entities));
            self.send(message);
        }
        Ok(())
    }

    /// Marks changes as sent. `false` if they were so already.
    fn mark_sent(&mut self, numbers: &[u64]) -> Result<bool, StoreError> {
        let unmarked: Vec<u64> =
            numbers.iter().copied().filter(|n| self.outbox.get(n).is_some_and(|p| !p.sent)).collect();
        if unmarked.is_empty() {
            return Ok(false);
        }
        let mut batch = Batch::new();
        for number in &unmarked {
            let mut record = self.read_outbox(*number)?;
            record.sent = true;
            self.put_outbox(&mut batch, *number, &record)?;
        }
        self.state.sent += unmarked.len() as u64;
        let commit = self.commit(batch)?;
        for number in &unmarked {
            if let Some(pending) = self.outbox.get_mut(number) {
                pending.sent = true;
                pending.mark = self.state.sent;
                pending.commit = commit;
            }
        }
        Ok(true)
    }

    /// The outbox numbers of the next unit, in order; none where nothing can go now.
    fn next_numbers(&self) -> Result<Vec<u64>, StoreError> {
        let mut queue: Vec<(i64, u64, EntityHash)> = self
            .pending
            .iter()
            .filter(|(hash, _)| !self.channel.stalled.contains(*hash) && !self.channel.busy.contains(*hash))
            .filter_map(|(hash, numbers)| {
                let first = *numbers.first()?;
                let pending = self.outbox.get(&first)?;
                (pending.commit <= self.channel.durable).then(|| {
                    let priority = self.ty(pending.key.type_name()).map_or(0, |ty| ty.priority);
                    (-i64::from(priority), first, *hash)
                })
            })
            .collect();
        queue.sort_unstable();
        let mut chosen: BTreeSet<EntityHash> = BTreeSet::new();
        let mut waiting: BTreeSet<EntityHash> = BTreeSet::new();
        let mut ordered: Vec<u64> = Vec::new();
        let mut bytes = 0;
        for (_, _, hash) in queue {
            if chosen.contains(&hash) || waiting.contains(&hash) {
                continue;
            }
            let Some(group) = self.group(hash, &mut waiting)? else { continue };
            let numbers =
                self.numbers_of(&group, UNIT_BYTES.saturating_sub(bytes).max(1), ordered.is_empty())?;
            if numbers.is_empty() {
                break;
            }
            bytes += numbers.iter().filter_map(|n| self.outbox.get(n)).map(|p| p.bytes).sum::<usize>();
            chosen.extend(group);
            ordered.extend(numbers);
            if chosen.len() >= UNIT_ENTITIES || bytes >= UNIT_BYTES {
                break;
            }
        }
        Ok(ordered)
    }

    /// The entities that must travel with one: those that it waits for and that wait for it in
    /// turn, as members of transactions and by the parents of each. None while one of those
    /// that it waits for has to go first; then it and what goes with it is added to `waiting`,
    /// so that nobody asks again.
    fn group(
        &self,
        hash: EntityHash,
        waiting: &mut BTreeSet<EntityHash>,
    ) -> Result<Option<BTreeSet<EntityHash>>, StoreError> {
        if mutated!(SplitTransaction) {
            return Ok(Some(BTreeSet::from([hash])));
        }
        // Who is waited for by whom, as far as one can come from `hash`.
        let mut waited_for: BTreeMap<EntityHash, Vec<EntityHash>> = BTreeMap::new();
        let mut transactions = BTreeSet::new();
        let mut companions = BTreeSet::from([hash]);
        let mut reached = BTreeSet::new();
        let mut open = vec![hash];
        let mut waits = false;
        while let Some(next) = open.pop() {
            if !reached.insert(next) {
                continue;
            }
            if waiting.contains(&next)
                || self.channel.busy.contains(&next)
                || self.channel.stalled.contains(&next)
            {
                waits = true;
                break;
            }
            for number in self.pending.get(&next).into_iter().flatten() {
                let Some(tx) = self.outbox.get(number).and_then(|pending| pending.tx) else { continue };
                if !transactions.insert(tx) {
                    continue;
                }
                // All members wait for each other: it is enough that each does for this one.
                for member in self.members(*number) {
                    waited_for.entry(member).or_default().push(next);
                    waited_for.entry(next).or_default().push(member);
                    open.push(member);
                    if next == hash {
                        companions.insert(member);
                    }
                }
            }
            for parent in self.parents(next)? {
                waits |= parent.wait != Wait::Pending;
                waited_for.entry(parent.hash).or_default().push(next);
                open.push(parent.hash);
            }
            if waits {
                break;
            }
        }
        if !waits {
            let mut group = BTreeSet::new();
            let mut open = vec![hash];
            while let Some(next) = open.pop() {
                if group.insert(next) {
                    open.extend(waited_for.get(&next).into_iter().flatten());
                }
            }
            if group.len() == reached.len() {
                return Ok(Some(group));
            }
        }
        waiting.append(&mut companions);
        Ok(None)
    }

    /// The entities of the transaction that a pending change belongs to, its own included.
    pub(super) fn members(&self, number: u64) -> impl Iterator<Item = EntityHash> {
        self.beside(number).map(|(_, pending)| pending.entity)
    }

    /// The transaction that a pending change belongs to, with itself.
    pub(super) fn beside(&self, number: u64) -> impl Iterator<Item = (&u64, &PendingRef)> {
        let tx = self.outbox.get(&number).and_then(|pending| pending.tx);
        let same = move |entry: &(&u64, &PendingRef)| tx.is_some() && entry.1.tx == tx;
        let before = self.outbox.range(..number).rev().take_while(same);
        before.chain(self.outbox.range(number..).take_while(same))
    }

    /// The entities that one refers to and the relay does not know.
    fn parents(&self, hash: EntityHash) -> Result<Vec<Parent>, StoreError> {
        let Some(first) = self.pending.get(&hash).and_then(|numbers| self.outbox.get(numbers.first()?))
        else {
            return Ok(Vec::new());
        };
        let Some(ty) = self.ty(first.key.type_name()) else { return Ok(Vec::new()) };
        let refs: Vec<(&str, &str)> = ty
            .fields
            .values()
            .filter_map(|field| match &field.ty {
                FieldType::Scalar(ScalarType::Ref(to)) => Some((field.name.as_str(), to.as_str())),
                _ => None,
            })
            .collect();
        if refs.is_empty() {
            return Ok(Vec::new());
        }
        let row = self.keys.get(&*self.store, View::Latest, Keyspace::ROW, &self.keys.row(&first.key))?;
        // A row that can't be read keeps nothing from being sent.
        let Some(row) = row.and_then(|row| from_json::<RowRecord>(&row, "a row").ok()) else {
            return Ok(Vec::new());
        };
        let mut parents = Vec::new();
        for (field, to) in refs {
            let Some(Json::String(id)) = row.fields.get(field) else { continue };
            let Ok(parent) = EntityKey::new(to, id.as_str()) else { continue };
            let parent_hash = self.hash(&parent);
            if parent_hash == hash || self.is_admitted(parent_hash)? {
                continue;
            }
            let wait = if self.channel.stalled.contains(&parent_hash) {
                Wait::Stalled
            } else if self.pending.contains_key(&parent_hash) {
                Wait::Pending
            } else if self.refused.contains_key(&parent) {
                Wait::Refused
            } else {
                continue;
            };
            parents.push(Parent { hash: parent_hash, key: parent, wait });
        }
        Ok(parents)
    }

    fn is_admitted(&self, hash: EntityHash) -> Result<bool, StoreError> {
        if let Some(loaded) = self.cache.get(&hash) {
            return Ok(!loaded.record.admitted_heads.is_empty());
        }
        let found = self.store.get(View::Latest, Keyspace::ENTITY, &self.keys.entity(hash))?;
        match found {
            Some(bytes) => Ok(!self.read_entity(&bytes)?.admitted_heads.is_empty()),
            None => Ok(false),
        }
    }

    /// The pending changes of a group in order, cut where they would exceed the bytes left,
    /// but never within a transaction. A first unit takes at least one whole transaction.
    fn numbers_of(
        &self,
        group: &BTreeSet<EntityHash>,
        bytes_left: usize,
        first: bool,
    ) -> Result<Vec<u64>, StoreError> {
        let numbers: BTreeSet<u64> =
            group.iter().filter_map(|hash| self.pending.get(hash)).flatten().copied().collect();
        // What was admitted before has no pending change below it, and may be below one.
        let (mut numbers, mut new): (Vec<u64>, Vec<u64>) =
            numbers.into_iter().partition(|number| self.is_offered_again(*number));
        let offered = || numbers.iter().filter_map(|number| self.outbox.get(number));
        let some_wait = offered().any(|pending| pending.commit > self.channel.durable);
        if some_wait || offered().map(|pending| pending.bytes).sum::<usize>() > bytes_left {
            numbers = self.again_in_order(&numbers)?;
        }
        numbers.append(&mut new);
        let mut taken: Vec<u64> = Vec::new();
        let mut bytes = 0;
        let mut last_tx = None;
        for number in numbers {
            let Some(pending) = self.outbox.get(&number) else { continue };
            if pending.commit > self.channel.durable {
                break;
            }
            let same = pending.tx.is_some() && pending.tx == last_tx;
            let mut whole = pending.bytes;
            if let Some(tx) = pending.tx.filter(|_| !same) {
                let members = self.outbox.range(number..).map(|(_, member)| member);
                let members = members.take_while(|member| member.tx == Some(tx));
                // One of them may have been made again just now, or marked as sent.
                if members.clone().any(|member| member.commit > self.channel.durable) {
                    break;
                }
                whole = members.map(|member| member.bytes).sum();
            }
            let room = bytes + whole <= bytes_left;
            if !(same || room || first && taken.is_empty()) {
                break;
            }
            bytes += pending.bytes;
            last_tx = pending.tx;
            taken.push(number);
        }
        Ok(taken)
    }

    fn unit(&mut self, numbers: &[u64]) -> Result<Unit, StoreError> {
        let mut order: Vec<(EntityHash, EntityKey)> = Vec::new();
        let mut hashes: BTreeMap<EntityHash, BTreeSet<ChangeHash>> = BTreeMap::new();
        for pending in numbers.iter().filter_map(|number| self.outbox.get(number)) {
            if !hashes.contains_key(&pending.entity) {
                order.push((pending.entity, pending.key.clone()));
            }
            hashes.entry(pending.entity).or_default().insert(pending.hash);
        }
        let mut unit = Unit::default();
        for (hash, key) in order {
            self.load(&key)?;
            let entity = &self.loaded(hash)?.entity;
            let changes = entity.changes(&hashes[&hash]);
            unit.entities.push(entity.part(&changes));
        }
        Ok(unit)
    }

    /// The relay's clock as this device can tell.
    pub(super) fn relay_clock(&self, now: Now) -> WallMs {
        WallMs(now.wall.0.saturating_add_signed(self.channel.relay_ahead_ms))
    }
}
