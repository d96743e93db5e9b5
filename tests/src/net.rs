//! A relay and some devices in one process: replicas, sessions and the relay's decisions as
//! they are, over links and disks that lose what they are told to lose.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use anabranch_core::change::{Change, Role};
use anabranch_core::clock::{MonoMs, Now, WallMs};
use anabranch_core::entity::{ConflictKind, EditError, Row};
use anabranch_core::id::{DeviceId, EntityKey, WorkspaceId};
use anabranch_core::intent::Intent;
use anabranch_core::relay::{Claims, ConnId, Input, Output as Told, Relay, RelayConfig, TokenVerifier};
use anabranch_core::replica::{
    ChannelState, Edit as Write, Expect, Output, Replica, ReplicaConfig, WriteError, parse_version,
};
use anabranch_core::rows::{RowRecord, Rows, SyncStatus};
use anabranch_core::schema::{EntityType, Schema};
use anabranch_core::session::{ClientSession, Event};
use anabranch_core::store::CommitNo;
use anabranch_core::wire::{FaultCode, GrantRole, Message};
use anabranch_store::{MemoryStore, Store};
use automerge::ChangeHash;

use crate::draft::{self, Draw};
use crate::model::{Edit, EditId, Log, Screen, Seen};
use crate::world::{START_MS, screen_of};

const CHANNEL: u32 = 1;
/// More messages than any exchange here takes.
const MESSAGES_MAX: usize = 20_000;

/// Tokens are the names of roles.
struct RoleTokens;

impl TokenVerifier for RoleTokens {
    fn verify(&self, token: &str, _: WallMs) -> Result<Claims, (FaultCode, String)> {
        Ok(Claims {
            workspace: "home".into(),
            user: "ada".into(),
            role: GrantRole::from_name(token).ok_or((FaultCode::TokenInvalid, token.to_owned()))?,
            token_id: token.into(),
            single_use: false,
            not_before: WallMs(0),
            expires: WallMs(START_MS * 2),
        })
    }
}

/// A device with its disk and its link.
struct Node {
    config: ReplicaConfig,
    role: GrantRole,
    store: Arc<MemoryStore>,
    replica: Replica,
    link: Option<Link>,
    offset_ms: i64,
}

struct Link {
    conn: ConnId,
    session: ClientSession,
    /// Under way to the relay, and from it.
    out: VecDeque<Vec<u8>>,
    back: VecDeque<Vec<u8>>,
}

/// What a user tried.
struct Tried {
    node: usize,
    key: EntityKey,
    base: Vec<ChangeHash>,
    screen: Screen,
    intents: Vec<Intent>,
    /// Durable with this commit of the node's store.
    commit: CommitNo,
    /// The change; none where nothing changed, or the edit was refused.
    made: Result<Option<ChangeHash>, ()>,
}

/// All of it.
pub struct Net {
    schema: Arc<Schema>,
    ty: EntityType,
    nodes: Vec<Node>,
    relay: Relay,
    relay_store: Arc<MemoryStore>,
    /// A copy of the relay's disk.
    backup: Arc<MemoryStore>,
    conns: u64,
    time_ms: u64,
    tried: Vec<Tried>,
    known: BTreeSet<ChangeHash>,
    sent: BTreeMap<ChangeHash, Change>,
    unique: u32,
    set_back: u32,
}

fn open_relay(store: &Arc<MemoryStore>) -> Relay {
    let relay = Relay::open(store.clone(), Box::new(RoleTokens), RelayConfig::default(), [7; 16]).unwrap();
    store.make_durable(CommitNo(u64::MAX)).unwrap();
    relay
}

impl Net {
    /// Devices of one type of entity; the first is an authority and brings the schema.
    pub fn new(source: &str, type_name: &str, offsets_ms: &[i64]) -> Self {
        let schema = Arc::new(crate::world::schema(source));
        let nodes = offsets_ms.iter().enumerate().map(|(n, offset_ms)| {
            let role = if n == 0 { GrantRole::Authority } else { GrantRole::Writer };
            let config = ReplicaConfig {
                workspace: WorkspaceId::new("home").unwrap(),
                device: DeviceId([n as u8 + 1; 32]),
                device_name: format!("device {n}"),
                platform: "test".into(),
                schema: schema.clone(),
                schema_source: source.to_owned(),
                assumed_role: Some(role),
                store_life: 0,
                seed: [n as u8; 32],
            };
            let store = Arc::new(MemoryStore::manual());
            let replica = Replica::open(store.clone(), config.clone()).unwrap();
            Node { config, role, store, replica, link: None, offset_ms: *offset_ms }
        });
        let nodes = nodes.collect();
        let relay_store = Arc::new(MemoryStore::manual());
        let backup = Arc::new(MemoryStore::manual());
        let mut net = Self {
            ty: schema.types[type_name].clone(),
            schema,
            nodes,
            relay: open_relay(&relay_store),
            relay_store,
            backup,
            conns: 0,
            time_ms: 0,
            tried: Vec::new(),
            known: BTreeSet::new(),
            sent: BTreeMap::new(),
            unique: 0,
            set_back: 0,
        };
        net.connect(0);
        net.quiet();
        net
    }

    /// How many devices there are.
    pub fn devices(&self) -> usize {
        self.nodes.len()
    }

    /// Time passes.
    pub fn pass(&mut self, ms: u64) {
        self.time_ms += ms;
    }

    fn relay_now(&self) -> Now {
        Now { mono: MonoMs(1_000 + self.time_ms), wall: WallMs(START_MS + self.time_ms) }
    }

    fn now(&self, node: usize) -> Now {
        let right = self.relay_now();
        Now { wall: WallMs(right.wall.0.saturating_add_signed(self.nodes[node].offset_ms)), ..right }
    }

    fn rows(&self, node: usize) -> Rows {
        let Node { store, config, .. } = &self.nodes[node];
        Rows::new(store.clone(), self.schema.clone(), &config.workspace)
    }

    /// A user of a device edits what they see, some entities at once: what is durable there.
    pub fn write(&mut self, node: usize, parts: &[(u8, Vec<Draw>)]) {
        let mut writes = Vec::new();
        let mut tried = Vec::new();
        for (id, draws) in parts {
            let key = EntityKey::new(self.ty.name.clone(), format!("e{}", id % 3)).unwrap();
            if writes.iter().any(|write: &Write| write.key == key) {
                continue;
            }
            let row = self.rows(node).get(&key).unwrap();
            let base = row.as_ref().map_or(Vec::new(), |row| parse_version(&row.version).unwrap());
            let admitted = row.as_ref().is_some_and(|row| row.status == SyncStatus::Synced);
            let creates = row.is_none();
            let row = row.map_or_else(|| self.blank(), |row| self.shown(node, &key, &row));
            let screen = screen_of(&self.ty, &row.fields);
            let intents = draft::intents(&self.ty, &row, &screen, draws, creates, &mut self.unique);
            // What nobody else knows of is forgotten when it is deleted, which no log tells.
            if matches!(intents[..], [Intent::Delete]) && !admitted {
                continue;
            }
            let write = Write {
                key: key.clone(),
                intents: intents.clone(),
                based_on: Some(base.clone()),
                expect: Expect::Any,
            };
            writes.push(write);
            let (commit, made) = (CommitNo(0), Ok(None));
            tried.push(Tried { node, key, base, screen, intents, commit, made });
        }
        let now = self.now(node);
        match self.nodes[node].replica.write(now, &writes, true) {
            Ok(written) => {
                for (tried, version) in tried.iter_mut().zip(&written.versions) {
                    let heads = if version.is_empty() { Vec::new() } else { parse_version(version).unwrap() };
                    let new: Vec<ChangeHash> =
                        heads.into_iter().filter(|head| self.known.insert(*head)).collect();
                    assert!(new.len() <= 1, "one edit made {new:?}");
                    tried.made = Ok(new.first().copied());
                    tried.commit = written.commit;
                }
                self.tried.extend(tried);
            }
            // Of several edits only one need be at fault.
            Err(WriteError::Edit(EditError::UnknownVersion(version))) => panic!("{version}"),
            Err(WriteError::Edit(_)) if tried.len() == 1 => {
                tried[0].made = Err(());
                self.tried.extend(tried);
            }
            Err(WriteError::Edit(_)) => {}
            Err(error) => panic!("{error}"),
        }
        self.collect(node);
    }

    /// Edits one entity as it is now, without the model; `checked` is off for what only the
    /// relay shall refuse. Returns the commit with which it is durable.
    pub fn write_plainly(&mut self, node: usize, id: &str, intents: &[Intent], checked: bool) -> CommitNo {
        self.write_together(node, &[(id, intents)], checked)
    }

    /// Edits some entities as one transaction, without the model.
    pub fn write_together(&mut self, node: usize, parts: &[(&str, &[Intent])], checked: bool) -> CommitNo {
        let write = |(id, intents): &(&str, &[Intent])| {
            let key = EntityKey::new(self.ty.name.clone(), *id).unwrap();
            Write { key, intents: intents.to_vec(), based_on: None, expect: Expect::Any }
        };
        let writes: Vec<Write> = parts.iter().map(write).collect();
        let now = self.now(node);
        let written = self.nodes[node].replica.write(now, &writes, checked).unwrap();
        self.collect(node);
        written.commit
    }

    /// The newest commit that is durable on a device.
    pub fn durable(&self, node: usize) -> CommitNo {
        self.nodes[node].store.durable().unwrap()
    }

    /// What a device shows of an entity, and how many of its changes were refused.
    pub fn look(&self, node: usize, id: &str) -> (Option<RowRecord>, u64) {
        let key = EntityKey::new(self.ty.name.clone(), id).unwrap();
        (self.rows(node).get(&key).unwrap(), self.nodes[node].replica.status().refused)
    }

    /// How often the relay told a device that its store went back.
    pub fn set_back(&self) -> u32 {
        self.set_back
    }

    /// Asks a device to make sure that it has all that the relay has.
    pub fn confirm(&mut self, node: usize) {
        self.nodes[node].replica.confirm();
        self.collect(node);
    }

    /// How far a device's channel has come.
    pub fn state(&self, node: usize) -> &ChannelState {
        self.nodes[node].replica.channel_state()
    }

    /// Whether a device says that it has everything and has sent everything.
    pub fn is_complete(&self, node: usize) -> bool {
        self.nodes[node].replica.is_complete()
    }

    fn blank(&self) -> Row {
        let fields = self.ty.fields.values().map(|field| (field.name.clone(), field.empty_value())).collect();
        Row { fields, deleted: false, conflicts: Vec::new() }
    }

    fn shown(&self, node: usize, key: &EntityKey, row: &RowRecord) -> Row {
        let conflicts = self.rows(node).conflicts().unwrap().into_iter().filter(|(entity, _)| entity == key);
        let conflicts = conflicts.map(|(_, record)| anabranch_core::entity::Conflict {
            field: record.field,
            kind: ConflictKind::from_name(&record.kind).unwrap(),
            sides: Vec::new(),
            base: record.base,
        });
        Row { fields: row.fields.clone(), deleted: row.deleted, conflicts: conflicts.collect() }
    }

    /// A device finds the relay, unless it has.
    pub fn connect(&mut self, node: usize) {
        if self.nodes[node].link.is_some() {
            return;
        }
        self.conns += 1;
        let conn = ConnId(self.conns);
        let (session, hello) = ClientSession::start(self.now(node), "test");
        let link = Link { conn, session, out: VecDeque::from([hello]), back: VecDeque::new() };
        let device = self.nodes[node].config.device;
        self.nodes[node].link = Some(link);
        self.tell_relay(Input::Connected { conn, device });
        let token = self.nodes[node].role.name().to_owned();
        self.nodes[node].replica.connect(CHANNEL, Some(token));
        self.collect(node);
    }

    /// The link breaks: what was under way either way is lost.
    pub fn disconnect(&mut self, node: usize) {
        if let Some(link) = self.nodes[node].link.take() {
            self.nodes[node].replica.disconnect();
            self.collect(node);
            self.tell_relay(Input::Disconnected { conn: link.conn });
        }
    }

    /// A device's disk catches up.
    pub fn flush(&mut self, node: usize) {
        let Node { store, replica, .. } = &mut self.nodes[node];
        // Marking changes as sent commits again.
        loop {
            let commit = replica.last_commit();
            store.make_durable(commit).unwrap();
            replica.durable(commit).unwrap();
            if replica.last_commit() == commit {
                break;
            }
        }
        self.collect(node);
    }

    /// The relay's disk catches up.
    pub fn flush_relay(&mut self) {
        self.relay_store.make_durable(CommitNo(u64::MAX)).unwrap();
        let durable = self.relay_store.durable().unwrap();
        self.tell_relay(Input::Durable(durable));
    }

    /// A device loses power: its link, and what was not durable.
    pub fn crash(&mut self, node: usize) {
        self.disconnect(node);
        let durable = self.nodes[node].store.durable().unwrap();
        // Nobody was told that these were kept.
        self.tried.retain(|tried| tried.node != node || tried.commit <= durable);
        let store = self.nodes[node].store.reopen();
        self.start_on(node, store);
    }

    /// The clock of a device is set to this much before or after the right time.
    pub fn set_clock(&mut self, node: usize, offset_ms: i64) {
        self.nodes[node].offset_ms = offset_ms;
    }

    /// What a backup of a device that is taken now holds.
    pub fn backup(&self, node: usize) -> MemoryStore {
        self.nodes[node].store.copy()
    }

    /// A device gets an older backup of its store.
    pub fn restore(&mut self, node: usize, backup: &MemoryStore) {
        self.disconnect(node);
        self.start_on(node, backup.copy());
    }

    /// A device starts on what a store holds.
    fn start_on(&mut self, node: usize, store: MemoryStore) {
        let store = Arc::new(store);
        let mut config = self.nodes[node].config.clone();
        // Fresh randomness, as a new process has: ids of transactions start from it.
        self.conns += 1;
        config.seed[1..9].copy_from_slice(&self.conns.to_be_bytes());
        self.nodes[node].replica = Replica::open(store.clone(), config).unwrap();
        self.nodes[node].store = store;
        self.flush(node);
    }

    /// The relay loses power.
    pub fn crash_relay(&mut self) {
        self.open_relay_on(self.relay_store.reopen());
    }

    /// What is durable at the relay is copied, over an earlier copy.
    pub fn back_up_relay(&mut self) {
        self.backup = Arc::new(self.relay_store.copy());
    }

    /// The relay is put back to its copy, an empty one if there is none, and is told so or not.
    pub fn restore_relay(&mut self, told: bool) {
        let store = self.backup.copy();
        if told {
            self.conns += 1;
            let mut epoch = [9; 16];
            epoch[..8].copy_from_slice(&self.conns.to_be_bytes());
            Relay::renew_epoch(&store, epoch).unwrap();
            store.make_durable(CommitNo(u64::MAX)).unwrap();
        }
        self.open_relay_on(store);
    }

    fn open_relay_on(&mut self, store: MemoryStore) {
        for node in 0..self.nodes.len() {
            self.nodes[node].link = None;
            self.nodes[node].replica.disconnect();
            self.collect(node);
        }
        self.relay_store = Arc::new(store);
        self.relay = open_relay(&self.relay_store);
    }

    /// A device gets an app with a newer schema.
    pub fn upgrade(&mut self, node: usize, source: &str) {
        self.disconnect(node);
        let Node { config, store, replica, .. } = &mut self.nodes[node];
        config.schema = Arc::new(crate::world::schema(source));
        config.schema_source = source.to_owned();
        *replica = Replica::open(store.clone(), config.clone()).unwrap();
        self.flush(node);
        self.connect(node);
    }

    /// A device pushes its schema.
    pub fn push_schema(&mut self, node: usize) {
        self.nodes[node].replica.exchange_schema(true);
        self.collect(node);
    }

    /// How many entities of a device wait to be sent.
    pub fn pending(&self, node: usize) -> u64 {
        self.nodes[node].replica.status().pending
    }

    /// Gives a device another role from its next sign-in on.
    pub fn appoint(&mut self, node: usize, role: GrantRole) {
        self.nodes[node].role = role;
    }

    /// How many entities the relay lacks something of that a device can't bring.
    pub fn lacking(&self, node: usize) -> u64 {
        self.nodes[node].replica.status().lacking
    }

    fn tell_relay(&mut self, input: Input) {
        let now = self.relay_now();
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            self.relay.handle(now, input).unwrap();
            while let Some(told) = self.relay.poll_output() {
                match told {
                    Told::Send { conn, bytes } => {
                        inputs.push_back(Input::Sent { conn });
                        let link =
                            self.nodes.iter_mut().filter_map(|n| n.link.as_mut()).find(|l| l.conn == conn);
                        if let Some(link) = link {
                            link.back.push_back(bytes);
                        }
                    }
                    Told::RaiseLimit { .. } => {}
                    Told::Close { code, reason, .. } => panic!("the relay closes: {code:?} {reason}"),
                }
            }
        }
    }

    /// Takes what a replica wants done.
    fn collect(&mut self, node: usize) {
        let Node { replica, link, .. } = &mut self.nodes[node];
        let mut reconnect = false;
        while let Some(output) = replica.poll_output() {
            reconnect |= output == Output::Reconnect;
            let Output::Send(bytes) = output else { continue };
            if let Ok(Some(Message::Changes(changes))) = Message::decode(&bytes) {
                for bytes in changes.unit.entities.iter().flat_map(|entity| &entity.changes) {
                    let change = Change::parse(bytes).unwrap();
                    self.sent.insert(change.hash(), change);
                }
            }
            if let Some(link) = link {
                link.out.push_back(bytes);
            }
        }
        if reconnect {
            self.disconnect(node);
            self.connect(node);
        }
    }

    /// Numbers of actors under which more than one change was sent.
    pub fn numbers_used_twice(&self) -> usize {
        let place = |change: &Change| (change.actor().to_bytes().to_vec(), change.seq());
        self.sent.len() - self.sent.values().map(place).collect::<BTreeSet<_>>().len()
    }

    /// One message of a device's link arrives. `false` where none is under way.
    pub fn deliver(&mut self, node: usize, to_relay: bool) -> bool {
        let now = self.now(node);
        let Node { link, replica, .. } = &mut self.nodes[node];
        let Some(link) = link else { return false };
        if to_relay {
            let Some(bytes) = link.out.pop_front() else { return false };
            let conn = link.conn;
            self.tell_relay(Input::Received { conn, bytes });
            return true;
        }
        let Some(bytes) = link.back.pop_front() else { return false };
        match link.session.receive(now, &bytes).unwrap() {
            Event::Ready { relay_ahead_ms, measured } => {
                replica.relay_clock_is(measured, relay_ahead_ms);
            }
            Event::Channel(_, message) => {
                self.set_back += u32::from(matches!(&message, Message::Granted(granted) if granted.behind));
                replica.receive(now, message).unwrap();
            }
            Event::Fault { code, message } => panic!("{code:?}: {message}"),
            Event::Skipped => {}
        }
        self.collect(node);
        true
    }

    /// Everything that is under way arrives, every disk catches up, until nothing moves.
    pub fn quiet(&mut self) {
        for _ in 0..MESSAGES_MAX {
            let mut moved = false;
            for node in 0..self.nodes.len() {
                moved |= self.deliver(node, true);
                moved |= self.deliver(node, false);
                self.flush(node);
            }
            self.flush_relay();
            let under_way =
                |node: &Node| node.link.as_ref().is_some_and(|l| !l.out.is_empty() || !l.back.is_empty());
            if !moved && !self.nodes.iter().any(under_way) {
                return;
            }
        }
        panic!("the network never rests");
    }

    /// Everybody meets. All must hold the same, with nothing left to send and nothing refused,
    /// and each row must be what the model makes of all that users did and were promised.
    pub fn settle(&mut self) {
        self.agree();
        for node in &self.nodes {
            assert_eq!(node.replica.status().refused, 0);
        }
        let keys: BTreeSet<EntityKey> = self.tried.iter().map(|tried| tried.key.clone()).collect();
        for key in keys {
            self.check(&key);
        }
    }

    /// Everybody meets, and holds the same as the relay, with nothing left to send.
    pub fn agree(&mut self) {
        for node in 0..self.nodes.len() {
            self.disconnect(node);
            self.connect(node);
        }
        self.quiet();
        let (_, digest) = self.relay.digest(&WorkspaceId::new("home").unwrap()).unwrap().unwrap();
        for (n, node) in self.nodes.iter().enumerate() {
            let status = node.replica.status();
            assert!(node.replica.is_complete(), "device {n}: {:?}", node.replica.channel_state());
            assert_eq!(status.pending, 0, "device {n} has something left to send");
            assert_eq!(status.digest, digest, "device {n}");
        }
    }

    fn check(&self, key: &EntityKey) {
        let mut log = Log::new(&self.ty);
        let mut ids: BTreeMap<ChangeHash, EditId> = BTreeMap::new();
        for tried in self.tried.iter().filter(|tried| tried.key == *key) {
            let mut saw = Seen::new();
            for head in &tried.base {
                let id = ids[head];
                saw.extend(&log.edit(id).saw);
                saw.insert(id);
            }
            let node = &self.nodes[tried.node];
            let role = if node.role == GrantRole::Authority { Role::Authority } else { Role::Device };
            let deeds = log.understand(&saw, &tried.screen, &tried.intents);
            let effects = log.judge(role, &saw, &deeds);
            match (tried.made, effects) {
                (Err(()), Err(_)) => {}
                (Ok(None), Ok(effects)) if !effects.any() => {}
                (Ok(Some(hash)), Ok(effects)) => {
                    let change = self.sent.get(&hash).expect("what was durable reached the relay");
                    let actor = change.actor().to_bytes().to_vec();
                    let (device, time) = (node.config.device, change.time());
                    ids.insert(hash, log.push(Edit { device, role, time, actor, saw, deeds, effects }));
                }
                (made, effects) => panic!("{made:?} of {:?}, not {effects:?}", tried.intents),
            }
        }
        let all: Seen = ids.values().copied().collect();
        for node in 0..self.nodes.len() {
            let row = self.rows(node).get(key).unwrap();
            let Some(row) = row else {
                assert!(all.is_empty(), "device {node} lacks {key}");
                continue;
            };
            if let Err(wrong) = log.check_fields(&all, row.deleted, &row.fields) {
                panic!("{key} on device {node}: {wrong}");
            }
            let open = log.row(&all).2;
            let wanted: Vec<&String> = open.iter().map(|open| &open.field).collect();
            let conflicts = self.shown(node, key, &row).conflicts;
            let mut shown: Vec<&String> = conflicts.iter().map(|conflict| &conflict.field).collect();
            shown.sort();
            assert_eq!(shown, wanted, "open conflicts of {key} on device {node}");
        }
    }
}
