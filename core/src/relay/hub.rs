//! The relay itself: takes inputs one by one, keeps what they change, queues outputs.
//!
//! Each input is dealt with completely before the next. A request reads the newest committed
//! state, puts all that follows from it into one batch, commits the batch, and queues its
//! answer behind that commit. The feed is served from what is durable only, so it needs no
//! gate of its own.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::entities::EntityCache;
use super::layout::{LAYOUT_VERSION, RELAY_KEY, RelayRecord, WorkspaceHash};
use super::session::{self, ChannelState, Conn, Phase};
use super::workspace::{self, Workspace};
use super::{ConnId, Input, Output, RelayConfig, TokenVerifier};
use crate::clock::{MonoMs, Now};
use crate::codec;
use crate::digest::Digest;
use crate::id::{DeviceId, WorkspaceId};
use crate::store::{Batch, CommitNo, Keyspace, Store, StoreError, View};
use crate::wire::{Channel, Fault, FaultCode, Hello, Message, WireError};

/// Workspaces up to which those that nobody uses stay in memory too.
const WORKSPACES_KEPT: usize = 32;

/// A relay over one store. See the [module](super) for how it is driven.
///
/// - *Begin:* [`open`](Self::open).
/// - *Drive:* [`handle`](Self::handle), then [`poll_output`](Self::poll_output) until it is
///   empty; [`next_wakeup`](Self::next_wakeup) says when to tick.
/// - *Look:* [`workspaces`](Self::workspaces), [`digest`](Self::digest),
///   [`connections`](Self::connections), [`epoch`](Self::epoch).
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
            Some(record) => record.epoch,
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

    /// Takes one input. What is to be done about it waits in [`poll_output`](Self::poll_output).
    ///
    /// An error means that the store failed and the relay's memory may be ahead of it: stop,
    /// and open both again. Nothing that a peer sends leads to an error; a damaged record
    /// fails only the request that met it.
    pub fn handle(&mut self, now: Now, input: Input) -> Result<(), StoreError> {
        self.run_timers(now);
        match input {
            Input::Connected { conn, device } => self.connected(now, conn, device),
            Input::Received { conn, bytes } => self.received(now, conn, &bytes)?,
            Input::Sent { conn } => {
                if let Some(state) = self.conns.get_mut(&conn) {
                    state.sent();
                    self.pump(now, conn)?;
                }
            }
            Input::Disconnected { conn } => {
                self.leave(conn);
                self.conns.remove(&conn);
                self.touched.remove(&conn);
                self.holding.remove(&conn);
            }
            Input::Durable(commit) => self.became_durable(now, commit)?,
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

    /// The next thing to do, in order.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.ready.pop_front()
    }

    /// When to call [`handle`](Self::handle) with [`Input::Tick`] if nothing happens before.
    pub fn next_wakeup(&self) -> Option<MonoMs> {
        self.timers.first().map(|(at, ..)| *at)
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
        let conn = Conn::new(device, now.mono);
        self.timers.insert((conn.hello_by, id, None));
        self.conns.insert(id, conn);
        if self.draining {
            self.shut_out(id);
        }
    }

    fn received(&mut self, now: Now, id: ConnId, bytes: &[u8]) -> Result<(), StoreError> {
        let Some(phase) = self.conns.get(&id).map(|conn| conn.phase) else { return Ok(()) };
        if phase == Phase::Closing {
            reached!(RelayClosing);
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

    fn became_durable(&mut self, now: Now, commit: CommitNo) -> Result<(), StoreError> {
        self.durable = self.durable.max(commit);
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
            self.pump(now, conn)?;
        }
        Ok(())
    }

    fn run_timers(&mut self, now: Now) {
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
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.queue(after, output);
            self.touched.insert(id);
        }
    }

    /// Tells a device what was not done on a channel; the connection goes on.
    pub(super) fn fault(&mut self, id: ConnId, channel: Channel, code: FaultCode, message: &str) {
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
        let reason = reason.to_owned();
        self.send(id, CommitNo(0), Fault { channel: None, code: code as u16, message: reason.clone() });
        self.queue(id, CommitNo(0), Output::Close { conn: id, code, reason });
        self.leave(id);
    }

    fn shut_out(&mut self, id: ConnId) {
        self.close(id, FaultCode::ShuttingDown, "the relay is shutting down; come back later");
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
                workspace.members.remove(&(id, channel));
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
