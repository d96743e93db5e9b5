//! A world for the relay: a store in memory whose durability is given by hand, devices that
//! write real changes, and connections that keep what the relay sent.

#![allow(unreachable_pub, missing_docs)]

pub mod phone;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, MutexGuard};

use anabranch_core::change::{Change, Note, Role, TxMark};
use anabranch_core::clock::{Hlc, MonoMs, Now, WallMs};
use anabranch_core::digest::Digest;
use anabranch_core::genesis::{Genesis, GenesisKind};
use anabranch_core::id::{Author, DeviceId, EntityHash, EntityKey, Incarnation, WorkspaceId};
use anabranch_core::relay::{Claims, ConnId, Input, Output, Relay, RelayConfig, TokenVerifier};
use anabranch_core::store::{
    Batch, CommitNo, DurableHook, Entry, Keyspace, Op, Store, StoreError, StoreStats, View,
};
use anabranch_core::wire::*;
use automerge::legacy::{Key, ObjectId, Op as RawOp, OpId, OpType, SortedVec};
use automerge::{Change as RawChange, ChangeHash, ExpandedChange, ScalarValue};

/// A store in memory. Commits become durable when [`MemoryStore::flush`] is called, and a
/// crash loses the others.
#[derive(Default)]
pub struct MemoryStore {
    inner: Mutex<Inner>,
}

type Map = BTreeMap<(u8, Vec<u8>), Vec<u8>>;

#[derive(Default)]
struct Inner {
    latest: Map,
    published: Map,
    queued: VecDeque<(CommitNo, Batch)>,
    next: u64,
    durable: CommitNo,
    /// What the next commit fails with.
    refusal: Option<StoreError>,
}

fn apply(map: &mut Map, batch: &Batch) {
    for op in batch.ops() {
        match op.clone() {
            Op::Put(keyspace, key, value) => map.insert((keyspace.0, key), value),
            Op::Delete(keyspace, key) => map.remove(&(keyspace.0, key)),
        };
    }
}

impl MemoryStore {
    /// The next commit fails, before anything of it is queued.
    pub fn refuse_next(&self, why: StoreError) {
        self.lock().refusal = Some(why);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    /// Makes everything durable and says up to which commit.
    pub fn flush(&self) -> CommitNo {
        let inner = &mut *self.lock();
        while let Some((commit, batch)) = inner.queued.pop_front() {
            apply(&mut inner.published, &batch);
            inner.durable = commit;
        }
        inner.durable
    }

    /// What is left after a loss of power.
    pub fn crashed(&self) -> Self {
        let inner = self.lock();
        let published = inner.published.clone();
        Self { inner: Mutex::new(Inner { latest: published.clone(), published, ..Inner::default() }) }
    }

    /// How many batches were committed.
    pub fn commits(&self) -> u64 {
        self.lock().next
    }

    /// Overwrites every value of a keyspace.
    pub fn damage(&self, keyspace: Keyspace) {
        let inner = &mut *self.lock();
        for map in [&mut inner.latest, &mut inner.published] {
            for (_, value) in map.iter_mut().filter(|((ks, _), _)| *ks == keyspace.0) {
                *value = vec![1, 255];
            }
        }
    }
}

impl Store for MemoryStore {
    fn get(&self, view: View, keyspace: Keyspace, key: &[u8]) -> Result<Option<Vec<u8>>, StoreError> {
        let inner = self.lock();
        let map = if view == View::Latest { &inner.latest } else { &inner.published };
        Ok(map.get(&(keyspace.0, key.to_vec())).cloned())
    }

    fn scan(
        &self,
        view: View,
        keyspace: Keyspace,
        prefix: &[u8],
        from: &[u8],
        limit: usize,
    ) -> Result<Vec<Entry>, StoreError> {
        let inner = self.lock();
        let map = if view == View::Latest { &inner.latest } else { &inner.published };
        let start = from.max(prefix).to_vec();
        Ok(map
            .range((keyspace.0, start)..)
            .take_while(|((ks, key), _)| *ks == keyspace.0 && key.starts_with(prefix))
            .take(limit)
            .map(|((_, key), value)| (key.clone(), value.clone()))
            .collect())
    }

    fn scan_rev(&self, _: View, _: Keyspace, _: &[u8], _: &[u8], _: usize) -> Result<Vec<Entry>, StoreError> {
        panic!("the relay does not scan backwards")
    }

    fn commit(&self, batch: Batch) -> Result<CommitNo, StoreError> {
        for op in batch.ops() {
            if let Op::Put(_, key, value) = op {
                assert!(key.len() <= anabranch_core::store::KEY_BYTES_MAX);
                assert!(value.len() <= anabranch_core::store::VALUE_BYTES_MAX);
            }
        }
        let inner = &mut *self.lock();
        if let Some(refusal) = inner.refusal.take() {
            return Err(refusal);
        }
        inner.next += 1;
        apply(&mut inner.latest, &batch);
        inner.queued.push_back((CommitNo(inner.next), batch));
        Ok(CommitNo(inner.next))
    }

    fn durable(&self) -> Result<CommitNo, StoreError> {
        Ok(self.lock().durable)
    }

    fn wait_durable(&self, _: CommitNo) -> Result<(), StoreError> {
        panic!("the relay never blocks")
    }

    fn set_durable_hook(&self, _: DurableHook) {}

    fn stats(&self) -> StoreStats {
        StoreStats::default()
    }

    fn shut_down(&self) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Tokens of the form `workspace/user/role/id/expires-in-ms[/once]`, with the wall clock at
/// [`START`] as the beginning.
struct PlainTokens;

impl TokenVerifier for PlainTokens {
    fn verify(&self, token: &str, now: WallMs) -> Result<Claims, (FaultCode, String)> {
        let parts: Vec<&str> = token.split('/').collect();
        let [workspace, user, role, id, expires, once @ ..] = &parts[..] else {
            return Err((FaultCode::TokenInvalid, "no token".into()));
        };
        let expires =
            WallMs(START.0 + expires.parse::<u64>().map_err(|e| (FaultCode::TokenInvalid, e.to_string()))?);
        if expires <= now {
            return Err((FaultCode::TokenExpired, "expired".into()));
        }
        Ok(Claims {
            workspace: (*workspace).into(),
            user: (*user).into(),
            role: GrantRole::from_name(role).ok_or((FaultCode::TokenInvalid, "role".to_owned()))?,
            token_id: (*id).into(),
            single_use: once == ["once"],
            not_before: START,
            expires,
        })
    }
}

/// The wall clock when a world begins.
pub const START: WallMs = WallMs(1_750_000_000_000);
/// The workspace of most stories.
pub const HOME: &str = "home";
/// Its schema.
pub const SCHEMA: &str = r#"
[note]
version = 1
[note.fields]
title = { type = "string" }
stars = { type = "int", merge = "counter" }

[country]
version = 1
merge = "server_only"
[country.fields]
name = { type = "string" }
visits = { type = "int", merge = "counter" }
"#;

/// A relay with its store and its connections.
pub struct World {
    pub relay: Relay,
    pub store: Arc<MemoryStore>,
    pub now: Now,
    conns: u64,
    /// What each connection was sent and has not taken yet.
    inboxes: BTreeMap<ConnId, VecDeque<Output>>,
    /// Connections whose network takes nothing.
    pub stuck: BTreeSet<ConnId>,
}

fn open(store: &Arc<MemoryStore>, config: RelayConfig, seed: u8) -> Relay {
    let relay = Relay::open(store.clone(), Box::new(PlainTokens), config, [seed; 16]).unwrap();
    store.flush();
    relay
}

impl World {
    /// A relay that asks for a schema, as it is by default.
    pub fn strict() -> Self {
        Self::with(RelayConfig::default())
    }

    /// A relay that takes changes without a schema.
    pub fn lenient() -> Self {
        let mut config = RelayConfig::default();
        config.require_schema = false;
        Self::with(config)
    }

    pub fn with(config: RelayConfig) -> Self {
        let store = Arc::new(MemoryStore::default());
        Self {
            relay: open(&store, config, 7),
            store,
            now: Now { mono: MonoMs(1_000), wall: START },
            conns: 0,
            inboxes: BTreeMap::new(),
            stuck: BTreeSet::new(),
        }
    }

    /// The relay loses power and comes back with what was durable.
    pub fn crash(&mut self, config: RelayConfig) {
        self.store = Arc::new(self.store.crashed());
        self.relay = open(&self.store, config, 8);
        self.inboxes.clear();
    }

    pub fn pass(&mut self, ms: u64) {
        self.now.mono = self.now.mono + ms;
        self.now.wall.0 += ms;
        self.handle(Input::Tick);
    }

    pub fn handle(&mut self, input: Input) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            self.relay.handle(self.now, input).unwrap();
            while let Some(output) = self.relay.poll_output() {
                let (Output::Send { conn, .. } | Output::RaiseLimit { conn } | Output::Close { conn, .. }) =
                    &output;
                let conn = *conn;
                if matches!(output, Output::Send { .. }) && !self.stuck.contains(&conn) {
                    inputs.push_back(Input::Sent { conn });
                }
                self.inboxes.entry(conn).or_default().push_back(output);
            }
        }
    }

    /// The disk catches up.
    pub fn flush(&mut self) {
        let durable = self.store.flush();
        self.handle(Input::Durable(durable));
    }

    pub fn connect(&mut self, device: &Device) -> ConnId {
        self.conns += 1;
        let conn = ConnId(self.conns);
        self.handle(Input::Connected { conn, device: device.id() });
        conn
    }

    pub fn send(&mut self, conn: ConnId, message: impl Into<Message>) {
        self.handle(Input::Received { conn, bytes: message.into().encode() });
    }

    /// The network of a stuck connection takes one message.
    pub fn take_one(&mut self, conn: ConnId) {
        self.handle(Input::Sent { conn });
    }

    /// What the relay told a connection since the last look.
    pub fn outputs(&mut self, conn: ConnId) -> Vec<Output> {
        self.inboxes.remove(&conn).unwrap_or_default().into()
    }

    /// The messages among it.
    pub fn inbox(&mut self, conn: ConnId) -> Vec<Message> {
        let outputs = self.outputs(conn).into_iter();
        outputs
            .filter_map(|output| match output {
                Output::Send { bytes, .. } => Some(Message::decode(&bytes).unwrap().unwrap()),
                _ => None,
            })
            .collect()
    }

    /// Makes everything durable, then looks.
    pub fn settle(&mut self, conn: ConnId) -> Vec<Message> {
        self.flush();
        self.inbox(conn)
    }

    pub fn greet(&mut self, device: &Device) -> ConnId {
        let conn = self.connect(device);
        self.send(conn, hello());
        conn
    }

    /// Says hello, signs in to [`HOME`] on channel 1 and opens the feed from the start.
    pub fn join(&mut self, device: &Device, role: &str) -> ConnId {
        let conn = self.greet(device);
        self.send(conn, sign_in(Some(&token(role))));
        self.send(conn, open_from(0));
        self.flush();
        let told = self.inbox(conn);
        assert!(told.iter().any(|m| matches!(m, Message::Granted(_))), "{told:?}");
        conn
    }

    /// A relay with [`SCHEMA`] in force.
    pub fn with_schema() -> Self {
        let mut world = Self::strict();
        let admin = Device::new(99);
        let conn = world.join(&admin, "admin");
        world.send(conn, PushSchema { channel: 1, source: SCHEMA.into() });
        match &world.settle(conn)[0] {
            Message::SchemaIs(answer) => assert_eq!(answer.problems, Vec::<String>::new()),
            other => panic!("{other:?}"),
        }
        world.handle(Input::Disconnected { conn });
        world
    }

    /// Submits a unit and waits for its answer.
    pub fn submit(&mut self, conn: ConnId, unit: Unit) -> Ack {
        self.send(conn, changes(unit));
        let told = self.settle(conn);
        let acks: Vec<&Ack> =
            told.iter().filter_map(|m| if let Message::Ack(ack) = m { Some(ack) } else { None }).collect();
        assert_eq!(acks.len(), 1, "{told:?}");
        acks[0].clone()
    }

    /// The feed as a reader sees it who starts anew.
    pub fn whole_feed(&mut self) -> Vec<FeedEntry> {
        let conn = self.greet(&Device::new(98));
        self.send(conn, sign_in(Some(&token("reader"))));
        self.send(conn, open_from(0));
        let told = self.settle(conn);
        self.handle(Input::Disconnected { conn });
        let entries = entries(&told);
        assert!(entries.iter().map(|e| e.seq).eq(1..=entries.len() as u64), "the feed has a gap");
        entries
    }

    pub fn digest(&self) -> (u64, Digest) {
        self.relay.digest(&home()).unwrap().unwrap()
    }
}

pub fn home() -> WorkspaceId {
    WorkspaceId::new(HOME).unwrap()
}

pub fn token(role: &str) -> String {
    format!("{HOME}/ada/{role}/t1/3600000")
}

pub fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        software: "test".into(),
        wall_ms: START.0,
        features_required: 0,
        features: 0,
        proof: Vec::new(),
    }
}

pub fn sign_in(token: Option<&str>) -> SignIn {
    SignIn {
        channel: 1,
        workspace: HOME.into(),
        token: token.map(str::to_owned),
        device_name: "phone".into(),
        platform: "test".into(),
        incarnation: 0,
        sent: 0,
    }
}

pub fn open_from(cursor: u64) -> Open {
    Open { channel: 1, epoch: [7; 16], cursor, digest: [0; 32], full: false }
}

pub fn changes(unit: Unit) -> Changes {
    Changes { channel: 1, unit_id: 5, sent: 0, unit }
}

/// All feed entries among messages.
pub fn entries(messages: &[Message]) -> Vec<FeedEntry> {
    let feeds = messages.iter().filter_map(|m| if let Message::Feed(feed) = m { Some(feed) } else { None });
    feeds.flat_map(|feed| feed.entries.clone()).collect()
}

/// The faults among messages: channel and code.
pub fn faults(messages: &[Message]) -> Vec<(Option<Channel>, FaultCode)> {
    let faults =
        messages.iter().filter_map(|m| if let Message::Fault(fault) = m { Some(fault) } else { None });
    faults.map(|fault| (fault.channel, FaultCode::from_u16(fault.code).unwrap())).collect()
}

/// The last [`CaughtUp`] among messages.
pub fn caught_up(messages: &[Message]) -> Option<CaughtUp> {
    messages
        .iter()
        .rev()
        .find_map(|m| if let Message::CaughtUp(done) = m { Some(done.clone()) } else { None })
}

/// Codes of what was refused.
pub fn codes(ack: &Ack) -> Vec<anabranch_core::admission::RefusalCode> {
    ack.refused.iter().map(|r| anabranch_core::admission::RefusalCode::from_u16(r.code).unwrap()).collect()
}

/// A device that writes changes as an engine would.
#[derive(Clone)]
pub struct Device {
    pub author: Author,
    /// Its newest change by entity: hash, seq, counter.
    newest: BTreeMap<EntityKey, (ChangeHash, u64, u64)>,
    pub clock: Hlc,
}

/// What a change does that is written by hand.
#[derive(Clone)]
pub struct Draft {
    pub note: Note,
    pub title: String,
    /// What it depends on besides the device's own newest change: hash and counter.
    pub onto: Vec<(ChangeHash, u64)>,
    /// Increments this counter instead of setting the title.
    pub increments: Option<&'static str>,
    pub actor: Option<automerge::ActorId>,
    pub ahead_ms: u64,
    pub field: &'static str,
    /// The operations whose values the title takes the place of.
    pub replaces: Vec<OpId>,
}

impl Default for Draft {
    fn default() -> Self {
        Self {
            note: Note::default(),
            title: "hello".into(),
            onto: Vec::new(),
            increments: None,
            actor: None,
            ahead_ms: 0,
            field: "title",
            replaces: Vec::new(),
        }
    }
}

pub fn key(type_name: &str, id: &str) -> EntityKey {
    EntityKey::new(type_name, id).unwrap()
}

pub fn in_tx(id: u8, members: u32) -> Draft {
    Draft { note: Note { tx: Some(TxMark { id: [id; 16], members }), ..Note::default() }, ..Draft::default() }
}

pub fn as_authority() -> Draft {
    Draft { note: Note { role: Role::Authority, ..Note::default() }, ..Draft::default() }
}

impl Device {
    pub fn new(number: u8) -> Self {
        Self {
            author: Author { device: DeviceId([number; 32]), incarnation: Incarnation(0) },
            newest: BTreeMap::new(),
            clock: Hlc::from_wall(START),
        }
    }

    pub fn id(&self) -> DeviceId {
        self.author.device
    }

    /// Goes on after a change of its own that was made elsewhere.
    pub fn adopt(&mut self, entity: &EntityKey, change: &Change) {
        self.newest.insert(entity.clone(), (change.hash(), change.seq(), change.max_op()));
        self.clock = self.clock.max(change.time());
    }

    /// Writes a change of the note `id`.
    pub fn write(&mut self, id: &str, draft: Draft) -> Change {
        self.write_in(&key("note", id), draft)
    }

    pub fn edit(&mut self, id: &str) -> Change {
        self.write(id, Draft::default())
    }

    pub fn write_in(&mut self, entity: &EntityKey, draft: Draft) -> Change {
        self.clock = self.clock.next();
        let actor = draft.actor.clone().unwrap_or_else(|| self.author.actor(&home(), entity));
        let newest = self.newest.get(entity);
        let (seq, mut start_op) = newest.map_or((1, 1), |(_, seq, op)| (seq + 1, op + 1));
        let mut deps: Vec<ChangeHash> = newest.map(|(hash, ..)| *hash).into_iter().collect();
        for (hash, op) in &draft.onto {
            deps.push(*hash);
            start_op = start_op.max(op + 1);
        }
        let mut pred = SortedVec::from(draft.replaces);
        let action = match draft.increments {
            None => OpType::Put(ScalarValue::Str(draft.title.as_str().into())),
            Some(field) => {
                let genesis = Genesis::new(entity.type_name(), field, GenesisKind::Counter);
                pred = SortedVec::from(vec![genesis.op_id()]);
                deps.push(genesis.hash);
                start_op = start_op.max(2);
                OpType::Increment(1)
            }
        };
        deps.sort_unstable();
        let field = draft.increments.unwrap_or(draft.field);
        let op = RawOp { action, obj: ObjectId::Root, key: Key::Map(field.into()), pred, insert: false };
        let mut extra_bytes = Vec::new();
        if seq == 1 {
            let author = self.author.to_bytes();
            extra_bytes = [&[1, author.len() as u8][..], &author].concat();
        }
        let time = Hlc::from_wall(WallMs(self.clock.wall().0 + draft.ahead_ms)).max(self.clock);
        let raw = RawChange::from(ExpandedChange {
            operations: vec![op],
            actor_id: actor,
            hash: None,
            seq,
            start_op: NonZeroU64::new(start_op).unwrap(),
            time: time.to_change_time(),
            message: Some(draft.note.to_message()),
            deps,
            extra_bytes,
            author: None,
        });
        let change = Change::from_raw(raw).unwrap();
        self.newest.insert(entity.clone(), (change.hash(), seq, start_op));
        change
    }
}

/// The changes of a note.
pub fn of(id: &str, changes: &[&Change]) -> EntityChanges {
    of_entity(&key("note", id), changes)
}

pub fn of_entity(entity: &EntityKey, changes: &[&Change]) -> EntityChanges {
    EntityChanges {
        type_name: entity.type_name().into(),
        id: entity.id().into(),
        genesis: Vec::new(),
        changes: changes.iter().map(|change| change.bytes().to_vec()).collect(),
        signature: Vec::new(),
    }
}

pub fn unit(entities: impl IntoIterator<Item = EntityChanges>) -> Unit {
    Unit { entities: entities.into_iter().collect() }
}

/// The digest of a feed, made from its changes alone, as a device that trusts nobody would.
pub fn digest_of(feed: &[FeedEntry]) -> Digest {
    let mut heads: BTreeMap<EntityKey, BTreeSet<ChangeHash>> = BTreeMap::new();
    for entry in feed {
        let FeedBody::Changes { unit, .. } = &entry.body else { continue };
        for part in &unit.entities {
            let heads = heads.entry(key(&part.type_name, &part.id)).or_default();
            for change in part.changes.iter().map(|bytes| Change::parse(bytes).unwrap()) {
                change.deps().iter().for_each(|dep| {
                    heads.remove(dep);
                });
                heads.insert(change.hash());
            }
        }
    }
    let mut digest = Digest::default();
    for (entity, heads) in heads {
        let heads: Vec<ChangeHash> = heads.into_iter().collect();
        digest.replace(EntityHash::of(&home(), &entity), &[], &heads);
    }
    digest
}
