//! The relay itself: takes inputs one by one, keeps what they change, queues outputs.
//!
//! What happens to connections and to the store is taken note of at once. What costs, messages and
//! pages of the feed, waits for its turn (`turns`). A request reads the newest committed
//! state, puts all that follows from it into one batch, commits the batch, and queues its
//! answer behind that commit. The feed is served from what is durable only, so it needs no
//! gate of its own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::entities::EntityCache;
use super::layout::{LAYOUT_VERSION, RELAY_KEY, RelayRecord, WorkspaceHash};
use super::quota::{Quotas, Renames};
use super::session::{self, ChannelState, Conn, Phase};
use super::turns::{Origin, Turns, User};
use super::workspace::{self, Draft, Workspace};
use super::{ConnId, Input, Output, RelayConfig, TokenVerifier};
use crate::clock::{MonoMs, Now};
use crate::codec;
use crate::digest::Digest;
use crate::id::{DeviceId, WorkspaceId};
use crate::store::{Batch, CommitNo, Keyspace, Store, StoreError, View};
use crate::wire::{
    Channel, Fault, FaultCode, Hello, MESSAGE_BYTES_MAX, Message, STRANGER_BYTES_MAX, Sender, WireError,
};

/// What a turn counts as at least, in the host's measure, microseconds; and all that it counts as
/// for a host that does not [`charge`](Relay::charge).
const TURN_COST: u64 = 5;
/// Operations of commits that are not durable yet, beyond which no request is looked at: two groups of
/// the disk store. Whoever has the next turn waits for no more than these to reach the disk.
const FLIGHT_OPS_MAX: usize = 512;
/// As many of these may be of one user, so that nobody has the disk to themselves.
const FLIGHT_OPS_OF_USER: usize = FLIGHT_OPS_MAX / 2;
/// Users with fewer of their own than this are looked at even so, up to twice the bound: they wait for
/// the disk once, and not a first time for their turn.
const FLIGHT_OPS_LIGHT: usize = 32;
/// Bytes that count as one operation: a group of the store ends with 256 operations or 1 MiB.
const FLIGHT_OP_BYTES: usize = 4 * 1024;
/// Users who may have to be passed over, as too much of theirs is on its way, until one is found who
/// has a turn. Each has [`FLIGHT_OPS_LIGHT`] on its way, so there are no more of them.
const PASSED_OVER_MAX: usize = 2 * FLIGHT_OPS_MAX / FLIGHT_OPS_LIGHT;

/// A user of a workspace, for programs to tell users apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct UserTag(User);

/// What a turn was spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// The oldest message of a connection that waited: there is room for another.
    Message(ConnId),
    /// A piece of the feed for a connection.
    Feed(ConnId),
}

/// Commits on their way to the disk.
#[derive(Debug, Default)]
struct Flight {
    commits: VecDeque<(CommitNo, usize, Option<User>)>,
    ops: usize,
    of_users: BTreeMap<User, usize>,
}

impl Flight {
    fn begin(&mut self, commit: CommitNo, batch: (usize, usize), user: Option<User>) {
        let (ops, bytes) = batch;
        let ops = ops.max(bytes / FLIGHT_OP_BYTES);
        self.commits.push_back((commit, ops, user));
        self.ops += ops;
        if let Some(user) = user {
            *self.of_users.entry(user).or_default() += ops;
        }
    }

    fn became_durable(&mut self, durable: CommitNo) {
        while let Some((_, ops, user)) =
            self.commits.front().copied().filter(|(commit, ..)| *commit <= durable)
        {
            self.commits.pop_front();
            self.ops -= ops;
            if let Some(user) = user
                && let Some(own) = self.of_users.get_mut(&user)
            {
                *own -= ops;
                if *own == 0 {
                    self.of_users.remove(&user);
                }
            }
        }
    }

    /// Whether there is room for what a user's request may lead to.
    fn has_room(&self, user: User) -> bool {
        let own = self.of_users.get(&user).copied().unwrap_or_default();
        let light = own < FLIGHT_OPS_LIGHT && self.ops < 2 * FLIGHT_OPS_MAX;
        light || (own < FLIGHT_OPS_OF_USER && self.ops < FLIGHT_OPS_MAX)
    }
}

/// Workspaces up to which those that nobody uses stay in memory too.
const WORKSPACES_KEPT: usize = 32;

/// A relay over one store. See the [module](super) for how it is driven.
///
/// - *Begin:* [`open`](Self::open).
/// - *Drive:* [`handle`](Self::handle), or [`accept`](Self::accept), [`turn`](Self::turn) and
///   [`charge`](Self::charge); then [`poll_output`](Self::poll_output) until it is
///   empty; [`next_wakeup`](Self::next_wakeup) says when to tick.
/// - *Look:* [`workspaces`](Self::workspaces), [`digest`](Self::digest),
///   [`connections`](Self::connections), [`memory`](Self::memory), [`epoch`](Self::epoch).
pub struct Relay {
    pub(super) store: Arc<dyn Store>,
    pub(super) verifier: Box<dyn TokenVerifier>,
    pub(super) config: RelayConfig,
    pub(super) epoch: [u8; 16],
    /// The newest commit that the host reported durable.
    durable: CommitNo,
    pub(super) conns: BTreeMap<ConnId, Conn>,
    /// Those with a member or with commits that are not durable.
    pub(super) workspaces: BTreeMap<WorkspaceHash, Workspace>,
    /// Workspaces with commits that are not durable.
    pub(super) unsettled: BTreeSet<WorkspaceHash>,
    pub(super) entities: EntityCache,
    /// When to look at what: the expiry of a channel's grant, or a connection's hello.
    timers: BTreeSet<(MonoMs, ConnId, Option<Channel>)>,
    turns: Turns,
    /// Whose turn was the last, to be charged.
    served: Option<Origin>,
    quotas: Quotas,
    pub(super) renames: Renames,
    /// Connections that have said too much, and until when that counts.
    parked: BTreeSet<(MonoMs, ConnId)>,
    flight: Flight,
    /// Connections of each device, in the order in which they were made.
    by_device: BTreeSet<(DeviceId, ConnId)>,
    unsent_bytes: usize,
    /// Connections with outputs that were queued since the last release.
    touched: BTreeSet<ConnId>,
    /// Connections with outputs that wait for a commit.
    holding: BTreeSet<ConnId>,
    ready: VecDeque<Output>,
    draining: bool,
}

impl Relay {
    /// Opens the relay of a store. `epoch_seed` is 16 fresh random bytes: on a store without
    /// a relay they become the epoch of its feeds, else they are not used. The store must
    /// have nothing queued that is not durable.
    ///
    /// Fails where the store fails, or holds what a newer program wrote.
    pub fn open(
        store: Arc<dyn Store>,
        verifier: Box<dyn TokenVerifier>,
        config: RelayConfig,
        epoch_seed: [u8; 16],
    ) -> Result<Self, StoreError> {
        let epoch = match read_record(&*store)? {
            Some(record) => {
                if record.layout < LAYOUT_VERSION {
                    // What is written from now on an older program would not understand. It is told so
                    // with the first of it: commits reach the disk in order.
                    Self::renew_epoch(&*store, record.epoch)?;
                }
                record.epoch
            }
            None => {
                // Nothing waits for this commit: whatever tells the epoch to a device comes
                // after the commit of that device's grant, which is later.
                Self::renew_epoch(&*store, epoch_seed)?;
                epoch_seed
            }
        };
        Ok(Self {
            durable: store.durable()?,
            store,
            verifier,
            epoch,
            conns: BTreeMap::new(),
            workspaces: BTreeMap::new(),
            unsettled: BTreeSet::new(),
            entities: EntityCache::new(config.cached_entities),
            timers: BTreeSet::new(),
            turns: Turns::default(),
            served: None,
            quotas: Quotas::new(config.device_rate, config.user_rate, config.workspace_rate),
            renames: Renames::default(),
            parked: BTreeSet::new(),
            flight: Flight::default(),
            by_device: BTreeSet::new(),
            unsent_bytes: 0,
            touched: BTreeSet::new(),
            holding: BTreeSet::new(),
            ready: VecDeque::new(),
            draining: false,
            config,
        })
    }

    /// Begins a new life of the feeds of a relay's store, before [`open`](Self::open): its cursors
    /// mean nothing to devices any more, so they read the feeds from the start, and bring again
    /// what they hold and the store lacks. To be done when the store went back to an older copy.
    /// `epoch` is 16 fresh random bytes. It holds once the commit that is returned is durable.
    ///
    /// Fails as [`open`](Self::open) does, and changes nothing then.
    pub fn renew_epoch(store: &dyn Store, epoch: [u8; 16]) -> Result<CommitNo, StoreError> {
        read_record(store)?;
        let record = RelayRecord { layout: LAYOUT_VERSION, epoch };
        let mut batch = Batch::new();
        batch.put(Keyspace::META, RELAY_KEY, codec::encode(&record));
        store.commit(batch)
    }

    /// Takes one input and does all the work that there is to do, whoever's it is. What is to be done
    /// about it waits in [`poll_output`](Self::poll_output).
    ///
    /// # Errors
    /// An error means that the store failed and the relay's memory may be ahead of it: stop,
    /// and open both again. Nothing that a peer sends leads to an error; a damaged record
    /// fails only the request that met it.
    pub fn handle(&mut self, now: Now, input: Input) -> Result<(), StoreError> {
        self.accept(now, input)?;
        while self.step(now, false)?.is_some() {}
        Ok(())
    }

    /// Takes note of one input; what costs waits for its [`turn`](Self::turn).
    ///
    /// # Errors
    /// As [`handle`](Self::handle).
    pub fn accept(&mut self, now: Now, input: Input) -> Result<(), StoreError> {
        self.run_timers(now);
        match input {
            Input::Connected { conn, device } => self.connected(now, conn, device),
            Input::Received { conn, bytes } => {
                if let Some(state) = self.conns.get_mut(&conn) {
                    state.hear(bytes);
                    self.wake(conn);
                }
            }
            Input::Sent { conn } => {
                if let Some(state) = self.conns.get_mut(&conn) {
                    let bytes = state.sent();
                    if state.phase != Phase::Closing {
                        self.unsent_bytes -= bytes;
                    }
                    self.wake(conn);
                }
            }
            Input::Disconnected { conn } => {
                self.leave(conn);
                self.forget(conn);
            }
            Input::Durable(commit) => self.became_durable(commit),
            Input::Tick => {}
            Input::Drain => {
                self.draining = true;
                let all: Vec<ConnId> = self.conns.keys().copied().collect();
                for conn in all {
                    self.shut_out(conn);
                }
            }
        }
        self.release();
        Ok(())
    }

    /// Does one piece of work, a message or a page of the feed, for whoever's turn it is. `None` if
    /// there is nothing to do until the next input: everything is done, or waits for the disk, the
    /// network or, if it said too much, for time to pass.
    ///
    /// # Errors
    /// As [`handle`](Self::handle).
    pub fn turn(&mut self, now: Now) -> Result<Option<Turn>, StoreError> {
        self.step(now, true)
    }

    /// A turn; if the disk is not minded, whatever is on its way there.
    fn step(&mut self, now: Now, minds_disk: bool) -> Result<Option<Turn>, StoreError> {
        self.served = None;
        let mut passed_over = 0;
        while passed_over <= PASSED_OVER_MAX {
            let Some(origin) = self.turns.first().nth(passed_over) else { break };
            let id = origin.conn();
            let turn = match self.next_work(now, id) {
                None => {
                    self.turns.rest(&origin);
                    continue;
                }
                Some(Work::Message) if minds_disk && !self.flight.has_room(origin.user()) => {
                    passed_over += 1;
                    continue;
                }
                Some(work) => self.work(now, id, work)?,
            };
            if let Some(origin) = &self.served {
                self.turns.charge(origin, TURN_COST);
            }
            self.release();
            return Ok(Some(turn));
        }
        Ok(None)
    }

    /// Counts what the last [`turn`](Self::turn) took, in microseconds, against whose it was.
    pub fn charge(&mut self, micros: u64) {
        if let Some(origin) = self.served.take() {
            self.turns.charge(&origin, micros.saturating_sub(TURN_COST));
        }
    }

    /// The next thing to do, in order.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.ready.pop_front()
    }

    /// When to call [`handle`](Self::handle) with [`Input::Tick`] if nothing happens before.
    pub fn next_wakeup(&self) -> Option<MonoMs> {
        let parked = self.parked.first().map(|(at, _)| *at);
        self.timers.first().map(|(at, ..)| *at).into_iter().chain(parked).min()
    }

    /// What a connection holds of the relay's memory, in bytes: what it said that was not dealt with,
    /// and what it was told that its network has not taken. The second is never more than
    /// [`UNSENT_BYTES_MAX`](super::UNSENT_BYTES_MAX); the first is in the host's hands.
    pub fn memory(&self, conn: ConnId) -> (usize, usize) {
        self.conns.get(&conn).map_or((0, 0), Conn::memory)
    }

    /// How many connections there are.
    pub fn connections(&self) -> usize {
        self.conns.len()
    }

    /// The life of this relay's feeds.
    pub fn epoch(&self) -> [u8; 16] {
        self.epoch
    }

    /// All workspaces, in no order that means anything.
    pub fn workspaces(&self) -> Result<Vec<WorkspaceId>, StoreError> {
        workspace::all(&*self.store)
    }

    /// The end of a workspace's feed and the digest there, as committed; `None` for a
    /// workspace that nobody ever signed in to.
    pub fn digest(&self, workspace: &WorkspaceId) -> Result<Option<(u64, Digest)>, StoreError> {
        let record = workspace::read_record(&*self.store, WorkspaceHash::of(workspace))?;
        Ok(record.map(|record| (record.feed_end, Digest(record.digest))))
    }

    fn connected(&mut self, now: Now, id: ConnId, device: DeviceId) {
        if self.conns.contains_key(&id) {
            tracing::error!(conn = id.0, "a connection number was used twice; the second is ignored");
            return;
        }
        let conn = Conn::new(id, device, now.mono);
        self.timers.insert((conn.hello_by, id, None));
        self.conns.insert(id, conn);
        self.by_device.insert((device, id));
        if self.draining {
            self.shut_out(id);
        }
        self.thin_out(device);
    }

    /// Closes the oldest connections of a device that has too many: it has lost them, most likely.
    fn thin_out(&mut self, device: DeviceId) {
        let open: Vec<ConnId> = self.of_device(device).collect();
        let over = open.len().saturating_sub(self.config.device_connections_max.max(1));
        for id in &open[..over] {
            self.close(*id, FaultCode::Quota, "the device has connected again too often");
        }
    }

    /// Has a connection wait for a turn if it has work.
    pub(super) fn wake(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get(&id) else { return };
        let feeds = || conn.has_room(self.config.send_window) && conn.channels.values().any(|c| self.lags(c));
        if conn.has_message() || feeds() {
            self.turns.wait(&conn.origin);
        }
    }

    /// As whose a connection's memory and work count, for the host's own bounds; `None` before it
    /// signed in.
    pub fn user_of(&self, conn: ConnId) -> Option<UserTag> {
        let conn = self.conns.get(&conn)?;
        conn.sender().map(|_| UserTag(conn.origin.user()))
    }

    /// What a connection's turn is to be spent on.
    fn next_work(&mut self, now: Now, id: ConnId) -> Option<Work> {
        let feed = self.next_to_serve(now, id);
        let conn = self.conns.get_mut(&id)?;
        let heard_last = !conn.fed;
        let feed_first = feed.is_some() && heard_last;
        if conn.has_message() && !feed_first && !self.park(now, id) {
            return Some(Work::Message);
        }
        feed.map(Work::Feed)
    }

    /// Sets a connection aside that has said more than it may; returns whether it has.
    fn park(&mut self, now: Now, id: ConnId) -> bool {
        let Some(conn) = self.conns.get_mut(&id) else { return false };
        if conn.phase == Phase::Closing {
            return false;
        }
        let until = conn.sender().and_then(|sender| self.quotas.wait_until(now.mono, sender));
        if let Some(until) = until {
            conn.parked = Some(until);
            self.parked.insert((until, id));
        }
        until.is_some()
    }

    fn work(&mut self, now: Now, id: ConnId, work: Work) -> Result<Turn, StoreError> {
        let conn = self.conns.get_mut(&id);
        self.served = conn.as_ref().map(|conn| conn.origin);
        match work {
            Work::Feed(channel) => {
                if let Some(conn) = conn {
                    conn.fed = true;
                }
                self.feed(id, channel)?;
                Ok(Turn::Feed(id))
            }
            Work::Message => {
                let message = conn.and_then(|conn| {
                    conn.fed = false;
                    let bytes = conn.next_message()?;
                    if let Some(sender) = conn.sender() {
                        let plain = Message::plain_bytes(&bytes).min(MESSAGE_BYTES_MAX);
                        self.quotas.take(now.mono, sender, plain as u64);
                    }
                    Some(bytes)
                });
                if let Some(bytes) = message {
                    self.received(now, id, &bytes)?;
                }
                Ok(Turn::Message(id))
            }
        }
    }

    /// Counts against whoever sent a message what it stands for beyond its bytes.
    pub(super) fn count_more(&mut self, now: Now, id: ConnId, bytes: u64) {
        if let Some(sender) = self.conns.get(&id).and_then(Conn::sender).filter(|_| bytes > 0) {
            self.quotas.take(now.mono, sender, bytes);
        }
    }

    /// A connection counts as whose its newest sign-in says from now on.
    pub(super) fn belongs_to(&mut self, id: ConnId, workspace: WorkspaceHash, user: &str) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let origin = Origin::member(workspace, user, conn.device, id);
        if conn.origin != origin {
            self.turns.rest(&conn.origin);
            conn.origin = origin;
            self.turns.wait(&origin);
        }
    }

    /// Commits a draft of a workspace that is loaded.
    pub(super) fn commit(&mut self, hash: WorkspaceHash, draft: Draft) -> Result<(), StoreError> {
        let Some(workspace) = self.workspaces.get_mut(&hash) else {
            return Err(StoreError::Damaged { what: "a workspace is not loaded".into() });
        };
        let batch = (draft.batch.ops().len() + 1, draft.batch.size_bytes());
        let commit = workspace.commit(&*self.store, draft)?;
        self.flight.begin(commit, batch, self.served.as_ref().map(Origin::user));
        self.unsettled.insert(hash);
        Ok(())
    }

    fn received(&mut self, now: Now, id: ConnId, bytes: &[u8]) -> Result<(), StoreError> {
        let Some(phase) = self.conns.get(&id).map(|conn| conn.phase) else { return Ok(()) };
        if phase == Phase::Closing {
            reached!(RelayClosing);
            return Ok(());
        }
        if let Some((code, reason)) = self.unfit(id, phase, bytes) {
            self.close(id, code, reason);
            return Ok(());
        }
        match (phase, Message::decode(bytes)) {
            (_, Err(error)) => {
                let code = match error {
                    WireError::UnknownRequired(_) => {
                        reached!(RelayUnknown);
                        FaultCode::Incompatible
                    }
                    WireError::TooLarge(_) | WireError::Malformed(_) => {
                        reached!(RelayNoise);
                        FaultCode::Protocol
                    }
                };
                self.close(id, code, &error.to_string());
            }
            (Phase::New, Ok(Some(Message::Hello(hello)))) => self.hello(now, id, &hello),
            (Phase::New, Ok(_)) => {
                reached!(RelayNoHello);
                self.close(id, FaultCode::Protocol, "a session begins with hello");
            }
            (_, Ok(Some(message))) => self.request(now, id, message)?,
            (_, Ok(None)) => reached!(RelaySkips),
        }
        let send_window = self.config.send_window;
        if self.conns.get(&id).is_some_and(|conn| conn.phase != Phase::Closing && conn.is_deaf(send_window)) {
            reached!(RelayDeaf);
            self.close(id, FaultCode::Quota, "too many answers wait to be read");
        }
        Ok(())
    }

    /// Why a message of a device that has not signed in is not even inflated. Nothing that it costs counts
    /// against anybody.
    fn unfit(&self, id: ConnId, phase: Phase, bytes: &[u8]) -> Option<(FaultCode, &'static str)> {
        let conn = self.conns.get(&id).filter(|conn| conn.is_stranger())?;
        match Message::sender(bytes)? {
            Sender::Relay | Sender::Member if phase == Phase::New => {
                reached!(RelayNoHello);
                Some((FaultCode::Protocol, "a session begins with hello"))
            }
            Sender::Relay => {
                reached!(RelayForeign);
                Some((FaultCode::Protocol, "that message is the relay's to send"))
            }
            Sender::Member => Some((FaultCode::NotSignedIn, "sign in first")),
            Sender::Anyone if Message::plain_bytes(bytes) > STRANGER_BYTES_MAX => {
                Some((FaultCode::NotSignedIn, "until a device has signed in its messages are at most 64 KiB"))
            }
            Sender::Anyone if conn.has_failed_too_often(self.config.channels_max) => {
                Some((FaultCode::NotSignedIn, "too much was asked without signing in"))
            }
            Sender::Anyone => None,
        }
    }

    fn hello(&mut self, now: Now, id: ConnId, hello: &Hello) {
        match session::negotiate(hello, &self.config.software, now.wall) {
            Ok(welcome) => {
                reached!(RelayHello);
                if let Some(conn) = self.conns.get_mut(&id) {
                    conn.phase = Phase::Greeted;
                    self.timers.remove(&(conn.hello_by, id, None));
                }
                self.send(id, CommitNo(0), welcome);
            }
            Err(why) => {
                reached!(RelayIncompatible);
                self.close(id, FaultCode::Incompatible, &why);
            }
        }
    }

    fn became_durable(&mut self, commit: CommitNo) {
        self.durable = self.durable.max(commit);
        self.flight.became_durable(self.durable);
        self.touched.append(&mut self.holding);
        // Answers leave before the feed that follows from the same commit.
        self.release();
        let mut hear_more: BTreeSet<ConnId> = BTreeSet::new();
        for hash in std::mem::take(&mut self.unsettled) {
            let Some(workspace) = self.workspaces.get_mut(&hash) else { continue };
            if workspace.became_durable(self.durable) {
                hear_more.extend(workspace.members.keys().map(|(conn, _)| *conn));
            }
            if workspace.is_settled() {
                self.forget_idle(hash);
            } else {
                self.unsettled.insert(hash);
            }
        }
        for conn in hear_more {
            self.wake(conn);
        }
    }

    fn run_timers(&mut self, now: Now) {
        while let Some((_, id)) = self.parked.first().copied().filter(|(at, _)| *at <= now.mono) {
            self.parked.pop_first();
            if let Some(conn) = self.conns.get_mut(&id) {
                conn.parked = None;
                self.wake(id);
            }
        }
        while let Some((_, id, channel)) = self.timers.first().copied().filter(|(at, ..)| *at <= now.mono) {
            self.timers.pop_first();
            let Some(conn) = self.conns.get_mut(&id) else { continue };
            match channel {
                None => {
                    reached!(RelayHelloLate);
                    self.close(id, FaultCode::Protocol, "no hello came in time");
                }
                Some(channel) => {
                    let Some(state) = conn.channels.get_mut(&channel) else { continue };
                    state.expiry_at = None;
                    if state.is_valid(now.wall) {
                        self.watch_expiry(now, id, channel);
                    } else {
                        self.fault(id, channel, FaultCode::TokenExpired, GRANT_EXPIRED);
                    }
                }
            }
        }
    }

    /// Sees to it that the device is told when the grant of a channel expires.
    pub(super) fn watch_expiry(&mut self, now: Now, id: ConnId, channel: Channel) {
        let Some(state) = self.conns.get_mut(&id).and_then(|conn| conn.channels.get_mut(&channel)) else {
            return;
        };
        if let Some(before) = state.expiry_at.take() {
            self.timers.remove(&(before, id, Some(channel)));
        }
        let left_ms = state.grant.not_after_ms.saturating_sub(now.wall.0).max(1);
        let at = now.mono + left_ms;
        state.expiry_at = Some(at);
        self.timers.insert((at, id, Some(channel)));
    }

    /// A channel of a connection.
    pub(super) fn channel(&self, id: ConnId, channel: Channel) -> Option<&ChannelState> {
        self.conns.get(&id)?.channels.get(&channel)
    }

    /// Queues a message that may leave when `after` is durable.
    pub(super) fn send(&mut self, id: ConnId, after: CommitNo, message: impl Into<Message>) {
        self.queue(id, after, session::send(id, message));
    }

    /// Queues an output that may leave when `after` is durable.
    pub(super) fn queue(&mut self, id: ConnId, after: CommitNo, output: Output) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if let Output::Send { bytes, .. } = &output
            && conn.phase != Phase::Closing
        {
            self.unsent_bytes += bytes.len();
        }
        conn.queue(after, output);
        self.touched.insert(id);
        if self.unsent_bytes > self.config.unsent_bytes_max {
            self.make_room();
        }
    }

    /// The connections of a device.
    pub(super) fn of_device(&self, device: DeviceId) -> impl Iterator<Item = ConnId> {
        self.by_device.range((device, ConnId(0))..=(device, ConnId(u64::MAX))).map(|(_, conn)| *conn)
    }

    /// Closes the connection that leaves most unread, so that deaf devices together can't take the
    /// memory that the others' answers need.
    fn make_room(&mut self) {
        let open = self.conns.iter().filter(|(_, conn)| conn.phase != Phase::Closing);
        if let Some(id) = open.max_by_key(|(_, conn)| conn.memory().1).map(|(id, _)| *id) {
            self.close(
                id,
                FaultCode::Quota,
                "the device takes its messages too slowly, and others need the room",
            );
        }
    }

    /// Tells a device what was not done on a channel; the connection goes on.
    pub(super) fn fault(&mut self, id: ConnId, channel: Channel, code: FaultCode, message: &str) {
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.failures += 1;
        }
        let fault = Fault { channel: Some(channel), code: code as u16, message: message.to_owned() };
        self.send(id, CommitNo(0), fault);
    }

    /// Ends a connection and says why.
    pub(super) fn close(&mut self, id: ConnId, code: FaultCode, reason: &str) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        if conn.phase == Phase::Closing {
            return;
        }
        conn.phase = Phase::Closing;
        // The host gives it a moment to take them, and then drops them with the connection.
        self.unsent_bytes -= conn.memory().1;
        let reason = reason.to_owned();
        self.send(id, CommitNo(0), Fault { channel: None, code: code as u16, message: reason.clone() });
        self.queue(id, CommitNo(0), Output::Close { conn: id, code, reason });
        self.leave(id);
    }

    fn shut_out(&mut self, id: ConnId) {
        self.close(id, FaultCode::ShuttingDown, "the relay is shutting down; come back later");
    }

    /// Drops what is known of a connection that has left its workspaces.
    fn forget(&mut self, id: ConnId) {
        self.touched.remove(&id);
        self.holding.remove(&id);
        let Some(conn) = self.conns.remove(&id) else { return };
        self.turns.rest(&conn.origin);
        self.by_device.remove(&(conn.device, id));
        if conn.phase != Phase::Closing {
            self.unsent_bytes -= conn.memory().1;
        }
        if let Some(until) = conn.parked {
            self.parked.remove(&(until, id));
        }
    }

    /// Takes a connection out of its workspaces.
    fn leave(&mut self, id: ConnId) {
        let Some(conn) = self.conns.get_mut(&id) else { return };
        self.timers.remove(&(conn.hello_by, id, None));
        for (channel, state) in std::mem::take(&mut conn.channels) {
            if let Some(at) = state.expiry_at {
                self.timers.remove(&(at, id, Some(channel)));
            }
            if let Some(workspace) = self.workspaces.get_mut(&state.workspace) {
                workspace.leave((id, channel));
            }
            self.forget_idle(state.workspace);
        }
    }

    /// Drops a workspace from memory that nobody uses and whose commits are all durable, unless there
    /// are few: to load one again takes reading its schema, which costs more than a sign-in.
    pub(super) fn forget_idle(&mut self, hash: WorkspaceHash) {
        let idle = self.workspaces.get(&hash).is_some_and(|w| w.members.is_empty() && w.is_settled());
        if idle && self.workspaces.len() > WORKSPACES_KEPT {
            self.workspaces.remove(&hash);
        }
    }

    /// Moves what may leave to the one queue of outputs.
    fn release(&mut self) {
        for id in std::mem::take(&mut self.touched) {
            let Some(conn) = self.conns.get_mut(&id) else { continue };
            let durable = if mutated!(AcknowledgeEarly) { CommitNo(u64::MAX) } else { self.durable };
            while let Some(output) = conn.release(durable) {
                self.ready.push_back(output);
            }
            if conn.is_holding() {
                self.holding.insert(id);
            }
        }
    }
}

/// A piece of work for one connection.
#[derive(Clone, Copy, Debug)]
enum Work {
    Message,
    Feed(Channel),
}

/// The relay's own record, if this program understands the store.
fn read_record(store: &dyn Store) -> Result<Option<RelayRecord>, StoreError> {
    let Some(bytes) = store.get(View::Latest, Keyspace::META, RELAY_KEY)? else { return Ok(None) };
    let record: RelayRecord = codec::decode(&bytes, "the relay's record")?;
    if record.layout > LAYOUT_VERSION {
        return Err(StoreError::NewerFormat { found: record.layout, supported: LAYOUT_VERSION });
    }
    Ok(Some(record))
}

/// What a device hears whose grant is over.
pub(super) const GRANT_EXPIRED: &str = "the grant of this device has expired; sign in again";

impl std::fmt::Debug for Relay {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Relay")
            .field("connections", &self.conns.len())
            .field("workspaces", &self.workspaces.len())
            .field("durable", &self.durable)
            .finish_non_exhaustive()
    }
}
