//! One connection: what it may do, which workspaces it has open, what waits to be sent.

use std::collections::{BTreeMap, VecDeque};

use super::{ConnId, Output};
use crate::clock::{MonoMs, WallMs};
use crate::id::{DeviceId, WorkspaceId};
use crate::store::CommitNo;
use crate::wire::{Channel, Grant, GrantRole, Hello, Message, VERSION_MAX, VERSION_MIN, Welcome};

use super::feed::Reader;
use super::grants;
use super::layout::WorkspaceHash;
use super::quota::Sender;
use super::turns::Origin;

/// How long a connection may take to say hello, in milliseconds; then it is closed.
pub(super) const HELLO_MS_MAX: u64 = 15_000;
/// Unsent bytes at which a connection's feed pauses.
pub(super) const FEED_BYTES_MAX: usize = 1024 * 1024;
/// Unsent bytes at which nothing more that a device asks is looked at.
pub(super) const ANSWER_BYTES_MAX: usize = FEED_BYTES_MAX + 256 * 1024;
/// Unsent answers at which a connection is closed: its device asks and does not listen.
const ANSWERS_MAX: usize = 1024;
/// How often a device may ask for what it can't have, for each workspace of a connection, until it has
/// signed in to one; then it is closed. It asks to sign in and for the feed in one breath, and perhaps
/// once more with a new token.
const FAILURES_PER_CHANNEL: usize = 4;
/// As if it could have so many at least: it may try more than it gets.
const CHANNELS_ASKED_MIN: usize = 64;
/// Features of this relay.
const FEATURES: u64 = 0;

/// How far a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// Waiting for hello.
    New,
    /// Anything goes.
    Greeted,
    /// Told to go away: nothing more is taken from it.
    Closing,
}

#[derive(Debug)]
pub(super) struct Conn {
    pub(super) device: DeviceId,
    pub(super) phase: Phase,
    pub(super) channels: BTreeMap<Channel, ChannelState>,
    /// As whose its work counts.
    pub(super) origin: Origin,
    /// Messages that wait for a turn.
    inbox: VecDeque<Vec<u8>>,
    inbox_bytes: usize,
    /// Until when nothing it says is looked at: it has said too much.
    pub(super) parked: Option<MonoMs>,
    /// Whether its last turn went to its feed; messages and feed take turns.
    pub(super) fed: bool,
    /// The channel whose feed was served last.
    pub(super) served: Channel,
    /// Whether the host was told to take larger messages.
    pub(super) raised: bool,
    /// When it must have said hello.
    pub(super) hello_by: MonoMs,
    /// How often it was told that something was not done.
    pub(super) failures: usize,
    /// Outputs that wait for a commit, and those behind them.
    held: VecDeque<(CommitNo, Output)>,
    /// Sizes of the messages that the network has not taken.
    unsent: VecDeque<usize>,
    unsent_bytes: usize,
}

/// A workspace on a connection. It exists once the device signed in.
#[derive(Debug)]
pub(super) struct ChannelState {
    pub(super) id: WorkspaceId,
    pub(super) workspace: WorkspaceHash,
    pub(super) grant: Grant,
    /// The life of the device's store.
    pub(super) incarnation: u32,
    /// Whether that store went back.
    pub(super) behind: bool,
    /// The newest incarnation of the device that was seen.
    pub(super) newest: u32,
    /// When the expiry of the grant is looked at next.
    pub(super) expiry_at: Option<MonoMs>,
    /// Where the device is in the feed, once it asked for it.
    pub(super) cursor: Option<Cursor>,
}

/// Where a device is in a feed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cursor {
    /// The entry to send next.
    pub(super) next: u64,
    /// Whether the device's own changes are sent in full.
    pub(super) full: bool,
    /// Whether the device was told that it has everything before `next`.
    pub(super) told: bool,
}

impl ChannelState {
    pub(super) fn role(&self) -> GrantRole {
        GrantRole::from_code(self.grant.role).unwrap_or(GrantRole::Reader)
    }

    pub(super) fn is_valid(&self, now: WallMs) -> bool {
        grants::holds(&self.grant, now)
    }

    pub(super) fn reader(&self, device: DeviceId, full: bool) -> Reader<'_> {
        Reader { device, types: &self.grant.types, full }
    }
}

impl Conn {
    pub(super) fn new(id: ConnId, device: DeviceId, now: MonoMs) -> Self {
        Self {
            device,
            origin: Origin::stranger(device, id),
            inbox: VecDeque::new(),
            inbox_bytes: 0,
            parked: None,
            fed: false,
            phase: Phase::New,
            channels: BTreeMap::new(),
            served: 0,
            raised: false,
            hello_by: now + HELLO_MS_MAX,
            failures: 0,
            held: VecDeque::new(),
            unsent: VecDeque::new(),
            unsent_bytes: 0,
        }
    }

    /// Takes in a message.
    pub(super) fn hear(&mut self, bytes: Vec<u8>) {
        self.inbox_bytes += bytes.len();
        self.inbox.push_back(bytes);
    }

    /// The message that has waited longest.
    pub(super) fn next_message(&mut self) -> Option<Vec<u8>> {
        let bytes = self.inbox.pop_front()?;
        self.inbox_bytes -= bytes.len();
        Some(bytes)
    }

    /// Whether a message waits that may be looked at. To one that was told to go away, nothing is
    /// answered any more.
    pub(super) fn has_message(&self) -> bool {
        let may = self.parked.is_none() && self.unsent_bytes < ANSWER_BYTES_MAX;
        !self.inbox.is_empty() && (may || self.phase == Phase::Closing)
    }

    /// Whether it has never signed in.
    pub(super) fn is_stranger(&self) -> bool {
        self.channels.is_empty()
    }

    /// Whether a stranger has asked too often for what it can't have.
    pub(super) fn has_failed_too_often(&self, channels_max: usize) -> bool {
        self.failures >= FAILURES_PER_CHANNEL.saturating_mul(channels_max.max(CHANNELS_ASKED_MIN))
    }

    /// As whom it sends, once it signed in.
    pub(super) fn sender(&self) -> Option<Sender<'_>> {
        let state = self.channels.values().next_back()?;
        Some(Sender { workspace: state.workspace, user: &state.grant.user, device: self.device })
    }

    /// What it holds of the relay's memory: (what it said, what it was not sent yet), in bytes.
    pub(super) fn memory(&self) -> (usize, usize) {
        (self.inbox_bytes, self.unsent_bytes)
    }

    /// Queues an output that may leave when `after` is durable. Order is kept: it also waits
    /// for what was queued before.
    pub(super) fn queue(&mut self, after: CommitNo, output: Output) {
        if let Output::Send { bytes, .. } = &output {
            self.unsent.push_back(bytes.len());
            self.unsent_bytes += bytes.len();
        }
        self.held.push_back((after, output));
    }

    /// The next output that may leave.
    pub(super) fn release(&mut self, durable: CommitNo) -> Option<Output> {
        self.held.front().filter(|(after, _)| *after <= durable)?;
        self.held.pop_front().map(|(_, output)| output)
    }

    /// Whether outputs wait.
    pub(super) fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// The network took the oldest message. Returns its size.
    pub(super) fn sent(&mut self) -> usize {
        let bytes = self.unsent.pop_front().unwrap_or_default();
        self.unsent_bytes -= bytes;
        bytes
    }

    /// Whether there is room for more of a feed.
    pub(super) fn has_room(&self, send_window: usize) -> bool {
        self.phase == Phase::Greeted
            && self.unsent.len() < send_window.max(1)
            && self.unsent_bytes < FEED_BYTES_MAX
    }

    /// Whether the device leaves too many answers unread.
    pub(super) fn is_deaf(&self, send_window: usize) -> bool {
        self.unsent.len() > send_window.saturating_add(ANSWERS_MAX)
    }
}

/// Agrees on a version and on features, or says why that can't be.
pub(super) fn negotiate(hello: &Hello, software: &str, now: WallMs) -> Result<Welcome, String> {
    let version = hello.version_max.min(VERSION_MAX);
    if version < hello.version_min.max(VERSION_MIN) {
        return Err(format!(
            "this relay speaks versions {VERSION_MIN} to {VERSION_MAX} of the protocol, the device {} to {}",
            hello.version_min, hello.version_max
        ));
    }
    let lacking = hello.features_required & !FEATURES;
    if lacking != 0 {
        return Err(format!("the device requires features that this relay lacks ({lacking:#x})"));
    }
    Ok(Welcome {
        version,
        software: software.to_owned(),
        wall_ms: now.0,
        features_required: 0,
        features: FEATURES,
    })
}

/// The output that sends a message.
pub(super) fn send(conn: ConnId, message: impl Into<Message>) -> Output {
    Output::Send { conn, bytes: message.into().encode() }
}
