//! What devices ask for, and what the relay does about it.

use std::sync::Arc;

use super::admit::{self, Submission};
use super::feed::FeedRecord;
use super::grants::{self, Asked, Decision};
use super::hub::{GRANT_EXPIRED, Relay};
use super::layout::{DeviceRecord, WorkspaceHash};
use super::schemas;
use super::session::{ChannelState, Cursor};
use super::workspace::Workspace;
use super::{ConnId, Output, cut};
use crate::clock::Now;
use crate::codec;
use crate::id::{DeviceId, Incarnation, STORE_LIFE_MAX, WorkspaceId};
use crate::store::{Keyspace, Store, StoreError, View};
use crate::wire::{
    Ack, Changes, Channel, FaultCode, FetchSchema, Grant, GrantRole, Granted, Message, Open, PushSchema,
    Refresh, SchemaIs, SignIn, UNIT_WEIGHT_MAX, UnitSize,
};

/// Longest name or system of a device in bytes; what is longer is cut.
const DEVICE_NAME_BYTES_MAX: usize = 128;

impl Relay {
    /// Deals with a message of a session that has begun.
    pub(super) fn request(&mut self, now: Now, id: ConnId, message: Message) -> Result<(), StoreError> {
        let workspace = match &message {
            Message::SignIn(asked) => {
                WorkspaceId::new(asked.workspace.clone()).ok().as_ref().map(WorkspaceHash::of)
            }
            _ => None,
        };
        let (channel, done) = match message {
            Message::SignIn(asked) => (asked.channel, self.sign_in(now, id, asked)),
            Message::Refresh(asked) => (asked.channel, self.refresh(now, id, &asked)),
            Message::Open(asked) => (asked.channel, self.open_feed(now, id, &asked)),
            Message::Changes(asked) => (asked.channel, self.changes(now, id, asked)),
            Message::PushSchema(asked) => (asked.channel, self.push_schema(now, id, &asked)),
            Message::FetchSchema(asked) => (asked.channel, self.fetch_schema(now, id, &asked)),
            Message::Fault(fault) => {
                tracing::info!(conn = id.0, code = fault.code, "a device reports a fault");
                return Ok(());
            }
            Message::Hello(_) => {
                reached!(RelayHelloTwice);
                self.close(id, FaultCode::Protocol, "hello comes once");
                return Ok(());
            }
            Message::Welcome(_)
            | Message::Granted(_)
            | Message::Ack(_)
            | Message::Feed(_)
            | Message::CaughtUp(_)
            | Message::SchemaIs(_) => {
                reached!(RelayForeign);
                self.close(id, FaultCode::Protocol, "that message is the relay's to send");
                return Ok(());
            }
        };
        match done {
            Err(StoreError::Damaged { what }) => {
                tracing::error!(conn = id.0, channel, %what, "a request met a damaged record");
                self.fault(id, channel, FaultCode::Internal, "the relay can't read what this needs");
                Ok(())
            }
            // Refused before anything was queued, so memory is not ahead of the store.
            Err(error @ (StoreError::NoSpace { .. } | StoreError::TooLarge { .. })) => {
                tracing::error!(conn = id.0, channel, %error, "the store takes nothing of a request");
                if let Some(hash) = workspace {
                    self.forget_idle(hash);
                }
                let (code, text) = match error {
                    StoreError::NoSpace { .. } => {
                        (FaultCode::NoSpace, "the relay's disk is full; this was not stored")
                    }
                    _ => {
                        (FaultCode::Quota, "this is more than the relay can store at once; send less at once")
                    }
                };
                self.fault(id, channel, code, text);
                Ok(())
            }
            done => done,
        }
    }

    /// Whether a channel may act; if not, its device is told.
    fn may_act(&mut self, now: Now, id: ConnId, channel: Channel) -> bool {
        match self.channel(id, channel).map(|state| state.is_valid(now.wall)) {
            Some(true) => return true,
            Some(false) => {
                reached!(RelayExpired);
                self.fault(id, channel, FaultCode::TokenExpired, GRANT_EXPIRED);
            }
            None => {
                reached!(RelayNotSignedIn);
                self.fault(id, channel, FaultCode::NotSignedIn, "sign in on this channel first");
            }
        }
        false
    }

    fn sign_in(&mut self, now: Now, id: ConnId, asked: SignIn) -> Result<(), StoreError> {
        let Some(conn) = self.conns.get(&id) else { return Ok(()) };
        let device = conn.device;
        let channel = asked.channel;
        match conn.channels.get(&channel) {
            Some(state) if state.id.as_str() != asked.workspace => {
                reached!(RelayOtherWorkspace);
                self.close(id, FaultCode::Protocol, "the channel carries another workspace");
                return Ok(());
            }
            None if conn.channels.len() >= self.config.channels_max => {
                reached!(RelayChannels);
                let text = format!("{} workspaces are open on this connection already", conn.channels.len());
                self.fault(id, channel, FaultCode::Quota, &text);
                return Ok(());
            }
            _ => {}
        }
        let workspace = match WorkspaceId::new(asked.workspace) {
            Ok(workspace) => workspace,
            Err(error) => {
                reached!(RelayNoWorkspace);
                self.fault(id, channel, FaultCode::WrongWorkspace, &error.to_string());
                return Ok(());
            }
        };
        if asked.incarnation > STORE_LIFE_MAX {
            reached!(RelayNoLife);
            let text = format!("no store of a device has had {} lives", asked.incarnation);
            self.fault(id, channel, FaultCode::Protocol, &text);
            return Ok(());
        }
        let by = Asked {
            workspace: &workspace,
            hash: WorkspaceHash::of(&workspace),
            device,
            token: asked.token.as_deref(),
            now: now.wall,
        };
        let decision = match grants::decide(&*self.store, &*self.verifier, &self.config, by)? {
            Ok(decision) => decision,
            Err((code, text)) => {
                reached!(RelayDenied);
                self.fault(id, channel, code, cut(&text, 512));
                return Ok(());
            }
        };
        self.load_workspace(&workspace)?;
        if let Some(full) = self.is_crowded(by.hash, decision.user(), (id, channel)) {
            self.forget_idle(by.hash);
            self.fault(id, channel, FaultCode::Quota, &full);
            return Ok(());
        }
        let name = printable(&asked.device_name);
        let platform = printable(&asked.platform);
        let before = read_device(&*self.store, by.hash, device)?;
        let behind = before
            .as_ref()
            .is_some_and(|seen| (asked.incarnation, asked.sent) < (seen.incarnation, seen.sent));
        if behind {
            reached!(RelayBehind);
        }
        let (newest, sent) = match &before {
            Some(seen) => (asked.incarnation, asked.sent).max((seen.incarnation, seen.sent)),
            None => (asked.incarnation, asked.sent),
        };
        // A store that went back begins the next life now, and writes in this session already. Should it be lost
        // before another sign-in, what it wrote must not be forgotten with it.
        let begun = behind.then(|| Incarnation::next_store(asked.incarnation, newest)).flatten();
        let (incarnation, sent) = begun.map_or((newest, sent), |begun| (begun, 0));
        let mut after = DeviceRecord { name, platform, incarnation, sent };
        if let Some(seen) = before.as_ref().filter(|seen| !seen.is_called_as(&after))
            && !self.renames.take(now.mono, (by.hash, device))
        {
            after.name.clone_from(&seen.name);
            after.platform.clone_from(&seen.platform);
        }
        let grant = self.adopt(now, by, decision, Some((before, after)))?;
        let user = grant.user.clone();
        let state = ChannelState {
            id: workspace.clone(),
            workspace: by.hash,
            grant,
            incarnation: begun.unwrap_or(asked.incarnation),
            behind,
            newest,
            expiry_at: None,
            cursor: None,
        };
        if let Some(conn) = self.conns.get_mut(&id) {
            // A second sign-in leaves the feed where it is.
            reached!(RelayGranted);
            let earlier = conn.channels.remove(&channel);
            let (expiry_at, cursor) = earlier.map_or((None, None), |e| (e.expiry_at, e.cursor));
            conn.channels.insert(channel, ChannelState { expiry_at, cursor, ..state });
        }

        if let Some(workspace) = self.workspaces.get_mut(&by.hash) {
            workspace.join((id, channel), &user);
        }
        self.belongs_to(id, by.hash, &user);
        self.watch_expiry(now, id, channel);
        self.granted(id, channel);
        self.wake(id);
        Ok(())
    }

    /// Why a user's channel has no room in a workspace.
    fn is_crowded(&self, hash: WorkspaceHash, user: &str, place: (ConnId, Channel)) -> Option<String> {
        let workspace = self.workspaces.get(&hash)?;
        if workspace.members.get(&place).is_some_and(|before| before == user) {
            return None;
        }
        let (all, own) = (workspace.members.len(), workspace.count_of(user));
        if own >= self.config.user_connections_max {
            return Some(format!("the user has {own} connections to {} already", workspace.id));
        }
        let full = all >= self.config.workspace_connections_max;
        full.then(|| format!("{} has {all} connections already", workspace.id))
    }

    fn refresh(&mut self, now: Now, id: ConnId, asked: &Refresh) -> Result<(), StoreError> {
        let (Some(conn), channel) = (self.conns.get(&id), asked.channel) else { return Ok(()) };
        let Some(state) = conn.channels.get(&channel) else {
            self.fault(id, channel, FaultCode::NotSignedIn, "sign in on this channel first");
            return Ok(());
        };
        let (workspace, user) = (state.id.clone(), state.grant.user.clone());
        let by = Asked {
            workspace: &workspace,
            hash: state.workspace,
            device: conn.device,
            token: Some(&asked.token),
            now: now.wall,
        };
        let decision = match grants::decide(&*self.store, &*self.verifier, &self.config, by)? {
            Ok(decision) if decision.user() == user => decision,
            Ok(_) => {
                let text = "the token is another user's; sign in anew to change the user";
                self.fault(id, channel, FaultCode::TokenInvalid, text);
                return Ok(());
            }
            Err((code, text)) => {
                self.fault(id, channel, code, cut(&text, 512));
                return Ok(());
            }
        };
        let grant = self.adopt(now, by, decision, None)?;
        reached!(RelayRefreshed);
        if let Some(state) = self.conns.get_mut(&id).and_then(|conn| conn.channels.get_mut(&channel)) {
            state.grant = grant;
        }
        self.watch_expiry(now, id, channel);
        self.granted(id, channel);
        self.wake(id);
        Ok(())
    }

    /// Makes a decision durable, with what was learned about the device, and lets every other
    /// channel of the same device act by the same grant: rights taken away are gone at once.
    fn adopt(
        &mut self,
        now: Now,
        by: Asked<'_>,
        decision: Decision,
        seen: Option<(Option<DeviceRecord>, DeviceRecord)>,
    ) -> Result<Grant, StoreError> {
        let Some(workspace) = self.workspaces.get_mut(&by.hash) else {
            return Err(StoreError::Damaged { what: format!("{} is not loaded", by.workspace) });
        };
        let mut draft = workspace.draft();
        let grant = decision.grant(by, &mut draft);
        if let Some((before, after)) = seen.filter(|(before, after)| before.as_ref() != Some(after)) {
            draft.batch.put(Keyspace::DEVICE, by.hash.device(by.device), codec::encode(&after));
            if before.is_none_or(|before| !before.is_called_as(&after)) {
                let DeviceRecord { name, platform, .. } = after;
                draft.append(&FeedRecord::Device { key: by.device.0, name, platform });
            }
        }
        if !draft.batch.is_empty() {
            self.commit(by.hash, draft)?;
        }
        let same: Vec<(ConnId, Channel)> = self
            .of_device(by.device)
            .filter_map(|id| Some((id, self.conns.get(&id)?)))
            .flat_map(|(id, conn)| conn.channels.iter().map(move |(channel, state)| (id, *channel, state)))
            .filter(|(.., state)| state.workspace == by.hash)
            .map(|(id, channel, _)| (id, channel))
            .collect();
        for (id, channel) in same {
            if let Some(state) = self.conns.get_mut(&id).and_then(|conn| conn.channels.get_mut(&channel)) {
                state.grant = grant.clone();
            }
            self.watch_expiry(now, id, channel);
        }
        Ok(grant)
    }

    fn granted(&mut self, id: ConnId, channel: Channel) {
        let Some(state) = self.channel(id, channel) else { return };
        let Some(workspace) = self.workspaces.get(&state.workspace) else { return };
        let granted = Granted {
            channel,
            grant: state.grant.clone(),
            schema: schema_hash(workspace),
            behind: state.behind,
            incarnation: state.newest,
            epoch: self.epoch,
        };
        let gate = workspace.gate();
        self.send(id, gate, granted);
        let first = self.conns.get_mut(&id).is_some_and(|conn| !std::mem::replace(&mut conn.raised, true));
        if first {
            self.queue(id, gate, Output::RaiseLimit { conn: id });
        }
    }

    fn open_feed(&mut self, now: Now, id: ConnId, asked: &Open) -> Result<(), StoreError> {
        if !self.may_act(now, id, asked.channel) {
            return Ok(());
        }
        let Some(state) = self.conns.get_mut(&id).and_then(|conn| conn.channels.get_mut(&asked.channel))
        else {
            return Ok(());
        };
        let end = self.workspaces.get(&state.workspace).map_or(0, |workspace| workspace.tip.seq);
        let (next, full) = if asked.epoch != self.epoch {
            reached!(RelayOpenAnew);
            (1, asked.full)
        } else if asked.cursor > end {
            reached!(RelayOpenBeyond);
            // This relay lost what the device has seen. The device's own changes may be
            // among it, so it gets everything that is here in full.
            (1, true)
        } else {
            reached!(RelayOpen);
            (asked.cursor + if mutated!(AcceptStaleCursor) { 2 } else { 1 }, asked.full)
        };
        state.cursor = Some(Cursor { next, full, told: false });
        self.wake(id);
        Ok(())
    }

    fn changes(&mut self, now: Now, id: ConnId, asked: Changes) -> Result<(), StoreError> {
        let Changes { channel, unit_id, sent, unit } = asked;
        if !self.may_act(now, id, channel) {
            return Ok(());
        }
        let size = UnitSize::of(&unit);
        if size.weight() <= UNIT_WEIGHT_MAX as u64 {
            self.count_more(now, id, size.hidden());
        }
        let store = Arc::clone(&self.store);
        let Some(conn) = self.conns.get(&id) else { return Ok(()) };
        let (device, Some(state)) = (conn.device, conn.channels.get(&channel)) else { return Ok(()) };
        let (hash, incarnation) = (state.workspace, state.incarnation);
        let Some(workspace) = self.workspaces.get_mut(&hash) else { return Ok(()) };
        let mut draft = workspace.draft();
        let submission = Submission {
            store: &*store,
            config: &self.config,
            workspace,
            device,
            role: state.role(),
            now: now.wall,
        };
        let verdict = match admit::admit(submission, &mut self.entities, &mut draft, unit, &size)? {
            Ok(verdict) => verdict,
            Err((FaultCode::Protocol, text)) => {
                self.close(id, FaultCode::Protocol, &text);
                return Ok(());
            }
            Err((code, text)) => {
                self.fault(id, channel, code, &text);
                return Ok(());
            }
        };
        if let Some(mut seen) = read_device(&*store, hash, device)?
            && seen.incarnation == incarnation
            && seen.sent < sent
        {
            seen.sent = sent;
            draft.batch.put(Keyspace::DEVICE, hash.device(device), codec::encode(&seen));
        }
        if !draft.batch.is_empty() {
            self.commit(hash, draft)?;
        }
        let Some(workspace) = self.workspaces.get(&hash) else { return Ok(()) };
        let (gate, seq) = (workspace.gate(), workspace.tip.seq);
        for entity in verdict.entities.into_iter().filter(|entity| entity.is_stored()) {
            self.entities.put(hash, entity);
        }
        self.send(id, gate, Ack { channel, unit_id, seq, refused: verdict.refused });
        Ok(())
    }

    fn push_schema(&mut self, now: Now, id: ConnId, asked: &PushSchema) -> Result<(), StoreError> {
        let channel = asked.channel;
        if !self.may_act(now, id, channel) {
            return Ok(());
        }
        let Some(state) = self.channel(id, channel) else { return Ok(()) };
        let hash = state.workspace;
        if !matches!(state.role(), GrantRole::Admin | GrantRole::Authority) {
            // The answer to this request alone: whatever else the device does goes on.
            let problems = vec!["only an admin or an authority pushes a schema".to_owned()];
            let Some(workspace) = self.workspaces.get(&hash) else { return Ok(()) };
            let (gate, hash) = (workspace.gate(), schema_hash(workspace));
            self.send(id, gate, SchemaIs { channel, hash, source: None, problems });
            return Ok(());
        }
        let Some(workspace) = self.workspaces.get_mut(&hash) else { return Ok(()) };
        let mut draft = workspace.draft();
        let problems = match schemas::push(workspace.schema.as_ref(), &asked.source, hash, &mut draft) {
            Ok(Some(schema)) => {
                self.commit(hash, draft)?;
                if let Some(workspace) = self.workspaces.get_mut(&hash) {
                    workspace.schema = Some(schema);
                }
                Vec::new()
            }
            Ok(None) => Vec::new(),
            Err(problems) => problems,
        };
        let Some(workspace) = self.workspaces.get(&hash) else { return Ok(()) };
        let answer = SchemaIs { channel, hash: schema_hash(workspace), source: None, problems };
        let gate = workspace.gate();
        self.send(id, gate, answer);
        Ok(())
    }

    fn fetch_schema(&mut self, now: Now, id: ConnId, asked: &FetchSchema) -> Result<(), StoreError> {
        let channel = asked.channel;
        if !self.may_act(now, id, channel) {
            return Ok(());
        }
        let Some(hash) = self.channel(id, channel).map(|state| state.workspace) else { return Ok(()) };
        let Some(workspace) = self.workspaces.get(&hash) else { return Ok(()) };
        let source = workspace.schema.as_ref().map(|schema| schema.source(&*self.store, hash)).transpose()?;
        let answer = SchemaIs { channel, hash: schema_hash(workspace), source, problems: Vec::new() };
        let gate = workspace.gate();
        self.send(id, gate, answer);
        Ok(())
    }

    /// Sees to it that a workspace is in memory; one that is new is stored with the first
    /// commit.
    fn load_workspace(&mut self, id: &WorkspaceId) -> Result<(), StoreError> {
        let hash = WorkspaceHash::of(id);
        if !self.workspaces.contains_key(&hash) {
            let loaded = Workspace::load(&*self.store, id)?;
            self.workspaces.insert(hash, loaded.unwrap_or_else(|| Workspace::new(id.clone(), hash)));
        }
        Ok(())
    }
}

fn schema_hash(workspace: &Workspace) -> [u8; 32] {
    workspace.schema.as_ref().map_or([0; 32], |schema| schema.hash)
}

fn read_device(
    store: &dyn Store,
    workspace: WorkspaceHash,
    device: DeviceId,
) -> Result<Option<DeviceRecord>, StoreError> {
    store
        .get(View::Latest, Keyspace::DEVICE, &workspace.device(device))?
        .map(|bytes| codec::decode(&bytes, "the record of a device"))
        .transpose()
}

/// A name as others will see it: bounded, one line.
fn printable(name: &str) -> String {
    cut(name, DEVICE_NAME_BYTES_MAX).chars().filter(|c| !c.is_control()).collect()
}
