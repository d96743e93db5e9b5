//! The hub: one thread that owns the replicas and turns the world into their inputs.
//!
//! Everything that changes state goes through it, in order: edits of the app, messages of the
//! relay, the store's word that something is durable. Reads don't: they are served from
//! durable rows on the caller's thread. The hub never waits for the disk or the network.

mod scrub;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant, SystemTime};

use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::id::{EntityKey, WorkspaceId};
use anabranch_core::replica::{ChannelState, Edit, Held, Output, Replica, ReplicaConfig, Verified};
use anabranch_core::rows::RefusedRecord;
use anabranch_core::session::{ClientSession, Event};
use anabranch_core::store::{CommitNo, Store, StoreError};
use anabranch_core::wire::{Channel, SchemaIs};
use tokio::sync::{broadcast, oneshot, watch};

use crate::error::{Category, Error};
use crate::link::Wanted;
use crate::queue::{Outgoing, Room};
use crate::status::{SyncOutcome, SyncReport, SyncState, WorkspaceStatus};

/// Name and version that relays see.
const SOFTWARE: &str = concat!("anabranch/", env!("CARGO_PKG_VERSION"));
/// Longest queue of change events of one workspace; a watcher that falls further behind is
/// told to read again.
pub(crate) const EVENTS_MAX: usize = 4096;
/// Frames of one workspace that may wait for the link: all units that may be on their way, and what
/// is said beside them. A link that leaves more is let go.
const FRAMES_PER_WORKSPACE_MAX: usize = 64;
/// How long the hub sleeps at most.
const SLEEP_MAX: Duration = Duration::from_secs(3600);

/// Reads both clocks, the wall clock shifted for tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    start: Instant,
    offset_ms: i64,
}

impl Clock {
    pub(crate) fn new(offset_ms: i64) -> Self {
        Self { start: Instant::now(), offset_ms }
    }

    pub(crate) fn now(&self) -> Now {
        let wall = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        Now {
            mono: MonoMs(self.start.elapsed().as_millis() as u64),
            wall: WallMs((wall.as_millis() as u64).saturating_add_signed(self.offset_ms)),
        }
    }
}

pub(crate) type Reply<T> = oneshot::Sender<Result<T, Error>>;

/// What the hub is asked or told.
pub(crate) enum Command {
    Open {
        workspace: WorkspaceId,
        reply: Reply<Feeds>,
    },
    Write {
        workspace: WorkspaceId,
        edits: Vec<Edit>,
        checked: bool,
        reply: Reply<Vec<String>>,
    },
    WriteEach {
        workspace: WorkspaceId,
        edits: Vec<Edit>,
        reply: Reply<Vec<Result<String, Error>>>,
    },
    Dismiss {
        workspace: WorkspaceId,
        number: u64,
        reply: Reply<bool>,
    },
    RetryRefused {
        workspace: WorkspaceId,
        record: RefusedRecord,
        reply: Reply<()>,
    },
    Sync {
        workspace: WorkspaceId,
        id: u64,
        reply: Reply<SyncReport>,
    },
    SyncTimeout {
        id: u64,
    },
    Schema {
        workspace: WorkspaceId,
        push: bool,
        reply: Reply<SchemaIs>,
    },
    Verify {
        workspace: WorkspaceId,
        from_start: bool,
        mend: bool,
        reply: Reply<Verified>,
    },
    Token {
        token: String,
    },
    /// One of a caller, which waited for room.
    Asked {
        command: Box<Command>,
        room: Room,
    },
    LinkConnecting,
    LinkUp {
        outgoing: Outgoing,
        token: Option<String>,
    },
    Frame {
        bytes: Vec<u8>,
        _permit: tokio::sync::OwnedSemaphorePermit,
    },
    LinkDown {
        error: Option<Error>,
    },
    Durable,
    Shutdown {
        reply: oneshot::Sender<()>,
    },
}

/// Where a workspace's news come from.
#[derive(Clone)]
pub(crate) struct Feeds {
    pub(crate) status: watch::Receiver<WorkspaceStatus>,
    pub(crate) events: broadcast::Sender<EntityKey>,
}

/// What every replica of this engine is opened with.
pub(crate) struct HubConfig {
    pub(crate) template: ReplicaConfig,
    pub(crate) clock: Clock,
    /// Time between two looks at everything that is stored; none for never.
    pub(crate) scrub_every: Option<Duration>,
}

struct Slot {
    replica: Replica,
    channel: Channel,
    status: watch::Sender<WorkspaceStatus>,
    events: broadcast::Sender<EntityKey>,
    schema_waiters: VecDeque<(bool, bool, Reply<SchemaIs>)>,
    /// Faults found in what is stored since the workspace was opened.
    damage: u64,
}

struct Link {
    outgoing: Outgoing,
    session: ClientSession,
    /// Whether the relay has answered.
    ready: bool,
    /// The relay's clock minus this device's, once it has, and when that was measured.
    relay_ahead_ms: i64,
    measured: Now,
    token: Option<String>,
}

struct SyncWaiter {
    workspace: WorkspaceId,
    id: u64,
    sent: u64,
    received: u64,
    reply: Reply<SyncReport>,
}

pub(crate) struct Hub {
    config: HubConfig,
    store: Arc<dyn Store>,
    slots: BTreeMap<WorkspaceId, Slot>,
    link: Option<Link>,
    connecting: bool,
    last_error: Option<Error>,
    durable: CommitNo,
    /// Released in order, each when its commit is durable.
    promised: VecDeque<(CommitNo, Promise)>,
    syncs: Vec<SyncWaiter>,
    wanted: Arc<Wanted>,
    durable_pending: Arc<AtomicBool>,
    /// Replicas may be ahead of the store, since it refused a commit: they are read anew before
    /// they are used again.
    stale: bool,
    /// The store works no more, and so neither does the engine.
    failed: Option<Error>,
    scrubbing: scrub::Schedule,
}

enum Promise {
    Reply(Box<dyn FnOnce(Result<(), Error>) + Send>),
    Changed(WorkspaceId, Vec<EntityKey>),
}

impl Hub {
    pub(crate) fn new(
        config: HubConfig,
        store: Arc<dyn Store>,
        wanted: Arc<Wanted>,
        commands: &Sender<Command>,
    ) -> Self {
        let durable_pending = Arc::new(AtomicBool::new(false));
        let hook_pending = Arc::clone(&durable_pending);
        let hook_commands = commands.clone();
        store.set_durable_hook(Arc::new(move |_| {
            // One message stands for any number of commits.
            if !hook_pending.swap(true, Ordering::AcqRel) {
                // A hub that has ended needs no news.
                let _ = hook_commands.send(Command::Durable);
            }
        }));
        let scrubbing = scrub::Schedule::new(config.scrub_every, config.clock.now().mono);
        Self {
            config,
            store,
            slots: BTreeMap::new(),
            link: None,
            connecting: false,
            last_error: None,
            durable: CommitNo(0),
            promised: VecDeque::new(),
            syncs: Vec::new(),
            wanted,
            durable_pending,
            stale: false,
            failed: None,
            scrubbing,
        }
    }

    /// Runs until it is told to shut down or everyone who could is gone.
    pub(crate) fn run(mut self, commands: Receiver<Command>) {
        loop {
            match commands.recv_timeout(self.sleep()) {
                Ok(Command::Shutdown { reply }) => {
                    self.shut_down();
                    // The caller may have stopped waiting.
                    let _ = reply.send(());
                    return;
                }
                Ok(command) => self.take(command),
                Err(RecvTimeoutError::Timeout) => {
                    self.tick();
                    self.scrub();
                }
                Err(RecvTimeoutError::Disconnected) => return self.shut_down(),
            }
        }
    }

    /// How long nothing is due.
    fn sleep(&self) -> Duration {
        let now = self.config.clock.now().mono.0;
        let replicas = self.slots.values().filter_map(|slot| slot.replica.next_wakeup());
        let next = replicas.chain(self.scrubbing.next_wakeup()).min();
        next.map_or(SLEEP_MAX, |at| Duration::from_millis(at.0.saturating_sub(now)).min(SLEEP_MAX))
    }

    fn tick(&mut self) {
        let now = self.config.clock.now();
        self.slots.values_mut().for_each(|slot| slot.replica.tick(now));
        self.drain();
    }

    fn take(&mut self, command: Command) {
        let (command, _room) = match command {
            Command::Asked { command, room } => (*command, Some(room)),
            command => (command, None),
        };
        if let Err(error) = self.handle(command) {
            self.recover(error);
        }
        // Under load commands never run out, and what is due is due.
        self.tick();
    }

    /// After an error of the store half way through an operation. While the store itself works,
    /// what it refused (for want of space, or because it met a damaged record) ends the link, which
    /// comes back with growing waits; everything local goes on with what is stored. What is damaged is looked for and
    /// mended at once, as it would end each link.
    fn recover(&mut self, error: StoreError) {
        if let Err(broken) = self.store.durable() {
            tracing::debug!(%broken, "the store answers nothing more");
            return self.fail(error.into());
        }
        tracing::error!(%error, "the store refused: the link is cut, and what is stored is read anew");
        if matches!(error, StoreError::Damaged { .. }) {
            self.scrubbing.hurry(self.config.clock.now().mono);
        }
        self.stale = true;
        self.link_down(Some(error.into()));
    }

    /// Reads replicas anew that may be ahead of the store.
    fn reopen(&mut self) -> Result<(), StoreError> {
        if self.stale {
            for slot in self.slots.values_mut() {
                slot.replica.reopen()?;
                slot.replica.durable(self.durable)?;
            }
            self.stale = false;
        }
        Ok(())
    }

    fn shut_down(&mut self) {
        self.link = None;
        if let Err(error) = self.store.shut_down() {
            tracing::warn!(%error, "the store did not shut down cleanly");
        }
        match self.store.durable() {
            Ok(durable) => self.durable = self.durable.max(durable),
            // Closed: everything queued was made durable, or the shutdown above said otherwise.
            Err(StoreError::Closed) if self.failed.is_none() => self.durable = CommitNo(u64::MAX),
            Err(_) => {}
        }
        self.release();
        self.fail(Error::closed());
    }

    fn fail(&mut self, error: Error) {
        if self.failed.is_none() {
            tracing::error!(%error, "the engine stopped");
            self.failed = Some(error.clone());
        }
        for (_, _, reply) in self.slots.values_mut().flat_map(|slot| slot.schema_waiters.drain(..)) {
            let _ = reply.send(Err(error.clone()));
        }
        for (_, promise) in self.promised.drain(..) {
            if let Promise::Reply(reply) = promise {
                reply(Err(error.clone()));
            }
        }
        for waiter in self.syncs.drain(..) {
            let _ = waiter.reply.send(Err(error.clone()));
        }
        self.wanted.stop();
        self.link_down(Some(error));
    }

    fn handle(&mut self, command: Command) -> Result<(), StoreError> {
        let now = self.config.clock.now();
        let unusable = self.failed.clone().or_else(|| self.reopen().err().map(Error::from));
        let concerns_links_only = matches!(command, Command::LinkDown { .. } | Command::LinkConnecting);
        if let Some(error) = unusable.filter(|_| !concerns_links_only) {
            return self.refuse(command, &error);
        }
        match command {
            Command::Open { workspace, reply } => {
                let opened = self.open(&workspace);
                // Whoever asks next sees the figures, not their defaults.
                self.publish();
                let opened = opened.map(|()| {
                    let slot = &self.slots[&workspace];
                    let feeds = Feeds { status: slot.status.subscribe(), events: slot.events.clone() };
                    (slot.replica.last_commit(), feeds)
                });
                match opened {
                    // Rows may have been written anew for a newer schema.
                    Ok((commit, feeds)) => self.promise(commit, |durable| {
                        let _ = reply.send(durable.map(|()| feeds));
                    }),
                    Err(error) => {
                        let _ = reply.send(Err(error.into()));
                    }
                }
            }
            Command::Write { workspace, edits, checked, reply } => {
                let Some(slot) = self.slots.get_mut(&workspace) else { return Ok(()) };
                match slot.replica.write(now, &edits, checked) {
                    Ok(written) => self.promise(written.commit, |durable| {
                        let _ = reply.send(durable.map(|()| written.versions));
                    }),
                    Err(error) => {
                        let _ = reply.send(Err(error.into()));
                    }
                }
            }
            Command::WriteEach { workspace, edits, reply } => {
                let Some(slot) = self.slots.get_mut(&workspace) else { return Ok(()) };
                let mut results = Vec::with_capacity(edits.len());
                let mut last = CommitNo(0);
                for edit in edits {
                    match slot.replica.write(now, std::slice::from_ref(&edit), true) {
                        Ok(mut written) => {
                            last = last.max(written.commit);
                            results.push(Ok(written.versions.pop().unwrap_or_default()));
                        }
                        Err(error) => results.push(Err(Error::from(error))),
                    }
                }
                self.promise(last, |durable| {
                    let _ = reply.send(durable.map(|()| results));
                });
            }
            Command::Dismiss { workspace, number, reply } => {
                let Some(slot) = self.slots.get_mut(&workspace) else { return Ok(()) };
                match slot.replica.dismiss(number) {
                    Ok(found) => {
                        let commit = slot.replica.last_commit();
                        self.promise(commit, move |durable| {
                            let _ = reply.send(durable.map(|()| found));
                        });
                    }
                    Err(error) => {
                        let _ = reply.send(Err(error.clone().into()));
                        return Err(error);
                    }
                }
            }
            Command::RetryRefused { workspace, record, reply } => {
                let Some(slot) = self.slots.get_mut(&workspace) else { return Ok(()) };
                match slot.replica.retry_refused(now, &record) {
                    Ok(written) => self.promise(written.commit, |durable| {
                        let _ = reply.send(durable);
                    }),
                    Err(error) => {
                        let _ = reply.send(Err(error.into()));
                    }
                }
            }
            Command::Sync { workspace, id, reply } => {
                let faulted =
                    |slot: &Slot| matches!(slot.replica.channel_state(), ChannelState::Faulted { .. });
                if self.link.as_ref().is_some_and(|link| link.ready)
                    && self.slots.get(&workspace).is_some_and(faulted)
                {
                    // What the relay refused earlier it may take now, with another token for
                    // one: a new link asks for one.
                    self.link_down(None);
                }
                if let Some(slot) = self.slots.get_mut(&workspace) {
                    slot.replica.confirm();
                    let status = slot.replica.status();
                    let (sent, received) = (status.sent, status.received);
                    self.syncs.push(SyncWaiter { workspace, id, sent, received, reply });
                }
            }
            Command::SyncTimeout { id } => self.end_sync(id),
            Command::Schema { workspace, push, reply } => {
                if let Some(slot) = self.slots.get_mut(&workspace) {
                    slot.schema_waiters.push_back((push, false, reply));
                }
            }
            Command::Verify { workspace, from_start, mend, reply } => {
                let _ = reply.send(self.verify_now(&workspace, from_start, mend));
            }
            Command::Token { token } => {
                if let Some(link) = &mut self.link {
                    link.token = Some(token.clone());
                }
                for slot in self.slots.values_mut() {
                    slot.replica.refresh(token.clone());
                }
            }
            Command::LinkConnecting => self.connecting = true,
            Command::LinkUp { outgoing, token } => {
                let (session, hello) = ClientSession::start(now, SOFTWARE);
                // Nothing waits in a new link.
                let _ = outgoing.push(hello, 1);
                for slot in self.slots.values_mut() {
                    slot.replica.connect(slot.channel, token.clone());
                }
                self.link =
                    Some(Link { outgoing, session, ready: false, relay_ahead_ms: 0, measured: now, token });
                self.connecting = false;
            }
            Command::Frame { bytes, .. } => self.receive(now, &bytes)?,
            Command::LinkDown { error } => self.link_down(error),
            Command::Durable => {
                self.became_durable()?;
                for slot in self.slots.values_mut() {
                    slot.replica.durable(self.durable)?;
                }
            }
            Command::Asked { .. } | Command::Shutdown { .. } => {}
        }
        Ok(())
    }

    fn became_durable(&mut self) -> Result<(), StoreError> {
        self.durable_pending.store(false, Ordering::Release);
        self.durable = self.durable.max(self.store.durable()?);
        self.release();
        Ok(())
    }

    /// Answers a command with why nothing can be done about it.
    fn refuse(&mut self, command: Command, error: &Error) -> Result<(), StoreError> {
        let error = error.clone();
        // Whoever asked may have stopped waiting.
        match command {
            Command::Open { reply, .. } => drop(reply.send(Err(error))),
            Command::Write { reply, .. } => drop(reply.send(Err(error))),
            Command::WriteEach { reply, .. } => drop(reply.send(Err(error))),
            Command::Dismiss { reply, .. } => drop(reply.send(Err(error))),
            Command::RetryRefused { reply, .. } => drop(reply.send(Err(error))),
            Command::Sync { reply, .. } => drop(reply.send(Err(error))),
            Command::Schema { reply, .. } => drop(reply.send(Err(error))),
            Command::Verify { reply, .. } => drop(reply.send(Err(error))),
            Command::Durable if self.failed.is_none() => return self.became_durable(),
            _ => {}
        }
        Ok(())
    }

    fn open(&mut self, workspace: &WorkspaceId) -> Result<(), StoreError> {
        if self.slots.contains_key(workspace) {
            return Ok(());
        }
        let config = ReplicaConfig { workspace: workspace.clone(), ..self.config.template.clone() };
        let replica = Replica::open(Arc::clone(&self.store), config)?;
        let channel = self.slots.len() as Channel + 1;
        let (status, _) = watch::channel(WorkspaceStatus::default());
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let mut slot = Slot { replica, channel, status, events, schema_waiters: VecDeque::new(), damage: 0 };
        slot.replica.durable(self.durable)?;
        if let Some(link) = &self.link {
            if link.ready {
                slot.replica.relay_clock_is(link.measured, link.relay_ahead_ms);
            }
            slot.replica.connect(channel, link.token.clone());
        }
        self.slots.insert(workspace.clone(), slot);
        Ok(())
    }

    fn receive(&mut self, now: Now, bytes: &[u8]) -> Result<(), StoreError> {
        let Some(link) = &mut self.link else { return Ok(()) };
        match link.session.receive(now, bytes) {
            Ok(Event::Ready { relay_ahead_ms, measured }) => {
                // That the network is back says nothing of the store.
                self.last_error.take_if(|error| error.store_error().is_none());
                link.ready = true;
                link.relay_ahead_ms = relay_ahead_ms;
                link.measured = measured;
                for slot in self.slots.values_mut() {
                    slot.replica.relay_clock_is(measured, relay_ahead_ms);
                }
            }
            Ok(Event::Channel(channel, message)) => {
                if let Some(slot) = self.slots.values_mut().find(|slot| slot.channel == channel) {
                    let was_refused = matches!(slot.replica.channel_state(), ChannelState::Faulted { .. });
                    slot.replica.receive(now, message)?;
                    self.last_error = None;
                    match slot.replica.channel_state() {
                        ChannelState::Faulted { code, .. } if code.is_auth() && !was_refused => {
                            self.wanted.ask_for_token();
                        }
                        ChannelState::Faulted { .. } => {}
                        _ => self.wanted.signed_in(),
                    }
                }
            }
            Ok(Event::Fault { code, message }) => self.link_down(Some(Error::fault(code, message))),
            Ok(Event::Skipped) => {}
            Err(error) => self.link_down(Some(error.into())),
        }
        Ok(())
    }

    fn link_down(&mut self, error: Option<Error>) {
        self.connecting = false;
        if self.link.take().is_some() {
            for slot in self.slots.values_mut() {
                slot.replica.disconnect();
                // What was asked on this link is not answered on the next.
                slot.schema_waiters.retain(|(_, _, reply)| !reply.is_closed());
                slot.schema_waiters.iter_mut().for_each(|(_, asked, _)| *asked = false);
            }
        }
        if let Some(error) = error {
            // Not the network but what is at its end: waiting does not help, so nobody waits.
            let final_ = error.category() != Category::Network;
            self.last_error = Some(error);
            if final_ {
                for id in self.syncs.iter().map(|waiter| waiter.id).collect::<Vec<_>>() {
                    self.end_sync(id);
                }
            }
        }
    }

    fn promise(&mut self, after: CommitNo, reply: impl FnOnce(Result<(), Error>) + Send + 'static) {
        if after <= self.durable {
            reply(Ok(()));
        } else {
            self.promised.push_back((after, Promise::Reply(Box::new(reply))));
        }
    }

    fn release(&mut self) {
        let due = self.promised.iter().take_while(|(after, _)| *after <= self.durable).count();
        for (_, promise) in self.promised.drain(..due) {
            match promise {
                Promise::Reply(reply) => reply(Ok(())),
                Promise::Changed(workspace, entities) => {
                    if let Some(slot) = self.slots.get(&workspace) {
                        for entity in entities {
                            // Without watchers nobody needs to know.
                            let _ = slot.events.send(entity);
                        }
                    }
                }
            }
        }
    }

    /// Carries out what the replicas ask for, and tells those who wait.
    fn drain(&mut self) {
        let mut changed: Vec<(CommitNo, WorkspaceId, Vec<EntityKey>)> = Vec::new();
        let mut reconnect = false;
        let frames_max = 1 + self.slots.len() * FRAMES_PER_WORKSPACE_MAX;
        let mut stalled = false;
        let mut send = |link: &Option<Link>, bytes| {
            stalled |= link.as_ref().is_some_and(|link| !link.outgoing.push(bytes, frames_max));
        };
        for (workspace, slot) in &mut self.slots {
            while let Some(output) = slot.replica.poll_output() {
                match output {
                    Output::Send(bytes) => send(&self.link, bytes),
                    Output::Changed { after, entities } => changed.push((after, workspace.clone(), entities)),
                    Output::Status => {}
                    Output::Reconnect => reconnect = true,
                }
            }
            let open =
                matches!(slot.replica.channel_state(), ChannelState::CatchingUp { .. } | ChannelState::Live);
            if open {
                for (push, asked, _) in slot.schema_waiters.iter_mut().filter(|(_, asked, _)| !asked) {
                    *asked = true;
                    slot.replica.exchange_schema(*push);
                }
                while let Some(output) = slot.replica.poll_output() {
                    if let Output::Send(bytes) = output {
                        send(&self.link, bytes);
                    }
                }
            }
            // An answer is for someone who still waits for one.
            slot.schema_waiters.retain(|(_, _, reply)| !reply.is_closed());
            while let Some(answer) = slot.replica.take_schema_answer() {
                let waiting = slot.schema_waiters.iter().position(|(_, asked, _)| *asked);
                if let Some((_, _, reply)) = waiting.and_then(|place| slot.schema_waiters.remove(place)) {
                    let _ = reply.send(Ok(answer));
                }
            }
        }
        if stalled {
            let error = Error::new(Category::Network, "relay_stalled", "the relay takes nothing more")
                .with_help("nothing is lost; the device connects again by itself");
            self.link_down(Some(error));
        } else if reconnect {
            self.link_down(None);
        }
        for (after, workspace, entities) in changed {
            self.promised.push_back((after, Promise::Changed(workspace, entities)));
        }
        self.release();
        self.publish();
        // Whoever asked may have stopped waiting.
        self.syncs.retain(|waiter| !waiter.reply.is_closed());
        let done: Vec<u64> = self
            .syncs
            .iter()
            .filter(|waiter| {
                self.slots.get(&waiter.workspace).is_some_and(|slot| {
                    slot.replica.is_complete()
                        || matches!(slot.replica.channel_state(), ChannelState::Faulted { .. })
                })
            })
            .map(|waiter| waiter.id)
            .collect();
        // Until a new link is ready, a channel shows why the last one was refused.
        if self.link.as_ref().is_some_and(|link| link.ready) {
            for id in done {
                self.end_sync(id);
            }
        }
    }

    fn publish(&mut self) {
        for slot in self.slots.values_mut() {
            let figures = slot.replica.status();
            let held = held(&slot.replica);
            let (state, fault) = match (slot.replica.channel_state(), self.link.is_some()) {
                (ChannelState::Faulted { code, message }, _) => {
                    let state = if code.is_auth() { SyncState::Auth } else { SyncState::Faulted };
                    (state, Some(Error::fault(*code, message.clone())))
                }
                (_, false) if self.connecting => (SyncState::Connecting, None),
                (_, false) => (SyncState::Offline, None),
                (ChannelState::Offline | ChannelState::SigningIn, true) => (SyncState::SigningIn, None),
                (ChannelState::CatchingUp { cursor, end }, true) => {
                    (SyncState::Syncing { done: *cursor, total: *end }, None)
                }
                (_, true) if held.is_some() => (SyncState::Pending, None),
                (_, true) if slot.replica.is_complete() => (SyncState::UpToDate, None),
                (_, true) => (SyncState::Syncing { done: 0, total: figures.pending }, None),
            };
            let error = fault.or_else(|| self.last_error.clone());
            let status = WorkspaceStatus {
                state,
                held: held.filter(|_| state == SyncState::Pending),
                pending: figures.pending,
                conflicts: figures.conflicts,
                refused: figures.refused,
                digest: figures.digest.to_string(),
                clock_skew_ms: figures.clock_skew_ms,
                damage: slot.damage,
                lacking: figures.lacking,
                last_error: error.as_ref().map(ToString::to_string),
                error_category: error.as_ref().map(Error::category),
                synced_ms: figures.synced.map(|wall| wall.0),
                role: slot.replica.role().name(),
            };
            slot.status.send_if_modified(|current| {
                let differs = *current != status;
                *current = status;
                differs
            });
        }
    }

    /// Answers a sync with how far it came.
    fn end_sync(&mut self, id: u64) {
        let Some(place) = self.syncs.iter().position(|waiter| waiter.id == id) else { return };
        let waiter = self.syncs.swap_remove(place);
        let Some(slot) = self.slots.get(&waiter.workspace) else { return };
        let figures = slot.replica.status();
        let (outcome, error) = match (slot.replica.channel_state(), &self.last_error) {
            _ if self.link.is_some() && slot.replica.is_complete() => match held(&slot.replica) {
                Some(held) => (SyncOutcome::Partial, Some(Error::from(&held))),
                None => (SyncOutcome::Complete, None),
            },
            (ChannelState::Faulted { code, message }, _) => {
                let outcome = if code.is_auth() { SyncOutcome::Auth } else { SyncOutcome::Partial };
                (outcome, Some(Error::fault(*code, message.clone())))
            }
            (_, Some(error)) if error.category() == Category::Auth => {
                (SyncOutcome::Auth, Some(error.clone()))
            }
            // A relay that died without a word leaves the link standing for a while.
            (ChannelState::CatchingUp { .. } | ChannelState::Live, _)
                if figures.sent > waiter.sent || figures.received > waiter.received =>
            {
                (SyncOutcome::Partial, None)
            }
            (_, Some(error)) if error.store_error().is_some() => (SyncOutcome::Partial, Some(error.clone())),
            (_, error) => {
                let unreachable = || {
                    Error::new(Category::Network, "unreachable", "the relay did not answer in time")
                        .with_help(
                            "check the network; what was written here goes out when the relay can be reached",
                        )
                };
                (SyncOutcome::Offline, Some(error.clone().unwrap_or_else(unreachable)))
            }
        };
        let report = SyncReport {
            outcome,
            sent: figures.sent - waiter.sent,
            received: figures.received - waiter.received,
            pending: figures.pending,
            refused: figures.refused,
            lacking: figures.lacking,
            digest: figures.digest.to_string(),
            error,
        };
        let commit = slot.replica.last_commit();
        self.promise(commit, |durable| {
            let _ = waiter.reply.send(durable.map(|()| report));
        });
    }
}

/// Why the replica and the relay are not equal though everything was exchanged.
fn held(replica: &Replica) -> Option<Held> {
    replica.held().unwrap_or_else(|error| {
        // The store tells it to whoever reads or writes next.
        tracing::warn!(%error, "what is held back can't be told");
        None
    })
}

#[cfg(test)]
mod tests;
