//! The simulated system: devices, links, a relay, and the one queue of what happens next.
//!
//! Everything that decides is the real thing: `Replica`, `ClientSession`, `Relay`. Simulated are
//! the network, the disks, the clocks and the users. One queue, ordered by true time and
//! then by the order of scheduling, says what happens next, and all chance follows from the
//! seed, so a run repeats to the byte.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Arguments;
use std::sync::Arc;

use anabranch_core::admission::RefusalCode;
use anabranch_core::change::Change;
use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::id::{DeviceId, EntityKey, WorkspaceId};
use anabranch_core::relay::{
    Claims, ConnId, Input, Output as Told, Relay, RelayConfig, TokenVerifier, UNSENT_BYTES_MAX,
};
use anabranch_core::replica::{ChannelState, Output};
use anabranch_core::rows::ConflictRecord;
use anabranch_core::schema::Schema;
use anabranch_core::session::{ClientSession, Event as Heard};
use anabranch_core::store::{CommitNo, Store, StoreError};
use anabranch_core::wire::{FaultCode, FeedBody, FeedEntry, GrantRole, Message};
use automerge::ChangeHash;

use crate::acts::Tried;
use crate::apps;
use crate::device::{Device, START_MS};
use crate::dice::Dice;
use crate::disk::{Disk, Noted};
use crate::ledger::{Ledger, Meant};
use crate::net::{Link, Peer};
use crate::plan::{Act, Fault, Options, Plan};
use crate::report::Report;

pub(crate) const CHANNEL: u32 = 1;
/// How an `Ack` begins on the wire.
pub(crate) const ACK_KIND: u8 = 7;
/// Devices that a user has.
const DEVICES_PER_USER: usize = 3;
/// What wait for the networks of all connections together may take of the relay's memory, in bytes.
const UNSENT_BYTES_TOTAL: usize = 24 * 1024 * 1024;
/// Messages between two looks at what all connections together wait for.
const MEMORY_LOOKS_EVERY: u64 = 64;
/// How long a link lives on which nothing arrives, in milliseconds.
const IDLE_MS: u64 = 30_000;
/// How long devices stay awake with nobody at them, and how long they sleep then.
const AWAKE_MS: u64 = 10 * 60 * 1000;
const ASLEEP_MS: u64 = 6 * 60 * 60 * 1000;

/// What happens next.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    /// A step of the plan.
    Step(usize),
    /// The first message of a stream arrives.
    Arrive { conn: ConnId, up: bool },
    /// An end of a link notices that it is broken: the device's, or the relay's.
    Notice { conn: ConnId, relay: bool },
    /// A device tries to reach the relay.
    Dial(usize),
    /// A device's disk has flushed.
    Flush(usize),
    /// The relay's disk has flushed.
    FlushRelay,
    /// A device is switched on.
    Start(usize),
    /// A device loses power.
    PowerOff(usize),
    /// The relay is started.
    StartRelay,
    /// An app has a new token for the relay.
    Token(usize),
    /// A device's timer.
    Wake(usize),
    /// A device's disk has room again.
    Room(usize),
    /// The relay's timers.
    Tick,
}

impl Event {
    /// Whether it comes again and again, with nothing left to do.
    fn is_timer(&self) -> bool {
        matches!(self, Event::Tick | Event::Wake(_))
    }
}

/// Tokens say a role, a user, and until when they hold.
struct Tokens;

impl TokenVerifier for Tokens {
    fn verify(&self, token: &str, now: WallMs) -> Result<Claims, (FaultCode, String)> {
        let invalid = || (FaultCode::TokenInvalid, format!("{token:?} is no token"));
        let [role, user, expires] = token.split(':').collect::<Vec<_>>()[..] else { return Err(invalid()) };
        let expires = WallMs(expires.parse().map_err(|_| invalid())?);
        if expires <= now {
            return Err((FaultCode::TokenExpired, "the token has expired".into()));
        }
        Ok(Claims {
            workspace: "home".into(),
            user: user.into(),
            role: GrantRole::from_name(role).ok_or_else(invalid)?,
            token_id: token.into(),
            single_use: false,
            not_before: WallMs(0),
            expires,
        })
    }
}

/// See the [module](self).
pub(crate) struct Cluster {
    pub(crate) seed: u64,
    pub(crate) plan: Plan,
    pub(crate) dice: Dice,
    pub(crate) time_ms: u64,
    /// When a user did something, or something went wrong.
    acted_ms: u64,
    queue: BTreeMap<(u64, u64), Event>,
    /// How many in the queue are no timers.
    awaited: usize,
    scheduled: u64,
    pub(crate) events: u64,
    pub(crate) devices: Vec<Device>,
    pub(crate) links: BTreeMap<ConnId, Link>,
    conns: u64,
    pub(crate) relay: Option<Relay>,
    pub(crate) relay_disk: Arc<Disk>,
    pub(crate) relay_backups: Vec<Disk>,
    relay_flush_due: bool,
    memory_looks: u64,
    /// The relay loses power as soon as something waits to be flushed.
    pub(crate) relay_doomed: bool,
    tick_due: Option<u64>,
    pub(crate) grant_ms: u64,
    pub(crate) schemas: [(Arc<Schema>, String); 2],
    /// Types that this run is about, the favourite first.
    pub(crate) types: Vec<String>,
    pub(crate) unique: BTreeMap<EntityKey, u32>,
    pub(crate) ledger: Ledger,
    pub(crate) report: Report,
    /// Whether the relay may lose what it had acknowledged.
    pub(crate) may_differ: bool,
    /// Whether healing has begun: nothing goes wrong any more.
    pub(crate) healing: bool,
    trace: Option<String>,
    /// Changes that the relay has seen arrive.
    arrived: BTreeSet<ChangeHash>,
    /// Units of devices that the relay has not answered yet.
    unanswered: BTreeMap<(ConnId, u64), Vec<(EntityKey, Change)>>,
    /// The newest link of each device on which something arrived at the relay.
    newest_link: BTreeMap<usize, u64>,
    /// What strangers wrote within their rights.
    pub(crate) strangers: BTreeMap<ChangeHash, EntityKey>,
    /// Of these, what the relay said that it took.
    pub(crate) taken: BTreeSet<ChangeHash>,
    /// Edits that the engine did not make.
    pub(crate) tries: Vec<Tried>,
    /// The device that reads the whole feed at the end, and what it read.
    pub(crate) auditor: Option<usize>,
    pub(crate) audited: Vec<FeedEntry>,
    /// What waits for people on each device, by entity, at the end.
    pub(crate) inboxes: Vec<BTreeMap<EntityKey, Vec<ConflictRecord>>>,
}

impl Cluster {
    pub(crate) fn new(plan: Plan, options: &Options) -> Self {
        let seed = plan.seed;
        let mut dice = Dice::of(seed, 2);
        let source = apps::schema();
        let next = apps::next_version(&source);
        let parse = |text: &str| Arc::new(Schema::parse(text, "schema.toml").expect("a valid schema"));
        let schemas = [(parse(&source), source.clone()), (parse(&next), next)];
        let mut types: Vec<String> = schemas[0].0.types.keys().cloned().collect();
        dice.shuffle(&mut types);
        types.truncate(3 + dice.roll(5));
        let devices = (0..plan.devices).map(|number| {
            let role = match number {
                0 => GrantRole::Authority,
                n if n % 5 == 4 => GrantRole::Authority,
                n if n % 7 == 6 => GrantRole::Admin,
                _ => GrantRole::Writer,
            };
            Device::new(number, role, &schemas[0].0, &source)
        });
        let devices = devices.collect();
        // With months between steps there would be nothing but new tokens.
        let months = plan.steps.iter().any(|step| step.act == Act::Fault(Fault::Months));
        let may_differ = plan.steps.iter().any(|step| step.act == Act::Fault(Fault::RestoreRelay));
        let short = options.faults.contains(&Fault::Expiry) && !months;
        let mut cluster = Self {
            seed,
            plan,
            dice,
            time_ms: 0,
            acted_ms: 0,
            queue: BTreeMap::new(),
            awaited: 0,
            scheduled: 0,
            events: 0,
            devices,
            links: BTreeMap::new(),
            conns: 0,
            relay: None,
            relay_disk: Arc::new(Disk::new()),
            relay_backups: Vec::new(),
            relay_flush_due: false,
            memory_looks: 0,
            relay_doomed: false,
            tick_due: None,
            grant_ms: if short { 60_000 } else { 30 * 24 * 60 * 60 * 1000 },
            schemas,
            types,
            unique: BTreeMap::new(),
            ledger: Ledger::default(),
            report: Report::default(),
            may_differ,
            healing: false,
            trace: options.trace.then(String::new),
            arrived: BTreeSet::new(),
            unanswered: BTreeMap::new(),
            newest_link: BTreeMap::new(),
            strangers: BTreeMap::new(),
            taken: BTreeSet::new(),
            tries: Vec::new(),
            auditor: None,
            audited: Vec::new(),
            inboxes: Vec::new(),
        };
        cluster.start_relay();
        for device in 0..cluster.devices.len() {
            cluster.devices[device].absent = options.absent.contains(&device);
            cluster.start(device);
        }
        for (number, step) in cluster.plan.steps.clone().iter().enumerate() {
            let wanted = options.only.as_ref().is_none_or(|only| only.contains(&number));
            if wanted && !options.absent.contains(&step.device) {
                cluster.at(step.at_ms, Event::Step(number));
            }
        }
        cluster
    }

    // ── Time ──────────────────────────────────────────────────────────────────────────────

    pub(crate) fn at(&mut self, at_ms: u64, event: Event) {
        self.scheduled += 1;
        self.awaited += usize::from(!event.is_timer());
        self.queue.insert((at_ms.max(self.time_ms), self.scheduled), event);
    }

    pub(crate) fn after(&mut self, least_ms: u64, most_ms: u64, event: Event) {
        let at_ms = self.time_ms + self.dice.between(least_ms, most_ms);
        self.at(at_ms, event);
    }

    /// Lets the next thing happen. `false` if nothing is to happen but timers.
    pub(crate) fn step(&mut self) -> bool {
        if self.awaited == 0 {
            return false;
        }
        let Some(((at_ms, _), event)) = self.queue.pop_first() else { return false };
        self.awaited -= usize::from(!event.is_timer());
        self.time_ms = at_ms;
        self.events += 1;
        self.happen(event);
        true
    }

    /// What waits to happen, for a report on what never ends.
    pub(crate) fn waiting(&self) -> Vec<String> {
        self.queue.iter().take(8).map(|((at, _), event)| format!("{at}: {event:?}")).collect()
    }

    pub(crate) fn tell(&mut self, what: Arguments<'_>) {
        if let Some(trace) = &mut self.trace {
            use std::fmt::Write as _;
            let _ = writeln!(trace, "{:>12} {what}", self.time_ms);
        }
    }

    pub(crate) fn take_trace(&mut self) -> String {
        self.trace.take().unwrap_or_default()
    }

    pub(crate) fn wrong(&mut self, what: String) {
        self.tell(format_args!("WRONG {what}"));
        self.ledger.wrong.push(what);
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Step(number) => {
                let step = self.plan.steps[number];
                self.acted_ms = self.time_ms;
                self.tell(format_args!("step {number}: {:?} on device {}", step.act, step.device));
                self.act(step);
            }
            Event::Arrive { conn, up } => self.arrive(conn, up),
            Event::Notice { conn, relay: false } => self.device_hangs_up(conn),
            Event::Notice { conn, relay: true } => self.relay_hangs_up(conn),
            Event::Dial(device) => self.dial(device),
            Event::Flush(device) => self.flush(device),
            Event::FlushRelay => self.flush_relay(),
            Event::Start(device) => self.start(device),
            Event::PowerOff(device) => self.lose_power(device),
            Event::StartRelay => self.start_relay(),
            Event::Token(device) => self.bring_token(device),
            Event::Wake(device) => self.wake(device),
            Event::Room(device) => self.room(device),
            Event::Tick => {
                if self.tick_due.take_if(|due| *due <= self.time_ms).is_some() {
                    self.report.count("ticks of the relay", 1);
                    self.tell_relay(Input::Tick);
                }
            }
        }
    }

    // ── Devices ───────────────────────────────────────────────────────────────────────────

    pub(crate) fn now(&self, device: usize) -> Now {
        self.devices[device].now(self.time_ms)
    }

    pub(crate) fn start(&mut self, device: usize) {
        let seed = self.seed;
        let this = &mut self.devices[device];
        if this.replica.is_some() || this.absent {
            return;
        }
        if self.time_ms < this.full_until_ms {
            let at_ms = this.full_until_ms;
            return self.at(at_ms, Event::Start(device));
        }
        this.disk.set_full(false);
        match this.start(seed) {
            Ok(()) => {
                this.flush_due = false;
                self.tell(format_args!("device {device} starts"));
                self.settle(device, None);
                // As the engine does: what the store holds is durable when it is opened.
                self.flush_up_to(device, CommitNo(u64::MAX));
                self.after(1, 400, Event::Dial(device));
            }
            Err(StoreError::Damaged { .. }) if self.devices[device].disk.is_torn() => self.begin_anew(device),
            Err(error) => self.wrong(format!("device {device} can't start: {error}")),
        }
    }

    /// A store that says that it is damaged is put aside, and another one is filled by the relay.
    fn begin_anew(&mut self, device: usize) {
        self.tell(format_args!("device {device} finds its store damaged"));
        self.report.count("damaged stores put aside", 1);
        self.replace_disk(device, Disk::new());
        self.after(200, 2_000, Event::Start(device));
    }

    /// A device that is off gets another disk. By then nothing of its old life is under way.
    pub(crate) fn replace_disk(&mut self, device: usize, disk: Disk) {
        let of = |link: &&Link| link.peer == Peer::Device(device);
        let old: Vec<ConnId> =
            self.links.iter().filter(|(_, link)| of(link)).map(|(conn, _)| *conn).collect();
        for conn in old {
            if let Some(link) = self.links.get_mut(&conn) {
                link.up.under_way.clear();
                link.down.under_way.clear();
            }
            self.relay_hangs_up(conn);
        }
        let outbox = disk.outbox();
        self.devices[device].disk = Arc::new(disk);
        self.ledger.restored(device, &outbox);
    }

    /// Loses power with what it has not flushed, and comes back.
    fn lose_power(&mut self, device: usize) {
        if !std::mem::take(&mut self.devices[device].doomed) || self.devices[device].replica.is_none() {
            return;
        }
        self.report.fault("crash");
        self.power_off(device);
        self.after(10, 4_000, Event::Start(device));
    }

    /// A device is off at once: what was not flushed is lost, and what was under way may be.
    pub(crate) fn power_off(&mut self, device: usize) {
        let mut dice = Dice(self.dice.word());
        let this = &mut self.devices[device];
        let Some(replica) = this.replica.take() else { return };
        this.doomed = false;
        let durable = this.disk.durable().unwrap_or_default();
        let last = replica.last_commit().max(durable);
        // The disk may have got further than it had said.
        let kept = if dice.once_in(3) { last } else { CommitNo(dice.between(durable.0, last.0)) };
        if last > durable {
            self.report.fault(if kept < last { "lost unflushed" } else { "flushed untold" });
        }
        if self.devices[device].disk.flush(kept).is_err() {
            self.wrong(format!("device {device}'s disk does not flush"));
        }
        let this = &mut self.devices[device];
        let disk = this.disk.after_a_crash();
        disk.set_full(this.disk.is_full());
        let outbox = disk.outbox();
        this.disk = Arc::new(disk);
        this.told = this.told.max(kept);
        this.forms.clear();
        self.tell(format_args!("device {device} is off, with commit {} of {} kept", kept.0, last.0));
        self.ledger.crashed(device, kept, &outbox);
        if let Some(conn) = self.devices[device].link.take() {
            self.break_link(conn, &mut dice);
            if let Some(link) = self.links.get_mut(&conn) {
                link.ended[0] = true;
            }
        }
    }

    /// The engine stops when its store fails, and the app starts it again.
    fn fail(&mut self, device: usize, error: &StoreError) {
        self.tell(format_args!("device {device} fails: {error}"));
        if matches!(error, StoreError::NoSpace { .. }) {
            self.report.count("engines stopped by a full disk", 1);
        } else {
            self.wrong(format!("device {device}: {error}"));
        }
        self.power_off(device);
        self.after(200, 2_000, Event::Start(device));
    }

    /// Does what a replica wants done, and writes down what it wrote.
    pub(crate) fn settle(&mut self, device: usize, writing: Option<&BTreeMap<EntityKey, Meant>>) {
        let mut reconnect = false;
        while let Some(output) = self.devices[device].replica.as_mut().and_then(|r| r.poll_output()) {
            let bytes = match output {
                Output::Send(bytes) => bytes,
                Output::Reconnect => {
                    reconnect = true;
                    continue;
                }
                _ => continue,
            };
            self.remember(&bytes);
            let Some(conn) = self.devices[device].link else { continue };
            self.send(conn, true, bytes);
        }
        let noted = self.devices[device].disk.take_noted();
        if !noted.is_empty() {
            self.ledger.note(device, noted, writing);
        }
        if reconnect && let Some(conn) = self.devices[device].link {
            self.report.count("clocks measured again", 1);
            self.at(self.time_ms, Event::Notice { conn, relay: false });
        }
        let now = self.now(device);
        let this = &mut self.devices[device];
        let Some(replica) = &this.replica else { return };
        // With nobody at it for long, a device sleeps and wakes a few times a day.
        let asleep_ms = if !self.healing && self.time_ms > self.acted_ms + AWAKE_MS { ASLEEP_MS } else { 0 };
        let wait_ms = replica.next_wakeup().map(|at| asleep_ms + at.0.saturating_sub(now.mono.0).max(1));
        if let Some(at_ms) = wait_ms.map(|ms| self.time_ms + ms)
            && this.wakes_at_ms.replace(at_ms) != Some(at_ms)
        {
            self.at(at_ms, Event::Wake(device));
        }
        let this = &mut self.devices[device];
        let Some(replica) = &this.replica else { return };
        let unflushed = replica.last_commit() > this.disk.durable().unwrap_or_default();
        let (due, doomed) = (this.flush_due, this.doomed);
        if unflushed && doomed {
            self.at(self.time_ms, Event::PowerOff(device));
        }
        if unflushed && !due {
            self.devices[device].flush_due = true;
            let slow = self.dice.once_in(12);
            self.after(1, if slow { 3_000 } else { 30 }, Event::Flush(device));
        }
    }

    fn wake(&mut self, device: usize) {
        let now = self.now(device);
        let time_ms = self.time_ms;
        let this = &mut self.devices[device];
        if this.wakes_at_ms.take_if(|at_ms| *at_ms <= time_ms).is_none() {
            return;
        }
        if let Some(replica) = &mut this.replica {
            replica.tick(now);
            self.settle(device, None);
        }
    }

    fn remember(&mut self, bytes: &[u8]) {
        let Ok(Some(Message::Changes(changes))) = Message::decode(bytes) else { return };
        for entity in &changes.unit.entities {
            let Ok(key) = EntityKey::new(entity.type_name.clone(), entity.id.clone()) else { continue };
            for bytes in &entity.changes {
                match Change::parse(bytes) {
                    Ok(change) => {
                        self.ledger.sent.insert(change.hash(), (key.clone(), change));
                    }
                    Err(error) => {
                        self.ledger.wrong.push(format!("a device sends what is no change: {error}"))
                    }
                }
            }
        }
    }

    fn flush(&mut self, device: usize) {
        let this = &mut self.devices[device];
        this.flush_due = false;
        let Some(replica) = &this.replica else { return };
        let last = replica.last_commit();
        let durable = this.disk.durable().unwrap_or_default();
        let part = !self.healing && self.dice.once_in(6);
        let upto = if part { CommitNo(self.dice.between(durable.0, last.0.max(durable.0))) } else { last };
        self.flush_up_to(device, upto);
    }

    pub(crate) fn flush_up_to(&mut self, device: usize, upto: CommitNo) {
        let this = &mut self.devices[device];
        let Some(replica) = &mut this.replica else { return };
        let upto = upto.min(replica.last_commit());
        if let Err(error) = this.disk.flush(upto) {
            return self.wrong(format!("device {device}'s disk does not flush: {error}"));
        }
        let durable = this.disk.durable().unwrap_or_default();
        this.told = durable;
        match replica.durable(durable) {
            Ok(()) => self.settle(device, None),
            Err(error) => self.fail(device, &error),
        }
    }

    /// Flushes until nothing is left to flush: marking changes as sent commits again.
    pub(crate) fn flush_all(&mut self, device: usize) {
        while let Some(replica) = &self.devices[device].replica {
            let last = replica.last_commit();
            self.flush_up_to(device, last);
            if self.devices[device].replica.as_ref().is_none_or(|replica| replica.last_commit() == last) {
                break;
            }
        }
    }

    // ── Links ─────────────────────────────────────────────────────────────────────────────

    fn dial(&mut self, device: usize) {
        let this = &self.devices[device];
        if this.link.is_some() || this.away || this.replica.is_none() {
            return;
        }
        let blocked = this.blocked_ms[0].max(this.blocked_ms[1]);
        if blocked > self.time_ms || self.relay.is_none() {
            // Connecting takes an exchange, so it fails while either way is closed.
            return self.after(500, 4_000, Event::Dial(device));
        }
        let now = self.now(device);
        let this = &mut self.devices[device];
        this.dials += 1;
        let number = this.dials;
        let dice = Dice::of(self.seed ^ number, 1_000 + device as u64);
        let (session, hello) = ClientSession::start(now, "sim");
        let key = this.config.device;
        let conn = self.connect(Peer::Device(device), Some(session), number, dice, key);
        self.devices[device].link = Some(conn);
        self.send(conn, true, hello);
        let token = self.token(device);
        let Some(replica) = &mut self.devices[device].replica else { return };
        replica.connect(CHANNEL, Some(token));
        self.report.count("connects", 1);
        self.settle(device, None);
    }

    pub(crate) fn connect(
        &mut self,
        peer: Peer,
        session: Option<ClientSession>,
        number: u64,
        dice: Dice,
        device: DeviceId,
    ) -> ConnId {
        self.conns += 1;
        let conn = ConnId(self.conns);
        self.tell(format_args!("connection {} of {peer:?} stands", conn.0));
        self.links.insert(conn, Link::new(peer, session, number, dice));
        self.tell_relay(Input::Connected { conn, device });
        conn
    }

    fn token(&mut self, device: usize) -> String {
        let this = &mut self.devices[device];
        let now_ms = START_MS + self.time_ms;
        let expires = match this.stale_tokens.checked_sub(1) {
            Some(left) => {
                this.stale_tokens = left;
                now_ms.saturating_sub(1_000)
            }
            None => now_ms + self.grant_ms / 2,
        };
        // Some users have several devices.
        crate::hostile::token(this.role, &format!("user {}", device / DEVICES_PER_USER), expires)
    }

    pub(crate) fn bring_token(&mut self, device: usize) {
        if self.devices[device].link.is_none() {
            return;
        }
        let token = self.token(device);
        if let Some(replica) = &mut self.devices[device].replica {
            self.report.count("tokens refreshed", 1);
            replica.refresh(token);
            self.settle(device, None);
        }
    }

    pub(crate) fn send(&mut self, conn: ConnId, up: bool, bytes: Vec<u8>) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        if link.broken {
            self.report.fault("lost message");
            return;
        }
        let slow = match link.peer {
            Peer::Device(device) if !up => self.devices[device].slow_until_ms > self.time_ms,
            _ => false,
        };
        let delay = link.dice.between(5, if slow { 4_000 } else { 120 });
        let damages = std::mem::take(&mut link.damages);
        let breaks = up && std::mem::take(&mut link.lingers);
        if breaks {
            link.late_ms = self.time_ms + link.dice.between(2_000, 9_000);
        }
        let stream = link.stream(up);
        let taken = stream.push(bytes);
        let arm = !std::mem::replace(&mut stream.armed, true);
        if !up {
            let (owed, bytes) = (stream.owed, stream.bytes());
            self.report.peak("messages waiting for one device", owed as u64);
            self.report.peak("bytes waiting for one device", bytes as u64);
        }
        if arm {
            self.at(self.time_ms + delay, Event::Arrive { conn, up });
        }
        if damages {
            let mut dice = Dice(self.dice.word());
            self.damage_one(conn, up, &mut dice);
        }
        if breaks {
            self.linger(conn);
        }
        if taken && !up {
            self.tell_relay(Input::Sent { conn });
        }
    }

    /// A way ends, and what is under way on it arrives when the next one may already stand.
    fn linger(&mut self, conn: ConnId) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        link.broken = true;
        let at_ms = link.late_ms + IDLE_MS;
        self.report.fault("cut");
        self.tell(format_args!("connection {} breaks, and what is under way is late", conn.0));
        self.at(self.time_ms + 1, Event::Notice { conn, relay: false });
        self.at(at_ms, Event::Notice { conn, relay: true });
    }

    fn arrive(&mut self, conn: ConnId, up: bool) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        if link.deaf && !up {
            return;
        }
        let peer = link.peer;
        if up && link.late_ms > self.time_ms {
            let at_ms = link.late_ms;
            return self.at(at_ms, Event::Arrive { conn, up });
        }
        link.stream(up).armed = false;
        if let Peer::Device(device) = peer {
            let until = self.devices[device].blocked_ms[usize::from(!up)];
            if until > self.time_ms {
                link.stream(up).armed = true;
                return self.at(until, Event::Arrive { conn, up });
            }
        }
        if link.ended[usize::from(up)] {
            return;
        }
        let Some(bytes) = link.stream(up).under_way.pop_front() else { return };
        let slow = match peer {
            Peer::Device(device) if !up => self.devices[device].slow_until_ms > self.time_ms,
            _ => false,
        };
        let number = link.number;
        if !link.stream(up).under_way.is_empty() {
            link.stream(up).armed = true;
            let delay = link.dice.between(0, if slow { 4_000 } else { 12 });
            self.at(self.time_ms + delay, Event::Arrive { conn, up });
        }
        let owed = !up
            && self.links.get_mut(&conn).is_some_and(|link| {
                let owed = link.down.owed > 0;
                link.down.owed = link.down.owed.saturating_sub(1);
                owed
            });
        if owed {
            self.tell_relay(Input::Sent { conn });
        }
        self.report.count("messages", 1);
        match (peer, up) {
            (_, true) => {
                if let Peer::Device(device) = peer {
                    self.watch_arrival(device, conn, number, &bytes);
                }
                self.tell_relay(Input::Received { conn, bytes });
            }
            (Peer::Device(device), false) => self.hear(device, conn, &bytes),
            (Peer::Stranger, false) => self.stranger_hears(conn, &bytes),
        }
    }

    /// Counts what comes again, and what comes in another order than it was sent.
    fn watch_arrival(&mut self, device: usize, conn: ConnId, number: u64, bytes: &[u8]) {
        let newest = self.newest_link.entry(device).or_default();
        if number < *newest {
            self.report.fault("reordered message");
        }
        *newest = number.max(*newest);
        let Ok(Some(Message::Changes(changes))) = Message::decode(bytes) else { return };
        let mut again = false;
        let mut unit = Vec::new();
        for entity in &changes.unit.entities {
            let Ok(key) = EntityKey::new(entity.type_name.clone(), entity.id.clone()) else { continue };
            for change in entity.changes.iter().filter_map(|bytes| Change::parse(bytes).ok()) {
                again |= !self.arrived.insert(change.hash());
                unit.push((key.clone(), change));
            }
        }
        self.unanswered.insert((conn, changes.unit_id), unit);
        if again {
            self.report.fault("duplicate unit");
        }
    }

    /// A relay that went back forgot what it had answered, and with it that a device went back too.
    fn watch_answer(&mut self, conn: ConnId, bytes: &[u8]) {
        if self.may_differ || bytes.first() != Some(&ACK_KIND) {
            return;
        }
        let Ok(Some(Message::Ack(ack))) = Message::decode(bytes) else { return };
        // What may still be taken another time leaves no trace.
        let passes = |code| {
            use RefusalCode::{
                ClockAhead, Forbidden, ForgedAuthor, ForgedRole, MissingDependency, Superseded,
            };
            let passing = [ClockAhead, ForgedAuthor, ForgedRole, Forbidden, MissingDependency, Superseded];
            RefusalCode::from_u16(code).is_some_and(|code| passing.contains(&code))
        };
        let open: BTreeSet<_> = ack.refused.iter().filter(|r| passes(r.code)).map(|r| r.hash).collect();
        for (key, change) in self.unanswered.remove(&(conn, ack.unit_id)).unwrap_or_default() {
            if !open.contains(&change.hash().0) {
                self.ledger.answered(&key, &change);
            }
        }
    }

    /// A message reaches a device.
    fn hear(&mut self, device: usize, conn: ConnId, bytes: &[u8]) {
        if self.devices[device].link != Some(conn) {
            return;
        }
        let now = self.now(device);
        let Some(session) = self.links.get_mut(&conn).and_then(|link| link.session.as_mut()) else { return };
        let heard = session.receive(now, bytes);
        self.tell(format_args!("device {device} hears {}", Named(&heard)));
        let Some(replica) = &mut self.devices[device].replica else { return };
        match heard {
            Ok(Heard::Ready { relay_ahead_ms, measured }) => {
                replica.relay_clock_is(measured, relay_ahead_ms);
            }
            Ok(Heard::Channel(_, message)) => {
                let was_refused = matches!(replica.channel_state(), ChannelState::Faulted { .. });
                let live = *replica.channel_state() == ChannelState::Live;
                let behind = matches!(&message, Message::Granted(granted) if granted.behind);
                if let Message::Feed(feed) = &message
                    && feed.entries.windows(2).any(|pair| pair[0].seq + 1 != pair[1].seq)
                {
                    self.ledger.wrong.push(format!("device {device} gets a page of the feed with a gap"));
                }
                if let Message::Feed(feed) = &message
                    && self.auditor == Some(device)
                {
                    self.audited.extend(feed.entries.iter().cloned());
                }
                let caught_up = match &message {
                    Message::CaughtUp(caught_up) => caught_up.cursor,
                    _ => 0,
                };
                let had = match replica.channel_state() {
                    ChannelState::CatchingUp { cursor, .. } => *cursor,
                    _ => caught_up,
                };
                let result = replica.receive(now, message);
                let repairs =
                    *replica.channel_state() == ChannelState::CatchingUp { cursor: 0, end: caught_up };
                if repairs && caught_up > 0 && had == caught_up && !self.may_differ {
                    self.ledger.wrong.push(format!("device {device} finds another digest than its own"));
                }
                let state = replica.channel_state().clone();
                if behind {
                    self.report.count("stores told that they went back", 1);
                }
                if let Err(error) = result {
                    return self.fail(device, &error);
                }
                match state {
                    ChannelState::Faulted { code, .. } if code.is_auth() && !was_refused => {
                        self.report.fault("token expired");
                        self.after(50, 1_500, Event::Token(device));
                    }
                    ChannelState::Live if !live => self.report.count("syncs", 1),
                    _ => {}
                }
                if state == ChannelState::Live && std::mem::take(&mut self.devices[device].brings_schema) {
                    self.push_schema(device);
                }
            }
            Ok(Heard::Fault { .. }) | Err(_) => return self.device_hangs_up(conn),
            Ok(Heard::Skipped) => {}
        }
        self.settle(device, None);
    }

    /// Nothing new gets through, and of what is under way only the beginning.
    pub(crate) fn break_link(&mut self, conn: ConnId, dice: &mut Dice) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        if std::mem::replace(&mut link.broken, true) {
            return;
        }
        let lost = link.up.cut(dice) + link.down.cut(dice);
        for _ in 0..lost {
            self.report.fault("lost message");
        }
        self.tell(format_args!("connection {} breaks, {lost} messages are lost", conn.0));
        // The ends notice at different times, so that a device may be back before the relay
        // knows that it was gone.
        let (device, relay) = (dice.between(1, 800), dice.between(1, 4_000));
        self.at(self.time_ms + device, Event::Notice { conn, relay: false });
        self.at(self.time_ms + relay, Event::Notice { conn, relay: true });
    }

    pub(crate) fn device_hangs_up(&mut self, conn: ConnId) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        let Peer::Device(device) = link.peer else {
            link.ended[0] = true;
            return self.forget_link(conn);
        };
        if std::mem::replace(&mut link.ended[0], true) {
            return self.forget_link(conn);
        }
        let mut dice = Dice(link.dice.word());
        self.break_link(conn, &mut dice);
        let this = &mut self.devices[device];
        if this.link == Some(conn) {
            this.link = None;
            if let Some(replica) = &mut this.replica {
                replica.disconnect();
            }
            self.tell(format_args!("device {device} has no link"));
            self.settle(device, None);
            self.after(50, 3_000, Event::Dial(device));
        }
        self.forget_link(conn);
    }

    pub(crate) fn relay_hangs_up(&mut self, conn: ConnId) {
        let Some(link) = self.links.get_mut(&conn) else { return };
        if !std::mem::replace(&mut link.ended[1], true) {
            self.tell_relay(Input::Disconnected { conn });
        }
        self.forget_link(conn);
    }

    fn forget_link(&mut self, conn: ConnId) {
        if self.links.get(&conn).is_some_and(|link| link.ended == [true; 2]) {
            self.links.remove(&conn);
        }
    }

    /// Closes the ways of a device for a time. A link on which nothing arrives dies.
    pub(crate) fn block(&mut self, device: usize, up: bool, down: bool, ms: u64, dice: &mut Dice) {
        let until = self.time_ms + ms;
        let this = &mut self.devices[device];
        for (way, closed) in [up, down].into_iter().enumerate() {
            if closed {
                this.blocked_ms[way] = this.blocked_ms[way].max(until);
            }
        }
        if let Some(conn) = this.link.filter(|_| ms > IDLE_MS) {
            // Whoever hears nothing notices first.
            let (device, relay) = (if down { 0 } else { 3_000 }, if up { 0 } else { 3_000 });
            let jitter = dice.between(0, 500);
            self.at(self.time_ms + IDLE_MS + device + jitter, Event::Notice { conn, relay: false });
            self.at(self.time_ms + IDLE_MS + relay, Event::Notice { conn, relay: true });
        }
    }

    // ── The relay ─────────────────────────────────────────────────────────────────────────

    pub(crate) fn relay_now(&self) -> Now {
        Now { mono: MonoMs(1_000 + self.time_ms), wall: WallMs(START_MS + self.time_ms) }
    }

    pub(crate) fn start_relay(&mut self) {
        if self.relay.is_some() {
            return;
        }
        self.relay_disk.set_full(false);
        let mut config = RelayConfig::default();
        config.grant_ms = self.grant_ms;
        config.cached_entities = 16;
        config.unsent_bytes_max = UNSENT_BYTES_TOTAL;
        config.workspace_connections_max += self.devices.len();
        let mut epoch = [0; 16];
        epoch[..8].copy_from_slice(&self.dice.word().to_be_bytes());
        match Relay::open(self.relay_disk.clone(), Box::new(Tokens), config, epoch) {
            Ok(relay) => {
                self.tell(format_args!("the relay starts"));
                self.relay = Some(relay);
                // A new store's first record, before anyone is told of it.
                let _ = self.relay_disk.flush(CommitNo(u64::MAX));
                self.flush_relay();
            }
            Err(error) => self.wrong(format!("the relay can't start: {error}")),
        }
    }

    /// The relay loses power: what was not flushed, and all its links.
    pub(crate) fn relay_off(&mut self, dice: &mut Dice) {
        if self.relay.take().is_none() {
            return;
        }
        let durable = self.relay_disk.durable().unwrap_or_default();
        let queued = self.relay_disk.stats().queued_batches;
        let most = durable.0 + queued;
        let kept = CommitNo(if dice.once_in(3) { most } else { dice.between(durable.0, most) });
        if queued > 0 {
            self.report.fault(if kept.0 < durable.0 + queued { "lost unflushed" } else { "flushed untold" });
        }
        if self.relay_disk.flush(kept).is_err() {
            self.wrong("the relay's disk does not flush".into());
        }
        self.relay_disk = Arc::new(self.relay_disk.after_a_crash());
        self.relay_flush_due = false;
        self.tick_due = None;
        self.tell(format_args!("the relay is off, with {} of {queued} commits kept", kept.0 - durable.0));
        let conns: Vec<ConnId> = self.links.keys().copied().collect();
        for conn in conns {
            self.break_link(conn, dice);
            if let Some(link) = self.links.get_mut(&conn) {
                link.ended[1] = true;
                if link.peer == Peer::Stranger {
                    link.ended[0] = true;
                }
                self.forget_link(conn);
            }
        }
    }

    fn flush_relay(&mut self) {
        self.relay_flush_due = false;
        let durable = self.relay_disk.durable().unwrap_or_default();
        let queued = self.relay_disk.stats().queued_batches;
        let part = !self.healing && self.dice.once_in(6);
        let upto = if part { self.dice.between(durable.0, durable.0 + queued) } else { durable.0 + queued };
        if let Err(error) = self.relay_disk.flush(CommitNo(upto)) {
            return self.wrong(format!("the relay's disk does not flush: {error}"));
        }
        let durable = self.relay_disk.durable().unwrap_or_default();
        self.tell_relay(Input::Durable(durable));
    }

    /// Gives the relay an input, and does what it wants done.
    pub(crate) fn tell_relay(&mut self, input: Input) {
        let now = self.relay_now();
        let Some(relay) = &mut self.relay else { return };
        let conn = match &input {
            Input::Received { conn, .. } | Input::Sent { conn } => Some(*conn),
            _ => None,
        };
        let handled = relay.handle(now, input);
        if let Some(conn) = conn {
            self.watch_memory(conn);
        }
        let Some(relay) = &mut self.relay else { return };
        let mut told = Vec::new();
        while let Some(output) = relay.poll_output() {
            told.push(output);
        }
        if let Err(error) = handled {
            self.tell(format_args!("the relay fails: {error}"));
            if matches!(error, StoreError::NoSpace { .. }) {
                self.report.count("relays stopped by a full disk", 1);
            } else {
                self.wrong(format!("the relay: {error}"));
            }
            let mut dice = Dice(self.dice.word());
            self.relay_off(&mut dice);
            return self.after(200, 2_000, Event::StartRelay);
        }
        for noted in self.relay_disk.take_noted() {
            if let Noted::Half { found, members, .. } = noted {
                self.wrong(format!("the relay keeps {found} of a transaction's {members} entities"));
            }
        }
        for output in told {
            match output {
                Told::Send { conn, bytes } => {
                    self.watch_answer(conn, &bytes);
                    self.send(conn, false, bytes);
                }
                Told::RaiseLimit { .. } => {}
                Told::Close { conn, code, reason } => {
                    self.tell(format_args!("the relay closes {}: {code:?} {reason}", conn.0));
                    let honest = |link: &Link| link.peer != Peer::Stranger && !link.broken;
                    if self.links.get(&conn).is_some_and(honest) {
                        self.report.count("links closed by the relay", 1);
                    } else {
                        self.report.count("strangers shown the door", 1);
                    }
                    if let Some(link) = self.links.get_mut(&conn) {
                        link.broken = true;
                        self.after(1, 50, Event::Notice { conn, relay: true });
                        self.after(200, 900, Event::Notice { conn, relay: false });
                    }
                }
            }
        }
        let queued = self.relay_disk.stats().queued_batches;
        if queued > 0 && std::mem::take(&mut self.relay_doomed) {
            self.report.fault("crash-relay");
            let mut dice = Dice(self.dice.word());
            self.relay_off(&mut dice);
            return self.after(10, 8_000, Event::StartRelay);
        }
        if queued > 0 && !self.relay_flush_due {
            self.relay_flush_due = true;
            self.after(1, 40, Event::FlushRelay);
        }
        let wakeup = self.relay.as_ref().and_then(Relay::next_wakeup).map(|at| at.0.saturating_sub(1_000));
        if let Some(at_ms) = wakeup
            && self.tick_due.is_none_or(|due| at_ms < due)
        {
            self.tick_due = Some(at_ms);
            self.at(at_ms, Event::Tick);
        }
    }

    /// What one connection, and all of them, make the relay hold is bounded.
    fn watch_memory(&mut self, conn: ConnId) {
        let Some(relay) = &self.relay else { return };
        let one = relay.memory(conn).1;
        self.memory_looks += 1;
        let all = match self.memory_looks % MEMORY_LOOKS_EVERY {
            0 => self.links.keys().map(|conn| relay.memory(*conn).1).sum(),
            _ => one,
        };
        self.report.peak("bytes that the relay holds for a connection", one as u64);
        self.report.peak("bytes that the relay holds for all", all as u64);
        if one > UNSENT_BYTES_MAX || all > UNSENT_BYTES_TOTAL + UNSENT_BYTES_MAX {
            self.wrong(format!("the relay holds {one} bytes for connection {} and {all} for all", conn.0));
        }
    }

    pub(crate) fn strangers_links(&self) -> Vec<ConnId> {
        self.links.iter().filter(|(_, link)| link.peer == Peer::Stranger).map(|(conn, _)| *conn).collect()
    }

    /// The workspace that all is about.
    pub(crate) fn workspace() -> WorkspaceId {
        WorkspaceId::new("home").expect("a name")
    }
}

/// A message by its name, for a trace.
struct Named<'a, E>(&'a Result<Heard, E>);

impl<E: std::fmt::Display> std::fmt::Display for Named<'_, E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Ok(Heard::Ready { relay_ahead_ms, .. }) => write!(f, "welcome, {relay_ahead_ms} ms ahead"),
            Ok(Heard::Channel(_, message)) => match message {
                Message::Granted(granted) => write!(
                    f,
                    "granted as {}, behind {}, incarnation {}",
                    granted.grant.role, granted.behind, granted.incarnation
                ),
                Message::Ack(ack) => {
                    write!(f, "ack of unit {} at {}, refused", ack.unit_id, ack.seq)?;
                    ack.refused
                        .iter()
                        .try_for_each(|r| write!(f, " {}/{} {}: {}", r.type_name, r.id, r.code, r.message))
                }
                Message::Feed(feed) => {
                    write!(f, "feed")?;
                    for entry in &feed.entries {
                        match &entry.body {
                            FeedBody::Changes { unit, .. } => {
                                write!(f, " {}:changes", entry.seq)?;
                                for part in &unit.entities {
                                    write!(f, "({}/{} {})", part.type_name, part.id, part.changes.len())?;
                                }
                            }
                            FeedBody::Own(own) => write!(f, " {}:own({})", entry.seq, own.len())?,
                            FeedBody::Refused(r) => {
                                write!(f, " {}:refused({}/{} {})", entry.seq, r.type_name, r.id, r.code)?
                            }
                            FeedBody::Device { .. } => write!(f, " {}:device", entry.seq)?,
                            FeedBody::Schema { .. } => write!(f, " {}:schema", entry.seq)?,
                        }
                    }
                    Ok(())
                }
                Message::CaughtUp(done) => write!(f, "caught up at {}", done.cursor),
                Message::SchemaIs(answer) => write!(f, "schema, problems {:?}", answer.problems),
                Message::Fault(fault) => write!(f, "fault {}: {}", fault.code, fault.message),
                _ => write!(f, "something"),
            },
            Ok(Heard::Fault { code, message }) => write!(f, "fault {code:?}: {message}"),
            Ok(Heard::Skipped) => write!(f, "something to skip"),
            Err(error) => write!(f, "noise: {error}"),
        }
    }
}
